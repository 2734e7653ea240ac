"""Ingest records and die by SIGKILL on the way: python -m tests.client.killed STEP [MILLISECONDS]

A step is the begin or the end of a file's writing or of a batch's embedding; the index is written between the end of one
and the begin of the next. With MILLISECONDS the process dies that long after the step.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from tests.client.support import Hashed

import ingest
import store
from records import Record

RECORDS = [
    Record(
        id=f"r{number}",
        title=f"Title {number}",
        text=f"Text {number} about naps. " * (1 + number % 3) + f"End {number}.",
    )
    for number in range(12)
]
# write records, withdraw the state, embed four batches, save three arrays of words, set the state: each with a begin and
# an end
STEPS = 20


def main(last: int, milliseconds: float) -> None:
    steps = itertools.count(1)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def step() -> None:
        if next(steps) == last:
            threading.Timer(milliseconds / 1000, die).start() if milliseconds else die()

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            step()
            result = function(*arguments, **options)
            step()
            return result

        return call

    embedder = Hashed()
    for owner, name in ((store, "write_atomic"), (embedder, "encode"), (np, "save")):
        setattr(owner, name, stepping(getattr(owner, name)))
    store.BATCH = 3
    ingest.load(store.Domain("d"), RECORDS, embedder)
    print(next(steps) - 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0)
