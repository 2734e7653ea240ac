"""The worker against a first worker written from a guide, side by side in one run. One JSON line for each figure.

    scripts/run worker -- python bench/worker.py [--quick] [--shape small|qwen3-8b|qwen3-14b] [--quantization none nf4]
                                                 [--only throughput load engine drafts compile]

It makes a model with random weights (bench/qwen3.py): small on a CPU, of Qwen3-8B's shape on a GPU. The yardstick is
bench/guide_handler.py. Rounds are interleaved; printed are medians, and ratios are medians of the rounds' ratios.

- throughput: seconds from sending 1, 4, 16 (on a GPU also 64) jobs at once to the last answer, both sides as worker
  processes with the real SDK behind a local RunPod each; and seconds to the first text, alone and as the last of 16
  jobs, where the yardstick's first text is its answer.
- load: from a folder to a model in memory, NF4 weights as published against quantising at the start, each in a process
  of its own, and the most memory that it ever took.
- engine: the time of a token at batch 1 against the time in which this machine's memory could bring the weights.
- drafts: an answer that quotes its sources and one that paraphrases them, forced on the model. With drafts, without, and
  in the batch; the tokens are compared.
- compile: `generate` with a compiled static cache against plain `generate`, one job; the tokens are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import aiohttp
import qwen3

import handler
from common.prompts import Prompts
from common.wire import Job
from fitness import NF4_BYTES

PARTS = ("throughput", "load", "engine", "drafts", "compile")
PROMPTS = qwen3.ROOT / "prompts"
IDLE = 1.3  # seconds after which the SDK of either side is waiting for a job again; it sleeps up to 1 s after one
SYNC_MS = 300_000  # how long the platform holds a request for an answer at most
PASSAGE = 600  # characters of a source
FORCED = 1000.0  # a score above all that settings can make of the others

# Says what sources say, but nothing as they say it; any run of three tokens that a prompt has too is left out.
PARAPHRASE = """
Taken together, later teams mostly fail to find what was first claimed [S1]. Once somebody had fixed every analysis
beforehand, hardly anything remained: gaps shrank toward nil, margins of error straddling it [S2, S3]. Pooled work looked
kinder at first, yet after allowing for unpublished nulls its estimate fell too [S4]. Nobody should read this as proof of
absence; tiny influences may survive under narrow circumstances that no laboratory has pinned down so far. Readers wanting
one sentence: treat older reports with caution, prefer bigger shared protocols, and wait for fresh data before building
policy or teaching on it [S1, S4]. Disagreement persists about whether tasks used were strong enough, since critics hold
that weak manipulations cannot reveal anything, whereas defenders reply that stronger ones were tried elsewhere and gave
equally little [S3]. Neither camp disputes how scarce raw files from before 2010 are, which keeps old puzzles open.
"""


# --- what is measured on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How much is measured. `new`: tokens of an answer. `rounds`: of what takes seconds; `long_rounds`: of what takes a
    minute, as many jobs at once without a GPU."""

    shape: str
    jobs: tuple[int, ...]
    new: int
    rounds: int
    long_rounds: int
    quick: bool

    def rounds_of(self, jobs: int) -> int:
        """In how many rounds so many jobs at once are measured."""
        return self.rounds if jobs == 1 else self.long_rounds


def plan(shape: str | None, quick: bool, gpu: bool) -> Plan:
    """The plan for this machine."""
    name = shape or ("qwen3-8b" if gpu else "small")
    if quick:
        return Plan(shape or ("small" if gpu else "tiny"), (1, 4), 8, 1, 1, True)
    if gpu:
        return Plan(name, (1, 4, 16, 64), 256, 3, 3, False)
    return Plan(name, (1, 4, 16), 48, 3, 2, False)


def on_gpu() -> bool:
    """Is there a GPU that torch can use?"""
    import torch

    return bool(torch.cuda.is_available())


def circumstances(settings: Plan, quantization: str) -> dict[str, Any]:
    """What every figure depends on."""
    import torch

    gpu = on_gpu()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "shape": settings.shape,
        "quantization": quantization,
        "dtype": "bfloat16" if gpu or quantization == "nf4" else "float32",
    }


def show(what: str, where: dict[str, Any], **figures: Any) -> None:
    """Print one figure."""
    rounded = {key: _significant(value) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps({"bench": f"worker {what}", **where, **rounded}, ensure_ascii=False), flush=True)


def _significant(value: float) -> float:
    return float(f"{value:.4g}")


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(theirs, ours, strict=True))


def sources(first: int, shared: int, count: int = 3) -> list[dict[str, str]]:
    """`count` passages of the corpus: one that jobs with the same `shared` share, then those from `first` on."""
    records = qwen3.records()
    chosen = [records[shared % 40], *(records[40 + (first + at) % (len(records) - 40)] for at in range(count - 1))]
    return [
        {"id": f"S{at}", "text": record["text"][:PASSAGE], "label": f"{record['authors'][0]} ({record['year']})"}
        for at, record in enumerate(chosen, 1)
    ]


# --- throughput and time to the first text, through the platform ------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A job's answer, normalised. `seconds`: from the first job's sending to this one's answer."""

    seconds: float
    prompt_tokens: int
    tokens: int


class Side:
    """A worker behind a local RunPod of its own."""

    def __init__(self, name: str, session: aiohttp.ClientSession, url: str, log: Path) -> None:
        self.name = name
        self.session = session
        self.url = f"{url}/v2/local"
        self.log = log

    async def answer(self, job: dict[str, Any], since: float) -> Result:
        """Send a job and wait for its answer."""
        async with self.session.post(f"{self.url}/runsync?wait={SYNC_MS}", json={"input": job}) as response:
            status = await response.json()
        while status["status"] in ("IN_QUEUE", "IN_PROGRESS"):
            await asyncio.sleep(0.25)
            async with self.session.get(f"{self.url}/status/{status['id']}") as response:
                status = await response.json()
        seconds = time.perf_counter() - since
        if status["status"] != "COMPLETED":
            log = self.log.read_text(encoding="utf-8", errors="replace")
            sys.exit(f"bench/worker.py: {self.name}: {json.dumps(status)[:500]}\n{log[-3000:]}")
        output = status["output"]
        if isinstance(output, dict):
            return Result(seconds, output["prompt_tokens"], output["tokens"])
        usage = output[-1]["usage"]
        return Result(seconds, usage["prompt_tokens"], usage["completion_tokens"])

    async def at_once(self, jobs: Sequence[dict[str, Any]]) -> list[Result]:
        """Send the jobs at once, and wait for all answers."""
        await asyncio.sleep(IDLE)
        since = time.perf_counter()
        return list(await asyncio.gather(*(self.answer(job, since) for job in jobs)))

    async def first_text(self, job: dict[str, Any], others: Sequence[dict[str, Any]]) -> float:
        """Seconds from sending a job, right after `others`, to its first text on /stream."""
        await asyncio.sleep(IDLE)
        began = time.perf_counter()
        running = [asyncio.create_task(self.answer(other, began)) for other in others]
        await asyncio.sleep(0.05 if others else 0)  # on their way
        since = time.perf_counter()
        async with self.session.post(f"{self.url}/run", json={"input": {**job, "stream": True}}) as response:
            number = (await response.json())["id"]
        first = None
        while True:
            async with self.session.get(f"{self.url}/stream/{number}") as response:
                news = await response.json()
            if first is None and any("text" in chunk["output"] for chunk in news["stream"]):
                first = time.perf_counter() - since
            if news["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
                break
            await asyncio.sleep(0.01 if first is None else 0.2)
        await asyncio.gather(*running)
        if first is None:
            sys.exit(f"bench/worker.py: {self.name}: no text was streamed ({news['status']})")
        return first


@contextlib.asynccontextmanager
async def side(name: str, script: Path, folder: Path, environment: dict[str, str]) -> AsyncIterator[Side]:
    """Start a local RunPod with a worker; it is ready for jobs."""
    key = secrets.token_hex(16)
    announced = folder / f"{name}-url"
    announced.unlink(missing_ok=True)
    command = [sys.executable, "-m", "local_runpod", "--announce", str(announced)]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--worker", sys.executable, str(script)],
            env={**os.environ, **environment, "LOCAL_RUNPOD_KEY": key},
            stdout=log,
            stderr=log,
        )
    try:
        while not announced.exists() and process.poll() is None:
            await asyncio.sleep(0.05)
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
            url = announced.read_text(encoding="utf-8").strip()
            ready = 0
            while not ready:
                await asyncio.sleep(0.2)
                text = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                if process.poll() is not None or "ended with exit code" in text:
                    sys.exit(f"bench/worker.py: {name} does not start:\n{text[-3000:]}")
                async with session.get(f"{url}/v2/local/health") as response:
                    ready = (await response.json())["workers"]["ready"]
            yield Side(name, session, url, folder / f"{name}.log")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def jobs_of(number: int, round_: int, new: int) -> list[dict[str, Any]]:
    """`number` jobs with the default settings; each round has its own, so that none was ever read before."""
    return [
        {
            "prompt": f"Round {round_}, question {number}.{at}: which findings replicate, and how large are they?",
            "sources": sources(97 * round_ + 2 * at + 31 * number, 5 * round_ + number),
            "max_new_tokens": new,
        }
        for at in range(number)
    ]


async def throughput(model: Path, folder: Path, settings: Plan, quantization: str) -> None:
    """Print tokens per second for each number of jobs, and the times to the first text."""
    environment = {
        "MODEL_ID": str(model),
        "ENGINE": "transformers",
        "QUANTIZATION": quantization,
        "PROMPTS_DIR": str(PROMPTS),
        "RUNPOD_LOG_LEVEL": "ERROR",
    }
    where = circumstances(settings, quantization)
    guide = Path(__file__).with_name("guide_handler.py")
    seconds: dict[tuple[str, int], list[float]] = {}
    first: dict[str, list[float]] = {"alone": [], "last": []}
    last = 16 if 16 in settings.jobs else max(settings.jobs)
    prompt_tokens: list[int] = []
    async with (
        side("ours", Path(str(handler.__file__)), folder, environment) as ours,
        side("guide", guide, folder, environment) as theirs,
    ):
        for each in (ours, theirs):  # what is done once, as reserving memory and choosing kernels
            await each.at_once(jobs_of(4, 0, 4))
            await each.at_once(jobs_of(1, 0, 4))
        for round_ in range(1, settings.rounds + 1):
            for number in [number for number in settings.jobs if round_ <= settings.rounds_of(number)]:
                found: dict[str, list[Result]] = {}
                for each in (ours, theirs)[:: 1 if round_ % 2 else -1]:
                    found[each.name] = await each.at_once(jobs_of(number, round_, settings.new))
                    seconds.setdefault((each.name, number), []).append(max(one.seconds for one in found[each.name]))
                for mine, other in zip(found["ours"], found["guide"], strict=True):
                    done = (mine.prompt_tokens, mine.tokens), (other.prompt_tokens, other.tokens)
                    if set(done) != {(mine.prompt_tokens, settings.new)}:
                        sys.exit(f"bench/worker.py: the sides did not do the same work: {mine}, {other}")
                    prompt_tokens.append(mine.prompt_tokens)
            first["alone"].append(await ours.first_text(jobs_of(1, -round_, settings.new)[0], []))
            if round_ <= settings.rounds_of(last):
                one, *others = jobs_of(last, -10 * round_, settings.new)
                first["last"].append(await ours.first_text(one, others))
    for number in settings.jobs:
        mine_, others_ = seconds["ours", number], seconds["guide", number]
        tokens = number * settings.new
        show(
            "throughput",
            where,
            jobs=number,
            rounds=len(mine_),
            prompt_tokens=[min(prompt_tokens), max(prompt_tokens)],
            new_tokens=settings.new,
            ours_seconds=statistics.median(mine_),
            guide_seconds=statistics.median(others_),
            ours_tokens_per_second=tokens / statistics.median(mine_),
            guide_tokens_per_second=tokens / statistics.median(others_),
            ratio=ratio(others_, mine_),
        )
    show(
        "first text",
        where,
        rounds=[len(first["alone"]), len(first["last"])],
        jobs=last,
        ours_alone_seconds=statistics.median(first["alone"]),
        guide_alone_seconds=statistics.median(seconds["guide", 1]),
        ratio_alone=ratio(seconds["guide", 1], first["alone"]),
        ours_last_seconds=statistics.median(first["last"]),
        guide_last_seconds=statistics.median(seconds["guide", last]),
        ratio_last=ratio(seconds["guide", last], first["last"]),
    )


# --- parts that run in a process of their own --------------------------------------------------------------------------


def child(part: str, model: Path, settings: Plan, quantization: str) -> Any:
    """Run a part in a fresh process; what it answered. None: it has printed its figures itself."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part, "--model", str(model)]
    command += ["--shape", settings.shape, "--quantization", quantization, *(["--quick"] if settings.quick else [])]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"bench/worker.py: {part} ended with code {ended.returncode}\n{ended.stderr[-3000:]}")
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    shown = [line for line in lines if line.startswith('{"bench"')]
    for line in shown:
        print(line, flush=True)
    return None if shown else json.loads(lines[-1])


def load_engine(model: Path, quantization: str) -> tuple[Any, Any]:
    """Our engine, as the worker loads it, and what that took."""
    import generative
    from engines import Start
    from weights import locate

    start = Start()
    environ = {"QUANTIZATION": "" if quantization == "as published" else quantization}
    engine = generative.load(Prompts(PROMPTS), str(model), locate(str(model), None, environ), environ, start)
    return engine, start


def publish(model: Path) -> None:
    """Write the model in NF4 beside `model`, in a folder with -nf4 at its name's end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = {"device_map": {"": 0}} if on_gpu() else {}
    network = AutoModelForCausalLM.from_pretrained(model, quantization_config=options, dtype=torch.bfloat16, **device)
    target = f"{model}-nf4"
    network.save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)


def measure_load(model: Path, quantization: str) -> None:
    """Load once; seconds, and the most memory in MB."""
    import torch

    import generative  # noqa: F401 # imports are not what is measured

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine, start = load_engine(model, quantization)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gpu = torch.cuda.max_memory_allocated() / 1e6 if on_gpu() else None
    engine.close()
    print(
        json.dumps(
            {"seconds": start.phases["load"], "before_mb": before / 1000, "peak_mb": peak / 1000, "peak_gpu_mb": gpu}
        )
    )


def load(model: Path, settings: Plan) -> None:
    """Print what loading takes, both ways."""
    child("publish", model, settings, "nf4")
    published = Path(f"{model}-nf4")
    done: dict[str, list[dict[str, Any]]] = {"published": [], "quantised": []}
    for round_ in range(settings.rounds):
        ways = [("published", published, "as published"), ("quantised", model, "nf4")]
        for name, folder, quantization in ways[:: 1 if round_ % 2 else -1]:
            done[name].append(child("load", folder, settings, quantization))

    def median(way: str, key: str) -> float | None:
        figures = [one[key] for one in done[way]]
        return None if None in figures else float(statistics.median(figures))

    megabytes = {
        folder: sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6 for folder in (model, published)
    }
    show(
        "load",
        circumstances(settings, "nf4"),
        rounds=settings.rounds,
        published_seconds=median("published", "seconds"),
        quantised_at_start_seconds=median("quantised", "seconds"),
        ratio=ratio([one["seconds"] for one in done["quantised"]], [one["seconds"] for one in done["published"]]),
        published_mb_on_disk=megabytes[published],
        unquantised_mb_on_disk=megabytes[model],
        memory="peak of the process"
        + ("" if on_gpu() else ", KV memory of the batch included as far as it was touched"),
        before_loading_mb=median("published", "before_mb"),
        published_peak_mb=median("published", "peak_mb"),
        quantised_at_start_peak_mb=median("quantised", "peak_mb"),
        published_peak_gpu_mb=median("published", "peak_gpu_mb"),
        quantised_at_start_peak_gpu_mb=median("quantised", "peak_gpu_mb"),
    )


# --- the engine by itself ----------------------------------------------------------------------------------------------


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying a large tensor with torch."""
    import torch

    gpu = on_gpu()
    size = 2**31 if gpu else 2**28
    one = torch.ones(size // 4, device="cuda" if gpu else "cpu")
    other = torch.empty_like(one)
    times = []
    for _ in range(7):
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        other.copy_(one)
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size / statistics.median(times[2:])


def bytes_per_token(network: Any) -> tuple[int, int]:
    """The bytes of weights that a token's forward pass reads, and how many parameters they are: all linear layers."""
    import torch

    total, parameters = 0.0, 0
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            quantised = module.weight.dtype == torch.uint8
            count = module.in_features * module.out_features
            total += count * (NF4_BYTES if quantised else module.weight.element_size())
            parameters += count
    return round(total), parameters


def answer(engine: Any, job: Job) -> Any:
    """The engine's answer to one job."""
    return asyncio.run(engine.answer(job, lambda text: None))


def engine_part(model: Path, settings: Plan, quantization: str) -> None:
    """Print the share of the memory's bandwidth that decoding one job uses."""
    engine, _ = load_engine(model, quantization)
    size, parameters = bytes_per_token(engine.network)
    tokens = 16 if settings.quick else 4 * settings.new // 3
    bandwidths, seconds = [], []
    for round_ in range(settings.rounds):
        job = Job(
            prompt=f"Which findings replicate? ({round_})", sources=sources(7 * round_, round_), max_new_tokens=tokens
        )
        answer(engine, replace(job, max_new_tokens=2))
        bandwidths.append(copy_bandwidth())
        seconds.append(answer(engine, job).decode_ms / 1000 / (tokens - 1))
    engine.close()
    limits = [size / bandwidth for bandwidth in bandwidths]
    show(
        "bandwidth",
        circumstances(settings, quantization),
        rounds=len(seconds),
        parameters_read=parameters,
        bytes_read_per_token=size,
        copy_gb_per_second=statistics.median(bandwidths) / 1e9,
        token_seconds=statistics.median(seconds),
        limit_seconds=statistics.median(limits),
        share_of_limit=ratio(limits, seconds),
    )


# --- drafts ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forced(network: Any, prompt: list[int], answer_ids: list[int]) -> Iterator[None]:
    """Make the model choose the tokens of an answer, one after the other, wherever in it a forward pass begins."""
    import torch

    ids = torch.tensor(answer_ids, device=network.device)

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        rows = output.logits.shape[1]
        if (positions := kwargs.get("position_ids")) is not None:  # in the batch
            positions = positions[0, kwargs["logits_indices"]]
        else:
            length = kwargs["past_key_values"].get_seq_length()
            positions = torch.arange(length - rows, length, device=ids.device)
        at = (positions - len(prompt) + 1).clamp(0, len(ids) - 1)
        output.logits[0].scatter_(1, ids[at].unsqueeze(1), FORCED)

    handle = network.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def without_runs_of(ids: list[int], prompt: list[int], length: int) -> list[int]:
    """`ids` without each token that would end a run of `length` tokens that stands in the prompt or before it."""
    runs = {tuple(prompt[at : at + length]) for at in range(len(prompt))}
    kept: list[int] = []
    for token in ids:
        run = (*kept[1 - length :], token)
        if len(run) < length or run not in runs:
            runs.add(run)
            kept.append(token)
    return kept


def recorded(engine: Any, job: Job, tokens: int) -> tuple[list[int], dict[str, list[int]]]:
    """A prompt's ids, and those of an answer that quotes its sources and of one that does not."""
    import drafting

    def ids(text: str) -> list[int]:
        return list(engine.chat._tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = engine.chat.encode(job, None).ids
    quotes = [
        f"{said} “{' '.join(source['text'].split()[3:63])}” [{source['id']}]. "
        for said, source in zip(
            ("One record says:", "Against this stands", "Pooled:", "Last,"), job.sources, strict=False
        )
    ]
    paraphrase = without_runs_of(ids(" ".join(PARAPHRASE.split())), prompt, drafting.NGRAM)
    count = min(tokens, len(paraphrase))
    return prompt, {"quoting": ids("".join(quotes))[:count], "paraphrase": paraphrase[:count]}


def drafts_part(model: Path, settings: Plan, quantization: str) -> None:
    """Print what drafts save on a quoting answer, and cost on a paraphrase."""
    import drafting
    from sampling import Sampling

    engine, _ = load_engine(model, quantization)
    where = circumstances(settings, quantization)
    if engine.drafter is None:
        show("drafts", where, result="not measured: the batch has CUDA graphs, and then the engine does not draft")
        engine.close()
        return
    job = Job(prompt="Which findings replicate?", sources=sources(11, 3, 4), seed=5)
    prompt, answers = recorded(engine, job, 24 if settings.quick else 80)
    sampling = Sampling(job.temperature, job.top_p, job.repetition_penalty, 5)
    draft = drafting.DRAFT

    def run(way: str, count: int) -> tuple[list[int], float, int]:
        """Tokens, seconds after the first of them, forward passes after the first."""
        if way == "batch":
            batch = engine.batch

            async def batched() -> Any:
                pages = batch.pages(len(prompt) + count)
                slot = await batch.room.take(pages)
                try:
                    return await batch.run(prompt, count, sampling, slot, None)
                finally:
                    batch.room.give(pages, slot)

            done = asyncio.run(batched())
            return done.tokens, done.decode_ms / 1000, count - 1
        drafting.DRAFT = draft if way == "drafts" else 0
        try:
            drafted = engine.drafter.run(prompt, count, sampling, lambda tokens: None, lambda: False)
        finally:
            drafting.DRAFT = draft
        return drafted.tokens, drafted.decode_ms / 1000, drafted.forward_passes - 1

    for name, tokens in answers.items():
        taken: dict[str, list[float]] = {"drafts": [], "plain": [], "batch": []}
        passes: dict[str, int] = {}
        with forced(engine.network, prompt, tokens):
            for round_ in range(settings.rounds):
                for way in list(taken)[:: 1 if round_ % 2 else -1]:
                    same, seconds, passes[way] = run(way, len(tokens))
                    if same != tokens:
                        sys.exit(f"bench/worker.py: {way} gave another text for the {name} answer")
                    taken[way].append(seconds)
        show(
            "drafts",
            where,
            answer=name,
            rounds=len(taken["plain"]),
            prompt_tokens=len(prompt),
            tokens=len(tokens),
            same_tokens=True,
            drafts_tokens_per_pass=(len(tokens) - 1) / passes["drafts"],
            drafts_decode_seconds=statistics.median(taken["drafts"]),
            plain_decode_seconds=statistics.median(taken["plain"]),
            batch_of_one_decode_seconds=statistics.median(taken["batch"]),
            ratio_to_plain=ratio(taken["plain"], taken["drafts"]),
            ratio_to_batch_of_one=ratio(taken["batch"], taken["drafts"]),
        )
    engine.close()


# --- compiling ---------------------------------------------------------------------------------------------------------


def compile_part(model: Path, settings: Plan, quantization: str) -> None:
    """Print what compiling `generate` with a static cache saves for one job."""
    import shutil

    import torch
    from transformers import CompileConfig, GenerationConfig, LogitsProcessorList

    from sampling import Sampling, SamplingProcessor

    where = circumstances(settings, quantization)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        show("compile", where, result="not measured: there is no C++ compiler")
        return
    engine, _ = load_engine(model, quantization)
    network, tokens = engine.network, 8 if settings.quick else settings.new
    ids = torch.tensor([engine.chat.encode(Job(prompt="Which findings replicate?", sources=sources(11, 3)), None).ids])
    ids = ids.to(network.device)
    engine.close()
    everywhere = CompileConfig(fullgraph=False, mode="default" if network.device.type == "cpu" else "reduce-overhead")
    everywhere._compile_all_devices = True

    def run(compiled: bool) -> tuple[list[int], float]:
        options = {"cache_implementation": "static", "compile_config": everywhere} if compiled else {}
        started = time.perf_counter()
        with torch.inference_mode():
            output = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(max_new_tokens=tokens, do_sample=False, **options),
                logits_processor=LogitsProcessorList([SamplingProcessor(Sampling(0.3, 0.9, 1.1, 5))]),
            )
        new = output[0, ids.shape[1] :].tolist()
        return new, time.perf_counter() - started

    try:
        _, first = run(True)
    except Exception as error:
        show("compile", where, result=f"not measured: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return
    run(False)
    taken: dict[bool, list[float]] = {True: [], False: []}
    texts: dict[bool, list[int]] = {}
    for round_ in range(settings.rounds):
        for compiled in (True, False)[:: 1 if round_ % 2 else -1]:
            texts[compiled], seconds = run(compiled)
            taken[compiled].append(seconds)
    gains = [plain / compiled for plain, compiled in zip(taken[False], taken[True], strict=True)]
    show(
        "compile",
        where,
        rounds=len(taken[True]),
        prompt_tokens=ids.shape[1],
        new_tokens=tokens,
        same_tokens=texts[True] == texts[False],
        compiled_seconds=statistics.median(taken[True]),
        plain_seconds=statistics.median(taken[False]),
        first_compiled_seconds=first,
        ratio=statistics.median(gains),
        result="it wins in each round" if min(gains) > 1.05 else "it does not win in each round",
    )


CHILDREN = {"engine": engine_part, "drafts": drafts_part, "compile": compile_part}


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="that it works, in a minute or two; the figures mean nothing"
    )
    parser.add_argument("--shape", choices=sorted(qwen3.SHAPES))
    parser.add_argument("--quantization", nargs="+", help="none, nf4; by default both, throughput in NF4 on a GPU only")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Workers and parts inherit these. Spinning threads would be measured instead of the work where cores are shared.
    os.environ.update(OMP_WAIT_POLICY="passive", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    settings = plan(arguments.shape, arguments.quick, on_gpu())
    quantizations = arguments.quantization or ["none", "nf4"]
    if arguments.child == "publish":
        publish(arguments.model)
        print("{}")
    elif arguments.child == "load":
        measure_load(arguments.model, quantizations[0])
    elif arguments.child == "make":
        qwen3.make(arguments.model, settings.shape)
        print("{}")
    elif arguments.child:
        CHILDREN[arguments.child](arguments.model, settings, quantizations[0])
    else:
        measure(settings, quantizations, arguments.only, asked=bool(arguments.quantization))


def measure(settings: Plan, quantizations: Sequence[str], parts: Sequence[str], *, asked: bool) -> None:
    """Make the model, and run the parts one after the other: each has the machine for itself."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
        model = folder / "model"
        model.mkdir()
        child("make", model, settings, "none")
        for part in parts:
            if part == "load":
                load(model, settings)
                continue
            for quantization in quantizations:
                if part == "throughput":
                    # Without a GPU, NF4 is there to be tried, not to be used: it is measured if it was asked for.
                    if quantization == "none" or asked or on_gpu():
                        asyncio.run(throughput(model, folder, settings, quantization))
                elif part != "compile" or quantization == "none":  # `generate` never compiles NF4
                    child(part, model, settings, quantization)
            print(f"{part}: {time.monotonic() - started:.0f} s since the start", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
