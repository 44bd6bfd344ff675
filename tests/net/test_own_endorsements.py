"""A client that insists on its own endorsements: those that the node sends then decide nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from net_appliance import Appliance, running

from countermark import session as session_module
from countermark.appraise import Verdict, appraise
from countermark.bundle import read_bundle
from countermark.errors import CountermarkError
from countermark.fetch.https import Service
from countermark.fetch.intel import fetch_collateral, pccs
from countermark.formats.evidence import encode_evidence, parse_evidence
from countermark.session import connect
from countermark.verify import verify_bundle
from countermark_appliance.platform.sim import intel
from countermark_appliance.platform.sim.intel import Collateral
from countermark_appliance.platform.sim.state import State
from one_answer import NOW
from sim_evidence import Scene, machine, policy_for, with_collateral
from vendor_service import pccs_routes, serving

DAY_S = 86_400


def says(state: State, **changes: Any) -> bytes:
    return intel.collateral_json(state.vendor, Collateral(**{"issued": NOW - 3600, **changes}))


def appraised(scene: Scene, own: bytes | None) -> Verdict:
    return appraise(scene.encoded(), policy_for(machine()), now=NOW, connection=scene.connection(), endorsements=own)


def refusal(scene: Scene, own: bytes | None) -> tuple[str, str | None]:
    with pytest.raises(CountermarkError) as err:
        appraised(scene, own)
    return err.value.code, err.value.step


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("endorsements.expired", {"issued": NOW - 31 * DAY_S}),
        ("endorsements.rolled_back", {"evaluation_number": 3}),
        ("tcb.status", {"status": "OutOfDate"}),
        ("quote.pck_revoked", {"revoked_by_pck_ca": (machine().vendor.pck.certificate,)}),
    ],
)
def test_the_verifiers_own_decide_and_not_those_that_came_along(code: str, changes: dict[str, Any]) -> None:
    bad = Scene(state=with_collateral(machine(), **changes))
    good, own_bad = says(machine()), says(machine(), **changes)
    assert refusal(bad, None)[0] == code
    verdict = appraised(bad, good)
    assert "own" in verdict.checks[1].detail
    assert "own" not in appraised(Scene(), None).checks[1].detail
    assert refusal(Scene(), own_bad)[0] == code


def test_own_endorsements_that_do_not_parse_are_refused_in_step_1() -> None:
    assert refusal(Scene(), b"{}") == ("endorsements.crl_missing", "1")
    assert refusal(Scene(), b"") == ("endorsements.json", "1")


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Appliance, State]]:
    """A node whose endorsements have expired, and its machine."""
    with running(tmp_path_factory.mktemp("appliance")) as appliance:
        platform: Any = appliance.machine.attester._platform
        state = platform._state
        old = replace(state.endorsements, tdx=says(state, issued=NOW - 40 * DAY_S))
        platform._state = replace(state, endorsements=old)
        yield appliance, state


def test_a_session_with_fetched_endorsements_and_its_bundle(stale: tuple[Appliance, State], tmp_path: Path) -> None:
    appliance, state = stale
    policy = appliance.machine.policy
    with pytest.raises(CountermarkError) as err:
        connect(appliance.address, policy, now=NOW)
    assert err.value.code == "endorsements.expired"
    with serving(pccs_routes(says(state), fmspc=intel.FMSPC.hex())) as server:
        fetch = partial(fetch_collateral, source=pccs(Service(url=server.url)))
        with connect(appliance.address, policy, now=NOW, endorsements=fetch) as session:
            path = session.generate("count", max_tokens=2).result().save(tmp_path / "answer.cmk")
        assert len(server.asked) == 4
    assert verify_bundle(read_bundle(path), policy, NOW).verdict.quote_digest == session.verdict.quote_digest


def test_a_session_and_a_bundle_with_endorsements_from_a_file(stale: tuple[Appliance, State], tmp_path: Path) -> None:
    appliance, state = stale
    policy = appliance.machine.policy
    with connect(appliance.address, policy, now=NOW, endorsements=says(state)) as session:
        path = session.generate("count", max_tokens=2).result().save(tmp_path / "answer.cmk")
    bundle = read_bundle(path)
    parsed = parse_evidence(bundle.evidence)
    old = says(state, issued=NOW - 40 * DAY_S)
    bundle = replace(
        bundle, evidence=encode_evidence(replace(parsed, endorsements=replace(parsed.endorsements, tdx=old)))
    )
    with pytest.raises(CountermarkError) as err:
        verify_bundle(bundle, policy, NOW)
    assert err.value.code == "endorsements.expired"
    assert verify_bundle(bundle, policy, NOW, endorsements=says(state)).receipt is not None


def test_what_cannot_be_fetched_is_not_replaced_by_what_the_node_sends(tmp_path: Path) -> None:
    with running(tmp_path) as appliance, serving({}) as server:
        connect(appliance.address, appliance.machine.policy, now=NOW).close()
        fetch = partial(fetch_collateral, source=pccs(Service(url=server.url)))
        with pytest.raises(CountermarkError) as err:
            connect(appliance.address, appliance.machine.policy, now=NOW, endorsements=fetch)
        assert err.value.code == "endorsements.fetch.status"


def test_nothing_is_fetched_for_evidence_that_does_not_parse() -> None:
    def fetch(quote: bytes) -> bytes:
        raise AssertionError

    assert session_module._fetched(b"\xff", fetch) is None  # and the appraisal then refuses the same evidence
