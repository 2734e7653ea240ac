"""What is asked of others before anything is changed: the hub about the model, the catalog about the GPUs, the registry
about the image. Each returns notes for the plan, and raises Problem for what cannot work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import model_hub
import models
from common.problems import TRY_LATER, Problem
from common.text import clean
from endpoint.desired import NO_COMMIT, Desired
from runpod_api import Api, ApiError

GB = 10**9
GIB = 2**30


def model(desired: Desired, actual: Mapping[str, Any] | None = None) -> list[str]:
    """Is the commit on the hub, private, and one that `make ablate` verified? UNVERIFIED=1 asks nothing.

    Neither is anything asked about the model that the endpoint has already.
    """
    env = (actual or {}).get("env") or {}
    if (env.get("MODEL_ID"), env.get("MODEL_REVISION")) == (desired.model.id, desired.model.revision):
        return []
    wanted, at = desired.model, desired.file.at(("model", "revision"))
    if os.environ.get("UNVERIFIED") not in (None, "", "0"):
        return [f"UNVERIFIED=1: nobody asked the hub about {wanted.id} at {wanted.revision[:12]}"]
    if wanted.revision == NO_COMMIT or wanted.id.startswith("your-name/"):
        raise Problem(
            f"{at}: model.id and model.revision are still the example's: put in the repository and the commit that make"
            " ablate printed. To practise without a model: make deploy ON=local"
        )
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    token = os.environ.get("HF_TOKEN") or None
    api = model_hub.client(token)
    try:
        refs = api.list_repo_refs(wanted.id)
        private = api.model_info(wanted.id).private
    except RepositoryNotFoundError:
        who = "this HF_TOKEN" if token else "anybody without HF_TOKEN"
        raise Problem(f"{desired.file.at(('model', 'id'))}: {wanted.id} is not on the hub, or not for {who}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(clean(str(error)).split())[:200] or type(error).__name__
        raise Problem(
            f"the hub did not say whether {wanted.id} is verified ({reason}); try again, or go on without asking: UNVERIFIED=1",
            TRY_LATER,
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise Problem(
            f"the hub did not answer ({type(error).__name__}); try again, or go on without asking: UNVERIFIED=1",
            TRY_LATER,
        ) from None
    verified = {tag.name: tag.target_commit for tag in refs.tags if tag.name.startswith("verified-")}
    if wanted.revision not in verified.values():
        known = "".join(f"\n  {commit}  {clean(name)[:100]}" for name, commit in sorted(verified.items())[-5:])
        raise Problem(
            f"{at}: no tag verified-… of {wanted.id} is at {wanted.revision}."
            + (f" Verified are:{known}" if known else f" None of its commits is: make ablate MODEL={wanted.base}")
            + "\nUNVERIFIED=1 deploys it all the same"
        )
    tag = next(name for name, commit in verified.items() if commit == wanted.revision)
    notes = [f"model {wanted.id} at {wanted.revision[:12]}, {clean(tag)[:100]}"]
    if private is False:
        notes.append(f"the repository {wanted.id} is public")
    return notes


def catalog(desired: Desired, api: Api) -> list[str]:
    """Do the pools exist, do their GPUs hold the model, is one free, and what does a worker cost?"""
    gpu = desired.body["gpu"]
    try:
        types = serverless_gpus(api)
    except ApiError as error:
        return [f"the GPU pools are not checked: {error}"]
    if not types:
        return ["the GPU pools are not checked: RunPod's catalog is empty"]
    ids = [kind["id"] for kind in types if kind["pool"] in gpu["pools"]]
    if unknown := [kind for kind in gpu["excludedTypes"] if kind not in ids]:
        raise Problem(
            f"{desired.file.at(('gpu', 'excludedTypes'))}: the pools have no GPU type {', '.join(unknown)}; they have"
            f" {', '.join(ids) or 'none'}"
        )
    pools: dict[str, list[dict[str, Any]]] = {}
    for kind in types:
        if kind.get("id") not in gpu["excludedTypes"]:
            pools.setdefault(str(kind["pool"]), []).append(kind)
    at = desired.file.at(("gpu", "pools"))
    if unknown := [pool for pool in gpu["pools"] if pool not in pools]:
        raise Problem(
            f"{at}: RunPod has no GPU pool {', '.join(unknown)} (without excludedTypes); known are {', '.join(sorted(pools))}"
        )
    notes = []
    known = models.load().get(desired.model.base.lower())
    if known:
        for pool in gpu["pools"]:
            memory = min(int(kind["memory"]) for kind in pools[pool]) * gpu["count"]
            if memory * GIB < known.serving.vram_gb * GB:
                raise Problem(
                    f"{at}: pool {pool} has GPUs of {memory} GB for each worker, and serving {known.id} takes"
                    f" {known.serving.vram_gb:g} GB; take a larger pool, or more GPUs (gpu.count)"
                )
    free = [
        pool for pool in gpu["pools"] if any(kind.get("availability") not in ("NONE", None) for kind in pools[pool])
    ]
    if not free and any("availability" in kind for pool in gpu["pools"] for kind in pools[pool]):
        notes.append(f"no GPU of {', '.join(gpu['pools'])} is free now: workers will wait, or be throttled")
    prices = [price for pool in gpu["pools"] if (price := pool_price(pools[pool])) is not None]
    if prices:
        most, workers = max(prices) * gpu["count"], desired.body["workers"]
        notes.append(
            f"a worker costs up to {most:.2f} US dollars per hour; {workers['min']} run always, {workers['max']} at most:"
            f" {most * workers['min']:.2f} to {most * workers['max']:.2f} per hour"
        )
    return notes


def serverless_gpus(api: Api) -> list[dict[str, Any]]:
    """The GPU types that are in a serverless pool, with prices and availability. Raises ApiError."""
    found = api.list("catalog/gpus", "gpus", {"include": "AVAILABILITY", "product": "SERVERLESS"})
    return [
        kind
        for kind in found
        if isinstance(kind.get("id"), str)
        and isinstance(kind.get("pool"), str)
        and isinstance(kind.get("memory"), int)
        and isinstance(kind.get("price"), dict)
    ]


def pool_price(kinds: list[dict[str, Any]]) -> float | None:
    """US dollars per GPU and hour of a pool: the highest of its types; None where the catalog names none."""
    prices = [
        kind["price"]["serverless"]
        for kind in kinds
        if isinstance((kind.get("price") or {}).get("serverless"), int | float)
    ]
    return float(max(prices)) if prices else None


def image(reference: str) -> list[str]:
    """Is the image's digest in its registry?"""
    import image_registry

    if os.environ.get("UNVERIFIED") not in (None, "", "0"):
        return [f"UNVERIFIED=1: nobody asked the registry about {reference}"]
    exists = image_registry.digest_exists(reference)
    if exists is False:
        raise Problem(f"{reference} is not in its registry: make push REGISTRY=docker.io/your-name/")
    return [] if exists else [f"the registry did not say whether {reference} is there: it is private, or out of reach"]
