"""Records and leaves: strict both ways, and the commitments as the module states them, recomputed by hand."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_values import SAMPLING, STACK, ZERO

from countermark.errors import FormatError
from countermark.formats import records
from countermark.formats.records import (
    Abort,
    Crashed,
    Divergence,
    Epoch,
    Grammar,
    Intent,
    Kind,
    Leaf,
    Outcome,
    Previous,
    Replay,
)

INTENT = Intent(
    boot_id=ZERO,
    request_id=bytes(16),
    nonce=ZERO,
    accepted_us=1,
    quote_digest=ZERO,
    raw_request=ZERO,
    prompt=ZERO,
    prompt_tokens=ZERO,
    stack=STACK,
    sampling=SAMPLING,
    max_tokens=4,
    stop=("\n", "é"),
    stop_tokens=(2,),
    ignore_eos=False,
    logprobs=False,
    deployer_id=None,
    retention_until="2030-01-01",
)
GRAMMAR = Grammar(kind="regex", text=ZERO, library="llguidance", version="1.9.1", rules=1)
CONSTRAINED = replace(INTENT, grammar=GRAMMAR)
OUTCOME = Outcome(
    boot_id=ZERO,
    intent_leaf=ZERO,
    output_tokens=ZERO,
    output_text=ZERO,
    fingerprints=ZERO,
    prompt_count=3,
    cached_count=0,
    output_count=2,
    finish_reason="eos",
    first_token_us=None,
    ended_us=9,
)
PREVIOUS = Previous(boot_id=ZERO, size=3, root=ZERO, epoch_leaf=ZERO, crashed=1, torn_bytes=0)
EPOCH = Epoch(
    boot_id=ZERO,
    origin="op.example/00",
    epoch=2,
    started_us=1,
    evidence_digest=ZERO,
    keys_digest=ZERO,
    stack=STACK,
    previous=PREVIOUS,
)
ABORT = Abort(boot_id=ZERO, intent_leaf=ZERO, reason="cancelled", tokens_sent=1, ended_us=1)
CRASHED = Crashed(boot_id=ZERO, previous_boot_id=ZERO, intent_leaf=ZERO)
DIVERGENCE = Divergence(
    part="diverged", position=3, recorded_token=7, local_token=None, fingerprint_equal=False, logit_gap=0.5
)
REPLAY = Replay(
    boot_id=ZERO,
    nonce=ZERO,
    quote_digest=ZERO,
    receipt_digest=ZERO,
    mode="regenerate",
    result="diverged",
    positions=9,
    divergence=DIVERGENCE,
    stack=STACK,
    started_us=1,
    ended_us=2,
)
IDENTICAL = replace(REPLAY, result="identical", divergence=None)
ALL = (EPOCH, replace(EPOCH, previous=None), INTENT, CONSTRAINED, OUTCOME, ABORT, CRASHED, REPLAY, IDENTICAL)
WRONG = {
    "bytes": [b"short", bytes(33), "text", None, 1],
    "int": [-1, 2**64, 1.0, True, "1", None],
    "float": [1, "1", None, True],
    "str": [b"bytes", 1, None, "x" * 5000],
    "bool": [0, 1, None],
    "tuple[str, ...]": ["text", [1], None, ["x"] * 1025],
    "tuple[int, ...]": [[-1], [True], ["1"], None],
    "tuple[tuple[int, float], ...]": [[[1, 1]], [[2, 0.5], [1, 0.5]], [[1, 0.5], [1, 0.5]], [[1]], [1]],
}


@pytest.mark.parametrize("record", ALL)
def test_records_round_trip(record: records.Record) -> None:
    data = records.encode_record(record)
    assert records.parse_record(data, records.kind_of(record)) == record
    assert cbor2.loads(data)["type"] == records.kind_of(record).value


def test_a_replay_has_a_divergence_exactly_when_it_diverged() -> None:
    for record in (REPLAY, IDENTICAL):
        assert records.parse_replay(records.encode_record(record)) == record
    for record in (replace(REPLAY, divergence=None), replace(IDENTICAL, divergence=DIVERGENCE)):
        with pytest.raises(FormatError) as err:
            records.parse_replay(records.encode_record(record))
        assert err.value.code == "record.field"


@pytest.mark.parametrize("record", ALL)
def test_every_field_is_typed(record: records.Record) -> None:
    kind = records.kind_of(record)
    whole = cbor2.loads(records.encode_record(record))
    tried = 0
    parts = [((), record)]
    inner = {"stack": STACK, "sampling": SAMPLING, "divergence": DIVERGENCE, "grammar": GRAMMAR}
    parts += [((name,), value) for name, value in inner.items() if whole.get(name) is not None]
    for path, part in parts:
        for item in fields(part):  # type: ignore[arg-type]
            annotation = str(item.type)
            for wrong in WRONG.get(annotation.removesuffix(" | None"), ["text"]):
                if wrong is None and annotation.endswith("| None"):
                    continue
                changed = cbor2.loads(cbor2.dumps(whole))
                target = changed[path[0]] if path else changed
                target[item.name] = wrong
                with pytest.raises(FormatError):
                    records.parse_record(encoded(changed), kind)
                tried += 1
            for change in ("missing", "extra"):
                changed = cbor2.loads(cbor2.dumps(whole))
                target = changed[path[0]] if path else changed
                if change == "missing":
                    if item.name == "grammar":  # may be missing: the test below
                        continue
                    del target[item.name]
                else:
                    target["surprise"] = 1
                with pytest.raises(FormatError):
                    records.parse_record(encoded(changed), kind)
    assert tried > 10


def test_no_grammar_has_one_encoding() -> None:
    """Records from before there were grammars stay what they were: the field is absent, never null."""
    plain, constrained = (cbor2.loads(records.encode_record(record)) for record in (INTENT, CONSTRAINED))
    assert "grammar" not in plain
    assert constrained["grammar"]["kind"] == "regex"
    assert records.parse_intent(encoded({name: constrained[name] for name in plain})) == INTENT
    with pytest.raises(FormatError) as err:
        records.parse_intent(encoded(plain | {"grammar": None}))
    assert err.value.code == "record.field"
    assert (INTENT.salted, CONSTRAINED.salted) == (
        ("prompt", "prompt_tokens", "raw_request"),
        ("prompt", "prompt_tokens", "raw_request", "grammar.text"),
    )


def encoded(value: object) -> bytes:
    from countermark.formats import cbor

    try:
        return cbor.encode(value)
    except FormatError:
        return b"\xff"


@pytest.mark.parametrize(
    ("record", "change"),
    [
        (OUTCOME, {"finish_reason": "cancelled"}),
        (ABORT, {"reason": "eos"}),
        (INTENT, {"nonce": bytes(31)}),
        (INTENT, {"sampling": replace(SAMPLING, seed_origin="nobody")}),
        (INTENT, {"sampling": replace(SAMPLING, top_p_20bit=2**20 + 1)}),
        (INTENT, {"sampling": replace(SAMPLING, temperature=float("nan"))}),
        (INTENT, {"sampling": replace(SAMPLING, logit_bias=((9, 0.5), (3, 0.5)))}),
        (INTENT, {"stack": replace(STACK, platform="magic")}),
        (INTENT, {"max_tokens": True}),
        (INTENT, {"grammar": replace(GRAMMAR, kind="lark")}),
        (INTENT, {"grammar": replace(GRAMMAR, rules=-1)}),
        (REPLAY, {"mode": "guess"}),
        (REPLAY, {"result": "undecidable"}),
        (REPLAY, {"divergence": replace(DIVERGENCE, part="elsewhere")}),
    ],
)
def test_encoding_refuses_what_parsing_would(record: records.Record, change: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        records.encode_record(replace(record, **change))  # type: ignore[arg-type]


def test_one_kind_is_not_another() -> None:
    for record in ALL:
        data = records.encode_record(record)
        for kind in Kind:
            if kind is not records.kind_of(record):
                with pytest.raises(FormatError) as caught:
                    records.parse_record(data, kind)
                assert caught.value.code == "record.type"


def test_commitments_by_hand() -> None:
    salt = bytes(range(32))
    assert records.commitment(Kind.INTENT, salt, b"record") == sha(b"countermark/leaf/v1intent", salt, b"record")
    field = records.field_commitment("prompt", salt, b"value")
    assert field == sha(b"countermark/field/v1\x06prompt", salt, b"value")
    names = [kind.value for kind in Kind]
    assert not any(a != b and b.startswith(a) for a in names for b in names)  # so `type || salt` is unambiguous
    for bad in (b"", bytes(31), bytes(33)):
        with pytest.raises(FormatError):
            records.commitment(Kind.INTENT, bad, b"")
        with pytest.raises(FormatError):
            records.field_commitment("prompt", bad, b"")


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def test_leaves_round_trip_and_are_strict() -> None:
    for kind in Kind:
        ends = kind in (Kind.OUTCOME, Kind.ABORT, Kind.CRASHED)
        leaf = Leaf(kind=kind, boot_id=ZERO, sequence=7, intent_leaf=ZERO if ends else None, commitment=ZERO)
        data = records.encode_leaf(leaf)
        assert records.parse_leaf(data) == leaf
        assert records.leaf_digest(leaf) == sha(b"\0", data)
        assert len(data) < 300
        for bad in (
            replace(leaf, intent_leaf=None if ends else ZERO),
            replace(leaf, boot_id=bytes(31)),
            replace(leaf, commitment=b""),
            replace(leaf, sequence=-1),
        ):
            with pytest.raises(FormatError):
                records.parse_leaf(records.encode_leaf(bad))
        for at in range(0, len(data), 3):
            changed = data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :]
            try:
                assert records.parse_leaf(changed) != leaf
            except FormatError:
                continue


def test_salts_are_exact() -> None:
    salts = dict.fromkeys(records.INTENT_FIELDS, ZERO)
    assert records.parse_salts(records.encode_salts(salts), records.INTENT_FIELDS) == salts
    for bad in ({}, {**salts, "more": ZERO}, {**salts, "prompt": b"short"}, {**salts, "prompt": "text"}):
        with pytest.raises(FormatError):
            records.parse_salts(encoded(bad), records.INTENT_FIELDS)


def test_inputs_are_one_or_the_other() -> None:
    assert records.encode_input(prompt="a") != records.encode_input(messages=[("user", "a")])
    for bad in ({}, {"prompt": "a", "messages": []}):
        with pytest.raises(FormatError):
            records.encode_input(**bad)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(list(Kind)))
def test_arbitrary_bytes(data: bytes, kind: Kind) -> None:
    for parse in (records.parse_leaf, lambda data: records.parse_record(data, kind)):
        with pytest.raises(FormatError):
            parse(data)
