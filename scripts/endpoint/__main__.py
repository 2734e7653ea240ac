"""The endpoint as code: `python -m endpoint plan|deploy|status|rollback|destroy`.

plan      show how RunPod's endpoint differs from config/endpoint.yaml. AS=json or AS=markdown prints it so.
deploy    make it so, wait until it is true, prove it with a job; roll back and exit 5 if it is not.
status    workers, queue, releases, drift, cost per hour, the last proof. AS=json.
rollback  put the release before the newest proven one back.
destroy   delete the endpoint: NAME must repeat its name.

Exit codes: 0 done, or no change; 2 bad input; 3 (status) something is wrong; 5 refused, failed or rolled back; 10 (plan)
changes are pending; 75 try again later. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from common.files import to_json
from common.problems import BAD_INPUT, CHANGES, FLAGGED, OK, REMOTE_FAILED, TRY_LATER, Problem, run, tell
from common.secrets import redact
from common.text import clean
from common.urls import base_url
from endpoint import checks, rollout, smoke
from endpoint import plan as plans
from endpoint.desired import Desired, load
from endpoint.state import State, hash_of, name_in, utc
from runpod_api import RUNPOD_JOBS_URL, Api, from_environment

FORMS = ("text", "json", "markdown")
# Where the file cannot be read: seconds, as config/endpoint.yaml ships them.
DEADLINE, PROPAGATION = 1800.0, 60.0


def say(message: str) -> None:
    """Progress, for a person. Nobody listening (a closed pipe) must not end a deploy half way."""
    try:
        print(redact(clean(message)), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


class Command:
    """What every verb starts from: the file, the API, the state.

    `needs_file` False: status, rollback and destroy also work with a file that is broken, on the name in the state.
    """

    def __init__(self, *, needs_file: bool = True) -> None:
        self.form = os.environ.get("AS") or "text"
        if self.form not in FORMS:
            raise Problem(f"AS={self.form!r:.40} is unknown; known are {', '.join(FORMS)}")
        config = Path(os.environ.get("CONFIG_DIR") or "config")
        self.prompts = Path(os.environ.get("PROMPTS_DIR") or "prompts")
        self.folder = Path(os.environ.get("DEPLOY_DIR") or "deploy")
        self.api = from_environment(say)
        jobs = Api(os.environ["RUNPOD_API_KEY"], base_url("RUNPOD_JOBS_URL", RUNPOD_JOBS_URL), warn=say)
        self.platform = rollout.Platform(self.api, jobs, say)
        self.broken = ""
        self._desired: Desired | None = None
        try:
            self._desired = load(config, self.folder)
        except Problem as problem:
            name = None if needs_file else name_in(self.folder)
            if name is None:
                raise
            self.broken = str(problem)
            say(f"going by {self.folder / 'deploy.lock.json'}, because: {problem}")
        name = self._desired.name if self._desired else str(name)
        self.state = State(self.folder, self.api.url, name)
        self.deadline = self._desired.deadline if self._desired else DEADLINE
        self.propagation = self._desired.propagation if self._desired else PROPAGATION

    @property
    def desired(self) -> Desired:
        """The file. Only for verbs that need it, and where it was read."""
        assert self._desired
        return self._desired

    def plan(self, actual: dict[str, Any] | None) -> plans.Plan:
        """The plan to the file, with what the catalog and the hub say to it. Raises Problem for what cannot work."""
        desired = self.desired
        if actual is not None and (reason := plans.impossible(desired.body, actual)):
            raise Problem(
                f"endpoint {actual.get('id')} cannot become what {desired.file.path} says: {reason}."
                f" Make it anew: make destroy NAME={desired.name}, then make deploy"
            )
        made = plans.make(desired.body, actual, self.state.known())
        if not desired.image:
            made.notes.append(f"the image is not compared: {desired.image_from}")
        made.notes.extend(checks.model(desired, actual))
        made.notes.extend(checks.catalog(desired, self.api))
        if desired.image and desired.image != (actual or {}).get("image"):
            made.notes.extend(checks.image(desired.image))
        return made

    def show(self, plan: plans.Plan) -> str:
        """The plan in the form that AS asks for."""
        if self.form == "json":
            return to_json(plans.as_dict(plan)).rstrip()
        return plans.markdown(plan).rstrip() if self.form == "markdown" else plans.text(plan)


def plan() -> int:
    """Show what there is to do; change nothing."""
    command = Command()
    made = command.plan(command.platform.find(command.state))
    tell(command.show(made))
    return OK if made.action == "none" else CHANGES


def deploy() -> int:
    """Make the endpoint what the file says, and prove it."""
    command = Command()
    desired, platform, state = command.desired, command.platform, command.state
    if not desired.image:
        raise Problem(f"there is no image to deploy: {desired.image_from}")
    input_ = smoke.job_input(command.prompts)
    with state.alone():
        actual = platform.find_intended(state, desired.propagation)
        made = command.plan(actual)
        tell(command.show(made))
        first = made.action == "create" or (state.intended() and not state.releases)
        if actual:
            state.settled()
            state.endpoint_id = actual["id"]
        state.rolling_back = None
        if made.action == "none" and state.proven(desired.body):
            state.failed = None
            state.write()
            return OK
        try:
            deadline = platform.clock() + desired.deadline
            if made.action == "create":
                state.endpoint_id = rollout.create(platform, made, state, desired.propagation)
            elif made.action == "update":
                rollout.change(platform, made)
            assert state.endpoint_id
            rollout.settle(platform, state.endpoint_id, desired.body, max(desired.propagation, 1.0))
            state.settled()
            if made.action == "create":
                _alone_with_name(platform, state)
            answer = rollout.wait_and_prove(platform, state.endpoint_id, desired.body, input_, deadline)
        except rollout.BadRelease as cause:
            assert state.endpoint_id
            say(f"the release is not good: {cause}")
            outcome = _put_back(command, made, actual, first, input_)
            state.fail(f"{cause}; {outcome}")
            raise Problem(f"not deployed: {cause}\n{outcome}", REMOTE_FAILED) from None
        state.prove(desired.body, {**answer, "at": utc()})
    tell(f"deployed: endpoint {state.endpoint_id} answered a job. In .env: RUNPOD_ENDPOINT_ID={state.endpoint_id}")
    return OK


def _alone_with_name(platform: rollout.Platform, state: State) -> None:
    """Two machines that created at the same moment: neither can know, so both say it."""
    others = [str(found.get("id")) for found in platform.named(state.name) if found.get("id") != state.endpoint_id]
    if others:
        raise Problem(
            f"another endpoint of the name {state.name} appeared meanwhile: {', '.join(others)} beside {state.endpoint_id}."
            " Delete one of them in the RunPod console, then: make deploy",
            TRY_LATER,
        )


def _put_back(
    command: Command, made: plans.Plan, actual: dict[str, Any] | None, first: bool, input_: dict[str, Any]
) -> str:
    """After a release that is not good: what was done about it, as a sentence.

    The release that was proven last comes back; without one what ran before this deploy. A first release is kept from
    starting workers. Where this deploy changed nothing, and the release has been good before, nothing is put back.
    """
    platform, state, body = command.platform, command.state, command.desired.body
    assert state.endpoint_id
    target = state.last_good()
    if target is not None and hash_of(target) == hash_of(body):
        return "this release has answered a job before, so nothing was put back. Look at it: make status"
    if target is None and first:
        return rollout.let_nothing_start(platform, state.endpoint_id)
    if target is None and made.action == "update":
        target = actual
    if target is None:
        return "this deploy changed nothing, so nothing was put back. Look at it: make status"
    return rollout.roll_back(platform, state.endpoint_id, target, input_, platform.clock() + command.deadline)


def rollback() -> int:
    """Put the proven release before the newest one back; one that was broken off goes on to the same release."""
    command = Command(needs_file=False)
    platform, state = command.platform, command.state
    input_ = smoke.job_input(command.prompts)
    with state.alone():
        actual = platform.find(state)
        if actual is None:
            raise Problem(f"there is no endpoint {state.name}; make it: make deploy")
        state.endpoint_id = actual["id"]
        releases = state.releases
        wanted = [number for number, release in enumerate(releases) if hash_of(release["body"]) == state.rolling_back]
        if not wanted:
            # Where the newest proven release is not what runs (a deploy was broken off), that one is the way back.
            newest = state.last_good()
            undone = newest is not None and plans.make(newest, actual).action == "none"
            wanted = list(range(len(releases)))[: -1 if undone else None][-1:]
        if not wanted:
            raise Problem(
                f"{state.path} knows no earlier release that was proven. Take the change of config/endpoint.yaml (or of"
                " deploy/image.json) back with git, then: make deploy"
            )
        target, proven = releases[wanted[0]]["body"], releases[wanted[0]]["proven"]
        made = plans.make(target, actual, state.known())
        tell(command.show(made))
        state.rolling_back = hash_of(target)
        state.write()
        try:
            deadline = platform.clock() + command.deadline
            if made.action == "update":
                rollout.change(platform, made)
            rollout.settle(platform, state.endpoint_id, target, max(command.propagation, 1.0))
            answer = rollout.wait_and_prove(platform, state.endpoint_id, target, input_, deadline)
        except rollout.BadRelease as cause:
            state.fail(f"rollback: {cause}")
            raise Problem(
                f"the release of {proven} was put back, but is not good: {cause}\nLook at it: make status. Forward again:"
                " make deploy",
                REMOTE_FAILED,
            ) from None
        # Asked before it counts as done: a rollback that is broken off after that would go back one more when run again.
        differs = command.broken or plans.make(command.desired.body, platform.get(state.endpoint_id)).action != "none"
        state.releases = releases[: wanted[0]]
        state.prove(target, {**answer, "at": utc()})
    if differs:
        say(
            "config/endpoint.yaml still says what was rolled back: change it too, or the next make deploy brings it again"
        )
    tell(f"rolled back: endpoint {state.endpoint_id} answered a job with the release of {proven}")
    return OK


def destroy() -> int:
    """Delete the endpoint, and see that it is gone."""
    command = Command(needs_file=False)
    platform, state = command.platform, command.state
    if os.environ.get("NAME") != state.name:
        raise Problem(
            f"destroy deletes the endpoint {state.name}. To do that, repeat its name: make destroy NAME={state.name}"
        )
    with state.alone():
        found = platform.find_intended(state, command.propagation)
        if found is None:
            tell(f"there is no endpoint {state.name}: nothing to destroy")
        else:
            endpoint_id, name = found["id"], found.get("name")
            say(f"deleting endpoint {endpoint_id}, named {name}")
            command.api.delete(f"serverless/{endpoint_id}")
            end = platform.clock() + max(command.propagation, 1.0)
            while platform.get(endpoint_id) or any(
                other.get("id") == endpoint_id for other in platform.named(state.name)
            ):
                if platform.clock() >= end:
                    raise Problem(
                        f"endpoint {endpoint_id} was deleted, but RunPod still shows it; look again: make status",
                        TRY_LATER,
                    )
                platform.sleep(1.0)
            tell(
                f"destroyed: endpoint {endpoint_id} is gone. Network volumes and registry credentials, if any, stay and bill on"
            )
        state.settled()
        state.path.unlink(missing_ok=True)
    return OK


def status() -> int:
    """One screen about the endpoint; changes nothing."""
    from endpoint import report

    command = Command(needs_file=False)
    if command.form == "markdown":
        raise Problem("AS=markdown is for plan; status knows text and json")
    actual = command.platform.find(command.state)
    if actual is None:
        raise Problem(f"there is no endpoint {command.state.name} yet; make it: make deploy", BAD_INPUT)
    drift = None if command.broken else plans.make(command.desired.body, actual, command.state.known())
    seen = report.gather(command.platform, command.state, drift, actual, command.broken)
    tell(to_json(seen).rstrip() if command.form == "json" else report.text(seen))
    return FLAGGED if seen["problems"] else OK


VERBS = {"plan": plan, "deploy": deploy, "status": status, "rollback": rollback, "destroy": destroy}


def main() -> int:
    """The verb on the command line."""
    if len(sys.argv) != 2 or sys.argv[1] not in VERBS:
        raise Problem(f"usage: python -m endpoint {'|'.join(VERBS)}")
    return VERBS[sys.argv[1]]()


if __name__ == "__main__":
    run(main)
