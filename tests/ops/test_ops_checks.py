"""What is asked before anything changes: the hub (the real client, a hub on loopback), the catalog, the registry."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from local_server import KEY, local_server

from common.problems import TRY_LATER, Problem
from endpoint import checks
from endpoint.desired import Desired, load
from runpod_api import Api

ROOT = Path(__file__).parents[2]
COMMIT, OTHER = "a" * 40, "b" * 40
TOKEN = "hf_NobodysTokenForThisTest00000"  # noqa: S105


class Hub:
    """A hub with one repository; `status` answers everything with that error instead."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.private = True
        self.status = 200
        self.authorized: list[str | None] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.authorized.append(self.headers["Authorization"])
                path = self.path.split("?")[0]
                answers: dict[str, Any] = {
                    "/api/models/you/model-nf4/refs": {
                        "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": OTHER}],
                        "converts": [],
                        "tags": [
                            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
                            for name, commit in hub.tags.items()
                        ],
                    },
                    "/api/models/you/model-nf4": {
                        "_id": "1",
                        "id": "you/model-nf4",
                        "private": hub.private,
                        "tags": [],
                        "siblings": [],
                    },
                }
                status = hub.status if hub.status != 200 else 200 if path in answers else 404
                body = json.dumps(answers.get(path, {"error": "Repository not found"})).encode()
                self.send_response(status)
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def end(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.delenv("UNVERIFIED", raising=False)
    yield found
    found.end()


def desired(tmp_path: Path, model: str = "you/model-nf4", revision: str = COMMIT, **edits: str) -> Desired:
    shutil.copytree(ROOT / "config", tmp_path / "config")
    path = tmp_path / "config" / "endpoint.yaml"
    text = path.read_text(encoding="utf-8")
    for old, new in {"your-name/Qwen3-14B-ablated-nf4": model, "0" * 40: revision, **edits}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return load(tmp_path / "config", tmp_path, {})


def test_a_commit_with_a_verified_tag_is_good(tmp_path: Path, hub: Hub) -> None:
    hub.tags = {"verified-20261101T000000Z": COMMIT, "v1": OTHER}
    assert checks.model(desired(tmp_path)) == [f"model you/model-nf4 at {COMMIT[:12]}, verified-20261101T000000Z"]
    assert set(hub.authorized) == {f"Bearer {TOKEN}"}


def test_a_public_repository_is_told(tmp_path: Path, hub: Hub) -> None:
    hub.tags, hub.private = {"verified-1": COMMIT}, False
    assert "is public" in checks.model(desired(tmp_path))[1]


def test_without_a_token_the_hub_is_asked_as_anybody_could(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.tags = {"verified-1": COMMIT}
    checks.model(desired(tmp_path))
    assert set(hub.authorized) == {None}


def test_another_commit_is_refused_and_the_verified_ones_are_named(tmp_path: Path, hub: Hub) -> None:
    hub.tags = {"verified-1": OTHER, "main-copy": COMMIT}
    with pytest.raises(
        Problem, match=rf"endpoint\.yaml:\d+: no tag verified-… .*\n  {OTHER}  verified-1\nUNVERIFIED=1"
    ):
        checks.model(desired(tmp_path))


def test_no_verified_commit_at_all(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(Problem, match=r"make ablate MODEL=Qwen/Qwen3-14B"):
        checks.model(desired(tmp_path))


def test_unverified_asks_nothing(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNVERIFIED", "1")
    assert "nobody asked" in checks.model(desired(tmp_path))[0]
    assert hub.authorized == []


def test_a_repository_that_is_not_there(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(Problem, match="is not on the hub, or not for this HF_TOKEN") as problem:
        checks.model(desired(tmp_path, model="you/other"))
    assert TOKEN not in str(problem.value)


@pytest.mark.parametrize("status", [500, 503, 429, 401, 403])
def test_a_hub_that_does_not_say(tmp_path: Path, hub: Hub, status: int) -> None:
    hub.status = status
    with pytest.raises(Problem) as problem:
        checks.model(desired(tmp_path))
    assert problem.value.code in (TRY_LATER, 2)
    assert TOKEN not in str(problem.value)


def test_a_hub_out_of_reach(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Problem, match="UNVERIFIED=1") as problem:
        checks.model(desired(tmp_path))
    assert problem.value.code == TRY_LATER


@pytest.mark.parametrize("example", [{"model": "your-name/model"}, {"revision": "0" * 40}])
def test_the_examples_values_are_told(tmp_path: Path, hub: Hub, example: dict[str, str]) -> None:
    with pytest.raises(Problem, match=r"still the example's.*ON=local"):
        checks.model(desired(tmp_path, **example))
    assert hub.authorized == []


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with local_server() as runpod:
        yield Api(KEY, runpod.api)


def test_the_price_of_the_shipped_endpoint(tmp_path: Path, api: Api) -> None:
    (note,) = checks.catalog(desired(tmp_path), api)
    assert "0 run always, 3 at most" in note


def test_a_pool_that_does_not_exist(tmp_path: Path, api: Api) -> None:
    with pytest.raises(Problem, match=r"endpoint\.yaml:\d+: RunPod has no GPU pool ADA_25.*known are ADA_24"):
        checks.catalog(desired(tmp_path, **{"pools: null": "pools: [ADA_24, ADA_25]"}), api)


def test_a_pool_whose_every_type_is_excluded(tmp_path: Path, api: Api) -> None:
    edits = {"pools: null": "pools: [ADA_24]", "excludedTypes: []": "excludedTypes: [NVIDIA GeForce RTX 4090]"}
    with pytest.raises(Problem, match="no GPU pool ADA_24"):
        checks.catalog(desired(tmp_path, **edits), api)


def test_a_pool_that_is_too_small_for_the_model(tmp_path: Path, api: Api) -> None:
    edits = {"base: Qwen/Qwen3-14B": "base: meta-llama/Llama-3.3-70B-Instruct", "pools: null": "pools: [ADA_24]"}
    with pytest.raises(Problem, match=r"pool ADA_24 has GPUs of 24 GB.*takes 44 GB"):
        checks.catalog(desired(tmp_path, **edits), api)


def test_a_catalog_that_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    now = [0.0]
    api = Api(
        KEY, "http://127.0.0.1:9/v2", clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    assert "are not checked" in checks.catalog(desired(tmp_path), api)[0]
