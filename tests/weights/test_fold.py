"""The rotated network is the original network: both in float64, before anything is quantised.

The reference is transformers in float64, with one change: its RMSNorm computes in float32 whatever the model's type, so
the test gives it the same formula in float64. RoPE tables are transformers' own on both sides.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tinymodels import VOCAB, whole, write_folder
from torch import Tensor

from countermark_appliance.engine.weights.config import ModelConfig
from countermark_appliance.engine.weights.fold import Folder
from countermark_appliance.engine.weights.folder import FolderSource
from countermark_appliance.engine.weights.rotation import hadamard_

F64 = torch.float64


def norm(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def heads_hadamard(x: Tensor, size: int) -> Tensor:
    """Unnormalised Hadamard over runs of `size` along the last axis."""
    flat = x.reshape(-1, x.shape[-1]).t().contiguous()
    return hadamard_(flat, size).t().reshape(x.shape)


def rotated_forward(fold: Folder, c: ModelConfig, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The network the engine runs, in float64, from the folded matrices. cos, sin: [tokens, head_dim]."""
    x = whole(fold.embed())[ids]
    tokens, d = len(ids), c.head_dim
    mask = torch.full((tokens, tokens), -torch.inf, dtype=F64).triu(1)

    def rope(y: Tensor) -> Tensor:
        half = d // 2
        turned = torch.cat([-y[..., half:], y[..., :half]], -1)
        return y * cos[:, None] + turned * sin[:, None]

    for i in range(c.layers):
        qkv = norm(x, c.rms_eps) @ whole(fold.qkv(i)).T
        if c.attention_bias:
            qkv = qkv + fold.qkv_bias(i)
        q, k, v = (part.view(tokens, -1, d) for part in qkv.split([c.q_rows, c.kv_rows, c.kv_rows], dim=-1))
        if c.qk_norm:
            q, k = norm(q, c.rms_eps) * fold.head_norm(i, "q"), norm(k, c.rms_eps) * fold.head_norm(i, "k")
        q, k = heads_hadamard(rope(q), d) / d**0.5, heads_hadamard(rope(k), d) / d**0.5
        k, v = (y.repeat_interleave(c.heads // c.kv_heads, dim=1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / d**0.5 + mask
        attended = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(tokens, -1)
        x = x + attended @ fold.output(i).T
        if c.output_bias:
            x = x + fold.output_bias(i)
        gate, up = (norm(x, c.rms_eps) @ whole(fold.gate_up(i)).T).chunk(2, -1)
        x = x + heads_hadamard(torch.nn.functional.silu(gate) * up, c.hadamard_block) @ fold.down(i).T
    return norm(x, c.rms_eps) @ whole(fold.head()).T


@pytest.mark.parametrize(("architecture", "head_dim"), [("llama", 64), ("qwen2", 64), ("qwen3", 64), ("qwen3", 128)])
def test_rotated_network_equals_the_original(
    architecture: str, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_folder(tmp_path, architecture, head_dim=head_dim).to(F64)
    norm_class = type(model.model.norm)
    monkeypatch.setattr(norm_class, "forward", lambda self, x: self.weight * norm(x, self.variance_epsilon))
    source = FolderSource(tmp_path)
    config = source.config(name="tiny", sha256=bytes(32), context=None)
    assert config.architecture == architecture and config.head_dim == head_dim
    torch.manual_seed(1)
    ids = torch.randint(0, VOCAB, (40,))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=F64), torch.arange(40)[None])
    eps = model.config.rms_norm_eps
    object.__setattr__(config, "rms_eps", eps)  # the artefact rounds it to binary32; not what this test is about
    found = rotated_forward(Folder(source, config, dtype=F64), config, ids, cos[0], sin[0])
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < 1e-9
    assert float(expected.abs().max()) > 0.1
