"""Blocks of keys and values: no bit depends on which blocks a sequence has, and no table reaches outside the pool.

Every case runs on the torch path and on each instruction set, against the torch path with a table in order. The Triton
layout is in gpu/test_gpu_attention.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from kernel_cases import BACKENDS, TinyModel, floats, int8s, on, scales
from torch import Tensor

from countermark_kernels import attention, ieee, rope
from countermark_kernels.attention import Span
from countermark_kernels.cache import BLOCK, KvCache, Pool, alone

TOKENS = 4 * BLOCK - 11


class Longer(TinyModel):
    context = 4 * BLOCK


MODEL = Longer()
SHAPE = {"layers": MODEL.layers, "kv_heads": MODEL.kv_heads, "head_dim": MODEL.head_dim}
EMBEDDED = floats(TOKENS, MODEL.hidden, seed=3)
backends = pytest.mark.parametrize("backend", BACKENDS)


def run(
    cache: KvCache, embedded: Tensor, *, start: int = 0, cuts: Sequence[int] = (), stepwise: bool = False
) -> Tensor:
    """The residuals of `embedded` as the tokens from `start` on, in pieces."""
    decoder, rows = MODEL.decoder(), []
    for first, end in zip((0, *cuts), (*cuts, embedded.shape[0]), strict=True):
        spans = [Span(cache=cache, start=0, end=end - first, position=start + first)]
        positions = torch.arange(start + first, start + end, dtype=torch.int32)
        piece = embedded[first:end].contiguous()
        rows.append(decoder.stepwise(piece, spans, positions) if stepwise else decoder.forward(piece, spans))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    with on("torch"):
        return run(alone(**SHAPE, capacity=TOKENS), EMBEDDED)


def spoilt(pool: Pool) -> Pool:
    """A pool full of what other sequences, or nobody, left."""
    pool.k.copy_(int8s(*pool.k.shape, seed=1))
    pool.v.fill_(-128)
    pool.s_k.fill_(torch.nan)
    pool.s_v.fill_(torch.inf)
    return pool


@backends
@pytest.mark.parametrize("stepwise", [False, True])
def test_a_permuted_table_gives_the_same_bits(expected: Tensor, backend: str, stepwise: bool) -> None:
    rng = random.Random(backend)
    with on(backend):
        for cuts in ((), (1, 63, 64, 65, 190)):
            table = rng.sample(range(9), 4)
            cache = KvCache(Pool(**SHAPE, blocks=9), table)
            assert torch.equal(run(cache, EMBEDDED, cuts=cuts, stepwise=stepwise), expected), table


@backends
def test_garbage_changes_nothing(expected: Tensor, backend: str) -> None:
    """In the blocks of others and in one's own blocks behind the last token, scales that are no numbers included."""
    with on(backend):
        cache = KvCache(spoilt(Pool(**SHAPE, blocks=6)), (4, 1, 5, 2))
        assert torch.equal(run(cache, EMBEDDED, cuts=(1, 60, 130)), expected)


@backends
def test_a_table_grows_where_it_must(expected: Tensor, backend: str) -> None:
    with on(backend):
        cache, rows = KvCache(spoilt(Pool(**SHAPE, blocks=6))), []
        for start, number in zip(range(0, TOKENS, BLOCK), (2, 5, 1, 4), strict=True):
            cache.blocks.append(number)
            rows.append(run(cache, EMBEDDED[start : start + BLOCK], start=start))
        assert torch.equal(torch.cat(rows), expected)


@backends
def test_a_shared_prefix_gives_the_same_bits(expected: Tensor, backend: str) -> None:
    """Two sequences go on from two blocks that a third computed, each its own way, together in one batch."""
    shared, tail = 2 * BLOCK, TOKENS - 2 * BLOCK
    other = floats(tail, MODEL.hidden, seed=4)
    with on(backend):
        pool = Pool(**SHAPE, blocks=8)
        first, second = KvCache(pool, (3, 6, 7, 2)), KvCache(pool, (3, 6, 4, 1))
        run(KvCache(pool, (3, 6)), EMBEDDED[:shared])
        spans = [
            Span(cache=first, start=0, end=tail, position=shared),
            Span(cache=second, start=tail, end=2 * tail, position=shared),
        ]
        both = MODEL.decoder().forward(torch.cat((EMBEDDED[shared:], other)), spans)
        unshared = run(alone(**SHAPE, capacity=TOKENS), torch.cat((EMBEDDED[:shared], other)))
    assert torch.equal(both[:tail], expected[shared:])
    assert torch.equal(both[tail:], unshared[shared:])


@backends
def test_what_was_written_is_read(backend: str) -> None:
    made = some_heads(100)
    with on(backend):
        cache = KvCache(spoilt(Pool(layers=2, kv_heads=3, head_dim=128, blocks=5)), (4, 2))
        cache.append(1, made, 0, 70, 0)
        cache.append(1, made, 70, 100, 70)
    for head in range(3):
        assert torch.equal(cache.keys(1, head, 100), made.k[:, head])
        assert torch.equal(cache.values(1, head, 100), made.v[:, head])
        s_k, s_v = cache.scales(1, head, 100)
        assert torch.equal(s_k, made.s_k[:, head]) and torch.equal(s_v, made.s_v[:, head])
    untouched = cache.pool.layer(0)[1]
    assert untouched.isnan().all() and cache.pool.layer(1)[1][[0, 1, 3]].isnan().all()


def some_heads(tokens: int) -> rope.Heads:
    return rope.Heads(
        q=int8s(tokens, 3, 128, seed=1),
        s_q=scales(tokens, 3, seed=2),
        k=int8s(tokens, 3, 128, seed=3),
        s_k=scales(tokens, 3, seed=4),
        v=int8s(tokens, 3, 128, seed=5),
        s_v=scales(tokens, 3, seed=6),
    )


@backends
@pytest.mark.parametrize(
    ("table", "position", "message"),
    [
        ((1,), 60, "tokens within the 64"),
        ((), 0, "tokens within the 0"),
        ((1, 2), 128, "tokens within the 128"),
        ((1, 5), 60, "numbers in 0..4, got 1..5"),
        ((-1, 2), 60, "numbers in 0..4, got -1..2"),
        ((1 << 40, 2), 3, "numbers in 0..4"),
        ((1, 2), -1, "got -1..9"),
    ],
)
def test_a_table_that_does_not_hold_the_tokens_is_refused(
    backend: str, table: tuple[int, ...], position: int, message: str
) -> None:
    made = some_heads(10)
    with on(backend):
        cache = KvCache(Pool(layers=1, kv_heads=3, head_dim=128, blocks=5), table)
        span = Span(cache=cache, start=0, end=10, position=position)
        with pytest.raises(ValueError, match=message):
            attention.attend(made.q, made.s_q, [span], layer=0)
        with pytest.raises(ValueError, match="expected"):
            cache.append(0, made, 0, 10, position)
        assert not cache.pool.k.any()
        decoder = MODEL.decoder()
        small = Span(cache=KvCache(Pool(**SHAPE, blocks=5), table), start=0, end=10, position=position)
        with pytest.raises(ValueError, match=message):
            decoder.forward(EMBEDDED[:10].contiguous(), [small])


@backends
def test_a_number_behind_the_tokens_is_not_looked_at(backend: str) -> None:
    """The owner may have appended blocks of which no token is used yet."""
    made = some_heads(10)
    with on(backend):
        pool = Pool(layers=1, kv_heads=3, head_dim=128, blocks=5)
        found = []
        for table in ((3,), (3, 99)):
            cache = KvCache(pool, table)
            cache.append(0, made, 0, 10, 0)
            found.append(attention.attend(made.q, made.s_q, [Span(cache=cache, start=0, end=10, position=0)], layer=0))
        assert torch.equal(*found)


def test_wrong_layers_and_layouts_are_refused() -> None:
    made = some_heads(10)
    cache = alone(layers=1, kv_heads=3, head_dim=128, capacity=10)
    span = Span(cache=cache, start=0, end=10, position=0)
    for layer in (-1, 1):
        with pytest.raises(ValueError, match="layer"):
            cache.append(layer, made, 0, 10, 0)
        with pytest.raises(ValueError, match="layer"):
            attention.attend(made.q, made.s_q, [span], layer=layer)
    for wrong in ({"layers": 0}, {"kv_heads": 0}, {"head_dim": 96}, {"blocks": 0}):
        with pytest.raises(ValueError, match="expected"):
            Pool(**({"layers": 1, "kv_heads": 1, "head_dim": 64, "blocks": 1} | wrong))


@pytest.mark.skipif(BACKENDS == ("torch",), reason="needs the native library")
def test_a_cache_for_triton_is_refused_on_a_cpu() -> None:
    made = some_heads(10)
    cache = alone(layers=1, kv_heads=3, head_dim=128, capacity=10, triton=True)
    with pytest.raises(ValueError, match="Triton"):
        attention.attend(made.q, made.s_q, [Span(cache=cache, start=0, end=10, position=0)], layer=0)


def test_context_limit() -> None:
    """A block may stand in a table twice, so that this needs no memory."""
    cache = KvCache(Pool(layers=1, kv_heads=1, head_dim=64, blocks=1), [0] * (attention.CONTEXT_MAX // BLOCK + 1))
    span = Span(cache=cache, start=0, end=1, position=attention.CONTEXT_MAX)
    with pytest.raises(ieee.NumericsError) as caught:
        attention.attend(int8s(1, 1, 64, seed=1), scales(1, 1, seed=2), [span], layer=0)
    assert caught.value.code == "numerics.context"


def test_sizes() -> None:
    pool = Pool(layers=2, kv_heads=3, head_dim=64, blocks=7)
    assert pool.size_bytes == sum(x.numel() * x.element_size() for x in (pool.k, pool.v, pool.s_k, pool.s_v))
    assert pool.size_bytes == 7 * Pool.block_bytes(layers=2, kv_heads=3, head_dim=64)
    cache = alone(layers=2, kv_heads=3, head_dim=64, capacity=65)
    assert (cache.blocks, cache.capacity, cache.pool.blocks) == ([1, 2], 2 * BLOCK, 3)
    with pytest.raises(MemoryError):
        Pool(layers=2, kv_heads=3, head_dim=64, blocks=1 << 50)
