"""More answers to the same question: what the model says again, and what only once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import jobs
from common.problems import Problem
from settings import Settings


@dataclass
class Samples:
    """What came back: the workers' answers, how many were asked for, and what they are billed for."""

    asked: int
    answers: list[dict[str, Any]] = field(default_factory=list)
    execution_ms: int = 0


def ask(
    client: jobs.JobClient,
    job_input: dict[str, Any],
    policy: dict[str, int],
    configuration: Settings,
    held: Callable[[], AbstractContextManager[None]] = nullcontext,
    unheard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Samples:
    """The further answers that config/inference.yaml asks for (`samples`, the first one included), each with its own seed.

    One that fails is left out, with a word about it: the first answer is there, and paid for. Interrupted, the jobs that
    are under way are cancelled. `held` and `unheard`: signals wait while a job is sent, and while jobs are cancelled.
    """
    # Nothing compares them where no confidence is asked for.
    most = configuration.samples if configuration.uncertainty_quantification else 1
    waiting: list[str] = []
    found = Samples(most - 1)
    try:
        for number in range(1, most):
            seed = None if configuration.seed is None else configuration.seed + number
            try:
                with held():
                    waiting.append(client.submit({**job_input, "seed": seed}, policy, None))
            except Problem as problem:
                client.warn(f"sample {number} was not sent: {problem}")
        while waiting:
            try:
                view = client.wait(
                    waiting[0], configuration.queue_timeout, configuration.execution_timeout, lambda view: None
                )
                if isinstance(took := view.get("executionTime"), int):
                    found.execution_ms += took
                output = jobs.synthesis_of(view)
                if output is None:
                    client.warn(f"a sample ended {view.get('status')}: {jobs.failure_text(view)}")
                else:
                    found.answers.append(output)
            except Problem as problem:
                client.warn(f"a sample has no answer: {problem}")
            waiting.pop(0)
    finally:
        with unheard():
            for job_id in waiting:
                client.cancel(job_id)
    return found
