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
import time
from pathlib import Path
from typing import Any

from common.files import to_json
from common.problems import BAD_INPUT, CHANGES, FLAGGED, OK, REMOTE_FAILED, TRY_LATER, Problem, run
from common.secrets import redact
from common.text import clean
from common.urls import base_url
from endpoint import checks, rollout, smoke
from endpoint import plan as plans
from endpoint.desired import Desired, load
from endpoint.state import State
from runpod_api import RUNPOD_JOBS_URL, Api, from_environment

FORMS = ("text", "json", "markdown")


def say(message: str) -> None:
    """Progress, for a person."""
    print(redact(clean(message)), file=sys.stderr, flush=True)


class Command:
    """What every verb starts from: the file, the API, the state."""

    def __init__(self) -> None:
        self.form = os.environ.get("AS") or "text"
        if self.form not in FORMS:
            raise Problem(f"AS={self.form!r:.40} is unknown; known are {', '.join(FORMS)}")
        config = Path(os.environ.get("CONFIG_DIR") or "config")
        self.prompts = Path(os.environ.get("PROMPTS_DIR") or "prompts")
        folder = Path(os.environ.get("DEPLOY_DIR") or "deploy")
        self.desired: Desired = load(config, folder)
        self.api = from_environment(say)
        jobs = Api(os.environ["RUNPOD_API_KEY"], base_url("RUNPOD_JOBS_URL", RUNPOD_JOBS_URL), warn=say)
        self.platform = rollout.Platform(self.api, jobs, say)
        self.state = State(folder, self.api.url, self.desired.name)

    def plan(self, actual: dict[str, Any] | None) -> plans.Plan:
        """The plan to the file, with what the catalog and the hub say to it. Raises Problem for what cannot work."""
        desired = self.desired
        if actual is not None and (reason := plans.impossible(desired.body, actual)):
            raise Problem(
                f"endpoint {actual.get('id')} cannot become what {desired.file.path} says: {reason}."
                f" Make it anew: make destroy NAME={desired.name}, then make deploy"
            )
        made = plans.make(desired.body, actual)
        if not desired.image:
            made.notes.append(f"the image is not compared: {desired.image_from}")
        made.notes.extend(checks.model(desired))
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
    print(command.show(made))
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
        print(command.show(made), flush=True)
        if actual:
            state.settled()
            state.endpoint_id = str(actual["id"])
        if made.action == "none" and state.proven(desired.body):
            state.write()
            return OK
        target = _way_back(state, made, desired.body, actual)
        deadline = platform.clock() + desired.deadline
        try:
            if made.action == "create":
                state.endpoint_id = rollout.create(platform, made, state, desired.propagation)
            elif made.action == "update":
                rollout.change(platform, made)
            assert state.endpoint_id
            rollout.settle(platform, state.endpoint_id, desired.body, max(desired.propagation, 1.0))
            state.settled()
            _alone_with_name(platform, state)
            answer = rollout.wait_and_prove(platform, state.endpoint_id, desired.body, input_, deadline)
        except rollout.BadRelease as cause:
            return _rolled_back(command, str(cause), target, input_)
        state.prove(desired.body, {**answer, "at": _now()})
    print(f"deployed: endpoint {state.endpoint_id} answered a job. In .env: RUNPOD_ENDPOINT_ID={state.endpoint_id}")
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


def _way_back(
    state: State, made: plans.Plan, body: dict[str, Any], actual: dict[str, Any] | None
) -> dict[str, Any] | None:
    """What to put back if this deploy does not end well: the release that was last proven, else what runs now.

    None: there is neither. The body itself: it was proven before, so going back to another release would mend nothing.
    """
    if state.proven(body):
        return body
    return state.last_good() or (actual if made.action == "update" else None)


def _rolled_back(command: Command, cause: str, target: dict[str, Any] | None, input_: dict[str, Any]) -> int:
    platform, state = command.platform, command.state
    say(f"the release is not good: {cause}")
    assert state.endpoint_id
    if target is command.desired.body:
        outcome = "this release has answered a job before, so nothing was put back. Look at it: make status"
    else:
        deadline = platform.clock() + command.desired.deadline
        outcome = rollout.roll_back(platform, state.endpoint_id, target, input_, deadline)
    state.fail(f"{cause}; {outcome}")
    raise Problem(f"not deployed: {cause}\n{outcome}", REMOTE_FAILED)


def rollback() -> int:
    """Put the proven release before the newest one back."""
    command = Command()
    platform, state, desired = command.platform, command.state, command.desired
    with state.alone():
        actual = platform.find(state)
        if actual is None:
            raise Problem(f"there is no endpoint {desired.name}; make it: make deploy")
        state.endpoint_id = str(actual["id"])
        # Where the newest proven release is not what runs (a deploy was broken off), that one is the way back.
        newest = state.last_good()
        undone = newest is not None and plans.make(newest, actual).action == "none"
        earlier = state.releases[:-1] if undone else state.releases
        if not earlier:
            raise Problem(
                f"{state.path} knows no earlier release that was proven. Take the change of {desired.file.path} (or of"
                " deploy/image.json) back with git, then: make deploy"
            )
        target = earlier[-1]["body"]
        made = plans.make(target, actual)
        print(command.show(made), flush=True)
        input_ = smoke.job_input(command.prompts)
        deadline = platform.clock() + desired.deadline
        try:
            if made.action == "update":
                rollout.change(platform, made)
            rollout.settle(platform, state.endpoint_id, target, max(desired.propagation, 1.0))
            answer = rollout.wait_and_prove(platform, state.endpoint_id, target, input_, deadline)
        except rollout.BadRelease as cause:
            state.fail(f"rollback: {cause}")
            raise Problem(f"the earlier release was put back, but is not good: {cause}", REMOTE_FAILED) from None
        state.releases = earlier
        state.prove(target, {**answer, "at": _now()})
    if plans.make(desired.body, platform.get(state.endpoint_id)).action != "none":
        say(
            f"{desired.file.path} still says what was rolled back: change it too, or the next make deploy brings it again"
        )
    print(f"rolled back: endpoint {state.endpoint_id} answered a job with the release of {earlier[-1]['proven']}")
    return OK


def destroy() -> int:
    """Delete the endpoint, and see that it is gone."""
    command = Command()
    platform, state = command.platform, command.state
    if os.environ.get("NAME") != state.name:
        raise Problem(
            f"destroy deletes the endpoint {state.name}. To do that, repeat its name: make destroy NAME={state.name}"
        )
    with state.alone():
        found = platform.find_intended(state, command.desired.propagation)
        if found is None:
            print(f"there is no endpoint {state.name}: nothing to destroy")
        else:
            endpoint_id = str(found["id"])
            command.api.delete(f"serverless/{endpoint_id}")
            end = platform.clock() + max(command.desired.propagation, 1.0)
            while platform.get(endpoint_id) or any(
                other.get("id") == endpoint_id for other in platform.named(state.name)
            ):
                if platform.clock() >= end:
                    raise Problem(
                        f"endpoint {endpoint_id} was deleted, but RunPod still shows it; look again: make status",
                        TRY_LATER,
                    )
                platform.sleep(1.0)
            print(
                f"destroyed: endpoint {endpoint_id} is gone. Network volumes and registry credentials, if any, stay and bill on"
            )
        state.settled()
        state.path.unlink(missing_ok=True)
    return OK


def status() -> int:
    """One screen about the endpoint; changes nothing."""
    from endpoint import report

    command = Command()
    actual = command.platform.find(command.state)
    if actual is None:
        raise Problem(f"there is no endpoint {command.desired.name} yet; make it: make deploy", BAD_INPUT)
    seen = report.gather(command.platform, command.state, command.desired, actual)
    print(to_json(seen).rstrip() if command.form == "json" else report.text(seen))
    return FLAGGED if seen["problems"] else OK


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


VERBS = {"plan": plan, "deploy": deploy, "status": status, "rollback": rollback, "destroy": destroy}


def main() -> int:
    """The verb on the command line."""
    if len(sys.argv) != 2 or sys.argv[1] not in VERBS:
        raise Problem(f"usage: python -m endpoint {'|'.join(VERBS)}")
    return VERBS[sys.argv[1]]()


if __name__ == "__main__":
    run(main)
