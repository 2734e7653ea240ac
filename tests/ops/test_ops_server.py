"""local_runpod.server over loopback HTTP, from both sides: as a client sends jobs and as a worker takes them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from local_server import KEY, Answer, Clock, Runpod, local_server

from local_runpod import server as server_module
from local_runpod.faults import FAULT_KINDS
from local_runpod.server import Server

CLIENT_ROUTES = [
    ("POST", "run"),
    ("POST", "runsync"),
    ("GET", "status/j"),
    ("GET", "stream/j"),
    ("POST", "cancel/j"),
    ("POST", "retry/j"),
    ("POST", "purge-queue"),
    ("GET", "health"),
]
WORKER_ROUTES = [
    ("GET", "job-take/w"),
    ("GET", "job-take-batch/w"),
    ("GET", "job-stop/w"),
    ("GET", "ping/w"),
    ("POST", "job-done/w/j"),
    ("POST", "job-stream/w/j"),
]


@dataclass
class Remote:
    """The endpoint `local`, as its clients and its workers see it."""

    runpod: Runpod
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4))

    @property
    def port(self) -> int:
        return self.runpod.port

    @property
    def server(self) -> Server:
        return self.runpod.server

    @property
    def clock(self) -> Clock:
        return self.runpod.clock

    def send(self, method: str, path: str, body: bytes | None = None, authorization: str | None = None) -> Answer:
        return self.runpod.send(method, path, body, authorization)

    def client(self, method: str, route: str, data: object = None) -> Answer:
        return self.runpod.call(method, f"local/{route}", data)

    def worker(self, method: str, route: str, data: object = None) -> Answer:
        body = None if data is None else json.dumps(data).encode()
        return self.send(method, f"/v2/local/{route}", body, KEY)

    def arm(self, kind: str, **more: object) -> None:
        self.runpod.arm(kind, **more)

    def run(self, **job_input: object) -> str:
        """Submit a job, give its id."""
        answer = self.client("POST", "run", {"input": job_input or {"prompt": "q"}})
        assert answer.status == 200, answer.body
        return str(answer.json["id"])

    def running(self) -> str:
        """Submit a job and let worker w take it."""
        job = self.run()
        assert self.worker("GET", "job-take/w").json["id"] == job
        return job


@pytest.fixture
def remote() -> Iterator[Remote]:
    """A server on a free loopback port, in a thread of its own; what is held open is held for 50 ms only."""
    with local_server() as runpod:
        remote = Remote(runpod)
        yield remote
        remote.pool.shutdown()


# --- who may call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "route"), CLIENT_ROUTES)
@pytest.mark.parametrize("authorization", [None, "", KEY, f"bearer {KEY}", f"Bearer {KEY}x", "Bearer ", "Bearer ké"])
def test_a_client_route_wants_the_bearer_key(
    remote: Remote, method: str, route: str, authorization: str | None
) -> None:
    sent = authorization.encode().decode("latin-1") if authorization else authorization
    answer = remote.send(method, f"/v2/local/{route}", b'{"input": {}}', sent)
    assert (answer.status, answer.json) == (401, {"error": "unauthorized"})
    assert remote.server.platform.jobs == {}


@pytest.mark.parametrize(("method", "route"), WORKER_ROUTES)
@pytest.mark.parametrize("authorization", [None, f"Bearer {KEY}", "other"])
def test_a_worker_route_wants_the_raw_key(remote: Remote, method: str, route: str, authorization: str | None) -> None:
    answer = remote.send(method, f"/v2/local/{route}", b"{}", authorization)
    assert (answer.status, answer.json) == (401, {"error": "unauthorized"})
    assert remote.server.platform.workers == {}


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("authorization", [None, KEY, "Bearer other"])
def test_the_fault_knobs_want_the_bearer_key(remote: Remote, method: str, authorization: str | None) -> None:
    assert remote.send(method, "/__faults__", b'{"kind": "http"}', authorization).status == 401
    assert remote.server.platform.faults == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/other/run", 404),
        ("GET", "/v2/other/health", 404),
        ("GET", "/v2/local/no-such-route", 404),
        ("GET", "/v2/local/status/no-such-job", 404),
        ("POST", "/v2/local/cancel/no-such-job", 404),
        ("GET", "/", 404),
        ("GET", "/v2/local/run", 405),
        ("POST", "/v2/local/health", 405),
    ],
)
def test_what_does_not_exist_is_not_found(remote: Remote, method: str, path: str, status: int) -> None:
    assert remote.send(method, path, None, f"Bearer {KEY}").status == status


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["run", "runsync"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"input=1",
        b'{"input": NaN}',
        b'{"input": Infinity}',
        b'{"input": -Infinity}',
        b'{"input": "\xff"}',
        b"[" * 100_000,
        b"[]",
        b'{"prompt": "q"}',
        b'{"input": {}, "policy": {"ttl": 1}}',
    ],
)
def test_a_body_that_is_no_job_is_refused_with_a_reason(remote: Remote, route: str, body: bytes) -> None:
    answer = remote.send("POST", f"/v2/local/{route}", body, f"Bearer {KEY}")
    assert answer.status == 400
    assert isinstance(answer.json["error"], str)
    assert remote.server.platform.jobs == {}


def sized(size: int) -> bytes:
    """A JSON body of this many bytes that is a job, a result and a chunk alike."""
    frame = b'{"input":{},"output":""}'
    return frame[:-2] + b"x" * (size - len(frame)) + frame[-2:]


@pytest.mark.parametrize(
    ("route", "authorization", "most"),
    [
        ("run", f"Bearer {KEY}", 10_000_000),
        ("runsync", f"Bearer {KEY}", 20_000_000),
        ("job-done/w/j", KEY, 10_000_000),
        ("job-stream/w/j", KEY, 1_000_000),
    ],
)
def test_a_body_beyond_the_limit_of_its_route_is_too_large(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, route: str, authorization: str, most: int
) -> None:
    monkeypatch.setattr(server_module, "SYNC_WAIT_MS", (0, 0, 0))
    assert remote.send("POST", f"/v2/local/{route}", sized(most), authorization).status == 200
    refused = remote.send("POST", f"/v2/local/{route}", sized(most + 1), authorization)
    assert refused.status == 413
    assert refused.json == {"error": f"the body has {most + 1} bytes, {most} are allowed"}


def test_a_body_beyond_every_limit_is_not_even_read(remote: Remote) -> None:
    refused = remote.send("POST", "/v2/local/runsync", b" " * 21_100_000, f"Bearer {KEY}")
    assert (refused.status, refused.json) == (413, {"error": "the body is too large"})


# --- the way of a job ------------------------------------------------------------------------------------------------


def test_a_job_goes_from_client_to_worker_and_back_byte_for_byte(remote: Remote) -> None:
    job_input = {"prompt": "costs $5 \"or\" 'more' {{x}} 👩🏽‍🔬\n", "top_p": 0.9, "seed": None}
    submitted = remote.client("POST", "run", {"input": job_input})
    job = submitted.json["id"]
    assert (submitted.status, submitted.json) == (200, {"id": job, "status": "IN_QUEUE"})
    assert remote.client("GET", f"status/{job}").json == {"id": job, "status": "IN_QUEUE"}
    assert remote.worker("GET", "job-take/w?gpu=none&job_in_progress=0").json == {"id": job, "input": job_input}
    assert remote.client("GET", f"status/{job}").json["status"] == "IN_PROGRESS"
    done = remote.worker("POST", f"job-done/w/{job}?gpu=none&isStream=false", {"output": job_input})
    assert (done.status, done.json) == (200, {})
    view = remote.client("GET", f"status/{job}").json
    assert (view["status"], view["output"], view["workerId"]) == ("COMPLETED", job_input, "w")


def test_a_worker_that_finds_no_job_gets_204(remote: Remote) -> None:
    for route in ("job-take/w", "job-take-batch/w?batch_size=3", "job-stop/w"):
        answer = remote.worker("GET", route)
        assert (answer.status, answer.body) == (204, b"")


def test_a_batch_is_a_list_of_at_most_its_size(remote: Remote) -> None:
    jobs = [remote.run() for _ in range(4)]
    batch = remote.worker("GET", "job-take-batch/w?batch_size=3").json
    assert [job["id"] for job in batch] == jobs[:3]
    assert [job["id"] for job in remote.worker("GET", "job-take-batch/w?batch_size=3").json] == jobs[3:]


def test_a_waiting_worker_gets_a_job_as_soon_as_it_is_there(remote: Remote) -> None:
    remote.server.hold = 15.0
    took = []
    for _ in range(4):
        waiting = remote.pool.submit(remote.worker, "GET", "job-take/w")
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        start = time.monotonic()
        job = remote.run()
        assert waiting.result(5).json["id"] == job
        took.append(time.monotonic() - start)
    assert min(took) < 0.2  # it is woken; looking around twice a second would take longer


def test_a_worker_that_has_hung_up_is_given_no_job(remote: Remote) -> None:
    remote.server.hold = 0.5
    with socket.create_connection(("127.0.0.1", remote.port)) as connection:
        request = f"GET /v2/local/job-take/gone HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\n\r\n"
        connection.sendall(request.encode())
        until(lambda: "gone" in remote.server.platform.workers)
    job = remote.run()
    assert remote.worker("GET", "job-take/w").json["id"] == job


def until(ready: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("result", [b"", b"[1]", b"NaN", b"null"])
def test_a_result_that_is_no_json_object_is_refused(remote: Remote, result: bytes) -> None:
    job = remote.running()
    assert remote.send("POST", f"/v2/local/job-done/w/{job}", result, KEY).status == 400
    assert remote.client("GET", f"status/{job}").json["status"] == "IN_PROGRESS"


def test_a_stream_is_drained_chunk_by_chunk(remote: Remote) -> None:
    job = remote.running()
    for chunk in ("a", "b"):
        assert remote.worker("POST", f"job-stream/w/{job}?isStream=true", {"output": chunk}).status == 200
    first = remote.client("GET", f"stream/{job}").json
    assert first == {"status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": "b"}]}
    remote.worker("POST", f"job-done/w/{job}", {"output": "ab"})
    assert remote.client("GET", f"stream/{job}").json == {"status": "COMPLETED", "stream": []}


def test_a_cancelled_job_reaches_its_worker_at_once(remote: Remote) -> None:
    remote.server.hold = 15.0
    job = remote.running()
    told = remote.pool.submit(remote.worker, "GET", "job-stop/w")
    with pytest.raises(TimeoutError):
        told.result(0.1)
    assert remote.client("POST", f"cancel/{job}").json == {"id": job, "status": "CANCELLED"}
    assert told.result(5).json == {"jobsToStop": [job]}


def test_a_time_limit_reaches_the_worker_too(remote: Remote) -> None:
    job = remote.running()
    remote.worker("GET", "ping/w")
    remote.clock.ahead += 601
    remote.worker("GET", "ping/w")
    assert remote.client("GET", f"status/{job}").json["status"] == "TIMED_OUT"
    assert remote.worker("GET", "job-stop/w").json == {"jobsToStop": [job]}
    assert remote.worker("GET", "job-stop/w").status == 204


def test_a_failed_job_is_retried_under_its_id_and_others_are_not(remote: Remote) -> None:
    job = remote.running()
    assert remote.client("POST", f"retry/{job}").status == 400
    remote.worker("POST", f"job-done/w/{job}", {"error": "INTERNAL: x"})
    assert remote.client("POST", f"retry/{job}").json == {"id": job, "status": "IN_QUEUE"}
    assert remote.worker("GET", "job-take/w").json["id"] == job


def test_a_purge_and_the_health_tell_their_counts(remote: Remote) -> None:
    remote.running()
    for _ in range(2):
        remote.run()
    assert remote.client("GET", "health").json["jobs"]["inQueue"] == 2
    assert remote.client("POST", "purge-queue").json == {"removed": 2, "status": "completed"}
    assert remote.client("GET", "health").json == {
        "jobs": {"completed": 0, "failed": 0, "inProgress": 1, "inQueue": 0, "retried": 0},
        "workers": {"idle": 0, "initializing": 0, "ready": 1, "running": 1, "throttled": 0, "unhealthy": 0},
    }


def test_pings_keep_a_worker_and_silence_loses_it(remote: Remote) -> None:
    job = remote.running()
    for _ in range(3):
        remote.clock.ahead += 20
        assert remote.worker("GET", "ping/w?job_id=x").json == {}
    assert remote.client("GET", f"status/{job}").json["status"] == "IN_PROGRESS"
    remote.clock.ahead += 31
    assert remote.client("GET", f"status/{job}").json == {"id": job, "status": "IN_QUEUE"}
    assert remote.worker("GET", "job-take/w2").json["id"] == job
    assert remote.client("GET", f"status/{job}").json["retries"] == 1


# --- runsync ---------------------------------------------------------------------------------------------------------


def test_runsync_answers_with_the_finished_job(remote: Remote) -> None:
    remote.server.hold = 15.0
    answer = remote.pool.submit(remote.client, "POST", "runsync", {"input": {"prompt": "q"}})
    job = remote.worker("GET", "job-take/w").json["id"]
    remote.worker("POST", f"job-done/w/{job}", {"output": 7})
    view = answer.result(5).json
    assert (view["id"], view["status"], view["output"]) == (job, "COMPLETED", 7)


def test_runsync_answers_with_the_waiting_job_when_its_time_is_up(remote: Remote) -> None:
    start = time.monotonic()
    view = remote.client("POST", "runsync?wait=1000", {"input": {}}).json
    assert 0.9 < time.monotonic() - start < 5
    assert view["status"] == "IN_QUEUE"
    assert remote.client("GET", f"status/{view['id']}").json["status"] == "IN_QUEUE"


@pytest.mark.parametrize("wait", ["999", "300001", "-1", "0", "1e4", "abc", "", "9" * 5000, "1000.5"])
def test_runsync_refuses_a_wait_outside_its_window(remote: Remote, wait: str) -> None:
    answer = remote.client("POST", f"runsync?wait={wait}", {"input": {}})
    assert (answer.status, answer.json) == (400, {"error": "wait must be between 1000 and 300000 milliseconds"})
    assert remote.server.platform.jobs == {}


# --- faults ----------------------------------------------------------------------------------------------------------


def test_faults_are_listed_armed_and_cleared(remote: Remote) -> None:
    def knobs(method: str, data: object = None) -> Answer:
        body = None if data is None else json.dumps(data).encode()
        return remote.send(method, "/__faults__", body, f"Bearer {KEY}")

    assert knobs("GET").json == {"armed": [], "kinds": FAULT_KINDS}
    armed = {"kind": "http", "route": "run", "times": 2, "status": 429, "retry_after": 3, "seconds": 1.0}
    armed |= {"image": None, "message": None}
    assert knobs("POST", {"kind": "http", "route": "run", "times": 2, "status": 429, "retry_after": 3}).json[
        "armed"
    ] == [armed]
    assert knobs("GET").json["armed"] == [armed]
    assert knobs("POST", {"kind": "explode"}).status == 400
    assert knobs("POST", {"kind": []}).status == 400
    assert knobs("PUT", {"kind": "http"}).status == 405
    assert knobs("DELETE").json["armed"] == []


@pytest.mark.parametrize(
    ("retry_after", "header"), [({}, None), ({"retry_after": 2}, "2"), ({"retry_after": 0.5}, "0.5")]
)
def test_an_http_fault_answers_instead_of_serving(
    remote: Remote, retry_after: dict[str, float], header: str | None
) -> None:
    remote.arm("http", route="run", status=429, **retry_after)
    refused = remote.client("POST", "run", {"input": {}})
    assert (refused.status, refused.json) == (429, {"error": "fault injected"})
    assert refused.headers.get("Retry-After") == header
    assert remote.server.platform.jobs == {}
    assert remote.client("POST", "run", {"input": {}}).status == 200


@pytest.mark.parametrize(("method", "route"), CLIENT_ROUTES)
def test_every_client_route_can_be_struck(remote: Remote, method: str, route: str) -> None:
    remote.arm("http", route=route.split("/")[0], status=500)
    assert remote.client(method, route).status == 500


def test_a_request_without_the_key_uses_up_no_fault(remote: Remote) -> None:
    remote.arm("http")
    assert remote.send("GET", "/v2/local/health").status == 401
    assert remote.client("GET", "health").status == 503


@pytest.mark.parametrize(("method", "route"), WORKER_ROUTES)
def test_workers_are_not_struck_by_a_fault_of_every_route(remote: Remote, method: str, route: str) -> None:
    remote.arm("http")
    assert remote.worker(method, route, {} if method == "POST" else None).status < 300


@pytest.mark.parametrize("route", ["job-stream", "job-done"])
def test_what_a_worker_sends_can_be_struck(remote: Remote, route: str) -> None:
    remote.arm("http", route=route, status=500)
    remote.arm("slow", route=route, seconds=0.2, times=2)
    assert remote.worker("POST", f"{route}/w/j", {}).status == 500
    start = time.monotonic()
    assert remote.worker("POST", f"{route}/w/j", {}).status == 200
    assert 0.2 <= time.monotonic() - start < 3


def test_an_html_page_comes_with_status_200(remote: Remote) -> None:
    remote.arm("html", route="status")
    page = remote.client("GET", "status/j")
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")
    assert page.body.startswith(b"<html>")


def test_a_slow_request_is_served_late(remote: Remote) -> None:
    remote.arm("slow", route="health", seconds=0.2)
    start = time.monotonic()
    assert remote.client("GET", "health").json["jobs"]["completed"] == 0
    assert 0.2 <= time.monotonic() - start < 3


def test_a_slow_request_is_served_even_if_the_client_has_left(remote: Remote) -> None:
    remote.arm("slow", route="run", seconds=0.3)
    gone = http.client.HTTPConnection("127.0.0.1", remote.port)
    gone.request("POST", "/v2/local/run", json.dumps({"input": {"prompt": "q"}}), {"Authorization": f"Bearer {KEY}"})
    gone.close()
    end = time.monotonic() + 5
    while remote.client("GET", "health").json["jobs"]["inQueue"] != 1:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_lost_answer_drops_the_connection_after_the_job_was_queued(remote: Remote) -> None:
    remote.arm("lost_answer", route="run")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        remote.client("POST", "run", {"input": {"prompt": "q"}})
    assert remote.client("GET", "health").json["jobs"]["inQueue"] == 1
    assert remote.worker("GET", "job-take/w").json["input"] == {"prompt": "q"}


def test_a_made_up_state_is_reported_once(remote: Remote) -> None:
    job = remote.run()
    remote.arm("unknown_state")
    assert remote.client("GET", "health").json["jobs"]["inQueue"] == 1
    assert remote.client("GET", f"status/{job}").json == {"id": job, "status": "WARMING_UP"}
    assert remote.client("GET", f"status/{job}").json == {"id": job, "status": "IN_QUEUE"}


def test_a_crash_ends_the_worker_that_this_server_started(remote: Remote) -> None:
    killed = threading.Event()
    remote.server.kill_worker = killed.set
    remote.running()
    assert not killed.wait(0.4)
    remote.arm("crash")
    remote.running()
    assert killed.wait(5)
