"""From logits to what is recorded of a token: its fingerprint over the raw logits, and the sampled id."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from countermark_appliance.engine.step import Row
from countermark_kernels.fingerprint import encode, fingerprint
from countermark_kernels.sampler import History, Tally, sample

__all__ = ["Row", "draw"]


def draw(
    logits: Tensor, rows: Sequence[Row], histories: Sequence[History | Tally] | None = None
) -> tuple[list[int], list[bytes]]:
    """logits: [S, vocab] f32, one `Row` for each -> the drawn id and the 16-byte fingerprint of each.

    `histories`: the rows' own, where they are at hand. Raises `NumericsError` where a logit is not finite or too large.
    """
    if not rows:
        return [], []
    marks = encode(fingerprint(logits, logits.shape[1]))
    histories = [row.history for row in rows] if histories is None else histories
    ids = sample(logits, [row.params for row in rows], [row.length for row in rows], histories)
    return ids, marks
