"""entailment through sentence-transformers: tiny cross-encoders made here, of random weights and trained in seconds.

No published NLI model is at hand offline, so what is tested is the way from a model's folder to verdicts: the order of the
labels, what is refused, that a trained model's verdicts come out as they should. The power of a real model is not.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import entailment
from common.problems import Problem
from ledger import Claim

THRESHOLDS = {"supports": 0.5, "contradicts": 0.9, "related": 0.3, "around": 2, "tokens": 512, "batch_size": 16}
SUBJECTS = "naps coffee music walking light reading".split()
OBJECTS = "alertness memory mood focus sleep".split()
WORDS = [*SUBJECTS, *OBJECTS, *"improve improved do did not . , in workers nurses the".split()]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
Made = Callable[..., Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Writes a BERT with a head of three classes into a folder; `labels` are their names in order."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    def made(labels: Sequence[str], *, tokens: int = 64, train: Callable[[Any, Any], None] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("nli")
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS, *(f"##{c}" for c in LETTERS)]
        tokenizer = BertTokenizerFast(vocab={word: at for at, word in enumerate(vocabulary)}, model_max_length=tokens)
        assert tokenizer.unk_token not in tokenizer.tokenize("naps do not improve mood in workers.")
        torch.manual_seed(3)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=tokens,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,  # the usual 0.02 is for wider layers: these would answer all alike
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
        network = BertForSequenceClassification(config)
        if train:
            train(network, tokenizer)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return made


ORDER = ["contradiction", "entailment", "neutral"]  # as the cross-encoders of sentence-transformers have it


@pytest.fixture(scope="session")
def random_model(make: Made) -> Path:
    return make(ORDER)


def examples() -> list[tuple[str, str, int]]:
    """(premise, claim, column of LABELS), all claims about naps: the same finding, the denied one, another subject's."""
    found = []
    for subject, thing in itertools.product(SUBJECTS, OBJECTS):
        yes, no = f"naps improve {thing}.", f"naps do not improve {thing}."
        if subject == "naps":
            found += [(yes, yes, 0), (no, no, 0), (yes, no, 1), (no, yes, 1)] * 5
        else:
            premises = (f"{subject} improve {thing}.", f"{subject} do not improve {thing}.")
            found += [(premise, claim, 2) for premise in premises for claim in (yes, no)]
    return found


@pytest.fixture(scope="session")
def trained(make: Made) -> Path:
    """A model that has learned what `not` does to a sentence of this small world."""
    import torch

    def train(network: Any, tokenizer: Any) -> None:
        torch.manual_seed(3)
        data = [(premise, claim, ORDER.index(entailment.LABELS[column])) for premise, claim, column in examples()]
        draw = random.Random(3)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
        network.train()
        for _ in range(120):
            batch = draw.sample(data, 48)
            encoded = tokenizer([p for p, _, _ in batch], [c for _, c, _ in batch], padding=True, return_tensors="pt")
            loss = network(**encoded, labels=torch.tensor([label for _, _, label in batch])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        network.eval()

    return make(ORDER, train=train)


PAIRS = [
    ("naps improve alertness.", "coffee improve mood."),
    ("the workers did not improve.", "naps do improve sleep in nurses."),
    ("coffee.", "light improve memory, focus, mood."),
]


def by_hand(folder: Path, premise: str, claim: str) -> list[float]:
    """The probabilities of a pair as transformers alone computes them, in the model's own order."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        scores = network(**AutoTokenizer.from_pretrained(folder)(premise, claim, return_tensors="pt")).logits[0]
    found: list[float] = scores.softmax(-1).tolist()
    return found


def test_the_probabilities_are_those_of_the_model(random_model: Path) -> None:
    verifier = entailment.load(str(random_model), THRESHOLDS)
    found = verifier.probabilities(PAIRS)
    assert found.shape == (3, 3)
    for row, pair in zip(found, PAIRS, strict=True):
        contradiction, entailed, neutral = by_hand(random_model, *pair)
        assert row == pytest.approx([entailed, contradiction, neutral], abs=1e-5)
    assert verifier.probabilities([]).shape == (0, 3)


@pytest.mark.parametrize(
    "labels",
    [
        ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"],
        ["Neutral", "Contradiction", "Entailment"],
        ["entailment", "contradiction", "neutral"],
    ],
)
def test_the_order_of_the_labels_is_the_models_own(make: Made, labels: list[str]) -> None:
    folder = make(labels)
    names = [label.lower() for label in labels]
    [row] = entailment.load(str(folder), THRESHOLDS).probabilities(PAIRS[:1])
    own = by_hand(folder, *PAIRS[0])
    assert row == pytest.approx([own[names.index(label)] for label in entailment.LABELS], abs=1e-5)


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1", "LABEL_2"], ["entailment", "not_entailment"], ["score"]])
def test_a_model_of_another_kind_is_refused_by_name(make: Made, labels: list[str]) -> None:
    folder = make(labels)
    with pytest.raises(Problem) as raised:
        entailment.load(str(folder), THRESHOLDS)
    assert str(raised.value).startswith(f"VERIFIER={folder} cannot be used: its labels are {labels[0]}")


def test_a_folder_is_known_by_what_lies_in_it(random_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(random_model, copy)
    one, same = (entailment.load(str(folder), THRESHOLDS).name for folder in (random_model, copy))
    assert one.split("#")[1] == same.split("#")[1]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "classifier_dropout": 0.1}))
    assert entailment.load(str(copy), THRESHOLDS).name != same


@pytest.mark.parametrize("damage", ["broken", "no tokenizer", "no config", "remote code"])
def test_a_model_that_cannot_be_loaded_is_named(random_model: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    if damage == "broken":
        (folder / "model.safetensors").write_bytes(b"broken")
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no tokenizer":
        for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
    else:
        config = json.loads((folder / "config.json").read_text())
        code = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Model"}
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(Problem, match=r"^VERIFIER=.*model cannot be used: "):
        entailment.load(str(folder), THRESHOLDS)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_not_there_is_not_fetched_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(Problem, match=r"VERIFIER=nobody/no-such-model@0{40} cannot be used"):
        entailment.load(f"nobody/no-such-model@{'0' * 40}", THRESHOLDS)


def test_a_model_in_the_hubs_cache_is_found_by_its_commit(
    random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "ab" * 20
    snapshot = tmp_path / "models--own--nli" / "snapshots" / commit
    shutil.copytree(random_model, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    verifier = entailment.load(f"own/nli@{commit}", THRESHOLDS)
    assert verifier.name == f"own/nli@{commit}"
    assert np.allclose(
        verifier.probabilities(PAIRS), entailment.load(str(random_model), THRESHOLDS).probabilities(PAIRS)
    )
    with pytest.raises(Problem, match="cannot be used"):
        entailment.load(f"own/nli@{'cd' * 20}", THRESHOLDS)


def test_the_models_own_limit_holds(random_model: Path) -> None:
    verifier = entailment.load(str(random_model), THRESHOLDS)
    assert verifier.limit == 64
    text = " ".join(["the workers in the sleep trial did not improve memory, mood, focus."] * 20)
    one = Claim("C1", "naps improve mood.", "naps improve mood.", (0, 18), "", "fact", ["S1"])
    seen: list[tuple[str, str]] = []
    probabilities = verifier.probabilities
    verifier.probabilities = lambda pairs: seen.extend(pairs) or probabilities(pairs)  # type: ignore[method-assign, func-returns-value]
    entailment.check([one], [{"id": "S1", "text": text}], verifier, THRESHOLDS)
    assert len(seen) > 1
    tokenizer: Any = verifier._model.tokenizer  # type: ignore[attr-defined]
    assert max(len(tokenizer(*pair)["input_ids"]) for pair in seen) <= 64


def test_equal_input_gives_equal_output(random_model: Path) -> None:
    pairs = [(f"{a} improve {b}.", f"{b} do not improve {a}.") for a in SUBJECTS for b in OBJECTS]
    one, other = (entailment.load(str(random_model), THRESHOLDS) for _ in range(2))
    first = one.probabilities(pairs)
    assert (first == one.probabilities(pairs)).all()
    assert (first == other.probabilities(pairs)).all()
    assert np.abs(first.sum(axis=1) - 1).max() < 1e-9
    alone = np.concatenate([one.probabilities([pair]) for pair in pairs])
    assert np.abs(first - alone).max() < 1e-5  # a batch is padded


def test_a_trained_model_finds_support_and_contradiction(trained: Path) -> None:
    verifier = entailment.load(str(trained), THRESHOLDS)
    rows = verifier.probabilities([(premise, claim) for premise, claim, _ in examples()])
    right = [int(row.argmax()) == column for row, (_, _, column) in zip(rows, examples(), strict=True)]
    assert sum(right) >= 0.97 * len(right)
    manifest = [
        {"id": "S1", "text": "Coffee improve mood. Naps improve alertness."},
        {"id": "S2", "text": "naps do not improve alertness."},
        {"id": "S3", "text": "light improve memory."},
    ]
    texts = ["naps improve alertness.", "naps do not improve alertness.", "naps improve alertness."]
    cited = [["S1"], ["S1"], ["S3"]]
    claims = [
        Claim(f"C{n}", text, text, (0, len(text)), "", "fact", ids, status="grounded")
        for n, (text, ids) in enumerate(zip(texts, cited, strict=True), 1)
    ]
    checked = entailment.check(claims, manifest, verifier, {**THRESHOLDS, "around": 0})
    found = [{source: v["stance"] for source, v in claim.checks["entailment"].items()} for claim in claims]
    assert found == [
        {"S1": "supports", "S2": "contradicts", "S3": "not_enough"},
        {"S1": "contradicts", "S2": "supports", "S3": "not_enough"},
        {"S1": "supports", "S2": "contradicts", "S3": "not_enough"},
    ]
    assert [claim.status for claim in claims] == ["grounded", "contradicted", "grounded"]
    assert [(flag.kind, flag.claim, flag.source) for flag in checked.flags] == [
        ("disputed", "C1", "S2"),
        ("contradicted", "C2", "S1"),
        ("not_entailed", "C3", "S3"),
        ("disputed", "C3", "S2"),
    ]
