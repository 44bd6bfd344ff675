"""What a client asked for, read back from the exact bytes it sent (protobuf `countermark.v1.GenerateRequest`).

The request is bound into the INTENT by the hash of these bytes, so whoever checks an answer reads the request from the
same bytes, and compares every setting with the one recorded as applied. What was not given has the protocol's default
(`DEFAULTS`: greedy, nothing filtered, nothing penalised), so a node cannot choose it. The node's to choose, and only
recorded, are a seed and a `max_tokens` that the request leaves open, since they depend on the node and its model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError, ReceiptError, RequestError
from countermark.formats.records import Intent
from countermark.formats.retrieval import RetrievalSet
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb

_ONE_20BIT = 1 << 20
DEFAULTS: Final[Mapping[str, object]] = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p_20bit": _ONE_20BIT,
    "min_p_20bit": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "logprobs": False,
}
"""What a setting is when a request does not give it (proto `countermark.v1.Sampling`), as a record names it."""
_PLAIN = ("temperature", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as sent. `settings`: what was given or has a default, by the name it has in a record."""

    nonce: bytes
    model: str
    prompt: bytes  # `formats.records.encode_input` of the input:
    text: str | None  # a raw prompt, or
    messages: tuple[tuple[str, str], ...] | None  # (role, content) pairs
    values: dict[str, str]  # for the chat template
    retrieval: RetrievalSet | None
    grammar: tuple[str, str] | None  # its kind and its text
    settings: dict[str, object]


def parse_request(data: bytes) -> Asked:
    """Parse the bytes of a GenerateRequest.

    Raises `FormatError` with the codes of `wire.codec.parse_generate_request`.
    """
    try:
        message = codec.parse_generate_request(data)
    except RequestError as err:  # the same bytes, but here they come from a bundle: not the caller's own mistake
        raise FormatError(str(err), code=err.code) from err
    raw = message.WhichOneof("input") == "prompt"
    return Asked(
        nonce=message.nonce,
        model=message.model,
        prompt=codec.input_value(message),
        text=message.prompt if raw else None,
        messages=None if raw else tuple((turn.role, turn.content) for turn in message.chat.messages),
        values=dict(message.chat.values),
        retrieval=codec.retrieval(message),
        grammar=codec.grammar(message),
        settings=_settings(message),
    )


def check_settings(asked: Asked, intent: Intent) -> None:
    """Every setting is recorded as given, or as its default. Raises `ReceiptError` (`receipt.setting.<name>`)."""
    sampling = intent.sampling
    applied: dict[str, object] = {name: getattr(sampling, name) for name in _PLAIN}
    applied |= {
        "top_p_20bit": sampling.top_p_20bit,
        "min_p_20bit": sampling.min_p_20bit,
        "logit_bias": dict(sampling.logit_bias),
        "max_tokens": intent.max_tokens,
        "stop": intent.stop,
        "ignore_eos": intent.ignore_eos,
        "logprobs": intent.logprobs,
        "model": intent.stack.model,
    }
    wanted = dict(asked.settings)
    if asked.model:
        wanted["model"] = asked.model
    for name, value in wanted.items():
        if applied[name] != value:
            message = f"{name}: expected {value!r}, as asked or by default, got {applied[name]!r} recorded"
            raise ReceiptError(message, code=f"receipt.setting.{name}")
    origin = "client" if "seed" in wanted else "server"
    if sampling.seed_origin != origin:
        message = f"seed_origin: expected {origin}, got {sampling.seed_origin}"
        raise ReceiptError(message, code="receipt.setting.seed_origin")


def _settings(message: pb.GenerateRequest) -> dict[str, object]:
    sampling = message.sampling
    settings = dict(DEFAULTS) | {name: getattr(sampling, name) for name in _PLAIN if sampling.HasField(name)}
    if sampling.HasField("top_p"):  # the sampler's unit; profile exact-v1 rounds half to even and never to nothing
        settings["top_p_20bit"] = max(1, _in_20bit(sampling.top_p))
    if sampling.HasField("min_p"):
        settings["min_p_20bit"] = _in_20bit(sampling.min_p)
    settings["logit_bias"] = dict(sampling.logit_bias)
    if message.HasField("max_tokens"):
        settings["max_tokens"] = message.max_tokens
    settings["stop"] = tuple(message.stop)
    if message.HasField("ignore_eos"):
        settings["ignore_eos"] = message.ignore_eos
    if message.HasField("logprobs"):  # recorded is whether there were any
        settings["logprobs"] = message.logprobs > 0
    return settings


def _in_20bit(value: float) -> int:
    if not 0.0 <= value <= 1.0:  # NaN too
        raise FormatError(f"request: expected 0 to 1, got {value!r}", code="request.malformed")
    return round(value * _ONE_20BIT)
