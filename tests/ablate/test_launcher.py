# SPDX-License-Identifier: AGPL-3.0-or-later
"""The real Heretic, run without a person: every question is answered or refused, and its study is the one it would do."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import warm
from support import environment
from tiny import Tiny

import journal
import launcher
import runs
import search
from gates import Gates
from journal import Trial

pytestmark = pytest.mark.timeout(300)  # a model is trained, and Heretic imported, for the first test

# Whatever ends passes: which trial the tiny model's ablation succeeds with is not the subject here.
ANY = Gates(refusals=41, of=40, kl_divergence=1000.0)
NONE = Gates(refusals=41, of=40, kl_divergence=1e-30)
TRIALS = 6


@pytest.fixture(scope="session")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run of `TRIALS` trials that nothing interrupted, its model saved."""
    run, found = warm.prepare(tmp_path_factory.mktemp("whole"), tiny)
    outcome = warm.launch(run, found, gates=ANY)
    assert outcome == {"ended": "saved", "trial": best_of(run).index, "message": None, "at": None}, warm.log_of(run)
    return run


def best_of(run: runs.Run) -> Trial:
    return min(journal.read(run.journal).trials, key=lambda trial: (trial.kl_divergence, trial.refusals, trial.number))


# --- the policy ----------------------------------------------------------------------------------------------------------


def trial_of(index: int, refusals: int, kl: float) -> Trial:
    return Trial(
        number=index - 1, index=index, state="complete", refusals=refusals, kl_divergence=kl, base_refusals=40,
        harmful_prompts=40, direction_index=None, parameters={}, started=1.0, ended=2.0,
    )  # fmt: skip


def choice(value: Any) -> Any:
    return SimpleNamespace(title="what a person reads", value=value)


def offered(*indices: int) -> list[Any]:
    frozen = [SimpleNamespace(user_attrs={"index": index}) for index in indices]
    return [*(choice(value) for value in frozen), choice("continue"), choice("")]


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> launcher.Policy:
    trials = (trial_of(1, 0, 0.4), trial_of(2, 1, 0.2), trial_of(3, 1, 0.1), trial_of(4, 9, 0.01))
    monkeypatch.setattr(launcher, "_trials", lambda: trials)
    return launcher.Policy(Gates(refusals=2, of=40), "/somewhere")


WHICH = "Which trial do you want to use?"
WHAT = "What do you want to do with the decensored model?"


def test_the_policy_continues_chooses_saves_once_and_leaves(policy: launcher.Policy) -> None:
    proceed = [choice("continue"), choice("restart"), choice("")]
    assert policy.answer("select", "How would you like to proceed?", proceed) == "continue"
    chosen = policy.answer("select", WHICH, offered(1, 2, 3, 4))
    assert chosen.user_attrs == {"index": 3}
    assert not policy.exported
    actions = ["Save the model to a local folder", "Upload the model to Hugging Face", choice("")]
    assert policy.answer("select", WHAT, actions) == "Save the model to a local folder"
    assert policy.answer("path", "Path to the folder:", []) == "/somewhere"
    assert policy.answer("select", WHAT, actions) == ""
    assert policy.answer("select", WHICH, offered(1, 2, 3, 4)) == ""
    assert (policy.trial, policy.exported, policy.chose_none) == (3, True, False)


def test_the_policy_saves_with_the_newer_words(policy: launcher.Policy) -> None:
    actions = [choice("save"), choice("upload"), choice("chat"), choice("benchmark"), choice("")]
    assert policy.answer("select", WHAT, actions) == "save"


def test_where_a_setting_says_to_save_the_second_question_for_a_trial_means_that_it_was_done(
    policy: launcher.Policy,
) -> None:
    policy.answer("select", WHICH, offered(3, 2))
    assert policy.answer("select", WHICH, offered(3, 2)) == ""
    assert policy.exported


@pytest.mark.parametrize("indices", [(4,), (), (7,)])
def test_the_policy_chooses_none_where_none_passes(policy: launcher.Policy, indices: tuple[int, ...]) -> None:
    assert policy.answer("select", WHICH, offered(*indices)) == ""
    assert policy.chose_none
    assert policy.trial is None


@pytest.mark.parametrize(
    ("kind", "message", "choices"),
    [
        ("select", "How would you like to proceed?", [choice("restart"), choice("")]),
        ("select", WHICH, []),
        ("select", WHAT, ["Upload the model to Hugging Face", choice("")]),
        ("select", "How do you want to export the model?", [choice("merge"), choice("adapter")]),
        ("select", "Should the repository be public or private?", ["Public", "Private"]),
        ("text", "Path to the folder:", []),
        ("text", "How many additional trials do you want to run?", []),
        ("password", "Hugging Face access token:", []),
        ("confirm", "Continue anyway?", []),
        ("select", "", []),
    ],
)
def test_the_policy_refuses_what_it_does_not_know_by_name(
    policy: launcher.Policy, kind: str, message: str, choices: list[Any]
) -> None:
    with pytest.raises(launcher.UnknownQuestion) as raised:
        policy.answer(kind, message, choices)
    assert f"({kind}): {message}" in str(raised.value)
    assert not isinstance(raised.value, Exception)  # Heretic goes on after those


def test_every_way_of_asking_is_answered(policy: launcher.Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins
    import getpass

    import questionary

    kinds = ("select", "rawselect", "checkbox", "text", "path", "password", "confirm", "autocomplete")
    for kind in kinds:  # put back after the test
        monkeypatch.setattr(questionary, kind, getattr(questionary, kind))
    monkeypatch.setattr(builtins, "input", input)
    monkeypatch.setattr(getpass, "getpass", getpass.getpass)
    launcher.answer_questions(policy)
    for kind in kinds:
        question = getattr(questionary, kind)("Who goes there?", default="")  # not asked yet: a setting may answer
        for ask in (question.ask, question.unsafe_ask):
            with pytest.raises(launcher.UnknownQuestion, match=rf"\({kind}\): Who goes there\?"):
                ask()
    assert questionary.path("Path to the folder:", only_directories=True).ask() == "/somewhere"
    proceed = ["continue", "restart"]
    assert questionary.select("How would you like to proceed?", proceed).ask() == "continue"
    assert questionary.select("How would you like to proceed?", choices=proceed).unsafe_ask() == "continue"
    for ask in (builtins.input, getpass.getpass):
        with pytest.raises(launcher.UnknownQuestion, match="run custom code"):
            ask("Do you wish to run custom code? [y/N]")
        with pytest.raises(launcher.UnknownQuestion):
            ask()


# --- memory --------------------------------------------------------------------------------------------------------------


def raised_by(how: Any) -> BaseException:
    with pytest.raises(BaseException) as raised:
        how()
    return raised.value


def test_what_is_out_of_memory() -> None:
    import torch

    # What this machine's own allocator says, not what we think that it says.
    assert launcher.is_out_of_memory(raised_by(lambda: torch.empty(10**15)))
    assert launcher.is_out_of_memory(raised_by(lambda: bytearray(10**15)))
    assert launcher.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    for message in (
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
        "unable to mmap 8 bytes from file </m>: Cannot allocate memory (12)",
    ):
        assert launcher.is_out_of_memory(RuntimeError(message)), message
    assert launcher.is_out_of_memory(OSError(12, os.strerror(12)))
    told = "Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit the quantized model."
    assert launcher.is_out_of_memory(ValueError(told))
    assert launcher.is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`")
    )
    wrapped = ValueError("loading failed")
    wrapped.__cause__ = RuntimeError("CUDA error: out of memory")
    assert launcher.is_out_of_memory(wrapped)


def test_what_is_not_out_of_memory() -> None:
    for error in (
        None,
        RuntimeError("CUDA error: device-side assert triggered"),
        OSError(28, os.strerror(28)),
        ValueError("the story is called Out of memory"),
    ):
        assert not launcher.is_out_of_memory(error)


def test_weights_that_were_put_aside_do_not_fit() -> None:
    """transformers leaves tensors without values behind, and Heretic would edit them without a word."""
    import torch

    launcher.check_fits(torch.nn.Linear(2, 2))
    with pytest.raises(torch.OutOfMemoryError, match="do not fit"):
        launcher.check_fits(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")))


# --- a whole run ---------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_model_of_the_chosen_trial(whole: runs.Run) -> None:
    found = journal.read(whole.journal)
    assert found.finished
    assert [(trial.index, trial.state) for trial in found.trials] == [(n + 1, "complete") for n in range(TRIALS)]
    saved = {path.name for path in (whole.folder / "saving").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= saved
    # Merged, so that the base model's architecture loads it, and changed.
    from safetensors import safe_open

    with (
        safe_open(whole.folder / "saving" / "model.safetensors", framework="pt") as made,
        safe_open(whole.folder / "base" / "model.safetensors", framework="pt") as base,
    ):
        assert set(made.keys()) == set(base.keys())
        name = next(name for name in base.keys() if name.endswith("layers.6.self_attn.o_proj.weight"))  # noqa: SIM118
        assert made.get_tensor(name).shape == base.get_tensor(name).shape
        assert any(not made.get_tensor(name).equal(base.get_tensor(name)) for name in base.keys())  # noqa: SIM118


BARE = """
import sys
import questionary
from types import SimpleNamespace
def select(message, choices, **named):
    assert message == "Which trial do you want to use?", message
    return SimpleNamespace(ask=lambda: "")
questionary.select = select
import heretic.main
sys.argv = ["heretic"]
heretic.main.run()
"""


def test_bare_heretic_does_the_same_trials(whole: runs.Run, tiny: Tiny, tmp_path: Path) -> None:
    """Heretic by itself, with the same settings and seed, only its menu left: same parameters, same numbers."""
    run, found = warm.prepare(tmp_path, tiny)
    config = search.heretic_config(found, run, search.Load(64, "none"))
    import tomli_w

    (run.folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    (run.folder / "bare.py").write_text(BARE, encoding="utf-8")
    with (run.folder / "heretic.log").open("ab") as log:
        process = warm.Popen(
            ["-m", "bare"],
            cwd=run.folder,
            env=environment(PYTHONPATH=str(run.folder)),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert process.wait(warm.LIMIT) == 0, warm.log_of(run)
    assert len(warm.figures(run)) == TRIALS
    assert warm.figures(run) == warm.figures(whole)


def test_a_killed_run_draws_the_trials_that_it_would_have_drawn(whole: runs.Run, tiny: Tiny, tmp_path: Path) -> None:
    """kill -9 in the second trial (drawn at random) and, of the next start, in its third (drawn from the others)."""
    run, found = warm.prepare(tmp_path, tiny)
    assert warm.launch(run, found, gates=ANY, text=warm.KILL.format(number=2)) == -9
    assert [trial.state for trial in journal.read(run.journal).trials] == ["complete", "running"]
    journal.repair_file(run.journal, {})
    assert warm.launch(run, found, gates=ANY, text=warm.KILL.format(number=3)) == -9
    assert len(journal.read(run.journal).trials) == 4
    journal.repair_file(run.journal, {})
    outcome = warm.launch(run, found, gates=ANY)
    assert isinstance(outcome, dict)
    assert (outcome["ended"], outcome["trial"]) == ("saved", best_of(whole).index)
    assert warm.figures(run) == warm.figures(whole)
    assert "drawn with another seed" not in warm.log_of(run)
    # The saved model too.
    model = Path("saving") / "model.safetensors"
    assert (run.folder / model).read_bytes() == (whole.folder / model).read_bytes()


def test_a_finished_run_is_saved_again_without_another_trial(whole: runs.Run, tiny: Tiny, tmp_path: Path) -> None:
    run, found = warm.prepare(tmp_path, tiny)
    shutil.copytree(whole.checkpoint, run.checkpoint, dirs_exist_ok=True)
    outcome = warm.launch(run, found, gates=ANY)
    assert isinstance(outcome, dict)
    assert (outcome["ended"], outcome["trial"]) == ("saved", best_of(whole).index)
    assert warm.figures(run) == warm.figures(whole)
    assert "Running trial" not in warm.log_of(run)


# --- budget --------------------------------------------------------------------------------------------------------------


def test_the_search_stops_early_and_does_not_go_on_when_started_again(
    whole: runs.Run, tiny: Tiny, tmp_path: Path
) -> None:
    """The gates are set such that the third trial or a later one is the first to pass."""
    trials = journal.read(whole.journal).trials
    divergences = [trial.kl_divergence or 0.0 for trial in trials]
    first = next(n for n in range(1, TRIALS) if divergences[n] < min(divergences[:n]))
    gates = replace(ANY, kl_divergence=(divergences[first] + min(divergences[:first])) / 2)
    run, found = warm.prepare(tmp_path, tiny)
    for _ in range(2):
        outcome = warm.launch(run, found, gates=gates, early_stop=True)
        assert isinstance(outcome, dict)
        assert (outcome["ended"], outcome["trial"]) == ("saved", trials[first].index)
        assert warm.figures(run) == warm.figures(whole)[: first + 1]
    assert not journal.read(run.journal).finished
    assert warm.log_of(run).count("Running trial") == first + 1


def test_the_time_budget_ends_the_search_after_the_trial_in_progress_over_all_starts(
    whole: runs.Run, tiny: Tiny, tmp_path: Path
) -> None:
    run, found = warm.prepare(tmp_path, tiny)
    first = warm.launch(run, found, gates=ANY, timeout=1e-6)
    assert isinstance(first, dict)
    assert (first["ended"], first["trial"]) == ("saved", 1)
    assert warm.figures(run) == warm.figures(whole)[:1]
    assert (run.folder / "saving" / "model.safetensors").exists()
    # Nothing that would pass: the same end, without another trial.
    again = warm.launch(run, found, gates=NONE, timeout=1e-6)
    assert again == {"ended": "no_trial", "trial": None, "message": None, "at": None}
    assert len(warm.figures(run)) == 1
    # A larger budget goes on where the smaller one ended.
    more = warm.launch(run, found, gates=ANY, timeout=1000.0)
    assert isinstance(more, dict)
    assert more["ended"] == "saved"
    assert warm.figures(run) == warm.figures(whole)


# --- what goes wrong -----------------------------------------------------------------------------------------------------


def test_a_question_that_the_policy_does_not_know_ends_the_run_and_is_named(
    whole: runs.Run, tiny: Tiny, tmp_path: Path
) -> None:
    run, found = warm.prepare(tmp_path, tiny)
    shutil.copytree(whole.checkpoint, run.checkpoint, dirs_exist_ok=True)
    journal.repair_file(run.journal, {"export_strategy": None})
    outcome = warm.launch(run, found, gates=ANY, export_strategy=None)
    assert isinstance(outcome, dict)
    assert outcome["ended"] == "failed"
    assert "Heretic asks (select): How do you want to export the model?" in outcome["message"]
    assert not (run.folder / "saving").exists()


def test_a_models_own_code_is_not_run(tiny: Tiny, tmp_path: Path) -> None:
    """transformers asks on stdin whether it may; Heretic catches what goes wrong while it loads, but not this."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", encoding="utf-8")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "unheard-of",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run, found = warm.prepare(tmp_path / "run", tiny)
    (run.folder / "base").unlink()
    (run.folder / "base").symlink_to(model)
    outcome = warm.launch(run, found, gates=ANY)
    assert isinstance(outcome, dict)
    assert outcome["ended"] == "failed"
    assert "asked on a terminal, and refused: The repository base contains custom code" in outcome["message"]
    assert not (tmp_path / "ran").exists()


def test_a_model_that_cannot_be_loaded_is_named(tiny: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    run, found = warm.prepare(tmp_path / "run", tiny)
    (run.folder / "base").unlink()
    (run.folder / "base").symlink_to(model)
    outcome = warm.launch(run, found, gates=ANY)
    assert isinstance(outcome, dict)
    assert (outcome["ended"], outcome["at"]) == ("failed", "load")
    assert "SafetensorError" in outcome["message"]  # what it failed with, not only that it failed


NAN = """
import heretic.evaluator
original = heretic.evaluator.Evaluator.__init__
def init(self, *arguments):
    original(self, *arguments)
    self.base_logprobs = self.base_logprobs * float("nan")
heretic.evaluator.Evaluator.__init__ = init
"""


def test_trials_without_a_number_are_never_chosen(tiny: Tiny, tmp_path: Path) -> None:
    """Heretic's score of a NaN divergence is a number, and a good one: its trial is complete."""
    run, found = warm.prepare(tmp_path, tiny, n_trials=2)
    outcome = warm.launch(run, found, gates=ANY, text=NAN)
    assert outcome == {"ended": "no_trial", "trial": None, "message": None, "at": None}
    trials = journal.read(run.journal).trials
    assert [trial.state for trial in trials] == ["complete", "complete"]
    assert all(trial.kl_divergence is not None and math.isnan(trial.kl_divergence) for trial in trials)
    assert not (run.folder / "saving").exists()


FULL = """
import resource, signal
import heretic.model
original = heretic.model.Model.get_merged_model
def get_merged_model(self):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    return original(self)
heretic.model.Model.get_merged_model = get_merged_model
"""
NO_MEMORY = """
import torch
import heretic.model
def get_merged_model(self):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
heretic.model.Model.get_merged_model = get_merged_model
"""


@pytest.mark.parametrize(
    ("kind", "text", "ended", "named"),
    [
        ("full", FULL, "failed", "File too large"),
        ("file", "", "failed", "no weights were saved"),
        ("nowhere", "", "failed", "File exists"),
        ("memory", NO_MEMORY, "out_of_memory", "CUDA out of memory"),
    ],
)
def test_a_model_that_could_not_be_saved_is_not_said_to_be(
    whole: runs.Run, tiny: Tiny, tmp_path: Path, kind: str, text: str, ended: str, named: str
) -> None:
    """Heretic prints the error, or nothing at all, and asks what to do next."""
    run, found = warm.prepare(tmp_path, tiny)
    shutil.copytree(whole.checkpoint, run.checkpoint, dirs_exist_ok=True)
    saving = run.folder / "saving"
    if kind == "file":
        saving.write_text("", encoding="utf-8")
    if kind == "nowhere":
        saving.symlink_to(run.folder / "away" / "volume")
    outcome = warm.launch(run, found, gates=ANY, text=text)
    assert isinstance(outcome, dict)
    assert (outcome["ended"], outcome["at"]) == (ended, "save"), outcome
    assert named in outcome["message"]
    # What made it fail is over: the same run saves its model.
    if kind in ("full", "memory"):
        assert isinstance(again := warm.launch(run, found, gates=ANY), dict)
        assert again["ended"] == "saved"


# --- the sampler ---------------------------------------------------------------------------------------------------------


def study_of(sampler: Any, number: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])

    def objective(trial: Any) -> tuple[float, float]:
        x = trial.suggest_float("x", 0, 1)
        scope = trial.suggest_categorical("scope", ["global", "per layer"])
        return (x - 0.3) ** 2, abs(x - 0.7) + (scope == "global")

    study.optimize(objective, n_trials=number)
    return study


@pytest.mark.filterwarnings("ignore:.*multivariate.*experimental")
@pytest.mark.parametrize("drawn", [0, 1, 4, 9])
def test_a_replayed_sampler_draws_what_comes_next(drawn: int) -> None:
    import optuna

    def sampler(seed: int) -> Any:
        return optuna.samplers.TPESampler(n_startup_trials=3, n_ei_candidates=128, multivariate=True, seed=seed)

    whole_study = study_of(sampler(1), 12)
    trials = whole_study.trials[:drawn]
    made = sampler(1)
    assert launcher.replay(made, trials, whole_study.directions)
    continued = optuna.create_study(sampler=made, directions=["minimize", "minimize"])
    continued.add_trials(trials)
    for expected in whole_study.trials[drawn:]:
        asked = continued.ask(fixed_distributions=expected.distributions)
        assert asked.params == expected.params
        continued.tell(asked, expected.values)
    assert launcher.replay(sampler(2), trials, whole_study.directions) is (drawn == 0)


# --- newer versions ------------------------------------------------------------------------------------------------------

# A package that asks as newer versions of Heretic do: a question is built, and asked where no setting answers it.
NEWER_CONFIG = """
import tomllib
from pathlib import Path

FIELDS = (
    "model", "n_trials", "seed", "batch_size", "quantization", "study_checkpoint_dir", "export_strategy",
    "checkpoint_action", "trial_index", "model_action", "save_directory",
)

class Settings:
    model_fields = dict.fromkeys(FIELDS)
    def __init__(self, **given):
        path = Path("config.toml")
        read = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in FIELDS:
            setattr(self, name, {**read, **given}.get(name))
"""
NEWER_MODEL = """
def format_exception(error):
    return str(error)

class Model:
    def __init__(self, settings):
        self.settings = settings
        self.model = self

    def parameters(self):
        return []
"""
NEWER_MAIN = """
import json, os
from pathlib import Path
import optuna, questionary
from optuna.samplers import TPESampler
from questionary import Choice
from .config import Settings
from .model import Model, format_exception

def ask_if_unset(value, question):
    return question.ask() if value is None else value

def run():
    settings = Settings()
    path = os.path.join(settings.study_checkpoint_dir, settings.model + ".jsonl")
    journal = optuna.storages.journal
    storage = optuna.storages.JournalStorage(
        journal.JournalFileBackend(path, lock_obj=journal.JournalFileOpenLock(path))
    )
    existing = storage.get_all_studies()
    if existing:
        choices = [Choice("Continue", value="continue"), Choice("Restart", value="restart"), Choice("Exit", value="")]
        asked = questionary.select("How would you like to proceed?", choices=choices)
        assert ask_if_unset(settings.checkpoint_action, asked) == "continue"
        stored = json.loads(existing[0].user_attrs["settings"])
        settings = Settings(**{name: value for name, value in stored.items() if name != "save_directory"})
    model = Model(settings)

    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        trial.set_user_attr("index", trial.number + 1)
        print(f"Running trial {trial.number + 1}", flush=True)
        for name, value in (("refusals", round(40 * x)), ("kl_divergence", 1 - x), ("base_refusals", 40)):
            trial.set_user_attr(name, value)
        trial.set_user_attr("n_bad_prompts", 40)
        return 1 - x, x

    study = optuna.create_study(
        sampler=TPESampler(seed=settings.seed), directions=["minimize", "minimize"], storage=storage,
        study_name="heretic", load_if_exists=True,
    )
    study.set_user_attr("settings", json.dumps(vars(settings)))
    study.set_user_attr("finished", False)
    study.optimize(objective, n_trials=settings.n_trials - len(study.trials))
    while True:
        trials = sorted(study.trials, key=lambda trial: trial.user_attrs["refusals"])
        choices = [*(Choice(str(trial.number), value=trial) for trial in trials), Choice("More", value="continue")]
        asked = questionary.select("Which trial do you want to use?", choices=[*choices, Choice("Exit", value="")])
        trial = ask_if_unset(None if settings.trial_index is None else trials[settings.trial_index], asked)
        if trial is None or trial == "":
            return
        actions = [Choice("Save", value="save"), Choice("Upload", value="upload"), Choice("Back", value="")]
        while True:
            asked = questionary.select("What do you want to do with the decensored model?", choices=actions)
            action = ask_if_unset(settings.model_action, asked)
            if action == "":
                break
            assert action == "save"
            try:
                folder = Path(ask_if_unset(settings.save_directory, questionary.path("Path to the folder:")))
                folder.mkdir(exist_ok=True)
                assert settings.export_strategy == "merge"
                with (folder / "saved.txt").open("a") as file:
                    file.write(f"{trial.number + 1}\\n")
                (folder / "model.safetensors").write_bytes(b"")
            except Exception as error:
                print(format_exception(error))
            if settings.model_action is not None:
                break
"""
DRIVER = """
import json, sys
from pathlib import Path
import launcher, runs, search, settings
from gates import Gates
from progress import Reporter
folder, n_trials = Path(sys.argv[1]), int(sys.argv[2])
heretic = {"n_trials": n_trials, "seed": 1, "batch_size": 4}
found = settings.Settings(heretic, heretic, Gates(refusals=30, of=40, kl_divergence=0.6), 0.0, False, (), folder)
run = runs.find_or_make(folder / "ablations", "m", "0123456789abcdef", None)
load = search.Load(4, "none")
with runs.owned(run):
    index = search.search(run, found, load, machine="m", card="a card", usd_per_hour=None, reporter=Reporter())
print(json.dumps({"index": index, "folder": str(run.folder), "headless": launcher.headless_settings("/x")}))
"""


def drive(folder: Path, site: Path, n_trials: int) -> Any:
    path = os.pathsep.join([str(site), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-P", "-c", DRIVER, str(folder), str(n_trials)],
        env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("headless", [True, False])
def test_newer_versions_take_the_answers_as_settings_where_they_have_them(tmp_path: Path, headless: bool) -> None:
    """The trial is asked for in both; one save, of the trial that the gates choose; a second start goes on."""
    package = tmp_path / "site" / "heretic"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    config = NEWER_CONFIG if headless else NEWER_CONFIG.replace('"model_action", ', "")
    main = NEWER_MAIN if headless else NEWER_MAIN.replace("settings.model_action", "None")
    for name, text in (("config", config), ("model", NEWER_MODEL), ("main", main)):
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    for n_trials in (5, 8):
        told = drive(tmp_path, package.parent, n_trials)
        folder = Path(told["folder"])
        answers = {"checkpoint_action": "continue", "model_action": "save", "save_directory": "/x"}
        assert told["headless"] == (answers if headless else {})
        text = (folder / "config.toml").read_text(encoding="utf-8")
        assert ("model_action" in text, "save_directory" in text) == (headless, headless)
        assert "trial_index" not in text
        trials = journal.read(folder / "checkpoint" / "base.jsonl").trials
        assert len(trials) == n_trials
        passing = [trial for trial in trials if (trial.refusals or 0) < 30 and (trial.kl_divergence or 0) < 0.6]
        assert told["index"] == min(passing, key=lambda trial: trial.kl_divergence or 0).index
        log = (folder / "heretic.log").read_text(encoding="utf-8")
        assert log.count("Running trial") == n_trials
    saved = (folder / "saving" / "saved.txt").read_text(encoding="utf-8").split()
    assert len(saved) == 2
    assert saved[-1] == str(told["index"])
