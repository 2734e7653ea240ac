"""Attention of a batch without a GPU: each job attends to its own keys alone.

Transformers lays the keys of all jobs of a batch side by side, lets every query attend to all of them, and masks those
of other jobs, which for 16 jobs is 16 times the arithmetic. (Flash attention, on GPUs, does not do that.) What a masked
key adds is exactly nothing, so the result differs in rounding at most.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def install() -> None:
    """Take the place of transformers' `sdpa` for batches; all else goes to it as before."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' models call it. `cache` is there in a batch: query and new key and value are then
    (1, heads, tokens, size), those of all jobs one after the other."""
    special = any(kwargs.get(name) is not None for name in ("softcap", "position_bias"))
    if cache is None or attention_mask is None or special or query.device.type != "cpu":
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, cache=cache, **kwargs
        )
        return output
    # Writes the new keys and values, and gives back those of all jobs; it changes kwargs to those of this layer.
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    attended = torch.empty_like(query)
    for job in range(len(queries) - 1):
        asked, known = slice(queries[job], queries[job + 1]), slice(keys[job], keys[job + 1])
        if asked.start == asked.stop:
            continue
        attended[:, :, asked] = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, asked],
            key[:, :, known],
            value[:, :, known],
            # A single token sees all of its job's keys.
            attn_mask=attention_mask[:, :, asked, known] if asked.stop - asked.start > 1 else None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return attended.transpose(1, 2).contiguous(), None
