"""Arbitrary bytes into the wire parsers give a value or our own error, and what we encode comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError, RequestError
from countermark.formats.receipt import Acceptance
from countermark.formats.records import encode_input
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb

TEXT = st.text(max_size=50)
HASH = st.binary(min_size=32, max_size=32)
ACCEPTANCES = st.builds(
    Acceptance,
    record=st.binary(max_size=200),
    leaf_salt=HASH,
    field_salts=st.binary(max_size=200),
    leaf_index=st.integers(0, 2**63 - 1),
    proof=st.lists(HASH, max_size=8).map(tuple),
    checkpoint=st.binary(max_size=200),
    prompt_tokens=st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple),
)


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_arbitrary_requests(data: bytes) -> None:
    try:
        codec.parse_generate_request(data)
    except RequestError as err:
        assert codec.is_code(err.code)


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_arbitrary_stream_messages(data: bytes) -> None:
    try:
        codec.acceptance(codec.parse_response(data).accepted)
    except FormatError as err:
        assert codec.is_code(err.code)


@given(ACCEPTANCES)
def test_accepted_comes_back(value: Acceptance) -> None:
    message = codec.parse_response(codec.encode_accepted(value))
    assert codec.acceptance(message.accepted) == value


@given(st.lists(st.tuples(st.sampled_from(codec.ROLES), TEXT), max_size=5), st.integers(0, 2**64 - 1))
def test_requests_come_back(messages: list[tuple[str, str]], seed: int) -> None:
    data = codec.encode_generate_request(messages=messages, seed=seed, stop=("a", "b"), logit_bias={7: -1.5})
    request = codec.parse_generate_request(data)
    assert codec.input_value(request) == encode_input(messages=messages)
    assert (request.sampling.seed, list(request.stop)) == (seed, ["a", "b"])
    assert dict(request.sampling.logit_bias) == {7: -1.5}
    assert not request.sampling.HasField("temperature")
    assert codec.encode_generate_request(messages=messages, seed=seed) != data  # a fresh nonce each time


@pytest.mark.parametrize(
    ("asked", "entries", "fits"),
    [
        (0, [], True),
        (2, [(-0.5, [(1, -0.5), (2, -1.0)]), (-3.0, [])], True),
        (2, [(-0.5, [])], False),
        (2, [], False),
        (0, [(-0.5, []), (-0.5, [])], False),
        (1, [(-0.5, [(1, -0.5), (2, -1.0)]), (-3.0, [])], False),
        (1, [(float("nan"), []), (-3.0, [])], False),
        (1, [(-0.5, [(1, float("-inf"))]), (-3.0, [])], False),
    ],
)
def test_log_probabilities_are_as_many_as_asked_for_and_finite(
    asked: int, entries: list[tuple[float, list[tuple[int, float]]]], fits: bool
) -> None:
    logprobs = [
        pb.Logprob(logprob=own, top=[pb.Likely(id=i, logprob=number) for i, number in top]) for own, top in entries
    ]
    message = pb.Tokens(ids=[7, 8], logprobs=logprobs)
    if fits:
        expected = tuple((token, own, tuple(top)) for token, (own, top) in zip((7, 8), entries, strict=bool(asked)))
        assert codec.logprobs(message, asked) == expected
    else:
        with pytest.raises(FormatError) as caught:
            codec.logprobs(message, asked)
        assert caught.value.code == "stream.malformed"


@pytest.mark.parametrize("depth", [1, 2])
def test_unknown_fields_are_found_at_any_depth(depth: int) -> None:
    unknown = b"\xa2\x06\x01y"  # field 100
    inner = pb.Message(role="user", content="x").SerializeToString() + unknown
    chat = b"\x0a" + bytes([len(inner)]) + inner if depth == 2 else unknown
    data = pb.GenerateRequest(nonce=bytes(32)).SerializeToString() + b"\x1a" + bytes([len(chat)]) + chat
    with pytest.raises(RequestError) as caught:
        codec.parse_generate_request(data)
    assert caught.value.code == "request.unknown_field"


@pytest.mark.parametrize("text", ["", "a", "a.", ".a", "A.b", "a b.c", "a.b\n", "a.b\x1b", "a." + "b" * 80])
def test_what_is_not_a_code(text: str) -> None:
    assert not codec.is_code(text)
