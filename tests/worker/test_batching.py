"""Who gets room in the batch, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import OVERTAKES, Room, failure


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_first_come_first_served() -> None:
    async def story() -> None:
        room = Room(pages=4, slots=8)
        slot = await room.take(4)
        order: list[int] = []

        async def job(number: int) -> None:
            await room.take(4)
            order.append(number)

        jobs = [asyncio.create_task(job(number)) for number in range(3)]
        await settle()
        assert order == []
        for done in range(3):
            room.give(4, slot)
            await settle()
            assert order == list(range(done + 1))
        await asyncio.gather(*jobs)

    run(story())


def test_a_small_job_passes_a_large_one_but_not_for_ever() -> None:
    async def story() -> None:
        room = Room(pages=10, slots=100)
        held = await room.take(8)
        large = asyncio.create_task(room.take(10))
        await settle()
        for _ in range(OVERTAKES):
            slot = await asyncio.wait_for(room.take(1), 1)
            room.give(1, slot)
        small = asyncio.create_task(room.take(1))
        await settle()
        assert not small.done(), "there is room for it, and it is the large one's turn"
        room.give(8, held)
        slot = await large
        assert not small.done()
        room.give(10, slot)
        await small

    run(story())


def test_slots_run_out_too() -> None:
    async def story() -> None:
        room = Room(pages=100, slots=2)
        slots = {await room.take(1), await room.take(1)}
        assert slots == {0, 1}
        third = asyncio.create_task(room.take(1))
        await settle()
        assert not third.done()
        room.give(1, 0)
        assert await third == 0

    run(story())


def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    async def story() -> None:
        room = Room(pages=10, slots=10)
        held = await room.take(10)
        first, second = asyncio.create_task(room.take(10)), asyncio.create_task(room.take(1))
        await settle()
        first.cancel()
        await settle()
        room.give(10, held)
        slot = await second
        # Cancelled in the very moment in which it was admitted.
        third = asyncio.create_task(room.take(10))
        await settle()
        room.give(1, slot)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        assert room.free_pages == 10
        assert not room.waiting

    run(story())


@settings(max_examples=50, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3), st.booleans()), min_size=1, max_size=40),
    slots=st.integers(1, 5),
)
def test_room_is_never_given_twice_and_everyone_gets_it(jobs: list[tuple[int, int, bool]], slots: int) -> None:
    async def story() -> None:
        room = Room(pages=12, slots=slots)
        held: dict[int, int] = {}
        served = 0

        async def job(pages: int, steps: int) -> None:
            nonlocal served
            slot = await room.take(pages)
            try:
                assert slot not in held
                held[slot] = pages
                assert sum(held.values()) <= 12
                for _ in range(steps):
                    await asyncio.sleep(0)
                served += 1
            finally:
                del held[slot]
                room.give(pages, slot)

        tasks = [asyncio.create_task(job(pages, steps)) for pages, steps, _ in jobs]
        await asyncio.sleep(0)
        for task, (_, _, cancel) in zip(tasks, jobs, strict=True):
            if cancel:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(result is None for result in results) == served
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        assert served >= sum(not cancel for _, _, cancel in jobs)
        assert room.free_pages == 12
        assert not room.waiting

    run(story())


def test_what_went_wrong_on_the_device_asks_for_a_new_worker() -> None:
    for problem, code in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "OUT_OF_MEMORY"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "OUT_OF_MEMORY"),
        ("CUDA error: device-side assert triggered", "GPU_LOST"),
    ):
        error = failure(problem)
        assert (error.code, error.refresh) == (code, True)
        assert "new worker" in str(error)
