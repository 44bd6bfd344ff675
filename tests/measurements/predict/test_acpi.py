"""ACPI files: the captures of image/shapes, commands against the genuine log's digests, and what is refused."""

import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark_measurements import acpi
from measurements.predict.artefacts import ROOT, SHAPES

CAPTURES = {
    "q35-2cpu-3g": ["FACS", "DSDT", "FACP", "APIC", "HPET", "TPM2", "MCFG", "WAET", "RSDT"],
    "tdx-8cpu-16g": ["FACS", "DSDT", "FACP", "APIC", "MCFG", "WAET", "RSDT"],
}
LOG = json.loads((ROOT / "tests/data/tpmlog/expected.json").read_text())["events"]


def tables(name: str) -> bytes:
    return acpi.pad_tables((SHAPES / f"{name}.acpi.bin").read_bytes())


def digest(data: bytes) -> str:
    return hashlib.sha384(data).hexdigest()


@pytest.mark.parametrize("name", CAPTURES)
def test_tables_by_name(name):
    assert [table.signature for table in acpi.parse_tables(tables(name))] == CAPTURES[name]


def test_files_are_those_that_firmware_measured():
    """The log is of another boot in the same shape than the capture, and was measured by OVMF, not by us."""
    files = acpi.acpi_files(tables("q35-2cpu-3g"))
    measured = [event[3] for event in LOG if event[1] == "EV_PLATFORM_CONFIG_FLAGS"]
    assert [digest(item) for item in (files.loader, files.rsdp, files.tpm_log, files.tables)] == measured


def test_commands_are_well_formed():
    loader = acpi.acpi_files(tables("tdx-8cpu-16g")).loader
    assert len(loader) == 4096
    kinds = [struct.unpack_from("<I", loader, at)[0] for at in range(0, len(loader), 128)]
    used = kinds.index(0)
    assert kinds[:used] == [1, 1, 3, 2, 2, 2, 3, 3, 3, 3, 2, 2, 2, 2, 3, 2, 3]
    assert not any(loader[used * 128 :])


def header(signature: str, length: int, checksum: int = 0) -> bytes:
    return signature.encode() + struct.pack("<IBB6s", length, 1, checksum, b"BOCHS ").ljust(length - 4, b"\0")


def file(*names: str, **lengths: int) -> bytes:
    listed = len(names) - 3
    sizes = {"FACS": 64, "FACP": 244, "RSDT": 36 + 4 * listed} | lengths
    return acpi.pad_tables(b"".join(header(name, sizes.get(name, 60)) for name in names))


PLAIN = ("FACS", "DSDT", "FACP", "APIC", "MCFG", "WAET", "RSDT")


def test_a_made_file_is_taken():
    assert [item.signature for item in acpi.parse_tables(file(*PLAIN))] == list(PLAIN)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "acpi.length"),
        (file(*PLAIN)[:-1], "acpi.length"),
        (bytes(acpi.TABLES_ALIGNMENT * 17), "acpi.length"),
        (bytes(acpi.TABLES_ALIGNMENT), "acpi.order"),
        (file("FACS", "DSDT", "FACP", "APIC", "SSDT", "RSDT"), "acpi.unknown_table"),
        (file("FACS", "DSDT", "FACP", "APIC", "OEM1", "RSDT"), "acpi.unknown_table"),
        (file("FACS", "DSDT", "FACP", "APIC", "DSDT", "RSDT"), "acpi.unknown_table"),
        (file("FACS", "FACP", "DSDT", "APIC", "RSDT"), "acpi.order"),
        (file("FACS", "DSDT", "FACP", "APIC", "RSDT", "WAET"), "acpi.order"),
        (file(*PLAIN, RSDT=36), "acpi.rsdt"),
        (file(*PLAIN, RSDT=36 + 4 * 5), "acpi.rsdt"),
        (file(*PLAIN, RSDT=36 + 4 * 4 + 1), "acpi.rsdt"),
        (file(*PLAIN)[:-1] + b"\1", "acpi.trailing"),
        (file(*PLAIN).replace(header("WAET", 60), header("WAET", 60, 7)), "acpi.checksum"),
        (b"FACS" + b"\xff" * 60 + file(*PLAIN)[64:], "acpi.length"),
        (b"FACS" + struct.pack("<I", 8) + file(*PLAIN)[8:], "acpi.length"),
    ],
)
def test_refusals(data, code):
    with pytest.raises(FormatError) as caught:
        acpi.parse_tables(data)
    assert caught.value.code == code


def test_many_tables_make_more_pages_of_commands():
    names = (
        "FACS",
        "DSDT",
        "FACP",
        "APIC",
        *(name for name in acpi.KNOWN if name not in PLAIN),
        "MCFG",
        "WAET",
        "RSDT",
    )
    files = acpi.acpi_files(file(*names))
    assert len(files.loader) % 4096 == 0
    assert files.tpm_log == bytes(65536)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_arbitrary_bytes_give_tables_or_a_refusal(noise, at):
    data = bytearray(file(*PLAIN))
    data[at : at + len(noise)] = noise
    try:
        acpi.acpi_files(bytes(data))
    except FormatError as err:
        assert err.code.startswith("acpi.")
