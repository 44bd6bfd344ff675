"""The bfloat16 peer computes the model it says: in binary32 its greedy tokens are those of transformers' Qwen3."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bf16path import EPS, THETA, Bf16Executor, Weights
from countermark_appliance.engine.step import Part, Row
from countermark_kernels.sampler import SamplerParams
from generated import TINY

GREEDY = SamplerParams(temperature=0.0)
PROMPTS = ([3, 500, 17, 17, 999, 4, 42], [77], list(range(100, 190)))
TOKENS = 12


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(TINY, torch.device("cpu"), compiled=False, dtype=torch.float32)


def generated(weights: Weights, prompts: Sequence[list[int]], *, piece: int, params: SamplerParams) -> list[list[int]]:
    """The answers, each prompt in pieces and all decoding together, drawn tokens carried from step to step."""
    executor = Bf16Executor(weights, slots=len(prompts), tokens=256, params=params)
    caches = [cast(Any, SimpleNamespace()) for _ in prompts]
    drawn: list[list[int]] = []
    for cache, prompt in zip(caches, prompts, strict=True):
        for at in range(0, len(prompt), piece):
            part = Part(cache=cache, start=at, tokens=prompt[at : at + piece], row=row(prompt, at + piece))
            found = executor.start([part]).wait()
        drawn.append([found[0].token])
    tickets = []
    for step in range(TOKENS - 1):
        parts = [
            Part(
                cache=cache,
                start=len(prompt) + step,
                tokens=answer if not step else [],
                carried=index if step else None,
                row=row(prompt, len(prompt)),
            )
            for index, (cache, prompt, answer) in enumerate(zip(caches, prompts, drawn, strict=True))
        ]
        tickets.append(executor.start(parts))  # the ids of a step are not looked at before the next one starts
    for ticket in tickets:
        for answer, one in zip(drawn, ticket.wait(), strict=True):
            answer.append(one.token)
    executor.close()
    return drawn


def row(prompt: list[int], known: int) -> Row | None:
    if known < len(prompt):
        return None
    return Row(params=GREEDY, tokens=prompt, prompt=len(prompt), length=len(prompt))


def expected(weights: Weights) -> list[list[int]]:
    import transformers

    s = weights.shape
    config = transformers.Qwen3Config(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim, rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, tie_word_embeddings=False,
        max_position_embeddings=s.context,
    )  # fmt: skip
    model: Any = transformers.Qwen3ForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": weights.embed, "model.norm.weight": weights.last_gain}
    state["lm_head.weight"] = weights.head
    for i, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.split([n * s.head_dim for n in (s.heads, s.kv_heads, s.kv_heads)])
        gate, up = layer.gate_up.chunk(2)
        named = {
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.o,
            "self_attn.q_norm": layer.q_gain, "self_attn.k_norm": layer.k_gain,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": layer.down,
            "input_layernorm": layer.first, "post_attention_layernorm": layer.second,
        }  # fmt: skip
        state |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in named.items()}
    model.load_state_dict(state)
    answers = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            answers.append(ids[len(prompt) :])
    return answers


def test_greedy_tokens_are_those_of_transformers(weights: Weights) -> None:
    answers = expected(weights)
    assert (
        len({token for answer in answers for token in answer}) > TOKENS
    )  # no constant answer, which anybody gets right
    assert generated(weights, PROMPTS, piece=1000, params=GREEDY) == answers
    assert generated(weights, PROMPTS, piece=32, params=GREEDY) == answers


def test_sampling_stays_within_top_p(weights: Weights) -> None:
    narrow = SamplerParams(temperature=1.0, top_p_20bit=1)
    assert generated(weights, PROMPTS, piece=1000, params=narrow) == expected(weights)
    wide = SamplerParams(temperature=8.0)
    assert generated(weights, PROMPTS, piece=1000, params=wide) != expected(weights)


def test_too_many_sequences_are_refused(weights: Weights) -> None:
    executor = Bf16Executor(weights, slots=1, tokens=64, params=GREEDY)
    with pytest.raises(MemoryError):
        executor.start([Part(cache=cast(Any, SimpleNamespace()), start=5, tokens=[1], row=row([1], 1))])
