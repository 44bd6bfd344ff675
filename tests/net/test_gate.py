"""The gate against a whole appliance whose model is scripted: honest, wrong once, wrong in logits only, busy, gone."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from net_appliance import Appliance, running

from countermark.errors import CountermarkError, ReceiptError, ReplayDiverged, Unavailable, Undecidable, UsageError
from countermark.formats.receipt import parse_receipt
from countermark.gate import Plan, compare, run_gate
from countermark.gate_report import Part, Report, encode_report, load_key
from countermark.session import connect
from countermark_appliance.engine.request import DoneEvent, Event, Finish, Prepared, Sink, TokensEvent
from one_answer import NOW

PROMPT = "three plain words"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Appliance]:
    with running(tmp_path) as appliance:
        appliance.engine.delay_s = 0.002
        yield appliance


def gate(node: Appliance, **changes: Any) -> Report:
    plan = Plan(
        address=node.address, prompt=PROMPT, runs=4, neighbours=3, max_tokens=8, seed=11, timeout_s=60, **changes
    )
    return run_gate(plan, node.machine.policy, now=NOW)


def twist(node: Appliance, change: Callable[[Event], Event], *, which: int) -> None:
    """Answer the gate's prompt truly, but for its `which`-th request."""
    submit, seen, lock = node.engine.submit, [0], threading.Lock()

    def twisted(prepared: Prepared, sink: Sink, *rest: Any) -> Any:
        if len(prepared.prompt_tokens) == 3 and prepared.request.messages[-1].content == PROMPT:
            with lock:
                number, seen[0] = seen[0], seen[0] + 1
            if number == which:
                return submit(prepared, lambda event: sink(change(event)), *rest)
        return submit(prepared, sink, *rest)

    node.engine.submit = twisted


def test_an_honest_node_passes(node: Appliance) -> None:
    report = gate(node)
    report.require_identical()
    assert report.result == "identical"
    assert report.error is None
    assert len(report.runs) == 8
    assert report.neighbours.answers > 0
    assert any(run.beside for run in report.runs)
    assert not report.runs[0].beside
    found = report.as_json()
    assert found["simulated"] is True
    assert found["receipts_verified"] == 8 + report.neighbours.answers
    assert [series["runs"] for series in found["settings"]] == [4, 4]
    assert all(len(series["digests"]) == 1 for series in found["settings"])
    assert found["settings"][0]["temperature"] == 0
    assert PROMPT not in json.dumps(found)
    # The runs went over several connections, each appraised by itself, and the receipts named are in the node's log.
    assert len({run.connection for run in report.runs}) > 2
    assert len({entry["quote_digest"] for entry in found["nodes"]}) == len(found["nodes"])
    size, _ = node.machine.recorder.head()
    assert all(entry["leaf"] < size for entry in found["runs"])
    receipt = report.runs[3].answer.receipt.receipt
    parse_receipt(receipt)
    assert found["runs"][3]["receipt"] == hashlib.sha256(receipt).hexdigest()


def other_token(event: Event) -> Event:
    match event:
        case TokensEvent() if event.ids == (13,):
            return replace(event, ids=(99,))
        case DoneEvent():
            return replace(event, output_tokens=(*event.output_tokens[:3], 99, *event.output_tokens[4:]))
    return event


def other_logits(event: Event) -> Event:
    if isinstance(event, DoneEvent):
        return replace(event, fingerprints=(*event.fingerprints[:5], bytes(16), *event.fingerprints[6:]))
    return event


def other_end(event: Event) -> Event:
    return replace(event, reason=Finish.STOP) if isinstance(event, DoneEvent) else event


def other_text(event: Event) -> Event:
    if isinstance(event, TokensEvent):
        return replace(event, text=event.text.replace("two", "TWO"))
    return replace(event, text=event.text.replace("two", "TWO"))


@pytest.mark.parametrize(
    ("change", "part", "position", "tokens", "equal"),
    [
        (other_token, Part.OUTPUT, 3, (13, 99), True),
        (other_logits, Part.OUTPUT, 5, (15, 15), False),
        (other_text, Part.TEXT, 4, (None, None), True),
    ],
)
def test_one_other_answer_among_many_is_caught(
    node: Appliance, change: Callable[[Event], Event], part: Part, position: int, tokens: object, equal: bool
) -> None:
    twist(node, change, which=5)
    report = gate(node)
    assert report.result == "differs"
    assert report.difference is not None
    at = report.difference
    assert (at.part, at.position, at.tokens, at.fingerprint_equal) == (part, position, tokens, equal)
    assert at.runs[0] < 2 <= at.runs[1]
    assert report.failure is None
    with pytest.raises(ReplayDiverged) as err:
        report.require_identical()
    assert err.value.code == "gate.differs"
    assert err.value.exit_code == 30
    series = next(entry for entry in report.as_json()["settings"] if entry["name"] == at.setting)
    assert len(series["digests"]) == 2


def test_an_end_that_cannot_be_is_refused_as_such(node: Appliance) -> None:
    twist(node, other_end, which=5)
    report = gate(node)
    assert report.result == "incomplete"
    assert report.failure is not None
    assert report.failure.code == "receipt.finish_reason"
    assert len(report.runs) < 8


def test_two_ends_of_the_same_tokens_differ() -> None:
    def answer(reason: str) -> Any:
        receipt = SimpleNamespace(
            accepted=SimpleNamespace(acceptance=SimpleNamespace(prompt_tokens=(1,))),
            answer=SimpleNamespace(fingerprints=(b"a", b"b")),
            outcome=SimpleNamespace(finish_reason=reason),
        )
        return SimpleNamespace(receipt=receipt, tokens=(5, 2), text="x")

    at = compare("greedy", (0, 2), answer("eos"), answer("length"))
    assert at is not None
    assert (at.part, at.position) == (Part.END, 1)
    assert compare("greedy", (0, 2), answer("eos"), answer("eos")) is None


def test_a_prompt_assembled_differently_is_caught(node: Appliance) -> None:
    prepare, seen = node.engine.prepare, [0]

    def drifting(request: Any) -> Prepared:
        prepared = prepare(request)
        if request.messages[-1].content == PROMPT:
            seen[0] += 1
            if seen[0] == 4:
                return replace(prepared, prompt_tokens=(1, 2, 77))
        return prepared

    node.engine.prepare = drifting
    at = gate(node).difference
    assert at is not None
    assert (at.part, at.position, at.tokens) == (Part.PROMPT, 2, (3, 77))


def test_a_receipt_that_does_not_verify_ends_the_gate(tmp_path: Path) -> None:
    def forging(recorder: Any) -> Any:
        def receipt(completed: Any) -> bytes:
            data = bytearray(type(recorder).receipt(recorder, completed))
            data[-1] ^= 1
            return bytes(data)

        return Forging(recorder, receipt)

    with running(tmp_path, recorder=forging) as node:
        report = gate(node)
    assert report.result == "incomplete"
    assert isinstance(report.failure, ReceiptError)
    assert report.failure.code == "receipt.ml_dsa_65"
    assert report.as_json()["error"]["code"] == "receipt.ml_dsa_65"
    assert report.as_json()["receipts_verified"] == 0


class Forging:
    def __init__(self, inner: Any, receipt: Callable[[Any], bytes]) -> None:
        self._inner, self.receipt = inner, receipt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_a_busy_node_is_asked_again_when_it_says(node: Appliance) -> None:
    reserve, refused = node.engine.reserve, [0]

    def busy(client: bytes = b"") -> Any:
        if refused[0] < 6:
            refused[0] += 1
            raise Unavailable("engine: full", code="engine.busy", retry_after_s=0.05)
        return reserve(client)

    node.engine.reserve = busy
    gate(node).require_identical()
    assert refused[0] == 6


def test_a_node_that_stays_busy_leaves_the_gate_incomplete(node: Appliance) -> None:
    def busy(client: bytes = b"") -> Any:
        raise Unavailable("engine: full", code="engine.busy", retry_after_s=5)

    node.engine.reserve = busy
    plan = Plan(address=node.address, runs=2, neighbours=1, seed=1, timeout_s=2)
    report = run_gate(plan, node.machine.policy, now=NOW)
    assert report.result == "incomplete"
    with pytest.raises(Unavailable) as err:
        report.require_identical()
    assert err.value.code == "engine.busy"


def test_no_neighbour_beside_any_run_is_incomplete(node: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countermark.gate._Gate._chat", lambda self, chance, place: None)
    report = gate(node)
    assert report.result == "incomplete"
    with pytest.raises(Undecidable) as err:
        report.require_identical()
    assert err.value.code == "gate.neighbours"


def test_a_lost_connection_is_made_and_appraised_again(node: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped, made = threading.Event(), []

    def drop(event: Event) -> Event:
        if not dropped.is_set():
            dropped.set()
            for session in list(made):
                session.close()
        return event

    monkeypatch.setattr("countermark.gate.connect", lambda *args, **kw: made.append(connect(*args, **kw)) or made[-1])

    twist(node, drop, which=4)
    report = gate(node)
    assert dropped.is_set()
    report.require_identical()
    assert len(made) > len({run.connection for run in gate(node).runs})


@pytest.fixture
def key(tmp_path: Path) -> ec.EllipticCurvePrivateKey:
    private = ec.generate_private_key(ec.SECP256R1())
    return load_key(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_the_report_is_a_jws(node: Appliance, key: ec.EllipticCurvePrivateKey) -> None:
    report = gate(node)
    signed = json.loads(encode_report(report, key))
    assert signed.keys() == {"payload", "protected", "signature"}
    header = json.loads(unbase64(signed["protected"]))
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert header == {"alg": "ES256", "cty": "countermark-gate+json", "kid": hashlib.sha256(spki).hexdigest()}
    raw = unbase64(signed["signature"])
    signature = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    message = f"{signed['protected']}.{signed['payload']}".encode()
    key.public_key().verify(signature, message, ec.ECDSA(hashes.SHA256()))
    assert json.loads(unbase64(signed["payload"])) == json.loads(json.dumps(report.as_json(signed=True)))
    assert json.loads(encode_report(report, None))["signed"] is False


def test_keys_of_another_kind_are_refused(key: ec.EllipticCurvePrivateKey) -> None:
    wrong = [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()]
    texts = [one.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) for one in wrong]
    for pem in (*texts, b"", b"no key"):
        with pytest.raises(UsageError) as err:
            load_key(pem)
        assert err.value.code == "usage.key"


def test_nobody_listens(node: Appliance) -> None:
    plan = Plan(address="127.0.0.1:9", runs=2, neighbours=1, seed=1, timeout_s=3)
    report = run_gate(plan, node.machine.policy, now=NOW)
    assert report.result == "incomplete"
    assert isinstance(report.error, CountermarkError)
    assert report.error.exit_code == 50
    assert report.as_json()["nodes"] == []
