# SPDX-License-Identifier: AGPL-3.0-or-later
"""config/models.yaml: what is shipped, what its loader refuses, and the formula for models that are not in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import known_models
from common.problems import Problem

SHIPPED = Path(__file__).parents[2] / "config" / "models.yaml"
GOOD = "{card: A100 80GB, vram_bf16_gb: 40, vram_bnb_4bit_gb: 20, hours: 2, usd_per_hour: 2.5, serving: {}}"
# Parameters, and those of linear layers, of the shipped models' architectures.
SIZES = {
    "qwen/qwen3-14b": (14_768_307_200, 13_212_057_600),
    "qwen/qwen3-32b": (32_762_123_264, 31_205_621_760),
    "meta-llama/llama-3.3-70b-instruct": (70_553_706_496, 68_451_041_280),
}


def load(tmp_path: Path, text: str | bytes) -> dict[str, known_models.KnownModel]:
    path = tmp_path / "models.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return known_models.load(path)


def test_the_shipped_file() -> None:
    shipped = known_models.load(SHIPPED)
    assert set(shipped) == set(SIZES)
    # Hours times price is what the guide names as the cost.
    assert [round(model.usd, 1) for model in shipped.values()] == [2.5, 7.5, 30.0]
    for model in shipped.values():
        # The card that is named holds the model, by memory sold in binary gigabytes.
        count, size = re.fullmatch(r"(?:(\d)x )?A100 (\d+)GB", model.card).groups()  # type: ignore[union-attr]
        assert model.vram_bf16_gb < int(count or 1) * int(size) * 1.0737 - 3


def test_its_comments_explain_every_key() -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    assert all(f"# {key} " in text for key in [*known_models.KnownModel.__dataclass_fields__, "serving"])


@pytest.mark.parametrize("model", SIZES)
def test_the_formula_agrees_with_the_shipped_figures(model: str) -> None:
    parameters, linear = SIZES[model]
    known = known_models.load(SHIPPED)[model]
    assert known_models.vram_bf16(2 * parameters) == pytest.approx(known.vram_bf16_gb * 1e9, abs=1.2e9)
    nf4 = known_models.nf4_bytes(parameters, linear)
    assert known_models.vram_bnb_4bit(2 * parameters, nf4) == pytest.approx(known.vram_bnb_4bit_gb * 1e9, abs=1e9)


def test_4bit_size_is_that_of_a_real_layer() -> None:
    """What bitsandbytes itself makes of a linear layer, constants included."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    weights = torch.randn(256, 4096, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    size = packed.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert known_models.nf4_bytes(weights.numel(), weights.numel()) == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "one block per model"),
        ("- a\n- b\n", "one block per model"),
        ("a: [", "not YAML"),
        (b"\xff\xfe\x00a", "not YAML"),
        ("d: 2026-13-45", "not YAML"),
        (f"Qwen3-14B: {GOOD}", "not a model id"),
        (f"yes: {GOOD}", "True is not a model id"),
        (f"1e3: {GOOD}", "not a model id"),
        (f"a/b: {GOOD}\na/b: {GOOD}", "twice"),
        (f"a/b: {GOOD}\nA/B: {GOOD}", "twice"),
        (f"a/b: {GOOD[:-1]}, hours: 3}}", "'hours' stands twice"),
        ("a/b:", "a/b must hold the keys"),
        ("a/b: 3", "a/b must hold the keys"),
        (f"a/b: {GOOD[:-1]}, vram: 3}}", "a/b: unknown key vram"),
        ("a/b: {card: x, hours: 2}", "a/b: missing key vram_bf16_gb, vram_bnb_4bit_gb, usd_per_hour, serving"),
        (f"a/b: {GOOD.replace('serving: {}', 'serving: 3')}", "serving must hold keys and values, not 3"),
        (f"a/b: {GOOD.replace('{}', '{seconds: 1:30}')}", "'1:30' is no plain number"),  # what other stages read, too
        (f"a/b: {GOOD.replace('A100 80GB', '80')}", "card must be a name"),
        (f"a/b: {GOOD.replace('A100 80GB', chr(34) + ' ' + chr(34))}", "card must be a name"),
        (f"a/b: {GOOD.replace('hours: 2', 'hours: yes')}", "hours must be a number, not True"),
        (f"a/b: {GOOD.replace('hours: 2', 'hours: 1:30')}", "'1:30' is no plain number"),  # 90 to YAML 1.1
        (f"a/b: {GOOD.replace('hours: 2', 'hours: 010')}", "'010' is no plain number"),
        (f"a/b: {GOOD.replace('hours: 2', 'hours: .nan')}", "hours must be between"),
        (f"a/b: {GOOD.replace('hours: 2', 'hours: .inf')}", "hours must be between"),
        (f"a/b: {GOOD.replace('hours: 2', 'hours: 0')}", "hours must be between"),
        (f"a/b: {GOOD.replace('hours: 2', 'hours: 1e3')}", "hours must be a number, not '1e3'"),
        (f"a/b: {GOOD.replace('2.5', '-1')}", "usd_per_hour must be between"),
        (f"a/b: {GOOD.replace('2.5', 'null')}", "usd_per_hour must be a number, not None"),
        (f"a/b: {GOOD.replace('gb: 20', 'gb: 41')}", "must not be above"),
        ("a/b: &a [*a]", "a/b must hold"),
        ("? [a, b]\n: 1", "not YAML"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(Problem, match=re.escape(words)) as caught:
        load(tmp_path, text)
    assert "models.yaml" in str(caught.value)
    assert caught.value.code == 2


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="git checkout"):
        known_models.load(tmp_path / "models.yaml")
    (tmp_path / "models.yaml").mkdir()
    with pytest.raises(Problem, match="cannot be read"):
        known_models.load(tmp_path / "models.yaml")


def test_config_dir_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.yaml").write_text(f"Some/Model: {GOOD}")
    monkeypatch.setenv("CONFIG_DIR", str(tmp_path))
    assert known_models.load()["some/model"].usd == 5
    assert yaml.safe_load(SHIPPED.read_text())  # plain YAML to other readers too


@pytest.mark.parametrize(
    ("vram", "card"),
    [(1e9, "RTX 4090 24GB"), (38e9, "A40 or L40S 48GB"), (79e9, "A100 80GB"), (164e9, "2x A100 80GB"), (9e12, "more than eight H200")],
)  # fmt: skip
def test_the_card_to_rent(vram: float, card: str) -> None:
    assert known_models.card_for(int(vram)) == card
