"""config/models.yaml as the operations image reads it: what is shipped, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import models
from common.problems import Problem

SHIPPED = Path(__file__).parents[2] / "config" / "models.yaml"
SERVING = (
    "{pools: [ADA_24, AMPERE_48], vram_gb: 13, seconds: {low: 1, expected: 2, high: 3},"
    " cold_start_seconds: {low: 0, expected: 1, high: 1}}"
)
GOOD = (
    "{card: A100 80GB, vram_bf16_gb: 40, vram_bnb_4bit_gb: 20, hours: 2, usd_per_hour: 2.5, serving: " + SERVING + "}"
)
# Parameters, those of linear layers, and the bytes of keys and values for a token in bfloat16 (2 x layers x 8 heads of
# 128 numbers x 2 bytes), of the shipped models' architectures.
SHAPES = {
    "qwen/qwen3-14b": (14_768_307_200, 13_212_057_600, 2 * 40 * 8 * 128 * 2),
    "qwen/qwen3-32b": (32_762_123_264, 31_205_621_760, 2 * 64 * 8 * 128 * 2),
    "meta-llama/llama-3.3-70b-instruct": (70_553_706_496, 68_451_041_280, 2 * 80 * 8 * 128 * 2),
}


def load(tmp_path: Path, text: str) -> dict[str, models.Model]:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    return models.load(path)


@pytest.mark.parametrize("name", SHAPES)
def test_serving_memory_is_what_the_worker_asks_for(name: str) -> None:
    """Weights in NF4, one job of 8192 tokens, 1.5 GB: as in images/worker/fitness.py."""
    parameters, linear, per_token = SHAPES[name]
    needed = 0.516 * linear + 2 * (parameters - linear) + 8192 * per_token + 1.5e9
    assert models.load(SHIPPED)[name].serving.vram_gb == pytest.approx(needed / 1e9, abs=0.5)


def test_the_shipped_pools_hold_the_models() -> None:
    shipped = models.load(SHIPPED)
    assert set(shipped) == set(SHAPES)
    for model in shipped.values():
        for pool in model.serving.pools:
            # The number in a pool's id is the memory of its smallest card, in binary gigabytes.
            assert int(pool.split("_")[1]) * 1.0737 > model.serving.vram_gb, (model.id, pool)
    assert [model.serving.seconds.expected for model in shipped.values()] == [120, 180, 360]  # the guide's


def test_a_good_file(tmp_path: Path) -> None:
    found = load(tmp_path, f"A/b: {GOOD}")["a/b"]
    assert (found.id, found.hours, found.serving.pools) == ("A/b", 2, ("ADA_24", "AMPERE_48"))
    assert found.serving.seconds == models.Range(1, 2, 3)


def test_config_dir_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.yaml").write_text(f"Some/Model: {GOOD}")
    monkeypatch.setenv("CONFIG_DIR", str(tmp_path))
    assert list(models.load()) == ["some/model"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "one block per model"),
        ("- a", "one block per model"),
        ("a: [", "not YAML"),
        (f"Qwen3: {GOOD}", ":1: 'Qwen3' is not a model id"),
        (f"yes: {GOOD}", ":1: the key 'yes' must be text"),
        (f"a/b: {GOOD}\nA/B: {GOOD}", ":2: A/B stands there twice"),
        ("a/b: 3", ":1: a/b must hold the keys"),
        (f"a/b: {GOOD[:-1]}, colour: red}}", "a/b: unknown key colour"),
        ("a/b:\n  card: A100 80GB\n  hours: 1\n", "missing key vram_bf16_gb"),
        (f"a/b: {GOOD.replace('A100 80GB', '7')}", "a/b: card must be a name"),
        (f"a/b: {GOOD.replace('hours: 2', 'hours: yes')}", "a/b: hours must be a number, not True"),
        (f"a/b: {GOOD.replace('hours: 2', 'hours: .nan')}", "a/b: hours must be between"),
        (f"a/b: {GOOD.replace(SERVING, '3')}", "a/b: serving must hold the keys pools"),
        (f"a/b: {GOOD.replace('vram_gb: 13, ', '')}", "a/b: serving: missing key vram_gb"),
        (f"a/b: {GOOD.replace('vram_gb: 13', 'vram_gb: big')}", "a/b: serving.vram_gb must be a number, not 'big'"),
        (f"a/b: {GOOD.replace('[ADA_24, AMPERE_48]', '[A_1, A_2, A_3, A_4]')}", "serving.pools must list one to 3"),
        (f"a/b: {GOOD.replace('[ADA_24, AMPERE_48]', '[]')}", "serving.pools must list one to 3"),
        (f"a/b: {GOOD.replace('[ADA_24, AMPERE_48]', '[ADA_24, ADA_24]')}", "different pool ids"),
        (f"a/b: {GOOD.replace('[ADA_24, AMPERE_48]', '[NVIDIA L4]')}", "pool ids like ADA_24"),
        (f"a/b: {GOOD.replace('[ADA_24, AMPERE_48]', 'ADA_24')}", "serving.pools must list"),
        (f"a/b: {GOOD.replace('low: 1, ', '')}", "a/b: serving.seconds: missing key low"),
        (
            f"a/b: {GOOD.replace('low: 1', 'low: 4')}",
            "serving.seconds must have low, expected and high in rising order",
        ),
        (f"a/b: {GOOD.replace('low: 1', 'low: 0')}", "serving.seconds.low must be between"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(Problem, match=re.escape(words)) as caught:
        load(tmp_path, text)
    assert "models.yaml" in str(caught.value)
    assert caught.value.code == 2


def test_the_line_is_named(tmp_path: Path) -> None:
    text = SHIPPED.read_text().replace("vram_gb: 23", "vram_gb: -1")
    line = text[: text.index("vram_gb: -1")].count("\n") + 1
    with pytest.raises(Problem, match=rf"models\.yaml:{line}: Qwen/Qwen3-32B: serving\.vram_gb"):
        load(tmp_path, text)


def test_named() -> None:
    shipped = models.load(SHIPPED)
    assert [model.id for model in models.named(shipped, "qwen/QWEN3-14b")] == ["Qwen/Qwen3-14B"]
    assert len(models.named(shipped, "")) == len(shipped)
    with pytest.raises(Problem, match=r"MODEL=nobody/x is not in config/models\.yaml; known are Qwen/Qwen3-14B"):
        models.named(shipped, "nobody/\x1b[31mx")


def test_its_comments_explain_every_key() -> None:
    text = SHIPPED.read_text()
    assert all(f"#   {key} " in text for key in models.Serving.__dataclass_fields__)
