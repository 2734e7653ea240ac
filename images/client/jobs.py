"""A client of RunPod's job API: send one job, follow it to its end, cancel it.

Written on requests because the SDK's own client does not retry over https, loses the error of a failed job and can poll
for ever. Rules: every call has a timeout; 408, 429 and 5xx are tried again with backoff and Retry-After; a POST /run
whose fate is unknown is never repeated blindly; a job that is given up is cancelled, so that it cannot bill later.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import requests

from common.problems import REMOTE_FAILED, TRY_LATER, Problem
from common.text import clean
from settings import Endpoint

CONNECT_TIMEOUT = 10.0  # seconds, as all times here
READ_TIMEOUT = 30.0
RETRY_BUDGET = 60.0  # how long one call is tried again before it counts as failed
MAX_BACKOFF = 10.0
POLL = (0.1, 5.0)  # first and longest wait between two looks at a job
GRACE = 60.0  # beyond queue and execution time, for the platform's own bookkeeping
FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
MAX_BODY = 10_000_000  # RunPod's limit for /run
_RETRY_STATUSES = frozenset({408, 425, 429})
# What a POST that was answered so has certainly not done.
_REFUSED = frozenset({408, 425, 429, 503})
# Gateways that gave up waiting: what is behind them may still act on the request.
_GATEWAY_TIMEOUTS = frozenset({504, *range(520, 528)})
# A job can be unknown for a moment after it was accepted: this long before that is believed.
MISSING_PATIENCE = 15.0


class CallFailed(Exception):
    """One call's failure. `status` is 0 without an answer; `sent`: may the server have acted on it?"""

    def __init__(self, message: str, status: int = 0, *, sent: bool = True, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.sent = sent
        self.retry_after = retry_after

    @property
    def transient(self) -> bool:
        return self.status == 0 or self.status in _RETRY_STATUSES or self.status >= 500


class Unconfirmed(Problem):
    """A job was sent and nobody knows whether it was accepted."""


class JobClient:
    """The job API of one endpoint."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.endpoint = endpoint
        self.clock = clock
        self.sleep = sleep
        self.warn = warn
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {endpoint.key}"
        self.session.headers["User-Agent"] = "open-synthesis"
        # A .netrc or a proxy's credentials must not replace the key.
        self.session.auth = _KeepHeaders()
        # Plain HTTP stays on this machine: a proxy from the environment would only read the key.
        self.session.trust_env = endpoint.url.startswith("https:")

    # --- what a caller does ------------------------------------------------------------------------------------------

    def health(self, budget: float = RETRY_BUDGET) -> dict[str, Any]:
        """Counts of jobs and workers. Raises Problem."""
        return self._retried("GET", "health", budget=budget)

    def submit(self, job_input: dict[str, Any], policy: dict[str, int], before: dict[str, Any] | None) -> str:
        """POST /run once and return the job's id.

        A refusal (408, 425, 429, 503) is tried again. An answer that was lost, or that a gateway did not wait for, is
        not: the job may be running. After any other 5xx the job is sent once more, if the endpoint's counters have not
        moved since `before`, its health from before the call. Raises Problem.
        """
        body = {"input": job_input, "policy": policy}
        size = len(json.dumps(body).encode())
        if size > MAX_BODY:
            raise Problem(
                f"the job has {size} bytes and RunPod takes {MAX_BODY}; lower n_results in config/inference.yaml"
            )
        deadline = self.clock() + RETRY_BUDGET
        attempt = 0
        repeated = False
        while True:
            try:
                answer = self._call("POST", "run", body)
                job_id = answer.get("id")
                if not isinstance(job_id, str) or not re.fullmatch(r"[\w.:-]{1,200}", job_id):
                    raise CallFailed("the answer to /run holds no job id")
                return job_id
            except CallFailed as failure:
                if failure.sent and failure.status not in _REFUSED:
                    if not failure.transient:
                        raise self._explained(failure) from None
                    lost = failure.status == 0 or failure.status in _GATEWAY_TIMEOUTS
                    if lost or repeated or not self._never_arrived(before):
                        raise Unconfirmed(
                            f"the answer to sending the job was lost ({failure}), and it may have been accepted."
                            f" It was not sent again; if it runs, it ends by itself within {policy['ttl'] // 1000} s",
                            TRY_LATER,
                        ) from None
                    repeated = True
                attempt = self._back_off(failure, attempt, deadline)

    def _never_arrived(self, before: dict[str, Any] | None) -> bool:
        """Do the endpoint's counters, twice, show no more jobs than before?"""
        if before is None:
            return False
        for _ in range(2):
            self.sleep(1.0)
            try:
                after = self._call("GET", "health")
            except CallFailed:
                return False
            if after.get("jobs") != before.get("jobs"):
                return False
        return True

    def wait(
        self, job_id: str, queue_timeout: float, execution_timeout: float, on_state: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Follow a job to its end and return its last view. `on_state` sees every view.

        Raises Problem when the job waits longer than `queue_timeout`, when the total deadline passes, and when its
        result is gone; a job that is given up is cancelled first.
        """
        start = self.clock()
        deadline = start + queue_timeout + execution_timeout + GRACE
        queued_since: float | None = start
        pause = POLL[0]
        missing_since: float | None = None
        while True:
            try:
                view = self._call("GET", f"status/{job_id}")
                missing_since = None
            except CallFailed as failure:
                if failure.status != 404:
                    missing_since = None
                elif missing_since is None:
                    missing_since = self.clock()
                elif self.clock() - missing_since >= MISSING_PATIENCE:
                    self.cancel(job_id)  # in case it is there after all
                    raise Problem(
                        f"job {job_id} is no longer known: its result has expired (RunPod keeps one for 30 minutes) or its"
                        " time to live ran out",
                        REMOTE_FAILED,
                    ) from None
                if not failure.transient and failure.status != 404:
                    self.cancel(job_id)
                    raise self._explained(failure) from None
                view = {"status": "UNREACHABLE", "reason": str(failure)}
                pause = max(pause, failure.retry_after or 0.5)
            on_state(view)
            state = str(view.get("status"))
            if state in FINAL:
                return view
            now = self.clock()
            if state == "IN_QUEUE":
                queued_since = now if queued_since is None else queued_since
                if now - queued_since > queue_timeout:
                    reason = self._why_queued()
                    raise Problem(
                        f"job {job_id} waited {queue_timeout:.0f} s for a worker and {self._given_up(job_id)}: {reason}",
                        TRY_LATER,
                    )
            elif state != "UNREACHABLE":
                queued_since = None
            if now > deadline:
                raise Problem(
                    f"job {job_id} did not end within {deadline - start:.0f} s (last state: {clean(state)[:40]})"
                    f" and {self._given_up(job_id)}; raise queue_timeout or execution_timeout in config/inference.yaml",
                    TRY_LATER,
                )
            self.sleep(pause)
            pause = min(pause * 1.4, POLL[1])

    def cancel(self, job_id: str, budget: float = 15.0) -> bool:
        """Cancel a job; True if the platform confirmed it. Never raises: it is called while giving up."""
        try:
            self._retried("POST", f"cancel/{job_id}", budget=budget)
        except Problem:
            self.warn(f"job {job_id} could not be cancelled; it ends by itself when its time to live is over")
            return False
        return True

    def _given_up(self, job_id: str) -> str:
        return "was cancelled" if self.cancel(job_id) else "could not be cancelled"

    def _why_queued(self) -> str:
        try:
            workers = self._call("GET", "health").get("workers")
        except CallFailed as failure:
            return f"the endpoint's health could not be read ({failure})"
        workers = workers if isinstance(workers, dict) else {}
        if not any(
            workers.get(kind) for kind in ("ready", "idle", "running", "initializing", "throttled", "unhealthy")
        ):
            return "the endpoint has no workers. RunPod sets an idle endpoint's max workers to 0 after 7 days: check it in the console"
        if workers.get("throttled"):
            return "its workers are throttled: no GPU of the wanted kind is free; try later or allow more GPU kinds"
        if workers.get("unhealthy") and not workers.get("ready"):
            return "its workers are unhealthy: read their logs in the console"
        if workers.get("initializing"):
            return "its workers are still starting; raise queue_timeout in config/inference.yaml"
        return "its workers are busy or do not take jobs; read their logs"

    # --- one call ----------------------------------------------------------------------------------------------------

    def _retried(self, method: str, path: str, *, budget: float) -> dict[str, Any]:
        """A call that may be repeated safely, tried again until `budget` seconds have passed."""
        deadline = self.clock() + budget
        attempt = 0
        while True:
            try:
                return self._call(method, path)
            except CallFailed as failure:
                if not failure.transient:
                    raise self._explained(failure) from None
                attempt = self._back_off(failure, attempt, deadline)

    def _back_off(self, failure: CallFailed, attempt: int, deadline: float) -> int:
        """Sleep before the next attempt, or raise Problem when that would pass the deadline."""
        pause = random.uniform(0.25, 1) * min(0.5 * 2**attempt, MAX_BACKOFF)
        if failure.retry_after is not None:
            pause = max(pause, failure.retry_after)
        if self.clock() + pause > deadline:
            raise self._explained(failure)
        self.warn(f"{failure}; trying again in {pause:.1f} s")
        self.sleep(pause)
        return attempt + 1

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One HTTP call; its answer must be a JSON object. Raises CallFailed."""
        where = f"{method} /{path.split('/')[0]}"
        try:
            response = self.session.request(
                method,
                f"{self.endpoint.url}/{self.endpoint.id}/{path}",
                json=body,
                timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
                allow_redirects=False,  # a redirect would carry the key to another host
            )
        except (requests.exceptions.ConnectTimeout, requests.exceptions.InvalidProxyURL) as error:
            raise CallFailed(f"{where}: {_network_reason(error)}", sent=False) from error
        except requests.exceptions.ConnectionError as error:
            raise CallFailed(f"{where}: {_network_reason(error)}", sent=not _never_connected(error)) from error
        except requests.exceptions.RequestException as error:
            raise CallFailed(f"{where}: {_network_reason(error)}") from error
        if response.status_code != 200:
            raise CallFailed(
                f"{where}: HTTP {response.status_code}{_error_text(response)}",
                response.status_code,
                retry_after=_retry_after(response),
            )
        answer = _decoded(response)
        if not isinstance(answer, dict):
            raise CallFailed(f"{where}: the answer is not a JSON object")
        return answer

    def _explained(self, failure: CallFailed) -> Problem:
        """The message for a call that will not succeed."""
        advice = {
            401: "the key was refused; check RUNPOD_API_KEY in .env",
            402: "the account has no balance; add funds in the RunPod console",
            403: "the key may not use this endpoint; check its permissions in the RunPod console",
            404: f"there is no endpoint {self.endpoint.id}; check RUNPOD_ENDPOINT_ID in .env",
            413: "the job is too large; lower n_results in config/inference.yaml",
        }.get(failure.status)
        if advice:
            return Problem(f"{failure}: {advice}", REMOTE_FAILED)
        if failure.transient:
            return Problem(f"{failure}; {self.endpoint.url} does not serve right now, try again later", TRY_LATER)
        return Problem(f"{failure}; the request was refused", REMOTE_FAILED)


def _decoded(response: requests.Response) -> Any:
    """A response's JSON as values that can be written again, None where it is not JSON.

    NaN and infinities become null and halves of surrogate pairs "?": an answer that has cost money is not lost to them.
    """
    try:
        text = json.dumps(response.json(), ensure_ascii=False).encode("utf-8", "replace")
        return json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None


class _KeepHeaders(requests.auth.AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


def failure_text(view: dict[str, Any]) -> str:
    """What a failed job says, in one line: the SDK's JSON of an exception is reduced to its message."""
    error = view.get("error") or view.get("output") or "no reason given"
    if isinstance(error, str) and error.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            error = json.loads(error)
    if isinstance(error, dict):
        error = error.get("error_message") or error.get("error") or json.dumps(error, ensure_ascii=False)
    return " ".join(clean(str(error)).split())[:500]


def synthesis_of(view: dict[str, Any]) -> dict[str, Any] | None:
    """The output of a COMPLETED job, or None where there is none or it is not what the wire promises."""
    output = view.get("output") if view.get("status") == "COMPLETED" else None
    if isinstance(output, list) and output:  # what a worker that can stream has yielded; the answer comes last
        output = output[-1]
    if isinstance(output, dict) and isinstance(output.get("synthesis"), str) and isinstance(output.get("model"), dict):
        return output
    return None


def _never_connected(error: requests.exceptions.ConnectionError) -> bool:
    """Did this fail before a connection stood (refused, no route, unknown host)? Then nothing was sent."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return type(reason).__name__ in ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError")


def _network_reason(error: Exception) -> str:
    if isinstance(error, requests.exceptions.ReadTimeout):
        return f"no answer within {READ_TIMEOUT:.0f} s"
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT:.0f} s"
    if isinstance(error, requests.exceptions.SSLError):
        return f"the TLS certificate was not accepted ({error.args[0] if error.args else error})"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "no connection" if _never_connected(error) else "the connection broke"
    return type(error).__name__


def _error_text(response: requests.Response) -> str:
    """The server's own words, if it sent a short JSON error."""
    body = _decoded(response)
    text = body.get("error") or body.get("detail") or body.get("title") if isinstance(body, dict) else None
    return f" ({' '.join(clean(text).split())[:200]})" if isinstance(text, str) else ""


def _retry_after(response: requests.Response) -> float | None:
    """Retry-After in seconds, capped at a minute; the date form is not used by RunPod and counts as absent."""
    value = response.headers.get("Retry-After", "")
    try:
        return min(max(float(value), 0.0), 60.0)
    except ValueError:
        return None
