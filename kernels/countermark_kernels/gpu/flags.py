"""The error word of a device: kernels set bits in it, the host reads it where it waits anyway.

A kernel cannot raise. It goes on with whatever it has, and the bits say afterwards that nothing of the batch counts.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels import ieee

NOT_FINITE = tl.constexpr(1)
RANGE = tl.constexpr(2)


@cache
def word(device: torch.device) -> Tensor:
    """The word of `device`: int32 [1], for kernels to pass to `report`."""
    return torch.zeros(1, dtype=torch.int32, device=device)


@triton.jit
def report(flags, bad, code):
    """Set `code` in the word at `flags` where `bad`, a boolean scalar or block, holds."""
    none = tl.zeros_like(bad).to(tl.int32)
    tl.atomic_or(flags + none, none + code, mask=bad, sem="relaxed")


def raise_pending(device: torch.device) -> None:
    """Wait for `device`, clear its word, and raise NumericsError for what kernels reported since the last call."""
    flags = word(device)
    found = int(flags.item())
    if found:
        flags.zero_()
    if found & 1:
        raise ieee.not_finite()
    if found:
        raise ieee.NumericsError("value: expected within the profile's range, got more", code="numerics.range")
