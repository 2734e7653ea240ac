"""What can be made to go wrong: the armed faults, which every endpoint and the management API share.

A fault is armed for a number of times and, where it strikes requests, for a route. Some are limited to workers of an
image, so that a bad release can be told from a good one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Refused(Exception):
    """A request that the platform refuses: the HTTP status and the text of its `error` field."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Fault:
    """An armed fault: what happens, on which route, how many more times."""

    kind: str
    route: str = "*"
    times: int = 1
    status: int = 503
    retry_after: float | None = None
    seconds: float = 1.0
    image: str | None = None
    message: str | None = None


# kind: what it does. `route` applies to those of requests; `*` is every route of clients.
FAULT_KINDS = {
    "http": "answer with `status` (and Retry-After: `retry_after`) instead of serving the request",
    "html": "answer 200 with an HTML page, as a proxy in between does",
    "slow": "wait `seconds` before serving the request",
    "lost_answer": "serve the request, then drop the connection without an answer",
    "lost_request": "drop the connection before the request is served",
    "unknown_state": "let /status report the made-up state WARMING_UP",
    "stuck": "leave the next job in the queue: no worker ever gets it",
    "crash": "lose the worker that holds the next job: it is given out once more, then fails",
    "fail": "end the next job FAILED with a worker's error",
    "no_output": "end the next job COMPLETED without output",
    "expire": "forget the next job's result as soon as it is there: /status answers 404",
    "no_capacity": "refuse to create an endpoint or a pod: 400, no instances are available",
    "propagation": "let what is created next be unknown (404, not in lists) for `seconds`",
    "throttled": "let the next worker wait for a machine (THROTTLED) for `seconds`",
    "unhealthy": "let the next worker's container never start (UNHEALTHY); `message` is in its system log",
    "pod_error": "let the next pod end in ERROR while it is being set up; `message` is in its system log",
    "rate_limit": "enforce a quota of `times` management requests a minute, until the faults are cleared",
}
ROUTES = ("run", "runsync", "status", "stream", "cancel", "health", "retry", "purge-queue")
WORKER_ROUTES = ("job-stream", "job-done")
MANAGEMENT_ROUTES = (
    *(f"serverless.{name}" for name in "create get list patch delete workers releases logs".split()),
    *(f"pods.{name}" for name in "create get list patch delete action logs".split()),
    *("templates", "registries", "network-volumes", "catalog", "billing", "account"),
)
EVERYWHERE = (*ROUTES, *MANAGEMENT_ROUTES)
ROUTE_KINDS = ("http", "html", "slow", "lost_answer", "lost_request", "unknown_state")
_LIMITS = (
    ("times", 1, 10_000, (int,)),
    ("status", 400, 599, (int,)),
    ("seconds", 0, 86_400, (int, float)),
    ("retry_after", 0, 600, (int, float)),
)


class Faults(list[Fault]):
    """The armed faults, oldest first."""

    def arm(self, data: Any) -> Fault:
        """Arm a fault from its JSON. Raises Refused(400) that says what is known."""
        if not isinstance(data, dict):
            raise Refused(400, 'a fault is an object, for example {"kind": "http", "route": "run", "status": 429}')
        unknown = sorted(set(data) - set(Fault.__dataclass_fields__))
        if unknown:
            raise Refused(400, f"unknown key {', '.join(unknown)}; known are {', '.join(Fault.__dataclass_fields__)}")
        if data.get("kind") not in tuple(FAULT_KINDS):
            raise Refused(400, f"unknown kind; known are {', '.join(FAULT_KINDS)}")
        if data.get("route", "*") not in (*EVERYWHERE, *WORKER_ROUTES, "*"):
            raise Refused(400, f"unknown route; known are {', '.join((*EVERYWHERE, *WORKER_ROUTES))}, *")
        for key, low, high, kinds in _LIMITS:
            value = data.get(key, low)
            if key == "retry_after" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                whole = "" if float in kinds else "whole "
                raise Refused(400, f"{key} must be a {whole}number between {low} and {high}")
        for key in ("image", "message"):
            if not isinstance(data.get(key), str | None):
                raise Refused(400, f"{key} must be text")
        fault = Fault(**data)
        self.append(fault)
        return fault

    def take(self, kind: str, route: str | None = None, image: str | None = None) -> Fault | None:
        """Use up one armed fault of this kind (and route, and image), if there is one."""
        for fault in self:
            everywhere = fault.route == "*" and route in EVERYWHERE
            if fault.kind != kind or not (route is None or fault.route == route or everywhere):
                continue
            if fault.image is not None and fault.image not in (image or ""):
                continue
            fault.times -= 1
            if fault.times <= 0:
                self.remove(fault)
            return fault
        return None

    def of_route(self, route: str) -> dict[str, Fault]:
        """Use up the armed faults that strike one request of a route, by kind."""
        kinds = [kind for kind in ROUTE_KINDS if kind != "unknown_state" or route == "status"]
        return {kind: fault for kind in kinds if (fault := self.take(kind, route))}

    def armed(self, kind: str) -> Fault | None:
        """An armed fault of this kind, which stays armed."""
        return next((fault for fault in self if fault.kind == kind), None)
