"""What a request says was retrieved, and what its chat template was given: on the wire, in the INTENT, in a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cbor2
import pytest
from net_appliance import Appliance, running

from countermark.bundle import parse_bundle, read_bundle
from countermark.errors import CountermarkError, FormatError, ReceiptError, RequestError
from countermark.formats import records
from countermark.formats.retrieval import FIELDS, Chunk, RetrievalSet
from countermark.receipt import verify_accepted
from countermark.session import Session
from countermark.verify import verify_bundle
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from one_answer import NOW

RETRIEVED = RetrievalSet(
    corpus_root=bytes([1]) * 32,
    index_parameters=b'{"kind":"hnsw","m":16}',
    embedder=bytes([2]) * 32,
    query=bytes([3]) * 32,
    chunks=(Chunk(id="doc-7#2", start=100, end=250, score=0.75), Chunk(id="doc-1#0", start=0, end=90, score=-1.0)),
)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with running(tmp_path_factory.mktemp("node")) as appliance:
        yield appliance


@pytest.fixture
def session(node: Appliance) -> Iterator[Session]:
    with node.connect() as one:
        yield one


def test_each_part_is_committed_under_its_own_salt(session: Session) -> None:
    receipt = session.generate("two words", max_tokens=3, retrieved=RETRIEVED).result().receipt
    found = receipt.intent.retrieval
    assert found is not None
    salts = cbor2.loads(receipt.accepted.acceptance.field_salts)
    assert set(salts) == {"prompt", "prompt_tokens", "raw_request", *(f"retrieval.{name}" for name in FIELDS)}
    assert len(set(salts.values())) == len(salts)
    by_hand = {
        "corpus_root": bytes([1]) * 32,
        "index_parameters": b'{"kind":"hnsw","m":16}',
        "embedder": bytes([2]) * 32,
        "query": bytes([3]) * 32,
        "chunks": cbor2.dumps([["doc-7#2", 100, 250, 0.75], ["doc-1#0", 0, 90, -1.0]], canonical=True),
    }
    for name, value in by_hand.items():
        label = f"retrieval.{name}"
        assert records.field_commitment(label, salts[label], value) == getattr(found, name)


def test_it_goes_along_into_bundle_and_replay(session: Session, node: Appliance, tmp_path: object) -> None:
    answer = session.generate("two words", max_tokens=3, retrieved=RETRIEVED).result()
    path = answer.save(f"{tmp_path}/answer.cmk")
    verified = verify_bundle(read_bundle(path), node.machine.policy, NOW)
    assert session.replay(verified.whole).result.identical
    assert parse_bundle(path.read_bytes()).redacted == ()


def test_a_record_of_another_retrieval_is_refused(session: Session) -> None:
    receipt = session.generate("two words", max_tokens=3, retrieved=RETRIEVED).result().receipt
    accepted = receipt.accepted
    asked = pb.GenerateRequest.FromString(accepted.request)
    plain = pb.GenerateRequest.FromString(accepted.request)
    plain.ClearField("retrieval")
    asked.retrieval.chunks[0].score = 0.5
    # A request that says otherwise than the record is refused before the commitments are: its bytes are committed, too.
    for changed, code in ((asked, "receipt.request"), (plain, "receipt.retrieval")):
        with pytest.raises(ReceiptError) as err:
            verify_accepted(accepted.acceptance, session.verdict, changed.SerializeToString())
        assert err.value.code == code


def test_a_node_that_records_another_retrieval_is_refused(tmp_path: object) -> None:
    from pathlib import Path
    from typing import Any

    class Other:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def commit_intent(self, *, retrieval: RetrievalSet | None, **rest: Any) -> Any:
            assert retrieval == RETRIEVED
            return self._inner.commit_intent(retrieval=replace(retrieval, query=bytes(32)), **rest)

    with running(Path(str(tmp_path)), recorder=Other) as node, node.connect() as session:
        with pytest.raises(ReceiptError) as err:
            session.generate("two words", max_tokens=3, retrieved=RETRIEVED)
        assert err.value.code == "receipt.retrieval"


@pytest.mark.parametrize(
    "change",
    [
        {"corpus_root": b"short"},
        {"embedder": bytes(33)},
        {"query": b""},
        {"index_parameters": bytes(4097)},
        {"chunks": (RETRIEVED.chunks[0],) * 1025},
        {"chunks": (replace(RETRIEVED.chunks[0], id=""),)},
        {"chunks": (replace(RETRIEVED.chunks[0], id="x" * 257),)},
        {"chunks": (replace(RETRIEVED.chunks[0], start=251),)},
        {"chunks": (replace(RETRIEVED.chunks[0], end=1 << 63),)},
        {"chunks": (replace(RETRIEVED.chunks[0], score=float("inf")),)},
    ],
)
def test_what_cannot_be_recorded_is_refused_on_both_sides(change: dict[str, object]) -> None:
    with pytest.raises(FormatError) as err:
        replace(RETRIEVED, **change)  # type: ignore[arg-type]
    assert err.value.code == "request.retrieval"
    request = pb.GenerateRequest.FromString(codec.encode_generate_request(prompt="x", retrieved=RETRIEVED))
    for name, value in change.items():
        if name == "chunks":
            del request.retrieval.chunks[:]
            chunks = [pb.Chunk(id=one.id, start=one.start, end=one.end, score=one.score) for one in value]
            request.retrieval.chunks.extend(chunks)
        else:
            setattr(request.retrieval, name, value)
    with pytest.raises(RequestError) as refused:
        codec.parse_generate_request(request.SerializeToString())
    assert refused.value.code == "request.retrieval"


def test_values_stand_in_the_recorded_input() -> None:
    data = codec.encode_generate_request(messages=[("user", "hi")], values={"date_string": "01 Feb 2026"})
    value = codec.input_value(codec.parse_generate_request(data))
    assert cbor2.loads(value) == {"messages": [["user", "hi"]], "values": {"date_string": "01 Feb 2026"}}
    plain = codec.encode_generate_request(messages=[("user", "hi")], values={})
    assert cbor2.loads(codec.input_value(codec.parse_generate_request(plain))) == {"messages": [["user", "hi"]]}


@pytest.mark.parametrize(
    "values",
    [{"a b": "x"}, {"": "x"}, {"é": "x"}, {"x" * 65: "x"}, {"x": "y" * 257}, {f"x{n}": "" for n in range(17)}],
)
def test_values_have_names_and_limits(values: dict[str, str]) -> None:
    with pytest.raises(RequestError) as err:
        codec.encode_generate_request(messages=[("user", "hi")], values=values)
    assert err.value.code == "request.values"


def test_values_go_with_messages() -> None:
    with pytest.raises(CountermarkError) as err:
        codec.encode_generate_request(prompt="hi", values={"date_string": "x"})
    assert err.value.code == "request.values"
