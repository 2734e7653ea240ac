"""Find the chunks of a domain that are nearest to a question.

Q="Does ego depletion replicate?" DOMAIN=psychology python -m retrieve     prints the sources, sends nothing
"""

from __future__ import annotations

import sys
from typing import Any

import chunks
import embedding
import ingest
import settings
import store
from common.problems import OK, Problem, run
from common.text import clean
from records import label


def retrieve(question: str, name: str, configuration: settings.Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The manifest of a question (entries S1…Sn, best first) and the corpus it was taken from: sha256 of
    the records, chunker version, embedding model.

    Loads the shipped corpus on first use, and rebuilds an index that is behind its records. Raises Problem (exit 2) for
    a domain that does not exist and for a question that nothing in the domain is near to.
    """
    domain = store.Domain(name)
    if name not in store.domains():
        raise Problem(
            f"domain {name} does not exist; there is {', '.join(store.domains()) or 'none'}."
            f" Add it with: make ingest DOMAIN={name} FROM=records.jsonl"
        )
    embedder = embedding.load(configuration.embedding_model)
    if loaded := ingest.load_shipped(domain, embedder):
        print(f"loaded the shipped corpus: {loaded}", file=sys.stderr)
    vector = embedder.encode([clean(question)])[0]
    while True:
        with domain.reading():
            corpus_hash = domain.corpus_hash()
            if domain.is_current(embedder.name, corpus_hash):
                hits = domain.query(vector, configuration.n_results)
                break
        with domain.writing():
            print(f"the index of {name} was behind: {ingest.update(domain, embedder)}", file=sys.stderr)
    near = [hit for hit in hits if hit.similarity >= configuration.min_similarity]
    if not near:
        best = f"the nearest has similarity {hits[0].similarity:.2f}" if hits else "it is empty"
        raise Problem(
            f"nothing in domain {name} is near to this question ({best}, min_similarity in config/inference.yaml is"
            f" {configuration.min_similarity});"
            " no job was sent. Ask differently, or add documents with make ingest"
        )
    corpus = {"sha256": corpus_hash, "chunker": chunks.CHUNKER, "embedding_model": embedder.name}
    return [_entry(number, hit) for number, hit in enumerate(near, 1)], corpus


def _entry(number: int, hit: store.Hit) -> dict[str, Any]:
    return {
        "id": f"S{number}",
        "chunk_id": hit.chunk_id,
        "document_id": hit.metadata["id"],
        "text": hit.text,
        "label": label(hit.metadata),
        "metadata": hit.metadata,
        "ranks": {"dense": number},
        "scores": {"cosine": hit.similarity},
    }


def main() -> int:
    """Print the sources of the question Q in the domain DOMAIN."""
    manifest, _ = retrieve(settings.question(), settings.domain(), settings.load())
    for entry in manifest:
        print(
            f"{entry['id']:>4}  {entry['scores']['cosine']:.3f}  {clean(entry['label'])}: {clean(entry['text'])[:100]}"
        )
    return OK


if __name__ == "__main__":
    run(main)
