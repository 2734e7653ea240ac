"""The proof of a release: which answers count, and what is kept of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from endpoint import smoke

IMAGE = f"docker.io/you/worker@sha256:{'a' * 64}"
ENV = {"IMAGE": IMAGE, "RELEASE": "0123456789ab", "MODEL_ID": "you/model", "MODEL_REVISION": "c" * 40}
BODY = {"image": IMAGE, "env": ENV}
INPUT = smoke.job_input(Path(__file__).parents[2] / "prompts")
MODEL = {"id": "you/model", "revision": "c" * 40, "engine": "transformers", "image": IMAGE, "release": "0123456789ab"}
GOOD: dict[str, Any] = {
    "synthesis": "Naps improve alertness [S1], or do not [S2].",
    "finish_reason": "stop",
    "model": MODEL,
}


def check(answer: dict[str, Any], *, local: bool = False) -> dict[str, Any]:
    return smoke.check(answer, BODY, INPUT, local=local)


def test_a_good_answer_is_kept_in_short() -> None:
    answer = {**GOOD, "model": {**MODEL, "new": "hf_" + "a" * 30, "revision": "c" * 40}, "timings": {"x": float("nan")}}
    kept = check(answer)
    assert kept == {"model": MODEL, "cited": ["S1", "S2"]}
    json.dumps(kept, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"synthesis": "  "}, "empty"),
        ({"synthesis": "Naps improve alertness."}, "cites none"),
        ({"synthesis": "Naps [S1] improve [S9]."}, "cites S9"),
        ({"finish_reason": "cancelled"}, "finish_reason is cancelled"),
        ({"model": {**MODEL, "id": "you/other"}}, "model's id is you/other"),
        ({"model": {**MODEL, "revision": None}}, "model's revision is None"),
        ({"model": {**MODEL, "image": "x" * 9000}}, "not by this release"),
        ({"model": {**MODEL, "release": None}}, "not by this release"),
        ({"model": {**MODEL, "engine": "extractive"}}, "no model answered"),
        ({"model": None}, "not by this release"),
    ],
)
def test_an_answer_that_is_no_proof(change: dict[str, Any], says: str) -> None:
    with pytest.raises(smoke.Rejected, match=says) as rejected:
        check({**GOOD, **change})
    assert len(str(rejected.value)) < 2000


def test_quoting_is_enough_where_there_is_no_model() -> None:
    quoting = {**GOOD, "model": {**MODEL, "engine": "extractive", "id": "extractive", "revision": None}}
    assert check(quoting, local=True)["cited"] == ["S1", "S2"]
    env = {**ENV, "ENGINE": "extractive"}
    assert smoke.check(quoting, {**BODY, "env": env}, INPUT, local=False)


def test_an_answer_of_an_older_release_is_told_from_a_bad_one() -> None:
    assert not smoke.stale(GOOD, BODY)
    assert smoke.stale({**GOOD, "model": {**MODEL, "release": "another"}}, BODY)
    assert smoke.stale({**GOOD, "model": {**MODEL, "image": None}}, BODY)
    assert not smoke.stale({**GOOD, "model": {}}, {"image": "a/b:1", "env": {}})  # adopted: it never named itself


@pytest.mark.parametrize(
    ("view", "says"),
    [
        ({"status": "FAILED", "error": "OUT_OF_MEMORY: hm"}, "ended FAILED: OUT_OF_MEMORY"),
        ({"status": "TIMED_OUT"}, "ended TIMED_OUT: no reason"),
        ({"status": "COMPLETED"}, "without a synthesis"),
        ({"status": "COMPLETED", "output": []}, "without a synthesis"),
        ({"status": "COMPLETED", "output": [{"op": "ping"}]}, "without a synthesis"),
        ({"status": "COMPLETED", "output": {"synthesis": 3}}, "without a synthesis"),
    ],
)
def test_a_job_that_did_not_answer(view: dict[str, Any], says: str) -> None:
    with pytest.raises(smoke.Rejected, match=says):
        smoke.answer_of(view)


def test_the_last_entry_is_the_answer() -> None:
    assert smoke.answer_of({"status": "COMPLETED", "output": [{"text": "N"}, GOOD]}) is GOOD
    assert smoke.answer_of({"status": "COMPLETED", "output": GOOD}) is GOOD
