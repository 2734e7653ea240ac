"""Lexical search: how words are cut, that bm25s computes the same, and what an index does with odd texts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY

import lexical
from common.text import clean


def index(folder: Path, *texts: str) -> lexical.Index:
    lexical.write(folder, {f"c{n}": text for n, text in enumerate(texts)})
    return lexical.Index(folder)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Naps, naps; NAPPING", ["nap", "nap", "nap"]),
        ("replicate replication replicated replications", ["replicat"] * 4),
        ("walk walks walking walked", ["walk"] * 4),
        ("prime primed priming", ["prim"] * 3),
        ("study studies", ["study"] * 2),
        ("virus analysis process", ["virus", "analysis", "process"]),
        ("need red string speed", ["need", "red", "string", "speed"]),
        ("p53 rs1234567890 d=0.48", ["p53", "rs1234567890", "d", "0", "48"]),
        ("snake_case ego-depletion", ["snak", "case", "ego", "depletio"]),
        ("naïve Übergröße ﬁeld", ["naiv", "ubergroß", "field"]),
        ("Ёлка Δέλτα", ["елка", "δελτα"]),
        ("睡眠不足", ["睡眠", "眠不", "不足"]),
        ("睡", ["睡"]),
        ("がか カ", ["がか", "カ"]),
        ("수면의", ["수면", "면의"]),
        ("REM睡眠p53", ["rem", "睡眠", "p53"]),
        ("… ?! 👩‍👩‍👧", []),
        ("", []),
    ],
)
def test_words_are_compared_in_this_form(text: str, expected: list[str]) -> None:
    assert lexical.words(text) == expected


@PROPERTY
@given(st.text())
def test_any_text_has_words_that_do_not_depend_on_case(text: str) -> None:
    found = lexical.words(text)
    assert all(found)
    if text.isascii():
        assert lexical.words(text.upper()) == found


def test_words_that_say_nothing_are_not_asked_for_unless_there_are_no_others() -> None:
    assert lexical.content_words("What is the effect of naps on naps?") == ["nap"]
    assert lexical.content_words("To be or not to be?") == ["to", "be", "or", "not"]


# --- the index -------------------------------------------------------------------------------------------------------


def test_a_term_of_one_of_two_texts_is_found(tmp_path: Path) -> None:
    found = index(tmp_path, "Naps improve alertness.", "The XK-417 trial was stopped.").search("Was XK-417 safe?", 5)
    assert [chunk_id for chunk_id, _ in found] == ["c1"]
    assert found[0][1] > 0


def test_bm25s_finds_the_same_in_its_own_index(tmp_path: Path) -> None:
    import bm25s

    animals = "cat dog owl fox hen cow pig rat bat elk".split()
    texts = [" ".join(animals[(n * k) % 10] for k in range(1, 3 + n % 5)) + f" number{n}" for n in range(60)]
    ours = index(tmp_path, *texts)
    theirs = bm25s.BM25.load(tmp_path, mmap=True)
    for question in ("cat", "owl fox hen", "number7 dog", "elk elk elk", "cow number59 unknown"):
        asked = list(dict.fromkeys(word for word in lexical.words(question) if word in theirs.vocab_dict))
        scores = theirs.get_scores(asked)
        best = sorted(((-round(float(s), 6), ours.ids[i]) for i, s in enumerate(scores) if s > 0))[:20]
        found = ours.search(question, 20)
        assert [chunk_id for chunk_id, _ in found] == [chunk_id for _, chunk_id in best]
        assert [score for _, score in found] == pytest.approx([-score for score, _ in best], abs=1e-5)


def test_neither_numba_nor_scipy_is_needed_and_a_question_imports_no_bm25s(tmp_path: Path) -> None:
    import subprocess

    index(tmp_path, "Naps improve alertness.")
    code = (
        "import sys; from pathlib import Path; import lexical;"
        f"assert lexical.Index(Path({str(tmp_path)!r})).search('naps', 5); print('bm25s' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    import bm25s

    assert (bm25s.NUMBA_AVAILABLE, bm25s.SCIPY_AVAILABLE) == (False, False)


def test_what_shares_no_word_is_not_found_and_no_more_than_there_is(tmp_path: Path) -> None:
    held = index(tmp_path, "Naps.", "Coffee.", "…", "")
    assert held.search("violins", 50) == []
    assert held.search("", 50) == []
    assert held.search("…", 50) == []
    assert [chunk_id for chunk_id, _ in held.search("naps and coffee", 50)] == ["c0", "c1"]


def test_equal_scores_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    lexical.write(tmp_path, dict.fromkeys("bdac", "Naps help."))
    assert [chunk_id for chunk_id, _ in lexical.Index(tmp_path).search("naps", 3)] == ["a", "b", "c"]


@pytest.mark.parametrize("texts", [(), ("…",), ("", "", "")])
def test_an_index_without_words_finds_nothing(tmp_path: Path, texts: tuple[str, ...]) -> None:
    held = index(tmp_path, *texts)
    assert (held.search("naps", 5), held.count("nap"), held.coverage("naps", "naps")[1]) == ([], 0, 0)


def test_the_same_texts_make_the_same_files(tmp_path: Path) -> None:
    texts = {f"c{n}": f"Nap {n} and coffee." for n in range(30)}
    for name, items in (("a", texts.items()), ("b", reversed(texts.items()))):
        lexical.write(tmp_path / name, dict(items))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 6
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ids.json", b"{"),
        ("vocab.index.json", b"\xff"),
        ("vocab.index.json", b'{"": 0, "nap": 1}'),
        ("data.csc.index.npy", b""),
        ("indices.csc.index.npy", b"garbage" * 100),
    ],
)
def test_damaged_files_are_noticed(tmp_path: Path, name: str, content: bytes) -> None:
    index(tmp_path, "Naps improve alertness.", "Coffee helps.")
    (tmp_path / name).write_bytes(content)
    with pytest.raises((EOFError, OSError, ValueError)):
        lexical.Index(tmp_path)


# --- coverage --------------------------------------------------------------------------------------------------------


def test_coverage_is_the_share_of_a_questions_words_weighted_by_rarity(tmp_path: Path) -> None:
    held = index(tmp_path, *["Naps and sleep."] * 9, "Naps and modafinil.")
    share, rarest = held.coverage("Does modafinil help?", "Naps and modafinil.")
    assert (0.35 < share < 0.65, rarest) == (True, 1)
    assert held.coverage("modafinil", "Modafinil!") == (1.0, 1)
    common, rare = (held.coverage("naps modafinil", text)[0] for text in ("naps", "modafinil"))
    assert common < 0.1 < 0.9 < rare
    # A word that the domain lacks counts as the rarest.
    assert held.coverage("modafinil zolpidem", "modafinil")[0] < 0.5
    assert held.coverage("violins", "naps") == (0.0, 0)
    # As it was asked, but for the plural: a stem is not enough.
    assert held.coverage("naps", "a Nap")[0] == 1
    assert held.coverage("nap", "napping")[0] == 0


def test_cleaning_changes_no_word(tmp_path: Path) -> None:
    assert lexical.words(clean("na\u200bps \x1b[31msleep")) == ["nap", "sleep"]
