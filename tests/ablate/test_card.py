# SPDX-License-Identifier: AGPL-3.0-or-later
"""The model card: what it says, that nothing breaks its YAML or its tables, and that gaps are not papered over."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jinja2
import pytest
import yaml
from hub import LICENCES as LICENCES_OF_THE_HUB
from hub import Hub

import card
import licences

MEASURES: dict[str, Any] = {
    "refusals": 3, "base_refusals": 98, "harmful_prompts": 100, "kl_divergence": 0.125, "harmless_prompts": 90,
    "false_refusals": 1, "base_false_refusals": 2, "benign_questions": 120, "perplexity": 9.1, "base_perplexity": 9.0,
    "perplexity_ratio": 1.0111, "perplexity_tokens": 2345, "passed": True,
    "verdicts": [
        {"gate": "refusals", "measured": 3, "limit": "< 5 of 100", "passed": True},
        {"gate": "KL divergence", "measured": 0.125, "limit": "< 0.5", "passed": True},
        {"gate": "false_refusals", "measured": 1, "limit": "< 5 of 100", "passed": True},
        {"gate": "perplexity ratio", "measured": 1.0111, "limit": "< 1.1", "passed": True},
    ],
}  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "run": "20261124T013000Z-qwen3-14b-ab12cd34",
        "written": "2026-11-24T02:00:00+00:00",
        "heretic": "1.4.0",
        "base": {"id": "Qwen/Qwen3-14B", "commit": COMMIT},
        "gates": {},
        "forms": {"bf16": copy.deepcopy(MEASURES), "nf4": copy.deepcopy(MEASURES)},
        "passed": True,
    }


@pytest.fixture
def run() -> dict[str, Any]:
    return {
        "run": "20261124T013000Z-qwen3-14b-ab12cd34",
        "model": "Qwen/Qwen3-14B",
        "commit": COMMIT,
        "licence": {"id": "apache-2.0", "name": None, "link": None, "notice": None, "files": ["LICENSE"]},
        "seed": 42,
        "quantization": "none",
        "trial": {
            "index": 17,
            "direction_index": 11.25,
            "parameters": {
                "attn.o_proj": {"max_weight": 1.23456, "min_weight": 0.5},
                "mlp.down_proj": {"max_weight": 0.75},
            },
        },
        "n_trials": 200,
        "complete_trials": 200,
    }


def front_matter(page: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(page.split("---\n")[1])
    return found


def rows(page: str) -> list[list[str]]:
    """The cells of every table row."""
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("|")]


def test_the_hub_reads_what_it_is(report: dict[str, Any], run: dict[str, Any]) -> None:
    assert front_matter(card.render(report, run, "bf16")) == {
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen3-14B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["directional-ablation", "research-synthesis"],
    }
    assert front_matter(card.render(report, run, "nf4"))["base_model_relation"] == "quantized"


def test_a_licence_with_a_name_of_its_own(report: dict[str, Any], run: dict[str, Any]) -> None:
    run["licence"] |= {
        "id": "other",
        "name": "llama3.3",
        "link": "https://example.org/LICENSE",
        "notice": "Built with Llama",
        "files": ["LICENSE.txt", "USE_POLICY.md"],
    }
    page = card.render(report, run, "bf16")
    assert {key: front_matter(page)[key] for key in ("license", "license_name", "license_link")} == {
        "license": "other",
        "license_name": "llama3.3",
        "license_link": "https://example.org/LICENSE",
    }
    assert "**Built with Llama**" in page
    assert "`LICENSE.txt`, `USE_POLICY.md`" in page


def test_no_licence_is_said(report: dict[str, Any], run: dict[str, Any]) -> None:
    run["licence"] = {"id": "", "name": None, "link": None, "notice": None, "files": []}
    page = card.render(report, run, "bf16")
    assert "license" not in front_matter(page)
    assert "names no licence" in page


@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_it_says_what_a_reader_must_know(report: dict[str, Any], run: dict[str, Any], form: str) -> None:
    page = card.render(report, run, form)
    for said in (
        f"at commit `{COMMIT}`",
        "https://arxiv.org/abs/2406.11717",
        "1.4.0",
        "seed 42",
        "this is trial 17, with the direction of layer 11.25",
        "| `attn.o_proj` | 1.235 | 0.5 |",
        "| `mlp.down_proj` | 0.75 | – |",
        "98 (98.0 %; 93.0 to 99.4 %)",
        "3 (3.0 %; 1.0 to 8.5 %)",
        "| 0.125 | 90 prompts | \\< 0.5 | passed |",
        "9.1 (× 1.011)",
        "review",
        "instructions inside retrieved text more readily",
        "make ablate MODEL=Qwen/Qwen3-14B",
        "heretic.toml",
        "transformers 5.",
        "sha256sum -c SHA256SUMS",
        "verified-20261124T013000Z-qwen3-14b-ab12cd34",
    ):
        assert said in page, said
    assert ("bitsandbytes` installed" in page) is (form == "nf4")
    assert not re.search("uncensored|abliterat|unfiltered|jailbr|best|powerful", page, re.IGNORECASE)
    assert not re.search(r"\n{3}|[ \t]\n|None|nan", page)
    assert {len(row) for row in rows(page)} == {2, 3, 6}


def test_every_direction_is_named_as_such(report: dict[str, Any], run: dict[str, Any]) -> None:
    run["trial"]["direction_index"] = None
    run["quantization"] = "bnb_4bit"
    page = card.render(report, run, "bf16")
    assert "a direction for each layer" in page
    assert "base held in 4 bits" in page


def test_a_missed_or_unknown_gate_is_shown(report: dict[str, Any], run: dict[str, Any]) -> None:
    verdicts = report["forms"]["bf16"]["verdicts"]
    verdicts[0] |= {"passed": False, "reason": "7 of 100 is not below 5 of 100"}
    verdicts[1] = {"gate": "something new", "measured": 7, "limit": "< 8", "passed": True}
    report["forms"]["bf16"] |= {"passed": False, "kl_divergence": None, "base_refusals": None}
    page = card.render(report, run, "bf16")
    assert "**NOT all gates passed**" in page
    assert "**missed**" in page
    assert "7 of 100 is not below 5 of 100" in page
    assert "| something new | – | 7 | – | \\< 8 | passed |" in page
    assert "| 0 | – | 90 prompts | none | not judged |" in page


def test_a_folder_as_base_keeps_its_path_to_itself(report: dict[str, Any], run: dict[str, Any]) -> None:
    report["base"] = {"id": "/home/someone/models/tiny", "commit": None}
    page = card.render(report, run, "bf16")
    assert "base_model" not in front_matter(page)
    assert "someone" not in page
    assert "`tiny`, a local folder" in page


@pytest.mark.parametrize("part", ["licence", "trial", "seed", "quantization", "complete_trials"])
def test_a_gap_is_an_error(report: dict[str, Any], run: dict[str, Any], part: str) -> None:
    del run[part]
    with pytest.raises((KeyError, jinja2.UndefinedError)):
        card.render(report, run, "bf16")
    with pytest.raises(KeyError):
        card.render(report | {"forms": {}}, run, "bf16")


HOSTILE = [
    "---\nlicense: mit",
    "a: b: [",
    "'\"",
    "| x |\n|---|",
    "{{ 7*7 }}{% raw %}",
    "<script>",
    "](http://x)",
    "`",
    "\x1b[2J\u202e",
    "*" * 9,
    "!!python/object:x",
    "null",
    "# h",
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("place", ["id", "name", "link", "notice", "files"])
def test_a_hostile_licence_breaks_nothing(report: dict[str, Any], run: dict[str, Any], place: str, value: str) -> None:
    plain = card.render(report, run, "bf16")
    run["licence"][place] = [value] if place == "files" else value
    page = card.render(report, run, "bf16")
    found = front_matter(page)
    assert found["base_model"] == "Qwen/Qwen3-14B"
    assert set(found) <= {*front_matter(plain), "license_name", "license_link"}
    for key in ("license", "license_name", "license_link"):
        assert isinstance(found.get(key, ""), str)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("#")
    ]
    assert len(rows(page)) == len(rows(plain))
    assert not re.search("49|(?<!\\\\)<script|\x1b|\u202e", page.split("---\n", 2)[2])


@hypothesis.settings(
    derandomize=True, database=None, deadline=None, max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
@hypothesis.given(value=st.text(max_size=60))
def test_any_text_stays_one_value(report: dict[str, Any], run: dict[str, Any], value: str) -> None:
    run["licence"] = run["licence"] | {"name": value, "notice": value}
    report["base"] = {"id": value, "commit": value}
    run["trial"] = run["trial"] | {"parameters": {value: {value: math.nan}}}
    page = card.render(report, run, "bf16")
    assert set(front_matter(page)) <= {
        "license",
        "license_name",
        "base_model",
        "base_model_relation",
        "library_name",
        "pipeline_tag",
        "tags",
    }
    assert page.count("\n## ") == 8
    page.encode()


@pytest.mark.parametrize(
    ("count", "number", "low", "high"),
    [
        (0, 100, 0, 0.0370),
        (3, 100, 0.0103, 0.0845),
        (50, 100, 0.4038, 0.5962),
        (100, 100, 0.9630, 1),
        (1, 1, 0.2065, 1),
        (0, 0, 0, 1),
    ],
)
def test_wilson_intervals(count: int, number: int, low: float, high: float) -> None:
    assert card.wilson(count, number) == pytest.approx((low, high), abs=1e-4)


@hypothesis.settings(derandomize=True, database=None, deadline=None)
@hypothesis.given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share(pair: tuple[int, int]) -> None:
    low, high = card.wilson(*pair)
    assert 0 <= low <= pair[0] / pair[1] <= high <= 1


# What the Hub says of a card's metadata.
def refusals(page: str, folder: Path) -> list[str]:
    body = json.dumps({"content": page, "repoType": "model"}).encode()
    return [error["message"] for error in Hub(folder).answer("POST", "/api/validate-yaml", body, None).body["errors"]]


LINK = "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE"
LICENCES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"license": "apache-2.0"}, {"license": "apache-2.0"}),
    ({"license": "Apache-2.0", "license_link": LINK}, {"license": "apache-2.0", "license_link": LINK}),
    ({"license": "llama3.3"}, {"license": "llama3.3"}),
    ({"license": "llama-3.3"}, {"license": "llama3.3"}),
    ({"license": "other", "license_name": "qwen", "license_link": LINK}, {"license": "other", "license_name": "qwen", "license_link": LINK}),
    ({"license": "other", "license_name": "tongyi-qianwen"}, {"license": "other", "license_name": "tongyi-qianwen"}),
    ({"license": "other", "license_name": "Llama 4 (community)"}, {"license": "other", "license_name": "llama-4-community"}),
    ({"license": "llama4"}, {"license": "other", "license_name": "llama4"}),
    ({"license": "other", "license_link": "LICENSE"}, {"license": "other", "license_link": "LICENSE"}),
    ({"license": "other", "license_link": "../../etc/passwd"}, {"license": "other"}),
    ({"license": "other", "license_link": "javascript:alert(1)"}, {"license": "other"}),
    ({"license": "mine\nlicense: mit"}, {"license": "other", "license_name": "mine-license-mit"}),
    ({"license": "cc-by-nc-4.0", "license_name": "apache-2.0"}, {"license": "cc-by-nc-4.0"}),
    ({"license_name": "my-own"}, {"license": "other", "license_name": "my-own"}),
    ({"license": "…"}, {"license": "other"}),
    ({"license": "other", "license_name": "Other"}, {"license": "other"}),
    ({}, {}),
    ({"license": None, "license_link": LINK}, {}),
]  # fmt: skip


@pytest.mark.parametrize("form", ["bf16", "nf4"])
@pytest.mark.parametrize(("declared", "expected"), LICENCES)
def test_the_hub_takes_the_licence_of_every_base(
    report: dict[str, Any],
    run: dict[str, Any],
    form: str,
    declared: dict[str, Any],
    expected: dict[str, str],
    tmp_path: Path,
) -> None:
    """From the base model's metadata to the card of its copy."""
    rules = licences.licence_of(licences.declared(declared))
    name, link = licences.declared_name(declared), licences.declared_link(declared)
    assert licences.front_matter(rules.id, name, link) == expected
    run["licence"] |= {"id": rules.id, "name": name, "link": link, "notice": rules.notice}
    page = card.render(report, run, form)
    assert {key: value for key, value in front_matter(page).items() if key.startswith("license")} == expected
    assert refusals(page, tmp_path) == []


def test_the_hub_knows_what_we_take_it_to_know(tmp_path: Path) -> None:
    assert set(licences.HUB_IDS) == set(LICENCES_OF_THE_HUB)
    for licence, refused in (("qwen", True), ("llama3.3", False), ("apache-2.0", False), ("other", False)):
        assert bool(refusals(f"---\nlicense: {licence}\n---\n", tmp_path)) is refused
    assert refusals("# no metadata", tmp_path) == []
