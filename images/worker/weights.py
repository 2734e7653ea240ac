"""Where the model's files come from, whether they are whole, and what they are: light code, nothing is loaded here.

`locate` finds the model of MODEL_ID at MODEL_REVISION, in this order: baked into the image, RunPod's model cache, the
network volume (or the HF_HOME that a person chose), the Hub. A snapshot that is not whole is passed over and never used.

    python weights.py model            downloads MODEL_ID at MODEL_REVISION into /opt/models: the image `worker-baked`
    python weights.py kernel NAME@COMMIT FOLDER    downloads a flash-attention kernel into FOLDER: see `attention`

Environment: HF_TOKEN, HF_ENDPOINT, HF_HOME, VERIFY_WEIGHTS; BAKED_MODELS, RUNPOD_MODEL_CACHE and NETWORK_VOLUME move the
places that are looked at.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

BAKED = "/opt/models"
RUNPOD_CACHE = "/runpod-volume/huggingface-cache/hub"
VOLUME = "/runpod-volume"
IMAGE_HF_HOME = "/models"  # what the image sets: not a person's choice
SUMS = "SHA256SUMS"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
VERIFY = ("size", "sha256")

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 3
PAUSE = 2.0  # seconds before the second attempt, twice that before the third
SPARE_DISK = 200_000_000  # bytes that stay free beside a download
LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[\w.-]{1,100}(?:/[\w.-]{1,100})*", re.ASCII)
_FILE = re.compile(r"[\w-][\w.-]*", re.ASCII)
# All but the weights. What else a repository may hold (pickles, GGUF, ONNX, programs, second copies in folders) is left.
_SMALL = re.compile(r"[\w.-]+\.(?:json|jinja|model|tiktoken)|(?:merges|vocab)\.txt|SHA256SUMS", re.ASCII)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "vocab.json", "vocab.txt")
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}

Source = Literal["baked", "runpod-cache", "volume", "hub", "folder"]
Check = Literal["weights", "disk"]


class WeightsError(Exception):
    """There is no usable model. The message names the remedy; `check` says whether the disk is to blame."""

    def __init__(self, message: str, check: Check = "weights") -> None:
        super().__init__(message)
        self.check: Check = check


class _PassedOver(Exception):
    """Why a place is not the source, as a clause."""


@dataclass(frozen=True)
class Weights:
    """A model on this machine's disk. `reason`: one sentence for the log. `revision`: the commit, None where a folder was
    given. `seconds`: what finding (and downloading) took."""

    folder: Path
    source: Source
    reason: str
    revision: str | None
    seconds: float


# --- where it comes from ---------------------------------------------------------------------------------------------


def locate(model_id: str, revision: str | None, environ: Mapping[str, str]) -> Weights:
    """The model's files, downloaded if they are nowhere here. Raises WeightsError."""
    started = time.monotonic()
    if model_id.startswith(("/", "./", "../", "~")) or (model_id and Path(model_id).is_dir()):
        folder = Path(model_id).expanduser()
        if fault := incomplete(folder):
            raise WeightsError(f"the model's folder {folder} cannot be used: {fault}; copy the whole model there")
        reason = f"weights: {folder}, because MODEL_ID is a folder"
        return Weights(folder, "folder", reason, None, time.monotonic() - started)
    if not _REPOSITORY.fullmatch(model_id):
        raise WeightsError(f"MODEL_ID={model_id!r} is no repository's name; set it like your-name/model-nf4")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise WeightsError(f"MODEL_REVISION={revision!r} is no revision; set it to a commit of {model_id}")

    passed: list[str] = []
    for source, hub, name in _places(environ):
        try:
            folder = _snapshot(hub, model_id, revision)
        except _PassedOver as why:
            passed.append(f"not {name} ({why})")
            continue
        return _found(folder, source, name, passed, revision, started)
    cache, where = _downloads(environ)
    folder = download(model_id, revision, cache, environ)
    return _found(folder, "hub", f"from the Hub, downloaded {where}", passed, revision, started)


def _found(folder: Path, source: Source, name: str, passed: list[str], revision: str | None, started: float) -> Weights:
    commit = folder.name if _COMMIT.fullmatch(folder.name) else None
    because = f", because they are {', '.join(passed)}" if passed else ""
    if revision is None:
        pin = f"; not pinned: set MODEL_REVISION={commit} to keep it"
    elif commit != revision:
        pin = f"; not pinned: MODEL_REVISION={revision} is a name that can move to another commit"
    else:
        pin = ""
    seconds = time.monotonic() - started
    return Weights(folder, source, f"weights: {name}{because}; commit {commit}{pin}", commit, seconds)


def _places(environ: Mapping[str, str]) -> Iterator[tuple[Source, Path, str]]:
    """What is looked at before the Hub is asked: source, cache folder, how it is called."""
    yield "baked", Path(environ.get("BAKED_MODELS") or BAKED), "baked into the image"
    yield "runpod-cache", Path(environ.get("RUNPOD_MODEL_CACHE") or RUNPOD_CACHE), "in RunPod's model cache"
    if chosen := _chosen_home(environ):
        yield "volume", chosen / "hub", f"in HF_HOME={chosen}"
    else:
        yield "volume", _volume(environ) / "models", "on the network volume"


def _volume(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("NETWORK_VOLUME") or VOLUME)


def _chosen_home(environ: Mapping[str, str]) -> Path | None:
    home = environ.get("HF_HOME")
    return Path(home).expanduser() if home and home != IMAGE_HF_HOME else None


def _downloads(environ: Mapping[str, str]) -> tuple[Path, str]:
    """The cache folder that a download goes to, and why there."""
    if chosen := _chosen_home(environ):
        return chosen / "hub", f"to HF_HOME={chosen}"
    volume = _volume(environ)
    if volume.is_dir():
        if os.access(volume, os.W_OK | os.X_OK):
            return volume / "models", f"to the network volume {volume}"
        why = f" ({volume} cannot be written by user {os.geteuid()}, so the next worker downloads again)"
    else:
        why = f" (there is no network volume at {volume}, so the next worker downloads again)"
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return home / "hub", f"to {home}{why}"


def _snapshot(hub: Path, model_id: str, revision: str | None) -> Path:
    """The whole snapshot of a revision in a Hugging Face cache, read without network. Raises _PassedOver."""
    repository = hub / f"models--{model_id.replace('/', '--')}"
    try:
        if not hub.is_dir():
            raise _PassedOver(f"{hub} does not exist")
        if not repository.is_dir():
            raise _PassedOver(f"{hub} holds no {model_id}")
        commit = _commit_there(repository, revision)
        folder = repository / "snapshots" / commit
        if not folder.is_dir():
            held = ", ".join(name[:8] for name in _snapshots(repository)[:3])
            raise _PassedOver(f"it holds {f'commit {held}' if held else 'no snapshot'}, not {commit[:8]}")
    except OSError as error:
        raise _PassedOver(f"{hub} cannot be read: {error.strerror}") from error
    if fault := incomplete(folder):
        raise _PassedOver(f"its snapshot {commit[:8]} is not whole: {fault}")
    return folder


def _commit_there(repository: Path, revision: str | None) -> str:
    """The commit that a cache's own notes give a revision; without one, main's or that of the only snapshot."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    note = repository / "refs" / (revision or "main")
    if note.is_file():
        commit = note.read_bytes().decode("ascii", "replace").strip()
        if not _COMMIT.fullmatch(commit):
            raise _PassedOver(f"{note} holds no commit")
        return commit
    if revision:
        raise _PassedOver(f"it does not know the revision {revision}")
    snapshots = _snapshots(repository)
    if len(snapshots) != 1:
        raise _PassedOver(f"it holds {len(snapshots)} snapshots and does not say which is main")
    return snapshots[0]


def _snapshots(repository: Path) -> list[str]:
    folder = repository / "snapshots"
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


# --- is it whole? ----------------------------------------------------------------------------------------------------


def incomplete(folder: Path) -> str | None:
    """What is missing or damaged in a model's folder, as a clause; None if nothing is. Reads headers, not weights."""
    try:
        if not folder.is_dir():
            return f"{folder} does not exist"
        if "transformers_weights" in _object(folder / "config.json"):
            return "its config.json names other weights than those of its index (transformers_weights)"
        if not any((folder / name).is_file() for name in _TOKENIZERS):
            return "it has no tokenizer (tokenizer.json)"
        for name in weight_files(folder):
            header(folder / name)
    except _PassedOver as fault:
        return str(fault)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    return None


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files that a loader reads, sorted. Raises _PassedOver where one is missing."""
    if (folder / WHOLE).is_file():  # it comes first for transformers too
        return [WHOLE]
    if (folder / INDEX).is_file():
        table = _object(folder / INDEX).get("weight_map")
        names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
        if not names or not all(_FILE.fullmatch(name) for name in names):
            raise _PassedOver(f"{INDEX} is not an index of shards")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise _PassedOver(f"{len(missing)} of {len(names)} shards are missing, {missing[0]} first")
        return names
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if others:
        raise _PassedOver(f"it has {others[0]!r} and no {WHOLE}: only safetensors are loaded")
    raise _PassedOver(f"it has no {WHOLE}")


def header(path: Path) -> dict[str, Any]:
    """A safetensors file's header, without its metadata. Raises _PassedOver where the file is not as long as it says.

    Reads the header's bytes alone. Each entry: `dtype` (BF16, U8, …), `shape`, `data_offsets` (bytes after the header).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _PassedOver(f"{path.name} is cut off or not a safetensors file ({size} bytes)")
        text = file.read(length)
    try:
        tensors: dict[str, Any] = json.loads(text)
        tensors.pop("__metadata__", None)
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, LookupError, AttributeError, RecursionError):
        raise _PassedOver(f"{path.name} is not a safetensors file") from None
    if size != expected:
        raise _PassedOver(f"{path.name} has {size} bytes where its header says {expected}")
    return tensors


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises _PassedOver."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _PassedOver(f"{path.name} is missing") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _PassedOver(f"{path.name} is not a JSON object")
    return value


def verify(folder: Path, how: str | None) -> str | None:
    """Check a model's files and say what is wrong, with the remedy; None if nothing is. `how`: VERIFY_WEIGHTS.

    "size" (also where None or empty): the index is complete and each file as long as its header says; milliseconds.
    "sha256": every byte against the repository's SHA256SUMS; about a second for each gigabyte.
    """
    how = how or "size"
    if how not in VERIFY:
        return f"VERIFY_WEIGHTS={how} is unknown; known are {', '.join(VERIFY)}"
    again = "delete the folder, or its repository in the cache, so that it is downloaded again"
    if fault := incomplete(folder):
        return f"the model in {folder} is not whole: {fault}; {again}"
    if how == "size":
        return None
    try:
        wrong = _wrong_sums(folder)
    except FileNotFoundError:
        return (
            f"VERIFY_WEIGHTS=sha256, but {folder} has no {SUMS}; publish the model with `make ablate`, which writes one,"
            " or set VERIFY_WEIGHTS=size"
        )
    except (OSError, ValueError) as error:
        return f"{folder / SUMS} cannot be used ({error}); {again}"
    if not wrong:
        return None
    more = f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"the model in {folder} is not what its {SUMS} says ({'; '.join(wrong[:3])}{more}): {again}"


def _wrong_sums(folder: Path) -> list[str]:
    """What differs from SHA256SUMS, a clause for each file. What a loader does not read may be absent, and unlisted."""
    sums: dict[str, str] = {}
    for number, line in enumerate((folder / SUMS).read_text(encoding="utf-8").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {number} is no line of a manifest")
        sums[match[2]] = match[1]
    small = {path.name for path in folder.iterdir() if _SMALL.fullmatch(path.name)} - {SUMS}
    names = sorted(small) + weight_files(folder)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets go of Python's lock
        found = dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))
    wrong = [f"{name} is missing" for name in sorted(sums) if _SMALL.fullmatch(name) and name not in found]
    for name, digest in found.items():
        if name not in sums:
            wrong.append(f"{name} is not listed")
        elif sums[name] != digest:
            wrong.append(f"{name} has changed")
    return wrong


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what it is ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What a model's files say about its size. Numbers that its config does not give are 0.

    `weight_bytes`: on disk. `parameters`, `linear_parameters`: all, and those that NF4 quantises (the matrices
    but embeddings and output layer); 0 where the files are quantised already, because packed bytes are not parameters.
    `quantization`: "nf4", "none" or the config's name. `layers`: with full attention. `window`: tokens that the model
    can read. `sliding_layers` keep `sliding_window` tokens.
    """

    weight_bytes: int
    parameters: int
    linear_parameters: int
    quantization: str
    layers: int
    kv_heads: int
    head_dim: int
    window: int
    sliding_layers: int = 0
    sliding_window: int = 0

    def kv_bytes(self, tokens: int, element: int = 2) -> int:
        """The size of the keys and values of `tokens` tokens, each number `element` bytes."""
        kept = self.layers * tokens + self.sliding_layers * min(tokens, self.sliding_window)
        return 2 * kept * self.kv_heads * self.head_dim * element


def describe(folder: Path) -> Description:
    """What the files of a whole model say; transformers is not imported. Raises WeightsError."""
    try:
        config = _object(folder / "config.json")
        names = weight_files(folder)
        tensors = {name: entry for file in names for name, entry in header(folder / file).items()}
        size = sum((folder / name).stat().st_size for name in names)
    except (_PassedOver, OSError) as fault:
        raise WeightsError(f"the model in {folder} cannot be described: {fault}; copy the whole model there") from fault
    # Models that see keep the numbers of their language model in a part of their own.
    part = config.get("text_config")
    text = config | part if isinstance(part, dict) else config
    quantization = _quantization(config, text)
    plain = quantization == "none"
    heads = _number(text, "num_attention_heads", "n_head")
    hidden = _number(text, "hidden_size", "n_embd")
    full, sliding = _layers(text)
    linear = [entry for name, entry in tensors.items() if _is_linear(name, entry)]
    return Description(
        weight_bytes=size,
        parameters=sum(map(_numel, tensors.values())) if plain else 0,
        linear_parameters=sum(map(_numel, linear)) if plain else 0,
        quantization=quantization,
        layers=full,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim") or (hidden // heads if heads else 0),
        window=_number(text, "max_position_embeddings", "n_positions"),
        sliding_layers=sliding,
        sliding_window=_number(text, "sliding_window") if sliding else 0,
    )


def _quantization(config: dict[str, Any], text: dict[str, Any]) -> str:
    given = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(given, dict) or not given:
        return "none"
    name = str(given.get("quant_method") or "unknown")
    if name == "bitsandbytes" or given.get("load_in_4bit") or given.get("_load_in_4bit"):
        if given.get("load_in_8bit") or given.get("_load_in_8bit"):
            return "int8"
        return str(given.get("bnb_4bit_quant_type") or "fp4")  # fp4 is the library's default
    return name


def _layers(text: dict[str, Any]) -> tuple[int, int]:
    """How many layers attend to everything, and how many to a sliding window. Unknown kinds keep no keys and values."""
    kinds = text.get("layer_types")
    if not isinstance(kinds, list):
        return _number(text, "num_hidden_layers", "n_layer"), 0
    return kinds.count("full_attention"), kinds.count("sliding_attention")


def _number(config: dict[str, Any], *keys: str) -> int:
    return next((value for key in keys if isinstance(value := config.get(key), int) and value > 0), 0)


def _numel(entry: dict[str, Any]) -> int:
    """The number of elements of a header's entry; its bytes where the kind of number is unknown."""
    start, end = entry["data_offsets"]
    return int((end - start) * 8 // _DTYPE_BITS.get(str(entry.get("dtype")), 8))


def _is_linear(name: str, entry: dict[str, Any]) -> bool:
    shape = entry.get("shape")
    embeds = re.search(r"embed|lm_head|wte|wpe", name) is not None
    return name.endswith(".weight") and isinstance(shape, list) and len(shape) == 2 and not embeds


# --- the Hub ---------------------------------------------------------------------------------------------------------


def download(model_id: str, revision: str | None, cache: Path, environ: Mapping[str, str]) -> Path:
    """Download what a loader reads of a repository into a Hugging Face cache; the snapshot's folder. Raises WeightsError.

    What lies in the cache already is not downloaded again, also after an interruption. Large files come through xet.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            folder = _download(model_id, revision, cache, environ)
            break
        except WeightsError:
            raise
        except Exception as error:
            problem, passing = _explained(error, model_id, revision, cache, environ)
            if not passing or attempt == ATTEMPTS:
                raise problem from error
            print(f"{problem}; trying again", flush=True)
            time.sleep(PAUSE * attempt)
    if fault := incomplete(folder):
        raise WeightsError(f"{model_id} as it is on the Hub cannot be used: {fault}; publish the whole model again")
    return folder


def _download(model_id: str, revision: str | None, cache: Path, environ: Mapping[str, str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    _limit_waiting()
    access = {"endpoint": _endpoint(environ), "token": environ.get("HF_TOKEN") or None}
    info = HfApi(**access).model_info(model_id, revision=revision, files_metadata=True, timeout=READ_TIMEOUT)
    if not info.sha or not _COMMIT.fullmatch(info.sha):
        raise WeightsError(f"the Hub names no commit for {model_id}; set HF_ENDPOINT to a Hub")
    sizes: dict[str, int] = {file.rfilename: file.size or 0 for file in info.siblings or []}
    folder: Path = cache / f"models--{model_id.replace('/', '--')}" / "snapshots" / info.sha

    def fetch(names: Iterable[str]) -> None:
        wanted = sorted(names)
        cache.mkdir(parents=True, exist_ok=True)
        for name in wanted:
            _forget_damaged(folder / name, sizes[name])
        missing = sum(sizes[name] for name in wanted if not (folder / name).exists())
        if sentence := too_little_space(missing, shutil.disk_usage(cache).free, cache):
            raise WeightsError(sentence, "disk")
        if missing:
            print(f"downloading {missing / 1e9:.2f} GB of {model_id} to {cache}", flush=True)
        snapshot_download(model_id, revision=info.sha, cache_dir=cache, allow_patterns=wanted, **access)

    # The index comes with the small files; it names the shards, and a repository may hold other weights beside them.
    small = {name for name in sizes if _SMALL.fullmatch(name)}
    fetch(small)
    shards = {WHOLE} if WHOLE in sizes or INDEX not in small else _shards_named(folder)
    fetch(small | (shards & sizes.keys()))
    return folder


def _forget_damaged(path: Path, size: int) -> None:
    """Delete a file of the cache that has another size than on the Hub: the Hub's client takes it for whole."""
    if path.exists() and path.stat().st_size != size:
        path.resolve().unlink()
        path.unlink(missing_ok=True)


def _shards_named(folder: Path) -> set[str]:
    """The files that the index names; none where it is not an index, which `incomplete` then says."""
    table = _object(folder / INDEX).get("weight_map")
    names = table.values() if isinstance(table, dict) else ()
    return {name for name in names if isinstance(name, str) and _FILE.fullmatch(name)}


def too_little_space(needed: int, free: int, folder: Path) -> str | None:
    """Can `needed` bytes be written to a file system with `free` bytes? None if so, else a sentence."""
    if not needed or needed + SPARE_DISK <= free:
        return None
    return (
        f"{folder} has {free / 1e9:.1f} GB free and the download needs {(needed + SPARE_DISK) / 1e9:.1f} GB; raise the"
        " endpoint's container disk, attach a network volume, or use the model's -nf4 repository"
    )


def _explained(
    error: Exception,
    model_id: str,
    revision: str | None,
    cache: Path,
    environ: Mapping[str, str],
    settings: tuple[str, str] = ("MODEL_ID", "MODEL_REVISION"),
) -> tuple[WeightsError, bool]:
    """The error as a sentence with its remedy, and whether it may pass by itself. Raises what is not the Hub's.

    `settings`: what a person set the repository's name and its revision with.
    """
    from huggingface_hub import errors

    hub, token = _endpoint(environ), environ.get("HF_TOKEN")
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    response = getattr(cause, "response", None)
    status = 0 if response is None else int(response.status_code)
    to_read = "set HF_TOKEN to a token that may read it"
    allowed = to_read if token else f"if it is private, {to_read}"
    if isinstance(error, _PassedOver):
        what = f"{model_id} as it is on the Hub cannot be used: {error}; publish the whole model again"
    elif isinstance(cause, errors.GatedRepoError):
        what = f"{model_id} is gated: accept its terms at {hub}/{model_id} with the account whose HF_TOKEN is set"
    elif isinstance(cause, errors.RevisionNotFoundError):
        what = f"{model_id} has no revision {revision}: set {settings[1]} to one of its commits"
    elif isinstance(cause, errors.RepositoryNotFoundError) or status == 404:
        what = f"{hub} shows no repository {model_id}: check {settings[0]}; {allowed}"
    elif status in (401, 403):
        what = f"{hub} refuses access to {model_id} (HTTP {status}): {allowed}"
    elif status:
        passing = status in (408, 429) or status >= 500
        return WeightsError(f"{hub} answers HTTP {status} for {model_id}: try again later"), passing
    elif isinstance(cause, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        what = f"{hub} may not be asked for {model_id} (HF_HUB_OFFLINE): unset HF_HUB_OFFLINE, or bake the model"
    elif isinstance(cause, errors.HTTPError):
        what = (
            f"{hub} cannot be reached ({type(cause).__name__}): check the network and HF_ENDPOINT, or bake the model"
            " into the image (docker buildx bake worker-baked)"
        )
        return WeightsError(what), True
    elif isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{cache} is full: raise the endpoint's container disk, attach a larger network volume, or use the -nf4 repository"
        return WeightsError(what, "disk"), False
    elif isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"{cache} cannot be written by user {os.geteuid()}: set HF_HOME to a folder that can"
        return WeightsError(what, "disk"), False
    elif isinstance(cause, (OSError, RuntimeError)):
        # The xet library raises RuntimeError for all that goes wrong in it.
        text = " ".join(str(cause).split())[:200]
        return WeightsError(f"the download of {model_id} failed ({type(cause).__name__}: {text}): try again"), True
    else:
        raise error
    return WeightsError(what), False


def _endpoint(environ: Mapping[str, str]) -> str:
    return (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _limit_waiting() -> None:
    """Give each request of the Hub's client a time limit. It has none, and some of its calls insist on none."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    limits = {"connect": CONNECT_TIMEOUT, "read": READ_TIMEOUT, "write": READ_TIMEOUT, "pool": READ_TIMEOUT}

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {kind: min(given.get(kind) or most, most) for kind, most in limits.items()}

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], limit]}
        return made

    set_client_factory(client)


def go_offline() -> None:
    """From here on no library in this process may ask a hub: all that a model needs lies in its folder.

    Where the package `kernels` is installed (the locks leave it out), bitsandbytes and transformers would fetch programs
    from the Hub at their import or while a model is loaded. Also if huggingface_hub has read its setting already.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


# --- attention -------------------------------------------------------------------------------------------------------


def attention(environ: Mapping[str, str], capability: Callable[[], tuple[int, int] | None] | None = None) -> str:
    """The `attn_implementation` to load a model with: "flash_attention_2" or "sdpa". Says why it is not flash.

    FLASH_ATTENTION is the folder that the image was built with a kernel in, and is on the module path there. It looks to
    transformers like the installed package flash-attn, so nothing is fetched at run time: the engine hands this name to
    `from_pretrained(attn_implementation=…)`, with bfloat16 or float16 weights, and keeps continuous batching's
    `auto_switch_to_flash` False. `capability`: the GPUs' lowest compute capability, None without a GPU.
    """
    have = (capability or _lowest_capability)()
    if have is None:
        return "sdpa"
    folder = environ.get("FLASH_ATTENTION")
    if not folder:
        print(
            "attention: sdpa, because this image was built without FLASH_KERNEL; without a flash-attention kernel jobs in"
            " a batch are slower (no CUDA graphs): build the image with one, see docs/worker.md",
            flush=True,
        )
        return "sdpa"
    if have < (8, 0):
        print(
            f"attention: sdpa, because flash attention needs an Ampere GPU or newer and this one is {have}", flush=True
        )
        return "sdpa"
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        print(
            f"attention: sdpa, because the kernel in {folder} does not load ({error}): build the image again",
            flush=True,
        )
        return "sdpa"
    return "flash_attention_2"


def _lowest_capability() -> tuple[int, int] | None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min((torch.cuda.get_device_capability(index) for index in range(count)), default=None)


def variant(names: Iterable[str], torch_version: str, cuda: str | None) -> str | None:
    """The best of a kernel repository's builds for a torch ("2.13.0+cu126") and its CUDA ("12.6"); None if none fits.

    A build for torch's stable interface fits all torches from its own on, others fit one. CUDA is compatible within its
    major version, upwards.
    """
    if cuda is None:
        return None
    have = tuple(int(part) for part in torch_version.split("+")[0].split(".")[:2])
    major, minor = (int(part) for part in cuda.split(".")[:2])
    fitting = []
    pattern = re.compile(r"torch(-stable-abi)?(\d)(\d+)(?:-cxx11)?-cu(\d+)(\d)-x86_64-linux")
    for name in names:
        if match := pattern.fullmatch(name):
            built, stable = (int(match[2]), int(match[3])), bool(match[1])
            fits = built <= have if stable else built == have
            if fits and int(match[4]) == major and int(match[5]) <= minor:
                fitting.append((stable, built, int(match[5]), name))
    return max(fitting)[-1] if fitting else None


def fetch_kernel(named: str, out: Path, environ: Mapping[str, str], torch_version: str, cuda: str | None) -> None:
    """Download a kernel, NAME@COMMIT, and lay it out in `out` as the package flash-attn. Raises WeightsError."""
    from huggingface_hub import HfApi, snapshot_download

    name, _, commit = named.partition("@")
    if not _REPOSITORY.fullmatch(name) or not _COMMIT.fullmatch(commit):
        raise WeightsError(
            f"FLASH_KERNEL={named!r} is not a kernel at a commit; set it like kernels-community/flash-attn2@<40 hex digits>"
        )
    access = {"endpoint": _endpoint(environ), "token": environ.get("HF_TOKEN") or None}
    try:
        _limit_waiting()
        tree = HfApi(**access).list_repo_tree(name, "build", revision=commit, repo_type="kernel")
        builds = sorted(entry.path.rsplit("/", 1)[-1] for entry in tree)
        chosen = variant(builds, torch_version, cuda)
        if chosen is None:
            there = " ".join(builds)
            raise WeightsError(f"{named} has no build for torch {torch_version} with CUDA {cuda}; it has: {there}")
        wanted, cache = [f"build/{chosen}/*"], out / "cache"
        snapshot = snapshot_download(
            name, revision=commit, repo_type="kernel", allow_patterns=wanted, cache_dir=cache, **access
        )
    except WeightsError:
        raise
    except Exception as error:
        raise _explained(error, name, commit, out, environ, ("FLASH_KERNEL", "FLASH_KERNEL"))[0] from error
    lay_out_kernel(Path(snapshot) / "build" / chosen, out, f"{named} {chosen}", commit)
    shutil.rmtree(cache)


def lay_out_kernel(build: Path, out: Path, source: str, commit: str) -> None:
    """Copy a kernel's build to `out` as the package flash_attn, with what transformers looks for. Raises WeightsError."""
    package = out / "flash_attn"
    shutil.copytree(build, package)
    if not (package / "flash_attn_interface.py").is_file():
        raise WeightsError(f"{source} is not a flash-attention kernel: it has no flash_attn_interface.py")
    padding = package / "bert_padding.py"
    if not padding.exists():  # which transformers imports from the package, though it has the same functions itself
        padding.write_text(
            "from transformers.modeling_flash_attention_utils import _pad_input as pad_input, _unpad_input as unpad_input\n"
        )
    # Transformers asks for 2.3.3 or newer; the kernels have the interface of 2.8.
    about = out / f"flash_attn-2.8.0+{commit[:8]}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.0+{commit[:8]}\nSummary: {source}\n"
    )
    (about / "top_level.txt").write_text("flash_attn\n")


def main(arguments: list[str], environ: Mapping[str, str]) -> None:
    """The two downloads of the image's build. Raises WeightsError."""
    if arguments == ["model"]:
        model_id, commit = environ.get("MODEL_ID") or "", environ.get("MODEL_REVISION") or ""
        if not _REPOSITORY.fullmatch(model_id) or not _COMMIT.fullmatch(commit):
            raise WeightsError(
                f"a model is baked at a commit only; MODEL_ID={model_id!r} MODEL_REVISION={commit!r}: set"
                " MODEL_ID=your-name/model-nf4 and MODEL_REVISION to the 40 hex digits of its commit"
            )
        folder = download(model_id, commit, Path(environ.get("BAKED_MODELS") or BAKED), environ)
        if (folder / SUMS).exists() and (fault := verify(folder, "sha256")):
            raise WeightsError(fault)
    elif len(arguments) == 3 and arguments[0] == "kernel":
        import torch

        fetch_kernel(arguments[1], Path(arguments[2]), environ, torch.__version__, torch.version.cuda)
    else:
        raise WeightsError("usage: weights.py model | weights.py kernel NAME@COMMIT FOLDER")


if __name__ == "__main__":
    try:
        main(sys.argv[1:], os.environ)
    except WeightsError as problem:
        sys.exit(f"error: {problem}")
