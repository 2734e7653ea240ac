"""The door to the management API, against a scripted server on loopback: retries, refusals, and what is never repeated."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import runpod_api
from common.problems import REMOTE_FAILED, TRY_LATER, Problem
from runpod_api import Api, ApiError, NoCapacity, NotFound, Unknown

KEY = "rpa_THISISNOTAKEYOFANYBODY000"
Answer = tuple[int, dict[str, str], bytes] | None  # None: the connection drops without an answer


class Scripted:
    """Answers requests from a list, in order, and keeps what was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.seen: list[tuple[str, str, Any, dict[str, str]]] = []

    def then(self, status: int, body: Any = None, **headers: str) -> Scripted:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.answers.append((status, {key.replace("_", "-"): value for key, value in headers.items()}, data))
        return self

    def drop(self) -> Scripted:
        self.answers.append(None)
        return self

    @property
    def calls(self) -> list[str]:
        return [f"{method} {path}" for method, path, _, _ in self.seen]


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, str]]:
    script = Scripted()

    class Handler(BaseHTTPRequestHandler):
        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            script.seen.append((self.command, self.path, json.loads(body) if body else None, dict(self.headers)))
            answer = script.answers.pop(0)
            if answer is None:
                self.close_connection = True
                return
            status, headers, data = answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = serve

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield script, f"http://127.0.0.1:{server.server_address[1]}/v2"
    server.shutdown()
    thread.join()
    server.server_close()


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


Made = tuple[Scripted, Api, Time]


@pytest.fixture
def made(scripted: tuple[Scripted, str]) -> Made:
    script, url = scripted
    time = Time()
    return script, Api(KEY, url, clock=time, sleep=time.sleep), time


def test_a_plain_answer_with_fields_that_nobody_knows(made: Made) -> None:
    script, api, _ = made
    script.then(200, {"id": "e", "somethingNew": [1]})
    assert api.get("serverless/e", {"a": "b c"}) == {"id": "e", "somethingNew": [1]}
    method, path, _, headers = script.seen[0]
    assert (method, path) == ("GET", "/v2/serverless/e?a=b+c")
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in path


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 524])
def test_what_passes_by_is_tried_again(made: Made, status: int) -> None:
    script, api, time = made
    script.then(status, b"<html>busy</html>").then(status, {"title": "x", "status": status, "detail": "busy"}).then(
        200, {"ok": 1}
    )
    assert api.get("x") == {"ok": 1}
    assert len(time.slept) == 2


def test_retry_after_is_waited_for(made: Made) -> None:
    script, api, time = made
    script.then(429, None, Retry_After="7").then(200, {})
    api.get("x")
    assert time.slept == [7.0]


def test_a_lost_answer_of_a_harmless_call_is_asked_for_again(made: Made) -> None:
    script, api, _ = made
    script.drop().then(200, {"ok": 1}).drop().then(200, {"ok": 2}).drop().then(204)
    assert api.get("x") == {"ok": 1}
    assert api.patch("x", {"a": 1}) == {"ok": 2}
    assert api.delete("x") is True


def test_trying_again_ends(made: Made) -> None:
    script, api, time = made
    for _ in range(100):
        script.then(503)
    with pytest.raises(ApiError, match=r"HTTP 503.*try again later") as problem:
        api.get("x")
    assert problem.value.code == TRY_LATER
    assert time.now <= runpod_api.RETRY_BUDGET


@pytest.mark.parametrize(
    "lose",
    [
        Scripted.drop,
        lambda script: script.then(500),
        lambda script: script.then(504, b"<html>"),
        lambda script: script.then(200, b"<html>"),
    ],
)
def test_a_create_whose_fate_is_unknown_is_never_repeated(made: Made, lose: Callable[[Scripted], Scripted]) -> None:
    script, api, _ = made
    lose(script)
    with pytest.raises(Unknown) as problem:
        api.create("serverless", {"name": "a"})
    assert script.calls == ["POST /v2/serverless"]
    assert problem.value.code == TRY_LATER


def test_a_create_that_was_certainly_refused_is_tried_again(made: Made) -> None:
    script, api, _ = made
    script.then(429, None, Retry_After="1").then(201, {"id": "e"})
    assert api.create("serverless", {"name": "a"}) == {"id": "e"}
    assert len(script.calls) == 2


def test_without_a_connection_nothing_was_made(scripted: tuple[Scripted, str]) -> None:
    time = Time()
    api = Api(KEY, "http://127.0.0.1:9/v2", clock=time, sleep=time.sleep)
    with pytest.raises(ApiError) as problem:
        api.create("serverless", {})
    assert not isinstance(problem.value, Unknown)
    assert len(time.slept) > 3


def test_problem_json_becomes_a_sentence_with_the_field(made: Made) -> None:
    script, api, time = made
    script.then(
        422,
        {
            "title": "Unprocessable",
            "status": 422,
            "detail": "request body is invalid",
            "errors": ["$.workers: additional properties 'most' not allowed"],
        },
    )
    with pytest.raises(
        ApiError,
        match=r"POST /serverless: HTTP 422: request body is invalid; \$\.workers: additional properties 'most'",
    ) as problem:
        api.create("serverless", {})
    assert (problem.value.code, problem.value.status, time.slept) == (REMOTE_FAILED, 422, [])


@pytest.mark.parametrize(
    ("status", "detail", "says", "code"),
    [
        (401, "no", "check RUNPOD_API_KEY", REMOTE_FAILED),
        (402, "insufficient balance", "add funds", REMOTE_FAILED),
        (403, "forbidden", "give it the permission", REMOTE_FAILED),
        (400, "workers quota exceeded for this account", "account's limit", REMOTE_FAILED),
        (403, "You have reached the limit of endpoints", "account's limit", REMOTE_FAILED),
        (410, "gone", "retired", REMOTE_FAILED),
        (409, "not now", "refused", REMOTE_FAILED),
        (301, "", "refused", REMOTE_FAILED),
    ],
)
def test_what_is_final_says_what_to_do_and_is_asked_once(
    made: Made, status: int, detail: str, says: str, code: int
) -> None:
    script, api, time = made
    script.then(status, {"detail": detail}, Location="http://127.0.0.1:9/")
    with pytest.raises(ApiError, match=says) as problem:
        api.get("x")
    assert (problem.value.code, len(script.calls), time.slept) == (code, 1, [])
    assert KEY not in str(problem.value)


def test_no_machine_is_told_from_a_bad_request(made: Made) -> None:
    script, api, _ = made
    script.then(400, {"detail": "There are no longer any instances available with the requested specifications."})
    with pytest.raises(NoCapacity) as problem:
        api.create("serverless", {})
    assert problem.value.code == TRY_LATER


def test_not_found_and_deleting_what_is_gone(made: Made) -> None:
    script, api, _ = made
    script.then(404, {"detail": "endpoint not found"}).then(404, {}).then(204)
    with pytest.raises(NotFound):
        api.get("serverless/x")
    assert api.delete("serverless/x") is False
    assert api.delete("serverless/x") is True


@pytest.mark.parametrize("body", [b"[]", b"null", b"", b"\xff\xfe", b"{" * 100_000])
def test_an_answer_that_is_no_object_is_no_answer(made: Made, body: bytes) -> None:
    script, api, _ = made
    for _ in range(50):
        script.then(200, body)
    with pytest.raises(ApiError, match="not a JSON object"):
        api.get("x")


def test_a_list_over_pages(made: Made) -> None:
    script, api, _ = made
    script.then(200, {"pods": [{"id": "a"}], "nextCursor": "c/1"}).then(
        200, {"pods": [{"id": "b"}], "nextCursor": None}
    )
    assert [pod["id"] for pod in api.list("pods", "pods", {"x": "1"})] == ["a", "b"]
    assert script.calls == ["GET /v2/pods?x=1", "GET /v2/pods?x=1&cursor=c%2F1"]


def test_a_cursor_that_leads_in_a_circle_ends(made: Made) -> None:
    script, api, _ = made
    for _ in range(5):
        script.then(200, {"pods": [{"id": "a"}], "cursor": "same"})
    assert len(api.list("pods", "pods")) == 2


@pytest.mark.parametrize("body", [{}, {"pods": None}, {"pods": ["a"]}, {"pods": {}}])
def test_a_list_that_is_none(made: Made, body: Any) -> None:
    script, api, _ = made
    script.then(200, body)
    with pytest.raises(ApiError, match="holds no list `pods`"):
        api.list("pods", "pods")


def test_the_end_of_a_log(made: Made) -> None:
    script, api, _ = made
    events = b'event: log\ndata: {"source": "system", "line": "pull failed\\u001b[31m", "ts": "x"}\n\n: ping\n\ndata: plain hf_AbCdEfGhIjKlMnOpQrStUv\n\n'
    script.then(200, events, Content_Type="text/event-stream").then(404, {})
    assert api.log_lines("serverless/e/workers/w/logs", "system", 5) == ["pull failed", "plain [hidden]"]
    assert script.calls == ["GET /v2/serverless/e/workers/w/logs?source=system&tail=5"]
    with pytest.raises(ApiError, match="404"):
        api.log_lines("serverless/e/workers/w/logs", "system", 5)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "RUNPOD_API_KEY is not set"),
        ({"RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": "http://api.example.com/v2"}, "unencrypted"),
        ({"RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": "ftp://x"}, "is not a URL"),
        ({"RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": "https://rest.runpod.io/v1"}, "retired"),
        ({"RUNPOD_API_KEY": KEY, "RUNPOD_API_URL": "https://api.runpod.io/graphql"}, "retired"),
    ],
)
def test_where_the_api_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str) -> None:
    for name in ("RUNPOD_API_KEY", "RUNPOD_API_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Problem, match=says) as problem:
        runpod_api.from_environment()
    assert problem.value.code == 2
    assert KEY not in str(problem.value)


def test_the_real_api_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    monkeypatch.delenv("RUNPOD_API_URL", raising=False)
    assert runpod_api.from_environment().url == "https://api.runpod.io/v2"


def test_an_answer_that_trickles_in_ends(scripted: tuple[Scripted, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A read's own time limit starts anew with each byte."""
    monkeypatch.setattr(runpod_api, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(runpod_api, "LOG_SECONDS", 0.3)
    stop = threading.Event()

    class Trickle(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            while not stop.wait(0.05):
                self.wfile.write(b" ")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Trickle)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    time = Time()
    api = Api(KEY, f"http://127.0.0.1:{server.server_address[1]}/v2", clock=time, sleep=time.sleep)
    try:
        with pytest.raises(ApiError, match="no answer in time"):
            api.get("x", budget=0.1)
        assert api.log_lines("x", "system", 5) == []
    finally:
        stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_answer_without_end_is_cut(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod_api, "ANSWER_BYTES", 1000)
    script, api, _ = made
    script.then(200, b"x" * 100_000)
    with pytest.raises(ApiError, match="more than 1000 bytes"):
        api.get("x", budget=0.01)


def test_a_create_with_an_empty_answer_is_unknown(made: Made) -> None:
    script, api, _ = made
    script.then(204)
    with pytest.raises(Unknown):
        api.create("serverless", {})


def test_a_whole_minute_is_waited_for_when_the_platform_asks_for_it(made: Made) -> None:
    script, api, time = made
    script.then(429, None, Retry_After="60").then(429, None, Retry_After="3600").then(200, {})
    api.get("x")
    assert time.slept == [60.0, 60.0]


@pytest.mark.parametrize("key", ["rpa_x\n", "rpa x", "rpa_é", "rpa_\u2028"])
def test_a_key_that_no_key_can_be(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", key)
    with pytest.raises(Problem, match="copy it again"):
        runpod_api.from_environment()
