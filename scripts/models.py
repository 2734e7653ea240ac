"""config/models.yaml: what each known base model takes to be ablated and to be served. The file explains its keys."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml_file
from common.problems import Problem
from common.text import clean
from yaml_file import Where, YamlFile

MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
POOL_ID = re.compile(r"[A-Z][A-Z0-9_]{1,39}")
MAX_POOLS = 3  # with more, RunPod takes the endpoint and its workers may never start

# (lowest, highest) of each number.
_CARD_NUMBERS: dict[str, tuple[float, float]] = {
    "vram_bf16_gb": (0.1, 10_000),
    "vram_bnb_4bit_gb": (0.1, 10_000),
    "hours": (0.01, 1000),
    "usd_per_hour": (0, 1000),
}
_SECONDS = {"seconds": (1, 604_800), "cold_start_seconds": (0, 86_400)}
_RANGE = ("low", "expected", "high")


@dataclass(frozen=True)
class Range:
    """An estimate: what it may be at least, what is expected, what it may be at most."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Serving:
    """The ablated model in NF4 on a serverless endpoint."""

    pools: tuple[str, ...]
    vram_gb: float
    seconds: Range
    cold_start_seconds: Range


@dataclass(frozen=True)
class Model:
    """One block of config/models.yaml. Sizes in decimal gigabytes; `usd_per_hour` is for all cards together."""

    id: str
    card: str
    vram_bf16_gb: float
    vram_bnb_4bit_gb: float
    hours: float
    usd_per_hour: float
    serving: Serving


def load(path: Path | None = None) -> dict[str, Model]:
    """Read and check the file: model id in lower case → Model. Raises Problem with file, line, model and key."""
    path = path or Path(os.environ.get("CONFIG_DIR") or "config") / "models.yaml"
    file = yaml_file.read(path)
    if not isinstance(file.data, dict) or not file.data:
        raise Problem(f"{path} must hold one block per model; restore it: git checkout {path}")
    found: dict[str, Model] = {}
    for name, block in file.data.items():
        if not isinstance(name, str) or not MODEL_ID.fullmatch(name):
            raise Problem(f"{file.at((str(name),))}: {name!r:.100} is not a model id; one looks like Qwen/Qwen3-14B")
        if name.lower() in found:
            raise Problem(f"{file.at((name,))}: {name} stands there twice (ids are equal in any case of letters)")
        found[name.lower()] = _model(file, name, block)
    return found


def named(models: dict[str, Model], wanted: str) -> list[Model]:
    """The model that `wanted` names, in any case of letters, or all if it is empty. Raises Problem."""
    if not wanted:
        return list(models.values())
    if wanted.lower() not in models:
        known = ", ".join(model.id for model in models.values())
        raise Problem(
            f"MODEL={clean(wanted)[:100]} is not in config/models.yaml; known are {known}. Add a block for it"
        )
    return [models[wanted.lower()]]


def _model(file: YamlFile, name: str, block: Any) -> Model:
    keys = ("card", *_CARD_NUMBERS, "serving")
    _keys(file, (name,), block, keys)
    if not isinstance(block["card"], str) or not clean(block["card"]).strip():
        raise Problem(f"{_place(file, (name, 'card'))} must be a name like A100 80GB, not {block['card']!r:.100}")
    numbers = {key: _number(file, (name, key), block[key], *limits) for key, limits in _CARD_NUMBERS.items()}
    return Model(id=name, card=block["card"].strip(), serving=_serving(file, name, block["serving"]), **numbers)


def _serving(file: YamlFile, name: str, block: Any) -> Serving:
    where = (name, "serving")
    _keys(file, where, block, ("pools", "vram_gb", *_SECONDS))
    pools = block["pools"]
    if (
        not isinstance(pools, list)
        or not 1 <= len(pools) <= MAX_POOLS
        or not all(isinstance(pool, str) and POOL_ID.fullmatch(pool) for pool in pools)
        or len(set(pools)) < len(pools)
    ):
        raise Problem(
            f"{_place(file, (*where, 'pools'))} must list one to {MAX_POOLS} different pool ids like ADA_24,"
            f" not {pools!r:.100}"
        )
    ranges: dict[str, Range] = {}
    for key, limits in _SECONDS.items():
        _keys(file, (*where, key), block[key], _RANGE)
        found = Range(*(_number(file, (*where, key, each), block[key][each], *limits) for each in _RANGE))
        if not found.low <= found.expected <= found.high:
            raise Problem(f"{_place(file, (*where, key))} must have low, expected and high in rising order")
        ranges[key] = found
    return Serving(
        pools=tuple(pools),
        vram_gb=_number(file, (*where, "vram_gb"), block["vram_gb"], 0.1, 10_000),
        seconds=ranges["seconds"],
        cold_start_seconds=ranges["cold_start_seconds"],
    )


def _keys(file: YamlFile, where: Where, block: Any, keys: tuple[str, ...]) -> None:
    """Does `block` hold these keys and no others? Raises Problem."""
    if not isinstance(block, dict):
        raise Problem(f"{_place(file, where)} must hold the keys {', '.join(keys)}")
    for kind, wrong in (
        ("unknown", [str(key) for key in block if key not in keys]),
        ("missing", [key for key in keys if key not in block]),
    ):
        if wrong:
            line = file.at((*where, wrong[0]))
            raise Problem(
                f"{line}: {_name(where)}: {kind} key {', '.join(wrong)[:200]}; the keys are {', '.join(keys)}"
            )


def _number(file: YamlFile, where: Where, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Problem(f"{_place(file, where)} must be a number, not {value!r:.100}")
    if not low <= value <= high:  # false for NaN too
        raise Problem(f"{_place(file, where)} must be between {low} and {high}, not {value}")
    return float(value)


def _name(where: Where) -> str:
    """`Qwen/Qwen3-14B: serving.pools`"""
    model, *keys = (str(step) for step in where)
    return f"{model}: {'.'.join(keys)}" if keys else model


def _place(file: YamlFile, where: Where) -> str:
    return f"{file.at(where)}: {_name(where)}"
