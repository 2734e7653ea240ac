# SPDX-License-Identifier: AGPL-3.0-or-later
"""Heretic's journal, read and repaired: cut anywhere, killed anywhere, it loads in the real optuna and nothing is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from journal import read, repair, repair_file

SETTINGS = {"n_trials": 6, "batch_size": 4, "model": "base"}


def study_at(path: Path) -> Any:
    """The study in the journal, by the real optuna, as Heretic opens it."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    return optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=1),
        directions=["minimize", "minimize"],
        storage=storage,
        study_name="heretic",
        load_if_exists=True,
    )


def run_trials(study: Any, number: int, ending: Callable[[Any], None] | None = None) -> None:
    """Trials that write what Heretic's write; with `ending`, it is called in the middle of the last one."""
    for position in range(number):
        trial = study.ask()
        index = len(study.trials)
        trial.set_user_attr("index", index)
        scope = trial.suggest_categorical("direction_scope", ["global", "per layer"])
        weight = trial.suggest_float("attn.o_proj.max_weight", 0.8, 1.5)
        trial.set_user_attr("direction_index", None if scope == "per layer" else 3.5)
        trial.set_user_attr("parameters", {"attn.o_proj": {"max_weight": weight}})
        if ending and position == number - 1:
            ending(trial)
            return
        for name, value in (("kl_divergence", weight / 10), ("refusals", index), ("base_refusals", 40)):
            trial.set_user_attr(name, value)
        trial.set_user_attr("n_bad_prompts", 40)
        study.tell(trial, [weight, index / 40])


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """The journal of a study of four complete trials, as Heretic leaves it between two trials."""
    path = tmp_path / "base.jsonl"
    study = study_at(path)
    study.set_user_attr("settings", json.dumps(SETTINGS))
    study.set_user_attr("finished", False)
    run_trials(study, 4)
    return path


def test_a_journal_is_read_as_heretic_wrote_it(journal: Path) -> None:
    found = read(journal)
    assert found.settings == SETTINGS
    assert found.finished is False
    assert [(trial.number, trial.index, trial.state, trial.refusals) for trial in found.trials] == [
        (0, 1, "complete", 1), (1, 2, "complete", 2), (2, 3, "complete", 3), (3, 4, "complete", 4),
    ]  # fmt: skip
    for trial, frozen in zip(found.trials, study_at(journal).trials, strict=True):
        assert trial.kl_divergence == frozen.user_attrs["kl_divergence"]
        assert trial.parameters == frozen.user_attrs["parameters"]
        assert trial.direction_index == frozen.user_attrs["direction_index"]
        assert (trial.base_refusals, trial.harmful_prompts) == (40, 40)
        assert trial.started == frozen.datetime_start.timestamp()
        assert trial.ended == frozen.datetime_complete.timestamp()


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl").trials == ()
    assert repair_file(tmp_path / "deeper" / "none.jsonl", {}) == []


def test_a_sound_journal_is_left_as_it_is(journal: Path) -> None:
    data = journal.read_bytes()
    assert repair_file(journal, {}) == []
    assert journal.read_bytes() == data
    assert list(journal.parent.iterdir()) == [journal]


def test_cut_at_every_byte_of_its_last_trial_it_loads_and_goes_on(journal: Path) -> None:
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if json.loads(line)["op_code"] == 4]
    begin = len(b"".join(lines[: starts[3]]))
    for cut in range(begin, len(data) + 1):
        repaired, notes = repair(data[:cut], {})
        journal.write_bytes(repaired)
        study = study_at(journal)
        complete = 4 if cut >= len(data) - 1 else 3
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * complete, cut
        assert study.user_attrs["finished"] is False
        # Only what has been lost is spoken of; a line break alone is not worth a word.
        assert bool(notes) is (begin < cut < len(data) - 1), (cut, notes)
        if cut % 97 == 0:
            run_trials(study, 1)
            assert [trial.user_attrs["index"] for trial in study.trials] == list(range(1, complete + 2))


def test_cut_anywhere_at_all_it_loads(journal: Path) -> None:
    data = journal.read_bytes()
    for cut in range(0, len(data), 7):
        repaired, _ = repair(data[:cut], {})
        journal.write_bytes(repaired)
        if repaired:
            study = study_at(journal)
            assert study.user_attrs["settings"]
            assert "finished" in study.user_attrs
            assert {trial.state.name for trial in study.trials} <= {"COMPLETE"}
        again, notes = repair(repaired, {})
        assert (again, notes) == (repaired, [])


def test_a_torn_line_that_a_later_start_has_appended_to_is_mended(journal: Path) -> None:
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    torn = b"".join(lines[:-1]) + lines[-1][:20] + b'{"op_code":2,"worker_id":"w","study_id":0,"user_attr":{"x":1}}\n'
    repaired, notes = repair(torn, {})
    journal.write_bytes(repaired)
    study = study_at(journal)
    assert study.user_attrs["x"] == 1
    assert len(study.trials) == 3
    assert any("damaged" in note for note in notes)


@pytest.mark.parametrize("state", ["running", "pruned", "failed without a score"])
def test_a_trial_that_did_not_end_is_taken_out_wherever_it_is(journal: Path, state: str) -> None:
    import optuna

    def end(trial: Any) -> None:
        if state != "running":
            states = {"pruned": optuna.trial.TrialState.PRUNED, "failed without a score": optuna.trial.TrialState.FAIL}
            study.tell(trial, state=states[state])

    study = study_at(journal)
    run_trials(study, 1, end)
    run_trials(study, 2)
    before = [trial.params for trial in study.trials]
    notes = repair_file(journal, {})
    assert notes == ["trial 5 had not ended: it will run again"]
    trials = study_at(journal).trials
    assert [trial.params for trial in trials] == before[:4] + before[5:]
    assert [trial.user_attrs["refusals"] for trial in trials] == [1, 2, 3, 4, 6, 7]
    assert journal.with_name("base.jsonl.1").exists()


def test_a_trial_whose_score_was_not_a_number_stays(journal: Path) -> None:
    import optuna

    study = study_at(journal)

    def end(trial: Any) -> None:
        trial.set_user_attr("kl_divergence", float("nan"))
        trial.set_user_attr("refusals", 0)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)

    run_trials(study, 1, end)
    assert repair_file(journal, {}) == []
    trial = read(journal).trials[4]
    assert (trial.state, trial.refusals) == ("failed", 0)
    assert trial.kl_divergence != trial.kl_divergence


def test_settings_change_and_a_finished_study_opens_again(journal: Path) -> None:
    study = study_at(journal)
    run_trials(study, 2)
    study.set_user_attr("finished", True)
    assert repair_file(journal, {"batch_size": 2}) == []
    found = read(journal)
    assert found.settings == {**SETTINGS, "batch_size": 2}
    assert found.finished is True
    assert repair_file(journal, {"n_trials": 9}) == []
    assert read(journal).finished is False
    assert study_at(journal).user_attrs["finished"] is False


@pytest.mark.parametrize("upto", [0, 1, 2])
def test_killed_between_the_first_writes_it_starts_over_or_is_completed(journal: Path, upto: int) -> None:
    """0: an empty file; 1: the study alone; 2: without `finished`, which Heretic reads unguarded."""
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:upto]))
    notes = repair_file(journal, {})
    assert bool(notes) is (upto > 0)
    if upto < 2:
        assert journal.read_bytes() == b""
    else:
        assert study_at(journal).user_attrs["finished"] is False


def test_locks_of_dead_runs_go_and_the_originals_are_all_kept(journal: Path) -> None:
    for name in ("base.jsonl.lock", "base.jsonl.lock1234.rename"):
        journal.with_name(name).touch()
    assert repair_file(journal, {}) == ["a lock was left behind"] * 2
    damaged = []
    for number in (1, 2, 3):
        with journal.open("ab") as file:
            file.write(b'{"op_code":4,"wor')
        damaged.append(journal.read_bytes())
        assert repair_file(journal, {}) == ["its last line was cut short"]
        assert journal.with_name(f"base.jsonl.{number}").read_bytes() == damaged[-1]
    assert not list(journal.parent.glob("*.lock*"))


def test_noise_is_mended_or_the_search_starts_over(journal: Path) -> None:
    data = bytearray(journal.read_bytes())
    draw = random.Random(1)
    for _ in range(100):
        noisy = bytearray(data)
        for _ in range(draw.randrange(1, 6)):
            noisy[draw.randrange(len(noisy))] = draw.randrange(256)
        journal.write_bytes(noisy)
        repair_file(journal, {})
        read(journal)
        study_at(journal)
