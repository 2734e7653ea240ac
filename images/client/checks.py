"""All checks of one synthesis, in their order, and what came of them. Equal input gives equal output.

level 0  citation_check   the form: is there a citation, does it exist, do author and year fit the records?
level 1  grounding        words, meaning, numbers and quotations of each sentence against its sources
level 2  entailment       optional (VERIFIER=): what the sources say of each sentence, for and against
level 3  judge            optional (JUDGE=1): the model's own opinion, which overrides nothing
then     evidence         how sure each claim is, by what its sources are
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import alce
import citation_check
import entailment
import evidence
import grounding
import judge
from common.problems import FLAGGED, OK, UNCHECKED
from embedding import Embedder
from ledger import Claim, Flag
from settings import Settings
from split import split

POWER = "docs/checks-power.md"
# What a reader may want to know, and what makes no result a flagged one.
NOTES = citation_check.NOTES
# What each level is, and what it cannot see, whatever it finds.
LEVELS = {
    0: ("citations", "whether a source says what it is cited for"),
    1: (
        "grounding",
        "negation, reversed direction, cause for correlation, a dropped qualifier, a swap for a near source",
    ),
    2: ("entailment", "small changes of numbers, what follows only from distant places of a source, its own errors"),
    3: ("judge", "its own errors: it is an opinion of the kind of model that wrote the text"),
}
UNREVIEWED = "Not reviewed by a person. Read the cited sources before you rely on this text."


# Level 3, ready to be asked: fills `checks["judge"]` of the claims, given them and the manifest.
Judge = Callable[[Sequence[Claim], Sequence[Mapping[str, Any]]], judge.Judged]


@dataclass
class Result:
    """What was found. `levels` says of each level whether it ran, and what it cannot see."""

    claims: list[Claim]
    flags: list[Flag]
    levels: list[dict[str, Any]]
    metrics: dict[str, Any]
    thresholds: dict[str, Any]
    overall: evidence.Overall | None = None
    contradictions: dict[str, Any] | None = None
    agreement: dict[str, dict[str, Any]] | None = None
    review: dict[str, Any] = field(default_factory=dict)

    @property
    def real(self) -> list[Flag]:
        """The flags that are more than notes, and no mere sign that something was left unchecked."""
        return [flag for flag in self.flags if flag.kind not in NOTES and flag.kind != "unchecked"]

    @property
    def unchecked(self) -> list[Flag]:
        """What should have been checked and could not be."""
        return [flag for flag in self.flags if flag.kind == "unchecked"]

    @property
    def code(self) -> int:
        """The exit code: 3 flagged, 4 unchecked, 0 clean."""
        return FLAGGED if self.real else UNCHECKED if self.unchecked else OK

    def summary(self) -> dict[str, Any]:
        """The figures of the table, by name."""
        facts = [claim for claim in self.claims if claim.kind != "meta"]
        flagged = {flag.claim for flag in self.real if flag.claim}
        return {
            "claims": len(self.claims),
            "facts": len(facts),
            "cited": sum(bool(claim.cited) for claim in facts),
            "grounded": sum(claim.status == "grounded" for claim in facts),
            "flagged": len(flagged),
            "flags": dict(Counter(flag.kind for flag in self.real)),
            "unchecked": len(self.unchecked),
            "confidence": self.overall.label if self.overall else "off",
        }

    def as_json(self) -> dict[str, Any]:
        """For claims.json."""
        return {
            "format": 2,
            "summary": self.summary(),
            "levels": self.levels,
            "power": POWER,
            "metrics": self.metrics,
            "review": self.review,
            "confidence": self.overall.as_json() if self.overall else None,
            "contradictions": self.contradictions,
            "agreement": self.agreement,
            "thresholds": self.thresholds,
            "flags": [asdict(flag) for flag in self.flags],
            "claims": [asdict(claim) for claim in self.claims],
        }


def run(
    text: str,
    question: str,
    manifest: Sequence[Mapping[str, Any]],
    configuration: Settings,
    embedder: Embedder,
    limits: Limits,
    *,
    verifier: entailment.Verifier | None = None,
    ask_judge: Judge | None = None,
    samples: Sequence[str] = (),
    samples_asked: int = 0,
) -> Result:
    """Check a synthesis against its manifest. `samples`: other answers to the same question, of `samples_asked` that were
    asked for. Raises Problem."""
    known = [str(entry["id"]) for entry in manifest]
    claims = split(text, known)
    result = Result(claims, [], [], {}, {}, review=_review(configuration))
    if configuration.citation_check_enabled:
        result.flags += citation_check.check(text, claims, manifest)
    if not text.strip() and not configuration.citation_check_enabled:  # which says no_claims
        result.flags.append(Flag("citation", "empty", "the synthesis is empty"))
    _note(result, 0, configuration.citation_check_enabled, "citation_check_enabled is false")
    stances = _hallucination(result, manifest, configuration, embedder, limits, verifier, ask_judge)
    weights = limits.evidence
    overall = evidence.assess(claims, manifest, stances, weights, _similarity(question, claims, embedder))
    # A retracted source is told whether or not anybody wants to know how sure a claim is.
    result.flags += overall.flags
    if configuration.uncertainty_quantification:
        result.overall = overall
        if samples:
            others = [split(sample, known) for sample in samples]
            result.agreement = evidence.agreement(claims, others, embedder, weights["agreement"]["similarity"])
        if len(samples) < samples_asked:
            detail = f"{len(samples)} of {samples_asked} further answers came back"
            result.flags.append(Flag("evidence", "unchecked", detail))
    else:
        for claim in claims:
            claim.confidence = None
    order = {claim.id: number for number, claim in enumerate(claims)}
    result.flags.sort(key=lambda flag: order.get(flag.claim or "", len(order)))
    return result


@dataclass(frozen=True)
class Limits:
    """Every threshold and weight, by the check that uses it."""

    grounding: dict[str, Any]
    entailment: dict[str, Any]
    judge: dict[str, Any]
    evidence: evidence.Weights

    @classmethod
    def read(cls) -> Limits:
        """From config/checks.yaml and config/evidence.yaml. Raises Problem."""
        return cls(grounding.thresholds(), entailment.thresholds(), judge.thresholds(), evidence.load())


def prepare(configuration: Settings) -> tuple[Limits, entailment.Verifier | None, judge.Prompt | None]:
    """Read every threshold, load the verifier of VERIFIER, and read the judge's prompt where one is to be asked: before a
    job is sent, so that none is paid for and then cannot be checked. Raises Problem."""
    limits = Limits.read()
    asked = judge.wanted(limits.judge)
    if not configuration.hallucination_check_enabled:
        return limits, None, None
    name = os.environ.get("VERIFIER", "")
    verifier = entailment.load(name, limits.entailment) if name else None
    return limits, verifier, judge.Prompt.read() if asked else None


def _hallucination(
    result: Result,
    manifest: Sequence[Mapping[str, Any]],
    configuration: Settings,
    embedder: Embedder,
    limits: Limits,
    verifier: entailment.Verifier | None,
    ask_judge: Judge | None,
) -> evidence.Stances:
    """Levels 1 to 3; returns what the sources say of each claim, as far as it is known."""
    claims, on = result.claims, configuration.hallucination_check_enabled
    off = "hallucination_check_enabled is false"
    _note(result, 1, on, off)
    _note(result, 2, on and verifier is not None, off if not on else "VERIFIER is not set")
    _note(result, 3, on and ask_judge is not None, off if not on else "JUDGE is not set")
    if not on:
        for claim in claims:
            claim.status = "not_a_claim" if claim.kind == "meta" else "off"
        return {}
    result.thresholds["grounding"] = limits.grounding
    result.flags += grounding.check(claims, manifest, embedder, limits.grounding)
    facts = alce.without_meta(claims)
    stances = _level_1(claims)
    if verifier:
        result.thresholds["entailment"] = limits.entailment
        result.flags += entailment.check(claims, manifest, verifier, limits.entailment).flags
        result.levels[2]["model"] = verifier.name
        result.contradictions = entailment.contradictions(claims)
        # As in its paper: every sentence counts.
        result.metrics |= alce.measure(claims, entailment.entails(manifest, verifier, limits.entailment)).named()
        stances = {**stances, **entailment.stances(claims)}
    result.metrics |= alce.measure(facts, alce.grounds).named("lexical_")
    if ask_judge:
        result.thresholds["judge"] = limits.judge
        judged = ask_judge(claims, manifest)
        result.flags += judged.flags
        result.levels[3] |= {"model": judged.model, "judged": judged.judged, "unchecked": judged.unchecked}
    return stances


def _level_1(claims: Sequence[Claim]) -> dict[str, dict[str, dict[str, Any]]]:
    """What level 1 can say of sources: a cited one in which the claim is grounded supports it; it sees no contradiction."""
    return {
        claim.id: {
            source: {
                "stance": "supports" if found["status"] == "grounded" else "unclear",
                "level": 1,
                "score": found["score"],
            }
            for source, found in claim.checks["grounding"].items()
        }
        for claim in claims
        if "grounding" in claim.checks
    }


def _similarity(question: str, claims: Sequence[Claim], embedder: Embedder) -> dict[str, float]:
    """How near each claim is to the question."""
    if not claims:
        return {}
    vectors = embedder.encode([question, *(claim.bare for claim in claims)])
    return {claim.id: round(float(vectors[0] @ vectors[row]), 4) for row, claim in enumerate(claims, 1)}


def _note(result: Result, level: int, ran: bool, why_not: str) -> None:
    name, blind = LEVELS[level]
    state = "ran" if ran else "off"
    result.levels.append(
        {"level": level, "name": name, "state": state, "why": "" if ran else why_not, "cannot_see": blind}
    )


def _review(configuration: Settings) -> dict[str, Any]:
    """Whether a person has read it: never here. What is missing is said, so that no export can be taken for reviewed."""
    if not configuration.human_review_required:
        return {"required": False, "reviewed": False}
    return {"required": True, "reviewed": False, "missing": "a decision of a person on each claim"}
