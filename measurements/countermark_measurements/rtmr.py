"""The events of a boot in a TD: what OVMF, systemd-stub and Linux extend into RTMR0 to RTMR2, in the log's order.

RTMR0, seen in genuine CCEL logs and reproduced from vectors (tests/measurements/predict): TD HOB, configuration
firmware volume, Secure Boot variables, separator, ACPI loader commands, root pointer and tables, BootOrder, Boot####.

RTMR1 and RTMR2 of a boot from disk are **derived from source alone and were never seen on hardware** by this project:

- OVMF's `TdTcg2Dxe.c` (edk2 stable tag 202502) maps PCR 1 and 7 to RTMR0, 2 to 6 to RTMR1, 8 to 15 to RTMR2
  (UEFI 2.10 section 38.4.1). OnReadyToBoot measures the boot variables, "Calling EFI Application", and one separator,
  into RTMR1 alone; a TPM gets one for each PCR 0 to 6. OnExitBootServices measures its two actions into RTMR1. Nothing
  of PCR 0 is measured: MRTD covers it.
- `DxeTpm2MeasureBootLib.c` measures the partition table and each loaded PE image through the confidential-computing
  measurement protocol where there is one, into the registers for PCR 5 and 4: RTMR1.
- systemd-stub 257.13, `measure.c`: `tpm_log_ipl_event` measures through that protocol (`cc_log_event`) and then through
  TCG2 where it exists: each section's name and content into the register for PCR 11, RTMR2, as EV_IPL. Its tagged
  events (addons with an initrd, microcode or device tree, and profiles) go to a TPM alone (`tpm_log_tagged_event`); in
  a TD such an addon shows as an image in RTMR1 and in the initrd's digest in RTMR2.
- Linux's EFI stub (`efi_measure_tagged_event`, since 6.9) uses TCG2 where it exists and else that protocol: command
  line and initrd into the register for PCR 9, RTMR2. Seen in genuine logs of dstack.

Not predicted: any event after ExitBootServices; RTMR3 is `formats.boot_events`.
"""

from __future__ import annotations

from countermark.formats import eventlog
from countermark_measurements import efivar, pcr
from countermark_measurements.acpi import AcpiFiles
from countermark_measurements.efivar import Variable
from countermark_measurements.gpt import Gpt
from countermark_measurements.pcr import Measured
from countermark_measurements.shape import LaunchShape
from countermark_measurements.tdhob import memory_ranges, td_hob
from countermark_measurements.tdvf import SectionKind, Tdvf
from countermark_measurements.uki import Uki


def rtmr0_events(
    tdvf: Tdvf, *, ranges: tuple[tuple[int, int], ...], acpi: AcpiFiles, boot: tuple[Variable, ...], qemu: str = ""
) -> tuple[Measured, ...]:
    """RTMR0 of a TD with this firmware, memory, ACPI files and boot variables. Raises `FormatError` `shape.memory`."""
    hob, blob = eventlog.EV_EFI_HANDOFF_TABLES2, eventlog.EV_EFI_PLATFORM_FIRMWARE_BLOB2
    return (
        pcr.measured(1, hob, td_hob(tdvf, ranges), "launch", "TD hand-off block: the memory"),
        pcr.measured(1, blob, tdvf.only(SectionKind.CFV).data, "firmware", "configuration firmware volume"),
        *pcr.secure_boot_events(),
        *pcr.acpi_events(acpi, qemu),
        *pcr.boot_variable_events(boot),
    )


def td_events(tdvf: Tdvf, shape: LaunchShape, gpt: Gpt, uki: Uki) -> tuple[Measured, ...]:
    """Every event of a boot from disk, in the order of the log. Raises `FormatError` `shape.memory`."""
    return (
        *rtmr0_events(
            tdvf,
            ranges=memory_ranges(shape.memory_bytes, max_below_4g=shape.max_below_4g),
            acpi=shape.acpi,
            boot=efivar.boot_variables(shape.disks, shape.booted),
            qemu=shape.qemu_version,
        ),
        pcr.action(4, pcr.CALLING),
        pcr.separator(4, "separator (RTMR1)"),
        *pcr.loading_events(gpt, uki),
        *pcr.exit_events(),
    )
