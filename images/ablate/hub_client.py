# SPDX-License-Identifier: AGPL-3.0-or-later
"""The Hub's client as all steps use it: with time limits, what a failure means, and questions that are asked again.

Reading (preflight, fetch) and writing (publish) decide for themselves what to say and what to try again; what went wrong
is found out here, once. The token is sent and never shown.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import architecture
from common.problems import REMOTE_FAILED, TRY_LATER, Problem
from common.text import clean

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte; the Hub's client has no limit of its own
QUESTION_TIMEOUT = 10.0  # seconds for each answer to a question
LONGEST_RETRY_AFTER = 300.0  # seconds; the Hub's rate limits count in windows of five minutes
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
ATTEMPTS = 3
PAUSE = 0.5  # seconds before the second attempt, twice that before the third

Result = TypeVar("Result")
Kind = Literal["offline", "gated", "repository", "revision", "status", "timeout", "away", "name", "nonsense", "other"]
_NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)


def endpoint() -> str:
    """The Hub's address, without a slash at its end."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


# --- time limits ---------------------------------------------------------------------------------------------------------


def limit_times(around: Callable[[Any, Callable[[], Any]], Any] | None = None) -> None:
    """Give every request of the Hub's client a time limit where it has none: it waits for ever.

    `around`: called with each request and a function that sends it, to return what that returns or to raise.
    """
    from huggingface_hub import set_client_factory

    set_client_factory(lambda: _client(around))


def _client(around: Callable[[Any, Callable[[], Any]], Any] | None) -> Any:
    import httpx
    from huggingface_hub.utils._http import hf_request_event_hook

    limits = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    client = httpx.Client(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=limits)
    send = client.send

    def bounded(request: Any, **options: Any) -> Any:
        # A request that names no limit has one of None, which the client's own does not replace.
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            key: limit if given.get(key) is None else given[key] for key, limit in limits.as_dict().items()
        }
        return around(request, lambda: send(request, **options)) if around else send(request, **options)

    client.send = bounded
    return client


def retry_after(response: Any) -> float | None:
    """How long the Hub asks to wait, in seconds, within reason; None where it does not say or uses the form with a date."""
    try:
        return min(max(float(response.headers.get("Retry-After", "")), 0.0), LONGEST_RETRY_AFTER)
    except ValueError:
        return None


# --- failures ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """What an error of the Hub's client means.

    `kind`: "offline" (HF_HUB_OFFLINE), "gated" (terms to accept), "repository" or "revision" (not there, or not for
    this token; a missing file counts as a revision), "status" (any other answer with an error), "timeout" and "away" (no
    answer), "name" (no id of a repository), "nonsense" (an answer that no model hub gives), "other". `status`: of
    HTTP, 0 without an answer. `said`: the server's words, on one line. `response`: the answer, None without one.
    """

    kind: Kind
    status: int = 0
    said: str = ""
    response: Any = None

    @property
    def passes(self) -> bool:
        """May the same request succeed later?"""
        return self.kind in ("timeout", "away") or self.status in TRANSIENT or self.status >= 500


def judge(error: BaseException) -> Failure:
    """What an error of the Hub's client means."""
    import httpx
    from huggingface_hub import errors

    chain = causes(error)
    response = next((found for each in chain if (found := getattr(each, "response", None)) is not None), None)
    status = response.status_code if response is not None else 0
    said = short(getattr(error, "server_message", None) or "") if response is not None else ""

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    kind: Kind = "other"
    if any_is(errors.OfflineModeIsEnabled):
        kind = "offline"
    elif any_is(errors.GatedRepoError):
        kind = "gated"
    elif any_is(errors.RepositoryNotFoundError):
        kind = "repository"
    elif any_is(errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError):
        kind = "revision"
    elif status >= 400:
        kind = "status"
    elif any_is(httpx.TimeoutException, TimeoutError):
        kind = "timeout"
    elif any_is(httpx.HTTPError, errors.LocalEntryNotFoundError, ConnectionError):
        kind = "away"
    elif any_is(errors.HFValidationError):
        kind = "name"
    elif isinstance(error, json.JSONDecodeError | ValueError | TypeError | KeyError | AttributeError):
        kind = "nonsense"
    return Failure(kind, status, said, response)


def causes(error: BaseException) -> list[BaseException]:
    """An exception and what it was raised from, outermost first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__
    return found


def short(text: str) -> str:
    """A server's words as one short line."""
    return " ".join(clean(text).split())[:300]


# --- questions -----------------------------------------------------------------------------------------------------------


class Gated(Exception):
    """Access needs an accepted licence."""


class Refused(Exception):
    """The Hub does not accept the token."""


class Missing(Exception):
    """No such repository, revision or file; or not visible to this token."""

    def __init__(self, *, revision: bool) -> None:
        super().__init__()
        self.revision = revision


@dataclass(frozen=True)
class Account:
    """Whom the token belongs to. `organisations`: name → role in it. `writes`: what a fine-grained token may write to
    (owners and repositories), None where the answer does not say."""

    name: str
    role: str
    organisations: dict[str, str]
    writes: frozenset[str] | None


class Questions:
    """The Hub to one who only asks, with a time limit for every answer. No token is looked for on the disk."""

    def __init__(self, token: str | None, timeout: float = QUESTION_TIMEOUT) -> None:
        self.token, self.timeout, self.endpoint = token, timeout, endpoint()
        self._api: Any = None
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise Problem("HF_TOKEN is empty or has a space or a character that no token has; copy it again")

    def refusal(self) -> str:
        """What to say where the token is not accepted."""
        page = f"{self.endpoint}/settings/tokens"
        return f"the Hub refused HF_TOKEN (wrong, expired, revoked, or without this permission): make another at {page}"

    def call(self, what: str, function: Callable[[Any], Result]) -> Result:
        """`function` of an HfApi, tried again where the Hub is busy or away.

        Raises Gated, Refused, Missing; Problem where the Hub does not answer (75) or not as it should (5).
        """
        api = self._api = self._api or self._made()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with architecture.quiet():
                    return function(api)
            except Exception as error:
                again = self._explained(what, error)
                if attempt == ATTEMPTS:
                    raise again from None
            time.sleep(PAUSE * attempt)
        raise AssertionError("not reached")

    def _made(self) -> Any:
        with architecture.quiet():
            from huggingface_hub import HfApi
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
            limit_times()
            return HfApi(endpoint=self.endpoint, token=self.token or False, library_name="open-synthesis")

    def _explained(self, what: str, error: Exception) -> Problem:
        """The Problem to raise after the last attempt; raises at once where another attempt cannot help."""
        failure = judge(error)
        status = failure.status
        if failure.kind == "offline":
            raise Problem(
                "HF_HUB_OFFLINE is set, so the Hub is not asked; unset it, or give MODEL as a folder"
            ) from None
        if failure.kind == "gated":
            raise Gated from None
        if failure.kind == "revision":
            raise Missing(revision=True) from None
        if failure.kind == "repository" or status == 404 or (status == 401 and not self.token):
            raise Missing(revision=False) from None
        if status in (401, 403):
            raise Refused from None
        if failure.passes and status:
            return Problem(
                f"{self.endpoint} answered {status} to a question about the {what}; try again later", TRY_LATER
            )
        if status >= 400:
            raise Problem(
                f"{self.endpoint} refused a question about the {what} ({status} {failure.said})", REMOTE_FAILED
            ) from None
        if failure.passes:
            reason = "did not answer in time" if failure.kind == "timeout" else "cannot be reached"
            return Problem(
                f"{self.endpoint} {reason} (asked about the {what}); check the network, then try again", TRY_LATER
            )
        if failure.kind in ("nonsense", "name"):
            raise Problem(
                f"{self.endpoint} did not answer as a model hub does (asked about the {what}); check HF_ENDPOINT",
                REMOTE_FAILED,
            ) from error
        raise error

    def whoami(self) -> Account:
        """Whom the token belongs to. Raises as `call` does."""

        def ask(api: Any) -> Any:
            # The client's own whoami cannot be given a time limit.
            from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

            headers = build_hf_headers(token=self.token, library_name="open-synthesis")
            response = get_session().get(f"{self.endpoint}/api/whoami-v2", headers=headers, timeout=self.timeout)
            hf_raise_for_status(response)
            return response.json()

        try:
            answer = self.call("account of HF_TOKEN", ask)
        except Missing:
            raise Refused from None
        name = _get(answer, "name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise Problem(f"{self.endpoint} names no account for HF_TOKEN; check HF_ENDPOINT", REMOTE_FAILED)
        organisations = {
            organisation: str(_get(each, "roleInOrg"))
            for each in _list(_get(answer, "orgs"))
            if isinstance(organisation := _get(each, "name"), str) and _NAME.fullmatch(organisation)
        }
        role = _get(answer, "auth", "accessToken", "role")
        scopes = _get(answer, "auth", "accessToken", "fineGrained", "scoped")
        writes = None
        if isinstance(scopes, list):
            granted = (scope for scope in scopes if "repo.write" in _list(_get(scope, "permissions")))
            writes = frozenset(str(_get(scope, "entity", "name")) for scope in granted)
        return Account(name, role if role in ("read", "write", "fineGrained") else "", organisations, writes)


def _get(value: Any, *keys: str) -> Any:
    """The value at a path of keys, None where something else stands there."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else []
