# SPDX-License-Identifier: AGPL-3.0-or-later
"""Measures a saved model against its base: `python -m verify BASE ABLATED [--form bf16|nf4] --config TOML --report JSON`.

The model is read back from its files, in this process, which has done nothing else. Heretic's own evaluation of one model
relative to another runs, unmodified, and what it counts is kept; while it holds each of the two models, false refusals and
perplexity are measured as well. Nothing may be asked. The report of the form is written whole or not at all.

Exit codes: 0 all gates passed, 3 a gate was missed, 4 it could not be measured, 12 memory ran out, 2 bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import fetch
import launcher
import measures
import prompt_sets
import settings as configuration
from common.files import to_json, write_atomic
from common.problems import FLAGGED, OK, UNCHECKED, Problem, run
from common.text import clean
from gates import Gates
from lifeline import die_with_the_driver

OUT_OF_MEMORY = 12  # as errno's ENOMEM; the driver tries again with a smaller batch
FORMS = ("bf16", "nf4")


# --- measuring ---------------------------------------------------------------------------------------------------------


class _Silent(launcher.Policy):
    """Answers nothing: an evaluation has nothing to ask."""

    def __init__(self) -> None:
        pass

    def answer(self, kind: str, message: str, choices: list[Any]) -> Any:
        raise launcher.UnknownQuestion(f"Heretic asks ({kind}): {message}")


class _Taken:
    """What has been measured so far, and what is being done now."""

    def __init__(self) -> None:
        self.now = "loading the base model"
        self.figures: dict[str, Any] = {}
        self.complete = False


def _evaluator(taken: _Taken, questions: list[str], text: str) -> type:
    """Heretic's evaluator, which also keeps what it finds and measures what it does not look at."""
    import heretic.main
    from heretic.utils import Prompt

    class Measuring(heretic.main.Evaluator):  # type: ignore[misc] # heretic has no types here
        def __init__(self, settings: Any, model: Any) -> None:
            taken.now = "loading the base model"
            launcher.check_fits(model.model)
            taken.now = "measuring the base model"
            self.judged = 0
            super().__init__(settings, model)
            figures = taken.figures
            figures["base_refusals"] = self.base_refusals if self.judged == len(self.bad_prompts) else None
            figures["base_false_refusals"] = sum(refused for _, refused in self.ask(questions))
            figures["base_perplexity"], _ = measures.perplexity(model.model, model.tokenizer, text)
            taken.now = "loading the ablated model"

        def is_refusal(self, response: str) -> bool:
            self.judged += 1
            return bool(super().is_refusal(response))

        def get_score(self) -> Any:
            launcher.check_fits(self.model.model)
            taken.now = "measuring the ablated model"
            self.judged = 0
            score = super().get_score()
            figures = taken.figures
            _, figures["kl_divergence"], figures["refusals"] = score
            figures["harmful_prompts"] = self.judged  # answers, not prompts
            figures["harmless_prompts"] = len(self.good_prompts)
            judged = self.ask(questions)
            figures["benign_questions"] = len(judged)
            figures["false_refusal_questions"] = [question for question, refused in judged if refused]
            figures["false_refusals"] = len(figures["false_refusal_questions"])
            figures["perplexity"], figures["perplexity_tokens"] = measures.perplexity(
                self.model.model, self.model.tokenizer, text
            )
            taken.complete = True
            return score

        def ask(self, questions: list[str]) -> list[tuple[str, bool]]:
            """Each question that got an answer, and whether that is a refusal."""
            prompts = [Prompt(system=self.settings.system_prompt, user=question) for question in questions]
            answers = self.model.get_responses_batched(prompts, skip_special_tokens=True)
            # What all answers begin with is put before them by Heretic, and is a part of them.
            begin = self.settings.response_prefix or ""
            pairs = zip(questions, answers, strict=False)  # fewer answers than questions miss the gate
            return [(question, measures.is_false_refusal(begin + answer)) for question, answer in pairs]

    return Measuring


def measure(base: Path, ablated: Path, heretic: Mapping[str, Any], questions: list[str], text: str) -> dict[str, Any]:
    """The figures of a report's form, by Heretic's evaluation of `ablated` relative to `base`.

    `heretic` are Heretic's settings. Takes this process over: stdin, questionary, the command line and the folder; for a
    process that does nothing else. Raises Problem: UNCHECKED, or OUT_OF_MEMORY.
    """
    import tomli_w

    begun = time.monotonic()
    taken = _Taken()
    launcher.answer_questions(_Silent())
    with tempfile.TemporaryDirectory(prefix="verify-") as name:
        work = Path(name)
        for link, target in (("base", base), ("ablated", ablated)):
            (work / link).symlink_to(target.resolve(), target_is_directory=True)
        # The two names differ even where the folders do not: Heretic keeps the model that it has under the same name.
        config = {
            **prompt_sets.absolute(dict(heretic)),
            "model": str(work / "base"),
            "evaluate_model": str(work / "ablated"),
            "study_checkpoint_dir": str(work / "checkpoint"),
        }
        (work / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        with contextlib.chdir(work), contextlib.redirect_stdout(_Cleaned(sys.stderr)):
            _evaluate(taken, questions, text)
    figures = taken.figures
    if not taken.complete:
        raise Problem(f"Heretic ended while {taken.now}, without a word why; its lines above may tell", UNCHECKED)
    after, before = measures.finite(figures["perplexity"]), measures.finite(figures["base_perplexity"])
    figures["perplexity_ratio"] = after / before if after and before else None
    figures["seconds"] = round(time.monotonic() - begun, 1)
    return figures


def _evaluate(taken: _Taken, questions: list[str], text: str) -> None:
    from architecture import import_heretic_model

    import_heretic_model()
    import heretic.main

    sys.argv = ["heretic"]  # Heretic reads the command line; config.toml says all
    for key in [key for key in os.environ if key.startswith(("HERETIC_", "COLAB_", "KAGGLE_"))]:
        del os.environ[key]
    # Heretic collects garbage after each batch; what has been imported until now is none, and takes long to look through.
    gc.freeze()
    heretic.main.Evaluator = _evaluator(taken, questions, text)
    caught = launcher.record_caught_errors(lambda: taken.now)
    try:
        heretic.main.run()
    except launcher.UnknownQuestion as question:
        raise Problem(
            f"something was asked while {taken.now}, and nobody is there to answer: {question}", UNCHECKED
        ) from None
    except Exception as error:
        # Heretic tries several data types to load the base: what arrives then says only that none would do.
        problem = failure(taken.now, [error, *(other for at, other in caught if at == taken.now)])
        if problem.code != OUT_OF_MEMORY:
            traceback.print_exc(file=_Cleaned(sys.stderr))
        raise problem from error


def failure(doing: str, errors: Sequence[Exception]) -> Problem:
    """What a person is told when measuring failed with `errors`, of which the last one is nearest to the cause."""
    if any(launcher.is_out_of_memory(error) for error in errors):
        return Problem(f"out of memory while {doing}; try a smaller batch_size, or rent a larger card", OUT_OF_MEMORY)
    said = " ".join(f"{type(errors[-1]).__name__}: {errors[-1]}".split())
    return Problem(f"{doing} failed, so nothing is verified: {said:.500}", UNCHECKED)


class _Cleaned(io.TextIOBase):
    """What Heretic prints, to a terminal that must not obey what a model or a file has put into it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.write(clean(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


# --- what is compared --------------------------------------------------------------------------------------------------


def check_form(folder: Path, form: str) -> None:
    """Raise Problem unless the weights in `folder` are saved as `form` says."""
    config = fetch.read_json(folder / "config.json").get("quantization_config")
    if form == "bf16" and config:
        raise Problem(f"{folder} holds quantised weights; verify it with --form nf4")
    if form == "nf4" and not (
        isinstance(config, dict) and config.get("load_in_4bit") is True and config.get("bnb_4bit_quant_type") == "nf4"
    ):
        raise Problem(f"{folder} does not hold NF4 weights of bitsandbytes; verify it with --form bf16")


def check_tokenizers(base: Path, ablated: Path) -> None:
    """Raise Problem unless the tokenizer saved with the ablated model does what the base's does.

    Heretic measures both models with the base's; whoever loads the saved model uses the saved one.
    """
    from transformers import AutoTokenizer

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+1? Ökologie, 北京!"}]
    text = measures.shipped("neutral.txt")[:2000]
    seen: list[tuple[Any, ...]] = []
    for folder in (base, ablated):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            seen.append((tokenizer(text)["input_ids"], chat, tokenizer(chat)["input_ids"], tokenizer.eos_token_id))
        except Exception as error:  # of many kinds: files, JSON, jinja
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise Problem(
                f"the tokenizer in {folder} cannot be used, so nothing is verified: {said:.500}", UNCHECKED
            ) from error
    if seen[0] != seen[1]:
        raise Problem(
            f"the tokenizer or chat template saved in {ablated} is not the base model's, so what is measured here would not "
            "be what is loaded later; save the base's tokenizer with the model",
            UNCHECKED,
        )


# --- reports -----------------------------------------------------------------------------------------------------------

FIGURES = (
    "refusals", "base_refusals", "harmful_prompts", "kl_divergence", "harmless_prompts", "false_refusals",
    "base_false_refusals", "benign_questions", "false_refusal_questions", "perplexity", "base_perplexity",
    "perplexity_ratio", "perplexity_tokens", "seconds",
)  # fmt: skip


def part(figures: Mapping[str, Any], gates: Gates) -> dict[str, Any]:
    """A report's entry for one form: the figures (null where one is not a finite number), verdicts, and `passed`."""
    found = measures.verdicts(figures, gates)
    return {
        **{key: _safe(figures.get(key)) for key in FIGURES},
        "verdicts": found,
        "passed": all(verdict["passed"] for verdict in found),
    }


def _safe(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def assemble(run: Mapping[str, Any], forms: Mapping[str, dict[str, Any]], gates: Gates) -> dict[str, Any]:
    """The whole report. `run` has "run" (its name), "base" and "ablated" ({"id", "commit"}, or None for the latter);
    `forms` holds a `part` for each form. It has passed only if there is a form and all have passed."""
    return {
        "run": run["run"],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "heretic": version("heretic-llm"),
        "base": run["base"],
        "ablated": run.get("ablated"),
        "gates": asdict(gates),
        "forms": dict(forms),
        "passed": bool(forms) and all(form.get("passed") is True for form in forms.values()),
    }


def render(report: Mapping[str, Any]) -> str:
    """A report's forms as a table for a terminal: form, gate, before, after, limit, verdict; then why gates were missed."""
    rows = [("form", "gate", "before", "after", "limit", "verdict")]
    notes = []
    for name, form in report["forms"].items():
        shown = {
            "refusals": (_of(form, "base_refusals", "harmful_prompts"), _of(form, "refusals", "harmful_prompts")),
            "KL divergence": ("", _figure(form.get("kl_divergence"))),
            "false refusals": (
                _of(form, "base_false_refusals", "benign_questions"),
                _of(form, "false_refusals", "benign_questions"),
            ),
            "perplexity ratio": (
                _figure(form.get("base_perplexity")),
                f"{_figure(form.get('perplexity'))} ({_figure(form.get('perplexity_ratio'))} ×)",
            ),
        }
        for verdict in form["verdicts"]:
            before, after = shown.get(verdict["gate"], ("", _figure(verdict["measured"])))
            word = "passed" if verdict["passed"] else "MISSED"
            rows.append((name, verdict["gate"], before, after, verdict["limit"], word))
            if not verdict["passed"]:
                notes.append(f"{name}: {verdict['gate']}: {verdict.get('reason', 'no reason given')}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    verdict = "verified: every gate passed" if report["passed"] else "NOT verified"
    return clean("\n".join([*table, "", *notes, verdict]))


def _of(form: Mapping[str, Any], key: str, number_key: str) -> str:
    count, number = form.get(key), form.get(number_key)
    return f"{'?' if count is None else count} of {'?' if number is None else number}"


def _figure(value: object) -> str:
    number = measures.finite(value)
    return "not a number" if number is None else f"{number:.4g}"


def main() -> int:
    """The command line: see the module. Raises Problem."""
    parser = argparse.ArgumentParser(prog="verify", description="Measure a saved model against its base.")
    parser.add_argument("base", metavar="BASE", help="folder or Hub id (id@revision) of the base model")
    parser.add_argument("ablated", metavar="ABLATED", help="folder or Hub id (id@revision) of the ablated model")
    parser.add_argument("--form", choices=FORMS, default="bf16", help="how its weights are saved")
    parser.add_argument("--config", type=Path, required=True, metavar="TOML", help="Heretic's settings and [gates]")
    parser.add_argument("--report", type=Path, required=True, metavar="JSON", help="where the figures are written")
    arguments = parser.parse_args()
    report: Path = arguments.report.absolute()
    report.unlink(missing_ok=True)  # no older report may pass for this one's
    die_with_the_driver()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    settings = configuration.load(arguments.config)
    base, _, _ = fetch.resolve(arguments.base)
    ablated, _, _ = fetch.resolve(arguments.ablated)
    check_form(ablated, arguments.form)
    check_tokenizers(base, ablated)
    questions, text = measures.questions(measures.shipped("benign.txt")), measures.shipped("neutral.txt")
    found = part(measure(base, ablated, settings.heretic, questions, text), settings.gates)
    write_atomic(report, to_json(found))
    print(render({"forms": {arguments.form: found}, "passed": found["passed"]}))
    return OK if found["passed"] else FLAGGED


if __name__ == "__main__":
    run(main)
