"""The time by which a receipt's checkpoint existed, by what others signed over it or over a later one.

Every anchor of a kind that this verifier can judge must hold; the others are skipped with a reason. A token covers the
whole signed note that was stamped: its hash is that of all the note's bytes. A later checkpoint of the same log, with
the consistency proof that it extends the receipt's, dates the receipt's as well. One of a smaller tree is refused: that
the log had begun by then says nothing of this receipt.

Time stamps of RFC 3161 give the time, because a policy pins who signs them. A block's time is only told: which headers
are Bitcoin's is the verifier's word, and the time in one is right to within hours.

Not checked here: the log's signatures on the stamped note. Hashes bind the receipt's tree to it, whoever signed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from countermark.anchors.bitcoin import Headers, verify_blocks, verify_headers, verify_proof_of
from countermark.anchors.rfc3161 import Stamp, verify_stamp
from countermark.checks import rfc3339
from countermark.errors import LogError
from countermark.formats.anchors import Anchor, AnchorKind, parse_anchors
from countermark.tlog.checkpoint import parse_checkpoint_text, parse_note
from countermark.tlog.merkle import verify_consistency

__all__ = ["Anchored", "Headers", "Stamp", "verify_anchors", "verify_headers", "verify_stamp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchored:
    """What anchors show. `time`: the earliest genTime that holds, or None. `found`, `skipped`: for people."""

    time: int | None
    found: tuple[str, ...]
    skipped: tuple[str, ...]


def verify_anchors(
    data: bytes,
    checkpoint: bytes,
    *,
    tsa_roots: Sequence[bytes],
    tsa_policies: Sequence[str] = (),
    headers: Headers | None = None,
) -> Anchored:
    """Verify the anchors of a bundle over its receipt's `checkpoint` (a signed note).

    `headers`: of Bitcoin, if there are any. Raises `FormatError`: `anchors.*`, `cbor.*`, `tlog.*`, `der.form`,
    `anchor.token`, `anchor.chain`, `anchor.ots`; `LogError`: `anchor.checkpoint` (another log's), `anchor.older`,
    `log.*` of the consistency proof, and as `verify_stamp`, `verify_proof_of` and `verify_blocks`.
    """
    times: list[int] = []
    found: list[str] = []
    skipped: list[str] = []
    for anchor in parse_anchors(data):
        _verify_extends(anchor, checkpoint)
        if anchor.kind is AnchorKind.OTS:
            told, reason = _verify_ots(anchor, headers)
            found += told
            skipped += reason
        elif not tsa_roots:
            skipped.append("a time stamp: the policy names no anchors.tsa_roots")
        else:
            stamp = verify_stamp(anchor.token, anchor.checkpoint, roots=tsa_roots, policies=tsa_policies)
            times.append(stamp.info.time)
            found.append(f"{rfc3339(stamp.info.time)} by {stamp.authority}, policy {stamp.info.policy}")
    return Anchored(time=min(times, default=None), found=tuple(found), skipped=tuple(skipped))


def _verify_extends(anchor: Anchor, checkpoint: bytes) -> None:
    ours, stamped = (parse_checkpoint_text(parse_note(note).text) for note in (checkpoint, anchor.checkpoint))
    if stamped.origin != ours.origin:
        text = f"anchor: expected a checkpoint of {ours.origin}, got {stamped.origin}"
        raise LogError(text, code="anchor.checkpoint")
    if stamped.size < ours.size:
        text = f"anchor: expected a checkpoint of at least {ours.size} leaves, got {stamped.size}"
        raise LogError(text, code="anchor.older")
    verify_consistency(ours.size, stamped.size, ours.root, stamped.root, anchor.proof)


def _verify_ots(anchor: Anchor, headers: Headers | None) -> tuple[list[str], list[str]]:
    """What was found, or why nothing was."""
    proof = verify_proof_of(anchor.token, anchor.checkpoint)
    if not proof.blocks:
        return [], [f"an OpenTimestamps proof: pending at {len(proof.pending)} calendars, in no block yet"]
    heights = ", ".join(str(block.height) for block in proof.blocks)
    if headers is None:
        return [], [f"an OpenTimestamps proof: no header given of block {heights}"]
    blocks = verify_blocks(proof.blocks, headers)
    if not blocks:
        return [], [f"an OpenTimestamps proof: the headers given do not reach block {heights}"]
    return [f"block {item.height} of {rfc3339(item.time)}" for item in blocks], []
