"""A stand-in for `vllm serve`: the same routes and arguments, around the tests' tiny model and transformers' generate.

    python openai_server.py MODEL_FOLDER --host 127.0.0.1 --port 1 …

$STAND_IN is a folder. What happens is noted there in `notes`, one JSON object a line. How to behave is read from the
file `mode` there, at the start and for each job: empty (well), or one of
    die            end with exit code 3, at the start or with the job
    never          never become healthy
    refuse, fail   answer a job with HTTP 400 or 500
    fail-late      send an error among the events
    hang           take a job and say nothing
    slow           20 ms for each token
    stubborn       pass over SIGTERM
    without-model  do not load the model
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

FOLDER = Path(os.environ["STAND_IN"])
SECONDS_PER_TOKEN = 0.02


def note(**what: object) -> None:
    """Add a line to the notes."""
    with (FOLDER / "notes").open("a") as file:
        file.write(json.dumps(what) + "\n")


def mode() -> str:
    """How to behave now."""
    path = FOLDER / "mode"
    return path.read_text() if path.exists() else ""


class Model:
    """The tiny model, one thread for each job."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.torch = torch
        self.network = AutoModelForCausalLM.from_pretrained(folder).eval()
        ends = self.network.generation_config.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else list(ends)
        self.pad = AutoTokenizer.from_pretrained(folder).pad_token_id

    def generate(self, job: dict[str, Any], put: Any, aborted: threading.Event) -> None:
        """Generate for a request; `put` gets each new token id. Ends early once `aborted` is set."""
        from transformers import GenerationConfig
        from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

        torch = self.torch

        class Streamer(BaseStreamer):  # type: ignore[misc] # transformers has no types here
            prompt = True

            def put(self, value: Any) -> None:
                if not self.prompt:
                    put(int(value[0]))
                self.prompt = False

            def end(self) -> None:
                """Nothing is held back."""

        class Stop(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                if mode() == "slow":
                    time.sleep(SECONDS_PER_TOKEN)
                return torch.full((input_ids.shape[0],), aborted.is_set(), dtype=torch.bool)

        sampling: dict[str, Any] = {"do_sample": False}
        if job["temperature"]:
            torch.manual_seed(job["seed"] or 0)
            sampling = {"do_sample": True, "temperature": float(job["temperature"])}
            sampling |= {"top_p": float(job["top_p"]), "top_k": 0}
        ids = torch.tensor([job["prompt"]])
        with torch.inference_mode():
            self.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    max_new_tokens=job["max_tokens"],
                    repetition_penalty=float(job["repetition_penalty"]),
                    eos_token_id=self.ends,
                    pad_token_id=self.pad,
                    **sampling,
                ),
                streamer=Streamer(),
                stopping_criteria=StoppingCriteriaList([Stop()]),
            )


class Server:
    """The routes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        config = json.loads(Path(arguments.model, "config.json").read_text())
        self.max_model_len = config["max_position_embeddings"]
        self.model: Model | None = None
        self.running = 0
        self.generated = 0

    async def health(self, request: web.Request) -> web.Response:
        """Healthy once the model is loaded, which begins with the first question."""
        if mode() == "never":
            raise web.HTTPServiceUnavailable
        if self.model is None and mode() != "without-model":
            self.model = await asyncio.to_thread(Model, self.arguments.model)
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        """The model's name and context window."""
        self.authorise(request)
        card = {"id": self.arguments.served_model_name, "max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [card]})

    async def metrics(self, request: web.Request) -> web.Response:
        """Some of vLLM's metrics, as Prometheus text."""
        labels = f'{{engine="0",model_name="{self.arguments.served_model_name}"}}'
        return web.Response(
            text=f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{labels} {self.running}.0\n"
            f"vllm:generation_tokens_total{labels} {self.generated}.0\nvllm:other_total{labels} 7.0\n"
        )

    def authorise(self, request: web.Request) -> None:
        """Ask for the key, as vLLM does below /v1."""
        if request.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            raise web.HTTPUnauthorized

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Answer a job with server-sent events."""
        self.authorise(request)
        job = await request.json()
        behaviour = mode()
        note(job=job)
        if behaviour == "die":
            os._exit(3)
        tokens = len(job["prompt"]) + job["max_tokens"]
        if behaviour == "refuse" or job["model"] != self.arguments.served_model_name or tokens > self.max_model_len:
            return problem(400, f"the model has no room for {tokens} tokens")
        if behaviour == "fail":
            return problem(500, "EngineCore encountered an issue")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.running += 1
        aborted = threading.Event()
        try:
            if behaviour == "hang":
                await asyncio.sleep(600)
            async for event in self.events(job, aborted):
                await response.write(f"data: {event}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            note(aborted=job["prompt"][-20:])
            raise
        finally:
            self.running -= 1
            aborted.set()
        return response

    async def events(self, job: dict[str, Any], aborted: threading.Event) -> AsyncIterator[str]:
        """The events of an answer as JSON: the ids of the prompt come with the first, the end with the last tokens."""
        assert self.model
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int | None]()

        def put(token: int) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, token)

        task = asyncio.create_task(asyncio.to_thread(self.model.generate, job, put, aborted))
        task.add_done_callback(lambda done: queue.put_nowait(None))
        ids: list[int] = []
        count = 0
        end = None
        while end is None:
            token = await queue.get()
            if token is None:
                await task
                raise RuntimeError(f"generate ended after {count} tokens")
            ids.append(token)
            count += 1
            end = "stop" if ids[-1] in self.model.ends else "length" if count == job["max_tokens"] else None
            if end or count == 1 or len(ids) == job["stream_interval"]:
                choice = {"index": 0, "text": "", "token_ids": ids, "finish_reason": end}
                # As wide as the ids of a prompt of 130,000 tokens.
                wide = {"prompt_token_ids": job["prompt"], "padding": " " * 1_000_000} if count == 1 else {}
                yield json.dumps({"choices": [choice | wide]})
                if mode() == "fail-late":
                    yield json.dumps({"error": {"message": "EngineCore encountered an issue", "code": 500}})
                    return
                ids = []
        await task
        self.generated += count
        usage = {"prompt_tokens": len(job["prompt"]), "completion_tokens": count}
        yield json.dumps({"choices": [], "usage": usage, "metrics": {"queue_time_ms": 2.6}})


def problem(status: int, message: str) -> web.Response:
    """An error as vLLM words it."""
    return web.json_response({"error": {"message": message, "type": "Error", "code": status}}, status=status)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--served-model-name")
    arguments, _ = parser.parse_known_args()
    # Stands for vLLM's own processes, which hold the GPU: it outlives this one if nobody ends it.
    helper = subprocess.Popen(["sleep", "600"])
    note(pid=os.getpid(), helper=helper.pid, arguments=sys.argv[1:], environment=sorted(os.environ))
    if mode() == "die":
        print("ValueError: no kernel image is available", flush=True)
        sys.exit(3)
    if mode() == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = Server(arguments)
    app = web.Application()
    app.add_routes(
        [
            web.get("/health", server.health),
            web.get("/v1/models", server.models),
            web.get("/metrics", server.metrics),
            web.post("/v1/completions", server.completions),
        ]
    )
    runner: dict[str, Any] = {"handle_signals": mode() != "stubborn", "shutdown_timeout": 0.1, "print": None}
    web.run_app(app, host=arguments.host, port=arguments.port, handler_cancellation=True, **runner)


if __name__ == "__main__":
    main()
