"""The handler around any engine: one job in, wire values out; and how the engine is chosen.

What the SDK does with it is in test_stream.py and test_stop.py.
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import fitness
import handler as handler_module
import start
from common import wire
from common.prompts import Prompts
from common.wire import Job
from engines import Answer, Engine, JobError, Start
from extractive import ExtractiveEngine
from handler import Handler
from local_runpod.fleet import worker_environment

MODEL = {"id": "stub", "revision": "r1", "engine": "extractive", "quantization": "none"}
ANSWER = Answer(
    "Yes. [S1]",
    "stop",
    prompt_tokens=11,
    completion_tokens=5,
    reasoning_tokens=2,
    queue_ms=10,
    prefill_ms=30,
    decode_ms=70,
    dropped_sources=("S7", "S9"),
)


class StubEngine:
    """Emits `emits` with `pause` seconds before each, waits for `release`, then answers or raises what it was given."""

    def __init__(self, result: Answer | BaseException = ANSWER, emits: Sequence[str] = (), pause: float = 0) -> None:
        self.result = result
        self.emits = emits
        self.pause = pause
        self.model: dict[str, Any] = MODEL
        self.capacity = 3
        self.jobs: list[Job] = []
        self.hold = False
        self.cancelled_after: list[float] = []
        self.signalled = 0.0

    async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
        self.jobs.append(job)
        try:
            for text in self.emits:
                await asyncio.sleep(self.pause)
                emit(text)
            if self.hold:
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled_after.append(time.monotonic() - self.signalled)
            raise
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    def metrics(self) -> dict[str, float]:
        return {"batch_size": 3.0, "kv_used_ratio": 0.5, "forward_passes_total": 12.0}

    def close(self) -> None:
        pass


def make(prompts: Prompts, engine: Engine | None = None, **more: Any) -> Handler:
    return Handler(engine or StubEngine(), prompts, Start({"load": 1.25, "total": 2.0}, "baked"), **more)


async def ask(handler: Handler, data: object) -> list[dict[str, Any]]:
    """All that the handler yields for a platform job; every value is strict JSON."""
    found = [item async for item in handler.answer({"id": "1", "input": data})]
    for item in found:
        json.dumps(item, allow_nan=False, ensure_ascii=False).encode()
    return found


def call(data: object, prompts: Prompts, result: Answer | BaseException = ANSWER) -> dict[str, Any]:
    """The only value that the handler yields for a job that does not stream."""
    (answer,) = asyncio.run(ask(make(prompts, StubEngine(result)), data))
    return answer


# --- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE", "registry/worker@sha256:1")
    monkeypatch.setenv("RELEASE", "0123456789ab")
    assert call({"prompt": "Is it?"}, prompts) == {
        "synthesis": "Yes. [S1]",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 11, "completion_tokens": 5, "reasoning_tokens": 2},
        "model": {**MODEL, "image": "registry/worker@sha256:1", "release": "0123456789ab"},
        "prompts": prompts.hashes,
        "timings": {
            "queue_ms": 10,
            "prefill_ms": 30,
            "decode_ms": 70,
            "cold_start": {"weights_from": "baked", "load_ms": 1250, "total_ms": 2000},
        },
        "dropped_sources": ["S7", "S9"],
    }


def test_only_the_first_answer_tells_of_the_start(prompts: Prompts) -> None:
    async def play() -> list[bool]:
        engine = StubEngine(JobError("NO_SOURCES", "send some"))
        handler = make(prompts, engine)
        told = []
        for result in (engine.result, ANSWER, ANSWER):
            engine.result = result
            (last,) = await ask(handler, {"prompt": "Is it?"})
            told.append("cold_start" in last.get("timings", {}))
        return told

    assert asyncio.run(play()) == [False, True, False]


@pytest.mark.parametrize(("image", "expected"), [(None, None), ("", None), ("i@sha256:2", "i@sha256:2")])
def test_ping_says_what_would_answer(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch, image: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("IMAGE", raising=False)
    if image is not None:
        monkeypatch.setenv("IMAGE", image)
    failing = RuntimeError("the engine was asked")
    answer = call({"op": "ping"}, prompts, failing)
    assert answer == {"op": "ping", "model": {**MODEL, "image": expected, "release": None}, "prompts": prompts.hashes}


def test_the_question_reaches_the_engine_byte_for_byte(prompts: Prompts) -> None:
    question = 'Is "it" $5 {or} {{question}}?\n\t\\n 👩‍🔬 é e\u0301 \u202e'
    engine = StubEngine(ANSWER)
    asyncio.run(ask(make(prompts, engine), {"prompt": question}))
    assert [job.prompt for job in engine.jobs] == [question]


def test_half_a_surrogate_pair_is_replaced(prompts: Prompts) -> None:
    assert call({"prompt": "Is it?"}, prompts, Answer("a\ud800b", "stop"))["synthesis"] == "a\ufffdb"


def test_the_sdk_sees_an_async_generator_and_takes_twice_what_runs(prompts: Prompts) -> None:
    engine = StubEngine()
    handler = make(prompts, engine)
    assert inspect.isasyncgenfunction(handler.config["handler"])
    assert handler.config["return_aggregate_stream"] is True

    async def limits() -> list[int]:
        found = []
        for engine.capacity in (64, 3, 1):
            found.append(handler.config["concurrency_modifier"](1))
        handler.stop()
        assert handler.stopping
        return found

    before = signal.getsignal(signal.SIGTERM)
    assert asyncio.run(limits()) == [128, 6, 2]
    assert signal.getsignal(signal.SIGTERM) == before


def test_importing_the_handler_starts_and_loads_nothing() -> None:
    program = "import sys, handler, extractive; print({'runpod', 'torch', 'transformers'} & set(sys.modules))"
    environment = {**os.environ, "ENGINE": "transformers", "MODEL_ID": "no/such-model"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.stderr, ended.returncode) == ("set()\n", "", 0)


# --- errors ------------------------------------------------------------------------------------------------------------

SOURCE = {"id": "S1", "text": "a text", "label": "Klein et al. (2018)"}
NAN, INFINITY = float("nan"), float("inf")
BAD_INPUTS: list[tuple[object, str]] = [
    (None, "input must be an object, not null"),
    ([], "input must be an object, not a list"),
    ("prompt", "input must be an object, not text"),
    (7, "input must be an object, not a number"),
    (NAN, "input must be an object, not not-a-number"),
    (True, "input must be an object, not true/false"),
    ({}, "prompt is missing"),
    ({"prompt": ""}, "prompt is missing"),
    ({"prompt": " \n\t\u3000"}, "prompt is missing"),
    ({"prompt": 1}, "prompt must be text"),
    ({"prompt": None}, "prompt must be text, not null"),
    ({"prompt": ["q"]}, "prompt must be text, not a list"),
    ({"prompt": {"text": "q"}}, "prompt must be text, not an object"),
    ({"prompt": "q" * 100_001}, "prompt has 100001 characters"),
    ({"messages": []}, "unknown key messages"),
    ({"prompt": "?", "temprature": 1, "n": 2}, "unknown key n, temprature; known are prompt, "),
    ({"prompt": "?", "\ud800": 1}, "unknown key \ufffd"),
    ({"prompt": "?", "k" * 5000: 1}, "unknown key kkk"),
    ({"op": "\ud800"}, "op must be synthesize, ping or metrics"),
    ({"op": None}, "op must be"),
    ({"op": ["ping"]}, "op must be"),
    ({"op": {"ping": 1}}, "op must be"),
    ({"op": "PING"}, "op must be"),
    ({"context": None}, "context must be text"),
    ({"context": []}, "context must be text, not a list"),
    ({"context": "c", "sources": [SOURCE]}, "send context or sources, not both"),
    ({"temperature": 3}, "temperature must be between 0 and 2"),
    ({"temperature": -1e-9}, "temperature must be between 0 and 2"),
    ({"temperature": NAN}, "temperature must be a number"),
    ({"temperature": INFINITY}, "temperature must be a number"),
    ({"temperature": 10**400}, "temperature must be between"),
    ({"temperature": "0.3"}, "temperature must be a number, not text"),
    ({"temperature": None}, "temperature must be a number, not null"),
    ({"temperature": True}, "temperature must be a number, not true/false"),
    ({"temperature": [0.3]}, "temperature must be a number, not a list"),
    ({"top_p": 0}, "top_p must be between 0.01 and 1"),
    ({"top_p": 1.0001}, "top_p must be between"),
    ({"top_p": -INFINITY}, "top_p must be a number"),
    ({"repetition_penalty": 0}, "repetition_penalty must be between 0.5 and 2"),
    ({"repetition_penalty": 2.1}, "repetition_penalty must be between"),
    ({"max_new_tokens": 0}, "max_new_tokens must be between 1 and 32768"),
    ({"max_new_tokens": -5}, "max_new_tokens must be between"),
    ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
    ({"max_new_tokens": 10**9}, "max_new_tokens must be between"),
    ({"max_new_tokens": "all"}, "max_new_tokens must be a whole number, not text"),
    ({"seed": -1}, "seed must be between"),
    ({"seed": 2**63}, "seed must be between"),
    ({"seed": 0.0}, "seed must be a whole number"),
    ({"seed": False}, "seed must be a whole number"),
    ({"stream": 1}, "stream must be true or false"),
    ({"stream": "yes"}, "stream must be true or false, not text"),
    ({"stream": None}, "stream must be true or false, not null"),
    ({"fit": 0}, "fit must be true or false"),
    ({"fit": {}}, "fit must be true or false, not an object"),
    ({"sources": None}, "sources must be a list"),
    ({"sources": "S1"}, "sources must be a list, not text"),
    ({"sources": [None]}, "sources[0] must be an object"),
    ({"sources": [[]]}, "sources[0] must be an object"),
    ({"sources": [{}]}, "sources[0].id must look like S1"),
    ({"sources": [SOURCE] * 501}, "sources has 501 entries"),
    ({"sources": [SOURCE, SOURCE]}, "sources[1].id S1 is there twice"),
    ({"sources": [{"id": "1", "text": "t"}]}, "sources[0].id must look like S1"),
    ({"sources": [{**SOURCE, "id": "S1\n"}]}, "sources[0].id must look like S1"),
    ({"sources": [{**SOURCE, "id": 1}]}, "sources[0].id must be text"),
    ({"sources": [{**SOURCE, "id": "\ud800"}]}, "sources[0].id must look like S1"),
    ({"sources": [{**SOURCE, "text": ""}]}, "sources[0].text is empty"),
    ({"sources": [{**SOURCE, "text": b"x"}]}, "sources[0].text must be text"),
    ({"sources": [{**SOURCE, "label": NAN}]}, "sources[0].label must be text"),
    ({"sources": [{**SOURCE, "url": "u"}]}, "sources[0]: unknown key url"),
]


def test_every_bad_input_is_named_and_the_worker_lives_on(prompts: Prompts) -> None:
    engine = StubEngine(RuntimeError("the engine was asked"))
    handler = make(prompts, engine)
    bare = ("op", "prompt", "messages")

    async def play() -> None:
        for data, message in BAD_INPUTS:
            if isinstance(data, dict) and data and not any(key in data for key in bare):
                data = {"prompt": "Is it?", **data}
            (answer,) = await ask(handler, data)
            assert set(answer) == {"error"}, data
            assert answer["error"].startswith("INVALID_INPUT: "), data
            assert message in answer["error"], answer
            assert len(answer["error"]) <= 2000
        (answer,) = [item async for item in handler.answer({"id": "no input"})]
        assert answer == {"error": "INVALID_INPUT: input must be an object, not null"}
        engine.result = ANSWER
        (answer,) = await ask(handler, {"prompt": "Is it?"})
        assert answer["synthesis"] == ANSWER.text

    asyncio.run(play())
    assert len(BAD_INPUTS) >= 60
    assert len(engine.jobs) == 1
    assert handler.metrics.jobs == {"INVALID_INPUT": len(BAD_INPUTS) + 1, "OK": 1}


texts = st.text(st.characters(exclude_categories=()), max_size=20)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
jobs_like: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"prompt": st.just("Is it real?") | values},
    optional={
        "context": texts | values,
        "sources": st.lists(st.fixed_dictionaries({"id": st.sampled_from(["S1", "S2", "x"]), "text": texts})) | values,
        "temperature": st.floats(0, 2) | values,
        "top_p": st.floats(0, 1) | values,
        "repetition_penalty": st.floats(0.5, 2) | values,
        "max_new_tokens": st.integers(0, 40_000) | values,
        "seed": st.integers() | values,
        "stream": st.booleans() | values,
        "fit": st.booleans() | values,
        "op": st.sampled_from(["synthesize", "ping", "metrics"]) | values,
    },
)


@given(values | jobs_like)
def test_whatever_is_sent_gets_an_answer_or_a_code_and_a_sentence(data: Any) -> None:
    # a folder of its own: Hypothesis and fixtures of functions do not go together
    prompts = Prompts(Path(__file__).parents[2] / "prompts")
    *before, last = asyncio.run(ask(make(prompts, StubEngine(ANSWER, ["Yes. ", "[S1]"])), data))
    if "error" in last:
        assert list(last) == ["error"]
        code, _, sentence = last["error"].partition(": ")
        assert code == "INVALID_INPUT"
        assert 0 < len(sentence) < 2000
        assert "Traceback" not in sentence
        assert before == []
    elif "op" in last:
        assert last.keys() in ({"op", "model", "prompts"}, {"op", "metrics"})
    else:
        assert last["synthesis"] == ANSWER.text
        assert bool(before) == (data.get("stream") is True)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (JobError("NO_SOURCES", "send some"), {"error": "NO_SOURCES: send some"}),
        (KeyError("secret"), {"error": "INTERNAL: KeyError; the worker's log has the details"}),
        (MemoryError(), {"error": "INTERNAL: MemoryError; the worker's log has the details"}),
        (asyncio.CancelledError(), {"error": "INTERNAL: RuntimeError; the worker's log has the details"}),
    ],
)
def test_errors_are_strings(
    prompts: Prompts, capsys: pytest.CaptureFixture[str], failure: BaseException, expected: dict[str, Any]
) -> None:
    assert call({"prompt": "Is it?"}, prompts, failure) == expected
    assert ("Traceback" in capsys.readouterr().err) is not isinstance(failure, JobError)


def test_an_answer_that_is_too_large_is_an_error(prompts: Prompts) -> None:
    error = call({"prompt": "Is it?"}, prompts, Answer("é" * 4_600_000, "stop"))["error"]
    assert error.startswith("OUTPUT_TOO_LARGE: the answer has 9200")


def test_chunks_count_towards_the_size_of_the_answer(prompts: Prompts) -> None:
    engine = StubEngine(Answer("é" * 2_300_000, "stop"), ["é" * 2_300_000])
    handler = make(prompts, engine)
    *before, last = asyncio.run(ask(handler, {"prompt": "Is it?", "stream": True}))
    assert last["error"].startswith("OUTPUT_TOO_LARGE: the answer has 920")
    assert len(before) > 4
    for chunk in before:
        assert len(json.dumps(chunk).encode()) < 1_000_000
    assert handler.metrics.jobs == {"OUTPUT_TOO_LARGE": 1}


# --- streaming ---------------------------------------------------------------------------------------------------------


def test_chunks_are_the_text_and_the_answer_comes_last(prompts: Prompts) -> None:
    words = [f"{number} é🧪 " for number in range(200)]
    engine = StubEngine(Answer("".join(words), "stop"), ["", *words], pause=0.001)
    *before, last = asyncio.run(ask(make(prompts, engine), {"prompt": "Is it?", "stream": True}))
    assert [list(chunk) for chunk in before] == [["text"]] * len(before)
    assert "".join(chunk["text"] for chunk in before) == last["synthesis"] == "".join(words)
    assert 2 <= len(before) <= 20, "one each 50 ms"
    assert before[0]["text"] == words[0], "the first word does not wait"


def test_text_collects_while_a_chunk_is_on_its_way(prompts: Prompts) -> None:
    words = [f"{number} " for number in range(50)]
    engine = StubEngine(Answer("".join(words), "stop"), words, pause=0.004)

    async def play() -> list[str]:
        got = []
        async for item in make(prompts, engine).answer({"id": "1", "input": {"prompt": "?", "stream": True}}):
            got.append(item.get("text", ""))
            await asyncio.sleep(0.15)  # the SDK's request to the platform
        return got

    got = asyncio.run(play())
    assert "".join(got) == "".join(words)
    assert len(got) <= 6


def test_without_stream_the_answer_is_all(prompts: Prompts) -> None:
    engine = StubEngine(ANSWER, ["Yes. ", "[S1]"], pause=0.06)
    assert len(asyncio.run(ask(make(prompts, engine), {"prompt": "Is it?"}))) == 1


def test_jobs_run_at_the_same_time(prompts: Prompts) -> None:
    engine = StubEngine(ANSWER, ["a"] * 5, pause=0.05)

    async def play() -> float:
        begun = time.monotonic()
        handler = make(prompts, engine)
        await asyncio.gather(*[ask(handler, {"prompt": "Is it?"}) for _ in range(20)])
        return time.monotonic() - begun

    assert asyncio.run(play()) < 1.5


# --- cancelled ---------------------------------------------------------------------------------------------------------


async def deliver(handler: Handler, sending: asyncio.Event, stream: bool) -> None:
    """What the SDK does with a job, with a platform that takes for ever to answer."""
    outer = (item async for item in handler.answer({"id": "1", "input": {"prompt": "Is it?", "stream": stream}}))
    async for _ in outer:
        sending.set()
        await asyncio.sleep(60)


@pytest.mark.parametrize("state", ["waiting for the first text", "sending text", "waiting for the answer"])
def test_a_cancelled_job_ends_its_engine_at_once(prompts: Prompts, state: str) -> None:
    engine = StubEngine(ANSWER, ["Yes"] if state == "sending text" else [])
    engine.hold = True

    async def play() -> Handler:
        handler = make(prompts, engine)
        sending = asyncio.Event()
        task = asyncio.create_task(deliver(handler, sending, stream=state != "waiting for the answer"))
        await asyncio.wait((task,), timeout=0.1)
        assert len(engine.jobs) == 1
        assert sending.is_set() == (state == "sending text")
        engine.signalled = time.monotonic()
        task.cancel()
        await asyncio.wait((task,))
        # The task stays referenced here, as it does in the SDK: no garbage collection helps.
        await asyncio.sleep(0.1)
        assert task.cancelled()
        return handler

    handler = asyncio.run(play())
    assert len(engine.cancelled_after) == 1
    assert engine.cancelled_after[0] < 0.1
    assert handler.metrics.jobs == {"CANCELLED": 1}


def test_a_closed_generator_ends_its_engine(prompts: Prompts) -> None:
    engine = StubEngine(ANSWER, ["Yes"])
    engine.hold = True

    async def play() -> None:
        job = {"id": "1", "input": {"prompt": "Is it?", "stream": True}}
        answers = cast(AsyncGenerator[dict[str, Any], None], make(prompts, engine).answer(job))
        assert await anext(answers) == {"text": "Yes"}
        await answers.aclose()
        await asyncio.sleep(0)
        assert len(engine.cancelled_after) == 1

    asyncio.run(play())


def test_an_engine_that_fails_after_its_job_was_cancelled_says_nothing(
    prompts: Prompts, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(StubEngine):
        async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
            try:
                return await super().answer(job, emit)
            except asyncio.CancelledError:
                raise RuntimeError("too late") from None

    engine = Failing()
    engine.hold = True

    async def play() -> None:
        task = asyncio.create_task(deliver(make(prompts, engine), asyncio.Event(), stream=False))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait((task,))
        await asyncio.sleep(0.05)

    asyncio.run(play())
    assert capsys.readouterr().err == ""


# --- a new worker, and the end -----------------------------------------------------------------------------------------


class Mixed(StubEngine):
    """Fails the jobs that ask for it, and holds the others for 0.4 s, or those that ask for it for a minute."""

    async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
        if job.prompt == "lose":
            raise JobError("GPU_LOST", "again", refresh=True)
        await asyncio.sleep(60 if job.prompt == "long" else 0.4)
        return ANSWER


@pytest.fixture(autouse=True)
def no_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends a process that hangs must not end the tests'."""
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *arguments, **more: None)


def test_a_new_worker_is_asked_for_once_the_other_jobs_are_delivered(prompts: Prompts) -> None:
    async def play() -> list[tuple[str, bool, float]]:
        handler = make(prompts, Mixed(), stop_seconds=1)
        begun = time.monotonic()
        ended: list[tuple[str, bool, float]] = []

        async def job(prompt: str) -> None:
            (last,) = await ask(handler, {"prompt": prompt})
            asked = bool(handler.config.get("refresh_worker"))
            ended.append((f"{prompt} {last.get('error', 'OK')[:8]}", asked, time.monotonic() - begun))

        tasks = [asyncio.create_task(job(prompt)) for prompt in ("short", "long", "lose", "lose")]
        await asyncio.sleep(0.1)
        await asyncio.create_task(job("late"))
        await asyncio.wait(tasks)
        return ended

    ended = asyncio.run(play())
    assert [what for what, _, _ in ended] == [
        "late STOPPED:",
        "short OK",
        "long STOPPED:",
        "lose GPU_LOST",
        "lose GPU_LOST",
    ]
    assert [asked for _, asked, _ in ended] == [False, False, False, True, True]
    assert ended[0][2] < 0.3, "a job that comes too late is told at once"
    assert 1 <= ended[2][2] < 1.5
    assert ended[-1][2] < 1.7


def test_a_new_worker_is_asked_for_though_the_job_that_needs_it_is_cancelled(prompts: Prompts) -> None:
    async def play() -> bool:
        handler = make(prompts, Mixed(), stop_seconds=1)
        short = asyncio.create_task(ask(handler, {"prompt": "short"}))
        lose = asyncio.create_task(ask(handler, {"prompt": "lose"}))
        await asyncio.sleep(0.1)
        lose.cancel()
        assert "synthesis" in (await short)[-1]
        return bool(handler.config.get("refresh_worker"))

    assert asyncio.run(play())


def test_an_engine_that_does_not_hear_is_not_waited_for(prompts: Prompts) -> None:
    class Deaf(StubEngine):
        async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                try:
                    await asyncio.sleep(0.05)
                except asyncio.CancelledError:
                    self.cancelled_after.append(0)
            return ANSWER

    async def play() -> tuple[dict[str, Any], float]:
        handler = make(prompts, Deaf(), stop_seconds=0.2)
        begun = time.monotonic()
        task = asyncio.create_task(ask(handler, {"prompt": "Is it?"}))
        await asyncio.sleep(0.05)
        handler.stop()
        (last,) = await task
        took = time.monotonic() - begun
        await asyncio.sleep(1)
        return last, took

    last, took = asyncio.run(play())
    assert last == {"error": "STOPPED: the worker is being stopped; send the job again"}
    assert took < 0.6


@pytest.mark.parametrize(("given", "seconds"), [(None, 8), ("", 8), ("0", 0), ("2.5", 2.5)])
def test_the_time_to_stop(given: str | None, seconds: float) -> None:
    assert handler_module._stop_seconds(given) == seconds


@pytest.mark.parametrize("given", ["-1", "nan", "soon", "1e9"])
def test_a_time_to_stop_that_is_none(given: str) -> None:
    with pytest.raises(SystemExit, match="STOP_SECONDS="):
        handler_module._stop_seconds(given)


# --- metrics -----------------------------------------------------------------------------------------------------------


def test_the_metrics_are_prometheus_text(prompts: Prompts) -> None:
    async def play() -> str:
        engine = StubEngine()
        handler = make(prompts, engine)
        for result in (ANSWER, ANSWER, JobError("TOO_LONG", "by 5"), KeyError()):
            engine.result = result
            await ask(handler, {"prompt": "Is it?"})
        await ask(handler, {"prompt": 5})
        engine.hold = True
        held = asyncio.create_task(ask(handler, {"prompt": "Is it?"}))
        await asyncio.sleep(0.05)
        (answer,) = await ask(handler, {"op": "metrics"})
        held.cancel()
        assert answer.keys() == {"op", "metrics"}
        assert answer["op"] == "metrics"
        return str(answer["metrics"])

    families = {family.name: family for family in text_string_to_metric_families(asyncio.run(play()))}
    for family in families.values():
        assert family.name.startswith("open_synthesis_")
        assert family.documentation

    def samples(name: str) -> dict[str, float]:
        return {"".join(sample.labels.values()): sample.value for sample in families[f"open_synthesis_{name}"].samples}

    assert samples("jobs") == {"OK": 2, "TOO_LONG": 1, "INTERNAL": 1, "INVALID_INPUT": 1}
    assert samples("jobs_in_flight") == {"": 2}
    assert [samples(f"{kind}_tokens") for kind in ("prompt", "completion", "reasoning")] == [
        {"": 22},
        {"": 10},
        {"": 4},
    ]
    assert samples("engine_batch_size") == {"": 3}
    assert samples("engine_kv_used_ratio") == {"": 0.5}
    assert samples("engine_forward_passes") == {"": 12}
    assert samples("start_seconds") == {"load": 1.25, "total": 2}
    assert 0 < samples("uptime_seconds")[""] < 60
    assert families["open_synthesis_jobs"].type == families["open_synthesis_engine_forward_passes"].type == "counter"


# --- which engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables", [{}, {"ENGINE": ""}, {"ENGINE": "extractive"}, {"ENGINE": "extractive", "MODEL_ID": "a/b"}]
)
def test_the_extractive_engine(prompts: Prompts, variables: dict[str, str]) -> None:
    engine, began = start.build(prompts, variables)
    assert isinstance(engine, ExtractiveEngine)
    assert engine.model == {"id": "extractive", "revision": None, "engine": "extractive", "quantization": "none"}
    assert began.phases.keys() == {"python", "imports"}
    assert 0 < began.phases["python"] < 3600


@pytest.mark.parametrize("variables", [{}, {"ENGINE": "transformers", "QUANTIZATION": "none"}, {"ENGINE": ""}])
def test_the_transformers_engine(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch, model_folder: Path, variables: dict[str, str]
) -> None:
    import generative

    monkeypatch.setattr(generative, "load", lambda *arguments: arguments)
    environ = {"MODEL_ID": str(model_folder), **variables}
    given, began = start.build(prompts, environ)
    seen_prompts, model_id, weights, seen_environ, seen_start = cast(tuple[Any, ...], given)
    assert (seen_prompts, model_id, seen_environ, seen_start) == (prompts, str(model_folder), environ, began)
    assert weights.folder == model_folder
    assert began.source == "folder"
    assert began.phases.keys() == {"python", "locate", "check", "imports"}


def test_the_vllm_engine(prompts: Prompts, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    import vllm_engine

    monkeypatch.setattr(vllm_engine, "VllmEngine", lambda *arguments: arguments)
    environ = {"ENGINE": "vllm", "MODEL_ID": str(model_folder)}
    for quantization, expected in (("", "nf4"), ("none", "none"), ("nf4", "nf4")):
        given, began = start.build(prompts, {**environ, "QUANTIZATION": quantization})
        _, folder, model = cast(tuple[Any, ...], given)
        assert folder == model_folder
        assert model == {"id": str(model_folder), "revision": None, "engine": "vllm", "quantization": expected}
        assert {"imports", "load"} < began.phases.keys()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ENGINE": "transformers"}, r"ENGINE=transformers needs MODEL_ID, for example MODEL_ID="),
        ({"ENGINE": "vllm", "MODEL_ID": ""}, r"ENGINE=vllm needs MODEL_ID"),
        ({"ENGINE": "Extractive"}, r"^ENGINE=Extractive is unknown; known are extractive, transformers, vllm$"),
    ],
)
def test_an_engine_that_cannot_be(prompts: Prompts, variables: dict[str, str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        start.build(prompts, variables)


def quantised(folder: Path) -> Path:
    """Let the model's configuration say that its weights are NF4."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_that_is_quantised_cannot_be_had_without(prompts: Prompts, model_copy: Path) -> None:
    environ = {"MODEL_ID": str(quantised(model_copy)), "QUANTIZATION": "none"}
    with pytest.raises(start.Unfit, match=r"is quantised already \(nf4\), so QUANTIZATION=none cannot be had: leave"):
        start.build(prompts, environ)


def test_a_machine_that_is_not_fit_is_named_and_nothing_is_loaded(
    prompts: Prompts, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    import generative

    monkeypatch.setattr(generative, "load", lambda *arguments: pytest.fail("it was loaded"))
    monkeypatch.setattr(fitness, "ram", lambda: 10**6)
    registered: list[fitness.Results] = []
    monkeypatch.setattr(fitness, "register", registered.append)
    for platform in ({}, {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/job-take/x"}):
        with pytest.raises(start.Unfit, match=r"the model needs .* and there is no GPU, and the memory has 0\.0 GB"):
            start.build(prompts, {"MODEL_ID": str(model_folder), **platform})
    (results,) = registered
    assert {name for name, sentence in results.items() if sentence} == {"memory"}


def start_without_a_model(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The worker's program with a model that is not there; it has ended."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    return subprocess.run(
        [sys.executable, str(Path(handler_module.__file__))],
        env={
            **kept,
            "ENGINE": "transformers",
            "MODEL_ID": str(folder / "none"),
            "PROMPTS_DIR": str(Path(__file__).parents[2] / "prompts"),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


def test_without_a_platform_the_sentence_is_printed_and_the_worker_ends(tmp_path: Path) -> None:
    ended = start_without_a_model(tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert str(tmp_path) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_limits_of_the_platform_are_kept() -> None:
    assert wire.MAX_RESULT_BYTES < 10_000_000
    assert wire.MAX_CHUNK_BYTES < 1_000_000


def test_under_the_platform_the_sdk_ends_a_worker_that_is_not_fit(tmp_path: Path) -> None:
    ended = start_without_a_model(tmp_path, **worker_environment("http://127.0.0.1:9", "unfit", "key"))
    assert ended.returncode == 1
    assert "Fitness check failed: weights | RuntimeError: the model's folder" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
