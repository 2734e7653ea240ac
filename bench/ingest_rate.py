"""Records per second into a domain: ours against one-by-one encode + add, side by side on the same texts.

    python bench/ingest_rate.py [ROUNDS]         (make bench runs it where both can run: the client-full environment)

The yardstick embeds each text by itself with sentence-transformers and adds it to Chroma by itself, as first scripts
do. Ours is what `make ingest` runs, validation, records file and locks included. A last figure is the same file again.
Imports and model loading are left out on both sides.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import chromadb
from sentence_transformers import SentenceTransformer

import embedding
import ingest
import records
import store

CORPUS = Path("corpus/psychology.jsonl")


def one_by_one(model: SentenceTransformer, lines: list[str], folder: str) -> float:
    """Seconds for the yardstick."""
    collection: Any = chromadb.PersistentClient(path=folder).create_collection("naive", embedding_function=None)
    start = time.perf_counter()
    for line in lines:
        record = json.loads(line)
        vector = model.encode(record["text"], show_progress_bar=False).tolist()
        collection.add(ids=[record["id"]], embeddings=[vector], documents=[record["text"]])
    return time.perf_counter() - start


def ours(embedder: embedding.Embedder, path: Path, folder: str) -> tuple[float, float]:
    """Seconds for a first ingest, and for the same file again."""
    os.environ["VECTOR_STORE_PATH"] = folder
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        ingest.load(store.Domain("bench"), records.read(path), embedder)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def main(rounds: int) -> None:
    """Measure and print."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    model = SentenceTransformer(os.environ["EMBEDDING_MODEL_DIR"], device="cpu")
    embedder = embedding.load("all-MiniLM-L6-v2")
    rows = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            rows.append((one_by_one(model, lines, first), *ours(embedder, CORPUS, second)))
    naive, fresh, again = (statistics.median(column) for column in zip(*rows, strict=True))
    result = {
        "bench": "ingest",
        "rounds": rounds,
        "records": len(lines),
        "ours_per_second": round(len(lines) / fresh, 1),
        "one_by_one_per_second": round(len(lines) / naive, 1),
        "ratio": round(statistics.median(n / f for n, f, _ in rows), 2),
        "unchanged_seconds": round(again, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
