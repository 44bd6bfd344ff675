"""What must be refused: one row for each lie a host, a relay or a thief of keys can tell, with its exact code.

Rows build evidence with the simulated machine and sign every lie properly again (see `sim_evidence`), unless the row is
about a broken signature. A row's step is the one its code belongs to; the coverage tests fail when a step, a claim, an
RTMR3 value or a field of the TD report has no row.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

import countermark
from countermark.appraise import Verdict, appraise
from countermark.checks import Status
from countermark.errors import CountermarkError, Undecidable
from countermark.formats import boot_events, eventlog, spdm
from countermark.formats.boot_events import BootEvents, GpuIdentity, GpuMode
from countermark.formats.evidence import Evidence, GpuEvidence, PlatformName, encode_evidence
from countermark.formats.quote import TdAttributes, TdReport, encode_quote, parse_quote, quote_digest
from countermark.formats.report_data import Claims, GpuFreshness, Purpose, encode_claims, keys_digest, parse_claims
from countermark.gpu.report import DICE_FWID
from countermark.numerics import CURRENT
from countermark.policy import Policy, Profile, Waiver, new_policy
from countermark_appliance.platform.keyring import Keyring
from countermark_appliance.platform.sim import intel, nvidia
from countermark_appliance.platform.sim import state as sim_state
from countermark_appliance.platform.sim.intel import Collateral
from countermark_appliance.platform.sim.issue import Issued, issue
from countermark_appliance.platform.sim.machine import SimPlatform, TdLaunch
from sim_evidence import (
    NOW,
    Scene,
    code_folder,
    edit_endorsements,
    machine,
    policy_for,
    resign,
    with_collateral,
    with_endorsements,
)

DAY_S = 86_400
PCK_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
OTHER = b"\x5a" * 32
Row = tuple[str, str, str, Callable[[], Verdict]]


def good() -> Any:
    return machine()


def launch(**values: Any) -> Verdict:
    return Scene(launch=TdLaunch(**values)).appraise()


def attributes(bits: int) -> Verdict:
    return launch(td_attributes=bits.to_bytes(8, "little"))


def says(**values: Any) -> Verdict:
    return Scene(state=with_collateral(good(), **values)).appraise()


def edited(**values: Any) -> Verdict:
    return Scene(state=edit_endorsements(good(), **values)).appraise()


def endorsed(data: bytes) -> Verdict:
    return Scene(state=with_endorsements(good(), data)).appraise()


def mixed(names: str, **values: Any) -> Verdict:
    """Good endorsements, but the members whose name starts with `names` come from others that say `values`."""
    others = json.loads(with_collateral(good(), **values).endorsements.tdx)
    return edited(**{name: value for name, value in others.items() if name.startswith(names)})


def signed_by(signer: Any) -> Verdict:
    data = intel.collateral_json(good().vendor, Collateral(issued=NOW - 3600), signer=signer)
    return Scene(state=with_endorsements(good(), data)).appraise()


def certificate(name: str, issuer: Any, *, start: int = -3600, end: int = DAY_S, extensions: Any = ()) -> Issued:
    times = {"not_before": NOW + start, "not_after": NOW + end}
    return issue(name, issuer, **times, curve=ec.SECP256R1(), ca=False, extensions=extensions)


def tcb_info(change: Callable[[dict[str, Any]], Any]) -> Verdict:
    """TCB info as the vendor would sign it after `change`."""
    members = json.loads(good().endorsements.tdx)
    value = json.loads(members["tcb_info"])
    change(value)
    text = json.dumps(value, separators=(",", ":"))
    return edited(tcb_info=text, tcb_info_signature=intel.sign_raw(good().vendor.tcb_signing.key, text.encode()).hex())


def flip(name: str, position: int = 0) -> Verdict:
    """One bit of a part of the encoded quote."""

    def bend(_platform: SimPlatform, quote: bytes) -> bytes:
        parsed = parse_quote(quote)
        part = getattr(parsed, name)
        part = part if isinstance(part, bytes) else b""
        at = quote.index(part) + position
        return quote[:at] + bytes((quote[at] ^ 1,)) + quote[at + 1 :]

    return Scene(quote=bend).appraise()


def quote_byte(position: int, bit: int = 1) -> Verdict:
    return Scene(quote=lambda _p, q: q[:position] + bytes((q[position] ^ bit,)) + q[position + 1 :]).appraise()


def body(**values: bytes) -> Verdict:
    return Scene(quote=lambda platform, quote: resign(platform, quote, **values)).appraise()


def claim(**values: Any) -> Verdict:
    return Scene(claims=lambda claims: replace(claims, **values)).appraise()


def boot(**values: Any) -> Verdict:
    return Scene(boot=lambda boot: replace(boot, **values)).appraise()


def events(change: Callable[[tuple[bytes, ...]], Any]) -> Verdict:
    return Scene(events=change).appraise()


def raw(change: Callable[[bytes], bytes]) -> Verdict:
    """Change the encoded evidence."""
    scene = Scene()
    return appraise(change(scene.encoded()), policy_for(scene.state), now=NOW, connection=scene.connection())


def after(change: Callable[[Evidence], Evidence]) -> Verdict:
    """Change the finished evidence; nothing is signed or extended again."""
    return Scene(evidence=change).appraise()


def ccel(change: Callable[[list[Any]], list[Any]]) -> Verdict:
    def bend(evidence: Evidence) -> Evidence:
        log = eventlog.parse_event_log(evidence.ccel)
        changed = replace(log, events=tuple(change(list(log.events))))
        return replace(evidence, ccel=eventlog.encode_event_log(changed))

    return after(bend)


def rtmr3_log(change: Callable[[list[Any]], list[Any]]) -> Verdict:
    def bend(evidence: Evidence) -> Evidence:
        log = eventlog.parse_event_log(evidence.rtmr3_log)
        changed = replace(log, events=tuple(change(list(log.events))))
        return replace(evidence, rtmr3_log=eventlog.encode_event_log(changed))

    return after(bend)


def extra_event(platform: SimPlatform, quote: bytes) -> bytes:
    # The register moved on after system-ready, the log did not: what malware that hides itself leaves behind.
    platform.extend_rtmr3(boot_events.EVENT_TYPE, b"more")
    rtmr3 = platform._rtmr3
    platform._events = platform._events[:-1]
    return resign(platform, quote, rtmr3=rtmr3)


def gpu(**values: Any) -> Verdict:
    """A GPU report made with other arguments of `nvidia.report`, over the right nonce."""
    state = good()

    def bend(_platform: SimPlatform, nonce: bytes) -> tuple[GpuEvidence, ...]:
        arguments = {"nonce": nonce, **values}
        chain = state.gpus[0].chain(state.gpu_vendor)
        return (GpuEvidence(report=nvidia.report(state.gpus[0], **arguments), certs=chain),)

    return Scene(gpus=bend).appraise()


def gpu_evidence(change: Callable[[GpuEvidence], GpuEvidence]) -> Verdict:
    """Change the GPU's evidence before it is digested into the claims."""
    return Scene(gpus=lambda platform, nonce: tuple(change(item) for item in platform.gpu_evidence(nonce))).appraise()


def swapped_gpu() -> Verdict:
    # Another genuine GPU of the same vendor answers, on a machine that measured its own.
    state = good()
    other = nvidia.make_gpu(state.gpu_vendor, now=NOW)

    def bend(_platform: SimPlatform, nonce: bytes) -> tuple[GpuEvidence, ...]:
        return (GpuEvidence(report=nvidia.report(other, nonce), certs=other.chain(state.gpu_vendor)),)

    return Scene(gpus=bend).appraise()


def one_gpu_twice() -> Verdict:
    state = machine(2)

    def bend(platform: SimPlatform, nonce: bytes) -> tuple[GpuEvidence, ...]:
        first = platform.gpu_evidence(nonce)[0]
        return (first, first)

    return Scene(state=state, gpus=bend).appraise()


def one_chip_twice() -> Verdict:
    # A second device key of the same boot ROM, as other firmware would have it, measured like a GPU of its own.
    state = good()
    first = state.gpus[0]
    fwid = first.device.certificate.extensions.get_extension_for_oid(DICE_FWID).value
    assert isinstance(fwid, x509.UnrecognizedExtension)
    times = {"not_before": NOW - 3600, "not_after": NOW + DAY_S}
    device = issue("other firmware", first.boot_rom, **times, curve=ec.SECP384R1(), ca=False, extensions=(fwid,))
    return Scene(state=replace(state, gpus=(first, replace(first, device=device)))).appraise(
        policy_for(state, gpu_count=2)
    )


def gpu_crls(crls: tuple[bytes, ...]) -> Verdict:
    state = good()
    return Scene(state=replace(state, endorsements=replace(state.endorsements, gpu_crls=crls))).appraise()


def foreign_gpu_vendor() -> nvidia.GpuVendor:
    return nvidia.make_gpu_vendor(now=NOW)


def policy(**changes: Any) -> Verdict:
    return Scene().appraise(policy_for(good(), **changes))


def production() -> Policy:
    return replace(new_policy(Profile.PRODUCTION, now=NOW), weights_roots=(OTHER,))


def replayed() -> Verdict:
    # Evidence a relay kept from an earlier challenge, on the same connection parameters.
    return Scene().appraise(nonce=OTHER)


def other_image_claimed() -> Verdict:
    return boot(image_id=OTHER)


def chain(*items: Issued) -> Verdict:
    """The quote with another PCK chain in its certification data, which no signature covers."""

    def bend(_platform: SimPlatform, quote: bytes) -> bytes:
        pem = "".join(item.pem for item in items).encode()
        return encode_quote(replace(parse_quote(quote), pck_chain_pem=pem))

    return Scene(quote=bend).appraise()


def pck(*, extension: bool = True, issuer: Issued | None = None, **times: int) -> Verdict:
    """The machine with another PCK certificate, issued by its vendor; `issuer` replaces the platform CA too."""
    vendor = good().vendor
    sgx = vendor.pck.certificate.extensions.get_extension_for_oid(PCK_EXTENSION).value
    issuer = issuer or vendor.pck_ca
    other = certificate("SGX PCK Certificate", issuer, extensions=(sgx,) if extension else (), **times)
    return Scene(state=replace(good(), vendor=replace(vendor, pck=other, pck_ca=issuer))).appraise()


def platform_ca(name: str) -> Issued:
    times = {"not_before": NOW - 3600, "not_after": NOW + DAY_S}
    return issue(name, good().vendor.root, **times, curve=ec.SECP256R1(), ca=True, path_length=0)


def report_without(kind: spdm.OpaqueType) -> Verdict:
    key = good().gpus[0].device.key

    def bend(item: GpuEvidence) -> GpuEvidence:
        report = spdm.parse_report(item.report)
        kept = tuple(record for record in report.opaque if record.kind != kind)
        part = spdm.encode_signed_part(replace(report, opaque=kept))
        return replace(item, report=part + intel.sign_raw(key, part))

    return gpu_evidence(bend)


def key_off_its_curve() -> Verdict:
    keys = Keyring()
    first, *others = keys.role_keys()
    bad = (replace(first, key=replace(first.key, public=bytes(63) + b"\5")), *others)
    return Scene(
        keys=keys,
        boot=lambda boot: replace(boot, keys=keys_digest(bad)),
        evidence=lambda evidence: replace(evidence, keys=bad),
    ).appraise()


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


def other_qe_signer() -> Verdict:
    members = json.loads(good().endorsements.tdx)
    text = members["qe_identity"].replace(intel.QE_SIGNER.hex().upper(), OTHER.hex().upper())
    signature = intel.sign_raw(good().vendor.tcb_signing.key, text.encode()).hex()
    return edited(qe_identity=text, qe_identity_signature=signature)


def future_gpu() -> Verdict:
    state = sim_state.make(now=NOW + 2 * DAY_S, roots=[code_folder()])
    state = replace(good(), gpu_vendor=state.gpu_vendor, gpus=state.gpus)
    return Scene(state=state).appraise(policy_for(state))


def pck_crl() -> bytes:
    return bytes.fromhex(json.loads(good().endorsements.tdx)["pck_crl"])


def listed_ppid_only() -> Verdict:
    ppid = Scene().appraise().tdx.ppid
    return policy(any_hardware=False, ppids=(ppid,), gpu_chips=(OTHER,))


def late_manifest() -> Verdict:
    image = policy_for(good()).images[0]
    return policy(images=(replace(image, not_after=NOW - 1),))


def early_manifest() -> Verdict:
    image = policy_for(good()).images[0]
    return policy(images=(replace(image, not_before=NOW + 1),))


def never_extended() -> Verdict:
    # RTMR3 stays zero; the log pretends.
    return Scene(quote=lambda platform, quote: resign(platform, quote, rtmr3=bytes(48))).appraise()


def other_tls_key() -> Verdict:
    # The connection's key is a thief's; the measured keys are the machine's own.
    thief = Keyring().tls_spki()
    return Scene(
        claims=lambda claims: replace(claims, tls_spki=thief),
    ).appraise(peer_spki=thief)


SEPT = TdAttributes.SEPT_VE_DISABLE
OTHER_48 = b"\x5a" * 48

ROWS: list[Row] = [
    # 1 parsing
    ("not CBOR", "1", "cbor.malformed", lambda: raw(lambda data: data[:-1])),
    ("trailing bytes after evidence", "1", "cbor.not_deterministic", lambda: raw(lambda data: data + b"\0")),
    ("quote with trailing bytes", "1", "quote.trailing", lambda: Scene(quote=lambda _p, q: q + b"\1").appraise()),
    ("quote truncated", "1", "quote.truncated", lambda: Scene(quote=lambda _p, q: q[:-1]).appraise()),
    ("quote of another version", "1", "quote.version", lambda: quote_byte(0, 2)),
    ("quote of another TEE", "1", "quote.tee_type", lambda: quote_byte(4)),
    (
        "GPU report with a trailing byte",
        "1",
        "spdm.trailing",
        lambda: gpu_evidence(lambda g: replace(g, report=g.report + b"\0")),
    ),
    ("GPU certificate that is none", "1", "gpu.chain", lambda: gpu_evidence(lambda g: replace(g, certs=(b"0",)))),
    ("GPU without certificates", "1", "gpu.chain", lambda: gpu_evidence(lambda g: replace(g, certs=()))),
    ("root CRL empty", "1", "endorsements.crl_missing", lambda: edited(root_ca_crl="")),
    ("root CRL absent", "1", "endorsements.crl_missing", lambda: edited(root_ca_crl=None)),
    ("PCK CRL empty", "1", "endorsements.crl_missing", lambda: edited(pck_crl="")),
    ("PCK CRL absent", "1", "endorsements.crl_missing", lambda: edited(pck_crl=None)),
    ("PCK CRL that is none", "1", "endorsements.crl", lambda: edited(pck_crl="30")),
    ("endorsements with a second PCK chain", "1", "endorsements.pem", lambda: edited(pck_certificate_chain="x")),
    ("evaluation number absent", "1", "endorsements.malformed", lambda: says(evaluation_number=None)),
    ("endorsements that are no JSON", "1", "endorsements.json", lambda: endorsed(b"{")),
    ("endorsements too long", "1", "evidence.too_long", lambda: edited(tcb_info=" " * (1 << 20))),
    ("issuer chain that is no PEM", "1", "endorsements.pem", lambda: edited(tcb_info_issuer_chain="x")),
    (
        "issuer chain of nonsense",
        "1",
        "endorsements.chain",
        lambda: edited(
            tcb_info_issuer_chain="-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
        ),
    ),
    ("GPU CRL that is none", "1", "gpu.crl", lambda: gpu_crls((b"0",))),
    # 2 endorsements
    (
        "PCK CRL chain without its issuer",
        "2",
        "endorsements.short",
        lambda: edited(pck_crl_issuer_chain=good().vendor.root.pem),
    ),
    ("simulated evidence under a production policy", "2", "quote.root", lambda: Scene().appraise(production())),
    ("evidence of another simulated root", "2", "quote.root", lambda: policy(tdx_root=OTHER)),
    (
        "simulated machine that calls itself tdx",
        "2",
        "quote.platform",
        lambda: after(lambda e: replace(e, platform=PlatformName.TDX)),
    ),
    ("endorsements expired", "2", "endorsements.expired", lambda: says(issued=NOW - 31 * DAY_S)),
    ("TCB info expired, CRLs current", "2", "endorsements.expired", lambda: mixed("tcb_info", issued=NOW - 31 * DAY_S)),
    ("QE identity expired", "2", "endorsements.expired", lambda: mixed("qe_identity", issued=NOW - 31 * DAY_S)),
    ("PCK CRL expired", "2", "endorsements.expired", lambda: mixed("pck_crl", issued=NOW - 31 * DAY_S)),
    ("root CRL expired", "2", "endorsements.expired", lambda: mixed("root_ca_crl", issued=NOW - 31 * DAY_S)),
    ("endorsements from the future", "2", "endorsements.not_yet_valid", lambda: says(issued=NOW + 60)),
    ("TCB info from the future", "2", "endorsements.not_yet_valid", lambda: mixed("tcb_info", issued=NOW + 60)),
    (
        "endorsements older than the policy allows",
        "2",
        "endorsements.too_old",
        lambda: Scene(state=with_collateral(good(), issued=NOW - 2 * DAY_S)).appraise(
            policy_for(good(), endorsement_max_age_days=1)
        ),
    ),
    ("endorsements rolled back", "2", "endorsements.rolled_back", lambda: says(evaluation_number=16)),
    ("TCB info alone rolled back", "2", "endorsements.rolled_back", lambda: mixed("tcb_info", evaluation_number=16)),
    (
        "QE identity alone rolled back",
        "2",
        "endorsements.rolled_back",
        lambda: mixed("qe_identity", evaluation_number=16),
    ),
    (
        "TCB info signature flipped",
        "2",
        "endorsements.signature",
        lambda: edited(tcb_info_signature=json.loads(good().endorsements.tdx)["qe_identity_signature"]),
    ),
    (
        "TCB info text changed",
        "2",
        "endorsements.signature",
        lambda: edited(tcb_info=json.loads(good().endorsements.tdx)["tcb_info"] + " "),
    ),
    ("TCB info signed by the PCK CA's leaf", "2", "endorsements.chain_signature", lambda: signed_by(good().vendor.pck)),
    ("TCB info signed by the PCK CA itself", "2", "endorsements.ca", lambda: signed_by(good().vendor.pck_ca)),
    (
        "TCB info signed by a certificate for something else",
        "2",
        "endorsements.signer",
        lambda: signed_by(certificate("SGX Something", good().vendor.root)),
    ),
    (
        "TCB signer expired",
        "2",
        "endorsements.expired",
        lambda: signed_by(certificate("SGX TCB Signing", good().vendor.root, start=-9000, end=-60)),
    ),
    (
        "TCB signer of another vendor",
        "2",
        "endorsements.chain_signature",
        lambda: signed_by(intel.make_vendor(now=NOW).tcb_signing),
    ),
    (
        "TCB signer revoked",
        "2",
        "endorsements.signer_revoked",
        lambda: says(revoked_by_root=(good().vendor.tcb_signing.certificate,)),
    ),
    (
        "CRLs swapped",
        "2",
        "endorsements.crl_issuer",
        lambda: edited(root_ca_crl=json.loads(good().endorsements.tdx)["pck_crl"]),
    ),
    (
        "PCK CRL of the root",
        "2",
        "endorsements.crl_issuer",
        lambda: edited(pck_crl=json.loads(good().endorsements.tdx)["root_ca_crl"]),
    ),
    (
        "root CRL signed by a stranger",
        "2",
        "endorsements.crl_signature",
        lambda: edited(
            root_ca_crl=json.loads(intel.collateral_json(intel.make_vendor(now=NOW), Collateral(issued=NOW - 3600)))[
                "root_ca_crl"
            ]
        ),
    ),
    (
        "PCK CRL chain of another vendor",
        "2",
        "endorsements.root",
        lambda: edited(
            pck_crl_issuer_chain=json.loads(
                intel.collateral_json(intel.make_vendor(now=NOW), Collateral(issued=NOW - 3600))
            )["pck_crl_issuer_chain"]
        ),
    ),
    # 3 quote
    ("header byte flipped", "3", "quote.signature", lambda: quote_byte(30)),
    ("first body byte flipped", "3", "quote.signature", lambda: quote_byte(48)),
    ("last body byte flipped", "3", "quote.signature", lambda: quote_byte(48 + 583)),
    ("signature flipped", "3", "quote.signature", lambda: flip("signature", 40)),
    ("attestation key flipped", "3", "quote.qe_binding", lambda: flip("attestation_key", 63)),
    ("QE authentication data flipped", "3", "quote.qe_binding", lambda: flip("qe_auth_data", 3)),
    ("QE report flipped", "3", "quote.qe_signature", lambda: quote_byte(48 + 584 + 4 + 134 + 64)),
    ("QE report signature flipped", "3", "quote.qe_signature", lambda: flip("qe_report_signature", 63)),
    ("other FMSPC", "3", "tcb.fmspc", lambda: says(fmspc=b"OTHERX")),
    (
        "PCK certificate revoked",
        "3",
        "quote.pck_revoked",
        lambda: says(revoked_by_pck_ca=(good().vendor.pck.certificate,)),
    ),
    ("platform CA revoked", "3", "quote.ca_revoked", lambda: says(revoked_by_root=(good().vendor.pck_ca.certificate,))),
    ("PCK certificate expired", "3", "quote.expired", lambda: pck(start=-9000, end=-60)),
    ("PCK certificate from the future", "3", "quote.not_yet_valid", lambda: pck(start=60)),
    ("PCK certificate without Intel's extension", "3", "quote.pck_extension", lambda: pck(extension=False)),
    ("PCK chain without the platform CA", "3", "quote.short", lambda: chain(good().vendor.pck, good().vendor.root)),
    (
        "PCK chain that starts with a CA",
        "3",
        "quote.ca",
        lambda: chain(good().vendor.pck_ca, good().vendor.pck_ca, good().vendor.root),
    ),
    (
        "PCK certificate of another vendor",
        "3",
        "quote.chain_signature",
        lambda: chain(intel.make_vendor(now=NOW).pck, good().vendor.pck_ca, good().vendor.root),
    ),
    (
        "PCK certificate of a CA without a CRL",
        "3",
        "quote.crl_issuer",
        lambda: pck(issuer=platform_ca("SGX PCK Processor CA")),
    ),
    (
        "PCK CRL of a CA with the same name",
        "3",
        "quote.crl_signature",
        lambda: pck(issuer=platform_ca("SGX PCK Platform CA")),
    ),
    ("platform out of date", "3", "tcb.status", lambda: says(status="OutOfDate")),
    (
        "platform needs configuration",
        "3",
        "tcb.status",
        lambda: tcb_info(lambda info: info["tcbLevels"][0].update(tcbStatus="ConfigurationNeeded")),
    ),
    (
        "TDX module out of date",
        "3",
        "tcb.status",
        lambda: tcb_info(lambda info: info["tdxModuleIdentities"][0]["tcbLevels"][0].update(tcbStatus="OutOfDate")),
    ),
    (
        "TDX module that the vendor does not list",
        "3",
        "tcb.module",
        lambda: tcb_info(lambda info: info["tdxModuleIdentities"][0].update(id="TDX_07")),
    ),
    (
        "TCB status nobody knows",
        "3",
        "tcb.unknown_status",
        lambda: tcb_info(lambda info: info["tcbLevels"][0].update(tcbStatus="Excellent")),
    ),
    ("TCB info of SGX", "1", "endorsements.malformed", lambda: tcb_info(lambda info: info.update(id="SGX"))),
    ("quoting enclave of another signer", "3", "tcb.qe_identity", other_qe_signer),
    ("platform revoked", "3", "tcb.status", lambda: says(status="Revoked")),
    ("QE out of date", "3", "tcb.status", lambda: says(qe_status="OutOfDate")),
    (
        "waiver for the status has run out",
        "3",
        "tcb.status",
        lambda: Scene(state=with_collateral(good(), status="OutOfDate")).appraise(
            policy_for(good(), accepted_statuses=(Waiver(name="OutOfDate", until=NOW - 1),))
        ),
    ),
    ("advisory open", "3", "tcb.advisory", lambda: says(advisories=("INTEL-SA-01036",))),
    ("older than every TCB level", "3", "tcb.no_level", lambda: launch(tee_tcb_svn=bytes((6, 1, 3)) + bytes(13))),
    # 4 TD
    ("debug", "4", "tdx.debug", lambda: attributes(SEPT | TdAttributes.DEBUG)),
    ("SEPT_VE_DISABLE off", "4", "tdx.sept_ve_disable", lambda: attributes(0)),
    ("migratable", "4", "tdx.migratable", lambda: attributes(SEPT | TdAttributes.MIGRATABLE)),
    ("PKS", "4", "tdx.pks", lambda: attributes(SEPT | TdAttributes.PKS)),
    ("KL", "4", "tdx.key_locker", lambda: attributes(SEPT | TdAttributes.KL)),
    ("PERFMON", "4", "tdx.perfmon", lambda: attributes(SEPT | TdAttributes.PERFMON)),
    ("profiling", "4", "tdx.profiling", lambda: attributes(SEPT | TdAttributes.PERF_PROF)),
    ("reserved bit 2", "4", "tdx.reserved", lambda: attributes(SEPT | 1 << 2)),
    ("reserved bit 40", "4", "tdx.reserved", lambda: attributes(SEPT | 1 << 40)),
    ("XFAM without SSE", "4", "tdx.xfam", lambda: launch(xfam=bytes.fromhex("e502060000000000"))),
    ("XFAM with an unknown feature", "4", "tdx.xfam", lambda: launch(xfam=bytes.fromhex("e702060000000080"))),
    ("MRSEAM not allowed", "4", "tdx.mrseam", lambda: launch(mrseam=OTHER_48)),
    ("module not Intel's", "4", "tdx.mrsignerseam", lambda: launch(mrsignerseam=OTHER_48)),
    ("debug module", "4", "tdx.seam_attributes", lambda: launch(seam_attributes=b"\1" + bytes(7))),
    ("service TD attached", "4", "tdx.mrservicetd", lambda: launch(version=5, mrservicetd=OTHER_48)),
    # 5 registers
    ("other firmware", "5", "measurement.mrtd", lambda: launch(mrtd=OTHER_48)),
    ("other launch shape", "5", "measurement.rtmr0", lambda: body(rtmr0=OTHER_48)),
    ("other boot loader", "5", "measurement.rtmr1", lambda: body(rtmr1=OTHER_48)),
    (
        "changed command line or initrd, same MRTD",
        "5",
        "measurement.rtmr2",
        lambda: Scene(code="other code").appraise(),
    ),
    ("MRCONFIGID set", "5", "measurement.mrconfigid", lambda: launch(mrconfigid=OTHER_48)),
    ("MROWNER set", "5", "measurement.mrowner", lambda: launch(mrowner=OTHER_48)),
    ("MROWNERCONFIG set", "5", "measurement.mrownerconfig", lambda: launch(mrownerconfig=OTHER_48)),
    (
        "XFAM allowed but not the image's",
        "5",
        "measurement.xfam",
        lambda: launch(xfam=bytes.fromhex("e702000000000000")),
    ),
    ("no image pinned", "5", "measurement.no_reference", lambda: policy(images=())),
    (
        "image of another platform",
        "5",
        "measurement.platform",
        lambda: after(lambda e: replace(e, platform=PlatformName.VTPM)),
    ),
    ("manifest expired", "5", "manifest.expired", late_manifest),
    ("manifest from the future", "5", "manifest.not_yet_valid", early_manifest),
    # 6 event logs
    ("firmware log reordered", "6", "eventlog.rtmr0", lambda: ccel(lambda e: [e[1], e[0], *e[2:]])),
    ("firmware log truncated", "6", "eventlog.rtmr2", lambda: ccel(lambda e: e[:-1])),
    ("firmware event duplicated", "6", "eventlog.rtmr1", lambda: ccel(lambda e: [*e, e[4]])),
    (
        "firmware log reaching into RTMR3",
        "6",
        "eventlog.rtmr3",
        lambda: ccel(lambda e: [*e, replace(e[0], register=4)]),
    ),
    ("RTMR3 log reordered", "6", "rtmr3.order", lambda: rtmr3_log(lambda e: [e[1], e[0], *e[2:]])),
    ("RTMR3 log truncated", "6", "rtmr3.order", lambda: rtmr3_log(lambda e: e[:-1])),
    ("RTMR3 event duplicated", "6", "rtmr3.order", lambda: rtmr3_log(lambda e: [e[0], *e])),
    ("RTMR3 log with an extra event", "6", "rtmr3.after_ready", lambda: rtmr3_log(lambda e: [*e, e[-1]])),
    (
        "RTMR3 event with another digest",
        "6",
        "rtmr3.digest",
        lambda: rtmr3_log(lambda e: [replace(e[0], digest=OTHER_48), *e[1:]]),
    ),
    (
        "RTMR3 event of another register",
        "6",
        "rtmr3.kind",
        lambda: rtmr3_log(lambda e: [replace(e[0], register=1), *e[1:]]),
    ),
    (
        "RTMR3 log with padding",
        "6",
        "rtmr3.header",
        lambda: after(lambda e: replace(e, rtmr3_log=e.rtmr3_log + b"\xff" * 8)),
    ),
    ("events really extended in another order", "6", "rtmr3.order", lambda: events(lambda d: (d[1], d[0], *d[2:]))),
    ("not ready yet", "6", "rtmr3.order", lambda: events(lambda d: d[:-1])),
    (
        "extended after system-ready, and logged",
        "6",
        "rtmr3.after_ready",
        lambda: events(lambda d: (*d, boot_events.event_data("extra", None))),
    ),
    ("extended after system-ready, log hidden", "6", "rtmr3.replay", lambda: Scene(quote=extra_event).appraise()),
    ("RTMR3 not starting from zero", "6", "rtmr3.replay", lambda: launch(rtmr3=b"\1" * 48)),
    ("values logged that were never extended", "6", "rtmr3.replay", never_extended),
    (
        "GPU mode nobody knows",
        "6",
        "rtmr3.value",
        lambda: boot(gpus=(GpuIdentity(device_key=OTHER, mode="fast", devtools=False),)),
    ),
    ("image id of another build", "6", "measurement.image_id", other_image_claimed),
    # 7 binding
    ("replayed nonce", "7", "claims.nonce", replayed),
    ("evidence relayed from another connection", "7", "claims.exporter", lambda: Scene().appraise(exporter=OTHER)),
    ("certificate key differs", "7", "claims.tls_spki", lambda: Scene().appraise(peer_spki=OTHER)),
    ("passport offered as a session", "7", "claims.purpose", lambda: claim(purpose=Purpose.PASSPORT, exporter=None)),
    (
        "replay evidence offered as a session",
        "7",
        "claims.purpose",
        lambda: claim(purpose=Purpose.REPLAY, exporter=None),
    ),
    (
        "claims changed after the quote",
        "7",
        "claims.report_data",
        lambda: after(lambda e: replace(e, claims=e.claims.replace(b"test/", b"evil/"))),
    ),
    ("weights claimed that were not measured", "7", "claims.weights_root", lambda: claim(weights_root=OTHER)),
    ("configuration claimed that was not measured", "7", "claims.config", lambda: claim(config=OTHER)),
    ("image claimed that was not measured", "7", "claims.image_id", lambda: claim(image_id=OTHER)),
    ("keys claimed that were not measured", "7", "claims.keys", lambda: claim(keys=OTHER)),
    (
        "other keys handed over",
        "7",
        "claims.keys_differ",
        lambda: after(lambda e: replace(e, keys=(e.keys[0], *Keyring().role_keys()[1:]))),
    ),
    ("TLS key not the claimed one", "7", "claims.tls_key", other_tls_key),
    ("TLS key off its curve", "7", "cose_key.public", key_off_its_curve),
    # 8 GPUs
    ("GPU report without a driver version", "8", "gpu.field", lambda: report_without(spdm.OpaqueType.DRIVER_VERSION)),
    ("GPU certificates from the future", "8", "gpu.not_yet_valid", future_gpu),
    ("GPU evidence missing", "8", "gpu.missing", lambda: Scene(gpus=lambda _p, _n: ()).appraise()),
    ("fewer GPUs than the policy says", "8", "gpu.count", lambda: policy(gpu_count=2)),
    ("GPU evidence not the claimed one", "8", "gpu.digest", lambda: claim(gpu_digest=OTHER)),
    ("GPU reports from boot", "8", "gpu.freshness", lambda: claim(gpu_freshness=GpuFreshness.BOOT)),
    ("GPU root of another vendor", "8", "gpu.root", lambda: policy(gpu_root=OTHER)),
    ("GPU chain of one certificate", "8", "gpu.short", lambda: gpu_evidence(lambda g: replace(g, certs=g.certs[-1:]))),
    (
        "GPU chain with a gap",
        "8",
        "gpu.chain_signature",
        lambda: gpu_evidence(lambda g: replace(g, certs=(g.certs[0], *g.certs[2:]))),
    ),
    ("GPU chain of authorities only", "8", "gpu.ca", lambda: gpu_evidence(lambda g: replace(g, certs=g.certs[1:]))),
    (
        "GPU measurement flipped",
        "8",
        "gpu.signature",
        lambda: gpu_evidence(lambda g: replace(g, report=flipped(g.report, 60))),
    ),
    (
        "GPU signature flipped",
        "8",
        "gpu.signature",
        lambda: gpu_evidence(lambda g: replace(g, report=flipped(g.report, -1))),
    ),
    ("GPU nonce of another machine", "8", "gpu.nonce", lambda: gpu(nonce=OTHER)),
    ("GPU firmware identifier empty", "8", "gpu.fwid_missing", lambda: gpu(fwid=b"")),
    ("GPU firmware other than certified", "8", "gpu.fwid", lambda: gpu(fwid=OTHER_48)),
    ("GPU swapped for another genuine one", "8", "gpu.device_key", swapped_gpu),
    ("one GPU shown twice", "8", "gpu.duplicate", one_gpu_twice),
    ("one chip under two device keys", "8", "gpu.duplicate", one_chip_twice),
    (
        "GPU certificate revoked",
        "8",
        "gpu.revoked",
        lambda: gpu_crls(nvidia.crls(good().gpu_vendor, now=NOW, revoked=(good().gpu_vendor.provisioner.certificate,))),
    ),
    ("GPU CRL of a stranger", "8", "gpu.crl_signature", lambda: gpu_crls(nvidia.crls(foreign_gpu_vendor(), now=NOW))),
    ("GPU CRL of nobody in the chain", "8", "gpu.crl_stranger", lambda: gpu_crls((pck_crl(),))),
    ("GPU CRL expired", "8", "gpu.expired", lambda: gpu_crls(nvidia.crls(good().gpu_vendor, now=NOW - 60 * DAY_S))),
    ("confidential computing off", "8", "gpu.mode", lambda: launch(gpu_mode=GpuMode.CC_OFF)),
    (
        "protected PCIe where single-GPU mode is wanted",
        "8",
        "gpu.mode",
        lambda: launch(gpu_mode=GpuMode.CC_PROTECTED_PCIE),
    ),
    ("GPU in another mode than the driver said", "8", "gpu.mode", lambda: gpu(protected_pcie=True)),
    ("GPU report without a mode", "8", "gpu.field", lambda: report_without(spdm.OpaqueType.PROTECTED_PCIE_STATUS)),
    ("GPU developer tools on", "8", "gpu.devtools", lambda: launch(gpu_devtools=True)),
    (
        "another GPU measured",
        "8",
        "gpu.device_key",
        lambda: boot(gpus=(GpuIdentity(device_key=OTHER, mode="cc-on", devtools=False),)),
    ),
    # 9 hardware
    ("machine not on the allow-list", "9", "hardware.ppid", lambda: policy(any_hardware=False, ppids=(bytes(16),))),
    ("no machine on the allow-list", "9", "hardware.ppid", lambda: policy(any_hardware=False)),
    ("GPU not on the allow-list", "9", "hardware.gpu", listed_ppid_only),
    # 10 model
    ("other weights", "10", "weights.root", lambda: boot(weights_root=OTHER)),
    ("no weights named in the policy", "10", "weights.root", lambda: policy(weights_roots=())),
    ("other numerics profile", "10", "numerics.profile", lambda: boot(profile="fast-v9")),
    ("retired numerics profile", "10", "numerics.profile", lambda: boot(profile="exact-v0")),
    (
        "retired numerics profile that the policy lists",
        "10",
        "numerics.profile",
        lambda: Scene(boot=lambda boot: replace(boot, profile="exact-v0")).appraise(
            policy_for(good(), numerics=("exact-v0", CURRENT))
        ),
    ),
    ("configuration not on the list", "10", "config.digest", lambda: policy(any_config=False, configs=(OTHER,))),
    ("no configuration on the list", "10", "config.digest", lambda: policy(any_config=False)),
    # 11 channel
    ("TLS 1.2", "11", "channel.version", lambda: Scene().appraise(version="TLSv1.2")),
    ("classical key exchange", "11", "channel.group", lambda: Scene().appraise(group="x25519")),
]


@pytest.mark.parametrize(("step", "code", "refused"), [pytest.param(*row[1:], id=row[0]) for row in ROWS])
def test_refused(step: str, code: str, refused: Callable[[], Verdict]) -> None:
    with pytest.raises(CountermarkError) as err:
        refused()
    assert (err.value.code, err.value.step) == (code, step)
    last = err.value.checks[-1]
    assert (last.code, last.step, last.status) == (code, step, Status.FAIL)
    assert all(check.status is not Status.FAIL for check in err.value.checks[:-1])
    assert isinstance(err.value, Undecidable) == (code in ("measurement.no_reference", "gpu.rim_missing"))


def test_every_documented_code_has_a_row() -> None:
    """Codes stand in backquotes in docstrings; module names look alike and are dropped. Others have their own tests."""
    elsewhere = {
        "appraise.connection",
        "policy.expired",
    }
    package = Path(countermark.__file__).parent
    sources = [*package.glob("tdx/*.py"), *package.glob("gpu/*.py"), package / "appraise.py", package / "binding.py"]
    modules = {f"{path.parent.name}.{path.stem}" for path in sources}
    areas = "quote tcb tdx endorsements measurement manifest eventlog rtmr3 claims gpu hardware weights numerics config"
    pattern = re.compile(rf"[`\"](({areas.replace(' ', '|')}|channel|policy|appraise|cose_key)\.[a-z_0-9]+)[`\"]")
    documented = {match[1] for path in sources for match in pattern.finditer(path.read_text())}
    assert len(documented) > 80
    others = [
        path for folder in ("gpu", "tdx", "evidence") for path in Path(__file__).parent.parent.glob(f"{folder}/*.py")
    ]
    with_a_row = {row[2] for row in ROWS} | {code for path in others for code in code_in_quotes(path)}
    assert documented - modules - with_a_row == elsewhere


def code_in_quotes(path: Path) -> list[str]:
    return re.findall(r'"((?:gpu|tdx|tcb|quote|endorsements|eventlog|rtmr3)\.[a-z_0-9]+)"', path.read_text())


def test_every_step_has_a_row() -> None:
    assert sorted({row[1] for row in ROWS}, key=int) == [str(number) for number in range(1, 12)]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TdReport)])
def test_every_field_of_the_td_report_is_signed(name: str) -> None:
    scene = Scene(launch=TdLaunch(version=5)) if name in ("tee_tcb_svn2", "mrservicetd") else Scene()

    def bend(_platform: SimPlatform, quote: bytes) -> bytes:
        parsed = parse_quote(quote)
        value = getattr(parsed.body, name)
        return encode_quote(replace(parsed, body=replace(parsed.body, **{name: flipped(value, 0)})))

    scene.quote = bend
    with pytest.raises(CountermarkError) as err:
        scene.appraise()
    assert err.value.code == "quote.signature"


@pytest.mark.parametrize("step", ["7", "7b"])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Claims)])
def test_every_claim_is_bound_by_the_quote(name: str, step: str) -> None:
    def bend(evidence: Evidence) -> Evidence:
        claims = parse_claims(evidence.claims)
        value = getattr(claims, name)
        others: dict[type, Any] = {bytes: OTHER, str: "test/other", int: 7}
        if name == "purpose":
            claims = replace(claims, purpose=Purpose.REPLAY, exporter=None)
        elif name == "gpu_freshness":
            claims = replace(claims, gpu_freshness=GpuFreshness.BOOT)
        else:
            claims = replace(claims, **{name: others[type(value)]})
        return replace(evidence, claims=encode_claims(claims))

    scene = Scene(evidence=bend)
    with pytest.raises(CountermarkError) as err:
        scene.appraise() if step == "7" else scene.appraise_bundle()
    assert (err.value.code, err.value.step) == ("claims.report_data", step)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(BootEvents)])
def test_every_value_in_the_rtmr3_log_is_what_was_extended(name: str) -> None:
    def bend(evidence: Evidence) -> Evidence:
        boot = boot_events.parse_boot_log(evidence.rtmr3_log)
        other = {"profile": "other", "gpus": ()}.get(name, OTHER)
        data = boot_events.boot_event_data(replace(boot, **{name: other}))
        return replace(evidence, rtmr3_log=boot_events.encode_boot_log(data))

    with pytest.raises(CountermarkError) as err:
        Scene(evidence=bend).appraise()
    assert (err.value.code, err.value.step) == ("rtmr3.replay", "6")


def test_no_flipped_bit_of_a_quote_passes_unless_its_name_and_meaning_stay() -> None:
    """Everything up to the PEM chain is signed: a flip there is refused. In the PEM text white space may change."""
    scene = Scene()
    evidence = scene.make()
    chain = parse_quote(evidence.quote).pck_chain_pem
    start, policy = evidence.quote.index(chain), policy_for(scene.state)
    codes = set()
    for position in (*range(0, start, 53), *range(start, len(evidence.quote), 197)):
        data = encode_evidence(replace(evidence, quote=flipped(evidence.quote, position)))
        try:
            verdict = appraise(data, policy, now=NOW, connection=scene.connection())
        except CountermarkError as err:
            codes.add(err.code.split(".")[0])
        else:
            assert position >= start
            assert verdict.quote_digest == quote_digest(evidence.quote)
    assert codes == {"quote"}


def test_a_refused_register_names_the_first_differing_event() -> None:
    with pytest.raises(CountermarkError) as err:
        Scene(code="other code").appraise()
    detail = err.value.checks[-1].detail
    image = policy_for(good()).images[0]
    expected = [event for event in image.events if event.register == 3][1]
    assert expected.note in detail
    assert expected.digest.hex() in detail
    assert image.rtmr2.hex() in detail


@pytest.mark.filterwarnings("ignore:Parsed a serial number:Warning")
@pytest.mark.parametrize("bits", [0x01, 0x80])
def test_any_changed_byte_of_evidence_is_refused_with_our_errors_or_means_the_same(bits: int) -> None:
    """What may change unnoticed is outside every signature and judgement: JSON, PEM and XML white space, padding."""
    scene = Scene()
    data = scene.encoded()
    policy, good_verdict = policy_for(scene.state), scene_verdict(scene, data)
    accepted = 0
    for position in range(0, len(data), 797):
        changed = bytearray(data)
        changed[position] ^= bits
        try:
            verdict = appraise(bytes(changed), policy, now=NOW, connection=scene.connection())
        except CountermarkError:
            continue
        accepted += 1
        assert verdict.as_json()["quote_digest"] == good_verdict.as_json()["quote_digest"]
        assert (verdict.claims, verdict.boot, verdict.tdx) == (good_verdict.claims, good_verdict.boot, good_verdict.tdx)
    assert accepted <= 1


def scene_verdict(scene: Scene, data: bytes) -> Verdict:
    return appraise(data, policy_for(scene.state), now=NOW, connection=scene.connection())
