"""The transformers engine with tiny models: every way to an answer gives the same one, and none outlives its job."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import drafting
import generative
from batching import Batch, Unsupported
from chat import Chat
from common.prompts import Prompts
from common.wire import Job
from engines import Answer, JobError, Start
from generative import TransformersEngine
from weights import locate

SOURCES = [
    {"id": f"S{n}", "text": f"Ego depletion did not replicate in study {n}. " * 3, "label": "Hagger et al. (2016)"}
    for n in range(1, 4)
]
JOB = Job(prompt="Is ego depletion real?", sources=SOURCES, temperature=0, max_new_tokens=12)
# Every setting, alone and mixed, in a batch of jobs of different lengths.
MIXED = [
    replace(
        JOB,
        prompt=f"Is ego depletion real, {'really ' * n}?",
        temperature=(0, 0.3, 1.0, 2.0)[n % 4],
        top_p=(0.9, 1.0, 0.5)[n % 3],
        repetition_penalty=(1.0, 1.1, 1.3, 0.8, 2.0)[n % 5],
        max_new_tokens=20 + 3 * n,
        seed=n,
    )
    for n in range(12)
]


def load(folder: Path, prompts: Prompts, **environ: str) -> TransformersEngine:
    return generative.load(prompts, "someone/tiny", locate(str(folder), None, {}), environ, Start())


def small(folder: Path, prompts: Prompts, **options: Any) -> TransformersEngine:
    """An engine with options of its own."""
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = generative._ends(network, tokenizer)
    return TransformersEngine(Chat(tokenizer, prompts), network, ends, {"id": "tiny"}, kv_bytes=256, **options)


@pytest.fixture(scope="module")
def engine(model_folder: Path, prompts: Prompts) -> Iterator[TransformersEngine]:
    made = load(model_folder, prompts)
    yield made
    made.close()


def run(test: Coroutine[Any, Any, Any], seconds: float = 60) -> Any:
    return asyncio.run(asyncio.wait_for(test, seconds))


async def ask(engine: TransformersEngine, job: Job) -> tuple[Answer, list[str]]:
    parts: list[str] = []
    return await engine.answer(job, parts.append), parts


def answer(engine: TransformersEngine, job: Job) -> Answer:
    given: Answer = run(ask(engine, job))[0]
    return given


def in_turn(engine: TransformersEngine, jobs: list[Job]) -> list[Answer]:
    async def each() -> list[Answer]:
        return [(await ask(engine, job))[0] for job in jobs]

    answers: list[Answer] = run(each())
    return answers


def together(engine: TransformersEngine, jobs: list[Job]) -> list[Answer]:
    async def all_of_them() -> list[Answer]:
        return [given for given, _ in await asyncio.gather(*(ask(engine, job) for job in jobs))]

    answers: list[Answer] = run(all_of_them())
    return answers


def batches() -> int:
    """The threads of batches. (There are others, of transformers' loader, say, that come and go.)"""
    return sum("_run_generation_loop" in thread.name for thread in threading.enumerate())


def texts(answers: list[Answer]) -> list[str]:
    return [given.text for given in answers]


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# --- every way gives the same text -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(engine: TransformersEngine) -> list[Answer]:
    """The mixed jobs, one after the other, with drafts."""
    return in_turn(engine, MIXED)


def test_the_mixed_jobs_are_answers(engine: TransformersEngine, alone: list[Answer]) -> None:
    assert len(set(texts(alone))) == len(MIXED)
    assert [given.completion_tokens for given in alone] == [job.max_new_tokens for job in MIXED]
    assert engine.drafter
    assert engine.metrics()["drafted_tokens_total"] >= sum(job.max_new_tokens for job in MIXED)


def test_a_batch_gives_each_job_its_own_text(engine: TransformersEngine, alone: list[Answer]) -> None:
    before = engine.metrics()["forward_passes_total"]
    assert texts(together(engine, MIXED)) == texts(alone)
    steps = engine.metrics()["forward_passes_total"] - before
    assert steps < sum(job.max_new_tokens for job in MIXED) / 3, "they went through the model together"


def test_the_batch_alone_gives_it_too(
    engine: TransformersEngine, alone: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "drafter", None)
    assert texts(in_turn(engine, MIXED)) == texts(alone)


def test_one_at_a_time_gives_it_too(
    engine: TransformersEngine, alone: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "batch", None)
    assert texts(together(engine, MIXED)) == texts(alone)


@pytest.mark.parametrize("penalty", [1.0, 1.1, 1.7])
def test_greedy_is_token_by_token_what_generate_gives(engine: TransformersEngine, penalty: float) -> None:
    jobs = [replace(job, temperature=0, repetition_penalty=penalty, max_new_tokens=60) for job in MIXED[:6]]
    found = together(engine, jobs)
    for job, given in zip(jobs, found, strict=True):
        ids = torch.tensor([engine.chat.encode(job, None).ids])
        plain = engine.network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(max_new_tokens=60, do_sample=False, repetition_penalty=penalty),
        )
        reader = engine.chat.reader(engine.chat.encode(job, None))
        reader.feed(plain[0, ids.shape[1] :].tolist())
        reader.finish()
        assert given.text == reader.text


def test_a_job_that_is_alone_moves_into_the_batch(engine: TransformersEngine) -> None:
    job = replace(JOB, temperature=1.0, top_p=1.0, seed=5, max_new_tokens=400)
    expected = answer(engine, job).text

    async def story() -> tuple[Answer, Answer, list[str]]:
        parts: list[str] = []
        first = asyncio.create_task(engine.answer(replace(job, stream=True), parts.append))
        while not parts:
            await asyncio.sleep(0.01)
        second = await engine.answer(JOB, lambda text: None)
        assert not first.done(), "a long answer does not hold up a short one"
        return await first, second, parts

    first, second, parts = run(story())
    assert first.text == expected == "".join(parts)
    assert first.completion_tokens == 400
    assert second.text == answer(engine, JOB).text


def test_drafts_save_forward_passes_and_change_nothing(model_folder: Path, prompts: Prompts) -> None:
    engine = small(model_folder, prompts)
    try:
        assert engine.drafter
        # Made to repeat itself, so that what comes next stands in the answer already.
        job = replace(JOB, prompt="Is it real?", repetition_penalty=0.5, max_new_tokens=200)
        drafted = answer(engine, job)
        totals = engine.metrics()
        assert totals["drafted_tokens_total"] == 200
        assert totals["drafted_forward_passes_total"] < 120
        engine.drafter = None
        assert answer(engine, job).text == drafted.text
    finally:
        engine.close()


# --- the batch ---------------------------------------------------------------------------------------------------------


def test_more_jobs_than_fit_wait_for_memory(model_folder: Path, prompts: Prompts, alone: list[Answer]) -> None:
    engine = small(model_folder, prompts, kv_tokens=2048, slots=4)
    try:
        assert engine.batch
        assert engine.limit == 2048
        assert texts(together(engine, MIXED * 3)) == texts(alone) * 3
        assert engine.metrics()["kv_reserved_ratio"] == 0
        waited = together(engine, MIXED)
        assert max(given.queue_ms for given in waited) > 5
    finally:
        engine.close()


def test_shared_beginnings_are_read_once(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "drafter", None)
    assert engine.batch
    prompt = engine.chat.encode(JOB, None).ids
    assert len(engine.chat.prefix) > 2 * engine.batch.page, "the system text alone fills whole pages"
    read: list[int] = []
    forward = engine.network.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.network, "forward", counting)
    answer(engine, replace(JOB, max_new_tokens=1))
    again = [*read]
    read.clear()
    answer(engine, replace(JOB, prompt="What else is there to say?", max_new_tokens=1))
    assert sum(again) <= engine.batch.page + 1, "the same prompt has been read before"
    assert sum(read) <= len(prompt) - len(engine.chat.prefix) + engine.batch.page


def test_a_long_job_does_not_starve_short_ones(engine: TransformersEngine) -> None:
    long = replace(JOB, sources=[{"id": "S1", "text": "word " * 400, "label": ""}], max_new_tokens=500)

    async def story() -> None:
        slow = [asyncio.create_task(engine.answer(long, lambda text: None)) for _ in range(2)]
        await asyncio.sleep(0.05)
        for _ in range(4):
            await engine.answer(JOB, lambda text: None)
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    run(story())


def test_pages_kept_for_later_give_way(model_folder: Path, prompts: Prompts) -> None:
    engine = small(model_folder, prompts, kv_tokens=2560)
    try:
        assert engine.batch
        engine.drafter = None
        scheduler = engine.batch._manager.batch_processor.scheduler
        long = Job(prompt="Is it?", context="It is.", temperature=0, max_new_tokens=1100)

        async def story() -> int:
            first = asyncio.create_task(engine.answer(long, lambda text: None))
            done = 0
            for number in range(25):
                # Each leaves whole pages behind that no other job shares.
                job = Job(prompt=f"{number} " * 40, context="It is.", temperature=0, max_new_tokens=2)
                await engine.answer(job, lambda text: None)
                done += not first.done()
                assert not scheduler.starved_requests
            assert (await first).completion_tokens == 1100
            return done

        assert run(story()) >= 20, "short jobs did not wait for the long one"
    finally:
        engine.close()


def test_a_prompt_that_cannot_fit_says_by_how_much(model_folder: Path, prompts: Prompts) -> None:
    engine = small(model_folder, prompts, kv_tokens=768)
    try:
        with pytest.raises(JobError, match=r"the prompt has \d+ tokens, the model reads 768: \d+ too many") as raised:
            answer(engine, JOB)
        assert raised.value.code == "INPUT_TOO_LONG"
    finally:
        engine.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ways", ["drafts", "batch", "generate"])
def test_cancelling_stops_the_work_at_once(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, ways: str, stream: bool
) -> None:
    if ways != "drafts":
        monkeypatch.setattr(engine, "drafter", None)
    batch = engine.batch
    assert batch
    if ways == "generate":
        monkeypatch.setattr(engine, "batch", None)
    calls = 0
    forward = engine.network.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.network, "forward", counting)

    async def story() -> None:
        task = asyncio.create_task(engine.answer(replace(JOB, stream=stream, max_new_tokens=1200), lambda text: None))
        while calls < 20:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.1)
        stopped = calls
        await asyncio.sleep(0.3)
        assert calls == stopped < 1000
        assert batch.room.free_pages == batch.room.pages
        assert not batch._manager.batch_processor.scheduler.active_requests
        assert not batch._manager.output_router.result_handlers

    run(story())
    assert answer(engine, JOB).completion_tokens == 12


def test_streamed_text_is_the_answer_in_pieces(engine: TransformersEngine) -> None:
    for way in (engine.drafter, None):
        engine.drafter, kept = way, engine.drafter
        try:
            given, parts = run(ask(engine, replace(MIXED[3], stream=True)))
        finally:
            engine.drafter = kept
        assert len(parts) > 5
        assert "".join(parts) == given.text


def test_times_and_counts(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for drafter in (engine.drafter, None):
        monkeypatch.setattr(engine, "drafter", drafter)
        started = time.monotonic()
        given = answer(engine, replace(JOB, max_new_tokens=50))
        took = (time.monotonic() - started) * 1000
        assert given.prompt_tokens == len(engine.chat.encode(JOB, None).ids)
        assert (given.completion_tokens, given.finish_reason) == (50, "length")
        assert given.prefill_ms > 0
        assert given.decode_ms > 0
        assert given.queue_ms + given.prefill_ms + given.decode_ms <= took + 3


def test_a_seed_is_drawn_where_none_is_given(engine: TransformersEngine) -> None:
    job = replace(JOB, temperature=1.5, top_p=1.0, seed=None, max_new_tokens=30)
    assert len(set(texts(together(engine, [job] * 4)))) == 4


# --- the end of an answer ----------------------------------------------------------------------------------------------


@pytest.fixture
def silent_copy(model_copy: Path) -> Path:
    """A model that finds all tokens equally likely, so that it takes the first one: the end of its turn."""
    network = AutoModelForCausalLM.from_pretrained(model_copy)
    with torch.no_grad():
        network.model.norm.weight.zero_()
    network.save_pretrained(model_copy)
    return model_copy


@pytest.mark.parametrize("ends", [2, [2, 1], None])
def test_the_tokenizer_s_end_counts_whatever_the_repo_says(silent_copy: Path, prompts: Prompts, ends: object) -> None:
    rewrite(silent_copy / "generation_config.json", lambda c: c.update(eos_token_id=ends))
    engine = load(silent_copy, prompts)
    try:
        for drafter in (engine.drafter, None):
            engine.drafter = drafter
            given = answer(engine, JOB)
            assert (given.text, given.finish_reason, given.completion_tokens) == ("", "stop", 1)
    finally:
        engine.close()


def test_every_end_that_the_repo_names_counts(model_copy: Path, prompts: Prompts) -> None:
    rewrite(model_copy / "generation_config.json", lambda c: c.update(eos_token_id=list(range(1, 500))))
    engine = load(model_copy, prompts)
    try:
        given = answer(engine, JOB)
        assert (given.text, given.finish_reason, given.completion_tokens) == ("", "stop", 1)
    finally:
        engine.close()


def test_generation_defaults_of_a_repo_change_nothing(
    alone: list[Answer], model_copy: Path, prompts: Prompts, capfd: pytest.CaptureFixture[str]
) -> None:
    defaults = {
        "do_sample": True, "temperature": 0.6, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "num_beams": 3,
        "no_repeat_ngram_size": 1, "max_length": 20, "min_new_tokens": 40, "repetition_penalty": 1.9,
        "return_dict_in_generate": True, "num_return_sequences": 2, "suppress_tokens": list(range(3, 200)),
    }  # fmt: skip
    rewrite(model_copy / "generation_config.json", lambda c: c.update(defaults))
    other = load(model_copy, prompts)
    try:
        capfd.readouterr()
        assert texts(together(other, MIXED[:4])) == texts(alone[:4])
        other.batch, batch = None, other.batch
        assert texts(in_turn(other, MIXED[:4])) == texts(alone[:4])
        assert capfd.readouterr() == ("", ""), "transformers had something to say"
    finally:
        other.batch = batch
        other.close()


# --- models ------------------------------------------------------------------------------------------------------------


def test_a_model_of_another_family_is_batched(model_copy: Path, prompts: Prompts) -> None:
    torch.manual_seed(2)
    vocabulary = json.loads((model_copy / "config.json").read_text())["vocab_size"]
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            eos_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(model_copy)
    engine = load(model_copy, prompts)
    try:
        assert engine.batch
        assert texts(together(engine, MIXED[:4])) == texts(in_turn(engine, MIXED[:4]))
    finally:
        engine.close()


@pytest.mark.filterwarnings("ignore:.*")  # mamba says at length that it has no fast kernels here
def test_a_model_without_attention_answers_one_job_at_a_time(
    model_copy: Path, prompts: Prompts, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(2)
    vocabulary = json.loads((model_copy / "config.json").read_text())["vocab_size"]
    config = MambaConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1, eos_token_id=0, bos_token_id=1)
    MambaForCausalLM(config).save_pretrained(model_copy)
    before = batches()
    engine = load(model_copy, prompts)
    assert batches() == before
    assert engine.batch is None
    assert engine.capacity == 1
    assert "one job at a time, because it cannot be batched" in capfd.readouterr().out
    jobs = [replace(job, max_new_tokens=8, stream=True) for job in MIXED[:3]]
    assert texts(together(engine, jobs)) == texts(in_turn(engine, jobs))
    engine.close()


def test_a_batch_that_chooses_other_tokens_is_not_used(
    model_folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Batch.check

    def with_other_ids(self: Batch, network: Any, ids: list[int]) -> None:
        # As if pages were read in the wrong order: the batch sees another prompt than the model.
        real = network.forward
        network.forward = lambda *a, **k: real(*a, **{**k, "input_ids": k["input_ids"].flip(1)} if "cache" in k else k)
        try:
            check(self, network, ids)
        finally:
            network.forward = real

    monkeypatch.setattr(Batch, "check", with_other_ids)
    before = batches()
    engine = small(model_folder, prompts)
    assert engine.batch is None
    assert "it chooses other tokens in a batch than alone" in engine.describe()
    assert batches() == before
    assert answer(engine, JOB).completion_tokens == 12


def test_nf4_is_batched_too(model_copy: Path, prompts: Prompts) -> None:
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(model_copy)
    # 4-bit weights come in blocks of 64.
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(model_copy)
    engine = load(model_copy, prompts, QUANTIZATION="nf4")
    try:
        assert engine.model["quantization"] == "nf4"
        assert engine.batch
        jobs = MIXED[:4]
        # One row and many go through different kernels, which round differently: the first tokens agree.
        found, expected = together(engine, jobs), in_turn(engine, jobs)
        assert [given.completion_tokens for given in found] == [given.completion_tokens for given in expected]
        assert sum(one.text[:4] == other.text[:4] for one, other in zip(found, expected, strict=True)) >= 3
    finally:
        engine.close()


def test_the_model_block_and_what_is_said(
    model_folder: Path, prompts: Prompts, capfd: pytest.CaptureFixture[str]
) -> None:
    start = Start()
    engine = generative.load(prompts, "someone/tiny", locate(str(model_folder), None, {}), {}, start)
    engine.close()
    assert engine.model == {"id": "someone/tiny", "revision": None, "engine": "transformers", "quantization": "none"}
    assert set(start.phases) == {"load", "warmup"}
    said = capfd.readouterr().out
    assert "loaded someone/tiny on CPU, none, torch.float32; context window 2048 tokens; batched, KV memory for" in said


# --- loading -----------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused(model_copy: Path, prompts: Prompts) -> None:
    weights = locate(str(model_copy), None, {})
    torch.save(AutoModelForCausalLM.from_pretrained(model_copy).state_dict(), model_copy / "pytorch_model.bin")
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(Exception, match="safetensors"):
        generative.load(prompts, "someone/tiny", weights, {}, Start())


@pytest.mark.parametrize("model_type", ["qwen3", "not-known"])
def test_code_of_a_repo_is_never_executed(model_copy: Path, prompts: Prompts, model_type: str) -> None:
    trace = model_copy / "executed"
    (model_copy / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}
    rewrite(model_copy / "config.json", lambda c: c.update(auto_map=classes, model_type=model_type))
    rewrite(model_copy / "tokenizer_config.json", lambda c: c.update(auto_map=classes))
    if model_type == "qwen3":
        engine = load(model_copy, prompts)
        assert answer(engine, JOB).completion_tokens
        engine.close()
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(model_copy, prompts)
    assert not trace.exists()


# --- failing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "OUT_OF_MEMORY"),
        (RuntimeError("CUDA error: device-side assert triggered"), "GPU_LOST"),
    ],
)
@pytest.mark.parametrize("ways", ["drafts", "batch", "generate"])
def test_a_broken_gpu_asks_for_a_new_worker(
    model_folder: Path, prompts: Prompts, problem: Exception, code: str, ways: str
) -> None:
    engine = small(model_folder, prompts)
    batch = engine.batch
    if ways != "drafts":
        engine.drafter = None
    if ways == "generate":
        engine.batch = None
    calls = 0
    forward = engine.network.forward

    def breaking(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise problem
        return forward(*args, **kwargs)

    engine.network.forward = breaking

    async def story() -> list[Any]:
        jobs = [JOB] if ways == "drafts" else MIXED[:3]
        first = await asyncio.gather(*(engine.answer(job, lambda text: None) for job in jobs), return_exceptions=True)
        later = await asyncio.gather(engine.answer(JOB, lambda text: None), return_exceptions=True)
        return [*first, *later]

    try:
        for error in run(story()):
            assert isinstance(error, JobError), error
            assert (error.code, error.refresh) == (code, True)
            assert re.search("a new worker takes over", str(error))
    finally:
        if batch:
            batch.close()


def test_any_other_error_is_not_hidden(model_folder: Path, prompts: Prompts) -> None:
    engine = small(model_folder, prompts)
    assert engine.drafter
    engine.drafter.network = None
    try:
        with pytest.raises(AttributeError):
            answer(engine, JOB)
    finally:
        engine.close()


@pytest.mark.parametrize("problem", [RuntimeError("no"), SystemExit(143), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("where", ["check", "drafter"])
def test_a_start_that_fails_leaves_no_thread(
    model_folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, problem: BaseException, where: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise problem

    if where == "check":
        monkeypatch.setattr(Batch, "check", fail)
    else:
        monkeypatch.setattr(generative, "Drafter", fail)
    before = batches()
    expected = SystemExit if where == "check" and isinstance(problem, torch.OutOfMemoryError) else type(problem)
    with pytest.raises(expected):
        small(model_folder, prompts)
    assert batches() == before


def test_memory_that_runs_out_at_the_start_is_shared_out_anew(
    model_folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check = Batch.check
    calls = 0

    def once(self: Batch, network: Any, ids: list[int]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        check(self, network, ids)

    monkeypatch.setattr(Batch, "check", once)
    engine = small(model_folder, prompts)
    try:
        assert engine.batch
        assert "the memory ran out with 80% of it for keys and values" in capfd.readouterr().out
        assert answer(engine, JOB).completion_tokens == 12
    finally:
        engine.close()


def test_a_flash_kernel_that_does_not_work_is_not_the_end_of_batches(
    model_folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    network = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    network.config._attn_implementation = "flash_attention_2"
    check = Batch.check

    def with_its_own_kernel_only(self: Batch, network: Any, ids: list[int]) -> None:
        if network.config._attn_implementation != "sdpa":
            raise Unsupported("a trial failed: no kernel image is available")
        check(self, network, ids)

    monkeypatch.setattr(Batch, "check", with_its_own_kernel_only)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    before = batches()
    engine = TransformersEngine(Chat(tokenizer, prompts), network, [0], {}, kv_bytes=256)
    try:
        assert engine.batch
        assert batches() == before + 1
        said = capfd.readouterr().out
        assert "attention: sdpa, because with flash_attention_2 there is no batch: " in said
        assert answer(engine, JOB).completion_tokens == 12
    finally:
        engine.close()


def test_eager_attention_answers_one_job_at_a_time(model_folder: Path, prompts: Prompts) -> None:
    network = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ends = generative._ends(network, tokenizer)
    engine = TransformersEngine(Chat(tokenizer, prompts), network, ends, {}, kv_bytes=256)
    assert engine.batch is None
    assert "eager" in engine.describe()
    assert [given.completion_tokens for given in together(engine, [JOB] * 2)] == [12, 12]


def test_a_long_prompt_is_left_between_two_pieces(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.drafter
    monkeypatch.setattr(drafting, "PIECE", 32)
    read: list[int] = []
    forward = engine.network.forward

    def slowly(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].shape[1])
        time.sleep(0.02)
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.network, "forward", slowly)

    async def story() -> None:
        task = asyncio.create_task(engine.answer(JOB, lambda text: None))
        while len(read) < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine._alone.locked()
        assert len(read) <= 6

    run(story())
    assert max(read) <= 32
    monkeypatch.undo()
    assert answer(engine, JOB).completion_tokens == 12


def test_closing_leaves_no_thread(model_folder: Path, prompts: Prompts) -> None:
    before = batches()
    engine = small(model_folder, prompts)
    assert batches() == before + 1
    answer(engine, JOB)
    engine.close()
    assert batches() == before


def test_unsupported_says_why() -> None:
    assert str(Unsupported("ValueError: Invalid layer type: x")) == "ValueError: Invalid layer type: x"
