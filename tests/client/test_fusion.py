"""Fusing rankings and choosing from them: the arithmetic, the bounds, and that nothing depends on the order of arrival."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY

from fusion import Candidate, choose, fuse, scaled

E1, E2, E3 = np.eye(3, dtype=np.float32)


def one(name: str, relevance: float, vector: object = None, paper: str = "") -> Candidate:
    return Candidate(name, relevance, np.asarray(E1 if vector is None else vector, np.float32), paper or name)


def test_ranks_are_fused_by_the_sum_of_their_reciprocals() -> None:
    fused = fuse([(1, ["a", "b", "c"]), (0.5, ["c", "d"])])
    assert fused == {
        "c": pytest.approx(1 / 63 + 0.5 / 61, abs=1e-9),
        "a": pytest.approx(1 / 61, abs=1e-9),
        "b": pytest.approx(1 / 62, abs=1e-9),
        "d": pytest.approx(0.5 / 62, abs=1e-9),
    }
    assert list(fused) == ["c", "a", "b", "d"]


def test_what_one_ranking_alone_finds_is_kept_and_ties_go_by_id() -> None:
    assert list(fuse([(1, ["z"]), (1, ["a"]), (1, [])])) == ["a", "z"]
    assert fuse([]) == {}


@PROPERTY
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), max_size=5), st.randoms())
def test_the_order_of_the_rankings_does_not_matter(rankings: list[list[str]], chance: random.Random) -> None:
    weighted = [(1 / (n + 1), ranking) for n, ranking in enumerate(rankings)]
    shuffled = weighted[:]
    chance.shuffle(shuffled)
    assert list(fuse(weighted).items()) == list(fuse(shuffled).items())


def test_with_trade_1_the_most_relevant_are_chosen_in_order() -> None:
    candidates = [one("b", 0.5), one("a", 0.5), one("c", 0.9)]
    chosen, refused = choose(candidates, lambda _: 1, 1.0, 2, 3, 100)
    assert chosen == {"c": 0.9, "a": 0.5}
    assert {name: why.reason for name, why in refused.items()} == {"b": "n_results"}


def test_what_is_like_the_chosen_waits() -> None:
    # "twin" is as relevant as "first" and the same text; "other" is less relevant and new.
    candidates = [one("first", 1.0), one("twin", 1.0), one("other", 0.8, E2)]
    chosen, _ = choose(candidates, lambda _: 1, 0.7, 3, 3, 100)
    assert chosen == {"first": 0.7, "other": pytest.approx(0.56), "twin": pytest.approx(0.4)}
    assert list(chosen) == ["first", "other", "twin"]


def test_a_paper_has_no_more_than_its_share() -> None:
    candidates = [one(f"p{n}", 1 - n / 10, paper="same") for n in range(5)] + [one("q", 0.1)]
    chosen, refused = choose(candidates, lambda _: 1, 1.0, 10, 3, 100)
    assert list(chosen) == ["p0", "p1", "p2", "q"]
    assert {name: why.reason for name, why in refused.items()} == {"p3": "per_paper", "p4": "per_paper"}


def test_what_does_not_fit_is_passed_over_and_what_fits_still_comes() -> None:
    sizes = {"a": 60, "b": 50, "c": 40}
    chosen, refused = choose([one("a", 0.9), one("b", 0.8), one("c", 0.7)], sizes.__getitem__, 1.0, 10, 3, 100)
    assert list(chosen) == ["a", "c"]
    assert (refused["b"].reason, refused["b"].detail) == ("budget", "50 tokens, 40 were left of 100")


def test_tokens_are_counted_for_what_is_about_to_be_chosen_alone() -> None:
    asked: list[str] = []

    def tokens(name: str) -> int:
        asked.append(name)
        return 1

    choose([one(f"c{n}", 1 - n / 10) for n in range(9)], tokens, 1.0, 2, 3, 100)
    assert asked == ["c0", "c1"]


vectors = st.sampled_from([E1, E2, E3, (E1 + E2) / np.sqrt(2, dtype=np.float32)])
drawn = st.lists(st.tuples(st.sampled_from([0.0, 0.3, 0.5, 1.0]), vectors, st.sampled_from("xyz")), max_size=12)


@PROPERTY
@given(drawn, st.floats(0, 1), st.integers(1, 8), st.integers(1, 3), st.integers(1, 60), st.randoms())
def test_each_candidate_is_chosen_or_refused_within_the_bounds_whatever_the_order(
    rows: list[tuple[float, object, str]], trade: float, limit: int, cap: int, budget: int, chance: random.Random
) -> None:
    candidates = [one(f"c{n:02}", relevance, vector, paper) for n, (relevance, vector, paper) in enumerate(rows)]

    def tokens(name: str) -> int:
        return 5 + int(name[1:])

    chosen, refused = choose(candidates, tokens, trade, limit, cap, budget)
    assert sorted([*chosen, *refused]) == [c.id for c in candidates]
    assert len(chosen) <= limit
    assert sum(map(tokens, chosen)) <= budget
    papers = [c.paper for c in candidates if c.id in chosen]
    assert all(papers.count(paper) <= cap for paper in papers)
    chance.shuffle(candidates)
    again, others = choose(candidates, tokens, trade, limit, cap, budget)
    assert (list(again.items()), others) == (list(chosen.items()), refused)


def test_scores_are_scaled_to_the_highest() -> None:
    assert scaled({"a": 4.0, "b": 1.0}) == {"a": 1.0, "b": 0.25}
    assert scaled({"a": 0.0}) == {"a": 0.0}
    assert scaled({}) == {}
