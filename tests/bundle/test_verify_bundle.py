"""A bundle is verified offline, and refused with the code of the check that its changed part belongs to."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from countermark.appraise import TimeBasis
from countermark.bundle import Bundle, encode_bundle, parse_bundle
from countermark.checks import Status
from countermark.errors import CountermarkError
from countermark.verify import Verification, verify_bundle
from countermark.wire import countermark_v1_pb2 as pb
from one_answer import NOW, TEXT, World, make_world


def refused(world: World, code: str, bundle: Bundle) -> CountermarkError:
    parsed = parse_bundle(encode_bundle(bundle))  # whoever changes a bundle can make its container fit
    with pytest.raises(CountermarkError) as caught:
        verify_bundle(parsed, world.machine.policy, NOW)
    assert caught.value.code == code
    assert caught.value.checks[-1].status is Status.FAIL
    return caught.value


def test_a_bundle_verifies_without_a_network(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    bundle = parse_bundle(encode_bundle(world.bundle()))
    verified = verify_bundle(bundle, world.machine.policy, NOW, time_basis=TimeBasis.NOW)
    steps = [check.step for check in verified.checks]
    assert steps == ["1", "2", "3", "4", "5", "6", "7b", "8", "9", "10", "11", *map(str, range(12, 21))]
    skipped = {check.step for check in verified.checks if check.status is Status.SKIP}
    assert skipped == {"9", "11", "20"}
    assert verified.receipt.answer.text == TEXT
    assert verified.witnesses == "unwitnessed"
    assert verified.verdict.time_basis is TimeBasis.NOW


def test_json_has_stable_keys_and_no_prompt(world: World) -> None:
    value = verify_bundle(world.bundle(), world.machine.policy, NOW).as_json()
    text = json.dumps(value)
    assert value.keys() == {"simulated", "verification", "redacted", "witnesses", "checks", "verdict", "receipt"}
    assert value["simulated"] is True
    assert value["verdict"]["time"] == {"value": NOW, "basis": "assumed"}
    assert "France" not in text
    assert TEXT not in text


def test_without_a_manifest_the_step_is_skipped(world: World) -> None:
    verified = verify_bundle(world.bundle(manifest=None), world.machine.policy, NOW)
    assert {check.step: check.status for check in verified.checks}["19"] is Status.SKIP


def request(**changes: object) -> Callable[[World], dict[str, object]]:
    def change(world: World) -> dict[str, object]:
        message = pb.GenerateRequest.FromString(world.bundle().request)
        for name, value in changes.items():
            setattr(message, name, value)
        return {"request": message.SerializeToString(deterministic=True)}

    return change


def accepted(**changes: object) -> Callable[[World], dict[str, object]]:
    return lambda world: {"acceptance": replace(world.bundle().acceptance, **changes)}  # type: ignore[arg-type]


def answer(**changes: object) -> Callable[[World], dict[str, object]]:
    return lambda world: {"answer": replace(world.bundle().answer, **changes)}  # type: ignore[arg-type]


MATRIX = [
    ("receipt.request", request(max_tokens=9)),
    ("receipt.nonce", request(nonce=bytes(32))),
    ("request.malformed", lambda world: {"request": b"\xff"}),
    ("cbor.malformed", accepted(record=b"")),
    ("log.inclusion", accepted(leaf_salt=bytes(32))),
    ("salts.field", accepted(field_salts=b"\xa0")),
    ("log.inclusion", accepted(leaf_index=0)),
    ("log.proof", accepted(proof=())),
    ("tlog.note", accepted(checkpoint=b"")),
    ("receipt.prompt_tokens", accepted(prompt_tokens=(1,))),
    ("receipt.output_tokens", answer(tokens=(12, 5, 3))),
    ("receipt.output_text", answer(text="London.")),
    ("receipt.fingerprints", answer(fingerprints=(bytes(16),) * 3)),
    ("salts.field", answer(field_salts=b"\xa0")),
    ("receipt.form", lambda world: {"receipt": b""}),
    ("cbor.malformed", lambda world: {"evidence": b""}),
    ("manifest.form", lambda world: {"manifest": b"{}"}),
]


def test_every_part_has_a_row() -> None:
    later = {"epoch", "witness", "anchors"}  # proofs made afterwards, with tests of their own
    assert {item.name for item in fields(Bundle)} - later == {
        "request",
        "acceptance",
        "answer",
        "receipt",
        "evidence",
        "manifest",
    }


@pytest.mark.parametrize(("code", "change"), MATRIX)
def test_changed_parts(world: World, code: str, change: Callable[[World], dict[str, object]]) -> None:
    bundle = world.bundle(**change(world))
    if code.startswith("manifest."):
        with pytest.raises(CountermarkError) as caught:
            verify_bundle(bundle, world.machine.policy, NOW)
        assert caught.value.code.startswith("manifest.")
        assert caught.value.step == "19"
        return
    refused(world, code, bundle)


def flips(data: bytes, count: int) -> list[bytes]:
    step = max(1, len(data) // count)
    return [data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :] for at in range(step // 2, len(data), step)]


def test_flipped_signed_content_in_a_well_formed_container(world: World) -> None:
    """Claims, logs, records and answer are all under a signature; each flip ends at a check with a code."""
    from countermark.formats.evidence import encode_evidence, parse_evidence

    bundle = world.bundle()
    evidence = parse_evidence(bundle.evidence)
    quote_body = 48 + 584
    changed: list[Bundle] = []
    for name in ("claims", "ccel", "rtmr3_log"):
        for data in flips(getattr(evidence, name), 12):
            changed.append(replace(bundle, evidence=encode_evidence(replace(evidence, **{name: data}))))
    for data in flips(evidence.quote[:quote_body], 12):
        quote = data + evidence.quote[quote_body:]
        changed.append(replace(bundle, evidence=encode_evidence(replace(evidence, quote=quote))))
    changed += [replace(bundle, receipt=data) for data in flips(bundle.receipt, 40)]
    changed += [replace(bundle, request=data) for data in flips(bundle.request, 20)]
    acceptance = bundle.acceptance
    for name in ("record", "field_salts", "checkpoint"):
        for data in flips(getattr(acceptance, name), 15):
            changed.append(replace(bundle, acceptance=replace(acceptance, **{name: data})))
    changed += [replace(bundle, manifest=data) for data in flips(bundle.manifest or b"", 15)]
    assert len(changed) > 150
    codes = set()
    for item in changed:
        with pytest.raises(CountermarkError) as caught:
            verify_bundle(item, world.machine.policy, NOW)
        codes.add(caught.value.code)
    assert len(codes) > 10


def test_parts_of_two_bundles_do_not_mix(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = make_world(tmp_path_factory.mktemp("mix"))
    bundle, theirs = world.bundle(), other.bundle()
    refused(world, "receipt.boot", replace(bundle, acceptance=theirs.acceptance))
    refused(world, "receipt.kid", replace(bundle, receipt=theirs.receipt))
    refused(world, "receipt.output_tokens", replace(bundle, answer=theirs.answer))
    with pytest.raises(CountermarkError) as caught:
        verify_bundle(replace(bundle, evidence=theirs.evidence), world.machine.policy, NOW)
    assert caught.value.step in ("2", "3", "5")  # another simulated vendor signed it
    with pytest.raises(CountermarkError) as caught:
        verify_bundle(replace(bundle, manifest=theirs.manifest), world.machine.policy, NOW)
    assert caught.value.code == "manifest.signer"


def test_the_time_is_an_argument(world: World) -> None:
    with pytest.raises(CountermarkError) as caught:
        verify_bundle(world.bundle(), world.machine.policy, NOW + 400 * 86400)
    assert caught.value.code == "policy.expired"


def test_a_verification_is_sealed(world: World) -> None:
    verified = verify_bundle(world.bundle(), world.machine.policy, NOW)
    with pytest.raises(TypeError):
        copy.copy(verified)
    with pytest.raises(TypeError):
        Verification(receipt=verified.receipt, checks=(), witnesses="many", seal=object())
