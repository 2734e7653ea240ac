# SPDX-License-Identifier: AGPL-3.0-or-later
"""Real runs of Heretic for tests, in processes that have imported it already: those eight seconds are paid once.

A server imports Heretic and nothing else; each process is a fork of it, with its own folder, environment, streams and
session, and runs `python -m MODULE` as `subprocess.Popen` would. A sitecustomize.py in the first folder of its PYTHONPATH is
run before, as Python would. What goes wrong in a test (memory that runs out, a power cut) is such a file.
"""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny as tiny_module
import tomli_w
from support import environment

import journal
import launcher
import runs
import search
import settings
from gates import Gates

LIMIT = 110.0  # seconds for a process
KEY = "0123456789abcdef"


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["heretic.main"])
    with pytest.MonkeyPatch.context() as patch:
        # Of what the server has, its children keep what is read at import.
        for name, value in environment(COLUMNS="160").items():
            patch.setenv(name, value)
        context.Process(target=int).start()
    return context


class Popen:
    """The part of subprocess.Popen that the search uses; `arguments` end in -m MODULE ARGUMENT…"""

    def __init__(
        self,
        arguments: list[str],
        *,
        cwd: Path,
        env: dict[str, str],
        stdin: int,
        stdout: Any,
        stderr: Any,
        start_new_session: bool,
    ) -> None:
        assert stdin == subprocess.PIPE
        assert stdout is stderr
        assert start_new_session
        module, *rest = arguments[arguments.index("-m") + 1 :]
        ours, self.stdin = _server().Pipe(duplex=False)
        self.process = _server().Process(
            target=_run, args=(module, [module, *rest], str(cwd), env, ours, os.path.realpath(stdout.name)), daemon=True
        )
        self.process.start()
        ours.close()

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal. Raises subprocess.TimeoutExpired."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("warm", timeout or 0)
        return int(self.process.exitcode)

    def kill(self) -> None:
        if self.process.exitcode is None:
            self.process.kill()


# For `monkeypatch.setattr(search, "subprocess", warm.SUBPROCESS)`.
SUBPROCESS = SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)


def _run(module: str, arguments: list[str], cwd: str, env: dict[str, str], stdin: Any, log: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stdin.fileno(), 0)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (open as long as the process)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    folders = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:0] = folders
    custom = Path(folders[0]) / "sitecustomize.py"
    if custom.exists():
        exec(compile(custom.read_text(encoding="utf-8"), custom, "exec"), {"__name__": "sitecustomize"})  # noqa: S102
    sys.argv = arguments
    # Heretic collects garbage all the time, and half a second each time in what was imported.
    gc.freeze()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


# --- runs ------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, tiny: tiny_module.Tiny, **overrides: Any) -> tuple[runs.Run, settings.Settings]:
    """A run of the tiny model in `folder`, and its settings; `overrides` as for tiny.toml, 6 trials of them 3 at random."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "heretic.toml"
    path.write_text(
        tiny_module.toml(tiny.folder, **{"n_trials": 6, "n_startup_trials": 3, **overrides}), encoding="utf-8"
    )
    run = runs.find_or_make(folder / "ablations", "tiny", KEY, None)
    if not (run.folder / "base").is_symlink():
        (run.folder / "base").symlink_to(tiny.model)
    return run, settings.load(path)


def custom(folder: Path, text: str) -> dict[str, str]:
    """An environment in which Python runs `text` at its start."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(text, encoding="utf-8")
    return environment(PYTHONPATH=os.pathsep.join([str(site), os.environ["PYTHONPATH"]]))


def launch(
    run: runs.Run,
    found: settings.Settings,
    *,
    gates: Gates | None = None,
    timeout: float = 0,
    early_stop: bool = False,
    text: str = "",
    **changes: Any,
) -> dict[str, Any] | int:
    """Run the launcher once, with `text` run before it and `changes` of config.toml (None: left out).

    Returns its outcome, or its exit code where it wrote none.
    """
    load = search.Load(found.heretic["batch_size"], "none")
    config = {**search.heretic_config(found, run, load), **changes}
    config = {name: value for name, value in config.items() if value is not None}
    (run.folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    outcome = run.folder / "outcome.json"
    outcome.unlink(missing_ok=True)
    plan = launcher.plan_of(gates or found.gates, timeout, early_stop, str(run.folder / "saving"), str(outcome))
    (run.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with (run.folder / "heretic.log").open("ab") as log:
        process = Popen(
            ["-m", "launcher", str(run.folder / "plan.json")],
            cwd=run.folder,
            env=custom(run.folder, text),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        code = process.wait(LIMIT)
    finally:
        process.kill()
    if not outcome.exists():
        return code
    ended: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
    return ended


def figures(run: runs.Run) -> list[tuple[Any, ...]]:
    """What each trial is and came to, without its times."""
    return [
        (trial.index, trial.state, trial.direction_index, trial.parameters, trial.refusals, trial.kl_divergence)
        for trial in journal.read(run.journal).trials
    ]


def log_of(run: runs.Run) -> str:
    return (run.folder / "heretic.log").read_text(encoding="utf-8")


# Kills the process in the middle of its trial NUMBER, when the score is known and not yet written.
KILL = """
import os, signal
import heretic.evaluator
original = heretic.evaluator.Evaluator.get_score
calls = []
def get_score(self):
    calls.append(1)
    score = original(self)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return score
heretic.evaluator.Evaluator.get_score = get_score
"""
