"""What is estimated, from which prices; and what runs are said to have cost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from local_server import Runpod, local_server

import models
from common.problems import Problem
from costs import __main__ as program
from costs import bills, compare, estimate, prices, show, taken
from models import Range

CONFIG = Path(__file__).parents[2] / "config"
KNOWN = models.load(CONFIG / "models.yaml")
SMALL, MIDDLE, LARGE = KNOWN.values()
TODAY = datetime.now(UTC).date().isoformat()
# The guide's prices, US dollars per hour.
GUIDE = prices.Catalog(
    (
        prices.Gpu("NVIDIA A100 40GB", "A100", None, 40, secure=1.67),
        prices.Gpu("NVIDIA A100 80GB", "A100", "AMPERE_80", 80, serverless=2.49, secure=2.50),
        prices.Gpu("NVIDIA GeForce RTX 4090", "RTX 4090", "ADA_24", 24, serverless=0.74),
    ),
    dict.fromkeys(prices.PRODUCTS, prices.Source("the guide", "2024")),
    {},
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the shipped configuration, no key."""
    for name in ("MODEL", "DOMAINS", "SYNTHESES", "MONTH", "AS", "RUNPOD_API_KEY", "RUNPOD_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONFIG_DIR", str(CONFIG))
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("ABLATIONS_DIR", str(tmp_path / "ablations"))
    return tmp_path


Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program with variables of the environment: its exit code and what it printed."""

    def run(verb: str, **environment: str) -> tuple[int, str]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.argv", ["costs", verb])
        code = program.main()
        return code, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def runpod() -> Iterator[Runpod]:
    with local_server() as server:
        yield server


class Answers(ThreadingHTTPServer):
    """RunPod, as far as a test writes it down: `answers` by path; what is not there is a 404. `asked`: path and query."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v2"


class _Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path.removeprefix("/v2/")
        self.server.asked.append((path, dict(parse_qsl(parts.query))))
        answer = self.server.answers.get(path, 404)
        status, body = (answer, {"detail": "not so"}) if isinstance(answer, int) else (200, answer)
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """A server of a test's own answers, and the environment that leads there."""
    server = Answers()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("RUNPOD_API_KEY", "k")
    monkeypatch.setenv("RUNPOD_API_URL", server.url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


# --- the estimate ------------------------------------------------------------------------------------------------------


def test_the_guides_prices_give_the_guides_costs() -> None:
    found = [estimate.estimate(model, prices.Prices([GUIDE]), estimate.Plan()) for model in KNOWN.values()]
    assert [round(each.ablation.expected, 1) for each in found if each.ablation] == [2.5, 7.5, 30.0]
    # The guide counts the seconds of a synthesis alone: no cold start, no idle time.
    assert [round(each.warm.expected, 2) for each in found if each.warm] == [0.02, 0.12, 0.25]
    # "Under 20 dollars" for 4 domains of 8 to 10 on the 32B holds even where each synthesis is alone.
    case_study = found[1].case_study
    assert case_study is not None
    assert case_study.high < 20


def test_what_differs_from_the_guide_is_the_price() -> None:
    """As shipped, each cost is the guide's times the ratio of the prices, and nothing else."""
    table = prices.Prices([prices.table(CONFIG / "prices.yaml")])
    guide = prices.Prices([GUIDE])
    for model in KNOWN.values():
        ours, theirs = (estimate.estimate(model, each, estimate.Plan()) for each in (table, guide))
        assert ours.pod
        assert theirs.pod
        assert ours.worker
        assert theirs.worker
        assert ours.ablation
        assert theirs.ablation
        assert ours.warm
        assert theirs.warm
        rent = ours.pod.usd_per_hour.expected / theirs.pod.usd_per_hour.expected
        assert ours.ablation.expected / theirs.ablation.expected == pytest.approx(rent)
        serving = ours.worker.usd_per_hour.expected / theirs.worker.usd_per_hour.expected
        assert ours.warm.expected / theirs.warm.expected == pytest.approx(serving)
        assert 0.5 < rent < 1 < serving < 1.6  # pods have become cheaper, serverless dearer


def test_the_documented_comparison_is_what_is_computed() -> None:
    page = (CONFIG.parent / "docs" / "costs.md").read_text()
    table = prices.Prices([prices.table(CONFIG / "prices.yaml")])
    found = [estimate.estimate(model, table, estimate.Plan()) for model in KNOWN.values()]
    for each, name in zip(found, ("Qwen3-14B", "Qwen3-32B", "Llama 3.3 70B"), strict=True):
        assert each.ablation
        assert each.warm
        assert each.alone
        rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| a")}
        assert f"| ${show.two_digits(each.ablation.expected)} |" in rows[f"ablation, {name}"]
        told = f"${show.two_digits(each.warm.expected)} warm, ${show.two_digits(each.alone.expected)} alone"
        assert told in rows[f"a synthesis, {name}"]
    study = found[1].case_study
    assert study
    assert f"${show.two_digits(study.expected)}, at most ${show.two_digits(study.high)}" in page


def test_the_parts_of_an_estimate() -> None:
    plan = estimate.Plan(domains=2, syntheses=5, idle_seconds=30)
    found = estimate.estimate(SMALL, prices.Prices([GUIDE]), plan)
    seconds, cold = SMALL.serving.seconds, SMALL.serving.cold_start_seconds
    assert found.hours == Range(2 / 3 * 1.5, 1.5, 4 / 3 * 1.5)
    assert found.alone == estimate.combine(lambda a, b: (a + b + 30) * 0.74 / 3600, seconds, cold)
    assert estimate.case_study_seconds(SMALL, plan) == Range(
        10 * seconds.low + cold.low + 30, 10 * seconds.expected + 2 * (cold.expected + 30), 10 * (seconds.high + cold.high + 30)
    )  # fmt: skip
    assert found.total
    assert found.ablation
    assert found.case_study
    assert found.total.expected == found.ablation.expected + found.case_study.expected
    unpriced = estimate.estimate(LARGE, prices.Prices([replace(GUIDE, gpus=GUIDE.gpus[:1])]), plan)
    assert (unpriced.ablation, unpriced.warm, unpriced.case_study, unpriced.total) == (None, None, None, None)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.0042, "0.0042"), (0.037, "0.037"), (0.0996, "0.10"), (1, "1.0"), (2.085, "2.1"), (9.96, "10"), (16.7, "17"), (129, "130")],
)  # fmt: skip
def test_two_digits(value: float, words: str) -> None:
    assert show.two_digits(value) == words


def test_other_figures() -> None:
    assert [show.cents(value) for value in (0, 0.004, 0.006, 1.005, 12.3)] == ["0.00", "<0.01", "0.01", "1.00", "12.30"]
    assert [show.duration(each) for each in (0, 59.9, 61, 3600, -12_000, 187_200)] == [
        "0 s", "59 s", "1 min", "1 h 0 min", "3 h 20 min", "2 d 4 h",
    ]  # fmt: skip


# --- prices ------------------------------------------------------------------------------------------------------------


def catalog(*gpus: prices.Gpu, stock: dict[tuple[prices.Product, str], str] | None = None) -> prices.Prices:
    return prices.Prices([replace(GUIDE, gpus=gpus, stock=stock or {})])


PCIE = prices.Gpu("NVIDIA A100 80GB PCIe", "A100 PCIe", "AMPERE_80", 80, serverless=2.74, secure=1.39, community=1.19)
SXM = prices.Gpu("NVIDIA A100-SXM4-80GB", "A100 SXM", "AMPERE_80", 80, serverless=2.74, secure=1.49)
A40 = prices.Gpu("NVIDIA A40", "A40", "AMPERE_48", 48, secure=0.44)
A4000 = prices.Gpu("NVIDIA RTX A4000", "RTX A4000", "AMPERE_16", 100, secure=0.17)


def test_a_card_is_priced_by_name_and_memory() -> None:
    found = catalog(A4000, SXM, A40, PCIE)
    price = found.card("2x A100 80GB")
    assert price
    assert price.usd_per_hour == Range(2.38, 2.78, 2.98)
    assert (price.what, price.count, price.note) == (PCIE.id, 2, "")
    smaller = found.card("A100 40GB")
    assert smaller
    assert smaller.usd_per_hour == Range(1.19, 1.39, 1.49)
    assert smaller.note == "RunPod has no A100 40GB: priced as the one of 80 GB"
    assert found.card("RTX A4000 16GB")  # its memory here is 100
    assert found.card("A400 16GB") is None  # the start of another name is no name
    assert found.card("H100 80GB") is None
    assert found.card("a big one") is None


def test_a_machine_is_priced_by_the_name_that_torch_gives_it() -> None:
    found = catalog(PCIE, SXM)
    price = found.machine("4 x NVIDIA A100-SXM4-80GB")
    assert price
    assert price.usd_per_hour == Range(5.96, 5.96, 5.96)
    for none in ("CPU", "", "1 x NVIDIA GeForce GTX 1080", "1 x NVIDIA A40, 1 x NVIDIA L4"):
        assert found.machine(none) is None


def test_a_pool_is_priced_with_its_stock() -> None:
    found = catalog(PCIE, SXM, stock={("serverless", PCIE.id): "LOW", ("serverless", SXM.id): "MEDIUM"})
    price = found.pool("AMPERE_80", 2)
    assert price
    assert (price.usd_per_hour, price.stock) == (Range(5.48, 5.48, 5.48), "MEDIUM")
    assert found.pool("ADA_24") is None


def test_the_first_catalog_that_has_a_price_gives_it() -> None:
    dear = replace(GUIDE, gpus=(replace(PCIE, serverless=9.0),))
    both = prices.Prices([dear, GUIDE])
    dear_price, guide_price = both.pool("AMPERE_80"), both.pool("ADA_24")
    assert dear_price
    assert dear_price.usd_per_hour.low == 9.0
    assert guide_price
    assert guide_price.usd_per_hour.low == 0.74


def test_the_shipped_table_prices_every_shipped_model() -> None:
    table = prices.table(CONFIG / "prices.yaml")
    found = prices.Prices([table])
    for model in KNOWN.values():
        assert found.card(model.card)
        assert all(found.pool(pool) for pool in model.serving.pools)
    # One pool has one serverless price.
    for gpu in table.gpus:
        assert {each.serverless for each in table.gpus if each.pool == gpu.pool} == {gpu.serverless}


GOOD_TABLE = """
sources:
  serverless: {from: a page, date: "2026-06-08"}
  pod: {from: a page, date: "2026-09"}
gpus:
  - {id: NVIDIA A40, pool: AMPERE_48, memory: 48, serverless: 1.22}
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("", ""), ""),
        (("sources:", "source:"), "unknown key source"),
        (('date: "2026-09"', "when: now"), "unknown key when"),
        (('date: "2026-09"', "date: 2026-09-01"), "sources.pod needs a text `from` and a date"),
        (('date: "2026-09"', 'date: "autumn"'), "sources.pod needs"),
        (("memory: 48", "memory: 48.5"), "prices.yaml:6: NVIDIA A40: memory must be whole GB"),
        (("serverless: 1.22", "serverless: -1"), "serverless must be US dollars per hour, not -1"),
        (("serverless: 1.22", "serverless: free"), "serverless must be US dollars per hour, not 'free'"),
        (("serverless: 1.22", "spot: 1"), "unknown key spot"),
        (("id: NVIDIA A40, ", ""), "missing key id"),
        (("pool: AMPERE_48", "pool: 48"), "id and pool must be texts"),
        (("  - {", "  - {id: NVIDIA A40, pool: AMPERE_48, memory: 48}\n  - {"), "NVIDIA A40 stands there twice"),
        (("gpus:\n", "gpus: []\nx:\n"), "unknown key x"),
    ],
)
def test_what_the_table_refuses(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(GOOD_TABLE.replace(*change))
    if not words:
        assert prices.table(path).gpus[0].serverless == 1.22
        return
    with pytest.raises(Problem) as caught:
        prices.table(path)
    assert words in str(caught.value)
    assert "prices.yaml" in str(caught.value)


# --- make estimate -----------------------------------------------------------------------------------------------------


def test_estimate_without_a_key_says_from_when_its_prices_are(call: Call) -> None:
    code, out = call("estimate")
    assert code == 0
    assert all(model.id in out for model in KNOWN.values())
    assert "RUNPOD_API_KEY is not set: prices are those of config/prices.yaml" in out
    assert "2026-06-08" in out
    assert "2026-09" in out
    assert "Qwen/Qwen3-14B: RunPod has no A100 40GB: priced as the one of 80 GB" in out
    # As shipped, RunPod ends a job after 300 s, and the 70B may take longer.
    assert "meta-llama/Llama-3.3-70B-Instruct: a synthesis may take 540 s, but is ended after 300 s" in out
    assert "timeout in config/endpoint.yaml and execution_timeout in config/inference.yaml" in out
    assert "Qwen/Qwen3-32B: a synthesis may take" not in out


def test_estimate_from_the_live_catalog(call: Call, runpod: Runpod) -> None:
    live = {"RUNPOD_API_KEY": runpod.key, "RUNPOD_API_URL": runpod.api}
    code, out = call("estimate", AS="json", MODEL="qwen/qwen3-14b", DOMAINS="2", SYNTHESES="3", **live)
    data = json.loads(out)
    assert code == 0
    assert (data["date"], data["domains"], data["syntheses"], data["idle_seconds"]) == (TODAY, 2, 3, 60)
    [model] = data["models"]
    assert model["model"] == "Qwen/Qwen3-14B"
    assert model["case_study"]["syntheses"] == 6
    for price in (
        model["ablation"]["price"],
        model["synthesis"]["price"],
        *(each["price"] for each in model["other_pools"]),
    ):
        assert price["source"] == {"name": "the local RunPod's catalog, made for practice", "date": TODAY}
        assert price["stock"] == "HIGH"
    gpus = {gpu["id"]: gpu for gpu in runpod.ok("GET", "catalog/gpus")["gpus"]}
    per_hour = gpus["NVIDIA GeForce RTX 4090"]["price"]["serverless"]
    assert model["synthesis"]["usd_warm"]["expected"] == pytest.approx(120 * per_hour / 3600, abs=1e-4)
    assert not any("config/prices.yaml" in note for note in data["notes"])
    # The same figures as text.
    code, out = call("estimate", AS="")
    assert show.two_digits(120 * per_hour / 3600) in out
    assert TODAY in out


@pytest.mark.parametrize("answer", [401, 403, 500, {"gpus": []}, {"gpus": [{"id": 3}, 7]}, {}])
def test_a_catalog_that_does_not_answer_is_said_and_replaced(
    call: Call, answers: Answers, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prices, "_BUDGET", 0.2)
    answers.answers["catalog/gpus"] = answer
    code, out = call("estimate", MODEL="Qwen/Qwen3-14B")
    assert code == 0
    assert "RunPod's catalog did not answer, so prices are those of config/prices.yaml" in out
    assert "2026-06-08" in out


def test_odd_entries_of_the_live_catalog(call: Call, answers: Answers) -> None:
    """32-bit floats; a cloud that is not offered; entries that are not as they should be; a price that is missing."""
    good = {
        "id": "NVIDIA A100 80GB PCIe",
        "name": "A100",
        "pool": "AMPERE_80",
        "memory": 80,
        "secure": True,
        "community": False,
    }
    answers.answers["catalog/gpus"] = {
        "gpus": [
            {**good, "availability": "LOW", "price": {"secure": 1.3899999856948853, "community": 0.1, "serverless": 2.7400000095}},
            {**good, "id": "AMD Instinct MI300X OAM", "pool": None, "price": {"secure": 1.9, "community": 0}},
            {**good, "id": "NVIDIA A100 80GB X", "price": None},
            {**good, "id": "NVIDIA A100 80GB Y", "price": {"secure": 0, "community": 0}},
            {**good, "id": "NVIDIA A100 80GB Z", "price": {"secure": "cheap"}},
            {**good, "id": None}, None,
        ]
    }  # fmt: skip
    code, out = call("estimate", AS="json", MODEL="Qwen/Qwen3-32B")
    [model] = json.loads(out)["models"]
    assert code == 0
    assert model["ablation"]["price"]["usd_per_hour"] == {"low": 1.39, "expected": 1.39, "high": 1.39}
    assert model["synthesis"]["price"]["usd_per_hour"]["expected"] == 2.74
    # What the live catalog does not have comes from the table, with the table's date.
    assert [each["price"]["source"]["date"] for each in model["other_pools"]] == ["2026-06-08", "2026-06-08"]
    assert "Qwen/Qwen3-32B: NVIDIA A100 80GB PCIe for pods: RunPod says LOW are free now" in json.loads(out)["notes"]
    assert [query["product"] for _, query in answers.asked] == ["SERVERLESS", "POD"]
    assert all(query["include"] == "AVAILABILITY" for _, query in answers.asked)


def test_a_price_that_nobody_knows_is_exit_code_4(call: Call, place: Path) -> None:
    text = (CONFIG / "models.yaml").read_text()
    (place / "models.yaml").write_text(text.replace("pools: [ADA_24, ", "pools: [NEW_24, "))
    (place / "prices.yaml").write_text((CONFIG / "prices.yaml").read_text())
    code, out = call("estimate", CONFIG_DIR=str(place), MODEL="Qwen/Qwen3-14B")
    assert code == 4
    assert "not known" in out
    code, out = call("estimate", AS="json")
    assert json.loads(out)["models"][0]["total"] == {"usd": None}


def test_idle_time_is_that_of_the_endpoint(call: Call, place: Path) -> None:
    for name in ("models.yaml", "prices.yaml"):
        (place / name).write_text((CONFIG / name).read_text())
    (place / "endpoint.yaml").write_text("workers: {idleTimeout: 5}\ntimeout: 100000\n")
    code, out = call("estimate", CONFIG_DIR=str(place), AS="json", MODEL="Qwen/Qwen3-14B")
    data = json.loads(out)
    assert (code, data["idle_seconds"]) == (0, 5)
    assert any("may take 180 s, but is ended after 100 s" in note for note in data["notes"])
    (place / "endpoint.yaml").write_text("- 1\n")
    assert json.loads(call("estimate")[1])["idle_seconds"] == 60


@pytest.mark.parametrize(
    ("verb", "environment", "words"),
    [
        ("estimate", {"MODEL": "Qwen/Qwen9"}, "MODEL=Qwen/Qwen9 is not in config/models.yaml; known are"),
        ("estimate", {"DOMAINS": "0"}, "DOMAINS must be a whole number from 1 to 1000, not 0"),
        ("estimate", {"DOMAINS": "four"}, "DOMAINS must be"),
        ("estimate", {"SYNTHESES": "9" * 5000}, "SYNTHESES must be"),
        ("estimate", {"SYNTHESES": "²"}, "SYNTHESES must be"),
        ("estimate", {"AS": "pdf"}, "AS=pdf is unknown"),
        ("costs", {"MONTH": "November"}, "MONTH must be a month like 2026-11"),
        ("costs", {"MONTH": "2026-13"}, "MONTH must be"),
        ("bill", {}, "usage: python -m costs estimate | costs"),
    ],
)
def test_bad_input_is_named(call: Call, verb: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(Problem) as caught:
        call(verb, **environment)
    assert words in str(caught.value)
    assert caught.value.code == 2


# --- make costs --------------------------------------------------------------------------------------------------------

RENTED = "https://api.runpod.ai/v2"
MODEL = "you/Qwen3-14B-ablated-nf4"


def keep(place: Path, created: str, name: str = "", **changes: Any) -> dict[str, Any]:
    """A run's run.json, as the client writes it; `changes` replace parts, None removes one."""
    record: dict[str, Any] = {
        "format": 1,
        "question": "Q",
        "created": created,
        "job": {"id": "j", "endpoint": "ep1", "url": RENTED, "policy": {}},
        "states": [],
        "timings": {"retrieval_seconds": 0.3, "total_seconds": 130.0, "queue_ms": 5000, "execution_ms": 120_000},
        "cost": {"execution_seconds": 120.0, "usd": None},
        "outcome": "COMPLETED",
        "model": {"id": MODEL, "revision": "0" * 40, "engine": "transformers"},
        **changes,
    }
    stamp = created.replace("-", "").replace(":", "")
    folder = place / "runs" / (name or f"{stamp}-q-{len(list((place / 'runs').glob('*'))):08x}")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    return record


def job(endpoint: str = "ep1", url: str = RENTED) -> dict[str, Any]:
    return {"id": "j", "endpoint": endpoint, "url": url}


def times(milliseconds: float | None) -> dict[str, Any]:
    return {"total_seconds": 130.0, "execution_ms": milliseconds}


def ablate(
    place: Path, stamp: str = "20261102T100000Z", report: str = "2026-11-02T11:30:00+00:00", **changes: Any
) -> None:
    """An ablation's folder, as the ablate image writes it."""
    folder = place / "ablations" / f"{stamp}-qwen3-14b-0a1b2c3d"
    folder.mkdir(parents=True)
    record = {
        "model": "Qwen/Qwen3-14B",
        "load": {"machine": "1 x NVIDIA A100 80GB PCIe", "batch_size": 8},
        "searched_seconds": 4000.0,
        "published": {"nf4": {"repo": "you/secret-name", "commit": "c"}},
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(record))
    if report:
        (folder / "report.json").write_text(json.dumps({"written": report}))


def account(answers: Answers, billed: float | None = None, pools: tuple[str, ...] = ("ADA_24",)) -> None:
    """An account with endpoint ep1, the prices of two pools, and a bill."""
    gpus = [("NVIDIA GeForce RTX 4090", "ADA_24", 24, 1.2), ("NVIDIA A100 80GB PCIe", "AMPERE_80", 80, 2.4)]
    answers.answers = {
        "catalog/gpus": {
            "gpus": [
                {
                    "id": one,
                    "pool": pool,
                    "memory": memory,
                    "price": {"secure": 2.0, "community": 1.0, "serverless": usd},
                }
                for one, pool, memory, usd in gpus
            ]
        },
        "serverless/ep1": {"id": "ep1", "gpu": {"pools": list(pools), "count": 1}},
        "billing/pods": {"records": [{"podId": "p1", "totalAmount": 1.5}, {"podId": "p1", "totalAmount": 0.5}]},
    }
    if billed is not None:
        answers.answers["billing/serverless"] = {
            "records": [
                {"serverlessId": "ep1", "totalAmount": billed / 2},
                {"serverlessId": "ep1", "totalAmount": billed / 2},
                {"serverlessId": "another", "totalAmount": 99.0},
                {"serverlessId": "ep1", "totalAmount": "much"},
            ]
        }


def test_nothing_done_costs_nothing(call: Call) -> None:
    code, out = call("costs")
    assert code == 0
    assert "Nothing here has cost anything" in out


def test_local_runs_are_never_mixed_in(call: Call, place: Path, answers: Answers) -> None:
    keep(place, "2026-11-03T10:00:00Z", job=job("local", "http://127.0.0.1:1234/v2"), timings=times(90_000_000))
    keep(
        place,
        "2026-11-03T11:00:00Z",
        job=job("ep1", "http://open-synthesis-0-runpod:8000/v2"),
        timings=times(90_000_000),
    )
    code, out = call("costs")
    assert code == 0
    assert "2 runs on the local RunPod: cost nothing" in out
    assert answers.asked == []  # nobody had to be asked
    # Beside rented ones: the same id of an endpoint is another one there.
    account(answers, billed=(120 + 90 + 60) * 1.2 / 3600)
    keep(place, "2026-11-03T12:00:00Z")
    code, out = call("costs", AS="json")
    data = json.loads(out)
    assert code == 0
    assert data["local_runs"] == 2
    [row] = data["endpoints"]
    assert (row["runs"], row["seconds"]) == (1, 120)


def test_as_expected(call: Call, place: Path, answers: Answers) -> None:
    """Two runs in one sitting and one later: two cold starts, two idle times."""
    for created in ("2026-11-03T10:00:00Z", "2026-11-03T10:02:30Z", "2026-11-03T15:00:00Z"):
        keep(place, created)
    account(answers, billed=(3 * 120 + 2 * (90 + 60)) * 1.2 / 3600)
    code, out = call("costs", AS="json")
    data = json.loads(out)
    assert code == 0, out
    [row] = data["endpoints"]
    assert row["usd"] == {"low": 0.12, "expected": 0.12, "high": 0.12}
    assert row["time_difference"] == pytest.approx(0)
    assert row["bill_difference"] == pytest.approx(0)
    assert (data["flags"], data["not_known"], data["notes"]) == ([], [], [])
    asked = dict(answers.asked)
    assert asked["billing/serverless"] == {
        "serverlessId": "ep1", "bucketSize": "day", "startTime": "2026-11-03T00:00:00Z",
    }  # fmt: skip
    code, out = call("costs", AS="")
    assert code == 0
    assert "ep1" in out
    assert "0.12" in out
    assert TODAY in out


@pytest.mark.parametrize(("share", "flagged"), [(0.85, "15% less"), (0.95, ""), (1.09, ""), (1.12, "12% more")])
def test_more_than_ten_percent_is_flagged(
    call: Call, place: Path, answers: Answers, share: float, flagged: str
) -> None:
    keep(place, "2026-11-03T10:00:00Z", timings=times(120_000 * share))
    account(answers, billed=(120 + 90 + 60) * 1.2 / 3600)
    code, out = call("costs")
    assert code == (3 if flagged else 0)
    assert (f"flagged: endpoint ep1: the jobs took {flagged} than estimated" in out) == bool(flagged)
    account(answers, billed=share * (120 + 90 + 60) * 1.2 / 3600)
    code, out = call("costs")
    assert (f"flagged: endpoint ep1: the bill is {flagged} than estimated" in out) == bool(flagged)


def test_without_a_key_the_time_is_compared_and_the_cost_is_not_known(call: Call, place: Path) -> None:
    keep(place, "2026-11-03T10:00:00Z")
    code, out = call("costs")
    assert code == 4
    assert "not known: endpoint ep1: what 1 run cost" in out
    assert "without RUNPOD_API_KEY" in out
    keep(place, "2026-11-03T11:00:00Z", timings=times(400_000))
    assert call("costs")[0] == 3


def test_several_pools_give_a_range(call: Call, place: Path, answers: Answers) -> None:
    keep(place, "2026-11-03T10:00:00Z")
    account(answers, pools=("ADA_24", "AMPERE_80"))
    answers.answers["billing/serverless"] = 403
    code, out = call("costs")
    assert code == 0
    assert "0.04 to 0.08" in out
    assert "endpoint ep1: its bill is not known: " in out
    answers.answers["serverless/ep1"]["gpu"]["pools"] = ["ADA_24", "SECRET_99"]
    code, out = call("costs")
    assert code == 4  # which of the two it was is not recorded


def test_an_endpoint_that_is_gone_is_known_by_its_bill(call: Call, place: Path, answers: Answers) -> None:
    keep(place, "2026-11-03T10:00:00Z")
    account(answers, billed=0.5)
    del answers.answers["serverless/ep1"]
    code, out = call("costs", AS="json")
    data = json.loads(out)
    assert code == 0
    assert data["endpoints"][0]["billed"] == 0.5
    assert data["endpoints"][0]["usd"] is None
    assert data["notes"] == ["endpoint ep1: its GPUs are not known: RunPod does not know it (any more)"]


def test_runs_whose_cost_cannot_be_known_are_named(
    call: Call, place: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bills, "_BUDGET", 0.2)
    account(answers)
    answers.answers["billing/serverless"] = 500
    keep(place, "2026-11-03T10:00:00Z")
    keep(place, "2026-11-03T11:00:00Z", outcome="INTERRUPTED", timings=None, model=None)
    keep(place, "2026-11-03T12:00:00Z", name=".20261103T120000Z-q-0000000a", outcome=None, timings=None)
    keep(place, "2026-11-03T13:00:00Z", name="20261103T130000Z-q-0000000b", job=job("../pods"))
    (place / "runs" / "20261103T140000Z-q-0000000c").mkdir()
    (place / "runs" / "20261103T150000Z-q-0000000d").mkdir()
    (place / "runs" / "20261103T150000Z-q-0000000d" / "run.json").write_text("{")
    (place / "runs" / "notes").mkdir()  # no run
    (place / "runs" / "README.md").write_text("mine")
    code, out = call("costs", AS="json", MONTH="2026-11")
    data = json.loads(out)
    assert code == 4
    assert data["endpoints"][0]["timed"] == 1
    assert data["endpoints"][0]["runs"] == 3
    assert data["not_known"] == [
        "endpoint ep1: what 3 runs cost",
        "20261103T110000Z-q-00000001: RunPod told no execution time (INTERRUPTED)",
        "20261103T120000Z-q-0000000a: it has not ended, or was killed",
        "20261103T130000Z-q-0000000b: it names no endpoint",
        "20261103T140000Z-q-0000000c: its run.json cannot be read",
        "20261103T150000Z-q-0000000d: its run.json cannot be read",
    ]


def test_a_month(call: Call, place: Path, answers: Answers) -> None:
    account(answers, billed=0.09)
    for created in ("2026-09-30T23:59:59Z", "2026-10-01T00:00:00Z", "2026-10-31T23:59:59Z", "2026-11-01T00:00:00Z"):
        keep(place, created)
    data = json.loads(call("costs", AS="json", MONTH="2026-10")[1])
    assert data["endpoints"][0]["runs"] == 2
    query = dict(answers.asked)["billing/serverless"]
    assert (query["startTime"], query["endTime"]) == ("2026-10-01T00:00:00Z", "2026-11-01T00:00:00Z")
    assert dict(answers.asked)["billing/pods"]["endTime"] == "2026-11-01T00:00:00Z"
    assert "Nothing here has cost anything" in call("costs", AS="", MONTH="2020-01")[1]


def test_a_model_without_a_block_has_no_estimate(call: Call, place: Path, answers: Answers) -> None:
    account(answers, billed=0.3)
    keep(place, "2026-11-03T10:00:00Z", model={"id": "you/something-else"}, timings=times(999_000))
    code, out = call("costs", AS="json")
    assert code == 0
    assert json.loads(out)["endpoints"][0]["expected_seconds"] is None


def test_an_ablation(call: Call, place: Path, answers: Answers) -> None:
    account(answers)
    ablate(place)
    code, out = call("costs", AS="json")
    data = json.loads(out)
    assert code == 0, out
    [row] = data["ablations"]
    assert row["hours"] == [pytest.approx(4000 / 3600), 1.5]
    assert row["usd"] == [pytest.approx(2 * 4000 / 3600), 3.0]  # between what is certain and what it was at most
    assert row["difference"] == 0
    assert data["pods_billed"] == {"p1": 2.0}
    code, out = call("costs", AS="")
    assert "2.22 to 3.00" in out
    assert "Billed for 1 pod, whatever they did: 2.00" in out


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"searched_seconds": 7200.0}, 3, "it took 33% more than estimated"),
        ({"report": "2026-11-02T11:00:00+00:00", "searched_seconds": 3000.0}, 3, "it took 33% less than estimated"),
        ({"report": "", "searched_seconds": 3000.0}, 0, "at least 1.67"),
        ({"load": {"machine": "CPU"}, "searched_seconds": 99_999.0}, 0, "local"),
        ({"load": {"machine": "1 x NVIDIA GeForce GTX 1080"}}, 4, "RunPod lists no price for its machine (1 x NVIDIA GeForce GTX 1080)"),
        ({"load": None}, 4, "RunPod lists no price for its machine (not recorded)"),
        ({"searched_seconds": None, "report": ""}, 4, "its run.json holds no time"),
        ({"model": "nobody/x", "searched_seconds": 99_999.0}, 0, "none"),
    ],
)  # fmt: skip
def test_ablations_of_other_kinds(
    call: Call, place: Path, answers: Answers, changes: dict[str, Any], code: int, words: str
) -> None:
    account(answers)
    ablate(place, **changes)
    found, out = call("costs")
    assert (found, words in out) == (code, True), out


def test_an_endpoint_of_the_local_account(call: Call, place: Path, runpod: Runpod) -> None:
    """GPUs, prices and bills as the management API really sends them."""
    made = runpod.ok(
        "POST",
        "serverless",
        {
            "name": "costs",
            "type": "QUEUE",
            "image": "a/b:1",
            "gpu": {"pools": ["ADA_24"], "count": 1},
            "workers": {"min": 1, "max": 1},
            "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        },
    )
    pod = runpod.ok("POST", "pods", {"name": "x", "image": "a/b:1", "gpu": {"id": "NVIDIA A40", "count": 1}})
    runpod.advance(600)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    keep(place, now, job=job(made["id"]))
    code, out = call("costs", AS="json", RUNPOD_API_KEY=runpod.key, RUNPOD_API_URL=runpod.api)
    data = json.loads(out)
    [row] = data["endpoints"]
    price = next(gpu for gpu in runpod.ok("GET", "catalog/gpus")["gpus"] if gpu["pool"] == "ADA_24")["price"][
        "serverless"
    ]
    assert row["usd"]["expected"] == pytest.approx(120 * price / 3600, abs=1e-4)
    # A worker that was kept warm for ten minutes was billed for them, whatever the one job took.
    assert row["billed"] == pytest.approx(600 * price / 3600, rel=0.05)
    assert code == 3
    assert len(data["flags"]) == 1
    assert "the bill is" in data["flags"][0]
    assert data["pods_billed"][pod["id"]] > 0.07


def test_whose_model_it_is() -> None:
    def base(model: str, bases: dict[str, str] | None = None) -> str | None:
        found = taken.base_of(model, KNOWN, bases or {})
        return found.id if found else None

    assert base("Qwen/Qwen3-14B") == SMALL.id
    assert base("you/Qwen3-14B-ablated-nf4") == SMALL.id
    assert base("you/qwen3-32b-ablated") == MIDDLE.id
    assert base("you/Llama-3.3-70B-Instruct-ablated-nf4") == LARGE.id
    assert base("you/Qwen3-14B2-ablated") is None
    assert base("") is None
    assert base("you/x", {"you/x": "qwen/qwen3-32b"}) == MIDDLE.id  # what is certain
    assert base("you/Qwen3-14B", {"you/qwen3-14b": "Qwen/Qwen3-32B"}) == MIDDLE.id


def test_what_was_published_or_deployed_from_here_is_certain(call: Call, place: Path, answers: Answers) -> None:
    account(answers, billed=(120 + 90 + 60) * 1.2 / 3600)
    ablate(place)
    keep(place, "2026-11-03T10:00:00Z", model={"id": "you/secret-name"})
    row = json.loads(call("costs", AS="json")[1])["endpoints"][0]
    assert row["expected_seconds"] == SMALL.serving.seconds.expected


def test_sittings() -> None:
    def run(minute: int, total: float = 100.0) -> taken.Run:
        when = datetime(2026, 11, 3, 10, minute, tzinfo=UTC)
        return taken.Run("n", when, "ep1", False, "m", "COMPLETED", 90.0, total)

    assert taken.sittings([], 60) == 0
    assert taken.sittings([run(0)], 60) == 1
    assert taken.sittings([run(2), run(0), run(4)], 60) == 1
    assert taken.sittings([run(0), run(5)], 60) == 2
    assert taken.sittings([run(0, 600), run(1), run(10)], 60) == 1  # side by side
    assert taken.sittings([replace(run(0), created=None)], 60) == 1


def test_periods() -> None:
    now = datetime(2026, 11, 26, 12, 30, tzinfo=UTC)
    assert bills.period("2026-11", None, now) == bills.Period(datetime(2026, 11, 1, tzinfo=UTC), None)
    assert bills.period("2025-12", None, now).end == datetime(2026, 1, 1, tzinfo=UTC)
    assert bills.period("", datetime(2026, 10, 3, 23, 0, tzinfo=UTC), now).start == datetime(2026, 10, 3, tzinfo=UTC)
    assert bills.period("", None, now).start == datetime(2026, 11, 26, tzinfo=UTC)


def test_money_is_known_by_the_bill_or_by_every_run() -> None:
    row = compare.EndpointCost("e", (), 2, 1, 120.0, None, None, Range(1, 1, 1), None, None)
    assert not row.known
    assert replace(row, timed=2).known
    assert replace(row, billed=1.0).known
    assert not replace(row, timed=2, usd=None).known
