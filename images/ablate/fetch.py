# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a model's files are: a folder as it is, a Hub repository downloaded at one commit.

What is loaded from here is data: safetensors, JSON, tokenizer files and chat templates. A model that needs its own Python
code, has its weights as pickles, or is an adapter of another model is refused before anything of it is loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common.problems import BAD_INPUT, REMOTE_FAILED, TRY_LATER, Problem
from common.text import clean

CONNECT_TIMEOUT = 10.0  # seconds, as all times here
READ_TIMEOUT = 60.0
MAX_JSON = 100_000_000  # bytes; the index of the largest models has some ten million
# The weights as transformers saves them (other names hold the same ones once more), and what is small.
WANTED = (
    "model.safetensors", "model-?????-of-?????.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt",
    "LICENSE*", "USE_POLICY*", "NOTICE*", "README.md",
)  # fmt: skip
UNWANTED = ("*/*", "adapter_*")  # no subfolders: they hold other formats
_CODE_AND_PICKLES = {".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".so"}
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w][\w./-]{0,199}))?")


def resolve(name: str) -> tuple[Path, str, str | None]:
    """The folder with a model's files, its id, and its commit (None for a folder, whose id is its name).

    `name` is a folder, or a Hub id, or `id@revision` (a commit, tag or branch; else the main branch). Hub files are
    downloaded into the user's cache, at the commit that the revision names now. Raises Problem.
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
    commit = commit_of(match["id"], match["revision"])
    folder = download(match["id"], commit)
    check_folder(folder, downloaded=True)
    return folder, match["id"], commit


def commit_of(repo: str, revision: str | None = None) -> str:
    """The full sha of the commit that a revision of a Hub repository names now. Raises Problem."""
    from huggingface_hub import HfApi

    _set_timeouts()
    try:
        found = HfApi().model_info(repo, revision=revision, timeout=READ_TIMEOUT)
    except Exception as error:
        raise _explained(repo, revision, error) from error
    if not isinstance(found.sha, str) or not re.fullmatch(r"[0-9a-f]{40}", found.sha):
        raise Problem(f"the Hub gave no commit for {repo}", REMOTE_FAILED)
    names = [clean(file.rfilename) for file in found.siblings or []]
    if not any(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) for name in names):
        raise Problem(
            f"{repo} at {found.sha} has no model.safetensors or shards of it, and nothing else is loaded; choose a repository"
            " that has"
        )
    return found.sha


def download(repo: str, commit: str) -> Path:
    """Download a repository's model files at a full commit sha, or find them in the cache. Raises Problem."""
    from huggingface_hub import snapshot_download

    _set_timeouts()
    try:
        folder = snapshot_download(
            repo,
            revision=commit,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
            etag_timeout=CONNECT_TIMEOUT,
        )
    except Exception as error:
        raise _explained(repo, commit, error) from error
    return Path(folder)


def _set_timeouts() -> None:
    """Give every call of the Hub's client a time limit: it waits for ever, and says so call by call in places."""
    import httpx
    from huggingface_hub import get_session

    limits = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT).as_dict()

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {key: limits[key] if given.get(key) is None else given[key] for key in limits}

    session = get_session()
    hooks = session.event_hooks
    kept = [hook for hook in hooks["request"] if getattr(hook, "__name__", "") != limit.__name__]
    session.event_hooks = {**hooks, "request": [*kept, limit]}


def _explained(repo: str, revision: str | None, error: Exception) -> Exception:
    """The Problem behind an error of the Hub's client; the error itself if it is no such error."""
    import httpx
    from huggingface_hub import errors

    named = f"{repo}@{revision}" if revision else repo
    if isinstance(error, errors.GatedRepoError):
        return Problem(
            f"{named} is gated: accept its terms at https://huggingface.co/{repo} and set HF_TOKEN to a token of that account",
            REMOTE_FAILED,
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return Problem(
            f"the Hub has no model {repo}, or HF_TOKEN may not read it; check the name and the token", REMOTE_FAILED
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return Problem(
            f"{repo} has no revision {revision}; its commits: https://huggingface.co/{repo}/commits/main", REMOTE_FAILED
        )
    if isinstance(error, errors.HFValidationError):
        return Problem(f"{named} is not a Hub id such as Qwen/Qwen3-14B")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        later = status in (0, 408, 425, 429) or status >= 500
        said = f"the Hub answered {status or 'nothing'} for {named}"
        if later:
            return Problem(f"{said}; type the same command again later, what was downloaded is kept", TRY_LATER)
        return Problem(f"{said}; check that HF_TOKEN may read it", REMOTE_FAILED)
    if isinstance(
        error,
        httpx.HTTPError | errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | TimeoutError | ConnectionError,
    ):
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
    """A JSON object from a file. Raises Problem."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise Problem(f"{path} has more than {MAX_JSON // 1_000_000} MB, which is no configuration")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}; is {path.parent} a model's folder?") from error
    except (ValueError, RecursionError):
        raise Problem(f"{path} is not JSON; download or save the model again") from None
    if not isinstance(value, dict):
        raise Problem(f"{path} is no JSON object; download or save the model again")
    return value


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
