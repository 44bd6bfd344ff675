"""Sizes of launches, against Triton's own functions."""

from __future__ import annotations

import triton

from countermark_kernels.gpu.sizes import cdiv, next_power_of_2


def test_sizes_are_triton_s() -> None:
    for value in (*range(1, 300), 4095, 4096, 4097, 151936, (1 << 30) - 1, 1 << 30):
        assert next_power_of_2(value) == triton.next_power_of_2(value)
        for step in (1, 2, 3, 64, 128, 2048, 4096):
            assert cdiv(value, step) == triton.cdiv(value, step)
    assert cdiv(0, 64) == triton.cdiv(0, 64) == 0
