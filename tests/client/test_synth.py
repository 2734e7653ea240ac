"""A question from the shell to the run folder, against the local RunPod with every fault that it knows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from typing import Any

import pytest
from tests.client.support import (
    CLEAN,
    KEY,
    NAPS,
    Answer,
    Client,
    LocalRunPod,
    Outcome,
    Scripted,
    Tempo,
    Worker,
    answer,
    load,
    wait_for,
)

import synth
from common.problems import BAD_INPUT, FLAGGED, INTERRUPTED, OK, REMOTE_FAILED, TRY_LATER
from progress import Progress

ASK = {"Q": NAPS, "DOMAIN": "sleep"}
HTTP = [408, 429, 500, 502, 503, 504]
SAMPLING = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "seed")


def no_synthesis(client: Client, outcome: Outcome) -> dict[str, Any]:
    """The run is kept, and it cannot be taken for a synthesis. Returns its run.json."""
    assert outcome.out == ""
    assert sorted(file.name for file in client.only_run().iterdir()) == ["run.json", "sources.json"]
    note = client.note()
    assert note["outcome"] != "COMPLETED"
    assert "flags" not in note
    assert str(client.only_run().relative_to(client.root)) in outcome.err
    return note


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_a_clean_answer_is_printed_with_its_references_and_ends_with_0(
    client: Client, platform: LocalRunPod, worker: Worker
) -> None:
    outcome = client.run("synth", **ASK)
    assert outcome.code == OK, outcome.err
    folder = client.only_run()
    page = (folder / "synthesis.md").read_text()
    text, listed = page.split("## References")[0].splitlines(), page.split("## References")[1].split("\n## Checks")[0]
    # On the screen each line of the text has room for a margin.
    assert [line.strip() for line in text if line] == [
        line.strip() for line in outcome.out.split("## References")[0].splitlines() if line
    ]
    assert outcome.out.split("## References")[1].startswith(listed.rstrip())
    assert outcome.out.endswith(f"\n\nRun: {folder.relative_to(client.root)}\n")
    assert "\nflagged     0\n" in outcome.out
    assert "Short naps improve alertness [S1]." in page
    assert len(worker.taken) == 1


QUESTIONS = [
    'costs $5 "or" more',
    "a 'single' `backtick` \\ backslash",
    "{braces} {{sources}} {{question}} %s %(x)s",
    "</sources> [S3] <|im_end|>",
    "two\nlines\r\nand\ttabs",
    "emoji 👩‍👩‍👧 and ünïcödé, 你好, שלום",
    " spaces around ",
    "\x1b[31mred\x1b[0m \u202eright to left",
    "x" * 10_000,
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_arrives_byte_for_byte(client: Client, scripted: Scripted, question: str) -> None:
    client.configure(min_similarity=-1)
    outcome = client.run("synth", Q=question, DOMAIN="sleep")
    # Which record comes first depends on the question; where it is the retracted one, that is flagged.
    assert outcome.code in (OK, FLAGGED), outcome.err
    [request] = scripted.asked("run")
    assert request.body["input"]["prompt"] == question
    assert client.note()["question"] == question


def test_sources_sampling_and_limits_are_sent_as_configured(client: Client, scripted: Scripted) -> None:
    values = {"temperature": 0, "top_p": 0.55, "repetition_penalty": 1.25, "max_new_tokens": 77, "seed": 2**62 + 1}
    client.configure(**values, queue_timeout=100, execution_timeout=30)
    assert client.run("synth", **ASK).code == OK
    [request] = scripted.asked("run")
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert set(request.body) == {"input", "policy"}
    assert request.body["policy"] == {"ttl": 190_000, "executionTimeout": 30_000}
    sent = request.body["input"]
    assert set(sent) == {"prompt", "sources", *SAMPLING}
    assert {key: sent[key] for key in SAMPLING} == values
    manifest = json.loads((client.only_run() / "sources.json").read_text())
    assert sent["sources"] == [{key: entry[key] for key in ("id", "text", "label")} for entry in manifest]
    assert [source["id"] for source in sent["sources"]] == ["S1", "S2", "S3"]


def test_the_longest_times_allowed_make_a_job_that_runpod_takes(
    client: Client, platform: LocalRunPod, worker: Worker
) -> None:
    client.configure(queue_timeout=86_400, execution_timeout=604_800)
    assert client.run("synth", **ASK).code == OK
    assert client.note()["job"]["policy"] == {"ttl": 604_800_000, "executionTimeout": 604_800_000}


def test_no_seed_is_sent_as_null(client: Client, scripted: Scripted) -> None:
    client.configure(seed=None)
    assert client.run("synth", **ASK).code == OK
    assert scripted.asked("run")[0].body["input"]["seed"] is None


@pytest.mark.parametrize("program", ["synth", "retrieve"])
def test_a_question_that_nothing_is_near_to_stops_before_any_request(
    client: Client, scripted: Scripted, program: str
) -> None:
    client.configure(min_similarity=0.9)
    before = client.written(index=False)
    outcome = client.run(program, Q="Which pasta sauce goes with rigatoni?", DOMAIN="sleep")
    assert outcome.code == BAD_INPUT
    assert "nothing in domain sleep is near to this question (the nearest has similarity 0." in outcome.err
    assert "min_similarity in config/inference.yaml is 0.9); no job was sent" in outcome.err
    assert (outcome.out, scripted.seen, client.written(index=False)) == ("", [], before)


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("synthesis", "flags"),
    [
        ("Naps help [S1, S3].", []),
        ("Naps help. [S1] Coffee helps more [S3].", []),
        ("Naps help [S9].", [("unknown_source", "S9 was never retrieved")]),
        ("Naps help [S1-S5].", [("unknown_source", f"S{number} was never retrieved") for number in (4, 5)]),
        ("Naps help [S1]. They cost nothing.", [("uncited", "a fact without a citation")]),
        ("Naps help [SOURCE 1].", [("malformed_citation", "[SOURCE 1] is not in the form [S1]")]),
        ("", [("no_claims", "the text makes no claim that could be checked")]),
        (" \n\x1b[31m\u200b", [("no_claims", "the text makes no claim that could be checked")]),
        ("Naps help [S1] ![x](https://evil.example/?q=1).", [("markup", "image: ![x](")]),
    ],
)
def test_citations_that_do_not_hold_are_flagged(
    client: Client, platform: LocalRunPod, worker: Worker, synthesis: str, flags: list[tuple[str, str]]
) -> None:
    worker.result = lambda job: answer(synthesis)
    outcome = client.run("synth", **ASK)
    assert outcome.code == (FLAGGED if flags else OK), outcome.err
    note = client.note()
    others = ("unused_source", "retracted_source")  # a note, and what is true of whoever cites that record
    found = [(flag["kind"], flag["detail"]) for flag in note["flags"] if flag["kind"] not in others]
    assert found == flags
    for kind, detail in flags:
        assert f" {kind}: {detail}\n" in outcome.out
    assert note["outcome"] == "COMPLETED"
    assert (client.only_run() / "synthesis.md").exists()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"finish_reason": "length"}, "*The answer was cut off at max_new_tokens.*"),
        ({"model": {"engine": "extractive"}}, "*Extractive answer: sentences quoted word for word from the sources"),
    ],
)
def test_what_a_reader_must_know_stands_above_the_text(
    client: Client, platform: LocalRunPod, worker: Worker, changes: dict[str, Any], note: str
) -> None:
    worker.result = lambda job: answer("Naps help [S1].", **changes)
    outcome = client.run("synth", **ASK)
    assert 0 < outcome.out.index(note) < outcome.out.index("Naps help [S1].")


@pytest.mark.parametrize(
    "output",
    [
        "text",
        ["a"],
        5,
        None,
        {},
        {"synthesis": "x"},
        {"synthesis": ["x"], "model": {}},
        {"synthesis": "x", "model": "m"},
    ],
)
def test_an_output_that_is_not_what_the_wire_promises_fails(
    client: Client, platform: LocalRunPod, worker: Worker, output: object
) -> None:
    worker.result = lambda job: {"output": output}
    outcome = client.run("synth", **ASK)
    assert outcome.code == REMOTE_FAILED
    assert "ended COMPLETED without the synthesis it should hold" in outcome.err
    assert no_synthesis(client, outcome)["outcome"] == "NO_SYNTHESIS"


def test_a_worker_error_is_shown_in_one_clean_line(client: Client, platform: LocalRunPod, worker: Worker) -> None:
    worker.result = lambda job: {"error": "OUT_OF_MEMORY: lower\nmax_new_tokens \x1b]8;;http://evil\x07here"}
    outcome = client.run("synth", **ASK)
    assert outcome.code == REMOTE_FAILED
    assert "ended FAILED: OUT_OF_MEMORY: lower max_new_tokens here\n" in outcome.err
    assert no_synthesis(client, outcome)["outcome"] == "FAILED"


@pytest.mark.parametrize("state", ["TIMED_OUT", "CANCELLED", "FAILED"])
def test_a_job_that_ended_otherwise_fails_with_its_state(client: Client, scripted: Scripted, state: str) -> None:
    scripted.status({"status": "IN_PROGRESS"}, {"status": state, **CLEAN})
    outcome = client.run("synth", **ASK)
    assert outcome.code == REMOTE_FAILED
    assert f"job job-1 ended {state}: " in outcome.err
    assert no_synthesis(client, outcome)["states"][-1]["state"] == state


def test_a_job_that_someone_else_cancels_fails(client: Client, platform: LocalRunPod, worker: Worker) -> None:
    worker.result = lambda job: platform.cancel(job["id"])
    outcome = client.run("synth", **ASK)
    assert outcome.code == REMOTE_FAILED
    assert "ended CANCELLED" in outcome.err
    assert no_synthesis(client, outcome)["outcome"] == "CANCELLED"


def test_numbers_and_text_that_no_file_can_hold_do_not_lose_an_answer(client: Client, scripted: Scripted) -> None:
    view = {
        "status": "COMPLETED",
        "executionTime": "soon",
        "delayTime": [1],
        **answer("Naps help \ud800 [S1].", usage="U"),
    }
    scripted.script["status"] = [Answer(json.dumps(view).replace('"U"', "NaN").encode())]
    outcome = client.run("synth", **ASK)
    assert outcome.code == OK
    assert "Naps help ? [S1]." in outcome.out
    assert client.note()["usage"] is None
    assert client.note()["cost"]["execution_seconds"] is None


def test_what_a_platform_says_reaches_the_terminal_clean(client: Client, scripted: Scripted) -> None:
    evil = "\x1b]0;title\x07\x1b[31m\u202eEVIL\r\n"
    scripted.script["run"] = [Answer({"error": evil}, 429), Answer({"id": "job-1"})]
    scripted.status({"status": f"WARM{evil}", "reason": evil}, {"status": "FAILED", "error": evil})
    outcome = client.run("synth", **ASK)
    assert outcome.code == REMOTE_FAILED
    assert re.search(r"^warmevil, \d s \(EVIL\)$", outcome.err, re.M)


# --- faults ----------------------------------------------------------------------------------------------------------


def served(client: Client, platform: LocalRunPod, worker: Worker, before: int) -> None:
    """The question was answered in spite of the fault, by exactly one job."""
    outcome = client.run("synth", **ASK)
    assert outcome.code == OK, outcome.err
    assert platform.armed() == []
    assert (platform.jobs() - before, len(worker.taken)) == (1, 1)
    assert client.note()["job"]["id"] == worker.taken[0]["id"]


# A gateway's timeout on /run leaves the job's fate open: tested below.
@pytest.mark.parametrize(
    ("route", "status"),
    [(route, status) for route in ("health", "run", "status") for status in HTTP if (route, status) != ("run", 504)],
)
def test_an_http_fault_is_survived(
    client: Client, platform: LocalRunPod, worker: Worker, tempo: Tempo, route: str, status: int
) -> None:
    before = platform.jobs()
    platform.arm("http", route=route, status=status)
    served(client, platform, worker, before)


@pytest.mark.parametrize("route", ["health", "run", "status"])
def test_retry_after_is_honoured(
    client: Client, platform: LocalRunPod, worker: Worker, tempo: Tempo, route: str
) -> None:
    before = platform.jobs()
    platform.arm("http", route=route, status=429, retry_after=12)
    served(client, platform, worker, before)
    assert sum(tempo.sleeps) >= 12


@pytest.mark.parametrize(
    ("kind", "route"),
    [
        *(("html", route) for route in ("health", "status")),
        *(("slow", route) for route in ("health", "run", "status")),
        *(("lost_answer", route) for route in ("health", "status")),
        ("unknown_state", "status"),
    ],
)
def test_a_fault_on_the_way_is_survived(
    client: Client, platform: LocalRunPod, worker: Worker, tempo: Tempo, kind: str, route: str
) -> None:
    before = platform.jobs()
    platform.arm(kind, route=route, seconds=0.2)
    served(client, platform, worker, before)


@pytest.mark.parametrize("fault", [{"kind": "http", "status": 504}, {"kind": "html"}], ids=["504", "html"])
def test_a_job_that_a_gateway_did_not_wait_for_is_not_sent_a_second_time(
    client: Client, platform: LocalRunPod, worker: Worker, tempo: Tempo, fault: dict[str, Any]
) -> None:
    before = platform.jobs()
    platform.arm(fault.pop("kind"), route="run", **fault)
    outcome = client.run("synth", **ASK)
    assert outcome.code == TRY_LATER
    assert "it may have been accepted. It was not sent again" in outcome.err
    assert platform.jobs() == before
    assert (client.note()["outcome"], client.note()["job"]["id"]) == ("UNCONFIRMED", None)


def test_a_job_whose_answer_was_lost_is_not_sent_a_second_time(
    client: Client, platform: LocalRunPod, worker: Worker, tempo: Tempo
) -> None:
    before = platform.jobs()
    platform.arm("lost_answer", route="run")
    outcome = client.run("synth", **ASK)
    assert outcome.code == TRY_LATER
    assert "it may have been accepted. It was not sent again; if it runs, it ends by itself within 180 s" in outcome.err
    wait_for(lambda: len(worker.taken) == 1)
    time.sleep(0.2)
    assert (platform.jobs() - before, len(worker.taken)) == (1, 1)
    assert client.note()["outcome"] == "UNCONFIRMED"


def test_a_job_that_is_stuck_is_cancelled_with_the_cause(
    client: Client, platform: LocalRunPod, worker: Worker, tempo: Tempo
) -> None:
    client.configure(queue_timeout=10)
    platform.arm("stuck")
    outcome = client.run("synth", **ASK)
    assert outcome.code == TRY_LATER
    assert "waited 10 s for a worker and was cancelled: its workers are busy or do not take jobs" in outcome.err
    note = no_synthesis(client, outcome)
    assert (note["outcome"], [state["state"] for state in note["states"]]) == ("GIVEN_UP", ["IN_QUEUE"])
    assert (platform.state(note["job"]["id"]), worker.taken) == ("CANCELLED", [])


@pytest.mark.parametrize(
    ("kind", "status"), [*(("http", status) for status in HTTP), ("html", 503), ("slow", 503), ("lost_answer", 503)]
)
def test_a_fault_while_cancelling_is_survived(
    client: Client, platform: LocalRunPod, tempo: Tempo, kind: str, status: int
) -> None:
    client.configure(queue_timeout=3)
    platform.arm("stuck")
    platform.arm(kind, route="cancel", status=status, seconds=0.2)
    outcome = client.run("synth", **ASK)
    assert (outcome.code, platform.armed()) == (TRY_LATER, [])
    assert "and was cancelled" in outcome.err
    assert platform.state(client.note()["job"]["id"]) == "CANCELLED"


@pytest.mark.parametrize(
    ("kind", "says", "taken"),
    [
        ("crash", "ended FAILED: job timed out after 1 retries", 2),
        ("fail", "ended FAILED: INTERNAL: fault injected", 1),
        ("no_output", "ended COMPLETED without the synthesis it should hold", 1),
        ("expire", "is no longer known: its result has expired (RunPod keeps one for 30 minutes)", 1),
    ],
)
def test_a_job_that_fails_there_fails_here(
    client: Client, platform: LocalRunPod, worker: Worker, tempo: Tempo, kind: str, says: str, taken: int
) -> None:
    platform.arm(kind)
    outcome = client.run("synth", **ASK)
    assert outcome.code == REMOTE_FAILED
    assert says in outcome.err
    assert {job["id"] for job in worker.taken} == {no_synthesis(client, outcome)["job"]["id"]}
    assert len(worker.taken) == taken


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RUNPOD_API_KEY": "rpa_wrong"}, "HTTP 401 (unauthorized): the key was refused; check RUNPOD_API_KEY in .env"),
        ({"RUNPOD_ENDPOINT_ID": "other"}, "there is no endpoint other; check RUNPOD_ENDPOINT_ID in .env"),
    ],
)
def test_a_wrong_key_and_a_wrong_endpoint_are_told_apart(
    client: Client, platform: LocalRunPod, worker: Worker, variables: dict[str, str], says: str
) -> None:
    outcome = client.run("synth", **ASK, **variables)
    assert outcome.code == REMOTE_FAILED
    assert says in outcome.err
    assert (client.runs(), worker.taken) == ([], [])


@pytest.mark.parametrize("route", ["health", "run", "status"])
@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "the request was refused"),
        (401, "the key was refused"),
        (402, "the account has no balance"),
        (403, "the key may not use this endpoint"),
    ],
)
def test_a_refusal_ends_the_run_and_leaves_no_job(
    client: Client, platform: LocalRunPod, worker: Worker, tempo: Tempo, route: str, status: int, says: str
) -> None:
    worker.result = lambda job: None
    before = platform.jobs()
    platform.arm("http", route=route, status=status)
    outcome = client.run("synth", **ASK)
    assert outcome.code == REMOTE_FAILED
    assert f"HTTP {status} (fault injected): {says}" in outcome.err.replace("; the request", ": the request")
    assert platform.jobs() == before  # one that was sent has been cancelled
    if route == "status":
        assert platform.state(no_synthesis(client, outcome)["job"]["id"]) == "CANCELLED"
    else:
        assert client.runs() == []


def test_a_platform_that_is_not_there_is_said_so(client: Client, tempo: Tempo) -> None:
    tempo.speed = 1000
    at = {"RUNPOD_JOBS_URL": "http://127.0.0.1:9/v2", "RUNPOD_ENDPOINT_ID": "ep", "RUNPOD_API_KEY": KEY}
    outcome = client.run("synth", **ASK, **at)
    assert outcome.code == TRY_LATER
    assert "GET /health: no connection; http://127.0.0.1:9/v2 does not serve right now, try again later" in outcome.err
    assert client.runs() == []


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stuck", [False, True], ids=["running", "queued"])
def test_a_signal_cancels_the_job(
    client: Client, platform: LocalRunPod, worker: Worker, number: signal.Signals, stuck: bool
) -> None:
    worker.result = lambda job: None
    if stuck:
        platform.arm("stuck")
    process = client.start("synth", **ASK)
    files = client.runs_dir.glob
    wait_for(lambda: any(load(file)["job"]["id"] for file in files("*/run.json")))
    wait_for(lambda: stuck or worker.taken)
    process.send_signal(number)
    outcome = client.finish(process)
    note = no_synthesis(client, outcome)
    assert outcome.code == INTERRUPTED
    assert f"interrupted: cancelling job {note['job']['id']} …\njob {note['job']['id']} was cancelled\n" in outcome.err
    assert note["outcome"] == "INTERRUPTED"
    assert platform.state(note["job"]["id"]) == "CANCELLED"


def test_a_signal_while_the_job_is_being_sent_waits_for_its_id_and_cancels_it(
    client: Client, platform: LocalRunPod, worker: Worker
) -> None:
    worker.result = lambda job: None
    platform.arm("slow", route="run", seconds=1)
    process = client.start("synth", **ASK)
    wait_for(lambda: platform.armed() == [])
    process.send_signal(signal.SIGTERM)
    outcome = client.finish(process)
    assert outcome.code == INTERRUPTED
    note = client.note()
    assert f"job {note['job']['id']} was cancelled" in outcome.err
    assert (note["outcome"], platform.state(note["job"]["id"])) == ("INTERRUPTED", "CANCELLED")


def test_a_signal_between_two_attempts_to_send_says_what_may_be_left(client: Client, scripted: Scripted) -> None:
    scripted.script["run"] = [Answer({}, 500)]
    process = client.start("synth", **ASK)
    wait_for(lambda: scripted.asked("run"))
    process.send_signal(signal.SIGINT)
    outcome = client.finish(process)
    assert (outcome.code, client.runs()) == (INTERRUPTED, [])
    assert "if the job was accepted, it ends by itself within 180 s\ninterrupted\n" in outcome.err
    assert len(scripted.asked("run")) == 1


def test_a_signal_that_arrived_while_sending_is_raised_in_the_next_wait_and_is_still_held_there() -> None:
    """Its caller tells by the mode that a job may be on its way."""
    with synth.Interrupts() as interrupts:
        interrupts.set("hold")
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.during(lambda seconds: None)(1.0)
        assert interrupts.mode == "hold"


def test_a_second_signal_does_not_stop_the_cancelling(client: Client, platform: LocalRunPod) -> None:
    platform.arm("stuck")
    platform.arm("slow", route="cancel", seconds=1)
    process = client.start("synth", **ASK)
    wait_for(lambda: len(platform.armed()) == 1)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: platform.armed() == [])
    process.send_signal(signal.SIGINT)
    outcome = client.finish(process)
    note = client.note()
    assert (outcome.code, note["outcome"]) == (INTERRUPTED, "INTERRUPTED")
    assert platform.state(note["job"]["id"]) == "CANCELLED"


def test_a_reader_of_the_output_that_leaves_does_not_hide_the_run(
    client: Client, platform: LocalRunPod, worker: Worker
) -> None:
    process = client.start("synth", **ASK)
    assert isinstance(process, subprocess.Popen)
    assert process.stdout is not None
    process.stdout.close()
    wait_for(lambda: process.poll() is not None)
    assert process.stderr is not None
    with process.stderr:
        assert "Traceback" not in process.stderr.read()
    assert (client.only_run() / "synthesis.md").exists()


# --- what is shown meanwhile -----------------------------------------------------------------------------------------


def test_states_are_shown_as_they_change_and_kept(client: Client, scripted: Scripted) -> None:
    scripted.script["health"] = [Answer({"workers": {"initializing": 1}})]
    running = {"status": "IN_PROGRESS"}
    scripted.status({"status": "IN_QUEUE"}, {"status": "IN_QUEUE"}, running, running, {"status": "COMPLETED", **CLEAN})
    outcome = client.run("synth", **ASK)
    assert [line.split(",")[0] for line in outcome.err.splitlines()[1:]] == ["in queue", "in progress", "completed"]
    assert "(a worker is starting; a cold start can take a few minutes)" in outcome.err
    assert [state["state"] for state in client.note()["states"]] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


def test_a_warm_endpoint_shows_no_hint_of_a_cold_start(client: Client, scripted: Scripted) -> None:
    scripted.status({"status": "IN_QUEUE"}, {"status": "COMPLETED", **CLEAN})
    assert "a cold start" not in client.run("synth", **ASK).err


def test_a_terminal_shows_one_changing_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STDERR_IS_TERMINAL", "1")
    shown = Progress()
    for state in ("IN_QUEUE", "IN_PROGRESS"):
        shown.show({"status": state})
    shown.close()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "\r\x1b[2Kin queue, 0 s\r\x1b[2Kin progress, 0 s\r\x1b[2K")


def test_a_state_that_lasts_is_shown_again_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress()
    for passed in (0, 10, 31, 40, 62):
        monkeypatch.setattr("progress.time.monotonic", lambda passed=passed: shown.started + passed)
        shown.show({"status": "IN_PROGRESS"})
    assert capsys.readouterr().err.splitlines() == [f"in progress, {passed} s" for passed in (0, 31, 62)]
