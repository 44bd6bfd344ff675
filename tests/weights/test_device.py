"""Weights on a block device: only one that dm-verity has opened, every block read before anything is computed."""

import os
import stat
from types import SimpleNamespace

import pytest
from tinymodels import write_folder

from countermark.errors import WeightsError
from countermark_appliance.engine import weights
from countermark_appliance.engine.verityformat import BLOCK, DEVICE_UUID
from countermark_appliance.engine.weights import device
from countermark_appliance.engine.weights.device import first_unreadable, opened_root

ROOT = bytes(range(32))


@pytest.fixture(scope="module")
def tiny_artefact(tmp_path_factory):
    write_folder(source := tmp_path_factory.mktemp("source") / "tiny", "llama")
    weights.build(source, built := tmp_path_factory.mktemp("built"))
    return built


@pytest.fixture(scope="module")
def whole(tiny_artefact):
    return weights.load(tiny_artefact)


@pytest.fixture
def as_device(monkeypatch):
    """`stat` of weights.img says block device 253:1; its bytes stay those of the file. No device can be made here."""
    real = os.stat

    def stat_of(path, *args, **kwargs):
        found = real(path, *args, **kwargs)
        if str(path).endswith("weights.img"):
            return SimpleNamespace(st_mode=stat.S_IFBLK | 0o600, st_rdev=os.makedev(253, 1))
        return found

    monkeypatch.setattr(os, "stat", stat_of)


def uuid(folder, text: str):
    path = folder / "dev/block/253:1/dm/uuid"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return folder


def test_a_file_is_no_device(tmp_path):
    (tmp_path / "weights.img").write_bytes(b"x")
    assert opened_root(tmp_path / "weights.img", sysfs=tmp_path) is None


def test_a_device_names_its_root(tmp_path, as_device):
    (tmp_path / "weights.img").write_bytes(b"x")
    uuid(tmp_path, f"{DEVICE_UUID}{ROOT.hex()}\n")
    assert opened_root(tmp_path / "weights.img", sysfs=tmp_path) == ROOT


@pytest.mark.parametrize(
    "text", ["", "\n", f"CRYPT-VERITY-{ROOT.hex()}", f"{DEVICE_UUID}{ROOT.hex()[:-1]}", f"x{DEVICE_UUID}{ROOT.hex()}"]
)
def test_a_device_of_another_kind(tmp_path, as_device, text):
    (tmp_path / "weights.img").write_bytes(b"x")
    uuid(tmp_path, text)
    with pytest.raises(WeightsError) as refused:
        opened_root(tmp_path / "weights.img", sysfs=tmp_path)
    assert refused.value.code == "weights.device"


def test_a_plain_disk(tmp_path, as_device):
    (tmp_path / "weights.img").write_bytes(b"x")
    with pytest.raises(WeightsError) as refused:
        opened_root(tmp_path / "weights.img", sysfs=tmp_path)
    assert refused.value.code == "weights.device"


def test_nothing_there(tmp_path):
    with pytest.raises(WeightsError) as refused:
        opened_root(tmp_path / "weights.img", sysfs=tmp_path)
    assert refused.value.code == "weights.missing"


@pytest.mark.parametrize("bad", [None, 0, 1, 255, 256, 599])
def test_the_first_block_that_cannot_be_read(tmp_path, monkeypatch, bad):
    path = tmp_path / "disk"
    path.write_bytes(bytes(600 * BLOCK))
    real, progress = os.pread, []

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if bad is not None and offset < (bad + 1) * BLOCK and offset + size > bad * BLOCK:
            if offset >= bad * BLOCK:
                raise OSError(5, "Input/output error")
            size = bad * BLOCK - offset  # a read ends before the block that fails, as Linux has it
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert first_unreadable(path, 600 * BLOCK, progress.append) == bad
    assert bad is not None or sum(progress) == 600 * BLOCK


def test_a_device_that_ends_early(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(3 * BLOCK))
    assert first_unreadable(path, 5 * BLOCK) == 3


def test_loading_from_a_device_gives_the_same(tiny_artefact, whole, tmp_path, monkeypatch, as_device):
    """The tree and the sidecar are not needed there: the kernel has the tree, the caller the root."""
    (tmp_path / "weights.img").symlink_to(tiny_artefact / "weights.img")
    monkeypatch.setitem(
        device.opened_root.__kwdefaults__, "sysfs", uuid(tmp_path / "sys", DEVICE_UUID + whole.weights_root.hex())
    )
    found = weights.load(tmp_path, expected_root=whole.weights_root)
    assert found.weights_root == whole.weights_root
    assert found.manifest_digest == whole.manifest_digest
    assert all(bool((found.tensor(name) == tensor).all()) for name, tensor in whole.tensors.items())
    with pytest.raises(WeightsError) as refused:
        weights.load(tmp_path, expected_root=ROOT)
    assert refused.value.code == "weights.root"


def test_a_damaged_block_of_a_device_is_named(tiny_artefact, whole, tmp_path, monkeypatch, as_device):
    root = whole.weights_root
    (tmp_path / "weights.img").symlink_to(tiny_artefact / "weights.img")
    monkeypatch.setitem(device.opened_root.__kwdefaults__, "sysfs", uuid(tmp_path / "sys", DEVICE_UUID + root.hex()))
    monkeypatch.setattr(device, "first_unreadable", lambda *_: 4)
    with pytest.raises(weights.DamagedBlock) as refused:
        weights.load(tmp_path, expected_root=root)
    assert (refused.value.code, refused.value.block) == ("weights.block", 4)
