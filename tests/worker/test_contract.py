"""The SDK's own worker loop, unmodified, against the local RunPod: what both believe about their wire is the same.

Every test talks to real processes over the loopback network, as a client does. The jobs that need no clean worker share
one, which takes them one after the other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.prompts import Prompts

if TYPE_CHECKING:
    from tests.worker.conftest import Cloud

SOURCES = [
    {"id": "S1", "text": "Ego depletion did not replicate in a large preregistered study.", "label": "Hagger 2016"},
    {
        "id": "S2",
        "text": "Anchoring replicates well. Ego depletion is not real, the authors say.",
        "label": "Vohs 2021",
    },
]


@pytest.fixture(scope="module")
def extractive(start_cloud: Callable[..., Cloud]) -> Cloud:
    return start_cloud(ENGINE="extractive", IMAGE="registry/worker@sha256:1")


@pytest.fixture(scope="module")
def stub(start_cloud: Callable[..., Cloud]) -> Cloud:
    return start_cloud("stub_worker.py")


@pytest.fixture(scope="module")
def streaming(start_cloud: Callable[..., Cloud]) -> Cloud:
    return start_cloud("stream_worker.py", RUNPOD_LOG_LEVEL="DEBUG")


# --- the worker as it ships --------------------------------------------------------------------------------------------


def test_run_and_status(extractive: Cloud, prompts: Prompts) -> None:
    job = extractive.run({"prompt": "Is ego depletion real?", "sources": SOURCES})
    ended = extractive.wait(job)
    assert ended["status"] == "COMPLETED", ended
    assert ended["delayTime"] >= 0
    assert ended["executionTime"] >= 0
    (output,) = ended["output"]
    timings = output.pop("timings")
    assert timings.keys() - {"cold_start"} == {"queue_ms", "prefill_ms", "decode_ms"}
    assert output == {
        "synthesis": "- Ego depletion is not real, the authors say. [S2]\n"
        "- Ego depletion did not replicate in a large preregistered study. [S1]",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "reasoning_tokens": 0},
        "model": {
            "id": "extractive",
            "revision": None,
            "engine": "extractive",
            "quantization": "none",
            "image": "registry/worker@sha256:1",
            "release": None,
        },
        "prompts": prompts.hashes,
        "dropped_sources": [],
    }


def test_runsync(extractive: Cloud) -> None:
    ended = extractive.call("POST", "runsync?wait=90000", {"input": {"prompt": "Ego depletion?", "sources": SOURCES}})
    assert ended["status"] == "COMPLETED", ended
    assert ended["output"][-1]["synthesis"].startswith("- Ego depletion")


def test_ping(extractive: Cloud, prompts: Prompts) -> None:
    ended = extractive.wait(extractive.run({"op": "ping"}))
    assert ended["status"] == "COMPLETED", ended
    (output,) = ended["output"]
    assert output["op"] == "ping"
    assert output["prompts"] == prompts.hashes


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"prompt": "Why?", "tempo": 1}, "INVALID_INPUT: unknown key tempo; known are "),
        ({"prompt": "Why?"}, "NO_SOURCES: the extractive engine quotes sources, and the job has none"),
        ([], "INVALID_INPUT: input must be an object, not a list"),
    ],
)
def test_an_error_is_the_sentence_and_nothing_else(extractive: Cloud, data: object, error: str) -> None:
    ended = extractive.wait(extractive.run(data))
    assert ended["status"] == "FAILED"
    assert ended["error"].startswith(error)
    assert "Traceback" not in json.dumps(ended)
    assert "output" not in ended


def test_the_log_holds_no_question(extractive: Cloud) -> None:
    ended = extractive.wait(extractive.run({"prompt": "Is Kryptonite real?", "sources": SOURCES}))
    assert ended["status"] == "COMPLETED", ended
    log = extractive.log.read_text()
    assert ended["id"] in log
    assert "Kryptonite" not in log
    assert "Ego depletion" not in log


def test_a_language_model(start_cloud: Callable[..., Cloud], model_folder: Path) -> None:
    cloud = start_cloud(ENGINE="transformers", MODEL_ID=str(model_folder))
    data = {"prompt": "Is it?", "sources": SOURCES, "temperature": 0, "max_new_tokens": 5}
    ended = cloud.wait(cloud.run(data), seconds=110)
    assert ended["status"] == "COMPLETED", ended
    (output,) = ended["output"]
    assert output["synthesis"]
    assert output["finish_reason"] == "length"
    assert output["usage"]["completion_tokens"] == 5
    assert output["model"]["engine"] == "transformers"
    assert output["model"]["image"] is None
    started = output["timings"]["cold_start"]
    assert started["weights_from"] == "folder"
    assert {
        f"{phase}_ms" for phase in ("python", "locate", "check", "imports", "load", "warmup", "total")
    } < started.keys()
    streamed = cloud.wait(cloud.run({**data, "stream": True}))
    *chunks, last = streamed["output"]
    assert "".join(chunk["text"] for chunk in chunks) == last["synthesis"] == output["synthesis"]
    assert "cold_start" not in last["timings"]
    long = cloud.run({**data, "max_new_tokens": 1500, "stream": True})
    cloud.wait(long, "IN_PROGRESS")
    time.sleep(0.5)
    cloud.call("POST", f"cancel/{long}")
    end = time.monotonic() + 5
    numbers = ""
    while 'open_synthesis_jobs_total{code="CANCELLED"} 1.0' not in numbers:
        assert time.monotonic() < end, numbers
        (told,) = cloud.wait(cloud.run({"op": "metrics"}))["output"]
        numbers = told["metrics"]
    assert "open_synthesis_engine_batch_size " in numbers


# --- the worker around a stub engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    [
        "costs $5 \"or\" 'more' {braces} {{question}} `x` $(y) \\n \\",
        "line\n\ttab\r\n 👩‍🔬 日本語 e\u0301 \u202e\u2028 ends",
    ],
)
def test_a_question_arrives_byte_for_byte(stub: Cloud, question: str) -> None:
    ended = stub.wait(stub.run({"prompt": question, "seed": 2**63 - 1, "context": question}))
    assert ended["status"] == "COMPLETED", ended
    seen = json.loads(ended["output"][0]["synthesis"])
    assert (seen["prompt"], seen["context"], seen["seed"]) == (question, question, 2**63 - 1)


def test_a_cancelled_job_makes_room_for_the_next(stub: Cloud) -> None:
    job = stub.run({"prompt": "wait for cancel"})
    worker = stub.wait_for("began wait for cancel")
    following = stub.run({"prompt": "next after cancel"})
    assert stub.call("POST", f"cancel/{job}")["status"] == "CANCELLED"
    assert stub.wait_for("cancelled wait for cancel", 10) == worker
    assert stub.wait(following, seconds=15)["status"] == "COMPLETED"
    assert stub.wait_for("began next after cancel", 1) == worker, "the same process"
    assert stub.status(job)["status"] == "CANCELLED"
    assert "output" not in stub.status(job)


def test_the_execution_timeout_stops_a_job(stub: Cloud) -> None:
    job = stub.run({"prompt": "wait for the timeout"}, executionTimeout=5000)
    worker = stub.wait_for("began wait for the timeout")
    ended = stub.wait(job, seconds=20)
    assert ended["status"] == "TIMED_OUT"
    assert 5000 <= ended["executionTime"] < 10_000
    assert stub.wait_for("cancelled wait for the timeout", 10) == worker
    assert stub.wait(stub.run({"prompt": "next after timeout"}), seconds=15)["status"] == "COMPLETED"


def test_a_killed_worker_s_job_is_given_to_the_next_one(stub: Cloud) -> None:
    job = stub.run({"prompt": "wait once for the kill"})
    first = stub.wait_for("began wait once for the kill")
    os.kill(first, signal.SIGKILL)
    ended = stub.wait(job)
    assert ended["status"] == "COMPLETED", ended
    assert ended["retries"] == 1
    assert ended["delayTime"] >= 0
    assert stub.wait_for("began wait once for the kill") != first


def test_a_crash_ends_real_workers_and_then_the_job(start_cloud: Callable[..., Cloud]) -> None:
    cloud = start_cloud("stub_worker.py")
    armed = cloud.call("POST", "__faults__", {"kind": "crash"}, server=True)["armed"]
    assert [fault["kind"] for fault in armed] == ["crash"]
    ended = cloud.wait(cloud.run({"prompt": "wait for the crash"}))
    assert ended["status"] == "FAILED"
    assert ended["error"] == "job timed out after 1 retries"
    assert ended["retries"] == 1
    assert len({line.split()[0] for line in cloud.events()}) == 2, "two processes have seen the job"
    assert cloud.log.read_text().count(f"ended with exit code {-signal.SIGKILL}") == 2
    assert cloud.wait(cloud.run({"prompt": "after the crash"}))["status"] == "COMPLETED"


# --- what the SDK can do besides ---------------------------------------------------------------------------------------


def test_a_generator_streams(streaming: Cloud) -> None:
    job = streaming.run({"count": 3})
    ended = streaming.wait(job)
    assert ended["status"] == "COMPLETED", ended
    chunks = [{"number": number, "text": 'a "ß" 🧪\n'} for number in range(3)]
    assert streaming.call("GET", f"stream/{job}") == {
        "status": "COMPLETED",
        "stream": [{"output": chunk} for chunk in chunks],
    }
    assert streaming.call("GET", f"stream/{job}")["stream"] == [], "what was read is gone"
    assert ended["output"] == chunks


def test_several_jobs_at_once(streaming: Cloud) -> None:
    jobs = [streaming.run({"party": 3}) for _ in range(3)]
    assert [streaming.wait(job)["status"] for job in jobs] == ["COMPLETED"] * 3
    assert "/job-take-batch/" in streaming.log.read_text()


# --- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_of_it(start_cloud: Callable[..., Cloud]) -> None:
    cloud = start_cloud("stub_worker.py")
    cloud.run({"prompt": "wait for the end"})
    cloud.wait_for("began wait for the end")
    assert len(cloud.processes()) >= 3, "the server, the worker, and the process that pings for it"
    assert cloud.end() == 0
    assert cloud.processes() == set()
