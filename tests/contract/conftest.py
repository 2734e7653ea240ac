"""Hypothesis as in tests/ops; and tests/ops/local_server.py can be imported when these tests run alone."""

import sys
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
set_hypothesis_home_dir(tempfile.gettempdir())
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
