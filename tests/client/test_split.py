"""split, kinds: each sentence at its exact place, with its citations, and of the right kind."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.client.support import PROPERTY, TREE

import kinds
from common.citations import brackets
from ledger import Claim
from split import split

KNOWN = ["S1", "S2", "S3"]
LABELLED = Path(__file__).parent / "data" / "claim_kinds.jsonl"


def texts(synthesis: str) -> list[str]:
    return [claim.text for claim in split(synthesis, KNOWN)]


def cites(synthesis: str) -> list[tuple[str, list[str]]]:
    return [(claim.text, claim.cited) for claim in split(synthesis, KNOWN)]


def proper(synthesis: str, claims: list[Claim]) -> None:
    """What holds for every split: exact spans in order, one after the other."""
    end = 0
    for number, claim in enumerate(claims, 1):
        assert claim.id == f"C{number}"
        assert synthesis[slice(*claim.span)] == claim.text != ""
        assert claim.text == claim.text.strip()
        assert claim.span[0] >= end
        end = claim.span[1]


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "synthesis",
    # Each bar is where one sentence ends and the next begins.
    [
        "Klein et al. found none, e.g. in nurses, i.e. at night.|Others did.",
        "See Fig. 2, p. 4, and cf. Roe vs. Poe.|It was given i.v. to mice by Dr. E. A. Poe and J. Roe.",
        "The effect was small (p < .05, d = 0.12).|It grew by 3.5 points.|.05 was the limit.",
        "The answer is no.|No. 3 was lost.|In the U.S. trials were small.|They ran in the U.S.|The rest did not.",
        "Rats, mice, etc. were used.|They had cages, wheels, etc.|The rest is known.",
        "They took vitamin C.|Trials of hepatitis B.|Group A.|One more.",
        "It was unclear … and small.|It fell…|Later it rose...|Then it stopped ... again.",
        "He said “No.”|Then “Yes!” came.|“Why?” she asked.|They left.",
        'The authors wrote: "It failed. It never worked."|Nobody agreed (some did. Others not) with it.',
        "Did it?|It did!|So it is.",
        "It rose.|mRNA levels fell.|~40 % stayed.|0.5 mg was enough.",
        "睡眠很重要。|午睡有帮助！|对吗？",
        "नींद ज़रूरी है।|झपकी भी।",
        "Он спал.|Потом встал.|É assim.|Über alles.",
        "In 2019 it rose.|12 of 40 fell.|It was Study 2.|Experiment 1.|No more.",
        "St. John's wort helps.|Prof. Roe agrees.|Roe Jr. does not.",
        "It was found by Klein et al.|However, others failed.",
    ],
)
def test_where_sentences_end(synthesis: str) -> None:
    joined = synthesis.replace("|", " ")
    assert texts(joined) == synthesis.split("|")
    assert texts(joined.replace(" ", "\u00a0")) == [part.replace(" ", "\u00a0") for part in synthesis.split("|")]


@pytest.mark.parametrize(
    ("synthesis", "expected"),
    [
        ("It failed [S1]. It worked [S2].", [("It failed [S1].", ["S1"]), ("It worked [S2].", ["S2"])]),
        ("It failed. [S2] Next one [S1].", [("It failed. [S2]", ["S2"]), ("Next one [S1].", ["S1"])]),
        ("It failed.[S1][S3]Yes. No", [("It failed.[S1][S3]", ["S1", "S3"]), ("Yes.", []), ("No", [])]),
        ("It failed. [S1]. Next.", [("It failed. [S1].", ["S1"]), ("Next.", [])]),
        ("He said “no.” [S1] Then.", [("He said “no.” [S1]", ["S1"]), ("Then.", [])]),
        ("It failed.\n[S1]\nIt worked.\n\n[S2].", [("It failed.\n[S1]", ["S1"]), ("It worked.\n\n[S2].", ["S2"])]),
        ("## A\n\n[S1]\n\nB.", [("[S1]", ["S1"]), ("B.", [])]),
        ("Klein et al. [S1] found none.", [("Klein et al. [S1] found none.", ["S1"])]),
        ("It was by Klein et al [S1]. It rose.", [("It was by Klein et al [S1].", ["S1"]), ("It rose.", [])]),
        ("It helped. [S2] found no effect.", [("It helped.", []), ("[S2] found no effect.", ["S2"])]),
        ("[S1] and [S2-S3] agree; so does [S1 and S2].", [("[S1] and [S2-S3] agree; so does [S1 and S2].", KNOWN)]),
        ("- one [S1, S3]\n- two [S1; S2]", [("one [S1, S3]", ["S1", "S3"]), ("two [S1; S2]", ["S1", "S2"])]),
        ("睡眠很重要[S1]。午睡。[S2]对吗？", [("睡眠很重要[S1]。", ["S1"]), ("午睡。[S2]", ["S2"]), ("对吗？", [])]),
        ("A claim [S1,\nS2].", [("A claim [S1,\nS2].", ["S1", "S2"])]),
    ],
)
def test_a_citation_goes_to_its_sentence(synthesis: str, expected: list[tuple[str, list[str]]]) -> None:
    assert cites(synthesis) == expected


def test_what_does_not_resolve_is_told_apart_and_kept_as_written() -> None:
    [claim] = split("It failed [S1, S7] and [S2-S4] [SOURCE 2] [3][^a].", KNOWN)
    assert (claim.cited, claim.unknown) == (["S1", "S2", "S3"], ["S7", "S4"])
    assert claim.malformed == ["[SOURCE 2]", "[3]", "[^a]"]


@pytest.mark.parametrize(
    "line", ["[S9]", "- [S9]", "# About [S9]", "**All of it [S9]**", "Text.\n\n[S9]", "42 [S9]", "``` [S9]"]
)
def test_a_made_up_source_is_found_wherever_it_stands(line: str) -> None:
    assert [claim.unknown for claim in split(line, KNOWN)] == [["S9"]]


@pytest.mark.parametrize(
    ("synthesis", "expected"),
    [
        ("# Naps\n\nThey help.\n**Limits**\n*Few.*\n**Next:**\n__Also__:\n", ["They help.", "*Few.*"]),
        ("Naps\n====\nThey help.\n---\nA label\n---\nMore.", ["They help.", "More."]),
        ("# Naps cut errors by 14 %\n## Naps cure all mice.\n### 2. Naps\n", ["Naps cut errors by 14 %", "Naps cure all mice."]),
        ("**Naps help nurses a lot.**\n\n**Naps**", ["**Naps help nurses a lot.**"]),
        ("**Limits.** Few trials [S1]. **Strength:** many.", ["**Limits.** Few trials [S1].", "**Strength:** many."]),
        ("Key findings:\n- One. Two\n  goes on.\n  * three\n    1) four\n+ five", ["Key findings:", "One.", "Two\n  goes on.", "three", "four", "five"]),
        ("1. **Memory**\n   - better\n2. **Mood**\n", ["better", "**Mood**"]),
        ("There were in all of the seven hospitals together\n12. Then 13 or so were counted in the eighth hospital, or\n2. of them", ["There were in all of the seven hospitals together\n12.", "Then 13 or so were counted in the eighth hospital, or\n2. of them"]),
        ("| Study | d |\n|---|:-:|\n| Roe. One | .1 [S1] |\n| Poe | no |\n\nEnd.", ["| Roe. One | .1 [S1] |", "| Poe | no |", "End."]),
        ("a | b\n-|-\n1 | 2\n", ["1 | 2"]),
        ("P(A|B) was high. It fell.", ["P(A|B) was high.", "It fell."]),
        ("> It is\n> so. Or\n>> not.\nNo.", ["It is\n> so.", "Or", "not.", "No."]),
        ("```markdown\nIt is so.\n```\n~~~\nNot.\n~~~", ["It is so.", "Not."]),
        ("It rose [^1].\n\n[^1]: A note. Two.", ["It rose [^1].", "A note.", "Two."]),
        ("- [ ] to do\n- [x] done", ["to do", "done"]),
        ("Naps help nurses\nCoffee helps, too\nThe long line goes on to the end of the column and\nNurses are here", ["Naps help nurses", "Coffee helps, too", "The long line goes on to the end of the column and\nNurses are here"]),
        ("One line [S1]\nTwo lines  \nthree", ["One line [S1]", "Two lines", "three"]),
        ("---\n\n***\n\n- 12 %\n\n| - |\n", ["12 %"]),
        ("", []),
    ],
)  # fmt: skip
def test_blocks_of_markdown(synthesis: str, expected: list[str]) -> None:
    claims = split(synthesis, KNOWN)
    proper(synthesis, claims)
    assert [claim.text for claim in claims] == expected


@pytest.mark.parametrize(
    ("synthesis", "bare"),
    [
        ("- **Naps** help *nurses* [S1, S2] .", "Naps help nurses."),
        ("| **Roe** | `d` = .1 | [S1] |", "Roe | d = .1 |"),
        ("According to [S1], naps_help [them](https://example.org) ([S2]).", "According to, naps_help them."),
        ("> A quote\n> goes  on [S1]", "A quote goes on"),
        ("3 * 4 = 12 __is__ so", "3 * 4 = 12 is so"),
        ("[S1]", ""),
    ],
)
def test_the_bare_sentence(synthesis: str, bare: str) -> None:
    assert [claim.bare.rstrip(" |") for claim in split(synthesis, KNOWN)] == [bare.rstrip(" |")]


def test_each_claim_knows_its_section() -> None:
    text = "Start.\n\n# One\nA.\n\n**Two:**\n- B.\n\n### Three [S1]\nC."
    assert [(claim.section, claim.bare) for claim in split(text, KNOWN)] == [
        ("", "Start."),
        ("One", "A."),
        ("Two", "B."),
        ("Three", "Three"),
        ("Three", "C."),
    ]


@pytest.mark.parametrize(
    "heading",
    [
        "## What would change this",
        "## What would change this conclusion?",
        "**What could change my mind**",
        "### 4. What Would Change This",
        "## Falsifiability",
        "What would change this?",
        "What would change this:",
    ],
)
def test_all_that_is_under_the_closing_heading_is_meta(heading: str) -> None:
    text = f"# T\nNaps cure all.\n\n{heading}\n\nA trial with nurses finds no effect.\n\n- Naps kill.\n\n# Next\nNaps cure all."
    kinds = [claim.kind for claim in split(text, KNOWN)]
    assert kinds[0] == kinds[-1] == "fact"
    assert set(kinds[1:-1]) == {"meta"}
    assert len(kinds) >= 4


@pytest.mark.parametrize(
    ("synthesis", "expected"),
    [
        ("What would change this: nothing. It is real [S2].\n\nNaps cure all.", ["meta", "fact", "fact"]),
        ("**What would change this:** Some trial.\n- one\n\nNaps cure all.", ["meta", "meta", "fact"]),
        ("What would change this:\n\n- a trial\n- a review\n\nNaps cure all.", ["meta", "meta", "meta", "fact"]),
        ("What would change this?\n\nA trial.\n\nNaps cure all.", ["meta", "meta", "fact"]),
        ("- What would change this: a trial.\n- Naps cure all.", ["meta", "fact"]),
        ("## What would change this\n\nA trial.\n\nIt kills 40 mice.\n\nIt “kills all the mice”. Maybe.", ["meta", "fact", "fact", "meta"]),
        ("## References\n\nNaps kill 40% of mice.", ["fact"]),
    ],
)  # fmt: skip
def test_the_closing_part_ends_and_hides_no_claim(synthesis: str, expected: list[str]) -> None:
    assert [claim.kind for claim in split(synthesis, KNOWN)] == expected


@pytest.mark.parametrize(
    ("line", "claims"),
    [
        ("## Naps cure 40 patients", 1), ("## 2. Naps", 0), ("## 2.1 Naps", 0), ("## Study 2", 0), ("## Trials since 2016", 0),
        ("## Roe (2019)", 0), ("**Naps cure every kind of cancer**", 1), ("**The evidence for and against naps:**", 0),
        ("**Naps and memory**", 0), ("| Naps cure 40 patients | x |\n|---|---|", 1), ("| Study | 95% CI | week 4 |\n|---|---|---|", 0),
    ],
)  # fmt: skip
def test_titles_that_claim_something(line: str, claims: int) -> None:
    assert len(split(f"{line}\n", KNOWN)) == claims


# --- for every text ---------------------------------------------------------------------------------------------------

PIECES = (
    "[S1]|[S2, S9]|[S3-S5]|[SOURCE 2]|[7]|[^1]|[|]|Word|et al.|failed|mRNA|0.5|p < .05|. |.|? |。|…|(|)|“|”|\"| |\n|\n\n"
    "|# |- |1. |2) |**|_|> |`|```\n|\n---\n|\n| a | b |\n|---|---|\n|:|  \n|\u00a0|\t|e.g.|What would change|数"
)  # fmt: skip
fragments = st.lists(st.sampled_from([*PIECES.split("|"), "|", "\n|---|---|\n", "| a | b |\n"]), max_size=30).map(
    "".join
)


@PROPERTY
@given(fragments | st.text(max_size=60))
@example("[S1].\n\n[S2]")
@example("**a [S1]**: b\n- c\n")
def test_spans_are_exact_ordered_and_never_overlap(text: str) -> None:
    claims = split(text, KNOWN)
    proper(text, claims)
    assert split(text, KNOWN) == claims
    for claim in claims:
        assert set(claim.cited) <= set(KNOWN)
        assert not set(claim.unknown) & set(KNOWN)


_NO_CLAIM = re.compile(r"[ \t>]*(?:#|```|~~~|.*\||(?:[-*+]|\d{1,2}[.)])?[ \t>]*\*|.*_)")


@PROPERTY
@given(fragments)
def test_no_letter_is_lost_outside_of_headings_tables_and_fences(text: str) -> None:
    covered = [place for claim in split(text, KNOWN) for place in range(*claim.span)]
    rest = "".join(" " if place in set(covered) and char != "\n" else char for place, char in enumerate(text))
    lines = text.split("\n")
    for number, line in enumerate(rest.split("\n")):
        if any(char.isalpha() for char in line):
            title = re.match(r"[ \t>]*(?:-{2,}|=+)[ \t>]*$", ([*lines, ""])[number + 1])
            assert _NO_CLAIM.match(lines[number]) or title, (line, lines)


@PROPERTY
@given(fragments)
def test_no_citation_is_lost(text: str) -> None:
    claims = split(text, KNOWN)
    inside = [bracket for line in text.split("\n") for bracket in brackets(line)]
    found = {source for claim in claims for source in (*claim.cited, *claim.unknown)}
    assert found >= {source for bracket in inside for source in bracket.ids}
    malformed = Counter(mark for claim in claims for mark in claim.malformed)
    assert malformed >= Counter(bracket.text for bracket in inside if not bracket.ids and bracket.text != "[^1]")


SENTENCES = [
    "Naps help nurses",
    "Klein et al. found an effect of d = 0.12, e.g. in mice",
    "It was given i.v. by Dr. Roe",
    "The p-value was < .05 (see Fig. 2)",
    "mRNA levels rose",
    "He called it “a sham”",
    "12 of 40 left",
    "It is unclear why",
]


@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from(SENTENCES), st.sampled_from(".?!"), st.integers(0, 4)), min_size=1, max_size=6),
    st.sampled_from([" ", "\n\n", "\n- ", "\n"]),
)
def test_adding_citations_changes_no_sentence(parts: list[tuple[str, str, int]], between: str) -> None:
    def written(sentence: str, stop: str, how: int) -> str:
        word, rest = sentence.split(" ", 1)
        return (
            f"{sentence}{stop}",
            f"{sentence} [S1]{stop}",
            f"{sentence}{stop} [S1][S2]",
            f"{sentence}[S1, S2]{stop}",
            f"{word} [S1] {rest} [S2] {stop}",
        )[how]

    plain = split(between.join(written(sentence, stop, 0) for sentence, stop, _ in parts), KNOWN)
    cited = split(between.join(written(*part) for part in parts), KNOWN)
    assert [claim.bare for claim in cited] == [claim.bare for claim in plain]
    assert [claim.bare for claim in plain] == [f"{sentence}{stop}" for sentence, stop, _ in parts]
    assert [claim.cited for claim in cited] == [
        [[], ["S1"], ["S1", "S2"], ["S1", "S2"], ["S1", "S2"]][how] for *_, how in parts
    ]


@pytest.mark.parametrize(
    "piece",
    [
        "a.[S1]", "a. [S1] ", "A. ", "al. ", "[S1]", "[1]. ", "\n[S1]", "a\n[S1]\n", "- ", "- x\n", "> ", "1. ", "**",
        "**a** ", "| a |\n", "|-", "#", " ", "\n", "...", "(", "“", "(“", '"', "a\n", "e.g. ", "Aa. [S1]\n\n", "_", "**x**\n\n",
        "- **x**\n", "No. 1 ", "if ", "not ", "the sources ", "evidence ", "a。", "](", "[x](", "a\n---\n", "a|b\n-|-\n", "*",
        "I have 4 ", "I have “", "3 of the ", "the sources in 2019 ", "# 4 \n", "What would change this: a\n\n",
    ],
)  # fmt: skip
def test_hostile_text_costs_linear_time(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    started = time.process_time()
    claims = split(text, KNOWN)
    assert time.process_time() - started < 3  # a quadratic step would take minutes; a quiet machine needs 0.1 to 0.5 s
    proper(text, claims)


# --- kinds ------------------------------------------------------------------------------------------------------------


def labelled() -> list[dict[str, str]]:
    return [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Naps cure cancer, but it is unclear why.", "fact"),
        ("Naps cure cancer, and more research is needed.", "fact"),
        ("Although naps cure cancer, the mechanism is unknown.", "fact"),
        ("Naps may cure cancer.", "fact"),
        ("The sources agree that naps cure cancer.", "fact"),
        ("This synthesis shows that naps cure cancer.", "fact"),
        ("Naps lower the following markers by 14 %:", "fact"),
        ("There is no evidence that vaccines cause autism.", "fact"),
        ("Two sources of iron were compared.", "fact"),
        ("The sources do not show that naps help.", "meta"),
        ("The sources do not show that naps help 40 nurses.", "fact"),
        ("The sources do not say that “naps help all nurses”.", "fact"),
        ("The sources do not use the word “nap”.", "meta"),
        ("Only 3 of the 12 retrieved sources are from 2019.", "meta"),
        ("Why do naps cure most per cent of cancers?", "fact"),
        ("The sources disagree [S1].", "fact"),
        ("No retrieved source shares enough words with the question.", "meta"),
    ],
)
def test_where_a_claim_could_hide(text: str, kind: str) -> None:
    assert [claim.kind for claim in split(text, KNOWN)] == [kind]


def measured() -> str:
    """How often the rules are right, as the table of docs/claims.md."""
    right: Counter[tuple[str, bool]] = Counter()
    of: Counter[tuple[str, bool]] = Counter()
    for line in labelled():
        key = (line["kind"], bool(line["rules_written_with_it"]))
        claims = split(line["text"], [f"S{number}" for number in range(1, 10)])
        of[key] += 1
        right[key] += [claim.kind for claim in claims] == [line["kind"]]
    rows = [
        f"| {kind} | {right[kind, True]} of {of[kind, True]} | {right[kind, False]} of {of[kind, False]} |"
        for kind in ("fact", "hedge", "method", "meta")
    ]
    total = [
        f"{sum(right[k] for k in of if k[1] is seen)} of {sum(of[k] for k in of if k[1] is seen)}"
        for seen in (True, False)
    ]
    head = ["| kind | rules written with it | not looked at while writing rules |", "|---|---|---|"]
    return "\n".join([*head, *rows, f"| all | {total[0]} | {total[1]} |"])


def test_how_often_the_rules_are_right_is_as_the_docs_say(capsys: pytest.CaptureFixture[str]) -> None:
    table = measured()
    with capsys.disabled():
        print(f"\n{table}")
    docs = (TREE / "docs" / "claims.md").read_text(encoding="utf-8")
    assert table in docs, "docs/claims.md must hold this table"
    assert kinds.rules() in docs, "docs/claims.md must hold the rules as `python -m kinds` prints them"
    assert len(labelled()) >= 150
