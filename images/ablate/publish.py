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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hub_client
import manifest
from common.problems import BAD_INPUT, OK, REMOTE_FAILED, TRY_LATER, Problem, run
from common.text import clean
from hardware import gigabytes
from hub_client import LONGEST_RETRY_AFTER, TRANSIENT, causes, judge, retry_after, short
from lifeline import die_with_the_driver

STALL = 600.0  # seconds without a byte of an upload by xet, which has no time limit of its own
ATTEMPTS = 6  # of one step, while the Hub does not answer or says that it cannot now
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between attempts, doubled each time
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
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import disable_progress_bars

        if not _on_terminal():
            disable_progress_bars()
        self.repo, self.public, self.token = repo, public, token
        self.endpoint = str(constants.ENDPOINT)
        hub_client.limit_times(_bounded)
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
        if "README.md" in sums:
            self.check_card((folder / "README.md").read_text(encoding="utf-8", errors="replace"))
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
            info = self.api.model_info(
                self.repo, revision=revision, files_metadata=True, timeout=hub_client.READ_TIMEOUT
            )
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

    def check_card(self, card: str) -> None:
        """Stop where the Hub would refuse the model card: it does so at the commit, when everything has been sent."""

        def call() -> None:
            from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

            response = get_session().post(
                f"{self.endpoint}/api/validate-yaml",
                json={"content": card, "repoType": "model"},
                headers=build_hf_headers(token=self.token, library_name="open-synthesis"),
            )
            if response.status_code == 400:
                answer = response.json()
                errors = answer.get("errors") if isinstance(answer, dict) else None
                told = [each.get("message") for each in errors or [] if isinstance(each, dict)]
                raise Problem(
                    f"the Hub refuses the model card's metadata ({short(self.safe('; '.join(map(str, told))))}); nothing was sent."
                    " The licence there is that of the base model's card",
                    REMOTE_FAILED,
                )
            hf_raise_for_status(response)

        self.attempt("checking the model card", call)

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
            self.say(f"{self.repo}: sending {len(adding)} files ({gigabytes(size)}), deleting {len(deleting)}")
            with _unstalled():
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
        for cause in causes(error):
            if isinstance(cause, Problem):  # from a step inside this one
                raise cause
            if isinstance(cause, Transient):
                return cause
        failure = judge(error)
        if failure.kind == "offline":
            raise Problem(f"{doing}: HF_HUB_OFFLINE=1 forbids it; unset it to publish")
        if failure.status:
            return self.judged_status(doing, failure, error)
        if _is_transport(error):
            return Transient(f"no answer ({type(error).__name__})")
        told = short(self.safe(str(error)))
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

    def judged_status(self, doing: str, failure: hub_client.Failure, error: BaseException) -> Transient:
        """The same for an answer of the Hub with an error status."""
        status = failure.status
        told = self.safe(failure.said) or "no reason given"
        if status == 412:
            return Transient("the repository has changed meanwhile")
        if status in TRANSIENT or status >= 500:
            return Transient(f"HTTP {status}", retry_after(failure.response))
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
        self.hub.say(short(re.sub(r"\?\S+", "", record.getMessage())))


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


def _bounded(request: Any, send: Callable[[], Any]) -> Any:
    """Send a request of huggingface_hub's client, without retries of its own that nobody hears of.

    A failing request raises Transient, which only `attempt` catches. Uploads of single objects (PUT) are left to the client's
    own few retries, as a step that starts again would send finished ones again.
    """
    import httpx

    where = f"{request.method} {request.url.path}"
    try:
        response = send()
    except httpx.TransportError as error:
        if request.method == "PUT":
            raise
        raise Transient(f"{where}: no answer ({type(error).__name__})") from error
    if (wait := retry_after(response)) is not None:
        response.headers["Retry-After"] = f"{wait:.0f}"
    if request.method != "PUT" and (
        response.status_code in TRANSIENT
        # The client would ask again at once, for ever.
        or (response.status_code == 409 and "another conflicting operation" in response.text)
    ):
        raise Transient(f"{where}: HTTP {response.status_code}", wait)
    return response


@contextmanager
def _unstalled() -> Iterator[None]:
    """Raise Problem where an upload by xet inside sends nothing for STALL seconds. (HTTP has its own limits.)

    xet works in threads of its own, and a call of it that waits can only be ended from outside: by aborting its session.
    """
    from huggingface_hub.utils import _xet

    seen: list[Any] = [None, time.monotonic()]
    ended, stalled = threading.Event(), threading.Event()
    real = _xet.get_xet_session

    def watch() -> None:
        while not ended.wait(min(5.0, STALL / 4)):
            if time.monotonic() - seen[1] > STALL:
                stalled.set()
                _xet.abort_xet_session()
                return

    def watched() -> Any:
        threading.Thread(target=watch, daemon=True).start()
        return _Watched(real(), seen)

    _xet.get_xet_session = watched
    try:
        yield
    except BaseException as error:
        if not stalled.is_set():
            raise
        raise Problem(
            f"nothing was sent for {STALL / 60:.0f} minutes, so the upload was ended. Run the same command again: it sends only"
            " what is missing",
            TRY_LATER,
        ) from error
    finally:
        ended.set()
        _xet.get_xet_session = real


class _Watched:
    """A session of xet that notes in `seen` when the figures of its progress last changed: [figures, time]."""

    def __init__(self, session: Any, seen: list[Any]) -> None:
        self.session, self.seen = session, seen

    def new_upload_commit(self, *, progress_callback: Any = None, **options: Any) -> Any:
        def noted(group: Any, items: Any) -> None:
            figures = [
                getattr(group, name, None) for name in ("total_bytes_completed", "total_transfer_bytes_completed")
            ]
            shard = getattr(group, "shard", None)
            figures += [
                getattr(shard, name, None)
                for name in ("total_shards_completed", "total_shard_validation_entries_completed")
            ]
            if figures != self.seen[0]:
                self.seen[:] = figures, time.monotonic()
            if progress_callback is not None:
                progress_callback(group, items)

        return self.session.new_upload_commit(progress_callback=noted, **options)


def _is_transport(error: BaseException) -> bool:
    import httpx

    return any(isinstance(cause, httpx.TransportError) for cause in causes(error))


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
