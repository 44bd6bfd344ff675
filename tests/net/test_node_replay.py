"""An answer of one node run again on another: what it finds, what its log says, and every way it can be wrong."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cbor2
import grpc
import pytest
from net_appliance import Appliance, running

from countermark.errors import CountermarkError, LogError, ReceiptError, Unavailable, Undecidable
from countermark.formats.receipt import encode_acceptance, encode_answer, parse_receipt
from countermark.formats.records import Kind, parse_replay
from countermark.receipt import CheckedReceipt
from countermark.replayed import require_able, verify_replay
from countermark.replayer import Equivalence, Part
from countermark.session import Session
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.engine.request import DoneEvent, Event, Finish, Prepared, Sink, TokenLogprob, TokensEvent
from countermark_appliance.service import ServiceLimits

SECRET = "planted-secret-7431 and two"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Appliance, Appliance]]:
    """Two machines with their own keys, roots and logs."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    with running(first) as one, running(second, limits=ServiceLimits(generations=2)) as two:
        yield one, two


@pytest.fixture(scope="module")
def answer(nodes: tuple[Appliance, Appliance]) -> CheckedReceipt:
    with nodes[0].connect() as session:
        found = session.generate(SECRET, max_tokens=8, temperature=0.7, top_k=9, top_p=0.5).result()
        return found.receipt


@pytest.fixture
def node(nodes: tuple[Appliance, Appliance]) -> Iterator[Appliance]:
    engine = nodes[1].engine
    submit, prepare = engine.submit, engine.prepare
    engine.handles.clear()
    yield nodes[1]
    engine.hold.clear()
    engine.submit, engine.prepare = submit, prepare


@pytest.fixture
def session(node: Appliance) -> Iterator[Session]:
    with node.connect() as one:
        yield one


def twist(node: Appliance, change: Callable[[Event], Event]) -> None:
    submit = node.engine.submit

    def twisted(prepared: Prepared, sink: Sink, *rest: Any) -> Any:
        return submit(prepared, lambda event: sink(change(event)), *rest)

    node.engine.submit = twisted


def test_identical_on_another_node(node: Appliance, session: Session, answer: CheckedReceipt) -> None:
    before = time.time() * 1e6
    found = session.replay(answer)
    assert found.result.identical
    assert found.result.equivalence is Equivalence.SAME_STACK
    assert not found.result.differing
    assert (found.result.mode, found.result.positions) == ("regenerate", 8)
    record = found.record
    assert record.boot_id == session.verdict.boot_id != answer.intent.boot_id
    assert record.quote_digest == session.verdict.quote_digest
    assert record.receipt_digest == hashlib.sha256(answer.receipt).digest()
    assert before <= record.started_us <= record.ended_us <= time.time() * 1e6
    assert record.stack == node.machine.recorder.epoch.stack
    # What the log holds is a leaf of its own kind, which commits to exactly this record.
    assert node.kinds()[found.leaf_index] is Kind.REPLAY
    # Run as recorded, seed included, on nobody's cache.
    (prepared,) = node.engine.submitted[-1:]
    assert prepared.sampling.seed == answer.intent.sampling.seed
    assert prepared.request.scope not in (b"", session.verdict.quote_digest)
    # The receipt is no receipt of an answer, and says so before any signature is looked at.
    with pytest.raises(CountermarkError) as err:
        parse_receipt(found.receipt)
    assert err.value.code == "receipt.header"
    payload = cbor2.loads(cbor2.loads(found.receipt).value[2])
    assert parse_replay(payload["replay"]["record"]) == record
    with pytest.raises(TypeError):
        replace(found, seal=None)


def test_twice_is_two_records(session: Session, answer: CheckedReceipt) -> None:
    first, second = session.replay(answer), session.replay(answer)
    assert first.leaf_index < second.leaf_index
    assert first.record.nonce != second.record.nonce


def other_token(event: Event) -> Event:
    match event:
        case TokensEvent() if event.ids == (13,):
            return replace(event, ids=(99,), logprobs=(TokenLogprob(logprob=-1.0, top=((99, -1.0), (13, -1.5))),))
        case DoneEvent() if len(event.output_tokens) > 3:
            return replace(event, output_tokens=(*event.output_tokens[:3], 99, *event.output_tokens[4:]))
    return event


def far_token(event: Event) -> Event:
    changed = other_token(event)
    return replace(changed, logprobs=()) if isinstance(changed, TokensEvent) else changed


def other_logits(event: Event) -> Event:
    if isinstance(event, DoneEvent):
        return replace(event, fingerprints=(*event.fingerprints[:5], bytes(16), *event.fingerprints[6:]))
    return event


def other_end(event: Event) -> Event:
    return replace(event, reason=Finish.EOS) if isinstance(event, DoneEvent) else event


def shorter(event: Event) -> Event:
    if isinstance(event, DoneEvent):
        tokens, marks = event.output_tokens[:6], event.fingerprints[:6]
        return replace(event, reason=Finish.EOS, output_tokens=tokens, fingerprints=marks)
    return event


def other_text(event: Event) -> Event:
    return replace(event, text=event.text.replace("two", "TWO"))


@pytest.mark.parametrize(
    ("change", "part", "where"),
    [
        (other_token, Part.OUTPUT, (3, 13, 99, True, 0.5)),
        (far_token, Part.OUTPUT, (3, 13, 99, True, None)),
        (other_logits, Part.OUTPUT, (5, 15, 15, False, 0.0)),
        (shorter, Part.OUTPUT, (6, 16, None, False, None)),
        (other_end, Part.END, (7, None, None, True, None)),
        (other_text, Part.TEXT, (4, None, None, True, None)),
    ],
)
def test_a_difference_is_recorded_with_its_place(
    node: Appliance,
    session: Session,
    answer: CheckedReceipt,
    change: Callable[[Event], Event],
    part: Part,
    where: tuple[object, ...],
) -> None:
    twist(node, change)
    node.engine.delay_s = 0.05 if change is other_token else 0.0
    found = session.replay(answer)
    node.engine.delay_s = 0.0
    at = found.result.divergence
    assert at is not None
    assert at.part is part
    assert (at.position, at.recorded_token, at.local_token, at.fingerprint_equal, at.logit_gap) == where
    assert found.record.result == "diverged"
    assert found.result.difference is not None
    assert found.result.difference.code == f"replay.{part.value}"
    if change is other_token:  # nothing behind the first difference was wanted
        assert node.engine.handles[-1].cancelled.is_set()
        assert "token 3: expected 13, as recorded, got 99, whose logit is 0.5 above" in str(found.result.difference)


def test_another_prompt_is_a_difference_before_anything_runs(
    node: Appliance, session: Session, answer: CheckedReceipt
) -> None:
    prepare, count = node.engine.prepare, len(node.engine.submitted)
    node.engine.prepare = lambda request: replace(prepare(request), prompt_tokens=(1, 2, 9))
    at = session.replay(answer).result.divergence
    assert at is not None
    assert (at.part, at.position, at.recorded_token, at.local_token) == (Part.PROMPT, 2, 3, 9)
    assert len(node.engine.submitted) == count


def raw(session: Session, request: pb.ReplayRequest) -> str:
    """The code of the refusal."""
    call = session._channel.grpc_channel.unary_unary(codec.REPLAY, None, None)
    with pytest.raises(grpc.RpcError) as err:
        call(request.SerializeToString(), timeout=30)
    return dict(err.value.trailing_metadata())[codec.CODE_KEY]


def parts(answer: CheckedReceipt) -> pb.ReplayRequest:
    return pb.ReplayRequest(
        nonce=bytes(32),
        request=answer.accepted.request,
        accepted=encode_acceptance(answer.accepted.acceptance),
        answer=encode_answer(answer.answer),
        receipt=answer.receipt,
    )


def test_no_cache_is_the_clients_to_choose(node: Appliance, session: Session, answer: CheckedReceipt) -> None:
    """A nonce that is another connection's quote digest, or an earlier nonce, would read what was computed for it."""
    count, asked = len(node.engine.submitted), parts(answer)
    call = session._channel.grpc_channel.unary_unary(codec.REPLAY, None, None)
    for nonce in (session.verdict.quote_digest, bytes(32), bytes(32)):
        asked.nonce = nonce
        assert call(asked.SerializeToString(), timeout=30)
    scopes = {prepared.request.scope for prepared in node.engine.submitted[count:]}
    assert len(scopes) == 3
    assert scopes.isdisjoint((bytes(32), session.verdict.quote_digest))


def test_parts_of_different_answers_are_refused(
    nodes: tuple[Appliance, Appliance], session: Session, answer: CheckedReceipt
) -> None:
    with nodes[0].connect() as other:
        second = parts(other.generate("four plain words here", max_tokens=3, seed=1).result().receipt)
    for name in ("request", "accepted", "answer", "receipt"):
        mixed = parts(answer)
        setattr(mixed, name, getattr(second, name))
        assert raw(session, mixed) == "replay.parts", name
    forged = replace(answer.answer, text="another text")
    mixed = parts(answer)
    mixed.answer = encode_answer(forged)
    assert raw(session, mixed) == "replay.parts"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"nonce": b"short"}, "request.nonce"),
        ({"request": b""}, "request.nonce"),
        ({"accepted": b"\xa0"}, "accepted.field"),
        ({"answer": b""}, "cbor.malformed"),
        ({"receipt": b"\xd8\x62"}, "cbor.malformed"),
        ({"receipt": b""}, "receipt.form"),
    ],
)
def test_parts_that_do_not_parse_are_refused(
    session: Session, answer: CheckedReceipt, change: dict[str, bytes], code: str
) -> None:
    request = parts(answer)
    for name, value in change.items():
        setattr(request, name, value)
    assert raw(session, request) == code


def test_a_redacted_answer_decides_nothing(session: Session, answer: CheckedReceipt) -> None:
    request = parts(answer)
    request.answer = encode_answer(None)
    assert raw(session, request) == "replay.redacted"


def test_not_without_attest(node: Appliance, answer: CheckedReceipt) -> None:
    channel = node.channel()
    try:
        with pytest.raises(grpc.RpcError) as err:
            channel.grpc_channel.unary_unary(codec.REPLAY, None, None)(parts(answer).SerializeToString(), timeout=30)
        assert dict(err.value.trailing_metadata())[codec.CODE_KEY] == "channel.not_attested"
    finally:
        channel.close()


def test_a_node_without_the_weights_is_sent_nothing(node: Appliance, session: Session, answer: CheckedReceipt) -> None:
    able = {"profile": answer.intent.stack.profile, "weights_root": answer.intent.stack.weights_root}
    require_able(SimpleNamespace(**able), answer)  # type: ignore[arg-type]
    for name, value in (("profile", "exact-v9"), ("weights_root", bytes(32))):
        with pytest.raises(Undecidable) as err:
            require_able(SimpleNamespace(**{**able, name: value}), answer)  # type: ignore[arg-type]
        assert err.value.code == f"replay.{name}"


def test_out_of_time_leaves_nothing(node: Appliance, session: Session, answer: CheckedReceipt) -> None:
    kinds = node.kinds()
    node.engine.hold.set()
    with pytest.raises(Unavailable) as err:
        session.replay(answer, timeout_s=0.5)
    assert err.value.code in ("generation.deadline", "server.deadline_exceeded")
    wait_for(lambda: node.engine.ended[-1:] in (["cancelled"], ["deadline"]))
    wait_for(lambda: not node.service._generations)
    assert node.kinds() == kinds
    assert session.replay is not None and not session.is_over


def test_counts_against_the_limit_of_requests(node: Appliance, session: Session, answer: CheckedReceipt) -> None:
    node.engine.hold.set()
    running_now = [threading.Thread(target=lambda: session.replay(answer)) for _ in range(2)]
    for one in running_now:
        one.start()
    wait_for(lambda: len(node.service._generations) == 2)
    with pytest.raises(Unavailable) as err:
        session.replay(answer)
    assert err.value.code == "service.busy"
    assert err.value.retry_after_s is not None
    node.engine.hold.clear()
    for one in running_now:
        one.join()


def test_the_prompt_reaches_no_log_line(
    session: Session, answer: CheckedReceipt, node: Appliance, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    twist(node, other_token)
    session.replay(answer)
    mixed = parts(answer)
    mixed.answer = encode_answer(replace(answer.answer, text="another text"))
    raw(session, mixed)
    node.engine.prepare = lambda request: 1 / 0
    with pytest.raises(Unavailable):
        session.replay(answer)
    assert "planted-secret" not in caplog.text


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_replay_of_something_else_is_refused(
    nodes: tuple[Appliance, Appliance], session: Session, answer: CheckedReceipt
) -> None:
    found = session.replay(answer)
    nonce = found.record.nonce
    verify_replay(found.receipt, session.verdict, nonce=nonce, answer=answer)

    def code(receipt: bytes, *, asked: bytes = nonce, about: CheckedReceipt = answer, by: Any = session.verdict) -> str:
        with pytest.raises((ReceiptError, LogError, CountermarkError)) as err:
            verify_replay(receipt, by, nonce=asked, answer=about)
        assert err.value.checks
        return err.value.code

    with nodes[0].connect() as other:
        second = other.generate("four plain words here", max_tokens=3, seed=1).result().receipt
    with nodes[1].connect() as again:
        assert code(found.receipt, by=again.verdict) == "receipt.quote"
    assert code(found.receipt, by=answer.verdict) == "receipt.kid"
    assert code(found.receipt, asked=bytes(32)) == "receipt.nonce"
    assert code(found.receipt, about=second) == "receipt.replay"
    assert code(found.receipt[:-1] + bytes([found.receipt[-1] ^ 1])) == "receipt.ml_dsa_65"
    assert code(answer.receipt) == "receipt.header"
    at = found.receipt.index(found.record.receipt_digest)
    changed = bytearray(found.receipt)
    changed[at] ^= 1
    assert code(bytes(changed)) == "receipt.es256"
