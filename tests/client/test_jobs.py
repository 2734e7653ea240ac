"""The job client against a scripted server: what it repeats, what it never repeats, how long it waits, what it gives up.

No test waits: the client's clock and sleep are the test's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.client.support import KEY, Answer, Scripted, Tempo

import jobs
from common.problems import BAD_INPUT, REMOTE_FAILED, TRY_LATER, Problem
from jobs import CallFailed, JobClient, Unconfirmed
from settings import Endpoint

POLICY = {"ttl": 180_000, "executionTimeout": 60_000}
IDLE = {"jobs": {"completed": 3, "inQueue": 1}, "workers": {"ready": 1}}
QUEUED = {"status": "IN_QUEUE"}
RUNNING = {"status": "IN_PROGRESS"}
DONE = {"status": "COMPLETED", "output": {}}
# A server or proxy that has only trouble of its own.
TRANSIENT = [408, 425, 429, 500, 502, 503, 504, 524]
# Of these it is known that the request was not acted on.
REFUSED = [408, 425, 429, 503]
PERMANENT = {
    400: "the request was refused",
    401: "the key was refused; check RUNPOD_API_KEY in .env",
    402: "the account has no balance; add funds",
    403: "the key may not use this endpoint",
    404: "there is no endpoint ep; check RUNPOD_ENDPOINT_ID in .env",
    413: "the job is too large; lower n_results",
    422: "the request was refused",
}


@pytest.fixture
def server() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.close()


@pytest.fixture
def still() -> Tempo:
    """Time passes only by sleeping."""
    return Tempo()


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def job_client(server: Scripted, still: Tempo, warnings: list[str]) -> Iterator[JobClient]:
    endpoint = Endpoint(f"{server.base_url}/v2", "ep", KEY)
    client = JobClient(endpoint, clock=still.clock, sleep=still.sleep, warn=warnings.append)
    with client.session:
        yield client


def wait(client: JobClient, queue: float = 100, execution: float = 200) -> tuple[dict[str, Any], list[str]]:
    seen: list[str] = []
    view = client.wait("job-1", queue, execution, lambda view: seen.append(str(view.get("status"))))
    return view, seen


# --- calls that may be repeated --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", TRANSIENT)
def test_a_server_in_trouble_is_asked_again(
    job_client: JobClient, server: Scripted, still: Tempo, warnings: list[str], status: int
) -> None:
    server.script["health"] = [Answer({"error": "busy"}, status), Answer({"error": "busy"}, status), Answer(IDLE)]
    assert job_client.health() == IDLE
    assert len(still.sleeps) == 2
    assert all(0.1 < pause <= 1 for pause in still.sleeps)
    assert warnings[0].startswith(f"GET /health: HTTP {status} (busy); trying again in ")


@pytest.mark.parametrize(
    "body",
    [b"<html>Just a moment</html>", b"", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"a": 1' + b"0" * 5000],
)
def test_an_answer_that_is_no_json_object_is_asked_for_again(
    job_client: JobClient, server: Scripted, still: Tempo, body: bytes
) -> None:
    server.script["health"] = [Answer(body), Answer(IDLE)]
    assert job_client.health() == IDLE
    assert len(still.sleeps) == 1


@pytest.mark.parametrize(("status", "advice"), PERMANENT.items())
def test_a_refusal_is_explained_and_not_repeated(
    job_client: JobClient, server: Scripted, still: Tempo, status: int, advice: str
) -> None:
    server.script["health"] = server.script["run"] = [Answer({"error": f"no \x1b[31m{KEY[:3]}"}, status)]
    for call in (job_client.health, lambda: job_client.submit({}, POLICY, IDLE)):
        with pytest.raises(Problem, match=advice) as caught:
            call()
        assert caught.value.code == REMOTE_FAILED
        assert f"HTTP {status} (no rpa)" in str(caught.value)
    assert (len(server.asked("health")), len(server.asked("run")), still.sleeps) == (1, 1, [])


@pytest.mark.parametrize(
    ("sent", "least"), [("7", 7), ("0.5", 0.5), ("3600", 60), ("-5", 0), ("Mon, 23 Nov", 0), ("nan", 0)]
)
def test_retry_after_is_honoured_up_to_a_minute(
    job_client: JobClient, server: Scripted, still: Tempo, sent: str, least: float
) -> None:
    busy = Answer({}, 429, {"Retry-After": sent})
    server.script["health"] = [busy, Answer(IDLE)]
    server.script["status"] = [busy, Answer(DONE)]
    server.script["run"] = [busy, Answer({"id": "job-1"})]
    job_client.health()
    job_client.submit({}, POLICY, IDLE)
    wait(job_client)
    assert len(still.sleeps) == 3
    assert all(max(least, 0.1) <= pause <= max(least, 1) for pause in still.sleeps)


def test_a_server_that_stays_in_trouble_is_given_up_within_a_minute(
    job_client: JobClient, server: Scripted, still: Tempo
) -> None:
    server.script["health"] = [Answer({}, 503)]
    with pytest.raises(Problem, match="does not serve right now, try again later") as caught:
        job_client.health()
    assert caught.value.code == TRY_LATER
    assert 40 < sum(still.sleeps) <= jobs.RETRY_BUDGET
    assert max(still.sleeps) <= jobs.MAX_BACKOFF


def test_a_server_that_is_not_there_is_given_up(still: Tempo) -> None:
    client = JobClient(Endpoint("http://127.0.0.1:9/v2", "ep", KEY), clock=still.clock, sleep=still.sleep)
    for call in (client.health, lambda: client.submit({}, POLICY, IDLE)):
        with pytest.raises(Problem, match=r"no connection; http://127.0.0.1:9/v2 does not serve right now") as caught:
            call()
        assert caught.value.code == TRY_LATER


def test_a_server_that_does_not_answer_is_not_waited_for(
    job_client: JobClient, server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "READ_TIMEOUT", 0.1)
    server.script["health"] = [Answer(IDLE, seconds=0.5), Answer(IDLE)]
    assert job_client.health() == IDLE
    assert len(server.asked("health")) == 2


# --- the key ---------------------------------------------------------------------------------------------------------


def test_a_redirect_is_not_followed(job_client: JobClient, server: Scripted) -> None:
    other = Scripted()
    for status in (301, 302, 303, 307, 308):
        moved = Answer({}, status, {"Location": f"{other.base_url}/v2/ep/health"})
        server.script["health"] = server.script["run"] = [moved]
        for call in (job_client.health, lambda: job_client.submit({}, POLICY, IDLE)):
            with pytest.raises(Problem, match=f"HTTP {status}; the request was refused"):
                call()
    other.close()
    assert other.seen == []


def test_a_proxy_of_the_environment_never_sees_what_stays_on_this_machine(
    server: Scripted, still: Tempo, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Scripted()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.base_url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with JobClient(
        Endpoint(f"{server.base_url}/v2", "ep", KEY), clock=still.clock, sleep=still.sleep
    ).session as session:
        client = JobClient(Endpoint(f"{server.base_url}/v2", "ep", KEY), clock=still.clock, sleep=still.sleep)
        client.session = session
        client.health()
    proxy.close()
    assert (len(server.seen), proxy.seen) == (1, [])


def test_a_netrc_does_not_replace_the_key(
    job_client: JobClient, server: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    job_client.session.trust_env = True
    job_client.health()
    assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"


def test_an_endpoint_over_https_goes_through_the_proxy_of_the_environment() -> None:
    with JobClient(Endpoint("https://api.runpod.ai/v2", "ep", KEY)).session as session:
        assert session.trust_env


# --- sending a job ---------------------------------------------------------------------------------------------------


def test_a_job_is_sent_once_with_its_policy(job_client: JobClient, server: Scripted) -> None:
    assert job_client.submit({"prompt": "x"}, POLICY, IDLE) == "job-1"
    [request] = server.seen
    assert (request.method, request.path) == ("POST", "/v2/ep/run")
    assert request.body == {"input": {"prompt": "x"}, "policy": POLICY}


@pytest.mark.parametrize("status", REFUSED)
def test_a_job_that_was_not_taken_is_sent_again(job_client: JobClient, server: Scripted, status: int) -> None:
    server.script["run"] = [Answer({}, status), Answer({"id": "job-2"})]
    assert job_client.submit({}, POLICY, IDLE) == "job-2"
    assert server.asked("health") == []


FAILED_ANSWERS = [Answer({}, status) for status in (500, 502)]
LOST_ANSWERS = [
    *(Answer({}, status) for status in (504, 520, 524)),  # a gateway did not wait: the job may arrive later
    Answer(b"<html>"),
    Answer({"status": "IN_QUEUE"}),
    Answer({"id": 5}),
]


@pytest.mark.parametrize("answer", LOST_ANSWERS)
def test_a_job_whose_answer_is_lost_is_never_sent_again_whatever_the_counters_say(
    job_client: JobClient, server: Scripted, answer: Answer
) -> None:
    server.script["run"] = [answer, Answer({"id": "job-2"})]
    server.script["health"] = [Answer(IDLE)]
    with pytest.raises(Unconfirmed, match=r"may have been accepted\. It was not sent again"):
        job_client.submit({}, POLICY, IDLE)
    assert (len(server.asked("run")), server.asked("health")) == (1, [])


@pytest.mark.parametrize("answer", FAILED_ANSWERS)
def test_a_job_whose_fate_is_unknown_is_sent_again_only_if_the_counters_show_that_it_never_came(
    job_client: JobClient, server: Scripted, answer: Answer
) -> None:
    server.script["run"] = [answer, Answer({"id": "job-2"})]
    server.script["health"] = [Answer(IDLE)]
    assert job_client.submit({}, POLICY, IDLE) == "job-2"
    assert (len(server.asked("run")), len(server.asked("health"))) == (2, 2)


@pytest.mark.parametrize("answer", FAILED_ANSWERS)
@pytest.mark.parametrize(
    "health",
    [
        [Answer({"jobs": {"completed": 3, "inQueue": 2}})],
        [Answer({"jobs": {"completed": 4, "inQueue": 0}})],
        [Answer({"jobs": {"completed": 3, "inQueue": 1}}), Answer({"jobs": {"completed": 4, "inQueue": 1}})],
        [Answer({}, 503)],
        [Answer({"jobs": None})],
        [Answer({"jobs": {"completed": "3", "inQueue": [1]}})],
    ],
    ids=["one more", "another sum of one", "one more at the second look", "no counters", "null", "nonsense"],
)
def test_a_job_that_may_have_come_is_never_sent_again(
    job_client: JobClient, server: Scripted, answer: Answer, health: list[Answer]
) -> None:
    server.script["run"], server.script["health"] = [answer], health
    with pytest.raises(Problem, match=r"may have been accepted. It was not sent again;.* within 180 s") as caught:
        job_client.submit({}, POLICY, IDLE)
    assert caught.value.code == TRY_LATER
    assert len(server.asked("run")) == 1


def test_without_counters_from_before_a_lost_answer_is_final(job_client: JobClient, server: Scripted) -> None:
    server.script["run"] = [Answer({}, 500)]
    with pytest.raises(Problem, match="may have been accepted"):
        job_client.submit({}, POLICY, None)
    assert (len(server.asked("run")), server.asked("health")) == (1, [])


def test_a_job_is_sent_again_once_at_most(job_client: JobClient, server: Scripted) -> None:
    server.script["run"], server.script["health"] = [Answer({}, 502)], [Answer(IDLE)]
    with pytest.raises(Problem, match="may have been accepted"):
        job_client.submit({}, POLICY, IDLE)
    assert len(server.asked("run")) == 2


def test_a_job_that_runpod_would_not_take_is_not_sent(job_client: JobClient, server: Scripted) -> None:
    with pytest.raises(Problem, match=r"the job has \d+ bytes and RunPod takes 10000000; lower n_results") as caught:
        job_client.submit({"prompt": "é" * 2_000_000}, POLICY, IDLE)
    assert (caught.value.code, server.seen) == (BAD_INPUT, [])


# --- following a job -------------------------------------------------------------------------------------------------


def test_a_job_is_followed_to_its_end_with_growing_pauses(
    job_client: JobClient, server: Scripted, still: Tempo
) -> None:
    server.status(QUEUED, *[RUNNING] * 30, DONE)
    view, seen = wait(job_client, execution=600)
    assert view["status"] == "COMPLETED"
    assert seen == ["IN_QUEUE", *["IN_PROGRESS"] * 30, "COMPLETED"]
    assert still.sleeps[0] == 0.1
    assert still.sleeps == sorted(still.sleeps)
    assert still.sleeps[-1] == jobs.POLL[1]


@pytest.mark.parametrize("state", ["RUNNING", "WARMING_UP", None, 5, ["x"]])
def test_an_unknown_state_is_not_the_end(job_client: JobClient, server: Scripted, state: object) -> None:
    server.status({"status": state}, DONE)
    assert wait(job_client)[0]["status"] == "COMPLETED"


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "TIMED_OUT"])
def test_every_final_state_ends_the_wait(job_client: JobClient, server: Scripted, state: str) -> None:
    server.status({"status": state})
    assert wait(job_client)[0]["status"] == state
    assert server.asked("cancel") == []


def test_an_unknown_job_is_asked_for_a_while_and_cancelled_before_its_result_counts_as_expired(
    job_client: JobClient, server: Scripted, still: Tempo
) -> None:
    gone = Answer({"error": "job not found"}, 404)
    server.script["status"] = [gone, gone, Answer(RUNNING), gone, gone, Answer(DONE)]
    assert wait(job_client)[0]["status"] == "COMPLETED"
    server.script["status"] = [gone]
    still.sleeps.clear()
    with pytest.raises(Problem, match="job job-1 is no longer known: its result has expired") as caught:
        wait(job_client)
    assert caught.value.code == REMOTE_FAILED
    assert 15 <= sum(still.sleeps) < 25
    assert len(server.asked("cancel")) == 1


@pytest.mark.parametrize(
    "views", [[RUNNING], [QUEUED, RUNNING], [{"status": "WARMING_UP"}]], ids=["running", "queued first", "unknown"]
)
def test_a_job_that_does_not_end_is_cancelled_at_the_total_deadline(
    job_client: JobClient, server: Scripted, still: Tempo, views: list[dict[str, Any]]
) -> None:
    server.status(*views)
    with pytest.raises(Problem, match=r"did not end within 360 s \(last state: \w+\) and was cancelled") as caught:
        wait(job_client, queue=100, execution=200)
    assert caught.value.code == TRY_LATER
    assert 360 <= sum(still.sleeps) < 370
    assert [request.path for request in server.asked("cancel")] == ["/v2/ep/cancel/job-1"]


def test_a_server_that_stays_unreachable_ends_at_the_total_deadline_too(
    job_client: JobClient, server: Scripted, still: Tempo
) -> None:
    server.script["status"] = [Answer({}, 503)]
    with pytest.raises(Problem, match="last state: UNREACHABLE") as caught:
        wait(job_client)
    assert caught.value.code == TRY_LATER
    assert 360 <= sum(still.sleeps) < 370


@pytest.mark.parametrize(
    ("workers", "cause"),
    [
        ({}, "the endpoint has no workers. RunPod sets an idle endpoint's max workers to 0 after 7 days"),
        (None, "the endpoint has no workers"),
        ([1], "the endpoint has no workers"),
        ({"throttled": 2}, "its workers are throttled: no GPU of the wanted kind is free"),
        ({"unhealthy": 1}, "its workers are unhealthy: read their logs"),
        ({"initializing": 1}, "its workers are still starting; raise queue_timeout"),
        ({"ready": 1, "running": 1}, "its workers are busy or do not take jobs"),
    ],
)
def test_a_job_that_no_worker_takes_is_cancelled_with_the_cause(
    job_client: JobClient, server: Scripted, still: Tempo, workers: object, cause: str
) -> None:
    server.status(QUEUED)
    server.script["health"] = [Answer({"workers": workers})]
    with pytest.raises(Problem, match=r"job-1 waited 100 s for a worker and was cancelled: ") as caught:
        wait(job_client, queue=100)
    assert cause in str(caught.value)
    assert caught.value.code == TRY_LATER
    assert 100 <= sum(still.sleeps) < 110
    assert len(server.asked("cancel")) == 1


def test_the_cause_is_not_guessed_where_health_cannot_be_read(job_client: JobClient, server: Scripted) -> None:
    server.status(QUEUED)
    server.script["health"] = [Answer({}, 500)]
    with pytest.raises(Problem, match=r"the endpoint's health could not be read \(GET /health: HTTP 500\)"):
        wait(job_client)


def test_a_job_that_is_queued_again_may_wait_again(job_client: JobClient, server: Scripted, still: Tempo) -> None:
    server.status(*[QUEUED] * 20, RUNNING, *[QUEUED] * 20, DONE)
    assert wait(job_client, queue=105)[0]["status"] == "COMPLETED"
    assert sum(still.sleeps) > 150


def test_a_key_that_is_refused_halfway_ends_the_wait(
    job_client: JobClient, server: Scripted, warnings: list[str]
) -> None:
    server.script["status"] = [Answer(RUNNING), Answer({}, 401)]
    server.script["cancel"] = [Answer({}, 401)]
    with pytest.raises(Problem, match="the key was refused") as caught:
        wait(job_client)
    assert caught.value.code == REMOTE_FAILED
    assert warnings == ["job job-1 could not be cancelled; it ends by itself when its time to live is over"]


def test_a_job_that_could_not_be_cancelled_is_not_said_to_be(
    job_client: JobClient, server: Scripted, still: Tempo, warnings: list[str]
) -> None:
    server.status(QUEUED)
    server.script["cancel"] = [Answer({}, 503)]
    with pytest.raises(Problem, match="waited 10 s for a worker and could not be cancelled"):
        wait(job_client, queue=10)
    assert "job job-1 could not be cancelled" in warnings[-1]
    assert sum(still.sleeps) < 40


@pytest.mark.parametrize(("status", "cancelled"), [(200, True), (404, False), (401, False)])
def test_cancelling_says_whether_it_worked_and_never_raises(
    job_client: JobClient, server: Scripted, status: int, cancelled: bool
) -> None:
    server.script["cancel"] = [Answer({}, 500), Answer({}, status)]
    assert job_client.cancel("job-1") is cancelled


# --- what comes back -------------------------------------------------------------------------------------------------


def test_values_that_cannot_be_written_again_are_replaced(job_client: JobClient, server: Scripted) -> None:
    body = b'{"status": "COMPLETED", "a": NaN, "b": [1e999, -Infinity], "c": "x\\ud800y", "\\udfff": "\\ud83d\\ude00"}'
    server.script["status"] = [Answer(body)]
    view, _ = wait(job_client)
    assert view == {"status": "COMPLETED", "a": None, "b": [None, None], "c": "x?y", "?": "😀"}
    assert json.dumps(view, allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("view", "says"),
    [
        ({"error": "INVALID: prompt is empty"}, "INVALID: prompt is empty"),
        ({"error": '{"error_type": "x", "error_message": "out of memory"}'}, "out of memory"),
        ({"error": {"error": "no GPU"}}, "no GPU"),
        ({"error": {"code": 5}}, '{"code": 5}'),
        ({"error": "{broken"}, "{broken"),
        ({"error": "two\n  lines\x1b[31m\x07"}, "two lines"),
        ({"output": {"error": "inside"}}, "inside"),
        ({"error": "x" * 600}, "x" * 500),
        ({}, "no reason given"),
    ],
)
def test_a_failed_job_is_explained_in_one_clean_line(view: dict[str, Any], says: str) -> None:
    assert jobs.failure_text(view) == says


@pytest.mark.parametrize(
    "output",
    [
        None,
        "text",
        [],
        ["x"],
        5,
        {},
        {"synthesis": "x"},
        {"synthesis": "x", "model": "m"},
        {"synthesis": 5, "model": {}},
        [{"text": "half an "}],
        [{"synthesis": "", "model": {}}, {"text": "the answer is not the last"}],
        [[{"synthesis": "", "model": {}}]],
    ],
)
def test_an_output_that_is_not_what_the_wire_promises_is_none(output: object) -> None:
    assert jobs.synthesis_of({"status": "COMPLETED", "output": output}) is None


def test_the_output_that_the_wire_promises_is_taken_from_a_completed_job_only() -> None:
    output = {"synthesis": "", "model": {}}
    assert jobs.synthesis_of({"status": "COMPLETED", "output": output}) is output
    for state in ("FAILED", "CANCELLED", "TIMED_OUT"):
        assert jobs.synthesis_of({"status": state, "output": output}) is None


@pytest.mark.parametrize("before", [[], [{"text": "a "}, {"text": "b"}]])
def test_of_a_list_the_last_entry_is_the_output(before: list[object]) -> None:
    output = {"synthesis": "a b", "model": {}}
    assert jobs.synthesis_of({"status": "COMPLETED", "output": [*before, output]}) is output


@pytest.mark.parametrize(
    ("status", "transient"), [(0, True), (429, True), (500, True), (599, True), (400, False), (302, False)]
)
def test_a_failure_knows_whether_it_passes(status: int, transient: bool) -> None:
    assert CallFailed("x", status).transient is transient
