"""Texts to vectors. all-MiniLM-L6-v2 runs on onnxruntime alone; any other model through sentence-transformers.

Importing torch and sentence-transformers costs seconds and hundreds of megabytes in every run; onnxruntime and
tokenizers, which Chroma brings anyway, do the same arithmetic on the same weights (bench/startup.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.problems import Problem
from progress import on_terminal
from settings import SHIPPED_MODEL

Vectors = NDArray[np.float32]
# CPUs are fastest with small batches of texts of like length.
BATCH = 16


class Embedder(Protocol):
    """A loaded embedding model."""

    name: str  # identifies the vectors: two models' vectors are never compared
    limit: int  # word pieces that the model reads, its own two markers left out

    def count(self, text: str) -> int:
        """How many word pieces a text has."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, dimensions) float32, each row of length 1. Texts of any length: nothing is cut off."""


def load(model: str) -> Embedder:
    """The embedder of a model id or folder; retrieval and the checks of one question share it. Raises Problem where it
    cannot be loaded."""
    return _load(model, Path(os.environ.get("EMBEDDING_MODEL_DIR") or "/opt/model"))


@functools.lru_cache(maxsize=1)
def _load(model: str, shipped: Path) -> Embedder:
    return MiniLM(shipped) if is_shipped(model) else SentenceTransformersModel(model)


def is_shipped(model: str) -> bool:
    """Is this the model whose weights are part of the client?"""
    return model.removeprefix("sentence-transformers/") == SHIPPED_MODEL


def split_to_fit(text: str, count: Callable[[str], int], limit: int) -> list[str]:
    """Cut a text between words into pieces of at most `limit` word pieces; a single longer word is cut by length.

    Joined again, the pieces hold every word of the text.
    """
    pieces: list[str] = []
    line: list[str] = []
    size = 0
    for word in _words(text, count, limit):
        cost = count(word)
        if line and size + cost > limit:
            pieces.append(" ".join(line))
            line, size = [], 0
        line.append(word)
        size += cost
    if line:
        pieces.append(" ".join(line))
    return pieces


def _words(text: str, count: Callable[[str], int], limit: int) -> Iterator[str]:
    for word in text.split():
        while count(word) > limit and len(word) > 1:
            # A character is one word piece as a rule, and three where a tokenizer takes Hangul apart.
            cut = min(limit, len(word) - 1)
            while cut > 1 and count(word[:cut]) > limit:
                cut //= 2
            yield word[:cut]
            word = word[cut:]
        if word:
            yield word


def _encode_whole(
    texts: Sequence[str], count: Callable[[str], int], limit: int, encode_short: Callable[[list[str]], Vectors]
) -> Vectors:
    """Encode texts of any length: one that is too long becomes the mean of its parts, weighted by their length."""
    parts: list[str] = []
    owners: list[int] = []
    for owner, text in enumerate(texts):
        pieces = [text] if count(text) <= limit else split_to_fit(text, count, limit)
        parts.extend(pieces)
        owners.extend([owner] * len(pieces))
    vectors = encode_short(parts)
    if len(parts) == len(texts):
        return vectors
    # Some text is no word piece at all, and has a vector nevertheless.
    weights = np.array([max(count(part), 1) for part in parts], dtype=np.float32)
    whole = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
    np.add.at(whole, np.array(owners), vectors * weights[:, None])
    normalised: Vectors = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    return normalised


class MiniLM:
    """all-MiniLM-L6-v2 on onnxruntime, from the folder that build_model.py wrote."""

    limit = 254

    def __init__(self, folder: Path) -> None:
        # onnxruntime 1.32 reports its use to its makers unless this is set before it is imported.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime
        from tokenizers import Tokenizer

        if not all((folder / name).is_file() for name in ("model.onnx", "model.safetensors", "tokenizer.json")):
            raise Problem(f"the embedding model is not in {folder}; run: make build")
        self.name = SHIPPED_MODEL
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.enable_padding()  # to the longest of a batch
        options = onnxruntime.SessionOptions()
        # Threads that spin while they wait slow everything else on a small machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, texts: Sequence[str]) -> Vectors:
        return _encode_whole(texts, self.count, self.limit, self._encode_short)

    def _encode_short(self, texts: list[str]) -> Vectors:
        vectors = np.empty((len(texts), 384), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            encoded = self.tokenizer.encode_batch([texts[i] for i in batch])
            vectors[batch] = self.session.run(
                None,
                {
                    "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
                    "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
                },
            )[0]
        return vectors


class SentenceTransformersModel:
    """Any other embedding model, by its hub id or folder. Needs the client-full image."""

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging
        except ImportError as error:
            raise Problem(
                f"embedding_model: {model} needs the client-full image; make synth and make ingest select it by themselves"
            ) from error
        if not on_terminal():
            logging.disable_progress_bar()
        try:
            self.model: Any = SentenceTransformer(model, device="cpu", trust_remote_code=False)
        except Exception as error:  # the hub client raises many kinds; to the user they are one
            reason = " ".join(str(error).split())[:300]
            raise Problem(f"embedding_model: {model} cannot be loaded: {reason}") from error
        commit = getattr(self.model[0].auto_model.config, "_commit_hash", None)
        self.name = f"{model}@{commit}" if commit else model
        self.limit = (self.model.max_seq_length or 512) - self.model.tokenizer.num_special_tokens_to_add()

    def count(self, text: str) -> int:
        return len(self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode(self, texts: Sequence[str]) -> Vectors:
        return _encode_whole(texts, self.count, self.limit, self._encode_short)

    def _encode_short(self, texts: list[str]) -> Vectors:
        encoded = self.model.encode(texts, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(encoded, dtype=np.float32)
