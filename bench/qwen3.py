"""Models for bench/worker.py and bench/soak.py, made on the spot: Qwen3 with random weights, as a hub repo holds it.

What a forward pass costs depends on shapes, not on what the weights say. What sampling costs depends on how peaked the
scores are, so the output layer is scaled to give a spread like a trained model's. The end of a turn is never likely:
each answer has just as many tokens as its job allows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPREAD = 4.0  # standard deviation of the scores before temperature


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 in the terms of its config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int


# The last two have the sizes in the config.json of Qwen/Qwen3-8B and Qwen/Qwen3-14B.
SHAPES = {
    "tiny": Shape(2048, 64, 128, 2, 2, 1, 32, 2048),
    "small": Shape(32000, 512, 1536, 8, 8, 4, 64, 4096),
    "qwen3-8b": Shape(151936, 4096, 12288, 36, 32, 8, 128, 40960),
    "qwen3-14b": Shape(151936, 5120, 17408, 40, 40, 8, 128, 40960),
}


def records() -> list[dict[str, Any]]:
    """The records of the shipped corpus."""
    lines = (ROOT / "corpus" / "psychology.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def make(folder: Path, name: str) -> None:
    """Write model and tokenizer of the shape `name` into `folder`, in bfloat16; made on the GPU where there is one."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = SHAPES[name]
    end, pad = _tokenizer(folder, shape.vocab_size)
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            network = Qwen3ForCausalLM(
                Qwen3Config(
                    **vars(shape), tie_word_embeddings=False, eos_token_id=end, pad_token_id=pad, bos_token_id=None
                )
            )
        with torch.no_grad():
            # The hidden state has been normed: each of its numbers is about 1.
            network.lm_head.weight.normal_(0, SPREAD / shape.hidden_size**0.5)
            network.lm_head.weight[end] = 0
        network.save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)


def _tokenizer(folder: Path, vocabulary: int) -> tuple[int, int]:
    """Train a byte-level tokenizer on what the bench's prompts hold; the ids of the end of a turn and of padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def split() -> Any:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split()
    trained.train_from_iterator(
        [*(path.read_text(encoding="utf-8") for path in sorted((ROOT / "prompts").glob("*.txt")))]
        + [f"{record['title']}\n{record['text']}" for record in records()],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # A small corpus gives fewer tokens than the shape has: the rest are words that no text is split into.
    model = json.loads(trained.to_str())["model"]
    tokens: dict[str, int] = model["vocab"]
    for number in range(len(tokens), vocabulary):
        tokens[f"Ġword{number}"] = number
    whole = Tokenizer(models.BPE(vocab=tokens, merges=[tuple(merge) for merge in model["merges"]]))
    whole.pre_tokenizer, whole.decoder = split(), decoders.ByteLevel()
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, additional_special_tokens=["<|im_start|>"], **ends)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
