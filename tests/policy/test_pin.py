"""Pinning measurement manifests: signatures, versions, validity, revocation."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from countermark.errors import CountermarkError
from countermark.formats import strict_json
from countermark.formats.manifest import ImageKind, encode_manifest, parse_envelope, parse_manifest
from countermark.policy import (
    INTEL_SGX_ROOT,
    KNOWN_MRSEAM,
    NVIDIA_DEVICE_ROOT,
    SIMULATED_MRSEAM,
    Policy,
    Profile,
    new_policy,
    pin,
)
from countermark_appliance.platform.sim import measure
from countermark_appliance.platform.sim import state as sim_state
from countermark_appliance.platform.sim.machine import TdLaunch
from sim_evidence import NOW, Scene, code_folder, machine, policy_for, sha256

DAY_S = 86_400
D48 = b"\x22" * 48


def empty(profile: Profile = Profile.DEVELOPMENT) -> Policy:
    return new_policy(profile, now=NOW)


def published(**changes: Any) -> bytes:
    """The machine's manifest with other content, properly signed."""
    state = machine()
    manifest = parse_manifest(parse_envelope(state.manifest).payload)
    return measure.sign_manifest(state.signers, encode_manifest(replace(manifest, **changes)))


def pinned(envelope: bytes, policy: Policy | None = None, *, now: int = NOW) -> Policy:
    return pin(policy or empty(), envelope, now=now, signers=machine().signer_digests)


def refusal(envelope: bytes, policy: Policy | None = None, *, now: int = NOW) -> str:
    with pytest.raises(CountermarkError) as err:
        pinned(envelope, policy, now=now)
    return err.value.code


def test_a_good_manifest_brings_its_reference_values() -> None:
    policy = pinned(published())
    image = policy.images[0]
    assert policy.manifest_signers == machine().signer_digests
    assert policy.manifest_version == image.version == 1
    assert pin(empty(), published(), now=NOW, signers=machine().signer_digests, weights_roots=[b"w" * 32]).weights_roots


def test_pinning_widens_nothing_but_images_weights_and_revocations() -> None:
    before = empty()
    after = pinned(published(mrseam=(D48,)), before)
    assert after.images[0].mrseam == (D48,)
    changed = {field.name for field in fields(Policy) if getattr(after, field.name) != getattr(before, field.name)}
    assert changed == {"images", "manifest_signers", "manifest_version"}


def test_a_module_that_only_the_publisher_names_is_refused() -> None:
    state = replace(machine(), manifest=published(mrseam=(D48,)))
    policy = replace(policy_for(machine()), images=pinned(state.manifest).images)
    with pytest.raises(CountermarkError) as err:
        Scene(launch=TdLaunch(mrseam=D48)).appraise(policy)
    assert err.value.code == "tdx.mrseam"
    assert Scene(launch=TdLaunch(mrseam=D48)).appraise(replace(policy, mrseam=(D48,))).image_version == 1


def test_signers_must_be_named() -> None:
    with pytest.raises(CountermarkError) as err:
        pin(empty(), published(), now=NOW)
    assert err.value.code == "manifest.signer"
    first, second = machine().signer_digests
    for signers in ((first,), (second,), (bytes(32), second)):
        with pytest.raises(CountermarkError) as err:
            pin(empty(), published(), now=NOW, signers=signers)
        assert err.value.code == "manifest.signer"


def test_a_strangers_manifest_is_refused() -> None:
    stranger = sim_state.make(now=NOW, roots=[code_folder()])
    assert refusal(stranger.manifest) == "manifest.signer"
    with pytest.raises(CountermarkError) as err:
        pin(pinned(published()), stranger.manifest, now=NOW, signers=stranger.signer_digests)
    assert err.value.code == "manifest.signer"


@pytest.mark.parametrize("which", [0, 1])
def test_both_signatures_must_verify(which: int) -> None:
    other = strict_json.load(published(version=2), "test", max_bytes=1 << 20)
    mixed = strict_json.load(published(), "test", max_bytes=1 << 20)
    mixed["signatures"][which] = other["signatures"][which]
    assert refusal(strict_json.dump(mixed)) == "manifest.signature"


def test_a_changed_payload_is_refused() -> None:
    mixed = strict_json.load(published(), "test", max_bytes=1 << 20)
    mixed["payload"] = strict_json.load(published(version=2), "test", max_bytes=1 << 20)["payload"]
    assert refusal(strict_json.dump(mixed)) == "manifest.signature"


def test_versions_only_grow() -> None:
    policy = pinned(published(version=3))
    assert refusal(published(version=2), policy) == "manifest.rolled_back"
    assert refusal(published(version=3, not_after=NOW + DAY_S), policy) == "manifest.equivocation"
    assert pinned(published(version=3), policy) == policy
    newer = pinned(published(version=4), policy)
    assert (newer.manifest_version, [image.version for image in newer.images]) == (4, [4])
    assert refusal(published(version=3), newer) == "manifest.rolled_back"


def test_an_image_can_be_given_more_time() -> None:
    """Its newer manifest takes the older one's place, or the image would end with that."""
    later = NOW + 2 * DAY_S
    short = pin(policy_for(machine()), published(version=2, not_after=NOW + DAY_S), now=NOW)
    with pytest.raises(CountermarkError) as err:
        Scene().appraise(short, now=later)
    assert err.value.code == "manifest.expired"
    renewed = pin(short, published(version=3, not_after=NOW + 10 * DAY_S), now=NOW)
    assert [image.version for image in renewed.images] == [3]
    assert Scene().appraise(renewed, now=later).image_version == 3


def test_validity_is_checked_at_the_given_time() -> None:
    assert refusal(published(not_before=NOW + 1)) == "manifest.not_yet_valid"
    assert refusal(published(not_after=NOW - 1)) == "manifest.expired"


def test_a_newer_manifest_revokes_an_older_image() -> None:
    policy = policy_for(machine())
    bad = policy.images[0].image_id
    newer = measure.publish(
        machine().signers, now=NOW, version=2, roots=[code_folder("fixed code")], revoked_images=[bad]
    )
    updated = pin(policy, newer, now=NOW)
    assert [image.version for image in updated.images] == [2]
    assert Scene(code="fixed code").appraise(updated).image_version == 2
    with pytest.raises(CountermarkError) as err:
        Scene().appraise(updated)
    assert err.value.code == "measurement.rtmr2"
    again = measure.publish(machine().signers, now=NOW, version=3, roots=[code_folder()])
    with pytest.raises(CountermarkError) as err:
        pin(updated, again, now=NOW)
    assert err.value.code == "manifest.revoked"


def test_two_images_are_accepted_side_by_side() -> None:
    newer = measure.publish(machine().signers, now=NOW, version=2, roots=[code_folder("new code")])
    policy = pin(policy_for(machine()), newer, now=NOW)
    assert Scene().appraise(policy).image_version == 1
    assert Scene(code="new code").appraise(policy).image_version == 2


@pytest.mark.parametrize(
    ("profile", "kind", "accepted"),
    [
        (Profile.PRODUCTION, ImageKind.SIMULATED, False),
        (Profile.TEST, ImageKind.SIMULATED, True),
        (Profile.TEST, ImageKind.DEVELOPMENT, False),
        (Profile.DEVELOPMENT, ImageKind.DEVELOPMENT, True),
    ],
)
def test_a_profile_takes_only_its_kinds_of_image(profile: Profile, kind: ImageKind, accepted: bool) -> None:
    policy = empty(profile)
    assert (policy.tdx_root, policy.gpu_root) == (INTEL_SGX_ROOT, NVIDIA_DEVICE_ROOT)
    envelope = published(kind=kind)
    if accepted:
        assert pinned(envelope, policy).images[0].kind is kind
    else:
        assert refusal(envelope, policy) == "policy.image"


def test_the_simulated_roots_and_module_of_a_policy_are_those_of_the_machine() -> None:
    policy = policy_for(machine())
    assert policy.tdx_root == sha256(machine().root_der)
    assert policy.mrseam == (SIMULATED_MRSEAM,) == (measure.MRSEAM,)
    assert empty().mrseam == KNOWN_MRSEAM
