"""common.problems.run: what a program says and which code it leaves with, seen from outside."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from common import problems


def program(body: str) -> subprocess.CompletedProcess[str]:
    """Run `main` with this body in a Python of its own."""
    code = f"from common.problems import *\ndef main():\n    {body}\nrun(main)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("body", "code", "out", "err"),
    [
        ("print('done'); return OK", 0, "done\n", ""),
        ("print('flagged'); return FLAGGED", 3, "flagged\n", ""),
        ("return UNCHECKED", 4, "", ""),
        (
            "print('part'); raise Problem('no such domain: x. Try: make ingest')",
            2,
            "part\n",
            "error: no such domain: x. Try: make ingest\n",
        ),
        ("raise Problem('refused', REMOTE_FAILED)", 5, "", "error: refused\n"),
        ("raise Problem('busy', TRY_LATER)", 75, "", "error: busy\n"),
        ("raise KeyboardInterrupt", 130, "", "interrupted\n"),
    ],
)
def test_a_program_leaves_with_its_code_and_a_problem_is_one_plain_message(
    body: str, code: int, out: str, err: str
) -> None:
    done = program(body)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_what_a_problem_quotes_cannot_command_the_terminal() -> None:
    done = program(r"""raise Problem("no file a\x1b[2Jb\x9b2Jc")""")
    assert (done.returncode, done.stderr) == (problems.BAD_INPUT, "error: no file abc\n")


def test_a_defect_keeps_its_traceback() -> None:
    done = program("{}['missing']")
    assert done.returncode == problems.UNEXPECTED
    assert done.stderr.startswith("Traceback")
    assert "KeyError: 'missing'" in done.stderr


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_reader_that_has_left_is_no_error(size: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from common.problems import *\ndef main():\n    print('x' * {size})\n    return FLAGGED\nrun(main)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_codes_are_the_agreed_ones() -> None:
    names = ("OK", "UNEXPECTED", "BAD_INPUT", "FLAGGED", "UNCHECKED", "REMOTE_FAILED", "TRY_LATER", "INTERRUPTED")
    assert [getattr(problems, name) for name in names] == [0, 1, 2, 3, 4, 5, 75, 130]
    assert problems.Problem("x").code == problems.BAD_INPUT


def test_a_reader_that_has_left_ends_neither_the_work_nor_its_code() -> None:
    program = "from common.problems import run, tell\n\ndef main():\n    tell('x' * 10_000)\n    tell('more')\n    return 3\n\nrun(main)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()
    assert process.wait(30) == 3
