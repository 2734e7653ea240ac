"""Is this worker fit for its model? Checks at its start, each None or a sentence that names the remedy.

They are computed before the model is loaded, because a model that does not fit would take the process with it, and are
handed to the SDK as fitness checks: it runs them before the first job, reports the first failure and ends the worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from weights import Description, Weights, WeightsError, describe, go_offline, locate, verify

TOKENS = 8192  # of the job that must fit at least: a question with its sources, and the answer
WORKING_SPACE = 1_500_000_000  # bytes: CUDA's own, activations, what the allocator cannot use
NF4_BYTES = 0.516  # for each quantised parameter, with double quantisation
CARDS = (16, 24, 32, 40, 48, 80, 96, 141, 180)  # GB; what GPUs are sold with
TOLERANCE = 0.02  # of the product's norm; bfloat16 rounding is below 0.005

QUANTIZATIONS = ("nf4", "none")

Load = Literal["published", "nf4", "bf16", "float32"]
Results = dict[str, str | None]


def check(
    model_id: str, revision: str | None, environ: Mapping[str, str], load: Load | None = None
) -> tuple[Weights | None, Results]:
    """Find the model and run all checks: where it is (None if nowhere), and the sentence or None of each check.

    Nothing in this process asks a hub after the model was found: see go_offline.
    `load`: how the engine will load it; None: as `form` says.
    """
    results: Results = {"disk": None, "weights": None, "memory": None, "kernel": None}
    try:
        found = locate(model_id, revision, environ)
        model = describe(found.folder)
    except WeightsError as error:
        results[error.check] = str(error)
        return None, results
    go_offline()
    results["weights"] = verify(found.folder, environ.get("VERIFY_WEIGHTS"))
    wanted = environ.get("QUANTIZATION") or None
    if wanted not in (None, *QUANTIZATIONS):
        results["weights"] = f"QUANTIZATION={wanted} is unknown; known are {', '.join(QUANTIZATIONS)}"
        return found, results
    cards = gpu_memory()
    load = load or form(model, wanted, gpu=bool(cards))
    results["memory"] = memory(model, load, cards=cards, ram=ram())
    if load == "nf4" or model.quantization == "nf4":
        results["kernel"] = kernel("cuda" if cards else "cpu")
    return found, results


def form(model: Description, wanted: str | None, *, gpu: bool) -> Load:
    """How the weights are loaded: as published if they are quantised, else as QUANTIZATION, `wanted`, says ("nf4", or
    "none": bfloat16 on a GPU, float32 without), which is NF4 on a GPU where it is not set."""
    if model.quantization != "none":
        return "published"
    if wanted == "nf4" or (gpu and not wanted):
        return "nf4"
    return "bf16" if gpu else "float32"


def needed_bytes(model: Description, load: Load, tokens: int = TOKENS) -> dict[str, int]:
    """What a model needs in memory, in bytes: its weights, the keys and values of one job, working space."""
    if load == "published":
        weights: float = model.weight_bytes
    elif load == "nf4":
        weights = NF4_BYTES * model.linear_parameters + 2 * (model.parameters - model.linear_parameters)
    else:
        weights = (4 if load == "float32" else 2) * model.parameters
    tokens = min(tokens, model.window or tokens)
    cache = model.kv_bytes(tokens, 4 if load == "float32" else 2)
    return {"weights": math.ceil(weights), "cache": cache, "working space": WORKING_SPACE}


def memory(model: Description, load: Load, *, cards: Sequence[int], ram: int) -> str | None:
    """Does the model fit? `cards`: the free bytes of each GPU, empty without one: then `ram`, the free bytes of memory."""
    parts = needed_bytes(model, load)
    needed, there = sum(parts.values()), sum(cards) or ram
    if needed <= there:
        return None
    tokens = min(TOKENS, model.window or TOKENS)
    sum_of = f"weights {_gb(parts['weights'])}, a job of {tokens} tokens {_gb(parts['cache'])}, working space {_gb(WORKING_SPACE)}"
    has = f"the GPU{'s have' if len(cards) > 1 else ' has'}" if cards else "there is no GPU, and the memory has"
    enough = next((size for size in CARDS if size * 1e9 >= needed / 0.95), None)  # a card keeps some for itself
    rent = f"a GPU with {enough} GB or more" if enough else "more GPUs"
    smaller = "" if model.quantization == "nf4" else ", or serve the model's -nf4 repository"
    return (
        f"the model needs {_gb(needed)} ({sum_of}) and {has} {_gb(there)} free: choose {rent} for the endpoint{smaller}"
    )


def kernel(device: Literal["cuda", "cpu"]) -> str | None:
    """Does bitsandbytes multiply with NF4 weights on this device, for one row and for many, as it should?"""
    try:
        errors = _nf4_errors(device)
    except Exception as error:  # a library that does not load raises anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        if all(error <= TOLERANCE for error in errors):  # NaN is not
            return None
        why = f"its result is wrong by {max(errors, key=lambda e: math.inf if math.isnan(e) else e):.0%}"
    remedy = (
        "let the endpoint use only GPUs whose driver has the CUDA of this image"
        if device == "cuda"
        else "build the image again, or use a machine with a GPU"
    )
    return f"bitsandbytes cannot compute with NF4 weights on {device} ({why}): {remedy}"


def _nf4_errors(device: str) -> list[float]:
    """How far NF4 products are from those with the same weights dequantised, relative to their norm."""
    import torch
    from bitsandbytes import functional, matmul_4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).to(device, torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    plain = functional.dequantize_4bit(packed, state).float()
    found = []
    for rows in (1, 16):  # one row and many go through different kernels
        given = torch.randn(rows, 512, generator=generator).to(device, torch.bfloat16)
        expected = given.float() @ plain.t()
        product = matmul_4bit(given, packed.t(), quant_state=state).float()
        found.append(float((product - expected).norm() / expected.norm()))
    return found


def gpu_memory() -> list[int]:
    """The free bytes of each GPU that torch can use."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [int(torch.cuda.mem_get_info(index)[0]) for index in range(count)]


def ram() -> int:
    """The bytes of memory that a process here may still take, within the container's limit."""
    import psutil

    return min(int(psutil.virtual_memory().available), _container_room())


def _container_room(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's limit leaves; more than any machine has where there is none. Cached files give way."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = sum(int(value) for key, value in pairs if key in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return 2**62  # no such file, or the limit is "max"
    return limit - (used - cached)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def register(results: Results) -> None:
    """Hand the results to the SDK, one fitness check for each. A failed one ends the worker with its sentence."""
    from runpod.serverless import register_fitness_check

    for name, sentence in results.items():
        register_fitness_check(_fitness_check(name, sentence))


def _fitness_check(name: str, sentence: str | None) -> Callable[[], None]:
    def fitness_check() -> None:
        if sentence is not None:
            raise RuntimeError(sentence)

    fitness_check.__name__ = name  # the SDK names the check that failed by this
    return fitness_check
