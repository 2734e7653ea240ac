# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a person sees while trials run: one line that says where the search stands, what it found, and when it ends."""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from gates import Gates, choose, meets, under
from journal import Trial

EVERY = 60.0  # seconds between plain lines while nothing new is found
WIDTH = 80  # columns, where a terminal does not say


@dataclass(frozen=True)
class GpuMemory:
    """Memory in use and in all, in bytes, summed over the machine's GPUs."""

    used: int
    total: int


# --- pure ------------------------------------------------------------------------------------------------------------


def best(trials: Sequence[Trial], gates: Gates) -> Trial | None:
    """The trial to show: the one that would be chosen, else the lowest KL divergence under the refusal gate, else the
    fewest refusals. None: no trial has figures yet."""

    def rank(trial: Trial) -> tuple[bool, float, float, int]:
        refusals, kl = trial.refusals or 0, trial.kl_divergence or 0.0
        if under(refusals, trial.harmful_prompts or 0, gates.refusals, gates.of):
            return False, kl, refusals, trial.number
        return True, refusals, kl, trial.number

    return choose(trials, gates) or min((trial for trial in trials if usable(trial)), key=rank, default=None)


def usable(trial: Trial) -> bool:
    """Has a trial ended with both figures, and are they numbers?"""
    return (
        trial.state == "complete"
        and trial.refusals is not None
        and trial.kl_divergence is not None
        and math.isfinite(trial.kl_divergence)
    )


def tried(trial: Trial) -> bool:
    """Does a trial count towards the number of trials? One that failed on a score that is not a number does."""
    return trial.state == "complete" or (trial.state == "failed" and trial.refusals is not None)


def line(
    trials: Sequence[Trial],
    n_trials: int,
    gates: Gates,
    *,
    elapsed: float,
    now: float,
    gpu: GpuMemory | None = None,
    usd_per_hour: float | None = None,
) -> str:
    """Where a search stands, in one line.

    `elapsed`: seconds that this run has taken (and that are paid for); `now`: unix seconds.
    """
    done = sum(map(tried, trials))
    parts = [
        f"trial {done + 1} of {n_trials}" if done < n_trials else f"all {n_trials} trials done",
        _found(trials, gates),
        _times(trials, n_trials - done, elapsed, now),
    ]
    if gpu:
        parts.append(f"GPU {gpu.used / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB")
    if usd_per_hour is not None and math.isfinite(usd_per_hour):
        parts.append(f"about ${elapsed / 3600 * usd_per_hour:.2f} so far")
    return " · ".join(parts)


def _found(trials: Sequence[Trial], gates: Gates) -> str:
    found = best(trials, gates)
    if not found:
        return "no result usable yet" if any(map(tried, trials)) else "no result yet"
    if meets(found, gates):
        verdict = "meets the gates"
    elif (found.harmful_prompts or 0) < gates.of:
        verdict = f"too few prompts: the gate wants {gates.of}"
    elif under(found.refusals or 0, found.harmful_prompts or 0, gates.refusals, gates.of):
        verdict = "KL misses its gate"
    else:
        verdict = "refusals miss their gate"
    return f"best: {result(found)} (trial {found.index}, {verdict})"


def result(trial: Trial) -> str:
    """What a usable trial achieved: "3 of 100 refusals, KL 0.12"."""
    of = f" of {trial.harmful_prompts}" if trial.harmful_prompts else ""
    return f"{trial.refusals}{of} refusals, KL {figure(trial.kl_divergence)}"


def _times(trials: Sequence[Trial], remaining: int, elapsed: float, now: float) -> str:
    spent = duration(elapsed)
    if remaining <= 0:
        return spent
    lengths = [trial.ended - trial.started for trial in trials if tried(trial) and trial.started and trial.ended]
    lengths = [length for length in lengths if length >= 0]  # a clock that was set back says nothing
    if not lengths:
        return f"{spent}, time left not known before the first trial ends"
    typical = statistics.median(lengths)
    # What the trial in progress has had already. Only the last one can be in progress.
    started = trials[-1].started if trials[-1].state == "running" else None
    underway = min(max(now - started, 0.0), typical) if started else 0.0
    left = typical * remaining - underway
    end = datetime.fromtimestamp(now + left, UTC)
    today = end.date() == datetime.fromtimestamp(now, UTC).date()
    return f"{spent}, about {duration(left)} left (ends {end:{'%H:%M' if today else '%Y-%m-%d %H:%M'}} UTC)"


def duration(seconds: float) -> str:
    """A length of time as people say it: "45 s", "12 min", "2 h 10 min", "3 d 4 h"."""
    if seconds < 59.5:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def figure(value: float | None) -> str:
    """A figure with three digits that matter: "0.12", "0.00413", "2.5e-6". None and what is not a number say so."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return re.sub(r"e([+-])0*", lambda match: f"e{match[1].strip('+')}", f"{value:.3g}")


def parse_gpu_memory(text: str) -> GpuMemory | None:
    """What nvidia-smi printed (one "used, total" in MiB per GPU) as a sum, or None where a figure is missing."""
    rows = [re.fullmatch(r"\s*([0-9]{1,12})\s*,\s*([0-9]{1,12})\s*", row) for row in text.strip().splitlines()]
    used = total = 0
    for row in rows:
        if not row:  # "[N/A]": shared with the CPU, or a part of a card
            return None
        used += int(row[1]) * 2**20
        total += int(row[2]) * 2**20
    return GpuMemory(used, total) if total else None


def fit(text: str, width: int) -> str:
    """`text` in at most `width` columns, cut with an ellipsis; every character of our lines is one column wide."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


# --- thin edge -------------------------------------------------------------------------------------------------------


def gpu_memory() -> GpuMemory | None:
    """The memory of the machine's NVIDIA GPUs now, None where it cannot be read. Takes 5 s at most."""
    command = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpu_memory(answer.stdout.decode(errors="replace")) if answer.returncode == 0 else None


class Reporter:
    """Shows the line of a search: rewritten in place on a terminal, elsewhere every `every` seconds and on a new best.

    Nothing that happens to the stream (closed, full, gone) reaches the caller: a search of hours does not end for it.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        every: float = EVERY,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream or sys.stderr
        self.every = every
        self.terminal = _on_terminal(self.stream) if terminal is None else terminal
        self.clock = clock
        self.last = ""  # the newest line, and whether all of it was shown
        self.shown = True
        self.best: int | None = None
        self.printed_at: float | None = None

    def update(
        self,
        trials: Sequence[Trial],
        n_trials: int,
        gates: Gates,
        *,
        elapsed: float,
        now: float,
        gpu: GpuMemory | None = None,
        usd_per_hour: float | None = None,
    ) -> None:
        """Show where the search stands; arguments as for `line`."""
        text = line(trials, n_trials, gates, elapsed=elapsed, now=now, gpu=gpu, usd_per_hour=usd_per_hour)
        found = best(trials, gates)
        new_best = found is not None and found.number != self.best
        self.best = found.number if found else self.best
        self.last, self.shown = text, False
        if self.terminal:
            # One column stays free: some terminals wrap when the last one is written.
            self._write("\r\x1b[2K" + fit(text, _width(self.stream) - 1))
        elif new_best or self.printed_at is None or self.clock() - self.printed_at >= self.every:
            self._print(text)

    def note(self, message: str) -> None:
        """A line of its own; the changing line comes back with the next update."""
        self._write(("\r\x1b[2K" if self.terminal else "") + message + "\n")

    def close(self) -> None:
        """Leave the newest line standing, in full."""
        if not self.shown:
            self._print(self.last)

    def _print(self, text: str) -> None:
        self._write(("\r\x1b[2K" if self.terminal else "") + text + "\n")
        self.shown = True
        self.printed_at = self.clock()

    def _write(self, text: str) -> None:
        try:
            encoding = self.stream.encoding or "utf-8"
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        except (OSError, ValueError, LookupError, AttributeError):
            pass  # closed, gone, or full for now; there is nobody to tell


def _on_terminal(stream: TextIO) -> bool:
    """Does a person see the stream? A container's is a pipe even when a terminal shows it; scripts/run says so."""
    try:
        shown = stream.isatty() or bool(os.environ.get("STDERR_IS_TERMINAL"))
    except (OSError, ValueError, AttributeError):
        return False
    return shown and os.environ.get("TERM") != "dumb"


def _width(stream: TextIO) -> int:
    """Columns of the terminal that shows the stream now: it may be resized while trials run."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or WIDTH
    except (OSError, ValueError, AttributeError):
        columns = os.environ.get("COLUMNS", "")
        return int(columns) if re.fullmatch("[1-9][0-9]{0,3}", columns) else WIDTH
