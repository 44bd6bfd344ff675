"""Sizes of launches, on the host. Triton's own functions of these names take 8 us a call there, half a launch."""

from __future__ import annotations


def cdiv(value: int, step: int) -> int:
    """value / step, rounded up."""
    return -(-value // step)


def next_power_of_2(value: int) -> int:
    """The least power of two that is at least `value`, which is positive."""
    return 1 << (value - 1).bit_length()
