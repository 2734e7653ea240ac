"""What level 1 costs: seconds of CPU for a synthesis of 40 claims over 20 sources, the model loaded. One JSON line each.

    scripts/run client -- python bench/checks.py [ROUNDS]

Sources are the shipped corpus's first 20 texts, claims their sentences, shortened and cited to one or two of them. Printed
is the lowest of the rounds: CPU time grows when other programs share the cores, and never shrinks.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import embedding
import grounding
from common.text import sentences
from ledger import Claim
from settings import SHIPPED_MODEL

CLAIMS, SOURCES = 40, 20


def synthesis() -> tuple[list[Claim], list[dict[str, Any]]]:
    """40 claims and the 20 sources that they cite. Every third word is left out, as if it had been said otherwise."""
    lines = Path("corpus/psychology.jsonl").read_text(encoding="utf-8").splitlines()[:SOURCES]
    records = [json.loads(line) for line in lines]
    manifest = [
        {"id": f"S{i}", "document_id": record["id"], "text": record["text"], "metadata": record}
        for i, record in enumerate(records, 1)
    ]
    claims = []
    for i in range(CLAIMS):
        found = sentences(records[i % SOURCES]["text"])
        words = found[(1 + i // SOURCES) % len(found)].split()
        text = " ".join(word for n, word in enumerate(words) if n % 3)
        cited = [f"S{i % SOURCES + 1}"] + ([f"S{(i * 7 + 3) % SOURCES + 1}"] if i % 3 == 0 else [])
        claims.append(Claim(f"C{i + 1}", text, text, (0, len(text)), "", "fact", list(dict.fromkeys(cited))))
    return claims, manifest


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    embedder = embedding.load(SHIPPED_MODEL)
    embedder.encode(["warm"])
    thresholds = grounding.thresholds()
    cpu, wall = [], []
    for _ in range(rounds):
        claims, manifest = synthesis()
        started, at = time.process_time(), time.perf_counter()
        grounding.check(claims, manifest, embedder, thresholds)
        cpu.append(time.process_time() - started)
        wall.append(time.perf_counter() - at)
    print(
        json.dumps(
            {
                "what": f"level 1: {CLAIMS} claims, {SOURCES} sources, model loaded",
                "cpu_seconds": round(min(cpu), 3),
                "wall_seconds": round(min(wall), 3),
                "median_cpu_seconds": round(statistics.median(cpu), 3),
                "bound_cpu_seconds": 1,
            }
        )
    )


if __name__ == "__main__":
    main()
