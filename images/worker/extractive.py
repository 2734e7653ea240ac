"""The extractive engine: no weights. It picks the sentences of the sources that answer the question and quotes them.

A word of the question weighs more the rarer it is among the sentences and the better retrieval ranked the sources that
hold it: a word that only the last sources hold is not what the question is about. Sentences are scored by the weights
of the words they hold, damped by length as in BM25, with a small bonus for the first sources; a source that holds too
few of the words is left out, because it holds them by chance. Then sentences are chosen one by one, at most two from
each source, so that one which is like a chosen one loses (maximal marginal relevance) and one which repeats it is left
out. What is printed is verbatim, each sentence under the id of its source. The same job gives the same answer on every
machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.prompts import neutralise
from common.text import clean, sentences, stems
from common.wire import Job
from engines import Answer, JobError

CAPACITY = 4  # jobs at once: threads, of which asyncio has at least five
MAX_SENTENCES = 10
MAX_PER_SOURCE = 2
MIN_WORDS = 6  # shorter sentences are headings and fragments
REDUNDANCY = 0.5  # how much likeness to a chosen sentence costs, as a share of the best score
COVERAGE = 0.4  # a sentence counts if it holds this share of the question's weight that the best one holds
SOURCE_COVERAGE = 0.5  # a source counts if it holds this share of the question's words that the best one holds, …
LONG_QUESTION = 3  # … and two of them if the question has this many
NEGATIONS = frozenset(("no", "nor", "not"))  # stop words, but not in a comparison of two sentences
NOTHING_FOUND = "No retrieved source shares enough words with the question."


@dataclass(frozen=True, eq=False)
class Sentence:
    """A sentence of a source, with its place and its stems."""

    source: int
    source_id: str
    place: int
    text: str
    stems: frozenset[str]
    length: int


class Cancelled(Exception):
    """The job is not wanted any more."""


class ExtractiveEngine:
    """Answers from the job's sources alone."""

    capacity = CAPACITY

    def __init__(self) -> None:
        self.model: dict[str, Any] = {
            "id": "extractive",
            "revision": None,
            "engine": "extractive",
            "quantization": "none",
        }

        self._room = asyncio.Semaphore(CAPACITY)

    async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
        """Quote the sentences that answer the job's prompt. Raises JobError without sources to quote."""
        if not job.sources:
            raise JobError("NO_SOURCES", "the extractive engine quotes sources, and the job has none")
        cancelled = threading.Event()
        waiting = time.monotonic()
        async with self._room:
            start = time.monotonic()
            # In a thread, because long sources take seconds and the worker must hear the platform meanwhile.
            thread = asyncio.ensure_future(asyncio.to_thread(quote, job, cancelled))
            try:
                text, whole = await asyncio.shield(thread)
            except asyncio.CancelledError:
                cancelled.set()
                with contextlib.suppress(Cancelled):
                    await thread
                raise
        emit(text)
        return Answer(
            text,
            "stop" if whole else "length",
            queue_ms=round((start - waiting) * 1000),
            decode_ms=round((time.monotonic() - start) * 1000),
        )

    def metrics(self) -> dict[str, float]:
        """There is nothing to tell."""
        return {}

    def close(self) -> None:
        """There is nothing to let go of."""


def quote(job: Job, cancelled: threading.Event) -> tuple[str, bool]:
    """The answer, and whether all of it is there: `max_new_tokens` counts words here. Raises Cancelled."""
    chosen = choose(job.prompt, collect(job.sources, cancelled), cancelled)
    if not chosen:
        return NOTHING_FOUND, True
    lines: list[str] = []
    words = 0
    for sentence in chosen:
        words += sentence.length
        if words > job.max_new_tokens:
            return "\n".join(lines), False
        lines.append(f"- {sentence.text} [{sentence.source_id}]")
    return "\n".join(lines), True


def collect(sources: list[dict[str, str]], cancelled: threading.Event) -> list[Sentence]:
    """Every sentence of the sources that is long enough to stand alone. Raises Cancelled."""
    found = []
    for number, source in enumerate(sources):
        for place, text in enumerate(sentences(neutralise(clean(source["text"])))):
            _check(cancelled)
            words = text.lower().split()
            if len(words) >= MIN_WORDS:
                held = frozenset(stems(text)) | NEGATIONS.intersection(words)
                found.append(Sentence(number, source["id"], place, text, held, len(words)))
    return found


def choose(question: str, candidates: list[Sentence], cancelled: threading.Event) -> list[Sentence]:
    """The sentences to quote: best first, sentences of one source side by side. Raises Cancelled."""
    asked = frozenset(stems(question))
    frequency = Counter(stem for sentence in candidates for stem in sentence.stems & asked)
    held: dict[int, set[str]] = {}
    for s in candidates:
        held.setdefault(s.source, set()).update(s.stems & asked)
    # Sums are taken in a fixed order: sets of text come in another order in each process, and so would the last digit.
    value = {
        stem: math.log(1 + len(candidates) / count) * sum(1 / (1 + source) for source in held if stem in held[source])
        for stem, count in frequency.items()
    }
    needed = max(
        2 if len(asked) >= LONG_QUESTION else 1,
        SOURCE_COVERAGE * max(map(len, held.values()), default=0),
    )
    weights = {
        s: sum(value[stem] for stem in sorted(s.stems & asked))
        for s in candidates
        if s.stems & asked and len(held[s.source]) >= needed
    }
    if not weights:
        return []
    mean_length = sum(s.length for s in candidates) / len(candidates)
    enough = COVERAGE * max(weights.values())
    scores = {
        s: weight / (0.6 + 0.4 * s.length / mean_length) * (1 + 0.5 / (1 + s.source))
        for s, weight in weights.items()
        if weight >= enough
    }
    penalty = REDUNDANCY * max(scores.values())
    likeness = dict.fromkeys(scores, 0.0)  # to the chosen sentence that is most alike
    chosen: list[Sentence] = []
    per_source: Counter[int] = Counter()
    while likeness and len(chosen) < MAX_SENTENCES:
        _check(cancelled)
        # Ties go to the better ranked source, then to the earlier sentence.
        pick = max(likeness, key=lambda s: (scores[s] - penalty * likeness[s], -s.source, -s.place))
        chosen.append(pick)
        per_source[pick.source] += 1
        likeness = {
            s: max(known, _likeness(s, pick, asked))
            for s, known in likeness.items()
            if s.stems != pick.stems and per_source[s.source] < MAX_PER_SOURCE
        }
    first = {s.source: position for position, s in reversed(list(enumerate(chosen)))}
    return sorted(chosen, key=lambda s: (first[s.source], s.place))


def _check(cancelled: threading.Event) -> None:
    if cancelled.is_set():
        raise Cancelled


def _likeness(one: Sentence, other: Sentence, asked: frozenset[str]) -> float:
    """The share of the words of both, those of the question aside, that they have in common."""
    words, others = one.stems - asked, other.stems - asked
    return len(words & others) / max(1, len(words | others))
