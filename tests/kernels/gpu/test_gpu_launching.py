"""Direct launches against Triton's own: the same kernel with the same bytes of every argument.

Both go through the launcher that Triton compiles, in front of a driver that keeps what it is given
(bench/stubdriver.c); in a process of its own, because this one may be set to interpret.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_cases import CUDA

import stubdriver

pytestmark = pytest.mark.skipif(CUDA, reason="the driver of a GPU is there")

PROGRAM = """
import itertools, json, sys
import stubdriver
stub = stubdriver.use()
import torch
from countermark_kernels.gpu import launching, linear_hopper, linear_wide
from countermark_kernels.gpu.launching import Block, Matrix
from launching_kernels import copied, other, plain

REPORT = {"equal": 0}
asked, made = [], []

class Counting:
    '''Triton's own launch, counted.'''
    def __init__(self, kernel):
        self.kernel, self.params = kernel, kernel.params
    def __getitem__(self, grid):
        def run(*args, **given):
            asked.append(grid)
            return self.kernel[grid](*args, **given)
        return run

def direct(prepared, grid, *args):
    before = len(asked)
    prepared(grid, *args)
    return len(asked) == before

def compare(prepared, grid, *args, first=None):
    '''One call, which `first` says is new or not; then it is direct, and passes what Triton passes.'''
    stub.expect(None)
    was_direct = direct(prepared, grid, *args)
    assert first is None or was_direct is not first, (args, first)
    given = [arg.descriptor() if isinstance(arg, Matrix) else arg for arg in args]
    compiled = prepared._kernel.kernel[grid](*given, **prepared._given)
    assert compiled.metadata.enable_fp_fusion is False
    stub.expect(compiled)
    prepared._kernel.kernel[grid](*given, **prepared._given)
    theirs = stub.seen()
    assert len(theirs) > 64 and stub.seen() == b""
    assert direct(prepared, grid, *args)
    ours = stub.seen()
    assert ours == theirs, (args, ours, theirs)
    REPORT["equal"] += 1

def make(kernel, **given):
    one = launching.prepared(kernel, **given)
    one._kernel = Counting(one._kernel)
    made.append(one)
    return one

memory = torch.zeros(4096, dtype=torch.float32)
assert memory.data_ptr() % 16 == 0
halves = memory.view(torch.float16)
narrow = make(plain, BLOCK=16, num_warps=1)

# what must be told apart, one after the other: each is new once
base = (memory, memory, 48, 5, 0.5)
compare(narrow, (3,), *base, first=True)
compare(narrow, (7, 2, 5), *base, first=False)                      # neither grid nor stream is part of a key
stub.stream = 77
compare(narrow, (3,), *base, first=False)
compare(narrow, (3,), memory[4:], memory, 64, 7, 0.25, first=False)  # other values of the same kind
compare(narrow, (3,), memory[1:], memory, 48, 5, 0.5, first=True)    # alignment
compare(narrow, (3,), memory, memory[2:], 48, 5, 0.5, first=True)
compare(narrow, (3,), memory[3:], memory[1:], 48, 5, 0.5, first=True)
compare(narrow, (3,), memory, None, 48, 5, 0.5, first=True)          # no tensor
compare(narrow, (3,), halves, memory, 48, 5, 0.5, first=True)        # type
compare(narrow, (3,), halves[1:], memory, 48, 5, 0.5, first=True)
for n, first in ((1, True), (2, True), (3, False), (16, False), (0, False), (17, False), (-16, False), (-1, False),
                 (2**31 - 1, False), (-2**31, False), (2**31, True), (2**31 + 1, True), (2**40, False)):
    compare(narrow, (3,), memory, memory, n, 5, 0.5, first=first)
for n in (1, 16, 48, 5, 2**31, 2**31 + 1):  # not specialised: Triton has one form, we have more
    compare(narrow, (3,), memory, memory, 48, n, 0.5)
compare(narrow, (3,), memory, memory, 48, 5, None, first=True)       # float and None

# compile-time arguments and options have launches of their own
for given in ({"BLOCK": 32}, {"BLOCK": 16, "num_warps": 2}, {"BLOCK": 16, "launch_pdl": True}):
    compare(make(plain, **given), (3,), *base, first=True)
assert launching.prepared(plain, BLOCK=16, num_warps=1) is narrow
assert launching.prepared(plain, BLOCK=True, num_warps=1) is not launching.prepared(plain, BLOCK=1, num_warps=1)
assert launching.prepared(other, BLOCK=16, num_warps=1) is not narrow
assert launching.prepared(plain, BLOCK=16, enable_fp_fusion=True)._given["enable_fp_fusion"] is False
compare(make(other, BLOCK=16, num_warps=1), (3,), *base, first=True)

# another device compiles and loads its own
stub.device = 1
compare(narrow, (3,), *base, first=True)
stub.device = 0
compare(narrow, (3,), *base, first=False)

# every combination at once, in an order that mixes them, twice: a wrong hit would pass another function
tensors = (memory, memory[1:], halves, None)
combinations = list(itertools.product(tensors, tensors, (1, 2, 16, 2**33), (5, 16), (0.5,)))
for turn in range(2):
    for args in combinations[turn::3] + combinations[::7]:
        compare(narrow, (2,), *args)

# arguments that no key is made of
for wrong in (True, "3", 2.5j, (1,), torch.float32):
    try:
        narrow((1,), memory, memory, wrong, 5, 0.5)
    except TypeError:
        pass
    else:
        raise AssertionError(wrong)

# kernels of the package, with matrices for bulk copies among their arguments
def tensor(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)

i8 = torch.int8
product = make(linear_wide._tiles, num_warps=4, launch_pdl=True)
for rows, k, n, residual in ((200, 256, 512, 1), (200, 256, 512, 0), (300, 384, 260, 1), (256, 256, 512, 1)):
    q, w, y = tensor(rows, k, dtype=i8), tensor(n, k, dtype=i8), tensor(rows, n)
    given = (Matrix(q, linear_wide.OF_Q), tensor(rows), Matrix(w, linear_wide.OF_W), tensor(n), None)
    compare(product, (4,), *given, y.clone() if residual else None, Matrix(y, linear_wide.OF_Y), rows, n, k)
tile = linear_hopper.FEW
few = make(linear_hopper._tiles, BM=tile.m, BN=tile.n, BK=tile.k, STAGES=tile.stages, num_warps=4, launch_pdl=True)
of_q, w = linear_hopper.block(tile.m, tile.k), Matrix(tensor(192, 512, dtype=i8), linear_hopper.block(tile.n, tile.k))
for rows in (33, 64):
    q, rest = Matrix(tensor(rows, 512, dtype=i8), of_q), (w, tensor(192), tensor(192), None, tensor(rows, 192))
    compare(few, (4,), q, tensor(rows), *rest, rows, 192, 512)
wide = tensor(64, 1040, dtype=i8)
for far in (wide[:, 1:513], tensor(64, 520, dtype=i8)[:, :512], wide[:, :1024:2]):
    try:
        few((4,), Matrix(far, of_q), tensor(64), *rest, 64, 192, 512)
    except ValueError:
        pass
    else:
        raise AssertionError("a matrix that bulk copies cannot reach")

copies = make(copied, num_warps=4)
for block in (Block(8, 128, linear_wide.OPERAND), Block(16, 128, linear_wide.OPERAND)):
    compare(copies, (1,), Matrix(tensor(64, 256, dtype=i8), block), 7, first=True)
    compare(copies, (1,), Matrix(tensor(32, 512, dtype=i8)[:, :256], block), 9, first=False)
    compare(copies, (1,), Matrix(tensor(64, 256, dtype=torch.uint8), block), 7, first=True)

REPORT["forms"] = sum(len(one._ready) for one in made)
REPORT["asked"] = len(asked)
json.dump(REPORT, sys.stdout)
"""

KERNELS = """
import triton, triton.language as tl
from triton.experimental import gluon

@triton.jit(do_not_specialize=["free"])
def plain(x, y, count, free, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = at + free
    if scale is not None:
        value = value * scale
    if y is not None:
        tl.store(y + at, value, mask=at < count)
    if x is not None:
        tl.store(x + at, value, mask=at < count)

@triton.jit
def other(x, y, count, free, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(y + at, mask=at < count) * scale, mask=at < count + free)

@gluon.jit
def copied(x, count):
    pass
"""


def test_a_direct_launch_passes_what_triton_passes(tmp_path: Path) -> None:
    (tmp_path / "launching_kernels.py").write_text(KERNELS)
    (tmp_path / "program.py").write_text(PROGRAM)
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(stubdriver.HERE), *sys.path])}
    run = [sys.executable, str(tmp_path / "program.py")]
    found = subprocess.run(run, env=given, capture_output=True, text=True, check=False, timeout=500)
    assert found.returncode == 0, found.stderr[-3000:]
    report = json.loads(found.stdout)
    assert report["equal"] > 120
    assert report["asked"] == report["forms"] > 100
