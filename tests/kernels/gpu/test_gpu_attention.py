"""Attention and its paged cache in Triton: every bit of the CPU's for any batch, cut and cache; errors by flags."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gpu_cases import CUDA, DEVICE, fused
from torch import Tensor

from countermark_kernels import attention, ieee
from countermark_kernels.attention import Span, attend
from countermark_kernels.cache import BLOCK, KvCache, Pool, alone
from countermark_kernels.gpu import attention as gpu_attention
from countermark_kernels.gpu import batch as tiles
from countermark_kernels.gpu import flags
from countermark_kernels.gpu.cache import value_order
from countermark_kernels.rope import Heads

LAYERS, LAYER = 2, 1
SHAPES = ((4, 2, 128), (3, 1, 64)) if not CUDA else ((32, 8, 128), (9, 3, 64), (14, 2, 64), (8, 8, 128), (40, 8, 128))
# (position, tokens) of each span of a batch
BATCHES = {
    "one token": ((0, 1),),
    "prompt": ((0, 70),),
    "prompt of a block": ((0, BLOCK),),
    "chunk up to a block": ((BLOCK - 30, 30),),
    "chunk past a block": ((BLOCK - 1, 20),),
    "decode": ((BLOCK - 1, 1), (BLOCK, 1), (2 * BLOCK + 5, 1)),
    "a split each": ((100, 1), (64, 2), (127, 1)),
    "mixture": ((130, 1), (0, 33), (0, 1), (64, 3), (5, 2), (63, 40)),
}
if CUDA:
    BATCHES |= {
        "long prompt": ((0, 1111),),
        "late chunk": ((3000, 200), (4095, 1), (4096, 2)),
        "long decode": ((9000, 1), (511, 1), (512, 1), (1023, 1), (20000, 1)),
    }
KINDS = ("random", "equal", "zeros", "sink", "scales", "faint", "negative", "sharp")


def tokens(count: int, heads: int, kv_heads: int, d: int, kind: str, seed: int) -> Heads:
    """Rows as RoPE would leave them: random, or at the edges that `kind` names."""
    g = torch.Generator().manual_seed(seed)

    def integers(n: int) -> Tensor:
        return torch.randint(-127, 128, (count, n, d), generator=g, dtype=torch.int8)

    def scales(n: int, low: float, high: float) -> Tensor:
        return torch.exp2(torch.rand(count, n, generator=g) * (high - low) + low)

    q, k, v = integers(heads), integers(kv_heads), integers(kv_heads)
    s_q, s_k, s_v = scales(heads, -3, 0), scales(kv_heads, -3, 0), scales(kv_heads, -6, -3)
    if kind == "equal":
        k[:], s_k[:], s_v[:] = k[:1].clone(), s_k[:1].clone(), 2.0**-4
    elif kind == "zeros":
        for x, s in ((q, s_q), (k, s_k), (v, s_v)):
            dead = torch.rand(s.shape, generator=g) < 0.4
            x[dead], s[dead] = 0, 0.0
    elif kind == "sink":
        q[:, :, 0] = 127
        k[::50], k[::50, :, 0], s_k[::50], s_v[::50] = 0, 127, 2.0**6, 2.0**-30
    elif kind == "scales":
        s_q, s_k, s_v = scales(heads, -60, 2), scales(kv_heads, -40, 2), scales(kv_heads, -100, 23.9)
    elif kind == "negative":  # no score above zero
        q[:], k[:] = q.abs(), -k.abs()
    elif kind == "sharp":  # most weights are zero
        s_q = scales(heads, 2, 5)
    elif kind == "faint":  # scores under 2^-126: the least integer above one is 1
        s_q[:], s_k[:], s_v = 2.0**-70, 2.0**-65, scales(kv_heads, -1, 0)
    return Heads(q=q, s_q=s_q, k=k, s_k=s_k, v=v, s_v=s_v)


def rows(heads: Heads, start: int, end: int) -> Heads:
    return Heads(**{name: getattr(heads, name)[start:end] for name in ("q", "s_q", "k", "s_k", "v", "s_v")})


def on_device(heads: Heads) -> Heads:
    return Heads(**{name: getattr(heads, name).to(DEVICE) for name in ("q", "s_q", "k", "s_k", "v", "s_v")})


def crowded(blocks: int, kv_heads: int, d: int) -> Pool:
    """A pool whose blocks hold what other sequences left."""
    pool = Pool(layers=LAYERS, kv_heads=kv_heads, head_dim=d, blocks=blocks, device=DEVICE, triton=True)
    g = torch.Generator().manual_seed(blocks)
    for x in (pool.k, pool.v):
        x.copy_(torch.randint(-127, 128, x.shape, generator=g, dtype=torch.int8))
    for s in (pool.s_k, pool.s_v):
        s.copy_(torch.rand(s.shape, generator=g) * 2.0**23.5)
    return pool


def batch(
    spans: tuple[tuple[int, int], ...], heads: int, kv_heads: int, d: int, kind: str
) -> tuple[Heads, list[Span], list[Span]]:
    """Queries of a batch whose caches hold their contexts, on the CPU and in a pool."""
    needs = [(position + count + BLOCK - 1) // BLOCK for position, count in spans]
    pool = crowded(sum(needs) + 3, kv_heads, d)
    free = torch.randperm(pool.blocks, generator=torch.Generator().manual_seed(pool.blocks)).tolist()
    parts: list[Heads] = []
    cpu: list[Span] = []
    gpu: list[Span] = []
    start = 0
    for seed, (position, count) in enumerate(spans):
        all_tokens = tokens(position + count, heads, kv_heads, d, kind, seed)
        cache = alone(layers=LAYERS, kv_heads=kv_heads, head_dim=d, capacity=position + count)
        cache.append(LAYER, all_tokens, 0, position + count, 0)
        paged = KvCache(pool, [free.pop() for _ in range(needs[seed])])
        paged.append(LAYER, on_device(all_tokens), 0, position, 0)
        paged.append(LAYER, on_device(all_tokens), position, position + count, position)
        parts.append(rows(all_tokens, position, position + count))
        cpu.append(Span(cache=cache, start=start, end=start + count, position=position))
        gpu.append(Span(cache=paged, start=start, end=start + count, position=position))
        start += count
    names = ("q", "s_q", "k", "s_k", "v", "s_v")
    return Heads(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names}), cpu, gpu


def run(queries: Heads, spans: list[Span], heads: int) -> Tensor:
    device = on_device(queries)
    plan = gpu_attention.plan(spans, heads)
    first = gpu_attention.attend(device.q, device.s_q, plan, layer=LAYER)
    again = gpu_attention.attend(device.q, device.s_q, plan, layer=LAYER)
    flags.raise_pending(DEVICE)
    assert torch.equal(first, again)
    return first.cpu()


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), SHAPES)
def test_every_batch(heads: int, kv_heads: int, d: int, name: str) -> None:
    queries, cpu, gpu = batch(BATCHES[name], heads, kv_heads, d, "random")
    assert torch.equal(run(queries, gpu, heads), attend(queries.q, queries.s_q, cpu, layer=LAYER))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_value(kind: str) -> None:
    heads, kv_heads, d = SHAPES[0]
    queries, cpu, gpu = batch(((0, 90), (100, 1), (64, 2)), heads, kv_heads, d, kind)
    got = run(queries, gpu, heads)
    assert torch.equal(got, attend(queries.q, queries.s_q, cpu, layer=LAYER))
    span, cache = cpu[0], cpu[0].cache
    group = heads // kv_heads
    s_k, s_v = cache.scales(LAYER, 0, span.end)
    expected = attention.reference(
        queries.q[: span.end, :group].reshape(-1, d),
        queries.s_q[: span.end, :group].reshape(-1),
        torch.arange(span.end).repeat_interleave(group),
        k=cache.keys(LAYER, 0, span.end),
        s_k=s_k,
        v=cache.values(LAYER, 0, span.end),
        s_v=s_v,
    )
    assert torch.equal(got[: span.end, : group * d].reshape(-1, d), expected)


def test_chunks_and_steps_are_the_prompt() -> None:
    """A row's bits do not depend on the kernel, the chunk or the batch it is computed in."""
    heads, kv_heads, d = SHAPES[0]
    queries, _, gpu = batch(((0, 75),), heads, kv_heads, d, "random")
    whole = run(queries, gpu, heads)
    for start, end in ((0, 1), (0, 40), (63, 64), (64, 75), (74, 75)):
        span = Span(cache=gpu[0].cache, start=0, end=end - start, position=start)
        assert torch.equal(run(rows(queries, start, end), [span], heads), whole[start:end])


@pytest.mark.parametrize("chunk", [64, 256, 512])
def test_splits_are_free(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CHUNK_MAX", chunk)
    monkeypatch.setattr(tiles, "TARGET", 0)
    heads, kv_heads, d = SHAPES[0]
    queries, cpu, gpu = batch(((600, 1), (3, 1)), heads, kv_heads, d, "random")
    assert torch.equal(run(queries, gpu, heads), attend(queries.q, queries.s_q, cpu, layer=LAYER))


@pytest.mark.skipif(not CUDA, reason="CPU only: the portable prefill kernel has no other to agree with")
def test_portable_kernel_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, kv_heads, d = SHAPES[0]
    queries, _, gpu = batch(((0, 300), (1000, 77)), heads, kv_heads, d, "random")
    fast = run(queries, gpu, heads)
    for module in (tiles, gpu_attention):
        monkeypatch.setattr(module, "hopper", lambda device: False)
    assert torch.equal(run(queries, gpu, heads), fast)


def test_a_score_out_of_range_is_reported() -> None:
    heads, kv_heads, d = SHAPES[0]
    for count in (1, 40):
        queries, _, gpu = batch(((30, count),), heads, kv_heads, d, "random")
        queries.s_q[0, 0] = 2.0**23
        with pytest.raises(ieee.NumericsError) as caught:
            run(queries, gpu, heads)
        assert caught.value.code == "numerics.range"
        flags.raise_pending(DEVICE)


def test_more_heads_than_a_tile_has_rows_are_refused() -> None:
    for heads in (tiles.ROWS, tiles.HOPPER_ROWS + 1):
        queries, cpu, gpu = batch(((0, 3), (5, 1)), heads, 1, 64, "random")
        if heads == tiles.ROWS:
            assert torch.equal(run(queries, gpu, heads), attend(queries.q, queries.s_q, cpu, layer=LAYER))
        else:
            with pytest.raises(ValueError, match="heads"):
                gpu_attention.plan(gpu, heads)


def test_a_shared_prefix_goes_on_alike() -> None:
    """Two sequences that share their first block, and a table in another order than the pool's."""
    heads, kv_heads, d = SHAPES[0]
    queries, _, gpu = batch(((0, 80),), heads, kv_heads, d, "random")
    source = gpu[0].cache
    spare = next(number for number in range(source.pool.blocks) if number not in source.blocks)
    other = KvCache(source.pool, [source.blocks[0], spare])
    other.append(LAYER, on_device(queries), BLOCK, 80, BLOCK)
    spans = [Span(cache=cache, start=0, end=5, position=65) for cache in (source, other)]
    assert torch.equal(*(run(rows(queries, 65, 70), [span], heads) for span in spans))


def test_a_pool_on_a_device() -> None:
    shape = {"layers": 2, "kv_heads": 3, "head_dim": 64}
    cache = alone(**shape, capacity=65, device=DEVICE, triton=True)
    assert (cache.blocks, cache.capacity, cache.pool.blocks) == ([1, 2], 2 * BLOCK, 3)
    pool = cache.pool
    assert pool.size_bytes == sum(x.numel() * x.element_size() for x in (pool.k, pool.v, pool.s_k, pool.s_v))
    made = tokens(70, 3, 3, 64, "random", 1)
    cache.append(1, on_device(made), 0, 70, 0)
    for head in range(3):
        assert torch.equal(cache.keys(1, head, 70).cpu(), made.k[:, head])
        assert torch.equal(cache.values(1, head, 70).cpu(), made.v[:, head])
        s_k, s_v = cache.scales(1, head, 70)
        assert torch.equal(s_k.cpu(), made.s_k[:, head])
        assert torch.equal(s_v.cpu(), made.s_v[:, head])
    with pytest.raises(ValueError, match="layout"):
        gpu_attention.plan([Span(cache=alone(**shape, capacity=1), start=0, end=1, position=0)], 3)


def test_value_slot_is_a_permutation_within_sixteen() -> None:
    order = value_order()
    assert sorted(order) == list(range(BLOCK))
    assert all(a // 16 == b // 16 for a, b in zip(order, range(BLOCK), strict=True))
    for w, t, b in itertools.product(range(2), range(4), range(2)):
        assert order[8 * w + 2 * t + b] == 4 * t + 2 * w + b


def test_quotients_that_share_a_reciprocal() -> None:
    """attention_hopper's `_quotient`, step for step, is the quotient, at fractions of nearly 1 and 2 too."""
    draw = np.random.default_rng(3)
    count = 1 << 18
    fractions = [
        draw.integers(0, 1 << 23, count),
        draw.integers(0, 64, count),
        (1 << 23) - 1 - draw.integers(0, 64, count),
    ]
    for top, bottom in itertools.product(fractions, fractions):
        a = np.ldexp((top | 1 << 23).astype(np.float32), draw.integers(-1, 38, count))
        a[::2] *= -1
        b = np.ldexp((bottom | 1 << 23).astype(np.float32), draw.integers(-29, 74, count))
        y = np.float32(1) / b
        q = a * y
        for _ in range(2):
            q = fused(fused(-q, b, a), y, q)
        assert (q == a / b).all()
