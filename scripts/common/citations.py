"""Citations in a synthesis: `[S1]`, lists `[S1, S3]`, ranges `[S2-S4]`. Resolved by code against the run's manifest.

Nothing is ever removed from the text: what cannot be resolved is reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from common.prompts import LIKE_A_CITATION

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


# What a source or a question can talk a model into, and what a Markdown viewer would obey: pictures and pages from
# elsewhere, and a reference list that did not come from the records.
# Nothing here may look twice at the same stretch: a hostile text would make it slow.
# Words that a viewer takes for a tag even where no ">" ends it. Of others ("<y") a whole tag must be there, or it must
# open a line: "a<b" and "n <30" are prose.
_TAGS = (
    "address|applet|article|aside|audio|basefont|bdo|bgsound|big|blink|blockquote|br|button|canvas|caption|center|cite|code|"
    "col|colgroup|datalist|dd|del|details|dialog|dir|div|dl|dt|fieldset|figcaption|figure|font|footer|frame|frameset|"
    "h[1-6]|head|header|hgroup|hr|iframe|ins|kbd|label|legend|li|listing|main|map|mark|marquee|math|menu|menuitem|nav|"
    "noembed|noframes|noscript|ol|optgroup|option|output|param|picture|plaintext|portal|pre|progress|samp|search|section|"
    "select|slot|small|source|span|strike|strong|sub|summary|sup|table|tbody|td|template|textarea|tfoot|th|thead|title|tr|"
    "track|tt|ul|var|wbr|xmp"
)
_ATTRIBUTE = r"""\s+[a-z_:@][\w.:@-]*+(?:\s*+=\s*+(?:"[^"<>]*+"|'[^'<>]*+'|[^\s"'=<>`]++))?+"""
_MARKUP = (
    ("image", re.compile(r"!\[[^\[\]\n]*\]\s*[(\[]")),
    ("link", re.compile(r"(?<!!)\[[^\[\]\n]*\]\((?:[^)\n]{0,500}\))?")),
    (
        "html",
        re.compile(
            r"<\s*(?:/\s*)?(?:a|base|body|embed|form|html|iframe|img|input|link|meta|object|script|style|svg|video)\b"
            rf"|</?(?:{_TAGS})\b"
            r"|<!(?:--|\[|[a-z]+)|<\?"  # from here on a viewer hides everything up to an end that may never come
            rf"|</?[a-z][\w:.-]*+(?:{_ATTRIBUTE})*+\s*+/?>"
            r"|^[ \t>]*</?[a-z][\w:.-]*(?=[\s/>]|$)"
            r"|<[a-z][a-z0-9+.-]{1,31}:[^\s<>]*>|<[^\s<>@]{1,64}@[^\s<>]+>",
            re.I | re.M,
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
