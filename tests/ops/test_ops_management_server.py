"""The management API over loopback HTTP: keys, problems, headers, logs, faults, and the knobs beside it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from local_server import KEY, STUB_WORKER, Answer, Runpod, local_server

from local_runpod.faults import MANAGEMENT_ROUTES

ENDPOINT: dict[str, Any] = {
    "name": "one",
    "type": "QUEUE",
    "image": "you/worker@sha256:aa",
    "env": {"IMAGE": "you/worker@sha256:aa"},
    "gpu": {"pools": ["ADA_24"]},
    "workers": {"min": 0, "max": 2, "idleTimeout": 60},
    "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
}
POD = {"name": "one", "image": "you/ablate:1", "gpu": {"id": "NVIDIA A40"}}
PROBLEM = "application/problem+json; charset=utf-8"


@pytest.fixture
def runpod() -> Iterator[Runpod]:
    with local_server() as server:
        yield server


@pytest.fixture(scope="module")
def processes() -> Iterator[Runpod]:
    """One whose workers are processes."""
    with local_server(STUB_WORKER) as server:
        yield server


def problem(answer: Answer, status: int) -> dict[str, Any]:
    told: dict[str, Any] = answer.json
    assert (answer.status, told["status"], answer.headers["Content-Type"]) == (status, status, PROBLEM)
    assert set(told) <= {"title", "status", "detail", "errors"}
    return told


# --- every answer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorization", [None, "", KEY, f"bearer {KEY}", f"Bearer {KEY}x", "Bearer k\xff"])
@pytest.mark.parametrize("path", ["serverless", "pods", "catalog/gpus", "account/ssh-keys", "none"])
def test_without_the_key_there_is_nothing(runpod: Runpod, path: str, authorization: str | None) -> None:
    for method in ("GET", "POST"):
        answer = runpod.send(method, f"/v2/{path}", b"{}", authorization)
        if path == "none":
            assert answer.status == 404
        else:
            problem(answer, 401)
    assert runpod.account.endpoints == {}


@pytest.mark.parametrize("knob", ["faults", "clock", "calls", "secrets"])
def test_the_knobs_want_the_key_too(runpod: Runpod, knob: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert runpod.send(method, f"/__{knob}__", b"{}").status == 401


def test_an_answer_tells_its_id_and_the_quotas(runpod: Runpod) -> None:
    first, second = runpod.call("GET", "serverless"), runpod.call("POST", "serverless", {})
    assert first.headers["RateLimit"].startswith('"minute";r=59;t=')
    assert second.headers["RateLimit"].startswith('"minute";r=58;t=')
    assert first.headers["RateLimit-Policy"] == '"minute";q=60;w=60, "hour";q=3000;w=3600, "day";q=50000;w=86400'
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "serverless/none", 404),
        ("GET", "serverless/", 404),
        ("GET", "serverless/none/builds", 404),
        ("GET", "serverless/none/workers/w/logs", 404),
        ("GET", "clusters", 404),
        ("GET", "registries/delegations", 404),
        ("GET", "account/balance", 404),
        ("PUT", "serverless", 405),
        ("DELETE", "catalog/gpus", 405),
        ("HEAD", "serverless", 405),
    ],
)
def test_what_is_not_there_is_said_so(runpod: Runpod, method: str, path: str, status: int) -> None:
    answer = runpod.call(method, path)
    assert answer.status == status
    if status == 405:
        assert answer.headers["Allow"].split(", ")[0] == "GET"
    elif path != "clusters":
        problem(answer, 404)


@pytest.mark.parametrize("body", [b"", b"{", b"[1", b'{"a": NaN}', b'{"disk": 1e999}', b"\xff", b"[" * 50_000])
def test_a_body_that_is_not_json_is_400(runpod: Runpod, body: bytes) -> None:
    problem(runpod.send("POST", "/v2/serverless", body, f"Bearer {KEY}"), 400)


@pytest.mark.parametrize("body", [[], "x", 1, False, {"name": "one"}])
def test_a_body_that_is_no_endpoint_is_422(runpod: Runpod, body: object) -> None:
    assert problem(runpod.call("POST", "serverless", body), 422)["errors"]


def test_an_unknown_field_is_named_and_an_unknown_parameter_is_ignored(runpod: Runpod) -> None:
    refusal = problem(runpod.call("POST", "serverless", {**ENDPOINT, "modelReferences": []}), 422)
    assert refusal["errors"] == ["modelReferences: is not a known field"]
    assert runpod.ok("GET", "serverless?limit=5&cursor=x") == {"endpoints": []}


def test_ids_are_taken_as_they_were_meant(runpod: Runpod) -> None:
    assert runpod.ok("GET", "catalog/gpus/NVIDIA%20A40")["pool"] == "AMPERE_48"
    assert "'a/b c'" in problem(runpod.call("GET", "pods/a%2Fb%20c"), 404)["detail"]


def test_values_arrive_byte_for_byte(runpod: Runpod) -> None:
    env = {"A": "costs $5 \"or\" 'more' {{x}} \\n %s\n\ttab", "B": "naïve 研究 👩🏽‍🔬", "C": "", "D_{}$": " "}
    endpoint = runpod.ok("POST", "serverless", {**ENDPOINT, "env": env})["id"]
    assert runpod.ok("GET", f"serverless/{endpoint}")["env"] == env
    runpod.ok("PATCH", f"serverless/{endpoint}", {"env": {}})
    release = runpod.ok("GET", f"serverless/{endpoint}/releases")["releases"][0]
    assert release["diff"] == [{"field": "template.env", "old": env, "new": {}}]


def test_a_deletion_answers_204_without_a_body_and_then_404(runpod: Runpod) -> None:
    for area, body in (("serverless", ENDPOINT), ("pods", POD)):
        made = runpod.ok("POST", area, body)["id"]
        answer = runpod.call("DELETE", f"{area}/{made}")
        assert (answer.status, answer.body, "Content-Type" in answer.headers) == (204, b"", False)
        problem(runpod.call("GET", f"{area}/{made}"), 404)
        problem(runpod.call("DELETE", f"{area}/{made}"), 404)


def test_request_urls_lead_back_here(runpod: Runpod) -> None:
    urls = runpod.ok("POST", "serverless", ENDPOINT)["requestUrls"]
    assert set(urls) == {"run", "runSync", "status", "stream", "cancel", "retry", "purgeQueue", "health"}
    assert urls["health"].startswith(f"{runpod.api}/ep")
    assert runpod.ok("GET", urls["health"].removeprefix(f"{runpod.api}/"))["jobs"]["inQueue"] == 0


# --- the endpoint that is always there, and the others ---------------------------------------------------------------


def test_the_endpoint_local_is_not_part_of_the_account(runpod: Runpod) -> None:
    assert runpod.ok("GET", "local/health")["jobs"]["inQueue"] == 0
    assert runpod.ok("GET", "serverless") == {"endpoints": []}
    problem(runpod.call("GET", "serverless/local"), 404)


def test_jobs_of_an_endpoint_stay_with_it(runpod: Runpod) -> None:
    one, two = (runpod.ok("POST", "serverless", ENDPOINT)["id"] for _ in range(2))
    job = runpod.ok("POST", f"{one}/run", {"input": {"prompt": "q"}})["id"]
    assert runpod.ok("GET", f"{one}/status/{job}")["status"] == "IN_QUEUE"
    assert runpod.call("GET", f"{two}/status/{job}").status == 404
    assert runpod.call("GET", f"local/status/{job}").status == 404
    assert runpod.call("POST", "epnone/run", {"input": {}}).json["error"] == "serverless endpoint 'epnone' not found"


def test_a_job_can_be_taken_by_hand(runpod: Runpod) -> None:
    endpoint = runpod.ok("POST", "serverless", ENDPOINT)["id"]
    job = runpod.ok("POST", f"{endpoint}/run", {"input": {"prompt": "q"}})["id"]
    (worker,) = runpod.ok("GET", f"serverless/{endpoint}/workers")["workers"]
    assert runpod.take(endpoint, "a-stranger") is None
    assert runpod.take(endpoint, worker["id"]) == {"id": job, "input": {"prompt": "q"}}
    assert runpod.ok("GET", f"{endpoint}/health")["workers"]["running"] == 1
    runpod.done(endpoint, worker["id"], job, {"output": 7})
    assert runpod.ok("GET", f"{endpoint}/status/{job}")["output"] == 7


def test_a_load_balancing_endpoint_has_no_queue(runpod: Runpod) -> None:
    body = {**ENDPOINT, "type": "LOAD_BALANCER", "scaling": {"type": "REQUEST_COUNT", "requestCount": 4}}
    endpoint = runpod.ok("POST", "serverless", body)
    assert set(endpoint["requestUrls"]) == {"base", "health"}
    assert runpod.call("POST", f"{endpoint['id']}/run", {"input": {}}).status == 404


# --- logs ------------------------------------------------------------------------------------------------------------


def events(answer: Answer) -> list[tuple[str, str, str]]:
    """(id, source, line) of each event."""
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/event-stream")
    assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-cache", "no")
    found = []
    for block in answer.body.decode().strip().split("\n\n") if answer.body else []:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert set(event) == {"source", "line", "ts"}
        assert name == f"id: {event['ts']}"
        found.append((event["ts"], event["source"], event["line"]))
    return found


def test_a_log_is_cut_as_it_is_asked_for(runpod: Runpod) -> None:
    pod = runpod.ok("POST", "pods", POD)["id"]
    log = runpod.account.pods[pod].log
    now = runpod.server.clock()
    for n in range(200):
        log.add("container", f"line {n}", runpod.account.when(now))
    at = f"pods/{pod}/logs"
    whole = events(runpod.call("GET", f"{at}?tail=5000"))
    assert [line for _, _, line in whole] == [f"line {n}" for n in range(200)]
    assert len({name for name, _, _ in whole}) == 200
    assert events(runpod.call("GET", at)) == whole[-100:]
    assert events(runpod.call("GET", f"{at}?tail=3")) == whole[-3:]
    assert events(runpod.call("GET", f"{at}?tail=0")) == []
    assert events(runpod.call("GET", f"{at}?source=system")) == []
    assert events(runpod.call("GET", f"{at}?since={whole[150][0]}")) == whole[150:]
    assert events(runpod.call("GET", at, Last_Event_ID=whole[150][0])) == whole[151:]
    assert events(runpod.call("GET", at, Last_Event_ID=f"{whole[150][0]}/000000000042")) == whole[151:]
    for wrong in ("tail=5001", "tail=-1", "tail=x", "source=all", "since=yesterday"):
        problem(runpod.call("GET", f"{at}?{wrong}"), 422)


def test_a_log_goes_on_while_it_is_read(runpod: Runpod) -> None:
    runpod.server.hold = 5.0
    pod = runpod.ok("POST", "pods", POD)["id"]
    log = runpod.account.pods[pod].log
    connection = http.client.HTTPConnection("127.0.0.1", runpod.port, timeout=10)
    connection.request("GET", f"/v2/pods/{pod}/logs?tail=0", None, runpod.headers)
    response = connection.getresponse()
    runpod.do(lambda: log.add("container", "later", runpod.account.when(runpod.server.clock())))
    assert b'"line": "later"' in response.readline() + response.readline()
    connection.close()


# --- faults ----------------------------------------------------------------------------------------------------------

REQUESTS = {
    "serverless.create": ("POST", "serverless", ENDPOINT),
    "serverless.list": ("GET", "serverless", None),
    "serverless.get": ("GET", "serverless/{}", None),
    "serverless.patch": ("PATCH", "serverless/{}", {"name": "two"}),
    "serverless.delete": ("DELETE", "serverless/{}", None),
    "serverless.workers": ("GET", "serverless/{}/workers", None),
    "serverless.releases": ("GET", "serverless/{}/releases", None),
    "serverless.logs": ("GET", "serverless/{}/workers/w/logs", None),
    "pods.create": ("POST", "pods", POD),
    "pods.list": ("GET", "pods", None),
    "pods.get": ("GET", "pods/p", None),
    "pods.patch": ("PATCH", "pods/p", {}),
    "pods.delete": ("DELETE", "pods/p", None),
    "pods.action": ("POST", "pods/p/action", {"action": "stop"}),
    "pods.logs": ("GET", "pods/p/logs", None),
    "templates": ("GET", "templates", None),
    "registries": ("GET", "registries", None),
    "network-volumes": ("GET", "network-volumes", None),
    "catalog": ("GET", "catalog/gpus", None),
    "billing": ("GET", "billing/serverless", None),
    "account": ("GET", "account/ssh-keys", None),
}


def send(runpod: Runpod, route: str) -> Answer:
    method, path, body = REQUESTS[route]
    return runpod.call(method, path.format(next(iter(runpod.account.endpoints), "none")), body)


@pytest.mark.parametrize("route", MANAGEMENT_ROUTES)
def test_every_route_can_be_struck(runpod: Runpod, route: str) -> None:
    runpod.ok("POST", "serverless", ENDPOINT)
    other = "serverless.list" if route != "serverless.list" else "catalog"
    runpod.arm("http", route=route, status=429, retry_after=7, message="slow down")
    assert send(runpod, other).status == 200
    refused = send(runpod, route)
    assert problem(refused, 429)["detail"] == "slow down"
    assert refused.headers["Retry-After"] == "7"
    assert send(runpod, route).status != 429


@pytest.mark.parametrize("status", [402, 403, 500, 503])
def test_an_http_fault_is_a_problem_and_the_request_is_not_served(runpod: Runpod, status: int) -> None:
    runpod.arm("http", route="serverless.create", status=status)
    refused = problem(send(runpod, "serverless.create"), status)
    assert refused["detail"] == "fault injected"
    assert runpod.account.endpoints == {}


def test_an_html_page_instead_of_an_answer(runpod: Runpod) -> None:
    runpod.arm("html")
    page = runpod.call("GET", "serverless")
    assert (page.status, page.headers["Content-Type"].split(";")[0]) == (200, "text/html")


def test_a_slow_request_is_served_late(runpod: Runpod) -> None:
    runpod.arm("slow", route="catalog", seconds=0.2)
    start = time.monotonic()
    assert send(runpod, "catalog").status == 200
    assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize(("kind", "there"), [("lost_answer", 1), ("lost_request", 0)])
def test_a_connection_drops_before_or_after(runpod: Runpod, kind: str, there: int) -> None:
    runpod.arm(kind, route="serverless.create")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        send(runpod, "serverless.create")
    assert len(runpod.ok("GET", "serverless")["endpoints"]) == there
    (call, _) = runpod.calls()
    assert (call["status"], call["mutating"], call["served"]) == (None, True, bool(there))


@pytest.mark.parametrize("route", ["run", "status", "health"])
def test_jobs_can_be_lost_on_their_way_too(runpod: Runpod, route: str) -> None:
    runpod.arm("lost_request", route=route)
    method, path = ("POST", "local/run") if route == "run" else ("GET", f"local/{route}{'/j' * (route == 'status')}")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        runpod.call(method, path, {"input": {}})
    assert runpod.server.platform.jobs == {}


def test_no_capacity_and_propagation(runpod: Runpod) -> None:
    runpod.arm("no_capacity", route="serverless.create")
    runpod.arm("propagation", seconds=20)
    assert "no longer any instances available" in problem(send(runpod, "serverless.create"), 400)["detail"]
    endpoint = runpod.ok("POST", "serverless", ENDPOINT)["id"]
    problem(runpod.call("GET", f"serverless/{endpoint}"), 404)
    assert runpod.call("POST", f"{endpoint}/run", {"input": {}}).status == 404
    assert runpod.ok("GET", "serverless") == {"endpoints": []}
    runpod.advance(21)
    assert runpod.ok("GET", f"serverless/{endpoint}")["id"] == endpoint
    assert len(runpod.ok("GET", "serverless")["endpoints"]) == 1


def test_quotas_hold_only_where_they_are_armed(runpod: Runpod) -> None:
    assert {runpod.call("GET", "serverless").status for _ in range(70)} == {200}
    runpod.clock.ahead += 60
    runpod.arm("rate_limit", times=2)
    answers = [runpod.call("GET", "serverless") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert 0 < int(answers[2].headers["Retry-After"]) <= 60
    assert answers[0].headers["RateLimit-Policy"].startswith('"minute";q=2;w=60')
    runpod.clock.ahead += 60
    assert runpod.call("GET", "serverless").status == 200


# --- knobs -----------------------------------------------------------------------------------------------------------


def test_the_calls_are_noted_in_order(runpod: Runpod) -> None:
    endpoint = runpod.ok("POST", "serverless", ENDPOINT)["id"]
    runpod.call("PATCH", f"serverless/{endpoint}?x=1", {"none": 1})
    runpod.ok("GET", "catalog/gpus")
    runpod.ok("GET", f"{endpoint}/health")
    calls = runpod.calls()
    assert [(call["n"], call["method"], call["path"], call["status"], call["mutating"]) for call in calls] == [
        (1, "POST", "/v2/serverless", 201, True),
        (2, "PATCH", f"/v2/serverless/{endpoint}", 422, True),
        (3, "GET", "/v2/catalog/gpus", 200, False),
    ]
    assert runpod.mutating() == ["POST /v2/serverless", f"PATCH /v2/serverless/{endpoint}"]
    runpod.forget_calls()
    assert runpod.calls() == []


def test_the_clock_is_moved_for_endpoints_and_not_for_their_workers_silence(runpod: Runpod) -> None:
    endpoint = runpod.ok("POST", "serverless", {**ENDPOINT, "workers": {"min": 1, "max": 5}})["id"]
    week = {"ttl": 604_800_000, "executionTimeout": 604_800_000}
    job = runpod.ok("POST", f"{endpoint}/run", {"input": {"prompt": "q"}, "policy": week})
    (worker,) = runpod.ok("GET", f"serverless/{endpoint}/workers")["workers"]
    runpod.take(endpoint, worker["id"])
    before = runpod.account.when(runpod.server.clock())
    runpod.advance(3 * 86_400 + 1)
    assert (runpod.account.when(runpod.server.clock()) - before).days == 3
    assert runpod.ok("GET", f"serverless/{endpoint}")["workers"]["max"] == 2
    assert runpod.ok("GET", f"{endpoint}/status/{job['id']}")["status"] == "IN_PROGRESS"
    bodies: list[object] = [{"advance": -1}, {"advance": "1"}, {}, [], {"advance": True}]
    for body in bodies:
        answer = runpod.send("POST", "/__clock__", json.dumps(body).encode(), f"Bearer {KEY}")
        assert answer.status == 400


def test_secrets_are_named_and_never_shown(runpod: Runpod) -> None:
    runpod.secrets(hf="canary", other="canary")
    answer = runpod.send("GET", "/__secrets__", None, f"Bearer {KEY}")
    assert answer.json == {"secrets": ["hf", "other"]}
    assert runpod.send("POST", "/__secrets__", b'{"a": 1}', f"Bearer {KEY}").status == 400
    assert runpod.send("DELETE", "/__secrets__", None, f"Bearer {KEY}").json == {"secrets": []}


# --- processes as workers --------------------------------------------------------------------------------------------


def until(look: Any, seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def ask(runpod: Runpod, endpoint: str, prompt: str) -> str:
    return str(runpod.ok("POST", f"{endpoint}/run", {"input": {"prompt": prompt}})["id"])


def ended(runpod: Runpod, endpoint: str, job: str) -> dict[str, Any]:
    def view() -> dict[str, Any] | None:
        found: dict[str, Any] = runpod.ok("GET", f"{endpoint}/status/{job}")
        return None if found["status"] in ("IN_QUEUE", "IN_PROGRESS") else found

    found: dict[str, Any] = until(view)
    return found


def workers(runpod: Runpod, endpoint: str) -> list[tuple[str, int]]:
    shown = runpod.ok("GET", f"serverless/{endpoint}/workers")["workers"]
    return [(worker["status"], worker["version"]) for worker in shown]


def test_a_job_is_answered_by_a_process_with_the_endpoints_variables(processes: Runpod) -> None:
    processes.secrets(token="s3cret $x")  # noqa: S106
    env = {"IMAGE": "you/worker@sha256:aa", "TOKEN": "{{ RUNPOD_SECRET_token }}", "PATH": "/none", "RUNPOD_POD_ID": "x"}
    endpoint = processes.ok("POST", "serverless", {**ENDPOINT, "env": env})["id"]
    view = ended(processes, endpoint, ask(processes, endpoint, "env TOKEN"))
    assert view["output"][0]["synthesis"] == "s3cret $x"
    assert view["output"][0]["model"]["image"] == "you/worker@sha256:aa"
    (worker,) = processes.ok("GET", f"serverless/{endpoint}/workers")["workers"]
    assert (worker["id"], worker["status"]) == (view["workerId"], "IDLE")
    assert (
        ended(processes, endpoint, ask(processes, endpoint, "env RUNPOD_POD_ID"))["output"][0]["synthesis"]
        == worker["id"]
    )
    log = events(processes.call("GET", f"serverless/{endpoint}/workers/{worker['id']}/logs?source=container"))
    assert log[0][2] == f"stub worker {worker['id']} begins"
    processes.ok("DELETE", f"serverless/{endpoint}")


def test_a_new_release_waits_for_the_job_and_replaces_the_process(processes: Runpod) -> None:
    endpoint = processes.ok("POST", "serverless", {**ENDPOINT, "workers": {"min": 1, "max": 1}})["id"]
    slow = ask(processes, endpoint, "sleep 1")
    until(lambda: workers(processes, endpoint) == [("RUNNING", 1)])
    processes.ok("PATCH", f"serverless/{endpoint}", {"image": "b", "env": {"IMAGE": "b"}})
    after = ask(processes, endpoint, "q")
    assert ended(processes, endpoint, slow)["output"][0]["model"]["image"] == "you/worker@sha256:aa"
    assert ended(processes, endpoint, after)["output"][0]["model"]["image"] == "b"
    assert workers(processes, endpoint) == [("IDLE", 2)]
    processes.ok("DELETE", f"serverless/{endpoint}")


def test_a_process_that_ends_is_started_again_and_one_that_never_works_is_unhealthy(processes: Runpod) -> None:
    endpoint = processes.ok("POST", "serverless", {**ENDPOINT, "workers": {"min": 1, "max": 1}})["id"]
    view = ended(processes, endpoint, ask(processes, endpoint, "exit 3"))
    assert (view["status"], view["error"]) == ("FAILED", "job timed out after 1 retries")
    processes.ok("PATCH", f"serverless/{endpoint}", {"env": {"STUB_EXIT": "4"}})
    until(lambda: workers(processes, endpoint) == [("UNHEALTHY", 2)])
    (worker,) = processes.ok("GET", f"serverless/{endpoint}/workers")["workers"]
    lines = [line for _, _, line in events(processes.call("GET", f"serverless/{endpoint}/workers/{worker['id']}/logs"))]
    assert lines.count("exited with code 4") >= 3
    assert "cannot load the model" in lines
    processes.ok("PATCH", f"serverless/{endpoint}", {"env": {}})
    until(lambda: workers(processes, endpoint) == [("IDLE", 3)])
    processes.ok("DELETE", f"serverless/{endpoint}")


def test_a_worker_that_asks_for_it_is_replaced(processes: Runpod) -> None:
    endpoint = processes.ok("POST", "serverless", {**ENDPOINT, "workers": {"min": 1, "max": 1}})["id"]
    first = ended(processes, endpoint, ask(processes, endpoint, "refresh"))
    assert first["status"] == "COMPLETED"
    time.sleep(0.4)
    second = ended(processes, endpoint, ask(processes, endpoint, "q"))
    assert second["workerId"] != first["workerId"]
    processes.ok("DELETE", f"serverless/{endpoint}")


def test_a_crash_kills_the_process_and_the_job_fails_after_the_second(processes: Runpod) -> None:
    endpoint = processes.ok("POST", "serverless", {**ENDPOINT, "workers": {"min": 1, "max": 1}})["id"]
    processes.arm("crash")
    view = ended(processes, endpoint, ask(processes, endpoint, "sleep 60"))
    assert (view["status"], view["retries"]) == ("FAILED", 1)
    assert ended(processes, endpoint, ask(processes, endpoint, "q"))["status"] == "COMPLETED"
    processes.ok("DELETE", f"serverless/{endpoint}")


def test_several_jobs_bring_several_processes_and_idleness_ends_them(processes: Runpod) -> None:
    body = {**ENDPOINT, "scaling": {"type": "REQUEST_COUNT", "requestCount": 1}, "workers": {"min": 0, "max": 2}}
    endpoint = processes.ok("POST", "serverless", body)["id"]
    with ThreadPoolExecutor(3) as pool:
        views = list(pool.map(lambda _: ended(processes, endpoint, ask(processes, endpoint, "sleep 0.5")), range(3)))
    assert len({view["workerId"] for view in views}) == 2
    processes.advance(11)
    until(lambda: workers(processes, endpoint) == [])
    processes.ok("DELETE", f"serverless/{endpoint}")
