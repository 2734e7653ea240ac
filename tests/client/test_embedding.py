"""The shipped embedding model: its arithmetic, and that no text is cut off unseen."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY

import embedding
from embedding import Embedder, split_to_fit
from settings import SHIPPED_MODEL

# sha256 of model.safetensors of sentence-transformers/all-MiniLM-L6-v2.
WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXTS = [
    "Naps improve alertness.",
    "",
    " \n\t ",
    "a",
    "👩‍👩‍👧",
    "…",
    "\u200b",
    "你好，世界",
    "p < .05, d = 0.48, N = 2,141",
    "[CLS] [MASK] [PAD] [SEP]",
    "word " * 100,
    "Ego depletion failed to replicate in 23 laboratories. " * 12,
    "x" * 5000,
    "Naps were studied in many trials. " * 60,
]


def test_the_weights_are_the_official_ones() -> None:
    weights = Path(os.environ["EMBEDDING_MODEL_DIR"]) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == WEIGHTS


def test_each_text_becomes_one_vector_of_length_1(embedder: Embedder) -> None:
    vectors = embedder.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


def test_no_texts_are_no_vectors(embedder: Embedder) -> None:
    assert embedder.encode([]).shape == (0, 384)


def test_a_text_has_the_same_vector_alone_and_in_a_batch(embedder: Embedder) -> None:
    together = embedder.encode([*TEXTS, *reversed(TEXTS)])
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    assert (together[: len(TEXTS)] * alone).sum(axis=1).min() > 0.99999
    assert (together[len(TEXTS) :][::-1] * alone).sum(axis=1).min() > 0.99999


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        (
            "Ego depletion failed to replicate.",
            "The effect of exhausted self-control could not be reproduced.",
            "Short naps improve alertness in shift workers.",
        ),
        ("A man is eating food.", "Someone is having a meal.", "The violin was invented in Italy."),
        ("The drug lowered blood pressure.", "Hypertension was reduced by the medication.", "He bought a red car."),
    ],
)
def test_a_paraphrase_is_nearer_than_another_subject(embedder: Embedder, text: str, near: str, far: str) -> None:
    vectors = embedder.encode([text, near, far])
    assert vectors[0] @ vectors[1] > 0.4
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_known_sentences_have_their_known_vectors(embedder: Embedder) -> None:
    """The example of the model's own page, as sentence-transformers prints it: a wrong graph cannot pass for a right one."""
    vectors = embedder.encode(["This is an example sentence", "Each sentence is converted"])
    assert vectors[0][:4] == pytest.approx([6.7657e-02, 6.3496e-02, 4.8713e-02, 7.9305e-02], abs=1e-5)
    assert vectors[1][:4] == pytest.approx([8.6439e-02, 1.0276e-01, 5.3946e-03, 2.0444e-03], abs=1e-5)


def test_the_tail_of_a_long_text_counts(embedder: Embedder) -> None:
    body = "Naps were studied in many trials of shift workers. " * 40
    assert embedder.count(body) > 256
    vectors = embedder.encode([body, f"{body} Violins were invented in Italy and are played with a bow."])
    assert vectors[0] @ vectors[1] < 0.9999
    tail = embedder.encode(["Violins were invented in Italy and are played with a bow."])[0]
    assert vectors[1] @ tail > vectors[0] @ tail + 0.01


def test_a_long_text_is_the_mean_of_its_parts_weighted_by_length(embedder: Embedder) -> None:
    text = "Naps were studied in many trials. " * 30 + "Violins are played with a bow. " * 30
    parts = split_to_fit(text, embedder.count, embedder.limit)
    assert len(parts) > 1
    weights = np.array([embedder.count(part) for part in parts])
    mean = weights @ embedder.encode(parts)
    assert embedder.encode([text])[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


# Words as they come: plain, glued by punctuation, other scripts, and scripts that the tokenizer takes apart.
LETTERS = st.sampled_from([*"abcdefgXYZ0189", "-", ".", "/", "한", "국", "é", "漢", "🙂", "ß", "\u0301", "ﷺ"])
WORDS = st.one_of(
    st.text(LETTERS, min_size=1, max_size=12),
    st.builds(lambda unit, times: unit * times, st.text(LETTERS, min_size=1, max_size=3), st.integers(1, 300)),
)


@PROPERTY
@given(st.lists(WORDS, max_size=60), st.sampled_from([1, 2, 7, 40, 254]))
def test_splitting_keeps_every_character_and_the_limit(embedder: Embedder, words: list[str], limit: int) -> None:
    text = " ".join(words)
    pieces = split_to_fit(text, embedder.count, limit)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    for piece in pieces:
        # A single character may be three word pieces, and cannot be cut.
        assert embedder.count(piece) <= limit or len(piece) == 1


@PROPERTY
@given(st.lists(st.text("abcdefgh", min_size=1, max_size=8), max_size=400))
def test_words_that_fit_are_never_cut(embedder: Embedder, words: list[str]) -> None:
    pieces = split_to_fit(" ".join(words), embedder.count, 40)
    assert " ".join(pieces).split() == words


@pytest.mark.parametrize("word", ["한국-" * 300, "a-" * 2000, "漢" * 2000, "x" * 20_000, "\u0301" * 500, "한" * 600])
def test_one_endless_word_is_embedded_whole(embedder: Embedder, word: str) -> None:
    pieces = split_to_fit(word, embedder.count, embedder.limit)
    assert "".join(pieces) == word
    assert max(map(embedder.count, pieces)) <= embedder.limit
    vector = embedder.encode([word])[0]
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "shipped"),
    [
        (SHIPPED_MODEL, True),
        (f"sentence-transformers/{SHIPPED_MODEL}", True),
        ("all-MiniLM-L12-v2", False),
        ("./model", False),
    ],
)
def test_only_the_shipped_model_needs_no_torch(model: str, shipped: bool) -> None:
    assert embedding.is_shipped(model) is shipped


def test_both_names_of_the_shipped_model_name_the_same_vectors() -> None:
    assert embedding.load(f"sentence-transformers/{SHIPPED_MODEL}").name == SHIPPED_MODEL
