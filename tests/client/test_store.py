"""The store: records are the truth, the index follows them, through kills, damage and other processes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from tests.client.killed import RECORDS, STEPS
from tests.client.support import NAPS, SLEEP, TREE, Client, Hashed, as_lines, load, sources, tree_of

import chunks
import ingest
import store
from common.problems import BAD_INPUT, OK, TRY_LATER, Problem
from embedding import Embedder
from records import Record
from store import Domain

ASK = {"Q": NAPS, "DOMAIN": "sleep"}
WORDS = "nap sleep dream rest wake tired coffee light clock night shift alert groggy memory mood pulse".split()


def documents(number: int) -> list[Record]:
    """Documents with words in common, so that some are nearer than others."""
    return [
        Record(
            id=f"d{i}",
            title=f"About {WORDS[i % 16]}",
            text=f"{WORDS[i % 16]} {WORDS[i // 16 % 16]} {WORDS[i // 256 % 16]} number{i}",
        )
        for i in range(number)
    ]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A store of this test's own."""
    monkeypatch.setenv("VECTOR_STORE_PATH", str(tmp_path / "own"))
    monkeypatch.setenv("CORPUS_DIR", str(tmp_path / "none"))
    return tmp_path / "own"


def index_of(domain: Domain) -> dict[str, Any]:
    """All that the index holds, read with chromadb's public interface."""
    with chromadb.PersistentClient(str(domain.index_folder), chromadb.Settings(anonymized_telemetry=False)) as client:
        held = client.get_collection(store.COLLECTION, embedding_function=None).get(
            include=["embeddings", "documents", "metadatas"]
        )
    rows = zip(held["ids"], held["embeddings"], held["documents"], held["metadatas"], strict=True)
    return {chunk_id: (vector.tolist(), text, metadata) for chunk_id, vector, text, metadata in rows}


def fresh(records: list[Record], embedder: Embedder, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """What the index of these records holds when nothing ever went wrong."""
    with monkeypatch.context() as patch:
        patch.setenv("VECTOR_STORE_PATH", str(folder))
        domain = Domain("fresh")
        ingest.load(domain, records, embedder)
        return index_of(domain)


# --- ingesting -------------------------------------------------------------------------------------------------------


def test_ingesting_again_embeds_nothing_and_touches_no_file(client: Client) -> None:
    before = client.written()
    times = {path: path.stat().st_mtime_ns for path in client.store.rglob("*") if path.name != ".lock"}
    outcome = client.ingest("sleep", *SLEEP)
    assert (outcome.code, outcome.out) == (OK, "")
    assert outcome.err == "sleep: 0 added, 0 changed, 3 unchanged; index is current\n"
    assert client.written() == before
    assert {path: path.stat().st_mtime_ns for path in client.store.rglob("*") if path.name != ".lock"} == times


def test_a_changed_text_replaces_the_old(client: Client) -> None:
    outcome = client.ingest("sleep", {**SLEEP[0], "text": "Violins are played with a bow."})
    assert outcome.err == "sleep: 0 added, 1 changed, 0 unchanged; 3 chunks, 1 embedded, 1 deleted\n"
    shown = client.run("retrieve", Q="How are violins played?", DOMAIN="sleep").out
    assert "Violins are played with a bow." in sources(shown)[0]
    assert "Twenty minutes were enough" not in client.run("retrieve", **ASK).out
    assert len((client.store / "sleep" / "records.jsonl").read_text().splitlines()) == 3


def test_metadata_that_is_removed_or_changed_is_gone() -> None:
    domain, embedder = Domain("d"), Hashed()
    [record, *_] = RECORDS
    ingest.load(domain, [dataclasses.replace(record, doi="10.1000/x", year=2019)], embedder)
    ingest.load(domain, [dataclasses.replace(record, year=2020)], embedder)
    [hit] = domain.query(embedder.encode(["naps"])[0], 5)
    assert (hit.metadata["doi"], hit.metadata["year"]) == (None, 2020)


def test_a_second_file_is_merged_into_the_first() -> None:
    domain, embedder = Domain("d"), Hashed()
    changed = dataclasses.replace(RECORDS[1], text="Other words.")
    assert ingest.load(domain, RECORDS[:6], embedder).startswith(
        "d: 6 added, 0 changed, 0 unchanged; 6 chunks, 6 embedded"
    )
    outcome = ingest.load(domain, [RECORDS[0], changed, *RECORDS[6:]], embedder)
    assert outcome == "d: 6 added, 1 changed, 1 unchanged; 12 chunks, 7 embedded, 1 deleted"
    assert list(domain.records().values()) == [RECORDS[0], changed, *RECORDS[2:]]


def test_the_corpus_hash_depends_on_the_records_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    domain = Domain("d")
    ingest.load(domain, RECORDS, Hashed())
    first = domain.corpus_hash()
    ingest.load(domain, RECORDS[3:5], Hashed())
    assert domain.corpus_hash() == first
    monkeypatch.setenv("VECTOR_STORE_PATH", str(tmp_path / "elsewhere"))
    other = Domain("other")
    for part in (RECORDS[:5], RECORDS[5:]):
        ingest.load(other, part, Hashed("another model"))
    assert other.corpus_hash() == first
    ingest.load(other, [dataclasses.replace(RECORDS[0], year=1999)], Hashed("another model"))
    assert other.corpus_hash() != first


@pytest.mark.parametrize("what", ["model", "chunker"])
def test_another_model_or_chunker_rebuilds_the_index(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    domain, first = Domain("d"), Hashed()
    ingest.load(domain, RECORDS, first)
    before = index_of(domain)
    second = Hashed("another") if what == "model" else first
    if what == "chunker":
        monkeypatch.setattr(chunks, "CHUNKER", chunks.CHUNKER + 1)
    assert not domain.is_current(second.name, domain.corpus_hash())
    assert "12 unchanged; 12 chunks, 12 embedded" in ingest.load(domain, RECORDS, second)
    assert domain.is_current(second.name, domain.corpus_hash())
    after = index_of(domain)
    assert after == fresh(RECORDS, second, monkeypatch, tmp_path / "fresh")
    assert after != before


def test_more_rows_than_chroma_takes_at_once_are_all_found() -> None:
    domain, embedder = Domain("d"), Hashed()
    records = documents(5600)
    assert "5600 chunks, 5600 embedded, 0 deleted" in ingest.load(domain, records, embedder)
    for record in records[::700]:
        [text] = chunks.chunk(record, embedder)
        assert record.id in [hit.metadata["id"] for hit in domain.query(embedder.encode([text.embedded])[0], 10)]


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def killed(*arguments: str) -> None:
    """Ingest the records in a process that is killed on the way."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.client.killed", *arguments], cwd=TREE, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == -9, process.stderr


def test_the_steps_of_an_ingest_are_known() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.client.killed", "0"], cwd=TREE, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == STEPS


# 1: before the records, 2: between records and index, 4: state withdrawn, 6: before the first rows, 7: after them,
# 10: before the third, 13: all rows, no words, 14 and 17: some of the words, 19: all, no state, 20: all done. With
# milliseconds: in the middle of writing rows.
@pytest.mark.parametrize(
    ("known", "point"),
    [
        *(
            (False, point)
            for point in ("1", "2", "4", "6", "7", "10", "13", "14", "17", "19", "20", "6 1", "8 3", "10 7", "6 25")
        ),
        *((True, point) for point in ("2", "7", "13", "6 1")),
    ],
)
def test_an_ingest_that_was_killed_ends_as_if_it_had_not_been(
    point: str, known: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    domain, embedder = Domain("d"), Hashed()
    if known:  # half of what comes is there in another version
        ingest.load(domain, [dataclasses.replace(record, text=f"Old {record.id}.") for record in RECORDS[:6]], embedder)
    killed(*point.split())
    with domain.writing():  # no lock is left behind
        pass
    ingest.load(domain, RECORDS, embedder)
    assert domain.is_current(embedder.name, domain.corpus_hash())
    assert index_of(domain) == fresh(RECORDS, embedder, monkeypatch, tmp_path / "fresh")
    words = {path.name: path.read_bytes() for path in domain.lexical_folder.iterdir()}
    assert words == {path.name: path.read_bytes() for path in (tmp_path / "fresh" / "fresh" / "lexical").iterdir()}
    for record in RECORDS:
        [found, *_] = domain.query(embedder.encode([chunks.chunk(record, embedder)[0].embedded])[0], 1)
        assert (found.metadata["id"], found.similarity) == (record.id, 1)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [None, "", "{", "[]", '{"index": null}', '{"index": {"corpus_sha256": "x"}}', "\udcff"]
)
def test_a_state_that_is_missing_or_wrong_is_healed(client: Client, state: str | None) -> None:
    expected = client.run("retrieve", **ASK).out
    path = client.store / "sleep" / "state.json"
    good = load(path)
    path.unlink()
    if state is not None:
        path.write_bytes(state.encode("utf-8", "surrogateescape"))
    outcome = client.run("retrieve", **ASK)
    assert (outcome.code, outcome.out) == (OK, expected)
    assert outcome.err.startswith("the index of sleep was behind: 3 chunks, ")
    assert load(path) == good
    assert client.run("retrieve", **ASK).err == ""


@pytest.mark.parametrize("program", ["retrieve", "ingest"])
def test_a_deleted_index_is_built_again_from_the_records(client: Client, program: str) -> None:
    import shutil

    expected = client.run("retrieve", **ASK).out
    shutil.rmtree(client.store / "sleep" / "chroma")
    (client.root / "records.jsonl").write_bytes(as_lines(*SLEEP))
    outcome = client.run(program, **ASK, FROM="records.jsonl")
    assert outcome.code == OK
    assert "3 chunks, 3 embedded, 0 deleted" in outcome.err
    assert client.run("retrieve", **ASK).out == expected


@pytest.mark.parametrize("damage", ["garbage", "empty file", "no files"])
@pytest.mark.parametrize("program", ["retrieve", "ingest"])
def test_a_damaged_index_is_named_with_the_way_to_heal_it(client: Client, program: str, damage: str) -> None:
    expected = client.run("retrieve", **ASK).out
    database = client.store / "sleep" / "chroma" / "chroma.sqlite3"
    if damage == "no files":
        database.unlink()
    else:
        database.write_bytes(b"" if damage == "empty file" else b"garbage" * 10_000)
    (client.root / "records.jsonl").write_bytes(as_lines(*SLEEP, {**SLEEP[0], "id": "new", "title": "New"}))
    # Each in a process of its own, as people do: within one, Chroma remembers a database that it could not open.
    outcome = client.finish(client.start(program, **ASK, FROM="records.jsonl"))
    if program == "ingest" and damage != "garbage":  # Chroma makes a new database, and all is embedded again
        assert "1 added, 0 changed, 3 unchanged; 4 chunks, 4 embedded" in outcome.err
        return
    assert outcome.code == BAD_INPUT
    assert "the index of domain sleep cannot be read: " in outcome.err
    assert "rm -r store/sleep/chroma and run the same command again" in outcome.err
    subprocess.run(["rm", "-r", "store/sleep/chroma"], cwd=client.root, check=True)
    outcome = client.finish(client.start(program, **ASK, FROM="records.jsonl"))
    assert outcome.code == OK
    assert (program == "ingest") or outcome.out == expected


def test_records_changed_by_hand_are_indexed_at_the_next_question(client: Client) -> None:
    path = client.store / "sleep" / "records.jsonl"
    kept = path.read_text().splitlines()[1:]
    added = json.dumps({"id": "new", "title": "Violins", "text": "Violins are played with a bow."})
    path.write_text("\n".join([*kept, added]) + "\n")
    outcome = client.run("retrieve", Q="How are violins played?", DOMAIN="sleep")
    assert outcome.err == "the index of sleep was behind: 3 chunks, 1 embedded, 1 deleted\n"
    assert "Violins (n.d.)" in outcome.out
    assert ": Violins are played with a bow." in outcome.out


def test_records_broken_by_hand_are_named_with_file_and_line(client: Client) -> None:
    with (client.store / "sleep" / "records.jsonl").open("a") as file:
        file.write("{broken\n")
    outcome = client.run("retrieve", **ASK)
    assert outcome.code == BAD_INPUT
    assert "store/sleep/records.jsonl:4: not JSON" in outcome.err


# --- other processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["writing", "reading"])
@pytest.mark.parametrize("second", ["writing", "reading"])
def test_one_writer_or_many_readers(first: str, second: str) -> None:
    holder, other = Domain("d"), Domain("d")
    with getattr(holder, first)():
        if first == second == "reading":
            with other.reading(), Domain("d").reading():
                return
        began = time.monotonic()
        with pytest.raises(Problem) as caught, getattr(other, second)():
            pass
        assert caught.value.code == TRY_LATER
        assert 1 < time.monotonic() - began < 2
        # A writer is named; readers are many.
        assert (f"(pid {os.getpid()})" in str(caught.value)) is (first == "writing")
    with getattr(other, second)():
        pass


def test_who_waits_goes_on_as_soon_as_the_domain_is_free() -> None:
    domain = Domain("d")
    release = threading.Event()
    holding = threading.Event()

    def hold() -> None:
        with Domain("d").writing():
            holding.set()
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait(10)
    threading.Timer(0.3, release.set).start()
    began = time.monotonic()
    with domain.writing():
        assert 0.2 < time.monotonic() - began < 1
    holder.join()


def test_a_second_ingest_ends_with_75_and_names_the_first(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VECTOR_STORE_PATH", str(client.store))
    (client.root / "records.jsonl").write_bytes(as_lines({**SLEEP[0], "id": "new"}))
    with Domain("sleep").writing():
        before = client.written()
        for program in ("ingest", "retrieve"):
            outcome = client.finish(client.start(program, **ASK, FROM="records.jsonl"))
            assert outcome.code == TRY_LATER
            says = f"error: domain sleep is in use by another process (pid {os.getpid()}); try again when it is done\n"
            assert outcome.err == says
        assert client.written() == before


def test_readers_in_processes_of_their_own_see_the_same(client: Client) -> None:
    expected = client.run("retrieve", **ASK)
    assert [client.finish(process) for process in [client.start("retrieve", **ASK) for _ in range(4)]] == [expected] * 4


# --- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_results", [1, 5, 40, 100])
def test_the_engine_answers_as_chromadb_does(embedder: Embedder, n_results: int) -> None:
    domain = Domain("d")
    texts = [
        f"{a.capitalize()} and {b} were measured in {i} people."
        for i, (a, b) in enumerate(zip(WORDS * 4, WORDS[3:] * 5, strict=False))
    ]
    ingest.load(domain, [Record(id=f"r{i}", title=f"Study {i}", text=text) for i, text in enumerate(texts)], embedder)
    vector = embedder.encode([NAPS])[0]
    hits = domain.query(vector, n_results)
    with chromadb.PersistentClient(str(domain.index_folder), chromadb.Settings(anonymized_telemetry=False)) as client:
        collection = client.get_collection(store.COLLECTION, embedding_function=None)
        found = collection.query(query_embeddings=[vector], n_results=n_results)
        # Chroma warns whenever a collection that brings its own vectors shows its configuration.
        with pytest.warns(DeprecationWarning, match="legacy embedding function config"):
            assert collection.configuration["hnsw"]["space"] == "cosine"
    assert len(hits) == min(n_results, len(texts))
    assert [hit.chunk_id for hit in hits] == found["ids"][0]
    assert [hit.text for hit in hits] == found["documents"][0]
    assert [1 - hit.similarity for hit in hits] == pytest.approx(found["distances"][0], abs=1e-6)
    for hit in hits:
        own = embedder.encode([f"{hit.metadata['title']}\n{hit.text}"])[0]
        assert hit.similarity == pytest.approx(float(own @ vector), abs=1e-5)


def test_similarity_is_the_cosine_whatever_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    class Long(Hashed):
        def encode(self, texts: Any) -> Any:
            return super().encode(texts) * 7

    domain = Domain("d")
    ingest.load(domain, RECORDS, Long())
    vector = Hashed().encode(["Title 3 about naps"])[0]
    vectors = np.array([held[0] for held in index_of(domain).values()])
    expected = max(vectors @ vector / np.linalg.norm(vectors, axis=1))
    assert math.isclose(domain.query(vector, 3)[0].similarity, expected, abs_tol=1e-6)


def test_equally_near_chunks_come_in_the_order_of_their_ids() -> None:
    domain, embedder = Domain("d"), Hashed()
    ingest.load(domain, [Record(id=f"r{i}", title="Naps", text="Naps help.") for i in range(24)], embedder)
    ids = sorted(index_of(domain))
    for n_results in (4, 10, 24, 100):
        assert [hit.chunk_id for hit in domain.query(embedder.encode(["naps"])[0], n_results)] == ids[:n_results]


def test_retrieve_prints_the_sources_best_first(client: Client) -> None:
    client.configure(n_results=200)
    outcome = client.run("retrieve", **ASK)
    lines = sources(outcome.out)
    assert (outcome.code, outcome.err, len(lines)) == (OK, "", 3)
    assert [line.split()[0] for line in lines] == ["S1", "S2", "S3"]
    scores = [float(line.split()[1]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert any(
        "Roe and Poe (2019)" in line and ": Short naps improve alertness in shift workers." in line for line in lines
    )


def test_what_is_below_min_similarity_is_left_out(client: Client) -> None:
    scores = [float(line.split()[1]) for line in sources(client.run("retrieve", **ASK).out)]
    client.configure(min_similarity=(scores[0] + scores[1]) / 2, lexical=False)
    outcome = client.run("retrieve", **ASK)
    assert len(sources(outcome.out)) == 1
    assert "left out, below_floor: 2" in outcome.out
    client.configure(n_results=2)
    outcome = client.run("retrieve", **ASK)
    assert len(sources(outcome.out)) == 2
    assert "left out, n_results: 1" in outcome.out


# --- the shipped corpus ----------------------------------------------------------------------------------------------


def test_a_shipped_corpus_is_loaded_once_and_again_when_it_changes(client: Client) -> None:
    ask = {"Q": NAPS, "DOMAIN": "dreams"}
    shipped = client.corpus / "dreams.jsonl"
    shipped.write_bytes(as_lines(*SLEEP[:2]))
    outcome = client.run("retrieve", **ask)
    assert outcome.err == (
        "loaded the shipped corpus: dreams: 2 added, 0 changed, 0 unchanged; 2 chunks, 2 embedded, 0 deleted\n"
    )
    assert len(sources(outcome.out)) == 2
    again = client.run("retrieve", **ask)
    assert (again.err, again.out) == ("", outcome.out)
    # A person's own record in the same domain does not load it again, and survives its next version.
    own = {**SLEEP[0], "id": "own", "title": "My own nap"}
    assert client.ingest("dreams", own).err.startswith("dreams: 1 added, 0 changed, 0 unchanged; 3 chunks, 1 embedded")
    assert client.run("retrieve", **ask).err == ""
    shipped.write_bytes(as_lines({**SLEEP[0], "year": 2018}, *SLEEP[1:]))
    outcome = client.run("retrieve", **ask)
    assert (
        "loaded the shipped corpus: dreams: 1 added, 1 changed, 1 unchanged; 4 chunks, 2 embedded, 1 deleted"
        in outcome.err
    )
    held = [json.loads(line)["id"] for line in (client.store / "dreams" / "records.jsonl").read_text().splitlines()]
    assert sorted(held) == sorted([*(str(record["id"]) for record in SLEEP), "own"])
    assert client.run("retrieve", **ask).err == ""


def test_a_persons_own_records_may_come_before_the_shipped_corpus(client: Client) -> None:
    (client.corpus / "dreams.jsonl").write_bytes(as_lines(*SLEEP[:2]))
    own = {**SLEEP[0], "id": "own"}
    assert client.ingest("dreams", own).code == OK
    outcome = client.run("retrieve", Q=NAPS, DOMAIN="dreams")
    assert "loaded the shipped corpus: dreams: 2 added" in outcome.err
    assert len(sources(outcome.out)) == 3


def test_a_new_shipped_version_leaves_what_the_person_changed_and_removes_what_is_gone(client: Client) -> None:
    ask = {"Q": NAPS, "DOMAIN": "dreams"}
    first, second, third = SLEEP[:3]
    shipped = client.corpus / "dreams.jsonl"
    shipped.write_bytes(as_lines(first, second, third))
    assert client.run("retrieve", **ask).code == OK
    assert client.ingest("dreams", {**first, "title": "Corrected by hand"}).code == OK
    shipped.write_bytes(as_lines({**first, "year": 1999}, {**second, "year": 1999}))
    outcome = client.run("retrieve", **ask)
    assert "dreams: 0 added, 1 changed, 0 unchanged, 1 removed, 1 kept as you changed them" in outcome.err
    lines = (client.store / "dreams" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    held = {record["id"]: record for record in map(json.loads, lines)}
    assert held.keys() == {first["id"], second["id"]}
    assert held[first["id"]]["title"] == "Corrected by hand"
    assert held[second["id"]]["year"] == 1999
    assert client.run("retrieve", **ask).err == ""


def test_a_shipped_corpus_is_not_changed_by_its_use(client: Client) -> None:
    (client.corpus / "dreams.jsonl").write_bytes(as_lines(*SLEEP))
    before = tree_of(client.corpus)
    client.run("retrieve", Q=NAPS, DOMAIN="dreams")
    client.ingest("dreams", {**SLEEP[0], "id": "own"})
    assert tree_of(client.corpus) == before


def test_first_questions_at_the_same_time_leave_a_whole_store(client: Client) -> None:
    (client.corpus / "dreams.jsonl").write_bytes(as_lines(*SLEEP))
    ask = {"Q": NAPS, "DOMAIN": "dreams"}
    codes = [client.finish(process).code for process in [client.start("retrieve", **ask) for _ in range(3)]]
    assert OK in codes
    assert set(codes) <= {OK, TRY_LATER}
    outcome = client.run("retrieve", **ask)
    assert (outcome.err, len(sources(outcome.out))) == ("", 3)
