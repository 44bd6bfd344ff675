"""From a checkpoint to logits, against transformers in float64 on the checkpoint's own weights.

Every supported shape: llama, qwen2 and qwen3, heads of 64 and 128, several ratios of query to key heads, tied and
untied heads, with and without biases, every RoPE scaling. The checkpoint is written by transformers, built, loaded and
run; what differs then is the profile's int8 weights and activations, so logits agree within BOUND and not exactly.

The bound is worth something because each way to get a part wrong, even in one layer of two, costs much more (SEEN): the
last test breaks transformers' model in all these ways.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.weights import build, load
from weights.tinymodels import permute, write_folder

BOUND = 0.065  # relative error of a position's logits, mean over the positions; 0.026 to 0.055 found
SEEN = 0.1  # what the least of the mistakes costs at least; 0.121 found
TOKENS = 72
Kind = tuple[str, bool]  # architecture, attention_bias
KINDS: tuple[Kind, ...] = (("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("qwen3", True))
RATIOS = ((2, 2), (4, 2), (4, 1))
SCALINGS = (
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5},
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)


class Pair:
    """Our logits of some tokens, and transformers' model in float64."""

    def __init__(self, folder: Path, kind: Kind, *, head_dim: int, heads: int = 4, kv_heads: int = 2, **more: object):
        self.architecture, self.bias = kind
        changes = {"hidden_size": 160, "intermediate_size": 192, "head_dim": head_dim, **more}
        changes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        changes |= {"attention_bias": self.bias} if self.architecture != "qwen2" else {}
        model = write_folder(folder / "tiny", self.architecture, **changes)
        with torch.no_grad():  # so that a missing one is seen
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.mul_(12 if "q_proj" in name or "k_proj" in name else 5)
                if "q_norm" in name or "k_norm" in name:
                    parameter.copy_(1 + 3 * (parameter - 1))
        model.save_pretrained(folder / "tiny")
        build(folder / "tiny", folder / "out")
        ours = Model(load(folder / "out"))
        self.ids = torch.randint(0, ours.vocab, (1, TOKENS), generator=torch.Generator().manual_seed(2))
        chunk = Chunk(cache=ours.new_cache(TOKENS), start=0, tokens=self.ids[0].tolist(), logits=TOKENS)
        self.logits = ours.forward([chunk]).double()
        self.model = model.double().requires_grad_(False)

    def expected(self) -> Tensor:
        logits: Tensor = self.model(self.ids).logits[0]
        return logits

    def error(self) -> float:
        expected = self.expected()
        return float(((self.logits - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree(kind: Kind, head_dim: int, ratio: tuple[int, int], tied: bool, tmp_path: Path) -> None:
    heads, kv_heads = ratio
    pair = Pair(tmp_path, kind, head_dim=head_dim, heads=heads, kv_heads=kv_heads, tie_word_embeddings=tied)
    assert pair.error() < BOUND
    assert float(pair.expected().std()) > 0.3  # there is something to agree about


@pytest.mark.parametrize("rope", SCALINGS)
@pytest.mark.parametrize(("architecture", "head_dim"), [("llama", 64), ("qwen2", 128), ("qwen3", 128)])
def test_logits_agree_with_scaled_positions(
    architecture: str, head_dim: int, rope: dict[str, object], tmp_path: Path
) -> None:
    pair = Pair(tmp_path, (architecture, architecture == "qwen2"), head_dim=head_dim, rope_parameters=rope)
    assert pair.error() < BOUND
    frequencies = pair.model.model.rotary_emb.inv_freq
    frequencies.copy_(rope["rope_theta"] ** (-torch.arange(0, 1, 2 / head_dim, dtype=torch.float64)))
    assert pair.error() > SEEN  # without the scaling


def mutants(pair: Pair) -> dict[str, tuple[list[nn.Parameter], Callable[[], object]]]:
    """What to change in transformers' model for each mistake: the parameters, and how."""
    layer = pair.model.model.layers[1]
    attention, config = layer.self_attn, pair.model.config
    q, k, gate, up = attention.q_proj, attention.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj
    heads = {q: config.num_attention_heads, k: config.num_key_value_heads}

    def reordered() -> None:
        for projection, count in heads.items():
            projection.weight.copy_(torch.from_numpy(permute(projection.weight.numpy(), count)))

    def swapped() -> None:
        was = gate.weight.clone()
        gate.weight.copy_(up.weight)
        up.weight.copy_(was)

    def other_heads() -> None:
        k.weight.copy_(k.weight.view(heads[k], config.head_dim, -1).flip(0).reshape(k.weight.shape))

    found: dict[str, tuple[list[nn.Parameter], Callable[[], object]]] = {
        "RoPE on neighbours instead of halves": ([q.weight, k.weight], reordered),
        "gate and up swapped": ([gate.weight, up.weight], swapped),
        "key heads in another order": ([k.weight], other_heads),
    }
    gains = {
        "input norm": layer.input_layernorm,
        "MLP norm": layer.post_attention_layernorm,
        "final norm": pair.model.model.norm,
    }
    if pair.architecture == "qwen3":
        gains |= {"q norm": attention.q_norm, "k norm": attention.k_norm}
    found |= {
        f"no gain of the {name}": ([norm.weight], partial(norm.weight.fill_, 1.0)) for name, norm in gains.items()
    }
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        bias = getattr(attention, name).bias
        if bias is not None:
            found[f"no bias of {name}"] = ([bias], bias.zero_)
    return found


@pytest.mark.parametrize(("kind", "head_dim"), list(product(KINDS, (64, 128))))
def test_every_mistake_would_be_seen(kind: Kind, head_dim: int, tmp_path: Path) -> None:
    pair = Pair(tmp_path, kind, head_dim=head_dim)
    errors = {}
    for mistake, (parameters, change) in mutants(pair).items():
        before = [parameter.clone() for parameter in parameters]
        change()
        errors[mistake] = pair.error()
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    assert pair.error() < BOUND
    assert min(errors.values()) > SEEN, errors
    assert len(errors) == 6 + 2 * (kind[0] == "qwen3") + kind[1] * (3 + (kind[0] != "qwen2"))
