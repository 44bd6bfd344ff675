"""The container: any ZIP tool opens it, and no other bytes are one of ours."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from collections import Counter
from pathlib import Path

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.bundle import encode_bundle, parse_bundle, read_bundle, write_bundle
from countermark.errors import BundleError, CountermarkError, UsageError
from one_answer import World

NAMES = [
    "manifest.cbor",
    "request.bin",
    "accepted.cbor",
    "answer.cbor",
    "receipt.cose",
    "evidence.cbor",
    "measurements.json",
]


def refused(code: str, data: bytes) -> None:
    with pytest.raises(CountermarkError) as caught:
        parse_bundle(data)
    assert caught.value.code == code


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(entries: dict[str, bytes], *, method: int = zipfile.ZIP_STORED, **attributes: object) -> bytes:
    """The same archive as Python's zipfile writes it, as far as it can be told to."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo(name)
            info.create_system = 3
            info.compress_type = method
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.writestr(info, data)
        if "comment" in attributes:
            archive.comment = b"comment"
    return out.getvalue()


def test_an_independent_reader_sees_the_parts(world: World) -> None:
    data = encode_bundle(world.bundle())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == NAMES
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    parts = members(data)
    assert parts["receipt.cose"] == world.receipt
    assert parts["evidence.cbor"] == world.evidence
    listed = cbor2.loads(parts["manifest.cbor"])["files"]
    assert [item[0] for item in listed] == NAMES[1:]


def test_it_round_trips_and_is_deterministic(world: World) -> None:
    for bundle in (world.bundle(), world.bundle(manifest=None)):
        data = encode_bundle(bundle)
        assert parse_bundle(data) == bundle
        assert encode_bundle(parse_bundle(data)) == data
    assert zipped(members(encode_bundle(world.bundle()))) == encode_bundle(world.bundle())


def test_every_flipped_byte_is_refused(world: World) -> None:
    data = encode_bundle(world.bundle())
    codes: Counter[str] = Counter()
    for at in range(0, len(data), 61):
        with pytest.raises(CountermarkError) as caught:
            parse_bundle(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        codes[caught.value.code] += 1
    assert set(codes) <= {"bundle.container", "bundle.digest"}  # the CRCs, so the container, find it first


def test_cut_prefixed_appended(world: World) -> None:
    data = encode_bundle(world.bundle())
    for length in (0, 4, 29, 30, 100, 5000, len(data) - 22, len(data) - 1):
        refused("bundle.container", data[:length])
    for other in (b"x" + data, data + b"\0", b"MZ" + data, data + data, data[:-2] + b"\x01\x00c"):
        refused("bundle.container", other)


def test_other_zips_with_the_same_content_are_refused(world: World) -> None:
    parts = members(encode_bundle(world.bundle()))
    assert parse_bundle(zipped(parts))
    variants = {
        "compressed": zipped(parts, method=zipfile.ZIP_DEFLATED),
        "time": zipped(parts, date_time=(2026, 1, 1, 0, 0, 0)),
        "extra": zipped(parts, extra=struct.pack("<HH", 0x7075, 0)),
        "attributes": zipped(parts, external_attr=0o777 << 16),
        "comment": zipped(parts, comment=b"comment"),
        "order": zipped(dict(reversed(parts.items()))),
        "missing": zipped({name: part for name, part in parts.items() if name != "answer.cbor"}),
        "added": zipped({**parts, "more.bin": b""}),
        "path": zipped({**{n: p for n, p in parts.items() if n != "measurements.json"}, "../measurements.json": b""}),
        "case": zipped({name.upper(): part for name, part in parts.items()}),
    }
    for name, data in variants.items():
        with pytest.raises(BundleError) as caught:
            parse_bundle(data)
        assert caught.value.code == "bundle.container", name


def test_duplicate_names_are_refused(world: World) -> None:
    parts = members(encode_bundle(world.bundle()))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name), data)
        archive.writestr(zipfile.ZipInfo("receipt.cose"), b"another")
    refused("bundle.container", out.getvalue())


def test_the_manifest_is_of_these_entries(world: World) -> None:
    parts = members(encode_bundle(world.bundle()))
    for name in NAMES[1:]:
        refused("bundle.digest", zipped({**parts, name: parts[name] + b"\0"}))
    refused("bundle.digest", zipped({**parts, "manifest.cbor": b"\xa0"}))


def test_sizes_are_capped(world: World) -> None:
    with pytest.raises(BundleError) as caught:
        encode_bundle(world.bundle(receipt=bytes(2 * 1024 * 1024)))
    assert caught.value.code == "bundle.size"
    refused("bundle.size", bytes(64 * 1024 * 1024 + 1))
    parts = members(encode_bundle(world.bundle()))
    refused("bundle.size", zipped({**parts, "receipt.cose": bytes(2 * 1024 * 1024)}))
    head = bytearray(encode_bundle(world.bundle()))
    head[18:26] = b"\xff" * 8  # a first entry of 4 GiB
    refused("bundle.container", bytes(head))


def test_a_bundle_is_durable_under_its_name(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose directory was never synced may be gone after a power cut, content and all."""
    synced: list[tuple[bool, bool]] = []
    real = os.fsync

    def sync(fd: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), (tmp_path / "answer.cmk").exists()))
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    write_bundle(tmp_path / "answer.cmk", world.bundle())
    assert synced == [(False, False), (True, True)]  # the content before the name, the directory after it


def test_files_are_written_whole_and_private(world: World, tmp_path: Path) -> None:
    path = tmp_path / "answer.cmk"
    path.write_bytes(b"older")
    write_bundle(path, world.bundle())
    assert read_bundle(path) == world.bundle()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    for call in (lambda: read_bundle(tmp_path / "none"), lambda: write_bundle(tmp_path / "no" / "x", world.bundle())):
        with pytest.raises(UsageError):
            call()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", b"PK\3\4", b"PK\5\6"]))
def test_arbitrary_bytes(data: bytes, head: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        parse_bundle(head + data)
    assert caught.value.code == "bundle.container"


def test_parts_of_another_kind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countermark.bundle.encode_answer", lambda _: b"\xa0")
    data = encode_bundle(world.bundle())
    monkeypatch.undo()
    refused("answer.field", data)
