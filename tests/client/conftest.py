"""Fixtures of the client's tests. They run in the client's environment, against the real engine and embedding model."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis.configuration
import pytest
from tests.client.support import SLEEP, Client, LocalRunPod, Scripted, Tempo, Worker, local_runpod

import embedding
import jobs

# The tree may be read-only.
hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")


@pytest.fixture(scope="session")
def embedder() -> embedding.Embedder:
    """The shipped embedding model."""
    return embedding.load("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def slept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the domain sleep."""
    client = Client(tmp_path_factory.mktemp("slept"))
    assert client.ingest("sleep", *SLEEP).code == 0
    return client.store


@pytest.fixture
def client(tmp_path: Path, slept: Path) -> Client:
    """The programs in a fresh folder, with the domain sleep."""
    root = tmp_path / "client"
    root.mkdir()
    shutil.copytree(slept, root / "store")
    return Client(root)


@pytest.fixture
def empty(tmp_path: Path) -> Client:
    """The programs in a fresh folder, without any domain."""
    root = tmp_path / "empty"
    root.mkdir()
    return Client(root)


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalRunPod, Worker]]:
    with local_runpod(tmp_path_factory.mktemp("runpod")) as platform:
        worker = Worker(platform.at)
        worker.start()
        yield platform, worker
        worker.ended.set()
        worker.join(10)


@pytest.fixture
def platform(started: tuple[LocalRunPod, Worker], client: Client) -> Iterator[LocalRunPod]:
    """The local RunPod, where the client's jobs go; the worker answers each with a clean synthesis."""
    platform, worker = started
    worker.reset()
    platform.reset()
    client.variables |= platform.variables()
    yield platform
    platform.reset()


@pytest.fixture
def worker(started: tuple[LocalRunPod, Worker], platform: LocalRunPod) -> Worker:
    return started[1]


@pytest.fixture
def scripted(client: Client) -> Iterator[Scripted]:
    """A scripted server, where the client's jobs go."""
    server = Scripted()
    client.variables |= server.variables()
    yield server
    server.close()


@pytest.fixture
def tempo(monkeypatch: pytest.MonkeyPatch) -> Tempo:
    """Time passes 20 times faster for the client's waiting."""
    tempo = Tempo(20)
    monkeypatch.setattr(jobs, "JobClient", functools.partial(jobs.JobClient, clock=tempo.clock, sleep=tempo.sleep))
    return tempo
