"""What the proxy costs before a first token: the same question asked directly and through it, in turns.

Three processes on one machine: a node (simulated platform, real TLS, records and receipts; a scripted model, whose own
time would only hide what is measured), `countermark proxy`, and this one, which asks
  direct   a session of the library, from `generate` to the first text
  proxy    plain HTTP on a connection that stays open, from the request's first byte to the first text of the stream
  openai   the same through the `openai` package, whose own time is in it
Each round asks all of them, in an order that turns, so that whatever else the machine does falls on all. The overhead
is the median of the differences within rounds. Every answer is verified. Writes bench/results/proxy.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

from benchlib import HERE, machine, say

sys.path.insert(0, str(HERE.parent / "tests"))
sys.path.insert(0, str(HERE.parent / "tests" / "net"))

import net_appliance

import one_answer
from countermark.policy import encode_policy, load_policy
from countermark.session import Session, connect

ROUNDS = 600
TARGET_MS = 3.0
ASKED = "What is the capital of France?"
TOKENS = 4


@contextmanager
def started(directory: Path, *command: str) -> Iterator[str]:
    """A process of ours; yields where it says that it listens."""
    log = directory / f"{len(command)}.log"
    with log.open("w") as out:
        words = (sys.executable, *command)
        process = subprocess.Popen(words, cwd=directory, stdout=subprocess.PIPE, stderr=out, text=True)
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline() or "{}")
        assert "listening" in found, log.read_text()
        yield found["listening"]
    finally:
        process.terminate()
        process.wait(60)


def serve_node(directory: Path) -> None:
    """The node's process: writes the policy that accepts it, says where it listens, serves until it is stopped."""
    one_answer.NOW = net_appliance.NOW = int(time.time())
    with net_appliance.running(directory) as node:
        (directory / "policy.toml").write_text(encode_policy(node.machine.policy))
        print(json.dumps({"listening": node.address}), flush=True)
        signal.sigwait({signal.SIGTERM})


def directly(session: Session) -> float:
    start = time.perf_counter_ns()
    stream = session.generate(messages=[("user", ASKED)], max_tokens=TOKENS)
    next(iter(stream))
    first = time.perf_counter_ns()
    stream.result()
    return (first - start) / 1e6


def over_http(connection: http.client.HTTPConnection) -> float:
    body = json.dumps({"messages": [{"role": "user", "content": ASKED}], "max_tokens": TOKENS, "stream": True})
    start = time.perf_counter_ns()
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    first = 0
    verified = False
    for line in answer:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if not first and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter_ns()
            verified = verified or event.get("countermark", {}).get("verified") is True
    assert verified
    return (first - start) / 1e6


def through_openai(client: openai.OpenAI) -> float:
    start = time.perf_counter_ns()
    first = 0
    messages = [{"role": "user", "content": ASKED}]
    for chunk in client.chat.completions.create(
        model="countermark",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=TOKENS,
        stream=True,
    ):
        if not first and chunk.choices[0].delta.content:
            first = time.perf_counter_ns()
    return (first - start) / 1e6


def summary(found: list[float]) -> dict[str, float]:
    values = {"best_ms": min(found), "median_ms": statistics.median(found)}
    values["p95_ms"] = statistics.quantiles(found, n=20)[18]
    return {name: round(value, 3) for name, value in values.items()}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "proxy.json")
    parser.add_argument("--serve-node", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_node is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        serve_node(args.serve_node)
        return 0
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        serve = (__file__, "--serve-node", name)
        proxying = ("-m", "countermark.cli", "proxy", "--policy", "policy.toml", "--listen", "127.0.0.1:0", "--json")
        with started(directory, *serve) as node, started(directory, *proxying, node) as address:
            policy = load_policy(directory / "policy.toml")
            host, _, port = address.rpartition(":")
            with (
                connect(node, policy) as session,
                openai.OpenAI(base_url=f"http://{address}/v1", api_key="-") as client,
            ):
                connection = http.client.HTTPConnection(host, int(port))
                ways: dict[str, Callable[[], float]] = {
                    "direct": lambda: directly(session),
                    "proxy": lambda: over_http(connection),
                    "openai": lambda: through_openai(client),
                }
                found: dict[str, list[float]] = {way: [] for way in ways}
                for number in range(args.rounds + 5):
                    names = list(ways)
                    turned = names[number % 3 :] + names[: number % 3]
                    for way in turned:
                        found[way].append(ways[way]())
    found = {way: values[5:] for way, values in found.items()}
    overhead = [there - here for here, there in zip(found["direct"], found["proxy"], strict=True)]
    result = {
        "machine": machine(),
        "rounds": args.rounds,
        "target_ms": TARGET_MS,
        "first_token": {way: summary(values) for way, values in found.items()},
        "overhead": summary(overhead),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    say(json.dumps(result["first_token"] | {"overhead": result["overhead"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
