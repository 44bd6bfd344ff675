"""Two hundred streams at a time through one proxy: slow readers, clients that leave, errors; no leak, all recorded.

The model alone is scripted. `make soak` runs the long one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from net_appliance import Appliance, running
from proxy_helpers import Proxy, wait_until

from countermark.formats.records import Kind, parse_leaf
from countermark_appliance.service import ServiceLimits

CLIENTS = 200
MOST_KIB = 60 * 1024


def resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def one(port: int, rng: random.Random, sums: dict[str, int]) -> None:
    """One request of one of four kinds of clients."""
    kind = rng.choices(("reads", "slow", "leaves", "wrong"), (6, 2, 2, 1))[0]
    body = {"messages": [{"role": "user", "content": "x " * rng.randrange(1, 9)}], "max_tokens": rng.randrange(1, 40)}
    body |= {"stream": True, "seed": rng.randrange(1 << 32)} | ({"n": 2} if kind == "wrong" else {})
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(data)
        )
        writer.write(data)
        found = b""
        while True:
            piece = await asyncio.wait_for(reader.read(512 if kind == "slow" else 65536), 120)
            found += piece
            if not piece or (kind == "leaves" and b"data: " in found):
                break
            if kind == "slow":
                await asyncio.sleep(0.02)
    finally:
        writer.close()
    if kind == "leaves":
        sums["left"] += 1
    elif kind == "wrong":
        assert found.startswith(b"HTTP/1.1 400"), found[:200]
        sums["refused"] += 1
    elif found.startswith(b"HTTP/1.1 503"):  # refused by the node's HTTP/2, and honestly said so
        assert b'"server.cancelled"' in found and b"may have begun" in found, found[-500:]
        sums["refused by http/2"] += 1
    else:
        assert b'"verified":true' in found, found[-500:]
        assert b"data: [DONE]" in found
        sums["verified"] += 1


async def clients(port: int, seconds: float) -> tuple[dict[str, int], list[int]]:
    """`CLIENTS` at a time until the time is over; what they got, and how much each of them got done."""
    sums = {"verified": 0, "left": 0, "refused": 0, "refused by http/2": 0}
    done = [0] * CLIENTS
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            await one(port, rng, sums)
            done[number] += 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return sums, done


@pytest.mark.system
@pytest.mark.parametrize("seconds", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_two_hundred_streams(seconds: float, tmp_path: Path) -> None:
    with running(tmp_path, limits=ServiceLimits(generations=400)) as node:
        with Proxy.of(node, wait_s=60.0) as proxy:
            asyncio.run(clients(proxy.port, 3.0))  # what is made once has been made
        wait_until(lambda: all_ended(kinds(node)), 30)
        gc.collect()
        before, memory, answered = descriptors(), resident_kib(), kinds(node).count(Kind.OUTCOME)
        with Proxy.of(node, wait_s=60.0) as proxy:
            sums, done = asyncio.run(clients(proxy.port, seconds))
            wait_until(lambda: proxy.app.serving.active == 0, 30)
            wait_until(lambda: proxy.server.connections == 0, 30)
            found = proxy.status()
        wait_until(lambda: all_ended(kinds(node)), 30)
        gc.collect()
        grown = {"descriptors": descriptors() - before, "kib": resident_kib() - memory}
        print(json.dumps(sums | {"least": min(done), "most": max(done)} | grown | {"connections": connections(found)}))
        assert min(done) > 0, "somebody got nothing"
        assert 100 * sums["refused by http/2"] <= sums["verified"]
        assert grown["descriptors"] <= 4
        assert grown["kib"] < MOST_KIB
        assert found["sums"]["withheld"] == found["sums"]["ended"] == 0
        assert found["sums"]["verified"] >= sums["verified"]
        assert kinds(node).count(Kind.OUTCOME) - answered >= sums["verified"]
        assert found["nodes"][0]["active"] == 0
        assert "proxy_error" not in proxy.log.getvalue()


def connections(found: Any) -> int:
    return sum(node["connections"] for node in found["nodes"])


def kinds(node: Appliance) -> list[Kind]:
    """What the log holds."""
    recorder = node.machine.recorder
    size, _ = recorder.head()
    leaves = (recorder.leaves(start, min(1024, size - start)) for start in range(0, size, 1024))
    return [parse_leaf(leaf).kind for some in leaves for leaf in some]


def all_ended(found: list[Kind]) -> bool:
    """Every INTENT has its OUTCOME or ABORT."""
    return found.count(Kind.INTENT) == found.count(Kind.OUTCOME) + found.count(Kind.ABORT)
