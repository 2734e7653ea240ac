"""local_runpod.management: an account's endpoints, pods and bills as a state machine. Times are made up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_runpod.basics import NO_CAPACITY, Rejected
from local_runpod.management import Account
from local_runpod.serverless import RELEASED, Endpoint

WALL = 1_800_000_000.0  # 2027-01-15T08:00:00Z
DAY = 86_400.0
BODY: dict[str, Any] = {
    "name": "one",
    "type": "QUEUE",
    "image": "you/worker@sha256:aa",
    "env": {"A": "1", "B": "2"},
    "gpu": {"pools": ["ADA_24", "AMPERE_24"], "excludedTypes": ["NVIDIA L4"], "minCudaVersion": "12.8"},
    "workers": {"min": 0, "max": 3, "idleTimeout": 5},
    "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
    "timeout": 300_000,
    "flashboot": "FLASHBOOT",
}


@pytest.fixture
def account() -> Account:
    return Account(0.0, WALL, boot=1.0, seed=1)


def made(account: Account, now: float = 0.0, **changes: Any) -> Endpoint:
    return account.create_endpoint({**copy.deepcopy(BODY), **changes}, now)


def view(account: Account, endpoint: Endpoint) -> dict[str, Any]:
    return account.endpoint_view(endpoint, "http://here")


def states(account: Account, endpoint: Endpoint, now: float) -> list[tuple[str, int]]:
    account.tick(now)
    return [(one["status"], one["version"]) for one in account.workers_view(endpoint, now)["workers"]]


def submit(endpoint: Endpoint, now: float, count: int = 1) -> list[str]:
    return [endpoint.platform.submit({"input": {"prompt": "q"}}, now).id for _ in range(count)]


def taken(endpoint: Endpoint, worker: str, now: float) -> str:
    (job,) = endpoint.platform.take(worker, 1, now)
    return str(job["id"])


def refused(status: int, account: Account, body: dict[str, Any]) -> Rejected:
    with pytest.raises(Rejected) as refusal:
        account.create_endpoint(body, 0)
    assert refusal.value.status == status, str(refusal.value)
    assert account.endpoints == {}
    return refusal.value


# --- what an endpoint is ---------------------------------------------------------------------------------------------


def test_an_endpoint_shows_what_was_sent_and_what_the_platform_adds(account: Account) -> None:
    shown = view(account, made(account))
    gpu = {**BODY["gpu"], "count": 1, "allowedCudaVersions": []}
    assert {key: shown[key] for key in BODY} == {**BODY, "gpu": gpu}
    assert (shown["args"], shown["disk"], shown["ports"], shown["registry"]) == ("", 10, [], None)
    assert (shown["dataCenterIds"], shown["networkVolumes"]) == ([], [])
    assert shown["createdAt"] == "2027-01-15T08:00:00.000000Z"
    assert shown["requestUrls"]["run"] == f"http://here/v2/{shown['id']}/run"
    assert shown["id"].startswith("ep")
    assert shown["id"].isalnum()


def test_what_is_not_sent_is_not_what_the_console_would_set(account: Account) -> None:
    body = {key: BODY[key] for key in ("name", "type", "image", "scaling")}
    shown = view(account, account.create_endpoint({**body, "gpu": {"pools": ["ADA_24"]}}, 0))
    assert (shown["timeout"], shown["flashboot"]) == (0, "OFF")
    assert shown["workers"] == {"min": 0, "max": 3, "idleTimeout": 10}
    assert "excludedTypes" not in shown["gpu"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"labels": {}}, "labels: is not a known field"),
        ({"gpu": {"pools": ["ADA_24"], "type": "x"}}, "gpu.type: is not a known field"),
        ({"workers": {"min": -1}}, "workers.min: must be at least 0"),
        ({"workers": {"idleTimeout": 3601}}, "workers.idleTimeout: must be at most 3600"),
        ({"flashboot": True}, "flashboot: must be one of OFF, FLASHBOOT, PRIORITY_FLASHBOOT"),
        ({"env": {"A": 1}}, "env.A: must be a string"),
        ({"scaling": {"type": "QUEUE_DELAY", "value": 4}}, "scaling.value: is not a known field"),
        ({"gpu": {"pools": ["ADA_24"], "minCudaVersion": "12"}}, "gpu.minCudaVersion: does not match"),
        ({"name": ""}, "name: must not be empty"),
        ({"timeout": 1.5}, "timeout: must be a whole number"),
        (
            {"scaling": {"type": "REQUEST_COUNT", "requestCount": 1}},
            "workers.idleTimeout: does not apply to a queue-based endpoint",
        ),
        ({"type": "LOAD_BALANCER"}, "scaling.type: a load-balancing endpoint scales on REQUEST_COUNT"),
    ],
)
def test_a_body_that_is_not_as_described_is_422_and_names_the_field(
    account: Account, change: dict[str, Any], error: str
) -> None:
    refusal = refused(422, account, {**BODY, **change})
    assert any(one.startswith(error) for one in refusal.errors), refusal.errors
    assert refusal.problem()["errors"] == refusal.errors


@pytest.mark.parametrize("field", ["name", "type", "scaling", "image"])
def test_what_is_required_is_named(account: Account, field: str) -> None:
    refusal = refused(422, account, {key: value for key, value in BODY.items() if key != field})
    assert refusal.errors[0].startswith(f"{field}: is required")


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"cpu": [{"id": "cpu3c", "vcpuCount": 2}]}, "exactly one of gpu and cpu"),
        ({"gpu": {"pools": ["NVIDIA L4"]}}, "'NVIDIA L4' is not a GPU pool"),
        ({"gpu": {"pools": ["ADA_24"], "excludedTypes": ["NVIDIA L4"]}}, "'NVIDIA L4' is not a GPU type of these"),
        ({"gpu": {"pools": ["ADA_24"], "excludedTypes": ["NVIDIA GeForce RTX 4090"]}}, "leaves no GPU type"),
        (
            {"gpu": {"pools": ["ADA_24"], "allowedCudaVersions": ["12.8"], "minCudaVersion": "12.8"}},
            "exclude each other",
        ),
        ({"workers": {"min": 4, "max": 3}}, "workers.min must not be above workers.max"),
        ({"registry": "none"}, "'none' is not a registry"),
        ({"networkVolumes": ["none"]}, "network volume 'none' not found"),
        ({"dataCenterIds": ["MOON-1"]}, "'MOON-1' is not a data center"),
        ({"dataCenterIds": ["EUR-IS-1"], "gpu": {"pools": ["ADA_24"]}}, NO_CAPACITY),
    ],
)
def test_a_rule_that_is_broken_is_400(account: Account, change: dict[str, Any], detail: str) -> None:
    assert detail in str(refused(400, account, {**BODY, **change}))


def test_no_capacity_looks_like_a_broken_rule(account: Account) -> None:
    account.faults.arm({"kind": "no_capacity", "route": "serverless.create"})
    assert "no longer any instances available" in str(refused(400, account, BODY))
    made(account)


def test_names_are_not_unique(account: Account) -> None:
    assert made(account).id != made(account).id
    assert [one["name"] for one in account.list_endpoints(0, "")["endpoints"]] == ["one", "one"]


def test_a_cpu_endpoint_stays_one(account: Account) -> None:
    body = {key: value for key, value in BODY.items() if key != "gpu"}
    endpoint = account.create_endpoint({**body, "cpu": [{"id": "cpu3g", "vcpuCount": 4}]}, 0)
    assert view(account, endpoint)["cpu"] == [{"id": "cpu3g", "vcpuCount": 4, "memory": 16}]
    assert "gpu" not in view(account, endpoint)
    with pytest.raises(Rejected, match="cannot be changed"):
        account.update_endpoint(endpoint.id, {"gpu": {"pools": ["ADA_24"]}}, 0)


def test_a_request_count_endpoint_shows_no_idle_timeout(account: Account) -> None:
    scaling = {"type": "REQUEST_COUNT", "requestCount": 2}
    endpoint = made(account, scaling=scaling, workers={"min": 0, "max": 3})
    assert view(account, endpoint)["workers"] == {"min": 0, "max": 3}


# --- templates are looked at once ------------------------------------------------------------------------------------


def test_a_template_is_copied_and_not_linked(account: Account) -> None:
    template = account.create_template(
        {"name": "t", "image": "you/t:1", "serverless": True, "env": {"A": "t", "C": "t"}, "disk": 40}
    )
    body = {key: value for key, value in BODY.items() if key != "image"}
    endpoint = account.create_endpoint({**body, "templateId": template["id"]}, 0)
    shown = view(account, endpoint)
    assert (shown["image"], shown["disk"], shown["env"]) == ("you/t:1", 40, {"A": "1", "B": "2", "C": "t"})
    account.update_template(template["id"], {"image": "you/t:2"})
    assert view(account, endpoint) == shown
    assert "templateId" not in shown


def test_a_template_of_the_other_kind_or_of_nobody(account: Account) -> None:
    template = account.create_template({"name": "t", "image": "you/t:1"})
    assert "is not a serverless template" in str(refused(422, account, {**BODY, "templateId": template["id"]}))
    refused(404, account, {**BODY, "templateId": "none"})


# --- PATCH -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "old", "new"),
    [
        ({"image": "you/worker@sha256:bb"}, "template.imageName", "you/worker@sha256:aa", "you/worker@sha256:bb"),
        ({"env": {"A": "1"}}, "template.env", {"A": "1", "B": "2"}, {"A": "1"}),
        ({"disk": 40}, "template.containerDiskInGb", 10, 40),
        ({"args": "--x"}, "template.dockerArgs", "", "--x"),
        ({"ports": ["80/http"]}, "template.ports", [], ["80/http"]),
        ({"gpu": {"count": 2}}, "gpuCount", 1, 2),
        ({"gpu": {"minCudaVersion": ""}}, "minCudaVersion", "12.8", None),
        ({"dataCenterIds": ["US-KS-2"]}, "locations", [], ["US-KS-2"]),
        ({"flashboot": "OFF"}, "flashBootType", "FLASHBOOT", "OFF"),
    ],
)
def test_what_changes_a_container_is_a_new_release(
    account: Account, change: dict[str, Any], field: str, old: object, new: object
) -> None:
    endpoint = made(account)
    before = view(account, endpoint)
    after = view(account, account.update_endpoint(endpoint.id, change, 9))
    changed = set(change)
    assert {key: value for key, value in after.items() if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }
    releases = account.releases_view(endpoint)["releases"]
    assert [release["version"] for release in releases] == [2, 1]
    assert releases[0]["diff"] == [{"field": field, "old": old, "new": new}]
    assert (releases[0]["source"], releases[0]["createdAt"]) == ("MANUAL", "2027-01-15T08:00:09.000000Z")
    assert releases[1]["diff"] == []
    assert field in RELEASED.values()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "two"},
        {"workers": {"max": 5}},
        {"scaling": {"type": "QUEUE_DELAY", "queueDelay": 9}},
        {"timeout": 1},
        {"image": BODY["image"]},
        {"env": BODY["env"]},
        {},
    ],
)
def test_what_changes_no_container_acts_at_once_without_a_release(account: Account, change: dict[str, Any]) -> None:
    endpoint = made(account)
    account.update_endpoint(endpoint.id, change, 1)
    assert endpoint.version == 1
    assert view(account, endpoint)["workers"]["idleTimeout"] == 5  # workers are merged field by field


def test_pools_without_excluded_types_clear_them(account: Account) -> None:
    endpoint = made(account)
    account.update_endpoint(endpoint.id, {"gpu": {"count": 1}}, 0)
    assert endpoint.config["gpu"]["excludedTypes"] == ["NVIDIA L4"]
    account.update_endpoint(endpoint.id, {"gpu": {"pools": ["AMPERE_24"]}}, 0)
    assert "excludedTypes" not in endpoint.config["gpu"]
    with pytest.raises(Rejected, match=r"needs gpu\.pools"):
        account.update_endpoint(endpoint.id, {"gpu": {"excludedTypes": ["NVIDIA L4"]}}, 0)


def test_a_refused_change_changes_nothing(account: Account) -> None:
    endpoint = made(account)
    before = view(account, endpoint)
    for change in ({"image": "x", "gpu": {"pools": ["NONE"]}}, {"type": "QUEUE"}, {"workers": {"min": 9}}):
        with pytest.raises(Rejected):
            account.update_endpoint(endpoint.id, change, 0)
    assert (view(account, endpoint), endpoint.version) == (before, 1)


def test_the_endpoints_timeout_is_that_of_its_jobs(account: Account) -> None:
    endpoint = made(account, timeout=20_000)
    (job,) = submit(endpoint, 0)
    endpoint.platform.take("w", 1, 1)
    assert endpoint.platform.status(job, 20)["status"] == "IN_PROGRESS"
    endpoint.platform.seen("w", 20)
    assert endpoint.platform.status(job, 22)["status"] == "TIMED_OUT"
    account.update_endpoint(endpoint.id, {"timeout": 0}, 22)
    assert endpoint.platform.execution_timeout_ms == 600_000


# --- propagation, deletion -------------------------------------------------------------------------------------------


def test_what_propagates_is_unknown_and_then_there(account: Account) -> None:
    account.faults.arm({"kind": "propagation", "route": "serverless.create", "seconds": 20})
    endpoint = made(account)
    for now in (0.0, 19.9):
        with pytest.raises(Rejected) as refusal:
            account.endpoint(endpoint.id, now)
        assert refusal.value.status == 404
        assert account.list_endpoints(now, "")["endpoints"] == []
    assert account.endpoint(endpoint.id, 20) is endpoint
    assert len(account.list_endpoints(20, "")["endpoints"]) == 1


def test_a_deleted_endpoint_is_gone_with_its_workers_and_jobs(account: Account) -> None:
    endpoint = made(account, workers={"min": 1, "max": 1})
    (job,) = submit(endpoint, 0)
    account.delete_endpoint(endpoint.id, 1)
    assert endpoint.platform.jobs[job].status == "CANCELLED"
    assert endpoint.workers == {}
    assert all(usage.end == 1 for usage in account.usage)
    with pytest.raises(Rejected, match="not found"):
        account.delete_endpoint(endpoint.id, 1)


# --- workers ---------------------------------------------------------------------------------------------------------


def test_a_job_brings_a_worker_and_idleness_ends_it(account: Account) -> None:
    endpoint = made(account)
    assert states(account, endpoint, 1) == []
    submit(endpoint, 2)
    assert states(account, endpoint, 2) == [("INITIALIZING", 1)]
    assert states(account, endpoint, 3) == [("IDLE", 1)]
    (worker,) = endpoint.workers
    job = taken(endpoint, worker, 3)
    assert states(account, endpoint, 4) == [("RUNNING", 1)]
    endpoint.platform.done(worker, job, {"output": 1}, 5)
    assert states(account, endpoint, 9) == [("IDLE", 1)]
    assert states(account, endpoint, 10.1) == []


def test_a_worker_tells_where_it_runs(account: Account) -> None:
    endpoint = made(account, workers={"min": 1, "max": 1}, dataCenterIds=["EU-RO-1", "US-KS-2"])
    (worker,) = account.workers_view(endpoint, 7)["workers"]
    assert worker == {
        "id": worker["id"],
        "status": "INITIALIZING",
        "isStale": False,
        "version": 1,
        "gpuCount": 1,
        "image": "you/worker@sha256:aa",
        "uptimeSeconds": 7,
        "gpuTypeId": "NVIDIA GeForce RTX 4090",
        "dataCenterId": "US-KS-2",
        "startedAt": "2027-01-15T08:00:00.000000Z",
    }


def test_the_minimum_is_kept_and_the_maximum_never_passed(account: Account) -> None:
    endpoint = made(account, workers={"min": 1, "max": 2, "idleTimeout": 5})
    assert len(states(account, endpoint, 0)) == 1
    submit(endpoint, 0, 9)
    for now in range(1, 60):
        assert 1 <= len(states(account, endpoint, now)) <= 2
    assert len(states(account, endpoint, 60)) == 2
    endpoint.platform.purge(60)
    assert len(states(account, endpoint, 70)) == 1
    account.update_endpoint(endpoint.id, {"workers": {"min": 0, "max": 0}}, 71)
    assert states(account, endpoint, 71) == []


def test_a_queue_that_waits_brings_more_workers_and_a_count_does_at_once(account: Account) -> None:
    waiting, counting = (
        made(account),
        made(account, scaling={"type": "REQUEST_COUNT", "requestCount": 2}, workers={"max": 3}),
    )
    for endpoint in (waiting, counting):
        submit(endpoint, 0, 5)
    assert len(states(account, waiting, 1)) == 1
    assert len(states(account, counting, 1)) == 3
    assert [len(states(account, waiting, now)) for now in (5, 6, 9, 11)] == [1, 2, 2, 3]


def test_with_max_0_jobs_wait_for_ever(account: Account) -> None:
    endpoint = made(account, workers={"min": 0, "max": 0})
    submit(endpoint, 0)
    assert states(account, endpoint, 600) == []
    assert endpoint.health(600)["jobs"]["inQueue"] == 1


def test_more_than_three_pools_are_accepted_and_never_placed(account: Account) -> None:
    pools = ["ADA_24", "AMPERE_24", "AMPERE_48", "AMPERE_80"]
    endpoint = made(account, gpu={"pools": pools}, workers={"min": 1, "max": 1})
    assert states(account, endpoint, 3600) == [("INITIALIZING", 1)]
    (worker,) = endpoint.workers.values()
    assert (worker.started, [line.line for line in worker.log.lines]) == (None, ["waiting for a machine"])


def test_a_throttled_worker_waits_and_then_comes_up(account: Account) -> None:
    account.faults.arm({"kind": "throttled", "seconds": 30})
    endpoint = made(account, workers={"min": 1, "max": 1})
    assert states(account, endpoint, 29) == [("THROTTLED", 1)]
    assert endpoint.health(29)["workers"]["throttled"] == 1
    assert states(account, endpoint, 30) == [("INITIALIZING", 1)]
    assert states(account, endpoint, 31) == [("IDLE", 1)]


def test_an_unhealthy_worker_says_why_in_its_system_log_and_stays(account: Account) -> None:
    account.faults.arm(
        {"kind": "unhealthy", "image": "sha256:bb", "times": 9, "message": "error pulling image: denied"}
    )
    endpoint = made(account, workers={"min": 1, "max": 1})
    assert states(account, endpoint, 2) == [("IDLE", 1)]
    account.update_endpoint(endpoint.id, {"image": "you/worker@sha256:bb"}, 3)
    assert states(account, endpoint, 600) == [("UNHEALTHY", 2)]
    assert not account.seen(next(iter(endpoint.workers)), 600)
    (log,) = [worker.log for worker in endpoint.workers.values()]
    assert [(line.source, line.line) for line in log.lines] == [
        ("system", "pulling image you/worker@sha256:bb"),
        ("system", "error pulling image: denied"),
    ]
    account.update_endpoint(endpoint.id, {"image": "you/worker@sha256:aa"}, 601)
    assert states(account, endpoint, 603) == [("IDLE", 3)]


def test_a_fault_of_an_image_fails_the_jobs_of_its_workers_only(account: Account) -> None:
    account.faults.arm({"kind": "fail", "image": "sha256:bb", "times": 100})
    for image, end in (("aa", "COMPLETED"), ("bb", "FAILED")):
        endpoint = made(account, image=f"you/worker@sha256:{image}", workers={"min": 1, "max": 1})
        (worker,) = endpoint.workers
        (job,) = submit(endpoint, 1)
        taken(endpoint, worker, 1)
        endpoint.platform.done(worker, job, {"output": 1}, 2)
        assert endpoint.platform.status(job, 2)["status"] == end


# --- rolling releases ------------------------------------------------------------------------------------------------


def test_a_release_replaces_workers_one_after_the_other(account: Account) -> None:
    endpoint = made(account, workers={"min": 3, "max": 3})
    assert states(account, endpoint, 1) == [("IDLE", 1)] * 3
    account.update_endpoint(endpoint.id, {"image": "you/worker@sha256:bb"}, 2)
    seen = [sorted(version for _, version in states(account, endpoint, now)) for now in (2, 3, 4, 5)]
    assert seen == [[1, 1, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    rollout = account.releases_view(endpoint)["rollout"]
    assert rollout == {"inProgress": False, "workersOnLatest": 3, "workersTotal": 3, "percentOnLatest": 100}


def test_a_stale_worker_finishes_its_job_and_takes_no_other(account: Account) -> None:
    endpoint = made(account, workers={"min": 1, "max": 1})
    states(account, endpoint, 1)
    (old,) = endpoint.workers
    jobs = submit(endpoint, 1, 2)
    assert taken(endpoint, old, 1) == jobs[0]
    account.update_endpoint(endpoint.id, {"env": {}}, 2)
    (shown,) = account.workers_view(endpoint, 2)["workers"]
    assert (shown["status"], shown["isStale"], shown["version"]) == ("RUNNING", True, 1)
    assert account.releases_view(endpoint)["rollout"]["percentOnLatest"] == 0
    assert account.releases_view(endpoint)["rollout"]["inProgress"]
    assert not account.seen(old, 2)
    endpoint.platform.done(old, jobs[0], {"output": 1}, 3)
    assert endpoint.platform.status(jobs[0], 3)["status"] == "COMPLETED"
    assert states(account, endpoint, 3) == [("INITIALIZING", 2)]
    (new,) = endpoint.workers
    assert account.seen(new, 4)


def test_a_release_that_does_not_come_up_leaves_the_others_at_work(account: Account) -> None:
    account.faults.arm({"kind": "unhealthy", "image": "sha256:bb", "times": 9})
    endpoint = made(account, workers={"min": 3, "max": 3})
    states(account, endpoint, 1)
    account.update_endpoint(endpoint.id, {"image": "you/worker@sha256:bb"}, 2)
    assert sorted(states(account, endpoint, 600)) == [("IDLE", 1), ("IDLE", 1), ("UNHEALTHY", 2)]
    assert account.releases_view(endpoint)["rollout"]["percentOnLatest"] == 33


def test_without_workers_a_rollout_tells_nothing(account: Account) -> None:
    endpoint = made(account)
    account.update_endpoint(endpoint.id, {"env": {}}, 1)
    rollout = account.releases_view(endpoint)["rollout"]
    assert rollout == {"inProgress": False, "workersOnLatest": 0, "workersTotal": 0, "percentOnLatest": 0}


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_container_that_keeps_exiting_is_unhealthy_and_started_again_ever_later(account: Account) -> None:
    account.boot = None
    endpoint = made(account, workers={"min": 1, "max": 1})
    now, pauses = 0.0, []
    for _ in range(8):
        account.tick(now)
        ((_, worker),) = account.processes(now)
        worker.process = True
        assert account.processes(now) == []
        account.exited(worker.id, 1, now)
        pauses.append(worker.restart_at - now)
        now = worker.restart_at
    assert pauses == [0.5, 1, 2, 4, 8, 10, 10, 10]
    assert states(account, endpoint, now) == [("UNHEALTHY", 1)]
    assert [line.line for line in worker.log.lines][-1] == "exited with code 1"
    assert account.seen(worker.id, now)
    assert states(account, endpoint, now) == [("IDLE", 1)]


def test_a_process_that_dies_gives_its_job_back(account: Account) -> None:
    account.boot = None
    endpoint = made(account, workers={"min": 1, "max": 1})
    (worker,) = endpoint.workers.values()
    worker.process = True
    assert account.seen(worker.id, 1)
    (job,) = submit(endpoint, 1)
    taken(endpoint, worker.id, 1)
    account.exited(worker.id, -9, 2)
    assert endpoint.platform.status(job, 2)["status"] == "IN_QUEUE"
    assert states(account, endpoint, 2) == [("INITIALIZING", 1)]


def test_a_process_is_waited_for_before_its_worker_is_gone(account: Account) -> None:
    account.boot = None
    endpoint = made(account, workers={"min": 1, "max": 1})
    (worker,) = endpoint.workers.values()
    worker.process = True
    account.replace(worker.id, 1)
    assert worker.id in endpoint.workers
    assert worker.id not in [one["id"] for one in account.workers_view(endpoint, 1)["workers"]]
    account.exited(worker.id, 0, 2)
    assert worker.id not in endpoint.workers
    assert account.worker_log(endpoint.id, worker.id, 2).lines[-1].line == "exited with code 0"


def test_secrets_are_put_in_and_a_variable_whose_secret_is_unknown_is_left_out(account: Account) -> None:
    account.secrets["hf"] = 'a "secret" $value'
    env = {"A": "x {{ RUNPOD_SECRET_hf }} y", "B": "{{RUNPOD_SECRET_none}}", "C": "{{ other }}"}
    endpoint = made(account, env=env, workers={"min": 1, "max": 1})
    (worker,) = endpoint.workers.values()
    assert account.environment(worker) == {"A": 'x a "secret" $value y', "C": "{{ other }}"}
    assert view(account, endpoint)["env"] == env


# --- idle scale-down -------------------------------------------------------------------------------------------------


def test_the_platform_lowers_an_idle_endpoint_and_never_raises_it(account: Account) -> None:
    endpoint = made(account, workers={"min": 0, "max": 5})

    def most(now: float) -> int:
        account.tick(now)
        return int(view(account, endpoint)["workers"]["max"])

    assert [most(day * DAY) for day in (0, 2.99, 3, 6.99, 7, 30)] == [5, 5, 2, 2, 0, 0]
    assert endpoint.version == 1
    submit(endpoint, 30 * DAY)
    assert most(31 * DAY) == 0
    account.update_endpoint(endpoint.id, {"workers": {"max": 5}}, 31 * DAY)
    assert [most(day * DAY) for day in (33.9, 34, 38)] == [5, 2, 0]


def test_a_job_begins_the_days_anew(account: Account) -> None:
    endpoint = made(account)
    submit(endpoint, 2 * DAY)
    account.tick(4 * DAY)
    assert endpoint.config["workers"]["max"] == 3
    account.tick(5 * DAY)
    assert endpoint.config["workers"]["max"] == 2


# --- any order of things ---------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("patch"), st.sampled_from([{"image": "a"}, {"image": "b"}, {"workers": {"max": 0}}])),
        st.tuples(st.just("patch"), st.sampled_from([{"workers": {"max": 3}}, {"env": {}}, {"env": {"A": "1"}}])),
        st.tuples(st.just("submit"), st.integers(1, 4)),
        st.tuples(st.just("work"), st.integers(0, 5)),
        st.tuples(st.just("crash"), st.integers(0, 5)),
        st.tuples(st.just("arm"), st.sampled_from(["throttled", "unhealthy", "fail", "crash"])),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 1.0, 6.0, 100.0, DAY])),
    ),
    max_size=40,
)


@given(STEPS)
def test_whatever_happens_counts_and_bounds_hold(steps: list[tuple[str, Any]]) -> None:
    account = Account(0.0, WALL, seed=1)
    endpoint = made(account)
    now = 0.0
    for step, what in steps:
        if step == "patch":
            account.update_endpoint(endpoint.id, what, now)
        elif step == "submit":
            submit(endpoint, now, what)
        elif step == "arm":
            account.faults.arm({"kind": what, "seconds": 50})
        elif step == "wait":
            now += what
        elif ids := list(endpoint.workers):
            worker = ids[what % len(ids)]
            if step == "crash":
                account.exited(worker, 1, now)
            elif account.seen(worker, now):
                for job in endpoint.platform.take(worker, 1, now):
                    endpoint.platform.done(worker, job["id"], {"output": 1}, now)
        account.tick(now)
        shown = account.workers_view(endpoint, now)
        summary = shown["summary"]
        assert summary["total"] == len(shown["workers"]) == sum(summary.values()) - summary["total"]
        busy = sum(worker.draining for worker in endpoint.workers.values())
        assert summary["total"] - busy <= endpoint.config["workers"]["max"]
        versions = [release["version"] for release in account.releases_view(endpoint)["releases"]]
        assert versions == list(range(len(versions), 0, -1))
    # Left alone with a good image and room, every job ends and every worker is on the newest release.
    account.faults.clear()
    account.update_endpoint(endpoint.id, {"workers": {"max": 3}, "image": "last"}, now)
    for _ in range(200):
        now += 1
        account.tick(now)
        for worker in list(endpoint.workers):
            if account.seen(worker, now):
                for job in endpoint.platform.take(worker, 1, now):
                    endpoint.platform.done(worker, job["id"], {"output": 1}, now)
    assert all(job.status != "IN_QUEUE" for job in endpoint.platform.jobs.values())
    assert {worker.version for worker in endpoint.workers.values()} <= {endpoint.version}
