"""All checks together, through synth and check as a person runs them: what is found, what is off, what is the same again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.client.support import NAPS, Client, LocalRunPod, Scripted, Worker, answer, as_lines, load

import bundle
import checks
import embedding
import settings
from common.problems import BAD_INPUT, FLAGGED, OK, UNCHECKED, Problem
from embedding import Embedder

ASK = {"Q": NAPS, "DOMAIN": "sleep"}
ON = {"hallucination_check_enabled": True, "uncertainty_quantification": True}
GOOD = "Short naps improve alertness in shift workers [S1]."


@pytest.fixture
def checking(client: Client) -> Client:
    """A client whose every check is on."""
    client.configure(**ON)
    return client


def ask(client: Client, scripted: Scripted, text: str, **variables: str) -> Any:
    scripted.status({"status": "COMPLETED", "delayTime": 12, "executionTime": 3450, **answer(text)})
    return client.run("synth", **ASK, **variables)


def ledger(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = load(client.only_run() / "claims.json")
    return found


def test_a_grounded_answer_is_clean_and_says_what_was_not_looked_at(checking: Client, scripted: Scripted) -> None:
    outcome = ask(checking, scripted, GOOD)
    assert outcome.code == OK, outcome.out
    found = ledger(checking)
    assert [(level["level"], level["state"]) for level in found["levels"]] == [
        (0, "ran"),
        (1, "ran"),
        (2, "off"),
        (3, "off"),
    ]
    assert all(level["cannot_see"] for level in found["levels"])
    assert found["claims"][0]["status"] == "grounded"
    assert found["confidence"]["label"] == "insufficient"  # one trial weighs less than 1
    assert found["metrics"]["lexical_citation_recall"] == 1.0
    assert found["thresholds"]["grounding"]
    assert found["review"] == {"required": True, "reviewed": False, "missing": "a decision of a person on each claim"}
    for words in (
        "grounded    1 of 1",
        "level 2 entailment (VERIFIER is not set)",
        "cannot see  negation",
        "Not reviewed",
    ):
        assert words in outcome.out
    assert "time        " in outcome.out
    assert "cost        3.5 s of the worker" in outcome.out
    page = (checking.only_run() / "synthesis.md").read_text()
    assert "*Not reviewed by a person." in page
    assert "## Checks" in page


@pytest.mark.parametrize(
    ("text", "kind", "status"),
    [
        ("Short naps improve alertness in shift workers.", "uncited", "uncited"),
        ("Short naps improve alertness in shift workers [S9].", "unknown_source", "unknown_source"),
        ("Twenty minutes were enough in a trial of 90 nurses [S1].", "number_mismatch", "number_mismatch"),
        ("Roe wrote that “short naps never improve alertness” in anyone [S1].", "quote_mismatch", "quote_mismatch"),
        ("Volcanic ash changes the colour of sunsets for years [S1].", "off_source", "off_source"),
        ("Smith (1999) found that short naps improve alertness [S1].", "author_year", None),
        ("Alertness after a long nap was lower than after a short one [S2].", "retracted_source", "grounded"),
    ],
)
def test_what_is_wrong_is_flagged_where_it_stands(
    checking: Client, scripted: Scripted, text: str, kind: str, status: str | None
) -> None:
    outcome = ask(checking, scripted, text)
    assert outcome.code == FLAGGED, outcome.out
    found = ledger(checking)
    assert kind in [flag["kind"] for flag in found["flags"] if flag["claim"] == "C1"]
    assert status in (None, found["claims"][0]["status"])
    assert f"C1          {kind}: " in outcome.out
    assert f"C1 {kind}" in outcome.out.replace(",", "") or f", {kind}" in outcome.out  # in the margin


@pytest.mark.parametrize(
    ("switch", "row"),
    [
        ("citation_check_enabled", "level 0 citations (citation_check_enabled is false)"),
        ("hallucination_check_enabled", "grounded    off"),
        ("uncertainty_quantification", "confidence  off"),
    ],
)
def test_a_check_that_is_off_says_so(checking: Client, scripted: Scripted, switch: str, row: str) -> None:
    checking.configure(**{**ON, switch: False})
    outcome = ask(checking, scripted, "Pigs fly in 1234 ways [S1].")
    assert row in outcome.out
    kinds = {flag["check"] for flag in ledger(checking)["flags"]}
    assert {"citation_check_enabled": "citation", "hallucination_check_enabled": "grounding"}.get(switch) not in kinds


def test_without_review_nothing_claims_one(checking: Client, scripted: Scripted) -> None:
    checking.configure(**ON, human_review_required=False)
    outcome = ask(checking, scripted, GOOD)
    assert "Not reviewed" not in outcome.out
    assert ledger(checking)["review"] == {"required": False, "reviewed": False}


def test_json_is_one_document(checking: Client, scripted: Scripted) -> None:
    outcome = ask(checking, scripted, GOOD, AS="json")
    data = json.loads(outcome.out)
    assert (data["text"], data["question"], data["summary"]["grounded"]) == (GOOD, NAPS, 1)
    assert (checking.root / data["run"] / "claims.json").is_file()
    assert checking.run("synth", **ASK, AS="yaml").code == BAD_INPUT


def test_an_old_run_is_checked_again_with_the_same_result(checking: Client, scripted: Scripted) -> None:
    ask(checking, scripted, "Short naps improve alertness in 90 shift workers [S1]. Nobody knows why.")
    folder = checking.only_run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sent = len(scripted.seen)
    for name in (str(folder), folder.name):
        outcome = checking.run("check", RUN=name)
        assert outcome.code == FLAGGED, outcome.err
        assert "As before: " in outcome.out
        assert "number_mismatch" in outcome.out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(scripted.seen) == sent
    # With another configuration the result is another one, and kept beside the first.
    checking.configure(**{**ON, "uncertainty_quantification": False})
    assert "Kept: " in checking.run("check", RUN=str(folder)).out
    assert "Kept: " in checking.run("check", RUN=str(folder)).out
    assert len(list(folder.glob("claims*.json"))) == 2
    assert (folder / "claims.json").read_bytes() == before["claims.json"]


def test_what_is_no_run_cannot_be_checked(checking: Client, scripted: Scripted) -> None:
    assert "make synth makes one" in checking.run("check", RUN="x").err
    ask(checking, scripted, GOOD)
    folder = checking.only_run()
    outcome = checking.run("check", RUN="nowhere")
    assert outcome.code == BAD_INPUT
    assert f"Try: make check RUN=runs/{folder.name}" in outcome.err
    (folder / "output.json").write_text("{}")
    assert "is not whole" in checking.run("check", RUN=str(folder)).err
    (folder / "output.json").unlink()
    assert "did not answer" in checking.run("check", RUN=str(folder)).err


def test_a_bad_threshold_is_told_before_a_job_is_sent(checking: Client, scripted: Scripted) -> None:
    path = checking.root / "config" / "checks.yaml"
    path.write_text(path.read_text().replace("weak: 0.38", "weak: 38"))
    outcome = ask(checking, scripted, GOOD)
    assert outcome.code == BAD_INPUT
    assert "weak must be between 0 and 1" in outcome.err
    assert scripted.asked("run") == []


def test_more_samples_tell_what_is_said_again(checking: Client, platform: LocalRunPod, worker: Worker) -> None:
    texts = [
        GOOD,
        "Short naps improve alertness in shift workers [S1].",
        "Coffee right before a nap improved alertness [S3].",
    ]
    given = iter(texts)
    worker.result = lambda job: answer(next(given))
    checking.configure(**ON, samples=3)
    outcome = checking.run("synth", **ASK)
    assert outcome.code == OK, outcome.err
    assert len(worker.taken) == 3
    assert ledger(checking)["agreement"]["C1"]["share"] == 0.5
    assert len(load(checking.only_run() / "samples.json")) == 2
    assert "As before" in checking.run("check", RUN=str(checking.only_run())).out


def test_a_judge_that_cannot_be_parsed_leaves_it_unchecked(
    checking: Client, platform: LocalRunPod, worker: Worker
) -> None:
    given = iter([GOOD, "I think it is fine."])
    worker.result = lambda job: answer(next(given))
    outcome = checking.run("synth", **ASK, JUDGE="1", PROMPTS_DIR=str(Path(__file__).parents[2] / "prompts"))
    assert outcome.code == UNCHECKED, (outcome.out, outcome.err)
    found = ledger(checking)
    assert found["claims"][0]["status"] == "grounded"
    assert [flag["kind"] for flag in found["flags"] if flag["check"] == "judge"] == ["unchecked"]
    assert "unchecked   1" in outcome.out


# --- an answer that was paid for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("the model broke"), Problem("a threshold went away"), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("where", ["checks.run", "view.markdown", "bundle.Bundle.finish"])
def test_an_answer_that_cannot_be_checked_is_kept_and_shown(
    checking: Client, scripted: Scripted, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(where, fail)
        outcome = ask(checking, scripted, GOOD)
    assert outcome.code == UNCHECKED, outcome.err
    assert outcome.out == f"{GOOD}\n"
    assert "this answer is not checked." in outcome.err
    if where == "bundle.Bundle.finish":
        return
    folder = checking.only_run()
    assert f"make check RUN={folder.relative_to(checking.root)}" in outcome.err
    assert load(folder / "run.json")["outcome"] == "UNCHECKED"
    assert checking.run("check", RUN=str(folder)).code == OK


def test_a_full_disk_still_shows_the_answer(
    checking: Client, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = bundle.Bundle.write

    def full(self: bundle.Bundle, name: str, content: object) -> None:
        if name == "output.json":
            raise OSError(28, "No space left on device")
        write(self, name, content)

    with monkeypatch.context() as broken:
        broken.setattr(bundle.Bundle, "write", full)
        outcome = ask(checking, scripted, GOOD)
    assert (outcome.code, outcome.out) == (UNCHECKED, f"{GOOD}\n")


@pytest.mark.parametrize("prompt", [None, b"\xff\xfe", b"Is {{claims}} so?"])
def test_a_judge_without_its_prompt_is_told_before_a_job_is_sent(
    checking: Client, scripted: Scripted, tmp_path: Path, prompt: bytes | None
) -> None:
    if prompt is not None:
        (tmp_path / "judge.txt").write_bytes(prompt)
    outcome = ask(checking, scripted, GOOD, JUDGE="1", PROMPTS_DIR=str(tmp_path))
    assert outcome.code == BAD_INPUT
    assert "judge.txt" in outcome.err
    assert scripted.asked("run") == []


def test_a_level_that_does_not_run_again_leaves_its_part_unchecked(
    checking: Client, platform: LocalRunPod, worker: Worker
) -> None:
    given = iter([GOOD, '{"verdict": "not_enough", "sources": [], "reason": "It says less."}'])
    worker.result = lambda job: answer(next(given))
    checking.run("synth", **ASK, JUDGE="1", PROMPTS_DIR=str(Path(__file__).parents[2] / "prompts"))
    assert ledger(checking)["levels"][3]["state"] == "ran"
    outcome = checking.run("check", RUN=str(checking.only_run()))
    assert outcome.code == UNCHECKED
    assert "level 3 (judge) ran when the answer was made, and not now" in outcome.out


def test_samples_that_do_not_come_back_are_told(checking: Client, platform: LocalRunPod, worker: Worker) -> None:
    given = iter([answer(GOOD), {"error": "OUT_OF_MEMORY: no room"}, answer(GOOD)])
    worker.result = lambda job: next(given)
    checking.configure(**ON, samples=3)
    outcome = checking.run("synth", **ASK)
    assert outcome.code == UNCHECKED, outcome.out
    assert "1 of 2 further answers came back" in outcome.out
    assert "agreement   100% on average" in outcome.out
    assert set(checking.note()["cost"]["more_execution_ms"]) == {"samples", "judge"}
    assert checking.run("check", RUN=str(checking.only_run())).code == UNCHECKED


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("words", ["", ", never retracted,", ", which has not been retracted,"])
def test_a_retraction_is_told_whatever_is_off_or_said(
    checking: Client, scripted: Scripted, switch: bool, words: str
) -> None:
    checking.configure(**{**ON, "uncertainty_quantification": switch})
    ask(checking, scripted, f"Alertness after a long nap{words} was lower than after a short one [S2].")
    assert "retracted_source" in [flag["kind"] for flag in ledger(checking)["flags"]]


def test_the_rule_stands_beside_the_label(checking: Client, scripted: Scripted) -> None:
    ask(checking, scripted, GOOD)
    page = (checking.only_run() / "synthesis.md").read_text()
    assert "The rule of confidence, with this run's numbers:" in page
    assert "Beta(" in page


def test_a_records_title_is_no_markdown() -> None:
    assert (
        bundle.plain("![x](http://e/p.png) <img src=x> *a* `b`")
        == "!\\[x\\](http://e/p.png) \\<img src=x\\> \\*a\\* \\`b\\`"
    )


# --- a domain with everything that can be wrong with evidence --------------------------------------------------------

PLANTED = [
    {"id": "smile-1", "title": "Holding a pen makes cartoons funnier", "text": "Holding a pen between the teeth made cartoons funnier in 92 students.", "authors": ["Strong, A."], "year": 1988, "source_type": "rct", "replication_status": "failed"},
    {"id": "smile-2", "title": "Seventeen laboratories", "text": "Holding a pen between the teeth did not make cartoons funnier in 1894 participants of 17 laboratories.", "authors": ["Wagen, B."], "year": 2016, "source_type": "rct"},
    {"id": "tea-1", "title": "Green tea and memory", "text": "Green tea improved memory in a trial of 40 adults.", "authors": ["Cha, C."], "year": 2011, "source_type": "rct", "integrity_status": "retracted"},
    {"id": "walk-1", "title": "Walking and mood", "text": "A walk of ten minutes improved mood in a meta-analysis of 30 trials.", "authors": ["Gang, D."], "year": 2020, "source_type": "meta_analysis", "replication_status": "successful"},
    {"id": "walk-2", "title": "Walking in parks", "text": "A walk of ten minutes in a park improved mood in a trial of 300 adults.", "authors": ["Park, E."], "year": 2021, "source_type": "rct", "replication_status": "successful"},
]  # fmt: skip


class Says:
    """A verifier in ten lines: a premise with "did not" contradicts a claim without, one that shares its words entails it."""

    name, limit = "says", 512

    def count(self, text: str) -> int:
        return len(text.split())

    def probabilities(self, pairs: Any) -> Any:
        import numpy as np

        rows = []
        for premise, claim in pairs:
            share = len(set(claim.lower().split()) & set(premise.lower().split())) / max(1, len(claim.split()))
            against = ("did not" in premise) != ("did not" in claim)
            rows.append(
                [0.02, 0.95, 0.03]
                if share > 0.5 and against
                else [0.95, 0.02, 0.03]
                if share > 0.5
                else [0.02, 0.02, 0.96]
            )
        return np.array(rows)


def planted(embedder: Embedder, text: str, verifier: Any = None) -> checks.Result:
    manifest = [
        {"id": f"S{number}", "chunk_id": record["id"], "document_id": record["id"], "text": record["text"], "label": record["title"],
         "metadata": {key: value for key, value in record.items() if key != "text"}, "ranks": {}, "scores": {}}
        for number, record in enumerate(PLANTED, 1)
    ]  # fmt: skip
    configuration = settings.load(Path(__file__).parents[2] / "config" / "inference.yaml")
    return checks.run(text, "Does it work?", manifest, configuration, embedder, checks.Limits.read(), verifier=verifier)


def labels(result: checks.Result) -> list[str]:
    return [claim.confidence["label"] if claim.confidence else "" for claim in result.claims]


@pytest.fixture
def shipped_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFIG_DIR", str(Path(__file__).parents[2] / "config"))


@pytest.mark.usefixtures("shipped_config")
def test_planted_evidence_is_labelled_as_the_rule_says(embedder: Embedder) -> None:
    text = (
        "Holding a pen between the teeth made cartoons funnier [S1].\n"
        "Green tea improved memory in a trial of 40 adults [S3].\n"
        "A walk of ten minutes improved mood [S4, S5].\n"
    )
    result = planted(embedder, text)
    assert labels(result)[1] == "insufficient"  # its only source is retracted
    assert labels(result)[0] == "insufficient"  # a failed replication adds nothing
    assert labels(result)[2] in ("limited", "well_supported")
    kinds = {(flag.claim, flag.kind) for flag in result.flags}
    assert {("C1", "failed_replication_unmentioned"), ("C2", "retracted_source")} <= kinds
    assert result.overall
    assert [excluded["source"] for excluded in result.overall.excluded] == ["S3"]
    assert all(claim.confidence and claim.confidence["reason"] for claim in result.claims)


@pytest.mark.usefixtures("shipped_config")
def test_a_planted_contradiction_is_found_by_level_2(embedder: Embedder) -> None:
    result = planted(embedder, "Holding a pen between the teeth made cartoons funnier [S2].\n", Says())
    assert result.claims[0].status == "contradicted"
    assert "contradicted" in [flag.kind for flag in result.flags]
    assert result.contradictions
    assert result.contradictions["claims"][0]["contradicts"] == ["S2"]
    assert result.metrics["citation_recall"] == 0.0
    assert result.levels[2]["state"] == "ran"


@pytest.mark.usefixtures("shipped_config")
def test_equal_input_gives_equal_output(embedder: Embedder) -> None:
    text = "Holding a pen made cartoons funnier [S1, S2]. A walk of 11 minutes improved mood [S4]. Why is not known."
    first, second = planted(embedder, text), planted(embedding.load("all-MiniLM-L6-v2"), text)
    assert first.as_json() == second.as_json()
    json.dumps(first.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    "text", ["", "   ", "# Title only", "[S1]", "\x1b[31m", "。", "|a|b|\n|-|-|", "```\ncode\n```"]
)
@pytest.mark.usefixtures("shipped_config")
def test_odd_texts_break_nothing(embedder: Embedder, text: str) -> None:
    result = planted(embedder, text)
    json.dumps(result.as_json(), allow_nan=False)


@pytest.mark.usefixtures("shipped_config")
def test_forty_claims_and_twenty_sources_are_checked_in_time(embedder: Embedder) -> None:
    """A wide bound, so that a busy machine does not fail it; bench/checks.py measures."""
    manifest = [
        {"id": f"S{n}", "chunk_id": str(n), "document_id": str(n), "text": f"{PLANTED[n % 5]['text']} Group {n} was seen twice.",
         "label": "x", "metadata": {"title": f"T{n}", "authors": [f"A{n}"], "year": 2000 + n}, "ranks": {}, "scores": {}}
        for n in range(1, 21)
    ]  # fmt: skip
    text = "\n".join(f"Group {n % 20 + 1} was seen twice in study {n} [S{n % 20 + 1}]." for n in range(40))
    configuration = settings.load(Path(__file__).parents[2] / "config" / "inference.yaml")
    started = time.process_time()
    result = checks.run(text, "Was it seen?", manifest, configuration, embedder, checks.Limits.read())
    assert len(result.claims) == 40
    assert time.process_time() - started < 15


def test_records_with_planted_faults_can_be_ingested(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "planted.jsonl"
    path.write_bytes(as_lines(*PLANTED))
    assert client.run("ingest", DOMAIN="planted", FROM=str(path)).code == OK
