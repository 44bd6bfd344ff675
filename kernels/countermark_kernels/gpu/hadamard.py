"""The block Hadamard transform of hadamard.py on values in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def transform(x, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """Every block of 2^STAGES along the flat x: [SIZE]. Stage by stage, (a, b) at distance 2^i to (a + b, a - b)."""
    for i in tl.static_range(STAGES):
        a, b = tl.split(tl.permute(tl.reshape(x, [SIZE >> (i + 1), 2, 1 << i]), [0, 2, 1]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [SIZE])
    return x
