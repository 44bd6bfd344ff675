"""TD attributes, XFAM and module: every bit of the attributes, and the fields only TD 1.5 has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from countermark.errors import MeasurementError
from countermark.formats.quote import TdReport, parse_quote
from countermark.tdx.td import verify_td
from countermark_appliance.platform import sim
from countermark_appliance.platform.sim.machine import TdLaunch
from sim_evidence import machine, policy_for

SEPT_VE_DISABLE = 28
NAMED = {
    0: "tdx.debug",
    4: "tdx.profiling",
    5: "tdx.profiling",
    6: "tdx.profiling",
    29: "tdx.migratable",
    30: "tdx.pks",
    31: "tdx.key_locker",
    63: "tdx.perfmon",
    **dict.fromkeys((16, 17, 27, 62), "tdx.attribute"),
}


@pytest.fixture(scope="module")
def report() -> TdReport:
    return parse_quote(sim.boot(machine(), TdLaunch(version=5), roots=[]).quote(bytes(64))).body


def refusal(report: TdReport) -> str:
    with pytest.raises(MeasurementError) as err:
        verify_td(report, policy_for(machine()))
    assert err.value.step == "4"
    return err.value.code


def test_the_good_one_passes(report: TdReport) -> None:
    assert verify_td(report, policy_for(machine()))


@pytest.mark.parametrize("bit", [bit for bit in range(64) if bit != SEPT_VE_DISABLE])
def test_no_other_attribute_bit_may_be_set(report: TdReport, bit: int) -> None:
    attributes = (1 << SEPT_VE_DISABLE | 1 << bit).to_bytes(8, "little")
    assert refusal(replace(report, td_attributes=attributes)) == NAMED.get(bit, "tdx.reserved")


def test_xfam_keeps_to_the_fixed_bits(report: TdReport) -> None:
    # Fixed bits as in Google's go-tdx-guest (XFAM_FIXED0, XFAM_FIXED1), an independent reading of Intel's table.
    fixed_0, fixed_1 = 0x0006DBE7, 0x00000003
    for bit in range(64):
        for base in (fixed_1, fixed_0):
            value = base ^ (1 << bit)
            good = value & fixed_1 == fixed_1 and value & ~fixed_0 == 0
            changed = replace(report, xfam=value.to_bytes(8, "little"))
            if good:
                assert verify_td(changed, policy_for(machine()))
            else:
                assert refusal(changed) == "tdx.xfam"


def test_the_running_module_is_not_older_than_the_one_at_launch(report: TdReport) -> None:
    def at(minor: int, major: int) -> bytes:
        return bytes((minor, major)) + bytes(14)

    launched = replace(report, tee_tcb_svn=at(6, 1))
    for current in (at(6, 1), at(7, 1), at(0, 2)):
        assert verify_td(replace(launched, tee_tcb_svn2=current), policy_for(machine()))
    for current in (at(5, 1), at(9, 0)):
        assert refusal(replace(launched, tee_tcb_svn2=current)) == "tdx.tee_tcb_svn2"
