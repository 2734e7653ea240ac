"""make doctor: what it finds, that it ends whatever is broken, and that it never shows a value; and image_registry."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from local_server import local_server

import doctor
import image_registry
from common.problems import Problem
from doctor import Host, Line

ROOT = Path(__file__).parents[2]
KNOWN = doctor.example_names(ROOT / ".env.example")
DIGEST = f"sha256:{'0123456789abcdef' * 4}"
COMMIT = "0123456789" * 4
API = "https://api.runpod.io/v2"
PUSHED = f"docker.io/you/worker@{DIGEST}"
RUNPOD_KEY = "rpa_thekeyofrunpod0123456789"
HUB_TOKEN = "hf_thetokenofthehub0123456789"  # noqa: S105

Reply = tuple[int, dict[str, str], bytes]
Answers = Callable[[str, str, dict[str, str]], Reply]


def a_json(data: object, status: int = 200) -> Reply:
    return status, {"Content-Type": "application/json"}, json.dumps(data).encode()


def slow(seconds: float) -> Answers:
    def answer(method: str, path: str, headers: dict[str, str]) -> Reply:
        time.sleep(seconds)
        return a_json({})

    return answer


@contextlib.contextmanager
def serving(answer: Answers) -> Iterator[str]:
    """A server on loopback that answers (method, path, headers): its base URL."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            status, headers, body = answer(self.command, self.path, dict(self.headers.items()))
            with contextlib.suppress(OSError):  # who asked has given up
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        do_GET = do_HEAD = do_POST = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


# --- variables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RUNPOD_ENDPOINT_ID", "abc_123-X"),
        ("RUNPOD_API_KEY", RUNPOD_KEY),
        ("RUNPOD_API_KEY", "0123456789abcdef0123456789abcdef"),
        ("HF_TOKEN", HUB_TOKEN),
        ("MODEL_REVISION", COMMIT),
        ("MODEL_ID", "you/Qwen3-14B-ablated"),
        ("IMAGE", f"docker.io/you/open-synthesis-worker@{DIGEST}"),
        ("IMAGE", f"127.0.0.1:5000/you/worker:1@{DIGEST}"),
        ("FLASH_KERNEL", f"you/kernel@{COMMIT}"),
        ("RUNPOD_API_URL", "https://api.runpod.io/v2"),
        ("HF_ENDPOINT", "http://127.0.0.1:8080"),
        ("HF_HOME", "/data/huggingface"),
        ("TORCH_BASE", "cpu-torch"),
        ("STOP_SECONDS", "8"),
        ("A_VARIABLE_OF_TOMORROW", "anything at all"),
    ],
)
def test_a_value_of_the_right_shape_is_fine(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert doctor.misfit(name, value) == ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RUNPOD_ENDPOINT_ID", "abc/../def", "not an endpoint id"),
        ("RUNPOD_API_KEY", HUB_TOKEN, "hub token"),
        ("RUNPOD_API_KEY", "short", "not a RunPod key"),
        ("HF_TOKEN", RUNPOD_KEY, "RunPod key"),
        ("MODEL_REVISION", "main", "commit"),
        ("MODEL_ID", "just-a-name", "neither a repository"),
        ("IMAGE", "docker.io/you/worker:latest", "@sha256"),
        ("RUNPOD_API_URL", "api.runpod.io/v2", "not a URL"),
        ("RUNPOD_API_URL", "https://you:secret@host/v2", "not a URL"),
        ("RUNPOD_JOBS_URL", "http://example.org/v2", "unencrypted"),
        ("HF_HOME", "~/huggingface", "~ is not expanded"),
        ("RUNTIME", "podman", "not auto, docker or venv"),
        ("ENGINE", "llama", "not extractive"),
    ],
)
def test_a_value_of_another_shape_is_told_without_it(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    said = doctor.misfit(name, value)
    assert words in said
    assert "secret" not in said


def test_a_folder_of_this_machine_is_a_model() -> None:
    assert doctor.misfit("MODEL_ID", "/models/mine", {"MODEL_ID"}) == ""


def test_a_name_with_a_typo_is_told_by_its_neighbour_and_any_other_by_its_line() -> None:
    pasted = "c2VjcmV0LW9mLW1pbmU"  # a token with a `=` at its end is a name to the grammar
    host = Host(names=[(2, "HF_TOKN"), (3, "hf_home"), (5, pasted), (6, "HF_TOKEN")])
    lines = doctor.variables({}, KNOWN, host)
    assert Line("problem", ".env:2", "an unknown name", "edit .env: did you mean HF_TOKEN?") in lines
    assert Line("problem", ".env:3", "an unknown name", "edit .env: did you mean HF_HOME?") in lines
    assert Line("note", ".env:5", "a name that .env.example does not have") in lines
    assert not any(line.what == ".env:6" or pasted in str(line) for line in lines)


def test_each_variable_of_the_example_is_somewhere_on_the_screen() -> None:
    environ = {"MODEL_ID": "you/model", "MODEL_REVISION": "main", "ENGINE": "vllm"}
    said = str(doctor.variables(environ, KNOWN, Host()))
    assert len(KNOWN) > 15
    assert [name for name in KNOWN if name not in said] == []


def test_what_is_of_no_use_alone_and_what_the_shell_hides() -> None:
    host = Host(hidden={"RUNPOD_API_KEY"})
    lines = doctor.variables({"RUNPOD_ENDPOINT_ID": "abc", "RUNPOD_API_KEY": "", "ENGINE": "vllm"}, KNOWN, host)
    said = {(line.state, line.what): line for line in lines}
    assert "RUNPOD_API_KEY is not" in said["problem", "RUNPOD_ENDPOINT_ID"].detail
    assert "an empty value, which wins" in said["note", "RUNPOD_API_KEY"].detail
    assert said["problem", "ENGINE"].mend == "edit .env: set MODEL_ID"


# --- a token of the hub ----------------------------------------------------------------------------------------------


def token(role: str, scoped: object = None, everywhere: object = None) -> dict[str, Any]:
    grants = {"fineGrained": {"scoped": scoped, "global": everywhere or []}} if role == "fineGrained" else {}
    return {"name": "you", "auth": {"type": "access_token", "accessToken": {"role": role, **grants}}}


def scope(*permissions: str) -> list[dict[str, object]]:
    return [{"entity": {"type": "model", "name": "you/model"}, "permissions": list(permissions)}]


@pytest.mark.parametrize(
    ("answer", "states", "words"),
    [
        (token("read"), ["ok"], "fit for the worker"),
        (token("write"), ["ok", "note"], "far more than the worker needs"),
        (token("admin"), ["ok", "note"], "far more than the worker needs"),
        (
            token("fineGrained", scope("repo.content.read")),
            ["ok"],
            "of some owners or repositories: fit for the worker",
        ),
        (token("fineGrained", [], ["repo.content.read"]), ["ok"], "everything that the account can see"),
        (token("fineGrained", scope("repo.content.read", "repo.write")), ["ok", "note"], "fit for make ablate"),
        (token("fineGrained", scope("inference.serverless.write")), ["problem"], "neither read nor write"),
        (token("fineGrained", "nonsense"), ["problem"], "neither read nor write"),
        (token("astronaut"), ["unknown"], "does not say"),
        ({"auth": {"type": "oauth"}}, ["unknown"], "does not say"),
        ([], ["unknown"], "does not say"),
    ],
)
def test_a_token_is_told_by_what_it_is_fit_for(answer: Any, states: list[str], words: str) -> None:
    lines = doctor.token_lines(answer)
    assert [line.state for line in lines] == states
    assert words in " ".join(line.detail for line in lines)
    assert all(line.mend for line in lines if line.state != "ok")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without what would lead elsewhere."""
    for name in [*KNOWN, "HF_HUB_OFFLINE", "AS", "ENV_FILE"]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_whose_token_it_is_comes_from_the_hub_and_a_slow_one_is_left(online: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    online.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    online.setenv("HF_TOKEN", HUB_TOKEN)
    replies: list[Reply] = [a_json(token("read")), a_json({"error": HUB_TOKEN}, 401), a_json({}, 503)]
    seen = []

    def answer(method: str, path: str, headers: dict[str, str]) -> Reply:
        seen.append((path, headers.get("authorization") or headers.get("Authorization")))
        if not replies:
            time.sleep(1.5)
            return a_json({})
        return replies.pop(0)

    with serving(answer) as url:
        online.setenv("HF_ENDPOINT", url)
        assert doctor.ask_hub()[0].state == "ok"
        assert doctor.ask_hub() == [
            Line("problem", "HF_TOKEN", "the hub refuses it", f"copy it again, or make a new one: {doctor.HUB_TOKENS}")
        ]
        assert doctor.ask_hub()[0].state == "unknown"
        online.setattr(doctor, "READ_TIMEOUT", 0.3)
        (line,) = doctor.at_once({"HF_TOKEN": doctor.ask_hub}, 1.2)["HF_TOKEN"]
    assert line.state == "unknown"
    assert "no answer (" in line.detail  # its own time limit, not the screen's
    assert set(seen) == {("/api/whoami-v2", f"Bearer {HUB_TOKEN}")}


# --- RunPod ----------------------------------------------------------------------------------------------------------


def endpoint(image: str) -> dict[str, object]:
    """What makes an endpoint."""
    return {
        "name": "mine",
        "type": "QUEUE",
        "image": image,
        "gpu": {"pools": ["AMPERE_24"], "count": 1},
        "workers": {"min": 0, "max": 3, "idleTimeout": 60},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
    }


def states(lines: list[Line]) -> list[tuple[str, str]]:
    return [(line.state, line.what) for line in lines]


def test_the_local_runpods_endpoint_is_well_until_runpod_scales_it_down(online: pytest.MonkeyPatch) -> None:
    with local_server() as runpod:
        online.setenv("RUNPOD_API_KEY", runpod.key)
        online.setenv("RUNPOD_API_URL", runpod.api)
        online.setenv("RUNPOD_JOBS_URL", runpod.api)
        assert states(doctor.ask_management("", None)) == [("ok", "RUNPOD_API_KEY")]
        made = runpod.ok("POST", "serverless", endpoint(PUSHED))
        runpod.advance(120)
        assert states(doctor.ask_management(made["id"], 3)) == [("ok", "RUNPOD_API_KEY"), ("ok", "workers")]
        assert states(doctor.ask_jobs(made["id"])) == [("ok", "endpoint")]
        runpod.ok("PATCH", f"serverless/{made['id']}", {"workers": {"max": 2}})
        runpod.advance(120)
        assert states(doctor.ask_management(made["id"], 3))[1] == ("note", "workers")
        runpod.ok("PATCH", f"serverless/{made['id']}", {"workers": {"max": 0}})
        runpod.advance(120)
        line = doctor.ask_management(made["id"], 3)[1]
        assert (line.state, line.mend) == ("problem", "make deploy")
        assert "to 2 after 3 days and to 0 after 7" in line.detail
        assert states(doctor.ask_management("not-there", 3)) == [("problem", "endpoint")]
        assert states(doctor.ask_jobs("not-there")) == [("problem", "endpoint")]
        online.setenv("RUNPOD_API_KEY", "another-key-than-that")
        assert states(doctor.ask_management(made["id"], 3)) == [("problem", "RUNPOD_API_KEY")]
        assert states(doctor.ask_jobs(made["id"])) == [("problem", "endpoint")]


@pytest.mark.parametrize(
    ("status", "state", "words"),
    [
        (401, "problem", "refuses it"),
        (402, "problem", "no balance"),
        (403, "note", "fit for make synth"),
        (410, "problem", "retired"),
        (429, "unknown", "HTTP 429"),
        (500, "unknown", "HTTP 500"),
    ],
)
def test_what_the_management_api_refuses_is_put_into_words(
    online: pytest.MonkeyPatch, status: int, state: str, words: str
) -> None:
    with serving(lambda *_: a_json({"detail": f"key {RUNPOD_KEY}"}, status)) as url:
        online.setenv("RUNPOD_API_KEY", RUNPOD_KEY)
        online.setenv("RUNPOD_API_URL", f"{url}/v2")
        (line,) = doctor.ask_management("abc", 3)
    assert line.state == state
    assert words in line.detail
    assert RUNPOD_KEY not in str(line)


@pytest.mark.parametrize(
    ("workers", "state"),
    [
        ({"ready": 1, "throttled": 1}, "ok"),
        ({"ready": 0, "throttled": 2}, "note"),
        ({"ready": 1, "unhealthy": 1}, "problem"),
        ("<html>", "unknown"),
    ],
)
def test_an_endpoint_is_as_well_as_its_workers(online: pytest.MonkeyPatch, workers: object, state: str) -> None:
    with serving(lambda *_: a_json({"jobs": {"inQueue": 0}, "workers": workers})) as url:
        online.setenv("RUNPOD_API_KEY", RUNPOD_KEY)
        online.setenv("RUNPOD_JOBS_URL", f"{url}/v2")
        assert states(doctor.ask_jobs("abc")) == [(state, "endpoint")]


def test_nothing_listens(online: pytest.MonkeyPatch) -> None:
    with serving(lambda *_: a_json({})) as url:
        pass
    online.setenv("RUNPOD_API_KEY", RUNPOD_KEY)
    online.setenv("RUNPOD_API_URL", url)
    online.setenv("RUNPOD_JOBS_URL", url)
    assert states(doctor.ask_management("abc", 3)) == [("unknown", "RUNPOD_API_KEY")]
    assert states(doctor.ask_jobs("abc")) == [("unknown", "endpoint")]


def test_a_key_is_shown_to_no_other_server(tmp_path: Path) -> None:
    def asked(**environ: str) -> list[str]:
        return sorted(doctor.remote_checks(environ, doctor.Deployed(), tmp_path)[0])

    both = {"RUNPOD_API_KEY": RUNPOD_KEY, "RUNPOD_ENDPOINT_ID": "abc"}
    assert asked() == []
    assert asked(**both) == ["RUNPOD_API_KEY", "endpoint"]
    os.environ["RUNPOD_JOBS_URL"] = "http://127.0.0.1:1/v2"
    try:
        assert asked(**both, RUNPOD_JOBS_URL="http://127.0.0.1:1/v2") == ["endpoint"]
        os.environ["RUNPOD_JOBS_URL"] = "http://example.org/v2"
        assert asked(**both, RUNPOD_JOBS_URL="http://example.org/v2") == []
    finally:
        del os.environ["RUNPOD_JOBS_URL"]
    assert asked(HF_TOKEN=RUNPOD_KEY) == []
    assert asked(HF_TOKEN=HUB_TOKEN) == ["HF_TOKEN"]
    assert asked(HF_TOKEN=HUB_TOKEN, HF_HUB_OFFLINE="1") == []
    assert asked(IMAGE=f"you/worker@{DIGEST}") == ["image"]


# --- what is deployed ------------------------------------------------------------------------------------------------


def lock(**more: object) -> dict[str, object]:
    return {
        "format": 1,
        "api": API,
        "endpoint": "abc",
        "failed": None,
        "releases": [{"body": {"image": PUSHED}}],
        **more,
    }


@pytest.mark.parametrize(
    ("files", "environ", "state", "words"),
    [
        ({}, {}, "off", "nothing yet"),
        ({"image.json": {"image": PUSHED}}, {}, "off", "nothing yet"),
        ({"deploy.lock.json": lock(), "image.json": {"image": PUSHED}}, {}, "ok", "agree"),
        ({"deploy.lock.json": lock()}, {"RUNPOD_ENDPOINT_ID": "abc"}, "ok", "agree"),
        ({"deploy.lock.json": lock()}, {"RUNPOD_ENDPOINT_ID": "other"}, "problem", "another endpoint"),
        ({"deploy.lock.json": lock(api="http://127.0.0.1:1/v2")}, {}, "problem", "another API"),
        ({"deploy.lock.json": lock(), "image.json": {"image": "you/new@x"}}, {}, "note", "pushed since"),
        ({"deploy.lock.json": lock(failed={"cause": "x"})}, {}, "note", "did not end well"),
        ({"deploy.lock.json": lock(endpoint=None, releases=[])}, {}, "off", "nothing yet"),
        ({"deploy.lock.json": []}, {}, "problem", "deploy.lock.json is damaged"),
        ({"image.json": {"image": 3}}, {}, "problem", "image.json is damaged"),
    ],
)
def test_the_lock_file_the_pushed_image_and_the_environment_are_compared(
    tmp_path: Path, files: dict[str, object], environ: dict[str, str], state: str, words: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data), encoding="utf-8")
    (line,) = doctor.deployed(tmp_path, environ).lines
    assert line.state == state
    assert words in line.detail


def test_the_lock_file_that_deploys_write_is_understood(tmp_path: Path) -> None:
    from endpoint.state import State

    state = State(tmp_path, API, "mine")
    state.endpoint_id = "abc"
    state.prove({"image": PUSHED}, {})
    found = doctor.deployed(tmp_path, {})
    assert (found.endpoint, found.image) == ("abc", PUSHED)


# --- registries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "host", "repository"),
    [
        ("you/worker", "registry-1.docker.io", "you/worker"),
        ("debian", "registry-1.docker.io", "library/debian"),
        ("docker.io/you/worker:1.2", "registry-1.docker.io", "you/worker"),
        ("ghcr.io/you/group/worker", "ghcr.io", "you/group/worker"),
        ("127.0.0.1:5000/you/worker:t", "127.0.0.1:5000", "you/worker"),
        ("localhost/worker", "localhost", "worker"),
    ],
)
def test_a_reference_names_its_registry(reference: str, host: str, repository: str) -> None:
    assert image_registry.parse(f"{reference}@{DIGEST}") == (host, repository, DIGEST)


@pytest.mark.parametrize(
    "reference",
    ["", "you/worker", "you/worker:latest", f"@{DIGEST}", f"you/worker@{DIGEST[:-1]}", f"https://host/you/worker@{DIGEST}",
     f"you:secret@host/worker@{DIGEST}", f"host.example/../up@{DIGEST}", f"host.example/you/wo rker@{DIGEST}"],
)  # fmt: skip
def test_what_names_no_digest_is_refused_without_showing_it(reference: str) -> None:
    with pytest.raises(Problem) as caught:
        image_registry.digest_exists(reference)
    assert "secret" not in str(caught.value)


class Registry:
    """A registry that gives its token to anybody, or to nobody."""

    def __init__(self, *, digests: tuple[str, ...] = (DIGEST,), open: bool = True, get_only: bool = False) -> None:
        self.digests, self.get_only = digests, get_only
        self.token = "t0" if open else ""
        self.url = ""
        self.seen: list[tuple[str, str]] = []

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> Reply:
        self.seen.append((method, path))
        if path.startswith("/token?"):
            return a_json({"token": self.token}) if self.token else a_json({"errors": [{"code": "DENIED"}]}, 403)
        if headers.get("Authorization") != f"Bearer {self.token}":
            challenge = f'Bearer realm="{self.url}/token",service="here",scope="repository:you/worker:pull"'
            return 401, {"WWW-Authenticate": challenge, "Content-Type": "application/json"}, b"{}"
        if self.get_only and method == "HEAD":
            return a_json({}, 405)
        digest = path.rpartition("/")[2]
        if path.startswith("/v2/you/worker/manifests/") and digest in self.digests:
            return (
                200,
                {"Docker-Content-Digest": digest, "Content-Type": "application/vnd.oci.image.index.v1+json"},
                b"{}",
            )
        return a_json({"errors": [{"code": "MANIFEST_UNKNOWN"}]}, 404)

    def look_up(self) -> image_registry.Found:
        with serving(self) as self.url:
            return image_registry.look_up(f"{self.url.removeprefix('http://')}/you/worker:1@{DIGEST}", timeout=2)


def test_a_digest_is_there_after_the_dance_for_a_token() -> None:
    registry = Registry()
    assert registry.look_up().exists is True
    assert registry.seen == [
        ("HEAD", f"/v2/you/worker/manifests/{DIGEST}"),
        ("GET", "/token?scope=repository%3Ayou%2Fworker%3Apull&service=here"),
        ("HEAD", f"/v2/you/worker/manifests/{DIGEST}"),
    ]
    assert Registry(get_only=True).look_up().exists is True
    assert Registry(digests=()).look_up().exists is False


def test_a_private_image_is_neither_there_nor_not() -> None:
    found = Registry(open=False).look_up()
    assert found.exists is None
    assert "private" in found.reason


@pytest.mark.parametrize(
    "reply",
    [
        (200, {"Content-Type": "text/html"}, b"<html>log in to this wifi</html>"),
        (404, {"Content-Type": "text/html"}, b"<html>"),
        (200, {"Docker-Content-Digest": f"sha256:{'0' * 64}"}, b""),
        (302, {"Location": "http://127.0.0.1:1/"}, b""),
        (401, {"WWW-Authenticate": 'Basic realm="here"'}, b""),
        (401, {"WWW-Authenticate": 'Bearer realm="http://example.org/token"'}, b""),
        (401, {"WWW-Authenticate": 'Bearer realm="http://[::"'}, b""),
        (429, {}, b""),
        (500, {}, b""),
    ],
)
def test_what_is_no_answer_of_a_registry_is_not_taken_for_one(reply: Reply) -> None:
    with serving(lambda *_: reply) as url:
        assert image_registry.digest_exists(f"{url.removeprefix('http://')}/you/worker@{DIGEST}", timeout=2) is None


def test_a_registry_that_is_not_there_or_slow_is_bounded() -> None:
    with serving(slow(1)) as url:
        host = url.removeprefix("http://")
        start = time.monotonic()
        assert image_registry.look_up(f"{host}/you/worker@{DIGEST}", timeout=0.2).reason.endswith("in time")
        assert time.monotonic() - start < 0.9
    assert image_registry.digest_exists(f"{host}/you/worker@{DIGEST}", timeout=1) is None


def test_the_image_on_the_screen(online: pytest.MonkeyPatch) -> None:
    for registry, state in ((Registry(), "ok"), (Registry(digests=()), "problem"), (Registry(open=False), "unknown")):
        with serving(registry) as registry.url:
            reference = f"{registry.url.removeprefix('http://')}/you/worker@{DIGEST}"
            assert states(doctor.ask_registry(reference, "IMAGE")) == [(state, "image")]
    assert states(doctor.ask_registry("you/worker:latest", "IMAGE")) == [("problem", "image")]


# --- the screen ------------------------------------------------------------------------------------------------------


def test_the_exit_code_is_that_of_the_worst_line() -> None:
    def code(*states: str) -> int:
        return doctor.exit_code(Line(state, "w", "d") for state in states)

    assert (code("ok", "off", "note"), code("ok", "unknown"), code("unknown", "problem")) == (0, 4, 3)


def test_a_check_that_hangs_or_breaks_is_a_line_and_holds_nothing_up() -> None:
    never = threading.Event()

    def hangs() -> list[Line]:
        never.wait(30)
        return []

    def breaks() -> list[Line]:
        raise RuntimeError(f"https://you:{HUB_TOKEN}@host")

    def lacks() -> list[Line]:
        raise ImportError

    start = time.monotonic()
    found = doctor.at_once({"a": hangs, "b": breaks, "c": lacks, "d": lambda: [Line("ok", "d", "")]}, 0.3)
    assert time.monotonic() - start < 5
    never.set()
    assert list(found) == ["a", "b", "c", "d"]
    assert [line.state for lines in found.values() for line in lines] == ["unknown", "unknown", "unknown", "ok"]
    assert found["c"][0].mend.startswith("scripts/run ops -- true")
    assert HUB_TOKEN not in str(found)


def test_records_that_are_none_are_left_out() -> None:
    records = [
        "line\tok\tengine\tDocker\t\n",
        "line\tcurious\ta\tb\tc\n",
        "name\tx\tA\n",
        "\n",
        "name\t3\tA\n",
        "folder\tMODEL_ID\n",
    ]
    assert doctor.read_host(records) == Host([Line("ok", "engine", "Docker")], [(3, "A")], set(), {"MODEL_ID"})


# --- make doctor, as a program ---------------------------------------------------------------------------------------

TOOLS = "bash env sed awk grep find df du cat head tail wc ps date sleep dirname mkdir rm rmdir cut sort realpath tr".split()


class Tree:
    """A tree of its own, with a PATH that holds what a test puts there and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tree"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (self.folder / "scripts").mkdir(parents=True)
        for path in ("scripts/doctor", "scripts/doctor.py", "scripts/lib.sh", "scripts/runpod_api.py", "scripts/model_hub.py",
                     "scripts/image_registry.py", "scripts/with-env", ".env.example"):  # fmt: skip
            shutil.copy(ROOT / path, self.folder / path)
        for path in ("scripts/common", "config"):
            shutil.copytree(ROOT / path, self.folder / path, ignore=shutil.ignore_patterns("__pycache__"))
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{shutil.which('bash')}\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def with_python(self) -> Tree:
        self.program("python3.11", f'exec "{sys.executable}" "$@"')
        return self

    def env(self, text: str, mode: int = 0o600) -> None:
        path = self.folder / ".env"
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)

    def doctor(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.folder / "scripts/doctor", *arguments],
            env={"PATH": str(self.bin), "HOME": str(self.folder), **environ},
            cwd=self.bin,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def lines(self, **environ: str) -> tuple[int, dict[tuple[str, str], str]]:
        """The exit code, and the details by state and subject."""
        done = self.doctor(AS="json", **environ)
        assert done.stderr == ""
        answer = json.loads(done.stdout)
        assert answer["code"] == done.returncode
        found: dict[tuple[str, str], str] = {}
        for line in answer["lines"]:
            assert set(line) == {"state", "what", "detail", "mend"}
            assert line["mend"] or line["state"] != "problem", line
            key = line["state"], line["what"]
            found[key] = f"{found.get(key, '')}{line['detail']} -> {line['mend']}\n"
        return done.returncode, found


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_bare_machine_is_told_what_to_install(tree: Tree) -> None:
    code, lines = tree.lines()
    assert code == 3
    assert "python3-venv" in lines["problem", "python"]
    assert "install git" in lines["problem", "git"]
    assert "no Docker engine answers" in lines["off", "engine"]
    assert "install Docker, or Python" in lines["unknown", "variables, services"]
    done = tree.doctor()
    assert (done.returncode, done.stderr) == (3, "")
    assert "\nproblem  python " in done.stdout
    assert "mend: Debian: sudo apt install python3-venv\n" in done.stdout
    assert done.stdout.endswith("\n2 problems, 1 not checked\n")


def test_with_a_python_and_git_there_is_no_problem(tree: Tree) -> None:
    tree.with_python().program("git", "exit 1")
    code, lines = tree.lines()
    assert code == 0, lines
    assert ("ok", "python") in lines
    assert ("ok", "disk") in lines
    assert "RUNPOD_API_KEY" in lines["off", "variables"]
    assert "local RunPod" in lines["off", "RUNPOD_API_KEY"]
    assert not [path for path in tree.folder.rglob("*") if path.name in ("store", "runs", "__pycache__")]
    done = tree.doctor()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\nno problems, 0 not checked\n")
    assert max(map(len, done.stdout.splitlines())) < 180


def test_bad_usage(tree: Tree) -> None:
    for arguments, environ in ((["more"], {}), ([], {"AS": "xml"})):
        done = tree.doctor(*arguments, **environ)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: make doctor [AS=json]\n")


@pytest.mark.parametrize(
    ("docker", "runtime", "state", "what", "words"),
    [
        ('echo "no daemon" >&2; exit 1', "docker", "problem", "engine", "RUNTIME=venv"),
        ('echo "no daemon" >&2; exit 1', "", "off", "engine", "virtual environments"),
        ('echo "permission denied at /var/run/docker.sock" >&2; exit 1', "", "note", "engine", "usermod -aG docker"),
        ('case "$1 $2" in "version -f") echo 28.2.2 ;; *) exit 1 ;; esac', "docker", "problem", "buildx", "not there"),
        ('case "$1 $2" in "version -f") echo 28.2.2 ;; "buildx version") echo "github.com/docker/buildx v0.12.1 3068" ;; *) exit 1 ;; esac',
         "docker", "problem", "buildx", "v0.12.1, 0.13 or newer"),
        ('case "$1 $2" in "version -f") echo 28.2.2 ;; "buildx version") echo "github.com/docker/buildx 0.13.1+ds1 x" ;; *) exit 1 ;; esac',
         "docker", "ok", "buildx", "0.13.1+ds1"),
        ('case "$1 $2" in "version -f") echo 28.2.2 ;; "buildx version") echo "github.com/docker/buildx v1.0.0 x" ;; *) exit 1 ;; esac',
         "", "ok", "buildx", "v1.0.0"),
    ],
)  # fmt: skip
def test_engines(tree: Tree, docker: str, runtime: str, state: str, what: str, words: str) -> None:
    tree.with_python().program("git", "exit 1")
    tree.program("docker", docker)
    code, lines = tree.lines(RUNTIME=runtime)
    assert words in lines[state, what]
    assert code == (3 if state == "problem" else 0)


def test_an_engine_that_hangs_does_not_hold_the_screen_up(tree: Tree) -> None:
    tree.with_python().program("docker", "exec sleep 50")
    start = time.monotonic()
    _, lines = tree.lines()
    assert time.monotonic() - start < 15
    assert "no Docker engine answers" in lines["off", "engine"]


def test_a_broken_env_file_is_told_by_lines_and_the_rest_is_checked(tree: Tree) -> None:
    tree.with_python().program("git", "exit 1")
    tree.env(
        "RUNTIME=venv\nquoted='a secret of mine'\nHF_TOKN=abcdefgh\nexport A=1\nRUNTIME=docker\nMODEL_REVISION=main",
        0o644,
    )
    code, lines = tree.lines(ENGINE="")
    assert code == 3
    told = lines["problem", ".env"]
    assert "line 2, 4:" in told
    assert "chmod 600 .env" in told
    assert "the first one holds" in lines["note", ".env:5"]
    assert "HF_TOKEN" in lines["problem", ".env:3"]
    assert "commit" in lines["problem", "MODEL_REVISION"]
    assert "RUNTIME" in lines["ok", "variables"]


def test_line_ends_of_windows_and_a_shell_that_hides(tree: Tree) -> None:
    tree.with_python().program("git", "exit 1")
    tree.env("RUNTIME=venv\r\n")
    assert "sed -i" in tree.lines()[1]["problem", ".env"]
    tree.env("RUNTIME=venv\n")
    code, lines = tree.lines(RUNTIME="auto")
    assert (code, "wins over .env" in lines["note", "RUNTIME"]) == (0, True)
    assert "closed to other users" in lines["ok", ".env"]
    assert ("problem", "ENV_FILE") in tree.lines(ENV_FILE="/not/there")[1]


def test_an_env_file_that_git_keeps(tree: Tree) -> None:
    tree.with_python().program("git", "[[ $1 == ls-files ]]")
    tree.env("RUNTIME=venv\n")
    assert "git rm --cached" in tree.lines()[1]["problem", ".env"]


@pytest.mark.parametrize(("days", "state"), [(3, "ok"), (52, "note"), (61, "problem")])
def test_scheduled_workflows_need_a_commit_in_sixty_days(tree: Tree, days: int, state: str) -> None:
    tree.with_python().program("git", f"[[ $1 == log ]] && echo {int(time.time()) - days * 86400 - 60}")
    assert ("off", "workflows") in tree.lines()[1]
    folder = tree.folder / ".github" / "workflows"
    folder.mkdir(parents=True)
    (folder / "drift.yaml").write_text('on:\n  schedule:\n    - cron: "17 6 * * *"\n', encoding="utf-8")
    code, lines = tree.lines()
    assert f"{days} days old" in lines[state, "workflows"]
    assert code == (3 if state == "problem" else 0)


def test_models_the_store_and_the_local_runpod(tree: Tree) -> None:
    tree.with_python().program("git", "exit 1")
    held = tree.folder / "hub" / "hub" / "models--you--model"
    (held / "snapshots" / COMMIT).mkdir(parents=True)
    (held / "blobs").mkdir()
    (held / "blobs" / "x.incomplete").write_bytes(b"x" * 2048)
    (tree.folder / "store" / "sleep").mkdir(parents=True)
    (tree.folder / "store" / "sleep" / "records.jsonl").touch()
    (tree.folder / ".local").mkdir()
    (tree.folder / ".local" / "env").touch()
    (tree.folder / ".local" / "pid").write_text("99999999\n", encoding="utf-8")
    code, lines = tree.lines(HF_HOME="hub", MODEL_ID="you/model", MODEL_REVISION=COMMIT)
    assert code == 3
    assert "1 of the hub are kept here" in lines["ok", "models"]
    assert "interrupted" in lines["note", "models"]
    assert "its commit is in the hub's cache" in lines["ok", "MODEL_ID"]
    assert "1 domains, not opened before the client stage is built -> make build" in lines["off", "store"]
    assert "make down" in lines["problem", "local RunPod"]


@pytest.mark.parametrize(
    ("check", "state", "words"),
    [
        (r"printf 'begin\tsleep\nline\tok\tstore\tdomain sleep opens\t\nend\n'", "ok", "domain sleep opens"),
        (
            r"printf 'begin\ta\nline\tok\tstore\tdomain a opens\t\nbegin\tsleep\n'; kill -SEGV $$",
            "problem",
            "domain sleep: ",
        ),
        (r"printf 'begin\tsleep\n'; exec sleep 40", "problem", "domain sleep: opening its index crashed or hung"),
        ("echo an error >&2; exit 2", "unknown", "could not be opened"),
    ],
)
def test_a_domain_that_takes_its_process_along_is_named(tree: Tree, check: str, state: str, words: str) -> None:
    # This git hashes everything to the same, so whatever was built is current.
    tree.with_python().program("git", "[[ $1 == hash-object ]] || exit 1; cat >/dev/null; echo 0")
    for folder, files in (
        (".venvs/client", [".stamp"]),
        (".venvs/model", [".stamp"]),
        ("store/sleep", ["records.jsonl"]),
    ):
        (tree.folder / folder).mkdir(parents=True)
        for file in files:
            (tree.folder / folder / file).write_text("0\n", encoding="utf-8")
    (tree.folder / "images" / "client").mkdir(parents=True)
    program = tree.folder / "scripts" / "run"
    program.write_text(f"#!{shutil.which('bash')}\nmkdir -p runs\n{check}\n", encoding="utf-8")
    program.chmod(0o755)
    start = time.monotonic()
    _, lines = tree.lines()
    assert time.monotonic() - start < 20
    assert words in lines[state, "store"]
    assert not (tree.folder / "runs").exists()


def test_the_whole_screen_of_an_endpoint_on_the_local_runpod(tree: Tree) -> None:
    tree.with_python().program("git", "exit 1")
    registry = Registry()
    with local_server() as runpod, serving(registry) as registry.url, serving(lambda *_: a_json(token("read"))) as hub:
        image = f"{registry.url.removeprefix('http://')}/you/worker@{DIGEST}"
        made = runpod.ok("POST", "serverless", endpoint(image))
        runpod.advance(120)
        tree.env(
            f"RUNPOD_API_KEY={runpod.key}\nRUNPOD_API_URL={runpod.api}\nRUNPOD_JOBS_URL={runpod.api}\n"
            f"RUNPOD_ENDPOINT_ID={made['id']}\nHF_TOKEN={HUB_TOKEN}\nHF_ENDPOINT={hub}\nIMAGE={image}\n"
        )
        runpod.forget_calls()
        code, lines = tree.lines()
        assert runpod.mutating() == []
    assert code == 0, lines
    for what in ("RUNPOD_API_KEY", "workers", "endpoint", "HF_TOKEN", "image"):
        assert ("ok", what) in lines, lines


def test_the_local_runpods_own_endpoint_is_no_problem(tree: Tree) -> None:
    tree.with_python().program("git", "exit 1")
    with local_server() as runpod:
        key = {"RUNPOD_API_KEY": runpod.key, "RUNPOD_API_URL": runpod.api, "RUNPOD_JOBS_URL": runpod.api}
        code, lines = tree.lines(**key, RUNPOD_ENDPOINT_ID="local")
        assert (code, "local RunPod's own" in lines["note", "endpoint"]) == (0, True)
        assert ("problem", "endpoint") in tree.lines(**key, RUNPOD_ENDPOINT_ID="not-there")[1]


def test_without_a_network_all_that_is_remote_is_unknown_and_soon(tree: Tree) -> None:
    tree.with_python().program("git", "exit 1")
    with serving(slow(20)) as url:
        host = url.removeprefix("http://")
        tree.env(
            f"RUNPOD_API_KEY={RUNPOD_KEY}\nRUNPOD_API_URL={url}\nRUNPOD_JOBS_URL={url}\nRUNPOD_ENDPOINT_ID=abc\n"
            f"HF_TOKEN={HUB_TOKEN}\nHF_ENDPOINT={url}\nIMAGE={host}/you/worker@{DIGEST}\n"
        )
        start = time.monotonic()
        code, lines = tree.lines()
        assert time.monotonic() - start < 20
    assert code == 4, lines
    assert {what for state, what in lines if state == "unknown"} == {"RUNPOD_API_KEY", "endpoint", "HF_TOKEN", "image"}


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["python", "plain"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_no_value_is_ever_shown(tree: Tree, way: str, form: str) -> None:
    if way == "python":
        tree.with_python()
    planted = {name: f"planted{number}secret{'x' * 12}" for number, name in enumerate(KNOWN)}
    tree.program("docker", 'echo "permission denied: $HF_TOKEN $RUNPOD_API_KEY $DOCKER_HOST" >&2; exit 1')
    lines = [f"{name}={value}" for name, value in planted.items()]
    lines += [
        "plantedalone==",
        "cGxhbnRlZGJhc2U2NA=",
        "planted in a bad line",
        "HF_TOKN=plantedtypo",
        "OTHER=plantedother",
    ]
    tree.env("\n".join(lines))
    outputs = [
        tree.doctor(AS=form, DOCKER_HOST="tcp://planted:2376"),
        tree.doctor(AS=form, **{**planted, "RUNTIME": "docker"}),
    ]
    # Values of the right shape, and servers that say them back in every way they can.
    key, secret = "rpa_plantedkeyplantedkey01", "hf_plantedtokenplantedtoken"

    def echo(method: str, path: str, headers: dict[str, str]) -> Reply:
        said = f"{path} {headers}"
        status = 418 if "health" in path else 403
        return (
            status,
            {"Content-Type": "application/json", "X-Error-Message": str(headers.get("Authorization"))},
            json.dumps({"detail": said, "error": said, "title": said}).encode(),
        )

    with serving(echo) as url:
        good = {
            "RUNPOD_API_KEY": key, "RUNPOD_API_URL": f"{url}/plantedpath", "RUNPOD_JOBS_URL": f"{url}/plantedpath",
            "HF_TOKEN": secret, "HF_ENDPOINT": f"{url}/plantedpath", "RUNPOD_ENDPOINT_ID": "plantedendpoint",
            "IMAGE": f"{url.removeprefix('http://')}/planted/worker@{DIGEST}", "MODEL_ID": "planted/model", "VECTOR_STORE_PATH": "planted-store",
        }  # fmt: skip
        outputs.append(tree.doctor(AS=form, ENV_FILE=os.devnull, **good))
        deploy = tree.folder / "planted-deploy"
        deploy.mkdir()
        (deploy / "deploy.lock.json").write_text(
            json.dumps(lock(endpoint="plantedendpoint", api="planted")), encoding="utf-8"
        )
        outputs.append(
            tree.doctor(
                AS=form, **{**good, "RUNPOD_API_URL": "https://planted:planted@host/", "DEPLOY_DIR": "planted-deploy"}
            )
        )
    for done in outputs:
        assert done.returncode == 3, done.stdout
        assert len(done.stdout) > 500
        assert "planted" not in done.stdout + done.stderr
        assert "cGxhbnRlZGJhc2U2NA" not in done.stdout + done.stderr


def test_a_value_that_slips_into_a_line_is_replaced_by_its_name() -> None:
    environ = {"HF_TOKEN": HUB_TOKEN, "RUNTIME": "docker", "ENGINE": "vllm", "STOP_SECONDS": "8"}
    said = doctor.redacted(f"docker, 8, vllm: GET https://x/?t={HUB_TOKEN}", environ, environ)
    assert said == "docker, 8, vllm: GET https://x/?t=<HF_TOKEN>"


# --- one grammar -----------------------------------------------------------------------------------------------------


def test_the_grammar_of_env_is_that_of_with_env() -> None:
    def rule(name: str) -> str:
        (line,) = [
            line
            for line in (ROOT / "scripts" / name).read_text(encoding="utf-8").splitlines()
            if "=~ ^[A-Za-z_]" in line
        ]
        return line.strip()

    assert rule("doctor") == rule("with-env")
