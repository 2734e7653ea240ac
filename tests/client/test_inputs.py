"""Bad input: each is named with what, where and the next step, leaves with the agreed exit code, and writes nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from tests.client.support import KEY, NAPS, SLEEP, TREE, Client, Outcome, Scripted, as_lines, wait_for

import settings
from common.problems import BAD_INPUT, TRY_LATER, Problem

ASK = {"Q": NAPS, "DOMAIN": "sleep"}
GOOD = SLEEP[0]


def refused(client: Client, outcome: Outcome, before: dict[str, str], *says: str) -> None:
    """The program ended with exit code 2, said these words, and wrote nothing."""
    assert outcome.code == BAD_INPUT, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.out == ""
    for words in says:
        assert words in outcome.err
    assert client.written() == before


# --- Q and DOMAIN ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["synth", "retrieve"])
@pytest.mark.parametrize(
    ("question", "says"),
    [
        (None, "Q is empty. Try: make synth Q="),
        ("", "Q is empty"),
        (" \t\n", "Q is empty"),
        ("\u200b\u2060\x1b[31m", "Q is empty"),
        ("x" * 10_001, "Q has 10001 characters, 10000 are allowed"),
        ("caf\udce9", "Q is not valid UTF-8"),
    ],
    ids=["missing", "empty", "blank", "invisible", "too long", "invalid UTF-8"],
)
def test_a_question_that_cannot_be_asked_is_refused(
    client: Client, scripted: Scripted, program: str, question: str | None, says: str
) -> None:
    before = client.written()
    variables = ASK | ({"Q": question} if question is not None else {})
    if question is None:
        del variables["Q"]
    refused(client, client.run(program, **variables), before, says)
    assert scripted.seen == []


@pytest.mark.parametrize("program", ["synth", "retrieve", "ingest"])
@pytest.mark.parametrize(
    ("domain", "says"),
    [
        ("", "DOMAIN is empty. Try: DOMAIN=psychology"),
        ("  ", "DOMAIN is empty"),
        ("Sleep Research", "Try: DOMAIN=sleep-research"),
        ("../x", "DOMAIN='../x' is not a domain name"),
        ("a/b", "is not a domain name"),
        (".", "is not a domain name"),
        ("sleep\n", "is not a domain name"),
        ("schläfrig", "is not a domain name"),
        ("x" * 64, "63 at most"),
        ("sle\udce9p", "is not a domain name"),
    ],
)
def test_a_domain_that_is_no_name_is_refused(client: Client, program: str, domain: str, says: str) -> None:
    (client.root / "good.jsonl").write_bytes(as_lines(GOOD))
    before = client.written()
    outcome = client.run(program, Q=NAPS, DOMAIN=domain, FROM="good.jsonl")
    refused(client, outcome, before, says)


@pytest.mark.parametrize("program", ["synth", "retrieve"])
def test_an_unknown_domain_is_answered_with_those_that_exist(client: Client, scripted: Scripted, program: str) -> None:
    (client.corpus / "dreams.jsonl").write_bytes(as_lines(GOOD))
    before = client.written()
    outcome = client.run(program, Q=NAPS, DOMAIN="nowhere")
    says = "domain nowhere does not exist; there is dreams, sleep. Add it with: make ingest DOMAIN=nowhere FROM="
    refused(client, outcome, before, says)
    assert scripted.seen == []


def test_without_any_domain_the_message_says_none(empty: Client) -> None:
    refused(empty, empty.run("retrieve", **ASK), {}, "there is none")


# --- config/inference.yaml -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["synth", "retrieve", "ingest"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist; restore it: git checkout config/inference.yaml"),
        (b"", "must hold keys and values"),
        (b"- 1\n- 2\n", "must hold keys and values"),
        (b"temperature: [1\n", "is not YAML"),
        (b"temperature: \xff\n", "is not YAML"),
        (b"seed: 2026-99-99\n", "is not YAML"),
        (b"!!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
    ids=["missing", "empty", "a list", "broken", "not UTF-8", "an impossible date", "code"],
)
def test_a_configuration_that_cannot_be_read_is_named(
    client: Client, program: str, content: bytes | None, says: str
) -> None:
    path = client.root / "config" / "inference.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    (client.root / "good.jsonl").write_bytes(as_lines(GOOD))
    before = client.written()
    outcome = client.run(program, **ASK, FROM="good.jsonl")
    refused(client, outcome, before, "config/inference.yaml", says)


def test_a_folder_in_place_of_the_configuration_is_named(client: Client) -> None:
    path = client.root / "config" / "inference.yaml"
    path.unlink()
    path.mkdir()
    refused(client, client.run("retrieve", **ASK), client.written(), "config/inference.yaml cannot be read")


def test_an_unknown_key_and_a_missing_key_are_named(client: Client, tmp_path: Path) -> None:
    client.configure(top_k=5)
    refused(client, client.run("retrieve", **ASK), client.written(), "unknown key top_k; the keys are temperature")
    path = client.root / "config" / "inference.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "top_" not in line))
    refused(client, client.run("retrieve", **ASK), client.written(), "missing key top_p; the keys are")


NUMBERS: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1, math.nan, math.inf, "0.3", None, True, [1]],
    "top_p": [0, 1.01, math.nan, "0.9", False],
    "repetition_penalty": [0.49, 2.01, math.nan, "1"],
    "max_new_tokens": [0, 32769, 1.5, "1", math.nan, True, 10**400],
    "n_results": [0, 201, 2.0, None],
    "min_similarity": [-1.1, 1.1, math.nan, "0.2"],
    "queue_timeout": [0, 86_401, 1.5, math.inf],
    "execution_timeout": [4, 604_801, "300"],
    "seed": [-1, 2**63, 1.0, True, "7"],
    "embedding_model": ["", "  ", None, 5, ["x"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NUMBERS.items() for value in values])
def test_a_value_out_of_range_or_of_the_wrong_type_is_named_with_its_key(
    empty: Client, key: str, value: object
) -> None:
    empty.configure(**{key: value})
    with pytest.raises(Problem) as caught:
        settings.load(empty.root / "config" / "inference.yaml")
    assert caught.value.code == BAD_INPUT
    assert f"inference.yaml: {key} must be" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("temperature", [0, 2, 0.5]),
        ("top_p", [0.01, 1]),
        ("seed", [None, 0, 2**63 - 1]),
        ("min_similarity", [-1, 1]),
        ("execution_timeout", [5, 604_800]),
    ],
)
def test_the_limits_themselves_are_allowed(empty: Client, key: str, values: list[Any]) -> None:
    for value in values:
        empty.configure(**{key: value})
        assert getattr(settings.load(empty.root / "config" / "inference.yaml"), key) == value


def test_the_shipped_configuration_is_valid() -> None:
    loaded = settings.load(TREE / "config" / "inference.yaml")
    assert loaded.embedding_model == settings.SHIPPED_MODEL
    assert set(loaded.sampling()) == {"temperature", "top_p", "repetition_penalty", "max_new_tokens", "seed"}


# --- the endpoint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RUNPOD_API_KEY": ""}, "RUNPOD_API_KEY is not set. Set it beside RUNPOD_ENDPOINT_ID in .env"),
        ({"RUNPOD_ENDPOINT_ID": ""}, "RUNPOD_ENDPOINT_ID is not set. Set it beside RUNPOD_API_KEY in .env"),
        ({"RUNPOD_ENDPOINT_ID": "a/b"}, "is not an endpoint id; the RunPod console shows it"),
        ({"RUNPOD_ENDPOINT_ID": "abc?x=1"}, "is not an endpoint id"),
        ({"RUNPOD_ENDPOINT_ID": "é"}, "is not an endpoint id"),
        ({"RUNPOD_ENDPOINT_ID": "x" * 65}, "is not an endpoint id"),
        ({"RUNPOD_API_KEY": f"{KEY} "}, "RUNPOD_API_KEY has a space or a character that no key has"),
        ({"RUNPOD_API_KEY": f"{KEY}\nX: y"}, "RUNPOD_API_KEY has a space"),
        ({"RUNPOD_API_KEY": f"{KEY}é"}, "RUNPOD_API_KEY has a space"),
        ({"RUNPOD_API_KEY": f"{KEY}\udce9"}, "RUNPOD_API_KEY has a space"),
        ({"RUNPOD_JOBS_URL": "api.runpod.ai/v2"}, "is not a URL like https://api.runpod.ai/v2"),
        ({"RUNPOD_JOBS_URL": "ftp://api.runpod.ai/v2"}, "is not a URL like"),
        ({"RUNPOD_JOBS_URL": "https://"}, "is not a URL like"),
        ({"RUNPOD_JOBS_URL": "https://api.runpod.ai/v2?key=1"}, "is not a URL like"),
        ({"RUNPOD_JOBS_URL": "https://api.runpod.ai/v2#x"}, "is not a URL like"),
        ({"RUNPOD_JOBS_URL": "https://api.runpod.ai/v2\n/x"}, "is not a URL like"),
        ({"RUNPOD_JOBS_URL": "http://[::1"}, "is not a URL like"),
        ({"RUNPOD_JOBS_URL": "http://localhost:99999/v2"}, "is not a URL like"),
        ({"RUNPOD_JOBS_URL": "http://api.runpod.ai/v2"}, "would send the key unencrypted; use https"),
        ({"RUNPOD_JOBS_URL": "http://127.example.org/v2"}, "would send the key unencrypted"),
        ({"RUNPOD_JOBS_URL": "http://10.0.0.5:8000/v2"}, "would send the key unencrypted"),
        ({"RUNPOD_JOBS_URL": "http://[2001:db8::1]/v2"}, "would send the key unencrypted"),
        ({"RUNPOD_JOBS_URL": "http://134744072/v2"}, "would send the key unencrypted"),
    ],
)
def test_an_endpoint_that_cannot_be_right_is_refused(
    client: Client, scripted: Scripted, variables: dict[str, str], says: str
) -> None:
    before = client.written()
    refused(client, client.run("synth", **ASK | variables), before, says)
    assert scripted.seen == []


def test_a_password_in_the_jobs_url_is_not_shown(client: Client, scripted: Scripted) -> None:
    outcome = client.run("synth", **ASK, RUNPOD_JOBS_URL="https://me:hunter2@api.runpod.ai/v2")
    refused(client, outcome, client.written(), "RUNPOD_JOBS_URL is not a URL like")
    assert "hunter2" not in outcome.err


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:1/v2/",
        "http://127.0.0.1:1/v2",
        "http://[::1]:1/v2",
        "http://open-synthesis-0a1b2c3d-runpod:8000/v2",
        "",
    ],
)
def test_this_machine_a_container_beside_it_and_runpod_are_fine(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in (("RUNPOD_JOBS_URL", url), ("RUNPOD_ENDPOINT_ID", "ep"), ("RUNPOD_API_KEY", KEY)):
        monkeypatch.setenv(name, value)
    endpoint = settings.endpoint()
    assert endpoint.url == (url.rstrip("/") or settings.RUNPOD_JOBS_URL)
    assert KEY not in repr(endpoint)


# --- FROM ------------------------------------------------------------------------------------------------------------


def changed(**fields: Any) -> bytes:
    return as_lines(GOOD, {**GOOD, "id": "second", **fields})


def without(key: str) -> bytes:
    return as_lines(GOOD, {name: value for name, value in {**GOOD, "id": "second"}.items() if name != key})


BAD_RECORDS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{\n", ":1: not JSON:"),
    "not an object": (b"[1, 2]\n", ":1: not a record: expected one JSON object per line"),
    "a bare word": (b'"text"\n', ":1: not a record"),
    "nested too deeply": (b"[" * 100_000 + b"\n", ":1: not a record: nested too deeply"),
    "NaN": (b'{"id": "a", "title": "t", "text": "x", "year": NaN}\n', ":1: not JSON: NaN is not a number JSON knows"),
    "infinity": (b'{"id": "a", "title": "t", "text": "x", "year": Infinity}\n', ":1: not JSON: Infinity"),
    "a key twice": (b'{"id": "a", "id": "b", "title": "t", "text": "x"}\n', ":1: key id is there twice"),
    "duplicate id": (as_lines(GOOD, GOOD), ":2: id roe-2019 is on line 1 already"),
    "unknown key": (changed(colour="red"), ":2: unknown key colour; the keys are id, title, text"),
    "a hostile key": (changed(**{"\x1b]0;x\x07key": 1}), ":2: unknown key key; the keys are"),
    "missing id": (without("id"), ":2: id is missing, empty or not text"),
    "missing title": (without("title"), ":2: title is missing, empty or not text"),
    "missing text": (without("text"), ":2: text is missing, empty or not text"),
    "empty text": (changed(text=""), ":2: text is missing, empty"),
    "blank text": (changed(text=" \n "), ":2: text is missing, empty"),
    "invisible text": (changed(text="\u200b\U000e0041"), ":2: text is missing, empty"),
    "text as a list": (changed(text=["a"]), ":2: text is missing, empty or not text"),
    "id as a number": (changed(id=5), ":2: id is missing, empty or not text"),
    "id with spaces": (changed(id="a b"), ":2: id must be at most 200 visible characters without spaces"),
    "id with an escape": (changed(id="a\x1b[31m"), ":2: id must be at most 200 visible"),
    "id too long": (changed(id="x" * 201), ":2: id must be at most 200 visible"),
    "year as true": (changed(year=True), ":2: year must be a whole number from 1000 to 2100, not True"),
    "year as text": (changed(year="2019"), ":2: year must be a whole number"),
    "year with a fraction": (changed(year=2019.5), ":2: year must be a whole number"),
    "year 99": (changed(year=99), ":2: year must be a whole number from 1000 to 2100, not 99"),
    "a year of 5000 digits": (as_lines(GOOD) + b'{"year": %s}\n' % (b"2" * 5000), ":2: Exceeds the limit"),
    "source type": (changed(source_type="blog"), ":2: source_type 'blog' is unknown; known are systematic_review"),
    "replication status": (
        changed(replication_status="yes"),
        ":2: replication_status 'yes' is unknown; known are succ",
    ),
    "integrity status": (changed(integrity_status="ok"), ":2: integrity_status 'ok' is unknown; known are none"),
    "vocabulary as a list": (changed(source_type=["rct"]), ":2: source_type must be text"),
    "bad doi": (changed(doi="11.1000/x"), ":2: doi '11.1000/x' does not look like 10.1234/abc"),
    "bad url": (changed(url="www.example.org"), ":2: url 'www.example.org' does not start with http:// or https://"),
    "url with a space": (changed(url="https://example.org/a b"), ":2: url "),
    "script as url": (changed(url="javascript:alert(1)"), ":2: url "),
    "authors as text": (changed(authors="Roe, J."), ":2: authors must be a list of names"),
    "authors with a number": (changed(authors=["Roe", 1]), ":2: authors must be a list of names"),
    "an invisible author": (changed(authors=["\u200b"]), ":2: authors must be a list of names"),
    "invalid UTF-8": (as_lines(GOOD) + b'{"id": "caf\xe9"}\n', ":2: not UTF-8 at byte 11"),
    "UTF-16": ("{}".encode("utf-16"), ":1: not UTF-8 at byte 0"),
    "half of a surrogate pair": (
        b'{"id": "a", "title": "t", "text": "x \\ud800"}\n',
        ":1: holds half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_with_its_line_and_nothing_is_ingested(client: Client, name: str) -> None:
    content, says = BAD_RECORDS[name]
    (client.root / "bad.jsonl").write_bytes(content)
    before = client.written()
    for domain in ("sleep", "new"):
        outcome = client.run("ingest", DOMAIN=domain, FROM="bad.jsonl")
        refused(client, outcome, before, f"nothing was ingested; 1 bad record(s):\n  bad.jsonl{says}")


def test_every_bad_line_is_counted_and_the_first_ten_are_named(client: Client) -> None:
    (client.root / "bad.jsonl").write_bytes(as_lines(GOOD) + b"x\n" * 12)
    outcome = client.run("ingest", DOMAIN="new", FROM="bad.jsonl")
    refused(client, outcome, client.written(), "12 bad record(s)", "bad.jsonl:2:", "bad.jsonl:11:", "and 2 more")
    assert "bad.jsonl:12:" not in outcome.err


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "FROM is empty. Try: make ingest DOMAIN=my-field FROM=records.jsonl"),
        ("none.jsonl", "none.jsonl does not exist. Try: make ingest"),
        ("config", "config is a folder; give a JSONL file"),
        ("/proc/self/mem", "/proc/self/mem cannot be read: "),
        ("config/inference.yaml/x", "cannot be read: Not a directory"),
        ("x" * 300, "cannot be read: File name too long"),
        ("empty.jsonl", "empty.jsonl holds no records; it should have one JSON object per line"),
        ("blank.jsonl", "blank.jsonl holds no records"),
        ("bom.jsonl", "bom.jsonl holds no records"),
    ],
)
def test_a_source_that_holds_no_records_is_named(client: Client, source: str, says: str) -> None:
    for name, content in (("empty", b""), ("blank", b"\n \r\n\t\n"), ("bom", b"\xef\xbb\xbf\n")):
        (client.root / f"{name}.jsonl").write_bytes(content)
    before = client.written()
    refused(client, client.run("ingest", DOMAIN="new", FROM=source), before, says)


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_accepted(client: Client) -> None:
    lines = b"\xef\xbb\xbf" + as_lines(GOOD, {**GOOD, "id": "b"}).replace(b"\n", b"\r\n\r\n")
    (client.root / "windows.jsonl").write_bytes(lines)
    outcome = client.run("ingest", DOMAIN="new", FROM="windows.jsonl")
    assert (outcome.code, "new: 2 added" in outcome.err) == (0, True)


@pytest.mark.parametrize(
    "doi",
    ["10.1000/naps.1", "https://doi.org/10.1000/naps.1", "http://dx.doi.org/10.1000/naps.1", "DOI: 10.1000/naps.1"],
)
def test_a_doi_is_kept_without_its_resolver(client: Client, doi: str) -> None:
    assert client.ingest("new", {**GOOD, "doi": doi, "venue": None}).code == 0
    assert json.loads((client.store / "new" / "records.jsonl").read_text())["doi"] == "10.1000/naps.1"


def test_records_can_come_through_a_pipe(client: Client) -> None:
    fifo = client.root / "pipe"
    os.mkfifo(fifo)
    process = client.start("ingest", DOMAIN="new", FROM="pipe")
    fifo.write_bytes(as_lines(*SLEEP))
    outcome = client.finish(process)
    assert (outcome.code, "3 added" in outcome.err) == (0, True)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["ingest", "retrieve"])
def test_a_store_that_cannot_be_written_is_named(client: Client, program: str) -> None:
    (client.root / "good.jsonl").write_bytes(as_lines(GOOD))
    (client.root / "file").write_text("in the way")
    (client.corpus / "sleep.jsonl").write_bytes(as_lines(GOOD))
    before = client.written()
    outcome = client.run(program, **ASK, FROM="good.jsonl", VECTOR_STORE_PATH="file")
    refused(client, outcome, before, "file/sleep cannot be used: ", "set VECTOR_STORE_PATH to a folder you own")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
@pytest.mark.parametrize("program", ["ingest", "retrieve"])
def test_a_read_only_store_is_named(client: Client, program: str) -> None:
    (client.root / "good.jsonl").write_bytes(as_lines(GOOD))
    (client.corpus / "new.jsonl").write_bytes(as_lines(GOOD))
    before = client.written()
    client.store.chmod(0o500)
    outcome = client.run(program, Q=NAPS, DOMAIN="new", FROM="good.jsonl")
    client.store.chmod(0o700)
    refused(client, outcome, before, "store/new cannot be used: Permission denied")


def test_a_runs_folder_that_cannot_be_written_costs_no_job(client: Client, scripted: Scripted) -> None:
    (client.root / "file").write_text("in the way")
    before = client.written(index=False)  # Chroma touches its files when it is asked
    outcome = client.run("synth", **ASK, RUNS_DIR="file/runs")
    assert outcome.code == BAD_INPUT
    assert "file/runs cannot be written: Not a directory; set RUNS_DIR to a folder you own" in outcome.err
    assert client.written(index=False) == before
    assert scripted.asked("run") == []


@pytest.mark.parametrize("program", ["ingest", "retrieve", "synth"])
@pytest.mark.parametrize("missing", ["model.onnx", "model.safetensors", "tokenizer.json", ""])
def test_a_missing_embedding_model_is_named_with_the_way_to_make_it(
    client: Client, scripted: Scripted, program: str, missing: str
) -> None:
    folder = client.root / "model"
    folder.mkdir()
    if missing:
        for name in {"model.onnx", "model.safetensors", "tokenizer.json"} - {missing}:
            (folder / name).touch()
    (client.root / "good.jsonl").write_bytes(as_lines(GOOD))
    before = client.written()
    outcome = client.run(program, **ASK, FROM="good.jsonl", EMBEDDING_MODEL_DIR="model")
    refused(client, outcome, before, "the embedding model is not in model; run: make build")
    assert scripted.seen == []


@pytest.mark.parametrize("program", ["ingest", "retrieve"])
def test_another_embedding_model_names_the_image_that_it_needs(client: Client, program: str) -> None:
    client.configure(embedding_model="BAAI/bge-small-en-v1.5")
    (client.root / "good.jsonl").write_bytes(as_lines(GOOD))
    outcome = client.run(program, **ASK, FROM="good.jsonl")
    says = "embedding_model: BAAI/bge-small-en-v1.5 needs the client-full image"
    refused(client, outcome, client.written(), says, "make synth and make ingest select it by themselves")


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["synth", "retrieve", "ingest"])
def test_a_program_run_as_people_run_it_ends_with_the_code_and_no_traceback(client: Client, program: str) -> None:
    before = client.written()
    refused(client, client.finish(client.start(program, Q="caf\udce9", DOMAIN="../x")), before)


def test_a_second_writer_leaves_with_75(client: Client) -> None:
    """A process that holds the domain; tests of the store look closer."""
    import fcntl

    (client.root / "good.jsonl").write_bytes(as_lines(GOOD))
    before = client.written()
    with (client.store / "sleep" / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = client.run("ingest", DOMAIN="sleep", FROM="good.jsonl")
    assert (outcome.code, client.written()) == (TRY_LATER, before)
    assert "domain sleep is in use by another process; try again when it is done" in outcome.err


def test_a_reader_of_the_output_that_leaves_is_no_error(client: Client) -> None:
    process = client.start("retrieve", **ASK)
    assert process.stdout is not None
    process.stdout.close()
    wait_for(lambda: process.poll() is not None)
    assert process.stderr is not None
    with process.stderr:
        assert (process.returncode, process.stderr.read()) == (0, "")
