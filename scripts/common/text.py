"""Plain-text helpers: cleaning, sentences, word stems, slugs. Pure functions over str."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Everything that ends a line: besides CR the vertical tab, the form feed (page breaks of PDFs) and Unicode's own.
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# What may stay of the control characters: line feed and tab. C0, DEL and C1 (which holds the 8-bit CSI that some
# terminals obey), plus the invisible characters that can hide or reorder text: soft hyphen, zero-width and
# directional marks, variation tags (U+E0000 block) and the byte order mark; and halves of surrogate pairs, which no
# file can hold.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
# A terminal command as a whole, so that its letters do not stay behind as text: CSI (ESC [ … letter), OSC (ESC ] … BEL
# or ESC \, and no further than its line), and any other two-character escape; CSI also in its 8-bit form.
_ESCAPE = re.compile(r"\x9b[0-?]*[ -/]*[@-~]|\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[^\x1b\n])?")

_ABBREVIATIONS = {
    "al", "approx", "cf", "ch", "dr", "e.g", "ed", "eds", "eq", "et", "etc", "fig", "figs", "i.e", "i.v", "jr", "mr",
    "mrs", "ms", "no", "nos", "p", "pp", "prof", "ref", "refs", "sec", "sr", "st", "vol", "vs",
}  # fmt: skip
# The end of a sentence: a full stop, question or exclamation mark, closing quotes or brackets, then space before a word
# (which must not be lower-case: any script's capitals, digits, and scripts without case open a sentence).
_SENTENCE_END = re.compile(
    r"(?<![.!?])[.!?]+[\"'”’)\]]*(?=\s+[\"'“‘(\[]*(\w))|(?<![.!?。！？])[.!?。！？]+[\"'”’)\]]*\s*$"
)


def clean(text: str) -> str:
    """`text` without terminal commands and invisible or directional characters; line ends become '\\n'.

    U+200D (zero-width joiner) goes too, except between characters where it builds an emoji.
    """
    text = _ESCAPE.sub("", _LINE_END.sub("\n", text))
    return _UNSAFE.sub(lambda match: match.group() if _joins_emoji(text, match.start()) else "", text)


def _joins_emoji(text: str, position: int) -> bool:
    if text[position] != "\u200d" or not 0 < position < len(text) - 1:
        return False
    before = text[position - 2] if text[position - 1] == "\ufe0f" and position > 1 else text[position - 1]
    return all(unicodedata.category(c) in ("So", "Sk") for c in (before, text[position + 1]))


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, each with inner whitespace joined to single spaces.

    Blank lines end a sentence; abbreviations ("et al.", "e.g."), initials ("E. Bem"), and decimals ("p < .05",
    "0.5 mg") do not. Nothing of the text is lost: the joined sentences hold every word.
    """
    found: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        block = " ".join(block.split())
        start = 0
        for match in _SENTENCE_END.finditer(block):
            following = match.group(1) or ""
            if following and (following.islower() or _is_abbreviation(block[start : match.start() + 1])):
                continue
            found.append(block[start : match.end()].strip())
            start = match.end()
        if block[start:].strip():
            found.append(block[start:].strip())
    return found


def _is_abbreviation(head: str) -> bool:
    """Does this stretch of text, which ends in a full stop, end in an abbreviation or an initial?"""
    last = head.rsplit(maxsplit=1)[-1].lstrip("(\"'“‘[").removesuffix(".")
    return head.endswith(".") and (last.lower() in _ABBREVIATIONS or bool(re.fullmatch(r"[A-Z]", last)))


# Words that say nothing about a question's subject.
STOP_WORDS = frozenset(
    "a about after all also am an and any are as at be because been before being between both but by can could did do "
    "does doing done during each effect effects evidence find finding findings for from further had has have having he "
    "her here hers him his how i if in into is it its just know known me more most much my no nor not of off on once "
    "only or other others our out over own people really research same say says she should show shows so some studies study "
    "such tell than that the their them then there these they this those through to too true under until up very was "
    "we were what when where whether which while who whom why will with work works would you your".split()
)


def stems(text: str) -> list[str]:
    """The content words of a text as crude stems, in order: lower-cased, stop words gone, cut to six characters.

    Six characters join "replicate", "replication" and "replicated" and keep "depletion" apart from "depression";
    good enough to rank sentences, and the same on every machine.
    """
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    return [_stem(word) for word in words if word not in STOP_WORDS and (len(word) > 1 or word.isdigit())]


def _stem(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return word[:6]


def listed(names: Sequence[str]) -> str:
    """One name or more as words: "S1", "S1 and S2", "S1, S2 and S3"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def slug(text: str, limit: int = 40) -> str:
    """A name for a file: lower-case ASCII letters, digits and single hyphens, at most `limit` characters."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:limit].strip("-") or "question"
