"""Hypothesis: the same examples on every run, and nothing written into the tree (which may be read-only)."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
