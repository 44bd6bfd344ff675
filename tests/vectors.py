"""Real evidence for tests: third-party files that are not part of this repository.

They are looked for at ../shared/vectors from the repository's root, or at COUNTERMARK_VECTORS. Absent, the tests that
need them skip with the path in the reason; present, every set must have the number of files it is known to have.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TDX_AT = {  # set -> the Unix time at which its endorsements were valid
    "dstack-90c06f": 1768233853,
    "phala-b0c06f": 1750329207,
    "debug-td": 1688083200,
    "outofdate-00a06d": 1768235301,
    "no-sept-ve": 1688083200,
}
GPU_SETS = ("h100-550", "h100-535")
_COUNTS = {
    "tdx/*/quote.bin": 5,
    "tdx/*/collateral.json": 5,
    "ccel/*/ccel.bin": 1,
    "nvidia/*/*.txt": 4,
    "nvidia/rim/*": 5,
}


@dataclass(frozen=True)
class TdxSet:
    """One genuine quote; `collateral` is QuoteCollateralV3 JSON valid at `at`."""

    quote: bytes
    collateral: str
    at: int


def directory() -> Path:
    """The folder of the vectors; skips the calling test when it is not there."""
    path = Path(os.environ.get("COUNTERMARK_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not path.is_dir():
        pytest.skip(f"genuine evidence is absent: no folder {path} (set COUNTERMARK_VECTORS)")
    for pattern, count in _COUNTS.items():
        found = len(list(path.glob(pattern)))
        assert found == count, f"{pattern}: expected {count} files, got {found}"
    return path


def read(name: str) -> bytes:
    """The bytes of one file."""
    return (directory() / name).read_bytes()


def tdx(name: str) -> TdxSet:
    """One of `TDX_AT`."""
    return TdxSet(
        quote=read(f"tdx/{name}/quote.bin"),
        collateral=read(f"tdx/{name}/collateral.json").decode(),
        at=TDX_AT[name],
    )


def gpu_report(name: str) -> bytes:
    """One of `GPU_SETS`: the binary report."""
    return bytes.fromhex(read(f"nvidia/{name}/hopperAttestationReport.txt").decode().strip())


def gpu_chain_pem(name: str) -> bytes:
    """The certificate chain of that GPU, device first."""
    return read(f"nvidia/{name}/hopperCertChain.txt")


def dstack_report() -> dict[str, str]:
    """The quote report of dstack-90c06f, whose event log replays to its quote."""
    value: dict[str, str] = json.loads(read("tdx/dstack-90c06f/quote-report.json"))
    return value
