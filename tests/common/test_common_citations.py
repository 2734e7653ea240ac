"""common.citations: what is cited, what is malformed, which claim a citation belongs to."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.citations import Claim, brackets, cited, claims, flags, malformed, markup

KNOWN = ["S1", "S2", "S3"]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("It failed [S1].", ["S1"]),
        ("a [S2] b [S1] c [S2]", ["S2", "S1"]),
        ("[S1, S3]", ["S1", "S3"]),
        ("[S1; S3 and S12 & S4]", ["S1", "S3", "S12", "S4"]),
        ("[ S1 ,S2 ]", ["S1", "S2"]),
        ("[S1][S2] [S3]", ["S1", "S2", "S3"]),
        ("[S2-S4]", ["S2", "S3", "S4"]),
        ("[S1, S2, and S4]", ["S1", "S2", "S4"]),
        ("[S2‑S4] [S7 − S8]", ["S2", "S3", "S4", "S7", "S8"]),
        ("[S2–S4, S9]", ["S2", "S3", "S4", "S9"]),
        ("[S2 — S3]", ["S2", "S3"]),
        ("[S3-S3]", ["S3"]),
        ("[S4-S2]", ["S4", "S2"]),
        ("[S1-S999999]", ["S1", "S999999"]),
        ("[S1-S201]", [f"S{n}" for n in range(1, 202)]),
        ("[s1] (S1) S1 [SOURCE 1] [1] [S1, p. 4] [Sx] []", []),
        ("", []),
    ],
)
def test_the_ids_of_a_text_in_order_each_once(text: str, ids: list[str]) -> None:
    assert cited(text) == ids


@pytest.mark.parametrize(
    "bracket",
    "[s1]|[S1, p. 4]|[S1 to S3]|[S1-3]|[SOURCE 2]|[Source: S1]|[src 4]|[refs. 1 and 2]|[3]|[1, 2]|[1–3]|[S1,]|[S 1]".split(
        "|"
    ),
)
def test_a_bracket_that_only_looks_like_a_citation_is_reported_as_written(bracket: str) -> None:
    assert malformed(f"It failed {bracket}, they say [S1].") == [bracket]


@pytest.mark.parametrize(
    "text", ["[S1] [S1, S2] [S1-S2]", "CI [0.2, 0.4]", "[2018]", "[sic]", "[n = 40]", "[see Table 2]"]
)
def test_citations_and_other_brackets_are_not_malformed(text: str) -> None:
    assert malformed(text) == []


def test_brackets_are_found_where_they_stand_with_footnote_marks() -> None:
    text = "One [S1, S3]. Two [3][^a]. Three 【4†source】 [0.2, 0.4] [sic] 【note】."
    found = brackets(text)
    assert all(text[b.start : b.end] == b.text for b in found)
    assert [(b.text, b.ids) for b in found] == [
        ("[S1, S3]", ["S1", "S3"]),
        ("[3]", []),
        ("[^a]", []),
        ("【4†source】", []),
    ]


# --- claims ----------------------------------------------------------------------------------------------------------


def texts(synthesis: str) -> list[tuple[str, list[str]]]:
    return [(claim.text, claim.cited) for claim in claims(synthesis, KNOWN)]


@pytest.mark.parametrize(
    ("synthesis", "expected"),
    [
        ("It failed [S1]. It worked [S2].", [("It failed [S1].", ["S1"]), ("It worked [S2].", ["S2"])]),
        ("It failed. [S2] Next one [S1].", [("It failed [S2].", ["S2"]), ("Next one [S1].", ["S1"])]),
        ("Did it?[S1][S3] Yes.", [("Did it [S1][S3]?", ["S1", "S3"]), ("Yes.", [])]),
        ("He said “no.” [S1] Then.", [("He said “no [S1].”", ["S1"]), ("Then.", [])]),
        ("It failed.\n[S1]\nIt worked.\n\n[S2].", [("It failed [S1].", ["S1"]), ("It worked [S2]. .", ["S2"])]),
        ("Klein et al. [S1] found none.", [("Klein et al. [S1] found none.", ["S1"])]),
        ("Klein et al. [S1] RRRs failed.", [("Klein et al. [S1] RRRs failed.", ["S1"])]),
        ("# Summary\n\nText [S1].\n**Limits**\n**Next:**\n", [("Text [S1].", ["S1"])]),
        ("## Evidence [S1]\n**It is so [S2].**", [("Evidence [S1]", ["S1"]), ("**It is so [S2].**", ["S2"])]),
        ("- one [S1]\n* two\n3. three [S3]\n", [("one [S1]", ["S1"]), ("two", []), ("three [S3]", ["S3"])]),
        ("---\n\n12 %\n[S1]\n***", []),
        ("", []),
    ],
)
def test_each_sentence_is_a_claim_with_its_own_citations(synthesis: str, expected: list[tuple[str, list[str]]]) -> None:
    assert texts(synthesis) == expected


def test_ids_that_were_never_retrieved_are_told_apart() -> None:
    assert claims("It failed [S1, S7]. It worked [S2-S4] [SOURCE 2].", KNOWN) == [
        Claim("It failed [S1, S7].", ["S1"], ["S7"], []),
        Claim("It worked [S2-S4] [SOURCE 2].", ["S2", "S3"], ["S4"], ["[SOURCE 2]"]),
    ]


@pytest.mark.parametrize("line", ["[S9]", "- [S9]", "# About [S9]", "**All of it [S9]**", "Text.\n\n[S9]", "42 [S9]"])
def test_a_made_up_source_is_reported_wherever_it_stands(line: str) -> None:
    assert [claim.unknown for claim in claims(line, KNOWN)] == [["S9"]]


def test_flags_name_each_problem_with_its_sentence() -> None:
    found = claims("Good [S1]. Bare. Made up [S8, S9]. Odd [3] [S1].", KNOWN)
    assert flags(found) == [
        {"kind": "uncited", "detail": "no citation", "claim": "Bare."},
        {"kind": "unknown_source", "detail": "S8", "claim": "Made up [S8, S9]."},
        {"kind": "unknown_source", "detail": "S9", "claim": "Made up [S8, S9]."},
        {"kind": "malformed_citation", "detail": "[3]", "claim": "Odd [3] [S1]."},
    ]


def test_a_clean_synthesis_has_no_flags() -> None:
    assert flags(claims("# T\n\nOne [S1]. Two [S2, S3].\n\n- Three [S1-S3]", KNOWN)) == []


@pytest.mark.parametrize(
    ("text", "details"),
    [
        ("See ![x](https://evil.example/?q=1) [S1].", ["image"]),
        ("See [the paper](https://evil.example) [S1].", ["link"]),
        ("Naps help <img src=x> [S1].", ["html"]),
        ("Naps help [S1].\n\n## References\n- [S1] Fake, A. (2020).", ["reference list"]),
        ("Naps help [S1].\n**Bibliography:**", ["reference list"]),
        ("Naps help [S1].\n\n## 5. Literature cited ##\n- x", ["reference list"]),
        ("See [x](" + "y" * 900 + ") [S1].", ["link"]),
        ("Naps help [S1] (p < .05, a<b) [S2, S3].\nReferences to sleep abound [S1].", []),
    ],
)
def test_markup_that_is_not_plain_cited_text_is_flagged(text: str, details: list[str]) -> None:
    assert [(flag["kind"], flag["detail"]) for flag in markup(text)] == [("markup", detail) for detail in details]


@pytest.mark.parametrize(
    "piece", ["![", "[", "[](", "<", "< ", "\n", "[S1", "[S1, ", "[s", "[1,", "【1", "[^", "# ", "- ", "*_", "[S1]\n"]
)
def test_hostile_text_costs_linear_time(piece: str) -> None:
    text = piece * (100_000 // len(piece)) + " " * 100_000 + "x"
    started = time.process_time()
    brackets(text)
    malformed(text)
    markup(text)
    assert time.process_time() - started < 1


def test_an_endless_id_is_reported_and_breaks_nothing() -> None:
    bracket = f"[S1-S{'1' * 5000}]"
    [claim] = claims(f"Naps help {bracket}.", KNOWN)
    assert (claim.cited, claim.malformed) == ([], [bracket])


fragments = st.lists(
    st.sampled_from(
        '[S1]|[S2, S9]|[S3-S5]|[S4-S2]|[SOURCE 2]|[7]|[|]|Word|et al.|failed|0.5|p < .05|. |.|? |." | |\n|\n\n|# |- |1. |**'.split(
            "|"
        )
    ),
    max_size=25,
).map("".join)


@given(fragments)
def test_no_citation_of_the_text_is_lost_between_the_claims(synthesis: str) -> None:
    found = claims(synthesis, [])
    assert {i for claim in found for i in claim.unknown} == set(cited(synthesis))
    assert sorted(b for claim in found for b in claim.malformed) == sorted(malformed(synthesis))
    reported = [flag for flag in flags(found) if flag["kind"] == "unknown_source"]
    assert {flag["detail"] for flag in reported} == set(cited(synthesis))


@given(fragments)
def test_what_is_known_and_what_is_not_share_the_citations(synthesis: str) -> None:
    for claim in claims(synthesis, KNOWN):
        assert set(claim.cited) <= set(KNOWN)
        assert not set(claim.unknown) & set(KNOWN)
        assert set(claim.cited) | set(claim.unknown) == set(cited(claim.text))
