"""The stand-in model itself: the root that every machine must get, and closeness to the file it came from."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from countermark_appliance.engine.weights import Artefact, build, load, stand_in_gguf
from countermark_appliance.engine.weights.gguf import GgufFile
from countermark_appliance.engine.weights.rotation import hadamard_, rotate_, signs

# changes only together with the profile or the artefact's format
ROOT = "61c3f0961aeafd21082c1375420789d6e2ce122cd9204ad0e24fe068c6087689"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    path = tmp_path_factory.mktemp("smollm2")
    build(stand_in_gguf(), path)
    return load(path)


def test_root_is_the_same_everywhere(artefact: Artefact) -> None:
    assert artefact.weights_root.hex() == ROOT
    assert artefact.config.name == "SmolLM2-135M-Instruct"
    assert artefact.config.source.sha256.hex() == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def matrix(name: str) -> torch.Tensor:
    """A tensor of the file as the gguf package dequantises it (its reader takes seconds; test_gguf compares ours)."""
    path = stand_in_gguf()
    entry = GgufFile(path).tensors[name]
    with path.open("rb") as file:
        file.seek(entry.offset)
        raw = np.frombuffer(file.read(entry.size_bytes), dtype=np.uint8)
    found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[entry.kind])
    return torch.from_numpy(found.reshape(entry.shape).astype(np.float64))


def unrotated(rows: torch.Tensor, artefact: Artefact) -> torch.Tensor:
    """rows R^T, R being orthogonal and its two last factors symmetric: apply R to the signs' image and sign again."""
    config = artefact.config
    diagonal = signs(config.rotation)
    ones = torch.ones_like(diagonal)
    return (rotate_(rows.double().t().contiguous(), config.rotation, ones) * diagonal[:, None]).t()


def test_embedding_turns_back_into_the_file_s(artefact: Artefact) -> None:
    expected = matrix("token_embd.weight")[:2000]
    found = unrotated(artefact.tensor("embed")[:2000], artefact)
    assert float((found - expected).abs().max()) < 1e-6


def test_int8_matrices_are_close_to_the_file_s(artefact: Artefact) -> None:
    def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    def dequantised(name: str) -> torch.Tensor:
        return artefact.tensor(name).double() * artefact.tensor(f"{name}.scale").double()[:, None]

    gain = matrix("blk.3.ffn_norm.weight")
    gate = unrotated(dequantised("layers.3.gate_up")[:1536], artefact)
    assert relative(gate, matrix("blk.3.ffn_gate.weight") * gain) < 0.01
    down = unrotated(dequantised("layers.3.down").t(), artefact)  # now [intermediate, hidden]
    down = hadamard_(down.contiguous(), 512)  # undoes blockdiag(H_B) / sqrt(B), because H H = 512
    assert relative(down.t(), matrix("blk.3.ffn_down.weight")) < 0.01
