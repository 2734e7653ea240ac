"""The handler around any engine, and how the engine is chosen."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

import engines
from common.prompts import Prompts
from common.wire import Job
from engines import Answer, JobError
from extractive import ExtractiveEngine
from handler import Handler

MODEL = {"id": "stub", "revision": "r1", "engine": "extractive", "quantization": "none"}


class StubEngine:
    """An engine that waits for `release` and then answers, or raises what it was given."""

    def __init__(self, result: Answer | Exception) -> None:
        self.result = result
        self.model: dict[str, Any] = MODEL
        self.jobs: list[Job] = []
        self.started = threading.Event()
        self.release = threading.Event()
        self.release.set()
        self.ended_by: list[str] = []

    def answer(self, job: Job, cancelled: threading.Event) -> Answer:
        self.jobs.append(job)
        self.started.set()
        end = time.monotonic() + 10  # a thread that never ends would hold up the end of the tests
        while not self.release.wait(0.01) and time.monotonic() < end:
            if cancelled.is_set():
                self.ended_by.append("cancelled")
                return Answer("", "cancelled")
        self.ended_by.append("release")
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


ANSWER = Answer("Yes. [S1]", "stop", prompt_tokens=11, completion_tokens=5, prefill_ms=30, decode_ms=70)


def call(data: object, prompts: Prompts, result: Answer | Exception = ANSWER) -> dict[str, Any]:
    """What the handler answers to a platform job; always JSON."""
    answer = asyncio.run(Handler(StubEngine(result), prompts)({"id": "1", "input": data}))
    json.dumps(answer, allow_nan=False).encode()
    return answer


def test_an_answer(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE", "registry/worker@sha256:1")
    assert call({"prompt": "Is it?"}, prompts) == {
        "synthesis": "Yes. [S1]",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 11, "completion_tokens": 5},
        "model": {**MODEL, "image": "registry/worker@sha256:1"},
        "prompts": prompts.hashes,
        "timings": {"queue_ms": 0, "prefill_ms": 30, "decode_ms": 70},
    }


@pytest.mark.parametrize(("image", "expected"), [(None, None), ("", None), ("i@sha256:2", "i@sha256:2")])
def test_ping_says_what_would_answer(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch, image: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("IMAGE", raising=False)
    if image is not None:
        monkeypatch.setenv("IMAGE", image)
    failing = RuntimeError("the engine was asked")
    answer = call({"op": "ping"}, prompts, failing)
    assert answer == {"op": "ping", "model": {**MODEL, "image": expected}, "prompts": prompts.hashes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "input must be an object, not null"),
        ([], "input must be an object"),
        ({}, "prompt is missing"),
        ({"prompt": "  "}, "prompt is missing"),
        ({"prompt": 1}, "prompt must be text"),
        ({"prompt": "?", "temprature": 1, "n": 2}, "unknown key n, temprature; known are prompt, "),
        ({"prompt": "?", "temperature": 3}, "temperature must be between 0 and 2"),
        ({"prompt": "?", "temperature": float("nan")}, "temperature must be a number"),
        ({"prompt": "?", "max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"prompt": "?", "stream": True}, "stream must be false"),
        ({"prompt": "?", "sources": [{"id": "1", "text": "t"}]}, "sources[0].id must look like S1"),
        ({"op": "\ud800"}, "op must be synthesize or ping"),
    ],
)
def test_a_bad_input_is_named(prompts: Prompts, data: object, message: str) -> None:
    answer = call(data, prompts, RuntimeError("the engine was asked"))
    assert set(answer) == {"error"}
    assert answer["error"].startswith("INVALID_INPUT: ")
    assert message in answer["error"]


def test_a_job_without_input(prompts: Prompts) -> None:
    answer = asyncio.run(Handler(StubEngine(ANSWER), prompts)({"id": "1"}))
    assert answer == {"error": "INVALID_INPUT: input must be an object, not null"}


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (JobError("NO_SOURCES", "send some"), {"error": "NO_SOURCES: send some"}),
        (JobError("GPU_LOST", "again", refresh=True), {"error": "GPU_LOST: again", "refresh_worker": True}),
        (KeyError("secret"), {"error": "INTERNAL: KeyError; the worker's log has the details"}),
        (MemoryError(), {"error": "INTERNAL: MemoryError; the worker's log has the details"}),
    ],
)
def test_errors_are_strings(
    prompts: Prompts, capsys: pytest.CaptureFixture[str], failure: Exception, expected: dict[str, Any]
) -> None:
    assert call({"prompt": "Is it?"}, prompts, failure) == expected
    assert ("Traceback" in capsys.readouterr().err) is not isinstance(failure, JobError)


def test_an_answer_that_is_too_large_is_an_error(prompts: Prompts) -> None:
    error = call({"prompt": "Is it?"}, prompts, Answer("é" * 4_600_000, "stop"))["error"]
    assert error.startswith("OUTPUT_TOO_LARGE: the answer has 9200")


def test_half_a_surrogate_pair_is_replaced(prompts: Prompts) -> None:
    assert call({"prompt": "Is it?"}, prompts, Answer("a\ud800b", "stop"))["synthesis"] == "a\ufffdb"


def test_the_question_reaches_the_engine_byte_for_byte(prompts: Prompts) -> None:
    question = 'Is "it" $5 {or} {{question}}?\n\t\\n 👩‍🔬 é e\u0301 \u202e'
    engine = StubEngine(ANSWER)
    asyncio.run(Handler(engine, prompts)({"id": "1", "input": {"prompt": question}}))
    assert [job.prompt for job in engine.jobs] == [question]


def test_the_event_loop_runs_on_while_an_answer_is_computed(prompts: Prompts) -> None:
    engine = StubEngine(ANSWER)
    engine.release.clear()

    async def play() -> dict[str, Any]:
        task = asyncio.create_task(Handler(engine, prompts)({"id": "1", "input": {"prompt": "Is it?"}}))
        while not engine.started.is_set():
            await asyncio.sleep(0.01)
        assert not task.done()
        engine.release.set()  # only a loop that is not blocked gets here
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(play())["synthesis"] == "Yes. [S1]"


def test_a_cancelled_job_ends_its_engine(prompts: Prompts) -> None:
    engine = StubEngine(ANSWER)
    engine.release.clear()

    async def play() -> None:
        task = asyncio.create_task(Handler(engine, prompts)({"id": "1", "input": {"prompt": "Is it?"}}))
        while not engine.started.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)

    asyncio.run(play())  # ends only when the engine's thread has ended
    assert engine.ended_by == ["cancelled"]


def test_the_sdk_sees_a_coroutine_function(prompts: Prompts) -> None:
    assert inspect.iscoroutinefunction(Handler(StubEngine(ANSWER), prompts).__call__)


def test_importing_the_handler_starts_and_loads_nothing() -> None:
    program = "import sys, handler, extractive; print({'runpod', 'torch', 'transformers'} & set(sys.modules))"
    environment = {**os.environ, "ENGINE": "transformers", "MODEL_ID": "no/such-model"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == ("set()\n", "", 0)


# --- which engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ENGINE", "MODEL_ID", "MODEL_REVISION"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "variables", [{}, {"ENGINE": ""}, {"ENGINE": "extractive"}, {"ENGINE": "extractive", "MODEL_ID": "a/b"}]
)
def test_the_extractive_engine(prompts: Prompts, environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    engine = engines.build(prompts)
    assert isinstance(engine, ExtractiveEngine)
    assert engine.model == {"id": "extractive", "revision": None, "engine": "extractive", "quantization": "none"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MODEL_ID": "a/b"}, ("a/b", None)),
        ({"ENGINE": "transformers", "MODEL_ID": "a/b", "MODEL_REVISION": ""}, ("a/b", None)),
        ({"ENGINE": "", "MODEL_ID": "a/b", "MODEL_REVISION": "0123abc"}, ("a/b", "0123abc")),
    ],
)
def test_the_transformers_engine(
    prompts: Prompts, environment: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[str, str | None]
) -> None:
    import generative

    environment.setattr(generative, "TransformersEngine", lambda *arguments: arguments)
    for name, value in variables.items():
        environment.setenv(name, value)
    assert engines.build(prompts) == (prompts, *expected)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ENGINE": "transformers"}, r"ENGINE=transformers needs MODEL_ID, for example MODEL_ID="),
        ({"ENGINE": "transformers", "MODEL_ID": ""}, r"ENGINE=transformers needs MODEL_ID"),
        ({"ENGINE": "Extractive"}, r"^ENGINE=Extractive is unknown; known are extractive, transformers$"),
    ],
)
def test_an_engine_that_cannot_be(
    prompts: Prompts, environment: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        engines.build(prompts)
