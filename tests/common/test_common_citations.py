"""common.citations: what is cited, what is malformed, what is not plain cited text."""

from __future__ import annotations

import time

import pytest

from common.citations import brackets, cited, malformed, markup_at


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


# --- what is not plain cited text -------------------------------------------------------------------------------------


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
        ("Naps help.\n\n<!-- [S2]", ["html"]),
        ("Naps <details> help </details>", ["html", "html"]),
        ("<details\nopen>", ["html"]),
        ("x<y and z > 3", ["html"]),  # a viewer takes this for a tag, too
        ("<!DOCTYPE x", ["html"]),
        ("<?php", ["html"]),
        ("<![CDATA[ x", ["html"]),
        ("<x-y a='1' b>", ["html"]),
        ("a <b\nonclick=f()>", ["html"]),
        ("\n> <p\nx", ["html"]),
        ("<https://evil.example/?q=1> <a@evil.example>", ["html", "html"]),
        (
            "p<.05, a<b, a<b and c, n < 30, n <30, x <y, x<y; z > 3, x <y, but z > 3; r <alpha (all), d>.3, <, <<, <!, x<",
            [],
        ),
        ("Naps help [S1] (p < .05, a<b) [S2, S3].\nReferences to sleep abound [S1].", []),
    ],
)
def test_markup_that_is_not_plain_cited_text_is_flagged(text: str, details: list[str]) -> None:
    assert [found.name for found in markup_at(text)] == details


@pytest.mark.parametrize(
    "piece",
    [
        "![",
        "[",
        "[](",
        "<",
        "< ",
        "\n",
        "[S1",
        "[S1, ",
        "[s",
        "[1,",
        "【1",
        "[^",
        "# ",
        "- ",
        "*_",
        "[S1]\n",
        "<a",
        "<x ",
        "<x a=",
        "<x a = b ",
        "<x a='",
        "<!",
        "<?",
        "<x:",
        "<x@",
        "</",
        "<x y",
        " a",
    ],
)
def test_hostile_text_costs_linear_time(piece: str) -> None:
    text = "<x " + piece * (100_000 // len(piece)) + " " * 100_000 + "x"
    started = time.process_time()
    brackets(text)
    malformed(text)
    markup_at(text)
    assert time.process_time() - started < 1


def test_an_endless_id_is_malformed_and_breaks_nothing() -> None:
    bracket = f"[S1-S{'1' * 5000}]"
    assert (cited(f"Naps help {bracket}."), malformed(f"Naps help {bracket}.")) == ([], [bracket])
