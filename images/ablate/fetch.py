# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a model's files are: a folder as it is, a Hub repository downloaded at one commit.

What is loaded from here is data: safetensors, JSON, tokenizer files and chat templates. A model that needs its own Python
code, has its weights as pickles, or is an adapter of another model is refused before anything of it is loaded.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import architecture
import hub_client
import licences
from common.problems import BAD_INPUT, REMOTE_FAILED, TRY_LATER, Problem
from common.text import clean

MAX_JSON = 100_000_000  # bytes; the index of the largest models has some ten million
# The weights as transformers saves them; other names hold the same ones once more.
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_SMALL = re.compile(r"(?!adapter_).*\.(?:json|jinja|model)|merges\.txt|vocab\.txt")
_CODE_AND_PICKLES = {".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".so"}
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w][\w./-]{0,199}))?")


def weights(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, the weights that transformers loads: one file, or a set of shards."""
    names = set(names)
    return ["model.safetensors"] if "model.safetensors" in names else sorted(filter(SHARD.fullmatch, names))


def wanted(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, those that are downloaded: the weights, and the small files that describe the model,
    its tokenizer and its licence. Subfolders hold other formats."""
    names = {name for name in names if "/" not in name}
    small = {name for name in names if _SMALL.fullmatch(name)} | set(licences.goes_along(names))
    if "model.safetensors" in names:
        small.discard("model.safetensors.index.json")
    return sorted({*weights(names), *small})


def resolve(name: str, files: Sequence[str] | None = None) -> tuple[Path, str, str | None]:
    """The folder with a model's files, its id, and its commit (None for a folder, whose id is its name).

    `name` is a folder, or a Hub id, or `id@revision` (a commit, tag or branch; else the main branch). Hub files are
    downloaded into the user's cache, at the commit that the revision names now: `files`, else those that are `wanted`.
    Raises Problem.
    """
    if Path(name).is_dir():
        folder = Path(name).resolve()
        check_folder(folder)
        return folder, folder.name, None
    match = _HUB_ID.fullmatch(name)
    if not match or Path(name).exists():
        raise Problem(
            f"{name!r:.200} is neither a folder with a model nor a Hub id such as Qwen/Qwen3-14B or Qwen/Qwen3-14B@<commit>"
        )
    hub_client.limit_times()
    commit, names = _looked_up(match["id"], match["revision"])
    folder = _download(match["id"], commit, wanted(names) if files is None else files)
    check_folder(folder, downloaded=True)
    return folder, match["id"], commit


def _looked_up(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The full sha of the commit that a revision of a Hub repository names now, and the files there. Raises Problem."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(repo, revision=revision, timeout=hub_client.READ_TIMEOUT)
    except Exception as error:
        raise _explained(repo, revision, error) from error
    if not isinstance(found.sha, str) or not re.fullmatch(r"[0-9a-f]{40}", found.sha):
        raise Problem(f"the Hub gave no commit for {repo}", REMOTE_FAILED)
    names = [file.rfilename for file in found.siblings or [] if isinstance(file.rfilename, str)]
    if not weights(names):
        raise Problem(
            f"{repo} at {found.sha} has no model.safetensors or shards of it, and nothing else is loaded; choose a repository"
            " that has"
        )
    return found.sha, names


def _download(repo: str, commit: str, files: Sequence[str]) -> Path:
    """Download these files of a repository at a full commit sha, or find them in the cache. Raises Problem."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=commit,
            allow_patterns=[glob.escape(name) for name in files],
            etag_timeout=hub_client.CONNECT_TIMEOUT,
        )
    except Exception as error:
        raise _explained(repo, commit, error) from error
    return Path(folder)


def _explained(repo: str, revision: str | None, error: Exception) -> Exception:
    """The Problem behind an error of the Hub's client; the error itself if it is no such error."""
    named = f"{repo}@{revision}" if revision else repo
    failure = hub_client.judge(error)
    if failure.kind == "gated":
        return Problem(
            f"{named} is gated: accept its terms at https://huggingface.co/{repo} and set HF_TOKEN to a token of that account",
            REMOTE_FAILED,
        )
    if failure.kind == "repository":
        return Problem(
            f"the Hub has no model {repo}, or HF_TOKEN may not read it; check the name and the token", REMOTE_FAILED
        )
    if failure.kind == "revision":
        return Problem(
            f"{repo} has no revision {revision}; its commits: https://huggingface.co/{repo}/commits/main", REMOTE_FAILED
        )
    if failure.kind == "name":
        return Problem(f"{named} is not a Hub id such as Qwen/Qwen3-14B")
    if failure.status:
        said = f"the Hub answered {failure.status} for {named}"
        if failure.passes:
            return Problem(f"{said}; type the same command again later, what was downloaded is kept", TRY_LATER)
        return Problem(f"{said}; check that HF_TOKEN may read it", REMOTE_FAILED)
    if failure.passes or failure.kind == "offline":
        return Problem(
            f"the Hub cannot be reached for {named} ({type(error).__name__}); type the same command again, what was downloaded is kept",
            TRY_LATER,
        )
    if isinstance(error, OSError) and error.errno is not None:
        return Problem(
            f"{named} cannot be stored: {error.strerror}; free some space or set HF_HOME to another disk", BAD_INPUT
        )
    return error


def check_folder(folder: Path, *, downloaded: bool = False) -> None:
    """Raise Problem unless `folder` holds a whole model that can be loaded without running any code of its own.

    In a cache folder of the Hub's client other programs may have left other files, which are not read; elsewhere code
    and pickles are a reason to stop.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise Problem(f"{folder} cannot be read: {error.strerror}") from error
    if "adapter_config.json" in names:
        raise Problem(f"{folder} holds an adapter, not a whole model; merge it into its base model first")
    if not downloaded and (found := sorted(name for name in names if Path(name).suffix.lower() in _CODE_AND_PICKLES)):
        raise Problem(
            f"{folder} holds code or pickles ({', '.join(found)[:200]}), which can run anything; remove them or choose another model"
        )
    config = read_json(folder / "config.json")
    for name in sorted(names):
        if name.endswith("config.json") and _holds(read_json(folder / name), "auto_map"):
            raise Problem(
                f"{folder / name} asks for code of the model's own (auto_map), which is never run; choose another model"
            )
    if not isinstance(config.get("model_type"), str):
        raise Problem(f"{folder / 'config.json'} names no model_type; is this a model of transformers?")
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"}:
        raise Problem(f"{folder} holds no tokenizer; save one beside the weights")
    _check_weights(folder, names)


def _check_weights(folder: Path, names: set[str]) -> None:
    if "model.safetensors.index.json" in names and "model.safetensors" not in names:
        shards = read_json(folder / "model.safetensors.index.json").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise Problem(f"{folder / 'model.safetensors.index.json'} names no shards; download the model again")
        if odd := [
            shard
            for shard in shards.values()
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard)
        ]:
            raise Problem(
                f"{folder / 'model.safetensors.index.json'} names {clean(str(odd[0]))[:100]}, which is no shard beside it"
            )
        wanted = set(shards.values())
    else:
        wanted = {"model.safetensors"}
    if missing := sorted(wanted - names):
        raise Problem(
            f"{folder} lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; download or save the model again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model. Raises Problem."""
    try:
        return architecture.read_json(path, MAX_JSON)
    except architecture.Unsupported as error:
        raise Problem(f"{path.parent} cannot be used: {error}; download or save the model again") from error


def _holds(value: object, key: str) -> bool:
    """Is there `key` with something in it, anywhere in this JSON?"""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if item.get(key):
                return True
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return False
