"""Our pods at RunPod, and the end of those whose deadline has passed.

    python -m pods list   status, price, age and deadline of each
    python -m pods reap   delete those whose deadline passed more than five minutes ago, and prove that they are gone

A pod of ours is called os-ablate-<8 hex digits of its run>-exp<deadline in unix seconds>. RunPod has no working time limit
of its own, so the name carries it, and RunPod's list is all that is needed here: no file, no memory of earlier starts.
Nothing but that exact form of name is ever deleted. AS=json prints JSON. Exit codes: 0; 3 pods are overdue (list); 5 it
could not be proven that they are gone (reap).
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Protocol

import runpod_api
from common.files import to_json
from common.problems import FLAGGED, OK, REMOTE_FAILED, Problem, run
from common.text import clean
from costs.show import cents, duration, table, wants_json

PREFIX = "os-"
NAME = re.compile(r"os-ablate-[0-9a-f]{8}-exp([1-9][0-9]{9})")
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
GRACE = 300.0  # seconds after its deadline in which a pod may still end itself
# A deleted pod can be missing and then be there again: all this long none may be seen before they count as gone.
WINDOW = 60.0
PAUSE = 10.0  # between two looks; RunPod answers about 60 calls a minute
PATIENCE = 600.0  # after this, what is not proven is said to be so


class Account(Protocol):
    """What is asked of RunPod; runpod_api.Api is one."""

    def get(self, path: str, /) -> dict[str, Any]: ...

    def list(self, path: str, key: str, /) -> list[dict[str, Any]]: ...

    def delete(self, path: str, /) -> bool: ...


@dataclass(frozen=True)
class Pod:
    """A pod whose name begins with our prefix. `deadline` in unix seconds; None: its name has another form."""

    id: str
    name: str
    status: str
    usd_per_hour: float
    created: float | None
    deadline: int | None

    def overdue(self, now: float) -> bool:
        """Has its deadline passed for so long that it will not end itself any more?"""
        return self.deadline is not None and self.status != "TERMINATED" and now - self.deadline > GRACE


def ours(pods: Sequence[dict[str, Any]]) -> list[Pod]:
    """Those of a RunPod list that carry our prefix."""
    found = []
    for item in pods:
        name, pod_id, cost = item.get("name"), item.get("id"), item.get("cost")
        if not isinstance(name, str) or not name.startswith(PREFIX):
            continue
        if not isinstance(pod_id, str) or not ID.fullmatch(pod_id):
            continue  # it becomes a part of a URL that is asked to delete
        match = NAME.fullmatch(name)
        money = isinstance(cost, (int, float)) and not isinstance(cost, bool)
        found.append(
            Pod(
                id=pod_id,
                name=name,
                status=str(item.get("status")),
                usd_per_hour=round(float(cost), 4) if money and cost is not None else 0.0,
                created=_seconds(item.get("createdAt")),
                deadline=int(match[1]) if match else None,
            )
        )
    return found


def _seconds(value: Any) -> float | None:
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Reaped:
    """What `reap` did: the pods that it deleted and saw gone, and those of which it cannot say so, with the reason."""

    gone: dict[str, str]
    unproven: dict[str, str]


def reap(
    account: Account,
    *,
    now: Callable[[], float] = time.time,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = lambda message: None,
) -> Reaped:
    """Delete overdue pods until RunPod has shown none of them for WINDOW seconds, neither in its list nor by their ids.

    One that comes back is deleted again.

    Raises ApiError where RunPod cannot even be asked which there are.
    """
    deadline = clock() + PATIENCE
    names: dict[str, str] = {}
    reasons: dict[str, str] = {}  # of the last look: why a pod is not gone, by its id
    last_seen: dict[str, float] = {}  # when a pod was there, or could not be looked for
    while True:
        try:
            due = [pod for pod in ours(account.list("pods", "pods")) if pod.overdue(now())]
        except runpod_api.ApiError as error:
            if not names:
                raise
            reasons = dict.fromkeys(names, str(error))
        else:
            for pod in due:
                if pod.id not in names:
                    say(
                        f"deleting {pod.name} ({pod.id}): its deadline passed {duration(now() - (pod.deadline or 0))} ago"
                    )
                names[pod.id] = pod.name
            reasons = _delete(account, due)
            for pod_id in names:
                if pod_id not in reasons and (reason := _still(account, pod_id)):
                    reasons[pod_id] = reason
        last_seen |= dict.fromkeys(reasons, clock())
        gone = {pod_id: name for pod_id, name in names.items() if clock() - last_seen[pod_id] >= WINDOW}
        if len(gone) == len(names):
            return Reaped(gone, {})
        if clock() >= deadline:
            not_long = f"it was there less than {WINDOW:.0f} s ago"
            return Reaped(gone, {pod_id: reasons.get(pod_id, not_long) for pod_id in names if pod_id not in gone})
        sleep(PAUSE)


def _delete(account: Account, due: Sequence[Pod]) -> dict[str, str]:
    """Delete these, and say why none of them is gone by that: they were listed just now."""
    reasons = {}
    for pod in due:
        reasons[pod.id] = "RunPod still listed it"
        try:
            account.delete(f"pods/{pod.id}")
        except runpod_api.ApiError as error:
            reasons[pod.id] = str(error)
    return reasons


def _still(account: Account, pod_id: str) -> str:
    """Why a pod cannot be said to be gone, or nothing if it is: 404, or what RunPod calls permanently deleted."""
    try:
        status = account.get(f"pods/{pod_id}").get("status")
    except runpod_api.NotFound:
        return ""
    except runpod_api.ApiError as error:
        return str(error)
    return "" if status == "TERMINATED" else f"RunPod still has it ({status})"


# --- what a person sees ------------------------------------------------------------------------------------------------


def main() -> int:
    """The command line: see the module. Raises Problem."""
    if sys.argv[1:] not in (["list"], ["reap"]):
        raise Problem("usage: python -m pods list | reap")
    as_json = wants_json()
    account = runpod_api.from_environment(warn=_say)
    return _reap(account, as_json) if sys.argv[1] == "reap" else _list(account, as_json)


def _say(message: str) -> None:
    print(clean(message), file=sys.stderr, flush=True)


def _list(account: Account, as_json: bool) -> int:
    listed = account.list("pods", "pods")
    pods, now = ours(listed), time.time()
    others = len(listed) - len(pods)
    overdue = [pod for pod in pods if pod.overdue(now)]
    if as_json:
        rows = [{**asdict(pod), "overdue": pod.overdue(now)} for pod in pods]
        print(to_json({"format": 1, "pods": rows, "others": others}), end="")
        return FLAGGED if overdue else OK
    if pods:
        rows_shown = [_row(pod, now) for pod in pods]
        print("\n".join(table(("name", "id", "status", "$/h", "age", "deadline"), rows_shown, indent="")))
    else:
        print("No pods of ours.")
    if others:
        print(f"{others} pod{'s' * (others != 1)} whose name does not begin with {PREFIX}: never touched from here")
    if overdue:
        print(f"{len(overdue)} overdue, still billed: make reap")
    return FLAGGED if overdue else OK


def _row(pod: Pod, now: float) -> list[str]:
    if pod.deadline is None:
        deadline = "none in its name: never deleted from here"
    else:
        left = pod.deadline - now
        deadline = f"in {duration(left)}" if left > 0 else f"{duration(left)} ago"
    age = "not known" if pod.created is None else duration(now - pod.created)
    return [pod.name, pod.id, pod.status, cents(pod.usd_per_hour), age, deadline]


def _reap(account: Account, as_json: bool) -> int:
    reaped = reap(account, say=_say)
    if as_json:
        print(to_json({"format": 1, **asdict(reaped)}), end="")
    elif not reaped.gone and not reaped.unproven:
        print("Nothing to do: no pod of ours is overdue.")
    for pod_id, name in reaped.gone.items():
        if not as_json:
            print(f"gone: {name} ({pod_id})")
    for pod_id, reason in reaped.unproven.items():
        _say(f"not proven to be gone: {pod_id}: {reason}. Look in the RunPod console, or repeat: make reap")
    return REMOTE_FAILED if reaped.unproven else OK


if __name__ == "__main__":
    run(main)
