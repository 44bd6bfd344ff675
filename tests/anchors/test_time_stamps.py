"""Time stamps of RFC 3161: ours against `openssl ts` in both directions, genuine ones, and every way to be wrong."""

from __future__ import annotations

import subprocess
import time as clock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tsa
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st
from tsa import DAY, NOW, Authority, issue, seq, tlv

from countermark.anchors.rfc3161 import Stamp, verify_stamp
from countermark.errors import CountermarkError, FormatError, LogError
from countermark.formats.timestamp import encode_request, parse_response, parse_token

DATA = Path(__file__).parents[1] / "data" / "tsa"
PCA_2010 = bytes.fromhex("ebec1edd9e140d9c105cc62b15a915c5443ddc514a35e5773c09afb0274c7ba5")
MESSAGE = "example.org/boot\n3\nAAAA\n\n— not parsed here\n".encode()
RSA = rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def verified(token: bytes, authority: Authority, **options: Any) -> Stamp:
    return verify_stamp(token, MESSAGE, **{"roots": [authority.root.digest], **options})


def refused(code: str, token: bytes, authority: Authority, **options: Any) -> None:
    with pytest.raises(LogError if not code.startswith(("der", "anchor.token")) else FormatError) as caught:
        verified(token, authority, **options)
    assert caught.value.code == code


def test_a_stamp_gives_its_time(authority: Authority) -> None:
    stamp = verified(authority.token(MESSAGE, nonce=99), authority)
    assert (stamp.info.time, stamp.info.policy, stamp.info.nonce) == (NOW, "1.2.3.4.1", 99)
    assert (stamp.authority, stamp.root) == ("test stamper", authority.root.digest)


@pytest.mark.parametrize("hash_name", ["sha256", "sha384", "sha512"])
def test_hashes(authority: Authority, hash_name: str) -> None:
    assert verified(authority.token(MESSAGE, hash_name=hash_name), authority).info.hash == hash_name


@pytest.mark.parametrize(
    ("key", "scheme", "hash_name"),
    [
        (RSA, "rsa", "sha256"),
        (RSA, "sha512-rsa", "sha512"),
        (RSA, "pss", "sha384"),
        (ec.generate_private_key(ec.SECP384R1()), "ecdsa-sha512", "sha256"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519", "sha512"),
    ],
)
def test_signature_schemes(authority: Authority, key: Any, scheme: str, hash_name: str) -> None:
    other = Authority(authority.root, authority.between, authority.stamper(key=key))
    verified(other.token(MESSAGE, scheme=scheme, hash_name=hash_name), authority)
    verified(other.token(MESSAGE, scheme=scheme, hash_name=hash_name, legacy=True), authority)
    token = other.token(MESSAGE, scheme=scheme, hash_name=hash_name)
    refused("anchor.signature", token[:-1] + bytes([token[-1] ^ 1]), authority)  # the signature is what it ends with


def test_a_certificate_below_a_root_can_be_pinned(authority: Authority) -> None:
    assert authority.between is not None
    token = authority.token(MESSAGE, embedded=[item.der for item in authority.chain[:2]])
    refused("anchor.root", token, authority)
    assert verified(token, authority, roots=[authority.between.digest]).root == authority.between.digest


def test_the_stamping_certificate_itself_cannot(authority: Authority) -> None:
    refused("anchor.root", authority.token(MESSAGE), authority, roots=[authority.chain[0].digest])


def test_the_order_of_certificates_does_not_matter(authority: Authority) -> None:
    ders = [item.der for item in (*authority.chain, issue("nobody"))]
    for embedded in (ders, ders[::-1], [*ders[2:], *ders[:2]]):
        verified(authority.token(MESSAGE, embedded=embedded), authority)


def test_unsigned_attributes_are_passed_over(authority: Authority) -> None:
    verified(authority.token(MESSAGE, unsigned=tlv(0xA1, seq(tsa.oid("content-type"), tlv(0x31)))), authority)


Change = Callable[[Authority], dict[str, Any]]
REFUSED: dict[str, tuple[str, Change]] = {
    "another message": ("anchor.imprint", lambda a: {"token": a.token(MESSAGE + b"\n")}),
    "a foreign root": ("anchor.root", lambda a: {"token": Authority().token(MESSAGE)}),
    "no root is pinned": ("anchor.root", lambda a: {"token": a.token(MESSAGE), "roots": []}),
    "another policy": ("anchor.policy", lambda a: {"token": a.token(MESSAGE), "policies": ["1.2.3.4.2"]}),
    "expired at genTime": ("anchor.expired", lambda a: {"token": a.token(MESSAGE, time=NOW + 101 * DAY)}),
    "not valid yet at genTime": ("anchor.not_yet_valid", lambda a: {"token": a.token(MESSAGE, time=NOW - 101 * DAY)}),
    "an authority that expired": (
        "anchor.expired",
        lambda a: {"token": Authority(a.root, issue("old", a.root, end=NOW - 1)).token(MESSAGE)},
    ),
    "an authority that is no CA": (
        "anchor.ca",
        lambda a: {"token": Authority(a.root, issue("no CA", a.root, ca=False)).token(MESSAGE)},
    ),
    "no extended key usage": ("anchor.usage", lambda a: by(a, usage=[])),
    "another extended key usage": ("anchor.usage", lambda a: by(a, usage=[ExtendedKeyUsageOID.CODE_SIGNING])),
    "a second extended key usage": (
        "anchor.usage",
        lambda a: by(a, usage=[ExtendedKeyUsageOID.TIME_STAMPING, ExtendedKeyUsageOID.CODE_SIGNING]),
    ),
    "an extended key usage that is not critical": ("anchor.usage", lambda a: by(a, critical=False)),
    "a key that may not sign": ("anchor.usage", lambda a: by(a, signs=False)),
    "a CA that stamps": ("anchor.usage", lambda a: by(a, ca=True)),
    "a short RSA key": (
        "anchor.signature",
        lambda a: by(a, key=rsa.generate_private_key(65537, 1024), scheme="rsa"),  # noqa: S505
    ),
    "another scheme than its key's": ("anchor.signature", lambda a: {"token": a.token(MESSAGE, scheme="ed25519")}),
    "another signing certificate named": (
        "anchor.certificate",
        lambda a: {"token": a.token(MESSAGE, certificate=a.stamper(key=a.chain[0].key).der)},
    ),
    "the signing certificate left out": (
        "anchor.certificate",
        lambda a: {"token": a.token(MESSAGE, embedded=[item.der for item in a.chain[1:]])},
    ),
    "a certificate between left out": (
        "anchor.root",
        lambda a: {"token": a.token(MESSAGE, embedded=[a.chain[0].der, a.chain[2].der])},
    ),
    "trailing bytes": ("der.form", lambda a: {"token": a.token(MESSAGE) + b"\0"}),
    "another signed content type": ("anchor.token", lambda a: {"token": a.token(MESSAGE, content_type="signed-data")}),
    "a critical extension": (
        "anchor.token",
        lambda a: {
            "token": a.token(
                MESSAGE, extensions=tlv(0xA1, seq(tsa.oid("policy"), tlv(0x01, b"\xff"), tlv(0x04, b"\0")))
            )
        },
    ),
}


def by(authority: Authority, scheme: str = "ecdsa-sha256", **options: Any) -> dict[str, Any]:
    signer = authority.stamper(**options)
    return {"token": Authority(authority.root, authority.between, signer).token(MESSAGE, scheme=scheme)}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(authority: Authority, name: str) -> None:
    code, change = REFUSED[name]
    refused(code, authority=authority, **change(authority))


def test_no_certificates_at_all(authority: Authority) -> None:
    with pytest.raises(FormatError) as caught:
        verified(authority.token(MESSAGE, embedded=[]), authority)
    assert caught.value.code == "anchor.chain"


def test_no_flipped_bit_makes_another_stamp(authority: Authority) -> None:
    """What is signed decides; a flip outside of it is refused or changes nothing that is used."""
    token = authority.token(MESSAGE)
    good = verified(token, authority)
    passed = 0
    for at in range(len(token)):
        changed = bytearray(token)
        changed[at] ^= 1 << at % 8
        try:
            stamp = verified(bytes(changed), authority)
        except CountermarkError:
            continue
        assert stamp == good
        passed += 1
    assert passed < 60  # versions, the list of digest algorithms, an issuer's name: none of it is relied on


@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    for parse in (parse_token, parse_response):
        try:
            parse(data)
        except FormatError as err:
            assert err.code in ("der.form", "anchor.token")


def openssl(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


CONFIG = """
[tsa]
default_tsa = stamps
[stamps]
serial = ./serial
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
accuracy = secs:1, millisecs:500
ordering = yes
tsa_name = yes
ess_cert_id_chain = yes
signer_digest = sha512
"""


def laid_out(folder: Path, authority: Authority) -> None:
    signer, between, root = authority.chain
    (folder / "message").write_bytes(MESSAGE)
    (folder / "root.pem").write_bytes(root.pem)
    (folder / "between.pem").write_bytes(between.pem)
    (folder / "signer.pem").write_bytes(signer.pem)
    key = signer.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "signer.key").write_bytes(key)
    (folder / "tsa.cnf").write_text(CONFIG)
    (folder / "serial").write_text("01")


def test_openssl_accepts_the_tokens_made_here(authority: Authority, tmp_path: Path) -> None:
    """So that what the rows above change is a token that is right otherwise."""
    laid_out(tmp_path, authority)
    check = ("ts", "-verify", "-token_in", "-in", "token", "-CAfile", "root.pem", "-attime", str(NOW), "-data")
    for options in ({}, {"legacy": True}, {"hash_name": "sha512", "scheme": "ecdsa-sha512", "nonce": 5}):
        (tmp_path / "token").write_bytes(authority.token(MESSAGE, **options))
        assert "Verification: OK" in openssl(tmp_path, *check, "message")
    (tmp_path / "token").write_bytes(authority.token(MESSAGE + b"!"))
    assert "Verification: FAILED" in openssl(tmp_path, *check, "message")


@pytest.mark.parametrize("hash_name", ["sha256", "sha384", "sha512"])
def test_stamps_of_openssl_hold(tmp_path: Path, hash_name: str) -> None:
    start = int(clock.time()) - DAY
    root = issue("root", start=start, end=start + 9 * DAY)
    between = issue("between", root, start=start, end=start + 9 * DAY)
    options = {"ca": False, "usage": [ExtendedKeyUsageOID.TIME_STAMPING], "start": start, "end": start + 9 * DAY}
    authority = Authority(root, between, issue("stamper", between, key=RSA, **options))
    laid_out(tmp_path, authority)
    (tmp_path / "chain.pem").write_bytes(between.pem + root.pem)
    said = openssl(tmp_path, "ts", "-query", "-data", "message", f"-{hash_name}", "-cert", "-out", "query")
    reply = ("-signer", "signer.pem", "-inkey", "signer.key", "-chain", "chain.pem", "-out", "reply")
    said += openssl(tmp_path, "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "query", *reply)
    status, token = parse_response((tmp_path / "reply").read_bytes())
    assert (status, token is None) == (0, False), said
    stamp = verified(token or b"", authority)
    assert abs(stamp.info.time - clock.time()) < 60
    assert stamp.info.hash == hash_name
    shown = openssl(tmp_path, "ts", "-reply", "-in", "reply", "-text")
    assert f"{stamp.info.nonce:X}" in shown.replace("Nonce: 0x0", "Nonce: 0x").upper()


def test_openssl_reads_our_requests(tmp_path: Path) -> None:
    (tmp_path / "query").write_bytes(encode_request(bytes(range(32)), 0xF1F2F3F4F5F6F7F8))
    shown = openssl(tmp_path, "ts", "-query", "-in", "query", "-text")
    for text in ("Hash Algorithm: sha256", "0000 - 00 01 02 03", "Nonce: 0xF1F2F3F4F5F6F7F8", "required: yes"):
        assert text in shown, shown


def test_a_public_authority_s_stamp(tmp_path: Path) -> None:
    """Its root is not in the token, so what is pinned is the certificate below it. OpenSSL is asked the same."""
    token, message = ((DATA / f"microsoft.{name}").read_bytes() for name in ("token", "message"))
    stamp = verify_stamp(token, message, roots=[PCA_2010], policies=["1.3.6.1.4.1.601.10.3.1"])
    assert (stamp.info.time, stamp.authority) == (1749594560, "Microsoft Time-Stamp Service")  # 2025-06-10T22:29:20Z
    with pytest.raises(LogError) as caught:
        verify_stamp(token, message[:-1], roots=[PCA_2010])
    assert caught.value.code == "anchor.imprint"
    (tmp_path / "token").write_bytes(token)
    (tmp_path / "pinned.der").write_bytes(parse_token(token).certificates[1])
    openssl(tmp_path, "x509", "-inform", "DER", "-in", "pinned.der", "-out", "pinned.pem")
    # Not `openssl ts`, which cannot read its set of certificates: one of them is of another kind than X.509.
    options = ("-CAfile", "pinned.pem", "-partial_chain", "-purpose", "timestampsign", "-attime", str(stamp.info.time))
    said = openssl(tmp_path, "cms", "-verify", "-binary", "-inform", "DER", "-in", "token", "-out", "info", *options)
    assert "Verification successful" in said
    assert (tmp_path / "info").read_bytes() == parse_token(token).content


def test_a_genuine_stamp_over_sha_1_is_refused() -> None:
    status, token = parse_response((DATA / "geotrust-sha1.response").read_bytes())
    assert status == 0
    with pytest.raises(FormatError) as caught:
        parse_token(token or b"")
    assert caught.value.code == "anchor.token"
    assert "SHA-256" in str(caught.value)
