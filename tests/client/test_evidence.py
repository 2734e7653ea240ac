"""Uncertainty from the evidence: independence, weights, replication, labels, flags, and agreement between samples."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY, TREE

import beta
import evidence
import independence
import records
from common.problems import Problem
from embedding import Embedder
from ledger import Claim, Flag
from records import INTEGRITY_STATUSES, REPLICATION_STATUSES, SOURCE_TYPES

# The label of a claim may only move up or down; too little evidence and disagreeing evidence are equally far below.
RANK = {"insufficient": 0, "contested": 0, "limited": 1, "well_supported": 2}


@pytest.fixture(autouse=True)
def _shipped_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFIG_DIR", str(TREE / "config"))


def shipped() -> evidence.Weights:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFIG_DIR", str(TREE / "config"))
        return evidence.load()


WEIGHTS = shipped()


def source(number: int, **metadata: Any) -> dict[str, Any]:
    """A source that has nothing in common with any other, but for what is given."""
    document = metadata.pop("document_id", f"document-{number}")
    own = {
        "title": f"Experiment {number} about subject {number}",
        "authors": [f"Author{number}, A."],
        "source_type": "rct",
    }
    return {"id": f"S{number}", "document_id": document, "text": "", "label": "", "metadata": own | metadata}


def claim(number: int = 1, text: str = "Naps improve alertness.", *cited: str, kind: Any = "fact") -> Claim:
    return Claim(f"C{number}", text, text, (number * 100, number * 100 + len(text)), "", kind, list(cited))


def says(supports: str = "", contradicts: str = "", unclear: str = "", level: int = 2) -> dict[str, dict[str, Any]]:
    return {
        i: {"stance": stance, "level": level, "score": 0.9}
        for stance, ids in (("supports", supports), ("contradicts", contradicts), ("unclear", unclear))
        for i in ids.split()
    }


def one(
    manifest: list[dict[str, Any]], stances: Mapping[str, Any], text: str = "Naps improve alertness."
) -> dict[str, Any]:
    """The confidence of a single claim."""
    only = claim(1, text)
    evidence.assess([only], manifest, {"C1": stances}, WEIGHTS)
    assert only.confidence is not None
    json.dumps(only.confidence, allow_nan=False)
    return only.confidence


def flags_of(
    manifest: list[dict[str, Any]], stances: Mapping[str, Any], text: str, *cited: str
) -> list[tuple[str, str | None]]:
    overall = evidence.assess([claim(1, text, *cited)], manifest, {"C1": stances}, WEIGHTS)
    assert all(f.check == "evidence" and f.claim == "C1" and f.detail for f in overall.flags)
    return [(f.kind, f.source) for f in overall.flags]


# --- the Beta distribution ---


@pytest.mark.parametrize(
    ("x", "a", "b", "expected"),
    [
        # Closed forms: uniform, x^a, 1-(1-x)^b, arcsine law, binomial sums.
        (0.3, 1, 1, 0.3),
        (0.7, 5, 1, 0.7**5),
        (0.2, 1, 4, 1 - 0.8**4),
        (0.3, 0.5, 0.5, 2 / math.pi * math.asin(math.sqrt(0.3))),
        (0.5, 2, 3, 0.6875),
        (0.9, 10, 2, 11 * 0.9**10 - 10 * 0.9**11),
        (0.5, 200, 200, 0.5),
        (0, 2, 2, 0),
        (1, 2, 2, 1),
    ],
)
def test_the_distribution_function(x: float, a: float, b: float, expected: float) -> None:
    assert beta.cdf(x, a, b) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(
    ("p", "a", "b", "expected"),
    [
        # From scipy 1.17, scipy.stats.beta.ppf.
        (0.05, 1, 1, 0.05),
        (0.95, 1, 1, 0.95),
        (0.05, 2.6, 1, 0.315939442759),
        (0.05, 8.4, 1, 0.700028105192),
        (0.95, 8.4, 1, 0.993912261262),
        (0.05, 2.6, 1.8, 0.220485459517),
        (0.95, 2.6, 1.8, 0.910439044688),
        (0.05, 0.347107, 1.652893, 9.48397074835e-05),
        (0.95, 0.347107, 1.652893, 0.666090921597),
        (0.05, 4.882353, 0.117647, 0.859821117659),
        (0.95, 1.2, 6.5, 0.400436040324),
        (0.05, 30, 12, 0.595221557081),
        (0.5, 150, 3, 0.98244644986),
        (0.025, 0.5, 0.5, 0.00154133313344),
    ],
)
def test_quantiles_are_those_of_the_table(p: float, a: float, b: float, expected: float) -> None:
    assert beta.quantile(p, a, b) == pytest.approx(expected, abs=1e-9)


def test_what_is_no_beta_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="does not exist"):
        beta.cdf(0.5, 0, 1)


@PROPERTY
@given(st.floats(0.01, 300), st.floats(0.01, 300), st.floats(0.001, 0.999))
def test_a_quantile_is_the_inverse(a: float, b: float, x: float) -> None:
    p = beta.cdf(x, a, b)
    assert 0 <= p <= 1
    assert beta.cdf(x, a, b) + beta.cdf(1 - x, b, a) == pytest.approx(1, abs=1e-9)
    hypothesis.assume(1e-6 < p < 1 - 1e-6)
    assert beta.cdf(beta.quantile(p, a, b), a, b) == pytest.approx(p, abs=1e-6)


# --- independence ---


@pytest.mark.parametrize(
    "names",
    [
        ["Klein, R. A.", "R. A. Klein", "Klein RA", "Klein, Richard", "KLEIN, R.", "Klein, Jr., R."],
        ["van der Berg, Jan", "Jan van der Berg", "van der Berg J", "Berg, J. van der"],
        ["García-López, M.", "M. Garcia-Lopez", "Garcia Lopez, M."],
        ["Open Science Collaboration", "open science collaboration"],
        ["O'Brien, P.", "PA O’Brien"],
        ["李明"],
    ],
)
def test_one_author_in_many_spellings(names: list[str]) -> None:
    assert len({independence.author(name) for name in names}) == 1
    assert independence.author(names[0]) is not None


def test_names_that_differ() -> None:
    names = ["Klein, R.", "Klein, S.", "Kline, R.", "Many Labs Collaboration", "Open Science Collaboration"]
    assert len({independence.author(name) for name in names}) == 5
    assert [independence.author(name) for name in ("et al.", "Unknown author", "", "…", "-")] == [None] * 5


MORE = ["Poe, B.", "Doe, C.", "Loe, D."]


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ({}, {}, None),
        ({"doi": "10.1000/X.1"}, {"doi": "https://doi.org/10.1000/x.1"}, "same DOI"),
        ({"doi": "10.1000/x.1"}, {"url": "https://dx.doi.org/10.1000/x.1"}, "same DOI"),
        ({"doi": "10.1000/x.1"}, {"doi": "10.1000/x.2"}, None),
        ({"doi": "10.1101/2020.01.02.123456v1"}, {"doi": "10.1101/2020.01.02.123456v3.full"}, "same DOI"),
        ({"doi": "10.31234/osf.io/abcde_v1"}, {"doi": "10.31234/osf.io/abcde"}, "same DOI"),
        ({"doi": "10.48550/arXiv.2401.12345v2"}, {"url": "https://arxiv.org/pdf/2401.12345.pdf"}, "same arXiv id"),
        ({"pmid": "PMID: 123456"}, {"url": "https://pubmed.ncbi.nlm.nih.gov/123456/"}, "same PMID"),
        ({"url": "https://pmc.ncbi.nlm.nih.gov/articles/PMC123456/"}, {"pmcid": "PMC123456"}, "same PMCID"),
        ({"document_id": "x"}, {"document_id": "x"}, "same document"),
        ({"trial_id": "NCT01234567"}, {"trial_id": "nct01234567"}, "same trial"),
        # A preprint and its article: the list of authors has grown, the title has changed a little.
        (
            {"title": "Short naps improve alertness in nurses", "authors": ["Roe, J.", *MORE]},
            {"title": "Short naps improve alertness: in nurses!", "authors": ["Roe, J.", "Oe, E.", "Noe, F.", "Xoe, G."]},
            "like titles and fitting authors",
        ),
        ({"title": "Short naps improve alertness", "authors": []}, {"title": "Short naps improve alertness"}, "like titles and fitting authors"),
        ({"title": "Introduction", "authors": []}, {"title": "Introduction"}, None),
        ({"title": "Short naps improve alertness"}, {"title": "Short naps improve alertness"}, None),
        ({"authors": ["Roe, J.", "Poe, B."]}, {"authors": ["J. Roe", "Doe, C.", "Loe, D."]}, "shared authors"),
        ({"authors": ["Roe, J.", *MORE]}, {"authors": ["Roe, J.", "Ape, B.", "Bee, C.", "Cat, D."]}, None),
        ({"authors": ["Roe, J.", "et al."]}, {"authors": ["Roe, J.", "Ape, B."]}, "shared authors"),
        # A bare "Klein" may be either of two, but not both.
        ({"authors": ["Klein, R.", "Klein, S.", "Roe, J."]}, {"authors": ["Klein", "Poe, B.", "Doe, C."]}, None),
        ({"authors": ["et al."]}, {"authors": ["et al."]}, None),
        ({"authors": []}, {"authors": []}, None),
    ],
)  # fmt: skip
def test_sources_that_belong_together(a: dict[str, Any], b: dict[str, Any], why: str | None) -> None:
    first, second = (independence.work(source(n, **m)) for n, m in ((1, a), (2, b)))
    for pair in ((first, second), (second, first)):
        assert independence.relation(*pair, **WEIGHTS["independence"]) == why
    found = one([source(1, **a), source(2, **b)], says("S1 S2"))
    assert found["weight_for"] == (1.6 if why is None else pytest.approx(0.8, abs=0.17))
    assert found["related"] == ([] if why is None else [{"sources": ["S1", "S2"], "why": why}])
    assert len(found["counted"]) == (2 if why is None else 1)


def test_of_related_sources_the_weightiest_counts() -> None:
    same = {"doi": "10.1000/x"}
    found = one([source(1, source_type="cohort", **same), source(2, **same), source(3)], says("S1 S2 S3"))
    assert (found["counted"], found["weight_for"], found["n_eff"]) == (["S2", "S3"], 1.6, 2)


def test_a_source_between_two_others_does_not_join_them() -> None:
    apart = [source(1, authors=["Roe, J."]), source(2, authors=["Poe, B."])]
    between = source(3, authors=["Roe, J.", "Poe, B."])
    assert one(apart, says("S1 S2"))["weight_for"] == 1.6
    assert one([*apart, between], says("S1 S2 S3"))["weight_for"] == 1.6


def _by_trying_all(weights: Mapping[str, float], related: set[frozenset[str]]) -> float:
    ids = list(weights)
    choices = ([i for n, i in enumerate(ids) if bits >> n & 1] for bits in range(2 ** len(ids)))
    return max(
        math.fsum(weights[i] for i in chosen) for chosen in choices if not any(pair <= set(chosen) for pair in related)
    )


@PROPERTY
@given(st.lists(st.sampled_from([0.1, 0.2, 0.5, 0.8, 1.0]), max_size=9), st.integers(0))
def test_the_choice_is_the_heaviest(values: list[float], seed: int) -> None:
    chance = random.Random(seed)
    weights = {f"S{n}": value for n, value in enumerate(values, 1)}
    pairs = [frozenset((a, b)) for a in weights for b in weights if a < b]
    related = {pair for pair in pairs if chance.random() < 0.4}
    found = independence.heaviest(weights, related)
    assert found.weight == pytest.approx(_by_trying_all(weights, related))
    assert found.exact
    assert not any(pair <= set(found.ids) for pair in related)


def test_a_tangle_ends_in_time_with_a_lower_limit() -> None:
    chance = random.Random(1)
    weights = {f"S{n}": 1.0 for n in range(200)}
    related = {frozenset((a, b)) for a in weights for b in weights if a < b and chance.random() < 0.03}
    started = time.process_time()
    found = independence.heaviest(weights, related)
    assert time.process_time() - started < 5
    assert not found.exact
    assert found.weight == len(found.ids) > 40


def test_effective_sources() -> None:
    assert evidence.kish([]) == 0
    assert evidence.kish([0, 0]) == 0
    assert evidence.kish([0.3] * 4) == pytest.approx(4)
    assert evidence.kish([1, 0.5]) == pytest.approx(1.8)


# --- weights ---


def test_every_design_has_a_weight() -> None:
    assert set(WEIGHTS["quality"]) == set(SOURCE_TYPES)
    for design, weight in WEIGHTS["quality"].items():
        assert one([source(1, source_type=design)], says("S1"))["weight_for"] == weight


@pytest.mark.parametrize(
    ("metadata", "weight"),
    [
        ({"preprint": True}, 0.64),
        ({"doi": "10.31234/osf.io/abcde"}, 0.64),
        ({"doi": "10.1101/2020.01.02.123456"}, 0.64),
        ({"doi": "10.1101/gad.1234"}, 0.8),  # the same prefix, a journal
        ({"venue": "bioRxiv"}, 0.64),
        ({"venue": "PsyArXiv Preprints"}, 0.64),
        ({"preprint": False, "venue": "arXiv"}, 0.8),
        ({"abstract_only": True}, 0.64),
        ({"abstract_only": True, "preprint": True}, 0.512),
        ({"integrity_status": "expression_of_concern"}, 0.4),
        ({"integrity_status": "corrected"}, 0.8),
        ({"integrity_status": "reinstated"}, 0.8),
        ({"integrity_status": "none"}, 0.8),
        ({"integrity_status": "unchecked"}, 0.8),
        ({"integrity_status": "retracted"}, 0),
        ({"source_type": None}, 0.1),
        ({"source_type": "horoscope"}, 0.1),
        ({"source_type": ["rct"]}, 0.1),
    ],
)
def test_what_a_source_counts(metadata: dict[str, Any], weight: float) -> None:
    assert one([source(1, **metadata)], says("S1"))["weight_for"] == pytest.approx(weight)


def test_what_is_known_about_integrity_is_named() -> None:
    statuses = ["retracted", "expression_of_concern", "corrected", "reinstated", "none", "unchecked"]
    manifest = [source(n, integrity_status=status) for n, status in enumerate(statuses, 1)]
    overall = evidence.assess([claim(1, "X.", "S1"), claim(2, "Y.")], manifest, {"C1": says("S1 S2")}, WEIGHTS)
    assert overall.excluded == [{"source": "S1", "why": "retracted", "cited_by": ["C1"]}]
    assert [(note["source"], note["note"]) for note in overall.notes] == [
        ("S2", "its journal has expressed concern; it counts × 0.5"),
        ("S3", "has been corrected; it counts as it is"),
        ("S4", "was retracted and reinstated; it counts as it is"),
    ]
    assert "whether 1 of 6 sources were retracted or corrected: unchecked" in overall.not_assessed


# --- replication ---


def test_likelihood_ratios() -> None:
    ratios = evidence.likelihood_ratios(WEIGHTS)
    assert ratios["successful"] == pytest.approx(16)
    assert ratios["failed"] == pytest.approx(0.2105, abs=1e-4)
    assert {ratios[status] for status in ("mixed", "not_attempted", "unknown")} == {1}


@pytest.mark.parametrize("status", ["unknown", "not_attempted", "mixed", None, "never heard of"])
def test_unknown_replication_leaves_confidence_unchanged(status: str | None) -> None:
    plain = one([source(1), source(2)], says("S1 S2"))
    assert one([source(1, replication_status=status), source(2)], says("S1 S2")) == plain
    assert plain["odds"] == 1
    # The prior is uniform then: Beta(1 + P, 1 + N).
    assert plain["mean"] == pytest.approx(2.6 / 3.6, abs=1e-5)
    assert plain["interval"] == pytest.approx(list(beta.interval(0.9, 2.6, 1)), abs=1e-5)


def test_a_success_raises_and_a_failure_lowers() -> None:
    manifest = {s: [source(1, replication_status=s), source(2)] for s in ("successful", "unknown", "failed")}
    found = {status: one(sources, says("S1 S2")) for status, sources in manifest.items()}
    assert [found[s]["odds"] for s in found] == [16, 1, pytest.approx(0.2105, abs=1e-4)]
    assert [found[s]["weight_for"] for s in found] == [1.6, 1.6, 0.8]
    assert found["failed"]["mean"] < found["unknown"]["mean"] < found["successful"]["mean"]
    assert "the finding of S1 failed to replicate and lends no support" in found["failed"]["reason"]
    assert "the finding of S1 was replicated" in found["successful"]["reason"]


def test_a_replicated_contradiction_counts_against_the_claim() -> None:
    manifest = [source(1), source(2), source(3, replication_status="successful")]
    assert one(manifest, says("S1 S2", "S3"))["odds"] == pytest.approx(1 / 16)
    # That a contradiction failed to replicate is no support.
    manifest[2] = source(3, replication_status="failed")
    assert one(manifest, says("S1 S2", "S3")) == one([*manifest[:2], source(3)], says("S1 S2", "S3"))


def test_odds_are_bounded_and_a_replication_counts_once() -> None:
    many = [source(n, replication_status="successful") for n in range(1, 21)]
    assert one(many, says(" ".join(s["id"] for s in many)))["odds"] == 100
    copies = [source(n, replication_status="successful", doi="10.1000/x") for n in (1, 2, 3)]
    assert one(copies, says("S1 S2 S3"))["odds"] == 16


def test_a_sentence_that_reports_the_failure_is_not_held_against_it() -> None:
    manifest = [source(1, replication_status="failed"), source(2)]
    found = one(manifest, says("S1 S2"), "Ego depletion failed to replicate in 23 laboratories.")
    assert found["odds"] == 1
    assert found["counted"] == ["S2"]
    assert found["replication"]["failure_is_in_the_sentence"]


# --- labels ---


def reviews(count: int, start: int = 1, **metadata: Any) -> list[dict[str, Any]]:
    return [source(n, source_type="meta_analysis", **metadata) for n in range(start, start + count)]


def ids(*manifests: list[dict[str, Any]]) -> str:
    return " ".join(s["id"] for manifest in manifests for s in manifest)


def test_nothing_is_insufficient() -> None:
    found = one([source(1)], says(unclear="S1"))
    assert found["label"] == "insufficient"
    assert found["reason"] == (
        "Too little to say (weight 1 is needed): no retrieved source that counts supports it; nothing retrieved contradicts it."
    )
    assert (found["weight_for"], found["weight_against"], found["mean"], found["interval"]) == (0, 0, 0.5, [0.05, 0.95])


def test_one_study_is_insufficient_and_two_are_limited() -> None:
    assert one([source(1)], says("S1"))["label"] == "insufficient"
    found = one([source(1), source(2)], says("S1 S2", level=1))
    assert found["label"] == "limited"
    assert found["reason"] == (
        "Some support: S1 and S2 support it (weight 1.6); whether anything contradicts it was not looked for; to be well"
        " supported it would need an interval from 0.7 on (it begins at 0.32), 2.9 effective sources (it has 2.00) and a"
        " systematic review, a meta-analysis or a replicated study."
    )


def test_well_supported_needs_everything() -> None:
    rest = [source(2), source(3), source(4)]
    good = [source(1, replication_status="successful"), *rest]
    assert one(good, says(ids(good)))["label"] == "well_supported"
    assert one(good[:3], says(ids(good[:3])))["label"] == "well_supported"
    assert one(good[:2], says("S1 S2"))["missing"] == ["2.9 effective sources (it has 2.00)"]
    failed = [*good, source(5, replication_status="failed")]
    assert one(failed, says(ids(failed)))["label"] == "limited"
    assert "no failed replication" in one(failed, says(ids(failed)))["missing"]
    # Without a replication: much, and a synthesis among it.
    trials = [source(n) for n in range(1, 11)]
    assert one(trials, says(ids(trials)))["missing"] == ["a systematic review, a meta-analysis or a replicated study"]
    assert one([*trials, *reviews(1, 11)], says(ids(trials) + " S11"))["label"] == "well_supported"
    assert one(reviews(7), says(ids(reviews(7))))["label"] == "limited"
    assert one(reviews(8), says(ids(reviews(8))))["label"] == "well_supported"
    assert one(reviews(8, authors=["Roe, J."]), says(ids(reviews(8))))["label"] == "limited"


@pytest.mark.parametrize(
    ("supports", "contradicts", "label"),
    [
        (["rct"], ["rct"], "contested"),
        (["rct", "rct"], ["rct"], "contested"),
        (["rct", "rct"], ["cohort"], "limited"),  # 24 %
        (["rct", "cohort", "news", "news"], ["cohort"], "contested"),  # exactly 25 %
        (["rct"], ["cross_sectional"], "insufficient"),
        (["rct", "cohort"], ["cross_sectional", "other", "other"], "contested"),
        ([], ["rct"], "insufficient"),
        ([], ["rct", "rct"], "contested"),
        (["rct"] * 5, ["rct"], "limited"),
    ],
)
def test_contradicted(supports: list[str], contradicts: list[str], label: str) -> None:
    manifest = [source(n, source_type=design) for n, design in enumerate(supports + contradicts, 1)]
    split = len(supports)
    found = one(manifest, says(ids(manifest[:split]), ids(manifest[split:])))
    assert found["label"] == label
    assert re.search(rf"\bS{split + 1}\b.* contradicts? it \(weight", found["reason"])
    if label == "contested":
        assert found["reason"].startswith("The evidence disagrees" if supports else "The evidence speaks against it")


def test_what_nobody_checked_is_unchecked_and_meta_has_no_confidence() -> None:
    claims = [claim(1, "Naps help.", "S1"), claim(2, "The sources differ.", kind="meta"), claim(3, "Naps harm.")]
    overall = evidence.assess(claims, [source(1)], {}, WEIGHTS)
    assert [c.confidence and c.confidence["label"] for c in claims] == ["unchecked", None, "insufficient"]
    assert overall.label == "unchecked"
    assert "what the sources say of C1" in overall.not_assessed


def test_an_unknown_stance_is_a_defect() -> None:
    with pytest.raises(ValueError, match="stance 'maybe' of C1"):
        evidence.assess([claim()], [source(1)], {"C1": {"S1": {"stance": "maybe", "level": 2, "score": 1}}}, WEIGHTS)


# --- the whole ---


def planted() -> tuple[list[Claim], list[dict[str, Any]], dict[str, Any]]:
    """A domain with a planted contradiction, a retracted paper and a failed replication."""
    manifest = [
        source(1, replication_status="successful"),
        source(2, source_type="meta_analysis"),
        source(3),
        source(4, source_type="systematic_review"),  # contradicts C2
        source(5, integrity_status="retracted"),
        source(6, replication_status="failed"),
        source(7, source_type="cohort"),
    ]
    claims = [
        claim(1, "Naps improve alertness.", "S1", "S2", "S3"),
        claim(2, "Naps improve memory.", "S2", "S3"),
        claim(3, "Naps cure insomnia.", "S5"),
        claim(4, "Willpower is a limited resource.", "S6", "S7"),
        claim(5, "Whether naps help children is unknown.", kind="hedge"),
    ]
    stances = {
        "C1": says("S1 S2 S3"),
        "C2": says("S2 S3", "S4"),
        "C3": says("S5"),
        "C4": says("S6 S7"),
        "C5": says(),
    }
    return claims, manifest, stances


def test_a_planted_domain_gets_the_labels_of_the_rule() -> None:
    claims, manifest, stances = planted()
    overall = evidence.assess(claims, manifest, stances, WEIGHTS)
    found = {c.id: c.confidence or {} for c in claims}
    print("\n".join(line for c in claims for line in evidence.explain(c)))
    assert {i: f["label"] for i, f in found.items()} == {
        "C1": "well_supported",
        "C2": "contested",
        "C3": "insufficient",
        "C4": "insufficient",
        "C5": "insufficient",
    }
    assert found["C1"]["reason"].startswith("Well supported: S1, S2 and S3 support it (weight 2.6)")
    assert "S4 contradicts it (weight 1.0, 36 % of all)" in found["C2"]["reason"]
    assert "S5 is retracted and left out" in found["C3"]["reason"]
    assert found["C3"]["excluded"] == ["S5"]
    assert "the finding of S6 failed to replicate and lends no support" in found["C4"]["reason"]
    assert [(f.kind, f.claim, f.source) for f in overall.flags] == [
        ("retracted_source", "C3", "S5"),
        ("failed_replication_unmentioned", "C4", "S6"),
    ]
    assert overall.label == "insufficient"
    assert overall.reason == f"The weakest of its 3 key claims is C3. {found['C3']['reason']}"
    assert overall.excluded == [{"source": "S5", "why": "retracted", "cited_by": ["C3"]}]
    assert overall.weights == WEIGHTS
    json.dumps(overall.as_json(), allow_nan=False)


def test_the_whole_is_its_worst_key_claim() -> None:
    claims, manifest, stances = planted()
    similarity = {"C1": 0.9, "C2": 0.8, "C3": 0.1, "C4": 0.1, "C5": 1.0}
    overall = evidence.assess(claims, manifest, stances, WEIGHTS | {"key_claims": {"most": 2}}, similarity)
    assert [key["id"] for key in overall.key_claims] == ["C1", "C2"]  # a hedge is no key claim
    assert overall.label == "contested"
    overall = evidence.assess(claims, manifest, stances, WEIGHTS | {"key_claims": {"most": 1}}, similarity)
    assert (overall.label, overall.reason.split(".")[0]) == ("well_supported", "Its key claim is C1")


def test_equally_near_claims_come_in_the_order_of_the_text() -> None:
    claims = [claim(n, f"Claim {n}.") for n in (10, 2, 9, 1)]
    for similarity in (None, {}, dict.fromkeys(("C1", "C2", "C9", "C10"), 0.5)):
        overall = evidence.assess(claims, [], {}, WEIGHTS, similarity)
        assert [key["id"] for key in overall.key_claims] == ["C1", "C2", "C9"]


def test_a_text_without_facts_is_insufficient() -> None:
    overall = evidence.assess([claim(1, "Nobody knows.", kind="hedge")], [], {}, WEIGHTS)
    assert (overall.label, overall.key_claims) == ("insufficient", [])
    assert overall.reason.startswith("The text says nothing")


def test_what_was_not_assessed_is_said() -> None:
    for level, said in ((1, True), (2, False)):
        overall = evidence.assess([claim()], [source(1)], {"C1": says("S1", level=level)}, WEIGHTS)
        assert any(line.startswith("contradictions: at level 1") for line in overall.not_assessed) == said
        assert "publication bias" in overall.not_assessed[0]


def test_the_rule_is_printed_with_its_numbers() -> None:
    text = "\n".join(evidence.rule(WEIGHTS))
    for number in (
        "50 % of their authors",
        "× 16 ",
        "× 0.21 ",
        "1/100",
        "90 %",
        "below 1",
        "at least 0.5",
        "25 %",
        "at 0.7",
        "at least 2.9",
    ):
        assert number in text
    changed = WEIGHTS | {"labels": WEIGHTS["labels"] | {"lower_bound": 0.61}}
    assert "at 0.61 or above" in "\n".join(evidence.rule(changed))


# --- flags ---


@pytest.mark.parametrize("stance", ["supports", "unclear"])
def test_a_retracted_source_is_flagged_unless_the_sentence_says_so(stance: str) -> None:
    manifest = [source(1, integrity_status="retracted", replication_status="failed"), source(2)]
    stances = says("S1") if stance == "supports" else says(unclear="S1")
    assert flags_of(manifest, stances, "Naps help.", "S1") == [("retracted_source", "S1")]
    assert flags_of(manifest, stances, "A retracted paper says that naps help.", "S1") == []
    assert flags_of(manifest, stances, "Naps help.", "S2") == (
        [("retracted_source", "S1")] if stance == "supports" else []
    )


def test_a_contradicting_source_is_not_rested_on() -> None:
    assert flags_of([source(1, integrity_status="retracted")], says("", "S1"), "Naps help.") == []


def test_an_expression_of_concern_is_flagged() -> None:
    manifest = [source(1, integrity_status="expression_of_concern")]
    assert flags_of(manifest, says("S1"), "Naps help.", "S1") == [("expression_of_concern", "S1")]


def test_the_preprint_of_a_retracted_article_is_retracted_too() -> None:
    title = {"title": "Short naps improve alertness in nurses", "authors": ["Roe, J."]}
    manifest = [source(1, **title, preprint=True), source(2, **title, integrity_status="retracted", year=2020)]
    overall = evidence.assess(
        [only := claim(1, "Naps help.", "S1")], manifest, {"C1": says("S1", unclear="S2")}, WEIGHTS
    )
    assert only.confidence is not None
    assert only.confidence["excluded"] == ["S1"]
    assert overall.excluded[0] == {"source": "S1", "why": "the same work as S2, which is retracted", "cited_by": ["C1"]}
    assert overall.flags == [
        Flag("evidence", "retracted_source", "rests on S1, the same work as S2, which is retracted", "C1", "S1")
    ]
    # Shared authors alone make no one guilty, and a reinstated paper stands.
    manifest[0] = source(1, authors=["Roe, J."])
    assert one(manifest, says("S1"))["weight_for"] == 0.8
    manifest[0] = source(1, **title, integrity_status="reinstated")
    assert one(manifest, says("S1"))["weight_for"] == 0.8


def test_the_preprint_of_a_finding_that_failed_has_failed_too() -> None:
    manifest = [source(1, doi="10.1000/x"), source(2, doi="10.1000/x", replication_status="failed"), source(3)]
    found = one(manifest, says("S1 S3"))
    assert (found["replication"]["failed"], found["weight_for"]) == (["S1"], 0.8)


@pytest.mark.parametrize(
    ("text", "flagged"),
    [
        ("Ego depletion impairs self-control.", True),
        ("The effect has been replicated many times.", True),
        ("Replications succeeded in every laboratory.", True),
        ("Ego depletion failed to replicate.", False),
        ("A large study failed to find or reproduce it.", False),
        ("Later work did not replicate it.", False),
        ("It couldn't be reproduced.", False),
        ("Replication attempts in 23 laboratories have failed.", False),
        ("Replications found no effect.", False),
        ("A failed replication casts doubt on it.", False),
        ("The finding is irreproducible.", False),
        ("The effect did not hold up.", False),
    ],
)
def test_a_failed_replication_belongs_into_the_sentence(text: str, flagged: bool) -> None:
    manifest = [source(1, replication_status="failed")]
    expected = [("failed_replication_unmentioned", "S1")] if flagged else []
    assert flags_of(manifest, says("S1"), text, "S1") == expected


@pytest.mark.parametrize(
    ("text", "several"),
    [
        ("Multiple studies show that naps help.", True),
        ("Several large randomised trials agree.", True),
        ("A growing body of experiments agrees.", True),
        ("Many of the studies agree.", True),
        ("Studies consistently show it.", True),
        ("The effect is the same across studies.", True),
        ("Most people in studies nap.", False),
        ("Many people nap.", False),
        ("A trial shows that naps help.", False),
        ("23 laboratories found it.", False),
    ],
)
def test_several_studies_must_be_several(text: str, several: bool) -> None:
    flag = [("one_source_as_several", "S1")] if several else []
    assert flags_of([source(1)], says("S1"), text) == flag
    assert flags_of([source(1, doi="10.1000/x"), source(2, doi="10.1000/x")], says("S1 S2"), text) == flag
    assert flags_of([source(1), source(2)], says("S1 S2"), text) == []
    assert flags_of(reviews(1), says("S1"), text) == []  # a synthesis speaks for many


# --- a start for GRADE, and effect sizes ---


@pytest.mark.parametrize(
    ("metadata", "start"),
    [
        ({}, "high"),
        ({"source_type": "meta_analysis", "title": "A meta-analysis of randomized controlled trials"}, "high"),
        ({"source_type": "meta_analysis", "title": "A review of non-randomised studies"}, "low"),
        ({"source_type": "meta_analysis"}, "low"),
        ({"source_type": "cohort"}, "low"),
        ({"source_type": "in_vitro"}, "very_low"),
        ({"source_type": "news"}, "very_low"),
    ],
)
def test_a_start_for_grade(metadata: dict[str, Any], start: str) -> None:
    found = one([source(1, **metadata)], says("S1"))["grade_informed_start"]
    assert found["start"] == start
    assert {"risk of bias", "indirectness", "publication bias"} <= set(found["not_assessed"])


def test_it_goes_down_for_what_can_be_computed() -> None:
    two = one([source(1), source(2), source(3)], says("S1 S2", "S3"))["grade_informed_start"]
    assert (two["start"], two["level"]) == ("high", "low")
    assert [why.split(":")[0] for why in two["down"]] == ["inconsistency", "imprecision"]
    many = [source(n) for n in range(1, 9)]
    assert one(many, says(ids(many)))["grade_informed_start"]["level"] == "high"
    assert "inconsistency" in one(many, says(ids(many), level=1))["grade_informed_start"]["not_assessed"]
    assert one([source(1)], says())["grade_informed_start"] is None


def effect(size: float, error: float, measure: str = "d") -> dict[str, Any]:
    return {"effect_size": size, "effect_se": error, "effect_measure": measure}


def test_heterogeneity_of_effects() -> None:
    manifest = [source(1, **effect(0.1, 0.1)), source(2, **effect(0.5, 0.1)), source(3, **effect(0.9, 0.2)), source(4)]
    found = one(manifest, says("S1 S2", "S3"))["effects"]
    # By hand: weights 100, 100, 25; mean 82.5/225; Q = 100·.0711 + 100·.0178 + 25·.2844; C = 225 - 20625/225;
    # tau² = 14/C; then weights 8.696, 8.696, 6.897.
    assert found == {"measure": "d", "k": 3, "Q": 16, "I2": 87.5, "tau2": 0.105, "pooled": 0.47037, "se": 0.202911}  # fmt: skip
    same = [source(n, **effect(0.3, 0.1)) for n in (1, 2)]
    assert one(same, says("S1 S2"))["effects"] == {"measure": "d", "k": 2, "Q": 0, "I2": 0, "tau2": 0, "pooled": 0.3, "se": 0.0707107}  # fmt: skip
    # Information only: no label depends on it.
    bare = one([source(1), source(2), source(3), source(4)], says("S1 S2", "S3"))
    assert {**one(manifest, says("S1 S2", "S3")), "effects": None, "grade_informed_start": None} == {
        **bare,
        "grade_informed_start": None,
    }


@pytest.mark.parametrize(
    "other",
    [
        {},
        effect(0.5, 0.1, "OR"),
        effect(0.5, 0),
        effect(math.nan, 1),
        {"effect_size": "0.5", "effect_se": 1, "effect_measure": "d"},
    ],
)
def test_no_heterogeneity_without_two_effects_of_one_measure(other: dict[str, Any]) -> None:
    assert one([source(1, **effect(0.1, 0.1)), source(2, **other)], says("S1 S2"))["effects"] is None


# --- properties, over random evidence ---

NAMES = ["Roe, J.", "Poe, B.", "Doe, C.", "Loe, D.", "Roe J", "et al."]
METADATA = st.fixed_dictionaries(
    {
        "source_type": st.sampled_from(SOURCE_TYPES),
        "replication_status": st.sampled_from(REPLICATION_STATUSES),
        "integrity_status": st.sampled_from([*INTEGRITY_STATUSES, "none", "none"]),
        "authors": st.lists(st.sampled_from(NAMES), max_size=3),
        "title": st.sampled_from(
            ["Naps and alertness in nurses", "Ego depletion and its discontents", "Introduction", ""]
        ),
        "doi": st.sampled_from([None, None, None, "10.1000/a", "10.1000/b", "10.31234/osf.io/abcde"]),
        "abstract_only": st.booleans(),
    }
)
STANCE = st.sampled_from(["supports", "supports", "contradicts", "unclear"])
EVIDENCE = st.lists(st.tuples(METADATA, STANCE), max_size=8)
TEXT = st.sampled_from(["Naps help.", "Multiple studies show that it failed to replicate.", "Many trials agree."])
THOUSAND = hypothesis.settings(PROPERTY, max_examples=1000)
Evidence = list[tuple[dict[str, Any], str]]


def weigh(given_evidence: Evidence, text: str, order: list[int] | None = None) -> tuple[dict[str, Any], list[Flag]]:
    manifest = [source(n, **metadata) for n, (metadata, _) in enumerate(given_evidence, 1)]
    stances = {f"S{n}": {"stance": s, "level": 2, "score": 1} for n, (_, s) in enumerate(given_evidence, 1)}
    if order is not None:
        manifest = [manifest[n] for n in order]
        stances = {manifest[n]["id"]: stances[manifest[n]["id"]] for n in reversed(range(len(order)))}
    only = claim(1, text)
    overall = evidence.assess([only], manifest, {"C1": stances}, WEIGHTS)
    assert only.confidence is not None
    return only.confidence, overall.flags


def no_higher(low: dict[str, Any], high: dict[str, Any]) -> None:
    close = 2e-6
    assert low["mean"] <= high["mean"] + close
    assert low["interval"][0] <= high["interval"][0] + close
    assert low["interval"][1] <= high["interval"][1] + close


@THOUSAND
@given(EVIDENCE, TEXT, st.randoms(use_true_random=False))
def test_random_evidence_keeps_its_bounds_and_has_no_order(sources: Evidence, text: str, chance: random.Random) -> None:
    found, flags = weigh(sources, text)
    low, high = found["interval"]
    assert 0 <= low <= high <= 1
    assert 0 <= found["mean"] <= 1
    assert 0.01 - 1e-9 <= found["odds"] <= 100 + 1e-9
    assert found["weight_for"] >= 0
    assert found["weight_against"] >= 0
    assert 0 <= found["n_eff"] <= len(found["supports"]) + 1e-9
    assert found["label"] in RANK
    assert found["independence_exact"]
    retracted = {f"S{n}" for n, (m, _) in enumerate(sources, 1) if m["integrity_status"] == "retracted"}
    assert not retracted & {*found["supports"], *found["contradicts"], *found["counted"]}
    order = list(range(len(sources)))
    chance.shuffle(order)
    assert weigh(sources, text, order) == (found, flags)
    json.dumps(found, allow_nan=False)


@THOUSAND
@given(EVIDENCE, st.tuples(METADATA, STANCE), TEXT)
def test_more_support_never_lowers_and_more_contradiction_never_raises(
    sources: Evidence, more: tuple[dict[str, Any], str], text: str
) -> None:
    metadata, _ = more
    # A retraction and a failed replication are news of another kind: see below.
    metadata = metadata | {"integrity_status": "none"}
    if metadata["replication_status"] == "failed":
        metadata["replication_status"] = "unknown"
    before, _ = weigh(sources, text)
    supported, _ = weigh([*sources, (metadata, "supports")], text)
    contradicted, _ = weigh([*sources, (metadata, "contradicts")], text)
    # One that shows itself to be a copy of a retracted or failed work is no support.
    new = f"S{len(sources) + 1}"
    if new not in supported["excluded"] and new not in supported["replication"]["failed"]:
        no_higher(before, supported)
    no_higher(contradicted, before)
    assert RANK[contradicted["label"]] <= RANK[before["label"]]
    # A source that has nothing to do with the others does not lower the label either.
    apart = {"source_type": metadata["source_type"], "replication_status": metadata["replication_status"]}
    assert RANK[before["label"]] <= RANK[weigh([*sources, (apart, "supports")], text)[0]["label"]]


@THOUSAND
@given(EVIDENCE, st.tuples(METADATA, STANCE), TEXT, st.integers(0, 7))
def test_a_failed_replication_never_raises_and_a_success_never_lowers(
    sources: Evidence, more: tuple[dict[str, Any], str], text: str, which: int
) -> None:
    before, _ = weigh(sources, text)
    metadata, _ = more
    failed = metadata | {"replication_status": "failed", "integrity_status": "none"}
    with_one_more, _ = weigh([*sources, (failed, "supports")], text)
    no_higher(with_one_more, before)
    assert RANK[with_one_more["label"]] <= RANK[before["label"]]
    if which < len(sources):
        metadata, stance = sources[which]
        found = {}
        for status in REPLICATION_STATUSES:
            changed = [*sources]
            changed[which] = (metadata | {"replication_status": status}, stance)
            found[status], _ = weigh(changed, text)
        no_higher(found["failed"], found["unknown"])
        assert RANK[found["failed"]["label"]] <= RANK[found["unknown"]["label"]]
        assert found["unknown"] == found["not_attempted"] == found["mixed"]
        if stance == "supports":
            no_higher(found["unknown"], found["successful"])
            assert RANK[found["unknown"]["label"]] <= RANK[found["successful"]["label"]]


@THOUSAND
@given(EVIDENCE.filter(bool), st.data(), TEXT)
def test_a_copy_of_a_source_changes_nothing(sources: Evidence, data: st.DataObject, text: str) -> None:
    which = data.draw(st.integers(0, len(sources) - 1))
    metadata, stance = sources[which]
    document = {"document_id": f"document-{which + 1}"}
    before, _ = weigh(sources, text)
    after, _ = weigh([*sources, (metadata | document, stance)], text)
    for key in ("label", "counted", "weight_for", "weight_against", "n_eff", "mean", "interval", "odds", "missing"):
        assert after[key] == before[key], key


def test_the_shipped_corpus_can_be_assessed() -> None:
    documents = records.read(TREE / "corpus" / "psychology.jsonl")
    manifest: list[dict[str, Any]] = [
        {"id": f"S{n}", "document_id": r.id, "text": r.text, "label": "", "metadata": r.metadata()}
        for n, r in enumerate(documents[:200], 1)
    ]
    found = one(manifest, says(ids(manifest[:100]), ids(manifest[100:]), level=2))
    assert found["label"] == "contested"
    retracted = [s["id"] for s in manifest if s["metadata"]["integrity_status"] == "retracted"]
    assert set(retracted) <= set(found["excluded"])
    assert 0 < len(found["counted"]) < 200
    assert found["independence_exact"]


# --- speed ---


def test_forty_claims_of_twenty_sources_take_no_time() -> None:
    manifest = [source(n, authors=[f"Author{n * k % 17}, A." for k in (1, 2, 3)]) for n in range(1, 21)]
    everyone = says(ids(manifest[:12]), ids(manifest[12:]))
    claims = [claim(n, f"Claim {n}.", "S1") for n in range(1, 41)]
    started = time.process_time()
    evidence.assess(claims, manifest, {c.id: everyone for c in claims}, WEIGHTS)
    assert time.process_time() - started < 0.5


# --- agreement between samples ---


def test_agreement_is_the_share_of_samples_that_hold_a_claim(embedder: Embedder) -> None:
    claims = [
        claim(1, "Short naps improve alertness."),
        claim(2, "The effect was 0.48 in 23 laboratories."),
        claim(3, "Note the sources.", kind="meta"),
    ]
    samples = [
        [claim(1, "Short naps improve alertness."), claim(2, "The effect was 0.48 in 23 laboratories.")],
        [claim(1, "Alertness is improved by short naps."), claim(2, "The effect was 0.84 in 23 laboratories.")],
        [claim(1, "Short naps do not improve alertness.")],
        [claim(1, "Caffeine is a stimulant.")],
        [],
    ]
    threshold = WEIGHTS["agreement"]["similarity"]
    found = evidence.agreement(claims, samples, embedder, threshold)
    assert list(found) == ["C1", "C2"]
    assert found["C1"]["share"] == pytest.approx(0.4)
    assert found["C2"]["share"] == pytest.approx(0.2)
    assert found["C1"]["nearest"][0] == pytest.approx(1, abs=1e-3)
    assert found["C1"]["nearest"][2] > threshold  # a vector does not see the "not"
    assert len(found["C1"]["nearest"]) == 5
    assert evidence.agreement(claims, samples[::-1], embedder, threshold)["C1"]["share"] == found["C1"]["share"]


def test_no_samples_are_no_agreement(embedder: Embedder) -> None:
    assert evidence.agreement([claim()], [], embedder, 0.8) == {"C1": {"share": None, "samples": 0, "nearest": []}}
    assert evidence.agreement([], [[claim()]], embedder, 0.8) == {}


# --- the configuration ---


def _load(folder: Path, monkeypatch: pytest.MonkeyPatch, data: Any) -> evidence.Weights:
    (folder / "evidence.yaml").write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    monkeypatch.setenv("CONFIG_DIR", str(folder))
    return evidence.load()


def test_every_key_is_required_and_no_other_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _load(tmp_path, monkeypatch, WEIGHTS) == WEIGHTS
    for block, keys in WEIGHTS.items():
        without = {name: keys for name, keys in WEIGHTS.items() if name != block}
        with pytest.raises(Problem, match=rf"evidence\.yaml: {block} must hold the keys"):
            _load(tmp_path, monkeypatch, without)
        for key in keys:
            for change, said in (
                ({k: v for k, v in keys.items() if k != key}, f"{block}: missing key {key}"),
                (keys | {key: "much"}, f"{block}: {key} must be a"),
                (keys | {key: True}, f"{block}: {key} must be a"),
                (keys | {key: math.nan}, f"{block}: {key} must be"),
                (keys | {key: -1}, f"{block}: {key} must be between"),
                (keys | {"extra": 1}, f"{block}: unknown key extra"),
            ):
                with pytest.raises(Problem, match=re.escape(said)):
                    _load(tmp_path, monkeypatch, WEIGHTS | {block: change})
    with pytest.raises(Problem, match="unknown block extra"):
        _load(tmp_path, monkeypatch, WEIGHTS | {"extra": {}})
    with pytest.raises(Problem, match="prior_odds must lie"):
        _load(tmp_path, monkeypatch, WEIGHTS | {"replication": WEIGHTS["replication"] | {"prior_odds": 90, "bound": 3}})
    with pytest.raises(Problem, match="is not YAML"):
        _load(tmp_path, monkeypatch, "a: [")
    (tmp_path / "evidence.yaml").unlink()
    with pytest.raises(Problem, match="does not exist"):
        evidence.load()


def test_every_number_is_explained() -> None:
    """Each key of the file, but the designs' weights, has a comment right above it."""
    lines = (TREE / "config" / "evidence.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        key = line.strip().split(":")[0]
        if line.startswith("  ") and not line.strip().startswith("#") and key not in SOURCE_TYPES:
            assert lines[number - 1].strip().startswith("#"), line


# --- the documentation ---


def _blocks(language: str) -> list[str]:
    text = (TREE / "docs" / "evidence.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_worked_example_of_the_documentation() -> None:
    [example] = _blocks("json")
    data = json.loads(example)
    manifest = [{"id": s.pop("id"), "document_id": str(n), "metadata": s} for n, s in enumerate(data["sources"])]
    claims = [claim(n, c["text"], *c["cited"]) for n, c in enumerate(data["claims"], 1)]
    stances = {f"C{n}": says(c["supports"], c["contradicts"]) for n, c in enumerate(data["claims"], 1)}
    overall = evidence.assess(claims, manifest, stances, WEIGHTS)
    lines = [line for c in claims for line in evidence.explain(c)]
    lines += [f"{f.claim} {f.kind}: {f.detail}" for f in overall.flags]
    lines += [f"overall {overall.label}: {overall.reason}"]
    rules, output = _blocks("text")
    assert rules.splitlines() == overall.rule
    assert output.splitlines() == lines


def test_the_documented_thresholds() -> None:
    """What docs/evidence.md and config/evidence.yaml say of P and well_supported."""
    begins = {p: beta.interval(0.9, *evidence.posterior(1, p, 0))[0] for p in (7.3, 7.4)}
    assert begins[7.3] < 0.7 <= begins[7.4]
    assert beta.interval(0.9, *evidence.posterior(16, 1, 0))[0] > 0.7
    text = (TREE / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert "P = 7.4" in text
    for design, weight in WEIGHTS["quality"].items():
        assert re.search(rf"{design}\b[^|]*\|\s*{weight:g}\s*\|", text), design
