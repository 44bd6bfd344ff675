"""Fuzz parsers: `driver.py [--inputs N] [--seed S] [--jobs J] [--out FILE] [TARGET ...]`.

Each target runs in a process of its own whose address space may grow by `HEADROOM_BYTES` only. An input must be
accepted or refused by a typed error within `LIMIT_S` of processor time; anything else ends the run with the input in
hex. The report has one entry a target: inputs, inputs per second, accepted, refused by code, slowest, memory grown by.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from countermark.errors import CountermarkError
from fuzz.targets import TARGETS

LIMIT_S = 1.0
HEADROOM_BYTES = 512 << 20
GROWTH_BYTES = 128 << 20
HANG_S = 60  # of processor time, for a thousand inputs: for a loop that never ends


def fuzz(name: str, inputs: int, seed: int, slow_s: float | None = None) -> dict[str, Any]:
    """Run one target. Raises `AssertionError` with the input when it does what it must not."""
    target = TARGETS[name]
    seeds = list(target.seeds())
    target.parse(seeds[0])  # a seed that does not parse would fuzz nothing
    rng = random.Random(f"{name} {seed}")
    refused: Counter[str] = Counter()
    done, accepted, slowest = 0, 0, 0.0
    before, limit = _peak_bytes(), resource.getrlimit(resource.RLIMIT_AS)
    start = time.process_time()
    signal.signal(signal.SIGPROF, _hangs)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + HEADROOM_BYTES, limit[1]))
    try:
        while done < inputs and (slow_s is None or done % 1000 or time.process_time() - start < slow_s):
            if not done % 1000:
                signal.setitimer(signal.ITIMER_PROF, HANG_S)
            data = rng.choice(target.mutators)(rng, rng.choice(seeds), rng.choice(seeds))
            began = time.thread_time()
            try:
                target.parse(data)
                accepted += 1
            except target.errors as err:
                refused[err.code] += 1
            except Exception as err:
                raise AssertionError(f"{name}, input {done} of seed {seed}: {err!r} for {data.hex()}") from err
            took = time.thread_time() - began
            slowest = max(slowest, took)
            assert took < LIMIT_S, f"{name}, input {done} of seed {seed}: {took:.1f} s for {data.hex()}"
            done += 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
    seconds, grown = time.process_time() - start, _peak_bytes() - before
    assert grown < GROWTH_BYTES, f"{name}: memory grew by {grown >> 20} MiB"
    return {
        "target": name,
        "seeds": len(seeds),
        "inputs": done,
        "inputs_per_s": round(done / seconds),
        "accepted": accepted,
        "refused": dict(sorted(refused.items())),
        "slowest_ms": round(slowest * 1000, 2),
        "memory_grown_mib": round(grown / (1 << 20), 1),
    }


def _hangs(*_: object) -> None:
    raise AssertionError(f"a thousand inputs took more than {HANG_S} s of processor time")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run(names: list[str], *, inputs: int, seed: int, jobs: int, slow_s: float | None) -> list[dict[str, Any]]:
    """Fuzz the named targets, `jobs` at a time, each in a fresh child. With `slow_s`, a target whose inputs would take
    longer gets as many as fit."""
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        results = [pool.apply_async(_child, (name, inputs, seed, slow_s)) for name in names]
        return [result.get() for result in results]


def _child(*call: Any) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # cryptography's, about odd serial numbers
    try:
        return fuzz(*call)
    except CountermarkError as err:  # which does not pickle
        raise AssertionError(f"{call[0]}: a seed is refused: {err!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--inputs", type=int, default=50_000, help="for each target (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="stop a target after this much processor time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the report here; default: stdout")
    args = parser.parse_args()
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "seed": args.seed,
        "targets": run(
            args.targets or list(TARGETS), inputs=args.inputs, seed=args.seed, jobs=args.jobs, slow_s=args.seconds
        ),
    }
    text = table(report) if args.out and args.out.suffix == ".txt" else json.dumps(report, indent=1) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        sys.stdout.write(text)


def table(report: dict[str, Any]) -> str:
    """The report for people: a line a target."""
    machine = f"{report['cpu']}, Python {report['python']}, {report['date']}, seed {report['seed']}"
    heads = ("parser", "inputs", "accepted", "codes", "inputs/s", "slowest ms", "memory MiB")
    rows = [
        (
            item["target"],
            f"{item['inputs']:,}",
            f"{item['accepted']:,}",
            str(len(item["refused"])),
            f"{item['inputs_per_s']:,}",
            f"{item['slowest_ms']:.2f}",
            f"{item['memory_grown_mib']:.1f}",
        )
        for item in report["targets"]
    ]
    lines = [f"{row[0]:<20}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in (heads, *rows)]
    what = (
        "Mutated inputs to every parser of bytes from outside (tests/fuzz/driver.py): each was accepted or refused by"
    )
    limits = f"a typed error, within {LIMIT_S:.0f} s and {GROWTH_BYTES >> 20} MiB."
    return "\n".join((what, limits, machine, "", *lines)) + "\n"


if __name__ == "__main__":
    main()
