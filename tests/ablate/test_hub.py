# SPDX-License-Identifier: AGPL-3.0-or-later
"""The test hub answers as the real one does where the project depends on it: ids, rights, visibility, faults."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, Token, xet_files

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the machine's proxy
# What the real client reads: printed as JSON.
CLIENT = """
import json, os
from huggingface_hub import HfApi, hf_hub_download
api = HfApi()
info = api.model_info("lab/base", files_metadata=True)
files = {f.rfilename: [f.size, f.blob_id, f.lfs and [f.lfs.sha256, f.lfs.size]] for f in info.siblings}
tree = {f.path: [f.size, f.blob_id, f.lfs and [f.lfs.sha256, f.lfs.size]] for f in api.list_repo_tree("lab/base", recursive=True) if hasattr(f, "size")}
names = [entry.path for entry in api.list_repo_tree("lab/base")]
path = hf_hub_download("lab/base", "sub/notes.txt", revision=info.sha[:40])
errors = []
for call in (
    lambda: api.model_info("lab/missing"),
    lambda: api.model_info("lab/secret"),
    lambda: api.model_info("lab/base", revision="nowhere"),
    lambda: hf_hub_download("lab/base", "missing.txt"),
    lambda: api.create_repo("lab/base", exist_ok=False),
    lambda: api.create_repo("elsewhere/x"),
    lambda: api.create_tag("lab/base", tag="x", revision="nowhere"),
    lambda: api.delete_tag("lab/base", tag="nowhere"),
):
    try:
        call()
        errors.append("none")
    except Exception as error:
        errors.append(type(error).__name__ + " " + str(getattr(getattr(error, "response", None), "status_code", "")))
print(json.dumps({
    "files": files, "tree": tree, "names": names, "text": open(path).read(), "errors": errors, "private": info.private,
    "card": info.card_data.to_dict(), "parameters": info.safetensors.parameters, "who": api.whoami(), "config": info.config,
}))
"""
HEADER = json.dumps({"__metadata__": {}, "w": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}}).encode()
FILES = {
    "README.md": b"---\nlicense: mit\ntags: [a]\n---\nText",
    "config.json": b'{"model_type": "qwen3", "architectures": ["Q"], "hidden_size": 4}',
    "model.safetensors": struct.pack("<Q", len(HEADER)) + HEADER + bytes(24),
    "sub/notes.txt": "größe".encode(),
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(
        tmp_path / "hub", {WRITE_TOKEN: Token("tester", namespaces=("lab",)), READ_TOKEN: Token("tester", "read")}
    ) as hub:
        yield hub
        assert hub.errors == []


def ask(
    url: str, path: str, token: str = "", method: str = "GET", body: Any = None
) -> tuple[int, dict[str, str], bytes]:
    """One request: (status, headers, body)."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, method=method, data=data)  # noqa: S310
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with DIRECT.open(request, timeout=10) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def test_the_real_client_reads_it(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("lab/base", FILES)
    hub.add_repo("other/secret", FILES, private=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept["NO_PROXY"] = "127.0.0.1"
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE_TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT], env=kept | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    files = found["files"]
    assert files == found["tree"]
    assert set(files) == {".gitattributes", *FILES}
    # git hash-object's own answers
    for name in ("README.md", "config.json", "sub/notes.txt"):
        content = FILES[name]
        assert files[name] == [len(content), git_id(content), None]
    weights = FILES["model.safetensors"]
    sha256 = hashlib.sha256(weights).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(weights)}\n".encode()
    assert files["model.safetensors"] == [len(weights), git_id(pointer), [sha256, len(weights)]]
    assert "sub" in found["names"]
    assert found["text"] == "größe"
    assert found["private"] is False
    assert found["card"] == {"license": "mit", "tags": ["a"]}
    assert found["config"] == {"model_type": "qwen3", "architectures": ["Q"]}
    assert found["parameters"] == {"BF16": 12}
    assert found["who"]["auth"]["accessToken"]["role"] == "write"
    assert found["errors"] == [
        "RepositoryNotFoundError 404",
        "RepositoryNotFoundError 404",
        "RevisionNotFoundError 404",
        "RemoteEntryNotFoundError 404",
        "HfHubHTTPError 409",
        "HfHubHTTPError 403",
        "RevisionNotFoundError 404",
        "RevisionNotFoundError 404",
    ]


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def test_git_agrees_about_ids() -> None:
    # printf 'what is up, doc?' | git hash-object --stdin, as in git's own book
    assert git_id(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"


def test_private_repos_are_hidden_from_those_without_rights(hub: Hub) -> None:
    hub.add_repo("lab/secret", FILES, private=True)
    hub.tokens["stranger"] = Token("stranger")
    hub.tokens["fine"] = Token("x", "fineGrained", scopes={"lab/secret": "read"})
    for path in ("/api/models/lab/secret", "/lab/secret/resolve/main/config.json", "/api/models/lab/secret/tree/main"):
        assert ask(hub.url, path)[0] == 401
        status, headers, _ = ask(hub.url, path, "stranger")
        assert (status, headers["X-Error-Code"]) == (404, "RepoNotFound")
        assert ask(hub.url, path, "no-such-token")[0] == 401
        assert ask(hub.url, path, "fine")[0] == 200
        assert ask(hub.url, path, WRITE_TOKEN)[0] == 200
    assert ask(hub.url, "/api/models/lab/secret/settings", "fine", "PUT", {"visibility": "public"})[0] == 403
    assert hub.repo("lab/secret").private


def test_making_an_existing_repo_private_needs_its_settings(hub: Hub) -> None:
    repo = hub.add_repo("lab/base")
    wanted = {"name": "base", "organization": "lab", "visibility": "private"}
    assert ask(hub.url, "/api/repos/create", WRITE_TOKEN, "POST", wanted)[0] == 409
    assert not repo.private  # as on the real Hub
    assert ask(hub.url, "/api/models/lab/base/settings", WRITE_TOKEN, "PUT", {"visibility": "private"})[0] == 200
    assert repo.private


def test_a_commit_is_whole_or_not_at_all(hub: Hub) -> None:
    repo = hub.add_repo("lab/base", FILES)
    before = repo.head
    added = {"key": "file", "value": {"path": "new.txt", "content": "eA==", "encoding": "base64"}}
    missing = {"key": "deletedFile", "value": {"path": "missing"}}
    no_object = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}}

    def commit(*operations: dict[str, Any], parent: str = before.oid) -> int:
        header = {"key": "header", "value": {"summary": "s", "parentCommit": parent}}
        lines = "\n".join(json.dumps(line) for line in (header, *operations))
        request = urllib.request.Request(hub.url + "/api/models/lab/base/commit/main", data=lines.encode())  # noqa: S310
        request.add_header("Authorization", f"Bearer {WRITE_TOKEN}")
        try:
            with DIRECT.open(request, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert commit(added, missing) == 404
    assert commit(added, no_object) == 400
    assert commit(added, parent="0" * 40) == 412
    assert repo.head == before
    assert commit(added) == 200
    assert repo.head.parent == before.oid
    assert repo.at(before.oid) == before
    assert commit(added) == 412  # the head has moved


def test_parts_of_a_file_are_served(hub: Hub) -> None:
    hub.add_repo("lab/base", FILES)
    request = urllib.request.Request(hub.url + "/lab/base/resolve/main/config.json", headers={"Range": "bytes=2-5"})  # noqa: S310
    with DIRECT.open(request, timeout=10) as response:
        assert response.status == 206
        assert response.read() == FILES["config.json"][2:6]


def test_faults_strike_when_they_are_told_to(hub: Hub) -> None:
    hub.add_repo("lab/base")
    fault = hub.arm(Fault("GET", "lab/base$", nth=2, times=2, status=503, retry_after=7))
    answers = [ask(hub.url, "/api/models/lab/base")[:2] for _ in range(5)]
    assert [status for status, _ in answers] == [200, 503, 503, 200, 200]
    assert answers[1][1]["Retry-After"] == "7"
    assert (fault.seen, fault.struck) == (5, 2)
    hub.arm(Fault(path="base$", drop="before"))
    with pytest.raises(OSError, match=r"closed|reset|without response"):
        ask(hub.url, "/api/models/lab/base")
    hub.arm(Fault("PUT", drop="after"))
    with pytest.raises(OSError, match=r"closed|reset|without response"):
        ask(hub.url, "/api/models/lab/base/settings", WRITE_TOKEN, "PUT", {"visibility": "private"})
    assert hub.repo("lab/base").private
    hub.arm(Fault(path="base$", make_public=True))
    assert json.loads(ask(hub.url, "/api/models/lab/base")[2])["private"] is False


def test_a_stall_ends_with_the_test(tmp_path: Path) -> None:
    started = time.monotonic()
    with Hub(tmp_path) as hub:
        hub.add_repo("lab/base")
        fault = hub.arm(Fault(path="base$", stall=60))
        with subprocess.Popen([sys.executable, "-c", f"import urllib.request as u; u.urlopen('{hub.url}/api/models/lab/base')"], stderr=subprocess.DEVNULL) as process:  # fmt: skip
            while not fault.struck:
                assert time.monotonic() - started < 30
                time.sleep(0.01)
            hub.reset()
            assert process.wait(10) != 0  # dropped, not answered from what the next test has
    assert time.monotonic() - started < 30


def test_it_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "config.json").write_text("{}")
    announce = tmp_path / "hub.json"
    command = [
        sys.executable,
        str(Path(__file__).with_name("hub.py")),
        "--announce",
        str(announce),
        "--folder",
        str(tmp_path / "x"),
    ]
    command += ["--token", "tok:ann:write:lab,org", "--seed", f"lab/base={tmp_path / 'seed'}"]
    with subprocess.Popen(command) as process:
        started = time.monotonic()
        while not announce.exists():
            assert time.monotonic() - started < 30
            time.sleep(0.02)
        url = json.loads(announce.read_text())["url"]
        assert ask(url, "/lab/base/resolve/main/config.json")[2] == b"{}"
        assert [org["name"] for org in json.loads(ask(url, "/api/whoami-v2", "tok")[2])["orgs"]] == ["lab", "org"]
        assert ask(url, "/__faults__", method="POST", body={"path": "whoami", "status": 418})[0] == 200
        assert ask(url, "/api/whoami-v2", "tok")[0] == 418
        assert json.loads(ask(url, "/__repos__")[2])["lab/base"]["private"] is False
        process.terminate()
        assert process.wait(10) == 0


def test_a_shard_of_xet_is_read() -> None:
    name, digest = bytes(range(32)), bytes(range(32, 64))
    segments = [struct.pack("<32sIIII", bytes(32), 0, size, 0, 1) for size in (1000, 24)]
    shard = b"".join(
        (
            bytes(48),
            struct.pack("<32sIIQ", name, 1 << 31 | 1 << 30, 2, 0),
            *segments,
            bytes(48),
            bytes(48),
            digest + bytes(16),
            b"\xff" * 32 + bytes(16),
        )
    )
    [(found, sha256, size)] = xet_files(shard)
    assert size == 1024
    assert found.startswith("0706050403020100")
    assert sha256.endswith("3f3e3d3c3b3a3938")
