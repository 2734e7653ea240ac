# SPDX-License-Identifier: AGPL-3.0-or-later
"""Put a folder into a model repository on the Hub and tag it, so that a tag never names anything but the whole folder.

The order is the safety: the repository's visibility is known before a byte is sent and checked again before and after
the one commit; every file at that commit is compared with the manifest; only then the tag is made. Running it again
sends what is missing, and nothing if nothing is. As a program: python -m publish FOLDER REPO TAG, with HF_TOKEN and,
for a repository that everyone can read, PUBLIC=1; the last line of its output is the commit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import manifest
from common.problems import BAD_INPUT, OK, REMOTE_FAILED, TRY_LATER, Problem, run
from common.text import clean
from lifeline import die_with_the_driver

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte; the Hub's client has no limit of its own
ATTEMPTS = 6  # of one step, while the Hub does not answer or says that it cannot now
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts, doubled each time
LONGEST_RETRY_AFTER = 300.0  # seconds; the Hub's rate limits count in windows of five minutes
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# What the Hub keeps for itself in a repository.
THEIRS = (".gitattributes",)

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9](?:[\w-]|\.(?!\.|$)){0,127}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
T = TypeVar("T")


class Transient(Exception):
    """The Hub cannot answer now; the same request may succeed later."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Remote:
    """The state of a repository at a commit, as the Hub tells it. `files` maps a path to (size, kind, digest)."""

    commit: str
    private: bool
    files: dict[str, tuple[int, str, str]]


def publish(folder: Path, repo: str, *, tag: str, public: bool, token: str) -> str:
    """Upload `folder` to the model repository `repo` ("namespace/name") as one commit, tag it, and return the commit.

    Makes the repository if it does not exist. The commit is 40 hex digits. Raises Problem: 2 for input that cannot be
    published, 5 where the Hub refuses or does not hold what was sent, 75 where it does not serve now.
    """
    _check_input(folder, repo, tag, token)
    sums = manifest.verify(folder) if (folder / manifest.NAME).exists() else manifest.write(folder)
    hub = _Hub(repo, public, token)
    try:
        return hub.publish(folder, {**sums, manifest.NAME: _sha256(folder / manifest.NAME)}, tag)
    except Problem as problem:
        raise Problem(hub.safe(str(problem)), problem.code) from None


def _check_input(folder: Path, repo: str, tag: str, token: str) -> None:
    if not folder.is_dir():
        raise Problem(f"{folder} is not a folder; give the folder that the model was saved to")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".", "-")):
        raise Problem(f"{repo!r:.120} is not the name of a repository; it must look like your-name/model-name")
    if not _TAG.fullmatch(tag) or tag.endswith(".lock") or _COMMIT.fullmatch(tag):
        raise Problem(f"{tag!r:.120} is not a tag: letters, digits, . _ and - only")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise Problem(
            "HF_TOKEN is not set, or holds a character that no token has; make one with write access at"
            " https://huggingface.co/settings/tokens and set it in .env"
        )


class _Hub:
    """One repository, through the Hub's client with our timeouts and our way of trying again."""

    def __init__(self, repo: str, public: bool, token: str) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import HfApi, constants, set_client_factory
        from huggingface_hub.utils import disable_progress_bars

        if not _on_terminal():
            disable_progress_bars()
        self.repo, self.public, self.token = repo, public, token
        self.endpoint = str(constants.ENDPOINT)
        set_client_factory(_client)
        logger = logging.getLogger("huggingface_hub")
        logger.handlers = [_Spoken(self)]  # the client's own words may hold signed addresses
        logger.propagate = False
        self.api = HfApi(token=token)

    # --- the steps ---------------------------------------------------------------------------------------------------

    def publish(self, folder: Path, sums: dict[str, str], tag: str) -> str:
        self.create()
        remote = self.read("main")
        if remote.private is self.public:
            self.refuse_visibility()
        tagged = self.tagged(tag)
        if tagged is not None:
            # A run that is repeated after its end: nothing to send.
            remote = self.read(tagged)
            self.assert_visible_as_wanted(remote, "while it was checked")
            if found := differences(folder, sums, remote):
                raise Problem(
                    f"{self.repo} already has the tag {tag}, at commit {tagged[:12]}, with other files ({_few(found)});"
                    " nothing was sent. Publish under another tag, or delete that one at"
                    f" {self.endpoint}/{self.repo}/tree/{tag}"
                )
            self.say(f"{self.repo} already holds every file at the tag {tag}")
            return tagged
        commit = self.upload(folder, sums)
        remote = self.read(commit)
        self.assert_visible_as_wanted(remote, "during the upload")
        if found := differences(folder, sums, remote):
            raise Problem(
                f"{self.repo} does not hold what was sent ({_few(found)}), so commit {commit[:12]} got no tag; run the same command"
                " again: it sends those files anew",
                REMOTE_FAILED,
            )
        self.make_tag(tag, commit)
        self.say(f"{self.repo}: {len(sums)} files checked at commit {commit}, tagged {tag}")
        return commit

    def create(self) -> None:
        """Make the repository if it is not there. One that is keeps its visibility, whatever is asked for here."""
        self.attempt(
            f"creating {self.repo}",
            lambda: self.api.create_repo(self.repo, repo_type="model", private=not self.public, exist_ok=True),
        )

    def read(self, revision: str) -> Remote:
        """What the Hub holds at a revision."""

        def call() -> Remote:
            info = self.api.model_info(self.repo, revision=revision, files_metadata=True, timeout=READ_TIMEOUT)
            if not isinstance(info.private, bool) or not _COMMIT.fullmatch(str(info.sha)):
                raise Problem(
                    f"{self.endpoint} does not say whether {self.repo} is private, or at which commit it is; nothing is"
                    " published without that. Is HF_ENDPOINT a model hub?",
                    REMOTE_FAILED,
                )
            files = {
                file.rfilename: (file.lfs.size, "sha256", file.lfs.sha256)
                if file.lfs
                else (file.size, "git", file.blob_id)
                for file in info.siblings or []
            }
            return Remote(str(info.sha), info.private, files)

        return self.attempt(f"reading {self.repo}", call)

    def refuse_visibility(self) -> None:
        if self.public:
            raise Problem(
                f"{self.repo} exists and is private, but PUBLIC=1 was given; nothing was sent. Leave PUBLIC out, or"
                f" make it public first: {self.endpoint}/{self.repo}/settings"
            )
        raise Problem(
            f"{self.repo} is public; nothing was sent. Make it private at {self.endpoint}/{self.repo}/settings, or choose"
            " another repository"
        )

    def assert_visible_as_wanted(self, remote: Remote, when: str) -> None:
        """Stop where the repository's visibility has changed; one that everyone can read is closed if that can be done."""
        if remote.private is not self.public:
            return
        if self.public:
            raise Problem(
                f"{self.repo} turned private {when}; it got no tag. Run the same command without PUBLIC=1",
                REMOTE_FAILED,
            )
        try:
            self.attempt(
                f"making {self.repo} private again", lambda: self.api.update_repo_settings(self.repo, private=True)
            )
            closed = self.read("main").private
        except Problem:
            closed = False
        state = (
            "it was made private again, but what lay there could be read in between"
            if closed
            else f"IT IS STILL PUBLIC and could not be made private: do it now at {self.endpoint}/{self.repo}/settings"
        )
        raise Problem(
            f"{self.repo} turned public {when}, without being asked to: {state}. It got no tag. Find out who or what"
            " changed it, then run the same command again",
            REMOTE_FAILED,
        )

    def upload(self, folder: Path, sums: dict[str, str]) -> str:
        """Bring the head to exactly the folder's files, in one commit or none; the head's commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions: dict[str, Any] = {}  # kept over attempts, so that a file is hashed once

        def call() -> str:
            head = self.read("main")
            self.assert_visible_as_wanted(head, "during the upload")
            wrong = differences(folder, sums, head)
            if not wrong:  # nothing to do, or the commit was made and only its answer was lost
                return head.commit
            for name in wrong.keys() & sums.keys():
                additions.setdefault(name, CommitOperationAdd(name, str(folder / name)))
            adding = [additions[name] for name in sorted(wrong.keys() & sums.keys())]
            deleting = [CommitOperationDelete(name, is_folder=False) for name in sorted(wrong.keys() - sums.keys())]
            size = sum(operation.upload_info.size for operation in adding)
            self.say(f"{self.repo}: sending {len(adding)} files ({size / 1e9:.3g} GB), deleting {len(deleting)}")
            self.api.preupload_lfs_files(self.repo, adding, free_memory=False, gitignore_content="")
            # What was sent so far is not in any commit; the visibility is read once more before it is.
            self.assert_visible_as_wanted(self.read("main"), "during the upload")
            made = self.api.create_commit(
                self.repo, [*deleting, *adding], commit_message="Upload the model", parent_commit=head.commit
            )
            return str(made.oid)

        return self.attempt(f"uploading to {self.repo}", call)

    def tagged(self, tag: str) -> str | None:
        """The commit that a tag names, None where there is no such tag."""
        refs = self.attempt(f"reading the tags of {self.repo}", lambda: self.api.list_repo_refs(self.repo))
        return next((str(ref.target_commit) for ref in refs.tags if ref.name == tag), None)

    def make_tag(self, tag: str, commit: str) -> None:
        """Tag a commit. A tag that is there already must name the same one."""

        def call() -> None:
            if self.tagged(tag) is None:
                self.api.create_tag(self.repo, tag=tag, revision=commit, exist_ok=True)

        self.attempt(f"tagging {self.repo}", call)
        if (found := self.tagged(tag)) != commit:
            raise Problem(
                f"the tag {tag} of {self.repo} is at {(found or 'no commit')[:12]}, not at {commit[:12]} where the files"
                " were checked; someone else publishes there. Publish under another tag",
                REMOTE_FAILED,
            )

    # --- trying again ------------------------------------------------------------------------------------------------

    def attempt(self, doing: str, call: Callable[[], T]) -> T:
        """Do a step, again while the Hub cannot serve. Raises Problem where it will not succeed."""
        pause = FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except Problem:
                raise
            except Exception as error:
                failure = self.judged(doing, error)
            if attempt == ATTEMPTS:
                break
            wait = max(random.uniform(0.5, 1) * pause, min(failure.retry_after or 0.0, LONGEST_RETRY_AFTER))
            self.say(f"{doing}: {failure}; trying again in {wait:.1f} s ({attempt} of {ATTEMPTS - 1})")
            time.sleep(wait)
            pause = min(pause * 2, LONGEST_PAUSE)
        raise Problem(
            f"{doing}: {failure}, {ATTEMPTS} times; {self.endpoint} does not serve right now. Nothing is lost: run the same"
            " command again later, it sends only what is missing",
            TRY_LATER,
        )

    def judged(self, doing: str, error: BaseException) -> Transient:
        """The failure as something to try again; raises the Problem for one that would only come back."""
        from httpx import TransportError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        causes = _causes(error)
        for cause in causes:
            if isinstance(cause, Problem):  # from a step inside this one
                raise cause
            if isinstance(cause, Transient):
                return cause
            if isinstance(cause, OfflineModeIsEnabled):
                raise Problem(f"{doing}: HF_HUB_OFFLINE=1 forbids it; unset it to publish")
            if isinstance(cause, HfHubHTTPError):
                return self.judged_status(doing, cause)
            if isinstance(cause, TransportError):
                return Transient(f"no answer ({type(cause).__name__})")
        told = _short(self.safe(str(error)))
        if isinstance(error, json.JSONDecodeError):
            return Transient("the answer is not JSON")
        if isinstance(error, KeyError | TypeError | AttributeError):
            raise Problem(
                f"{doing}: the answer is not what a model hub sends ({type(error).__name__}); is HF_ENDPOINT right?",
                REMOTE_FAILED,
            ) from error
        if isinstance(error, ValueError):
            raise Problem(f"{doing}: refused: {told}", REMOTE_FAILED) from error
        if isinstance(error, PermissionError) and type(error) is not PermissionError:  # hf_xet's own, of its storage
            raise Problem(f"{doing}: the storage refused the token: {told}. {self.advice()}", REMOTE_FAILED) from error
        if isinstance(error, RuntimeError | ConnectionError | TimeoutError):  # hf_xet tells everything else like this
            return Transient(f"{type(error).__name__}: {told}")
        if isinstance(error, OSError):
            raise Problem(f"{doing}: {told}; is every file of the folder readable?") from error
        raise error

    def judged_status(self, doing: str, error: Any) -> Transient:
        """The same for an answer of the Hub with an error status."""
        status = error.response.status_code
        told = _short(self.safe(error.server_message or "")) or "no reason given"
        if status == 412:
            return Transient("the repository has changed meanwhile")
        if status in TRANSIENT or status >= 500:
            return Transient(f"HTTP {status}", _retry_after(error.response))
        advice = {
            401: f"the token was not accepted. {self.advice()}",
            402: "the account's plan does not allow it; see https://huggingface.co/settings/billing",
            403: f"the token may not write there. {self.advice()}",
            404: f"the repository is not there, or the token may not see it. {self.advice()}",
            413: "the account's storage is full; delete what is no longer needed or raise the plan at"
            " https://huggingface.co/settings/billing, then run the same command again",
        }.get(status, "the Hub refused it")
        raise Problem(f"{doing}: HTTP {status} ({told}): {advice}", REMOTE_FAILED) from error

    def advice(self) -> str:
        namespace = self.repo.split("/")[0]
        return (
            f"HF_TOKEN needs write access to {namespace}: make such a token at {self.endpoint}/settings/tokens, set it in"
            " .env, and run the same command again"
        )

    # --- words -------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A line of progress on stderr."""
        print(clean(self.safe(text)), file=sys.stderr, flush=True)

    def safe(self, text: str) -> str:
        """A text without the token, should a server have sent it back."""
        return text.replace(self.token, "***")


class _Spoken(logging.Handler):
    """What the Hub's client warns of, as lines of ours: addresses without their query, which may be a signature."""

    def __init__(self, hub: _Hub) -> None:
        super().__init__(logging.WARNING)
        self.hub = hub

    def emit(self, record: logging.LogRecord) -> None:
        self.hub.say(_short(re.sub(r"\?\S+", "", record.getMessage())))


def differences(folder: Path, sums: dict[str, str], remote: Remote) -> dict[str, str]:
    """Files that are not in a repository as the manifest has them, with what is wrong. What the Hub keeps is left out.

    Large files are compared by sha256 and size, others by the id that git gives their content.
    """
    found: dict[str, str] = {}
    for name, sha256 in sums.items():
        if name not in remote.files:
            found[name] = "is missing"
            continue
        size, kind, digest = remote.files[name]
        path = folder / name
        if size != path.stat().st_size:
            found[name] = "has another size"
        elif digest != (sha256 if kind == "sha256" else _git_blob(path)):
            found[name] = "has other content"
    return found | dict.fromkeys(remote.files.keys() - sums.keys() - set(THEIRS), "does not belong there")


def _few(found: dict[str, str]) -> str:
    """The first differences in words."""
    listed = [f"{clean(name)} {what}" for name, what in sorted(found.items())]
    return ", ".join(listed[:3]) + (f", {len(listed) - 3} more" if len(listed) > 3 else "")


def _git_blob(path: Path) -> str:
    """The id that git gives a file's content (40 hex digits)."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _client() -> Any:
    """The HTTP client for huggingface_hub: with time limits, and without retries of its own that nobody hears of.

    A failing request raises Transient, which only `attempt` catches. Uploads of single objects (PUT) are left to the client's
    own few retries, as a step that starts again would send finished ones again.
    """
    import httpx
    from huggingface_hub.utils._http import hf_request_event_hook

    limits = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    client = httpx.Client(event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=limits)
    send = client.send

    def bounded(request: Any, **options: Any) -> Any:
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            key: limit if given.get(key) is None else given[key] for key, limit in limits.as_dict().items()
        }
        where = f"{request.method} {request.url.path}"
        try:
            response = send(request, **options)
        except httpx.TransportError as error:
            if request.method == "PUT":
                raise
            raise Transient(f"{where}: no answer ({type(error).__name__})") from error
        if (wait := _retry_after(response)) is not None:
            response.headers["Retry-After"] = f"{wait:.0f}"
        if request.method != "PUT" and (
            response.status_code in TRANSIENT
            # The client would ask again at once, for ever.
            or (response.status_code == 409 and "another conflicting operation" in response.text)
        ):
            raise Transient(f"{where}: HTTP {response.status_code}", wait)
        return response

    client.send = bounded
    return client


def _retry_after(response: Any) -> float | None:
    """How long the Hub asks to wait, in seconds, within reason; None where it does not say or uses the form with a date."""
    try:
        return min(max(float(response.headers.get("Retry-After", "")), 0.0), LONGEST_RETRY_AFTER)
    except ValueError:
        return None


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and what it was raised from, outermost first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__
    return found


def _short(text: str) -> str:
    """A server's words as one short line."""
    return " ".join(clean(text).split())[:300]


def _on_terminal() -> bool:
    """Does a person see stderr? A container's is a pipe even when a terminal shows it; the environment says so."""
    return sys.stderr.isatty() or bool(os.environ.get("STDERR_IS_TERMINAL"))


def main() -> int:
    """Publish FOLDER to REPO under TAG; the last line on stdout is the commit."""
    if len(sys.argv) != 4:
        raise Problem("usage: python -m publish FOLDER REPO TAG", BAD_INPUT)
    die_with_the_driver()
    folder, repo, tag = sys.argv[1:]
    public = os.environ.get("PUBLIC", "") not in ("", "0")
    commit = publish(Path(folder), repo, tag=tag, public=public, token=os.environ.get("HF_TOKEN", "").strip())
    print(commit)
    return OK


if __name__ == "__main__":
    run(main)
