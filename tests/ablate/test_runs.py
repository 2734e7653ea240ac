# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run is found again by what is ablated with what, has one owner at a time, and keeps its state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support import environment

from common.problems import TRY_LATER, Problem
from runs import Run, find_or_make, fingerprint, identity, owned
from settings import NOT_IDENTITY

HERETIC: dict[str, Any] = {
    "n_trials": 200,
    "seed": 1,
    "batch_size": 100,
    "max_response_length": 100,
    "refusal_markers": ["sorry", "i cannot"],
    "bad_prompts": {"dataset": "a/b", "split": "train[:400]"},
}
KEY = "0123456789abcdef"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def key_of(heretic: dict[str, Any] | None = None, **changes: Any) -> str:
    told = {"source": f"Qwen/Qwen3-14B@{'c' * 40}", "prompts": "p", "version": "1.4.0", **changes}
    return identity(settings=HERETIC if heretic is None else heretic, **told)


# --- identity ------------------------------------------------------------------------------------------------------------


def test_an_identity_is_stable() -> None:
    assert key_of() == key_of()
    assert len(key_of()) == 16
    assert set(key_of()) <= set("0123456789abcdef")
    # Written down: a change of how it is made would orphan the runs that exist.
    assert key_of() == "a9fa2a3ed176591e"
    turned = dict(reversed(HERETIC.items()))
    assert key_of(turned) == key_of()


@pytest.mark.parametrize(
    "changes",
    [
        {"source": f"Qwen/Qwen3-8B@{'c' * 40}"},
        {"source": f"Qwen/Qwen3-14B@{'d' * 40}"},
        {"version": "1.4.1"},
        {"prompts": "q"},
        {"heretic": {**HERETIC, "seed": 2}},
        {"heretic": {**HERETIC, "max_response_length": 101}},
        {"heretic": {**HERETIC, "refusal_markers": ["sorry"]}},
        {"heretic": {**HERETIC, "bad_prompts": {"dataset": "a/b", "split": "train[:401]"}}},
        {"heretic": {key: value for key, value in HERETIC.items() if key != "seed"}},
    ],
)
def test_what_matters_changes_the_identity(changes: dict[str, Any]) -> None:
    assert key_of(**changes) != key_of()


def test_what_changes_the_speed_alone_does_not() -> None:
    assert {"n_trials", "batch_size", "quantization"} <= set(NOT_IDENTITY)
    for name in NOT_IDENTITY:
        assert key_of({**HERETIC, name: "other"}) == key_of()
        assert key_of({key: value for key, value in HERETIC.items() if key != name}) == key_of()


def test_the_fingerprint_of_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    os.utime(weights, ns=(10**18, 10**18))
    found = [fingerprint(tmp_path)]
    (tmp_path / "below").mkdir()  # folders say nothing
    assert fingerprint(tmp_path) == found[0]
    os.utime(weights, ns=(10**18, 10**18 + 1))
    found.append(fingerprint(tmp_path))
    weights.write_bytes(b"12345")
    os.utime(weights, ns=(10**18, 10**18))
    found.append(fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    found.append(fingerprint(tmp_path))
    assert len(set(found)) == 4


# --- folders -------------------------------------------------------------------------------------------------------------


def test_a_run_gets_a_folder_and_is_found_again(tmp_path: Path) -> None:
    made = find_or_make(tmp_path / "new" / "ablations", "Qwen/Qwen3-14B", KEY, None, NOW)
    assert made.name == "20260102T030405Z-qwen3-14b-01234567"
    assert made.checkpoint == made.folder / "checkpoint"
    assert made.checkpoint.is_dir()
    assert made.journal == made.checkpoint / "base.jsonl"
    made.save(load={"batch_size": 4}, step="searched")
    again = find_or_make(tmp_path / "new" / "ablations", "Qwen/Qwen3-14B", KEY, None)
    assert again == made
    assert again.state == {"run": made.name, "identity": KEY, "load": {"batch_size": 4}, "step": "searched"}
    assert [path.name for path in (tmp_path / "new" / "ablations").iterdir()] == [made.name]


def test_the_checkpoint_can_live_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = find_or_make(Path("ablations"), "m", KEY, Path("volume"), NOW)
    assert run.checkpoint == tmp_path / "volume" / run.name
    assert run.checkpoint.is_dir()
    assert run.folder.is_absolute()
    assert not (run.folder / "checkpoint").exists()


def test_another_run_gets_another_folder(tmp_path: Path) -> None:
    one = find_or_make(tmp_path, "m", KEY, None, NOW)
    other = find_or_make(tmp_path, "m", "f" * 16, None, NOW)
    assert one.folder != other.folder


def test_two_identities_with_the_same_beginning_are_kept_apart(tmp_path: Path) -> None:
    one = find_or_make(tmp_path, "m", KEY, None, NOW)
    alike = KEY[:8] + "0" * 8
    other = find_or_make(tmp_path, "m", alike, None, NOW.replace(second=6))
    assert one.folder != other.folder
    assert find_or_make(tmp_path, "m", KEY, None).folder == one.folder
    assert find_or_make(tmp_path, "m", alike, None).folder == other.folder
    assert json.loads((one.folder / "run.json").read_text(encoding="utf-8"))["identity"] == KEY


@pytest.mark.parametrize("damaged", [b"", b'{"identity": "0123', b"[]", b"null", b"\xff\xfe", None])
def test_a_damaged_state_is_begun_anew_in_the_same_folder(tmp_path: Path, damaged: bytes | None) -> None:
    run = find_or_make(tmp_path, "m", KEY, None, NOW)
    run.journal.write_bytes(b"trials")
    if damaged is None:
        (run.folder / "run.json").unlink()
    else:
        (run.folder / "run.json").write_bytes(damaged)
    again = find_or_make(tmp_path, "m", KEY, None)
    assert again.folder == run.folder
    assert again.state == {"run": run.name, "identity": KEY}
    assert json.loads((run.folder / "run.json").read_text(encoding="utf-8")) == again.state
    assert again.journal.read_bytes() == b"trials"


def test_a_file_that_is_named_like_a_run_is_none(tmp_path: Path) -> None:
    (tmp_path / f"notes-{KEY[:8]}").write_text("mine", encoding="utf-8")
    run = find_or_make(tmp_path, "m", KEY, None, NOW)
    assert run.folder.is_dir()
    assert find_or_make(tmp_path, "m", KEY, None).folder == run.folder


@pytest.mark.parametrize("model", ["../../etc/passwd", "a/..", "Qwen/Qwen3 14B; rm -rf", "/models/тест", "x" * 300])
def test_no_model_name_leads_out_of_the_folder(tmp_path: Path, model: str) -> None:
    run = find_or_make(tmp_path / "ablations", model, KEY, None, NOW)
    assert run.folder.parent == (tmp_path / "ablations").resolve()
    assert len(run.name) < 100


def test_a_state_is_on_disk_when_save_returns(tmp_path: Path) -> None:
    run = find_or_make(tmp_path, "m", KEY, None, NOW)
    run.save(step="one")
    run.save(step="two", trial=3)
    assert json.loads((run.folder / "run.json").read_text(encoding="utf-8")) == run.state
    assert run.state["step"] == "two"
    with pytest.raises(ValueError):
        run.save(kl=float("nan"))
    assert "NaN" not in (run.folder / "run.json").read_text(encoding="utf-8")


# --- owners --------------------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from pathlib import Path
from runs import find_or_make, owned
run = find_or_make(Path(sys.argv[1]), "m", "0123456789abcdef", None)
with owned(run):
    run.save(step="half")
    print("owned", flush=True)
    sys.stdin.readline()
    run.save(step="done")
    print("saved", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts another process that owns the run in `tmp_path`."""
    started: list[subprocess.Popen[str]] = []

    def start(stays: float = 60) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path), str(stays)],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "owned\n"
        return process

    yield start
    for process in started:
        with suppress(OSError):
            process.kill()
        process.communicate()


def try_to_own(run: Run) -> bool:
    try:
        with owned(run):
            return True
    except Problem as problem:
        if problem.code != TRY_LATER or run.name not in str(problem):
            raise
        return False


def test_one_owner_at_a_time(tmp_path: Path, owner: Callable[..., subprocess.Popen[str]]) -> None:
    run = find_or_make(tmp_path, "m", KEY, None, NOW)
    process = owner()
    assert not try_to_own(run)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while not try_to_own(run):
        assert time.monotonic() < deadline, "a dead owner still owns the run"
        time.sleep(0.05)
    assert try_to_own(run)  # left again


def test_what_the_owner_saves_is_not_overwritten_and_is_seen_by_the_next(
    tmp_path: Path, owner: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is refused has read the state before the owner's last word; it must neither write nor use what it read."""
    import runs

    find_or_make(tmp_path, "m", KEY, None, NOW)
    process = owner(0)
    real = runs._state
    made: list[dict[str, Any]] = []

    def slow(folder: Path) -> dict[str, Any]:
        state = real(folder)
        if not made:  # the owner saves just after we have read
            assert process.stdin
            assert process.stdout
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "saved\n"
            process.wait()
            made.append(state)
        return state

    monkeypatch.setattr(runs, "_state", slow)
    run = find_or_make(tmp_path, "m", KEY, None)
    assert made[0]["step"] == "half"
    assert real(run.folder)["step"] == "done"
    with owned(run):
        assert run.state["step"] == "done"


def test_an_error_inside_frees_the_run(tmp_path: Path) -> None:
    run = find_or_make(tmp_path, "m", KEY, None, NOW)
    with pytest.raises(ZeroDivisionError), owned(run):
        raise ZeroDivisionError
    assert try_to_own(run)


def test_two_that_start_at_once_get_one_folder(tmp_path: Path) -> None:
    """Both look before either has made it."""
    import threading

    barrier = threading.Barrier(8)
    found: list[Path] = []

    def start() -> None:
        barrier.wait()
        found.append(find_or_make(tmp_path, "m", KEY, None, NOW).folder)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_checkpoint_on_a_volume_is_found_again_on_another_machine(tmp_path: Path) -> None:
    first = find_or_make(tmp_path / "one", "Qwen/Qwen3-14B", "0123456789abcdef", tmp_path / "volume")
    (first.checkpoint / "base.jsonl").write_text("here")
    again = find_or_make(tmp_path / "two", "Qwen/Qwen3-14B", "0123456789abcdef", tmp_path / "volume")
    assert again.name == first.name
    assert again.folder != first.folder
    assert again.journal.read_text() == "here"


def test_the_journals_come_along_when_checkpoints_are_kept_elsewhere(tmp_path: Path) -> None:
    first = find_or_make(tmp_path / "ablations", "m", KEY, None, NOW)
    with owned(first):
        first.journal.write_text("here")
        first.journal.with_name("base.jsonl.1").write_text("before")
    moved = find_or_make(tmp_path / "ablations", "m", KEY, tmp_path / "volume")
    assert moved.checkpoint == tmp_path / "volume" / first.name
    assert (moved.journal.read_text(), moved.journal.with_name("base.jsonl.1").read_text()) == ("here", "before")
    with owned(moved):
        moved.journal.write_text("further")
    back = find_or_make(tmp_path / "ablations", "m", KEY, tmp_path / "another")
    assert back.journal.read_text() == "further"
    # What is there already stays.
    assert find_or_make(tmp_path / "ablations", "m", KEY, None).journal.read_text() == "here"


def test_a_run_has_one_owner_whatever_its_checkpoint(tmp_path: Path) -> None:
    first = find_or_make(tmp_path / "ablations", "m", KEY, None, NOW)
    other = find_or_make(tmp_path / "ablations", "m", KEY, tmp_path / "volume")
    with owned(first), pytest.raises(Problem) as raised, owned(other):
        pass
    assert raised.value.code == TRY_LATER
