# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a model is, from its config.json alone, and whether Heretic can edit it.

The model is built without weights (on torch's "meta" device), and Heretic's own code looks for its layers in it: the
answer is the one that a run would come to after the download.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.text import clean

MAX_CONFIG = 1_000_000  # bytes; the largest known config.json has some ten thousand
# Above this a count in config.json is no model but an attempt to keep us busy.
_MAX_COUNT = 10_000
_COUNT_KEY = re.compile(r"layer|expert|label|block|depth|head")
_EXPERT_KEY = re.compile(r"(num|n)_.*experts|.*num_experts|moe_num_.*")
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Unsupported(Exception):
    """This model cannot be ablated; the message says why, in a clause without a full stop."""


@dataclass(frozen=True)
class Architecture:
    """A model as config.json describes it.

    `kind`: dense, moe (mixture of experts), ssm (state space, no attention) or hybrid (both). `parameters`: all, shared
    ones once. `linear`: those of them that bitsandbytes can quantise. `precision`: bytes per parameter as config.json
    names it, 0 where it does not. `layers_edited`: component → number of layers in which Heretic can edit it. `doubt`: "" or what
    Heretic will not reach.
    """

    name: str
    kind: str
    layers: int
    parameters: int
    linear: int
    precision: int
    layers_edited: dict[str, int]
    doubt: str

    @property
    def bf16_bytes(self) -> int:
        return 2 * self.parameters


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict, refused where it asks for the repository's own code, or is quantised, or is not a config.

    Raises Unsupported.
    """
    config = read_json(path, MAX_CONFIG)
    if (mapped := _find(config, "auto_map")) is not None:
        raise Unsupported(
            f"it needs Python code from its repository ({clean(str(mapped))[:80]}), and only code that was installed is run"
        )
    for key in ("quantization_config", "compression_config"):
        if (section := _find(config, key)) is not None:
            method = section.get("quant_method") if isinstance(section, dict) else None
            named = f" ({clean(method)[:40]})" if isinstance(method, str) else ""
            raise Unsupported(f"its weights are quantised already{named}, and an edit needs them in full precision")
    for key, value in _items(config):
        if _COUNT_KEY.search(key) and isinstance(value, int) and value > _MAX_COUNT:
            raise Unsupported(f"its config.json names {value} as {clean(key)[:60]}, which no model has")
    if not isinstance(config.get("model_type"), str):
        raise Unsupported("its config.json names no model_type")
    return config


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises Unsupported."""
    try:
        if path.stat().st_size > limit:
            raise Unsupported(f"its {path.name} has more than {limit / 1e6:g} MB, which is no {path.stem}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unsupported(f"its {path.name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError):  # ValueError: not JSON, not UTF-8, or a number of thousands of digits
        raise Unsupported(f"its {path.name} is not JSON") from None
    if not isinstance(value, dict):
        raise Unsupported(f"its {path.name} is no JSON object")
    return value


def inspect(folder: Path) -> Architecture:
    """Build the model of `folder`/config.json without weights and ask Heretic about it. Reads no other file.

    Raises Unsupported where transformers does not know the model or Heretic finds nothing to edit.
    """
    config = read_config(folder / "config.json")
    with quiet():
        heretic_model = import_heretic_model()
        model = _build(folder, heretic_model)
        return _inspected(config, model, heretic_model)


def import_heretic_model() -> Any:
    """The module heretic.model, imported without its dependency bitsandbytes fetching a compiled kernel from the Hub
    (it does on CPUs with AVX-512 BF16): what runs here was installed from the lock."""
    with _no_kernels():
        import heretic.model

    return heretic.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, log lines and progress bars of the libraries; the state before comes back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def _no_kernels() -> Iterator[None]:
    try:
        import kernels  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        yield
        return

    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("no code is fetched at run time")

    real = kernels.get_kernel
    kernels.get_kernel = refuse
    try:
        yield
    finally:
        kernels.get_kernel = real


def _build(folder: Path, heretic_model: Any) -> Any:
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            # "eager" overrules a value in config.json, which may name a kernel on the Hub.
            return heretic_model.get_model_class(str(folder)).from_config(
                config, trust_remote_code=False, attn_implementation="eager"
            )
    except Exception as error:  # whatever a config makes transformers raise, it is the config's
        reason = " ".join(clean(str(error)).split())
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        raise Unsupported(
            f"transformers {transformers.__version__} cannot build its model_type {clean(kind)[:60]!r}: {reason[:200]}"
        ) from error


def _inspected(config: dict[str, Any], model: Any, heretic_model: Any) -> Architecture:
    import torch

    name = type(model).__name__
    classes = {type(module).__name__ for module in model.modules()}
    attends = any("Attention" in each for each in classes)
    recurrent = any(
        re.search(r"Mamba|SSM|Rwkv|RecurrentBlock|DeltaNet|ShortConv|xLSTM|LinearAttention", c) for c in classes
    )
    experts = max((v for k, v in _items(config) if _EXPERT_KEY.fullmatch(k) and isinstance(v, int)), default=0) > 1
    kind = "ssm" if recurrent and not attends else "hybrid" if recurrent else "moe" if experts else "dense"

    # Heretic's methods on an object that has what they look at, and nothing that loads weights.
    heretic = object.__new__(heretic_model.Model)
    heretic.model = model
    what = {"ssm": "a state space model", "hybrid": "a hybrid of attention and state space layers"}.get(
        kind, "this kind"
    )
    refusal = f"Heretic finds nothing to edit in {name}: {what} is not supported"
    try:
        count = len(heretic.get_layers())
        modules = [heretic.get_layer_modules(index) for index in range(count)]
        components = heretic.get_abliterable_components()
    except Exception:
        raise Unsupported(refusal) from None
    if not count or not components:
        raise Unsupported(refusal)
    edited = {component: sum(component in layer for layer in modules) for component in components}

    doubt = ""
    missing = [component for component in ("attn.o_proj", "mlp.down_proj") if edited.get(component, 0) < count]
    if missing:
        rest = " and ".join(f"{component} in {edited.get(component, 0)} of {count} layers" for component in missing)
        reason = (
            " (the experts are one tensor, not layers of their own)" if experts and "mlp.down_proj" in missing else ""
        )
        doubt = f"Heretic edits {rest}{reason}: refusals may stay"
    elif kind == "hybrid":
        doubt = "Heretic was made for models whose layers are alike: refusals may stay"

    output = model.get_output_embeddings()
    # bitsandbytes takes linear layers, and leaves the output layer as it is.
    linear = sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear and m is not output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Architecture(
        name=name,
        kind=kind,
        layers=count,
        parameters=parameters,
        linear=linear,
        precision=_precision(config),
        layers_edited=edited,
        doubt=doubt,
    )


def _precision(config: dict[str, Any]) -> int:
    for key in ("dtype", "torch_dtype"):
        value = _find(config, key)
        if isinstance(value, str):
            return _DTYPE_BYTES.get(value.removeprefix("torch."), 2)
    return 0


def _items(value: object) -> Iterator[tuple[str, object]]:
    """All keys and values of a JSON value, at any depth."""
    todo = [value]
    while todo:
        current = todo.pop()
        if isinstance(current, dict):
            for key, inner in current.items():
                yield key, inner
                todo.append(inner)
        elif isinstance(current, list):
            todo.extend(current)


def _find(config: dict[str, Any], wanted: str) -> object | None:
    """The value of a key that is not null or empty, at any depth."""
    return next((value for key, value in _items(config) if key == wanted and value), None)
