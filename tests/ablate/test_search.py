# SPDX-License-Identifier: AGPL-3.0-or-later
"""The search is driven to its end: down the ladder where memory runs out, on after a kill, and never without its driver."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import warm
from support import environment
from tiny import Tiny

import journal
import runs
import search
import settings
from common.problems import BAD_INPUT, TRY_LATER, UNEXPECTED, Problem
from gates import Gates
from progress import Reporter
from search import Load

pytestmark = pytest.mark.timeout(300)  # a model is trained, and Heretic imported, for the first test

ANY = Gates(refusals=41, of=40, kl_divergence=1000.0)
CARD = "an A100 with 80 GB"


def searched(
    run: runs.Run, found: settings.Settings, wanted: Load, *, machine: str = "a machine", gates: Gates = ANY, **changes: Any
) -> tuple[int | None, list[str]]:  # fmt: skip
    """Search; the index of the chosen trial and what was said. `changes` are Heretic's keys."""
    stream = io.StringIO()
    found = replace(found, gates=gates, heretic={**found.heretic, **changes}, full={**found.full, **changes})
    try:
        with runs.owned(run):
            index = search.search(
                run, found, wanted, machine=machine, card=CARD, usd_per_hour=1.0, reporter=Reporter(stream)
            )
    except Problem as problem:
        problem.add_note(stream.getvalue())
        raise
    return index, stream.getvalue().splitlines()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that have imported Heretic already, and are looked at often."""
    monkeypatch.setattr(search, "subprocess", warm.SUBPROCESS)
    monkeypatch.setattr(search, "POLL", 0.05)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def before(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    """Let Python run `text` at its start in the children that follow."""
    path = os.environ["PYTHONPATH"].split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(part for part in path if not part.endswith("site")))
    monkeypatch.setenv("PYTHONPATH", warm.custom(folder, text)["PYTHONPATH"])


# --- pure ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "at", "expected"),
    [
        (Load(100, "none"), "batch", Load(25, "none")),
        (Load(25, "none"), "batch", Load(6, "none")),
        (Load(6, "none"), "batch", Load(1, "none")),
        (Load(3, "none"), "batch", Load(1, "none")),
        (Load(0, "none"), "batch", Load(1, "none")),  # Heretic's own search for a size failed at 1 already
        (Load(1, "none"), "batch", Load(100, "bnb_4bit")),
        (Load(100, "none"), "load", Load(100, "bnb_4bit")),
        (Load(25, "none"), "load", Load(100, "bnb_4bit")),
        (Load(100, "bnb_4bit"), "batch", Load(25, "bnb_4bit")),
        (Load(1, "bnb_4bit"), "batch", None),
        (Load(100, "bnb_4bit"), "load", None),
        (Load(100, "none"), "save", None),
        (Load(1, "bnb_4bit"), "save", None),
    ],
)
def test_the_ladder(load: Load, at: str, expected: Load | None) -> None:
    assert search.next_load(load, Load(100, "none"), at) == expected


@pytest.mark.parametrize("batch_size", [0, 1, 7, 64, 100, 4096])
@pytest.mark.parametrize("at", ["batch", "load", "save"])
def test_the_ladder_ends(batch_size: int, at: str) -> None:
    first = Load(batch_size, "none")
    tried: list[Load] = []
    load: Load | None = first
    while load:
        assert load not in tried
        tried.append(load)
        load = search.next_load(load, first, at)
    assert len(tried) < 20
    assert (tried[-1].quantization == "bnb_4bit") == (at != "save")


@pytest.fixture
def run(tmp_path: Path) -> runs.Run:
    return runs.find_or_make(tmp_path / "ablations", "m", warm.KEY, None)


def write_journal(run: runs.Run, quantization: str, state: int) -> None:
    import json

    def line(code: int, **more: Any) -> str:
        return json.dumps({"op_code": code, "worker_id": "w", **more}) + "\n"

    told = json.dumps({"quantization": quantization, "n_trials": 9})
    run.journal.write_text(
        line(0, study_name="heretic", directions=[1, 1])
        + line(2, study_id=0, user_attr={"settings": told})
        + line(2, study_id=0, user_attr={"finished": False})
        + line(4, study_id=0, datetime_start="2026-01-01T00:00:00")
        + line(6, trial_id=0, state=state, values=[1.0, 1.0], datetime_complete="2026-01-01T00:00:09"),
        encoding="utf-8",
    )


WANTED = Load(100, "none")


def test_the_first_load_is_what_is_wanted(run: runs.Run) -> None:
    assert search.first_load(run, WANTED, "here") == WANTED
    assert search.first_load(run, Load(8, "bnb_4bit"), "here") == Load(8, "bnb_4bit")


def came_down(machine: str = "here", wanted: Load = WANTED) -> dict[str, Any]:
    return {"batch_size": 6, "quantization": "bnb_4bit", "machine": machine, "wanted": asdict(wanted)}


def test_the_first_load_is_what_the_last_start_came_down_to(run: runs.Run) -> None:
    run.save(load=came_down())
    assert search.first_load(run, WANTED, "here") == Load(6, "bnb_4bit")
    assert search.first_load(run, WANTED, "a larger one") == WANTED
    # Another batch size in the file is meant.
    assert search.first_load(run, Load(8, "none"), "here") == Load(8, "none")


@pytest.mark.parametrize("machine", ["here", "a larger one"])
def test_a_study_with_trials_stays_with_its_quantization(run: runs.Run, machine: str) -> None:
    """Or the trials of hours would be lost to a larger machine."""
    run.save(load=came_down())
    write_journal(run, "bnb_4bit", state=1)
    assert search.first_load(run, WANTED, machine) == Load(6 if machine == "here" else 100, "bnb_4bit")
    # One without a complete trial has nothing to lose.
    write_journal(run, "bnb_4bit", state=0)
    assert search.first_load(run, WANTED, "a larger one") == WANTED


def test_a_study_starts_over_in_4_bits_where_they_are_asked_for(run: runs.Run) -> None:
    write_journal(run, "none", state=1)
    assert search.first_load(run, Load(100, "bnb_4bit"), "here") == Load(100, "bnb_4bit")


def test_what_heretic_reads(run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my prompts").mkdir()
    (tmp_path / "my prompts" / "bad.txt").write_text("one\n", encoding="utf-8")
    heretic: dict[str, Any] = {
        "n_trials": 7,
        "batch_size": 100,
        "quantization": "none",
        "bad_prompts": {"dataset": "my prompts/bad.txt", "prefix": "Please:"},
        "good_prompts": {"dataset": "mlabonne/harmless_alpaca", "split": "train[:400]", "column": "text"},
    }
    found = settings.Settings(heretic, heretic, Gates(), 0.0, False, (), tmp_path)
    config = search.heretic_config(found, run, Load(25, "bnb_4bit"))
    assert config == {
        "n_trials": 7,
        "batch_size": 25,
        "quantization": "bnb_4bit",
        "bad_prompts": {"dataset": str(tmp_path / "my prompts" / "bad.txt"), "prefix": "Please:"},
        "good_prompts": {"dataset": "mlabonne/harmless_alpaca", "split": "train[:400]", "column": "text"},
        "model": "base",
        "study_checkpoint_dir": str(run.checkpoint),
        "export_strategy": "merge",
    }
    assert heretic["bad_prompts"]["dataset"] == "my prompts/bad.txt"  # the settings stay as they were
    assert tomllib.loads(tomli_w.dumps(config)) == config


def test_the_childrens_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERETIC_N_TRIALS", "1")
    monkeypatch.setenv("COLAB_GPU", "1")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("PYTHONPATH", f"images/ablate::{tmp_path / 'scripts'}:")
    made = search.environment()
    assert not [name for name in made if name.startswith(("HERETIC_", "COLAB_", "KAGGLE_"))]
    assert made["CUDA_VISIBLE_DEVICES"] == "1"
    # Their folder is another one, and an empty entry would be it: a run's folder is no place to import from.
    assert made["PYTHONPATH"] == f"{tmp_path / 'images/ablate'}:{tmp_path / 'scripts'}"
    assert made["HF_HUB_DISABLE_TELEMETRY"] == "1"


# --- real runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run of three trials, started and watched as `make ablate` does it, its model saved."""
    run, found = warm.prepare(tmp_path_factory.mktemp("whole"), tiny, n_trials=3)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        index, said = searched(run, found, Load(64, "none"))
    assert index == min(journal.read(run.journal).trials, key=lambda trial: trial.kl_divergence or 0).index
    assert said[-1].startswith("all 3 trials done · best: ")
    assert "about $" in said[-1]
    return run


def test_a_search_ends_with_a_saved_model(whole: runs.Run) -> None:
    assert [trial.state for trial in journal.read(whole.journal).trials] == ["complete"] * 3
    assert (whole.folder / "saving" / "model.safetensors").exists()
    wanted = {"batch_size": 64, "quantization": "none"}
    assert whole.state["load"] == {**wanted, "machine": "a machine", "wanted": wanted}
    assert whole.state["searched_seconds"] > 0
    assert not list(whole.checkpoint.glob("base.jsonl.lock*"))


def test_no_trial_passes(whole: runs.Run, tiny: Tiny, tmp_path: Path, quick: None) -> None:
    run, found = warm.prepare(tmp_path, tiny, n_trials=3)
    shutil.copytree(whole.checkpoint, run.checkpoint, dirs_exist_ok=True)
    index, _ = searched(run, found, Load(64, "none"), gates=replace(ANY, kl_divergence=1e-30))
    assert index is None
    assert warm.figures(run) == warm.figures(whole)


# Memory that runs out for more than LIMIT prompts at once, where weights are held as QUANTIZATIONS says; LIMIT -1: at load.
MEMORY = """
import torch
import heretic.model
quantizations, limit = {quantizations!r}, {limit}
original = heretic.model.Model.generate
def generate(self, prompts, **named):
    loaded = type(self.model).__name__.startswith("Peft")
    if self.settings.quantization.value in quantizations and (len(prompts) > limit if loaded else limit == -1):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore of it")
    return original(self, prompts, **named)
heretic.model.Model.generate = generate
"""
BOTH = ("none", "bnb_4bit")


def steps_of(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith("out of memory")]


def test_memory_that_runs_out_takes_the_batch_down_in_a_real_child(
    whole: runs.Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a person starts it, nothing imported before; sitecustomize.py is run by Python itself."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    run, found = warm.prepare(tmp_path, tiny, n_trials=2)
    before(monkeypatch, tmp_path, MEMORY.format(quantizations=("none",), limit=16))
    index, said = searched(run, found, Load(64, "none"))
    assert index is not None
    assert steps_of(said) == [
        "out of memory at batch with batch_size 64, quantization none: trying again with batch_size 16, quantization none"
    ]
    assert (run.state["load"]["batch_size"], run.state["load"]["quantization"]) == (16, "none")
    assert len(journal.read(run.journal).trials) == 2


def test_the_whole_ladder_down_to_4_bit_weights(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    run, found = warm.prepare(tmp_path, tiny, n_trials=2)
    before(monkeypatch, tmp_path, MEMORY.format(quantizations=("none",), limit=0))
    index, said = searched(run, found, Load(64, "none"))
    assert index is not None
    told = (
        "out of memory at batch with batch_size {}, quantization none: trying again with batch_size {}, quantization {}"
    )
    assert steps_of(said) == [
        told.format(64, 16, "none"), told.format(16, 4, "none"), told.format(4, 1, "none"), told.format(1, 64, "bnb_4bit"),
    ]  # fmt: skip
    stored = journal.read(run.journal).settings
    assert stored
    assert (stored["quantization"], stored["batch_size"]) == ("bnb_4bit", 64)
    assert not any("the search starts over" in line for line in said)  # there was no trial to lose
    # The merged model is of full precision all the same.
    from safetensors import safe_open

    with safe_open(run.folder / "saving" / "model.safetensors", framework="pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def test_where_nothing_is_left_the_card_to_rent_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    run, found = warm.prepare(tmp_path, tiny, n_trials=2)
    before(monkeypatch, tmp_path, MEMORY.format(quantizations=BOTH, limit=0))
    with pytest.raises(Problem) as raised:
        searched(run, found, Load(3, "none"))
    assert raised.value.code == BAD_INPUT
    assert f"Rent {CARD}; the same command goes on there" in str(raised.value)
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in str(raised.value)
    assert "More of it" not in str(raised.value)
    assert str(run.checkpoint) in str(raised.value)
    assert len(steps_of(raised.value.__notes__[0].splitlines())) == 3
    # The same command on a larger machine.
    before(monkeypatch, tmp_path, "")
    index, said = searched(run, found, Load(64, "none"), machine="the card")
    assert index is not None
    assert not steps_of(said)
    assert (run.state["load"]["batch_size"], run.state["load"]["quantization"]) == (64, "none")


def test_weights_that_do_not_fit_are_not_tried_with_smaller_batches(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    run, found = warm.prepare(tmp_path, tiny, n_trials=2)
    before(monkeypatch, tmp_path, MEMORY.format(quantizations=BOTH, limit=-1))
    with pytest.raises(Problem) as raised:
        searched(run, found, Load(64, "none"))
    assert f"Rent {CARD}" in str(raised.value)
    assert steps_of(raised.value.__notes__[0].splitlines()) == [
        "out of memory at load with batch_size 64, quantization none: trying again with batch_size 64, quantization bnb_4bit"
    ]


def test_a_study_goes_on_with_a_smaller_batch_and_is_not_thrown_away_for_other_weights(
    whole: runs.Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    run, found = warm.prepare(tmp_path, tiny, n_trials=4)
    shutil.copytree(whole.checkpoint, run.checkpoint, dirs_exist_ok=True)
    before(monkeypatch, tmp_path, MEMORY.format(quantizations=("none",), limit=16))
    index, said = searched(run, found, Load(64, "none"))
    assert index is not None
    assert len(steps_of(said)) == 1
    assert warm.figures(run)[:3] == warm.figures(whole)
    assert len(warm.figures(run)) == 4
    # Started again, it begins with what went well here.
    index, said = searched(run, found, Load(64, "none"))
    assert index is not None
    assert not steps_of(said)
    # Something else takes the card's memory now: that is no reason to throw four trials away.
    before(monkeypatch, tmp_path, MEMORY.format(quantizations=("none",), limit=-1))
    with pytest.raises(Problem, match="though 4 trials went well before") as raised:
        searched(run, found, Load(64, "none"), n_trials=5)
    assert raised.value.code == TRY_LATER
    assert "nvidia-smi" in str(raised.value)
    assert CARD in str(raised.value)
    assert run.state["load"] is None
    assert len(warm.figures(run)) == 4
    # Asked for, it starts over, and the trials are kept.
    index, said = searched(run, found, Load(64, "bnb_4bit"), n_trials=2)
    assert index is not None
    over = [line for line in said if "the search starts over" in line]
    assert over == [f"the search starts over with bnb_4bit; the trials so far are kept in {run.journal}.1"]
    assert len(journal.read(Path(f"{run.journal}.1")).trials) == 4
    assert [trial.state for trial in journal.read(run.journal).trials] == ["complete"] * 2


def test_a_model_that_cannot_be_merged_needs_main_memory(
    whole: runs.Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    run, found = warm.prepare(tmp_path, tiny, n_trials=3)
    shutil.copytree(whole.checkpoint, run.checkpoint, dirs_exist_ok=True)
    text = "def merged(self): raise MemoryError('no more')\nimport heretic.model\nheretic.model.Model.get_merged_model = merged"
    before(monkeypatch, tmp_path, text)
    with pytest.raises(Problem, match=r"main memory to merge the model \(MemoryError: no more\)") as raised:
        searched(run, found, Load(64, "none"))
    assert raised.value.code == BAD_INPUT
    assert CARD in str(raised.value)
    assert not steps_of(raised.value.__notes__[0].splitlines())


def test_a_killed_search_goes_on(
    whole: runs.Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    run, found = warm.prepare(tmp_path, tiny, n_trials=3)
    before(monkeypatch, tmp_path, warm.KILL.format(number=2))
    with pytest.raises(Problem, match="it was killed, as the system does when main memory runs out") as raised:
        searched(run, found, Load(64, "none"))
    assert raised.value.code == UNEXPECTED
    assert str(run.folder / "heretic.log") in str(raised.value)
    before(monkeypatch, tmp_path, "")
    index, said = searched(run, found, Load(64, "none"))
    assert index is not None
    assert "repaired the journal of the search: trial 2 had not ended: it will run again" in said
    assert warm.figures(run) == warm.figures(whole)


# --- children that end, or do not ----------------------------------------------------------------------------------------

# The first thing that the launcher imports of what Heretic brings: in front of it, seconds before Heretic itself.
HERE = "questionary.py"


def in_front(folder: Path, text: str) -> str:
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / HERE).write_text(text, encoding="utf-8")
    return os.pathsep.join([str(site), os.environ["PYTHONPATH"]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "it was killed, as the system does when main memory runs out"),
        ("raise SystemExit(7)", "it ended with code 7"),
        ("raise ValueError('\\x1b[31mno')", "it ended with code 1"),
    ],
)
def test_a_child_that_says_nothing_is_named(
    run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", in_front(tmp_path, text))
    found = settings.Settings({"batch_size": 4}, {"n_trials": 9}, ANY, 0.0, False, (), tmp_path)
    for _ in range(2):  # an outcome of an earlier start says nothing about this one
        with pytest.raises(Problem) as raised:
            searched(run, found, Load(4, "none"))
        assert raised.value.code == UNEXPECTED
        assert said in str(raised.value)
        assert str(run.folder / "heretic.log") in str(raised.value)
        (run.folder / "outcome.json").write_text('{"ended": "saved", "trial": 1}', encoding="utf-8")


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"op_code":0,"worker_id":"w","study_name":"heretic","directions":[1,1]}\n'
        b'{"op_code":2,"worker_id":"w","study_id":0,"user_attr":{"settings":"{no"}}\n',
        b'{"op_code":2,"user_attr":7}\n',
        b'{"op_code":4}\n{"op_code":8,"trial_id":0,"user_attr":[]}\n',
        os.urandom(200),
    ],
)
def test_a_journal_that_cannot_be_read_is_kept_and_the_search_starts_over(
    run: runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bytes
) -> None:
    run.journal.write_bytes(damaged)
    monkeypatch.setenv("PYTHONPATH", in_front(tmp_path, "raise SystemExit(7)"))
    found = settings.Settings({"batch_size": 4}, {"n_trials": 9}, ANY, 0.0, False, (), tmp_path)
    with pytest.raises(Problem, match="it ended with code 7") as raised:
        searched(run, found, Load(4, "none"))
    assert "repaired the journal of the search: " in raised.value.__notes__[0]
    assert Path(f"{run.journal}.1").read_bytes() == damaged


DRIVER = """
import sys
from pathlib import Path
import runs, search, settings
from gates import Gates
from progress import Reporter
folder = Path(sys.argv[1])
run = runs.find_or_make(folder / "ablations", "m", "0123456789abcdef", None)
found = settings.Settings({"batch_size": 4}, {"n_trials": 9}, Gates(), 0.0, False, (), folder)
with runs.owned(run):
    search.search(
        run, found, search.Load(4, "none"), machine="m", card="a card", usd_per_hour=None, reporter=Reporter()
    )
"""
HANG = """
import os, signal, time
from pathlib import Path
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
Path("half").write_text(str(os.getpid()))
os.rename("half", "child")
while True:
    time.sleep(1000)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_that_hangs_does_not_outlive_its_driver(run: runs.Run, tmp_path: Path, number: int) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        env=environment(PYTHONPATH=in_front(tmp_path, HANG)), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    told, child = run.folder / "child", 0
    try:
        deadline = time.monotonic() + 60
        while not told.exists():
            assert driver.poll() is None, driver.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child = int(told.read_text(encoding="utf-8"))
        assert alive(child)
        assert os.getsid(child) == child  # Ctrl-C in the terminal reaches the driver alone
        driver.send_signal(number)
        driver.communicate(timeout=30)
        deadline = time.monotonic() + 30
        while alive(child):
            assert time.monotonic() < deadline, "the search lives on without its driver"
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.communicate()
        if child and alive(child):
            os.kill(child, signal.SIGKILL)
    with runs.owned(run):  # nothing holds the run any more
        pass
