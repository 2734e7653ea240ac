# SPDX-License-Identifier: AGPL-3.0-or-later
"""config/heretic.toml: the one that is shipped says what it means, and whatever is wrong in one is named."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny as tiny_module

import settings
from common.problems import BAD_INPUT, Problem
from gates import Gates

SHIPPED = Path(__file__).resolve().parents[2] / "config" / "heretic.toml"
# What the file's comments say is not Heretic's default, and why it is not.
DIFFERENT = {"batch_size": 100, "seed": 1}


@pytest.fixture
def heretic() -> dict[str, Any]:
    """Heretic's own defaults, by key."""
    from heretic.config import Settings

    return {name: field.get_default() for name, field in Settings.model_fields.items()}


def write(folder: Path, text: str) -> Path:
    path = folder / "heretic.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_file_is_heretics_defaults_but_for_what_its_comments_say(heretic: dict[str, Any]) -> None:
    found = settings.load(SHIPPED)
    assert found.notes == ()
    assert {name: found.heretic[name] for name in DIFFERENT} == DIFFERENT
    for name, value in found.heretic.items():
        if name in DIFFERENT:
            assert value != heretic[name], f"{name} is the default: its comment says otherwise"
        elif isinstance(value, dict):
            default = heretic[name].model_dump()
            assert value == {key: default[key] for key in value}
            # Labels of pictures that are not made aside, nothing of the default is left to chance.
            left = {key for key, other in default.items() if other and not key.startswith("residual_plot")}
            assert left == set(value)
        else:
            default = heretic[name]
            assert value == ([str(item) for item in default] if isinstance(default, list) else default), name


def test_the_shipped_gates_and_budget_are_the_codes_defaults() -> None:
    import tomllib

    found = settings.load(SHIPPED)
    assert found.gates == Gates()
    assert (found.timeout, found.early_stop) == (0.0, False)
    data = tomllib.loads(SHIPPED.read_text(encoding="utf-8"))
    # Every knob is in the file, where a reader looks for it.
    assert data["gates"] == asdict(Gates())
    assert set(data["budget"]) == {"timeout", "early_stop"}


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    found = settings.load(write(tmp_path, ""))
    assert (found.heretic, found.gates, found.timeout, found.early_stop) == ({}, Gates(), 0.0, False)


def test_the_file_is_looked_for_in_the_configuration_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "n_trials = 7")
    monkeypatch.setenv("CONFIG_DIR", str(tmp_path))
    assert settings.load().heretic == {"n_trials": 7}
    assert settings.load().path == path
    monkeypatch.delenv("CONFIG_DIR")
    monkeypatch.chdir(SHIPPED.parents[1])
    assert settings.load().heretic == settings.load(SHIPPED).heretic


def test_neither_the_environment_nor_the_folder_changes_what_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERETIC_N_TRIALS", "nonsense")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.toml").write_text("n_trials = 'nonsense'", encoding="utf-8")
    assert settings.load(write(tmp_path, "seed = 3")).heretic == {"seed": 3}


def test_the_tiny_models_settings_load(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    found = settings.load(write(tmp_path, tiny_module.toml(tmp_path, gates={"choice": "fewest_refusals"})))
    assert found.gates.choice == "fewest_refusals"
    assert found.heretic["refusal_markers"] == list(tiny_module.REFUSAL_MARKERS)


# --- the older spelling --------------------------------------------------------------------------------------------------


def test_the_older_spelling_is_translated_and_said(tmp_path: Path) -> None:
    text = """
[optimization]
n_trials = 50
timeout = 3600
[evaluation]
n_harmful = 40
n_harmless = 60
"""
    found = settings.load(write(tmp_path, text))
    assert found.timeout == 3600.0
    assert found.heretic == {
        "n_trials": 50,
        "bad_evaluation_prompts": {"dataset": "mlabonne/harmful_behaviors", "split": "test[:40]", "column": "text"},
        "good_evaluation_prompts": {"dataset": "mlabonne/harmless_alpaca", "split": "test[:60]", "column": "text"},
    }
    assert found.notes == (
        "[optimization] n_trials is read as n_trials = 50",
        "[optimization] timeout is read as [budget] timeout = 3600",
        "[evaluation] n_harmful is read as [bad_evaluation_prompts] split = 'test[:40]'",
        "[evaluation] n_harmless is read as [good_evaluation_prompts] split = 'test[:60]'",
    )


def test_the_older_spelling_keeps_what_else_the_table_says(tmp_path: Path) -> None:
    text = "[evaluation]\nn_harmful = 40\n[bad_evaluation_prompts]\ncolumn = 'prompt'\nprefix = 'Please:'\n"
    found = settings.load(write(tmp_path, text))
    table = found.heretic["bad_evaluation_prompts"]
    assert table == {
        "dataset": "mlabonne/harmful_behaviors",
        "split": "test[:40]",
        "column": "prompt",
        "prefix": "Please:",
    }
    own = "[evaluation]\nn_harmful = 40\n[bad_evaluation_prompts]\ndataset = 'bad.txt'\n"
    assert settings.load(write(tmp_path, own)).heretic["bad_evaluation_prompts"] == {
        "dataset": "bad.txt",
        "split": "test[:40]",
    }


@pytest.mark.parametrize(
    "text",
    [
        "n_trials = 60\n[optimization]\nn_trials = 50",
        "[optimization]\ntimeout = 60\n[budget]\ntimeout = 61",
        "[evaluation]\nn_harmful = 40\n[bad_evaluation_prompts]\ndataset = 'bad.txt'\nsplit = 'test[:41]'",
        "[evaluation]\nn_harmful = 40\n[bad_evaluation_prompts]\nsplit = 'test[:41]'",
    ],
)
def test_two_spellings_that_disagree_are_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(Problem, match="older spelling") as raised:
        settings.load(write(tmp_path, text))
    assert raised.value.code == BAD_INPUT


def test_two_spellings_that_agree_are_none(tmp_path: Path) -> None:
    found = settings.load(write(tmp_path, "n_trials = 50\n[optimization]\nn_trials = 50"))
    assert found.heretic == {"n_trials": 50}


# --- what is wrong is named ----------------------------------------------------------------------------------------------

PROMPTS = "[bad_prompts]\ndataset = 'bad.txt'\n"
WRONG: list[tuple[str, str]] = [  # the file, and what the message must name
    ("n_trial = 5", "n_trial is unknown; did you mean n_trials?"),
    ("batchsize = 5", "did you mean batch_size?"),
    ("wibble = 5", "wibble is unknown"),
    ("[optimisation]\nn_trials = 5", "optimisation is unknown"),
    ("[optimization]\nn_trails = 5", "[optimization] n_trails"),
    ("optimization = 3", "[optimization] must be a table"),
    ("[evaluation]\nn_harmful = true", "[evaluation] n_harmful"),
    ("[evaluation]\nn_harmful = 0", "[evaluation] n_harmful"),
    ("[evaluation]\nn_harmless = '60'", "[evaluation] n_harmless"),
    ("bad_evaluation_prompts = 3\n[evaluation]\nn_harmful = 5", "[bad_evaluation_prompts] must be a table"),
    ("model = 'x/y'", "model does not belong here; it is decided by MODEL"),
    ("study_checkpoint_dir = '/tmp'", "CHECKPOINT_DIR"),
    ("trial_index = 0", "[gates] choice"),
    ("upload_repo_private = false", "PUBLIC"),
    ("export_strategy = 'adapter'", "export_strategy does not belong here"),
    ("n_trials = 'many'", "n_trials"),
    ("n_trials = '5'", "n_trials"),
    ("n_trials = true", "n_trials"),
    ("n_trials = 5.0", "n_trials"),
    ("n_trials = 2.5", "n_trials"),
    ("n_trials = 0", "n_trials must be above 0"),
    ("n_trials = -3", "n_trials must be above 0"),
    ("n_startup_trials = false", "n_startup_trials"),
    ("seed = 2026-01-01", "seed"),
    ("batch_size = -1", "batch_size must not be below 0"),
    ("batch_size = [1]", "batch_size"),
    ("max_response_length = 0", "max_response_length must be above 0"),
    ("max_response_length = true", "max_response_length"),
    ("offload_outputs_to_cpu = 'yes'", "offload_outputs_to_cpu"),
    ("quantization = 'bnb_8bit'", "quantization"),
    ("row_normalization = 'half'", "row_normalization"),
    ("kl_divergence_scale = nan", "kl_divergence_scale"),
    ("kl_divergence_target = inf", "kl_divergence_target"),
    ("winsorization_quantile = 'all'", "winsorization_quantile"),
    ("refusal_markers = 'sorry'", "refusal_markers"),
    ("refusal_markers = [1]", "refusal_markers.0"),
    ("refusal_markers = []", "refusal_markers"),
    ("refusal_markers = ['sorry', '']", "refusal_markers"),
    ("system_prompt = 1", "system_prompt"),
    ("bad_prompts = 'bad.txt'", "bad_prompts"),
    ("[bad_prompts]\nsplit = 'train'", "bad_prompts.dataset"),
    (PROMPTS + "colunm = 'text'", "[bad_prompts] colunm is unknown"),
    (PROMPTS + "column = 3", "bad_prompts.column"),
    ("gates = 3", "[gates] must be a table"),
    ("[[gates]]\nrefusals = 3", "[gates] must be a table"),
    ("budget = []", "[budget] must be a table"),
    ("[gates]\nrefusal = 3", "[gates] refusal is unknown"),
    ("[gates]\nrefusals = 3.5", "[gates] refusals must be a whole number"),
    ("[gates]\nrefusals = true", "[gates] refusals"),
    ("[gates]\nrefusals = 0", "[gates] refusals"),
    ("[gates]\nof = -100", "[gates] of"),
    ("[gates]\nof = '100'", "[gates] of"),
    ("[gates]\nkl_divergence = nan", "[gates] kl_divergence"),
    ("[gates]\nkl_divergence = inf", "[gates] kl_divergence"),
    ("[gates]\nkl_divergence = -inf", "[gates] kl_divergence"),
    ("[gates]\nkl_divergence = true", "[gates] kl_divergence"),
    (f"[gates]\nkl_divergence = 1{'0' * 400}", "[gates] kl_divergence"),
    ("[gates]\nperplexity_ratio = 0", "[gates] perplexity_ratio"),
    ("[gates]\nrefusals = 101", "[gates] refusals must not be above of"),
    ("[gates]\nof = 4", "[gates] refusals must not be above of"),
    ("[gates]\nfalse_refusals = 6\nfalse_refusals_of = 5", "[gates] false_refusals must not be above"),
    ("[gates]\nchoice = 'best'", "[gates] choice must be lowest_kl or fewest_refusals"),
    ("[gates]\nchoice = ['lowest_kl']", "[gates] choice"),
    ("[budget]\ntime = 3", "[budget] time is unknown"),
    ("[budget]\ntimeout = -1", "[budget] timeout"),
    ("[budget]\ntimeout = nan", "[budget] timeout"),
    ("[budget]\ntimeout = inf", "[budget] timeout"),
    ("[budget]\ntimeout = true", "[budget] timeout"),
    (f"[budget]\ntimeout = 1{'0' * 400}", "[budget] timeout"),
    ("[budget]\nearly_stop = 1", "[budget] early_stop"),
    ("[budget]\nearly_stop = 'true'", "[budget] early_stop"),
    ("n_trials = ", "not valid TOML"),
    ("n_trials = 5\nn_trials = 6", "not valid TOML"),
    ("\ufeffn_trials = 5", "not valid TOML"),
    ("n_trials: 5", "not valid TOML"),
]


@pytest.mark.parametrize(("text", "named"), WRONG, ids=[f"{number}" for number in range(len(WRONG))])
def test_what_is_wrong_is_named_with_the_file(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(Problem) as raised:
        settings.load(path)
    assert raised.value.code == BAD_INPUT
    assert str(path) in str(raised.value)
    assert named in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 600


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "heretic.toml"
    path.write_bytes(b"system_prompt = '\xff\xfe'")
    with pytest.raises(Problem, match="not valid TOML") as raised:
        settings.load(path)
    assert raised.value.code == BAD_INPUT


def test_a_file_that_is_not_there_or_is_a_folder_is_named_with_the_command_that_restores_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(Problem, match="git checkout") as raised:
            settings.load(path)
        assert raised.value.code == BAD_INPUT
        assert str(path) in str(raised.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    path = write(tmp_path, "")
    path.chmod(0)
    with pytest.raises(Problem, match="cannot be read"):
        settings.load(path)


def test_no_terminal_command_of_the_file_is_repeated(tmp_path: Path) -> None:
    path = write(tmp_path, '"\\u001b[31mred" = 1')
    with pytest.raises(Problem) as raised:
        settings.load(path)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "kl_divergence_scale = 1",  # a whole number is a number
        "quantization = 'bnb_4bit'",
        "n_startup_trials = 0",
        "max_memory = {'0' = '20GB', cpu = '60GB'}",
        "dtypes = ['auto']",
        "print_responses = true",
        "chain_of_thought_skips = [['<think>', '<think></think>']]",
        "response_prefix = 'Sure.'",
        "batch_size = 0",
    ],
)
def test_what_heretic_takes_is_taken(tmp_path: Path, text: str) -> None:
    import tomllib

    assert settings.load(write(tmp_path, text)).heretic == tomllib.loads(text)
