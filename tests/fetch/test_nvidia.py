"""Reference manifests by name and OCSP without a nonce, from services on this machine."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

import vectors
from countermark.errors import CountermarkError
from countermark.fetch import nvidia
from countermark.fetch.https import Service
from countermark.fetch.nvidia import fetch_ocsp, fetch_rim, revocable, rim_ids
from countermark.formats.spdm import Opaque, OpaqueType, parse_report
from countermark_appliance.platform.sim.issue import Issued
from sim_evidence import NOW, machine
from vendor_service import Reply, serving

DRIVER = "NV_GPU_DRIVER_GH100_550.144.03"


def rim() -> bytes:
    return vectors.read("nvidia/rim/NV_GPU_DRIVER_GH100_550.144.03.xml")


def answer(data: bytes, rim_id: str = DRIVER) -> bytes:
    members = {"id": rim_id, "rim": base64.b64encode(data).decode(), "sha256": "as NVIDIA adds it"}
    return json.dumps(members).encode()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CountermarkError) as err:
        call()
    return err.value.code


@pytest.mark.parametrize(
    ("name", "driver", "vbios"),
    [("h100-550", "550.90.07", "96009F0001"), ("h100-535", "535.86.09", "96005E0001")],
)
def test_a_genuine_report_leads_to_the_names_of_its_manifests(name: str, driver: str, vbios: str) -> None:
    device = x509.load_pem_x509_certificates(vectors.gpu_chain_pem(name))[0]
    ids = rim_ids(parse_report(vectors.gpu_report(name)), device)
    assert ids == (f"NV_GPU_DRIVER_GH100_{driver}", f"NV_GPU_VBIOS_1010_0200_882_{vbios}")


@pytest.mark.parametrize("wrong", [b"", b"550/..", b"a b", b"a?b", b"x" * 200])
@pytest.mark.parametrize("kind", [OpaqueType.DRIVER_VERSION, OpaqueType.PROJECT_SKU])
def test_a_report_that_leads_to_no_name_is_refused(kind: OpaqueType, wrong: bytes) -> None:
    report = parse_report(vectors.gpu_report("h100-550"))
    others = tuple(item for item in report.opaque if item.kind != kind)
    device = x509.load_pem_x509_certificates(vectors.gpu_chain_pem("h100-550"))[0]
    bent = replace(report, opaque=(*others, Opaque(kind=kind, value=wrong)))
    assert refusal(lambda: rim_ids(bent, device)) == "usage.rim_id"


def test_a_genuine_manifest_comes_back_byte_for_byte() -> None:
    with serving({f"/v1/rim/{DRIVER}": Reply(answer(rim()))}) as server:
        assert fetch_rim(DRIVER, Service(url=server.url)) == rim()


@pytest.mark.parametrize(
    ("code", "reply"),
    [
        ("endorsements.fetch.status", Reply(status=404)),
        ("endorsements.fetch.too_long", Reply(bytes(1 << 20))),
        ("endorsements.json", Reply(b"<html>")),
        ("endorsements.fetch.malformed", Reply(b"[]")),
        ("endorsements.fetch.malformed", Reply(b"{}")),
        ("endorsements.fetch.malformed", Reply(json.dumps({"id": DRIVER}).encode())),
        ("endorsements.fetch.malformed", Reply(json.dumps({"id": DRIVER, "rim": 1}).encode())),
        ("endorsements.fetch.malformed", Reply(json.dumps({"id": DRIVER, "rim": "%"}).encode())),
        ("endorsements.fetch.malformed", Reply(answer(b"<a/>", "NV_GPU_DRIVER_GH100_550.54.14"))),
        ("gpu.rim", Reply(answer(b"<a/>"))),
        ("gpu.rim", Reply(answer(b""))),
    ],
)
def test_other_answers_are_refused(code: str, reply: Reply) -> None:
    with serving({f"/v1/rim/{DRIVER}": reply}) as server:
        assert refusal(lambda: fetch_rim(DRIVER, Service(url=server.url))) == code


def test_a_name_cannot_lead_elsewhere() -> None:
    for wrong in ("../ids", "", "a/b", "a?b", "a%2fb", ".a", "a" * 200):
        assert refusal(lambda: fetch_rim(wrong, Service(url="https://example.com"))) == "usage.rim_id"  # noqa: B023


def responder(issuer: Issued, certificate: x509.Certificate, status: ocsp.OCSPCertStatus) -> Callable[[bytes], Reply]:
    """Answers as the issuer itself, about `certificate` whatever was asked."""

    def reply(body: bytes) -> Reply:
        asked = ocsp.load_der_ocsp_request(body)
        assert isinstance(asked.hash_algorithm, hashes.SHA384)
        assert not list(asked.extensions)
        start = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
        revoked = status is ocsp.OCSPCertStatus.REVOKED
        response = (
            ocsp.OCSPResponseBuilder()
            .add_response(
                cert=certificate,
                issuer=issuer.certificate,
                algorithm=hashes.SHA384(),
                cert_status=status,
                this_update=start,
                next_update=start + datetime.timedelta(days=1),
                revocation_time=start if revoked else None,
                revocation_reason=x509.ReasonFlags.key_compromise if revoked else None,
            )
            .responder_id(ocsp.OCSPResponderEncoding.HASH, issuer.certificate)
            .sign(issuer.key, hashes.SHA384())
        )
        return Reply(response.public_bytes(Encoding.DER))

    return reply


@pytest.mark.parametrize("status", list(ocsp.OCSPCertStatus))
def test_the_responders_answer_is_passed_on_whatever_it_says(status: ocsp.OCSPCertStatus) -> None:
    vendor, gpu = machine().gpu_vendor, machine().gpus[0]
    certificate = gpu.boot_rom.certificate
    with serving({"/": responder(vendor.provisioner, certificate, status)}) as server:
        data = fetch_ocsp(certificate, vendor.provisioner.certificate, Service(url=server.url))
        assert server.asked[0][0] == "POST"
        assert server.asked[0][2]["Content-Type"] == "application/ocsp-request"
    found = ocsp.load_der_ocsp_response(data)
    assert (found.certificate_status, found.serial_number) == (status, certificate.serial_number)


def test_an_answer_about_another_certificate_or_none_is_refused() -> None:
    vendor, gpu = machine().gpu_vendor, machine().gpus[0]
    failed = ocsp.OCSPResponseBuilder.build_unsuccessful(ocsp.OCSPResponseStatus.TRY_LATER)
    for code, reply in (
        (
            "endorsements.fetch.malformed",
            responder(vendor.family, vendor.provisioner.certificate, ocsp.OCSPCertStatus.GOOD),
        ),
        ("gpu.ocsp", Reply(failed.public_bytes(Encoding.DER))),
        ("gpu.ocsp", Reply(b"garbage")),
        ("endorsements.fetch.status", Reply(status=500)),
        ("endorsements.fetch.too_long", Reply(bytes(100_000))),
    ):
        with serving({"/": reply}) as server:
            where = Service(url=server.url)
            assert refusal(lambda: fetch_ocsp(gpu.boot_rom.certificate, vendor.provisioner.certificate, where)) == code  # noqa: B023


def test_what_is_asked_about_leaves_out_the_devices_own_certificate_and_the_root() -> None:
    chain = x509.load_pem_x509_certificates(vectors.gpu_chain_pem("h100-550"))
    names = [pair[0].subject.rfc4514_string() for pair in revocable(chain, device=True)]
    assert len(chain) == 5
    assert ["BROM" in names[0], "Provisioner" in names[1], "Identity" in names[2]] == [True] * 3
    assert len(revocable(chain, device=False)) == 4
    assert all(certificate.issuer == issuer.subject for certificate, issuer in revocable(chain, device=True))


def test_where_nvidia_answers() -> None:
    """The responder is the one that NVIDIA's certificates name, by its https address."""
    chain = x509.load_pem_x509_certificates(vectors.gpu_chain_pem("h100-550"))
    access = chain[2].extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    assert access[0].access_location.value.replace("http://", "https://").rstrip("/") == nvidia.OCSP_URL
