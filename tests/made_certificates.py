"""Certificates with what the simulated vendors' own never have."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from countermark_appliance.platform.sim.issue import Issued, simulated_name
from sim_evidence import NOW


def make_certificate(
    issuer: Issued,
    *,
    ca: bool,
    crl_sign: bool = False,
    sign: bool = True,
    extensions: tuple[tuple[str, bytes], ...] = (),
) -> Issued:
    """A P-384 certificate valid around `NOW`; `extensions` (object identifier, value) are critical."""
    key = ec.generate_private_key(ec.SECP384R1())
    start = datetime.datetime.fromtimestamp(NOW - 3600, datetime.UTC)
    names = ("key_encipherment", "data_encipherment", "key_agreement", "content_commitment")
    usage = x509.KeyUsage(
        digital_signature=sign and not ca,
        key_cert_sign=ca,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
        **dict.fromkeys(names, False),
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(simulated_name("made for a test"))
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
    )
    for name, value in extensions:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(name), value)
        builder = builder.add_extension(unknown, critical=True)
    return Issued(key=key, certificate=builder.sign(issuer.key, hashes.SHA384()))
