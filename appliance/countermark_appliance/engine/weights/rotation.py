"""The residual rotation R and the Hadamard blocks, applied in float64 by butterflies and fixed-order loops.

R = diag(signs) (Q_m (x) H_p) for a width n = m * p, p the largest power of two dividing n, H_p the normalised
Sylvester-Hadamard matrix and Q_m = I - (2/m) J the Householder matrix of the all-ones vector (so Q_1 = -1). Both
factors are symmetric and orthogonal. Signs are bits of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011): sign i is negative when bit i mod 128 of the block with key (seed low, seed high) and counter
(i div 128, 0, 0, 0) is set, word 0 first, least significant bit first.

Every step is one element-wise IEEE-754 binary64 operation and the one sum (over m) runs in index order, so the result
is the same on every machine and thread count. No BLAS, no LAPACK, no library reduction: QR of the same matrix differed
in 312,203 of 331,776 entries between one thread and two.

Data is laid out with the rotated axis first, [n, columns]: then every butterfly works on long contiguous rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from countermark_appliance.engine.weights.config import Rotation

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One Philox4x32-10 block."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def signs(rotation: Rotation) -> Tensor:
    """The diagonal of R's first factor: [odd * power] float64 of +1 and -1."""
    width = rotation.odd * rotation.power
    key = (rotation.seed & _MASK, rotation.seed >> 32)
    values = []
    for block in range((width + 127) // 128):
        for word in philox4x32((block, 0, 0, 0), key):
            values += [-1.0 if word >> bit & 1 else 1.0 for bit in range(32)]
    return torch.tensor(values[:width], dtype=torch.float64)


def hadamard_(x: Tensor, size: int) -> Tensor:
    """Unnormalised Hadamard transform, in place, of each run of `size` consecutive rows of x: [n, columns] float64.

    Stages of stride 1, 2, 4, ..., each (a, b) -> (a + b, a - b). `x` must be contiguous, `size` a power of two
    dividing n.
    """
    rows, columns = x.shape
    assert x.is_contiguous() and size & (size - 1) == 0 and rows % size == 0 and x.dtype == torch.float64
    stride = 1
    while stride < size:
        pairs = x.view(rows // (2 * stride), 2, stride * columns)
        low, high = pairs[:, 0], pairs[:, 1]
        difference = low - high
        low.add_(high)
        high.copy_(difference)
        stride *= 2
    return x


def rotate_(x: Tensor, rotation: Rotation, diagonal: Tensor) -> Tensor:
    """Replace each column c of x: [n, columns] float64 by the row vector c R, in place. `diagonal`: `signs(rotation)`.

    Order of operations: signs; butterflies; times 1/sqrt(power); then with s = x_0 + x_1 + ... over the odd factor in
    index order, x_i - (2/odd) s.
    """
    x.mul_(diagonal[:, None])
    hadamard_(x, rotation.power)
    x.mul_(1.0 / math.sqrt(rotation.power))
    parts = x.view(rotation.odd, rotation.power, -1)
    total = parts[0].clone()
    for i in range(1, rotation.odd):
        total.add_(parts[i])
    total.mul_(2.0 / rotation.odd)
    parts.sub_(total)
    return x
