r"""A `tokenizer.json` for the `tokenizers` package from the tokenizer keys of a GGUF file.

Byte-level BPE only (`tokenizer.ggml.model = gpt2`). A GGUF file names its pre-tokenizer and does not carry it; the
three supported are those whose original tokenizer.json we know:

- `smollm` (SmolLM and SmolLM2): Digits(individual) then GPT-2's ByteLevel; llama.cpp splits `\p{N}` first, the same.
  transformers' own GGUF conversion leaves the digits step out and differs on runs of spaces before a digit.
- `qwen2` (Qwen2, Qwen2.5, Qwen3): NFC, then the split below. llama.cpp has no NFC; the original has.
- `llama-bpe` (Llama 3): the split below, and whole pre-tokens that are in the vocabulary skip the merges.

Token types (llama.cpp `llama_token_type`): 3 control becomes a special added token, 4 user-defined a plain one,
1 normal and 5 unused stay in the vocabulary only; 2 unknown and 6 byte do not occur in byte-level vocabularies and are
refused. SmolLM2 has no token for some bytes (0x04, 0xF1, ...); the library drops those, with this file as with the
original.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeVar

from tokenizers import Tokenizer

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.strictjson import Json

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "qwen2": _CONTRACTIONS + _WORDS + r"\p{N}" + _REST,
    "llama-bpe": _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST,
}
_T = TypeVar("_T")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def tokenizer_json(metadata: Mapping[str, object]) -> bytes:
    """Build the file. Raises `WeightsError` (`weights.unsupported_tokenizer`) on anything not described above."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise _unsupported(f"tokenizer.ggml.model: expected gpt2, got {model!r}")
    if pre != "smollm" and pre not in _SPLITS:
        raise _unsupported(f"tokenizer.ggml.pre: expected smollm, {', '.join(_SPLITS)}, got {pre!r}")
    if metadata.get("tokenizer.ggml.add_eos_token") or metadata.get("tokenizer.ggml.add_space_prefix"):
        raise _unsupported("tokenizer.ggml.add_eos_token, add_space_prefix: expected false")
    tokens = _array(metadata, "tokenizer.ggml.tokens", str)
    kinds = _array(metadata, "tokenizer.ggml.token_type", int)
    merges = [merge.split(" ") for merge in _array(metadata, "tokenizer.ggml.merges", str)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise _unsupported("tokenizer.ggml.tokens: expected distinct tokens, one type each")
    if set(kinds) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise _unsupported(f"tokenizer.ggml.token_type: expected 1, 3, 4, 5, got {sorted(set(kinds))}")
    for merge in merges:
        if len(merge) != 2 or not all(part in vocabulary for part in (*merge, "".join(merge))):
            raise _unsupported(f"tokenizer.ggml.merges: expected two tokens that make a third, got {merge!r}"[:200])
    byte_level: dict[str, Json] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    first: Json
    if pre == "smollm":
        first = {"type": "Digits", "individual_digits": True}
    else:
        first = {"type": "Split", "pattern": {"Regex": _SPLITS[str(pre)]}, "behavior": "Isolated", "invert": False}
    value: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(index, token, special=kind == _CONTROL)
            for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [first, {**byte_level, "use_regex": pre == "smollm"}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def load_tokenizer(data: bytes) -> Tokenizer:
    """Parse a `tokenizer.json`. Raises `WeightsError` (`weights.tokenizer`) when the library refuses it."""
    try:
        return Tokenizer.from_str(data.decode("utf-8"))
    except Exception as err:  # the library raises nothing more specific
        raise WeightsError(f"tokenizer.json: {str(err)[:200]}", code="weights.tokenizer") from err


def _added(index: int, content: str, *, special: bool) -> dict[str, Json]:
    flags: dict[str, Json] = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": special}


def _array(metadata: Mapping[str, object], key: str, kind: type[_T]) -> Sequence[_T]:
    found = metadata.get(key)
    if not isinstance(found, tuple) or not all(isinstance(item, kind) for item in found):
        raise _unsupported(f"{key}: expected an array of {kind.__name__}")
    return found


def _unsupported(problem: str) -> WeightsError:
    return WeightsError(problem, code="weights.unsupported_tokenizer")
