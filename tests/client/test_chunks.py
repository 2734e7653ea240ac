"""Chunks: whole sentences that fit the model, with every word of the document and an id that stays."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY, Hashed

import chunks
from common.text import clean
from embedding import Embedder
from records import Record

SENTENCES = [
    f"Sentence {number} says that naps of {number} minutes helped {number * 3} nurses." for number in range(60)
]
LONG = Record(id="long", title="Naps and alertness", text=" ".join(SENTENCES), authors=["Roe, J."], year=2019)


def test_a_short_document_is_one_chunk_with_its_title_in_front() -> None:
    record = Record(id="a", title="Naps", text="Naps  help.\nThey do.")
    [only] = chunks.chunk(record, Hashed())
    assert (only.text, only.embedded, only.document_id, only.position) == (
        "Naps help. They do.",
        "Naps\nNaps help. They do.",
        "a",
        0,
    )


def test_a_long_document_is_cut_between_sentences(embedder: Embedder) -> None:
    found = chunks.chunk(LONG, embedder)
    assert len(found) > 3
    assert [c.position for c in found] == list(range(len(found)))
    assert " ".join(c.text for c in found) == LONG.text
    assert all(c.text.startswith("Sentence ") and c.text.endswith("nurses.") for c in found)
    # Each is as full as it can be: the next sentence would not have fitted.
    for here, after in itertools.pairwise(found):
        next_sentence = after.text.split(". ")[0]
        assert embedder.count(f"{here.embedded} {next_sentence}.") > embedder.limit - 5


TEXT = st.lists(
    st.one_of(
        st.sampled_from(SENTENCES),
        st.sampled_from(
            ["\n\n", "et al.", "p < .05.", "한국-" * 150, "漢" * 300, "x" * 900, "\x1b[31m", "e.g. 0.5 mg"]
        ),
        st.text(max_size=40),
    ),
    min_size=1,
    max_size=40,
).map(" ".join)
TITLE = st.one_of(
    st.text(min_size=1, max_size=60), st.just("A very long title about naps " * 60), st.just("한국-" * 200)
)


@PROPERTY
@given(TITLE, TEXT)
def test_every_word_is_in_the_chunks_and_every_chunk_fits_the_model(embedder: Embedder, title: str, text: str) -> None:
    # What no file can hold, and what holds nothing, is refused before.
    title, text = (value.encode("utf-8", "replace").decode() for value in (title, text))
    if not clean(title).strip() or not clean(text).strip():
        return
    found = chunks.chunk(Record(id="a", title=title, text=text), embedder)
    assert "".join("".join(c.text for c in found).split()) == "".join(clean(text).split())
    assert max(embedder.count(c.embedded) for c in found) <= embedder.limit
    assert all(c.text.strip() for c in found)
    assert len({c.id for c in found}) == len(found)


def test_a_very_long_title_leaves_room_for_the_text(embedder: Embedder) -> None:
    record = dataclasses.replace(LONG, title="The influence of naps on alertness in shift workers, " * 50)
    found = chunks.chunk(record, embedder)
    assert " ".join(c.text for c in found) == LONG.text
    for c in found:
        title = c.embedded.split("\n")[0]
        assert embedder.count(title) <= embedder.limit * chunks.TITLE_SHARE
        assert record.title.startswith(title)


def test_ids_are_the_same_each_time_and_differ_between_documents() -> None:
    first, again = (chunks.chunk(LONG, Hashed()) for _ in range(2))
    assert first == again
    other = chunks.chunk(dataclasses.replace(LONG, id="other"), Hashed())
    assert not {c.id for c in first} & {c.id for c in other}
    assert all(len(c.id) == 24 and int(c.id, 16) >= 0 for c in first)


@pytest.mark.parametrize(
    "change",
    [{"title": "Other"}, {"year": 2020}, {"authors": []}, {"integrity_status": "retracted"}, {"doi": "10.1000/x"}],
)
def test_a_change_of_metadata_changes_every_id(change: dict[str, object]) -> None:
    before = {c.id for c in chunks.chunk(LONG, Hashed())}
    after = {c.id for c in chunks.chunk(dataclasses.replace(LONG, **change), Hashed())}  # type: ignore[arg-type]
    assert not before & after


def test_a_change_of_the_text_keeps_the_chunks_before_it() -> None:
    before = [c.id for c in chunks.chunk(LONG, Hashed())]
    text = LONG.text.replace(SENTENCES[-1], "It ends otherwise.")
    after = [c.id for c in chunks.chunk(dataclasses.replace(LONG, text=text), Hashed())]
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_another_chunker_version_changes_every_id(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {c.id for c in chunks.chunk(LONG, Hashed())}
    monkeypatch.setattr(chunks, "CHUNKER", chunks.CHUNKER + 1)
    assert not before & {c.id for c in chunks.chunk(LONG, Hashed())}
