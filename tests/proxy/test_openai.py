"""The official `openai` package, unchanged, against the proxy before a node with a real model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest
from proxy_helpers import Proxy

from countermark.proxy.wanted import _GRAMMAR

pytestmark = pytest.mark.system
MODEL = "countermark"
ASKED = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
def client(served: Proxy) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none needed") as one:
        yield one


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=12)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage and answer.usage.completion_tokens <= 12
    assert answer.model_extra and answer.model_extra["countermark"]["verified"] is True
    assert answer.model != MODEL  # the name of what answered


def test_the_same_seeded_call_twice(client: openai.OpenAI) -> None:
    def ask() -> openai.types.chat.ChatCompletion:
        return client.chat.completions.create(
            model=MODEL,
            messages=ASKED,
            max_tokens=24,
            seed=7,
            temperature=0.9,
            top_p=0.95,
            logprobs=True,
            top_logprobs=3,
        )

    first, second = ask(), ask()
    assert first.choices[0].model_dump_json() == second.choices[0].model_dump_json()
    assert first.system_fingerprint == second.system_fingerprint
    assert first.system_fingerprint and first.system_fingerprint.startswith("fp_")
    assert first.id != second.id
    other = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=24, seed=8, temperature=0.9)
    assert other.choices[0].message.content != first.choices[0].message.content


def test_streaming(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=12, stream=True, seed=7, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=12, seed=7)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None
    (last,) = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert last.model_extra and last.model_extra["countermark"]["verified"] is True
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_the_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASKED, max_tokens=300) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content


def test_asyncio(served: Proxy) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none") as client:
            stream = await client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=8, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask())


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, max_tokens=4, logprobs=True, top_logprobs=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and answer.usage
    assert len(logprobs.content) == answer.usage.completion_tokens
    for entry in logprobs.content:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_stop(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=24)
    text = free.choices[0].message.content
    assert text
    word = text.split()[3]
    stopped = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=24, stop=[word])
    assert stopped.choices[0].message.content == text[: text.index(word)]
    assert stopped.choices[0].finish_reason == "stop"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, logprobs=2)
    assert answer.choices[0].text
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.tokens
    streamed = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=1)
    names = [model.id for model in client.models.list()]
    assert names[0] == MODEL
    assert len(names) == 2
    assert client.models.retrieve(names[1]).id == names[1]
    named = client.chat.completions.create(model=names[1], messages=ASKED, max_tokens=1)
    assert named.model == names[1]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
        ({"n": 2}, "n"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"extra_body": {"best_guess": True}}, "best_guess"),
    ],
)
def test_refused_by_name(client: openai.OpenAI, more: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=4, **more)  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.param) == ("proxy.unsupported", param)


def test_a_client_that_leaves_ends_the_answer(client: openai.OpenAI, served: Proxy) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=400, stream=True)
    receipt = next(iter(stream)).id.removeprefix("chatcmpl-")
    stream.close()
    from proxy_helpers import wait_until

    def state() -> object:
        return next((one for one in served.status()["receipts"] if one["receipt"] == receipt), {}).get("state")

    wait_until(lambda: state() == "left")


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "warm": {"type": "boolean"}},
    "required": ["colour", "warm"],
    "additionalProperties": False,
}


@pytest.mark.skipif(not _GRAMMAR, reason="this client cannot ask for a form yet: JSON schema is refused by name")
def test_json_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name a warm colour."}],
        max_tokens=40,
        seed=7,
        temperature=0.9,
        response_format=form,  # type: ignore[arg-type]
    )
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"colour", "warm"}
    assert found["colour"] in ("red", "green", "blue")
    assert isinstance(found["warm"], bool)
