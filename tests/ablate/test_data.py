# SPDX-License-Identifier: AGPL-3.0-or-later
"""The shipped questions and prose are as many, as varied and as clean as the README beside them says."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import measures
from common.text import clean

DATA = Path(measures.__file__).with_name("data")
BENIGN = (DATA / "benign.txt").read_text(encoding="utf-8")
NEUTRAL = (DATA / "neutral.txt").read_text(encoding="utf-8")
QUESTIONS = measures.questions(BENIGN)


def by_topic() -> dict[str, int]:
    """Questions below each heading."""
    topics: Counter[str] = Counter()
    topic = ""
    for line in BENIGN.splitlines():
        if line.startswith("# "):
            topic = line
            assert topic not in topics
            topics[topic] = 0
        elif line.strip():
            assert topic, "a question before the first heading"
            topics[topic] += 1
    return topics


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_there_are_enough_questions() -> None:
    assert len(QUESTIONS) >= 120


def test_topics_are_many_and_balanced() -> None:
    topics = by_topic()
    assert len(topics) >= 12
    assert max(topics.values()) <= 1.5 * min(topics.values())
    assert sum(topics.values()) == len(QUESTIONS)


def test_no_question_comes_twice_or_nearly_so() -> None:
    sets = [frozenset(word for word in words(question) if len(word) > 3) for question in QUESTIONS]
    for place, one in enumerate(sets):
        for other in sets[:place]:
            assert len(one & other) / len(one | other) < 0.5, (sorted(one), sorted(other))


def test_each_question_is_one_whole_sentence_or_two() -> None:
    for question in QUESTIONS:
        assert 40 <= len(question) <= 200, question
        assert question[0].isupper(), question
        assert question[-1] in "?.", question


def test_wording_varies() -> None:
    openings = Counter(question.split()[0] for question in QUESTIONS)
    assert len(openings) >= 15
    assert max(openings.values()) <= len(QUESTIONS) / 3


def test_prose_is_long_and_varied() -> None:
    paragraphs = [block for block in NEUTRAL.split("\n\n") if block.strip()]
    assert len(words(NEUTRAL)) >= 2000
    assert len(paragraphs) >= 15
    assert all(80 <= len(words(block)) <= 200 for block in paragraphs)
    assert len(set(words(NEUTRAL))) >= 700
    sentences = re.split(r"(?<=[.!?])\s+", NEUTRAL)
    assert len(sentences) == len(set(sentences))


@pytest.mark.parametrize("text", [BENIGN, NEUTRAL], ids=["benign", "neutral"])
def test_files_hold_plain_text_alone(text: str) -> None:
    assert text.isascii()
    assert clean(text) == text
    assert text.endswith("\n")
    assert not any(line != line.strip() for line in text.splitlines())


def test_readme_gives_the_true_numbers() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    assert f"{len(QUESTIONS)} research questions on {len(by_topic())} sensitive topics" in readme
    stated = re.search(r"about ([\d,]+) words", readme)
    assert stated
    assert abs(int(stated[1].replace(",", "")) - len(NEUTRAL.split())) < 100
    assert "CC0-1.0" in readme
