"""python -m store_check: what make doctor learns about each domain, and that looking changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import embedding
import ingest
import settings
import store
import store_check

SHIPPED = settings.SHIPPED_MODEL


@pytest.fixture
def domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Domain:
    monkeypatch.setenv("VECTOR_STORE_PATH", str(tmp_path / "store"))
    made = store.Domain("sleep")
    made.folder.mkdir(parents=True)
    made.records_file.write_text('{"id": "a", "title": "Naps", "text": "Short naps improve alertness."}\n')
    return made


@pytest.fixture
def indexed(domain: store.Domain) -> store.Domain:
    with domain.writing():
        ingest.update(domain, embedding.load(SHIPPED))
    return domain


def contents(folder: Path) -> dict[str, bytes]:
    """What is kept of a domain; the index is a cache, and the engine writes into it whenever it opens one."""
    return {str(path): path.read_bytes() for path in sorted(folder.glob("*.json*"))}


def test_an_index_that_opens_is_counted_and_the_truth_is_left_alone(indexed: store.Domain) -> None:
    before = contents(indexed.folder)
    assert len(before) == 2
    assert store_check.check("sleep", SHIPPED) == ("ok", "opens, 1 chunks of the model that is configured", "")
    assert store_check.check("sleep", f"sentence-transformers/{SHIPPED}")[0] == "ok"
    assert contents(indexed.folder) == before


def test_an_index_of_another_model_or_behind_its_records_is_told(indexed: store.Domain) -> None:
    state, found, mend = store_check.check("sleep", "another/model")
    assert (state, mend) == ("note", 'make retrieve Q="…" DOMAIN=sleep')
    assert "another model" in found
    with indexed.records_file.open("a") as file:
        file.write('{"id": "b", "title": "Tea", "text": "Tea keeps awake."}\n')
    assert "behind its records" in store_check.check("sleep", SHIPPED)[1]


def test_a_model_of_the_hub_is_the_same_at_each_commit(indexed: store.Domain) -> None:
    state = indexed.state()
    state["index"]["embedding_model"] = "BAAI/bge@0123456789abcdef"
    indexed._write_state(state)
    assert store_check.check("sleep", "BAAI/bge")[0] == "ok"
    assert store_check.check("sleep", "BAAI/other")[0] == "note"


def test_a_domain_that_was_never_indexed_is_no_problem(domain: store.Domain) -> None:
    assert store_check.check("sleep", SHIPPED)[:2] == (
        "note",
        "is not indexed; its next question builds the index",
    )


def test_a_damaged_index_names_what_mends_it(indexed: store.Domain) -> None:
    (indexed.index_folder / "chroma.sqlite3").write_bytes(b"no database")
    state, _, mend = store_check.check("sleep", SHIPPED)
    assert state == "problem"
    assert mend.startswith(f"rm -r {indexed.index_folder}, then make retrieve")


def test_a_domain_in_use_is_not_checked(indexed: store.Domain) -> None:
    with indexed.writing():
        assert store_check.check("sleep", SHIPPED)[0] == "unknown"


def test_the_records_for_the_doctor(indexed: store.Domain, capsys: pytest.CaptureFixture[str]) -> None:
    (store.root() / "No\tdomain").mkdir()
    (store.root() / "No\tdomain" / "records.jsonl").touch()
    assert store_check.main() == 0
    first, *rest, last = capsys.readouterr().out.splitlines()
    assert first.split("\t") == ["line", "note", "store", "has a folder that is no domain", ""]
    assert rest[0] == "begin\tsleep"
    assert rest[1].split("\t")[:4] == [
        "line",
        "ok",
        "store",
        "domain sleep opens, 1 chunks of the model that is configured",
    ]
    assert last == "end"
