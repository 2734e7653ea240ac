"""What RunPod says: the GPUs of an endpoint, and what was billed for it and for pods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any

from common.text import clean
from runpod_api import ApiError, NotFound

_BUDGET = 20.0  # seconds that one question is tried


@dataclass(frozen=True)
class Period:
    """From `start` to `end` (None: until now), whole days of UTC."""

    start: datetime
    end: datetime | None

    def params(self) -> dict[str, str]:
        """As a query. Buckets are days: RunPod widens a period to whole buckets."""
        found = {"bucketSize": "day", "startTime": self.start.strftime("%Y-%m-%dT%H:%M:%SZ")}
        return {**found, "endTime": self.end.strftime("%Y-%m-%dT%H:%M:%SZ")} if self.end else found


@dataclass(frozen=True)
class Gpus:
    """What an endpoint's workers run on: pools in order of preference, and cards for each worker."""

    pools: tuple[str, ...]
    count: int


def period(month: str, first: datetime | None, now: datetime) -> Period:
    """The month (2026-11) that is asked for, else everything since the day of the first run."""
    if not month:
        start = (first or now).astimezone(UTC)
        return Period(datetime.combine(start.date(), time(), UTC), None)
    start = datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC)
    end = (start + timedelta(days=32)).replace(day=1)
    return Period(start, end if end <= now else None)


class Books:
    """Questions to RunPod, each asked once; what was not answered is None, and `note` was told why."""

    def __init__(self, api: Any, note: Callable[[str], None]) -> None:
        self.api = api
        self.note = note

    def gpus(self, endpoint: str) -> Gpus | None:
        """The GPUs that an endpoint is set to now."""
        answer = self._ask(f"serverless/{endpoint}", {}, f"endpoint {endpoint}: its GPUs are not known")
        gpu = answer.get("gpu") if answer else None
        if not isinstance(gpu, dict) or not isinstance(gpu.get("pools"), list) or not gpu["pools"]:
            return None
        count = gpu.get("count")
        return Gpus(tuple(map(str, gpu["pools"])), count if isinstance(count, int) and count > 0 else 1)

    def serverless(self, endpoint: str, when: Period) -> float | None:
        """US dollars billed for an endpoint."""
        params = {**when.params(), "serverlessId": endpoint}
        answer = self._ask("billing/serverless", params, f"endpoint {endpoint}: its bill is not known")
        return None if answer is None else sum(_amounts(answer, "serverlessId", endpoint).values())

    def pods(self, when: Period) -> dict[str, float] | None:
        """US dollars billed for each pod, by its id."""
        answer = self._ask("billing/pods", when.params(), "the bill for pods is not known")
        return None if answer is None else _amounts(answer, "podId")

    def _ask(self, path: str, params: dict[str, str], otherwise: str) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = self.api.get(path, params, budget=_BUDGET)
        except NotFound:
            self.note(f"{otherwise}: RunPod does not know it (any more)")
        except ApiError as error:
            self.note(f"{otherwise}: {clean(str(error))}")
        else:
            return answer
        return None


def _amounts(answer: dict[str, Any], key: str, only: str | None = None) -> dict[str, float]:
    """totalAmount by the id under `key`. Records of others are left out: unknown filters are ignored by RunPod."""
    found: dict[str, float] = {}
    records = answer.get("records")
    for record in records if isinstance(records, list) else []:
        if isinstance(record, dict) and isinstance(record.get(key), str) and only in (None, record[key]):
            amount = record.get("totalAmount")
            if isinstance(amount, (int, float)) and not isinstance(amount, bool):
                found[record[key]] = found.get(record[key], 0.0) + float(amount)
    return found
