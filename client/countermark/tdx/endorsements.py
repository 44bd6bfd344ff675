"""Intel's endorsements for a TDX quote: parse them, and judge signatures, times and versions at an explicit time.

The JSON form is what dcap-qvl and Intel's PCCS call collateral v3: TCB info v3 and QE identity v2 as signed JSON text,
two issuer chains in PEM, the root CA CRL and the PCK CRL in DER (Intel PCS API v4; quote verification: Intel SGX DCAP
QVL design, sections 4.1.2 to 4.1.4). Newer writers add the PCK chain, which must then be the quote's own. All of it is
judged here first so that a refusal has a stable code; dcap-qvl then judges the same values again.
Not checked here: the TCB level, QE measurements (`tdx.tcb`), and the PCK chain's link to the quote (`tdx.quote`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import dcap_qvl
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from countermark import x509chain
from countermark.checks import rfc3339
from countermark.errors import FormatError, TcbError
from countermark.formats import strict_json
from countermark.policy import DAY_S, Policy
from countermark.tdx import tcbinfo

MAX_BYTES: Final = 1024 * 1024
_TEXTS: Final = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "tcb_info", "qe_identity_issuer_chain", "qe_identity")
_HEX: Final = ("root_ca_crl", "pck_crl", "tcb_info_signature", "qe_identity_signature")
_PCK_CHAIN: Final = "pck_certificate_chain"  # optional
_MAX_NUMBER: Final = 1 << 31
_TCB_SIGNER: Final = "SGX TCB Signing"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedJson:
    """TCB info or QE identity: the exact signed text, its raw P-256 signature, chain, and the fields read from it."""

    text: bytes
    signature: bytes
    chain: tuple[x509.Certificate, ...]
    issue_date: int
    next_update: int
    evaluation_data_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Endorsements:
    """Parsed endorsements; `collateral` is the same bytes as dcap-qvl wants them.

    `pck_chain`: the PCK chain the writer added, empty without one; all it does is that it must be the quote's own.
    """

    tcb_info: SignedJson
    qe_identity: SignedJson
    tcb: tcbinfo.TcbInfo
    qe: tcbinfo.QeIdentity
    pck_chain: tuple[x509.Certificate, ...]
    pck_crl_chain: tuple[x509.Certificate, ...]
    root_crl: x509.CertificateRevocationList
    pck_crl: x509.CertificateRevocationList
    collateral: dcap_qvl.QuoteCollateralV3


def _json(data: bytes, what: str) -> dict[str, Any]:
    value = strict_json.load(data, "endorsements", max_bytes=MAX_BYTES)
    if not isinstance(value, dict):
        raise tcbinfo.bad(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def _signed(values: dict[str, str], what: str, identity: str) -> tuple[SignedJson, dict[str, Any]]:
    body = _json(values[what].encode(), what)
    if body.get("id") != identity:
        raise tcbinfo.bad(f"{what}.id: expected {identity}, got {body.get('id')!r:.40}")
    signature = bytes.fromhex(values[f"{what}_signature"])
    if len(signature) != 64:
        raise tcbinfo.bad(f"{what}_signature: expected 64 bytes, got {len(signature)}")
    signed = SignedJson(
        text=values[what].encode(),
        signature=signature,
        chain=x509chain.parse_pem_chain(values[f"{what}_issuer_chain"].encode(), "endorsements"),
        issue_date=tcbinfo.moment(body, "issueDate", what),
        next_update=tcbinfo.moment(body, "nextUpdate", what),
        evaluation_data_number=tcbinfo.integer(body, "tcbEvaluationDataNumber", what, most=_MAX_NUMBER),
    )
    return signed, body


def _texts(data: bytes) -> dict[str, str]:
    values = _json(data, "json")
    for name in ("root_ca_crl", "pck_crl"):
        if not values.get(name):
            message = f"endorsements.{name}: expected a CRL, got none"
            raise FormatError(message, code="endorsements.crl_missing", step="1")
    if values.get(_PCK_CHAIN, "") is None:
        del values[_PCK_CHAIN]  # how some writers say that there is none
    if set(values) - {_PCK_CHAIN} != {*_TEXTS, *_HEX}:
        raise tcbinfo.bad(f"json: expected exactly the fields {sorted((*_TEXTS, *_HEX))}, got {sorted(values)}")
    for name, value in values.items():
        if not isinstance(value, str):
            raise tcbinfo.bad(f"{name}: expected text, got {type(value).__name__}")
    return values


def parse_endorsements(data: bytes) -> Endorsements:
    """Parse the JSON object of nine fields, or ten with `pck_certificate_chain`. Hex may be of either case.

    Absent or empty CRLs are `endorsements.crl_missing`. Raises `FormatError`: `endorsements.json`,
    `endorsements.too_long`, `endorsements.malformed`, `endorsements.pem`, `endorsements.chain`, `endorsements.crl`,
    `endorsements.crl_missing`.
    """
    values = _texts(data)
    try:
        raw = {name: bytes.fromhex(values[name]) for name in _HEX}
        texts = {name: values[name].encode() for name in values}
    except ValueError as err:
        raise tcbinfo.bad(f"json: {err}") from err
    tcb_info, tcb_body = _signed(values, "tcb_info", "TDX")
    qe_identity, qe_body = _signed(values, "qe_identity", "TD_QE")
    pck_chain = x509chain.parse_pem_chain(texts[_PCK_CHAIN], "endorsements") if _PCK_CHAIN in texts else ()
    return Endorsements(
        tcb_info=tcb_info,
        qe_identity=qe_identity,
        tcb=tcbinfo.parse_tcb_info(tcb_body),
        qe=tcbinfo.parse_qe_identity(qe_body),
        pck_chain=pck_chain,
        pck_crl_chain=x509chain.parse_pem_chain(texts["pck_crl_issuer_chain"], "endorsements"),
        root_crl=x509chain.parse_crl(raw["root_ca_crl"], "endorsements"),
        pck_crl=x509chain.parse_crl(raw["pck_crl"], "endorsements"),
        collateral=dcap_qvl.QuoteCollateralV3(**{name: values[name] for name in _TEXTS}, **raw),
    )


def _chained(check: Callable[[], None], what: str) -> None:
    try:
        check()
    except x509chain.ChainError as err:
        code = "chain_signature" if err.reason == "signature" else err.reason
        raise TcbError(f"{what}: {err}", code=f"endorsements.{code}", step="2") from err


def verify_endorsements(endorsements: Endorsements, policy: Policy, *, now: int) -> str:
    """Step 2: signed under the policy's root, valid at `now`, young enough, version not rolled back.

    Returns one line for the check's detail. Raises `TcbError` with step 2 and a code that starts with `endorsements.`:
    `root`, `short`, `ca`, `extension`, `chain_signature`, `signature`, `crl_issuer`, `crl_signature`, `crl_extension`,
    `crl_number` (absent, which Intel's profile has none without), `signer`, `signer_revoked`, `not_yet_valid`,
    `expired`, `too_old`, `rolled_back`.
    """
    signed = {"TCB info": endorsements.tcb_info, "QE identity": endorsements.qe_identity}
    root = endorsements.pck_crl_chain[-1]
    _chained(lambda: _root_is(root, policy.tdx_root), "PCK CRL issuer chain")
    _chained(lambda: x509chain.verify_crl(endorsements.root_crl, root, now=now), "root CA CRL")
    for what, item in signed.items():
        _verify_signed(item, what, endorsements, policy, now)
    _verify_pck_crl(endorsements, root, now)
    for what, crl in (("root CA CRL", endorsements.root_crl), ("PCK CRL", endorsements.pck_crl)):
        if not any(isinstance(item.value, x509.CRLNumber) for item in crl.extensions):
            raise TcbError(f"{what}: expected a CRL number, got none", code="endorsements.crl_number", step="2")
    dates = {what: (item.issue_date, item.next_update) for what, item in signed.items()}
    dates["PCK CRL"] = (int(endorsements.pck_crl.last_update_utc.timestamp()), now)
    for what, (issued, until) in dates.items():
        if now < issued:
            message = f"{what}: issued {rfc3339(issued)}, time is {rfc3339(now)}"
            raise TcbError(message, code="endorsements.not_yet_valid", step="2")
        if now > until:
            message = f"{what}: next update {rfc3339(until)}, time is {rfc3339(now)}"
            raise TcbError(message, code="endorsements.expired", step="2")
        if now - issued > policy.endorsement_max_age_days * DAY_S:
            most = f"{policy.endorsement_max_age_days} days old (the policy's max_age_days in [endorsements])"
            message = f"{what}: expected at most {most}, got {(now - issued) / DAY_S:.1f}"
            raise TcbError(message, code="endorsements.too_old", step="2")
    for what, item in signed.items():
        if item.evaluation_data_number < policy.min_tcb_evaluation_data_number:
            least = f"{policy.min_tcb_evaluation_data_number} (the policy's key of that name in [endorsements])"
            got = item.evaluation_data_number
            message = f"{what}, min_tcb_evaluation_data_number: expected at least {least}, got {got}"
            raise TcbError(message, code="endorsements.rolled_back", step="2")
    number = min(item.evaluation_data_number for item in signed.values())
    age_days = max(now - item.issue_date for item in signed.values()) / DAY_S
    return f"{x509chain.name(root)}; tcbEvaluationDataNumber {number}; at most {age_days:.1f} days old"


def _root_is(certificate: x509.Certificate, root: bytes) -> None:
    if x509chain.digest(certificate) != root:
        got = f"{x509chain.digest(certificate).hex()} ({x509chain.name(certificate)})"
        raise x509chain.ChainError("root", f"root: expected SHA-256 {root.hex()}, got {got}")


def _verify_signed(item: SignedJson, what: str, endorsements: Endorsements, policy: Policy, now: int) -> None:
    _chained(lambda: x509chain.verify_chain(item.chain, root=policy.tdx_root, now=now), f"{what} issuer chain")
    signer = item.chain[0]
    # Intel's rule: the signer stands directly below the root and is named for TCB signing. A PCK key must not do.
    if len(item.chain) != 2 or _TCB_SIGNER not in x509chain.common_name(signer):
        message = f"{what}: expected a TCB signing certificate directly below the root, got {x509chain.name(signer)}"
        raise TcbError(message, code="endorsements.signer", step="2")
    if x509chain.is_revoked(signer, endorsements.root_crl):
        raise TcbError(f"{what}: its signer is revoked", code="endorsements.signer_revoked", step="2")
    if not p256_verifies(signer, item.signature, item.text):
        raise TcbError(f"{what}: signature does not verify", code="endorsements.signature", step="2")


def _verify_pck_crl(endorsements: Endorsements, root: x509.Certificate, now: int) -> None:
    chain = endorsements.pck_crl_chain
    if len(chain) != 2:
        raise TcbError(f"PCK CRL issuer chain: expected 2, got {len(chain)}", code="endorsements.short", step="2")
    issuer = chain[0]
    _chained(lambda: x509chain.verify_issued(issuer, root), "PCK CRL issuer")
    _chained(lambda: x509chain.verify_time(issuer, now), "PCK CRL issuer")
    _chained(lambda: x509chain.verify_crl(endorsements.pck_crl, issuer, now=now), "PCK CRL")


def p256_verifies(certificate: x509.Certificate, signature: bytes, message: bytes) -> bool:
    """Whether the certificate's P-256 key made the raw 64-byte (r || s) ECDSA-SHA256 `signature` over `message`."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        return False
    der = encode_dss_signature(int.from_bytes(signature[:32]), int.from_bytes(signature[32:]))
    try:
        key.verify(der, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
