"""Lexical search: BM25 over the words of every chunk of a domain, for what a dense vector blurs (names, codes, rare terms).

Sees words, not meaning: a synonym, a translation and a misspelt word find nothing. bm25s builds the index at ingest; a
question reads its three arrays itself, mapped from disk, because importing bm25s costs more than the whole search. The
lock file pins bm25s to one version, and tests/client compares the two.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.text import STOP_WORDS

# Part of a domain's state: raise it when words are cut differently, and each index is built anew.
VERSION = 1
STEM = 8
_IDS, _VOCABULARY = "ids.json", "vocab.index.json"
_ARRAYS = ("data.csc.index.npy", "indices.csc.index.npy", "indptr.csc.index.npy")
_WORD = re.compile(r"[^\W_]+")
# Scripts that put no spaces between words, and Hangul, whose words carry their grammar: Thai to Myanmar, Khmer, kana,
# Han, Hangul.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_VOICED = "\u3099\u309a"  # marks of kana: another letter, not another accent


def words(text: str) -> list[str]:
    """The words of a text as they are searched, in order: lower-case, without accents, -s, -ing, -ed and -e, and cut.

    Eight characters join "replicate", "replication" and "replicated"; a word with a digit in it is a name and stays
    whole. Scripts without spaces become pairs of characters.
    """
    return [_stem(form) for form in forms(text)]


def forms(text: str) -> list[str]:
    """The words of a text as they are written, in order, but lower-case, without accents and in the singular."""
    found: list[str] = []
    for word in _WORD.findall(_folded(text)):
        if word.isascii():
            found.append(_singular(word))
            continue
        start = 0
        for run in _UNSPACED.finditer(word):
            if before := word[start : run.start()]:
                found.append(_singular(before))
            characters = run.group()
            found.extend(characters[i : i + 2] for i in range(max(1, len(characters) - 1)))
            start = run.end()
        if rest := word[start:]:
            found.append(_singular(rest))
    return found


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    apart = unicodedata.normalize("NFKD", text)
    kept = "".join(c for c in apart if c.isascii() or c in _VOICED or unicodedata.category(c)[0] != "M")
    return unicodedata.normalize("NFC", kept).lower()


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.isalpha() and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _stem(form: str) -> str:
    if not form.isalpha():
        return form
    for ending in ("ing", "ed"):
        if form.endswith(ending) and len(form) - len(ending) >= 4:
            form = form.removesuffix(ending)
            if form[-1] == form[-2] and form[-1] not in "lsz":
                form = form[:-1]
    if len(form) > 4:
        form = form.removesuffix("e")
    return form[:STEM]


_STOP_STEMS = frozenset(_stem(_singular(word)) for word in STOP_WORDS)


def content_words(question: str) -> list[str]:
    """The words of a question that say what it is about, each once; all of them where none does."""
    asked = list(dict.fromkeys(words(question)))
    return [word for word in asked if word not in _STOP_STEMS] or asked


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Build the index of these texts (by chunk id) in a folder. Not atomic: the domain's state says when it is whole."""
    import bm25s

    folder.mkdir(parents=True, exist_ok=True)
    ids = sorted(texts)  # so that of equal scores the smaller id comes first
    (folder / _IDS).write_text(json.dumps(ids), encoding="utf-8")
    if not ids:
        return
    vocabulary: dict[str, int] = {"": 0}  # what a text without words holds, and no question
    rows = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(texts[i])] or [0] for i in ids]
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend="numpy", csc_backend="numpy")
    index.index((rows, vocabulary), show_progress=False)
    index.save(folder, show_progress=False)


class Index:
    """The index in a folder. Raises EOFError, OSError or ValueError where it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.ids: list[str] = json.loads((folder / _IDS).read_bytes())
        if not self.ids:
            self._vocabulary: dict[str, int] = {}
            return
        self._vocabulary = json.loads((folder / _VOCABULARY).read_bytes())
        self._data, self._rows, self._starts = (np.load(folder / name, mmap_mode="r") for name in _ARRAYS)
        if len(self._starts) != len(self._vocabulary) + 1 or int(self._starts[-1]) != len(self._data) != len(
            self._rows
        ):
            raise ValueError("the files of the lexical index do not belong together")

    def search(self, text: str, limit: int) -> list[tuple[str, float]]:
        """The chunks with the highest BM25 scores, ties by id; none that shares no content word with the text."""
        scores: NDArray[np.float64] = np.zeros(len(self.ids))
        for word in content_words(text):
            begin, end = self._column(word)
            if end > begin:
                scores[self._rows[begin:end]] += self._data[begin:end]
        hits = np.flatnonzero(scores > 0)
        best = hits[np.lexsort((hits, -scores[hits]))][:limit]
        return [(self.ids[i], round(float(scores[i]), 6)) for i in best]

    def coverage(self, question: str, text: str) -> tuple[float, int]:
        """How much of what a question is about stands in a text: the share of its content words, weighted by rarity.

        Stricter than the search: a word must stand there as it was asked, but for case, accents and plural ("steel" is
        not "Steele"). A word that the domain lacks counts as the rarest. The second value is in how many chunks the
        rarest shared word occurs, 0 where they share none.
        """
        asked = set(content_words(question))
        counts = {form: self.count(_stem(form)) for form in dict.fromkeys(forms(question)) if _stem(form) in asked}
        weights = {form: math.log1p((len(self.ids) - n + 0.5) / (n + 0.5)) for form, n in counts.items()}
        shared = counts.keys() & set(forms(text))
        whole = math.fsum(weights.values())
        share = math.fsum(weights[form] for form in shared) / whole if whole else 0.0
        return round(share, 6), min((counts[form] for form in shared), default=0)

    def count(self, word: str) -> int:
        """In how many chunks a word occurs."""
        begin, end = self._column(word)
        return end - begin

    def _column(self, word: str) -> tuple[int, int]:
        number = self._vocabulary.get(word)
        return (0, 0) if number is None else (int(self._starts[number]), int(self._starts[number + 1]))
