"""The local RunPod against RunPod's own description of its API: every answer is one that the description allows.

Skipped where the description is not at hand: tests/ops/runpod_openapi.py says where it is looked for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from local_server import Runpod, local_server
from runpod_openapi import DESCRIPTION
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import HealthCheck

from local_runpod import catalog

load_all_checks()
NOT_EMULATED = {
    r"^/v2/clusters": "this project rents no clusters",
    r"^/v2/billing/clusters$": "and so is billed for none",
    r"^/v2/registries/delegations": "it uses no AWS registries",
}
# What is there when a request comes that names something by its id.
ENDPOINT = {
    "name": "one",
    "type": "QUEUE",
    "image": "you/worker:1",
    "gpu": {"pools": ["ADA_24"]},
    "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
    "workers": {"min": 1, "max": 2},
}
POD = {"name": "one", "image": "you/ablate:1", "gpu": {"id": "NVIDIA A40"}}
TEMPLATE = {"name": "one", "image": "you/worker:1", "serverless": True}
REGISTRY = {"name": "one", "username": "you", "password": "secret"}
VOLUME = {"name": "one", "size": 10, "dataCenter": "US-KS-2"}


def described(*modes: GenerationMode) -> schemathesis.BaseSchema:
    schema: schemathesis.BaseSchema = schemathesis.openapi.from_dict(copy.deepcopy(DESCRIPTION))
    for pattern in NOT_EMULATED:
        schema = schema.exclude(path_regex=pattern)
    # Parameters that it does not know the platform ignores; the key is sent with every request.
    schema.config.generation.update(
        modes=list(modes),
        deterministic=True,
        database="none",
        max_examples=12,
        allow_extra_parameters=False,
        with_security_parameters=False,
    )
    schema.config.phases.coverage.enabled = False
    schema.config.suppress_health_check = [HealthCheck.all]
    return schema


@pytest.fixture(scope="module")
def runpod() -> Iterator[Runpod]:
    with local_server(hold=0.01) as server:
        yield server


def there(runpod: Runpod) -> dict[str, str]:
    """Ids of things that exist, by the path that they are below; made anew when a request has deleted them."""
    account = runpod.account
    if not any(endpoint.workers for endpoint in account.endpoints.values()):
        runpod.ok("POST", "serverless", ENDPOINT)
    if not account.pods:
        runpod.ok("POST", "pods", POD)
    if not account.templates:
        runpod.ok("POST", "templates", {**TEMPLATE, "name": f"t{len(account.calls)}"})
    if not account.registries:
        runpod.ok("POST", "registries", {**REGISTRY, "name": f"r{len(account.calls)}"})
    if not account.volumes:
        runpod.ok("POST", "network-volumes", VOLUME)
    return {
        "serverless": next(one.id for one in account.endpoints.values() if one.workers),
        "pods": next(iter(account.pods)),
        "templates": next(iter(account.templates)),
        "registries": next(iter(account.registries)),
        "network-volumes": next(iter(account.volumes)),
        "catalog/gpus": "NVIDIA A40",
        "catalog/cpus": "cpu3c",
        "catalog/datacenters": "EU-RO-1",
    }


def conforms(runpod: Runpod, case: Case[Any], *unless: str) -> int:
    """Send a request and check the answer; its status."""
    answer = case.call(base_url=runpod.base, headers=runpod.headers, timeout=20)
    if case.path.endswith("/logs") and answer.status_code == 200:
        # The description calls the stream a string; its events, which are objects, are looked at in tests/ops.
        unless = (*unless, "response_schema_conformance")
    checks: list[Any] = [check for check in CHECKS.get_all() if check.__name__ not in unless]
    case.validate_response(answer, checks=checks)
    return answer.status_code


def only_ids() -> list[str]:
    """The operations to which no wrong request can be made up: they take nothing, or ids, and any text is an id."""
    return [
        f"{method.upper()} {path}"
        for path, operations in DESCRIPTION["paths"].items()
        for method, operation in operations.items()
        if isinstance(operation, dict) and not {"requestBody", "parameters"} & set(operation)
    ]


def grounded(case: Case[Any], known: dict[str, str], runpod: Runpod) -> None:
    """Let a request speak of what exists."""
    area = "/".join(case.path.removeprefix("/v2/").split("/{")[0].split("/")[:2])
    if "id" in case.path_parameters and area in known:
        case.path_parameters["id"] = known[area]
    if "workerId" in case.path_parameters:
        workers = runpod.account.endpoints[known["serverless"]].workers
        case.path_parameters["workerId"] = next(iter(workers))
    if isinstance(case.body, dict):
        ground_body(case.body, known, creates=case.method == "POST")


def ground_body(body: dict[str, Any], known: dict[str, str], *, creates: bool) -> None:
    """The same for what it sends."""
    if "templateId" in body:
        del body["templateId"]
        if creates:
            body["image"] = "you/worker:1"
    gpu = body.get("gpu")
    for lists, ids in (("pools", list(catalog.POOLS)), ("allowedCudaVersions", list(catalog.CUDA_VERSIONS))):
        if gpu and gpu.get(lists):
            gpu[lists] = ids[: len(gpu[lists])]
    if gpu:
        gpu.pop("excludedTypes", None)
        if gpu.get("allowedCudaVersions"):
            gpu.pop("minCudaVersion", None)
    if gpu and "id" in gpu:
        gpu.update(id=known["catalog/gpus"], count=1, minCudaVersion="12.6")
        gpu.pop("allowedCudaVersions", None)
        body["cloud"] = "SECURE"
    if "cpu" in body and not gpu:
        body["cpu"] = (
            [{"id": "cpu3c", "vcpuCount": 2}] if isinstance(body["cpu"], list) else {"id": "cpu3c", "vcpuCount": 2}
        )
    for name, value in (("dataCenterIds", ["US-KS-2"]), ("networkVolumes", []), ("registry", None), ("mounts", {})):
        if name in body:
            body[name] = value
    if "dataCenter" in body:
        body.update(dataCenter="US-KS-2")
    if "keys" in body:
        body["keys"] = ["ssh-ed25519 AAAA you"]


anything = described(GenerationMode.POSITIVE)
nonsense = described(GenerationMode.NEGATIVE).exclude(name=only_ids())
succeeded: set[str] = set()


@anything.parametrize()
def test_any_request_is_answered_as_described(case: Case[Any], runpod: Runpod) -> None:
    conforms(runpod, case, "positive_data_acceptance")


@anything.parametrize()
def test_a_request_about_what_exists_is_answered_as_described(case: Case[Any], runpod: Runpod) -> None:
    grounded(case, there(runpod), runpod)
    if conforms(runpod, case, "positive_data_acceptance") < 300:
        succeeded.add(f"{case.method} {case.path}")


def test_every_operation_has_succeeded() -> None:
    operations = {
        f"{method.upper()} {path}"
        for path, methods in DESCRIPTION["paths"].items()
        for method in methods
        if method in ("get", "post", "put", "patch", "delete") and not any(re.search(one, path) for one in NOT_EMULATED)
    }
    assert len(operations) > 40
    assert succeeded == operations


@nonsense.parametrize()
def test_a_request_that_is_not_as_described_is_refused(case: Case[Any], runpod: Runpod) -> None:
    conforms(runpod, case, "positive_data_acceptance")
