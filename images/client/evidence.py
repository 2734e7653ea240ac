"""How sure a claim is, from the evidence that was retrieved for it: a printed rule over counted sources, no opinion of a model.

What it sees: which sources were found to support or contradict a claim, and their metadata (design, replication, integrity,
authors, identifiers). What it cannot see: whether a study was done well, whether it asks the same question of the same
people, what was never published, and what the domain does not hold. It is only as good as the stances it is given: at level
1 a cited source that resembles the claim counts as support, and nothing can contradict.

docs/evidence.md has the rule and its reasons, config/evidence.yaml every number. Pure functions, no clock, no chance.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import beta
import strict
from common.problems import Problem
from common.text import listed
from embedding import Embedder
from independence import SAME_WORK, Choice, Work, heaviest, is_preprint, natural, relation, work
from ledger import Claim, Flag
from records import INTEGRITY_STATUSES, REPLICATION_STATUSES, SOURCE_TYPES

Weights = dict[str, dict[str, Any]]
Stances = Mapping[str, Mapping[str, Mapping[str, Any]]]

FILE = "evidence.yaml"
_BLOCKS: dict[str, dict[str, strict.Spec]] = {
    "quality": dict.fromkeys(SOURCE_TYPES, (float, 0, 1)),
    "factors": dict.fromkeys(("preprint", "abstract_only", "expression_of_concern"), (float, 0, 1)),
    # The ranges keep a success above 1 and a failure below 1.
    "replication": {
        "power": (float, 0.5, 0.99),
        "alpha": (float, 0.001, 0.2),
        "prior_odds": (float, 0.01, 100),
        "bound": (float, 1, 10_000),
    },
    "independence": {"author_overlap": (float, 0.01, 1), "title_similarity": (float, 0.01, 1)},
    "labels": {
        "interval": (float, 0.5, 0.99),
        "enough": (float, 0.01, 10),
        "contested_weight": (float, 0.01, 10),
        "contested_share": (float, 0.01, 0.99),
        "lower_bound": (float, 0.5, 0.99),
        "n_eff": (float, 1, 3),
    },
    "key_claims": {"most": (int, 1, 20)},
    "grade": {"imprecision_width": (float, 0.05, 1), "inconsistency_i2": (float, 1, 100)},
    "agreement": {"similarity": (float, 0, 1)},
}

# From the worst to the best. `unchecked`: nobody looked at what its sources say.
LABELS = ("unchecked", "insufficient", "contested", "limited", "well_supported")
STANCES = ("supports", "contradicts", "unclear")
SYNTHESES = ("systematic_review", "meta_analysis")

_OBSERVATIONAL = {
    "quasi_experimental", "cohort", "case_control", "cross_sectional", "case_series", "registry", "statistics",
}  # fmt: skip
_LEVELS = ("very_low", "low", "moderate", "high")
NOT_GRADED = (
    "risk of bias",
    "indirectness",
    "publication bias",
    "large effect",
    "dose-response",
    "opposing confounding",
)

_SAYS_FAILED = re.compile(
    r"\bfail\w*\b[^.;]{0,60}\b(?:replic|reproduc)|\b(?:replic|reproduc)\w*[^.;]{0,60}\b(?:fail|unsuccessful|null\b|no effect\b|found no"
    r"|did not (?:confirm|find|observe|show|support))"
    r"|(?:\b(?:not|never|cannot|nor|neither|no|without)\b|n['’]t\b)[^.;]{0,40}\b(?:replic|reproduc)"
    r"|\b(?:non-?replic|irreproduc|unreplic|unreproduc)|\b(?:did|does|do|has|have) not h(?:o|e)ld up\b",
    re.I,
)
_SAYS_RETRACTED = re.compile(r"\bretract(?:ed|ion|s|ing)?\b", re.I)
_SAYS_NOT_RETRACTED = re.compile(r"(?:\b(?:never|not|nor|without|no)\b|n['’]t\b)[^.;]{0,30}\bretract", re.I)
_STUDIES = (
    r"(?:studies|trials|experiments|papers|analyses|meta-analyses|reviews|investigations|replications|cohorts|surveys|sources"
    r"|articles|reports)\b"
)
_SEVERAL = re.compile(
    r"\b(?:several|multiple|many|most|numerous|various|a (?:large |great |growing |considerable )?(?:number|range|series|body|variety) of"
    r"|dozens of)(?: of (?:the|these|those))?(?:\s+(?!(?:at|by|from|in|of|that|who|with)\b)[\w-]+){0,3}?\s+"
    + _STUDIES
    + r"|\b(?:studies|trials|experiments|meta-analyses|reviews) (?:consistently|repeatedly)\b|\bacross "
    + _STUDIES,
    re.I,
)
_RANDOMISED = re.compile(r"(?<!non-)(?<!non)(?<!quasi-)\brandomi[sz]ed\b", re.I)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NEGATION = re.compile(r"\b(?:no|not|never|neither|nor|without|fail\w*|lacks?|lacking)\b|n['’]t\b", re.I)


@dataclass
class Overall:
    """What `assess` found for a whole synthesis. Everything in it may be shown and is JSON-able (`as_json`)."""

    label: str
    reason: str
    key_claims: list[dict[str, Any]]  # id, label, reason of each; the worst decides
    excluded: list[dict[str, Any]]  # sources that were left out: source, why, claims that cite them
    notes: list[dict[str, str]]  # sources that a reader must know something about: source, note
    not_assessed: list[str]
    rule: list[str]  # the rule in words, with this run's numbers
    weights: Weights
    flags: list[Flag] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything but the flags, which are kept with those of the other checks."""
        return {key: value for key, value in asdict(self).items() if key != "flags"}


@dataclass(frozen=True)
class _Source:
    id: str
    weight: float
    design: str
    replication: str
    integrity: str
    title: str
    effect: tuple[float, float, str] | None  # size, standard error, measure
    work: Work
    # A copy of the same work (its preprint, say) that is known to be retracted, or to have failed to replicate.
    retracted_as: str | None = None
    failed_as: str | None = None

    @property
    def retracted(self) -> bool:
        return self.integrity == "retracted" or self.retracted_as is not None

    @property
    def failed(self) -> bool:
        return self.replication == "failed" or self.failed_as is not None


def load() -> Weights:
    """config/evidence.yaml, each key checked. Raises Problem that names file and key."""
    path = Path(os.environ.get("CONFIG_DIR") or "config") / FILE
    data = strict.read(path)
    if unknown := [str(name) for name in data if name not in _BLOCKS]:
        raise Problem(f"{path}: unknown block {', '.join(unknown)}; the blocks are {', '.join(_BLOCKS)}")
    weights = {name: strict.check(f"{path}: {name}", data.get(name), specs) for name, specs in _BLOCKS.items()}
    replication = weights["replication"]
    if not 1 / replication["bound"] <= replication["prior_odds"] <= replication["bound"]:
        raise Problem(f"{path}: replication: prior_odds must lie between 1/bound and bound")
    return weights


def likelihood_ratios(weights: Weights) -> dict[str, float]:
    """By replication_status, what a replication of its finding multiplies the odds with."""
    power, alpha = weights["replication"]["power"], weights["replication"]["alpha"]
    ratios = dict.fromkeys(REPLICATION_STATUSES, 1.0)
    return ratios | {"successful": power / alpha, "failed": (1 - power) / (1 - alpha)}


def kish(weights: Iterable[float]) -> float:
    """The effective number of sources of unequal weight: (Σw)² / Σw²."""
    values = list(weights)
    squares = math.fsum(w * w for w in values)
    return math.fsum(values) ** 2 / squares if squares else 0.0


def assess(
    claims: Sequence[Claim],
    manifest: Sequence[Mapping[str, Any]],
    stances: Stances,
    weights: Weights,
    question_similarity: Mapping[str, float] | None = None,
) -> Overall:
    """Fill `confidence` of each claim but the meta ones, and give the label of the whole.

    A claim that cites sources and has no entry in `stances` is `unchecked`; one that cites nothing and has none is
    `insufficient`.
    """
    sources = {entry["id"]: _source(entry, weights) for entry in manifest}
    related = _relations(sources, stances, weights)
    _share_what_is_known(sources, related)
    flags: list[Flag] = []
    for claim in claims:
        if claim.kind == "meta":
            claim.confidence = None
            continue
        found = stances.get(claim.id)
        for stance in (found or {}).values():
            if stance["stance"] not in STANCES:
                raise ValueError(f"stance {stance['stance']!r} of {claim.id}")
        if found is None and claim.cited:
            claim.confidence = {"label": "unchecked", "reason": "What its sources say about it was not checked."}
        else:
            claim.confidence = _confidence(claim, found or {}, sources, related, weights)
        flags += _flags(claim, found or {}, sources, related)
    key = _key_claims(claims, question_similarity, weights["key_claims"]["most"])
    label, reason = _overall(key)
    return Overall(
        label=label,
        reason=reason,
        key_claims=[
            {"id": c.id, "label": c.confidence["label"], "reason": c.confidence["reason"]} for c in key if c.confidence
        ],
        excluded=[
            {"source": s.id, "why": _why_excluded(s), "cited_by": [c.id for c in claims if s.id in c.cited]}
            for s in sources.values()
            if s.retracted
        ],
        notes=[
            {"source": s.id, "note": _NOTES[s.integrity].format(weights["factors"]["expression_of_concern"])}
            for s in sources.values()
            if s.integrity in _NOTES
        ],
        not_assessed=_not_assessed(claims, sources, stances),
        rule=rule(weights),
        weights=weights,
        flags=flags,
    )


_NOTES = {
    "expression_of_concern": "its journal has expressed concern; it counts × {:g}",
    "corrected": "has been corrected; it counts as it is",
    "reinstated": "was retracted and reinstated; it counts as it is",
}


def _source(entry: Mapping[str, Any], weights: Weights) -> _Source:
    metadata = entry["metadata"]
    design = _word(metadata, "source_type", SOURCE_TYPES, "other")
    integrity = _word(metadata, "integrity_status", INTEGRITY_STATUSES, "unchecked")
    factors = weights["factors"]
    weight = float(weights["quality"][design])
    if is_preprint(metadata):
        weight *= factors["preprint"]
    if metadata.get("abstract_only") is True:
        weight *= factors["abstract_only"]
    if integrity == "expression_of_concern":
        weight *= factors["expression_of_concern"]
    size, error, measure = (metadata.get(key) for key in ("effect_size", "effect_se", "effect_measure"))
    effect = None
    if _finite(size) and _finite(error) and error > 0 and isinstance(measure, str) and measure.strip():
        effect = (float(size), float(error), measure.strip().casefold())
    return _Source(
        entry["id"],
        weight,
        design,
        _word(metadata, "replication_status", REPLICATION_STATUSES, "unknown"),
        integrity,
        str(metadata.get("title") or ""),
        effect,
        work(entry),
    )


def _word(metadata: Mapping[str, Any], key: str, words: Sequence[str], default: str) -> str:
    value = metadata.get(key)
    return str(value) if value in words else default


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _relations(sources: Mapping[str, _Source], stances: Stances, weights: Weights) -> dict[frozenset[str], str]:
    """Why which pairs of sources are not independent; of each pair at least one speaks for or against some claim."""
    speaking = {i for found in stances.values() for i, stance in found.items() if stance["stance"] != "unclear"}
    pairs = {}
    for a, b in itertools.combinations(sorted(sources, key=natural), 2):
        if (a in speaking or b in speaking) and (
            why := relation(sources[a].work, sources[b].work, **weights["independence"])
        ):
            pairs[frozenset((a, b))] = why
    return pairs


def _share_what_is_known(sources: dict[str, _Source], related: Mapping[frozenset[str], str]) -> None:
    """A preprint does not survive the retraction of its article, nor its failed replication; unless it was reinstated."""
    changed: dict[str, _Source] = {}
    for pair, why in related.items():
        if why in SAME_WORK:
            for i, other in itertools.permutations(sorted(pair, key=natural)):
                source = changed.get(i, sources[i])
                if sources[other].integrity == "retracted" and source.integrity not in ("retracted", "reinstated"):
                    source = replace(source, retracted_as=source.retracted_as or other)
                if sources[other].replication == "failed" and source.replication != "failed":
                    source = replace(source, failed_as=source.failed_as or other)
                changed[i] = source
    sources.update(changed)


def _why_excluded(source: _Source) -> str:
    return f"the same work as {source.retracted_as}, which is retracted" if source.retracted_as else "retracted"


@dataclass(frozen=True)
class _Found:
    """What speaks for and against a claim; retracted sources are in neither."""

    supports: list[str]
    contradicts: list[str]
    excluded: list[str]
    failed: list[str]  # of `supports`: their finding failed to replicate
    said: bool  # the sentence itself says that a replication failed
    replicated: list[str]  # of `supports`
    against_replicated: list[str]  # of `contradicts`
    counted: Choice
    counted_against: Choice
    odds: float
    ratio: float
    level: int

    @property
    def looked(self) -> bool:
        """Whether anything could have been found to contradict."""
        return self.level >= 2


def _found(
    claim: Claim,
    stances: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, _Source],
    related: Mapping[frozenset[str], str],
    weights: Weights,
) -> _Found:
    pairs = set(related)
    by: dict[str, list[str]] = {"supports": [], "contradicts": [], "unclear": []}
    excluded = []
    for i in sorted(stances.keys() & sources.keys(), key=natural):
        stance = stances[i]["stance"]
        if sources[i].retracted:
            if stance != "unclear":
                excluded.append(i)
        else:
            by[stance].append(i)

    def independent(ids: Iterable[str]) -> int:
        return len(heaviest(dict.fromkeys(ids, 1.0), pairs).ids)

    supports, contradicts = by["supports"], by["contradicts"]
    failed = [i for i in supports if sources[i].failed]
    replicated = [i for i in supports if sources[i].replication == "successful" and i not in failed]
    # A contradicting source counts in full even where its own finding failed to replicate: doubt about a doubt is no support.
    against_replicated = [i for i in contradicts if sources[i].replication == "successful"]
    said = bool(_SAYS_FAILED.search(claim.bare))
    ratios = likelihood_ratios(weights)
    # In logarithms: many replications would leave the range of a float.
    log_ratio = math.log(ratios["successful"]) * (independent(replicated) - independent(against_replicated))
    if not said:
        log_ratio += math.log(ratios["failed"]) * independent(failed)
    bound = math.log(weights["replication"]["bound"])
    log_odds = min(bound, max(-bound, math.log(weights["replication"]["prior_odds"]) + log_ratio))
    return _Found(
        supports,
        contradicts,
        excluded,
        failed,
        said,
        replicated,
        against_replicated,
        heaviest({i: sources[i].weight for i in supports if i not in failed}, pairs),
        heaviest({i: sources[i].weight for i in contradicts}, pairs),
        math.exp(log_odds),
        math.exp(min(50.0, max(-50.0, log_ratio))),
        max((int(stance.get("level", 1)) for stance in stances.values()), default=1),
    )


def posterior(odds: float, support: float, against: float) -> tuple[float, float]:
    """α and β of the claim's Beta distribution. The prior weighs 2 in all and has mean odds / (1 + odds); odds 1: α = β = 1."""
    return 2 * odds / (1 + odds) + support, 2 / (1 + odds) + against


def _confidence(
    claim: Claim,
    stances: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, _Source],
    related: Mapping[frozenset[str], str],
    weights: Weights,
) -> dict[str, Any]:
    found = _found(claim, stances, sources, related, weights)
    support, against = found.counted.weight, found.counted_against.weight
    alpha, beta_ = posterior(found.odds, support, against)
    low, high = beta.interval(weights["labels"]["interval"], alpha, beta_)
    n_eff = kish(sources[i].weight for i in found.counted.ids)
    lending = [i for i in found.supports if i not in found.failed]
    syntheses = [i for i in lending if sources[i].design in SYNTHESES]
    missing = _missing(low, n_eff, found, syntheses, weights)
    label = _label(support, against, missing, weights)
    effects = _effects([sources[i] for i in (*found.counted.ids, *found.counted_against.ids)])
    speaking = {*found.supports, *found.contradicts}
    return {
        "label": label,
        "missing": missing if label == "limited" else [],
        "reason": _reason(label, found, missing, sources, weights),
        "supports": found.supports,
        "contradicts": found.contradicts,
        "counted": [*found.counted.ids, *found.counted_against.ids],
        "weight_for": _short(support),
        "weight_against": _short(against),
        "n_eff": _short(n_eff),
        "mean": _short(alpha / (alpha + beta_)),
        "interval": [_short(low), _short(high)],
        "odds": _short(found.odds),
        "replication": {
            "likelihood_ratio": _short(found.ratio),
            "successful": found.replicated,
            "failed": found.failed,
            "failure_is_in_the_sentence": found.said,
            "successful_against": found.against_replicated,
        },
        "syntheses": syntheses,
        "related": [
            {"sources": sorted(pair, key=natural), "why": why} for pair, why in related.items() if pair <= speaking
        ],
        "excluded": found.excluded,
        "level": found.level,
        "contradictions_looked_for": found.looked,
        "independence_exact": found.counted.exact and found.counted_against.exact,
        "effects": effects,
        "grade_informed_start": _grade(found, low, high, support, against, effects, sources, weights),
    }


def _short(value: float) -> float:
    """Six significant digits: more would only differ between machines."""
    return float(f"{value:.6g}")


def _missing(low: float, n_eff: float, found: _Found, syntheses: list[str], weights: Weights) -> list[str]:
    """What a claim lacks to be well supported."""
    labels = weights["labels"]
    missing = []
    if low < labels["lower_bound"]:
        missing.append(f"an interval from {labels['lower_bound']:g} on (it begins at {low:.2f})")
    if n_eff < labels["n_eff"] - 1e-9:
        missing.append(f"{labels['n_eff']:g} effective sources (it has {n_eff:.2f})")
    if found.failed:
        missing.append("no failed replication")
    if not syntheses and not found.replicated:
        missing.append("a systematic review, a meta-analysis or a replicated study")
    return missing


def _label(support: float, against: float, missing: list[str], weights: Weights) -> str:
    labels = weights["labels"]
    close = 1e-9  # 0.3 + 0.3 + 0.4 is 1
    total = support + against
    if total < labels["enough"] - close:
        return "insufficient"
    if against >= labels["contested_weight"] - close and against >= labels["contested_share"] * total - close:
        return "contested"
    if support < labels["enough"] - close:
        return "insufficient"
    return "limited" if missing else "well_supported"


def _reason(label: str, found: _Found, missing: list[str], sources: Mapping[str, _Source], weights: Weights) -> str:
    support, against = found.counted, found.counted_against
    lending = [i for i in found.supports if i not in found.failed]
    parts = []
    if lending:
        count = len(support.ids)
        who = listed(lending)
        if len(lending) == 1:
            who += f" ({sources[lending[0]].design.replace('_', ' ')})"
        elif count == 1:
            who += ", which are not independent of each other,"
        elif count < len(lending):
            who += f" ({count} of them independent of each other)"
        parts.append(f"{who} support{'s' * (len(lending) == 1)} it (weight {support.weight:.1f})")
    else:
        parts.append("no retrieved source that counts supports it")
    if found.contradicts:
        share = against.weight / ((support.weight + against.weight) or 1)
        parts.append(
            f"{listed(found.contradicts)} contradict{'s' * (len(found.contradicts) == 1)} it"
            f" (weight {against.weight:.1f}, {100 * share:.0f} % of all)"
        )
    else:
        parts.append(
            "nothing retrieved contradicts it" if found.looked else "whether anything contradicts it was not looked for"
        )
    if found.replicated:
        parts.append(f"the {_findings(found.replicated)} {_were(found.replicated)} replicated")
    if found.failed:
        parts.append(
            f"the {_findings(found.failed)} failed to replicate and lend{'s' * (len(found.failed) == 1)} no support"
        )
    if found.against_replicated:
        parts.append(f"the contrary {_findings(found.against_replicated)} {_were(found.against_replicated)} replicated")
    if found.excluded:
        parts.append(f"{listed(found.excluded)} {'is' if len(found.excluded) == 1 else 'are'} retracted and left out")
    if label == "insufficient":
        head = f"Too little to say (weight {weights['labels']['enough']:g} is needed)"
    elif label == "contested":
        head = "The evidence disagrees" if support.weight else "The evidence speaks against it"
    elif label == "limited":
        head = "Some support"
        parts.append(f"to be well supported it would need {listed(missing)}")
    else:
        head = "Well supported"
    return f"{head}: {'; '.join(parts)}."


def _findings(ids: Sequence[str]) -> str:
    return f"finding{'s' * (len(ids) > 1)} of {listed(ids)}"


def _were(ids: Sequence[str]) -> str:
    return "was" if len(ids) == 1 else "were"


def _effects(sources: Sequence[_Source]) -> dict[str, Any] | None:
    """Heterogeneity of effect sizes, where at least two counted sources give one of the same measure. Information only."""
    given = [s.effect for s in sources if s.effect]
    if len(given) < 2 or len({measure for _, _, measure in given}) > 1:
        return None
    inverse = [1 / se**2 for _, se, _ in given]
    total = math.fsum(inverse)
    mean = math.fsum(w * size for w, (size, _, _) in zip(inverse, given, strict=True)) / total
    q = math.fsum(w * (size - mean) ** 2 for w, (size, _, _) in zip(inverse, given, strict=True))
    df = len(given) - 1
    tau2 = max(0.0, (q - df) / (total - math.fsum(w * w for w in inverse) / total))
    random = [1 / (se**2 + tau2) for _, se, _ in given]
    pooled = math.fsum(w * size for w, (size, _, _) in zip(random, given, strict=True)) / math.fsum(random)
    return {
        "measure": given[0][2],
        "k": len(given),
        "Q": _short(q),
        "I2": _short(max(0.0, (q - df) / q) * 100 if q else 0.0),
        "tau2": _short(tau2),
        "pooled": _short(pooled),
        "se": _short(math.fsum(random) ** -0.5),
    }


def _grade(
    found: _Found,
    low: float,
    high: float,
    support: float,
    against: float,
    effects: dict[str, Any] | None,
    sources: Mapping[str, _Source],
    weights: Weights,
) -> dict[str, Any] | None:
    """A first guess at the certainty of the evidence for a person to go on from; None where nothing supports the claim."""
    designs = [sources[i] for i in found.counted.ids]
    if not designs:
        return None
    if any(s.design == "rct" or (s.design in SYNTHESES and _RANDOMISED.search(s.title)) for s in designs):
        start, why = "high", "randomised trials"
    elif any(s.design in _OBSERVATIONAL for s in designs):
        start, why = "low", "observational studies"
    elif any(s.design in SYNTHESES for s in designs):
        start, why = "low", "a synthesis whose title names no randomised trials"
    else:
        start, why = "very_low", "no study of the kinds that are rated"
    settings, labels = weights["grade"], weights["labels"]
    down = []
    share = against / (support + against) if against else 0.0
    if share >= labels["contested_share"]:
        down.append(f"inconsistency: {100 * share:.0f} % of the weight contradicts it")
    elif effects and effects["I2"] >= settings["inconsistency_i2"]:
        down.append(f"inconsistency: I² is {effects['I2']:.0f} %")
    if high - low > settings["imprecision_width"]:
        down.append(f"imprecision: the interval is {high - low:.2f} wide")
    not_assessed = list(NOT_GRADED)
    if not found.looked and not effects:
        not_assessed.insert(0, "inconsistency")
    return {
        "start": start,
        "because": why,
        "down": down,
        "level": _LEVELS[max(0, _LEVELS.index(start) - len(down))],
        "not_assessed": not_assessed,
    }


def _flags(
    claim: Claim,
    stances: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, _Source],
    related: Mapping[frozenset[str], str],
) -> list[Flag]:
    """What the sentence should not leave out about its own sources."""
    flags = []

    def stance(i: str) -> str:
        return str(stances[i]["stance"]) if i in stances else "unclear"

    supporting = [i for i in stances if stance(i) == "supports" and i in sources]
    rests_on = {*supporting, *(i for i in claim.cited if i in sources and stance(i) != "contradicts")}
    for i in sorted(rests_on, key=natural):
        source = sources[i]
        told = _SAYS_RETRACTED.search(claim.bare) and not _SAYS_NOT_RETRACTED.search(claim.bare)
        if source.retracted and not told:
            which = f"the same work as {source.retracted_as}, which" if source.retracted_as else "which"
            flags.append(Flag("evidence", "retracted_source", f"rests on {i}, {which} is retracted", claim.id, i))
        if source.integrity == "expression_of_concern":
            detail = f"rests on {i}, about which its journal has expressed concern"
            flags.append(Flag("evidence", "expression_of_concern", detail, claim.id, i))
        if source.failed and not source.retracted and not _SAYS_FAILED.search(claim.bare):
            detail = f"does not say that the finding of {i} failed to replicate"
            flags.append(Flag("evidence", "failed_replication_unmentioned", detail, claim.id, i))
    standing = {i: 1.0 for i in supporting if not sources[i].retracted}
    if (
        _SEVERAL.search(claim.bare)
        and not any(sources[i].design in SYNTHESES for i in standing)
        and len(one := heaviest(standing, set(related)).ids) == 1
    ):
        ids = sorted(standing, key=natural)
        detail = f"speaks of several studies, but only {ids[0]} supports it"
        if len(ids) > 1:
            detail = f"speaks of several studies, but {listed(ids)} are not independent of each other"
        flags.append(Flag("evidence", "one_source_as_several", detail, claim.id, one[0]))
    return flags


def _key_claims(claims: Sequence[Claim], similarity: Mapping[str, float] | None, most: int) -> list[Claim]:
    """The facts nearest to the question; without similarities, and among equally near ones, the first in the text."""
    near = similarity or {}
    facts = [claim for claim in claims if claim.kind == "fact"]
    facts.sort(key=lambda claim: (-near.get(claim.id, -1.0), claim.span, natural(claim.id)))
    return facts[:most]


def _overall(key: Sequence[Claim]) -> tuple[str, str]:
    rated = [(claim.confidence["label"], claim.confidence["reason"], claim.id) for claim in key if claim.confidence]
    if not rated:
        return "insufficient", "The text says nothing about the world that could be assessed."
    worst = min(range(len(rated)), key=lambda n: (LABELS.index(rated[n][0]), n))
    label, reason, claim_id = rated[worst]
    which = "Its key claim is" if len(rated) == 1 else f"The weakest of its {len(rated)} key claims is"
    return label, f"{which} {claim_id}. {reason}"


def _not_assessed(claims: Sequence[Claim], sources: Mapping[str, _Source], stances: Stances) -> list[str]:
    found = [
        "whether the studies were done well, ask just what the claim says, and stand for what was never published"
        f" ({', '.join(NOT_GRADED[:3])}): that takes a person",
        "shared cohorts, data and funders: independence is judged from identifiers, titles and authors alone",
    ]
    levels = [int(stance.get("level", 1)) for by_source in stances.values() for stance in by_source.values()]
    if max(levels, default=1) < 2:
        found.append(
            "contradictions: at level 1 a cited source that resembles a claim counts as support, and none can contradict it"
        )
    if count := sum(s.integrity == "unchecked" for s in sources.values()):
        found.append(f"whether {count} of {len(sources)} sources were retracted or corrected: unchecked")
    if count := sum(s.replication == "unknown" for s in sources.values()):
        found.append(
            f"whether the findings of {count} of {len(sources)} sources were replicated: unknown, which changes nothing"
        )
    if ids := [c.id for c in claims if c.confidence and c.confidence["label"] == "unchecked"]:
        found.append(f"what the sources say of {listed(ids)}")
    return found


def rule(weights: Weights) -> list[str]:
    """The rule in words, with the numbers of `weights`."""
    labels, replication, ratios = weights["labels"], weights["replication"], likelihood_ratios(weights)
    independence = weights["independence"]
    enough, percent = f"{labels['enough']:g}", f"{100 * labels['interval']:.0f} %"
    return [
        "P and N: weight of the independent sources that support and that contradict the claim. A source's weight is that of"
        " its design; of sources that are the same work or share"
        f" {100 * independence['author_overlap']:.0f} % of their authors one counts. Retracted sources do not count.",
        f"Odds before the sources: {replication['prior_odds']:g}, × {ratios['successful']:.3g} for each supporting source whose"
        f" finding was replicated, × {ratios['failed']:.2g} for each whose finding failed to replicate (it then adds nothing to"
        f" P), ÷ {ratios['successful']:.3g} for each contradicting one that was replicated; within 1/{replication['bound']:g} and"
        f" {replication['bound']:g}.",
        f"Interval: the middle {percent} of Beta(2·odds/(1+odds) + P, 2/(1+odds) + N).",
        f"insufficient: P + N below {enough}, or P below {enough} and not contested.",
        f"contested: N at least {labels['contested_weight']:g} and at least {100 * labels['contested_share']:.0f} % of P + N.",
        f"well_supported: the interval begins at {labels['lower_bound']:g} or above; effective sources (Kish) at least"
        f" {labels['n_eff']:g}; no failed replication; a systematic review, a meta-analysis or a replicated study among them.",
        "limited: everything else.",
        f"The whole: the worst label of its key claims, the {weights['key_claims']['most']} facts nearest to the question.",
    ]


def explain(claim: Claim) -> list[str]:
    """A claim's confidence as lines for a terminal: the label with its reason, then what went into it."""
    found = claim.confidence
    if not found:
        return []
    lines = [f"{claim.id} {found['label']}: {found['reason']}"]
    if "interval" in found:
        low, high = found["interval"]
        lines.append(
            f"   P {found['weight_for']:.2f}, N {found['weight_against']:.2f}, effective sources {found['n_eff']:.2f}, odds"
            f" {found['odds']:.3g}, mean {found['mean']:.2f}, interval {low:.2f} to {high:.2f}"
        )
    return lines


def agreement(
    claims: Sequence[Claim], samples: Sequence[Sequence[Claim]], embedder: Embedder, threshold: float
) -> dict[str, dict[str, Any]]:
    """By claim, the share of sampled answers (each split into claims) that hold it, and the nearest sentence's similarity.

    A sample holds a claim if one of its sentences is at least `threshold` near to it, has all its numbers, and is negated
    as it is. An approximation: vectors hardly see a reversed direction ("raises", "lowers"), so agreement is a hint that
    the model would say it again, and says nothing about whether it is true.
    """
    rated = [claim for claim in claims if claim.kind != "meta"]
    if not rated or not samples:
        return {claim.id: {"share": None, "samples": len(samples), "nearest": []} for claim in rated}
    texts = sorted({c.bare for c in itertools.chain(rated, *samples)})
    vectors = dict(zip(texts, embedder.encode(texts), strict=True))
    result = {}
    for claim in rated:
        nearest, held = [], 0
        for sample in samples:
            alike = [(float(vectors[claim.bare] @ vectors[c.bare]), c.bare) for c in sample]
            nearest.append(round(max((score for score, _ in alike), default=0.0), 4))
            held += any(score >= threshold - 1e-6 and _same_facts(claim.bare, text) for score, text in alike)
        result[claim.id] = {"share": _short(held / len(samples)), "samples": len(samples), "nearest": nearest}
    return result


def _same_facts(claim: str, other: str) -> bool:
    return set(_NUMBER.findall(claim)) <= set(_NUMBER.findall(other)) and bool(_NEGATION.search(claim)) == bool(
        _NEGATION.search(other)
    )
