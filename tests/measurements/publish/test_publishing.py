"""The published directory: what others can verify in it, what may not enter it, and every file changed once."""

from __future__ import annotations

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from publisher import LOG_NAME, NOW, image_id, publisher, signed, statement
from tlog_scales.backend import LocalBackend
from tlog_scales.reader import TilesReader

from countermark.errors import CountermarkError, UsageError
from countermark.formats.manifest import encode_manifest, parse_envelope, parse_manifest
from countermark.formats.measured import Releases, encode_measured, leaf_of, parse_measured
from countermark.logkeys import verify_signature
from countermark.policy import Policy, Profile, new_policy, pin
from countermark.tlog.merkle import Tree, leaf_hash
from countermark.tlog.proof import parse_proof, verify_proof
from countermark_measurements import keys as key_files
from countermark_measurements import publish

SIGNERS = publisher().signers


def put(path: Path, *envelopes: bytes) -> publish.Published:
    """Publish in turn; returns the last."""
    for envelope in envelopes:
        done = publish.append(path, envelope, publisher(), now=NOW)
    return done


def audit(path: Path) -> list[int]:
    """The versions found."""
    found = publish.audit(path, LOG_NAME, publisher().log.log_keys, SIGNERS)
    return [item["version"] for item in found["manifests"]]


def refusal(path: Path, envelope: bytes, *, now: int = NOW) -> str:
    with pytest.raises(CountermarkError) as err:
        publish.append(path, envelope, publisher(), now=now)
    return err.value.code


def test_a_manifest_stands_in_the_log_with_its_proof(tmp_path: Path) -> None:
    first, second = signed(), signed("two", 2, revoked=[image_id("one")])
    done = put(tmp_path, first, second)
    assert (done.index, done.size, done.appended) == (1, 2, True)
    assert done.manifest.read_bytes() == second
    proof = parse_proof(done.proof.read_bytes())
    leaf = encode_measured(leaf_of(second, statement("two", 2, revoked=[image_id("one")])))
    head = verify_proof(proof, leaf, LOG_NAME, publisher().log.log_keys, verify_signature)
    assert head.size == 2
    assert audit(tmp_path) == [1, 2]
    assert (tmp_path / "signers").read_text().split() == [item.hex() for item in SIGNERS]


def test_another_tool_makes_the_same_proof(tmp_path: Path) -> None:
    """tlog-scales reads the tiles and prints a tlog-proof; its bytes are those of our file."""
    envelopes = [signed(f"build {number}", number) for number in range(1, 6)]
    done = put(tmp_path, *envelopes)
    call = (str(Path(sys.executable).parent / "tlog-tiles"), "gen-proof", str(tmp_path), "4")
    made = subprocess.run(call, capture_output=True, check=True, timeout=60).stdout
    assert made == done.proof.read_bytes()
    reader = TilesReader(LocalBackend(tmp_path))
    head = reader.get_checkpoint()
    assert reader.calculate_root_hash() == head.root_hash
    assert [parse_measured(reader.get_entry(at)).version for at in range(5)] == [1, 2, 3, 4, 5]


def test_a_log_longer_than_a_tile(tmp_path: Path) -> None:
    """Partial tiles give way to full ones, and old proofs still hold."""
    first = signed()
    put(tmp_path, first)
    early = (tmp_path / "manifests" / "1.tlog-proof").read_bytes()
    leaf = leaf_of(first, statement())
    leaves = [leaf, *(replace(leaf, version=number) for number in range(2, 256))]
    tree = Tree(leaf_hash(encode_measured(item)) for item in leaves)
    publish._write_log(tmp_path, publisher(), leaves, tree, since=1)
    put(tmp_path, signed("two", 256))
    assert not (tmp_path / "tile" / "0" / "000.p").exists()
    last = put(tmp_path, signed("three", 257))
    assert (tmp_path / "tile" / "0" / "001.p" / "1").exists()
    assert (last.index, last.size) == (256, 257)
    known = publish.published(tmp_path, publisher())
    assert [item.version for item in known.leaves] == list(range(1, 258))
    head = verify_proof(parse_proof(early), encode_measured(leaf), LOG_NAME, publisher().log.log_keys, verify_signature)
    assert head.size == 1


def test_publishing_again_changes_nothing_and_completes_what_was_cut_short(tmp_path: Path) -> None:
    put(tmp_path, signed())
    two = signed("two", 2)
    done = put(tmp_path, two)
    head = (tmp_path / "checkpoint").read_bytes()
    done.proof.unlink()
    done.manifest.unlink()
    again = put(tmp_path, two)
    assert (again.index, again.size, again.appended) == (1, 2, False)
    assert (tmp_path / "checkpoint").read_bytes() == head
    assert audit(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("envelope", "code"),
    [
        (signed("two", 1), "log.version"),
        (signed("two", 2), "log.version"),
        (signed("one", 3), "log.revoked"),
    ],
)
def test_versions_grow_and_a_revoked_image_stays_out(tmp_path: Path, envelope: bytes, code: str) -> None:
    put(tmp_path, signed(), signed("two", 2, revoked=[image_id("one")]))
    before = sorted(tmp_path.rglob("*"))
    assert refusal(tmp_path, envelope) == code
    assert sorted(tmp_path.rglob("*")) == before
    assert audit(tmp_path) == [1, 2]


def test_an_image_that_revokes_itself_is_no_release() -> None:
    leaf = replace(leaf_of(signed(), statement()), revoked=(image_id("one"),))
    with pytest.raises(CountermarkError) as err:
        Releases().add(leaf)
    assert err.value.code == "log.revoked"


def test_only_the_publishers_own_and_valid_manifests_enter(tmp_path: Path) -> None:
    stranger = key_files.create(tmp_path / "stranger", LOG_NAME)
    out = tmp_path / "out"
    assert refusal(out, stranger.sign(encode_manifest(statement()))) == "manifest.signer"
    assert refusal(out, signed(), now=NOW + 365 * 86_400) == "manifest.expired"
    assert refusal(out, signed()[:-1]) == "manifest.json"
    put(out, signed())
    with pytest.raises(CountermarkError) as err:
        publish.append(out, stranger.sign(encode_manifest(statement("two", 2))), stranger, now=NOW)
    assert err.value.code == "log.signature_missing"  # another publisher's log


def test_keys_are_not_published(tmp_path: Path) -> None:
    keys = key_files.create(tmp_path / "keys", LOG_NAME)
    envelope = keys.sign(encode_manifest(statement()))
    for key_dir in (tmp_path / "keys", tmp_path):
        with pytest.raises(UsageError) as err:
            publish.append(tmp_path, envelope, keys, now=NOW, key_dir=key_dir)
        assert err.value.code == "usage.key_place"
    publish.append(tmp_path / "out", envelope, keys, now=NOW, key_dir=tmp_path / "keys")
    published = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"PRIVATE" not in published


def test_what_is_published_may_be_read_by_everybody(tmp_path: Path) -> None:
    put(tmp_path, signed())
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o644}, modes


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("checkpoint", {"tlog.note", "log.signature", "log.origin", "tlog.checkpoint", "log.signature_missing"}),
        ("tile/0/000.p/2", {"log.tile"}),
        ("tile/entries/000.p/2", {"tlog.entries", "cbor.malformed", "cbor.type", "cbor.not_deterministic", "log.tile"}),
        ("manifests/1.json", {"log.leaf"}),
        ("manifests/2.json", {"log.leaf"}),
    ],
)
def test_a_byte_changed_anywhere_is_found(tmp_path: Path, name: str, codes: set[str]) -> None:
    put(tmp_path, signed(), signed("two", 2))
    path = tmp_path / name
    good = path.read_bytes()
    assert audit(tmp_path) == [1, 2]
    for at in range(0, len(good), max(1, len(good) // 60)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(CountermarkError) as err:
            audit(tmp_path)
        assert err.value.code in codes | {"measured.field", "measured.type"}, (at, err.value.code)
    path.unlink()
    with pytest.raises(CountermarkError) as err:
        audit(tmp_path)
    assert err.value.code == "log.missing"


def test_two_manifests_swapped_are_found(tmp_path: Path) -> None:
    put(tmp_path, signed(), signed("two", 2))
    one, two = (tmp_path / "manifests" / f"{number}.json" for number in (1, 2))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    with pytest.raises(CountermarkError) as err:
        audit(tmp_path)
    assert err.value.code == "log.leaf"


def test_a_leaf_that_says_something_else_than_its_manifest_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a publisher that signs both: the digest holds, and the log tells those who follow it another kind."""
    honest = leaf_of(signed(), statement())
    envelope = signed("two", 2)
    put(tmp_path, signed())
    lying = replace(leaf_of(envelope, statement("two", 2)), image_id=image_id("three"))
    monkeypatch.setattr(publish, "leaf_of", lambda data, image: honest if image.version == 1 else lying)
    put(tmp_path, envelope)
    monkeypatch.undo()
    with pytest.raises(CountermarkError) as err:
        audit(tmp_path)
    assert err.value.code == "log.leaf"


def logged_policy(path: Path) -> Policy:
    policy = new_policy(Profile.PRODUCTION, now=NOW)
    proof = (path / "manifests" / "1.tlog-proof").read_bytes()
    manifest = (path / "manifests" / "1.json").read_bytes()
    return pin(policy, manifest, now=NOW, signers=SIGNERS, log=publisher().log.as_log, proof=proof)


def test_pinning_asks_for_the_proof_once_a_log_is_named(tmp_path: Path) -> None:
    put(tmp_path, signed(), signed("two", 2))
    policy = logged_policy(tmp_path)
    assert policy.manifest_log == publisher().log.as_log
    two, proof = (tmp_path / "manifests" / name for name in ("2.json", "2.tlog-proof"))
    newer = pin(policy, two.read_bytes(), now=NOW, proof=proof.read_bytes())
    assert (newer.manifest_version, newer.manifest_log) == (2, policy.manifest_log)
    other = key_files.PublisherKeys(
        es256=publisher().es256, ml_dsa_65=publisher().ml_dsa_65, log=key_files.new_keys(LOG_NAME)
    )
    publish.append(tmp_path / "other", two.read_bytes(), other, now=NOW)
    foreign = (tmp_path / "other" / "manifests" / "2.tlog-proof").read_bytes()
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "manifest.unlogged"),
        ({"proof": (tmp_path / "manifests" / "1.tlog-proof").read_bytes()}, "log.inclusion"),
        ({"proof": foreign}, "log.signature_missing"),
        ({"proof": foreign, "log": other.log.as_log}, "manifest.log"),
        ({"proof": proof.read_bytes()[:-1]}, "tlog.note"),
        ({"proof": b"nothing"}, "tlog.proof"),
    ]
    for changes, code in cases:
        with pytest.raises(CountermarkError) as err:
            pin(policy, two.read_bytes(), now=NOW, **changes)  # type: ignore[arg-type]
        assert err.value.code == code, changes
    again = publisher().sign(encode_manifest(parse_manifest(parse_envelope(two.read_bytes()).payload)))
    with pytest.raises(CountermarkError) as err:  # the same statement in another envelope was not published
        pin(policy, again, now=NOW, proof=proof.read_bytes())
    assert err.value.code == "log.inclusion"


def test_a_proof_without_a_log_is_no_proof(tmp_path: Path) -> None:
    put(tmp_path, signed())
    proof = (tmp_path / "manifests" / "1.tlog-proof").read_bytes()
    policy = new_policy(Profile.PRODUCTION, now=NOW)
    with pytest.raises(CountermarkError) as err:
        pin(policy, signed(), now=NOW, signers=SIGNERS, proof=proof)
    assert err.value.code == "manifest.log"
    with pytest.raises(CountermarkError) as err:
        pin(policy, signed(), now=NOW, signers=SIGNERS, log=publisher().log.as_log[:1], proof=proof)
    assert err.value.code == "policy.value"
