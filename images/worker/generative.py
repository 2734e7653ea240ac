"""The transformers engine: the causal language model of MODEL_ID, loaded once, NF4 where a GPU is there.

Safety rules that do not depend on the model: no remote code, safetensors only, and no text of a question or a source
ever becomes a control token (transformers would turn a literal `<|im_end|>` into one).
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

from common.prompts import Prompts, break_tokens, neutralise, render_sources
from common.wire import Job
from engines import Answer, JobError

LOWEST_TEMPERATURE = 1e-4  # below, the likeliest token is taken: scores divided by less can become infinite


class _Cancelled(StoppingCriteria):  # type: ignore[misc] # transformers has no types here
    """Ends generation at the next token once the event is set: a thread cannot be stopped from outside."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event
        self.first_token_at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class TransformersEngine:
    """Generates with AutoModelForCausalLM and the tokenizer's own chat template."""

    def __init__(self, prompts: Prompts, model_id: str, revision: str | None) -> None:
        self.prompts = prompts
        gpu = torch.cuda.is_available()
        common: dict[str, Any] = {"revision": revision, "token": os.environ.get("HF_TOKEN") or None}
        self.tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False, **common)
        if not self.tokenizer.chat_template:
            raise SystemExit(f"{model_id} has no chat template; use an instruction-tuned model")
        if gpu:
            common["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
            common["device_map"] = "auto"
        self.network = AutoModelForCausalLM.from_pretrained(
            model_id,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.bfloat16 if gpu else torch.float32,
            **common,
        )
        self.network.eval()
        text_config = self.network.config.get_text_config(decoder=True)
        self.window: int = getattr(text_config, "max_position_embeddings", None) or 2**31
        # Some tokenizers (Gemma's, for one) keep runs of white space as added tokens: they control nothing.
        added = {
            number: token.content
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or token.content.strip("▁ \t\r\n")
        }
        self.control_ids = set(added) | set(self.tokenizer.all_special_ids)
        ends_and_starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        if self.tokenizer.unk_token_id not in ends_and_starts:
            self.control_ids.discard(self.tokenizer.unk_token_id)  # any rare character may be an unknown one
        self.control_tokens = [*added.values(), *self.tokenizer.all_special_tokens]
        # The end of a turn is the tokenizer's to know, other ends are in the repo's generation_config.json. All else
        # in there (sampling, beams, lengths, penalties) would mix with what the job asks for, and is dropped.
        ends = self.network.generation_config.eos_token_id
        self.ends: list[int] = [*ends] if isinstance(ends, list) else [] if ends is None else [ends]
        if self.tokenizer.eos_token_id not in (None, *self.ends):
            self.ends.append(self.tokenizer.eos_token_id)
        pad = self.tokenizer.pad_token_id
        self.network.generation_config = GenerationConfig(
            eos_token_id=self.ends or None, pad_token_id=self.ends[0] if pad is None and self.ends else pad
        )
        # A stopped job's thread runs on to its next token: it must not draw from the next job's random numbers.
        self.one_at_a_time = threading.Lock()
        self.model: dict[str, Any] = {
            "id": model_id,
            "revision": getattr(self.network.config, "_commit_hash", None) or revision,
            "engine": "transformers",
            "quantization": "nf4" if gpu else "none",
        }
        print(
            f"loaded {model_id} on {'GPU, NF4 with bfloat16 compute' if gpu else 'CPU, float32: no GPU here'};"
            f" context window {self.window} tokens",
            flush=True,
        )

    def encode(self, job: Job) -> torch.Tensor:
        """The token ids of a job, shape (1, tokens). Raises JobError if content could act as a control token."""
        if job.sources:
            context = render_sources(job.sources, self.control_tokens)
        else:
            context = neutralise(job.context, self.control_tokens)
        question = break_tokens(job.prompt, self.control_tokens)
        for content in (context, question):
            ids = self.tokenizer(content, add_special_tokens=False)["input_ids"]
            if not self.control_ids.isdisjoint(ids):
                raise JobError("UNSAFE_INPUT", "a part of the question or the sources would act as a control token")
        turns = [
            {"role": "system", "content": self.prompts.system},
            {"role": "user", "content": self.prompts.user_turn(question, context)},
        ]
        return self._apply_template(turns)

    def _apply_template(self, turns: list[dict[str, str]]) -> torch.Tensor:
        from jinja2.exceptions import TemplateError

        options: dict[str, Any] = {
            "add_generation_prompt": True,
            "tokenize": True,
            "return_tensors": "pt",
            "return_dict": True,
            # For the templates that know it (Qwen3): the answer, not a monologue before it.
            "enable_thinking": False,
        }
        try:
            encoded = self.tokenizer.apply_chat_template(turns, **options)
        except TemplateError:
            # Some chat templates (Gemma's, for one) refuse a system turn: its text opens the user's turn instead.
            merged = [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}]
            encoded = self.tokenizer.apply_chat_template(merged, **options)
        ids: torch.Tensor = encoded["input_ids"]
        return ids

    def answer(self, job: Job, cancelled: threading.Event) -> Answer:
        """Generate the answer to a job. Raises JobError for a prompt that does not fit and for a lost GPU."""
        with self.one_at_a_time:
            return self._answer(job, cancelled)

    def _answer(self, job: Job, cancelled: threading.Event) -> Answer:
        ids = self.encode(job)
        room = self.window - ids.shape[1]
        if room < 1:
            raise JobError(
                "INPUT_TOO_LONG",
                f"the prompt has {ids.shape[1]} tokens and the model reads {self.window}; lower n_results",
            )
        if cancelled.is_set():
            return Answer("", "cancelled", prompt_tokens=ids.shape[1])
        if job.seed is not None:
            set_seed(job.seed % 2**32)
        sampling: dict[str, Any] = {"do_sample": False}
        if job.temperature >= LOWEST_TEMPERATURE:
            sampling = {"do_sample": True, "temperature": job.temperature, "top_p": job.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=min(job.max_new_tokens, room), repetition_penalty=job.repetition_penalty, **sampling
        )
        stop = _Cancelled(cancelled)
        started = time.monotonic()
        try:
            with torch.inference_mode():
                output = self.network.generate(
                    input_ids=ids.to(self.network.device),
                    attention_mask=torch.ones_like(ids).to(self.network.device),
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        except torch.OutOfMemoryError as error:
            raise JobError(
                "OUT_OF_MEMORY",
                "the GPU has too little memory for this job; lower n_results or max_new_tokens",
                refresh=True,
            ) from error
        except RuntimeError as error:
            if "CUDA" not in str(error):
                raise
            # A CUDA error poisons the process: every later job would fail too.
            raise JobError(
                "GPU_LOST", "the GPU reported an error; a new worker takes over, try again", refresh=True
            ) from error
        ended = time.monotonic()
        generated = output[0][ids.shape[1] :].tolist()
        finish_reason = "cancelled" if cancelled.is_set() else "stop" if generated[-1] in self.ends else "length"
        first = stop.first_token_at or ended
        return Answer(
            self.tokenizer.decode(generated, skip_special_tokens=True).strip(),
            finish_reason,  # type: ignore[arg-type]
            prompt_tokens=ids.shape[1],
            completion_tokens=len(generated),
            prefill_ms=round((first - started) * 1000),
            decode_ms=round((ended - first) * 1000),
        )
