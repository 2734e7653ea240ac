"""Rules of the tree that no compiler checks: what enters a build, what shared code may import, how images start."""

from __future__ import annotations

import ast
import json
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sorted(
    path
    for folder in ("scripts", "images")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
DOCKERFILES = sorted((ROOT / "images").glob("*/Dockerfile"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def patterns(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


# --- what enters a build, what enters git ----------------------------------------------------------------------------


def enters(path: str) -> bool:
    """Does .dockerignore let this path into the build? The last pattern that fits it, or a folder above it, decides."""
    parts = path.split("/")
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    entering = True
    for pattern in patterns(".dockerignore"):
        bare = pattern.removeprefix("!").strip("/")
        if bare.startswith("**/"):
            fits = any(fnmatchcase(part, bare.removeprefix("**/")) for part in parts)
        else:
            fits = any(folder.count("/") == bare.count("/") and fnmatchcase(folder, bare) for folder in above)
        if fits:
            entering = pattern.startswith("!")
    return entering


def test_the_build_of_the_tree_starts_from_nothing() -> None:
    first, *rest = patterns(".dockerignore")
    assert first == "*"
    assert all("*" not in pattern and "?" not in pattern for pattern in rest if pattern.startswith("!"))


@pytest.mark.parametrize(
    "path",
    ".env .env.local .env.bak .local/env .git/config .venvs/ops/bin/python runs/r/run.json store/d/chroma.sqlite3"
    " build/test/report.xml anything-new scripts/common/__pycache__/wire.pyc".split(),
)
def test_what_is_private_or_made_cannot_enter_a_build(path: str) -> None:
    assert not enters(path)


@pytest.mark.parametrize(
    "path",
    ".env.example .gitignore .dockerignore Makefile docker-bake.hcl pyproject.toml scripts/with-env tests/ops/conftest.py"
    " prompts/system.txt images/ops/Dockerfile".split(),
)
def test_what_these_tests_need_enters_it(path: str) -> None:
    assert enters(path)
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    ("path", "ignored"),
    [(".env", True), (".local", True), (".venvs", True), ("runs", True), (".env.example", False), ("Makefile", False)],
)
def test_git_sees_the_example_and_not_the_secrets(path: str, ignored: bool) -> None:
    fits = [pattern for pattern in patterns(".gitignore") if fnmatchcase(path, pattern.strip("/"))]
    assert bool(fits) == ignored, fits


# --- Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "common").glob("*.py")), ids=relative)
def test_shared_code_imports_the_standard_library_only(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names - {"common"} == set()


def test_no_image_imports_code_of_another() -> None:
    homes = {
        path: path.relative_to(ROOT / "images").parts[0] for path in PYTHON if path.is_relative_to(ROOT / "images")
    }
    owners: dict[str, set[str]] = {}
    for path, home in homes.items():
        owners.setdefault(path.stem, set()).add(home)
    for path, home in homes.items():
        text = path.read_text(encoding="utf-8")
        for module in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE):
            assert home in owners.get(module, {home}), f"{relative(path)} imports {module}"


def test_no_text_of_the_prompts_is_in_code() -> None:
    prompts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "prompts").glob("*.txt"))]
    told = {line.strip(" -") for text in prompts for line in text.splitlines() if len(line.strip(" -")) > 25}
    assert len(told) > 3
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said = " ".join(node.value.split())
                where = f"{relative(path)}:{node.lineno}"
                assert [line for line in told if line in said] == [], where
                assert not re.search(r"\byou are an? \w+ (tool|assistant|expert)", said, re.I), where


# --- documents -------------------------------------------------------------------------------------------------------


def test_the_workers_page_names_each_error_and_each_variable() -> None:
    page = (ROOT / "docs" / "worker.md").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in PYTHON if path.parent.name in ("worker", "common"))
    raised = set(re.findall(r'(?:JobError|\berror)\(\s*"([A-Z_]{5,})"', code))
    assert raised >= {"INVALID_INPUT", "INPUT_TOO_LONG", "INTERNAL"}
    assert set(re.findall(r"^\| `([A-Z_]{5,})` \| .* \| .* \|$", page, re.MULTILINE)) == raised
    (passed,) = re.findall(r'^  worker\) keys="([A-Z_ ]+)"', (ROOT / "scripts" / "run").read_text(), re.MULTILINE)
    table = page.partition("## Environment")[2].partition("## The wire")[0]
    assert set(re.findall(r"`([A-Z_]{5,})`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))) == {
        *passed.split(),
        "HF_HOME",
    }
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert [name for name in passed.split() if not re.search(rf"^{name}=", example, re.MULTILINE)] == []


# --- Dockerfiles -----------------------------------------------------------------------------------------------------


def stages(path: Path) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """The stages of a Dockerfile: name, the base it builds on, its instructions."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for line in filter(str.strip, text.splitlines()):
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
        elif name:
            found[name][1].append((instruction, rest.strip()))
    return found


SHIPPED = [
    (path, stage) for path in DOCKERFILES for stage in stages(path) if stage in ("runtime", "slim", "full", "baked")
]


def test_each_image_that_is_built_is_checked_below() -> None:
    bake = (ROOT / "docker-bake.hcl").read_text(encoding="utf-8")
    built = set(re.findall(r'folder = "([\w-]+)", stage = "([\w-]+)"', bake))
    # A target of its own, because nobody builds it without naming a model.
    built |= set(re.findall(r'inherits = \["(\w+)"\]\n\s+target   = "(baked)"', bake))
    assert built
    assert built == {(path.parent.name, stage) for path, stage in SHIPPED}


# What buildx knows in a target; what it does not know it drops without a word.
BAKE_KEYS = set(
    "args attest cache-from cache-to call context contexts description dockerfile dockerfile-inline entitlements"
    " extra-hosts inherits labels matrix name network no-cache no-cache-filter output platforms pull secret shm-size ssh"
    " tags target ulimits".split()
)


def test_the_bake_file_has_no_word_that_would_be_dropped() -> None:
    bake = (ROOT / "docker-bake.hcl").read_text(encoding="utf-8")
    blocks = re.findall(r'^target "([\w-]+)" \{\n(.*?)^\}', bake, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in blocks} >= {"image", "worker-baked", "worker-vllm", "test", "lint", "lock"}
    for name, block in blocks:
        assert set(re.findall(r"^  ([\w-]+)\s*=", block, re.MULTILINE)) - BAKE_KEYS == set(), name
    for variable in re.findall(r'^variable "(\w+)"', bake, re.MULTILINE):
        assert len(re.findall(rf"\b{variable}\b", re.sub(r"#.*", "", bake))) > 1, f"{variable} is not used"
    # An argument that no Dockerfile takes is dropped, too.
    taken = {word for path in DOCKERFILES for word in re.findall(r"^ARG (\w+)", path.read_text(encoding="utf-8"), re.M)}
    given = {key for _, block in blocks for key in re.findall(r"^    ([A-Z_]+)\s*=", block, re.MULTILINE)}
    assert {"FLASH_KERNEL", "MODEL_ID", "MODEL_REVISION", "TORCH_BASE"} <= given
    assert given - taken == set()


@pytest.mark.parametrize(("path", "stage"), SHIPPED, ids=str)
def test_an_image_starts_one_program_that_gets_the_signals_and_is_not_root(path: Path, stage: str) -> None:
    given = dict(stages(path)[stage][1])  # the last of each instruction
    command = json.loads(given["CMD"])
    assert all(isinstance(word, str) for word in command)
    assert command[0] not in ("sh", "bash", "/bin/sh", "/bin/bash")
    assert "ENTRYPOINT" not in given or json.loads(given["ENTRYPOINT"])
    user, _, group = given["USER"].partition(":")
    assert user.isdigit()
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize("path", DOCKERFILES, ids=relative)
def test_a_dockerfile_fetches_no_other_frontend_and_pins_its_bases(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^#\s*syntax\s*=", text, re.MULTILINE | re.IGNORECASE)
    bases = dict(re.findall(r"^ARG (\w+_BASE)=(\S+)", text, re.MULTILINE))
    assert bases
    for name, base in bases.items():
        assert base in stages(path) or re.search(r"@sha256:[0-9a-f]{64}$", base), name
    for base, _ in stages(path).values():
        assert base in {*stages(path), "scratch"} or base.strip("${}") in bases, base


@pytest.mark.parametrize("path", DOCKERFILES, ids=relative)
def test_everything_that_is_installed_is_checked_against_a_hash(path: Path) -> None:
    for stage, (_, instructions) in stages(path).items():
        for instruction, rest in instructions:
            for install in re.findall(r"\bpip\b[^&|;]* install [^&|;]*", rest) if instruction == "RUN" else []:
                pinned = "--require-hashes" in install or re.search(r' "torch==\$\{TORCH_VERSION\}"\s*$', install)
                assert pinned, f"{stage}: {install}"
