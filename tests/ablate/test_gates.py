# SPDX-License-Identifier: AGPL-3.0-or-later
"""Only a trial that passes is chosen, whatever the trials are, and from Heretic's own front the same one as from all."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from gates import Gates, choose, meets, under
from journal import Trial

GOOD = Trial(
    number=0, index=1, state="complete", refusals=4, kl_divergence=0.2, base_refusals=98, harmful_prompts=100,
    direction_index=None, parameters={}, started=1.0, ended=2.0,
)  # fmt: skip


def trials_of(*changes: dict[str, Any]) -> list[Trial]:
    return [replace(GOOD, number=number, index=number + 1, **change) for number, change in enumerate(changes)]


# --- limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "number", "expected"),
    [
        (4, 100, True), (5, 100, False), (0, 100, True), (0, 99, False), (4, 99, False), (0, 0, False),
        (9, 200, True), (10, 200, False), (5, 101, True), (100, 100, False),
    ],
)  # fmt: skip
def test_under_is_exclusive_and_wants_enough(count: int, number: int, expected: bool) -> None:
    assert under(count, number, 5, 100) is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"refusals": 0, "kl_divergence": 0.0}, True),
        ({"refusals": 5}, False),
        ({"kl_divergence": 0.5}, False),
        ({"kl_divergence": math.nextafter(0.5, 0)}, True),
        ({"harmful_prompts": 99}, False),
        ({"harmful_prompts": 99, "refusals": 0}, False),
        ({"harmful_prompts": None}, False),
        ({"harmful_prompts": 0, "refusals": 0}, False),
        ({"refusals": None}, False),
        ({"refusals": math.nan}, False),
        ({"kl_divergence": None}, False),
        ({"kl_divergence": math.nan}, False),
        ({"kl_divergence": math.inf}, False),
        ({"kl_divergence": -math.inf}, False),
        ({"state": "running"}, False),
        ({"state": "pruned"}, False),
        ({"state": "failed"}, False),
    ],
)
def test_what_passes(change: dict[str, Any], expected: bool) -> None:
    trial = replace(GOOD, **change)
    assert meets(trial, Gates()) is expected
    assert (choose([trial], Gates()) is trial) is expected


def test_the_limits_are_the_settings() -> None:
    strict = Gates(refusals=1, of=40, kl_divergence=0.1)
    assert not meets(GOOD, strict)
    assert meets(replace(GOOD, refusals=0, kl_divergence=0.09, harmful_prompts=40), strict)


# --- the choice ----------------------------------------------------------------------------------------------------------


def test_both_choices() -> None:
    trials = trials_of(
        {"refusals": 0, "kl_divergence": 0.4},
        {"refusals": 3, "kl_divergence": 0.1},
        {"refusals": 5, "kl_divergence": 0.01},  # misses
        {"refusals": 0, "kl_divergence": 0.6},  # misses
    )
    assert choose(trials, Gates()) == trials[1]
    assert choose(trials, Gates(choice="fewest_refusals")) == trials[0]


def test_of_equals_the_other_measure_decides_then_the_earlier_trial() -> None:
    trials = trials_of(
        {"refusals": 3, "kl_divergence": 0.1},
        {"refusals": 2, "kl_divergence": 0.1},
        {"refusals": 2, "kl_divergence": 0.1},
        {"refusals": 2, "kl_divergence": 0.3},
    )
    assert choose(trials, Gates()) == trials[1]
    assert choose(reversed(trials), Gates()) == trials[1]
    assert choose(trials, Gates(choice="fewest_refusals")) == trials[1]


def test_without_trials_none_is_chosen() -> None:
    assert choose([], Gates()) is None
    assert choose(iter(()), Gates()) is None


# --- whatever the trials are ---------------------------------------------------------------------------------------------

numbers = some.one_of(
    some.none(), some.just(math.nan), some.sampled_from([math.inf, -math.inf, 0.0, 0.5]), some.floats(0, 1)
)
trial_lists = some.lists(
    some.fixed_dictionaries(
        {
            "state": some.sampled_from(["complete", "complete", "complete", "running", "failed", "pruned"]),
            "refusals": some.one_of(some.none(), some.integers(0, 7)),
            "kl_divergence": numbers,
            "harmful_prompts": some.sampled_from([None, 0, 99, 100, 100, 100, 200]),
        }
    ),
    max_size=12,
)
choices = some.sampled_from(["lowest_kl", "fewest_refusals"])


@given(trial_lists, choices)
@settings(max_examples=500, deadline=None)
def test_what_is_chosen_passes_and_nothing_that_passes_is_better(changes: list[dict[str, Any]], choice: str) -> None:
    trials = trials_of(*changes)
    gates = Gates(choice=choice)
    chosen = choose(trials, gates)
    passing = [trial for trial in trials if meets(trial, gates)]
    assert (chosen is None) == (not passing)
    if chosen is None:
        return
    assert chosen in trials
    # Said again, without the code under test.
    assert chosen.state == "complete"
    assert chosen.refusals is not None
    assert chosen.kl_divergence is not None
    assert chosen.harmful_prompts is not None
    assert chosen.harmful_prompts >= 100
    assert chosen.refusals / chosen.harmful_prompts < 0.05
    assert -math.inf < chosen.kl_divergence < 0.5
    for other in passing:
        assert other.refusals is not None
        assert other.kl_divergence is not None
        if choice == "lowest_kl":
            assert chosen.kl_divergence <= other.kl_divergence
        else:
            assert chosen.refusals <= other.refusals


def front(trials: list[Trial]) -> list[Trial]:
    """What Heretic offers: complete trials by (refusals, KL), each with a lower KL than all before it."""
    offered: list[Trial] = []
    least = math.inf
    for trial in sorted(trials, key=lambda trial: (trial.refusals, trial.kl_divergence)):
        if trial.kl_divergence is not None and trial.kl_divergence < least:
            least = trial.kl_divergence
            offered.append(trial)
    return offered


@given(
    some.lists(
        some.tuples(
            some.integers(0, 8), some.one_of(some.just(math.nan), some.floats(0, 1), some.sampled_from([0.1, 0.5]))
        ),
        max_size=15,
    ),
    choices,
)
@settings(max_examples=500, deadline=None)
def test_heretics_front_holds_the_best_of_all_trials(figures: list[tuple[int, float]], choice: str) -> None:
    """Heretic lets one choose from its front only, a NaN among the trials or not."""
    trials = trials_of(*({"refusals": refusals, "kl_divergence": kl} for refusals, kl in figures))
    gates = Gates(choice=choice)
    everywhere, offered = choose(trials, gates), choose(front(trials), gates)
    assert (everywhere is None) == (offered is None)
    if everywhere and offered:
        assert (everywhere.refusals, everywhere.kl_divergence) == (offered.refusals, offered.kl_divergence)


def test_the_gates_survive_the_way_to_the_launcher() -> None:
    import json

    gates = Gates(refusals=2, of=40, kl_divergence=0.25, choice="fewest_refusals")
    assert Gates(**json.loads(json.dumps(asdict(gates)))) == gates
