# SPDX-License-Identifier: AGPL-3.0-or-later
"""The manifest: what may be in it, that it tells every change, and that sha256sum reads it."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

import manifest
from common.problems import Problem

HEADER = b'{"w":{"dtype":"U8","shape":[6],"data_offsets":[0,6]}}'
WEIGHTS = struct.pack("<Q", len(HEADER)) + HEADER + b"values"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "sub folder").mkdir()
    (folder / "sub folder" / "größe.txt").write_text("ä")
    return folder


def test_it_is_sorted_and_read_by_sha256sum(folder: Path) -> None:
    sums = manifest.write(folder)
    assert list(sums) == ["config.json", "model.safetensors", "sub folder/größe.txt"]
    assert manifest.read(folder) == sums == manifest.verify(folder)
    subprocess.run(["sha256sum", "-c", "--strict", "--quiet", manifest.NAME], cwd=folder, check=True)
    theirs = subprocess.run(["sha256sum", *sums], cwd=folder, check=True, capture_output=True).stdout
    assert (folder / manifest.NAME).read_bytes() == theirs


def test_writing_it_again_changes_nothing(folder: Path) -> None:
    manifest.write(folder)
    before = (folder / manifest.NAME).read_bytes()
    manifest.write(folder)
    assert (folder / manifest.NAME).read_bytes() == before


def test_every_change_is_told(folder: Path) -> None:
    manifest.write(folder)
    (folder / "config.json").write_text("[]")
    (folder / "new.txt").write_text("")
    (folder / "sub folder" / "größe.txt").unlink()
    with pytest.raises(
        Problem, match=r"config\.json has changed; new\.txt is not listed; sub folder/größe\.txt is missing"
    ):
        manifest.verify(folder)


def test_one_bit_is_told(folder: Path) -> None:
    manifest.write(folder)
    for position in range(len(WEIGHTS) - len(b"values"), len(WEIGHTS)):  # the header would be refused as such
        changed = bytearray(WEIGHTS)
        changed[position] ^= 1
        (folder / "model.safetensors").write_bytes(changed)
        with pytest.raises(Problem, match=r"model\.safetensors has changed"):
            manifest.verify(folder)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "model.PT", "a.pth", "a.pkl", "a.pickle", "a.ckpt", "flax_model.msgpack", "tf_model.h5",
        "model-Q4.gguf", "a.onnx", "a.npz", "a.tar.gz", "sub folder/optimizer.Bin",
    ],
)  # fmt: skip
def test_other_weights_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(Problem, match="only safetensors"):
        manifest.build(folder)


@pytest.mark.parametrize("name", ["modeling_own.py", "sub folder/X.PY", "a.so", "run.sh", "a.ipynb"])
def test_programs_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(Problem, match="no remote code"):
        manifest.build(folder)


@pytest.mark.parametrize("start", [b"\x80\x04\x95", b"PK\x03\x04", b"GGUF\x03", b"\x89HDF\r\n"])
def test_weights_under_another_name_are_refused(folder: Path, start: bytes) -> None:
    (folder / "vocab.txt").write_bytes(start + b"rest of the file")
    with pytest.raises(Problem, match="not safetensors"):
        manifest.build(folder)
    (folder / "vocab.txt").unlink()
    (folder / "model.safetensors").write_bytes(start + b"rest of the file")
    with pytest.raises(Problem, match="not a whole safetensors file"):
        manifest.build(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\2\0\0\0\0\0\0\0{", b"\xff\xff\xff\xff\0\0\0\0{}", WEIGHTS[:8], WEIGHTS[:-1], WEIGHTS + b"x"]
)
def test_a_cut_safetensors_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(Problem, match="not a whole safetensors file"):
        manifest.build(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "sub folder/generation_config.json"])
@pytest.mark.parametrize("content", ['{"auto_map": {}}', '{"a": [{"b": {"auto_map": null}}]}', '{"\\u0061uto_map": 1}'])
def test_remote_code_is_refused(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(Problem, match="auto_map"):
        manifest.build(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_not_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(Problem, match="is not JSON"):
        manifest.build(folder)


def test_a_half_saved_model_is_refused(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    with pytest.raises(Problem, match=r"lacks model-2\.safetensors"):
        manifest.build(folder)
    for content in ("[]", "{}", '{"weight_map": 1}', "nothing"):
        index.write_text(content)
        with pytest.raises(Problem, match="not an index"):
            manifest.build(folder)


def test_what_is_not_a_file_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("token")
    link = folder / "notes.txt"
    for target in (secret, tmp_path, tmp_path / "nowhere"):
        link.symlink_to(target)
        with pytest.raises(Problem, match="not a regular file"):
            manifest.build(folder)
        link.unlink()
    os.mkfifo(link)
    with pytest.raises(Problem, match="not a regular file"):
        manifest.build(folder)
    link.unlink()
    monkeypatch.chdir(folder)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as door:
        door.bind("notes.txt")
        with pytest.raises(Problem, match="not a regular file"):
            manifest.build(folder)


@pytest.mark.parametrize("name", [".cache", ".env", "a\nb", "a\\b", "\x1b[2J", "a\u202eb", " a", "-rf", "a\udcff"])
def test_a_name_that_a_listing_could_not_hold_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    with pytest.raises(Problem, match="cannot be published") as caught:
        manifest.build(folder)
    assert "\x1b" not in str(caught.value)
    str(caught.value).encode()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_text("")
    with pytest.raises(Problem, match="holds no files"):
        manifest.build(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "nonsense\n",
        "0" * 63 + "  a\n",
        "0" * 64 + "  a\n" + "1" * 64 + "  a\n",
        "0" * 64 + "  ../a\n",
        "0" * 64 + "  /etc/passwd\n",
        "0" * 64 + "  \x1b[2J\n",
        "\n",
    ],
)
def test_a_damaged_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / manifest.NAME).write_text(text)
    with pytest.raises(Problem, match=r"line [12]"):
        manifest.verify(folder)


def test_a_missing_or_unreadable_manifest_is_named(folder: Path) -> None:
    with pytest.raises(Problem, match="does not exist"):
        manifest.read(folder)
    (folder / manifest.NAME).write_bytes(b"\xff\xfe")
    with pytest.raises(Problem, match="cannot be read"):
        manifest.read(folder)


names = st.from_regex(r"[a-zA-Z0-9_ äß][\w. -]{0,20}(?:/[\w][\w. -]{0,20})?", fullmatch=True).filter(manifest._is_plain)


@hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=100)
@hypothesis.given(st.dictionaries(names, st.from_regex("[0-9a-f]{64}", fullmatch=True)))
def test_what_is_written_is_read(sums: dict[str, str]) -> None:
    assert manifest.parse(manifest.render(sums), "here") == sums
