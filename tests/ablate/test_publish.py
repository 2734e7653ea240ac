# SPDX-License-Identifier: AGPL-3.0-or-later
"""Publishing, by the real client in a process of its own, against the test hub with every fault it can have."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, Repo, Stored, Token

import manifest

REPO = "tester/tiny-ablated"
TAG = "verified-20261124T013000Z-tiny-ab12cd34"
API = f"/api/models/{REPO}"
# Runs the program again and again, each time in a fork of a process that has imported the client (half of a run's time):
# a line of JSON on stdin is a run; the answers are its process id and then its exit code.
PROGRAMS = """
import json, os, sys
import huggingface_hub._commit_api, huggingface_hub.hf_api, hub_client, publish
for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        for number, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(job["environment"])
        publish.FIRST_PAUSE, publish.LONGEST_PAUSE = 0.02, 0.05
        hub_client.READ_TIMEOUT, publish.ATTEMPTS = job["read_timeout"], job["attempts"]
        publish.STALL = job["stall"]
        sys.argv = ["publish", *job["arguments"]]
        publish.run(publish.main)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2]))
"""
BOTH = pytest.mark.parametrize("way", ["xet", "lfs"])


def safetensors(values: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: lab/base\n---\n# Tiny\n")
    (folder / "model-00001-of-00002.safetensors").write_bytes(safetensors(bytes(range(256)) * 40))
    (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors(b"second shard" * 700))
    (folder / "pareto.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\0\0"
    )  # binary: goes by LFS without an entry in .gitattributes
    (folder / "empty.txt").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(running: Hub) -> Iterator[Hub]:
    running.reset()
    yield running
    assert running.errors == []


def environment(hub: Hub, home: Path, way: str, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PUBLIC"))}
    ours = {
        "NO_PROXY": "127.0.0.1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "0" if way == "xet" else "1",
    }
    # Where certificates are looked for when one is needed, which is never: reading them all takes longer than a run.
    return kept | ours | {"HF_TOKEN": WRITE_TOKEN, "SSL_CERT_DIR": str(home)} | variables


@pytest.fixture(scope="module")
def programs(running: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for way in ("xet", "lfs"):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAMS],
                env=environment(running, tmp_path_factory.mktemp(way), way),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            found[way] = stack.enter_context(process)
            assert process.stdin is not None
            stack.callback(process.stdin.close)
        yield found


class Publisher:
    """Runs the program; its output may never hold the token, a terminal command, a signed address or a traceback."""

    def __init__(self, hub: Hub, folder: Path, programs: dict[str, subprocess.Popen[str]]) -> None:
        self.hub, self.folder, self.programs = hub, folder, programs
        self.way = "lfs"
        self.shown = folder.parent / "out", folder.parent / "err"

    def start(
        self,
        *,
        repo: str = REPO,
        tag: str = TAG,
        read_timeout: float = 20,
        attempts: int = 6,
        stall: float = 600,
        **variables: str,
    ) -> int:
        """Start a run; its process id."""
        process = self.programs[self.way]
        job = {
            "out": str(self.shown[0]),
            "err": str(self.shown[1]),
            "environment": environment(self.hub, self.folder.parent / "home", self.way, **variables),
            "read_timeout": read_timeout,
            "attempts": attempts,
            "stall": stall,
            "arguments": [str(self.folder), repo, tag],
        }
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    def end(self) -> tuple[int, str, str]:
        """Wait for a run's end: (exit code, stdout, stderr)."""
        stdout = self.programs[self.way].stdout
        assert stdout is not None
        code = int(stdout.readline())
        out, err = (path.read_text() for path in self.shown)
        assert WRITE_TOKEN not in out + err
        assert "signature=" not in err
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", err)
        return code, out, err

    def __call__(self, expected: int = 0, **options: Any) -> tuple[str, str]:
        """Run it to its end: (the commit it printed, its stderr). What must hold after every run is checked."""
        self.start(**options)
        code, out, err = self.end()
        assert "Traceback" not in err, err
        assert code == expected, err
        assert re.fullmatch(r"[0-9a-f]{40}\n" if code == 0 else "", out), out
        assert code == 0 or err.splitlines()[-1].startswith("error: "), err
        return out.strip(), err

    def again(self) -> None:
        """What a person does next: the same command, with the fault gone, ends well."""
        self.hub.faults.clear()
        commit, _ = self()
        repo = self.hub.repo(REPO)
        assert repo.private
        assert repo.tags == {TAG: commit}
        assert repo.head.oid == commit
        assert repo.contents() == contents(self.folder)

    def writes(self) -> list[str]:
        """The requests so far that could have changed something, creation left out."""
        return [
            f"{r.method} {r.path}"
            for r in self.hub.log
            if r.method != "GET" and not r.path.endswith(("/create", "-yaml"))
        ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def publish(hub: Hub, folder: Path, programs: dict[str, subprocess.Popen[str]]) -> Publisher:
    return Publisher(hub, folder, programs)


# --- when all goes well ----------------------------------------------------------------------------------------------


@BOTH
def test_what_is_published_comes_back_byte_for_byte(publish: Publisher, hub: Hub, folder: Path, way: str) -> None:
    publish.way = way
    commit, err = publish()
    repo = hub.repo(REPO)
    assert repo.private
    assert repo.tags == {TAG: commit}
    assert len(repo.commits) == 2  # the hub's own first one, and ours
    assert {name for name, stored in repo.head.files.items() if stored.lfs} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "pareto.png",
    }
    assert bool(hub.requests("GET", "xet-write-token")) is (way == "xet")
    assert bool(hub.requests("PUT", "__storage__")) is (way == "lfs")
    assert "sending 7 files" in err

    fresh = environment(hub, folder.parent / "fresh", way)
    down = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, REPO, TAG], env=fresh, capture_output=True, text=True, check=True
    )
    snapshot = Path(down.stdout.strip())
    assert snapshot.name == commit
    found = {path.name: path.read_bytes() for path in snapshot.iterdir() if path.name != ".gitattributes"}
    assert found == contents(folder)
    sums = subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=snapshot, check=False)
    assert sums.returncode == 0


def test_nothing_is_sent_before_the_repo_is_known_to_be_private(publish: Publisher, hub: Hub) -> None:
    publish()
    asked = [f"{request.method} {request.path}" for request in hub.log]
    known = asked.index(f"GET {API}/revision/main")
    assert asked[:known] in (["GET /api/agent-harnesses", "POST /api/repos/create"], ["POST /api/repos/create"])


@BOTH
def test_the_program_as_it_is_run(hub: Hub, folder: Path, way: str) -> None:
    """Not forked: python -m publish, in an environment of its own."""
    command = [sys.executable, "-m", "publish", str(folder), REPO, TAG]
    variables = environment(hub, folder.parent / "home", way)
    offline = subprocess.run(
        command, env=variables | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert offline.returncode == 2, offline.stderr
    assert "HF_HUB_OFFLINE=1 forbids it" in offline.stderr
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.repo(REPO).tags == {TAG: done.stdout.strip()}
    assert subprocess.run(command[:-1], env=variables, capture_output=True, check=False).returncode == 2


@BOTH
def test_a_second_run_sends_nothing(publish: Publisher, hub: Hub, way: str) -> None:
    publish.way = way
    first, _ = publish()
    hub.log.clear()
    second, err = publish()
    assert second == first
    assert publish.writes() == []
    assert not hub.requests("GET", "xet")
    assert "already holds every file" in err


def test_a_new_tag_on_the_same_files_makes_no_commit(publish: Publisher, hub: Hub) -> None:
    first, _ = publish()
    second, _ = publish(tag="verified-2")
    assert second == first
    assert hub.repo(REPO).tags == {TAG: first, "verified-2": first}


def test_only_what_is_missing_is_sent(publish: Publisher, hub: Hub, folder: Path) -> None:
    publish()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Other\n")
    (folder / "SHA256SUMS").unlink()
    hub.log.clear()
    _, err = publish(tag="verified-2")
    assert "sending 2 files" in err  # the card and the manifest
    assert not hub.requests("PUT", "__storage__")
    assert hub.repo(REPO).contents("verified-2") == contents(folder)


def test_files_of_an_older_model_go_in_the_same_commit(publish: Publisher, hub: Hub, folder: Path) -> None:
    old = {
        "model.safetensors": b"old",
        "sub/pytorch_model.bin": b"\0",
        "config.json": b"{}",
        ".gitignore": b"*.safetensors",
    }
    repo = hub.add_repo(REPO, old, private=True)
    publish()
    assert repo.contents() == contents(folder)
    assert ".gitattributes" in repo.head.files
    assert len(repo.commits) == 3


def test_a_public_repo_needs_to_be_asked_for(publish: Publisher, hub: Hub, folder: Path) -> None:
    commit, _ = publish(PUBLIC="1")
    repo = hub.repo(REPO)
    assert not repo.private
    assert repo.tags == {TAG: commit}
    assert repo.contents(TAG) == contents(folder)


def test_zero_does_not_ask_for_a_public_one(publish: Publisher, hub: Hub) -> None:
    publish(PUBLIC="0")
    assert hub.repo(REPO).private


# --- what is refused before a byte is sent ---------------------------------------------------------------------------


def test_a_repo_that_is_public_is_refused(publish: Publisher, hub: Hub) -> None:
    repo = hub.add_repo(REPO, {"README.md": b"mine"})
    _, err = publish(2)
    assert "is public; nothing was sent" in err
    assert publish.writes() == []
    assert not repo.private  # not ours to change
    repo.private = True
    publish.again()


def test_a_private_repo_is_not_made_public(publish: Publisher, hub: Hub) -> None:
    repo = hub.add_repo(REPO, private=True)
    _, err = publish(2, PUBLIC="1")
    assert "is private, but PUBLIC=1" in err
    assert publish.writes() == []
    assert repo.private


def test_a_tag_on_other_files_is_refused_before_the_upload(publish: Publisher, hub: Hub) -> None:
    repo = hub.add_repo(REPO, {"config.json": b"{}"}, private=True)
    repo.tags["other"] = repo.head.oid
    _, err = publish(2, tag="other")
    assert "already has the tag other" in err
    assert publish.writes() == []
    assert repo.tags == {"other": repo.head.oid}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repo": "no-namespace"}, "is not the name of a repository"),
        ({"repo": "../up/there"}, "is not the name of a repository"),
        ({"repo": "a/b\n"}, "is not the name of a repository"),
        ({"tag": "a/../b"}, "is not a tag"),
        ({"tag": ""}, "is not a tag"),
        ({"tag": "0" * 40}, "is not a tag"),
        ({"HF_TOKEN": ""}, "HF_TOKEN is not set"),
        ({"HF_TOKEN": "hf_a b"}, "HF_TOKEN is not set"),
    ],
)
def test_input_that_cannot_work_is_named(publish: Publisher, hub: Hub, options: dict[str, str], said: str) -> None:
    _, err = publish(2, **options)
    assert said in err
    assert hub.log == []


def test_weights_that_can_run_code_are_not_sent(publish: Publisher, hub: Hub, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    _, err = publish(2)
    assert "only safetensors weights are published" in err
    assert hub.log == []


def test_a_folder_that_changed_since_its_manifest_is_refused(publish: Publisher, hub: Hub, folder: Path) -> None:
    manifest.write(folder)
    with (folder / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    _, err = publish(2)
    assert "model-00001-of-00002.safetensors has changed" in err
    assert hub.log == []


@pytest.mark.parametrize(
    ("token", "granted", "said"),
    [
        (READ_TOKEN, Token("tester", "read"), "HTTP 403 (Forbidden: you must use a write token"),
        ("hf_other", Token("stranger"), "write access to tester"),
        ("hf_fine", Token("tester", "fineGrained", scopes={"tester": "read"}), "write access to tester"),
        ("hf_expired", None, "HTTP 401 (Invalid credentials in Authorization header)"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_token_without_the_right_is_named(
    publish: Publisher, hub: Hub, token: str, granted: Token | None, said: str, exists: bool
) -> None:
    if granted:
        hub.tokens[token] = granted
    if exists:
        hub.add_repo(REPO, private=True)
    _, err = publish(5, HF_TOKEN=token)
    assert token not in err
    assert said in err or "You don't have the rights" in err
    assert "HF_TOKEN needs write access to tester" in err
    publish.again()


def test_a_fine_grained_token_for_this_repo_is_enough(publish: Publisher, hub: Hub) -> None:
    hub.tokens["hf_fine"] = Token("tester", "fineGrained", scopes={REPO: "write"})
    hub.add_repo(REPO, private=True)
    publish(HF_TOKEN="hf_fine")  # noqa: S106


# --- faults that pass: tried again, and said -------------------------------------------------------------------------

COMMIT, INFO, TAGS = rf"{API}/commit/main$", rf"{API}/revision/", rf"{API}/tag/"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/api/repos/create", status=503, times=2),
        Fault("POST", "/api/repos/create", status=429, retry_after=0.1),
        Fault(
            "POST",
            "/api/repos/create",
            status=409,
            body='{"error": "Cannot create repo: another conflicting operation is in progress"}',
        ),
        Fault("POST", "/api/repos/create", drop="before"),
        Fault("POST", "/api/repos/create", drop="after"),
        Fault("GET", INFO, status=500),
        Fault("GET", INFO, status=200, body="<html>a captive portal</html>"),
        Fault("GET", INFO, drop="before", times=3),
        Fault("GET", rf"{API}/refs", status=502),
        Fault("POST", "/preupload/", status=429, retry_after=0),
        Fault("POST", "/preupload/", drop="before"),
        Fault("POST", "/api/validate-yaml", status=503),
        Fault("POST", r"\.git/info/lfs/objects/batch", status=504),
        Fault("POST", r"\.git/info/lfs/objects/batch", drop="before"),
        Fault("POST", "/verify", status=500),
        Fault("POST", COMMIT, status=500),
        Fault("POST", COMMIT, drop="before"),
        Fault("POST", TAGS, status=503),
        Fault("POST", TAGS, drop="before"),
        Fault("POST", TAGS, drop="after"),
    ],
    ids=lambda fault: f"{fault.method} {fault.path} {fault.status or fault.drop}",
)
def test_a_fault_that_passes_is_tried_again(publish: Publisher, hub: Hub, fault: Fault) -> None:
    hub.arm(fault)
    commit, err = publish()
    assert fault.struck == fault.times
    assert err.count("trying again") == fault.times
    assert hub.repo(REPO).tags == {TAG: commit}
    assert len(hub.repo(REPO).commits) == 2


@pytest.mark.parametrize(
    "fault", [Fault("PUT", "__storage__", status=500), Fault("PUT", "__storage__", drop="before")], ids=["500", "drop"]
)
def test_one_objects_upload_is_tried_again_by_the_client(publish: Publisher, hub: Hub, fault: Fault) -> None:
    hub.arm(fault)
    _, err = publish()
    assert "__storage__" in err
    assert fault.struck == 1
    assert len(hub.requests("POST", "batch")) == 1


def test_the_xet_token_is_asked_for_again(publish: Publisher, hub: Hub) -> None:
    publish.way = "xet"
    fault = hub.arm(Fault("GET", "xet-write-token", status=503))
    publish()
    assert fault.struck == 1


def test_an_upload_by_xet_that_stalls_is_given_up(publish: Publisher, hub: Hub) -> None:
    """xet has no time limit of its own: here its storage's token never comes."""
    publish.way = "xet"
    fault = hub.arm(Fault("GET", "xet-write-token", stall=60, times=0))
    started = time.monotonic()
    _, err = publish(75, stall=0.5)
    assert fault.struck >= 1
    assert "nothing was sent for" in err
    assert time.monotonic() - started < 20
    hub.end_stalls()
    publish.again()


def test_what_xet_sends_is_noticed(tmp_path: Path) -> None:
    """By xet itself, in a process of its own (it holds its store as long as that lives)."""
    code = (
        "import sys, hf_xet, publish\n"
        "seen, told = [None, 0.0], []\n"
        "session = publish._Watched(hf_xet.XetSession(), seen)\n"
        "options = {'endpoint': 'local://' + sys.argv[1], 'progress_callback': lambda *each: told.append(each)}\n"
        "with session.new_upload_commit(**options) as commit:\n"
        "    commit.start_upload_bytes(bytes(range(256)) * 4000, sha256=hf_xet.COMPUTE_SHA256)\n"
        "assert seen[0][0] == 1_024_000 and seen[0][1] > 0 and seen[1] > 0, seen\n"
        "assert told\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "HF_HOME": str(tmp_path / "home")}, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_upload_by_xet_that_goes_on_is_not_given_up(publish: Publisher, hub: Hub) -> None:
    publish.way = "xet"
    hub.arm(Fault("GET", "xet-write-token", stall=1))
    publish(stall=20)


def test_a_card_that_the_hub_refuses_stops_before_the_weights_are_sent(
    publish: Publisher, hub: Hub, folder: Path
) -> None:
    (folder / "README.md").write_text("---\nlicense: qwen\n---\n")
    _, err = publish(5)
    assert '"license" must be one of' in err
    assert "nothing was sent" in err
    assert publish.writes() == []
    assert len(hub.repo(REPO).commits) == 1
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: qwen\n---\n")
    (folder / "SHA256SUMS").unlink()
    publish.again()


@BOTH
def test_a_lost_answer_to_the_commit_makes_no_second_one(publish: Publisher, hub: Hub, way: str) -> None:
    publish.way = way
    hub.arm(Fault("POST", COMMIT, drop="after"))
    commit, err = publish()
    assert "trying again" in err
    assert len(hub.repo(REPO).commits) == 2
    assert len(hub.requests("POST", COMMIT)) == 1
    assert hub.repo(REPO).tags == {TAG: commit}


@pytest.mark.parametrize("path", [INFO, "/repos/create", "/preupload/", COMMIT, TAGS, "/refs"])
def test_a_stall_ends_in_a_timeout_and_another_try(publish: Publisher, hub: Hub, path: str) -> None:
    hub.arm(Fault(path=path, stall=30))
    started = time.monotonic()
    _, err = publish(read_timeout=0.5)
    assert "no answer (ReadTimeout)" in err
    assert time.monotonic() - started < 10
    assert len(hub.repo(REPO).commits) == 2


def test_a_request_that_the_client_sends_without_a_limit_gets_one(publish: Publisher, hub: Hub) -> None:
    hub.add_repo(REPO, private=True)
    hub.arm(Fault("POST", "/repos/create", status=403))  # then the client looks whether the repo is there
    fault = hub.arm(Fault("GET", rf"{API}$", stall=30))
    started = time.monotonic()
    _, err = publish(read_timeout=0.5)
    assert fault.struck == 1
    assert "no answer (ReadTimeout)" in err
    assert time.monotonic() - started < 10


def test_retry_after_is_waited_for(publish: Publisher, hub: Hub) -> None:
    hub.arm(Fault("GET", INFO, status=429, retry_after=1))
    started = time.monotonic()
    _, err = publish()
    assert "HTTP 429; trying again in 1.0 s" in err
    assert time.monotonic() - started > 1


def test_someone_elses_commit_meanwhile_is_seen(publish: Publisher, hub: Hub, folder: Path) -> None:
    def meddle(hub: Hub, repo: Repo | None) -> None:
        assert repo is not None
        repo.add({**repo.head.files, "theirs.txt": Stored(b"x", False)}, "theirs")

    hub.arm(Fault("GET", INFO, nth=3, do=meddle))  # between what the commit is made for and the commit
    commit, err = publish()
    assert "the repository has changed meanwhile" in err
    assert hub.repo(REPO).contents(commit) == contents(folder)


# --- faults that stay: a named end, nothing public, nothing tagged, and a second run that heals -----------------------


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (Fault("POST", "/api/repos/create", status=503, times=0), 75, "does not serve right now"),
        (Fault("GET", INFO, status=503, times=0), 75, "does not serve right now"),
        (Fault("GET", INFO, drop="before", times=0), 75, "no answer (RemoteProtocolError)"),
        (Fault("GET", INFO, stall=30, times=0), 75, "no answer (ReadTimeout)"),
        (Fault("GET", INFO, status=200, body="<html>", times=0), 75, "the answer is not JSON"),
        (Fault("GET", INFO, status=200, body="[]", times=0), 5, "not what a model hub sends"),
        (Fault("GET", INFO, status=200, body="{}", times=0), 5, "not what a model hub sends"),
        (
            Fault("GET", INFO, status=200, body='{"id": "x", "sha": "' + "0" * 40 + '"}', times=0),
            5,
            "does not say whether",
        ),
        (Fault("GET", INFO, status=200, body='{"id": "x", "private": "true"}', times=0), 5, "does not say whether"),
        (Fault("POST", "/preupload/", status=401, times=0), 5, "the token was not accepted"),
        (Fault("POST", "/preupload/", status=200, body='{"files": 1}', times=0), 5, "improperly formatted"),
        (Fault("POST", "/batch", status=413, times=0), 5, "storage is full"),
        (Fault("POST", "/batch", status=403, times=0), 5, "the token may not write there"),
        (Fault("POST", "/verify", status=422, times=0), 5, "the Hub refused it"),
        (Fault("POST", COMMIT, status=413, times=0), 5, "storage is full"),
        (Fault("POST", COMMIT, status=401, times=0), 5, "the token was not accepted"),
        (Fault("POST", COMMIT, status=500, times=0), 75, "does not serve right now"),
        (Fault("POST", COMMIT, status=404, times=0), 5, "is not there"),
        (Fault("POST", TAGS, status=403, times=0), 5, "the token may not write there"),
        (Fault("POST", TAGS, status=200, body="{}", times=0), 5, "not at"),
        (
            Fault("POST", "/validate-yaml", status=400, body='{"errors": [{"message": "bad licence"}]}', times=0),
            5,
            "bad licence",
        ),
    ],
    ids=lambda value: f"{value.method} {value.path} {value.status or value.drop}" if isinstance(value, Fault) else None,
)
def test_a_fault_that_stays_has_a_named_end(publish: Publisher, hub: Hub, fault: Fault, code: int, said: str) -> None:
    hub.arm(fault)
    _, err = publish(code, read_timeout=0.5 if fault.stall else 20, attempts=3)
    assert said in err
    repo = hub.repos.get(REPO)
    assert repo is None or (repo.private and not repo.tags)
    publish.again()


@BOTH
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "*"])
def test_wrong_bytes_at_the_commit_get_no_tag(publish: Publisher, hub: Hub, way: str, name: str) -> None:
    publish.way = way
    hub.arm(Fault("POST", COMMIT, corrupt=name))
    _, err = publish(5)
    assert "does not hold what was sent" in err
    assert hub.repo(REPO).tags == {}
    publish.again()


def test_wrong_bytes_in_the_storage_get_no_tag(publish: Publisher, hub: Hub) -> None:
    hub.arm(Fault("PUT", "__storage__", corrupt="*"))
    _, err = publish(5)
    assert "has other content" in err
    assert hub.repo(REPO).tags == {}
    publish.again()


@pytest.mark.parametrize("change", ["more", "less", "longer"])
def test_files_that_are_more_or_less_or_longer_get_no_tag(publish: Publisher, hub: Hub, change: str) -> None:
    def meddle(hub: Hub, repo: Repo | None) -> None:
        assert repo is not None
        files = repo.head.files
        if change == "more":
            files["extra.safetensors"] = Stored(b"x", True)
        elif change == "less":
            del files["config.json"]
        else:
            name = "model-00001-of-00002.safetensors"
            files[name] = Stored(files[name].content + b"x", True)

    hub.arm(Fault("POST", COMMIT, do=meddle))
    _, err = publish(5)
    assert {
        "more": "extra.safetensors does not belong",
        "less": "config.json is missing",
        "longer": "has another size",
    }[change] in err
    assert hub.repo(REPO).tags == {}
    publish.again()


@BOTH
def test_a_repo_that_turns_public_before_the_commit_gets_none(publish: Publisher, hub: Hub, way: str) -> None:
    publish.way = way
    hub.arm(Fault("POST", "/preupload/", make_public=True))
    _, err = publish(5)
    repo = hub.repo(REPO)
    assert "turned public" in err
    assert "made private again" in err
    assert repo.private
    assert len(repo.commits) == 1
    publish.again()


@BOTH
def test_a_repo_that_turns_public_with_the_commit_gets_no_tag(publish: Publisher, hub: Hub, way: str) -> None:
    publish.way = way
    hub.arm(Fault("POST", COMMIT, make_public=True))
    _, err = publish(5)
    assert "turned public during the upload" in err
    assert hub.repo(REPO).private
    assert hub.repo(REPO).tags == {}
    publish.again()


def test_a_repo_that_cannot_be_closed_is_said_loudly(publish: Publisher, hub: Hub) -> None:
    hub.arm(Fault("POST", COMMIT, make_public=True))
    hub.arm(Fault("PUT", "/settings", status=403, times=0))
    _, err = publish(5)
    assert "IT IS STILL PUBLIC" in err
    assert f"{REPO}/settings" in err
    assert hub.repo(REPO).tags == {}
    hub.repo(REPO).private = True
    publish.again()


def test_a_hub_that_only_says_it_closed_the_repo_is_not_believed(publish: Publisher, hub: Hub) -> None:
    hub.arm(Fault("POST", COMMIT, make_public=True))
    hub.arm(Fault("PUT", "/settings", status=200, body="{}", times=0))
    _, err = publish(5)
    assert "IT IS STILL PUBLIC" in err


def test_a_published_repo_that_turned_public_later_is_not_called_done(publish: Publisher, hub: Hub) -> None:
    publish()
    hub.repo(REPO).private = False
    _, err = publish(2)
    assert "is public; nothing was sent" in err


def test_a_published_repo_that_turns_public_while_it_is_checked_is_closed(publish: Publisher, hub: Hub) -> None:
    publish()
    hub.arm(Fault("GET", rf"{API}/refs", make_public=True))
    _, err = publish(5)
    assert "turned public while it was checked" in err
    assert hub.repo(REPO).private


def test_the_tag_is_at_what_was_checked(publish: Publisher, hub: Hub, folder: Path) -> None:
    def meddle(hub: Hub, repo: Repo | None) -> None:
        assert repo is not None
        repo.add({**repo.head.files, "theirs.txt": Stored(b"x", False)}, "theirs")

    hub.arm(Fault("GET", rf"{API}/revision/[0-9a-f]{{40}}$", do=meddle))
    commit, _ = publish()
    repo = hub.repo(REPO)
    assert repo.tags == {TAG: commit}
    assert repo.head.oid != commit
    assert repo.contents(TAG) == contents(folder)


def test_a_tag_that_appears_elsewhere_meanwhile_is_not_moved(publish: Publisher, hub: Hub) -> None:
    def meddle(hub: Hub, repo: Repo | None) -> None:
        assert repo is not None
        repo.tags["mine"] = repo.commits[0].oid

    hub.arm(Fault("POST", COMMIT, do=meddle))
    _, err = publish(5, tag="mine")
    assert "someone else publishes there" in err
    assert hub.repo(REPO).tags == {"mine": hub.repo(REPO).commits[0].oid}


def test_a_server_that_sends_back_the_token_does_not_get_it_shown(publish: Publisher, hub: Hub) -> None:
    told = json.dumps({"error": f"no \x1b[2J\u202e access for Bearer {WRITE_TOKEN}"})
    hub.arm(Fault("POST", COMMIT, status=403, body=told))
    _, err = publish(5)
    assert "no  access for Bearer ***" in err or "no access for Bearer ***" in err
    publish.again()


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "path"),
    [
        *((way, path) for way in ("xet", "lfs") for path in ("/preupload/", COMMIT, TAGS)),
        ("xet", "xet-write-token"),
        ("lfs", "__storage__"),
    ],
)
def test_killed_in_the_middle_it_goes_on(publish: Publisher, hub: Hub, way: str, path: str) -> None:
    publish.way = way
    fault = hub.arm(Fault(path=path, nth=2 if path == "__storage__" else 1, stall=3))
    process = publish.start()
    deadline = time.monotonic() + 30
    while not fault.struck:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert publish.end()[0] == -signal.SIGKILL
    assert hub.repo(REPO).tags == {}
    hub.end_stalls()  # what the dead process asked for last is done after all
    time.sleep(0.2)
    publish.again()
    assert len(hub.repo(REPO).commits) == 2
