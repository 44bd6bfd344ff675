"""The policy file: strict, complete, and back to the same value."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import PolicyError
from countermark.logkeys import new_keys
from countermark.numerics import CURRENT
from countermark.policy import (
    DAY_S,
    INTEL_SGX_ROOT,
    NVIDIA_DEVICE_ROOT,
    NVIDIA_RIM_ROOT,
    GpuFreshnessRule,
    GpuRevocationRule,
    Policy,
    Profile,
    Waiver,
    WitnessRule,
    encode_policy,
    new_policy,
    parse_policy,
)
from sim_evidence import NOW, machine, policy_for

OPERATOR, WITNESS = new_keys("log.example/starts"), new_keys("w.example/1")
UNDER_ANOTHER_NAME = tuple(replace(key, name="w.example/2") for key in WITNESS.as_witness)
D32, D48 = b"\x11" * 32, b"\x22" * 48


def code_of(text: str | bytes) -> tuple[str, str]:
    with pytest.raises(PolicyError) as err:
        parse_policy(text.encode() if isinstance(text, str) else text)
    return err.value.code, str(err.value)


def everything() -> Policy:
    """A policy in which no field has its default."""
    return replace(
        policy_for(machine()),
        rim_root=D32,
        max_validity_days=90,
        not_after=NOW + 60 * DAY_S,
        manifest_version=7,
        manifest_log=OPERATOR.as_log,
        revoked_images=(D32,),
        endorsement_max_age_days=3,
        min_tcb_evaluation_data_number=18,
        mrseam=(D48,),
        accepted_statuses=(Waiver(name="OutOfDate", until=NOW), Waiver(name="SWHardeningNeeded", until=NOW + 1)),
        accepted_advisories=(Waiver(name="INTEL-SA-00615", until=NOW),),
        any_hardware=False,
        ppids=(b"\x33" * 16,),
        gpu_chips=(D32,),
        gpu_count=8,
        gpu_mode="protected-pcie",
        gpu_freshness=GpuFreshnessRule.BOOT,
        gpu_revocation=GpuRevocationRule.OPTIONAL,
        weights_roots=(D32, b"\x44" * 32),
        numerics=("bf16-hopper-v1",),
        any_config=False,
        configs=(D32,),
        operator_log=OPERATOR.as_log,
        witnesses=WITNESS.as_witness,
        witnesses_required=1,
        witnessed=WitnessRule.EPOCH_AND_RECEIPT,
        tsa_roots=(D32,),
        tsa_policies=("1.2.3.4.1",),
    )


def test_every_field_survives_the_file() -> None:
    policy = everything()
    for field in fields(Policy):
        if field.name in ("any_hardware", "any_config"):  # contradict the lists; new policies have them
            continue
        assert getattr(policy, field.name) != field.default, f"{field.name} has its default: the test is blind to it"
    assert parse_policy(encode_policy(policy).encode()) == policy


@pytest.mark.parametrize("profile", list(Profile))
def test_new_policies_are_strict_and_survive_the_file(profile: Profile) -> None:
    policy = new_policy(profile, now=NOW)
    assert parse_policy(encode_policy(policy).encode()) == policy
    roots = (policy.tdx_root, policy.gpu_root, policy.rim_root)
    assert roots == (INTEL_SGX_ROOT, NVIDIA_DEVICE_ROOT, NVIDIA_RIM_ROOT)
    assert policy.gpu_revocation is GpuRevocationRule.REQUIRED
    assert not policy.simulated
    assert not policy.images
    assert not policy.weights_roots
    assert not policy.accepted_statuses
    assert policy.not_after == NOW + 30 * DAY_S


def test_a_manifest_with_quotes_in_its_text_survives_the_file() -> None:
    policy = policy_for(machine())
    image = policy.images[0]
    events = (replace(image.events[0], note="it's \"quoted\" ''' \\ text"), *image.events[1:])
    policy = replace(policy, images=(replace(image, events=events),))
    assert parse_policy(encode_policy(policy).encode()) == policy


def test_a_simulated_root_is_said_in_the_text() -> None:
    assert "SIMULATED" in encode_policy(policy_for(machine()))
    assert "SIMULATED" not in encode_policy(new_policy(Profile.PRODUCTION, now=NOW))


def tables(text: str) -> list[str]:
    return [name for name, value in tomllib.loads(text).items() if isinstance(value, dict)]


def test_an_unknown_key_is_refused_by_its_dotted_name_in_every_table() -> None:
    text = encode_policy(new_policy(Profile.PRODUCTION, now=NOW))
    names = tables(text)
    assert len(names) == 10
    for name in names:
        code, message = code_of(text.replace(f"[{name}]", f"[{name}]\nskip_checks = true\n", 1))
        assert code == "policy.unknown_key"
        assert f"{name}.skip_checks" in message
    code, message = code_of("allow_debug = true\n" + text)
    assert code == "policy.unknown_key"
    assert "allow_debug" in message
    pinned = encode_policy(policy_for(machine()))
    assert "image.extra" in code_of(pinned + "extra = 1\n")[1]


def test_every_field_has_a_comment() -> None:
    """On its line, or where its list or table ends."""
    lines = encode_policy(everything()).splitlines()
    for line in lines:
        name, equals, value = line.partition(" = ")
        if equals and not name.startswith(("#", "statement", '"')) and value != "[":
            assert "  # " in line or name.isupper() or name in ("SWHardeningNeeded", "OutOfDate", "INTEL-SA-00615"), (
                line
            )
        if line.startswith("]"):
            assert line.startswith("]  # "), line


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"witnesses_required": 2}, "policy.contradiction", "0 to 1"),
        ({"witnesses_required": -1}, "policy.contradiction", "-1"),
        ({"operator_log": None}, "policy.contradiction", "log.operator"),
        ({"operator_log": OPERATOR.as_log[:1]}, "policy.value", "log.operator"),
        ({"operator_log": WITNESS.as_witness}, "policy.value", "log.operator"),
        ({"manifest_log": OPERATOR.as_log[:1]}, "policy.value", "manifest.log"),
        ({"manifest_log": WITNESS.as_witness}, "policy.value", "manifest.log"),
        ({"witnesses": OPERATOR.as_log}, "policy.value", "0x01"),
        ({"witnesses": WITNESS.as_witness * 2}, "policy.value", "twice"),
        ({"witnesses": (*WITNESS.as_witness, *UNDER_ANOTHER_NAME)}, "policy.value", "w.example/2"),
        ({"witnesses": OPERATOR.as_witness}, "policy.value", "log.example/starts"),
    ],
)
def test_witnesses_that_cannot_be_asked_for(changes: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(PolicyError) as err:
        replace(everything(), **changes)
    assert err.value.code == code
    assert said in str(err.value)


def test_without_a_log_table_nobody_is_asked() -> None:
    text = encode_policy(new_policy(Profile.PRODUCTION, now=NOW))
    without = text[: text.index("[log]")]
    assert parse_policy(without.encode()) == parse_policy(text.encode())
    for wrong in (
        'witnesses = ["nonsense"]',
        "witnesses_required = true",
        'witnessed = "receipt"',
        'operator = ["a+b+c"]',
    ):
        assert code_of(f"{without}[log]\n{wrong}\n")[0] == "policy.value"


@pytest.mark.parametrize("name", ["", "1", "3.1", "1.02", "1.2.", "1.2 ", "policy", "1." + "9" * 40])
def test_policies_of_time_stamping_authorities(name: str) -> None:
    with pytest.raises(PolicyError) as err:
        replace(everything(), tsa_policies=("1.2.840.113549.1.9.16.1.4", name))
    assert err.value.code == "policy.value"
    assert "anchors.tsa_policies" in str(err.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("count = 1", 'count = "two"', ("gpu.count", "a whole number", "'two'")),
        ("count = 1", "count = 99", ("gpu.count", "1 to 16", "99")),
        ("max_age_days = 30", "max_age_days = true", ("endorsements.max_age_days", "a whole number", "true")),
        ("count = 1", "", ("gpu.count", "a whole number", "nothing")),
        ("mrseam = [", "mrsem = [", ("tdx.mrsem", "unknown key", "tdx.mrseam")),
        ("[gpu]", "[gpus]", ("gpus", "unknown key", "gpu,")),
        ('profile = "production"', 'profile = "prod"', ("profile", "production or test or development", "'prod'")),
        ("weights_roots = []", 'weights_roots = ["ab"]', ("model.weights_roots", "64 lower-case hex digits", "'ab'")),
        ("weights_roots = []", "weights_roots = [7]", ("model.weights_roots", "text in quotes", "7")),
        ("ppids = []", 'ppids = "all"', ("hardware.ppids", "a list", "'all'")),
        ("max_validity_days = 30", "max_validity_days = 7", ("not_after", "max_validity_days = 7", "2027-02-14T")),
        ('mode = "cc-on"', 'mode = "cc"', ("gpu.mode", "protected-pcie", "cc")),
        ('rim = "nvidia"', f'rim = "simulated:{"0" * 64}"', ("trust.rim", "production", "simulated")),
        ('tdx = "intel"', 'tdx = "amd"', ("trust.tdx", "'intel'", "'amd'")),
        ("signers = []", f'signers = ["{"0" * 64}"]', ("manifest.signers", "two", "1")),
        ("[tdx.accept_status]", "[tdx.accept_status]\nRevoked = 2027-01-15T00:00:00Z", ("accept_status", "'Revoked'")),
        ("[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = true", ("tdx.accept_status.OutOfDate", "a time")),
    ],
)
def test_a_message_names_the_key_what_it_wants_and_what_it_got(old: str, new: str, said: tuple[str, ...]) -> None:
    text = encode_policy(new_policy(Profile.PRODUCTION, now=NOW))
    assert old in text
    message = code_of(text.replace(old, new, 1))[1]
    assert all(part in message for part in said), message


def test_an_image_that_contradicts_the_file_is_refused_by_the_key_it_contradicts() -> None:
    pinned = policy_for(machine())
    text = encode_policy(pinned)
    lowered = text.replace("highest_version = 1 ", "highest_version = 0 ", 1)
    assert lowered != text
    code, message = code_of(lowered)
    assert code == "policy.image"
    assert "manifest.highest_version = 0, got 1" in message
    revoked = text.replace("revoked_images = []", f'revoked_images = ["{pinned.images[0].image_id.hex()}"]', 1)
    assert revoked != text
    code, message = code_of(revoked)
    assert code == "policy.image"
    assert "manifest.revoked_images" in message


def test_every_scalar_is_required() -> None:
    lines = encode_policy(new_policy(Profile.PRODUCTION, now=NOW)).splitlines()
    optional = {"any", "witnesses_required", "witnessed"}
    for index, line in enumerate(lines):
        key, equals, value = line.partition(" = ")
        if not equals or key.startswith(("#", "[")) or value.startswith("[") or key in optional or " " in key:
            continue
        code, message = code_of("\n".join(lines[:index] + lines[index + 1 :]))
        assert code == "policy.missing_key", line
        assert key in message


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        ("policy.version", "version = 1", "version = 2"),
        ("policy.value", 'profile = "production"', 'profile = "lenient"'),
        ("policy.value", "max_age_days = 30", "max_age_days = true"),
        ("policy.value", "max_age_days = 30", "max_age_days = 0"),
        ("policy.value", "max_age_days = 30", 'max_age_days = "30"'),
        ("policy.value", "count = 1", "count = 0"),
        ("policy.value", 'mode = "cc-on"', 'mode = "cc-off"'),
        ("policy.value", 'freshness = "session"', 'freshness = "never"'),
        ("policy.value", "weights_roots = []", 'weights_roots = ["00"]'),
        ("policy.value", "weights_roots = []", "weights_roots = [1]"),
        ("policy.value", "weights_roots = []", f'weights_roots = ["{"AA" * 32}"]'),
        ("policy.value", "[tdx.accept_status]", "[tdx.accept_status]\nRevoked = 2027-01-15T00:00:00Z"),
        ("policy.value", "[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = true"),
        ("policy.value", "[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = 2027-01-15T00:00:00"),
        ("policy.value", "[tdx.accept_advisory]", '[tdx.accept_advisory]\n"any *" = 2027-01-15T00:00:00Z'),
        ("policy.value", "[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = 9999-12-31T23:59:59-10:00"),
        ("policy.value", "[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = 0001-01-01T00:00:00+10:00"),
        ("policy.value", f'"{CURRENT}"', '"exact-\N{GRINNING FACE}"'),
        ("policy.validity", "max_validity_days = 30", "max_validity_days = 29"),
        ("policy.contradiction", "ppids = []", f'ppids = ["{"00" * 16}"]'),
        ("policy.contradiction", "digests = []", f'digests = ["{"00" * 32}"]'),
        ("policy.root", 'tdx = "intel"', f'tdx = "simulated:{"00" * 32}"'),
        ("policy.root", 'gpu = "nvidia"', f'gpu = "simulated:{"00" * 32}"'),
        ("policy.root", 'rim = "nvidia"', f'rim = "simulated:{"00" * 32}"'),
        ("policy.root", 'rim = "nvidia"', 'rim = "intel"'),
        ("policy.value", 'revocation = "required"', 'revocation = "optional"'),
        ("policy.root", 'tdx = "intel"', f'tdx = "{"00" * 32}"'),
        ("policy.root", 'tdx = "intel"', 'tdx = "nvidia"'),
        ("policy.toml", "version = 1", "version = 1\nversion = 1"),
        ("policy.toml", "version = 1", "version = "),
    ],
)
def test_bad_values_are_refused(code: str, old: str, new: str) -> None:
    text = encode_policy(new_policy(Profile.PRODUCTION, now=NOW))
    assert old in text
    assert code_of(text.replace(old, new, 1))[0] == code


def test_the_production_profile_takes_no_simulated_root_and_no_simulated_image() -> None:
    for vendor in ("tdx", "gpu", "rim"):
        root: Any = {f"simulated_{vendor}_root": D32}
        with pytest.raises(PolicyError) as err:
            new_policy(Profile.PRODUCTION, now=NOW, **root)
        assert err.value.code == "policy.root"
        assert new_policy(Profile.TEST, now=NOW, **root).simulated
    pinned = policy_for(machine())
    genuine: Any = {"tdx_root": INTEL_SGX_ROOT, "gpu_root": NVIDIA_DEVICE_ROOT, "rim_root": NVIDIA_RIM_ROOT}
    with pytest.raises(PolicyError) as err:
        replace(pinned, profile=Profile.PRODUCTION, **genuine)
    assert err.value.code == "policy.image"
    text = encode_policy(pinned).replace('profile = "development"', 'profile = "production"', 1)
    assert code_of(text)[0] == "policy.root"


def test_a_changed_statement_is_refused() -> None:
    text = encode_policy(policy_for(machine()))
    image = policy_for(machine()).images[0]
    digest = image.rtmr2.hex()
    at = text.rindex(digest)
    assert code_of(text[:at] + "00" * 48 + text[at + 96 :])[0] == "policy.manifest"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_policy_error(data: bytes) -> None:
    assert code_of(data)[0].startswith("policy.")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_changed_character_gives_a_policy_or_a_policy_error(data: st.DataObject) -> None:
    text = encode_policy(new_policy(Profile.DEVELOPMENT, now=NOW))
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.characters(exclude_categories=["Cs"]))
    try:
        parse_policy((text[:at] + new + text[at + 1 :]).encode())
    except PolicyError as err:
        assert err.code.startswith("policy.")


def test_size_is_capped() -> None:
    assert code_of(b"#" * (9 << 20))[0] == "policy.too_long"
