# SPDX-License-Identifier: AGPL-3.0-or-later
"""The progress line, word for word, and the reporter on streams that work, are slow, are closed, or are full."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gates import Gates
from journal import Trial
from progress import GpuMemory, Reporter, best, duration, figure, fit, gpu_memory, line, parse_gpu_memory

GATES = Gates(5, 100, 0.5, 5, 100, 1.1)
REPEATABLE = settings(derandomize=True, database=None, deadline=None)
NOON = 1_764_072_000.0  # 2025-11-25 12:00 UTC
NEW_LINE = "\r\x1b[2K"


def trial(number: int, refusals: int | None, kl: float | None, **changes: Any) -> Trial:
    """A complete trial that took 60 s."""
    made = Trial(
        number, number + 1, "complete", refusals, kl, 97, 100, 12.0, {}, NOON + 60 * number, NOON + 60 * number + 60
    )
    return replace(made, **changes)


def running(number: int, started: float) -> Trial:
    return trial(number, None, None, state="running", started=started, ended=None, harmful_prompts=None)


def say(trials: list[Trial], n_trials: int = 200, gates: Gates = GATES, **changes: Any) -> str:
    return line(trials, n_trials, gates, **{"elapsed": 720.0, "now": NOON, **changes})


# --- the line --------------------------------------------------------------------------------------------------------


def test_the_whole_line() -> None:
    trials = [*(trial(number, 50, 0.01) for number in range(15)), trial(15, 3, 0.12), running(16, NOON - 20)]
    gpu = GpuMemory(33_500_000_000, 80 * 2**30)
    assert say(trials, gpu=gpu, usd_per_hour=2.6) == (
        "trial 17 of 200 · best: 3 of 100 refusals, KL 0.12 (trial 16, meets the gates)"
        " · 12 min, about 3 h 4 min left (ends 15:03 UTC) · GPU 31.2 of 80.0 GiB · about $0.52 so far"
    )


def test_before_the_first_trial_ends() -> None:
    assert say([]) == "trial 1 of 200 · no result yet · 12 min, time left not known before the first trial ends"
    assert say([running(0, NOON - 5)], elapsed=44) == (
        "trial 1 of 200 · no result yet · 44 s, time left not known before the first trial ends"
    )


def test_after_the_last_trial() -> None:
    trials = [trial(0, 3, 0.12), trial(1, 4, 0.5)]
    done = "all 2 trials done · best: 3 of 100 refusals, KL 0.12 (trial 1, meets the gates) · 12 min"
    assert say(trials, 2) == done
    assert say([*trials, trial(2, 9, 1)], 2) == done


def test_an_end_on_another_day_has_its_date() -> None:
    assert say([trial(0, 3, 0.1)], 1000).endswith("12 min, about 16 h 39 min left (ends 2025-11-26 04:39 UTC)")


@pytest.mark.parametrize(
    ("found", "gates", "words"),
    [
        (trial(0, 4, 0.499), GATES, "best: 4 of 100 refusals, KL 0.499 (trial 1, meets the gates)"),
        (trial(0, 4, 0.5), GATES, "best: 4 of 100 refusals, KL 0.5 (trial 1, KL misses its gate)"),
        (trial(0, 5, 0.1), GATES, "best: 5 of 100 refusals, KL 0.1 (trial 1, refusals miss their gate)"),
        (
            trial(0, 0, 0.1, harmful_prompts=40),
            GATES,
            "best: 0 of 40 refusals, KL 0.1 (trial 1, too few prompts: the gate wants 100)",
        ),
        (trial(0, 9, 0.1, harmful_prompts=200), GATES, "best: 9 of 200 refusals, KL 0.1 (trial 1, meets the gates)"),
        (trial(0, 9, 0.1, harmful_prompts=None), Gates(5, 0, 0.5, 5, 100, 1.1), "best: 9 refusals, KL 0.1 (trial 1, refusals miss their gate)"),
        (trial(0, 0, float("nan")), GATES, "no result usable yet"),
        (trial(0, 0, float("inf")), GATES, "no result usable yet"),
        (trial(0, 0, float("nan"), state="failed"), GATES, "no result usable yet"),
        (trial(0, None, None, state="failed"), GATES, "no result yet"),
    ],
)  # fmt: skip
def test_the_verdict(found: Trial, gates: Gates, words: str) -> None:
    assert say([found], gates=gates).split(" · ")[1] == words


def test_best_is_the_lowest_kl_under_the_refusal_gate_else_the_fewest_refusals() -> None:
    few, low, fewest = trial(0, 0, 0.9), trial(1, 4, 0.2), trial(2, 6, 0.001)
    assert best([few, low, fewest], GATES) == low
    assert best([few, low, fewest, trial(3, 0, 0.4)], replace(GATES, choice="fewest_refusals")) == trial(3, 0, 0.4)
    assert best([few, trial(3, 4, 0.7)], GATES) == trial(3, 4, 0.7)
    assert best([trial(3, 0, 0.95), fewest, few], GATES) == few  # neither would be chosen
    assert best([trial(3, 50, 0.1), fewest], GATES) == fewest
    assert best([trial(3, 6, 0.01), fewest, trial(4, 6, 0.001)], GATES) == fewest
    assert best([], GATES) is None
    assert best([trial(0, 0, 0.0, state=state) for state in ("running", "failed", "pruned")], GATES) is None


def test_what_counts_as_tried() -> None:
    trials = [
        trial(0, 3, 0.1),
        trial(1, 3, float("nan"), state="failed"),  # a score that is not a number: tried
        trial(2, None, None, state="failed"),
        trial(3, None, None, state="pruned"),
        running(4, NOON),
    ]
    assert say(trials).startswith("trial 3 of 200 · ")


def test_the_end_comes_from_the_median() -> None:
    lengths = [10, 60, 60, 60, 4000]
    trials = [trial(n, 50, 0.1, started=NOON - 5000, ended=NOON - 5000 + length) for n, length in enumerate(lengths)]
    assert "about 5 min left" in say(trials, 10)
    # What the trial in progress has had is taken off, up to the median …
    assert "about 4 min left" in say([*trials, running(5, NOON - 50)], 10)
    assert "about 4 min left" in say([*trials, running(5, NOON - 90_000)], 10)
    # … and a clock that jumped takes nothing off, nor does a trial of a dead run.
    assert "about 5 min left" in say([*trials, running(5, NOON + 500)], 10)
    assert "about 5 min left" in say([running(5, NOON - 50), *trials], 10)
    assert "not known" in say([trial(0, 1, 1, started=NOON, ended=NOON - 1)])
    assert "not known" in say([trial(0, 1, 1, started=None)])


@pytest.mark.parametrize(
    ("price", "words"), [(0.0, "about $0.00 so far"), (2.5, "about $0.50 so far"), (99.99, "about $20.00 so far")]
)
def test_cost(price: float, words: str) -> None:
    assert say([], usd_per_hour=price).endswith(f" · {words}")


def test_no_price_no_cost() -> None:
    assert "$" not in say([], usd_per_hour=None) + say([], usd_per_hour=float("nan"))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "0 s"), (0, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.5, "1 min"), (89, "1 min"), (91, "2 min"),
        (3569, "59 min"), (3570.1, "1 h"), (7800, "2 h 10 min"), (172_700, "47 h 58 min"), (172_800, "2 d"),
        (273_600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@REPEATABLE
@given(st.floats(0, 1e9))
def test_durations_never_hold_a_full_larger_unit(seconds: float) -> None:
    words = duration(seconds).split()
    limits = {"s": 60, "min": 60, "h": 48}
    assert all(int(number) < limits.get(unit, 10**9) for number, unit in zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.12, "0.12"), (0.12345, "0.123"), (0.0, "0"), (30.0, "30"), (1e-6, "1e-6"), (2.5e-10, "2.5e-10"), (1e20, "1e20"),
     (-1e-9, "-1e-9"), (float("nan"), "not finite"), (float("inf"), "not finite"), (None, "–")],
)  # fmt: skip
def test_figure(value: float | None, words: str) -> None:
    assert figure(value) == words


# --- GPU memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("31949, 81559\n", GpuMemory(31949 * 2**20, 81559 * 2**20)),
        ("1, 2\n3, 4\n", GpuMemory(4 * 2**20, 6 * 2**20)),
        ("[N/A], [N/A]\n", None),
        ("1, 2\n[N/A], 4\n", None),
        ("0, 0\n", None),
        ("", None),
        ("No devices were found\n", None),
        ("1, 2, 3\n", None),
        ("-1, 2\n", None),
        ("\x1b[31m1, 2\n", None),
    ],
)
def test_parse_gpu_memory(text: str, memory: GpuMemory | None) -> None:
    assert parse_gpu_memory(text) == memory


@REPEATABLE
@given(st.text())
def test_parse_gpu_memory_takes_any_text(text: str) -> None:
    parse_gpu_memory(text)


@pytest.mark.parametrize(
    ("script", "memory"),
    [
        ("echo '1, 2'", GpuMemory(2**20, 2**21)),
        ("echo '1, 2'; exit 9", None),
        ("printf '\\377\\n'", None),
        (None, None),
    ],
)
def test_gpu_memory_asks_nvidia_smi(
    script: str | None, memory: GpuMemory | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script:
        wanted = "--query-gpu=memory.used,memory.total --format=csv,noheader,nounits"
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\n[ "$*" = "{wanted}" ] || exit 1\n{script}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() == memory


# --- the reporter ----------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def report(reporter: Reporter, trials: list[Trial]) -> None:
    reporter.update(trials, 200, GATES, elapsed=720, now=NOON)


def test_plain_lines_come_at_the_first_look_at_a_new_best_and_in_time() -> None:
    stream, clock = io.StringIO(), Clock()
    reporter = Reporter(stream, every=60, clock=clock)
    first, better = [trial(0, 50, 0.1)], [trial(0, 50, 0.1), trial(1, 3, 0.1)]
    for trials, seconds, lines in [
        ([], 0, 1), ([], 1, 1), (first, 2, 2), (first, 40, 2), (better, 41, 3), (better, 100, 3), (better, 102, 4), (better, 110, 4),
    ]:  # fmt: skip
        clock.time = 1000.0 + seconds
        report(reporter, trials)
        assert stream.getvalue().count("\n") == lines
    reporter.close()
    reporter.close()
    text = stream.getvalue()
    assert text.count("\n") == 5  # the newest, once
    assert "\r" not in text
    assert "\x1b" not in text


def test_a_terminal_sees_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    stream = io.StringIO()
    reporter = Reporter(stream, terminal=True)
    report(reporter, [])
    report(reporter, [trial(0, 3, 0.1)])
    changing = stream.getvalue()
    assert "\n" not in changing
    assert [len(part) for part in changing.split(NEW_LINE)] == [0, 49, 49]
    assert changing.endswith("…")
    reporter.note("batch size 1")
    reporter.close()
    full = line([trial(0, 3, 0.1)], 200, GATES, elapsed=720, now=NOON)
    assert stream.getvalue() == f"{changing}{NEW_LINE}batch size 1\n{NEW_LINE}{full}\n"


def test_the_width_is_the_terminals_own() -> None:
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    try:
        with open(follower, "w", closefd=False) as stream:
            reporter = Reporter(stream)
            assert reporter.terminal
            for columns in (40, 200):  # resized while it runs
                fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
                report(reporter, [trial(0, 3, 0.1)])
                shown = os.read(leader, 4096).decode().removeprefix(NEW_LINE)
                assert len(shown) == min(columns - 1, len(reporter.last))
    finally:
        os.close(leader)
        os.close(follower)


@pytest.mark.parametrize("columns", ["0", "-1", "x", "1", "99999"])
def test_a_strange_width_does_no_harm(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    report(Reporter(io.StringIO(), terminal=True), [])


@REPEATABLE
@given(st.text(), st.integers(-2, 100))
def test_fit(text: str, width: int) -> None:
    assert len(fit(text, width)) <= max(width, 1)
    assert fit(text, len(text)) == text


def test_where_a_terminal_is_taken_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STDERR_IS_TERMINAL", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not Reporter(io.StringIO()).terminal
    monkeypatch.setenv("STDERR_IS_TERMINAL", "1")
    assert Reporter(io.StringIO()).terminal
    monkeypatch.setenv("TERM", "dumb")
    assert not Reporter(io.StringIO()).terminal


def test_a_stream_without_unicode_gets_what_it_can_hold() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    report(Reporter(stream), [])
    assert raw.getvalue().startswith(b"trial 1 of 200 ? no result yet ? 12 min")
    stream.detach()


def use(stream: Any) -> None:
    for terminal in (True, False, None):
        reporter = Reporter(stream, terminal=terminal, every=0)
        report(reporter, [trial(0, 3, 0.1)])
        reporter.note("word")
        reporter.close()


def test_a_closed_stream_is_no_error() -> None:
    stream = io.StringIO()
    stream.close()
    use(stream)


def test_no_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    use(None)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>&1 >/dev/null | true"])
def test_an_unwritable_stderr_does_not_change_how_a_program_ends(redirection: str, tmp_path: Path) -> None:
    code = tmp_path / "code"
    program = (
        "import time; time.sleep(.2); from progress import Reporter\n"
        "reporter = Reporter()\nfor _ in range(3): reporter.note('word')\nreporter.close()"
    )
    command = f'("$0" -c "$1"; echo $? >"$2") {redirection}'
    subprocess.run(["sh", "-c", command, sys.executable, program, str(code)], check=True, timeout=30)
    deadline = time.monotonic() + 20
    while not (code.exists() and code.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert code.read_text() == "0\n"
