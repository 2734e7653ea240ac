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


def load_file(domain: store.Domain, path: Path, embedder: embedding.Embedder) -> str:
    """Read a file into a domain and bring its index up to date. Returns one line that says what changed."""
    return load(domain, records.read(path), embedder)


def load(domain: store.Domain, read: list[records.Record], embedder: embedding.Embedder) -> str:
    """Take records into a domain and bring its index up to date. Returns one line that says what changed."""
    with domain.writing():
        counts = domain.merge(read)
        index = update(domain, embedder)
    changed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{domain.name}: {changed}; {index}"


def update(domain: store.Domain, embedder: embedding.Embedder) -> str:
    """Bring a domain's index up to date; the caller holds the lock for writing."""
    if domain.is_current(embedder.name, domain.corpus_hash()):
        return "index is current"
    index = domain.update_index(embedder)
    return f"{index['chunks']} chunks, {index['embedded']} embedded, {index['deleted']} deleted"


def load_shipped(domain: store.Domain, embedder: embedding.Embedder) -> str | None:
    """Load the shipped corpus of this domain unless this version of it is there. Returns what changed, or None."""
    path = store.shipped(domain.name)
    if path is None:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if domain.exists() and domain.state().get("shipped_sha256") == digest:
        return None
    changed = load_file(domain, path, embedder)
    with domain.writing():
        domain.note_shipped(digest)
    return changed


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
