"""The signatures of a TDX quote and the TCB level of the platform that made it.

Intel SGX DCAP quote verification, appendix A.4 of the TDX DCAP Quoting Library API (quote version 4 and 5),
certification data type 6 over 5; PCK certificates after Intel's "SGX PCK Certificate and Certificate Revocation List
Profile Specification". Numbered in `verify_quote`. Everything is judged here and rated by `tdx.tcb` first, so that a
refusal's code never hangs on the text of another library's message; then dcap-qvl judges all of it again (its policy
API; its legacy `verify` accepts OutOfDate), and a quote passes only if both accept it.
Not checked here: TD attributes and module (`tdx.td`), measurements, report_data, and the endorsements' own signatures
and times (`tdx.endorsements`, which must have passed first). Dynamic platform, cached keys and SMT flags are not
judged: every multi-socket TDX server sets them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import dcap_qvl
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from countermark import x509chain
from countermark.errors import FormatError, MeasurementError, QuoteError, TcbError
from countermark.formats.quote import Quote, encode_enclave_report, signed_part
from countermark.policy import INTEL_SGX_ROOT, Policy
from countermark.tdx.endorsements import Endorsements, p256_verifies
from countermark.tdx.tcb import UP_TO_DATE, PlatformTcb, Rating, rate
from countermark.tdx.td import verify_td

_PCK_NAME: Final = "SGX PCK Certificate"
_PCK_CA_NAMES: Final = ("SGX PCK Platform CA", "SGX PCK Processor CA")
_PCK_SIZES: Final = {"ppid": 16, "cpu_svn": 16, "pce_id": 2, "fmspc": 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What a verified quote's certificates and TCB info say about the machine."""

    tcb_status: str
    advisory_ids: tuple[str, ...]
    ppid: bytes
    fmspc: bytes
    evaluation_data_number: int


def _chain(raw: Quote) -> tuple[x509.Certificate, ...]:
    return _parse_chain(raw.pck_chain_pem)


@lru_cache(maxsize=16)  # asked for three times in one appraisal
def _parse_chain(pem: bytes) -> tuple[x509.Certificate, ...]:
    return x509chain.parse_pem_chain(pem, "quote")


def verify_root(quote: Quote, policy: Policy) -> None:
    """Whether the quote's PCK chain ends in the policy's root: asked first, because it says whose evidence this is.

    Raises `QuoteError` `quote.root`.
    """
    root = _chain(quote)[-1]
    if x509chain.digest(root) != policy.tdx_root:
        whose = "Intel's SGX root" if policy.tdx_root == INTEL_SGX_ROOT else f"the simulated {policy.tdx_root.hex()}"
        message = f"quote root: expected {whose}, got {x509chain.name(root)} ({x509chain.digest(root).hex()})"
        raise QuoteError(message, code="quote.root", step="2")


def verify_quote(data: bytes, quote: Quote, endorsements: Endorsements, policy: Policy, *, now: int) -> Platform:
    """Step 3: 1 PCK chain, 2 revocation, 3 QE report, 4 quote signature, 5 platform family, 6 TCB level and
    whether the policy accepts it, 7 the same by dcap-qvl.

    `quote` is `parse_quote(data)`. dcap-qvl also refuses TDs that step 4 refuses; those are left to step 4, so what
    this returns for them is rated once, not twice. Raises `QuoteError` (`quote.pck_chain`, `quote.root`, `quote.short`,
    `quote.ca`, `quote.extension`, `quote.chain_signature`, `quote.not_yet_valid`, `quote.expired`, `quote.pck_name`,
    `quote.crl_issuer`, `quote.crl_signature`, `quote.crl_extension`, `quote.pck_revoked`, `quote.ca_revoked`,
    `quote.qe_signature`, `quote.qe_binding`, `quote.signature`, `quote.pck_extension`, `quote.refused`) or `TcbError`
    (`tcb.fmspc`, `tcb.pce_id`, those of `tdx.tcb.rate`, `tcb.status`, `tcb.advisory`).
    """
    platform = rate_platform(data, quote, endorsements, policy, now=now)
    _verify_status(Rating(status=platform.tcb_status, advisories=platform.advisory_ids), policy, now)
    second = _second_rating(data, quote, endorsements, _chain(quote), policy, now)
    _verify_status(second, policy, now)
    return replace(platform, advisory_ids=tuple(sorted({*platform.advisory_ids, *second.advisories})))


def rate_platform(data: bytes, quote: Quote, endorsements: Endorsements, policy: Policy, *, now: int) -> Platform:
    """What step 3 knows of the platform before the policy judges it: 1 to 5, and the TCB level by our reading alone.

    Raises as `verify_quote` does, less `quote.refused`, `tcb.status` and `tcb.advisory`.
    """
    chain = _chain(quote)
    if endorsements.pck_chain and endorsements.pck_chain != chain:
        message = f"pck_certificate_chain: expected the quote's own chain, got {_names(endorsements.pck_chain)}"
        raise QuoteError(message, code="quote.pck_chain", step="3")
    _verify_pck_chain(chain, endorsements, policy, now)
    _verify_signatures(data, quote, chain[0])
    pck = _pck_extension(chain[0])
    for name, wanted, got in (
        ("fmspc", endorsements.tcb.fmspc, pck.fmspc),
        ("pce_id", endorsements.tcb.pce_id, pck.pce_id),
    ):
        if wanted != got:
            message = f"{name}: expected {wanted.hex()} as in the TCB info, got {got.hex()} in the PCK certificate"
            raise TcbError(message, code=f"tcb.{name}", step="3")
    tcb = PlatformTcb(cpu_svn=pck.cpu_svn, pce_svn=pck.pce_svn)
    rating = rate(quote.body, quote.qe_report, tcb, endorsements.tcb, endorsements.qe)
    return Platform(
        tcb_status=rating.status,
        advisory_ids=tuple(sorted(set(rating.advisories))),
        ppid=pck.ppid,
        fmspc=pck.fmspc,
        evaluation_data_number=min(
            endorsements.tcb_info.evaluation_data_number, endorsements.qe_identity.evaluation_data_number
        ),
    )


def _names(chain: tuple[x509.Certificate, ...]) -> str:
    return ", ".join(x509chain.name(item) for item in chain)


def _second_rating(
    data: bytes, quote: Quote, endorsements: Endorsements, chain: tuple[x509.Certificate, ...], policy: Policy, now: int
) -> Rating:
    try:
        verifier = dcap_qvl.QuoteVerifier(chain[-1].public_bytes(Encoding.DER))
        every = dcap_qvl.QuotePolicy.claims_only(now)  # it rates; which ratings pass is our policy's
        claims = json.loads(verifier.verify_with_policy(data, endorsements.collateral, now, every).to_json())
    except ValueError as err:
        try:
            verify_td(quote.body, policy)
        except MeasurementError:
            return Rating(status=UP_TO_DATE, advisories=())  # it cannot rate such a TD, and step 4 refuses it
        raise QuoteError(f"quote: refused by dcap-qvl: {err}", code="quote.refused", step="3") from err
    return Rating(status=claims["tcb"]["status"], advisories=tuple(claims["tcb"]["advisory_ids"]))


def _verify_pck_chain(
    chain: tuple[x509.Certificate, ...], endorsements: Endorsements, policy: Policy, now: int
) -> None:
    if len(chain) != 3:
        raise QuoteError(f"PCK chain: expected 3 certificates, got {len(chain)}", code="quote.short", step="3")
    try:
        x509chain.verify_chain(chain, root=policy.tdx_root, now=now)
        x509chain.verify_crl(endorsements.pck_crl, chain[1], now=now)
    except x509chain.ChainError as err:
        code = "chain_signature" if err.reason == "signature" else err.reason
        raise QuoteError(f"PCK chain: {err}", code=f"quote.{code}", step="3") from err
    for certificate, known in ((chain[0], (_PCK_NAME,)), (chain[1], _PCK_CA_NAMES)):
        if not any(words in x509chain.common_name(certificate) for words in known):
            message = f"PCK chain: expected {' or '.join(known)}, got {x509chain.name(certificate)}"
            raise QuoteError(message, code="quote.pck_name", step="3")
    if x509chain.is_revoked(chain[0], endorsements.pck_crl):
        message = f"PCK certificate {chain[0].serial_number:x}: revoked by its CA"
        raise QuoteError(message, code="quote.pck_revoked", step="3")
    if x509chain.is_revoked(chain[1], endorsements.root_crl):
        raise QuoteError(f"{x509chain.name(chain[1])}: revoked by the root", code="quote.ca_revoked", step="3")


def _verify_signatures(data: bytes, quote: Quote, pck: x509.Certificate) -> None:
    if not p256_verifies(pck, quote.qe_report_signature, encode_enclave_report(quote.qe_report)):
        raise QuoteError("QE report: its signature does not verify", code="quote.qe_signature", step="3")
    bound = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest() + bytes(32)
    if quote.qe_report.report_data != bound:
        message = f"QE report_data: expected {bound.hex()}, got {quote.qe_report.report_data.hex()}"
        raise QuoteError(message, code="quote.qe_binding", step="3")
    r, s = int.from_bytes(quote.signature[:32]), int.from_bytes(quote.signature[32:])
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + quote.attestation_key)
        key.verify(encode_dss_signature(r, s), signed_part(data), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature) as err:
        raise QuoteError("quote: its signature does not verify", code="quote.signature", step="3") from err


def _pck_extension(pck: x509.Certificate) -> dcap_qvl.PckExtension:
    try:
        found = dcap_qvl.parse_pck_extension_from_pem(pck.public_bytes(Encoding.PEM))
    except ValueError as err:
        raise FormatError(f"PCK certificate: {err}", code="quote.pck_extension", step="3") from err
    for name, size in _PCK_SIZES.items():
        if len(getattr(found, name)) != size:
            message = f"PCK certificate: {name}: expected {size} bytes, got {len(getattr(found, name))}"
            raise FormatError(message, code="quote.pck_extension", step="3")
    return found


def _verify_status(rating: Rating, policy: Policy, now: int) -> None:
    statuses = {item.name for item in policy.accepted_statuses if now <= item.until}
    if rating.status != UP_TO_DATE and rating.status not in statuses:
        accepted = ", ".join((UP_TO_DATE, *sorted(statuses)))
        why = f" ({', '.join(rating.advisories)})" if rating.advisories else ""
        message = f"tcb status: expected {accepted} as in [tdx.accept_status] of the policy, got {rating.status}{why}"
        raise TcbError(message, code="tcb.status", step="3")
    advisories = {item.name for item in policy.accepted_advisories if now <= item.until}
    open_ids = sorted(set(rating.advisories) - advisories)
    if open_ids:
        known = ", ".join(sorted(advisories)) or "none"
        got = ", ".join(open_ids)
        message = f"tcb advisories: expected only {known} as in [tdx.accept_advisory] of the policy, got {got}"
        raise TcbError(message, code="tcb.advisory", step="3")
