# SPDX-License-Identifier: AGPL-3.0-or-later
"""Heretic's search for a run: started, watched, taken down a step where memory runs out, and continued after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import journal
import launcher
import prompt_sets
from common.problems import BAD_INPUT, TRY_LATER, UNEXPECTED, Problem
from common.text import clean
from progress import Reporter, gpu_memory
from prompt_sets import NAMES as PROMPTS
from runs import Run
from settings import Settings

POLL = 1.0  # seconds between looks at the journal …
POLL_GPU = 10.0  # … and at the GPUs' memory
NOTE = 60.0  # seconds between notes of the time that was spent


@dataclass(frozen=True)
class Load:
    """How a model is held and fed: what is taken down where memory runs out."""

    batch_size: int  # 0: Heretic finds one
    quantization: str  # none or bnb_4bit


def next_load(load: Load, first: Load, at: str) -> Load | None:
    """What to try after `load` ran out of memory `at` load or batch; None: nothing is left.

    Loading does not depend on the batch size, so after that only smaller weights help.
    """
    if at == "batch" and load.batch_size != 1:
        return Load(max(1, load.batch_size // 4), load.quantization)
    if at in ("load", "batch") and load.quantization == "none":
        return Load(first.batch_size, "bnb_4bit")
    return None


def heretic_config(settings: Settings, run: Run, load: Load) -> dict[str, Any]:
    """config.toml as Heretic reads it."""
    return {
        **prompt_sets.absolute(settings.heretic),
        "batch_size": load.batch_size,
        "quantization": load.quantization,
        "model": "base",
        "study_checkpoint_dir": str(run.checkpoint),
        "export_strategy": "merge",
        **launcher.headless_settings(str(run.folder / "saving")),
    }


def environment() -> dict[str, str]:
    """The environment of our children: Heretic would take HERETIC_… over its file, and notebooks' variables as one."""
    dropped = ("HERETIC_", "COLAB_", "KAGGLE_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    # They start in other folders.
    if kept.get("HF_HOME"):
        kept["HF_HOME"] = os.path.abspath(kept["HF_HOME"])
    kept["PYTHONPATH"] = os.pathsep.join(
        os.path.abspath(path) for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path
    )
    # COLUMNS: what is printed goes to a log, and lines need not be folded for it.
    return {**kept, "COLUMNS": "160", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}


def first_load(run: Run, wanted: Load, machine: str) -> Load:
    """What to begin with: what the last start had come down to, if the same was wanted on the same machine; else `wanted`.

    A study stays with its quantization, unless 4 bits are wanted now.
    """
    known = run.state.get("load") or {}
    load = wanted
    if known.get("machine") == machine and known.get("wanted") == asdict(wanted):
        load = Load(known["batch_size"], known["quantization"])
    so_far = journal.read(run.journal)
    if so_far.settings and _complete(so_far) and wanted.quantization == "none":
        load = Load(load.batch_size, so_far.settings.get("quantization", "none"))
    return load


def _complete(so_far: journal.Journal) -> int:
    return sum(trial.state == "complete" for trial in so_far.trials)


def search(
    run: Run, settings: Settings, wanted: Load, *, machine: str, card: str, usd_per_hour: float | None, reporter: Reporter
) -> int | None:  # fmt: skip
    """Search, and save the chosen trial's model to <run>/saving. Returns its index; None: no trial passes the gates.

    `wanted` is tried first, `card` is what to rent where it does not fit on this `machine`. Raises Problem.
    """
    import tomli_w

    def repair(changes: dict[str, Any]) -> None:
        for note in journal.repair_file(run.journal, changes):
            reporter.note(f"repaired the journal of the search: {note}")

    repair({})  # before it is read
    load = first_load(run, wanted, machine)
    while True:
        before = journal.read(run.journal)
        if before.settings and before.settings.get("quantization") != load.quantization:
            # Trials of differently held weights are not comparable.
            kept = journal.keep(run.journal)
            run.journal.unlink()
            if before.trials:
                reporter.note(f"the search starts over with {load.quantization}; the trials so far are kept in {kept}")
        run.save(load={**asdict(load), "machine": machine, "wanted": asdict(wanted)})
        config = heretic_config(settings, run, load)
        (run.folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        # What a continued study takes from its journal, and may be different now. A batch size that Heretic found stays.
        keys = ["n_trials", "device_map", "max_memory", "offload_outputs_to_cpu", "max_shard_size"]
        changes = {key: settings.full[key] for key in keys if key in settings.full} | {
            key: config[key] for key in ("model", *PROMPTS) if key in config
        }
        repair(changes | ({"batch_size": load.batch_size} if load.batch_size else {}))
        outcome = _heretic(run, settings, usd_per_hour, reporter)
        if outcome["ended"] == "saved":
            return int(outcome["trial"])
        if outcome["ended"] == "no_trial":
            return None
        if outcome["ended"] != "out_of_memory":
            raise Problem(
                f"Heretic failed: {clean(outcome['message'] or 'it said nothing')}. Its log: {run.folder / 'heretic.log'}. "
                "The same command goes on from the last complete trial",
                UNEXPECTED,
            )
        lower = next_load(load, wanted, outcome["at"])
        complete = _complete(journal.read(run.journal))
        if lower is None or (complete and lower.quantization != load.quantization):
            run.save(load=None)  # the next start, perhaps on another day or card, begins at the top again
            raise _stop(run, outcome, complete if lower else 0, card)
        reporter.note(f"out of memory at {outcome['at']} with {_said(load)}: trying again with {_said(lower)}")
        load = lower


def _stop(run: Run, outcome: dict[str, Any], complete: int, card: str) -> Problem:
    """What to say where memory does not suffice. `complete`: trials that went well with more than there is now."""
    said = clean(outcome["message"])
    if complete:
        return Problem(
            f"there is not enough memory now, though {complete} trials went well before ({said}). If something else uses the "
            f"GPU (nvidia-smi), wait, and the same command goes on; on a smaller card it cannot: rent {card}. To start over "
            'with 4-bit weights set quantization = "bnb_4bit" in heretic.toml',
            TRY_LATER,
        )
    what = (
        "main memory to merge the model"
        if outcome["at"] == "save"
        else "memory, even with batch_size 1 and 4-bit weights"
    )
    return Problem(
        f"there is not enough {what} ({said}). Rent {card}; the same command goes on there from the last complete trial, if "
        f"CHECKPOINT_DIR ({run.checkpoint}) is on a volume",
        BAD_INPUT,
    )


def _said(load: Load) -> str:
    return f"batch_size {load.batch_size or 'auto'}, quantization {load.quantization}"


def _heretic(run: Run, settings: Settings, usd_per_hour: float | None, reporter: Reporter) -> dict[str, Any]:
    """Run the launcher once, to its end. Returns its outcome."""
    plan, outcome = run.folder / "plan.json", run.folder / "outcome.json"
    outcome.unlink(missing_ok=True)
    saving = str(run.folder / "saving")
    plan.write_text(
        json.dumps(launcher.plan_of(settings.gates, settings.timeout, settings.early_stop, saving, str(outcome)))
    )
    earlier = float(run.state.get("searched_seconds", 0))  # by starts before this one
    started = looked = noted = time.monotonic()
    gpu = gpu_memory()
    n_trials = settings.full["n_trials"]
    with (run.folder / "heretic.log").open("ab") as log:
        # Its own session: Ctrl-C ends this process, which ends that one; Heretic would choose a trial instead.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher", str(plan)],
            cwd=run.folder, env=environment(), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            while True:
                try:
                    code = child.wait(POLL)
                except subprocess.TimeoutExpired:
                    code = None
                if gpu and time.monotonic() - looked > POLL_GPU:
                    gpu, looked = gpu_memory(), time.monotonic()
                reporter.update(
                    journal.read(run.journal).trials, n_trials, settings.gates,
                    elapsed=earlier + time.monotonic() - started, now=time.time(), gpu=gpu, usd_per_hour=usd_per_hour,
                )  # fmt: skip
                if code is not None:
                    break
                if time.monotonic() - noted > NOTE:
                    noted = time.monotonic()
                    run.save(searched_seconds=round(earlier + noted - started, 1))
        finally:
            child.kill()
            child.wait()
            run.save(searched_seconds=round(earlier + time.monotonic() - started, 1))
            if child.stdin:
                child.stdin.close()
            reporter.close()
    if outcome.exists():
        result: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
        return result
    if code == -9:
        message = "it was killed, as the system does when main memory runs out"
    else:
        message = f"it ended with code {code}"
    return {"ended": "failed", "message": message, "at": None}
