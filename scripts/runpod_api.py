"""The one door to RunPod's management API, REST v2: endpoints, pods, the catalog, billing.

Written on requests because every management helper of the runpod SDK 1.12 speaks GraphQL, which RunPod retires in early
2027. Contract: RunPod's OpenAPI description of v2 (docs.runpod.io, api-reference-v2, read 2026-11). Rules: every call has
a timeout; 408, 425, 429, 5xx and lost answers are tried again with backoff and Retry-After where repeating does no harm;
a create is not such a call: its fate can be `Unknown`, and the caller looks it up by name. Unknown fields of answers are
left alone. The key goes into one header and nowhere else.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import requests
import urllib3

from common.problems import REMOTE_FAILED, TRY_LATER, Problem
from common.secrets import redact
from common.text import clean
from common.urls import base_url

RUNPOD_API_URL = "https://api.runpod.io/v2"
RUNPOD_JOBS_URL = "https://api.runpod.ai/v2"
CONNECT_TIMEOUT = 10.0  # seconds, as all times here
READ_TIMEOUT = 30.0
RETRY_BUDGET = 60.0  # how long one call is tried again before it counts as failed
RATE_BUDGET = 150.0  # the same for 429: RunPod counts calls by the minute, and asks to wait for up to one
MAX_BACKOFF = 10.0
LONGEST_RETRY_AFTER = 60.0
ANSWER_SECONDS = 60.0  # how long one answer may take to arrive, however slowly it comes
ANSWER_BYTES = 16_000_000
LOG_SECONDS = 3.0  # how long a log is listened to
MAX_PAGES = 1000
_TRANSIENT = frozenset({408, 425, 429})
# Under which names list answers may carry the cursor of their next page; the description of August 2026 has none yet.
_CURSORS = ("nextCursor", "next_cursor", "cursor")


class ApiError(Problem):
    """A call that the platform refused or did not serve. `status` is 0 without an answer."""

    def __init__(self, message: str, code: int = REMOTE_FAILED, *, status: int = 0) -> None:
        super().__init__(message, code)
        self.status = status


class NotFound(ApiError):
    """404: the thing is not there, or not there yet."""


class NoCapacity(ApiError):
    """RunPod has no machine for the request now; it says so with a 400."""


class Unknown(ApiError):
    """A create whose answer was lost: what it made may exist. Look it up by name before trying again."""


class _Failed(Exception):
    """One attempt's failure. `sent`: may the server have acted on it?"""

    def __init__(
        self, message: str, status: int = 0, *, sent: bool = True, retry_after: float | None = None, detail: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.sent = sent
        self.retry_after = retry_after
        self.detail = detail

    @property
    def transient(self) -> bool:
        return self.status == 0 or self.status in _TRANSIENT or self.status >= 500


class Api:
    """The management API of one account. `url` ends in /v2, without a slash."""

    def __init__(
        self,
        key: str,
        url: str = RUNPOD_API_URL,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.url = url
        self.clock = clock
        self.sleep = sleep
        self.warn = warn
        self.session = session(key, url)

    def get(
        self, path: str, params: Mapping[str, str] | None = None, *, budget: float = RETRY_BUDGET
    ) -> dict[str, Any]:
        """GET one object. Raises ApiError."""
        return self._object("GET", path, params=params, budget=budget)

    def list(self, path: str, key: str, params: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """GET all objects of a list answer's `key`, over all pages if there are pages. Raises ApiError."""
        found: list[dict[str, Any]] = []
        query = dict(params or {})
        seen: set[str] = set()
        for _ in range(MAX_PAGES):
            answer = self._object("GET", path, params=query, budget=RETRY_BUDGET)
            items = answer.get(key)
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise ApiError(f"GET /{path}: the answer holds no list `{key}`")
            found += items
            cursor = next((answer[name] for name in _CURSORS if isinstance(answer.get(name), str)), "")
            if not cursor or cursor in seen:
                return found
            seen.add(cursor)
            query["cursor"] = cursor
        raise ApiError(f"GET /{path}: the list did not end within {MAX_PAGES} pages")

    def create(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST something new, once. A refusal that has certainly made nothing (429, no connection) is tried again.

        Raises Unknown when it may exist although there is no answer, else ApiError.
        """
        return self._object("POST", path, body=body, budget=RETRY_BUDGET, once=True)

    def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """PATCH whole values, which may be repeated. Raises ApiError."""
        return self._object("PATCH", path, body=body, budget=RETRY_BUDGET)

    def delete(self, path: str) -> bool:
        """DELETE; True if it was there. Raises ApiError."""
        try:
            self._retried("DELETE", path, None, None, RETRY_BUDGET, once=False)
        except NotFound:
            return False
        return True

    def log_lines(self, path: str, source: str, tail: int) -> builtins.list[str]:
        """The last lines of a log (`source`: system or container), which the API sends as server-sent events and keeps open.

        Reads for a few seconds at most. Raises ApiError.
        """
        found: builtins.list[str] = []
        end = time.monotonic() + LOG_SECONDS
        try:
            with self.session.get(
                f"{self.url}/{quote(path, safe='/')}",
                params={"source": source, "tail": str(tail)},
                headers={"Accept": "text/event-stream"},
                timeout=(CONNECT_TIMEOUT, LOG_SECONDS),
                allow_redirects=False,
                stream=True,
            ) as response:
                if response.status_code != 200:
                    raise ApiError(f"GET /{path}: HTTP {response.status_code}", status=response.status_code)
                rest = b""
                while len(found) < tail and time.monotonic() < end and len(rest) < ANSWER_BYTES:
                    chunk = response.raw.read1(65536, decode_content=True)
                    *lines, rest = (rest + chunk).split(b"\n")
                    found += [_log_line(line[5:]) for line in lines if line.startswith(b"data:")]
                    if not chunk:
                        break
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            # A log that is kept open ends in a time-out; what came before it is what there is.
            if not found and isinstance(error, requests.exceptions.RequestException):
                raise ApiError(f"GET /{path}: {_network_reason(error)}") from error
        return found[-tail:]

    # --- one call ----------------------------------------------------------------------------------------------------

    def _object(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        budget: float,
        once: bool = False,
    ) -> dict[str, Any]:
        answer = self._retried(method, path, params, body, budget, once)
        if answer is None and once:
            raise Unknown(f"{method} /{path}: the answer is empty; whether it was done is not known", TRY_LATER)
        if answer is None:
            raise ApiError(f"{method} /{path}: the answer is empty")
        return answer

    def _retried(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        budget: float,
        once: bool,
    ) -> dict[str, Any] | None:
        deadline = self.clock() + budget
        attempt = 0
        while True:
            try:
                return self._call(method, path, params, body)
            except _Failed as failure:
                if once and failure.sent and failure.transient and failure.status not in _TRANSIENT:
                    raise Unknown(
                        f"{failure}; whether it was done is not known", TRY_LATER, status=failure.status
                    ) from None
                if not failure.transient:
                    raise _explained(failure) from None
                pause = random.uniform(0.25, 1) * min(0.5 * 2**attempt, MAX_BACKOFF)
                if failure.retry_after is not None:
                    pause = max(pause, failure.retry_after)
                longer = RATE_BUDGET - RETRY_BUDGET if failure.status == 429 else 0.0
                if self.clock() + pause > deadline + longer:
                    raise _explained(failure) from None
                self.warn(f"{failure}; trying again in {pause:.1f} s")
                self.sleep(pause)
                attempt += 1

    def _call(
        self, method: str, path: str, params: Mapping[str, str] | None, body: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        """One HTTP call: its JSON object, None for an empty 204. Raises _Failed."""
        where = f"{method} /{path}"
        try:
            response = self.session.request(
                method,
                f"{self.url}/{quote(path, safe='/')}",
                params=dict(params) if params else None,
                json=body,
                timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
                allow_redirects=False,  # a redirect would carry the key to another host
                stream=True,
            )
            with response:
                content = _content(response)
        except (requests.exceptions.ConnectTimeout, requests.exceptions.InvalidProxyURL) as error:
            raise _Failed(f"{where}: {_network_reason(error)}", sent=False) from error
        except requests.exceptions.ConnectionError as error:
            raise _Failed(f"{where}: {_network_reason(error)}", sent=not _never_connected(error)) from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Failed(f"{where}: {_network_reason(error)}") from error
        if response.status_code == 204:
            return None
        answer = _json(content)
        if not 200 <= response.status_code < 300:
            detail = _detail(answer)
            raise _Failed(
                f"{where}: HTTP {response.status_code}{f': {detail}' if detail else ''}",
                response.status_code,
                retry_after=_retry_after(response),
                detail=detail,
            )
        if not isinstance(answer, dict):
            # What a proxy in between sends, mostly: the request may have been served.
            raise _Failed(f"{where}: the answer is not a JSON object")
        return answer


def session(key: str, url: str) -> requests.Session:
    """A session that sends the key to the API at `url`, and lets nothing replace or read it."""
    made = requests.Session()
    made.headers["Authorization"] = f"Bearer {key}"
    made.headers["User-Agent"] = "open-synthesis"
    # A .netrc or a proxy's credentials must not replace the key.
    made.auth = _KeepHeaders()
    # Plain HTTP stays on this machine: a proxy from the environment would only read the key.
    made.trust_env = url.startswith("https:")
    return made


def from_environment(warn: Callable[[str], None] = lambda message: None) -> Api:
    """The API that RUNPOD_API_KEY and RUNPOD_API_URL name. Raises Problem with what to set."""
    key = os.environ.get("RUNPOD_API_KEY", "")
    if not key:
        raise Problem("RUNPOD_API_KEY is not set; put it into .env, or practise on the local RunPod: add ON=local")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise Problem(
            "RUNPOD_API_KEY has a space, a line's end or a character that no key has; copy it again from the RunPod console"
        )
    url = base_url("RUNPOD_API_URL", RUNPOD_API_URL)
    if "rest.runpod.io" in url or "graphql" in url:
        raise Problem(f"RUNPOD_API_URL={url} is an API that RunPod has retired; leave it empty for {RUNPOD_API_URL}")
    return Api(key, url, warn=warn)


class _KeepHeaders(requests.auth.AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


def _explained(failure: _Failed) -> ApiError:
    """The error for a call that will not succeed: the platform's words, and what to do."""
    status = failure.status
    if status == 404:
        return NotFound(str(failure), status=status)
    if status == 400 and re.search(
        r"no longer any|no (?:available )?(?:instances|machines|capacity)", failure.detail, re.I
    ):
        return NoCapacity(
            f"{failure}; RunPod has no such machine free: try later, or allow more GPU pools", TRY_LATER, status=status
        )
    if status in (400, 403) and re.search(r"quota|limit", failure.detail, re.I):
        return ApiError(
            f"{failure}; the account's limit is reached: lower what you ask for, or raise it in the console",
            status=status,
        )
    advice = {
        401: "the key was refused; check RUNPOD_API_KEY in .env",
        402: "the account has no balance; add funds in the RunPod console",
        403: "the key may not do this; give it the permission in the RunPod console",
        410: "this API has been retired; leave RUNPOD_API_URL empty",
    }.get(status)
    if advice:
        return ApiError(f"{failure}: {advice}", status=status)
    if failure.transient:
        return ApiError(f"{failure}; RunPod does not serve right now, try again later", TRY_LATER, status=status)
    return ApiError(f"{failure}; the request was refused", status=status)


def _log_line(data: bytes) -> str:
    """The line in one event of a log, fit to be shown."""
    try:
        event = json.loads(data)
        line = event["line"] if isinstance(event, dict) else event
    except (ValueError, KeyError):
        line = data.decode("utf-8", "replace")
    return redact(" ".join(clean(str(line)).split()))[:300]


def _content(response: requests.Response) -> bytes:
    """The whole answer. Raises Timeout for one that trickles in, and _Failed for one without end: a read's own time limit
    starts anew with each byte."""
    end = time.monotonic() + ANSWER_SECONDS
    content = b""
    while chunk := response.raw.read1(65536, decode_content=True):
        content += chunk
        if len(content) > ANSWER_BYTES:
            raise _Failed(f"the answer has more than {ANSWER_BYTES} bytes")
        if time.monotonic() > end:
            raise requests.exceptions.ReadTimeout(f"the answer did not end within {ANSWER_SECONDS:.0f} s")
    return content


def _json(content: bytes) -> Any:
    """An answer's JSON as values that can be written again, None where it is not JSON: NaN becomes null, and halves of
    surrogate pairs "?"."""
    try:
        text = json.dumps(json.loads(content, parse_constant=lambda name: None), ensure_ascii=False)
        return json.loads(text.encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _detail(answer: Any) -> str:
    """The words of a problem+json answer in one line: its detail, then each named field."""
    if not isinstance(answer, dict):
        return ""
    words = [answer.get("detail") or answer.get("error") or answer.get("title") or ""]
    errors = answer.get("errors")
    words += errors if isinstance(errors, list) else []
    return " ".join(clean("; ".join(str(word) for word in words if word)).split())[:500]


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return min(float(value), LONGEST_RETRY_AFTER) if re.fullmatch(r"\d{1,6}(\.\d+)?", value) else None


def _network_reason(error: Exception) -> str:
    """A network error in a few words: its innermost reason, without our URL in it."""
    if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)):
        return "no answer in time"
    text = str(error)
    for pattern, words in (
        (
            r"Name or service not known|getaddrinfo|NameResolution|Temporary failure in name",
            "the host name is not known",
        ),
        (r"refused", "the connection was refused"),
        (r"reset by peer|aborted|RemoteDisconnected|closed", "the connection was lost"),
        (r"certificate|SSL", "the TLS connection failed"),
    ):
        if re.search(pattern, text, re.I):
            return words
    return type(error).__name__


def _never_connected(error: Exception) -> bool:
    return bool(re.search(r"NewConnectionError|NameResolutionError|refused|ConnectTimeout", repr(error)))
