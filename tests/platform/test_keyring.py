"""The keys of one start: forms, signatures, and that nothing private leaves the object."""

import copy
import pickle

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from machine_helpers import NOW

from countermark.formats.cose_key import encode_cose_key, parse_cose_key
from countermark.formats.evidence import Passport, parse_passport
from countermark.formats.report_data import ROLES, keys_digest
from countermark_appliance.platform.keyring import Keyring, sign_es256

KEYS = Keyring()


def test_public_keys_are_the_private_keys_own():
    roles = {item.role: item.key for item in KEYS.role_keys()}
    assert list(roles) == list(ROLES)
    assert {role: key.algorithm for role, key in roles.items()} == ROLES
    for role, private in (("tls", KEYS.tls), ("receipt-es256", KEYS.receipt_es256)):
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\4" + roles[role].public)
        assert public == private.public_key()
    assert mldsa.MLDSA65PublicKey.from_public_bytes(roles["receipt-ml-dsa-65"].public)
    assert roles["log-ed25519"].public == KEYS.log_ed25519.public_key().public_bytes_raw()
    assert roles["log-ml-dsa-44"].public == KEYS.log_ml_dsa_44.public_key().public_bytes_raw()
    assert all(parse_cose_key(encode_cose_key(key)) == key for key in roles.values())
    assert KEYS.digest() == keys_digest(KEYS.role_keys())


def test_es256_signatures_verify_and_have_low_s():
    for message in (bytes((i,)) for i in range(32)):
        signature = sign_es256(KEYS.receipt_es256, message)
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        KEYS.receipt_es256.public_key().verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
        assert s <= 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551 // 2


def test_tls_certificate():
    passport = Passport(quote=b"quote", claims=b"claims")
    der = KEYS.tls_certificate(passport, now=NOW, valid_s=86_400, simulated=True)
    certificate = x509.load_der_x509_certificate(der)
    certificate.verify_directly_issued_by(certificate)
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki)
    assert digest.finalize() == KEYS.tls_spki()
    extension = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier("2.23.133.5.4.9"))
    assert parse_passport(extension.value.value) == passport
    assert certificate.not_valid_before_utc.timestamp() < NOW < certificate.not_valid_after_utc.timestamp()
    assert "SIMULATED" in certificate.subject.rfc4514_string()
    real = KEYS.tls_certificate(passport, now=NOW, valid_s=86_400, simulated=False)
    assert "SIMULATED" not in x509.load_der_x509_certificate(real).subject.rfc4514_string()


def test_a_keyring_cannot_leave():
    assert KEYS.boot_id.hex() in repr(KEYS)
    assert len(repr(KEYS)) < 90
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leave(KEYS)
    with pytest.raises(AttributeError):
        KEYS.other = 1
