"""NVIDIA's serialised evidence in its five published shapes, made here from genuine reports and chains."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

import vectors
from countermark.errors import FormatError
from countermark.formats.nvidia_evidence import GpuFile, parse_gpu_bundle
from countermark.formats.spdm import parse_report

NONCE = bytes(range(32))
ITEM = "tag:nvidia.com,2026:evidence-item/v1"
INPUT = "tag:nvidia.com,2026:verifier-input/profiles/base/pre-1.0.0"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def chain_pem() -> bytes:
    return vectors.gpu_chain_pem("h100-550").strip() + b"\n"


def item(**changes: Any) -> dict[str, Any]:
    """As `nvattest collect-evidence` writes one."""
    value = {
        "version": "1.0",
        "arch": "HOPPER",
        "nonce": NONCE.hex(),
        "driver_version": "550.90.07",
        "vbios_version": "96.00.9F.00.01",
        "evidence": b64(vectors.gpu_report("h100-550")),
        "certificate": b64(chain_pem()),
    } | changes
    return {name: kept for name, kept in value.items() if kept is not None}


def wrapper(**changes: Any) -> dict[str, Any]:
    """As NVIDIA's sample of a conceptual message wrapper has one."""
    value = {
        "__cmwc_t": ITEM,
        "evidence": [
            "application/vnd.nvidia.spdm-measurement-transcript",
            url(vectors.gpu_report("h100-550")),
        ],
        "certificate": ["application/vnd.nvidia.pem-cert-chain", url(chain_pem())],
        "nonce": ["application/octet-stream", url(NONCE)],
    } | changes
    return {name: kept for name, kept in value.items() if kept is not None}


def parse(value: Any) -> tuple[GpuFile, ...]:
    return parse_gpu_bundle(json.dumps(value).encode())


def test_the_sdks_list() -> None:
    (found, _) = parse([item(), item()])
    assert found.report == vectors.gpu_report("h100-550")
    assert parse_report(found.report).driver_version == found.driver_version
    certificates = x509.load_pem_x509_certificates(vectors.gpu_chain_pem("h100-550"))
    assert found.chain == tuple(certificate.public_bytes(Encoding.DER) for certificate in certificates)
    assert (found.nonce, found.arch, found.vbios_version) == (NONCE, "HOPPER", "96.00.9F.00.01")


def test_the_older_list_says_less() -> None:
    (found,) = parse([item(version=None, driver_version=None, vbios_version=None, nonce=None, arch=None)])
    assert (found.nonce, found.arch, found.driver_version) == (None, "", "")


def test_the_tools_output_and_the_services_request() -> None:
    assert parse({"evidences": [item()], "result_code": 0, "result_message": "Ok"}) == parse([item()])
    bare = item(nonce=None, arch=None)
    request = {"nonce": NONCE.hex(), "arch": "BLACKWELL", "evidence_list": [bare, bare], "claims_version": "3.0"}
    found = parse(request)
    assert [(gpu.nonce, gpu.arch) for gpu in found] == [(NONCE, "BLACKWELL")] * 2


def test_a_request_before_there_were_lists() -> None:
    text = vectors.gpu_report("h100-550").hex().encode()
    (found,) = parse({"nonce": NONCE.hex(), "arch": "HOPPER", "evidence": b64(text), "certificate": b64(chain_pem())})
    (good,) = parse([item()])
    assert found.report == text
    assert (found.chain, found.nonce, found.arch) == (good.chain, NONCE, "HOPPER")


def test_a_conceptual_message_wrapper() -> None:
    other = bytes(32)
    value = {
        "__cmwc_t": INPUT,
        "nonce": ["application/octet-stream", url(other)],
        "appraisal-settings": ["application/json", url(b"{}")],
        "gpu_0": wrapper(),
        "gpu_1": wrapper(nonce=None, hints=["application/json", url(b"{}")]),
    }
    found = parse(value)
    assert [gpu.nonce for gpu in found] == [NONCE, other]
    (good,) = parse([item()])
    assert [(gpu.report, gpu.chain) for gpu in found] == [(good.report, good.chain)] * 2


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("form", "text"),
        ("form", {}),
        ("form", [1]),
        ("form", {"evidences": {}}),
        ("form", {"__cmwc_t": "tag:example.org:other"}),
        ("form", {"__cmwc_t": INPUT, "gpu_0": {"__cmwc_t": "other"}}),
        ("form", {"__cmwc_t": INPUT, "gpu_0": []}),
        ("count", []),
        ("count", {"__cmwc_t": INPUT}),
        ("count", {"evidences": [{}] * 17}),
        ("version", [{"version": "2.0"}]),
        ("arch", [{"arch": "LS10"}]),
        ("field", [{"arch": 1}]),
        ("field", [{"evidence": "AA"}]),
        ("field", [{"evidence": "A A="}]),
        ("field", [{"evidence": "é"}]),
        ("field", [{"nonce": "00"}]),
        ("field", [{"nonce": "no hex"}]),
        ("field", [{"evidence": None}]),
        ("too_long", [{"evidence": b64(bytes(70_000))}]),
        ("too_long", [{"certificate": b64(bytes(70_000))}]),
        ("pem", [{"certificate": b64(b"no PEM")}]),
    ],
)
def test_refused(code: str, value: Any) -> None:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [item() | value[0]]
    with pytest.raises(FormatError) as err:
        parse(value)
    assert err.value.code == f"nvidia_evidence.{code}"


@pytest.mark.parametrize(
    "changes",
    [
        {"evidence": None},
        {"evidence": ["application/octet-stream", "AAAA"]},
        {"evidence": ["application/vnd.nvidia.spdm-measurement-transcript", "AA+A"]},
        {"evidence": ["application/vnd.nvidia.spdm-measurement-transcript", "A"]},
        {"evidence": ["application/vnd.nvidia.spdm-measurement-transcript", "AAAA", 1]},
        {"certificate": None},
        {"nonce": ["application/octet-stream", "AAAA"]},
    ],
)
def test_refused_in_a_wrapper(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as err:
        parse({"__cmwc_t": INPUT, "gpu_0": wrapper(**changes)})
    assert err.value.code == "nvidia_evidence.field"


def test_two_members_of_one_name_are_refused() -> None:
    with pytest.raises(FormatError) as err:
        parse_gpu_bundle(b'{"evidences": [], "evidences": []}')
    assert err.value.code == "nvidia_evidence.json"
    with pytest.raises(FormatError) as err:
        parse_gpu_bundle(b" " * (5 << 20))
    assert err.value.code == "nvidia_evidence.too_long"


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.text(max_size=20) | st.integers(), lambda inner: st.lists(inner, max_size=3)))
def test_anything_else_is_a_format_error(value: Any) -> None:
    for attempt in (value, [value], {"evidences": value}, [{"evidence": value}], {"__cmwc_t": INPUT, "x": value}):
        with pytest.raises(FormatError):
            parse(attempt)
