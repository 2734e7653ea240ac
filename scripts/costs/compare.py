"""What was done against what was expected of it. Pure: records, prices and bills in, rows and flags out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from costs.bills import Gpus
from costs.prices import Price, Prices
from costs.taken import Ablation, Run, base_of, sittings
from models import Model, Range

TOLERANCE = 0.10  # a larger difference, as a share of what was expected, is flagged


@dataclass(frozen=True)
class EndpointCost:
    """The runs of one endpoint. Money in US dollars, times in seconds; None: not known."""

    endpoint: str
    models: tuple[str, ...]
    runs: int
    timed: int  # of them, those whose time RunPod has told
    seconds: float
    expected_seconds: float | None
    price: Price | None
    usd: Range | None  # the timed runs at the price of each pool that the endpoint may use; expected: the first
    billed: float | None
    expected_bill: float | None  # cold starts and idle times included

    @property
    def time_difference(self) -> float | None:
        """How much longer than expected, as a share."""
        return _difference(self.seconds if self.timed else None, self.expected_seconds)

    @property
    def bill_difference(self) -> float | None:
        """How much more was billed than expected, as a share."""
        return _difference(self.billed, self.expected_bill)

    @property
    def known(self) -> bool:
        """Is it known what these runs cost, in one way or the other?"""
        return self.billed is not None or (self.usd is not None and self.timed == self.runs)


@dataclass(frozen=True)
class AblationCost:
    """One ablation. Hours from what is certain (the search) to what it was at most (start to report)."""

    ablation: Ablation
    base: Model | None
    hours: tuple[float | None, float | None]
    usd: tuple[float | None, float | None]
    price: Price | None
    difference: float | None  # how far its hours are outside of what was expected, as a share; 0: they may be just that


def _difference(found: float | None, expected: float | None) -> float | None:
    return None if found is None or not expected else found / expected - 1


def endpoints(
    runs: Sequence[Run],
    known: dict[str, Model],
    bases: dict[str, str],
    prices: Prices,
    gpus: Mapping[str, Gpus | None],
    billed: Mapping[str, float | None],
    idle_seconds: float,
) -> list[EndpointCost]:
    """One row for each endpoint that the runs went to. The local RunPod's runs must have been left out before."""
    rows = []
    for endpoint in dict.fromkeys(run.endpoint for run in runs if run.endpoint):
        done = [run for run in runs if run.endpoint == endpoint]
        timed = [run for run in done if run.seconds is not None]
        blocks = [base_of(run.model, known, bases) for run in timed]
        found = [block for block in blocks if block]
        seconds = sum(run.seconds or 0.0 for run in timed)
        # Runs whose model has no block have nothing to be compared with, and a sum without them would mislead.
        expected = (
            sum(block.serving.seconds.expected for block in found) if found and len(found) == len(timed) else None
        )
        offers = _offers(prices, gpus.get(endpoint))
        usd = None
        if offers:
            hourly = [offer.usd_per_hour.expected for offer in offers]
            usd = Range(*(seconds * rate / 3600 for rate in (min(hourly), hourly[0], max(hourly))))
        bill = None
        if offers and expected is not None and len(timed) == len(done):
            cold = max(block.serving.cold_start_seconds.expected for block in found)
            billable = expected + sittings(done, idle_seconds) * (cold + idle_seconds)
            bill = billable * offers[0].usd_per_hour.expected / 3600
        rows.append(
            EndpointCost(
                endpoint=endpoint,
                models=tuple(dict.fromkeys(run.model for run in done if run.model)),
                runs=len(done),
                timed=len(timed),
                seconds=seconds,
                expected_seconds=expected,
                price=offers[0] if offers else None,
                usd=usd,
                billed=billed.get(endpoint),
                expected_bill=bill,
            )
        )
    return rows


def _offers(prices: Prices, gpus: Gpus | None) -> list[Price]:
    """The price of each pool, or nothing if one of them has none: which pool a job ran on is not recorded."""
    found = [prices.pool(pool, gpus.count) for pool in gpus.pools] if gpus else []
    return [price for price in found if price] if all(found) else []


def ablation(done: Ablation, known: dict[str, Model], prices: Prices) -> AblationCost:
    """One ablation against the hours of config/models.yaml."""
    base = known.get(done.model.lower())
    price = prices.machine(done.machine)
    least, most = done.searched, done.elapsed
    if least is not None and most is not None and most < least:
        most = None  # a search that went on after the report: with other gates, or more trials
    rate = price.usd_per_hour.expected if price else None
    return AblationCost(
        ablation=done,
        base=base,
        hours=(least, most),
        usd=(_times(least, rate), _times(most, rate)),
        price=price,
        # Hours on a card of one's own, or on a CPU, say nothing about those on a rented card.
        difference=_outside(least, most, base) if base and price else None,
    )


def _times(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def _outside(least: float | None, most: float | None, base: Model) -> float | None:
    """0 if the expected hours lie between what is certain and what is possible, else the share that they are off by."""
    expected = base.hours
    if least is not None and least > expected:
        return least / expected - 1
    if most is not None and most < expected:
        return most / expected - 1
    return None if least is None or most is None else 0.0
