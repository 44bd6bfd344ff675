"""How much a node takes at a time: on hardware no more quotes than the kernel can ask for."""

from pathlib import Path

import pytest

from countermark_appliance import main
from countermark_appliance.config import parse_config
from countermark_appliance.service import ServiceLimits

NODE = """
[node]
operator = "demo.example"
[platform]
name = "sim"
[weights]
dir = "weights"
root = "{root}"
[log]
dir = "log"
[engine]
max_sequences = 3
max_waiting = 5
"""


@pytest.mark.parametrize(("simulated", "per_s", "burst"), [(True, 50.0, 100), (False, 1.0, 10)])
def test_limits(tmp_path: Path, simulated: bool, per_s: float, burst: int) -> None:
    config = parse_config(NODE.format(root="aa" * 32).encode(), base=tmp_path)
    limits = main._limits(config, simulated=simulated)
    assert limits == ServiceLimits(generations=3 + 5 + 64, attests_per_s=per_s, attest_burst=burst)
