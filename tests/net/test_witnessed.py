"""Two starts from one copy of a disk, and everything else that a required witness is for, over real connections."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from net_appliance import Appliance, running

from countermark import cli, cosigned, logsource
from countermark.bundle import Bundle, read_bundle
from countermark.checks import Status
from countermark.errors import CountermarkError, LogError
from countermark.formats.witnessed import (
    ReceiptWitness,
    encode_receipt_witness,
    encode_witnessed,
    parse_witnessed,
)
from countermark.logcheck import Rules, verify_log
from countermark.logkeys import SigningKeys, new_keys, save_keys, verify_signature
from countermark.policy import Policy, WitnessRule, encode_policy
from countermark.session import Answer
from countermark.tlog.checkpoint import Checkpoint, parse_checkpoint_text, parse_note, verify_checkpoint
from countermark.tlog.cosignature import log_keys, with_lines
from countermark.verify import verify_bundle
from countermark.witness import UNWITNESSED, boot_keys
from countermark.witnessing import Witness
from countermark_appliance.records import operator_log
from one_answer import NOW

OPERATOR, W1, W2 = new_keys("log.example/starts"), new_keys("w.example/1"), new_keys("w.example/2")


class Starts:
    """The operator log beside a node, and its witnesses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        operator_log.create(path, OPERATOR)

    def append(self, appliance: Appliance, directory: Path) -> None:
        wanted = directory / "log" / appliance.machine.keyring.boot_id.hex() / "checkpoint"
        deadline = time.monotonic() + 10
        while not wanted.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        operator_log.append(self.path, OPERATOR, directory / "log")

    def cosign(self, *witnesses: SigningKeys) -> None:
        for keys in witnesses:
            witness = Witness(self.path.parent / keys.name.replace("/", "-"), keys, *log_keys(OPERATOR.as_log))
            signed = witness.round(logsource.directory(self.path), lambda: NOW)
            witness.close()
            if signed is not None:
                cosigned.add_lines(self.path, signed.log.note, signed.lines)


def watched(policy: Policy, required: int = 1, **changes: Any) -> Policy:
    return replace(
        policy,
        operator_log=OPERATOR.as_log,
        witnesses=(*W1.as_witness, *W2.as_witness),
        witnesses_required=required,
        **changes,
    )


def ask(appliance: Appliance, policy: Policy) -> Answer:
    from countermark.session import connect

    with connect(appliance.address, policy, now=NOW) as session:
        return session.generate("count for me", max_tokens=3).result()


@contextmanager
def node(directory: Path, starts: Starts) -> Iterator[Appliance]:
    directory.mkdir(exist_ok=True)
    with running(directory, operator_dir=starts.path) as appliance:
        yield appliance


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path / "starts")


def refused(code: str, appliance: Appliance, policy: Policy) -> CountermarkError:
    with pytest.raises(CountermarkError) as caught:
        ask(appliance, policy)
    assert caught.value.code == code
    return caught.value


def test_two_starts_from_one_copy_of_the_disk(tmp_path: Path, starts: Starts) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with node(first, starts) as appliance:
        ask(appliance, appliance.machine.policy)
        starts.append(appliance, first)
    second.mkdir()
    shutil.copytree(first / "log", second / "log")
    shutil.rmtree(first / "code")
    with node(first, starts) as one, node(second, starts) as two:
        assert one.machine.recorder.epoch.previous == two.machine.recorder.epoch.previous
        for appliance in (one, two):  # nobody asked for witnesses: both are accepted, and say so
            answer = ask(appliance, appliance.machine.policy)
            assert str(answer.witnessed) == UNWITNESSED
            last = answer.witnessed.checks[-1]
            assert (last.step, last.status) == ("20", Status.SKIP)
            assert UNWITNESSED in last.detail
        starts.append(one, first)
        with pytest.raises(LogError) as fork:
            starts.append(two, second)
        assert fork.value.code == "log.fork"
        starts.cosign(W1)
        answer = ask(one, watched(one.machine.policy))
        assert answer.witnessed.names == ("w.example/1",)
        assert answer.witnessed.index == 1
        error = refused("log.unwitnessed", two, watched(two.machine.policy))
        assert (error.step, error.exit_code) == ("20", 21)
        assert len(error.checks) == len(answer.witnessed.checks)


def test_as_many_as_the_policy_asks_for(tmp_path: Path, starts: Starts) -> None:
    with node(tmp_path / "node", starts) as appliance:
        policy = appliance.machine.policy
        refused("log.unwitnessed", appliance, watched(policy))
        assert str(ask(appliance, watched(policy, 0)).witnessed) == UNWITNESSED
        starts.append(appliance, tmp_path / "node")
        refused("log.unwitnessed", appliance, watched(policy))
        seen = ask(appliance, watched(policy, 0)).witnessed
        assert (seen.names, seen.index) == ((), 0)
        starts.cosign(W1)
        assert ask(appliance, watched(policy)).witnessed.names == ("w.example/1",)
        refused("log.unwitnessed", appliance, watched(policy, 2))
        starts.cosign(W2)
        assert ask(appliance, watched(policy, 2)).witnessed.names == ("w.example/1", "w.example/2")
        other = replace(watched(policy), operator_log=new_keys("log.example/starts").as_log)
        refused("log.signature_missing", appliance, other)
        refused("log.origin", appliance, replace(other, operator_log=new_keys("log.example/other").as_log))


@pytest.fixture(scope="module")
def witnessed_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Policy, bytes]:
    """A bundle of an answer whose start W1 has seen, a policy that asks for it, and another start's EPOCH."""
    tmp_path = tmp_path_factory.mktemp("witnessed")
    starts = Starts(tmp_path / "starts")
    with node(tmp_path / "other", starts) as other:
        starts.append(other, tmp_path / "other")
        foreign = other.machine.recorder.witnessed()
    with node(tmp_path / "node", starts) as appliance:
        starts.append(appliance, tmp_path / "node")
        starts.cosign(W1)
        policy = watched(appliance.machine.policy)
        ask(appliance, policy).save(tmp_path / "a.cmk", manifest=appliance.machine.manifest)
        ask(appliance, policy)
        later = appliance.machine.recorder
        bundle = read_bundle(tmp_path / "a.cmk")
        verdict = verify_bundle(bundle, policy, NOW).verdict
        receipt = verify_bundle(bundle, policy, NOW).receipt
        note = later.checkpoint()
        head = verify_checkpoint(note, verdict.log_origin, boot_keys(verdict), verify_signature)
        lines = W1.cosign(head, NOW)
        proof = later.consistency(receipt.checkpoint.size, head.size)
        witness = encode_receipt_witness(ReceiptWitness(checkpoint=with_lines(note, lines), proof=proof))
        return replace(bundle, witness=witness), policy, foreign


def test_a_bundle_carries_what_witnesses_saw(witnessed_bundle: tuple[Bundle, Policy, bytes]) -> None:
    bundle, policy, _ = witnessed_bundle
    verified = verify_bundle(bundle, policy, NOW)
    assert verified.witnesses == "witnessed by w.example/1"
    assert verified.as_json()["witnesses"] == "witnessed by w.example/1"
    assert [(check.step, check.status) for check in verified.checks][-2:] == [("20", Status.PASS)] * 2
    strict = replace(policy, witnessed=WitnessRule.EPOCH_AND_RECEIPT)
    assert verify_bundle(bundle, strict, NOW).witnesses == verified.witnesses
    nobody = replace(policy, witnesses=(), witnesses_required=0, operator_log=None)
    assert verify_bundle(bundle, nobody, NOW).witnesses == UNWITNESSED
    for changed, wanted in ((replace(bundle, epoch=None), policy), (replace(bundle, witness=None), strict)):
        with pytest.raises(LogError) as caught:
            verify_bundle(changed, wanted, NOW)
        assert (caught.value.code, caught.value.step) == ("log.unwitnessed", "20")


def changed_epoch(bundle: Bundle, foreign: bytes, change: str) -> bytes:
    assert bundle.epoch is not None
    value, other = parse_witnessed(bundle.epoch), parse_witnessed(foreign)
    head = parse_checkpoint_text(parse_note(value.checkpoint).text)
    parts: dict[str, dict[str, Any]] = {
        "another start": {"record": other.record, "salt": other.salt},
        "salt": {"salt": bytes(32)},
        "index": {"index": value.index - 1},
        "proof": {"proof": (bytes(32), *value.proof[1:])},
        "short proof": {"proof": ()},
        "boot proof": {"boot_proof": (*value.boot_proof, bytes(32))},
        "boot checkpoint": {"boot_checkpoint": other.boot_checkpoint},
        "not cosigned": {"checkpoint": OPERATOR.sign_checkpoint(head, NOW)},
        "cosigned elsewhere": {
            "checkpoint": with_lines(OPERATOR.sign_checkpoint(head, NOW), W1.cosign(replace(head, size=9), NOW))
        },
        "a stranger's": {
            "checkpoint": with_lines(OPERATOR.sign_checkpoint(head, NOW), new_keys("x").cosign(head, NOW))
        },
        "half a witness": {"checkpoint": with_lines(OPERATOR.sign_checkpoint(head, NOW), W1.cosign(head, NOW)[:1])},
        "another log": {
            "checkpoint": new_keys("log.example/starts").sign_checkpoint(head, NOW),
        },
    }
    return encode_witnessed(replace(value, **parts[change]))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("another start", "log.operator"),
        ("salt", "log.inclusion"),
        ("index", "log.inclusion"),
        ("proof", "log.inclusion"),
        ("short proof", "log.proof"),
        ("boot proof", "log.proof"),
        ("boot checkpoint", "log.origin"),
        ("not cosigned", "log.unwitnessed"),
        ("cosigned elsewhere", "log.cosignature"),
        ("a stranger's", "log.unwitnessed"),
        ("half a witness", "log.unwitnessed"),
        ("another log", "log.signature_missing"),
    ],
)
def test_what_is_shown_of_an_epoch_is_checked(
    witnessed_bundle: tuple[Bundle, Policy, bytes], change: str, code: str
) -> None:
    bundle, policy, foreign = witnessed_bundle
    wrong = replace(bundle, epoch=changed_epoch(bundle, foreign, change))
    with pytest.raises(LogError) as caught:
        verify_bundle(wrong, policy, NOW)
    assert (caught.value.code, caught.value.step) == (code, "20")


def test_every_byte_of_what_is_shown_matters(witnessed_bundle: tuple[Bundle, Policy, bytes]) -> None:
    bundle, policy, _ = witnessed_bundle
    assert bundle.epoch is not None
    for at in range(0, len(bundle.epoch), 211):
        data = bundle.epoch[:at] + bytes([bundle.epoch[at] ^ 4]) + bundle.epoch[at + 1 :]
        try:
            changed = verify_bundle(replace(bundle, epoch=data), policy, NOW).witnesses
        except CountermarkError as err:
            assert err.step == "20"
        else:
            pytest.fail(f"byte {at} of {len(data)} changed and still {changed}")


def test_a_receipts_witness_is_of_its_log_and_later(witnessed_bundle: tuple[Bundle, Policy, bytes]) -> None:
    bundle, policy, _ = witnessed_bundle
    strict = replace(policy, witnessed=WitnessRule.EPOCH_AND_RECEIPT)
    receipt = verify_bundle(bundle, policy, NOW).receipt
    payload_note = receipt.accepted.acceptance.checkpoint  # signed by the log, but before the receipt's
    before = parse_checkpoint_text(parse_note(payload_note).text)
    earlier = encode_receipt_witness(
        ReceiptWitness(checkpoint=with_lines(payload_note, W1.cosign(before, NOW)), proof=())
    )
    for data, code in ((earlier, "log.range"), (b"\xa0", "receipt_witness.field")):
        with pytest.raises(CountermarkError) as caught:
            verify_bundle(replace(bundle, witness=data), strict, NOW)
        assert caught.value.code == code


def test_a_node_that_shows_another_starts_epoch(tmp_path: Path, starts: Starts) -> None:
    with node(tmp_path / "a", starts) as one, node(tmp_path / "b", starts) as two:
        starts.append(one, tmp_path / "a")
        starts.append(two, tmp_path / "b")
        starts.cosign(W1)
        shown = one.machine.recorder.witnessed()
        two.machine.recorder.witnessed = lambda: shown  # type: ignore[method-assign]
        refused("log.operator", two, watched(two.machine.policy))
        two.machine.recorder.witnessed = lambda: b"nonsense"  # type: ignore[method-assign]
        with pytest.raises(CountermarkError):
            ask(two, watched(two.machine.policy))


def test_a_log_read_from_its_node(tmp_path: Path, starts: Starts) -> None:
    with node(tmp_path / "node", starts) as appliance:
        for _ in range(3):
            ask(appliance, appliance.machine.policy)
        with appliance.connect() as session:
            source, verdict = logsource.NodeSource(session.read_log), session.verdict
            origin, keys = verdict.log_origin, boot_keys(verdict)
            checked = verify_log(source, origin, keys, rules=Rules.BOOT)
            assert checked.counts == {"epoch": 1, "intent": 3, "outcome": 3}
            old = Checkpoint(origin=origin, size=verdict.claims.log_size, root=verdict.claims.log_root)
            verify_log(source, origin, keys, rules=Rules.BOOT, since=old)
            with pytest.raises(LogError) as caught:
                source.inclusion(7, checked.checkpoint)
            assert caught.value.code == "log.range"


def test_the_commands(tmp_path: Path, starts: Starts, capsys: pytest.CaptureFixture[str]) -> None:
    def ran(*argv: object, exit_code: int = 0) -> dict[str, Any]:
        assert cli.main(["log", *map(str, argv), "--json"]) == exit_code
        value: dict[str, Any] = json.loads(capsys.readouterr().out)
        return value

    with node(tmp_path / "node", starts) as appliance:
        boot = tmp_path / "node" / "log" / appliance.machine.keyring.boot_id.hex()
        ask(appliance, appliance.machine.policy)
        starts.append(appliance, tmp_path / "node")
        deadline = time.monotonic() + 10
        while ran("verify", boot)["size"] < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        shutil.copy(boot / "checkpoint", tmp_path / "old")
        ask(appliance, appliance.machine.policy)
        policy = tmp_path / "policy.toml"
        live = replace(appliance.machine.policy, created=int(time.time()) - 60, not_after=int(time.time()) + 600)
        policy.write_text(encode_policy(live))
    checked = ran("verify", boot)
    assert (checked["size"], checked["leaves"]) == (5, {"epoch": 1, "intent": 2, "outcome": 2})
    assert "nobody vouches" in checked["keys"]
    assert ran("verify", boot, "--since", tmp_path / "old")["verification"] == "accept"
    assert ran("consistency", boot, tmp_path / "old")["old_size"] == 3
    assert ran("inclusion", boot, 4)["index"] == 4
    assert ran("inclusion", boot, 5, exit_code=21)["code"] == "log.range"
    assert ran("verify", starts.path, "--operator", exit_code=1)["code"] == "usage.log"
    vkeys = starts.path / "vkeys"
    assert ran("verify", starts.path, "--operator", "--key", vkeys)["leaves"] == {"epoch": 1}
    assert ran("verify", boot, "--key", vkeys, exit_code=21)["code"] == "log.origin"
    save_keys(W2, tmp_path / "w2")
    start = ("witness", boot, "--state", tmp_path / "starts-state", "--key", tmp_path / "w2")
    assert ran(*start, "--out", tmp_path / "start")["size"] == 5
    assert len(parse_note((tmp_path / "start").read_bytes()).signatures) == 4
    assert ran("witness", starts.path, *start[2:], exit_code=1)["code"] == "usage.log"
    shown = ran("keygen", "w.example/9", "--out", tmp_path / "w9")["vkeys"]
    assert len(shown) == 2
    save_keys(W1, tmp_path / "w1")
    follow = ("witness", starts.path, "--state", tmp_path / "state", "--key", tmp_path / "w1", "--operator", vkeys)
    assert ran(*follow, "--out", tmp_path / "cosigned")["size"] == 1
    assert ran(*follow)["cosigned"] is None
    notes = (tmp_path / "cosigned").read_bytes(), (starts.path / "checkpoint").read_bytes()
    assert [len(parse_note(note).signatures) for note in notes] == [4, 4]
    assert operator_log.take_cosigned(starts.path, tmp_path / "cosigned")["size"] == 1
