# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run: one base model at one commit, ablated with one set of settings. It has a folder, and the same run, started
again, finds its own folder and goes on there.

    <ABLATIONS_DIR>/<utc>-<slug>-<hash8>/
      run.json          what is ablated, with what, and how far it is
      base              link to the base model's files
      config.toml       what Heretic reads
      checkpoint/       Heretic's journal (in CHECKPOINT_DIR/<run> where that is set)
      heretic.log       what Heretic printed
      pareto.png .html  the trials
      model/ nf4/       the two forms of the ablated model, as published
      report.json       the verification
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.files import to_json, write_atomic
from common.problems import TRY_LATER, Problem
from common.text import slug
from settings import NOT_IDENTITY


@dataclass
class Run:
    """A run's folder and the state in its run.json."""

    folder: Path
    checkpoint: Path  # the folder of Heretic's journal
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def journal(self) -> Path:
        return self.checkpoint / "base.jsonl"

    def save(self, **changes: Any) -> None:
        """Change the state and put it on disk."""
        self.state.update(changes)
        write_atomic(self.folder / "run.json", to_json(self.state))


def identity(source: str, settings: dict[str, Any], prompts: str, version: str) -> str:
    """16 hex digits that name what is ablated with what. Settings that only change the speed are not part of it.

    `source`: the model's id and commit, or a fingerprint of its folder. `settings`: all of Heretic's. `prompts`: a digest of
    the prompts themselves. `version`: Heretic's.
    """
    told = json.dumps(
        [source, {key: value for key, value in settings.items() if key not in NOT_IDENTITY}, prompts, version],
        sort_keys=True,
    )
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """Names, sizes and times of a model folder's files: enough to notice that it is another model now."""
    told = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()) if path.is_file()
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def find_or_make(base: Path, model: str, key: str, checkpoints: Path | None, now: datetime | None = None) -> Run:
    """The folder of the run with identity `key`; a new one where there is none yet.

    A checkpoint alone is a run too: its other files may have gone with the machine that they were on.
    """
    places = [place for place in (base, checkpoints) if place]
    found = sorted({path.name for place in places for path in place.glob(f"*-{key[:8]}") if path.is_dir()})
    for name in found:
        folder, state = base / name, _state(base / name)
        if state.get("identity", key) == key:
            folder.mkdir(parents=True, exist_ok=True)
            break
    else:
        stamp = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
        folder, state = base / f"{stamp}-{slug(model.rsplit('/', 1)[-1])}-{key[:8]}", {}
        folder.mkdir(parents=True, exist_ok=True)  # another process may start the same run in the same second
    checkpoint = (checkpoints / folder.name if checkpoints else folder / "checkpoint").resolve()
    checkpoint.mkdir(parents=True, exist_ok=True)
    run = Run(folder.resolve(), checkpoint, state)
    _bring(Path(state.get("checkpoint") or folder / "checkpoint"), checkpoint)
    if not state.items() >= {"run": folder.name, "identity": key}.items():
        run.save(run=folder.name, identity=key)  # only then: another process may own the run
    return run


def _bring(before: Path, now: Path) -> None:
    """Copy the journals to where they are wanted now, if CHECKPOINT_DIR has been set, changed or taken away meanwhile."""
    if now.exists() and not (now / "base.jsonl").exists() and before != now and before.is_dir():
        for journal in sorted(before.glob("base.jsonl*"), reverse=True):  # the one without a number last
            if not journal.name.startswith("base.jsonl.lock"):
                shutil.copyfile(journal, now / f".{journal.name}")
                os.replace(now / f".{journal.name}", now / journal.name)


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


@contextmanager
def owned(run: Run) -> Iterator[None]:
    """Hold the run while something is done to it. Raises Problem (75) where another process does."""
    import filelock

    # Both: the checkpoint may be shared by machines, the folder by starts with another CHECKPOINT_DIR.
    try:
        with (
            filelock.FileLock(run.checkpoint / ".lock").acquire(timeout=0),
            filelock.FileLock(run.folder / ".lock").acquire(timeout=0),
        ):
            # The one who owned it until now may have gone on since the state was read.
            run.state = _state(run.folder) or run.state
            run.save(checkpoint=str(run.checkpoint))
            yield
    except filelock.Timeout:
        raise Problem(
            f"another process works on the run {run.name}. Wait for it, or end it; then the same command goes on",
            TRY_LATER,
        ) from None
