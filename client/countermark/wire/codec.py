"""Wire messages of countermark.v1 to our values and back, with every cap; the names and limits both ends share.

Protobuf only frames what travels: everything signed or hashed is opaque bytes with its own strict parser. A request's
bytes as received are what an INTENT commits to, so they are parsed here, beside a copy that stays as it came. Unknown
fields are refused: an option that a server does not know must not look as if it had been applied.

Not checked here: sampling values and prompt length (the engine knows their ranges), proofs and signatures.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from countermark.errors import FormatError, RequestError
from countermark.formats import records
from countermark.formats.receipt import Acceptance, encode_acceptance, parse_acceptance
from countermark.formats.retrieval import Chunk, RetrievalSet
from countermark.wire import countermark_v1_pb2 as pb

SERVICE: Final = "countermark.v1.Countermark"
LOG_SERVICE: Final = "countermark.v1.Log"
ATTEST: Final = f"/{SERVICE}/Attest"
GET_EVIDENCE: Final = f"/{SERVICE}/GetEvidence"
GENERATE: Final = f"/{SERVICE}/Generate"
REPLAY: Final = f"/{SERVICE}/Replay"

CODE_KEY: Final = "countermark-code"
"""Trailing metadata: the stable code of the error that ended a call."""
RETRY_KEY: Final = "grpc-retry-pushback-ms"
"""Trailing metadata: how long to wait before the same call, in gRPC's own words (proposal A6)."""
_RANGES: Final = {
    FieldDescriptor.TYPE_UINT32: "0 to 4294967295",
    FieldDescriptor.TYPE_UINT64: "0 to 18446744073709551615",
    FieldDescriptor.TYPE_FLOAT: "a binary32 number",
    FieldDescriptor.TYPE_BOOL: "true or false",
}
_CODE: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+")

NONCE_BYTES: Final = 32
MAX_REQUEST_BYTES: Final = 4 * 1024 * 1024
MAX_RESPONSE_BYTES: Final = 16 * 1024 * 1024
MAX_MESSAGES: Final = 1024
MAX_STOPS: Final = 64
MAX_VALUES: Final = 16
MAX_NAME: Final = 64
MAX_VALUE: Final = 256
MAX_LEAVES: Final = 1024
"""Of one GetLeaves answer."""
MAX_GRAMMAR_BYTES: Final = {"json_schema": 64 * 1024, "regex": 8 * 1024}
ROLES: Final = ("system", "user", "assistant")

M = TypeVar("M", bound=Message)


def parse_message(kind: type[M], data: bytes) -> M:
    """Parse a request. Raises `RequestError`: `request.too_long`, `request.malformed`, `request.unknown_field`."""
    if len(data) > MAX_REQUEST_BYTES:
        raise RequestError(
            f"request: expected at most {MAX_REQUEST_BYTES} bytes, got {len(data)}", code="request.too_long"
        )
    try:
        message = kind.FromString(data)
    except DecodeError as err:
        raise RequestError(f"request: expected {kind.__name__}", code="request.malformed") from err
    if _has_unknown(message):
        raise RequestError(f"request: a field that {kind.__name__} does not have", code="request.unknown_field")
    return message


def check_nonce(nonce: bytes) -> bytes:
    """The nonce if it is exactly 32 bytes. Raises `RequestError` (`request.nonce`)."""
    if len(nonce) != NONCE_BYTES:
        raise RequestError(f"nonce: expected {NONCE_BYTES} bytes, got {len(nonce)}", code="request.nonce")
    return nonce


def parse_generate_request(data: bytes) -> pb.GenerateRequest:
    """Parse and cap a `GenerateRequest`.

    Raises `RequestError`: as `parse_message` and `check_nonce`, `request.input` (neither or both of messages and
    prompt), `request.role`, `request.messages`, `request.values`, `request.retrieval`, `request.grammar_too_long`,
    `request.stop`.
    """
    request = parse_message(pb.GenerateRequest, data)
    check_nonce(request.nonce)
    if request.WhichOneof("input") is None:
        raise RequestError("input: expected messages or a prompt, got neither", code="request.input")
    if len(request.chat.messages) > MAX_MESSAGES:
        raise RequestError(
            f"messages: expected at most {MAX_MESSAGES}, got {len(request.chat.messages)}", code="request.messages"
        )
    for message in request.chat.messages:
        if message.role not in ROLES:
            raise RequestError(f"role: expected one of {ROLES}, got {message.role!r:.40}", code="request.role")
    _check_values(request.chat.values)
    retrieval(request)
    _check_grammar(request)
    if len(request.stop) > MAX_STOPS:
        raise RequestError(f"stop: expected at most {MAX_STOPS}, got {len(request.stop)}", code="request.stop")
    return request


def parse_replay_request(data: bytes) -> pb.ReplayRequest:
    """Parse a `ReplayRequest`. Raises `RequestError` as `parse_message` and `check_nonce`."""
    request = parse_message(pb.ReplayRequest, data)
    check_nonce(request.nonce)
    return request


def input_value(request: pb.GenerateRequest) -> bytes:
    """The value of the INTENT's field `prompt`: the input as the client gave it."""
    if request.WhichOneof("input") == "prompt":
        return records.encode_input(prompt=request.prompt)
    turns = [(turn.role, turn.content) for turn in request.chat.messages]
    return records.encode_input(messages=turns, values=request.chat.values)


def grammar(request: pb.GenerateRequest) -> tuple[str, str] | None:
    """What the answer must fit: its kind (`records.GRAMMAR_KINDS`) and its text."""
    kind = request.WhichOneof("grammar")
    return None if kind is None else (kind, getattr(request, kind))


def retrieval(request: pb.GenerateRequest) -> RetrievalSet | None:
    """What the request says was retrieved. Raises `RequestError` (`request.retrieval`)."""
    if not request.HasField("retrieval"):
        return None
    given = request.retrieval
    chunks = [Chunk(id=one.id, start=one.start, end=one.end, score=one.score) for one in given.chunks]
    try:
        return RetrievalSet(
            corpus_root=given.corpus_root,
            index_parameters=given.index_parameters,
            embedder=given.embedder,
            query=given.query,
            chunks=tuple(chunks),
        )
    except FormatError as err:
        raise RequestError(str(err), code=err.code) from err


def encode_generate_request(
    *,
    prompt: str | None = None,
    messages: Sequence[tuple[str, str]] | None = None,
    model: str = "",
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    ignore_eos: bool | None = None,
    logprobs: int | None = None,
    values: Mapping[str, str] | None = None,
    retrieved: RetrievalSet | None = None,
    json_schema: str | None = None,
    regex: str | None = None,
) -> bytes:
    """The bytes of a request under a fresh nonce. `messages`: (role, content) pairs. `values`: for the chat template.
    `json_schema` (its text) or `regex`: what the whole answer must fit.

    Raises `RequestError`: `request.<field>` for a value that does not fit its wire type, else as
    `parse_generate_request`.
    """
    if (prompt is None) == (messages is None):
        raise RequestError("input: expected either messages or a prompt", code="request.input")
    if json_schema is not None and regex is not None:
        raise RequestError("grammar: expected a JSON schema or a regular expression, got both", code="request.grammar")
    request = pb.GenerateRequest(nonce=secrets.token_bytes(NONCE_BYTES))
    _assign(
        request,
        model=model or None,
        prompt=prompt,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        json_schema=json_schema,
        regex=regex,
    )
    try:
        if isinstance(stop, str):
            raise TypeError
        request.stop.extend(stop)
    except (TypeError, ValueError) as err:
        raise RequestError("stop: expected several strings", code="request.stop") from err
    try:
        for role, content in messages or ():
            request.chat.messages.add(role=role, content=content)
        if messages is not None:
            request.chat.SetInParent()
        elif values:
            raise RequestError("values: expected messages, whose template reads them", code="request.values")
        if values:
            request.chat.values.update(values)
    except (TypeError, ValueError) as err:
        raise RequestError(f"input: {type(err).__name__}: expected text", code="request.input") from err
    _assign(
        request.sampling,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    try:
        for token, bias in (logit_bias or {}).items():
            request.sampling.logit_bias[token] = bias
    except (AttributeError, TypeError, ValueError) as err:
        raise RequestError("logit_bias: expected token ids and numbers", code="request.logit_bias") from err
    if retrieved is not None:
        request.retrieval.CopyFrom(_retrieval_message(retrieved))
    data = request.SerializeToString()
    parse_generate_request(data)
    return data


def encode_accepted(value: Acceptance) -> bytes:
    """The first message of a stream."""
    accepted = pb.Accepted(
        record=value.record,
        leaf_salt=value.leaf_salt,
        field_salts=value.field_salts,
        leaf_index=value.leaf_index,
        proof=value.proof,
        checkpoint=value.checkpoint,
        prompt_tokens=value.prompt_tokens,
    )
    return pb.GenerateResponse(accepted=accepted).SerializeToString()


def acceptance(message: pb.Accepted) -> Acceptance:
    """The received value, under the caps of `formats.receipt`. Raises `FormatError` (`accepted.field`)."""
    value = Acceptance(
        record=message.record,
        leaf_salt=message.leaf_salt,
        field_salts=message.field_salts,
        leaf_index=message.leaf_index,
        proof=tuple(message.proof),
        checkpoint=message.checkpoint,
        prompt_tokens=tuple(message.prompt_tokens),
    )
    parse_acceptance(encode_acceptance(value))
    return value


def parse_response(data: bytes) -> pb.GenerateResponse:
    """Parse one message of a stream. Raises `FormatError` (`stream.malformed`)."""
    try:
        return pb.GenerateResponse.FromString(data)
    except DecodeError as err:
        raise FormatError("stream: expected GenerateResponse", code="stream.malformed") from err


def logprobs(message: pb.Tokens, asked: int) -> tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...]:
    """(id, log probability, likeliest ids with theirs) of each token, if `asked` is not 0: the request's `logprobs`.

    Raises `FormatError` (`stream.malformed`): not one for each id, more likely ids than asked for, or no finite number.
    """
    found = tuple(
        (token, entry.logprob, tuple((one.id, one.logprob) for one in entry.top))
        for token, entry in zip(message.ids, message.logprobs, strict=False)
    )
    fits = len(message.logprobs) == (len(message.ids) if asked else 0)
    numbers = (number for _, own, top in found for number in (own, *(one for _, one in top)))
    if not fits or any(len(top) > asked for _, _, top in found) or not all(map(math.isfinite, numbers)):
        text = f"stream: expected log probabilities of each token and up to {asked} more, got others"
        raise FormatError(text, code="stream.malformed")
    return found


def is_code(text: str) -> bool:
    """Whether a peer's text has the form of one of our codes (and can be printed)."""
    return len(text) <= 64 and _CODE.fullmatch(text) is not None


def _check_grammar(request: pb.GenerateRequest) -> None:
    kind, text = grammar(request) or ("regex", "")
    if len(text.encode()) > MAX_GRAMMAR_BYTES[kind]:
        message = f"{kind}: expected at most {MAX_GRAMMAR_BYTES[kind]} bytes, got {len(text.encode())}"
        raise RequestError(message, code="request.grammar_too_long")


def _check_values(values: Mapping[str, str]) -> None:
    if len(values) > MAX_VALUES:
        raise RequestError(f"values: expected at most {MAX_VALUES}, got {len(values)}", code="request.values")
    for name, text in values.items():
        if not name.isascii() or not name.isidentifier() or len(name) > MAX_NAME or len(text) > MAX_VALUE:
            message = f"values: expected names of up to {MAX_NAME} letters and texts of up to {MAX_VALUE} characters"
            raise RequestError(message, code="request.values")


def _retrieval_message(value: RetrievalSet) -> pb.Retrieval:
    return pb.Retrieval(
        corpus_root=value.corpus_root,
        index_parameters=value.index_parameters,
        embedder=value.embedder,
        query=value.query,
        chunks=[pb.Chunk(id=one.id, start=one.start, end=one.end, score=one.score) for one in value.chunks],
    )


def _assign(message: Message, **values: object) -> None:
    for name, value in values.items():
        if value is None:
            continue
        try:
            setattr(message, name, value)
        except (TypeError, ValueError) as err:
            got = f"{value}"[:60] if isinstance(value, int | float) else type(value).__name__  # never a prompt
            wanted = _RANGES.get(message.DESCRIPTOR.fields_by_name[name].type, "text")
            raise RequestError(f"{name}: expected {wanted}, got {got}", code=f"request.{name}") from err


def _has_unknown(message: Message) -> bool:
    if len(UnknownFieldSet(message)):
        return True
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        if any(map(_has_unknown, [value] if isinstance(value, Message) else value)):
            return True
    return False
