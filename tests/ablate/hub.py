# SPDX-License-Identifier: AGPL-3.0-or-later
"""A model hub on loopback for tests: the real huggingface_hub client talks to it through HF_ENDPOINT.

It keeps model repositories in memory (commits that never change, tags, visibility, tokens with roles) and takes uploads
the way the client sends them: regular files inside the commit, large ones by LFS or by xet. For xet it hands out a
`local://` folder as storage, so the real hf_xet writes its chunks there; the content is read back from them at the commit.
Faults are armed as `Fault` objects. In a test: `with Hub(tmp_path) as hub`. Alone:
    python hub.py --announce FILE [--folder DIR] [--token TOKEN:USER:ROLE[:NAMESPACE,…]] [--seed REPO=FOLDER]
writes {"url": …} to FILE and serves until it is ended; faults are then armed by POST /__faults__ with a Fault's fields.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITE_TOKEN = "hf_testWRITE0123456789abcdef"  # noqa: S105 of this hub only
READ_TOKEN = "hf_testREAD0123456789abcdef"  # noqa: S105
USER = "tester"
REGULAR_LIMIT = 10_000_000  # bytes; the real Hub takes larger files by LFS only
# What the real Hub takes as a card's `license`; a list of our own making cannot stand in for it.
LICENCES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl",
    "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl",
    "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql",
    "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "gemma", "unknown", "other",
)  # fmt: skip
GIT_ATTRIBUTES = b"".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n".encode()
    for ending in ("bin", "ckpt", "gguf", "h5", "msgpack", "onnx", "pickle", "pkl", "pt", "pth", "safetensors", "zip")
)
# Reads files back out of a local xet store. A process of its own: hf_xet locks the store while a session lives.
_READ_XET = """
import json, sys, hf_xet
store, files = sys.argv[1], json.loads(sys.argv[2])
with hf_xet.XetSession().new_file_download_group(endpoint="local://" + store) as group:
    for name, sha256, size in files:
        group.start_download_file(hf_xet.XetFileInfo(name, size), store + "/" + sha256)
"""


@dataclass(frozen=True)
class Token:
    """Who a token belongs to and what it may do.

    role: "read", "write" or "fineGrained". `namespaces` are organisations the user belongs to. A fine-grained token
    reads and writes only what `scopes` names (namespaces or whole repo ids) with "read" or "write".
    """

    user: str
    role: str = "write"
    namespaces: tuple[str, ...] = ()
    scopes: dict[str, str] = field(default_factory=dict)

    def may(self, what: str, repo_id: str) -> bool:
        """May this token `what` ("read" or "write") the repo?"""
        namespace = repo_id.split("/")[0]
        if self.role == "fineGrained":
            granted = self.scopes.get(repo_id) or self.scopes.get(namespace)
            return granted == "write" or granted == what
        return namespace in (self.user, *self.namespaces) and (what == "read" or self.role == "write")


@dataclass
class Fault:
    """What goes wrong: for matching requests number `nth` … `nth + times - 1` (times 0: from then on, always).

    method, path: what matches; a regular expression for the path (without the query).
    status, body, headers, retry_after: answer this instead of handling the request.
    stall: seconds to wait first. drop: "before" closes the connection unhandled, "after" handles the request and then
    closes it, so that the answer is lost. corrupt: a pattern of file names; their stored bytes are altered after the
    request was handled ("*" on an LFS upload alters what was uploaded). make_public: the repo turns public before the
    request is handled. do: called with the hub and the repo (or None) after the request was handled, in tests only.
    """

    method: str = ""
    path: str = ""
    nth: int = 1
    times: int = 1
    status: int = 0
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    retry_after: float | None = None
    stall: float = 0
    drop: str = ""
    corrupt: str = ""
    make_public: bool = False
    do: Callable[[Hub, Repo | None], None] | None = None
    seen: int = 0  # matching requests so far
    struck: int = 0  # how often it was applied

    def strikes(self, method: str, path: str) -> bool:
        """Count a request; True if the fault applies to it."""
        if (self.method and self.method != method) or not re.search(self.path, path):
            return False
        self.seen += 1
        if self.seen < self.nth or (self.times and self.seen >= self.nth + self.times):
            return False
        self.struck += 1
        return True


@dataclass(frozen=True)
class Stored:
    """A file of a commit. `content` is what the hub really holds."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself keeps of a large file."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def blob_id(self) -> str:
        """The object id that git gives the file, or its pointer."""
        content = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Commit:
    """An immutable state of a repo."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, Stored]


class Repo:
    """A model repository: commits in order, tags, visibility."""

    def __init__(self, repo_id: str, private: bool) -> None:
        self.id = repo_id
        self.private = private
        self.commits: list[Commit] = []
        self.tags: dict[str, str] = {}
        self.card_data: dict[str, Any] | None = None
        self.objects: dict[str, bytes] = {}  # what was uploaded by LFS, by the sha256 that the client gave

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch, tag or commit id."""
        if revision in ("main", "refs/heads/main", "HEAD"):
            return self.head
        oid = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def contents(self, revision: str = "main") -> dict[str, bytes]:
        """Every file at a revision, .gitattributes left out."""
        commit = self.at(revision)
        assert commit is not None, f"{self.id} has no revision {revision}"
        return {path: stored.content for path, stored in commit.files.items() if path != ".gitattributes"}

    def add(self, files: dict[str, Stored], message: str) -> Commit:
        """Append a commit that holds exactly `files`."""
        parent = self.head.oid if self.commits else None
        listing = "".join(f"{path}\0{stored.blob_id}\n" for path, stored in sorted(files.items()))
        text = f"{self.id}\n{len(self.commits)}\n{parent}\n{message}\n{listing}"
        oid = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits.append(Commit(oid, parent, message, dict(files)))
        return self.head

    def alter(self, pattern: str) -> None:
        """Flip a bit in the stored bytes of the head's files that match, as if the storage had lost it."""
        files = {
            path: Stored(_flipped(stored.content), stored.lfs) if fnmatch.fnmatch(path, pattern) else stored
            for path, stored in self.head.files.items()
            if path != ".gitattributes"
        }
        last = self.head
        self.commits[-1] = Commit(last.oid, last.parent, last.message, {**last.files, **files})


@dataclass
class Request:
    """An entry of the log."""

    method: str
    path: str
    query: dict[str, str]
    user: str | None
    bytes_in: int
    status: int | None = None  # None: no answer was sent


class Refused(Exception):
    """An error answer. `code` becomes X-Error-Code, which the client turns into its exceptions."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Answer:
    """A response: `body` bytes go as they are, everything else as JSON."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The server. `faults` may be changed at any time; `log` holds every request; `errors` what the hub itself broke on."""

    def __init__(self, folder: Path | None = None, tokens: dict[str, Token] | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary else Path(folder or "")
        self.tokens = {WRITE_TOKEN: Token(USER), READ_TOKEN: Token(USER, "read")} if tokens is None else tokens
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.errors: list[BaseException] = []
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self.awake = threading.Event()
        self.rounds = 0
        self._xet_stores: list[Path] = []
        self._server: _Server | None = None

    # --- what tests use ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Hub:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> Hub:
        """Serve on a free port of 127.0.0.1, in threads of this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port; what still stalls is dropped."""
        self.reset()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        if self._temporary:
            self._temporary.cleanup()

    def reset(self) -> None:
        """Forget everything but the tokens, for the next test; requests that still stall are dropped."""
        with self.lock:
            self.rounds += 1
            self.repos.clear()
            self.faults.clear()
            self.log.clear()
            self.errors.clear()
            self._xet_stores.clear()
        self.end_stalls()

    def end_stalls(self) -> None:
        """Let the requests that stall now go on."""
        self.awake.set()
        self.awake = threading.Event()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        assert self._server is not None, "the hub is not running"
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add_repo(
        self,
        repo_id: str,
        files: dict[str, bytes] | None = None,
        *,
        private: bool = False,
        card_data: dict[str, Any] | None = None,
    ) -> Repo:
        """A repo that already exists, with these files in one commit (after the first one, which the hub makes)."""
        with self.lock:
            repo = self._new_repo(repo_id, private)
            repo.card_data = card_data
            if files:
                attributes = _lfs_patterns(repo.head.files)
                stored = {
                    path: Stored(data, _is_lfs(path, data, len(data), attributes)) for path, data in files.items()
                }
                repo.add({**repo.head.files, **stored}, "first files")
            return repo

    def repo(self, repo_id: str) -> Repo:
        """The repo, as it is now."""
        return self.repos[repo_id]

    def arm(self, fault: Fault) -> Fault:
        """Add a fault and return it."""
        self.faults.append(fault)
        return fault

    def requests(self, method: str, path: str) -> list[Request]:
        """The log's requests of a method whose path matches a regular expression."""
        return [entry for entry in self.log if entry.method == method and re.search(path, entry.path)]

    # --- routes ------------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, body: bytes, token: Token | None) -> Answer:
        """Handle one request. Raises Refused."""
        path, query = _parsed(target)
        for verb, pattern, handler in _ROUTES:
            if (match := re.fullmatch(pattern, path)) and (verb == method or (method, verb) == ("HEAD", "GET")):
                call = _Call(
                    token, query, body, {key: unquote(value) for key, value in match.groupdict().items() if value}
                )
                with self.lock:
                    return handler(self, call)
        raise Refused(404, f"no such route: {method} {path}")

    def _new_repo(self, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.add({".gitattributes": Stored(GIT_ATTRIBUTES, False)}, "initial commit")
        return repo

    def _readable(self, call: _Call) -> Repo:
        repo = self.repos.get(call.part["repo"])
        if repo is None or (repo.private and not (call.token and call.token.may("read", repo.id))):
            # The real Hub does not tell a private repo from a missing one.
            raise Refused(404 if call.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, call: _Call) -> Repo:
        repo = self._readable(call)
        if call.token is None:
            raise Refused(401, "Invalid username or password.")
        if call.token.role == "read":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        if not call.token.may("write", repo.id):
            raise Refused(403, f"Forbidden: you have no write access to {repo.id}.")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self, call: _Call) -> Answer:
        if call.token is None:
            raise Refused(401, "Invalid username or password.")
        token = call.token
        access: dict[str, Any] = {"displayName": "test", "role": token.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if token.role == "fineGrained":
            kinds = {"read": ["repo.content.read"], "write": ["repo.content.read", "repo.write"]}
            access["fineGrained"] = {
                "canReadGatedRepos": True,
                "global": [],
                "scoped": [
                    {
                        "entity": {
                            "_id": "0",
                            "type": "model" if "/" in name else "user" if name == token.user else "org",
                            "name": name,
                        },
                        "permissions": kinds[granted],
                    }
                    for name, granted in token.scopes.items()
                ],
            }
        role = "write" if token.role == "write" else "read"
        return Answer(
            {
                "type": "user",
                "id": "0",
                "name": token.user,
                "fullname": token.user,
                "orgs": [{"type": "org", "id": "1", "name": name, "roleInOrg": role} for name in token.namespaces],
                "auth": {"type": "access_token", "accessToken": access},
            }
        )

    def create(self, call: _Call) -> Answer:
        wanted = json.loads(call.body)
        if call.token is None:
            raise Refused(401, "Invalid username or password.")
        namespace = wanted.get("organization") or call.token.user
        repo_id = f"{namespace}/{wanted['name']}"
        if not call.token.may("write", repo_id):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        url = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            return Answer({"error": "You already created this model repo", **url}, 409)
        self._new_repo(repo_id, wanted.get("visibility") == "private" or wanted.get("private") is True)
        return Answer({**url, "name": repo_id, "id": "0"})

    def info(self, call: _Call) -> Answer:
        repo = self._readable(call)
        commit = self._commit_of(repo, call.part.get("revision", "main"))
        card = repo.card_data if repo.card_data is not None else _front_matter(commit.files)
        siblings: list[dict[str, Any]] = []
        for path, stored in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if call.query.get("blobs", "").lower() in ("true", "1"):
                sibling |= {"size": len(stored.content), "blobId": stored.blob_id}
                if stored.lfs:
                    size = {"size": len(stored.content), "pointerSize": len(stored.pointer)}
                    sibling["lfs"] = {"sha256": stored.sha256, **size}
            siblings.append(sibling)
        model: dict[str, Any] = {
            "_id": "0",
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
            "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": "2026-01-01T00:00:00.000Z",
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": list((card or {}).get("tags") or []),
            "siblings": siblings,
            "spaces": [],
            "usedStorage": sum(len(stored.content) for stored in commit.files.values()),
        }
        if card:
            model["cardData"] = card
        if configuration := commit.files.get("config.json"):
            values = json.loads(configuration.content)
            model["config"] = {key: values[key] for key in ("architectures", "model_type") if key in values}
        if parameters := _parameters(commit.files):
            model["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
        return Answer(model)

    def tree(self, call: _Call) -> Answer:
        commit = self._commit_of(self._readable(call), call.part["revision"])
        folder = call.part.get("folder", "").strip("/")
        start = f"{folder}/" if folder else ""
        inside = {path: stored for path, stored in commit.files.items() if path.startswith(start)}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist on {call.part['revision']!r}", "EntryNotFound")
        entries: dict[str, dict[str, Any]] = {}
        deep = call.query.get("recursive", "").lower() in ("true", "1")
        for path, stored in sorted(inside.items()):
            parts = path[len(start) :].split("/")
            for depth in range(1, len(parts)):
                name = start + "/".join(parts[:depth])
                if depth == 1 or deep:
                    entries[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            if len(parts) == 1 or deep:
                entries[path] = {"type": "file", "oid": stored.blob_id, "size": len(stored.content), "path": path}
                if stored.lfs:
                    size = {"size": len(stored.content), "pointerSize": len(stored.pointer)}
                    entries[path]["lfs"] = {"oid": stored.sha256, **size}
        return Answer(list(entries.values()))

    def refs(self, call: _Call) -> Answer:
        repo = self._readable(call)
        return Answer(
            {
                "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.oid}],
                "converts": [],
                "tags": [
                    {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repo.tags.items()
                ],
            }
        )

    def make_tag(self, call: _Call) -> Answer:
        repo = self._writable(call)
        tag = json.loads(call.body)["tag"]
        if tag in repo.tags:
            raise Refused(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = self._commit_of(repo, call.part["revision"]).oid
        return Answer({})

    def delete_tag(self, call: _Call) -> Answer:
        repo = self._writable(call)
        if repo.tags.pop(call.part["revision"], None) is None:
            raise Refused(404, "no such tag", "RevisionNotFound")
        return Answer({})

    def settings(self, call: _Call) -> Answer:
        repo = self._writable(call)
        wanted = json.loads(call.body)
        if "visibility" in wanted or "private" in wanted:
            repo.private = wanted.get("visibility") == "private" or wanted.get("private") is True
        return Answer({"private": repo.private})

    def validate_yaml(self, call: _Call) -> Answer:
        content = json.loads(call.body)["content"]
        try:
            card = _front_matter({"README.md": Stored(content.encode(), False)})
        except ValueError as error:
            return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        problems = [
            f'"{key}" must be text' for key in ("license", "license_name") if not isinstance(card.get(key, ""), str)
        ]
        if (licence := card.get("license", "other")) not in LICENCES:
            problems.append(f'"license" must be one of {", ".join(LICENCES[:3])}, …, not {licence!r:.100}')
        if not re.fullmatch(r"[a-z0-9.-]+", str(card.get("license_name", "a"))):
            problems.append('"license_name" must be an id: small letters, digits, dots and hyphens')
        if not re.fullmatch(r"https?://\S+|LICENSE(\.md)?", str(card.get("license_link", "LICENSE"))):
            problems.append('"license_link" must be LICENSE, LICENSE.md or an address')
        if card.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized"):
            problems.append('"base_model_relation" must be adapter, finetune, merge or quantized')
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(card.get("base_model", "a/b"))):
            problems.append('"base_model" must be a model id')
        if not all(isinstance(tag, str) for tag in card.get("tags", [])):
            problems.append('"tags" must be a list of texts')
        errors = [{"message": problem} for problem in problems]
        return Answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, call: _Call) -> Answer:
        repo = self._writable(call)
        head = self._commit_of(repo, call.part["revision"])
        attributes = _lfs_patterns(head.files)
        wanted = json.loads(call.body)
        ignored = wanted.get("gitIgnore")
        if ignored is None:
            ignored = head.files.get(".gitignore", Stored(b"", False)).content.decode()
        files = []
        for file in wanted["files"]:
            path = file["path"]
            mode = "lfs" if _is_lfs(path, base64.b64decode(file["sample"]), file["size"], attributes) else "regular"
            entry: dict[str, Any] = {
                "path": path,
                "uploadMode": mode,
                "shouldIgnore": any(fnmatch.fnmatch(path, line) for line in ignored.split()),
            }
            if stored := head.files.get(path):
                entry["oid"] = stored.sha256 if stored.lfs else stored.blob_id
            files.append(entry)
        return Answer({"files": files})

    def lfs_batch(self, call: _Call) -> Answer:
        repo = self._writable(call)
        objects = []
        for wanted in json.loads(call.body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            held = repo.objects.get(wanted["oid"])
            if held is None or hashlib.sha256(held).hexdigest() != wanted["oid"]:
                at = f"{self.url}/__storage__/{repo.id}"
                entry["actions"] = {
                    "upload": {"href": f"{at}/{wanted['oid']}?signature=secret"},
                    "verify": {"href": f"{at}/{wanted['oid']}/verify"},
                }
            objects.append(entry)
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, call: _Call) -> Answer:
        self.repos[call.part["repo"]].objects[call.part["oid"]] = call.body
        return Answer(b"", headers={"ETag": '"0"'})

    def lfs_verify(self, call: _Call) -> Answer:
        held = self._writable(call).objects.get(call.part["oid"])
        if held is None or len(held) != json.loads(call.body)["size"]:
            raise Refused(422, "the object was not uploaded whole")
        return Answer({})

    def xet_token(self, call: _Call) -> Answer:
        repo = self._writable(call)
        store = Path(tempfile.mkdtemp(prefix="xet-", dir=self.folder)).resolve()  # one each: hf_xet locks it
        self._xet_stores.append(store)
        url, token, end = f"local://{store}", f"xet-{repo.id}", 4_000_000_000
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)}
        return Answer({"casUrl": url, "accessToken": token, "exp": end}, headers=headers)

    def commit(self, call: _Call) -> Answer:
        """All of the operations or none."""
        repo = self._writable(call)
        head = self._commit_of(repo, call.part["revision"])
        files = dict(head.files)
        message = ""
        for operation in map(json.loads, call.body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.head.oid) != repo.head.oid:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"], validate=True), False)
            elif key == "lfsFile":
                content = self._uploaded(repo, value["oid"])
                if content is None:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Stored(content, True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {path: stored for path, stored in files.items() if not path.startswith(value["path"])}
            else:
                raise Refused(400, f"unknown operation {key}")
        commit = repo.add(files, message)
        url = f"{self.url}/{repo.id}/commit/{commit.oid}"
        return Answer({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, call: _Call) -> Answer:
        commit = self._commit_of(self._readable(call), call.part["revision"])
        stored = commit.files.get(call.part["path"])
        if stored is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        etag = stored.sha256 if stored.lfs else stored.blob_id
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if stored.lfs:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(stored.content))}
        return Answer(stored.content, headers=headers)

    def take_faults(self, call: _Call) -> Answer:
        self.faults.append(Fault(**json.loads(call.body)))
        return Answer({})

    def drop_faults(self, call: _Call) -> Answer:
        self.faults.clear()
        return Answer({})

    def show(self, call: _Call) -> Answer:
        """Every repo, for those who run the hub as a process: private, head, tags, files with sha256."""
        return Answer(
            {
                repo.id: {
                    "private": repo.private,
                    "head": repo.head.oid,
                    "commits": [commit.oid for commit in repo.commits],
                    "tags": repo.tags,
                    "files": {path: stored.sha256 for path, stored in repo.head.files.items()},
                }
                for repo in self.repos.values()
            }
        )

    # --- storage -----------------------------------------------------------------------------------------------------

    def _uploaded(self, repo: Repo, sha256: str) -> bytes | None:
        """What was uploaded for this sha256, by LFS or by xet; None if nothing was."""
        if sha256 not in repo.objects:
            for store in self._xet_stores:
                shards = [shard.read_bytes() for shard in store.glob("xet/xorbs/shards/*.mdb")]
                files = [file for shard in shards for file in xet_files(shard)]
                if any(digest == sha256 for _, digest, _ in files):
                    repo.objects |= self._read_xet(store, files)
        return repo.objects.get(sha256)

    def _read_xet(self, store: Path, files: list[tuple[str, str, int]]) -> dict[str, bytes]:
        # From a copy: the process that uploads is still alive and holds the store's lock.
        copy = Path(tempfile.mkdtemp(prefix="copy-", dir=self.folder)).resolve()
        shutil.copytree(store / "xet" / "xorbs", copy / "xet" / "xorbs")
        subprocess.run(
            [sys.executable, "-c", _READ_XET, str(copy), json.dumps(files)],
            check=True,
            env={**os.environ, "HF_HOME": str(copy / "home")},
        )
        found = {digest: (copy / digest).read_bytes() for _, digest, _ in files}
        shutil.rmtree(copy)
        return found


@dataclass(frozen=True)
class _Call:
    token: Token | None
    query: dict[str, str]
    body: bytes
    part: dict[str, str]


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_MODEL = rf"/api/models/{_REPO}"
_ROUTES: list[tuple[str, str, Callable[[Hub, _Call], Answer]]] = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("GET", _MODEL, Hub.info),
    ("GET", rf"{_MODEL}/revision/(?P<revision>[^/]+)", Hub.info),
    ("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)(?P<folder>/.+)?", Hub.tree),
    ("GET", rf"{_MODEL}/refs", Hub.refs),
    ("POST", rf"{_MODEL}/tag/(?P<revision>[^/]+)", Hub.make_tag),
    ("DELETE", rf"{_MODEL}/tag/(?P<revision>[^/]+)", Hub.delete_tag),
    ("PUT", rf"{_MODEL}/settings", Hub.settings),
    ("POST", rf"{_MODEL}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("GET", rf"{_MODEL}/xet-write-token/(?P<revision>[^/]+)", Hub.xet_token),
    ("POST", rf"{_MODEL}/commit/(?P<revision>[^/]+)", Hub.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", rf"/__storage__/{_REPO}/(?P<oid>[0-9a-f]{{64}})", Hub.lfs_put),
    ("POST", rf"/__storage__/{_REPO}/(?P<oid>[0-9a-f]{{64}})/verify", Hub.lfs_verify),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.resolve),
    ("POST", r"/__faults__", Hub.take_faults),
    ("DELETE", r"/__faults__", Hub.drop_faults),
    ("GET", r"/__repos__", Hub.show),
]
_REPO_IN_PATH = re.compile(
    rf"/(?:api/models|__storage__)/{_REPO}|/{_REPO.replace('repo', 'other')}(?:\.git/|/resolve/)"
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer on a kept connection waits 40 ms
    wbufsize = -1
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the hub's own log has it."""

    def _handle(self) -> None:
        hub = self.server.hub
        body = self._body()
        path, query = _parsed(self.path)
        name = self.headers.get("Authorization", "").removeprefix("Bearer ")
        token = hub.tokens.get(name)
        entry = Request(self.command, path, query, token.user if token else None, len(body))
        with hub.lock:
            rounds = hub.rounds
            hub.log.append(entry)
            struck = [] if path.startswith("/__faults__") else [f for f in hub.faults if f.strikes(self.command, path)]
            repo = hub.repos.get(_repo_in(path))
            for fault in struck:
                if fault.make_public and repo:
                    repo.private = False
        for fault in struck:
            if fault.stall:
                hub.awake.wait(fault.stall)
            if fault.drop == "before" or hub.rounds != rounds:
                return self._drop()
            if fault.status:
                headers = dict(fault.headers)
                if fault.retry_after is not None:
                    headers["Retry-After"] = f"{fault.retry_after:g}"
                told = fault.body if fault.body is not None else json.dumps({"error": f"fault {fault.status}"})
                return self._send(entry, Answer(told.encode(), fault.status, headers))
        if name and token is None and not path.startswith("/__"):
            answer = Answer({"error": "Invalid credentials in Authorization header"}, 401)
            answer.headers["X-Error-Message"] = "Invalid credentials in Authorization header"
        else:
            try:
                answer = hub.answer(self.command, self.path, body, token)
            except Refused as refused:
                answer = Answer({"error": refused.message}, refused.status, {"X-Error-Message": refused.message})
                if refused.code:
                    answer.headers["X-Error-Code"] = refused.code
        with hub.lock:
            repo = hub.repos.get(_repo_in(path))
            for fault in struck:
                if fault.corrupt and repo:
                    if path.startswith("/__storage__/"):
                        oid = path.split("/")[4]
                        repo.objects[oid] = _flipped(repo.objects[oid])
                    else:
                        repo.alter(fault.corrupt)
                if fault.do:
                    fault.do(hub, repo)
        if any(fault.drop == "after" for fault in struck):
            return self._drop()
        self._send(entry, answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, entry: Request, answer: Answer) -> None:
        raw = isinstance(answer.body, bytes)
        data: bytes = answer.body if raw else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if raw else "application/json"
        headers: dict[str, str] = {"Content-Type": kind, **answer.headers}
        status = answer.status
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and status == 200 and raw:
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status = 206 if start < len(data) else 416
            data = data[start : end + 1]
        entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, " ".join(value.split()))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _parsed(target: str) -> tuple[str, dict[str, str]]:
    parts = urlsplit(target)
    return parts.path, {key: values[-1] for key, values in parse_qs(parts.query).items()}


def _repo_in(path: str) -> str:
    match = _REPO_IN_PATH.match(path)
    return (match["repo"] or match["other"]) if match else ""


def _flipped(content: bytes) -> bytes:
    """The content with one bit changed; the length stays."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"x"


def _lfs_patterns(files: dict[str, Stored]) -> list[str]:
    attributes = files.get(".gitattributes", Stored(GIT_ATTRIBUTES, False)).content.decode()
    return [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]


def _is_lfs(path: str, sample: bytes, size: int, patterns: list[str]) -> bool:
    name = path.rsplit("/", 1)[-1]
    return size > REGULAR_LIMIT or b"\0" in sample[:512] or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _front_matter(files: dict[str, Stored]) -> dict[str, Any]:
    """The YAML block at the start of README.md. Raises ValueError where it is none."""
    import yaml

    readme = files.get("README.md", Stored(b"", False)).content.decode("utf-8", "replace")
    match = re.match(r"---\r?\n(.*?)\r?\n---(?:\r?\n|$)", readme, re.DOTALL)
    if not match:
        return {}
    try:
        card = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is not YAML: {error}") from error
    if not isinstance(card, dict):
        raise ValueError("the metadata must be keys and values")
    return card


def _parameters(files: dict[str, Stored]) -> dict[str, int]:
    """How many values of each type the safetensors files hold, from their headers."""
    found: dict[str, int] = {}
    for path, stored in files.items():
        if not path.endswith(".safetensors") or len(stored.content) < 8:
            continue
        (length,) = struct.unpack_from("<Q", stored.content)
        try:
            header = json.loads(stored.content[8 : 8 + length])
        except ValueError:
            continue
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for side in tensor["shape"]:
                    count *= side
                found[tensor["dtype"]] = found.get(tensor["dtype"], 0) + count
    return found


def xet_files(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """The files that a xet shard describes: xet hash, sha256, size in bytes.

    After a header of 48 bytes come records of 48: one that names a file and counts its segments, the segments,
    as many checks if bit 31 of the flags is set, and one with the sha256 if bit 30 is. A name of ones ends the list.
    """
    at = 48
    while (name := shard[at : at + 32]) != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += 48
        size = sum(struct.unpack_from("<I", shard, at + 48 * segment + 36)[0] for segment in range(count))
        at += 48 * count * (2 if flags >> 31 & 1 else 1)
        if flags >> 30 & 1:
            yield _xet_hex(name), _xet_hex(shard[at : at + 32]), size
            at += 48


def _xet_hex(raw: bytes) -> str:
    """Xet writes a hash as four little-endian numbers."""
    return b"".join(raw[i : i + 8][::-1] for i in range(0, 32, 8)).hex()


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="A model hub on loopback for tests.")
    parser.add_argument("--announce", type=Path, required=True, help="file that gets the url as JSON")
    parser.add_argument("--folder", type=Path, help="where xet uploads are kept")
    parser.add_argument("--token", action="append", default=[], help="TOKEN:USER:ROLE[:NAMESPACE,…]")
    parser.add_argument("--seed", action="append", default=[], help="REPO=FOLDER: a public repo with these files")
    options = parser.parse_args()
    tokens = {}
    for text in options.token:
        token, user, role, namespaces = (*text.split(":"), "")[:4]
        tokens[token] = Token(user, role, tuple(namespaces.split(",")) if namespaces else ())
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Hub(options.folder, tokens or None) as hub:
        for text in options.seed:
            repo_id, _, folder = text.partition("=")
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            hub.add_repo(repo_id, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
        temporary = options.announce.with_name(f".{options.announce.name}")
        temporary.write_text(json.dumps({"url": hub.url}))
        os.replace(temporary, options.announce)
        ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
