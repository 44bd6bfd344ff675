"""A simulated machine on disk: vendor keys, endorsements, and the manifest, published before any boot.

    README            says that everything here is simulated
    root.der          the simulated CPU vendor's root: a test policy names it by SHA-256
    gpu-root.der      the same for the GPU vendor          rim-root.der   and for its RIMs
    manifest.json     measurements of the code at `create`, signed (DSSE)
    collateral.json   what the CPU vendor says about this machine; gpu/*.xml, *.crl, *.ocsp: the GPU vendor
    keys/*.pem        development private keys, mode 0600

`create` writes a complete directory or none. Not here: per-start keys, which never touch a disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, mldsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from countermark.errors import ConfigError
from countermark.formats.evidence import MAX_GPUS, Endorsements
from countermark.formats.manifest import ImageKind, signer_digest
from countermark_appliance.platform.keyring import cose_public_key
from countermark_appliance.platform.sim.intel import Collateral, Vendor, collateral_json, make_vendor
from countermark_appliance.platform.sim.issue import Issued, issued_from_pem
from countermark_appliance.platform.sim.measure import Signers, publish
from countermark_appliance.platform.sim.nvidia import (
    Gpu,
    GpuVendor,
    crls,
    make_gpu,
    make_gpu_vendor,
    ocsp_responses,
)
from countermark_appliance.platform.sim.rim import make_rims

_README = """SIMULATED. A machine for demonstrations and tests; nothing in it vouches for any hardware.
Its keys are development keys. No production policy accepts its roots.
"""
_CPU_KEYS = ("root", "pck_ca", "pck", "tcb_signing")
_GPU_KEYS = ("root", "family", "provisioner", "rim_root", "rim_signer", "rim_responder")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One simulated machine and the two vendors that made it. Replace fields to simulate a hostile host."""

    vendor: Vendor
    gpu_vendor: GpuVendor
    gpus: tuple[Gpu, ...]
    signers: Signers = field(repr=False)
    endorsements: Endorsements
    manifest: bytes  # DSSE envelope

    @property
    def root_der(self) -> bytes:
        """The CPU vendor's root certificate."""
        return self.vendor.root.der

    @property
    def gpu_root_der(self) -> bytes:
        """The GPU vendor's root certificate."""
        return self.gpu_vendor.root.der

    @property
    def rim_root_der(self) -> bytes:
        """The root certificate above RIM signers."""
        return self.gpu_vendor.rim_root.der

    @property
    def signer_digests(self) -> tuple[bytes, bytes]:
        """How a policy names the manifest signers: ES256, ML-DSA-65."""
        publics = (self.signers.es256.public_key(), self.signers.ml_dsa_65.public_key())
        return signer_digest(cose_public_key(publics[0])), signer_digest(cose_public_key(publics[1]))


def make(
    *, now: int, gpus: int = 1, kind: ImageKind = ImageKind.SIMULATED, roots: Sequence[Path] | None = None
) -> State:
    """A new machine in memory. `roots`: the code folders to measure (default: our installed packages)."""
    if not 0 <= gpus <= MAX_GPUS:
        raise ConfigError(f"platform.gpus: expected 0 to {MAX_GPUS}, got {gpus}", code="platform.gpus")
    vendor, gpu_vendor = make_vendor(now=now), make_gpu_vendor(now=now)
    signers = Signers(es256=ec.generate_private_key(ec.SECP256R1()), ml_dsa_65=mldsa.MLDSA65PrivateKey.generate())
    return State(
        vendor=vendor,
        gpu_vendor=gpu_vendor,
        gpus=tuple(make_gpu(gpu_vendor, now=now) for _ in range(gpus)),
        signers=signers,
        endorsements=Endorsements(
            tdx=collateral_json(vendor, Collateral(issued=now - 3600)),
            gpu_rims=make_rims(gpu_vendor),
            gpu_crls=crls(gpu_vendor, now=now),
            gpu_ocsp=ocsp_responses(gpu_vendor, now=now),
        ),
        manifest=publish(signers, now=now, kind=kind, roots=roots),
    )


def create(
    directory: Path,
    *,
    now: int,
    gpus: int = 1,
    kind: ImageKind = ImageKind.SIMULATED,
    roots: Sequence[Path] | None = None,
) -> State:
    """Make a machine and write it to a directory that does not exist yet. `now`: Unix seconds.

    Raises `ConfigError`: `platform.exists`, `platform.gpus`, `platform.code`, or `platform.state` when it cannot write.
    """
    if directory.exists():
        raise ConfigError(f"platform.state: {directory} exists already", code="platform.exists")
    state = make(now=now, gpus=gpus, kind=kind, roots=roots)
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in (partial, partial / "keys", partial / "gpu"):
            folder.mkdir(mode=0o700, parents=True)
        for name, data in _public_files(state).items():
            (partial / name).write_bytes(data)
        for name, data in _private_files(state).items():
            _write_private(partial / "keys" / f"{name}.pem", data)
        partial.rename(directory)
    except OSError as err:
        raise ConfigError(f"platform.state: {directory}: {err.strerror}", code="platform.state") from err
    return state


def load(directory: Path) -> State:
    """Read what `create` wrote. Raises `ConfigError` `platform.state`."""
    try:
        keys = {path.stem: path.read_bytes() for path in sorted((directory / "keys").glob("*.pem"))}
        endorsements = Endorsements(
            tdx=(directory / "collateral.json").read_bytes(),
            gpu_rims=tuple(path.read_bytes() for path in sorted((directory / "gpu").glob("*.xml"))),
            gpu_crls=tuple(path.read_bytes() for path in sorted((directory / "gpu").glob("*.crl"))),
            gpu_ocsp=tuple(path.read_bytes() for path in sorted((directory / "gpu").glob("*.ocsp"))),
        )
        manifest = (directory / "manifest.json").read_bytes()
    except OSError as err:
        raise ConfigError(f"platform.state: {directory}: {err.strerror}", code="platform.state") from err
    try:
        count = sum(name.startswith("device-") for name in keys)
        state = State(
            vendor=Vendor(**{name: issued_from_pem(keys[f"cpu-{name}"]) for name in _CPU_KEYS}),
            gpu_vendor=GpuVendor(**{name: issued_from_pem(keys[f"gpu-{name}"]) for name in _GPU_KEYS}),
            gpus=tuple(_gpu(keys, index) for index in range(count)),
            signers=_signers(keys),
            endorsements=endorsements,
            manifest=manifest,
        )
    except KeyError as err:
        raise ConfigError(f"platform.state: {directory}: expected the key {err}", code="platform.state") from err
    return state


def _public_files(state: State) -> dict[str, bytes]:
    endorsements = state.endorsements
    files = {
        "README": _README.encode(),
        "root.der": state.root_der,
        "gpu-root.der": state.gpu_root_der,
        "rim-root.der": state.rim_root_der,
        "manifest.json": state.manifest,
        "collateral.json": endorsements.tdx,
    }
    files |= {f"gpu/{index:02}.xml": data for index, data in enumerate(endorsements.gpu_rims)}
    files |= {f"gpu/{index:02}.crl": data for index, data in enumerate(endorsements.gpu_crls)}
    return files | {f"gpu/{index:02}.ocsp": data for index, data in enumerate(endorsements.gpu_ocsp)}


def _private_files(state: State) -> dict[str, bytes]:
    issued: dict[str, Issued] = {f"cpu-{name}": getattr(state.vendor, name) for name in _CPU_KEYS}
    issued |= {f"gpu-{name}": getattr(state.gpu_vendor, name) for name in _GPU_KEYS}
    for index, gpu in enumerate(state.gpus):
        issued |= {f"device-{index:02}": gpu.device, f"bootrom-{index:02}": gpu.boot_rom}
    files = {name: item.to_pem() for name, item in issued.items()}
    for name, key in (("manifest-es256", state.signers.es256), ("manifest-ml-dsa-65", state.signers.ml_dsa_65)):
        files[name] = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return files


def _write_private(path: Path, data: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _gpu(keys: dict[str, bytes], index: int) -> Gpu:
    return Gpu(
        boot_rom=issued_from_pem(keys[f"bootrom-{index:02}"]), device=issued_from_pem(keys[f"device-{index:02}"])
    )


def _signers(keys: dict[str, bytes]) -> Signers:
    try:
        es256 = load_pem_private_key(keys["manifest-es256"], None)
        ml_dsa_65 = load_pem_private_key(keys["manifest-ml-dsa-65"], None)
    except ValueError as err:
        raise ConfigError("platform.state: expected PEM keys of the manifest signers", code="platform.state") from err
    if not isinstance(es256, ec.EllipticCurvePrivateKey) or not isinstance(ml_dsa_65, mldsa.MLDSA65PrivateKey):
        raise ConfigError("platform.state: expected P-256 and ML-DSA-65 manifest signers", code="platform.state")
    return Signers(es256=es256, ml_dsa_65=ml_dsa_65)
