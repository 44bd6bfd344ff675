"""NVIDIA's endorsements for a GPU: reference manifests (RIM) by name, and OCSP responses for certificates.

RIM service: `GET /v1/rim/<id>` answers {"id", "rim": base64, ...}; `gpu.rim.rim_name` makes the ids (NVIDIA attestation
documentation, "RIM ID Naming Convention"). OCSP: RFC 6960 over HTTP POST (appendix A.1), certificate ids with SHA-384
as NVIDIA's verifier asks for, and without a nonce, so that an answer can be kept until its nextUpdate and handed on.
The device's own certificate, which its boot ROM issues, is unknown to the responder: NVIDIA's verifier does not ask
about it, and nor do we.

Not checked here: signatures, but for `verify_stored_rim` (`gpu.rim`, `gpu.revocation`).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from countermark import x509chain
from countermark.errors import FormatError, UsageError
from countermark.fetch import Validity
from countermark.fetch.https import Service, request
from countermark.formats import strict_json
from countermark.formats.spdm import Report
from countermark.gpu.revocation import MAX_OCSP_BYTES, parse_ocsp
from countermark.gpu.rim import MAX_RIM_BYTES, RimKind, parse_rim, rim_name, verify_rim
from countermark.policy import NVIDIA_RIM_ROOT

RIM_URL: Final = "https://rim.attestation.nvidia.com"
OCSP_URL: Final = "https://ocsp.ndis.nvidia.com"
ROOT: Final = NVIDIA_RIM_ROOT  # SHA-256, above the signers of RIMs
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def rim_ids(report: Report, leaf: x509.Certificate) -> tuple[str, str]:
    """The ids of the driver's and the VBIOS's RIM for the report of the GPU with this certificate.

    Raises `FormatError` (`spdm.text`, `spdm.vbios_version`) and `UsageError` `usage.rim_id`.
    """
    driver, vbios = (_checked(rim_name(report, kind, leaf)) for kind in (RimKind.DRIVER, RimKind.VBIOS))
    return driver, vbios


def _checked(rim_id: str) -> str:
    if not _ID.fullmatch(rim_id):
        raise UsageError(f"RIM id: expected letters, digits, '.', '_' and '-', got {rim_id!r:.60}", code="usage.rim_id")
    return rim_id


def fetch_rim(rim_id: str, service: Service) -> bytes:
    """One RIM, as XML whose form is right and nothing more.

    Raises `UsageError` `usage.rim_id`, `Unavailable` (see `https.request`), and `FormatError`
    `endorsements.fetch.malformed`, `endorsements.json` or `gpu.rim`.
    """
    _checked(rim_id)
    size = 2 * MAX_RIM_BYTES  # base64, and members beside it
    answer = request(service, f"/v1/rim/{rim_id}", max_bytes=size)
    value = strict_json.load(answer.body, "endorsements", max_bytes=size)
    if not isinstance(value, dict) or value.get("id") != rim_id or not isinstance(value.get("rim"), str):
        raise _malformed(f"expected an object with id {rim_id} and rim")
    try:
        data = base64.b64decode(value["rim"], validate=True)
    except (binascii.Error, ValueError) as err:
        raise _malformed("rim: expected base64") from err
    parse_rim(data)
    return data


def fetch_ocsp(certificate: x509.Certificate, issuer: x509.Certificate, service: Service) -> bytes:
    """The responder's answer about one certificate, DER. It may say `revoked`: that is passed on.

    Raises `Unavailable` (see `https.request`), and `FormatError` `gpu.ocsp` or `endorsements.fetch.malformed`.
    """
    asked = ocsp.OCSPRequestBuilder().add_certificate(certificate, issuer, SHA384()).build()
    body = asked.public_bytes(Encoding.DER)
    answer = request(service, "", max_bytes=MAX_OCSP_BYTES, body=body, content_type="application/ocsp-request")
    if all(single.serial != certificate.serial_number for single in parse_ocsp(answer.body).singles):
        raise _malformed(f"OCSP: expected an answer about certificate {certificate.serial_number:x}")
    return answer.body


def revocable(
    chain: Sequence[x509.Certificate], *, device: bool
) -> tuple[tuple[x509.Certificate, x509.Certificate], ...]:
    """(certificate, issuer) of what OCSP can answer about; chain from leaf to root. `device`: it is a GPU's."""
    return tuple(pairwise(chain[1:] if device else chain))


def verify_stored_rim(data: bytes, *, now: int, root: bytes = ROOT) -> Validity:
    """Judge a RIM as step 8 of an appraisal does, for whoever stores it. It holds as long as its signer's certificates.

    Raises as `parse_rim` and `verify_rim`.
    """
    document = parse_rim(data)
    verify_rim(document, root=root, now=now)
    issued = max(int(certificate.not_valid_before_utc.timestamp()) for certificate in document.chain)
    until = min(int(certificate.not_valid_after_utc.timestamp()) for certificate in document.chain)
    return Validity(issued=issued, until=until)


def rim_signers(data: bytes) -> tuple[tuple[x509.Certificate, x509.Certificate], ...]:
    """(certificate, issuer) of a RIM's signer and those above it. Raises `FormatError` `gpu.rim`."""
    return revocable(parse_rim(data).chain, device=False)


def crl_validity(data: bytes) -> Validity:
    """When a CRL holds; a verifier judges who signed it. Raises `FormatError` `gpu.crl`."""
    crl = x509chain.parse_crl(data, "gpu")
    issued = int(crl.last_update_utc.timestamp())
    until = issued if crl.next_update_utc is None else int(crl.next_update_utc.timestamp())
    return Validity(issued=issued, until=until, ages=(issued,))


def ocsp_validity(data: bytes) -> Validity:
    """When an OCSP response holds; a verifier judges who signed it. Raises `FormatError` `gpu.ocsp`."""
    singles = parse_ocsp(data).singles
    issued = [single.this_update for single in singles]
    until = [single.this_update if single.next_update is None else single.next_update for single in singles]
    return Validity(issued=max(issued), until=min(until), ages=(min(issued),))


def _malformed(message: str) -> FormatError:
    return FormatError(f"endorsements service: {message}", code="endorsements.fetch.malformed")
