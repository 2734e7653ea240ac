"""Run the local RunPod.

    python -m local_runpod [--host 127.0.0.1] [--port 0] [--announce FILE] [--worker COMMAND …]

LOCAL_RUNPOD_KEY is the key that clients and workers must send. With --port 0 a free port is taken; --announce writes
the base URL there once the server listens. With --worker the server plays the whole platform: it starts that command as
the worker of the endpoint `local`, with the variables that RunPod sets, starts it again when it ends, and ends it when it
ends itself; and one such process for each worker that an endpoint needs which was made through the management API.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

from aiohttp import ClientError, ClientSession, web

from common.files import write_atomic
from common.problems import OK, TRY_LATER, Problem, run
from local_runpod.fleet import Fleet, worker_environment
from local_runpod.platform import Platform
from local_runpod.server import HOLD, Server
from local_runpod.serverless import RESTART_DELAY

ENDPOINT = "local"
READY_TIMEOUT = 30.0  # seconds


async def worker_is_ready(base_url: str, key: str) -> bool:
    """Ask a server for its health until it reports a ready worker; False once READY_TIMEOUT has passed."""
    async with ClientSession(headers={"Authorization": f"Bearer {key}"}) as session:
        for _ in range(int(READY_TIMEOUT / 0.2)):
            with contextlib.suppress(ClientError):
                async with session.get(f"{base_url}/v2/{ENDPOINT}/health") as response:
                    if response.status == 200 and (await response.json())["workers"]["ready"]:
                        return True
            await asyncio.sleep(0.2)
    return False


async def supervise(command: list[str], base_url: str, server: Server) -> None:
    """Keep one worker process running until cancelled; then end it."""
    delay, longest = RESTART_DELAY
    number = 0
    while True:
        number += 1
        worker_id = f"local-worker-{number}"
        environment = {**os.environ, **worker_environment(base_url, worker_id, server.key)}
        # A session of its own: the SDK pings from a child process, which outlives its parent's SIGKILL.
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=sys.stderr, start_new_session=True
        )

        def kill(group: int = process.pid) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

        server.kill_worker = kill
        started = server.clock()
        try:
            await process.wait()
        except asyncio.CancelledError:
            kill()
            await process.wait()
            raise
        kill()
        print(f"worker {worker_id} ended with exit code {process.returncode}", file=sys.stderr, flush=True)
        await server.lose_worker(worker_id)
        if server.clock() - started > longest:
            delay = RESTART_DELAY[0]
        await asyncio.sleep(delay)
        delay = min(delay * 2, longest)


async def serve(arguments: argparse.Namespace, key: str) -> None:
    """Serve until SIGTERM or SIGINT."""
    boot = None if arguments.worker else 1.0
    server = Server(Platform(ENDPOINT, arguments.worker_timeout), key, hold=arguments.hold, boot=boot)
    # Workers hold their requests open; when the server ends they are not waited for.
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, arguments.host, arguments.port)
    await site.start()
    host, port = runner.addresses[0][:2]
    base_url = f"http://{host}:{port}"
    print(f"local RunPod listens on {base_url}", file=sys.stderr, flush=True)
    if arguments.announce:
        write_atomic(arguments.announce, base_url + "\n")
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    keepers: list[asyncio.Task[None]] = []
    if arguments.worker:
        # Where it listens on every address, its own workers reach it on loopback.
        own_url = base_url.replace("://0.0.0.0:", "://127.0.0.1:")
        keepers.append(asyncio.create_task(supervise(arguments.worker, own_url, server)))
        keepers.append(asyncio.create_task(Fleet(arguments.worker, own_url, server).run()))
    for keeper in keepers:
        # A platform that can no longer start its workers must not go on as if it could.
        keeper.add_done_callback(lambda _: ended.set())
    await ended.wait()
    for keeper in keepers:
        keeper.cancel()
    for keeper in keepers:
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
    await runner.cleanup()


def main() -> int:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="local_runpod", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--announce", type=Path, help="write the base URL to this file once the server listens")
    parser.add_argument(
        "--worker-timeout", type=float, default=30.0, help="seconds of silence after which a worker is lost"
    )
    parser.add_argument(
        "--hold", type=float, default=HOLD, help="seconds that a worker's request for jobs is held; RunPod: up to 90"
    )
    parser.add_argument("--print-worker-environment", metavar="URL", help="print the variables of a worker, and end")
    parser.add_argument("--wait", metavar="URL", help="wait until a worker is ready at that server, and end")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help="the command of a worker to keep running")
    arguments = parser.parse_args()
    key = os.environ.get("LOCAL_RUNPOD_KEY")
    if not key:
        raise Problem("LOCAL_RUNPOD_KEY is not set; make up sets it")
    if arguments.worker and not shutil.which(arguments.worker[0]):
        raise Problem(f"the worker's command {arguments.worker[0]} does not exist or cannot be run")
    if url := arguments.print_worker_environment:
        for name, value in worker_environment(url, "local-worker", key).items():
            print(f"{name}={value}")
        return OK
    if arguments.wait:
        if not asyncio.run(worker_is_ready(arguments.wait, key)):
            raise Problem(f"no worker was ready within {READY_TIMEOUT:.0f} s", TRY_LATER)
        return OK
    asyncio.run(serve(arguments, key))
    return OK


if __name__ == "__main__":
    run(main)
