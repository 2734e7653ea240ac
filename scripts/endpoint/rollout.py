"""Carrying out a plan: create or change, wait until it is true, prove it with a job, roll back if it is not.

Every step can be killed at any moment: run again, it ends with exactly one endpoint equal to the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from common.problems import REMOTE_FAILED, TRY_LATER, Problem
from common.text import clean
from common.urls import is_near
from endpoint import plan as plans
from endpoint import smoke
from endpoint.plan import Plan
from endpoint.state import State
from runpod_api import Api, ApiError, NotFound, Unknown

POLL = (0.2, 5.0)  # seconds: first and longest wait between two looks
UNHEALTHY_PATIENCE = 120.0  # how long workers that all fail may go on failing before the release counts as bad
STALE_PATIENCE = 60.0  # how long workers of older releases are waited for before a job is sent all the same
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
        self._missed: set[str] = set()

    @property
    def local(self) -> bool:
        """Is this the local RunPod?"""
        return is_near(urlsplit(self.api.url).hostname or "")

    def get(self, endpoint_id: str) -> dict[str, Any] | None:
        """The endpoint of this id, None if there is none. Raises ApiError."""
        try:
            return _endpoint(self.api.get(f"serverless/{endpoint_id}"))
        except NotFound:
            return None

    def named(self, name: str) -> list[dict[str, Any]]:
        """All endpoints of this name. Raises ApiError."""
        found = map(_endpoint, self.api.list("serverless", "endpoints"))
        return [endpoint for endpoint in found if plans.name_of(endpoint) == name]

    def find(self, state: State) -> dict[str, Any] | None:
        """The endpoint of the state's id, else the one of its name, None if there is none.

        Raises Problem with the ids if several have the name.
        """
        if state.endpoint_id:
            endpoint = self.get(state.endpoint_id)
            if endpoint:
                return endpoint
            if state.endpoint_id not in self._missed:
                self.say(
                    f"endpoint {state.endpoint_id} of {state.path} is not there; looking for the name {state.name}"
                )
                self._missed.add(state.endpoint_id)
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
        if not found and state.endpoint_id:
            # RunPod gave this id, so the endpoint exists, or somebody has deleted it: only a person can tell.
            raise Problem(
                f"endpoint {state.endpoint_id} was made, and RunPod has not shown it for {propagation:.0f} s. Look for it in"
                f" the console. If it is there, run this again later; if it never was, or is deleted: rm {state.path}"
                f" {state.intent}",
                TRY_LATER,
            )
        return found


def _endpoint(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer that is an endpoint. Raises ApiError naming the field by which it is none."""
    if field := plans.misshapen(answer):
        raise ApiError(f"RunPod's answer is not an endpoint: its field {field} is of another kind")
    return answer


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
        left, trouble = None, "the endpoint itself"
        try:
            if actual := platform.get(endpoint_id):
                left = plans.make(body, actual)
                trouble = ", ".join(change.field for change in left.changes)
        except ApiError as error:
            trouble = _passing(error)
        if left and left.action == "none":
            return
        if platform.clock() >= end:
            raise BadRelease(f"RunPod does not show what was sent after {seconds:.0f} s: {trouble}")
        platform.sleep(pause)
        pause = min(pause * 1.5, POLL[1])


def wait_and_prove(
    platform: Platform, endpoint_id: str, body: Mapping[str, Any], input_: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """Wait until the release has answered the smoke job; return what the answer said.

    `deadline` is a time of the platform's clock. What passes by (RunPod out of reach, an endpoint that its job API does
    not know yet) is waited for until then. Raises BadRelease with the cause.
    """
    watch = _Watch(platform, endpoint_id)
    # Workers of older releases go first, as a rule; but a crashed one may stay for ever, and its answer is recognised.
    patience = min(deadline, platform.clock() + STALE_PATIENCE)
    waiting = _Pause(platform)
    while watch.look().only_stale and platform.clock() < patience:
        waiting.say(f"waiting for workers of the new release: {watch.words()}")
        waiting.sleep()
    while platform.clock() < deadline:
        answer = _answer(platform, watch, endpoint_id, input_, deadline)
        if not smoke.stale(answer, body):
            try:
                return smoke.check(answer, body, input_, local=platform.local)
            except smoke.Rejected as rejected:
                raise BadRelease(str(rejected)) from None
        platform.say("a worker of an older release answered; asking again")
        platform.sleep(min(POLL[1], max(0.0, deadline - platform.clock())))
    raise BadRelease(f"no worker of the new release answered before the deadline: {watch.words()}")


def _answer(
    platform: Platform, watch: _Watch, endpoint_id: str, input_: dict[str, Any], deadline: float
) -> dict[str, Any]:
    """Send the smoke job and follow it, and the workers, to its end. Raises BadRelease."""
    waiting = _Pause(platform)
    trouble = ""
    job: smoke.SmokeJob | None = None
    try:
        while True:
            ended = False
            try:
                if job is None:
                    job = smoke.SmokeJob(platform.jobs, endpoint_id, input_, deadline - platform.clock())
                    platform.say(f"smoke job {job.id} sent")
                ended = job.look()
                trouble = ""
            except ApiError as error:
                trouble = _passing(error)
            if ended:
                break
            watch.look()
            state = job.state.lower().replace("_", " ") if job else "not accepted yet"
            waiting.say(f"smoke job {state} · {trouble or watch.words()}")
            if watch.all_unhealthy_for() > UNHEALTHY_PATIENCE:
                raise BadRelease(f"the workers are unhealthy: {watch.words()}{watch.log()}")
            if platform.clock() >= deadline:
                raise BadRelease(f"no answer before the deadline (job {state}): {trouble or watch.why()}{watch.log()}")
            waiting.sleep()
    except BaseException:
        if job:
            job.cancel(platform.say)
        raise
    assert job
    try:
        return smoke.answer_of(job.view)
    except smoke.Rejected as rejected:
        raise BadRelease(f"{rejected}{watch.log('container')}") from None


def _passing(error: ApiError) -> str:
    """The words of an error that may pass by: no service, or a thing that is not known yet. Raises BadRelease for others."""
    if error.code == TRY_LATER or isinstance(error, NotFound):
        return str(error)
    raise BadRelease(str(error)) from None


class _Pause:
    """Waits that grow, and lines that are said once."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.seconds = POLL[0]
        self.said = ""

    def say(self, words: str) -> None:
        if words != self.said:
            self.platform.say(words)
            self.said = words

    def sleep(self) -> None:
        self.platform.sleep(self.seconds)
        self.seconds = min(self.seconds * 1.5, POLL[1])


class _Watch:
    """The workers of an endpoint and how far its newest release has come."""

    def __init__(self, platform: Platform, endpoint_id: str) -> None:
        self.platform = platform
        self.endpoint_id = endpoint_id
        self.summary: dict[str, int] = {}
        self.workers: list[dict[str, Any]] = []
        self.unhealthy_since: float | None = None

    def look(self) -> _Watch:
        """Ask once more; what cannot be read now stays as it was. Raises BadRelease."""
        try:
            answer = self.platform.api.get(f"serverless/{self.endpoint_id}/workers")
        except ApiError as error:
            _passing(error)
            return self
        workers = answer.get("workers")
        self.workers = [worker for worker in workers if isinstance(worker, dict)] if isinstance(workers, list) else []
        states = [str(worker.get("status")) for worker in self.workers]
        self.summary = {state: states.count(state) for state in sorted(set(states))}
        bad = bool(states) and set(states) == {"UNHEALTHY"}
        now = self.platform.clock()
        self.unhealthy_since = (self.unhealthy_since or now) if bad else None
        return self

    @property
    def only_stale(self) -> bool:
        """Are there workers, and all of them of older releases?"""
        return bool(self.workers) and all(worker.get("isStale") for worker in self.workers)

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

    def log(self, first: str = "system") -> str:
        """The last lines of a failing worker's logs, those of `first` if it has any; empty if there are none to be had."""
        ranked = sorted(
            self.workers, key=lambda worker: (worker.get("status") != "UNHEALTHY", bool(worker.get("isStale")))
        )
        for worker in ranked[:2]:
            for source in dict.fromkeys((first, "system", "container")):
                try:
                    lines = self.platform.api.log_lines(
                        f"serverless/{self.endpoint_id}/workers/{worker['id']}/logs", source, LOG_LINES
                    )
                except (ApiError, KeyError):
                    continue
                if lines:
                    return f"\n  {source} log of worker {worker['id']}:" + "".join(f"\n    {line}" for line in lines)
        return ""


def let_nothing_start(platform: Platform, endpoint_id: str) -> str:
    """After a first release that is not good: no worker may start, so that nothing can bill. Never raises Problem."""
    try:
        platform.api.patch(f"serverless/{endpoint_id}", {"workers": {"min": 0, "max": 0}})
    except Problem as problem:
        return f"and max workers could not be set to 0 ({problem}): set it in the RunPod console, or: make destroy"
    return (
        "it was the first one: max workers is set to 0, so that nothing can bill. The next make deploy raises it again"
    )


def roll_back(
    platform: Platform, endpoint_id: str, target: Mapping[str, Any], input_: dict[str, Any], deadline: float
) -> str:
    """Put an earlier release back; say how that went. Never raises Problem."""
    try:
        actual = platform.get(endpoint_id)
        if actual is None:
            return f"the endpoint {endpoint_id} has vanished: nothing to roll back"
        back = plans.make(target, actual)
        if back.action == "update":
            platform.say(f"rolling back: {', '.join(change.field for change in back.changes)}")
            change(platform, back)
        settle(platform, endpoint_id, target, max(1.0, deadline - platform.clock()))
        if plans.normalise(target)["workers"]["max"] == 0:
            return "what ran before is back. Its max workers is 0, so it answers no jobs"
        wait_and_prove(platform, endpoint_id, target, input_, deadline)
        return "the last good release is back, and has answered a job"
    except (Problem, BadRelease) as problem:
        return f"and rolling back did not end well: {problem}. Look at it: make status"
