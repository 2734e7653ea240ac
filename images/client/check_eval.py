"""How much the checks notice, measured on pairs of a claim and its source; written to docs/checks-power.md.

    python -m check_eval [pairs.jsonl]        or with DATA=pairs.jsonl; without either, the project's own pairs

A line of the file is {"claim": …, "source": …, "label": "supported" or "refuted"}, perhaps with "title", or the form of
ScholarQABench: {"input": …, "gold_ctx": [{"title": …, "text": …}], "answer": "true" or "false"}. From each supported
claim wrong ones are made, one error each (alterations.py); and each claim is cited to sources that are not its own. Each
is then written as a synthesis of one sentence and goes through the same splitter and the same checks as any synthesis,
with 20 sources at hand as in a run. VERIFIER=… measures level 2, too.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import alterations
import background
import citation_check
import embedding
import entailment
import grounding
import settings
from common.problems import OK, Problem, run
from common.text import clean, stems
from embedding import Embedder, Vectors
from ledger import Claim
from split import split

OWN = "corpus/checks/pairs.jsonl"
REPORT = Path("docs/checks-power.md")
SOURCES = 20  # at hand with each claim, as in a run
NEIGHBOURS = 10  # of these, the nearest to the claim: half by words, half by meaning
MOST_PAIRS = 400
_SHOWN_PROBLEMS = 10
# A kind of error that is flagged less than this much oftener than right sentences are is not seen at all.
_SEEN = 0.1


@dataclass(frozen=True)
class Pair:
    """A claim and the source that decides it."""

    claim: str
    source: str
    supported: bool
    title: str = ""


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Pair]:
    """The pairs of a file in either form. Raises Problem that names each bad line."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise Problem(f"{path} does not exist; give a file of pairs: make check-eval DATA=pairs.jsonl") from None
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}") from error
    pairs, problems = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                pairs.append(parse(line))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = "\n  ".join(problems[:_SHOWN_PROBLEMS]) + (f"\n  and {more} more" if more > 0 else "")
        raise Problem(f"nothing was measured; {len(problems)} bad line(s):\n  {shown}")
    if len({pair.source for pair in pairs}) < 2 or not any(pair.supported for pair in pairs):
        raise Problem(f"{path} must hold pairs with two sources at least, and one claim at least that is supported")
    return pairs


def parse(line: bytes) -> Pair:
    """One pair from one line. Raises ValueError that says what is wrong."""
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError("expected one JSON object per line")
    if "claim" in data:
        claim, source, title = data["claim"], data.get("source"), data.get("title", "")
        supported = _label(data, "label", {"supported": True, "refuted": False})
    elif "input" in data:
        claim, contexts = data["input"], data.get("gold_ctx")
        if not isinstance(contexts, list) or not contexts or not all(isinstance(entry, dict) for entry in contexts):
            raise ValueError('gold_ctx must be a list of {"title", "text"}')
        texts = [entry.get("text") for entry in contexts]
        source = "\n\n".join(texts) if all(isinstance(text, str) for text in texts) else None
        title = contexts[0].get("title") or ""
        supported = _label(data, "answer", {"true": True, "false": False})
    else:
        raise ValueError("neither claim, source, label nor input, gold_ctx, answer")
    for name, text in (("claim", claim), ("source", source)):
        if not isinstance(text, str) or not clean(text).strip():
            raise ValueError(f"the {name} is missing, empty or not text")
    if not isinstance(title, str):
        raise ValueError("title must be text")
    return Pair(" ".join(clean(claim).split()), clean(str(source)).strip(), supported, " ".join(clean(title).split()))


def _label(data: dict[str, Any], key: str, words: dict[str, bool]) -> bool:
    value = data.get(key)
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError(f"{key} must be {' or '.join(words)}, not {value!r:.40}")
    return words[value.lower()]


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Count:
    """How many sentences of a kind there were, and how many were flagged: by level 0, 1, 2, by any of them."""

    of: int = 0
    flagged: dict[str, int] = field(default_factory=dict)

    def add(self, levels: set[str]) -> None:
        self.of += 1
        for level in (*levels, *(["any"] if levels else [])):
            self.flagged[level] = self.flagged.get(level, 0) + 1

    def share(self, level: str) -> float:
        return self.flagged.get(level, 0) / self.of if self.of else math.nan


@dataclass
class Result:
    """What was measured. `scores` has for each way to score a pair the values of right, random and hardest sources."""

    kinds: dict[str, Count]
    reasons: dict[str, int]  # flags of right sentences, by kind
    scores: dict[str, dict[str, list[float]]]

    def auroc(self, score: str, against: str) -> float:
        return auroc(self.scores[score]["right"], self.scores[score][against])


RIGHT = "right sentence, right source (false flags)"
QUOTE = "right quotation (false flags)"
REFUTED = "claim that its source refutes"
RANDOM, NEIGHBOUR, UNKNOWN = "random source", "neighbour source", "fabricated citation"


class _Remembering:
    """An embedder that encodes each text once; pairs share their sources."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder, self.name, self.limit = embedder, embedder.name, embedder.limit
        self.vectors: dict[str, Vectors] = {}

    def count(self, text: str) -> int:
        return self.embedder.count(text)

    def encode(self, texts: Sequence[str]) -> Vectors:
        if new := [text for text in dict.fromkeys(texts) if text not in self.vectors]:
            self.vectors |= dict(zip(new, self.embedder.encode(new), strict=True))
        return np.stack([self.vectors[text] for text in texts]) if texts else self.embedder.encode([])


@dataclass
class Checks:
    """The checks that are measured, loaded."""

    embedder: Embedder
    thresholds: dict[str, Any]  # of level 1
    verifier: entailment.Verifier | None = None
    entailment: dict[str, Any] = field(default_factory=dict)  # thresholds of level 2

    @property
    def levels(self) -> tuple[str, ...]:
        return ("0", "1", "2") if self.verifier else ("0", "1")


def measure(pairs: Sequence[Pair], checks: Checks) -> Result:
    """Run the checks over right and wrong sentences made from the pairs. The same pairs give the same result."""
    checks = replace(checks, embedder=_Remembering(checks.embedder))
    result = Result(
        {}, {}, {name: {"right": [], "random": [], "hardest": []} for name in ("score", "coverage", "cosine")}
    )
    for pair, own, others in _with_sources(pairs, checks.embedder):
        manifest = _manifest([own, *others])
        hardest, chance = _score(pair, manifest, checks, result)
        first = manifest[0]["id"]
        sentences: list[tuple[str, str]] = []
        if pair.supported:
            sentences.append((RIGHT, _cite(pair.claim, first)))
            sentences += [(QUOTE, _cite(text, first)) for text in alterations.quoting(pair.claim, pair.source)]
            for kind, alter in alterations.KINDS.items():
                sentences += [(kind, _cite(text, first)) for text in alter(pair.claim, f"{pair.title}. {pair.source}")]
            sentences.append((UNKNOWN, _cite(pair.claim, f"S{SOURCES + 79}")))
        else:
            sentences.append((REFUTED, _cite(pair.claim, first)))
        sentences.append((RANDOM, _cite(pair.claim, chance)))
        sentences.append((NEIGHBOUR, _cite(pair.claim, hardest)))
        _count(sentences, manifest, checks, result)
    order = [RIGHT, QUOTE, UNKNOWN, RANDOM, NEIGHBOUR, *alterations.KINDS, REFUTED]
    result.kinds = {kind: result.kinds[kind] for kind in order if kind in result.kinds}
    return result


def _cite(text: str, source: str) -> str:
    return f"{text.rstrip().rstrip('.')} [{source}]."


def _count(
    sentences: Sequence[tuple[str, str]],
    manifest: Sequence[dict[str, Any]],
    checks: Checks,
    result: Result,
) -> None:
    ids = [entry["id"] for entry in manifest]
    owners: dict[str, int] = {}
    claims: list[Claim] = []
    levels: list[set[str]] = [set() for _ in sentences]
    for number, (_, text) in enumerate(sentences):
        found = split(text, ids)
        for flag in citation_check.check(text, found, manifest):
            if flag.kind not in citation_check.NOTES:
                levels[number].add("0")
        for claim in found:
            claims.append(replace(claim, id=f"C{len(claims) + 1}"))
            owners[claims[-1].id] = number
    for flag in grounding.check(claims, manifest, checks.embedder, checks.thresholds):
        number = owners[str(flag.claim)]
        levels[number].add("1")
        if sentences[number][0] == RIGHT:
            result.reasons[flag.kind] = result.reasons.get(flag.kind, 0) + 1
    if checks.verifier:
        # Each sentence against its own source alone: what others say of it is another question.
        for entry in manifest:
            citing = [claim for claim in claims if claim.cited == [entry["id"]]]
            for flag in entailment.check(citing, [entry], checks.verifier, checks.entailment).flags:
                if flag.kind != "unchecked":
                    levels[owners[str(flag.claim)]].add("2")
    for (kind, _), found_by in zip(sentences, levels, strict=True):
        result.kinds.setdefault(kind, Count()).add(found_by)


def _score(pair: Pair, manifest: Sequence[dict[str, Any]], checks: Checks, result: Result) -> tuple[str, str]:
    """Score the claim against each source by itself. Returns the ids of the hardest other one and of a random one."""
    ids = [entry["id"] for entry in manifest]
    claims = [Claim(f"C{i}", pair.claim, pair.claim, (0, len(pair.claim)), "", "fact", [i]) for i in ids]
    grounding.check(claims, manifest, checks.embedder, checks.thresholds)
    found = {i: claim.checks["grounding"][i] for i, claim in zip(ids, claims, strict=True)}
    chance = ids[-1]
    for name, values in result.scores.items():
        values["right"].append(found[ids[0]][name])
        values["random"].append(found[chance][name])
        values["hardest"].append(max(found[i][name] for i in ids[1:]))
    return max(ids[1:], key=lambda i: found[i]["score"]), chance


def _with_sources(pairs: Sequence[Pair], embedder: Embedder) -> Iterator[tuple[Pair, Pair, list[Pair]]]:
    """Each pair with its own source and up to 19 others: the nearest by words and by meaning, then by chance."""
    if len(pairs) > MOST_PAIRS:
        pairs = [pairs[i * len(pairs) // MOST_PAIRS] for i in range(MOST_PAIRS)]
    library = {pair.source: pair for pair in pairs}
    texts = list(library)
    vectors = embedder.encode(texts)
    words = [frozenset(stems(text)) for text in texts]
    for pair, row in zip(pairs, embedder.encode([pair.claim for pair in pairs]), strict=True):
        own = frozenset(stems(pair.claim))
        meaning = vectors @ row
        shared = [sum(_worth(stem) for stem in own & known) for known in words]
        others = [i for i, text in enumerate(texts) if text != pair.source]
        by_words = sorted(others, key=lambda i: (-shared[i], i))[: NEIGHBOURS // 2]
        by_meaning = [i for i in sorted(others, key=lambda i: (-round(float(meaning[i]), 4), i)) if i not in by_words]
        near = by_words + by_meaning[: NEIGHBOURS // 2]
        # By chance, and yet the same each time.
        far = sorted((i for i in others if i not in near), key=lambda i: _digest(pair.claim, texts[i]))
        yield pair, pair, [library[texts[i]] for i in (near + far)[: SOURCES - 1]]


def _worth(stem: str) -> float:
    return math.log((background.DOCUMENTS + 1) / (background.COUNTS.get(stem, 0) + 1))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _manifest(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Entries as a run has them. Who wrote the sources is not in the data; all are the work of one made-up name."""
    return [
        {
            "id": f"S{number}",
            "chunk_id": f"chunk-{number}",
            "document_id": f"document-{number}",
            "text": pair.source,
            "label": "Author (2000)",
            "metadata": {"title": pair.title, "authors": ["Author, A."], "year": 2000},
            "ranks": {},
            "scores": {},
        }
        for number, pair in enumerate(pairs, 1)
    ]


def auroc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """How often a right one scores higher than a wrong one, ties by half."""
    if not right or not wrong:
        return math.nan
    a, b = np.array(right)[:, None], np.array(wrong)[None, :]
    return float((a > b).mean() + (a == b).mean() / 2)


def interval(hits: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    if not of:
        return 0.0, 1.0
    z = 1.959964
    middle = (hits + z * z / 2) / (of + z * z)
    half = z * math.sqrt(hits * (of - hits) / of + z * z / 4) / (of + z * z)
    return max(0.0, middle - half), min(1.0, middle + half)


# --- reporting --------------------------------------------------------------------------------------------------------

_HEAD = """# What the checks notice, and what they miss

Written by `make check-eval` (`DATA=pairs.jsonl` for your own data; a section for each file, the latest run of each). Do not edit.

Level 0 looks at the citations themselves, level 1 at words, meaning, numbers and quotations of the cited source (`images/client/grounding.py`, thresholds in `config/checks.yaml`). Each row below is a kind of sentence; the numbers are the share of such sentences that are flagged, with its 95% interval (Wilson). In the rows of right sentences a low
share is good, in all others a high one. Wrong sentences are made by rule from right ones (`images/client/alterations.py`), so these shares hold for errors of this plain make: a model's own errors can be subtler.
"""


def report(name: str, digest: str, pairs: int, result: Result, checks: Checks, day: str) -> str:
    """The section of docs/checks-power.md about one file."""
    lines = [
        f"## On {name}",
        "",
        f"{day}; {min(pairs, MOST_PAIRS)} pairs{f' of {pairs}' if pairs > MOST_PAIRS else ''}, sha256 `{digest[:16]}`;"
        f" {SOURCES} sources at hand with each claim; embedding model {checks.embedder.name}; "
        + ", ".join(f"{key} {value}" for key, value in checks.thresholds.items())
        + (f"; level 2: {checks.verifier.name}, " if checks.verifier else "")
        + ", ".join(f"{key} {value}" for key, value in checks.entailment.items())
        + ".",
        "",
        f"| sentences | number | {' | '.join(f'level {level}' for level in checks.levels)} | together |",
        "|---" * (3 + len(checks.levels)) + "|",
    ]
    for kind, count in result.kinds.items():
        cells = [f"{_shown(count, level)}" for level in (*checks.levels, "any")]
        lines.append(f"| {kind} | {count.of} | {' | '.join(cells)} |")
    reasons = ", ".join(f"{kind} {number}" for kind, number in sorted(result.reasons.items()))
    lines += [
        "",
        f"Level 1's flags on right sentences, by kind: {reasons or 'none'}."
        f"{'' if checks.verifier else ' Level 2 (entailment): not measured.'} Level 3 (a model as judge): not measured.",
        "",
        "| AUROC (right source against …) | a random one | the best of 19 others |",
        "|---|---|---|",
    ]
    for score, what in (("score", "level 1's score"), ("coverage", "its words alone"), ("cosine", "its meaning alone")):
        lines.append(f"| {what} | {result.auroc(score, 'random'):.3f} | {result.auroc(score, 'hardest'):.3f} |")
    usual = result.kinds[RIGHT].share("any") if RIGHT in result.kinds else 0.0
    wrong = [kind for kind in result.kinds if kind not in (RIGHT, QUOTE)]
    blind = [kind for kind in wrong if result.kinds[kind].share("any") < usual + _SEEN]
    partly = [kind for kind in wrong if usual + _SEEN <= result.kinds[kind].share("any") < 0.9]
    lines += [
        "",
        f"**Levels {', '.join(checks.levels[:-1])} and {checks.levels[-1]} do not see**: {', '.join(blind) or 'none of the kinds above'} (flagged hardly oftener than right sentences). **They miss some of**: {', '.join(partly) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def _shown(count: Count, level: str) -> str:
    hits = count.flagged.get(level, 0)
    low, high = interval(hits, count.of)
    return f"{100 * hits / count.of:.0f}% ({100 * low:.0f}–{100 * high:.0f})"


def merged(old: str, name: str, section: str) -> str:
    """The report with this section in place of the old one about the same file; those about others stay."""
    kept = [part for part in old.split("\n## On ")[1:] if part.split("\n", 1)[0] != name]
    sections = sorted([section.removeprefix("## On ").strip("\n"), *(part.strip("\n") for part in kept)])
    notes = "".join(note for file, note in _NOTES.items() if any(part.startswith(f"{file}\n") for part in sections))
    return _HEAD + notes + "".join(f"\n## On {part}\n" for part in sections)


_NOTES = {
    "pairs.jsonl": """
`pairs.jsonl` is the project's own (`corpus/checks/pairs.jsonl`, CC0): claims about texts of the shipped corpus, written with the text at hand. Their words are more like their source's than those of a model that sums up many sources, so they are easier to ground: take their false flags as a lower bound.
""",
    "scifact_test.jsonl": """
`scifact_test.jsonl` holds claims of SciFact with the abstracts that decide them, in the form of ScholarQABench (`AkariAsai/ScholarQABench`, `data/single_paper_tasks/`); it is not shipped. The checks were built on it: `weak` was chosen by cross-validation, the other thresholds by looking at all of it, and the rules about numbers were mended where they missed. So its rows are optimistic; data that nobody has looked at may do worse. Its claims hold few numbers, but many names with numbers
in them.
""",
}


def main() -> int:
    """Measure the checks on the file that is named."""
    arguments = sys.argv[1:]
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        raise Problem("usage: python -m check_eval [pairs.jsonl]; or make check-eval DATA=pairs.jsonl")
    path = Path(arguments[0] if arguments else settings.variable("DATA") or OWN)
    thresholds = grounding.thresholds()
    pairs = read(path)
    checks = Checks(embedding.load(settings.load().embedding_model), thresholds)
    if verifier := settings.variable("VERIFIER"):
        limits = entailment.thresholds()
        checks = replace(checks, verifier=entailment.load(verifier, limits), entailment=limits)
    print(f"measuring on {len(pairs)} pairs of {path}; this takes a minute or two", file=sys.stderr)
    result = measure(pairs, checks)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    section = report(path.name, digest, len(pairs), result, checks, datetime.date.today().isoformat())
    print(section, end="")
    to = Path(os.environ.get("DOCS_DIR") or REPORT.parent) / REPORT.name
    try:
        old = to.read_text(encoding="utf-8") if to.exists() else ""
        to.write_text(merged(old, path.name, section), encoding="utf-8")
    except OSError as error:
        raise Problem(f"{to} cannot be written: {error.strerror}; the result is printed above") from error
    print(f"written to {to}", file=sys.stderr)
    return OK


if __name__ == "__main__":
    run(main)
