"""tokenizer.json from GGUF keys: against transformers on the same file, and llama.cpp's split where that differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import regex
from tinymodels import vocabulary, write_gguf
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from countermark.errors import WeightsError
from countermark_appliance.engine.weights import stand_in_gguf
from countermark_appliance.engine.weights.gguf import GgufFile
from countermark_appliance.engine.weights.tokenizerjson import load_tokenizer, tokenizer_json

TEXTS = (
    "Hello world",
    "naïve café — 你好世界 🙂👩‍👩‍👧 ελληνικά Здравствуй",
    "<|im_start|>user\nhi there<|im_end|>\n<|endoftext|> almost <|im_start |>",
    "def f(x):\n\treturn x**2  # comment\n\n\n    if a != b: pass\r\n\r\n",
    "it's we'll I'D they've y'all 'tis",
    "   leading and trailing   ",
    " \t \n \t\t\n\n ",
    "a\u00a0b\u2003c\u3000d",
    "one 1 two 22 three 333; 2024-11-22, 3.14159e-10, v1.2.3",
    'https://example.org/a?b=c&d=%20#e {"k": [1, 2, null]}',
    "e\u0301 \ufeff \u200b zero-width",
    "",
)
# transformers 5 has no digits step for `smollm`: runs of spaces before a digit come out differently there
DIGITS = ("  12 a  3", "x = 1\n    y =  22\n", "१२३ ٣ ½ Ⅷ x²", "a 1", "\n\n 7")


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer(tokenizer_json(GgufFile(stand_in_gguf()).metadata))


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def test_same_ids_as_transformers(ours: Tokenizer) -> None:
    path = stand_in_gguf()
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in TEXTS:
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == ids(theirs, text), text
        assert ours.decode(found, skip_special_tokens=False) == text
    assert ours.get_vocab_size(with_added_tokens=True) == len(theirs) == 49_152
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"):
        assert ours.token_to_id(token) == theirs.convert_tokens_to_ids(token)
        assert ours.decode([ours.token_to_id(token)], skip_special_tokens=True) == ""


def llama_cpp_split(text: str) -> list[str]:
    """llama.cpp's `smollm`: cut out every \\p{N}, then GPT-2's expression on what lies between."""
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    return [word for piece in regex.split(r"(\p{N})", text) for word in words.findall(piece)]


@pytest.mark.parametrize("text", [*TEXTS, *DIGITS])
def test_pre_tokens_are_those_of_llama_cpp(ours: Tokenizer, text: str) -> None:
    found = [text[a:b] for _, (a, b) in ours.pre_tokenizer.pre_tokenize_str(text)]
    assert found == llama_cpp_split(text)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_other_pre_tokenizers_agree_with_transformers(pre: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", "qwen2", pre=pre)
    mine = load_tokenizer(tokenizer_json(GgufFile(tmp_path / "t.gguf").metadata))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="t.gguf")
    for text in (*TEXTS, *DIGITS, "<tool_call>123 the   12</tool_call>"):
        composed = text.replace("e\u0301", "é")  # the original qwen2 tokenizer has NFC, the conversion has not
        found = mine.encode(composed, add_special_tokens=False).ids
        assert found == ids(theirs, composed), text
    if pre == "qwen2":
        assert mine.encode("e\u0301").ids == mine.encode("é").ids


def metadata(**changes: object) -> dict[str, object]:
    tokens, kinds, merges = vocabulary()
    value: dict[str, object] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tuple(tokens),
        "token_type": tuple(kinds),
        "merges": tuple(merges),
    }
    return {f"tokenizer.ggml.{key}": item for key, item in (value | changes).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "llama"},
        {"model": None},
        {"pre": "default"},
        {"pre": 7},
        {"add_eos_token": True},
        {"add_space_prefix": True},
        {"tokens": ("a", "a")},
        {"tokens": ("a", 1)},
        {"tokens": None},
        {"token_type": (1, 2)},
        {"token_type": (2,) * 320},
        {"merges": ("h e l",)},
        {"merges": ("he",)},
        {"merges": ("x y",)},
    ],
)
def test_unsupported_tokenizers_are_refused(changes: dict[str, object]) -> None:
    tokenizer_json(metadata())
    with pytest.raises(WeightsError) as caught:
        tokenizer_json(metadata(**changes))
    assert caught.value.code == "weights.unsupported_tokenizer"


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b"[1]", b'{"model": {"type": "BPE"}}'])
def test_malformed_tokenizer_files_are_refused(data: bytes) -> None:
    with pytest.raises(WeightsError) as caught:
        load_tokenizer(data)
    assert caught.value.code == "weights.tokenizer"
