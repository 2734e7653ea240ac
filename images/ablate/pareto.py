# SPDX-License-Identifier: AGPL-3.0-or-later
"""The picture of all trials: refusals against damage, the Pareto front, the gates, the chosen one; as PNG and as a page.

Both are drawn from one `Chart`, so that they cannot disagree.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from common.files import write_atomic
from common.text import clean
from gates import Gates, meets
from journal import Trial
from progress import duration, figure, result, usable

PNG, HTML = "pareto.png", "pareto.html"
# Below this a divergence is what rounding leaves of zero.
ROUNDING = 1e-9
# From this ratio of largest to smallest a linear axis hides the small ones.
LINEAR_RATIO = 20.0
# The share of the height that holds what a logarithm cannot: zero at the bottom, no number at the top.
BAND = 0.08
# Okabe and Ito's colours, told apart with any colour vision; each kind has its own shape as well.
COLOURS = {"chosen": "#d55e00", "front": "#0072b2", "accepted": "#009e73", "other": "#7f7f7f", "unusable": "#b0568c"}
SHAPES = {"chosen": "*", "front": "s", "accepted": "^", "other": "o", "unusable": "x"}
NAMES = {
    "chosen": "chosen",
    "front": "on the Pareto front",
    "accepted": "meets both gates",
    "other": "other trials",
    "unusable": "KL divergence not finite",
}
NAMED_AT_MOST = 8  # trials named at a point that they share


@dataclass(frozen=True)
class Axis:
    """One axis. Places are shares of its length, 0 to 1; `ticks` are places and their labels."""

    title: str
    ticks: list[tuple[float, str]]
    gate: float  # place of the limit
    gate_title: str
    logarithmic: bool = False


@dataclass(frozen=True)
class Point:
    """One or more trials with the same figures."""

    x: float
    y: float
    kind: str  # a key of SHAPES
    trials: list[Trial]
    title: str

    @property
    def size(self) -> float:
        """Relative diameter: more trials, a little larger."""
        return (1.7 if self.kind == "chosen" else 1.0) * (1 + 0.25 * math.log10(len(self.trials)))


@dataclass(frozen=True)
class Chart:
    """What both renderings draw."""

    title: str
    summary: list[str]
    x: Axis
    y: Axis
    points: list[Point]
    front: list[tuple[float, float]]  # places of a staircase: what was reached with at most so many refusals
    base: tuple[float, str] | None  # place and title of the model before, where there is room
    chosen: tuple[float, float, str] | None  # place and label
    accepts: bool  # is there an area that passes both gates?

    @property
    def kinds(self) -> list[str]:
        """The kinds of points there are, for the legend."""
        return [kind for kind in SHAPES if any(point.kind == kind for point in self.points)]


# --- pure ------------------------------------------------------------------------------------------------------------


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other one beats, by rising refusals: each has a lower KL divergence than all before it.

    As in Heretic's own menu; trials without both figures, or with one that is not finite, are left out.
    """
    best: list[Trial] = []
    for trial in ordered([trial for trial in trials if usable(trial)]):
        if not best or _kl(trial) < _kl(best[-1]):
            best.append(trial)
    return best


def ordered(trials: Sequence[Trial]) -> list[Trial]:
    """All trials by refusals, then KL divergence; those without usable figures last."""

    def rank(trial: Trial) -> tuple[bool, bool, float, float, int]:
        measured = trial.refusals is not None
        ready = usable(trial)
        return not ready, not measured, trial.refusals or 0, _kl(trial) if ready else 0.0, trial.number

    return sorted(trials, key=rank)


def _kl(trial: Trial) -> float:
    return math.nan if trial.kl_divergence is None else trial.kl_divergence


def chart(trials: Sequence[Trial], gates: Gates, chosen: Trial | None, *, title: str) -> Chart:
    """Lay out everything that is drawn."""
    measured = [trial for trial in trials if trial.state in ("complete", "failed") and trial.refusals is not None]
    asked = max((trial.harmful_prompts or 0 for trial in measured), default=0) or gates.of
    base = next((trial.base_refusals for trial in reversed(trials) if trial.base_refusals is not None), None)
    values = [_kl(trial) for trial in measured]

    # What counts are accepted: strictly fewer than the gate's share. The limit is drawn between two counts.
    accepted = math.ceil(gates.refusals * asked / gates.of) - 1 if gates.of else -1
    x, place_x = _x_axis([trial.refusals or 0 for trial in measured], asked, accepted, gates, base)
    y, place_y = _y_axis(values, gates.kl_divergence)

    best = front(trials)
    on_front = {trial.number for trial in best}
    groups: dict[tuple[float, float], list[tuple[int, Trial]]] = {}
    kinds = list(SHAPES)
    for trial in ordered(measured):
        kind = "other"
        if not usable(trial):
            kind = "unusable"
        elif chosen and trial.number == chosen.number:
            kind = "chosen"
        elif trial.number in on_front:
            kind = "front"
        elif meets(trial, gates):
            kind = "accepted"
        at = round(place_x(trial.refusals or 0), 6), round(place_y(_kl(trial)), 6)
        groups.setdefault(at, []).append((kinds.index(kind), trial))
    points = []
    for (at_x, at_y), group in groups.items():
        group.sort(key=lambda member: member[0])  # what a point shows is the most of what its trials are
        same = [trial for _, trial in group]
        points.append(Point(at_x, at_y, kinds[group[0][0]], same, _title(same)))
    points.sort(key=lambda point: kinds.index(point.kind), reverse=True)  # the chosen one on top

    stairs: list[tuple[float, float]] = []
    for trial in best:
        at = place_x(trial.refusals or 0), place_y(_kl(trial))
        stairs += [(at[0], stairs[-1][1]), at] if stairs else [at]
    marked = next((point for point in points if point.kind == "chosen"), None)
    at_base = place_x(base) if base is not None else None
    return Chart(
        title=_one_line(title),
        summary=_summary(trials, gates, chosen, asked, base),
        x=x,
        y=y,
        points=points,
        front=stairs,
        base=(at_base, f"before: {base} of {asked}") if at_base is not None and x.gate + 0.4 < at_base <= 1 else None,
        chosen=(marked.x, marked.y, f"trial {chosen.index}") if marked and chosen else None,
        # Too few prompts prove nothing, however few of them were refused.
        accepts=accepted >= 0 and asked >= gates.of and gates.kl_divergence > 0,
    )


def _x_axis(counts: list[int], asked: int, accepted: int, gates: Gates, base: int | None) -> tuple[Axis, Any]:
    highest = max([*counts, 2 * (accepted + 1), 1])  # what is accepted never fills the picture
    # The count of the original model belongs into the picture where it does not squeeze the rest into a corner.
    if base is not None and base <= 3 * highest:
        highest = max(highest, base)
    highest = max(highest, min(asked, 5))
    margin = max(0.5, 0.03 * highest)

    def place(count: float) -> float:
        return (count + margin) / (highest + 2 * margin)

    step = _step(highest / 8, whole=True)
    ticks = [(place(count), str(count)) for count in range(0, highest + 1, int(step))]
    title = f"refusals of {asked} harmful prompts (fewer is better)"
    gate_title = f"gate: fewer than {gates.refusals} of {gates.of}{f', only {asked} asked' if asked < gates.of else ''}"
    return Axis(title, ticks, max(place(accepted + 0.5), 0.0), gate_title), place


def _y_axis(values: list[float], gate: float) -> tuple[Axis, Any]:
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > ROUNDING]
    shown = [*positive, *([gate] if gate > ROUNDING else [])]
    lowest, highest = min(shown, default=1.0), max(shown, default=1.0)
    logarithmic = highest > LINEAR_RATIO * lowest
    bottom = BAND if logarithmic and len(positive) < len(finite) else 0.0
    top = 1.0 - (BAND if len(finite) < len(values) else 0.0)

    if logarithmic:
        low, high = math.log10(lowest) - 0.15, math.log10(highest) + 0.15
        marks = _decades(low, high)
    else:
        low, high = -0.04 * highest, 1.15 * highest
        step = _step(highest / 6)
        marks = [round(step * number, 12) for number in range(int(high / step) + 1)]

    def place(value: float) -> float:
        if not math.isfinite(value):
            return (1.0 + top) / 2
        if not logarithmic:
            return bottom + (top - bottom) * (max(value, 0.0) - low) / (high - low)
        return bottom + (top - bottom) * (math.log10(value) - low) / (high - low) if value > ROUNDING else bottom / 2

    ticks = [(place(mark), _power(mark)) for mark in marks]
    if bottom:
        ticks.insert(0, (bottom / 2, "0"))
    if top < 1:
        ticks.append(((1 + top) / 2, "not finite"))
    title = f"KL divergence in nats{', log scale' if logarithmic else ''} (less is better)"
    return Axis(title, ticks, max(place(gate), 0.0), f"gate: KL below {figure(gate)}", logarithmic), place


def _decades(low: float, high: float) -> list[float]:
    """Values for the ticks of a logarithmic axis between two exponents: about four to ten of them."""
    span = high - low
    every = max(1, math.ceil(span / 9))
    factors = (1, 2, 5) if span < 3 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    marks = [factor * 10.0**exponent for exponent in exponents if exponent % every == 0 for factor in factors]
    return [mark for mark in marks if low <= math.log10(mark) <= high]


def _step(raw: float, *, whole: bool = False) -> float:
    """The next of 1, 2, 5, 10, … (and 0.1, 0.2, …) that is not below `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return max(1.0, step) if whole else step


def _power(value: float) -> str:
    """A tick's label: 0.001, 10, and powers of ten beyond what is easily read."""
    if value == 0 or 1e-3 <= value < 1e5:
        return f"{value:.6g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = f"{value / 10.0**exponent:.3g}"
    ten = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ten if factor == "1" else f"{factor}×{ten}"


def _title(trials: list[Trial]) -> str:
    """What a point says of itself."""
    names = ", ".join(str(trial.index) for trial in trials[:NAMED_AT_MOST])
    more = f" and {len(trials) - NAMED_AT_MOST} more" if len(trials) > NAMED_AT_MOST else ""
    return f"trial{'s' if len(trials) > 1 else ''} {names}{more}: {result(trials[0])}"


def _summary(trials: Sequence[Trial], gates: Gates, chosen: Trial | None, asked: int, base: int | None) -> list[str]:
    """The picture in sentences."""
    states = [trial.state for trial in trials]
    counted = ", ".join(
        f"{states.count(state)} {state}" for state in ("complete", "running", "failed", "pruned") if state in states
    )
    passing = sum(meets(trial, gates) for trial in trials)
    if chosen:
        choice = f"Chosen: trial {chosen.index}, {result(chosen)}"
    elif any(map(usable, trials)):
        choice = "No trial is chosen"
    else:
        choice = "No trial has a result yet"
    before = f"; {base} of {asked} refusals before" if base is not None else ""
    wanted = (
        f"fewer than {gates.refusals} of {gates.of} refusals, KL divergence below {figure(gates.kl_divergence)} nats"
    )
    if not trials:
        return [f"{choice}.", f"The gates: {wanted}."]
    return [
        f"{choice}{before}.",
        f"{_count(len(trials), 'trial')}: {counted}."
        f" {passing or 'None'} meet{'s' if passing == 1 else ''} both gates ({wanted}).",
    ]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


def page(drawn: Chart, rows: list[dict[str, Any]]) -> str:
    """The HTML page: the chart as SVG, and the table `rows`. Loads nothing, needs no script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    shapes = {kind: _svg_shape(kind) for kind in SHAPES}
    template = environment.get_template("pareto.html.jinja")
    return str(template.render(chart=drawn, rows=rows, colours=COLOURS, names=NAMES, shapes=shapes))


def _svg_shape(kind: str) -> str:
    """The path of a point, about 10 units wide around 0,0."""
    if kind == "chosen":
        corners = [(5.6 * (1 if i % 2 == 0 else 0.42), math.pi * i / 5 - math.pi / 2) for i in range(10)]
        return "M" + "L".join(f"{r * math.cos(a):.2f},{r * math.sin(a):.2f}" for r, a in corners) + "Z"
    return {
        "front": "M-4.2,-4.2H4.2V4.2H-4.2Z",
        "accepted": "M0,-5.2L5,4H-5Z",
        "other": "M-4,0A4,4 0 1 0 4,0A4,4 0 1 0 -4,0Z",
        "unusable": "M-4,-4L4,4M-4,4L4,-4",
    }[kind]


def table(trials: Sequence[Trial], gates: Gates, chosen: Trial | None) -> list[dict[str, Any]]:
    """One row for each trial, in the order of `ordered`, with everything as text that is shown."""
    on_front = {trial.number for trial in front(trials)}
    rows = []
    for trial in ordered(trials):
        took = trial.ended - trial.started if trial.started and trial.ended else None
        rows.append(
            {
                "index": trial.index,
                "state": trial.state,
                "refusals": "–" if trial.refusals is None else str(trial.refusals),
                "of": trial.harmful_prompts,
                "kl": figure(trial.kl_divergence),
                "exact": repr(trial.kl_divergence),
                "meets": ("yes" if meets(trial, gates) else "no") if usable(trial) else "–",
                "front": trial.number in on_front,
                "chosen": bool(chosen and chosen.number == trial.number),
                "took": duration(took) if took is not None and took >= 0 else "–",
                "direction": "per layer" if trial.direction_index is None else f"layer {trial.direction_index:.1f}",
                "parameters": [
                    (component, ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
                    for component, values in trial.parameters.items()
                ],
            }
        )
    return rows


# --- thin edge -------------------------------------------------------------------------------------------------------


def write(folder: Path, trials: Sequence[Trial], gates: Gates, chosen: Trial | None, *, title: str) -> None:
    """Write pareto.png and pareto.html into `folder`, each in one step. The same input gives the same bytes.

    `title` names the model. Raises OSError where the folder cannot be written.
    """
    drawn = chart(trials, gates, chosen, title=title)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / HTML, page(drawn, table(trials, gates, chosen)))
    _write_bytes(folder / PNG, image(drawn))


def image(drawn: Chart) -> bytes:
    """The chart as a PNG of 1600 by 1000 pixels."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a matplotlibrc of the machine does not change the picture
        matplotlib.rcParams["font.family"] = "DejaVu Sans"
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # a name in another script: boxes
        sheet = Figure(figsize=(8, 5), dpi=200, facecolor="white")
        FigureCanvasAgg(sheet)
        _draw(sheet, drawn)
        sheet.savefig(buffer, format="png", metadata={"Software": None, "Date": None})
    return buffer.getvalue()


def _draw(sheet: Any, drawn: Chart) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=4, foreground="white")]
    axes = sheet.add_axes((0.112, 0.185, 0.858, 0.645), xlim=(0, 1), ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(labelsize=8.5, color="#888888", labelcolor="#333333")
    axes.set_xticks(*zip(*drawn.x.ticks, strict=True))
    axes.set_yticks(*zip(*drawn.y.ticks, strict=True))
    axes.grid(color="#ececec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(drawn.x.title, fontsize=9.5)
    axes.set_ylabel(drawn.y.title, fontsize=9.5)

    if drawn.accepts:
        axes.add_patch(Rectangle((0, 0), drawn.x.gate, drawn.y.gate, color=COLOURS["accepted"], alpha=0.13, lw=0))
    limits = {"color": "#555555", "linewidth": 1, "linestyle": (0, (5, 3)), "zorder": 1.5}
    axes.axvline(drawn.x.gate, **limits)
    axes.axhline(drawn.y.gate, **limits)
    small = {"fontsize": 8, "color": "#444444", "path_effects": halo, "zorder": 6}
    side, place = ("left", drawn.x.gate + 0.008) if drawn.x.gate < 0.6 else ("right", drawn.x.gate - 0.008)
    axes.text(place, 1.012, drawn.x.gate_title, va="bottom", ha=side, **small)
    side, place = ("bottom", drawn.y.gate + 0.012) if drawn.y.gate < 0.93 else ("top", drawn.y.gate - 0.016)
    axes.text(0.998, place, drawn.y.gate_title, va=side, ha="right", **small)
    if drawn.base:
        place, words = drawn.base
        axes.axvline(place, color="#999999", linewidth=1, linestyle=":", zorder=1.4)
        axes.text(place - 0.008, 1.012, words, va="bottom", ha="right", **small)

    if len(drawn.front) > 1:
        axes.plot(*zip(*drawn.front, strict=True), color=COLOURS["front"], linewidth=1.4, zorder=2.5)
    for kind in drawn.kinds:
        points = [point for point in drawn.points if point.kind == kind]
        axes.scatter(
            [point.x for point in points],
            [point.y for point in points],
            s=[(5.2 * point.size) ** 2 * (1.6 if kind == "chosen" else 1) for point in points],
            marker=SHAPES[kind],
            color=COLOURS[kind],
            alpha=0.6 if kind == "other" else 1.0,
            linewidths=1.3 if kind == "unusable" else 0.5,
            edgecolors=None if kind == "unusable" else "white",
            zorder=3 + len(SHAPES) - list(SHAPES).index(kind),
            clip_on=False,
        )
        axes.scatter(
            [],
            [],
            s=(6.5 if kind == "chosen" else 5.2) ** 2 * 1.5,
            marker=SHAPES[kind],
            color=COLOURS[kind],
            label=NAMES[kind],
        )
    if drawn.chosen:
        place_x, place_y, words = drawn.chosen
        above = place_y < 0.1  # below the front nothing is drawn
        axes.annotate(
            words, (place_x, place_y), xytext=(0, 8 if above else -8), textcoords="offset points",
            ha="center", va="bottom" if above else "top",
            fontsize=9, fontweight="bold", color="#a34700", path_effects=halo, zorder=9,
        )  # fmt: skip
    if not drawn.points:
        axes.text(0.75, 0.5, "no results yet", ha="center", va="center", fontsize=13, color="#888888")
    else:
        sheet.legend(
            loc="lower center", ncols=len(drawn.kinds), fontsize=8.5, frameon=False, bbox_to_anchor=(0.5375, 0.005),
            handletextpad=0.3, columnspacing=1.6,
        )  # fmt: skip
    # A model's name is not mathematics: $ stands for itself.
    sheet.text(0.02, 0.955, shorten(drawn.title, 64), fontsize=13, fontweight="bold", parse_math=False, va="center")
    sheet.text(0.02, 0.905, drawn.summary[0], fontsize=9.5, color="#444444", va="center")


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` characters; what is lost is its middle, because names differ at both ends."""
    if len(text) <= limit:
        return text
    tail = limit // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def _write_bytes(path: Path, data: bytes) -> None:
    """As `write_atomic`, for bytes."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
