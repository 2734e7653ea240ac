# SPDX-License-Identifier: AGPL-3.0-or-later
"""The two forms of a saved model: `python -m weights bf16 FOLDER` in place, `python -m weights nf4 FOLDER OUT`.

NF4 with double quantisation and bf16 compute: what a worker loads as it is, without quantising at its start. A process of
its own, so that the memory is free again.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from architecture import import_heretic_model
from common.files import to_json, write_atomic
from common.problems import BAD_INPUT, OK, Problem, run
from launcher import is_out_of_memory
from lifeline import die_with_the_driver


def to_bf16(folder: Path) -> int:
    """Convert every floating-point tensor of the safetensors in `folder` to bfloat16. Returns how many files changed.

    Heretic saves in the data type that it loaded; a model of 32-bit weights would be published at twice its size.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    for half in folder.glob(".*.safetensors"):
        half.unlink()  # of an interrupted conversion
    changed, files = 0, sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        wrong = [
            name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dtype != torch.bfloat16
        ]
        if not wrong:
            continue
        for name in wrong:
            tensors[name] = tensors[name].to(torch.bfloat16)
        temporary = path.with_name(f".{path.name}")
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
        changed += 1
    index = folder / "model.safetensors.index.json"
    if index.exists():
        data = json.loads(index.read_text(encoding="utf-8"))
        size = sum(map(_bytes_of_tensors, files))
        if data.setdefault("metadata", {}).get("total_size") != size:
            data["metadata"]["total_size"] = size
            write_atomic(index, to_json(data))
    config = folder / "config.json"
    data = json.loads(config.read_text(encoding="utf-8"))
    if _say_bf16(data):
        write_atomic(config, to_json(data))
    return changed


def _say_bf16(config: dict[str, Any]) -> bool:
    changed = False
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part and part[key] != "bfloat16":
                part[key], changed = "bfloat16", True
    return changed


def _bytes_of_tensors(path: Path) -> int:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def to_nf4(folder: Path, out: Path) -> None:
    """Write the model in `folder` to `out`, quantised to NF4, with its tokenizer."""
    import torch
    from transformers import AutoProcessor, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    kind = import_heretic_model().get_model_class(str(folder))
    model = kind.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map="auto", trust_remote_code=False
    )
    model.save_pretrained(out, max_shard_size="5GB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    if (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists():
        AutoProcessor.from_pretrained(folder).save_pretrained(out)


def main() -> int:
    """The command line. Raises Problem where the memory does not suffice."""
    die_with_the_driver()
    try:
        if sys.argv[1] == "bf16":
            to_bf16(Path(sys.argv[2]))
        else:
            to_nf4(Path(sys.argv[2]), Path(sys.argv[3]))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise Problem(f"out of memory while writing the model as {sys.argv[1]}: {error}", BAD_INPUT) from error
    return OK


if __name__ == "__main__":
    run(main)
