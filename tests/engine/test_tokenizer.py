"""The tokenizer against `tokenizers` itself, and against text that pretends to be special."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tinymodel import SPECIAL, tokenizer_json

from countermark.errors import FormatError, RequestError
from countermark_appliance.engine.tokenizer import Tokenizer

PEER = tokenizers.Tokenizer.from_str(tokenizer_json().decode())
VOCAB = PEER.get_vocab_size()
OURS = Tokenizer(tokenizer_json(), vocab=VOCAB)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@given(TEXT)
def test_ordinary_text_encodes_as_the_library_does_and_comes_back(text: str) -> None:
    ids = OURS.encode(text)
    assert ids == PEER.encode(text, add_special_tokens=False).ids
    assert OURS.decode(ids) == text


@given(st.lists(st.integers(0, VOCAB - 1), max_size=20))
def test_any_ids_decode_as_the_library_does(ids: list[int]) -> None:
    assert OURS.decode(ids) == PEER.decode(ids, skip_special_tokens=True)


@given(st.lists(st.one_of(TEXT, st.sampled_from([*SPECIAL, "<|im_", "start|>", "<", "<|im_start|"])), max_size=8))
def test_text_never_yields_a_special_token(parts: list[str]) -> None:
    text = "".join(parts)
    ids = OURS.encode(text)
    assert not set(ids) & set(OURS.special.values())
    assert OURS.decode(ids) == text


@given(st.lists(st.one_of(TEXT, st.sampled_from(SPECIAL)), max_size=8))
def test_a_template_encodes_as_the_library_does(parts: list[str]) -> None:
    text = "".join(parts)
    assert OURS.encode_marked(text, "\U000f0000") == PEER.encode(text, add_special_tokens=False).ids


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(RequestError) as err:
        OURS.encode("\ud800")
    assert err.value.code == "request.text"


def test_length_bound_never_refuses_what_fits() -> None:
    text = "the other thing there " * 50
    assert OURS.fits(text, len(OURS.encode(text)))
    assert not OURS.fits("x" * 10_000, 10)


def edited(**changes: Any) -> bytes:
    document = json.loads(tokenizer_json())
    for path, value in changes.items():
        node = document
        *parents, last = path.split("__")
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        node[last] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "tokenizer.malformed"),
        (b"[]", "tokenizer.malformed"),
        (b'{"model": 1, "added_tokens": []}', "tokenizer.malformed"),
        (b"[" * 100_000, "tokenizer.malformed"),
        (edited(added_tokens=None), "tokenizer.malformed"),
        (edited(model__type="Unigram"), "tokenizer.kind"),
        (edited(model__byte_fallback=True), "tokenizer.kind"),
        (edited(decoder={"type": "Metaspace"}), "tokenizer.kind"),
        (edited(added_tokens__0__id=VOCAB), "tokenizer.token"),
        (edited(added_tokens__0__lstrip=True), "tokenizer.token"),
        (edited(added_tokens__0__content=""), "tokenizer.token"),
        (edited(model__vocab={"a": -1}), "tokenizer.token"),
        (edited(model__merges=[["zz", "yy"]]), "tokenizer.malformed"),
    ],
)
def test_bad_files_are_refused(data: bytes, code: str) -> None:
    with pytest.raises(FormatError) as err:
        Tokenizer(data, vocab=VOCAB)
    assert err.value.code == code
