"""What a model is expected to cost: ablation, syntheses, a case study. Pure: figures in, figures out.

RunPod bills a serverless worker from its start to its end: cold start, jobs, and the idle time after the last job. So a
synthesis costs least on a worker that is warm, and most when it is alone and pays for start and idle time by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from costs.prices import Price, Prices
from models import Model, Range

# The deployment guide's 2 to 4 hours around its 3 for a 32B model, as a share of the expected hours of any model.
HOURS = Range(2 / 3, 1, 4 / 3)


@dataclass(frozen=True)
class Plan:
    """What is estimated: `syntheses` in each of `domains`, on an endpoint whose workers wait `idle_seconds` for more."""

    domains: int = 4
    syntheses: int = 10
    idle_seconds: float = 60

    @property
    def total(self) -> int:
        return self.domains * self.syntheses


@dataclass(frozen=True)
class Estimate:
    """US dollars for one model; None: the price is not known."""

    model: Model
    plan: Plan
    pod: Price | None
    worker: Price | None
    hours: Range
    ablation: Range | None
    warm: Range | None
    alone: Range | None
    case_study: Range | None

    @property
    def total(self) -> Range | None:
        """The model made once, and one case study with it."""
        if self.ablation is None or self.case_study is None:
            return None
        return combine(lambda one, other: one + other, self.ablation, self.case_study)


def combine(function: Callable[..., float], *ranges: Range) -> Range:
    """A function of several ranges, applied to their low, expected and high ends."""
    return Range(
        function(*(each.low for each in ranges)),
        function(*(each.expected for each in ranges)),
        function(*(each.high for each in ranges)),
    )


def case_study_seconds(model: Model, plan: Plan) -> Range:
    """Billed seconds of a case study.

    Low: all in one go, so one cold start and one idle time. Expected: a sitting for each domain. High: each alone.
    """
    seconds, cold, idle = model.serving.seconds, model.serving.cold_start_seconds, plan.idle_seconds
    return Range(
        plan.total * seconds.low + cold.low + idle,
        plan.total * seconds.expected + plan.domains * (cold.expected + idle),
        plan.total * (seconds.high + cold.high + idle),
    )


def estimate(model: Model, prices: Prices, plan: Plan) -> Estimate:
    """All estimates for a model, on the card and the first pool that config/models.yaml names."""
    serving = model.serving
    pod, worker = prices.card(model.card), prices.pool(serving.pools[0])
    hours = combine(lambda share: share * model.hours, HOURS)
    idle = Range(plan.idle_seconds, plan.idle_seconds, plan.idle_seconds)
    alone = combine(lambda *parts: sum(parts), serving.seconds, serving.cold_start_seconds, idle)
    return Estimate(
        model=model,
        plan=plan,
        pod=pod,
        worker=worker,
        hours=hours,
        ablation=combine(lambda a, b: a * b, hours, pod.usd_per_hour) if pod else None,
        warm=_usd(serving.seconds, worker),
        alone=_usd(alone, worker),
        case_study=_usd(case_study_seconds(model, plan), worker),
    )


def _usd(seconds: Range, price: Price | None) -> Range | None:
    return combine(lambda a, b: a * b / 3600, seconds, price.usd_per_hour) if price else None
