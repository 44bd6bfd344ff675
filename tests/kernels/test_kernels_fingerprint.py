"""The fingerprint against big integers, published SplitMix64 values, and every single-bit change."""

from __future__ import annotations

import struct

import pytest
import torch
from kernel_cases import BACKENDS, floats, on

from countermark_kernels import fingerprint

backends = pytest.mark.parametrize("backend", BACKENDS)


def test_splitmix64_known_answers() -> None:
    # First outputs for seeds 0 and 1234567: the reference C program by Vigna, and Rosetta Code's task page.
    assert fingerprint.splitmix64(0) == 0xE220A8397B1DCDAF
    assert fingerprint.splitmix64(1234567) == 6457827717110365317


@backends
def test_against_big_integers(backend: str) -> None:
    logits = floats(3, 517, seed=1)
    with on(backend):
        got = fingerprint.encode(fingerprint.fingerprint(logits, 500))
    for row, lanes in zip(logits.tolist(), got, strict=True):
        sums = [0, 0]
        for i, value in enumerate(row[:500]):
            (bits,) = struct.unpack("<I", struct.pack("<f", value))
            for lane in (0, 1):
                sums[lane] += bits * (fingerprint.splitmix64(2 * i + lane) | 1)
        assert lanes == struct.pack("<QQ", *(s % 2**64 for s in sums))


@backends
def test_any_single_change_shows_in_both_lanes(backend: str) -> None:
    logits = floats(1, 100, seed=2)
    with on(backend):
        base = fingerprint.fingerprint(logits, 100)
        for index in (0, 41, 99):
            for bit in range(32):
                changed = logits.clone()
                changed.view(torch.int32)[0, index] ^= 1 << bit if bit < 31 else -(1 << 31)
                assert bool((fingerprint.fingerprint(changed, 100) != base).all())


@pytest.mark.parametrize("vocab", [0, 101])
def test_vocabulary_must_fit(vocab: int) -> None:
    with pytest.raises(ValueError, match="vocab"):
        fingerprint.fingerprint(floats(1, 100, seed=3), vocab)
