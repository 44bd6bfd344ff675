"""The checkpoint's matrices, folded and rotated, as the artefact stores them before they are quantised.

Row-vector convention: a residual x becomes x' = x R, a linear layer is y = x W^T. With D(g) the RMSNorm gain as a
diagonal, H_d and H_B the normalised Hadamard blocks, B = hadamard_block:

    embed     E R                                 (binary32, not quantised)
    q, k      W D(g) R                            biases unchanged; their H_d is applied online, after RoPE
    v         H_d W D(g) R, b_v H_d               so o_proj sees rotated heads
    o         R^T W blockdiag(H_d), b_o R
    gate, up  W D(g) R
    down      R^T W blockdiag(H_B) / sqrt(B)      the online block Hadamard is unnormalised
    head      W D(g_final) R                      always its own matrix, also when the checkpoint ties it

RMSNorm without gain commutes with R because R is orthogonal. Rows of input-side matrices are independent: they come as
jobs, one a block of rows, that may run on any threads. o and down mix rows, so one such matrix is held whole, in
`dtype` (binary32 in a build, binary64 in the tests), and its columns are independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from countermark_appliance.engine.weights.config import ModelConfig
from countermark_appliance.engine.weights.parallel import ordered
from countermark_appliance.engine.weights.rotation import hadamard_, rotate_, signs
from countermark_appliance.engine.weights.source import EMBED, FINAL_NORM, HEAD, Source

_BLOCK_ELEMENTS = 1 << 19  # 4 MiB of float64: a block and its transpose stay in a core's caches
_F64 = torch.float64
Jobs = Iterator[Callable[[], Tensor]]


class Folder:
    """Folds one checkpoint. A `Jobs` gives a matrix as consecutive blocks of rows, each a call that returns float64.

    `diagonal`: other signs than the profile's, to measure how much one draw of them matters.
    """

    def __init__(
        self,
        source: Source,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        diagonal: Tensor | None = None,
    ) -> None:
        self._source = source
        self._config = config
        self._dtype = dtype
        self._signs = signs(config.rotation) if diagonal is None else diagonal
        step = max(config.head_dim, _BLOCK_ELEMENTS // config.hidden)
        self._step = step - step % config.head_dim

    def embed(self) -> Jobs:
        """E R: [vocab, hidden]."""
        yield from self._input_side(EMBED, self._config.vocab, None)

    def head(self) -> Jobs:
        """[vocab, hidden]."""
        yield from self._input_side(HEAD, self._config.vocab, FINAL_NORM)

    def qkv(self, layer: int) -> Jobs:
        """[q_rows + 2 kv_rows, hidden]."""
        c, prefix = self._config, f"model.layers.{layer}"
        gain = f"{prefix}.input_layernorm.weight"
        yield from self._input_side(f"{prefix}.self_attn.q_proj.weight", c.q_rows, gain)
        yield from self._input_side(f"{prefix}.self_attn.k_proj.weight", c.kv_rows, gain)
        yield from self._input_side(f"{prefix}.self_attn.v_proj.weight", c.kv_rows, gain, head_dim=c.head_dim)

    def gate_up(self, layer: int) -> Jobs:
        """[2 intermediate, hidden], gate rows first."""
        gain = f"model.layers.{layer}.post_attention_layernorm.weight"
        for which in ("gate", "up"):
            name = f"model.layers.{layer}.mlp.{which}_proj.weight"
            yield from self._input_side(name, self._config.intermediate, gain)

    def output(self, layer: int) -> Tensor:
        """o: [hidden, q_rows] in `dtype`."""
        c = self._config
        scale = 1.0 / math.sqrt(c.head_dim)
        return self._output_side(f"model.layers.{layer}.self_attn.o_proj.weight", c.q_rows, c.head_dim, scale)

    def down(self, layer: int) -> Tensor:
        """down: [hidden, intermediate] in `dtype`."""
        c = self._config
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        return self._output_side(name, c.intermediate, c.hadamard_block, 1.0 / c.hadamard_block)

    def qkv_bias(self, layer: int) -> Tensor:
        """[q_rows + 2 kv_rows] float64."""
        biases = [self._vector(f"model.layers.{layer}.self_attn.{x}_proj.bias") for x in "qkv"]
        _normalised_hadamard_(biases[2].view(-1, 1), self._config.head_dim)
        return torch.cat(biases)

    def output_bias(self, layer: int) -> Tensor:
        """[hidden] float64."""
        bias = self._vector(f"model.layers.{layer}.self_attn.o_proj.bias")
        return rotate_(bias.view(-1, 1), self._config.rotation, self._signs).view(-1)

    def head_norm(self, layer: int, which: str) -> Tensor:
        """Qwen3's gain of `q` or `k`, unchanged: [head_dim] float64."""
        return self._vector(f"model.layers.{layer}.self_attn.{which}_norm.weight")

    def _vector(self, name: str) -> Tensor:
        return self._source.rows(name, 0, 1).to(_F64).clone()

    def _input_side(self, name: str, rows: int, gain_name: str | None, *, head_dim: int = 1) -> Jobs:
        """`head_dim`: also rotate runs of that many rows."""
        gain = None if gain_name is None else self._vector(gain_name)

        def block(start: int) -> Tensor:
            piece = self._source.rows(name, start, min(start + self._step, rows))
            columns = piece.t().to(_F64, memory_format=torch.contiguous_format)
            if gain is not None:
                columns.mul_(gain[:, None])
            rotated = rotate_(columns, self._config.rotation, self._signs).t().contiguous()
            return rotated if head_dim == 1 else _normalised_hadamard_(rotated, head_dim)

        return (partial(block, start) for start in range(0, rows, self._step))

    def _output_side(self, name: str, width: int, block: int, scale: float) -> Tensor:
        hidden = self._config.hidden
        whole = torch.empty(hidden, width, dtype=self._dtype)
        for start in range(0, hidden, self._step):
            stop = min(start + self._step, hidden)
            whole[start:stop] = self._source.rows(name, start, stop)
        step = max(block, _BLOCK_ELEMENTS // hidden // block * block)

        def rotate_columns(start: int) -> None:
            part = whole[:, start : start + step]
            columns = part.to(_F64, memory_format=torch.contiguous_format, copy=True)
            rotated = rotate_(columns, self._config.rotation, self._signs)
            part.copy_(hadamard_(rotated.t().contiguous(), block).mul_(scale).t())

        for _ in ordered(rotate_columns, range(0, width, step)):
            pass
        return whole


def _normalised_hadamard_(x: Tensor, size: int) -> Tensor:
    return hadamard_(x, size).mul_(1.0 / math.sqrt(size))
