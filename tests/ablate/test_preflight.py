# SPDX-License-Identifier: AGPL-3.0-or-later
"""Before the download: the architecture, the machine, and (against a hub on loopback) access, token and repositories."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import READ_TOKEN, WRITE_TOKEN, Fault, Hub, Token

import architecture
import hardware
import known_models
import preflight
from common.problems import Problem

GB = 10**9
SPACED, FINE = "two words", "hf_fine"  # tokens
CONFIG = Path(__file__).parents[2] / "config"
TEMPLATE = json.dumps({"chat_template": "{{ messages }}"}).encode()
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_14B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "hidden_size": 5120,
    "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "qwen3", "dtype": "bfloat16", **SMALL} | changes


def tiny_files(config: Any = None, weights: Any = 40_000, **files: bytes | None) -> dict[str, bytes]:
    """The files of a small model, without real weights; a name given as a keyword (with __ for the dot) changes one."""
    found: dict[str, bytes | None] = {
        "config.json": json.dumps(tiny_config() if config is None else config).encode(),
        "tokenizer.json": b"{}",
        "tokenizer_config.json": TEMPLATE,
        "model.safetensors": b"\0" * weights,
        "LICENSE": b"the licence",
        "README.md": b"---\nlicense: apache-2.0\n---\n",
    }
    found |= {name.replace("__", "."): content for name, content in files.items()}
    return {name: content for name, content in found.items() if content is not None}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def machine(
    tmp_path: Path, *vram: float, ram: float = 200, disk: float = 1000, separate: bool = False
) -> hardware.Hardware:
    """A machine with GPUs of this much free memory; all sizes in GB."""
    gpus = tuple(hardware.Gpu("Test GPU", int(size * GB), int(size * GB)) for size in vram)
    disks = {
        tmp_path / "work": hardware.Disk(1, int(disk * GB)),
        tmp_path / "cache": hardware.Disk(2 if separate else 1, int(disk * GB)),
    }
    return hardware.Hardware(gpus, int(ram * GB), disks)


def look(
    model: str | Path, tmp_path: Path, here: hardware.Hardware | None = None, **options: Any
) -> preflight.Preflight:
    """Preflight of a folder, not published."""
    settings: dict[str, Any] = {
        "settings_quantization": "none", "repo": None, "publish": False, "public": False, "token": None,
        "work": tmp_path / "work", "hf_home": tmp_path / "cache", "models": known_models.load(CONFIG / "models.yaml"),
        "hardware": here or machine(tmp_path),
    }  # fmt: skip
    return preflight.preflight(str(model), **(settings | options))


def rows(found: preflight.Preflight, subject: str) -> list[preflight.Row]:
    return [row for row in found.rows if row.subject == subject]


def row(found: preflight.Preflight, subject: str) -> preflight.Row:
    (only,) = rows(found, subject)
    return only


def inspect(tmp_path: Path, config: Any) -> architecture.Architecture:
    text = (
        config
        if isinstance(config, str)
        else json.dumps(config)
        if isinstance(config, dict)
        else config.to_json_string()
    )
    write(tmp_path / "model", {"config.json": text.encode()})
    return architecture.inspect(tmp_path / "model")


# --- the architecture ------------------------------------------------------------------------------------------------


def test_dense_models(tmp_path: Path) -> None:
    import transformers

    qwen = inspect(tmp_path, transformers.Qwen3Config(**SMALL))
    assert (qwen.kind, qwen.layers, qwen.doubt) == ("dense", 2, "")
    assert qwen.layers_edited == {"attn.o_proj": 2, "mlp.down_proj": 2}
    llama = inspect(tmp_path, transformers.LlamaConfig(**SMALL))
    assert (llama.name, llama.kind, llama.doubt) == ("LlamaForCausalLM", "dense", "")
    # Shared weights are counted once.
    tied = inspect(tmp_path, transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True}))
    assert llama.parameters - tied.parameters == 64 * 16
    assert llama.linear == tied.linear == llama.parameters - 2 * 64 * 16 - 5 * 16


def test_the_count_is_that_of_the_real_model(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen3Config(**SMALL)
    real = transformers.AutoModelForCausalLM.from_config(config)
    assert inspect(tmp_path, config).parameters == sum(parameter.numel() for parameter in real.parameters())


def test_the_sizes_of_a_published_model(tmp_path: Path) -> None:
    """Qwen3-14B: 29.5 GB in bfloat16 on the Hub, 9.9 GB in NF4."""
    shape = inspect(tmp_path, QWEN3_14B)
    assert shape.bf16_bytes == pytest.approx(29.5e9, rel=0.01)
    assert known_models.nf4_bytes(shape.parameters, shape.linear) == pytest.approx(9.93e9, rel=0.01)


def test_multimodal_models_are_text_models_with_an_encoder(tmp_path: Path) -> None:
    import transformers

    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    text = {**SMALL, "sliding_window": 8}
    shape = inspect(tmp_path, transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    assert shape.name == "Gemma3ForConditionalGeneration"
    assert (shape.kind, shape.layers, shape.doubt) == ("dense", 2, "")


def test_mixture_of_experts(tmp_path: Path) -> None:
    """The experts are one tensor: Heretic edits attention alone, and bitsandbytes leaves them in 16 bits."""
    import transformers

    config = transformers.Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=64, num_experts_per_tok=2)
    shape = inspect(tmp_path, config)
    assert shape.kind == "moe"
    assert shape.layers_edited == {"attn.o_proj": 2}
    assert "mlp.down_proj in 0 of 2 layers" in shape.doubt
    experts = 2 * 8 * 3 * 64 * 16
    assert known_models.nf4_bytes(shape.parameters, shape.linear) > 2 * experts


def test_state_space_models_are_refused(tmp_path: Path) -> None:
    import transformers

    mamba = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64)
    with pytest.raises(architecture.Unsupported, match="a state space model is not supported"):
        inspect(tmp_path, mamba)
    jamba = transformers.JambaConfig(
        **SMALL, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    )
    with pytest.raises(architecture.Unsupported, match="a hybrid of attention and state space"):
        inspect(tmp_path, jamba)


def test_a_hybrid_that_heretic_edits_is_doubtful(tmp_path: Path) -> None:
    import transformers

    lfm = transformers.Lfm2Config(**{**SMALL, "full_attn_idxs": [1]})
    shape = inspect(tmp_path, lfm)
    assert shape.kind == "hybrid"
    assert "refusals may stay" in shape.doubt


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    import transformers

    with pytest.raises(architecture.Unsupported, match="Heretic finds nothing to edit in GPT2LMHeadModel"):
        inspect(tmp_path, transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=16))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "config.json is not JSON"),
        ("<html>", "config.json is not JSON"),
        ("[" * 100_000, "config.json is not JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "config.json is not JSON"),
        ("[1, 2]", "no JSON object"),
        ("{}", "names no model_type"),
        ('{"model_type": ["qwen3"]}', "names no model_type"),
        (" " * 1_000_001 + "{}", "more than 1 MB"),
        ({"model_type": "no_such_model"}, "cannot build its model_type 'no_such_model'"),
        ({"model_type": "bert"}, "cannot build its model_type 'bert'|nothing to edit"),
        ({"model_type": "\x1b[31mred"}, "cannot build its model_type 'red'"),
        (tiny_config(hidden_size="large"), "cannot build its model_type 'qwen3'"),
        (tiny_config(hidden_size=-1), "cannot build its model_type 'qwen3'"),
        (tiny_config(num_hidden_layers=0), "nothing to edit|cannot build"),
        (tiny_config(num_hidden_layers=10**9), "num_hidden_layers, which no model has"),
        (tiny_config(num_labels=10**9), "num_labels, which no model has"),
        (tiny_config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "Python code from its repository"),
        (tiny_config(text_config={"auto_map": {"AutoConfig": "evil.Config"}}), "Python code from its repository"),
        (tiny_config(quantization_config={"quant_method": "fp8"}), r"quantised already \(fp8\)"),
        (tiny_config(text_config={"quantization_config": {"a": 1}}), "quantised already,"),
        (tiny_config(compression_config={"format": "x"}), "quantised already"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(tmp_path: Path, config: Any, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(architecture.Unsupported, match=words):
        inspect(tmp_path, config)
    assert time.monotonic() - start < 30


def test_a_config_cannot_name_a_kernel_to_fetch(tmp_path: Path) -> None:
    config = tiny_config(_attn_implementation="kernels-community/evil", attn_implementation="kernels-community/evil")
    assert inspect(tmp_path, config).kind == "dense"


def test_heretic_is_imported_without_a_kernel_from_the_hub() -> None:
    """bitsandbytes asks for compiled code at import, on processors with AVX-512 BF16; here on any."""
    code = (
        "import sys, types, kernels, architecture\n"
        "asked = []\n"
        "kernels.get_kernel = lambda *a, **b: asked.append(a)\n"
        "before = kernels.get_kernel\n"
        "architecture.import_heretic_model()\n"
        "assert asked == [], asked\n"
        "assert kernels.get_kernel is before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1"}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_nothing_is_left_changed_and_nothing_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import logging
    import warnings

    before = (list(warnings.filters), logging.root.manager.disable)
    inspect(tmp_path, tiny_config())
    assert (list(warnings.filters), logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


# --- the files of a folder -------------------------------------------------------------------------------------------


def test_a_tiny_folder_on_a_cpu(tmp_path: Path) -> None:
    found = look(write(tmp_path / "model", tiny_files()), tmp_path)
    assert {each.verdict for each in found.rows} == {"ok"}
    found.check()
    assert (found.commit, found.source, found.kind) == (None, str(tmp_path / "model"), "dense")
    assert (found.machine, found.quantization, found.repo) == ("CPU", "none", None)
    assert found.licence.id == "apache-2.0"
    assert found.licence_files == ("LICENSE",)
    assert found.expected_usd is None
    assert "not known" in preflight.table(found)


@pytest.mark.parametrize(
    ("changes", "subject", "words"),
    [
        ({"model__safetensors": None}, "weights", "no model.*safetensors"),
        ({"model__safetensors": None, "pytorch_model__bin": b"x"}, "weights", "runs? code"),
        ({"model__safetensors": None, "consolidated__00__pth": b"x"}, "weights", "runs? code"),
        ({"model__safetensors": None, "model-Q4__gguf": b"x"}, "weights", "GGUF"),
        ({"model__safetensors": None, "adapter_model__safetensors": b"x"}, "weights", "adapter"),
        ({"model__safetensors": b"x" * 1000}, "completeness", "weights are missing"),
        ({"config__json": None}, "architecture", "not a transformers model"),
        ({"config__json": b" " * 2_000_000}, "architecture", "no config"),
        ({"config__json": b"[]"}, "architecture", "no JSON object"),
        ({"tokenizer__json": None}, "tokenizer", "no tokenizer"),
        ({"tokenizer_config__json": b"{}"}, "tokenizer", "instruct or chat version"),
        ({"tokenizer_config__json": b'{"chat_template": " "}'}, "tokenizer", "instruct or chat"),
        ({"tokenizer_config__json": b'{"chat_template": [{"name": "rag", "template": "x"}, 3]}'}, "tokenizer", "instruct or chat"),
        ({"tokenizer_config__json": b"[]"}, "tokenizer", "cannot be used"),
        ({"tokenizer_config__json": b'{"chat_template": "x", "auto_map": {"AutoTokenizer": ["a.B", null]}}'}, "tokenizer", "Python code"),
    ],
)  # fmt: skip
def test_files_that_do_not_do(tmp_path: Path, changes: dict[str, Any], subject: str, words: str) -> None:
    found = look(write(tmp_path / "model", tiny_files(**changes)), tmp_path)
    assert row(found, subject).verdict == "no"
    with pytest.raises(Problem, match=words) as caught:
        found.check()
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_config__json": None, "chat_template__jinja": b"{{ messages }}"},
        {"tokenizer_config__json": b'{"chat_template": [{"name": "default", "template": "x"}]}'},
        {"tokenizer__json": None, "tokenizer__model": b"x"},
    ],
)
def test_files_that_do(tmp_path: Path, changes: dict[str, Any]) -> None:
    look(write(tmp_path / "model", tiny_files(**changes)), tmp_path).check()


def test_code_and_pickles_beside_the_weights_of_a_folder(tmp_path: Path) -> None:
    for changes in ({"model__py": b"import os"}, {"pytorch_model__bin": b"x"}):
        with pytest.raises(Problem, match="code or pickles"):
            look(write(tmp_path / next(iter(changes)), tiny_files(**changes)), tmp_path).check()


def test_shards(tmp_path: Path) -> None:
    shards = {f"model-0000{n}-of-00003.safetensors": b"\0" * 15_000 for n in (1, 2, 3)}
    files = {
        **tiny_files(model__safetensors=None),
        **shards,
        "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00003.safetensors"}}',
    }
    found = look(write(tmp_path / "whole", files), tmp_path)
    found.check()
    assert found.weight_bytes == 45_000
    assert {*shards, "model.safetensors.index.json", "config.json", "LICENSE"} <= set(found.files)
    for missing in (
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ):
        part = {name: content for name, content in files.items() if name != missing}
        with pytest.raises(Problem, match="complete copy"):
            look(write(tmp_path / missing, part), tmp_path).check()


def test_a_readme_that_is_no_model_card(tmp_path: Path) -> None:
    for number, readme in enumerate(
        (b"\xff\xfe", b"---\n[\n---\n", b"---\n- a\n---\n", b"# none", b"---\na: !!python/name:os\n---")
    ):
        found = look(write(tmp_path / str(number), tiny_files(README__md=readme)), tmp_path)
        found.check()
        assert found.licence.id == ""


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-14B as a folder, its 29.5 GB of weights a hole in a file."""
    folder = write(tmp_path_factory.mktemp("big"), tiny_files(QWEN3_14B, weights=0))
    os.truncate(folder / "model.safetensors", 29_536_614_400)
    return folder


@pytest.mark.parametrize(
    ("vram", "wanted", "verdict", "quantization"),
    [
        ((42,), "none", "ok", "none"),
        ((20, 20), "none", "ok", "none"),  # layers are spread over both
        ((24,), "none", "warn", "bnb_4bit"),
        ((12, 12), "none", "warn", "bnb_4bit"),
        ((16,), "none", "no", "none"),
        ((42,), "bnb_4bit", "ok", "bnb_4bit"),
        ((24,), "bnb_4bit", "ok", "bnb_4bit"),
        ((16,), "bnb_4bit", "no", "bnb_4bit"),
    ],
)
def test_gpu_memory(
    big: Path, tmp_path: Path, vram: tuple[float, ...], wanted: str, verdict: str, quantization: str
) -> None:
    found = look(big, tmp_path, machine(tmp_path, *vram), settings_quantization=wanted)
    assert row(found, "GPU").verdict == verdict
    assert found.quantization == quantization
    assert found.machine == f"{len(vram)} x Test GPU"
    if verdict == "no":
        assert "rent A" in row(found, "GPU").advice
        assert found.card == "A40 or L40S 48GB"


def test_ram(big: Path, tmp_path: Path) -> None:
    """Quantised, the unquantised weights must fit into RAM at the end; else one file of them at a time does."""
    for vram, ram, verdict in ((42, 10, "ok"), (42, 8, "no"), (24, 45, "ok"), (24, 40, "warn"), (24, 30, "no")):
        assert row(look(big, tmp_path, machine(tmp_path, vram, ram=ram)), "RAM").verdict == verdict, (vram, ram)


def test_no_gpu(big: Path, tmp_path: Path) -> None:
    found = look(big, tmp_path, machine(tmp_path))
    assert row(found, "GPU").verdict == "no"
    with pytest.raises(Problem, match=r"rent A40 or L40S 48GB .* up to 2\.0 GB"):
        found.check()
    small = look(write(tmp_path / "model", tiny_files()), tmp_path, machine(tmp_path, ram=1))
    assert row(small, "RAM").verdict == "no"


def test_a_known_model_has_its_card_time_and_price(big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen3-14B").symlink_to(big)
    monkeypatch.chdir(tmp_path)
    found = look("Qwen/Qwen3-14B", tmp_path, machine(tmp_path, 37.5))
    # 37.5 GB would do for the formula (37.4); the file says 38.
    assert row(found, "GPU").verdict == "warn"
    assert (found.card, found.expected_hours, found.usd_per_hour) == ("A100 40GB", 1.5, 1.67)
    assert "about 1.5 hours on A100 40GB, about $2.50 at $1.67 an hour" in preflight.table(found).replace(
        "$2.51", "$2.50"
    )


def test_float32_weights_count_twice(tmp_path: Path) -> None:
    config = {**QWEN3_14B, "dtype": "float32"}
    folder = write(tmp_path / "model", tiny_files(config, weights=0))
    os.truncate(folder / "model.safetensors", 2 * 29_536_614_400)
    assert row(look(folder, tmp_path, machine(tmp_path, 60)), "GPU").verdict == "warn"
    assert row(look(folder, tmp_path, machine(tmp_path, 72)), "GPU").need == "70.8 GB (float32)"
    # Where config.json does not say, the size of the files does.
    del config["dtype"]
    write(folder, {"config.json": json.dumps(config).encode()})
    assert row(look(folder, tmp_path, machine(tmp_path, 72)), "GPU").need == "70.8 GB (float32)"


def test_experts_that_do_not_shrink_need_the_larger_card(tmp_path: Path) -> None:
    import transformers

    config = transformers.Qwen3MoeConfig(hidden_size=2048, num_hidden_layers=48, num_experts=128, moe_intermediate_size=768, num_attention_heads=32, num_key_value_heads=4, head_dim=128)  # fmt: skip
    folder = write(tmp_path / "model", tiny_files(weights=0, config__json=config.to_json_string().encode()))
    os.truncate(folder / "model.safetensors", 61 * GB)
    found = look(folder, tmp_path, machine(tmp_path, 48))
    assert row(found, "GPU").verdict == "no"
    assert row(found, "architecture").verdict == "warn"
    assert "bnb_4bit" not in row(found, "GPU").advice


# --- disk ------------------------------------------------------------------------------------------------------------


def test_disk(big: Path, tmp_path: Path) -> None:
    """Model 29.5 and 4-bit copy 9.9, and a gigabyte of small things."""
    for size, verdict in ((41, "ok"), (40, "no")):
        found = look(big, tmp_path, machine(tmp_path, 42, disk=size))
        assert row(found, "disk").verdict == verdict
    assert "free 0.5 GB on the disk of" in row(found, "disk").advice


def test_disk_counts_what_an_earlier_run_wrote(big: Path, tmp_path: Path) -> None:
    run = write(tmp_path / "work" / "run", {"run.json": json.dumps({"model": str(big), "commit": None}).encode()})
    write(tmp_path / "work" / "broken", {"run.json": b"{"})
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").touch()
    os.truncate(run / "model" / "model.safetensors", 29 * GB)
    found = look(big, tmp_path, machine(tmp_path, 42, disk=20))
    assert row(found, "disk").verdict == "warn"
    found = look(big, tmp_path, machine(tmp_path, 42, disk=10))
    assert row(found, "disk").verdict == "no"
    # A run of another model will not write over its own files.
    (run / "run.json").write_text(json.dumps({"model": "another", "commit": None}))
    found = look(big, tmp_path, machine(tmp_path, 42, disk=20))
    assert row(found, "disk").verdict == "no"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    here = machine(tmp_path)
    here.disks[tmp_path / "work"] = dataclasses.replace(here.disks[tmp_path / "work"], writable=False)
    found = look(write(tmp_path / "model", tiny_files()), tmp_path, here)
    with pytest.raises(Problem, match="set ABLATIONS_DIR"):
        found.check()


# --- this machine ----------------------------------------------------------------------------------------------------


def test_this_machine(tmp_path: Path) -> None:
    here = hardware.measure([tmp_path, tmp_path / "a" / "b"])
    assert here.ram_free > 0
    assert here.disks[tmp_path] == here.disks[tmp_path / "a" / "b"]
    assert here.disks[tmp_path].free > 0
    assert here.disks[tmp_path].writable
    assert all(0 <= gpu.free <= gpu.total for gpu in here.gpus)


def answer(tmp_path: Path, printed: str, code: int = 0) -> tuple[tuple[hardware.Gpu, ...], str]:
    """What is made of a process that prints this about GPUs."""
    (tmp_path / "printed").write_text(printed)
    return hardware.gpus(
        [sys.executable, "-c", f"import sys; print(open({str(tmp_path / 'printed')!r}).read()); sys.exit({code})"]
    )


def test_the_gpus_are_asked_for_in_another_process(tmp_path: Path) -> None:
    told = [["NVIDIA H100\x1b[2J", 85_000, 84_000, "sm_90"], ["Tesla V100", 16_000, 15_000, "sm_70"]]
    found, unseen = answer(tmp_path, "a warning\n" + json.dumps([True, told, ["sm_80", "sm_90", "compute_90"]]))
    assert found == (
        hardware.Gpu("NVIDIA H100", 85_000, 84_000, "sm_90", True),
        hardware.Gpu("Tesla V100", 16_000, 15_000, "sm_70", False),
    )
    assert unseen == ""
    # The real question, and nothing of CUDA is left in this process.
    import torch

    hardware.gpus()
    assert not torch.cuda.is_initialized()


def test_a_gpu_that_is_there_and_not_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = json.dumps([True, [], ["sm_90"]])
    monkeypatch.setattr(hardware, "_DRIVERS", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert answer(tmp_path, nothing) == ((), "")
    monkeypatch.setattr(hardware, "_DRIVERS", (tmp_path,))
    assert "NVIDIA container toolkit" in answer(tmp_path, nothing)[1]
    assert "for CPUs only" in answer(tmp_path, json.dumps([False, [], []]))[1]
    monkeypatch.setattr(hardware, "_DRIVERS", (tmp_path / "none",))
    write(tmp_path, {"nvidia-smi": b"#!/bin/sh\n"})
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "NVIDIA container toolkit" in answer(tmp_path, nothing)[1]


@pytest.mark.parametrize(
    "printed", ["", "no JSON", "[]", "[1, 2, 3]", '[true, [["a"]], []]', "[true, [[1, 2, 3, 4]], []]"]
)
def test_an_answer_about_gpus_that_is_none(tmp_path: Path, printed: str) -> None:
    found, unseen = answer(tmp_path, printed)
    assert found == ()
    assert "gave no answer" in unseen


def test_a_torch_that_breaks_on_its_gpus(tmp_path: Path) -> None:
    assert "torch failed when asked about GPUs" in answer(tmp_path, "", 1)[1]
    assert "FileNotFoundError" in hardware.gpus([str(tmp_path / "none")])[1]


@pytest.mark.parametrize(
    ("kind", "programs", "expected"),
    [
        ("sm_90", ["sm_80", "sm_90"], True),
        ("sm_89", ["sm_80", "sm_90"], True),
        ("sm_86", ["sm_89"], False),
        ("sm_70", ["sm_75", "sm_80"], False),
        ("sm_120", ["sm_80", "sm_90"], False),
        ("sm_120", ["sm_80", "compute_90"], True),
        ("sm_120", ["sm_120"], True),
        ("sm_121", ["sm_120"], True),
        ("sm_103", ["sm_100a"], False),
        ("sm_100", ["sm_100a"], True),
        ("sm_103", ["sm_100f"], True),
        ("sm_120", ["compute_100f"], False),
        ("sm_61", ["compute_75"], False),
        ("gfx90a:sramecc+:xnack-", ["gfx908", "gfx90a"], True),
        ("gfx1030", ["gfx908", "gfx90a"], False),
        ("", ["sm_90"], True),
        ("sm_90", [], True),
    ],
)
def test_which_gpus_a_torch_runs_on(kind: str, programs: list[str], expected: bool) -> None:
    assert hardware.runs(kind, programs) is expected


def test_a_gpu_that_this_torch_has_no_programs_for(big: Path, tmp_path: Path) -> None:
    here = machine(tmp_path, 42, 42)
    old = dataclasses.replace(here.gpus[1], kind="sm_61", usable=False)
    found = look(big, tmp_path, dataclasses.replace(here, gpus=(here.gpus[0], old)))
    with pytest.raises(Problem, match=r"no programs for sm_61.*CUDA_VISIBLE_DEVICES.*rent A40"):
        found.check()


def test_a_gpu_that_is_not_visible_is_said(big: Path, tmp_path: Path) -> None:
    here = dataclasses.replace(machine(tmp_path), unseen="it hides")
    with pytest.raises(Problem, match="it hides; or rent A40"):
        look(big, tmp_path, here).check()
    small = look(write(tmp_path / "model", tiny_files()), tmp_path, here)
    small.check()
    assert (row(small, "GPU").verdict, row(small, "GPU").advice) == ("warn", "it hides")


def test_after_the_search_only_what_publishing_takes_is_asked_for(big: Path, tmp_path: Path) -> None:
    here = machine(tmp_path, ram=1, disk=2)
    with pytest.raises(Problem, match=r"- GPU: (.|\n)*- disk: "):
        look(big, tmp_path, here).check()
    found = look(big, tmp_path, here, search_done=True)
    found.check()
    assert (row(found, "GPU").verdict, rows(found, "RAM")) == ("ok", [])
    assert found.quantization == "none"
    with pytest.raises(Problem, match="- disk: "):
        look(big, tmp_path, machine(tmp_path, disk=0.5), search_done=True).check()


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert hardware.disk(tmp_path / "file" / "below").device == os.stat(tmp_path).st_dev


def cgroup(tmp_path: Path, own: str, files: dict[str, str]) -> int | None:
    for name, text in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    return hardware.cgroup_free(tmp_path / "tree", tmp_path / "own")


def test_cgroup_2(tmp_path: Path) -> None:
    files = {
        "memory.max": "max\n",
        "pod/memory.max": "8000\n",
        "pod/memory.current": "5000\n",
        "pod/memory.stat": "anon 1\ninactive_file 1000\nactive_file 7\n",
        "pod/inner/memory.max": "max\n",
        "pod/inner/memory.current": "100\n",
    }
    assert cgroup(tmp_path, "0::/pod/inner\n", files) == 4000
    # In a container of its own the root is the group, and the path may lead to where nothing is.
    root = {"memory.max": "9000", "memory.current": "10000"}
    assert cgroup(tmp_path, "0::/../../elsewhere\n", root) == 0


def test_cgroup_1(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "1\n",
        "memory/docker/abc/memory.limit_in_bytes": "3000\n",
        "memory/docker/abc/memory.usage_in_bytes": "2500\n",
        "memory/docker/abc/memory.stat": "total_inactive_file 500\n",
    }
    assert cgroup(tmp_path, "12:cpu,memory:/docker/abc\n3:pids:/x\n0::/\n", files) == 1000


@pytest.mark.parametrize("own", ["", "nonsense", "0::", "::::", "0::/none\n"])
def test_no_cgroup_no_limit(tmp_path: Path, own: str) -> None:
    assert cgroup(tmp_path, own, {}) is None


def test_the_limit_of_the_container_counts(tmp_path: Path) -> None:
    limit = {"memory.max": "1000000", "memory.current": "0"}
    assert cgroup(tmp_path, "0::/\n", limit) == 1_000_000
    assert hardware.ram_free(tmp_path / "tree", tmp_path / "own") == 1_000_000
    assert hardware.ram_free(tmp_path / "none", tmp_path / "none") > 1_000_000


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table(big: Path, tmp_path: Path, width: int) -> None:
    found = look(big, tmp_path, machine(tmp_path, 24, disk=20))
    text = preflight.table(found, width)
    lines = text.splitlines()
    assert all(len(line) <= max(width, 70) for line in lines if line.startswith("  "))
    header = next(line for line in lines if "needed" in line and "verdict" in line)
    assert {line[header.index("verdict") :].split()[0] for line in lines if line[2:5] in ("GPU", "RAM", "dis")} == {
        "warn",
        "ok",
        "no",
    }
    assert "→ 37.4 GB are needed" in " ".join(text.split())


def test_hostile_text_does_not_reach_the_terminal(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tiny_files(README__md=b'---\nlicense: "evil\\e[31m\\u202e"\n---'))
    here = dataclasses.replace(machine(tmp_path, 42), gpus=(hardware.Gpu("\x1b[2Jcard", 1, 1),))
    text = preflight.table(look(folder, tmp_path, here))
    assert "\x1b" not in text
    assert "\u202e" not in text


# --- the Hub ---------------------------------------------------------------------------------------------------------

# The client reads HF_HUB_OFFLINE at its import, and the tests of this process are offline: a second process asks.
_CHILD = """
import dataclasses, json, os, sys
from pathlib import Path
import hardware, hub_client, known_models, preflight
from common.problems import Problem

hub_client.PAUSE = 0.02
for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_ENDPOINT"] = asked.pop("endpoint")
    work, cache, gpus = Path(asked.pop("work")), Path(asked.pop("hf_home")), asked.pop("gpus")
    disks = {path: hardware.Disk(1, 10**12) for path in (work, cache)}
    here = hardware.Hardware(tuple(hardware.Gpu("G", s, s) for s in gpus), 10**11, disks)
    answer = {}
    try:
        found = preflight.preflight(work=work, hf_home=cache, hardware=here, models={}, **asked)
        answer = dataclasses.asdict(found) | {"table": preflight.table(found), "source": found.source, "licence_card": found.licence_card}
        found.check()
    except Problem as problem:
        answer |= {"problem": str(problem), "code": problem.code}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """Preflight in a process of its own, against a hub."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.hub = hub
        self.folder = folder
        self.number = 0
        self.errors = (folder / "stderr").open("w+")
        # A token that the person once logged in with lies here; it is not what they asked to use.
        write(folder / "home", {"token": WRITE_TOKEN.encode()})
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        self.process = subprocess.Popen([sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment)  # fmt: skip

    def ask(self, model: str = "base/model", **options: Any) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.number += 1
        asked: dict[str, Any] = {
            "model": model, "settings_quantization": "none", "repo": None, "publish": True, "public": False,
            "token": WRITE_TOKEN, "timeout": 10, "endpoint": self.hub.url, "gpus": [],
            "work": str(self.folder / "work"), "hf_home": str(self.folder / f"cache{self.number}"),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(asked | options) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        self.errors.seek(0)
        assert line, self.errors.read()
        answer: dict[str, Any] = json.loads(line)
        # Whatever is said, the token is not.
        assert asked["token"] not in line
        return answer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("client")
    with Hub(folder / "hub") as hub:
        client = Client(folder, hub)
        yield client
        assert client.process.stdin
        assert client.process.stdout
        client.process.stdin.close()
        assert client.process.stdout.read() == ""
        assert client.process.wait(20) == 0
        client.process.stdout.close()
        client.errors.seek(0)
        assert client.errors.read() == ""  # no warning, no progress bar, no log line
        client.errors.close()
        assert hub.errors == []


@pytest.fixture
def client(running: Client) -> Client:
    hub = running.hub
    with hub.lock:
        hub.repos.clear()
        hub.faults.clear()
        hub.log.clear()
        hub.tokens = {WRITE_TOKEN: Token("tester"), READ_TOKEN: Token("tester", "read")}
    hub.add_repo("base/model", tiny_files())
    return running


def verdicts(answer: dict[str, Any]) -> dict[str, str]:
    """Subject → the worst verdict."""
    order = ("ok", "warn", "no")
    found: dict[str, str] = {}
    for each in answer["rows"]:
        found[each["subject"]] = max(found.get(each["subject"], "ok"), each["verdict"], key=order.index)
    return found


def verdict(answer: dict[str, Any], subject: str) -> str:
    return verdicts(answer)[subject]


def test_a_model_on_the_hub(client: Client) -> None:
    answer = client.ask()
    assert "problem" not in answer, answer["problem"]
    commit = client.hub.repo("base/model").head.oid
    assert (answer["commit"], answer["source"]) == (commit, f"base/model@{commit}")
    assert (answer["repo"], answer["nf4_repo"]) == ("tester/model-ablated", "tester/model-ablated-nf4")
    assert set(verdicts(answer).values()) == {"ok"}
    assert answer["licence"]["id"] == "apache-2.0"
    assert answer["licence_files"] == ["LICENSE"]
    assert answer["weight_bytes"] == 40_000
    assert "pytorch_model.bin" not in answer["files"]
    assert commit[:12] in answer["table"]


def test_only_small_files_are_fetched_and_at_the_commit(client: Client) -> None:
    client.hub.add_repo("base/model", tiny_files(pytorch_model__bin=b"x", model__py=b"x", chat_template__jinja=b"x"))
    answer = client.ask()
    assert "problem" not in answer, answer["problem"]
    assert not {"pytorch_model.bin", "model.py"} & set(answer["files"])
    commit = client.hub.repo("base/model").head.oid
    fetched = {entry.path for entry in client.hub.log if "/resolve/" in entry.path}
    assert fetched == {f"/base/model/resolve/{commit}/{name}" for name in ("config.json", "tokenizer_config.json")}
    # Nothing but questions: no POST, PUT or DELETE.
    assert {entry.method for entry in client.hub.log} <= {"GET", "HEAD"}


def test_what_is_downloaded_is_what_is_listed(client: Client) -> None:
    """Licence files in any case of letters; no other formats, adapters, programs or subfolders."""
    extra = {
        "license.md": b"x", "Notice": b"x", "USE_POLICY.md": b"x", "LICENSE.py": b"x", "original/params.json": b"{}",
        "adapter_config.json": b"{}", "model.fp16.safetensors": b"x", "spiece.model": b"x", "merges.txt": b"x", "notes.txt": b"x",
        "model.safetensors.index.json": b"{}",
    }  # fmt: skip
    client.hub.add_repo("base/model", {**tiny_files(pytorch_model__bin=b"x"), **extra})
    answer = client.ask()
    listed = (
        "LICENSE Notice USE_POLICY.md config.json license.md merges.txt model.safetensors spiece.model tokenizer.json"
    )
    assert answer["files"] == [*listed.split(), "tokenizer_config.json"]
    assert answer["licence_files"] == ["LICENSE", "Notice", "USE_POLICY.md", "license.md"]
    assert set(answer["licence_files"]) <= set(answer["files"])


def test_the_licence_of_the_base_is_kept_as_it_is_named_there(client: Client) -> None:
    link = "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE"
    card = {"license": "other", "license_name": "qwen", "license_link": link}
    client.hub.add_repo("base/model", tiny_files(), card_data=card)
    answer = client.ask()
    assert answer["licence"]["id"] == "qwen"
    assert (answer["licence_name"], answer["licence_link"], answer["licence_card"]) == ("qwen", link, card)
    assert "problem" not in client.ask(public=True)
    client.hub.add_repo("base/model", tiny_files())
    answer = client.ask()
    assert (answer["licence_name"], answer["licence_link"]) == (None, None)
    assert answer["licence_card"] == {"license": "apache-2.0"}


def test_a_revision_is_pinned(client: Client) -> None:
    first = client.hub.repo("base/model").head.oid
    client.hub.repo("base/model").tags["v1"] = first
    repo = client.hub.repo("base/model")
    repo.add({}, "all gone")
    for name in (first, "v1"):
        answer = client.ask(f"base/model@{name}")
        assert (answer.get("problem"), answer["commit"]) == (None, first)
    assert "no model*.safetensors" in client.ask()["problem"]
    answer = client.ask("base/model@v9")
    assert (answer["code"], "no revision 'v9'" in answer["problem"]) == (2, True)


@pytest.mark.parametrize(
    "model",
    ["", " ", "gpt2", "/no/such/folder", "./none", "~/model", "a/b/c", "a/..", "../b/c", "a/b@", "a/b@x y", "a b/c", "a/b\n", "https://huggingface.co/a/b", "a/b@../../c@d", "a/b\0", "x" * 5000],
)  # fmt: skip
def test_what_is_no_model(client: Client, model: str) -> None:
    answer = client.ask(model)
    assert answer["code"] == 2
    assert "MODEL=" in answer["problem"]
    assert client.hub.log == []


def test_a_model_that_does_not_exist(client: Client) -> None:
    answer = client.ask("base/none")
    assert answer["code"] == 2
    assert "does not exist" in answer["problem"]
    assert "HF_TOKEN is not set" in client.ask("base/none", token=None, publish=False)["problem"]


def test_a_private_model_needs_its_owner(client: Client) -> None:
    client.hub.add_repo("tester/secret", tiny_files(), private=True)
    assert "problem" not in client.ask("tester/secret")
    assert client.ask("tester/secret", token=None, publish=False)["code"] == 2


def test_a_gated_model(client: Client) -> None:
    """The Hub shows a gated repository's list of files, and not the files."""
    client.hub.arm(Fault(path="/resolve/", status=403, headers={"X-Error-Code": "GatedRepo"}, times=0))
    answer = client.ask()
    assert answer["code"] == 2
    assert f"accept its licence at {client.hub.url}/base/model with the account of HF_TOKEN" in answer["problem"]
    # The rest of the table is there all the same.
    assert verdicts(answer) | {"access": "no", "architecture": "warn", "token": "ok", "GPU": "ok"} == verdicts(answer)
    assert "then set HF_TOKEN" in client.ask(token=None, publish=False)["problem"]
    client.hub.faults.clear()
    client.hub.arm(Fault(path="/api/models/base", status=403, headers={"X-Error-Code": "GatedRepo"}, times=0))
    assert "accept its licence" in client.ask()["problem"]


def test_refusals_of_the_files_are_found_on_the_hub_too(client: Client) -> None:
    cases: list[tuple[dict[str, bytes], str]] = [
        (tiny_files(tiny_config(auto_map={"AutoModel": "a.B"})), "Python code"),
        (tiny_files(tiny_config(quantization_config={"quant_method": "gptq"})), "quantised already"),
        (tiny_files(model__safetensors=None, pytorch_model__bin=b"x"), "copy in safetensors"),
        (tiny_files(config__json=b"[]"), "no JSON object"),
        (tiny_files(config__json=b'{"a": "' + b"x" * 1_500_000 + b'"}'), "config.json is no config"),
        (tiny_files(tokenizer_config__json=None), "instruct or chat"),
    ]
    for files, words in cases:
        client.hub.add_repo("base/model", files)
        answer = client.ask()
        assert answer["code"] == 2
        assert words in answer["problem"]
        client.hub.repos.clear()


def test_all_that_is_wrong_is_said_at_once(client: Client) -> None:
    client.hub.add_repo(
        "base/model", tiny_files(model__safetensors=None, tokenizer__json=None), card_data={"license": "llama3.3"}
    )
    answer = client.ask(repo="wrong", token=READ_TOKEN)
    for words in (
        "- weights: ",
        "- tokenizer: ",
        "- licence: ",
        "- token: ",
        "Then try again: make ablate MODEL=base/model",
    ):
        assert words in answer["problem"]


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ({"status": 503, "times": 0}, 75, "answered 503"),
        ({"status": 429, "times": 0}, 75, "answered 429"),
        ({"status": 500, "times": 0, "body": "<html>"}, 75, "answered 500"),
        ({"drop": "before", "times": 0}, 75, "cannot be reached"),
        ({"stall": 3, "times": 0}, 75, "did not answer in time"),
        ({"status": 200, "body": "<html>", "times": 0}, 5, "did not answer as a model hub does"),
        ({"status": 200, "body": "[]", "times": 0}, 5, "did not answer as a model hub does"),
        ({"status": 200, "body": '{"id": "base/model"}', "times": 0}, 5, "names no commit"),
        ({"status": 418, "times": 0}, 5, "418"),
    ],
)
@pytest.mark.parametrize("path", ["/api/models/base/model", "/api/whoami-v2"])
def test_a_hub_that_is_not_well(client: Client, fault: dict[str, Any], code: int, words: str, path: str) -> None:
    client.hub.arm(Fault(path=path, **fault))
    if path.endswith("v2") and code == 5 and fault["status"] == 200:
        words = "names no account|did not answer"
    answer = client.ask(timeout=0.3)
    assert (answer["code"], bool(re.search(words, answer["problem"]))) == (code, True), answer["problem"]


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 429, "retry_after": 0}, {"drop": "before"}, {"stall": 1}]
)
@pytest.mark.parametrize("path", ["/api/models/base/model$", "/resolve/", "/api/whoami-v2", "/api/models/tester/"])
def test_one_failure_is_got_over(client: Client, fault: dict[str, Any], path: str) -> None:
    struck = client.hub.arm(Fault(path=path, **fault))
    answer = client.ask(timeout=0.5)
    assert "problem" not in answer, answer["problem"]
    assert struck.struck == 1


def test_no_hub_at_all(client: Client) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        answer = client.ask(endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert answer["code"] == 75
    assert "cannot be reached" in answer["problem"]


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Problem, match="HF_HUB_OFFLINE") as caught:
        look("base/model", tmp_path)
    assert caught.value.code == 2


# --- where it is published -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "hf_unknown"])
def test_no_token_that_the_hub_knows(client: Client, token: str | None) -> None:
    if token is None:
        answer = client.ask(token=None)
        assert "set HF_TOKEN in .env" in answer["problem"]
        assert verdict(answer, "token") == "no"
    else:
        answer = client.ask(token=token)
        assert "refused HF_TOKEN" in answer["problem"]
    assert answer["code"] == 2
    assert client.ask(token=SPACED)["code"] == 2


def test_a_token_revoked_between_two_questions(client: Client) -> None:
    client.hub.arm(Fault(path="/api/whoami-v2", status=401, times=0))
    answer = client.ask()
    assert (answer["code"], verdict(answer, "token")) == (2, "no")


def test_a_token_that_may_only_read(client: Client) -> None:
    answer = client.ask(token=READ_TOKEN)
    assert verdict(answer, "token") == "no"
    assert "may only read" in answer["problem"]
    # Enough where nothing is published.
    assert "problem" not in client.ask(token=READ_TOKEN, publish=False)


def test_fine_grained_tokens(client: Client) -> None:
    cases = [
        ({"tester": "write"}, "ok"),
        ({"tester": "read"}, "no"),
        ({}, "no"),
        ({"elsewhere": "write"}, "no"),
        ({"tester/model-ablated": "write"}, "no"),  # the 4-bit copy's repository too
        ({"tester/model-ablated": "write", "tester/model-ablated-nf4": "write"}, "ok"),
    ]
    for scopes, expected in cases:
        client.hub.tokens[FINE] = Token("tester", "fineGrained", scopes=scopes)
        assert verdict(client.ask(token=FINE), "token") == expected, scopes


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"name": "tester"}, "warn"),
        ({"name": "tester", "auth": "?"}, "warn"),
        ({"name": "tester", "auth": {"accessToken": {"role": "god"}}}, "warn"),
        ({"name": "tester", "orgs": 3, "auth": {"accessToken": {"role": "fineGrained"}}}, "warn"),
        ({"name": "tester", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [3, {"entity": []}]}}}}, "no"),
        ({"name": "tester", "orgs": [{"name": 1}, None], "auth": {"accessToken": {"role": "write"}}}, "ok"),
    ],
)  # fmt: skip
def test_answers_about_the_token_that_are_unlike_the_hubs(client: Client, body: Any, expected: str) -> None:
    client.hub.arm(Fault(path="/api/whoami-v2", status=200, body=json.dumps(body), times=0))
    assert verdict(client.ask(), "token") == expected


def test_organisations(client: Client) -> None:
    client.hub.tokens[WRITE_TOKEN] = Token("tester", namespaces=("lab",))
    answer = client.ask(repo="lab/my-model")
    assert "problem" not in answer, answer["problem"]
    assert (answer["repo"], answer["nf4_repo"]) == ("lab/my-model", "lab/my-model-nf4")
    answer = client.ask(repo="other/my-model")
    assert "this account may write to tester, lab: set REPO=tester/my-model" in answer["problem"]
    assert client.ask(repo="plain")["repo"] == "tester/plain"


@pytest.mark.parametrize(
    "repo", ["a/b/c", "tester/", "x y", "tester/../x", "tester/-x", "tester/x.git", "tester/" + "x" * 95, "é"]
)
def test_no_name_for_a_repository(client: Client, repo: str) -> None:
    answer = client.ask(repo=repo)
    assert answer["code"] == 2
    assert "try REPO=" in answer["problem"]


def test_targets(client: Client) -> None:
    """Public ones are refused, the 4-bit copy's as well, unless they are wanted public."""
    for name in ("tester/model-ablated", "tester/model-ablated-nf4"):
        client.hub.add_repo(name, {"a": b"b"}, private=True)
        assert verdict(client.ask(), "repository") == "ok"
        client.hub.repo(name).private = False
        answer = client.ask()
        assert (answer["code"], verdict(answer, "repository")) == (2, "no")
        assert f"{name} is public" in answer["problem"]
        assert verdict(client.ask(public=True), "repository") == "ok"
        client.hub.repo(name).private = True
        answer = client.ask(public=True)
        assert (answer["code"], verdict(answer, "repository")) == (2, "no")
        assert f"do it first at {client.hub.url}/{name}/settings, or leave PUBLIC unset" in answer["problem"]
        del client.hub.repos[name]


def test_a_hub_that_does_not_say_whether_a_target_is_private(client: Client) -> None:
    for private in ("null", '"yes"', "0"):
        body = f'{{"id": "tester/model-ablated", "private": {private}}}'
        client.hub.faults[:] = [Fault(path="/api/models/tester/model-ablated$", status=200, body=body, times=0)]
        assert verdict(client.ask(), "repository") == "no"


def test_the_base_is_never_written_over(client: Client) -> None:
    client.hub.add_repo("tester/Base", tiny_files(), private=True)
    answer = client.ask("tester/Base", repo="tester/base")
    assert "base model would be overwritten" in answer["problem"]
    client.hub.add_repo("tester/base-nf4", tiny_files(), private=True)
    assert "base model would be overwritten" in client.ask("tester/base-nf4", repo="tester/base")["problem"]


def test_licences(client: Client) -> None:
    client.hub.add_repo("base/model", tiny_files(), card_data={"license": "llama3.3"})
    answer = client.ask()
    assert "problem" not in answer, answer["problem"]
    assert answer["repo"] == "tester/Llama-model-ablated"
    assert answer["licence"]["notice"] == "Built with Llama"
    answer = client.ask(repo="tester/mine")
    assert "Set REPO=tester/Llama-mine" in answer["problem"]
    client.hub.add_repo("base/model", tiny_files(), card_data={"license": "other", "license_name": "my-own"})
    assert "problem" not in client.ask()
    assert "Leave PUBLIC unset" in client.ask(public=True)["problem"]
    client.hub.add_repo("base/model", tiny_files(), card_data={})
    assert "names no licence" in client.ask(public=True)["problem"]


def test_what_is_downloaded_already_needs_no_space(client: Client, tmp_path: Path) -> None:
    """The disk row counts what is still to come."""
    client.hub.add_repo("base/model", tiny_files(weights=5_000_000))
    cache = tmp_path / "cache"
    before = client.ask(hf_home=str(cache), publish=False)
    snapshot = cache / "hub" / "models--base--model" / "snapshots" / before["commit"]
    (snapshot / "model.safetensors").write_bytes(b"\0" * 5_000_000)
    after = client.ask(hf_home=str(cache), publish=False)
    (need_before,) = (each["need"] for each in before["rows"] if each["subject"] == "disk")
    (need_after,) = (each["need"] for each in after["rows"] if each["subject"] == "disk")
    assert "download 5.0 MB" in need_before
    assert "download" not in need_after


def test_files_of_a_size_that_is_not_said(client: Client) -> None:
    commit = client.hub.repo("base/model").head.oid
    names = [{"rfilename": name} for name in (*tiny_files(), "sub/model.safetensors", "../x", 3)]
    body = json.dumps({"id": "base/model", "sha": commit, "siblings": names, "private": False})
    client.hub.arm(Fault(path="/api/models/base/model$", status=200, body=body, times=0))
    with contextlib.suppress(KeyError):
        assert verdict(client.ask(publish=False), "weights") == "warn"
