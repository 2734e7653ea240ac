"""Citations in a synthesis: `[S1]`, lists `[S1, S3]`, ranges `[S2-S4]`. Resolved by code against the run's manifest.

Nothing is ever removed from the text: what cannot be resolved is reported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from common.prompts import LIKE_A_CITATION
from common.text import sentences

# One bracket of source ids, separated by comma, semicolon, "and" or "&"; a hyphen or dash between two ids is a range.
_ID = r"S[0-9]{1,6}"
_DASH = "[‐‑‒–—−-]"
_BRACKET = re.compile(rf"\[\s*({_ID}(?:\s*(?:[,;]\s*(?:and|&)|[,;&]|and|{_DASH})\s*{_ID})*)\s*\]")
_PART = re.compile(rf"({_ID})(?:\s*{_DASH}\s*({_ID}))?")
# Brackets that look like a citation and are not one of ours: "[3]", "[SOURCE 2]", "[Source: S1]", "[S1, p. 4]".
_FOREIGN = re.compile(rf"\[(?={LIKE_A_CITATION})[^\[\]]*\]", re.I)
# Marks that models use where they should cite: footnotes "[^1]", and "【3†source】".
_MARK = re.compile(r"\[\^[\w-]{1,30}\]|【(?=[^【】\n]{0,40}\d)[^【】\n]{1,60}】")
_ANY = re.compile(rf"{_BRACKET.pattern}|(?i:{_FOREIGN.pattern})|{_MARK.pattern}")
_BRACKETS = rf"(?:{_BRACKET.pattern}\s*)+"
_ONLY_BRACKETS = re.compile(rf"{_BRACKETS}\.?")
_AFTER_STOP = re.compile(rf"(?<!\bet al)([.!?][\"'”’)]*)\s*({_BRACKETS})")
_LETTER = re.compile(r"[^\W\d_]")
_HEADING = re.compile(r"#.*|\*\*[^*]+\*\*:?")
_LONGEST_RANGE = 200


def cited(text: str) -> list[str]:
    """The ids cited in a text, in order of appearance, each once; ranges are spelled out."""
    found: dict[str, None] = {}
    for bracket in _BRACKET.finditer(text):
        for first, last in _PART.findall(bracket.group(1)):
            for source_id in _spell_out(first, last):
                found.setdefault(source_id)
    return list(found)


def _spell_out(first: str, last: str) -> Iterator[str]:
    if not last:
        yield first
        return
    start, end = int(first[1:]), int(last[1:])
    if start < end <= start + _LONGEST_RANGE:
        yield from (f"S{number}" for number in range(start, end + 1))
    else:
        yield from (first, last)


def malformed(text: str) -> list[str]:
    """Brackets that look like citations but are not in the agreed form, as written."""
    return [m.group() for m in _FOREIGN.finditer(text) if not _BRACKET.fullmatch(m.group())]


@dataclass(frozen=True)
class Bracket:
    """A citation where it stands: `ids` are spelled out and empty where it is not in the agreed form."""

    start: int
    end: int
    text: str
    ids: list[str]


def brackets(text: str) -> list[Bracket]:
    """Everything in a text that is a citation or looks like one, in order: also footnote marks, which `malformed` leaves."""
    return [Bracket(*match.span(), match.group(), cited(match.group())) for match in _ANY.finditer(text)]


@dataclass(frozen=True)
class Claim:
    """One sentence of a synthesis: its text, the ids it cites that exist, and those that do not."""

    text: str
    cited: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)


def claims(synthesis: str, known: Collection[str]) -> list[Claim]:
    """Split a synthesis into sentences and resolve the citations of each against the `known` source ids.

    Headings that cite nothing and lines without a letter carry no claim and are left out; what does not resolve is
    reported wherever it stands. A citation that follows the full stop ("… failed. [S2] Later …"), or stands on a line
    of its own, belongs to the sentence before it.
    """
    found = []
    for sentence in _claim_sentences(synthesis):
        ids = cited(sentence)
        claim = Claim(sentence, [i for i in ids if i in known], [i for i in ids if i not in known], malformed(sentence))
        if claim.unknown or claim.malformed or _LETTER.search(_BRACKET.sub("", sentence)):
            found.append(claim)
    return found


def _claim_sentences(synthesis: str) -> Iterator[str]:
    for line in _lines(synthesis):
        if _HEADING.fullmatch(line) and not cited(line) and not malformed(line):
            continue
        line = re.sub(r"^(?:#+|[-*+•]|\d{1,2}[.)])\s+", "", line)
        # A bracket that follows a full stop moves in front of it, so that it stays with its sentence.
        line = _AFTER_STOP.sub(lambda match: f" {match.group(2).strip()}{match.group(1)} ", line)
        yield from sentences(line)


def _lines(synthesis: str) -> list[str]:
    lines: list[str] = []
    for line in map(str.strip, synthesis.split("\n")):
        if lines and _ONLY_BRACKETS.fullmatch(line):
            lines[-1] += f" {line}"
        elif line:
            lines.append(line)
    return lines


# What a source or a question can talk a model into, and what a Markdown viewer would obey: pictures and pages from
# elsewhere, and a reference list that did not come from the records.
# Nothing here may look twice at the same stretch: a hostile text would make it slow.
_MARKUP = (
    ("image", re.compile(r"!\[[^\[\]\n]*\]\s*[(\[]")),
    ("link", re.compile(r"(?<!!)\[[^\[\]\n]*\]\((?:[^)\n]{0,500}\))?")),
    (
        "html",
        re.compile(
            r"<\s*(?:/\s*)?(?:a|base|body|embed|form|html|iframe|img|input|link|meta|object|script|style|svg|video)\b",
            re.I,
        ),
    ),
    (
        "reference list",
        re.compile(
            r"^[ \t#*_>-]*(?:\d{1,2}[.)][ \t*_]*)?(?:references?(?: list)?|list of (?:references|sources)|bibliography|"
            r"works cited|cited works|literature(?: cited)?|sources(?: cited)?|citations|further reading)\b[ \t:*_#]*$",
            re.I | re.M,
        ),
    ),
)


@dataclass(frozen=True)
class Markup:
    """Something that is not plain cited text: an image, a link, html, or the heading of a reference list."""

    name: str
    start: int
    text: str


def markup_at(synthesis: str) -> list[Markup]:
    """What is not plain cited text, and where."""
    return [
        Markup(name, match.start() + len(match.group()) - len(match.group().lstrip()), match.group().strip())
        for name, pattern in _MARKUP
        for match in pattern.finditer(synthesis)
    ]


def markup(synthesis: str) -> list[dict[str, str]]:
    """One flag of kind `markup` for each thing in a synthesis that is not plain cited text."""
    return [{"kind": "markup", "detail": found.name, "claim": found.text} for found in markup_at(synthesis)]


def flags(found: list[Claim]) -> list[dict[str, str]]:
    """What a reader must know before trusting the text: one entry per problem, with the sentence it stands in.

    kinds: `unknown_source` (an id that was never retrieved: fabricated), `malformed_citation`, `uncited` (a sentence
    without any citation).
    """
    report: list[dict[str, str]] = []
    for claim in found:
        for source_id in claim.unknown:
            report.append({"kind": "unknown_source", "detail": source_id, "claim": claim.text})
        for bracket in claim.malformed:
            report.append({"kind": "malformed_citation", "detail": bracket, "claim": claim.text})
        if not claim.cited and not claim.unknown and not claim.malformed:
            report.append({"kind": "uncited", "detail": "no citation", "claim": claim.text})
    return report
