"""From logits to what is recorded of a token: its fingerprint over the raw logits, and the sampled id."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from countermark_appliance.engine.step import Row
from countermark_kernels.fingerprint import encode, fingerprint
from countermark_kernels.sampler import sample

__all__ = ["Row", "draw"]


def draw(logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[bytes]]:
    """logits: [S, vocab] f32, one `Row` for each -> the drawn id and the 16-byte fingerprint of each.

    Raises `NumericsError` where a logit is not finite or out of range.
    """
    if not rows:
        return [], []
    marks = encode(fingerprint(logits, logits.shape[1]))
    ids = sample(logits, [r.params for r in rows], [r.length for r in rows], [r.history for r in rows])
    return ids, marks
