"""The signatures of a TDX quote and the TCB level of the platform that made it.

Intel SGX DCAP quote verification, appendix A.4 of the TDX DCAP Quoting Library API (quote version 4 and 5),
certification data type 6 over 5. Numbered in `verify_quote`. dcap-qvl decides (its policy API; its legacy `verify`
accepts OutOfDate); every signature, revocation and the FMSPC are checked here before it, so that a refusal's code never
hangs on the text of another library's message, and so that two implementations must agree before a quote passes. Not
checked here: TD attributes and module (`tdx.td`), measurements, report_data, and the endorsements' own signatures and
times (`tdx.endorsements`, which must have passed first). Dynamic platform, cached keys and SMT flags are not judged:
every multi-socket TDX server sets them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Final

import dcap_qvl
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from countermark import x509chain
from countermark.errors import FormatError, QuoteError, TcbError
from countermark.formats.quote import Quote, encode_enclave_report, signed_part
from countermark.policy import INTEL_SGX_ROOT, Policy
from countermark.tdx.endorsements import Endorsements, p256_verifies
from countermark.tdx.td import verify_td

# Refinement only: which of our codes fits when dcap-qvl refuses what passed every check of ours.
_REASONS: Final = (
    ("no matching tcb level", "tcb.no_level"),
    ("revoked", "tcb.status"),
    ("tdx module", "tcb.module"),
    ("qe ", "tcb.qe_identity"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What a verified quote's certificates and TCB info say about the machine."""

    tcb_status: str
    advisory_ids: tuple[str, ...]
    ppid: bytes
    fmspc: bytes
    evaluation_data_number: int


def _chain(raw: Quote) -> tuple[x509.Certificate, ...]:
    return x509chain.parse_pem_chain(raw.pck_chain_pem, "quote")


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
    """Step 3: 1 PCK chain, 2 revocation, 3 QE report, 4 quote signature, 5 FMSPC, 6 dcap-qvl, 7 TCB status.

    `quote` is `parse_quote(data)`. Raises `QuoteError` (`quote.root`, `quote.short`, `quote.ca`,
    `quote.chain_signature`, `quote.not_yet_valid`, `quote.expired`, `quote.crl_issuer`, `quote.crl_signature`,
    `quote.pck_revoked`, `quote.ca_revoked`, `quote.qe_signature`, `quote.qe_binding`, `quote.signature`,
    `quote.pck_extension`, `quote.refused`), `TcbError` (`tcb.fmspc`, `tcb.no_level`, `tcb.module`, `tcb.qe_identity`,
    `tcb.status`, `tcb.advisory`) or, where dcap-qvl refuses the TD's attributes, the `MeasurementError` of `verify_td`.
    """
    chain = _chain(quote)
    _verify_pck_chain(chain, endorsements, policy, now)
    _verify_signatures(data, quote, chain[0])
    pck = _pck_extension(chain[0])
    if pck.fmspc != endorsements.fmspc:
        message = f"fmspc: expected {endorsements.fmspc.hex()} as in the TCB info, got {pck.fmspc.hex()}"
        raise TcbError(message, code="tcb.fmspc", step="3")
    try:
        verifier = dcap_qvl.QuoteVerifier(chain[-1].public_bytes(Encoding.DER))
        rate = dcap_qvl.QuotePolicy.claims_only(now)  # it rates; which ratings pass is our policy's
        claims = json.loads(verifier.verify_with_policy(data, endorsements.collateral, now, rate).to_json())
    except ValueError as err:
        verify_td(quote.body, policy)
        text = str(err).lower()
        for words, code in _REASONS:
            if words in text:
                raise TcbError(f"tcb: {err}", code=code, step="3") from err
        raise QuoteError(f"quote: {err}", code="quote.refused", step="3") from err
    platform = Platform(
        tcb_status=claims["tcb"]["status"],
        advisory_ids=tuple(claims["tcb"]["advisory_ids"]),
        ppid=pck.ppid,
        fmspc=pck.fmspc,
        evaluation_data_number=claims["tcb"]["eval_data_number"],
    )
    _verify_status(platform, policy, now)
    return platform


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
        return dcap_qvl.parse_pck_extension_from_pem(pck.public_bytes(Encoding.PEM))
    except ValueError as err:
        raise FormatError(f"PCK certificate: {err}", code="quote.pck_extension", step="3") from err


def _verify_status(platform: Platform, policy: Policy, now: int) -> None:
    statuses = {item.name for item in policy.accepted_statuses if now <= item.until}
    if platform.tcb_status != "UpToDate" and platform.tcb_status not in statuses:
        accepted = ", ".join(("UpToDate", *sorted(statuses)))
        raise TcbError(f"tcb status: expected {accepted}, got {platform.tcb_status}", code="tcb.status", step="3")
    advisories = {item.name for item in policy.accepted_advisories if now <= item.until}
    open_ids = sorted(set(platform.advisory_ids) - advisories)
    if open_ids:
        message = f"tcb advisories: expected none but {sorted(advisories)}, got {open_ids}"
        raise TcbError(message, code="tcb.advisory", step="3")
