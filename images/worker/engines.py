"""What an engine is, and how one is chosen.

An engine answers a job. It is built once, before the worker asks for its first job, so that loading a model is never
paid by a job's execution time.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from common.prompts import Prompts
from common.wire import Job


class JobError(Exception):
    """A job that cannot be answered. `code` is for programs, the message for people; `refresh` asks for a new worker."""

    def __init__(self, code: str, message: str, *, refresh: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.refresh = refresh


@dataclass(frozen=True)
class Answer:
    """An engine's answer. Times in milliseconds, token counts 0 where the engine has no tokens."""

    text: str
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prefill_ms: int = 0
    decode_ms: int = 0


class Engine(Protocol):
    """Engines behind one small interface: what they are, and one method."""

    @property
    def model(self) -> dict[str, Any]:
        """The wire's model block: id, revision, engine, quantization."""

    def answer(self, job: Job, cancelled: threading.Event) -> Answer:
        """Answer a job; return early with finish_reason "cancelled" once `cancelled` is set. Raises JobError."""


def build(prompts: Prompts) -> Engine:
    """The engine that ENGINE names: `extractive` (no weights) or `transformers` (the model of MODEL_ID)."""
    name = os.environ.get("ENGINE") or ("transformers" if os.environ.get("MODEL_ID") else "extractive")
    if name == "extractive":
        from extractive import ExtractiveEngine

        return ExtractiveEngine()
    if name == "transformers":
        model_id = os.environ.get("MODEL_ID")
        if not model_id:
            raise SystemExit(
                "ENGINE=transformers needs MODEL_ID, for example MODEL_ID=your-name/open-synthesis-qwen3-14b"
            )
        from generative import TransformersEngine

        return TransformersEngine(prompts, model_id, os.environ.get("MODEL_REVISION") or None)
    raise SystemExit(f"ENGINE={name} is unknown; known are extractive, transformers")
