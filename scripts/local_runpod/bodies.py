"""What request bodies of the management API may hold: closed shapes, each violation a sentence with the field's name.

Written after RunPod's description of its REST API v2 (docs.runpod.io, api-reference-v2; of 2026-08-18). A shape is a
function from a value and its name to the list of what is wrong with it; `object_of` names the fields an object may have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Shape = Callable[[Any, str], list[str]]
CUDA = r"^[0-9]+\.[0-9]+$"


def text(least: int = 0, pattern: str = "", *, nullable: bool = False) -> Shape:
    """A string of at least so many characters that the pattern fits."""

    def check(value: Any, name: str) -> list[str]:
        if value is None and nullable:
            return []
        if not isinstance(value, str):
            return [f"{name}: must be a string{' or null' if nullable else ''}"]
        if len(value) < least:
            return [f"{name}: must not be empty"]
        # In Python alone a $ also fits before a last line break.
        return (
            [] if re.search(pattern.replace("$", r"\Z"), value) else [f"{name}: does not match the pattern {pattern}"]
        )

    return check


def whole(low: int | None = None, high: int | None = None) -> Shape:
    """A whole number between low and high."""

    def check(value: Any, name: str) -> list[str]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not float_is_whole(value):
            return [f"{name}: must be a whole number"]
        return _bounds(value, name, low, high)

    return check


def float_is_whole(value: float) -> bool:
    """JSON does not tell 1.0 from 1."""
    return isinstance(value, int) or value.is_integer()


def number(low: float) -> Shape:
    """A number of at least low."""

    def check(value: Any, name: str) -> list[str]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return [f"{name}: must be a number"]
        return _bounds(value, name, low, None)

    return check


def _bounds(value: float, name: str, low: float | None, high: float | None) -> list[str]:
    if low is not None and value < low:
        return [f"{name}: must be at least {low:g}"]
    return [f"{name}: must be at most {high:g}"] if high is not None and value > high else []


def flag(value: Any, name: str) -> list[str]:
    """True or false."""
    return [] if isinstance(value, bool) else [f"{name}: must be true or false"]


def choice(*values: str) -> Shape:
    """One of these words."""

    def check(value: Any, name: str) -> list[str]:
        return [] if isinstance(value, str) and value in values else [f"{name}: must be one of {', '.join(values)}"]

    return check


def list_of(item: Shape, *, least: int = 0, most: int | None = None, unique: bool = False) -> Shape:
    """A list of such items."""

    def check(value: Any, name: str) -> list[str]:
        if not isinstance(value, list):
            return [f"{name}: must be a list"]
        if len(value) < least or (most is not None and len(value) > most):
            return [f"{name}: must have {f'at least {least}' if len(value) < least else f'at most {most}'} items"]
        if unique and any(value.index(one) != place for place, one in enumerate(value)):
            return [f"{name}: has an item twice"]
        return [wrong for place, one in enumerate(value) for wrong in item(one, f"{name}[{place}]")]

    return check


def texts(value: Any, name: str) -> list[str]:
    """An object whose values are strings: environment variables."""
    if not isinstance(value, dict):
        return [f"{name}: must be an object"]
    return [f"{name}.{key}: must be a string" for key, one in value.items() if not isinstance(one, str)]


def object_of(fields: dict[str, Shape], required: tuple[str, ...] = (), least: int = 0) -> Shape:
    """An object with these fields and no other."""

    def check(value: Any, name: str) -> list[str]:
        if not isinstance(value, dict):
            return [f"{name or 'the body'}: must be an object"]
        at = f"{name}." if name else ""
        wrong = [f"{at}{key}: is not a known field" for key in value if key not in fields]
        wrong += [f"{at}{key}: is required" for key in required if key not in value]
        if len(value) < least:
            wrong.append(f"{name or 'the body'}: must have at least {least} field")
        return wrong + [one for key, shape in fields.items() if key in value for one in shape(value[key], f"{at}{key}")]

    return check


def scaling(value: Any, name: str) -> list[str]:
    """QUEUE_DELAY with queueDelay, or REQUEST_COUNT with requestCount."""
    kinds: dict[str, tuple[str, Shape]] = {
        "QUEUE_DELAY": ("queueDelay", number(0.5)),
        "REQUEST_COUNT": ("requestCount", whole(1)),
    }
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        return [f"{name}.type: must be one of {', '.join(kinds)}"]
    field, shape = kinds[kind]
    return object_of({"type": choice(kind), field: shape}, ("type", field))(value, name)


CONTAINER: dict[str, Shape] = {
    "args": text(),
    "disk": whole(1),
    "env": texts,
    "image": text(),
    "ports": list_of(text()),
    "registry": text(nullable=True),
}
CUDA_VERSIONS = list_of(text(pattern=CUDA))
POOLS: dict[str, Shape] = {
    "pools": list_of(text(), least=1),
    "excludedTypes": list_of(text(pattern=r"^\s*[^-\s]"), unique=True),
    "count": whole(1),
    "allowedCudaVersions": CUDA_VERSIONS,
}
CPU = object_of({"id": text(1), "vcpuCount": whole(2)}, ("id", "vcpuCount"))
WORKERS = object_of({"min": whole(0), "max": whole(0), "idleTimeout": whole(1, 3600)})
FLASHBOOT = choice("OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT")
ENDPOINT_FIELDS: dict[str, Shape] = {
    **CONTAINER,
    "name": text(1),
    "cpu": list_of(CPU, least=1, unique=True),
    "workers": WORKERS,
    "scaling": scaling,
    "dataCenterIds": list_of(text()),
    "networkVolumes": list_of(text()),
    "timeout": whole(),
    "flashboot": FLASHBOOT,
}
CREATE_ENDPOINT = object_of(
    {
        **ENDPOINT_FIELDS,
        "type": choice("QUEUE", "LOAD_BALANCER"),
        "gpu": object_of({**POOLS, "minCudaVersion": text(pattern=CUDA)}, ("pools",)),
        "templateId": text(1),
    },
    ("name", "type", "scaling"),
)
UPDATE_ENDPOINT = object_of(
    {
        **ENDPOINT_FIELDS,
        "gpu": object_of({**POOLS, "minCudaVersion": text(pattern=r"^$|^[0-9]+\.[0-9]+$")}),
        "templateId": text(),
    }
)
PERSISTENT_MOUNT = object_of({"size": whole(10), "path": text()}, ("size", "path"))
NETWORK_MOUNT = object_of({"volumeId": text(), "path": text()}, ("volumeId", "path"))
MOUNTS = object_of({"persistent": PERSISTENT_MOUNT, "network": list_of(NETWORK_MOUNT, most=1)})
CREATE_POD = object_of(
    {
        **CONTAINER,
        "name": text(1),
        "cloud": choice("SECURE", "COMMUNITY"),
        "cpu": CPU,
        "gpu": object_of(
            {
                "id": text(),
                "count": whole(1),
                "allowedCudaVersions": CUDA_VERSIONS,
                "minCudaVersion": text(pattern=CUDA),
            },
            ("id",),
        ),
        "dataCenterIds": list_of(text()),
        "globalNetworking": flag,
        "mounts": MOUNTS,
        "startJupyter": flag,
        "startSsh": flag,
        "templateId": text(1),
    },
    ("name",),
)
UPDATE_POD = object_of(
    {
        **CONTAINER,
        "name": text(1),
        "locked": flag,
        "globalNetworking": flag,
        "mounts": MOUNTS,
        "templateId": text(),
    }
)
POD_ACTION = object_of({"action": choice("start", "stop", "restart", "terminate")}, ("action",))
TEMPLATE_FIELDS: dict[str, Shape] = {
    **CONTAINER,
    "name": text(1),
    "allowedCudaVersions": CUDA_VERSIONS,
    "category": choice("CPU", "NVIDIA", "AMD"),
    "mounts": object_of({"persistent": PERSISTENT_MOUNT}),
    "public": flag,
    "serverless": flag,
    "startJupyter": flag,
    "startSsh": flag,
}
CREATE_TEMPLATE = object_of(TEMPLATE_FIELDS, ("name", "image"))
UPDATE_TEMPLATE = object_of(TEMPLATE_FIELDS)
CREATE_VOLUME = object_of(
    {
        "dataCenter": text(1),
        "name": text(1),
        "size": whole(10, 4096),
        "type": choice("STANDARD", "HIGH_PERFORMANCE"),
    },
    ("name", "size", "dataCenter"),
)
UPDATE_VOLUME = object_of({"name": text(1), "size": whole(10, 4096)}, least=1)
CREATE_REGISTRY = object_of(
    {"name": text(1), "username": text(1), "password": text(1)}, ("name", "username", "password")
)
SSH_KEYS = object_of({"keys": list_of(text(pattern=r"^(ssh|ecdsa|sk)-[^\s]+ [^\s]+([ \t][^\n\r]*)?$"))}, ("keys",))
