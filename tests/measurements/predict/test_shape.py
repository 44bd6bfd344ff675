"""Launch shapes: those of the repository, and each way in which a TOML file can be wrong."""

import hashlib
import importlib.machinery
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from countermark.errors import FormatError
from countermark_measurements.shape import max_below_4g, parse_size, read_shape
from measurements.predict.artefacts import OVMF_SHA256, ROOT, SHAPES

NAMES = ("q35-2cpu-3g", "tdx-8cpu-16g")


@pytest.fixture
def write(tmp_path: Path):
    """A copy of a shape with text replaced, which must be there; its tables beside it."""

    def make(*changes: tuple[str, str], name: str = "q35-2cpu-3g") -> Path:
        text = (SHAPES / f"{name}.toml").read_text()
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / "shape.toml"
        path.write_text(text)
        for stored in SHAPES.glob("*.acpi.bin"):
            (tmp_path / stored.name).write_bytes(stored.read_bytes())
        return path

    return make


def code_of(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        read_shape(path)
    return caught.value.code


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_the_repository(name):
    shape = read_shape(SHAPES / f"{name}.toml")
    assert shape.name == name
    assert (shape.disks, shape.booted) == ((1, 2, 3, 4), 1)
    assert shape.firmware_sha256.hex() == OVMF_SHA256
    assert shape.has_tpm == (shape.platform == "vtpm") == bool(shape.acpi.tpm_log) == bool(shape.pei_written)
    assert [item[0] for item in shape.files] == [f"{name}.toml", f"{name}.acpi.bin"]
    assert shape.files[0][1] == hashlib.sha256((SHAPES / f"{name}.toml").read_bytes()).digest()


def test_every_shape_is_tested_here_and_listed_in_its_readme():
    assert {path.stem for path in SHAPES.glob("*.toml")} == set(NAMES)
    listed = re.findall(r"^\| ([a-z0-9.-]+) \| (?:vtpm|tdx) \|", (SHAPES / "README.md").read_text(), re.MULTILINE)
    assert set(listed) == set(NAMES)


def test_image_boot_starts_the_same_machine():
    loader = importlib.machinery.SourceFileLoader("image_boot_under_test", str(ROOT / "image/boot"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    try:
        loader.exec_module(module)
        for name in NAMES:
            path = SHAPES / f"{name}.toml"
            ours, theirs = read_shape(path), module.read_shape(path)
            assert (ours.name, ours.cpus, ours.memory_bytes, ours.devices) == (
                theirs.name,
                theirs.cpus,
                theirs.memory_mib << 20,
                theirs.devices,
            )
    finally:
        del sys.modules[loader.name]


ROOT_DISK = '"virtio-blk-pci,drive=root,bootindex=0"'
WEIGHTS = '"virtio-blk-pci,drive=weights"'
NET = '"virtio-net-pci,netdev=net,romfile="'
TPM = '  "tpm-crb,tpmdev=tpm",\n'


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ([("name =", "name ==")], "shape.toml"),
        ([('name = "q35-2cpu-3g"', 'name = "Q35 "')], "shape.member"),
        ([('name = "q35-2cpu-3g"\n', "")], "shape.member"),
        ([("cpus = 2", "cpus = 2\nextra = 1")], "shape.member"),
        ([("cpus = 2", "cpus = 0")], "shape.member"),
        ([("cpus = 2", 'cpus = "2"')], "shape.member"),
        ([("cpus = 2", "cpus = true")], "shape.member"),
        ([('platform = "vtpm"', 'platform = "sev"')], "shape.member"),
        ([('platform = "vtpm"', 'platform = "tdx"')], "shape.member"),
        ([('machine = "q35,smm=off"', 'machine = "pc,smm=off"')], "shape.machine"),
        ([("5fb05c3d", "5fb05c3e")], "shape.acpi"),
        ([('"WAET", ', "")], "shape.acpi"),
        ([('tables = "q35-2cpu-3g.acpi.bin"', 'tables = "../shape.toml"')], "shape.member"),
        ([('tables = "q35-2cpu-3g.acpi.bin"', 'tables = "nothing.bin"')], "shape.file"),
        ([('tables = "q35-2cpu-3g.acpi.bin"', 'tables = "tdx-8cpu-16g.acpi.bin"')], "shape.acpi"),
        ([("14954040", "1495404X")], "shape.member"),
        ([('bytes = "0806"', 'bytes = ""')], "shape.member"),
        ([(WEIGHTS, '"virtio-blk-pci,drive=weights,bootindex=1"')], "shape.device"),
        ([(ROOT_DISK, '"virtio-blk-pci,drive=root"')], "shape.device"),
        ([(ROOT_DISK, '"nvme,drive=root,bootindex=0"')], "shape.device"),
        ([(NET, '"virtio-net-pci,netdev=net"')], "shape.device"),
        ([(NET, '"virtio-net-pci,netdev=net,romfile=evil.rom"')], "shape.device"),
        ([(NET, '"virtio-net-pci,netdev=net,romfile=,bootindex=1"')], "shape.device"),
        ([(WEIGHTS, '"virtio-blk-pci,drive=weights,bus=pcie.1"')], "shape.device"),
        ([(WEIGHTS, '"virtio-blk-pci,drive=weights,addr=0x1"')], "shape.device"),
        ([(WEIGHTS, '"virtio-blk-pci,drive=weights,addr=0x20"')], "shape.device"),
        ([(WEIGHTS, '"virtio-blk-pci,drive=weights,addr=2.1"')], "shape.device"),
        ([(WEIGHTS, '"virtio-blk-pci,drive=weights,addr=0x2,multifunction=on"')], "shape.device"),
        ([(WEIGHTS, '"vfio-pci,host=1:0.0,rombar=0"')], "shape.device"),
        ([(WEIGHTS, ", ".join(['"virtio-rng-pci"'] * 32))], "shape.device"),
        ([(WEIGHTS, "7")], "shape.member"),
        ([(TPM, "")], "shape.device"),
    ],
)
def test_refusals(write, changes, code):
    assert code_of(write(*changes)) == code


@pytest.mark.parametrize(
    ("devices", "disks", "booted"),
    [
        (["virtio-blk-pci,drive=root,bootindex=0,addr=0x5"], (5, 1, 2), 5),
        (["pcie-root-port,id=p", "vfio-pci,host=1:0.0,bus=p,rombar=0", "virtio-blk-pci,bootindex=0"], (2, 3, 4), 2),
        (["vhost-vsock-pci,guest-cid=3", "virtio-blk-pci,bootindex=0", "virtio-blk-pci"], (2, 3, 4, 5), 2),
        (["virtio-blk-pci,addr=1e", "virtio-blk-pci,bootindex=3"], (30, 1, 2, 3), 1),
    ],
)
def test_slots(write, devices, disks, booted):
    """Without addr QEMU takes the lowest free slot of the root bus, device by device."""
    listed = ", ".join(f'"{device}"' for device in devices)
    shape = read_shape(write((f"{ROOT_DISK},\n  {WEIGHTS},", f"{listed},")))
    assert (shape.disks, shape.booted) == (disks, booted)


def test_sizes():
    assert [parse_size(text) for text in ("512", "2k", "3M", "1G", " 2T ")] == [512, 2048, 3 << 20, 1 << 30, 2 << 40]
    for text in ("", "G", "1P", "-1", "1.5G", "9" * 16):
        with pytest.raises(FormatError) as caught:
            parse_size(text)
        assert caught.value.code == "shape.memory"


def test_machines():
    assert max_below_4g("q35") == max_below_4g("type=q35,smm=off") == max_below_4g("pc-q35-9.2") == 1 << 32
    assert max_below_4g("q35,max-ram-below-4g=2G") == 2 << 30
    for machine in ("", "pc", "microvm", "q35,max-ram-below-4g=5G", "q35,max-ram-below-4g=1"):
        with pytest.raises(FormatError) as caught:
            max_below_4g(machine)
        assert caught.value.code == "shape.machine"


def test_too_large_and_not_utf8(tmp_path):
    path = tmp_path / "shape.toml"
    path.write_bytes(b"\xff")
    assert code_of(path) == "shape.toml"
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    assert code_of(path) == "shape.file"
