"""A node under many clients at once: does anything leak, does anybody starve, does every answer have its records?

    python bench/load.py [--clients 200] [--seconds 300] [--out bench/results/load.json]

One CPU node as a process (simulated platform, a small generated model), and as many clients as asked for, each with an
attested session of its own, in this process. Of ten clients seven read as fast as they can, one reads slowly, one
cancels every answer half way, one closes its connection in the middle and appraises the node again. Each verifies every
receipt. Memory and file descriptors of all processes of the node are read every second; at the end the node's log is
verified whole, through the node, and its records are counted against what the clients hold.

Fails (exit 1) where memory or descriptors grow between the second quarter of the run and the last, where a client got
less than a quarter of what the median one got of its kind, where an accepted request has no end in the log, or where
anything but a busy refusal went wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchlib import HERE, machine, say

sys.path.insert(0, str(HERE.parent / "tests"))
sys.path.insert(0, str(HERE.parent / "tests" / "weights"))

from tinymodels import write_folder

from countermark.errors import CountermarkError, Recorded, Unavailable
from countermark.policy import Policy
from countermark.session import Session, Stream, connect
from countermark_appliance.engine import weights
from node_files import write_node

KINDS = ("reader",) * 7 + ("slow", "canceller", "leaver")
ENGINE = "[engine]\nmax_sequences = 64\nmax_waiting = 120\n"
TOKENS = (8, 32)
SLOW_S = 0.1
GROWTH_SHARE, GROWTH_BYTES, GROWTH_FILES = 0.03, 24 << 20, 4
FAIR = 0.25
_WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


@dataclass
class Client:
    """What one client did and saw."""

    kind: str
    accepted: int = 0
    verified: int = 0
    cancelled: int = 0
    left: int = 0
    busy: int = 0
    tokens: int = 0
    unknown: int = 0  # whether the node recorded it was not heard any more
    sessions: int = 0
    first_s: list[float] = field(default_factory=list)
    wrong: collections.Counter[str] = field(default_factory=collections.Counter)


@contextmanager
def node(directory: Path) -> Iterator[tuple[str, Policy, int]]:
    """A node on a small generated model: its address, a policy, its process."""
    write_folder(source := directory / "model", "llama")
    weights.build(source, built := directory / "weights")
    policy = write_node(directory, built)
    with (directory / "node.toml").open("a") as config:
        config.write(ENGINE)
    with (directory / "node.log").open("w") as log:
        command = (sys.executable, "-m", "countermark_appliance.cli", "serve", "--config", "node.toml")
        process = subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline() or "{}")
        assert "listening" in found, (directory / "node.log").read_text()
        yield found["listening"], policy, process.pid
    finally:
        process.terminate()
        process.wait(60)


def run_client(client: Client, number: int, address: str, policy: Policy, end: float) -> None:
    rng = random.Random(number)
    session: Session | None = None
    try:
        while time.monotonic() < end:
            try:
                if session is None or session.is_over:
                    session = connect(address, policy, timeout_s=60)
                    client.sessions += 1
                if not ask(client, rng, session):
                    session.close()
            except Unavailable as err:
                client.unknown += err.recorded is Recorded.UNKNOWN
                if err.code not in {"engine.busy", "service.busy", "attest.rate"}:
                    client.wrong[err.code] += 1
                client.busy += 1
                time.sleep(max(0.05, err.retry_after_s or 0.0) * rng.uniform(1.0, 1.5))
            except CountermarkError as err:
                client.wrong[err.code] += 1
    finally:
        if session is not None:
            session.close()


def ask(client: Client, rng: random.Random, session: Session) -> bool:
    """One request as this kind of client makes it. False: the connection is to be closed."""
    prompt = " ".join(rng.choices(_WORDS, k=rng.randint(1, 5)))
    asked = time.monotonic()
    count = rng.randint(*TOKENS)
    stream = session.generate(prompt, max_tokens=count, seed=rng.getrandbits(32), temperature=1.0, ignore_eos=True)
    client.accepted += 1
    first = True
    for _ in stream:
        if first:
            client.first_s.append(time.monotonic() - asked)
        first = False
        match client.kind:
            case "slow":
                time.sleep(SLOW_S)
            case "canceller":
                return cancelled(client, stream)
            case "leaver":
                client.left += 1
                return False
    answer = stream.result()
    client.tokens += len(answer.tokens)
    client.verified += 1
    return True


def cancelled(client: Client, stream: Stream) -> bool:
    stream.cancel()
    with suppress(Unavailable):
        stream.result()
        client.verified += 1  # it had all arrived
        return True
    client.cancelled += 1
    return True


@dataclass(frozen=True)
class Sample:
    at_s: float
    rss: int
    files: int


def sample(root: int, started: float) -> Sample:
    """Of a process and all below it."""
    rss = files = 0
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        with suppress(OSError, ValueError):
            rss += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
    return Sample(time.monotonic() - started, rss, files)


def grown(samples: list[Sample]) -> dict[str, Any]:
    """The second quarter of a run against its last."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[3 * quarter :]
    rss = [statistics.median(s.rss for s in part) for part in (early, late)]
    files = [statistics.median(s.files for s in part) for part in (early, late)]
    return {
        "rss_mib": [round(value / 2**20, 1) for value in rss],
        "files": files,
        "flat": rss[1] <= rss[0] + max(GROWTH_SHARE * rss[0], GROWTH_BYTES) and files[1] <= files[0] + GROWTH_FILES,
    }


def records(address: str, directory: Path) -> dict[str, Any]:
    """The node's log, verified whole, through the node."""
    command = [sys.executable, "-m", "countermark.cli", "log", "verify", address, "--policy", "policy.toml", "--json"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def settled(address: str, directory: Path) -> dict[str, Any]:
    """Once every INTENT has its end; what clients left behind is being ended for a moment yet."""
    for _ in range(20):
        found = records(address, directory)
        if not found["open_intents"]:
            break
        time.sleep(1.0)
    return found


def run(clients: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name, node(directory := Path(name)) as (address, policy, pid):
        everybody = [Client(kind=KINDS[i % len(KINDS)]) for i in range(clients)]
        started = time.monotonic()
        threads = [
            threading.Thread(target=run_client, args=(client, i, address, policy, started + seconds), daemon=True)
            for i, client in enumerate(everybody)
        ]
        for thread in threads:
            thread.start()
        samples = []
        while time.monotonic() < started + seconds:
            samples.append(sample(pid, started))
            time.sleep(1.0)
        for thread in threads:
            thread.join(120)
        stuck = sum(thread.is_alive() for thread in threads)
        log = settled(address, directory)
    return report(everybody, samples, log, stuck, seconds)


def report(
    everybody: list[Client], samples: list[Sample], log: dict[str, Any], stuck: int, seconds: float
) -> dict[str, Any]:
    total = {
        name: sum(getattr(client, name) for client in everybody)
        for name in ("accepted", "verified", "cancelled", "left", "busy", "tokens", "unknown", "sessions")
    }
    by_kind = {
        kind: sorted(client.accepted for client in everybody if client.kind == kind) for kind in dict.fromkeys(KINDS)
    }
    starved = [kind for kind, counts in by_kind.items() if counts and counts[0] < FAIR * statistics.median(counts)]
    wrong: collections.Counter[str] = collections.Counter()
    for client in everybody:
        wrong.update(client.wrong)
    first = sorted(value for client in everybody for value in client.first_s) or [0.0]
    leaves = {kind.upper(): count for kind, count in log["leaves"].items()}
    memory = grown(samples)
    recorded = leaves.get("INTENT", 0)
    complete = (
        log["open_intents"] == 0
        and total["accepted"] <= recorded <= total["accepted"] + total["unknown"]
        and leaves.get("OUTCOME", 0) >= total["verified"]
        and leaves.get("OUTCOME", 0) + leaves.get("ABORT", 0) == recorded
    )
    return {
        "clients": len(everybody),
        "seconds": seconds,
        **total,
        "tokens_per_s": round(total["tokens"] / seconds, 1),
        "verified_per_s": round(total["verified"] / seconds, 1),
        "first_text_s": {
            "median": round(statistics.median(first), 3),
            "p95": round(first[int(0.95 * (len(first) - 1))], 3),
        },
        "accepted_by_kind": {
            kind: {"clients": len(counts), "least": counts[0], "median": statistics.median(counts), "most": counts[-1]}
            for kind, counts in by_kind.items()
            if counts
        },
        "leaves": leaves,
        "open_intents": log["open_intents"],
        **memory,
        "stuck": stuck,
        "starved": starved,
        "wrong": dict(wrong),
        "records_complete": complete,
        "passed": bool(memory["flat"] and complete and not starved and not wrong and not stuck),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = run(args.clients, args.seconds)
    say(json.dumps(found, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
