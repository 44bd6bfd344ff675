"""The image container: Python's tarfile reads it, and nothing but our own writing is accepted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import WeightsError
from countermark_appliance.engine.weights.pack import BLOCK, Packer, image_bytes, read_members

FILES = {"MANIFEST": b"m" * 700, "empty.jinja": b"", "tensors/a.f32": bytes(range(256)) * 16, "z": b"!" * 512}


def packed(path: Path, files: dict[str, bytes] = FILES) -> bytes:
    with Packer(path) as packer:
        for name, data in files.items():
            packer.begin(name, len(data))
            for start in range(0, len(data), 300):
                packer.write(data[start : start + 300])
        size = packer.close()
        assert packer.digests == {name: blake3(data).digest() for name, data in files.items()}
    image = path.read_bytes()
    assert size == len(image) == image_bytes([len(data) for data in files.values()])
    return image


def test_tarfile_reads_it(tmp_path: Path) -> None:
    image = packed(tmp_path / "i")
    assert len(image) % BLOCK == 0
    with tarfile.open(fileobj=io.BytesIO(image)) as archive:
        assert archive.format == tarfile.USTAR_FORMAT or archive.getnames() == list(FILES)
        for info in archive:
            assert (info.uid, info.gid, info.mtime, info.mode, info.uname) == (0, 0, 0, 0o444, "")
            member = archive.extractfile(info)
            assert member is not None and member.read() == FILES[info.name]


def test_members_round_trip(tmp_path: Path) -> None:
    image = memoryview(packed(tmp_path / "i"))
    found = {m.name: bytes(image[m.offset : m.offset + m.size_bytes]) for m in read_members(image)}
    assert found == FILES


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_flipped_byte_outside_the_data_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    image = bytearray(packed(tmp_path_factory.getbasetemp() / "flip"))
    inside = [m for m in read_members(memoryview(bytes(image))) if m.size_bytes]
    position = data.draw(st.integers(0, len(image) - 1))
    image[position] ^= data.draw(st.integers(1, 255))
    if any(m.offset <= position < m.offset + m.size_bytes for m in inside):
        assert len(read_members(memoryview(image))) == len(FILES)
        return
    with pytest.raises(WeightsError) as caught:
        read_members(memoryview(image))
    assert caught.value.code == "weights.image"


@given(st.binary(max_size=3000))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WeightsError) as caught:
        read_members(memoryview(data))
    assert caught.value.code == "weights.image"


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", ".hidden", "a\nb", "a b"])
def test_foreign_names_are_refused(name: str, tmp_path: Path) -> None:
    image = bytearray(packed(tmp_path / "i", {"a" * len(name): b"x"}))
    image[: len(name)] = name.encode()
    image[148:156] = b" " * 8
    image[148:156] = b"%06o\0 " % sum(image[:512])
    with pytest.raises(WeightsError) as caught:
        read_members(memoryview(image))
    assert caught.value.code == "weights.image"


def test_appended_and_cut_images_are_refused(tmp_path: Path) -> None:
    image = packed(tmp_path / "i")
    for changed in (image + bytes(BLOCK), image[:-BLOCK], image[:-1], b""):
        with pytest.raises(WeightsError) as caught:
            read_members(memoryview(changed))
        assert caught.value.code == "weights.image"
