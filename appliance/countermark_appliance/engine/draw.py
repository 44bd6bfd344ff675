"""From logits to what is recorded of a token: its fingerprint over the raw logits, and the sampled id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from countermark_kernels.fingerprint import encode, fingerprint
from countermark_kernels.sampler import History, SamplerParams, sample

_NO_HISTORY = History()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the sampler needs besides logits: the first `length` of `tokens` precede the token to be drawn.

    The first `prompt` of them are the prompt. `length` is also the drawn token's absolute position, the sampler's
    counter, so that a result does not depend on who else is in the batch.
    """

    params: SamplerParams
    tokens: Sequence[int]
    prompt: int
    length: int

    @property
    def history(self) -> History:
        p = self.params
        if p.repetition == 1.0 and p.presence == 0.0 and p.frequency == 0.0:
            return _NO_HISTORY  # nothing reads it, and slicing it for every token of a long answer is not free
        return History(prompt=self.tokens[: self.prompt], output=self.tokens[self.prompt : self.length])


def draw(logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[bytes]]:
    """logits: [S, vocab] f32, one `Row` for each -> the drawn id and the 16-byte fingerprint of each.

    Raises `NumericsError` where a logit is not finite or out of range.
    """
    if not rows:
        return [], []
    marks = encode(fingerprint(logits, logits.shape[1]))
    ids = sample(logits, [r.params for r in rows], [r.length for r in rows], [r.history for r in rows])
    return ids, marks
