"""The text of a synthesis with what was found in its margin, for reading in a terminal.

A flagged sentence stands on lines of its own, a bar beside them, its id and the kinds of its flags below. What concerns
no sentence comes last. Escape sequences and invisible characters of
the text do not come through.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from common.text import clean
from ledger import Claim, Flag

BAR = "▌ "
_NARROWEST = 20
_SENTENCE, _KINDS, _OFF = "\x1b[33m", "\x1b[31m", "\x1b[0m"
_LONGEST_MARKER = 5
_WORD = re.compile(r"\s*\S+")


def margin(text: str, claims: Sequence[Claim], flags: Sequence[Flag], width: int = 80, colour: bool = False) -> str:
    """`text`, wrapped to `width` columns, with the kinds of `flags` under the sentences that they are about."""
    room = max(width, _NARROWEST) - len(BAR)
    kinds: dict[str, Counter[str]] = {claim.id: Counter() for claim in claims}
    rest = []
    for flag in flags:
        if flag.claim in kinds:
            kinds[flag.claim][flag.kind] += 1
        else:
            rest.append(flag)
    flagged = sorted((claim for claim in claims if kinds[claim.id]), key=lambda claim: claim.span)
    lines: list[str] = []
    first = 0  # the first flagged claim that has not ended yet
    cuts = [place for claim in flagged for place in claim.span]
    for start, end in _rows(text, room, cuts):
        here: list[Claim] = []
        while first + len(here) < len(flagged) and flagged[first + len(here)].span[0] < end:
            here.append(flagged[first + len(here)])
        shown = _row(text, start, end, here, colour)
        lines.append((BAR if here else " " * len(BAR)) + shown if shown.strip() else "")
        for claim in here:
            if claim.span[1] <= end or not text[end : claim.span[1]].strip():
                first += 1
                lines += _about(claim.id, kinds[claim.id], room, colour)
    while lines and not lines[-1]:
        lines.pop()
    if rest:
        lines.append("")
        for flag in rest:
            about = f"{flag.kind}: {flag.detail}"
            lines += [_painted(BAR + line, _KINDS, colour) for line in _wrapped(about, room)]
    return "\n".join(lines) + "\n"


def _about(name: str, kinds: Counter[str], room: int, colour: bool) -> list[str]:
    listed = ", ".join(kind if count == 1 else f"{kind} ×{count}" for kind, count in kinds.items())
    return [_painted(f"{BAR}{line}", _KINDS, colour) for line in _wrapped(f"└ {name} {listed}", room)]


def _painted(line: str, code: str, colour: bool) -> str:
    return f"{code}{line}{_OFF}" if colour else line


def _row(text: str, start: int, end: int, here: Sequence[Claim], colour: bool) -> str:
    pieces: list[tuple[str, bool]] = []
    for claim in here:
        first, last = max(start, claim.span[0]), min(end, claim.span[1])
        pieces += [(_shown(text[start:first]), False), (_shown(text[first:last]), True)]
        start = last
    pieces.append((_shown(text[start:end]), False))
    while pieces and not pieces[-1][0].strip():
        pieces.pop()
    if pieces:
        pieces[-1] = (pieces[-1][0].rstrip(), pieces[-1][1])
    return "".join(_painted(piece, _SENTENCE, colour and marked and bool(piece)) for piece, marked in pieces)


def _shown(piece: str) -> str:
    return re.sub(r"[\n\t]", " ", clean(piece))


def _columns(piece: str) -> int:
    if piece.isascii():
        return len(piece)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in piece
    )


def _lines(text: str, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The lines of the text as offsets, also cut at `cuts`, but not behind a list marker nor before white space alone."""
    start = 0
    number = 0
    for line in text.split("\n"):
        end = start + len(line)
        begin = start
        while number < len(cuts) and cuts[number] <= end:
            cut = cuts[number]
            number += 1
            if len(text[begin:cut].strip()) > _LONGEST_MARKER and text[cut:end].strip():
                yield begin, cut
                begin = cut + len(text[cut:end]) - len(text[cut:end].lstrip())
        yield begin, end
        start = end + 1


def _rows(text: str, room: int, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """The rows in which the text is shown, as offsets: its lines, wrapped between words."""
    for offset, stop in _lines(text, cuts):
        line = text[offset:stop]
        start, used = offset, 0
        for word in _WORD.finditer(line):
            begin, end = offset + word.start(), offset + word.end()
            wide = _columns(_shown(word.group()))
            if used and used + wide > room:
                yield start, begin
                begin = start = end - len(word.group().lstrip())
                used, wide = 0, _columns(_shown(text[start:end]))
            if used + wide > room:  # one word, or a script without spaces
                for place in range(begin, end):
                    step = _columns(_shown(text[place]))
                    if used + step > room:
                        yield start, place
                        start, used = place, 0
                    used += step
            else:
                used += wide
        yield start, stop


def _wrapped(line: str, room: int) -> list[str]:
    line = _shown(line)
    return [line[start:end].strip() for start, end in _rows(line, room)]
