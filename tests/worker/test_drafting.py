"""What is drafted, and when drafts pause."""

from __future__ import annotations

from drafting import DRAFT, PAUSE, RECENT, Lookup


def test_what_followed_the_last_three_tokens_is_the_draft() -> None:
    text = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3])
    assert text.draft() == [4, 5, 6, 7, 8]
    assert len(text.draft()) == DRAFT
    text.add([4])
    assert text.draft() == [5, 6, 7, 8, 9]
    text.add([50])
    assert text.draft() == []


def test_the_last_place_counts() -> None:
    text = Lookup([1, 2, 3, 10, 1, 2, 3, 11, 12, 1, 2, 3])
    assert text.draft()[:2] == [11, 12]


def test_a_run_does_not_find_itself() -> None:
    assert Lookup([1, 2, 3]).draft() == []
    assert Lookup([]).draft() == []
    assert Lookup([7, 7, 7, 7]).draft() == [7]


def test_drafts_pause_while_they_fail() -> None:
    text = Lookup([1, 2, 3, 4, 1, 2, 3])
    for _ in range(RECENT - 1):
        text.judge(0)
        assert text.draft()
    text.judge(0)
    assert text.draft() == []
    text.add([9] * (PAUSE - 3))
    text.add([1, 2, 3])
    assert text.draft(), "after a while they are tried again"
    for _ in range(RECENT * 3):
        text.judge(2)
    assert text.draft(), "and go on while they pay"
