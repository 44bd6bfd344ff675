"""Policy, what a verifier accepts: `parse_policy`, `encode_policy` for the file, `new_policy` and `pin` to make one."""

from __future__ import annotations

from countermark.policy.modules import KNOWN_MRSEAM
from countermark.policy.pin import new_policy, pin, verify_manifest, verify_signatures
from countermark.policy.toml import encode_policy, load_policy, parse_policy
from countermark.policy.value import (
    DAY_S,
    INTEL_SGX_ROOT,
    NVIDIA_DEVICE_ROOT,
    NVIDIA_RIM_ROOT,
    SIMULATED_MRSEAM,
    GpuFreshnessRule,
    GpuRevocationRule,
    Policy,
    Profile,
    Waiver,
    WitnessRule,
)

__all__ = [
    "DAY_S",
    "INTEL_SGX_ROOT",
    "KNOWN_MRSEAM",
    "NVIDIA_DEVICE_ROOT",
    "NVIDIA_RIM_ROOT",
    "SIMULATED_MRSEAM",
    "GpuFreshnessRule",
    "GpuRevocationRule",
    "Policy",
    "Profile",
    "Waiver",
    "WitnessRule",
    "encode_policy",
    "load_policy",
    "new_policy",
    "parse_policy",
    "pin",
    "verify_manifest",
    "verify_signatures",
]
