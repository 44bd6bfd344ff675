"""Kernels that start before the one before has ended: programmatic dependent launch, compute capability 9.0 on.

A kernel launched so starts when every program of the one before has said that it may, or ended; most say so first.
Until it waits it may fetch, and may read only what nothing of the same pass writes: weights, and what the host sent for
the pass. Every kernel that says so also waits before anything else it reads or writes, and then all kernels before it
are complete: the one before because that is what is waited for, and those before it because it waited in turn. The
first kernel of a pass is launched plainly, behind everything in the stream.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FEW = 64  # rows


@cache
def early(device: torch.device) -> bool:
    """Whether kernels on `device` can be launched so."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(device: torch.device, rows: int = 1) -> dict[str, bool]:
    """Options of a kernel that begins with `begin`, or does its steps itself. `rows`: of an element-wise one.

    With many rows it is launched plainly: the weights that the product after it fetches too soon are in its way.
    """
    now = rows <= FEW and early(device)
    return {"EARLY": now, "launch_pdl": now}


@triton.jit
def begin(EARLY: tl.constexpr):
    """Let the next kernel start; wait for all before."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(lines):
    """Ask for the lines of 128 bytes at a block of addresses in the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )
