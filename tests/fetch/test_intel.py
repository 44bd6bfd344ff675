"""Endorsements from Intel's interface: the same nine fields as dcap-qvl's own client gets, and nothing else passes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import urllib.parse
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import dcap_qvl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from countermark.errors import CountermarkError, FormatError, TcbError, UsageError
from countermark.fetch import intel
from countermark.fetch.https import Response, Service
from countermark.fetch.intel import Source, Wanted, fetch_collateral, pccs, verify_collateral, wanted_by
from countermark.formats.quote import parse_quote
from countermark.policy import INTEL_SGX_ROOT
from countermark_appliance.platform import sim
from countermark_appliance.platform.sim import intel as sim_intel
from countermark_appliance.platform.sim.intel import Collateral
from sim_evidence import NOW, code_folder, machine, sha256
from vendor_service import pccs_routes, serving

SIM = sim_intel.FMSPC.hex().upper()
TCB, QE = f"/tdx/certification/v4/tcb?fmspc={SIM}&update=standard", "/tdx/certification/v4/qe/identity?update=standard"
CRL, ROOT_CRL = "/sgx/certification/v4/pckcrl?ca=platform&encoding=der", "/sgx/certification/v4/rootcacrl"


def source(url: str, **other: Any) -> Source:
    return pccs(Service(url=url, timeout_s=5), **other)


def quote() -> bytes:
    return sim.boot(machine(), roots=[code_folder()]).quote(bytes(64))


def served(change: Callable[[dict[str, Any]], object] = lambda routes: None) -> bytes:
    """The simulated vendor's endorsements, fetched from a service whose answers `change` may bend."""
    routes: dict[str, Any] = dict(pccs_routes(machine().endorsements.tdx, fmspc=SIM))
    change(routes)
    with serving(routes) as server:
        return fetch_collateral(quote(), source(server.url))


def refusal(change: Callable[[dict[str, Any]], object]) -> str:
    with pytest.raises(CountermarkError) as err:
        served(change)
    return err.value.code


def test_the_vendors_endorsements_come_back_as_they_were_signed() -> None:
    data = served()
    assert json.loads(data) == json.loads(machine().endorsements.tdx)
    verify_collateral(data, root=sha256(machine().root_der), now=NOW)


async def fetched_by_dcap_qvl(url: str, data: bytes) -> dcap_qvl.QuoteCollateralV3:
    return await dcap_qvl.get_collateral(url, data)


@pytest.mark.parametrize("name", vectors.TDX_AT)
def test_genuine_endorsements_come_as_dcap_qvls_own_client_gets_them(name: str) -> None:
    """The same requests, the same nine values; and dcap-qvl verifies the quote with ours."""
    item = vectors.tdx(name)
    wanted = wanted_by(parse_quote(item.quote, any_trailing=True).pck_chain_pem)
    routes = pccs_routes(item.collateral.encode(), fmspc=wanted.fmspc.hex(), ca=wanted.ca)
    with serving(routes) as server:
        data = fetch_collateral(item.quote, source(server.url))
        asked = [path for _, path, _, _ in server.asked]
        server.asked.clear()
        theirs = asyncio.run(fetched_by_dcap_qvl(server.url, item.quote))
        assert sorted(asked) == sorted(path for _, path, _, _ in server.asked)
    ours = json.loads(data)
    assert len(ours) == 9
    assert {key: json.loads(theirs.to_json())[key] for key in ours} == ours
    assert {key: json.loads(item.collateral)[key] for key in ours} == ours
    verify_collateral(data, root=INTEL_SGX_ROOT, now=item.at)
    collateral = dcap_qvl.QuoteCollateralV3.from_json(data.decode())
    policy = dcap_qvl.QuotePolicy.claims_only(item.at)
    root = x509.load_pem_x509_certificates(parse_quote(item.quote, any_trailing=True).pck_chain_pem)[-1]
    if name in ("dstack-90c06f", "phala-b0c06f"):
        verifier = dcap_qvl.QuoteVerifier(root.public_bytes(Encoding.DER))
        claims = json.loads(verifier.verify_with_policy(item.quote, collateral, item.at, policy).to_json())
        assert claims["tcb"]["status"] == "UpToDate"


def test_platform_and_processor_cas_are_told_apart() -> None:
    for name, ca in (("processor", "Processor"), ("platform", "Platform")):
        chain = renamed(f"Intel SGX PCK {ca} CA")
        assert wanted_by(chain) == Wanted(fmspc=sim_intel.FMSPC, ca=name)
    for other in ("Intel SGX Root CA", "SGX PCK Platform CA 2", ""):
        with pytest.raises(FormatError) as err:
            wanted_by(renamed(other))
        assert err.value.code == "quote.pck_extension"
    with pytest.raises(FormatError) as err:
        wanted_by(machine().vendor.root.pem.encode())
    assert err.value.code == "quote.pck_extension"


def renamed(issuer: str) -> bytes:
    """The simulated PCK certificate with another issuer name; nothing here looks at its signature."""
    pck = machine().vendor.pck
    builder = (
        x509.CertificateBuilder()
        .subject_name(pck.certificate.subject)
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)] if issuer else []))
        .public_key(pck.key.public_key())
        .serial_number(1)
        .not_valid_before(pck.certificate.not_valid_before_utc)
        .not_valid_after(pck.certificate.not_valid_after_utc)
    )
    for extension in pck.certificate.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(pck.key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("path", "noise", "empty"),
    [
        (CRL, "endorsements.fetch.malformed", "endorsements.crl_missing"),
        (ROOT_CRL, "endorsements.fetch.malformed", "endorsements.crl_missing"),
        (TCB, "endorsements.json", "endorsements.json"),
        (QE, "endorsements.json", "endorsements.json"),
    ],
)
def test_each_of_the_four_is_needed(path: str, noise: str, empty: str) -> None:
    assert refusal(lambda routes: routes.pop(path)) == "endorsements.fetch.status"
    assert refusal(edited(path, body=b"<html>")) == noise
    assert refusal(edited(path, body=b"")) == empty
    assert refusal(edited(path, body=bytes(1 << 20))) == "endorsements.fetch.too_long"
    assert refusal(edited(path, status=302)) == "endorsements.fetch.status"


def edited(path: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(routes: dict[str, Any]) -> None:
        routes[path] = replace(routes[path], **changes)

    return change


def rewritten(path: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(routes: dict[str, Any]) -> None:
        text = routes[path].body.decode()
        assert re.search(old, text)
        routes[path] = replace(routes[path], body=re.sub(old, new, text, count=1, flags=re.DOTALL).encode())

    return change


@pytest.mark.parametrize("path", [CRL, TCB, QE])
def test_an_issuer_chain_is_needed(path: str) -> None:
    assert refusal(edited(path, headers={})) == "endorsements.fetch.malformed"
    assert refusal(edited(path, headers={"TCB-Info-Issuer-Chain": "%zz"})).startswith("endorsements.")


def test_a_plus_sign_in_a_chain_is_one_escaped_or_not() -> None:
    chain = json.loads(machine().endorsements.tdx)["tcb_info_issuer_chain"]
    plus = chain.replace("\n", "+\n", 1) if "+" not in chain else chain
    for safe in ("", "+"):
        headers = {"TCB-Info-Issuer-Chain": urllib.parse.quote(plus, safe=safe)}
        response = Response(headers={name.lower(): value for name, value in headers.items()}, body=b"")
        assert intel._chain(response, "TCB-Info-Issuer-Chain") == plus


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (TCB, r"^\{", '{"more":1,'),
        (TCB, r'^\{"tcbInfo"', '{"tcbinfo"'),
        (TCB, r'"tcbInfo":\{.*\},"signature"', '"tcbInfo":[],"signature"'),
        (TCB, r'"signature":"[0-9a-f]+"', '"signature":7'),
        (TCB, r'^\{("tcbInfo":.*),("signature":"[0-9a-f]+")\}$', r"{\2,\1}"),
        (TCB, r'"signature":', '"signature":"","signature":'),
        (QE, r'^\{"enclaveIdentity"', '{"qeIdentity"'),
        (QE, r"\}$", "}{}"),
    ],
)
def test_another_envelope_is_refused(path: str, old: str, new: str) -> None:
    assert refusal(rewritten(path, old, new)) in ("endorsements.fetch.malformed", "endorsements.json")


def test_white_space_around_the_signed_text_is_not_part_of_it() -> None:
    data = served(
        rewritten(TCB, r'^\{"tcbInfo":(.*),"signature":(.*)\}$', r' { "tcbInfo" :\n \1 , "signature" : \2 }\n')
    )
    assert json.loads(data) == json.loads(machine().endorsements.tdx)


def test_white_space_inside_the_signed_text_stays_where_it_is() -> None:
    data = served(rewritten(TCB, r'"tcbInfo":\{', '"tcbInfo":{ '))
    assert json.loads(data)["tcb_info"] == "{ " + json.loads(machine().endorsements.tdx)["tcb_info"][1:]
    with pytest.raises(TcbError) as err:
        verify_collateral(data, root=sha256(machine().root_der), now=NOW)
    assert err.value.code == "endorsements.signature"


@pytest.mark.parametrize("form", ["der", "hex", "quoted hex", "pem"])
@pytest.mark.parametrize("path", [CRL, ROOT_CRL])
def test_crls_in_every_form_that_services_send(path: str, form: str) -> None:
    name = "pck_crl" if path == CRL else "root_ca_crl"
    text = json.loads(machine().endorsements.tdx)[name]
    der = bytes.fromhex(text)
    body = {
        "der": der,
        "hex": text.upper().encode() + b"\n",
        "quoted hex": f'"{text}"'.encode(),
        "pem": x509.load_der_x509_crl(der).public_bytes(Encoding.PEM),
    }[form]
    assert json.loads(served(edited(path, body=body)))[name] == text


def test_tcb_info_of_another_family_is_refused() -> None:
    other = sim_intel.collateral_json(machine().vendor, Collateral(issued=NOW, fmspc=b"OTHERS"))
    assert refusal(lambda routes: routes.update(pccs_routes(other, fmspc=SIM))) == "endorsements.fetch.fmspc"


def test_updates_are_asked_for_by_name_or_number() -> None:
    for update, query in (("early", "update=early"), (18, "tcbEvaluationDataNumber=18")):
        routes = pccs_routes(machine().endorsements.tdx, fmspc=SIM, update=query)
        with serving(routes) as server:
            fetch_collateral(quote(), source(server.url, update=update))
    for wrong in ("latest", 0, -1, 1 << 40):
        with pytest.raises(UsageError) as err:
            source("https://example.com", update=wrong)
        assert err.value.code == "usage.update"


def test_a_pccs_may_be_named_as_its_own_configuration_does() -> None:
    for path in ("", "/", "/sgx/certification/v4", "/sgx/certification/v4/", "/tdx/certification/v4/"):
        assert source("https://example.com:8081" + path).service.url == "https://example.com:8081"


def test_intels_service_and_where_its_root_crl_is() -> None:
    default = intel.intel()
    assert default.service == Service(url=dcap_qvl.INTEL_PCS_URL)
    assert default.root_crl is not None
    root = x509.load_pem_x509_certificates(parse_quote(vectors.tdx("dstack-90c06f").quote).pck_chain_pem)[-1]
    points = root.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert [name.value for point in points for name in point.full_name or ()] == [default.root_crl.url]


def test_the_root_crl_comes_from_where_the_source_says() -> None:
    routes = pccs_routes(machine().endorsements.tdx, fmspc=SIM)
    root_crl = routes.pop(ROOT_CRL)
    with serving(routes) as server, serving({"/root.der": root_crl}) as other:
        where = replace(source(server.url), root_crl=Service(url=other.url + "/root.der"))
        assert json.loads(fetch_collateral(quote(), where)) == json.loads(machine().endorsements.tdx)


@pytest.mark.parametrize(
    ("code", "root", "now"),
    [
        ("endorsements.root", INTEL_SGX_ROOT, NOW),
        ("endorsements.expired", None, NOW + 40 * 86_400),
        ("endorsements.not_yet_valid", None, NOW - 2 * 3600),
    ],
)
def test_whoever_stores_endorsements_judges_them_first(code: str, root: bytes | None, now: int) -> None:
    with pytest.raises(CountermarkError) as err:
        verify_collateral(machine().endorsements.tdx, root=root or sha256(machine().root_der), now=now)
    assert err.value.code == code


def test_validity_is_that_of_the_part_that_ends_first() -> None:
    found = verify_collateral(machine().endorsements.tdx, root=sha256(machine().root_der), now=NOW)
    assert (found.issued, found.until) == (NOW - 3600, NOW - 3600 + 30 * 86_400)
    item = vectors.tdx("dstack-90c06f")
    genuine = verify_collateral(item.collateral.encode(), root=INTEL_SGX_ROOT, now=item.at)
    values = json.loads(item.collateral)
    ends = [datetime.fromisoformat(json.loads(values[name])["nextUpdate"]) for name in ("tcb_info", "qe_identity")]
    for name in ("pck_crl", "root_ca_crl"):
        ends.append(x509.load_der_x509_crl(bytes.fromhex(values[name])).next_update_utc or ends[0])
    assert len(set(ends)) > 1
    assert genuine.issued <= item.at <= genuine.until == min(ends).timestamp()
    assert genuine.ages[:2] == (json.loads(json.loads(item.collateral)["tcb_info"])["tcbEvaluationDataNumber"],) * 2


@pytest.fixture(autouse=True)
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask the network for a name."""

    def refuse(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host in ("127.0.0.1", "localhost"), host
        return real(host, *args, **kwargs)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_arbitrary_answers_are_malformed_or_a_value(data: bytes) -> None:
    for read in (
        lambda: intel._signed_text(data, "tcbInfo"),
        lambda: intel._signed_text(b'{"tcbInfo":' + data + b',"signature":""}', "tcbInfo"),
        lambda: intel._crl(data, "CRL"),
        lambda: wanted_by(data),
    ):
        with contextlib.suppress(FormatError):
            read()
