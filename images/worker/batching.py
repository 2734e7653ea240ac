"""Many jobs at once: transformers' continuous batching behind an admission by free KV memory.

The manager's thread runs one forward pass after the other. Each takes along a token of every job that is answering,
and, within a limit of tokens, prompts that are still being read: a long prompt is read in pieces between the tokens of
the others. Keys and values lie in pages; the pages of a prompt's beginning that an earlier job has filled are shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

import paged_attention
from engines import JobError
from sampling import GREEDY, BatchSampling, Sampling

SLOTS = 64  # jobs in one batch at most
OVERTAKES = 16  # how often smaller jobs may go before one that waits for memory
GPU_PAGE, PAGE = 256, 32  # tokens; flash attention reads pages of 256, and smaller ones share more of a prompt
GPU_BATCH_TOKENS, BATCH_TOKENS = 2048, 512  # tokens in a forward pass: what a long prompt may delay the others by
GPU_MEMORY = 0.8  # of what is free once the model is loaded; the rest is for activations
STOP_SECONDS = 10.0
LOOK_SECONDS = 2.0  # between two looks at whether the batch's thread is still there
LEAST_LIKELY = 1.0  # how much less likely, in nats, the batch's token may be than the model's own choice


class Unsupported(Exception):
    """This model cannot be batched; the message says why."""


class AdmittedScheduler(FIFOScheduler):  # type: ignore[misc] # transformers has no types here
    """For jobs that Room has admitted with all the memory that they can come to need: none of them is held back."""

    def clear_cancelled_requests(self) -> list[Any]:
        """Forget what was cancelled. A pass that is still running may hold such a request, whose pages are gone: marked
        as finished it is passed over when that pass ends."""
        cancelled: list[Any] = super().clear_cancelled_requests()
        for state in cancelled:
            state._status = RequestStatus.FINISHED
        return cancelled

    def _try_to_meet_safety_margin(self) -> bool:
        """Give up pages that are kept for prompts to come where those to be read now, and a token of each job, may not
        fit beside them. (transformers gives them up once a share of the memory is used, and holds back prompts then.)"""
        cache = self.cache
        cache.pool.try_to_free_sectors()
        page = min(allocator.tokens_per_page for allocator in cache.cache_allocators.values())
        reading = [*self.waiting_requests.values(), *self.active_requests.values()]
        needed = sum(
            1 + math.ceil(min(len(state.remaining_prefill_tokens), cache.max_batch_tokens) / page) for state in reading
        )
        if cache.compute_free_capacity() * cache.num_blocks < needed and cache.evict_cached_blocks():
            cache.pool.try_to_free_sectors()
        return True


SCHEDULER_MAPPING["admitted"] = AdmittedScheduler


@dataclass
class Waiting:
    """A job that waits for room."""

    pages: int
    admitted: asyncio.Future[int]
    overtaken: int = 0


class Room:
    """Pages of KV memory and slots of the batch, given out in order of arrival, except that a job that fits may go
    before one that does not, `OVERTAKES` times. A job gets all that it can come to need, so none is ever pushed out."""

    def __init__(self, pages: int, slots: int) -> None:
        self.pages = pages
        self.free_pages = pages
        self._free_slots = list(range(slots))
        self.waiting: deque[Waiting] = deque()

    async def take(self, pages: int) -> int:
        """Wait for `pages`, of which there must be as many, and a slot; the slot's number."""
        waiting = Waiting(pages, asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        self._admit()
        try:
            return await waiting.admitted
        except asyncio.CancelledError:
            if waiting.admitted.done() and not waiting.admitted.cancelled():
                self.give(pages, waiting.admitted.result())
            else:
                self.waiting.remove(waiting)
                self._admit()
            raise

    def give(self, pages: int, slot: int) -> None:
        """Return what `take` has given."""
        self.free_pages += pages
        self._free_slots.append(slot)
        self._admit()

    def _admit(self) -> None:
        passed: list[Waiting] = []
        for waiting in list(self.waiting):
            if not self._free_slots:
                return
            if waiting.admitted.cancelled():
                continue  # its task has not yet come to leave
            if waiting.pages <= self.free_pages:
                self.waiting.remove(waiting)
                self.free_pages -= waiting.pages
                for other in passed:
                    other.overtaken += 1
                waiting.admitted.set_result(self._free_slots.pop(0))
            elif waiting.overtaken >= OVERTAKES:
                return
            else:
                passed.append(waiting)


@dataclass(frozen=True)
class Done:
    """The tokens of an answer, its end included, and milliseconds."""

    tokens: list[int]
    queue_ms: float
    prefill_ms: float
    decode_ms: float


class Batch:
    """One model's batch."""

    def __init__(
        self,
        network: Any,
        ends: Sequence[int],
        window: int,
        *,
        kv_tokens: int,
        slots: int = SLOTS,
        memory: float = GPU_MEMORY,
    ) -> None:
        """Makes the KV memory and starts the manager's thread. `kv_tokens`: the memory's size without a GPU; with one it
        is the share `memory` of what is free. Raises Unsupported where this model cannot be batched, and
        torch.OutOfMemoryError."""
        if network.config._attn_implementation == "eager":
            raise Unsupported("transformers has no other attention for it than the eager one")
        if len(set(getattr(network, "hf_device_map", {}).values())) > 1:
            raise Unsupported("it is spread over several devices, and the pages lie on one")
        gpu = network.device.type == "cuda"
        flash = str(network.config._attn_implementation).startswith("flash_attention")
        self.page = GPU_PAGE if flash else PAGE
        if not gpu:
            paged_attention.install()
        vocabulary = network.config.get_text_config(decoder=True).vocab_size
        self._sampling = BatchSampling(slots, vocabulary, network.device)
        config = ContinuousBatchingConfig(
            page_size=self.page,
            num_blocks=None if gpu else math.ceil(kv_tokens / self.page),
            max_batch_tokens=GPU_BATCH_TOKENS if gpu else BATCH_TOKENS,
            max_memory_percent=memory,
            max_requests_per_batch=slots,
            # For the fast path of decoding; asked for where there is none, it only makes transformers warn.
            max_blocks_per_request=2 * math.ceil(window / self.page / 2) + 2 if flash else None,
            # Nothing is fetched at run time: the attention is the one that the model was loaded with.
            auto_switch_to_flash=False,
            # Graphs for decoding alone, one for each power of two of jobs. Those of prompts would be as many as there are
            # lengths, and are never given up.
            use_cuda_graph=(False, True) if flash else None,
            scheduler_type="admitted",
        )
        try:
            self._manager = network.init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=list(ends) or None, max_new_tokens=1),
                continuous_batching_config=config,
            )
            # The manager's own sampling settings are one for all jobs, and it drops those that it does not know.
            self._manager.logit_processor = self._sampling
            # This makes the memory, and records CUDA graphs where there are any.
            self._manager.warmup()
            self._sampling.compute_stream = self._manager.batch_processor.inputs_and_outputs.compute_stream
            self._manager.start()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Unsupported(f"{type(error).__name__}: {error}") from error
        self._cache = self._manager.batch_processor.cache
        self.graphs = any(self._manager.continuous_batching_config.cuda_graph_booleans)
        self.tokens = self._cache.num_blocks * self.page
        self.room = Room(self._cache.num_blocks, slots)
        self._numbers = itertools.count()

    def check(self, network: Any, ids: list[int]) -> None:
        """Compare the batch's next token after a prompt with the model's own. Raises Unsupported where they are far
        apart, or the batch fails: an attention that pages do not do justice to would go unnoticed."""
        request = self._manager.add_request(ids, max_new_tokens=1, sampling=GREEDY, slot=0)
        result = self._manager.get_result(request, timeout=600)
        if result is None or result.status == RequestStatus.FAILED:
            problem = str(result.error if result else self._fatal() or "no answer")
            if "out of memory" in problem:
                raise torch.OutOfMemoryError(problem)
            raise Unsupported(f"a trial failed: {problem}")
        try:
            with torch.inference_mode():
                scores = network(input_ids=torch.tensor([ids], device=network.device)).logits[0, -1].float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Unsupported(f"a trial failed: {type(error).__name__}: {error}") from error
        if scores.max() - scores[result.generated_tokens[0]] > LEAST_LIKELY:
            raise Unsupported("it chooses other tokens in a batch than alone")

    def pages(self, tokens: int) -> int:
        """The pages that a job of so many tokens, prompt and answer, needs."""
        return math.ceil(tokens / self.page)

    async def run(
        self, ids: list[int], new: int, sampling: Sampling, slot: int, show: Callable[[list[int]], None] | None
    ) -> Done:
        """Answer a prompt that has been given room, with at most `new` tokens; each new one goes to `show`.

        Raises JobError OUT_OF_MEMORY or GPU_LOST, both asking for a new worker. Cancelling ends the job's work with the
        forward pass that is running.
        """
        self._forget_strays()
        request = f"job-{next(self._numbers)}"
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._manager.register_result_handler(request, outputs.put_nowait)
        try:
            # add_request says nothing but None where the thread has ended.
            if not self._manager.add_request(
                ids,
                request_id=request,
                max_new_tokens=new,
                streaming=show is not None,
                record_timestamps=True,
                sampling=sampling,
                slot=slot,
            ):
                raise failure(await self._why_ended())
            shown = 0
            while True:
                output = await self._next(outputs)
                if output.status == RequestStatus.FAILED:
                    raise failure(self._fatal() or output.error)
                if show and len(output.generated_tokens) > shown:
                    show(output.generated_tokens[shown:])
                    shown = len(output.generated_tokens)
                if output.is_finished():
                    break
        except asyncio.CancelledError:
            self._manager.cancel_request(request)
            raise
        finally:
            self._manager.output_router.result_handlers.pop(request, None)
        begun, times = output.lifespan[0], output.timestamps
        return Done(
            output.generated_tokens,
            queue_ms=(begun - output.created_time) * 1000,
            prefill_ms=(times[0] - begun) * 1000,
            decode_ms=(times[-1] - times[0]) * 1000,
        )

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        """The next output of a request. One that was sent in the moment in which the thread ended would wait for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):  # (wait_for can swallow a cancellation in Python 3.11)
                    return await outputs.get()
            if not self._manager.is_running() and outputs.empty():
                raise failure(await self._why_ended())

    async def _why_ended(self) -> object:
        # The thread refuses requests a moment before it notes why.
        for _ in range(100):
            if error := self._fatal():
                return error
            await asyncio.sleep(0.01)
        return "the batch has ended"

    def _forget_strays(self) -> None:
        # What came for jobs that had been cancelled meanwhile.
        with contextlib.suppress(queue.Empty):
            while True:
                self._manager.output_router.output_queue.get_nowait()

    def _fatal(self) -> BaseException | None:
        error: BaseException | None = self._manager.background_thread_status.fatal_error
        return error

    def metrics(self) -> dict[str, float]:
        """Jobs in the batch and waiting; the shares of the KV memory that jobs use, that prompts to come may find again,
        and that is promised to jobs; the tokens that fit into it; forward passes."""
        processor = self._manager.batch_processor
        active = len(processor.scheduler.active_requests) if processor else 0
        kept = sum(
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in self._cache.cache_allocators.values()
        ) / (self._cache.num_sectors * self._cache.bytes_per_sector)
        return {
            "batch_size": float(active),
            "jobs_waiting": float(len(self.room.waiting)),
            "kv_used_ratio": max(0.0, 1 - self._cache.compute_free_capacity() - kept),
            "kv_kept_ratio": kept,
            "kv_reserved_ratio": 1 - self.room.free_pages / self.room.pages,
            "kv_tokens": float(self.tokens),
            "forward_passes_total": float(getattr(self._manager, "current_batch", 0)),
        }

    def close(self) -> None:
        """End the manager's thread; jobs that are running fail."""
        self._manager.stop(block=True, timeout=STOP_SECONDS, hard_stop=True)


def failure(problem: object) -> JobError:
    """The JobError for what went wrong on the device: after either the process cannot be trusted any more."""
    if isinstance(problem, torch.OutOfMemoryError) or "out of memory" in str(problem):
        return JobError(
            "OUT_OF_MEMORY",
            "the GPU has too little memory for this job; a new worker takes over, lower n_results or max_new_tokens",
            refresh=True,
        )
    return JobError("GPU_LOST", "the GPU reported an error; a new worker takes over, try again", refresh=True)
