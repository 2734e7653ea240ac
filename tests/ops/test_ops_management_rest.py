"""local_runpod.management: pods, templates, registries, volumes, bills, and the catalog that prices them."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_runpod import catalog
from local_runpod.basics import Rejected
from local_runpod.billing import BUCKETS, Window, after, floor, window
from local_runpod.management import Account
from local_runpod.pods import Pod

WALL = 1_800_000_000.0  # Friday, 2027-01-15T08:00:00Z
HOUR = 3600.0
POD: dict[str, Any] = {"name": "os-1", "image": "you/ablate@sha256:aa", "gpu": {"id": "NVIDIA A40"}, "disk": 100}


@pytest.fixture
def account() -> Account:
    return Account(0.0, WALL, seed=1)


def made(account: Account, now: float = 0.0, **changes: Any) -> Pod:
    return account.create_pod({**POD, **changes}, now)


def shown(account: Account, pod: Pod, now: float) -> dict[str, Any]:
    account.tick(now)
    return account.pod_view(pod, now)


# --- pods ------------------------------------------------------------------------------------------------------------


def test_a_pod_comes_up_by_and_by(account: Account) -> None:
    pod = made(account, env={"A": "{{ RUNPOD_SECRET_x }}"})
    view = shown(account, pod, 0)
    assert (view["status"], view["actions"], view["runtime"]) == ("PROVISIONING", ["stop", "terminate"], None)
    assert (view["cost"], view["dataCenterId"], view["gpu"]) == (0.44, "US-KS-2", {"id": "NVIDIA A40", "count": 1})
    assert (view["env"], view["cloud"], view["locked"]) == ({"A": "{{ RUNPOD_SECRET_x }}"}, "SECURE", False)
    assert [shown(account, pod, now)["status"] for now in (0.9, 1, 1.9, 2, 9)] == [
        *("PROVISIONING", "STARTING", "STARTING", "RUNNING", "RUNNING"),
    ]
    view = shown(account, pod, 9)
    assert view["runtime"]["uptime"] == 7
    assert view["startedAt"] == "2027-01-15T08:00:02.000000Z"
    assert [line.line for line in pod.log.lines] == ["pulling image you/ablate@sha256:aa", "started"]


def test_a_pod_that_cannot_start_ends_in_error_and_says_why(account: Account) -> None:
    account.faults.arm({"kind": "pod_error", "message": "no space left on device"})
    pod = made(account)
    assert shown(account, pod, 100)["status"] == "ERROR"
    assert "no space left on device" in [line.line for line in pod.log.lines]
    assert pod.usage
    assert pod.usage.end == 1


def test_actions_are_those_that_the_status_allows(account: Account) -> None:
    pod = made(account)
    account.tick(2)

    def act(action: str, now: float) -> str:
        left = account.act_on_pod(pod.id, {"action": action}, now)
        account.tick(now)
        return left.status if left else "gone"

    with pytest.raises(Rejected) as refusal:
        act("start", 2)
    assert refusal.value.status == 409
    assert act("restart", 3) == "STARTING"
    assert act("stop", 5) == "EXITED"
    assert shown(account, pod, 6)["cost"] == 0
    with pytest.raises(Rejected):
        act("restart", 6)
    assert act("start", 7) == "PROVISIONING"
    assert shown(account, pod, 9)["status"] == "RUNNING"
    account.update_pod(pod.id, {"locked": True}, 9)
    with pytest.raises(Rejected, match="locked"):
        act("stop", 9)
    assert act("terminate", 10) == "gone"
    with pytest.raises(Rejected, match="not found"):
        account.pod(pod.id, 10)
    assert account.list_pods(10) == {"pods": []}
    assert [(usage.start, usage.end) for usage in account.usage] == [(0, 5), (7, 10)]


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [
        ({"spot": True}, 422, "spot: is not a known field"),
        ({"gpu": {"id": "NVIDIA A40", "pools": ["AMPERE_48"]}}, 422, "gpu.pools: is not a known field"),
        ({"mounts": {"persistent": {"size": 5, "path": "/w"}}}, 422, "mounts.persistent.size: must be at least 10"),
        ({"gpu": {"id": "A40"}}, 400, "'A40' is not a GPU type"),
        ({"gpu": {"id": "NVIDIA A40", "count": 9}}, 400, "no longer any instances available"),
        ({"gpu": {"id": "NVIDIA A40", "minCudaVersion": "99.0"}}, 400, "no longer any instances available"),
        ({"cloud": "COMMUNITY"}, 400, "no longer any instances available"),
        ({"dataCenterIds": ["MOON-1"]}, 400, "'MOON-1' is not a data center"),
        (
            {"gpu": {"id": "NVIDIA H200"}, "dataCenterIds": ["EU-CZ-1"]},
            400,
            "no longer any instances available",
        ),
        ({"cpu": {"id": "cpu3c", "vcpuCount": 2}}, 400, "exactly one of gpu and cpu"),
        ({"mounts": {"network": [{"volumeId": "none", "path": "/w"}]}}, 400, "network volume 'none' not found"),
        (
            {
                "mounts": {
                    "network": [{"volumeId": "v", "path": "/w"}],
                    "persistent": {"size": 10, "path": "/x"},
                }
            },
            400,
            "exclude each other",
        ),
        ({"registry": "none"}, 400, "'none' is not a registry"),
        ({"templateId": "none"}, 404, "template 'none' not found"),
    ],
)
def test_a_pod_that_cannot_be_is_refused(account: Account, change: dict[str, Any], status: int, detail: str) -> None:
    with pytest.raises(Rejected) as refusal:
        made(account, **change)
    assert (refusal.value.status, detail in str(refusal.value)) == (status, True), str(refusal.value)
    assert account.pods == {}


def test_capacity_and_propagation_can_fail_for_pods_too(account: Account) -> None:
    account.faults.arm({"kind": "no_capacity", "route": "pods.create"})
    account.faults.arm({"kind": "propagation", "route": "pods.create", "seconds": 9})
    with pytest.raises(Rejected, match="no longer any instances"):
        made(account)
    pod = made(account)
    with pytest.raises(Rejected, match="not found"):
        account.pod(pod.id, 8)
    assert account.list_pods(8) == {"pods": []}
    assert [one["id"] for one in account.list_pods(9)["pods"]] == [pod.id]


def test_a_network_volume_binds_a_pod_to_its_data_center(account: Account) -> None:
    volume = account.create_volume({"name": "v", "size": 50, "dataCenter": "EU-RO-1"}, 0)
    mounts = {"network": [{"volumeId": volume["id"], "path": "/workspace"}]}
    pod = made(account, mounts=mounts)
    assert shown(account, pod, 0)["dataCenterId"] == "EU-RO-1"
    with pytest.raises(Rejected, match="no longer any instances"):
        made(account, mounts=mounts, dataCenterIds=["US-KS-2"])
    with pytest.raises(Rejected, match="cannot be changed"):
        account.update_pod(pod.id, {"mounts": {"network": [{"volumeId": "other", "path": "/w"}]}}, 0)


def test_what_is_injected_is_asked_for(account: Account) -> None:
    account.set_ssh_keys({"keys": ["ssh-ed25519 AAAA you"]})
    assert made(account).config["env"] == {}
    env = made(account, startSsh=True, startJupyter=True).config["env"]
    assert (env["PUBLIC_KEY"], set(env)) == ("ssh-ed25519 AAAA you", {"PUBLIC_KEY", "JUPYTER_PASSWORD"})
    template = account.create_template({"name": "t", "image": "you/t:1"})
    pod = made(account, templateId=template["id"], startJupyter=False)
    assert (set(pod.config["env"]), pod.config["template"]) == ({"PUBLIC_KEY"}, template["id"])


# --- templates, registries, volumes ----------------------------------------------------------------------------------


def test_names_of_templates_and_registries_are_unique(account: Account) -> None:
    first = account.create_template({"name": "a", "image": "x"})
    second = account.create_template({"name": "b", "image": "x"})
    account.create_registry({"name": "a", "username": "you", "password": "p"})
    for again in (
        lambda: account.create_template({"name": "a", "image": "y"}),
        lambda: account.update_template(second["id"], {"name": "a"}),
        lambda: account.create_registry({"name": "a", "username": "me", "password": "q"}),
    ):
        with pytest.raises(Rejected, match="unique"):
            again()
    assert account.update_template(first["id"], {"name": "a", "disk": 20})["disk"] == 20


def test_a_template_starts_ssh_and_jupyter_unless_it_says_no(account: Account) -> None:
    template = account.create_template({"name": "a", "image": "x"})
    assert (template["startSsh"], template["startJupyter"], template["public"]) == (True, True, False)


def test_a_registrys_password_is_never_shown(account: Account) -> None:
    registry = account.create_registry({"name": "a", "username": "you", "password": "canary"})
    assert registry == {"id": registry["id"], "name": "a"}
    assert "canary" not in str([account.registry(registry["id"]), account.list_registries()])
    template = account.create_template({"name": "t", "image": "x", "registry": registry["id"]})
    account.delete_registry(registry["id"], used=False)
    assert account.template(template["id"])["registry"] is None


def test_what_a_pod_uses_is_not_deleted(account: Account) -> None:
    template = account.create_template({"name": "t", "image": "x"})
    registry = account.create_registry({"name": "r", "username": "you", "password": "p"})
    with pytest.raises(Rejected, match="in use") as refusal:
        account.delete_template(template["id"], used=True)
    assert refusal.value.status == 400
    with pytest.raises(Rejected, match="in use") as refusal:
        account.delete_registry(registry["id"], used=True)
    assert refusal.value.status == 400


def test_a_public_template_can_be_read_only(account: Account) -> None:
    assert account.template("runpod-base")["public"]
    with pytest.raises(Rejected, match="not found"):
        account.update_template("runpod-base", {"disk": 5})
    with pytest.raises(Rejected, match="not found"):
        account.delete_template("runpod-base", used=False)


def test_a_volume_only_grows(account: Account) -> None:
    volume = account.create_volume({"name": "v", "size": 50, "dataCenter": "US-KS-2"}, 0)
    assert account.update_volume(volume["id"], {"size": 60, "name": "w"}, 1)["size"] == 60
    with pytest.raises(Rejected, match="cannot shrink"):
        account.update_volume(volume["id"], {"size": 59}, 2)
    for body in (
        {"dataCenter": "MOON-1"},
        {"dataCenter": "AP-JP-1"},
        {"dataCenter": "EU-RO-1", "type": "HIGH_PERFORMANCE"},
    ):
        with pytest.raises(Rejected) as refusal:
            account.create_volume({"name": "v", "size": 50, **body}, 0)
        assert refusal.value.status == 400
    account.delete_volume(volume["id"], 3)
    assert account.list_volumes() == {"networkVolumes": []}


# --- bills -----------------------------------------------------------------------------------------------------------


def asked(account: Account, now: float, size: str = "day", **more: Any) -> Window:
    return window(account.when(now), size, more.get("last"), more.get("start"), more.get("end"))


def test_a_pods_bill_is_its_hours_times_its_price(account: Account) -> None:
    pod, other = made(account), made(account, gpu={"id": "NVIDIA GeForce RTX 4090", "count": 2}, disk=10)
    account.delete_pod(pod.id, 2 * HOUR)
    bill = account.bill("pods", asked(account, 3 * HOUR), None, 3 * HOUR)
    by_pod = {record["podId"]: record for record in bill["records"]}
    assert by_pod[pod.id]["gpuAmount"] == pytest.approx(2 * 0.44)
    assert by_pod[pod.id]["diskAmount"] == pytest.approx(2 * 100 * 0.10 / 730)
    assert by_pod[other.id]["gpuAmount"] == pytest.approx(3 * 2 * 0.69)
    assert bill["metadata"]["uniquePodCount"] == bill["metadata"]["recordCount"] == 2
    assert bill["metadata"]["totals"]["totalAmount"] == pytest.approx(
        sum(record["totalAmount"] for record in bill["records"])
    )
    assert by_pod[pod.id]["startTime"] == "2027-01-15T00:00:00.000000Z"
    alone = account.bill("pods", asked(account, 3 * HOUR), pod.id, 3 * HOUR)
    assert [record["podId"] for record in alone["records"]] == [pod.id]
    assert alone["metadata"]["query"]["podId"] == pod.id


def test_a_workers_bill_is_its_seconds_times_the_pools_price(account: Account) -> None:
    endpoint = account.create_endpoint(
        {
            "name": "e",
            "type": "QUEUE",
            "image": "x",
            "gpu": {"pools": ["AMPERE_80"], "count": 2},
            "workers": {"min": 1, "max": 1},
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        },
        0,
    )
    account.update_endpoint(endpoint.id, {"workers": {"min": 0, "max": 0}}, 100)
    (record,) = account.bill("serverless", asked(account, HOUR), None, HOUR)["records"]
    assert record["serverlessId"] == endpoint.id
    assert record["gpuAmount"] == pytest.approx(100 * 2 * 0.00076)
    whole = account.bill_of_all(asked(account, HOUR), HOUR)
    assert whole["records"][0]["serverlessGpuAmount"] == whole["metadata"]["totals"]["totalAmount"]
    assert account.bill_of_none(asked(account, HOUR))["records"] == []


def test_usage_is_cut_where_buckets_end(account: Account) -> None:
    made(account, disk=1)
    bill = account.bill("pods", asked(account, 30 * HOUR, "hour", last=48), None, 30 * HOUR)
    assert len(bill["records"]) == 30
    days = account.bill("pods", asked(account, 30 * HOUR), None, 30 * HOUR)["records"]
    assert [record["gpuAmount"] for record in days] == pytest.approx([16 * 0.44, 14 * 0.44])


def test_a_volume_is_paid_for_as_long_as_it_is_there(account: Account) -> None:
    volume = account.create_volume({"name": "v", "size": 100, "dataCenter": "US-KS-2", "type": "STANDARD"}, 0)
    account.update_volume(volume["id"], {"size": 200}, 73 * HOUR)
    (record,) = account.bill("network-volumes", asked(account, 146 * HOUR, "year"), None, 146 * HOUR)["records"]
    assert record["standardAmount"] == pytest.approx(0.07 * (100 + 200) / 10)


@pytest.mark.parametrize(
    ("size", "start", "end"),
    [
        ("hour", "2027-01-14T09:00", "2027-01-15T09:00"),
        ("day", "2026-12-23T00:00", "2027-01-16T00:00"),
        ("week", "2026-08-03T00:00", "2027-01-18T00:00"),
        ("month", "2025-02-01T00:00", "2027-02-01T00:00"),
        ("year", "2004-01-01T00:00", "2028-01-01T00:00"),
    ],
)
def test_the_last_buckets_end_with_the_one_that_runs(account: Account, size: str, start: str, end: str) -> None:
    found = asked(account, 60, size, last=24)
    assert (found.start.isoformat()[:16], found.end.isoformat()[:16]) == (start, end)


def test_a_window_is_widened_to_whole_buckets_and_refused_if_it_is_none(account: Account) -> None:
    found = asked(account, 0, start=datetime(2027, 1, 3, 5, tzinfo=UTC), end=datetime(2027, 1, 4, tzinfo=UTC))
    assert (found.start, found.end) == (datetime(2027, 1, 3, tzinfo=UTC), datetime(2027, 1, 4, tzinfo=UTC))
    early, late = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, tzinfo=UTC)
    for size, more in (
        ("day", {"last": 1, "start": early}),
        ("day", {"last": 10**17}),
        ("week", {"end": late}),
        ("day", {"end": early}),
        ("day", {"start": late, "end": early}),
    ):
        with pytest.raises(Rejected) as refusal:
            asked(account, 0, size, **more)
        assert refusal.value.status == 400


@given(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)), st.sampled_from(BUCKETS), st.integers(1, 30))
def test_buckets_tile_time(when: datetime, size: str, count: int) -> None:
    when = when.replace(tzinfo=UTC)
    start = floor(when, size)
    assert start <= when < after(start, size)
    assert floor(start, size) == start
    assert after(after(start, size, count), size, -count) == start


# --- the catalog -----------------------------------------------------------------------------------------------------


def test_every_pool_has_members_and_each_type_one_pool() -> None:
    assert {gpu.pool for gpu in catalog.GPUS} == set(catalog.POOLS)
    assert len(catalog.GPU) == len(catalog.GPUS)
    assert all(
        any(gpu.secure for gpu in catalog.GPUS if gpu.pool == pool) for pool in catalog.POOLS if "96" not in pool
    )


def test_no_pool_is_cheaper_for_serverless_than_it_was_seen() -> None:
    prices = [price for price in catalog.POOLS.values() if price]
    assert min(prices) == pytest.approx(0.00016 * 3600)
    assert max(prices) == pytest.approx(0.0024 * 3600)


def test_a_type_without_a_pod_price_is_not_offered_for_pods() -> None:
    for gpu in catalog.GPUS:
        view = catalog.gpu_view(gpu, availability=True, products=("POD",))
        offered = gpu.secure > 0 or gpu.community > 0
        assert (view["availability"] == "HIGH") == offered
        assert ("dataCenters" in view) == offered
        serverless = catalog.gpu_view(gpu, availability=True, products=("SERVERLESS",))
        assert serverless["availability"] == "HIGH"


def test_types_come_in_the_order_of_the_pools() -> None:
    types = catalog.types_of(["ADA_24", "AMPERE_24"], ["NVIDIA L4"])
    assert [gpu.id for gpu in types] == ["NVIDIA GeForce RTX 4090", "NVIDIA RTX A5000", "NVIDIA GeForce RTX 3090"]
    assert not any(one in two for one, two in itertools.pairwise([gpu.pool for gpu in types]) if one != two)
