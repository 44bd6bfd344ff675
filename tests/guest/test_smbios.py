"""SMBIOS tables: real ones, and bytes from anywhere."""

import shutil
import struct
import subprocess

import pytest
from guest_machine import INJECTED, SMBIOS
from hypothesis import given
from hypothesis import strategies as st

from countermark.errors import FormatError
from countermark_appliance.guest.smbios import oem_strings


def test_strings_of_type_11():
    assert oem_strings(SMBIOS) == ()
    assert oem_strings(INJECTED) == (b"io.systemd.stub.kernel-cmdline-extra=init=/bin/sh", b"second")


@pytest.mark.skipif(shutil.which("dmidecode") is None, reason="dmidecode is not installed")
def test_dmidecode_reads_the_same(tmp_path):
    """`dmidecode --from-dump`: an entry point at 0, the table at 32 (dmidecode(8))."""
    checksum = bytearray(b"_SM3_\x00\x18\x03\x02\x00\x01\x00" + struct.pack("<IQ", len(INJECTED), 32))
    checksum[5] = -sum(checksum) % 256
    dump = tmp_path / "dump"
    dump.write_bytes(bytes(checksum).ljust(32, b"\0") + INJECTED)
    shown = subprocess.run(
        ["dmidecode", "-t", "11", "--from-dump", dump], capture_output=True, text=True, check=True
    ).stdout
    for text in oem_strings(INJECTED):
        assert text.decode() in shown


@pytest.mark.parametrize(
    "table", [b"\x0b", INJECTED[:3], b"\x0b\x03\0\0\0\0", INJECTED[:-9], b"\x0b\x05\0\0\x01text", bytes(1 << 21)]
)
def test_malformed(table):
    with pytest.raises(FormatError) as refused:
        oem_strings(table)
    assert refused.value.code == "smbios.malformed"


@given(st.binary(max_size=300))
def test_any_bytes_give_strings_or_a_refusal(table):
    try:
        found = oem_strings(table)
    except FormatError:
        return
    assert all(text and b"\0" not in text for text in found)


@given(st.lists(st.binary(min_size=1, max_size=20).filter(lambda text: b"\0" not in text), min_size=1, max_size=4))
def test_what_is_put_in_is_found(texts):
    table = SMBIOS[:13] + bytes((11, 5, 1, 0, len(texts))) + b"".join(text + b"\0" for text in texts) + b"\0"
    assert oem_strings(table + SMBIOS[13:]) == tuple(texts)
