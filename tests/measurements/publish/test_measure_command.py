"""countermark-measure as an operator uses it: publish, pin, rotate, revoke; and what old clients are told."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from publisher import LOG_NAME, image_id, image_json, prediction, sha256

from countermark import cli as client_cli
from countermark.errors import CountermarkError
from countermark.formats import boot_events
from countermark.formats.boot_events import BootEvents
from countermark.formats.manifest import ImageKind, parse_envelope, parse_manifest
from countermark.logkeys import verify_signature
from countermark.policy import Policy, load_policy, pin
from countermark.tlog.cosignature import parse_vkey, verify_cosignatures
from countermark.tlog.proof import parse_proof
from countermark_appliance.platform.sim import measure
from countermark_measurements import cli
from countermark_measurements.prediction import to_json
from countermark_measurements.runtime import KNOWN, predict_runtime
from sim_evidence import NOW, Scene, code_folder, machine, policy_for

ROOT = sha256("a simulated root").hex()


@dataclass(frozen=True)
class Office:
    """A publisher's working directory; `run` is the command line in it."""

    path: Path
    capsys: pytest.CaptureFixture[str]

    def run(self, *words: str, code: int = 0) -> tuple[str, str]:
        """stdout and stderr of countermark-measure."""
        assert cli.main([str(word) for word in words]) == code, self.capsys.readouterr()
        out = self.capsys.readouterr()
        return out.out, out.err

    def client(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Of countermark."""
        assert client_cli.main([str(word) for word in words]) == code, self.capsys.readouterr()
        out = self.capsys.readouterr()
        return out.out, out.err

    def release(self, build: str, *more: str, platform: str = "vtpm", code: int = 0) -> str:
        """Sign and publish a build; returns what was said."""
        kind = ImageKind.TEST if platform == "vtpm" else ImageKind.PRODUCTION
        (self.path / "prediction.json").write_bytes(to_json(prediction(build, platform=platform)))
        (self.path / "image.json").write_bytes(image_json(build, kind))
        files = ("--prediction", self.path / "prediction.json", "--image", self.path / "image.json")
        out = ("--out", self.path / f"{build}.json", "--keys", self.path / "keys", "--publish", self.path / "pub")
        return self.run("manifest", *map(str, (*files, *out)), *more, code=code)[1]

    def published(self, name: str) -> str:
        return str(self.path / "pub" / name)

    def signers(self) -> list[str]:
        return [word for item in (self.path / "pub" / "signers").read_text().split() for word in ("--signer", item)]

    def policy(self) -> Policy:
        return load_policy(self.path / "policy.toml")

    def pin(self, version: int, *more: str, code: int = 0) -> str:
        proof = ("--proof", self.published(f"manifests/{version}.tlog-proof"))
        manifest = self.published(f"manifests/{version}.json")
        return self.client(
            "policy", "pin", manifest, "--policy", str(self.path / "policy.toml"), *proof, *more, code=code
        )[1]


@pytest.fixture
def office(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Office:
    """With keys and a client that has a test policy and nothing pinned."""
    made = Office(tmp_path, capsys)
    made.run("keys", "new", str(tmp_path / "keys"), "--log", LOG_NAME)
    text, _ = made.client("policy", "new", "--profile", "test", "--simulated-tdx-root", ROOT)
    (tmp_path / "policy.toml").write_text(text)
    return made


def test_publish_pin_rotate_revoke(office: Office) -> None:
    office.release("one")
    said = office.pin(1, "--log", office.published("vkeys"), *office.signers())
    assert "version 1" in said
    assert office.policy().images[0].image_id == image_id("one")
    said = office.release("two", "--revoke", image_id("one").hex(), "--weights", f"small={ROOT}")
    assert "version 2" in said
    said = office.pin(2)
    assert image_id("one").hex() in said  # which is not accepted any more
    assert ROOT in said  # the weights it was published with, which one may accept
    policy = office.policy()
    assert ([image.version for image in policy.images], policy.manifest_version) == ([2], 2)
    assert policy.revoked_images == (image_id("one"),)
    assert "manifest.rolled_back" in office.pin(1, code=12)
    assert office.policy() == policy
    out, _ = office.run(
        "audit", office.published(""), "--key", str(office.path / "keys" / "vkeys"), *office.signers(), "--json"
    )
    found = json.loads(out)["manifests"]
    assert [(item["version"], item["revoked"]) for item in found] == [(1, True), (2, False)]
    out, _ = office.client("log", "verify", office.published(""), "--key", office.published("vkeys"), "--measurements")
    assert "2 leaves" in out


def test_a_later_manifest_repeats_what_was_revoked(office: Office) -> None:
    """Whoever pins the latest alone must know."""
    office.release("one")
    office.release("two", "--revoke", image_id("one").hex())
    office.release("three")
    third = parse_manifest(parse_envelope((office.path / "three.json").read_bytes()).payload)
    assert third.revoked_images == (image_id("one"),)


@pytest.mark.parametrize(
    ("build", "more", "code"),
    [
        ("three", ("--version", "2"), 1),  # published already: no second of that version is even signed
        ("three", ("--version", "1"), 1),
        ("one", (), 1),  # revoked
        ("three", ("--revoke", ROOT), 1),  # never published
        ("three", ("--revoke", "zz"), 2),
        ("three", ("--valid-days", "0"), 1),
        ("three", ("--mrseam", "00" * 48), 1),  # of a simulated platform
    ],
)
def test_what_must_not_be_signed(office: Office, build: str, more: tuple[str, ...], code: int) -> None:
    office.release("one")
    office.release("two", "--revoke", image_id("one").hex())
    made = office.path / f"{build}.json"
    made.unlink(missing_ok=True)
    if code == 2:  # argparse itself
        with pytest.raises(SystemExit) as stop:
            office.release(build, *more)
        assert stop.value.code == 1
    else:
        assert "usage.manifest" in office.release(build, *more, code=code)
    assert not made.exists()


def test_files_and_modes(office: Office) -> None:
    office.release("one")
    keys = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (office.path / "keys").iterdir()}
    assert sorted(name for name, mode in keys.items() if mode == 0o644) == ["signers", "vkeys"]
    assert stat.S_IMODE((office.path / "one.json").stat().st_mode) == 0o644
    out, _ = office.run("keys", "show", str(office.path / "keys"))
    assert [line.split()[1] for line in out.splitlines() if line.startswith("signer")] == office.signers()[1::2]


def test_publish_without_keys_or_twice(office: Office) -> None:
    office.release("one")
    _, said = office.run(
        "publish", str(office.path / "one.json"), office.published(""), "--keys", str(office.path / "keys")
    )
    assert "already" in said
    _, said = office.run("publish", str(office.path / "one.json"), office.published(""), "--keys", "nowhere", code=1)
    assert "usage.file" in said


def test_reference_values_and_words(office: Office) -> None:
    office.release("one", platform="tdx")
    office.release("two", platform="tdx")
    one, two = (str(office.path / f"{name}.json") for name in ("one", "two"))
    out, _ = office.run("rvps", one)
    assert len(json.loads(out)["mr_td"]) == 2
    out, _ = office.run("rvps", one, "--message")
    assert json.loads(out)["type"] == "sample"
    office.run("corim", one, "--out", str(office.path / "one.corim"))
    assert (office.path / "one.corim").read_bytes()[:3] == b"\xd9\x01\xf5"
    out, _ = office.run("diff", one, two)
    assert "initrd" in out
    out, _ = office.run("diff", one, one)
    assert "the same" in out
    broken = office.path / "broken.json"
    broken.write_bytes((office.path / "one.json").read_bytes().replace(b'"sig":"', b'"sig":"A', 1))
    for words in (("rvps", broken), ("diff", one, broken), ("corim", broken, "--out", office.path / "x")):
        assert "manifest." in office.run(*map(str, words), code=20)[1]


def test_explain_prints_the_event_and_fails(office: Office) -> None:
    """Our evidence against the manifest of its own machine, and of other code."""
    evidence = office.path / "evidence.cbor"
    evidence.write_bytes(Scene().encoded())
    good = office.path / "good.json"
    good.write_bytes(machine().manifest)
    out, _ = office.run("explain", str(evidence), str(good))
    assert "as predicted" in out
    other = office.path / "other.json"
    other.write_bytes(measure.publish(machine().signers, now=NOW, version=2, roots=[code_folder("new code")]))
    out, said = office.run("explain", str(evidence), str(other), code=12)
    assert "SIMULATED image id" in out
    assert "measurement.rtmr2" in said
    out, _ = office.run("explain", str(evidence), str(other), "--json", code=12)
    found = json.loads(out)["registers"]["rtmr2"]
    assert (found["matches"], found["difference"]["event"], found["difference"]["kind"]) == (False, 1, "changed")
    assert found["difference"]["expected"]["source"] == "image"


def test_events_of_rtmr3_are_those_that_a_machine_extends(office: Office) -> None:
    """Known before the start: the first four, from the image, the file and the code; GPUs and keys are not."""
    config = b'[weights]\nroot = "' + ROOT.encode() + b'"\n'
    (office.path / "node.toml").write_bytes(config)
    office.release("one")
    words = ("rtmr3", "--config", office.path / "node.toml", "--manifest", office.path / "one.json")
    out, _ = office.run(*map(str, words), "--kernels", "ab" * 32, "--json")
    found = json.loads(out)
    boot = BootEvents(
        image_id=image_id("one"),
        config=sha256(config.decode()),
        weights_root=bytes.fromhex(ROOT),
        profile="exact-v1",
        kernel_digest=b"\xab" * 32,
        gpus=(),
        keys=bytes(32),
    )
    log = boot_events.boot_event_data(boot)
    assert [event["name"] for event in found["events"]] == list(KNOWN)
    assert [bytes.fromhex(event["data"]) for event in found["events"]] == list(log[:4])
    assert [bytes.fromhex(event["digest"]) for event in found["events"]] == [
        boot_events.event(data).digest for data in log[:4]
    ]
    out, said = office.run(*map(str, words))
    assert "numerics" in said
    assert len(predict_runtime(config, image_id=bytes(32)).events) == 3
    for bad in (config + b"\0" * 10, b"[weights]", b"root = 1", b"weights = 1", b"\xff", b"[weights]\nroot = 5"):
        (office.path / "node.toml").write_bytes(bad)
        assert "runtime.config" in office.run(*map(str, words), code=20)[1]


def told(scene: Scene, policy: Policy) -> str:
    """What a client is told that refuses."""
    with pytest.raises(CountermarkError) as err:
        scene.appraise(policy)
    assert err.value.code == "measurement.rtmr2"
    return str(err.value)


def test_old_clients_are_told_what_to_do() -> None:
    """After a rotation: whoever has not pinned the new image is told to, and whoever has, what not to use."""
    old = policy_for(machine())
    bad = old.images[0].image_id
    rotated = measure.publish(
        machine().signers, now=NOW, version=2, roots=[code_folder("fixed code")], revoked_images=[bad]
    )
    message = told(Scene(code="fixed code"), old)
    assert "countermark policy pin" in message
    assert parse_manifest(parse_envelope(rotated).payload).image_id.hex() in message
    new = pin(old, rotated, now=NOW)
    assert Scene(code="fixed code").appraise(new).image_version == 2
    message = told(Scene(), new)
    assert "revoked" in message
    assert bad.hex() in message
    assert "countermark policy pin" not in message  # nothing the client could pin would make it right


def test_it_needs_no_more_than_a_verifier() -> None:
    """The lock of the client is enough: no engine is loaded, nor anything of the appliance."""
    code = "import sys, countermark_measurements.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "countermark_measurements" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "countermark_appliance", "countermark_kernels"}


def test_witnesses_can_follow_the_log(office: Office) -> None:
    """What they cosign stands on the head; published again, a manifest's proof carries it."""
    office.release("one")
    key, state = str(office.path / "witness.key"), str(office.path / "witness")
    vkeys, _ = office.client("log", "keygen", "witness.example/1", "--out", key)
    words = ("log", "witness", office.published(""), "--state", state, "--key", key, "--measurements")
    out, _ = office.client(*words, office.published("vkeys"))
    assert "1 leaves" in out
    proof = office.path / "pub" / "manifests" / "1.tlog-proof"
    assert b"witness.example/1" not in proof.read_bytes()
    files = (str(office.path / "one.json"), office.published(""))
    office.run("publish", *files, "--keys", str(office.path / "keys"))
    note = parse_proof(proof.read_bytes()).checkpoint
    named = verify_cosignatures(note, list(map(parse_vkey, vkeys.split())), verify_signature)
    assert named == ("witness.example/1",)
    office.pin(1, "--log", office.published("vkeys"), *office.signers())
    office.release("two")
    out, _ = office.client(*words, office.published("vkeys"))
    assert "2 leaves" in out
