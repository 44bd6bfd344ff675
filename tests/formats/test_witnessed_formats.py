"""Operator leaves, what clients are shown of them, sidecars: strict, and back to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import one_answer
from countermark.errors import FormatError, LogError
from countermark.formats import cbor
from countermark.formats.records import Epoch, Previous, encode_record
from countermark.formats.witnessed import (
    Growth,
    ReceiptWitness,
    Sidecar,
    Witnessed,
    boot_leaf,
    encode_operator_leaf,
    encode_receipt_witness,
    encode_sidecar,
    encode_witnessed,
    parse_operator_leaf,
    parse_receipt_witness,
    parse_sidecar,
    parse_witnessed,
)
from countermark_appliance.platform.keyring import Keyring

KEYRING = Keyring()
SALT = bytes(range(32))


def epoch(boot: bytes = bytes(32), previous: bytes | None = None) -> Epoch:
    return Epoch(
        boot_id=boot,
        origin="op.example/" + boot.hex(),
        epoch=1,
        started_us=0,
        evidence_digest=bytes(32),
        keys_digest=KEYRING.digest(),
        stack=one_answer.stack(bytes(32)),
        previous=None
        if previous is None
        else Previous(boot_id=previous, size=1, root=bytes(32), epoch_leaf=bytes(32), crashed=0, torn_bytes=0),
    )


RECORD = encode_record(epoch())
WITNESSED = Witnessed(
    record=RECORD,
    salt=SALT,
    index=7,
    proof=(bytes(32),) * 3,
    checkpoint=b"note",
    boot_proof=(),
    boot_checkpoint=b"note",
)
SIDECAR = Sidecar(epoch=epoch(), salt=SALT, keys=KEYRING.role_keys())
FORMS: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {
    "operator_leaf": (encode_operator_leaf(RECORD, SALT), parse_operator_leaf),
    "witnessed": (encode_witnessed(WITNESSED), parse_witnessed),
    "receipt_witness": (encode_receipt_witness(ReceiptWitness(checkpoint=b"n", proof=(SALT,))), parse_receipt_witness),
    "epoch": (encode_sidecar(SIDECAR), parse_sidecar),
}


def test_values_come_back() -> None:
    assert parse_witnessed(encode_witnessed(WITNESSED)) == WITNESSED
    assert parse_sidecar(encode_sidecar(SIDECAR)) == SIDECAR
    leaf = parse_operator_leaf(encode_operator_leaf(RECORD, SALT))
    assert (leaf.record, leaf.salt, leaf.epoch) == (RECORD, SALT, epoch())
    witness = ReceiptWitness(checkpoint=b"n", proof=(SALT,))
    assert parse_receipt_witness(encode_receipt_witness(witness)) == witness


def test_the_entry_is_the_documented_map() -> None:
    assert cbor.decode(FORMS["operator_leaf"][0]) == {"v": 1, "type": "operator-epoch", "record": RECORD, "salt": SALT}
    assert cbor.decode(boot_leaf(RECORD, SALT))["type"] == "epoch"


@pytest.mark.parametrize("form", FORMS)
def test_every_field_is_there_once_and_typed(form: str) -> None:
    data, parse = FORMS[form]
    value = cbor.decode(data)
    for name in value:
        for wrong in (None, "text" if not isinstance(value[name], str) else b"bytes", -1, {}):
            with pytest.raises(FormatError):
                parse(cbor.encode({**value, name: wrong}))
        with pytest.raises(FormatError) as caught:
            parse(cbor.encode({key: item for key, item in value.items() if key != name}))
        assert caught.value.code == f"{form}.field"
    with pytest.raises(FormatError) as caught:
        parse(cbor.encode({**value, "more": 1}))
    assert caught.value.code == f"{form}.field"
    with pytest.raises(FormatError):
        parse(data + b"\0")
    if "v" in value:
        with pytest.raises(FormatError):
            parse(cbor.encode({**value, "v": 2}))
    if "salt" in value:
        with pytest.raises(FormatError):
            parse(cbor.encode({**value, "salt": SALT[:-1]}))


@pytest.mark.parametrize("proof", [[b"short"], [bytes(32)] * 64, [1], ["x" * 32]])
def test_proofs_are_capped(proof: list[object]) -> None:
    for form, name in (("witnessed", "proof"), ("witnessed", "boot_proof"), ("receipt_witness", "proof")):
        data, parse = FORMS[form]
        with pytest.raises(FormatError) as caught:
            parse(cbor.encode({**cbor.decode(data), name: proof}))
        assert caught.value.code == f"{form}.field"


def test_an_operator_leaf_of_another_type_or_record() -> None:
    data, parse = FORMS["operator_leaf"]
    for change, code in (({"type": "epoch"}, "operator_leaf.type"), ({"record": b"\xa0"}, "record.type")):
        with pytest.raises(FormatError) as caught:
            parse(cbor.encode({**cbor.decode(data), **change}))
        assert caught.value.code == code


def test_a_sidecar_with_other_keys() -> None:
    other = Sidecar(epoch=epoch(), salt=SALT, keys=Keyring().role_keys())
    with pytest.raises(FormatError) as caught:
        parse_sidecar(encode_sidecar(other))
    assert caught.value.code == "epoch.keys"


@pytest.mark.parametrize("form", FORMS)
@given(data=st.binary(max_size=200), at=st.integers(0, 4000), mask=st.integers(1, 255))
def test_arbitrary_bytes(form: str, data: bytes, at: int, mask: int) -> None:
    good, parse = FORMS[form]
    at %= len(good)
    for candidate in (data, good[:at], good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :]):
        try:
            parse(candidate)
        except FormatError:
            continue


@given(st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 7)), max_size=12))
def test_the_rule_of_growth_against_a_plain_reading_of_it(starts: list[tuple[int, int | None]]) -> None:
    """The rule as the text has it, over lists."""
    growth, taken = Growth(), list[tuple[int, int | None]]()
    for boot, previous in starts:
        before = [item for item, _ in taken]
        followed = [item for _, item in taken if item is not None]
        fits = boot not in before and (previous is None or (previous in before and previous not in followed))
        record = epoch(bytes([boot]) * 32, None if previous is None else bytes([previous]) * 32)
        if fits:
            growth.add(record)
            taken.append((boot, previous))
        else:
            with pytest.raises(LogError) as caught:
                growth.add(record)
            assert caught.value.code in ("log.boot_twice", "log.unknown_previous", "log.fork")
