"""Who gets room in the batch, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from batching import OVERTAKES, Batch, Room, Unsupported, failure
from sampling import GREEDY


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


# --- the batch itself --------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> Any:
    """A tiny model that reads 16,384 tokens and has no end of its own."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=16384,
        eos_token_id=None,
        pad_token_id=2,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def prompt(seed: int, length: int) -> list[int]:
    numbers: list[int] = torch.randint(5, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return numbers


async def answer(batch: Batch, ids: list[int], new: int, show: Callable[[list[int]], None] | None = None) -> None:
    pages = batch.pages(len(ids) + new)
    slot = await batch.room.take(pages)
    try:
        await batch.run(ids, new, GREEDY, slot, show)
    finally:
        batch.room.give(pages, slot)


@pytest.mark.parametrize(
    ("kv_tokens", "earlier", "long", "new", "short"),
    [
        (1024, 3, 33, 300, 400),  # the memory is full of pages that earlier prompts have left
        (16384, 0, 14000, 600, 1400),  # little of it is left, and the short job's is promised to it
    ],
)
def test_a_job_that_has_room_begins_at_once(
    network: Any, kv_tokens: int, earlier: int, long: int, new: int, short: int
) -> None:
    batch = Batch(network, [], 16384, kv_tokens=kv_tokens)

    async def story() -> None:
        for seed in range(earlier):
            await answer(batch, prompt(seed, 200), 3)
        told = asyncio.Event()
        tokens = 0
        began: list[int] = []

        def of_the_long_one(new_tokens: list[int]) -> None:
            nonlocal tokens
            tokens += len(new_tokens)
            told.set()

        first = asyncio.create_task(answer(batch, prompt(10, long), new, of_the_long_one))
        await told.wait()
        before = tokens
        await answer(batch, prompt(11, short), 5, lambda _: began.append(tokens))
        assert began[0] - before < 40, "a handful of passes to read the prompt"
        await first
        assert tokens == new

    try:
        asyncio.run(asyncio.wait_for(story(), 100))
    finally:
        batch.close()


def test_a_job_that_is_cancelled_between_two_passes_spoils_neither(network: Any) -> None:
    """With CUDA graphs a pass is prepared while the one before still runs; here its steps are taken by hand."""
    batch = Batch(network, [], 16384, kv_tokens=4096)
    manager = batch._manager
    processor = manager.batch_processor
    batch.close()
    manager.start()
    manager.stop(keep_for_next_session=True)
    manager.background_thread_status.clear()
    processor.use_async_batching = True
    manager.add_request(prompt(1, 100), request_id="first", max_new_tokens=50, sampling=GREEDY, slot=0)
    assert processor.prepare_next_batch()
    processor._generation_step(network)
    running = processor.inputs_and_outputs.requests_in_batch
    manager.cancel_request("first")
    manager.add_request(prompt(2, 100), request_id="second", max_new_tokens=50, sampling=GREEDY, slot=1)
    assert processor.prepare_next_batch()
    processor.inputs_and_outputs.prepare_batch_update = lambda: (running, [7], None)
    processor.update_batch()
    assert list(processor.scheduler.active_requests) == ["second"]


def test_pages_that_are_only_kept_are_not_in_use(network: Any) -> None:
    batch = Batch(network, [], 16384, kv_tokens=4096)
    try:
        asyncio.run(answer(batch, prompt(1, 1000), 3))
        metrics = batch.metrics()
        assert metrics["kv_used_ratio"] < 0.02
        assert metrics["kv_kept_ratio"] > 0.2
        assert metrics["kv_reserved_ratio"] == 0
    finally:
        batch.close()


def test_a_model_on_several_devices_or_with_eager_attention_is_not_batched(network: Any) -> None:
    network.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(Unsupported, match="several devices"):
        Batch(network, [], 16384, kv_tokens=4096)
    del network.hf_device_map
    network.set_attn_implementation("eager")
    with pytest.raises(Unsupported, match="eager"):
        Batch(network, [], 16384, kv_tokens=4096)
    assert network.config._attn_implementation == "eager"


def test_what_went_wrong_on_the_device_asks_for_a_new_worker() -> None:
    for problem, code in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "OUT_OF_MEMORY"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "OUT_OF_MEMORY"),
        ("CUDA error: device-side assert triggered", "GPU_LOST"),
    ):
        error = failure(problem)
        assert (error.code, error.refresh) == (code, True)
        assert "new worker" in str(error)
