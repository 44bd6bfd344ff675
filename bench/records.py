"""What the records cost: durable INTENTs, receipts, the first token, the verification of a log of a million leaves.

    python bench/records.py [--leaves 1000000] [--rounds 7] [--dir DIR]

The engine is left out or stubbed; everything else is the appliance's own: recorder, journal, synced commits, gRPC, TLS.
Results go to bench/results/records.json. `DIR` decides which disk is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import benchlib

RESULTS = Path(__file__).parent / "results" / "records.json"
ROOT = Path(__file__).parents[1]
CONCURRENT = 64


def cases() -> Any:
    """The tests' recorder and values: a recorder of a machine that does not exist."""
    sys.path.insert(0, str(ROOT / "tests" / "records"))
    import record_values

    return record_values


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def fsync_us(directory: Path) -> float:
    """Median of one 8 KiB write and fdatasync on this disk."""
    taken = []
    fd = os.open(directory / "probe", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, 16 << 20)
    for i in range(400):
        started = time.perf_counter()
        os.pwrite(fd, bytes(8192), i * 8192)
        os.fdatasync(fd)
        taken.append(time.perf_counter() - started)
    os.close(fd)
    return statistics.median(taken) * 1e6


def rate(directory: Path, seconds: float, work: Callable[[Any, Any], None]) -> dict[str, float]:
    """Calls of `work` a second from `CONCURRENT` threads, and their latency."""
    values = cases()
    recorder = values.open_recorder(directory)
    latencies: list[list[float]] = [[] for _ in range(CONCURRENT)]
    stop = threading.Event()
    ready = threading.Barrier(CONCURRENT + 1)

    def run(own: list[float]) -> None:
        ready.wait()
        while not stop.is_set():
            started = time.perf_counter()
            work(recorder, values)
            own.append(time.perf_counter() - started)

    with ThreadPoolExecutor(CONCURRENT) as pool:
        done = [pool.submit(run, own) for own in latencies]
        ready.wait()
        started, cpu = time.perf_counter(), time.process_time()
        time.sleep(seconds)
        stop.set()
        for item in done:
            item.result()
        taken = time.perf_counter() - started
        cpu = time.process_time() - cpu
    size = recorder.head()[0]
    recorder.close()
    all_ = [item for own in latencies for item in own]
    return {
        "per_s": len(all_) / taken,
        "median_ms": statistics.median(all_) * 1e3,
        "p99_ms": percentile(all_, 0.99) * 1e3,
        "cores": cpu / taken,
        "leaves": size,
    }


def intents(directory: Path, seconds: float) -> dict[str, float]:
    return rate(directory, seconds, lambda recorder, values: values.intent(recorder))


def receipts(directory: Path, seconds: float) -> dict[str, float]:
    """Whole records: INTENT, OUTCOME, receipt."""

    def work(recorder: Any, values: Any) -> None:
        recorder.receipt(values.outcome(recorder, values.intent(recorder)))

    return rate(directory, seconds, work)


def alone(directory: Path, count: int = 300) -> dict[str, float]:
    """What committing adds before the first token when nobody else asks: from request to durable, proven INTENT."""
    values = cases()
    recorder = values.open_recorder(directory)
    taken = []
    for _ in range(count):
        time.sleep(0.01)
        started = time.perf_counter()
        values.intent(recorder)
        taken.append(time.perf_counter() - started)
    recorder.close()
    return {"median_ms": statistics.median(taken) * 1e3, "p99_ms": percentile(taken, 0.99) * 1e3}


def verified(directory: Path, leaves: int) -> dict[str, float]:
    """A log of so many leaves, published, then verified by the command in a process of its own."""
    found = {count: _verified(make_log(directory, count), count) for count in (1000, leaves)}
    return {
        "leaves": leaves,
        "seconds": found[leaves][0],
        "peak_mib": found[leaves][1],
        "peak_mib_of_1000_leaves": found[1000][1],
        "tiles": found[leaves][2],
    }


def _verified(boot: Path, leaves: int) -> tuple[float, float, int]:
    """Seconds, peak memory in MiB and tiles of one run of the command."""
    script = (  # VmHWM begins anew with the program; ru_maxrss would be its parent's
        "import sys; from countermark.cli import main; code = main(sys.argv[1:]);"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0], file=sys.stderr); sys.exit(code)"
    )
    started = time.perf_counter()
    command = [sys.executable, "-c", script, "log", "verify", str(boot), "--json"]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)
    said = json.loads(ran.stdout)
    assert said["size"] == leaves, said
    return time.perf_counter() - started, int(ran.stderr.split()[-1]) / 1024, said["tiles"]


def make_log(directory: Path, leaves: int) -> Path:
    """A boot's log with alternating INTENTs and OUTCOMEs, by the store alone: records and salts are left out."""
    from countermark.formats import records
    from countermark.formats.records import Kind, Leaf, leaf_digest

    values = cases()
    root = directory / f"log{leaves}"
    recorder = values.open_recorder(root)
    boot = recorder.epoch.boot_id
    store = recorder._store
    at = 1
    while at < leaves:
        builds = []
        for index in range(at, min(leaves, at + 4000)):
            ends = index % 2 == 0
            before = Leaf(kind=Kind.INTENT, boot_id=boot, sequence=index - 1, intent_leaf=None, commitment=bytes(32))
            leaf = Leaf(
                kind=Kind.OUTCOME if ends else Kind.INTENT,
                boot_id=boot,
                sequence=index,
                intent_leaf=leaf_digest(before) if ends else None,
                commitment=bytes(32),
            )
            builds.append(functools.partial(_given, records.encode_leaf(leaf)))
        store.append(builds, new=True)
        at += len(builds)
    recorder.close()
    return root / boot.hex()


def _given(data: bytes, _index: int) -> bytes:
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=7, help="the best is reported, all are kept")
    parser.add_argument("--dir", type=Path, help="on the disk to measure (default: a temporary directory)")
    parser.add_argument("--parts", default="disk,memory,verified")
    args = parser.parse_args()
    parts = args.parts.split(",")
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found |= {"rounds": args.rounds, "concurrent": CONCURRENT, "machine": benchlib.machine()}
    for part, base in (("disk", args.dir), ("memory", Path("/dev/shm")), ("verified", args.dir)):  # noqa: S108
        if part not in parts:
            continue
        directory = Path(tempfile.mkdtemp(dir=base))
        try:
            if part == "disk":
                found["fdatasync_us"] = min(fsync_us(directory) for _ in range(args.rounds))
            if part == "verified":
                found["verified"] = verified(directory, args.leaves)
            else:
                found[part] = measured(directory, args.rounds, args.seconds)
        finally:
            shutil.rmtree(directory)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def measured(directory: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """The best round of each, and all of them."""
    found: dict[str, Any] = {}
    for name, measure in (("intents", intents), ("receipts", receipts)):
        runs = [measure(directory / f"{name}{i}", seconds) for i in range(rounds)]
        found[name] = {**max(runs, key=lambda run: run["per_s"]), "rounds_per_s": [run["per_s"] for run in runs]}
    waits = [alone(directory / f"alone{i}") for i in range(rounds)]
    best = min(waits, key=lambda run: run["median_ms"])
    found["alone"] = {**best, "rounds_median_ms": [run["median_ms"] for run in waits]}
    return found


if __name__ == "__main__":
    main()
