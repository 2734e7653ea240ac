"""HTTP around the platform: the job API for clients, the worker's routes, the management API, and the knobs.

Clients:  POST /v2/{endpoint}/run|runsync|cancel/{id}|retry/{id}|purge-queue, GET …/status/{id}|stream/{id}|health
          with `Authorization: Bearer <key>`.
Workers:  GET /v2/{endpoint}/job-take/{worker}, job-take-batch/{worker}, job-stop/{worker}, ping/{worker};
          POST job-done/{worker}/{id}, job-stream/{worker}/{id}, with the raw key as the SDK sends it.
Management: /v2/serverless, /v2/pods, /v2/catalog … (api.py), with the client's key.
Knobs:    /__faults__, /__clock__, /__calls__, /__secrets__, with the client's key.

The endpoint of the platform that the server is made with is always there and no part of the account; the others are
those that were created through the management API.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

from local_runpod.api import AREAS, BODY_MAX_BYTES, Api, Call, NotAllowed, stream_log
from local_runpod.basics import Log, Rejected
from local_runpod.faults import FAULT_KINDS, Fault, Refused
from local_runpod.management import Account
from local_runpod.platform import (
    FINAL,
    RESULT_MAX_BYTES,
    RUN_MAX_BYTES,
    RUNSYNC_MAX_BYTES,
    STREAM_CHUNK_MAX_BYTES,
    Platform,
)
from local_runpod.serverless import Endpoint

HOLD = 2.0  # seconds that a worker's request for jobs, or for jobs to stop, is held open
HTML = "<html><body>Just a moment…</body></html>"
MOST_AHEAD = 31_536_000  # seconds that the clock can be moved at once
SYNC_WAIT_MS = (1_000, 90_000, 300_000)  # least, default, most


class Server:
    """The routes over one platform and an account. `changed` wakes the requests that are held open.

    `boot`: as in Account; None where processes serve as the workers of the account's endpoints.
    """

    def __init__(
        self,
        platform: Platform,
        key: str,
        clock: Callable[[], float] = time.monotonic,
        hold: float = HOLD,
        boot: float | None = 1.0,
    ) -> None:
        self.platform = platform
        self.key = key
        self.hold = hold
        self.ahead = 0.0  # how far the clock was moved by hand
        self._clock = clock
        self.account = Account(self.clock(), time.time(), platform.faults, boot=boot)
        self.api = Api(self.account)
        self.changed = asyncio.Condition()
        # Called when the `crash` fault strikes a worker of the account, where processes serve as workers.
        self.kill_process: Callable[[str], None] | None = None
        # Called when the `crash` fault strikes, to end a real worker process where this server has started one.
        self.kill_worker: Callable[[], None] | None = None

    def clock(self) -> float:
        """The platform's time."""
        return self._clock() + self.ahead

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=RUNSYNC_MAX_BYTES + 1_000_000, middlewares=[self._refusals])
        app.router.add_route("*", f"/v2/{{area:{AREAS}}}{{tail:(/[\\s\\S]*)?}}", self._manage)
        at = "/v2/{endpoint}"
        client: list[tuple[str, str, str, Callable[[web.Request, Platform], Awaitable[Any]]]] = [
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
        worker: list[tuple[str, str, str, Callable[[web.Request, Platform, str], Awaitable[web.StreamResponse]]]] = [
            ("GET", "job-take", "", self._take),
            ("GET", "job-take-batch", "", self._take),
            ("GET", "job-stop", "", self._stops),
            ("GET", "ping", "", self._ping),
            ("POST", "job-done", "/{job}", self._done),
            ("POST", "job-stream", "/{job}", self._chunk),
        ]
        for method, name, tail, take in worker:
            app.router.add_route(method, f"{at}/{name}/{{worker}}{tail}", self._worker_route(name, take))
        knobs = {"faults": self._faults, "clock": self._set_clock, "calls": self._calls, "secrets": self._secrets}
        for name, knob in knobs.items():
            app.router.add_route("*", f"/__{name}__", self._knob(knob))
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

    def _authorised(self, request: web.Request, expected: str) -> bool:
        return hmac.compare_digest(
            request.headers.get("Authorization", "").encode(errors="surrogateescape"), expected.encode()
        )

    def _authorise(self, request: web.Request, expected: str) -> None:
        if not self._authorised(request, expected):
            raise Refused(401, "unauthorized")

    def _asked_endpoint(self, request: web.Request) -> Endpoint | None:
        """The endpoint of the account that a job route names; None: the one that is always there."""
        name = request.match_info["endpoint"]
        if name == self.platform.endpoint:
            return None
        now = self.clock()
        self.account.tick(now)
        endpoint = self.account.endpoint(name, now)
        if endpoint.config["type"] != "QUEUE":
            raise Refused(404, f"{name} is a load-balancing endpoint: it has no queue")
        return endpoint

    def _asked_platform(self, request: web.Request) -> Platform:
        try:
            endpoint = self._asked_endpoint(request)
        except Rejected as rejected:
            raise Refused(rejected.status, str(rejected)) from rejected
        return endpoint.platform if endpoint else self.platform

    def _client_route(
        self, route: str, serve: Callable[[web.Request, Platform], Awaitable[Any]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._authorise(request, f"Bearer {self.key}")

            async def answer() -> web.StreamResponse:
                return web.json_response(await serve(request, self._asked_platform(request)))

            return await self._with_faults(route, request, answer)

        return handle

    def _worker_route(
        self, route: str, serve: Callable[[web.Request, Platform, str], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._authorise(request, self.key)
            platform = self._asked_platform(request)
            worker = request.match_info["worker"]
            return await self._with_faults(route, request, lambda: serve(request, platform, worker))

        return handle

    async def _with_faults(
        self, route: str, request: web.Request, serve: Callable[[], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        faults = self.platform.route_faults(route)
        if slow := faults.get("slow"):
            # Read first, so that the request is served even if the client has left meanwhile, as behind a gateway.
            await request.read()
            await asyncio.sleep(slow.seconds)
        if "lost_request" in faults and request.transport:
            request.transport.abort()
            return web.Response()
        if http := faults.get("http"):
            return _http_fault(http)
        if "html" in faults:
            return web.Response(text=HTML, content_type="text/html")
        answer = await serve()
        if "unknown_state" in faults:
            answer = web.json_response({"id": request.match_info["job"], "status": "WARMING_UP"})
        if "lost_answer" in faults and request.transport:
            request.transport.abort()
        return answer

    @contextlib.asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        async with self.changed:
            yield
            self.changed.notify_all()

    async def next_change(self, seconds: float) -> None:
        """Wait until something has changed, or for `seconds`."""
        async with self.changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), seconds)

    async def _wait(self, ready: Callable[[], bool], seconds: float) -> None:
        """Hold a request until `ready` or for `seconds`; time passes for the platform meanwhile."""
        end = self.clock() + seconds
        async with self.changed:
            while not ready() and (left := end - self.clock()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), min(left, 0.5))
                self.platform.tick(self.clock())
                self.account.tick(self.clock())

    async def lose_worker(self, worker_id: str) -> None:
        """A worker's process has ended."""
        async with self.change():
            self.platform.lose_worker(worker_id, self.clock())

    # --- clients -----------------------------------------------------------------------------------------------------

    async def _run(self, request: web.Request, platform: Platform) -> dict[str, Any]:
        body = await _json(request, RUN_MAX_BYTES)
        async with self.change():
            job = platform.submit(body, self.clock())
        return {"id": job.id, "status": job.status}

    async def _runsync(self, request: web.Request, platform: Platform) -> dict[str, Any]:
        body = await _json(request, RUNSYNC_MAX_BYTES)
        least, default, most = SYNC_WAIT_MS
        wait = request.query.get("wait", str(default))
        if not wait.isdecimal() or len(wait) > 6 or not least <= int(wait) <= most:
            raise Refused(400, f"wait must be between {least} and {most} milliseconds")
        async with self.change():
            job = platform.submit(body, self.clock(), sync=True)
        await self._wait(lambda: job.status in FINAL, int(wait) / 1000)
        return job.view(self.clock())

    async def _status(self, request: web.Request, platform: Platform) -> dict[str, Any]:
        return platform.status(request.match_info["job"], self.clock())

    async def _stream(self, request: web.Request, platform: Platform) -> dict[str, Any]:
        return platform.stream(request.match_info["job"], self.clock())

    async def _cancel(self, request: web.Request, platform: Platform) -> dict[str, Any]:
        async with self.change():
            return platform.cancel(request.match_info["job"], self.clock())

    async def _retry(self, request: web.Request, platform: Platform) -> dict[str, Any]:
        async with self.change():
            return platform.retry(request.match_info["job"], self.clock())

    async def _purge(self, request: web.Request, platform: Platform) -> dict[str, Any]:
        async with self.change():
            return platform.purge(self.clock())

    async def _health(self, request: web.Request, platform: Platform) -> dict[str, Any]:
        endpoint = self._asked_endpoint(request)
        return endpoint.health(self.clock()) if endpoint else platform.health(self.clock())

    # --- workers -----------------------------------------------------------------------------------------------------

    async def _take(self, request: web.Request, platform: Platform, worker: str) -> web.StreamResponse:
        batch = request.query.get("batch_size")
        limit = int(batch) if batch and batch.isdecimal() else 1
        mine = platform is self.platform
        platform.seen(worker, self.clock())

        def given() -> bool:
            # Asked each time: a worker of the account that is to be replaced gets no more jobs.
            return (mine or self.account.seen(worker, self.clock())) and bool(platform.queue)

        if not mine:
            async with self.change():
                self.account.seen(worker, self.clock())
        await self._wait(given, self.hold)
        if request.transport is None or request.transport.is_closing():
            return web.Response(status=204)  # the worker has hung up meanwhile: it must not be given a job
        if not given():
            return web.Response(status=204)
        async with self.change():
            jobs = platform.take(worker, limit, self.clock())
        if not jobs:
            return web.Response(status=204)
        if any(platform.jobs[job["id"]].doomed for job in jobs):
            self._end_process(platform, worker, asks=False)
        return web.json_response(jobs if batch else jobs[0])

    async def _stops(self, request: web.Request, platform: Platform, worker: str) -> web.StreamResponse:
        await self._wait(lambda: bool(platform.stops.get(worker)), self.hold)
        stops = platform.stops_for(worker)
        return web.json_response({"jobsToStop": stops}) if stops else web.Response(status=204)

    async def _ping(self, request: web.Request, platform: Platform, worker: str) -> web.StreamResponse:
        platform.seen(worker, self.clock())
        return web.json_response({})

    async def _done(self, request: web.Request, platform: Platform, worker: str) -> web.StreamResponse:
        result = await _json(request, RESULT_MAX_BYTES)
        async with self.change():
            platform.done(worker, request.match_info["job"], result, self.clock())
        if isinstance(result, dict) and result.get("stopPod"):
            self._end_process(platform, worker, asks=True)
        return web.json_response({})

    def _end_process(self, platform: Platform, worker: str, *, asks: bool) -> None:
        """A worker asks to be replaced, as after a GPU error, or is to crash; it gets its answer first."""

        def end() -> None:
            if platform is self.platform:
                if self.kill_worker:
                    self.kill_worker()
            elif asks:
                self.account.replace(worker, self.clock())
            elif self.kill_process:
                self.kill_process(worker)
            else:
                self.account.exited(worker, 137, self.clock())

        asyncio.get_running_loop().call_later(0.3, end)

    async def _chunk(self, request: web.Request, platform: Platform, worker: str) -> web.StreamResponse:
        result = await _json(request, STREAM_CHUNK_MAX_BYTES)
        async with self.change():
            platform.chunk(worker, request.match_info["job"], result, self.clock())
        return web.json_response({})

    # --- management --------------------------------------------------------------------------------------------------

    async def _manage(self, request: web.Request) -> web.StreamResponse:
        now = self.clock()
        headers, wait = self.api.quota(now)
        headers["x-request-id"] = str(uuid.uuid4())
        path = request.rel_url.raw_path
        answer: web.StreamResponse | None = None
        served = False
        try:
            if not self._authorised(request, f"Bearer {self.key}"):
                raise Rejected(401, "the bearer token is missing or invalid")
            name, route, ids = self.api.find(request.method, path)
            if wait is not None:
                headers["Retry-After"] = f"{wait:.0f}"
                raise Rejected(429, f"rate limit exceeded: try again in {wait:.0f} seconds")
            faults = self.platform.faults.of_route(name)
            if slow := faults.get("slow"):
                await request.read()
                await asyncio.sleep(slow.seconds)
            if "lost_request" in faults:
                return self._drop(request)
            if "html" in faults:
                answer = web.Response(text=HTML, content_type="text/html", headers=headers)
                return answer
            if http := faults.get("http"):
                if http.retry_after is not None:
                    headers["Retry-After"] = f"{http.retry_after:g}"
                raise Rejected(http.status, http.message or "fault injected")
            body = (
                await _json(request, BODY_MAX_BYTES, whole=True) if request.method in ("POST", "PATCH", "PUT") else None
            )
            call = Call(body, request.query, self.clock(), str(request.url.origin()))
            async with self.change():
                self.account.tick(call.now)
                served = True
                status, told = route(call, *ids)
            if "lost_answer" in faults:
                return self._drop(request)
            if isinstance(told, Log):
                answer = await stream_log(request, told, call, headers, self.hold)
            elif status == 204:
                answer = web.Response(status=204, headers=headers)
            else:
                answer = web.json_response(told, status=status, headers=headers)
        except Refused as refusal:
            rejected = refusal if isinstance(refusal, Rejected) else Rejected(refusal.status, str(refusal))
            if isinstance(rejected, NotAllowed):
                headers["Allow"] = rejected.allowed
            answer = web.json_response(
                rejected.problem(), status=rejected.status, headers=headers, content_type="application/problem+json"
            )
        finally:
            status_sent = answer.status if answer else None
            self.account.call(now, request.method, path, status_sent, served=served)
        return answer

    def _drop(self, request: web.Request) -> web.StreamResponse:
        if request.transport:
            request.transport.abort()
        return web.Response()

    # --- knobs -------------------------------------------------------------------------------------------------------

    def _knob(
        self, serve: Callable[[web.Request], Awaitable[Any]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self._authorise(request, f"Bearer {self.key}")
            return web.json_response(await serve(request))

        return handle

    async def _faults(self, request: web.Request) -> dict[str, Any]:
        """What is armed; POST arms, DELETE clears."""
        faults = self.platform.faults
        if request.method == "POST":
            faults.arm(await _json(request, 10_000))
        elif request.method == "DELETE":
            faults.clear()
        elif request.method != "GET":
            raise Refused(405, "GET, POST or DELETE")
        return {"armed": [vars(fault) for fault in faults], "kinds": FAULT_KINDS}

    async def _set_clock(self, request: web.Request) -> dict[str, Any]:
        """The platform's time of day; POST {"advance": seconds} moves it on."""
        if request.method == "POST":
            body = await _json(request, 1_000)
            seconds = body.get("advance") if isinstance(body, dict) else None
            if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MOST_AHEAD:
                raise Refused(400, f'{{"advance": seconds}}: between 0 and {MOST_AHEAD}')
            await self.advance(float(seconds))
        elif request.method != "GET":
            raise Refused(405, "GET or POST")
        return {"now": self.account.stamp(self.clock()), "ahead": self.ahead}

    async def advance(self, seconds: float) -> None:
        """Let time pass at once, for everything but the workers' silence."""
        async with self.change():
            self.ahead += seconds
            for platform in (self.platform, *(endpoint.platform for endpoint in self.account.endpoints.values())):
                platform.pass_over(seconds)
            self.platform.tick(self.clock())
            self.account.tick(self.clock())

    async def _calls(self, request: web.Request) -> list[dict[str, Any]]:
        """The requests to the management API so far; DELETE forgets them."""
        if request.method == "DELETE":
            self.account.calls.clear()
        elif request.method != "GET":
            raise Refused(405, "GET or DELETE")
        return list(self.account.calls)

    async def _secrets(self, request: web.Request) -> dict[str, Any]:
        """The names of the account's secrets; POST {name: value} sets some, DELETE forgets all."""
        if request.method == "POST":
            body = await _json(request, 100_000)
            if not isinstance(body, dict) or not all(isinstance(value, str) for value in body.values()):
                raise Refused(400, 'secrets are {"name": "value"}')
            self.account.secrets.update(body)
        elif request.method == "DELETE":
            self.account.secrets.clear()
        elif request.method != "GET":
            raise Refused(405, "GET, POST or DELETE")
        return {"secrets": sorted(self.account.secrets)}


def _http_fault(fault: Fault) -> web.StreamResponse:
    headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
    return web.json_response({"error": "fault injected"}, status=fault.status, headers=headers)


async def _json(request: web.Request, limit: int, *, whole: bool = False) -> Any:
    """The request's body as strict JSON (no NaN), whatever its Content-Type says: the SDK sends a form type.

    `whole`: 1.0 is read as 1, because JSON does not tell them apart.
    """
    body = await request.read()
    if len(body) > limit:
        raise Refused(413, f"the body has {len(body)} bytes, {limit} are allowed")
    try:
        return json.loads(body, parse_constant=_no_constant, parse_float=_whole_float if whole else _finite_float)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large")
    return value


def _whole_float(text: str) -> float:
    value = _finite_float(text)
    return int(value) if value.is_integer() else value
