"""The records a log commits to, and the leaves it publishes: deterministic CBOR, strict both ways.

A record goes only to the client. A leaf is {v, type, boot_id, sequence, intent_leaf, commitment}; commitment =
SHA-256("countermark/leaf/v1" || type || salt (32) || record), type as its ASCII name (no name begins another). Inside
a record the prompt, token ids, output and fingerprints stand as SHA-256("countermark/field/v1" || u8 length || name ||
salt (32) || value), each under its own salt, so that each can be disclosed or withheld alone.

Every value is the one that applied, after defaults are resolved. Not checked here: whether any of it is true.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from countermark.errors import FormatError
from countermark.formats import cbor, retrieval
from countermark.formats.schema import Rules, from_map, to_map
from countermark.tlog import merkle

VERSION = 1
SALT_BYTES = 32
MAX_RECORD_BYTES = 256 * 1024
MAX_LEAF_BYTES = 512
MAX_TOKENS = 1 << 20
FINGERPRINT_BYTES = 16
INTENT_FIELDS = ("prompt", "prompt_tokens", "raw_request")
RETRIEVAL_FIELDS = tuple(f"retrieval.{name}" for name in retrieval.FIELDS)
GRAMMAR_FIELDS = ("grammar.text",)
GRAMMAR_KINDS = ("json_schema", "regex")
OUTCOME_FIELDS = ("fingerprints", "output_text", "output_tokens")
FINISH_REASONS = ("stop", "eos", "length")
EXACT_TIER = "exact"
EXACT_CLAIMS = ("run", "batch", "chunking", "prefill-is-decode", "hardware")  # what no bit of an answer depends on
REPLAY_MODES = ("audit", "regenerate")
REPLAY_RESULTS = ("identical", "diverged")
REPLAY_PARTS = ("prompt_tokens", "diverged", "finish_reason", "text")
ABORT_REASONS = ("cancelled", "deadline", "error", "shutdown")


class Kind(Enum):
    """What a leaf commits to."""

    EPOCH = "epoch"
    INTENT = "intent"
    OUTCOME = "outcome"
    ABORT = "abort"
    CRASHED = "crashed"
    REPLAY = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One published leaf. `sequence` is its index; `intent_leaf` the leaf hash of the INTENT it ends, else None."""

    kind: Kind
    boot_id: bytes
    sequence: int
    intent_leaf: bytes | None
    commitment: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What does not change within a boot: the measured stack, the model and the numerics."""

    platform: str  # TEE type: sim | tdx | vtpm
    image_id: bytes
    config_digest: bytes
    model: str
    weights_root: bytes  # dm-verity root hash
    manifest_digest: bytes  # BLAKE3 of the artefact's manifest
    quantisation: str
    adapters: tuple[str, ...]
    tokenizer_digest: bytes
    chat_template_digest: bytes
    profile: str
    kernel_digest: bytes
    engine: str  # engine version
    backend: str
    torch: str
    triton: str | None
    cuda: str | None
    driver: str | None
    vbios: str | None
    gpus: tuple[str, ...]
    cpu: str
    determinism: str  # tier
    claims: tuple[str, ...]  # what the output does not depend on


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The resolved sampler settings, as the sampler was given them (binary32 values; top-p and min-p in 2**-20)."""

    temperature: float
    top_k: int
    top_p_20bit: int
    min_p_20bit: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]  # ascending ids
    seed: int
    seed_origin: str  # client | server


@dataclass(frozen=True, slots=True, kw_only=True)
class Previous:
    """The log of the boot before: where it ended, as verified under the keys of its EPOCH."""

    boot_id: bytes
    size: int
    root: bytes
    epoch_leaf: bytes
    crashed: int  # INTENTs that had no end
    torn_bytes: int  # length of the incomplete tail that was cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """The first record of every log: which boot this is, under which keys, after which log."""

    boot_id: bytes
    origin: str
    epoch: int  # 1 for the first log of a directory
    started_us: int
    evidence_digest: bytes
    keys_digest: bytes
    stack: Stack
    previous: Previous | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """What was retrieved for a request: field commitments, named `retrieval.<field>` (`formats.retrieval`)."""

    corpus_root: bytes
    index_parameters: bytes
    embedder: bytes
    query: bytes
    chunks: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What every token of the answer had to fit, and what read it. `rules`: the version of how the library is asked."""

    kind: str  # json_schema | regex
    text: bytes  # field commitment: the schema or the expression as the client gave it, in UTF-8
    library: str
    version: str  # of the library
    rules: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainGrammar:
    """A `Grammar` before its text is committed to."""

    kind: str
    text: str
    library: str
    version: str
    rules: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """Everything that decides an answer, committed before its first token is computed."""

    boot_id: bytes
    request_id: bytes
    nonce: bytes  # the client's, fresh for each request
    accepted_us: int  # TD time, UTC
    quote_digest: bytes  # of the connection's Attest quote (header + body)
    raw_request: bytes  # field commitment
    prompt: bytes  # field commitment: the input as the client gave it (`encode_input`)
    prompt_tokens: bytes  # field commitment: the exact assembled token ids
    stack: Stack
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    ignore_eos: bool
    logprobs: bool
    deployer_id: str | None
    retention_until: str | None
    retrieval: Retrieval | None = None
    grammar: Grammar | None = None  # absent, not null, where the request has none

    @property
    def salted(self) -> tuple[str, ...]:
        """The names of all field commitments, which are those of their salts."""
        retrieved = () if self.retrieval is None else RETRIEVAL_FIELDS
        return (*INTENT_FIELDS, *retrieved, *(() if self.grammar is None else GRAMMAR_FIELDS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The complete answer to an INTENT."""

    boot_id: bytes
    intent_leaf: bytes
    output_tokens: bytes  # field commitment
    output_text: bytes  # field commitment
    fingerprints: bytes  # field commitment: 16 bytes for each output token, concatenated
    prompt_count: int
    cached_count: int
    output_count: int
    finish_reason: str
    first_token_us: int | None  # TD time, UTC; None when no token was sampled
    ended_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """An INTENT that ended without an answer."""

    boot_id: bytes
    intent_leaf: bytes
    reason: str
    tokens_sent: int
    ended_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Crashed:
    """An INTENT of the previous log that never ended, said so by the boot after."""

    boot_id: bytes
    previous_boot_id: bytes
    intent_leaf: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Where an answer that was run again first differs. `position`: of the token (of the prompt or the output), or of
    the character of the text. A token is None where one side had ended and where the part has none; the gap is the raw
    logit of the local token minus that of the recorded one, None where it is not known."""

    part: str
    position: int
    recorded_token: int | None
    local_token: int | None
    fingerprint_equal: bool
    logit_gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """An answer, often of another node, that this one has run again."""

    boot_id: bytes
    nonce: bytes  # the client's, fresh for each request
    quote_digest: bytes  # of the connection's Attest quote (header + body)
    receipt_digest: bytes  # SHA-256 of the receipt of the answer
    mode: str
    result: str
    positions: int  # output tokens recorded
    divergence: Divergence | None  # None exactly when the result is identical
    stack: Stack  # of this node: where it ran
    started_us: int  # TD time, UTC
    ended_us: int


Record = Epoch | Intent | Outcome | Abort | Crashed | Replay
_KINDS: dict[Kind, type[Any]] = {
    Kind.EPOCH: Epoch,
    Kind.INTENT: Intent,
    Kind.OUTCOME: Outcome,
    Kind.ABORT: Abort,
    Kind.CRASHED: Crashed,
    Kind.REPLAY: Replay,
}
_RULES = Rules(
    optional=(
        *("triton", "cuda", "driver", "vbios", "previous", "deployer_id", "retention_until", "first_token_us"),
        *("divergence", "recorded_token", "local_token", "logit_gap", "retrieval"),
    ),
    absent=("grammar",),
    lengths={"nonce": 32, "request_id": 16},
    nested={
        "stack": Stack,
        "sampling": Sampling,
        "previous": Previous,
        "divergence": Divergence,
        "retrieval": Retrieval,
        "grammar": Grammar,
    },
    choices={
        "platform": ("sim", "tdx", "vtpm"),
        "seed_origin": ("client", "server"),
        "finish_reason": FINISH_REASONS,
        "reason": ABORT_REASONS,
        "mode": REPLAY_MODES,
        "result": REPLAY_RESULTS,
        "part": REPLAY_PARTS,
        "kind": GRAMMAR_KINDS,
    },
    limits={"top_p_20bit": 1 << 20, "min_p_20bit": 1 << 20, "seed": (1 << 64) - 1},
    max_item=MAX_TOKENS,
)


def kind_of(record: Record) -> Kind:
    """The kind of leaf that commits to this record."""
    return next(kind for kind, cls in _KINDS.items() if isinstance(record, cls))


def encode_record(record: Record) -> bytes:
    """Deterministic CBOR of a record. Raises `FormatError` on a value the record's type does not allow."""
    kind, value = kind_of(record), to_map(record, _RULES)
    if isinstance(record, Epoch | Intent | Replay):
        value["stack"] = _encoded_stack(record.stack)
    from_map(_KINDS[kind], value, _RULES)
    data = cbor.encode({"v": VERSION, "type": kind.value, **value})
    if len(data) > MAX_RECORD_BYTES:
        raise FormatError(f"record: expected at most {MAX_RECORD_BYTES} bytes, got {len(data)}", code="record.field")
    return data


@functools.lru_cache(16)
def _encoded_stack(stack: Stack) -> cbor.Encoded:
    """The same in every record of a boot, and half of its bytes."""
    value = to_map(stack, _RULES)
    from_map(Stack, value, _RULES)
    return cbor.Encoded(cbor.encode(value))


def parse_record(data: bytes, kind: Kind) -> Any:
    """Parse a record of the given kind. Raises `FormatError`: `cbor.*` or `record.field` / `record.type`."""
    value = cbor.decode(data, max_bytes=MAX_RECORD_BYTES)
    if not isinstance(value, dict) or value.get("v") != VERSION or value.get("type") != kind.value:
        raise FormatError(f"record: expected version {VERSION} and type {kind.value}", code="record.type")
    del value["v"], value["type"]
    return from_map(_KINDS[kind], value, _RULES)


def parse_intent(data: bytes) -> Intent:
    """Parse an INTENT record. Raises `FormatError`."""
    record: Intent = parse_record(data, Kind.INTENT)
    return record


def parse_outcome(data: bytes) -> Outcome:
    """Parse an OUTCOME record. Raises `FormatError`."""
    record: Outcome = parse_record(data, Kind.OUTCOME)
    return record


def parse_epoch(data: bytes) -> Epoch:
    """Parse an EPOCH record. Raises `FormatError`."""
    record: Epoch = parse_record(data, Kind.EPOCH)
    return record


def parse_replay(data: bytes) -> Replay:
    """Parse a REPLAY record. Raises `FormatError`."""
    record: Replay = parse_record(data, Kind.REPLAY)
    if (record.divergence is None) != (record.result == "identical"):
        raise FormatError("record.divergence: expected one exactly when the result is diverged", code="record.field")
    return record


def commitment(kind: Kind, salt: bytes, record: bytes) -> bytes:
    """What the leaf says of a record; hides it as long as the salt is secret."""
    _check_salt(salt)
    return hashlib.sha256(b"countermark/leaf/v1" + kind.value.encode() + salt + record).digest()


def field_commitment(name: str, salt: bytes, value: bytes) -> bytes:
    """What a record says of one field that can be disclosed alone."""
    _check_salt(salt)
    label = name.encode()
    return hashlib.sha256(b"countermark/field/v1" + bytes([len(label)]) + label + salt + value).digest()


def commit_grammar(grammar: PlainGrammar, salts: Mapping[str, bytes]) -> Grammar:
    """What an INTENT says of a grammar."""
    (name,) = GRAMMAR_FIELDS
    return Grammar(
        kind=grammar.kind,
        text=field_commitment(name, salts[name], grammar.text.encode()),
        library=grammar.library,
        version=grammar.version,
        rules=grammar.rules,
    )


def encode_leaf(leaf: Leaf) -> bytes:
    """Deterministic CBOR of a leaf."""
    return cbor.encode(
        {
            "v": VERSION,
            "type": leaf.kind.value,
            "boot_id": leaf.boot_id,
            "sequence": leaf.sequence,
            "intent_leaf": leaf.intent_leaf,
            "commitment": leaf.commitment,
        }
    )


def parse_leaf(data: bytes) -> Leaf:
    """Parse a leaf. Raises `FormatError`: `cbor.*`, `leaf.field`, `leaf.type`."""
    value = cbor.fields(
        cbor.decode(data, max_bytes=MAX_LEAF_BYTES),
        "leaf",
        v=int,
        type=str,
        boot_id=bytes,
        sequence=int,
        intent_leaf=(bytes, type(None)),
        commitment=bytes,
    )
    kinds = {kind.value: kind for kind in Kind}
    if value["v"] != VERSION or value["type"] not in kinds:
        raise FormatError(f"leaf: expected version {VERSION} and a known type", code="leaf.type")
    leaf = Leaf(
        kind=kinds[value["type"]],
        boot_id=value["boot_id"],
        sequence=value["sequence"],
        intent_leaf=value["intent_leaf"],
        commitment=value["commitment"],
    )
    lengths = {len(leaf.boot_id), len(leaf.commitment), 32 if leaf.intent_leaf is None else len(leaf.intent_leaf)}
    ends_an_intent = leaf.kind in (Kind.OUTCOME, Kind.ABORT, Kind.CRASHED)
    if lengths != {32} or leaf.sequence < 0 or ends_an_intent != (leaf.intent_leaf is not None):
        raise FormatError("leaf: expected 32-byte values and an intent_leaf where one belongs", code="leaf.field")
    return leaf


def leaf_for(record: Record, data: bytes, salt: bytes, sequence: int) -> Leaf:
    """The leaf that publishes `record`, whose encoding is `data`, at index `sequence`."""
    kind = kind_of(record)
    return Leaf(
        kind=kind,
        boot_id=record.boot_id,
        sequence=sequence,
        intent_leaf=getattr(record, "intent_leaf", None),
        commitment=commitment(kind, salt, data),
    )


def leaf_digest(leaf: Leaf) -> bytes:
    """The leaf's hash in the Merkle tree: how other records name it."""
    return merkle.leaf_hash(encode_leaf(leaf))


def encode_input(
    *,
    messages: Sequence[tuple[str, str]] | None = None,
    values: Mapping[str, str] | None = None,
    prompt: str | None = None,
) -> bytes:
    """The value of the field `prompt`: {"messages": [[role, content]...]} or {"prompt": text}; exactly one is given.

    `values`: what the chat template was given beside the messages; a member of its own where there are any.
    """
    if (messages is None) == (prompt is None):
        raise FormatError("input: expected either messages or a prompt", code="record.field")
    if messages is None:
        return cbor.encode({"prompt": prompt})
    turns = {"messages": [list(turn) for turn in messages]}
    return cbor.encode({**turns, "values": dict(values)} if values else turns)


def encode_tokens(tokens: Sequence[int]) -> bytes:
    """The value of the fields `prompt_tokens` and `output_tokens`: an array of token ids."""
    return cbor.encode(list(tokens))


def encode_salts(salts: Mapping[str, bytes]) -> bytes:
    """Deterministic CBOR map: field name -> salt."""
    return cbor.encode(dict(salts))


def parse_salts(data: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """Parse the salts of exactly the named fields. Raises `FormatError`: `cbor.*`, `salts.field`."""
    value = cbor.fields(cbor.decode(data, max_bytes=4096), "salts", **dict.fromkeys(names, bytes))
    if any(len(salt) != SALT_BYTES for salt in value.values()):
        raise FormatError(f"salts: expected {SALT_BYTES} bytes each", code="salts.field")
    return value


def _check_salt(salt: bytes) -> None:
    if len(salt) != SALT_BYTES:
        raise FormatError(f"salt: expected {SALT_BYTES} bytes, got {len(salt)}", code="salts.field")
