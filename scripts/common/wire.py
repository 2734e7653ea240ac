"""The worker job on the wire: what may be sent, what is answered.

Input (all but `prompt` optional, unknown keys refused by name):
    {"op": "synthesize"|"ping"|"metrics", "prompt": str, "context": str,
     "sources": [{"id": "S1", "text": str, "label": str}], "fit": false, "datamark": false, "temperature": 0..2, "top_p": 0..1,
     "repetition_penalty": 0.5..2, "max_new_tokens": 1..32768, "seed": int|null, "stream": false}
Output: a list, as RunPod makes of every worker that can stream. Its last entry is the answer:
    {"synthesis", "finish_reason": "stop"|"length", "usage", "model", "prompts", "timings", "dropped_sources"}
With `stream` the entries before it are {"text": "…"}, which together are the synthesis; without, there are none.
Errors: {"error": "CODE: sentence a person can act on"}, always a string.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

MAX_RESULT_BYTES = 9_000_000  # RunPod refuses larger results, and the job would end without output.
MAX_CHUNK_BYTES = 900_000  # RunPod refuses a chunk of a megabyte.
MAX_PROMPT_CHARS = 100_000
MAX_SOURCES = 500
OPS = ("synthesize", "ping", "metrics")


class InvalidJob(ValueError):
    """The job's input is not what the wire allows; the message names the key and what is allowed."""


@dataclass(frozen=True)
class Job:
    """A validated job. `sources` entries have the keys id, text, label."""

    prompt: str = ""
    context: str = ""
    sources: list[dict[str, str]] = field(default_factory=list)
    temperature: float = 0.3
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 4096
    seed: int | None = None
    stream: bool = False
    fit: bool = False
    datamark: bool = False
    op: str = "synthesize"


# key: (lowest, highest); top_p 0 would leave no token to choose.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0.01, 1),
    "repetition_penalty": (0.5, 2),
    "max_new_tokens": (1, 32768),
}


def parse_job(data: object) -> Job:
    """The job of an input object. Raises InvalidJob for everything that the wire does not allow."""
    if not isinstance(data, dict):
        raise InvalidJob(f"input must be an object, not {_kind(data)}")
    known = Job.__dataclass_fields__
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise InvalidJob(f"unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    op = data.get("op", "synthesize")
    if op not in OPS:
        raise InvalidJob(f"op must be {', '.join(OPS[:-1])} or {OPS[-1]}")
    if op != "synthesize":
        return Job(op=op)
    for key in ("prompt", "context"):
        if not isinstance(data.get(key, ""), str):
            raise InvalidJob(f"{key} must be text, not {_kind(data[key])}")
    if not data.get("prompt", "").strip():
        raise InvalidJob("prompt is missing or empty")
    if len(data["prompt"]) > MAX_PROMPT_CHARS:
        raise InvalidJob(f"prompt has {len(data['prompt'])} characters, {MAX_PROMPT_CHARS} are allowed")
    for key, (low, high) in _RANGES.items():
        check_number(key, data.get(key, low), low, high, whole=key == "max_new_tokens")
    seed = data.get("seed")
    if seed is not None:
        check_number("seed", seed, 0, 2**63 - 1, whole=True)
    for key in ("stream", "fit", "datamark"):
        if not isinstance(data.get(key, False), bool):
            raise InvalidJob(f"{key} must be true or false, not {_kind(data[key])}")
    if data.get("context") and data.get("sources"):
        raise InvalidJob("send context or sources, not both")
    return Job(**{**data, "sources": _parse_sources(data.get("sources", []))})


def check_number(key: str, value: object, low: float, high: float, *, whole: bool) -> None:
    """Raise InvalidJob unless `value` is a number (a whole one if `whole`) between `low` and `high`."""
    kinds = (int,) if whole else (int, float)
    if (
        isinstance(value, bool)
        or not isinstance(value, kinds)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise InvalidJob(f"{key} must be a {'whole ' if whole else ''}number, not {_kind(value)}")
    if not low <= value <= high:
        raise InvalidJob(f"{key} must be between {low} and {high}, not {value!s:.40}")


def _parse_sources(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise InvalidJob(f"sources must be a list, not {_kind(value)}")
    if len(value) > MAX_SOURCES:
        raise InvalidJob(f"sources has {len(value)} entries, {MAX_SOURCES} are allowed")
    seen: set[str] = set()
    parsed = []
    for position, source in enumerate(value):
        where = f"sources[{position}]"
        if not isinstance(source, dict):
            raise InvalidJob(f"{where} must be an object, not {_kind(source)}")
        unknown = sorted(str(key) for key in source if key not in ("id", "text", "label"))
        if unknown:
            raise InvalidJob(f"{where}: unknown key {', '.join(unknown)}; known are id, text, label")
        entry = {key: source.get(key, "") for key in ("id", "text", "label")}
        for key, text in entry.items():
            if not isinstance(text, str):
                raise InvalidJob(f"{where}.{key} must be text, not {_kind(text)}")
        if not re.fullmatch(r"S[1-9][0-9]{0,5}", entry["id"]):
            raise InvalidJob(f"{where}.id must look like S1, not {entry['id']!r:.40}")
        if entry["id"] in seen:
            raise InvalidJob(f"{where}.id {entry['id']} is there twice")
        if not entry["text"].strip():
            raise InvalidJob(f"{where}.text is empty")
        seen.add(entry["id"])
        parsed.append(entry)
    return parsed


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", type(None): "null"}
    if isinstance(value, float):
        return "a number" if math.isfinite(value) else "not-a-number"
    return names.get(type(value), type(value).__name__)


def to_wire(value: object, sent: int = 0) -> dict[str, Any]:
    """Make any answer of the worker valid, bounded JSON: the one function that everything sent passes.

    NaN and infinities become null, lone surrogates become U+FFFD, unknown objects their text; an answer that is not an
    object, or with the `sent` bytes of its chunks larger than RunPod takes, becomes an error of its own.
    """
    safe = _sanitise(value)
    if not isinstance(safe, dict):
        return error("INTERNAL", f"the worker produced {_kind(safe)} instead of an object")
    if "error" in safe and not isinstance(safe["error"], str):
        safe["error"] = json.dumps(safe["error"], ensure_ascii=False)
    size = wire_size(safe) + sent
    if size > MAX_RESULT_BYTES:
        return error(
            "OUTPUT_TOO_LARGE", f"the answer has {size} bytes, {MAX_RESULT_BYTES} are allowed; lower max_new_tokens"
        )
    return safe


def wire_size(value: object) -> int:
    """The bytes of a wire value, with what parts it from the next one in a list."""
    return len(json.dumps(value, ensure_ascii=False).encode()) + 2


def chunks(text: str) -> list[dict[str, Any]]:
    """Text of a streamed answer as wire chunks `{"text"}`, each small enough for the platform."""
    step = MAX_CHUNK_BYTES // 12  # a character has twelve bytes at most in JSON that escapes it
    safe = _sanitise_text(text)
    return [{"text": safe[at : at + step]} for at in range(0, len(safe), step)]


def error(code: str, sentence: str) -> dict[str, Any]:
    """An error as the wire wants it: a string, no traceback, at most 2,000 characters."""
    return {"error": _sanitise_text(f"{code}: {sentence}")[:2000]}


def _sanitise(value: object) -> Any:
    if isinstance(value, dict):
        return {_sanitise_text(str(key)): _sanitise(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sanitise(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return _sanitise_text(value if isinstance(value, str) else str(value))


def _sanitise_text(text: str) -> str:
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)
