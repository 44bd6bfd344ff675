"""Proofs made after the answer get into its bundle, tied to its receipt by the log's own files; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from countermark import logsource
from countermark.bundle import Bundle, encode_bundle, parse_bundle, read_bundle, write_bundle
from countermark.cli import main
from countermark.errors import CountermarkError
from countermark.formats import cbor
from countermark.formats.anchors import Anchor, AnchorKind, encode_anchors, parse_anchors
from countermark.formats.receipt import parse_receipt
from countermark.formats.witnessed import Witnessed, encode_witnessed, parse_receipt_witness
from countermark.later import add_anchors, add_epoch, add_witness
from countermark.logkeys import new_keys
from countermark.policy import Policy, WitnessRule
from countermark.tlog.checkpoint import parse_checkpoint_text, parse_note
from countermark.tlog.cosignature import with_lines
from countermark.verify import verify_bundle
from countermark.witness import verify_receipt_witness
from one_answer import NOW, World, make_world

WITNESS = new_keys("witness.example/1")


@dataclass
class Grown:
    """An answer's bundle, and the published log of its node after it had gone on and ended."""

    world: World
    bundle: Bundle
    log: Path
    head: bytes  # the last checkpoint, cosigned

    @property
    def source(self) -> logsource.TileSource:
        return logsource.directory(self.log)

    @property
    def receipts(self) -> bytes:
        """The receipt's own checkpoint."""
        return parse_receipt(self.bundle.receipt).payload.checkpoint


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    folder = tmp_path_factory.mktemp("later")
    world = make_world(folder)
    for _ in range(5):
        world.machine.outcome(world.machine.intent(world.verdict))
    world.machine.recorder.close()
    log = folder / "log" / world.verdict.boot_id.hex()
    note = (log / "checkpoint").read_bytes()
    return Grown(world, world.bundle(), log, cosigned(note))


def cosigned(note: bytes) -> bytes:
    return with_lines(note, WITNESS.cosign(parse_checkpoint_text(parse_note(note).text), NOW))


def asking(world: World) -> Policy:
    """Wants the receipt's log witnessed; for the operator log any key will do, since no EPOCH is looked at here."""
    operator = new_keys("operator.example/log").as_log
    required = {"witnesses": WITNESS.as_witness, "witnesses_required": 1, "operator_log": operator}
    return replace(world.machine.policy, **required, witnessed=WitnessRule.EPOCH_AND_RECEIPT)  # type: ignore[arg-type]


def anchor(note: bytes, token: bytes = b"token", proof: tuple[bytes, ...] = ()) -> Anchor:
    return Anchor(kind=AnchorKind.RFC3161, checkpoint=note, proof=proof, token=token)


def test_a_cosigned_note_gets_its_proof_from_the_log(grown: Grown) -> None:
    bundle = parse_bundle(encode_bundle(add_witness(grown.bundle, grown.head, grown.source)))
    assert bundle.witness is not None
    witness = parse_receipt_witness(bundle.witness)
    assert (witness.checkpoint, len(witness.proof) > 0) == (grown.head, True)
    verified = verify_bundle(bundle, grown.world.machine.policy, NOW)
    checks = verify_receipt_witness(bundle.witness, verified.receipt, asking(grown.world))
    assert "witnessed by witness.example/1" in checks[-1].detail
    assert add_witness(grown.bundle, bundle.witness, None) == bundle  # it may come with its proof, too


def test_the_receipts_own_checkpoint_needs_none(grown: Grown) -> None:
    bundle = add_witness(grown.bundle, cosigned(grown.receipts), None)
    assert bundle.witness is not None
    assert parse_receipt_witness(bundle.witness).proof == ()
    verified = verify_bundle(bundle, grown.world.machine.policy, NOW)
    verify_receipt_witness(bundle.witness, verified.receipt, asking(grown.world))


def test_anchors_gather(grown: Grown) -> None:
    first, second = encode_anchors((anchor(grown.receipts),)), encode_anchors((anchor(grown.head, b"other"),))
    one = add_anchors(grown.bundle, first, None)
    two = add_anchors(one, second, grown.source)
    assert add_anchors(two, first, None) == two == add_anchors(two, second, grown.source)
    assert two.anchors is not None
    assert [item.token for item in parse_anchors(two.anchors)] == [b"token", b"other"]
    assert [bool(item.proof) for item in parse_anchors(two.anchors)] == [False, True]
    assert parse_bundle(encode_bundle(two)) == two


def stale(grown: Grown) -> bytes:
    return cosigned(grown.world.committed.acceptance.checkpoint)


def foreign(grown: Grown) -> bytes:
    """The log's head with another root."""
    lines = grown.head.split(b"\n")
    lines[2] = (b"B" if lines[2][:1] != b"B" else b"C") + lines[2][1:]
    return b"\n".join(lines)


REFUSED: dict[str, tuple[str, Callable[[Grown], Bundle]]] = {
    "a later note without the log": ("usage.proof", lambda g: add_witness(g.bundle, g.head, None)),
    "a later anchor without the log": (
        "usage.proof",
        lambda g: add_anchors(g.bundle, encode_anchors((anchor(g.head),)), None),
    ),
    "a note from before the receipt": ("log.range", lambda g: add_witness(g.bundle, stale(g), g.source)),
    "an anchor from before the receipt": (
        "log.range",
        lambda g: add_anchors(g.bundle, encode_anchors((anchor(stale(g)),)), g.source),
    ),
    "a head that is not the log's": ("log.consistency", lambda g: add_witness(g.bundle, foreign(g), g.source)),
    "no note": ("tlog.note", lambda g: add_witness(g.bundle, b"hello", g.source)),
    "CBOR of something else": ("receipt_witness.field", lambda g: add_witness(g.bundle, b"\xa0", None)),
    "an EPOCH that is none": ("witnessed.field", lambda g: add_epoch(g.bundle, b"\xa0")),
    "anchors that are none": ("anchors.field", lambda g: add_anchors(g.bundle, b"\xa0", None)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_belong_to_the_receipt_is_refused(grown: Grown, name: str) -> None:
    code, add = REFUSED[name]
    with pytest.raises(CountermarkError) as caught:
        add(grown)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("part", "code"), [("epoch", "witnessed.field"), ("witness", "receipt_witness.field"), ("anchors", "anchors.field")]
)
def test_no_byte_of_a_later_proof_is_unaccounted_for(grown: Grown, part: str, code: str) -> None:
    """Whether a policy asks for it or not."""
    for data, wanted in ((b"\xa0", code), (b"", "cbor.malformed"), (cbor.encode({"v": 2}), code)):
        with pytest.raises(CountermarkError) as caught:
            parse_bundle(encode_bundle(replace(grown.bundle, **{part: data})))  # type: ignore[arg-type]
        assert caught.value.code == wanted


def test_an_epoch_comes_in_as_it_is(grown: Grown) -> None:
    note = grown.receipts
    proofs = {"proof": (), "checkpoint": note, "boot_proof": (), "boot_checkpoint": note}
    data = encode_witnessed(Witnessed(record=b"r", salt=bytes(32), index=0, **proofs))  # type: ignore[arg-type]
    bundle = parse_bundle(encode_bundle(add_epoch(grown.bundle, data)))
    assert bundle.epoch == data


def test_the_command_adds_them(grown: Grown, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "a.cmk", grown.bundle)
    (tmp_path / "head").write_bytes(grown.head)
    for name, note in (("0", grown.receipts), ("1", grown.head)):
        (tmp_path / name).write_bytes(encode_anchors((anchor(note, name.encode()),)))
    command = ["bundle", "add", str(tmp_path / "a.cmk"), "--witness", str(tmp_path / "head")]
    command += ["--anchor", str(tmp_path / "0"), "--anchor", str(tmp_path / "1")]
    assert main(command) == 1
    assert "usage.proof" in capsys.readouterr().err
    assert not (tmp_path / "a.added.cmk").exists()
    assert main([*command, "--log", str(grown.log)]) == 0
    assert "not verified" in capsys.readouterr().err
    added = read_bundle(tmp_path / "a.added.cmk")
    both = (anchor(grown.receipts, b"0"), anchor(grown.head, b"1"))
    expected = add_anchors(add_witness(grown.bundle, grown.head, grown.source), encode_anchors(both), grown.source)
    assert added == expected
    assert main(["bundle", "show", str(tmp_path / "a.added.cmk")]) == 0
    shown = capsys.readouterr().out
    assert "witness.cbor" in shown
    assert "anchors.cbor" in shown
    again = [
        "bundle",
        "add",
        str(tmp_path / "a.added.cmk"),
        "--witness",
        str(tmp_path / "head"),
        "--log",
        str(grown.log),
    ]
    assert main(again) == 1
    assert "usage.bundle" in capsys.readouterr().err
