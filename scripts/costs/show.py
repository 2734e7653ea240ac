"""How figures are shown: no more digits than they are worth, plain tables, JSON where AS=json asks for it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from common.problems import Problem
from common.text import clean


def wants_json() -> bool:
    """AS=json. Raises Problem for anything else that is set."""
    wanted = os.environ.get("AS", "")
    if wanted not in ("", "json"):
        raise Problem(f"AS={clean(wanted)[:40]} is unknown; known is json, or leave it empty for text")
    return wanted == "json"


def whole_number(name: str, default: int, highest: int) -> int:
    """An environment variable that is a number from 1 to `highest`. Raises Problem."""
    value = os.environ.get(name, "")
    if not value:
        return default
    if not (value.isascii() and value.isdigit()) or not 1 <= int(value[:20]) <= highest:
        raise Problem(
            f"{name} must be a whole number from 1 to {highest}, not {clean(value)[:40]}. Try: {name}={default}"
        )
    return int(value)


def two_digits(value: float) -> str:
    """Two significant digits, the most that an estimate is worth: 0.037, 1.0, 16, 130."""
    if value <= 0:
        return "0"
    rounded = float(f"{value:.2g}")
    return f"{rounded:.{max(0, 1 - math.floor(math.log10(rounded)))}f}"


def cents(value: float) -> str:
    """An amount of money that was counted: to the cent; what is less than one cent is said so."""
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    whole = int(abs(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Columns as wide as they must be; the last one is not padded. What is shown may be a server's words: cleaned."""
    lines = [[" ".join(clean(cell).split()) for cell in row] for row in [head, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head) - 1)]
    return [
        indent + "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    ]
