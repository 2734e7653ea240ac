"""Fixtures of the tests that need torch and sentence-transformers: two models, made here from what is at hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.client.support import Client

WORDS = "naps sleep improve alertness workers coffee study people trial effect of in the and a not more less . , ? -".split()
# all-MiniLM-L6-v2, as its authors publish it.
MINILM = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of two small layers: random weights, word pieces, mean pooling."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    plain = tmp_path_factory.mktemp("plain")
    pieces = [
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz0123456789",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"),
    ]
    (plain / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]) + "\n")
    tokenizer = BertTokenizerFast(vocab_file=str(plain / "vocab.txt"))
    tokenizer.save_pretrained(plain)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
    )
    BertModel(config).save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=48)
    folder = tmp_path_factory.mktemp("tiny")
    SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's own weights and tokenizer, as a folder that sentence-transformers reads."""
    folder = tmp_path_factory.mktemp("minilm")
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copyfile(Path(os.environ["EMBEDDING_MODEL_DIR"]) / name, folder / name)
    (folder / "config.json").write_text(json.dumps(MINILM))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    modules = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for number, (kind, path) in enumerate(modules.items())
            ]
        )
    )
    for path in ("1_Pooling", "2_Normalize"):
        (folder / path).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True})
    )
    return folder


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """The client's programs in a fresh folder."""
    root = tmp_path / "client"
    root.mkdir()
    return Client(root)
