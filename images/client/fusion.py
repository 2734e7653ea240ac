"""Several rankings to one list of sources: reciprocal-rank fusion, and a choice that is good, various and bounded.

Pure arithmetic over ranks, scores and vectors; sees no text. Everything that is not chosen is named with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Cormack et al. 2009: large enough that the first places of one list do not outvote agreement between lists.
RANK_CONSTANT = 60


def fuse(rankings: Sequence[tuple[float, Sequence[str]]]) -> dict[str, float]:
    """Reciprocal-rank fusion: for each id the sum of weight / (60 + rank) over the rankings that hold it, ranks from 1.

    Best first, ties by id.
    """
    shares: dict[str, list[float]] = {}
    for weight, ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            shares.setdefault(item, []).append(weight / (RANK_CONSTANT + rank))
    scores = {item: round(math.fsum(parts), 9) for item, parts in shares.items()}
    return dict(sorted(scores.items(), key=lambda pair: (-pair[1], pair[0])))


@dataclass(frozen=True)
class Candidate:
    """What can be chosen. `relevance` from 0 to 1; `paper` names the document, whatever part of it this is."""

    id: str
    relevance: float
    vector: NDArray[np.float32]  # of length 1
    paper: str


@dataclass(frozen=True)
class Refusal:
    """Why a candidate was not chosen: `reason` is per_paper, budget or n_results, `detail` says it in words."""

    reason: str
    detail: str


def choose(
    candidates: Sequence[Candidate],
    tokens: Callable[[str], int],
    trade: float,
    limit: int,
    per_paper: int,
    budget: int,
) -> tuple[dict[str, float], dict[str, Refusal]]:
    """Maximal marginal relevance under three bounds: the chosen ids with their scores, in order, and the refused ones.

    Each step takes what has the highest trade · relevance − (1 − trade) · its highest cosine to what is chosen already,
    ties by id. A candidate whose paper has its share, or that no longer fits the budget, is passed over for good. `tokens`
    is asked only for what is about to be chosen: counting costs more than all else here.
    """
    left = sorted(candidates, key=lambda c: c.id)
    nearest = {c.id: 0.0 for c in left}
    chosen: dict[str, float] = {}
    refused: dict[str, Refusal] = {}
    papers: dict[str, int] = {}
    room = budget
    while left and len(chosen) < limit:
        scores = [round(trade * c.relevance - (1 - trade) * nearest[c.id], 6) for c in left]
        best = left.pop(max(range(len(left)), key=lambda i: (scores[i], -i)))
        if papers.get(best.paper, 0) >= per_paper:
            refused[best.id] = Refusal("per_paper", f"{per_paper} chunks of this paper are there already")
        elif (size := tokens(best.id)) > room:
            refused[best.id] = Refusal("budget", f"{size} tokens, {room} were left of {budget}")
        else:
            chosen[best.id] = max(scores)
            papers[best.paper] = papers.get(best.paper, 0) + 1
            room -= size
            for other in left:
                nearest[other.id] = max(nearest[other.id], float(other.vector @ best.vector))
    for rest in left:
        refused[rest.id] = Refusal("n_results", f"{limit} better ones are there, or ones less alike")
    return chosen, refused


def scaled(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores as shares of the highest one."""
    top = max(scores.values(), default=0.0)
    return {item: score / top if top > 0 else 0.0 for item, score in scores.items()}
