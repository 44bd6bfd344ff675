"""What appraising evidence costs: processor time of one appraisal, in milliseconds.

The simulated platform's evidence is as large as real evidence (quote, both logs, endorsements, one GPU's report with 64
measurements, driver and VBIOS RIM, revocation input) and signed with the same algorithms. `session` is an appraisal by
a process that has seen none of these bytes: everything that this project remembers is forgotten before each, and the
code has run before. `session again` is the next connection to the same node. `new process` is the very first appraisal
of a process of its own, its imports done: the interpreter and the libraries meet their code for the first time, too.
`TDX files` and `GPU files` are genuine ones, where they are present (see tests/vectors.py).

Processor time grows by a quarter when another process uses the core beside, so each result says the machine's load.
Writes bench/results/appraisal.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchlib import HERE, machine, say

sys.path.insert(0, str(HERE.parent / "tests"))

import vectors
from countermark.appraise import appraise
from countermark.formats.evidence import encode_evidence
from countermark.genuine import GpuFiles, appraise_gpu_files, appraise_tdx_files
from countermark.policy import Profile, encode_policy, new_policy
from sim_evidence import NOW, Scene, policy_for

ROUNDS = 200
PROCESSES = 20
FIRST = """
import pickle, sys, time
from countermark.appraise import appraise
from countermark.policy import parse_policy
data, policy, connection, now = pickle.load(open(sys.argv[1], "rb"))
policy = parse_policy(policy)
start = time.process_time_ns()
appraise(data, policy, now=now, connection=connection)
print((time.process_time_ns() - start) / 1e6)
"""
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
    return summary(found[5:])


def summary(found: list[float]) -> dict[str, float]:
    """Best, median and 95th percentile, and the machine's load of the last minute."""
    p95 = statistics.quantiles(found, n=20)[18]
    values = {"best_ms": min(found), "median_ms": statistics.median(found), "p95_ms": p95, "load": os.getloadavg()[0]}
    return {name: round(value, 2) for name, value in values.items()}


def new_processes(count: int) -> dict[str, float]:
    """The first appraisal of each of so many processes."""
    scene = Scene()
    data, policy = encode_evidence(scene.make()), encode_policy(policy_for(scene.state)).encode()
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickle.dumps((data, policy, scene.connection(), NOW)))
        file.flush()
        call = (sys.executable, "-c", FIRST, file.name)
        return summary([float(subprocess.run(call, capture_output=True, check=True).stdout) for _ in range(count)])


def forget() -> None:
    """Empty every cache of the client."""
    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith("countermark.") else ():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


def cases() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> what is timed, and what is done before each time."""
    scene = Scene()
    evidence = scene.make()
    data, policy, connection = encode_evidence(evidence), policy_for(scene.state), scene.connection()
    assert evidence.gpu and evidence.endorsements.gpu_rims
    assert evidence.endorsements.gpu_crls or evidence.endorsements.gpu_ocsp

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
    results = (
        {name: results[name] for name in ("session", "session again")}
        | {"new process": new_processes(PROCESSES)}
        | results
    )
    for name, result in results.items():
        say(f"{name}: {result}")
    report = {"rounds": args.rounds, "target_ms": TARGET_MS, "appraisals": results, "machine": machine()}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(results["session"]["median_ms"] > TARGET_MS)


if __name__ == "__main__":
    raise SystemExit(main())
