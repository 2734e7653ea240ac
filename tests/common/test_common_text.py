"""common.text: what is cleaned away, where sentences end, what a stem and a slug are."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text import clean, sentences, slug, stems

# --- clean -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dirty", "kept"),
    [
        ("a\x1b[31mred\x1b[0m b", "ared b"),
        ("\x1b[2J\x1b[1;1Htop", "top"),
        ("\x1b\x1b[31mx", "x"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]never closed\nnext line", "\nnext line"),
        ("\x1b7saved\x1bc", "saved"),
        ("end\x1b", "end"),
        ("\x9b31mx", "x"),
        ("bell\x07 nul\x00 back\x08 del\x7f", "bell nul back del"),
        ("a\u202eb\u2066c\u2069\u200e\u200f\u061c", "abc"),
        ("z\u200be\u200cr\u2060o\u00ad", "zero"),
        ("\ufeffBOM", "BOM"),
        ("hi\U000e0068\U000e0069\U000e007f", "hi"),
        ("half\ud83d character\udc69", "half character"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("page one\x0cpage two\x0bline\x85line\u2028line\u2029line", "page one\npage two\nline\nline\nline\nline"),
        ("tab\tand\n\nblank", "tab\tand\n\nblank"),
    ],
)
def test_what_can_command_hide_or_reorder_is_gone(dirty: str, kept: str) -> None:
    assert clean(dirty) == kept


@pytest.mark.parametrize("emoji", ["👩‍🔬", "👩🏽‍🔬", "❤️‍🔥", "👨‍👩‍👧‍👦", "🏳️‍🌈"])
def test_an_emoji_keeps_its_joiners(emoji: str) -> None:
    assert "\u200d" in emoji
    assert clean(f"x {emoji} y") == f"x {emoji} y"


@pytest.mark.parametrize(
    "text", ["a\u200db", "\u200d👩", "👩\u200d", "👩\u200dx", "\ufe0f\u200d👩", "👩\u200b\u200d🔬"]
)
def test_a_joiner_that_joins_no_emoji_is_gone(text: str) -> None:
    assert "\u200d" not in clean(text)


@pytest.mark.parametrize("text", ["naïve façade", "研究 β = .5 ± 2 §3 «q» €5", "e\u0301", "ZWJ-free 👍🏽 🇩🇪", ""])
def test_ordinary_text_is_untouched(text: str) -> None:
    assert clean(text) == text


terminal_noise = st.lists(
    st.sampled_from(
        ["\x1b", "[", "]", "31m", "\x07", "\\", "\r", "\n", "\u200d", "👩", "🔬", "\ufe0f", "\u200b", "\x9b"]
    )
    | st.characters(exclude_categories=()),
    max_size=30,
).map("".join)


@given(terminal_noise)
def test_cleaning_twice_changes_nothing_and_nothing_unsafe_is_left(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u202a-\u202e\u2066-\u2069\ufeff]", cleaned)
    cleaned.encode()


# --- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Baumeister et al. The effect failed.", ["Baumeister et al. The effect failed."]),
        ("Some fields, e.g. Psychology, i.e. Ours. Next.", ["Some fields, e.g. Psychology, i.e. Ours.", "Next."]),
        ("D. J. Bem and E. Wagenmakers disagree. Later.", ["D. J. Bem and E. Wagenmakers disagree.", "Later."]),
        ("See Fig. 2 and pp. 3-4, cf. Klein vs. Bem. End.", ["See Fig. 2 and pp. 3-4, cf. Klein vs. Bem.", "End."]),
        ("Effects (p < .05, d = 0.5) held at 0.5 mg. Yes.", ["Effects (p < .05, d = 0.5) held at 0.5 mg.", "Yes."]),
        ("It was p < .05. The rest was not.", ["It was p < .05.", "The rest was not."]),
        ('He said "It failed." Then he left.', ['He said "It failed."', "Then he left."]),
        ("“Nein.” (Really!) “Doch.”", ["“Nein.”", "(Really!)", "“Doch.”"]),
        ("It failed [S1]. [S2] Later.", ["It failed [S1].", "[S2] Later."]),
        ("Wait... What?! No", ["Wait...", "What?!", "No"]),
        ("It ended. but lower case goes on.", ["It ended. but lower case goes on."]),
        ("Ложь. Это так. Šimon věří.", ["Ложь.", "Это так.", "Šimon věří."]),
        ("Née. Élan vital. Über alles.", ["Née.", "Élan vital.", "Über alles."]),
        ("no stop\n\nnew block\n \t\nthird", ["no stop", "new block", "third"]),
        ("wrapped\nover  two\tlines. Next", ["wrapped over two lines.", "Next"]),
        ("研究は失敗した。", ["研究は失敗した。"]),
        ("", []),
        (" \n\n ", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


prose = st.lists(
    st.sampled_from(
        [*'. ! ? .. 。 ; " ” ) ] ( [ al. e.g. E. p < .05 Word word 0.5 Éa'.split(), " ", "\n", "\n\n", "\x85"]
    )
    | st.text(max_size=3),
    max_size=40,
).map("".join)


@given(prose)
def test_no_word_is_lost_and_none_is_made_up(text: str) -> None:
    found = sentences(text)
    assert " ".join(found).split() == text.split()
    assert all(sentence == " ".join(sentence.split()) != "" for sentence in found)


@pytest.mark.parametrize(
    "text", ["." * 50_000 + "x", "Klein et al. A " * 10_000, "\n " * 50_000 + "x", '."' * 25_000 + "x"]
)
def test_degenerate_text_takes_no_quadratic_time(text: str) -> None:
    start = time.process_time()
    assert sentences(text)
    assert time.process_time() - start < 2  # quadratic: tens of seconds


# --- stems and slugs -------------------------------------------------------------------------------------------------


def test_forms_of_a_word_share_a_stem_and_other_words_do_not() -> None:
    assert len(set(stems("replicate replication replicated replicates"))) == 1
    assert len(set(stems("depletion depression"))) == 2
    assert stems("effort efforts Efforts") == ["effort"] * 3
    assert stems("stress process") == ["stress", "proces"]


def test_stems_keep_order_and_drop_what_says_nothing() -> None:
    assert stems("Does the ego of a man, in 2016, deplete? x 5") == ["ego", "man", "2016", "deplet", "5"]
    assert stems("What is it about?") == []


def test_stems_are_the_same_for_any_spelling_of_a_character() -> None:
    assert stems("ＥＧＯ e\u0301lan ﬁt") == stems("ego \u00e9lan fit")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Does ego depletion replicate?", "does-ego-depletion-replicate"),
        ("  Größe & naïveté — 5 % ", "groe-naivete-5"),
        ("../../etc/passwd\x00", "etc-passwd"),
        ("研究", "question"),
        ("", "question"),
        ("x" * 39 + " y", "x" * 39),
    ],
)
def test_a_slug_is_a_file_name_that_a_person_can_read(text: str, name: str) -> None:
    assert slug(text) == name


@given(st.text(), st.integers(min_value=8, max_value=60))
def test_a_slug_is_always_a_safe_file_name(text: str, limit: int) -> None:
    name = slug(text, limit)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert len(name) <= limit
