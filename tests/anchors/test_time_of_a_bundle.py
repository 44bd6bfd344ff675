"""A time stamp in a bundle is the time at which it is verified, unless somebody chose another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tsa import DAY, Authority

from countermark.appraise import TimeBasis
from countermark.checks import Status
from countermark.errors import CountermarkError
from countermark.formats.anchors import Anchor, AnchorKind, encode_anchors
from countermark.formats.receipt import parse_receipt
from countermark.policy import Policy
from countermark.verify import MAX_CLOCK_SKEW_S, Verification, verify_bundle
from one_answer import NOW, World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("anchored"))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def stamped(world: World, authority: Authority, time: int = NOW + 10, *, over: bytes | None = None) -> bytes:
    note = parse_receipt(world.bundle().receipt).payload.checkpoint
    token = authority.token(over or note, time=time)
    return encode_anchors((Anchor(kind=AnchorKind.RFC3161, checkpoint=note, proof=(), token=token),))


def policy(world: World, authority: Authority, **changes: Any) -> Policy:
    return replace(world.machine.policy, tsa_roots=(authority.root.digest,), **changes)


def verified(world: World, rules: Policy, anchors: bytes | None, at: int, **options: Any) -> Verification:
    return verify_bundle(world.bundle(anchors=anchors), rules, at, **{"time_basis": TimeBasis.NOW, **options})


def refused(code: str, *arguments: Any, **options: Any) -> CountermarkError:
    with pytest.raises(CountermarkError) as caught:
        verified(*arguments, **options)
    assert caught.value.code == code
    return caught.value


def test_a_stamp_gives_the_time(world: World, authority: Authority) -> None:
    found = verified(world, policy(world, authority), stamped(world, authority), NOW + 20)
    assert found.as_json()["verdict"]["time"] == {"value": NOW + 10, "basis": "anchor"}
    assert str(found).endswith("time anchor")
    assert (found.checks[-1].step, found.checks[-1].status) == ("21", Status.PASS)
    assert "2027-01-15T08:00:10Z by test stamper" in found.checks[-1].detail


def test_endorsements_that_are_old_now_held_then(world: World, authority: Authority) -> None:
    lasting = policy(world, authority, max_validity_days=90, not_after=NOW + 80 * DAY)
    at = NOW + 70 * DAY
    refused("endorsements.expired", world, lasting, None, at)
    assert verified(world, lasting, stamped(world, authority), at).verdict.time_basis is TimeBasis.ANCHOR
    refused("endorsements.expired", world, lasting, stamped(world, authority, at - 1), at)


def test_an_expired_policy_accepts_nothing(world: World, authority: Authority) -> None:
    rules = policy(world, authority)
    refused("policy.expired", world, rules, stamped(world, authority), rules.not_after + 1)


def test_a_chosen_time_stays(world: World, authority: Authority) -> None:
    anchors = stamped(world, authority, NOW + 50)
    found = verified(world, policy(world, authority), anchors, NOW, time_basis=TimeBasis.ASSUMED)
    assert (found.verdict.time, found.verdict.time_basis) == (NOW, TimeBasis.ASSUMED)
    assert found.checks[-1].status is Status.PASS


def test_without_a_pinned_root_the_stamp_is_passed_over(world: World, authority: Authority) -> None:
    found = verified(world, world.machine.policy, stamped(world, authority), NOW)
    assert (found.verdict.time, found.verdict.time_basis) == (NOW, TimeBasis.NOW)
    assert (found.checks[-1].step, found.checks[-1].status) == ("21", Status.SKIP)


def test_without_anchors_there_is_no_step(world: World, authority: Authority) -> None:
    found = verified(world, policy(world, authority), None, NOW)
    assert (found.checks[-1].step, found.verdict.time_basis) == ("20", TimeBasis.NOW)


def test_a_stamp_from_the_future(world: World, authority: Authority) -> None:
    rules = policy(world, authority)
    verified(world, rules, stamped(world, authority, NOW + MAX_CLOCK_SKEW_S), NOW)
    refused("anchor.future", world, rules, stamped(world, authority, NOW + MAX_CLOCK_SKEW_S + 1), NOW)


@pytest.mark.parametrize("basis", [TimeBasis.NOW, TimeBasis.ASSUMED])
def test_a_stamp_that_does_not_hold_ends_it(world: World, authority: Authority, basis: TimeBasis) -> None:
    anchors = stamped(world, authority, over=b"another message")
    err = refused("anchor.imprint", world, policy(world, authority), anchors, NOW, time_basis=basis)
    assert [(check.step, check.status) for check in err.checks] == [("21", Status.FAIL)]
    assert err.exit_code == 21


def test_a_receipt_with_another_checkpoint_fails_whatever_the_stamp_says(world: World, authority: Authority) -> None:
    """The stamp is over the checkpoint that stands in the receipt; whose it is, the signatures say."""
    receipt = world.bundle().receipt
    note = parse_receipt(receipt).payload.checkpoint
    letter = b"A" if note[-20:-19] != b"A" else b"B"
    forged = receipt.replace(note, note[:-20] + letter + note[-19:])
    checkpoint = parse_receipt(forged).payload.checkpoint
    token = authority.token(checkpoint)
    anchors = encode_anchors((Anchor(kind=AnchorKind.RFC3161, checkpoint=checkpoint, proof=(), token=token),))
    with pytest.raises(CountermarkError) as caught:
        verify_bundle(
            world.bundle(anchors=anchors, receipt=forged), policy(world, authority), NOW, time_basis=TimeBasis.NOW
        )
    assert caught.value.code == "receipt.es256"
