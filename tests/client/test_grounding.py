"""Level 1: is a sentence about what its cited sources say? With the real embedding model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY, TREE, Hashed

import grounding
from common.problems import Problem
from embedding import Embedder
from ledger import Claim, Flag

THRESHOLDS: dict[str, Any] = yaml.safe_load((TREE / "config" / "checks.yaml").read_text(encoding="utf-8"))["grounding"]
NAPS = (
    "Short naps improve alertness in shift workers. Twenty minutes were enough in a trial of 60 nurses. "
    "Longer naps left people groggy, and well-\nbeing did not change."
)
DEPLETION = "Ego depletion failed to replicate in 23 laboratories with 2,141 participants."


def source(number: int, text: str, document: str = "", **metadata: Any) -> dict[str, Any]:
    return {
        "id": f"S{number}",
        "document_id": document or f"document-{number}",
        "text": text,
        "metadata": {"title": "", "authors": ["Roe, J."], "year": 2019} | metadata,
    }


MANIFEST = [
    source(1, NAPS, title="Naps and alertness"),
    source(2, DEPLETION, authors=["Hagger, M. S.", "Chatzisarantis, N."], year=2016),
    source(3, "Coffee right before a nap improved alertness more than the nap alone. The sample was small."),
    source(4, "Nurses who napped were content in 80% of cases.", document="document-1"),
]


def claim(text: str, *cited: str, kind: Any = "fact", unknown: tuple[str, ...] = ()) -> Claim:
    return Claim("C1", text, text, (0, len(text)), "", kind, list(cited), list(unknown))


def check(
    embedder: Embedder, *claims: Claim, manifest: list[dict[str, Any]] | None = None, **changes: float
) -> list[Flag]:
    for number, one in enumerate(claims, 1):
        one.id = f"C{number}"
    return grounding.check(claims, MANIFEST if manifest is None else manifest, embedder, THRESHOLDS | changes)


@pytest.mark.parametrize(
    ("text", "cited", "status"),
    [
        ("Shift workers are more alert after short naps.", ["S1"], "grounded"),
        ("In nurses, a nap of 20 minutes was enough.", ["S1"], "grounded"),
        ("The effect of exhausted self-control did not replicate in 23 labs.", ["S2"], "grounded"),
        ("Hagger et al. (2016) could not replicate ego depletion.", ["S2"], "grounded"),
        ("Naps help and ego depletion does not replicate.", ["S1", "S2"], "grounded"),
        ("Two trials found that naps improve alertness.", ["S1", "S3"], "grounded"),  # it counts its own citations
        ("Short naps improve alertness, unlike Hagger's 2016 depletion.", ["S1"], "grounded"),  # whose year is known
        ("80% of nurses were content after short naps.", ["S1"], "grounded"),  # in another chunk of the same document
        ("The violin was invented in Italy.", ["S1"], "off_source"),
        ("Ego depletion failed to replicate in 24 laboratories.", ["S2"], "number_mismatch"),
        ("Short naps improved alertness in 2016.", ["S1"], "number_mismatch"),
        ("Short naps improve alertness “in all shift workers”.", ["S1"], "quote_mismatch"),
        ("Workers at night profit from sleep in the afternoon according to their employers.", ["S1"], "weak"),
    ],
)
def test_a_claim_gets_a_status(embedder: Embedder, text: str, cited: list[str], status: str) -> None:
    one = claim(text, *cited)
    flags = check(embedder, one)
    assert one.status == status, (one.checks, flags)
    assert (status == "grounded") == (not [flag for flag in flags if flag.kind == status]), flags
    if status != "grounded":
        assert status in [flag.kind for flag in flags]


def test_the_best_window_is_told_with_its_place_and_its_parts(embedder: Embedder) -> None:
    one = claim("Twenty minutes were enough for 60 nurses.", "S1")
    assert check(embedder, one) == []
    [(name, found)] = one.checks["grounding"].items()
    assert name == "S1"
    assert found["window"] == "Twenty minutes were enough in a trial of 60 nurses."
    assert NAPS[slice(*found["span"])] == found["window"]
    assert found["score"] == pytest.approx((found["coverage"] + found["cosine"]) / 2, abs=1e-4)
    assert (found["missing_numbers"], found["missing_quotes"], found["status"]) == ([], [], "grounded")
    json.dumps(one.checks)


def test_claims_that_cite_nothing_and_words_about_the_text_are_left_alone(embedder: Embedder) -> None:
    claims = [
        claim("Naps help."),
        claim("Naps help.", unknown=("S9",)),
        claim("This section is about naps.", "S1", kind="meta"),
    ]
    assert check(embedder, *claims) == []
    assert [one.status for one in claims] == ["uncited", "unknown_source", "not_a_claim"]
    assert all("grounding" not in one.checks for one in claims)


def test_hedges_and_methods_are_checked_too(embedder: Embedder) -> None:
    claims = [claim("It is unclear why violins age.", "S1", kind=kind) for kind in ("hedge", "method")]
    assert {flag.kind for flag in check(embedder, *claims)} == {"off_source"}


def test_a_better_source_is_named(embedder: Embedder) -> None:
    one = claim("Ego depletion failed to replicate in 23 laboratories.", "S1")
    flags = check(embedder, one)
    assert one.status == "off_source"
    assert [(flag.kind, flag.source) for flag in flags] == [("off_source", "S1"), ("better_source", "S2")]
    assert flags[1].detail.startswith("S2 fits better than S1")


def test_where_a_missing_number_or_quotation_is_instead_is_said(embedder: Embedder) -> None:
    flags = check(embedder, claim("Naps improve alertness in 23 shift workers, “failed to replicate in”.", "S1"))
    assert [(flag.kind, flag.detail.partition("; ")[2]) for flag in flags][:2] == [
        ("quote_mismatch", "S2 has it"),
        ("number_mismatch", "S2 has it"),
    ]


def test_a_decorating_source_is_flagged_though_the_claim_is_grounded(embedder: Embedder) -> None:
    one = claim("Short naps improve alertness in shift workers.", "S1", "S2")
    flags = check(embedder, one)
    assert one.status == "grounded"
    assert [(flag.kind, flag.source) for flag in flags] == [("off_source", "S2")]


def test_two_sources_may_share_a_claim(embedder: Embedder) -> None:
    text = "Short naps improve alertness in shift workers, while ego depletion failed to replicate in laboratories."
    alone, both = claim(text, "S1"), claim(text, "S1", "S2")
    check(embedder, alone, both)
    assert both.status == "grounded"
    assert both.checks["grounding"]["S1"]["score"] == alone.checks["grounding"]["S1"]["score"]


def test_only_words_of_the_language_are_compared_by_meaning(embedder: Embedder) -> None:
    one = claim("It does not do so.", "S1")
    check(embedder, one)
    found = one.checks["grounding"]["S1"]
    assert found["coverage"] == 0
    assert found["score"] == found["cosine"]


# --- quotations -------------------------------------------------------------------------------------------------------

RIGHT_QUOTES = [
    "“Short naps improve alertness”",
    '"short naps improve alertness in shift workers."',
    "‘naps left people groggy,’",
    "'left people groggy'",
    "«Twenty minutes were enough»",
    "„Twenty minutes were enough“",
    "“Short naps … in shift workers”",
    "“Short naps [they] improve alertness”",
    "“improve alertness … Twenty minutes were enough”",  # reaches into the next sentence, and shows it
    "“improve alertness in shift workers. … in a trial”",
    "“groggy, and well-being did not change”",
    "“groggy, and wellbeing did not change”",
    "“Naps  and\nalertness by title”".replace(" by title", ""),
    "“naps” and “a nap”",  # too short to be a quotation
    "“Short **naps** improve alertness”",
]


@pytest.mark.parametrize("quote", RIGHT_QUOTES)
def test_a_quotation_may_differ_in_marks_and_spaces_only(embedder: Embedder, quote: str) -> None:
    one = claim(f"About naps and alertness they write {quote} of shift workers.", "S1")
    assert "quote_mismatch" not in [flag.kind for flag in check(embedder, one)]


@pytest.mark.parametrize(
    "quote",
    [
        "“Short naps improved alertness”",
        '"Short naps do improve alertness"',
        "‘naps left people tired’",
        "'left some people groggy'",
        "«Thirty minutes were enough»",
        "„Twenty minutes were not enough“",
        "“in shift workers … Short naps”",
        "“Short naps … were enough in a trial”",  # spliced of two sentences
        "“Short naps improve alertness … left people groggy”",
        "“Short naps improve alertness. … left people groggy”",
        "“Short naps [never] improve alertness in all”",
        "“hort naps improve alert”",
        "“improve alertness in shift work”",
        "which “improve all alertness",  # never closed
        "improve all alertness” as they say",  # opened in the sentence before
    ],
)
def test_an_altered_quotation_is_found(embedder: Embedder, quote: str) -> None:
    one = claim(f"Naps and alertness: {quote}", "S1") if "opened" not in quote else claim(quote, "S1")
    assert "quote_mismatch" in [flag.kind for flag in check(embedder, one)]


def test_apostrophes_open_no_quotation() -> None:
    assert grounding.quotations("The nurses' naps weren't long, and the workers' day wasn't either.") == []


WORDS = st.lists(st.sampled_from(DEPLETION.rstrip(".").split() + NAPS.split()), min_size=4, max_size=12)


@given(WORDS, st.integers(0, 11), st.sampled_from(["“{}”", '"{}"', "«{}»", "‘{}’"]))
@PROPERTY
def test_a_source_has_each_of_its_sentences_and_none_with_a_word_put_in(words: list[str], at: int, marks: str) -> None:
    text = " ".join(words)
    texts = grounding._quotable(f"Before that. {text} And after.")
    bare = [word.strip(".,") for word in words]
    quote = marks.format(" ".join(words).rstrip("."))
    assert grounding._missing_quotes(grounding.quotations(f"They say {quote} there."), texts) == []
    altered = marks.format(" ".join([*bare[: at % len(bare)], "zebra", *bare[at % len(bare) :]]))
    assert grounding._missing_quotes(grounding.quotations(f"They say {altered} there."), texts)


# --- any input --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.text(max_size=120), st.sets(st.sampled_from(["S1", "S2", "S3"]))), max_size=5),
    st.lists(st.text(max_size=200), min_size=3, max_size=3),
)
@PROPERTY
def test_equal_input_gives_equal_output(texts: list[tuple[str, set[str]]], sources: list[str]) -> None:
    manifest = [source(number, text) for number, text in enumerate(sources, 1)]
    first = [Claim(f"C{i}", text, text, (0, len(text)), "", "fact", sorted(ids)) for i, (text, ids) in enumerate(texts)]
    second = copy.deepcopy(first)
    flags = grounding.check(first, manifest, Hashed(), THRESHOLDS)
    assert flags == grounding.check(second, manifest, Hashed(), THRESHOLDS)
    assert first == second
    for one in first:
        assert one.status in (*grounding.STATUSES, "uncited")
        assert set(one.checks.get("grounding", {})) == set(one.cited)
        for name, found in one.checks.get("grounding", {}).items():
            assert manifest[int(name[1:]) - 1]["text"][slice(*found["span"])] == found["window"]
            assert 0 <= found["coverage"] <= 1
            assert 0 <= found["score"] <= 1.0001


def test_a_hostile_claim_takes_no_time() -> None:
    texts = [
        '"' * 50_000,
        "“" * 50_000,
        "[" * 50_000,
        " " * 50_000 + "-",
        "'a" * 30_000,
        "“a b c " * 10_000,
        "- " * 50_000,
    ]
    manifest = [source(number, text) for number, text in enumerate(texts, 1)]
    for text in texts:
        grounding.check([claim(f"“Naps {text}", "S1")], manifest, Hashed(), THRESHOLDS)


def test_nothing_to_check_needs_no_model() -> None:
    assert grounding.check([], MANIFEST, None, THRESHOLDS) == []  # type: ignore[arg-type]


def test_no_text_is_encoded_twice() -> None:
    model = Hashed()
    claims = [claim("Short naps improve alertness.", "S1", "S3"), claim("Short naps improve alertness.", "S1")]
    check(model, *claims)
    assert len(model.texts) == len(set(model.texts))


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_thresholds_come_from_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONFIG_DIR", str(TREE / "config"))
    assert grounding.thresholds() == THRESHOLDS
    assert THRESHOLDS["off_source"] < THRESHOLDS["weak"]
    monkeypatch.setenv("CONFIG_DIR", str(tmp_path))
    for changes, message in (
        ({"weak": 2}, "grounding: weak must be between 0 and 1"),
        ({"wake": 0.3}, "unknown key wake"),
    ):
        (tmp_path / "checks.yaml").write_text(yaml.safe_dump({"grounding": THRESHOLDS | changes}))
        with pytest.raises(Problem, match=message):
            grounding.thresholds()


def test_a_stricter_threshold_flags_more(embedder: Embedder) -> None:
    one = claim("Shift workers are more alert after short naps.", "S1")
    assert check(embedder, one) == []
    assert [flag.kind for flag in check(embedder, one, weak=0.99)] == ["weak"]
    assert [flag.kind for flag in check(embedder, one, weak=1, off_source=0.99)] == ["off_source"]
