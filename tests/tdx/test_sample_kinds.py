"""The kinds of synthetic quotes and endorsements that dcap-qvl's own sample generator makes, made by our simulated
vendor: each is accepted or refused with a code that names what is wrong.

The kinds (names as in Phala-Network/dcap-qvl, cli/src/bin/generate_all_samples.rs, 2026) are facts of that public file;
none of its code or data is here. Its SGX kinds are built as TDX ones where that makes sense. Where that library accepts
what we refuse, the row says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lies
import pytest

from countermark.errors import CountermarkError
from countermark.formats.quote import TdAttributes, encode_quote, parse_quote
from countermark.tdx.td import verify_td
from countermark_appliance.platform.sim import intel
from countermark_appliance.platform.sim.machine import TdLaunch
from sim_evidence import NOW, machine, policy_for

DAY_S = 86_400
ONE_ONE = bytes(31) + b"\1" + bytes(31) + b"\1"


def appraised(quote: bytes, endorsements: bytes) -> None:
    """Steps 1 to 4."""
    lies.appraised(quote, endorsements)
    verify_td(parse_quote(quote).body, policy_for(machine()))


def with_attributes(*bits: int) -> bytes:
    value = TdAttributes.SEPT_VE_DISABLE | sum(1 << bit for bit in bits)
    return lies.quote_of(td_attributes=int(value).to_bytes(8, "little"))


def with_bytes(offset: int, value: bytes) -> bytes:
    quote = lies.quote_of()
    return quote[:offset] + value + quote[offset + len(value) :]


def with_parts(**parts: bytes) -> bytes:
    return encode_quote(replace(parse_quote(lies.quote_of()), **parts))


def with_chain_type(kind: int) -> bytes:
    quote = lies.quote_of()
    at = quote.index(b"-----BEGIN") - 6
    return quote[:at] + kind.to_bytes(2, "little") + quote[at + 2 :]


def tcb(change: Callable[[dict[str, Any]], Any]) -> bytes:
    return lies.collateral(tcb_info=change)


def enclave(**members: Any) -> bytes:
    return lies.collateral(qe_identity=lambda value: value.update(members))


def dates(name: str, issued: int, until: int) -> bytes:
    def change(value: dict[str, Any]) -> None:
        value |= {"issueDate": intel._iso(NOW + issued), "nextUpdate": intel._iso(NOW + until)}

    changes: dict[str, Any] = {name: change}
    return lies.collateral(**changes)


def component_levels(name: str, *svns: int) -> bytes:
    components = [{"svn": svn} for svn in (*svns, *[0] * (16 - len(svns)))]
    return tcb(lambda value: value["tcbLevels"][0]["tcb"].update({name: components}))


def module(**members: Any) -> bytes:
    return tcb(lambda value: value["tdxModuleIdentities"][0].update(members))


def module_level(svn: int) -> list[dict[str, Any]]:
    return [{"tcb": {"isvsvn": svn}, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": "UpToDate"}]


def signed_by_ca(name: str) -> bytes:
    """The document's chain starts with a CA, whose signature over it verifies."""
    vendor, members = machine().vendor, json.loads(lies.collateral())
    members[f"{name}_issuer_chain"] = vendor.pck_ca.pem + vendor.root.pem
    members[f"{name}_signature"] = intel.sign_raw(vendor.pck_ca.key, members[name].encode()).hex()
    return json.dumps(members).encode()


def edited(**members: Any) -> bytes:
    return lies.edited(lies.collateral(), **members)


def quote_td15(running: int) -> bytes:
    svn = bytes(intel.TDX_TCB)
    return lies.quote_of(TdLaunch(version=5), tee_tcb_svn=svn, tee_tcb_svn2=bytes((running,)) + svn[1:])


GOOD = lies.quote_of
FINE = lies.collateral
Kind = tuple[str, str, Callable[[], bytes], Callable[[], bytes]]
KINDS: list[Kind] = [
    ("valid_tdx_v4", "", GOOD, FINE),
    ("valid_tdx_v5_td15", "", lambda: quote_td15(intel.TDX_TCB[0]), FINE),
    ("tdx_module_mrsigner_mismatch", "tcb.module", GOOD, lambda: module(mrsigner="03" * 48)),
    ("tdx_module_isvsvn_too_low", "tcb.module", GOOD, lambda: module(tcbLevels=module_level(intel.TDX_TCB[0] + 1))),
    ("tdx_td15_svn2_unappraisable", "tcb.module", lambda: quote_td15(0), lambda: module(tcbLevels=module_level(1))),
    ("tdx_debug_enabled", "tdx.debug", lambda: with_attributes(0), FINE),
    ("tdx_sept_ve_disabled", "tdx.sept_ve_disable", lambda: lies.quote_of(td_attributes=bytes(8)), FINE),
    *((f"tdx15_attribute_{bit} (accepted there)", code, lambda bit=bit: with_attributes(bit), FINE) for bit, code in (
        *((bit, "tdx.reserved") for bit in (18, 19, 20, 21, 22)),
        *((bit, "tdx.attribute") for bit in (16, 27, 62)),
        *((30, "tdx.pks"), (31, "tdx.key_locker"), (63, "tdx.perfmon")),
    )),
    ("tdx_profiling_enabled", "tdx.profiling", lambda: with_attributes(5), FINE),
    ("tdx_migratable", "tdx.migratable", lambda: with_attributes(29), FINE),
    ("tdx_servtd_ext_enabled", "tdx.attribute", lambda: with_attributes(17), FINE),
    ("tdx_reserved_bits_set", "tdx.reserved", lambda: with_attributes(23), FINE),
    ("invalid_quote_format", "quote.version", lambda: b"invalid quote data" * 40, FINE),
    ("truncated_quote", "quote.truncated", lambda: lies.quote_of()[:500], FINE),
    *((f"unsupported_version_{n}", "quote.version", lambda n=n: with_bytes(0, bytes((n, 0))), FINE)
        for n in (1, 2, 3, 6, 255)),
    *((f"unsupported_key_type_{n}", "quote.key_type", lambda n=n: with_bytes(2, bytes((n, 0))), FINE)
        for n in (0, 1, 3, 255)),
    ("sgx_quote", "quote.tee_type", lambda: with_bytes(4, bytes(4)), FINE),
    ("tcb_expired", "endorsements.expired", GOOD, lambda: dates("tcb_info", -2 * DAY_S, -DAY_S)),
    ("tcb_issue_date_future", "endorsements.not_yet_valid", GOOD, lambda: dates("tcb_info", DAY_S, 2 * DAY_S)),
    ("tcb_id_mismatch", "endorsements.malformed", GOOD, lambda: tcb(lambda value: value.update(id="SGX"))),
    ("invalid_tcb_json", "endorsements.json", GOOD, lambda: edited(tcb_info="INVALID JSON")),
    ("sgx_component_svn_mismatch", "tcb.no_level", GOOD, lambda: component_levels("sgxtcbcomponents", 4, 4, 3)),
    ("tdx_component_svn_mismatch", "tcb.no_level", GOOD, lambda: component_levels("tdxtcbcomponents", 0, 0, 4, 1)),
    ("component_svn_all_higher", "", GOOD, lambda: component_levels("sgxtcbcomponents")),
    ("short_tcb_chain", "endorsements.pem", GOOD, lambda: edited(tcb_info_issuer_chain="\n")),
    ("invalid_cert_format", "endorsements.pem", GOOD, lambda: edited(tcb_info_issuer_chain="INVALID_CERTIFICATE_DATA")),
    ("invalid_tcb_signature", "endorsements.signature", GOOD, lambda: edited(tcb_info_signature="00" * 64)),
    ("fmspc_mismatch", "tcb.fmspc", GOOD, lambda: tcb(lambda value: value.update(fmspc="FFFFFFFFFFFF"))),
    ("qe_report_hash_mismatch", "quote.qe_binding",
        lambda: lies.quote_of(qe=lambda report: replace(report, report_data=bytes(64))), FINE),
    ("invalid_qe_report_signature", "quote.qe_signature", lambda: with_parts(qe_report_signature=bytes(64)), FINE),
    ("invalid_quote_signature", "quote.signature", lambda: with_parts(signature=ONE_ONE), FINE),
    ("qe_identity_expired", "endorsements.expired", GOOD, lambda: dates("qe_identity", -2 * DAY_S, -DAY_S)),
    ("qe_identity_issue_date_future", "endorsements.not_yet_valid", GOOD, lambda: dates("qe_identity", 9, DAY_S)),
    ("invalid_qe_identity_json", "endorsements.json", GOOD, lambda: edited(qe_identity="not valid json {{{")),
    ("short_qe_identity_chain", "endorsements.pem", GOOD, lambda: edited(qe_identity_issuer_chain="\n")),
    ("invalid_qe_identity_signature", "endorsements.signature", GOOD, lambda: edited(qe_identity_signature="00" * 64)),
    ("qe_mrsigner_mismatch", "tcb.qe_identity", GOOD, lambda: enclave(mrsigner="FF" * 32)),
    ("qe_isvprodid_mismatch", "tcb.qe_identity", GOOD, lambda: enclave(isvprodid=999)),
    ("qe_miscselect_mismatch", "tcb.qe_identity", GOOD, lambda: enclave(miscselect="FFFFFFFF")),
    ("qe_attributes_mismatch", "tcb.qe_identity", GOOD,
        lambda: enclave(attributes="FF" * 16, attributesMask="FF" * 16)),
    ("qe_debug_enabled", "tcb.qe_identity",
        lambda: lies.quote_of(qe=lambda report: replace(report, attributes=b"\x17" + report.attributes[1:])), FINE),
    ("unknown_tcb_status", "endorsements.malformed", GOOD, lambda: tcb(lambda value: value.update(tcbLevels=[]))),
    ("revoked_platform_tcb", "tcb.status", GOOD, lambda: lies.collateral(status="Revoked")),
    ("revoked_qe_tcb", "tcb.status", GOOD, lambda: lies.collateral(qe_status="Revoked")),
    ("cert_type_5_with_pck_chain", "", GOOD,
        lambda: edited(pck_certificate_chain=machine().vendor.pck_chain_pem.decode())),
    ("cert_type_3_with_pck_chain (accepted there)", "quote.chain_type", lambda: with_chain_type(3),
        lambda: edited(pck_certificate_chain=machine().vendor.pck_chain_pem.decode())),
    ("cert_type_3_without_pck_chain", "quote.chain_type", lambda: with_chain_type(3), FINE),
    ("ca_used_as_end_entity_tcb", "endorsements.ca", GOOD, lambda: signed_by_ca("tcb_info")),
    ("ca_used_as_end_entity_qe", "endorsements.ca", GOOD, lambda: signed_by_ca("qe_identity")),
]  # fmt: skip


@pytest.mark.parametrize(("code", "quote", "endorsements"), [pytest.param(*kind[1:], id=kind[0]) for kind in KINDS])
def test_kind(code: str, quote: Callable[[], bytes], endorsements: Callable[[], bytes]) -> None:
    if not code:
        appraised(quote(), endorsements())
        return
    with pytest.raises(CountermarkError) as err:
        appraised(quote(), endorsements())
    assert err.value.code == code


def test_every_kind_is_a_change_of_one_that_passes() -> None:
    assert len({name for name, *_ in KINDS}) == len(KINDS) > 60
    appraised(lies.quote_of(), lies.collateral())
