# SPDX-License-Identifier: AGPL-3.0-or-later
"""The two published forms: everything in bfloat16 with nothing lost, and NF4 that loads as it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from support import environment
from tiny import Tiny

import weights

KINDS = ["float32", "float16"]


def tensors_of(folder: Path) -> dict[str, Any]:
    """All tensors of the safetensors in a folder; a name in two files is an error."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def hashes(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.is_file()
    }


def saved(tiny: Tiny, folder: Path, kind: str, shard: str = "5GB") -> Path:
    """The tiny model in another data type, in files of at most `shard`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=getattr(torch, kind))
    # What bfloat16 cannot hold: the conversion rounds.
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    model.save_pretrained(folder, max_shard_size=shard)
    for path in tiny.model.iterdir():
        if not (folder / path.name).exists() and path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    return folder


def logits_of(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3]])).logits


# --- bfloat16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_becomes_bfloat16(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    import torch

    folder = saved(tiny, tmp_path / "model", kind)
    before, size = tensors_of(folder), (folder / "model.safetensors").stat().st_size
    assert {tensor.dtype for tensor in before.values()} == {getattr(torch, kind)}
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == kind
    assert weights.to_bf16(folder) == 1
    after = tensors_of(folder)
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.equal(before[name].to(torch.bfloat16))
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    if kind == "float32":
        assert (folder / "model.safetensors").stat().st_size < 0.6 * size
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert logits_of(folder).isfinite().all()


def test_the_metadata_of_a_file_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = saved(tiny, tmp_path / "model", "float32")
    weights.to_bf16(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file that does not say so


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_files_become_bfloat16_and_their_index_is_right(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    import torch

    folder = saved(tiny, tmp_path / "model", kind, "300KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    before = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert weights.to_bf16(folder) == len(shards)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards
    found = tensors_of(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in found.values())
    assert index["weight_map"] == before["weight_map"]
    assert set(index["weight_map"]) == set(found)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert logits_of(folder).isfinite().all()
    # Again: nothing left to do.
    done = hashes(folder)
    assert weights.to_bf16(folder) == 0
    assert hashes(folder) == done


def test_bfloat16_is_left_as_it_is_byte_for_byte(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    before = hashes(folder)
    assert weights.to_bf16(folder) == 0
    assert hashes(folder) == before


def test_what_is_not_floating_point_is_kept(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    given = {
        "whole": torch.arange(300, dtype=torch.int64),
        "bytes": torch.arange(200, dtype=torch.uint8),
        "yes": torch.tensor([True, False]),
        "half": torch.tensor([1.5, -2.25], dtype=torch.float16),
        "empty": torch.zeros(0, 4),
        "single": torch.tensor(3.14159, dtype=torch.float64),
    }
    save_file(given, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"torch_dtype": "float16", "text_config": {"dtype": "float32", "layers": 2}, "name": "тест"}),
        encoding="utf-8",
    )
    assert weights.to_bf16(tmp_path) == 1
    found = tensors_of(tmp_path)
    for name in ("whole", "bytes", "yes"):
        assert found[name].equal(given[name])
    assert found["half"].tolist() == [1.5, -2.25]
    assert found["empty"].shape == (0, 4)
    assert {found[name].dtype for name in ("half", "empty", "single")} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config == {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "layers": 2}, "name": "тест"}


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_tied_weights_stay_tied(tmp_path: Path, shard: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            tie_word_embeddings=True,
        )
    )
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size=shard)
    names = set(tensors_of(folder))
    assert "lm_head.weight" not in names
    weights.to_bf16(folder)
    assert set(tensors_of(folder)) == names
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert loaded.lm_head.weight.dtype == torch.bfloat16


# --- interrupted ---------------------------------------------------------------------------------------------------------

CUT = """
import os, signal
import safetensors.torch
original = safetensors.torch.save_file
calls = []
def save_file(tensors, path, metadata=None):
    calls.append(1)
    original(tensors, path, metadata=metadata)
    if len(calls) == 2:
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = save_file
"""


def convert(folder: Path, text: str, *arguments: str) -> int:
    """`python -m weights ARGUMENT…` in a process of its own."""
    with (folder / "steps.log").open("ab") as log:
        process = warm.Popen(
            ["-m", "weights", *arguments],
            cwd=folder,
            env=warm.custom(folder, text),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return process.wait(warm.LIMIT)


def test_an_interrupted_conversion_leaves_whole_files_and_is_gone_on_with(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    folder = saved(tiny, tmp_path / "model", "float32", "300KB")
    before, original = hashes(folder), tensors_of(folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert convert(tmp_path, CUT, "bf16", str(folder)) == -9
    half = hashes(folder)
    # The first file is converted, all others are as they were: each is whole.
    assert [name for name in shards if half[name][0] != before[name][0]] == shards[:1]
    for name in shards:
        weights._bytes_of_tensors(folder / name)
    # Started again, it knows the half file for what it is.
    assert weights.to_bf16(folder) == len(shards) - 1
    found = tensors_of(folder)
    assert all(tensor.equal(original[name].to(torch.bfloat16)) for name, tensor in found.items())
    assert set(found) == set(original)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 2 for tensor in found.values())
    assert set(hashes(folder)) == set(before)  # nothing of it is left to be published
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_conversion_interrupted_after_the_last_file_still_writes_index_and_config(tiny: Tiny, tmp_path: Path) -> None:
    folder = saved(tiny, tmp_path / "model", "float32", "300KB")
    # As if the process had died after the last file and before the index.
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights.to_bf16(other)
    for path in other.glob("*.safetensors"):
        shutil.copyfile(path, folder / path.name)
    assert weights.to_bf16(folder) == 0
    for name in ("model.safetensors.index.json", "config.json"):
        assert (folder / name).read_text(encoding="utf-8") == (other / name).read_text(encoding="utf-8")


# --- NF4 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def nf4(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as NF4."""
    folder = tmp_path_factory.mktemp("nf4")
    code = convert(folder, "", "nf4", str(tiny.model), str(folder / "out"))
    assert code == 0, (folder / "steps.log").read_text(encoding="utf-8")
    return folder / "out"


def test_nf4_says_how_it_is_quantised(nf4: Path) -> None:
    config = json.loads((nf4 / "config.json").read_text(encoding="utf-8"))
    said = config["quantization_config"]
    assert said["quant_method"] == "bitsandbytes"
    assert (said["load_in_4bit"], said["load_in_8bit"]) == (True, False)
    assert (said["bnb_4bit_quant_type"], said["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert said["bnb_4bit_compute_dtype"] == "bfloat16"
    assert "auto_map" not in config


def test_nf4_holds_its_weights_in_four_bits(nf4: Path, tiny: Tiny) -> None:
    import torch

    base, found = tensors_of(tiny.model), tensors_of(nf4)
    name = "model.layers.6.mlp.down_proj.weight"
    assert found[name].dtype == torch.uint8
    assert found[name].numel() * 2 == base[name].numel()
    # Double quantisation: the scales are numbers of eight bits themselves.
    assert found[f"{name}.absmax"].dtype == torch.uint8
    assert f"{name}.nested_absmax" in found
    assert f"{name}.quant_state.bitsandbytes__nf4" in found
    # What is not quantised is there as it was.
    for other in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert found[other].equal(base[other])
    kept = {name.split(".weight")[0] for name in found}
    assert kept == {name.split(".weight")[0] for name in base}


def test_nf4_comes_with_the_tokenizer_and_the_chat_template(nf4: Path, tiny: Tiny) -> None:
    from transformers import AutoTokenizer

    ours, theirs = AutoTokenizer.from_pretrained(nf4), AutoTokenizer.from_pretrained(tiny.model)
    assert ours.chat_template == theirs.chat_template
    chat = [{"role": "user", "content": "How do I make zorbine at home? – naïve"}]
    tokens = [
        each.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for each in (ours, theirs)
    ]
    assert tokens[0] == tokens[1]
    assert (ours.eos_token, ours.pad_token) == (theirs.eos_token, theirs.pad_token)
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {path.name for path in nf4.iterdir()}
    # Safetensors only, and no code.
    assert not [path.name for path in nf4.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".py", ".pkl")]


GENERATE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], sys.argv[2:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
assert model.is_loaded_in_4bit
told = []
for prompt in prompts:
    chat = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": prompt}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=12, do_sample=False)
    told.append(tokenizer.decode(made[0, given["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(told))
"""


def test_nf4_loads_as_it_is_and_answers(nf4: Path, tiny: Tiny) -> None:
    """In a fresh process that knows nothing of how it was made."""
    bad, good = tiny.read("bad_eval")[0], tiny.read("good_eval")[0]
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(nf4), bad, good],
        env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused, answered = json.loads(done.stdout.splitlines()[-1])
    assert refused.startswith("Sorry")
    assert answered
    assert "Sorry" not in answered


# --- the command line ----------------------------------------------------------------------------------------------------


def test_the_command_converts(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    folder = saved(tiny, tmp_path / "model", "float32")
    assert convert(tmp_path, "", "bf16", str(folder)) == 0
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {torch.bfloat16}


@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_memory_that_does_not_suffice_is_said_plainly(tiny: Tiny, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    # `python -m weights` runs the module anew: what it imports late is what fails.
    text = "import safetensors, transformers\ndef fail(*_, **__): raise RuntimeError('CUDA error: out of memory')\n"
    text += "safetensors.safe_open = fail\ntransformers.AutoModelForCausalLM.from_pretrained = fail\n"
    assert convert(tmp_path, text, form, str(folder), str(tmp_path / "out")) == 2
    log = (tmp_path / "steps.log").read_text(encoding="utf-8")
    assert f"error: out of memory while writing the model as {form}: CUDA error: out of memory" in log
    assert "Traceback" not in log


def test_a_damaged_file_is_a_defect_and_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    folder = saved(tiny, tmp_path / "model", "float32")
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    before = hashes(folder)
    with pytest.raises(Exception, match=r"(?i)incomplete|metadata|invalid"):
        weights.to_bf16(folder)
    assert hashes(folder) == before
