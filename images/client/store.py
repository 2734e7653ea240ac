"""The store: one folder per domain under VECTOR_STORE_PATH.

    <domain>/records.jsonl   the records as they were read: the truth, replaced in one step
    <domain>/state.json      what has been indexed; absent or different means that the index is behind
    <domain>/chroma/         the index of vectors: a cache that can be rebuilt from the records at any time
    <domain>/lexical/        the index of words, likewise
    <domain>/.lock           one writer or many readers; a second writer is told who holds it

Chroma corrupts silently when two processes write to one folder, and re-upserting an id that is there degrades recall:
so every access holds the lock, chunk ids are hashes of their content, and only new ids are ever written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import chunks
import lexical
import records
from common.files import to_json, to_json_lines, write_atomic
from common.problems import TRY_LATER, Problem
from embedding import Embedder, Vectors
from records import Record

COLLECTION = "chunks"
LOCK_WAIT = 1.5  # seconds; a reader holds the lock for less than one
# Chroma takes at most 5461 rows in one call; smaller batches keep memory flat and lose less to an interruption.
BATCH = 512
# Chroma orders equally near chunks by chance: this many more are looked at, so that the last place is not left to it.
TIES = 20
_CORPUS = "corpus"
_TENANT = ("default_tenant", "default_database")
_STORED = ["documents", "metadatas", "embeddings"]


@dataclass(frozen=True)
class Hit:
    """A retrieved chunk. `similarity` is the cosine to the question."""

    chunk_id: str
    text: str
    metadata: dict[str, Any]
    similarity: float


@dataclass(frozen=True)
class Stored:
    """What the index holds of a chunk. `vector` has length 1."""

    text: str
    metadata: dict[str, Any]
    vector: Vectors


def root() -> Path:
    """The folder of all domains."""
    return Path(os.environ.get("VECTOR_STORE_PATH") or "store")


def shipped(domain: str) -> Path | None:
    """The file of the corpus that comes with the project for this domain, if there is one."""
    path = Path(os.environ.get("CORPUS_DIR") or _CORPUS) / f"{domain}.jsonl"
    return path if path.is_file() else None


def domains() -> list[str]:
    """Every domain that can be asked: ingested or shipped."""
    ingested = {path.parent.name for path in root().glob("*/records.jsonl")}
    return sorted(ingested | {path.stem for path in Path(os.environ.get("CORPUS_DIR") or _CORPUS).glob("*.jsonl")})


class Domain:
    """One domain's folder. Use `writing` or `reading` around every access to the index."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = root() / name
        self.records_file = self.folder / "records.jsonl"
        self.state_file = self.folder / "state.json"
        self.index_folder = self.folder / "chroma"
        self.lexical_folder = self.folder / "lexical"

    # --- locks -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Alone with the domain. Raises Problem (exit 75) while another process writes or reads."""
        with self._locked(fcntl.LOCK_EX) as file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)  # who waits for readers later must not be told this process

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """With other readers, without writers. Raises Problem (exit 75) while another process writes."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[Any]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".lock").open("a+")
        except OSError as error:
            raise Problem(
                f"{self.folder} cannot be used: {error.strerror}; set VECTOR_STORE_PATH to a folder you own"
            ) from error
        with file:
            deadline = time.monotonic() + LOCK_WAIT
            while True:
                try:
                    fcntl.flock(file, kind | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        file.seek(0)
                        holder = file.read().strip()
                        raise Problem(
                            f"domain {self.name} is in use by another process{f' (pid {holder})' if holder else ''};"
                            " try again when it is done",
                            TRY_LATER,
                        ) from None
                    time.sleep(0.05)
            yield file

    # --- records -----------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Has anything been ingested?"""
        return self.records_file.is_file()

    def records(self) -> dict[str, Record]:
        """The records by id, in the order they came."""
        return {record.id: record for record in records.read(self.records_file)} if self.exists() else {}

    def merge(self, new: Sequence[Record], gone: Sequence[str] = ()) -> dict[str, int]:
        """Add the records or replace those with the same id, and remove the ids that are gone.

        Returns the counts added, changed, unchanged, and removed if there are any.
        """
        held = self.records()
        counts = {"added": 0, "changed": 0, "unchanged": 0}
        for document_id in gone:
            del held[document_id]
            counts["removed"] = len(gone)
        for record in new:
            before = held.get(record.id)
            counts["unchanged" if before == record else "changed" if before else "added"] += 1
            held[record.id] = record
        if counts["added"] or counts["changed"] or gone:
            write_atomic(self.records_file, to_json_lines([asdict(record) for record in held.values()]))
        return counts

    def corpus_hash(self) -> str:
        """sha256 of the records file."""
        with self.records_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # --- index -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What state.json says; empty where there is none or it cannot be read."""
        try:
            state = json.loads(self.state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def is_current(self, model: str, corpus_hash: str) -> bool:
        """Do the indexes hold these records, as chunks of this chunker, as vectors of this model?"""
        there = self.index_folder.is_dir() and self.lexical_folder.is_dir()
        return there and self.state().get("index") == index_state(model, corpus_hash)

    def update_index(self, embedder: Embedder) -> dict[str, int]:
        """Bring the indexes in line with the records: write new chunks, delete gone ones, leave the rest alone; the
        index of words is written anew, which takes a small part of the time.

        Safe to interrupt: the state is withdrawn first and set last, and what was written is found again by its id.
        Returns the counts chunks, embedded, deleted.
        """
        state = self.state()
        if state.get("embedding_model") != embedder.name:
            # Vectors of two models must never meet.
            shutil.rmtree(self.index_folder, ignore_errors=True)
        self._write_state({**state, "index": None, "embedding_model": embedder.name})
        wanted = {c.id: c for record in self.records().values() for c in chunks.chunk(record, embedder)}
        with self._collection() as collection:
            held = set(collection.get(include=[])["ids"])
            gone = sorted(held - wanted.keys())
            for start in range(0, len(gone), BATCH):
                collection.delete(ids=gone[start : start + BATCH])
            new = [c for c in wanted.values() if c.id not in held]
            for start in range(0, len(new), BATCH):
                batch = new[start : start + BATCH]
                collection.add(
                    ids=[c.id for c in batch],
                    embeddings=embedder.encode([c.embedded for c in batch]),
                    documents=[c.text for c in batch],
                    metadatas=[
                        {"document_id": c.document_id, "position": c.position, "record": c.record} for c in batch
                    ],
                )
        shutil.rmtree(self.lexical_folder, ignore_errors=True)
        lexical.write(self.lexical_folder, {c.id: c.embedded for c in wanted.values()})
        self._write_state({**self.state(), "index": index_state(embedder.name, self.corpus_hash())})
        return {"chunks": len(wanted), "embedded": len(new), "deleted": len(gone)}

    def note_shipped(self, digest: str, prints: dict[str, str]) -> None:
        """Remember which version of the shipped corpus has been loaded, and the fingerprint of each of its records."""
        self._write_state({**self.state(), "shipped_sha256": digest, "shipped": prints})

    def _write_state(self, state: dict[str, Any]) -> None:
        write_atomic(self.state_file, to_json(state))

    @contextlib.contextmanager
    def _collection(self) -> Iterator[Any]:
        import chromadb

        with self._readable():
            client = chromadb.PersistentClient(
                path=str(self.index_folder), settings=chromadb.Settings(anonymized_telemetry=False)
            )
        with client:
            with self._readable():
                collection = client.get_or_create_collection(
                    COLLECTION, embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
                )
            yield collection

    @contextlib.contextmanager
    def _readable(self, folder: Path | None = None) -> Iterator[None]:
        """Around what fails when an index's files are damaged; the engines raise many kinds."""
        try:
            yield
        except Exception as error:
            raise Problem(
                f"the index of domain {self.name} cannot be read: {' '.join(str(error).split())[:200]}. It is rebuilt from"
                f" the records: rm -r {folder or self.index_folder} and run the same command again"
            ) from error

    def query(self, vector: Vectors, n_results: int) -> list[Hit]:
        """The nearest chunks to one vector, most similar first, ties by chunk id."""
        index = self.vectors()
        [nearest] = index.nearest(vector[None], n_results)
        stored = index.fetch([chunk_id for chunk_id, _ in nearest])
        return [Hit(i, stored[i].text, stored[i].metadata, similarity) for i, similarity in nearest]

    def probe(self) -> int:
        """Open the indexes, let them answer something, and count the chunks. Raises Problem where one cannot be read."""
        self.words()
        index = self.vectors()
        count = index.count()
        if count:
            index.nearest(np.ones((1, index.dimension), dtype=np.float32), 1)
        return count

    def vectors(self) -> VectorIndex:
        """The index of vectors, opened."""
        return VectorIndex(self.index_folder, self._readable)

    def words(self) -> lexical.Index:
        """The index of words, opened."""
        with self._readable(self.lexical_folder):
            return lexical.Index(self.lexical_folder)


class VectorIndex:
    """Chroma's engine over an index that is there; nothing is made that is not.

    Goes to the engine directly: importing the chromadb package costs half a second that every question would pay, its
    engine 20 ms. The lock file pins both to one version, and tests/client compares the two.
    """

    def __init__(self, folder: Path, readable: Callable[[], AbstractContextManager[None]]) -> None:
        import chromadb_rust_bindings as engine

        self._readable = readable
        database = engine.SqliteDBConfig(
            url=str(folder / "chroma.sqlite3"),
            hash_type=engine.MigrationHash.MD5,
            migration_mode=engine.MigrationMode.Validate,
        )
        with readable():
            self._chroma = engine.Bindings(
                allow_reset=False, sqlite_db_config=database, persist_path=str(folder), hnsw_cache_size=16
            )
            collection = self._chroma.get_collection(COLLECTION, *_TENANT)
        self._id = str(collection.id)
        self.dimension = collection.dimension

    def count(self) -> int:
        """How many chunks there are."""
        with self._readable():
            return int(self._chroma.count(self._id, *_TENANT))

    def nearest(self, vectors: Vectors, limit: int) -> list[list[tuple[str, float]]]:
        """For each vector the nearest chunks with their cosines, most similar first, ties by chunk id."""
        with self._readable():
            found = self._chroma.query(
                self._id, None, vectors.tolist(), limit + TIES, None, None, ["distances"], *_TENANT
            )
        ranked = []
        for ids, distances in zip(found.ids, found.distances, strict=True):
            cosines = [(chunk_id, round(1 - distance, 6)) for chunk_id, distance in zip(ids, distances, strict=True)]
            ranked.append(sorted(cosines, key=lambda pair: (-pair[1], pair[0]))[:limit])
        return ranked

    def fetch(self, ids: Sequence[str]) -> dict[str, Stored]:
        """What is held of these chunks."""
        if not ids:
            return {}
        with self._readable():
            found = self._chroma.get(self._id, list(ids), None, None, 0, None, _STORED, *_TENANT)
        rows = zip(found.ids, found.documents, found.metadatas, found.embeddings, strict=True)
        return {
            chunk_id: Stored(text, json.loads(metadata["record"]), _unit(vector))
            for chunk_id, text, metadata, vector in rows
        }


def index_state(model: str, corpus_hash: str) -> dict[str, Any]:
    """What a domain's state says of indexes that are current."""
    return {
        "corpus_sha256": corpus_hash,
        "embedding_model": model,
        "chunker": chunks.CHUNKER,
        "lexical": lexical.VERSION,
    }


def _unit(vector: Sequence[float]) -> Vectors:
    row = np.asarray(vector, dtype=np.float32)
    unit: Vectors = row / np.linalg.norm(row)
    return unit
