"""A schema from the call to the bundle: through a node whose engine computes, its log, and another's replay."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from net_appliance import Appliance, Wrapped, running
from tinymodel import TinyArtefact

from countermark.bundle import parse_bundle, redact
from countermark.errors import CountermarkError, ReceiptError, RequestError, Undecidable
from countermark.formats import records
from countermark.formats.records import Kind, PlainGrammar
from countermark.replayer import Mode, replay
from countermark.session import Session
from countermark.verify import verify_bundle
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.engine import grammarlib
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.grammar import GrammarError, Walk
from countermark_appliance.engine.replay import ExactRunner
from one_answer import NOW

ARTEFACT = TinyArtefact("qwen3")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "sure": {"type": "boolean"}},
    "required": ["city", "sure"],
    "additionalProperties": False,
}
TEXT = json.dumps(SCHEMA)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(ARTEFACT, threads=2)  # type: ignore[arg-type]
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def node(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with running(tmp_path_factory.mktemp("node"), engine=engine) as appliance:
        yield appliance


@pytest.fixture
def session(node: Appliance) -> Iterator[Session]:
    with node.connect() as one:
        yield one


def ask(session: Session, **more: Any) -> Any:
    return session.generate("Which city?", **({"max_tokens": 90, "seed": 5, "json_schema": TEXT} | more)).result()


def test_it_fits_and_the_record_says_what(session: Session, node: Appliance) -> None:
    answer = ask(session)
    assert answer.receipt.outcome.finish_reason == "eos"
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    found = answer.receipt.intent.grammar
    assert (found.kind, found.library, found.rules) == ("json_schema", "llguidance", 1)
    assert found.version == grammarlib.version()
    salts = cbor2.loads(answer.receipt.accepted.acceptance.field_salts)
    assert set(salts) == {"prompt", "prompt_tokens", "raw_request", "grammar.text"}
    by_hand = records.field_commitment("grammar.text", salts["grammar.text"], TEXT.encode())
    assert found.text == by_hand
    assert TEXT.encode() not in answer.receipt.accepted.acceptance.record


def test_bundle_redaction_and_replay(session: Session, node: Appliance, tmp_path: Path) -> None:
    answer = ask(session, regex="(yes|no), (yes|no)!", json_schema=None, temperature=1.5)
    path = answer.save(tmp_path / "answer.cmk")
    bundle = parse_bundle(path.read_bytes())
    verified = verify_bundle(bundle, node.machine.policy, NOW)
    assert session.replay(verified.whole).result.identical
    runner = Runner(node)
    for mode in Mode:
        assert replay(verified, runner, mode).identical
    for change in (
        {"grammar_library": ("llguidance", "0.0.1", 1)},
        {"grammar_library": (*runner.grammar_library[:2], 2)},
    ):
        with pytest.raises(Undecidable) as err:
            replay(verified, Wrapped(runner, **change))  # type: ignore[arg-type]
        assert err.value.code == "replay.grammar"
    hidden = verify_bundle(redact(bundle, prompt=True), node.machine.policy, NOW)
    assert hidden.as_json()["redacted"] == ["prompt"]


class Runner(Wrapped):
    """The engine's runner, with the names that the simulated machine gives its weights."""

    def __init__(self, node: Appliance) -> None:
        stack = node.machine.recorder.epoch.stack
        named = ("model", "quantisation", "manifest_digest", "tokenizer_digest", "chat_template_digest")
        artefact = {name: getattr(stack, name) for name in named} | {"stop_tokens": (2,)}
        super().__init__(
            ExactRunner(ARTEFACT),  # type: ignore[arg-type]
            weights_root=stack.weights_root,
            artefact=artefact,
        )


def test_another_node_reads_grammars_otherwise(
    session: Session, node: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ask(session)
    monkeypatch.setattr(grammarlib, "RULES", 2)
    before = node.kinds()
    with pytest.raises(CountermarkError) as err:
        session.replay(answer.receipt)
    assert err.value.code == "replay.grammar"
    assert node.kinds() == before


def test_without_one_the_record_is_what_it_was(session: Session) -> None:
    answer = ask(session, json_schema=None, max_tokens=3)
    assert answer.receipt.intent.grammar is None
    assert "grammar" not in cbor2.loads(answer.receipt.accepted.acceptance.record)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"json_schema": '{"type": "nothing"}'}, "request.grammar"),
        ({"json_schema": '{"type": "integer", "multipleOf": 1000003}'}, "request.grammar_cost"),
        ({"json_schema": None, "regex": "a("}, "request.grammar"),
        ({"ignore_eos": True}, "request.grammar"),
    ],
)
def test_refused_before_anything_is_recorded(
    session: Session, node: Appliance, asked: dict[str, Any], code: str
) -> None:
    before = node.kinds()
    with pytest.raises(RequestError) as err:
        ask(session, **asked)
    assert err.value.code == code
    assert node.kinds() == before
    assert ask(session, max_tokens=2).text  # the connection goes on


def test_refused_before_it_is_sent() -> None:
    for asked, code in (
        ({"json_schema": "{}", "regex": "a"}, "request.grammar"),
        ({"json_schema": " " * (64 * 1024 + 1)}, "request.grammar_too_long"),
        ({"regex": "é" * (4 * 1024 + 1)}, "request.grammar_too_long"),
        ({"json_schema": {}}, "request.json_schema"),
    ):
        with pytest.raises(RequestError) as err:
            codec.encode_generate_request(prompt="x", **asked)  # type: ignore[arg-type]
        assert err.value.code == code
    request = pb.GenerateRequest.FromString(codec.encode_generate_request(prompt="x", regex=""))
    assert codec.grammar(request) == ("regex", "")


def test_one_that_fails_on_the_way_is_said_so_and_recorded(
    session: Session, node: Appliance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_walk: Walk, _token: int) -> None:
        raise GrammarError("grammar: expected one whose masks take less")

    monkeypatch.setattr(Walk, "step", fail)
    with pytest.raises(RequestError) as err:
        ask(session)
    assert err.value.code == "generation.grammar"
    assert node.kinds()[-2:] == [Kind.INTENT, Kind.ABORT]


def test_a_node_that_records_another_is_refused(engine: Engine, tmp_path: Path) -> None:
    lies: list[Any] = [
        lambda grammar: replace(grammar, text="{}"),
        lambda grammar: replace(grammar, kind="regex"),
        lambda _: None,
    ]

    class Lying(Wrapped):
        def commit_intent(self, *, grammar: PlainGrammar | None, **rest: Any) -> Any:
            return self._inner.commit_intent(grammar=lies[0](grammar), **rest)

    with running(tmp_path, engine=engine, recorder=Lying) as node:
        while lies:
            with node.connect() as session, pytest.raises(ReceiptError) as err:
                ask(session)
            assert err.value.code == "receipt.grammar"
            lies.pop(0)
        size, _ = node.machine.recorder.head()
        assert size >= 3
