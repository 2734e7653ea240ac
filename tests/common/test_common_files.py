"""common.files: a reader never meets half a file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from common.files import to_json, to_json_lines, write_atomic


def test_a_file_is_written_as_utf8_with_its_line_ends_as_they_are(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.md", "naïve 研究\r\nnext\n")
    assert (tmp_path / "a.md").read_bytes() == "naïve 研究\r\nnext\n".encode()


def test_a_file_is_replaced_whole_and_a_reader_of_the_old_one_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "a long first version")
    with path.open(encoding="utf-8") as reader:
        write_atomic(path, "second")
        assert reader.read() == "a long first version"
    assert path.read_text(encoding="utf-8") == "second"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_file_is_readable_for_all_and_writable_for_its_owner(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", "new")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old"


def test_text_that_no_file_can_hold_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a", "half \ud800")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomic(tmp_path / "nowhere" / "a", "x")


def test_json_is_stable_readable_and_ends_with_a_newline() -> None:
    assert to_json({"b": "naïve", "a": [1]}) == '{\n  "b": "naïve",\n  "a": [\n    1\n  ]\n}\n'


def test_json_lines_hold_one_document_each() -> None:
    assert to_json_lines([{"a": "x\ny"}, {"b": "é"}]) == '{"a": "x\\ny"}\n{"b": "é"}\n'
    assert to_json_lines(iter(())) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_json_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json({"a": value})
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json_lines([{"a": value}])
