"""Level 3 of the hallucination check (optional): the model of the endpoint as judge, one claim at a time.

Each claim goes to the worker as a job of its own, with the sources that it cites and prompts/judge.txt as the question, at
temperature 0. The answer must be one JSON object of an exact form. Whatever else comes back (prose, a code fence, an id
that was not sent, an answer that was cut off, no answer in time) leaves the claim unchecked; it never makes it clean.

What this level can see: what a reader of the claim and its sources sees at a glance. What it cannot see: its own errors.
It is an opinion of the model that may have written the text, it tends to agree with what is well put, a source can talk to
it, and it may say something else tomorrow. So it changes no status and no flag of levels 0 to 2; it stands beside them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jobs
import strict
from common.problems import Problem
from common.prompts import fill, mark_of, neutralise
from common.text import clean
from ledger import Claim, Flag

SPECS: dict[str, strict.Spec] = {
    "enabled": bool,
    "max_claims": (int, 1, 1000),
    "at_once": (int, 1, 32),
    "max_new_tokens": (int, 16, 2048),
    "seconds": (int, 10, 86_400),
}
VERDICTS = ("supported", "contradicted", "not_enough")
MAX_REASON = 600  # characters that are kept
_TTL_MARGIN = 30  # seconds that a job may live beyond the time for all


def thresholds() -> dict[str, Any]:
    """The block `judge` of config/checks.yaml. Raises Problem."""
    return strict.block("checks.yaml", "judge", SPECS)


def wanted(thresholds: Mapping[str, Any]) -> bool:
    """Is the judge to be asked? JUDGE=1 or JUDGE=0 wins over the configuration. Raises Problem."""
    given = os.environ.get("JUDGE", "")
    if given not in ("", "0", "1"):
        raise Problem(f"JUDGE={given!r:.40} is neither 1 nor 0")
    return bool(thresholds["enabled"]) if not given else given == "1"


@dataclass(frozen=True)
class Prompt:
    """prompts/judge.txt, and the sha256 of it as it was read."""

    text: str
    hash: str

    @classmethod
    def read(cls, folder: Path | None = None) -> Prompt:
        """The file of a folder, of PROMPTS_DIR where none is given. Raises Problem."""
        import hashlib

        path = (folder or Path(os.environ.get("PROMPTS_DIR") or "prompts")) / "judge.txt"
        try:
            data = path.read_bytes()
            read = cls(data.decode().strip(), hashlib.sha256(data).hexdigest())
            read.question("a claim", "a mark")
        except OSError as error:
            raise Problem(f"{path} cannot be read: {error.strerror}; restore it: git checkout {path}") from error
        except (UnicodeDecodeError, KeyError) as error:
            raise Problem(f"{path} is not the judge's prompt ({error}); restore it: git checkout {path}") from error
        return read

    def question(self, claim: str, mark: str) -> str:
        """What a job asks about a claim. The claim is data: a model wrote it, and a source may have written the model's part."""
        return fill(self.text, {"claim": neutralise(" ".join(claim.split())), "mark": mark})


@dataclass
class Judged:
    """What came of it, beside what was written into the claims."""

    flags: list[Flag] = field(default_factory=list)
    judged: int = 0
    unchecked: int = 0
    model: dict[str, Any] | None = None  # who judged, in the worker's words
    execution_ms: int = 0  # what all jobs together are billed for

    @property
    def complete(self) -> bool:
        """Was every claim judged that was to be?"""
        return not self.unchecked


def check(
    claims: Sequence[Claim],
    manifest: Sequence[Mapping[str, Any]],
    client: jobs.JobClient,
    prompt: Prompt,
    thresholds: Mapping[str, Any],
    clock: Callable[[], float] = time.monotonic,
    held: Callable[[], AbstractContextManager[None]] = nullcontext,
    unheard: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Judged:
    """Ask about each claim but the meta ones that cites sources, and fill its `checks["judge"]`; `status` stays.

    `checks["judge"]` has verdict (supported, contradicted, not_enough or unchecked), sources, reason, and for what is
    unchecked why. Raises only what is no Problem of a job: an interrupt cancels the jobs that are under way. `held` and
    `unheard`: signals wait while a job is sent, and while jobs are cancelled.
    """
    judging = _Judging(manifest, client, prompt, thresholds, clock, held, unheard)
    known = {entry["id"] for entry in manifest}
    to_judge = [c for c in claims if c.kind != "meta" and any(source in known for source in c.cited)]
    most = int(thresholds["max_claims"])
    judging.ask(to_judge[:most])
    for claim in to_judge[most:]:
        judging.unchecked(claim, f"only {most} claims are judged: max_claims in config/checks.yaml")
    # In the claims' order, whatever order the answers came in.
    order = {claim.id: at for at, claim in enumerate(claims)}
    judging.found.flags.sort(key=lambda flag: order[flag.claim or ""])
    return judging.found


class _Judging:
    def __init__(
        self,
        manifest: Sequence[Mapping[str, Any]],
        client: jobs.JobClient,
        prompt: Prompt,
        thresholds: Mapping[str, Any],
        clock: Callable[[], float],
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
        unheard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.held, self.unheard = held, unheard
        self.sources = {e["id"]: {key: e[key] for key in ("id", "text", "label")} for e in manifest}
        self.client, self.prompt, self.thresholds, self.clock = client, prompt, thresholds, clock
        self.found = Judged()
        self.deadline = clock() + int(thresholds["seconds"])
        self.hopeless = ""  # why no more is asked

    def ask(self, claims: Sequence[Claim]) -> None:
        """Send a few jobs ahead, wait for the first of them, send the next."""
        waiting: deque[tuple[Claim, str]] = deque()
        to_send = deque(claims)
        try:
            while to_send or waiting:
                while to_send and len(waiting) < int(self.thresholds["at_once"]) and not self._over():
                    claim = to_send.popleft()
                    with self.held():
                        if job_id := self._send(claim):
                            waiting.append((claim, job_id))
                if waiting:
                    self._receive(*waiting[0])
                    waiting.popleft()
                elif to_send:
                    self.unchecked(to_send.popleft(), self._over())
        finally:
            with self.unheard():
                for _, job_id in waiting:  # interrupted
                    self.client.cancel(job_id)

    def _over(self) -> str:
        """Why nothing more is sent; empty while there is time."""
        if self.hopeless:
            return self.hopeless
        seconds = int(self.thresholds["seconds"])
        return f"not judged within {seconds} s: seconds in config/checks.yaml" if self.clock() >= self.deadline else ""

    def job(self, claim: Claim) -> dict[str, Any]:
        """The job for a claim: its cited sources, and the same sampling each time."""
        sources = [self.sources[i] for i in claim.cited if i in self.sources]
        return {
            "prompt": self.prompt.question(claim.bare, mark_of(claim.bare, sources)),
            "sources": sources,
            "temperature": 0,
            "top_p": 1,
            "repetition_penalty": 1,
            "max_new_tokens": int(self.thresholds["max_new_tokens"]),
            "seed": 0,
        }

    def _send(self, claim: Claim) -> str:
        left = max(5, int(self.deadline - self.clock()))
        policy = {"ttl": (left + _TTL_MARGIN) * 1000, "executionTimeout": left * 1000}
        try:
            return self.client.submit(self.job(claim), policy, None)
        except jobs.Unconfirmed as problem:
            self.unchecked(claim, str(problem))
        except Problem as problem:
            # The endpoint refuses or cannot be reached, after all that the client tries: it will refuse the next one, too.
            self.hopeless = str(problem)
            self.unchecked(claim, str(problem))
        return ""

    def _receive(self, claim: Claim, job_id: str) -> None:
        left = self.deadline - self.clock()
        if left <= 0:
            self.client.cancel(job_id)
            self.unchecked(claim, self._over())
            return
        try:
            # Whatever it waits for, it has the rest of the time for it: `wait` adds the grace.
            view = self.client.wait(job_id, left, -jobs.GRACE, lambda view: None)
        except Problem as problem:
            self.unchecked(claim, self._over() or str(problem))
            return
        if isinstance(took := view.get("executionTime"), int):
            self.found.execution_ms += took
        output = jobs.synthesis_of(view)
        if output is None:
            self.unchecked(claim, f"the job ended {view.get('status')}: {jobs.failure_text(view)}")
            return
        self.found.model = output["model"]
        if output["model"].get("engine") == "extractive":
            self.hopeless = "the extractive engine quotes and cannot judge"
            self.unchecked(claim, self.hopeless)
            return
        if output.get("finish_reason") != "stop":
            self.unchecked(claim, "the verdict was cut off: max_new_tokens in config/checks.yaml")
            return
        try:
            verdict = parse(output["synthesis"], [i for i in claim.cited if i in self.sources])
        except ValueError as error:
            self.unchecked(claim, f"the answer is no verdict: {error}")
            return
        self.found.judged += 1
        claim.checks["judge"] = verdict
        if verdict["verdict"] != "supported":
            said = "contradict this" if verdict["verdict"] == "contradicted" else "do not say all of this"
            detail = f"a model judged that its sources {said}: {verdict['reason']}"
            kind = "judged_contradicted" if verdict["verdict"] == "contradicted" else "judged_not_enough"
            source = verdict["sources"][0] if verdict["sources"] else None
            self.found.flags.append(Flag("judge", kind, detail, claim.id, source))

    def unchecked(self, claim: Claim, why: str) -> None:
        """No verdict. That is said, and is not the same as a good one."""
        why = " ".join(clean(why).split())[:MAX_REASON]
        self.found.unchecked += 1
        claim.checks["judge"] = {"verdict": "unchecked", "sources": [], "reason": why}
        self.found.flags.append(Flag("judge", "unchecked", f"not judged: {why}", claim.id))


def parse(text: str, sent: Sequence[str]) -> dict[str, Any]:
    """The verdict that an answer is. Raises ValueError unless it is one JSON object of the agreed form and no more."""
    try:
        data = json.loads(text.strip(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object ({error.msg} at character {error.pos})") from None
    if not isinstance(data, dict) or set(data) != {"verdict", "sources", "reason"}:
        raise ValueError("it must have the keys verdict, sources, reason and no others")
    verdict, sources, reason = data["verdict"], data["sources"], data["reason"]
    if verdict not in VERDICTS:
        raise ValueError(f"verdict must be {', '.join(VERDICTS)}")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise ValueError("sources must be a list of ids")
    if len(set(sources)) < len(sources):
        raise ValueError("a source is named twice")
    if unknown := [source for source in sources if source not in sent]:
        shown = " ".join(re.sub(r"[^\w ,.-]", "", ", ".join(unknown)).split())[:60]
        raise ValueError(f"it names {shown or 'a source'}, which was not sent")
    if bool(sources) != (verdict != "not_enough"):
        raise ValueError("sources must be named for supported and contradicted, and none for not_enough")
    if not isinstance(reason, str) or not clean(reason).strip():
        raise ValueError("reason must be a sentence")
    return {"verdict": verdict, "sources": sources, "reason": " ".join(clean(reason).split())[:MAX_REASON]}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number JSON knows")
