"""The forward pass against transformers in binary32 on the same weights, de-quantised.

What differs is activations in int8 instead of float, so logits agree closely but not exactly; a wrong head order, RoPE
convention, norm, bias or gate would not. The rotations before quantisation are orthogonal: those of queries and keys
cancel, the one before the down projection is undone here on its weights.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from tinymodel import TinyArtefact

from countermark_appliance.engine.model import Chunk, Model


def hadamard(n: int) -> torch.Tensor:
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h


def in_float(artefact: TinyArtefact) -> torch.nn.Module:
    c = artefact.config
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[c.architecture]
    shared = {
        "vocab_size": c.vocab, "hidden_size": c.hidden, "intermediate_size": c.intermediate,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_eps, "max_position_embeddings": c.context, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shared)).eval()
    for p in model.parameters():
        p.requires_grad_(False)

    def w(name: str) -> torch.Tensor:
        return artefact.tensor(name).float() * artefact.tensor(f"{name}.scale")[:, None]

    block = torch.block_diag(*[hadamard(c.hadamard_block)] * (c.intermediate // c.hadamard_block))
    model.model.embed_tokens.weight.copy_(artefact.tensor("embed"))
    model.lm_head.weight.copy_(w("head"))
    for i, layer in enumerate(model.model.layers):
        parts = (c.q_rows, c.kv_rows, c.kv_rows)
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        for projection, part in zip(projections, w(f"layers.{i}.qkv").split(parts), strict=True):
            projection.weight.copy_(part)
        if c.attention_bias:
            for projection, part in zip(projections, artefact.tensor(f"layers.{i}.qkv.bias").split(parts), strict=True):
                projection.bias.copy_(part)
        if c.qk_norm:
            layer.self_attn.q_norm.weight.copy_(artefact.tensor(f"layers.{i}.q_norm"))
            layer.self_attn.k_norm.weight.copy_(artefact.tensor(f"layers.{i}.k_norm"))
        layer.self_attn.o_proj.weight.copy_(w(f"layers.{i}.o"))
        gate, up = w(f"layers.{i}.gate_up").split(c.intermediate)
        layer.mlp.gate_proj.weight.copy_(gate)
        layer.mlp.up_proj.weight.copy_(up)
        layer.mlp.down_proj.weight.copy_(w(f"layers.{i}.down") @ block)
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_agree(architecture: str) -> None:
    artefact = TinyArtefact(architecture, layers=3)
    ids = torch.randint(0, artefact.config.vocab, (1, 120), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = in_float(artefact)(ids).logits[0]
    model = Model(artefact)
    logits = model.forward([Chunk(cache=model.new_cache(), start=0, tokens=ids[0].tolist(), logits=120)])
    error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) < 0.12
    assert float(error.mean()) < 0.05
    assert float(expected.std()) > 0.3  # there is something to agree about
