# SPDX-License-Identifier: AGPL-3.0-or-later
"""`make ablate`: from a model id to a verified, private repository, without a person.

    python -m ablate              preflight → search → two forms → verification → publication
    python -m ablate --preflight  only says what is needed and what is here
    python -m ablate --verify     only measures ABLATED against MODEL

Everything comes from the environment and config/heretic.toml. Each step looks whether it has been done already, so that
the same command goes on after whatever has ended it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import journal
import prompt_sets
import settings as configuration
import verify as verification
from common.files import to_json, write_atomic
from common.problems import BAD_INPUT, FLAGGED, OK, REMOTE_FAILED, TRY_LATER, UNCHECKED, UNEXPECTED, Problem, run
from common.text import clean, slug
from gates import choose
from hardware import gigabytes
from licences import is_licence_file
from preflight import Preflight, preflight, table
from progress import Reporter
from runs import Run, find_or_make, fingerprint, identity, owned
from search import Load, environment, search

FORMS = ("bf16", "nf4")
FOLDERS = {"bf16": "model", "nf4": "nf4"}
UPLOAD_BYTES_PER_SECOND = 200_000  # slower than this, an upload has stalled


def say(message: str) -> None:
    """A line of progress. stdout is for the result."""
    print(clean(message), file=sys.stderr, flush=True)


def flag(name: str, default: bool) -> bool:
    """An environment variable that is 1 or 0. Raises Problem."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise Problem(f"{name} must be 1 or 0, not {value!r}")
    return value == "1" if value else default


def main() -> int:
    """The command line: see the module. Raises Problem."""
    wanted = sys.argv[1:]
    if wanted not in ([], ["--preflight"], ["--verify"]):
        raise Problem("usage: python -m ablate [--preflight | --verify]")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    settings = configuration.load()
    for note in settings.notes:
        say(f"{settings.path}: {note}")
    model = os.environ.get("MODEL", "").strip()
    if not model:
        raise Problem("MODEL is not set. Try: make ablate MODEL=Qwen/Qwen3-14B")
    if wanted == ["--verify"]:
        return verify(model, os.environ.get("ABLATED", "").strip(), settings)
    base = Path(os.environ.get("ABLATIONS_DIR") or "ablations")
    found = preflight(
        model,
        settings_quantization=settings.heretic.get("quantization", "none"),
        repo=os.environ.get("REPO", "").strip() or None,
        publish=flag("PUBLISH", True),
        public=flag("PUBLIC", False),
        token=os.environ.get("HF_TOKEN") or None,
        work=base,
        hf_home=Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"),
    )
    print(table(found))
    found.check()
    prompts = prompt_sets.read(settings)
    if wanted:
        return OK
    return ablate(found, settings, base, prompts)


def ablate(found: Preflight, settings: configuration.Settings, base: Path, prompts: str) -> int:
    """Everything after preflight. `prompts`: their digest. Raises Problem."""
    from fetch import resolve

    folder, _, commit = resolve(found.source, found.files)
    heretic = version("heretic-llm")
    source = f"{found.model}@{commit}" if commit else fingerprint(folder)
    key = identity(source, settings.full, prompts, heretic)
    checkpoints = os.environ.get("CHECKPOINT_DIR")
    work = find_or_make(base, found.model, key, Path(checkpoints) if checkpoints else None)
    with owned(work):
        others = [run for run in base.glob(f"*-{slug(found.model.rsplit('/', 1)[-1])}-*") if run.name != work.name]
        if "model" not in work.state and others:
            say(
                f"this is a new run: the model, its commit, a setting or a prompt differs from {sorted(others)[-1].name}"
            )
        say(f"run {work.name} in {base / work.name}")
        work.save(
            model=found.model if commit else folder.name,  # a path tells too much
            commit=commit,
            licence={
                "id": found.licence.id,
                "name": found.licence_name,
                "link": found.licence_link,
                "notice": found.licence.notice,
                "files": found.licence_files,
            },
            heretic=heretic,
            seed=settings.heretic.get("seed"),
            n_trials=settings.full["n_trials"],
        )
        _link(work.folder / "base", folder)
        if not _search(work, found, settings):
            return _no_trial(work, settings)
        if not _measure(work, settings):
            say(
                f"a gate was missed: nothing is published. The report: {base / work.name / 'report.json'}. Another trial may "
                f'pass: raise n_trials, or set choice = "fewest_refusals", in {settings.path}; the same command goes on'
            )
            return FLAGGED
        if found.repo is None:
            say("PUBLISH=0: nothing is published")
            print(f"verified: {base / work.name / 'model'} and {base / work.name / 'nf4'}")
            return OK
        _publish(work, found, settings, folder)
    return OK


def _link(link: Path, target: Path) -> None:
    """Heretic knows the model as `base`: its journal is found again whichever machine's cache holds the files."""
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target.resolve(), target_is_directory=True)


def _asked(settings: configuration.Settings) -> dict[str, Any]:
    """What decides when the search ends and which trial is chosen."""
    gates = settings.gates
    return {
        "refusals": [gates.refusals, gates.of],
        "kl_divergence": gates.kl_divergence,
        "choice": gates.choice,
        "n_trials": settings.full["n_trials"],
        "timeout": settings.timeout,
        "early_stop": settings.early_stop,
    }


def _search(work: Run, found: Preflight, settings: configuration.Settings) -> bool:
    """Search and save the chosen model to model/, unless that has been done. False: no trial passes the gates."""
    model = work.folder / "model"
    trials = journal.read(work.journal).trials
    complete = sum(trial.state == "complete" for trial in trials)
    chosen = choose(trials, settings.gates)
    ended = complete >= settings.full["n_trials"]
    if _is_there(model, work):
        # The same is asked, or something else that leads to the same trial.
        same = ended and chosen is not None and chosen.index == work.state["trial"]["index"]
        if work.state.get("asked") == _asked(settings) or same:
            work.save(asked=_asked(settings))
            say(f"the search has ended before: trial {work.state['trial']['index']} is saved")
            return True
    work.save(
        asked=None, trial=None, complete_trials=complete
    )  # first: what is half removed must not be taken for whole
    for old in ("saving", "quantising", *FOLDERS.values()):
        shutil.rmtree(work.folder / old, ignore_errors=True)
    if ended and chosen is None:
        return False
    wanted = Load(settings.heretic.get("batch_size", 0), found.quantization)
    try:
        index = search(
            work, settings, wanted, machine=found.machine, card=found.card, usd_per_hour=_price(found), reporter=Reporter(),
        )  # fmt: skip
    finally:
        trials = journal.read(work.journal).trials
        chosen = choose(trials, settings.gates)
        if trials:
            import pareto

            with suppress(OSError):  # a picture is not worth the run
                pareto.write(work.folder, trials, settings.gates, chosen, title=found.model)
    work.save(complete_trials=sum(trial.state == "complete" for trial in trials))
    if index is None:
        return False
    trial = next(trial for trial in trials if trial.index == index)
    _child(work.folder / "steps.log", "weights", "bf16", str(work.folder / "saving"))
    os.sync()  # the weights before the name that says they are there
    os.replace(work.folder / "saving", model)
    work.save(trial=asdict(trial), asked=_asked(settings))
    return True


def _is_there(model: Path, work: Run) -> bool:
    """Is the saved model there, and whole? Leftovers of an interrupted publication are removed."""
    if not model.is_dir() or not work.state.get("trial"):
        return False
    for folder in FOLDERS.values():
        for left in (work.folder / folder).glob(".*"):
            if left.is_file():
                left.unlink()
    try:
        _model_sums(model)
    except Problem as problem:
        say(f"the saved model is damaged ({problem}): it is made again")
        return False
    return True


def _price(found: Preflight) -> float | None:
    """US dollars per hour, where this machine is the card that the price is for."""
    machine = found.machine.replace(" ", "").replace("-", "").lower()
    fits = all(word.lower() in machine for word in found.card.split())
    return found.usd_per_hour if fits else None


def _no_trial(work: Run, settings: configuration.Settings) -> int:
    """Say what came closest, and keep it as a report."""
    from progress import best, result

    trials = journal.read(work.journal).trials
    closest = best(trials, settings.gates)
    said = f"the closest was trial {closest.index}: {result(closest)}" if closest else "none was complete"
    report = {
        "run": work.name,
        "heretic": work.state["heretic"],
        "base": {"id": work.state["model"], "commit": work.state["commit"]},
        "gates": asdict(settings.gates),
        "forms": {},
        "complete_trials": work.state["complete_trials"],
        "closest": asdict(closest) if closest else None,
        "passed": False,
    }
    write_atomic(work.folder / "report.json", json_safe(report))
    say(
        f"no trial of {len(trials)} passes the gates; {said}. Nothing is saved or published. More trials may find one: raise "
        f"n_trials in {settings.path}, and the same command goes on. The trials: {work.folder / 'pareto.html'}"
    )
    return FLAGGED


def json_safe(value: dict[str, Any]) -> str:
    """JSON with null where a figure is not a number."""
    return to_json(json.loads(json.dumps(value), parse_constant=lambda _: None))


def _child(
    log: Path | None, module: str, *arguments: str, deadline: float | None = None, ok: tuple[int, ...] = (OK,)
) -> tuple[int, str]:
    """Run one of our modules in a process of its own. Returns its exit code and its stdout.

    What else it says goes to `log`, or, without one, to the terminal. Raises Problem where its code is not in `ok`.
    """
    begin = log.stat().st_size if log and log.exists() else 0
    # Its stdin closes when this process ends, however it ends, and it ends itself then.
    stdin, held = os.pipe()
    with open(log, "ab") if log else nullcontext() as file, os.fdopen(stdin), os.fdopen(held, "wb"):
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", module, *arguments], env=environment(), stdin=stdin,
                stdout=subprocess.PIPE, stderr=file, timeout=deadline, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Problem(
                f"{module} did not end within {deadline:.0f} s and was ended. The same command tries again", TRY_LATER
            ) from None
    if done.returncode not in ok:
        known = done.returncode in (BAD_INPUT, UNCHECKED, REMOTE_FAILED, TRY_LATER)
        words = f"{module} ended with code {done.returncode}; the lines above say why"
        if log:
            said = log.read_bytes()[begin:].decode(errors="replace").strip()
            # A Problem of its own is a whole message; anything else is a traceback, of which the end tells most.
            at = said.rfind("error: ") if known else -1
            words = said[at + len("error: ") :] if at >= 0 else " ".join(said.splitlines()[-1:])
            words = f"{module}: {words or f'ended with code {done.returncode}'} (its log: {log})"
        raise Problem(words, done.returncode if known else UNEXPECTED)
    return done.returncode, done.stdout


def _model_sums(folder: Path) -> dict[str, str]:
    """The sha256 of each file that makes the model: not of those that are written beside it for publication."""
    import manifest

    beside = ("README.md", "NOTICE", "report.json", "heretic.toml")
    sums = manifest.build(folder).items()
    return {name: digest for name, digest in sums if name not in beside and not is_licence_file(name)}


def _yardsticks() -> dict[str, str]:
    """The sha256 of what models are measured with: other questions or counting make another measurement."""
    folder = Path(__file__).parent
    files = ("data/benign.txt", "data/neutral.txt", "measures.py", "verify.py")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}


def _verified(
    work: Path,
    base: Path,
    ablated: Path,
    form: str,
    settings: configuration.Settings,
    heretic: dict[str, Any],
    sums: dict[str, str],
) -> dict[str, Any]:
    """Measure one form in a fresh process, with smaller batches where memory runs out. Returns its part of the report.

    `heretic`: Heretic's settings for it. `sums`: the sha256 of the model's files. The same bytes, measured before with the
    same settings, are not measured again.
    """
    import tomli_w

    part, asked = work / f"verification-{form}.json", work / f"verification-{form}.toml"
    told = "".join(f"# {digest}  {name}\n" for name, digest in {**sums, **_yardsticks()}.items())
    wanted = told + tomli_w.dumps({**heretic, "gates": asdict(settings.gates)})
    if part.exists() and asked.exists() and asked.read_text(encoding="utf-8") == wanted:
        say(f"{form}: verified before")
    else:
        part.unlink(missing_ok=True)
        say(f"{form}: measuring the saved model against its base")
        batch_size = heretic.get("batch_size", 0)
        while True:
            asked.write_text(tomli_w.dumps({**heretic, "batch_size": batch_size, "gates": asdict(settings.gates)}))
            code, _ = _child(
                work / "steps.log", "verify", str(base), str(ablated), "--form", form, "--config", str(asked), "--report", str(part),
                ok=(OK, FLAGGED, verification.OUT_OF_MEMORY, -signal.SIGKILL),
            )  # fmt: skip
            # Killed: as the system does when main memory runs out.
            if code not in (verification.OUT_OF_MEMORY, -signal.SIGKILL):
                break
            if batch_size == 1:
                raise Problem(
                    "there is not enough memory to verify the model, even with batch_size 1: rent a larger card, or set "
                    f'quantization = "bnb_4bit" in {settings.path}'
                )
            batch_size = max(1, batch_size // 4)
            say(f"{form}: out of memory; trying again with batch_size {batch_size}")
        asked.write_text(wanted, encoding="utf-8")
    found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    return {**found, "files": sums}


def _measure(work: Run, settings: configuration.Settings) -> bool:
    """Make the second form, verify both, and write report.json. False: a gate was missed."""
    taken = journal.read(work.journal).settings or {}
    heretic = {
        **prompt_sets.absolute(settings.heretic),
        "batch_size": work.state["load"]["batch_size"],
        # Heretic has found it; it need not be found again.
        **({"response_prefix": taken["response_prefix"]} if taken.get("response_prefix") is not None else {}),
        # As in the search: a base that only fits in 4 bits does so here.
        "quantization": work.state["load"]["quantization"],
    }
    forms: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        folder = work.folder / FOLDERS[form]
        if form == "nf4" and not folder.is_dir():
            say("nf4: quantising")
            making = work.folder / "quantising"
            shutil.rmtree(making, ignore_errors=True)
            _child(work.folder / "steps.log", "weights", "nf4", str(work.folder / FOLDERS["bf16"]), str(making))
            os.sync()
            os.replace(making, folder)
        forms[form] = _verified(work.folder, work.folder / "base", folder, form, settings, heretic, _model_sums(folder))
        forms[form]["base_held_in"] = "nf4" if heretic["quantization"] == "bnb_4bit" else "full precision"
        if not forms[form]["passed"]:
            break
    base = {"id": work.state["model"], "commit": work.state["commit"]}
    report = verification.assemble({"run": work.name, "base": base, "ablated": None}, forms, settings.gates)
    report = _first_written(report, work.folder / "report.json")
    write_atomic(work.folder / "report.json", to_json(report))
    print(verification.render(report))
    return bool(report["passed"])


def _first_written(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """The report that is there already, where only its time differs: what is published once stays the same."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return report
    same = isinstance(earlier, dict) and {**earlier, "written": None} == {**report, "written": None}
    return earlier if same else report


def _tag(work: Run, report: dict[str, Any]) -> str:
    """verified-<run> for the first report of a run, verified-<run>.2 for the next (other gates, more trials) …"""
    digest = hashlib.sha256(to_json(report).encode()).hexdigest()
    reports = [*work.state.get("reports", [])]
    if digest not in reports:
        reports.append(digest)
        work.save(reports=reports)
    number = reports.index(digest) + 1
    return f"verified-{work.name}" + (f".{number}" if number > 1 else "")


def _complete(
    folder: Path,
    form: str,
    work: Run,
    found: Preflight,
    settings: configuration.Settings,
    base: Path,
    report: dict[str, Any],
) -> None:
    """Write what goes beside the model: licence, card, report, settings, and the manifest of it all."""
    import tomli_w

    import card
    import manifest

    (folder / manifest.NAME).unlink(missing_ok=True)
    carried = [name for name in found.licence_files if (base / name).is_file()]
    for name in carried:
        shutil.copyfile(base / name, folder / name)
    if found.licence.notice_file and not (folder / "NOTICE").exists():
        write_atomic(folder / "NOTICE", found.licence.notice_file)
    taken = {**settings.heretic, "seed": (journal.read(work.journal).settings or work.state).get("seed")}
    for name in prompt_sets.NAMES:
        if name in taken and Path(taken[name]["dataset"]).exists():
            taken[name] = {**taken[name], "dataset": Path(taken[name]["dataset"]).name}  # a path tells too much
    budget = {"timeout": settings.timeout, "early_stop": settings.early_stop}
    tables = {**taken, "gates": asdict(settings.gates), "budget": budget}
    write_atomic(
        folder / "heretic.toml", tomli_w.dumps({key: value for key, value in tables.items() if value is not None})
    )
    write_atomic(folder / "report.json", to_json(report))
    facts = {
        **work.state,
        "seed": taken["seed"],
        "quantization": work.state["load"]["quantization"],
        "licence": {**work.state["licence"], "files": carried},
    }
    write_atomic(folder / "README.md", card.render(report, facts, form))
    manifest.write(folder)


def _publish(work: Run, found: Preflight, settings: configuration.Settings, base: Path) -> None:
    """Complete both folders and publish each; prints what stage 2 pins."""
    import manifest

    report = json.loads((work.folder / "report.json").read_text(encoding="utf-8"))
    repos = {"bf16": found.repo or "", "nf4": found.nf4_repo or ""}
    tag = _tag(work, report)
    commits: dict[str, str] = {}
    for form in FORMS:
        folder = work.folder / FOLDERS[form]
        # Written once: an update of this program between two attempts must not change what may be half published.
        written = work.state.get("written", {})
        if written.get(form) != tag or not (folder / manifest.NAME).exists():
            _complete(folder, form, work, found, settings, base, report)
            work.save(written={**written, form: tag})
        sums = manifest.verify(folder)
        if changed := [name for name, digest in report["forms"][form]["files"].items() if sums.get(name) != digest]:
            raise Problem(
                f"{folder} has changed since it was verified ({', '.join(changed)}); the same command verifies it"
            )
        size = sum(path.stat().st_size for path in folder.iterdir())
        say(f"{form}: publishing {gigabytes(size)} to {repos[form]}")
        deadline = 600 + size / UPLOAD_BYTES_PER_SECOND
        _, printed = _child(None, "publish", str(folder), repos[form], tag, deadline=deadline)
        commits[form] = printed.split()[-1]
        work.save(published={form: {"repo": repos[form], "commit": commit} for form, commit in commits.items()})
    for form in FORMS:
        print(f"{form}: {repos[form]} at {commits[form]}, tagged {tag}")
    print(f"A worker loads the 4-bit form with MODEL_ID={repos['nf4']} MODEL_REVISION={commits['nf4']}")


def verify(model: str, ablated: str, settings: configuration.Settings) -> int:
    """Measure ABLATED against MODEL, whoever made it. Raises Problem."""
    from fetch import resolve

    if not ablated:
        raise Problem("ABLATED is not set. Try: make verify MODEL=Qwen/Qwen3-14B ABLATED=you/Qwen3-14B-ablated")
    (base, base_id, base_commit), (folder, ablated_id, commit) = resolve(model), resolve(ablated)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    form = "nf4" if "quantization_config" in config else "bf16"
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kept = (
        Path(os.environ.get("ABLATIONS_DIR") or "ablations") / f"{stamp}-verify-{slug(ablated_id.rsplit('/', 1)[-1])}"
    )
    kept.mkdir(parents=True, exist_ok=True)
    part = _verified(kept, base, folder, form, settings, settings.heretic, {})
    facts = {
        "run": kept.name,
        "base": {"id": base_id, "commit": base_commit},
        "ablated": {"id": ablated_id, "commit": commit},
    }
    report = verification.assemble(facts, {form: part}, settings.gates)
    write_atomic(kept / "report.json", to_json(report))
    print(verification.render(report))
    print(f"Report: {kept / 'report.json'}")
    return OK if report["passed"] else FLAGGED


if __name__ == "__main__":
    run(main)
