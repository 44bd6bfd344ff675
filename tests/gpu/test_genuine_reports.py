"""Genuine H100 reports: signature, chain, nonce and firmware identifier. Their measurements: test_rims.py."""

from __future__ import annotations

import pytest
from cryptography import x509

import vectors
from countermark import x509chain
from countermark.errors import CountermarkError, FormatError, GpuError
from countermark.formats.spdm import parse_report
from countermark.gpu.report import Gpu, verify_report, verify_signature
from countermark.policy import NVIDIA_DEVICE_ROOT

AT = 1_750_000_000  # any time: the chain is valid from 2022 to 9999


def verify(
    name: str, *, nonce: bytes | None = None, data: bytes | None = None, root: bytes = NVIDIA_DEVICE_ROOT
) -> Gpu:
    original = vectors.gpu_report(name)
    data = original if data is None else data
    chain = x509chain.parse_pem_chain(vectors.gpu_chain_pem(name), "gpu")
    nonce = parse_report(original).nonce if nonce is None else nonce
    return verify_report(data, parse_report(data), chain, root=root, nonce=nonce, now=AT)


def refusal(name: str, **changes: bytes) -> str:
    with pytest.raises(CountermarkError) as err:
        verify(name, **changes)
    return err.value.code


def test_driver_550_report_verifies_against_nvidias_root() -> None:
    nonce = bytes.fromhex("931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb")
    gpu = verify("h100-550", nonce=nonce)
    assert (gpu.driver_version, gpu.vbios_version) == ("550.90.07", "96.00.9F.00.01")
    assert gpu.measurements == 64
    assert gpu.fwid.hex().startswith("f5c384aebb579217")


def test_driver_535_report_has_no_firmware_identifier() -> None:
    assert refusal("h100-535") == "gpu.fwid_missing"


def test_the_nonce_must_be_ours() -> None:
    assert refusal("h100-550", nonce=bytes(32)) == "gpu.nonce"


def test_another_root_is_refused() -> None:
    assert refusal("h100-550", root=bytes(32)) == "gpu.root"


def test_another_gpus_chain_does_not_fit() -> None:
    chain = x509chain.parse_pem_chain(vectors.gpu_chain_pem("h100-535"), "gpu")
    data = vectors.gpu_report("h100-550")
    report = parse_report(data)
    with pytest.raises(GpuError) as err:
        verify_report(data, report, chain, root=NVIDIA_DEVICE_ROOT, nonce=report.nonce, now=AT)
    assert err.value.code == "gpu.signature"


def refused(data: bytes, leaf: x509.Certificate) -> bool:
    try:
        verify_signature(data, parse_report(data), leaf)
    except (FormatError, GpuError) as err:
        return err.code.startswith("spdm.") or err.code == "gpu.signature"
    return False


def sweep(name: str, step: int) -> int:
    """Flip every `step`-th bit of a genuine report; how many."""
    data = vectors.gpu_report(name)
    leaf = x509chain.parse_pem_chain(vectors.gpu_chain_pem(name), "gpu")[0]
    assert not refused(data, leaf)
    bits = range(0, 8 * len(data), step)
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert refused(bytes(changed), leaf), bit
    return len(bits)


@pytest.mark.parametrize("name", vectors.GPU_SETS)
def test_flipped_bits_are_refused(name: str) -> None:
    assert sweep(name, 61) > 500


@pytest.mark.slow
@pytest.mark.parametrize("name", vectors.GPU_SETS)
def test_every_flipped_bit_is_refused(name: str) -> None:
    assert sweep(name, 1) == 8 * len(vectors.gpu_report(name))
