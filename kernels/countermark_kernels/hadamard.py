"""Block Hadamard transform: H_B applied to each block of B elements, unnormalised.

Stages of stride 1, 2, 4, ... B/2; in each, the pair (a, b) at distance `stride` becomes (a + b, a - b), in binary32,
each sum and difference rounded once. Nothing is integer here; the tree of sums is written out by the stages, so the
result of an element depends on its own block alone, never on batch, position or neighbours.

The factor that would make it orthogonal is folded elsewhere: 1/sqrt(B) into the down projection's weights, 1/d (for
queries and keys, both transformed) into the constant of the attention scores.
"""

from __future__ import annotations

from torch import Tensor, stack


def reference(x: Tensor, block: int) -> Tensor:
    """x: [..., n] f32 with n a multiple of `block`, a power of two. Returns the same shape."""
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"block: expected a power of two that divides {x.shape[-1]}, got {block}")
    stride = 1
    shape = x.shape
    while stride < block:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * stride), 2, stride)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = stack((a + b, a - b), dim=-2).reshape(shape)
        stride *= 2
    return x


def block_size(width: int) -> int:
    """The block of the transform before the down projection: the largest power of two dividing `width`, at most 512."""
    return min(width & -width, 512)
