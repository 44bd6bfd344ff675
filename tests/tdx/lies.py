"""What a simulated vendor or host can say falsely, signed by the keys that would really have to sign it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from countermark import x509chain
from countermark.formats.quote import (
    EnclaveReport,
    encode_enclave_report,
    encode_quote,
    encode_signed_part,
    parse_quote,
)
from countermark.policy import Policy
from countermark.tdx.endorsements import parse_endorsements, verify_endorsements
from countermark.tdx.quote import Platform, verify_quote, verify_root
from countermark_appliance.platform import sim
from countermark_appliance.platform.sim import intel
from countermark_appliance.platform.sim.intel import Collateral
from countermark_appliance.platform.sim.issue import Issued, issue
from countermark_appliance.platform.sim.machine import SimPlatform, TdLaunch
from countermark_appliance.platform.sim.state import State
from sim_evidence import NOW, code_folder, machine, policy_for

Change = Callable[[dict[str, Any]], Any]


def nothing(_value: dict[str, Any]) -> None:
    """Leave it as it is."""


def collateral(
    *, tcb_info: Change = nothing, qe_identity: Change = nothing, state: State | None = None, **says: Any
) -> bytes:
    """The vendor's endorsements after a change of what it signs; `says` are `Collateral` fields."""
    vendor = (state or machine()).vendor
    members = json.loads(intel.collateral_json(vendor, Collateral(**{"issued": NOW - 3600, **says})))
    for name, change in (("tcb_info", tcb_info), ("qe_identity", qe_identity)):
        value = json.loads(members[name])
        change(value)
        members[name] = json.dumps(value, separators=(",", ":"))
        members[f"{name}_signature"] = intel.sign_raw(vendor.tcb_signing.key, members[name].encode()).hex()
    return json.dumps(members).encode()


def edited(data: bytes, **members: Any) -> bytes:
    """The endorsements with members replaced (None: removed) and nothing signed again."""
    values = json.loads(data) | members
    return json.dumps({name: value for name, value in values.items() if value is not None}).encode()


def with_pck(
    *,
    name: str = "SGX PCK Certificate",
    ca: Issued | None = None,
    sgx: x509.UnrecognizedExtension | None = None,
    **keywords: Any,
) -> State:
    """A machine with another PCK certificate (`name`, SGX extension) or platform CA of the same vendor."""
    state = machine()
    issuer = ca or state.vendor.pck_ca
    times = {"not_before": NOW - 3600, "not_after": NOW + 90 * 86_400}
    extensions = (sgx or intel.sgx_extension(), *keywords.pop("extensions", ()))
    pck = issue(name, issuer, **times, curve=ec.SECP256R1(), ca=False, extensions=extensions, **keywords)
    return replace(state, vendor=replace(state.vendor, pck=pck, pck_ca=issuer))


def with_pck_ca(name: str) -> State:
    """A machine whose PCK certificate comes from a CA of that name, under the same root."""
    times = {"not_before": NOW - 3600, "not_after": NOW + 90 * 86_400}
    ca = issue(name, machine().vendor.root, **times, curve=ec.SECP256R1(), ca=True, path_length=0)
    return with_pck(ca=ca)


def booted(launch: TdLaunch | None = None, state: State | None = None) -> SimPlatform:
    return sim.boot(state or machine(), launch or TdLaunch(), roots=[code_folder()])


def quote_of(
    launch: TdLaunch | None = None,
    *,
    qe: Callable[[EnclaveReport], EnclaveReport] = lambda report: report,
    state: State | None = None,
    **body: bytes,
) -> bytes:
    """A quote with another TD report or QE report, each signed as the machine would."""
    state = state or machine()
    platform = booted(launch, state)
    parsed = parse_quote(platform.quote(bytes(64)))
    parsed = replace(parsed, body=replace(parsed.body, **body), qe_report=qe(parsed.qe_report))
    return encode_quote(
        replace(
            parsed,
            signature=intel.sign_raw(platform._attestation_key, encode_signed_part(parsed.header, parsed.body)),
            qe_report_signature=intel.sign_raw(state.vendor.pck.key, encode_enclave_report(parsed.qe_report)),
        )
    )


def appraised(quote: bytes, endorsements: bytes, policy: Policy | None = None, *, now: int = NOW) -> Platform:
    """Steps 1 to 3."""
    policy = policy or policy_for(machine())
    parsed, vendor = parse_quote(quote), parse_endorsements(endorsements)
    verify_root(parsed, policy)
    verify_endorsements(vendor, policy, now=now)
    return verify_quote(quote, parsed, vendor, policy, now=now)


def second_opinion(quote: bytes, endorsements: bytes) -> tuple[str, frozenset[str]] | str:
    """What dcap-qvl makes of it: status and advisories, or why it refuses."""
    root = x509chain.parse_pem_chain(parse_quote(quote).pck_chain_pem, "quote")[-1]
    verifier = dcap_qvl.QuoteVerifier(root.public_bytes(Encoding.DER))
    try:
        found = verifier.verify_with_policy(
            quote,
            dcap_qvl.QuoteCollateralV3.from_json(endorsements.decode()),
            NOW,
            dcap_qvl.QuotePolicy.claims_only(NOW),
        )
    except ValueError as err:
        return str(err)
    tcb = json.loads(found.to_json())["tcb"]
    return tcb["status"], frozenset(tcb["advisory_ids"])
