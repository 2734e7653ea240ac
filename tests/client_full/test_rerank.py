"""The cross-encoder that reads question and chunk together: its order is taken, written down, and bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.client.support import NAPS, SLEEP, Client

import retrieve
import settings
from common.problems import BAD_INPUT, OK


@pytest.fixture(scope="module")
def reranker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder of two small layers with random weights."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("reranker")
    tokenizer = AutoTokenizer.from_pretrained(tiny, model_max_length=48)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(6)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def found(client: Client, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    client.configure(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECTOR_STORE_PATH", str(client.store))
        patch.setenv("CORPUS_DIR", str(client.corpus))
        return retrieve.retrieve(NAPS, "sleep", settings.load(client.root / "config" / "inference.yaml"))


def test_the_order_is_that_of_the_cross_encoder(client: Client, reranker: Path) -> None:
    assert client.ingest("sleep", *SLEEP).code == OK
    manifest, _ = found(client, rerank=str(reranker), min_similarity=-1)
    texts = [f"{entry['metadata']['title']}\n{entry['text']}" for entry in manifest]
    scores = retrieve.rerank(str(reranker), NAPS, texts)
    assert len(set(scores)) > 1
    assert all(0 < score < 1 for score in scores)
    assert scores == sorted(scores, reverse=True)
    assert [entry["scores"]["rerank"] for entry in manifest] == scores == [e["scores"]["relevance"] for e in manifest]
    assert [entry["ranks"]["rerank"] for entry in manifest] == [1, 2, 3]
    assert found(client, rerank=str(reranker), min_similarity=-1)[0] == manifest


def test_only_the_best_are_ordered_anew_and_the_rest_is_named(
    client: Client, reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieve, "RERANKED", 2)
    assert client.ingest("sleep", *SLEEP).code == OK
    manifest, facts = found(client, rerank=str(reranker), min_similarity=-1)
    assert len(manifest) == 2
    [out] = facts["left_out"]
    assert (out["reason"], out["ranks"]["rerank"]) == ("rerank", None)


def test_a_model_that_cannot_be_loaded_is_named(client: Client, tmp_path: Path) -> None:
    assert client.ingest("sleep", *SLEEP).code == OK
    client.configure(rerank=str(tmp_path / "none"))
    outcome = client.run("retrieve", Q=NAPS, DOMAIN="sleep")
    assert outcome.code == BAD_INPUT
    assert f"rerank: {tmp_path / 'none'} cannot be used: " in outcome.err
