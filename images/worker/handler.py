"""The RunPod serverless worker: one job in, one answer out. What may be sent and is answered: common/wire.py.

    python handler.py        takes jobs from the platform that the RUNPOD_WEBHOOK_* variables name

The engine is chosen by ENGINE and loaded before the first job is asked for. The handler is asynchronous and the engine
runs in a thread, so that a cancelled or timed-out job stops at once instead of blocking the worker's event loop.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from common.prompts import Prompts
from common.wire import InvalidJob, error, parse_job, to_wire
from engines import Engine, JobError, build


class Handler:
    """Turns jobs into answers with one engine; an instance is the handler that the SDK calls."""

    def __init__(self, engine: Engine, prompts: Prompts) -> None:
        self.engine = engine
        self.prompts = prompts

    async def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """Answer one platform job `{"id", "input"}`; the result is always valid wire JSON."""
        cancelled = threading.Event()
        try:
            return to_wire(await asyncio.to_thread(self._answer, job.get("input"), cancelled))
        except asyncio.CancelledError:
            # The platform has stopped the job. The thread cannot be killed; the event ends it at the next token.
            cancelled.set()
            raise

    def _answer(self, data: object, cancelled: threading.Event) -> dict[str, Any]:
        model = {**self.engine.model, "image": os.environ.get("IMAGE") or None}
        try:
            job = parse_job(data)
            if job.op == "ping":
                return {"op": "ping", "model": model, "prompts": self.prompts.hashes}
            answer = self.engine.answer(job, cancelled)
        except InvalidJob as problem:
            return error("INVALID_INPUT", str(problem))
        except JobError as problem:
            return error(problem.code, str(problem)) | ({"refresh_worker": True} if problem.refresh else {})
        except Exception as problem:
            # The caller gets one sentence; the traceback stays in the worker's log.
            traceback.print_exc(file=sys.stderr)
            return error("INTERNAL", f"{type(problem).__name__}; the worker's log has the details")
        return {
            "synthesis": answer.text,
            "finish_reason": answer.finish_reason,
            "usage": {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens},
            "model": model,
            "prompts": self.prompts.hashes,
            # How long a job waited is the platform's to know (delayTime).
            "timings": {"queue_ms": 0, "prefill_ms": answer.prefill_ms, "decode_ms": answer.decode_ms},
        }


def main() -> None:
    """Load the engine, then take jobs until the platform stops the worker."""
    # At DEBUG, its default, the SDK logs every question and answer; RunPod keeps logs for 90 days.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    prompts = Prompts(Path(os.environ.get("PROMPTS_DIR") or "prompts"))
    handler = Handler(build(prompts), prompts)
    import runpod

    runpod.serverless.start({"handler": handler.__call__})


if __name__ == "__main__":
    main()
