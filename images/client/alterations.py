"""Claims made wrong in one way each, to measure which of them the checks notice. Pure functions of a claim's text.

Rules, not a model: an alteration is left out where no rule fits, and the result may read oddly. What counts is that the
one thing that was right is wrong now.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import figures
from common.text import sentences

_BE = re.compile(r"\b(is|are|was|were|can|could|may|might|will|would|should)\b(?! not\b)(?!n't)", re.I)
_NEGATED = re.compile(
    r"\b(is|are|was|were|can|could|may|might|will|would|should|do|does|did|has|have|had) not\s+|\bcannot\b", re.I
)
_VERB = re.compile(
    r"\b(increas|decreas|reduc|improv|enhanc|impair|caus|affect|induc|inhibit|promot|prevent|predict|support|show|report"
    r"|rais|lower|help|lead|play|regulat|activat|suppress|contribut|protect|requir|result|differ|occur)(e?s)\b"
)
_CAUSAL = (
    (re.compile(r"\b(?:is|was) (?:\w+ly )?(?:associated|correlated|linked|related) (?:with|to)\b"), "causes"),
    (re.compile(r"\b(?:are|were) (?:\w+ly )?(?:associated|correlated|linked|related) (?:with|to)\b"), "cause"),
    (re.compile(r"\b(?:associated|correlated) with\b"), "caused by"),
    (re.compile(r"\bcorrelates? (?:\w+ly )?with\b"), "causes"),
    (re.compile(r"\bassociates? with\b"), "causes"),
    (re.compile(r"\bpredicts\b"), "causes"),
    (re.compile(r"\bpredict\b"), "cause"),
    (re.compile(r"\blinked (.{3,60}?) to\b"), r"proved \1 to cause"),
)
_QUALIFIER = re.compile(
    r"\b(?:may|might|could|can)\s+(?=\w)|\b(?:possibly|probably|perhaps|partly|partially|somewhat|slightly|roughly|approximately|"
    r"about|nearly|almost|hardly|mostly|often|usually|sometimes|generally|typically|on average,?|practically|reliably|only|just|"
    r"up to|at least|some|most|many|several|small|weak)\s+",
    re.I,
)
_PLACE = re.compile(
    r",?\s+(?:in|among|of|with|for|during|at|within)\s+(?:\w[\w-]*\s+){0,3}(?:mice|rats|humans|women|men|children|adults|patients|"
    r"people|students|infants|participants|animals|cells|yeast|individuals|subjects|populations?|workers|schoolgirls|"
    r"preschoolers|newborns|schools?|volunteers|adolescents|Africa|Europe|America|China|UK|US)\b"
)
NOBODY = "Nobody et al. (1901)"


def changed_numbers(claim: str, source: str, *, names: bool = False) -> list[str]:
    """The claim with one number changed at a time, each to its neighbour, its double and its half. Only numbers that the
    source has; with `names` only those that are part of a name ("type 2", "IL-6"), without it none of these."""
    has = figures.parse(source)
    found = []
    for number in figures.parse(claim):
        if bool(number.glued or number.label) != names or figures.missing_of([number], has):
            continue
        start, end = number.span
        if number.word:
            new = [_next_word(number)] if number.kind == "quantity" and not number.unit else []
        else:
            match = re.match(r"[\d.,]*\d", claim[start:end])
            if match is None:
                continue
            end, new = start + match.end(), _neighbours(match.group(), number.kind == "year")
        found += [claim[:start] + other + claim[end:] for other in new if other]
    return found


def _neighbours(digits: str, year: bool) -> list[str]:
    """The number one step on, its double and its half; of a year, one and ten years away. Written as it was."""
    places = len(digits.partition(".")[2])
    value = float(digits.replace(",", ""))
    step = 10.0**-places
    if not places and value >= 100:  # 130,001 would be a strange error; 140,000 is one
        step = 10.0 ** min(_zeros(value), len(str(int(value))) - 1)
    if not places and _zeros(value + step) > _zeros(value):  # 7490 would be a rounding of 7489
        step = -step
    changed = [value + step, value - 10 * abs(step)] if year else [value + step, value * 2, value / 2]
    comma = "," if "," in digits else ""
    texts = [f"{number:{comma}.{places}f}" for number in changed if number > 0]
    if digits.startswith("."):
        texts = [text.removeprefix("0") for text in texts]
    return [text for text in dict.fromkeys(texts) if text != digits and float(text.replace(",", "")) > 0]


def _zeros(value: float) -> int:
    text = f"{value:.0f}"
    return len(text) - len(text.rstrip("0"))


def _next_word(number: figures.Number) -> str:
    words = "two three four five six seven eight nine ten eleven twelve".split()
    word = number.printed.lower()
    if word not in words:
        return ""
    new = words[(words.index(word) + 3) % len(words)]
    return new.capitalize() if number.printed[0].isupper() else new


def negated(claim: str, source: str = "") -> list[str]:
    """The claim with a "not" put in, or taken out."""
    if _NEGATED.search(claim):
        return [
            _NEGATED.sub(
                lambda m: "can " if m.group().lower().startswith("cannot") else f"{m.group(1)} ", claim, count=1
            ).replace("  ", " ")
        ]
    if _BE.search(claim):
        return [_BE.sub(r"\1 not", claim, count=1)]
    if match := _VERB.search(claim):
        stem = match.group(1) + ("e" if match.group(2) == "es" else "")
        return [f"{claim[: match.start()]}does not {stem}{claim[match.end() :]}"]
    return []


def made_causal(claim: str, source: str = "") -> list[str]:
    """The claim with an association made a cause."""
    for pattern, cause in _CAUSAL:
        if pattern.search(claim):
            return [pattern.sub(cause, claim, count=1)]
    return []


def unqualified(claim: str, source: str = "") -> list[str]:
    """The claim without one of its hedges or limits ("may", "some", "in mice")."""
    found = [claim[: m.start()] + claim[m.end() :] for pattern in (_QUALIFIER, _PLACE) for m in pattern.finditer(claim)]
    return [text[0].upper() + text[1:] for text in found if len(text.split()) >= 4]


def quoting(claim: str, source: str) -> list[str]:
    """Sentences that quote the source as it is."""
    return [_quote(sentence) for sentence in _quotable(source)]


def misquoting(claim: str, source: str) -> list[str]:
    """Sentences that quote the source with one word exchanged, left out, or put in."""
    found = []
    for sentence in _quotable(source):
        words = sentence.split()
        middle = len(words) // 2
        found.append(_quote(" ".join([*words[:middle], "possibly", *words[middle:]])))
        found.append(_quote(" ".join([*words[:middle], *words[middle + 1 :]])))
        other = "never" if words[middle].lower().strip(",.;") != "never" else "always"
        found.append(_quote(" ".join([*words[:middle], other, *words[middle + 1 :]])))
    return found


def splicing(claim: str, source: str) -> list[str]:
    """Quotations made of the beginning of a sentence and the end of the next, as if one sentence said both."""
    found = []
    for first, second in pairwise(sentences(source)):
        left, right = first.rstrip(".").split(), second.rstrip(".").split()
        if min(len(left), len(right)) >= 8 and not re.search(r"[\"“”„«»‘’'\[\]]|\.\s*\.", first + second):
            found.append(_quote(f"{' '.join(left[1:5])} … {' '.join(right[-4:])}"))
    return found[:1]


_BOUNDS = (
    ("more than", "fewer than"), ("greater than", "less than"), ("higher than", "lower than"), ("above", "below"),
    ("at least", "at most"), (">", "<"), ("≥", "≤"),
)  # fmt: skip
_OPPOSITE = {a: b for pair in _BOUNDS for a, b in (pair, pair[::-1])} | {"over": "under"}
_BOUND = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, _OPPOSITE))})(?=\s*\.?\d)", re.I)
_SIGN = re.compile(r"(?<=[=(\[,;:a-z])(\s?)[-−–](?=0?\.\d)|(?<==)(\s?)(?=0\.\d)")


def reversed_bounds(claim: str, source: str) -> list[str]:
    """Sentences of the source with one bound reversed: "p < .05" made "p > .05"."""
    return [
        sentence[: m.start()] + _OPPOSITE[m.group(1).lower()] + sentence[m.end() :]
        for sentence in _telling(source)
        if (m := _BOUND.search(sentence))
    ][:2]


def changed_signs(claim: str, source: str) -> list[str]:
    """Sentences of the source with one sign changed: "d = 0.04" made "d = -0.04", "-0.07 to 0.15" made "0.07 to 0.15"."""
    return [
        sentence[: m.start()] + (m.group(1) if m.group(1) is not None else f"{m.group(2)}-") + sentence[m.end() :]
        for sentence in _telling(source)
        if (m := _SIGN.search(sentence)) and not re.search(r"\bp\s*=\s*$", sentence[: m.start() + 1], re.I)
    ][:2]


def counts_put_in(claim: str, source: str) -> list[str]:
    """The claim with a count that the source has not, behind one of its numbers: "d = 0.04 in 9,999 participants"."""
    has = figures.parse(source)
    counts = [count for count in ("9,999 people", "14 places", "nine places") if figures.missing(count, source)]
    return [
        f"{claim[: number.span[1]]} in {count}{claim[number.span[1] :]}"
        for number in figures.parse(claim)
        if number.kind == "quantity" and not (number.label or number.glued) and not figures.missing_of([number], has)
        for count in counts
    ]


def _telling(source: str) -> list[str]:
    """Sentences of the source that can stand as claims: not too short, and no quotation in them."""
    return [s for s in sentences(source) if 5 <= len(s.split()) <= 60 and not re.search(r"[\"“”„«»\[\]]", s)]


def _quotable(source: str) -> Sequence[str]:
    """One sentence in the middle of the source that is fit to be quoted as a whole."""
    fit = [
        s.rstrip(".")
        for s in sentences(source)
        if 6 <= len(s.split()) <= 40 and not re.search(r"[\"“”„«»‘’'\[\]]|\.\s*\.", s)
    ]
    return fit[len(fit) // 2 : len(fit) // 2 + 1]


def _quote(words: str) -> str:
    return f"As the authors put it, “{words}”."


def attributed_to_nobody(claim: str, source: str = "") -> list[str]:
    """The claim said to be the finding of people who are not the source's authors."""
    return [f"{NOBODY} found that {claim[0].lower() if claim[1:2].islower() else claim[0]}{claim[1:]}"]


def unchanged(claim: str, source: str = "") -> list[str]:
    return [claim]


# The kinds of error that are made from a right claim, in the order in which they are reported.
KINDS: dict[str, Callable[[str, str], list[str]]] = {
    "changed number": lambda claim, source: changed_numbers(claim, source),
    "changed number in a name": lambda claim, source: changed_numbers(claim, source, names=True),
    "count put in": counts_put_in,
    "reversed bound": reversed_bounds,
    "changed sign": changed_signs,
    "negation": negated,
    "causal upgrade": made_causal,
    "dropped qualifier": unqualified,
    "altered quote": misquoting,
    "spliced quote": splicing,
    "fabricated author": attributed_to_nobody,
}
