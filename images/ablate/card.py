# SPDX-License-Identifier: AGPL-3.0-or-later
"""The model card: README.md of a published model, from the report of its verification and the facts of its run.

Nothing in it is claimed that the report does not hold. Values that come from a base model's repository (its name,
licence, link) may hold anything: the YAML is dumped by a YAML library, and in the text they are made harmless.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import licences
from common.text import clean

PACKAGES = ("heretic-llm", "torch", "transformers", "optuna", "bitsandbytes", "safetensors")
Z95 = 1.959963984540054  # the normal distribution's two-sided 95 % point

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LINK = re.compile(r"https?://[\w.~:/?#@!$&*+,;=%-]+", re.ASCII)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#|!~$&])")


def render(report: Mapping[str, Any], run: Mapping[str, Any], form: str) -> str:
    """The text of README.md for one form ("bf16" or "nf4") of a run's model.

    `report` is report.json, `run` the facts of run.json: model, commit, licence {id, name, link, notice, files}, seed,
    quantization, trial {index, direction_index, parameters}, n_trials, complete_trials. Raises KeyError, or jinja2's
    UndefinedError, where one of them is missing: a card with a gap is not written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701 Markdown, not HTML; every value passes `text`, `name` or `figure`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    base, licence, trial = report["base"]["id"], run["licence"], run["trial"]
    found = report["forms"][form]
    link = str(licence["link"] or "")
    parameters = trial["parameters"]
    columns = list(dict.fromkeys(key for values in parameters.values() for key in values))
    page = environment.get_template("card.md.jinja").render(
        front_matter=_front_matter(base, licence, form),
        form=form,
        # A base model that lies in a folder has no name that others could use; its path stays out of the card.
        base=name(base) if _MODEL_ID.fullmatch(base) else name(Path(base).name),
        base_is_public_id=bool(_MODEL_ID.fullmatch(base)),
        base_commit=name(report["base"]["commit"] or ""),
        licence={
            "name": text(licence["name"] or licence["id"] or ""),
            "link": link if _LINK.fullmatch(link) else "",
            "notice": text(licence["notice"] or ""),
            "files": [name(file) for file in licence["files"]],
        },
        run=name(report["run"]),
        written=text(report["written"])[:10],
        heretic=text(report["heretic"]),
        seed="none" if run["seed"] is None else name(run["seed"]),
        quantization=run["quantization"],
        trial=figure(trial["index"]),
        n_trials=figure(run["n_trials"]),
        complete_trials=figure(run["complete_trials"]),
        direction="" if trial["direction_index"] is None else figure(trial["direction_index"]),
        columns=[text(column.replace("_", " ")) for column in columns],
        parameters=[
            [f"`{name(component)}`", *(figure(values.get(column)) for column in columns)]
            for component, values in parameters.items()
        ],
        measures=_measures(found),
        passed=found["passed"] is True and report["passed"] is True,
        reasons=[
            text(f"{verdict['gate']}: {verdict['reason']}") for verdict in found["verdicts"] if verdict.get("reason")
        ],
        packages=_packages(),
        held_in_4_bits=found.get("base_held_in") == "nf4",
    )
    return str(page)


def wilson(count: int, number: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share: (lowest, highest), both 0 to 1; (0, 1) where nothing was counted."""
    if number <= 0:
        return 0.0, 1.0
    share, square = count / number, Z95 * Z95
    middle = (share + square / (2 * number)) / (1 + square / number)
    half = Z95 / (1 + square / number) * math.sqrt(share * (1 - share) / number + square / (4 * number * number))
    # At the ends the interval touches 0 and 1 exactly; the sums above miss them by a rounding error.
    return (0.0 if count <= 0 else max(0.0, middle - half)), (1.0 if count >= number else min(1.0, middle + half))


def text(value: object) -> str:
    """A value as Markdown that shows exactly it, on one line."""
    return _MARKUP.sub(r"\\\1", " ".join(clean(str(value)).split()))


def name(value: object) -> str:
    """A value for inside of backticks or code: letters, digits and . _ / : @ + - only."""
    return re.sub(r"[^\w./:@+-]+", "-", str(value), flags=re.ASCII)[:200]


def figure(value: object) -> str:
    """A number with four significant digits; "–" where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _front_matter(base: str, licence: Mapping[str, Any], form: str) -> str:
    """The YAML block that the Hub reads."""
    import yaml

    facts: dict[str, Any] = {**licences.front_matter(licence["id"], licence["name"], licence["link"])}
    if _MODEL_ID.fullmatch(base):
        facts |= {"base_model": base, "base_model_relation": "quantized" if form == "nf4" else "finetune"}
    facts |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["directional-ablation", "research-synthesis", *(["bitsandbytes", "nf4"] if form == "nf4" else [])],
    }
    return str(yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=1000))


def _measures(found: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows: measure, before, after, n, gate, verdict."""
    gates = {_key(verdict["gate"]): verdict for verdict in found["verdicts"]}
    known = [
        (
            "refusals",
            "Refused of the harmful prompts",
            _share(found["base_refusals"], found["harmful_prompts"]),
            _share(found["refusals"], found["harmful_prompts"]),
            f"{figure(found['harmful_prompts'])} prompts",
        ),
        (
            "kl divergence",
            "KL divergence from the base, first token, harmless prompts (nats)",
            "0",
            figure(found["kl_divergence"]),
            f"{figure(found['harmless_prompts'])} prompts",
        ),
        (
            "false refusals",
            "Refused of the benign research questions",
            _share(found["base_false_refusals"], found["benign_questions"]),
            _share(found["false_refusals"], found["benign_questions"]),
            f"{figure(found['benign_questions'])} questions",
        ),
        (
            "perplexity ratio",
            "Perplexity on neutral text",
            figure(found["base_perplexity"]),
            f"{figure(found['perplexity'])} (× {figure(found['perplexity_ratio'])})",
            f"{figure(found['perplexity_tokens'])} tokens",
        ),
    ]
    rows = [
        [words, before, after, number, *_verdict(gates.pop(key, None))] for key, words, before, after, number in known
    ]
    # A gate that this table does not know is shown all the same.
    return rows + [
        [text(verdict["gate"]), "–", figure(verdict["measured"]), "–", *_verdict(verdict)] for verdict in gates.values()
    ]


def _verdict(verdict: Mapping[str, Any] | None) -> tuple[str, str]:
    if verdict is None:
        return "none", "not judged"
    return text(verdict["limit"]), "passed" if verdict["passed"] is True else "**missed**"


def _key(gate: str) -> str:
    return gate.replace("_", " ").casefold()


def _share(count: object, number: object) -> str:
    """ "3 (3.0 %; 1.0 to 8.5 %)": a count, its share, and the share's interval."""
    if (
        not isinstance(count, int)
        or not isinstance(number, int)
        or isinstance(count, bool)
        or not 0 <= count <= number
        or not number
    ):
        return "–"
    low, high = wilson(count, number)
    return f"{count} ({100 * count / number:.1f} %; {100 * low:.1f} to {100 * high:.1f} %)"


def _packages() -> Iterable[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
