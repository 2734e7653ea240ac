# SPDX-License-Identifier: AGPL-3.0-or-later
"""Heretic's checkpoint: an optuna journal (JSON lines, one operation each), read and repaired without optuna.

A run that was killed leaves a journal that may end in half a line, hold a trial that will never end, or lack what Heretic
reads unguarded. `repair` makes the journal of a run that only ever did complete trials, which any Heretic continues.
Operations and fields: optuna 4.9, optuna/storages/journal/_storage.py.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.files import write_atomic

CREATE_STUDY, SET_STUDY_USER_ATTR, CREATE_TRIAL, SET_TRIAL_STATE, SET_TRIAL_USER_ATTR = 0, 2, 4, 6, 8
STATES = {0: "running", 1: "complete", 2: "pruned", 3: "failed"}
_START = b'{"op_code":'


@dataclass(frozen=True)
class Trial:
    """One trial of a study. Times in unix seconds; None: not known (yet)."""

    number: int  # from 0, as optuna counts
    index: int  # from 1, as Heretic prints
    state: str  # running, complete, pruned, failed
    refusals: int | None
    kl_divergence: float | None
    base_refusals: int | None
    harmful_prompts: int | None
    direction_index: float | None  # None: a direction per layer
    parameters: dict[str, dict[str, float]]
    started: float | None
    ended: float | None


@dataclass(frozen=True)
class Journal:
    """What a journal says. `settings` is Heretic's own record of its settings; None: not written yet."""

    trials: tuple[Trial, ...]
    settings: dict[str, Any] | None
    finished: bool


Operation = dict[str, Any]


def _operations(data: bytes) -> tuple[list[Operation], list[str]]:
    """The operations of a journal, and what had to be left out, in words."""
    operations: list[Operation] = []
    notes: list[str] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        last = number == len(lines)  # no line break after it
        operation: Operation | None
        try:
            operation = _operation(line)
        except ValueError:
            # Half a line, perhaps with a whole one appended to it by a later start.
            at = line.rfind(_START)
            try:
                operation = _operation(line[at:]) if at > 0 else None
            except ValueError:
                operation = None
            notes.append("its last line was cut short" if last else f"line {number} was damaged")
        if operation:
            operations.append(operation)
    return operations, notes


def _operation(line: bytes) -> Operation:
    operation = json.loads(line)
    if not isinstance(operation, dict) or not isinstance(operation.get("op_code"), int):
        raise ValueError("not an operation")
    return operation


def _user_attributes(operations: list[Operation]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for operation in operations:
        if operation["op_code"] == SET_STUDY_USER_ATTR:
            merged.update(operation.get("user_attr", {}))
    return merged


def _by_trial(operations: list[Operation]) -> list[list[Operation]]:
    """The operations of each trial, by trial id. Operations on a trial that does not exist belong to none."""
    trials: list[list[Operation]] = []
    for operation in operations:
        if operation["op_code"] == CREATE_TRIAL:
            trials.append([operation])
        elif isinstance(operation.get("trial_id"), int) and 0 <= operation["trial_id"] < len(trials):
            trials[operation["trial_id"]].append(operation)
    return trials


def _trial(number: int, operations: list[Operation]) -> Trial:
    attributes: dict[str, Any] = {}
    state, ended = 0, None
    for operation in operations:
        if operation["op_code"] == SET_TRIAL_USER_ATTR:
            attributes.update(operation.get("user_attr", {}))
        elif operation["op_code"] == SET_TRIAL_STATE:
            state, ended = operation.get("state", 0), operation.get("datetime_complete", ended)
    return Trial(
        number=number,
        index=attributes.get("index", number + 1),
        state=STATES.get(state, "running"),
        refusals=attributes.get("refusals"),
        kl_divergence=attributes.get("kl_divergence"),
        base_refusals=attributes.get("base_refusals"),
        harmful_prompts=attributes.get("n_bad_prompts"),
        direction_index=attributes.get("direction_index"),
        parameters=attributes.get("parameters", {}),
        started=_seconds(operations[0].get("datetime_start")),
        ended=_seconds(ended),
    )


def _seconds(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def read(path: Path) -> Journal:
    """What the journal at `path` says now; it may be written at the same time, or not exist yet."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    operations, _ = _operations(data)
    attributes = _user_attributes(operations)
    settings = attributes.get("settings")
    trials = tuple(_trial(number, lines) for number, lines in enumerate(_by_trial(operations)))
    return Journal(trials, json.loads(settings) if settings else None, bool(attributes.get("finished", False)))


def repair(data: bytes, changes: dict[str, Any]) -> tuple[bytes, list[str]]:
    """A journal that Heretic can continue: `data` without what a dead run left, its settings updated with `changes`.

    A trial that did not end (running, or interrupted) is taken out: it neither counts towards n_trials nor is chosen.
    Returns the new journal (empty: the run has to start over) and what was done, in words (empty: nothing was wrong).
    """
    operations, notes = _operations(data)
    attributes = _user_attributes(operations)
    created = any(operation["op_code"] == CREATE_STUDY for operation in operations)
    if not created or not attributes.get("settings"):
        # Heretic writes its settings right after the study and before any trial: nothing is lost.
        if operations:
            notes.append("the study was not set up completely: it starts over")
        return b"", notes
    if "finished" not in attributes:
        notes.append("it did not say whether it was finished")

    kept: dict[int, int] = {}  # old trial id → new
    for number, lines in enumerate(_by_trial(operations)):
        trial = _trial(number, lines)
        # A trial whose score was not a number has failed, but it was tried; one without a score was interrupted.
        if trial.state == "complete" or (trial.state == "failed" and trial.refusals is not None):
            kept[number] = len(kept)
        else:
            notes.append(f"trial {trial.index} had not ended: it will run again")

    result: list[Operation] = []
    created_trials = -1
    for operation in operations:
        if operation["op_code"] == CREATE_TRIAL:
            created_trials += 1
            if created_trials in kept:
                result.append(operation)
        elif "trial_id" in operation:
            if operation["trial_id"] in kept and operation["trial_id"] <= created_trials:
                result.append({**operation, "trial_id": kept[operation["trial_id"]]})
        else:
            result.append(operation)

    old = json.loads(attributes["settings"])
    new = {**old, **changes}
    finished = bool(attributes.get("finished", False)) and len(kept) >= new.get("n_trials", 0)
    if new != old:
        result.append(_study_attribute("settings", json.dumps(new)))
    if attributes.get("finished") is not finished:
        result.append(_study_attribute("finished", finished))
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in result), notes


def _study_attribute(name: str, value: object) -> Operation:
    return {"op_code": SET_STUDY_USER_ATTR, "worker_id": "repair", "study_id": 0, "user_attr": {name: value}}


def repair_file(path: Path, changes: dict[str, Any]) -> list[str]:
    """Repair the journal at `path`, if there is one, and remove the locks of dead runs. The caller owns the run.

    Where something was wrong the original is kept beside it as <name>.1, .2, …. Returns what was done, in words.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = []
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink()
        notes.append("a lock was left behind")
    if not path.exists():
        return notes
    data = path.read_bytes()
    try:
        repaired, wrong = repair(data, changes)
    except (ValueError, TypeError, KeyError, AttributeError):  # lines that are JSON, but not what optuna writes
        repaired, wrong = data, []
    if wrong:
        keep(path)
    if repaired != data:
        write_atomic(path, repaired.decode())
    if not _loads(path):
        if not wrong:
            keep(path)
        write_atomic(path, "")
        wrong.append("it cannot be read at all: the search starts over")
    return notes + wrong


def _loads(path: Path) -> bool:
    """Does optuna read it, as Heretic will, and do we?"""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        for study in JournalStorage(JournalFileBackend(str(path))).get_all_studies():
            json.loads(study.user_attrs["settings"])
        read(path)
    except Exception:
        return False
    return True


def keep(path: Path) -> Path:
    """Copy the journal to the next free <name>.<number>, on disk before this returns."""
    number = 1
    while (copy := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    shutil.copyfile(path, copy)
    handle = os.open(copy, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return copy
