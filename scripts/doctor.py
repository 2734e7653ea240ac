"""`make doctor`, the second half: what the variables and the services say. scripts/doctor asks the machine first.

Standard input holds what scripts/doctor has found, one tab-separated record on a line:
    line STATE WHAT DETAIL MEND     a finished line of the screen
    name NUMBER NAME                a variable of .env and where it stands
    hidden NAME                     .env has a value for it, and the shell's environment another, which wins
    folder NAME                     the variable's value is a folder of this machine
Arguments: the folder of the configuration and the folder of the deploy state. AS=json prints JSON.

No value of a variable is ever printed, only its name: each line is put into words here, and what a library or a server
says stays out of it. `redacted` goes over the whole screen once more. Remote checks run side by side, each with its own
timeout, and are left behind when `DEADLINE` is over; they need the packages of the ops environment, nothing else does.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.problems import BAD_INPUT, FLAGGED, OK, UNCHECKED, Problem
from common.secrets import redact
from common.text import clean
from common.urls import base_url

STATES = ("ok", "note", "off", "unknown", "problem")
CONNECT_TIMEOUT = 4.0  # seconds, as all times here
READ_TIMEOUT = 6.0
DEADLINE = 14.0
EXAMPLE = ".env.example"
HUB_TOKENS = "https://huggingface.co/settings/tokens"
RUNPOD_KEYS = "https://console.runpod.io/user/settings"
IDLE = (
    "RunPod lowers the max workers of an endpoint without jobs to 2 after 3 days and to 0 after 7, and when workers keep"
    " crashing; it never raises them again"
)


@dataclass(frozen=True)
class Line:
    """One line of the screen. `mend` is the command, or the step, that mends it."""

    state: str
    what: str
    detail: str
    mend: str = ""


@dataclass
class Host:
    """What scripts/doctor found."""

    lines: list[Line] = field(default_factory=list)
    names: list[tuple[int, str]] = field(default_factory=list)  # of .env, with their line numbers
    hidden: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)


def read_host(records: Iterable[str]) -> Host:
    """The records of standard input; what is not one is left out."""
    host = Host()
    for record in records:
        match record.rstrip("\n").split("\t"):
            case ["line", state, what, detail, mend] if state in STATES:
                host.lines.append(Line(state, what, detail, mend))
            case ["name", number, name] if number.isdigit():
                host.names.append((int(number), name))
            case ["hidden", name]:
                host.hidden.add(name)
            case ["folder", name]:
                host.folders.add(name)
    return host


# --- variables -------------------------------------------------------------------------------------------------------

# What the value of a variable looks like, and the words for a value that does not.
_FOLDER = (r"(?!~)[^\n]+", "is not a path that is read as written: ~ is not expanded, write the whole path")
_IMAGE = (r"[a-z0-9][A-Za-z0-9._/:@-]*", "is not the name of an image")
SHAPES: dict[str, tuple[str, str]] = {
    "RUNPOD_ENDPOINT_ID": (r"[A-Za-z0-9_-]{1,64}", "is not an endpoint id; the RunPod console shows it"),
    # RunPod's own begin with rpa_; older ones, and the local RunPod's, do not.
    "RUNPOD_API_KEY": (
        r"(?!hf_)[\x21-\x7e]{16,}",
        f"is not a RunPod key: too short, with a character that no key has, or a hub token; copy it again: {RUNPOD_KEYS}",
    ),
    "HF_TOKEN": (
        r"(?!rpa_)[\x21-\x7e]{8,}",
        f"is not a hub token: too short, with a character that no token has, or a RunPod key; copy it again: {HUB_TOKENS}",
    ),
    "RUNTIME": (r"auto|docker|venv", "is not auto, docker or venv"),
    "PYTHON_BASE": _IMAGE,
    "TORCH_BASE": _IMAGE,
    "FLASH_KERNEL": (r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", "is not NAME@COMMIT with a commit of 40 hexadecimal digits"),
    "ENGINE": (r"extractive|transformers|vllm", "is not extractive, transformers or vllm"),
    "MODEL_ID": (r"[\w.-]+/[\w.-]+", "is neither a repository (owner/name) nor a folder of this machine"),
    "MODEL_REVISION": (r"[0-9a-f]{40}", "is not a commit of 40 hexadecimal digits; a branch or a tag can move"),
    "QUANTIZATION": (r"nf4|none", "is not nf4 or none"),
    "VERIFY_WEIGHTS": (r"size|sha256", "is not size or sha256"),
    "VLLM_ARGS": (r"--[^\n]+", "does not begin with --"),
    "STOP_SECONDS": (r"\d+(\.\d+)?", "is not a number of seconds"),
    "IMAGE": (r"[a-z0-9][A-Za-z0-9._/:-]*@sha256:[0-9a-f]{64}", "is not NAME@sha256:… with 64 hexadecimal digits"),
}
DEFAULT_URLS = {
    "RUNPOD_API_URL": "https://api.runpod.io/v2",
    "RUNPOD_JOBS_URL": "https://api.runpod.ai/v2",
    "HF_ENDPOINT": "https://huggingface.co",
}
# What a variable is of no use without.
_NEEDS = (
    ("RUNPOD_ENDPOINT_ID", "RUNPOD_API_KEY", "jobs need a key"),
    ("RUNPOD_JOBS_URL", "RUNPOD_ENDPOINT_ID", "jobs need an endpoint"),
    ("MODEL_REVISION", "MODEL_ID", "a commit needs its model"),
)
# Words that stand in values and on the screen alike: not secrets.
_PLAIN = frozenset("auto docker venv extractive transformers vllm nf4 none size sha256 ablations".split())


def example_names(path: Path) -> list[str]:
    """The variables of .env.example, in its order; none where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    return re.findall(r"^([A-Z][A-Z0-9_]*)=", text, re.MULTILINE)


def misfit(name: str, value: str, folders: Iterable[str] = ()) -> str:
    """What is wrong with a value, in words that do not show it; empty if nothing is."""
    if name in folders and name == "MODEL_ID":
        return ""
    if name.endswith(("_URL", "_ENDPOINT")):
        try:
            base_url(name, DEFAULT_URLS.get(name, "https://example.org"))
        except Problem as problem:
            if "unencrypted" in str(problem):
                return "would send a key unencrypted; use https"
            return "is not a URL: https://host/path, without a password, ? and #"
        return ""
    pattern, words = SHAPES.get(name) or (_FOLDER if name.endswith(("_DIR", "_PATH", "_HOME")) else (r"(?s).*", ""))
    return "" if re.fullmatch(pattern, value) else words


def variables(environ: Mapping[str, str], known: list[str], host: Host) -> list[Line]:
    """A line for each variable with something to say about it, and one each for the rest, set and empty."""
    lines: list[Line] = []
    fine: list[str] = []
    empty: list[str] = []
    if not known:
        lines.append(Line("problem", EXAMPLE, "cannot be read", f"git checkout {EXAMPLE}"))
    for number, name in host.names:
        near = difflib.get_close_matches(name.upper(), known, 1, 0.75)
        # Any other name is not shown: a token pasted by itself can look like one, up to a last `=`.
        if known and name not in known and near:
            lines.append(Line("problem", f".env:{number}", "an unknown name", f"edit .env: did you mean {near[0]}?"))
        elif known and name not in known:
            lines.append(Line("note", f".env:{number}", f"a name that {EXAMPLE} does not have"))
    for name in known:
        value = environ.get(name, "")
        if words := misfit(name, value, host.folders) if value else "":
            lines.append(Line("problem", name, words, f"edit {name} in .env"))
        else:
            (fine if value else empty).append(name)
        if name in host.hidden:
            how = "another value" if value else "an empty value"
            mend = f"unset {name} in the shell to use .env's"
            lines.append(Line("note", name, f"the shell has {how}, which wins over .env's", mend))
    for name, other, why in _NEEDS:
        if environ.get(name) and not environ.get(other):
            lines.append(Line("problem", name, f"is set and {other} is not: {why}", f"edit .env: set {other}"))
    if environ.get("ENGINE") in ("transformers", "vllm") and not environ.get("MODEL_ID"):
        lines.append(Line("problem", "ENGINE", "is set and MODEL_ID is not", "edit .env: set MODEL_ID"))
    if fine:
        lines.append(Line("ok", "variables", f"set, and shaped as they should be: {', '.join(fine)}"))
    if empty:
        lines.append(Line("off", "variables", f"empty, their defaults hold: {', '.join(empty)}"))
    return lines


# --- the model hub ---------------------------------------------------------------------------------------------------


def token_rights(answer: Any) -> tuple[str, bool, bool, bool]:
    """What the hub says of a token: its role, and whether it reads repositories, writes them, and is limited to some.

    The role is empty where the answer names none.
    """
    auth = answer.get("auth") if isinstance(answer, dict) else None
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    role = token.get("role") if isinstance(token, dict) else None
    if role in ("read", "write", "admin"):
        return role, True, role != "read", False
    if role != "fineGrained" or not isinstance(token, dict):
        return "", False, False, False
    grants = token.get("fineGrained")
    grants = grants if isinstance(grants, dict) else {}
    everywhere = grants.get("global")
    rights = {str(right) for right in everywhere} if isinstance(everywhere, list) else set()
    limited = not any(right.startswith("repo.") for right in rights)
    for scope in grants.get("scoped") or []:
        if isinstance(scope, dict) and isinstance(scope.get("permissions"), list):
            rights |= {str(right) for right in scope["permissions"]}
    writes = bool(rights & {"repo.write", "repo.content.write"})
    return "fineGrained", writes or "repo.content.read" in rights, writes, limited


def token_lines(answer: Any) -> list[Line]:
    """What a hub token is, and what it is fit for: the worker (reads) or publishing (writes)."""
    role, reads, writes, limited = token_rights(answer)
    what = "HF_TOKEN"
    if not role:
        return [Line("unknown", what, "the hub knows it, and does not say what it may do", f"look: {HUB_TOKENS}")]
    kind = {"fineGrained": "fine-grained", "read": "role read"}.get(role, f"role {role}")
    if not reads:
        mend = f"{HUB_TOKENS}: give it read access to the model's repository, and write access to publish"
        return [Line("problem", what, f"{kind}; it may neither read nor write repositories", mend)]
    if not writes:
        scope = "of some owners or repositories" if limited else "of everything that the account can see"
        return [Line("ok", what, f"{kind}, reads {scope}: fit for the worker, not for make ablate, which writes")]
    lines = [Line("ok", what, f"{kind}, reads and writes: fit for make ablate (PUBLISH)")]
    if role == "fineGrained" and limited:
        note = "the worker needs less: give RunPod a second one, fine-grained, that only reads the model's repository"
    else:
        note = "far more than the worker needs: whoever gets it can write to all the account's repositories"
    return [*lines, Line("note", what, note, f"{HUB_TOKENS}: a fine-grained one that reads one repository, for RunPod")]


def ask_hub() -> list[Line]:
    """What the hub says of the token."""
    from huggingface_hub.errors import HfHubHTTPError

    import model_hub

    model_hub.TIMEOUT = READ_TIMEOUT
    try:
        return token_lines(model_hub.client(os.environ["HF_TOKEN"]).whoami())
    except HfHubHTTPError as error:
        return [_refused("HF_TOKEN", "the hub", error.response.status_code, HUB_TOKENS)]


def _refused(what: str, who: str, status: int, where: str) -> Line:
    """The line for an HTTP status that is none of the expected ones."""
    if status in (401, 403):
        return Line("problem", what, f"{who} refuses it", f"copy it again, or make a new one: {where}")
    return Line("unknown", what, f"{who} answered HTTP {status}", "make doctor, later")


# --- RunPod ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deployed:
    """What the deploy folder says: the endpoint's id and image as deployed, the image pushed last. Empty: not there."""

    endpoint: str = ""
    image: str = ""
    pushed: str = ""
    lines: tuple[Line, ...] = ()


def deployed(folder: Path, environ: Mapping[str, str]) -> Deployed:
    """Read deploy.lock.json and image.json, and compare them with each other and with the environment."""
    what = "deployed"
    lines: list[Line] = []
    endpoint = image = pushed = ""
    try:
        lock = json.loads((folder / "deploy.lock.json").read_text(encoding="utf-8"))
        endpoint, releases = lock["endpoint"] or "", lock["releases"]
        image = releases[-1]["body"]["image"] if releases else ""
        api, failed = lock["api"], lock.get("failed")
        if not all(isinstance(text, str) for text in (endpoint, image, api)):
            raise TypeError
    except FileNotFoundError:
        api, failed = "", None
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        endpoint, image, api, failed = "", "", "", None
        lines.append(
            Line(
                "problem", what, "deploy.lock.json is damaged", f"rm {_shown(folder)}/deploy.lock.json, then make plan"
            )
        )
    try:
        pushed = json.loads((folder / "image.json").read_text(encoding="utf-8"))["image"]
        if not isinstance(pushed, str):
            raise TypeError
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pushed = ""
        lines.append(Line("problem", what, "image.json is damaged", "make push"))

    chosen, here = (
        environ.get("RUNPOD_ENDPOINT_ID", ""),
        environ.get("RUNPOD_API_URL") or DEFAULT_URLS["RUNPOD_API_URL"],
    )
    if endpoint and api != here.rstrip("/"):
        words = "the lock file is about another API than RUNPOD_API_URL"
        lines.append(Line("problem", what, words, "edit .env: another DEPLOY_DIR for another RUNPOD_API_URL"))
        endpoint = image = ""
    elif endpoint and chosen and endpoint != chosen:
        words = "RUNPOD_ENDPOINT_ID is another endpoint than the one of make deploy"
        lines.append(Line("problem", what, words, "edit .env: take the id that make status shows"))
    elif failed:
        lines.append(Line("note", what, "the last deploy did not end well", "make status, then make deploy"))
    elif endpoint and image and pushed and image != pushed:
        lines.append(Line("note", what, "another image has been pushed since", "make plan, then make deploy"))
    elif endpoint:
        lines.append(Line("ok", what, "an endpoint; its lock file, the pushed image and the environment agree"))
    elif not lines:
        lines.append(Line("off", what, "nothing yet", "make deploy" if pushed else "make push, then make deploy"))
    return Deployed(endpoint, image, pushed, tuple(lines))


def _shown(folder: Path) -> str:
    return "deploy" if folder == Path("deploy") else "DEPLOY_DIR"


def ask_management(endpoint_id: str, wanted_max: int | None) -> list[Line]:
    """What RunPod's management API says of the key and, where there is an id, of the endpoint."""
    import runpod_api

    # A look is not worth the patience of a deploy.
    runpod_api.CONNECT_TIMEOUT, runpod_api.READ_TIMEOUT = CONNECT_TIMEOUT, READ_TIMEOUT
    api = runpod_api.from_environment()
    try:
        endpoint = api.get(f"serverless/{endpoint_id}" if endpoint_id else "serverless", budget=0)
    except runpod_api.NotFound:
        mend = "edit RUNPOD_ENDPOINT_ID in .env, or make deploy"
        return [Line("problem", "endpoint", "RunPod has no such endpoint for this key", mend)]
    except runpod_api.ApiError as error:
        if error.status == 403:
            return [Line("note", "RUNPOD_API_KEY", "may send jobs only: fit for make synth, not for plan and deploy")]
        if error.status == 402:
            mend = "add funds in the RunPod console"
            return [Line("problem", "RUNPOD_API_KEY", "the account has no balance", mend)]
        if error.status == 410:
            return [Line("problem", "RUNPOD_API_URL", "is an API that has been retired", "edit .env: leave it empty")]
        if error.status == 0:
            return [Line("unknown", "RUNPOD_API_KEY", "the management API did not answer", "check the network")]
        return [_refused("RUNPOD_API_KEY", "RunPod's management API", error.status, RUNPOD_KEYS)]
    lines = [Line("ok", "RUNPOD_API_KEY", "RunPod's management API answers: fit for plan and deploy")]
    return [*lines, workers_line(endpoint, wanted_max)] if endpoint_id else lines


def _unmanaged(line: Line) -> Line:
    """The line about an endpoint that takes jobs, although the management API does not have it: no problem then."""
    if (line.state, line.what) != ("problem", "endpoint"):
        return line
    return Line("note", "endpoint", "this key may not see it in the management API, or it is the local RunPod's own")


def workers_line(endpoint: Mapping[str, Any], wanted_max: int | None) -> Line:
    """Can the endpoint start workers, and as many as config/endpoint.yaml says?"""
    workers = endpoint.get("workers")
    most = workers.get("max") if isinstance(workers, dict) else None
    if not isinstance(most, int) or isinstance(most, bool):
        return Line("unknown", "workers", "RunPod does not say how many there may be")
    if most == 0:
        return Line("problem", "workers", f"max is 0: every job waits for ever. {IDLE}", "make deploy")
    if wanted_max is not None and most < wanted_max:
        return Line("note", "workers", f"max is {most}, config/endpoint.yaml says {wanted_max}. {IDLE}", "make deploy")
    return Line("ok", "workers", f"max is {most}")


def ask_jobs(endpoint_id: str) -> list[Line]:
    """Does the endpoint answer where jobs are sent?"""
    import requests

    import runpod_api

    url = base_url("RUNPOD_JOBS_URL", DEFAULT_URLS["RUNPOD_JOBS_URL"])
    with runpod_api.session(os.environ["RUNPOD_API_KEY"], url) as session:
        try:
            answer = session.get(
                f"{url}/{endpoint_id}/health", timeout=(CONNECT_TIMEOUT, READ_TIMEOUT), allow_redirects=False
            )
        except requests.exceptions.RequestException:
            return [Line("unknown", "endpoint", "no answer from where jobs are sent", "check the network")]
    if answer.status_code == 404:
        return [Line("problem", "endpoint", "no endpoint of this id", "edit RUNPOD_ENDPOINT_ID in .env")]
    if answer.status_code in (401, 403):
        return [Line("problem", "endpoint", "RUNPOD_API_KEY may not use it", f"copy the key again: {RUNPOD_KEYS}")]
    if answer.status_code != 200:
        return [Line("unknown", "endpoint", f"the job API answered HTTP {answer.status_code}", "make doctor, later")]
    try:
        health = answer.json()
    except (ValueError, RecursionError):
        health = None
    workers = health.get("workers") if isinstance(health, dict) else None
    jobs = health.get("jobs") if isinstance(health, dict) else None
    if not isinstance(workers, dict) or not isinstance(jobs, dict):
        return [Line("unknown", "endpoint", "what answers is not RunPod's job API", "edit RUNPOD_JOBS_URL in .env")]
    ready, throttled, unhealthy = (_count(workers, key) for key in ("ready", "throttled", "unhealthy"))
    said = f"answers: {ready} workers ready, {_count(jobs, 'inQueue')} jobs in queue"
    if unhealthy:
        return [Line("problem", "endpoint", f"{said}, {unhealthy} workers unhealthy", "make status")]
    if throttled and not ready:
        words = f"{said}, {throttled} workers wait for a free GPU"
        return [Line("note", "endpoint", words, "allow more GPU pools in config/endpoint.yaml, then make deploy")]
    return [Line("ok", "endpoint", said)]


def _count(counts: Mapping[str, Any], key: str) -> int:
    value = counts.get(key)
    return value if isinstance(value, int) else 0


def ask_registry(reference: str, source: str) -> list[Line]:
    """Is the image, by its digest, in its registry?"""
    import image_registry

    what = "image"
    try:
        found = image_registry.look_up(reference, timeout=CONNECT_TIMEOUT)
    except Problem:
        return [Line("problem", what, f"the one of {source} names no digest", "make push, then make deploy")]
    if found.exists:
        return [Line("ok", what, f"the one of {source} is in its registry")]
    if found.exists is None:
        mend = f"docker buildx imagetools inspect, with the image of {source}: it asks with your docker login"
        return [Line("unknown", what, f"the one of {source}: {found.reason}", mend)]
    words = f"the one of {source} is not in its registry: new workers cannot start"
    return [Line("problem", what, words, "make push, then make deploy")]


def wanted_workers(config: Path) -> int | None:
    """workers.max of config/endpoint.yaml; None where there is none to read."""
    import yaml

    try:
        value = yaml.safe_load((config / "endpoint.yaml").read_text(encoding="utf-8"))["workers"]["max"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# --- all of it -------------------------------------------------------------------------------------------------------

Check = Callable[[], list[Line]]


def remote_checks(environ: Mapping[str, str], state: Deployed, config: Path) -> tuple[dict[str, Check], list[Line]]:
    """The checks that need the network, by what they are about, and lines for those that there is nothing to ask for."""
    checks: dict[str, Check] = {}
    lines: list[Line] = []
    usable = {name for name in environ if environ[name] and not misfit(name, environ[name])}

    def fit(*names: str) -> bool:  # a URL that is not fit would get the key
        return all(name in usable or not environ.get(name) for name in names)

    if not environ.get("HF_TOKEN"):
        lines.append(Line("off", "HF_TOKEN", "not set: public models only, and make ablate needs PUBLISH=0"))
    elif environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        lines.append(Line("off", "HF_TOKEN", "HF_HUB_OFFLINE is set: not asked"))
    elif fit("HF_TOKEN", "HF_ENDPOINT"):
        checks["HF_TOKEN"] = ask_hub

    endpoint_id = environ.get("RUNPOD_ENDPOINT_ID") or state.endpoint
    if not re.fullmatch(SHAPES["RUNPOD_ENDPOINT_ID"][0], endpoint_id):
        endpoint_id = ""
    if not environ.get("RUNPOD_API_KEY"):
        lines.append(Line("off", "RUNPOD_API_KEY", "not set: the local RunPod answers make synth"))
    elif not fit("RUNPOD_API_KEY", "RUNPOD_API_URL", "RUNPOD_JOBS_URL", "RUNPOD_ENDPOINT_ID"):
        lines.append(Line("off", "RunPod", "not asked before the variables above are right"))
    else:
        if environ.get("RUNPOD_JOBS_URL") and not environ.get("RUNPOD_API_URL"):
            # The key of one server is no business of another.
            words = "RUNPOD_JOBS_URL names another server, RUNPOD_API_URL does not: its management API is not asked"
            lines.append(Line("off", "RUNPOD_API_KEY", words))
        else:
            checks["RUNPOD_API_KEY"] = lambda: ask_management(endpoint_id, wanted_workers(config))
        if environ.get("RUNPOD_API_URL") and not environ.get("RUNPOD_JOBS_URL"):
            words = "RUNPOD_API_URL names another server, RUNPOD_JOBS_URL does not: jobs are not asked for"
            lines.append(Line("off", "endpoint", words))
        elif endpoint_id:
            checks["endpoint"] = lambda: ask_jobs(endpoint_id)
        else:
            lines.append(Line("off", "endpoint", "none: the local RunPod answers make synth", "make deploy"))

    for image, source in (
        (state.image, "deploy.lock.json"),
        (state.pushed, "image.json"),
        (environ.get("IMAGE", ""), "IMAGE"),
    ):
        if image:
            checks["image"] = lambda image=image, source=source: ask_registry(image, source)  # type: ignore[misc]
            break
    else:
        lines.append(Line("off", "image", "none is deployed", "make push"))
    return checks, lines


def at_once(checks: Mapping[str, Check], seconds: float) -> dict[str, list[Line]]:
    """Run the checks side by side; after `seconds`, those that have not ended are unknown and left behind."""
    found: dict[str, list[Line]] = {}

    def run(what: str, check: Check) -> None:
        try:
            found[what] = check()
        except ImportError:
            mend = "scripts/run ops -- true, then make doctor"
            found[what] = [Line("unknown", what, "not checked: the ops environment is not built", mend)]
        except Exception as error:  # a library's words may hold anything, so only its kind is shown
            found[what] = [Line("unknown", what, f"no answer ({type(error).__name__})", "check the network")]

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = Line("unknown", "", f"no answer within {seconds:.0f} s", "check the network")
    return {what: list(found.get(what) or [Line(late.state, what, late.detail, late.mend)]) for what in checks}


def exit_code(lines: Iterable[Line]) -> int:
    """3 if there is a problem, else 4 if something could not be checked, else 0."""
    states = {line.state for line in lines}
    return FLAGGED if "problem" in states else UNCHECKED if "unknown" in states else OK


def redacted(text: str, environ: Mapping[str, str], names: Iterable[str]) -> str:
    """`text` with the name of a variable wherever its value stands. A net under lines that hold no value as they are."""
    values = {environ[name]: name for name in names if len(environ.get(name, "")) >= 6}
    for value in sorted(values.keys() - _PLAIN, key=len, reverse=True):
        text = text.replace(value, f"<{values[value]}>")
    return text


def screen(lines: list[Line]) -> str:
    """The lines for a person: state, what, detail, and what mends it."""
    wide = max(len(line.what) for line in lines)
    said = []
    for line in lines:
        margin = " " * (wide + 11)
        words = textwrap.wrap(line.detail, max(120 - len(margin), 60), break_long_words=False, break_on_hyphens=False)
        said.append(f"{line.state:<8} {line.what:<{wide}}  " + f"\n{margin}".join(words))
        if line.mend:
            said.append(f"{'':<8} {'':<{wide}}  mend: {line.mend}")
    problems, unknown = (sum(line.state == state for line in lines) for state in ("problem", "unknown"))
    said.append(f"\n{_number(problems, 'problem')}, {unknown} not checked")
    return "\n".join(said)


def _number(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"


def main(arguments: list[str]) -> int:
    """Print the screen."""
    form = os.environ.get("AS") or "text"
    if form not in ("text", "json") or len(arguments) != 2:
        print("usage: make doctor [AS=json]", file=sys.stderr)
        return BAD_INPUT
    config, deploy = (Path(argument) for argument in arguments)
    known = example_names(Path(EXAMPLE))
    state = deployed(deploy, os.environ)
    checks, silent = remote_checks(os.environ, state, config)
    answers = at_once(checks, DEADLINE)  # meanwhile scripts/doctor looks at the machine, and writes into the pipe
    if any(line.state == "ok" for line in answers.get("endpoint", [])):
        answers["RUNPOD_API_KEY"] = [_unmanaged(line) for line in answers.get("RUNPOD_API_KEY", [])]
    host = read_host(sys.stdin)
    lines = (
        host.lines + variables(os.environ, known, host) + silent + [line for part in answers.values() for line in part]
    )
    lines += state.lines
    names = {*known, *(name for _, name in host.names), *SHAPES, *DEFAULT_URLS}
    lines = [
        Line(*(redact(redacted(" ".join(clean(text).split()), os.environ, names)) for text in line_fields))
        for line_fields in ((line.state, line.what, line.detail, line.mend) for line in lines)
    ]
    code = exit_code(lines)
    if form == "json":
        print(json.dumps({"code": code, "lines": [asdict(line) for line in lines]}, ensure_ascii=False, indent=2))
    else:
        print(screen(lines))
    return code


if __name__ == "__main__":
    answer = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(answer)  # a check that was left behind must not be waited for
