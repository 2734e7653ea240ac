"""scripts/push: what it refuses, what it asks, what it writes down. Docker and git are stubs here; tests/e2e pushes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "docker.io/you/open-synthesis-worker"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed here")

# A registry in a file, and the few commands that scripts/push types. Each call is noted.
DOCKER = """#!{python} -I
import hashlib, json, os, sys
words = sys.argv[1:]
world = json.load(open("world.json"))
with open("calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
def end(code=0, said=""):
    json.dump(world, open("world.json", "w"))
    print(said, file=sys.stderr)
    sys.exit(code)
if words[0] == "info":
    print("[[driver-type io.containerd.snapshotter.v1]]" if world["containerd"] else "[[Backing Filesystem extfs]]")
elif words[:2] == ["buildx", "inspect"]:
    print("Name:          default\\nDriver:        " + world["driver"])
elif words[1:3] == ["imagetools", "inspect"]:
    if words[4] not in world["registry"]:
        end(1, "ERROR: " + words[4] + ": not found")
    sys.stdout.write(world["registry"][words[4]])
elif words[1:3] == ["imagetools", "create"] and "--help" in words:
    print("--prefer-index" if world["newer"] else "")
elif words[1:3] == ["imagetools", "create"]:
    world["registry"][words[words.index("--tag") + 1]] = world["registry"][words[-1]]
elif words[1] == "bake" and "--push" not in words:
    world["asked"] = os.environ.get("ATTESTATIONS")
    if world["build"]:
        end(1, "ERROR: no build")
elif words[1] == "bake":
    if world["push"]:
        end(1, "ERROR: denied")
    name = os.environ["REGISTRY"] + "open-synthesis-" + words[2]
    for manifest in world["manifests"][::-1]:
        digest = "sha256:" + hashlib.sha256(manifest.encode()).hexdigest()
        if not world["lost"]:
            world["registry"][name + "@" + digest] = manifest
    world["registry"][name + ":" + os.environ["VERSION"]] = manifest
    with open(words[words.index("--metadata-file") + 1], "w") as file:
        json.dump({{words[2]: {{"containerimage.config.digest": "sha256:" + "0" * 64, "containerimage.digest": digest}}}}, file, indent=2)
end()
"""
GIT = """#!/bin/sh
case $1 in
  rev-parse) [ -n "$COMMIT" ] && echo "$COMMIT" ;;
  status) echo "$CHANGES" ;;
  *) cat >/dev/null ;;
esac
"""


def digest(manifest: str) -> str:
    return f"sha256:{hashlib.sha256(manifest.encode()).hexdigest()}"


PLAIN = '{"config": {}}'
PROVENANCE = '{"layers": [{"annotations": {"in-toto.io/predicate-type": "https://slsa.dev/provenance/v0.2"}}]}'
SBOM = '{"layers": [{"annotations": {"in-toto.io/predicate-type": "https://spdx.dev/Document"}}]}'


def index(*parts: str) -> str:
    entries = [{"digest": digest(part), "annotations": {"kind": "attestation-manifest"}} for part in parts]
    return json.dumps({"manifests": entries})


class Tree:
    """scripts/push in a tree of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("push", "lib.sh"):
            (folder / "scripts").mkdir(exist_ok=True)
            shutil.copy(ROOT / "scripts" / name, folder / "scripts" / name)
        (folder / "bin").mkdir()
        for name, text in (("docker", DOCKER.format(python=sys.executable)), ("git", GIT)):
            (folder / "bin" / name).write_text(text, encoding="utf-8")
            (folder / "bin" / name).chmod(0o755)
        self.world: dict[str, Any] = {
            "containerd": True, "driver": "docker", "newer": True, "build": False, "push": False, "lost": False,
            "asked": None, "registry": {}, "manifests": [index(PROVENANCE, SBOM), PROVENANCE, SBOM],
        }  # fmt: skip

    def push(self, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "world.json").write_text(json.dumps(self.world), encoding="utf-8")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            [str(self.folder / "scripts" / "push")],
            cwd=self.folder,
            env={"PATH": path, "COMMIT": COMMIT, "CHANGES": "", **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.world = json.loads((self.folder / "world.json").read_text(encoding="utf-8"))
        return done

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def record(self) -> dict[str, str] | None:
        path = self.folder / "deploy" / "image.json"
        read: dict[str, str] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return read


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# --- what is refused, before anything is asked or built --------------------------------------------------------------


@pytest.mark.parametrize(
    ("registry", "said"),
    [
        ("", "REGISTRY is not set"),
        ("docker.io/you", "end with a slash"),
        ("https://docker.io/you/", "no https://"),
        ("ghcr.io/You/", "lower case"),
        ("you/", "a host and a path"),
        ("docker.io//you/", "a host and a path"),
        ("docker.io/you/:1/", "a host and a path"),
        ("user:secret@docker.io/you/", "without names, passwords"),
        ("docker.io/you/$(touch hacked)/", "a host and a path"),
        ("docker.io/yo u/", "a host and a path"),
        ("docker.io/you/\ndocker.io/me/", "a host and a path"),
        ("-docker.io/../", "a host and a path"),
    ],
)
def test_a_registry_that_is_none_is_refused_with_an_example_and_not_repeated(
    tree: Tree, registry: str, said: str
) -> None:
    done = tree.push(REGISTRY=registry)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "REGISTRY=docker.io/you/" in done.stderr
    assert "secret" not in done.stderr
    assert tree.calls == []
    assert not (tree.folder / "hacked").exists()


@pytest.mark.parametrize(
    "registry",
    ["docker.io/you/", "ghcr.io/you/more/", "127.0.0.1:5001/", "localhost:5000/a/", "registry.example.org/a-b/c_d/"],
)
def test_a_registry_is_taken(tree: Tree, registry: str) -> None:
    done = tree.push(REGISTRY=registry)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{registry}open-synthesis-worker@{digest(index(PROVENANCE, SBOM))}\n"


@pytest.mark.parametrize("mode", ["VERSION", "FIND", "MARK"])
@pytest.mark.parametrize("tag", ["latest", "a b", "a:b", "-a", ".a", "a/b", "$(id)", "a" * 129, "é"])
def test_a_tag_that_is_none_is_refused(tree: Tree, mode: str, tag: str) -> None:
    done = tree.push(REGISTRY="docker.io/you/", **{mode: tag})
    assert (done.returncode, done.stdout) == (2, "")
    assert mode in done.stderr
    assert tree.calls == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"WHAT": "client"}, "worker, worker-baked"),
        ({"WHAT": "worker-baked"}, "MODEL_ID"),
        ({"WHAT": "worker-baked", "MODEL_ID": "you/m", "MODEL_REVISION": "main"}, "a commit"),
        ({"ATTEST": "yes"}, "ATTEST is 1"),
        ({"RUNTIME": "venv"}, "needs Docker"),
        ({"COMMIT": ""}, "VERSION"),
        ({"MARK": "production", "IMAGE": f"{NAME}:1"}, "name@sha256"),
        ({"MARK": "production"}, "push one first"),
    ],
)
def test_bad_input_is_named(tree: Tree, given: dict[str, str], said: str) -> None:
    done = tree.push(**{"REGISTRY": "docker.io/you/", **given})
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not any("bake" in call for call in tree.calls)


# --- what is pushed --------------------------------------------------------------------------------------------------


def test_what_was_pushed_is_printed_and_written_down_by_digest(tree: Tree) -> None:
    done = tree.push(REGISTRY="docker.io/you/")
    assert done.returncode == 0, done.stderr
    image = f"{NAME}@{digest(index(PROVENANCE, SBOM))}"
    assert done.stdout == f"{image}\n"
    record = tree.record
    assert record is not None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.pop("pushed"))
    assert record == {"image": image, "version": COMMIT[:12], "source": COMMIT}
    assert [path.name for path in (tree.folder / "deploy").iterdir()] == ["image.json"]
    assert (tree.folder / "deploy" / "image.json").stat().st_mode & 0o777 == 0o644
    assert "attested: provenance,sbom" in done.stderr
    assert "warning" not in done.stderr


def test_a_tree_with_changes_says_so(tree: Tree) -> None:
    done = tree.push(REGISTRY="docker.io/you/", CHANGES=" M images/worker/handler.py")
    assert done.returncode == 0
    assert "not committed" in done.stderr
    record = tree.record
    assert record is not None
    assert (record["version"], record["source"]) == (f"{COMMIT[:12]}-dirty", f"{COMMIT}-dirty")


def test_without_git_a_version_is_enough(tree: Tree) -> None:
    assert tree.push(REGISTRY="docker.io/you/", COMMIT="", VERSION="1.2.3").returncode == 0
    record = tree.record
    assert record is not None
    assert (record["version"], record["source"]) == ("1.2.3", "unknown")


@pytest.mark.parametrize(("attest", "asked"), [("1", "provenance,sbom"), ("provenance", "provenance"), ("0", "")])
def test_what_is_attested_is_asked_for_and_read_back(tree: Tree, attest: str, asked: str) -> None:
    parts = [part for word, part in (("provenance", PROVENANCE), ("sbom", SBOM)) if word in asked]
    tree.world["manifests"] = [index(*parts), *parts] if parts else [PLAIN]
    done = tree.push(REGISTRY="docker.io/you/", ATTEST=attest)
    assert done.returncode == 0, done.stderr
    assert tree.world["asked"] == asked
    assert f"attested: {asked or 'nothing'}\n" in done.stderr


@pytest.mark.parametrize("manifests", [[PLAIN], [index(PROVENANCE), PROVENANCE]])
def test_an_attestation_that_did_not_arrive_is_flagged(tree: Tree, manifests: list[str]) -> None:
    tree.world["manifests"] = manifests
    done = tree.push(REGISTRY="docker.io/you/")
    assert done.returncode == 3
    assert "asked for provenance,sbom" in done.stderr
    assert tree.record is not None


def test_a_builder_that_cannot_attest_is_told_with_two_ways_out(tree: Tree) -> None:
    tree.world["containerd"] = False
    done = tree.push(REGISTRY="docker.io/you/")
    assert done.returncode == 2
    assert "docker buildx create" in done.stderr
    assert "--driver docker-container" in done.stderr
    assert "make push REGISTRY=docker.io/you/ ATTEST=0" in done.stderr
    assert not any("bake" in call for call in tree.calls)
    tree.world["driver"] = "docker-container"
    assert tree.push(REGISTRY="docker.io/you/").returncode == 0


def test_a_tag_that_moves_is_told(tree: Tree) -> None:
    tree.world["registry"][f"{NAME}:1"] = PLAIN
    done = tree.push(REGISTRY="docker.io/you/", VERSION="1")
    assert done.returncode == 0
    assert f"the tag 1 was {digest(PLAIN)} before" in done.stderr
    again = tree.push(REGISTRY="docker.io/you/", VERSION="1")
    assert again.stdout == done.stdout
    assert "before" not in again.stderr


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [("build", 1, "the build of worker failed"), ("push", 5, "docker login docker.io"), ("lost", 5, "does not have")],
)
def test_a_failure_leaves_the_record_as_it_was(tree: Tree, fault: str, code: int, said: str) -> None:
    assert tree.push(REGISTRY="docker.io/you/").returncode == 0
    before = tree.record
    tree.world["registry"] = {}
    tree.world[fault] = True
    done = tree.push(REGISTRY="docker.io/you/")
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert tree.record == before
    assert [path.name for path in (tree.folder / "deploy").iterdir()] == ["image.json"]


def test_secrets_are_in_no_argument_no_output_and_no_file(tree: Tree) -> None:
    secrets = {"HF_TOKEN": "canary-1", "RUNPOD_API_KEY": "canary-2"}
    done = tree.push(REGISTRY="docker.io/you/", **secrets)
    assert done.returncode == 0
    assert "canary" not in done.stdout + done.stderr + str(tree.calls) + str(tree.record)


# --- an image that is there already ----------------------------------------------------------------------------------


def test_a_tag_is_found_and_nothing_is_built(tree: Tree) -> None:
    tree.world["registry"][f"{NAME}:production"] = PLAIN
    done = tree.push(REGISTRY="docker.io/you/", FIND="production")
    assert (done.returncode, done.stdout) == (0, f"{NAME}@{digest(PLAIN)}\n")
    assert tree.record is None
    assert not any("bake" in call for call in tree.calls)
    absent = tree.push(REGISTRY="docker.io/you/", FIND="other")
    assert (absent.returncode, absent.stdout) == (5, "")
    assert f"{NAME}:other" in absent.stderr


def test_the_pushed_image_gets_one_more_tag(tree: Tree) -> None:
    image = tree.push(REGISTRY="docker.io/you/").stdout.strip()
    marked = tree.push(MARK="production")
    assert (marked.returncode, marked.stdout) == (0, f"{image}\n")
    assert tree.push(REGISTRY="docker.io/you/", FIND="production").stdout == marked.stdout
    elsewhere = f"{NAME}@{digest(PLAIN)}"
    assert tree.push(MARK="production", IMAGE=elsewhere).returncode == 5
    tree.world["registry"][elsewhere] = PLAIN
    assert tree.push(MARK="production", IMAGE=elsewhere).stdout == f"{elsewhere}\n"


def test_a_buildx_that_would_wrap_a_plain_image_is_not_asked_to_tag_it(tree: Tree) -> None:
    tree.world["newer"] = False
    image = tree.push(REGISTRY="docker.io/you/").stdout.strip()
    assert tree.push(MARK="production").stdout.strip() == image
    tree.world["registry"][f"{NAME}@{digest(PLAIN)}"] = PLAIN
    done = tree.push(MARK="other", IMAGE=f"{NAME}@{digest(PLAIN)}")
    assert done.returncode == 2
    assert "newer" in done.stderr
    assert f"{NAME}:other" not in tree.world["registry"]
