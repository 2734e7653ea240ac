"""Numbers: what counts as one, what a source must have, and what is only said in another way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.support import PROPERTY

import figures


@pytest.mark.parametrize(
    ("claim", "source"),
    [
        ("1,200 people", "1200 people"),
        ("1200 people", "1\u2009200 people"),
        ("1200 people", "1 200 people"),
        ("twelve labs", "12 labs"),
        ("Twenty-three labs", "23 labs"),
        ("two hundred people", "200 people"),
        ("a dozen labs", "12 labs"),
        ("one hundred and fifty labs", "150 labs"),
        ("two thousand one hundred people", "2,100 people"),
        ("three hundred forty-two thousand", "342,000"),
        ("nearly nineteen thousand", "18,976"),
        ("aged 18–35", "18 to 35 years of age"),
        ("four decades", "40 years"),
        ("a mean age of 34.5 years", "mean age 34.5"),
        ("3.5 million", "3,500,000"),
        ("40 percent", "40%"),
        ("40 per cent", "40 %"),
        ("40%", "a share of 0.40"),
        ("sixty percent", "60%"),
        ("half of them", "50%"),
        ("half of them", "49.6% of them"),
        ("a third of the nurses", "33.5% of the nurses"),
        ("two-thirds", "66.7%"),
        ("one in five", "20%"),
        ("20%", "one in five"),
        ("one in five", "19.6%"),
        ("1 in 100", "1%"),
        ("more than one in five", "23% and five sites"),
        ("no effect in 12 of 23 labs", "12 labs of 23"),
        ("d = -0.04", "d = −0.04"),
        ("a 95% CI from -0.07 to 0.15", "95% CI [-0.07, 0.15]"),
        ("an effect of 0.04", "d = -0.04"),  # "0.04 lower" says so
        ("a range of 0.2-0.4", "0.2 and 0.4"),
        ("aged over 18", "18 years or older"),
        ("at least 5 mg", "5 mg or more"),
        ("at least 100 labs", "100 labs"),
        ("not more than 100 labs", "100 labs"),
        ("10, 20 and 30%", "10% and 20% and 30%"),
        ("10, 20 and 30 mg", "30 mg, 10 mg, 20 mg"),
        ("0.2–0.4 mg", "0.2 mg to 0.4 mg"),
        ("2 hours", "120 minutes"),
        ("20-minute naps", "naps of 20 min"),
        ("1 year", "12 months"),
        ("500 mg", "0.5 g"),
        ("twice as likely", "a 2-fold risk"),
        ("doubled", "an increase of 100%"),
        ("0.5", "0.48"),
        ("48%", "47.7%"),
        ("130,000 people", "130,417 people"),
        ("2,000 people", "1,964 people"),
        ("about 2,000 people", "1,964 people"),
        ("more than 100 labs", "107 labs"),
        ("fewer than 100 labs", "97 labs"),
        ("p < .05", "p = .03"),
        ("p < .05", "P<0.05"),
        ("p < .05", "p < .001"),
        ("5.2 ± 1.1", "5.2 (SD 1.1)"),
        ("d = -0.2", "a difference of 0.2"),
        ("0.05", "0·05"),
        ("0,05 %", "0.05%"),
        ("1.5 × 10^6", "1.5 x 10(6)"),
        ("10⁻⁸", "10^-8"),
        ("95% CI 0.24 to 1.12", "0.24–1.12"),
        ("from 2010 to 2015", "2010–15"),
        ("the 1990s", "around 1990"),
        ("the 19th century", "the 19th century"),
        ("type 2 diabetes", "type 2 diabetes"),
        ("interleukin-2", "IL-2"),
        ("MEK 1/2 inhibitors", "MEK1 and MEK2"),
        ("a 12-item scale", "a scale of 12 items"),
    ],
)
def test_the_same_number_in_other_words(claim: str, source: str) -> None:
    assert figures.missing(claim, source) == []


@pytest.mark.parametrize(
    ("claim", "source", "missing"),
    [
        ("23 labs", "24 labs", ["23"]),
        ("three labs", "four labs", ["three"]),
        ("40%", "12 of 30", ["40%"]),  # derived: nobody printed it
        ("40%", "40 people", ["40%"]),
        ("20 minutes", "20 hours", ["20 minutes"]),
        ("20 nurses", "20 minutes", ["20"]),
        ("400 mg", "400 IU", ["400 mg"]),
        ("0.48", "0.5", ["0.48"]),  # more than the source knows
        ("0.5", "0.44", ["0.5"]),
        ("2,000 people", "1,940 people", ["2,000"]),
        ("1,400 people", "1,000 people", ["1,400"]),
        ("more than 100 labs", "97 labs", ["100"]),
        ("up to 751 people", "750 people", ["751"]),
        ("p = .05", "p < .05", [".05"]),
        ("p < .001", "p < .05", [".001"]),
        ("p = .03", "p = .30", [".03"]),
        ("0.2–0.4", "0.2–0.5", ["0.4"]),
        ("5.2 ± 1.1", "5.2 ± 1.2", ["1.1"]),
        ("in 2016", "in 2015", ["2016"]),
        ("half of them", "62% of them", ["half"]),
        ("twice as likely", "more likely", ["twice"]),
        ("the 19th century", "the 18th century", ["19th"]),
        ("type 2 diabetes", "2 people with type 1 diabetes", ["2"]),
        ("IL-7", "IL-6", ["7"]),
        ("d = 0.04 in 9,999 participants", "d = 0.04 in 2,141 participants", ["9,999"]),
        ("d = 0.04 in 12 laboratories", "d = 0.04 in 23 laboratories", ["12"]),
        ("d = 0.04 in nine laboratories", "d = 0.04 in 23 laboratories", ["nine"]),
        ("d = 0.04 in two thousand five hundred people", "d = 0.04, 2,141 people", ["two thousand five hundred"]),
        ("2 in 50 people", "d = 0.04 and 0.02", ["2", "50"]),
        ("five in seventy cohorts", "8%", ["five", "seventy"]),
        ("one in five", "24%", ["five"]),
        ("a tenth of them", "14%", ["a tenth"]),
        ("p > .05", "p < .05", [".05"]),
        ("p > .001", "p < .001", [".001"]),
        ("p > .03", "p = .03", [".03"]),
        ("p < .03", "p = .03", [".03"]),
        ("more than 100 labs", "fewer than 100 labs", ["100"]),
        ("fewer than 100 labs", "more than 100 labs", ["100"]),
        ("more than 50%", "less than 50%", ["50%"]),
        ("more than 50%", "50%", ["50%"]),
        ("more than half", "less than half", ["half"]),
        ("at least 5 mg", "at most 5 mg", ["5 mg"]),
        ("at most 5 mg", "5 mg or more", ["5 mg"]),
        ("more than 100 labs", "100 labs", ["100"]),
        ("d = -0.04", "d = 0.04", ["0.04"]),
        ("d = 0.04", "d = −0.04", ["0.04"]),
        ("an effect of –0.04", "d = 0.04", ["0.04"]),
        ("95% confidence interval from 0.07 to 0.15", "95% confidence interval from -0.07 to 0.15", ["0.07"]),
        ("95% CI [0.07, 0.15]", "95% CI [-0.07, 0.15]", ["0.07"]),
        ("95% CI -0.07 to -0.15", "95% CI -0.07 to 0.15", ["0.15"]),
        ("23 of 23 and 23", "24", ["23"]),  # each once
        ("7 and 9", "", ["7", "9"]),
    ],
)
def test_a_number_that_the_source_has_not(claim: str, source: str, missing: list[str]) -> None:
    assert figures.missing(claim, source) == missing


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        "one of them, and at first no one",  # words of the language
        "COVID-19 in 5-HT cells with p53",  # names
        "Louis XIV and phase II",  # Roman numerals
        "Bem (2011) and Klein et al. (2018)",  # whose years the citation check compares
        "as found before (Bem, 2011; Klein et al., 2018)",
        "naps [S12] help [S3, S4]",  # citations
        "https://example.org/2020/31 and doi:10.1037/a0018251",
        "a third attempt",
        "a second later",
    ],
)
def test_what_is_no_number_for_a_source_to_have(text: str) -> None:
    assert figures.missing(text, "nothing at all") == []


def test_numbers_are_parsed_with_place_unit_and_bound() -> None:
    text = "More than 20 mg in 3 groups (p < .01)"
    found = [(text[slice(*n.span)], round(n.value, 9), n.unit, n.bound) for n in figures.parse(text)]
    assert found == [("20 mg", 0.02, "g", "above"), ("3", 3, "", ""), (".01", 0.01, "p", "below")]


NUMBERS = st.one_of(
    st.integers(2, 10**7).map(str),
    st.integers(1000, 10**7).map(lambda n: f"{n:,}"),
    st.decimals(0, 1000, places=2).map(str),
    st.integers(1, 100).map(lambda n: f"{n}%"),
    st.integers(1, 500).map(lambda n: f"{n} mg"),
    st.sampled_from("two three twelve twice half".split()),
)


@given(st.lists(NUMBERS, min_size=1, max_size=6), st.text(max_size=40))
@PROPERTY
def test_a_text_has_its_own_numbers(numbers: list[str], more: str) -> None:
    text = " xx, ".join(numbers) + " xx."
    assert figures.missing(text, f"{text}\n{more}") == []


@given(st.integers(10, 10**6), st.integers(1, 10**6))
@PROPERTY
def test_whole_numbers_of_full_precision_are_only_themselves(number: int, more: int) -> None:
    number += not number % 10
    assert figures.missing(f"{number:,} people", f"{number + more} people") == [f"{number:,}"]


@given(st.text(max_size=300), st.text(max_size=300))
@PROPERTY
def test_any_text_can_be_compared(claim: str, source: str) -> None:
    assert figures.missing(claim, source) == figures.missing(claim, source)
    for number in figures.parse(claim):
        assert (
            0 <= number.span[0] < number.span[1] <= len(claim)
            or any(c in claim for c in "½¼¾⅓⅔")
            or not claim.isascii()
        )


def test_a_hostile_text_takes_no_time() -> None:
    for text in (
        "1," * 50_000,
        "9" * 100_000,
        "1 000 " * 20_000,
        "a-1" * 30_000,
        "(" * 50_000 + "2011",
        "twenty " * 20_000,
    ):
        figures.parse(text)
