"""config/endpoint.yaml: what is shipped, what is refused and how, and that values arrive byte for byte."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.problems import Problem
from endpoint.desired import Desired, load

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "ab" * 32
IMAGE = f"docker.io/someone/open-synthesis-worker@{DIGEST}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config folder like the shipped one, and an empty deploy folder beside it."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    (tmp_path / "deploy").mkdir()
    return tmp_path


def edit(folder: Path, old: str, new: str) -> int:
    """Replace the one line that holds `old`, and return the line's number."""
    path = folder / "config" / "endpoint.yaml"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")
    return text[: text.index(old)].count("\n") + 1


def read(folder: Path, **environ: str) -> Desired:
    return load(folder / "config", folder / "deploy", environ)


def test_the_shipped_file_is_the_guides_endpoint(folder: Path) -> None:
    desired = read(folder, IMAGE=IMAGE)
    body = desired.body
    assert body["workers"] == {"min": 0, "max": 3, "idleTimeout": 60}
    assert body["timeout"] == 300_000
    assert body["image"] == IMAGE
    assert body["env"]["IMAGE"] == IMAGE
    assert body["env"]["HF_TOKEN"] == "{{ RUNPOD_SECRET_hf_token }}"  # noqa: S105
    assert 1 <= len(body["gpu"]["pools"]) <= 3


def test_every_key_of_the_file_is_explained(folder: Path) -> None:
    """By a comment on its line or above its block: it is the page that a person reads before spending money."""
    text = (folder / "config" / "endpoint.yaml").read_text(encoding="utf-8")
    schema = json.loads((folder / "config" / "endpoint.schema.json").read_text(encoding="utf-8"))
    assert set(schema["properties"]) == set(schema["required"])
    for key, rule in schema["properties"].items():
        assert re.search(rf"^{key}:", text, re.MULTILINE), key
        leaves = [rule] if rule.get("type") != "object" or key == "env" else rule["properties"].values()
        assert all("description" in leaf for leaf in leaves), key


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  max: 3", "  max: many", 'workers.max is "many"; must be most workers at once'),
        ("  max: 3", "  max: 0", "workers.max is 0"),
        ("  max: 3", "  most: 3", "unknown key workers.most; known are min, max, idleTimeout"),
        ("  count: 1", "  count: 1.5", "gpu.count is 1.5"),
        ("timeout: 300000", "timeout: 300", "timeout is 300; must be milliseconds"),
        ("timeout: 300000", "timeout: yes", "timeout is true"),
        ("flashboot: FLASHBOOT", "flashboot: true", "flashboot is true; must be OFF, FLASHBOOT or PRIORITY_FLASHBOOT"),
        ("  pools: null", "  pools: [A, B, C, D]", "gpu.pools is"),
        ("  pools: null", "  pools: []", "gpu.pools is []"),
        (
            '  minCudaVersion: "12.6"',
            "  minCudaVersion: 12.6",
            "gpu.minCudaVersion is 12.6; must be a version in quotes",
        ),
        ("  allowedCudaVersions: []", '  allowedCudaVersions: ["12.8"]', "exclude each other"),
        ("  min: 0", "  min: 4", "workers.min must not be above workers.max"),
        ("  queueDelay: 4", "  requestCount: 4", "scaling is"),
        ("  base: Qwen/Qwen3-14B", "  base: Qwen/Qwen9", "Qwen/Qwen9 is not in"),
        ('  revision: "0', "  revision: main #", 'model.revision is "main"; must be the 40 hex digits'),
        ("  QUANTIZATION: nf4", "  QUANTIZATION: 4", "env.QUANTIZATION must be"),
        ("  QUANTIZATION: nf4", "  2FAST: x", "'2FAST' is no variable's name"),
        ("  QUANTIZATION: nf4", "  MODEL_ID: you/other", "env.MODEL_ID is set by make deploy"),
        ("  QUANTIZATION: nf4", "  RUNPOD_ENDPOINT_ID: x", "RunPod's own"),
        ("  QUANTIZATION: nf4", "  HF_TOKEN: x", "'HF_TOKEN' stands twice"),
        ("  QUANTIZATION: nf4", '  QUANTIZATION: "a\\0b"', "NUL"),
        ("type: QUEUE\n", "type: LOAD_BALANCER\n", 'type is "LOAD_BALANCER"'),
        ("  QUANTIZATION: nf4", "  1: x", "must be text: put it in quotes"),
        ("  QUANTIZATION: nf4", "  ON: x", "must be text: put it in quotes"),
        ("  queueDelay: 4", "  queueDelay: .nan", "must be a number, not nan"),
        ("deadline: 1800", "deadline: .nan", "must be a number, not nan"),
        ("dataCenterIds: []", "dataCenterIds: &a []\nx: *a", "anchors"),
        ("name: open-synthesis #", "name: open-synthesis -fb #", "must not end in ' -fb'"),
        ('args: ""', "args: --token hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", "args holds a secret"),
        ("image: null", "image: docker.io/you/worker:latest", "names no digest"),
        ("image: null", f"image: docker.io/you/worker@{DIGEST[:-1]}", "names no digest"),
        ("image: null", f"image: docker.io/You/worker@{DIGEST}", "names no digest"),
    ],
)
def test_an_error_names_line_and_field(folder: Path, old: str, new: str, says: str) -> None:
    line = edit(folder, old, new)
    with pytest.raises(Problem) as problem:
        read(folder)
    assert says in str(problem.value)
    told = [int(number) for number in re.findall(r"endpoint\.yaml:(\d+):", str(problem.value))]
    # A block that does not fit as a whole is told where it begins: the line above, or two.
    assert {line, line - 1, line - 2} & set(told), (told, line)
    assert problem.value.code == 2


def test_a_missing_key_is_named(folder: Path) -> None:
    edit(folder, "  idleTimeout: 60 #", "  #")
    with pytest.raises(Problem, match=r"endpoint\.yaml:\d+: workers\.idleTimeout is missing"):
        read(folder)


@pytest.mark.parametrize(
    "text", ["", "- a\n", "just text\n", "a: [1\n", "{}", "\ta: 1\n", "&a [*a]\n", "a: 2026-13-45\n"]
)
def test_what_is_no_endpoint_file_at_all(folder: Path, text: str) -> None:
    (folder / "config" / "endpoint.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(Problem, match=r"endpoint\.yaml"):
        read(folder)


SECRETS = [
    ("HF_TOKEN", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"),
    ("ANYTHING", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"),
    ("URL", "https://x:rpa_ABCDEFGHIJKLMNOPQRSTUVWX@host"),
    ("API_KEY", "correct horse battery staple"),
    ("DB_PASSWORD", "x"),
    ("SECRET", "{{ RUNPOD_SECRET_a }} and more"),
    ("CERT", "-----BEGIN RSA PRIVATE KEY-----"),
    ("OPENAI_APIKEY", "0123456789abcdef0123456789abcdef"),
    ("DATABASE_URL", "postgres://user:letmein@db/x"),
]


@pytest.mark.parametrize(("name", "value"), SECRETS)
def test_a_secret_in_the_file_is_refused_and_not_shown(folder: Path, name: str, value: str) -> None:
    if name == "HF_TOKEN":
        edit(folder, '"{{ RUNPOD_SECRET_hf_token }}"', json.dumps(value))
    else:
        edit(folder, "  QUANTIZATION: nf4", f"  {name}: {json.dumps(value)}")
    with pytest.raises(Problem, match="RUNPOD_SECRET_") as problem:
        read(folder)
    assert value not in str(problem.value) or value == "x"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "x"), ("KEYBOARD", "x"), ("MONKEY", "x"), ("QUEUE_KEYS_PER", "x"), ("MAX_TOKEN_COUNT", "512"),
        ("USE_KEY", "false"),
    ],
)  # fmt: skip
def test_an_innocent_variable_is_no_secret(folder: Path, name: str, value: str) -> None:
    edit(folder, "  QUANTIZATION: nf4", f"  {name}: '{value}'")
    assert read(folder).body["env"][name] == value


def test_the_release_is_a_hash_of_what_a_worker_is_made_from(folder: Path) -> None:
    """So that an answer tells which release it came from, and a change of limits makes no new one."""
    first = read(folder, IMAGE=IMAGE).body["env"]["RELEASE"]
    edit(folder, "  max: 3", "  max: 2")
    assert read(folder, IMAGE=IMAGE).body["env"]["RELEASE"] == first
    edit(folder, "  QUANTIZATION: nf4", "  QUANTIZATION: none")
    assert read(folder, IMAGE=IMAGE).body["env"]["RELEASE"] != first
    assert "RELEASE" not in read(folder).body["env"]


BYTES = [
    'say "hi"',
    "it's $5 & `id` $(id) \\n",
    "line one\nline two\n",
    "{{ braces }} {x} }}{{",
    "café 🍬\t",
    " padded ",
    "#no comment",
    "",
]


@pytest.mark.parametrize("value", BYTES)
def test_values_arrive_byte_for_byte(folder: Path, value: str) -> None:
    edit(folder, "  QUANTIZATION: nf4", f"  TRICKY: {json.dumps(value, ensure_ascii=False)}")
    assert read(folder).body["env"]["TRICKY"] == value


def test_where_the_image_comes_from(folder: Path) -> None:
    other = f"ghcr.io/a/b@{DIGEST}"
    assert read(folder).image is None
    assert "image" not in read(folder).body
    assert "make push" in read(folder).image_from
    (folder / "deploy" / "image.json").write_text(json.dumps({"image": IMAGE}), encoding="utf-8")
    assert read(folder).image == IMAGE
    assert read(folder, IMAGE="").image == IMAGE
    edit(folder, "image: null", f"image: {other}")
    assert read(folder).image == other
    assert read(folder, IMAGE=IMAGE).image == IMAGE


@pytest.mark.parametrize("content", ["", "[]", '{"image": "docker.io/you/worker:1"}', '{"image": 3}', "{}"])
def test_a_broken_image_record_is_told(folder: Path, content: str) -> None:
    (folder / "deploy" / "image.json").write_text(content, encoding="utf-8")
    with pytest.raises(Problem, match="make push"):
        read(folder)


def test_request_count_has_no_idle_timeout(folder: Path) -> None:
    """RunPod refuses the field with this scaler on a queue."""
    edit(folder, "  type: QUEUE_DELAY", "  type: REQUEST_COUNT")
    edit(folder, "  queueDelay: 4", "  requestCount: 4")
    body = read(folder).body
    assert body["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 4}
    assert "idleTimeout" not in body["workers"]


def test_editors_find_the_schema(folder: Path) -> None:
    first = (folder / "config" / "endpoint.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert (folder / "config" / first.split("$schema=")[1]).is_file()
    data: Any = yaml.safe_load((folder / "config" / "endpoint.yaml").read_text(encoding="utf-8"))
    assert (
        list(data) == json.loads((folder / "config" / "endpoint.schema.json").read_text(encoding="utf-8"))["required"]
    )
