"""Is the document that decides a claim found, and what does lexical search cost?

    RUNTIME=venv scripts/run client -- python bench/retrieval.py DATA.jsonl [CHUNKS]

DATA holds a claim a line with the one document that decides it: {"input": "…", "gold_ctx": [{"title": "…", "text": "…"}]}
(SciFact's test set in ScholarQABench's form). All documents become one domain, each claim a question. Printed, as JSON:
recall at 1, 5 and 20 of dense search, BM25 and both fused, without and with the refuting rewordings of
config/inference.yaml, and of what is chosen in the end; how many claims keep their document at the configured floor; and
what the lexical index takes at CHUNKS chunks (20000) made of the documents' words.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import embedding
import ingest
import lexical
import records
import retrieve
import settings
import store

PLACES = (1, 5, 20)


def read(path: Path) -> tuple[list[records.Record], list[tuple[str, str]]]:
    """The documents, and for each claim its document's id."""
    documents: dict[tuple[str, str], records.Record] = {}
    claims = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        [gold] = row["gold_ctx"]
        key = (gold["title"], gold["text"])
        record = documents.setdefault(key, records.Record(id=f"d{len(documents)}", title=key[0], text=key[1]))
        claims.append((row["input"], record.id))
    return list(documents.values()), claims


def place(held: list[dict[str, Any]], document: str, rank_of: Any) -> int:
    """The place of a document where documents are ordered by the best rank of their chunks; far off if it has none."""
    best: dict[str, int] = {}
    for entry in held:
        if rank := rank_of(entry["ranks"]):
            best[entry["document_id"]] = min(rank, best.get(entry["document_id"], rank))
    return 1 + sum(rank < best[document] for rank in best.values()) if document in best else sys.maxsize


def recall(places: list[int]) -> list[float]:
    return [round(sum(p <= limit for p in places) / len(places), 3) for limit in PLACES]


def cost(texts: list[str], chunks: int, question: str) -> dict[str, float]:
    """Seconds to build the lexical index, milliseconds to open it and to search it: medians."""
    draw = random.Random(1)
    words = [word for text in texts for word in text.split()]
    made = {f"{i:024x}": " ".join(draw.choices(words, k=150)) for i in range(chunks)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        lexical.write(Path(folder), made)
        built = time.perf_counter() - start
        opened, searched = [], []
        for _ in range(9):
            start = time.perf_counter()
            index = lexical.Index(Path(folder))
            middle = time.perf_counter()
            index.search(question, retrieve.DEPTH)
            opened.append((middle - start) * 1000)
            searched.append((time.perf_counter() - middle) * 1000)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "chunks": chunks,
        "build_seconds": round(built, 2),
        "open_ms": round(statistics.median(opened), 1),
        "search_ms": round(statistics.median(searched), 1),
        "megabytes": round(size / 1e6, 1),
    }


def main(path: Path, chunks: int) -> None:
    """Measure and print."""
    documents, claims = read(path)
    shipped = settings.load()
    everything = dataclasses.replace(shipped, min_similarity=-1)
    embedding.load = functools.cache(embedding.load)
    rows: dict[str, list[int]] = {}
    kept = []
    milliseconds = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VECTOR_STORE_PATH"] = folder
        ingest.load(store.Domain("bench"), documents, embedding.load(shipped.embedding_model))
        for claim, document in claims:
            for kind, configuration in (("", dataclasses.replace(everything, refuting=[])), (" refuting", everything)):
                start = time.perf_counter()
                manifest, facts = retrieve.retrieve(claim, "bench", configuration)
                milliseconds.append((time.perf_counter() - start) * 1000)
                held = [*manifest, *facts["left_out"]]
                ids = list(dict.fromkeys(entry["document_id"] for entry in manifest))
                if not kind:
                    rows.setdefault("dense", []).append(place(held, document, lambda ranks: ranks["dense"][0]))
                    rows.setdefault("bm25", []).append(place(held, document, lambda ranks: ranks["bm25"][0]))
                rows.setdefault(f"fused{kind}", []).append(place(held, document, lambda ranks: ranks["fused"]))
                rows.setdefault(f"chosen{kind}", []).append(1 + ids.index(document) if document in ids else sys.maxsize)
            manifest, facts = retrieve.retrieve(claim, "bench", shipped)
            below = {entry["chunk_id"] for entry in facts["left_out"] if entry["reason"] == "below_floor"}
            held = [entry for entry in [*manifest, *facts["left_out"]] if entry["document_id"] == document]
            kept.append(any(entry["chunk_id"] not in below for entry in held))
    print(
        json.dumps(
            {
                "bench": "retrieval",
                "documents": len(documents),
                "claims": len(claims),
                "recall at": PLACES,
                **{kind: recall(places) for kind, places in rows.items()},
                "kept_at_the_floor": sum(kept),
                "question_ms": round(statistics.median(milliseconds)),
                "lexical": cost([record.text for record in documents], chunks, claims[0][0]),
            }
        )
    )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
