"""The GGUF container against the gguf package, and against damage."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.gguf import GgufFile

Q = gguf.GGMLQuantizationType


def written(path: Path, kind: Q) -> np.ndarray:
    """A file with one matrix of this type, one vector and some keys; returns the matrix as the package reads it."""
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((12, 96)) * 3).astype(np.float32)
    data = gguf.quants.quantize(matrix, kind)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.names", ["x", "naïve", ""])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("m", data, raw_dtype=kind)
    writer.add_tensor("v", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.quants.dequantize(data, kind)


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_rows_are_those_of_the_gguf_package(kind: Q, tmp_path: Path) -> None:
    expected = written(tmp_path / "f", kind)
    file = GgufFile(tmp_path / "f")
    assert file.metadata["a.u32"] == 7 and file.metadata["a.f32"] == 0.5 and file.metadata["a.bool"] is True
    assert file.metadata["a.names"] == ("x", "naïve", "") and file.metadata["a.numbers"] == (1, 2, 3)
    assert file.tensors["m"].shape == (12, 96)
    assert torch.equal(file.rows("m", 0, 12), torch.from_numpy(expected))
    assert torch.equal(file.rows("m", 5, 8), torch.from_numpy(expected[5:8]))
    assert file.rows("v", 0, 1).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("kind", [Q.Q5_0, Q.Q5_1])
def test_other_types_are_refused_by_name(kind: Q, tmp_path: Path) -> None:
    written(tmp_path / "f", kind)
    with pytest.raises(WeightsError, match=kind.name) as caught:
        GgufFile(tmp_path / "f")
    assert caught.value.code == "weights.unsupported_quantisation"


@pytest.mark.parametrize("version", [1, 2, 4, 0x03000000])
def test_other_versions_are_refused(version: int, tmp_path: Path) -> None:
    written(tmp_path / "f", Q.F32)
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
    with pytest.raises(WeightsError) as caught:
        GgufFile(tmp_path / "f")
    assert caught.value.code == "weights.unsupported_gguf"


def test_every_truncation_and_a_longer_file_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "f", Q.Q8_0)
    data = (tmp_path / "f").read_bytes()
    last = 5 * 4  # the vector, then padding that a file may leave out
    for size in [*range(0, len(data) - last - 32, 97), len(data) - 32]:
        (tmp_path / "f").write_bytes(data[:size])
        with pytest.raises(WeightsError) as caught:
            GgufFile(tmp_path / "f")
        assert caught.value.code == "weights.gguf"
    (tmp_path / "f").write_bytes(data + bytes(64))
    with pytest.raises(WeightsError) as caught:
        GgufFile(tmp_path / "f")
    assert caught.value.code == "weights.gguf"


def file_bytes(*, tensors: int = 0, keys: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


KEY = text("k") + struct.pack("<II", 4, 1)
TENSOR = struct.pack("<IQIQ", 1, 8, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"GGML" + bytes(40),
        file_bytes(tensors=1 << 40),
        file_bytes(keys=1 << 63),
        file_bytes(keys=1, body=struct.pack("<Q", 1 << 60)),
        file_bytes(keys=1, body=text("k") + struct.pack("<I", 13) + bytes(16)),
        file_bytes(keys=1, body=text("k") + struct.pack("<IB", 7, 2)),
        file_bytes(keys=1, body=text("k") + struct.pack("<IIQ", 9, 4, 1 << 62)),
        file_bytes(keys=1, body=text("k") + struct.pack("<IIQ", 9, 9, 1)),
        file_bytes(keys=1, body=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)),
        file_bytes(keys=2, body=KEY + KEY),
        file_bytes(keys=1, body=text("general.alignment") + struct.pack("<II", 4, 48) + bytes(64)),
        file_bytes(tensors=1, body=text("t") + struct.pack("<IQIQ", 1, 0, 0, 0) + bytes(64)),
        file_bytes(tensors=1, body=text("t") + struct.pack("<IQIQ", 1, 33, 8, 0) + bytes(64)),
        file_bytes(tensors=1, body=text("t") + struct.pack("<IQIQ", 1, 8, 0, 32) + bytes(128)),
        file_bytes(tensors=2, body=(text("t") + TENSOR) * 2 + bytes(128)),
    ],
)
def test_hostile_headers_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        GgufFile(tmp_path / "f")
    assert caught.value.code == "weights.gguf"


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_bytes_give_a_file_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    written(path, Q.Q4_1)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = GgufFile(path)
        for name, entry in file.tensors.items():
            file.rows(name, 0, entry.shape[0])
    except WeightsError as err:
        assert err.code in ("weights.gguf", "weights.unsupported_gguf", "weights.unsupported_quantisation",
                            "weights.unsupported_tensor")  # fmt: skip
