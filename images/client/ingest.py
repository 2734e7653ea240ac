"""Load records into a domain: JSONL records, chunks, vectors, Chroma.

    DOMAIN=my-field FROM=records.jsonl python -m ingest

Idempotent: records are known by their id, an unchanged one costs nothing, a changed one replaces the old. Either the
whole file is taken or nothing is.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import embedding
import records
import settings
import store
from common.problems import OK, Problem, run


def load(domain: store.Domain, read: list[records.Record], embedder: embedding.Embedder) -> str:
    """Take records into a domain and bring its index up to date. Returns one line that says what changed."""
    with domain.writing():
        counts = domain.merge(read)
        index = update(domain, embedder)
    return f"{domain.name}: {_shown(counts)}; {index}"


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def update(domain: store.Domain, embedder: embedding.Embedder) -> str:
    """Bring a domain's index up to date; the caller holds the lock for writing."""
    if domain.is_current(embedder.name, domain.corpus_hash()):
        return "index is current"
    index = domain.update_index(embedder)
    return f"{index['chunks']} chunks, {index['embedded']} embedded, {index['deleted']} deleted"


def load_shipped(domain: store.Domain, embedder: embedding.Embedder) -> str | None:
    """Load the shipped corpus of this domain unless this version of it is there. Returns what changed, or None.

    A record that the user has put in place of a shipped one stays; one that is no longer shipped goes.
    """
    path = store.shipped(domain.name)
    if path is None:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if domain.exists() and domain.state().get("shipped_sha256") == digest:
        return None
    new = {record.id: record for record in records.read(path)}
    with domain.writing():
        before: dict[str, str] = domain.state().get("shipped") or {}
        held = domain.records()
        own = {i for i in new.keys() & held.keys() if held[i] != new[i] and held[i].fingerprint() != before.get(i)}
        gone = [i for i in before if i in held and i not in new and held[i].fingerprint() == before[i]]
        counts = domain.merge([record for record in new.values() if record.id not in own], gone)
        index = update(domain, embedder)
        domain.note_shipped(digest, {record.id: record.fingerprint() for record in new.values()})
    if own:
        counts["kept as you changed them"] = len(own)
    return f"{domain.name}: {_shown(counts)}; {index}"


def main() -> int:
    """Ingest the file of FROM into the domain of DOMAIN."""
    name = settings.domain()
    source = settings.variable("FROM")
    if not source:
        raise Problem("FROM is empty. Try: make ingest DOMAIN=my-field FROM=records.jsonl")
    configuration = settings.load()
    read = records.read(Path(source))  # every bad line is named before a model is loaded
    print(load(store.Domain(name), read, embedding.load(configuration.embedding_model)), file=sys.stderr)
    return OK


if __name__ == "__main__":
    run(main)
