"""Check an old run again, from its folder alone: no job is sent, no network is used. Equal input gives equal output.

    RUN=runs/20261101T120000Z-… python -m check

What it finds is printed; where it is not what claims.json holds already, it is kept beside it as claims-<hash8>.json.
Exit codes: 0 clean; 2 no such run; 3 flagged; 4 something could not be checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import checks
import embedding
import settings
import synth
import view
from common.files import to_json, write_atomic
from common.problems import Problem, run, tell
from common.text import clean
from ledger import Flag


def folder_of(name: str) -> Path:
    """The folder of a run: a path, or its name below RUNS_DIR. Raises Problem."""
    root = Path(os.environ.get("RUNS_DIR") or "runs")
    for path in (Path(name), root / Path(name).name):
        if name and (path / "run.json").is_file():
            return path
    newest = sorted(root.glob("[!.]*/run.json"), reverse=True)
    hint = f"Try: make check RUN={newest[0].parent}" if newest else "There is none yet: make synth makes one"
    raise Problem(f"RUN={name!r:.200} is no run's folder. {hint}")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{path} is missing: the job of this run did not answer, so there is nothing to check") from None
    except (OSError, ValueError) as error:
        raise Problem(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def main() -> int:
    """Check the run that RUN names."""
    form, configuration = settings.form(), settings.load()
    folder = folder_of(settings.variable("RUN"))
    note, manifest, output = (_load(folder / name) for name in ("run.json", "sources.json", "output.json"))
    others = _load(folder / "samples.json") if (folder / "samples.json").exists() else []
    limits, verifier, _ = checks.prepare(configuration)
    try:
        text, question, domain = clean(output["synthesis"]), note["question"], note["domain"]
        result = checks.run(
            text,
            question,
            manifest,
            configuration,
            embedding.load(configuration.embedding_model),
            limits,
            verifier=verifier,
            samples=[clean(other["synthesis"]) for other in others],
            samples_asked=int(note["config"].get("samples", 1)) - 1,
        )
        notes = synth.notes_on(output, result)
        before = folder / "claims.json"
        _compare_levels(result, before)
        found = to_json(result.as_json())
        same = before.exists() and before.read_text(encoding="utf-8") == found
        kept = before if same else folder / f"claims-{hashlib.sha256(found.encode()).hexdigest()[:8]}.json"
        run_ = {"folder": folder, "question": question, "domain": domain, "text": text}
        end = f"{'As before' if same else 'Kept'}: {kept}"
        shown = view.printed(form, run_, manifest, result, notes, end)
    except (KeyError, TypeError, AttributeError) as error:
        raise Problem(f"{folder} is not whole: {type(error).__name__} {error}. It cannot be checked") from error
    tell(shown)
    if not same:
        try:
            write_atomic(kept, found)
        except OSError as error:
            raise Problem(f"{kept} cannot be written: {error.strerror}; the result is above") from error
    return result.code


def _compare_levels(result: checks.Result, before: Path) -> None:
    """A level that ran when the answer was made, and does not run now, leaves its part unchecked."""
    ran = _load(before).get("levels") if before.exists() else []
    if not isinstance(ran, list):
        return
    for level in result.levels:
        if level["state"] != "ran" and any(
            isinstance(was, dict) and was.get("level") == level["level"] and was.get("state") == "ran" for was in ran
        ):
            detail = (
                f"level {level['level']} ({level['name']}) ran when the answer was made, and not now: {level['why']}"
            )
            result.flags.append(Flag("citation", "unchecked", detail))


if __name__ == "__main__":
    run(main)
