"""A worker that needs the standard library only: it takes one job after the other and answers in the worker's shape.

What a job's prompt says it does: `fail …` ends FAILED with that text, `sleep SECONDS` takes so long, `exit CODE` ends the
process, `env NAME` answers with that variable, `refresh` asks to be replaced afterwards; everything else quotes the first
sentence of each source. STUB_EXIT in its environment lets it end with that code before it asks for a job.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from typing import Any

WORKER = os.environ["RUNPOD_POD_ID"]


def call(url: str, data: bytes | None = None) -> bytes:
    """A request with the worker's key."""
    request = urllib.request.Request(url, data, {"Authorization": os.environ["RUNPOD_AI_API_KEY"]})  # noqa: S310
    with urllib.request.urlopen(request, timeout=90) as response:  # noqa: S310 # the platform's own address
        return bytes(response.read())


def answer(job_input: dict[str, Any]) -> dict[str, Any]:
    """What is sent back for a job."""
    model = {
        "id": "extractive",
        "revision": None,
        "engine": "extractive",
        "quantization": "none",
        "image": os.environ.get("IMAGE") or None,
        "release": os.environ.get("RELEASE") or None,
    }
    if job_input.get("op") == "ping":
        return {"output": [{"op": "ping", "model": model}]}
    word, _, rest = str(job_input.get("prompt", "")).partition(" ")
    if word == "fail":
        return {"error": rest}
    if word == "sleep":
        time.sleep(float(rest))
    if word == "exit":
        os._exit(int(rest))
    sources = job_input.get("sources") or []
    quotes = "\n".join(f"- {source['text'].split('. ')[0].rstrip('.')} [{source['id']}]." for source in sources)
    output: dict[str, Any] = {
        "synthesis": os.environ.get(rest, "") if word == "env" else quotes,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "reasoning_tokens": 0},
        "model": model,
        "timings": {"queue_ms": 0, "prefill_ms": 0, "decode_ms": 1},
        "dropped_sources": [],
    }
    return {"output": [output], **({"stopPod": True} if word == "refresh" else {})}


def main() -> None:
    """Take jobs until the process is ended."""
    print(f"stub worker {WORKER} begins", flush=True)
    if code := os.environ.get("STUB_EXIT"):
        print("cannot load the model", file=sys.stderr, flush=True)
        sys.exit(int(code))
    while True:
        job = json.loads(call(os.environ["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", WORKER)) or "null")
        if job is None:
            continue
        print(f"job {job['id']}", flush=True)
        url = os.environ["RUNPOD_WEBHOOK_POST_OUTPUT"].replace("$RUNPOD_POD_ID", WORKER).replace("$ID", job["id"])
        call(url, json.dumps(answer(job["input"])).encode())


if __name__ == "__main__":
    main()
