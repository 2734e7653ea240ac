"""What the worker tells about itself, as Prometheus text: `{"op": "metrics"}` asks for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engines import Answer

PREFIX = "open_synthesis_"


class Metrics:
    """Counts of this worker's life. The engine's own numbers are given by whoever asks for the text."""

    def __init__(self, phases: Mapping[str, float]) -> None:
        """`phases`: the seconds of each phase of the start."""
        self.jobs: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._phases = phases
        self._began = time.monotonic()

    def count(self, answer: Answer) -> None:
        """Add an answer's tokens."""
        self.tokens["prompt"] += answer.prompt_tokens
        self.tokens["completion"] += answer.completion_tokens
        self.tokens["reasoning"] += answer.reasoning_tokens

    def text(self, in_flight: int, engine: Mapping[str, float]) -> str:
        """All of it, in Prometheus' text format. `engine`: names that end in `_total` are counters."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(list(self._families(in_flight, engine))))
        text: str = generate_latest(registry).decode()
        return text

    def _families(self, in_flight: int, engine: Mapping[str, float]) -> Iterator[Metric]:
        jobs = CounterMetricFamily(
            f"{PREFIX}jobs", "Jobs that have ended, OK or with an error's code.", labels=["code"]
        )
        for code, count in sorted(self.jobs.items()):
            jobs.add_metric([code], count)
        yield jobs
        yield GaugeMetricFamily(f"{PREFIX}jobs_in_flight", "Jobs that have not ended, this one included.", in_flight)
        for kind in ("prompt", "completion", "reasoning"):
            what = "Tokens of answers that were reasoning." if kind == "reasoning" else f"Tokens of the {kind}s."
            yield CounterMetricFamily(f"{PREFIX}{kind}_tokens", what, self.tokens[kind])
        for name, value in sorted(engine.items()):
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(
                f"{PREFIX}engine_{name}", f"The engine's {name.removesuffix('_total').replace('_', ' ')}.", value
            )
        start = GaugeMetricFamily(f"{PREFIX}start_seconds", "What each phase of the start took.", labels=["phase"])
        for phase, seconds in self._phases.items():
            start.add_metric([phase], seconds)
        yield start
        yield GaugeMetricFamily(
            f"{PREFIX}uptime_seconds", "Since the worker was ready for jobs.", time.monotonic() - self._began
        )


class _Families:
    """What a registry takes."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
