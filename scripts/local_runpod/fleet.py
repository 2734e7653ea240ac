"""The processes that serve as workers: started when the account wants one, ended when it does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from local_runpod.serverless import Endpoint, Worker

if TYPE_CHECKING:
    from local_runpod.server import Server

STEP = 0.2  # seconds between two looks at the account, if nothing has happened
STOP = 10.0  # seconds that a worker has to end after SIGTERM
# What a worker's own variables must not change: how its process is started on this machine.
KEPT = ("PATH", "PYTHONPATH", "HOME", "ENGINE", "PROMPTS_DIR", "LOCAL_RUNPOD_KEY")


def worker_environment(base_url: str, worker_id: str, key: str, endpoint: str = "local") -> dict[str, str]:
    """The variables that RunPod gives a worker, pointing at this server."""
    at = f"{base_url}/v2/{endpoint}"
    return {
        "RUNPOD_ENDPOINT_ID": endpoint,
        "RUNPOD_POD_ID": worker_id,
        "RUNPOD_AI_API_KEY": key,
        "RUNPOD_WEBHOOK_GET_JOB": f"{at}/job-take/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{at}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{at}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_PING": f"{at}/ping/$RUNPOD_POD_ID",
        "RUNPOD_PING_INTERVAL": "4000",
        # The SDK's checks of a rented machine (4 GB of free memory, 10 % of free disk, 8.8.8.8 reachable) end the
        # worker on a laptop that is offline or full.
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }


class Fleet:
    """One process for each worker of the account's endpoints."""

    def __init__(self, command: list[str], base_url: str, server: Server) -> None:
        self.command = command
        self.base_url = base_url
        self.server = server
        self._groups: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        server.kill_process = self.kill

    async def run(self) -> None:
        """Until cancelled; then end every process."""
        account = self.server.account
        try:
            while True:
                now = self.server.clock()
                account.tick(now)
                for endpoint, worker in account.processes(now):
                    worker.process = True
                    task = asyncio.create_task(self._serve(endpoint, worker))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                await self.server.next_change(STEP)
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self, worker_id: str) -> None:
        """End a worker's process as a machine that fails does."""
        if group := self._groups.get(worker_id):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    async def _serve(self, endpoint: Endpoint, worker: Worker) -> None:
        account, clock = self.server.account, self.server.clock
        code: int | None = None
        own = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment = {
            **os.environ,
            **account.environment(worker),
            **own,
            **worker_environment(self.base_url, worker.id, self.server.key, endpoint.id),
        }
        try:
            # A session of its own: the SDK pings from a child process, which outlives its parent's SIGKILL.
            process = await asyncio.create_subprocess_exec(
                *self.command,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=1_000_000,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:  # ValueError: a variable with a null character
            worker.log.add("system", f"cannot be started: {error}", account.when(clock()))
        else:
            self._groups[worker.id] = process.pid
            reading = asyncio.create_task(self._read(process, worker))
            try:
                code = await self._until_it_ends(process, worker)
            finally:
                self.kill(worker.id)
                del self._groups[worker.id]
                await process.wait()
                # A child that has left the group may hold the other end of its output open.
                await asyncio.wait((reading,), timeout=1)
                reading.cancel()
        async with self.server.change():
            account.exited(worker.id, code, clock())

    async def _until_it_ends(self, process: asyncio.subprocess.Process, worker: Worker) -> int:
        ended = asyncio.create_task(process.wait())
        try:
            while not ended.done() and not worker.ending:
                await asyncio.wait((ended,), timeout=STEP)
            if not ended.done():
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await asyncio.wait((ended,), timeout=STOP)
            if not ended.done():
                self.kill(worker.id)
            return await ended
        finally:
            ended.cancel()

    async def _read(self, process: asyncio.subprocess.Process, worker: Worker) -> None:
        assert process.stdout
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line beyond the limit: asyncio has dropped it
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            worker.log.add("container", text, self.server.account.when(self.server.clock()))
