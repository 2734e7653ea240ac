"""What is remembered of deploys: deploy/deploy.lock.json, the intent to create, and the lock of one deploy at a time.

The lock file is a cache, kept in git so that everyone's deploys know the endpoint's id and the releases that were proven;
without it the endpoint is found by its name. It holds what config/endpoint.yaml said, so no secret.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import to_json, write_atomic
from common.problems import TRY_LATER, Problem
from common.secrets import redact
from endpoint.plan import fingerprint, misshapen, normalise

KEPT_RELEASES = 10


class State:
    """The deploy folder of one endpoint at one API."""

    def __init__(self, folder: Path, api_url: str, name: str) -> None:
        """Read what is there. Raises Problem for a file that is no lock of this API and endpoint."""
        self.folder = folder
        self.path = folder / "deploy.lock.json"
        self.api_url = api_url
        self.name = name
        self.endpoint_id: str | None = None
        # Releases that answered a job, the newest last: body (as sent), proven (UTC), smoke (what the job said).
        self.releases: list[dict[str, Any]] = []
        # The last deploy that did not end well: at (UTC), cause. None after one that did.
        self.failed: dict[str, str] | None = None
        # The release that a rollback is on its way to, by hash; so that one that was broken off goes on to the same.
        self.rolling_back: str | None = None
        self._read()

    def _read(self) -> None:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(data["api"], str) or not isinstance(data["name"], str):
                raise TypeError
            if data["api"] != self.api_url:
                raise Problem(
                    f"{self.path} is about {data['api']}, not about {self.api_url}; set DEPLOY_DIR to another folder for that"
                )
            if data["name"] != self.name:
                raise Problem(
                    f"{self.path} is about the endpoint {data['name']} ({data['endpoint']}), and the file is about {self.name}."
                    " For a second endpoint set DEPLOY_DIR to another folder; to rename this one, rename it in the RunPod"
                    f" console and in {self.path}, too"
                )
            endpoint, releases, failed = data["endpoint"], data["releases"], data["failed"]
            wrong = [
                release for release in releases if misshapen({**release["body"], "id": "e"}) or not release["proven"]
            ]
            if wrong or misshapen({"id": endpoint or "e"}) or not isinstance(failed, dict | None):
                raise TypeError
            self.endpoint_id, self.releases, self.failed = endpoint, releases, failed
            self.rolling_back = data.get("rolling_back")
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise Problem(f"{self.path} cannot be read. It is a cache: rm {self.path}, then make plan") from None

    def write(self) -> None:
        """Replace the file, in one step."""
        self._make_folder()
        data = {
            "format": 1,
            "api": self.api_url,
            "name": self.name,
            "endpoint": self.endpoint_id,
            "failed": self.failed,
            "rolling_back": self.rolling_back,
            "releases": self.releases[-KEPT_RELEASES:],
        }
        write_atomic(self.path, to_json(data))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Problem(
                f"{self.folder} cannot be made: {error.strerror}; set DEPLOY_DIR to a folder you own"
            ) from None

    def proven(self, body: dict[str, Any]) -> bool:
        """Has the newest release that answered a job just this body?"""
        return bool(self.releases) and hash_of(self.releases[-1]["body"]) == hash_of(body)

    def prove(self, body: dict[str, Any], smoke: dict[str, Any]) -> None:
        """Keep a release that answered a job; one that was proven before moves to the end."""
        self.releases = [release for release in self.releases if hash_of(release["body"]) != hash_of(body)]
        self.releases.append({"body": body, "proven": utc(), "smoke": smoke})
        self.failed = self.rolling_back = None
        self.write()

    def known(self) -> set[str]:
        """Values that this project itself has sent, and that may therefore be shown."""
        found = set()
        for release in self.releases:
            found |= {*release["body"].get("env", {}).values(), release["body"].get("args", "")}
        return found

    def fail(self, cause: str) -> None:
        """Keep why the last deploy did not end well."""
        self.failed = {"at": utc(), "cause": redact(cause)}
        self.write()

    def last_good(self) -> dict[str, Any] | None:
        """The body of the newest release that was proven."""
        body: dict[str, Any] | None = self.releases[-1]["body"] if self.releases else None
        return body

    # --- the intent to create: written before POST, so that a crash or a lost answer never makes a second endpoint ---

    @property
    def intent(self) -> Path:
        """The file of the note."""
        return self.folder / "intent.json"

    def intend(self) -> None:
        """Note, before it is sent, that an endpoint of this name is about to be made."""
        self._make_folder()
        write_atomic(self.intent, to_json({"api": self.api_url, "name": self.name, "at": utc()}))

    def intended(self) -> bool:
        """Was a create begun whose end is not known? A note that cannot be read counts as one."""
        try:
            data = json.loads(self.intent.read_text(encoding="utf-8"))
            return (data["api"], data["name"]) == (self.api_url, self.name)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def settled(self) -> None:
        """The create's outcome is known: refused, or the endpoint can be seen."""
        self.intent.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of this folder. Raises Problem(75) with its holder where another process has it."""
        from filelock import FileLock, Timeout

        self._make_folder()
        holder = self.folder / "holder"
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            try:
                who = holder.read_text(encoding="utf-8").strip()
            except OSError:
                who = "another process"
            raise Problem(f"a deploy is under way ({who}); try again when it has ended", TRY_LATER) from None
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {utc()}\n", encoding="utf-8")
            self._read()  # what a deploy that has just ended wrote
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def name_in(folder: Path) -> str | None:
    """The endpoint's name in a folder's deploy.lock.json, None if there is none to be read."""
    try:
        name = json.loads((folder / "deploy.lock.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def hash_of(body: dict[str, Any]) -> str:
    """A release's body as a hash; bodies that mean the same have the same one."""
    return fingerprint(normalise(body))


def utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
