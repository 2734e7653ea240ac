"""The end of a worker, in the SDK's own loop: SIGTERM, and a new worker that is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from local_runpod.fleet import worker_environment

if TYPE_CHECKING:
    from tests.worker.conftest import Cloud

STOPPED = "STOPPED: the worker is being stopped; send the job again"
Worker = subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def cloud(start_cloud: Callable[..., Cloud]) -> Cloud:
    """A platform that holds a worker's requests as long as RunPod does, without a worker."""
    return start_cloud("", hold=90)


@contextmanager
def worker_at(cloud: Cloud, name: str, **environment: str) -> Iterator[Worker]:
    """A worker process that nobody supervises."""
    url = (cloud.folder / "url").read_text().strip()
    variables = {
        **os.environ,
        **worker_environment(url, name, cloud.key),
        "LOCAL_RUNPOD_KEY": cloud.key,
        "EVENTS": str(cloud.folder / "events"),
        "PROMPTS_DIR": str(Path(__file__).parents[2] / "prompts"),
        "RUNPOD_PING_INTERVAL": "1000",
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    script = Path(__file__).with_name("stub_worker.py")
    with (cloud.folder / name).open("wb") as log:
        process = subprocess.Popen([sys.executable, str(script)], env=variables, stdout=log, stderr=log)
    try:
        yield process
        assert process.poll() is not None, "the worker has ended by itself"
        # The SDK pings from a process of its own: it must be gone too.
        assert cloud.processes() == {cloud.process.pid}
        assert "Traceback" not in (cloud.folder / name).read_text()
    finally:
        print((cloud.folder / name).read_text())
        process.kill()
        process.wait()


def end(worker: Worker, seconds: float) -> float:
    """Send SIGTERM and wait; how long it took until the process had ended with code 0."""
    begun = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(seconds) == 0
    return time.monotonic() - begun


def ready(cloud: Cloud) -> None:
    ended = cloud.wait(cloud.run({"op": "ping"}))
    assert ended["status"] == "COMPLETED", ended


def wait_for_log(cloud: Cloud, name: str, what: str) -> None:
    end_of_wait = time.monotonic() + 30
    while what not in (cloud.folder / name).read_text():
        assert time.monotonic() < end_of_wait
        time.sleep(0.02)


def test_an_idle_worker_ends_soon_though_its_requests_are_held(cloud: Cloud) -> None:
    with worker_at(cloud, "idle") as worker:
        ready(cloud)
        time.sleep(0.2)
        assert end(worker, 10) < 3
        assert cloud.wait_for("closed", 1) == worker.pid


def test_a_worker_that_never_had_a_job_ends_soon(cloud: Cloud) -> None:
    with worker_at(cloud, "new") as worker:
        wait_for_log(cloud, "new", "Starting Serverless Worker")
        time.sleep(0.5)  # its loops begin
        assert end(worker, 10) < 3


def test_sigterm_while_the_model_is_loaded_ends_the_worker(cloud: Cloud) -> None:
    slow = "import time, handler; handler.build = lambda *a: (print('loading', flush=True), time.sleep(60)); handler.main()"
    with subprocess.Popen(
        [sys.executable, "-c", slow], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM


def test_the_jobs_at_work_finish_and_later_ones_are_told(cloud: Cloud) -> None:
    with worker_at(cloud, "busy") as worker:
        ready(cloud)
        jobs = [cloud.run({"prompt": "sleep 1.5 to the end"}), cloud.run({"prompt": "stream 10 150", "stream": True})]
        cloud.wait_for("began sleep 1.5 to the end")
        cloud.wait_for("began stream 10 150")
        time.sleep(0.3)  # the SDK is asking for more
        worker.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        time.sleep(0.2)
        late = cloud.run({"prompt": "too late"})
        ended = cloud.wait(late, seconds=5)
        assert (ended["status"], ended["error"]) == ("FAILED", STOPPED)
        assert time.monotonic() - begun < 1
        later = cloud.run({"prompt": "later still"})
        for job in jobs:
            assert cloud.wait(job, seconds=10)["status"] == "COMPLETED"
        assert worker.wait(10) == 0
        assert time.monotonic() - begun < 4
        assert not any(line.endswith("too late") for line in cloud.events())
        assert cloud.status(later)["status"] == "IN_QUEUE", "it is left for another worker"
        cloud.call("POST", f"cancel/{later}")


def test_jobs_that_take_too_long_fail_clearly(cloud: Cloud) -> None:
    with worker_at(cloud, "long", STOP_SECONDS="1") as worker:
        ready(cloud)
        jobs = [
            cloud.run({"prompt": "wait for the stop"}),
            cloud.run({"prompt": "stream 2 10 wait stop", "stream": True}),
            cloud.run({"prompt": "hang 3 in a driver"}),
        ]
        for what in ("wait for the stop", "stream 2 10 wait stop", "hang 3 in a driver"):
            cloud.wait_for(f"began {what}")
        worker.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        for job in jobs:
            ended = cloud.wait(job, seconds=10)
            assert (ended["status"], ended["error"]) == ("FAILED", STOPPED)
        assert 1 <= time.monotonic() - begun < 2.5
        assert worker.wait(10) == 0
        assert time.monotonic() - begun < 6, "the thread that hangs is waited for, because it ends"


def test_a_process_that_cannot_end_is_ended(cloud: Cloud) -> None:
    program = (
        "import handler, stub_worker\n"
        "handler.build = stub_worker.build\n"
        "handler.DELIVER_SECONDS = handler.LAST_RESORT_SECONDS = 1\n"
        "handler.main()\n"
    )
    url = (cloud.folder / "url").read_text().strip()
    here = str(Path(__file__).parent)
    variables = {
        **os.environ,
        **{key: value for key, value in worker_environment(url, "stuck", cloud.key).items() if "PING" not in key},
        "EVENTS": str(cloud.folder / "events"),
        "PROMPTS_DIR": str(Path(__file__).parents[2] / "prompts"),
        "STOP_SECONDS": "0.5",
        "PYTHONPATH": os.pathsep.join([here, os.environ["PYTHONPATH"]]),
    }
    with subprocess.Popen([sys.executable, "-c", program], env=variables, stderr=subprocess.PIPE) as process:
        job = cloud.run({"prompt": "hang 60 for ever"})
        cloud.wait_for("began hang 60 for ever")
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert cloud.wait(job, seconds=5)["error"] == STOPPED
        assert process.wait(10) == 1
        assert time.monotonic() - begun < 6
        assert process.stderr
        assert b"Timeout" in process.stderr.read(), "the log says where the threads were"


def test_a_new_worker_is_asked_for_and_the_other_jobs_end_first(start_cloud: Callable[..., Cloud]) -> None:
    cloud = start_cloud("stub_worker.py", STOP_SECONDS="2")
    short = cloud.run({"prompt": "sleep 1 beside the loss"})
    long = cloud.run({"prompt": "wait beside the loss"})
    first = cloud.wait_for("began sleep 1 beside the loss")
    cloud.wait_for("began wait beside the loss")
    lost = cloud.run({"prompt": "lose the device"})
    cloud.wait_for("began lose the device")
    late = cloud.run({"prompt": "sent meanwhile"})
    assert cloud.wait(short)["status"] == "COMPLETED"
    ended = cloud.wait(long)
    assert (ended["status"], ended["error"]) == ("FAILED", STOPPED)
    ended = cloud.wait(lost)
    assert (ended["status"], ended["error"]) == ("FAILED", "GPU_LOST: a new worker takes over, try again")
    assert "retries" not in ended
    ended = cloud.wait(late)
    assert ended["status"] == "COMPLETED" or ended["error"] == STOPPED
    after = cloud.wait(cloud.run({"prompt": "after the loss"}))
    assert after["status"] == "COMPLETED"
    assert cloud.wait_for("began after the loss") != first
