"""A receipt is refused with the exact code, whoever changed it: a byte on the way, or the signer itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from countermark.errors import CountermarkError
from countermark.formats.receipt import EXTERNAL_AAD, Answer, Payload, encode_payload, parse_receipt, to_be_signed
from countermark.receipt import CheckedReceipt, verify_accepted, verify_receipt
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.platform.keyring import sign_es256
from countermark_appliance.records.signer import Signer
from one_answer import FINGERPRINTS, OUTPUT_TOKENS, REQUEST, TEXT, World, answer, make_world, request


def check(world: World, receipt: bytes, given: Answer | None = None) -> CheckedReceipt:
    return verify_receipt(
        receipt, world.verdict, request=REQUEST, accepted=world.accepted, answer=given or world.answer
    )


def refused(world: World, code: str, receipt: bytes, given: Answer | None = None) -> CountermarkError:
    with pytest.raises(CountermarkError) as caught:
        check(world, receipt, given)
    assert caught.value.code == code
    return caught.value


def signed(world: World, payload: Payload) -> bytes:
    """The appliance's own keys over another payload: what a lying appliance could send."""
    return Signer(world.machine.keyring).sign_receipt(payload)


def test_every_flipped_byte_is_refused(world: World) -> None:
    codes: Counter[str] = Counter()
    data = world.receipt
    for at in range(0, len(data), 11):
        with pytest.raises(CountermarkError) as caught:
            check(world, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        codes[caught.value.code] += 1
    assert codes["receipt.es256"] > 100  # the payload is under both signatures, and the first fails
    assert codes["receipt.ml_dsa_65"] > 100
    families = {code.split(".")[0] for code in codes}
    assert families <= {"receipt", "cbor"}


def test_truncated_and_extended(world: World) -> None:
    for length in (0, 1, 2, 100, len(world.receipt) - 1):
        with pytest.raises(CountermarkError):
            check(world, world.receipt[:length])
    refused(world, "cbor.not_deterministic", world.receipt + b"\0")


def test_a_signature_over_another_context(world: World) -> None:
    """The same keys over the same payload in another protocol's context say nothing here."""
    parsed = parse_receipt(world.receipt)
    keyring = world.machine.keyring
    payload = encode_payload(parsed.payload)
    elsewhere = [part.replace(EXTERNAL_AAD, b"countermark/receipt/v2") for part in to_be_signed(payload, parsed.kids)]
    es256 = sign_es256(keyring.receipt_es256, elsewhere[0])
    ml_dsa = keyring.receipt_ml_dsa_65.sign(elsewhere[1])
    good = parsed.signatures
    refused(world, "receipt.es256", world.receipt.replace(good[0], es256))
    refused(world, "receipt.ml_dsa_65", world.receipt.replace(good[1], ml_dsa))
    with_context = keyring.receipt_ml_dsa_65.sign(parsed.signed[1], b"countermark/receipt/v1")
    refused(world, "receipt.ml_dsa_65", world.receipt.replace(good[1], with_context))
    raw = [sign_es256(keyring.receipt_es256, payload), keyring.receipt_ml_dsa_65.sign(payload)]
    refused(world, "receipt.es256", world.receipt.replace(good[0], raw[0]))
    refused(world, "receipt.ml_dsa_65", world.receipt.replace(good[1], raw[1]))


def test_a_strangers_keys(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = make_world(tmp_path_factory.mktemp("other"))
    refused(world, "receipt.kid", signed(other, parse_receipt(world.receipt).payload))
    refused(world, "receipt.kid", other.receipt)
    mixed = parse_receipt(other.receipt).signatures
    ours = parse_receipt(world.receipt).signatures
    refused(world, "receipt.es256", world.receipt.replace(ours[0], mixed[0]))
    refused(world, "receipt.ml_dsa_65", world.receipt.replace(ours[1], mixed[1]))


def test_the_signer_may_not_lie(world: World) -> None:
    payload = parse_receipt(world.receipt).payload
    machine, verdict = world.machine, world.verdict
    other = machine.intent(verdict)
    other_done = machine.outcome(other)
    other_payload = parse_receipt(machine.recorder.receipt(other_done)).payload
    intent, outcome = payload.intent, payload.outcome
    flipped = bytes(32)
    lies = [
        ("receipt.intent", replace(payload, intent=other_payload.intent)),
        ("receipt.intent", other_payload),
        ("receipt.intent", replace(payload, intent=replace(intent, salt=flipped))),
        ("receipt.outcome", replace(payload, outcome=other_payload.outcome)),
        ("receipt.order", replace(payload, outcome=replace(outcome, index=0))),
        ("receipt.order", replace(payload, outcome=replace(outcome, index=intent.index))),
        ("log.inclusion", replace(payload, outcome=replace(outcome, salt=flipped))),
        ("log.inclusion", replace(payload, outcome=replace(outcome, proof=(flipped, *outcome.proof[1:])))),
        ("log.proof", replace(payload, outcome=replace(outcome, proof=outcome.proof[:-1]))),
        ("log.proof", replace(payload, intent=replace(intent, proof=(*intent.proof, flipped)))),
        ("log.range", replace(payload, outcome=replace(outcome, index=10**9))),
        ("log.proof", replace(payload, checkpoint=world.committed.acceptance.checkpoint)),
        ("log.consistency", replace(payload, from_accepted=(flipped, *payload.from_accepted[1:]))),
        ("log.consistency", replace(payload, from_attested=(flipped, *payload.from_attested[1:]))),
        ("log.proof", replace(payload, from_accepted=())),
        ("record.type", replace(payload, outcome=replace(outcome, record=intent.record))),
    ]
    for code, lie in lies:
        refused(world, code, signed(world, lie))


def test_a_fork_of_the_log_is_no_growth_of_it(world: World) -> None:
    """The appliance rewrites leaf 0 and signs the new tree: consistent proofs cannot be made from the old head."""
    from countermark.formats import records
    from countermark.tlog import merkle
    from countermark.tlog.checkpoint import Checkpoint

    payload = parse_receipt(world.receipt).payload
    acceptance = world.committed.acceptance
    intent = records.leaf_for(world.committed.intent, acceptance.record, acceptance.leaf_salt, 1)
    done = world.completed
    outcome = records.leaf_for(done.outcome, done.record, done.leaf_salt, 2)
    tree = merkle.Tree([merkle.leaf_hash(b"rewritten"), *map(records.leaf_digest, (intent, outcome))])
    head = Checkpoint(origin=world.verdict.log_origin, size=3, root=tree.root())
    fork = replace(
        payload,
        checkpoint=Signer(world.machine.keyring).sign_checkpoint(head, 0),
        intent=replace(payload.intent, proof=merkle.inclusion_proof(1, 3, tree.node)),
        outcome=replace(payload.outcome, proof=merkle.inclusion_proof(2, 3, tree.node)),
        from_attested=merkle.consistency_proof(1, 3, tree.node),
        from_accepted=merkle.consistency_proof(2, 3, tree.node),
    )
    refused(world, "log.consistency", signed(world, fork))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("receipt.output_tokens", {"tokens": (12, 6, 2)}),
        ("receipt.output_tokens", {"tokens": OUTPUT_TOKENS[:2]}),
        ("receipt.output_text", {"text": TEXT + " "}),
        ("receipt.fingerprints", {"fingerprints": (*FINGERPRINTS[:2], bytes(16))}),
        ("receipt.fingerprints", {"fingerprints": FINGERPRINTS[:2]}),
        ("cbor.malformed", {"field_salts": b""}),
    ],
)
def test_another_answer_than_streamed(world: World, code: str, change: dict[str, object]) -> None:
    assert refused(world, code, world.receipt, replace(world.answer, **change)).step == "17"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "intent", "outcome"),
    [
        ("receipt.counts", {}, {"cached_tokens": 5}),
        ("receipt.finish_reason", {}, {"finish_reason": "length"}),
        ("receipt.finish_reason", {"ignore_eos": True, "stop_tokens": ()}, {}),
        ("receipt.finish_reason", {"stop_tokens": (9,)}, {}),
        ("receipt.finish_reason", {"ignore_eos": True}, {}),  # with stop tokens nonetheless
        ("receipt.finish_reason", {"stop_tokens": (5, 2)}, {}),  # went on after an end-of-sequence token
        (
            "receipt.finish_reason",
            {},
            {"finish_reason": "stop"},
        ),  # an end-of-sequence token passed off as a stop string
        ("receipt.finish_reason", {"max_tokens": 8}, {"output_text": "Paris.\n\nAnd"}),  # text behind a stop string
    ],
)
def test_outcomes_that_do_not_fit_the_answer(
    world: World, code: str, intent: dict[str, object], outcome: dict[str, object]
) -> None:
    machine, verdict = world.machine, world.verdict
    asked = request(ignore_eos=True) if "ignore_eos" in intent else REQUEST
    committed = machine.intent(verdict, raw_request=asked, **intent)
    accepted = verify_accepted(committed.acceptance, verdict, asked)
    completed = machine.outcome(committed, **outcome)
    with pytest.raises(CountermarkError) as caught:
        verify_receipt(
            machine.recorder.receipt(completed),
            verdict,
            request=asked,
            accepted=accepted,
            answer=replace(answer(completed), text=outcome.get("output_text", TEXT)),  # type: ignore[arg-type]
        )
    assert caught.value.code == code


@pytest.mark.parametrize("prints", [(b"", b"", b""), (bytes(32), b"", bytes(16)), (bytes(15),) * 3])
def test_every_token_has_a_whole_fingerprint(world: World, prints: tuple[bytes, ...]) -> None:
    """The commitment is over the concatenation, so it alone would open to missing or shifted fingerprints too."""
    machine, verdict = world.machine, world.verdict
    committed = machine.intent(verdict)
    accepted = verify_accepted(committed.acceptance, verdict, REQUEST)
    completed = machine.outcome(committed, fingerprints=prints)
    with pytest.raises(CountermarkError) as caught:
        verify_receipt(
            machine.recorder.receipt(completed),
            verdict,
            request=REQUEST,
            accepted=accepted,
            answer=replace(answer(completed), fingerprints=prints),
        )
    assert caught.value.code == "receipt.fingerprints"


def test_length_is_not_said_where_an_end_of_sequence_token_stands(world: World) -> None:
    machine, verdict = world.machine, world.verdict
    message = pb.GenerateRequest.FromString(REQUEST)
    message.max_tokens = 3
    data = message.SerializeToString(deterministic=True)
    committed = machine.intent(verdict, raw_request=data, max_tokens=3)
    accepted = verify_accepted(committed.acceptance, verdict, data)
    completed = machine.outcome(committed, finish_reason="length")
    with pytest.raises(CountermarkError) as caught:
        verify_receipt(
            machine.recorder.receipt(completed), verdict, request=data, accepted=accepted, answer=answer(completed)
        )
    assert caught.value.code == "receipt.finish_reason"


def test_an_answer_of_no_tokens_fits_no_finish_reason(world: World) -> None:
    machine, verdict = world.machine, world.verdict
    empty = {"output_tokens": (), "output_text": "", "fingerprints": (), "first_token_time": None}
    message = pb.GenerateRequest.FromString(REQUEST)
    message.ClearField("max_tokens")  # the server's to resolve, and it resolves it to nothing
    data = message.SerializeToString(deterministic=True)
    for reason in ("eos", "stop", "length"):
        committed = machine.intent(verdict, raw_request=data, max_tokens=0)
        accepted = verify_accepted(committed.acceptance, verdict, data)
        completed = machine.outcome(committed, finish_reason=reason, **empty)
        given = Answer(tokens=(), text="", fingerprints=(), field_salts=completed.field_salts)
        with pytest.raises(CountermarkError) as caught:
            verify_receipt(machine.recorder.receipt(completed), verdict, request=data, accepted=accepted, answer=given)
        assert caught.value.code == "receipt.finish_reason"
