"""Retrieval: what dense search misses is found, the other side too, nothing foreign is, and each choice is written down."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.client.support import NAPS, SLEEP, TREE, Client, LocalRunPod, Scripted, load, sources

import chunks
import retrieve
import settings
import store
from common.problems import BAD_INPUT, OK, Problem
from embedding import Embedder

ASK = {"Q": NAPS, "DOMAIN": "sleep"}
SHIPPED = settings.load(TREE / "config" / "inference.yaml")
# Nothing of what these ask stands in the shipped corpus, which is about the replication of psychological findings.
OFF_TOPIC = """How do I bake sourdough bread?
What is the capital of Mongolia?
Who won the football world cup in 2018?
How do tides depend on the moon?
Which programming language should a beginner learn?
What is the boiling point of water at high altitude?
How are mortgage rates set?
Why is the sky blue?
How do I repair a bicycle chain?
What causes volcanic eruptions?
How does a transformer neural network work?
When was the Eiffel Tower built?
What is the best fertiliser for tomatoes?
How long does a battery of an electric car last?
Which vaccines does a dog need?
How do noise-cancelling headphones work?
What is the population of Brazil?
How is steel made?
Does dark matter interact with light?
What did Napoleon do at Waterloo?
How many legs does a spider have?
Can I deduct my home office from taxes?
Why do cats purr?
What is the law of supply and demand?""".splitlines()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VECTOR_STORE_PATH", str(tmp_path / "own"))
    monkeypatch.setenv("CORPUS_DIR", str(tmp_path / "none"))
    return tmp_path


def found(client: Client, question: str, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What retrieve returns for a question to the domain sleep."""
    client.configure(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECTOR_STORE_PATH", str(client.store))
        patch.setenv("CORPUS_DIR", str(client.corpus))
        return retrieve.retrieve(question, "sleep", settings.load(client.root / "config" / "inference.yaml"))


def document(number: int, text: str, **more: Any) -> dict[str, Any]:
    return {"id": f"d{number}", "title": f"Report {number}", "text": text, **more}


def ids(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["document_id"] for entry in entries]


# --- what dense search misses ----------------------------------------------------------------------------------------

# Two documents whose only tie to the question is a term that no embedding model knows, among many that are nearer.
RARE = [
    document(1, "Batch QZ-7741 was withdrawn from all pharmacies in March. Retailers were refunded."),
    document(2, "The freight list names pallets, drums and crates; QZ-7741 travelled in a sealed drum."),
]
NEAR = [
    document(n, f"Trial {n}: the drug improved sleep in {n} patients. Was it safe? Side effects were mild.")
    for n in range(10, 80)
]


def test_two_documents_with_a_rare_term_are_found_by_words_and_survive_fusion(empty: Client) -> None:
    assert empty.ingest("sleep", *RARE, *NEAR).code == OK
    question = "In patients with poor sleep, was the drug QZ-7741 safe?"
    dense, _ = found(empty, question, n_results=20, lexical=False)
    assert not {"d1", "d2"} & set(ids(dense))
    manifest, facts = found(empty, question, n_results=20)
    assert {"d1", "d2"} <= set(ids(manifest))
    for entry in manifest:
        if entry["document_id"] in ("d1", "d2"):
            assert entry["ranks"]["dense"][0] is None  # not among the 50 nearest
            assert entry["ranks"]["bm25"][0] <= 2
    assert [query["kind"] for query in facts["queries"]] == ["question", "refuting", "refuting"]


def test_a_rare_term_lifts_a_document_over_the_floor_and_common_words_do_not(empty: Client) -> None:
    assert empty.ingest("sleep", *RARE, *NEAR).code == OK
    manifest, facts = found(empty, "What is QZ-7741?", min_similarity=0.9)
    assert sorted(ids(manifest)) == ["d1", "d2"]
    assert all(entry["scores"]["cosine"] < 0.9 and entry["scores"]["coverage"] == 1 for entry in manifest)
    with pytest.raises(Problem, match="nothing in domain sleep is near") as caught:
        found(empty, "Which drug improved sleep in patients?", min_similarity=0.9)
    assert caught.value.code == BAD_INPUT
    # Covered in full, by words that stand in most documents.
    manifest, facts = found(empty, "Was drug QZ-7741 safe?", min_similarity=0.9)
    assert sorted(ids(manifest)) == ["d1", "d2"]
    below = [entry for entry in facts["left_out"] if entry["reason"] == "below_floor"]
    assert below
    assert all(entry["scores"]["cosine"] < 0.9 for entry in below)
    assert all(entry["scores"]["coverage"] is None for entry in below)


def test_without_lexical_search_the_floor_is_the_cosine_alone(empty: Client) -> None:
    assert empty.ingest("sleep", *RARE).code == OK
    with pytest.raises(Problem, match="nothing in domain sleep is near"):
        found(empty, "What is QZ-7741?", min_similarity=0.9, lexical=False)


# --- the other side --------------------------------------------------------------------------------------------------


def test_rewordings_look_for_the_other_side(empty: Client) -> None:
    positive = [document(n, f"Naps improve alertness in {n} nurses on night shifts.") for n in range(10, 75)]
    null = document(
        1, "A failed replication, preregistered: resting at noon had no effect on alertness, a null result."
    )
    assert empty.ingest("sleep", *positive, null).code == OK
    alone, _ = found(empty, NAPS, refuting=[], n_results=20, mmr_lambda=1)
    assert "d1" not in ids(alone)
    wordings = ["no effect: {question}", "failed replication: {question}", "null result: {question}"]
    manifest, facts = found(empty, NAPS, refuting=wordings, n_results=20, mmr_lambda=1)
    assert [query["text"] for query in facts["queries"]] == [
        NAPS, "no effect: Do naps improve alertness", "failed replication: Do naps improve alertness",
        "null result: Do naps improve alertness",
    ]  # fmt: skip
    [entry] = [entry for entry in manifest if entry["document_id"] == "d1"]
    # The rest of the pile outranks it where all rankings are summed; its own wording keeps it.
    assert entry["ranks"]["fused"] > 20
    assert entry["ranks"]["bm25"][2] == 1
    assert entry["scores"]["relevance"] == 0.8


def test_a_rewording_alone_lifts_nothing_over_the_floor(empty: Client) -> None:
    noise = document(1, "A failed replication with a null result: no effect of violins on tides.")
    assert empty.ingest("sleep", noise).code == OK
    with pytest.raises(Problem, match="nothing in domain sleep is near"):
        found(
            empty, "Do mortgages yield?", min_similarity=0.25, refuting=["failed replication, null result: {question}"]
        )


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_each_entry_keeps_every_rank_and_score(client: Client) -> None:
    manifest, facts = found(client, NAPS)
    for number, entry in enumerate(manifest, 1):
        assert entry["id"] == f"S{number}"
        ranks, scores = entry["ranks"], entry["scores"]
        assert list(ranks) == ["dense", "bm25", "fused", "rerank", "mmr"]
        assert list(scores) == ["cosine", "dense", "bm25", "coverage", "fused", "rerank", "relevance", "mmr"]
        assert len(ranks["dense"]) == len(scores["bm25"]) == len(facts["queries"]) == 3
        assert scores["dense"][0] == scores["cosine"]
        terms = [
            query["weight"] * weight / (60 + rank)
            for kind, weight in (("dense", 1), ("bm25", 0.5))
            for query, rank in zip(facts["queries"], ranks[kind], strict=True)
            if rank
        ]
        assert scores["fused"] == pytest.approx(math.fsum(terms), abs=1e-9)
        assert (ranks["rerank"], scores["rerank"]) == (None, None)
    assert sorted(entry["ranks"]["mmr"] for entry in manifest) == list(range(1, len(manifest) + 1))
    assert facts["sha256"]
    assert json.loads(json.dumps([manifest, facts])) == [manifest, facts]


def test_what_was_left_out_is_listed_with_its_reason_and_nothing_is_lost(empty: Client) -> None:
    long = " ".join(f"Naps improve alertness in group {n}, which had {n} nurses on duty at night." for n in range(90))
    assert empty.ingest("sleep", document(1, long), document(2, "Violins are made of wood."), *SLEEP).code == OK
    manifest, facts = found(empty, NAPS, n_results=4, max_per_paper=2, min_similarity=0.2, mmr_lambda=1)
    counts: dict[str, int] = {}
    for entry in facts["left_out"]:
        counts[entry["reason"]] = counts.get(entry["reason"], 0) + 1
        assert entry["detail"]
        assert {"chunk_id", "document_id", "label", "title", "ranks", "scores"} < set(entry)
    assert set(counts) == {"per_paper", "n_results", "below_floor"}
    every = [entry["chunk_id"] for entry in [*manifest, *facts["left_out"]]]
    held = [e["ranks"]["fused"] for e in [*manifest, *facts["left_out"]]]
    assert sorted(held) == list(range(1, len(every) + 1))
    assert len(set(every)) == len(every) == store_count(empty)
    assert ids(manifest).count("d1") == 2


def store_count(client: Client) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECTOR_STORE_PATH", str(client.store))
        return store.Domain("sleep").probe()


def test_documents_with_the_same_doi_count_as_one_paper(empty: Client) -> None:
    same = [document(n, f"Naps improve alertness, version {n}.", doi="10.1000/Same") for n in range(3)]
    same.append(document(3, "Naps improve alertness, version 3.", doi="10.1000/same"))
    other = [document(n, f"Naps improve alertness, version {n}.") for n in (4, 5)]
    assert empty.ingest("sleep", *same, *other).code == OK
    manifest, facts = found(empty, NAPS, n_results=10, max_per_paper=1)
    assert sum(entry["metadata"]["doi"] is not None for entry in manifest) == 1
    assert {"d4", "d5"} <= set(ids(manifest))
    assert [entry["reason"] for entry in facts["left_out"]] == ["per_paper"] * 3


def test_runs_repeat(empty: Client) -> None:
    twins = [document(n, "Naps improve alertness.") | {"title": "Twin"} for n in range(30)]
    assert empty.ingest("sleep", *twins, *SLEEP).code == OK
    first = found(empty, NAPS, n_results=10)
    assert found(empty, NAPS, n_results=10) == first


def test_a_smaller_n_results_is_a_part_of_a_larger_one(client: Client) -> None:
    whole, _ = found(client, NAPS, n_results=3, min_similarity=-1)
    by_step = sorted(whole, key=lambda entry: entry["ranks"]["mmr"])
    for limit in (1, 2):
        part, facts = found(client, NAPS, n_results=limit, min_similarity=-1)
        assert {e["chunk_id"] for e in part} == {e["chunk_id"] for e in by_step[:limit]}
        assert [entry["reason"] for entry in facts["left_out"]] == ["n_results"] * (3 - limit)


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_sources_stay_within_the_token_budget(client: Client, embedder: Embedder) -> None:
    whole, facts = found(client, NAPS)
    assert facts["tokens"] == {
        "budget": 4000,
        "used": sum(entry["tokens"] for entry in whole),
        "counted_by": "word pieces of all-MiniLM-L6-v2 × 1.3",
    }
    for entry in whole:
        pieces = embedder.count(f"{entry['label']}\n{entry['text']}")
        assert entry["tokens"] == retrieve.TOKENS_AROUND + math.ceil(pieces * 1.3)
    budget = facts["tokens"]["used"] - 1
    part, facts = found(client, NAPS, source_tokens=budget)
    assert facts["tokens"]["used"] <= budget
    [out] = facts["left_out"]
    assert (out["reason"], len(part)) == ("budget", 2)


def test_a_budget_for_no_source_at_all_is_named(empty: Client, scripted: Scripted) -> None:
    empty.variables |= scripted.variables()
    assert empty.ingest("sleep", document(1, "Naps improve alertness. " * 40)).code == OK
    empty.configure(source_tokens=100)
    outcome = empty.run("synth", **ASK)
    assert outcome.code == BAD_INPUT
    assert "source_tokens in config/inference.yaml is 100, too little for a single source" in outcome.err
    assert scripted.seen == []


def test_the_tokenizer_of_the_model_counts_where_it_is_given(client: Client) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = client.root / "config" / "tokenizer.json"
    words.save(str(path))
    manifest, facts = found(client, NAPS, source_tokenizer=str(path))
    assert re.fullmatch(r"tokenizer\.json [0-9a-f]{64}", facts["tokens"]["counted_by"])
    for entry in manifest:
        assert entry["tokens"] == retrieve.TOKENS_AROUND + len(f"{entry['label']}\n{entry['text']}".split())


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_a_tokenizer_that_cannot_be_read_is_named(client: Client, content: bytes | None) -> None:
    if content is not None:
        (client.root / "config" / "tokenizer.json").write_bytes(content)
    client.configure(source_tokenizer="config/tokenizer.json")
    outcome = client.run("retrieve", **ASK)
    assert outcome.code == BAD_INPUT
    assert "source_tokenizer: config/tokenizer.json cannot be read" in outcome.err


# --- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lexical", value) for value in (None, 1, "yes")),
        *(("rerank", value) for value in ("", " ", 5, True)),
        *(("source_tokenizer", value) for value in ("", 5)),
        *(("mmr_lambda", value) for value in (-0.1, 1.1, math.nan, None)),
        *(("max_per_paper", value) for value in (0, 1.5)),
        *(("source_tokens", value) for value in (99, "4000")),
        *((key, value) for key in ("lexical_coverage", "rare_share", "lexical_weight", "refuting_weight", "refuting_relevance") for value in (-1, 2)),
        *(("refuting", value) for value in (None, "x {question}", ["x"], ["{question} {question}"], [5], ["{question}"] * 9)),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_key(client: Client, key: str, value: object) -> None:
    client.configure(**{key: value})
    outcome = client.run("retrieve", **ASK)
    assert outcome.code == BAD_INPUT
    assert f"config/inference.yaml: {key} must be" in outcome.err


def test_a_rerank_model_without_its_image_is_named(client: Client, scripted: Scripted) -> None:
    client.configure(rerank=settings.RERANKER)
    outcome = client.run("synth", **ASK)
    assert outcome.code == BAD_INPUT
    assert f"rerank: {settings.RERANKER} needs the client-full image" in outcome.err
    assert scripted.seen == []


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_table_shows_ranks_and_what_was_left_out(client: Client) -> None:
    client.configure(n_results=1, min_similarity=-1)
    outcome = client.run("retrieve", **ASK)
    assert outcome.code == OK
    assert outcome.out.splitlines()[0].split() == ["cosine", "dense", "bm25", "other", "fused", "tokens"]
    [line] = sources(outcome.out)
    assert line.split()[0] == "S1"
    assert "of 4000 tokens (word pieces of all-MiniLM-L6-v2 × 1.3)" in outcome.out
    assert "left out, n_results: 2" in outcome.out


# --- the lexical index is a cache as the other -----------------------------------------------------------------------


def test_a_lexical_index_that_is_gone_is_built_again_without_embedding(client: Client) -> None:
    import shutil

    expected = client.run("retrieve", **ASK).out
    shutil.rmtree(client.store / "sleep" / "lexical")
    outcome = client.run("retrieve", **ASK)
    assert (outcome.code, outcome.out) == (OK, expected)
    assert outcome.err == "the index of sleep was behind: 3 chunks, 0 embedded, 0 deleted\n"
    assert client.run("retrieve", **ASK).err == ""


def test_a_store_from_before_lexical_search_is_brought_up_to_date(client: Client) -> None:
    expected = client.run("retrieve", **ASK).out
    path = client.store / "sleep" / "state.json"
    state = load(path)
    del state["index"]["lexical"]
    path.write_text(json.dumps(state))
    outcome = client.run("retrieve", **ASK)
    assert (outcome.out, outcome.err) == (
        expected, "the index of sleep was behind: 3 chunks, 0 embedded, 0 deleted\n"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ids.json", "data.csc.index.npy", "vocab.index.json"])
def test_a_damaged_lexical_index_is_named_with_the_way_to_heal_it(client: Client, name: str) -> None:
    (client.store / "sleep" / "lexical" / name).write_bytes(b"\xff" * 300)
    outcome = client.run("retrieve", **ASK)
    assert outcome.code == BAD_INPUT
    assert "the index of domain sleep cannot be read: " in outcome.err
    assert "rm -r store/sleep/lexical and run the same command again" in outcome.err


def test_it_follows_the_records(client: Client) -> None:
    assert client.ingest("sleep", {**SLEEP[0], "text": "Zopiclone was given."}).code == OK
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECTOR_STORE_PATH", str(client.store))
        words = store.Domain("sleep").words()
    assert len(words.ids) == 3
    assert len(words.search("zopiclone", 5)) == 1
    assert words.search("nurses", 5) == []


# --- the shipped corpus ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def psychology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The corpus of the tree, loaded at the first question."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECTOR_STORE_PATH", str(tmp_path_factory.mktemp("store")))
        patch.setenv("CORPUS_DIR", str(TREE / "corpus"))
        yield


@pytest.mark.usefixtures("psychology")
def test_off_topic_questions_find_nothing() -> None:
    strayed = []
    for question in OFF_TOPIC:
        with contextlib.suppress(Problem):
            manifest, _ = retrieve.retrieve(question, "psychology", SHIPPED)
            strayed.append(question)
            # Near by meaning: words alone lifted nothing over the floor.
            assert all(entry["scores"]["cosine"] >= SHIPPED.min_similarity for entry in manifest)
    assert strayed == ["How are mortgage rates set?", "What is the law of supply and demand?"]


@pytest.mark.usefixtures("psychology")
def test_the_failed_replication_of_a_classic_is_among_its_first_sources() -> None:
    question = "Does priming with words about old age make people walk slower?"
    manifest, _ = retrieve.retrieve(question, "psychology", SHIPPED)
    assert any(entry["label"].startswith("Doyen et al. (2012)") for entry in manifest[:5])


def test_off_topic_questions_cost_no_call(client: Client, platform: LocalRunPod) -> None:
    before = platform.jobs()
    outcome = client.run("synth", Q="How do I repair a bicycle chain?", DOMAIN="sleep")
    assert outcome.code == BAD_INPUT
    assert "no job was sent" in outcome.err
    assert platform.jobs() == before


def test_chunks_of_the_index_and_of_the_words_are_the_same(client: Client, embedder: Embedder) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECTOR_STORE_PATH", str(client.store))
        domain = store.Domain("sleep")
        expected = sorted(c.id for record in domain.records().values() for c in chunks.chunk(record, embedder))
        assert domain.words().ids == expected
        assert sorted(domain.vectors().fetch(expected)) == expected


def test_weights_of_zero_silence_a_ranking(client: Client) -> None:
    configuration = dataclasses.replace(SHIPPED, refuting_weight=0.0)
    queries = retrieve.wordings(" What about naps?! ", configuration)
    assert [query["weight"] for query in queries] == [1.0, 0.0, 0.0, 0.0]
    assert queries[1]["text"] == "no effect: What about naps"
