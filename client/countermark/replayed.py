"""Check what another node says of an answer it ran again: the receipt of its REPLAY, against the verdict on that node.

Steps, numbered as those of `receipt` that they resemble:

15 the receipt carries exactly our two signatures, both hold under the node's attested keys
16 the REPLAY is of this boot, this connection's evidence and our request, and about our answer
13 it ran on the appraised stack
18 it stands in the node's log, which grew from the attested head

Not checked here: the answer itself, which whoever asks has verified before; and that the node ran it, which is what its
measurements are for.
"""

from __future__ import annotations

import hashlib
from dataclasses import InitVar, dataclass
from typing import Any, Final

from countermark.appraise import Verdict
from countermark.checks import Check
from countermark.errors import ReceiptError, Undecidable
from countermark.formats import records
from countermark.formats.receipt import ReplayReceipt, parse_replay_receipt
from countermark.formats.records import Replay
from countermark.receipt import (
    CheckedReceipt,
    Sealed,
    begin,
    check_stack,
    open_checkpoint,
    same,
    verify_growth,
    verify_leaf,
    verify_signatures,
)
from countermark.replayer import ReplayResult, result_on_node
from countermark.tlog.checkpoint import Checkpoint

_SEAL: Final = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReplay(Sealed):
    """A checked REPLAY. `verdict`: on the node that ran it; `receipt`: the COSE_Sign bytes."""

    verdict: Verdict
    record: Replay
    result: ReplayResult
    receipt: bytes
    leaf_index: int
    checkpoint: Checkpoint
    checks: tuple[Check, ...]
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("made by verify_replay() only")

    def as_json(self) -> dict[str, Any]:
        """Who ran it and where that is recorded, JSON-ready."""
        return {
            "simulated": self.verdict.simulated,
            "boot_id": self.record.boot_id.hex(),
            "quote_digest": self.record.quote_digest.hex(),
            "receipt": hashlib.sha256(self.receipt).hexdigest(),
            "log": {"origin": self.checkpoint.origin, "size": self.checkpoint.size, "replay": self.leaf_index},
        }


def require_able(verdict: Verdict, answer: CheckedReceipt) -> None:
    """Raises `Undecidable` unless the appraised node has profile and weights of the answer: `replay.profile`,
    `replay.weights_root`."""
    stack = answer.intent.stack
    if stack.profile != verdict.profile:
        message = f"profile: expected {stack.profile}, got a node of {verdict.profile}"
        raise Undecidable(message, code="replay.profile")
    if stack.weights_root != verdict.weights_root:
        message = f"weights root: expected {stack.weights_root.hex()}, got a node of {verdict.weights_root.hex()}"
        raise Undecidable(message, code="replay.weights_root")


def verify_replay(receipt: bytes, verdict: Verdict, *, nonce: bytes, answer: CheckedReceipt) -> NodeReplay:
    """Check the receipt of a REPLAY. `nonce`: the one it was asked for under; `answer`: what was to be run.

    Raises `FormatError`, `ReceiptError` (`receipt.*`), `WeightsError` or `LogError` (`log.*`), with the checks made.
    """
    steps = begin(verdict)
    with steps.step("15", "replay signed by both of the node's attested keys") as detail:
        parsed = parse_replay_receipt(receipt)
        detail.extend(verify_signatures(parsed, verdict))
    with steps.step("16", "a replay of this answer, on our request and this connection's evidence") as detail:
        record = _verify_record(parsed, verdict, nonce, answer)
        detail.append(f"{record.result}, {record.mode}, {record.positions} tokens")
    with steps.step("13", "run on the appraised stack") as detail:
        check_stack(record.stack, verdict)
        detail.append(f"{record.stack.model}, {record.stack.profile}")
    with steps.step("18", "in the node's log, grown from the attested head") as detail:
        proven = parsed.payload.replay
        checkpoint = open_checkpoint(parsed.payload.checkpoint, verdict)
        verify_leaf(records.leaf_for(record, proven.record, proven.salt, proven.index), proven.proof, checkpoint)
        claims = verdict.claims
        verify_growth(claims.log_size, claims.log_root, checkpoint, parsed.payload.from_attested)
        detail.append(f"leaf {proven.index} of {checkpoint.size}; {checkpoint.origin}")
    return NodeReplay(
        verdict=verdict,
        record=record,
        result=result_on_node(answer, record),
        receipt=receipt,
        leaf_index=proven.index,
        checkpoint=checkpoint,
        checks=steps.done,
        seal=_SEAL,
    )


def _verify_record(parsed: ReplayReceipt, verdict: Verdict, nonce: bytes, answer: CheckedReceipt) -> Replay:
    record = records.parse_replay(parsed.payload.replay.record)
    same("boot id", verdict.boot_id, record.boot_id, "receipt.boot")
    same("quote digest", verdict.quote_digest, record.quote_digest, "receipt.quote")
    same("nonce", nonce, record.nonce, "receipt.nonce")
    same("receipt replayed", hashlib.sha256(answer.receipt).digest(), record.receipt_digest, "receipt.replay")
    if record.positions != len(answer.answer.tokens):
        message = f"positions: expected {len(answer.answer.tokens)}, got {record.positions}"
        raise ReceiptError(message, code="receipt.replay")
    return record
