"""Answer a question from a domain's corpus: retrieve, send one job, resolve the citations, keep the run.

    Q="Does ego depletion replicate?" DOMAIN=psychology python -m synth

The text goes to stdout, everything else to stderr. Exit codes: 0 clean; 2 bad input or nothing near the question (no
job was sent); 3 done, but citations were flagged; 5 the job failed; 75 try again later; 130 interrupted (the job is
cancelled).
"""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType
from typing import Any

import retrieve
import settings
from common import citations
from common.problems import FLAGGED, INTERRUPTED, OK, REMOTE_FAILED, Problem, run
from common.text import clean

TTL_MARGIN = 60  # seconds that a job may live beyond its queue and execution time
EXTRACTIVE_NOTE = "Extractive answer: sentences quoted word for word from the sources, chosen by word overlap. No language model wrote or judged this text."
CUT_NOTE = "The answer was cut off at max_new_tokens."


def main() -> int:
    """One question, one run."""
    signal.signal(signal.SIGTERM, _interrupt)
    question, domain, configuration = settings.question(), settings.domain(), settings.load()
    endpoint = settings.endpoint()
    started = time.monotonic()
    manifest, corpus_hash = retrieve.retrieve(question, domain, configuration)
    retrieved_in = time.monotonic() - started
    print(f"{len(manifest)} sources from {domain} in {retrieved_in:.2f} s", file=sys.stderr)

    # Imported late: a question that stops before this line does not pay for HTTP.
    import bundle
    import jobs
    import progress

    shown = progress.Progress()
    client = jobs.JobClient(endpoint, warn=shown.note)
    before = client.health()
    workers = before.get("workers")
    shown.cold = isinstance(workers, dict) and not any(workers.get(kind) for kind in ("ready", "idle", "running"))
    job_input = {
        "prompt": question,
        "sources": [{"id": e["id"], "text": e["text"], "label": e["label"]} for e in manifest],
        **configuration.sampling(),
    }
    lifetime = configuration.queue_timeout + configuration.execution_timeout + TTL_MARGIN
    policy = {"ttl": lifetime * 1000, "executionTimeout": configuration.execution_timeout * 1000}
    # Before the job: a folder that cannot be written must not cost one.
    kept = bundle.Bundle(question, domain)
    try:
        kept.write("sources.json", manifest)
        job_id = client.submit(job_input, policy, before)
    except BaseException:
        kept.discard()
        raise
    try:
        kept.note(
            format=1,
            question=question,
            domain=domain,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            job={"id": job_id, "endpoint": endpoint.id, "url": endpoint.url, "policy": policy},
            config=vars(configuration),
            corpus={"sha256": corpus_hash},
        )
        view = client.wait(job_id, configuration.queue_timeout, configuration.execution_timeout, shown.show)
    except BaseException as problem:
        shown.close()
        if isinstance(problem, KeyboardInterrupt) or not isinstance(problem, Problem):
            cancelled = client.cancel(job_id)
            print(
                f"interrupted: job {job_id} {'was cancelled' if cancelled else 'could not be cancelled'}",
                file=sys.stderr,
            )
        kept.note(states=shown.states, outcome=_outcome(problem), error=str(problem) or None)
        print(f"Run: {kept.finish()}", file=sys.stderr)
        if isinstance(problem, KeyboardInterrupt):
            return INTERRUPTED
        raise
    shown.close()
    execution_ms = view.get("executionTime")
    kept.note(
        states=shown.states,
        timings={
            "retrieval_seconds": round(retrieved_in, 3),
            "total_seconds": round(time.monotonic() - started, 3),
            "queue_ms": view.get("delayTime"),
            "execution_ms": execution_ms,
        },
        # RunPod bills execution time; the price of this endpoint's GPU is not known to the client.
        cost={"execution_seconds": execution_ms / 1000 if isinstance(execution_ms, int) else None, "usd": None},
    )
    output = jobs.synthesis_of(view)
    if output is None:
        state = str(view.get("status"))
        reason = (
            "COMPLETED without the synthesis it should hold"
            if state == "COMPLETED"
            else f"{state}: {jobs.failure_text(view)}"
        )
        kept.note(outcome="NO_SYNTHESIS" if state == "COMPLETED" else state, error=reason)
        raise Problem(f"job {job_id} ended {clean(reason)}\nRun: {kept.finish()}", REMOTE_FAILED)
    return _deliver(kept, question, domain, manifest, output)


def _deliver(kept: Any, question: str, domain: str, manifest: list[dict[str, Any]], output: dict[str, Any]) -> int:
    """Resolve the citations, write the rest of the bundle, print the text."""
    import bundle

    text = clean(output["synthesis"])
    claims = citations.claims(text, {entry["id"] for entry in manifest})
    flags = citations.flags(claims)
    if not text.strip():
        flags.append({"kind": "empty", "detail": "the synthesis is empty", "claim": ""})
    cited = sorted({source for claim in claims for source in claim.cited})
    notes = [EXTRACTIVE_NOTE] if output["model"].get("engine") == "extractive" else []
    if output.get("finish_reason") == "length":
        notes.append(CUT_NOTE)
    page = bundle.markdown(question, domain, text, manifest, cited, notes)
    kept.write("synthesis.md", page)
    kept.write("claims.json", [vars(claim) for claim in claims])
    kept.note(
        outcome="COMPLETED",
        model=output["model"],
        prompts=output.get("prompts"),
        finish_reason=output.get("finish_reason"),
        usage=output.get("usage"),
        worker_timings=output.get("timings"),
        flags=flags,
    )
    folder = kept.finish()  # before printing: a reader that has left (head, less) must not hide the run
    print(page)
    print(f"Run: {folder}")
    for flag in flags:
        print(f"flagged: {flag['kind']} {flag['detail']}: {flag['claim'][:120]}", file=sys.stderr)
    return FLAGGED if flags else OK


def _outcome(problem: BaseException) -> str:
    return "INTERRUPTED" if isinstance(problem, KeyboardInterrupt) else "GIVEN_UP"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run(main)
