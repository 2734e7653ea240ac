"""local_runpod.platform: the life of a job, as a pure state machine under a clock of the test's own."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from local_runpod.faults import FAULT_KINDS, ROUTES, Refused
from local_runpod.platform import FINAL, Job, Platform

RETENTION = {False: 1800.0, True: 60.0}  # /run and /runsync, seconds


@pytest.fixture
def platform() -> Platform:
    return Platform("local", worker_timeout=30)


def submitted(platform: Platform, now: float = 0, **policy: object) -> Job:
    return platform.submit({"input": {"prompt": "q"}, "policy": policy}, now)


def running(platform: Platform, worker: str = "w", now: float = 0, **policy: object) -> Job:
    job = submitted(platform, now, **policy)
    assert [given["id"] for given in platform.take(worker, 1, now)] == [job.id]
    return job


def alive(platform: Platform, worker: str, until: float) -> None:
    """Let a worker ping every 10 s until this time."""
    for now in range(0, int(until) + 1, 10):
        platform.seen(worker, now)
        platform.tick(now)
    platform.seen(worker, until)


def gone(platform: Platform, job: Job, now: float) -> bool:
    try:
        platform.status(job.id, now)
    except Refused as refusal:
        return (refusal.status, str(refusal)) == (404, "job not found")
    return False


def health(platform: Platform, now: float) -> dict[str, int]:
    """The counts that are not 0."""
    both = platform.health(now)
    return {key: n for counts in both.values() for key, n in counts.items() if n}


# --- submitting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "the body must be an object with an `input`"),
        ([], "the body must be an object with an `input`"),
        ("x", "the body must be an object with an `input`"),
        ({}, "the body must be an object with an `input`"),
        ({"inputs": {}}, "the body must be an object with an `input`"),
        ({"input": {}, "policy": []}, "policy must be an object"),
        ({"input": {}, "policy": "fast"}, "policy must be an object"),
        ({"input": {}, "policy": 0}, "policy must be an object"),
        ({"input": {}, "policy": {"ttl": 9_999}}, "policy.ttl must be between 10000 and 604800000 milliseconds"),
        ({"input": {}, "policy": {"ttl": 604_800_001}}, "policy.ttl must be between"),
        ({"input": {}, "policy": {"ttl": "10000"}}, "policy.ttl must be between"),
        ({"input": {}, "policy": {"ttl": True}}, "policy.ttl must be between"),
        ({"input": {}, "policy": {"ttl": float("nan")}}, "policy.ttl must be between"),
        ({"input": {}, "policy": {"executionTimeout": 4_999}}, "policy.executionTimeout must be between 5000 and"),
        ({"input": {}, "policy": {"executionTimeout": 604_800_001}}, "policy.executionTimeout must be between"),
        ({"input": {}, "policy": {"executionTimeout": None}}, "policy.executionTimeout must be between"),
    ],
)
def test_a_body_that_the_platform_would_not_take_is_refused(platform: Platform, body: object, message: str) -> None:
    with pytest.raises(Refused) as refusal:
        platform.submit(body, 0)
    assert refusal.value.status == 400
    assert str(refusal.value).startswith(message)
    assert platform.jobs == {}


@pytest.mark.parametrize(
    ("policy", "ttl", "timeout"),
    [
        ({}, 86_400, 600),
        (None, 86_400, 600),
        ({"ttl": 10_000, "executionTimeout": 5_000}, 10, 5),
        ({"ttl": 604_800_000, "executionTimeout": 604_800_000}, 604_800, 604_800),
        ({"lowPriority": True}, 86_400, 600),
    ],
)
def test_a_job_gets_its_policy_or_the_defaults(platform: Platform, policy: object, ttl: float, timeout: float) -> None:
    job = platform.submit({"input": None, "policy": policy, "webhook": "https://x.example"}, 0)
    assert (job.ttl, job.execution_timeout, job.status) == (ttl, timeout, "IN_QUEUE")


def test_ids_are_unique_and_tell_sync_jobs_apart(platform: Platform) -> None:
    jobs = [platform.submit({"input": {}}, 0, sync=sync) for sync in (False, False, True, True)]
    assert len({job.id for job in jobs}) == 4
    assert [job.id.startswith("sync-") for job in jobs] == [False, False, True, True]


# --- the way of a job ------------------------------------------------------------------------------------------------


def test_a_job_is_queued_runs_and_completes_with_its_times_in_milliseconds(platform: Platform) -> None:
    job = submitted(platform, now=100)
    assert platform.status(job.id, 101) == {"id": job.id, "status": "IN_QUEUE"}
    assert platform.take("w", 1, 102.5) == [{"id": job.id, "input": {"prompt": "q"}}]
    assert platform.status(job.id, 103) == {
        "id": job.id,
        "status": "IN_PROGRESS",
        "delayTime": 2500,
        "workerId": "w",
    }
    platform.done("w", job.id, {"output": {"synthesis": "s"}}, 103.75)
    assert platform.status(job.id, 200) == {
        "id": job.id,
        "status": "COMPLETED",
        "delayTime": 2500,
        "executionTime": 1250,
        "workerId": "w",
        "output": {"synthesis": "s"},
    }


def test_a_workers_error_fails_the_job(platform: Platform) -> None:
    job = running(platform)
    platform.done("w", job.id, {"error": "INVALID_INPUT: prompt is missing", "output": "half"}, 1)
    view = platform.status(job.id, 1)
    assert (view["status"], view["error"]) == ("FAILED", "INVALID_INPUT: prompt is missing")
    assert "output" not in view


def test_a_result_without_output_completes_without_output(platform: Platform) -> None:
    job = running(platform)
    platform.done("w", job.id, {}, 1)
    assert platform.status(job.id, 1)["status"] == "COMPLETED"
    assert "output" not in platform.status(job.id, 1)


def test_jobs_are_given_out_in_order_and_only_once(platform: Platform) -> None:
    jobs = [submitted(platform) for _ in range(5)]
    assert [job["id"] for job in platform.take("a", 1, 0)] == [jobs[0].id]
    assert [job["id"] for job in platform.take("b", 3, 0)] == [job.id for job in jobs[1:4]]
    assert [job["id"] for job in platform.take("a", 9, 0)] == [jobs[4].id]
    assert platform.take("a", 9, 0) == []
    assert platform.take("a", 0, 0) == []


@pytest.mark.parametrize("result", [None, [], "text", 5])
def test_a_result_that_is_no_object_is_refused_and_the_job_goes_on(platform: Platform, result: object) -> None:
    job = running(platform)
    with pytest.raises(Refused, match="must be an object"):
        platform.done("w", job.id, result, 1)
    assert platform.status(job.id, 1)["status"] == "IN_PROGRESS"


def test_a_progress_update_ends_nothing(platform: Platform) -> None:
    job = running(platform)
    platform.done("w", job.id, {"status": "IN_PROGRESS", "output": "50 %"}, 1)
    assert platform.status(job.id, 1)["status"] == "IN_PROGRESS"
    platform.done("w", job.id, {"output": 1}, 2)
    assert platform.status(job.id, 2)["output"] == 1


def test_chunks_are_handed_out_once(platform: Platform) -> None:
    job = running(platform)
    for chunk in ({"output": "a"}, {"output": {"b": 1}}, {"no": "output"}, "text"):
        platform.chunk("w", job.id, chunk, 1)
    platform.chunk("other", job.id, {"output": "forged"}, 1)
    assert platform.stream(job.id, 1) == {"status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": {"b": 1}}]}
    platform.chunk("w", job.id, {"output": "c"}, 2)
    platform.done("w", job.id, {"output": "abc"}, 2)
    platform.chunk("w", job.id, {"output": "late"}, 3)
    assert platform.stream(job.id, 3) == {"status": "COMPLETED", "stream": [{"output": "c"}]}
    assert platform.stream(job.id, 3)["stream"] == []


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("end", ["COMPLETED", "FAILED", "CANCELLED"])
def test_a_result_is_kept_30_minutes_for_run_and_1_minute_for_runsync(platform: Platform, sync: bool, end: str) -> None:
    job = platform.submit({"input": {}}, 0, sync=sync)
    platform.take("w", 1, 0)
    if end == "CANCELLED":
        platform.cancel(job.id, 10)
    else:
        platform.done("w", job.id, {"error": "X: y"} if end == "FAILED" else {"output": 1}, 10)
    assert platform.status(job.id, 10 + RETENTION[sync])["status"] == end
    assert gone(platform, job, 10 + RETENTION[sync] + 1)


@pytest.mark.parametrize("taken", [False, True])
def test_a_job_is_forgotten_when_its_time_to_live_is_over(platform: Platform, taken: bool) -> None:
    job = running(platform, ttl=20_000) if taken else submitted(platform, ttl=20_000)
    assert platform.status(job.id, 20)["status"] in ("IN_QUEUE", "IN_PROGRESS")
    assert gone(platform, job, 20.1)
    assert platform.stops_for("w") == ([job.id] if taken else [])
    assert platform.take("other", 1, 21) == []
    platform.done("w", job.id, {"output": 1}, 21)
    assert gone(platform, job, 21)


def test_the_time_to_live_ends_a_job_that_has_run_less_than_its_time_limit(platform: Platform) -> None:
    job = submitted(platform, ttl=20_000, executionTimeout=60_000)
    platform.take("w", 1, 15)
    assert gone(platform, job, 21)


def test_a_job_that_runs_too_long_times_out_and_its_worker_is_told_once(platform: Platform) -> None:
    job = running(platform, executionTimeout=5_000)
    assert platform.status(job.id, 5)["status"] == "IN_PROGRESS"
    view = platform.status(job.id, 5.5)
    assert (view["status"], view["error"], view["executionTime"]) == ("TIMED_OUT", "job timed out", 5500)
    assert platform.stops_for("other") == []
    assert platform.stops_for("w") == [job.id]
    assert platform.stops_for("w") == []
    platform.done("w", job.id, {"output": "late"}, 6)
    assert platform.status(job.id, 6)["status"] == "TIMED_OUT"


def test_waiting_in_the_queue_does_not_count_as_execution(platform: Platform) -> None:
    job = submitted(platform, executionTimeout=5_000)
    platform.take("w", 1, 100)
    assert platform.status(job.id, 104)["status"] == "IN_PROGRESS"


def test_the_default_time_limit_is_ten_minutes(platform: Platform) -> None:
    job = running(platform)
    alive(platform, "w", 600)
    assert platform.status(job.id, 600)["status"] == "IN_PROGRESS"
    assert platform.status(job.id, 600.1)["status"] == "TIMED_OUT"


# --- cancel, retry, purge --------------------------------------------------------------------------------------------


def test_a_queued_job_that_is_cancelled_is_given_to_no_one(platform: Platform) -> None:
    job = submitted(platform)
    assert platform.cancel(job.id, 1) == {"id": job.id, "status": "CANCELLED"}
    assert platform.take("w", 1, 2) == []
    assert platform.status(job.id, 2) == {"id": job.id, "status": "CANCELLED"}


def test_a_running_job_that_is_cancelled_is_stopped_and_its_late_result_dropped(platform: Platform) -> None:
    job = running(platform)
    assert platform.cancel(job.id, 1)["status"] == "CANCELLED"
    assert platform.stops_for("w") == [job.id]
    platform.chunk("w", job.id, {"output": "late"}, 2)
    platform.done("w", job.id, {"output": "late"}, 2)
    view = platform.status(job.id, 2)
    assert (view["status"], view["executionTime"]) == ("CANCELLED", 1000)
    assert "output" not in view
    assert platform.stream(job.id, 2)["stream"] == []


def test_cancelling_a_finished_job_changes_nothing(platform: Platform) -> None:
    job = running(platform)
    platform.done("w", job.id, {"output": 1}, 1)
    assert platform.cancel(job.id, 2) == {"id": job.id, "status": "COMPLETED"}
    assert platform.status(job.id, 3)["output"] == 1
    assert platform.stops_for("w") == []


@pytest.mark.parametrize("call", ["status", "stream", "cancel", "retry"])
def test_a_job_that_nobody_knows_is_not_found(platform: Platform, call: str) -> None:
    with pytest.raises(Refused) as refusal:
        getattr(platform, call)("no-such-job", 0)
    assert refusal.value.status == 404


@pytest.mark.parametrize("end", ["FAILED", "TIMED_OUT"])
def test_a_failed_or_timed_out_job_can_be_retried_and_starts_afresh(platform: Platform, end: str) -> None:
    job = running(platform, ttl=100_000, executionTimeout=5_000)
    platform.chunk("w", job.id, {"output": "old"}, 1)
    if end == "FAILED":
        platform.done("w", job.id, {"error": "X: y"}, 4)
    assert platform.status(job.id, 6)["status"] == end
    assert platform.retry(job.id, 90) == {"id": job.id, "status": "IN_QUEUE"}
    assert platform.status(job.id, 150) == {"id": job.id, "status": "IN_QUEUE"}  # its time to live began again
    assert platform.stream(job.id, 150)["stream"] == []
    platform.take("w", 1, 151)
    platform.done("w", job.id, {"output": "new"}, 152)
    view = platform.status(job.id, 152)
    assert (view["status"], view["output"], view["delayTime"]) == ("COMPLETED", "new", 61_000)
    assert "error" not in view
    assert "retries" not in view


@pytest.mark.parametrize("state", ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "CANCELLED"])
def test_any_other_job_cannot_be_retried(platform: Platform, state: str) -> None:
    job = submitted(platform) if state == "IN_QUEUE" else running(platform)
    if state == "COMPLETED":
        platform.done("w", job.id, {"output": 1}, 1)
    elif state == "CANCELLED":
        platform.cancel(job.id, 1)
    with pytest.raises(Refused, match=f"job is {state}: only FAILED and TIMED_OUT") as refusal:
        platform.retry(job.id, 2)
    assert refusal.value.status == 400
    assert platform.status(job.id, 2)["status"] == state


def test_a_purge_drops_what_waits_and_leaves_what_runs(platform: Platform) -> None:
    first = running(platform)
    platform.arm({"kind": "stuck"})
    waiting = [submitted(platform) for _ in range(3)]
    assert platform.purge(1) == {"removed": 3, "status": "completed"}
    assert {platform.status(job.id, 1)["status"] for job in waiting} == {"CANCELLED"}
    assert platform.status(first.id, 1)["status"] == "IN_PROGRESS"
    assert platform.take("w", 9, 1) == []
    assert platform.purge(1)["removed"] == 0


# --- workers ---------------------------------------------------------------------------------------------------------


def test_health_counts_jobs_and_workers(platform: Platform) -> None:
    assert health(platform, 0) == {}
    platform.seen("idle", 0)
    done, failed, _ = (running(platform, worker) for worker in ("a", "a", "b"))
    submitted(platform)
    platform.done("a", done.id, {"output": 1}, 1)
    platform.done("a", failed.id, {"error": "X: y"}, 1)
    assert health(platform, 1) == {
        "completed": 1,
        "failed": 1,
        "inProgress": 1,
        "inQueue": 1,
        "idle": 2,
        "ready": 3,
        "running": 1,
    }


def test_a_silent_worker_is_unhealthy_until_it_is_heard_again(platform: Platform) -> None:
    platform.seen("w", 0)
    assert health(platform, 30) == {"idle": 1, "ready": 1}
    assert health(platform, 31) == {"unhealthy": 1}
    platform.seen("w", 32)
    assert health(platform, 33) == {"idle": 1, "ready": 1}


def test_a_lost_workers_job_is_given_out_once_more_before_all_others(platform: Platform) -> None:
    job = running(platform, "w1")
    platform.chunk("w1", job.id, {"output": "half"}, 1)
    later = submitted(platform, 10)
    assert platform.status(job.id, 31.5) == {"id": job.id, "status": "IN_QUEUE"}
    assert platform.take("w2", 1, 40)[0]["id"] == job.id
    assert platform.stream(job.id, 40)["stream"] == []
    assert health(platform, 40) == {
        "retried": 1,
        "inProgress": 1,
        "inQueue": 1,
        "ready": 1,
        "running": 1,
        "unhealthy": 1,
    }
    platform.done("w1", job.id, {"output": "late"}, 41)
    assert platform.status(job.id, 41)["status"] == "IN_PROGRESS"
    platform.done("w2", job.id, {"output": "good"}, 42)
    view = platform.status(job.id, 42)
    assert (view["output"], view["workerId"], view["retries"]) == ("good", "w2", 1)
    assert (view["delayTime"], view["executionTime"]) == (8500, 2000)
    assert platform.take("w2", 1, 42)[0]["id"] == later.id


def test_a_job_whose_second_worker_is_lost_too_fails(platform: Platform) -> None:
    job = running(platform, "w1")
    platform.lose_worker("w1", 1)
    platform.take("w2", 1, 2)
    platform.lose_worker("w2", 3)
    view = platform.status(job.id, 3)
    assert (view["status"], view["error"], view["retries"]) == ("FAILED", "job timed out after 1 retries", 1)
    assert health(platform, 3) == {"retried": 1, "failed": 1}
    assert platform.take("w3", 1, 4) == []


def test_a_worker_whose_process_ended_is_forgotten_with_all_its_jobs_requeued(platform: Platform) -> None:
    jobs = [running(platform, "w") for _ in range(2)]
    other = running(platform, "other")
    platform.lose_worker("w", 1)
    platform.lose_worker("never-seen", 1)
    assert [platform.status(job.id, 1)["status"] for job in jobs] == ["IN_QUEUE", "IN_QUEUE"]
    assert platform.status(other.id, 1)["status"] == "IN_PROGRESS"
    assert health(platform, 1) == {"retried": 2, "inQueue": 2, "inProgress": 1, "ready": 1, "running": 1}


@pytest.mark.parametrize("result", [{"output": 1}, {"error": "X: y"}])
def test_a_result_for_a_job_of_another_worker_is_ignored(platform: Platform, result: dict[str, object]) -> None:
    job = running(platform, "w1")
    platform.done("w2", job.id, result, 1)
    platform.done("w1", "no-such-job", result, 1)
    assert platform.status(job.id, 1)["status"] == "IN_PROGRESS"


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, 'a fault is an object, for example {"kind": "http"'),
        ([], "a fault is an object"),
        ({}, "unknown kind; known are http, html, slow, lost_answer"),
        ({"kind": "explode"}, "unknown kind; known are"),
        ({"kind": ["http"]}, "unknown kind; known are"),
        ({"kind": None}, "unknown kind; known are"),
        ({"kind": "http", "code": 500}, "unknown key code; known are kind, route, times, status, retry_after, seconds"),
        ({"kind": "http", "route": "/run"}, "unknown route; known are run, runsync, status"),
        ({"kind": "http", "route": ["run"]}, "unknown route; known are"),
        ({"kind": "http", "times": 0}, "times must be a whole number between 1 and 10000"),
        ({"kind": "http", "times": 1.5}, "times must be a whole number"),
        ({"kind": "http", "times": None}, "times must be a whole number"),
        ({"kind": "http", "times": True}, "times must be a whole number"),
        ({"kind": "http", "status": 200}, "status must be a whole number between 400 and 599"),
        ({"kind": "http", "status": 429.5}, "status must be a whole number"),
        ({"kind": "http", "status": "429"}, "status must be a whole number"),
        ({"kind": "http", "status": None}, "status must be a whole number"),
        ({"kind": "slow", "seconds": -1}, "seconds must be a number between 0 and 86400"),
        ({"kind": "slow", "seconds": None}, "seconds must be a number"),
        ({"kind": "slow", "seconds": float("nan")}, "seconds must be a number"),
        ({"kind": "http", "retry_after": 601}, "retry_after must be a number between 0 and 600"),
        ({"kind": "http", "retry_after": "soon"}, "retry_after must be a number"),
        ({"kind": "fail", "image": 5}, "image must be text"),
        ({"kind": "unhealthy", "message": ["no"]}, "message must be text"),
    ],
)
def test_a_fault_that_is_not_understood_is_refused_with_what_is_known(
    platform: Platform, fault: object, message: str
) -> None:
    with pytest.raises(Refused) as refusal:
        platform.arm(fault)
    assert refusal.value.status == 400
    assert str(refusal.value).startswith(message)
    assert platform.faults == []


@pytest.mark.parametrize("kind", FAULT_KINDS)
@pytest.mark.parametrize("route", ["*", *ROUTES])
def test_every_kind_can_be_armed_and_what_is_shown_can_be_armed_again(
    platform: Platform, kind: str, route: str
) -> None:
    fault = platform.arm({"kind": kind, "route": route, "times": 2})
    assert platform.arm(vars(fault)) == fault
    assert len(platform.faults) == 2


def test_the_examples_of_the_documentation_arm_every_kind(platform: Platform) -> None:
    page = (Path(__file__).parents[2] / "docs" / "local-runpod.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*-d '(\{.*?\})'` \|$", page, re.MULTILINE)
    assert [kind for kind, _ in rows] == list(FAULT_KINDS)
    for kind, example in rows:
        assert platform.arm(json.loads(example)).kind == kind
    assert all(f"/{route}" in page and f"`{route}`" in page for route in ROUTES)


def test_a_fault_strikes_its_route_as_often_as_it_was_armed_for(platform: Platform) -> None:
    platform.arm({"kind": "http", "route": "run", "times": 2, "status": 429})
    assert platform.route_faults("status") == {}
    assert [bool(platform.route_faults("run")) for _ in range(3)] == [True, True, False]
    assert platform.faults == []


def test_faults_of_one_kind_strike_in_the_order_in_which_they_were_armed(platform: Platform) -> None:
    for status in (429, 500):
        platform.arm({"kind": "http", "status": status})
    assert [platform.route_faults("run")["http"].status for _ in range(2)] == [429, 500]


def test_faults_of_several_kinds_strike_one_request_together(platform: Platform) -> None:
    for kind in ("slow", "http"):
        platform.arm({"kind": kind})
    assert list(platform.route_faults("health")) == ["http", "slow"]


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "status"])
def test_a_made_up_state_is_left_for_the_next_status(platform: Platform, route: str) -> None:
    platform.arm({"kind": "unknown_state"})
    assert platform.route_faults(route) == {}
    assert list(platform.route_faults("status")) == ["unknown_state"]


def test_job_faults_do_not_strike_requests(platform: Platform) -> None:
    kinds = ("stuck", "crash", "fail", "no_output", "expire")
    for kind in kinds:
        platform.arm({"kind": kind})
    assert all(platform.route_faults(route) == {} for route in ROUTES)
    assert [fault.kind for fault in platform.faults] == list(kinds)


def test_a_stuck_job_waits_for_ever_while_the_next_one_runs(platform: Platform) -> None:
    platform.arm({"kind": "stuck"})
    stuck, free = submitted(platform, ttl=50_000), submitted(platform)
    assert [job["id"] for job in platform.take("w", 9, 1)] == [free.id]
    assert health(platform, 10)["inQueue"] == 1
    assert platform.status(stuck.id, 49)["status"] == "IN_QUEUE"
    assert gone(platform, stuck, 51)


def test_a_crash_loses_the_job_twice(platform: Platform) -> None:
    platform.arm({"kind": "crash"})
    job = running(platform, "w1")
    platform.done("w1", job.id, {"output": 1}, 1)
    assert platform.status(job.id, 1) == {"id": job.id, "status": "IN_QUEUE"}
    platform.take("w1", 1, 2)
    platform.done("w1", job.id, {"output": 1}, 3)
    assert platform.status(job.id, 3)["status"] == "FAILED"
    platform.retry(job.id, 4)
    platform.take("w1", 1, 5)
    platform.done("w1", job.id, {"output": 1}, 6)
    assert platform.status(job.id, 6)["status"] == "COMPLETED"


@pytest.mark.parametrize(
    ("kind", "status", "extra"),
    [("fail", "FAILED", {"error": "INTERNAL: fault injected"}), ("no_output", "COMPLETED", {})],
)
def test_a_fault_decides_how_the_next_job_ends(
    platform: Platform, kind: str, status: str, extra: dict[str, object]
) -> None:
    platform.arm({"kind": kind})
    first, second = running(platform), running(platform)
    for job in (first, second):
        platform.done("w", job.id, {"output": 1}, 1)
    base = {"delayTime": 0, "executionTime": 1000, "workerId": "w"}
    assert platform.status(first.id, 1) == {"id": first.id, "status": status, **base, **extra}
    assert platform.status(second.id, 1) == {"id": second.id, "status": "COMPLETED", **base, "output": 1}


def test_an_expired_result_is_gone_at_once(platform: Platform) -> None:
    platform.arm({"kind": "expire"})
    job = running(platform)
    platform.done("w", job.id, {"output": 1}, 1)
    assert gone(platform, job, 1)
    assert health(platform, 1)["completed"] == 1


# --- any order of events ---------------------------------------------------------------------------------------------

workers = st.sampled_from(["w1", "w2", "w3"])


class AnyOrder(RuleBasedStateMachine):
    """Clients, workers and time act in any order; the promises below hold after every step."""

    jobs: Bundle[str] = Bundle("jobs")
    held: Bundle[tuple[str, str]] = Bundle("held")  # (worker, job) as the worker remembers it

    @initialize()
    def start(self) -> None:
        self.platform = Platform("local", worker_timeout=30)
        self.now = 0.0
        self.stuck: set[str] = set()
        self.ended: dict[str, str] = {}  # id: its final state
        self.ends = {"completed": 0, "failed": 0}

    @rule(
        target=jobs,
        sync=st.booleans(),
        stuck=st.booleans(),
        policy=st.sampled_from([{}, {"ttl": 20_000, "executionTimeout": 5_000}]),
    )
    def submit(self, sync: bool, stuck: bool, policy: dict[str, int]) -> str:
        if stuck:
            self.platform.arm({"kind": "stuck"})
        job = self.platform.submit({"input": {}, "policy": policy}, self.now, sync=sync)
        if stuck:
            self.stuck.add(job.id)
        return job.id

    @rule(target=held, worker=workers, limit=st.integers(0, 3))
    def take(self, worker: str, limit: int) -> Any:
        given = self.platform.take(worker, limit, self.now)
        assert len(given) <= limit
        assert not {job["id"] for job in given} & self.stuck
        return multiple(*((worker, job["id"]) for job in given))

    @rule(pair=consumes(held), result=st.sampled_from([{"output": 1}, {}, {"error": "X: y"}]))
    def done(self, pair: tuple[str, str], result: dict[str, object]) -> None:
        self.platform.done(*pair, result, self.now)

    @rule(pair=held, worker=workers)
    def answer_too_often(self, pair: tuple[str, str], worker: str) -> None:
        self.platform.done(worker, pair[1], {"status": "IN_PROGRESS"}, self.now)
        self.platform.chunk(worker, pair[1], {"output": "c"}, self.now)

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        known = job in self.platform.jobs
        with nullcontext() if known else pytest.raises(Refused, match="job not found"):
            assert self.platform.cancel(job, self.now)["status"] in FINAL

    @rule(job=jobs)
    def retry(self, job: str) -> None:
        before = self.ended.get(job)
        try:
            self.platform.retry(job, self.now)
        except Refused:
            assert job not in self.platform.jobs or self.platform.jobs[job].status not in ("FAILED", "TIMED_OUT")
        else:
            assert before in ("FAILED", "TIMED_OUT")
            del self.ended[job]

    @rule(kind=st.sampled_from(["crash", "fail", "no_output", "expire"]))
    def arm(self, kind: str) -> None:
        self.platform.arm({"kind": kind})

    @rule()
    def purge(self) -> None:
        self.platform.purge(self.now)
        assert not any(job.status == "IN_QUEUE" for job in self.platform.jobs.values())

    @rule(worker=workers)
    def crash(self, worker: str) -> None:
        self.platform.lose_worker(worker, self.now)

    @rule(seconds=st.sampled_from([0.5, 6, 16, 31, 61, 1801]), pinging=st.sets(workers))
    def wait(self, seconds: float, pinging: set[str]) -> None:
        self.now += seconds
        for worker in sorted(pinging):
            self.platform.seen(worker, self.now)
        self.platform.tick(self.now)

    def teardown(self) -> None:
        """Two days later nothing is left but counts."""
        self.platform.tick(self.now + 172_800)
        self.platform.tick(self.now + 345_600)
        assert self.platform.jobs == {}
        assert not self.platform.queue

    @invariant()
    def the_queue_holds_each_job_that_waits_and_is_not_stuck_once(self) -> None:
        waiting = {job.id for job in self.platform.jobs.values() if job.status == "IN_QUEUE"}
        assert sorted(self.platform.queue) == sorted(waiting - self.stuck)

    @invariant()
    def a_final_state_stays(self) -> None:
        for job in self.platform.jobs.values():
            assert self.ended.get(job.id, job.status) == job.status
            if job.status in FINAL:
                self.ended[job.id] = job.status

    @invariant()
    def what_runs_has_a_worker_that_is_known_and_at_most_two_tries(self) -> None:
        for job in self.platform.jobs.values():
            assert (job.worker in self.platform.workers) or job.status != "IN_PROGRESS"
            assert job.dispatches <= 2

    @invariant()
    def a_view_fits_its_state(self) -> None:
        for job in self.platform.jobs.values():
            view = job.view(self.now)
            assert view["status"] in {*FINAL, "IN_QUEUE", "IN_PROGRESS"}
            assert view.get("delayTime", 0) >= 0
            assert view.get("executionTime", 0) >= 0
            assert ("error" in view) == (job.status in ("FAILED", "TIMED_OUT"))
            assert "output" not in view or job.status == "COMPLETED"
            assert ("workerId" in view) <= (job.status != "IN_QUEUE")

    @invariant()
    def the_counts_are_consistent(self) -> None:
        before = dict(self.platform.counts)
        shown = self.platform.health(self.now)
        states = [job.status for job in self.platform.jobs.values()]
        assert shown["jobs"]["inQueue"] == states.count("IN_QUEUE")
        assert shown["jobs"]["inProgress"] == states.count("IN_PROGRESS")
        assert shown["workers"]["ready"] == shown["workers"]["idle"] + shown["workers"]["running"]
        assert shown["workers"]["ready"] + shown["workers"]["unhealthy"] == len(self.platform.workers)
        for key, kept in (("completed", ["COMPLETED"]), ("failed", ["FAILED", "TIMED_OUT"])):
            assert shown["jobs"][key] >= sum(states.count(state) for state in kept)
            assert shown["jobs"][key] >= self.ends[key]
            self.ends[key] = before[key]


def test_the_promises_hold_under_any_order_of_events() -> None:
    run_state_machine_as_test(AnyOrder, settings=settings(max_examples=150, stateful_step_count=40))
