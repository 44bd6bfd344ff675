"""The error word: kernels set bits in it, the host reads it where it waits anyway.

A kernel cannot raise. It goes on with whatever it has, and the bits say afterwards that nothing of the batch counts.
Each device has a word of its own; whoever runs beside others brings another (`using`), so that nobody reads an error
that is not theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels import ieee

NOT_FINITE = tl.constexpr(1)
RANGE = tl.constexpr(2)


class _Current(threading.local):
    word: Tensor | None = None


_current = _Current()


@cache
def _own(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def word(device: torch.device) -> Tensor:
    """The word that kernels launched by this thread on `device` report to: int32 [1]."""
    found = _current.word
    return _own(device) if found is None or found.device != device else found


@contextmanager
def using(own: Tensor) -> Iterator[None]:
    """Kernels launched by this thread inside report to `own`, int32 [1], on its device."""
    before = _current.word
    _current.word = own
    try:
        yield
    finally:
        _current.word = before


@triton.jit
def report(flags, bad, code):
    """Set `code` in the word at `flags` where `bad`, a boolean scalar or block, holds."""
    none = tl.zeros_like(bad).to(tl.int32)
    tl.atomic_or(flags + none, none + code, mask=bad, sem="relaxed")


def error(found: int) -> ieee.NumericsError | None:
    """What the bits of a word say."""
    if found & 1:
        return ieee.not_finite()
    if found:
        return ieee.NumericsError("value: expected within the profile's range, got more", code="numerics.range")
    return None


def raise_pending(device: torch.device) -> None:
    """Wait for `device`, clear its word, and raise NumericsError for what kernels reported since the last call."""
    flags = word(device)
    found = int(flags.item())
    if found:
        flags.zero_()
    wrong = error(found)
    if wrong is not None:
        raise wrong
