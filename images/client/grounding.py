"""Level 1 of the hallucination check: is a sentence about what its cited sources say? Without any further model.

For each claim and each cited source the best window of one to three sentences: how many of the claim's words it has
(rare words count more), how near its best sentence is in meaning, which numbers and which quotations of the claim the
source lacks. Another source that fits better is named.

What this level can see: a source about another subject, a number that the source does not have, an altered quotation.
What it cannot see: a negation, a reversed direction, cause for correlation, a dropped qualifier. All of these leave words
and meaning nearly as they were. The power of each is measured in docs/checks-power.md.

Equal input gives equal output; ties go to the source that comes first.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import background
import figures
import strict
from common.text import STOP_WORDS, clean, listed, sentences, stems
from embedding import Embedder
from ledger import Claim, Flag

SPECS: dict[str, strict.Spec] = {
    "cosine_weight": (float, 0, 1),
    "window_penalty": (float, 0, 1),
    "off_source": (float, 0, 1),
    "weak": (float, 0, 1),
    "better_margin": (float, 0, 1),
}
# What this level says of each claim that it looks at, worst first.
STATUSES = ("off_source", "quote_mismatch", "number_mismatch", "weak", "grounded")
LONGEST_WINDOW = 3
# Shorter quotations are names and scare quotes.
QUOTED_WORDS = 3
_WORD = re.compile(r"[^\W_]+(?:[-'’.][^\W_]+)*%?")
# Scores are rounded before they are compared: the last bits of a vector differ between machines.
_DIGITS = 4


def thresholds() -> dict[str, Any]:
    """The block `grounding` of config/checks.yaml. Raises Problem."""
    return strict.block("checks.yaml", "grounding", SPECS)


def check(
    claims: Sequence[Claim],
    manifest: Sequence[Mapping[str, Any]],
    embedder: Embedder,
    thresholds: Mapping[str, Any],
) -> list[Flag]:
    """Fill `checks["grounding"]` and `status` of each claim; what a reader must know comes back as flags.

    `checks["grounding"]` has for each cited source: window, its span in the source's text, coverage, cosine, score,
    missing_numbers, missing_quotes, and what follows for this source alone (status). Claims of kind meta are left alone,
    and so are those that cite nothing: they become `uncited` or `unknown_source`.
    """
    sources = {entry["id"]: _Source(entry) for entry in manifest}
    weigh = _Weights(list(sources.values()))
    grounded = []
    for claim in claims:
        if claim.kind == "meta":
            claim.status = "not_a_claim"
        elif not (cited := [sources[i] for i in claim.cited if i in sources]):
            claim.status = "unknown_source" if claim.unknown or claim.cited else "uncited"
        else:
            grounded.append(_Grounding(claim, cited, sources, weigh, thresholds))
    _compare([(g.claim.bare, window) for g in grounded for window in g.windows.values()], embedder)
    for grounding in grounded:
        grounding.judge()
    _compare([(g.claim.bare, g.rival) for g in grounded if g.rival], embedder)
    return [flag for grounding in grounded for flag in grounding.flags()]


def _compare(pairs: Sequence[tuple[str, _Window]], embedder: Embedder) -> None:
    """Fill the cosine of each window to its claim. Each text is encoded once, without the words of the language: that
    takes a third less time, and tells the right source from its neighbours as well (AUROC on SciFact .861 for .864)."""
    telling = {text: _telling(text) for claim, window in pairs for text in (claim, window.anchor)}
    texts = list(dict.fromkeys(telling.values()))
    if not texts:
        return
    rows = dict(zip(texts, embedder.encode(texts), strict=True))
    for claim, window in pairs:
        window.cosine = round(max(0.0, float(rows[telling[claim]] @ rows[telling[window.anchor]])), _DIGITS)


def _telling(text: str) -> str:
    """The words of a text that say what it is about, in order."""
    words = [word for word in _WORD.findall(text) if word.lower() not in STOP_WORDS]
    return " ".join(words) or text


class _Source:
    """An entry of the manifest, taken apart once."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.id: str = entry["id"]
        self.document: str = str(entry.get("document_id") or entry["id"])
        self.text: str = entry["text"]
        self.metadata: Mapping[str, Any] = entry.get("metadata") or {}
        self.spans = _spans(self.text)
        self.sentences = [" ".join(self.text[start:end].split()) for start, end in self.spans]
        self.stems = [frozenset(stems(sentence)) for sentence in self.sentences]
        self.title = str(self.metadata.get("title") or "")

    @cached_property
    def authors(self) -> frozenset[str]:
        names = self.metadata.get("authors") or []
        return frozenset(stem for name in names for stem in stems(str(name).split(",")[0]))

    @cached_property
    def numbers(self) -> list[figures.Number]:
        year = self.metadata.get("year")
        return figures.parse(self.text) + figures.parse(self.title) + (figures.parse(str(year)) if year else [])

    @cached_property
    def quotable(self) -> tuple[_Quotable, ...]:
        return (*_quotable(self.text), *_quotable(self.title))


def _spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text stand in it; one for a text without any, so that there is always a window."""
    found: list[tuple[int, int]] = []
    position = 0
    for sentence in sentences(text):
        start = text.find(sentence, position)
        end = start + len(sentence)
        if start < 0:  # white space was joined
            match = re.compile(r"\s+".join(map(re.escape, sentence.split()))).search(text, position)
            if match is None:
                continue
            start, end = match.span()
        found.append((start, end))
        position = end
    return found or [(0, len(text))]


class _Weights:
    """How telling a stem is: its inverse document frequency over the run's chunks and the background."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self.total = background.DOCUMENTS + len(sources)
        self.counts = Counter(stem for source in sources for stem in frozenset().union(*source.stems))
        self.known: dict[str, float] = {}

    def __call__(self, stem: str) -> float:
        if stem not in self.known:
            count = self.counts[stem] + background.COUNTS.get(stem, 0)
            self.known[stem] = math.log(1 + (self.total - count + 0.5) / (count + 0.5))
        return self.known[stem]


@dataclass
class _Window:
    """One to three sentences of a source. `words` says which of the claim's words are in it, as bits."""

    source: _Source
    first: int
    last: int
    words: int
    coverage: float
    anchor: str
    cosine: float = 0.0

    @property
    def span(self) -> tuple[int, int]:
        return self.source.spans[self.first][0], self.source.spans[self.last][1]

    @property
    def text(self) -> str:
        start, end = self.span
        return self.source.text[start:end]


class _Grounding:
    """A claim against its cited sources."""

    def __init__(
        self,
        claim: Claim,
        cited: list[_Source],
        sources: Mapping[str, _Source],
        weigh: _Weights,
        thresholds: Mapping[str, Any],
    ) -> None:
        self.claim, self.cited, self.sources, self.thresholds = claim, cited, sources, thresholds
        # Who found it stands in the metadata, not in the text; the citation check compares names and years.
        authors = frozenset().union(*(source.authors for source in cited))
        words = sorted({stem for stem in stems(claim.bare) if stem not in authors})
        bits = [0.0] if not words else [weigh(word) for word in words]
        self._words, self._bits, self._whole = words, bits, sum(bits)
        self._known, self._places = frozenset(words), {word: 1 << i for i, word in enumerate(words)}
        self._weights: dict[int, float] = {0: 0.0}
        self.windows = {source.id: self._best_window(source) for source in cited}
        self.rival: _Window | None = None

    def _coverage(self, words: int) -> float:
        if words not in self._weights:
            weight = sum(bit for i, bit in enumerate(self._bits) if words >> i & 1)
            self._weights[words] = round(weight / self._whole, _DIGITS) if self._whole else 0.0
        return self._weights[words]

    def _best_window(self, source: _Source) -> _Window:
        here = [sum(map(self._places.__getitem__, self._known & known)) for known in source.stems]
        penalty = float(self.thresholds["window_penalty"])
        best, first, last = -1.0, 0, 0
        for length in range(1, min(LONGEST_WINDOW, len(here)) + 1):
            for start in range(len(here) - length + 1):
                words = 0
                for mask in here[start : start + length]:
                    words |= mask
                worth = self._coverage(words) - penalty * (length - 1)
                if worth > best + 1e-9:
                    best, first, last = worth, start, start + length - 1
        words = 0
        for mask in here[first : last + 1]:
            words |= mask
        anchor = max(range(first, last + 1), key=lambda i: (self._coverage(here[i]), -i))
        return _Window(source, first, last, words, self._coverage(words), source.sentences[anchor])

    def _score(self, coverage: float, cosine: float) -> float:
        if not self._words:  # nothing but words of the language: only the meaning can be compared
            return cosine
        weight = float(self.thresholds["cosine_weight"])
        return round((1 - weight) * coverage + weight * cosine, _DIGITS)

    def judge(self) -> None:
        """Fill the claim, and find the rival: the source that has most of the claim's words, and more than those cited."""
        claim, cited = self.claim, self.cited
        documents = {source.document for source in cited}
        # A reader follows a citation to the document, so all of its chunks count for what must be found verbatim.
        near = [source for source in self.sources.values() if source in cited or source.document in documents]
        numbers, quotes = self._numbers(), quotations(claim.text)
        self.missing_numbers = figures.missing_of(numbers, [n for source in near for n in source.numbers])
        self.missing_quotes = _missing_quotes(quotes, [text for source in near for text in source.quotable])
        claim.checks["grounding"] = {
            source.id: {
                "window": (window := self.windows[source.id]).text,
                "span": list(window.span),
                "coverage": window.coverage,
                "cosine": window.cosine,
                "score": (score := self._score(window.coverage, window.cosine)),
                "missing_numbers": figures.missing_of(numbers, source.numbers),
                "missing_quotes": [_shown(quote) for quote in _missing_quotes(quotes, source.quotable)],
                "status": self._verdict(self._level(score)),
            }
            for source in cited
        }
        # Together: two sources may each have half of a sentence.
        together = 0
        for window in self.windows.values():
            together |= window.words
        self.coverage = self._coverage(together)
        self.score = self._score(self.coverage, max(window.cosine for window in self.windows.values()))
        claim.status = self._verdict(self._level(self.score))
        floor = self.coverage + float(self.thresholds["better_margin"])
        rivals = (
            [self._best_window(source) for source in self.sources.values() if source not in cited] if floor <= 1 else []
        )
        best = max(rivals, key=lambda window: window.coverage, default=None)
        self.rival = best if best and best.coverage >= floor else None

    def _numbers(self) -> list[figures.Number]:
        """The claim's numbers that a source must have. Not: how many sources it cites ("two studies [S1][S2]"), and the
        year of a study that it names ("Bem's 2011 experiments"), which the citation check compares."""
        count, named = len(self.claim.cited), frozenset(stems(self.claim.bare))
        years = {source.metadata.get("year") for source in self.sources.values() if source.authors & named}
        return [
            number
            for number in figures.parse(self.claim.bare)
            if not (number.word and not number.unit and number.value == count > 1)
            and not (number.kind == "year" and number.value in years)
        ]

    def _level(self, score: float) -> str:
        if score < self.thresholds["off_source"]:
            return "off_source"
        return "weak" if score < self.thresholds["weak"] else "grounded"

    def _verdict(self, level: str) -> str:
        """A source that is near carries no claim whose numbers or quotations none of the cited ones has."""
        if level != "off_source" and self.missing_quotes:
            return "quote_mismatch"
        return "number_mismatch" if level != "off_source" and self.missing_numbers else level

    def flags(self) -> Iterator[Flag]:
        """What a reader must know about the claim, worst first."""
        claim, names = self.claim, listed([source.id for source in self.cited])
        found: dict[str, Any] = claim.checks["grounding"]
        level = self._level(self.score)
        off = [i for i, entry in found.items() if entry["status"] == "off_source"]
        if level == "off_source":
            yield self._flag(
                level, f"{names} {_is(self.cited)} about something else (score {self.score:.2f})", self.cited[0].id
            )
        for quote in self.missing_quotes:
            elsewhere = self._elsewhere([s for s in self.sources.values() if not _missing_quotes([quote], s.quotable)])
            yield self._flag("quote_mismatch", f"“{_shown(quote)}” is not in {names} word for word{elsewhere}")
        if self.missing_numbers and level != "off_source":  # there, a missing number says nothing more
            numbers = self._numbers()
            elsewhere = self._elsewhere(
                [s for s in self.sources.values() if not figures.missing_of(numbers, s.numbers)]
            )
            yield self._flag(
                "number_mismatch",
                f"{listed(self.missing_numbers)} {'is' if len(self.missing_numbers) == 1 else 'are'} not in {names}{elsewhere}",
            )
        if level == "weak":
            yield self._flag(level, f"{names} {_is(self.cited)} only loosely related to this (score {self.score:.2f})")
        elif level == "grounded":
            # Another source carries the sentence, and this one decorates it.
            for source_id in off:
                yield self._flag(
                    "off_source",
                    f"{source_id} is about something else (score {found[source_id]['score']:.2f})",
                    source_id,
                )
        if self.rival:
            score = self._score(self.rival.coverage, self.rival.cosine)
            if score >= self.score + float(self.thresholds["better_margin"]):
                better = self.rival.source.id
                yield self._flag(
                    "better_source",
                    f"{better} fits better than {names} (score {score:.2f} against {self.score:.2f})",
                    better,
                )

    def _elsewhere(self, sources: Sequence[_Source]) -> str:
        """Words for the sources outside the cited that have what these lack."""
        other = [source.id for source in sources if source not in self.cited]
        return f"; {listed(other[:3])} {'has' if len(other) == 1 else 'have'} it" if other else ""

    def _flag(self, kind: str, detail: str, source: str | None = None) -> Flag:
        return Flag("grounding", kind, clean(detail), self.claim.id, source)


def _shown(quote: tuple[str, ...]) -> str:
    return " … ".join(quote)


def _is(sources: Sequence[_Source]) -> str:
    return "is" if len(sources) == 1 else "are"


# --- quotations -------------------------------------------------------------------------------------------------------

_OPENING, _CLOSING = "“„«‟", "”»"
_OMITTED = re.compile(r"\[[^\[\]]{0,300}\]|\(\s?\.\.\.\s?\)|\.\s?\.\s?\.(?:\s?\.)?|…")
_MARKS = " \n\t,.;:!?"
_QUOTES = str.maketrans(dict.fromkeys('‘’‚‛′`´ʼ“”„‟«»″"', "'"))
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))


def quotations(text: str) -> list[tuple[str, ...]]:
    """What a text quotes: passages of three words or more between quotation marks, each as its stretches.

    An omission ("…", "[...]") or an insertion ("[the effect]") parts stretches. A quotation that is not closed, or was
    opened in an earlier sentence, reaches to the end or from the start of the text.
    """
    found = []
    for passage in _passages(text):
        stretches = [part.strip() for part in _OMITTED.split(passage)]
        stretches = [part for part in stretches if part.strip(_MARKS)]
        # A full stop before an omission says where a sentence ends; the last one may be the quoting text's own.
        parts = tuple(
            part.strip(_MARKS) + (part[-1] if i < len(stretches) - 1 and part[-1] in ".!?" else "")
            for i, part in enumerate(stretches)
        )
        if sum(len(part.split()) for part in parts) >= QUOTED_WORDS:
            found.append(parts)
    return list(dict.fromkeys(found))


def _passages(text: str) -> Iterator[str]:
    """What stands between quotation marks: curly, straight, guillemets, and single ones that are no apostrophes."""
    start: int | None = None
    first = True
    for match in re.finditer(r"[“”„‟«»\"]|''", text):
        before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        if _opens(match.group(), before, after, None if start is None else text[start - 1], first):
            start = match.end()
        else:
            if start is not None or first:
                yield text[start or 0 : match.start()]
            start = None
        first = False
    if start is not None:
        yield text[start:]
    for match in re.finditer(r"(?<![^\W_])[‘'](?=\S)((?:[^‘’'\n]|(?<=\w)[’'](?=\w))+)[’'](?!\w)", text):
        yield match.group(1)


def _opens(mark: str, before: str, after: str, open_mark: str | None, first: bool) -> bool:
    """Does this mark, between these characters, open a quotation? `open_mark` is the one that is open now."""
    if mark == "“":
        return open_mark != "„"  # „German style“ closes with what opens in English
    if mark in _OPENING or mark in _CLOSING:
        return mark in _OPENING
    if open_mark is not None:
        return False
    # A straight mark at a sentence's end, of a quotation that was opened in the sentence before.
    closes = before.isalnum() or before in tuple(".,!?;:") or not after or after.isspace()
    return not (first and closes)


@dataclass(frozen=True)
class _Quotable:
    """A text as quotations are looked up in it, and where its sentences begin."""

    text: str
    starts: tuple[int, ...]


def _quotable(text: str) -> tuple[_Quotable, _Quotable]:
    """A text as it is, and with the hyphens of line ends dropped."""
    text = clean(text)
    return _searchable(text), _searchable(re.sub(r"(?<=[^\W\d_])[-‐\u00ad]\s+(?=[^\W\d_])", "", text))


def _searchable(text: str) -> _Quotable:
    whole, starts, position = _normal(text), [0], 0
    for sentence in sentences(text):
        needle = _normal(sentence).strip("- ")
        at = whole.find(needle, position) if needle else -1
        if at >= 0:
            starts.append(at)
            position = at + len(needle)
    return _Quotable(whole, tuple(dict.fromkeys(starts)))


def _normal(text: str) -> str:
    """One spelling of quotation marks, dashes, spaces and case; no space beside a dash, and no marks of emphasis."""
    text = unicodedata.normalize("NFKC", re.sub(r"[*`]", "", text))
    text = " ".join(text.translate(_DASHES).translate(_QUOTES).casefold().replace("''", "'").split())
    return re.sub(r" ?-+ ?", "-", text)


def _missing_quotes(quotes: Sequence[tuple[str, ...]], texts: Sequence[_Quotable]) -> list[tuple[str, ...]]:
    return [quote for quote in quotes if not any(_has(text, quote) for text in texts)]


def _has(source: _Quotable, quote: tuple[str, ...]) -> bool:
    """Are the stretches of a quotation in the text, in order, each from word to word, and not spliced?

    What an omission leaves out lies within a sentence. It may reach into the next one where the quotation shows it: the
    stretch before it ends with a full stop, or the one behind it begins the sentence. Else "the effect … obtained the
    difference" could be made of two sentences that say the opposite.
    """
    ends: list[int] = []
    for number, part in enumerate(quote):
        places = list(_places(source.text, _normal(part.strip(_MARKS))))
        if number:
            shown = quote[number - 1][-1] in ".!?"
            places = [(at, end) for at, end in places if _follows(source, ends, at, shown)]
        if not places:
            return False
        ends = [end for _, end in places]
    return True


def _places(text: str, needle: str) -> Iterator[tuple[int, int]]:
    """Where words stand in a text."""
    at = text.find(needle)
    while at >= 0:
        end = at + len(needle)
        if not (_in_word(text, at) or _in_word(text, end)):
            yield at, end
        at = text.find(needle, at + 1)


def _follows(source: _Quotable, ends: Sequence[int], at: int, shown: bool) -> bool:
    """May a stretch that begins here follow one that ends at one of these places? The nearest of them decides."""
    place = bisect_right(ends, at) - 1
    if place < 0:
        return False
    before = bisect_right(source.starts, max(0, ends[place] - 1)) - 1
    here = bisect_right(source.starts, at) - 1
    if before == here:
        return True
    begins = not source.text[source.starts[here] : at].strip(" '([-")
    return here == before + 1 and (shown or begins)


def _in_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()
