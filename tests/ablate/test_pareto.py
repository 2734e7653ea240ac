# SPDX-License-Identifier: AGPL-3.0-or-later
"""The picture of all trials: what is on the front, where things are drawn, and what the two files hold."""

from __future__ import annotations

import io
import math
import random
import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gates import Gates, choose, meets
from journal import Trial
from pareto import COLOURS, SHAPES, Chart, _write_bytes, chart, front, image, ordered, page, shorten, table, write

GATES = Gates(5, 100, 0.5, 5, 100, 1.1)
REPEATABLE = settings(derandomize=True, database=None, deadline=None)
HOSTILE = "a/b\x1b[31m $x^2$ <script>alert('1')</script>\n\"&\u202e モデル"


def trial(number: int, refusals: int | None, kl: float | None, **changes: Any) -> Trial:
    made = Trial(number, number + 1, "complete", refusals, kl, 97, 100, 12.0, {}, 1000.0, 1028.0)
    return replace(made, **changes)


RUNNING = trial(0, None, None, state="running", harmful_prompts=None, base_refusals=None, ended=None)
FAILED = trial(1, 50, math.nan, state="failed")


def study(count: int) -> list[Trial]:
    """As a search finds them: fewer refusals cost more divergence."""
    draw = random.Random(3)
    found = []
    for number in range(count):
        strength = draw.betavariate(1.2, 1.2)
        refusals = min(100, max(0, int(97 * (1 - strength) ** 2.2 + draw.gauss(0, 3))))
        kl = 0.002 * math.exp(5.5 * strength + draw.gauss(0, 0.7))
        weights = {"attn.o_proj": {"max_weight": 1.25, "min_weight": draw.random()}}
        found.append(trial(number, refusals, kl, parameters=weights, direction_index=None if number % 3 else 17.26))
    return found


EXTREME = [
    trial(0, 97, 1e-6), trial(1, 60, 0.0), trial(2, 1, 30.0), trial(3, 2, 0.4), replace(FAILED, number=4, index=5),
    trial(5, 3, math.inf), trial(6, 20, 1e-4), trial(7, 9, -1e-9), trial(8, None, None, state="failed"),
    replace(RUNNING, number=9, index=10),
]  # fmt: skip
STUDIES: dict[str, list[Trial]] = {
    "none": [],
    "running": [RUNNING],
    "one": [trial(0, 3, 0.12)],
    "one refuses all": [trial(0, 97, 0.0)],
    "failed only": [FAILED],
    "200": study(200),
    "200 alike": [trial(number, 97, 0.0) for number in range(200)],
    "200 alike and good": [trial(number, 2, 0.03) for number in range(200)],
    "none under the gates": [trial(number, 40 + number, 0.6 + number / 100) for number in range(50)],
    "extreme": EXTREME,
    "huge": [trial(0, 10**6, 1e300, harmful_prompts=10**6), trial(1, 0, 5e-324, harmful_prompts=10**6)],
    "40 prompts": [trial(number, number, 0.002 * number, harmful_prompts=40, base_refusals=40) for number in range(30)],
}
# Any study that a journal can hold.
numbers = st.one_of(st.none(), st.floats(), st.floats(0, 1), st.sampled_from([0.0, 0.1, 1e-6, 30.0]))
any_trial = st.builds(
    Trial,
    number=st.integers(0, 300), index=st.integers(1, 301), state=st.sampled_from(["complete", "running", "failed", "pruned"]),
    refusals=st.none() | st.integers(0, 100), kl_divergence=numbers, base_refusals=st.none() | st.integers(0, 100),
    harmful_prompts=st.none() | st.integers(0, 100), direction_index=st.none() | st.floats(0, 80),
    parameters=st.just({}), started=st.none() | st.floats(1, 1e9), ended=st.none() | st.floats(1, 1e9),
)  # fmt: skip
any_study = st.lists(any_trial, max_size=12, unique_by=lambda made: made.number)
any_gates = st.builds(
    Gates, st.integers(0, 50), st.integers(1, 100), st.floats(0, 10), st.just(5), st.just(100), st.just(1.1)
)


def drawn(trials: list[Trial], gates: Gates = GATES, title: str = "m") -> Chart:
    return chart(trials, gates, choose(trials, gates), title=title)


# --- the front -------------------------------------------------------------------------------------------------------


def test_front_keeps_what_improves() -> None:
    a, b, c, d, e = trial(0, 9, 0.1), trial(1, 3, 0.2), trial(2, 3, 0.3), trial(3, 5, 0.2), trial(4, 9, 0.1)
    assert front([a, b, c, d, e]) == [b, a]
    assert front(list(reversed([a, b, c, d, e]))) == [b, a]
    assert front([trial(0, 1, math.nan), trial(1, 2, math.inf), FAILED, RUNNING]) == []


@REPEATABLE
@given(any_study)
def test_front_is_what_nothing_beats(trials: list[Trial]) -> None:
    best = front(trials)
    candidates = [
        (made.refusals, made.kl_divergence, made)
        for made in trials
        if made.state == "complete" and made.refusals is not None and made.kl_divergence is not None and math.isfinite(made.kl_divergence)
    ]  # fmt: skip
    for refusals, kl, made in candidates:
        beaten = any(r <= refusals and k <= kl and (r, k) != (refusals, kl) for r, k, _ in candidates)
        if made in best:
            assert not beaten
        elif not beaten:  # then its figures are on the front already
            assert (refusals, kl) in [(other.refusals, other.kl_divergence) for other in best]
    figures = [(made.refusals or 0, made.kl_divergence or 0.0) for made in best]
    assert all(r1 < r2 and k1 > k2 for (r1, k1), (r2, k2) in pairwise(figures))


def test_ordered_puts_what_has_no_figures_last() -> None:
    assert [made.number for made in ordered(EXTREME)] == [2, 3, 7, 6, 1, 0, 5, 4, 8, 9]


# --- the chart -------------------------------------------------------------------------------------------------------


@settings(REPEATABLE, max_examples=300)
@given(any_study, any_gates, st.booleans())
def test_everything_lies_inside(trials: list[Trial], gates: Gates, chooses: bool) -> None:
    made = chart(trials, gates, choose(trials, gates) if chooses else None, title="m")
    places = [place for point in made.points for place in (point.x, point.y)]
    places += [place for corner in made.front for place in corner]
    places += [place for axis in (made.x, made.y) for place in [axis.gate, *(tick for tick, _ in axis.ticks)]]
    assert all(0 <= place <= 1 for place in places)
    for axis in (made.x, made.y):
        at = [place for place, _ in axis.ticks]
        labels = [label for _, label in axis.ticks]
        assert 2 <= len(at) <= 16
        assert at == sorted(at)
        assert len(set(labels)) == len(labels)
    # Inside the shaded area is exactly what meets the gates.
    for point in made.points:
        inside = made.accepts and point.x < made.x.gate and point.y < made.y.gate
        for member in point.trials:
            if member.harmful_prompts == max(other.harmful_prompts or 0 for p in made.points for other in p.trials):
                assert not meets(member, gates) or inside


@pytest.mark.parametrize("name", STUDIES)
def test_points_hold_every_measured_trial_once(name: str) -> None:
    made = drawn(STUDIES[name])
    held = sorted(member.number for point in made.points for member in point.trials)
    assert held == sorted(t.number for t in STUDIES[name] if t.state != "running" and t.refusals is not None)


def test_the_limit_lies_between_the_last_accepted_count_and_the_next() -> None:
    made = drawn([trial(0, 4, 0.499), trial(1, 5, 0.5)])
    at = {member.number: point for point in made.points for member in point.trials}
    assert at[0].x < made.x.gate < at[1].x
    assert at[0].y < made.y.gate <= at[1].y
    assert made.accepts


def test_too_few_prompts_shade_nothing() -> None:
    made = drawn(STUDIES["40 prompts"])
    assert not made.accepts
    assert made.x.gate_title == "gate: fewer than 5 of 100, only 40 asked"
    assert made.chosen is None


def test_a_logarithm_only_where_it_is_needed() -> None:
    assert drawn([trial(0, 1, 0.1), trial(1, 1, 1.0)]).y.title == "KL divergence in nats (less is better)"
    extreme = drawn(EXTREME)
    assert extreme.y.title == "KL divergence in nats, log scale (less is better)"
    zero = next(point.y for point in extreme.points if point.trials[0].kl_divergence == 0.0)
    assert (zero, "0") == extreme.y.ticks[0]
    assert [label for _, label in extreme.y.ticks] == [
        "0", "10⁻⁶", "10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1", "1", "10", "not finite",
    ]  # fmt: skip


def test_titles_name_trials_that_share_a_point() -> None:
    (point,) = drawn(STUDIES["200 alike and good"]).points
    assert point.title == "trials 1, 2, 3, 4, 5, 6, 7, 8 and 192 more: 2 of 100 refusals, KL 0.03"
    assert point.kind == "chosen"
    (point,) = drawn([trial(0, 50, 0.7)]).points
    assert point.title == "trial 1: 50 of 100 refusals, KL 0.7"


def test_summaries() -> None:
    gates = "fewer than 5 of 100 refusals, KL divergence below 0.5 nats"
    assert drawn([]).summary == ["No trial has a result yet.", f"The gates: {gates}."]
    assert drawn([RUNNING]).summary[0] == "No trial has a result yet."
    assert drawn(EXTREME).summary == [
        "Chosen: trial 4, 2 of 100 refusals, KL 0.4; 97 of 100 refusals before.",
        f"10 trials: 7 complete, 1 running, 2 failed. 1 meets both gates ({gates}).",
    ]
    assert drawn(STUDIES["none under the gates"]).summary == [
        "No trial is chosen; 97 of 100 refusals before.",
        f"50 trials: 50 complete. None meet both gates ({gates}).",
    ]


@REPEATABLE
@given(st.text(), st.integers(1, 30))
def test_shorten(text: str, limit: int) -> None:
    assert len(shorten(text, limit)) == min(len(text), limit)


def test_shorten_keeps_both_ends() -> None:
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert shorten("abcdefghij", 10) == "abcdefghij"


# --- the files -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would see: each element with its attributes, in order, and whether it is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def chunks(png: bytes) -> dict[str, bytes]:
    """The chunks of a PNG, each checked against its CRC."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    found: dict[str, bytes] = {}
    at = 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        found[kind.decode()] = found.get(kind.decode(), b"") + data
        at += 12 + length
    return found


@pytest.fixture(autouse=True)
def _matplotlib_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written outside the tests' own folder."""
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path_factory.getbasetemp() / "matplotlib"))


@pytest.mark.parametrize("name", STUDIES)
def test_write(name: str, tmp_path: Path) -> None:
    trials = STUDIES[name]
    for folder in ("a", "b/new"):
        write(tmp_path / folder, trials, GATES, choose(trials, GATES), title="Qwen/Qwen3-14B")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["pareto.html", "pareto.png"]
    for file in ("pareto.html", "pareto.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b/new" / file).read_bytes()
        assert (tmp_path / "a" / file).stat().st_mode & 0o777 == 0o644
    parts = chunks((tmp_path / "a/pareto.png").read_bytes())
    assert set(parts) == {"IHDR", "pHYs", "IDAT", "IEND"}  # no time, no name of a program
    width, height, depth, colours = struct.unpack(">IIBB", parts["IHDR"][:10])
    assert (width, height, depth, colours) == (1600, 1000, 8, 6)
    assert len(zlib.decompress(parts["IDAT"])) == height * (1 + 4 * width)
    Page((tmp_path / "a/pareto.html").read_text(encoding="utf-8"))


def test_the_picture_shows_the_study_in_its_colours() -> None:
    from matplotlib.image import imread

    def coloured(trials: list[Trial], kind: str, chosen: Trial | None) -> int:
        pixels = imread(io.BytesIO(image(chart(trials, GATES, chosen, title="m"))))
        wanted = [int(COLOURS[kind][at : at + 2], 16) / 255 for at in (1, 3, 5)]
        return int((abs(pixels[..., :3] - wanted).max(axis=-1) < 0.01).sum())

    trials = STUDIES["200"]
    assert coloured(trials, "chosen", choose(trials, GATES)) > 200
    assert coloured(trials, "chosen", None) == 0
    assert coloured(trials, "front", None) > 3000
    assert coloured(trials, "accepted", None) > 1000
    assert coloured([], "front", None) == 0
    assert coloured(EXTREME, "unusable", None) > 100
    assert coloured(trials, "unusable", None) == 0


def test_a_hostile_title_stays_text(tmp_path: Path) -> None:
    write(tmp_path, [trial(0, 3, 0.1)], GATES, None, title=HOSTILE)
    text = (tmp_path / "pareto.html").read_text(encoding="utf-8")
    assert "a/b $x^2$ &lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &#34;&amp; モデル: trials</title>" in text
    seen = Page(text)
    assert seen.all("script") == []
    assert seen.words["h1"] == ["a/b $x^2$ <script>alert('1')</script> \"& モデル"]
    assert "\x1b" not in text
    assert "\u202e" not in text
    write(tmp_path, [], GATES, None, title="")
    write(tmp_path, [], GATES, None, title="$\\frac$")


def test_a_hostile_journal_stays_text() -> None:
    evil = '"><img src=x onerror=alert(1)>'
    trials = [trial(0, 3, 0.1, state="complete", parameters={evil: {evil: 1.0}})]
    seen = Page(page(drawn(trials), table(trials, GATES, None)))
    assert seen.all("img") == []


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_loads_nothing_and_needs_no_script(name: str) -> None:
    trials = STUDIES[name]
    text = page(drawn(trials), table(trials, GATES, choose(trials, GATES)))
    seen = Page(text)
    policy = [a["content"] for a in seen.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    forbidden = {"script", "link", "img", "iframe", "object", "embed", "use", "image", "base", "form", "video", "audio"}
    assert not forbidden & {tag for tag, _ in seen.elements}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:|data:", text)
    for tag, attributes in seen.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "srcset", "action")]
        if "href" in attributes:
            assert tag == "a"
            assert attributes["href"].startswith("#trial-")
    assert "prefers-color-scheme: dark" in text


def test_points_lead_to_their_rows() -> None:
    trials = STUDIES["200"]
    chosen = choose(trials, GATES)
    assert chosen
    seen = Page(page(drawn(trials), table(trials, GATES, chosen)))
    rows = [a["id"] for a in seen.all("tr") if "id" in a]
    assert len(rows) == len(set(rows)) == 200
    links = seen.all("a")
    assert {link["href"].removeprefix("#") for link in links} <= set(rows)
    assert len(links) == len(drawn(trials).points) == len([w for w in seen.words["title"] if w.startswith("trial")])
    # The keyboard reaches the front and the chosen one, and the table, which may have to be scrolled.
    reached = [link["href"] for link in links if "tabindex" not in link]
    assert sorted(reached) == sorted({f"#trial-{made.index}" for made in [*front(trials), chosen]})
    assert [a["tabindex"] for a in seen.all("div")] == ["0"]
    marked = [a["id"] for a in seen.all("tr") if a.get("class") == "is-chosen"]
    assert marked == [f"trial-{chosen.index}"]


def test_rows() -> None:
    weights = {"attn.o_proj": {"max_weight": 1.25, "min_weight": 0.33333}}
    rows = table([trial(0, 3, 0.123456, parameters=weights), FAILED, RUNNING], GATES, trial(0, 3, 0.123456))
    assert rows[0] == {
        "index": 1, "state": "complete", "refusals": "3", "of": 100, "kl": "0.123", "exact": "0.123456", "meets": "yes",
        "front": True, "chosen": True, "took": "28 s", "direction": "layer 12.0",
        "parameters": [("attn.o_proj", "max_weight 1.25, min_weight 0.333")],
    }  # fmt: skip
    assert [(row["refusals"], row["kl"], row["meets"], row["took"]) for row in rows[1:]] == [
        ("50", "not finite", "–", "28 s"), ("–", "–", "–", "–"),
    ]  # fmt: skip


def test_every_kind_has_a_shape_of_its_own() -> None:
    assert len(set(SHAPES.values())) == len(SHAPES)


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [], GATES, None, title="old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, STUDIES["200"], GATES, None, title="new")
    with pytest.raises(OSError, match="No space left"):
        _write_bytes(tmp_path / "pareto.png", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
