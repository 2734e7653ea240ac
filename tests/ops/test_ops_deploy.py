"""`python -m endpoint`, typed as a person would, against the local RunPod: quiet when nothing differs, whole when something
does, safe at every point where it can break, and never a secret anywhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from local_server import STUB_WORKER, Runpod, local_server

ROOT = Path(__file__).parents[2]
IMAGES = [f"docker.io/you/worker@sha256:{character * 64}" for character in "abc"]
KEY = "rpa_ACanaryThatMustNeverBeSeen0"
HUB_TOKEN = "hf_ACanaryThatMustNeverBeSeen00"  # noqa: S105


@dataclass
class Deployment:
    """A config folder, a deploy folder, and the verbs on them."""

    folder: Path
    runpod: Runpod
    url: str
    image: str = IMAGES[0]
    shown: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "config" / "endpoint.yaml"

    @property
    def lock(self) -> Path:
        return self.folder / "deploy" / "deploy.lock.json"

    def edit(self, old: str, new: str) -> None:
        text = self.file.read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        self.file.write_text(text.replace(old, new), encoding="utf-8")

    def environment(self, **more: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in ("PATH", "PYTHONPATH", "HOME", "LANG", "TMPDIR")
        }
        return {
            **kept,
            "RUNPOD_API_KEY": KEY,
            "RUNPOD_API_URL": self.url,
            "RUNPOD_JOBS_URL": self.url,
            "HF_TOKEN": HUB_TOKEN,
            "CONFIG_DIR": str(self.folder / "config"),
            "PROMPTS_DIR": str(ROOT / "prompts"),
            "DEPLOY_DIR": str(self.folder / "deploy"),
            "IMAGE": self.image,
            "UNVERIFIED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "error",
            **more,
        }

    def start(self, verb: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "endpoint", verb],
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, verb: str, code: int = 0, **more: str) -> str:
        """Run a verb, check its exit code, and return what it printed on both streams."""
        process = self.start(verb, **more)
        out, err = process.communicate(timeout=100)
        self.shown += [out, err]
        assert process.returncode == code, (process.returncode, out, err)
        assert "Traceback" not in err
        return out + err

    def endpoints(self) -> list[dict[str, Any]]:
        return list(self.runpod.ok("GET", "serverless")["endpoints"])

    def only(self) -> dict[str, Any]:
        (endpoint,) = self.endpoints()
        return endpoint

    def console(self, body: dict[str, Any]) -> None:
        """Somebody changes the endpoint in RunPod's console."""
        self.runpod.ok("PATCH", f"serverless/{self.only()['id']}", body)
        self.runpod.forget_calls()


def config_folder(folder: Path) -> Path:
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "deploy").mkdir()
    path = folder / "config" / "endpoint.yaml"
    text = path.read_text(encoding="utf-8")
    for old, new in (("deadline: 1800", "deadline: 40"), ("propagation: 60", "propagation: 1.5")):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def runpod() -> Iterator[Runpod]:
    with local_server(STUB_WORKER, key=KEY) as server:
        yield server


@pytest.fixture
def deployment(tmp_path: Path, runpod: Runpod) -> Deployment:
    return Deployment(config_folder(tmp_path), runpod, runpod.api)


# --- the way it should be --------------------------------------------------------------------------------------------


def test_plan_deploy_and_a_second_deploy_that_changes_nothing(deployment: Deployment) -> None:
    runpod = deployment.runpod
    assert "create: there is no endpoint open-synthesis yet" in deployment.run("plan", 10)
    assert runpod.mutating() == []
    shown = deployment.run("deploy")
    endpoint = deployment.only()
    assert f"RUNPOD_ENDPOINT_ID={endpoint['id']}" in shown
    assert "smoke job" in shown
    assert (endpoint["image"], endpoint["env"]["IMAGE"]) == (IMAGES[0], IMAGES[0])
    assert (endpoint["timeout"], endpoint["flashboot"]) == (300_000, "FLASHBOOT")
    runpod.forget_calls()
    assert "no change" in deployment.run("plan")
    assert "no change" in deployment.run("deploy")
    assert runpod.mutating() == []
    lock = json.loads(deployment.lock.read_text(encoding="utf-8"))
    assert lock["endpoint"] == endpoint["id"]
    assert lock["releases"][-1]["smoke"]["cited"] == ["S1", "S2"]


def test_the_lock_file_is_a_cache(deployment: Deployment) -> None:
    deployment.run("deploy")
    before = deployment.only()
    deployment.lock.unlink()
    deployment.runpod.forget_calls()
    deployment.run("deploy")
    assert deployment.runpod.mutating() == []  # found by its name, proven again by a job
    assert deployment.only() == before
    assert json.loads(deployment.lock.read_text(encoding="utf-8"))["endpoint"] == before["id"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"api": 1}'])
def test_a_broken_lock_file_says_that_it_can_go(deployment: Deployment, content: str) -> None:
    deployment.lock.write_text(content, encoding="utf-8")
    assert "It is a cache: rm" in deployment.run("plan", 2)


def test_the_forms_of_a_plan(deployment: Deployment) -> None:
    process = deployment.start("plan", AS="json")
    out, _ = process.communicate(timeout=60)
    data = json.loads(out)
    assert (process.returncode, data["action"]) == (10, "create")
    assert "### Plan" in deployment.run("plan", 10, AS="markdown")
    assert "known are text, json, markdown" in deployment.run("plan", 2, AS="yaml")


# --- drift -----------------------------------------------------------------------------------------------------------

DRIFT: list[tuple[str, dict[str, Any]]] = [
    ("name", {"name": "renamed"}),
    ("image", {"image": IMAGES[2]}),
    ("args", {"args": "--debug"}),
    ("disk", {"disk": 41}),
    ("ports", {"ports": ["80/http"]}),
    ("env.QUANTIZATION", {"env": {"QUANTIZATION": "none"}}),
    ("env.HF_TOKEN", {"env": {"HF_TOKEN": "typed by hand"}}),
    ("env.MODEL_ID", {"env": {"MODEL_ID": "somebody/else"}}),
    ("env.MODEL_REVISION", {"env": {"MODEL_REVISION": "main"}}),
    ("env.IMAGE", {"env": {"IMAGE": "x"}}),
    ("env.EXTRA", {"env": {"EXTRA": "x"}}),
    ("gpu.pools", {"gpu": {"pools": ["AMPERE_80"]}}),
    ("gpu.excludedTypes", {"gpu": {"excludedTypes": ["NVIDIA A40"]}}),
    ("gpu.count", {"gpu": {"count": 2}}),
    ("gpu.minCudaVersion", {"gpu": {"minCudaVersion": "12.8"}}),
    ("gpu.allowedCudaVersions", {"gpu": {"minCudaVersion": "", "allowedCudaVersions": ["12.8"]}}),
    ("workers.min", {"workers": {"min": 1}}),
    ("workers.max", {"workers": {"max": 0}}),
    ("workers.idleTimeout", {"workers": {"idleTimeout": 5}}),
    ("scaling", {"scaling": {"type": "QUEUE_DELAY", "queueDelay": 9}}),
    ("timeout", {"timeout": 0}),
    ("flashboot", {"flashboot": "OFF"}),
    ("dataCenterIds", {"dataCenterIds": ["US-KS-2"]}),
]


def test_each_field_that_somebody_changes_is_told_and_repaired(deployment: Deployment) -> None:
    deployment.run("deploy")
    before = deployment.only()
    for name, change in DRIFT:
        top = name.split(".")[0]
        body = {key: ({**before[key], **value} if key in ("env", "gpu") else value) for key, value in change.items()}
        if "gpu" in body:
            body["gpu"] = {key: value for key, value in body["gpu"].items() if value is not None}
        deployment.console(body)
        told = json.loads(deployment.start("plan", AS="json").communicate(timeout=60)[0])
        assert name in [entry["field"] for entry in told["changes"]], (name, told)
        assert {entry["field"].split(".")[0] for entry in told["changes"]} == {top}
        deployment.run("deploy")
        assert deployment.runpod.mutating() == [f"PATCH /v2/serverless/{before['id']}"], name
        after = deployment.only()
        assert after == before, name
    assert len(deployment.endpoints()) == 1


def test_the_idle_scale_down_is_explained_and_repaired(deployment: Deployment) -> None:
    deployment.run("deploy")
    deployment.runpod.advance(8 * 86_400)
    shown = deployment.run("plan", 10)
    assert "workers.max  0 → 3" in shown
    assert "after 3 days and to 0 after 7" in shown
    assert "max workers is 0, so no job is ever run" in deployment.run("status", 3)
    deployment.run("deploy")
    assert deployment.only()["workers"]["max"] == 3
    assert "problem" not in deployment.run("status")


# --- identity --------------------------------------------------------------------------------------------------------


def test_an_endpoint_of_the_name_is_adopted_and_two_are_refused(deployment: Deployment) -> None:
    body = {
        "name": "open-synthesis",
        "type": "QUEUE",
        "image": "a/b:1",
        "gpu": {"pools": ["ADA_24"]},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 1},
    }
    made = deployment.runpod.ok("POST", "serverless", body)
    deployment.run("deploy")
    assert deployment.only()["id"] == made["id"]
    other = deployment.runpod.ok("POST", "serverless", body)
    assert "no change" in deployment.run("plan")  # the id in the lock file decides
    deployment.lock.unlink()
    deployment.runpod.forget_calls()
    shown = deployment.run("deploy", 2)
    assert made["id"] in shown
    assert other["id"] in shown
    assert deployment.runpod.mutating() == []


def test_what_can_never_become_the_endpoint_is_refused(deployment: Deployment) -> None:
    body = {
        "name": "open-synthesis",
        "type": "QUEUE",
        "image": "a/b:1",
        "cpu": [{"id": "cpu3c", "vcpuCount": 2}],
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 1},
    }
    deployment.runpod.ok("POST", "serverless", body)
    assert "make destroy NAME=open-synthesis" in deployment.run("plan", 2)


def test_destroy_needs_the_name_and_sees_that_it_is_gone(deployment: Deployment) -> None:
    deployment.run("deploy")
    assert "NAME=open-synthesis" in deployment.run("destroy", 2)
    assert "NAME=open-synthesis" in deployment.run("destroy", 2, NAME="open")
    assert len(deployment.endpoints()) == 1
    assert "is gone" in deployment.run("destroy", NAME="open-synthesis")
    assert deployment.endpoints() == []
    assert not deployment.lock.exists()
    assert "nothing to destroy" in deployment.run("destroy", NAME="open-synthesis")


# --- releases that are not good --------------------------------------------------------------------------------------


def test_a_release_whose_jobs_fail_is_rolled_back(deployment: Deployment) -> None:
    deployment.run("deploy")
    before = deployment.only()
    deployment.image = IMAGES[1]
    deployment.runpod.arm("fail", image=IMAGES[1], times=50)
    shown = deployment.run("deploy", 5)
    assert "the smoke job ended FAILED" in shown
    assert "the last good release is back, and has answered a job" in shown
    assert deployment.only() == before
    assert "did not end well" in deployment.run("status", 3, IMAGE=IMAGES[0])
    deployment.runpod.disarm()
    deployment.run("deploy")
    assert deployment.only()["image"] == IMAGES[1]


def test_a_release_whose_workers_never_start_is_rolled_back_with_their_log(deployment: Deployment) -> None:
    deployment.run("deploy")
    deployment.edit("deadline: 40", "deadline: 6")
    deployment.image = IMAGES[1]
    deployment.runpod.arm("unhealthy", image=IMAGES[1], times=50, message="failed to pull image: manifest unknown")
    shown = deployment.run("deploy", 5)
    assert "manifest unknown" in shown
    assert deployment.only()["image"] == IMAGES[0]


def test_a_first_release_that_fails_can_bill_nothing(deployment: Deployment) -> None:
    deployment.runpod.arm("fail", times=50)
    shown = deployment.run("deploy", 5)
    assert "max workers is set to 0" in shown
    assert deployment.only()["workers"]["max"] == 0
    deployment.runpod.disarm()
    deployment.run("deploy")
    assert deployment.only()["workers"]["max"] == 3


@pytest.mark.parametrize(("kind", "says"), [("no_output", "without a synthesis"), ("crash", "FAILED")])
def test_a_job_without_an_answer_is_no_proof(deployment: Deployment, kind: str, says: str) -> None:
    deployment.runpod.arm(kind, times=50)
    assert says in deployment.run("deploy", 5)


def test_throttled_workers_are_told_at_the_deadline(deployment: Deployment) -> None:
    deployment.edit("deadline: 40", "deadline: 4")
    deployment.runpod.arm("throttled", times=50, seconds=3600)
    shown = deployment.run("deploy", 5)
    assert "No GPU of the wanted pools is free" in shown


def test_rollback_goes_back_one_release_at_a_time(deployment: Deployment) -> None:
    assert "make deploy" in deployment.run("rollback", 2)
    for deployment.image in IMAGES:
        deployment.run("deploy")
    assert "still says what was rolled back" in deployment.run("rollback")
    assert deployment.only()["image"] == IMAGES[1]
    deployment.run("rollback")
    assert deployment.only()["image"] == IMAGES[0]
    assert "no earlier release" in deployment.run("rollback", 2)
    assert deployment.only()["image"] == IMAGES[0]


# --- two at once, and others -----------------------------------------------------------------------------------------


def test_of_two_deploys_at_once_one_wins(deployment: Deployment) -> None:
    deployment.runpod.arm("slow", route="serverless.create", seconds=3)
    first = deployment.start("deploy")
    holder = deployment.folder / "deploy" / "holder"
    end = time.monotonic() + 20
    while not holder.exists() and time.monotonic() < end:
        time.sleep(0.02)
    shown = deployment.run("deploy", 75)
    assert f"process {first.pid}" in shown
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert len(deployment.endpoints()) == 1


def test_a_plan_is_not_applied_to_what_has_changed_since(tmp_path: Path) -> None:
    from endpoint import plan as plans
    from endpoint import rollout
    from runpod_api import Api

    with local_server(key=KEY) as runpod:
        body = {
            "name": "e",
            "type": "QUEUE",
            "image": IMAGES[0],
            "gpu": {"pools": ["ADA_24"]},
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": 1},
        }
        made = runpod.ok("POST", "serverless", body)
        api = Api(KEY, runpod.api)
        platform = rollout.Platform(api, api, lambda message: None)
        plan = plans.make({**body, "timeout": 7000, "env": {}}, made)
        runpod.ok("PATCH", f"serverless/{made['id']}", {"disk": 77})
        runpod.forget_calls()
        with pytest.raises(Exception, match="changed by someone else"):
            rollout.change(platform, plan)
        assert runpod.mutating() == []


# --- what a passing trouble must not do ------------------------------------------------------------------------------


def test_a_deploy_that_changes_nothing_switches_nothing_off(deployment: Deployment) -> None:
    """Without the lock file a release is proven again; a GPU shortage just then is no reason to touch the endpoint."""
    deployment.run("deploy")
    before = deployment.only()
    deployment.lock.unlink()
    deployment.edit("deadline: 40", "deadline: 4")
    deployment.runpod.advance(100)  # the worker of the first proof has ended
    deployment.runpod.arm("throttled", times=50, seconds=3600)
    assert "changed nothing, so nothing was put back" in deployment.run("deploy", 5)
    assert deployment.only() == before
    deployment.runpod.forget_calls()
    assert deployment.runpod.mutating() == []


@pytest.mark.parametrize(
    ("route", "more"),
    [
        ("run", {"status": 404}),
        ("run", {"status": 429, "retry_after": 1}),
        ("status", {"status": 404}),
        ("serverless.workers", {"status": 404}),
        ("serverless.workers", {"status": 429, "retry_after": 1}),
        ("serverless.get", {"status": 500}),
    ],
)
def test_what_passes_by_is_waited_for(deployment: Deployment, route: str, more: dict[str, Any]) -> None:
    deployment.runpod.arm("http", route=route, **more)
    deployment.run("deploy")
    assert "problem" not in deployment.run("status")


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refusal_of_the_proof_puts_the_last_good_release_back(deployment: Deployment, status: int) -> None:
    deployment.run("deploy")
    deployment.image = IMAGES[1]
    deployment.runpod.arm("http", route="run", status=status)
    assert "the last good release is back" in deployment.run("deploy", 5)
    assert deployment.only()["image"] == IMAGES[0]


def test_a_failure_is_forgotten_when_what_runs_is_good(deployment: Deployment) -> None:
    deployment.run("deploy")
    deployment.image = IMAGES[1]
    deployment.runpod.arm("fail", image=IMAGES[1], times=50)
    deployment.run("deploy", 5)
    deployment.image = IMAGES[0]
    assert "no change" in deployment.run("deploy")
    assert "problem" not in deployment.run("status")


def test_a_made_endpoint_that_stays_hidden_is_never_made_again(deployment: Deployment) -> None:
    deployment.runpod.arm("propagation", route="serverless.create", seconds=3600)
    assert "does not show what was sent" in deployment.run("deploy", 5)
    assert "was made, and RunPod has not shown it" in deployment.run("deploy", 75)
    deployment.runpod.advance(3600)
    deployment.run("deploy")
    assert deployment.only()["workers"]["max"] == 3


def test_a_namesake_does_not_stop_the_endpoint_that_is_known(deployment: Deployment) -> None:
    deployment.run("deploy")
    mine = deployment.only()
    body = {"name": "open-synthesis", "type": "QUEUE", "image": "a/b:1", "gpu": {"pools": ["ADA_24"]}}
    other = deployment.runpod.ok("POST", "serverless", {**body, "scaling": {"type": "QUEUE_DELAY", "queueDelay": 1}})
    deployment.image = IMAGES[1]
    deployment.run("deploy")
    found = {endpoint["id"]: endpoint["image"] for endpoint in deployment.endpoints()}
    assert found == {mine["id"]: IMAGES[1], other["id"]: "a/b:1"}


def test_another_name_in_the_file_is_another_endpoint(deployment: Deployment) -> None:
    deployment.run("deploy")
    deployment.edit("name: open-synthesis #", "name: other #")
    for verb, more in (("plan", {}), ("deploy", {}), ("destroy", {"NAME": "other"})):
        assert "set DEPLOY_DIR" in deployment.run(verb, 2, **more)
    assert deployment.only()["name"] == "open-synthesis"


def test_a_broken_file_does_not_stop_looking_going_back_and_destroying(deployment: Deployment) -> None:
    for deployment.image in IMAGES[:2]:
        deployment.run("deploy")
    deployment.edit("disk: 40", "disk: forty")
    assert "disk" in deployment.run("plan", 2)
    assert "not compared with the file" in deployment.run("status", 3)
    deployment.run("rollback")
    assert deployment.only()["image"] == IMAGES[0]
    deployment.run("destroy", NAME="open-synthesis")
    assert deployment.endpoints() == []
    assert "disk" in deployment.run("destroy", 2, NAME="open-synthesis")


def test_a_reader_of_the_output_that_leaves_does_not_end_a_deploy(deployment: Deployment) -> None:
    process = deployment.start("deploy")
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    assert json.loads(deployment.lock.read_text(encoding="utf-8"))["releases"]


def test_answers_that_are_no_endpoints_are_told(deployment: Deployment) -> None:
    deployment.run("deploy")

    def break_it() -> None:
        (endpoint,) = deployment.runpod.account.endpoints.values()
        endpoint.config["env"]["QUANTIZATION"] = 4

    deployment.runpod.do(break_it)
    assert "its field env is of another kind" in deployment.run("plan", 5)
    assert "is of another kind" in deployment.run("status", 5)


# --- broken off at any point -----------------------------------------------------------------------------------------


class Killer:
    """A proxy before the API that ends a process with SIGKILL before, or after, a call is served."""

    def __init__(self, target: str) -> None:
        self.target = target.removesuffix("/v2")
        self.process: subprocess.Popen[str] | None = None
        self.at, self.when, self.calls = 0, "", 0
        killer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                killer.calls += 1
                mine = killer.calls == killer.at
                if mine and killer.when == "before":
                    killer.kill()
                    self.close_connection = True
                    return
                headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if self.headers[name]}
                answer = requests.request(
                    self.command, killer.target + self.path, data=body, headers=headers, timeout=30
                )
                if mine:
                    killer.kill()
                    self.close_connection = True
                    return
                self.send_response(answer.status_code)
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_GET = do_POST = do_PATCH = do_DELETE = serve

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v2"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def kill(self) -> None:
        assert self.process
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_killed_before_and_after_each_call_there_is_one_endpoint_in_the_end(tmp_path: Path, hidden: float) -> None:
    """`hidden`: for how many seconds RunPod does not show what it has made."""
    with local_server(STUB_WORKER, key=KEY) as runpod:
        killer = Killer(runpod.api)
        try:
            deployment = Deployment(config_folder(tmp_path), runpod, killer.url)

            def fresh() -> None:
                shutil.rmtree(deployment.folder / "deploy")
                (deployment.folder / "deploy").mkdir()
                for endpoint in deployment.endpoints():
                    runpod.ok("DELETE", f"serverless/{endpoint['id']}")
                runpod.disarm()
                if hidden:
                    runpod.arm("propagation", route="serverless.create", seconds=hidden)
                killer.calls = 0

            killer.at = 0
            deployment.run("deploy")
            # Polls make the number of calls vary; every call up to the answer of the smoke job is one of these.
            total = killer.calls
            assert total >= 8
            points = [(at, when) for at in range(1, min(total, 14) + 1) for when in ("before", "after")]
            for at, when in points:
                fresh()
                killer.at, killer.when = at, when
                killer.process = deployment.start("deploy")
                killer.process.communicate(timeout=60)
                killed = killer.process.returncode == -signal.SIGKILL
                killer.at = 0
                deployment.run("deploy")
                endpoint = deployment.only()
                assert endpoint["image"] == IMAGES[0], (at, when)
                assert killed or killer.calls, (at, when)
                if at % 4 == 0:
                    runpod.forget_calls()
                    assert "no change" in deployment.run("deploy")
                    assert runpod.mutating() == [], (at, when)
        finally:
            killer.end()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("verb", ["deploy", "rollback", "destroy"])
def test_killed_while_it_changes_something_it_goes_on_to_the_same_end(tmp_path: Path, verb: str) -> None:
    with local_server(STUB_WORKER, key=KEY) as runpod:
        killer = Killer(runpod.api)
        try:
            deployment = Deployment(config_folder(tmp_path), runpod, killer.url)
            again: dict[str, Any] = {"NAME": "open-synthesis"} if verb == "destroy" else {}
            if verb == "rollback":
                for deployment.image in IMAGES[:2]:
                    deployment.run("deploy")
            points = [(at, when) for at in range(1, 9) for when in ("before", "after")]
            for number, (at, when) in enumerate(points):
                killer.at = 0
                deployment.image = IMAGES[2] if verb == "rollback" else IMAGES[number % 2]
                if verb != "deploy" or number == 0:
                    deployment.run("deploy")
                if verb == "deploy":
                    deployment.image = IMAGES[(number + 1) % 2]
                killer.calls, killer.at, killer.when = 0, at, when
                killer.process = deployment.start(verb, **again)
                killer.process.communicate(timeout=60)
                killed = killer.process.returncode == -signal.SIGKILL
                killer.at = 0
                if killed:
                    deployment.run(verb, **again)
                found = [endpoint["image"] for endpoint in deployment.endpoints()]
                expected = {"deploy": [deployment.image], "rollback": [IMAGES[1]], "destroy": []}[verb]
                assert found == expected, (at, when)
        finally:
            killer.end()


@pytest.mark.parametrize("kind", ["lost_answer", "lost_request", "html", "http"])
@pytest.mark.parametrize(
    "route",
    ["serverless.create", "serverless.get", "serverless.list", "serverless.workers", "run", "status", "catalog"],
)
def test_a_fault_at_each_call_ends_in_one_endpoint(deployment: Deployment, kind: str, route: str) -> None:
    deployment.runpod.arm(kind, route=route)
    deployment.run("deploy")
    assert deployment.only()["image"] == IMAGES[0]


@pytest.mark.parametrize(("status", "code"), [(401, 5), (402, 5), (403, 5), (422, 5)])
def test_a_refusal_is_final_and_nothing_is_left(deployment: Deployment, status: int, code: int) -> None:
    deployment.runpod.arm("http", route="serverless.create", status=status)
    deployment.run("deploy", code)
    assert deployment.endpoints() == []
    deployment.run("deploy")
    assert len(deployment.endpoints()) == 1


def test_no_capacity_is_told(deployment: Deployment) -> None:
    deployment.runpod.arm("no_capacity", route="serverless.create")
    assert "no such machine free" in deployment.run("deploy", 75)


# --- bytes and secrets -----------------------------------------------------------------------------------------------


def test_values_reach_the_worker_byte_for_byte(deployment: Deployment) -> None:
    values = {
        "QUOTES": 'say "hi" it\'s $5 & `id` $(id) \\n %s',
        "LINES": "one\ntwo\n",
        "BRACES": "{{ x }} {y} }}{{",
        "WIDE": "café 🍬\t",
    }
    lines = "".join(f"  {name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
    deployment.edit("  QUANTIZATION: nf4\n", lines)
    deployment.run("deploy")
    env = deployment.only()["env"]
    assert {name: env[name] for name in values} == values


def test_no_secret_is_shown_or_kept(deployment: Deployment) -> None:
    typed = "hf_TypedIntoTheConsoleByHand000"
    deployment.run("plan", 10)
    deployment.run("deploy")
    deployment.console({"env": {**deployment.only()["env"], "HF_TOKEN": typed, "OTHER": typed}})
    for verb, code in (("plan", 10), ("status", 3), ("deploy", 0), ("status", 0), ("rollback", 2)):
        for form in ("text", "json", "markdown"):
            if verb not in ("deploy", "rollback") or form == "text":
                deployment.run(verb, code, AS=form) if verb != "status" or form != "markdown" else None
    deployment.runpod.arm("http", route="serverless.list", status=400)
    deployment.lock.unlink()
    deployment.run("plan", 5)
    kept = [path.read_text(encoding="utf-8") for path in deployment.folder.rglob("*") if path.is_file()]
    for secret in (KEY, HUB_TOKEN, typed):
        for text in [*deployment.shown, *kept]:
            assert secret not in text


def test_no_secret_is_in_the_arguments(deployment: Deployment) -> None:
    process = deployment.start("deploy")
    arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes() if Path("/proc").is_dir() else b""
    process.communicate(timeout=60)
    assert KEY.encode() not in arguments


def test_bad_usage(deployment: Deployment) -> None:
    assert "usage" in deployment.run("undeploy", 2)
    del_key = deployment.environment()
    del_key.pop("RUNPOD_API_KEY")
    result = subprocess.run(
        [sys.executable, "-m", "endpoint", "plan"], env=del_key, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert "ON=local" in result.stderr
    assert "no image to deploy" in deployment.run("deploy", 2, IMAGE="")
    assert "not compared" in deployment.run("plan", 10, IMAGE="")
