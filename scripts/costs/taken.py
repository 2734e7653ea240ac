"""What was done, from the records that it left: runs/*/run.json and ablations/*/run.json. Reads files, asks nobody."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models import Model

_RUN_NAME = re.compile(r"(\d{8}T\d{6}Z)-.+-[0-9a-f]{8}")
_ENDPOINT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_BYTES = 20_000_000  # of a run.json: what is larger is none of ours


@dataclass(frozen=True)
class Run:
    """One synthesis. Times in seconds. `seconds` is what RunPod measured for its job; None: not known, `why` says why."""

    name: str
    created: datetime | None
    endpoint: str
    local: bool
    model: str
    outcome: str
    seconds: float | None
    total_seconds: float
    why: str = ""


@dataclass(frozen=True)
class Ablation:
    """One ablation. Its search took `searched` hours; `elapsed` are those from its start to its report, with all that was
    in between. None: not known."""

    name: str
    created: datetime | None
    model: str
    machine: str
    searched: float | None
    elapsed: float | None
    published: tuple[str, ...]


def runs(folder: Path) -> list[Run]:
    """All runs below RUNS_DIR, the oldest first; one that has not ended lies in a hidden folder."""
    return sorted(
        (_run(name, record) for name, record in _records(folder)),
        key=lambda run: (run.created or datetime.min.replace(tzinfo=UTC), run.name),
    )


def ablations(folder: Path) -> list[Ablation]:
    """All ablations below ABLATIONS_DIR, the oldest first."""
    return [_ablation(folder / name, record) for name, record in _records(folder)]


def _records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each run's name and run.json; an empty one where it cannot be read."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return
    for name in names:
        if _RUN_NAME.fullmatch(name.removeprefix(".")) or (folder / name / "run.json").exists():
            yield name, _json(folder / name / "run.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _run(name: str, record: dict[str, Any]) -> Run:
    job, model, timings = (_object(record.get(key)) for key in ("job", "model", "timings"))
    milliseconds = _number(timings.get("execution_ms"))
    # Further answers and the judge's, of the same endpoint.
    more = [_number(value) or 0.0 for value in _object(_object(record.get("cost")).get("more_execution_ms")).values()]
    outcome, endpoint = record.get("outcome"), _text(job.get("endpoint"))
    why = ""
    if not record:
        why = "its run.json cannot be read"
    elif not isinstance(outcome, str):
        why = "it has not ended, or was killed"
    elif milliseconds is None:
        why = f"RunPod told no execution time ({outcome})"
    return Run(
        name=name.removeprefix("."),
        created=_time(record.get("created")) or _stamp(name),
        endpoint=endpoint if _ENDPOINT.fullmatch(endpoint) else "",
        # Plain HTTP is for the local RunPod alone: no key crosses a network in the clear.
        local=_text(job.get("url")).startswith("http:"),
        model=_text(model.get("id")),
        outcome=outcome if isinstance(outcome, str) else "",
        seconds=None if why or milliseconds is None else (milliseconds + sum(more)) / 1000,
        total_seconds=_number(timings.get("total_seconds")) or 0.0,
        why=why,
    )


def _ablation(folder: Path, record: dict[str, Any]) -> Ablation:
    created = _stamp(folder.name)
    report = _time(_json(folder / "report.json").get("written"))
    searched = _number(record.get("searched_seconds"))
    elapsed = (report - created).total_seconds() if report and created else None
    published = (_object(form).get("repo") for form in _object(record.get("published")).values())
    return Ablation(
        name=folder.name,
        created=created,
        model=_text(record.get("model")),
        machine=_text(_object(record.get("load")).get("machine")),
        searched=None if searched is None else searched / 3600,
        elapsed=None if elapsed is None or elapsed < 0 else elapsed / 3600,
        published=tuple(repo for repo in published if isinstance(repo, str)),
    )


def base_of(model: str, known: dict[str, Model], bases: dict[str, str]) -> Model | None:
    """The block of config/models.yaml for what a worker says that it serves; None: none is known.

    `bases`: repository in lower case → base model, of what is known for certain. Else the base's name must stand in the
    repository's: you/Qwen3-14B-ablated-nf4 is a Qwen/Qwen3-14B.
    """
    certain = bases.get(model.lower(), model).lower()
    if certain in known:
        return known[certain]
    name = model.rsplit("/", 1)[-1].lower()
    fitting = [
        block
        for block in known.values()
        if re.search(rf"(?<![a-z0-9]){re.escape(block.id.rsplit('/', 1)[-1].lower())}(?![a-z0-9])", name)
    ]
    return max(fitting, key=lambda block: len(block.id), default=None)


def sittings(done: Sequence[Run], idle_seconds: float) -> int:
    """How often a worker had to start at least: a run that begins later than the idle time after another's end needs one."""
    count, end = 0, None
    for run in sorted((run for run in done if run.created), key=lambda run: run.created or datetime.min):
        begin = run.created.timestamp() if run.created else 0.0
        if end is None or begin > end + idle_seconds:
            count += 1
        end = max(end or 0.0, begin + run.total_seconds)
    return max(count, 1 if done else 0)


def in_month(when: datetime | None, month: str) -> bool:
    """Is this moment in a month `2026-11` (UTC)? Everything is in no month; what has no time is in none that is named."""
    return not month or (when is not None and when.astimezone(UTC).strftime("%Y-%m") == month)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12  # false for NaN, too
    return float(value) if ok else None


def _time(value: Any) -> datetime | None:
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _stamp(name: str) -> datetime | None:
    match = _RUN_NAME.fullmatch(name.removeprefix("."))
    try:
        return datetime.strptime(match[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) if match else None
    except ValueError:
        return None
