"""From boot to evidence: everything a verifier would recompute, recomputed."""

import pytest
from machine_helpers import NOW, booted, machine, verify

from countermark.errors import FormatError
from countermark.formats import eventlog
from countermark.formats.boot_events import EVENT_TYPE, parse_boot_log
from countermark.formats.evidence import PlatformName, gpu_digest, parse_evidence
from countermark.formats.quote import parse_quote
from countermark.formats.report_data import Purpose, gpu_nonce, keys_digest, parse_claims, report_data
from countermark.formats.spdm import parse_report
from countermark_appliance.platform.attester import Attester, LogHead, boot_values, extend_boot, extend_ready
from countermark_appliance.platform.keyring import Keyring

NONCE, EXPORTER = b"n" * 32, b"e" * 32
LOG = LogHead(origin="operator.example/boot", size=3, root=b"r" * 32)


@pytest.fixture(scope="module")
def started():
    platform, keys = booted(), Keyring()
    boot = boot_values(
        platform, keys, config=b"c" * 32, weights_root=b"w" * 32, profile="exact-v1", kernel_digest=b"d" * 32
    )
    extend_boot(platform, boot)
    extend_ready(platform, boot)
    return platform, keys, boot, Attester(platform, keys, boot)


def test_session_evidence_binds_everything(started):
    _, keys, boot, attester = started
    evidence = parse_evidence(attester.attest(purpose=Purpose.SESSION, nonce=NONCE, exporter=EXPORTER, log=LOG))
    assert evidence.platform is PlatformName.SIM
    verify(evidence.quote, evidence.endorsements.tdx, machine().root_der, now=NOW)
    body = parse_quote(evidence.quote).body
    assert body.report_data == report_data(evidence.claims)
    claims = parse_claims(evidence.claims)
    assert (claims.purpose, claims.nonce, claims.exporter) == (Purpose.SESSION, NONCE, EXPORTER)
    assert (claims.boot_id, claims.tls_spki) == (keys.boot_id, keys.tls_spki())
    assert claims.keys == keys_digest(evidence.keys) == boot.keys
    assert (claims.log_origin, claims.log_size, claims.log_root) == (LOG.origin, LOG.size, LOG.root)
    assert claims.gpu_digest == gpu_digest(evidence.gpu)
    assert {parse_report(gpu.report).nonce for gpu in evidence.gpu} == {gpu_nonce(NONCE, keys.tls_spki())}
    assert parse_boot_log(evidence.rtmr3_log) == boot
    assert (claims.image_id, claims.config, claims.weights_root) == (boot.image_id, boot.config, boot.weights_root)
    logs = (evidence.ccel, evidence.rtmr3_log)
    assert body.rtmrs == eventlog.replay(e for log in logs for e in eventlog.parse_event_log(log).events)


def test_passport_evidence_has_no_exporter_and_fits_the_certificate(started):
    _, keys, _, attester = started
    evidence = parse_evidence(attester.attest(purpose=Purpose.PASSPORT, nonce=NONCE, exporter=None, log=LOG))
    passport = attester.passport(evidence)
    assert parse_claims(passport.claims).exporter is None
    assert parse_quote(passport.quote).body.report_data == report_data(passport.claims)
    assert len(keys.tls_certificate(passport, now=NOW, valid_s=86_400, simulated=True)) < 16_384


def test_two_starts_share_no_key():
    first, second = Keyring(), Keyring()
    assert first.boot_id != second.boot_id
    assert not {item.key.public for item in first.role_keys()} & {item.key.public for item in second.role_keys()}


def test_ready_is_the_last_event():
    platform, keys = booted(), Keyring()
    boot = boot_values(platform, keys, config=bytes(32), weights_root=bytes(32), profile="p", kernel_digest=bytes(32))
    extend_boot(platform, boot)
    before = platform.rtmr3_log()
    extend_ready(platform, boot)
    assert platform.rtmr3_log().startswith(before)
    assert parse_boot_log(platform.rtmr3_log()) == boot
    with pytest.raises(FormatError) as refused:
        parse_boot_log(before)
    assert refused.value.code == "rtmr3.order"
    platform.extend_rtmr3(EVENT_TYPE, b"late")
    with pytest.raises(FormatError) as refused:
        parse_boot_log(platform.rtmr3_log())
    assert refused.value.code == "rtmr3.after_ready"
