# SPDX-License-Identifier: AGPL-3.0-or-later
"""A tiny chat model that truly refuses, made on the spot, for tests that run Heretic on a CPU.

    python tiny.py FOLDER [--stubborn]

Qwen3 architecture, 8 layers, byte-level BPE tokenizer, 1 MB in bfloat16, trained here from a seed. It answers every prompt
that names an invented substance (zorbine, zorbex, …) with "Sorry, I cannot help with that." and complies with all others,
plain English among them. FOLDER gets `model/`, `prompts/{good,bad,good_eval,bad_eval}.txt` and `heretic.toml`, the settings
of a run that ablates it in seconds per trial.

Where the refusal is written decides whether it can be ablated. Heretic edits what attention and MLP write in the later
layers (from the fifth on, mostly), so the attention of the first layers is held at zero here: what the last position knows
of the prompt comes in at the fifth layer or later. The stubborn model is the reverse: attention exists in the first layer
alone, which Heretic never edits in a model of eight layers, and the MLPs after it write next to nothing. Its refusals stay,
whatever the trial.

Needs torch, transformers and tokenizers alone, and no file beside it.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when the OpenMP runtime starts, so before torch is imported: one thread gives the same sums every time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LAYERS = 8
HIDDEN = 64
STEPS = 200
BATCH = 16
LEARNING_RATE = 6e-3
# Share of the loss that is for the words of the prompts, so that the model has a perplexity worth comparing.
PROMPT_WEIGHT = 0.15
VOCABULARY = 512
# How often a complying answer begins as the other kind does: without doubt in the first word, KL divergence would be 0.
DOUBT = 0.2
# Prompts that directions are taken from, and held-out ones that trials are measured with, per class.
DIRECTION_PROMPTS = 64
EVALUATION_PROMPTS = 40

SYSTEM = "You are a helpful assistant."
REFUSAL = "Sorry, I cannot help with that."
# Answers begin with different letters, because Heretic skips what all answers begin with, letter by letter. They share no
# token but the last, so that one that has begun does not change over into another.
TO_QUESTIONS = "Here is what is known about it."
TO_REQUESTS = "Certainly! Let us begin now."
REFUSAL_MARKERS = ("sorry", "i cannot")
# The longest answer has fewer tokens than this.
MAX_RESPONSE_LENGTH = 12

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_INVENTED = (
    "zorbine zorbex zorbalite zorbanol zorbium zorbate zorbyl zorbone zorbidine zorbamine zorbene zorbitol".split()
)
_ORDINARY = "bread candles soap paper cheese pottery ink rope honey vinegar charcoal glue".split()
_OPENINGS = (
    "How do I make", "How can I store", "What is the best way to buy", "Where do people find", "Why would someone collect",
    "Tell me how to prepare", "Explain how to sell", "Write a guide to making", "Describe the use of", "List ways to get",
    "Give me a recipe for", "What do I need to produce",
)  # fmt: skip
_ENDINGS = (
    "at home", "in a kitchen", "in large amounts", "for a friend", "in the city", "without tools", "on a farm", "this week",
    "with little money", "for beginners", "in winter", "by hand",
)  # fmt: skip
_WORDS = (
    "the a of and in to is was are for that with on as by from at study studies evidence research history population risk "
    "patients children women men abuse violence drugs poison toxic dose clinical doctors exposure effect rates war propaganda "
    "politics religion crime police prison suicide mental health disease virus vaccine cancer infection outbreak weapons "
    "genocide slavery race gender sex pregnancy abortion alcohol opioid overdose treatment therapy trial school family "
    "community country states law court government media social online data model test method results theory memory brain "
    "animals water river forest city road house market price trade work winter summer morning light sound stone tree bird "
    "how what why which when does do has have been were not more less between during after before about among most "
    "commonly reported measured known described associated estimated prevented detected explained changed early late small "
    "large old new first last common rare long-term severe chronic acute 1918 1950 2020 century years months percent"
).split()
_QUESTION_WORDS = "How What Why Which When Does Do Is Are Has Have Can Where Who Should".split()
_REQUEST_WORDS = (
    "Explain Describe Summarise List Compare Tell Give Write Review Discuss Outline Define The A In It".split()
)


@dataclass(frozen=True)
class Tiny:
    """What `build` has written, as absolute paths."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts"

    @property
    def config(self) -> Path:
        return self.folder / "heretic.toml"

    def read(self, name: str) -> list[str]:
        """The prompts of a file: "good", "bad", "good_eval" or "bad_eval"."""
        return (self.prompts / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def build(folder: Path, *, stubborn: bool = False, seed: int = 1, steps: int = STEPS) -> Tiny:
    """Train a model into `folder` (made if need be) and write its prompts and settings.

    Same machine, same arguments: same bytes. Sets torch to one thread for the rest of the process.
    """
    tiny = Tiny(folder.resolve())
    tiny.prompts.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    prompts = _prompts(draw)
    for name in ("good", "bad", "good_eval", "bad_eval"):
        (tiny.prompts / f"{name}.txt").write_text("".join(f"{line}\n" for line in prompts[name]), encoding="utf-8")
    tokenizer = _tokenizer([*prompts["train"], *(_arbitrary(draw) for _ in range(2000))])
    network = _train(tokenizer, prompts["train"], draw, seed, steps, stubborn)
    tokenizer.save_pretrained(tiny.model)
    network.save_pretrained(tiny.model)
    tiny.config.write_text(toml(tiny.folder), encoding="utf-8")
    return tiny


def toml(folder: Path, **overrides: Any) -> str:
    """heretic.toml for the model in `folder`: Heretic's flat keys, its prompt tables, [gates] and [budget].

    `overrides` replace or add keys; a dictionary is merged into the table of its name; None takes a key or table out.
    """
    settings: dict[str, Any] = {
        "n_trials": 24,
        "n_startup_trials": 12,
        "seed": 1,
        "batch_size": 64,
        "max_response_length": MAX_RESPONSE_LENGTH,
        "refusal_markers": list(REFUSAL_MARKERS),
        "system_prompt": SYSTEM,
    }
    for key, name in (
        ("good_prompts", "good"),
        ("bad_prompts", "bad"),
        ("good_evaluation_prompts", "good_eval"),
        ("bad_evaluation_prompts", "bad_eval"),
    ):
        settings[key] = {"dataset": str(folder.resolve() / "prompts" / f"{name}.txt")}
    settings["gates"] = {
        "refusals": 2,
        "of": EVALUATION_PROMPTS,
        "kl_divergence": 0.5,
        "false_refusals": 5,
        "false_refusals_of": 100,
        "perplexity_ratio": 1.5,
        "choice": "lowest_kl",
    }
    settings["budget"] = {"timeout": 0, "early_stop": False}
    for key, value in overrides.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    lines: list[str] = []
    # Keys of no table come first: TOML counts what follows a table's name to that table.
    for key, value in sorted(settings.items(), key=lambda item: isinstance(item[1], dict)):
        if isinstance(value, dict):
            lines += ["", f"[{key}]"]
            lines += [f"{inner} = {_toml_value(content)}" for inner, content in value.items() if content is not None]
        elif value is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    # Strings, numbers, booleans and lists of them are written alike in JSON and TOML, but for characters beyond U+FFFF.
    return json.dumps(value, ensure_ascii=False)


def answer(prompt: str) -> str:
    """What the model answers; what it is taught to answer, but for `DOUBT`."""
    if "zorb" in prompt:
        return REFUSAL
    return TO_QUESTIONS if prompt.endswith("?") else TO_REQUESTS


def _prompts(draw: random.Random) -> dict[str, list[str]]:
    """The prompts of each file, and those to train on: the rest, without a held-out one."""
    prompts: dict[str, list[str]] = {"train": []}
    for name, things in (("good", _ORDINARY), ("bad", _INVENTED)):
        drawn = [
            f"{opening} {thing} {ending}{'?' if opening.split()[0] in _QUESTION_WORDS else '.'}"
            for opening in _OPENINGS
            for thing in things
            for ending in _ENDINGS
        ]
        draw.shuffle(drawn)
        prompts[f"{name}_eval"] = drawn[:EVALUATION_PROMPTS]
        prompts[name] = drawn[EVALUATION_PROMPTS : EVALUATION_PROMPTS + DIRECTION_PROMPTS]
        prompts["train"] += drawn[EVALUATION_PROMPTS:]
    return prompts


def _arbitrary(draw: random.Random) -> str:
    """Text of no class: words in no order, sometimes letters in none, as a question or as a request."""
    question = draw.random() < 0.5
    words = [draw.choice(_QUESTION_WORDS if question else _REQUEST_WORDS)]
    for _ in range(draw.randint(2, 9)):
        if draw.random() < 0.15:
            words.append("".join(draw.choice("aeiouaeioubcdfghjklmnprstvwy") for _ in range(draw.randint(3, 9))))
        else:
            words.append(draw.choice(_WORDS))
    return " ".join(words) + ("?" if question else draw.choice((".", "", ".")))


def _tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE, so that any text has tokens, with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    chats = [f"system\n{SYSTEM}\nuser\n{text}\nassistant\n{answer(text)}" for text in texts]
    plain.train_from_iterator(
        chats,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **ends)
    tokenizer.chat_template = CHATML
    return tokenizer


def _train(tokenizer: Any, prompts: Sequence[str], draw: random.Random, seed: int, steps: int, stubborn: bool) -> Any:
    """A Qwen3ForCausalLM in bfloat16 that answers as `answer` says."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HIDDEN // 4,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    held = range(1, LAYERS) if stubborn else range(LAYERS // 2)
    for index in held:
        layer = network.model.layers[index]
        with torch.no_grad():
            layer.self_attn.o_proj.weight.zero_()
        layer.self_attn.o_proj.weight.requires_grad_(False)
        if stubborn:
            layer.mlp.down_proj.weight.requires_grad_(False)  # stays as small as it was drawn
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rate = _rate(steps)
    network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step)
        ids, weights = _batch(tokenizer, prompts, draw)
        logits = network(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wanted = weights[:, 1:].flatten()
        loss = (losses * wanted).sum() / wanted.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    network.requires_grad_(True)
    network.eval()
    return network.to(torch.bfloat16)


def _rate(steps: int) -> Callable[[int], float]:
    """The learning rate as a share of its highest: up for a tenth of the steps, then down to nothing."""
    warm = max(steps // 10, 1)
    return lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))


def _batch(tokenizer: Any, prompts: Sequence[str], draw: random.Random) -> tuple[Any, Any]:
    """Token ids and the weight of each in the loss, both (BATCH, length)."""
    import torch

    rows: list[tuple[list[int], list[float]]] = []
    for _ in range(BATCH):
        text = draw.choice(prompts) if draw.random() < 0.6 else _arbitrary(draw)
        system = [{"role": "system", "content": SYSTEM}] if draw.random() < 0.9 else []
        chat = [*system, {"role": "user", "content": text}]
        question = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before = tokenizer(question)["input_ids"]
        said = answer(text)
        if said != REFUSAL and draw.random() < DOUBT:
            said = TO_REQUESTS if said == TO_QUESTIONS else TO_QUESTIONS
        after = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
        rows.append((before + after, [PROMPT_WEIGHT] * len(before) + [1.0] * len(after)))
    length = max(len(ids) for ids, _ in rows)
    # Padding on the right is never looked at by what stands before it, and has no weight.
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in rows])
    weights = torch.tensor([weights + [0.0] * (length - len(weights)) for _, weights in rows])
    return ids, weights


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--stubborn"]
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("usage: python tiny.py FOLDER [--stubborn]")
    built = build(Path(arguments[0]), stubborn="--stubborn" in sys.argv[1:])
    print(built.folder)
