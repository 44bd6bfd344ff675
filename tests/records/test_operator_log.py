"""The operator log and its witness: what enters, what is refused, and what survives a kill at any point."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from log_tree import Operator, boot

from countermark import cosigned, logcheck
from countermark.errors import CountermarkError, LogError, UsageError
from countermark.formats.records import encode_record
from countermark.formats.witnessed import encode_operator_leaf, parse_operator_leaf, parse_witnessed
from countermark.logcheck import Rules, verify_log
from countermark.logkeys import new_keys, verify_signature
from countermark.tlog.checkpoint import Checkpoint, parse_checkpoint_text, parse_note, verify_checkpoint
from countermark.tlog.cosignature import log_keys, verify_cosignatures
from countermark.tlog.merkle import Tree, leaf_hash, verify_consistency, verify_inclusion
from countermark_appliance import cli
from countermark_appliance.records import operator_log
from countermark_appliance.records.previous import read_sidecar
from countermark_appliance.records.publish import publish
from countermark_appliance.records.witnessed import BootProof, WitnessedEpoch

W1, W2 = new_keys("w.example/1"), new_keys("w.example/2")


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path / "starts")


def head(operator: Operator) -> Checkpoint:
    return verify_checkpoint(operator.note, *log_keys(operator.keys.as_log), verify_signature)


def refused(code: str, call: Callable[[], object]) -> None:
    with pytest.raises(CountermarkError) as caught:
        call()
    assert caught.value.code == code


def test_starts_are_appended_once_and_in_order(operator: Operator, tmp_path: Path) -> None:
    boots = [boot(tmp_path / "log") for _ in range(3)]
    assert head(operator).size == 0
    assert operator.append(tmp_path / "log").boots == tuple(boots)
    before = operator.note
    assert operator.append(tmp_path / "log").boots == ()
    assert operator.note == before
    boots.append(boot(tmp_path / "log"))
    assert operator.append(tmp_path / "log").boots == (boots[-1],)
    checked = verify_log(operator.source, *log_keys(operator.keys.as_log), rules=Rules.OPERATOR)
    assert (checked.checkpoint.size, checked.counts) == (4, {"epoch": 4})
    shown = operator_log.show(operator.path)
    assert [item["boot_id"] for item in shown["epochs"]] == [item.hex() for item in boots]
    assert [item["previous"] for item in shown["epochs"]] == [None, *(item.hex() for item in boots[:3])]
    assert [item["crashed"] for item in shown["epochs"]] == [0, 1, 1, 1]


def test_two_starts_from_one_copy_of_the_disk_cannot_both_enter(operator: Operator, tmp_path: Path) -> None:
    boot(tmp_path / "log")
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    first, second = boot(tmp_path / "log"), boot(tmp_path / "copy")
    assert operator.append(tmp_path / "log").boots[-1] == first
    refused("log.fork", lambda: operator.append(tmp_path / "copy"))
    assert head(operator).size == 2
    assert second.hex() not in json.dumps(operator_log.show(operator.path))
    boot(tmp_path / "copy")  # nor what follows it
    refused("log.fork", lambda: operator.append(tmp_path / "copy"))


def test_a_start_after_one_that_is_missing_is_refused(operator: Operator, tmp_path: Path) -> None:
    first = boot(tmp_path / "log")
    second = boot(tmp_path / "log")
    shutil.move(tmp_path / "log" / first.hex(), tmp_path / first.hex())
    refused("log.unknown_previous", lambda: operator.append(tmp_path / "log"))
    shutil.move(tmp_path / first.hex(), tmp_path / "log" / first.hex())
    assert operator.append(tmp_path / "log").boots == (first, second)


def test_a_new_chain_is_allowed_and_visible(operator: Operator, tmp_path: Path) -> None:
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    boot(tmp_path / "other")
    operator.append(tmp_path / "other")
    assert [item["previous"] for item in operator_log.show(operator.path)["epochs"]] == [None, None]


def test_what_stands_before_a_refused_start_is_kept(operator: Operator, tmp_path: Path) -> None:
    good, bad = boot(tmp_path / "log"), boot(tmp_path / "log")
    tile = tmp_path / "log" / bad.hex() / "tile/0/000.p/5"
    tile.write_bytes(bytes([tile.read_bytes()[0] ^ 1]) + tile.read_bytes()[1:])
    refused("log.tile", lambda: operator.append(tmp_path / "log"))
    assert [item["boot_id"] for item in operator_log.show(operator.path)["epochs"]] == [good.hex()]


@pytest.mark.parametrize("change", ["epoch", "entry", "checkpoint", "name"])
def test_a_log_that_is_not_its_epochs_is_refused(operator: Operator, tmp_path: Path, change: str) -> None:
    own, other = boot(tmp_path / "log").hex(), boot(tmp_path / "other").hex()
    folder, foreign = tmp_path / "log" / own, tmp_path / "other" / other
    match change:
        case "epoch":
            shutil.copy(foreign / "epoch", folder / "epoch")
        case "entry":
            path = folder / "tile/entries/000.p/4"
            data = path.read_bytes()  # within the last leaf's commitment
            path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
        case "checkpoint":
            shutil.copy(foreign / "checkpoint", folder / "checkpoint")
        case "name":
            folder.rename(tmp_path / "log" / ("0" * 64))
    code = {"epoch": "log.origin", "entry": "log.tile", "checkpoint": "log.origin", "name": "log.leaf"}[change]
    refused(code, lambda: operator.append(tmp_path / "log"))
    assert head(operator).size == 0


def test_keys_stay_outside_what_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "starts")
    assert cli.main(["operator-log", "new", path, "--name", "log.example/a", "--key", f"{path}/sub/key"]) == 1
    assert not Path(path).exists()
    secret = tmp_path / "secret"
    secret.write_text("correct horse\n")
    common = ["--key", str(tmp_path / "key"), "--passphrase-file", str(secret)]
    assert cli.main(["operator-log", "new", path, "--name", "log.example/a", *common]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (Path(path) / "vkeys").read_text().split() == shown["vkeys"]
    assert b"ENCRYPTED" in (tmp_path / "key").read_bytes()
    boot(tmp_path / "log")
    assert cli.main(["operator-log", "append", path, str(tmp_path / "log"), *common]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == 1
    assert cli.main(["operator-log", "append", path, str(tmp_path / "log"), "--key", str(tmp_path / "key")]) == 1
    assert cli.main(["operator-log", "show", path]) == 0
    assert len(json.loads(capsys.readouterr().out)["epochs"]) == 1
    assert cli.main(["operator-log", "new", path, "--name", "log.example/b", "--key", str(tmp_path / "key2")]) == 1


def test_a_witness_cosigns_growth_and_nothing_else(operator: Operator, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert operator.cosign(state, W1) is None  # nothing in it yet
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    shutil.copytree(operator.path, tmp_path / "before")
    for size in (1, 2):
        signed = operator.cosign(state, W1)
        assert signed is not None
        assert signed.log.checkpoint.size == size
        cosigned.add_lines(operator.path, signed.log.note, signed.lines)
        assert verify_cosignatures(operator.note, W1.as_witness, verify_signature) == ("w.example/1",)
        assert operator.cosign(state, W1) is None
        boot(tmp_path / "log")
        operator.append(tmp_path / "log")
    older = Operator(tmp_path / "before", operator.keys)
    refused("log.rolled_back", lambda: older.cosign(state, W1))
    assert older.cosign(tmp_path / "fresh", W2) is not None  # who never saw more cannot know


def test_a_witness_refuses_a_second_history(operator: Operator, tmp_path: Path) -> None:
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    shutil.copytree(operator.path, tmp_path / "twin")
    twin = Operator(tmp_path / "twin", operator.keys)
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    assert operator.cosign(tmp_path / "state", W1) is not None
    for _ in range(2):  # of the same size, then larger
        boot(tmp_path / "other")
        twin.append(tmp_path / "other")
        refused("log.consistency", lambda: twin.cosign(tmp_path / "state", W1))


def forged(operator: Operator, leaves: list[bytes]) -> None:
    """A head that the operator's keys signed over entries our tool would not have appended."""
    tree = Tree(leaf_hash(leaf) for leaf in leaves)
    note = operator.keys.sign_checkpoint(
        Checkpoint(origin=operator.keys.name, size=tree.size, root=tree.root()), 1_800_000_000
    )
    publish(operator.path, tree.size, note, tree.node, lambda start, count: leaves[start : start + count], since=0)


@pytest.mark.parametrize(
    ("order", "code"), [("abc", "log.fork"), ("aa", "log.boot_twice"), ("ba", "log.unknown_previous"), ("ab", "")]
)
def test_a_witness_holds_the_operator_to_the_rule_of_growth(
    operator: Operator, tmp_path: Path, order: str, code: str
) -> None:
    boots = {"a": boot(tmp_path / "log")}
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    boots |= {"b": boot(tmp_path / "log"), "c": boot(tmp_path / "copy")}
    leaves = []
    for name in order:
        sidecar = read_sidecar(tmp_path / ("copy" if name == "c" else "log") / boots[name].hex())
        leaves.append(encode_operator_leaf(encode_record(sidecar.epoch), sidecar.salt))
    forged(operator, leaves)
    if code:
        refused(code, lambda: operator.cosign(tmp_path / "state", W1))
        assert not list((tmp_path / "state").glob("*.head"))
    else:
        assert operator.cosign(tmp_path / "state", W1) is not None


def test_a_witness_refuses_entries_of_another_kind(operator: Operator, tmp_path: Path) -> None:
    forged(operator, [b"\xa0"])
    refused("operator_leaf.field", lambda: operator.cosign(tmp_path / "state", W1))


def test_state_is_durable_before_a_cosignature_leaves(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, it signs the same head again and never another of its size."""
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    shutil.copytree(operator.path, tmp_path / "twin")
    states: list[list[Path]] = []

    def killed(*_: object) -> None:
        states.append(list((tmp_path / "state").glob("*.head")))
        raise KeyboardInterrupt

    monkeypatch.setattr("countermark.logkeys.SigningKeys.cosign", killed)
    with pytest.raises(KeyboardInterrupt):
        operator.cosign(tmp_path / "state", W1)
    assert [len(found) for found in states] == [1]
    monkeypatch.undo()
    again = operator.cosign(tmp_path / "state", W1)
    assert again is not None
    assert again.log.checkpoint == head(operator)


def test_a_full_disk_signs_nothing(operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    signed: list[object] = []

    def full(*_args: object, **_options: object) -> None:
        raise UsageError("no space left", code="usage.file")

    monkeypatch.setattr("countermark.witnessing.write_file", full)
    monkeypatch.setattr("countermark.logkeys.SigningKeys.cosign", lambda *_: signed.append(1))
    refused("usage.file", lambda: operator.cosign(tmp_path / "state", W1))
    assert not signed


def test_a_memory_that_cannot_be_read_is_not_an_empty_one(operator: Operator, tmp_path: Path) -> None:
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    operator.cosign(tmp_path / "state", W1)
    (head_file,) = (tmp_path / "state").glob("*.head")
    seen = head_file.read_bytes()
    for link in (tmp_path / "not there", head_file):  # a disk that is not mounted; a loop
        head_file.unlink()
        head_file.symlink_to(link)
        refused("usage.file", lambda: operator.cosign(tmp_path / "state", W1))
        assert head_file.is_symlink()
    head_file.unlink()
    for cut in (b"", seen[:-1]):
        head_file.write_bytes(cut)
        refused("tlog.checkpoint", lambda: operator.cosign(tmp_path / "state", W1))


def test_one_state_one_witness(operator: Operator, tmp_path: Path) -> None:
    holder = operator.witness(tmp_path / "state", W1)
    refused("usage.locked", lambda: operator.witness(tmp_path / "state", W1))
    holder.close()
    operator.witness(tmp_path / "state", W1).close()


def test_cosigned_heads_stay_until_a_later_one_has_as_many(operator: Operator, tmp_path: Path) -> None:
    def grow_and_sign(*witnesses: str) -> None:
        boot(tmp_path / "log")
        operator.append(tmp_path / "log")
        for name in witnesses:
            signed = operator.cosign(tmp_path / name, {"1": W1, "2": W2}[name])
            assert signed is not None
            cosigned.add_lines(operator.path, signed.log.note, signed.lines)

    def sizes() -> list[tuple[int, int]]:
        notes = [parse_note(note) for note in cosigned.heads(operator.path)]
        return [(parse_checkpoint_text(note.text).size, len(note.signatures)) for note in notes]

    grow_and_sign("1", "2")
    grow_and_sign("1")
    assert sizes() == [(1, 6), (2, 4)]
    grow_and_sign()
    assert sizes() == [(1, 6), (2, 4), (3, 2)]
    grow_and_sign("1", "2")
    assert sizes()[0] == (4, 6)
    grow_and_sign()
    assert sizes() == [(4, 6), (5, 2)]


def test_lines_for_a_head_that_has_been_replaced_meanwhile(operator: Operator, tmp_path: Path) -> None:
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    signed = operator.cosign(tmp_path / "state", W1)
    assert signed is not None
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    cosigned.add_lines(operator.path, signed.log.note, signed.lines)
    assert head(operator).size == 2
    best = cosigned.heads(operator.path)[0]
    assert parse_checkpoint_text(parse_note(best).text).size == 1
    assert verify_cosignatures(best, W1.as_witness, verify_signature) == ("w.example/1",)


def test_a_node_shows_the_best_cosigned_head_that_holds_its_start(operator: Operator, tmp_path: Path) -> None:
    first = boot(tmp_path / "log")
    second = boot(tmp_path / "log")
    sidecars = [read_sidecar(tmp_path / "log" / item.hex()) for item in (first, second)]

    def shown(which: int) -> bytes:
        proof = BootProof(proof=(), checkpoint=b"boot checkpoint")
        return WitnessedEpoch(operator.path, sidecars[which], lambda: proof).encoded()

    assert shown(0) == b""
    shutil.move(tmp_path / "log" / second.hex(), tmp_path / second.hex())
    operator.append(tmp_path / "log")
    signed = operator.cosign(tmp_path / "state", W1)
    assert signed is not None
    cosigned.add_lines(operator.path, signed.log.note, signed.lines)
    shutil.move(tmp_path / second.hex(), tmp_path / "log" / second.hex())
    operator.append(tmp_path / "log")
    for which, size in ((0, 1), (1, 2)):  # the first start is in the cosigned head, the second not yet
        value = parse_witnessed(shown(which))
        found = verify_checkpoint(value.checkpoint, *log_keys(operator.keys.as_log), verify_signature)
        assert (found.size, value.index) == (size, which)
        leaf = leaf_hash(encode_operator_leaf(value.record, value.salt))
        verify_inclusion(which, size, leaf, value.proof, found.root)


def test_a_node_survives_whatever_lies_there(operator: Operator, tmp_path: Path) -> None:
    sidecar = read_sidecar(tmp_path / "log" / boot(tmp_path / "log").hex())
    operator.append(tmp_path / "log")
    epoch = WitnessedEpoch(operator.path, sidecar, lambda: BootProof(proof=(), checkpoint=b""))
    assert epoch.encoded()
    tile = operator.path / "tile/0/000.p/1"
    for damage in (b"", bytes(32), bytes(33)):
        tile.write_bytes(damage)
        (operator.path / "checkpoint").touch()
        other = WitnessedEpoch(operator.path, sidecar, lambda: BootProof(proof=(), checkpoint=b""))
        assert other.encoded() == b""
    (operator.path / "checkpoint").write_bytes(b"nonsense")
    assert epoch.encoded() == b""
    shutil.rmtree(operator.path)
    assert epoch.encoded() == b""


def test_consistency_and_inclusion_out_of_tiles(operator: Operator, tmp_path: Path) -> None:
    boots = [boot(tmp_path / "log", answers=0) for _ in range(5)]
    notes = []
    for item in boots:
        shutil.move(tmp_path / "log" / item.hex(), tmp_path / item.hex())
    for item in boots:
        shutil.move(tmp_path / item.hex(), tmp_path / "log" / item.hex())
        operator.append(tmp_path / "log")
        notes.append(head(operator))
    last = notes[-1]
    for old in notes:
        proof = operator.source.consistency(old.size, last)
        verify_consistency(old.size, last.size, old.root, last.root, proof)
    for index in range(last.size):
        leaf = operator.source.entries(0, last.size)[index]
        verify_inclusion(index, last.size, leaf_hash(leaf), operator.source.inclusion(index, last), last.root)
        assert parse_operator_leaf(leaf).epoch.boot_id == boots[index]


def test_a_fork_of_the_published_files_is_noticed_by_a_reader_with_an_older_head(
    operator: Operator, tmp_path: Path
) -> None:
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    seen = head(operator)
    boot(tmp_path / "log")
    operator.append(tmp_path / "log")
    origin, keys = log_keys(operator.keys.as_log)
    verify_log(operator.source, origin, keys, rules=Rules.OPERATOR, since=seen)
    other = Operator(tmp_path / "fork", operator.keys)
    for _ in range(2):
        boot(tmp_path / "other")
        other.append(tmp_path / "other")
    with pytest.raises(LogError) as caught:
        logcheck.verify_log(other.source, origin, keys, rules=Rules.OPERATOR, since=seen)
    assert caught.value.code == "log.consistency"
