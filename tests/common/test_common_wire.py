"""common.wire: what a job may hold, and that whatever the worker answers is bounded, strict JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import wire
from common.wire import InvalidJob, Job, chunks, error, parse_job, to_wire

SOURCE = {"id": "S1", "text": "a text", "label": "Klein et al. (2018)"}


def with_prompt(**more: object) -> dict[str, object]:
    return {"prompt": "Does it replicate?", **more}


def test_only_the_prompt_is_needed_and_everything_else_has_its_documented_default() -> None:
    assert dataclasses.asdict(parse_job({"prompt": "q"})) == {
        "prompt": "q",
        "context": "",
        "sources": [],
        "temperature": 0.3,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "max_new_tokens": 4096,
        "seed": None,
        "stream": False,
        "fit": False,
        "datamark": False,
        "op": "synthesize",
    }


def test_every_key_reaches_the_job() -> None:
    sent = {
        "prompt": "q",
        "sources": [SOURCE, {"id": "S2", "text": "b"}],
        "temperature": 0,
        "top_p": 1,
        "repetition_penalty": 2,
        "max_new_tokens": 1,
        "seed": 2**63 - 1,
        "stream": True,
        "fit": True,
        "datamark": True,
        "op": "synthesize",
    }
    assert parse_job(sent) == Job(**{**sent, "sources": [SOURCE, {"id": "S2", "text": "b", "label": ""}]})  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["ping", "metrics"])
@pytest.mark.parametrize("extra", [{}, {"prompt": ""}, {"temperature": "hot"}])
def test_a_question_to_the_worker_itself_needs_nothing_else(op: str, extra: dict[str, object]) -> None:
    assert parse_job({"op": op, **extra}) == Job(op=op)


def test_context_goes_with_an_empty_list_of_sources() -> None:
    assert parse_job(with_prompt(context="c", sources=[])).context == "c"


@pytest.mark.parametrize(
    "text",
    [
        """costs $5 "or" 'more' $(rm -rf /) `id` ${HOME} %PATH%""",
        "{{sources}} {braces} {0} %s {{question}}",
        "line one\nline two\r\n\ttabbed\n",
        "  outer space  ",
        "naïve façade 👩🏽‍🔬 研究 \u200f",
        "back\\slash \\n \\u0041",
    ],
)
def test_a_prompt_arrives_byte_for_byte(text: str) -> None:
    job = parse_job(json.loads(json.dumps({"prompt": text, "context": text})))
    assert (job.prompt, job.context) == (text, text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "input must be an object, not null"),
        ([], "input must be an object, not a list"),
        ("prompt", "input must be an object, not text"),
        (7, "input must be an object, not a number"),
        (True, "input must be an object, not true/false"),
        ({}, "prompt is missing or empty"),
        ({"prompt": ""}, "prompt is missing or empty"),
        ({"prompt": " \n\t"}, "prompt is missing or empty"),
        ({"prompt": None}, "prompt must be text, not null"),
        ({"prompt": ["q"]}, "prompt must be text, not a list"),
        ({"prompt": "q" * 100_001}, "prompt has 100001 characters, 100000 are allowed"),
        (with_prompt(context=None), "context must be text, not null"),
        (with_prompt(context={}), "context must be text, not an object"),
        (with_prompt(promt="q"), "unknown key promt; known are prompt, context, sources, temperature"),
        (with_prompt(b=1, a=1), "unknown key a, b;"),
        (with_prompt(op="train"), "op must be synthesize, ping or metrics"),
        (with_prompt(op=None), "op must be synthesize, ping or metrics"),
        (with_prompt(op=["ping"]), "op must be synthesize, ping or metrics"),
        (with_prompt(temperature="0.3"), "temperature must be a number, not text"),
        (with_prompt(temperature=None), "temperature must be a number, not null"),
        (with_prompt(temperature=True), "temperature must be a number, not true/false"),
        (with_prompt(temperature=math.nan), "temperature must be a number, not not-a-number"),
        (with_prompt(temperature=math.inf), "temperature must be a number, not not-a-number"),
        (with_prompt(temperature=-0.1), "temperature must be between 0 and 2, not -0.1"),
        (with_prompt(temperature=10**400), "temperature must be between 0 and 2, not 1000000"),
        (with_prompt(top_p=0), "top_p must be between 0.01 and 1, not 0"),
        (with_prompt(top_p=1.01), "top_p must be between 0.01 and 1, not 1.01"),
        (with_prompt(repetition_penalty=0.4), "repetition_penalty must be between 0.5 and 2"),
        (with_prompt(max_new_tokens=0), "max_new_tokens must be between 1 and 32768, not 0"),
        (with_prompt(max_new_tokens=32769), "max_new_tokens must be between 1 and 32768"),
        (with_prompt(max_new_tokens=4096.0), "max_new_tokens must be a whole number, not a number"),
        (with_prompt(seed=-1), "seed must be between 0 and"),
        (with_prompt(seed=2**63), "seed must be between 0 and"),
        (with_prompt(seed=1.5), "seed must be a whole number"),
        (with_prompt(seed=False), "seed must be a whole number, not true/false"),
        (with_prompt(stream=None), "stream must be true or false, not null"),
        (with_prompt(stream=0), "stream must be true or false, not a number"),
        (with_prompt(stream="true"), "stream must be true or false, not text"),
        (with_prompt(fit=1), "fit must be true or false, not a number"),
        (with_prompt(fit={}), "fit must be true or false, not an object"),
        (with_prompt(datamark="ˆ"), "datamark must be true or false, not text"),
        (with_prompt(context="c", sources=[SOURCE]), "send context or sources, not both"),
        (with_prompt(sources=None), "sources must be a list, not null"),
        (with_prompt(sources={"S1": "a"}), "sources must be a list, not an object"),
        (with_prompt(sources=[SOURCE] * 501), "sources has 501 entries, 500 are allowed"),
        (with_prompt(sources=["a"]), "sources[0] must be an object, not text"),
        (with_prompt(sources=[SOURCE, {"id": "S2"}]), "sources[1].text is empty"),
        (with_prompt(sources=[{**SOURCE, "text": " "}]), "sources[0].text is empty"),
        (with_prompt(sources=[{**SOURCE, "text": 5}]), "sources[0].text must be text, not a number"),
        (with_prompt(sources=[{**SOURCE, "label": None}]), "sources[0].label must be text, not null"),
        (with_prompt(sources=[{**SOURCE, "url": "u"}]), "sources[0]: unknown key url; known are id, text, label"),
        (with_prompt(sources=[{"text": "a"}]), "sources[0].id must look like S1, not ''"),
        (with_prompt(sources=[{**SOURCE, "id": "s1"}]), "sources[0].id must look like S1, not 's1'"),
        (with_prompt(sources=[{**SOURCE, "id": "S0"}]), "sources[0].id must look like S1"),
        (with_prompt(sources=[{**SOURCE, "id": "S1\n"}]), "sources[0].id must look like S1"),
        (with_prompt(sources=[{**SOURCE, "id": "S1٢"}]), "sources[0].id must look like S1"),
        (with_prompt(sources=[{**SOURCE, "id": 'S1" label="'}]), "sources[0].id must look like S1"),
        (with_prompt(sources=[SOURCE, SOURCE]), "sources[1].id S1 is there twice"),
    ],
)
def test_bad_input_is_refused_by_name(data: object, message: str) -> None:
    with pytest.raises(InvalidJob) as refusal:
        parse_job(data)
    assert str(refusal.value).startswith(message)
    assert len(str(refusal.value)) < 400


json_like: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_like | st.fixed_dictionaries({}, optional=dict.fromkeys(Job.__dataclass_fields__, json_like)))
def test_any_input_gives_a_job_or_an_invalid_job(data: Any) -> None:
    try:
        job = parse_job(data)
    except InvalidJob:
        return
    assert job.op == "ping" or job.prompt == data["prompt"]


# --- answers ---------------------------------------------------------------------------------------------------------


class Opaque:
    def __str__(self) -> str:
        return "opaque \ud800 thing"


@pytest.mark.parametrize(
    ("answer", "sent"),
    [
        ({"synthesis": "naïve 👩🏽‍🔬 $ \" '"}, {"synthesis": "naïve 👩🏽‍🔬 $ \" '"}),
        ({"a": math.nan, "b": [math.inf, -math.inf, 1.5]}, {"a": None, "b": [None, None, 1.5]}),
        ({"half": "a\ud800b", "\udfff": 1}, {"half": "a\ufffdb", "\ufffd": 1}),
        ({"object": Opaque()}, {"object": "opaque \ufffd thing"}),
        ({"bytes": b"x", "tuple": (1, None, True)}, {"bytes": "b'x'", "tuple": [1, None, True]}),
        ({1: {2: "b"}}, {"1": {"2": "b"}}),
        ({"error": {"code": 5}}, {"error": '{"code": 5}'}),
        ({"error": ["a", math.nan]}, {"error": '["a", null]'}),
        ({"error": "CODE: plain"}, {"error": "CODE: plain"}),
        (None, {"error": "INTERNAL: the worker produced null instead of an object"}),
        ("text", {"error": "INTERNAL: the worker produced text instead of an object"}),
        ([{}], {"error": "INTERNAL: the worker produced a list instead of an object"}),
        (3, {"error": "INTERNAL: the worker produced a number instead of an object"}),
    ],
)
def test_an_answer_becomes_strict_json(answer: object, sent: dict[str, object]) -> None:
    assert to_wire(answer) == sent


@pytest.mark.parametrize("character", ["a", "é", "研"])
def test_the_limit_counts_bytes_and_an_answer_beyond_it_is_an_error(character: str) -> None:
    assert wire.MAX_RESULT_BYTES < 10_000_000  # what RunPod takes
    width = len(character.encode())
    frame = wire.wire_size({"synthesis": ""})
    most = (wire.MAX_RESULT_BYTES - frame) // width
    assert to_wire({"synthesis": character * most})["synthesis"] == character * most
    refused = to_wire({"synthesis": character * (most + 1)})
    assert refused["error"].startswith("OUTPUT_TOO_LARGE: the answer has ")
    assert "lower max_new_tokens" in refused["error"]
    assert to_wire({"synthesis": character * (most - 100)}, sent=100 * width)["synthesis"]
    assert "OUTPUT_TOO_LARGE" in to_wire({"synthesis": character * (most - 100)}, sent=101 * width + width)["error"]


@pytest.mark.parametrize("text", ["", "a b", "é" * 500_000, "\x00\u2028" * 200_000, "a\ud800b", "🧪" * 400_000])
def test_chunks_are_the_text_in_pieces_that_the_platform_takes(text: str) -> None:
    pieces = chunks(text)
    assert "".join(piece["text"] for piece in pieces) == text.replace("\ud800", "\ufffd")
    for piece in pieces:
        assert piece["text"]
        assert list(piece) == ["text"]
        for escaped in (True, False):
            assert len(json.dumps({"output": piece}, ensure_ascii=escaped).encode()) < 1_000_000


@given(st.text(st.characters(), max_size=50) | st.just("x" * 5000))
def test_an_error_is_a_short_string_that_starts_with_its_code(sentence: str) -> None:
    answer = error("CODE", sentence)
    assert list(answer) == ["error"]
    assert answer["error"].startswith("CODE: ")
    assert len(answer["error"]) <= 2000
    answer["error"].encode()


anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
    | st.complex_numbers()
    | st.builds(Opaque),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=())) | st.integers(), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(anything)
def test_whatever_the_worker_produces_is_a_bounded_strict_json_object(answer: Any) -> None:
    sent = to_wire(answer)
    assert isinstance(sent, dict)
    assert isinstance(sent.get("error", ""), str)
    raw = json.dumps(sent, ensure_ascii=False, allow_nan=False).encode()  # raises for NaN and for half characters
    assert len(raw) <= wire.MAX_RESULT_BYTES
    assert json.loads(raw) == sent
