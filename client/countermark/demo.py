"""The whole path on one machine, over the simulated platform: what a newcomer runs first.

Steps: 1 build the weights artefact (kept for the next run) · 2 make a simulated machine, which publishes its
measurements before anything boots · 3 pin them in a policy · 4 boot the appliance in a process of its own · 5 connect,
appraise, ask · 6 save the bundle and verify it offline · 7 run the answer again, audited and regenerated.

The appliance is started through its command line, because the client never imports an engine. Machine, policy, log and
bundle are made anew each run. Nothing here proves anything about hardware, and every result says `simulated`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from countermark import policy as policies
from countermark import terminal
from countermark.appraise import TimeBasis, Verdict
from countermark.bundle import read_bundle
from countermark.errors import CountermarkError, Unavailable, UsageError
from countermark.files import read_file, write_file
from countermark.policy import Profile
from countermark.replayer import Mode, ReplayResult, load_runner, replay
from countermark.session import connect
from countermark.verify import Verification, verify_bundle

_APPLIANCE: Final = (sys.executable, "-m", "countermark_appliance.cli")
_NODE = """# The demo's node. These bytes are measured into RTMR3.
[node]
operator = "demo"
listen = {listen}
[platform]
name = "sim"
state = "sim"
[weights]
dir = "weights"
root = "{root}"
[log]
dir = "log"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo ends with."""

    answer: str
    bundle: Path
    verified: Verification
    audit: ReplayResult
    regenerated: ReplayResult

    @property
    def replay(self) -> str:
        """`identical` when both replays were; a divergence raises before a result exists."""
        return "identical" if self.audit.identical and self.regenerated.identical else "diverged"

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict with the stable keys `answer`, `verdict`, `simulated`, `bundle`, `replay`, `replays`."""
        verdict: Verdict = self.verified.verdict
        return {
            "answer": self.answer,
            "simulated": verdict.simulated,
            "verdict": "accept",
            "checks": [check.as_json() for check in self.verified.checks],
            "bundle": str(self.bundle),
            "replay": self.replay,
            "replays": [self.audit.as_json(), self.regenerated.as_json()],
        }


def run_demo(
    directory: Path,
    prompt: str,
    *,
    say: Callable[[str], None],
    show: Callable[[DemoResult], None],
    listen: str = "127.0.0.1:0",
    keep_serving: bool = False,
) -> None:
    """Run all steps below `directory` and `show` the result.

    Raises what the steps raise, and `Unavailable` (`demo.appliance`) when the appliance does not come up; its own log
    is `appliance.log` in the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    for name in ("sim", "log"):
        shutil.rmtree(directory / name, ignore_errors=True)
    say("weights: SmolLM2-135M-Instruct, rotated and quantised to int8")
    root = _weights(directory / "weights")
    say("measurements: a simulated machine publishes them before it boots (its root is made anew each run)")
    machine = _appliance("sim", "new", str(directory / "sim"))
    say("policy: pin those measurements, these weights and the simulated roots; nothing else is accepted")
    manifest = read_file(directory / "sim" / "manifest.json")
    policy = policies.pin(
        policies.new_policy(
            Profile.TEST,
            now=int(time.time()),
            simulated_tdx_root=bytes.fromhex(machine["tdx_root"]),
            simulated_gpu_root=bytes.fromhex(machine["gpu_root"]),
            simulated_rim_root=bytes.fromhex(machine["rim_root"]),
        ),
        manifest,
        now=int(time.time()),
        signers=[bytes.fromhex(text) for text in machine["signers"]],
        weights_roots=[root],
    )
    write_file(directory / "policy.toml", policies.encode_policy(policy).encode())
    write_file(directory / "node.toml", _NODE.format(listen=json.dumps(listen), root=root.hex()).encode())
    say("boot: measure, load, self-test, system-ready, listen")
    with _serving(directory) as address:
        say(f"attest: {address} must prove itself before it is sent a prompt")
        bundle = directory / "answer.cmk"
        with connect(address, policy) as session:
            terminal.show_simulated()
            terminal.show_checks(session.witnessed.checks)
            say(f"ask: {prompt}")
            with terminal.progress("answering"):
                asked = session.generate(messages=[("user", prompt)], max_tokens=96, temperature=0.2, top_p=0.9)
                answer = asked.result()
        answer.save(bundle, manifest=manifest)
        show(_offline(bundle, directory, answer.text, say))
        if keep_serving:
            say(f"serving on {address} with policy {directory / 'policy.toml'}; Ctrl-C ends it")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)


def _offline(bundle: Path, directory: Path, text: str, say: Callable[[str], None]) -> DemoResult:
    """Verify and replay from files alone, as somebody else would."""
    say("verify: the bundle alone, offline")
    policy = policies.parse_policy(read_file(directory / "policy.toml"))
    verified = verify_bundle(read_bundle(bundle), policy, int(time.time()), time_basis=TimeBasis.NOW)
    terminal.show_checks(verified.checks)
    say("replay: run it again, audited in one pass and generated token by token")
    with terminal.progress("loading the weights"):
        runner = load_runner(verified.receipt.intent.stack.profile, directory / "weights")
    with terminal.progress("running it again"):
        audit = replay(verified, runner, Mode.AUDIT)
        audit.require_identical()
        regenerated = replay(verified, runner, Mode.REGENERATE)
        regenerated.require_identical()
    return DemoResult(answer=text, bundle=bundle, verified=verified, audit=audit, regenerated=regenerated)


def _weights(directory: Path) -> bytes:
    """The weights root of the demo's model; built when there is none here that verifies."""
    if directory.exists():
        with contextlib.suppress(CountermarkError):
            return bytes.fromhex(_appliance("weights", "verify", str(directory))["weights_root"])
    return bytes.fromhex(_appliance("weights", "build", "--stand-in", str(directory))["weights_root"])


def _appliance(*args: str) -> Any:
    """Run the appliance's command line to its end and return its JSON; its progress goes to our stderr."""
    done = subprocess.run((*_APPLIANCE, *args), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        name = " ".join(args[:2])
        raise UsageError(f"countermark-appliance {name}: exit code {done.returncode}", code="demo.appliance")
    return json.loads(done.stdout)


@contextmanager
def _serving(directory: Path) -> Iterator[str]:
    """The appliance as a process: its address once it listens, and its orderly end."""
    log = directory / "appliance.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            (*_APPLIANCE, "serve", "--config", str(directory / "node.toml")),
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
        )
    try:
        with terminal.progress("booting"):
            assert process.stdout is not None
            line = process.stdout.readline()  # one JSON line, or the end of a process that failed
        if not line:
            last = (log.read_text(errors="replace").splitlines() or ["it wrote nothing"])[-1]
            raise Unavailable(f"appliance: did not start: {last:.300} (see {log})", code="demo.appliance")
        yield json.loads(line)["listening"]
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
