"""The TD hand-off block (HOB): what QEMU tells a TD's firmware about memory, measured first into RTMR0.

UEFI Platform Initialization specification 1.8, volume 3, section 5: a hand-off information HOB (56 bytes), then a
resource descriptor HOB (48 bytes) for each range of memory. edk2 (`SecTdxHelper.c`, `TdxMeasureTdHob`, stable tag
202502) hashes from the first of them up to the end-of-list HOB, which is left out.

QEMU (`hw/i386/tdvf-hob.c` and `target/i386/kvm/tdx.c`, 10.1) writes: version 9, everything else of the hand-off zero
but the end of the list; then the memory in order of address, cut at the temporary memory and TD HOB sections of the
firmware, which the VMM has added (type 0, system memory); the rest is type 7, unaccepted. Every attribute is 7:
present, initialized, tested. Ranges are not joined again.

Memory of the q35 machine (`hw/i386/pc_q35.c`): up to 2.75 GiB lies below 4 GiB; of more, 2 GiB lie below and the rest
begins at 4 GiB, also beyond 1 TiB on the Intel processors that have TDX. `max-ram-below-4g` can lower that limit.
i440fx has other limits and no use here.
"""

from __future__ import annotations

import struct
from typing import Final

from countermark.errors import FormatError
from countermark_measurements.tdvf import SectionKind, Tdvf

ABOVE: Final = 1 << 32
MAX_MEMORY_BYTES: Final = 1 << 46
_SPLIT_FROM: Final = 0xB0000000
_LOW_WHEN_SPLIT: Final = 0x80000000
_SYSTEM_MEMORY: Final = 0
_UNACCEPTED: Final = 7
_ATTRIBUTES: Final = 7
_END_OF_LIST_BYTES: Final = 8


def memory_ranges(memory_bytes: int, *, max_below_4g: int = ABOVE) -> tuple[tuple[int, int], ...]:
    """Start and length of each range of a q35 machine's memory. Raises `FormatError` `shape.memory`."""
    if not 0 < memory_bytes <= MAX_MEMORY_BYTES or memory_bytes % 4096:
        message = f"memory: expected whole pages and at most {MAX_MEMORY_BYTES} bytes, got {memory_bytes}"
        raise FormatError(message, code="shape.memory")
    limit = min(_LOW_WHEN_SPLIT if memory_bytes >= _SPLIT_FROM else _SPLIT_FROM, max_below_4g)
    if memory_bytes < limit:
        return ((0, memory_bytes),)
    above = memory_bytes - limit
    return ((0, limit), (ABOVE, above)) if above else ((0, limit),)


def td_hob(tdvf: Tdvf, ranges: tuple[tuple[int, int], ...]) -> bytes:
    """The measured bytes of the TD HOB for this firmware and this memory.

    Raises `FormatError` `shape.memory` when a section of the firmware lies outside the memory.
    """
    free = list(ranges)
    added = [
        (section.address, section.size)
        for section in tdvf.sections
        if section.kind in (SectionKind.TD_HOB, SectionKind.TEMP_MEM)
    ]
    for address, size in added:
        within = [item for item in free if item[0] <= address and address + size <= item[0] + item[1]]
        if len(within) != 1:
            message = f"memory: expected room for the firmware's section at {address:#x}, {size:#x} bytes"
            raise FormatError(message, code="shape.memory")
        start, length = within[0]
        free.remove(within[0])
        rest = ((start, address - start), (address + size, start + length - address - size))
        free += [item for item in rest if item[1]]
    resources = [(*item, _UNACCEPTED) for item in free] + [(*item, _SYSTEM_MEMORY) for item in added]
    body = b"".join(
        struct.pack("<HHI16sIIQQ", 3, 48, 0, bytes(16), kind, _ATTRIBUTES, start, length)
        for start, length, kind in sorted(resources)
    )
    end = tdvf.only(SectionKind.TD_HOB).address + 56 + len(body) + _END_OF_LIST_BYTES
    return struct.pack("<HHIII", 1, 56, 0, 9, 0) + bytes(32) + struct.pack("<Q", end) + body
