"""Exit codes, and the one exception that a person is meant to read.

A `Problem` says what is wrong, where, and the next command to type. `run` prints it as one plain message, without a
traceback, and turns it into the exit code; every other exception is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from common.secrets import redact
from common.text import clean

OK = 0
UNEXPECTED = 1
BAD_INPUT = 2
FLAGGED = 3
UNCHECKED = 4
REMOTE_FAILED = 5
CHANGES = 10
TRY_LATER = 75
INTERRUPTED = 130


class Problem(Exception):
    """Something a person can act on: `message` is complete sentences, `code` is the exit code of the program."""

    def __init__(self, message: str, code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code


def tell(text: str) -> None:
    """A result on stdout. A reader that has left (head, a closed pipe) ends neither the work nor its exit code."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


def run(main: Callable[[], int]) -> None:
    """Call `main` and leave the process with its exit code; print a Problem to stderr and leave with its code."""
    try:
        code = main()
        sys.stdout.flush()
    except Problem as problem:
        print(f"error: {redact(clean(str(problem)))}", file=sys.stderr)  # it may quote a path or a server's words
        code = problem.code
    except BrokenPipeError:
        # The reader of our output (head, less) has left: nothing to tell it, and no second error while closing.
        sys.stdout = None
        code = OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)
