"""Find the sources of a question in a domain: dense and lexical search, fused, various, within a budget.

Q="Does ego depletion replicate?" DOMAIN=psychology python -m retrieve     prints the sources, sends nothing

The question and its refuting rewordings are each asked of both indexes, over the whole domain; the rankings are fused by
reciprocal rank, optionally ordered anew by a cross-encoder, and chosen from by maximal marginal relevance. Every rank and
score stays with its source, and what was left out is listed with its reason. Nothing is random: runs repeat.

What it cannot see: a document that shares neither meaning nor words with any wording, and whether a source is good.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chunks
import embedding
import fusion
import ingest
import lexical
import settings
import store
from common.problems import OK, Problem, run
from common.text import clean
from records import label, short_label

DEPTH = 50  # how far down each ranking is read
RERANKED = 100  # what a cross-encoder reads at most
# What stands around each source in the prompt: two tags with the run's code, its id, line ends.
TOKENS_AROUND = 48
SHOWN = 5  # of what was left out, for each reason


@dataclass
class Evidence:
    """A chunk that some ranking holds, and all that is known of it. Lists are in the order of the wordings."""

    chunk_id: str
    stored: store.Stored
    cosine: float
    dense: list[tuple[int, float] | None]
    bm25: list[tuple[int, float] | None]
    fused: tuple[int, float]
    coverage: float | None = None  # where it shares a rare word with the question
    relevance: float = 0  # 0 to 1, what the choice goes by
    rerank: tuple[int, float] | None = None
    mmr: tuple[int, float] | None = None
    tokens: int = 0
    why: fusion.Refusal | None = field(default=None, repr=False)

    def ranks(self) -> dict[str, Any]:
        return {
            "dense": [place and place[0] for place in self.dense],
            "bm25": [place and place[0] for place in self.bm25],
            "fused": self.fused[0],
            "rerank": self.rerank and self.rerank[0],
            "mmr": self.mmr and self.mmr[0],
        }

    def scores(self) -> dict[str, Any]:
        return {
            "cosine": self.cosine,
            "dense": [place and place[1] for place in self.dense],
            "bm25": [place and place[1] for place in self.bm25],
            "coverage": self.coverage,
            "fused": self.fused[1],
            "rerank": self.rerank and self.rerank[1],
            "relevance": self.relevance,
            "mmr": self.mmr and self.mmr[1],
        }


def retrieve(question: str, name: str, configuration: settings.Settings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The manifest of a question (entries S1…Sn, best first) and the facts of the retrieval.

    The facts: sha256 of the records, chunker version and embedding model; `queries`, the wordings that were asked, in the
    order of the lists in ranks and scores; `tokens`, the budget, what is used of it and how it was counted; `left_out`,
    every other chunk that a ranking held, best first, with its reason.

    Loads the shipped corpus on first use, and rebuilds an index that is behind its records. Raises Problem (exit 2) for
    a domain that does not exist and for a question that nothing in the domain is near to.
    """
    domain = store.Domain(name)
    if name not in store.domains():
        raise Problem(
            f"domain {name} does not exist; there is {', '.join(store.domains()) or 'none'}."
            f" Add it with: make ingest DOMAIN={name} FROM=records.jsonl"
        )
    embedder = embedding.load(configuration.embedding_model)
    count, counted_by = _counter(configuration, embedder)
    if loaded := ingest.load_shipped(domain, embedder):
        print(f"loaded the shipped corpus: {loaded}", file=sys.stderr)
    queries = wordings(question, configuration)
    vectors = embedder.encode([query["text"] for query in queries])
    while True:
        with domain.reading():
            corpus_hash = domain.corpus_hash()
            if domain.is_current(embedder.name, corpus_hash):
                found = _search(domain, queries, vectors, configuration)
                break
        with domain.writing():
            print(f"the index of {name} was behind: {ingest.update(domain, embedder)}", file=sys.stderr)
    near = [evidence for evidence in found if evidence.why is None]
    if not near:
        best = f"the nearest has similarity {max(e.cosine for e in found):.2f}" if found else "it is empty"
        raise Problem(
            f"nothing in domain {name} is near to this question ({best}, min_similarity in config/inference.yaml is"
            f" {configuration.min_similarity});"
            " no job was sent. Ask differently, or add documents with make ingest"
        )
    chosen = _choose(near, queries[0]["text"], configuration, count)
    if not chosen:
        raise Problem(
            f"source_tokens in config/inference.yaml is {configuration.source_tokens}, too little for a single source"
            f" (the smallest has {min(e.tokens for e in near)} tokens); raise it"
        )
    facts = {
        "sha256": corpus_hash,
        "chunker": chunks.CHUNKER,
        "embedding_model": embedder.name,
        "queries": queries,
        "tokens": {
            "budget": configuration.source_tokens,
            "used": sum(evidence.tokens for evidence in chosen),
            "counted_by": counted_by,
        },
        "left_out": [_left_out(evidence) for evidence in found if evidence.why],
    }
    return [_entry(number, evidence) for number, evidence in enumerate(chosen, 1)], facts


def wordings(question: str, configuration: settings.Settings) -> list[dict[str, Any]]:
    """What is asked of the indexes: the question, then its refuting rewordings, each with its weight."""
    asked = clean(question)
    subject = asked.strip().rstrip("?!. ") or asked
    return [
        {"text": asked, "kind": "question", "weight": 1.0},
        *(
            {
                "text": wording.replace(settings.QUESTION, subject),
                "kind": "refuting",
                "weight": configuration.refuting_weight,
            }
            for wording in configuration.refuting
        ),
    ]


def _search(
    domain: store.Domain,
    queries: Sequence[dict[str, Any]],
    vectors: embedding.Vectors,
    configuration: settings.Settings,
) -> list[Evidence]:
    """Every chunk that a ranking holds, by its place in the fused one; `why` is set where it is below the floor."""
    index = domain.vectors()
    dense = index.nearest(vectors, DEPTH)
    words = domain.words() if configuration.lexical else None
    bm25 = [words.search(query["text"], DEPTH) if words else [] for query in queries]
    lexical_weight = configuration.lexical_weight
    pairs = [
        [(weight, [chunk_id for chunk_id, _ in ranking]) for weight, ranking in ((1, one), (lexical_weight, other))]
        for one, other in zip(dense, bm25, strict=True)
    ]
    fused = fusion.fuse([(query["weight"] * w, r) for query, pair in zip(queries, pairs, strict=True) for w, r in pair])
    stored = index.fetch(list(fused))
    places = [
        [{i: (rank, score) for rank, (i, score) in enumerate(ranking, 1)} for ranking in kind] for kind in (dense, bm25)
    ]
    unit = vectors[0] / math.sqrt(float(vectors[0] @ vectors[0]))
    found = []
    for rank, (chunk_id, score) in enumerate(fused.items(), 1):
        held = stored[chunk_id]
        in_dense, in_bm25 = ([places_of.get(chunk_id) for places_of in kind] for kind in places)
        cosine = in_dense[0][1] if in_dense[0] else round(float(unit @ held.vector), 6)
        found.append(Evidence(chunk_id, held, cosine, in_dense, in_bm25, (rank, score)))
    if words:
        _cover(found, queries[0]["text"], words, configuration.rare_share)
    relevance = fusion.scaled(fused)
    others = [fusion.scaled(fusion.fuse(pair)) for pair in pairs[1:]]
    for evidence in found:
        covered = evidence.coverage if evidence.coverage and evidence.coverage >= configuration.lexical_coverage else 0
        opposed = max((other.get(evidence.chunk_id, 0) for other in others), default=0)
        # A sum favours what every ranking holds: neither the one document with a rare term nor the one null result
        # among many that confirm may drown in it.
        evidence.relevance = round(
            max(relevance[evidence.chunk_id], covered, opposed * configuration.refuting_relevance), 6
        )
        if evidence.cosine < configuration.min_similarity and not covered:
            detail = f"similarity {evidence.cosine:.3f} is below {configuration.min_similarity}"
            if evidence.coverage:
                detail += f", and it holds {evidence.coverage:.2f} of the question's words"
            evidence.why = fusion.Refusal("below_floor", detail)
    return found


def _cover(found: Sequence[Evidence], question: str, words: lexical.Index, rare_share: float) -> None:
    """Set the coverage of each chunk that shares a rare word with the question."""
    most = max(1, rare_share * len(words.ids))
    if not any(0 < words.count(word) <= most for word in lexical.content_words(question)):
        return
    for evidence in found:
        if evidence.bm25[0]:
            share, rarest = words.coverage(question, f"{evidence.stored.metadata['title']}\n{evidence.stored.text}")
            evidence.coverage = share if 0 < rarest <= most else None


def _choose(
    near: list[Evidence], question: str, configuration: settings.Settings, count: Callable[[str], int]
) -> list[Evidence]:
    """The sources, best first; `why` is set on the others."""
    pool = sorted(near, key=lambda e: (-e.relevance, e.chunk_id))
    if configuration.rerank:
        for evidence in pool[RERANKED:]:
            evidence.why = fusion.Refusal("rerank", f"not among the best {RERANKED}, which were ordered anew")
        pool = pool[:RERANKED]
        texts = [f"{evidence.stored.metadata['title']}\n{evidence.stored.text}" for evidence in pool]
        for evidence, score in zip(pool, rerank(configuration.rerank, question, texts), strict=True):
            evidence.relevance = score
        pool.sort(key=lambda e: (-e.relevance, e.chunk_id))
        for rank, evidence in enumerate(pool, 1):
            evidence.rerank = (rank, evidence.relevance)
    by_id = {evidence.chunk_id: evidence for evidence in pool}

    def tokens(chunk_id: str) -> int:
        held = by_id[chunk_id].stored
        by_id[chunk_id].tokens = TOKENS_AROUND + count(f"{label(held.metadata)}\n{held.text}")
        return by_id[chunk_id].tokens

    chosen, refused = fusion.choose(
        [fusion.Candidate(e.chunk_id, e.relevance, e.stored.vector, paper(e.stored.metadata)) for e in pool],
        tokens,
        configuration.mmr_lambda,
        configuration.n_results,
        configuration.max_per_paper,
        configuration.source_tokens,
    )
    for rank, (chunk_id, score) in enumerate(chosen.items(), 1):
        by_id[chunk_id].mmr = (rank, score)
    for chunk_id, why in refused.items():
        by_id[chunk_id].why = why
    return [evidence for evidence in pool if evidence.chunk_id in chosen]


def paper(metadata: dict[str, Any]) -> str:
    """What a chunk counts against: the DOI, which documents can share, else the document."""
    return f"doi:{metadata['doi'].lower()}" if metadata["doi"] else f"id:{metadata['id']}"


def rerank(model: str, question: str, texts: Sequence[str]) -> list[float]:
    """How well each text answers the question, 0 to 1, by a cross-encoder that reads both together (client-full)."""
    try:
        from sentence_transformers import CrossEncoder
        from torch import nn
    except ImportError as error:
        raise Problem(
            f"rerank: {model} needs the client-full image; make synth and make retrieve select it by themselves"
        ) from error
    try:
        encoder: Any = CrossEncoder(model, device="cpu", trust_remote_code=False)
        pairs = [(question, text) for text in texts]
        scores = encoder.predict(pairs, batch_size=16, activation_fn=nn.Sigmoid(), show_progress_bar=False)
        return [round(float(score), 6) for score in scores]
    except Exception as error:  # the hub client raises many kinds; to the user they are one
        reason = " ".join(str(error).split())[:300]
        raise Problem(f"rerank: {model} cannot be used: {reason}") from error


def _counter(configuration: settings.Settings, embedder: embedding.Embedder) -> tuple[Callable[[str], int], str]:
    """How tokens are counted, and the words that say so."""
    if not configuration.source_tokenizer:
        factor = configuration.tokens_per_piece
        return lambda text: math.ceil(embedder.count(text) * factor), f"word pieces of {embedder.name} × {factor}"
    from tokenizers import Tokenizer

    path = Path(configuration.source_tokenizer)
    try:
        content = path.read_bytes()
        tokenizer: Any = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = " ".join(str(error).split())[:200]
        raise Problem(
            f"source_tokenizer: {path} cannot be read: {reason}. Copy tokenizer.json of the model that the worker serves"
            " there, or set source_tokenizer: null in config/inference.yaml"
        ) from error
    tokenizer.no_truncation()
    digest = hashlib.sha256(content).hexdigest()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), f"tokenizer.json {digest}"


def _entry(number: int, evidence: Evidence) -> dict[str, Any]:
    metadata = evidence.stored.metadata
    return {
        "id": f"S{number}",
        "chunk_id": evidence.chunk_id,
        "document_id": metadata["id"],
        "text": evidence.stored.text,
        "label": label(metadata),
        "metadata": metadata,
        "ranks": evidence.ranks(),
        "scores": evidence.scores(),
        "tokens": evidence.tokens,
    }


def _left_out(evidence: Evidence) -> dict[str, Any]:
    assert evidence.why
    metadata = evidence.stored.metadata
    return {
        "chunk_id": evidence.chunk_id,
        "document_id": metadata["id"],
        "label": short_label(metadata),
        "title": metadata["title"],
        "reason": evidence.why.reason,
        "detail": evidence.why.detail,
        "ranks": evidence.ranks(),
        "scores": evidence.scores(),
    }


def table(manifest: Sequence[dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """The sources with their ranks, and what was left out, as lines for a terminal."""
    lines = [f"{'':>4}  cosine  dense   bm25  other  fused  tokens"]
    for entry in manifest:
        lines.append(
            f"{entry['id']:>4}  {_places(entry)}  {entry['tokens']:>6}  {clean(entry['label'])}: {clean(entry['text'])[:100]}"
        )
    tokens = facts["tokens"]
    lines += [
        "",
        "Ranks: dense and bm25 of the question, other the best of its refuting rewordings, fused of all together."
        f" {tokens['used']} of {tokens['budget']} tokens ({tokens['counted_by']}).",
    ]
    counts = Counter(entry["reason"] for entry in facts["left_out"])
    for reason, count in counts.items():
        lines += ["", f"left out, {reason}: {count}"]
        of_this = [entry for entry in facts["left_out"] if entry["reason"] == reason]
        for entry in of_this[:SHOWN]:
            lines.append(f"   -  {_places(entry)}  {clean(entry['label'])}: {entry['detail']}")
        if count > SHOWN:
            lines.append(f"   -  and {count - SHOWN} more")
    return lines


def _places(entry: dict[str, Any]) -> str:
    ranks = entry["ranks"]
    others = [rank for kind in ("dense", "bm25") for rank in ranks[kind][1:] if rank]
    columns = (ranks["dense"][0], ranks["bm25"][0], min(others, default=None), ranks["fused"])
    return f"{entry['scores']['cosine']:6.3f}  " + "  ".join(f"{rank or '-':>5}" for rank in columns)


def main() -> int:
    """Print the sources of the question Q in the domain DOMAIN."""
    print("\n".join(table(*retrieve(settings.question(), settings.domain(), settings.load()))))
    return OK


if __name__ == "__main__":
    run(main)
