"""Authors and years that a text names ("Smith et al. (2019)"), and whether they fit a source's metadata.

Read as a person would: from each year back to the names before it (or on to those after "by"), word by word; and from a verb that tells ("found", "showed by") to two names that are joined
right beside it. It knows
several authors, "et al.", "and colleagues", initials, particles (van, de), the possessive, a year's letter (2019a),
lists of years, and "et al." without a year. Spelling is compared without diacritics and case (Müller, Mueller, Muller).

What it cannot see: names in scripts without capitals, organisations by an acronym that no source explains, "Smith 2019"
where the name is also a place, a month or a common word of papers, a single name without year and without "et al."
("Wang's trial"), and two names without year that stand away from a verb which tells.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

_TOKEN = re.compile(r"[^\W\d_](?:[\w'’\u0300-\u036f]|[-‐‑](?=\w))*|\d+[a-z]?(?![\w])|\d+|[^\w\s]")
_YEAR = re.compile(r"(1[5-9]\d\d|20\d\d)[a-z]?")
_INITIALS = re.compile(r"[A-Z]{1,3}|[A-Z]-[A-Z]")
_PREFIX = re.compile(r"(?:[a-z]{1,4}['’]|(?:al|el|ben|bin)-)(?=[^\W\d_a-z])")
_PARTICLES = frozenset("van von de der den del della di da dos du la le ten ter zu bin ibn al el af av d o st".split())
_NOBLE = _PARTICLES - {"al", "el", "la", "le", "st", "o", "d", "ten"}
_AND = frozenset("and & und et y with".split())
_OTHERS = frozenset("colleagues coworkers co-workers collaborators coauthors co-authors others team associates".split())
_PREPOSITIONS = frozenset("in across at from within for among throughout on near".split())
_TELLS = frozenset(
    "their his her reported found showed argued published proposed described wrote concluded suggested replicated introduced".split()
)
_JOINED_TELL = _TELLS - {"their", "his", "her"} | frozenset(
    "find show report argue propose describe conclude suggest claim claimed demonstrate demonstrated discovered observed "
    "observe noted note confirmed confirm estimated estimate tested test examined examine studied study investigated "
    "compared conducted ran reviewed review failed showed shown questioned criticised criticized challenged established "
    "documented measured developed reanalysed reanalyzed pooled stated state says said think thought believe write".split()
)
_BETWEEN = frozenset("also have has had later first again then both could did would".split())
_WORKS = frozenset(
    "study studies trial trials paper papers team group lab laboratory review experiment experiments work article report "
    "analysis replication meta-analysis results findings data book".split()
)
_POSSESSIVE = re.compile(r"['’]s?$")
_PLACES = frozenset("in at from near around since until".split())
_SUFFIXES = frozenset("jr sr ii iii iv".split())
_TELLS_BY = 5  # words between what tells and "by": "was found in several trials by Smith and Jones"
_BY_WORDS = 4  # between a year and "by": "the 2019 multi-site trial by Smith"
_LONGEST_LIST = 30  # names

# Capitalised words that stand before a year and are no author…
_FUNCTION_WORDS = frozenset(
    "a an the this that these those it its in on at by from since until till during between after before around about "
    "of for to as and or but if when while where whereas although though because however moreover furthermore also both "
    "all most many some several few no none not only then thus here there see cf consequently additionally similarly "
    "likewise finally overall indeed instead nevertheless nonetheless later recently earlier meanwhile notably hence "
    "importantly interestingly subsequently accordingly conversely specifically still yet further first second".split()
)
# …unless "et al." follows: some are names, too.
_NOT_NAMES = _FUNCTION_WORDS | frozenset(
    "january february march april may june july august september october november december spring summer autumn fall winter "
    "monday tuesday wednesday thursday friday saturday sunday "
    "study studies trial trials experiment experiments table figure fig phase group wave cohort version review reviews "
    "report reports survey surveys paper papers article source sources section chapter appendix results result "
    "replication replications analysis analyses meta-analysis meta-analyses evidence data sample samples participants "
    "published preprint protocol guideline guidelines census olympics crisis pandemic act law year years "
    "africa america asia europe oceania antarctica argentina australia austria bangladesh belgium brazil britain bulgaria "
    "california canada chile china colombia croatia cuba cyprus denmark egypt england estonia ethiopia finland florida "
    "france germany ghana greece hungary iceland india indonesia iran iraq ireland israel italy japan kenya korea latvia "
    "lithuania london luxembourg malaysia malta mexico morocco nepal netherlands nigeria norway pakistan paris peru "
    "philippines poland portugal romania russia rwanda scotland senegal serbia singapore slovakia slovenia spain sweden "
    "switzerland taiwan tanzania texas thailand tunisia turkey uganda ukraine uruguay vietnam wales zambia zimbabwe york "
    "zealand kingdom states union".split()
)


@dataclass(frozen=True)
class Mention:
    """Authors and a year in a text: `families` as written, in order; `year` without its letter, or None."""

    families: tuple[str, ...]
    year: int | None
    text: str
    span: tuple[int, int]  # of the whole mention
    year_span: tuple[int, int] | None


@dataclass(frozen=True)
class _Token:
    text: str
    start: int
    end: int

    @property
    def low(self) -> str:
        return self.text.lower()


def find(text: str) -> list[Mention]:
    """Every author–year in a text without citations and emphasis (a claim's `bare`), in order."""
    tokens = [_Token(match.group(), *match.span()) for match in _TOKEN.finditer(text)]
    # "et. al."
    tokens = [
        token
        for number, token in enumerate(tokens)
        if not (
            token.text == "." and [near.low for near in tokens[max(0, number - 1) : number + 2 : 2]] == ["et", "al"]
        )
    ]
    reader = _Reader(text, tokens)
    found: list[Mention] = []
    taken: set[int] = set()  # tokens "al" that belong to a mention
    for number, token in enumerate(tokens):
        if year := _YEAR.fullmatch(token.text):
            names = reader.before(number) or reader.after(number)
            if names:
                taken |= names.others
                first, last = min(names.first, token.start), max(names.last, token.end)
                last += text[last : last + 1] in (")", "]")
                found.append(
                    Mention(
                        tuple(names.families),
                        int(year.group(1)),
                        text[first:last],
                        (first, last),
                        (token.start, token.end),
                    )
                )
    for number, token in enumerate(tokens):
        if token.low == "al" and number not in taken and number and tokens[number - 1].low in ("et", "&"):
            names = reader.names_before(number - 2, {number})
            if names:
                span = (names.first, token.end)
                found.append(Mention(tuple(names.families), None, text[slice(*span)], span, None))
    found.sort(key=lambda mention: mention.span)
    return sorted([*found, *_joined(reader, found)], key=lambda mention: mention.span)


def _joined(reader: _Reader, found: list[Mention]) -> list[Mention]:
    """Two or more names without year beside a verb that tells, where no mention was `found` (sorted) yet."""
    starts = [mention.span[0] for mention in found]
    ends = list(accumulate((mention.span[1] for mention in found), max))
    more: dict[tuple[int, int], Mention] = {}
    for names in reader.joined():
        span = (names.first, names.last)
        before = bisect_left(starts, span[1])
        if not (before and ends[before - 1] > span[0]):
            more[span] = Mention(tuple(names.families), None, reader.text[slice(*span)], span, None)
    return list(more.values())


@dataclass
class _Names:
    families: list[str]
    first: int
    last: int
    others: set[int]
    pair: bool = False
    ahead: int = -1  # the token in front of them
    more: bool = False  # other capitalised words stand before the first family


class _Reader:
    def __init__(self, text: str, tokens: list[_Token]) -> None:
        self.text = text
        self.tokens = tokens
        self._depth = []  # open brackets before each token
        depth = 0
        for token in tokens:
            self._depth.append(depth)
            depth = max(0, depth + (token.text in "([") - (token.text in ")]"))

    def _low(self, number: int) -> str:
        return self.tokens[number].low if 0 <= number < len(self.tokens) else ""

    def _is_name(self, number: int, sure: bool = False) -> bool:
        return 0 <= number < len(self.tokens) and _is_name(self.tokens[number].text, sure)

    def before(self, year: int) -> _Names | None:
        """The names that end right before this year."""
        place = year - 1
        for _ in range(_LONGEST_LIST):  # "Smith (2018, 2019)"
            if not (self._low(place) in (",", ";", "and", "&", "/") and _YEAR.fullmatch(self._low(place - 1))):
                break
            place -= 2
        opened = self._low(place) in ("(", "[")
        comma = self._low(place) == ","
        if opened or comma:
            place -= 1
        if self._low(place) == "in":  # "Smith and Jones in 2019", "by Smith in 2019"
            names = self.names_before(place - 1, set())
            if names and (names.pair or self._low(names.ahead) == "by"):
                return names
        told = not opened and not comma and self._is_possessive(place)
        if not told:
            place, told = self._told(place)
        if self._low(place) == "s" and self._low(place - 1) in ("'", "’"):
            place -= 2  # "et al.'s"
        others: set[int] = set()
        end = place
        if self._low(place) == "." and self._low(place - 1) == "al":
            place -= 1
        if self._low(place) == "al" and self._low(place - 1) in ("et", "&", "and"):
            others = {place}
            place -= 2
        elif self._low(place) in _OTHERS:
            back = place - 1
            if self._low(back) in ("his", "her", "their", "the"):
                back -= 1
            if self._low(back) in _AND:
                others = {place}
                place = back - 1
        names = self.names_before(place, others)
        if not names or end < 0:
            return None
        sure = bool(others) or names.pair or told
        if self._low(year + 1) in ("–", "-", "—") and _YEAR.fullmatch(self._low(year + 2)) and not sure:
            return None  # "Denmark (2004–2018)"
        if not opened and not sure:
            inside = self._depth[year] > 0
            if comma and not inside:
                return None  # "In Lyon, 2019 was …"
            if not comma and not inside and not self._stands_alone(names, year):
                return None
        return names

    def _is_possessive(self, place: int) -> bool:
        return self._is_name(place) and bool(_POSSESSIVE.search(self.tokens[place].text))

    def _told(self, place: int) -> tuple[int, bool]:
        """Before the few words between names and year, if they are there.

        "Smith et al., writing in 2019", "Smith reported in 2019", "Smith's large study of 2019". And is it sure now?
        """
        skipped, verb, noun = place, False, False
        for _ in range(_BY_WORDS + 1):
            word = self._low(skipped)
            if word == "s" and self._low(skipped - 1) in ("'", "’"):
                skipped -= 2
                word = self._low(skipped)
            colleagues = word in _OTHERS and self._low(skipped - 1) in (*_AND, "his", "her", "their", "the")
            if word == "al" or colleagues or (word == "." and self._low(skipped - 1) == "al"):
                return skipped, False
            if self._is_name(skipped):
                return (skipped, True) if verb or (noun and self._is_possessive(skipped)) else (place, False)
            if not (word == "," or (word.isalpha() and self.tokens[skipped].text.islower())):
                break
            verb = verb or word in _TELLS
            noun = noun or word in _WORKS
            skipped -= 1
        return place, False

    def _stands_alone(self, names: _Names, year: int) -> bool:
        """ "Smith 2019" in running text or in a table's cell: one word with a capital, and no "Games 2012"."""
        number = next(n for n in range(year - 1, -1, -1) if self.tokens[n].start <= names.first)
        return not (names.more or self._low(number - 1) in _PLACES or names.families[0].isupper())

    def names_before(self, place: int, others: set[int]) -> _Names | None:
        """The list of names that ends at this token."""
        if self._low(place) == ",":
            place -= 1
        if self._low(place) == "." and self._low(place - 1) in _SUFFIXES:
            place -= 1
        if self._low(place) in _SUFFIXES:
            place -= 2 if self._low(place - 1) == "," else 1
        names = _Names([], 0, self.tokens[place].end if 0 <= place < len(self.tokens) else 0, others)
        while len(names.families) < _LONGEST_LIST:
            place = self._without_initials(place)
            sure = bool(others and not names.families) or self._low(place - 1) in _NOBLE
            if not self._is_name(place, sure):
                break
            names.families.insert(0, _stripped(self.tokens[place].text))
            names.first = self.tokens[place].start
            place -= 1
            # Given names, particles and the first half of a double name stay outside: the last word is what is compared.
            while (
                self._is_name(place)
                or self._low(place) in _PARTICLES
                or (self._low(place) in ("'", "’") and self._low(place - 1) in ("d", "o"))
            ):
                names.more = names.more or (self._is_name(place) and self._low(place) not in _PARTICLES)
                names.first = self.tokens[place].start
                place -= 1
            place = self._without_initials(place, given=True)
            separator = self._low(place)
            if separator in _AND:
                before = place - 2 if self._low(place - 1) == "," else place - 1
                before = self._without_initials(before)
                if not self._is_name(before):
                    break
                names.pair = True
                place = before
            elif separator == "," and (names.pair or others or self._depth[place] > 0):
                before = self._without_initials(place - 1)
                if not self._is_name(before) or self._low(before - 1) in _PREPOSITIONS:
                    break  # "In Lyon, Smith and Jones (2019)"
                place = before
            else:
                break
        names.ahead = place
        return names if names.families else None

    def _without_initials(self, place: int, given: bool = False) -> int:
        """Before "J. A.", "JA", and ", J."; `given`: initials in front of a name, which no comma precedes."""
        start = place
        while place > 0:
            if (self._low(place) == "." and self._low(place - 1) in _SUFFIXES) or (
                self._low(place) == "." and _INITIALS.fullmatch(self.tokens[place - 1].text)
            ):
                place -= 2
            elif (_INITIALS.fullmatch(self.tokens[place].text) and self.tokens[place].text != "I") or (
                self._low(place) in ("-", "‐") and place < start
            ):
                place -= 1
            else:
                break
        if place < start and not given and self._low(place) == "," and self._is_name(place - 1):
            place -= 1
        return place

    def after(self, year: int) -> _Names | None:
        """ "The 2019 trial by Smith", "In 2019, Smith and Jones found …"."""
        place = year + 1
        if self._low(year - 1) == "in" and self._low(place) == ",":
            names = self._names_after(place + 1)
            return names if names and (names.pair or names.others) else None
        for _ in range(_BY_WORDS):
            if self._low(place) == "by":
                return self._names_after(place + 1)
            if not self._low(place).replace("-", "").isalpha():
                return None
            place += 1
        return self._names_after(place + 1) if self._low(place) == "by" else None

    def joined(self) -> Iterator[_Names]:
        """ "Smith and Jones found …", "found by Smith and Jones", "according to Smith & Jones"."""
        told = -_TELLS_BY - 2  # where the last word that tells, or that names a work, was
        for number, token in enumerate(self.tokens):
            low = token.low
            names = None
            if low in _JOINED_TELL and token.text.islower():
                place = number - 1
                if self._low(place) in _BETWEEN or (
                    self._low(place).endswith("ly") and self.tokens[place].text.islower()
                ):
                    place -= 1
                if self._is_name(place):
                    names = self.names_before(place, set())
            elif (low == "by" and number - told <= _TELLS_BY + 1) or (
                low == "to" and self._low(number - 1) == "according"
            ):
                names = self._names_after(number + 1)
            if low in _JOINED_TELL or low in _WORKS:
                told = number
            if names and names.pair:
                yield names

    def _names_after(self, place: int) -> _Names | None:
        names = _Names([], self.tokens[place].start if place < len(self.tokens) else 0, 0, set())
        while len(names.families) < _LONGEST_LIST:
            family = None
            while place < len(self.tokens):
                token = self.tokens[place]
                if _is_name(token.text):
                    family = token
                elif not (
                    token.low in _PARTICLES
                    or _INITIALS.fullmatch(token.text)
                    or (token.text == "." and self._initial(place - 1))
                ):
                    break
                place += 1
            if family is None:
                break
            names.pair = bool(names.families)
            names.families.append(_stripped(family.text))
            names.last = family.end
            if self._low(place) == "et" and self._low(place + 1) == "al":
                names.others = {place + 1}
                names.last = self.tokens[place + 1].end
                break
            if self._low(place) in _AND and self._low(place + 1) in (*_OTHERS, "his", "her", "their"):
                names.others = {place}
                break
            comma = self._low(place) == ","
            following = place + 1 if comma else place
            if self._low(following) in _AND:
                place = following + 1
            elif comma and self._is_name(following) and (self._low(following + 1) in (",", "and", "&")):
                place = following
            else:
                break
        return names if names.families else None

    def _initial(self, place: int) -> bool:
        return place >= 0 and bool(_INITIALS.fullmatch(self.tokens[place].text))


def _stripped(word: str) -> str:
    return _POSSESSIVE.sub("", word)


def _is_name(word: str, sure: bool = False) -> bool:
    """A capitalised word that may be a family name; `sure`: what follows says that it is one."""
    word = _PREFIX.sub("", _stripped(word))
    return (
        len(word) > 1
        and word[0].isupper()
        and (any(char.islower() for char in word) or len(word) > 4)
        and not any(char.isdigit() for char in word)
        and word.lower() not in (_FUNCTION_WORDS if sure else _NOT_NAMES)
    )


# --- does it fit a source? --------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def fold(text: str) -> str:
    """`text` for comparison: without diacritics, case, apostrophes; hyphens are spaces; ae, oe, ue as the plain vowel."""
    text = unicodedata.normalize("NFKD", text.replace("ø", "o").replace("Ø", "o").replace("ł", "l").replace("Ł", "l"))
    text = "".join(char for char in text if not unicodedata.combining(char)).casefold()
    text = text.replace("æ", "ae").replace("œ", "oe").replace("đ", "d").replace("ı", "i")
    text = re.sub(r"['’`]", "", text)
    return " ".join(re.sub(r"([aou])e", r"\1", re.sub(r"[-‐‑–_.]", " ", text)).split())


def fits(mention: Mention, metadata: Mapping[str, Any]) -> bool:
    """May this be the document? What the metadata does not say contradicts nothing."""
    year = metadata.get("year")
    if mention.year is not None and year is not None and year != mention.year:
        return False
    authors = [str(author) for author in metadata.get("authors") or []]
    named = [words for words in map(_family, authors) if words]
    if not named:
        return True
    complete = len(named) == len(authors)  # no "et al." among them
    return all(
        any(set(fold(family).split()) - _PARTICLES <= words for words in named) or (number > 0 and not complete)
        for number, family in enumerate(mention.families)
    )


def _family(author: str) -> frozenset[str]:
    """The words by which an author can be called: "van der Berg, A." → berg; a name without a comma: all its words."""
    if fold(author) in ("et al", "others", "and others"):
        return frozenset()
    words = fold(author.split(",")[0]).split()
    initials = "".join(word[0] for word in words if word not in ("of", "the", "for", "and"))
    kept = [word for word in words if len(word) > 1 and word not in _PARTICLES and word not in _SUFFIXES]
    # Glued, too: "Mc Donald", "O Brien", "El-Sayed"; and the acronym of an organisation.
    return frozenset([*(kept or words), "".join(words), *([initials] if len(initials) > 2 else [])])


def stands_in(mention: Mention, text: str) -> bool:
    """Does the source itself speak of this work? Its text is folded (`fold`)."""
    first, *more = (fold(family) for family in mention.families)
    for match in re.finditer(rf"\b{re.escape(first)}\b", text):
        if mention.year is None:
            return all(family in text for family in more)
        near = text[max(0, match.start() - 80) : match.end() + 80]
        if str(mention.year) in near and all(family in near for family in more):
            return True
    return False
