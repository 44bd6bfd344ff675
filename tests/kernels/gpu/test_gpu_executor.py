"""The executor of a GPU against the plain one, every bit; without a device in Triton's interpreter."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
from gpu_cases import CUDA, DEVICE
from kernel_cases import TinyModel
from torch import Tensor

from countermark_appliance.engine import graphs
from countermark_appliance.engine.model import Model
from countermark_appliance.engine.step import Part, Row
from countermark_kernels.cache import KvCache, Pool
from countermark_kernels.decoder import Decoder, Layer
from countermark_kernels.ieee import NumericsError
from countermark_kernels.linear import Weight
from executor_cases import PARAMS, Answer, answers, on_the_host, run, same

SHAPES = TinyModel()
EMBED = torch.randn(SHAPES.vocab, SHAPES.hidden, generator=torch.Generator().manual_seed(4))


@dataclass
class There:
    """What graphs.Loaded asks for, with its tensors where the kernels run."""

    device: torch.device
    vocab: int
    embed: Tensor
    decoder: Decoder
    pool: Pool


def there(blocks: int = 40) -> There:
    def weight(w: Tensor, ws: Tensor) -> Weight:
        return Weight(outputs=w.shape[0], inputs=w.shape[1], scale=ws.to(DEVICE), rows=w.to(DEVICE))

    vectors = {name: x.to(DEVICE) for name, x in SHAPES.vectors.items()}
    layers = tuple(Layer(**{name: weight(*w) for name, w in layer.items()}, **vectors) for layer in SHAPES.weights)
    host = SHAPES.decoder()
    stack = replace(host, layers=layers, head=weight(*SHAPES.head), cos=host.cos.to(DEVICE), sin=host.sin.to(DEVICE))
    shape = {"layers": SHAPES.layers, "kv_heads": SHAPES.kv_heads, "head_dim": SHAPES.head_dim}
    pool = Pool(**shape, blocks=blocks, device=DEVICE, triton=True)
    return There(DEVICE, SHAPES.vocab, EMBED.to(DEVICE), stack, pool)


class Host(Model):
    """The same tensors on the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.embed, self.decoder = EMBED, SHAPES.decoder()
        shape = {"layers": SHAPES.layers, "kv_heads": SHAPES.kv_heads, "head_dim": SHAPES.head_dim}
        self._pool = (Pool(**shape, blocks=40), None)  # type: ignore[assignment]

    @property
    def vocab(self) -> int:
        return SHAPES.vocab

    @property
    def context(self) -> int:
        return SHAPES.context


@pytest.fixture(scope="module")
def model() -> There:
    return there()


def started(model: There, seen: list[Tensor]) -> graphs.GraphExecutor:
    def observe(_: object, logits: Tensor) -> None:
        seen.append(logits.clone())

    return graphs.GraphExecutor(model, max_rows=16, observe=observe, warm=CUDA)


def test_the_same_answers_as_the_plain_executor(model: There) -> None:
    """Ragged steps, padded steps, scattered blocks, carried tokens, penalties, biases, log probabilities."""
    asked = answers(13 if CUDA else 4, SHAPES.vocab, longest=90 if CUDA else 4, length=30 if CUDA else 3)
    for i, answer in enumerate(asked[:4]):
        answer.params, answer.length = PARAMS[(1, 3, 4, 2)[i]], answer.length + (i < 2)
        answer.masked = i in (1, 2)
    want, got = deepcopy(asked), asked
    on_the_host(Host(), want)
    seen: list[Tensor] = []
    run(started(model, seen), model.pool, got, seen, vocab=SHAPES.vocab)
    for one, other in zip(got, want, strict=True):
        same(one, other)


def test_each_step_has_its_own_error(model: There) -> None:
    """A step that fails says so, one after it does not; two executors on one device do not share a word."""
    bad = replace_embedding(model, row=9, value=float("inf"))
    one, other = started(bad, []), started(model, [])
    params = PARAMS[0]

    def part(pool: Pool, token: int) -> Part:
        row = Row(params=params, tokens=[token], prompt=1, length=1)
        return Part(cache=KvCache(pool, [3 + token]), start=0, tokens=[token], row=row)

    tickets = [one.start([part(bad.pool, 9)]), other.start([part(model.pool, 9)]), one.start([part(bad.pool, 2)])]
    fine = tickets[2].wait()
    with pytest.raises(NumericsError) as caught:
        tickets[0].wait()
    assert caught.value.code == "numerics.not_finite"
    tickets[1].wait()
    assert other.start([part(model.pool, 2)]).wait() == fine


def replace_embedding(model: There, *, row: int, value: float) -> There:
    embed = model.embed.clone()
    embed[row] = value
    return replace(model, embed=embed)


def test_what_is_refused(model: There) -> None:
    executor = started(model, [])
    row = Row(params=PARAMS[0], tokens=[1], prompt=1, length=1)
    for wrong in (
        {"tokens": [SHAPES.vocab]},
        {"tokens": [], "carried": 0},
        {"tokens": [1], "cache": KvCache(model.pool, [])},
        {"tokens": [1], "cache": KvCache(model.pool, [40])},
        {"tokens": [1], "cache": KvCache(there(4).pool, [1])},
    ):
        with pytest.raises(ValueError, match="expected"):
            executor.start([Part(**{"cache": KvCache(model.pool, [1]), "start": 0, "row": row} | wrong)])  # type: ignore[arg-type]
    biased = replace(PARAMS[0], logit_bias={SHAPES.vocab: 1.0})
    with pytest.raises(ValueError, match="ids"):
        executor.start([Part(cache=KvCache(model.pool, [1]), start=0, tokens=[1], row=replace(row, params=biased))])


def test_no_memory(model: There, monkeypatch: pytest.MonkeyPatch) -> None:
    """`MemoryError`, and the next step is as if nothing had been."""
    executor = started(model, [])
    answer = Answer(params=PARAMS[6], prompt=[4], length=2)
    row = Row(params=answer.params, tokens=[4], prompt=1, length=1, key="one")
    part = Part(cache=KvCache(model.pool, [1]), start=0, tokens=[4], row=row)
    (want,) = executor.start([part]).wait()
    with monkeypatch.context() as patch:
        patch.setattr(graphs.sampler, "_choose", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        with pytest.raises(MemoryError):
            executor.start([part])
    assert executor.start([part]).wait() == [want]


def test_sizes_of_graphs() -> None:
    """Every number of splits fits its graph, with little to spare where they are many."""
    for rows in graphs.ROWS:
        assert graphs._items(rows, rows) == rows
        for count in range(rows + 1, 3000):
            size = graphs._items(count, rows)
            assert size >= count
            assert size != rows
            assert size <= max(8, 2 * count) if count < 64 else size * 2 <= 3 * count + 2
