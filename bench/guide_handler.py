"""The yardstick of bench/worker.py: a first worker, as one writes it from a guide. It is not part of any image.

transformers' `generate` with NF4 weights (double quantisation, bfloat16 arithmetic), one job at a time in a plain
function. MODEL_ID is a model's folder. What differs from such a script: QUANTIZATION=none loads the weights as our
worker does without quantisation, and the prompt comes from the same files as our worker's, so that both sides read the
same tokens; the number of new tokens is answered too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import runpod
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from common.prompts import Prompts, mark_of, render_sources

model_id = os.environ["MODEL_ID"]
options: dict[str, Any] = {}
if os.environ.get("QUANTIZATION") == "none":
    options["dtype"] = torch.bfloat16 if torch.cuda.is_available() else torch.float32
else:
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
prompts = Prompts(Path(os.environ["PROMPTS_DIR"]))
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, device_map="auto", **options)
model.eval()


def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one job; the next one waits."""
    data = job["input"]
    temperature = data.get("temperature", 0.3)
    question, sources, context = data.get("prompt", ""), data.get("sources", []), data.get("context", "")
    mark = mark_of(question, sources, context)
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": prompts.system},
            {"role": "user", "content": prompts.user_turn(question, context or render_sources(sources, mark), mark)},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = tokenizer([text], return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=data.get("max_new_tokens", 4096),
            do_sample=temperature > 0,
            temperature=temperature,
            top_p=0.9,
            repetition_penalty=1.1,
            pad_token_id=tokenizer.eos_token_id,
        )
    new = output[0, inputs["input_ids"].shape[1] :]
    return {
        "synthesis": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
    }


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
