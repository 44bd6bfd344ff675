"""The simulated CPU vendor: root, PCK platform CA, one machine's PCK certificate, TCB signing, and its collateral.

Forms after Intel "SGX PCK Certificate and Certificate Revocation List Profile Specification" 1.5 (the extension
1.2.840.113741.1.13.1) and the Provisioning Certification Service API version 4 (TCB info version 3, QE identity
version 2). Collateral is signed with ECDSA P-256 over the exact JSON bytes, signatures raw r || s in hex. FMSPC and
PPID spell SIMULATED in ASCII. `Collateral` has knobs so that refusals can be tested against a vendor that really says
so.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from countermark_appliance.platform.sim import der
from countermark_appliance.platform.sim.issue import YEAR_S, Issued, issue, issue_crl

FMSPC = b"SIMULA"
SGX_TCB = (4, 4, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0)
PCE_SVN = 13
TDX_TCB = (6, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)  # [0] module SVN, [1] module version, [2] microcode
QE_SIGNER = hashlib.sha256(b"SIMULATED quoting enclave signer").digest()
QE_ATTRIBUTES = bytes.fromhex("1500000000000000e700000000000000")
QE_PROD_ID = 2
QE_SVN = 6
DAY_S = 86_400
_EXTENSION = "1.2.840.113741.1.13.1"
_CRL_URL = "http://simulated.invalid/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """Every key of the simulated CPU vendor, and the one machine it certified."""

    root: Issued
    pck_ca: Issued
    pck: Issued
    tcb_signing: Issued

    @property
    def pck_chain_pem(self) -> bytes:
        """Leaf, platform CA, root: what a quote carries."""
        return (self.pck.pem + self.pck_ca.pem + self.root.pem).encode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collateral:
    """What the vendor says, as of `issued` (Unix seconds), about machines with this FMSPC."""

    issued: int
    lifetime_s: int = 30 * DAY_S
    status: str = "UpToDate"
    qe_status: str = "UpToDate"
    advisories: tuple[str, ...] = ()
    evaluation_number: int = 1000  # above any of Intel's, whose latest a new policy asks for
    fmspc: bytes = FMSPC
    revoked_by_root: tuple[x509.Certificate, ...] = ()
    revoked_by_pck_ca: tuple[x509.Certificate, ...] = ()


def make_vendor(*, now: int) -> Vendor:
    """A new vendor with all its keys; certificates are valid from an hour ago."""
    start = now - 3600
    p256 = ec.SECP256R1()
    root = issue(
        "SGX Root CA",
        None,
        not_before=start,
        not_after=now + 10 * YEAR_S,
        curve=p256,
        ca=True,
        path_length=1,
        crl_url=_CRL_URL + "root.crl",
    )
    pck_ca = issue(
        "SGX PCK Platform CA",
        root,
        not_before=start,
        not_after=now + 5 * YEAR_S,
        curve=p256,
        ca=True,
        path_length=0,
        crl_url=_CRL_URL + "root.crl",
    )
    pck = issue(
        "SGX PCK Certificate",
        pck_ca,
        not_before=start,
        not_after=now + 2 * YEAR_S,
        curve=p256,
        ca=False,
        crl_url=_CRL_URL + "pck.crl",
        extensions=(sgx_extension(),),
    )
    tcb_signing = issue(
        "SGX TCB Signing",
        root,
        not_before=start,
        not_after=now + 2 * YEAR_S,
        curve=p256,
        ca=False,
        crl_url=_CRL_URL + "root.crl",
    )
    return Vendor(root=root, pck_ca=pck_ca, pck=pck, tcb_signing=tcb_signing)


def collateral_json(vendor: Vendor, says: Collateral, *, signer: Issued | None = None) -> bytes:
    """The collateral as dcap-qvl's QuoteCollateralV3 JSON. `signer`: a TCB signer other than the vendor's."""
    tcb_signer = signer or vendor.tcb_signing
    tcb_info, tcb_signature = _signed(tcb_signer, _tcb_info(says))
    qe_identity, qe_signature = _signed(tcb_signer, _qe_identity(says))
    until = says.issued + says.lifetime_s
    signing_chain = tcb_signer.pem + vendor.root.pem
    return json.dumps(
        {
            "pck_crl_issuer_chain": vendor.pck_ca.pem + vendor.root.pem,
            "root_ca_crl": issue_crl(
                vendor.root, this_update=says.issued, next_update=until, revoked=says.revoked_by_root
            ).hex(),
            "pck_crl": issue_crl(
                vendor.pck_ca, this_update=says.issued, next_update=until, revoked=says.revoked_by_pck_ca
            ).hex(),
            "tcb_info_issuer_chain": signing_chain,
            "tcb_info": tcb_info,
            "tcb_info_signature": tcb_signature,
            "qe_identity_issuer_chain": signing_chain,
            "qe_identity": qe_identity,
            "qe_identity_signature": qe_signature,
        }
    ).encode("ascii")


def sign_raw(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA as raw r || s: SHA-256 on P-256, SHA-384 on P-384."""
    digest = hashes.SHA256() if key.curve.key_size == 256 else hashes.SHA384()
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(digest)))
    size = key.curve.key_size // 8
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def _signed(signer: Issued, value: dict[str, object]) -> tuple[str, str]:
    text = json.dumps(value, separators=(",", ":"))
    return text, sign_raw(signer.key, text.encode()).hex()


def _tcb_info(says: Collateral) -> dict[str, object]:
    module_levels = [_level({"isvsvn": TDX_TCB[0]}, says.status, ())]
    module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    tcb = {
        "sgxtcbcomponents": _components(SGX_TCB),
        "pcesvn": PCE_SVN,
        "tdxtcbcomponents": _components((TDX_TCB[0], 0, *TDX_TCB[2:])),
    }
    return {
        "id": "TDX",
        "version": 3,
        "issueDate": _iso(says.issued),
        "nextUpdate": _iso(says.issued + says.lifetime_s),
        "fmspc": says.fmspc.hex(),
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": says.evaluation_number,
        "tdxModule": module,
        "tdxModuleIdentities": [{"id": f"TDX_{TDX_TCB[1]:02X}", **module, "tcbLevels": module_levels}],
        "tcbLevels": [_level(tcb, says.status, says.advisories)],
    }


def _qe_identity(says: Collateral) -> dict[str, object]:
    return {
        "id": "TD_QE",
        "version": 2,
        "issueDate": _iso(says.issued),
        "nextUpdate": _iso(says.issued + says.lifetime_s),
        "tcbEvaluationDataNumber": says.evaluation_number,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": QE_SIGNER.hex().upper(),
        "isvprodid": QE_PROD_ID,
        "tcbLevels": [_level({"isvsvn": QE_SVN}, says.qe_status, ())],
    }


def _level(tcb: dict[str, object], status: str, advisories: Sequence[str]) -> dict[str, object]:
    level: dict[str, object] = {"tcb": tcb, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": status}
    return level | ({"advisoryIDs": list(advisories)} if advisories else {})


def _components(values: Sequence[int]) -> list[dict[str, object]]:
    return [{"svn": value, "category": "SIMULATED"} for value in values]


def _iso(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sgx_extension(*, pce_id: bytes = bytes(2), fmspc: bytes = FMSPC) -> x509.UnrecognizedExtension:
    """PPID, TCB, PCEID, FMSPC, SGX type (1: scalable), platform instance id, configuration: one OID each below ours.

    The configuration says: not dynamic, no cached keys, no SMT, which is what a strict policy wants.
    """
    tcb = [der.sequence(der.oid(f"{_EXTENSION}.2.{i}"), der.integer(svn)) for i, svn in enumerate(SGX_TCB, 1)]
    tcb.append(der.sequence(der.oid(f"{_EXTENSION}.2.17"), der.integer(PCE_SVN)))
    tcb.append(der.sequence(der.oid(f"{_EXTENSION}.2.18"), der.octets(bytes(SGX_TCB))))
    configuration = [der.sequence(der.oid(f"{_EXTENSION}.7.{i}"), der.boolean(False)) for i in (1, 2, 3)]
    values = (
        der.octets(b"SIMULATED" + secrets.token_bytes(7)),
        der.sequence(*tcb),
        der.octets(pce_id),
        der.octets(fmspc),
        der.enumerated(1),
        der.octets(b"SIMULATED" + secrets.token_bytes(7)),
        der.sequence(*configuration),
    )
    body = der.sequence(*(der.sequence(der.oid(f"{_EXTENSION}.{i}"), value) for i, value in enumerate(values, 1)))
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(_EXTENSION), body)
