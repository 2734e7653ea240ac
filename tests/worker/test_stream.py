"""The handler in the SDK's own worker loop: streaming, cancelling, taking ahead, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from tests.worker.conftest import Cloud


@pytest.fixture(scope="module")
def stub(start_cloud: Callable[..., Cloud]) -> Cloud:
    cloud = start_cloud("stub_worker.py", CAPACITY="2")
    cloud.wait(cloud.run({"op": "ping"}))  # ready
    return cloud


def arm(cloud: Cloud, **fault: Any) -> None:
    cloud.call("POST", "__faults__", fault, server=True)


def left(cloud: Cloud) -> int:
    """How many more times the armed fault would strike; then it is taken away."""
    armed = cloud.call("GET", "__faults__", server=True)["armed"]
    cloud.call("DELETE", "__faults__", server=True)
    return sum(fault["times"] for fault in armed)


def test_chunks_are_the_synthesis_and_the_aggregate_ends_with_the_answer(stub: Cloud) -> None:
    job = stub.run({"prompt": "stream 20 10", "stream": True})
    first = time.monotonic()
    seen: list[Any] = []
    while not seen:
        seen += stub.call("GET", f"stream/{job}")["stream"]
        assert time.monotonic() - first < 30
    assert stub.status(job)["status"] == "IN_PROGRESS", "chunks are there before the end"
    ended = stub.wait(job)
    seen += stub.call("GET", f"stream/{job}")["stream"]
    assert ended["status"] == "COMPLETED", ended
    *before, last = ended["output"]
    assert [chunk["output"] for chunk in seen] == ended["output"]
    assert "".join(chunk["text"] for chunk in before) == last["synthesis"] == "".join(f"{n} " for n in range(20))


def test_a_slow_platform_costs_few_requests_and_little_time(stub: Cloud) -> None:
    arm(stub, kind="slow", route="job-stream", seconds=0.05, times=1000)
    stub.wait(stub.run({"op": "ping"}))
    job = stub.run({"prompt": "stream 100 10", "stream": True})
    stub.wait(job, "IN_PROGRESS")
    begun = time.monotonic()
    ended = stub.wait(job)
    took = time.monotonic() - begun
    posts = 1000 - left(stub) - 1
    assert ended["status"] == "COMPLETED", ended
    assert took < 2, "100 requests alone would take 5 s"
    assert posts == len(ended["output"])
    assert 5 <= posts <= 25


def test_one_request_without_stream(stub: Cloud) -> None:
    ended = stub.wait(stub.run({"prompt": "stream 20 10"}))
    (answer,) = ended["output"]
    assert answer["synthesis"].startswith("0 1 2 ")


@pytest.mark.parametrize("size", [700_000, 2_000_000])
def test_a_large_answer_comes_in_chunks_that_the_platform_takes(stub: Cloud, size: int) -> None:
    # the stub's answer is the job, and it emits it at once
    job = stub.run({"prompt": "Is it?", "context": "a" * size, "stream": True})
    ended = stub.wait(job, seconds=60)
    assert ended["status"] == "COMPLETED", ended
    *before, last = ended["output"]
    assert len(before) == size // 75_000 + 1
    assert "".join(chunk["text"] for chunk in before) == last["synthesis"]
    streamed = [chunk["output"] for chunk in stub.call("GET", f"stream/{job}")["stream"]]
    # An answer of more than a megabyte is no chunk: it is in the job's output only.
    assert streamed == (ended["output"] if size < 1_000_000 else before)


@pytest.mark.parametrize("state", ["waiting for text", "sending text"])
def test_a_cancelled_job_stops_the_engine_within_a_second(stub: Cloud, state: str) -> None:
    prompt = f"stream 3 20 wait {state}"
    if state == "sending text":
        arm(stub, kind="slow", route="job-stream", seconds=30, times=2)
    job = stub.run({"prompt": prompt, "stream": True})
    worker = stub.wait_for(f"began {prompt}")
    time.sleep(0.5)  # all the text is there; it is being sent, or was
    if state == "sending text":
        assert left(stub) == 1
    assert stub.call("POST", f"cancel/{job}")["status"] == "CANCELLED"
    begun = time.monotonic()
    assert stub.wait_for(f"cancelled {prompt}", 5) == worker
    assert time.monotonic() - begun < 1
    assert stub.wait(stub.run({"prompt": "next"}), seconds=15)["status"] == "COMPLETED"
    assert stub.wait_for("began next", 1) == worker
    assert stub.status(job)["status"] == "CANCELLED"


def test_the_worker_holds_twice_what_the_engine_runs_and_no_more(stub: Cloud) -> None:
    jobs = [stub.run({"prompt": f"sleep 0.4 number {number}"}) for number in range(12)]
    most = 0
    while any(stub.status(job)["status"] != "COMPLETED" for job in jobs[-1:]):
        counts = stub.call("GET", "health")["jobs"]
        most = max(most, counts["inProgress"])
        time.sleep(0.02)
    assert most == 4, "capacity 2"
    for job in jobs:
        assert stub.wait(job)["status"] == "COMPLETED"
    running = peak = 0
    for line in stub.events():
        what = line.split(" ", 1)[1]
        if " sleep 0.4 number" in line:
            running += 1 if what.startswith("began") else -1
            peak = max(peak, running)
    assert (running, peak) == (0, 2)


def test_metrics_on_request(stub: Cloud) -> None:
    ended = stub.wait(stub.run({"op": "metrics"}))
    (answer,) = ended["output"]
    families = {family.name: family for family in text_string_to_metric_families(answer["metrics"])}
    jobs = {sample.labels["code"]: sample.value for sample in families["open_synthesis_jobs"].samples}
    assert jobs["OK"] > 5
    assert jobs["CANCELLED"] == 2
    assert families["open_synthesis_jobs_in_flight"].samples[0].value == 1
    assert families["open_synthesis_engine_kv_used_ratio"].samples[0].value == 0.25
    assert {"load", "total"} == {sample.labels["phase"] for sample in families["open_synthesis_start_seconds"].samples}


def test_bad_input_leaves_the_worker_alive(stub: Cloud) -> None:
    worker = stub.wait_for("began next", 1)
    for data in ({"prompt": 5}, {"op": "x"}, {"prompt": "?", "stream": "yes"}, ["a"], {"prompt": "?", "seed": 0.5}):
        assert stub.wait(stub.run(data))["error"].startswith("INVALID_INPUT: ")
    assert stub.wait(stub.run({"prompt": "still there"}))["status"] == "COMPLETED"
    assert stub.wait_for("began still there", 1) == worker
