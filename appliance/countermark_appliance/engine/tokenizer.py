"""Text to token ids and back, from the artefact's tokenizer.json (Hugging Face `tokenizers`, byte-level BPE only).

Two encodings: `encode` reads ordinary text, in which no special token exists, whatever the text looks like;
`encode_marked` reads a rendered chat template, whose own special tokens count, and where a mark inside an apparent
special token says that it came from a user and is ordinary text (see `chat.py`). Decoding works on bytes: every id has
a fixed byte string (the byte-level alphabet of GPT-2 undone; special tokens have none), so any cut between ids is a cut
between bytes and nothing is re-guessed. Other tokenizer kinds are refused by name. Not checked here: that the file
belongs to the model; the artefact's manifest does that.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from countermark.errors import FormatError, RequestError

MAX_BYTES = 64 * 1024 * 1024


class Tokenizer:
    """One tokenizer.json. Thread-safe: nothing changes after construction."""

    def __init__(self, data: bytes, *, vocab: int) -> None:
        """`vocab`: ids at or above it are refused. Raises `FormatError` (`tokenizer.malformed`, `.kind`, `.token`)."""
        document = _parse(data)
        self._special = _special_tokens(document, vocab)
        self._bytes = _byte_table(document, vocab)
        self._special_ids = frozenset(self._special.values())
        longest_first = sorted(self._special, key=len, reverse=True)
        self._longest = max(map(len, self._special), default=0)
        self._split = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        document["added_tokens"] = [t for t in document["added_tokens"] if not t.get("special")]
        document["post_processor"] = document["truncation"] = document["padding"] = None
        try:
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(document))
        except Exception as err:  # the binding raises bare Exception
            raise FormatError(f"tokenizer.json: {err!s:.200}", code="tokenizer.malformed") from err
        grows = 1 if document.get("normalizer") is None else 4  # a normalizer may shorten what it is given
        self._bytes_a_token = grows * max(map(len, self._bytes))

    @property
    def special(self) -> dict[str, int]:
        """Special tokens by their text."""
        return dict(self._special)

    def fits(self, text: str, tokens: int) -> bool:
        """False if `text` certainly has more than `tokens` tokens; cheap, so it comes before the encoding."""
        return len(text) <= tokens * self._bytes_a_token

    def encode(self, text: str) -> list[int]:
        """Ordinary text to ids: `<|im_start|>` in it becomes the characters, never the special token.

        Raises `RequestError` (`request.text`) on lone surrogates.
        """
        try:
            text.encode()
        except UnicodeEncodeError as err:
            raise RequestError("text: expected Unicode without lone surrogates", code="request.text") from err
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if not self._special_ids.isdisjoint(ids):  # a vocabulary that spells a special token out of ordinary merges
            raise RequestError("text: encodes to a special token", code="request.special_token")
        return ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Rendered template to ids: unmarked special tokens become their ids; `mark` is removed from all other text."""
        ids: list[int] = []
        start = 0
        for match in self._split.finditer(text) if self._split else ():
            ids += self.encode(text[start : match.start()].replace(mark, ""))
            ids.append(self._special[match[0]])
            start = match.end()
        return ids + self.encode(text[start:].replace(mark, ""))

    def mark_special(self, text: str, mark: str) -> str:
        """Put `mark` behind the first character of everything in `text` that is, or at its end begins, a special token.

        The end counts because a template may trim a text and put another one behind it.
        """
        for token in self._special:
            text = text.replace(token, token[0] + mark + token[1:])
        body = text.rstrip()
        for start in range(max(0, len(body) - self._longest), len(body)):
            if any(token.startswith(body[start:]) for token in self._special):
                return text[: start + 1] + mark + self.mark_special(text[start + 1 :], mark)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; empty for special tokens and for ids the tokenizer does not name."""
        return self._bytes[token]

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """All of the text; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise FormatError(f"tokenizer.json: expected at most {MAX_BYTES} bytes", code="tokenizer.malformed")
    try:
        document = json.loads(data)
        model, added = document["model"], document["added_tokens"]
        kind, fallback = model["type"], model.get("byte_fallback", False)
        decoder = document["decoder"] or {}
        decoders = [d["type"] for d in decoder.get("decoders", [decoder])] if decoder else []
        shapes = isinstance(model["vocab"], dict) and isinstance(added, list)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise FormatError(f"tokenizer.json: {type(err).__name__}", code="tokenizer.malformed") from err
    if not shapes:
        raise FormatError(
            "tokenizer.json: expected a vocabulary and a list of added tokens", code="tokenizer.malformed"
        )
    if kind != "BPE" or fallback or decoders != ["ByteLevel"]:
        raise FormatError(
            f"tokenizer.json: expected byte-level BPE, got {kind!r:.20} with decoders {decoders!r:.60}",
            code="tokenizer.kind",
        )
    return document  # type: ignore[no-any-return]


def _added(document: dict[str, Any], vocab: int) -> list[tuple[str, int, bool]]:
    """(text, id, special) of every added token, checked."""
    found = []
    for token in document["added_tokens"]:
        try:
            text, number, special = token["content"], token["id"], token["special"]
            trims = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        except (KeyError, TypeError, AttributeError) as err:
            raise FormatError("tokenizer.json: added_tokens", code="tokenizer.malformed") from err
        if not isinstance(text, str) or not text or not isinstance(number, int) or not 0 <= number < vocab:
            raise FormatError(
                f"tokenizer.json: added token {text!r:.40} with id {number!r:.20}", code="tokenizer.token"
            )
        if special and (trims or len(text) < 2):
            raise FormatError(
                f"tokenizer.json: special token {text!r:.40} is trimmed or too short", code="tokenizer.token"
            )
        found.append((text, number, bool(special)))
    return found


def _special_tokens(document: dict[str, Any], vocab: int) -> dict[str, int]:
    return {text: number for text, number, special in _added(document, vocab) if special}


def _byte_table(document: dict[str, Any], vocab: int) -> list[bytes]:
    table = [b""] * vocab
    alphabet = _byte_alphabet()
    for text, number in document["model"]["vocab"].items():
        if not isinstance(number, int) or not 0 <= number < vocab:
            raise FormatError(f"tokenizer.json: token {text!r:.40} with id {number!r:.20}", code="tokenizer.token")
        # A word outside the byte alphabet can only be an added token's; its entry is replaced below.
        table[number] = bytes(map(alphabet.get, text)) if alphabet.keys() >= set(text) else b""  # type: ignore[arg-type]
    for text, number, special in _added(document, vocab):
        table[number] = b"" if special else text.encode(errors="replace")
    return table


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2, encoder.py, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
