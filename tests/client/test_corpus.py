"""The shipped corpus: whole, ours to give away, and able to answer about the disputes it is there for."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.client.support import TREE

import records
import retrieve
import settings

CORPUS = TREE / "corpus" / "psychology.jsonl"


@pytest.fixture(scope="module")
def corpus() -> list[records.Record]:
    return records.read(CORPUS)


def test_it_is_large_enough_and_every_record_is_well_formed(corpus: list[records.Record]) -> None:
    assert len(corpus) >= 80
    assert len({record.id for record in corpus}) == len(corpus)
    assert not [record.id for record in corpus if len(record.text.split()) < 60]
    assert {record.license for record in corpus} == {"CC0-1.0"}
    assert not [record.id for record in corpus if not record.authors or record.year is None]


def test_no_document_is_there_twice(corpus: list[records.Record]) -> None:
    for key in ("title", "text", "doi"):
        counts = Counter(value for record in corpus if (value := getattr(record, key)))
        assert [value for value, count in counts.items() if count > 1] == []


def test_its_text_is_plain(corpus: list[records.Record]) -> None:
    for record in corpus:
        shown = record.metadata()
        assert (shown["title"], shown["authors"]) == (record.title, record.authors)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e]|\[S?\d+\]|<\|", record.text), record.id


def test_both_sides_of_the_disputes_are_told(corpus: list[records.Record]) -> None:
    counts = Counter(record.replication_status for record in corpus)
    assert min(counts["successful"], counts["mixed"], counts["failed"]) >= 5


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The corpus of the tree, loaded at the first question of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECTOR_STORE_PATH", str(tmp_path_factory.mktemp("store")))
        patch.setenv("CORPUS_DIR", str(CORPUS.parent))
        yield


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("question", "mentions"),
    [
        ("Does ego depletion replicate?", "ego depletion"),
        ("Do power poses change hormones?", "power pos"),
        ("Does priming with words about old age make people walk slower?", "prim(ing|ed|e)"),
        ("Does facial feedback make people happier when they smile?", "facial feedback"),
        ("How strong is the anchoring effect in estimates?", "anchor"),
        ("Does behavioral priming replicate?", "prim(ing|ed|e)"),
        ("Is the Stroop effect reliable?", "stroop"),
        ("Do growth mindset interventions raise grades?", "mindset"),
        ("Does the marshmallow test predict success later in life?", "marshmallow|delay of gratification"),
        ("Does stereotype threat lower the test scores of women?", "stereotype threat"),
    ],
)
def test_the_three_nearest_to_a_question_about_a_dispute_mention_it(question: str, mentions: str) -> None:
    shipped = settings.load(TREE / "config" / "inference.yaml")
    manifest, _ = retrieve.retrieve(question, "psychology", dataclasses.replace(shipped, n_results=5))
    found = [f"{entry['metadata']['title']}: {entry['text']}" for entry in manifest]
    assert len(found) == 5
    assert [text for text in found[:3] if not re.search(mentions, text, re.I)] == []
