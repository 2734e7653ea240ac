"""alce: ALCE's citation recall and precision, against figures computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY

import alce
from ledger import Claim

# For each claim the sets of sources that entail it.
Table = dict[str, list[set[str]]]


def claim(number: int, *cited: str, unknown: Sequence[str] = (), kind: str = "fact") -> Claim:
    return Claim(f"C{number}", "text", "text", (0, 4), "", kind, list(cited), list(unknown))  # type: ignore[arg-type]


def by(table: Table) -> alce.Entails:
    return lambda claim, ids: set(ids) in table.get(claim.id, [])


# An answer of five sentences:
# C1 [S1]           entailed by S1
# C2 [S1, S2]       S1 alone entails it, S2 does not; both together do: S2 is not needed
# C3 [S1, S2]       neither alone does, both together do: both are needed
# C4 [S3]           S3 does not entail it
# C5                cites nothing
# recall = 3/5; citations = 1 + 2 + 2 + 1 = 6; needed = 1 + 1 + 2 = 4; precision = 4/6
CLAIMS = [claim(1, "S1"), claim(2, "S1", "S2"), claim(3, "S1", "S2"), claim(4, "S3"), claim(5)]
TABLE: Table = {"C1": [{"S1"}], "C2": [{"S1"}, {"S1", "S2"}], "C3": [{"S1", "S2"}]}


def test_the_example_computed_by_hand() -> None:
    found = alce.measure(CLAIMS, by(TABLE))
    assert (found.recall, found.precision) == (3 / 5, 4 / 6)
    assert found.f1 == pytest.approx(2 * 0.6 * (2 / 3) / (0.6 + 2 / 3))
    assert (found.statements, found.supported, found.citations, found.needed) == (5, 3, 6, 4)


@pytest.mark.parametrize(
    ("claims", "table", "recall", "precision"),
    [
        # Both entail it alone: both are fine, however needless one of them may be.
        ([claim(1, "S1", "S2")], {"C1": [{"S1"}, {"S2"}, {"S1", "S2"}]}, 1.0, 1.0),
        # Three sources; S3 does nothing, and {S1, S2} do without it; {S1, S3} and {S2, S3} do not do it.
        ([claim(1, "S1", "S2", "S3")], {"C1": [{"S1", "S2"}, {"S1", "S2", "S3"}]}, 1.0, 2 / 3),
        # Only all three together.
        ([claim(1, "S1", "S2", "S3")], {"C1": [{"S1", "S2", "S3"}]}, 1.0, 1.0),
        # One alone would do, but with the other the model is not sure any more: recall 0, so no citation counts.
        ([claim(1, "S1", "S2")], {"C1": [{"S1"}]}, 0.0, 0.0),
        # Recall 0 of one sentence: its two citations count against precision.
        ([claim(1, "S1"), claim(2, "S2", "S3")], {"C1": [{"S1"}]}, 0.5, 1 / 3),
        # An id that does not exist: recall 0, and its sentence's citations are not counted at all.
        ([claim(1, "S1"), claim(2, "S2", unknown=["S9"])], {"C1": [{"S1"}], "C2": [{"S2"}]}, 0.5, 1.0),
        ([claim(1, unknown=["S9"])], {}, 0.0, 0.0),
        ([claim(1), claim(2)], {}, 0.0, 0.0),
    ],
)
def test_each_case_of_the_definition(claims: list[Claim], table: Table, recall: float, precision: float) -> None:
    found = alce.measure(claims, by(table))
    assert (found.recall, found.precision) == (recall, precision)


def test_an_empty_answer_has_no_figures() -> None:
    found = alce.measure([], by({}))
    assert (found.recall, found.precision, found.f1, found.statements) == (None, None, None, 0)


def test_at_most_cuts_to_the_first_citations() -> None:
    one = [claim(1, "S1", "S2", "S3", "S4")]
    table: Table = {"C1": [{"S1", "S2", "S3"}]}
    assert alce.measure(one, by(table)).recall == 0
    found = alce.measure(one, by(table), at_most=3)
    assert (found.recall, found.precision, found.citations) == (1.0, 1.0, 3)


def test_meta_sentences_count_unless_they_are_left_out() -> None:
    claims = [claim(1, "S1"), claim(2, kind="meta")]
    table: Table = {"C1": [{"S1"}]}
    assert alce.measure(claims, by(table)).recall == 0.5
    assert alce.measure(alce.without_meta(claims), by(table)).recall == 1.0


def test_the_two_levels_have_different_names() -> None:
    found = alce.measure(CLAIMS, by(TABLE))
    assert found.named()["citation_recall"] == found.named("lexical_")["lexical_citation_recall"] == 0.6
    assert set(found.named()) == {"citation_recall", "citation_precision", "citation_f1", "citation_counts"}
    assert not set(found.named()) & set(found.named("lexical_"))


IDS = ["S1", "S2", "S3", "S4"]
SUBSETS = [set(s) for s in chain.from_iterable(combinations(IDS, size) for size in range(1, 5))]
answers = st.lists(st.lists(st.sampled_from(IDS), unique=True, max_size=4), min_size=1, max_size=5)


@PROPERTY
@given(answers, st.data())
def test_it_is_the_formula_for_any_verdicts(cited: list[list[str]], data: st.DataObject) -> None:
    claims = [claim(number, *ids) for number, ids in enumerate(cited)]
    table: Table = {c.id: data.draw(st.lists(st.sampled_from(SUBSETS), max_size=8)) for c in claims}
    entails: Callable[[Claim, Sequence[str]], bool] = by(table)
    recalls = [bool(c.cited) and entails(c, c.cited) for c in claims]
    fine = [
        recalled and not (not entails(c, [i]) and len(c.cited) > 1 and entails(c, [j for j in c.cited if j != i]))
        for c, recalled in zip(claims, recalls, strict=True)
        for i in c.cited
    ]
    found = alce.measure(claims, entails)
    assert found.recall == sum(recalls) / len(claims)
    assert found.precision == (sum(fine) / len(fine) if fine else 0.0)


# --- level 1 -----------------------------------------------------------------------------------------------------------


def grounded(number: int, status: str, **sources: str) -> Claim:
    """A claim as the grounding check leaves it; of each source its status, with "number" one that lacks a number."""
    made = claim(number, *sources)
    made.status = status
    made.checks["grounding"] = {
        source: {
            "status": "grounded" if word == "number" else word,
            "missing_numbers": ["12"] if word == "number" else [],
            "missing_quotes": [],
        }
        for source, word in sources.items()
    }
    return made


def test_the_lexical_figures_computed_by_hand() -> None:
    claims = [
        grounded(1, "grounded", S1="grounded"),
        grounded(2, "grounded", S1="grounded", S2="off_source"),  # S2 is not needed
        grounded(3, "grounded", S1="weak", S2="weak"),  # together only
        grounded(4, "number_mismatch", S1="number"),
        grounded(5, "off_source", S3="off_source"),
        claim(6),
    ]
    found = alce.measure(claims, alce.grounds)
    assert found.recall == 3 / 6
    assert found.precision == (1 + 1 + 2) / (1 + 2 + 2 + 1 + 1)


def test_what_level_2_overruled_does_not_change_the_lexical_figures() -> None:
    one = grounded(1, "grounded", S1="weak", S2="weak")
    before = alce.measure([one], alce.grounds)
    one.checks["overruled"], one.status = one.status, "contradicted"
    assert alce.measure([one], alce.grounds) == before
    assert before.recall == 1.0


def test_a_claim_that_level_1_did_not_look_at_is_not_grounded() -> None:
    assert not alce.grounds(claim(1, "S1"), ["S1"])
