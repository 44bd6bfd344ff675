"""Step 20: does the operator log hold this start, and have enough witnesses seen it?

The EPOCH that came along is the appraised boot's (its id, keys, log origin), and leaf 0 of that boot's log under the
attested log keys; it stands in the policy's operator log, under a head with both of the operator's signatures; and of
the policy's witnesses at least `witnesses_required` have cosigned that head. Witnesses cosign a log only as long as no
two EPOCHs follow one (`formats.witnessed`), so a second start from one copy of a disk is not in it. With
`WitnessRule.EPOCH_AND_RECEIPT` an offline verification also asks for a cosigned checkpoint of the boot's own log that
extends the receipt's (`verify_receipt_witness`).

A policy that names no operator log leaves the step out, and the result says `unwitnessed`. What is there is judged all
the same where the policy names what to judge it by.

Not checked here: times of cosignatures. Witnesses that sign what they should not are the policy's choice.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Final

from countermark.appraise import Verdict
from countermark.checks import Check
from countermark.errors import LogError
from countermark.formats.records import parse_epoch
from countermark.formats.witnessed import (
    ReceiptWitness,
    boot_leaf,
    encode_operator_leaf,
    parse_receipt_witness,
    parse_witnessed,
)
from countermark.logkeys import verify_signature
from countermark.policy import Policy, WitnessRule
from countermark.receipt import RedactedReceipt, Sealed, Steps
from countermark.tlog.checkpoint import Checkpoint, LogKeys, verify_checkpoint
from countermark.tlog.cosignature import log_keys, verify_cosignatures
from countermark.tlog.merkle import leaf_hash, verify_consistency, verify_inclusion

UNWITNESSED: Final = "unwitnessed"
_SEAL: Final = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnessed(Sealed):
    """A verdict with what others have seen of its boot. `data`: what came along, for a bundle; None when nothing did.

    `names`: the witnesses that count, empty for none. `index`, `operator`: the place in the operator log and its head.
    `previous`: the boot before, as the EPOCH says; None for none or when there is no EPOCH. `checks`: the verdict's and
    ours.
    """

    verdict: Verdict
    data: bytes | None
    names: tuple[str, ...]
    index: int | None
    operator: Checkpoint | None
    previous: bytes | None
    checks: tuple[Check, ...]
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("made by verify_witnessed() only")

    def __str__(self) -> str:
        """`unwitnessed`, or who has seen it."""
        return f"witnessed by {', '.join(self.names)}" if self.names else UNWITNESSED


def boot_keys(verdict: Verdict) -> LogKeys:
    """The attested keys of this boot's log."""
    keys = verdict.keys
    return LogKeys(ed25519=keys["log-ed25519"].cose.public, ml_dsa_44=keys["log-ml-dsa-44"].cose.public)


def verify_witnessed(
    data: bytes | None, verdict: Verdict, policy: Policy, *, checks: tuple[Check, ...] | None = None
) -> Witnessed:
    """Check what came along about the boot's EPOCH (`formats.witnessed`); empty or None when nothing did.

    `checks`: those made before, if not only the verdict's. Raises `FormatError`, `LogError`: `log.unwitnessed` (fewer
    witnesses than required), `log.operator` (not this boot's EPOCH), `log.cosignature`, `log.origin`,
    `log.signature*`, `log.inclusion`, `log.proof`, `log.range`; the error carries the checks made so far.
    """
    steps = Steps(verdict.checks if checks is None else checks)
    data = data or None
    if policy.operator_log is None or (data is None and not policy.witnesses_required):
        if data is not None:
            parse_witnessed(data)  # nobody asks for it here, but a bundle carries it
        why = "the policy names no operator log" if policy.operator_log is None else "no EPOCH in it was shown"
        steps.skip("20", "log witnesses", f"{UNWITNESSED}: {why}; nobody else is known to have seen this log")
        return _made(verdict, data, steps)
    with steps.step("20", "log witnesses") as detail:
        if data is None:
            raise _unwitnessed("the operator log", policy, ())
        head, index, previous, note = _verify_epoch(data, verdict, policy)
        names = _counted(note, policy, "the start's EPOCH")
        seen = f"witnessed by {', '.join(names)}" if names else UNWITNESSED
        detail.append(f"EPOCH {index} of {head.size} in {head.origin}; {seen}")
    return _made(verdict, data, steps, names=names, index=index, operator=head, previous=previous)


def verify_receipt_witness(
    data: bytes | None, receipt: RedactedReceipt, policy: Policy, *, checks: tuple[Check, ...] | None = None
) -> tuple[Check, ...]:
    """Check the cosigned checkpoint that came along with a receipt; all checks so far.

    Nothing is asked for unless the policy says `WitnessRule.EPOCH_AND_RECEIPT`. Raises as `verify_witnessed`.
    """
    steps = Steps(receipt.checks if checks is None else checks)
    required = bool(policy.witnesses_required) and policy.witnessed is WitnessRule.EPOCH_AND_RECEIPT
    if not policy.witnesses or (data is None and not required):
        return steps.done
    with steps.step("20", "log witnesses of the receipt") as detail:
        if data is None:
            raise _unwitnessed("the receipt's checkpoint", policy, ())
        witness = parse_receipt_witness(data)
        head = _verify_growth(witness, receipt)
        names = _counted(witness.checkpoint, policy, "the receipt's checkpoint", required=required)
        detail.append(f"sizes {receipt.checkpoint.size}, {head.size}; witnessed by {', '.join(names) or 'nobody'}")
    return steps.done


def _verify_epoch(data: bytes, verdict: Verdict, policy: Policy) -> tuple[Checkpoint, int, bytes | None, bytes]:
    witnessed = parse_witnessed(data)
    epoch = parse_epoch(witnessed.record)
    for name, expected, got in (
        ("boot id", verdict.boot_id.hex(), epoch.boot_id.hex()),
        ("keys digest", verdict.claims.keys.hex(), epoch.keys_digest.hex()),
        ("log origin", verdict.log_origin, epoch.origin),
    ):
        if expected != got:
            raise LogError(f"{name} of the EPOCH: expected {expected}, got {got}", code="log.operator")
    boot = verify_checkpoint(witnessed.boot_checkpoint, verdict.log_origin, boot_keys(verdict), verify_signature)
    first = leaf_hash(boot_leaf(witnessed.record, witnessed.salt))
    verify_inclusion(0, boot.size, first, witnessed.boot_proof, boot.root)
    assert policy.operator_log is not None
    origin, keys = log_keys(policy.operator_log)
    head = verify_checkpoint(witnessed.checkpoint, origin, keys, verify_signature)
    leaf = leaf_hash(encode_operator_leaf(witnessed.record, witnessed.salt))
    verify_inclusion(witnessed.index, head.size, leaf, witnessed.proof, head.root)
    previous = None if epoch.previous is None else epoch.previous.boot_id
    return head, witnessed.index, previous, witnessed.checkpoint


def _verify_growth(witness: ReceiptWitness, receipt: RedactedReceipt) -> Checkpoint:
    verdict, before = receipt.verdict, receipt.checkpoint
    head = verify_checkpoint(witness.checkpoint, verdict.log_origin, boot_keys(verdict), verify_signature)
    verify_consistency(before.size, head.size, before.root, head.root, witness.proof)
    return head


def _counted(note: bytes, policy: Policy, what: str, *, required: bool = True) -> tuple[str, ...]:
    """The witnesses of the policy that have cosigned."""
    names = verify_cosignatures(note, policy.witnesses, verify_signature)
    if required and len(names) < policy.witnesses_required:
        raise _unwitnessed(what, policy, names)
    return names


def _unwitnessed(what: str, policy: Policy, names: tuple[str, ...]) -> LogError:
    wanted = f"expected at least {policy.witnesses_required} witnesses, got {', '.join(names) or 'none'}"
    return LogError(f"{what}: {wanted}", code="log.unwitnessed")


def _made(
    verdict: Verdict,
    data: bytes | None,
    steps: Steps,
    *,
    names: tuple[str, ...] = (),
    index: int | None = None,
    operator: Checkpoint | None = None,
    previous: bytes | None = None,
) -> Witnessed:
    return Witnessed(
        verdict=verdict,
        data=data,
        names=names,
        index=index,
        operator=operator,
        previous=previous,
        checks=steps.done,
        seal=_SEAL,
    )
