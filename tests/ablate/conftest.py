# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the ablation's tests share: two tiny models made on the spot, and an environment without anybody's settings."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny as tiny_module
from support import DROPPED, environment

# Names a folder where the models are kept from one run of the tests to the next; without it each run makes its own.
CACHE = "OPEN_SYNTHESIS_TINY_CACHE"


@pytest.fixture(autouse=True)
def _nobodys_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in [*DROPPED, *(name for name in os.environ if name.startswith("HERETIC_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf-home"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_module.Tiny:
    """A model whose refusals Heretic can ablate. Read only: copy what a test changes."""
    return _made("tiny", (), tmp_path_factory)


@pytest.fixture(scope="session")
def stubborn(tmp_path_factory: pytest.TempPathFactory) -> tiny_module.Tiny:
    """A model whose refusals no trial of Heretic's touches. Read only: copy what a test changes."""
    return _made("stubborn", ("--stubborn",), tmp_path_factory)


def _made(name: str, options: tuple[str, ...], factory: pytest.TempPathFactory) -> tiny_module.Tiny:
    """Build a model in a process of its own, which leaves this one's threads and random numbers alone."""
    recipe = Path(tiny_module.__file__)
    cache = os.environ.get(CACHE)
    if not cache:
        return _build(recipe, factory.mktemp(name), options)
    # The recipe's hash is in the name: a changed recipe makes a new model.
    kept = Path(cache).resolve() / f"{name}-{hashlib.sha256(recipe.read_bytes()).hexdigest()[:12]}"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(dir=kept.parent))
        _build(recipe, half, options)
        try:
            half.rename(kept)  # at once, so that no other run finds half a model
        except OSError:
            if not kept.exists():
                raise
    found = tiny_module.Tiny(kept)
    # The settings name the prompts by their absolute paths, which are those of the folder before its renaming.
    found.config.write_text(tiny_module.toml(kept), encoding="utf-8")
    return found


def _build(recipe: Path, folder: Path, options: tuple[str, ...]) -> tiny_module.Tiny:
    built = subprocess.run(
        [sys.executable, str(recipe), str(folder), *options], env=environment(), capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return tiny_module.Tiny(folder.resolve())
