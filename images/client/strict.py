"""Blocks of config/*.yaml, read strictly: a missing, unknown or out-of-range key is an error that names file and key."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from common.problems import Problem

# What a key may hold: (int or float, lowest, highest), or bool, or str, or (str, words that are allowed).
# A spec in a list, [spec], allows null, too.
Spec = Any


def block(file: str, name: str, specs: Mapping[str, Spec]) -> dict[str, Any]:
    """The block `name` of config/`file`, each key checked against its spec. Raises Problem."""
    path = Path(os.environ.get("CONFIG_DIR") or "config") / file
    return check(f"{path}: {name}", read(path).get(name), specs)


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a file. Raises Problem."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(f"{path} does not exist; restore it: git checkout {path}") from None
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}; restore it: git checkout {path}") from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, or a date that no calendar has
        raise Problem(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(data, dict):
        raise Problem(f"{path} must hold keys and values; restore it: git checkout {path}")
    return data


def check(where: str, data: Any, specs: Mapping[str, Spec]) -> dict[str, Any]:
    """`data` as a block whose keys are just those of `specs`. `where` begins each message. Raises Problem."""
    if not isinstance(data, dict):
        raise Problem(f"{where} must hold the keys {', '.join(specs)}")
    check_keys(where, data, specs)
    for key, spec in specs.items():
        check_value(f"{where}: {key}", data[key], spec)
    return dict(data)


def check_keys(where: str, data: Mapping[Any, Any], known: Iterable[str]) -> None:
    """Are the keys of `data` just the `known` ones? Raises Problem."""
    known = list(known)
    for word, keys in (
        ("unknown", [str(key) for key in data if key not in known]),
        ("missing", [key for key in known if key not in data]),
    ):
        if keys:
            raise Problem(f"{where}: {word} key {', '.join(keys)}; the keys are {', '.join(known)}")


def check_value(where: str, value: Any, spec: Spec) -> None:
    """Is a value what its spec allows? Raises Problem."""
    if isinstance(spec, list):
        if value is not None:
            check_value(where, value, spec[0])
    elif spec is bool:
        if not isinstance(value, bool):
            raise Problem(f"{where} must be true or false, not {value!r:.100}")
    elif spec is str or spec[0] is str:
        words = () if spec is str else spec[1]
        if not isinstance(value, str) or not value.strip() or (words and value not in words):
            raise Problem(f"{where} must be {' or '.join(words) or 'text'}, not {value!r:.100}")
    else:
        kind, low, high = spec
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise Problem(f"{where} must be a {'whole ' if kind is int else ''}number, not {value!r:.100}")
        if not low <= value <= high:  # false for NaN too
            raise Problem(f"{where} must be between {low} and {high}, not {value}")
