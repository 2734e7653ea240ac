"""Does an image exist in its registry? Asked without credentials, over the registries' common HTTP API (v2).

A manifest is asked for by its digest with HEAD: nothing is downloaded, and Docker Hub does not count it as a pull. A
registry that wants a token, as Docker Hub and ghcr.io do, gives anybody one for public images. A private image, and one
that was never pushed to a private registry, look alike from outside: neither yes nor no. Plain HTTP is for loopback only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

from common.problems import Problem
from common.urls import is_near

TIMEOUT = 5.0  # seconds for each of at most four requests
DOCKER_HUB = "registry-1.docker.io"
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_REFERENCE = re.compile(r"([a-z0-9][A-Za-z0-9._/:-]{0,400})@(sha256:[0-9a-f]{64})")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*")
_HOST = re.compile(r"[A-Za-z0-9.-]+(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Found:
    """`exists` is None where the registry did not say; `reason` are a few words that name no image."""

    exists: bool | None
    reason: str


def digest_exists(reference: str, *, timeout: float = TIMEOUT) -> bool | None:
    """Is NAME@sha256:… in its registry? None where that cannot be known from here.

    Raises Problem for a reference without a digest.
    """
    return look_up(reference, timeout=timeout).exists


def look_up(reference: str, *, timeout: float = TIMEOUT) -> Found:
    """The same, with the reason."""
    host, repository, digest = parse(reference)
    near = is_near(urlsplit(f"//{host}").hostname or "")
    url = f"{'http' if near else 'https'}://{host}/v2/{repository}/manifests/{digest}"
    with requests.Session() as session:
        # Plain HTTP stays on this machine, whatever proxy the environment names; and a .netrc's login stays where it is.
        session.trust_env = not near
        session.auth = _Anonymous()
        session.headers.update({"User-Agent": "open-synthesis", "Accept": _MANIFESTS})
        try:
            return _asked(session, url, digest, repository, timeout)
        except requests.exceptions.Timeout:
            return Found(None, "the registry did not answer in time")
        except (requests.exceptions.RequestException, UnicodeError):
            # UnicodeError: a host name that is none.
            return Found(None, "the registry cannot be reached")


def parse(reference: str) -> tuple[str, str, str]:
    """Host, repository and digest of NAME[:TAG]@sha256:…, short names being Docker Hub's. Raises Problem."""
    match = _REFERENCE.fullmatch(reference)
    if match:
        name, digest = match.groups()
        first, slash, rest = name.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost"):
            host, repository = first, rest
        else:
            host, repository = "docker.io", name
        repository = re.sub(r":[A-Za-z0-9_.-]+$", "", repository)
        if host in ("docker.io", "index.docker.io"):
            host = DOCKER_HUB
            repository = repository if "/" in repository else f"library/{repository}"
        if _HOST.fullmatch(host) and _REPOSITORY.fullmatch(repository):
            return host, repository, digest
    raise Problem("an image is named as NAME@sha256:…, with the digest that make push wrote to deploy/image.json")


def _asked(session: requests.Session, url: str, digest: str, repository: str, timeout: float) -> Found:
    answer = _manifest(session, url, timeout)
    if answer.status_code == 401 and (token := _token(session, answer, repository, timeout)):
        session.headers["Authorization"] = f"Bearer {token}"
        answer = _manifest(session, url, timeout)
    status = answer.status_code
    if status == 200:
        # A captive portal answers everything with 200.
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        held = answer.headers.get("Docker-Content-Digest") or (digest if kind in _MANIFESTS.split(", ") else "")
        return Found(True, "it is there") if held == digest else Found(None, "what answers is not a registry")
    if status == 404:
        named = "Docker-Distribution-Api-Version" in answer.headers or "json" in answer.headers.get("Content-Type", "")
        return Found(False, "it is not there") if named else Found(None, "what answers is not a registry")
    if status in (401, 403):
        return Found(None, "it is private, or its repository does not exist")
    if status == 429:
        return Found(None, "the registry has had too many requests from here")
    return Found(None, f"the registry answered HTTP {status}")


def _manifest(session: requests.Session, url: str, timeout: float) -> requests.Response:
    answer = session.head(url, timeout=timeout, allow_redirects=False)
    if answer.status_code == 405:
        answer.close()
        with session.get(url, timeout=timeout, allow_redirects=False, stream=True) as whole:
            return whole  # its head is enough
    return answer


def _token(session: requests.Session, refusal: requests.Response, repository: str, timeout: float) -> str:
    """The token that the registry's own service gives to anybody; empty where it gives none."""
    scheme, _, rest = refusal.headers.get("WWW-Authenticate", "").partition(" ")
    if scheme.lower() != "bearer":
        return ""
    asked = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    realm = asked.get("realm", "")
    try:
        parts = urlsplit(realm)
        fit = parts.scheme == "https" or (parts.scheme == "http" and is_near(parts.hostname or ""))
    except ValueError:
        fit = False
    if not fit:
        return ""
    params = {"scope": asked.get("scope") or f"repository:{repository}:pull"}
    if service := asked.get("service"):
        params["service"] = service
    answer = session.get(realm, params=params, timeout=timeout, allow_redirects=False)
    try:
        given: Any = answer.json() if answer.status_code == 200 else {}
    except (ValueError, RecursionError):
        given = {}
    found = (given.get("token") or given.get("access_token")) if isinstance(given, dict) else None
    return found if isinstance(found, str) and re.fullmatch(r"[\x21-\x7e]{1,20000}", found) else ""


class _Anonymous(requests.auth.AuthBase):
    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request
