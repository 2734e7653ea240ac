"""The diff between two endpoints: quiet where nothing differs, whole where something does, and always leading home."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.text import clean
from endpoint import plan as plans
from local_runpod import catalog
from local_runpod.faults import Faults
from local_runpod.management import Account

DIGESTS = [f"docker.io/you/worker@sha256:{character * 64}" for character in "abc"]
BODY: dict[str, Any] = {
    "name": "open-synthesis",
    "type": "QUEUE",
    "image": DIGESTS[0],
    "args": "",
    "disk": 40,
    "ports": [],
    "registry": None,
    "env": {"HF_TOKEN": "{{ RUNPOD_SECRET_hf_token }}", "QUANTIZATION": "nf4", "IMAGE": DIGESTS[0]},
    "gpu": {
        "pools": ["ADA_24", "AMPERE_24"],
        "excludedTypes": [],
        "count": 1,
        "allowedCudaVersions": [],
        "minCudaVersion": "12.6",
    },
    "workers": {"min": 0, "max": 3, "idleTimeout": 60},
    "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
    "timeout": 300_000,
    "flashboot": "FLASHBOOT",
    "dataCenterIds": [],
    "networkVolumes": [],
}


class Console:
    """One account without workers, its volumes and registries, and what it answers about an endpoint."""

    def __init__(self) -> None:
        self.account = Account(0.0, 1_790_000_000.0, Faults(), boot=None, seed=1)
        for name in ("one", "two"):
            self.account.volumes[name] = {"id": name, "name": name, "size": 10, "dataCenter": "US-KS-2"}
            self.account.registries[name] = {"id": name, "name": name}

    def make(self, body: dict[str, Any]) -> str:
        return self.account.create_endpoint(copy.deepcopy(body), 0.0).id

    def view(self, endpoint_id: str) -> dict[str, Any]:
        shown = self.account.endpoint_view(self.account.endpoint(endpoint_id, 0.0), "http://127.0.0.1")
        return dict(json.loads(json.dumps(shown)))  # as it arrives

    def patch(self, endpoint_id: str, body: dict[str, Any]) -> None:
        self.account.update_endpoint(endpoint_id, json.loads(json.dumps(body)), 0.0)


def fields(plan: plans.Plan) -> list[str]:
    return [change.field for change in plan.changes]


# --- a plan leads home -----------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Any desired state that config/endpoint.yaml can describe and the account takes."""
    pools = draw(
        st.lists(
            st.sampled_from(["ADA_24", "AMPERE_24", "AMPERE_48", "ADA_48_PRO", "AMPERE_80"]),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    members = [kind.id for kind in catalog.types_of(pools, [])]
    excluded = draw(st.lists(st.sampled_from(members), max_size=len(members) - 1, unique=True))
    gpu: dict[str, Any] = {"pools": pools, "excludedTypes": excluded, "count": draw(st.integers(1, 2))}
    gpu["allowedCudaVersions"] = draw(st.lists(st.sampled_from(catalog.CUDA_VERSIONS), max_size=2, unique=True))
    if not gpu["allowedCudaVersions"] and draw(st.booleans()):
        gpu["minCudaVersion"] = draw(st.sampled_from(catalog.CUDA_VERSIONS))
    most = draw(st.integers(0, 5))
    workers = {"min": draw(st.integers(0, most)), "max": most, "idleTimeout": draw(st.integers(1, 3600))}
    if draw(st.booleans()):
        scaling: dict[str, Any] = {"type": "QUEUE_DELAY", "queueDelay": draw(st.sampled_from([0.5, 1, 4, 4.0, 30]))}
    else:
        scaling = {"type": "REQUEST_COUNT", "requestCount": draw(st.integers(1, 9))}
        del workers["idleTimeout"]
    return {
        "name": draw(st.sampled_from(["open-synthesis", "other"])),
        "type": "QUEUE",
        "image": draw(st.sampled_from(DIGESTS)),
        "args": draw(TEXT),
        "disk": draw(st.integers(1, 100)),
        "ports": draw(st.lists(st.sampled_from(["80/http", "22/tcp", "81/http"]), max_size=2, unique=True)),
        "registry": draw(st.sampled_from([None, 0, 1])),
        "env": draw(st.dictionaries(st.from_regex(r"[A-Z_]{1,6}", fullmatch=True), TEXT, max_size=4)),
        "gpu": gpu,
        "workers": workers,
        "scaling": scaling,
        "timeout": draw(st.integers(5000, 600_000)),
        "flashboot": draw(st.sampled_from(["OFF", "FLASHBOOT", "PRIORITY_FLASHBOOT"])),
        "dataCenterIds": draw(st.lists(st.sampled_from(["US-KS-2", "EU-RO-1"]), max_size=2, unique=True)),
        "networkVolumes": draw(st.lists(st.sampled_from([0, 1]), max_size=2, unique=True)),
    }


def resolved(body: dict[str, Any], console: Console) -> dict[str, Any]:
    """The drawn numbers of registries and volumes as ids of this account."""
    registries, volumes = list(console.account.registries), list(console.account.volumes)
    registry = body["registry"]
    return {
        **body,
        "registry": None if registry is None else registries[registry],
        "networkVolumes": [volumes[number] for number in body["networkVolumes"]],
    }


@settings(max_examples=1000)
@given(desired=bodies(), actual=bodies())
def test_applying_a_plan_reaches_a_state_whose_plan_is_empty(desired: dict[str, Any], actual: dict[str, Any]) -> None:
    console = Console()
    desired, actual = resolved(desired, console), resolved(actual, console)
    endpoint_id = console.make(actual)
    plan = plans.make(desired, console.view(endpoint_id))
    if plan.action != "none":
        console.patch(endpoint_id, plan.body)
    again = plans.make(desired, console.view(endpoint_id))
    assert (again.action, again.body) == ("none", {}), fields(again)
    # And a create of it reads back as itself.
    assert plans.make(desired, console.view(console.make(desired))).action == "none"


@settings(max_examples=200)
@given(desired=bodies(), actual=bodies())
def test_a_plan_sends_nothing_that_does_not_differ(desired: dict[str, Any], actual: dict[str, Any]) -> None:
    console = Console()
    desired, actual = resolved(desired, console), resolved(actual, console)
    endpoint_id = console.make(actual)
    plan = plans.make(desired, console.view(endpoint_id))
    wanted, real = plans.normalise(desired), plans.normalise(console.view(endpoint_id))
    assert set(plan.body) == {key for key in wanted if wanted[key] != real[key]}


@given(bodies())
def test_normalising_twice_changes_nothing(body: dict[str, Any]) -> None:
    body["networkVolumes"], body["registry"] = [], None
    once = plans.normalise(body)
    assert plans.normalise(once) == once


# --- quiet -----------------------------------------------------------------------------------------------------------

SAME = [
    {"ports": None, "registry": "", "dataCenterIds": None},
    {"name": "open-synthesis -fb"},
    {"gpu": {**BODY["gpu"], "excludedTypes": None}},
    {"gpu": {key: value for key, value in BODY["gpu"].items() if key != "excludedTypes"}},
    {"env": {**BODY["env"], "RUNPOD_POD_ID": "x", "PUBLIC_KEY": "ssh-rsa", "JUPYTER_PASSWORD": "x", "PORT": "80"}},
    {"env": dict(reversed(list(BODY["env"].items())))},
    {"scaling": {"queueDelay": 4.0, "type": "QUEUE_DELAY"}},
    {"scaling": {"type": "QUEUE_DELAY", "queueDelay": 4, "requestCount": None, "new": 1}},
    {"someNewField": {"of": "the platform"}, "requestUrls": {"run": "https://x"}, "createdAt": "2026-01-01T00:00:00Z"},
]


@pytest.mark.parametrize("change", SAME)
def test_what_only_looks_different_is_no_change(change: dict[str, Any]) -> None:
    plan = plans.make(BODY, {**BODY, "id": "e", **change})
    assert plan.action == "none", fields(plan)
    assert "no change" in plans.text(plan)


def test_lists_that_mean_sets_have_no_order() -> None:
    body = {**BODY, "dataCenterIds": ["A", "B"], "ports": ["1/tcp", "2/tcp"]}
    assert (
        plans.make(body, {**body, "id": "e", "dataCenterIds": ["B", "A"], "ports": ["2/tcp", "1/tcp"]}).action == "none"
    )
    pools = {**BODY["gpu"], "pools": ["AMPERE_24", "ADA_24"]}
    assert fields(plans.make(BODY, {**BODY, "id": "e", "gpu": pools})) == ["gpu.pools"]  # an order of preference


def test_without_an_image_the_image_stays() -> None:
    body = {key: value for key, value in BODY.items() if key != "image"}
    body["env"] = {key: value for key, value in BODY["env"].items() if key != "IMAGE"}
    assert plans.make(body, {**BODY, "id": "e"}).action == "none"


# --- telling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 2])
def test_the_platforms_own_scale_down_is_recognised(most: int) -> None:
    plan = plans.make(BODY, {**BODY, "id": "e", "workers": {**BODY["workers"], "max": most}})
    assert fields(plan) == ["workers.max"]
    assert "after 3 days" in plan.changes[0].note
    assert "after 3 days" in plans.text(plan)
    assert not plan.new_release
    assert plan.body == {"workers": BODY["workers"]}


def test_a_max_that_somebody_lowered_otherwise_is_plain_drift() -> None:
    plan = plans.make(BODY, {**BODY, "id": "e", "workers": {**BODY["workers"], "max": 1}})
    assert plan.changes[0].note == ""


SECRET = "hf_ThisWasTypedIntoTheConsole0000"  # noqa: S105


@pytest.mark.parametrize(
    "env",
    [
        {**BODY["env"], "HF_TOKEN": SECRET},
        {**BODY["env"], "QUANTIZATION": SECRET},
        {**BODY["env"], "NEW_ONE": SECRET},
        {**BODY["env"], "NEW_ONE": "an ordinary-looking password"},
        {**BODY["env"], "HF_TOKEN": "an ordinary-looking password"},
    ],
)
def test_what_was_typed_into_the_console_is_never_shown(env: dict[str, str]) -> None:
    plan = plans.make(BODY, {**BODY, "id": "e", "env": env, "args": f"--token {SECRET}"})
    assert len(plan.changes) == 2
    for shown in (plans.text(plan), plans.markdown(plan), json.dumps(plans.as_dict(plan)), repr(plan)):
        assert SECRET not in shown
        assert "ordinary-looking" not in shown


def test_an_old_value_is_shown_only_where_it_is_one_of_ours() -> None:
    actual = {**BODY, "id": "e", "args": "--debug", "env": {**BODY["env"], "QUANTIZATION": "none"}}
    assert "none" not in plans.text(plans.make(BODY, actual))
    shown = plans.text(plans.make(BODY, actual, known={"none", "--debug"}))
    assert "env.QUANTIZATION  none → nf4" in shown
    assert '--debug → ""' in shown


def test_what_the_platform_added_to_the_variables_is_sent_back() -> None:
    """`env` is replaced whole."""
    added = {"PORT": "80", "PUBLIC_KEY": "ssh-rsa", "RUNPOD_FOO": "x"}
    plan = plans.make(BODY, {**BODY, "id": "e", "env": {**BODY["env"], **added, "QUANTIZATION": "none"}})
    assert plan.body == {"env": {**BODY["env"], **added}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", None), ("id", "../pods"), ("gpu", "x"), ("workers", []), ("scaling", "x"), ("env", {"A": 1}), ("env", {"A": None}),
        ("ports", {}), ("networkVolumes", [1]), ("disk", "40"), ("timeout", {}), ("name", 3), ("gpu", {"pools": "ADA_24"}),
        ("workers", {"max": "3"}),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_endpoint_is_told_by_its_field(field: str, value: Any) -> None:
    assert plans.misshapen({**BODY, "id": "e"}) == ""
    assert plans.misshapen({**BODY, "id": "e", field: value}).split(".")[0] == field
    assert plans.misshapen([]) == "the answer itself"


def test_an_endpoint_that_can_never_become_it_is_told() -> None:
    assert "CPU" in plans.impossible(BODY, {**BODY, "gpu": None, "cpu": [{"id": "cpu3c", "vcpuCount": 2}]})
    assert "LOAD_BALANCER" in plans.impossible(BODY, {**BODY, "type": "LOAD_BALANCER"})
    assert plans.impossible(BODY, {**BODY, "id": "e"}) == ""


def test_hostile_names_do_not_reach_terminal_or_page() -> None:
    hostile = "x\x1b[31m<script>|@someone\nSecond"
    plan = plans.make(BODY, {**BODY, "id": "e\x1b[2J", "args": hostile})
    assert "\x1b" not in clean(plans.text(plan))
    row = next(line for line in plans.markdown(plan).splitlines() if "args" in line)
    assert "<script>" not in row
    assert "@someone" not in row
    assert row.count("|") == 4


def test_the_forms_agree() -> None:
    plan = plans.make(BODY, None)
    data = plans.as_dict(plan)
    assert data["action"] == "create"
    assert data["new_release"]
    assert {change["field"] for change in data["changes"]} == set(fields(plan))
    assert all(change.field in plans.markdown(plan) for change in plan.changes)
    assert plan.body == BODY
