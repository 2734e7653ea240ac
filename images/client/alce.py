"""Citation recall and precision, as ALCE defines them (Gao et al. 2023, eval.py: compute_autoais with citation=True).

Over the statements s_i of an answer with their citations C_i, and "entail" of level 2 (entailment.entails):

    recall    = (1/n) · Σ entail(all of C_i, s_i); 0 for a statement without citations or with one that does not exist
    precision = (1/Σ|C_i|) · Σ over citations c of the statements with recall 1: 1, unless c is not needed: it does not
                entail s_i alone, and the others of C_i do without it

A statement with a citation that does not exist adds nothing to Σ|C_i|; a citation of a statement with recall 0 adds 1 to
it and 0 to the sum; without any citation at all precision is 0. `at_most` cuts C_i to its first citations, as ALCE does
with 3; here all count unless it is given.

What is different from ALCE: its judge is a model of 11 billion parameters and reads each source with its title, ours is
VERIFIER's; its sentences are NLTK's, ours are the ledger's, where "… fell. [S1]" belongs to the sentence before it; a
source that is cited twice in a sentence counts once. ALCE leaves out no sentence: give `measure` all claims for its
figures, and `without_meta(claims)` to leave out those that speak of the text itself.

At level 1 there is no entailment. The same arithmetic with "grounded" in its place has another name, so that nobody takes
one for the other: lexical_citation_recall and lexical_citation_precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ledger import Claim

Entails = Callable[[Claim, Sequence[str]], bool]


@dataclass(frozen=True)
class Measured:
    """Recall, precision and their harmonic mean, with the counts that they come from. None without any statement."""

    recall: float | None
    precision: float | None
    f1: float | None
    statements: int
    supported: int
    citations: int
    needed: int

    def named(self, prefix: str = "") -> dict[str, Any]:
        """For a result: citation_recall, citation_precision, citation_f1 and the counts; `prefix` stands before."""
        return {
            f"{prefix}citation_recall": self.recall,
            f"{prefix}citation_precision": self.precision,
            f"{prefix}citation_f1": self.f1,
            f"{prefix}citation_counts": {
                "statements": self.statements,
                "supported": self.supported,
                "citations": self.citations,
                "needed": self.needed,
            },
        }


def measure(claims: Sequence[Claim], entails: Entails, at_most: int | None = None) -> Measured:
    """ALCE's citation recall and precision of an answer. `entails`: do these sources together entail the claim?"""
    supported = citations = needed = 0
    for claim in claims:
        cited = claim.cited[:at_most]
        if not cited or claim.unknown:
            continue
        citations += len(cited)
        if not entails(claim, cited):
            continue
        supported += 1
        needed += sum(_needed(claim, cited, source, entails) for source in cited)
    if not claims:
        return Measured(None, None, None, 0, 0, 0, 0)
    recall = supported / len(claims)
    precision = needed / citations if citations else 0.0
    f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    return Measured(recall, precision, f1, len(claims), supported, citations, needed)


def _needed(claim: Claim, cited: Sequence[str], source: str, entails: Entails) -> bool:
    if len(cited) == 1 or entails(claim, [source]):
        return True
    return not entails(claim, [other for other in cited if other != source])


def without_meta(claims: Sequence[Claim]) -> list[Claim]:
    """The claims that speak of the world."""
    return [claim for claim in claims if claim.kind != "meta"]


def grounds(claim: Claim, ids: Sequence[str]) -> bool:
    """Level 1 in the place of entailment, from the ledger alone: is the claim grounded in these sources?

    One is enough that is grounded by itself, with every number and quotation. All that the claim cites count together,
    too, as level 1 took them; of other sets than these it knows the members only.
    """
    found = claim.checks.get("grounding") or {}
    for source in ids:
        entry = found.get(source)
        if entry and entry["status"] == "grounded" and not entry["missing_numbers"] and not entry["missing_quotes"]:
            return True
    return set(ids) >= set(found) and bool(found) and claim.checks.get("overruled", claim.status) == "grounded"
