"""The receipt of one answer as COSE_Sign (RFC 9052), and the two messages that stand beside it, whole or redacted.

Body protected header: {crit: ["required"], content type, "required": [[ES256, kid], [ML-DSA-65, kid]]}; exactly these
two signers in this order, each with the protected header {alg, kid}; unprotected maps empty; tag 98; payload attached.
Signed: Sig_structure ["Signature", body protected, signer protected, "countermark/receipt/v1", payload]. kid is the
COSE key thumbprint (RFC 9679, SHA-256). ES256 is r || s with the low s. ML-DSA-65 is the pure form of FIPS 204 with
the empty context string, as RFC 9964 has it; the external_aad separates contexts.

Redacted, a message has null where a value was left out, and no salt of what was left out: a salt is what makes a guess
checkable. Without its prompt an Acceptance is `Placed`, and an Answer is a `Reply`, since fingerprints follow from the
prompt; without its output an answer is None. Anything between is no format of ours.

The receipt of a REPLAY has the same form under a content type and an external_aad of its own.

Not checked here: the signatures and every statement in the payload; `countermark.receipt` does that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from countermark.errors import FormatError
from countermark.formats import cbor
from countermark.formats.cose_key import Algorithm, CoseKey
from countermark.formats.records import FINGERPRINT_BYTES, MAX_RECORD_BYTES, MAX_TOKENS
from countermark.tlog.checkpoint import MAX_NOTE_BYTES
from countermark.tlog.merkle import HASH_BYTES, MAX_PROOF

EXTERNAL_AAD = b"countermark/receipt/v1"
CONTENT_TYPE = "application/vnd.countermark.receipt+cbor"
REPLAY_AAD = b"countermark/replay/v1"
REPLAY_CONTENT_TYPE = "application/vnd.countermark.replay+cbor"
SIGNERS = (Algorithm.ES256, Algorithm.ML_DSA_65)
SIGNATURE_BYTES = {Algorithm.ES256: 64, Algorithm.ML_DSA_65: 3309}
KID_BYTES = 32
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
MAX_RECEIPT_BYTES = 2 * MAX_RECORD_BYTES + MAX_NOTE_BYTES + 32 * 1024
MAX_TEXT_BYTES = 16 * 1024 * 1024
VERSION = 1
_COSE_SIGN = b"\xd8\x62"  # the head of tag 98
_ALG, _CRIT, _CONTENT_TYPE, _KID = 1, 2, 3, 4
_REQUIRED = "required"
_PROVEN = {"record": bytes, "salt": bytes, "index": int, "proof": list}


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """A record with all it takes to find its leaf in the log."""

    record: bytes
    salt: bytes
    index: int
    proof: tuple[bytes, ...]  # inclusion, under the receipt's checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What a receipt says. The consistency proofs end at `checkpoint`."""

    intent: Proven
    outcome: Proven
    checkpoint: bytes
    from_attested: tuple[bytes, ...]  # from the log head in the connection's Attest quote
    from_accepted: tuple[bytes, ...]  # from the checkpoint the Accepted message carried


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPayload:
    """What the receipt of a replay says. The consistency proof ends at `checkpoint`."""

    replay: Proven
    checkpoint: bytes
    from_attested: tuple[bytes, ...]  # from the log head in the connection's Attest quote


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A parsed COSE_Sign of ours: `signed[i]` is what `signatures[i]` of algorithm `SIGNERS[i]` covers."""

    kids: tuple[bytes, bytes]
    signatures: tuple[bytes, bytes]
    signed: tuple[bytes, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt(Signed):
    """A parsed receipt."""

    payload: Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReceipt(Signed):
    """A parsed receipt of a replay."""

    payload: ReplayPayload


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Which of our two receipts a COSE_Sign is: neither passes for the other."""

    content_type: str
    external_aad: bytes


ANSWER = Form(content_type=CONTENT_TYPE, external_aad=EXTERNAL_AAD)
REPLAY = Form(content_type=REPLAY_CONTENT_TYPE, external_aad=REPLAY_AAD)


class Redaction(StrEnum):
    """What was left out of a bundle, with its salts."""

    PROMPT = "prompt"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An INTENT and its place in the log. All that is left of an `Acceptance` whose prompt was left out."""

    record: bytes
    leaf_salt: bytes
    leaf_index: int
    proof: tuple[bytes, ...]
    checkpoint: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance(Placed):
    """The first message of a stream: the INTENT and its place in the log, before any token."""

    field_salts: bytes
    prompt_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The output, and the salts that open the OUTCOME's commitments to it. Left of an `Answer` without its prompt."""

    tokens: tuple[int, ...]
    text: str
    field_salts: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Reply):
    """What was streamed, and the salts that open the OUTCOME's commitments to all of it."""

    fingerprints: tuple[bytes, ...]  # 16 bytes for each token


def thumbprint(key: CoseKey) -> bytes:
    """RFC 9679 section 4: SHA-256 over the required members only (for AKP they include alg)."""
    required = key.as_map()
    if key.algorithm in (Algorithm.ES256, Algorithm.EDDSA):
        del required[_CONTENT_TYPE]  # label 3 of a COSE_Key is alg
    return hashlib.sha256(cbor.encode(required)).digest()


def to_be_signed(payload: bytes, kids: tuple[bytes, bytes], form: Form = ANSWER) -> tuple[bytes, bytes]:
    """The Sig_structure of each signer, in order."""
    body, signers = _protected(kids, form)
    first, second = (cbor.encode(["Signature", body, signer, form.external_aad, payload]) for signer in signers)
    return first, second


def encode_payload(payload: Payload) -> bytes:
    """Deterministic CBOR of the payload."""
    return cbor.encode(
        {
            "v": VERSION,
            "intent": _proven_map(payload.intent),
            "outcome": _proven_map(payload.outcome),
            "checkpoint": payload.checkpoint,
            "from_attested": payload.from_attested,
            "from_accepted": payload.from_accepted,
        }
    )


def encode_replay_payload(payload: ReplayPayload) -> bytes:
    """Deterministic CBOR of the payload."""
    return cbor.encode(
        {
            "v": VERSION,
            "replay": _proven_map(payload.replay),
            "checkpoint": payload.checkpoint,
            "from_attested": payload.from_attested,
        }
    )


def encode_receipt(
    payload: bytes, kids: tuple[bytes, bytes], signatures: tuple[bytes, bytes], form: Form = ANSWER
) -> bytes:
    """The tagged COSE_Sign."""
    body, signers = _protected(kids, form)
    blocks = [[signer, {}, signature] for signer, signature in zip(signers, signatures, strict=True)]
    return _COSE_SIGN + cbor.encode([body, {}, payload, blocks])


def parse_receipt(data: bytes) -> Receipt:
    """Parse a receipt; `encode_receipt` of its parts gives `data` again.

    Raises `FormatError`: `cbor.*`, `receipt.form`, `receipt.signers` (not exactly our two, in order), `receipt.header`,
    `receipt.signature_form` (length or range), `receipt.high_s`, `receipt.field`.
    """
    payload, parts = _open(data, ANSWER)
    return Receipt(payload=_payload(payload), kids=parts.kids, signatures=parts.signatures, signed=parts.signed)


def parse_replay_receipt(data: bytes) -> ReplayReceipt:
    """Parse the receipt of a replay. Raises as `parse_receipt`."""
    payload, parts = _open(data, REPLAY)
    return ReplayReceipt(
        payload=_replay_payload(payload), kids=parts.kids, signatures=parts.signatures, signed=parts.signed
    )


def _open(data: bytes, form: Form) -> tuple[bytes, Signed]:
    """The payload's bytes, and who signed what."""
    if data[:2] != _COSE_SIGN:
        raise FormatError("receipt: expected a COSE_Sign (tag 98)", code="receipt.form")
    body = _typed_list(cbor.decode(data[2:], max_bytes=MAX_RECEIPT_BYTES), bytes, dict, bytes, list)
    blocks = [_typed_list(block, bytes, dict, bytes) for block in body[3]]
    if body[1] or any(block[1] for block in blocks):
        raise FormatError("receipt: expected empty unprotected headers", code="receipt.header")
    if len(blocks) != len(SIGNERS):
        raise FormatError(f"receipt: expected {len(SIGNERS)} signatures, got {len(blocks)}", code="receipt.signers")
    first, second = (_signer(block[0], algorithm, block[2]) for block, algorithm in zip(blocks, SIGNERS, strict=True))
    kids, payload = (first, second), body[2]
    if body[0] != _protected(kids, form)[0]:
        raise FormatError("receipt: expected our protected header, requiring both signers", code="receipt.header")
    _check_low_s(blocks[0][2])
    signed = to_be_signed(payload, kids, form)
    return payload, Signed(kids=kids, signatures=(blocks[0][2], blocks[1][2]), signed=signed)


def encode_acceptance(value: Placed) -> bytes:
    """Deterministic CBOR, as the bundle keeps it."""
    whole = value if isinstance(value, Acceptance) else None
    return cbor.encode(
        {
            "v": VERSION,
            "record": value.record,
            "leaf_salt": value.leaf_salt,
            "field_salts": None if whole is None else whole.field_salts,
            "leaf_index": value.leaf_index,
            "proof": value.proof,
            "checkpoint": value.checkpoint,
            "prompt_tokens": None if whole is None else whole.prompt_tokens,
        }
    )


def parse_acceptance(data: bytes) -> Acceptance | Placed:
    """Inverse of `encode_acceptance`. Raises `FormatError`: `cbor.*`, `accepted.field`, `bundle.redaction`."""
    value = cbor.fields(
        cbor.decode(data),
        "accepted",
        v=int,
        record=bytes,
        leaf_salt=bytes,
        field_salts=(bytes, type(None)),
        leaf_index=int,
        proof=list,
        checkpoint=bytes,
        prompt_tokens=(list, type(None)),
    )
    _check_version(value, "accepted")
    placed = Placed(
        record=value["record"],
        leaf_salt=value["leaf_salt"],
        leaf_index=_index(value["leaf_index"], "accepted"),
        proof=_hashes(value["proof"], "accepted"),
        checkpoint=value["checkpoint"],
    )
    if _left_out(value, "accepted", "prompt_tokens", "field_salts"):
        return placed
    return Acceptance(
        record=placed.record,
        leaf_salt=placed.leaf_salt,
        leaf_index=placed.leaf_index,
        proof=placed.proof,
        checkpoint=placed.checkpoint,
        field_salts=value["field_salts"],
        prompt_tokens=_tokens(value["prompt_tokens"], "accepted"),
    )


def encode_answer(value: Reply | None) -> bytes:
    """Deterministic CBOR, as the bundle keeps it."""
    return cbor.encode(
        {
            "v": VERSION,
            "tokens": None if value is None else value.tokens,
            "text": None if value is None else value.text,
            "fingerprints": b"".join(value.fingerprints) if isinstance(value, Answer) else None,
            "field_salts": None if value is None else value.field_salts,
        }
    )


def parse_answer(data: bytes) -> Answer | Reply | None:
    """Inverse of `encode_answer`. Raises `FormatError`: `cbor.*`, `answer.field`, `bundle.redaction`."""
    value = cbor.fields(
        cbor.decode(data),
        "answer",
        v=int,
        tokens=(list, type(None)),
        text=(str, type(None)),
        fingerprints=(bytes, type(None)),
        field_salts=(bytes, type(None)),
    )
    _check_version(value, "answer")
    if _left_out(value, "answer", "tokens", "text", "field_salts"):
        _left_out(value, "answer", "tokens", "fingerprints")
        return None
    tokens, text, salts, fingerprints = (value[name] for name in ("tokens", "text", "field_salts", "fingerprints"))
    tokens = _tokens(tokens, "answer")
    if len(text) > MAX_TEXT_BYTES:
        raise FormatError(f"answer.text: expected at most {MAX_TEXT_BYTES} characters", code="answer.field")
    if fingerprints is None:
        return Reply(tokens=tokens, text=text, field_salts=salts)
    if len(fingerprints) != FINGERPRINT_BYTES * len(tokens):
        raise FormatError("answer: expected one 16-byte fingerprint for each token", code="answer.field")
    return Answer(
        tokens=tokens,
        text=text,
        fingerprints=tuple(fingerprints[i : i + 16] for i in range(0, len(fingerprints), FINGERPRINT_BYTES)),
        field_salts=salts,
    )


def _left_out(value: dict[str, Any], what: str, *names: str) -> bool:
    """Whether all of these were left out. Raises `FormatError` (`bundle.redaction`) where only some were."""
    absent = [name for name in names if value[name] is None]
    if absent and len(absent) != len(names):
        message = f"{what}: expected {', '.join(names)} all there or all left out, got {', '.join(absent)} left out"
        raise FormatError(message, code="bundle.redaction")
    return bool(absent)


def _protected(kids: Sequence[bytes], form: Form) -> tuple[bytes, tuple[bytes, ...]]:
    pairs = [(algorithm.value, kid) for algorithm, kid in zip(SIGNERS, kids, strict=True)]
    body = {_CRIT: [_REQUIRED], _CONTENT_TYPE: form.content_type, _REQUIRED: pairs}
    return cbor.encode(body), tuple(cbor.encode({_ALG: algorithm, _KID: kid}) for algorithm, kid in pairs)


def _signer(protected: bytes, algorithm: Algorithm, signature: bytes) -> bytes:
    """The signer's kid."""
    header = cbor.decode(protected, max_bytes=256)
    if not isinstance(header, dict) or header.get(_ALG) != algorithm.value or header.keys() != {_ALG, _KID}:
        raise FormatError(f"receipt: expected {algorithm.name} in its place", code="receipt.signers")
    kid = header[_KID]
    if not isinstance(kid, bytes) or len(kid) != KID_BYTES:
        raise FormatError(f"receipt.kid: expected {KID_BYTES} bytes", code="receipt.header")
    if len(signature) != SIGNATURE_BYTES[algorithm]:
        message = f"receipt: expected {SIGNATURE_BYTES[algorithm]} signature bytes, got {len(signature)}"
        raise FormatError(message, code="receipt.signature_form")
    return kid


def _check_low_s(signature: bytes) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if not (0 < r < P256_ORDER and 0 < s < P256_ORDER):
        raise FormatError("receipt: ES256 r and s: expected 1 to n - 1", code="receipt.signature_form")
    if s > P256_ORDER // 2:
        raise FormatError("receipt: ES256 s: expected at most n / 2", code="receipt.high_s")


def _payload(data: bytes) -> Payload:
    value = cbor.fields(
        cbor.decode(data, max_bytes=MAX_RECEIPT_BYTES),
        "receipt",
        v=int,
        intent=dict,
        outcome=dict,
        checkpoint=bytes,
        from_attested=list,
        from_accepted=list,
    )
    _check_version(value, "receipt")
    return Payload(
        intent=_proven(value["intent"]),
        outcome=_proven(value["outcome"]),
        checkpoint=value["checkpoint"],
        from_attested=_hashes(value["from_attested"], "receipt"),
        from_accepted=_hashes(value["from_accepted"], "receipt"),
    )


def _replay_payload(data: bytes) -> ReplayPayload:
    value = cbor.fields(
        cbor.decode(data, max_bytes=MAX_RECEIPT_BYTES),
        "receipt",
        v=int,
        replay=dict,
        checkpoint=bytes,
        from_attested=list,
    )
    _check_version(value, "receipt")
    return ReplayPayload(
        replay=_proven(value["replay"]),
        checkpoint=value["checkpoint"],
        from_attested=_hashes(value["from_attested"], "receipt"),
    )


def _proven_map(value: Proven) -> dict[str, object]:
    return {"record": value.record, "salt": value.salt, "index": value.index, "proof": value.proof}


def _proven(item: object) -> Proven:
    value = cbor.fields(item, "receipt", **_PROVEN)
    return Proven(
        record=value["record"],
        salt=value["salt"],
        index=_index(value["index"], "receipt"),
        proof=_hashes(value["proof"], "receipt"),
    )


def _typed_list(value: object, *kinds: type) -> list[Any]:
    if not isinstance(value, list) or len(value) != len(kinds):
        raise FormatError(f"receipt: expected an array of {len(kinds)}", code="receipt.form")
    if not all(isinstance(item, kind) for item, kind in zip(value, kinds, strict=True)):
        raise FormatError(f"receipt: expected {[kind.__name__ for kind in kinds]}", code="receipt.form")
    return value


def _check_version(value: dict[str, Any], what: str) -> None:
    if value["v"] != VERSION:
        raise FormatError(f"{what}.v: expected {VERSION}, got {value['v']}", code=f"{what}.field")


def _index(value: int, what: str) -> int:
    if not 0 <= value < 2**63:
        raise FormatError(f"{what}: expected a leaf index", code=f"{what}.field")
    return value


def _hashes(items: list[Any], what: str) -> tuple[bytes, ...]:
    if len(items) > MAX_PROOF or not all(isinstance(item, bytes) and len(item) == HASH_BYTES for item in items):
        raise FormatError(f"{what}: expected at most {MAX_PROOF} hashes of {HASH_BYTES} bytes", code=f"{what}.field")
    return tuple(items)


def _tokens(items: list[Any], what: str) -> tuple[int, ...]:
    if len(items) > MAX_TOKENS or not all(type(item) is int and 0 <= item < 2**32 for item in items):
        raise FormatError(f"{what}: expected at most {MAX_TOKENS} token ids", code=f"{what}.field")
    return tuple(items)
