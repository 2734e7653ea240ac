"""Bills: what was used, cut into buckets of time and priced. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from local_runpod.basics import Rejected, State, Usage, stamp

BUCKETS = ("hour", "day", "week", "month", "year")
DEFAULT_DAYS = 30
Amounts = dict[str, float]


@dataclass(frozen=True)
class Window:
    """The time that is asked for, in whole buckets."""

    start: datetime
    end: datetime
    size: str


@dataclass(frozen=True)
class Kind:
    """One of the bills: whose usage, the name of the owner's id, what its amounts are called."""

    usage: str
    owner: str
    unique: str
    split: Callable[[Usage, float], Amounts]
    names: tuple[str, ...]


def _machine_amounts(usage: Usage, hours: float) -> Amounts:
    compute, disk = usage.compute * hours, usage.disk * hours
    return {"gpuAmount": 0.0 if usage.cpu else compute, "cpuAmount": compute if usage.cpu else 0.0, "diskAmount": disk}


def _volume_amounts(usage: Usage, hours: float) -> Amounts:
    return {"highPerformanceAmount" if usage.high_performance else "standardAmount": usage.disk * hours}


KINDS = {
    "pods": Kind("pod", "podId", "uniquePodCount", _machine_amounts, ("gpuAmount", "cpuAmount", "diskAmount")),
    "serverless": Kind(
        "serverless",
        "serverlessId",
        "uniqueServerlessCount",
        _machine_amounts,
        ("gpuAmount", "cpuAmount", "diskAmount", "feeAmount"),
    ),
    "network-volumes": Kind(
        "volume",
        "networkVolumeId",
        "uniqueNetworkVolumeCount",
        _volume_amounts,
        ("standardAmount", "highPerformanceAmount"),
    ),
}
# The names of all of them in the bill of everything.
TOTALS = {
    ("pods", "gpuAmount"): "podGpuAmount",
    ("pods", "cpuAmount"): "podCpuAmount",
    ("pods", "diskAmount"): "podDiskAmount",
    ("serverless", "gpuAmount"): "serverlessGpuAmount",
    ("serverless", "cpuAmount"): "serverlessCpuAmount",
    ("serverless", "diskAmount"): "serverlessDiskAmount",
    ("serverless", "feeAmount"): "serverlessFeeAmount",
    ("network-volumes", "standardAmount"): "storageStandardAmount",
    ("network-volumes", "highPerformanceAmount"): "storageHighPerformanceAmount",
}
NOT_HERE = ("endpointAmount", "clusterGpuAmount", "clusterDiskAmount", "clusterNetworkingAmount")


def floor(when: datetime, size: str) -> datetime:
    """The start of the bucket that holds this time."""
    hour = when.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if size == "hour":
        return hour
    day = hour.replace(hour=0)
    if size == "week":
        return day - timedelta(days=day.weekday())
    return {"day": day, "month": day.replace(day=1), "year": day.replace(day=1, month=1)}[size]


def after(start: datetime, size: str, count: int = 1) -> datetime:
    """The start of the bucket that comes `count` buckets later; earlier if it is negative."""
    if size in ("hour", "day", "week"):
        return start + count * timedelta(**{f"{size}s": 1})
    months = start.year * 12 + start.month - 1 + count * (12 if size == "year" else 1)
    return start.replace(year=months // 12, month=months % 12 + 1)


def window(now: datetime, size: str | None, last: int | None, start: datetime | None, end: datetime | None) -> Window:
    """The buckets that are asked for. Raises Rejected(400) for a time that is none."""
    size = size or "day"
    if last is not None and (start or end):
        raise Rejected(400, "lastN excludes startTime and endTime")
    try:
        if last is not None:
            end = after(floor(now, size), size)
            return Window(after(end, size, -last), end, size)
        end = end or now
        snapped = floor(end, size)
        until = snapped if snapped == end else after(snapped, size)
        since = floor(start or end - timedelta(days=DEFAULT_DAYS), size)
    except (ValueError, OverflowError) as error:
        raise Rejected(400, "the window lies outside of the years 1 to 9999") from error
    if since >= until:
        raise Rejected(400, "startTime must be before endTime")
    return Window(since, until, size)


class Billing(State):
    """The bills of an account."""

    def bill(self, what: str, asked: Window, owner: str | None, now: float) -> dict[str, Any]:
        """GET /v2/billing/{pods,serverless,network-volumes}: a record for each owner and bucket with usage."""
        kind = KINDS[what]
        sums: dict[tuple[datetime, str], Amounts] = {}
        for start, usage, hours in self._pieces(kind.usage, asked, now):
            if owner in (None, usage.owner):
                _add(sums.setdefault((start, usage.owner), dict.fromkeys(kind.names, 0.0)), kind.split(usage, hours))
        records = [
            {**_range(start, after(start, asked.size)), kind.owner: name, **_total(amounts)}
            for (start, name), amounts in sorted(sums.items(), key=lambda item: item[0])
        ]
        totals = dict.fromkeys(kind.names, 0.0)
        for amounts in sums.values():
            _add(totals, amounts)
        query = {**_range(asked.start, asked.end), "bucketSize": asked.size, kind.owner: owner}
        metadata = {
            "query": query,
            "recordCount": len(records),
            kind.unique: len({name for _, name in sums}),
            "totals": _total(totals),
        }
        return {"records": records, "metadata": metadata}

    def bill_of_all(self, asked: Window, now: float) -> dict[str, Any]:
        """GET /v2/billing: a record for each bucket with usage."""
        nothing = dict.fromkeys((*TOTALS.values(), *NOT_HERE), 0.0)
        sums: dict[datetime, Amounts] = {}
        for what, kind in KINDS.items():
            for start, usage, hours in self._pieces(kind.usage, asked, now):
                split = {TOTALS[what, name]: amount for name, amount in kind.split(usage, hours).items()}
                _add(sums.setdefault(start, dict(nothing)), split)
        totals = dict(nothing)
        for amounts in sums.values():
            _add(totals, amounts)
        records = [
            {**_range(start, after(start, asked.size)), **_total(amounts)} for start, amounts in sorted(sums.items())
        ]
        return {"records": records, "metadata": _metadata(asked, len(records), _total(totals))}

    def bill_of_none(self, asked: Window) -> dict[str, Any]:
        """GET /v2/billing/endpoints: RunPod's public endpoints, which nobody uses here."""
        return {"records": [], "metadata": _metadata(asked, 0, {"totalAmount": 0.0})}

    def _pieces(self, kind: str, asked: Window, now: float) -> Iterator[tuple[datetime, Usage, float]]:
        """The parts of each usage that lie in a bucket: its start, the usage, hours."""
        for usage in self.usage:
            if usage.kind != kind:
                continue
            begun = max(self.when(usage.start), asked.start)
            ended = min(self.when(now if usage.end is None else usage.end), asked.end)
            while begun < ended:
                start = floor(begun, asked.size)
                until = min(ended, after(start, asked.size))
                yield start, usage, (until - begun).total_seconds() / 3600
                begun = until


def _add(sums: Amounts, more: Amounts) -> None:
    for name, amount in more.items():
        sums[name] += amount


def _total(amounts: Amounts) -> Amounts:
    return {"totalAmount": sum(amounts.values()), **amounts}


def _range(start: datetime, end: datetime) -> dict[str, str]:
    return {"startTime": stamp(start), "endTime": stamp(end)}


def _metadata(asked: Window, count: int, totals: Amounts) -> dict[str, Any]:
    query = {**_range(asked.start, asked.end), "bucketSize": asked.size}
    return {"query": query, "recordCount": count, "totals": totals}
