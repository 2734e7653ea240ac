"""What the client's tests share: its programs in a folder of their own, a worker, and a scripted server."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import requests
import yaml

from common.problems import run
from embedding import Vectors

TREE = Path(__file__).parents[2]
# The same examples on every machine.
PROPERTY = hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=60)
KEY = "rpa_TESTKEY0123456789abcdef"
VARIABLES = (
    "Q", "DOMAIN", "FROM", "RUNPOD_ENDPOINT_ID", "RUNPOD_API_KEY", "RUNPOD_JOBS_URL", "VECTOR_STORE_PATH", "RUNS_DIR",
    "CONFIG_DIR", "CORPUS_DIR", "STDERR_IS_TERMINAL",
)  # fmt: skip
CONFIGURATION = {
    "temperature": 0.3,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 512,
    "seed": 7,
    "datamark": False,
    "n_results": 4,
    "min_similarity": 0.2,
    "embedding_model": "all-MiniLM-L6-v2",
    "lexical": True,
    "lexical_coverage": 0.5,
    "rare_share": 0.05,
    "lexical_weight": 0.5,
    "refuting": ["no effect: {question}", "failed replication: {question}"],
    "refuting_weight": 0.25,
    "refuting_relevance": 0.8,
    "rerank": None,
    "mmr_lambda": 0.7,
    "max_per_paper": 3,
    "source_tokens": 4000,
    "source_tokenizer": None,
    "tokens_per_piece": 1.3,
    "citation_check_enabled": True,
    "hallucination_check_enabled": False,  # on in test_checks
    "uncertainty_quantification": False,
    "human_review_required": True,
    "samples": 1,
    "queue_timeout": 60,
    "execution_timeout": 60,
}
NAPS = "Do naps improve alertness?"
SLEEP = [
    {
        "id": "roe-2019",
        "title": "Naps and alertness",
        "text": "Short naps improve alertness in shift workers. Twenty minutes were enough in a trial of 60 nurses.",
        "authors": ["Roe, J.", "Poe, E. A."],
        "year": 2019,
        "doi": "10.1000/naps.1",
        "venue": "Journal of Naps",
        "source_type": "rct",
        "replication_status": "successful",
    },
    {
        "id": "doe-2020",
        "title": "Why long naps fail",
        "text": "Naps of two hours left people groggy. Alertness after a long nap was lower than after a short one.",
        "authors": ["Doe, J."],
        "year": 2020,
        "url": "https://example.org/long-naps",
        "integrity_status": "retracted",
    },
    {
        "id": "lee-2021",
        "title": "Coffee before a nap",
        "text": "Coffee right before a nap improved alertness more than the nap alone. The sample was small.",
        "authors": ["Lee, A.", "Kim, B.", "Cho, C."],
        "year": 2021,
    },
]


def as_lines(*records: dict[str, Any]) -> bytes:
    """Records as a JSONL file holds them."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def tree_of(*folders: Path) -> dict[str, str]:
    """Every file and folder below some folders, with a hash of its content."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    code: int
    out: str
    err: str


class Client:
    """The client's programs, with store, runs, config and corpus in a folder of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store, self.runs_dir, self.corpus = root / "store", root / "runs", root / "corpus"
        self.variables: dict[str, str] = {}
        for folder in ("config", "corpus"):
            (root / folder).mkdir()
        self.configure()

    def configure(self, **changes: Any) -> None:
        """Write config/inference.yaml."""
        (self.root / "config" / "inference.yaml").write_text(yaml.safe_dump(CONFIGURATION | changes))
        for name in ("checks.yaml", "evidence.yaml"):
            shutil.copy(Path(__file__).parents[2] / "config" / name, self.root / "config" / name)

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        return kept | self.variables | variables

    def run(self, program: str, **variables: str) -> Outcome:
        """Run a program in this process, in the client's folder. No output may hold the key or a terminal command."""
        streams = (io.BytesIO(), io.BytesIO())
        out = io.TextIOWrapper(streams[0], encoding="utf-8", write_through=True)
        err = io.TextIOWrapper(streams[1], encoding="utf-8", errors="backslashreplace", write_through=True)
        before = signal.getsignal(signal.SIGTERM)
        main = importlib.import_module(program).main
        try:
            with (
                mock.patch.dict(os.environ, self.environment(variables), clear=True),
                contextlib.chdir(self.root),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                run(main)
        except SystemExit as end:
            return self.checked(Outcome(int(end.code or 0), *(stream.getvalue().decode() for stream in streams)))
        finally:
            signal.signal(signal.SIGTERM, before)
        raise AssertionError("the program did not leave with an exit code")

    def start(self, program: str, **variables: str) -> subprocess.Popen[str]:
        """Start a program as a process."""
        return subprocess.Popen(
            [sys.executable, "-m", program],
            cwd=self.root,
            env=self.environment(variables),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self, process: subprocess.Popen[str]) -> Outcome:
        out, err = process.communicate(timeout=60)
        return self.checked(Outcome(process.returncode, out, err))

    def checked(self, outcome: Outcome) -> Outcome:
        shown = outcome.out + outcome.err
        assert KEY not in shown
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]", shown)
        assert "Traceback" not in outcome.err, outcome.err
        return outcome

    def ingest(self, domain: str, *records: dict[str, Any]) -> Outcome:
        """Load records into a domain with the real program."""
        (self.root / "records.jsonl").write_bytes(as_lines(*records))
        return self.run("ingest", DOMAIN=domain, FROM="records.jsonl")

    def written(self, *, index: bool = True) -> dict[str, str]:
        """What lies in store/ and runs/, with or without the files of the index."""
        found = tree_of(self.store, self.runs_dir)
        return {path: digest for path, digest in found.items() if index or "/chroma" not in path}

    def runs(self) -> list[Path]:
        """The folders of the runs, those that have not ended too."""
        return sorted(self.runs_dir.glob("*")) if self.runs_dir.exists() else []

    def only_run(self) -> Path:
        [folder] = self.runs()
        assert not folder.name.startswith(".")
        for file in folder.iterdir():
            assert KEY not in file.read_text()
        return folder

    def note(self) -> dict[str, Any]:
        """run.json of the only run."""
        note: dict[str, Any] = load(self.only_run() / "run.json")
        return note


def sources(shown: str) -> list[str]:
    """The lines of `make retrieve` that are sources."""
    return [line for line in shown.splitlines() if re.match(r" *S\d+ ", line)]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def answer(synthesis: str, **changes: Any) -> dict[str, Any]:
    """A worker's result as the wire promises it."""
    output = {
        "synthesis": synthesis,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 10, "completion_tokens": 5},
        "model": {"id": "m", "revision": "r", "engine": "transformers", "quantization": "none", "image": ""},
        "prompts": {"system": "0" * 64, "synthesis": "1" * 64},
        "timings": {"queue_ms": 0, "prefill_ms": 1, "decode_ms": 2},
    }
    return {"output": output | changes}


CLEAN = answer("Short naps improve alertness [S1].")


class Tempo:
    """A clock and a sleep that run `speed` times faster than real time; with speed 0 nothing waits at all."""

    def __init__(self, speed: float = 0) -> None:
        self.speed = speed
        self.now = 1000.0
        self.sleeps: list[float] = []

    def clock(self) -> float:
        return time.monotonic() * self.speed if self.speed else self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        if self.speed:
            time.sleep(seconds / self.speed)


class LocalRunPod:
    """The local RunPod, running as a process."""

    def __init__(self, base_url: str) -> None:
        self.at = f"{base_url}/v2/local"
        self.base_url = base_url
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Authorization"] = f"Bearer {KEY}"

    def variables(self) -> dict[str, str]:
        return {"RUNPOD_JOBS_URL": f"{self.base_url}/v2", "RUNPOD_ENDPOINT_ID": "local", "RUNPOD_API_KEY": KEY}

    def arm(self, kind: str, **fault: Any) -> None:
        response = self.session.post(f"{self.base_url}/__faults__", json={"kind": kind, **fault}, timeout=10)
        assert response.ok, response.text

    def armed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.session.get(f"{self.base_url}/__faults__", timeout=10).json()["armed"]
        return found

    def reset(self) -> None:
        self.session.delete(f"{self.base_url}/__faults__", timeout=10)
        self.session.post(f"{self.at}/purge-queue", timeout=10)

    def jobs(self) -> int:
        """How many jobs have come, those that were cancelled left out."""
        counts = self.session.get(f"{self.at}/health", timeout=10).json()["jobs"]
        return sum(counts[key] for key in ("completed", "failed", "inProgress", "inQueue"))

    def state(self, job_id: str) -> str:
        return str(self.session.get(f"{self.at}/status/{job_id}", timeout=10).json().get("status"))

    def cancel(self, job_id: str) -> None:
        assert self.session.post(f"{self.at}/cancel/{job_id}", timeout=10).ok


class Worker(threading.Thread):
    """A worker on the wire that answers what the test wants; None leaves the job unanswered."""

    def __init__(self, at: str) -> None:
        super().__init__(daemon=True)
        self.at = at
        self.reset()
        self.ended = threading.Event()

    def reset(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.result: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda job: CLEAN

    def run(self) -> None:
        session = requests.Session()
        session.trust_env = False
        session.headers["Authorization"] = KEY
        with session:
            while not self.ended.is_set():
                response = session.get(f"{self.at}/job-take/tester", timeout=30)
                if response.status_code == 200:
                    job = response.json()
                    self.taken.append(job)
                    if (result := self.result(job)) is not None:
                        session.post(f"{self.at}/job-done/tester/{job['id']}", json=result, timeout=10)


def wait_for(ready: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@dataclass(frozen=True)
class Request:
    """What the scripted server was asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Answer:
    """What the scripted server says after `seconds`. `body` is sent as JSON, bytes as they are."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0


class Scripted:
    """A server of the job API that answers from a script: for each route a list, the last one again and again."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.script: dict[str, list[Answer]] = {
            "health": [Answer({"jobs": {"completed": 0}, "workers": {"ready": 1}})],
            "run": [Answer({"id": "job-1", "status": "IN_QUEUE"})],
            "status": [Answer({"id": "job-1", "status": "COMPLETED", **CLEAN})],
            "cancel": [Answer({"id": "job-1", "status": "CANCELLED"})],
        }
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer takes 40 ms

            def serve(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(raw) if raw else None
                scripted.seen.append(Request(self.command, self.path, dict(self.headers), body))
                route = (self.path.removeprefix("/v2/ep/").split("/"))[0]
                answers = scripted.script.get(route) or [Answer({"error": "no such route"}, 404)]
                said = answers.pop(0) if len(answers) > 1 else answers[0]
                time.sleep(said.seconds)
                data = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
                self.send_response(said.status)
                for name, value in (said.headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(data)

            do_GET = do_POST = do_CONNECT = serve

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def variables(self) -> dict[str, str]:
        return {"RUNPOD_JOBS_URL": f"{self.base_url}/v2", "RUNPOD_ENDPOINT_ID": "ep", "RUNPOD_API_KEY": KEY}

    def status(self, *views: dict[str, Any]) -> None:
        """Let /status answer these views."""
        self.script["status"] = [Answer({"id": "job-1", **view}) for view in views]

    def asked(self, route: str) -> list[Request]:
        return [request for request in self.seen if request.path.removeprefix("/v2/ep/").split("/")[0] == route]


class Hashed:
    """An embedding model in ten lines: a hashed bag of words, so that texts with common words are near each other."""

    limit = 40

    def __init__(self, name: str = "hashed") -> None:
        self.name = name
        self.texts: list[str] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.texts.extend(texts)
        vectors = np.zeros((len(texts), 64), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in (self.name + " " + text).lower().split():
                vectors[row, int(hashlib.sha256(word.encode()).hexdigest(), 16) % 64] += 1
        normalised: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return normalised


@contextlib.contextmanager
def local_runpod(folder: Path) -> Iterator[LocalRunPod]:
    """The local RunPod as a process of its own."""
    announced = folder / "url"
    process = subprocess.Popen(
        [sys.executable, "-m", "local_runpod", "--announce", str(announced)],
        env={**os.environ, "LOCAL_RUNPOD_KEY": KEY},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(announced.exists)
        platform = LocalRunPod(announced.read_text().strip())
        with platform.session:
            yield platform
    finally:
        process.terminate()
        process.wait(10)
