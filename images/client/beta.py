"""The Beta distribution: its distribution function and quantiles. The client's image has no scipy, and needs no more."""

from __future__ import annotations

import functools
import math

_TINY = 1e-300
_PRECISION = 1e-13
_STEPS = 10_000  # about the square root of the larger parameter is needed
_HALVINGS = 36


def cdf(x: float, a: float, b: float) -> float:
    """P(X ≤ x) for X ~ Beta(a, b): the regularised incomplete beta function. a and b above 0.

    By its continued fraction (DLMF 8.17.22), which converges fast left of the mean; right of it the mirror image is used.
    """
    if a <= 0 or b <= 0:
        raise ValueError(f"Beta({a}, {b}) does not exist")
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _left(1 - x, b, a)
    return _left(x, a, b)


def _left(x: float, a: float, b: float) -> float:
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1/(1 + d2/(1 + …)), evaluated forwards (modified Lentz)."""
    value = numerator = 1.0
    denominator = 0.0
    for step in range(1, _STEPS):
        m, odd = divmod(step, 2)
        if odd:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        numerator = 1 + d / numerator
        denominator = 1 / _not_zero(1 + d * denominator)
        numerator = _not_zero(numerator)
        change = numerator * denominator
        value *= change
        if abs(change - 1) < _PRECISION:
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


@functools.lru_cache(maxsize=4096)
def quantile(p: float, a: float, b: float) -> float:
    """The x with P(X ≤ x) = p, by halving the interval."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if cdf(middle, a, b) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def interval(mass: float, a: float, b: float) -> tuple[float, float]:
    """The equally tailed interval that holds `mass` of Beta(a, b)."""
    tail = (1 - mass) / 2
    return quantile(tail, a, b), quantile(1 - tail, a, b)
