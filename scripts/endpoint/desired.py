"""What the endpoint should be: config/endpoint.yaml, checked, as the body that RunPod's API v2 takes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml_file
from common.problems import Problem
from common.secrets import LOOKS_SECRET, NAMES_SECRET
from endpoint.plan import SUFFIX

DIGEST = re.compile(r"[a-z0-9][a-z0-9._/:-]*@sha256:[0-9a-f]{64}")
NO_COMMIT = "0" * 40
SECRET = re.compile(r"\{\{ ?RUNPOD_SECRET_\w{1,100} ?\}\}")
_PLAIN = re.compile(r"-?\d+(?:\.\d+)?|true|false", re.I)  # MAX_TOKEN_COUNT=512
# What the deploy sets itself. RELEASE is a hash of what a worker is made from; it comes back in every answer.
OWN_VARIABLES = ("MODEL_ID", "MODEL_REVISION", "IMAGE", "RELEASE")


@dataclass(frozen=True)
class Model:
    """What is served: the base model's block in config/models.yaml, the repository, and its commit."""

    base: str
    id: str
    revision: str


@dataclass(frozen=True)
class Desired:
    """The desired state. `body` is what POST /v2/serverless takes, every field explicit. Times in seconds.

    `image_from` says where the image's digest was found; without one `body` has no `image`, and nothing can be deployed.
    """

    name: str
    model: Model
    image: str | None
    image_from: str
    body: dict[str, Any]
    deadline: float
    propagation: float
    file: yaml_file.YamlFile


def is_secret(name: str, value: str) -> bool:
    """Is this variable's value something that must never be shown?"""
    if SECRET.fullmatch(value) or _PLAIN.fullmatch(value):
        return False
    return bool(NAMES_SECRET.search(name) or LOOKS_SECRET.search(value))


def load(config: Path, deploy: Path, environ: Mapping[str, str] = os.environ) -> Desired:
    """Read and check config/endpoint.yaml; the image may come from IMAGE or from deploy/image.json.

    Raises Problem with the file's line, the field and what is allowed.
    """
    file = yaml_file.read(config / "endpoint.yaml")
    _validate(file, config / "endpoint.schema.json")
    data = file.data
    _check_values(file)
    _check_env(file)
    model = Model(**data["model"])
    gpu = data["gpu"]
    if gpu["minCudaVersion"] and gpu["allowedCudaVersions"]:
        raise Problem(
            f"{file.at(('gpu', 'allowedCudaVersions'))}: allowedCudaVersions and minCudaVersion exclude each other; keep one"
        )
    if data["workers"]["min"] > data["workers"]["max"]:
        raise Problem(f"{file.at(('workers', 'min'))}: workers.min must not be above workers.max")
    image, image_from = _image(file, deploy, environ)
    return Desired(
        name=data["name"],
        model=model,
        image=image,
        image_from=image_from,
        body=_body(data, model, image, gpu["pools"] or _pools(file, config, model)),
        deadline=float(data["rollout"]["deadline"]),
        propagation=float(data["rollout"]["propagation"]),
        file=file,
    )


def _body(data: dict[str, Any], model: Model, image: str | None, pools: list[str]) -> dict[str, Any]:
    gpu = {
        "pools": list(pools),
        "excludedTypes": data["gpu"]["excludedTypes"],
        "count": data["gpu"]["count"],
        "allowedCudaVersions": data["gpu"]["allowedCudaVersions"],
    }
    if data["gpu"]["minCudaVersion"]:
        gpu["minCudaVersion"] = data["gpu"]["minCudaVersion"]
    workers = dict(data["workers"])
    if data["scaling"]["type"] == "REQUEST_COUNT":
        del workers["idleTimeout"]  # RunPod refuses it with this scaler
    env = {**data["env"], "MODEL_ID": model.id, "MODEL_REVISION": model.revision}
    if image:
        env["IMAGE"] = image
        made_from = [image, data["args"], sorted(env.items())]
        env["RELEASE"] = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    body = {
        **{key: data[key] for key in ("name", "type", "args", "disk", "ports", "registry")},
        "env": env,
        "gpu": gpu,
        "workers": workers,
        **{key: data[key] for key in ("scaling", "timeout", "flashboot", "dataCenterIds", "networkVolumes")},
    }
    return {**body, "image": image} if image else body


def _validate(file: yaml_file.YamlFile, schema_path: Path) -> None:
    import jsonschema

    try:
        schema = json.loads(schema_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Problem(f"{schema_path} cannot be read; restore it: git checkout {schema_path}") from None
    validator = jsonschema.Draft202012Validator(schema)
    errors = sorted(
        validator.iter_errors(file.data), key=lambda error: (list(map(str, error.absolute_path)), error.message)
    )
    if errors:
        raise Problem("\n".join(dict.fromkeys(_told(file, error) for error in errors[:5])))


def _told(file: yaml_file.YamlFile, error: Any) -> str:
    """One schema error as a sentence with line and field. Values of variables are not shown: they may be secrets."""
    where = tuple(error.absolute_path)
    names = list(map(str, where))
    meaning = error.schema.get("description") if isinstance(error.schema, dict) else None
    if error.validator == "required":
        return f"{file.at(where)}: {'.'.join([*names, error.message.split(chr(39))[1]])} is missing; restore it: git diff {file.path}"
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        unknown = sorted(set(map(str, error.instance)) - set(known))
        return f"{file.at((*where, unknown[0]))}: unknown key {'.'.join([*names, unknown[0]])}; known are {', '.join(known)}"
    field = ".".join(names) or "the file"
    if not isinstance(file.data, dict):
        return f"{file.path}:1: must hold the endpoint's keys; restore it: git checkout {file.path}"
    if "propertyNames" in error.absolute_schema_path:
        at = file.at((*where, str(error.instance)))
        return f"{at}: {error.instance!r:.100} is no variable's name: letters, digits and _, not a digit first"
    if where[:1] == ("env",):
        return f"{file.at(where)}: {field} must be {meaning or 'text: put the value in quotes'}"
    found = json.dumps(error.instance, default=str)
    return f"{file.at(where)}: {field} is {found[:100]}; must be {meaning or error.message[:200]}"


def _check_values(file: yaml_file.YamlFile) -> None:
    """What no schema can say: numbers must be finite, and no text may be, or hold, a secret."""

    def walk(value: Any, where: yaml_file.Where) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*where, key))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                walk(item, (*where, index))
        elif isinstance(value, float) and not math.isfinite(value):
            raise Problem(f"{file.at(where)}: {'.'.join(map(str, where))} must be a number, not {value}")
        elif isinstance(value, str) and where[0] != "env" and LOOKS_SECRET.search(value):
            raise Problem(
                f"{file.at(where)}: {'.'.join(map(str, where))} holds a secret, which must not stand in this file"
            )

    walk(file.data, ())
    if file.data["name"].endswith(SUFFIX):
        raise Problem(f"{file.at(('name',))}: name must not end in ' -fb', which RunPod itself appends")


def _check_env(file: yaml_file.YamlFile) -> None:
    for name, value in file.data["env"].items():
        at = file.at(("env", name))
        if name in OWN_VARIABLES:
            raise Problem(f"{at}: env.{name} is set by make deploy, from `model` and `image`; take it out")
        if name.startswith("RUNPOD_"):
            raise Problem(f"{at}: env.{name}: names with RUNPOD_ are RunPod's own; take it out")
        if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise Problem(f"{at}: env.{name} holds a NUL character or half of a surrogate pair, which no variable can")
        if is_secret(name, value) and value:
            raise Problem(
                f"{at}: env.{name} holds a secret, which must not stand in this file. Create a secret in the RunPod console"
                f' and refer to it: {name}: "{{{{ RUNPOD_SECRET_{name.lower()} }}}}". Revoke the one that stood here'
            )


def _pools(file: yaml_file.YamlFile, config: Path, model: Model) -> list[str]:
    import models

    known = models.load(config / "models.yaml").get(model.base.lower())
    if known is None:
        raise Problem(
            f"{file.at(('model', 'base'))}: {model.base} is not in {config / 'models.yaml'}; add it there, or name gpu.pools"
        )
    return list(known.serving.pools)


def _image(file: yaml_file.YamlFile, deploy: Path, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The image with its digest, and where it was found: IMAGE, the file, deploy/image.json."""
    pushed = deploy / "image.json"
    if image := environ.get("IMAGE"):
        source = "IMAGE"
    elif image := file.data["image"]:
        source = file.at(("image",))
    else:
        try:
            image, source = json.loads(pushed.read_text(encoding="utf-8")).get("image"), str(pushed)
        except FileNotFoundError:
            return None, "no image yet; push one: make push REGISTRY=docker.io/your-name/"
        except (OSError, ValueError, AttributeError):
            raise Problem(f"{pushed} cannot be read; write it anew: make push REGISTRY=docker.io/your-name/") from None
    if not isinstance(image, str) or not DIGEST.fullmatch(image):
        raise Problem(
            f"{source}: {image!r:.200} names no digest. Tags move, and RunPod may serve an old image under one: use"
            " NAME@sha256:…, which make push writes to deploy/image.json"
        )
    return image, source
