"""`make status`: what the endpoint is and does, gathered and written as one screen."""

from __future__ import annotations

from typing import Any

from common.text import clean
from endpoint import plan as plans
from endpoint.checks import pool_price, serverless_gpus
from endpoint.rollout import Platform
from endpoint.state import State
from runpod_api import ApiError

SHOWN_RELEASES = 3


def gather(
    platform: Platform, state: State, drift: plans.Plan | None, actual: dict[str, Any], broken: str
) -> dict[str, Any]:
    """Everything that `make status` shows, as plain values. A part that cannot be asked is None, with a problem.

    `drift` is the plan to the file; None where the file is `broken`, which says why.
    """
    endpoint_id = str(actual["id"])
    problems: list[str] = []

    def ask(what: str, path: str, jobs: bool = False) -> dict[str, Any] | None:
        try:
            return (platform.jobs if jobs else platform.api).get(path)
        except ApiError as error:
            problems.append(f"{what} could not be read: {error}")
            return None

    workers = ask("workers", f"serverless/{endpoint_id}/workers")
    releases = ask("releases", f"serverless/{endpoint_id}/releases")
    health = ask("the queue", f"{endpoint_id}/health", jobs=True)
    if drift is None:
        problems.append(f"not compared with the file: {broken}")
    elif drift.action != "none":
        problems.append(f"{plans.summary(drift)}: make plan")
    limits = actual.get("workers") or {}
    if limits.get("max") == 0:
        problems.append(f"max workers is 0, so no job is ever run. {plans.IDLE_NOTE}. Mend: make deploy")
    listed = _dicts(workers, "workers")
    unhealthy = [str(worker.get("id")) for worker in listed if worker.get("status") == "UNHEALTHY"]
    if unhealthy:
        problems.append(f"unhealthy workers: {', '.join(unhealthy)}; their logs are in the RunPod console")
    queue = (health or {}).get("jobs")
    if isinstance(queue, dict) and queue.get("inQueue") and not listed and limits.get("max"):
        problems.append(
            "jobs are waiting and there is no worker: no GPU of the pools is free, or the account's limit is reached"
        )
    if state.failed:
        problems.append(f"the last deploy ({state.failed.get('at')}) did not end well: {state.failed.get('cause')}")
    newest = state.releases[-1] if state.releases else None
    return {
        "endpoint": {
            "id": endpoint_id,
            "name": actual.get("name"),
            "image": actual.get("image"),
            "created": actual.get("createdAt"),
        },
        "workers": {"min": limits.get("min"), "max": limits.get("max"), "now": listed},
        "queue": queue,
        "releases": {
            "rollout": (releases or {}).get("rollout"),
            "newest": [_release(release) for release in _dicts(releases, "releases")[:SHOWN_RELEASES]],
        },
        "drift": plans.as_dict(drift) if drift else None,
        "usd_per_hour": _cost(platform, actual, listed, problems),
        "proof": {"at": newest["proven"], **newest["smoke"]} if newest else None,
        "problems": problems,
    }


def _dicts(answer: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    found = (answer or {}).get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _release(release: dict[str, Any]) -> dict[str, Any]:
    """A release by what changed in it. The values are not shown: among them may be a secret that was typed into the console."""
    entries = release.get("diff")
    diff = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    kept = {key: release.get(key) for key in ("version", "createdAt", "source", "workerCount")}
    return {**kept, "fields": [str(entry.get("field")) for entry in diff]}


def _cost(
    platform: Platform, actual: dict[str, Any], workers: list[dict[str, Any]], problems: list[str]
) -> float | None:
    """US dollars per hour of the workers that are billed now, by the catalog's prices."""
    billed = [worker for worker in workers if worker.get("status") in ("RUNNING", "IDLE", "INITIALIZING")]
    if not billed:
        return 0.0
    try:
        types = serverless_gpus(platform.api)
    except ApiError as error:
        problems.append(f"prices could not be read: {error}")
        return None
    pools = (actual.get("gpu") or {}).get("pools") or []
    total = 0.0
    for worker in billed:
        kinds = [kind for kind in types if kind["id"] == worker.get("gpuTypeId")] or [
            kind for kind in types if kind["pool"] in pools
        ]
        price = pool_price(kinds)
        if price is None:
            problems.append(f"the catalog has no price for {clean(str(worker.get('gpuTypeId')))[:60]}")
            return None
        count = worker.get("gpuCount")
        total += price * (count if isinstance(count, int) and count > 0 else 1)
    return round(total, 4)


def text(seen: dict[str, Any]) -> str:
    """The screen."""
    endpoint, workers, queue, releases = seen["endpoint"], seen["workers"], seen["queue"], seen["releases"]
    lines = [f"endpoint  {endpoint['name']} ({endpoint['id']})", f"image     {endpoint['image']}"]
    lines.append(f"workers   {len(workers['now'])} now, {workers['min']} to {workers['max']} allowed")
    for worker in workers["now"]:
        age = "an older release" if worker.get("isStale") else "the newest release"
        lines.append(
            f"            {worker.get('id')}  {str(worker.get('status')).lower()}, {age}, {worker.get('gpuTypeId') or 'not placed yet'}"
        )
    if isinstance(queue, dict):
        lines.append(
            f"jobs      {queue.get('inQueue', 0)} in queue, {queue.get('inProgress', 0)} in progress, {queue.get('completed', 0)} completed, {queue.get('failed', 0)} failed"
        )
    cost = seen["usd_per_hour"]
    lines.append(f"cost      {'not known' if cost is None else f'{cost:.2f} US dollars per hour now (list prices)'}")
    rollout = releases["rollout"]
    if isinstance(rollout, dict):
        lines.append(
            f"rollout   {rollout.get('workersOnLatest')} of {rollout.get('workersTotal')} workers on the newest release"
        )
    for release in releases["newest"]:
        fields = ", ".join(release["fields"]) or "the first"
        lines.append(f"            {release.get('version')}  {release.get('createdAt')}  {fields}")
    drift = seen["drift"]
    fields = ", ".join(change["field"] for change in drift["changes"]) if drift else "not known: the file is broken"
    lines.append(f"drift     {fields or 'none'}")
    proof = seen["proof"]
    lines.append(
        f"proof     {'none: this release has not answered a job that this machine knows of' if not proof else proof['at'] + ', answered by ' + str((proof.get('model') or {}).get('id'))}"
    )
    return clean("\n".join([*lines, *(f"problem: {problem}" for problem in seen["problems"])]))
