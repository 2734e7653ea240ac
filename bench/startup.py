"""Process start to sources ready: ours against the first script, side by side on one corpus and one machine.

    python bench/startup.py [ROUNDS]        (make bench runs it where both can run: the client-full environment)

The yardstick is what a first script does: import chromadb and sentence_transformers, load the model, open the store,
embed the question, query. Ours is `python -m retrieve`. Rounds are interleaved; printed are medians, the median of the
paired ratios, peak memory, and the lowest cosine between the two paths' vectors over the corpus.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTION = "Does ego depletion replicate?"
FIRST_SCRIPT = """
import os, sys
import chromadb
from sentence_transformers import SentenceTransformer
embedder = SentenceTransformer(os.environ["EMBEDDING_MODEL_DIR"], device="cpu")
client = chromadb.PersistentClient(path=os.environ["VECTOR_STORE_PATH"] + "/psychology/chroma")
collection = client.get_collection("chunks", embedding_function=None)
vector = embedder.encode(os.environ["Q"]).tolist()
found = collection.query(query_embeddings=[vector], n_results=20, include=["documents", "metadatas"])
for text in found["documents"][0]:
    print(text[:60])
"""


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds from start to end, and peak memory in MB, of one process."""
    code = (
        "import resource, subprocess, sys, time; s = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(time.perf_counter() - s, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, check=True, capture_output=True, text=True
    )
    seconds, kilobytes = out.stdout.split()
    return float(seconds), int(kilobytes) // 1024


def lowest_cosine(environment: dict[str, str]) -> float:
    """The worst agreement of the two paths' vectors over the questions and texts of the corpus."""
    code = """
import json, os, sys
from pathlib import Path
import embedding, numpy
from sentence_transformers import SentenceTransformer
lines = Path("corpus/psychology.jsonl").read_text(encoding="utf-8").splitlines()
texts = [json.loads(line)[key] for line in lines for key in ("title", "text")]
ours = embedding.load("all-MiniLM-L6-v2")
texts = [text for text in texts if ours.count(text) <= ours.limit]
theirs = SentenceTransformer(os.environ["EMBEDDING_MODEL_DIR"], device="cpu").encode(texts, normalize_embeddings=True)
print((ours.encode(texts) * theirs).sum(axis=1).min())
"""
    out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return float(out.stdout)


def main(rounds: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "VECTOR_STORE_PATH": folder, "Q": QUESTION, "DOMAIN": "psychology"}
        ours, first_script = [sys.executable, "-m", "retrieve"], [sys.executable, "-c", FIRST_SCRIPT]
        for command in (ours, first_script):  # the first loads the corpus; both warm the page cache
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        pairs = [(timed(ours, environment), timed(first_script, environment)) for _ in range(rounds)]
        cosine = lowest_cosine(environment)
    result = {
        "bench": "startup",
        "rounds": rounds,
        "ours_seconds": round(statistics.median(o[0] for o, _ in pairs), 3),
        "first_script_seconds": round(statistics.median(s[0] for _, s in pairs), 3),
        "ratio": round(statistics.median(s[0] / o[0] for o, s in pairs), 1),
        "ours_mb": int(statistics.median(o[1] for o, _ in pairs)),
        "first_script_mb": int(statistics.median(s[1] for _, s in pairs)),
        "lowest_cosine": round(cosine, 6),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    started = time.monotonic()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
    print(f"took {time.monotonic() - started:.0f} s in {Path.cwd()}", file=sys.stderr)
