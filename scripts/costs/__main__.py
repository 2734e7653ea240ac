"""Costs, before and after.

    python -m costs estimate   what MODEL (or every model) will cost: ablation, syntheses, a case study of DOMAINS × SYNTHESES
    python -m costs costs      what the runs here took and cost, MONTH=2026-11 only those of a month

AS=json prints JSON. Exit codes: 0; 2 bad input; 3 a difference of more than 10 % from the estimate (costs); 4 a price or
a cost is not known.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import models
import runpod_api
import yaml_file
from common.files import to_json
from common.problems import FLAGGED, OK, UNCHECKED, Problem, run
from common.text import clean
from costs import bills, compare, estimate, prices, show, taken
from costs.show import cents, duration, two_digits

USAGE = "usage: python -m costs estimate | costs"
Note = Callable[[str], None]


def main() -> int:
    """The command line: see the module. Raises Problem."""
    verbs: dict[str, Callable[[Note], tuple[int, dict[str, Any], list[str]]]] = {
        "estimate": estimated,
        "costs": spent,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        raise Problem(USAGE)
    as_json = show.wants_json()
    notes: list[str] = []
    code, data, lines = verbs[sys.argv[1]](lambda note: None if note in notes else notes.append(note))
    if as_json:
        print(to_json({"format": 1, **data, "notes": notes}), end="")
    else:
        print("\n".join(lines + ([""] if notes else []) + [f"note: {clean(note)}" for note in notes]))
    return code


def _config() -> Path:
    return Path(os.environ.get("CONFIG_DIR") or "config")


def _api() -> runpod_api.Api | None:
    return runpod_api.from_environment() if os.environ.get("RUNPOD_API_KEY") else None


def _prices(api: runpod_api.Api | None, note: Note) -> prices.Prices:
    """The live catalog's prices where there is a key and RunPod answers, the table's for the rest."""
    table = prices.table()
    if api is None:
        note("RUNPOD_API_KEY is not set: prices are those of config/prices.yaml, with their dates, not today's")
        return prices.Prices([table])
    try:
        return prices.Prices([prices.live(api), table])
    except runpod_api.ApiError as error:
        note(f"RunPod's catalog did not answer, so prices are those of config/prices.yaml, not today's ({error})")
        return prices.Prices([table])


# --- estimate ----------------------------------------------------------------------------------------------------------


def estimated(note: Note) -> tuple[int, dict[str, Any], list[str]]:
    """What the models will cost: exit code, JSON, lines."""
    wanted = models.named(models.load(), os.environ.get("MODEL", "").strip())
    plan = estimate.Plan(
        domains=show.whole_number("DOMAINS", 4, 1000),
        syntheses=show.whole_number("SYNTHESES", 10, 10_000),
        idle_seconds=_idle_seconds(),
    )
    known = _prices(_api(), note)
    found = [estimate.estimate(model, known, plan) for model in wanted]
    today = datetime.now(UTC).date().isoformat()
    lines = [
        f"Estimate of {today} in US dollars. Times are the deployment guide's and our own guesses, none was measured:",
        "see config/models.yaml. Disks and network volumes are not included.",
    ]
    for each in found:
        lines += ["", each.model.id, *_estimate_lines(each, known)]
        for price, where in ((each.pod, "pods"), (each.worker, "serverless")):
            if price is not None and price.note:
                note(f"{each.model.id}: {price.note}")
            if price is not None and price.stock in ("NONE", "LOW"):
                note(f"{each.model.id}: {price.what} for {where}: RunPod says {price.stock} are free now")
        _limits(each.model, note)
    lines += ["", "Prices per hour", *show.table(("", "US dollars", "date", "from"), _sources(found))]
    data = {
        "date": today,
        "currency": "USD",
        "domains": plan.domains,
        "syntheses": plan.syntheses,
        "idle_seconds": plan.idle_seconds,
        "models": [_estimate_json(each, known) for each in found],
    }
    return (OK if all(each.total for each in found) else UNCHECKED), data, lines


def _estimate_lines(each: estimate.Estimate, known: prices.Prices) -> list[str]:
    serving, plan = each.model.serving, each.plan
    seconds, cold = serving.seconds, serving.cold_start_seconds
    hours = f"{two_digits(each.hours.low)} to {two_digits(each.hours.high)} h on {each.model.card}"
    on = f"{_whole(seconds)} s on {serving.pools[0]}"
    rows: list[tuple[str, models.Range | None, str]] = [
        ("ablation, once", each.ablation, hours),
        ("a synthesis, worker warm", each.warm, on),
        (
            "a synthesis alone",
            each.alone,
            f"and a cold start of {_whole(cold)} s, {plan.idle_seconds:g} s idle after it",
        ),
        (
            f"case study, {plan.domains} x {plan.syntheses}",
            each.case_study,
            "low: all in one go; expected: each domain in one go; high: each synthesis alone",
        ),
        ("ablation and case study", each.total, ""),
    ]
    table = show.table(
        ("", "low", "expected", "high", ""),
        [[name, *_three(usd), how] for name, usd, how in rows],
    )
    others = [f"{pool} at {_rate(known.pool(pool))}" for pool in serving.pools[1:]]
    return [*table, f"  where {serving.pools[0]} has nothing free: {', '.join(others)}"] if others else table


def _whole(each: models.Range) -> str:
    return f"{each.low:g} to {each.high:g}"


def _three(usd: models.Range | None) -> tuple[str, str, str]:
    if usd is None:
        return ("not known", "", "")
    return (two_digits(usd.low), two_digits(usd.expected), two_digits(usd.high))


def _rate(price: prices.Price | None) -> str:
    if price is None:
        return "a price that is not known"
    low, high = price.usd_per_hour.low, price.usd_per_hour.high
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def _sources(found: list[estimate.Estimate]) -> list[list[str]]:
    rows = []
    for each in found:
        for price, kind in ((each.pod, "pod"), (each.worker, "serverless")):
            if price is not None:
                cards = f"{price.count} x " if price.count > 1 else ""
                rows.append([f"{cards}{price.what}, {kind}", _rate(price), price.source.date, price.source.name])
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]


def _estimate_json(each: estimate.Estimate, known: prices.Prices) -> dict[str, Any]:
    serving = each.model.serving
    return {
        "model": each.model.id,
        "ablation": {
            "card": each.model.card,
            "hours": _range_json(each.hours),
            "price": _price_json(each.pod),
            "usd": _range_json(each.ablation),
        },
        "synthesis": {
            "pool": serving.pools[0],
            "seconds": _range_json(serving.seconds),
            "cold_start_seconds": _range_json(serving.cold_start_seconds),
            "price": _price_json(each.worker),
            "usd_warm": _range_json(each.warm),
            "usd_alone": _range_json(each.alone),
        },
        "case_study": {"syntheses": each.plan.total, "usd": _range_json(each.case_study)},
        "total": {"usd": _range_json(each.total)},
        "other_pools": [{"pool": pool, "price": _price_json(known.pool(pool))} for pool in serving.pools[1:]],
    }


def _range_json(each: models.Range | None) -> dict[str, float] | None:
    return {key: round(value, 4) for key, value in asdict(each).items()} if each else None


def _price_json(price: prices.Price | None) -> dict[str, Any] | None:
    return {**asdict(price), "usd_per_hour": _range_json(price.usd_per_hour)} if price else None


def _endpoint_file() -> dict[str, Any]:
    """config/endpoint.yaml, or nothing where there is none; `make plan` is the verb that checks it."""
    path = _config() / "endpoint.yaml"
    data = yaml_file.read(path).data if path.exists() else None
    return data if isinstance(data, dict) else {}


def _idle_seconds() -> float:
    """How long a worker waits, and is billed, after its last job: as the endpoint is configured, else the guide's 60 s."""
    workers = _endpoint_file().get("workers")
    idle = workers.get("idleTimeout") if isinstance(workers, dict) else None
    return float(idle) if isinstance(idle, int) and idle > 0 else estimate.Plan.idle_seconds


def _limits(model: models.Model, note: Note) -> None:
    """Say where a synthesis that takes long would be ended, and billed, by a limit."""
    timeout = _endpoint_file().get("timeout")
    path = _config() / "inference.yaml"
    inference = yaml_file.read(path).data if path.exists() else None
    execution_timeout = inference.get("execution_timeout") if isinstance(inference, dict) else None
    limits = {
        "timeout in config/endpoint.yaml": timeout / 1000 if isinstance(timeout, int) else None,
        "execution_timeout in config/inference.yaml": execution_timeout if isinstance(execution_timeout, int) else None,
    }
    longest = model.serving.seconds.high
    short = {where: seconds for where, seconds in limits.items() if seconds is not None and seconds < longest}
    if short:
        note(
            f"{model.id}: a synthesis may take {longest:g} s, but is ended after {min(short.values()):g} s, and billed: raise"
            f" {' and '.join(short)}"
        )


# --- costs -------------------------------------------------------------------------------------------------------------


def spent(note: Note) -> tuple[int, dict[str, Any], list[str]]:
    """What was done here, and what it cost: exit code, JSON, lines."""
    month = os.environ.get("MONTH", "")
    if month and not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", month):
        raise Problem(f"MONTH must be a month like 2026-11, not {clean(month)[:40]}")
    known = models.load()
    folders = Path(os.environ.get("RUNS_DIR") or "runs"), Path(os.environ.get("ABLATIONS_DIR") or "ablations")
    done = [each for each in taken.runs(folders[0]) if taken.in_month(each.created, month)]
    all_ablations = taken.ablations(folders[1])
    ablated = [each for each in all_ablations if taken.in_month(each.created, month)]
    local, remote = [each for each in done if each.local], [each for each in done if not each.local]

    api = _api()
    idle = _idle_seconds()
    rows: list[compare.EndpointCost] = []
    costs_of: list[compare.AblationCost] = []
    pods: dict[str, float] | None = None
    times = [each.created for each in remote] + [each.created for each in ablated]
    when = bills.period(month, min((each for each in times if each), default=None), datetime.now(UTC))
    if remote or ablated:
        current = _prices(api, note)
        books = bills.Books(api, note) if api else None
        names = dict.fromkeys(each.endpoint for each in remote if each.endpoint)
        rows = compare.endpoints(
            remote,
            known,
            _bases(all_ablations),
            current,
            {name: books.gpus(name) if books else None for name in names},
            {name: books.serverless(name, when) if books else None for name in names},
            idle,
        )
        costs_of = [compare.ablation(each, known, current) for each in ablated]
        pods = books.pods(when) if books else None
        if books is None and names:
            note("without RUNPOD_API_KEY the endpoints' GPUs and bills are not known, and so no cost of a synthesis")
    flags, unknown = _findings(rows, costs_of, remote)
    data = {
        "month": month or None,
        "local_runs": len(local),
        "endpoints": [_endpoint_json(row) for row in rows],
        "ablations": [_ablation_json(row) for row in costs_of],
        "pods_billed": pods,
        "billed_from": when.params()["startTime"] if rows or costs_of else None,
        "flags": flags,
        "not_known": unknown,
    }
    lines = _spent_lines(rows, costs_of, len(local), pods, month)
    lines += [""] * bool(flags or unknown) + [f"flagged: {flag}" for flag in flags]
    lines += [f"not known: {each}" for each in unknown]
    return (FLAGGED if flags else UNCHECKED if unknown else OK), data, lines


def _bases(ablated: list[taken.Ablation]) -> dict[str, str]:
    """Repository in lower case → base model, where it is certain: what was published from here, what is deployed from here."""
    found = {repo.lower(): each.model for each in ablated for repo in each.published}
    deployed = _endpoint_file().get("model")
    if isinstance(deployed, dict) and isinstance(deployed.get("id"), str) and isinstance(deployed.get("base"), str):
        found.setdefault(deployed["id"].lower(), deployed["base"])
    return found


def _findings(
    rows: list[compare.EndpointCost], ablated: list[compare.AblationCost], remote: list[taken.Run]
) -> tuple[list[str], list[str]]:
    """What is off by more than 10 %, and what cost is not known, in words."""
    flags: list[str] = []
    unknown: list[str] = []
    for row in rows:
        for difference, what in ((row.time_difference, "the jobs took"), (row.bill_difference, "the bill is")):
            if difference is not None and abs(difference) > compare.TOLERANCE:
                flags.append(f"endpoint {row.endpoint}: {what} {_share(difference)} than estimated")
        if not row.known:
            unknown.append(f"endpoint {row.endpoint}: what {row.runs} run{'s' * (row.runs != 1)} cost")
        unknown += [f"{run.name}: {run.why}" for run in remote if run.endpoint == row.endpoint and run.seconds is None]
    unknown += [f"{run.name}: {run.why or 'it names no endpoint'}" for run in remote if not run.endpoint]
    for each in ablated:
        name = each.ablation.name
        if each.difference is not None and abs(each.difference) > compare.TOLERANCE:
            flags.append(f"ablation {name}: it took {_share(each.difference)} than estimated")
        if each.ablation.machine == "CPU":
            continue
        if each.price is None:
            unknown.append(
                f"ablation {name}: RunPod lists no price for its machine ({each.ablation.machine or 'not recorded'})"
            )
        elif each.usd == (None, None):
            unknown.append(f"ablation {name}: its run.json holds no time")
    return flags, unknown


def _share(difference: float) -> str:
    return f"{abs(difference):.0%} {'more' if difference > 0 else 'less'}"


def _spent_lines(
    rows: list[compare.EndpointCost],
    ablated: list[compare.AblationCost],
    local: int,
    pods: dict[str, float] | None,
    month: str,
) -> list[str]:
    lines = [f"Costs{f' of {month} (UTC)' if month else ''} in US dollars."]
    if rows:
        columns = ["endpoint", "runs", "their time", "estimate", "at list price", "billed", "estimate", "model"]
        lines += ["", "Syntheses", *show.table(columns, [_endpoint_row(row) for row in rows])]
    if ablated:
        columns = ["run", "hours", "estimate", "at list price", "machine", "model"]
        lines += ["", "Ablations", *show.table(columns, [_ablation_row(each) for each in ablated])]
    if pods is not None and (ablated or pods):
        total = cents(sum(pods.values()))
        lines += ["", f"Billed for {len(pods)} pod{'s' * (len(pods) != 1)}, whatever they did: {total}"]
    if local:
        lines += ["", f"{local} run{'s' * (local != 1)} on the local RunPod: cost nothing, and not counted above"]
    if len(lines) == 1:
        lines.append("Nothing here has cost anything: there are no runs, and no ablations.")
    used = {}
    for price in [*(row.price for row in rows), *(each.price for each in ablated)]:
        if price is not None:
            used[price.what, price.count] = price
    if used:
        listed = [[price.what, _rate(price), price.source.date, price.source.name] for price in used.values()]
        lines += ["", "List prices per hour", *show.table(("", "US dollars", "date", "from"), listed)]
    return lines


def _endpoint_row(row: compare.EndpointCost) -> list[str]:
    missing = f" ({row.runs - row.timed} without)" if row.timed < row.runs else ""
    usd = "not known"
    if row.usd:
        low, high = cents(row.usd.low), cents(row.usd.high)
        usd = low if low == high else f"{low} to {high}"
    return [
        row.endpoint,
        str(row.runs),
        (duration(row.seconds) if row.timed else "not known") + missing,
        "none" if row.expected_seconds is None else duration(row.expected_seconds),
        usd,
        "not known" if row.billed is None else cents(row.billed),
        "none" if row.expected_bill is None else two_digits(row.expected_bill),
        ", ".join(row.models) or "not recorded",
    ]


def _ablation_row(each: compare.AblationCost) -> list[str]:
    local = each.ablation.machine == "CPU"
    return [
        each.ablation.name,
        _between(each.hours, two_digits),
        two_digits(each.base.hours) if each.base else "none",
        "local" if local else _between(each.usd, cents),
        each.ablation.machine or "not recorded",
        each.ablation.model or "not recorded",
    ]


def _between(ends: tuple[float | None, float | None], shown: Callable[[float], str]) -> str:
    least, most = (None if end is None else shown(end) for end in ends)
    if least is None or most is None:
        return f"at least {least}" if least else f"at most {most}" if most else "not known"
    return least if least == most else f"{least} to {most}"


def _endpoint_json(row: compare.EndpointCost) -> dict[str, Any]:
    return {
        **asdict(row),
        "price": _price_json(row.price),
        "usd": _range_json(row.usd),
        "time_difference": row.time_difference,
        "bill_difference": row.bill_difference,
    }


def _ablation_json(each: compare.AblationCost) -> dict[str, Any]:
    return {
        "run": each.ablation.name,
        "model": each.ablation.model,
        "machine": each.ablation.machine,
        "hours": each.hours,
        "expected_hours": each.base.hours if each.base else None,
        "usd": each.usd,
        "price": _price_json(each.price),
        "difference": each.difference,
    }


if __name__ == "__main__":
    run(main)
