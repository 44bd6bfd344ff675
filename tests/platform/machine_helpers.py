"""One simulated machine for all platform tests, and dcap-qvl as the verifier that is not ours."""

import functools

import dcap_qvl

from countermark_appliance.platform import sim
from countermark_appliance.platform.sim.state import State, make

NOW = 1_800_000_000


@functools.cache
def machine() -> State:
    """Made once; nothing changes it."""
    return make(now=NOW, gpus=2)


def booted(**launch: object) -> sim.SimPlatform:
    """That machine, powered on."""
    return sim.boot(machine(), sim.TdLaunch(**launch))  # type: ignore[arg-type]


def verify(quote: bytes, collateral: bytes, root: bytes | None, *, now: int = NOW) -> dict[str, object]:
    """dcap-qvl under its strict policy; raises ValueError when it refuses."""
    import json

    value = dcap_qvl.QuoteCollateralV3.from_json(collateral.decode())
    claims = dcap_qvl.QuoteVerifier(root).verify_with_policy(quote, value, now, dcap_qvl.QuotePolicy.strict(now))
    found: dict[str, object] = json.loads(claims.to_json())
    return found
