"""The worker as it ships, around an engine that says what it saw; it notes what happens in the file $EVENTS.

A prompt "wait …" runs until the job is cancelled; "wait once …" does so only for the first worker that gets it.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import handler
from common.prompts import Prompts
from common.wire import Job
from engines import Answer, Engine

EVENTS = Path(os.environ["EVENTS"])


def note(what: str) -> None:
    """Add a line "<pid> <what>" to the file of events."""
    with EVENTS.open("a") as file:
        file.write(f"{os.getpid()} {what}\n")


class StubEngine:
    """Answers with the job as JSON."""

    model: dict[str, Any]

    def __init__(self) -> None:
        self.model = {"id": "stub", "revision": None, "engine": "extractive", "quantization": "none"}

    def answer(self, job: Job, cancelled: threading.Event) -> Answer:
        """Wait or echo, as the prompt says."""
        known = EVENTS.read_text().splitlines() if EVENTS.exists() else []
        again = any(line.endswith(f" began {job.prompt}") for line in known)
        note(f"began {job.prompt}")
        if job.prompt.startswith("wait") and not (again and job.prompt.startswith("wait once")):
            ended = cancelled.wait(60)
            note(f"{'cancelled' if ended else 'gave up on'} {job.prompt}")
        return Answer(json.dumps(vars(job)), "stop")


def build(prompts: Prompts) -> Engine:
    """Takes the place of the engines' own."""
    return StubEngine()


if __name__ == "__main__":
    handler.build = build  # type: ignore[attr-defined]
    handler.main()
