"""What the operator log and its witnesses vouch for: leaves of that log, and the files a boot's clients are handed.

Deterministic CBOR, format version 1, ours. *Operator leaf*: {v, type "operator-epoch", record, salt}: an EPOCH, which
holds nothing secret, with the salt of leaf 0 of its own log. *Witnessed*: that EPOCH with its proofs: leaf `index` of
the operator log under `checkpoint`, which carries cosignatures, and leaf 0 of the boot's own log under
`boot_checkpoint`. *Witness of a receipt*: a cosigned checkpoint of the boot's log and the proof that it extends the
receipt's. *Sidecar*: what stands beside a boot's log so that others can check it: EPOCH, salt, public keys.

The **rule of growth** (`Growth`): a boot id enters an operator log once; its `previous` is none, or the boot of an
EPOCH that stands there already and that no other EPOCH names. So two starts from one copy of a disk cannot both enter.

Not checked here: proofs and signatures; the quote behind an EPOCH.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from countermark.errors import FormatError, LogError
from countermark.formats import cbor
from countermark.formats.records import (
    MAX_RECORD_BYTES,
    SALT_BYTES,
    Epoch,
    encode_leaf,
    encode_record,
    leaf_for,
    parse_epoch,
)
from countermark.formats.report_data import RoleKey, keys_digest, keys_from_value, keys_value
from countermark.tlog.checkpoint import MAX_NOTE_BYTES, LogKeys
from countermark.tlog.merkle import HASH_BYTES, MAX_PROOF
from countermark.tlog.tiles import MAX_ENTRY_BYTES

VERSION: Final = 1
OPERATOR_EPOCH: Final = "operator-epoch"
SIDECAR_NAME: Final = "epoch"
MAX_WITNESSED_BYTES: Final = 2 * MAX_NOTE_BYTES + MAX_RECORD_BYTES + 16 * 1024
MAX_RECEIPT_WITNESS_BYTES: Final = MAX_NOTE_BYTES + 16 * 1024
MAX_SIDECAR_BYTES: Final = 512 * 1024
_MAX_INDEX: Final = 2**63 - 2


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorLeaf:
    """One entry of an operator log. `record`: the EPOCH's bytes, which `epoch` is."""

    record: bytes
    salt: bytes
    epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnessed:
    """An EPOCH with its place in the operator log and in its own. `checkpoint`, `boot_checkpoint`: signed notes."""

    record: bytes
    salt: bytes
    index: int
    proof: tuple[bytes, ...]
    checkpoint: bytes
    boot_proof: tuple[bytes, ...]
    boot_checkpoint: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptWitness:
    """A cosigned `checkpoint` of a boot's log, and the consistency proof from the receipt's checkpoint to it."""

    checkpoint: bytes
    proof: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What a boot leaves beside its log so that the next one, and anybody else, can check it."""

    epoch: Epoch
    salt: bytes
    keys: tuple[RoleKey, ...]


class Growth:
    """The rule of growth over the EPOCHs of one operator log, fed in order. Memory: some 200 bytes an EPOCH."""

    def __init__(self) -> None:
        self._followed: dict[bytes, bool] = {}  # boot id -> whether a later EPOCH names it

    def add(self, epoch: Epoch) -> None:
        """Take the next EPOCH. Raises `LogError`: `log.boot_twice`, `log.fork`, `log.unknown_previous`."""
        name = f"boot {epoch.boot_id.hex()}"
        if epoch.boot_id in self._followed:
            raise LogError(f"{name}: expected once in an operator log, got twice", code="log.boot_twice")
        if epoch.previous is not None:
            before = epoch.previous.boot_id
            if before not in self._followed:
                message = f"{name}: expected a previous boot that stands in the log, got {before.hex()}"
                raise LogError(message, code="log.unknown_previous")
            if self._followed[before]:
                message = f"{name}: expected a previous boot that no other start follows, got {before.hex()}"
                raise LogError(message, code="log.fork")
            self._followed[before] = True
        self._followed[epoch.boot_id] = False


def encode_operator_leaf(record: bytes, salt: bytes) -> bytes:
    """Deterministic CBOR of an operator log's entry. Raises `FormatError`."""
    data = cbor.encode({"v": VERSION, "type": OPERATOR_EPOCH, "record": record, "salt": salt})
    parse_operator_leaf(data)
    return data


def parse_operator_leaf(data: bytes) -> OperatorLeaf:
    """Parse an entry. Raises `FormatError`: `cbor.*`, `record.*`, `operator_leaf.field`, `operator_leaf.type`."""
    value = cbor.fields(
        cbor.decode(data, max_bytes=MAX_ENTRY_BYTES), "operator_leaf", v=int, type=str, record=bytes, salt=bytes
    )
    if (value["v"], value["type"]) != (VERSION, OPERATOR_EPOCH):
        message = f"operator leaf: expected version {VERSION} and type {OPERATOR_EPOCH}"
        raise FormatError(message, code="operator_leaf.type")
    _check_size("operator_leaf", value["salt"], SALT_BYTES)
    return OperatorLeaf(record=value["record"], salt=value["salt"], epoch=parse_epoch(value["record"]))


def boot_leaf(record: bytes, salt: bytes) -> bytes:
    """Leaf 0 of the log that an EPOCH begins. Raises `FormatError`."""
    return encode_leaf(leaf_for(parse_epoch(record), record, salt, 0))


def encode_witnessed(witnessed: Witnessed) -> bytes:
    """Deterministic CBOR."""
    return cbor.encode(
        {
            "v": VERSION,
            "record": witnessed.record,
            "salt": witnessed.salt,
            "index": witnessed.index,
            "proof": witnessed.proof,
            "checkpoint": witnessed.checkpoint,
            "boot_proof": witnessed.boot_proof,
            "boot_checkpoint": witnessed.boot_checkpoint,
        }
    )


def parse_witnessed(data: bytes) -> Witnessed:
    """Parse it. Raises `FormatError`: `cbor.*`, `witnessed.field`."""
    value = _fields(
        data,
        "witnessed",
        MAX_WITNESSED_BYTES,
        record=bytes,
        salt=bytes,
        index=int,
        proof=list,
        checkpoint=bytes,
        boot_proof=list,
        boot_checkpoint=bytes,
    )
    _check_size("witnessed", value["salt"], SALT_BYTES)
    if not 0 <= value["index"] <= _MAX_INDEX:
        raise FormatError(f"witnessed.index: expected at most 63 bits, got {value['index']}", code="witnessed.field")
    return Witnessed(
        record=value["record"],
        salt=value["salt"],
        index=value["index"],
        proof=_proof("witnessed", value["proof"]),
        checkpoint=value["checkpoint"],
        boot_proof=_proof("witnessed", value["boot_proof"]),
        boot_checkpoint=value["boot_checkpoint"],
    )


def encode_receipt_witness(witness: ReceiptWitness) -> bytes:
    """Deterministic CBOR."""
    return cbor.encode({"v": VERSION, "checkpoint": witness.checkpoint, "proof": witness.proof})


def parse_receipt_witness(data: bytes) -> ReceiptWitness:
    """Parse it. Raises `FormatError`: `cbor.*`, `receipt_witness.field`."""
    value = _fields(data, "receipt_witness", MAX_RECEIPT_WITNESS_BYTES, checkpoint=bytes, proof=list)
    return ReceiptWitness(checkpoint=value["checkpoint"], proof=_proof("receipt_witness", value["proof"]))


def encode_sidecar(sidecar: Sidecar) -> bytes:
    """Deterministic CBOR: {record, salt, keys}."""
    value = {"record": encode_record(sidecar.epoch), "salt": sidecar.salt, "keys": keys_value(sidecar.keys)}
    return cbor.encode(value)


def parse_sidecar(data: bytes) -> Sidecar:
    """Parse it; the keys must be those that the EPOCH names. Raises `FormatError`: `cbor.*`, `record.*`, `epoch.*`."""
    value = cbor.fields(cbor.decode(data, max_bytes=MAX_SIDECAR_BYTES), "epoch", record=bytes, salt=bytes, keys=list)
    sidecar = Sidecar(epoch=parse_epoch(value["record"]), salt=value["salt"], keys=keys_from_value(value["keys"]))
    _check_size("epoch", sidecar.salt, SALT_BYTES)
    if keys_digest(sidecar.keys) != sidecar.epoch.keys_digest:
        raise FormatError("epoch: expected the keys that the record names, got others", code="epoch.keys")
    return sidecar


def boot_log_keys(keys: tuple[RoleKey, ...]) -> LogKeys:
    """The two log keys of a boot's five."""
    by_role = {item.role: item.key.public for item in keys}
    return LogKeys(ed25519=by_role["log-ed25519"], ml_dsa_44=by_role["log-ml-dsa-44"])


def _fields(data: bytes, what: str, most: int, **types: type) -> dict[str, Any]:
    value = cbor.fields(cbor.decode(data, max_bytes=most), what, v=int, **types)
    if value["v"] != VERSION:
        raise FormatError(f"{what}.v: expected {VERSION}, got {value['v']}", code=f"{what}.field")
    return value


def _proof(what: str, items: list[object]) -> tuple[bytes, ...]:
    if len(items) > MAX_PROOF or any(not isinstance(item, bytes) or len(item) != HASH_BYTES for item in items):
        message = f"{what}: expected proofs of at most {MAX_PROOF} hashes of {HASH_BYTES} bytes"
        raise FormatError(message, code=f"{what}.field")
    return tuple(item for item in items if isinstance(item, bytes))


def _check_size(what: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise FormatError(f"{what}: expected a salt of {size} bytes, got {len(value)}", code=f"{what}.field")
