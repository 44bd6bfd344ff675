"""The beginning of some blocks of the exhaustive comparison in bench/sweep.py; all of them on a device."""

from __future__ import annotations

import json

import pytest
from gpu_cases import CUDA, triton

import sweep
from sweepkernel import TILE, block_sums


@pytest.mark.parametrize("name", sweep.OPS)
@pytest.mark.parametrize("block", [0, 0x3F, 0x42, 0x7F, 0x80, 0xC1, 0xFF])
def test_part_of_a_block(name: str, block: int) -> None:
    assert triton is not None
    y = sweep.OPS[name](sweep.inputs(block * sweep.BLOCK, 2 * TILE))
    assert block_sums(name, block, 1, tiles=2) == [sweep.weighted(y, 0) % (1 << 64)]


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", sweep.OPS)
def test_every_binary32(name: str) -> None:
    recorded = json.loads(sweep.RESULT.read_text())["ops"][name]
    assert sweep.entry(block_sums(name, 0, 256)) == recorded
