"""Quotes: genuine ones against dcap-qvl's own parser, simulated ones through every mutation."""

from dataclasses import replace

import dcap_qvl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from countermark.errors import FormatError
from countermark.formats import quote as fmt
from countermark.formats.quote import TdAttributes, encode_quote, parse_pem_chain, parse_quote, quote_digest


def build(version: int = 4, **changes: object) -> bytes:
    def fill(count: int) -> bytes:
        return bytes(i % 251 for i in range(count))

    body = fmt.TdReport(**{name: fill(size) for name, size in fmt._TD_FIELDS})
    if changes.pop("td15", False):
        body = replace(body, tee_tcb_svn2=fill(16), mrservicetd=fill(48))
    qe = fmt.EnclaveReport(
        cpu_svn=fill(16),
        misc_select=1,
        isv_ext_prod_id=fill(16),
        attributes=fill(16),
        mrenclave=fill(32),
        mrsigner=fill(32),
        config_id=fill(64),
        isv_prod_id=2,
        isv_svn=3,
        config_svn=4,
        isv_family_id=fill(16),
        report_data=fill(64),
    )
    header = fmt.Header(version=version, user_data=fill(20))
    value = fmt.Quote(
        header=header,
        body=body,
        signature=fill(64),
        attestation_key=fill(64),
        qe_report=qe,
        qe_report_signature=fill(64),
        qe_auth_data=fill(32),
        pck_chain_pem=b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    return encode_quote(replace(value, **changes))


@pytest.mark.parametrize("name", vectors.TDX_AT)
def test_genuine_quotes_parse_as_dcap_qvl_parses_them(name):
    data = vectors.tdx(name).quote
    if name == "no-sept-ve":  # its publisher appended text, which no signature covers
        with pytest.raises(FormatError) as refused:
            parse_quote(data)
        assert refused.value.code == "quote.trailing"
        whole = parse_quote(data, any_trailing=True)
        assert (len(whole.trailing), encode_quote(whole)) == (39, data)
        data = data[:4935]
        assert replace(whole, trailing=b"") == parse_quote(data)
    ours, theirs = parse_quote(data), dcap_qvl.parse_quote(data)
    assert encode_quote(ours) == data
    assert (ours.header.version, ours.header.user_data) == (theirs.header.version, theirs.header.user_data)
    names = {"mrtd": "mr_td", "mrseam": "mr_seam", "mrsignerseam": "mr_signer_seam", "mrconfigid": "mr_config_id"}
    names |= {"mrowner": "mr_owner", "mrownerconfig": "mr_owner_config", "rtmr0": "rt_mr0", "rtmr1": "rt_mr1"}
    names |= {"rtmr2": "rt_mr2", "rtmr3": "rt_mr3"}
    for field, _ in fmt._TD_FIELDS:
        assert getattr(ours.body, field) == getattr(theirs.report, names.get(field, field)), field
    assert ours.pck_chain_pem.rstrip(b"\0") == theirs.cert_chain_pem_bytes()
    assert len(parse_pem_chain(ours.pck_chain_pem)) == 3


def test_attributes_of_genuine_quotes():
    attributes = {
        name: parse_quote(vectors.tdx(name).quote[:4936]).body.attributes
        for name in vectors.TDX_AT
        if name != "no-sept-ve"
    }
    assert attributes["dstack-90c06f"] == TdAttributes.SEPT_VE_DISABLE
    assert TdAttributes.DEBUG in attributes["debug-td"]
    odd = parse_quote(vectors.tdx("no-sept-ve").quote[:4935]).body.attributes
    assert TdAttributes.SEPT_VE_DISABLE not in odd and TdAttributes.PKS in odd


@pytest.mark.parametrize(("version", "td15"), [(4, False), (5, False), (5, True)])
def test_encodes_back(version, td15):
    data = build(version, td15=td15)
    value = parse_quote(data)
    assert encode_quote(value) == data
    assert (value.body.mrservicetd is not None) == td15
    assert fmt.signed_part(data) == fmt.encode_signed_part(value.header, value.body)


def test_version_5_reads_as_dcap_qvl_reads_it():
    data = build(5, td15=True)
    assert dcap_qvl.parse_quote(data).report.mr_service_td == parse_quote(data).body.mrservicetd


def test_digest_ignores_what_no_signature_covers():
    data = build(trailing=bytes(9))
    assert parse_quote(data).trailing == bytes(9)
    assert quote_digest(data) == quote_digest(build()) == quote_digest(data[:-500])
    changed = bytearray(data)
    changed[600] ^= 1
    assert quote_digest(bytes(changed)) != quote_digest(data)


@pytest.mark.parametrize(
    ("offset", "value", "code"),
    [
        (0, 3, "quote.version"),
        (2, 3, "quote.key_type"),
        (4, 0, "quote.tee_type"),
        (8, 1, "quote.reserved"),
        (12, 0, "quote.qe_vendor_id"),
        (27, 0, "quote.qe_vendor_id"),
        (632, 0, "quote.truncated"),
        (635, 9, "quote.truncated"),
        (764, 5, "quote.certification_type"),
        (766, 0, "quote.trailing"),
        (769, 9, "quote.truncated"),
        (770 + 20, 1, "quote.qe_reserved"),
        (770 + 400 + 80, 4, "quote.chain_type"),
    ],
)
def test_refuses(offset, value, code):
    data = bytearray(build())
    if code == "quote.chain_type":
        offset = data.index(b"-----BEGIN") - 6
    data[offset] = value
    with pytest.raises(FormatError) as refused:
        parse_quote(bytes(data))
    assert refused.value.code == code


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 6, 7, 0xFFFF])
def test_refuses_certification_without_a_chain(kind):
    data = bytearray(build())
    at = data.index(b"-----BEGIN") - 6
    data[at : at + 2] = kind.to_bytes(2, "little")
    with pytest.raises(FormatError) as refused:
        parse_quote(bytes(data))
    assert refused.value.code == "quote.chain_type"


@pytest.mark.parametrize("kind", [0, 1, 4, 5])
def test_refuses_bodies_of_other_kinds(kind):
    # 1 is an SGX enclave's, 4 a TD 1.5 body with the history of its service TDs
    data = bytearray(build(5, td15=True))
    data[48:50] = kind.to_bytes(2, "little")
    with pytest.raises(FormatError) as refused:
        parse_quote(bytes(data))
    assert refused.value.code == "quote.body_type"


def test_what_follows_is_kept_only_when_asked_for():
    data = build(trailing=bytes(3)) + b"text"
    with pytest.raises(FormatError) as refused:
        parse_quote(data)
    assert refused.value.code == "quote.trailing"
    assert parse_quote(data, any_trailing=True).trailing == bytes(3) + b"text"
    with pytest.raises(FormatError) as refused:  # inside the signature data nothing may follow
        parse_quote(data.replace(b"\x05\x00\x3b", b"\x05\x00\x3a", 1), any_trailing=True)
    assert refused.value.code == "quote.trailing"


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"\n\n", b"\0", b"\n\0", b"\r\n\0"])
def test_pem_as_producers_end_it(ending):
    line = b"\r\n" if ending.startswith(b"\r") else b"\n"
    text = line.join((b"-----BEGIN CERTIFICATE-----", b"AAAA", b"-----END CERTIFICATE-----"))
    assert parse_pem_chain(text + line + text + ending) == (b"\0\0\0", b"\0\0\0")


def test_refuses_other_bodies_and_sizes():
    for data, code in (
        (build()[:-1], "quote.truncated"),
        (build() + b"\1", "quote.trailing"),
        (bytes(70_000), "quote.too_long"),
        (build(5).replace(b"\x02\x00\x48\x02\x00\x00", b"\x01\x00\x80\x01\x00\x00", 1), "quote.body_type"),
        (build(5).replace(b"\x02\x00\x48\x02\x00\x00", b"\x03\x00\x48\x02\x00\x00", 1), "quote.body_size"),
    ):
        with pytest.raises(FormatError) as refused:
            parse_quote(data)
        assert refused.value.code == code


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([build(), build(5, td15=True)]), st.integers(0, 2000), st.integers(0, 255), st.integers(-40, 40))
def test_every_byte_is_accounted_for(data, offset, value, resize):
    changed = bytearray(data)
    changed[offset % len(changed)] = value
    mutated = bytes(changed[:resize] if resize < 0 else changed + bytes(resize))
    try:
        parsed = parse_quote(mutated)
    except FormatError as err:
        assert err.code.startswith("quote.")
    else:
        assert encode_quote(parsed) == mutated


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=1500))
def test_arbitrary_bytes(data):
    for head in (b"", build()[:632], build()[:770]):
        with pytest.raises(FormatError):
            parse_quote(head + data)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0",
        b"x-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAA=A\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\ntext",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" * 9,
    ],
)
def test_pem_refuses_text_around_certificates(text):
    with pytest.raises(FormatError) as refused:
        parse_pem_chain(text, "pck")
    assert refused.value.code == "pck.pem"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=90), min_size=1, max_size=3))
def test_pem_gives_the_bytes_between_the_lines(certificates):
    import base64

    text = b"".join(
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
        for der in certificates
    )
    assert parse_pem_chain(text) == tuple(certificates)
