"""What a person sees while a job runs: one changing line on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from common.text import clean

EVERY = 30.0  # seconds between plain lines while nothing changes
COLD_START = "a worker is starting; a cold start can take a few minutes"


def on_terminal() -> bool:
    """Does a person see stderr? A container's is a pipe even when a terminal shows it; scripts/run says so."""
    return sys.stderr.isatty() or bool(os.environ.get("STDERR_IS_TERMINAL"))


class Progress:
    """Shows the state of one job and how long it has taken."""

    def __init__(self) -> None:
        self.terminal = on_terminal()
        self.started = time.monotonic()
        self.state = ""
        self.printed_at = 0.0
        self.cold = False
        self.states: list[dict[str, Any]] = []  # for run.json: each state and when it was first seen

    def show(self, view: dict[str, Any]) -> None:
        """Take note of a job's view."""
        elapsed = time.monotonic() - self.started
        state = _one_line(view.get("status", "unknown"))[:40]
        changed = state != self.state
        if changed:
            self.state = state
            self.states.append({"state": state, "after_seconds": round(elapsed, 3)})
        hint = _one_line(view.get("reason") or "") or (COLD_START if state == "IN_QUEUE" and self.cold else "")
        line = f"{state.lower().replace('_', ' ')}, {elapsed:.0f} s{f' ({hint})' if hint else ''}"
        if self.terminal:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
        elif changed or elapsed - self.printed_at >= EVERY:
            self.printed_at = elapsed
            print(line, file=sys.stderr, flush=True)

    def note(self, message: str) -> None:
        """A line of its own."""
        self.close()
        print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the changing line."""
        if self.terminal and self.state:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _one_line(words: object) -> str:
    return " ".join(clean(str(words)).split())
