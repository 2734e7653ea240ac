"""The list of our pods, and the reaper: what it deletes, what it never touches, and when it says that a pod is gone."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_server import Runpod, local_server

import pods
import runpod_api
from common.problems import Problem
from pods import Reaped
from runpod_api import ApiError, NotFound

NOW = 1_800_000_000.0
# Written without the module's own pattern, so that a mistake there is not repeated here.
HEX = "0123456789abcdef"


def is_target(name: str, now: float) -> bool:
    """os-ablate-<8 hex>-exp<10 digits>, and that time is more than five minutes ago."""
    head, _, digits = name.rpartition("-exp")
    return (
        head.startswith("os-ablate-")
        and len(head) == 18
        and all(letter in HEX for letter in head[10:])
        and len(digits) == 10
        and digits.isascii()
        and digits.isdigit()
        and digits[0] != "0"
        and now - int(digits) > 300
    )


@dataclass
class FakeAccount:
    """An account on a clock of its own. `back`: how many seconds after its first DELETE a pod comes back (once).
    `stubborn`: pods that DELETE does not remove. `errors`: what the next calls raise."""

    pods: dict[str, dict[str, Any]]
    back: dict[str, float] = field(default_factory=dict)
    stubborn: frozenset[str] = frozenset()
    errors: list[ApiError] = field(default_factory=list)
    at: float = 0.0
    deleted: list[str] = field(default_factory=list)
    returning: dict[float, dict[str, Any]] = field(default_factory=dict)

    def clock(self) -> float:
        return self.at

    def now(self) -> float:
        return NOW + self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds

    def _settle(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        for when in [when for when in self.returning if when <= self.at]:
            pod = self.returning.pop(when)
            self.pods[pod["id"]] = pod

    def list(self, path: str, key: str) -> list[dict[str, Any]]:
        assert (path, key) == ("pods", "pods")
        self._settle()
        return list(self.pods.values())

    def get(self, path: str) -> dict[str, Any]:
        self._settle()
        pod = self.pods.get(path.removeprefix("pods/"))
        if pod is None:
            raise NotFound("404", status=404)
        return pod

    def delete(self, path: str) -> bool:
        self._settle()
        pod_id = path.removeprefix("pods/")
        self.deleted.append(pod_id)
        if pod_id in self.stubborn:
            return True
        pod = self.pods.pop(pod_id, None)
        if pod and pod_id in self.back:
            self.returning[self.at + self.back.pop(pod_id)] = pod
        return pod is not None

    def reap(self) -> Reaped:
        return pods.reap(self, now=self.now, clock=self.clock, sleep=self.sleep)


def pod(pod_id: str, name: str, status: str = "RUNNING") -> dict[str, Any]:
    return {
        "id": pod_id,
        "name": name,
        "status": status,
        "cost": 1.3899999856948853,
        "createdAt": "2027-01-15T06:00:00Z",
    }


def account(*names: str, **more: Any) -> FakeAccount:
    listed = [pod(f"p{number}", name) for number, name in enumerate(names)]
    return FakeAccount({each["id"]: each for each in listed}, **more)


def ours(ago: float, run: str = "0a1b2c3d") -> str:
    """A name of ours whose deadline was so many seconds ago."""
    return f"os-ablate-{run}-exp{int(NOW - ago)}"


# --- what is deleted ---------------------------------------------------------------------------------------------------

exact = st.builds(
    lambda run, ago: f"os-ablate-{run:08x}-exp{int(NOW) - ago}",
    st.integers(0, 2**32 - 1),
    st.one_of(st.integers(-1000, 1000), st.integers(-(10**8), 10**8)),
)
near = st.one_of(
    st.text(max_size=60),
    st.builds(lambda name, at, letter: name[:at] + letter + name[at:], exact, st.integers(0, 40), st.characters()),
    st.builds(lambda name, at: name[:at] + name[at + 1 :], exact, st.integers(0, 40)),
    st.builds(lambda name, before, after: before + name + after, exact, st.text(max_size=2), st.text(max_size=2)),
    exact.map(str.upper),
    exact.map(lambda name: name + "\n"),
    exact.map(lambda name: name.replace("-exp", "-exp-")),
    exact.map(lambda name: name.replace("ablate", "train")),
    exact.map(lambda name: re.sub(r"\d{10}$", lambda found: found[0].translate(dict(zip(range(48, 58), "٠١٢٣٤٥٦٧٨٩", strict=True))), name)),
    st.just("os-ablate-0a1b2c3d-exp0000000001"),
    st.just("my-important-training"),
)  # fmt: skip
item = st.builds(
    lambda number, name, status, drop: {
        key: value for key, value in pod(f"p{number}", name, status).items() if key != drop
    },
    st.integers(0, 10**6),
    st.one_of(exact, near),
    st.sampled_from(["PROVISIONING", "STARTING", "RUNNING", "EXITED", "ERROR"]),
    st.sampled_from(["", "cost", "createdAt", "status"]),
)


@settings(max_examples=1000)
@given(st.lists(item, max_size=12, unique_by=lambda each: each["id"]))
def test_no_foreign_pod_is_ever_deleted(listed: list[dict[str, Any]]) -> None:
    """1,000 random lists: all that is overdue goes, nothing else does."""
    fake = FakeAccount({each["id"]: each for each in listed})
    targets = {each["id"] for each in listed if is_target(each["name"], NOW)}
    # Those whose deadline passes while the reaper looks on are overdue by then, too.
    later = {each["id"] for each in listed if is_target(each["name"], NOW + pods.PATIENCE + 60)}
    reaped = fake.reap()
    assert targets <= set(fake.deleted) <= later
    assert set(reaped.gone) == set(fake.deleted)
    assert not reaped.unproven
    assert set(fake.pods) == {each["id"] for each in listed} - set(fake.deleted)


@pytest.mark.parametrize(
    ("ago", "goes"), [(-3600, False), (0, False), (299, False), (300, False), (302, True), (10**7, True)]
)
def test_five_minutes_of_grace(ago: float, goes: bool) -> None:
    fake = account(ours(ago))
    # On a clock that stands still, for the exact second.
    assert [each.overdue(NOW) for each in pods.ours(list(fake.pods.values()))] == [goes]


def test_what_is_no_pod_is_passed_over() -> None:
    odd: list[Any] = [
        {},
        {"name": None},
        {"id": 3, "name": ours(999)},
        {"id": "", "name": ours(999)},
        {"id": "../serverless/mine", "name": ours(999)},
        {"id": "x", "name": 7},
    ]
    assert pods.ours(odd) == []
    assert pods.ours([{"id": "x", "name": ours(999), "cost": "free", "createdAt": "yesterday"}])[0].usd_per_hour == 0


# --- when a pod counts as gone -----------------------------------------------------------------------------------------


def test_nothing_overdue_takes_no_time() -> None:
    fake = account(ours(-60), "other")
    assert fake.reap() == Reaped({}, {})
    assert fake.at == 0


def test_gone_is_said_after_a_window_without_it() -> None:
    fake = account(ours(999), "other")
    assert fake.reap() == Reaped({"p0": ours(999)}, {})
    assert fake.deleted == ["p0"]
    assert pods.WINDOW <= fake.at <= pods.WINDOW + 2 * pods.PAUSE


@pytest.mark.parametrize("after", [1, 20, 45, 59])
def test_a_pod_that_comes_back_is_deleted_again(after: float) -> None:
    fake = account(ours(999), back={"p0": after})
    assert fake.reap().gone == {"p0": ours(999)}
    assert fake.deleted == ["p0", "p0"]
    assert not fake.pods
    assert fake.at >= after + pods.WINDOW


def test_a_pod_that_stays_is_named() -> None:
    fake = account(ours(999), ours(1000, "ffffffff"), stubborn=frozenset({"p1"}))
    reaped = fake.reap()
    assert reaped.gone == {"p0": ours(999)}
    assert reaped.unproven == {"p1": "RunPod still listed it"}
    assert fake.at >= pods.PATIENCE


@pytest.mark.parametrize(
    ("status", "reaped"),
    [
        ("RUNNING", Reaped({}, {"p0": "RunPod still has it (RUNNING)"})),
        ("TERMINATED", Reaped({"p0": ours(999)}, {})),  # RunPod's word for deleted for good
    ],
)
def test_gone_from_the_list_but_not_by_its_id(status: str, reaped: Reaped) -> None:
    fake = account(ours(999))
    left = {**fake.pods["p0"], "status": status}
    fake.get = lambda path: left  # type: ignore[method-assign]
    assert fake.reap() == reaped


def test_errors_are_no_proof_and_no_end() -> None:
    fake = account(ours(999))
    fake.errors = [ApiError("HTTP 500", 75, status=500)]
    with pytest.raises(ApiError):  # nothing is known yet: there is nothing to go on with
        fake.reap()
    begun = account(ours(999))
    real = begun.delete

    def fails_first(path: str) -> bool:
        begun.delete = real  # type: ignore[method-assign]
        begun.errors = [ApiError("HTTP 503", 75, status=503)] * 3
        raise ApiError("HTTP 500", 75, status=500)

    begun.delete = fails_first  # type: ignore[method-assign]
    assert begun.reap().gone == {"p0": ours(999)}
    assert begun.at >= 3 * pods.PAUSE + pods.WINDOW
    assert not begun.pods


def test_a_run_of_errors_to_the_end_is_told() -> None:
    fake = account(ours(999))
    fake.delete = lambda path: fake.errors.extend([ApiError("HTTP 500", 75, status=500)] * 999) or True  # type: ignore[method-assign,func-returns-value]
    assert fake.reap() == Reaped({}, {"p0": "HTTP 500"})


# --- as a person types it ----------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> FakeAccount:
    """The command line on a fake account."""
    fake = FakeAccount({})
    monkeypatch.setattr(runpod_api, "from_environment", lambda warn: fake)
    monkeypatch.delenv("AS", raising=False)
    return fake


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["pods", *words])
    return pods.main()


def test_the_list(shown: FakeAccount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = int(time.time())
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now - 7300))
    late, fine = f"os-ablate-0a1b2c3d-exp{now - 4000}", f"os-ablate-0a1b2c3e-exp{now + 12_030}"
    listed = [
        pod("p1", late, "EXITED"),
        pod("p2", fine),
        pod("p3", "os-mine\x1b[31m"),
        pod("p4", "other"),
        pod("p5", "x"),
    ]
    shown.pods = {each["id"]: {**each, "createdAt": created} for each in listed}
    assert call(monkeypatch, "list") == 3
    out = capsys.readouterr().out
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert lines[0] == ["name", "id", "status", "$/h", "age", "deadline"]
    assert lines[1] == [late, "p1", "EXITED", "1.39", "2 h 1 min", "1 h 6 min ago"]
    assert lines[2] == [fine, "p2", "RUNNING", "1.39", "2 h 1 min", "in 3 h 20 min"]
    assert lines[3][0] == "os-mine"
    assert lines[3][-1] == "none in its name: never deleted from here"
    assert "2 pods whose name does not begin with os-: never touched from here" in out
    assert "1 overdue, still billed: make reap" in out
    monkeypatch.setenv("AS", "json")
    assert call(monkeypatch, "list") == 3
    data = json.loads(capsys.readouterr().out)
    assert data["others"] == 2
    assert [each["overdue"] for each in data["pods"]] == [True, False, False]
    del shown.pods["p1"]
    assert call(monkeypatch, "list") == 0


def test_an_empty_list(shown: FakeAccount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "list") == 0
    assert capsys.readouterr().out == "No pods of ours.\n"
    assert call(monkeypatch, "reap") == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_reap_says_what_it_could_not_prove(
    shown: FakeAccount, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"os-ablate-0a1b2c3d-exp{int(time.time()) - 4000}"
    shown.pods, shown.stubborn = {"p1": pod("p1", name)}, frozenset({"p1"})
    monkeypatch.setattr(pods, "PATIENCE", 0.0)
    assert call(monkeypatch, "reap") == 5
    err = capsys.readouterr().err
    assert f"deleting {name} (p1): its deadline passed 1 h 6 min ago" in err
    assert "not proven to be gone: p1: RunPod still listed it" in err
    assert "make reap" in err


def test_usage_and_missing_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pods", "kill"])
    with pytest.raises(Problem, match="usage"):
        pods.main()
    monkeypatch.setattr("sys.argv", ["pods", "list"])
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    with pytest.raises(Problem, match="RUNPOD_API_KEY"):
        pods.main()
    monkeypatch.setenv("AS", "yaml")
    with pytest.raises(Problem, match="AS=yaml is unknown"):
        pods.main()


# --- on the local RunPod -----------------------------------------------------------------------------------------------


@pytest.fixture
def runpod(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runpod]:
    """A local RunPod with five pods, and the environment that leads there: two of ours are overdue, one is not, one has
    no deadline, one is somebody else's."""
    now = int(time.time())
    names = (
        f"os-ablate-0000000a-exp{now - 900}",
        f"os-ablate-0000000b-exp{now - 901}",
        f"os-ablate-0000000c-exp{now + 900}",
    )
    monkeypatch.delenv("AS", raising=False)
    with local_server() as server:
        for name in (*names, "os-ablate-by-hand", "somebody-elses"):
            server.ok("POST", "pods", {"name": name, "image": "a/b:1", "gpu": {"id": "NVIDIA A40", "count": 1}})
        monkeypatch.setenv("RUNPOD_API_KEY", server.key)
        monkeypatch.setenv("RUNPOD_API_URL", server.api)
        server.forget_calls()
        yield server


def left(runpod: Runpod) -> list[str]:
    return sorted(each["name"].split("-exp")[0] for each in runpod.ok("GET", "pods")["pods"])


KEPT = ["os-ablate-0000000c", "os-ablate-by-hand", "somebody-elses"]


def test_pods_as_the_platform_lists_them(
    runpod: Runpod, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list") == 3
    out = capsys.readouterr().out
    assert "0.44" in out
    assert "15 min ago" in out
    assert "in 14 min" in out
    assert "1 pod whose name does not begin with os-: never touched from here" in out
    assert "2 overdue, still billed: make reap" in out
    assert runpod.mutating() == []


def test_reap_on_the_platform(
    runpod: Runpod, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pods, "WINDOW", 0.05)
    monkeypatch.setattr(pods, "PAUSE", 0.02)
    assert call(monkeypatch, "reap") == 0
    out = capsys.readouterr().out
    assert out.count("gone: os-ablate-") == 2
    assert left(runpod) == KEPT
    assert len(runpod.mutating()) == 2
    runpod.forget_calls()
    monkeypatch.setenv("AS", "json")
    assert call(monkeypatch, "reap") == 0
    assert json.loads(capsys.readouterr().out) == {"format": 1, "gone": {}, "unproven": {}}
    assert runpod.mutating() == []


@pytest.mark.parametrize(
    "faults",
    [
        [{"kind": "http", "route": "pods.delete", "status": 503, "times": 3}],
        [{"kind": "http", "route": "pods.delete", "status": 429, "retry_after": 2, "times": 2}],
        [{"kind": "http", "route": "pods.delete", "status": 409, "times": 2}],
        [{"kind": "lost_answer", "route": "pods.delete", "times": 2}],
        [{"kind": "lost_request", "route": "pods.delete"}, {"kind": "html", "route": "pods.get", "times": 2}],
        [{"kind": "http", "route": "pods.get", "status": 500, "times": 40}, {"kind": "html", "route": "pods.list"}],
    ],
)
def test_reap_through_faults(runpod: Runpod, faults: list[dict[str, Any]]) -> None:
    """Whatever goes wrong on the way: in the end the overdue ones are gone, seen to be gone, and the others are there."""
    elapsed = 0.0

    def sleep(seconds: float) -> None:
        nonlocal elapsed
        elapsed += seconds

    account = runpod_api.Api(runpod.key, runpod.api, clock=lambda: elapsed, sleep=sleep)
    for fault in faults:
        runpod.arm(**fault)
    reaped = pods.reap(account, clock=lambda: elapsed, sleep=sleep)
    assert len(reaped.gone) == 2
    assert not reaped.unproven
    assert left(runpod) == KEPT


def test_a_pod_that_cannot_be_deleted_is_named(runpod: Runpod) -> None:
    elapsed = 0.0

    def sleep(seconds: float) -> None:
        nonlocal elapsed
        elapsed += seconds

    runpod.arm("http", route="pods.delete", status=403, times=10_000)
    account = runpod_api.Api(runpod.key, runpod.api, clock=lambda: elapsed, sleep=sleep)
    reaped = pods.reap(account, clock=lambda: elapsed, sleep=sleep)
    assert not reaped.gone
    assert len(reaped.unproven) == 2
    assert all("HTTP 403" in reason for reason in reaped.unproven.values())


def test_a_key_that_is_refused(runpod: Runpod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "another")
    for verb in ("list", "reap"):
        with pytest.raises(ApiError, match="check RUNPOD_API_KEY") as caught:
            call(monkeypatch, verb)
        assert caught.value.code == 5
