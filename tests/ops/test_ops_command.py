"""python -m local_runpod as a process: what it prints, announces, starts, and leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

KEY = "a-key-of-this-test"
COMMAND = [sys.executable, "-m", "local_runpod"]
# A worker as small as can be: it tells who it is, starts a child that would outlive it, and does what its jobs say.
WORKER = """
import json, os, subprocess, sys, urllib.request
from pathlib import Path

me = os.environ["RUNPOD_POD_ID"]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
told = json.dumps({"pid": os.getpid(), "child": child.pid, "environment": dict(os.environ)})
Path(sys.argv[1], "." + me).write_text(told)
Path(sys.argv[1], "." + me).rename(Path(sys.argv[1], me))

def call(url, data=None):
    request = urllib.request.Request(url, data, {"Authorization": os.environ["RUNPOD_AI_API_KEY"]})
    with urllib.request.urlopen(request, timeout=20) as response:
        return response.read()

while True:
    call(os.environ["RUNPOD_WEBHOOK_PING"].replace("$RUNPOD_POD_ID", me))
    job = json.loads(call(os.environ["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", me)) or "null")
    if job is None or job["input"] == "hang":
        continue
    if job["input"] == f"end {me}":
        os._exit(7)
    url = os.environ["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", me).replace("$ID", job["id"])
    call(url, json.dumps({"output": f"by {me}", "stopPod": job["input"] == "replace me"}).encode())
"""
Found = TypeVar("Found")


def until(look: Callable[[], Found], seconds: float = 20.0) -> Found:
    """What `look` finds, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def lives(pid: int) -> bool:
    """Does this process run? One that has ended and that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    return True


@dataclass
class Local:
    """A running local RunPod with its worker."""

    process: subprocess.Popen[str]
    folder: Path
    url: str

    def call(self, method: str, path: str, data: object = None) -> Any:
        request = urllib.request.Request(  # noqa: S310 # loopback
            f"{self.url}{path}",
            None if data is None else json.dumps(data).encode(),
            {"Authorization": f"Bearer {KEY}"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310
            return json.loads(response.read())

    def run(self, job_input: str) -> dict[str, Any]:
        """Send a job and wait for its end."""
        job = self.call("POST", "/v2/local/run", {"input": job_input})["id"]

        def final() -> dict[str, Any]:
            view: dict[str, Any] = self.call("GET", f"/v2/local/status/{job}")
            return {} if view["status"] in ("IN_QUEUE", "IN_PROGRESS") else view

        return until(final)

    def worker(self, number: int) -> dict[str, Any]:
        """What the worker of this number told about itself."""
        path = self.folder / f"local-worker-{number}"
        told: dict[str, Any] = json.loads(until(lambda: path.exists() and path.read_text(encoding="utf-8")) or "")
        return told


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    announced = tmp_path / "url"
    process = subprocess.Popen(
        [
            *COMMAND,
            "--announce",
            str(announced),
            "--worker",
            sys.executable,
            str(tmp_path / "worker.py"),
            str(tmp_path),
        ],
        env={**os.environ, "LOCAL_RUNPOD_KEY": KEY},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        until(lambda: announced.exists() or process.poll() is not None)
        try:
            yield Local(process, tmp_path, announced.read_text(encoding="utf-8").strip())
        finally:
            process.terminate()
            process.communicate(timeout=20)


def test_it_announces_where_it_listens_and_its_worker_serves_jobs(local: Local) -> None:
    assert local.url.startswith("http://127.0.0.1:")
    assert (local.folder / "url").read_text(encoding="utf-8") == local.url + "\n"
    view = local.run("q")
    assert (view["status"], view["output"], view["workerId"]) == ("COMPLETED", "by local-worker-1", "local-worker-1")
    environment = local.worker(1)["environment"]
    assert environment["RUNPOD_ENDPOINT_ID"] == "local"
    assert environment["RUNPOD_WEBHOOK_PING"].startswith(f"{local.url}/v2/local/ping/")
    assert environment["PATH"] == os.environ["PATH"]


def test_a_worker_that_ends_is_replaced_and_its_job_given_to_the_next(local: Local) -> None:
    view = local.run("end local-worker-1")
    assert (view["status"], view["output"], view["retries"]) == ("COMPLETED", "by local-worker-2", 1)
    assert not lives(local.worker(1)["child"])
    assert local.call("GET", "/v2/local/health")["workers"]["ready"] == 1
    local.process.terminate()
    _, log = local.process.communicate(timeout=20)
    assert "worker local-worker-1 ended with exit code 7\n" in log
    assert f"local RunPod listens on {local.url}\n" in log


def test_a_crash_kills_the_worker_with_its_child_and_the_job_fails_after_the_second(local: Local) -> None:
    local.call("POST", "/__faults__", {"kind": "crash"})
    view = local.run("hang")
    assert (view["status"], view["error"], view["retries"]) == ("FAILED", "job timed out after 1 retries", 1)
    for number in (1, 2):
        told = local.worker(number)
        assert not lives(told["pid"])
        until(lambda child=told["child"]: not lives(child))  # type: ignore[misc]
    assert local.run("q")["output"] == "by local-worker-3"


def test_a_worker_that_asks_for_it_is_replaced_and_its_answer_is_kept(local: Local) -> None:
    assert local.run("replace me")["output"] == "by local-worker-1"
    until(lambda: not lives(local.worker(1)["pid"]))
    assert local.run("q")["output"] == "by local-worker-2"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_and_leaves_no_process(local: Local, number: signal.Signals) -> None:
    told = local.worker(1)
    assert lives(told["pid"])
    assert lives(told["child"])
    start = time.monotonic()
    local.process.send_signal(number)
    _, log = local.process.communicate(timeout=20)
    assert local.process.returncode == 0
    assert time.monotonic() - start < 5
    assert not lives(told["pid"])
    until(lambda: not lives(told["child"]))
    assert "Traceback" not in log


# --- without a server ------------------------------------------------------------------------------------------------


def command(*arguments: str, key: str | None = KEY) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RUNPOD_KEY"}
    if key is not None:
        environment["LOCAL_RUNPOD_KEY"] = key
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=30, check=False
    )


def test_the_environment_of_a_worker_is_printed_for_an_env_file() -> None:
    done = command("--print-worker-environment", "http://runpod:8000")
    assert done.returncode == 0
    assert done.stderr == ""
    assert dict(line.split("=", 1) for line in done.stdout.splitlines()) == {
        "RUNPOD_ENDPOINT_ID": "local",
        "RUNPOD_POD_ID": "local-worker",
        "RUNPOD_AI_API_KEY": KEY,
        "RUNPOD_WEBHOOK_GET_JOB": "http://runpod:8000/v2/local/job-take/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_OUTPUT": "http://runpod:8000/v2/local/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_STREAM": "http://runpod:8000/v2/local/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
        "RUNPOD_WEBHOOK_PING": "http://runpod:8000/v2/local/ping/$RUNPOD_POD_ID",
        "RUNPOD_PING_INTERVAL": "4000",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }


@pytest.mark.parametrize("key", [None, ""])
@pytest.mark.parametrize("arguments", [[], ["--print-worker-environment", "http://x"]])
def test_without_a_key_it_says_where_one_comes_from(key: str | None, arguments: list[str]) -> None:
    done = command(*arguments, key=key)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: LOCAL_RUNPOD_KEY is not set; make up sets it\n"


def test_a_worker_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    done = command("--announce", str(tmp_path / "url"), "--worker", "no-such-program", "handler.py")
    assert done.returncode == 2
    assert done.stderr == "error: the worker's command no-such-program does not exist or cannot be run\n"
    assert not (tmp_path / "url").exists()


def test_a_platform_that_can_no_longer_start_its_worker_ends(tmp_path: Path) -> None:
    program = tmp_path / "worker"
    program.write_text("#!/no/such/interpreter\n", encoding="utf-8")
    program.chmod(0o755)
    done = command("--worker", str(program))
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr
