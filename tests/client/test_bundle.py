"""The run folder: what is in it, that it never overwrites another, and that it can be checked again from itself."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from tests.client.support import (
    CONFIGURATION,
    NAPS,
    SLEEP,
    Client,
    LocalRunPod,
    Scripted,
    Worker,
    answer,
    load,
    wait_for,
)

import bundle
import chunks
import citation_check
from common.problems import FLAGGED, OK, Problem
from records import label, reference, short_label
from split import split

ASK = {"Q": NAPS, "DOMAIN": "sleep"}
SYNTHESIS = """**Summary**

Naps improve alertness [S1]. Long naps do not [S2, S7]. Nobody knows why.

- Coffee helps [SOURCE 3].
"""


@pytest.fixture
def run(client: Client, scripted: Scripted) -> Path:
    """The folder of a run with one flag of each kind."""
    scripted.status({"status": "COMPLETED", "delayTime": 12, "executionTime": 3450, **answer(SYNTHESIS)})
    assert client.run("synth", **ASK).code == FLAGGED
    return client.only_run()


def test_the_folder_holds_five_files_and_run_json_every_fact(client: Client, run: Path) -> None:
    files = ["claims.json", "output.json", "run.json", "sources.json", "synthesis.md"]
    assert sorted(file.name for file in run.iterdir()) == files
    note = load(run / "run.json")
    assert set(note) == {
        "format", "question", "domain", "created", "job", "config", "corpus", "states", "timings", "cost", "outcome",
        "model", "prompts", "finish_reason", "usage", "worker_timings", "checks", "flags", "review",
    }  # fmt: skip
    assert (note["format"], note["question"], note["domain"], note["outcome"]) == (1, NAPS, "sleep", "COMPLETED")
    assert note["config"] == CONFIGURATION
    records = (client.store / "sleep" / "records.jsonl").read_bytes()
    assert set(note["corpus"]) == {"sha256", "chunker", "embedding_model", "queries", "tokens", "left_out"}
    assert note["corpus"]["sha256"] == hashlib.sha256(records).hexdigest()
    assert (note["corpus"]["chunker"], note["corpus"]["embedding_model"]) == (chunks.CHUNKER, "all-MiniLM-L6-v2")
    assert note["corpus"]["queries"][0]["text"] == NAPS
    assert load(run / "output.json")["model"] == note["model"]
    assert note["job"] == {
        "id": "job-1",
        "endpoint": "ep",
        "url": client.variables["RUNPOD_JOBS_URL"],
        "policy": {"ttl": 180_000, "executionTimeout": 60_000},
    }
    assert note["timings"]["queue_ms"] == 12
    assert note["timings"]["execution_ms"] == 3450
    assert note["timings"]["total_seconds"] >= note["timings"]["retrieval_seconds"] > 0
    assert note["cost"] == {
        "execution_seconds": 3.45,
        "more_execution_ms": {"samples": 0, "judge": 0},
        "usd": None,
    }
    output = answer("")["output"]
    assert (note["model"], note["prompts"], note["usage"]) == (output["model"], output["prompts"], output["usage"])
    assert abs(time.time() - time.mktime(time.strptime(note["created"], "%Y-%m-%dT%H:%M:%SZ")) + time.timezone) < 600


def test_the_manifest_holds_what_was_retrieved_best_first(run: Path) -> None:
    manifest = load(run / "sources.json")
    assert [entry["id"] for entry in manifest] == ["S1", "S2", "S3"]
    assert [entry["ranks"]["fused"] for entry in manifest] == [1, 2, 3]
    assert [entry["ranks"]["dense"][0] for entry in manifest] == [1, 2, 3]
    scores = [entry["scores"]["cosine"] for entry in manifest]
    assert scores == sorted(scores, reverse=True)
    records = {record["id"]: record for record in SLEEP}
    assert {entry["document_id"] for entry in manifest} == set(records)
    for entry in manifest:
        record: dict[str, Any] = records[entry["document_id"]]
        assert set(entry) == {"id", "chunk_id", "document_id", "text", "label", "metadata", "ranks", "scores", "tokens"}
        assert entry["text"] == record["text"]
        assert {key: entry["metadata"][key] for key in record if key != "text"} == {
            key: value for key, value in record.items() if key != "text"
        }
        assert entry["label"] == label(entry["metadata"])


def test_flags_can_be_computed_again_from_the_folder_alone(run: Path) -> None:
    note, ledger = load(run / "run.json"), load(run / "claims.json")
    text, manifest = load(run / "output.json")["synthesis"], load(run / "sources.json")
    claims = split(text, [entry["id"] for entry in manifest])
    of_citations = [flag for flag in note["flags"] if flag["check"] == "citation"]
    assert [vars(flag) for flag in citation_check.check(text, claims, manifest)] == of_citations
    assert note["flags"] == ledger["flags"]
    kinds = {flag["kind"] for flag in of_citations}
    assert kinds == {"unknown_source", "uncited", "malformed_citation", "unused_source"}
    assert [claim.text for claim in claims] == [claim["text"] for claim in ledger["claims"]]


def test_references_are_rendered_from_the_metadata_of_what_is_cited(run: Path) -> None:
    manifest = load(run / "sources.json")
    page = (run / "synthesis.md").read_text()
    head, references = page.split("\n\n## References (from the records)\n\n")
    assert head.startswith(f"> {NAPS}\n\n*Not reviewed by a person.")
    assert "\n\n**Summary**\n\nNaps improve alertness [S1]." in head
    listed, tail, *_ = references.split("\n\n")
    assert listed.splitlines() == [f"- [{entry['id']}] {reference(entry['metadata'])}" for entry in manifest[:2]]
    assert tail == "3 sources retrieved from sleep, 1 of them not cited."


def test_a_text_that_cites_nothing_has_no_reference_list() -> None:
    entry = {"id": "S1", "metadata": {}}
    page = bundle.markdown("Why?\nReally?", "sleep", "Text.", [entry], [], ["Note."])
    assert page == "> Why?\n> Really?\n\n*Note.*\n\nText.\n\n1 sources retrieved from sleep, 1 of them not cited.\n"


BASE = {
    "title": "Naps.", "authors": ["Roe, J.", "Poe, E. A."], "year": 2019, "venue": "Journal of Naps", "doi": "10.1000/n",
    "url": "https://example.org", "source_type": "rct", "replication_status": "unknown", "integrity_status": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "Roe, J.; Poe, E. A. (2019). Naps. Journal of Naps. https://doi.org/10.1000/n (rct; replication: unknown)",
        ),
        (
            {"doi": None},
            "Roe, J.; Poe, E. A. (2019). Naps. Journal of Naps. https://example.org (rct; replication: unknown)",
        ),
        (
            {"authors": [], "year": None, "venue": None, "doi": None, "url": None, "title": "Why?"},
            "Unknown author (n.d.). Why? (rct; replication: unknown)",
        ),
        (
            {"integrity_status": "expression_of_concern", "replication_status": "not_attempted", "authors": ["X"]},
            "X (2019). Naps. Journal of Naps. https://doi.org/10.1000/n"
            " (rct; replication: not attempted; EXPRESSION OF CONCERN)",
        ),
        (
            {"integrity_status": "retracted", "authors": ["X"], "source_type": "meta_analysis"},
            "X (2019). Naps. Journal of Naps. https://doi.org/10.1000/n (meta analysis; replication: unknown; RETRACTED)",
        ),
    ],
)
def test_a_reference_shows_what_the_metadata_says(changes: dict[str, Any], expected: str) -> None:
    assert reference({**BASE, **changes}) == expected


@pytest.mark.parametrize(
    ("authors", "expected"),
    [
        ([], "Naps. (2019)"),
        (["Roe, J."], "Roe (2019)"),
        (["Roe, J.", "Poe, E. A."], "Roe and Poe (2019)"),
        (["Roe, J.", "et al."], "Roe et al. (2019)"),
        (["Roe, J.", "Poe, E.", "Doe, J."], "Roe et al. (2019)"),
        (["World Health Organization"], "World Health Organization (2019)"),
    ],
)
def test_a_label_is_short(authors: list[str], expected: str) -> None:
    assert short_label({**BASE, "authors": authors}) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source_type": "other", "integrity_status": "unchecked"}, "other · replication: unknown"),
        ({"source_type": "rct", "replication_status": "successful"}, "rct · replication: successful"),
        ({"source_type": "meta_analysis", "replication_status": "not_attempted"}, "meta analysis · replication: not attempted"),
        ({"integrity_status": "none"}, "rct · replication: unknown"),
        ({"integrity_status": "retracted"}, "rct · replication: unknown · integrity: retracted"),
        ({"integrity_status": "expression_of_concern"}, "rct · replication: unknown · integrity: expression of concern"),
        ({"integrity_status": "corrected"}, "rct · replication: unknown · integrity: corrected"),
    ],
)  # fmt: skip
def test_a_label_tells_the_kind_of_study_and_whether_it_was_replicated(changes: dict[str, str], expected: str) -> None:
    assert label({**BASE, "authors": ["Klein, R.", "et al."], **changes}) == f"Klein et al. (2019) · {expected}"


def test_a_retracted_source_is_marked_where_it_is_cited(client: Client, scripted: Scripted) -> None:
    scripted.status({"status": "COMPLETED", **answer("All of it [S1-S3].")})
    assert client.run("synth", **ASK).code == FLAGGED  # and said beside the sentence
    marked = [line for line in (client.only_run() / "synthesis.md").read_text().splitlines() if "RETRACTED" in line]
    assert len(marked) == 1
    assert "Why long naps fail" in marked[0]


def test_the_folder_is_hidden_while_the_job_runs_and_holds_its_id(
    client: Client, platform: LocalRunPod, worker: Worker
) -> None:
    seen: list[tuple[list[str], str]] = []

    def look(job: dict[str, Any]) -> dict[str, Any]:
        wait_for(lambda: load(client.runs()[0] / "run.json")["job"]["id"] is not None)
        [folder] = client.runs()
        seen.append(
            ([folder.name[:1], *sorted(file.name for file in folder.iterdir())], load(folder / "run.json")["job"]["id"])
        )
        return answer("Naps help [S1].")

    worker.result = look
    assert client.run("synth", **ASK).code == OK
    assert seen == [([".", "run.json", "sources.json"], worker.taken[0]["id"])]
    assert client.only_run().name[:2] == "20"


def test_runs_in_the_same_second_do_not_meet(client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bundle.time.gmtime", lambda: time.struct_time((2026, 11, 23, 1, 2, 3, 0, 327, 0)))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "deep" / "runs"))
    bundles = [bundle.Bundle("Do naps work?", "sleep") for _ in range(20)]
    for number, kept in enumerate(bundles):
        kept.note(number=number)
    folders = [kept.finish() for kept in bundles]
    assert len(set(folders)) == 20
    assert [load(folder / "run.json")["number"] for folder in folders] == list(range(20))
    assert all(folder.name.startswith("20261123T010203Z-do-naps-work-") for folder in folders)


def test_a_discarded_run_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    kept = bundle.Bundle("Q", "sleep")
    kept.note(a=1)
    kept.discard()
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_runs_folder_below_a_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "file"))
    with pytest.raises(Problem, match="file cannot be written: Not a directory; set RUNS_DIR"):
        bundle.Bundle("Q", "sleep")
