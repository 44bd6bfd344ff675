"""What appraising evidence costs: processor time of one appraisal, in milliseconds.

The simulated platform's evidence is as large as real evidence (quote, both logs, endorsements, one GPU's report with 64
measurements, driver and VBIOS RIM, revocation input) and signed with the same algorithms. `session` is the first
appraisal of a process that has seen none of these bytes; `session again` is the next connection to the same node, which
finds the signature of a RIM it has checked before. `TDX files` and `GPU files` are genuine ones, where they are present
(see tests/vectors.py). Writes bench/results/appraisal.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchlib import HERE, machine, say

sys.path.insert(0, str(HERE.parent / "tests"))

import vectors
from countermark import x509chain
from countermark.appraise import appraise
from countermark.formats.evidence import encode_evidence
from countermark.genuine import GpuFiles, appraise_gpu_files, appraise_tdx_files
from countermark.gpu.rim import verify_rim_signature
from countermark.policy import Profile, new_policy
from sim_evidence import NOW, Scene, policy_for

ROUNDS = 200
TARGET_MS = 15.0
IN_2024 = 1_718_000_000


def measured(run: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Best, median and 95th percentile of processor time, after five runs that are not counted."""
    found = []
    for _ in range(rounds + 5):
        before()
        start = time.process_time_ns()
        run()
        found.append((time.process_time_ns() - start) / 1e6)
    found, p95 = found[5:], statistics.quantiles(found[5:], n=20)[18]
    values = {"best_ms": min(found), "median_ms": statistics.median(found), "p95_ms": p95}
    return {name: round(value, 2) for name, value in values.items()}


def cases() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> what is timed, and what is done before each time."""
    scene = Scene()
    evidence = scene.make()
    data, policy, connection = encode_evidence(evidence), policy_for(scene.state), scene.connection()
    assert evidence.gpu and evidence.endorsements.gpu_rims
    assert evidence.endorsements.gpu_crls or evidence.endorsements.gpu_ocsp

    def forget() -> None:
        for function in (verify_rim_signature, x509chain._load_certificate, x509chain._verify_issued):
            function.cache_clear()

    def session() -> object:
        return appraise(data, policy, now=NOW, connection=connection)

    found: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "session": (session, forget),
        "session again": (session, lambda: None),
    }
    try:
        folder = vectors.directory()
    except pytest.skip.Exception:
        say("genuine evidence is absent: its rows are left out")
        return found
    item = vectors.tdx("dstack-90c06f")
    strict = new_policy(Profile.PRODUCTION, now=item.at)
    collateral = item.collateral.encode()
    report, chain = vectors.gpu_report("h100-550"), vectors.gpu_chain_pem("h100-550")
    rims = (folder / "nvidia" / "rim" / "NV_GPU_DRIVER_GH100_550.144.03.xml").read_bytes()
    gpus = new_policy(Profile.PRODUCTION, now=IN_2024)
    return found | {
        "TDX files": (lambda: appraise_tdx_files(item.quote, collateral, strict, now=item.at), lambda: None),
        "GPU files": (
            lambda: appraise_gpu_files(report, chain, bytes(32), gpus, now=IN_2024, files=GpuFiles(rims=(rims,))),
            forget,
        ),
    }


def main() -> int:
    """Measure and write the result; 1 when the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "appraisal.json")
    args = parser.parse_args()
    results = {name: measured(run, args.rounds, before) for name, (run, before) in cases().items()}
    for name, result in results.items():
        say(f"{name}: {result}")
    report = {"rounds": args.rounds, "target_ms": TARGET_MS, "appraisals": results, "machine": machine()}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(results["session"]["median_ms"] > TARGET_MS)


if __name__ == "__main__":
    raise SystemExit(main())
