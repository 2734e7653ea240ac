# SPDX-License-Identifier: AGPL-3.0-or-later
"""The list of what is published: SHA256SUMS, in the format that `sha256sum -c` reads.

Nothing gets into it that a loader could execute: weights are safetensors only, and there is no Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from common.files import write_atomic
from common.problems import Problem
from common.text import clean

NAME = "SHA256SUMS"

# Names (in lower case) that hold weights or programs in a form that can run code when it is loaded, or that no loader
# of ours reads.
_WEIGHTS = re.compile(
    r"\.(?:bin|ckpt|dill|ggml|gguf|h5|hdf5|joblib|keras|mar|msgpack|nemo|npy|npz|onnx|ot|pb|pdparams|pickle|pkl|pt|pt2"
    r"|pte|pth|t7|tflite|zip|tar|gz|7z)$"
)
_PROGRAMS = re.compile(r"\.(?:bat|cmd|dll|dylib|exe|ipynb|jar|js|ps1|py|pyc|pyd|pyi|pyw|sh|so|wasm)$")
# How pickles, zip archives (which torch.save writes), GGUF and HDF5 files begin, whatever they are called.
_DISGUISED = (*(b"\x80" + bytes([version]) for version in range(2, 6)), b"PK\x03\x04", b"GGUF", b"\x89HDF")
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def build(folder: Path) -> dict[str, str]:
    """The sha256 (hex) of every file of the folder but the manifest itself, by its path in the folder, sorted.

    Raises Problem where a file may not be published: links and devices, hidden files, names that a listing could not
    hold, weights that are not safetensors, programs, configurations that ask for remote code.
    """
    names = _names(folder)
    if not names:
        raise Problem(f"{folder} holds no files; write the model into it first: make ablate MODEL=…")
    for name in names:
        _check(folder, name)
    _check_shards(folder, names)
    return {name: _sha256(folder / name) for name in names}


def render(sums: dict[str, str]) -> str:
    """The manifest's text, one line for each file, sorted by path."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def parse(text: str, where: str) -> dict[str, str]:
    """A manifest's text as {path: sha256}. Raises Problem that names `where` and the line."""
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if not match or match[2] in sums or not _is_plain(match[2]):
            raise Problem(
                f"{where}, line {number}: not a line of a manifest; delete the file, it is written again: rm {where}"
            )
        sums[match[2]] = match[1]
    return sums


def write(folder: Path) -> dict[str, str]:
    """Write SHA256SUMS into the folder and return what `build` found."""
    sums = build(folder)
    write_atomic(folder / NAME, render(sums))
    return sums


def read(folder: Path) -> dict[str, str]:
    """The folder's SHA256SUMS. Raises Problem where it is missing or damaged."""
    path = folder / NAME
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise Problem(f"{path} does not exist; the folder was not written whole: run the command again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{path} cannot be read ({type(error).__name__}); delete it, it is written again") from error


def verify(folder: Path) -> dict[str, str]:
    """Check that the folder holds exactly what its SHA256SUMS says, and return that. Raises Problem with every difference."""
    wanted, found = read(folder), build(folder)
    if differences := compare(wanted, found):
        raise Problem(
            f"{folder} is not what its {NAME} says ({'; '.join(differences[:5])}"
            f"{f'; {len(differences) - 5} more' if len(differences) > 5 else ''}): save the model again,"
            f" or delete {folder / NAME} if the change is meant"
        )
    return wanted


def compare(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    """What differs between two manifests, one short text for each file."""
    return [
        f"{clean(name)} {'is missing' if name not in found else 'is not listed' if name not in wanted else 'has changed'}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]


def _names(folder: Path) -> list[str]:
    """Every file below the folder, as a path with slashes, sorted; the manifest left out."""
    found = []
    pending = [folder]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError as error:
            raise Problem(f"{error.filename} cannot be read: {error.strerror}") from error
        for entry in entries:
            name = Path(entry.path).relative_to(folder).as_posix()
            mode = entry.stat(follow_symlinks=False).st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise Problem(
                    f"{_shown(folder, name)} is not a regular file (a link or a device); put the file itself there"
                )
            if not _is_plain(name):
                raise Problem(f"{_shown(folder, name)}: this name cannot be published; rename or delete it")
            if stat.S_ISDIR(mode):
                pending.append(Path(entry.path))
            elif name != NAME:
                found.append(name)
    return sorted(found)


def may_be_published(name: str) -> bool:
    """Does nothing in this name speak against it? (The content is another question: see `build`.)"""
    return _is_plain(name) and not _WEIGHTS.search(name.lower()) and not _PROGRAMS.search(name.lower())


def _is_plain(name: str) -> bool:
    """Can a listing hold this path as it is? No control or invisible characters, no backslash, nothing hidden."""
    parts = name.split("/")
    return (
        clean(name) == name
        and name.isprintable()
        and "\\" not in name
        and all(part and part.strip() == part and not part.startswith((".", "-")) for part in parts)
    )


def _check(folder: Path, name: str) -> None:
    """Refuse a file that a loader could execute."""
    path = folder / name
    if _WEIGHTS.search(name.lower()):
        raise Problem(
            f"{_shown(folder, name)}: only safetensors weights are published; save the model again, or delete it"
        )
    if _PROGRAMS.search(name.lower()):
        raise Problem(f"{_shown(folder, name)}: programs are not published (no remote code); delete it")
    with path.open("rb") as file:
        start = file.read(9)
    if name.lower().endswith(".safetensors"):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy"):  # reads the header, and that the file is as long as it says
                pass
        except (SafetensorError, OSError) as error:
            raise Problem(f"{_shown(folder, name)} is not a whole safetensors file; save the model again") from error
    elif start.startswith(_DISGUISED):
        raise Problem(f"{_shown(folder, name)} holds weights that are not safetensors; delete it")
    if name.rsplit("/", 1)[-1].lower().endswith("config.json"):
        try:
            configuration = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise Problem(f"{_shown(folder, name)} is not JSON; save the model again") from error
        if _has_key(configuration, "auto_map"):
            raise Problem(
                f"{_shown(folder, name)} has auto_map: the model would need remote code, which is never published;"
                " ablate a model that transformers supports by itself"
            )


def _check_shards(folder: Path, names: list[str]) -> None:
    """Refuse a folder whose index of shards names a file that is not there: it was not saved to the end."""
    for name in names:
        if name.endswith(".safetensors.index.json"):
            try:
                shards = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise Problem(f"{_shown(folder, name)} is not an index of shards; save the model again") from error
            if missing := sorted(str(shard) for shard in shards if shard not in names):
                raise Problem(f"{folder} lacks {clean(missing[0])}, which {name} names; save the model again")


def _has_key(value: Any, key: str) -> bool:
    """Is there an object with this key anywhere in a JSON document?"""
    if isinstance(value, dict):
        return key in value or any(_has_key(inner, key) for inner in value.values())
    return isinstance(value, list) and any(_has_key(inner, key) for inner in value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shown(folder: Path, name: str) -> str:
    return repr(str(folder / name)) if not _is_plain(name) else str(folder / name)
