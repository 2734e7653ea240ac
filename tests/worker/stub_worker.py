"""The worker as it ships, around an engine that does as the prompt says; it notes what happens in the file $EVENTS.

    wait …            runs until the job is cancelled; "wait once …" does so only for the first worker that gets it
    sleep S …         answers after S seconds
    stream N MS …     answers with N words, one each MS milliseconds
    stream N MS wait  then runs until the job is cancelled
    lose …            asks for a new worker
    hang S …          works S seconds in a thread and does not hear that it is cancelled
Anything else is answered with the job as JSON. $CAPACITY is the engine's capacity, 4 unless it is set.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import handler
from common.prompts import Prompts
from common.wire import Job
from engines import Answer, Engine, JobError, Start

EVENTS = Path(os.environ["EVENTS"])


def note(what: str) -> None:
    """Add a line "<pid> <what>" to the file of events."""
    with EVENTS.open("a") as file:
        file.write(f"{os.getpid()} {what}\n")


class StubEngine:
    """Does as the prompt says."""

    def __init__(self) -> None:
        self.model: dict[str, Any] = {"id": "stub", "revision": None, "engine": "extractive", "quantization": "none"}
        self.capacity = int(os.environ.get("CAPACITY", "4"))
        self._room = asyncio.Semaphore(self.capacity)

    async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
        """Answer, and note when the work on it began and whether it was cancelled."""
        async with self._room:
            known = EVENTS.read_text().splitlines() if EVENTS.exists() else []
            again = any(line.endswith(f" began {job.prompt}") for line in known)
            note(f"began {job.prompt}")
            try:
                text = await self._work(job, emit, again)
            except asyncio.CancelledError:
                note(f"cancelled {job.prompt}")
                raise
        note(f"answered {job.prompt}")
        return Answer(text, "stop", completion_tokens=len(text.split()))

    async def _work(self, job: Job, emit: Callable[[str], None], again: bool) -> str:
        what, *words = job.prompt.split()
        if what == "wait" and not (again and words[0] == "once"):
            await asyncio.sleep(60)
        elif what == "sleep":
            await asyncio.sleep(float(words[0]))
        elif what == "lose":
            raise JobError("GPU_LOST", "a new worker takes over, try again", refresh=True)
        elif what == "hang":
            thread = asyncio.ensure_future(asyncio.to_thread(time.sleep, float(words[0])))
            await asyncio.wait((thread,))
        elif what == "stream":
            return await self._stream(int(words[0]), float(words[1]) / 1000, emit, "wait" in words)
        text = json.dumps(vars(job))
        emit(text)
        return text

    async def _stream(self, count: int, seconds: float, emit: Callable[[str], None], wait: bool) -> str:
        for number in range(count):
            await asyncio.sleep(seconds)
            emit(f"{number} ")
        if wait:
            note("streamed all")
            await asyncio.sleep(60)
        return "".join(f"{number} " for number in range(count))

    def metrics(self) -> dict[str, float]:
        """Two numbers of each kind."""
        return {"batch_size": 1.0, "kv_used_ratio": 0.25, "forward_passes_total": 7.0}

    def close(self) -> None:
        """The last that the worker does."""
        note("closed")


def build(prompts: Prompts, environ: Mapping[str, str]) -> tuple[Engine, Start]:
    """Takes the place of the worker's own."""
    return StubEngine(), Start(phases={"load": 1.5}, source="volume")


if __name__ == "__main__":
    handler.build = build  # type: ignore[attr-defined]
    handler.main()
