"""The attention of batches on a CPU, compared call by call with the one whose place it takes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import generative
import paged_attention
from chat import Chat
from common.prompts import Prompts
from common.wire import Job
from generative import TransformersEngine

# Prompts of one to several pieces, some of which begin alike.
JOBS = [
    Job(prompt=f"Is it real, {'very ' * n}?", context="It is. " * 60 * (n % 4), temperature=0, max_new_tokens=30 + n)
    for n in range(8)
]


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_the_result_is_the_same(model_copy: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "sliding":
        torch.manual_seed(4)
        config = Qwen3Config.from_pretrained(model_copy)
        config.update(
            {"use_sliding_window": True, "sliding_window": 48, "layer_types": ["full_attention", "sliding_attention"]}
        )
        Qwen3ForCausalLM(config).save_pretrained(model_copy)
    network = AutoModelForCausalLM.from_pretrained(model_copy).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    ends = generative._ends(network, tokenizer)
    engine = TransformersEngine(Chat(tokenizer, prompts), network, ends, {}, kv_bytes=256)
    assert engine.batch, engine.why_alone
    engine.drafter = None
    widths: set[int] = set()

    def both(*args: Any, **kwargs: Any) -> Any:
        pages = kwargs["cache"].cache_tensor
        before = pages.clone()  # a sliding window's new keys take the place of old ones
        expected, _ = sdpa_attention_forward(*args, **kwargs)
        pages.copy_(before)
        found, _ = paged_attention.attend(*args, **kwargs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        widths.add(args[1].shape[2])
        return found, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", both)

    async def together() -> list[Any]:
        return await asyncio.gather(*(engine.answer(job, lambda text: None) for job in JOBS))

    try:
        answers = asyncio.run(asyncio.wait_for(together(), 60))
    finally:
        engine.close()
    assert [given.completion_tokens for given in answers] == [job.max_new_tokens for job in JOBS]
    assert {8, 512} <= widths, "prompts read in pieces, and a token of each job"


def test_outside_of_a_batch_nothing_changes(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.arange(3, 60).unsqueeze(0)
    found = []
    for attention in (paged_attention.attend, sdpa_attention_forward):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
        with torch.no_grad():
            found.append(network(input_ids=ids).logits)
    assert torch.equal(*found)


def test_it_is_what_a_batch_uses(model_folder: Path, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", sdpa_attention_forward)
    network = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    TransformersEngine(Chat(tokenizer, prompts), network, [0], {}, kv_bytes=256).close()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is paged_attention.attend
