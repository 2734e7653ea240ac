"""Measuring the checks: files of pairs, sentences made wrong, figures that are known, and the report."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.client.support import PROPERTY, TREE, Client, Hashed
from tests.client.test_grounding import THRESHOLDS

import alterations
import check_eval
import figures
from check_eval import NEIGHBOUR, QUOTE, RANDOM, REFUTED, RIGHT, UNKNOWN, Pair
from common.problems import Problem
from embedding import Embedder

OWN = TREE / "corpus" / "checks" / "pairs.jsonl"
# SciFact in the form of ScholarQABench (data/single_paper_tasks/scifact_test.jsonl), which is not ours to ship.
SCIFACT = Path(os.environ.get("SCIFACT") or TREE.parent / "shared" / "data" / "scifact_test.jsonl")


# --- files ------------------------------------------------------------------------------------------------------------


def test_both_forms_of_a_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines: list[dict[str, Any]] = [
        {"claim": "Naps  help.", "source": "Naps do help.", "label": "supported"},
        {"claim": "Naps harm.", "source": "Naps do help.", "label": "refuted", "title": "Naps"},
        {"input": "It is so.", "gold_ctx": [{"title": "T", "text": "Is."}, {"text": "So."}], "answer": "true"},
        {"input": "It is so.", "gold_ctx": [{"title": "T", "text": "Is."}], "answer": False},
    ]
    path.write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    assert check_eval.read(path) == [
        Pair("Naps help.", "Naps do help.", True),
        Pair("Naps harm.", "Naps do help.", False, "Naps"),
        Pair("It is so.", "Is.\n\nSo.", True, "T"),
        Pair("It is so.", "Is.", False, "T"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[]", "expected one JSON object per line"),
        (b"{}", "neither claim, source, label nor input, gold_ctx, answer"),
        (b'{"claim": "a", "source": "b"}', "label must be supported or refuted, not None"),
        (b'{"claim": "a", "source": "b", "label": "maybe"}', "label must be supported or refuted, not 'maybe'"),
        (b'{"claim": "a", "label": "refuted"}', "the source is missing"),
        (b'{"claim": 3, "source": "b", "label": "refuted"}', "the claim is missing"),
        (b'{"claim": " ", "source": "b", "label": "refuted"}', "the claim is missing"),
        (b'{"claim": "a", "source": "b", "label": "refuted", "title": 1}', "title must be text"),
        (b'{"input": "a", "gold_ctx": [], "answer": "true"}', "gold_ctx must be a list"),
        (b'{"input": "a", "gold_ctx": [{"title": "t"}], "answer": "true"}', "the source is missing"),
        (b'{"input": "a", "gold_ctx": [{"text": "b"}], "answer": "yes"}', "answer must be true or false, not 'yes'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"claim": "a", "source": "b", "label": "supported"}\n' + line)
    with pytest.raises(Problem, match=f"pairs.jsonl:2: {message}"):
        check_eval.read(path)


def test_a_file_that_measures_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    for lines in (
        [],
        [{"claim": "a", "source": "b", "label": "supported"}],
        [{"claim": "a", "source": s, "label": "refuted"} for s in "bc"],
    ):
        path.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(Problem, match="must hold pairs with two sources"):
            check_eval.read(path)
    with pytest.raises(Problem, match="does not exist"):
        check_eval.read(tmp_path / "none.jsonl")


def test_the_projects_own_pairs_are_of_the_shipped_corpus() -> None:
    corpus = (TREE / "corpus" / "psychology.jsonl").read_text(encoding="utf-8")
    pairs = check_eval.read(OWN)
    assert len(pairs) > 50
    assert {json.dumps(pair.title, ensure_ascii=False) in corpus for pair in pairs} == {True}
    assert len({pair.claim for pair in pairs}) == len(pairs)


# --- sentences made wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "claim", "altered"),
    [
        ("changed number", "In 23 labs, p = .05.", ["In 24 labs, p = .05.", "In 46 labs, p = .05.", "In 12 labs, p = .05.", "In 23 labs, p = .06.", "In 23 labs, p = .10.", "In 23 labs, p = .03.", "In 23 labs, p = .02."]),
        ("changed number in a name", "IL-6 acts.", ["IL-7 acts.", "IL-12 acts.", "IL-3 acts."]),
        ("negation", "It is so.", ["It is not so."]),
        ("negation", "It is not so.", ["It is so."]),
        ("negation", "A nap increases alertness.", ["A nap does not increase alertness."]),
        ("causal upgrade", "Naps are strongly associated with health.", ["Naps cause health."]),
        ("dropped qualifier", "Naps may help most nurses in large trials.", ["Naps help most nurses in large trials.", "Naps may help nurses in large trials."]),
        ("count put in", "It was 23.", ["It was 23 in 9,999 people.", "It was 23 in 14 places.", "It was 23 in nine places."]),
        ("reversed bound", "It was so in more than 20 labs.", ["It was so in fewer than 20 labs."]),
        ("changed sign", "The effect was d = 0.04.", ["The effect was d = -0.04."]),
        ("changed sign", "It was from -0.07 to 0.15.", ["It was from 0.07 to 0.15."]),
        ("spliced quote", "Short naps do improve the mood of nurses. Long naps do nothing for the mood of people.", ["As the authors put it, “naps do improve the … the mood of people”."]),
        ("fabricated author", "Naps help.", ["Nobody et al. (1901) found that naps help."]),
    ],
)  # fmt: skip
def test_a_claim_is_made_wrong(kind: str, claim: str, altered: list[str]) -> None:
    found = alterations.KINDS[kind](claim, f"{claim} 23 labs, IL-6, p = .05")
    if kind == "changed number":
        assert found[:3] == altered[:3]
        assert set(found[3:]) <= set(altered[3:])
        assert len(found) == 6
    else:
        assert found == altered


def test_quotations_are_altered_by_a_word() -> None:
    source = "Before. Short naps improve alertness in shift workers of all ages. After."
    [right] = alterations.quoting("", source)
    wrong = alterations.misquoting("", source)
    assert "“Short naps improve alertness in shift workers of all ages”" in right
    assert len({right, *wrong}) == 4


@given(st.text(max_size=200), st.text(max_size=200))
@PROPERTY
def test_any_claim_can_be_altered(claim: str, source: str) -> None:
    for kind, alter in alterations.KINDS.items():
        if claim:
            for text in alter(claim, source):
                assert text != claim, kind


@given(st.integers(2, 10**6))
@PROPERTY
def test_a_changed_number_is_another_number(number: int) -> None:
    claim = f"There were {number:,} of them."
    for text in alterations.changed_numbers(claim, claim):
        assert figures.missing(text, claim)


# --- measures ---------------------------------------------------------------------------------------------------------


def test_auroc_and_interval_have_their_known_values() -> None:
    assert check_eval.auroc([3, 4], [1, 2]) == 1
    assert check_eval.auroc([1, 2], [3, 4]) == 0
    assert check_eval.auroc([1, 2], [1, 2]) == 0.5
    assert check_eval.auroc([1, 3], [2]) == 0.5
    assert math.isnan(check_eval.auroc([], [1]))
    assert check_eval.interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert check_eval.interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert check_eval.interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert check_eval.interval(0, 0) == (0, 1)


def test_each_claim_has_its_neighbours_and_others_at_hand_the_same_each_time() -> None:
    pairs = check_eval.read(OWN)[:30]
    found = list(check_eval._with_sources(pairs, check_eval._Remembering(Hashed())))
    assert found == list(check_eval._with_sources(pairs, check_eval._Remembering(Hashed())))
    for pair, own, others in found:
        assert own == pair
        assert pair.source not in [other.source for other in others]
        assert len({other.source for other in others}) == len(others)


@pytest.fixture(scope="module")
def own(embedder: Embedder) -> check_eval.Result:
    return check_eval.measure(check_eval.read(OWN), check_eval.Checks(embedder, THRESHOLDS))


def test_the_checks_hold_on_the_projects_own_pairs(own: check_eval.Result) -> None:
    shares = {kind: count.share("any") for kind, count in own.kinds.items()}
    assert {kind: shares[kind] for kind in (UNKNOWN, "fabricated author", "altered quote")} == {
        UNKNOWN: 1,
        "fabricated author": 1,
        "altered quote": 1,
    }
    assert own.kinds["altered quote"].share("1") == 1
    assert own.kinds["changed number"].share("1") >= 0.95
    assert shares[RIGHT] <= 0.1
    assert shares[QUOTE] <= 0.1
    assert shares[RANDOM] >= 0.95
    assert shares[NEIGHBOUR] >= 0.75
    assert own.auroc("score", "random") >= 0.97
    assert own.auroc("score", "hardest") >= 0.9
    assert own.kinds[REFUTED].of == 17


class Knowing:
    """A verifier that knows the answers: what a source is to say of a claim."""

    name, limit = "knowing", 512

    def __init__(self, pairs: list[Pair]) -> None:
        self.right = {pair.claim.rstrip("."): pair for pair in pairs}

    def count(self, text: str) -> int:
        return len(text.split())

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        rows = []
        for premise, claim in pairs:
            pair = self.right.get(claim.rstrip("."))
            if pair is None or " ".join(premise.split()[:3]) not in pair.source:
                rows.append([0.0, 0.0, 1.0])
            else:
                rows.append([1.0, 0.0, 0.0] if pair.supported else [0.0, 1.0, 0.0])
        return np.array(rows)


def test_level_2_is_measured_where_there_is_a_verifier() -> None:
    pairs = check_eval.read(OWN)[:12]
    limits = yaml.safe_load((TREE / "config" / "checks.yaml").read_text(encoding="utf-8"))["entailment"]
    checks = check_eval.Checks(Hashed(), THRESHOLDS, Knowing(pairs), limits)
    result = check_eval.measure(pairs, checks)
    assert result.kinds[RIGHT].share("2") == 0
    for kind in (REFUTED, RANDOM, NEIGHBOUR, "negation", "changed number"):
        assert result.kinds[kind].share("2") == 1, kind
    section = check_eval.report("pairs.jsonl", "0" * 64, 12, result, checks, "2026-01-01")
    assert "| level 2 |" in section
    assert "level 2: knowing" in section


@pytest.mark.skipif(not SCIFACT.is_file(), reason="SciFact is not here; name scifact_test.jsonl in SCIFACT")
@pytest.mark.timeout(600)
def test_the_checks_hold_on_scifact(embedder: Embedder) -> None:
    result = check_eval.measure(check_eval.read(SCIFACT), check_eval.Checks(embedder, THRESHOLDS))
    assert result.auroc("score", "random") >= 0.97
    assert result.auroc("score", "hardest") >= 0.84
    for against in ("random", "hardest"):  # meaning must not make it worse than words alone
        assert result.auroc("score", against) >= result.auroc("coverage", against)
    assert result.kinds["changed number"].share("1") >= 0.9
    assert result.kinds["changed number in a name"].share("1") >= 0.9
    assert result.kinds[UNKNOWN].share("0") == 1
    assert result.kinds["fabricated author"].share("0") == 1
    assert result.kinds["altered quote"].share("1") == 1
    assert result.kinds[RIGHT].share("any") <= 0.1
    assert result.kinds[QUOTE].share("any") <= 0.1


# --- the program and its report ---------------------------------------------------------------------------------------


def ready(client: Client, monkeypatch: pytest.MonkeyPatch, count: int = 6) -> None:
    shutil.copy(TREE / "config" / "checks.yaml", client.root / "config")
    (client.root / "docs").mkdir()
    monkeypatch.setattr("sys.argv", ["check_eval"])
    (client.root / "pairs.jsonl").write_text(
        "".join(OWN.read_text(encoding="utf-8").splitlines(True)[:count]), encoding="utf-8"
    )


def test_the_program_writes_the_report(empty: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(empty, monkeypatch)
    first = empty.run("check_eval", DATA="pairs.jsonl")
    assert first.code == 0, first.err
    written = (empty.root / "docs" / "checks-power.md").read_text(encoding="utf-8")
    assert first.out in written
    assert "## On pairs.jsonl" in written
    assert f"weak {THRESHOLDS['weak']}" in written
    shutil.move(empty.root / "pairs.jsonl", empty.root / "others.jsonl")
    assert empty.run("check_eval", DATA="others.jsonl").code == 0
    both = (empty.root / "docs" / "checks-power.md").read_text(encoding="utf-8")
    assert both.index("## On others.jsonl") < both.index("## On pairs.jsonl")
    assert empty.run("check_eval", DATA="others.jsonl").code == 0
    assert (empty.root / "docs" / "checks-power.md").read_text(encoding="utf-8") == both


def test_the_program_says_what_it_needs(empty: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(empty, monkeypatch)
    assert "none.jsonl does not exist" in empty.run("check_eval", DATA="none.jsonl").err
    (empty.root / "config" / "checks.yaml").write_text("grounding: {}")
    assert "missing key cosine_weight" in empty.run("check_eval", DATA="pairs.jsonl").err
    (empty.root / "pairs.jsonl").write_text("{}\n")
    outcome = empty.run("check_eval", DATA="pairs.jsonl")
    assert outcome.code == 2


def test_what_is_not_seen_is_said(own: check_eval.Result) -> None:
    section = check_eval.report("pairs.jsonl", "0" * 64, 59, own, check_eval.Checks(Hashed(), THRESHOLDS), "2026-01-01")
    assert "Levels 0 and 1 do not see**: negation" in section
    assert "Level 2 (entailment): not measured" in section
    assert "| changed number | " in section


def test_the_report_in_the_tree_is_of_these_thresholds() -> None:
    report = (TREE / "docs" / "checks-power.md").read_text(encoding="utf-8")
    assert ", ".join(f"{key} {value}" for key, value in THRESHOLDS.items()) in report
