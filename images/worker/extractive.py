"""The extractive engine: no weights. It picks the sentences of the sources that answer the question and quotes them.

Sentences are scored by the inverse document frequency of the question's words they hold, damped by length as in BM25,
with a small bonus for sources that retrieval ranked first; then they are chosen one by one so that a sentence which
repeats a chosen one loses (maximal marginal relevance), at most two from each source. What is printed is verbatim, each
sentence under the id of its source. The same job gives the same answer on every machine.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from common.prompts import neutralise
from common.text import sentences, stems
from common.wire import Job
from engines import Answer, JobError

MAX_SENTENCES = 10
MAX_PER_SOURCE = 2
MIN_WORDS = 6  # shorter sentences are headings and fragments
REDUNDANCY = 0.5  # how much likeness to a chosen sentence costs, as a share of the best score
COVERAGE = 0.5  # a sentence counts if it holds this share of the question's weight that the best one holds
NOTHING_FOUND = "No sentence of the retrieved sources shares a word with the question."


@dataclass(frozen=True)
class Sentence:
    """A sentence of a source, with its place and its stems."""

    source: int
    source_id: str
    place: int
    text: str
    stems: frozenset[str]
    length: int


class ExtractiveEngine:
    """Answers from the job's sources alone."""

    def __init__(self) -> None:
        self.model: dict[str, Any] = {
            "id": "extractive",
            "revision": None,
            "engine": "extractive",
            "quantization": "none",
        }

    def answer(self, job: Job, cancelled: threading.Event) -> Answer:
        """Quote the sentences that answer the job's prompt. Raises JobError without sources to quote."""
        if not job.sources:
            raise JobError("NO_SOURCES", "the extractive engine quotes sources, and the job has none")
        start = time.monotonic()
        chosen = choose(job.prompt, collect(job.sources))
        lines: list[str] = []
        words = 0
        finish_reason = "stop"
        for sentence in chosen:
            if cancelled.is_set():
                finish_reason = "cancelled"
                break
            words += sentence.length
            if words > job.max_new_tokens:
                finish_reason = "length"
                break
            lines.append(f"- {sentence.text} [{sentence.source_id}]")
        return Answer(
            "\n".join(lines) or NOTHING_FOUND,
            finish_reason,  # type: ignore[arg-type]
            decode_ms=round((time.monotonic() - start) * 1000),
        )


def collect(sources: list[dict[str, str]]) -> list[Sentence]:
    """Every sentence of the sources that is long enough to stand alone."""
    found = []
    for number, source in enumerate(sources):
        for place, text in enumerate(sentences(neutralise(source["text"]))):
            length = len(text.split())
            if length >= MIN_WORDS:
                found.append(Sentence(number, source["id"], place, text, frozenset(stems(text)), length))
    return found


def choose(question: str, candidates: list[Sentence]) -> list[Sentence]:
    """The sentences to quote: best first, sentences of one source side by side."""
    asked = frozenset(stems(question))
    frequency = Counter(stem for sentence in candidates for stem in sentence.stems & asked)
    idf = {stem: math.log(1 + len(candidates) / count) for stem, count in frequency.items()}
    mean_length = sum(s.length for s in candidates) / len(candidates) if candidates else 1.0

    # Summed in a fixed order: sets of text come in another order in each process, and so would the last digit.
    weights = {s: sum(idf[stem] for stem in sorted(s.stems & asked)) for s in candidates if s.stems & asked}
    if not weights:
        return []
    enough = COVERAGE * max(weights.values())
    scores = {
        s: weight / (0.6 + 0.4 * s.length / mean_length) * (1 + 0.5 / (1 + s.source))
        for s, weight in weights.items()
        if weight >= enough
    }
    best = max(scores.values())
    chosen: list[Sentence] = []
    per_source: Counter[int] = Counter()
    remaining = dict(scores)
    while remaining and len(chosen) < MAX_SENTENCES:
        # Ties go to the better ranked source, then to the earlier sentence.
        sentence = max(
            remaining,
            key=lambda s: (remaining[s] - REDUNDANCY * best * _likeness(s, chosen, asked), -s.source, -s.place),
        )
        del remaining[sentence]
        if per_source[sentence.source] < MAX_PER_SOURCE:
            per_source[sentence.source] += 1
            chosen.append(sentence)
    first = {s.source: position for position, s in reversed(list(enumerate(chosen)))}
    return sorted(chosen, key=lambda s: (first[s.source], s.place))


def _likeness(sentence: Sentence, chosen: list[Sentence], asked: frozenset[str]) -> float:
    """The largest share of words, those of the question aside, that the sentence has in common with a chosen one."""
    own = sentence.stems - asked
    return max((len(own & other.stems) / max(1, len(own | (other.stems - asked))) for other in chosen), default=0.0)
