"""scripts/with-env and .env.example: one grammar, read alike by everything that reads it."""

from __future__ import annotations

import io
import os
import shutil
import string
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
SECRET = "hunter2"  # noqa: S105
dotenv: Any = import_module("dotenv")


class Tree:
    """A folder with scripts/with-env and perhaps .env."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "with-env", folder / "scripts")

    def call(self, content: bytes | None, *command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        env = self.folder / ".env"
        env.unlink(missing_ok=True)
        if content is not None:
            env.write_bytes(content)
        return subprocess.run(
            [str(self.folder / "scripts" / "with-env"), *(command or ("env", "-0"))],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            timeout=30,
            check=False,
        )

    def read(self, content: bytes | None, **environment: str) -> dict[str, str]:
        """What a command sees, less what bash itself sets."""
        done = self.call(content, **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        seen = dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)
        return {key: value for key, value in seen.items() if key not in ("PATH", "PWD", "SHLVL", "_", "ENV_FILE")}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_no_variable_of_the_script_or_of_bash_stands_in_the_way(tree: Tree) -> None:
    assert tree.read(b"key=5\nline=6\nfile=7\nnumber=8\nHOSTNAME=h\n") == {
        "key": "5", "line": "6", "file": "7", "number": "8", "HOSTNAME": "h",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (None, {}),
        (b"", {}),
        (b"A=1\nB_2=two\n_c=3\n", {"A": "1", "B_2": "two", "_c": "3"}),
        (b"A=1", {"A": "1"}),
        (b"\n# a comment with 'quotes' and $ and \\\n\nA=1\n#B=2\n", {"A": "1"}),
        (b"A=\n", {"A": ""}),
        (b"A=b=c==\n", {"A": "b=c=="}),
        (
            b"A=https://user@host:1/p?q=1&r=%20;x,y|z*~!(){}[]<>^+-_.:\n",
            {"A": "https://user@host:1/p?q=1&r=%20;x,y|z*~!(){}[]<>^+-_.:"},
        ),
        ("A=naïve研究\n".encode(), {"A": "naïve研究"}),
        (b"A=1\nA=2\n", {"A": "1"}),
    ],
)
def test_a_line_is_key_value_and_nothing_is_expanded(tree: Tree, content: bytes | None, seen: dict[str, str]) -> None:
    assert tree.read(content) == seen


@pytest.mark.parametrize(
    "line",
    [
        f"KEY={SECRET}\r",
        f'KEY="{SECRET}"',
        f"KEY='{SECRET}'",
        f"KEY={SECRET} ",
        f" KEY={SECRET}",
        f"KEY ={SECRET}",
        f"KEY= {SECRET}",
        f"KEY={SECRET} b",
        f"KEY={SECRET}\tb",
        f"export KEY={SECRET}",
        f"KEY=${{{SECRET}}}",
        f"KEY=$({SECRET})",
        f"KEY={SECRET}#comment",
        f"KEY={SECRET}\\",
        f"KEY=`{SECRET}`",
        f"KEY={SECRET}\x01",
        f"1KEY={SECRET}",
        f"K-EY={SECRET}",
        f"={SECRET}",
        f"{SECRET}",
        f"\ufeffKEY={SECRET}",
        " ",
        " # an indented comment",
    ],
)
def test_any_other_line_is_refused_by_number_without_showing_it(tree: Tree, line: str) -> None:
    for end in ("\n", ""):
        done = tree.call(f"FIRST=1\n{line}{end}".encode(), "echo", "started")
        assert done.returncode == 2
        assert done.stdout == b""
        assert done.stderr.decode() == (
            ".env:2: not KEY=value\n"
            "  one KEY=value on a line, no quotes, spaces, export, $, # or \\ in the value; see .env.example\n"
        )


def test_what_the_environment_holds_wins_even_when_it_is_empty(tree: Tree) -> None:
    seen = tree.read(b"A=file\nB=file\nC=file\n", A="mine", B="")
    assert seen == {"A": "mine", "B": "", "C": "file"}


def test_another_file_can_be_named_and_must_be_there(tree: Tree) -> None:
    other = tree.folder / "other.env"
    other.write_bytes(b"A=other\n")
    assert tree.read(b"A=file\n", ENV_FILE=str(other)) == {"A": "other"}
    done = tree.call(None, "echo", "started", ENV_FILE=str(tree.folder / "nowhere"))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"error: ENV_FILE={tree.folder}/nowhere does not exist\n"


@pytest.mark.parametrize("code", [0, 1, 3, 75])
def test_the_exit_code_is_the_commands_own(tree: Tree, code: int) -> None:
    assert tree.call(b"A=1\n", "bash", "-c", f"exit {code}").returncode == code


def test_arguments_reach_the_command_as_they_are(tree: Tree) -> None:
    arguments = ["a b", "", "$A", "*", '"', "\n"]
    done = tree.call(b"A=1\n", "printf", "%s\\0", *arguments)
    assert done.stdout.decode().split("\0")[:-1] == arguments


# Keys start with K_, so that none is a variable that bash sets itself.
keys = st.text(string.ascii_letters + string.digits + "_", max_size=8).map(lambda rest: f"K_{rest}")
allowed = "".join(sorted(set(map(chr, range(33, 127))) - set("\"'`$#\\"))) + "é研"


def test_what_is_accepted_means_the_same_to_python_dotenv_and_to_a_plain_split(tree: Tree) -> None:
    @settings(max_examples=40)
    @given(st.dictionaries(keys, st.text(allowed, max_size=20), min_size=1, max_size=6), st.booleans())
    def read_alike(values: dict[str, str], newline_at_end: bool) -> None:
        content = "\n".join(f"{key}={value}" for key, value in values.items()) + "\n" * newline_at_end
        assert tree.read(content.encode()) == values
        assert dict(dotenv.dotenv_values(stream=io.StringIO(content))) == values
        assert dict(line.split("=", 1) for line in content.splitlines()) == values

    read_alike()


def test_the_example_is_read_alike_by_all_and_leaves_every_secret_empty(tree: Tree) -> None:
    content = (ROOT / ".env.example").read_text(encoding="utf-8")
    plain = dict(line.split("=", 1) for line in content.splitlines() if line and not line.startswith("#"))
    assert plain
    assert tree.read(content.encode()) == plain
    assert dict(dotenv.dotenv_values(stream=io.StringIO(content))) == plain
    assert {key: value for key, value in plain.items() if key.endswith(("KEY", "TOKEN")) and value} == {}
