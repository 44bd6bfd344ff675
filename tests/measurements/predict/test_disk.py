"""GPT and FAT: disks made by sgdisk, mkfs.vfat and mtools, our own small ones, and hostile changes of both."""

import hashlib
import struct
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark_measurements.fat import read_files
from countermark_measurements.gpt import read_gpt
from measurements.predict.artefacts import ESP, fat16, gpt_disk, image, unpacked

LONG = "EFI/a long name with spaces.credential"


def lines(count: int) -> bytes:
    return "".join(f"{number}\n" for number in range(1, count + 1)).encode()


@pytest.mark.parametrize("kind", ["fat12", "fat16", "fat32"])
def test_volumes_of_other_tools(kind):
    assert read_files(unpacked(kind)) == {
        "EFI/BOOT/BOOTX64.EFI": lines(700),
        LONG: lines(20),
        "EFI/Empty/": b"",
        "empty.txt": b"",
    }


def test_own_volume():
    files = {"EFI/BOOT/BOOTX64.EFI": b"x" * 5000, "EFI/OTHER.TXT": b"y", "TOP": b"z" * 512}
    assert read_files(fat16(files)) == files


def code_of(call) -> str:
    with pytest.raises(FormatError) as caught:
        call()
    return caught.value.code


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


FILES = {"A.TXT": b"a" * 1500, "B.TXT": b"b" * 600}
VOLUME = fat16(FILES)
FAT_AT, ROOT_AT = 512, 129 * 512


@pytest.mark.parametrize(
    ("at", "new", "code"),
    [
        (510, b"\0\0", "fat.boot_sector"),
        (11, struct.pack("<H", 1024), "fat.boot_sector"),
        (13, b"\3", "fat.boot_sector"),
        (13, b"\0", "fat.boot_sector"),
        (14, b"\0\0", "fat.boot_sector"),
        (16, b"\3", "fat.boot_sector"),
        (17, struct.pack("<H", 8), "fat.boot_sector"),
        (19, struct.pack("<H", 65535), "fat.boot_sector"),
        (22, struct.pack("<H", 2), "fat.boot_sector"),
        (FAT_AT + 4, struct.pack("<H", 2), "fat.chain"),  # A: cluster 2 follows itself
        (FAT_AT + 4, struct.pack("<H", 0), "fat.chain"),
        (FAT_AT + 4, struct.pack("<H", 5), "fat.chain"),  # into B
        (FAT_AT + 6, struct.pack("<H", 0xFFFF), "fat.chain"),  # A is shorter than it says
        (ROOT_AT + 28, struct.pack("<I", 5000), "fat.chain"),
        (ROOT_AT + 28, struct.pack("<I", 1 << 31), "fat.chain"),
        (ROOT_AT + 26, struct.pack("<H", 60000), "fat.chain"),
        (ROOT_AT, b"B", "fat.names"),  # two files of one name
        (ROOT_AT, b"/", "fat.names"),
        (ROOT_AT, b"\x80", "fat.names"),
    ],
)
def test_hostile_volumes(at, new, code):
    assert read_files(VOLUME) == FILES
    assert code_of(lambda: read_files(patched(VOLUME, at, new))) == code


def test_a_directory_in_itself_is_refused():
    volume = fat16({"D/A.TXT": b"a"})
    at = volume.index(b"A       TXT", ROOT_AT)
    loop = patched(patched(volume, at + 11, b"\x10"), at + 26, volume[ROOT_AT + 26 : ROOT_AT + 28])
    assert code_of(lambda: read_files(loop)) == "fat.chain"


def test_broken_long_names_are_refused():
    volume = unpacked("fat16")
    at = volume.index("a lon".encode("utf-16-le")) - 1
    for offset, new in ((0, b"\x02"), (13, b"\0"), (1, b"/\0"), (1, b"\0\xd8")):
        assert code_of(lambda o=offset, n=new: read_files(patched(volume, at + o, n))) == "fat.names"


def test_too_many_files_are_refused():
    many = fat16({f"F{number}": b"" for number in range(500)} | {f"D/F{number}": b"" for number in range(600)})
    assert code_of(lambda: read_files(many)) in ("fat.names", "fat.chain")


def test_table_of_sgdisk(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(unpacked("gpt"))
    gpt = read_gpt(path)
    assert [(p.number, p.name, p.start // 512, p.size // 512) for p in gpt.partitions] == [
        (1, "esp", 40, 2048),
        (3, "countermark-root", 4096, 905),
    ]
    assert gpt.system.unique == UUID("11111111-2222-3333-4444-555555555555")
    disk = path.read_bytes()
    entries = disk[1024 : 1024 + 128] + disk[1024 + 256 : 1024 + 384]
    assert gpt.event == disk[512 : 512 + 92] + struct.pack("<Q", 2) + entries


def test_own_disk(tmp_path):
    gpt = read_gpt(image(tmp_path / "disk"))
    assert [item.name for item in gpt.partitions] == ["esp", "countermark-root"]
    assert len(gpt.event) == 92 + 8 + 2 * 128


def test_hostile_tables(tmp_path):
    path = tmp_path / "disk"
    good = unpacked("gpt")
    size = len(good)
    changes = [
        (0, b"\1", None),  # boot code: nobody's business
        (446 + 4, b"\x83", "gpt.mbr"),
        (462, b"\1", "gpt.mbr"),
        (510, b"\0", "gpt.mbr"),
        (512, b"X", "gpt.header"),
        (512 + 16, b"\1", "gpt.crc"),
        (512 + 100, b"\1", "gpt.header"),
        (512 + 40, b"\1", "gpt.crc"),
        (1024 + 56, b"X", "gpt.crc"),
        (1024 + 4096, b"\1", "gpt.crc"),
        (size - 512, b"X", "gpt.header"),
        (size - 33 * 512, b"\0", "gpt.crc"),
    ]
    for at, new, code in changes:
        path.write_bytes(patched(good, at, new))
        if code is None:
            read_gpt(path)
        else:
            assert code_of(lambda: read_gpt(path)) == code, (at, code)
    for data, code in ((good[:-512], "gpt.header"), (good + bytes(512), "gpt.header"), (good + b"\0", "gpt.size")):
        path.write_bytes(data)
        assert code_of(lambda: read_gpt(path)) == code
    path.write_bytes(b"")
    assert code_of(lambda: read_gpt(path)) == "gpt.size"


def test_overlap_and_two_system_partitions_are_refused(tmp_path):
    two = gpt_disk(tmp_path / "two", [(ESP, UUID(int=1), "a", b"x"), (ESP, UUID(int=2), "b", b"y")])
    assert code_of(lambda: read_gpt(two).system) == "gpt.system"
    none = gpt_disk(tmp_path / "none", [(UUID(int=9), UUID(int=1), "a", b"x")])
    assert code_of(lambda: read_gpt(none).system) == "gpt.system"


def test_the_event_is_what_a_real_firmware_measured():
    """UEFI_GPT_DATA of a genuine log: its digest is that of its data, whose parts are header, count and entries."""
    from countermark.formats.tpm_log import parse_tpm_log
    from measurements.predict.artefacts import ROOT

    log = parse_tpm_log((ROOT / "tests/data/tpmlog/binary_bios_measurements.bin").read_bytes())
    event = next(item for item in log.events if item.event_type == 0x80000006)
    assert event.digests["sha384"] == hashlib.sha384(event.data).digest()
    count = struct.unpack_from("<Q", event.data, 92)[0]
    assert len(event.data) == 92 + 8 + 128 * count


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200 * 512), st.binary(min_size=1, max_size=40))
def test_arbitrary_changes_of_a_volume_give_files_or_a_refusal(at, noise):
    try:
        files = read_files(patched(VOLUME, at, noise))
    except FormatError as err:
        assert err.code.startswith("fat.")
    else:
        assert sum(len(content) for content in files.values()) <= len(VOLUME)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=40))
def test_arbitrary_changes_of_a_table_are_refused_or_leave_it_as_it_was(tmp_path, at, noise):
    """Only the boot code and the disk signature of the first sector may change unseen."""
    good = unpacked("gpt")
    path = tmp_path / "disk"
    path.write_bytes(good)
    wanted = read_gpt(path)
    path.write_bytes(patched(good, at, noise))
    try:
        assert read_gpt(path) == wanted
    except FormatError as err:
        assert err.code.startswith("gpt.")
