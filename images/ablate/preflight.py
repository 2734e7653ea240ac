# SPDX-License-Identifier: AGPL-3.0-or-later
"""Before a byte of weights is downloaded: can this model be ablated here, and published there?

Reads the model's metadata, config.json and tokenizer_config.json at one commit and downloads no weights; asks Heretic's
own code about the architecture, measures the machine, and looks at the token and at the repositories to publish to. The
answer is a table of what is needed and what is there. Sizes are bytes in the code and decimal gigabytes (10^9 bytes) in
what a person reads.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import architecture
import hardware as machine
import known_models
import licences
from common.problems import REMOTE_FAILED, Problem
from common.text import clean
from fetch import SHARD, check_folder, wanted, weights
from hardware import GB, gigabytes
from hub_client import QUESTION_TIMEOUT, Account, Gated, Missing, Questions, Refused

Verdict = Literal["ok", "warn", "no"]
Quantization = Literal["none", "bnb_4bit"]

# A model whose bfloat16 weights are no larger than this is ablated on a CPU too, in minutes to hours.
TINY = 2 * GB
_MAX_TOKENIZER = 50_000_000  # bytes of tokenizer_config.json; old ones list every added token
# What Python, torch and its libraries take, and the largest file that Heretic writes at once.
_RAM_BASE = 4 * GB
_SHARD = 5 * GB
# Beside the weights a run writes a journal, reports, pictures and the data sets; the rest is for file systems.
_DISK_SLACK = 1 * GB
_UNSAFE_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_PRECISION = {8: "float64", 4: "float32"}


@dataclass(frozen=True)
class Row:
    """One thing that was looked at. `advice`: what to do about it, "" where nothing is to be done."""

    subject: str
    need: str
    has: str
    verdict: Verdict
    advice: str = ""


@dataclass(frozen=True)
class Preflight:
    """What was found. `rows` tell whether to go on.

    `model`: Hub id, or path of a folder. `commit`: 40 hex digits, None for a folder. `files`: what a run downloads of the
    repository, weights and licence included; not other formats. `licence_files`: those of them that go along with a
    copy. `licence_name` and `licence_link`: the base model's own words where the Hub has no id for its licence, and where
    to read it, else None (`licence.id` is a key of the table of rules). `parameters`, `weight_bytes` (as stored),
    `bf16_bytes`: 0 where not known. `repo` and `nf4_repo`: "owner/name", None where nothing is published. `quantization`:
    what Heretic should run with here. `machine`: the GPUs, or "CPU". `card`: what to rent where this machine does not do.
    `expected_hours`, `expected_usd` and `usd_per_hour` are those of `card`, None where not known.
    """

    model: str
    commit: str | None
    licence: licences.Licence
    kind: str
    parameters: int
    weight_bytes: int
    bf16_bytes: int
    files: tuple[str, ...]
    licence_files: tuple[str, ...]
    licence_name: str | None
    licence_link: str | None
    repo: str | None
    nf4_repo: str | None
    quantization: Quantization
    machine: str
    card: str
    rows: tuple[Row, ...]
    expected_hours: float | None
    expected_usd: float | None
    usd_per_hour: float | None

    @property
    def source(self) -> str:
        """What to load: the folder, or "id@commit"."""
        return f"{self.model}@{self.commit}" if self.commit else self.model

    @property
    def licence_card(self) -> dict[str, str]:
        """license, license_name and license_link as they stand in the front matter of a copy's card."""
        return licences.front_matter(self.licence.id, self.licence_name, self.licence_link)

    def check(self) -> None:
        """Raise one Problem that lists every "no" of the table; return where there is none."""
        against = [row for row in self.rows if row.verdict == "no"]
        if not against:
            return
        listed = "\n".join(f"- {row.subject}: {row.advice or f'{row.has}, needed: {row.need}'}" for row in against)
        raise Problem(
            f"{self.model} cannot be ablated as asked:\n{listed}\nThen try again: make ablate MODEL={shlex.quote(self.model)}"
        )


def preflight(
    model: str,
    *,
    settings_quantization: Quantization,
    repo: str | None,
    publish: bool,
    public: bool,
    token: str | None,
    work: Path,
    hf_home: Path,
    hardware: machine.Hardware | None = None,
    models: Mapping[str, known_models.KnownModel] | None = None,
    search_done: bool = False,
    timeout: float = QUESTION_TIMEOUT,
) -> Preflight:
    """Look at everything and return what was found; its `check` then decides.

    `model`: a folder, or a Hub id, also "id@branch-or-commit". `repo`: "owner/name" or "name" to publish to, None for the
    default. `work`: the folder that runs are written to. `models`: config/models.yaml. `search_done`: the model and its 4-bit
    copy are made and verified, so their memory and space are not asked for. `timeout`: seconds for each answer of the Hub.
    Raises Problem where nothing more can be found out: no such model (2), Hub not reachable (75) or broken (5).
    """
    hub = Questions(token, timeout)
    base = _folder(model) if _is_folder(model) else _on_hub(hub, model, hf_home)
    rows = list(base.rows)

    rows += _weight_rows(base)
    shape, found = _architecture_rows(base)
    rows += found
    rows.append(_chat_template_row(base))
    if base.commit is None and not any(row.verdict == "no" for row in rows):
        rows += _folder_rows(base)
    if shape and base.weight_bytes and base.weight_bytes < 1.8 * shape.parameters:
        rows.append(
            Row(
                "completeness",
                f"{gigabytes(2 * shape.parameters)} of weights, as config.json describes",
                gigabytes(base.weight_bytes),
                "no",
                "weights are missing, or have less than 16 bits; use a complete copy in bfloat16",
            )
        )

    known = (known_models.load() if models is None else models).get(base.model.lower())
    needs = _needs(shape, base, known)
    quantization: Quantization = settings_quantization
    if hardware is None:
        hardware = machine.measure((work, hf_home))
    if needs:
        if search_done:
            rows.append(Row("GPU", "none", "the search is done; what is left is to publish", "ok"))
        else:
            quantization, found = _memory_rows(needs, hardware, settings_quantization)
            rows += found
        rows += _disk_rows(needs, base, hardware, work, hf_home, search_done)

    target = nf4 = None
    if publish:
        target, nf4, found = _publish_rows(hub, base, repo, public)
        rows += found
    return Preflight(
        model=base.model,
        commit=base.commit,
        licence=licences.licence_of(base.licence),
        kind=shape.kind if shape else "unknown",
        parameters=shape.parameters if shape else 0,
        weight_bytes=base.weight_bytes,
        bf16_bytes=shape.bf16_bytes if shape else 0,
        files=tuple(wanted(base.files)),
        licence_files=tuple(licences.goes_along(base.files)),
        licence_name=licences.declared_name(base.card),
        licence_link=licences.declared_link(base.card),
        repo=target,
        nf4_repo=nf4,
        quantization=quantization,
        machine=_machine(hardware),
        card=needs.card if needs else "a larger GPU",
        rows=tuple(rows),
        expected_hours=known.hours if known else None,
        expected_usd=known.usd if known else None,
        usd_per_hour=known.usd_per_hour if known else None,
    )


def table(found: Preflight, width: int = 120) -> str:
    """What was found, as aligned plain text without colour, for a terminal, a file or a log. Ends in a newline."""
    revision = f" at {found.commit[:12]}" if found.commit else ""
    size = (
        f"{found.parameters / 1e9:.3g} billion parameters"
        if found.parameters >= 1e7
        else f"{found.parameters} parameters"
    )
    lines = [f"{found.model}{revision}: {found.kind}, {size if found.parameters else 'size not known'}", ""]
    head = ("", "needed", "there", "verdict")
    cells = [(row.subject, row.need, row.has, row.verdict) for row in found.rows]
    # The two columns of text share what the others leave.
    subject = max(len(cell[0]) for cell in [head, *cells])
    room = max(20, (width - subject - len("verdict") - 8) // 2)
    widths = [subject, *(min(room, max(len(cell[index]) for cell in [head, *cells])) for index in (1, 2))]
    for cell, advice in [(head, ""), *((cell, row.advice) for cell, row in zip(cells, found.rows, strict=True))]:
        wrapped = [textwrap.wrap(cell[index], widths[index]) or [""] for index in (0, 1, 2)]
        for number in range(max(map(len, wrapped))):
            parts = [part[number] if number < len(part) else "" for part in wrapped]
            text = "  ".join(part.ljust(size) for part, size in zip(parts, widths, strict=True))
            lines.append(f"  {text}  {cell[3] if number == 0 else ''}".rstrip())
        indent = " " * (subject + 4)
        lines += textwrap.wrap(advice, max(40, width), initial_indent=indent + "→ ", subsequent_indent=indent + "  ")
    lines += ["", f"Expected: {_expected(found)}"]
    if found.repo:
        lines.append(f"Published to: {found.repo} and {found.nf4_repo}")
    return clean("\n".join(lines)) + "\n"


def _expected(found: Preflight) -> str:
    if found.expected_hours is None or found.expected_usd is None or found.usd_per_hour is None:
        return "time and cost not known (the model is not in config/models.yaml)"
    return (
        f"about {found.expected_hours:g} hours on {found.card}, about ${found.expected_usd:.2f}"
        f" at ${found.usd_per_hour:.2f} an hour (config/models.yaml)"
    )


# --- the base model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Base:
    """The base model, wherever it is. `files`: name → size in bytes (None: not said), top level only. `folder` holds
    config.json and tokenizer_config.json where the base has them. `cached`: bytes of the weights that are here already.
    `card`: the metadata of its README.md."""

    model: str
    commit: str | None
    files: Mapping[str, int | None]
    folder: Path | None
    card: Mapping[str, Any]
    rows: tuple[Row, ...]
    cached: int = 0

    @property
    def licence(self) -> str | None:
        return licences.declared(self.card)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weight files that transformers loads: one file, or a set of shards."""
        return tuple(weights(self.files))

    @property
    def weight_bytes(self) -> int:
        return sum(self.files[name] or 0 for name in self.weights)


def _is_folder(model: str) -> bool:
    # An empty name would be the folder that we are in.
    return model.strip() != "" and "\0" not in model and len(model) < 4096 and Path(model).is_dir()


def _folder(model: str) -> _Base:
    folder = Path(model)
    files = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
    row = Row("model", "a folder", "found", "ok")
    return _Base(model.rstrip("/") or model, None, files, folder, _front_matter(folder / "README.md"), (row,))


def _front_matter(path: Path) -> dict[str, Any]:
    """The metadata block of a model card, empty where there is none that can be read."""
    import yaml

    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            match = re.match(r"---\r?\n(.*?)\r?\n---", file.read(1_000_000), re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _on_hub(hub: Questions, model: str, hf_home: Path) -> _Base:
    name, _, revision = model.partition("@")
    if model.startswith(("/", ".", "~")) or "\\" in model:
        raise Problem(
            f"MODEL={model!r:.200} is no folder that exists; check the path, or give a Hub id like Qwen/Qwen3-14B"
        )
    if not known_models.MODEL_ID.fullmatch(name) or ".." in name or "--" in name or len(name) > 200:
        raise Problem(
            f"MODEL={model!r:.200} is neither a folder nor a model id; an id has an owner and a name: MODEL=Qwen/Qwen3-14B"
        )
    if "@" in model and not re.fullmatch(r"[A-Za-z0-9][\w./-]{0,200}", revision, re.ASCII):
        raise Problem(
            f"MODEL={model!r:.200}: what follows @ must be a branch, a tag or a commit; try MODEL={name}@main"
        )
    try:
        info = hub.call(
            f"model {name}",
            lambda api: api.model_info(name, revision=revision or None, files_metadata=True, timeout=hub.timeout),
        )
    except Gated:
        raise Problem(_accept_licence(hub, name)) from None
    except Refused:
        raise Problem(hub.refusal()) from None
    except Missing as error:
        if revision and error.revision:
            raise Problem(f"{name} has no revision {revision!r:.200}; try MODEL={name}@main") from None
        private = "or is not open to the account of HF_TOKEN" if hub.token else "or is private, and HF_TOKEN is not set"
        raise Problem(
            f"{name} does not exist on {hub.endpoint}, {private}; check MODEL, and HF_TOKEN in .env"
        ) from None
    commit = info.sha
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise Problem(f"{hub.endpoint} names no commit for {name}; try again later", REMOTE_FAILED)
    files = {
        sibling.rfilename: sibling.size if isinstance(sibling.size, int) and sibling.size >= 0 else None
        for sibling in info.siblings or []
        if isinstance(sibling.rfilename, str) and re.fullmatch(r"[^/\0-\x1f]{1,200}", sibling.rfilename)
    }
    card = info.card_data.to_dict() if info.card_data else {}
    rows = [Row("model", "one commit of it, pinned", f"{commit[:12]} ({clean(revision) or 'main'})", "ok")]
    folder: Path | None = None
    cache = hf_home / "hub"
    try:
        for wanted, limit in (("config.json", architecture.MAX_CONFIG), ("tokenizer_config.json", _MAX_TOKENIZER)):
            if wanted in files and (files[wanted] or 0) <= limit:
                folder = Path(
                    hub.call(f"{wanted} of {name}", _download(name, wanted, commit, cache, hub.timeout))
                ).parent
    except Gated:
        rows.append(Row("access", "the licence accepted", "not accepted", "no", _accept_licence(hub, name)))
    except Refused:
        raise Problem(hub.refusal()) from None
    except Missing:
        raise Problem(
            f"{hub.endpoint} lists files of {name} that it does not have; try again later", REMOTE_FAILED
        ) from None
    base = _Base(name, commit, files, folder, card, tuple(rows))
    return _Base(name, commit, files, folder, card, tuple(rows), _cached(base, cache))


def _download(name: str, file: str, commit: str, cache: Path, timeout: float) -> Callable[[Any], str]:
    def download(api: Any) -> str:
        return str(api.hf_hub_download(name, file, revision=commit, cache_dir=cache, etag_timeout=timeout))

    return download


def _cached(base: _Base, cache: Path) -> int:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(base.model, name, cache_dir=cache, revision=base.commit) for name in base.weights)
    return sum(Path(path).stat().st_size for path in found if isinstance(path, str))


def _accept_licence(hub: Questions, name: str) -> str:
    account = "with the account of HF_TOKEN" if hub.token else "with your account, then set HF_TOKEN in .env"
    return f"{name} is gated: accept its licence at {hub.endpoint}/{name} {account}"


def _folder_rows(base: _Base) -> list[Row]:
    """What loading a folder would stop at. (Of a repository, code and other formats are not downloaded.)"""
    try:
        check_folder(Path(base.model))
    except Problem as problem:
        return [Row("folder", "data alone", "more, or less", "no", str(problem))]
    return []


def _weight_rows(base: _Base) -> list[Row]:
    need = "safetensors"
    names = list(base.files)
    if base.weights:
        shards = [match for name in base.weights if (match := SHARD.fullmatch(name))]
        totals = {int(match[2]) for match in shards}
        count = max(totals, default=1)
        if len(totals) > 1 or len(base.weights) != count:
            has = f"{len(base.weights)} of {count} files"
            return [Row("weights", need, has, "no", "files of the weights are missing; use a complete copy")]
        if shards and "model.safetensors.index.json" not in names:
            advice = "model.safetensors.index.json is missing; use a complete copy"
            return [Row("weights", need, f"{count} files without an index", "no", advice)]
        if any(base.files[name] is None for name in base.weights):
            return [
                Row("weights", need, f"{count} files of a size that is not said", "warn", "the disk cannot be checked")
            ]
        return [Row("weights", need, f"{count} file{'s' * (count > 1)}, {gigabytes(base.weight_bytes)}", "ok")]
    if any(name.startswith("adapter_") for name in names):
        has, advice = "an adapter", "it is an adapter for another model: merge it into that model first"
    elif any(name.endswith(".gguf") for name in names):
        has, advice = "GGUF only", "GGUF is quantised and cannot be edited: use the original repository of the model"
    elif any(name.endswith(_UNSAFE_WEIGHTS) for name in names):
        has, advice = "pickled files only", "loading these runs code that they hold: use a copy in safetensors"
    else:
        has, advice = "none", "there are no model*.safetensors in it: check MODEL"
    return [Row("weights", need, has, "no", advice)]


def _architecture_rows(base: _Base) -> tuple[architecture.Architecture | None, list[Row]]:
    need = "layers that Heretic edits"
    if "config.json" not in base.files:
        return None, [Row("architecture", need, "no config.json", "no", "it is not a transformers model: check MODEL")]
    if (base.files["config.json"] or 0) > architecture.MAX_CONFIG:
        return None, [
            Row("architecture", need, "a config.json that is too large", "no", "config.json is no config: check MODEL")
        ]
    if base.folder is None:
        return None, [Row("architecture", need, "not looked at: no access", "warn")]
    try:
        shape = architecture.inspect(base.folder)
    except architecture.Unsupported as error:
        return None, [Row("architecture", need, "none", "no", f"the model cannot be ablated: {error}")]
    edited = ", ".join(f"{name} in {count}" for name, count in shape.layers_edited.items())
    has = f"{shape.name}, {shape.kind}, {shape.layers} layers: {edited}"
    return shape, [Row("architecture", need, has, "warn" if shape.doubt else "ok", shape.doubt)]


def _chat_template_row(base: _Base) -> Row:
    """Heretic asks its questions through the tokenizer's chat template."""
    subject, need = "tokenizer", "a chat template"
    if not any(name in base.files for name in _TOKENIZERS):
        return Row(subject, need, "no tokenizer", "no", "there is no tokenizer in it: use a complete copy")
    if base.folder is None:
        return Row(subject, need, "not looked at: no access", "warn")
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in base.files:
        try:
            settings = architecture.read_json(base.folder / "tokenizer_config.json", _MAX_TOKENIZER)
        except architecture.Unsupported as error:
            return Row(subject, need, "not readable", "no", f"the tokenizer cannot be used: {error}")
    if settings.get("auto_map"):
        advice = "the tokenizer needs Python code from its repository, and only code that was installed is run"
        return Row(subject, need, "its own code", "no", advice)
    if "chat_template.jinja" in base.files:
        return Row(subject, need, "chat_template.jinja", "ok")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (each.get("template") for each in template if isinstance(each, dict) and each.get("name") == "default"),
            None,
        )
    if isinstance(template, str) and template.strip():
        return Row(subject, need, "in tokenizer_config.json", "ok")
    advice = "it is a base model that was not trained to chat (and does not refuse): use the instruct or chat version"
    return Row(subject, need, "none", "no", advice)


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Needs:
    """Sizes in bytes. `load`: the weights in the precision that they are loaded in."""

    load: int
    bf16: int
    nf4: int
    vram: int
    vram_nf4: int
    card: str
    precision: int


def _needs(
    shape: architecture.Architecture | None, base: _Base, known: known_models.KnownModel | None
) -> _Needs | None:
    """None where the size of the model is not known. Without its config.json it is taken from the stored weights."""
    if shape:
        stored = 4 if base.weight_bytes >= 3 * shape.parameters else 2
        precision = shape.precision or stored
        bf16, load = shape.bf16_bytes, shape.parameters * precision
        nf4 = known_models.nf4_bytes(shape.parameters, shape.linear)
    elif base.weight_bytes:
        precision = 2
        bf16 = load = base.weight_bytes
        nf4 = round(0.35 * bf16)  # as of small models: the larger, the smaller the share
    else:
        return None
    vram, vram_nf4 = known_models.vram_bf16(load), known_models.vram_bnb_4bit(load, nf4)
    if known and precision == 2:
        vram, vram_nf4 = round(known.vram_bf16_gb * GB), round(known.vram_bnb_4bit_gb * GB)
    return _Needs(load, bf16, nf4, vram, vram_nf4, known.card if known else known_models.card_for(vram), precision)


def _memory_rows(needs: _Needs, hardware: machine.Hardware, wanted: Quantization) -> tuple[Quantization, list[Row]]:
    """What the GPUs and the RAM must hold, and the quantisation that this machine should run with."""
    foreign = [gpu for gpu in hardware.gpus if not gpu.usable]
    if foreign:
        advice = (
            f"this torch has no programs for {foreign[0].kind}: hide it (CUDA_VISIBLE_DEVICES), install a torch that is built for"
            f" it, or rent {needs.card}"
        )
        has = f"{foreign[0].name} ({foreign[0].kind})"
        return wanted, [Row("GPU", "one that the installed torch is built for", has, "no", advice)]
    if not hardware.gpus:
        if needs.bf16 > TINY:
            need = f"{gigabytes(needs.vram)} of GPU memory"
            advice = f"rent {needs.card} and run it there; on a CPU only models up to {gigabytes(TINY)} are ablated"
            if hardware.unseen:
                advice = f"{hardware.unseen}; or {advice}"
            return wanted, [Row("GPU", need, "no GPU", "no", advice)]
        # Loaded once for the search and once to be written, side by side at the end.
        need_ram = _RAM_BASE // 2 + 2 * max(needs.load, needs.bf16)
        return wanted, [
            Row(
                "GPU",
                "none for a model this small",
                "no GPU: runs on the CPU",
                "warn" if hardware.unseen else "ok",
                hardware.unseen,
            ),
            _ram_row(need_ram, need_ram, hardware.ram_free, "to load and to write it"),
        ]
    free = hardware.vram_free
    has = f"{gigabytes(free)} free on {_machine(hardware)}"
    precision = _PRECISION.get(needs.precision, "16 bits")
    quantization = wanted
    if wanted == "none" and needs.vram <= free:
        rows = [Row("GPU", f"{gigabytes(needs.vram)} ({precision})", has, "ok")]
    elif needs.vram_nf4 <= free:
        quantization = "bnb_4bit"
        need = f"{gigabytes(needs.vram_nf4)} (bnb_4bit)"
        if wanted == quantization:
            rows = [Row("GPU", need, has, "ok")]
        else:
            advice = (
                f'{gigabytes(needs.vram)} are needed in {precision}; quantization = "bnb_4bit" fits and is used, slower.'
                f" Faster: rent {needs.card}"
            )
            rows = [Row("GPU", need, has, "warn", advice)]
    else:
        least = needs.vram_nf4 if needs.vram_nf4 < needs.vram or wanted == "bnb_4bit" else needs.vram
        need = f"{gigabytes(needs.vram)} ({precision})" if wanted == "none" else f"{gigabytes(least)} (bnb_4bit)"
        advice = f"rent {needs.card}"
        if least < needs.vram and known_models.card_for(least) != needs.card:
            advice += f', or {known_models.card_for(least)} with quantization = "bnb_4bit" in config/heretic.toml'
        if free < needs.vram_nf4 <= sum(gpu.total for gpu in hardware.gpus):
            advice += "; or end what else uses the GPU: nvidia-smi"
        rows = [Row("GPU", need, has, "no", advice)]
        return wanted, rows
    if quantization == "bnb_4bit":
        # The edit is merged into the unquantised weights, in RAM. Heretic's own rule is 3 GB for each billion parameters.
        rows.append(
            _ram_row(round(1.5 * needs.load), _RAM_BASE + needs.load, hardware.ram_free, "to merge unquantised")
        )
    else:
        least = _RAM_BASE + min(needs.load, _SHARD)
        rows.append(_ram_row(least, least, hardware.ram_free, "to load and to write it"))
    return quantization, rows


def _ram_row(need: int, least: int, free: int, why: str) -> Row:
    verdict: Verdict = "ok" if free >= need else "warn" if free >= least else "no"
    advice = {
        "ok": "",
        "warn": "it fits barely: end other programs first",
        "no": f"use a machine with {gigabytes(need)} of free RAM, or raise the container's memory limit",
    }[verdict]
    return Row("RAM", f"{gigabytes(need)} {why}", f"{gigabytes(free)} free", verdict, advice)


def _disk_rows(
    needs: _Needs, base: _Base, hardware: machine.Hardware, work: Path, hf_home: Path, search_done: bool
) -> list[Row]:
    """Space for the download, the ablated model and its 4-bit copy; on one file system they add up."""
    parts = (
        (hf_home, "download", 0 if base.commit is None else max(0, base.weight_bytes - base.cached)),
        (work, "ablated model", 0 if search_done else needs.bf16),
        (work, "4-bit copy", 0 if search_done else needs.nf4),
        (work, "the rest", _DISK_SLACK),
    )
    disks = {path: hardware.disks.get(path) or machine.disk(path) for path in (hf_home, work)}
    rows = []
    for path in disks:
        if not disks[path].writable:
            variable = "HF_HOME" if path == hf_home else "ABLATIONS_DIR"
            rows.append(
                Row("disk", f"{path} writable", "not writable", "no", f"set {variable} to a folder that you own")
            )
    for device in dict.fromkeys(disk.device for disk in disks.values()):
        here = [(path, what, size) for path, what, size in parts if disks[path].device == device and size]
        if not here:
            continue
        need = sum(size for _, _, size in here)
        free = min(disk.free for disk in disks.values() if disk.device == device)
        there = _earlier(work, base) if disks[work].device == device else 0
        where = " and ".join(dict.fromkeys(str(path) for path, _, _ in here))
        verdict: Verdict = "ok" if free >= need else "warn" if free + there >= need else "no"
        advice = {
            "ok": "",
            "warn": f"enough if this goes on with the run whose {gigabytes(there)} of weights are in {work} already",
            "no": f"free {gigabytes(need - free - there)} on the disk of {where}, or use a larger one",
        }[verdict]
        listed = ", ".join(f"{what} {gigabytes(size)}" for _, what, size in here)
        rows.append(Row("disk", f"{gigabytes(need)}: {listed}", f"{gigabytes(free)} free", verdict, advice))
    return rows


def _earlier(work: Path, base: _Base) -> int:
    """The bytes of weights that a run of this model has written already, and that the same run will not need again."""
    sizes = [0]
    for record in work.glob("*/run.json"):
        try:
            state = architecture.read_json(record, _MAX_TOKENIZER)
        except architecture.Unsupported:
            continue
        if (state.get("model"), state.get("commit")) == (base.model, base.commit):
            weights = (
                path for path in record.parent.rglob("*.safetensors") if path.is_file() and not path.is_symlink()
            )
            sizes.append(sum(path.stat().st_size for path in weights))
    return max(sizes)


def _machine(hardware: machine.Hardware) -> str:
    names = [gpu.name for gpu in hardware.gpus]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "CPU"


# --- where it is published ---------------------------------------------------------------------------------------------


def _publish_rows(
    hub: Questions, base: _Base, repo: str | None, public: bool
) -> tuple[str | None, str | None, list[Row]]:
    """The two repositories (None where the owner is not known) and what is in the way of publishing to them."""
    default = licences.default_repo_name(base.model, base.licence)
    owner, _, name = (default if repo is None else repo).rpartition("/")
    rows = [_licence_row(base, owner, name, public)]
    if not hub.token:
        advice = f"make a token with write permission at {hub.endpoint}/settings/tokens and set HF_TOKEN in .env (or PUBLISH=0)"
        return None, None, [*rows, Row("token", "HF_TOKEN that may write", "not set", "no", advice)]
    try:
        who = hub.whoami()
    except Refused:
        return None, None, [*rows, Row("token", "HF_TOKEN that may write", "refused", "no", hub.refusal())]
    owner = owner or who.name
    target = f"{owner}/{name}"
    if (
        not known_models.MODEL_ID.fullmatch(target)
        or re.search(r"--|\.\.|[-.]$|\.git$", target)
        or len(name) > licences.MAX_NAME - 4
    ):
        advice = f"REPO={clean(target)!r:.200} is no repository's name; try REPO={owner}/{default}"
        return None, None, [*rows, Row("repository", "a name", "none", "no", advice)]
    rows.append(_token_row(hub, who, owner, target))
    for each in (target, f"{target}-nf4"):
        rows.append(_target_row(hub, base, each, public))
    return target, f"{target}-nf4", rows


def _licence_row(base: _Base, owner: str, name: str, public: bool) -> Row:
    rules = licences.licence_of(base.licence)
    need = (
        f"a name that begins with {rules.prefix}"
        if rules.prefix
        else "its rules known, to be public"
        if public
        else "its rules kept"
    )
    has = base.licence or "none named"
    try:
        licences.check(base.licence, f"{owner}/{name}" if owner else name, public)
    except Problem as problem:
        return Row("licence", need, has, "no", str(problem))
    return Row("licence", need, f"{has}, named {name}" if rules.prefix else has, "ok")


def _token_row(hub: Questions, who: Account, owner: str, target: str) -> Row:
    need = f"HF_TOKEN that may write to {owner}"
    settings = f"{hub.endpoint}/settings/tokens"
    has = f"{who.role or 'a'} token of {who.name}"
    if owner != who.name and owner not in who.organisations:
        mine = ", ".join((who.name, *who.organisations))
        return Row(
            "token",
            need,
            has,
            "no",
            f"this account may write to {mine}: set REPO={who.name}/{target.partition('/')[2]}",
        )
    if who.role == "read" or (owner != who.name and who.organisations[owner] == "read"):
        return Row("token", need, has, "no", f"it may only read: make a token with write permission at {settings}")
    if who.role == "write":
        return Row("token", need, has, "ok")
    if who.role == "fineGrained" and who.writes is not None:
        if owner in who.writes:
            return Row("token", need, has, "ok")
        if target in who.writes and f"{target}-nf4" in who.writes:
            return Row("token", need, f"{has}, for these repositories", "ok")
        return Row(
            "token",
            need,
            has,
            "no",
            f"it may not write to repositories of {owner}: give it that permission at {settings}",
        )
    return Row(
        "token", need, has, "warn", "what it may do cannot be told from the Hub's answer; publishing will show it"
    )


def _target_row(hub: Questions, base: _Base, target: str, public: bool) -> Row:
    subject, need = "repository", f"{target} new, or ours and {'public or ' * public}private"
    if target.lower() == base.model.lower():
        return Row(
            subject, need, "the base model", "no", "the base model would be overwritten: set REPO to another name"
        )
    try:
        info = hub.call(f"repository {target}", lambda api: api.model_info(target, timeout=hub.timeout))
    except Missing:
        return Row(subject, need, "new", "ok")
    except (Gated, Refused):
        return Row(
            subject, need, "exists, no access", "no", f"the token may not read {target}: set REPO to another name"
        )
    if info.private is True:
        if public:
            advice = (
                f"{target} is private, and is not made public from here: do it first at {hub.endpoint}/{target}/settings,"
                " or leave PUBLIC unset"
            )
            return Row(subject, need, "exists, private", "no", advice)
        return Row(subject, need, "exists, private: gets a new commit", "ok")
    if public:
        return Row(subject, need, "exists, public: gets a new commit", "ok")
    advice = f"{target} is public: make it private at {hub.endpoint}/{target}/settings, or set REPO to another name (or PUBLIC=1)"
    return Row(subject, need, "exists, public", "no", advice)
