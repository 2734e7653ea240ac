"""The transformers engine: the causal language model of MODEL_ID, loaded once, NF4 where a GPU is there.

Jobs run together in one batch (batching.py). A job that is alone runs with drafts (drafting.py) where the batch has no
CUDA graphs, and moves into the batch when another one comes. A model that cannot be batched answers one job after the
other. Whichever way a job goes, its settings apply in the same way (sampling.py) and its text is the same, as far as
the device computes the same scores for one row and for many.

Safety rules that do not depend on the model: no remote code, safetensors only.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from batching import GPU_MEMORY, SLOTS, Batch, Unsupported, failure
from chat import Chat, Encoded, Reader
from common.prompts import Prompts
from common.wire import Job
from drafting import Drafter
from engines import LOWEST_TEMPERATURE, Answer, JobError, Start
from fitness import form, gpu_memory, needed_bytes, ram
from sampling import Sampling, SamplingProcessor
from weights import Weights, attention, describe

CPU_KV_SHARE = 8  # without a GPU, KV memory is this part of the free memory, …
CPU_KV_TOKENS = 65536  # … and this many tokens at most
GPU_MEMORY_SHARES = (GPU_MEMORY, 0.5)  # for keys and values: the second where the first leaves too little to work in
TYPICAL_TOKENS = 4096  # of a job, prompt and answer: by this it is estimated how many run at once


def load(
    prompts: Prompts, model_id: str, weights: Weights, environ: Mapping[str, str], start: Start
) -> TransformersEngine:
    """Load the model in `weights.folder`; notes the seconds of each phase in `start`. Raises SystemExit, OSError."""
    begun = time.monotonic()
    folder = str(weights.folder)
    description = describe(weights.folder)
    gpu = torch.cuda.is_available()
    how = form(description, environ.get("QUANTIZATION"), gpu=gpu)
    quantization = "nf4" if how == "nf4" else description.quantization
    options: dict[str, Any] = {}
    if how == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if gpu:
        # On one of the GPUs if it fits there: a model that is spread over several cannot be batched.
        fits = sum(needed_bytes(description, how).values()) <= gpu_memory()[0]
        options["device_map"] = {"": 0} if fits or torch.cuda.device_count() == 1 else "auto"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    chat = Chat(tokenizer, prompts)
    network = _load_network(
        folder, attention(environ), dtype=torch.bfloat16 if gpu or quantization == "nf4" else torch.float32, **options
    )
    network.eval()
    ends = _ends(network, tokenizer)
    start.phases["load"] = time.monotonic() - begun
    begun = time.monotonic()
    model = {"id": model_id, "revision": weights.revision, "engine": "transformers", "quantization": quantization}
    kv_bytes = description.kv_bytes(1, network.dtype.itemsize)
    engine = TransformersEngine(chat, network, ends, model, kv_bytes=kv_bytes)
    start.phases["warmup"] = time.monotonic() - begun
    print(
        f"loaded {model_id} on {'GPU' if gpu else 'CPU'}, {quantization}, {network.dtype}; {engine.describe()}",
        flush=True,
    )
    return engine


def _load_network(folder: str, implementation: str, **options: Any) -> Any:
    def from_pretrained(chosen: str | None) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation=chosen,
            **options,
        )

    if implementation == "sdpa":  # what transformers takes by itself, where the model has it
        return from_pretrained(None)
    try:
        return from_pretrained(implementation)
    except (ValueError, ImportError) as error:
        print(f"attention: sdpa, because the model does not take {implementation} ({error})", flush=True)
        return from_pretrained(None)


def _ends(network: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer; all else in the repo's generation_config.json is dropped.

    The end of a turn is the tokenizer's to know, other ends are in that file. Its sampling, beams, lengths and penalties
    would mix with what a job asks for.
    """
    given = network.generation_config.eos_token_id
    ends: list[int] = [*given] if isinstance(given, list) else [] if given is None else [given]
    if tokenizer.eos_token_id not in (None, *ends):
        ends.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    network.generation_config = GenerationConfig(
        eos_token_id=ends or None, pad_token_id=ends[0] if pad is None and ends else pad
    )
    return ends


class TransformersEngine:
    """Generates with a model of transformers and its tokenizer's own chat template."""

    def __init__(
        self,
        chat: Chat,
        network: Any,
        ends: list[int],
        model: dict[str, Any],
        *,
        kv_bytes: int,
        kv_tokens: int | None = None,
        slots: int = SLOTS,
    ) -> None:
        """`kv_bytes`: the size of one token's keys and values. `kv_tokens`: that of the KV memory without a GPU, by
        default a part of what is free."""
        self.chat = chat
        self.network = network
        self.ends = ends
        self.model = model
        self._kv_bytes = kv_bytes
        config = network.config.get_text_config(decoder=True)
        self.window: int = getattr(config, "max_position_embeddings", None) or 2**31
        self.batch, self.why_alone = self._make_batch(kv_tokens or _kv_tokens(kv_bytes), slots)
        self.limit = min(self.window, self.batch.tokens) if self.batch else self.window
        self.capacity = max(1, min(slots, self.batch.tokens // min(TYPICAL_TOKENS, self.limit))) if self.batch else 1
        everything = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        self.drafter = None
        if everything and self.batch and not self.batch.graphs:
            try:
                self.drafter = Drafter(network, ends, chat.prefix)
            except BaseException:
                self.close()
                raise
        # Jobs outside of the batch: one at a time.
        self._alone = asyncio.Lock()
        self._jobs = 0
        self._totals = {"drafted_jobs_total": 0.0, "drafted_tokens_total": 0.0, "drafted_forward_passes_total": 0.0}

    def _make_batch(self, kv_tokens: int, slots: int) -> tuple[Batch | None, str]:
        """The batch, or why there is none. Raises SystemExit where the memory is too small for any."""
        for memory in GPU_MEMORY_SHARES:
            try:
                return self._tried_batch(kv_tokens, slots, memory), ""
            except Unsupported as reason:
                implementation = str(self.network.config._attn_implementation)
                if not implementation.startswith("flash"):
                    return None, str(reason)
                print(f"attention: sdpa, because with {implementation} there is no batch: {reason}", flush=True)
                self.network.set_attn_implementation("sdpa")
                return self._make_batch(kv_tokens, slots)
            except torch.OutOfMemoryError:
                print(f"the memory ran out with {memory:.0%} of it for keys and values", flush=True)
        raise SystemExit(
            "error: the GPU's memory is too small to serve this model: choose a larger GPU, or its -nf4 repository"
        )

    def _tried_batch(self, kv_tokens: int, slots: int, memory: float) -> Batch:
        sample = self.chat.encode(Job(prompt="Is it real?", context="It is."), None).ids
        batch = Batch(self.network, self.ends, self.window, kv_tokens=kv_tokens, slots=slots, memory=memory)
        try:
            batch.check(self.network, sample[: self.window - 1])
        except BaseException:
            batch.close()
            raise
        return batch

    def describe(self) -> str:
        """What can be said of it in a line."""
        if not self.batch:
            return f"context window {self.window} tokens; one job at a time, because it cannot be batched: {self.why_alone}"
        ways = "CUDA graphs" if self.batch.graphs else "no CUDA graphs"
        ways += ", drafts for a job that is alone" if self.drafter else ""
        return f"context window {self.limit} tokens; batched, KV memory for {self.batch.tokens} tokens, {ways}"

    # --- jobs ---

    async def answer(self, job: Job, emit: Callable[[str], None]) -> Answer:
        """Answer a job; each new stretch of the text goes to `emit`. Cancelling the task stops it at the next token.

        Raises JobError: those of Chat.encode; OUT_OF_MEMORY and GPU_LOST, which ask for a new worker.
        """
        encoded = await asyncio.to_thread(self.chat.encode, job, self.limit)
        new = min(job.max_new_tokens, self.limit - len(encoded.ids))
        work = _Work(job, encoded, self.chat.reader(encoded), emit, new, self.ends)
        self._jobs += 1
        try:
            if self.batch is None:
                await self._answer_alone(work, self._generate)
            elif self._jobs == 1 and self.drafter and not self._alone.locked() and self._fits_beside(work):
                await self._answer_alone(work, self._draft)
            if self.batch and not work.ended:
                await self._answer_in_batch(self.batch, work)
        finally:
            self._jobs -= 1
        return work.done()

    def _fits_beside(self, work: _Work) -> bool:
        """Whether the keys and values of a job that is alone fit beside the batch's memory, which is not theirs."""
        if self.network.device.type == "cpu":
            return True
        needed = self._kv_bytes * (len(work.encoded.ids) + work.left)
        return bool(2 * needed < torch.cuda.mem_get_info()[0])

    async def _answer_in_batch(self, batch: Batch, work: _Work) -> None:
        since = time.monotonic()
        ids = work.encoded.ids + work.tokens
        pages = batch.pages(len(ids) + work.left)
        slot = await batch.room.take(pages)
        try:
            work.queue_ms += (time.monotonic() - since) * 1000
            show = work.show if work.job.stream else None
            done = await batch.run(ids, work.left, work.sampling, slot, show)
        finally:
            batch.room.give(pages, slot)
        if not show:
            work.show(done.tokens)
        work.ended = True
        work.queue_ms += done.queue_ms
        work.prefill_ms += done.prefill_ms
        work.decode_ms += done.decode_ms

    async def _answer_alone(self, work: _Work, way: Callable[[_Work, _Stop], None]) -> None:
        """Run a job in a thread; `stop` ends it at the next token, after which the thread is waited for."""
        since = time.monotonic()
        stop = _Stop(asyncio.get_running_loop(), work)
        async with self._alone:
            work.queue_ms += (time.monotonic() - since) * 1000
            thread = asyncio.ensure_future(asyncio.to_thread(self._guarded, way, work, stop))
            try:
                await asyncio.shield(thread)
            except asyncio.CancelledError:
                stop.cancelled.set()
                # However often it is cancelled: the next job must not come before the thread has ended.
                while not thread.done():
                    with contextlib.suppress(JobError, asyncio.CancelledError):
                        await asyncio.shield(thread)
                raise

    def _guarded(self, way: Callable[[_Work, _Stop], None], work: _Work, stop: _Stop) -> None:
        try:
            way(work, stop)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "CUDA" not in str(error):
                raise
            # A CUDA error poisons the process: every later job would fail too.
            raise failure(error) from error

    def _draft(self, work: _Work, stop: _Stop) -> None:
        assert self.drafter
        drafted = self.drafter.run(
            work.encoded.ids,
            work.left,
            work.sampling,
            stop.pass_on,
            lambda: stop.cancelled.is_set() or self._jobs > 1,
        )
        work.ended = drafted.ended
        work.prefill_ms += drafted.prefill_ms
        work.decode_ms += drafted.decode_ms
        self._totals["drafted_jobs_total"] += 1
        self._totals["drafted_tokens_total"] += len(drafted.tokens)
        self._totals["drafted_forward_passes_total"] += drafted.forward_passes

    def _generate(self, work: _Work, stop: _Stop) -> None:
        ids = torch.tensor([work.encoded.ids], device=self.network.device)
        criterion = _EachToken(ids.shape[1], stop)
        started = time.monotonic()
        with torch.inference_mode():
            self.network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(max_new_tokens=work.left, do_sample=False),
                logits_processor=LogitsProcessorList([SamplingProcessor(work.sampling)]),
                stopping_criteria=StoppingCriteriaList([criterion]),
            )
        first = criterion.first or time.monotonic()
        work.ended = True
        work.prefill_ms += (first - started) * 1000
        work.decode_ms += (time.monotonic() - first) * 1000

    # --- the rest ---

    def metrics(self) -> dict[str, float]:
        """Those of the batch, and of drafts."""
        return {**(self.batch.metrics() if self.batch else {}), **self._totals}

    def close(self) -> None:
        """End the batch's thread."""
        if self.batch:
            self.batch.close()


class _Work:
    """One job on its way to an answer."""

    def __init__(
        self, job: Job, encoded: Encoded, reader: Reader, emit: Callable[[str], None], new: int, ends: list[int]
    ) -> None:
        self.job = job
        self.encoded = encoded
        self.new = new
        self.tokens: list[int] = []
        self.ended = False
        self.queue_ms = self.prefill_ms = self.decode_ms = 0.0
        temperature = job.temperature if job.temperature >= LOWEST_TEMPERATURE else 0.0
        seed = secrets.randbits(63) if job.seed is None else job.seed
        self.sampling = Sampling(temperature, job.top_p, job.repetition_penalty, seed)
        self._reader = reader
        self._emit = emit
        self._ends = ends

    @property
    def left(self) -> int:
        """Tokens that may still be generated."""
        return self.new - len(self.tokens)

    def show(self, tokens: list[int]) -> None:
        """Take the next tokens of the answer. In the event loop's thread."""
        self.tokens += tokens
        # What ends an answer is no text, also where the tokenizer does not call it special.
        if text := self._reader.feed([token for token in tokens if token not in self._ends]):
            self._emit(text)

    def done(self) -> Answer:
        """The whole answer."""
        if text := self._reader.finish():
            self._emit(text)
        reason: Literal["stop", "length"] = "stop" if self.tokens and self.tokens[-1] in self._ends else "length"
        return Answer(
            self._reader.text,
            reason,
            prompt_tokens=len(self.encoded.ids),
            completion_tokens=len(self.tokens),
            reasoning_tokens=self._reader.reasoning_tokens,
            queue_ms=round(self.queue_ms),
            prefill_ms=round(self.prefill_ms),
            decode_ms=round(self.decode_ms),
            dropped_sources=self.encoded.dropped,
        )


class _Stop:
    """What the thread of a job that is alone shares with the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: _Work) -> None:
        self.cancelled = threading.Event()
        self._loop = loop
        self._work = work

    def pass_on(self, tokens: list[int]) -> None:
        """Hand tokens to the event loop. They arrive before the thread's end does."""
        self._loop.call_soon_threadsafe(self._work.show, tokens)


class _EachToken(StoppingCriteria):  # type: ignore[misc] # transformers has no types here
    """Passes on each token of `generate`, and ends it once the job is cancelled: a thread cannot be stopped otherwise."""

    def __init__(self, length: int, stop: _Stop) -> None:
        self.first: float | None = None
        self._length = length
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            self.first = time.monotonic()
        self._stop.pass_on(input_ids[0, self._length :].tolist())
        self._length = input_ids.shape[1]
        return torch.full(
            (input_ids.shape[0],), self._stop.cancelled.is_set(), dtype=torch.bool, device=input_ids.device
        )


def _kv_tokens(kv_bytes: int) -> int:
    """How many tokens' keys and values fit into a part of the free memory of a machine without a GPU."""
    return max(1, min(CPU_KV_TOKENS, ram() // CPU_KV_SHARE // max(1, kv_bytes)))
