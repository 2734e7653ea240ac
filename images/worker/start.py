"""Which engine answers, and how it comes up: found, checked, loaded, each with the time it took.

ENGINE      extractive, transformers or vllm; empty: transformers where MODEL_ID is set, else extractive
MODEL_ID, MODEL_REVISION, QUANTIZATION, VERIFY_WEIGHTS      the model; .env.example says more
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from common.prompts import Prompts
from engines import Engine, Start

if TYPE_CHECKING:
    from weights import Description, Weights

ENGINES = ("extractive", "transformers", "vllm")


class Unfit(Exception):
    """This machine cannot serve the model; the message says why and names the remedy."""


def build(prompts: Prompts, environ: Mapping[str, str]) -> tuple[Engine, Start]:
    """The engine that ENGINE names, ready to answer. Raises SystemExit for a wrong setting, Unfit for a wrong machine.

    Under the platform the checks of the machine are registered with the SDK, which ends the worker if one has failed.
    """
    start = Start(phases={"python": process_seconds()})
    name = environ.get("ENGINE") or ("transformers" if environ.get("MODEL_ID") else "extractive")
    if name not in ENGINES:
        raise SystemExit(f"ENGINE={name} is unknown; known are {', '.join(ENGINES)}")
    if name == "extractive":
        with _phase(start, "imports"):
            from extractive import ExtractiveEngine
        return ExtractiveEngine(), start
    model_id = environ.get("MODEL_ID")
    if not model_id:
        raise SystemExit(f"ENGINE={name} needs MODEL_ID, for example MODEL_ID=your-name/open-synthesis-qwen3-14b-nf4")
    weights, description = _find(model_id, environ, start)
    if name == "transformers":
        with _phase(start, "imports"):
            import generative
        return generative.load(prompts, model_id, weights, environ, start), start
    return _vllm(prompts, model_id, weights, description, environ, start), start


def process_seconds() -> float:
    """How long this process has been there, in seconds."""
    return max(0.0, time.time() - float(psutil.Process().create_time()))


def _find(model_id: str, environ: Mapping[str, str], start: Start) -> tuple[Weights, Description]:
    begun = time.monotonic()
    import fitness
    from weights import describe

    weights, results = fitness.check(model_id, environ.get("MODEL_REVISION") or None, environ)
    description = None
    if weights and not results["weights"]:
        description = describe(weights.folder)
        if environ.get("QUANTIZATION") == "none" and description.quantization != "none":
            results["weights"] = (
                f"{model_id} is quantised already ({description.quantization}), so QUANTIZATION=none cannot be had:"
                " leave QUANTIZATION empty, or set MODEL_ID to the repository that is not quantised"
            )
    if environ.get("RUNPOD_WEBHOOK_GET_JOB"):
        fitness.register(results)
    if failed := [sentence for sentence in results.values() if sentence]:
        raise Unfit("; ".join(failed))
    assert weights
    assert description
    print(weights.reason, flush=True)
    start.source = weights.source
    start.phases["locate"] = weights.seconds
    start.phases["check"] = time.monotonic() - begun - weights.seconds
    return weights, description


def _vllm(
    prompts: Prompts,
    model_id: str,
    weights: Weights,
    description: Description,
    environ: Mapping[str, str],
    start: Start,
) -> Engine:
    with _phase(start, "imports"):
        from transformers import AutoTokenizer

        from chat import Chat
        from vllm_engine import VllmEngine
    quantization = description.quantization
    if quantization == "none":
        quantization = environ.get("QUANTIZATION") or "nf4"
    model = {"id": model_id, "revision": weights.revision, "engine": "vllm", "quantization": quantization}
    with _phase(start, "load"):
        tokenizer = AutoTokenizer.from_pretrained(str(weights.folder), trust_remote_code=False, local_files_only=True)
        return VllmEngine(Chat(tokenizer, prompts), weights.folder, model)


@contextmanager
def _phase(start: Start, name: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    start.phases[name] = time.monotonic() - begun
