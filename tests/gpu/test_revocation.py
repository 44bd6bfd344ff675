"""CRLs and OCSP responses over GPU and RIM signer certificates; answers of OpenSSL's responder are read too."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import ocsp

import vectors
from countermark import x509chain
from countermark.errors import CountermarkError, FormatError, Undecidable
from countermark.gpu.revocation import Revocation, parse_ocsp, parse_revocation, verify_revocation
from countermark.policy import GpuRevocationRule
from countermark_appliance.platform.sim import nvidia
from countermark_appliance.platform.sim.issue import Issued, issue, issue_crl
from made_certificates import make_certificate
from sim_evidence import NOW, machine

REQUIRED, OPTIONAL = GpuRevocationRule.REQUIRED, GpuRevocationRule.OPTIONAL
DAY = 86_400
VENDOR = machine().gpu_vendor
GPU = machine().gpus[0]
DEVICE = tuple(x509.load_der_x509_certificate(der) for der in GPU.chain(VENDOR))
SIGNER = (VENDOR.rim_signer.certificate, VENDOR.rim_root.certificate)
CRLS = nvidia.crls(VENDOR, now=NOW)


def judge(
    crls: Sequence[bytes] = CRLS, responses: Sequence[bytes] = (), rule: GpuRevocationRule = REQUIRED, now: int = NOW
) -> str:
    """One GPU, no RIM."""
    return verify_revocation([DEVICE], parse_revocation(crls, responses), rule=rule, now=now)


def judge_signer(*responses: bytes, rule: GpuRevocationRule = REQUIRED, now: int = NOW) -> str:
    """No GPU, one RIM signer."""
    given = parse_revocation((), responses)
    return verify_revocation([], given, rule=rule, now=now, rim_chains=[SIGNER])


def answer(
    status: ocsp.OCSPCertStatus = ocsp.OCSPCertStatus.GOOD,
    *,
    subject: x509.Certificate = VENDOR.rim_signer.certificate,
    issuer: Issued = VENDOR.rim_root,
    responder: Issued = VENDOR.rim_responder,
    at: int = NOW,
    reason: x509.ReasonFlags | None = None,
    algorithm: hashes.HashAlgorithm | None = None,
) -> bytes:
    return nvidia.ocsp_response(subject, issuer, responder, now=at, status=status, reason=reason, algorithm=algorithm)


def test_crls_cover_all_but_the_leaf_and_the_root() -> None:
    assert judge() == "3 of 3 certificates known not to be revoked"
    assert judge_signer(answer()) == "1 of 1 certificates known not to be revoked"


@pytest.mark.parametrize(
    "algorithm",
    [hashes.SHA1(), hashes.SHA256(), hashes.SHA384(), hashes.SHA512()],  # noqa: S303
    ids=lambda item: item.name,
)
def test_a_certificate_may_be_named_in_any_of_the_sha_family(algorithm: hashes.HashAlgorithm) -> None:
    assert judge_signer(answer(algorithm=algorithm)).startswith("1 of 1")


def test_ocsp_for_the_device_chain_by_the_issuers_themselves() -> None:
    pairs = (
        (GPU.boot_rom, VENDOR.provisioner),
        (VENDOR.provisioner, VENDOR.family),
        (VENDOR.family, VENDOR.root),
    )
    given = [answer(subject=below.certificate, issuer=above, responder=above) for below, above in pairs]
    assert judge((), given) == "3 of 3 certificates known not to be revoked"
    assert judge(CRLS[:2], given[:1]).startswith("3 of 3")  # a mixture
    with pytest.raises(Undecidable) as err:
        judge((), given[1:])
    assert err.value.code == "gpu.revocation_missing"
    assert "GSP BROM" in str(err.value)


def test_what_the_rules_demand() -> None:
    assert judge((), rule=OPTIONAL) == "0 of 3 certificates known not to be revoked"
    for given in ((), CRLS[:1], CRLS[1:]):
        with pytest.raises(Undecidable) as err:
            judge(given)
        assert (err.value.code, err.value.step) == ("gpu.revocation_missing", "8")
    with pytest.raises(Undecidable) as err:
        judge_signer()
    assert err.value.code == "gpu.revocation_missing"


def test_genuine_chains_lack_revocation_input_until_some_is_given() -> None:
    chain = x509chain.parse_pem_chain(vectors.gpu_chain_pem("h100-550"), "gpu")
    with pytest.raises(Undecidable) as err:
        verify_revocation([chain], Revocation(), rule=REQUIRED, now=NOW)
    assert err.value.code == "gpu.revocation_missing"
    text = verify_revocation([chain], Revocation(), rule=OPTIONAL, now=NOW)
    assert text == "0 of 3 certificates known not to be revoked"


def revoked(certificate: x509.Certificate, reason: x509.ReasonFlags | None) -> tuple[bytes, ...]:
    """The vendor's CRLs with one certificate in them, for a reason."""
    start = datetime.datetime.fromtimestamp(NOW - 3600, datetime.UTC)
    entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(start)
    if reason is not None:
        entry = entry.add_extension(x509.CRLReason(reason), critical=False)
    issuers = (VENDOR.root, VENDOR.family, VENDOR.provisioner)
    issuer = next(item for item in issuers if item.certificate.subject == certificate.issuer)
    return crl(issuer, entry=entry.build())


def crl(
    issuer: Issued,
    *,
    entry: x509.RevokedCertificate | None = None,
    next_update: bool = True,
    extension: x509.ExtensionType | None = None,
) -> tuple[bytes, ...]:
    start = datetime.datetime.fromtimestamp(NOW - 3600, datetime.UTC)
    builder = x509.CertificateRevocationListBuilder().issuer_name(issuer.certificate.subject).last_update(start)
    builder = builder.next_update(start + datetime.timedelta(days=30))
    builder = builder if extension is None else builder.add_extension(extension, critical=True)
    builder = builder if entry is None else builder.add_revoked_certificate(entry)
    return (builder.sign(issuer.key, hashes.SHA384()).public_bytes(Encoding.DER),)


def responder(issuer: Issued = VENDOR.rim_root, **times: int) -> Issued:
    purpose = next(e for e in VENDOR.rim_responder.certificate.extensions if e.oid.dotted_string == "2.5.29.37")
    encoded = x509.UnrecognizedExtension(purpose.oid, bytes.fromhex("300a06082b06010505070309"))
    span = {"not_before": NOW - DAY, "not_after": NOW + DAY, **times}
    return issue("responder", issuer, **span, curve=ec.SECP384R1(), ca=False, extensions=(encoded,))


def without_certificate() -> bytes:
    """Signed by the delegate, whose certificate was taken out."""
    start = datetime.datetime.fromtimestamp(NOW - 3600, datetime.UTC)
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=VENDOR.rim_signer.certificate,
        issuer=VENDOR.rim_root.certificate,
        algorithm=hashes.SHA256(),
        cert_status=ocsp.OCSPCertStatus.GOOD,
        this_update=start,
        next_update=start + datetime.timedelta(days=1),
        revocation_time=None,
        revocation_reason=None,
    )
    builder = builder.responder_id(ocsp.OCSPResponderEncoding.NAME, VENDOR.rim_responder.certificate)
    return builder.sign(VENDOR.rim_responder.key, hashes.SHA384()).public_bytes(Encoding.DER)


def endless() -> bytes:
    start = datetime.datetime.fromtimestamp(NOW - 3600, datetime.UTC)
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=VENDOR.rim_signer.certificate,
        issuer=VENDOR.rim_root.certificate,
        algorithm=hashes.SHA256(),
        cert_status=ocsp.OCSPCertStatus.GOOD,
        this_update=start,
        next_update=None,
        revocation_time=None,
        revocation_reason=None,
    )
    builder = builder.responder_id(ocsp.OCSPResponderEncoding.HASH, VENDOR.rim_root.certificate)
    return builder.sign(VENDOR.rim_root.key, hashes.SHA384()).public_bytes(Encoding.DER)


def crl_of_a_chip() -> str:
    """The boot ROM's key certifies and does nothing else, in genuine chains."""
    boot_rom = make_certificate(VENDOR.provisioner, ca=True, crl_sign=False)
    leaf = make_certificate(boot_rom, ca=False, crl_sign=False)
    chain = (leaf.certificate, boot_rom.certificate, *DEVICE[2:])
    given = parse_revocation((issue_crl(boot_rom, this_update=NOW - 60, next_update=NOW + 60),), ())
    return verify_revocation([chain], given, rule=OPTIONAL, now=NOW)


def other_signature(data: bytes) -> bytes:
    """The same length of signature, by a key nobody certified."""
    signature = ocsp.load_der_ocsp_response(data).signature
    while True:
        other = FOREIGN.rim_root.key.sign(b"other", ec.ECDSA(hashes.SHA384()))
        if len(other) == len(signature):
            return data.replace(signature, other)


FOREIGN = nvidia.make_gpu_vendor(now=NOW)
HOLD = x509.ReasonFlags.certificate_hold
STATUS = ocsp.OCSPCertStatus
REFUSED: dict[str, tuple[str, Callable[[], str]]] = {
    "CRL: boot ROM revoked": ("gpu.revoked", lambda: judge(revoked(GPU.boot_rom.certificate, None))),
    "CRL: provisioner revoked, key compromise": (
        "gpu.revoked",
        lambda: judge(revoked(VENDOR.provisioner.certificate, x509.ReasonFlags.key_compromise)),
    ),
    "CRL: family on hold": ("gpu.revoked", lambda: judge(revoked(VENDOR.family.certificate, HOLD))),
    "CRL: revoked, though optional": (
        "gpu.revoked",
        lambda: judge(revoked(VENDOR.family.certificate, None), rule=OPTIONAL),
    ),
    "CRL expired": ("gpu.expired", lambda: judge(nvidia.crls(VENDOR, now=NOW - 60 * DAY))),
    "CRL expired, though optional": (
        "gpu.expired",
        lambda: judge(nvidia.crls(VENDOR, now=NOW - 60 * DAY), rule=OPTIONAL),
    ),
    "CRL from the future": ("gpu.not_yet_valid", lambda: judge(nvidia.crls(VENDOR, now=NOW + DAY))),
    "CRL of a stranger with the same name": ("gpu.crl_signature", lambda: judge(nvidia.crls(FOREIGN, now=NOW))),
    "CRL of nobody here": (
        "gpu.crl_stranger",
        lambda: judge((issue_crl(responder(), this_update=NOW - 60, next_update=NOW + 60),)),
    ),
    "CRL of changes only": (
        "gpu.crl_extension",
        lambda: judge(crl(VENDOR.family, extension=x509.DeltaCRLIndicator(1))),
    ),
    "CRL of some certificates only": (
        "gpu.crl_extension",
        lambda: judge(
            crl(
                VENDOR.family,
                extension=x509.IssuingDistributionPoint(None, None, True, False, None, False, False),
            )
        ),
    ),
    "CRL by an authority that may not sign lists": ("gpu.crl_issuer", crl_of_a_chip),
    "CRL that ends this second": ("gpu.expired", lambda: judge(nvidia.crls(VENDOR, now=NOW - 30 * DAY))),
    "OCSP that ends this second": (
        "gpu.ocsp_expired",
        lambda: judge_signer(answer(at=NOW - 30 * DAY + 3600)),
    ),
    "OCSP: revoked": ("gpu.revoked", lambda: judge_signer(answer(STATUS.REVOKED))),
    "OCSP: on hold": ("gpu.revoked", lambda: judge_signer(answer(STATUS.REVOKED, reason=HOLD), rule=OPTIONAL)),
    "OCSP: unknown": ("gpu.ocsp_unknown", lambda: judge_signer(answer(STATUS.UNKNOWN), rule=OPTIONAL)),
    "OCSP: revoked in one answer, good in another": (
        "gpu.revoked",
        lambda: judge_signer(answer(), answer(STATUS.REVOKED)),
    ),
    "OCSP expired": ("gpu.ocsp_expired", lambda: judge_signer(answer(at=NOW - 60 * DAY))),
    "OCSP without an end": ("gpu.ocsp_expired", lambda: judge_signer(endless())),
    "OCSP from the future": ("gpu.ocsp_not_yet_valid", lambda: judge_signer(answer(at=NOW + DAY))),
    "OCSP for nobody here": (
        "gpu.ocsp_stranger",
        lambda: judge_signer(answer(subject=VENDOR.family.certificate, issuer=VENDOR.root, responder=VENDOR.root)),
    ),
    "OCSP for the serial of another issuer": (
        "gpu.ocsp_stranger",
        lambda: judge_signer(answer(issuer=FOREIGN.rim_root, responder=FOREIGN.rim_responder)),
    ),
    "OCSP by a stranger": ("gpu.ocsp_responder", lambda: judge_signer(answer(responder=FOREIGN.rim_responder))),
    "OCSP by another vendor's authority of the same name": (
        "gpu.ocsp_responder",
        lambda: judge_signer(answer(responder=FOREIGN.rim_root)),
    ),
    "OCSP by the certificate in question": (
        "gpu.ocsp_responder",
        lambda: judge_signer(answer(responder=VENDOR.rim_signer)),
    ),
    "OCSP by a delegate for something else": (
        "gpu.ocsp_responder",
        lambda: judge_signer(
            answer(responder=nvidia.make_responder(VENDOR.rim_root, now=NOW, purpose="1.3.6.1.5.5.7.3.3"))
        ),
    ),
    "OCSP by a delegate of another authority": (
        "gpu.ocsp_responder",
        lambda: judge_signer(answer(responder=responder(VENDOR.root))),
    ),
    "OCSP by an expired delegate": (
        "gpu.ocsp_responder",
        lambda: judge_signer(answer(responder=responder(not_after=NOW - 1))),
    ),
    "OCSP without the delegate's certificate": ("gpu.ocsp_responder", lambda: judge_signer(without_certificate())),
    "OCSP signature under our delegate's certificate": (
        "gpu.ocsp_signature",
        lambda: judge_signer(other_signature(answer())),
    ),
    "OCSP signature under our authority's name": (
        "gpu.ocsp_signature",
        lambda: judge_signer(other_signature(answer(responder=VENDOR.rim_root))),
    ),
}


@pytest.mark.parametrize(("code", "refused"), REFUSED.values(), ids=REFUSED)
def test_refused(code: str, refused: Callable[[], str]) -> None:
    with pytest.raises(CountermarkError) as err:
        refused()
    assert (err.value.code, err.value.step) == (code, "8")
    assert not isinstance(err.value, Undecidable)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_flipped_bit_of_an_ocsp_response_is_refused_or_means_the_same() -> None:
    """Certificates in it that do not sign, and the order of DER's outer lengths, are not signed by anybody."""
    data = answer()
    parsed = parse_ocsp(data)
    accepted = 0
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        try:
            judge_signer(bytes(changed))
        except CountermarkError:
            continue
        accepted += 1
        assert parse_ocsp(bytes(changed)).singles == parsed.singles
    assert accepted <= 1


UNSUCCESSFUL = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER)


@pytest.mark.parametrize(
    "data",
    [b"", b"0", bytes(20_000), answer()[:-1], answer() + b"\0", UNSUCCESSFUL.public_bytes(Encoding.DER)],
    ids=["empty", "no DER", "too long", "cut", "trailing", "try later"],
)
def test_ocsp_responses_that_are_none(data: bytes) -> None:
    with pytest.raises(FormatError) as err:
        parse_ocsp(data)
    assert err.value.code == "gpu.ocsp"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")
@pytest.mark.parametrize(("state", "code"), [("V", ""), ("R", "gpu.revoked"), ("none", "gpu.ocsp_unknown")])
def test_openssls_answers_are_read_as_it_means_them(tmp_path: Path, state: str, code: str) -> None:
    """OpenSSL's own responder and request, SHA-256 certID, delegated signer."""
    now = int(datetime.datetime.now(datetime.UTC).timestamp())
    vendor = nvidia.make_gpu_vendor(now=now)
    below, root, delegate = vendor.rim_signer, vendor.rim_root, vendor.rim_responder
    for name, item in (("below", below), ("root", root), ("delegate", delegate)):
        (tmp_path / f"{name}.pem").write_text(item.pem)
    key = delegate.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(key)
    revocation = "250101000000Z" if state == "R" else ""
    serial = f"{below.certificate.serial_number:X}"
    serial = serial if len(serial) % 2 == 0 else f"0{serial}"
    line = f"{state}\t991231235959Z\t{revocation}\t{serial}\tunknown\t/CN=x\n"
    (tmp_path / "index.txt").write_text("" if state == "none" else line)
    commands = (
        "ocsp -sha256 -issuer root.pem -cert below.pem -no_nonce -reqout request.der",
        "ocsp -index index.txt -CA root.pem -rsigner delegate.pem -rkey key.pem -rmd sha384 -ndays 1"
        " -reqin request.der -respout response.der",
    )
    for command in commands:
        subprocess.run(("openssl", *command.split()), cwd=tmp_path, check=True, capture_output=True)
    given = parse_revocation((), [(tmp_path / "response.der").read_bytes()])
    chain = (below.certificate, root.certificate)
    if not code:
        assert verify_revocation([], given, rule=REQUIRED, now=now + 60, rim_chains=[chain]).startswith("1 of 1")
        return
    with pytest.raises(CountermarkError) as err:
        verify_revocation([], given, rule=REQUIRED, now=now + 60, rim_chains=[chain])
    assert err.value.code == code
