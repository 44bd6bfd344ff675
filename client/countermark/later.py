"""Proofs that were made after an answer, in the form its bundle carries: cosigned checkpoints and anchors of its log.

Each is over a checkpoint that is at least as large as the receipt's; what ties the two is a consistency proof, which is
made here from the log's published files and checked, so that no bundle is made that cannot verify.

Not checked here: any signature; that is verification's, under a policy.
"""

from __future__ import annotations

from dataclasses import replace

from countermark.bundle import Bundle
from countermark.errors import UsageError
from countermark.formats.anchors import encode_anchors, parse_anchors
from countermark.formats.receipt import parse_receipt
from countermark.formats.witnessed import (
    ReceiptWitness,
    encode_receipt_witness,
    parse_receipt_witness,
    parse_witnessed,
)
from countermark.logsource import Source
from countermark.tlog.checkpoint import Checkpoint, parse_checkpoint_text, parse_note
from countermark.tlog.merkle import verify_consistency


def add_epoch(bundle: Bundle, data: bytes) -> Bundle:
    """With the node's EPOCH in its operator's log (`formats.witnessed`). Raises `FormatError`."""
    parse_witnessed(data)
    return replace(bundle, epoch=data)


def add_witness(bundle: Bundle, data: bytes, log: Source | None) -> Bundle:
    """With a cosigned checkpoint of the boot's log: the signed note, or a note with its proof (`formats.witnessed`).

    `log`: where a note's proof is made from. Raises `FormatError`, `LogError` (`log.*`), `UsageError` (`usage.proof`).
    """
    if data[:1] >= b"\xa0":  # a CBOR map, which begins no text
        parse_receipt_witness(data)
        return replace(bundle, witness=data)
    witness = ReceiptWitness(checkpoint=data, proof=_proof(bundle, data, log))
    return replace(bundle, witness=encode_receipt_witness(witness))


def add_anchors(bundle: Bundle, data: bytes, log: Source | None) -> Bundle:
    """With more anchors (`formats.anchors`), behind those it has; one that has no proof yet gets it from `log`.

    Raises as `add_witness`.
    """
    known = () if bundle.anchors is None else parse_anchors(bundle.anchors)
    found = tuple(
        item if item.proof else replace(item, proof=_proof(bundle, item.checkpoint, log))
        for item in parse_anchors(data)
    )
    new = tuple(item for item in found if item not in known)
    return replace(bundle, anchors=encode_anchors(known + new))


def _proof(bundle: Bundle, note: bytes, log: Source | None) -> tuple[bytes, ...]:
    """That the log of `note` begins with the receipt's."""
    old, new = _head(parse_receipt(bundle.receipt).payload.checkpoint), _head(note)
    proof: tuple[bytes, ...] = ()
    if old.size < new.size:
        if log is None:
            message = f"proof: expected --log, because {new.size} leaves were signed and the receipt has {old.size}"
            raise UsageError(message, code="usage.proof")
        proof = log.consistency(old.size, new)
    verify_consistency(old.size, new.size, old.root, new.root, proof)
    return proof


def _head(note: bytes) -> Checkpoint:
    return parse_checkpoint_text(parse_note(note).text)
