"""The two verifiers side by side: the Python client, and the built page's own script under Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from countermark.bundle import parse_bundle
from countermark.checks import Check
from countermark.errors import CountermarkError, PolicyError, Undecidable
from countermark.policy import Policy, encode_policy, parse_policy
from countermark.verify import verify_bundle

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "verify.html"
# Decided by the command line alone: GPU measurements, their manifests, revocation, time stamps.
BEYOND = ("anchor.", "gpu.rim", "gpu.measurement", "gpu.ocsp", "gpu.crl", "gpu.revo", "gpu.not_yet", "gpu.expired")


@dataclass(frozen=True, slots=True)
class Case:
    """One file under one policy at one time."""

    bundle: bytes
    policy: Policy | str
    at: int

    @property
    def policy_text(self) -> str:
        return self.policy if isinstance(self.policy, str) else encode_policy(self.policy)


@dataclass(frozen=True, slots=True)
class Said:
    """`checks`: step and status of each, without those that one of the two does not have."""

    verdict: str
    code: str
    step: str
    checks: tuple[tuple[str, str], ...]


def node() -> str:
    """The path of Node; skips the calling test when there is none."""
    found = os.environ.get("NODE") or shutil.which("node")
    if not found:
        pytest.skip("no node: the browser page was not compared with the command line (install Node 20 or later)")
    return found


def python_says(case: Case) -> Said:
    """The client's verdict in the page's words."""
    try:
        policy = parse_policy(case.policy_text.encode("utf-8", "surrogatepass"))
        done = verify_bundle(parse_bundle(case.bundle), policy, case.at)
    except CountermarkError as err:
        verdict = "undecidable" if isinstance(err, Undecidable | PolicyError) else "reject"
        return Said(verdict, err.code, err.step or "", _common(err.checks))
    return Said("accept", "", "", _common(done.checks))


def _common(checks: Sequence[Check]) -> tuple[tuple[str, str], ...]:
    return tuple((check.step, check.status.value) for check in checks if check.step != "21")


def page_results(cases: Sequence[Case], folder: Path, *, page: Path = PAGE) -> list[dict[str, Any]]:
    """What the page's script says, in one run of Node."""
    lines = []
    for number, case in enumerate(cases):
        bundle, policy = folder / f"{number}.cmk", folder / f"{number}.toml"
        bundle.write_bytes(case.bundle)
        policy.write_bytes(case.policy_text.encode())
        lines.append(json.dumps({"bundle": str(bundle), "policy": str(policy), "at": case.at}))
    done = subprocess.run(
        [node(), ROOT / "web" / "cli.mjs", "--batch"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PAGE": str(page)},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def said(result: dict[str, Any]) -> Said:
    """The page's result in the same form. Its step 0 is the file, which the client reads before it counts."""
    checks = [(item["step"], item["status"]) for item in result["checks"] if not item["beyond"] and item["step"] != "0"]
    step = "" if result["step"] == "0" else result["step"]
    verdict = "accept" if result["verdict"] == "partial" else result["verdict"]
    return Said(verdict, result["code"], step, tuple(checks))
