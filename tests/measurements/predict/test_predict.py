"""Whole predictions: of a made image, in shapes of both platforms, and against the log of a real boot."""

import hashlib
import json

import pytest

from countermark.errors import FormatError
from countermark.formats.tpm_log import parse_tpm_log
from countermark_measurements import efivar, pcr, prediction, rtmr
from countermark_measurements.predict import predict, read_image
from countermark_measurements.shape import read_shape
from countermark_measurements.tdvf import parse_tdvf
from countermark_measurements.tdvf_volumes import parse_volumes, written
from measurements.predict.artefacts import ROOT, SHAPES, UKI_SECTIONS, image, ovmf_path, uki

VTPM, TDX = SHAPES / "q35-2cpu-3g.toml", SHAPES / "tdx-8cpu-16g.toml"
LOG = parse_tpm_log((ROOT / "tests/data/tpmlog/binary_bios_measurements.bin").read_bytes())
TPM = json.loads((ROOT / "tests/data/tpmlog/expected.json").read_text())["tpm_sha384"]
OF_THE_DISK = {0x80000006, 0x80000003, 0x0000000D, 0x00000006}  # partition table, images, sections, kernel's own


@pytest.fixture
def disk(tmp_path):
    return image(tmp_path / "disk.raw")


def code_of(call) -> str:
    with pytest.raises(FormatError) as caught:
        call()
    return caught.value.code


def test_a_real_boot(disk):
    """Every event of a genuine log in this shape, in order; digests of all but the disk's own: it is another."""
    gpt, parsed = read_image(disk)
    shape = read_shape(VTPM)
    events = pcr.tpm_events(parse_volumes(ovmf_path().read_bytes()), shape, gpt, parsed)
    assert [(event.pcr, event.event_type) for event in events] == [(item.pcr, item.event_type) for item in LOG.events]
    differ = {
        item.event_type
        for event, item in zip(events, LOG.events, strict=True)
        if event.digest != item.digests["sha384"]
    }
    assert differ <= OF_THE_DISK
    names = [item.data for item in LOG.events if item.pcr == 11][::2]
    assert names == [f"{name}\0".encode("utf-16-le") for name, _ in parsed.sections]
    registers = [bytes(48)] * 8
    for event in events:
        if event.pcr < 8:
            registers[event.pcr] = hashlib.sha384(registers[event.pcr] + event.digest).digest()
    whole = [number for number in range(8) if registers[number].hex() == TPM[str(number)]]
    assert whole == [0, 1, 2, 3, 6, 7]  # 4 and 5 are about the disk


def test_prediction_for_vtpm(disk):
    found = predict(disk, ovmf_path(), [read_shape(VTPM)], "vtpm")
    (shape,) = found.shapes
    assert shape.mrtd.hex() == TPM["0"]
    assert len(found.events) == 40  # 44 less the four of PCR 0
    assert prediction.parse_json(prediction.to_json(found)) == found
    sources = {event.note: event.source for event in found.events}
    captured = [note for note, source in sources.items() if source == "launch" and "captured" in note]
    assert len(captured) == 3  # tables, and what is made of them; the log area is zeros
    assert {event.shape for event in found.events if event.source == "launch"} == {shape.name}
    assert {event.shape for event in found.events if event.source != "launch"} == {""}
    assert [item.name for item in found.inputs] == ["disk.raw", "OVMF.fd", VTPM.name, "q35-2cpu-3g.acpi.bin"]
    assert found.inputs[0].sha256 == hashlib.sha256(disk.read_bytes()).digest()


def test_prediction_for_tdx(disk):
    found = predict(disk, ovmf_path(), [read_shape(TDX)], "tdx")
    one, two = found.shapes
    assert (one.name, two.name) == ("tdx-8cpu-16g", "tdx-8cpu-16g-qemu-8.2")
    assert one.mrtd.hex().startswith("bdc6fb14")
    assert two.mrtd.hex().startswith("456f0790")
    assert one.rtmr0 == two.rtmr0
    of_one = found.of_shape(one)
    assert [event.register for event in of_one] == sorted(event.register for event in of_one if event.register == 1) + [
        event.register for event in of_one if event.register != 1
    ]
    assert sum(event.register == 2 for event in of_one) == 7
    assert sum(event.register == 3 for event in of_one) == 14
    assert prediction.parse_json(prediction.to_json(found)) == found


def test_tdx_and_vtpm_measure_the_same_image_events(disk):
    gpt, parsed = read_image(disk)
    firmware = ovmf_path().read_bytes()
    tpm = pcr.tpm_events(parse_volumes(firmware), read_shape(VTPM), gpt, parsed)
    td = rtmr.td_events(parse_tdvf(firmware), read_shape(TDX), gpt, parsed)
    of_image = [[event for event in events if event.source == "image"] for events in (tpm, td)]
    assert of_image[0] == of_image[1]
    assert len(of_image[0]) == 17


def test_two_shapes_share_what_is_not_the_launchs(disk, tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "q35-2cpu-3g.acpi.bin").write_bytes((SHAPES / "q35-2cpu-3g.acpi.bin").read_bytes())
    text = VTPM.read_text()
    (folder / "other.toml").write_text(
        text.replace('name = "q35-2cpu-3g"', 'name = "other"').replace("drive=weights", "drive=weights,addr=0x9")
    )
    shapes = [read_shape(VTPM), read_shape(folder / "other.toml")]
    found = predict(disk, ovmf_path(), shapes, "vtpm")
    first, second = found.shapes
    assert first.rtmr0 == second.rtmr0  # the boot options name neither disk; the tables are the same here
    single = [predict(disk, ovmf_path(), [shape], "vtpm") for shape in shapes]
    for shape, alone in zip(found.shapes, single, strict=True):
        assert found.of_shape(shape) == alone.events
    assert (found.rtmr1, found.rtmr2) == (single[0].rtmr1, single[0].rtmr2)


def registers(disk) -> tuple[bytes, ...]:
    """RTMR0 to RTMR2 after what the disk adds."""
    found = [bytes(48)] * 4
    for event in pcr.loading_events(*read_image(disk)):
        found[event.register] = hashlib.sha384(found[event.register] + event.digest).digest()
    return tuple(found[1:])


@pytest.mark.parametrize("name", [".cmdline", ".initrd", ".osrel", ".uname", ".sbat"])
def test_each_section_moves_its_register(tmp_path, disk, name):
    sections = [(item, content + b"x" if item == name else content) for item, content in UKI_SECTIONS]
    plain = registers(disk)
    changed = registers(image(tmp_path / "b", {"EFI/BOOT/BOOTX64.EFI": uki(sections)}))
    assert (changed[0], plain[0]) == (bytes(48), bytes(48))
    assert changed[1] != plain[1]  # the image as a whole
    assert changed[2] != plain[2]


@pytest.mark.parametrize(
    "path", ["loader/addons/a.efi", "loader/cred/a.crd", "EFI/BOOT/EXTRA.D/X", "EFI/X.CRD", "NVVARS"]
)
def test_anything_else_on_the_system_partition_is_refused(tmp_path, path):
    disk = image(tmp_path / "disk", {"EFI/BOOT/BOOTX64.EFI": uki(), path.upper(): b"x"})
    assert code_of(lambda: read_image(disk)) == "predict.system_partition"


def test_no_image_is_refused(tmp_path):
    assert code_of(lambda: read_image(image(tmp_path / "disk", {"A": b"x"}))) == "predict.system_partition"


def test_shapes_and_firmware_that_do_not_fit(disk, tmp_path):
    shape = read_shape(VTPM)
    firmware = ovmf_path()
    assert code_of(lambda: predict(disk, firmware, [], "vtpm")) == "predict.shapes"
    assert code_of(lambda: predict(disk, firmware, [shape, shape], "vtpm")) == "predict.shapes"
    assert code_of(lambda: predict(disk, firmware, [shape], "tdx")) == "predict.shapes"
    other = tmp_path / "OVMF.fd"
    other.write_bytes(firmware.read_bytes()[:-1] + b"\1")
    assert code_of(lambda: predict(disk, other, [shape], "vtpm")) == "predict.firmware"
    other.write_bytes(bytes((64 << 20) + 1))
    assert code_of(lambda: predict(disk, other, [shape], "vtpm")) == "predict.firmware"


class TestVolumes:
    """The firmware's own volumes."""

    def test_version(self):
        assert parse_volumes(ovmf_path().read_bytes()).version == "2025.02-8+deb13u1\0".encode("utf-16-le")

    def test_what_was_written_stood_empty(self):
        volumes = parse_volumes(ovmf_path().read_bytes())
        assert len(written(volumes.pei, ((0x6E50, b"\x08\x06"),))) == len(volumes.pei)
        for changes in (((0, b"\1"),), ((-1, b"\1"),), ((len(volumes.pei), b"\1"),)):
            last = changes
            assert code_of(lambda c=last: written(b"_" + volumes.pei[1:], c)) == "volumes.written"

    def test_refusals(self):
        firmware = ovmf_path().read_bytes()
        for data in (b"", bytes(4096), firmware[:0x84000], firmware[0x84000:0x85000]):
            assert code_of(lambda d=data: parse_volumes(d)) == "volumes.contents"
        at = firmware.index(bytes.fromhex("98584eee14395942")) + 200
        broken = firmware[:at] + bytes(64) + firmware[at + 64 :]
        assert code_of(lambda: parse_volumes(broken)) == "volumes.contents"


def test_boot_options_by_number_of_disks():
    """One and four disks were seen; the shell's number follows theirs."""
    one, four = efivar.boot_variables([1], 1), efivar.boot_variables([4, 2, 3, 1], 1)
    assert [item.name for item in one] == ["BootOrder", "Boot0001", "Boot0000", "Boot0002"]
    assert [item.name for item in four] == ["BootOrder", "Boot0001", "Boot0000", "Boot0005"]
    assert one[1:3] == four[1:3]
    logged = [item for item in LOG.events if item.event_type == 0x80000002]
    assert [item.digests["sha384"] for item in logged] == [hashlib.sha384(item.data).digest() for item in four]
    for item, variable in zip(logged, four, strict=True):
        assert item.data == efivar.variable_data(efivar.GLOBAL_VARIABLE, variable.name, variable.data)
