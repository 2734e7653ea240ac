"""A local RunPod for tests: on a free loopback port, in a thread of its own, with a clock that a test can move on.

    with local_server() as runpod:
        requests.post(f"{runpod.api}/serverless", json=…, headers=runpod.headers)

Without a worker command the workers of an endpoint are states only: ready after a second of the clock, and no job is
run unless the test takes it (`Runpod.take`). With `worker=STUB_WORKER` each is a process that answers jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from local_runpod.fleet import Fleet
from local_runpod.management import Account
from local_runpod.platform import Platform
from local_runpod.server import Server

KEY = "a-key-of-this-test"
# A worker that needs the standard library only and answers any job as the real one's extractive engine would.
STUB_WORKER = (sys.executable, str(Path(__file__).with_name("stub_runpod_worker.py")))
Result = TypeVar("Result")


@dataclass
class Clock:
    """Real time, which a test can move on; `frozen` stops it, so that only `ahead` moves it."""

    ahead: float = 0.0
    frozen: float | None = None

    def __call__(self) -> float:
        return (time.monotonic() if self.frozen is None else self.frozen) + self.ahead


@dataclass
class Answer:
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Runpod:
    """The server, seen from the other end of a connection."""

    port: int
    server: Server
    clock: Clock
    loop: asyncio.AbstractEventLoop

    @property
    def base(self) -> str:
        """Where the knobs are: /__faults__, /__clock__, /__calls__, /__secrets__."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        """RUNPOD_API_URL and RUNPOD_JOBS_URL."""
        return f"{self.base}/v2"

    @property
    def key(self) -> str:
        """RUNPOD_API_KEY."""
        return self.server.key

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    @property
    def account(self) -> Account:
        """The state behind the API. Look at it freely; change it in `do` only."""
        return self.server.account

    def do(self, change: Callable[[], Result]) -> Result:
        """Run something in the server's thread."""

        async def run() -> Result:
            async with self.server.change():
                return change()

        return self._run(run())

    def _run(self, work: Awaitable[Result]) -> Result:
        async def wrapped() -> Result:
            return await work

        return asyncio.run_coroutine_threadsafe(wrapped(), self.loop).result(30)

    def send(
        self, method: str, path: str, body: bytes | None = None, authorization: str | None = None, **headers: str
    ) -> Answer:
        """A request as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            if authorization is not None:
                sent["Authorization"] = authorization
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def call(self, method: str, path: str, data: object = None, **headers: str) -> Answer:
        """A client's request below /v2, for example call("GET", "serverless")."""
        body = None if data is None else json.dumps(data).encode()
        return self.send(method, f"/v2/{path}", body, f"Bearer {self.key}", **headers)

    def ok(self, method: str, path: str, data: object = None) -> Any:
        """The JSON of a request that must succeed; None for 204."""
        answer = self.call(method, path, data)
        assert answer.status < 300, (answer.status, answer.body)
        return answer.json if answer.body else None

    def _knob(self, method: str, name: str, data: object = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        answer = self.send(method, f"/__{name}__", body, f"Bearer {self.key}")
        assert answer.status == 200, answer.body
        return answer.json

    def arm(self, kind: str, **more: object) -> None:
        """Arm a fault."""
        self._knob("POST", "faults", {"kind": kind, **more})

    def disarm(self) -> None:
        """Clear all faults."""
        self._knob("DELETE", "faults")

    def advance(self, seconds: float) -> None:
        """Move the platform's clock on; workers do not count as silent meanwhile."""
        self._knob("POST", "clock", {"advance": seconds})

    def secrets(self, **values: str) -> None:
        """Set secrets of the account."""
        self._knob("POST", "secrets", values)

    def calls(self) -> list[dict[str, Any]]:
        """The requests to the management API so far."""
        noted: list[dict[str, Any]] = self._knob("GET", "calls")
        return noted

    def mutating(self) -> list[str]:
        """Those that ask for a change, as "METHOD path"."""
        return [f"{call['method']} {call['path']}" for call in self.calls() if call["mutating"]]

    def forget_calls(self) -> None:
        """Begin a new list."""
        self._knob("DELETE", "calls")

    def take(self, endpoint: str, worker: str) -> dict[str, Any] | None:
        """As this worker, ask for a job."""
        answer = self.send("GET", f"/v2/{endpoint}/job-take/{worker}", None, self.key)
        assert answer.status in (200, 204), answer.body
        job: dict[str, Any] | None = answer.json if answer.status == 200 else None
        return job

    def done(self, endpoint: str, worker: str, job: str, result: object) -> None:
        """As this worker, send a job's result, for example {"output": …} or {"error": "…"}."""
        answer = self.send("POST", f"/v2/{endpoint}/job-done/{worker}/{job}", json.dumps(result).encode(), self.key)
        assert answer.status == 200, answer.body


@contextlib.contextmanager
def local_server(worker: Sequence[str] = (), *, hold: float = 0.05, key: str = KEY) -> Iterator[Runpod]:
    """Start one. `worker` is the command of a worker process; `hold` how long a worker's request for jobs is held."""
    loop = asyncio.new_event_loop()
    clock = Clock()
    server = Server(Platform("local"), key, clock, hold=hold, boot=None if worker else 1.0)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0.1)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    fleet = None
    if worker:
        fleet = asyncio.run_coroutine_threadsafe(Fleet(list(worker), f"http://127.0.0.1:{port}", server).run(), loop)
    try:
        yield Runpod(port, server, clock, loop)
    finally:

        async def end() -> None:
            if fleet:
                fleet.cancel()
                while others := asyncio.all_tasks() - {asyncio.current_task()}:
                    await asyncio.wait(others, timeout=15)
                    break
            await runner.cleanup()

        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
