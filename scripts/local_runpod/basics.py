"""What the parts of the account share: refusals, logs, what is used and paid for, names and times. No I/O."""

from __future__ import annotations

import random
import string
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from local_runpod import bodies
from local_runpod.catalog import Gpu
from local_runpod.faults import Faults, Refused

LOG_LINES = 5000
NO_CAPACITY = (
    "There are no longer any instances available with the requested specifications. Please refresh and try again."
)
TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Payload Too Large",
    422: "Unprocessable Entity",
    429: "Too Many Requests",
}
CONTAINER_DEFAULTS: dict[str, Any] = {"args": "", "disk": 10, "env": {}, "ports": [], "registry": None}


class Rejected(Refused):
    """A refusal of the management API: problem+json with the violations, if a body has some."""

    def __init__(self, status: int, detail: str, errors: Iterable[str] = ()) -> None:
        super().__init__(status, detail)
        self.errors = list(errors)

    def problem(self) -> dict[str, Any]:
        """What is sent."""
        told: dict[str, Any] = {
            "title": TITLES.get(self.status, "Error"),
            "status": self.status,
            "detail": str(self),
        }
        return {**told, "errors": self.errors} if self.errors else told


def missing(what: str, name: str) -> Rejected:
    """A 404."""
    return Rejected(404, f"{what} {name!r} not found")


@dataclass(frozen=True)
class Line:
    """A line of a log."""

    ts: str
    source: str
    line: str


class Log:
    """The newest lines of a container and of the machine around it, each with a timestamp of its own."""

    def __init__(self) -> None:
        self.lines: deque[Line] = deque(maxlen=LOG_LINES)
        self._last = datetime.min.replace(tzinfo=UTC)

    def add(self, source: str, line: str, when: datetime) -> None:
        """Append a line."""
        self._last = max(when, self._last + timedelta(microseconds=1))
        self.lines.append(Line(stamp(self._last), source, line))


def stamp(when: datetime) -> str:
    """RFC 3339, in microseconds."""
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ") if when.year > 999 else when.isoformat()


@dataclass
class Usage:
    """What runs and is paid for: dollars an hour for computing and for disk, from `start` to `end`."""

    kind: str  # pod, serverless or volume
    owner: str
    start: float
    compute: float = 0.0
    disk: float = 0.0
    cpu: bool = False
    high_performance: bool = False
    end: float | None = None


@dataclass
class Machine:
    """Where something runs."""

    gpu: Gpu | None
    count: int
    center: str
    compute: float  # dollars an hour


class State:
    """What an account holds that all of its parts look at."""

    def __init__(self, now: float, wall: float, faults: Faults, seed: int | None = None) -> None:
        self.faults = faults
        self.templates: dict[str, dict[str, Any]] = {}
        self.registries: dict[str, dict[str, str]] = {}
        self.volumes: dict[str, dict[str, Any]] = {}
        self.usage: list[Usage] = []
        self.ssh_keys: list[str] = []
        self.secrets: dict[str, str] = {}
        self._rng = random.Random(seed)
        self._epoch = datetime.fromtimestamp(wall, UTC) - timedelta(seconds=now)

    def when(self, now: float) -> datetime:
        """The time of day at a time of the clock."""
        return self._epoch + timedelta(seconds=now)

    def stamp(self, now: float | None) -> str | None:
        """The same as text."""
        return None if now is None else stamp(self.when(now))

    def make_id(self, prefix: str = "", length: int = 14) -> str:
        return prefix + "".join(self._rng.choices(string.ascii_lowercase + string.digits, k=length - len(prefix)))


def conform(shape: bodies.Shape, body: Any) -> None:
    """Refuse a body that does not have this shape."""
    if errors := shape(body, ""):
        raise Rejected(422, "; ".join(errors), errors)


def unfit(error: str) -> Rejected:
    """A 422 with one violation."""
    return Rejected(422, error, [error])


def check_cuda(gpu: dict[str, Any]) -> None:
    """A set of CUDA versions and a floor exclude each other."""
    if gpu.get("allowedCudaVersions") and gpu.get("minCudaVersion"):
        raise Rejected(400, "gpu.allowedCudaVersions and gpu.minCudaVersion exclude each other")
