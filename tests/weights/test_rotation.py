"""The rotation against its dense definition, Philox against Random123's published vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from countermark_appliance.engine.weights.config import rotation_for
from countermark_appliance.engine.weights.rotation import hadamard_, philox4x32, rotate_, signs


# Random123 1.09, tests/kat_vectors, lines "philox4x32 10"
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    assert philox4x32((c0, c1, c2, c3), (k0, k1)) == tuple(int(word, 16) for word in expected.split())


def dense(width: int) -> np.ndarray:
    """R as a matrix, built by Kronecker products."""
    rotation = rotation_for(width)
    h = np.ones((1, 1))
    while h.shape[0] < rotation.power:
        h = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), h)
    h /= np.sqrt(rotation.power)
    q = np.eye(rotation.odd) - 2 / rotation.odd * np.ones((rotation.odd, rotation.odd))
    return np.diag(signs(rotation).numpy()) @ np.kron(q, h)


@pytest.mark.parametrize(("width", "odd"), [(64, 1), (192, 3), (576, 9), (896, 7), (160, 5)])
def test_rotate_is_the_dense_matrix_and_orthogonal(width: int, odd: int) -> None:
    rotation = rotation_for(width)
    assert (rotation.odd, rotation.odd * rotation.power) == (odd, width)
    matrix = dense(width)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)
    x = torch.randn(7, width, dtype=torch.float64)
    found = rotate_(x.t().contiguous(), rotation, signs(rotation)).t()
    np.testing.assert_allclose(found.numpy(), x.numpy() @ matrix, atol=1e-12)


def test_signs_are_balanced_and_depend_on_the_seed() -> None:
    found = signs(rotation_for(4096))
    assert set(found.tolist()) == {1.0, -1.0}
    assert abs(float(found.sum())) < 4 * 64


def test_hadamard_twice_is_size_times_identity() -> None:
    x = torch.randint(-1000, 1000, (192, 5)).double()
    assert torch.equal(hadamard_(hadamard_(x.clone(), 64), 64), 64 * x)


def test_same_bits_on_any_thread_count() -> None:
    rotation = rotation_for(576)
    x = torch.randn(576, 3000, dtype=torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(rotate_(x.clone(), rotation, signs(rotation)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
