"""Is the worker fit for its model: the sentences, with numbers of models and GPUs that exist, and the real kernel."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from runpod.serverless.modules import rp_fitness

import fitness
from fitness import CARDS, TOKENS, Load, check, kernel, memory, needed_bytes
from weights import Description, WeightsError

GB = 10**9
# Qwen3-8B: its config, and the parameters of its layers.
QWEN = Description(
    weight_bytes=16_381_517_208,
    parameters=8_190_735_360,
    linear_parameters=6_945_767_424,
    quantization="none",
    layers=36,
    kv_heads=8,
    head_dim=128,
    window=40960,
)
QWEN_NF4 = Description(
    **{**QWEN.__dict__, "weight_bytes": 6_100_000_000, "parameters": 0, "linear_parameters": 0, "quantization": "nf4"}
)


@pytest.fixture(autouse=True)
def no_checks_registered() -> Iterator[None]:
    rp_fitness.clear_fitness_checks()
    yield
    rp_fitness.clear_fitness_checks()


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "load", "weights"),
    [
        (QWEN_NF4, "published", 6_100_000_000),
        (QWEN, "nf4", 6_073_951_863),  # 0.516 bytes for each linear parameter, 2 for each other
        (QWEN, "bf16", 16_381_470_720),
        (QWEN, "float32", 32_762_941_440),
    ],
)
def test_what_a_model_needs_depends_on_how_it_is_loaded(model: Description, load: Load, weights: int) -> None:
    parts = needed_bytes(model, load)
    assert abs(parts["weights"] - weights) <= 1
    assert parts["cache"] == 2 * 36 * 8 * 128 * TOKENS * (4 if load == "float32" else 2)
    assert parts["working space"] == 1_500_000_000


def test_a_short_window_needs_no_more_than_it_holds() -> None:
    short = Description(**{**QWEN.__dict__, "window": 1024})
    assert needed_bytes(short, "bf16")["cache"] * 8 == needed_bytes(QWEN, "bf16")["cache"]


@pytest.mark.parametrize(
    ("model", "load", "cards"),
    [
        (QWEN_NF4, "published", [16 * GB]),
        (QWEN, "nf4", [16 * GB]),
        (QWEN, "bf16", [24 * GB]),
        (QWEN, "bf16", [12 * GB, 12 * GB]),
        (QWEN, "float32", []),
    ],
)
def test_a_model_that_fits_is_not_remarked_on(model: Description, load: Load, cards: list[int]) -> None:
    assert memory(model, load, cards=cards, ram=64 * GB) is None


def test_a_model_that_does_not_fit_names_the_sizes_and_the_gpu_that_would_do() -> None:
    sentence = memory(QWEN, "bf16", cards=[15 * GB], ram=999 * GB)
    assert sentence == (
        "the model needs 19.1 GB (weights 16.4 GB, a job of 8192 tokens 1.2 GB, working space 1.5 GB) and the GPU has"
        " 15.0 GB free: choose a GPU with 24 GB or more for the endpoint, or serve the model's -nf4 repository"
    )


def test_the_remedy_fits_the_machine_and_the_model() -> None:
    assert "the GPUs have 8.0 GB free" in (memory(QWEN, "nf4", cards=[4 * GB, 4 * GB], ram=0) or "")
    assert "there is no GPU, and the memory has 8.0 GB free" in (memory(QWEN, "float32", cards=[], ram=8 * GB) or "")
    assert "-nf4" not in (memory(QWEN_NF4, "published", cards=[4 * GB], ram=0) or "-nf4")
    giant = Description(**{**QWEN.__dict__, "parameters": 400 * GB})
    assert "choose more GPUs for the endpoint" in (memory(giant, "bf16", cards=[141 * GB], ram=0) or "")


def test_the_smallest_card_that_is_named_has_room_for_what_it_keeps_for_itself() -> None:
    parts = needed_bytes(QWEN, "bf16")
    for size in CARDS:
        exact = Description(
            **{**QWEN.__dict__, "parameters": (size * GB - parts["cache"] - parts["working space"]) // 2}
        )
        sentence = memory(exact, "bf16", cards=[GB], ram=0)
        assert sentence is not None
        assert f"a GPU with {size} GB" not in sentence


def test_the_containers_limit_counts_and_cached_files_do_not(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{8 * GB}\n")
    (tmp_path / "memory.current").write_text(f"{7 * GB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {GB}\nactive_file {2 * GB}\ninactive_file {4 * GB}\n")
    assert fitness._container_room(tmp_path) == 7 * GB
    (tmp_path / "memory.max").write_text("max\n")
    assert fitness._container_room(tmp_path) > 10**15
    assert fitness._container_room(tmp_path / "none") > 10**15
    assert 0 < fitness.ram() < 10**15


# --- the kernel ------------------------------------------------------------------------------------------------------


def test_the_nf4_kernel_works_here() -> None:
    assert kernel("cuda" if torch.cuda.is_available() else "cpu") is None


def test_a_kernel_that_computes_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    true = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given: true(*given) * 1.25)
    sentence = kernel("cpu") or ""
    assert "its result is wrong by 20%" in sentence
    assert "build the image again" in sentence


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_kernel_that_computes_no_numbers_is_named(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "_nf4_errors", lambda device: [0.001, number])
    assert "its result is wrong by" in (kernel("cuda") or "")


def test_a_kernel_that_does_not_run_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("the GPU does run it")
    sentence = kernel("cuda") or ""
    assert sentence.startswith("bitsandbytes cannot compute with NF4 weights on cuda (")
    assert sentence.endswith("let the endpoint use only GPUs whose driver has the CUDA of this image")


# --- all together ----------------------------------------------------------------------------------------------------


def test_a_model_that_is_fine_passes_all_checks(model_folder: Path) -> None:
    found, results = check(str(model_folder), None, {})
    assert found is not None
    assert found.folder == model_folder
    assert results == {"disk": None, "weights": None, "memory": None, "kernel": None}


def test_no_hub_is_asked_after_the_model_was_found(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    check(str(tmp_path / "none"), None, {})
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    check(str(model_folder), None, {})
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_how_it_is_loaded_and_what_is_there_decide(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fitness, "gpu_memory", lambda: [GB])
    monkeypatch.setattr(fitness, "kernel", lambda device: asked.append(device))
    _, results = check(str(model_folder), None, {})
    assert "the GPU has 1.0 GB free" in (results["memory"] or "")
    assert asked == ["cuda"]
    check(str(model_folder), None, {}, load="bf16")
    assert asked == ["cuda"]  # no quantised layer, no kernel


@pytest.mark.parametrize(
    ("quantization", "cards", "load"),
    [
        ("", [], "float32"),
        ("", [GB], "nf4"),
        ("none", [], "float32"),
        ("none", [GB], "bf16"),
        ("nf4", [], "nf4"),
        ("nf4", [GB], "nf4"),
    ],
)
def test_the_wanted_quantization_decides(
    quantization: str, cards: list[int], load: Load, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fitness, "gpu_memory", lambda: cards)
    monkeypatch.setattr(fitness, "kernel", lambda device: None)
    monkeypatch.setattr(fitness, "memory", lambda model, load, **there: asked.append(load))
    check(str(model_folder), None, {"QUANTIZATION": quantization})
    assert asked == [load]


def test_an_unknown_quantization_is_named(model_folder: Path) -> None:
    _, results = check(str(model_folder), None, {"QUANTIZATION": "int4"})
    assert results["weights"] == "QUANTIZATION=int4 is unknown; known are nf4, none"


def test_weights_that_are_damaged_are_found_where_it_is_asked_for(model_copy: Path) -> None:
    names = [path.name for path in sorted(model_copy.iterdir())]
    (model_copy / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))
    assert check(str(model_copy), None, {})[1]["weights"] is None
    found, results = check(str(model_copy), None, {"VERIFY_WEIGHTS": "sha256"})
    assert found is not None
    assert "chat_template.jinja has changed; config.json has changed" in (results["weights"] or "")


def test_a_model_that_is_nowhere_is_a_result_and_no_exception(tmp_path: Path) -> None:
    found, results = check(str(tmp_path / "none"), None, {})
    assert found is None
    assert "does not exist" in (results["weights"] or "")


def test_a_full_disk_is_the_disks_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise WeightsError("the disk is full: raise it", "disk")

    monkeypatch.setattr(fitness, "locate", full)
    found, results = check("someone/model", None, {})
    assert found is None
    assert results["disk"] == "the disk is full: raise it"
    assert results["weights"] is None


def test_the_sdk_runs_the_checks_by_their_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rp_fitness, "_ensure_gpu_check_registered", lambda: None)
    monkeypatch.setattr(rp_fitness, "_ensure_system_checks_registered", lambda: None)
    ends: list[int] = []
    monkeypatch.setattr(rp_fitness, "_terminate_unhealthy", ends.append)
    fitness.register({"disk": None, "weights": None})
    asyncio.run(rp_fitness.run_fitness_checks())
    assert ends == []
    fitness.register({"memory": "the model needs 20 GB"})
    asyncio.run(rp_fitness.run_fitness_checks())
    assert ends == [1]
    assert "Fitness check failed: memory | RuntimeError: the model needs 20 GB" in capsys.readouterr().out


def test_light_code_stays_light() -> None:
    """Finding the weights and judging them must not pay for torch and transformers, which load meanwhile or after."""
    code = "import sys, json, weights, fitness; print(json.dumps(sorted({'torch', 'transformers', 'runpod', 'huggingface_hub'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
