"""What the worker's tests share: a tiny language model made on the spot, and local RunPods with real workers."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from common.prompts import Prompts

ROOT = Path(__file__).resolve().parents[2]
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    """The prompt files of the tree."""
    return Prompts(ROOT / "prompts")


# --- a language model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, prompts: Prompts) -> Path:
    """A Qwen3 with random weights and a byte-level tokenizer with ChatML: a model as a hub repo holds it.

    `<|im_end|>`, the end of a turn, has the id 0 and never is the likeliest token. `<tool_call>` and `END-OF-TURN` are
    control tokens that are not marked special, as Qwen3 has them; the empty line is an added token as in Gemma.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)  # more threads than that only wait for each other in a model of this size
    folder = tmp_path_factory.mktemp("model")
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.train_from_iterator(
        [prompts.system, prompts.user_turn("Is it real?", "It is.", "3f9a2c71e05b")],
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **ends)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "END-OF-TURN", "\n\n")])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)

    torch.manual_seed(1)
    network = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        network.lm_head.weight *= 20  # as drawn, all tokens are about equally likely
        network.lm_head.weight[tokenizer.eos_token_id] = 0
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model for a test to change."""
    return shutil.copytree(model_folder, tmp_path / "model")


# --- the local RunPod --------------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until `condition` holds; fail with `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} seconds"
        time.sleep(0.02)


class Cloud:
    """A local RunPod, started as a process that starts a worker process itself, and a client of its job API."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, key: str, session: requests.Session) -> None:
        self.process = process
        self.folder = folder
        self.key = key
        self.session = session
        self.log = folder / "log"

    def call(self, method: str, path: str, body: object = None, *, server: bool = False) -> Any:
        """The JSON answer of a route of the endpoint, or of the server itself."""
        base = (self.folder / "url").read_text().strip()
        url = f"{base}/{path}" if server else f"{base}/v2/local/{path}"
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        answer = self.session.request(
            method, url, data=data, headers={"Authorization": f"Bearer {self.key}"}, timeout=100
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def run(self, job: object, **policy: int) -> str:
        """Queue a job; its id."""
        queued = self.call("POST", "run", {"input": job, **({"policy": policy} if policy else {})})
        assert queued["status"] == "IN_QUEUE"
        return str(queued["id"])

    def status(self, job: str) -> Any:
        """What /status says about a job."""
        return self.call("GET", f"status/{job}")

    def wait(self, job: str, *states: str, seconds: float = 60) -> Any:
        """The job's status once it is in one of `states`, by default in a final one."""
        wait_until(lambda: self.status(job)["status"] in (states or FINAL), seconds, f"the end of job {job}")
        return self.status(job)

    def events(self) -> list[str]:
        """What the stub worker has noted: "<pid> <what>" in each line."""
        path = self.folder / "events"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, what: str, seconds: float = 60) -> int:
        """Wait until the stub worker has noted `what`; the process id of the worker that noted it last."""
        wait_until(lambda: any(line.endswith(f" {what}") for line in self.events()), seconds, what)
        return int(next(line for line in reversed(self.events()) if line.endswith(f" {what}")).split()[0])

    def processes(self) -> set[int]:
        """Every process that carries this cloud's key: the server, its workers, and what they started."""
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"LOCAL_RUNPOD_KEY={self.key}\0".encode() in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue  # another user's, or gone meanwhile
        return found

    def end(self) -> int:
        """End the server as `make down` does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)


@contextmanager
def run_cloud(folder: Path, script: Path | None, environment: dict[str, str], hold: float = 2.0) -> Iterator[Cloud]:
    key = secrets.token_hex(16)
    variables = {
        **{name: value for name, value in os.environ.items() if name not in ("ENGINE", "MODEL_ID", "IMAGE")},
        "LOCAL_RUNPOD_KEY": key,
        "PROMPTS_DIR": str(ROOT / "prompts"),
        "EVENTS": str(folder / "events"),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-m", "local_runpod", "--announce", str(folder / "url"), "--hold", str(hold)]
    if script:
        command += ["--worker", sys.executable, str(script)]
    with (folder / "log").open("wb") as log, requests.Session() as session:
        process = subprocess.Popen(command, env=variables, cwd=folder, stdout=log, stderr=log)
        cloud = Cloud(process, folder, key, session)
        try:
            wait_until((folder / "url").exists, 30, "the start of the local RunPod")
            yield cloud
        finally:
            try:
                if process.poll() is None:
                    cloud.end()
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            for line in (folder / "log").read_text(errors="replace").splitlines():
                print(line)  # pytest shows it if the test failed


@pytest.fixture(scope="module")
def start_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cloud]]:
    """Starts a local RunPod with the worker of a script: a file beside this one, or handler.py; "": without a worker."""
    with ExitStack() as stack:

        def start(script: str = "handler.py", hold: float = 2.0, **environment: str) -> Cloud:
            path = Path(__file__).with_name(script) if script else None
            if script == "handler.py":
                spec = importlib.util.find_spec("handler")
                assert spec
                assert spec.origin
                path = Path(spec.origin)
            return stack.enter_context(run_cloud(tmp_path_factory.mktemp("cloud"), path, environment, hold))

        yield start
