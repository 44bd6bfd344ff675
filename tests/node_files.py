"""A simulated node: the files it boots from, and what tests are told about a running one."""

import hashlib
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from countermark import policy as policies
from countermark.policy import Policy, Profile
from countermark_appliance.platform import sim


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A running appliance: where it listens, what accepts it, its files."""

    address: str
    policy: Policy
    directory: Path
    process: subprocess.Popen[str]


CONFIG = """[node]
operator = "test.example"
[platform]
name = "sim"
state = "sim"
[weights]
dir = "{weights}"
root = "{root}"
[log]
dir = "log"
"""


def write_node(directory: Path, weights: Path) -> Policy:
    """Write machine, node.toml and policy.toml into `directory`; the policy accepts this machine and these weights."""
    now = int(time.time())
    state = sim.create(directory / "sim", now=now)
    root = bytes.fromhex(json.loads((weights / "weights.json").read_text())["root"])
    policy = policies.pin(
        policies.new_policy(
            Profile.TEST,
            now=now,
            simulated_tdx_root=hashlib.sha256(state.root_der).digest(),
            simulated_gpu_root=hashlib.sha256(state.gpu_root_der).digest(),
            simulated_rim_root=hashlib.sha256(state.rim_root_der).digest(),
        ),
        state.manifest,
        now=now,
        signers=state.signer_digests,
        weights_roots=[root],
    )
    (directory / "policy.toml").write_text(policies.encode_policy(policy))
    (directory / "node.toml").write_text(CONFIG.format(weights=weights, root=root.hex()))
    return policy
