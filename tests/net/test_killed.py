"""kill -9 of a whole service under load, at any instant: what clients hold afterwards, the log holds too."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import one_answer
from countermark.errors import CountermarkError, Unavailable
from countermark.formats.records import Kind, parse_leaf
from countermark.formats.witnessed import boot_log_keys
from countermark.logcheck import Rules, verify_log
from countermark.logsource import directory as log_directory
from countermark.policy import Policy, parse_policy
from countermark.session import connect
from countermark.tlog.merkle import leaf_hash
from countermark_appliance.records.journal import Frame, read_journal
from countermark_appliance.records.previous import read_sidecar
from one_answer import NOW

CLIENTS = 6


@dataclass
class Seen:
    """What the clients of one round hold. `problems`: anything but a lost connection."""

    accepted: dict[bytes, int] = field(default_factory=dict)  # INTENT leaf hash -> its index
    with_tokens: set[bytes] = field(default_factory=set)
    answered: dict[bytes, int] = field(default_factory=dict)  # INTENT leaf hash -> size of the receipt's log
    problems: list[BaseException] = field(default_factory=list)


@pytest.fixture
def nursery() -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name("killed_worker.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)


def say(nursery: subprocess.Popen[bytes], line: str) -> dict[str, str]:
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write(f"{line}\n".encode())
    nursery.stdin.flush()
    answer: dict[str, str] = json.loads(nursery.stdout.readline())
    return answer


def client(address: str, policy: Policy, seen: Seen, stop: threading.Event) -> None:
    """Ask until the connection is lost. The session gives out no token before Accepted is verified."""
    try:
        with connect(address, policy, now=NOW) as session:
            while not stop.is_set():
                stream = session.generate("count for me", max_tokens=8)
                leaf = stream.accepted.leaf
                seen.accepted[leaf] = stream.accepted.acceptance.leaf_index
                for _ in stream:
                    seen.with_tokens.add(leaf)
                seen.answered[leaf] = stream.result().receipt.checkpoint.size
    except Unavailable:
        pass
    except CountermarkError as err:
        seen.problems.append(err)


def one_round(nursery: subprocess.Popen[bytes], directory: Path, draw: random.Random) -> Seen:
    directory.mkdir(exist_ok=True)
    shutil.rmtree(directory / "code", ignore_errors=True)
    node, seen, stop = say(nursery, str(directory)), Seen(), threading.Event()
    policy = parse_policy(node["policy"].encode())
    threads = [threading.Thread(target=client, args=(node["address"], policy, seen, stop)) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while not seen.accepted and not seen.problems and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(draw.uniform(0.0, 0.4))
    assert say(nursery, "kill") == {"killed": True}
    stop.set()
    for thread in threads:
        thread.join()
    assert not seen.problems
    check(directory, node["boot"], seen)
    return seen


def check(directory: Path, boot: str, seen: Seen) -> None:
    """The next start reads what the kill left; then the log and the clients must agree."""
    journal = directory / "log" / boot / "journal"
    code = directory / "code"
    machine = one_answer.start(directory / "log", code)
    try:
        previous = machine.recorder.epoch.previous
        assert previous is not None
        assert previous.boot_id.hex() == boot
        leaves = [leaf for item in read_journal(journal) if isinstance(item, Frame) for leaf in item.leaves]
        hashes = [leaf_hash(leaf) for leaf in leaves]
        assert previous.size == len(leaves)
        for leaf, index in seen.accepted.items():
            assert hashes[index] == leaf, "an acknowledged INTENT is not in the log"
        assert seen.with_tokens <= seen.accepted.keys()
        parsed = [parse_leaf(leaf) for leaf in leaves]
        ended = {leaf.intent_leaf for leaf in parsed if leaf.kind in (Kind.OUTCOME, Kind.ABORT)}
        for leaf, size in seen.answered.items():
            assert leaf in ended, "a receipt was given for an OUTCOME that is not in the log"
            assert size <= len(leaves)
        still_open = {hashes[leaf.sequence] for leaf in parsed if leaf.kind is Kind.INTENT} - ended
        size, _ = machine.recorder.head()
        later = [parse_leaf(leaf) for leaf in machine.recorder.leaves(0, size)]
        assert [leaf.kind for leaf in later] == [Kind.EPOCH] + [Kind.CRASHED] * len(still_open)
        assert {leaf.intent_leaf for leaf in later[1:]} == still_open
        sidecar = read_sidecar(journal.parent)
        keys = boot_log_keys(sidecar.keys)
        checked = verify_log(log_directory(journal.parent), sidecar.epoch.origin, keys, rules=Rules.BOOT)
        assert (checked.checkpoint.size, checked.open_intents) == (len(leaves), len(still_open))
    finally:
        machine.recorder.close()


def rounds(nursery: subprocess.Popen[bytes], directory: Path, count: int, seed: int) -> tuple[int, int, int]:
    draw = random.Random(seed)
    totals = [0, 0, 0]
    for i in range(count):
        seen = one_round(nursery, directory / str(i // 20), draw)
        for at, found in enumerate((seen.accepted, seen.with_tokens, seen.answered)):
            totals[at] += len(found)
    return totals[0], totals[1], totals[2]


def test_a_service_killed_at_any_instant(nursery: subprocess.Popen[bytes], tmp_path: Path) -> None:
    accepted, with_tokens, answered = rounds(nursery, tmp_path, 10, 20262)
    assert accepted > answered > 0
    assert with_tokens > 0


@pytest.mark.slow
def test_two_hundred_services_killed(nursery: subprocess.Popen[bytes], tmp_path: Path) -> None:
    accepted, with_tokens, answered = rounds(nursery, tmp_path, 200, 20263)
    print(f"200 kills: {accepted} requests accepted, {with_tokens} with tokens, {answered} with a receipt; none lost")
    assert accepted > answered > 0
