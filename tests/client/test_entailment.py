"""entailment with a verifier in ten lines: windows, stances, flags, the contradiction map. The models are tested in
tests/client_full."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.client.support import PROPERTY, TREE

import alce
import entailment
from common.problems import Problem
from common.text import stems
from ledger import Claim

THRESHOLDS = {"supports": 0.5, "contradicts": 0.9, "related": 0.3, "around": 2, "tokens": 512, "batch_size": 16}


class Words:
    """Entailed: a sentence of the premise has all words of the claim. With "not" on one side only: contradicted."""

    name = "words"

    def __init__(self, limit: int = 512) -> None:
        self.limit = limit
        self.calls: list[list[tuple[str, str]]] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        self.calls.append(list(pairs))
        return np.array([self._row(*pair) for pair in pairs])

    def _row(self, premise: str, claim: str) -> list[float]:
        assert len(premise.split()) + len(claim.split()) + 4 <= self.limit
        held = set(stems(premise))
        if not set(stems(claim)) <= held:
            return [0.05, 0.05, 0.9]
        opposed = ("not" in premise.split()) != ("not" in claim.split())
        return [0.02, 0.96, 0.02] if opposed else [0.97, 0.01, 0.02]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return [pair for call in self.calls for pair in call]


def claim(number: int, text: str, *cited: str, kind: str = "fact") -> Claim:
    return Claim(f"C{number}", text, text, (0, len(text)), "", kind, list(cited), status="grounded")  # type: ignore[arg-type]


def manifest(*texts: str) -> list[dict[str, Any]]:
    return [{"id": f"S{number}", "text": text} for number, text in enumerate(texts, 1)]


SOURCES = manifest(
    "Naps improve alertness in nurses.",
    "Naps do not improve alertness in nurses.",
    "Coffee wakes drivers.",
    "Short naps help. Alertness grew.",
    "Nurses sleep at noon.",
)
NAPS = "Naps improve alertness in nurses."


def kinds(checked: entailment.Checked) -> list[tuple[str, str | None, str | None]]:
    return [(flag.kind, flag.claim, flag.source) for flag in checked.flags]


def check(*claims: Claim, sources: list[dict[str, Any]] = SOURCES, **changes: Any) -> entailment.Checked:
    return entailment.check(claims, sources, Words(), {**THRESHOLDS, **changes})


def test_each_source_gets_its_stance_and_who_is_cited_decides_the_flags() -> None:
    one, other, third = claim(1, NAPS, "S1"), claim(2, NAPS, "S2"), claim(3, NAPS, "S3")
    checked = check(one, other, third)
    for each in (one, other, third):
        found = {source: verdict["stance"] for source, verdict in each.checks["entailment"].items()}
        assert found == {
            "S1": "supports",
            "S2": "contradicts",
            "S3": "not_enough",
            "S4": "not_enough",
            "S5": "not_enough",
        }
    assert [one.status, other.status, third.status] == ["grounded", "contradicted", "grounded"]
    assert other.checks["overruled"] == "grounded"
    assert kinds(checked) == [
        ("disputed", "C1", "S2"),
        ("contradicted", "C2", "S2"),
        ("not_entailed", "C3", "S3"),
        ("disputed", "C3", "S2"),
    ]
    assert [flag.detail for flag in checked.flags] == [
        "S2 is not cited and contradicts this (p = 0.96)",
        "S2 is cited and contradicts this (p = 0.96)",
        "S3 does not say this; S1, not cited, supports it",
        "S2 is not cited and contradicts this (p = 0.96)",
    ]


def test_the_probabilities_are_those_of_the_window_that_decided() -> None:
    one = claim(1, NAPS, "S1")
    check(one)
    assert one.checks["entailment"]["S1"] == {
        "stance": "supports",
        "entailment": 0.97,
        "contradiction": 0.01,
        "window": "Naps improve alertness in nurses.",
        "there": {"entailment": 0.97, "contradiction": 0.01, "neutral": 0.02},
    }
    assert one.checks["entailment"]["S3"]["window"] is None  # about something else: not read


def test_what_is_about_something_else_is_read_only_where_it_is_cited() -> None:
    verifier = Words()
    entailment.check([claim(1, NAPS, "S3")], SOURCES, verifier, THRESHOLDS)
    assert [premise for premise, _ in verifier.pairs] == [SOURCES[n]["text"] for n in (0, 1, 2, 3)]
    verifier = Words()
    entailment.check([claim(1, NAPS, "S3")], SOURCES, verifier, {**THRESHOLDS, "related": 1})
    assert [premise for premise, _ in verifier.pairs] == [SOURCES[n]["text"] for n in (0, 1, 2)]


def test_two_sources_may_support_a_claim_only_together() -> None:
    sources = manifest("Naps improve alertness.", "Nurses sleep at noon.", "Coffee wakes drivers.")
    joint = claim(1, NAPS, "S1", "S2")
    apart = claim(2, NAPS, "S1", "S3")
    verifier = Words()
    checked = entailment.check([joint, apart], sources, verifier, THRESHOLDS)
    assert joint.checks["entailment_together"] == {"sources": ["S1", "S2"], "entailment": 0.97, "supports": True}
    assert apart.checks["entailment_together"] == {"sources": ["S1", "S3"], "entailment": 0.05, "supports": False}
    assert kinds(checked) == [("not_entailed", "C2", "S1")]
    assert checked.flags[0].detail == "S1 and S3 do not say this"
    assert [len(call) for call in verifier.calls] == [3, 2]  # all pairs at once, then all joint ones


def test_what_the_metrics_need_is_computed_from_the_same_readings() -> None:
    sources = manifest("Naps improve alertness.", "Nurses sleep at noon.", "Coffee wakes drivers.", NAPS)
    claims = [
        claim(1, NAPS, "S1", "S2"),  # both needed
        claim(2, NAPS, "S4", "S3"),  # S3 is not
        claim(3, NAPS, "S1", "S2", "S3"),  # S3 is not
        claim(4, NAPS, "S3"),
        claim(5, "This text has five sentences.", kind="meta"),
    ]
    verifier = Words()
    entailment.check(claims, sources, verifier, THRESHOLDS)
    found = alce.measure(claims, entailment.entails(sources, verifier, THRESHOLDS))
    assert found.recall == 3 / 5
    assert found.precision == (2 + 1 + 2) / (2 + 2 + 3 + 1)
    # From the sources alone it is the same.
    fresh = [dataclasses.replace(c, checks={}) for c in claims]
    assert alce.measure(fresh, entailment.entails(sources, Words(), THRESHOLDS)) == found


def test_stances_and_the_map_come_from_the_ledger() -> None:
    claims = [claim(1, NAPS, "S1"), claim(2, "Coffee wakes drivers.", "S3"), claim(3, NAPS, kind="meta")]
    check(*claims)
    again = [Claim(**json.loads(json.dumps(dataclasses.asdict(c)))) for c in claims]
    for each in (claims, again):
        stances = entailment.stances(each)
        assert list(stances) == ["C1", "C2"]
        assert stances["C1"]["S1"] == {"stance": "supports", "level": 2, "score": 0.97}
        assert stances["C1"]["S2"] == {"stance": "contradicts", "level": 2, "score": 0.96}
        assert stances["C1"]["S3"] == {"stance": "unclear", "level": 2, "score": 0.0}
        assert entailment.contradictions(each) == {
            "claims": [{"claim": "C1", "cited": ["S1"], "supports": ["S1"], "contradicts": ["S2"]}],
            "sources": [{"sources": ["S1", "S2"], "claims": ["C1"]}],
        }


def test_a_contradiction_needs_more_than_a_support() -> None:
    sure = claim(1, NAPS, "S2")
    check(sure, contradicts=0.97)
    assert sure.checks["entailment"]["S2"]["stance"] == "not_enough"
    unsure = claim(1, NAPS, "S1")
    check(unsure, supports=0.98)
    assert unsure.checks["entailment"]["S1"]["stance"] == "not_enough"


def test_the_same_pair_is_read_once_and_equal_input_gives_equal_output() -> None:
    verifier = Words()
    claims = [claim(n, NAPS, "S1") for n in range(1, 6)]
    checked = entailment.check(claims, SOURCES, verifier, THRESHOLDS)
    assert checked.pairs == len(verifier.pairs) == len(set(verifier.pairs)) == 3
    again = [claim(n, NAPS, "S1") for n in range(1, 6)]
    assert entailment.check(again, SOURCES, Words(), THRESHOLDS) == checked
    assert again == claims


def test_nothing_to_check_asks_nothing() -> None:
    verifier = Words()
    assert entailment.check([], SOURCES, verifier, THRESHOLDS).flags == []
    assert entailment.check([claim(1, NAPS)], [], verifier, THRESHOLDS).flags == []
    uncited = claim(1, "Ships sail.")
    assert entailment.check([uncited], SOURCES, verifier, THRESHOLDS).flags == []
    assert verifier.calls == []


# --- windows -----------------------------------------------------------------------------------------------------------

NINE = [f"Sentence number {word} stands here." for word in "one two three four five six seven eight nine".split()]


@pytest.mark.parametrize(
    ("count", "around", "expected"),
    [
        (1, 2, [(0, 1)]),
        (5, 2, [(0, 5)]),
        (7, 2, [(0, 5), (1, 6), (2, 7)]),
        (3, 0, [(0, 1), (1, 2), (2, 3)]),
        (4, 1, [(0, 3), (1, 4)]),
    ],
)
def test_windows_are_sentences_with_their_neighbours(count: int, around: int, expected: list[tuple[int, int]]) -> None:
    one = claim(1, "Sentence number one.", "S1")
    verifier = Words()
    entailment.check([one], manifest(" ".join(NINE[:count])), verifier, {**THRESHOLDS, "around": around})
    assert [premise for premise, _ in verifier.pairs] == [" ".join(NINE[first:last]) for first, last in expected]


def test_windows_shrink_until_they_fit_and_long_sentences_are_split() -> None:
    one = claim(1, "It stands.", "S1")
    long = " ".join(f"w{n}" for n in range(70)) + "."
    verifier = Words(limit=36)  # 30 words beside the claim
    entailment.check([one], manifest(" ".join([*NINE, long])), verifier, THRESHOLDS)
    premises = [premise for premise, _ in verifier.pairs]
    assert max(len(premise.split()) for premise in premises) <= 30
    for sentence in NINE:
        assert any(sentence in premise for premise in premises)
    assert long in " ".join(premises[-3:])


@PROPERTY
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 3), st.integers(30, 120), st.integers(1, 3)
)
def test_windows_fit_and_hold_every_word(lengths: list[int], around: int, limit: int, words: int) -> None:
    text = " ".join(" ".join([f"A{n}", *(f"w{n}x{i}" for i in range(size))]) + "." for n, size in enumerate(lengths))
    one = claim(1, " ".join(["it"] * words), "S1")
    verifier = Words(limit)
    entailment.check([one], manifest(text), verifier, {**THRESHOLDS, "around": around})
    premises = [premise for premise, _ in verifier.pairs]
    if limit - 4 - words < 24:
        assert premises == []
    else:
        assert set(text.split()) <= {word for premise in premises for word in premise.split()}
        assert not any(one != two and one in two for one in premises for two in premises)


def test_several_sources_are_cut_to_one_premise_that_fits() -> None:
    texts = [f"{' '.join(f'x{n}y{i}' for i in range(40))}." for n in range(3)]
    one = claim(1, "It stands here.", "S1", "S2", "S3")
    verifier = Words(limit=60)
    entailment.check([one], manifest(*texts), verifier, THRESHOLDS)
    [[joint, _]] = verifier.calls[-1]
    assert len(joint.split("\n")) == 3
    assert len(joint.split()) <= 60 - 4 - 3


def test_a_claim_that_is_too_long_is_said_to_be_unchecked() -> None:
    one = claim(1, " ".join(["nap"] * 500), "S1")
    checked = check(one)
    assert checked.skipped == ["C1"]
    assert kinds(checked) == [("unchecked", "C1", None)]
    assert "entailment" not in one.checks
    assert entailment.stances([one]) == {}


# --- configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({0: "contradiction", 1: "entailment", 2: "neutral"}, [1, 0, 2]),
        ({0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"}, [0, 2, 1]),
        ({0: "neutral", 1: "Contradictory", 2: "entails"}, [2, 1, 0]),
        ({0: "Entailment (E)", 1: "neutral", 2: "contradict"}, [0, 2, 1]),
    ],
)
def test_the_columns_are_found_by_their_names(labels: dict[int, str], expected: list[int]) -> None:
    assert entailment.columns(labels) == expected


@pytest.mark.parametrize(
    "labels",
    [
        {0: "LABEL_0"},
        {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"},
        {0: "entailment", 1: "not_entailment"},
        {0: "entailment", 1: "not_entailment", 2: "neutral"},
        {0: "entailment", 1: "entailment", 2: "neutral"},
        {0: "entailment", 1: "contradiction", 2: "neutral", 3: "other"},
        {},
    ],
)
def test_a_model_of_another_kind_is_refused(labels: dict[int, str]) -> None:
    with pytest.raises(ValueError, match="it should tell entailment, contradiction and neutral apart"):
        entailment.columns(labels)


@pytest.mark.parametrize(
    ("verifier", "says"),
    [
        ("nli", "neither a folder nor a model's id"),
        ("../nowhere/at/all", "neither a folder nor a model's id"),
        ("cross-encoder/nli-deberta-v3-small", "must name a commit"),
        ("cross-encoder/nli-deberta-v3-small@main", "must name a commit"),
    ],
)
def test_a_verifier_that_is_not_pinned_is_refused(verifier: str, says: str) -> None:
    with pytest.raises(Problem, match=says):
        entailment.load(verifier, THRESHOLDS)


def test_weights_that_can_run_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Problem, match=r"has no \*\.safetensors file; other weights can run code"):
        entailment.load(str(tmp_path), THRESHOLDS)


def test_the_lean_client_says_what_it_needs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(Problem, match="needs the client-full image"):
            entailment.load(f"a/b@{'0' * 40}", THRESHOLDS)


def test_the_shipped_configuration_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONFIG_DIR", str(TREE / "config"))
    assert set(entailment.thresholds()) == set(THRESHOLDS)
    assert entailment.thresholds()["contradicts"] > entailment.thresholds()["supports"]
    monkeypatch.setenv("CONFIG_DIR", str(tmp_path))
    (tmp_path / "checks.yaml").write_text(
        "entailment: {supports: 2, contradicts: 0.9, related: 0, around: 2, tokens: 512, batch_size: 1}\n"
    )
    with pytest.raises(Problem, match=r"checks.yaml: entailment: supports must be between 0 and 1, not 2"):
        entailment.thresholds()
