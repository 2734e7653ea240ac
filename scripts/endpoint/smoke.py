"""The proof of a release: one real synthesis on two sources, sent as a job and checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml_file
from common import citations
from common.problems import Problem
from common.secrets import redact
from common.text import clean
from runpod_api import Api, ApiError, NotFound, Unknown

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
EXECUTION_SECONDS = 300.0


class Rejected(Exception):
    """The job ended, and not as it should; the message says how."""


def job_input(prompts: Path) -> dict[str, Any]:
    """The job of prompts/smoke.yaml."""
    data = yaml_file.read(prompts / "smoke.yaml").data
    try:
        return {
            "prompt": data["question"],
            "sources": data["sources"],
            "max_new_tokens": data["max_new_tokens"],
            "temperature": 0,
        }
    except (KeyError, TypeError):
        raise Problem(
            f"{prompts / 'smoke.yaml'} is not a smoke job; restore it: git checkout {prompts / 'smoke.yaml'}"
        ) from None


class SmokeJob:
    """One job on its way. `jobs` is the door to the job API, whose paths begin with the endpoint's id."""

    def __init__(self, jobs: Api, endpoint_id: str, input_: dict[str, Any], lifetime: float) -> None:
        """Send it. `lifetime`: seconds after which the platform forgets it. Raises ApiError."""
        self.jobs = jobs
        self.endpoint_id = endpoint_id
        seconds = min(max(lifetime, 10.0), 604_800.0)
        policy = {
            "ttl": round(seconds * 1000),
            "executionTimeout": round(min(EXECUTION_SECONDS, max(seconds, 5.0)) * 1000),
        }
        body = {"input": input_, "policy": policy}
        try:
            answer = jobs.create(f"{endpoint_id}/run", body)
        except Unknown:
            # It may run, and ends by itself; a second one costs a few seconds of a worker that is up anyhow.
            answer = jobs.create(f"{endpoint_id}/run", body)
        if not re.fullmatch(r"[\w.:-]{1,200}", str(answer.get("id"))):
            raise ApiError(f"POST /{endpoint_id}/run: the answer holds no job id")
        self.id = str(answer["id"])
        self.view: dict[str, Any] = {"status": "IN_QUEUE"}

    def look(self) -> bool:
        """Ask for its state; True once it has ended. Raises ApiError."""
        try:
            self.view = self.jobs.get(f"{self.endpoint_id}/status/{self.id}")
        except NotFound:
            self.view = {"status": "IN_QUEUE"}  # a job can be unknown for a moment after it was accepted
        return self.state in FINAL

    @property
    def state(self) -> str:
        return str(self.view.get("status"))

    def cancel(self, warn: Callable[[str], None]) -> None:
        """Give it up. Never raises: it is called while something else fails."""
        try:
            self.jobs.create(f"{self.endpoint_id}/cancel/{self.id}", {})
        except Problem as problem:
            warn(f"the smoke job {self.id} could not be cancelled ({problem}); it ends by itself")


def answer_of(view: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a job that COMPLETED. Raises Rejected with the platform's or the worker's reason."""
    state = str(view.get("status"))
    if state != "COMPLETED":
        reason = view.get("error") or view.get("output") or "no reason given"
        raise Rejected(f"the smoke job ended {clean(state)[:40]}: {clean(str(reason))[:500]}")
    output = view.get("output")
    answer = output[-1] if isinstance(output, list) and output else output
    if not isinstance(answer, dict) or not isinstance(answer.get("synthesis"), str):
        raise Rejected("the smoke job COMPLETED without a synthesis: does the image run this project's worker?")
    return answer


def stale(answer: Mapping[str, Any], body: Mapping[str, Any]) -> bool:
    """Did a worker of an older release answer? Every answer names the image and the release of its worker."""
    model = _model(answer)
    env = body.get("env") or {}
    pairs = (("IMAGE", "image"), ("RELEASE", "release"))
    return any(env.get(name) and model.get(key) != env[name] for name, key in pairs)


def _model(answer: Mapping[str, Any]) -> dict[str, Any]:
    model = answer.get("model")
    return model if isinstance(model, dict) else {}


def check(
    answer: Mapping[str, Any], body: Mapping[str, Any], input_: Mapping[str, Any], *, local: bool
) -> dict[str, Any]:
    """What a good answer said, in short, for the state file. Raises Rejected with all that is wrong with another.

    It must come from the release and the model commit that were deployed, be text, and cite the sources it was given and
    no others. `local`: the local RunPod's workers have no model, and quote.
    """
    wrong: list[str] = []
    text = clean(answer["synthesis"])
    model = _model(answer)
    env = body.get("env") or {}
    if stale(answer, body):
        wrong.append(
            f"it was answered by image {_short(model.get('image'))}, not by this release of {env.get('IMAGE')}"
        )
    quotes = model.get("engine") == "extractive"
    if quotes and not local and env.get("ENGINE") != "extractive":
        wrong.append("no model answered, but the extractive engine: is the image worker-slim, or ENGINE set?")
    elif not quotes:
        for key, wanted in (("id", env.get("MODEL_ID")), ("revision", env.get("MODEL_REVISION"))):
            if wanted and model.get(key) != wanted:
                wrong.append(f"its model's {key} is {_short(model.get(key))}, not {wanted}")
    if not text.strip():
        wrong.append("the synthesis is empty")
    known = {source["id"] for source in input_["sources"]}
    cited = citations.cited(text)
    if unknown := [source for source in cited if source not in known]:
        wrong.append(f"it cites {', '.join(unknown[:5])}, which it was not given")
    if text.strip() and not set(cited) & known:
        wrong.append("it cites none of the sources that it was given")
    if answer.get("finish_reason") not in ("stop", "length"):
        wrong.append(f"its finish_reason is {clean(str(answer.get('finish_reason')))[:40]}")
    if wrong:
        raise Rejected(f"the smoke job's answer is not good: {'; '.join(wrong)}")
    kept = {key: _short(model[key]) for key in ("id", "revision", "engine", "image", "release") if model.get(key)}
    return {"model": kept, "cited": cited}


def _short(value: object) -> str:
    return redact(" ".join(clean(str(value)).split()))[:200]
