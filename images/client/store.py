"""The store: one folder per domain under VECTOR_STORE_PATH.

    <domain>/records.jsonl   the records as they were read: the truth, replaced in one step
    <domain>/state.json      what has been indexed; absent or different means that the index is behind
    <domain>/chroma/         the index: a cache that can be rebuilt from the records at any time
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import chunks
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
_INCLUDE = ["documents", "metadatas", "distances"]


@dataclass(frozen=True)
class Hit:
    """A retrieved chunk. `similarity` is the cosine to the question."""

    chunk_id: str
    text: str
    metadata: dict[str, Any]
    similarity: float


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
        """Does the index hold these records, as chunks of this chunker, as vectors of this model?"""
        wanted = {"corpus_sha256": corpus_hash, "embedding_model": model, "chunker": chunks.CHUNKER}
        return self.state().get("index") == wanted and self.index_folder.is_dir()

    def update_index(self, embedder: Embedder) -> dict[str, int]:
        """Bring the index in line with the records: write new chunks, delete gone ones, leave the rest alone.

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
        index = {"corpus_sha256": self.corpus_hash(), "embedding_model": embedder.name, "chunker": chunks.CHUNKER}
        self._write_state({**self.state(), "index": index})
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
    def _readable(self) -> Iterator[None]:
        """Around what fails when the index's files are damaged; the engine raises many kinds."""
        try:
            yield
        except Exception as error:
            raise Problem(
                f"the index of domain {self.name} cannot be read: {' '.join(str(error).split())[:200]}. It is rebuilt from"
                f" the records: rm -r {self.index_folder} and run the same command again"
            ) from error

    def query(self, vector: Vectors, n_results: int) -> list[Hit]:
        """The nearest chunks to one vector, most similar first, ties by chunk id.

        Goes to Chroma's engine directly: importing the chromadb package costs half a second that every question would
        pay, its engine 20 ms. The lock file pins both to one version, and tests/client compares the two.
        """
        chroma, collection = self._engine()
        with self._readable():
            found = chroma.query(
                str(collection.id), None, [vector.tolist()], n_results + TIES, None, None, _INCLUDE, *_TENANT
            )
        hits = [
            Hit(chunk_id, text, json.loads(metadata["record"]), round(1 - distance, 6))
            for chunk_id, text, metadata, distance in zip(
                found.ids[0], found.documents[0], found.metadatas[0], found.distances[0], strict=True
            )
        ]
        return sorted(hits, key=lambda hit: (-hit.similarity, hit.chunk_id))[:n_results]

    def probe(self) -> int:
        """Open the index, let it answer something, and count its chunks. Raises Problem where it cannot be read."""
        chroma, collection = self._engine()
        with self._readable():
            count = int(chroma.count(str(collection.id), *_TENANT))
            if count:
                chroma.query(
                    str(collection.id), None, [[1.0] * collection.dimension], 1, None, None, _INCLUDE, *_TENANT
                )
        return count

    def _engine(self) -> tuple[Any, Any]:
        """Chroma's engine over the index, and the collection of the chunks; nothing is made that is not there."""
        import chromadb_rust_bindings as engine

        database = engine.SqliteDBConfig(
            url=str(self.index_folder / "chroma.sqlite3"),
            hash_type=engine.MigrationHash.MD5,
            migration_mode=engine.MigrationMode.Validate,
        )
        with self._readable():
            chroma = engine.Bindings(
                allow_reset=False, sqlite_db_config=database, persist_path=str(self.index_folder), hnsw_cache_size=16
            )
            return chroma, chroma.get_collection(COLLECTION, *_TENANT)
