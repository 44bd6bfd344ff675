"""From logits to what is recorded of a token: its fingerprint over the raw logits, and the sampled id.

Where a row has a mask its barred ids have the bias `grammar.BARRED`, and no other, in step 1 of the sampler. Whatever
their logits were, an id that is barred is not drawn: a row in which that could be is a failure of its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from countermark_appliance.engine.grammar import BARRED, Mask, allows, unpacked
from countermark_appliance.engine.step import Row
from countermark_kernels.fingerprint import encode, fingerprint
from countermark_kernels.ieee import NumericsError
from countermark_kernels.sampler import History, SamplerParams, Tally, sample

__all__ = ["Row", "check_allowed", "draw"]


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
    params, lengths = [row.params for row in rows], [row.length for row in rows]
    if not any(row.mask is not None for row in rows):
        return sample(logits, params, lengths, histories), marks
    ids = sample(*_barred(logits, rows), lengths, histories)
    check_allowed(rows, ids)
    return ids, marks


def check_allowed(rows: Sequence[Row], ids: Iterable[int]) -> None:
    """Raises `NumericsError` (`numerics.range`) where an id is not one of its row's mask."""
    for row, token in zip(rows, ids, strict=True):
        if row.mask is not None and not allows(row.mask, token):
            raise NumericsError("logits: expected more than those of barred ids, got less", code="numerics.range")


def allowed_bias(params: SamplerParams, mask: Mask) -> dict[int, float]:
    """The biases of ids that are not barred."""
    return {token: bias for token, bias in params.logit_bias.items() if allows(mask, token)}


def _barred(logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, list[SamplerParams]]:
    """A copy of the logits, with the bias of barred ids, and the settings without any other for them."""
    out, params = logits.clone(), [row.params for row in rows]
    for i, row in enumerate(rows):
        if row.mask is not None:
            allowed = torch.from_numpy(unpacked(row.mask, logits.shape[1])).to(logits.device)
            out[i] = torch.where(allowed, logits[i], logits[i] + BARRED)
            if row.params.logit_bias:
                params[i] = replace(row.params, logit_bias=allowed_bias(row.params, row.mask))
    return out, params
