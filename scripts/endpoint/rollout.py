"""Carrying out a plan: create or change, wait until it is true, prove it with a job, roll back if it is not.

Every step can be killed at any moment: run again, it ends with exactly one endpoint equal to the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from common.problems import REMOTE_FAILED, TRY_LATER, Problem
from common.text import clean
from endpoint import plan as plans
from endpoint import smoke
from endpoint.plan import Plan
from endpoint.state import State
from runpod_api import Api, ApiError, NotFound, Unknown

POLL = (0.2, 5.0)  # seconds: first and longest wait between two looks
UNHEALTHY_PATIENCE = 120.0  # how long workers that all fail may go on failing before the release counts as bad
SMOKE_TRIES = 5  # answers from workers of an older release are asked for again
LOG_LINES = 8


class BadRelease(Exception):
    """A release that does not become true, or does not answer; the message is the cause."""


class Platform:
    """One account's endpoints, its clock, and where to report: what the steps below share."""

    def __init__(self, api: Api, jobs: Api, say: Callable[[str], None]) -> None:
        self.api = api
        self.jobs = jobs
        self.say = say
        self.clock = api.clock
        self.sleep = api.sleep

    def get(self, endpoint_id: str) -> dict[str, Any] | None:
        """The endpoint of this id, None if there is none. Raises ApiError."""
        try:
            return self.api.get(f"serverless/{endpoint_id}")
        except NotFound:
            return None

    def named(self, name: str) -> list[dict[str, Any]]:
        """All endpoints of this name. Raises ApiError."""
        found = self.api.list("serverless", "endpoints")
        return [endpoint for endpoint in found if str(endpoint.get("name") or "").removesuffix(" -fb") == name]

    def find(self, state: State) -> dict[str, Any] | None:
        """The endpoint of the state's id, else the one of its name, None if there is none.

        Raises Problem with the ids if several have the name.
        """
        if state.endpoint_id:
            endpoint = self.get(state.endpoint_id)
            if endpoint:
                return endpoint
            self.say(f"endpoint {state.endpoint_id} of {state.path} does not exist; looking for the name {state.name}")
        found = self.named(state.name)
        if len(found) > 1:
            ids = ", ".join(sorted(str(endpoint.get("id")) for endpoint in found))
            raise Problem(
                f"{len(found)} endpoints have the name {state.name}: {ids}. Which one is meant cannot be known: delete or"
                " rename the others in the RunPod console"
            )
        return found[0] if found else None

    def find_intended(self, state: State, propagation: float) -> dict[str, Any] | None:
        """`find`, but where a create was begun and its end is not known, for as long as the endpoint may take to appear."""
        found = self.find(state)
        if found or not state.intended():
            return found
        # It was sent before now, so it has appeared by then, however long the sending took.
        end = self.clock() + propagation
        self.say(f"an earlier deploy was interrupted while it made {state.name}: looking whether it appears")
        pause = POLL[0]
        while not found and (left := end - self.clock()) > 0:
            self.sleep(min(pause, left))
            pause = min(pause * 1.5, POLL[1])
            found = self.find(state)
        return found


def create(platform: Platform, plan: Plan, state: State, propagation: float) -> str:
    """Make the endpoint, exactly once, and return its id. Raises Problem."""
    for _ in range(3):
        state.intend()
        try:
            answer = platform.api.create("serverless", plan.body)
        except Unknown as problem:
            platform.say(f"{problem}: looking whether it was made")
            found = platform.find_intended(state, propagation)
            if not found:
                continue
            answer = found
        except ApiError:
            state.settled()  # refused: nothing was made
            raise
        endpoint_id = answer.get("id")
        if not isinstance(endpoint_id, str) or not re.fullmatch(r"[\w-]{1,100}", endpoint_id):
            raise Problem(
                "the answer to the create holds no id; run make deploy again, it looks for the name", REMOTE_FAILED
            )
        # The intent stays until the endpoint can be seen: an id alone is 404 for a while, like one that was deleted.
        state.endpoint_id = endpoint_id
        state.write()
        platform.say(f"made endpoint {endpoint_id}")
        return endpoint_id
    raise Problem(
        f"the endpoint {plan.name} could not be made: three answers were lost; run make deploy again", TRY_LATER
    )


def change(platform: Platform, plan: Plan) -> None:
    """PATCH the endpoint of the plan, unless it is another one by now. Raises Problem."""
    assert plan.endpoint_id
    actual = platform.get(plan.endpoint_id)
    if actual is None or plans.fingerprint(plans.normalise(actual)) != plan.seen:
        raise Problem(
            "the endpoint was changed by someone else since the plan was made; run make plan again", TRY_LATER
        )
    platform.api.patch(f"serverless/{plan.endpoint_id}", plan.body)


def settle(platform: Platform, endpoint_id: str, body: Mapping[str, Any], seconds: float) -> None:
    """Wait until the API shows the endpoint as the body says. Raises BadRelease with the fields that do not come."""
    end = platform.clock() + seconds
    pause = POLL[0]
    while True:
        actual = platform.get(endpoint_id)
        left = plans.make(body, actual) if actual else None
        if left and left.action == "none":
            return
        if platform.clock() >= end:
            fields = ", ".join(change.field for change in left.changes) if left else "the endpoint itself"
            raise BadRelease(f"RunPod does not show what was sent after {seconds:.0f} s: {fields}")
        platform.sleep(pause)
        pause = min(pause * 1.5, POLL[1])


def wait_and_prove(
    platform: Platform, endpoint_id: str, body: Mapping[str, Any], input_: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """Wait until the release is on the workers and has answered the smoke job; return what the answer said.

    `deadline` is a time of the platform's clock. Raises BadRelease with the cause, ApiError.
    """
    watch = _Watch(platform, endpoint_id)
    pause = POLL[0]
    # Workers of older releases go first. Without any worker there is nothing to wait for: the job starts one.
    while watch.look().stale:
        if platform.clock() >= deadline:
            raise BadRelease(f"workers of an older release are still there: {watch.words()}")
        platform.sleep(pause)
        pause = min(pause * 1.5, POLL[1])
    for _ in range(SMOKE_TRIES):
        left = deadline - platform.clock()
        if left <= 0:
            break
        answer = _answer(platform, watch, endpoint_id, input_, deadline)
        if smoke.stale(answer, body):
            platform.say("a worker of an older release answered; asking again")
            platform.sleep(min(2.0, max(0.0, deadline - platform.clock())))
            continue
        try:
            return smoke.check(answer, body, input_)
        except smoke.Rejected as rejected:
            raise BadRelease(str(rejected)) from None
    raise BadRelease(f"only workers of an older release answered: {watch.words()}")


def _answer(
    platform: Platform, watch: _Watch, endpoint_id: str, input_: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """Send the smoke job and follow it, and the workers, to its end. Raises BadRelease."""
    job = smoke.SmokeJob(platform.jobs, endpoint_id, input_, deadline - platform.clock())
    platform.say(f"smoke job {job.id} sent")
    pause, shown = POLL[0], ""
    try:
        while not job.look():
            watch.look()
            if (words := f"smoke job {job.state.lower().replace('_', ' ')} · {watch.words()}") != shown:
                platform.say(words)
                shown = words
            if watch.all_unhealthy_for() > UNHEALTHY_PATIENCE:
                raise BadRelease(f"the workers are unhealthy: {watch.words()}{watch.log()}")
            if platform.clock() >= deadline:
                raise BadRelease(f"no answer before the deadline (job {job.state}): {watch.why()}{watch.log()}")
            platform.sleep(pause)
            pause = min(pause * 1.5, POLL[1])
    except BaseException:
        job.cancel(platform.say)
        raise
    try:
        return smoke.answer_of(job.view)
    except smoke.Rejected as rejected:
        raise BadRelease(f"{rejected}{watch.log()}") from None


class _Watch:
    """The workers of an endpoint and how far its newest release has come."""

    def __init__(self, platform: Platform, endpoint_id: str) -> None:
        self.platform = platform
        self.endpoint_id = endpoint_id
        self.summary: dict[str, int] = {}
        self.workers: list[dict[str, Any]] = []
        self.unhealthy_since: float | None = None

    def look(self) -> _Watch:
        """Ask once more. Raises ApiError."""
        answer = self.platform.api.get(f"serverless/{self.endpoint_id}/workers")
        workers = answer.get("workers")
        self.workers = [worker for worker in workers if isinstance(worker, dict)] if isinstance(workers, list) else []
        states = [str(worker.get("status")) for worker in self.workers]
        self.summary = {state: states.count(state) for state in sorted(set(states))}
        bad = bool(states) and set(states) == {"UNHEALTHY"}
        now = self.platform.clock()
        self.unhealthy_since = (self.unhealthy_since or now) if bad else None
        return self

    @property
    def stale(self) -> bool:
        return any(worker.get("isStale") for worker in self.workers)

    def all_unhealthy_for(self) -> float:
        return 0.0 if self.unhealthy_since is None else self.platform.clock() - self.unhealthy_since

    def words(self) -> str:
        """`2 workers: 1 on the new release, 1 initializing, 1 idle`."""
        if not self.workers:
            return "no workers yet"
        total = len(self.workers)
        latest = sum(not worker.get("isStale") for worker in self.workers)
        states = ", ".join(f"{count} {clean(state).lower()[:20]}" for state, count in self.summary.items())
        return f"{total} worker{'s' if total > 1 else ''}: {latest} on the newest release; {states}"

    def why(self) -> str:
        """The likely cause of a job that nobody takes."""
        if self.summary.get("THROTTLED"):
            return (
                f"{self.words()}. No GPU of the wanted pools is free: add pools to config/endpoint.yaml, or try later"
            )
        if self.summary.get("UNHEALTHY"):
            return f"{self.words()}. The image or the model does not start"
        if self.summary.get("INITIALIZING"):
            return f"{self.words()}. Still pulling the image or loading the model: raise rollout.deadline if that is normal"
        if not self.workers:
            return "RunPod started no worker: is the account's worker limit reached, or no GPU of the pools free?"
        return f"{self.words()}. They do not take the job"

    def log(self) -> str:
        """The last lines of a failing worker's logs, the system's first; empty if there are none to be had."""
        ranked = sorted(
            self.workers, key=lambda worker: (worker.get("status") != "UNHEALTHY", bool(worker.get("isStale")))
        )
        for worker in ranked[:2]:
            for source in ("system", "container"):
                try:
                    lines = self.platform.api.log_lines(
                        f"serverless/{self.endpoint_id}/workers/{worker['id']}/logs", source, LOG_LINES
                    )
                except (ApiError, KeyError):
                    continue
                if lines:
                    return f"\n  {source} log of worker {worker['id']}:" + "".join(f"\n    {line}" for line in lines)
        return ""


def roll_back(
    platform: Platform, endpoint_id: str, target: Mapping[str, Any] | None, input_: dict[str, Any], deadline: float
) -> str:
    """Put the last good release back, or without one let no worker start; say how that went. Never raises Problem."""
    try:
        if target is None:
            platform.api.patch(f"serverless/{endpoint_id}", {"workers": {"min": 0, "max": 0}})
            return (
                "there is no earlier release that was proven: max workers is set to 0, so that nothing can bill."
                " The next make deploy raises it again"
            )
        actual = platform.get(endpoint_id)
        if actual is None:
            return f"the endpoint {endpoint_id} has vanished: nothing to roll back"
        back = plans.make(target, actual)
        if back.action == "update":
            platform.say(f"rolling back: {', '.join(change.field for change in back.changes)}")
            change(platform, back)
        settle(platform, endpoint_id, target, max(1.0, deadline - platform.clock()))
        wait_and_prove(platform, endpoint_id, target, input_, deadline)
        return "the last good release is back, and has answered a job"
    except (Problem, BadRelease) as problem:
        return f"and rolling back did not end well: {problem}. Look at it: make status"
