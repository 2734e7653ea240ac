"""What an engine is. start.py chooses and builds one.

An engine answers jobs, several at once. It is built once, before the worker asks for its first job, so that loading a
model is never paid by a job's execution time. Cancelling the task that awaits `answer` stops the engine's work on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from common.wire import Job

LOWEST_TEMPERATURE = 1e-4  # below, the likeliest token is taken: scores divided by less can become infinite


class JobError(Exception):
    """A job that cannot be answered. `code` is for programs, the message for people; `refresh` asks for a new worker."""

    def __init__(self, code: str, message: str, *, refresh: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.refresh = refresh


@dataclass(frozen=True)
class Answer:
    """An engine's answer. Times in milliseconds, token counts 0 where the engine has no tokens.

    `queue_ms`: waiting inside the worker until the engine had room. `reasoning_tokens`: those of `completion_tokens`
    that were reasoning, which `text` does not hold. `dropped_sources`: ids of the sources that `fit` left out.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    queue_ms: int = 0
    prefill_ms: int = 0
    decode_ms: int = 0
    dropped_sources: tuple[str, ...] = ()


class Engine(Protocol):
    """Engines behind one small interface."""

    capacity: int
    """How many jobs it can run at once at most; it may run fewer, where they are large."""

    @property
    def model(self) -> dict[str, Any]:
        """The wire's model block: id, revision, engine, quantization."""

    async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
        """Answer a job; each new stretch of the text goes to `emit`, in the event loop's thread. Raises JobError."""

    def metrics(self) -> dict[str, float]:
        """Numbers about the engine, by their name: `…_total` only grow, the others are of this moment."""

    def close(self) -> None:
        """Let go of threads, processes and memory."""


@dataclass
class Start:
    """What starting the engine took: seconds of each phase by its name, and where the weights came from."""

    phases: dict[str, float] = field(default_factory=dict)
    source: str = ""
