"""Log probabilities against torch's in binary64, ties by the lower id, and what is out of range."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import floats

from countermark_kernels import ieee, logprobs


@pytest.mark.parametrize("vocab", [1, 2, 777, 151_936])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_close_to_log_softmax(vocab: int, scale: float) -> None:
    logits = floats(3, vocab, seed=vocab, scale=scale)
    want = torch.log_softmax(logits.double(), dim=-1)
    for found, row, expected in zip(logprobs.likely(logits, min(vocab, 20)), logits, want, strict=True):
        assert found.largest == float(row.max())
        for token, value in found.top:
            assert abs(value - float(expected[token])) < 1e-4
        least = int(row.argmin())  # a token of weight 0 may be as far away as it likes
        assert found.log_probability(float(row[least])) == pytest.approx(float(expected[least]), rel=1e-4, abs=1e-4)


def test_ties_go_to_the_lower_id() -> None:
    logits = ieee.rint(floats(4, 500, seed=3, scale=1.0))
    logits[0, 7:9] = torch.tensor([-0.0, 0.0])
    for found, row in zip(logprobs.likely(logits, 32), logits, strict=True):
        order = sorted(range(500), key=lambda i: (-float(row[i]), i))[:32]
        assert list(found.ids) == order
        assert list(found.logits) == [float(row[i]) for i in order]


def test_the_sum_is_the_samplers() -> None:
    """Two equal logits share everything; a third 24 doublings below has weight 1."""
    found = logprobs.likely(torch.tensor([[3.0, 3.0, 3.0 - 24.0 * 0.6931471824645996]]), 1)[0]
    assert found.total == (1 << 25) + 1
    assert found.ids == (0,)


@pytest.mark.parametrize("count", [0, 33, 6])
def test_counts_that_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count"):
        logprobs.likely(torch.zeros(1, 5), count)
