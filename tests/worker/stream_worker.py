"""A worker of another kind than ours: it streams, and takes up to four jobs at once.

{"count": N} yields N chunks. {"party": N} waits until N jobs are there, which needs as many at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import runpod

waiting: list[str] = []


async def stream(job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a job."""
    if party := job["input"].get("party"):
        waiting.append(job["id"])
        while len(waiting) < party:
            await asyncio.sleep(0.02)
    for number in range(job["input"].get("count", 1)):
        yield {"number": number, "text": 'a "ß" 🧪\n'}


if __name__ == "__main__":
    runpod.serverless.start({"handler": stream, "concurrency_modifier": lambda _: 4, "return_aggregate_stream": True})
