"""A short run of bench/soak.py: mixed jobs and faults, and a worker that is killed while jobs are in flight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).resolve().parents[2] / "bench" / "soak.py"


def test_every_job_has_one_end(model_folder: Path) -> None:
    # So few jobs are all warm-up: what they say about memory is only that it does not run away.
    options = ["--jobs", "250", "--restarts", "1", "--growth", "0.5", "--minutes", "1", "--model", str(model_folder)]
    ended = subprocess.run([sys.executable, str(SOAK), *options], capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-5000:]}"
    found = json.loads(ended.stdout)
    assert found["jobs"] >= 250
    assert found["ends"]["COMPLETED"] > 150
    assert found["ends"]["CANCELLED"]
    assert found["given_out_again"], "the worker that was killed held jobs"
    assert not found["problems"]
