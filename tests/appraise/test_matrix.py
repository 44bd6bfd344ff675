"""The matrix of what must be refused, whole: where each attack has its row, or why it cannot have one yet.

Rows of the session's appraisal are in `test_refusals`; attacks on other parts have tests of their own, named here with
their code. The fields of a policy are here too: each decides alone between acceptance and refusal of one machine.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from test_refusals import CURRENT, OTHER, OTHER_48, ROWS

from countermark.errors import CountermarkError
from countermark.formats.report_data import GpuFreshness, gpu_nonce
from countermark.policy import DAY_S, GpuFreshnessRule, GpuRevocationRule, Policy, Waiver
from countermark_appliance.platform.keyring import Keyring
from sim_evidence import NOW, Scene, machine, policy_for, with_collateral

TESTS = Path(__file__).parents[1]

# Attack -> rows of `test_refusals` by name, or (file, test, code) of another test.
MATRIX: dict[str, tuple[str | tuple[str, str, str], ...]] = {
    "debug bit": ("debug", ("evidence/test_vectors.py", "test_tdx_quotes", "tdx.debug")),
    "SEPT_VE_DISABLE off": ("SEPT_VE_DISABLE off",),
    "reserved, migratable, PKS, KL, PERFMON bits": (
        "reserved bit 2",
        "reserved bit 40",
        "migratable",
        "PKS",
        "KL",
        "PERFMON",
    ),
    "bogus XFAM": ("XFAM without SSE", "XFAM with an unknown feature"),
    "MRSEAM not allowed": ("MRSEAM not allowed",),
    "OutOfDate, Revoked, unknown level": (
        "platform out of date",
        "platform revoked",
        "older than every TCB level",
        "TCB status nobody knows",
    ),
    "expired or future endorsements": ("endorsements expired", "endorsements from the future"),
    "rolled-back tcbEvaluationDataNumber": (
        "endorsements rolled back",
        "TCB info alone rolled back",
        "QE identity alone rolled back",
        "evaluation number absent",
    ),
    "other FMSPC": ("other FMSPC",),
    "revoked PCK, platform CA, TCB signer": (
        "PCK certificate revoked",
        "platform CA revoked",
        "TCB signer revoked",
    ),
    "TCB info signed by the wrong CA": (
        "TCB info signed by the PCK CA's leaf",
        "TCB info signed by the PCK CA itself",
        "TCB signer of another vendor",
    ),
    "swapped, empty or absent CRLs": (
        "CRLs swapped",
        "root CRL empty",
        "root CRL absent",
        "PCK CRL empty",
        "PCK CRL absent",
        "PCK CRL of the root",
    ),
    "simulated evidence against the production root": ("simulated evidence under a production policy",),
    "any flipped byte of header, body, signature, QE report": (
        "header byte flipped",
        "first body byte flipped",
        "last body byte flipped",
        "signature flipped",
        "QE report flipped",
        "QE report signature flipped",
    ),
    "trailing bytes": ("quote with trailing bytes", "trailing bytes after evidence"),
    "event log reordered, truncated, duplicated, with an extra event": (
        "firmware log reordered",
        "firmware log truncated",
        "firmware event duplicated",
        "firmware log reaching into RTMR3",
        "RTMR3 log reordered",
        "RTMR3 log truncated",
        "RTMR3 event duplicated",
        "RTMR3 log with an extra event",
    ),
    "RTMR3 claim present but not extended": ("values logged that were never extended",),
    "RTMR3 extended after system-ready": (
        "extended after system-ready, and logged",
        "extended after system-ready, log hidden",
    ),
    "RTMR3 not starting from zero": ("RTMR3 not starting from zero",),
    "changed command line or initrd with the same MRTD": ("changed command line or initrd, same MRTD",),
    "altered dm-verity root": (
        "other weights",
        "changed command line or initrd, same MRTD",  # where the root file system's stands
    ),
    "weights digest in claims differs from the measured one": ("weights claimed that were not measured",),
    "development image": (("policy/test_pin.py", "test_a_profile_takes_only_its_kinds_of_image", "policy.image"),),
    "certificate key differs from report_data": ("certificate key differs", "TLS key not the claimed one"),
    "replayed nonce": ("replayed nonce",),
    "purpose confusion": ("passport offered as a session", "replay evidence offered as a session"),
    "relayed evidence (leaked TLS key, other connection: exporter differs)": (
        "evidence relayed from another connection",
        ("net/test_hostile.py", "test_relayed_evidence_is_refused_even_with_the_leaked_tls_key", "claims.exporter"),
    ),
    "second connection without its own Attest": (
        ("net/test_rules.py", "test_an_attest_on_one_connection_does_not_serve_another", "channel.not_attested"),
    ),
    "genuine TEE not on the allow-list": ("machine not on the allow-list", "GPU not on the allow-list"),
    "GPU evidence missing from report_data": ("GPU evidence not the claimed one", "GPU evidence missing"),
    "GPU swapped for another genuine one": ("GPU swapped for another genuine one",),
    "GPU nonce of another VM": ("GPU nonce of another machine",),
    "wrong GPU mode, devtools": (
        "confidential computing off",
        "protected PCIe where single-GPU mode is wanted",
        "GPU in another mode than the driver said",
        "GPU developer tools on",
    ),
    "RIM mismatch": (("gpu/test_step8.py", "test_refused", "gpu.measurement"),),
    "RIM of an expired signer": (
        ("gpu/test_rims.py", "test_genuine_signers_are_judged_at_the_time_given", "gpu.rim_expired"),
    ),
    "RIM with a bad signature": (("gpu/test_rims.py", "test_what_does_not_verify_is_refused", "gpu.rim_signature"),),
    "empty FWID, trailing report byte": ("GPU firmware identifier empty", "GPU report with a trailing byte"),
    "manifest older than the highest seen": (
        ("policy/test_pin.py", "test_versions_only_grow", "manifest.rolled_back"),
    ),
    "manifest revoked": (("policy/test_pin.py", "test_a_newer_manifest_revokes_an_older_image", "manifest.revoked"),),
    "manifest signed by a stranger": (
        ("policy/test_pin.py", "test_a_strangers_manifest_is_refused", "manifest.signer"),
    ),
    "receipt from another session or boot": (
        ("receipt/test_receipt_tampering.py", "test_a_strangers_keys", "receipt.kid"),
        ("receipt/test_receipt_tampering.py", "test_the_signer_may_not_lie", "receipt.intent"),
        ("receipt/test_accepted.py", "", "receipt.session"),
    ),
    "one of the two receipt signatures stripped, a third added, order changed": (
        ("receipt/test_cose.py", "test_other_forms_are_refused", "receipt.signers"),
    ),
    "two logs from one boot snapshot when a witness is required": (
        ("net/test_witnessed.py", "test_two_starts_from_one_copy_of_the_disk", "log.unwitnessed"),
        ("records/test_operator_log.py", "test_two_starts_from_one_copy_of_the_disk_cannot_both_enter", "log.fork"),
    ),
    "signature context confusion": (
        ("receipt/test_receipt_tampering.py", "test_a_signature_over_another_context", "receipt.ml_dsa_65"),
    ),
}

OTHER_ISSUES = {
    "configuration from outside the measured set: fw_cfg, ACPI, SMBIOS, ESP credentials, add-ons, LoadOptions": (
        "the image's init decides what it reads, and there is no image yet; ACPI tables are measured into RTMR0"
    ),
    "extension absent": (
        "no verdict is made of a certificate's extension, absent or present: a session needs Attest on its connection"
    ),
}


def test_every_attack_has_its_row_and_code() -> None:
    rows = {row[0] for row in ROWS}
    assert len(MATRIX) + len(OTHER_ISSUES) >= 43
    for attack, places in MATRIX.items():
        assert places, attack
        for place in places:
            if isinstance(place, str):
                assert place in rows, (attack, place)
                continue
            file, test, code = place
            text = (TESTS / file).read_text()
            assert re.search(rf"^def {test}", text, re.M), (attack, place)
            assert f'"{code}"' in text, (attack, place)


def test_an_old_certificate_is_refused() -> None:
    """Of an earlier boot of the same machine: its key is not the one in report_data."""
    refused(lambda: Scene().appraise(peer_spki=Keyring().tls_spki()), "claims.tls_spki")


def refused(run: Callable[[], object], code: str) -> None:
    with pytest.raises(CountermarkError) as err:
        run()
    assert err.value.code == code


@dataclass(frozen=True)
class Decides:
    """`changed` refuses with `code` what `base` accepts of the same scene."""

    code: str
    changed: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    scene: Callable[[], Scene] = Scene


def says(**values: Any) -> Callable[[], Scene]:
    return lambda: Scene(state=with_collateral(machine(), **values))


def at_boot() -> Scene:
    """A machine whose GPU reports were made once, at boot."""
    keys = Keyring()
    return Scene(
        keys=keys,
        claims=lambda claims: replace(claims, gpu_freshness=GpuFreshness.BOOT),
        gpus=lambda platform, _: platform.gpu_evidence(gpu_nonce(keys.boot_id, keys.tls_spki())),
    )


def no_revocation() -> Scene:
    state = machine()
    return Scene(state=replace(state, endorsements=replace(state.endorsements, gpu_crls=(), gpu_ocsp=())))


def seen() -> dict[str, Any]:
    verdict = Scene().appraise()
    return {"any_hardware": False, "ppids": (verdict.tdx.ppid,), "gpu_chips": tuple(gpu.chip for gpu in verdict.gpu)}


FIELDS: dict[str, Callable[[], Decides]] = {
    "not_after": lambda: Decides("policy.expired", {"created": NOW - DAY_S, "not_after": NOW - 1}),
    "tdx_root": lambda: Decides("quote.root", {"tdx_root": OTHER}),
    "gpu_root": lambda: Decides("gpu.root", {"gpu_root": OTHER}),
    "rim_root": lambda: Decides("gpu.rim_root", {"rim_root": OTHER}),
    "images": lambda: Decides("measurement.no_reference", {"images": ()}),
    "endorsement_max_age_days": lambda: Decides(
        "endorsements.too_old", {"endorsement_max_age_days": 1}, {}, says(issued=NOW - 2 * DAY_S)
    ),
    "min_tcb_evaluation_data_number": lambda: Decides(
        "endorsements.rolled_back", {"min_tcb_evaluation_data_number": 1 << 30}
    ),
    "mrseam": lambda: Decides("tdx.mrseam", {"mrseam": (OTHER_48,)}),
    "accepted_statuses": lambda: Decides(
        "tcb.status",
        {"accepted_statuses": ()},
        {"accepted_statuses": (Waiver(name="OutOfDate", until=NOW),)},
        says(status="OutOfDate"),
    ),
    "accepted_advisories": lambda: Decides(
        "tcb.advisory",
        {"accepted_advisories": ()},
        {"accepted_advisories": (Waiver(name="INTEL-SA-01036", until=NOW),)},
        says(advisories=("INTEL-SA-01036",)),
    ),
    "any_hardware": lambda: Decides("hardware.ppid", {"any_hardware": False}),
    "ppids": lambda: Decides("hardware.ppid", {"ppids": (bytes(16),)}, seen()),
    "gpu_chips": lambda: Decides("hardware.gpu", {"gpu_chips": (OTHER,)}, seen()),
    "gpu_count": lambda: Decides("gpu.count", {"gpu_count": 2}),
    "gpu_mode": lambda: Decides("gpu.mode", {"gpu_mode": "protected-pcie"}),
    "gpu_freshness": lambda: Decides(
        "gpu.freshness",
        {"gpu_freshness": GpuFreshnessRule.SESSION},
        {"gpu_freshness": GpuFreshnessRule.BOOT},
        at_boot,
    ),
    "gpu_revocation": lambda: Decides(
        "gpu.revocation_missing",
        {"gpu_revocation": GpuRevocationRule.REQUIRED},
        {"gpu_revocation": GpuRevocationRule.OPTIONAL},
        no_revocation,
    ),
    "weights_roots": lambda: Decides("weights.root", {"weights_roots": (OTHER,)}),
    "numerics": lambda: Decides("numerics.profile", {"numerics": ("fast-v9",)}, {"numerics": (CURRENT,)}),
    "any_config": lambda: Decides("config.digest", {"any_config": False}),
    "configs": lambda: Decides(
        "config.digest", {"configs": (OTHER,)}, {"any_config": False, "configs": (Scene().appraise().boot.config,)}
    ),
}
JUSTIFIED = {  # they bound other fields, or what may be pinned, or decide elsewhere
    "profile": "policy.root and policy.image, in tests/policy",
    "created": "with max_validity_days it bounds not_after: policy.validity, in tests/policy",
    "max_validity_days": "as created",
    "manifest_signers": "manifest.signer, in tests/policy/test_pin.py and step 19 in tests/bundle",
    "manifest_version": "manifest.rolled_back, in tests/policy/test_pin.py",
    "manifest_log": "manifest.unlogged, in tests/measurements/publish: what may be pinned",
    "revoked_images": "policy.image and manifest.revoked, in tests/policy",
    "operator_log": "no part of an appraisal: what is asked of a log is checked after it, by `countermark.witness`",
    "witnesses": "as operator_log",
    "witnesses_required": "as operator_log",
    "witnessed": "as operator_log",
    "tsa_roots": "no part of an appraisal: step 21 of a bundle, in tests/anchors",
    "tsa_policies": "as tsa_roots",
}


def test_every_field_of_a_policy_decides_something() -> None:
    assert FIELDS.keys() | JUSTIFIED.keys() == {item.name for item in dataclasses.fields(Policy)}
    assert not FIELDS.keys() & JUSTIFIED.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_alone_decides(name: str) -> None:
    case = FIELDS[name]()
    assert name in case.changed
    scene = case.scene()
    accepting = policy_for(scene.state, **case.base)
    scene.appraise(accepting)
    refused(lambda: scene.appraise(replace(accepting, **case.changed)), case.code)
