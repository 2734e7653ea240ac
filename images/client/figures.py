"""Numbers of a text, and which numbers of a claim its source does not have.

`missing(claim, source)` compares values, not spellings: "1,200" is "1200", "twelve" is "12", "40 percent" is "40%",
"half" is "50%", "2 hours" is "120 minutes". A claim may round what the source prints ("0.5" for "0.48") and may bound it
("more than 100" for "107", "p < .05" for "p = .03"); it may not be more precise than the source.

What it cannot see: whose number it is. A value that the source has in another role counts as found unless the units
differ. Signs are compared only where both texts print one, or are bound to: after "=" and at the ends of an interval
("d = -0.04", "95% CI -0.07 to 0.15"), because "d = -0.2" and "0.2 lower" say the same. A number that the claim computed from
others ("40%" for "12 of 30") is reported: nobody printed it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from common.text import STOP_WORDS

Kind = Literal["quantity", "year", "ordinal"]
Bound = Literal["", "about", "above", "below"]
Sign = Literal["", "+", "-"]


@dataclass(frozen=True)
class Number:
    """A number as a text prints it. `step` is the worth of its last printed digit, 0 where a word says it."""

    printed: str
    span: tuple[int, int]
    value: float
    step: float
    kind: Kind = "quantity"
    worth: float = 1  # of the unit that it is printed with, in the base unit that value and step are in
    unit: str = ""  # "" is none that is known; "%", "fold", "p", or a base unit of _UNITS
    bound: Bound = ""
    word: bool = False
    label: str = ""  # "type" of "type 2": the number is part of a name
    noun: str = ""  # the word that follows, where it is no unit: what is counted, as a rule
    glued: bool = False  # digits within a name ("IL-6"): compared only with numbers of the same name
    # What says the same in other words: "half" is also 50%.
    same_as: tuple[tuple[float, str], ...] = ()
    strict: bool = False  # the bound leaves the value itself out: "more than 100" is not 100
    sign: Sign = ""  # of a number with decimals, where the text has to print it
    loose: bool = False  # "half", "a third": words for what is near it
    share: Number | None = None  # "1 in 5" is 20%; compared with percentages only


_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORDS = {word: value for value, word in enumerate(_SMALL)} | {word: 10 * value for value, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_ORDINALS = {
    word: value
    for value, word in enumerate(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(), 1
    )
}
_FRACTIONS = {"half": 1 / 2, "halves": 1 / 2, "third": 1 / 3, "thirds": 1 / 3, "quarter": 1 / 4, "quarters": 1 / 4,
              "fifth": 1 / 5, "fifths": 1 / 5, "tenth": 1 / 10, "tenths": 1 / 10}  # fmt: skip
_FOLDS = {"twice": 2, "double": 2, "doubled": 2, "doubles": 2, "doubling": 2, "thrice": 3, "triple": 3, "tripled": 3,
          "triples": 3, "tripling": 3, "quadruple": 4, "quadrupled": 4}  # fmt: skip

# Units that are compared, each with its base and its worth in it. Seconds and months are apart: no month has a fixed
# length.
_SPELLINGS: dict[str, dict[str, float]] = {
    "s": {"ms millisecond milliseconds msec": 0.001, "s sec secs second seconds": 1, "min mins minute minutes": 60,
          "h hr hrs hour hours": 3600, "day days": 86400, "week weeks wk wks": 604800},
    "month": {"month months": 1, "year years yr yrs": 12, "decade decades": 120},
    "g": {"ng": 1e-9, "µg μg ug mcg microgram micrograms": 1e-6, "mg milligram milligrams": 1e-3, "g gram grams": 1,
          "kg kilogram kilograms": 1e3},
    "l": {"µl μl ul": 1e-6, "ml milliliter milliliters millilitre millilitres": 1e-3, "dl": 0.1,
          "l liter liters litre litres": 1},
    "m": {"nm": 1e-9, "µm μm um": 1e-6, "mm millimeter millimeters millimetre millimetres": 1e-3,
          "cm centimeter centimeters centimetre centimetres": 1e-2, "m meter meters metre metres": 1,
          "km kilometer kilometers kilometre kilometres": 1e3},
    "mol": {"nmol": 1e-9, "µmol μmol umol": 1e-6, "mmol": 1e-3, "mol": 1},
    "Hz": {"hz hertz": 1, "khz": 1e3, "mhz": 1e6},
    "mmHg": {"mmhg": 1},
    "kcal": {"kcal": 1},
    "$": {"dollar dollars usd": 1},
}  # fmt: skip
_UNITS = {
    spelling: (base, worth)
    for base, spellings in _SPELLINGS.items()
    for names, worth in spellings.items()
    for spelling in names.split()
}

# Words that name things by number. "type 2" is not proved by a 2 elsewhere.
_LABELS = frozenset(
    "arm category chapter chromosome class cohort condition criterion experiment factor figure grade group level model "
    "phase sample stage step study table tier trial type wave".split()
)

# Names whose number tells nothing apart, and that sources replace by other words.
_NAMES_OF_ONE = frozenset({"covid"})

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_POWER = re.compile("(?<![0-9])10[ ]?([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]{1,3})(?![⁰¹²³⁴⁵⁶⁷⁸⁹])")
# How far a number's neighbours are looked at. A bound keeps the work in proportion to the text.
_NEAR = 60
_GONE = re.compile(
    r"https?://\S+|\bdoi:\s*\S+|\b10\.\d{4,9}/\S+|\[\s*S\d{1,6}(?:\s*(?:[,;&–—-]|and)\s*S\d{1,6})*\s*\]", re.I
)
# "Klein et al. (2018)", "(Bem, 2011)": whose years are, the citation check compares.
_CITED_YEAR = re.compile(
    r"(?<=[^\W\d_])(?:['’]s)?(?:\s+et\s+al\.?|\s+and\s+colleagues)?,?\s*[(\[]\s*(?:1[5-9]|20)\d\d[a-z]?\s*[)\]]"
    r"|(?<=[(;])\s*[^\W\d_][^()\[\];\d]{1,80}?,?\s+(?:1[5-9]|20)\d\d[a-z]?(?=\s*[);,])"
)
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?"  # 1,200,000.5
    r"|\d{1,3}(?:[\u2009\u202f\u00a0'’ ]\d{3})+(?![\d.,%])"  # 1 200 000, with any space
    r"|\d+,\d{1,2}(?![\d,])(?=\s?%|\s*[^\s\d])"  # a decimal comma, never before another number
    r"|\d+(?:\.\d+)?|\.\d+)"
)
_NUMBER = re.compile(
    rf"(?P<digits>{_DIGITS})"
    r"(?:\s*(?:[x×*·]\s*)10\s*(?:\^\s*\(?|\()?(?P<power>[-−–]?\d{1,2})(?:(?<=\(\d)\)|(?<=\(\d\d)\)|(?<=\(-\d)\)|(?<=\(-\d\d)\))?|e(?P<e>[-+]?\d{1,2})(?![\w.]))?"
)
_WORD = re.compile(r"[^\W\d_]+")
_ABOVE = r"(?:more|greater|higher|larger|longer|older)\s+than|over|above|at\s+least|exceed\w*|upwards?\s+of|not?\s+(?:less|fewer)\s+than|>=?|≥"
_BELOW = r"(?:less|fewer|lower|smaller|shorter|younger)\s+than|under|below|at\s+most|up\s+to|nearly|almost|not?\s+more\s+than|<=?|≤"
_ABOUT = r"about|around|approximately|approx\.?|roughly|some|circa|ca\.?|~|≈|close\s+to"
_BOUND = re.compile(
    rf"(?:(?P<above>{_ABOVE})|(?P<below>{_BELOW})|(?P<about>{_ABOUT}))\s*(?:a\s+|an\s+|[$£€]\s*)?$", re.I
)
# "18 years or older", "5 or fewer"
_BOUND_BEHIND = re.compile(
    r"(?:\s+years?)?\s+(?:or|and)\s+(?:(?P<above>more|older|above|over|greater|longer|higher|larger)"
    r"|(?P<below>less|fewer|younger|below|under|smaller|shorter|lower))\b",
    re.I,
)
# A minus belongs to its number where no word and no number stands before it; else it is a hyphen, or the dash of a range.
_MINUS = re.compile(r"(?:^|[=<>≤≥~≈(\[,;:]|[^\W\d_]|[^\w\s])\s+[-–]$|(?:^|[=<>≤≥~≈(\[,;:])[-–]$")
# Where a text that prints no sign means a plus.
_PLUS = re.compile(r"(?:=|≈|\+|\b(?:ci|interval)\W{0,3}(?:(?:was|is|of|from|between)\s+)?[(\[]?)\s*$", re.I)
_FROM = re.compile(r"(?:\b(?:from|between)\s+|[\[(]\s*)$", re.I)
_TO = re.compile(r"\s*(?:to|and|through|[,;–—-]|\.\.)\s*[-–+]?", re.I)
# Of how many a share is told: "1 in 5", "3 in 1,000". "5 in 70" is a count, and its numbers must be printed.
_WHOLES = frozenset({*range(2, 11), 20, 50, *(10**power for power in range(2, 7))})
_P = re.compile(
    r"(?:\bp(?:[\s-]*values?)?(?:\s+of)?\s*(?:[<>=≤≥]=?|was|were|is)?\s*(?:of|below|under|less\s+than)?\s*)$", re.I
)
# Between two numbers that share the unit of the last: "10, 20 and 30%", "0.2–0.4 mg".
_LIST = re.compile(r"[\s,;/–—−-]*(?:(?:and|or|to|vs\.?|versus|±|\+/-)[\s,]*)?")
_SCALE_OF_CONFIDENCE = re.compile(
    r"\s*(?:\(?\s*(?:ci|cis|cri|credible|confidence|bootstrap\w*|bayesian|hdi|prediction)\b)", re.I
)
_UNIT = re.compile(
    r"\s*-?\s*(%|per\s?cent(?:age)?(?:[\s-]+points?)?\b|pp\b|°\s?[cf]?\b|°|mm\s?hg\b|[µμ]?[^\W\d_]+)", re.I
)
_TIMES = re.compile(r"\s*(?:-\s*fold|fold|times|[x×])(?![^\W_])(?!\s*\d)", re.I)
# What follows a fraction that is a share: "a third of".
_OF = re.compile(r"\s+(?:of|as|the|less|more|lower|higher|fewer)\b|\W*$")
_TOLERANCE = {"about": 0.05, "above": 0.2, "below": 0.2}
# "about half", "a third of": such words are loose, by this share of their value. "One in five" is less so.
_LOOSE = 0.1
_LOOSE_RATIO = 0.025
_EPSILON = 1e-9


def missing(claim_text: str, source_text: str) -> list[str]:
    """The numbers of a claim that the source does not have, as the claim prints them, in order, each once."""
    return missing_of(parse(claim_text), parse(source_text))


def missing_of(claimed: Iterable[Number], printed: Iterable[Number]) -> list[str]:
    """Like `missing`, of numbers that are parsed already."""
    has = list(printed)
    found = []
    for number in claimed:
        if _counts(number):
            # Where the source numbers things of that name, only these prove a number of that name.
            alike = [other for other in has if number.label and other.label == number.label]
            if number.glued and not alike:
                # "interleukin-2" where the source says "IL-2": names that begin alike, or else any; a source without such
                # names speaks in other words.
                names = [other for other in has if other.glued or other.label]
                alike = [other for other in names if other.label[:1] == number.label[:1]] or names
                if not alike or number.label in _NAMES_OF_ONE:
                    continue
            if not any(_same(number, other) for other in alike or has):
                found.append(number.printed)
    return list(dict.fromkeys(found))


def _counts(number: Number) -> bool:
    """Must a source have this number? "One" and "first" are words of the language more than they are numbers."""
    return not (number.word and (number.kind == "ordinal" or (number.value in (0, 1) and not number.unit)))


def _same(claim: Number, source: Number) -> bool:
    if (claim.kind == "ordinal") != (source.kind == "ordinal"):
        return False
    if source.glued or source.label or claim.label:
        return claim.value == source.value and not claim.unit and claim.kind != "ordinal"
    # "20 nurses" is not "20 minutes"; "aged 20" may be.
    other_things = (source.unit and not claim.unit and claim.noun) or (claim.unit and not source.unit and source.noun)
    if other_things and not {"%", "fold"} & {claim.unit, source.unit}:
        return False
    if (claim.share or source.share) and any(
        _same_share(a, b, loose=claim.share is not None) for a in _percent(claim) for b in _percent(source)
    ):
        return True
    claims = [(claim.value, claim.unit), *claim.same_as]
    sources = [(source.value, source.unit), *source.same_as]
    return any(
        _same_value(replace(claim, value=a, unit=u), replace(source, value=b, unit=v))
        for a, u in claims
        for b, v in sources
    )


def _percent(number: Number) -> list[Number]:
    return [number.share] if number.share else [number] if number.unit == "%" else []


def _same_share(claim: Number, source: Number, *, loose: bool) -> bool:
    """Percentages, one of which or both are said as "1 in 5"."""
    if _excluded(claim, source):
        return False
    if claim.bound in ("above", "below"):
        return _same_value(claim, source)
    near = (
        max(source.step / 2, _LOOSE_RATIO * claim.value)
        if loose
        else _LOOSE * claim.value
        if claim.loose
        else claim.step / 2
    )
    return abs(claim.value - source.value) <= near + _EPSILON


def _excluded(claim: Number, source: Number) -> bool:
    """Do the bounds of two numbers, or their signs, say that they are not the same?"""
    return {claim.bound, source.bound} == {"above", "below"} or {claim.sign, source.sign} == {"+", "-"}


def _left_out(claim: Number, source: Number) -> bool:
    """Of equal values: is the claim's "more than 100" the very 100 that the source prints?"""
    return claim.strict and source.bound in ("", "about")


def _same_value(claim: Number, source: Number) -> bool:
    if _excluded(claim, source):
        return False
    a, b, step, finer = claim.value, source.value, claim.step, source.step
    if claim.unit == "p" and source.unit in ("p", ""):
        return _same_p(claim, source)
    if claim.unit != source.unit:
        if not claim.unit and source.worth != 1:  # "aged 18" for "18 years"
            b, finer = b / source.worth, finer / source.worth
        elif not source.unit and claim.unit == "month":  # an age is often without its unit; a dose never
            a, step = a / claim.worth, step / claim.worth
        if claim.unit == "%" and not source.unit and 0 <= b <= 1 and (source.step < 1 or source.word):
            b, finer = b * 100, finer * 100  # "kappa of .40" is 40%
        elif source.unit == "%" and not claim.unit and step and step < 1:
            a, step = a * 100, step * 100
        elif (
            "p" in (claim.unit, source.unit)
            or (claim.unit and source.unit)
            or "%" in (claim.unit, source.unit)
            or claim.unit not in ("", "month", "fold")
        ):
            return False
    if abs(a - b) <= _EPSILON * max(1, abs(a), abs(b)):
        return not _left_out(claim, source)
    if "year" in (claim.kind, source.kind):
        return False
    if claim.loose and claim.unit == "%":  # half, a third
        return abs(a - b) <= _LOOSE * a
    if claim.bound:
        if not a:
            return claim.bound == "above" and b > 0 and claim.unit == source.unit
        away = (b - a) / abs(a)
        reach = _TOLERANCE[claim.bound]
        if _digits_of(claim) < _digits_of(source) and (
            (claim.bound != "below" and 0 < away <= reach) or (claim.bound != "above" and -reach <= away < 0)
        ):
            return True
    if (claim.bound == "above" and b < a) or (claim.bound == "below" and b > a):
        return False
    # Rounded: half a unit of the claim's last digit, where the source prints more digits.
    return step > finer and abs(a - b) <= step / 2 + _EPSILON * max(1, abs(b))


def _digits_of(number: Number) -> int:
    """How many digits a number needs: 100 one, 107 three."""
    return len(f"{number.value:.10g}".replace(".", "").partition("e")[0].strip("0"))


def _same_p(claim: Number, source: Number) -> bool:
    if claim.value == source.value:
        if _left_out(claim, source):
            return False
        # "p = .05" says more than "p < .05".
        return claim.bound == source.bound or claim.bound != "" or source.unit == ""
    if claim.bound == "below":
        return source.value < claim.value and source.bound in ("", "below", "about")
    if claim.bound == "above":
        return source.value > claim.value and source.bound in ("", "above", "about")
    return (
        claim.step > source.step and abs(claim.value - source.value) <= claim.step / 2 + _EPSILON and not source.bound
    )


def parse(text: str) -> list[Number]:
    """The numbers of a text in order. Digits that are part of a name ("COVID-19", "p53", "5-HT") are none."""
    text = _plain(text)
    found: list[Number] = []
    for match in _NUMBER.finditer(text):
        if number := _from_digits(text, match):
            found.append(number)
    found.extend(_from_words(text, {n.span[0] for n in found}))
    found.sort(key=lambda number: number.span)
    return _ratios(text, _intervals(text, _shared_units(text, found)))


def _plain(text: str) -> str:
    """The text with one spelling of what NFKC would join or lose; things that are no numbers blanked, not cut."""
    text = _POWER.sub(lambda match: "10^" + match.group(1).translate(_SUPERSCRIPTS), text)
    text = _SUPERSCRIPT.sub(lambda match: " " * len(match.group()), text)
    text = re.sub(r"[½¼¾⅓⅔]", lambda m: {"½": ".5", "¼": ".25", "¾": ".75", "⅓": ".333", "⅔": ".667"}[m.group()], text)
    text = "".join(c if c in "\u2009\u202f\u00a0µ" else unicodedata.normalize("NFKC", c) for c in text)
    text = re.sub(r"(?<=\d)[·‧⋅](?=\d)", ".", text).replace("‐", "-").replace("‑", "-").replace("−", "-")
    text = _GONE.sub(lambda m: " " * len(m.group()), text)
    return _CITED_YEAR.sub(lambda m: re.sub(r"\d", " ", m.group()), text)


def _from_digits(text: str, match: re.Match[str]) -> Number | None:
    start, end = match.span()
    before = _before(text, start)
    if re.search(r"[^\W\d_]-?$|\d[.,]?$|_$", before) and not re.search(r"[\d\s(]x$", before):
        # IL-6, p53, the later parts of version 1.2.3.
        digits = re.sub(r"\D.*", "", match["digits"])
        name = re.search(r"[^\W\d_]+(?=[-.,\d]*$)", before)
        return Number(
            text[start:end],
            (start, end),
            float(digits or 0),
            1,
            label=_singular(name.group()) if name else "",
            glued=True,
        )
    digits = match["digits"]
    if re.fullmatch(r"\d+,\d{1,2}", digits):
        digits = digits.replace(",", ".")
    # "group 1 250 mg" may be two numbers after all.
    pieces = [float(piece) for piece in digits.split(" ")] if " " in digits else []
    digits = re.sub(r"[,'’ \u2009\u202f\u00a0]", "", digits)
    value = float(digits)
    step = 10.0 ** -len(digits.partition(".")[2])
    if power := match["power"] or match["e"]:
        exponent = int(power.replace("−", "-").replace("–", "-"))
        value, step = value * 10.0**exponent, step * 10.0**exponent
    rest = text[end : end + _NEAR]
    if ordinal := re.match(r"(?:st|nd|rd|th)\b", rest):
        return Number(text[start : end + ordinal.end()], (start, end + ordinal.end()), value, 1, "ordinal")
    if re.match(r"(?:0s|s)\b", rest) and re.fullmatch(r"\d{2,4}", digits):  # the 1990s
        return Number(text[start : end + 1], (start, end + 1), value, 1, "year")
    if scale := re.match(r"\s*-?(hundred|thousand|million|billion|trillion)\b", rest, re.I):
        factor = _SCALES[scale.group(1).lower()]
        value, step, end = value * factor, step * factor, end + scale.end()
        rest = text[end : end + _NEAR]
    unit, worth, length = _unit(rest)
    if not length and re.match(r"[^\W\d_]|-[A-Z]", rest):  # 5-HT, 3D
        return Number(text[start:end], (start, end), value, 1, glued=True)
    if unit == "%" and _SCALE_OF_CONFIDENCE.match(rest[length:]):
        return None
    bound, strict = _bound(before, rest[length:])
    if _P.search(before) and value <= 1:
        return Number(text[start:end], (start, end), value, step, unit="p", bound=bound, strict=strict)
    if not unit and re.fullmatch(r"(?:1[5-9]|20)\d\d|2100", match["digits"]) and not power and not bound:
        return Number(text[start:end], (start, end), value, 1, "year")
    label = ""
    if not unit and step == 1 and not power:
        label = _label(before) or _label_behind(rest)
        step = 1 if label else _round_step(digits)
    return Number(
        text[start : end + length].strip(),
        (start, end + length),
        value * worth,
        step * worth,
        worth=worth,
        unit=unit,
        bound=bound,
        strict=strict,
        sign=_sign(before) if step < 1 and not power else "",
        label=label,
        noun="" if unit else _noun(rest),
        same_as=tuple((piece * worth, u) for piece in pieces for u in {"", unit}),
    )


def _round_step(digits: str) -> float:
    """A whole number that ends in zeros after two other digits may be rounded to these: 130,000 to the next 10,000."""
    zeros = min(len(digits) - len(digits.rstrip("0")), 300)
    return 10.0 ** max(0, min(zeros, len(digits) - 2))


def _bound(before: str, behind: str = "") -> tuple[Bound, bool]:
    """The bound that the words around a number set, and whether it leaves the number itself out."""
    match = _BOUND.search(before[-40:])
    if match:
        words = (match["above"] or match["below"] or "").lower()
        strict = words in ("<", ">") or words.startswith("exceed") or ("than" in words and not words.startswith("no"))
        return ("above" if match["above"] else "below" if match["below"] else "about"), strict
    if match := _BOUND_BEHIND.match(behind):
        return ("above" if match["above"] else "below"), False
    return "", False


def _sign(before: str) -> Sign:
    if _MINUS.search(before):
        return "-"
    return "+" if _PLUS.search(before) else ""


def _label(before: str) -> str:
    """The word that a number belongs to as a name: "type 2", "MEK 1"."""
    match = re.search(r"([^\W\d_]+)[\s-]\s*$", before)
    if not match:
        return ""
    word = match.group(1)
    if _singular(word) in _LABELS:
        return _singular(word)
    return (
        word.lower()
        if word.isupper()
        and len(word) <= 5
        and word not in ("A", "I", "N", "OR", "HR", "RR", "SD", "SE", "CI", "IQR", "AND")
        else ""
    )


def _label_behind(rest: str) -> str:
    """ "3-kinase" is a name as "type 3" is, and "23-lab study" does no worse for being treated alike."""
    match = re.match(r"-([^\W\d_]{3,})", rest)
    return f"-{_singular(match.group(1))}" if match else ""


def _singular(word: str) -> str:
    word = word.lower()
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word.removesuffix("es") if word.endswith("sses") else word if word.endswith("ss") else word.removesuffix("s")


def _noun(rest: str) -> str:
    match = re.match(r"[\s-]([^\W\d_]{2,})", rest)
    word = match.group(1).lower() if match else ""
    return "" if word in STOP_WORDS else word


def _unit(rest: str) -> tuple[str, float, int]:
    """Unit, its worth, and the length that it takes of the text after a number."""
    if times := _TIMES.match(rest):
        return "fold", 1, times.end()
    match = _UNIT.match(rest)
    if not match:
        return "", 1, 0
    name = match.group(1)
    if re.match(r"%|per\s?cent|pp$", name, re.I):
        return "%", 1, match.end()
    if name.startswith("°"):
        return "degree", 1, match.end()
    key = re.sub(r"\s", "", name)
    known = _UNITS.get(key.lower())
    # "5 M" and "5 m", "10 S": single letters are units only in their own case and near to the number.
    if not known or (len(key) == 1 and (key != key.lower() or match.group().startswith("  "))):
        return "", 1, 0
    return known[0], known[1], match.end()


def _from_words(text: str, taken: set[int]) -> list[Number]:
    words = _Words(text)
    found: list[Number] = []
    position = 0
    while position < len(words.spans):
        number, position = _from_word(words, position)
        if number and number.span[0] not in taken:
            found.append(number)
    return found


class _Words:
    """The words of a text, and which of them stand next to each other."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.spans = [match.span() for match in _WORD.finditer(text)]
        self.words = [text[start:end].lower() for start, end in self.spans]

    def at(self, position: int) -> str:
        return self.words[position] if position < len(self.words) else ""

    def after(self, position: int) -> str:
        """The word that follows with a space or a hyphen between, else nothing."""
        if position + 1 >= len(self.words):
            return ""
        gap = self.text[self.spans[position][1] : self.spans[position + 1][0]]
        return self.words[position + 1] if gap in (" ", "-", "\n") else ""


def _from_word(words: _Words, position: int) -> tuple[Number | None, int]:
    """The number that begins with a word, if one does, and the position of the word behind it."""
    word, following = words.at(position), words.after(position)
    start, end = words.spans[position]
    text, fold = words.text, word.removesuffix("fold")
    if word in _WORDS or word in ("a", "an"):
        if following in _FRACTIONS and (word not in ("a", "an") or not following.endswith("s")):
            end = words.spans[position + 1][1]
            # "a third attempt" is an ordinal; "a third of", "two thirds" are not.
            share = following == "half" or following.endswith("s") or _OF.match(text[end : end + _NEAR])
            value = _WORDS.get(word, 1) * _FRACTIONS[following]
            return (_fraction(text, start, end, value) if share else None), position + 2
        if word in _WORDS or following in _SCALES:
            return _cardinal(words, position)
    elif word.endswith("fold") and fold in _WORDS:
        return _fold(text, start, end, _WORDS[fold]), position + 1
    elif word in _FOLDS:
        return _fold(text, start, end, _FOLDS[word]), position + 1
    elif word in ("half", "halved", "halves", "halving"):
        return _fraction(text, start, end, 0.5), position + 1
    elif word == "dozen":
        bound, strict = _bound(_before(text, start))
        return Number(text[start:end], (start, end), 12, 0, bound=bound, strict=strict, word=True), position + 1
    elif word in _ORDINALS:
        return Number(text[start:end], (start, end), _ORDINALS[word], 0, "ordinal", word=True), position + 1
    return None, position + 1


def _cardinal(words: _Words, position: int) -> tuple[Number, int]:
    """ "twenty-three", "two hundred and fifty", "a thousand"."""
    start, last = words.spans[position][0], position
    whole, part = 0.0, float(_WORDS.get(words.at(position), 1))
    while following := words.after(last):
        skip = following == "and" and words.at(last) in _SCALES and words.after(last + 1) in _WORDS
        word, at = (words.at(last + 2), last + 2) if skip else (following, last + 1)
        if word == "hundred" and part < 100:
            part *= 100
        elif word in _SCALES and word != "hundred" and part:
            whole, part = whole + part * _SCALES[word], 0.0
        elif word in _WORDS and (words.at(last) in _SCALES or (words.at(last) in _TENS and 0 < _WORDS[word] < 10)):
            part += _WORDS[word]
        else:
            break
        last = at
    end = words.spans[last][1]
    unit, worth, length = _unit(words.text[end : end + _NEAR])
    before, rest = _before(words.text, start), words.text[end : end + _NEAR]
    bound, strict = _bound(before, rest[length:])
    number = Number(
        words.text[start : end + length].strip(),
        (start, end + length),
        (whole + part) * worth,
        0,
        worth=worth,
        unit=unit,
        bound=bound,
        strict=strict,
        word=True,
        label="" if unit else _label(before),
        noun="" if unit else _noun(rest),
    )
    return number, last + 1


def _before(text: str, start: int) -> str:
    return text[max(0, start - _NEAR) : start]


def _fraction(text: str, start: int, end: int, share: float) -> Number:
    bound, strict = _bound(_before(text, start))
    return Number(
        text[start:end],
        (start, end),
        100 * share,
        0,
        unit="%",
        bound=bound,
        strict=strict,
        word=True,
        loose=True,
        same_as=((share, ""),),
    )


def _fold(text: str, start: int, end: int, value: float) -> Number:
    return Number(text[start:end], (start, end), value, 0, unit="fold", word=True, same_as=((100 * (value - 1), "%"),))


def _shared_units(text: str, numbers: list[Number]) -> list[Number]:
    """Numbers of a list or range get the unit of its last: "10, 20 and 30%"; "2010–15" becomes 2010 and 2015."""
    shared = list(numbers)
    for i in range(len(shared) - 1, 0, -1):
        left, right = shared[i - 1], shared[i]
        gap = text[left.span[1] : right.span[0]]
        if left.span[1] > right.span[0] or len(gap) > 8 or not _LIST.fullmatch(gap):
            continue
        if (
            left.kind == "year"
            and right.kind == "quantity"
            and not right.unit
            and re.fullmatch(r"\d\d", right.printed)
            and re.fullmatch(r"[–—-]", gap)
        ):
            century = left.value // 100 * 100
            shared[i] = replace(right, value=century + right.value, kind="year")
        elif left.kind == right.kind == "quantity" and not left.unit and not right.unit and left.noun == "":
            shared[i - 1] = replace(left, noun=right.noun)
        elif left.kind == right.kind == "quantity" and not left.unit and right.unit and right.unit not in ("p", "fold"):
            shared[i - 1] = replace(
                left, value=left.value * right.worth, step=left.step * right.worth, worth=right.worth, unit=right.unit
            )
    for i in range(1, len(shared)):  # grade 2 or 3
        left, right = shared[i - 1], shared[i]
        gap = text[left.span[1] : right.span[0]]
        if (
            left.label
            and not right.label
            and not right.unit
            and right.kind == "quantity"
            and len(gap) <= 8
            and _LIST.fullmatch(gap)
        ):
            shared[i] = replace(right, label=left.label)
    return shared


def _intervals(text: str, numbers: list[Number]) -> list[Number]:
    """Both ends of an interval have a sign, if only one of them prints it: "-0.07 to 0.15", "from 0.07 to 0.15"."""
    signed = list(numbers)
    for i in range(1, len(signed)):
        left, right = signed[i - 1], signed[i]
        gap = text[left.span[1] : right.span[0]]
        if left.step >= 1 or right.step >= 1 or left.word or right.word or not _TO.fullmatch(gap):
            continue
        if not (left.sign or right.sign or _FROM.search(_before(text, left.span[0]))):
            continue
        # "0.2-0.4" is a range; "0.2, -0.4" and "-0.4 - -0.2" have a minus of their own.
        minus = re.search(r"[^\s][\s]*(?:\s|[,;–—])[-–]$", f"x{gap}") and not re.fullmatch(r"\s*[-–]", gap)
        signed[i - 1] = replace(left, sign=left.sign or "+")
        signed[i] = replace(right, sign=right.sign or ("-" if minus else "+"))
    return signed


def _ratios(text: str, numbers: list[Number]) -> list[Number]:
    """ "1 in 5", "one in five", "three out of ten": a share as well as two numbers. "0.04 in 10 laboratories" is none."""
    joined: list[Number] = []
    for number in numbers:
        if joined and number.kind == "quantity" and joined[-1].kind == "quantity" and not joined[-1].unit:
            first = joined[-1]
            gap = text[first.span[1] : number.span[0]]
            if (
                re.fullmatch(r"\s+(?:in(?:\s+every)?|out\s+of)\s+", gap)
                and not (number.unit or first.label or first.glued or number.glued)
                and 0 < first.value < number.value
                and first.value <= 10
                and first.value == int(first.value)
                and first.step in (0, 1)
                and number.value in _WHOLES
            ):
                share = Number(
                    first.printed, first.span, 100 * first.value / number.value, 0,
                    unit="%", bound=first.bound, strict=first.strict, word=True,
                )  # fmt: skip
                joined[-1], number = replace(first, share=share), replace(number, share=share)
        joined.append(number)
    return joined
