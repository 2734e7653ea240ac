"""How the real endpoint differs from the desired one, and what would be sent. Pure: no I/O.

fetch → normalise → diff → print → apply: the plan that is printed is the object that is applied.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.secrets import redact
from common.text import clean

# Lists that mean sets. The order of gpu.pools is a preference.
_SETS = ("ports", "dataCenterIds", "networkVolumes")
_GPU_SETS = ("excludedTypes", "allowedCudaVersions")
# What a console or the platform adds to an endpoint's variables by itself: never ours to take away.
_INJECTED = ("PORT", "PORT_HEALTH", "PUBLIC_KEY", "JUPYTER_PASSWORD")
# The one number of each scaler.
_SCALERS = {"QUEUE_DELAY": "queueDelay", "REQUEST_COUNT": "requestCount"}
# These act at once; a change of anything else is a new release, which reaches workers as they are replaced.
AT_ONCE = ("name", "workers", "scaling", "timeout")
IDLE_NOTE = (
    "RunPod lowers the max workers of an endpoint without jobs to 2 after 3 days and to 0 after 7, and when workers keep"
    " crashing; make deploy lowers them to 0 after a first release that failed. Nobody raises them again. With 0, every job"
    " waits for ever"
)
SUFFIX = " -fb"
HIDDEN = "(a value that is not shown)"
_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """One field: `old` as it is, `new` as it should be, both as text that may be shown. `note` explains."""

    field: str
    old: str
    new: str
    note: str = ""

    @property
    def top(self) -> str:
        return self.field.split(".")[0]


@dataclass(frozen=True)
class Plan:
    """What there is to do: `action` is none, create or update; `body` is what POST or PATCH sends.

    `seen` is a hash of the endpoint that the plan was made from: applying to another one is refused.
    """

    action: str
    name: str
    endpoint_id: str | None
    changes: list[Change] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)
    seen: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def new_release(self) -> bool:
        """Does applying it make a new release, which has to reach the workers?"""
        return self.action == "create" or any(change.top not in AT_ONCE for change in self.changes)


def normalise(endpoint: Mapping[str, Any]) -> dict[str, Any]:
    """An endpoint, or the body of one, in the one form in which two can be compared.

    Absent, null and empty are the same; lists that mean sets are sorted; what the platform adds by itself, and every
    field that is not ours, is left out. Takes answers and desired bodies alike, and its own result (idempotent).
    """
    gpu = endpoint.get("gpu") or {}
    workers = endpoint.get("workers") or {}
    scaling = endpoint.get("scaling") or {}
    request_count = scaling.get("type") == "REQUEST_COUNT"
    scaler = ("type", _SCALERS[scaling["type"]]) if scaling.get("type") in _SCALERS else sorted(scaling)
    env = endpoint.get("env") or {}
    found = {
        "name": name_of(endpoint),
        "type": endpoint.get("type") or "QUEUE",
        "image": endpoint.get("image") or "",
        "args": endpoint.get("args") or "",
        "disk": endpoint.get("disk"),
        "registry": endpoint.get("registry") or None,
        "env": {key: env[key] for key in sorted(env) if not _injected(key)},
        "gpu": {
            "pools": list(gpu.get("pools") or []),
            "count": gpu.get("count") or 1,
            "minCudaVersion": gpu.get("minCudaVersion") or None,
            **{key: sorted(str(item).strip() for item in gpu.get(key) or []) for key in _GPU_SETS},
        },
        "workers": {
            "min": workers.get("min") or 0,
            "max": workers.get("max") or 0,
            # Has no meaning, and is not answered, with this scaler.
            "idleTimeout": None if request_count else workers.get("idleTimeout"),
        },
        "scaling": {key: _number(scaling.get(key)) for key in scaler},
        "timeout": endpoint.get("timeout") or 0,
        "flashboot": endpoint.get("flashboot") or "OFF",
    }
    for key in _SETS:
        found[key] = sorted(endpoint.get(key) or [])
    return found


def name_of(endpoint: Mapping[str, Any]) -> str:
    """An endpoint's name without the suffix that RunPod has appended to those with FlashBoot."""
    return str(endpoint.get("name") or "").removesuffix(SUFFIX)


def _injected(variable: str) -> bool:
    return variable.startswith("RUNPOD_") or variable in _INJECTED


def misshapen(endpoint: Any) -> str:
    """The first field of an answer that is no endpoint's, by its type; empty for an endpoint. Unknown fields are fine."""
    if not isinstance(endpoint, dict):
        return "the answer itself"
    if not re.fullmatch(r"[\w-]{1,100}", str(endpoint.get("id"))) or not isinstance(endpoint.get("id"), str):
        return "id"
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("name", "type", "image", "args", "flashboot", "registry"), str),
        **dict.fromkeys(("gpu", "workers", "scaling", "env"), dict),
        **dict.fromkeys(("ports", "dataCenterIds", "networkVolumes", "cpu"), list),
        **dict.fromkeys(("disk", "timeout"), (int, float)),
    }
    for key, kind in kinds.items():
        if endpoint.get(key) is not None and not isinstance(endpoint[key], kind):
            return key
    for key in ("ports", "dataCenterIds", "networkVolumes"):
        if not all(isinstance(item, str) for item in endpoint.get(key) or []):
            return key
    gpu = endpoint.get("gpu") or {}
    for key in ("pools", *_GPU_SETS):
        if not isinstance(gpu.get(key) or [], list) or not all(isinstance(item, str) for item in gpu.get(key) or []):
            return f"gpu.{key}"
    if not all(isinstance(value, str) for value in (endpoint.get("env") or {}).values()):
        return "env"
    workers = endpoint.get("workers") or {}
    if not all(isinstance(workers.get(key) or 0, int) for key in ("min", "max", "idleTimeout")):
        return "workers"
    return ""


def _number(value: Any) -> Any:
    """4.0 and 4 are one value on the wire."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fingerprint(normalised: Mapping[str, Any]) -> str:
    """A hash of a normalised endpoint."""
    return hashlib.sha256(json.dumps(normalised, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def make(body: Mapping[str, Any], actual: Mapping[str, Any] | None, known: Collection[str] = ()) -> Plan:
    """The plan from an endpoint as the API answers it (None: there is none) to the desired body.

    A body without an image leaves the image, and what the deploy derives from it, as they are. `known` are values that
    may be shown as old ones: what this project itself has sent before.
    """
    name = str(body["name"])
    if actual is None:
        return Plan("create", name, None, _created(body), dict(body))
    wanted, real = normalise(body), normalise(actual)
    if not body.get("image"):
        wanted["image"] = real["image"]
        kept = {key: real["env"][key] for key in ("IMAGE", "RELEASE") if key in real["env"]}
        wanted["env"] = {**wanted["env"], **kept}
    changes = _changes(wanted, real, known)
    tops = dict.fromkeys(top for top in wanted if wanted[top] != real[top])
    return Plan(
        "update" if changes else "none",
        name,
        str(actual.get("id")),
        changes,
        {top: _sent(top, wanted, actual) for top in tops},
        fingerprint(real),
    )


def impossible(body: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """Why this endpoint can never become the desired one; empty if it can."""
    if actual.get("cpu"):
        return "it runs on CPUs, and RunPod cannot change that"
    if (actual.get("type") or "QUEUE") != body["type"]:
        return f"its type is {clean(str(actual.get('type')))}, and RunPod cannot change that"
    return ""


def _sent(top: str, wanted: Mapping[str, Any], actual: Mapping[str, Any]) -> Any:
    """The whole value of a top-level field for a PATCH: what the API would otherwise keep is cleared explicitly."""
    value = wanted[top]
    if top == "gpu":
        return {**value, "minCudaVersion": value["minCudaVersion"] or ""}
    if top == "workers":
        return {key: item for key, item in value.items() if item is not None}
    if top == "env":
        # It is replaced whole: what the platform has added stays.
        return {**{key: item for key, item in (actual.get("env") or {}).items() if _injected(key)}, **value}
    return value


def _changes(wanted: Mapping[str, Any], real: Mapping[str, Any], known: Collection[str]) -> list[Change]:
    found: list[Change] = []
    for top, new in wanted.items():
        old = real[top]
        if new == old:
            continue
        if top in ("gpu", "workers", "env"):
            for key in sorted({*new, *old}):
                before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
                if before != after:
                    found.append(_change(top, key, before, after, known))
        else:
            hidden = top == "args" and old and old not in known
            found.append(Change(top, HIDDEN if hidden else _shown(old), _shown(new)))
    return found


def _change(top: str, key: str, before: Any, after: Any, known: Collection[str]) -> Change:
    name = f"{top}.{' '.join(clean(key).split())}"
    if top == "env":
        # What somebody typed into the console may be a secret under any name.
        old = HIDDEN if before is not _ABSENT and before not in known else _shown(before)
        return Change(name, old, _shown(after))
    lowered = name == "workers.max" and isinstance(before, int) and before < after and before in (0, 2)
    return Change(name, _shown(before), _shown(after), IDLE_NOTE if lowered else "")


def _created(body: Mapping[str, Any]) -> list[Change]:
    found = []
    for top, value in normalise(body).items():
        if top in ("gpu", "workers", "env"):
            found += [Change(f"{top}.{key}", "(absent)", _shown(item)) for key, item in value.items()]
        else:
            found.append(Change(top, "(absent)", _shown(value)))
    return found


def _shown(value: Any) -> str:
    """A value as text. One that looks like a secret is hidden, whoever wrote it where."""
    if value is _ABSENT:
        return "(absent)"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return redact(clean(text))


# --- printing --------------------------------------------------------------------------------------------------------

_SUMMARY = {
    "none": "no change: endpoint {name} ({id}) is as config/endpoint.yaml says",
    "create": "create: there is no endpoint {name} yet",
    "update": "change: {count} of endpoint {name} ({id})",
}


def summary(plan: Plan) -> str:
    """The plan in one line."""
    count = f"{len(plan.changes)} field{'s' if len(plan.changes) != 1 else ''}"
    return _SUMMARY[plan.action].format(name=plan.name, id=plan.endpoint_id, count=count)


def text(plan: Plan) -> str:
    """The plan for a terminal: one line for each field, old → new."""
    lines = [summary(plan)]
    width = max((len(change.field) for change in plan.changes), default=0)
    for change in plan.changes:
        old, new = (" ".join(side.split("\n")) for side in (change.old, change.new))
        sign, both = ("+", new) if plan.action == "create" else ("~", f"{old} → {new}")
        lines.append(f"  {sign} {change.field.ljust(width)}  {both}")
        if change.note:
            lines.append(f"    {' ' * width}  {change.note}")
    if plan.action == "update":
        lines.append(
            "  a new release: running workers finish their jobs on the old one"
            if plan.new_release
            else "  takes effect at once, without a new release"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def markdown(plan: Plan) -> str:
    """The plan for a pull request."""
    lines = [f"### Plan: {_cell(summary(plan))}", ""]
    if plan.changes:
        lines += ["| field | is | should be |", "|---|---|---|"]
        for change in plan.changes:
            note = f"<br>{_cell(change.note)}" if change.note else ""
            lines.append(f"| {_code(change.field)} | {_code(change.old)} | {_code(change.new)}{note} |")
        lines.append("")
    return "\n".join([*lines, *(f"- {_cell(note)}" for note in plan.notes)]).rstrip() + "\n"


def _cell(words: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", " "), ("@", "&#64;")):
        words = words.replace(character, entity)
    return words


def _code(words: str) -> str:
    return f"<code>{_cell(words)}</code>" if words else ""


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for machines. Holds what is shown, not `body`: a body never has a secret, but need not be shown either."""
    return {
        "action": plan.action,
        "endpoint": {"id": plan.endpoint_id, "name": plan.name},
        "new_release": plan.new_release if plan.action != "none" else False,
        "changes": [vars(change) for change in plan.changes],
        "notes": plan.notes,
    }
