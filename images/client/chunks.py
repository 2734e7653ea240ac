"""Documents to chunks: runs of whole sentences that fit the embedding model, so that no tail is ever cut off unseen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from common.text import clean, sentences
from embedding import Embedder, split_to_fit
from records import Record

# Part of every chunk id: raise it when chunks come out differently, and each domain is indexed anew.
CHUNKER = 1
# The title stands in front of each chunk when it is embedded; a very long one must leave room for the text.
TITLE_SHARE = 0.25


@dataclass(frozen=True)
class Chunk:
    """A stretch of a document. `embedded` is what the vector is made from: title and text."""

    id: str
    text: str
    embedded: str
    document_id: str
    position: int
    record: str  # the document's metadata as JSON


def chunk(record: Record, embedder: Embedder) -> list[Chunk]:
    """The chunks of a document, in order; together they hold every word of its cleaned text."""
    title = split_to_fit(clean(record.title), embedder.count, max(1, int(embedder.limit * TITLE_SHARE)))[0]
    # Joining strings can make word pieces that neither had alone; a small reserve keeps the sum under the limit.
    room = max(1, embedder.limit - embedder.count(title) - 4)
    metadata = json.dumps(record.metadata(), ensure_ascii=False, sort_keys=True)
    chunks = []
    for position, text in enumerate(pack(clean(record.text), embedder.count, room)):
        digest = hashlib.sha256(json.dumps([CHUNKER, position, title, text, metadata]).encode()).hexdigest()
        chunks.append(Chunk(digest[:24], text, f"{title}\n{text}", record.id, position, metadata))
    return chunks


def pack(text: str, count: Callable[[str], int], room: int) -> list[str]:
    """Whole sentences, packed in order into stretches of at most `room` word pieces; longer sentences are split."""
    stretches: list[str] = []
    line: list[str] = []
    size = 0
    for sentence in sentences(text):
        cost = count(sentence)
        for part in [sentence] if cost <= room else split_to_fit(sentence, count, room):
            cost = count(part)
            if line and size + cost > room:
                stretches.append(" ".join(line))
                line, size = [], 0
            line.append(part)
            size += cost
    if line:
        stretches.append(" ".join(line))
    return stretches
