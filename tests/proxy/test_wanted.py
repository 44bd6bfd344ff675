"""What request bodies become: passed on, known to change nothing, or refused by name; nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countermark.errors import RequestError
from countermark.proxy.wanted import NEUTRAL, Wanted, parse_wanted
from countermark.wire import codec

MESSAGES = [{"role": "user", "content": "hello"}]


def parse(chat: bool = True, **more: Any) -> Wanted:
    body = ({"messages": MESSAGES} if chat else {"prompt": "hello"}) | more
    return parse_wanted(json.dumps(body).encode(), chat=chat, max_bytes=1 << 20)


def refusal(chat: bool = True, **more: Any) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as caught:
        parse(chat, **more)
    return caught.value.code, getattr(caught.value, "param", None)


PASSED = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "seed": 18446744073709551615,
    "presence_penalty": -0.5,
    "frequency_penalty": 1,
    "repetition_penalty": 1.1,
    "ignore_eos": True,
    "max_tokens": 7,
}


@pytest.mark.parametrize("name", PASSED)
@pytest.mark.parametrize("chat", [True, False])
def test_passed_on_as_it_is(name: str, chat: bool) -> None:
    settings = parse(chat, **{name: PASSED[name]}).settings
    assert settings[name] == PASSED[name]
    assert all(settings[other] is None for other in PASSED if other != name)
    request = codec.parse_generate_request(codec.encode_generate_request(**settings))
    holder = request.sampling if name in {field.name for field in request.sampling.DESCRIPTOR.fields} else request
    assert holder.HasField(name)
    assert getattr(holder, name) == pytest.approx(PASSED[name], rel=1e-6)


@pytest.mark.parametrize(
    ("more", "settings"),
    [
        ({"max_completion_tokens": 9}, {"max_tokens": 9}),
        ({"max_completion_tokens": 9, "max_tokens": 9}, {"max_tokens": 9}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": []}, {"stop": ()}),
        ({"logit_bias": {"50": -100, "7": 0.5}}, {"logit_bias": {50: -100, 7: 0.5}}),
        ({"logprobs": True}, {"logprobs": 1}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({"logprobs": False}, {"logprobs": None}),
        ({"model": "countermark"}, {"model": ""}),
        ({"model": "other"}, {"model": "other"}),
        ({"chat_template_kwargs": {"date_string": "1 May"}}, {"values": {"date_string": "1 May"}}),
        ({"response_format": {"type": "text"}}, {}),
        ({"seed": None, "tools": None, "anything": None}, {"seed": None}),
    ],
)
def test_what_it_becomes(more: dict[str, Any], settings: dict[str, Any]) -> None:
    found = parse(**more).settings
    assert {name: found[name] for name in settings} == settings


def test_messages() -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
        {"role": "assistant", "content": "d", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    found = parse(messages=messages).settings["messages"]
    assert found == [("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")]
    assert parse(False, prompt=["one"]).settings["prompt"] == "one"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"store": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"reasoning_effort": "none"}, "reasoning_effort"),
        ({"prediction": {}}, "prediction"),
        ({"audio": {}}, "audio"),
        ({"verbosity": "low"}, "verbosity"),
        ({"temprature": 1}, "temprature"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[1].tool_calls",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]}, "messages[0].content"),
    ],
)
def test_refused_by_name(more: dict[str, Any], param: str) -> None:
    assert refusal(**more) == ("proxy.unsupported", param)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"model": 5}, "model"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_of_the_wrong_form(more: dict[str, Any], param: str) -> None:
    assert refusal(**more) == ("proxy.parameter", param)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"messages": MESSAGES}, "messages"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ],
)
def test_completions(more: dict[str, Any], param: str) -> None:
    assert refusal(False, **more)[1] == param


NOTHING = {
    "user": "someone",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "modalities": ["text"],
    "parallel_tool_calls": False,
    "tool_choice": "none",
    "tools": [],
    "functions": [],
    "function_call": "none",
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_changes_nothing(name: str) -> None:
    assert parse(**{name: NOTHING[name]}) == parse()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type":"object"}'}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"b": 1, "a": 2}}}},
            {"json_schema": '{"b": 1, "a": 2}'},
        ),
        ({"structured_outputs": {"regex": "[a-z]+"}}, {"regex": "[a-z]+"}),
        ({"structured_outputs": {"json": {"type": "string"}}}, {"json_schema": '{"type": "string"}'}),
    ],
)
def test_the_form_of_an_answer(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], expected: dict[str, str]) -> None:
    monkeypatch.setattr("countermark.proxy.wanted._GRAMMAR", True)
    found = parse(**more).settings
    assert {name: found.get(name) for name in ("json_schema", "regex")} == {
        "json_schema": None,
        "regex": None,
    } | expected
    monkeypatch.setattr("countermark.proxy.wanted._GRAMMAR", False)
    assert refusal(**more)[0] == "proxy.unsupported"


def test_one_form_alone() -> None:
    both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}}
    assert refusal(**both) == ("proxy.parameter", "structured_outputs")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b'{"a":1,"a":2}', b'{"temperature": NaN}', b"[" * 99999])
def test_not_json(data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_wanted(data, chat=True, max_bytes=1 << 20)
    assert caught.value.code == "proxy.json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = (*PASSED, *NEUTRAL, "messages", "prompt", "stop", "logprobs", "top_logprobs", "logit_bias", "stream")
NAMES += ("stream_options", "response_format", "structured_outputs", "chat_template_kwargs", "model")


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5), st.booleans(), st.booleans())
def test_anything_is_understood_or_refused(body: dict[str, Any], chat: bool, whole: bool) -> None:
    value = (({"messages": MESSAGES} if chat else {"prompt": "x"}) | body) if whole else body
    try:
        wanted = parse_wanted(json.dumps(value).encode(), chat=chat, max_bytes=1 << 20)
        codec.encode_generate_request(**wanted.settings)
    except RequestError as err:
        assert err.code.startswith(("proxy.", "request."))


def test_half_a_character_is_refused_before_anything_is_sent() -> None:
    wanted = parse_wanted(b'{"messages": [{"role": "user", "content": "\\ud800"}]}', chat=True, max_bytes=1 << 20)
    with pytest.raises(RequestError) as caught:
        codec.encode_generate_request(**wanted.settings)
    assert caught.value.code == "request.input"
