"""Intel's endorsements for a TDX quote, from Intel's service or from a cache of it (PCCS), as our nine-field JSON.

Intel SGX and TDX Provisioning Certification Service API, version 4 (`/sgx/certification/v4/pckcrl`,
`/tdx/certification/v4/tcb`, `/tdx/certification/v4/qe/identity`); the root CRL at
certificates.trustedservices.intel.com, or at a PCCS under `/sgx/certification/v4/rootcacrl` (Intel DCAP, PCCS design
guide). Issuer chains come in headers, percent-encoded PEM. What Intel signs is the text of `tcbInfo` or
`enclaveIdentity` as sent, so it is cut out of the answer byte for byte and never written anew.

`verify_collateral` judges what came by the steps of an appraisal. Not checked here: the TCB level (`tdx.quote`).
"""

from __future__ import annotations

import json
import re
import urllib.parse
from dataclasses import dataclass
from typing import Final

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from countermark import x509chain
from countermark.errors import FormatError, UsageError
from countermark.fetch import Validity
from countermark.fetch.https import Response, Service, request
from countermark.formats import strict_json
from countermark.formats.quote import parse_quote
from countermark.policy import DAY_S, INTEL_SGX_ROOT, Policy, Profile
from countermark.policy.value import MAX_VALIDITY_DAYS
from countermark.tdx.endorsements import Endorsements, parse_endorsements, verify_endorsements

PCS_URL: Final = "https://api.trustedservices.intel.com"
ROOT_CRL_URL: Final = "https://certificates.trustedservices.intel.com/IntelSGXRootCA.der"
ROOT: Final = INTEL_SGX_ROOT  # SHA-256
_MAX_JSON: Final = 512 * 1024
_MAX_CRL: Final = 512 * 1024
_SGX: Final = "/sgx/certification/v4"
_TDX: Final = "/tdx/certification/v4"
_PEM_CRL: Final = re.compile(rb"\s*-----BEGIN X509 CRL-----[^-]+-----END X509 CRL-----\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A service with Intel's API. `root_crl`: where the root CRL is, unless at the service itself.

    `update`: `standard`, `early` (stricter: Intel publishes a TCB recovery early first), or a tcbEvaluationDataNumber.
    Raises `UsageError` `usage.update`.
    """

    service: Service
    root_crl: Service | None = None
    update: str | int = "standard"

    def __post_init__(self) -> None:
        number = isinstance(self.update, int) and 0 < self.update < 1 << 31
        if not number and self.update not in ("standard", "early"):
            message = f"update: expected standard, early or a tcbEvaluationDataNumber, got {self.update!r}"
            raise UsageError(message, code="usage.update")


def intel(update: str | int = "standard") -> Source:
    """Intel's own service."""
    return Source(service=Service(url=PCS_URL), root_crl=Service(url=ROOT_CRL_URL), update=update)


def pccs(service: Service, update: str | int = "standard") -> Source:
    """A PCCS. Its URL may be given as DCAP's own configuration has it, with `/sgx/certification/v4/` at the end."""
    base = service.url.rstrip("/").removesuffix(_SGX).removesuffix(_TDX)
    return Source(service=Service(url=base, ca_file=service.ca_file, timeout_s=service.timeout_s), update=update)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a PCK certificate chain asks for: the platform family, and which CA (`platform` or `processor`) issued."""

    fmspc: bytes
    ca: str


def wanted_by(pck_chain_pem: bytes) -> Wanted:
    """FMSPC and CA of a PCK chain, leaf first. Raises `FormatError` (`quote.pem`, `.chain`, `.pck_extension`)."""
    leaf = x509chain.parse_pem_chain(pck_chain_pem, "quote")[0]
    try:
        fmspc = dcap_qvl.parse_pck_extension_from_pem(leaf.public_bytes(Encoding.PEM)).fmspc
    except ValueError as err:
        raise FormatError(f"PCK certificate: {err}", code="quote.pck_extension") from err
    names = leaf.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    for ca in ("platform", "processor"):
        if names and str(names[0].value).endswith(f"SGX PCK {ca.capitalize()} CA"):
            return Wanted(fmspc=fmspc, ca=ca)
    issuer = leaf.issuer.rfc4514_string()
    message = f"PCK certificate issuer: expected Intel SGX PCK Platform CA or Processor CA, got {issuer}"
    raise FormatError(message, code="quote.pck_extension")


def fetch_collateral(quote: bytes, source: Source) -> bytes:
    """The endorsements for a quote. Raises as `parse_quote` and `fetch_collateral_for`."""
    return fetch_collateral_for(wanted_by(parse_quote(quote, any_trailing=True).pck_chain_pem), source)


def fetch_collateral_for(wanted: Wanted, source: Source) -> bytes:
    """Four requests, one JSON object. Its form is checked, its signatures are not.

    Raises `Unavailable` (see `https.request`), and `FormatError` `endorsements.fetch.malformed`,
    `endorsements.fetch.fmspc` (for another platform family) or of `parse_endorsements`.
    """
    service = source.service
    update = f"update={source.update}" if isinstance(source.update, str) else f"tcbEvaluationDataNumber={source.update}"
    crl = request(service, f"{_SGX}/pckcrl?ca={wanted.ca}&encoding=der", max_bytes=_MAX_CRL)
    tcb = request(service, f"{_TDX}/tcb?fmspc={wanted.fmspc.hex().upper()}&{update}", max_bytes=_MAX_JSON)
    qe = request(service, f"{_TDX}/qe/identity?{update}", max_bytes=_MAX_JSON)
    if source.root_crl is None:
        root_crl = request(service, f"{_SGX}/rootcacrl", max_bytes=_MAX_CRL)
    else:
        root_crl = request(source.root_crl, "", max_bytes=_MAX_CRL)
    tcb_info, tcb_signature = _signed_text(tcb.body, "tcbInfo")
    qe_identity, qe_signature = _signed_text(qe.body, "enclaveIdentity")
    data = strict_json.dump(
        {
            "pck_crl_issuer_chain": _chain(crl, "SGX-PCK-CRL-Issuer-Chain"),
            "root_ca_crl": _crl(root_crl.body, "root CA CRL").hex(),
            "pck_crl": _crl(crl.body, "PCK CRL").hex(),
            "tcb_info_issuer_chain": _chain(tcb, "TCB-Info-Issuer-Chain", "SGX-TCB-Info-Issuer-Chain"),
            "tcb_info": tcb_info,
            "tcb_info_signature": tcb_signature,
            "qe_identity_issuer_chain": _chain(qe, "SGX-Enclave-Identity-Issuer-Chain"),
            "qe_identity": qe_identity,
            "qe_identity_signature": qe_signature,
        }
    )
    parse_endorsements(data)
    found = str(json.loads(tcb_info)["fmspc"])
    if found.lower() != wanted.fmspc.hex():
        message = f"TCB info: expected fmspc {wanted.fmspc.hex()}, got {found!r:.40}"
        raise FormatError(message, code="endorsements.fetch.fmspc")
    return data


def verify_collateral(data: bytes, *, now: int, root: bytes = ROOT) -> Validity:
    """Judge endorsements as step 2 of an appraisal does, for whoever stores them; a policy's age and number aside.

    `root`: SHA-256 of the root certificate. Raises `FormatError` and `TcbError` `endorsements.*`.
    """
    endorsements = parse_endorsements(data)
    widest = Policy(
        profile=Profile.DEVELOPMENT,
        created=now,
        not_after=now + DAY_S,
        tdx_root=root,
        endorsement_max_age_days=MAX_VALIDITY_DAYS,
        min_tcb_evaluation_data_number=0,
    )
    verify_endorsements(endorsements, widest, now=now)
    return _validity(endorsements)


def _validity(endorsements: Endorsements) -> Validity:
    signed = (endorsements.tcb_info, endorsements.qe_identity)
    crls = (endorsements.pck_crl, endorsements.root_crl)
    issued = [item.issue_date for item in signed] + [int(crl.last_update_utc.timestamp()) for crl in crls]
    until = [item.next_update for item in signed]
    until += [int(crl.next_update_utc.timestamp()) for crl in crls if crl.next_update_utc is not None]
    numbers = [item.evaluation_data_number for item in signed]
    return Validity(issued=max(issued), until=min(until), ages=(*numbers, *issued))


def _signed_text(body: bytes, member: str) -> tuple[str, str]:
    """The exact text of `member`, and the signature beside it, from {"<member>":{...},"signature":"<hex>"}."""
    value = strict_json.load(body, "endorsements", max_bytes=_MAX_JSON)
    if not isinstance(value, dict) or value.keys() != {member, "signature"} or not isinstance(value[member], dict):
        raise _malformed(f"expected an object of {member} and signature")
    text = body.decode()
    start = re.match(rf'\s*\{{\s*"{member}"\s*:\s*', text)
    if start is None:
        raise _malformed(f"expected {member} first, then signature")
    _, end = json.JSONDecoder().raw_decode(text, start.end())
    if not isinstance(value["signature"], str):
        raise _malformed("signature: expected hex")
    return text[start.end() : end], value["signature"]


def _chain(response: Response, *names: str) -> str:
    for name in names:
        if name.lower() in response.headers:
            return urllib.parse.unquote(response.headers[name.lower()], errors="replace")
    raise _malformed(f"expected the header {names[0]}, got none")


def _crl(body: bytes, what: str) -> bytes:
    """DER as sent: Intel's service sends DER, a PCCS hex or PEM."""
    if body[:1] == b"\x30":
        return body
    try:
        if _PEM_CRL.fullmatch(body):
            return x509.load_pem_x509_crl(body).public_bytes(Encoding.DER)
        return bytes.fromhex(body.decode("ascii").strip().strip('"'))
    except ValueError as err:
        raise _malformed(f"{what}: expected DER, hex or PEM") from err


def _malformed(message: str) -> FormatError:
    return FormatError(f"endorsements service: {message}", code="endorsements.fetch.malformed")
