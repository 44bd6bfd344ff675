"""A redacted bundle proves what it did, says what is missing, and tells nobody whether a guess at it is right."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from countermark.bundle import Bundle, encode_bundle, entries_of, parse_bundle, redact, write_bundle
from countermark.checks import Status
from countermark.cli import main
from countermark.errors import CountermarkError, Undecidable
from countermark.formats import cbor, records
from countermark.formats.receipt import Acceptance, Answer, Placed, Redaction, Reply, parse_receipt
from countermark.policy import encode_policy
from countermark.replayer import replay
from countermark.verify import verify_bundle
from countermark.wire import countermark_v1_pb2 as pb
from one_answer import FINGERPRINTS, INPUT, NOW, OUTPUT_TOKENS, PROMPT_TOKENS, REQUEST, TEXT, World

WAYS = {"prompt": ("prompt",), "output": ("output",), "prompt and output": ("prompt", "output")}
SKIPPED = {"prompt": {"12", "13", "17"}, "output": {"17"}, "prompt and output": {"12", "13", "17"}}
QUESTION = b"Which city is the capital of France?"


def redacted(world: World, way: str) -> Bundle:
    return redact(world.bundle(), **dict.fromkeys(WAYS[way], True))


@pytest.mark.parametrize("way", WAYS)
def test_it_verifies_and_says_what_is_missing(world: World, way: str) -> None:
    bundle = parse_bundle(encode_bundle(redacted(world, way)))
    whole = verify_bundle(world.bundle(), world.machine.policy, NOW)
    verified = verify_bundle(bundle, world.machine.policy, NOW)
    assert tuple(part.value for part in verified.redacted) == WAYS[way]
    assert f"redacted: {', '.join(WAYS[way])}" in str(verified)
    value = verified.as_json()
    assert (value["verification"], value["redacted"]) == ("accept", list(WAYS[way]))
    assert value["receipt"] == whole.as_json()["receipt"]
    before = {check.step for check in whole.checks if check.status is Status.SKIP}
    skips = {check.step: check.detail for check in verified.checks if check.status is Status.SKIP}
    assert skips.keys() == before | SKIPPED[way]
    assert all("left out" in skips[step] for step in SKIPPED[way])
    assert [check.step for check in verified.checks] == [check.step for check in whole.checks]
    assert "redacted" not in str(whole)
    assert whole.as_json()["redacted"] == []


@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_it_is_replayed(world: World, way: str) -> None:
    verified = verify_bundle(redacted(world, way), world.machine.policy, NOW)
    with pytest.raises(Undecidable) as caught:
        replay(verified, object())  # type: ignore[arg-type]
    assert caught.value.code == "replay.redacted"


def test_redacting_twice_or_in_either_order_is_the_same(world: World) -> None:
    both = redacted(world, "prompt and output")
    for first, second in itertools.permutations(("prompt", "output")):
        once = redact(world.bundle(), **{first: True})
        assert redact(once, **{first: True}) == once
        assert redact(once, **{second: True}) == both
    assert redact(world.bundle()) == world.bundle()


# Nothing by half.


def accepted_with(world: World, **values: object) -> bytes:
    """accepted.cbor as redaction leaves it, with some values put back."""
    return cbor.encode(cbor.decode(entries_of(redacted(world, "prompt"))["accepted.cbor"]) | values)


def answer_with(world: World, way: str, **values: object) -> bytes:
    return cbor.encode(cbor.decode(entries_of(redacted(world, way))["answer.cbor"]) | values)


def salts(world: World, *names: str) -> bytes:
    known = records.parse_salts(world.answer.field_salts, records.OUTCOME_FIELDS)
    return records.encode_salts({name: known[name] for name in names})


def packed(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, **changed: bytes | None) -> bytes:
    """The file with some entries replaced, or left out."""
    entries = {**entries_of(bundle), **{name.replace("_", "."): data for name, data in changed.items()}}
    ordered = {name: entries[name] for name in sorted(entries, key=ORDER.index) if entries[name] is not None}
    with monkeypatch.context() as patch:
        patch.setattr("countermark.bundle.entries_of", lambda _: ordered)
        return encode_bundle(bundle)


ORDER = ("request.bin", "accepted.cbor", "answer.cbor", "receipt.cose", "evidence.cbor", "measurements.json")
HALVES: dict[str, tuple[str, Callable[[World], dict[str, bytes | None]]]] = {
    "the prompt's salts kept": (
        "prompt",
        lambda w: {"accepted_cbor": accepted_with(w, field_salts=w.committed.acceptance.field_salts)},
    ),
    "one salt kept": (
        "prompt",
        lambda w: {"accepted_cbor": accepted_with(w, field_salts=records.encode_salts({"prompt": bytes(32)}))},
    ),
    "the prompt's tokens kept": ("prompt", lambda w: {"accepted_cbor": accepted_with(w, prompt_tokens=PROMPT_TOKENS)}),
    "tokens and salts kept": (
        "prompt",
        lambda w: {"accepted_cbor": entries_of(w.bundle())["accepted.cbor"]},
    ),
    "the request kept": ("prompt", lambda _: {"request_bin": REQUEST}),
    "an empty request": ("prompt", lambda _: {"request_bin": b""}),
    "the request alone left out": ("nothing", lambda _: {"request_bin": None}),
    "fingerprints kept": (
        "prompt",
        lambda w: {"answer_cbor": answer_with(w, "prompt", fingerprints=b"".join(FINGERPRINTS))},
    ),
    "fingerprints and their salt kept": ("prompt", lambda w: {"answer_cbor": entries_of(w.bundle())["answer.cbor"]}),
    "the fingerprints' salt kept": (
        "prompt",
        lambda w: {"answer_cbor": answer_with(w, "prompt", field_salts=salts(w, *records.OUTCOME_FIELDS))},
    ),
    "a salt of its own name": (
        "prompt",
        lambda w: {
            "answer_cbor": answer_with(
                w, "prompt", field_salts=cbor.encode({**cbor.decode(w.answer.field_salts), "raw_request": bytes(32)})
            )
        },
    ),
    "fingerprints left out beside the prompt": (
        "nothing",
        lambda w: {"answer_cbor": entries_of(redacted(w, "prompt"))["answer.cbor"]},
    ),
    "the output's tokens kept": ("output", lambda w: {"answer_cbor": answer_with(w, "output", tokens=OUTPUT_TOKENS)}),
    "the text kept": ("output", lambda w: {"answer_cbor": answer_with(w, "output", text=TEXT)}),
    "an empty text": ("output", lambda w: {"answer_cbor": answer_with(w, "output", text="")}),
    "the output's fingerprints kept": (
        "output",
        lambda w: {"answer_cbor": answer_with(w, "output", fingerprints=b"".join(FINGERPRINTS))},
    ),
    "the output's salts kept": (
        "output",
        lambda w: {"answer_cbor": answer_with(w, "output", field_salts=w.answer.field_salts)},
    ),
    "all but the text": (
        "output",
        lambda w: {
            "answer_cbor": answer_with(
                w, "output", tokens=OUTPUT_TOKENS, fingerprints=b"".join(FINGERPRINTS), field_salts=w.answer.field_salts
            )
        },
    ),
}


@pytest.mark.parametrize("name", HALVES)
def test_nothing_redacted_by_half_passes(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, change = HALVES[name]
    bundle = world.bundle() if way == "nothing" else redacted(world, way)
    with pytest.raises(CountermarkError) as caught:
        parse_bundle(packed(monkeypatch, bundle, **change(world)))
    assert caught.value.code == "bundle.redaction"


def test_a_bundle_redacted_by_half_cannot_be_made(world: World) -> None:
    whole, less = world.bundle(), redacted(world, "prompt")
    for part in ("request", "acceptance", "answer"):
        with pytest.raises(CountermarkError) as caught:
            replace(whole, **{part: getattr(less, part)})
        assert caught.value.code == "bundle.redaction"


def put_back(world: World, way: str) -> dict[str, object]:
    """What somebody who has only the redacted bundle can put in its place: a guess, and salts of their own."""
    known = dict.fromkeys(records.INTENT_FIELDS, bytes(32)), dict.fromkeys(records.OUTCOME_FIELDS, bytes(32))
    placed = {item.name: getattr(world.committed.acceptance, item.name) for item in fields(Placed)}
    acceptance = Acceptance(**placed, prompt_tokens=PROMPT_TOKENS, field_salts=records.encode_salts(known[0]))
    answer = Answer(
        tokens=OUTPUT_TOKENS, text=TEXT, fingerprints=FINGERPRINTS, field_salts=records.encode_salts(known[1])
    )
    return {"answer": answer} if way == "output" else {"request": REQUEST, "acceptance": acceptance, "answer": answer}


@pytest.mark.parametrize(("way", "code"), [("prompt", "receipt.request"), ("output", "receipt.output_tokens")])
def test_what_was_left_out_cannot_be_put_back(world: World, way: str, code: str) -> None:
    bundle = replace(redacted(world, way), **put_back(world, way))  # type: ignore[arg-type]
    with pytest.raises(CountermarkError) as caught:
        verify_bundle(bundle, world.machine.policy, NOW)
    assert caught.value.code == code


def test_what_is_left_is_checked_as_before(world: World) -> None:
    lies: list[tuple[str, str, dict[str, object]]] = [
        ("receipt.output_text", "prompt", {"answer": replace(redacted(world, "prompt").answer, text="Rome.")}),  # type: ignore[type-var]
        ("receipt.output_tokens", "prompt", {"answer": replace(redacted(world, "prompt").answer, tokens=(1,))}),  # type: ignore[type-var]
        ("receipt.prompt_tokens", "output", {"acceptance": replace(world.committed.acceptance, prompt_tokens=(1,))}),
        ("receipt.request", "output", {"request": REQUEST + b"\x28\x09"}),
        (
            "log.inclusion",
            "prompt and output",
            {"acceptance": replace(redacted(world, "prompt").acceptance, leaf_salt=bytes(32))},
        ),
        ("receipt.form", "prompt and output", {"receipt": b""}),
    ]
    for code, way, change in lies:
        with pytest.raises(CountermarkError) as caught:
            verify_bundle(replace(redacted(world, way), **change), world.machine.policy, NOW)  # type: ignore[arg-type]
        assert caught.value.code == code, (code, way)


@pytest.mark.parametrize(
    ("code", "intent", "outcome"),
    [
        ("receipt.counts", {}, {"cached_tokens": 5}),
        ("receipt.counts", {}, {"output_tokens": tuple(range(9)), "fingerprints": (bytes(16),) * 9}),
        ("receipt.finish_reason", {"stop_tokens": ()}, {}),  # `eos`, and no end-of-sequence token there is
        ("receipt.finish_reason", {"ignore_eos": True}, {}),
        ("receipt.finish_reason", {"stop": ()}, {"finish_reason": "stop"}),
        ("receipt.finish_reason", {}, {"finish_reason": "length"}),
        ("receipt.finish_reason", {}, {"output_tokens": (), "output_text": "", "fingerprints": ()}),
    ],
)
def test_an_end_that_cannot_be_is_refused_without_its_output(
    world: World, code: str, intent: dict[str, object], outcome: dict[str, object]
) -> None:
    machine = world.machine
    committed = machine.intent(world.verdict, **intent)
    completed = machine.outcome(committed, **outcome)
    receipt = machine.recorder.receipt(completed)
    bundle = redact(world.bundle(), prompt=True, output=True)
    placed = Placed(**{item.name: getattr(committed.acceptance, item.name) for item in fields(Placed)})
    with pytest.raises(CountermarkError) as caught:
        verify_bundle(replace(bundle, acceptance=placed, receipt=receipt), machine.policy, NOW)
    assert (caught.value.code, caught.value.step) == (code, "17")


# Who has the file and the public weights, and guesses.


def byte_strings(value: object) -> Iterable[bytes]:
    """Every byte string in a value, and in what a byte string encodes."""
    match value:
        case bytes():
            yield value
            try:
                inner = cbor.decode(value)
            except CountermarkError:
                return
            if not isinstance(inner, int | float | None):
                yield from byte_strings(inner)
        case str():
            yield value.encode()
        case list() | tuple():
            for item in value:
                yield from byte_strings(item)
        case dict():
            for key, item in value.items():
                yield from byte_strings(key)
                yield from byte_strings(item)


def known_values(bundle: Bundle) -> set[bytes]:
    """Every value in the file that could be a salt, a digest, or what was to be left out."""
    found: set[bytes] = set()
    for name, data in {**entries_of(bundle), "file": encode_bundle(bundle)}.items():
        found.add(data)
        if name.endswith(".cbor"):
            found.update(byte_strings(cbor.decode(data)))
        if name == "receipt.cose":
            found.update(byte_strings(cbor.decode(data[2:])))
            payload = parse_receipt(data).payload
            found.update((payload.intent.salt, payload.outcome.salt, payload.intent.record, payload.outcome.record))
    found.update(byte_strings(cbor.decode(_manifest(bundle))))
    return found


def _manifest(bundle: Bundle) -> bytes:
    data = encode_bundle(bundle)
    size = int.from_bytes(data[22:26], "little")
    return data[30 + len("manifest.cbor") :][:size]


GUESSES = {
    "prompt": {
        "raw_request": REQUEST,
        "prompt": INPUT,
        "prompt_tokens": records.encode_tokens(PROMPT_TOKENS),
        "fingerprints": b"".join(FINGERPRINTS),
        "text": QUESTION,
        "message": pb.GenerateRequest.FromString(REQUEST).chat.SerializeToString(),
    },
    "output": {
        "output_tokens": records.encode_tokens(OUTPUT_TOKENS),
        "output_text": TEXT.encode(),
        "fingerprints": b"".join(FINGERPRINTS),
    },
}
LABELS = (b"", b"countermark/field/v1", b"countermark/leaf/v1", b"intent", b"outcome")


def confirmed(bundle: Bundle, world: World, part: str) -> set[str]:
    """Which of the right guesses some value in the file confirms: it stands there, or a hash of it with what does.

    Tried as a salt: nothing, zeros, and every 32-byte value in the file; each under the field's label and under none.
    """
    values = known_values(bundle)
    whole = encode_bundle(bundle)
    keys = {b"", bytes(32), *(value for value in values if len(value) == 32)}
    right = set()
    entries = entries_of(world.bundle())
    left_out = {f"entry {name}": data for name, data in entries.items() if data != entries_of(bundle).get(name)}
    for name, guess in {**GUESSES[part], **left_out}.items():
        if guess in whole:
            right.add(name)
        field = bytes([len(name)]) + name.encode()
        for key in keys:
            tries = [b"countermark/field/v1" + field + key + guess]
            tries += [label + key + guess for label in LABELS]
            for data in (*tries, guess + key):
                for digest in (hashlib.sha256, hashlib.sha384, hashlib.blake2s):
                    if digest(data).digest() in values:
                        right.add(name)
    return right


def test_the_search_finds_what_is_there(world: World) -> None:
    """With its salts, the same search confirms every guess: it does not pass because it looks in the wrong place."""
    for part, guesses in GUESSES.items():
        found = confirmed(world.bundle(), world, part)
        assert found >= guesses.keys() - {"message"}, part
    kept = replace(
        redacted(world, "output"),
        epoch=cbor.encode({"salts": world.answer.field_salts}),  # as if one entry had carried them along
    )
    assert confirmed(kept, world, "output") >= {"output_tokens", "output_text", "fingerprints"}
    digest = hashlib.sha256(entries_of(world.bundle())["request.bin"]).digest()
    assert confirmed(replace(redacted(world, "prompt"), epoch=cbor.encode(digest)), world, "prompt") == {
        "raw_request",
        "entry request.bin",
    }


@pytest.mark.parametrize(("way", "part"), [(way, part) for way, parts in WAYS.items() for part in parts])
def test_a_right_guess_is_confirmed_by_nothing_in_the_file(world: World, way: str, part: str) -> None:
    assert confirmed(redacted(world, way), world, part) == set()


def test_no_salt_of_what_was_left_out_is_in_the_file(world: World) -> None:
    inputs = records.parse_salts(world.committed.acceptance.field_salts, records.INTENT_FIELDS)
    outputs = records.parse_salts(world.answer.field_salts, records.OUTCOME_FIELDS)
    gone = {"prompt": {*inputs.values(), outputs["fingerprints"]}, "output": set(outputs.values())}
    for way, parts in WAYS.items():
        data = encode_bundle(redacted(world, way))
        for part in parts:
            assert not [salt for salt in gone[part] if salt in data], (way, part)
    data = encode_bundle(redacted(world, "prompt"))
    assert outputs["output_text"] in data  # the output still opens


# The command.


@pytest.fixture
def files(world: World, tmp_path: Path) -> Path:
    write_bundle(tmp_path / "answer.cmk", world.bundle())
    (tmp_path / "policy.toml").write_text(encode_policy(world.machine.policy))
    return tmp_path


def verify(files: Path, name: str, *options: str) -> int:
    return main(["verify", str(files / name), "--policy", str(files / "policy.toml"), "--at", str(NOW), *options])


def test_the_command_makes_a_new_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (files / "answer.cmk").read_bytes()
    assert main(["bundle", "redact", str(files / "answer.cmk"), "--prompt"]) == 0
    said = capsys.readouterr().err
    assert "answer.redacted.cmk" in said
    assert "the output is still in it" in said
    assert (files / "answer.cmk").read_bytes() == whole
    assert verify(files, "answer.redacted.cmk", "--json") == 0
    assert json.loads(capsys.readouterr().out)["redacted"] == ["prompt"]
    assert main(["bundle", "redact", str(files / "answer.cmk"), "--prompt"]) == 1  # it is there already
    assert "usage.file" in capsys.readouterr().err
    out = files / "less.cmk"
    assert main(["bundle", "redact", "--out", str(out), "--output", str(files / "answer.redacted.cmk")]) == 0
    assert "still in it" not in capsys.readouterr().err
    assert verify(files, "less.cmk") == 0
    assert "redacted: prompt, output" in capsys.readouterr().out
    assert main(["bundle", "redact", str(files / "answer.cmk")]) == 1
    assert "usage.redact" in capsys.readouterr().err


def test_replaying_a_redacted_bundle_is_undecidable(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "redact", str(files / "answer.cmk"), "--output"]) == 0
    options = ["--policy", str(files / "policy.toml"), "--at", str(NOW), "--weights", str(files), "--json"]
    capsys.readouterr()
    assert main(["replay", str(files / "answer.redacted.cmk"), *options]) == 40
    value = json.loads(capsys.readouterr().out)
    assert (value["verification"], value["code"]) == ("undecidable", "replay.redacted")


def test_show_says_what_is_in_it_and_claims_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "show", str(files / "answer.cmk"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["verified"] is False
    assert value["entries"].keys() == set(ORDER)
    assert value["tokens"] == {"prompt": 4, "cached": 0, "output": 3}
    assert value["redacted"] == []
    assert main(["bundle", "show", str(files / "answer.cmk")]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("not verified")
    for text in ("PASS", "verified:", "France", TEXT):
        assert text not in said.out
    assert main(["bundle", "redact", str(files / "answer.cmk"), "--prompt"]) == 0
    assert main(["bundle", "show", str(files / "answer.redacted.cmk")]) == 0
    assert "redacted          prompt\n" in capsys.readouterr().out


def test_add_makes_a_file_with_one_more_entry(files: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(files / "bare.cmk", world.bundle(manifest=None))
    (files / "manifest.json").write_bytes(world.machine.manifest)
    command = ["bundle", "add", str(files / "bare.cmk"), "--manifest", str(files / "manifest.json")]
    assert main(command) == 0
    assert (files / "bare.added.cmk").read_bytes() == (files / "answer.cmk").read_bytes()
    assert main([*command, "--out", str(files / "bare.added.cmk")]) == 1
    assert main(["bundle", "add", str(files / "answer.cmk"), "--manifest", str(files / "manifest.json")]) == 1
    assert "usage.bundle" in capsys.readouterr().err
    assert main(["bundle", "add", str(files / "answer.cmk")]) == 1


def test_the_parts_and_their_names() -> None:
    assert [part.value for part in Redaction] == ["prompt", "output"]
    assert issubclass(Answer, Reply)
    assert issubclass(Acceptance, Placed)
