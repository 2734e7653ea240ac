"""HTTP around the platform: the job API for clients, the worker's routes, and the fault knobs.

Clients:  POST /v2/{endpoint}/run|runsync|cancel/{id}|retry/{id}|purge-queue, GET …/status/{id}|stream/{id}|health
          with `Authorization: Bearer <key>`.
Workers:  GET /v2/{endpoint}/job-take/{worker}, job-take-batch/{worker}, job-stop/{worker}, ping/{worker};
          POST job-done/{worker}/{id}, job-stream/{worker}/{id}, with the raw key as the SDK sends it.
Faults:   GET, POST, DELETE /__faults__ with the client's key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from local_runpod.platform import (
    FAULT_KINDS,
    FINAL,
    RESULT_MAX_BYTES,
    RUN_MAX_BYTES,
    RUNSYNC_MAX_BYTES,
    STREAM_CHUNK_MAX_BYTES,
    Fault,
    Platform,
    Refused,
)

HOLD = 2.0  # seconds that a worker's request for jobs, or for jobs to stop, is held open
SYNC_WAIT_MS = (1_000, 90_000, 300_000)  # least, default, most


class Server:
    """The routes over one platform. `changed` wakes the requests that are held open."""

    def __init__(
        self, platform: Platform, key: str, clock: Callable[[], float] = time.monotonic, hold: float = HOLD
    ) -> None:
        self.platform = platform
        self.key = key
        self.hold = hold
        self.clock = clock
        self.changed = asyncio.Condition()
        # Called when the `crash` fault strikes, to end a real worker process where this server has started one.
        self.kill_worker: Callable[[], None] | None = None

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=RUNSYNC_MAX_BYTES + 1_000_000, middlewares=[self._refusals])
        at = f"/v2/{self.platform.endpoint}"
        client: list[tuple[str, str, str, Callable[[web.Request], Awaitable[Any]]]] = [
            ("POST", "run", "", self._run),
            ("POST", "runsync", "", self._runsync),
            ("GET", "status", "/{job}", self._status),
            ("GET", "stream", "/{job}", self._stream),
            ("POST", "cancel", "/{job}", self._cancel),
            ("POST", "retry", "/{job}", self._retry),
            ("POST", "purge-queue", "", self._purge),
            ("GET", "health", "", self._health),
        ]
        for method, route, tail, serve in client:
            app.router.add_route(method, f"{at}/{route}{tail}", self._client_route(route, serve))
        worker: list[tuple[str, str, str, Callable[[web.Request, str], Awaitable[web.StreamResponse]]]] = [
            ("GET", "job-take", "", self._take),
            ("GET", "job-take-batch", "", self._take),
            ("GET", "job-stop", "", self._stops),
            ("GET", "ping", "", self._ping),
            ("POST", "job-done", "/{job}", self._done),
            ("POST", "job-stream", "/{job}", self._chunk),
        ]
        for method, name, tail, take in worker:
            app.router.add_route(method, f"{at}/{name}/{{worker}}{tail}", self._worker_route(name, take))
        app.router.add_route("*", "/__faults__", self._faults)
        return app

    # --- every request -----------------------------------------------------------------------------------------------

    @web.middleware
    async def _refusals(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]
    ) -> web.StreamResponse:
        try:
            answer: web.StreamResponse = await handler(request)
            return answer
        except Refused as refusal:
            return web.json_response({"error": str(refusal)}, status=refusal.status)
        except web.HTTPRequestEntityTooLarge:
            return web.json_response({"error": "the body is too large"}, status=413)

    def _authorise(self, request: web.Request, expected: str) -> None:
        if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), expected.encode()):
            raise Refused(401, "unauthorized")

    def _client_route(
        self, route: str, serve: Callable[[web.Request], Awaitable[Any]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._authorise(request, f"Bearer {self.key}")

            async def answer() -> web.StreamResponse:
                return web.json_response(await serve(request))

            return await self._with_faults(route, request, answer)

        return handle

    def _worker_route(
        self, route: str, serve: Callable[[web.Request, str], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._authorise(request, self.key)
            return await self._with_faults(route, request, lambda: serve(request, request.match_info["worker"]))

        return handle

    async def _with_faults(
        self, route: str, request: web.Request, serve: Callable[[], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        faults = self.platform.route_faults(route)
        if slow := faults.get("slow"):
            # Read first, so that the request is served even if the client has left meanwhile, as behind a gateway.
            await request.read()
            await asyncio.sleep(slow.seconds)
        if http := faults.get("http"):
            return _http_fault(http)
        if "html" in faults:
            return web.Response(text="<html><body>Just a moment…</body></html>", content_type="text/html")
        answer = await serve()
        if "unknown_state" in faults:
            answer = web.json_response({"id": request.match_info["job"], "status": "WARMING_UP"})
        if "lost_answer" in faults and request.transport:
            request.transport.abort()
        return answer

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        async with self.changed:
            yield
            self.changed.notify_all()

    async def _wait(self, ready: Callable[[], bool], seconds: float) -> None:
        """Hold a request until `ready` or for `seconds`; time passes for the platform meanwhile."""
        end = self.clock() + seconds
        async with self.changed:
            while not ready() and (left := end - self.clock()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), min(left, 0.5))
                self.platform.tick(self.clock())

    async def lose_worker(self, worker_id: str) -> None:
        """A worker's process has ended."""
        async with self._change():
            self.platform.lose_worker(worker_id, self.clock())

    # --- clients -----------------------------------------------------------------------------------------------------

    async def _run(self, request: web.Request) -> dict[str, Any]:
        body = await _json(request, RUN_MAX_BYTES)
        async with self._change():
            job = self.platform.submit(body, self.clock())
        return {"id": job.id, "status": job.status}

    async def _runsync(self, request: web.Request) -> dict[str, Any]:
        body = await _json(request, RUNSYNC_MAX_BYTES)
        least, default, most = SYNC_WAIT_MS
        wait = request.query.get("wait", str(default))
        if not wait.isdecimal() or len(wait) > 6 or not least <= int(wait) <= most:
            raise Refused(400, f"wait must be between {least} and {most} milliseconds")
        async with self._change():
            job = self.platform.submit(body, self.clock(), sync=True)
        await self._wait(lambda: job.status in FINAL, int(wait) / 1000)
        return job.view(self.clock())

    async def _status(self, request: web.Request) -> dict[str, Any]:
        return self.platform.status(request.match_info["job"], self.clock())

    async def _stream(self, request: web.Request) -> dict[str, Any]:
        return self.platform.stream(request.match_info["job"], self.clock())

    async def _cancel(self, request: web.Request) -> dict[str, Any]:
        async with self._change():
            return self.platform.cancel(request.match_info["job"], self.clock())

    async def _retry(self, request: web.Request) -> dict[str, Any]:
        async with self._change():
            return self.platform.retry(request.match_info["job"], self.clock())

    async def _purge(self, request: web.Request) -> dict[str, Any]:
        async with self._change():
            return self.platform.purge(self.clock())

    async def _health(self, request: web.Request) -> dict[str, Any]:
        return self.platform.health(self.clock())

    # --- workers -----------------------------------------------------------------------------------------------------

    async def _take(self, request: web.Request, worker: str) -> web.StreamResponse:
        batch = request.query.get("batch_size")
        limit = int(batch) if batch and batch.isdecimal() else 1
        self.platform.seen(worker, self.clock())
        await self._wait(lambda: bool(self.platform.queue), self.hold)
        if request.transport is None or request.transport.is_closing():
            return web.Response(status=204)  # the worker has hung up meanwhile: it must not be given a job
        async with self._change():
            jobs = self.platform.take(worker, limit, self.clock())
        if not jobs:
            return web.Response(status=204)
        if self.kill_worker and any(self.platform.jobs[job["id"]].doomed for job in jobs):
            asyncio.get_running_loop().call_later(0.3, self.kill_worker)
        return web.json_response(jobs if batch else jobs[0])

    async def _stops(self, request: web.Request, worker: str) -> web.StreamResponse:
        await self._wait(lambda: bool(self.platform.stops.get(worker)), self.hold)
        stops = self.platform.stops_for(worker)
        return web.json_response({"jobsToStop": stops}) if stops else web.Response(status=204)

    async def _ping(self, request: web.Request, worker: str) -> web.StreamResponse:
        self.platform.seen(worker, self.clock())
        return web.json_response({})

    async def _done(self, request: web.Request, worker: str) -> web.StreamResponse:
        result = await _json(request, RESULT_MAX_BYTES)
        async with self._change():
            self.platform.done(worker, request.match_info["job"], result, self.clock())
        if self.kill_worker and isinstance(result, dict) and result.get("stopPod"):
            # The worker asks to be replaced, as after a GPU error; it gets its answer first.
            asyncio.get_running_loop().call_later(0.3, self.kill_worker)
        return web.json_response({})

    async def _chunk(self, request: web.Request, worker: str) -> web.StreamResponse:
        result = await _json(request, STREAM_CHUNK_MAX_BYTES)
        async with self._change():
            self.platform.chunk(worker, request.match_info["job"], result, self.clock())
        return web.json_response({})

    # --- faults ------------------------------------------------------------------------------------------------------

    async def _faults(self, request: web.Request) -> web.StreamResponse:
        self._authorise(request, f"Bearer {self.key}")
        if request.method == "POST":
            self.platform.arm(await _json(request, 10_000))
        elif request.method == "DELETE":
            self.platform.faults.clear()
        elif request.method != "GET":
            raise Refused(405, "GET, POST or DELETE")
        return web.json_response({"armed": [vars(fault) for fault in self.platform.faults], "kinds": FAULT_KINDS})


def _http_fault(fault: Fault) -> web.StreamResponse:
    headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
    return web.json_response({"error": "fault injected"}, status=fault.status, headers=headers)


async def _json(request: web.Request, limit: int) -> Any:
    """The request's body as strict JSON (no NaN), whatever its Content-Type says: the SDK sends a form type."""
    body = await request.read()
    if len(body) > limit:
        raise Refused(413, f"the body has {len(body)} bytes, {limit} are allowed")
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
