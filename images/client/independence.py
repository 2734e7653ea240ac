"""Which sources belong together, and how many independent ones there are.

Two sources are related if they are the same document or work (DOI, PMID, arXiv id, trial id), have like titles and fitting
authors (a preprint and its article), or share half of their authors. This sees metadata only: not that two teams used the
same cohort, nor that two names are one person. A common surname with the same initial makes strangers related, which
errs on the side of caution.

Relation is not passed on: where B shares authors with A and with C, A and C may still be independent. So what is counted is
not chains of relations but the heaviest choice of sources no two of which are related. One more source can therefore
never make the sum smaller, and a copy of a source never changes it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PARTICLES = {"al", "bin", "da", "de", "del", "den", "der", "di", "dos", "du", "el", "la", "le", "ter", "van", "von"}
_SUFFIXES = {"jr", "sr", "ii", "iii", "iv", "phd", "md"}
_NOBODY = re.compile(r"(?:et\s+al|and\s+others|others|unknown(?:\s+authors?)?|anon(?:ymous)?|n/?a)\.?", re.I)
_GROUP = re.compile(
    r"\b(?:association|centre|center|collaborat\w*|college|commission|committee|consortium|council|department|foundation|group"
    r"|institut\w*|investigators|laborator\w*|ministry|network|office|organi[sz]ation|project|society|team|university)\b",
    re.I,
)
# Version marks at the end of a preprint's DOI or arXiv id: 10.1101/…v2, 10.1101/…v2.full, osf.io/abcde_v1.
_VERSION = re.compile(r"[_.]?v\d{1,2}(?:\.full(?:\.pdf|-text)?)?$")
_IN_URL = (
    ("doi", re.compile(r"doi\.org/(10\.\d{4,9}/[^\s?#]+)", re.I)),
    ("pmid", re.compile(r"pubmed(?:\.ncbi\.nlm\.nih\.gov|/)\D{0,10}(\d{1,9})", re.I)),
    ("pmcid", re.compile(r"\b(PMC\d{3,9})\b", re.I)),
    ("arxiv", re.compile(r"arxiv\.org/(?:abs|pdf)/([\w.-]+?(?:/\d{7})?)(?:\.pdf)?(?:[?#].*)?$", re.I)),
)
_ARXIV_DOI = "10.48550/arxiv."
# DOI prefixes that only preprint servers use: arXiv, OSF and PsyArXiv, Research Square, SSRN, ChemRxiv, Preprints.org,
# bioRxiv and medRxiv since 2025. Their older prefix is shared with a publisher, hence the digits.
_PREPRINT_DOI = re.compile(
    r"10\.(?:48550|31219|31234|31235|21203|2139|26434|20944|64898)/|10\.1101/(?:\d{6}|\d{4}\.\d\d\.\d\d\.\d+)(?:v|$)"
)
_PREPRINT_VENUE = re.compile(r"\b(?:\w*rxiv|preprints?|ssrn|research square|osf preprints)\b", re.I)
_NAMES = {"doi": "DOI", "pmid": "PMID", "pmcid": "PMCID", "arxiv": "arXiv id", "trial_id": "trial"}
_LIKE = "like titles and fitting authors"
# Reasons that make two sources one work, so that what is known of one holds for the other.
SAME_WORK = ("same document", "same DOI", "same PMID", "same PMCID", "same arXiv id", _LIKE)
_FEW_WORDS = 4  # shorter titles ("Introduction") say nothing about identity where authors are unknown
_STEPS = 2_000  # of the search for the heaviest choice; far more than real evidence needs


@dataclass(frozen=True)
class Author:
    family: str
    initial: str = ""

    def may_be(self, other: Author) -> bool:
        return self.family == other.family and (not self.initial or not other.initial or self.initial == other.initial)


@dataclass(frozen=True)
class Work:
    """What identifies a source, from its manifest entry."""

    id: str
    identifiers: frozenset[tuple[str, str]]
    words: frozenset[str]  # of the title
    authors: tuple[Author, ...]


def work(entry: Mapping[str, Any]) -> Work:
    """The identity of a manifest entry."""
    metadata = entry["metadata"]
    found = {author(str(name)) for name in metadata.get("authors") or ()} - {None}
    return Work(
        entry["id"],
        frozenset(_identifiers(entry)),
        frozenset(_words(str(metadata.get("title") or ""))),
        tuple(sorted((a for a in found if a), key=lambda a: (a.family, a.initial))),
    )


def author(name: str) -> Author | None:
    """ "Klein, R. A.", "R. A. Klein" and "Klein RA" as one author; None for "et al."."""
    name = " ".join(name.split())
    if not name or _NOBODY.fullmatch(name):
        return None
    if _GROUP.search(name):
        return Author(" ".join(_words(name)))
    if "," in name:
        family, given = (_words(part) for part in name.split(",", 1))
    else:
        words = [word for word in re.split(r"[\s.]+", name) if word and _plain(word) not in _SUFFIXES] or [name]
        # Initials that stand last, as PubMed writes them: "Klein RA", "van der Berg J".
        last_is_initials = len(words) > 1 and re.fullmatch(r"[^\W\d_a-z]{1,3}", words[-1]) and not name.isupper()
        names, others = (words[:-1], words[-1:]) if last_is_initials else (words[-1:], words[:-1])
        family, given = _words(" ".join(names)), _words(" ".join(others))
    family = [word for word in family if word not in _PARTICLES] or family
    given = [word for word in given if word not in _SUFFIXES | _PARTICLES]
    return Author("".join(family), given[0][0] if given else "") if family else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", _plain(text))


def _plain(text: str) -> str:
    """Lower case, without accents."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def _identifiers(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    metadata = entry["metadata"]
    if entry.get("document_id"):
        yield "document", str(entry["document_id"])
    for key in ("doi", "pmid", "pmcid", "arxiv", "trial_id"):
        if metadata.get(key):
            yield from _normalised(key, str(metadata[key]))
    for key, pattern in _IN_URL:
        if match := pattern.search(str(metadata.get("url") or "")):
            yield from _normalised(key, match.group(1))


def _normalised(key: str, value: str) -> Iterator[tuple[str, str]]:
    value = value.strip().casefold()
    if key == "doi":
        value = re.sub(r"^(?:https?://(?:dx\.)?doi\.org/|doi:\s*)", "", value).rstrip(".,;)")
        if value.startswith(_ARXIV_DOI):
            yield from _normalised("arxiv", value.removeprefix(_ARXIV_DOI))
            return
        if _PREPRINT_DOI.match(value):
            value = _VERSION.sub("", value)
    elif key == "arxiv":
        value = _VERSION.sub("", value.removeprefix("arxiv:"))
    elif key in ("pmid", "pmcid"):
        value = re.sub(r"\D", "", value)
    if value:
        yield key, value


def is_preprint(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata say, or the DOI or venue shows, that a source is a preprint."""
    if metadata.get("preprint") is not None:
        return metadata["preprint"] is True
    doi = re.sub(r"^(?:https?://(?:dx\.)?doi\.org/|doi:\s*)", "", str(metadata.get("doi") or "").strip().casefold())
    return bool(_PREPRINT_DOI.match(doi) or _PREPRINT_VENUE.search(str(metadata.get("venue") or "")))


def relation(a: Work, b: Work, *, author_overlap: float, title_similarity: float) -> str | None:
    """Why two sources are not independent, or None."""
    if shared := sorted(a.identifiers & b.identifiers):
        return f"same {_NAMES.get(shared[0][0], shared[0][0])}"
    common = min(
        sum(any(x.may_be(y) for y in q) for x in p) for p, q in ((a.authors, b.authors), (b.authors, a.authors))
    )
    shorter = min(len(a.authors), len(b.authors))
    alike = len(a.words & b.words) / len(a.words | b.words) if a.words | b.words else 0.0
    if alike >= title_similarity and (common or (not shorter and min(len(a.words), len(b.words)) >= _FEW_WORDS)):
        return _LIKE
    if shorter and common / shorter >= author_overlap:
        return "shared authors"
    return None


@dataclass(frozen=True)
class Choice:
    """The heaviest choice of sources no two of which are related. `exact` is False where the search was cut short."""

    ids: tuple[str, ...]
    weight: float
    exact: bool = True


def heaviest(weights: Mapping[str, float], related: set[frozenset[str]]) -> Choice:
    """The heaviest independent choice among the sources of `weights`; of equally heavy ones always the same.

    An exact search (branch and bound): evidence about one claim is small. Should it be so tangled that the search has
    to be cut short, the best choice found until then is a lower limit.
    """
    order = sorted(weights, key=lambda i: (-weights[i], *natural(i)))
    near = {i: {j for j in order if frozenset((i, j)) in related} for i in order}
    chosen: list[str] = []
    exact = True
    for component in _components(order, near):
        ids, whole = _search(component, weights, near)
        chosen += ids
        exact = exact and whole
    chosen.sort(key=natural)
    return Choice(tuple(chosen), math.fsum(weights[i] for i in chosen), exact)


def natural(source_id: str) -> tuple[str, int, str]:
    """Sorts S2 before S10."""
    match = re.fullmatch(r"(\D*)(\d{1,18})", source_id)
    return (match.group(1), int(match.group(2)), "") if match else (source_id, -1, source_id)


def _components(order: Sequence[str], near: Mapping[str, set[str]]) -> Iterator[list[str]]:
    seen: set[str] = set()
    for start in order:
        if start in seen:
            continue
        found, queue = {start}, [start]
        while queue:
            fresh = near[queue.pop()] - found
            found |= fresh
            queue += fresh
        seen |= found
        yield [i for i in order if i in found]


def _search(order: list[str], weights: Mapping[str, float], near: Mapping[str, set[str]]) -> tuple[list[str], bool]:
    best: tuple[float, list[str]] = (-1.0, [])
    steps = 0

    def limit(left: list[str]) -> float:
        # Of sources that are all related to each other, at most the heaviest counts.
        groups: list[list[str]] = []
        total = 0.0
        for i in left:
            for group in groups:
                if near[i].issuperset(group):
                    group.append(i)
                    break
            else:
                groups.append([i])
                total += weights[i]
        return total

    def visit(left: list[str], chosen: list[str], weight: float) -> None:
        nonlocal best, steps
        steps += 1
        if steps > _STEPS:
            return
        if weight > best[0] + 1e-12:
            best = (weight, list(chosen))
        if not left or weight + limit(left) <= best[0] + 1e-12:
            return
        first, rest = left[0], left[1:]
        # Deep, never deeper than there are sources: at most 200 by config/inference.yaml.
        visit([i for i in rest if i not in near[first]], [*chosen, first], weight + weights[first])
        visit(rest, chosen, weight)

    visit(order, [], 0.0)
    return best[1], steps <= _STEPS
