"""citation_check, mentions, margin: what is flagged, what is not, and how it is shown."""

from __future__ import annotations

import copy
import itertools
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY, TREE

import mentions
import records
from citation_check import NOTES, check
from common.text import clean
from ledger import Claim, Flag
from margin import BAR, margin
from split import split


def entry(
    number: int, authors: Sequence[str], year: int | None, title: str = "Naps", text: str = "Naps."
) -> dict[str, Any]:
    metadata = records.Record(f"d{number}", title, text, list(authors), year).metadata()
    return {"id": f"S{number}", "text": text, "label": records.label(metadata), "metadata": metadata}


MANIFEST = [
    entry(1, ["Roe, J.", "Poe, E. A."], 2019),
    entry(2, ["van den Berg, A.", "Müller-Lyer, F.", "O’Brien, K."], 2020),
    entry(3, ["Wagenmakers, E.-J.", "et al."], 2016, "A replication", "Strack et al. (1988) held pens; we repeat it."),
]


def flags(text: str, manifest: Sequence[dict[str, Any]] = MANIFEST) -> list[Flag]:
    return check(text, split(text, {source["id"] for source in manifest}), manifest)


def found(text: str, manifest: Sequence[dict[str, Any]] = MANIFEST) -> list[tuple[str | None, str]]:
    """Claim and kind of each flag, without notes."""
    return [(flag.claim, flag.kind) for flag in flags(text, manifest) if flag.kind not in NOTES]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Naps help [S1]. Coffee helps.", [("C2", "uncited")]),
        ("The trial was double-blind.", [("C1", "uncited")]),
        ("It is unclear whether naps help. The sources do not say. In summary:", []),
        ("It rose by 14 %.", [("C1", "uncited"), ("C1", "number_uncited")]),
        ("It is unclear whether 3 doses are enough.", [("C1", "number_uncited")]),
        ("It is unclear whether COVID-19, B12 or Study 2 is why.", []),
        ("The sources do not address 12 things. It is unclear.", [("C1", "uncited"), ("C1", "number_uncited")]),
        ("The 12 sources are old. All of the 3 sources are from 2019. It is unclear.", []),
        ("Naps help [S9, S1] and [S8].", [("C1", "unknown_source")] * 2),
        ("Naps help [3] [S1, p. 4].", [("C1", "malformed_citation")] * 2),
        ("Naps help ![x](http://e) [S1].", [("C1", "markup")]),
        ("Naps help [S1].\n\n## References\n- [S1] Roe, J. & Poe, E. A. (2019). Naps.", [(None, "reference_list")]),
        ("Naps help [S1] https://doi.org/10.1000/naps.", [("C1", "reference_list")]),
        ("Naps help [S1].\n\n**Sources:** [S1], [S2]", [("C2", "reference_list")]),
        ("Naps help [S1].\n\nReferences to naps abound [S1]. Sources: none, says Roe, J. [S1].", []),
        ("## What would change this\nA large trial of nurses. Naps cure all.\n\n# Next\nIt is unclear.", []),
        ("## What would change this\nNaps help 40 nurses. Naps help [S1].", [("C1", "uncited"), ("C1", "number_uncited")]),
        ("I cannot answer.", [(None, "no_claims")]),
        ("[S1] [S2] [S3]", [(None, "no_claims")]),
        ("# Naps cure 40 patients", [("C1", "uncited"), ("C1", "number_uncited")]),
        ("Naps help [S1].\n\n<!-- [S2]", [("C1", "markup")]),
        ("| Study | d |\n|---|---|\n| Roe 2019 | .1 |\n| Poe | .2 [S1] |", [("C1", "uncited"), ("C1", "number_uncited")]),
        ("", [(None, "no_claims")]),
    ],
)  # fmt: skip
def test_what_is_flagged(text: str, expected: list[tuple[str | None, str]]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    "line",
    [
        "1. Roe, J., & Poe, E. A. (2019). Naps and alertness. Journal of Naps, 3.",
        "- [S1] Roe, J. (2019). Naps.",
        "Roe J, Poe EA. Naps. J Naps. 2019;12(3):4-5.",
        "* Roe, J. Naps. doi:10.1000/naps",
        "**References:** Roe and Poe.",
    ],
)
def test_an_entry_of_a_bibliography_is_found_without_a_heading(line: str) -> None:
    assert [flag.kind for flag in flags(f"Naps help [S1].\n\n{line}\n{line}")].count("reference_list") == 1


def test_a_source_that_nothing_cites_is_a_note() -> None:
    notes = [flag for flag in flags("Naps help [S1] and [S3].") if flag.kind in NOTES]
    assert [(flag.kind, flag.source, flag.claim) for flag in notes] == [("unused_source", "S2", None)]
    assert "van den Berg et al. (2020)" in notes[0].detail


def test_each_claim_is_told_what_was_found_and_the_check_repeats_itself() -> None:
    text = "Naps help by 3 %. Coffee helps [S9].\n\nBoth [S1]."
    claims = split(text, ["S1"])
    first = copy.deepcopy(check(text, claims, MANIFEST))
    assert [claim.checks["citation"] for claim in claims] == [
        {"flags": ["uncited", "number_uncited"]},
        {"flags": ["unknown_source"]},
        {"flags": []},
    ]
    assert check(text, claims, MANIFEST) == first
    assert all(flag.check == "citation" for flag in first)


# --- authors and years ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Roe and Poe (2019) found it [S1].", "Roe & Poe (2019a) found it [S1].", "It helps (Roe et al., 2019) [S1].",
        "Roe's 2019 trial helps [S1].", "ROE and POE (2019) [S1] found it.", "J. Roe and E. A. Poe (2019) found it [S1].",
        "Roe and colleagues [S1] (2019) found it.", "Poe (2019) found it [S1].", "In 2019, Roe and Poe found it [S1].",
        "The 2019 trial by Jane Roe helps [S1].", "It helps (see Roe, 2019, p. 3; van den Berg, 2020) [S1, S2].",
        "Van den Berg et al. (2020) [S2], Berg (2020) [S2], and Muller-Lyer [S2] agree.",
        "Mueller-Lyer (2020) and O'Brien (2020) agree [S2].", "Roe et al. and Berg et al. disagree [S1, S2].",
        "Wagenmakers, Smith, and Jones (2016) failed [S3].", "Strack et al. (1988) was not replicated [S3].",
        "Roe and Poe (2019) is uncited here.", "In Denmark (2019) and in March 2019, it rose by 2019 points [S1].",
        "The trial (n = 40, 2019) ran from Monday 2004 to 2018 [S1].", "WHO (2018) and DSM-5 (2013) agree [S1].",
        "In the Olympic Games 2012 and at Lyon 2014 it rose [S1].", "Between 1999 and 2004, Norway and Sweden, 2001, lost [S1].",
        "In Lyon, Roe and Poe (2019) found it [S1].", "Roe and Poe found it [S1].", "It was shown in a trial by Roe & Poe [S1].",
        "In 2019, Roe and Poe showed it [S1].", "According to Van den Berg, Müller-Lyer and O’Brien, it helps [S2].",
        "However, Roe and Poe also found it [S1].", "It was caused by Parkinson and Alzheimer [S1].", "Naps and coffee showed it [S1].",
        "Norway and Sweden reported it [S1].", "Wang's large trial found it [S1].", "Wang found it [S1].",
    ],
)  # fmt: skip
def test_authors_and_years_that_fit(text: str) -> None:
    assert [flag for flag in flags(text) if flag.kind == "author_year"] == []


@pytest.mark.parametrize(
    "text",
    [
        "Roe and Poe (2018) found it [S1].", "Roe and Doe (2019) found it [S1].", "Doe et al. (2019) found it [S1].",
        "It helps (Doe, 2019) [S1].", "It helps (Roe, 2018) [S1].", "Doe et al. found it [S1].", "Doe's 2019 trial helps [S1].",
        "Roe and Poe (2019) found it [S2].", "Doe and colleagues, writing in 2019, found it [S1].", "Doe reported in 2019 that [S1].",
        "The 2019 multi-site trial by J. Doe helps [S1].", "In 2019, Doe and colleagues found it [S1].", "[Doe 2019] helps [S1].",
        "Doe (2019) helps.", "**Doe** *et al.* [S1] (2019) found it.", "de Winter (2014) found it [S1].", "England et al. (2019) [S1].",
        "D'Angelo (2019) found it [S1].", "Poe (2019) and Doe (2019) agree [S1].", "(Roe, 2019; Doe & Poe, 2019) [S1].",
        "Roe (2019, 2020) found it [S1].", "- Doe, J. (2019). Naps [S1].", "# What Doe (2019) said\n\nNaps [S1].", "Strack (2016) failed [S3].",
        "| Doe 2019 | .1 | [S1] |", "Doe 2019 found it [S1].", "Zoe\u0308 et al. (2019) found it [S1].", "Doe and Roe, 2019 [S1].",
        "Doe et. al. (2019) [S1].", "Doe & al. found it [S1].", "Doe et al.'s trial (2019) helps [S1].", "Doe’s large study of 2019 [S1].",
        "Smith and Jones found that naps help [S2].", "Naps help, as found by Garcia and Muller in nurses [S2].",
        "Smith & Jones later reported it [S2].", "Smith, Roe and Jones argued it [S1].", "A trial by Doe and Roe says so [S1].",
        "According to Doe and Roe, it helps [S1].", "# Smith and Jones found it\n\nNaps [S1].",
        "Doe and Roe in 2019 [S1].", "Doe and Roe, in their 2019 paper, agree [S1].",
    ],
)  # fmt: skip
def test_authors_and_years_that_contradict_the_metadata(text: str) -> None:
    assert [flag.kind for flag in flags(text) if flag.kind == "author_year"] == ["author_year"]


def test_the_detail_names_the_source_that_would_fit() -> None:
    [flag] = [flag for flag in flags("Roe and Poe (2019) found it [S2].") if flag.kind == "author_year"]
    assert flag.detail == "“Roe and Poe (2019)” does not fit S2, van den Berg et al. (2020); it would fit S1"


FORMS = (
    "{a} ({y}) found it [S1].", "{a} and colleagues ({y}) found it [S1].", "{a} et al. ({y}b) found it [S1].",
    "{a} et al. [S1] found it.", "It helps ({a}, {y}) [S1].", "It helps ({a} et al., {y}; see text) [S1].",
    "{a}'s {y} study helps [S1].", "As {a} et al. report, it helps [S1].", "- **{a} ({y})**: it helps [S1]",
    "In {y}, {a} et al. found it [S1].", "A {y} study by {a} found it [S1].", "# {a} ({y})\n\nIt helps [S1].",
)  # fmt: skip


@pytest.fixture(scope="module")
def shipped() -> list[dict[str, Any]]:
    """The shipped corpus as a manifest, each document that has authors and a year."""
    found = []
    for path in sorted((TREE / "corpus").glob("*.jsonl")):
        for record in records.read(path):
            if record.authors and record.year:
                metadata = record.metadata()
                found.append({"id": "S1", "text": record.text, "label": records.label(metadata), "metadata": metadata})
    assert len(found) > 100
    return found


def _named(source: dict[str, Any]) -> tuple[str, int]:
    return source["metadata"]["authors"][0].split(",")[0], source["metadata"]["year"]


def test_no_right_attribution_to_the_shipped_corpus_is_flagged(shipped: list[dict[str, Any]]) -> None:
    wrong = []
    for source in shipped:
        author, year = _named(source)
        for form in FORMS:
            text = form.format(a=author, y=year)
            wrong += [text for flag in flags(text, [source]) if flag.kind == "author_year"]
    assert wrong == []


def test_every_made_up_author_and_year_is_caught(shipped: list[dict[str, Any]]) -> None:
    made_up = ["Smith", "van der Hoeven", "Nakamura", "O'Hara", "Lindqvist-Berg", "García", "Xu", "McAllister"]
    missed = []
    for source, author in zip(shipped, itertools.cycle(made_up)):
        real, year = _named(source)
        for form in FORMS:
            tries = [form.format(a=author, y=year)]
            if "{y}" in form:
                tries.append(form.format(a=real, y=year + 3))
            for text in tries:
                if not any(flag.kind == "author_year" for flag in flags(text, [source])):
                    missed.append((text, source["label"]))
    assert missed == []


# --- for every text ---------------------------------------------------------------------------------------------------

PIECES = (
    "Roe|Poe and|et al.|(2019)|, 2019|2019|Doe, J.|[S1]|[S9]|[3]|. |\n\n|\n|- |# |14 %| by |In |(|)|;|&|’s|“|\x1b[31m|\u202e|\t|數據|"
    "References\n|![x](y)|doi:10.1000/x|**|| a | b |"
).split("|")  # fmt: skip
fragments = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=25).map(" ".join)


@PROPERTY
@given(fragments)
def test_flags_point_to_claims_and_sources_that_are_there(text: str) -> None:
    claims = split(text, ["S1", "S2", "S3"])
    ids = {claim.id for claim in claims}
    before = [(claim.text, claim.span, claim.kind) for claim in claims]
    for flag in check(text, claims, MANIFEST):
        assert flag.claim is None or flag.claim in ids
        assert flag.detail.strip()
    assert [(claim.text, claim.span, claim.kind) for claim in claims] == before
    for mention in mentions.find(text):
        assert text[slice(*mention.span)] == mention.text
        assert mention.families


@PROPERTY
@given(fragments, st.integers(0, 60))
def test_the_margin_loses_no_word_and_lets_nothing_through(text: str, width: int) -> None:
    claims = split(text, ["S1", "S2", "S3"])
    marked = check(text, claims, MANIFEST)
    shown = margin(text, claims, marked, width)
    assert shown == clean(shown)
    assert "\x1b" not in shown
    assert all(_columns(line) <= max(width, 20) for line in shown.split("\n"))
    body = "".join(line[2:] for line in shown.split("\n") if not line.startswith(f"{BAR}└"))
    words = re.sub(r"\s", "", clean(text))
    assert _letters(words) in _letters(body)
    coloured = margin(text, claims, marked, width, colour=True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == shown


def _letters(text: str) -> str:
    return "".join(char for char in text if char.isascii() and char.isalnum())


def _columns(line: str) -> int:
    import unicodedata

    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


@pytest.mark.parametrize(
    "piece",
    [
        "2019, ", "Smith (2019) ", "Smith, ", "Smith and ", "et al. ", "A. ", "by 2019 ", "al. 2019 ", "Smith, J. (2019). ", "1 ",
        "x doi:", "](", "[S9]. ", "Smith 2019. ", "\n[S1]", "# A 2019\n", "*", "* ", "_", "**_", "“", '"', "Smith and Jones found ", "by Smith and Jones found ", "found ", "- ", "<", "Roe (2019). ", "a ",
    ],
)  # fmt: skip
def test_hostile_text_costs_linear_time(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    claims = split(text, ["S1"])
    started = time.process_time()
    marked = check(text, claims, MANIFEST)
    margin(text, claims, marked, 80, colour=True)
    assert time.process_time() - started < 6  # a quadratic step would take minutes; a quiet machine needs 0.1 to 0.6 s


# --- the margin -------------------------------------------------------------------------------------------------------


def test_the_margin_shows_the_kinds_under_each_flagged_sentence() -> None:
    text = "# Naps\n\nNaps help [S1]. Coffee helps far more than most people in the world think. Both [S9][S8].\n\n1. Tea.\n"
    claims = split(text, ["S1"])
    marked = [*check(text, claims, MANIFEST[:1]), Flag("evidence", "thin", "too few\x1b[2J sources")]
    assert margin(text, claims, marked, 40).split("\n") == [
        "  # Naps",
        "",
        "  Naps help [S1].",
        "▌ Coffee helps far more than most people",
        "▌ in the world think.",
        "▌ └ C2 uncited",
        "▌ Both [S9][S8].",
        "▌ └ C3 unknown_source ×2",
        "",
        "▌ 1. Tea.",
        "▌ └ C4 uncited",
        "",
        "▌ thin: too few sources",
        "",
    ]
    assert "\x1b[33mBoth [S9][S8].\x1b[0m\n\x1b[31m▌ └ C3 unknown_source ×2\x1b[0m" in margin(
        text, claims, marked, 40, True
    )


def test_a_clean_text_has_an_empty_margin() -> None:
    text = "Naps help [S1].\n\n- Tea [S1]."
    assert margin(text, split(text, ["S1"]), []) == "  Naps help [S1].\n\n  - Tea [S1].\n"


def test_wide_and_hostile_characters_keep_the_width() -> None:
    text = "数" * 30 + " \x1b]8;;http://e\x07link\u202e\u2028end " + "x" * 50
    claim = Claim("C1", text, text, (0, len(text)), "", "fact")
    for colour in (False, True):
        shown = margin(text, [claim], [Flag("citation", "uncited", "…", "C1")], 20, colour)
        plain = re.sub(r"\x1b\[3[13]m|\x1b\[0m", "", shown)
        assert plain == clean(plain)
        assert all(_columns(line) <= 20 for line in plain.split("\n"))
