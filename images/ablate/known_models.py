# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an ablation takes: from config/models.yaml for the models that are listed there, else by a formula.

Sizes are decimal gigabytes in the file and bytes in the code.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.problems import Problem
from common.text import clean
from hardware import GB

# key: (lowest, highest) of a block in config/models.yaml.
_NUMBERS: dict[str, tuple[float, float]] = {
    "vram_bf16_gb": (0.1, 10_000),
    "vram_bnb_4bit_gb": (0.1, 10_000),
    "hours": (0.01, 1000),
    "usd_per_hour": (0, 1000),
}
SERVING = "serving"
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# Beside the weights an ablation holds keys and values of 100 answers, matrices in float32 and the hidden states of one
# pass: for Qwen3 and Llama models from 4 to 70 billion parameters the sum of these, computed from their shapes, is this
# share of the bfloat16 weights plus this constant, to within 1 GB. None of them shrinks when the weights are quantised.
_WORK_SHARE = 0.13
_WORK_BASE = 4 * GB
# 4 bits, and the constants of double quantisation: 8 bits for each 64 weights, 32 for each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# What can be rented, by the memory that a program finds free on it, in bytes. A card sold as 80GB has 80 GiB.
_CARDS = (
    ("RTX 4090 24GB", 25 * GB),
    ("A40 or L40S 48GB", 47 * GB),
    ("A100 80GB", 85 * GB),
    ("H200 141GB", 141 * GB),
    ("2x A100 80GB", 170 * GB),
    ("2x H200 141GB", 282 * GB),
    ("4x H200 141GB", 564 * GB),
    ("8x H200 141GB", 1128 * GB),
)


@dataclass(frozen=True)
class KnownModel:
    """One block of config/models.yaml, without `serving`. The unit is in each name; `usd_per_hour` is for all cards
    together."""

    card: str
    vram_bf16_gb: float
    vram_bnb_4bit_gb: float
    hours: float
    usd_per_hour: float

    @property
    def usd(self) -> float:
        return self.hours * self.usd_per_hour


def load(path: Path | None = None) -> dict[str, KnownModel]:
    """Read and check config/models.yaml: model id in lower case → KnownModel. Raises Problem with file and key."""
    path = path or Path(os.environ.get("CONFIG_DIR") or "config") / "models.yaml"
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise Problem(f"{path} does not exist; restore it: git checkout {path}") from None
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}; restore it: git checkout {path}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date of no calendar
        raise Problem(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(data, dict):
        raise Problem(f"{path} must hold one block per model; restore it: git checkout {path}")
    found: dict[str, KnownModel] = {}
    for model, block in data.items():
        # YAML 1.1 reads some plain words as other things (yes, 1e3, 12:30): none of them is a model id.
        if not isinstance(model, str) or not MODEL_ID.fullmatch(model):
            raise Problem(f"{path}: {model!r:.100} is not a model id; one looks like Qwen/Qwen3-14B")
        if model.lower() in found:
            raise Problem(f"{path}: {model} stands there twice (ids are equal in any case of letters)")
        found[model.lower()] = _known(path, model, block)
    return found


def _known(path: Path, model: str, block: object) -> KnownModel:
    # `serving` is another stage's, which reads it; here it is only known to belong there.
    known = [*KnownModel.__dataclass_fields__, SERVING]
    if not isinstance(block, dict):
        raise Problem(f"{path}: {model} must hold the keys {', '.join(known)}")
    for kind, keys in (
        ("unknown", [key for key in block if key not in known]),
        ("missing", [key for key in known if key not in block]),
    ):
        if keys:
            raise Problem(f"{path}: {model}: {kind} key {', '.join(map(str, keys))}; the keys are {', '.join(known)}")
    if not isinstance(block[SERVING], dict):
        raise Problem(f"{path}: {model}: {SERVING} must hold keys and values, not {block[SERVING]!r:.100}")
    if not isinstance(block["card"], str) or not clean(block["card"]).strip():
        raise Problem(f"{path}: {model}: card must be a name like A100 80GB, not {block['card']!r:.100}")
    for key, (low, high) in _NUMBERS.items():
        value = block[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Problem(f"{path}: {model}: {key} must be a number, not {value!r:.100}")
        if not low <= value <= high:  # false for NaN too
            raise Problem(f"{path}: {model}: {key} must be between {low} and {high}, not {value}")
    if block["vram_bnb_4bit_gb"] > block["vram_bf16_gb"]:
        raise Problem(f"{path}: {model}: vram_bnb_4bit_gb must not be above vram_bf16_gb")
    return KnownModel(**{key: value for key, value in block.items() if key != SERVING})


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice, and a number that YAML 1.1 reads as another (1:30 as 90, 010 as 8), are
    errors instead of silent choices."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r:.100} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> object:
        if re.search(r"[:_xb]|^[-+]?0\d", node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.50} is no plain number; write 1.5 or 90", node.start_mark
            )
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_number)


def vram_bf16(load_bytes: int) -> int:
    """GPU memory in bytes to ablate a model whose weights take `load_bytes` unquantised: 14B → 37 GB, 70B → 163 GB."""
    return round(load_bytes * (1 + _WORK_SHARE)) + _WORK_BASE


def nf4_bytes(parameters: int, linear: int) -> int:
    """The size of the weights in NF4: `linear` of the `parameters` quantised, the others (embeddings, norms, the output
    layer, experts that are not separate linear layers) in bfloat16."""
    return round(linear * NF4_BYTES) + 2 * (parameters - linear)


def vram_bnb_4bit(load_bytes: int, quantised_bytes: int) -> int:
    """GPU memory in bytes with quantization = "bnb_4bit"; `quantised_bytes` from nf4_bytes."""
    return quantised_bytes + round(load_bytes * _WORK_SHARE) + _WORK_BASE


def card_for(vram: int) -> str:
    """The smallest card, or set of cards, with this much memory in bytes."""
    return next((name for name, free in _CARDS if vram <= free), "more than eight H200")
