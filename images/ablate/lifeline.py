# SPDX-License-Identifier: AGPL-3.0-or-later
"""No step outlives the driver that would use it, however the driver ends: a kill -9 included."""

from __future__ import annotations

import os
import signal
import stat
import threading


def die_with_the_driver() -> None:
    """End this process when stdin, if it is a pipe, closes at its other end. Nothing else reads it."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    pipe = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
