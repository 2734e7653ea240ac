# SPDX-License-Identifier: AGPL-3.0-or-later
"""Heretic without a person: `python -m launcher PLAN.json`, in a run's folder, beside Heretic's config.toml.

Runs the installed, unmodified Heretic in this process. It asks questions in the terminal; here a policy answers them: an
unfinished study goes on, the gates choose the trial, the merged model is saved. A question that the policy does not know
ends the run and is named. Newer versions of Heretic take some of the answers as settings; config.toml has them then, and
they are not asked. How it ended is written to the plan's `outcome` file.

The study differs from bare Heretic's in two ways, and only where it must: it stops after a trial (never in one) when the
time budget is spent or, if asked to, once a trial passes the gates; and a study that goes on after an interruption draws
the trials that it would have drawn without one (Heretic alone would draw its first ones again).

It watches stdin and ends itself when the other end closes: no search outlives the driver that would use it.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from architecture import import_heretic_model
from common.files import to_json, write_atomic
from gates import Gates, choose, meets
from journal import read
from lifeline import die_with_the_driver

JOURNAL = "base.jsonl"  # Heretic's name for the checkpoint of the model `base`, the link in the run's folder


class UnknownQuestion(BaseException):
    """Heretic asked what the policy does not know. Not an Exception: Heretic carries on after those."""


class Policy:
    """Answers Heretic's questions, for one run."""

    def __init__(self, gates: Gates, save_directory: str) -> None:
        self.gates = gates
        self.save_directory = save_directory
        self.trial: int | None = None  # the chosen trial's index
        self.exported = False  # the one export was asked for
        self.chose_none = False

    def answer(self, kind: str, message: str, choices: list[Any]) -> Any:
        """The answer to a question of `kind` (select, text, path …). Raises UnknownQuestion."""
        values = [getattr(choice, "value", choice) for choice in choices]
        if message == "How would you like to proceed?" and "continue" in values:
            return "continue"
        if message == "Which trial do you want to use?" and values:
            return self._trial(values)
        if message == "What do you want to do with the decensored model?":
            save = next((value for value in values if value in ("save", "Save the model to a local folder")), None)
            if save is not None:
                # Once only: when the question comes again, the model has been saved, or could not be.
                answer = "" if self.exported else save
                self.exported = True
                return answer
        if kind == "path" and message == "Path to the folder:":
            return self.save_directory
        raise UnknownQuestion(f"Heretic asks ({kind}): {message} This version of Heretic is not known here")

    def _trial(self, values: list[Any]) -> Any:
        if self.trial is not None:
            # Asked again after the export, which newer versions do without asking what to do with the model.
            self.exported = True
            return ""
        by_index = {value.user_attrs["index"]: value for value in values if hasattr(value, "user_attrs")}
        offered = [trial for trial in _trials() if trial.index in by_index]
        chosen = choose(offered, self.gates)
        self.chose_none = chosen is None
        if chosen is None:
            return ""
        self.trial = chosen.index
        return by_index[chosen.index]


class _Question:
    """What questionary's functions return: asked at once, or never where a setting has answered."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._ask = ask

    def ask(self, *_: Any, **__: Any) -> Any:
        return self._ask()

    unsafe_ask = ask


def _checkpoint() -> Path:
    from heretic.config import Settings

    return Path(Settings().study_checkpoint_dir) / JOURNAL


def _trials() -> tuple[Any, ...]:
    return read(_checkpoint()).trials


def answer_questions(policy: Policy) -> None:
    """Let `policy` answer whatever would be asked in the terminal."""
    import builtins
    import getpass

    import questionary

    def asker(kind: str) -> Callable[..., _Question]:
        def ask(message: str = "", *args: Any, **named: Any) -> _Question:
            choices = named.get("choices") or (args[0] if args and isinstance(args[0], list) else [])
            return _Question(lambda: policy.answer(kind, message, list(choices)))

        return ask

    for kind in ("select", "rawselect", "checkbox", "text", "path", "password", "confirm", "autocomplete"):
        setattr(questionary, kind, asker(kind))

    def refuse(message: object = "", *_: Any, **__: Any) -> NoReturn:
        raise UnknownQuestion(f"this is asked on a terminal, and refused: {message}")

    # transformers asks on stdin whether a model's own code may run. It may not.
    for module, name in ((builtins, "input"), (getpass, "getpass")):
        setattr(module, name, refuse)


def stop_between_trials(gates: Gates, timeout: float, early_stop: bool) -> None:
    """Make every study end after the trial with which its time is spent, or which passes the gates if `early_stop`.

    `timeout` in seconds, 0 for none; the time of earlier starts of the study counts.
    """
    import optuna

    original = optuna.study.Study.optimize

    def enough(study: Any) -> bool:
        if early_stop and any(meets(trial, gates) for trial in _trials()):
            return True
        done = [trial for trial in study.get_trials(deepcopy=False) if trial.duration]
        return bool(timeout) and sum(trial.duration.total_seconds() for trial in done) >= timeout

    def optimize(self: Any, function: Any, n_trials: int | None = None, **named: Any) -> None:
        # A resumed study may have had enough already. Trials that fail count, or a study of failures would not end.
        if enough(self) and any(trial.state.is_finished() for trial in self.trials):
            return
        callbacks = [*(named.pop("callbacks", None) or ()), lambda study, _: study.stop() if enough(study) else None]
        original(self, function, n_trials=n_trials, callbacks=callbacks, **named)

    optuna.study.Study.optimize = optimize


def draw_as_if_uninterrupted() -> None:
    """Give a study that goes on the sampler that it would have had: one that has drawn the trials so far."""
    import heretic.main as heretic_main

    original = heretic_main.TPESampler

    def sampler(**named: Any) -> Any:
        import optuna

        path = _checkpoint()
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(
                str(path), lock_obj=optuna.storages.journal.JournalFileOpenLock(str(path))
            )
        )
        existing = storage.get_all_studies()
        if not existing:
            return original(**named)
        trials = storage.get_all_trials(existing[0]._study_id)
        made = original(**named)
        if replay(made, trials, existing[0].directions):
            return made
        # Drawn by another version, say. Then at least not the first ones again.
        print("the trials so far cannot be drawn again; the next ones are drawn with another seed")
        return original(**{**named, "seed": (named.get("seed") or 0) + len(trials)})

    heretic_main.TPESampler = sampler


def replay(sampler: Any, trials: list[Any], directions: list[Any]) -> bool:
    """Let `sampler` draw `trials` again, in a study in memory. False if it draws others."""
    import optuna

    study = optuna.create_study(sampler=sampler, directions=directions)
    for trial in trials:
        drawn = study.ask(fixed_distributions=trial.distributions)
        if drawn.params != trial.params:
            return False
        if trial.state == optuna.trial.TrialState.COMPLETE:
            study.tell(drawn, trial.values)
        else:
            study.tell(drawn, state=optuna.trial.TrialState.FAIL)
    return True


_MEMORY_SIGNS = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "alloc_failed",
    "cublas_status_not_initialized",
)


def check_fits(model: Any) -> None:
    """Raise torch.OutOfMemoryError where a part of the model was put aside because it does not fit.

    transformers moves such parts to main memory or disk and leaves tensors without values behind; Heretic would edit those
    without a word, and every trial would measure nothing.
    """
    import torch

    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise torch.OutOfMemoryError("the weights do not fit into the memory that the model may use")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Is there an out-of-memory error, of a GPU or of the machine, in the chain of causes?"""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        # Drivers, bitsandbytes, cuBLAS, the CPU allocator and mmap raise plain errors.
        said = str(error).lower()
        if isinstance(error, RuntimeError | OSError) and any(sign in said for sign in _MEMORY_SIGNS):
            return True
        if (
            isinstance(error, ValueError) and "dispatched on the cpu or the disk" in said
        ):  # transformers, of 4-bit weights
            return True
        error = error.__cause__ or error.__context__
    return False


def record_caught_errors(phase: Callable[[], str]) -> list[tuple[str, Exception]]:
    """Heretic catches some errors and prints them. The list returned collects them, with the phase they came in."""
    import heretic.main as heretic_main
    import heretic.model as heretic_model

    caught: list[tuple[str, Exception]] = []
    for module in (heretic_main, heretic_model):
        original = module.format_exception

        def record(error: Exception, original: Callable[[Exception], str] = original) -> str:
            caught.append((phase(), error))
            return original(error)

        module.format_exception = record
    return caught


def headless_settings(save_directory: str) -> dict[str, Any]:
    """The answers that the installed Heretic takes as settings. trial_index is not among them: the place of the chosen
    trial in the sorted front is not known before the search has ended."""
    from heretic.config import Settings

    answers = {"checkpoint_action": "continue", "model_action": "save", "save_directory": save_directory}
    if not set(answers) <= set(Settings.model_fields):
        return {}
    return answers


def main(plan: dict[str, Any]) -> dict[str, Any]:
    """Run Heretic to its end. Returns the outcome: `ended` is saved, no_trial, out_of_memory or failed."""
    sys.argv = ["heretic"]  # Heretic reads the command line; config.toml says all
    gates = Gates(**plan["gates"])
    policy = Policy(gates, plan["save_directory"])
    answer_questions(policy)
    import_heretic_model()
    import heretic.main as heretic_main

    # Heretic collects garbage around each batch; what has been imported until now is none, and takes long to look through.
    gc.freeze()

    stop_between_trials(gates, plan["timeout"], plan["early_stop"])
    draw_as_if_uninterrupted()
    loaded = False

    def phase() -> str:
        return "save" if policy.trial is not None else "batch" if loaded else "load"

    caught = record_caught_errors(phase)
    model = heretic_main.Model

    def load(*args: Any, **named: Any) -> Any:
        nonlocal loaded
        made = model(*args, **named)
        check_fits(made.model)
        loaded = True
        return made

    heretic_main.Model = load
    outcome: dict[str, Any] = {"ended": "failed", "trial": None, "message": None, "at": None}
    try:
        heretic_main.run()
    except UnknownQuestion as question:
        return {**outcome, "message": " ".join(str(question).split())}
    except Exception as error:
        import traceback

        traceback.print_exc()
        # What a load failed with has been caught: the error that arrives only says that it failed.
        causes = [error, *(other for at, other in caught if at == "load" == phase())]
        return _failed(outcome, phase(), causes)
    if policy.chose_none:
        return {**outcome, "ended": "no_trial"}
    if not policy.exported:
        return {**outcome, "message": "Heretic ended before a model was saved; the end of its log says why"}
    errors = [error for at, error in caught if at == "save"]
    # After saving, Heretic loads the base once more. If only that fails, the model is there.
    if errors and not (is_out_of_memory(errors[-1]) and _is_whole(Path(plan["save_directory"]))):
        return _failed(outcome, "save", errors)
    if not any(Path(plan["save_directory"]).glob("*.safetensors")):
        # transformers only logs it when the folder is a file, for one.
        return {**outcome, "at": "save", "message": f"no weights were saved to {plan['save_directory']}"}
    return {**outcome, "ended": "saved", "trial": policy.trial}


def _is_whole(folder: Path) -> bool:
    """Has a model been saved to the end: the tokenizer, which comes last, and every weight file in its full length?"""
    import manifest
    from common.problems import Problem

    try:
        return "tokenizer_config.json" in manifest.build(folder)
    except (Problem, OSError):
        return False


def _failed(outcome: dict[str, Any], at: str, errors: list[Exception]) -> dict[str, Any]:
    """The outcome of a failure in a phase, from all errors that belong to it."""
    memory = [error for error in errors if is_out_of_memory(error)]
    error = (memory or errors)[-1]
    message = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    return {**outcome, "ended": "out_of_memory" if memory else "failed", "at": at, "message": message}


def plan_of(gates: Gates, timeout: float, early_stop: bool, save_directory: str, outcome: str) -> dict[str, Any]:
    """What the driver hands over, as JSON."""
    return {
        "gates": asdict(gates),
        "timeout": timeout,
        "early_stop": early_stop,
        "save_directory": save_directory,
        "outcome": outcome,
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    die_with_the_driver()
    ended = main(given)
    sys.stdout.flush()
    write_atomic(Path(given["outcome"]), to_json(ended))
