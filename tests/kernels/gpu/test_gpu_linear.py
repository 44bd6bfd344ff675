"""The GPU's linear layers against linear.reference and against integers summed in another way: equal, bit for bit.

Without a GPU, `_rows` and `_tiles` run in the interpreter at odd sizes. On Hopper the same cases run compiled, and
every tile of linear_hopper.py at sizes of real models.
"""

from __future__ import annotations

import pytest
import torch
from gpu_cases import CUDA, DEVICE
from kernel_cases import floats, int8s, scales
from torch import Tensor

from countermark_kernels import linear as cpu
from countermark_kernels.gpu import linear

HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def case(rows: int, outputs: int, inputs: int, *, bias: bool = False, residual: bool = False) -> Arguments:
    draw = torch.Generator(DEVICE).manual_seed(rows)
    return (
        torch.randint(-127, 128, (rows, inputs), generator=draw, dtype=torch.int8, device=DEVICE),
        scales(rows, seed=2).to(DEVICE),
        torch.randint(-127, 128, (outputs, inputs), generator=draw, dtype=torch.int8, device=DEVICE),
        scales(outputs, seed=4).to(DEVICE),
        floats(outputs, seed=5, scale=50.0).to(DEVICE) if bias else None,
        floats(rows, outputs, seed=6, scale=50.0).to(DEVICE) if residual else None,
    )


def expected(q: Tensor, s: Tensor, w: Tensor, ws: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """linear.reference on the CPU, its sums taken in binary64 where they would take int32 too long."""
    total = (q.to(torch.float64) @ w.to(torch.float64).T).to(torch.int32).cpu()
    extra = [None if x is None else x.cpu() for x in (bias, residual)]
    y = cpu._scale(total, s.cpu(), ws.cpu(), *extra)
    if q.numel() * w.shape[0] < 1 << 26:
        reference = cpu.reference(q.cpu(), s.cpu(), w.cpu(), ws.cpu(), bias=extra[0], residual=extra[1])
        assert torch.equal(y, reference)
    return y.to(q.device)


def poisoned(arguments: Arguments) -> Tensor:
    return torch.full((arguments[0].shape[0], arguments[2].shape[0]), float("nan"), device=DEVICE)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 4), (67, 96), (33, 260)])
@pytest.mark.parametrize("extras", [False, True])
def test_rows(rows: int, outputs: int, inputs: int, extras: bool) -> None:
    arguments = case(rows, outputs, inputs, bias=extras, residual=extras)
    y = poisoned(arguments)
    linear.rows(*arguments, y)
    assert torch.equal(y, expected(*arguments))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 1), (5, 70, 31), (17, 130, 513), (65, 64, 256)])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("split", [1, 2, 4])
def test_tiles(rows: int, outputs: int, inputs: int, extras: bool, split: int) -> None:
    arguments = case(rows, outputs, inputs, bias=extras, residual=extras)
    y = poisoned(arguments)
    for _ in range(2):  # a split leaves its counters as it found them
        linear.tiles(*arguments, y.fill_(float("nan")), split=split)
        assert torch.equal(y, expected(*arguments))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16, 17])
def test_product_takes_any_number_of_rows(rows: int) -> None:
    arguments = case(rows, 70, 36, bias=True, residual=True)
    assert torch.equal(linear.product(*arguments), expected(*arguments))


def test_one_of_the_extras() -> None:
    for extras in ({"bias": True}, {"residual": True}):
        for rows in (2, 5):
            arguments = case(rows, 9, 40, **extras)
            assert torch.equal(linear.product(*arguments), expected(*arguments))


@pytest.mark.parametrize("rows", [2, 5] + ([64, 300] if CUDA else []))
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)])
def test_the_largest_sums(rows: int, signs: tuple[int, int]) -> None:
    """K = 32768 of +-127: sums of 5.3e8, far beyond what binary32 holds."""
    q = torch.full((rows, cpu.K_MAX), 127 * signs[0], dtype=torch.int8, device=DEVICE)
    w = torch.full((3, cpu.K_MAX), 127 * signs[1], dtype=torch.int8, device=DEVICE)
    w[1, -1] = 1
    one = torch.ones(rows, device=DEVICE), torch.ones(3, device=DEVICE)
    y = linear.product(q, one[0], w, one[1])
    sums = [16129 * signs[0] * signs[1] * cpu.K_MAX] * 3
    sums[1] += 127 * signs[0] * (1 - 127 * signs[1])
    assert y.tolist() == [torch.tensor(sums).to(torch.float32).tolist()] * rows


def test_a_split_beyond_the_workspace_is_refused() -> None:
    arguments = case(1, 64 * 70, 8)
    with pytest.raises(ValueError, match="split"):
        linear.tiles(*arguments, poisoned(arguments), split=2)


@on_hopper
@pytest.mark.parametrize("rows", [17, 33, 64, 65, 128, 129, 300, 1500])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(576, 1536), (960, 576), (1152, 896), (4224, 256), (4241, 96), (4240, 4096), (9000, 4096)]
)
@pytest.mark.parametrize("residual", [False, True])
def test_every_tile_on_hopper(rows: int, outputs: int, inputs: int, residual: bool) -> None:
    from countermark_kernels.gpu import linear_hopper

    arguments = case(rows, outputs, inputs, bias=residual, residual=residual)
    want = expected(*arguments)
    y = poisoned(arguments)
    linear_hopper.tiles(*arguments, y)
    assert torch.equal(y, want)
    linear.tiles(*arguments, y.fill_(float("nan")))
    assert torch.equal(y, want)


@on_hopper
def test_the_hopper_cases_reach_every_tile() -> None:
    from countermark_kernels.gpu import linear_hopper as hopper

    shapes = [(m, n) for m in (17, 33, 64, 65, 128, 129, 300, 1500) for n in (576, 960, 1152, 4224, 4240, 9000)]
    assert {hopper.choose(m, n, 132) for m, n in shapes} == {
        *(hopper.FEW, hopper.FEW_TWICE, *hopper.UP_TO_128, *hopper.BEYOND, hopper.WIDE)
    }
    assert hopper.choose(1500, 9001, 132) is not hopper.WIDE


@on_hopper
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(6144, 4096), (4096, 12288), (24576, 4096), (49157, 576), (49157, 896), (151936, 4096)]
)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 32, 64, 128, 256, 1024])
def test_sizes_of_real_models(outputs: int, inputs: int, rows: int) -> None:
    if rows * outputs > 1 << 25:
        pytest.skip("too long on the CPU")
    arguments = case(rows, outputs, inputs, residual=outputs == 4096)
    want = expected(*arguments)
    assert torch.equal(linear.product(*arguments), want)
    if rows <= 16:
        for split in (1, 2):
            if outputs <= 4096:
                y = poisoned(arguments)
                linear.tiles(*arguments, y, split=split)
                assert torch.equal(y, want)


@on_hopper
def test_a_row_does_not_know_its_neighbours() -> None:
    """The same row, alone and in batches that take every kernel, at several places: the same bits."""
    arguments = case(700, 4096, 4096, residual=True)
    q, s, w, ws, _, residual = arguments
    assert residual is not None
    alone = linear.product(q[:1], s[:1], w, ws, None, residual[:1])
    for rows in (2, 4, 7, 16, 30, 64, 100, 256, 700):
        for place in {0, rows // 2, rows - 1}:
            batch = torch.arange(rows, device=DEVICE)
            batch[[0, place]] = batch[[place, 0]]
            y = linear.product(q[batch], s[batch], w, ws, None, residual[batch])
            assert torch.equal(y[place], alone[0])


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_chain_in_a_graph() -> None:
    """40 dependent layers, each started before the last is done, eagerly and in a graph, 20 times: the same bits."""
    for rows in (1, 2, 8, 40, 200):
        w = [cpu.prepare(int8s(1024, 1024, seed=i).to(DEVICE), scales(1024, seed=i).to(DEVICE)) for i in range(40)]
        q, s = int8s(rows, 1024, seed=77).to(DEVICE), scales(rows, seed=78).to(DEVICE)
        x = floats(rows, 1024, seed=79).to(DEVICE)

        def run(x: Tensor, q: Tensor = q, s: Tensor = s, w: list[cpu.Weight] = w) -> Tensor:
            for weight in w:
                x = cpu.linear(q, s, weight, residual=x)
            return x

        want = x.cpu()
        for weight in w:
            assert weight.rows is not None
            want = cpu.reference(q.cpu(), s.cpu(), weight.rows.cpu(), weight.scale.cpu(), residual=want)
        assert torch.equal(run(x).cpu(), want)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = run(x)
        for _ in range(20):
            y.zero_()
            graph.replay()
            assert torch.equal(y.cpu(), want)
