"""Level 2 of the hallucination check (optional): does a source entail a sentence, contradict it, or not say enough?

A cross-encoder that was trained on natural language inference (VERIFIER=owner/name@commit or a folder) reads each claim
against all retrieved sources, not only those that it cites: so it is found, too, who else supports it and who speaks
against it.

What this level can see: a source that says the opposite, a sentence that goes beyond its source, support that was not
cited. What it cannot see: whether a number was changed a little (level 1 compares those), arithmetic, what follows only
from several places of a source more than a few sentences apart, and anything outside the retrieved chunks. It is a small
model that errs; how often, depends on the model and was measured for none (docs/checks-power.md has level 1).

Needs the client-full image; torch is imported when a model is loaded. Equal input, model and machine give equal output.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import strict
from common.problems import Problem
from common.text import clean, listed, sentences, stems
from embedding import split_to_fit
from ledger import Claim, Flag
from progress import on_terminal

SPECS: dict[str, strict.Spec] = {
    "supports": (float, 0, 1),
    "contradicts": (float, 0, 1),
    "related": (float, 0, 1),
    "around": (int, 0, 10),
    "tokens": (int, 64, 8192),
    "batch_size": (int, 1, 256),
}
# The columns of a verifier's probabilities, and how models name them.
LABELS = ("entailment", "contradiction", "neutral")
_BEGINNINGS = ("entail", "contra", "neutral")
_MARKERS = 4  # tokens that a model puts around and between premise and claim
_LEAST_ROOM = 24  # tokens for a premise: with less, a claim is too long to be checked
_DIGITS = 4  # probabilities are rounded before they are compared: the last bits differ between machines


class Verifier(Protocol):
    """A loaded model that tells entailment from contradiction."""

    name: str  # what identifies its answers: id@commit, or the folder and a hash of what lies in it
    limit: int  # tokens that it reads, premise and claim together

    def count(self, text: str) -> int:
        """How many tokens a text has."""

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        """(n, 3): for each premise and claim the probabilities of LABELS."""


def thresholds() -> dict[str, Any]:
    """The block `entailment` of config/checks.yaml. Raises Problem."""
    return strict.block("checks.yaml", "entailment", SPECS)


# --- the check --------------------------------------------------------------------------------------------------------


@dataclass
class Checked:
    """What the check found beside what it wrote into the claims."""

    flags: list[Flag] = field(default_factory=list)
    pairs: int = 0  # premises that were read
    skipped: list[str] = field(default_factory=list)  # claims that are too long for the model


def check(
    claims: Sequence[Claim], manifest: Sequence[Mapping[str, Any]], verifier: Verifier, thresholds: Mapping[str, Any]
) -> Checked:
    """Fill `checks["entailment"]` of each claim but the meta ones, and `status` where a cited source contradicts it.

    `checks["entailment"]` has for each source of the manifest: stance (supports, contradicts or not_enough), entailment
    and contradiction, the highest probabilities over its windows, and the window that decided, with the probabilities
    there. A source without a window near the claim was not read: its probabilities are null. Where a claim cites several
    sources and none supports it alone, they were read together: `checks["entailment_together"]`. The status that was
    there before `contradicted` is kept in `checks["overruled"]`.
    """
    reading = _Reading(manifest, verifier, thresholds)
    checked = Checked()
    to_check = []
    for claim in claims:
        if claim.kind == "meta":
            continue
        if reading.room(claim) < _LEAST_ROOM:
            checked.skipped.append(claim.id)
            detail = f"the sentence is too long for {verifier.name}; it was not checked"
            checked.flags.append(Flag("entailment", "unchecked", clean(detail), claim.id))
        else:
            to_check.append(claim)
    reading.read([(claim, (source,), windows) for claim in to_check for source, windows in reading.near(claim)])
    for claim in to_check:
        claim.checks["entailment"] = {source: reading.verdict(claim, source) for source in reading.texts}
    alone = [c for c in to_check if len(cited := reading.cited(c)) > 1 and not _that(c, cited, "supports")]
    reading.read([(claim, ids, reading.joint(claim, ids)) for claim in alone if (ids := tuple(reading.cited(claim)))])
    for claim in alone:
        ids = tuple(reading.cited(claim))
        best = reading.best(claim, ids)[0]
        claim.checks["entailment_together"] = {
            "sources": list(ids),
            "entailment": best,
            "supports": best is not None and best >= float(thresholds["supports"]),
        }
    for claim in to_check:
        checked.flags += _flags(claim, reading.cited(claim))
    checked.pairs = reading.pairs
    return checked


def entails(
    manifest: Sequence[Mapping[str, Any]], verifier: Verifier, thresholds: Mapping[str, Any]
) -> _Entails:  # for alce.measure
    """A function (claim, ids of sources) -> does what these sources say together support the claim?"""
    return _Entails(_Reading(manifest, verifier, thresholds))


class _Entails:
    def __init__(self, reading: _Reading) -> None:
        self._reading = reading

    def __call__(self, claim: Claim, ids: Sequence[str]) -> bool:
        """Does one of the sources, or do they together, entail the claim?"""
        reading = self._reading
        if reading.room(claim) < _LEAST_ROOM:
            return False
        found = claim.checks.get("entailment", {})
        if any(source in found and found[source]["stance"] == "supports" for source in ids):
            return True
        reading.read([(claim, (i,), reading.windows(claim, i)) for i in ids if i not in found])
        if any(reading.verdict(claim, i)["stance"] == "supports" for i in ids if i not in found):
            return True
        together = claim.checks.get("entailment_together")
        if together and together["sources"] == list(ids):
            return bool(together["supports"])
        if len(ids) < 2:
            return False
        reading.read([(claim, tuple(ids), reading.joint(claim, tuple(ids)))])
        best = reading.best(claim, tuple(ids))[0]
        return best is not None and best >= float(reading.thresholds["supports"])


def stances(claims: Sequence[Claim]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each checked claim and each source its stance, as evidence.assess takes it. From the ledger alone."""
    words = {"supports": ("supports", "entailment"), "contradicts": ("contradicts", "contradiction")}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for claim in claims:
        if "entailment" not in claim.checks:
            continue
        found[claim.id] = {}
        for source, verdict in claim.checks["entailment"].items():
            stance, key = words.get(verdict["stance"], ("unclear", "entailment"))
            found[claim.id][source] = {"stance": stance, "level": 2, "score": verdict[key] or 0.0}
    return found


def contradictions(claims: Sequence[Claim]) -> dict[str, Any]:
    """The contradiction map: for each contradicted claim who supports and who contradicts it, and which sources are
    thereby at odds. From the ledger alone."""
    by_claim = []
    at_odds: dict[tuple[str, str], list[str]] = {}
    for claim in claims:
        sources = list(claim.checks.get("entailment", {}))
        against = _that(claim, sources, "contradicts")
        if not against:
            continue
        supporting = _that(claim, sources, "supports")
        by_claim.append({"claim": claim.id, "cited": list(claim.cited), "supports": supporting, "contradicts": against})
        for one in supporting:
            for other in against:
                pair = (one, other) if sources.index(one) < sources.index(other) else (other, one)
                at_odds.setdefault(pair, []).append(claim.id)
    return {
        "claims": by_claim,
        "sources": [{"sources": list(pair), "claims": ids} for pair, ids in at_odds.items()],
    }


def _that(claim: Claim, sources: Sequence[str], stance: str) -> list[str]:
    found = claim.checks.get("entailment", {})
    return [source for source in sources if source in found and found[source]["stance"] == stance]


def _flags(claim: Claim, cited: list[str]) -> Iterator[Flag]:
    found = claim.checks["entailment"]
    supporting, against = _that(claim, cited, "supports"), _that(claim, cited, "contradicts")
    others = [source for source in _that(claim, list(found), "contradicts") if source not in cited]
    elsewhere = [source for source in _that(claim, list(found), "supports") if source not in cited]
    for source in against:
        beside = f", and {listed(supporting)} support{'s' if len(supporting) == 1 else ''} it" if supporting else ""
        yield _flag(
            "contradicted", f"{source} is cited and contradicts this{_sure(found[source])}{beside}", claim, source
        )
    if against:
        claim.checks["overruled"] = claim.status
        claim.status = "contradicted"
    elif cited and not supporting and not claim.checks.get("entailment_together", {}).get("supports"):
        hint = (
            f"; {listed(elsewhere[:3])}, not cited, support{'s' if len(elsewhere) == 1 else ''} it" if elsewhere else ""
        )
        does = "does not" if len(cited) == 1 else "do not"
        yield _flag("not_entailed", f"{listed(cited)} {does} say this{hint}", claim, cited[0])
    for source in others:
        yield _flag("disputed", f"{source} is not cited and contradicts this{_sure(found[source])}", claim, source)


def _flag(kind: str, detail: str, claim: Claim, source: str) -> Flag:
    return Flag("entailment", kind, detail, claim.id, source)


def _sure(verdict: Mapping[str, Any]) -> str:
    return f" (p = {verdict['contradiction']:.2f})"


# --- reading ----------------------------------------------------------------------------------------------------------

# What is to be read: a claim, the sources of the premises, the premises.
_Task = tuple[Claim, tuple[str, ...], list[str]]


class _Reading:
    """The premises of claims, and what the verifier says of them. Each pair is read once."""

    def __init__(
        self, manifest: Sequence[Mapping[str, Any]], verifier: Verifier, thresholds: Mapping[str, Any]
    ) -> None:
        self.verifier, self.thresholds = verifier, thresholds
        self.texts: dict[str, str] = {entry["id"]: clean(entry["text"]) for entry in manifest}
        self.pairs = 0
        self._sentences = {source: sentences(text) or [text] for source, text in self.texts.items()}
        self._stems = {source: [frozenset(stems(s)) for s in found] for source, found in self._sentences.items()}
        self._sizes: dict[str, int] = {}
        self._known: dict[tuple[str, str], tuple[float, ...]] = {}
        self._premises: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        self._limit = min(verifier.limit, int(thresholds["tokens"]))

    def cited(self, claim: Claim) -> list[str]:
        return [source for source in claim.cited if source in self.texts]

    def room(self, claim: Claim) -> int:
        """Tokens that are left for a premise beside the claim."""
        return self._limit - _MARKERS - self._size(claim.bare)

    def near(self, claim: Claim) -> Iterator[tuple[str, list[str]]]:
        """The windows to be read for a claim, by source: all of those that it cites, of the others what is related."""
        words = frozenset(stems(claim.bare))
        for source in self.texts:
            windows = self.windows(claim, source)
            if source not in claim.cited:
                windows = [w for w in windows if _share(words, w) >= float(self.thresholds["related"])]
            if windows:
                yield source, windows

    def windows(self, claim: Claim, source: str) -> list[str]:
        """Each sentence of a source with `around` sentences before and after it, as far as there is room for them."""
        found, room, around = self._sentences[source], self.room(claim), int(self.thresholds["around"])
        spans: list[tuple[int, int]] = []
        pieces: list[str] = []
        for middle in range(len(found)):
            first, last = max(0, middle - around), min(len(found), middle + around + 1)
            while last - first > 1 and sum(map(self._size, found[first:last])) > room:
                # The farther end goes, of two ends as far the later one.
                first, last = (first + 1, last) if middle - first > last - 1 - middle else (first, last - 1)
            if last - first == 1 and self._size(found[middle]) > room:
                pieces += split_to_fit(found[middle], self.verifier.count, room)
            elif not (spans and spans[-1][0] <= first and last <= spans[-1][1]):
                # At the beginning windows grow to the right, each with all of the one before.
                if spans and first <= spans[-1][0] and spans[-1][1] <= last:
                    spans.pop()
                spans.append((first, last))
        return [*(" ".join(found[first:last]) for first, last in spans), *pieces]

    def joint(self, claim: Claim, ids: tuple[str, ...]) -> list[str]:
        """Several sources as one premise: their whole texts where there is room for them, else of each the window that
        says most for the claim, and of that as much as an equal share of the room holds."""
        room = self.room(claim)
        whole = "\n".join(self.texts[i] for i in ids)
        if self._size(whole) <= room:
            return [whole]
        share = max(1, room // len(ids) - 1)
        best = [self.best(claim, (i,))[2] or self.texts[i] for i in ids]
        return ["\n".join(split_to_fit(text, self.verifier.count, share)[0] for text in best)]

    def read(self, tasks: Sequence[_Task]) -> None:
        """Ask the verifier about all pairs that are not known yet, at once."""
        pairs: dict[tuple[str, str], None] = {}
        for claim, ids, premises in tasks:
            self._premises[claim.id, ids] = premises
            pairs |= {(premise, claim.bare): None for premise in premises if (premise, claim.bare) not in self._known}
        if pairs:
            rows = np.round(self.verifier.probabilities(list(pairs)), _DIGITS).tolist()
            self._known |= {pair: tuple(row) for pair, row in zip(pairs, rows, strict=True)}
            self.pairs += len(pairs)

    def best(self, claim: Claim, ids: tuple[str, ...]) -> tuple[float | None, float | None, str | None, str | None]:
        """The highest entailment and contradiction over the premises that were read, and where; the first of equals."""
        premises = self._premises.get((claim.id, ids), [])
        if not premises:
            return None, None, None, None
        rows = [self._known[premise, claim.bare] for premise in premises]
        one, other = (max(range(len(rows)), key=lambda at: (rows[at][column], -at)) for column in (0, 1))
        return rows[one][0], rows[other][1], premises[one], premises[other]

    def verdict(self, claim: Claim, source: str) -> dict[str, Any]:
        entailment, contradiction, for_it, against_it = self.best(claim, (source,))
        if entailment is None or contradiction is None:
            return {"stance": "not_enough", "entailment": None, "contradiction": None, "window": None, "there": None}
        stance, window = "not_enough", for_it
        if entailment >= float(self.thresholds["supports"]) and entailment >= contradiction:
            stance = "supports"
        elif contradiction >= float(self.thresholds["contradicts"]) and contradiction > entailment:
            stance, window = "contradicts", against_it
        assert window is not None
        there = dict(zip(LABELS, self._known[window, claim.bare], strict=True))
        return {
            "stance": stance,
            "entailment": entailment,
            "contradiction": contradiction,
            "window": window,
            "there": there,
        }

    def _size(self, text: str) -> int:
        if text not in self._sizes:
            self._sizes[text] = self.verifier.count(text)
        return self._sizes[text]


def _share(words: frozenset[str], window: str) -> float:
    """The share of a claim's content words that a window has; 1 for a claim without any."""
    return len(words & frozenset(stems(window))) / len(words) if words else 1.0


# --- the model --------------------------------------------------------------------------------------------------------


def load(verifier: str, thresholds: Mapping[str, Any]) -> Verifier:
    """The model that VERIFIER names. Raises Problem where it cannot be used."""
    return _CrossEncoder(verifier, int(thresholds["batch_size"]))


def columns(labels: Mapping[int, str]) -> list[int]:
    """Where a model's output has each of LABELS. Raises ValueError for a model that does not tell these three apart."""
    plain = {number: re.sub("[^a-z]", "", str(label).lower()) for number, label in labels.items()}
    found = [[number for number, label in plain.items() if label.startswith(word)] for word in _BEGINNINGS]
    if len(plain) != len(LABELS) or any(len(numbers) != 1 for numbers in found):
        said = ", ".join(str(label) for _, label in sorted(labels.items()))
        raise ValueError(f"its labels are {said:.200}, and it should tell entailment, contradiction and neutral apart")
    return [numbers[0] for numbers in found]


class _CrossEncoder:
    """A cross-encoder through sentence-transformers, on the CPU."""

    def __init__(self, verifier: str, batch_size: int) -> None:
        folder = Path(verifier).is_dir()
        model, _, commit = (verifier, "", "") if folder else verifier.partition("@")
        if not folder and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            raise Problem(f"VERIFIER={verifier!r:.200} is neither a folder nor a model's id")
        if not folder and not re.fullmatch("[0-9a-f]{40}", commit):
            raise Problem(
                f"VERIFIER={verifier:.200} must name a commit, so that a result can be computed again:"
                f" VERIFIER={model}@ and the 40 digits of the commit, from the model's page"
            )
        if folder and not list(Path(verifier).glob("*.safetensors")):
            raise Problem(
                f"VERIFIER={verifier} has no *.safetensors file; other weights can run code and are not loaded"
            )
        try:
            import torch
            from huggingface_hub import constants
            from sentence_transformers import CrossEncoder
            from transformers.utils import logging
        except ImportError as error:
            raise Problem(f"VERIFIER={verifier} needs the client-full image") from error
        if not on_terminal():
            logging.disable_progress_bar()
        try:
            self._model: Any = CrossEncoder(
                model,
                device="cpu",
                revision=commit or None,
                trust_remote_code=False,
                local_files_only=folder or bool(constants.HF_HUB_OFFLINE),
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
            self._model.eval()
            self._columns = columns(self._model.config.id2label)
            has, needs = len(self._model.tokenizer), self._model.config.vocab_size
            if has < needs / 2:  # a folder without one gets an empty one, to which every text is the same
                raise ValueError(f"its tokenizer knows {has} tokens and the model {needs}; is a file missing?")
        except Exception as error:  # the hub client raises many kinds; to the user they are one
            reason = " ".join(clean(str(error)).split())[:300]
            raise Problem(f"VERIFIER={verifier} cannot be used: {reason}") from error
        self._identity, self._batch_size = torch.nn.Identity(), batch_size
        self.name = f"{verifier}#{_digest(Path(verifier))}" if folder else verifier
        self.limit = _limit(self._model)

    def count(self, text: str) -> int:
        return len(self._model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        if not pairs:
            return np.zeros((0, len(LABELS)))
        # Pairs of like length go together, so that little is padded; equal input makes equal batches.
        scores = self._model.predict(
            [list(pair) for pair in pairs],
            batch_size=self._batch_size,
            activation_fn=self._identity,
            apply_softmax=False,
            show_progress_bar=False,
        )
        scores = np.asarray(scores, dtype=np.float64)[:, self._columns]
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        found: NDArray[np.float64] = odds / odds.sum(axis=1, keepdims=True)
        return found


def _limit(model: Any) -> int:
    """The most tokens that a model reads. Tokenizers that know no limit say 10^30."""
    said = [model.max_seq_length, model.tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 0)]
    return min((int(n) for n in said if n and math.isfinite(n) and 0 < n < 10**6), default=512)


def _digest(folder: Path) -> str:
    """A hash of the weights, configuration and tokenizer in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt", ".model") and path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{os.fstat(file.fileno()).st_size}\0".encode())
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:16]
