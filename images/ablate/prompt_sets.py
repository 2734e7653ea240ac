# SPDX-License-Identifier: AGPL-3.0-or-later
"""The four sets of prompts of config/heretic.toml, read before anything is paid for, by Heretic's own reader."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from architecture import import_heretic_model
from common.problems import BAD_INPUT, TRY_LATER, Problem
from common.text import clean
from settings import Settings

NAMES = ("good_prompts", "bad_prompts", "good_evaluation_prompts", "bad_evaluation_prompts")


def absolute(heretic: dict[str, Any]) -> dict[str, Any]:
    """Heretic's settings with the paths of prompt files made absolute: it runs in another folder."""
    result = dict(heretic)
    for name in NAMES:
        if name in result and Path(result[name]["dataset"]).exists():
            result[name] = {**result[name], "dataset": str(Path(result[name]["dataset"]).resolve())}
    return result


def read(settings: Settings) -> str:
    """Read all four. Returns the sha256 of their prompts: other prompts make another run.

    Raises Problem where one cannot be read, is empty, or has fewer prompts than the gate on refusals asks for.
    """
    import_heretic_model()
    from heretic.config import DatasetSpecification
    from heretic.utils import load_prompts

    told: list[list[tuple[str, str]]] = []
    for name in NAMES:
        wanted = settings.full[name]
        try:
            prompts = load_prompts(
                SimpleNamespace(system_prompt=settings.full["system_prompt"]), DatasetSpecification(**wanted)
            )
        except Exception as error:  # of many kinds: files, columns, slices, the hub
            code = TRY_LATER if isinstance(error, ConnectionError) else BAD_INPUT
            raise Problem(
                f"{settings.path}: the prompts of [{name}] cannot be read from {clean(str(wanted['dataset']))}: "
                f"{clean(str(error) or type(error).__name__):.300}",
                code,
            ) from None
        if not prompts:
            raise Problem(f"{settings.path}: [{name}] has no prompts")
        told.append([(prompt.system, prompt.user) for prompt in prompts])
    if len(told[3]) < settings.gates.of:
        raise Problem(
            f"{settings.path}: [bad_evaluation_prompts] has {len(told[3])} prompts, and the gate on refusals wants at least "
            f"{settings.gates.of}, so that no trial could pass. Take more prompts, or lower [gates] of and refusals"
        )
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
