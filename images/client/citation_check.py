"""Level 0: are the citations in order? Always run, without a model, the same on every machine.

Kinds of flags (check "citation"):
    uncited             a fact or a method without any citation
    number_uncited      a number in such a sentence, or in a hedge, without any citation
    unknown_source      an id that was never retrieved: made up
    malformed_citation  a bracket that looks like a citation and is not in the agreed form
    author_year         authors or a year that fit none of the sources cited in the sentence (of all sources, where it
                        cites none), and of which these sources do not speak themselves either
    reference_list      a bibliography written by the model; ours is rendered from the records
    markup              an image, a link or HTML, which a viewer would obey
    no_claims           nothing in the whole text says anything that could be checked
    unused_source       a source that no sentence cites: a note (NOTES), which makes no run fail

What this cannot see: whether a source says what is claimed with it (grounding and entailment look at that), and whether
a sentence is of the right kind (see kinds). Nothing is repaired.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import kinds
import mentions
from common.citations import brackets, markup_at
from ledger import Claim, Flag
from split import bare

NOTES = frozenset({"unused_source"})

# One line of a bibliography: "Smith, J. A. (2019). …", "Smith J, Roe A. …. 2019;12:3", a DOI. What opens the line is taken
# once and not given back ("*+"): the two runs of marks share the asterisk, and a line of asterisks would be slow.
_REFERENCE = re.compile(
    r"^[ \t>*+-]*+(?:\[?\w{1,6}\]?[.:)]?[ \t]+)?[*_]*+(?:"
    r"[^\W\d_][\w'’-]+,[ \t]+(?:[^\W\d_]\.[ -]?){1,4}[^\n]{0,300}?\(?\b(?:1[89]|20)\d\d[a-z]?\)?[.,:*_][ \t*_]"
    r"|[^\W\d_][\w'’-]+ [A-Z]{1,3}[,.][^\n]{0,400}?\b(?:1[89]|20)\d\d[^\n;]{0,10};[ ]?\d+"
    r")|^[^\n]{0,600}?\b(?:doi\.org/|doi:[ ]?)10\.\d{4}|^[ \t#*_>-]*(?:references|bibliography|works cited)[*_]*:[*_ ]*\S"
    r"|^[ \t#*_>-]*sources?[*_]*:[*_ ]*\[",
    re.I | re.M,
)
_SHOWN = 60


def check(text: str, claims: Sequence[Claim], manifest: Sequence[Mapping[str, Any]]) -> list[Flag]:
    """What a reader must know of the citations of a synthesis, in the order of its sentences, then of its sources.

    Each claim's checks["citation"] gets the kinds of its flags, an empty list where it is clean.
    """
    sources = {str(entry["id"]): entry for entry in manifest}
    library = _Library(sources)
    found: list[Flag] = []
    for claim in claims:
        found += _of_claim(claim, library)
    found += _of_text(text, claims, library)
    order = {claim.id: number for number, claim in enumerate(claims)}
    found.sort(key=lambda flag: order.get(flag.claim or "", len(order)))
    for claim in claims:
        claim.checks["citation"] = {"flags": []}
    for flag in found:
        if flag.claim in order:
            claims[order[flag.claim]].checks["citation"]["flags"].append(flag.kind)
    cited = {source for claim in claims for source in claim.cited}
    for source, entry in sources.items():
        if source not in cited:
            found.append(
                Flag("citation", "unused_source", f"no sentence cites {source}, {_label(entry)}", source=source)
            )
    return found


def _of_claim(claim: Claim, library: _Library) -> list[Flag]:
    def flag(kind: str, detail: str, source: str | None = None) -> Flag:
        return Flag("citation", kind, detail, claim.id, source)

    found = []
    said = unicodedata.normalize("NFC", claim.bare)
    named = mentions.find(said)
    cites = claim.cited or claim.unknown or claim.malformed
    if not cites and claim.kind in ("fact", "method"):
        found.append(flag("uncited", f"a {claim.kind} without a citation"))
    if not cites and claim.kind != "meta" and (number := kinds.number(said, named)):
        found.append(flag("number_uncited", f"the number {number} without a citation"))
    for source in claim.unknown:
        found.append(flag("unknown_source", f"{source} was never retrieved", source))
    for bracket in claim.malformed:
        found.append(flag("malformed_citation", f"{bracket[:_SHOWN]} is not in the form [S1]"))
    found += [flag("author_year", detail) for detail in library.contradictions(named, claim.cited)]
    return found


class _Library:
    """The sources of a run, as authors and years are looked up in them."""

    def __init__(self, sources: Mapping[str, Mapping[str, Any]]) -> None:
        self.sources = sources
        self._folded: dict[str, str] = {}
        self._known: dict[tuple[tuple[str, ...], int | None, str], bool] = {}

    def contradictions(self, named: Iterable[mentions.Mention], cited: Sequence[str]) -> list[str]:
        """A sentence for each mention that fits none of the cited sources (of all, where none is cited)."""
        candidates = list(cited) or list(self.sources)
        details = []
        for mention in named:
            if not candidates or any(self._fits(mention, source) for source in candidates):
                continue
            others = [source for source in self.sources if source not in candidates and self._fits(mention, source)]
            what = (
                f"fits none of the {len(candidates)} sources"
                if len(candidates) > 1
                else f"does not fit {candidates[0]}, {_label(self.sources[candidates[0]])}"
            )
            if cited and len(candidates) > 1:
                what = f"fits none of the cited sources {', '.join(candidates)[:200]}"
            hint = f"; it would fit {', '.join(others[:3])}" if others else ""
            details.append(f"“{mention.text[:_SHOWN]}” {what}{hint}")
        return list(dict.fromkeys(details))

    def _fits(self, mention: mentions.Mention, source: str) -> bool:
        entry = self.sources[source]
        metadata = entry.get("metadata") or {}
        if mentions.fits(mention, metadata):
            return True
        if source not in self._folded:
            # Kept apart, so that no name of one stands near a year of another.
            parts = (
                metadata.get("title"),
                f"{metadata.get('venue') or ''} {metadata.get('year') or ''}",
                entry.get("text"),
            )
            self._folded[source] = f" {'|' * 100} ".join(mentions.fold(str(part or "")) for part in parts)
        key = (mention.families, mention.year, source)
        if key not in self._known:
            self._known[key] = mentions.stands_in(mention, self._folded[source])
        return self._known[key]


def _label(entry: Mapping[str, Any]) -> str:
    return str(entry.get("label") or "").split(" · ")[0][:_SHOWN]


def _of_text(text: str, claims: Sequence[Claim], library: _Library) -> list[Flag]:
    starts = [claim.span[0] for claim in claims]

    def at(position: int) -> str | None:
        number = bisect_right(starts, position) - 1
        return claims[number].id if number >= 0 and position < claims[number].span[1] else None

    found = []
    listed = False
    for item in markup_at(text):
        if item.name == "reference list":
            listed = True
            found.append(
                Flag("citation", "reference_list", f"“{item.text[:_SHOWN]}” was written by the model", at(item.start))
            )
        else:
            found.append(Flag("citation", "markup", f"{item.name}: {item.text[:_SHOWN]}", at(item.start)))
    if not listed and (entry := _REFERENCE.search(text)):
        line = text[entry.start() :].split("\n", 1)[0]
        number = bisect_left(starts, entry.start())
        inside = number < len(claims) and starts[number] < entry.start() + len(line)
        found.append(
            Flag(
                "citation",
                "reference_list",
                f"“{line.strip()[:_SHOWN]}” reads as an entry of a reference list",
                claims[number].id if inside else None,
            )
        )
    if all(claim.kind == "meta" for claim in claims):
        found.append(Flag("citation", "no_claims", "the text makes no claim that could be checked"))
    # Headings and headers of tables are no claims, but they must not name authors that no source has either.
    ends = [0, *(claim.span[1] for claim in claims)]
    for start, end in zip(ends, [*starts, len(text)], strict=True):
        for line in text[start:end].split("\n"):
            if any(char.isdigit() for char in line) or any(word in line for word in ("et al", " and ", "&")):
                said = unicodedata.normalize("NFC", bare(_without(line)))
                for detail in library.contradictions(mentions.find(said), ()):
                    found.append(Flag("citation", "author_year", detail))
    return found


def _without(line: str) -> str:
    for bracket in reversed(brackets(line)):
        line = line[: bracket.start] + line[bracket.end :]
    return line
