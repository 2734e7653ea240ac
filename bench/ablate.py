# SPDX-License-Identifier: AGPL-3.0-or-later
"""What `make ablate`'s search costs and saves beside bare Heretic, on a tiny model that refuses, made on the spot.

    python bench/ablate.py [ROUNDS]              (in the ablate environment, with bench/ and tests/ablate/ beside it)

Bare Heretic is the same installed version in a process whose only addition is that its menus are answered: the trial with
the lowest KL divergence under the refusal gate, save, leave. Both sides are timed as a person waits for them: from the
start of the process to its end, with the merged model saved. Same seed, same prompts, same number of trials. Each kind of
search runs once per round, in turn; a ratio is the median of the rounds' ratios, ours to theirs.

- ablate overhead: same settings, same batch size. The wrapper keeps the garbage collector, which Heretic calls around each
  batch, from looking through all that has been imported: as much time per batch whatever the model, so a large share on
  this one and next to none on a large one. What the rest of the wrapper costs is seen against bare Heretic with a collector
  kept in the same way. Ends with 1 where trials or saved weights differ.
- ablate time to model: Heretic's defaults (it finds a batch size, all trials run) against ours: the batch size of
  config/heretic.toml, without and with early_stop; and against bare Heretic with that batch size, which is what the batch
  size alone gives. A trial counts as run by both where its parameters are the same.
- ablate resume: the driver is killed (-9) in the middle of a trial halfway through, and started again at once, against
  a search that nothing interrupts. Ends with 1 where trials or saved weights differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import journal
import runs
import search
import settings as configuration
from gates import choose
from journal import Trial
from progress import Reporter

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "ablate"))
import tiny

# What config/heretic.toml has: more than the tiny model's 40 evaluation prompts, so that they are one batch.
BATCH_SIZE = 100
# As by default, about the first third is drawn at random.
TRIALS, RANDOM_TRIALS = 16, 5
BARE = """
import gc, os
import questionary
from heretic.main import main

if os.environ["FREEZE"]:
    gc.freeze()

class Answer:
    def __init__(self, value):
        self.value = value
    def ask(self):
        return self.value

saved = False

def select(message, choices, **_):
    values = [getattr(choice, "value", choice) for choice in choices]
    trials = [value for value in values if hasattr(value, "user_attrs")]
    if saved:
        return Answer("")
    if not trials:
        return Answer(values[0])
    good = [trial for trial in trials if trial.user_attrs["refusals"] < int(os.environ["REFUSALS"])]
    return Answer(min(good, key=lambda trial: trial.user_attrs["kl_divergence"]))

def path(message, **_):
    global saved
    saved = True
    return Answer("saving")

questionary.select, questionary.path = select, path
main()
"""


@dataclass(frozen=True)
class Ran:
    """A search that has ended with a saved model."""

    seconds: float  # from the start of its process to its end
    cpu_seconds: float  # of all its processes, but for one that was killed
    before_trials: float  # … to the start of its first trial
    trials: tuple[Trial, ...]
    chosen: Trial
    batch_size: int  # as Heretic recorded it
    weights: dict[str, str]  # file → sha256
    again: int = 0  # trials that were run more than once

    @property
    def trial_seconds(self) -> float:
        """Of a trial, the median."""
        return statistics.median((trial.ended or 0) - (trial.started or 0) for trial in self.trials)


class Watch:
    """Seconds, and CPU seconds of the processes that have ended, since it was made."""

    def __init__(self) -> None:
        self.began, self.start, self.cpu = time.time(), time.perf_counter(), self._cpu()

    @staticmethod
    def _cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def read(self) -> tuple[float, float]:
        """Both, now."""
        return time.perf_counter() - self.start, self._cpu() - self.cpu


class Bench:
    """Where searches run: below `work`, on the model made there."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.environment = {
            **search.environment(),
            "HF_HOME": str(work / "hf-home"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.tiny = tiny.Tiny(work / "tiny")
        self.count = 0
        self._run(str(tiny.__file__), str(self.tiny.folder))
        # Each side imports the same packages: once before, so that the first to be timed does not read them from disk.
        self._run("-c", "import heretic.main")

    def _run(self, *arguments: str) -> None:
        ended = subprocess.run([sys.executable, *arguments], env=self.environment, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"bench/ablate.py: {arguments[0]} ended with code {ended.returncode}\n{ended.stderr[-2000:]}")

    def _folder(self, **overrides: Any) -> Path:
        """A new folder with the settings of a search."""
        self.count += 1
        folder = self.work / f"search-{self.count}"
        folder.mkdir()
        (folder / "heretic.toml").write_text(tiny.toml(self.tiny.folder, **overrides), encoding="utf-8")
        return folder

    def _wait(self, process: subprocess.Popen[bytes], what: str) -> None:
        if code := process.wait():
            sys.exit(f"bench/ablate.py: {what} ended with code {code}\n{self._last_words()}")

    def _last_words(self) -> str:
        logs = sorted(self.work.glob("search-*/**/*.log"), key=lambda log: log.stat().st_mtime)
        return "\n".join(log.read_text(encoding="utf-8", errors="replace")[-1000:] for log in logs[-2:])

    def bare(self, freeze: bool = False, **overrides: Any) -> Ran:
        """Heretic alone; with `freeze`, its garbage collector does not look through what was imported."""
        import tomli_w

        folder = self._folder(**overrides)
        settings = configuration.load(folder / "heretic.toml")
        run = runs.Run(folder, folder / "checkpoint")
        own = {"model": "base", "study_checkpoint_dir": str(run.checkpoint), "export_strategy": "merge"}
        (folder / "config.toml").write_text(tomli_w.dumps({**settings.heretic, **own}), encoding="utf-8")
        (folder / "base").symlink_to(self.tiny.model)
        environment = {**self.environment, "REFUSALS": str(settings.gates.refusals), "FREEZE": "1" if freeze else ""}
        watch = Watch()
        with (folder / "bare.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", BARE],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            self._wait(process, "bare Heretic")
        return self._ran(run, settings, watch)

    def ours(self, kill: bool = False, **overrides: Any) -> Ran:
        """The search of `make ablate`; with `kill`, killed in the middle of a trial halfway through and started again."""
        folder = self._folder(**overrides)
        settings = configuration.load(folder / "heretic.toml")
        watch = Watch()
        process = self._drive(folder)
        begun, killed = 0, 0.0
        if kill:
            self._until_halfway(process, folder, int(settings.heretic["n_trials"]) // 2)
            process.kill()
            process.wait()
            begun, killed = len(_journal(folder).trials), time.time()
            process = self._drive(folder)
        self._wait(process, "the search")
        ran = self._ran(runs.find_or_make(folder, "tiny", KEY, None), settings, watch)
        # Those that are in the study from before the kill were not run again; the others that had begun were.
        kept = sum((trial.started or 0) < killed for trial in ran.trials)
        return replace(ran, again=begun - kept) if kill else ran

    def _drive(self, folder: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(Path(__file__).resolve()), "--drive", str(folder), str(self.tiny.model)]
        with (folder / "driver.log").open("ab") as log:
            return subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )  # fmt: skip

    def _until_halfway(self, process: subprocess.Popen[bytes], folder: Path, number: int) -> None:
        """Wait until the trial after the first `number` is about half done."""
        while process.poll() is None:
            trials = _journal(folder).trials
            if len(trials) > number:
                done = [trial.ended - trial.started for trial in trials if trial.ended and trial.started]
                time.sleep(statistics.median(done) / 2)
                return
            time.sleep(0.02)
        self._wait(process, "the search")
        sys.exit("bench/ablate.py: the search ended before it could be killed")

    def _ran(self, run: runs.Run, settings: configuration.Settings, watch: Watch) -> Ran:
        seconds, cpu_seconds = watch.read()
        found = journal.read(run.journal)
        weights = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted((run.folder / "saving").glob("*.safetensors"))
        }
        chosen = choose(found.trials, settings.gates)
        if not (weights and chosen and found.settings and found.trials[0].started):
            sys.exit(f"bench/ablate.py: no model was saved\n{self._last_words()}")
        return Ran(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            before_trials=found.trials[0].started - watch.began,
            trials=found.trials,
            chosen=chosen,
            batch_size=found.settings["batch_size"],
            weights=weights,
        )


KEY = "0123456789abcdef"  # of the one run in a folder


def _journal(folder: Path) -> journal.Journal:
    """The journal of the run in a folder, empty before there is one."""
    return journal.read(next(folder.glob("*/checkpoint/base.jsonl"), folder / "none"))


def drive(folder: Path, model: Path) -> None:
    """What `make ablate` does between preflight and verification, on settings and a model that are here."""
    settings = configuration.load(folder / "heretic.toml")
    run = runs.find_or_make(folder, "tiny", KEY, None)
    base = run.folder / "base"
    if not base.is_symlink():
        base.symlink_to(model)
    wanted = search.Load(settings.heretic["batch_size"], "none")
    with runs.owned(run):
        index = search.search(
            run, settings, wanted, machine="CPU", card="a card", usd_per_hour=None, reporter=Reporter(every=10)
        )  # fmt: skip
    if index is None:
        sys.exit("no trial passes the gates")


def outcome(trial: Trial) -> str:
    """What makes a trial, to the last digit: its parameters and what was measured."""
    return repr(
        (trial.index, trial.state, trial.direction_index, trial.parameters, trial.refusals, trial.kl_divergence)
    )


def must_agree(what: str, one: Ran, other: Ran) -> None:
    """Ends the program where two searches differ in a trial, in their number, or in the saved weights."""
    if [*map(outcome, one.trials)] != [*map(outcome, other.trials)]:
        sys.exit(f"bench/ablate.py: {what}: the trials differ")
    if one.weights != other.weights:
        sys.exit(f"bench/ablate.py: {what}: the saved weights differ")


def agreement(ours: Sequence[Ran], theirs: Sequence[Ran]) -> dict[str, Any]:
    """How far the trials that both ran agree: those with the same parameters at the same place of a round's searches."""
    pairs = [
        pair
        for one, two in zip(ours, theirs, strict=True)
        for pair in zip(one.trials, two.trials, strict=False)  # early_stop runs fewer
    ]
    both = [
        (mine, other)
        for mine, other in pairs
        if (mine.direction_index, mine.parameters) == (other.direction_index, other.parameters)
    ]
    refusals = [abs((mine.refusals or 0) - (other.refusals or 0)) for mine, other in both]
    kl = [abs((mine.kl_divergence or 0) - (other.kl_divergence or 0)) for mine, other in both]
    return {
        "trials_compared": len(pairs),
        "trials_of_both": len(both),
        "identical": not any(refusals) and not any(kl),
        "largest_difference": {"refusals": max(refusals, default=None), "kl_divergence": max(kl, default=None)},
    }


def median(ran: Sequence[Ran], figure: Callable[[Ran], float] = lambda one: one.seconds, digits: int = 2) -> float:
    """Of a figure over the rounds."""
    return round(statistics.median(map(figure, ran)), digits)


def ratio(
    ours: Sequence[Ran], theirs: Sequence[Ran], figure: Callable[[Ran], float] = lambda one: one.seconds
) -> float:
    """Median of the rounds' ratios of a figure, ours to theirs."""
    return round(statistics.median(figure(one) / figure(two) for one, two in zip(ours, theirs, strict=True)), 3)


def interleaved(rounds: int, kinds: dict[str, Callable[[], Ran]]) -> dict[str, list[Ran]]:
    """Run each kind once per round, each round beginning with the next kind."""
    done: dict[str, list[Ran]] = {name: [] for name in kinds}
    names = list(kinds)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            done[name].append(kinds[name]())
            print(
                f"round {number + 1} of {rounds}: {name}: {done[name][-1].seconds:.1f} s", file=sys.stderr, flush=True
            )
    return done


def cpu(ran: Ran) -> float:
    """Says what a search costs where other programs disturb the clock."""
    return ran.cpu_seconds


def overhead(ours: list[Ran], bare: list[Ran], frozen: list[Ran]) -> dict[str, Any]:
    """The wrapper beside bare Heretic, and beside it with the garbage collector kept as ours is."""
    return {
        "bench": "ablate overhead",
        "rounds": len(ours),
        "trials": TRIALS,
        "ours_seconds": median(ours),
        "bare_seconds": median(bare),
        "ratio": ratio(ours, bare),
        "bare_same_collector_seconds": median(frozen),
        "ratio_same_collector": ratio(ours, frozen),
        "ours_cpu_seconds": median(ours, cpu),
        "bare_cpu_seconds": median(bare, cpu),
        "cpu_ratio": ratio(ours, bare, cpu),
        "bare_same_collector_cpu_seconds": median(frozen, cpu),
        "cpu_ratio_same_collector": ratio(ours, frozen, cpu),
        "same_trials": True,  # must_agree has seen to it
        "same_weights": True,
    }


def resume(killed: list[Ran], ours: list[Ran]) -> dict[str, Any]:
    """What a kill costs. Of the time lost, most is a second start, and half a trial is what the kill comes after."""
    lost = [one.seconds - two.seconds for one, two in zip(killed, ours, strict=True)]
    return {
        "bench": "ablate resume",
        "rounds": len(ours),
        "trials": TRIALS,
        "killed_seconds": median(killed),
        "uninterrupted_seconds": median(ours),
        "lost_seconds": round(statistics.median(lost), 2),
        "start_seconds": median(ours, lambda one: one.before_trials),
        "trial_seconds": median(ours, lambda one: one.trial_seconds),
        "trials_run_twice": max(one.again for one in killed),
        "same_trials": True,
        "same_weights": True,
    }


def time_to_model(ours: list[Ran], defaults: list[Ran], bare: list[Ran], early_stop: bool) -> dict[str, Any]:
    """Ours beside Heretic's defaults. `bare`: Heretic with our batch size."""
    tuning = [one.before_trials - two.before_trials for one, two in zip(defaults, bare, strict=True)]
    trial = statistics.median(one.trial_seconds for one in defaults)
    return {
        "bench": "ablate time to model",
        "early_stop": early_stop,
        "rounds": len(ours),
        "ours_seconds": median(ours),
        "defaults_seconds": median(defaults),
        "ratio": ratio(ours, defaults),
        "cpu_ratio": ratio(ours, defaults, cpu),
        "ratio_batch_size_alone": ratio(bare, defaults),
        "cpu_ratio_batch_size_alone": ratio(bare, defaults, cpu),
        # As many trials whatever their number: of 200, a smaller share.
        "tuning_in_trials": round(statistics.median(tuning) / trial, 1),
        "ours_trials": len(ours[0].trials),
        "defaults_trials": len(defaults[0].trials),
        "ours_batch_size": ours[0].batch_size,
        "defaults_batch_sizes": [one.batch_size for one in defaults],
        "ours_chosen": chosen(ours[0]),
        "defaults_chosen": chosen(defaults[0]),
        **agreement(ours, defaults),
    }


def chosen(ran: Ran) -> dict[str, Any]:
    """The trial that became the model."""
    trial = ran.chosen
    return {"trial": trial.index, "refusals": trial.refusals, "kl_divergence": trial.kl_divergence}


def main(rounds: int) -> None:
    """Measure and print."""
    same: dict[str, Any] = {"n_trials": TRIALS, "n_startup_trials": RANDOM_TRIALS, "batch_size": BATCH_SIZE}
    with tempfile.TemporaryDirectory() as folder:
        print("making a tiny model that refuses", file=sys.stderr, flush=True)
        bench = Bench(Path(folder).resolve())
        done = interleaved(
            rounds,
            {
                "bare": lambda: bench.bare(**same),
                "ours": lambda: bench.ours(**same),
                "bare, same collector": lambda: bench.bare(freeze=True, **same),
                "ours, killed": lambda: bench.ours(kill=True, **same),
                "defaults": lambda: bench.bare(**{**same, "batch_size": 0}),
                "ours, early_stop": lambda: bench.ours(**same, budget={"early_stop": True}),
            },
        )
    bare, ours, defaults = done["bare"], done["ours"], done["defaults"]
    for name in ("bare", "ours", "bare, same collector", "ours, killed"):
        for one in done[name]:
            must_agree(f"{name} and bare", one, bare[0])
    for result in (
        overhead(ours, bare, done["bare, same collector"]),
        time_to_model(ours, defaults, bare, early_stop=False),
        time_to_model(done["ours, early_stop"], defaults, bare, early_stop=True),
        resume(done["ours, killed"], ours),
    ):
        print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        started = time.monotonic()
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
        load = os.getloadavg()[0]
        print(f"took {time.monotonic() - started:.0f} s; load of the machine at the end {load:.1f}", file=sys.stderr)
