"""The vLLM engine, with a server that has vLLM's routes and the tiny model (openai_server.py)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import vllm_engine
from chat import Chat
from common.prompts import Prompts
from common.wire import Job
from engines import Answer, JobError
from vllm_engine import VllmEngine

SERVER = Path(__file__).with_name("openai_server.py")
MODEL = {"id": "someone/tiny", "revision": "0123abc", "engine": "vllm", "quantization": "none"}
SOURCES = [{"id": "S1", "text": "Ego depletion did not replicate.", "label": "Hagger et al. (2016)"}]
JOB = Job(prompt="Is ego depletion real?", sources=SOURCES, temperature=0, max_new_tokens=24)


class Server:
    """The folder through which a test and the stand-in talk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.behave("")

    def behave(self, mode: str) -> None:
        """Tell the stand-in how to behave from now on."""
        (self.folder / "new").write_text(mode)
        (self.folder / "new").rename(self.folder / "mode")

    def notes(self, key: str) -> list[Any]:
        """What the stand-in has noted under `key`."""
        path = self.folder / "notes"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line[key] for line in lines if key in line]

    def is_gone(self, seconds: float = 5) -> bool:
        """Whether the stand-in had started and, like its helper, has ended, or does so within a moment: a process that
        is killed takes its time."""
        pids = self.notes("pid") + self.notes("helper")
        end = time.monotonic() + seconds
        while any(_runs(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.02)
        return len(pids) >= 2 and not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A stand-in of the test's own, to be started with `start`."""
    server = Server(tmp_path / "stand-in")
    monkeypatch.setenv("STAND_IN", str(server.folder))
    yield server
    for pid in server.notes("pid") + server.notes("helper"):
        if _runs(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def chat(model_folder: Path, prompts: Prompts) -> Chat:
    return Chat(AutoTokenizer.from_pretrained(model_folder), prompts)


Start = Callable[..., VllmEngine]


@pytest.fixture
def start(chat: Chat, model_folder: Path) -> Iterator[Start]:
    """Starts engines and closes them."""
    engines = []

    def start(folder: Path = model_folder, model: dict[str, Any] = MODEL, seconds: float = 60) -> VllmEngine:
        command = (sys.executable, str(SERVER))
        engines.append(VllmEngine(chat, folder, model, command=command, startup_timeout=seconds))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def shared(
    chat: Chat, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmEngine, Server]]:
    """An engine and its stand-in, started once."""
    server = Server(tmp_path_factory.mktemp("vllm") / "stand-in")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN", str(server.folder))
        patch.setenv("HF_TOKEN", "hf_secret")
        patch.setenv("RUNPOD_AI_API_KEY", "secret")
        patch.setenv("VLLM_ARGS", "--max-num-seqs 8 --gpu-memory-utilization '0.8' --host ::")
        engine = VllmEngine(chat, model_folder, MODEL, command=(sys.executable, str(SERVER)), startup_timeout=60)
    yield engine, server
    engine.close()
    assert server.is_gone()


@pytest.fixture
def engine(shared: tuple[VllmEngine, Server]) -> VllmEngine:
    return shared[0]


@pytest.fixture
def served(shared: tuple[VllmEngine, Server]) -> Iterator[Server]:
    """The stand-in of `engine`."""
    yield shared[1]
    shared[1].behave("")


@pytest.fixture(scope="module")
def by_generate(model_folder: Path, chat: Chat) -> Callable[[Job], list[int]]:
    """The ids that transformers' own generate gives for a greedy job."""
    network = AutoModelForCausalLM.from_pretrained(model_folder).eval()

    def generate(job: Job) -> list[int]:
        ids = torch.tensor([chat.encode(job, None).ids])
        config = GenerationConfig(
            max_new_tokens=job.max_new_tokens,
            do_sample=False,
            repetition_penalty=job.repetition_penalty,
            eos_token_id=network.generation_config.eos_token_id,
            pad_token_id=network.generation_config.pad_token_id,
        )
        mask = torch.ones_like(ids)
        output = network.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return list(output[0][ids.shape[1] :].tolist())

    return generate


def answer(engine: VllmEngine, job: Job) -> Answer:
    return asyncio.run(engine.answer(job, lambda text: None))


def text_of(chat: Chat, job: Job, ids: list[int]) -> str:
    """The text that the reader makes of an answer's ids."""
    reader = chat.reader(chat.encode(job, None))
    reader.feed(ids)
    reader.finish()
    return reader.text


# --- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_the_greedy_text_is_that_of_generate(
    engine: VllmEngine, chat: Chat, by_generate: Callable[[Job], list[int]], penalty: float
) -> None:
    job = replace(JOB, repetition_penalty=penalty)
    given = answer(engine, job)
    assert given.text == text_of(chat, job, by_generate(job))
    assert given.text
    assert given.finish_reason == "length"
    assert given.prompt_tokens == len(chat.encode(job, None).ids)
    assert given.completion_tokens == job.max_new_tokens


def test_the_time_is_split_into_queue_prefill_and_decode(engine: VllmEngine, served: Server) -> None:
    served.behave("slow")
    began = time.monotonic()
    given = answer(engine, replace(JOB, stream=True))
    took = (time.monotonic() - began) * 1000
    assert given.queue_ms == 3
    assert given.prefill_ms > 0
    assert given.decode_ms >= 20 * (JOB.max_new_tokens - 1)
    assert given.queue_ms + given.prefill_ms + given.decode_ms <= took + 3


def test_the_pieces_make_up_the_text(engine: VllmEngine) -> None:
    pieces: list[str] = []
    given = asyncio.run(engine.answer(replace(JOB, stream=True), pieces.append))
    assert "".join(pieces) == given.text
    assert len(pieces) > 5
    assert all(pieces)


def test_what_was_held_back_is_given_out_at_the_end(
    engine: VllmEngine, chat: Chat, by_generate: Callable[[Job], list[int]]
) -> None:
    """An answer that is cut off within a character ends with the sign for that."""
    ids = by_generate(JOB)

    def held_back(tokens: int) -> str:
        reader = chat.reader(chat.encode(JOB, None))
        reader.feed(ids[:tokens])
        return reader.finish()

    tokens = next(tokens for tokens in range(1, len(ids)) if held_back(tokens))
    pieces: list[str] = []
    given = asyncio.run(engine.answer(replace(JOB, max_new_tokens=tokens), pieces.append))
    assert pieces[-1] == held_back(tokens)
    assert "".join(pieces) == given.text


def test_an_answer_that_is_not_streamed_comes_in_fewer_messages(engine: VllmEngine, served: Server) -> None:
    pieces: list[str] = []
    given = asyncio.run(engine.answer(JOB, pieces.append))
    assert "".join(pieces) == given.text
    assert len(pieces) <= 3
    assert served.notes("job")[-1]["stream_interval"] > 1


def test_the_settings_of_the_job_arrive(engine: VllmEngine, served: Server, chat: Chat) -> None:
    job = replace(JOB, temperature=0.7, top_p=0.8, repetition_penalty=1.2, seed=2**63 - 1, max_new_tokens=7)
    first, again = answer(engine, job), answer(engine, job)
    other = answer(engine, replace(job, seed=1))
    assert first.text == again.text != other.text
    sent = served.notes("job")[-2]
    assert sent == {
        "model": "someone/tiny",
        "prompt": chat.encode(job, None).ids,
        "max_tokens": 7,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 0,
        "min_p": 0,
        "repetition_penalty": 1.2,
        "seed": 2**63 - 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stream_interval": 32,
        "return_token_ids": True,
    }


@pytest.mark.parametrize(("asked", "sent"), [(0, (0, 1)), (0.00005, (0, 1)), (0.0001, (0.0001, 0.9)), (2, (2, 0.9))])
def test_a_temperature_near_zero_is_greedy(
    engine: VllmEngine, served: Server, asked: float, sent: tuple[float, float]
) -> None:
    answer(engine, replace(JOB, temperature=asked, max_new_tokens=2))
    job = served.notes("job")[-1]
    assert (job["temperature"], job["top_p"]) == sent


def test_the_end_of_the_turn_is_no_text(
    server: Server, start: Start, model_copy: Path, chat: Chat, by_generate: Callable[[Job], list[int]]
) -> None:
    """The model ends its turn with a token that is no special one, as the repo's generation_config.json says."""
    ids = by_generate(JOB)
    end = next(at for at in range(5, len(ids)) if ids[at] not in ids[:at])
    path = model_copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, ids[end]]}))
    given = answer(start(model_copy), JOB)
    assert given.finish_reason == "stop"
    assert given.text == text_of(chat, JOB, ids[:end])
    assert given.completion_tokens == end + 1


def test_jobs_run_at_once_and_give_what_they_give_alone(engine: VllmEngine, served: Server) -> None:
    jobs = [replace(JOB, repetition_penalty=1 + number / 10, stream=number % 2 == 0) for number in range(6)]
    alone = [answer(engine, job) for job in jobs]
    served.behave("slow")

    async def together() -> tuple[list[Answer], float]:
        tasks = [asyncio.create_task(engine.answer(job, lambda text: None)) for job in jobs]
        most = 0.0
        while not all(task.done() for task in tasks):
            most = max(most, (await asyncio.to_thread(engine.metrics))["jobs_running"])
        return [task.result() for task in tasks], most

    answers, most = asyncio.run(together())
    assert [given.text for given in answers] == [given.text for given in alone]
    assert len({given.text for given in answers}) >= 3
    assert most == len(jobs)


# --- limits ------------------------------------------------------------------------------------------------------------


def test_too_long_a_prompt_is_refused_before_it_is_sent(engine: VllmEngine, served: Server) -> None:
    known = len(served.notes("job"))
    with pytest.raises(JobError, match=r"the model reads 2048: \d+ too many") as caught:
        answer(engine, replace(JOB, prompt="word " * 3000))
    assert caught.value.code == "INPUT_TOO_LONG"
    assert not caught.value.refresh
    assert len(served.notes("job")) == known


def test_fit_leaves_out_the_last_sources_and_says_so(engine: VllmEngine) -> None:
    sources = [{"id": f"S{number}", "text": "Not so. " * 60, "label": ""} for number in range(1, 13)]
    given = answer(engine, replace(JOB, sources=sources, fit=True))
    assert given.dropped_sources
    assert given.dropped_sources[-1] == "S12"
    assert given.prompt_tokens < 2048


def test_the_answer_ends_with_the_context_window(engine: VllmEngine, chat: Chat) -> None:
    job = replace(JOB, prompt="word " * 500, max_new_tokens=32768)
    given = answer(engine, job)
    assert given.finish_reason == "length"
    assert given.prompt_tokens + given.completion_tokens == 2048


# --- cancelling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["slow", "hang"])
def test_a_cancelled_job_stops_the_server_within_a_second(engine: VllmEngine, served: Server, mode: str) -> None:
    served.behave(mode)
    known = len(served.notes("aborted"))

    async def cancel() -> float:
        begun = len(served.notes("job"))
        pieces: list[str] = []
        task = asyncio.create_task(engine.answer(replace(JOB, max_new_tokens=1000, stream=True), pieces.append))
        await _until(lambda: len(served.notes("job")) > begun and (mode == "hang" or len(pieces) > 1))
        cancelled = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _until(lambda: len(served.notes("aborted")) > known)
        return time.monotonic() - cancelled

    assert asyncio.run(cancel()) < 1
    assert engine.metrics()["jobs_running"] == 0
    served.behave("")
    assert answer(engine, JOB).text


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


# --- failures ----------------------------------------------------------------------------------------------------------


def test_a_job_that_vllm_does_not_take_is_refused(engine: VllmEngine, served: Server) -> None:
    served.behave("refuse")
    with pytest.raises(JobError, match=r"vLLM refused the job \(HTTP 400\): the model has no room") as caught:
        answer(engine, JOB)
    assert caught.value.code == "ENGINE_REFUSED"
    assert not caught.value.refresh


@pytest.mark.parametrize("mode", ["fail", "fail-late"])
def test_an_error_of_the_server_asks_for_a_new_worker(engine: VllmEngine, served: Server, mode: str) -> None:
    served.behave(mode)
    with pytest.raises(JobError, match=r"HTTP 500: EngineCore encountered an issue\); a new worker") as caught:
        answer(engine, JOB)
    assert caught.value.code == "GPU_LOST"
    assert caught.value.refresh


def test_a_server_that_dies_with_a_job_asks_for_a_new_worker(server: Server, start: Start) -> None:
    server.behave("without-model")
    engine = start()
    server.behave("die")
    for _ in range(2):  # and so does each later job, at once
        with pytest.raises(JobError, match="a new worker takes over") as caught:
            answer(engine, JOB)
        assert caught.value.code == "GPU_LOST"
        assert caught.value.refresh
    assert "has ended (exit code 3)" in str(caught.value)
    assert engine.metrics().keys() == {"start_seconds"}


def test_a_server_that_is_killed_during_an_answer_asks_for_a_new_worker(server: Server, start: Start) -> None:
    server.behave("slow")
    engine = start()

    async def kill() -> None:
        pieces: list[str] = []
        task = asyncio.create_task(engine.answer(replace(JOB, max_new_tokens=1000, stream=True), pieces.append))
        await _until(lambda: len(pieces) > 1)
        os.kill(server.notes("pid")[0], signal.SIGKILL)
        await task

    with pytest.raises(JobError, match="vLLM server") as caught:
        asyncio.run(kill())
    assert caught.value.code == "GPU_LOST"
    assert caught.value.refresh


def test_a_server_that_dies_at_the_start_is_named_with_its_last_lines(server: Server, start: Start) -> None:
    server.behave("die")
    with pytest.raises(SystemExit, match=r"ended \(exit code 3\) before it was ready; change VLLM_ARGS") as caught:
        start()
    assert "no kernel image is available" in str(caught.value)
    assert server.is_gone()


def test_a_server_that_never_gets_ready_is_ended_after_the_deadline(server: Server, start: Start) -> None:
    server.behave("never")
    began = time.monotonic()
    with pytest.raises(SystemExit, match="did not become ready within 3 seconds"):
        start(seconds=3)
    assert time.monotonic() - began < 10
    assert server.is_gone()


def test_a_command_that_is_not_there_is_named(chat: Chat, model_folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"cannot start no-such-vllm: No such file .* open-synthesis-worker-vllm"):
        VllmEngine(chat, model_folder, MODEL, command=("no-such-vllm", "serve"))


# --- the process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["without-model", "stubborn"])
def test_close_leaves_no_process(
    server: Server, start: Start, monkeypatch: pytest.MonkeyPatch, mode: str, model_copy: Path
) -> None:
    monkeypatch.setattr(vllm_engine, "STOP_SECONDS", 2.0 if mode == "stubborn" else 20.0)
    server.behave(mode)
    engine = start(model_copy)
    assert not server.is_gone(0)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 10
    assert server.is_gone()
    engine.close()


def test_the_server_is_started_with_our_arguments_and_without_our_secrets(
    engine: VllmEngine, served: Server, model_folder: Path
) -> None:
    arguments = served.notes("arguments")[0]
    assert arguments[0] == str(model_folder.resolve())
    assert engine.capacity == 8
    assert arguments[arguments.index("--gpu-memory-utilization") + 1] == "0.8"
    # The last one counts: VLLM_ARGS cannot open the server to the network.
    assert [arguments[at + 1] for at, word in enumerate(arguments) if word == "--host"] == ["::", "127.0.0.1"]
    assert [arguments[at + 1] for at, word in enumerate(arguments) if word == "--max-num-seqs"] == ["64", "8"]
    assert "--no-enable-log-requests" in arguments
    assert "--quantization" not in arguments
    environment = served.notes("environment")[0]
    assert {"VLLM_API_KEY", "HF_HUB_OFFLINE", "STAND_IN"} <= set(environment)
    assert not {"HF_TOKEN", "RUNPOD_AI_API_KEY", "PYTHONPATH", "VLLM_ARGS"} & set(environment)


def test_nf4_is_asked_for(server: Server, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ARGS", raising=False)
    server.behave("without-model")
    assert start(model={**MODEL, "quantization": "nf4"}).capacity == 64
    arguments = server.notes("arguments")[0]
    assert arguments[arguments.index("--quantization") + 1] == "bitsandbytes"


def test_vllm_args_that_cannot_be_read_are_named(
    chat: Chat, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_ARGS", "--dtype 'half")
    with pytest.raises(SystemExit, match="VLLM_ARGS cannot be read: No closing quotation"):
        VllmEngine(chat, model_folder, MODEL)
    monkeypatch.setenv("VLLM_ARGS", "--max-num-seqs many")
    with pytest.raises(SystemExit):
        VllmEngine(chat, model_folder, MODEL)
    assert "--max-num-seqs/--max_num_seqs: invalid int value: 'many'" in capfd.readouterr().err


def test_the_packages_of_the_worker_stay_out_of_the_servers_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own script looks for its Python on PATH, and must not find the worker's."""
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin:/usr/local/bin:/usr/bin")
    assert vllm_engine._environment("key")["PATH"] == "/usr/local/bin:/usr/bin"


def test_metrics_are_those_of_the_server(engine: VllmEngine) -> None:
    before = engine.metrics()["completion_tokens_total"]
    answer(engine, replace(JOB, max_new_tokens=5))
    now = engine.metrics()
    assert now["completion_tokens_total"] - before == 5
    assert now["jobs_running"] == 0
    assert 0 < now["start_seconds"] < 120
    assert now.keys() == {"start_seconds", "jobs_running", "completion_tokens_total"}


def test_nothing_of_a_job_is_printed(engine: VllmEngine, capfd: pytest.CaptureFixture[str]) -> None:
    given = answer(engine, replace(JOB, prompt="Is the Zeigarnik effect real?"))
    printed = "".join(capfd.readouterr())
    assert given.text
    assert "Zeigarnik" not in printed
    assert given.text not in printed
