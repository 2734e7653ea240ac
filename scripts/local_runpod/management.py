"""An account of RunPod's management API v2, as one API key sees it. No I/O.

Field names, refusals and defaults follow the description of the REST API v2 of 2026-08-18 (docs.runpod.io,
api-reference-v2) and, where the platform is known to behave differently, the platform. Times are seconds of one
monotonic clock, as in platform.py; `State.stamp` turns them into the timestamps that are shown.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from local_runpod.basics import conform
from local_runpod.billing import Billing
from local_runpod.bodies import SSH_KEYS
from local_runpod.faults import Faults
from local_runpod.pods import Pods
from local_runpod.serverless import Serverless

CALLS = 10_000  # requests that are remembered


class Account(Serverless, Pods, Billing):
    """Endpoints, pods, templates, registries, volumes, keys, bills.

    `boot`: after how many seconds a worker is ready by itself; None: when it first asks for jobs, as processes do.
    """

    def __init__(
        self,
        now: float,
        wall: float,
        faults: Faults | None = None,
        *,
        boot: float | None = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(now, wall, Faults() if faults is None else faults, seed)
        self._begin_serverless(boot)
        self._begin_pods()
        self.calls: deque[dict[str, Any]] = deque(maxlen=CALLS)
        self._called = 0

    def call(self, now: float, method: str, path: str, status: int | None, *, served: bool) -> None:
        """Note a request to the management API. `status` None: no answer was sent."""
        self._called += 1
        self.calls.append(
            {
                "n": self._called,
                "at": self.stamp(now),
                "method": method,
                "path": path,
                "status": status,
                "mutating": method not in ("GET", "HEAD", "OPTIONS"),
                "served": served,
            }
        )

    def tick(self, now: float) -> None:
        """Move everything on to `now`."""
        self.tick_endpoints(now)
        self.tick_pods(now)

    def set_ssh_keys(self, body: Any) -> dict[str, Any]:
        """PUT /v2/account/ssh-keys: all of them."""
        conform(SSH_KEYS, body)
        self.ssh_keys = list(body["keys"])
        return {"keys": self.ssh_keys}
