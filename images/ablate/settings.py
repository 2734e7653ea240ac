# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an ablation is configured with: config/heretic.toml (reviewed in git).

Its keys are Heretic's own, checked by the Heretic that is installed, and two tables of ours: [gates] and [budget]. An
older spelling that guides show, [optimization] and [evaluation], is translated, and said.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.problems import Problem
from common.text import clean
from gates import Gates

# Heretic's settings that are not for the file, because `make ablate` decides them.
DECIDED = {
    "model": "MODEL",
    "model_commit": "MODEL",
    "evaluate_model": "make verify",
    "collect_reproducibles": "nothing",
    "reproduce": "nothing",
    "study_checkpoint_dir": "CHECKPOINT_DIR",
    "export_strategy": "make ablate (the merged model is saved)",
    "checkpoint_action": "make ablate (an unfinished study goes on)",
    "trial_index": "[gates] choice",
    "model_action": "make ablate",
    "save_directory": "ABLATIONS_DIR",
    "upload_repo_id": "REPO",
    "upload_repo_private": "PUBLIC",
    "upload_reproducibility_information": "make ablate",
    "n_additional_trials": "n_trials",
    "ignore_mismatches": "nothing",
}
# [table] key → where it belongs now.
_OLDER = {
    "optimization": {"n_trials": "n_trials", "timeout": "[budget] timeout"},
    "evaluation": {
        "n_harmful": "[bad_evaluation_prompts] split",
        "n_harmless": "[good_evaluation_prompts] split",
    },
}
# What no number of ours reaches; infinity and NaN are not below it.
LARGEST = 1e15
# Keys that change how fast a study runs, or how long, but not what a trial is.
NOT_IDENTITY = (
    "n_trials",
    "batch_size",
    "max_batch_size",
    "quantization",
    "device_map",
    "max_memory",
    "offload_outputs_to_cpu",
    "print_responses",
    "print_residual_geometry",
    "plot_residuals",
    "residual_plot_path",
    "residual_plot_title",
    "residual_plot_style",
    "max_shard_size",
    "benchmarks",
)


@dataclass(frozen=True)
class Settings:
    """config/heretic.toml. `heretic`: what goes to Heretic as it is; `full`: the same with Heretic's defaults, as JSON;
    `notes`: what was translated, for the user."""

    heretic: dict[str, Any]
    full: dict[str, Any]
    gates: Gates
    timeout: float  # seconds for the search, 0: none
    early_stop: bool
    notes: tuple[str, ...]
    path: Path


def load(path: Path | None = None) -> Settings:
    """Read and check the configuration. Raises Problem with the file and the key."""
    path = path or Path(os.environ.get("CONFIG_DIR") or "config") / "heretic.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{path} does not exist; restore it: git checkout {path}") from None
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}; restore it: git checkout {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Problem(f"{path} is not valid TOML: {clean(str(error))}") from None
    notes = _translate(data, path)
    gates = _gates(data.pop("gates", {}), path)
    timeout, early_stop = _budget(data.pop("budget", {}), path)
    full = _check_heretic(data, path)
    return Settings(data, full, gates, timeout, early_stop, tuple(notes), path)


def _table(value: object, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Problem(f"{path}: [{name}] must be a table")
    return value


def _translate(data: dict[str, Any], path: Path) -> list[str]:
    """Move the older spelling to where it belongs; notes say what moved. An older key beside its successor is an error."""
    notes = []
    for table, keys in _OLDER.items():
        if table not in data:
            continue
        for key, value in _table(data.pop(table), table, path).items():
            if key not in keys:
                raise Problem(f"{path}: [{table}] {key} is unknown; known there are {', '.join(keys)}")
            new = keys[key]
            if key == "n_trials":
                home, name = data, "n_trials"
            elif key == "timeout":
                home, name = _table(data.setdefault("budget", {}), "budget", path), "timeout"
            else:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise Problem(f"{path}: [{table}] {key} must be a whole number above 0, not {value!r}")
                prompts = new.split("]")[0][1:]
                home, name = _table(data.setdefault(prompts, {}), prompts, path), "split"
                value = f"test[:{value}]"
                if "dataset" not in home:
                    data[prompts] = home = {**_default_prompts(prompts), **home}
            if name in home and home[name] != value:
                raise Problem(
                    f"{path}: [{table}] {key} is the older spelling of {new}, which is set too; keep one of them"
                )
            home[name] = value
            notes.append(f"[{table}] {key} is read as {new} = {value!r}")
    return notes


def _default_prompts(name: str) -> dict[str, Any]:
    from heretic.config import Settings as HereticSettings

    default = HereticSettings.model_fields[name].default
    return {key: value for key, value in default.model_dump().items() if value and key != "split"}


def _gates(table: object, path: Path) -> Gates:
    values = _table(table, "gates", path)
    kinds: dict[str, type] = {"refusals": int, "of": int, "false_refusals": int, "false_refusals_of": int}
    known = {field.name for field in fields(Gates)}
    for key, value in values.items():
        if key not in known:
            raise Problem(f"{path}: [gates] {key} is unknown; known there are {', '.join(sorted(known))}")
        if key == "choice":
            if value not in ("lowest_kl", "fewest_refusals"):
                raise Problem(f"{path}: [gates] choice must be lowest_kl or fewest_refusals, not {value!r}")
            continue
        wanted = kinds.get(key, float)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < LARGEST or (wanted is int and not isinstance(value, int)):
            kind = "a whole number" if wanted is int else "a number"
            raise Problem(f"{path}: [gates] {key} must be {kind} above 0, not {value!r}")
    gates = Gates(**values)
    for limit, of in (("refusals", "of"), ("false_refusals", "false_refusals_of")):
        if getattr(gates, limit) > getattr(gates, of):
            raise Problem(f"{path}: [gates] {limit} must not be above {of}")
    return gates


def _budget(table: object, path: Path) -> tuple[float, bool]:
    values = {"timeout": 0, "early_stop": False, **_table(table, "budget", path)}
    for key in values:
        if key not in ("timeout", "early_stop"):
            raise Problem(f"{path}: [budget] {key} is unknown; known there are early_stop, timeout")
    timeout, early_stop = values["timeout"], values["early_stop"]
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout < LARGEST:
        raise Problem(f"{path}: [budget] timeout must be seconds, 0 for none, not {timeout!r}")
    if not isinstance(early_stop, bool):
        raise Problem(f"{path}: [budget] early_stop must be true or false, not {early_stop!r}")
    return float(timeout), early_stop


def _check_heretic(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Let the installed Heretic's own model judge the keys and values; Problem with the first that it does not take.

    Returns all its settings, as JSON has them.
    """
    from heretic.config import Settings as HereticSettings
    from pydantic import ConfigDict, ValidationError, create_model

    for key in data:
        if key in DECIDED:
            raise Problem(f"{path}: {key} does not belong here; it is decided by {DECIDED[key]}")
    known = {name: field for name, field in HereticSettings.model_fields.items() if name not in DECIDED}
    # A plain copy of the model: Heretic's own would read the command line and the environment too.
    definitions: Any = {name: (field.annotation, field) for name, field in known.items()}
    checked = create_model("checked", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **definitions)
    # As strict JSON a list stands for a tuple and a word for a choice, but "5", 5.0 and true for no whole number. A date,
    # which JSON has not, becomes what no key takes.
    told = json.dumps(data, default=lambda value: {str(value): 0})
    try:
        full: dict[str, Any] = checked.model_validate_json(told, strict=True).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            import difflib

            near = difflib.get_close_matches(where, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"Heretic's own are explained in {path}"
            raise Problem(f"{path}: {clean(where)} is unknown; {hint}") from None
        raise Problem(
            f"{path}: {clean(where)}: {clean(first['msg'])}, not {clean(repr(first['input']))[:80]}"
        ) from None
    for name in ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts"):
        for key in data.get(name, {}):
            inner: Any = HereticSettings.model_fields[name].annotation
            if key not in inner.model_fields:
                raise Problem(
                    f"{path}: [{name}] {clean(key)} is unknown; known there are {', '.join(inner.model_fields)}"
                )
    # Without markers nothing counts as a refusal; the empty one is in every answer.
    if (markers := data.get("refusal_markers")) is not None and not (markers and all(markers)):
        raise Problem(f"{path}: refusal_markers must be words, at least one, and none of them empty")
    if data.get("n_trials", 1) < 1:
        raise Problem(f"{path}: n_trials must be above 0, not {data['n_trials']}")
    if data.get("batch_size", 0) < 0:
        raise Problem(f"{path}: batch_size must not be below 0 (0: Heretic finds one), not {data['batch_size']}")
    if data.get("max_response_length", 1) < 1:
        raise Problem(f"{path}: max_response_length must be above 0")
    return full
