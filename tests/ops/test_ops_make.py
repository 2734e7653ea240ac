"""The Makefile: its menu, what it asks for, what it hands on, and how it answers. Programs are stubs here."""

from __future__ import annotations

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
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
VERBS = re.findall(r"^([a-z][a-z-]*):.*", MAKEFILE, re.MULTILINE)
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed here")

# Stands in for scripts/with-env, and with it for every program: it notes what it was given, and answers as told.
STUB = """#!{python} -I
import json, os, sys
with open("seen.json", "w", encoding="utf-8", errors="surrogateescape") as file:
    json.dump({{"arguments": sys.argv[1:], "environment": dict(os.environ)}}, file)
sys.exit(int(os.environ.get("STUB_CODE", "0")))
"""


class Menu:
    """The Makefile in a folder of its own, over the stub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir()
        (folder / "Makefile").write_text(MAKEFILE, encoding="utf-8")
        stub = folder / "scripts" / "with-env"
        stub.write_text(STUB.format(python=sys.executable), encoding="utf-8")
        stub.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    @property
    def seen(self) -> dict[str, Any] | None:
        """What the stub was given; None if it was not called."""
        path = self.folder / "seen.json"
        seen: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return seen


@pytest.fixture
def menu(tmp_path: Path) -> Menu:
    return Menu(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_the_menu_lists_every_verb_with_a_line_about_it(menu: Menu, arguments: list[str]) -> None:
    done = menu.make(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    listed = dict(re.findall(r"^  (\S+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert {"synth", "test", "help"} < set(VERBS)
    assert sorted(listed) == sorted(VERBS)
    assert menu.seen is None


def test_every_verb_is_phony(menu: Menu) -> None:
    for verb in VERBS:
        (menu.folder / verb).touch()
    given = {"Q": "q", "DOMAIN": "d", "FROM": "f", "MODEL": "m", "ABLATED": "a"}
    for verb in VERBS:
        done = menu.make("-n", verb, **given)
        assert "up to date" not in done.stdout, verb


def test_each_verb_hands_its_command_on(menu: Menu) -> None:
    assert menu.make("ingest", "DOMAIN=d", "FROM=f", "RUNTIME=venv").returncode == 0
    assert menu.seen is not None
    assert menu.seen["arguments"] == ["scripts/run", "client", "--", "python", "-m", "ingest"]
    environment = menu.seen["environment"]
    assert (environment["DOMAIN"], environment["FROM"], environment["RUNTIME"]) == ("d", "f", "venv")


def test_what_was_not_given_is_left_to_the_env_file(menu: Menu) -> None:
    menu.make("test")
    assert menu.seen is not None
    assert not {"Q", "DOMAIN", "FROM", "MODEL", "ABLATED", "REPO", "PUBLISH", "RUNTIME", "STRICT"} & set(
        menu.seen["environment"]
    )


# --- what is missing -------------------------------------------------------------------------------------------------

NEEDS = re.findall(r"^\$\(call need,(\w+),(\w+),(.+)\)$", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize(("verb", "variable", "example"), NEEDS)
@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_variable_is_named_with_an_example_before_anything_runs(
    menu: Menu, verb: str, variable: str, example: str, value: str | None
) -> None:
    given = {name: "x" for needing, name, _ in NEEDS if needing == verb}
    given.pop(variable)
    if value is not None:
        given[variable] = value
    done = menu.make(verb, **given)
    assert done.returncode == 2
    assert f"{verb} needs {variable}. Try: make {verb} " in done.stderr
    assert example in done.stderr
    assert f"{variable}=" in example
    assert menu.seen is None


def test_the_example_of_a_missing_variable_has_all_that_the_verb_needs(menu: Menu) -> None:
    assert len(NEEDS) > 3
    for verb, variable, example in NEEDS:
        wanted = {name for needing, name, _ in NEEDS if needing == verb}
        assert wanted == set(re.findall(r"\b([A-Z]+)=", example)), (verb, variable)


# --- free text -------------------------------------------------------------------------------------------------------

TEXTS = [
    """costs $5 "or" more, isn't it?""",
    "$(shell touch hacked) $(Q) $Q ${HOME} $$ $",
    "`touch hacked` ; touch hacked && touch hacked | cat > hacked",
    "a\\b \\n trailing\\",
    "#1 finding: 50% off %s {{sources}}",
    "line one\nline two",
    "tab\there, = and := and != signs",
    "naïve 研究 👩🏽‍🔬",
    "*? ~ [a-z] {a,b} !x",
    "space after  ",  # make itself drops the space before an argument's value
    "-n --help",
    "),x,$(error no)",
    "endef\nendif",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_question_reaches_the_program_byte_for_byte(menu: Menu, text: str, way: str) -> None:
    done = menu.make("synth", f"Q={text}", DOMAIN="d") if way == "argument" else menu.make("synth", Q=text, DOMAIN="d")
    assert (done.returncode, done.stderr) == (0, "")
    assert menu.seen is not None
    assert menu.seen["environment"]["Q"] == text
    assert sorted(path.name for path in menu.folder.iterdir()) == ["Makefile", "scripts", "seen.json"]


@pytest.mark.parametrize("variable", ["DOMAIN", "FROM"])
def test_the_other_variables_are_not_expanded_either(menu: Menu, variable: str) -> None:
    menu.make("ingest", **{"DOMAIN": "d", "FROM": "f", variable: "a $b $(c) 'd'"})
    assert menu.seen is not None
    assert menu.seen["environment"][variable] == "a $b $(c) 'd'"


@pytest.mark.parametrize("variable", ["MODEL", "ABLATED", "REPO"])
def test_nor_are_those_of_a_model(menu: Menu, variable: str) -> None:
    menu.make("verify", **{"MODEL": "m", "ABLATED": "a", variable: "a $b $(c) 'd'"})
    assert menu.seen is not None
    assert menu.seen["environment"][variable] == "a $b $(c) 'd'"
    assert menu.seen["arguments"] == ["scripts/run", "ablate", "--", "python", "-m", "ablate", "--verify"]


# --- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3, 4, 10])
def test_what_is_done_counts_as_done(menu: Menu, code: int) -> None:
    done = menu.make("synth", Q="q", DOMAIN="d", STUB_CODE=str(code))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("strict", ["", "1"])
@pytest.mark.parametrize("code", [1, 2, 5, 75, 130])
def test_any_other_code_fails_and_is_named(menu: Menu, code: int, strict: str) -> None:
    done = menu.make("synth", Q="q", DOMAIN="d", STUB_CODE=str(code), STRICT=strict)
    assert done.returncode == 2
    assert f"synth: exit code {code}\n" in done.stderr


def test_strict_0_is_not_strict(menu: Menu) -> None:
    assert menu.make("synth", Q="q", DOMAIN="d", STUB_CODE="3", STRICT="0").returncode == 0


@pytest.mark.parametrize(("code", "answer"), [(0, 0), (3, 2), (4, 2), (10, 2)])
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_strict_fails_on_what_was_found(menu: Menu, code: int, answer: int, way: str) -> None:
    if way == "argument":
        done = menu.make("synth", "STRICT=1", Q="q", DOMAIN="d", STUB_CODE=str(code))
    else:
        done = menu.make("synth", Q="q", DOMAIN="d", STUB_CODE=str(code), STRICT="1")
    assert done.returncode == answer
    assert (f"exit code {code}" in done.stderr) == (code != 0)
