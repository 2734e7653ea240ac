"""More answers to the same question: what the model says again, and what only once."""

from __future__ import annotations

from typing import Any

import jobs
from common.problems import Problem
from settings import Settings


def ask(
    client: jobs.JobClient, job_input: dict[str, Any], policy: dict[str, int], configuration: Settings
) -> list[dict[str, Any]]:
    """The further answers that config/inference.yaml asks for (`samples`, the first one included), each with its own seed.

    One that fails is left out, with a word about it: the first answer is there, and paid for. Interrupted, the jobs that
    are under way are cancelled.
    """
    waiting: list[str] = []
    found: list[dict[str, Any]] = []
    try:
        for number in range(1, configuration.samples):
            seed = None if configuration.seed is None else configuration.seed + number
            try:
                waiting.append(client.submit({**job_input, "seed": seed}, policy, None))
            except Problem as problem:
                client.warn(f"sample {number} was not sent: {problem}")
        while waiting:
            try:
                view = client.wait(
                    waiting[0], configuration.queue_timeout, configuration.execution_timeout, lambda view: None
                )
                output = jobs.synthesis_of(view)
                if output is None:
                    client.warn(f"a sample ended {view.get('status')}: {jobs.failure_text(view)}")
                else:
                    found.append(output)
            except Problem as problem:
                client.warn(f"a sample has no answer: {problem}")
            waiting.pop(0)
    finally:
        for job_id in waiting:
            client.cancel(job_id)
    return found
