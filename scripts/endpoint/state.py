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
from endpoint.plan import fingerprint, normalise

KEPT_RELEASES = 10


class State:
    """The deploy folder of one endpoint at one API."""

    def __init__(self, folder: Path, api_url: str, name: str) -> None:
        """Read what is there. Raises Problem for a file that is no lock of this API."""
        self.folder = folder
        self.path = folder / "deploy.lock.json"
        self.api_url = api_url
        self.name = name
        self.endpoint_id: str | None = None
        # Releases that answered a job, the newest last: body (as sent), proven (UTC), smoke (what the job said).
        self.releases: list[dict[str, Any]] = []
        # The last deploy that did not end well: at (UTC), cause. None after one that did.
        self.failed: dict[str, str] | None = None
        self._read()

    def _read(self) -> None:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(data["api"], str):
                raise TypeError("api")
            if data["api"] != self.api_url:
                raise Problem(
                    f"{self.path} is about {data['api']}, not about {self.api_url}; set DEPLOY_DIR to another folder for that"
                )
            self.endpoint_id = data["endpoint"]
            self.releases = [release for release in data["releases"] if isinstance(release["body"], dict)]
            self.failed = data.get("failed")
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            raise Problem(f"{self.path} cannot be read. It is a cache: rm {self.path}, then make plan") from None

    def write(self) -> None:
        """Replace the file, in one step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {
            "format": 1,
            "api": self.api_url,
            "endpoint": self.endpoint_id,
            "failed": self.failed,
            "releases": self.releases[-KEPT_RELEASES:],
        }
        write_atomic(self.path, to_json(data))

    def proven(self, body: dict[str, Any]) -> bool:
        """Has the newest release that answered a job just this body?"""
        return bool(self.releases) and _hash(self.releases[-1]["body"]) == _hash(body)

    def prove(self, body: dict[str, Any], smoke: dict[str, Any]) -> None:
        """Keep a release that answered a job; one that was proven before moves to the end."""
        self.releases = [release for release in self.releases if _hash(release["body"]) != _hash(body)]
        self.releases.append({"body": body, "proven": utc(), "smoke": smoke})
        self.failed = None
        self.write()

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
    def _intent(self) -> Path:
        return self.folder / "intent.json"

    def intend(self) -> None:
        """Note, before it is sent, that an endpoint of this name is about to be made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._intent, to_json({"api": self.api_url, "name": self.name, "at": utc()}))

    def intended(self) -> bool:
        """Was a create begun whose end is not known? A note that cannot be read counts as one."""
        try:
            data = json.loads(self._intent.read_text(encoding="utf-8"))
            return (data["api"], data["name"]) == (self.api_url, self.name)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def settled(self) -> None:
        """The create's outcome is known: refused, or the endpoint can be seen."""
        self._intent.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of this folder. Raises Problem(75) with its holder where another process has it."""
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        holder = self.folder / "holder"
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text(encoding="utf-8").strip() if holder.exists() else "another process"
            raise Problem(f"a deploy is under way ({who}); try again when it has ended", TRY_LATER) from None
        try:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {utc()}\n", encoding="utf-8")
            self._read()  # what a deploy that has just ended wrote
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def _hash(body: dict[str, Any]) -> str:
    return fingerprint(normalise(body))


def utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
