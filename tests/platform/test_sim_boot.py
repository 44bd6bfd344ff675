"""What a simulated boot measures, against the manifest published before it."""

import hashlib
import shutil

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from machine_helpers import NOW, booted, machine

from countermark.errors import ConfigError
from countermark.formats.eventlog import EventLog, SpecId, parse_event_log, replay
from countermark.formats.manifest import ImageKind, pae, parse_envelope, parse_manifest
from countermark.formats.quote import parse_quote
from countermark_appliance.platform import sim
from countermark_appliance.platform.sim.measure import PACKAGES, code_roots
from countermark_appliance.platform.sim.state import make

REPORT_DATA = bytes(64)


def manifest(envelope: bytes):
    return parse_manifest(parse_envelope(envelope).payload)


@pytest.fixture
def code(tmp_path):
    """Three small packages in the place of ours."""
    for name in PACKAGES:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "a.py").write_text(f"# {name}\n")
        (tmp_path / name / "sub" / "b.c").write_text("int b;\n")
    return tuple(tmp_path / name for name in PACKAGES)


def matches(state, roots) -> bool:
    platform = sim.boot(state, roots=roots)
    body, wanted = parse_quote(platform.quote(REPORT_DATA)).body, manifest(state.manifest)
    shape = wanted.shapes[0]
    measured = (body.mrtd, *body.rtmrs[:3], platform.image_id, body.mrseam, body.td_attributes, body.xfam)
    expected = (shape.mrtd, shape.rtmr0, wanted.rtmr1, wanted.rtmr2, wanted.image_id, wanted.mrseam[0])
    return measured == (*expected, wanted.td_attributes, wanted.xfam)


def test_boot_matches_the_manifest_made_before_it(code):
    assert matches(make(now=NOW, roots=code), code)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a.py").write_text("# other\n"),
        lambda root: (root / "sub" / "b.c").unlink(),
        lambda root: (root / "sub" / "b.c").rename(root / "b.c"),
        lambda root: (root / "new.so").write_bytes(b""),
        lambda root: (root / "data.json").write_text("{}"),
    ],
)
@pytest.mark.parametrize("package", range(3))
def test_any_changed_file_is_another_image(code, change, package):
    state = make(now=NOW, roots=code)
    change(code[package])
    assert not matches(state, code)
    before, after = manifest(state.manifest), parse_quote(sim.boot(state, roots=code).quote(REPORT_DATA)).body
    assert (after.rtmr0, after.rtmr1) == (before.shapes[0].rtmr0, before.rtmr1)
    assert after.rtmr2 != before.rtmr2


def test_a_move_between_packages_is_another_image(code):
    before = sim.image_id(code)
    shutil.move(code[0] / "sub" / "b.c", code[1] / "c.c")
    assert sim.image_id(code) != before


def test_bytecode_caches_are_not_code(code):
    before = sim.image_id(code)
    (code[0] / "__pycache__").mkdir()
    (code[0] / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"cache")
    assert sim.image_id(code) == before


def test_measures_the_installed_packages():
    assert [root.name for root in code_roots()] == list(PACKAGES)
    assert (code_roots()[0] / "formats" / "cbor.py").is_file()
    assert booted().image_id == sim.image_id() == manifest(make(now=NOW).manifest).image_id


def test_ccel_replays_to_the_quote_and_says_simulated():
    platform = booted()
    log = parse_event_log(platform.ccel())
    assert log.padding > 0
    assert replay(log.events)[:3] == parse_quote(platform.quote(REPORT_DATA)).body.rtmrs[:3]
    assert all(event.data.startswith(b"SIMULATED ") for event in log.events)
    assert all(event.digest == hashlib.sha384(event.data).digest() for event in log.events)
    assert {event.register for event in log.events} == {1, 2, 3}


def test_rtmr3_starts_at_zero_and_follows_its_log():
    platform = booted()
    assert parse_quote(platform.quote(REPORT_DATA)).body.rtmr3 == bytes(48)
    assert parse_event_log(platform.rtmr3_log()) == EventLog(spec=SpecId(register=4), events=())
    for data in (b"one", b"two"):
        platform.extend_rtmr3(0x434D0001, data)
    events = parse_event_log(platform.rtmr3_log()).events
    assert [event.data for event in events] == [b"one", b"two"]
    assert parse_quote(platform.quote(REPORT_DATA)).body.rtmr3 == replay(events)[3]
    assert parse_quote(booted(rtmr3=b"x" * 48).quote(REPORT_DATA)).body.rtmr3 == b"x" * 48


def test_manifest_is_signed_by_both_signers():
    state = machine()
    envelope = parse_envelope(state.manifest)
    message = pae(envelope.payload)
    classic, post_quantum = envelope.signatures
    r, s = (int.from_bytes(part, "big") for part in (classic.signature[:32], classic.signature[32:]))
    state.signers.es256.public_key().verify(encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    state.signers.ml_dsa_65.public_key().verify(post_quantum.signature, message)
    assert tuple(bytes.fromhex(item.keyid) for item in envelope.signatures) == state.signer_digests
    wanted = manifest(state.manifest)
    assert (wanted.kind, wanted.platform, wanted.simulated) == (ImageKind.SIMULATED, "sim", True)
    assert wanted.not_before < NOW < wanted.not_after
    assert all("SIMULATED" in text for text in (wanted.subjects[0].name, *(event.note for event in wanted.events)))


def test_publish_again_with_a_higher_version(code):
    state = machine()
    first, second = (sim.publish(state.signers, now=NOW, version=v, roots=code) for v in (1, 2))
    assert (manifest(first).version, manifest(second).version) == (1, 2)
    assert manifest(first).image_id == manifest(second).image_id != manifest(state.manifest).image_id


def test_state_survives_the_disk(tmp_path):
    state = sim.create(tmp_path / "machine", now=NOW, gpus=2)
    loaded = sim.load(tmp_path / "machine")
    assert (loaded.manifest, loaded.endorsements) == (state.manifest, state.endorsements)
    assert (loaded.root_der, loaded.gpu_root_der, loaded.rim_root_der) == (
        (tmp_path / "machine" / "root.der").read_bytes(),
        (tmp_path / "machine" / "gpu-root.der").read_bytes(),
        (tmp_path / "machine" / "rim-root.der").read_bytes(),
    )
    assert loaded.signer_digests == state.signer_digests
    assert sim.boot(loaded).gpu_identities() == sim.boot(state).gpu_identities()
    assert "SIMULATED" in (tmp_path / "machine" / "README").read_text()
    for key in (tmp_path / "machine" / "keys").iterdir():
        assert key.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["machine"]
    with pytest.raises(ConfigError) as refused:
        sim.create(tmp_path / "machine", now=NOW)
    assert refused.value.code == "platform.exists"


@pytest.mark.parametrize("name", ["keys/cpu-pck.pem", "keys/bootrom-00.pem", "keys/manifest-es256.pem"])
@pytest.mark.parametrize("damage", ["remove", "text"])
def test_a_damaged_state_is_refused(tmp_path, name, damage):
    sim.create(tmp_path / "machine", now=NOW)
    path = tmp_path / "machine" / name
    if damage == "remove":
        path.unlink()
    else:
        path.write_text("not a key")
    with pytest.raises(ConfigError) as refused:
        sim.load(tmp_path / "machine")
    assert refused.value.code == "platform.state"
