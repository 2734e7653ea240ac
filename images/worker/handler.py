"""The RunPod serverless worker: jobs in, answers out. What may be sent and is answered: common/wire.py.

    python handler.py        takes jobs from the platform that the RUNPOD_WEBHOOK_* variables name

The engine is chosen and loaded (start.py) before the first job is asked for. The SDK takes twice as many jobs as the
engine can run, so that there is always a next one; the engine lets a job wait until it has room.

STOP_SECONDS    how long the jobs at work have to finish after SIGTERM, or when a new worker must take over
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn

from common.prompts import Prompts
from common.wire import InvalidJob, Job, chunks, error, parse_job, to_wire, wire_size
from engines import Answer, Engine, JobError, Start
from metrics import Metrics
from start import Unfit, build, process_seconds

STOP_SECONDS = 8.0  # Docker kills 10 s after SIGTERM
DELIVER_SECONDS = 5.0  # beyond that, for results to reach the platform
LAST_RESORT_SECONDS = 30.0  # beyond that; a thread that hangs in a driver would keep the process for ever
QUIET_SECONDS = 0.3  # the SDK begins a job within 0.1 s after it has fetched it
CHUNK_SECONDS = 0.05  # between two chunks of a job at least: each is a request to the platform
STOPPED = "the worker is being stopped; send the job again"


class Handler:
    """Turns jobs into answers with one engine. `config` is what the SDK is started with."""

    def __init__(self, engine: Engine, prompts: Prompts, start: Start, *, stop_seconds: float = STOP_SECONDS) -> None:
        self.engine = engine
        self.prompts = prompts
        self.metrics = Metrics(start.phases)
        self.stopping = False
        self.config: dict[str, Any] = {
            "handler": self.answer,
            "return_aggregate_stream": True,
            "concurrency_modifier": self._concurrency,
        }
        self._stop_seconds = stop_seconds
        self._cold_start: dict[str, Any] | None = {
            "weights_from": start.source,
            **{f"{phase}_ms": round(seconds * 1000) for phase, seconds in start.phases.items()},
        }
        self._runs: set[_Run] = set()
        # The SDK's tasks: those of jobs, each there until its result is delivered; those among them that ask for a new
        # worker; those that fetch and begin jobs.
        self._jobs: set[asyncio.Task[Any]] = set()
        self._refreshing: set[asyncio.Task[Any]] = set()
        self._loops: set[asyncio.Task[Any]] = set()
        self._shut_down: Callable[[], object] = lambda: None  # the SDK's own answer to SIGTERM
        self._asked = 0.0  # when the SDK was last about to fetch jobs
        self._ending: asyncio.Task[None] | None = None

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def answer(self, platform_job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Answer one platform job `{"id", "input"}`: chunks of text if it streams, then the answer or an error."""
        run = self._open()
        refresh = False
        try:
            try:
                job = parse_job(platform_job.get("input"))
                if self.stopping:
                    raise JobError("STOPPED", STOPPED)
                if job.op == "synthesize":
                    run.ask(self.engine, job)
                    while new := await run.chunks():
                        for chunk in new:
                            run.sent += wire_size(chunk)
                            yield chunk
                    last = self._answered(run.result())
                else:
                    last = await self._told(job.op)
                run.code = "OK"
            except InvalidJob as problem:
                run.code, last = "INVALID_INPUT", error("INVALID_INPUT", str(problem))
            except JobError as problem:
                run.code, last = problem.code, error(problem.code, str(problem))
                refresh = problem.refresh
            except Exception as problem:
                # The caller gets one sentence; the traceback stays in the worker's log.
                traceback.print_exc(file=sys.stderr)
                run.code = "INTERNAL"
                last = error("INTERNAL", f"{type(problem).__name__}; the worker's log has the details")
            if refresh:
                await self._refresh()
            sent = to_wire(last, run.sent)
            if run.code == "OK" and "error" in sent:
                run.code = sent["error"].partition(":")[0]
            yield sent
        finally:
            self._close(run)

    def _open(self) -> _Run:
        task = asyncio.current_task()
        assert task
        run = _Run()
        self._runs.add(run)
        self._jobs.add(task)

        def ended(task: asyncio.Task[Any]) -> None:
            # A job that was cancelled while the SDK was sending a chunk: its generator is not told.
            self._close(run)
            self._jobs.discard(task)

        task.add_done_callback(ended)
        return run

    def _close(self, run: _Run) -> None:
        if run in self._runs:
            self._runs.remove(run)
            self.metrics.jobs[run.code] += 1
            run.cancel()

    def _answered(self, answer: Answer) -> dict[str, Any]:
        self.metrics.count(answer)
        timings: dict[str, Any] = {
            "queue_ms": answer.queue_ms,
            "prefill_ms": answer.prefill_ms,
            "decode_ms": answer.decode_ms,
        }
        if self._cold_start:
            timings["cold_start"], self._cold_start = self._cold_start, None
        return {
            "synthesis": answer.text,
            "finish_reason": answer.finish_reason,
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
                "reasoning_tokens": answer.reasoning_tokens,
            },
            "model": self._model(),
            "prompts": self.prompts.hashes,
            "timings": timings,
            "dropped_sources": list(answer.dropped_sources),
        }

    async def _told(self, op: str) -> dict[str, Any]:
        if op == "ping":
            return {"op": "ping", "model": self._model(), "prompts": self.prompts.hashes}
        # In a thread: vLLM's numbers come over HTTP.
        numbers = await asyncio.to_thread(self.engine.metrics)
        return {"op": "metrics", "metrics": self.metrics.text(len(self._runs), numbers)}

    def _model(self) -> dict[str, Any]:
        # Both set by `make deploy`, which tells by them which release an answer came from.
        deployed = {"image": os.environ.get("IMAGE") or None, "release": os.environ.get("RELEASE") or None}
        return {**self.engine.model, **deployed}

    # --- the end -----------------------------------------------------------------------------------------------------

    def _concurrency(self, current: int) -> int:
        """How many jobs the SDK may hold. It asks before each time that it fetches jobs."""
        self._asked = asyncio.get_running_loop().time()
        if not self._loops:
            self._meet_signals()
        # With another limit than before it first waits until it holds no job: so it fetches none while this one stops.
        return current + 1 if self.stopping else max(2, 2 * self.engine.capacity)

    def _meet_signals(self) -> None:
        """Called in the SDK's event loop once its own signal handlers are set and before the first job is there.

        At SIGTERM the SDK leaves jobs that it still gets lying, and waits for those at work however long they take and for
        its requests, which the platform holds up to 90 s. So it hears of the signal only when all is done.
        """
        self._loops = asyncio.all_tasks()
        theirs = signal.getsignal(signal.SIGTERM)
        if callable(theirs):
            self._shut_down = lambda: theirs(signal.SIGTERM, None)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)

    def stop(self) -> None:
        """Begin no more jobs, let those at work finish or fail, then end the SDK's loops. In the event loop's thread."""
        if self.stopping:
            return
        self.stopping = True
        last_resort = self._stop_seconds + DELIVER_SECONDS + LAST_RESORT_SECONDS
        faulthandler.dump_traceback_later(last_resort, exit=True, file=sys.__stderr__ or 2)
        loop = asyncio.get_running_loop()
        loop.call_later(self._stop_seconds, self._cut)
        self._ending = loop.create_task(self._end())

    def _cut(self) -> None:
        for run in self._runs:
            run.cut()

    async def _end(self) -> None:
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._stop_seconds + DELIVER_SECONDS
        while (now := loop.time()) < limit:
            if self._jobs:
                await asyncio.wait(self._jobs, timeout=limit - now)
            elif now < self._asked + QUIET_SECONDS:  # it may have come with jobs, which are not begun yet
                await asyncio.sleep(self._asked + QUIET_SECONDS - now)
            else:
                break
        self._shut_down()
        for task in self._loops:
            task.cancel()

    async def _refresh(self) -> None:
        """Ask the platform for a new worker. It ends this one when it hears of it: the other jobs' results go first."""
        self.stop()
        task = asyncio.current_task()
        assert task
        self._refreshing.add(task)
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._stop_seconds + 1
        try:
            while (others := self._jobs - self._refreshing) and loop.time() < limit:
                await asyncio.wait(others, timeout=0.1)
        finally:  # also where the job is cancelled meanwhile
            self.config["refresh_worker"] = True  # the SDK adds stopPod to the results that it sends from now on


class _Run:
    """One job: the engine's work on it, and the text that has not been sent yet."""

    def __init__(self) -> None:
        self.code = "CANCELLED"  # what it is counted as, unless it comes to an end of its own
        self.sent = 0  # bytes of the chunks
        self._text: list[str] = []
        self._news = asyncio.Event()
        self._work: asyncio.Task[Answer] | None = None
        self._cut = False
        self._due = 0.0

    def ask(self, engine: Engine, job: Job) -> None:
        """Let the engine begin."""
        self._work = asyncio.create_task(engine.answer(job, self._emit if job.stream else _ignore))
        self._work.add_done_callback(self._worked)

    def _emit(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._news.set()

    def _worked(self, work: asyncio.Task[Answer]) -> None:
        if not work.cancelled():
            work.exception()  # asyncio complains of one that nobody has looked at, as after a cancelled job
        self._news.set()

    async def chunks(self) -> list[dict[str, Any]]:
        """What has collected since the last call, as wire chunks; waits until there is some. Empty at the end."""
        assert self._work
        await self._news.wait()
        loop = asyncio.get_running_loop()
        if self._text and self._due > loop.time():
            await asyncio.wait((self._work,), timeout=self._due - loop.time())
        self._due = loop.time() + CHUNK_SECONDS
        text = "".join(self._text)
        self._text.clear()
        if not (self._work.done() or self._cut):
            self._news.clear()
        return chunks(text)

    def result(self) -> Answer:
        """The answer. Raises what the engine raised."""
        assert self._work
        if self._cut and (self._work.cancelled() or not self._work.done()):
            raise JobError("STOPPED", STOPPED)
        if self._work.cancelled():
            raise RuntimeError("the engine has cancelled a job of its own accord")
        return self._work.result()

    def cut(self) -> None:
        """Time is up. An engine that does not stop, because its device hangs, is not waited for."""
        self._cut = True
        self.cancel()
        self._news.set()

    def cancel(self) -> None:
        """Let the engine stop."""
        if self._work:
            self._work.cancel()


def _ignore(text: str) -> None:
    pass


def main() -> None:
    """Load the engine, then take jobs until the platform stops the worker."""
    # At DEBUG, its default, the SDK logs every question and answer; RunPod keeps logs for 90 days.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    # The first process of a container ignores SIGTERM unless it says otherwise; and what has been started must be ended.
    signal.signal(signal.SIGTERM, _terminated)
    stop_seconds = _stop_seconds(os.environ.get("STOP_SECONDS"))
    prompts = Prompts(Path(os.environ.get("PROMPTS_DIR") or "prompts"))
    try:
        engine, start = build(prompts, os.environ)
    except Unfit as unfit:
        _refuse(str(unfit))
    try:
        import runpod

        start.phases["total"] = process_seconds()
        handler = Handler(engine, prompts, start, stop_seconds=stop_seconds)
        try:
            runpod.serverless.start(handler.config)
        except asyncio.CancelledError:
            if not handler.stopping:
                raise
    finally:
        engine.close()


def _terminated(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _stop_seconds(given: str | None) -> float:
    try:
        seconds = float(given or STOP_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise SystemExit(f"STOP_SECONDS={given} is not between 0 and 3600 seconds")
    return seconds


def _refuse(why: str) -> NoReturn:
    """End without taking a job. Under the platform the SDK does that, because it tells the platform why."""
    if os.environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        import runpod

        runpod.serverless.start({"handler": lambda job: error("UNFIT", why)})
    raise SystemExit(f"error: {why}")


if __name__ == "__main__":
    main()
