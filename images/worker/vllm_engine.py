"""The vLLM engine: `vllm serve` as a child process on a loopback port, fed with token ids.

Templates, safety and reading are ours (chat.py): vLLM gets the ids of the prompt and gives back the ids of the answer.
Batching, admission by free KV memory and the prefix cache are vLLM's. Nothing of a job is logged by the child. Of a job
vLLM changes one thing: it takes a temperature between 0.0001 and 0.01 as 0.01.

VLLM_ARGS   more arguments of `vllm serve`, for example "--gpu-memory-utilization 0.85 --max-model-len 16384"
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import http.client
import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import aiohttp

from chat import Chat, Encoded, Reader
from common.wire import Job
from engines import LOWEST_TEMPERATURE, Answer, JobError

CAPACITY = 64  # jobs at once; --max-num-seqs in VLLM_ARGS changes it
TOKENS_PER_CHUNK = 32  # of an answer that is not streamed: fewer messages between two processes
LINE_BYTES = 2**24  # the first line of an answer repeats the prompt's ids; aiohttp reads 512 kB unless told
STOP_SECONDS = 20.0  # that the child has to end by itself
METRICS = {
    "vllm:num_requests_running": "jobs_running",
    "vllm:num_requests_waiting": "jobs_waiting",
    "vllm:kv_cache_usage_perc": "kv_used",
    "vllm:num_preemptions_total": "preemptions_total",
    "vllm:prompt_tokens_total": "prompt_tokens_total",
    "vllm:prefix_cache_hits_total": "prompt_tokens_cached_total",
    "vllm:generation_tokens_total": "completion_tokens_total",
}


class VllmEngine:
    """Generates with a vLLM server that it starts, watches and ends."""

    def __init__(
        self,
        chat: Chat,
        folder: Path,
        model: dict[str, Any],
        *,
        command: Sequence[str] = ("vllm", "serve"),
        startup_timeout: float = 900.0,
    ) -> None:
        """Starts the server with the model in `folder` and waits, `startup_timeout` seconds at most, until it serves.

        `model` is the wire's model block; with quantization "nf4" weights that are not quantised yet become so while
        they are loaded. Raises SystemExit if the server cannot be started, with its last lines.
        """
        self.model = model
        self._chat = chat
        self._last_lines: deque[str] = deque(maxlen=30)
        self._port = _free_port()
        key = secrets.token_urlsafe(32)  # a loopback port is open to every user of the machine
        self._headers = {"Authorization": f"Bearer {key}"}
        extra = _extra_arguments()
        self.capacity = _capacity(extra)
        started = time.monotonic()
        self._start([*command, *_arguments(folder.resolve(), model, extra, self._port)], _environment(key))
        try:
            self._wait_until_healthy(started + startup_timeout, startup_timeout)
            self._limit = self._read_limit()
        except BaseException:
            self.close()
            raise
        self._start_seconds = time.monotonic() - started
        print(f"vLLM serves {model['id']}; context window {self._limit} tokens", file=sys.stderr, flush=True)

    # --- the child process ---

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what the child has started itself can be ended with it
            )
        except OSError as error:
            raise SystemExit(
                f"ENGINE=vllm cannot start {command[0]}: {error.strerror}; use the image open-synthesis-worker-vllm, "
                "or ENGINE=transformers"
            ) from None
        atexit.register(self.close)
        self._relay = threading.Thread(target=self._relay_output, name="vllm-output", daemon=True)
        self._relay.start()

    def _relay_output(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._last_lines.append(line)
                sys.stderr.write(line)

    def _wait_until_healthy(self, deadline: float, seconds: float) -> None:
        while self._process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                if self._get("/health")[0] == 200:
                    return
            if time.monotonic() > deadline:
                raise SystemExit(f"vLLM did not become ready within {seconds:.0f} seconds{self._remedy()}")
            time.sleep(0.1)
        self._relay.join(2)
        raise SystemExit(f"vLLM ended ({_ending(self._process.returncode)}) before it was ready{self._remedy()}")

    def _remedy(self) -> str:
        lines = "".join(f"  {line}" for line in list(self._last_lines))
        return f"; change VLLM_ARGS, take a larger GPU, or use ENGINE=transformers. Its last lines:\n{lines.rstrip()}"

    def _read_limit(self) -> int:
        """The most tokens that a prompt and its answer may have together: vLLM fits it to the GPU's memory."""
        return int(json.loads(self._get("/v1/models")[1])["data"][0]["max_model_len"])

    def _get(self, path: str) -> tuple[int, bytes]:
        """The status and body of a route; raises OSError or HTTPException where the server does not answer at once."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def close(self) -> None:
        """End the server and all that it has started."""
        atexit.unregister(self.close)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # also where the child has ended: what it had started may still be there
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._relay.join(2)

    # --- jobs ---

    async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
        """Answer a job; each new stretch of the text goes to `emit`. Cancelling the task makes vLLM stop.

        Raises JobError: those of Chat.encode; ENGINE_REFUSED where vLLM does not take the job; GPU_LOST where the
        server fails or is gone.
        """
        started = time.monotonic()
        encoded = await asyncio.to_thread(self._chat.encode, job, self._limit)
        answering = _Answering(self._chat.reader(encoded), emit)
        try:
            # One session a job: connections cost nothing here, and closing one is what tells vLLM to stop.
            async with (
                aiohttp.ClientSession(
                    f"http://127.0.0.1:{self._port}",
                    # Nothing is resolved here; the default resolver would leave a thread behind.
                    connector=aiohttp.TCPConnector(resolver=aiohttp.ThreadedResolver()),
                    headers=self._headers,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
                    read_bufsize=LINE_BYTES,
                ) as session,
                session.post("/v1/completions", json=self._request(job, encoded)) as response,
            ):
                if response.status != 200:
                    raise self._failure(response.status, await response.text())
                async for event in _events(response.content):
                    if "error" in event:
                        raise self._failure(int(event["error"].get("code") or 500), json.dumps(event))
                    answering.take(event)
        except (OSError, aiohttp.ClientError) as error:
            raise self._lost(type(error).__name__) from error
        if answering.finish_reason not in ("stop", "length"):
            raise self._lost(f"the answer ended with {answering.finish_reason}")
        return answering.done(encoded, started)

    def _request(self, job: Job, encoded: Encoded) -> dict[str, Any]:
        # Everything that decides about the text is said, so that no default of a model's or vLLM's can.
        greedy = job.temperature < LOWEST_TEMPERATURE
        return {
            "model": self.model["id"],
            "prompt": encoded.ids,
            "max_tokens": min(job.max_new_tokens, self._limit - len(encoded.ids)),
            "temperature": 0 if greedy else job.temperature,
            "top_p": 1 if greedy else job.top_p,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": job.repetition_penalty,
            "seed": job.seed,
            "stream": True,
            "stream_options": {"include_usage": True},  # the last event, with the time in vLLM's queue
            "stream_interval": 1 if job.stream else TOKENS_PER_CHUNK,
            "return_token_ids": True,
        }

    def _failure(self, status: int, body: str) -> JobError:
        message = body
        with suppress(ValueError, KeyError, TypeError):
            message = str(json.loads(body)["error"]["message"])
        if status >= 500:
            return self._lost(f"HTTP {status}: {message:.300}")
        return JobError("ENGINE_REFUSED", f"vLLM refused the job (HTTP {status}): {message:.300}")

    def _lost(self, problem: str) -> JobError:
        code = self._process.poll()
        what = f"failed ({problem})" if code is None else f"has ended ({_ending(code)})"
        return JobError("GPU_LOST", f"the vLLM server {what}; a new worker takes over, try again", refresh=True)

    def metrics(self) -> dict[str, float]:
        """What vLLM says of itself (counts, tokens, `kv_used` as a share) and the seconds that its start took."""
        values = {"start_seconds": self._start_seconds}
        with suppress(OSError, http.client.HTTPException):
            for name, value in re.findall(r"^([a-z_:]+)(?:\{.*\})? (\S+)", self._get("/metrics")[1].decode(), re.M):
                if name in METRICS:
                    values[METRICS[name]] = values.get(METRICS[name], 0.0) + float(value)
        return values


class _Answering:
    """One answer while it comes in."""

    def __init__(self, reader: Reader, emit: Callable[[str], None]) -> None:
        self.finish_reason: Literal["stop", "length"] | None = None
        self._reader = reader
        self._emit = emit
        self._tokens = 0
        self._first: float | None = None
        self._queue_ms = 0.0

    def take(self, event: dict[str, Any]) -> None:
        """Read one event: new tokens, or the last one with the job's times."""
        self._queue_ms = (event.get("metrics") or {}).get("queue_time_ms") or self._queue_ms
        for choice in event["choices"]:
            ids = choice["token_ids"]
            self._tokens += len(ids)
            if ids and self._first is None:
                self._first = time.monotonic()
            self.finish_reason = choice["finish_reason"]
            # No stop strings are sent, so what stops an answer is its last token, which is no text.
            self._show(self._reader.feed(ids[:-1] if self.finish_reason == "stop" else ids))

    def _show(self, text: str) -> None:
        if text:
            self._emit(text)

    def done(self, encoded: Encoded, started: float) -> Answer:
        """The whole answer; `started` is when the engine got the job."""
        self._show(self._reader.finish())
        assert self.finish_reason
        ended = time.monotonic()
        first = ended if self._first is None else self._first
        return Answer(
            self._reader.text,
            self.finish_reason,
            prompt_tokens=len(encoded.ids),
            completion_tokens=self._tokens,
            reasoning_tokens=self._reader.reasoning_tokens,
            queue_ms=round(self._queue_ms),
            prefill_ms=max(0, round((first - started) * 1000 - self._queue_ms)),
            decode_ms=round((ended - first) * 1000),
            dropped_sources=encoded.dropped,
        )


async def _events(lines: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of an answer."""
    async for line in lines:
        data = line.removeprefix(b"data:").strip()
        if data and data != b"[DONE]":
            yield json.loads(data)


def _arguments(folder: Path, model: Mapping[str, Any], extra: list[str], port: int) -> list[str]:
    """What `vllm serve` is told: defaults of ours, which VLLM_ARGS may change, then what it may not."""
    quantization = ["--quantization", "bitsandbytes"] if model["quantization"] == "nf4" else []
    return [
        str(folder),
        *quantization,
        *("--max-num-seqs", str(CAPACITY)),
        *("--max-model-len", "auto"),  # the model's own, or what fits into the GPU's memory
        "--enable-prefix-caching",
        *extra,
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", str(model["id"])),
        *("--generation-config", "vllm"),  # the repo's sampling defaults stay out; ends of a turn are read all the same
        "--enable-per-request-metrics",
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
    ]


def _extra_arguments() -> list[str]:
    try:
        return shlex.split(os.environ.get("VLLM_ARGS", ""))
    except ValueError as error:
        raise SystemExit(f"VLLM_ARGS cannot be read: {error}; quote it as for a shell") from None


def _capacity(extra: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="VLLM_ARGS", add_help=False, allow_abbrev=False)
    parser.add_argument("--max-num-seqs", "--max_num_seqs", type=int, default=CAPACITY)
    capacity: int = parser.parse_known_args(extra)[0].max_num_seqs
    return capacity


def _environment(key: str) -> dict[str, str]:
    """The child's environment: this one without our Python's packages and without secrets that it does not need."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "HF_TOKEN", "VLLM_ARGS") and not name.startswith("RUNPOD_")
    }
    if sys.prefix != sys.base_prefix:
        folders = kept.get("PATH", os.defpath).split(os.pathsep)
        kept["PATH"] = os.pathsep.join(folder for folder in folders if folder != f"{sys.prefix}/bin")
    # All that the model needs is in its folder.
    return {**kept, "VLLM_API_KEY": key, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
