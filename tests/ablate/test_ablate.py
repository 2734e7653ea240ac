# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m ablate` whole: the real Heretic on a model that truly refuses, verified and published to a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub import WRITE_TOKEN, Fault, Hub
from support import environment
from tiny import Tiny, toml

from journal import read

ROOT = Path(__file__).resolve().parents[2]
BASE = "acme/tiny"
TRIALS = 8


@dataclass
class Bench:
    """A place where `python -m ablate` is run: its folder, its hub, its settings."""

    folder: Path
    hub: Hub

    def configure(self, tiny: Tiny, **overrides: Any) -> None:
        config = self.folder / "config"
        config.mkdir(exist_ok=True)
        shutil.copy(ROOT / "config" / "models.yaml", config)
        text = toml(tiny.folder, **{"n_trials": TRIALS, "n_startup_trials": 6, **overrides})
        (config / "heretic.toml").write_text(text, encoding="utf-8")

    def environment(self, **changes: str) -> dict[str, str]:
        return environment(
            CONFIG_DIR=str(self.folder / "config"), ABLATIONS_DIR=str(self.folder / "ablations"),
            HF_HOME=str(self.folder / "hf"), HF_ENDPOINT=self.hub.url, HF_TOKEN=WRITE_TOKEN, HF_HUB_OFFLINE="0",
            MODEL=BASE, MPLCONFIGDIR=str(self.folder / "matplotlib"), **changes,
        )  # fmt: skip

    def ablate(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "ablate", *arguments], env=self.environment(**changes), cwd=self.folder, text=True,
            capture_output=True, stdin=subprocess.DEVNULL, timeout=600, check=False,
        )  # fmt: skip
        assert WRITE_TOKEN not in done.stdout + done.stderr
        assert not self.hub.errors
        return done

    @property
    def run(self) -> Path:
        (run,) = (path.parent for path in (self.folder / "ablations").glob("*/run.json"))
        return run


def seed(hub: Hub, tiny: Tiny) -> None:
    files = {path.name: path.read_bytes() for path in tiny.model.iterdir()}
    files |= {"README.md": b"---\nlicense: apache-2.0\n---\n# tiny\n", "LICENSE": b"the licence\n"}
    hub.add_repo(BASE, files, card_data={"license": "apache-2.0"})


@pytest.fixture(scope="module")
def place(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A run that has been published; tests look at it and run it again."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        seed(hub, tiny)
        place = Bench(tmp_path_factory.mktemp("place"), hub)
        place.configure(tiny)
        place.first = place.ablate()  # type: ignore[attr-defined]
        yield place


@pytest.fixture
def fresh(tiny: Tiny, tmp_path: Path) -> Iterator[Bench]:
    """A place where nothing has been run yet."""
    with Hub(tmp_path / "hub") as hub:
        seed(hub, tiny)
        place = Bench(tmp_path, hub)
        place.configure(tiny)
        yield place


pytestmark = pytest.mark.timeout(900)


def test_a_model_that_refuses_ends_verified_and_private(place: Bench) -> None:
    done = place.first  # type: ignore[attr-defined]
    assert done.returncode == 0, done.stderr
    tag = f"verified-{place.run.name}"
    for name, form in (("tester/tiny-ablated", "bf16"), ("tester/tiny-ablated-nf4", "nf4")):
        repo = place.hub.repo(name)
        assert repo.private
        assert list(repo.tags) == [tag]
        assert f"{form}: {name} at {repo.tags[tag]}, tagged {tag}" in done.stdout
        report = json.loads(repo.contents(tag)["report.json"])
        assert report["passed"] is True
        assert report["forms"][form]["base_refusals"] >= 36  # of 40
        assert report["forms"][form]["refusals"] < 2
        assert report["forms"][form]["kl_divergence"] < 0.5
        assert report["forms"][form]["benign_questions"] >= 100
        assert repo.contents(tag)["LICENSE"] == b"the licence\n"
        assert b"trust_remote_code" in repo.contents(tag)["README.md"]
        assert str(place.folder).encode() not in b"".join(repo.contents(tag).values())
    assert f"MODEL_REVISION={place.hub.repo('tester/tiny-ablated-nf4').tags[tag]}" in done.stdout


def test_what_is_downloaded_at_the_tag_is_what_was_verified(place: Bench, tmp_path: Path) -> None:
    for name, folder in (("tester/tiny-ablated", "model"), ("tester/tiny-ablated-nf4", "nf4")):
        code = "import sys; from huggingface_hub import snapshot_download as s; s(sys.argv[1], revision=sys.argv[2], local_dir=sys.argv[3])"
        out = tmp_path / folder
        subprocess.run(
            [sys.executable, "-c", code, name, f"verified-{place.run.name}", str(out)],
            env=place.environment() | {"HF_HOME": str(tmp_path / "hf")}, check=True, timeout=120, capture_output=True,
        )  # fmt: skip
        sums = {line[66:]: line[:64] for line in (out / "SHA256SUMS").read_text().splitlines()}
        there = {path.name for path in out.iterdir() if path.is_file() and path.name != ".gitattributes"}
        assert there == {*sums, "SHA256SUMS"}
        for file, digest in sums.items():
            assert hashlib.sha256((out / file).read_bytes()).hexdigest() == digest
            assert (place.run / folder / file).read_bytes() == (out / file).read_bytes()


def test_again_changes_nothing(place: Bench) -> None:
    before = {name: (list(repo.commits), dict(repo.tags)) for name, repo in place.hub.repos.items()}
    done = place.ablate()
    assert done.returncode == 0, done.stderr
    assert "the search has ended before" in done.stderr
    assert "bf16: verified before" in done.stderr
    assert {name: (list(repo.commits), dict(repo.tags)) for name, repo in place.hub.repos.items()} == before


def test_the_saved_model_is_bf16_and_the_other_form_nf4(place: Bench) -> None:
    from safetensors import safe_open

    with safe_open(place.run / "model" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((place.run / "nf4" / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"


def test_progress_and_pictures_are_there(place: Bench) -> None:
    shown = place.first.stderr  # type: ignore[attr-defined]
    assert re.search(r"of 8 · best: \d+ of 40 refusals, KL .*left \(ends \d\d:\d\d UTC\)", shown)
    page = (place.run / "pareto.html").read_text()
    assert (place.run / "pareto.png").read_bytes().startswith(b"\x89PNG")
    chosen = json.loads((place.run / "run.json").read_text())["trial"]["index"]
    assert f"{chosen}" in page


def test_changed_bytes_are_verified_again(place: Bench, tmp_path: Path) -> None:
    """What was verified is known by its sha256: other bytes are not published on the word of the first ones."""
    copy = Bench(tmp_path, place.hub)
    shutil.copytree(place.folder / "config", tmp_path / "config")
    shutil.copytree(place.folder / "ablations", tmp_path / "ablations", symlinks=True)
    weights = copy.run / "nf4" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2000:] = bytes(2000)
    weights.write_bytes(data)
    done = copy.ablate(PUBLISH="0")
    assert "bf16: verified before" in done.stderr
    assert "nf4: measuring" in done.stderr


def test_a_missed_gate_is_exit_3_and_nothing_is_published(place: Bench, tiny: Tiny, tmp_path: Path) -> None:
    with Hub(tmp_path / "hub") as hub:
        seed(hub, tiny)
        strict = Bench(tmp_path, hub)
        strict.configure(tiny, gates={"perplexity_ratio": 0.5})
        shutil.copytree(place.folder / "ablations", tmp_path / "ablations", symlinks=True)
        done = strict.ablate()
        assert done.returncode == 3, done.stderr
        assert "perplexity ratio" in done.stdout
        assert "NOT verified" in done.stdout
        assert set(hub.repos) == {BASE}
        report = json.loads((strict.run / "report.json").read_text())
        assert report["passed"] is False
        assert "nf4" not in report["forms"]  # there is no use for it


def test_a_model_that_cannot_be_ablated_is_exit_3_and_nothing_is_published(stubborn: Tiny, tmp_path: Path) -> None:
    with Hub(tmp_path / "hub") as hub:
        seed(hub, stubborn)
        place = Bench(tmp_path, hub)
        place.configure(stubborn)
        done = place.ablate()
        assert done.returncode == 3, done.stderr
        assert "no trial of 8 passes the gates; the closest was trial" in done.stderr
        assert set(hub.repos) == {BASE}
        assert not (place.run / "model").exists()
        report = json.loads((place.run / "report.json").read_text())
        assert (report["passed"], report["forms"], report["complete_trials"]) == (False, {}, 8)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"gates": {"refusals": 5, "of": 100}},
            "[bad_evaluation_prompts] has 40 prompts, and the gate on refusals wants",
        ),
        ({"good_prompts": {"dataset": "/nowhere/mine.txt"}}, "the prompts of [good_prompts] cannot be read"),
        ({"bad_prompts": {"split": "[:0]"}}, "[bad_prompts] has no prompts"),
    ],
)
def test_prompts_are_looked_at_before_a_byte_is_downloaded(
    fresh: Bench, tiny: Tiny, overrides: dict[str, Any], said: str
) -> None:
    fresh.configure(tiny, **overrides)
    done = fresh.ablate()
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert not fresh.hub.requests("GET", r"\.safetensors")
    assert not (fresh.folder / "ablations").exists()


def test_leftovers_of_an_interrupted_publication_are_no_obstacle(place: Bench) -> None:
    for folder in ("model", "nf4"):
        (place.run / folder / ".README.md.abcdef").write_text("half a card")
    test_again_changes_nothing(place)
    assert not list(place.run.glob("*/.README*"))


def test_a_card_that_is_half_published_is_not_written_anew(place: Bench) -> None:
    """An update of this program, or another torch, would else give the tag another content, which is refused."""
    card = place.run / "nf4" / "README.md"
    before, code = card.read_bytes(), Path(environment()["PYTHONPATH"].split(":")[0])
    assert (code / "card.md.jinja").exists()
    test_again_changes_nothing(place)
    assert card.read_bytes() == before
    assert json.loads((place.run / "run.json").read_text())["written"].keys() == {"bf16", "nf4"}


def test_a_damaged_model_is_made_again(place: Bench, tmp_path: Path) -> None:
    copy = Bench(tmp_path, place.hub)
    shutil.copytree(place.folder / "config", tmp_path / "config")
    shutil.copytree(place.folder / "ablations", tmp_path / "ablations", symlinks=True)
    weights = copy.run / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    done = copy.ablate(PUBLISH="0")
    assert done.returncode == 0, done.stderr
    assert "the saved model is damaged" in done.stderr
    assert weights.read_bytes() == whole


def test_other_gates_that_lead_to_the_same_trial_keep_the_model(place: Bench, tiny: Tiny, tmp_path: Path) -> None:
    copy = Bench(tmp_path, place.hub)
    copy.configure(tiny, gates={"kl_divergence": 0.49})
    shutil.copytree(place.folder / "ablations", tmp_path / "ablations", symlinks=True)
    before = (copy.run / "model" / "model.safetensors").stat().st_mtime_ns
    done = copy.ablate()
    assert done.returncode == 0, done.stderr
    assert "the search has ended before" in done.stderr
    assert (copy.run / "model" / "model.safetensors").stat().st_mtime_ns == before
    # It is another report, so it gets another tag, and the first one stays.
    tags = place.hub.repo("tester/tiny-ablated").tags
    assert f"verified-{copy.run.name}.2" in tags
    assert tags[f"verified-{copy.run.name}.2"] != tags[f"verified-{copy.run.name}"]
    place.hub.repo("tester/tiny-ablated").tags.pop(f"verified-{copy.run.name}.2")
    place.hub.repo("tester/tiny-ablated-nf4").tags.pop(f"verified-{copy.run.name}.2")


def test_a_public_target_is_refused_before_a_byte_is_downloaded(fresh: Bench) -> None:
    fresh.hub.add_repo("tester/tiny-ablated", {"x.txt": b"x"}, private=False)
    done = fresh.ablate()
    assert done.returncode == 2
    assert "public" in done.stderr
    assert not fresh.hub.requests("GET", r"\.safetensors")
    assert not (fresh.folder / "ablations").exists()


def test_a_publication_that_fails_is_healed_by_the_same_command(place: Bench, tiny: Tiny, tmp_path: Path) -> None:
    with Hub(tmp_path / "hub") as hub:
        seed(hub, tiny)
        again = Bench(tmp_path, hub)
        again.configure(tiny)
        shutil.copytree(place.folder / "ablations", tmp_path / "ablations", symlinks=True)
        hub.arm(Fault(method="POST", path=r"/api/models/tester/tiny-ablated-nf4/commit", status=403))
        done = again.ablate()
        assert done.returncode == 5, done.stderr
        assert all(repo.private for name, repo in hub.repos.items() if name != BASE)
        assert not hub.repo("tester/tiny-ablated-nf4").tags
        hub.faults.clear()
        done = again.ablate()
        assert done.returncode == 0, done.stderr
        assert "bf16: verified before" in done.stderr
        assert hub.repo("tester/tiny-ablated-nf4").tags


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MODEL": ""}, "MODEL is not set. Try: make ablate MODEL="),
        ({"PUBLIC": "yes"}, "PUBLIC must be 1 or 0, not 'yes'"),
        ({"MODEL": "acme/none"}, "acme/none"),
        ({"HF_TOKEN": ""}, "HF_TOKEN"),
        ({"HF_TOKEN": "hf_wrong"}, "HF_TOKEN"),
        ({"CONFIG_DIR": "/nowhere"}, "/nowhere/heretic.toml does not exist"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(fresh: Bench, changes: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ablate"], env=fresh.environment() | changes, cwd=fresh.folder, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (fresh.folder / "ablations").exists()


def test_two_at_once_one_is_told_to_wait(fresh: Bench) -> None:
    first = subprocess.Popen(
        [sys.executable, "-m", "ablate"], env=fresh.environment(PUBLISH="0"), cwd=fresh.folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list((fresh.folder / "ablations").glob("*/heretic.log")) and time.monotonic() < deadline:
            time.sleep(0.1)
        done = fresh.ablate(PUBLISH="0")
        assert done.returncode == 75, done.stderr
        assert "another process works on the run" in done.stderr
    finally:
        first.kill()
        first.wait()


def test_interrupted_it_ends_with_130_and_its_child(fresh: Bench) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "ablate"], env=fresh.environment(PUBLISH="0"), cwd=fresh.folder,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not any(read(path).trials for path in (fresh.folder / "ablations").glob("*/checkpoint/base.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "interrupted" in said
    assert not (fresh.run / "model").exists()
    assert not _searching(fresh.run)


def _searching(run: Path) -> list[str]:
    """The processes that search for a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launcher" in words and str(run / "plan.json").encode() in words:
            found.append(path.parent.name)
    return found


def test_killed_at_thirty_random_moments_it_is_the_study_that_it_would_have_been(
    place: Bench, tiny: Tiny, tmp_path: Path
) -> None:
    """kill -9 of the driver: whatever it was doing, each start loses at most the running trial, and none is drawn twice."""
    with Hub(tmp_path / "hub") as hub:
        seed(hub, tiny)
        killed = Bench(tmp_path, hub)
        killed.configure(tiny)
        draw = random.Random(30)
        complete = 0
        for _ in range(30):
            child = subprocess.Popen(
                [sys.executable, "-m", "ablate"], env=killed.environment(PUBLISH="0"), cwd=tmp_path,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            # Most of a start is loading: half of the moments lie where trials run.
            journals = list((tmp_path / "ablations").glob("*/checkpoint/base.jsonl"))
            size = journals[0].stat().st_size if journals else 0
            wait = draw.uniform(0, 12) if draw.random() < 0.5 else draw.uniform(0, 3)
            begun = time.monotonic()
            while time.monotonic() - begun < wait and child.poll() is None:
                time.sleep(0.02)
                if wait >= 3 and journals and journals[0].stat().st_size > size:
                    time.sleep(draw.uniform(0, 1.5))
                    break
            child.kill()
            child.wait()
            for journal in (tmp_path / "ablations").glob("*/checkpoint/base.jsonl"):
                now = sum(trial.state == "complete" for trial in read(journal).trials)
                assert now >= complete
                complete = now
        time.sleep(1)
        assert not any(_searching(run.parent) for run in (tmp_path / "ablations").glob("*/run.json"))
        done = killed.ablate(PUBLISH="0")
        assert done.returncode == 0, done.stderr

        def told(run: Path) -> list[object]:
            trials = read(run / "checkpoint" / "base.jsonl").trials
            return [(t.index, t.state, t.refusals, t.kl_divergence, t.parameters) for t in trials]

        assert len(told(killed.run)) == TRIALS
        assert told(killed.run) == told(place.run)
        for name in ("model", "nf4"):
            assert (killed.run / name / "model.safetensors").read_bytes() == (
                place.run / name / "model.safetensors"
            ).read_bytes()
