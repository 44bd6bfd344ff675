"""RTMR0: both vectors, the first event of a genuine TD, and what moves it."""

import hashlib
import json
import struct
from pathlib import Path

import pytest

import vectors
from countermark.errors import FormatError
from countermark.formats.eventlog import EV_EFI_VARIABLE_BOOT, EV_EFI_VARIABLE_DRIVER_CONFIG, parse_event_log
from countermark_measurements import acpi, efivar
from countermark_measurements.pcr import EV_PLATFORM_CONFIG_FLAGS
from countermark_measurements.rtmr import rtmr0_events
from countermark_measurements.shape_metadata import read_metadata
from countermark_measurements.tdhob import memory_ranges, td_hob
from countermark_measurements.tdvf import Section, SectionKind, Tdvf
from measurements.predict.artefacts import SHAPES, ovmf_path

GIB = 1 << 30
SETS = ("canonical-defaults", "q35-with-hpet")
# The vectors' firmware is not at hand. These are the sections of its version, by Debian's build of it: test_sections.
MEMORY_SECTIONS = ((0x811000, 0xF000), (0x80B000, 0x2000), (0x809000, 0x2000), (0x800000, 0x6000))


def tdvf(configuration: bytes = b"") -> Tdvf:
    found = [
        Section(
            kind=SectionKind.TD_HOB if address == 0x809000 else SectionKind.TEMP_MEM,
            address=address,
            size=size,
            measured=False,
            data=b"",
        )
        for address, size in MEMORY_SECTIONS
    ]
    cfv = Section(kind=SectionKind.CFV, address=0xFFC00000, size=0x84000, measured=False, data=configuration)
    return Tdvf(sections=(cfv, *found))


def folder(name: str) -> Path:
    path = vectors.directory() / "mr" / name
    if not path.is_dir():
        pytest.skip(f"no vectors at {path}")
    return path


def replay(digests) -> str:
    register = bytes(48)
    for digest in digests:
        register = hashlib.sha384(register + digest).digest()
    return register.hex()


def genuine_ccel():
    return parse_event_log(vectors.read("ccel/dstack/ccel.bin")).events


def test_sections():
    from countermark_measurements.tdvf import parse_tdvf

    parsed = parse_tdvf(ovmf_path().read_bytes())
    kinds = (SectionKind.TD_HOB, SectionKind.TEMP_MEM)
    assert tuple((item.address, item.size) for item in parsed.sections if item.kind in kinds) == MEMORY_SECTIONS


@pytest.mark.parametrize("name", SETS)
def test_vectors(name):
    """The configuration volume's digest is taken from a genuine log, since the vectors' firmware is not at hand."""
    expected = json.loads((folder(name) / "expected.json").read_text())["rtmr0"]
    events = read_metadata(folder(name) / "metadata.json").events(tdvf())
    digests = [event.digest for event in events]
    digests[1] = genuine_ccel()[1].digest
    assert replay(digests) == expected
    assert len(digests) == 13


@pytest.mark.parametrize("name", SETS)
def test_vectors_with_debians_firmware(name):
    from countermark_measurements.tdvf import parse_tdvf

    expected = json.loads((folder(name) / "expected.json").read_text())["rtmr0"]
    events = read_metadata(folder(name) / "metadata.json").events(parse_tdvf(ovmf_path().read_bytes()))
    assert replay(event.digest for event in events) == expected


def test_genuine_td_of_1_gib():
    """The hand-off block of a real TD; its Secure Boot and boot variables are those predicted too."""
    log = genuine_ccel()
    hob = td_hob(tdvf(), memory_ranges(1 * GIB))
    assert hashlib.sha384(hob).digest() == log[0].digest
    mine = rtmr0_events(
        tdvf(),
        ranges=memory_ranges(GIB),
        acpi=acpi.AcpiFiles(loader=b"l", rsdp=b"r", tpm_log=b"", tables=b"t"),
        boot=efivar.boot_variables_without_disk(),
    )
    theirs = [event for event in log if event.register == 1]
    assert [event.event_type for event in mine] == [event.event_type for event in theirs]
    captured = {EV_PLATFORM_CONFIG_FLAGS}  # the ACPI files of that host
    same = [
        (a.digest, b.digest)
        for a, b in zip(mine, theirs, strict=True)
        if a.event_type not in captured and "configuration firmware volume" not in a.note
    ]
    assert len(same) == 9
    assert all(a == b for a, b in same)
    for kind, count in ((EV_EFI_VARIABLE_DRIVER_CONFIG, 5), (EV_EFI_VARIABLE_BOOT, 2)):
        assert sum(event.event_type == kind for event in mine) == count


@pytest.mark.parametrize(
    ("memory", "limit", "ranges"),
    [
        (2 * GIB, 4 * GIB, [(0, 2 * GIB)]),
        (0xB0000000 - 4096, 4 * GIB, [(0, 0xB0000000 - 4096)]),
        (0xB0000000, 4 * GIB, [(0, 2 * GIB), (4 * GIB, 0x30000000)]),
        (3 * GIB, 4 * GIB, [(0, 2 * GIB), (4 * GIB, GIB)]),
        (64 * GIB, 4 * GIB, [(0, 2 * GIB), (4 * GIB, 62 * GIB)]),
        (2 * GIB, GIB, [(0, GIB), (4 * GIB, GIB)]),
        (GIB, GIB, [(0, GIB)]),
        (64 * GIB, GIB, [(0, GIB), (4 * GIB, 63 * GIB)]),
    ],
)
def test_memory_of_q35(memory, limit, ranges):
    assert list(memory_ranges(memory, max_below_4g=limit)) == ranges


@pytest.mark.parametrize("memory", [0, 4095, 1 << 47])
def test_memory_refused(memory):
    with pytest.raises(FormatError) as caught:
        memory_ranges(memory)
    assert caught.value.code == "shape.memory"


def test_hob_says_all_memory_once():
    ranges = memory_ranges(5 * GIB)
    hob = td_hob(tdvf(), ranges)
    head, resources = hob[:56], [hob[at : at + 48] for at in range(56, len(hob), 48)]
    assert struct.unpack_from("<HHII", head) == (1, 56, 0, 9)
    assert struct.unpack_from("<Q", head, 48)[0] == 0x809000 + len(hob) + 8
    found = [struct.unpack("<HHI16sIIQQ", item) for item in resources]
    assert all(item[:4] == (3, 48, 0, bytes(16)) and item[5] == 7 for item in found)
    assert [item[6] for item in found] == sorted(item[6] for item in found)
    covered = 0
    for _, _, _, _, _, _, start, length in found:
        assert start in (covered, 4 * GIB)
        covered = start + length
    assert sum(item[7] for item in found) == 5 * GIB
    assert [(item[6], item[7]) for item in found if item[4] == 0] == sorted(MEMORY_SECTIONS)


def test_hob_needs_room_for_the_firmware():
    with pytest.raises(FormatError) as caught:
        td_hob(tdvf(), memory_ranges(8 << 20))
    assert caught.value.code == "shape.memory"


class TestMetadata:
    """The forms of metadata.json beside those of the vectors."""

    def write(self, folder: Path, config: dict, boot: str = "direct", machine: str | None = "q35") -> Path:
        tables = acpi.pad_tables((SHAPES / "tdx-8cpu-16g.acpi.bin").read_bytes())
        (folder / "acpi_tables.bin").write_bytes(tables)
        base = {"cpus": 8, "memory": "16G", "bios": "OVMF.fd", "acpi_tables": "acpi_tables.bin"}
        if machine is not None:
            base["qemu"] = {"machine": machine}
        path = folder / "metadata.json"
        path.write_text(json.dumps({"boot_config": base | config, boot: {}}))
        return path

    @pytest.mark.parametrize("text", ["16G", "16384M", "16777216K", "17179869184", "0x400000000", " 16g "])
    def test_memory(self, tmp_path, text):
        assert read_metadata(self.write(tmp_path, {"memory": text})).ranges == memory_ranges(16 * GIB)

    @pytest.mark.parametrize("text", ["", "16", "G", "16P", "-1G", "1.5G", "16GG", "0x"])
    def test_memory_refused(self, tmp_path, text):
        with pytest.raises(FormatError):
            read_metadata(self.write(tmp_path, {"memory": text}))

    def test_machine(self, tmp_path):
        path = self.write(tmp_path, {}, machine="q35,smm=off,max-ram-below-4g=1G")
        assert read_metadata(path).ranges[0] == (0, GIB)
        assert read_metadata(self.write(tmp_path, {}, machine=None)).ranges[0] == (0, 2 * GIB)
        for machine in ("pc", "microvm", "q35,max-ram-below-4g=8G"):
            with pytest.raises(FormatError) as caught:
                read_metadata(self.write(tmp_path, {}, machine=machine))
            assert caught.value.code == "shape.machine"

    def test_captured_root_pointer_and_commands_go_before_made_ones(self, tmp_path):
        made = read_metadata(self.write(tmp_path, {}))
        (tmp_path / "r.bin").write_bytes(b"root pointer")
        (tmp_path / "l.bin").write_bytes(b"commands")
        found = read_metadata(self.write(tmp_path, {"rsdp": "r.bin", "table_loader": "l.bin"}))
        assert (found.acpi.rsdp, found.acpi.loader) == (b"root pointer", b"commands")
        assert found.acpi.tables == made.acpi.tables
        assert made.acpi.rsdp.startswith(b"RSD PTR ")

    def test_indirect_boot_takes_the_captured_variables_that_exist(self, tmp_path):
        (tmp_path / "order.bin").write_bytes(struct.pack("<3H", 2, 0, 7))
        (tmp_path / "boot").mkdir()
        for number in (0, 2):
            (tmp_path / "boot" / f"Boot{number:04X}.bin").write_bytes(bytes((number,)))
        config = {"boot_order": "order.bin", "path_boot_xxxx": "boot"}
        found = read_metadata(self.write(tmp_path, config, "indirect")).boot
        assert [(item.name, item.data) for item in found] == [
            ("BootOrder", struct.pack("<3H", 2, 0, 7)),
            ("Boot0002", b"\x02"),
            ("Boot0000", b"\x00"),
        ]
        with pytest.raises(FormatError):
            read_metadata(self.write(tmp_path, {}, "indirect"))

    def test_refused(self, tmp_path):
        path = tmp_path / "metadata.json"
        for text in ("", "[]", "{}", '{"boot_config": {}}', '{"boot_config": {}, "direct": {}, "indirect": {}}'):
            path.write_text(text)
            with pytest.raises(FormatError) as caught:
                read_metadata(path)
            assert caught.value.code.startswith("metadata.")
        with pytest.raises(FormatError) as caught:
            read_metadata(tmp_path / "nothing.json")
        assert caught.value.code == "metadata.file"
