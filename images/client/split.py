"""A synthesis split into claims: each sentence with its exact place, its citations, and its kind.

Nothing is changed and nothing is lost: every letter of the text is in a claim, save those of headings, list markers, a
table's header and fence lines; and these become a claim, too, where they cite or state a figure, or where a heading is
a whole sentence. The text is Markdown as models write it: paragraphs, lists (also nested), tables (a row is a claim),
quotes, bold lead-ins, fences (what is inside is text). Sentences inside a quotation or parenthesis belong to the one
around them.

Citations are set aside before the sentences are found, so that adding one does not move their ends; then each goes to
the sentence in which it stands. A citation after the full stop, or on a line of its own, belongs to the sentence before
it; one that opens the next sentence as its subject ("… helped. [S2] found …") belongs to that.

What it cannot see: a sentence whose full stop has no space behind it ("end.Start"), an abbreviation that it does not
know before a capital letter, and that a heading which does not read as a sentence may still claim something.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import kinds
from common.citations import Bracket, brackets
from ledger import Claim

# --- blocks: the lines of the text that belong together ---------------------------------------------------------------

_QUOTE = re.compile(r"[ \t]*>")
_MARKER = re.compile(
    r"[ \t]*(?:[-*+•‣▪◦●–—·](?=[ \t]|$)|\(?(?P<number>\d{1,2})[.)](?=[ \t]|$)|\(?[a-zA-Z]\)(?=[ \t])|\[\^[\w-]{1,30}\]:|\[[ xX]\](?=[ \t]))[ \t]*"
)
_FENCE = re.compile(r"[ \t]*(?:`{3,}[^`]*|~{3,}.*)$")
_HEADING = re.compile(r"[ \t]*(#{1,6})(?:[ \t]+|$)|[ \t]*(#{2,6})(?=\S)")
_UNDERLINE = re.compile(r"[ \t]*(?:=+|-{2,})[ \t]*$")
_BOLD_LINE = re.compile(r"[ \t]*(\*\*|__)(?=\S)([^*_]+)\1[ \t]*(:?)[ \t]*$")
_TABLE_RULE = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")
_ROW = re.compile(r"[ \t]*\|")
_STOPPED = re.compile(r"[.!。！][\"'”’)\]*_]*$")
# Numbers that name or count the parts of a text, of a table or of a study, and so claim nothing in a heading.
_NUMBERING = re.compile(r"^\W*(?:\d{1,2}[.)]|\d{1,2}(?:\.\d{1,2})+\.?(?=\s+[^\W\d_a-z]))\s")
_UNIT = re.compile(
    r"\b\d\d ?% ?(?:CI|CrI|confidence|credible)\b(?!\W{0,3}\d)|\b(?:day|week|month|year|session|visit|time|level|arm|site|sample)s? \d{1,3}\b(?! ?%)",
    re.I,
)
_BARE_HEADING_LEVEL = 7  # a bold line: below every numbered level
_LONGEST_LABEL = 12  # words: a longer bold line is a sentence, whether or not it ends with a full stop
_LONGEST_BOLD_LABEL = 5  # words: a longer bold line that no colon ends is taken for a sentence
_SHORTEST_SENTENCE = 4  # words: a shorter heading that ends with a full stop is a heading
_SHORT_LINE = 40  # characters: a line that ends earlier, before a capital, was not wrapped but ended


@dataclass
class _Block:
    """Stretches of lines, without quote and list markers, that make up a paragraph, an item, a row or a heading."""

    shape: str  # text, item, row, header, heading
    lines: list[tuple[int, int]] = field(default_factory=list)
    level: int = 0
    depth: int = 0  # of quotes


def _blocks(text: str) -> Iterator[_Block]:
    spans = []
    start = 0
    for line in text.split("\n"):
        spans.append((start, start + len(line)))
        start += len(line) + 1
    block = _Block("text")
    in_table = False
    for number, (start, end) in enumerate(spans):
        line = text[start:end]
        depth = 0
        while mark := _QUOTE.match(line, 0):
            depth += 1
            start += mark.end()
            line = line[mark.end() :]
            if depth == 100:  # deeper is play
                break
        if not line.strip() or _FENCE.match(line):
            if block.lines:
                yield block
            block, in_table = _Block("text"), False
            if line.strip() and brackets(line):
                yield _Block("text", [(start, end)])
            continue
        following = text[slice(*spans[number + 1])] if number + 1 < len(spans) else ""
        if _UNDERLINE.match(line) and len(block.lines) == 1 and block.shape == "text" and depth == block.depth:
            title = text[slice(*block.lines[0])]
            if "=" in line or not (
                _STOPPED.search(title.rstrip()) or brackets(title) or len(title.split()) > _LONGEST_LABEL
            ):
                yield _Block("heading", block.lines, 1 if "=" in line else 2)
                block = _Block("text")
                continue
        if not any(char.isalnum() for char in line):
            # A rule, a table's rule, or other decoration.
            if block.lines:
                yield block
            in_table = "|" in line and bool(_TABLE_RULE.match(line)) and "-" in line
            block = _Block("text")
            continue
        is_header = (
            "|" in line and "|" in following and "-" in following and bool(_TABLE_RULE.match(_unquoted(following)))
        )
        if is_header or _ROW.match(line) or (in_table and "|" in line):
            if block.lines:
                yield block
            block = _Block("text")
            yield _Block("header" if is_header else "row", [(start, end)])
            continue
        in_table = False
        if heading := _HEADING.match(line):
            if block.lines:
                yield block
            block = _Block("text")
            yield _Block("heading", [(start + heading.end(), end)], len(heading.group(1) or heading.group(2)))
            continue
        item = None
        while mark := _MARKER.match(line):
            if mark["number"] not in (None, "1") and item is None and _runs_on(text, block):
                break  # a wrapped line that begins with a number
            item = mark
            start += mark.end()
            line = line[mark.end() :]
        bold = _BOLD_LINE.match(line)
        if item or bold or depth != block.depth:
            if block.lines:
                yield block
            block = _Block("item" if item else "text", depth=depth)
        if bold and (not item or bold[2].rstrip().endswith(":") or bold[3] or _has_more(text, spans, number)):
            yield _Block("heading", [(start, end)], _BARE_HEADING_LEVEL)
            block = _Block("text")
        elif line.strip():
            block.lines.append((start, end))
    if block.lines:
        yield block


def _runs_on(text: str, block: _Block) -> bool:
    """Is this a paragraph whose last line has not come to an end?"""
    if block.shape == "item" or not block.lines:
        return False
    line = text[slice(*block.lines[-1])].rstrip()
    return not (line.endswith((":", "]")) or _STOPPED.search(line[-20:]))


def _unquoted(line: str) -> str:
    return line.lstrip("> \t")


def _has_more(text: str, spans: list[tuple[int, int]], number: int) -> bool:
    """Does a deeper line follow, so that this item is a label above others?"""
    start, end = spans[number]
    indent = end - start - len(text[start:end].lstrip())
    for start, end in spans[number + 1 : number + 3]:
        if line := text[start:end].strip():
            return end - start - len(text[start:end].lstrip()) > indent and bool(line)
    return False


# --- sentences --------------------------------------------------------------------------------------------------------

# A full stop after these ends no sentence…
_NEVER_LAST = frozenset("e.g i.e eg ie cf vs viz ca approx dr prof mr mrs ms mt resp incl et ibid".split())
# …after these only before a word that opens sentences…
_SELDOM_LAST = frozenset("ph.d p pp al etc jr sr inc ltd st dept univ esp".split())
# …and after these only where no number or label follows.
_NUMBERED = frozenset(
    "fig figs no nos eq eqs ref refs sec secs ch chap vol tab art ed eds app jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_OPENERS = frozenset(
    "a after all although an another as at because before both but by even findings for further here how however if in it "
    "its later many more most neither no nor of on one only other others our overall participants results several since "
    "some studies such that the their then there these they this those thus to two we what when where whether which while "
    "with yet".split()
)
# After these a single capital is a name of a thing ("vitamin C.", "group B."), not an initial.
_LETTERED = frozenset(
    "vitamin vitamins hepatitis group groups type study experiment arm condition phase class grade appendix panel part "
    "factor sample site influenza plan option model cohort".split()
)
_STOPS = re.compile(
    r"(?P<stop>[.!?…]+)(?P<close>[\"'”’»)\]*_]*)|(?P<hard>[。！？｡।॥؟۔]+)[\"'”’»)\]*_」』）】]*|(?P<line>\n)"
)
_NEXT = re.compile(r"\s+[\"'“‘«(\[*_¿¡`]*(\S?)(\S*)")
_WORD_BEFORE = re.compile(r"([^\s(\[\"'“‘/—–]*)$")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]{1,2}", re.I)
_ALNUM = re.compile(r"[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")
_LABEL = re.compile(r"[\d(#]|[A-Z]?\d|[IVX]+\b|[A-Z]\b")
_SUBJECT = frozenset(
    "found finds reported reports showed shows suggests suggested observed argues argued concluded concludes also did does "
    "was is had has tested examined examines compared compares describes described studied notes noted reviewed measured "
    "replicated saw says states failed used reviews".split()
)
_CLOSED_BY = {'"': '"', "“": "”", "«": "»", "(": ")", "「": "」"}
_PAIRS = re.compile('["“”«»()「」]')
_DEEPEST = 8
_LONGEST_QUOTE = 400  # characters after which we do not wait for the closing mark
_LEAD_IN_WORDS = 3
_BOLD_LEAD_IN = re.compile(r"\s*(\*\*|__)(?=\S)([^*_]+)\1\s*")


@dataclass
class _Plain:
    """A block without its citations. `at` gives each character's place in the synthesis."""

    text: str
    at: list[int]
    marks: list[tuple[int, Bracket]]  # citations with the place in `text` where they were taken out


def _plain(text: str, block: _Block) -> _Plain:
    flat: list[str] = []
    places: list[int] = []
    for start, end in block.lines:
        if flat:
            flat.append("\n")
            places.append(start - 1)
        flat.extend(text[start:end])
        places.extend(range(start, end))
    joined = "".join(flat)
    kept: list[str] = []
    at: list[int] = []
    marks: list[tuple[int, Bracket]] = []
    position = 0
    for bracket in brackets(joined):
        kept.extend(flat[position : bracket.start])
        at.extend(places[position : bracket.start])
        position = bracket.end
        # "et al [S1]." reads "et al." without its citation, "failed.[S1]Later" reads "failed. Later".
        if joined[position : position + 1] in tuple(".,;:!?)]…。，；：！？"):
            while kept and kept[-1].isspace():
                kept.pop()
                at.pop()
            marks.append((len(kept), bracket))
        else:
            marks.append((len(kept), bracket))
            kept.append(" ")
            at.append(places[bracket.end - 1])
        # Where it stands in the synthesis, not in the block.
        marks[-1] = (marks[-1][0], _moved(bracket, places))
    kept.extend(flat[position:])
    at.extend(places[position:])
    return _Plain("".join(kept), at, marks)


def _moved(bracket: Bracket, places: list[int]) -> Bracket:
    return Bracket(places[bracket.start], places[bracket.end - 1] + 1, bracket.text, bracket.ids)


def _sentences(plain: _Plain) -> tuple[list[tuple[int, int]], set[int]]:
    """Where each sentence begins and ends in `plain.text`; and the sentences that have a citation as their subject."""
    text = plain.text
    marked = [position for position, _ in plain.marks]
    found: list[tuple[int, int]] = []
    subjects: set[int] = set()
    start = _first_solid(text, 0)
    lettered = _first(_LETTER, text, start)
    lead_in = _BOLD_LEAD_IN.match(text)
    held = lead_in.end() if lead_in and len(lead_in[2].split()) <= _LEAD_IN_WORDS else 0
    line_start = 0
    solid = _solids(text)
    quotes = _Quotes(text)
    for match in _STOPS.finditer(text):
        end = match.end()
        if match["line"]:
            is_end = lettered < end and _line_ends(text, line_start, match.start(), solid[end], marked)
            line_start, end = match.end(), match.start()
        elif match["hard"]:
            is_end = True
        else:
            is_end, subject = _stop_ends(text, match, marked)
            if subject and lettered < end:
                subjects.add(len(found) + 1)
        if not match["line"]:
            is_end = is_end and not quotes.open(end)
        # A number of a list ("1."), or a bold label ("**Limits.**"), belongs to what follows.
        if not is_end or lettered >= end or end < held or (match["stop"] and end == held):
            continue
        found.append((start, _last_solid(text, start, end)))
        start = _first_solid(text, end)
        lettered = _first(_LETTER, text, start)
        quotes.restart(start)
    if _first(_ALNUM, text, start) < len(text):
        found.append((start, _last_solid(text, start, len(text))))
    return found, {number for number in subjects if number < len(found)}


class _Quotes:
    """Is a place inside a quotation or a parenthesis? Sentences in there belong to the one around them."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.restart(0)

    def restart(self, place: int) -> None:
        """A new sentence begins: what was opened and never closed does not reach into it."""
        self._place = place
        self._stack: list[str] = []

    def open(self, place: int) -> bool:
        """Is something open here that closes soon? Places must be asked for in order."""
        for match in _PAIRS.finditer(self._text, self._place, place):
            char = match.group()
            if self._stack and self._stack[-1] == char:
                self._stack.pop()
            elif char in _CLOSED_BY and len(self._stack) < _DEEPEST:
                self._stack.append(_CLOSED_BY[char])
        self._place = max(self._place, place)
        return bool(self._stack) and self._text.find(self._stack[0], place, place + _LONGEST_QUOTE) >= 0


def _first(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.search(text, start)
    return match.start() if match else len(text)


def _solids(text: str) -> list[int]:
    """For each place the next one that holds no white space."""
    places = [len(text)] * (len(text) + 1)
    for place in range(len(text) - 1, -1, -1):
        places[place] = places[place + 1] if text[place].isspace() else place
    return places


def _first_solid(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _last_solid(text: str, start: int, end: int) -> int:
    while end > start and text[end - 1].isspace():
        end -= 1
    return end


def _line_ends(text: str, start: int, end: int, after: int, marked: list[int]) -> bool:
    """Does the line break at `end`, with the next word at `after`, end a sentence?

    Models do not wrap lines, but what they quote may be wrapped.
    """
    line = text[start:end]
    if line.endswith("  ") and _no_mark(marked, end - 2, end):  # Markdown's hard break
        return True
    if line.rstrip().endswith((":", "：", "\\")):
        return True
    following = text[after : after + 1]
    if not following or following.islower() or not (following.isalnum() or following in "*_\"“'‘("):
        return False
    if following in "*_\"“'‘(" and text[after : after + 4].strip("*_\"“'‘(")[:1].islower():
        return False
    return len(line.strip()) < _SHORT_LINE or not _no_mark(marked, _last_solid(text, start, end), end)


def _no_mark(marked: list[int], first: int, last: int) -> bool:
    return bisect_right(marked, last) == bisect_right(marked, first - 1)


def _stop_ends(text: str, match: re.Match[str], marked: list[int]) -> tuple[bool, bool]:
    """Does this stop end a sentence? And is the citation behind it the subject of the next one?"""
    after = _NEXT.match(text, match.end())
    if not after:
        return False, False  # "0.5", "end.Start"; or the end of the block, which needs no decision
    first, rest = after.group(1), after.group(2)[:40]
    if not first:
        return False, False
    stop = match["stop"]
    before = _WORD_BEFORE.search(text[max(0, match.start() - 30) : match.start()])
    word = before.group(1).strip("*_") if before else ""
    word_after = (first + rest).strip(".,;:!?*_\"'”’)").lower()
    if first.islower():
        mixed = any(char.isupper() for char in re.split(r"[^\w]", first + rest, maxsplit=1)[0])  # "mRNA", "eGFR"
        subject = (
            word_after in _SUBJECT
            and stop in (".", "!", "?")
            and not _abbreviates(text, match.start(), word, first, rest, word_after)
            and not _no_mark(marked, match.end(), after.start(1) - 1)
        )
        return mixed or subject, subject
    if not (first.isalnum() or first in ".~<>≤≥$€£±+−-–—=≈•"):
        return False, False
    if not first.isalnum() and not rest[:1].isalnum() and first not in "–—•":
        return False, False
    return not (
        stop == "."
        and not _after_mark(marked, match.start(), word)
        and _abbreviates(text, match.start(), word, first, rest, word_after)
    ), False


def _after_mark(marked: list[int], position: int, word: str) -> bool:
    """Was a citation taken out right before this stop? Then the stop is not an abbreviation's own: "et al [S1]."."""
    return word.lower() in _SELDOM_LAST and not _no_mark(marked, position, position)


def _abbreviates(text: str, position: int, word: str, first: str, rest: str, word_after: str) -> bool:
    """Is the full stop at `position` behind `word` part of an abbreviation, and the sentence goes on?"""
    lower = word.lower()
    if lower in _NEVER_LAST:
        return True
    if lower in _NUMBERED:
        return bool(_LABEL.match(first + rest))
    if lower in _SELDOM_LAST or _DOTTED.fullmatch(word):
        return word_after not in _OPENERS
    if len(word) == 1 and word.isupper() and word.isascii():
        earlier = text[max(0, position - 30) : position - 1].split()
        if word == "I" or (earlier and earlier[-1].lower().strip("(*_") in _LETTERED):
            return False
        return word_after not in _OPENERS or len(word_after) == 1
    return False


# --- claims -----------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"!?\[([^\[\]\n]*)\]\([^)\n]{0,500}\)")
_EMPHASIS = re.compile(r"\*+(?=\S)|(?<=\S)\*+|(?<!\w)_+(?=\S)|(?<=\S)_+(?!\w)|`+|~~")
_EMPTY = re.compile(r"\(\s*\)")
_BEFORE_STOP = re.compile(r"\s+(?=[.,;:!?)\]](?:\s|$))")
_CELLS = re.compile(r"\s*\|\s*")


@dataclass
class _Sentence:
    span: tuple[int, int]
    plain: str
    marks: list[Bracket]


def split(text: str, known: Collection[str]) -> list[Claim]:
    """Every sentence of a synthesis as a claim, in order; its citations resolved against the `known` source ids."""
    known = frozenset(known)
    claims: list[Claim] = []
    section = ""
    closing = 0  # the level of the heading under which everything is meta
    lead_in = (
        ""  # of a closing part without a heading: its label stood alone, or what of it was last (paragraph, item, list)
    )
    follows = False  # does this block follow the last claim, with no heading between them?
    for block in _blocks(text):
        plain = _plain(text, block)
        if block.shape == "heading":
            title = bare(plain.text)
            if not closing or block.level <= closing:
                closing = block.level if kinds.changes(title) or kinds.lists_references(title) else 0
                lead_in = ""
            section = title.rstrip(":").rstrip()
            follows = False
            if not plain.marks and not _claims_something(block, title):
                continue
        elif block.shape == "header" and not plain.marks and not _states_figure(bare(plain.text)):
            continue
        elif block.shape in ("text", "item") and (label := _label(plain.text)):
            # "**What would change this:** a trial …", "What would change this?"
            closing, section, follows = _BARE_HEADING_LEVEL, label, False
            lead_in = _lead_in(plain.text, label, block.shape)
        elif lead_in:
            # Such a part has one paragraph and one list: what comes then is the answer again.
            if block.shape == "item" and lead_in != "item":
                lead_in = "list"
            elif block.shape == "text" and lead_in == "alone":
                lead_in = "paragraph"
            else:
                closing, lead_in, section = 0, "", ""
        sentences = _in_block(block, plain)
        if follows and block.shape == "text" and sentences and not _ALNUM.search(sentences[0].plain):
            _extend(claims[-1], text, sentences.pop(0), known)
        for sentence in sentences:
            claims.append(_claim(len(claims) + 1, text, sentence, section, bool(closing), known, block.shape))
        follows = follows or bool(sentences)
    return claims


def _claims_something(block: _Block, title: str) -> bool:
    """Does a heading without a citation read as a sentence, so that it must be checked as one?"""
    if not _LETTER.search(title):
        return False
    words = len(title.split())
    long = block.level == _BARE_HEADING_LEVEL and words > _LONGEST_BOLD_LABEL and not title.endswith((":", "："))
    return long or _states_figure(title) or (words >= _SHORTEST_SENTENCE and bool(_STOPPED.search(title)))


def _states_figure(title: str) -> bool:
    return kinds.states_figure(_UNIT.sub("", _NUMBERING.sub("", title)))


def _lead_in(plain: str, label: str, shape: str) -> str:
    """Is there more in the block than the label that opens the closing part?"""
    behind = bare(plain)[len(label) :]
    if not any(char.isalnum() for char in behind):
        return "alone"
    return "item" if shape == "item" else "paragraph"


def _label(plain: str) -> str:
    """The label that opens a closing part without a heading of its own, or nothing."""
    opening = bare(plain[:120].split("\n", 1)[0])
    match = re.match(r"((?:what|which)\b[^.:?]{0,80}|falsif\w+)[.:?]", opening, re.I)
    return match.group(1) if match and kinds.changes(match.group(1)) else ""


def _in_block(block: _Block, plain: _Plain) -> list[_Sentence]:
    if block.shape in ("row", "header"):
        first, last = _first_solid(plain.text, 0), _last_solid(plain.text, 0, len(plain.text))
        ranges, subjects = [(first, last)] if first < last else [], set[int]()
    else:
        ranges, subjects = _sentences(plain)
    if not ranges:
        if not plain.marks:
            return []
        marks = [mark for _, mark in plain.marks]
        return [_Sentence(_trimmed(plain, marks), plain.text, marks)]
    starts = [start for start, _ in ranges]
    owned: list[list[Bracket]] = [[] for _ in ranges]
    for position, mark in plain.marks:
        number = max(0, bisect_right(starts, position) - 1)
        if number + 1 in subjects and position >= ranges[number][1]:
            number += 1
        owned[number].append(mark)
    found = []
    for (start, end), marks in zip(ranges, owned, strict=True):
        first, last = plain.at[start], plain.at[end - 1] + 1
        if marks:
            first, last = min(first, marks[0].start), max(last, marks[-1].end)
        found.append(_Sentence((first, last), plain.text[start:end], marks))
    return found


def _trimmed(plain: _Plain, marks: list[Bracket]) -> tuple[int, int]:
    """The span of a block that holds nothing but citations."""
    solid = [place for place, char in zip(plain.at, plain.text, strict=True) if not char.isspace()]
    return min([marks[0].start, *solid[:1]]), max([marks[-1].end, *(place + 1 for place in solid[-1:])])


def _claim(
    number: int, text: str, sentence: _Sentence, section: str, closing: bool, known: frozenset[str], shape: str
) -> Claim:
    start, end = sentence.span
    said = bare(_CELLS.sub(" | ", sentence.plain).strip(" |") if shape in ("row", "header") else sentence.plain)
    kind = kinds.of(said, bool(sentence.marks), closing)
    claim = Claim(f"C{number}", text[start:end], said, (start, end), section, kind)
    _cite(claim, sentence.marks, known)
    return claim


def _cite(claim: Claim, marks: list[Bracket], known: frozenset[str]) -> None:
    ids = dict.fromkeys([*claim.cited, *claim.unknown, *(source for mark in marks for source in mark.ids)])
    claim.cited = [source for source in ids if source in known]
    claim.unknown = [source for source in ids if source not in known]
    claim.malformed += [mark.text for mark in marks if not mark.ids]


def _extend(claim: Claim, text: str, sentence: _Sentence, known: frozenset[str]) -> None:
    """Add citations that stand on a line of their own to the claim before them."""
    claim.span = (claim.span[0], sentence.span[1])
    claim.text = text[slice(*claim.span)]
    _cite(claim, sentence.marks, known)


def bare(plain: str) -> str:
    """A sentence without emphasis and links, its white space joined; `plain` has no citations any more."""
    if "](" in plain:
        plain = _LINK.sub(r"\1", plain)
    plain = " ".join(_EMPTY.sub("", _EMPHASIS.sub("", plain)).split())
    return _BEFORE_STOP.sub("", plain).strip("#").strip()
