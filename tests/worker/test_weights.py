"""Where the model comes from, with real files, real caches and a Hub on loopback that the real client talks to."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import weights
from weights import WeightsError, attention, describe, incomplete, locate, variant, verify, weight_files

ROOT = Path(__file__).resolve().parents[2]

COMMIT, OTHER = "a" * 40, "b" * 40
MODEL = "someone/tiny-nf4"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Nothing is anywhere, and the Hub does not answer."""
    return {
        "BAKED_MODELS": str(tmp_path / "baked"),
        "RUNPOD_MODEL_CACHE": str(tmp_path / "runpod"),
        "NETWORK_VOLUME": str(tmp_path / "volume"),
        "HF_HOME": weights.IMAGE_HF_HOME,
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }


def put(hub: Path, model: Path, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """Lay a model out as a snapshot in a Hugging Face cache: links to blobs, as the Hub's client makes them."""
    repository = hub / "models--someone--tiny-nf4"
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        blob = repository / "blobs" / f"{commit[:4]}-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if ref:
        note = repository / "refs" / ref
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit)
    return snapshot


def sharded(folder: Path) -> None:
    """Save the model of a folder again, in shards with an index."""
    network = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def list_sums(folder: Path) -> None:
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(lines))


# --- the order of the sources ----------------------------------------------------------------------------------------


def test_the_first_place_that_has_the_model_is_taken_and_the_others_are_said(
    model_folder: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    volume = put(tmp_path / "volume" / "models", model_folder)
    found = locate(MODEL, COMMIT, environ)
    assert (found.folder, found.source, found.revision) == (volume, "volume", COMMIT)
    assert f"not baked into the image ({tmp_path / 'baked'} does not exist)" in found.reason
    assert f"not in RunPod's model cache ({tmp_path / 'runpod'} does not exist)" in found.reason

    runpod = put(tmp_path / "runpod", model_folder)
    found = locate(MODEL, COMMIT, environ)
    assert (found.folder, found.source) == (runpod, "runpod-cache")
    assert "not on the network volume" not in found.reason

    baked = put(tmp_path / "baked", model_folder)
    found = locate(MODEL, COMMIT, environ)
    assert (found.folder, found.source) == (baked, "baked")
    assert found.reason == f"weights: baked into the image; commit {COMMIT}"
    assert 0 <= found.seconds < 60


def test_a_folder_is_taken_as_it_is(model_folder: Path, environ: dict[str, str]) -> None:
    found = locate(str(model_folder), None, environ)
    assert (found.folder, found.source, found.revision) == (model_folder, "folder", None)
    assert str(model_folder) in found.reason


def test_a_folder_that_is_not_a_model_is_an_error(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist; copy the whole model there"):
        locate(str(tmp_path / "nothing"), None, environ)
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        locate(str(tmp_path), None, environ)


def test_the_hf_home_that_a_person_chose_goes_before_the_volume(
    model_folder: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    put(tmp_path / "volume" / "models", model_folder)
    theirs = put(tmp_path / "home" / "hub", model_folder)
    found = locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})
    assert (found.folder, found.source) == (theirs, "volume")
    assert f"in HF_HOME={tmp_path / 'home'}" in found.reason


def test_without_a_revision_main_is_taken_and_it_is_said_that_it_is_not_pinned(
    model_folder: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    put(tmp_path / "runpod", model_folder, OTHER, ref=None)
    main = put(tmp_path / "runpod", model_folder, COMMIT)
    found = locate(MODEL, None, environ)
    assert (found.folder, found.revision) == (main, COMMIT)
    assert f"not pinned: set MODEL_REVISION={COMMIT}" in found.reason


def test_without_a_revision_the_only_snapshot_is_taken(
    model_folder: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    put(tmp_path / "runpod", model_folder, OTHER, ref=None)
    assert locate(MODEL, None, environ).revision == OTHER


def test_a_branch_is_what_the_cache_notes_and_counts_as_not_pinned(
    model_folder: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    put(tmp_path / "runpod", model_folder, COMMIT, ref="refs/pr/1")
    found = locate(MODEL, "refs/pr/1", environ)
    assert found.revision == COMMIT
    assert "not pinned: MODEL_REVISION=refs/pr/1 is a name that can move" in found.reason


def empty(hub: Path, model: Path) -> None:
    hub.mkdir()


def another_commit(hub: Path, model: Path) -> None:
    put(hub, model, OTHER)


def no_snapshot(hub: Path, model: Path) -> None:
    shutil.rmtree(put(hub, model).parent)


def half_a_snapshot(hub: Path, model: Path) -> None:
    (put(hub, model) / "config.json").unlink()


def a_dangling_link(hub: Path, model: Path) -> None:
    (put(hub, model) / "model.safetensors").resolve().unlink()


PLACES: list[tuple[Callable[[Path, Path], None], str]] = [
    (empty, "holds no someone/tiny-nf4"),
    (another_commit, "it holds commit bbbbbbbb, not aaaaaaaa"),
    (no_snapshot, "it holds no snapshot, not aaaaaaaa"),
    (half_a_snapshot, "its snapshot aaaaaaaa is not whole: config.json is missing"),
    (a_dangling_link, "its snapshot aaaaaaaa is not whole: it has no model.safetensors"),
]


@pytest.mark.parametrize(("prepare", "why"), PLACES)
def test_a_place_that_does_not_do_is_passed_over_with_the_reason(
    prepare: Callable[[Path, Path], None], why: str, model_folder: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    prepare(tmp_path / "baked", model_folder)
    put(tmp_path / "runpod", model_folder)
    found = locate(MODEL, COMMIT, environ)
    assert found.source == "runpod-cache"
    assert why in found.reason


@pytest.mark.parametrize(
    ("note", "why"),
    [("", "holds no commit"), ("../../../etc", "holds no commit"), (None, "holds 2 snapshots and does not say")],
)
def test_a_cache_whose_notes_do_not_help_is_passed_over(
    note: str | None, why: str, model_folder: Path, environ: dict[str, str], tmp_path: Path
) -> None:
    put(tmp_path / "baked", model_folder, COMMIT, ref=None)
    snapshot = put(tmp_path / "baked", model_folder, OTHER, ref=None)
    if note is not None:
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text(note)
    put(tmp_path / "runpod", model_folder)
    found = locate(MODEL, None, environ)
    assert found.source == "runpod-cache"
    assert why in found.reason


@pytest.mark.parametrize(
    ("model_id", "revision", "says"),
    [
        ("", None, "no repository's name"),
        ("a/b/c", None, "no repository's name"),
        ("someone/..", None, "no repository's name"),
        ("some one/model", None, "no repository's name"),
        (MODEL, "../../main", "is no revision"),
        (MODEL, "", "is no revision"),
        (MODEL, "a b", "is no revision"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(
    model_id: str, revision: str | None, says: str, environ: dict[str, str]
) -> None:
    with pytest.raises(WeightsError, match=says):
        locate(model_id, revision, environ)


# --- whole or not ----------------------------------------------------------------------------------------------------


def test_a_whole_model_is_whole_in_one_file_and_in_shards(model_copy: Path) -> None:
    assert incomplete(model_copy) is None
    sharded(model_copy)
    assert incomplete(model_copy) is None


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove_a_shard(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def cut_a_shard(folder: Path) -> None:
    sharded(folder)
    cut(sorted(folder.glob("model-*.safetensors"))[-1])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_longer_file(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")


def an_endless_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def an_index(text: str) -> Callable[[Path], object]:
    """An index of shards in place of the one file."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (shutil.rmtree, "does not exist"),
    (remove("config.json"), "config.json is missing"),
    (write("config.json", "{"), "config.json is not a JSON object"),
    (write("config.json", "[]"), "config.json is not a JSON object"),
    (remove("tokenizer.json"), "it has no tokenizer"),
    (remove("model.safetensors"), "it has no model.safetensors"),
    (only_a_pickle, "'pytorch_model.bin' and no model.safetensors: only safetensors are loaded"),
    (write("model.safetensors", ""), "is cut off or not a safetensors file (0 bytes)"),
    (lambda folder: cut(folder / "model.safetensors"), "bytes where its header says"),
    (a_longer_file, "bytes where its header says"),
    (no_header, "is not a safetensors file"),
    (an_endless_header, "is cut off or not a safetensors file (64 bytes)"),
    (remove_a_shard, "shards are missing, model-00002-of-"),
    (cut_a_shard, "bytes where its header says"),
    (an_index("{}"), "is not an index of shards"),
    (an_index('{"weight_map": {"a": "../../x"}}'), "is not an index of shards"),
    (an_index('{"weight_map": ["a"]}'), "is not an index of shards"),
]


def test_what_is_checked_is_what_is_loaded(model_copy: Path) -> None:
    whole = (model_copy / "model.safetensors").read_bytes()
    sharded(model_copy)
    shards = weight_files(model_copy)
    assert len(shards) > 1
    # Where there are both, transformers loads the one file.
    (model_copy / "model.safetensors").write_bytes(whole)
    assert weight_files(model_copy) == ["model.safetensors"]
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"transformers_weights": shards[0]}))
    assert "names other weights" in (incomplete(model_copy) or "")


@pytest.mark.parametrize(("damage", "says"), FAULTS)
def test_what_is_not_whole_is_named(damage: Callable[[Path], object], says: str, model_copy: Path) -> None:
    damage(model_copy)
    fault = incomplete(model_copy)
    assert fault is not None
    assert says in fault
    assert (verify(model_copy, "size") or "").endswith("so that it is downloaded again")


def test_headers_are_read_and_not_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": torch.zeros(1000, 1000)}, path)
    read: list[int] = []
    opened = Path.open

    class Counted:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()

        def read(self, size: int = -1) -> Any:
            read.append(size)
            return self.file.read(size)

    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Counted(opened(self, *args, **kwargs)))
    assert list(weights.header(path)) == ["a.weight"]
    assert all(size >= 0 for size in read)
    assert sum(read) < 1000 < path.stat().st_size


# --- sums ------------------------------------------------------------------------------------------------------------


def test_sums_that_agree_and_files_that_were_not_downloaded_are_fine(model_copy: Path) -> None:
    (model_copy / "README.md").write_text("card")
    (model_copy / "LICENSE").write_text("licence")
    list_sums(model_copy)
    (model_copy / "LICENSE").unlink()  # no loader reads it
    assert verify(model_copy, "sha256") is None
    assert verify(model_copy, None) is None
    assert verify(model_copy, "") is None


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "model.safetensors has changed"),
        (remove("generation_config.json"), "generation_config.json is missing"),
        (write("added_tokens.json", "{}"), "added_tokens.json is not listed"),
        (write("SHA256SUMS", "nonsense\n"), "line 1 is no line of a manifest"),
        (remove("SHA256SUMS"), "has no SHA256SUMS; publish the model with `make ablate`"),
    ],
)
def test_what_the_sums_do_not_agree_with_is_named(
    damage: Callable[[Path], object], says: str, model_copy: Path
) -> None:
    list_sums(model_copy)
    damage(model_copy)
    assert verify(model_copy, "size") is None
    assert says in (verify(model_copy, "sha256") or "")


def test_an_unknown_way_to_verify_is_named(model_copy: Path) -> None:
    assert verify(model_copy, "md5") == "VERIFY_WEIGHTS=md5 is unknown; known are size, sha256"


# --- describe --------------------------------------------------------------------------------------------------------


def test_a_bf16_model_is_described_as_its_network_is(model_copy: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model_copy, dtype=torch.bfloat16)
    network.save_pretrained(model_copy)
    about = describe(model_copy)
    linear = [m for m in network.modules() if type(m) is torch.nn.Linear and m is not network.lm_head]
    assert about.parameters == sum(p.numel() for p in network.parameters())
    assert about.linear_parameters == sum(m.weight.numel() for m in linear)
    assert about.weight_bytes == (model_copy / "model.safetensors").stat().st_size
    assert about.weight_bytes - 2 * about.parameters < 10_000  # the header
    assert about.quantization == "none"
    assert (about.layers, about.kv_heads, about.head_dim, about.window) == (2, 1, 16, 2048)
    assert about.kv_bytes(10) == 2 * 2 * 10 * 1 * 16 * 2


def test_a_published_nf4_model_is_known_by_its_config(model_copy: Path, tmp_path: Path) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    network = AutoModelForCausalLM.from_pretrained(
        model_copy, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    network.save_pretrained(tmp_path / "nf4")
    about = describe(tmp_path / "nf4")
    assert about.quantization == "nf4"
    assert (about.parameters, about.linear_parameters) == (0, 0)  # packed bytes are not parameters
    assert 0 < about.weight_bytes == (tmp_path / "nf4" / "model.safetensors").stat().st_size


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size": 2560,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "vision_config": {"num_hidden_layers": 27, "hidden_size": 1152},
}


def of(config: dict[str, Any], folder: Path) -> weights.Description:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {
            "model.embed_tokens.weight": torch.zeros(10, 4, dtype=torch.bfloat16),
            "model.layers.0.mlp.down_proj.weight": torch.zeros(4, 8, dtype=torch.bfloat16),
            "model.norm.weight": torch.zeros(4, dtype=torch.bfloat16),
        },
        folder / "model.safetensors",
    )
    return describe(folder)


def test_a_llama_without_a_head_dim_has_the_one_of_its_heads(tmp_path: Path) -> None:
    about = of(LLAMA, tmp_path)
    assert (about.layers, about.kv_heads, about.head_dim, about.window) == (32, 8, 128, 131072)
    assert about.kv_bytes(8192) == 2 * 32 * 8 * 128 * 8192 * 2
    assert (about.parameters, about.linear_parameters) == (40 + 32 + 4, 32)


def test_the_language_model_of_a_gemma_counts_and_its_windows_are_kept_short(tmp_path: Path) -> None:
    about = of(GEMMA, tmp_path)
    assert (about.layers, about.sliding_layers, about.sliding_window, about.head_dim) == (1, 5, 1024, 256)
    assert about.kv_bytes(8192) == 2 * (8192 + 5 * 1024) * 4 * 256 * 2
    assert about.kv_bytes(100) == 2 * 6 * 100 * 4 * 256 * 2


def test_a_gpt_with_the_old_names_is_described(tmp_path: Path) -> None:
    about = of({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}, tmp_path)
    assert (about.layers, about.kv_heads, about.head_dim, about.window) == (12, 12, 64, 1024)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}, "nf4"),
        ({"_load_in_4bit": True, "quant_method": "bitsandbytes"}, "fp4"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "int8"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({}, "none"),
        (None, "none"),
    ],
)
def test_the_quantization_is_named(given: object, name: str, tmp_path: Path) -> None:
    assert of({**LLAMA, "quantization_config": given}, tmp_path).quantization == name


def test_a_config_that_says_nothing_makes_zeros_and_no_error(tmp_path: Path) -> None:
    about = of({"num_hidden_layers": "many", "hidden_size": None, "layer_types": 3}, tmp_path)
    assert (about.layers, about.kv_heads, about.head_dim, about.kv_bytes(8192)) == (0, 0, 0, 0)


def test_what_cannot_be_described_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json is missing"):
        describe(tmp_path)


# --- the Hub ---------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of a Hub as the client asks for a download: one repository of models or kernels at COMMIT."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked: list[str] = []
        self.fault: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self.faults_left = 10**6
        self.stalled = ""  # the part of a path whose answer waits for `go_on`
        self.go_on = threading.Event()
        self.token: str | None = None
        self.address = f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def downloaded(self) -> set[str]:
        return {path.rsplit("/", 1)[-1] for path in self.asked if "GET" in path and "/resolve/" in path}


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        if hub.stalled and hub.stalled in path:
            hub.go_on.wait(20)
            self.close_connection = True
            return
        if hub.fault and hub.faults_left > 0:
            hub.faults_left -= 1
            status, code = hub.fault
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self.resolve(hub.folder / path.split(f"/resolve/{COMMIT}/")[1])
        elif "/tree/" in path:
            below = hub.folder / path.partition(f"/tree/{COMMIT}")[2].lstrip("/")
            self.send_json(
                [{"type": "file", **self.entry(file)} for file in hub.files()]
                if "recursive=true" in self.path.lower()
                else [
                    {"type": "directory", "path": str(p.relative_to(hub.folder)), "oid": "0" * 40}
                    for p in below.iterdir()
                ]
            )
        elif path.startswith("/api/"):
            siblings = [
                {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in map(self.entry, hub.files())
            ]
            self.send_json({"id": MODEL, "sha": COMMIT, "siblings": siblings, "tags": [], "private": True})
        else:
            self.answer(404, b"", {})

    def entry(self, file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        return {"path": str(file.relative_to(self.server.folder)), "size": len(data), "oid": oid}

    def resolve(self, file: Path) -> None:
        if not file.is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        oid = self.entry(file)["oid"]
        self.answer(200, file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{oid}"'})

    def send_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(model_copy: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that holds the tiny model in shards, and much that no loader reads."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "PAUSE", 0.01)
    sharded(model_copy)
    list_sums(model_copy)
    for name in ("pytorch_model.bin", "model-q4.gguf", "consolidated.safetensors", "README.md", "modeling_x.py"):
        (model_copy / name).write_bytes(b"not for us")
    (model_copy / "onnx").mkdir()
    (model_copy / "onnx" / "config.json").write_text("{}")
    server = Hub(model_copy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environ["HF_ENDPOINT"] = server.address
    yield server
    huggingface_hub.close_session()
    server.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hub_is_asked_last_and_only_what_a_loader_reads_is_downloaded(
    hub: Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    found = locate(MODEL, COMMIT, environ)
    assert found.source == "hub"
    assert found.revision == COMMIT
    assert found.folder == tmp_path / "volume" / "models" / "models--someone--tiny-nf4" / "snapshots" / COMMIT
    for said in ("baked into the image", "RunPod's model cache", "network volume"):
        assert said in found.reason
    assert verify(found.folder, "sha256") is None
    unread = {"pytorch_model.bin", "model-q4.gguf", "consolidated.safetensors", "README.md", "modeling_x.py", "onnx"}
    assert unread.isdisjoint(path.name for path in found.folder.iterdir())
    assert AutoModelForCausalLM.from_pretrained(found.folder).config.hidden_size == 32

    asked = len(hub.asked)
    assert locate(MODEL, COMMIT, environ).source == "volume"  # the next worker
    assert len(hub.asked) == asked


def test_the_newest_commit_is_taken_without_a_revision(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    found = locate(MODEL, None, environ | {"HF_HOME": str(tmp_path / "home")})
    assert (found.source, found.revision) == ("hub", COMMIT)
    assert found.folder.is_relative_to(tmp_path / "home" / "hub")
    assert "not pinned" in found.reason


def test_a_volume_that_is_not_writable_is_said_and_not_used(
    hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(weights, "IMAGE_HF_HOME", str(tmp_path / "image"))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    found = locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "image")})
    assert found.folder.is_relative_to(tmp_path / "image" / "hub")
    assert f"{tmp_path / 'volume'} cannot be written by user" in found.reason


def test_a_private_model_needs_the_token(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    hub.token = "hf_right"  # noqa: S105 (of this Hub alone)
    with pytest.raises(
        WeightsError, match="check MODEL_ID; if it is private, set HF_TOKEN to a token that may read it"
    ):
        locate(MODEL, COMMIT, environ)
    with pytest.raises(WeightsError, match="check MODEL_ID; set HF_TOKEN to a token that may read it") as refused:
        locate(MODEL, COMMIT, environ | {"HF_TOKEN": "hf_wrong"})
    assert "hf_wrong" not in str(refused.value)
    assert locate(MODEL, COMMIT, environ | {"HF_TOKEN": "hf_right"}).source == "hub"


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (404, "RepoNotFound", f"shows no repository {MODEL}: check MODEL_ID"),
        (404, "", f"shows no repository {MODEL}: check MODEL_ID"),
        (404, "RevisionNotFound", f"{MODEL} has no revision {COMMIT}: set MODEL_REVISION to one of its commits"),
        (403, "GatedRepo", f"{MODEL} is gated: accept its terms at"),
        (401, "", "refuses access to someone/tiny-nf4 (HTTP 401)"),
        (403, "", "refuses access to someone/tiny-nf4 (HTTP 403)"),
        (429, "", "answers HTTP 429 for someone/tiny-nf4: try again later"),
        (500, "", "answers HTTP 500 for someone/tiny-nf4: try again later"),
    ],
)
def test_a_refusal_of_the_hub_names_the_remedy(
    status: int, code: str, says: str, hub: Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    hub.fault = (status, code)
    with pytest.raises(WeightsError) as raised:
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})
    assert says in str(raised.value)
    assert raised.value.check == "weights"
    assert len(hub.asked) == (weights.ATTEMPTS if status in (429, 500) else 1)


def test_a_fault_that_passes_is_waited_for(
    hub: Hub, environ: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fault, hub.faults_left = (503, ""), 2
    assert locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")}).source == "hub"
    assert capsys.readouterr().out.count("answers HTTP 503 for someone/tiny-nf4: try again later; trying again") == 2


def test_no_network_names_the_network(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    environ |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    with pytest.raises(WeightsError, match=r"http://127.0.0.1:9 cannot be reached \(ConnectError\): check the network"):
        locate(MODEL, COMMIT, environ)


def test_offline_mode_is_named(environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="unset HF_HUB_OFFLINE, or bake the model"):
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})


@pytest.mark.parametrize("stalled", ["/revision/", "/tree/", "/resolve/"])
def test_a_hub_that_stalls_is_given_up(
    stalled: str, hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the client's calls that insist on no time limit, as its listing of files does."""
    monkeypatch.setattr(weights, "READ_TIMEOUT", 0.2)
    monkeypatch.setattr(weights, "ATTEMPTS", 1)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    hub.stalled = stalled
    started = time.monotonic()
    with pytest.raises(WeightsError, match=r"cannot be reached|failed \(LocalEntryNotFoundError"):
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})
    assert time.monotonic() - started < 15
    assert any(stalled in path for path in hub.asked)


def test_too_little_disk_is_said_before_the_download(
    hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        WeightsError, match=r"0\.0 GB free and the download needs 0\.2 GB; raise the endpoint's"
    ) as full:
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})
    assert full.value.check == "disk"
    assert not hub.downloaded()


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "is full: raise the endpoint's container disk"),
        (errno.EDQUOT, "is full: raise the endpoint's container disk"),
        (errno.EACCES, "set HF_HOME to a folder that can"),
        (errno.EROFS, "set HF_HOME to a folder that can"),
    ],
)
def test_a_disk_that_does_not_take_the_download_is_said(
    number: int, says: str, hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightsError, match=says) as raised:
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})
    assert raised.value.check == "disk"


def test_what_the_xet_library_raises_is_tried_again_and_said(
    hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise RuntimeError("Data processing error: CAS service error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightsError, match=r"failed \(RuntimeError: Data processing error: CAS service error\)"):
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})
    assert len(calls) == weights.ATTEMPTS


def test_a_defect_of_ours_is_not_dressed_up(
    hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(TypeError, match="a defect"):
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})


def test_a_damaged_file_on_the_volume_is_downloaded_again(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    folder = locate(MODEL, COMMIT, environ).folder
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    cut(shard.resolve())
    hub.asked.clear()
    found = locate(MODEL, COMMIT, environ)
    assert found.source == "hub"
    assert "is not whole" in found.reason
    assert verify(found.folder, "sha256") is None
    assert hub.downloaded() == {shard.name}


def test_a_repository_that_is_not_whole_is_the_publishers_to_mend(
    hub: Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    sorted(hub.folder.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(
        WeightsError, match=r"shards are missing, model-00001-of-\d+.safetensors first; publish the whole"
    ):
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})


def test_a_repository_with_a_broken_index_is_named(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    (hub.folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"model.safetensors.index.json is not a JSON object; publish"):
        locate(MODEL, COMMIT, environ | {"HF_HOME": str(tmp_path / "home")})


# --- baking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["", "main", "a" * 39, "A" * 40])
def test_a_model_is_baked_at_a_commit_only(revision: str, environ: dict[str, str]) -> None:
    with pytest.raises(WeightsError, match="MODEL_REVISION to the 40 hex digits of its commit"):
        weights.main(["model"], environ | {"MODEL_ID": MODEL, "MODEL_REVISION": revision})


def test_a_baked_model_is_found_and_was_checked(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    weights.main(["model"], environ | {"MODEL_ID": MODEL, "MODEL_REVISION": COMMIT})
    hub.shutdown()
    found = locate(MODEL, COMMIT, environ)
    assert (found.source, found.folder.is_relative_to(tmp_path / "baked")) == ("baked", True)


def test_a_model_that_its_sums_do_not_agree_with_is_not_baked(hub: Hub, environ: dict[str, str]) -> None:
    (hub.folder / "generation_config.json").write_text('{"changed": true}')
    with pytest.raises(WeightsError, match=r"generation_config.json has changed"):
        weights.main(["model"], environ | {"MODEL_ID": MODEL, "MODEL_REVISION": COMMIT})


def test_another_command_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(WeightsError, match="usage"):
        weights.main(["bake"], environ)


# --- attention -------------------------------------------------------------------------------------------------------

STABLE = "torch-stable-abi210-cu126-x86_64-linux"
BUILDS = [
    STABLE,
    "torch-stable-abi210-cu124-x86_64-linux",
    "torch-stable-abi214-cu126-x86_64-linux",
    "torch-stable-abi210-cu126-aarch64-linux",
    "torch-stable-abi210-cpu-x86_64-linux",
    "torch213-cxx11-cu126-x86_64-linux",
    "torch-stable-abi210-cu130-x86_64-linux",
]


@pytest.mark.parametrize(
    ("names", "torch_version", "cuda", "chosen"),
    [
        (BUILDS, "2.13.0+cu126", "12.6", STABLE),
        (BUILDS, "2.13.0+cu130", "13.0", "torch-stable-abi210-cu130-x86_64-linux"),
        (BUILDS, "2.14.1", "12.8", "torch-stable-abi214-cu126-x86_64-linux"),
        (BUILDS[5:], "2.13.0", "12.8", "torch213-cxx11-cu126-x86_64-linux"),
        (BUILDS[5:], "2.12.0", "12.8", None),
        (BUILDS, "2.13.0", "12.3", None),
        (BUILDS, "2.9.0", "12.6", None),
        (BUILDS, "2.13.0+cpu", None, None),
        ([], "2.13.0", "12.6", None),
    ],
)
def test_the_build_for_the_images_torch_and_cuda_is_chosen(
    names: list[str], torch_version: str, cuda: str | None, chosen: str | None
) -> None:
    assert variant(names, torch_version, cuda) == chosen


KERNEL = f"kernels-community/flash-attn2@{COMMIT}"
INTERFACE = "flash_attn_func = flash_attn_varlen_func = flash_attn_with_kvcache = print\n"


@pytest.fixture
def kernel_hub(hub: Hub) -> Hub:
    shutil.rmtree(hub.folder)
    for name in BUILDS:
        build = hub.folder / "build" / name
        build.mkdir(parents=True)
        (build / "flash_attn_interface.py").write_text(INTERFACE)
        (build / "__init__.py").write_text("from .flash_attn_interface import *\n")
    return hub


@pytest.fixture
def module_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is put on the module path and imported from there is gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.usefixtures("module_path")
def test_a_kernel_is_laid_out_as_the_package_that_transformers_looks_for(
    kernel_hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_flash_attention_utils import _lazy_imports
    from transformers.utils import import_utils

    out = tmp_path / "flash"
    weights.fetch_kernel(KERNEL, out, environ, "2.13.0+cu126", "12.6")
    assert {path.name for path in out.iterdir()} == {"flash_attn", "flash_attn-2.8.0+aaaaaaaa.dist-info"}
    assert all(STABLE in path for path in kernel_hub.asked if "GET" in path and "/resolve/" in path)

    assert attention({"FLASH_ATTENTION": str(out)}, lambda: (8, 0)) == "flash_attention_2"
    # On a machine with a GPU, transformers then takes it for the installed package and asks no hub for a kernel.
    for cached in (import_utils._package_distribution_mapping, import_utils.is_flash_attn_2_available):
        cached.cache_clear()
    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    try:
        assert import_utils.is_flash_attn_2_available()
        functions = _lazy_imports("flash_attention_2")
        assert all(callable(function) for function in functions)
        assert functions[0] is print
    finally:
        for cached in (import_utils._package_distribution_mapping, import_utils.is_flash_attn_2_available):
            cached.cache_clear()


@pytest.mark.parametrize(
    ("named", "cuda", "says"),
    [
        ("kernels-community/flash-attn2", "12.6", "set it like kernels-community/flash-attn2@<40 hex digits>"),
        ("kernels-community/flash-attn2@v3", "12.6", "is not a kernel at a commit"),
        (KERNEL, None, r"has no build for torch 2.13.0 with CUDA None; it has: torch"),
        (KERNEL, "11.8", r"has no build for torch 2.13.0 with CUDA 11.8"),
    ],
)
def test_a_kernel_that_cannot_be_baked_is_named(
    named: str, cuda: str | None, says: str, kernel_hub: Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=says):
        weights.fetch_kernel(named, tmp_path / "flash", environ, "2.13.0", cuda)


def test_another_kind_of_kernel_is_refused(kernel_hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    (kernel_hub.folder / "build" / STABLE / "flash_attn_interface.py").unlink()
    with pytest.raises(WeightsError, match="is not a flash-attention kernel"):
        weights.fetch_kernel(KERNEL, tmp_path / "flash", environ, "2.13.0", "12.6")


def test_a_kernel_that_is_not_there_is_named(kernel_hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    kernel_hub.fault = (404, "RepoNotFound")
    with pytest.raises(WeightsError, match="shows no repository kernels-community/flash-attn2: check FLASH_KERNEL"):
        weights.fetch_kernel(KERNEL, tmp_path / "flash", environ, "2.13.0", "12.6")


def test_after_the_weights_are_found_no_library_asks_a_hub(
    kernel_hub: Hub, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    weights.fetch_kernel(KERNEL, tmp_path / "before", environ, "2.13.0", "12.6")
    asked = len(kernel_hub.asked)
    assert asked
    weights.go_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE"):
        weights.fetch_kernel(KERNEL, tmp_path / "after", environ, "2.13.0", "12.6")
    assert len(kernel_hub.asked) == asked


def test_the_images_hold_no_package_that_fetches_kernels() -> None:
    """bitsandbytes asks for it at its import, and does without."""
    locks = sorted((ROOT / "images" / "worker").glob("*.lock"))
    assert locks
    assert [lock.name for lock in locks if re.search(r"^kernels==", lock.read_text(encoding="utf-8"), re.M)] == []


def test_without_a_kernel_or_a_gpu_attention_is_sdpa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention({}) == "sdpa"
    assert attention({"FLASH_ATTENTION": ""}, lambda: (9, 0)) == "sdpa"
    said = capsys.readouterr().out
    assert "attention: sdpa, because this image was built without FLASH_KERNEL" in said
    assert "build the image with one, see docs/worker.md" in said
    if not torch.cuda.is_available():
        assert attention({"FLASH_ATTENTION": str(tmp_path)}) == "sdpa"


@pytest.mark.usefixtures("module_path")
def test_a_kernel_that_is_of_no_use_here_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention({"FLASH_ATTENTION": str(tmp_path)}, lambda: (7, 5)) == "sdpa"
    assert "needs an Ampere GPU or newer and this one is (7, 5)" in capsys.readouterr().out
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise OSError('undefined symbol: x')")
    assert attention({"FLASH_ATTENTION": str(tmp_path)}, lambda: (9, 0)) == "sdpa"
    assert "does not load (undefined symbol: x): build the image again" in capsys.readouterr().out
