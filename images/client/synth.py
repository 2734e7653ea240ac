"""Answer a question from a domain's corpus: retrieve, send one job, resolve the citations, keep the run.

    Q="Does ego depletion replicate?" DOMAIN=psychology python -m synth

The text with what was found goes to stdout (AS=json: as JSON), progress to stderr. Exit codes: 0 clean; 2 bad input or
nothing near the question (no job was sent); 3 done, but something was flagged; 4 done, but something could not be checked;
5 the job failed; 75 try again later; 130 interrupted (the job is cancelled).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import retrieve
import settings
from common.problems import INTERRUPTED, REMOTE_FAILED, UNCHECKED, Problem, run, tell
from common.secrets import redact
from common.text import clean

if TYPE_CHECKING:
    import checks
    import judge
    from ledger import Claim

TTL_MARGIN = 60  # seconds that a job may live beyond its queue and execution time
MAX_TTL = 604_800  # RunPod refuses a longer life: 7 days
EXTRACTIVE_NOTE = "Extractive answer: sentences quoted word for word from the sources, chosen by word overlap. No language model wrote or judged this text."
CUT_NOTE = "The answer was cut off at max_new_tokens."


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP as KeyboardInterrupt, at the moments when one can be acted upon.

    While a job is being sent they are held back, so that a job is never left behind without an id to cancel it by; while
    it is being cancelled, and while its answer is being kept, they are not heard at all: both are short.
    """

    def __init__(self) -> None:
        self.arrived = False
        self.mode = "raise"
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # An ignored SIGHUP is nohup's, and meant. An ignored SIGINT is what shells give to background jobs: there, too,
            # whoever sends one wants the job cancelled rather than left to bill.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(self, *problem: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        if self.mode == "raise":
            raise KeyboardInterrupt
        self.arrived = self.arrived or self.mode == "hold"

    def set(self, mode: Literal["raise", "hold", "deaf"]) -> None:
        """Change the mode; what was held back is raised on the change to "raise"."""
        self.mode = mode
        if mode == "raise" and self.arrived:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait while a job is sent; they are raised when its id is known."""
        self.set("hold")
        try:
            yield
        finally:
            self.mode = "raise"
        self.set("raise")

    @contextlib.contextmanager
    def unheard(self) -> Iterator[None]:
        """Signals are not heard while jobs are cancelled."""
        before, self.mode = self.mode, "deaf"
        try:
            yield
        finally:
            self.mode = before

    def during(self, sleep: Callable[[float], None]) -> Callable[[float], None]:
        """`sleep`, but heard by held-back signals: while a client waits between two calls, none is under way."""

        def pause(seconds: float) -> None:
            if self.mode != "hold":
                sleep(seconds)
                return
            try:
                self.set("raise")  # what has arrived meanwhile is raised here
                sleep(seconds)
            finally:
                self.mode = "hold"

        return pause


def main() -> int:
    """One question, one run."""
    with Interrupts() as interrupts:
        return answer(interrupts)


def answer(interrupts: Interrupts) -> int:
    """Retrieve, send one job, follow it to its end, keep and print what came of it."""
    question, domain, configuration = settings.question(), settings.domain(), settings.load()
    endpoint = settings.endpoint()
    form = settings.form()
    started = time.monotonic()
    import checks

    limits, verifier, prompt = checks.prepare(configuration)
    manifest, corpus = retrieve.retrieve(question, domain, configuration)
    retrieved_in = time.monotonic() - started
    print(f"{len(manifest)} sources from {domain} in {retrieved_in:.2f} s", file=sys.stderr)

    # Imported late: a question that stops before this line does not pay for HTTP.
    import bundle
    import embedding
    import jobs
    import judge
    import progress
    import samples

    shown = progress.Progress()
    client = jobs.JobClient(endpoint, warn=shown.note)
    client.sleep = interrupts.during(client.sleep)
    before = client.health()
    workers = before.get("workers")
    shown.cold = isinstance(workers, dict) and not any(workers.get(kind) for kind in ("ready", "idle", "running"))
    job_input = {
        "prompt": question,
        "sources": [{"id": e["id"], "text": e["text"], "label": e["label"]} for e in manifest],
        **configuration.sampling(),
    }
    lifetime = min(configuration.queue_timeout + configuration.execution_timeout + TTL_MARGIN, MAX_TTL)
    policy = {"ttl": lifetime * 1000, "executionTimeout": configuration.execution_timeout * 1000}
    # Before the job: a folder that cannot be written must not cost one.
    kept = bundle.Bundle(question, domain)
    job = {"id": None, "endpoint": endpoint.id, "url": endpoint.url, "policy": policy}
    try:
        kept.write("sources.json", manifest)
        kept.note(
            format=1,
            question=question,
            domain=domain,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            job=job,
            config=vars(configuration),
            corpus=corpus,
        )
        interrupts.set("hold")
        job_id = client.submit(job_input, policy, before)
    except jobs.Unconfirmed as problem:
        kept.note(outcome="UNCONFIRMED", error=str(problem))
        raise Problem(f"{problem}\nRun: {kept.finish()}", problem.code) from None
    except BaseException as problem:
        kept.discard()
        if isinstance(problem, KeyboardInterrupt) and interrupts.mode == "hold":
            # Between two attempts: the first may have been accepted in spite of its answer.
            print(f"if the job was accepted, it ends by itself within {lifetime} s", file=sys.stderr)
        raise
    try:
        kept.note(job={**job, "id": job_id})
        interrupts.set("raise")
        view = client.wait(job_id, configuration.queue_timeout, configuration.execution_timeout, shown.show)
        interrupts.set("deaf")
    except BaseException as problem:
        interrupts.set("deaf")
        shown.close()
        interrupted = isinstance(problem, KeyboardInterrupt)
        if not isinstance(problem, Problem):  # where waiting gives up by itself, it has cancelled already
            print(f"{'interrupted' if interrupted else 'failed'}: cancelling job {job_id} …", file=sys.stderr)
            cancelled = client.cancel(job_id)
            print(f"job {job_id} {'was cancelled' if cancelled else 'could not be cancelled'}", file=sys.stderr)
        outcome = "INTERRUPTED" if interrupted else "GIVEN_UP"
        kept.note(states=shown.states, outcome=outcome, error=str(problem) or None)
        print(f"Run: {kept.finish()}", file=sys.stderr)
        if interrupted:
            return INTERRUPTED
        raise
    shown.close()
    execution_ms = view.get("executionTime")
    output = jobs.synthesis_of(view)
    if output is not None:
        try:
            kept.write("output.json", output)  # first of all: whatever fails from here on, the answer is kept
        except OSError as problem:
            return _left_unchecked(kept, output, problem)
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
    if output is None:
        state = str(view.get("status"))
        reason = (
            "COMPLETED without the synthesis it should hold"
            if state == "COMPLETED"
            else f"{state}: {jobs.failure_text(view)}"
        )
        kept.note(outcome="NO_SYNTHESIS" if state == "COMPLETED" else state, error=reason)
        raise Problem(f"job {job_id} ended {clean(reason)}\nRun: {kept.finish()}", REMOTE_FAILED)
    kept.note(
        outcome="COMPLETED",
        model=output["model"],
        prompts=output.get("prompts"),
        finish_reason=output.get("finish_reason"),
        usage=output.get("usage"),
        worker_timings=output.get("timings"),
    )
    # The answer is there, and paid for: whatever fails from here on, it is kept and shown.
    try:
        interrupts.set("raise")
        others = samples.ask(client, job_input, policy, configuration, interrupts.held, interrupts.unheard)
        if others.answers:
            kept.write("samples.json", others.answers)
        judged: list[judge.Judged] = []

        def ask_judge(claims: Sequence[Claim], sources: Sequence[Mapping[str, Any]]) -> judge.Judged:
            assert prompt
            found = judge.check(
                claims, sources, client, prompt, limits.judge, held=interrupts.held, unheard=interrupts.unheard
            )
            judged.append(found)
            return found

        checked_at = time.monotonic()
        result = checks.run(
            clean(output["synthesis"]),
            question,
            manifest,
            configuration,
            embedding.load(configuration.embedding_model),
            limits,
            verifier=verifier,
            ask_judge=ask_judge if prompt else None,
            samples=[clean(other["synthesis"]) for other in others.answers],
            samples_asked=others.asked,
        )
        interrupts.set("deaf")
        took = {"samples": others.execution_ms, "judge": sum(found.execution_ms for found in judged)}
        known = [ms for ms in (execution_ms, *took.values()) if isinstance(ms, int) and ms]
        execution_seconds = sum(known) / 1000 if known or execution_ms == 0 else None
        kept.note(
            timings={**kept.run["timings"], "checks_seconds": round(time.monotonic() - checked_at, 3)},
            cost={"execution_seconds": execution_seconds, "more_execution_ms": took, "usd": None},
        )
        seconds = {"seconds": time.monotonic() - started, "execution_seconds": execution_seconds}
        return _deliver(kept, question, domain, manifest, output, result, form, seconds)
    except BaseException as problem:
        interrupts.set("deaf")
        return _left_unchecked(kept, output, problem)


def _left_unchecked(kept: Any, output: dict[str, Any], problem: BaseException) -> int:
    """The answer could not be checked, or not be written down: show it, say why, and how to go on."""
    interrupted = isinstance(problem, KeyboardInterrupt)
    reason = "interrupted" if interrupted else " ".join(clean(str(problem)).split()) or type(problem).__name__
    try:
        if not kept.shown:
            kept.note(outcome="UNCHECKED", error=reason)
            kept.finish()
        where = f"Check it: make check RUN={kept.folder}"
    except Exception as error:  # nothing may hide the answer now
        where = f"It could not be kept ({redact(clean(str(error)))}); copy it from here"
    if not interrupted:
        tell(clean(output["synthesis"]))
    print(f"{redact(reason)}: this answer is not checked. {where}", file=sys.stderr)
    return INTERRUPTED if interrupted else UNCHECKED


def notes_on(output: Mapping[str, Any], result: checks.Result) -> list[str]:
    """What stands above the text, whatever the checks say."""
    import checks

    notes = [EXTRACTIVE_NOTE] if output["model"].get("engine") == "extractive" else []
    if output.get("finish_reason") == "length":
        notes.append(CUT_NOTE)
    return [*notes, *([checks.UNREVIEWED] if result.review.get("required") else [])]


def _deliver(
    kept: Any,
    question: str,
    domain: str,
    manifest: list[dict[str, Any]],
    output: dict[str, Any],
    result: checks.Result,
    form: str,
    seconds: dict[str, Any],
) -> int:
    """Write the rest of the bundle, print the text with what was found."""
    import bundle
    import view

    text = clean(output["synthesis"])
    cited = sorted({source for claim in result.claims for source in claim.cited})
    notes = notes_on(output, result)
    page = bundle.markdown(question, domain, text, manifest, cited, notes)
    kept.write("synthesis.md", f"{page}\n{view.markdown(result)}")
    kept.write("claims.json", result.as_json())
    kept.note(checks=result.summary(), flags=[asdict(flag) for flag in result.flags], review=result.review)
    folder = kept.finish()  # before printing: a reader that has left (head, less) must not hide the run
    run_ = {"folder": folder, "question": question, "domain": domain, "text": text}
    tell(view.printed(form, run_, manifest, result, notes, f"Run: {folder}", **seconds))
    return result.code


if __name__ == "__main__":
    run(main)
