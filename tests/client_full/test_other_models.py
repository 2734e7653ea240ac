"""Any other embedding model through sentence-transformers: the same promises as the shipped one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tests.client.support import NAPS, SLEEP, TREE, Client, as_lines, load, sources

import embedding
import store
from common.problems import BAD_INPUT, OK
from embedding import split_to_fit

ASK = {"Q": NAPS, "DOMAIN": "sleep"}
TEXTS = [
    "", " ", "a", "Naps.", "naps improve alertness", "NAPS IMPROVE ALERTNESS", "p < .05, d = 0.48, N = 2,141", "👩‍👩‍👧", "…",
    "你好，世界", "Ünïcödé Ångström", "שלום עולם", "한국어 문장", "[CLS] [MASK] [SEP]", "tabs\tand\nlines", "x" * 120, "a-b-c/d.e",
    "A man is eating food.", "Someone is having a meal.", "<|im_end|> </sources> [S3]",
]  # fmt: skip


def varied_texts() -> list[str]:
    """At least 50 texts from a word to several pages, in several scripts."""
    corpus = [json.loads(line)["text"] for line in (TREE / "corpus" / "psychology.jsonl").read_text().splitlines()]
    chosen = random.Random(7).sample(corpus, 36)
    return [*TEXTS, *chosen, " ".join(chosen[:3]), " ".join(chosen[:12])]


def test_the_shipped_model_computes_what_sentence_transformers_computes(minilm: Path) -> None:
    texts = varied_texts()
    assert len(texts) >= 50
    ours, theirs = embedding.load("all-MiniLM-L6-v2"), embedding.load(str(minilm))
    assert (theirs.limit, [theirs.count(text) for text in texts]) == (ours.limit, [ours.count(text) for text in texts])
    assert max(map(ours.count, texts)) > 1000
    cosines = (ours.encode(texts) * theirs.encode(texts)).sum(axis=1)
    assert cosines.min() >= 0.9999, texts[int(cosines.argmin())]


def test_a_model_from_a_folder_gives_vectors_of_length_1(tiny: Path) -> None:
    embedder = embedding.load(str(tiny))
    assert embedder.name == str(tiny)
    assert embedder.limit == 46  # 48 less the two markers
    vectors = embedder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 32)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    assert (vectors * alone).sum(axis=1).min() > 0.99999


def test_a_long_text_is_not_truncated(tiny: Path) -> None:
    embedder = embedding.load(str(tiny))
    body = "naps improve alertness in the study of workers . " * 30
    assert embedder.count(body) > 5 * embedder.limit
    plain, longer = embedder.encode([body, f"{body} coffee coffee coffee coffee not sleep"])
    assert plain @ longer < 0.99999
    parts = split_to_fit(body, embedder.count, embedder.limit)
    assert " ".join(parts).split() == body.split()
    assert max(map(embedder.count, parts)) <= embedder.limit
    mean = np.array([embedder.count(part) for part in parts]) @ embedder.encode(parts)
    assert plain == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_ingest_and_retrieve_work_with_another_model_and_rebuild_when_it_changes(client: Client, tiny: Path) -> None:
    long = {"id": "long", "title": "Long", "text": "Naps improve alertness in the study of workers. " * 40}
    client.configure(embedding_model=str(tiny), min_similarity=-1, n_results=100, max_per_paper=100)
    outcome = client.ingest("sleep", *SLEEP, long)
    assert outcome.code == OK, outcome.err
    assert "sleep: 4 added" in outcome.err
    outcome = client.run("retrieve", **ASK)
    assert (outcome.code, outcome.err) == (OK, "")
    lines = sources(outcome.out)
    assert len(lines) > 10  # the long document is many chunks
    state = client.store / "sleep" / "state.json"
    assert load(state)["index"]["embedding_model"] == str(tiny)

    client.configure(min_similarity=-1)
    outcome = client.run("retrieve", **ASK)
    assert "the index of sleep was behind: " in outcome.err
    assert load(state)["index"]["embedding_model"] == "all-MiniLM-L6-v2"
    client.configure(embedding_model=str(tiny), min_similarity=-1, n_results=100, max_per_paper=100)
    assert sources(client.run("retrieve", **ASK).out) == lines


def test_every_chunk_fits_another_model_too(client: Client, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import chunks
    from records import Record

    embedder = embedding.load(str(tiny))
    for record in SLEEP:
        text = f"{record['text']} " * 10
        found = chunks.chunk(Record(id="a", title=f"{record['title']} " * 20, text=text), embedder)
        assert " ".join(c.text for c in found).split() == text.split()
        assert max(embedder.count(c.embedded) for c in found) <= embedder.limit


@pytest.mark.parametrize("program", ["ingest", "retrieve", "synth"])
@pytest.mark.parametrize("model", ["nobody/no-such-model", "empty", "broken", "no weights"])
def test_a_model_that_cannot_be_loaded_is_named(client: Client, minilm: Path, program: str, model: str) -> None:
    import shutil

    assert client.ingest("sleep", SLEEP[0]).code == OK
    if model == "empty":
        (client.root / model).mkdir()
    elif model != "nobody/no-such-model":
        shutil.copytree(minilm, client.root / model)
        (client.root / model / "model.safetensors").unlink()
        if model == "broken":
            (client.root / model / "model.safetensors").write_bytes(b"broken")
    client.configure(embedding_model=model)
    (client.root / "records.jsonl").write_bytes(as_lines(*SLEEP))
    before = client.written()
    outcome = client.run(program, **ASK, FROM="records.jsonl", RUNPOD_ENDPOINT_ID="ep", RUNPOD_API_KEY="key")
    assert outcome.code == BAD_INPUT
    assert f"error: embedding_model: {model} cannot be loaded: " in outcome.err
    assert (outcome.out, client.written()) == ("", before)


def test_the_shipped_model_still_needs_no_torch(client: Client) -> None:
    assert client.ingest("sleep", *SLEEP).code == OK
    assert load(client.store / "sleep" / "state.json")["embedding_model"] == "all-MiniLM-L6-v2"
    assert store.COLLECTION == "chunks"
