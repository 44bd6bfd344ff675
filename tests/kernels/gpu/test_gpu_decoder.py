"""A small decoder with every optional part, all of it in Triton: the CPU's logits, bit for bit, however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from gpu_cases import CUDA, DEVICE
from kernel_cases import TinyModel, floats, on
from torch import Tensor

from countermark_kernels import ieee
from countermark_kernels.attention import Span
from countermark_kernels.cache import KvCache, Pool, alone
from countermark_kernels.decoder import Decoder, Layer
from countermark_kernels.gpu import decoder as gpu_decoder
from countermark_kernels.gpu import flags, linear, norm
from countermark_kernels.linear import Weight

MODEL = TinyModel()
TOKENS = 90 if CUDA else 5
EMBEDDED = floats(TOKENS, MODEL.hidden, seed=7)
NEIGHBOUR = floats(3, MODEL.hidden, seed=8, scale=9.0)


def there(x: Tensor) -> Tensor:
    return x.to(DEVICE)


def on_device() -> Decoder:
    """The model with its tensors where the kernels run."""

    def weight(w: Tensor, ws: Tensor) -> Weight:
        return Weight(outputs=w.shape[0], inputs=w.shape[1], scale=there(ws), rows=there(w))

    vectors = {name: there(x) for name, x in MODEL.vectors.items()}
    layers = tuple(Layer(**{name: weight(*w) for name, w in layer.items()}, **vectors) for layer in MODEL.weights)
    host = MODEL.decoder()
    return replace(host, layers=layers, head=weight(*MODEL.head), cos=there(host.cos), sin=there(host.sin))


def logits(decoder: Decoder, x: Tensor) -> Tensor:
    q, s = norm.norm_quantise(x, decoder.eps)
    return linear.product(q, s, decoder.head.rows, decoder.head.scale)


def run(chunks: Sequence[int], *, neighbour: bool) -> Tensor:
    decoder = on_device()
    shape = {"layers": MODEL.layers, "kv_heads": MODEL.kv_heads, "head_dim": MODEL.head_dim}
    pool = Pool(**shape, blocks=8, device=DEVICE, triton=True)
    other, mine = KvCache(pool, (3, 5)), KvCache(pool, (7, 2))
    at, rows = 0, []
    for chunk in chunks:
        x = EMBEDDED[at : at + chunk]
        spans = [Span(cache=mine, start=0, end=chunk, position=at)]
        if neighbour:
            x = torch.cat((NEIGHBOUR, x))
            before = Span(cache=other, start=0, end=3, position=3 * len(rows))
            spans = [before, Span(cache=mine, start=3, end=3 + chunk, position=at)]
        y = gpu_decoder.forward(decoder, there(x), spans)
        rows.append(logits(decoder, y[-chunk:].contiguous()).cpu())
        at += chunk
    flags.raise_pending(DEVICE)
    return torch.cat(rows)


@pytest.fixture(scope="module")
def expected() -> Tensor:
    with on("torch"):
        decoder = MODEL.decoder()
        span = Span(cache=MODEL.cache(), start=0, end=TOKENS, position=0)
        return decoder.logits(decoder.forward(EMBEDDED, [span]))


@pytest.mark.parametrize(
    ("chunks", "neighbour"),
    [((TOKENS,), False), ((TOKENS - 2, 1, 1), True)],
    ids=["at once", "in chunks beside another"],
)
def test_same_logits_as_the_cpu(expected: Tensor, chunks: tuple[int, ...], neighbour: bool) -> None:
    assert torch.equal(run(chunks, neighbour=neighbour), expected)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_token_by_token_and_single_ops(expected: Tensor) -> None:
    assert torch.equal(run((1,) * TOKENS, neighbour=False), expected)
    decoder = on_device()
    shape = {"layers": MODEL.layers, "kv_heads": MODEL.kv_heads, "head_dim": MODEL.head_dim}
    spans = [Span(cache=alone(**shape, capacity=100, device=DEVICE), start=0, end=TOKENS, position=0)]
    positions = torch.arange(TOKENS, dtype=torch.int32, device=DEVICE)
    assert torch.equal(decoder.logits(decoder.stepwise(there(EMBEDDED), spans, positions)).cpu(), expected)
    assert torch.equal(decoder.logits(decoder.forward(there(EMBEDDED), spans)).cpu(), expected)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_an_overflow_on_the_way_is_reported() -> None:
    shape = {"layers": MODEL.layers, "kv_heads": MODEL.kv_heads, "head_dim": MODEL.head_dim}
    span = Span(cache=alone(**shape, capacity=8, device=DEVICE), start=0, end=3, position=0)
    on_device().forward(there(NEIGHBOUR * 2.0**64), [span])
    with pytest.raises(ieee.NumericsError) as caught:
        flags.raise_pending(DEVICE)
    assert caught.value.code == "numerics.range"
