"""An acceptance is refused with the exact code of what does not fit: session, request, stack, settings, log."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace

import pytest

from countermark.asked import DEFAULTS, parse_request
from countermark.checks import Status
from countermark.errors import CountermarkError, FormatError, WeightsError
from countermark.formats import records
from countermark.receipt import Accepted, CheckedReceipt, verify_accepted, verify_receipt
from countermark.wire import countermark_v1_pb2 as pb
from one_answer import INPUT, REQUEST, SAMPLING, Machine, World, request, start


def refused(code: str, call: object) -> CountermarkError:
    with pytest.raises(CountermarkError) as caught:
        call()  # type: ignore[operator]
    assert caught.value.code == code
    return caught.value


def test_it_is_accepted_with_numbered_checks(world: World) -> None:
    assert [check.step for check in world.accepted.checks[-3:]] == ["12", "13", "14"]
    assert [check.step for check in world.checked.checks[-4:]] == ["15", "16", "17", "18"]
    assert all(check.status is Status.PASS for check in world.checked.checks[-7:])
    assert world.accepted.intent == world.committed.intent


def test_another_request_is_refused(world: World) -> None:
    acceptance, verdict = world.committed.acceptance, world.verdict
    cases = {
        "receipt.nonce": request(nonce=bytes(32)),
        "receipt.request": request(max_tokens=9),
    }
    for code, data in cases.items():
        error = refused(code, lambda data=data: verify_accepted(acceptance, verdict, data))
        assert error.step == "12"
        assert error.checks[-1].status is Status.FAIL
        assert error.checks[:-1] == verdict.checks


def test_another_prompt_or_other_tokens_are_refused(world: World) -> None:
    """The appliance commits to our bytes, but to another prompt or to token ids other than it shows us."""
    machine, verdict = world.machine, world.verdict
    other = machine.intent(verdict, prompt=records.encode_input(prompt="something else"))
    refused("receipt.input", lambda: verify_accepted(other.acceptance, verdict, REQUEST))
    shown = replace(world.committed.acceptance, prompt_tokens=(1, 17, 99, 5))
    refused("receipt.prompt_tokens", lambda: verify_accepted(shown, verdict, REQUEST))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("receipt.setting.temperature", {"sampling": replace(SAMPLING, temperature=1.0)}),
        ("receipt.setting.top_k", {"sampling": replace(SAMPLING, top_k=0)}),
        ("receipt.setting.top_p_20bit", {"sampling": replace(SAMPLING, top_p_20bit=1 << 20)}),
        ("receipt.setting.seed", {"sampling": replace(SAMPLING, seed=8)}),
        ("receipt.setting.seed_origin", {"sampling": replace(SAMPLING, seed_origin="server")}),
        ("receipt.setting.logit_bias", {"sampling": replace(SAMPLING, logit_bias=())}),
        ("receipt.setting.max_tokens", {"max_tokens": 7}),
        ("receipt.setting.stop", {"stop": ()}),
        ("receipt.quote", {"quote_digest": bytes(32)}),
        ("receipt.nonce", {"nonce": bytes(32)}),
        ("receipt.request", {"raw_request": b"another"}),
    ],
)
def test_what_the_appliance_may_not_change(world: World, code: str, change: dict[str, object]) -> None:
    committed = world.machine.intent(world.verdict, **change)
    refused(code, lambda: verify_accepted(committed.acceptance, world.verdict, REQUEST))


def test_settings_not_given_are_the_defaults_and_the_seed_is_the_servers(world: World) -> None:
    message = pb.GenerateRequest.FromString(request(model=""))
    for name in ("sampling", "max_tokens", "stop"):
        message.ClearField(name)
    data = message.SerializeToString(deterministic=True)
    defaults = {name: value for name, value in DEFAULTS.items() if name not in ("ignore_eos", "logprobs")}
    drawn = replace(SAMPLING, seed=99, seed_origin="server", logit_bias=(), **defaults)  # type: ignore[arg-type]
    committed = world.machine.intent(world.verdict, raw_request=data, sampling=drawn, max_tokens=100, stop=())
    assert verify_accepted(committed.acceptance, world.verdict, data).intent.sampling.seed == 99
    claimed = replace(drawn, seed_origin="client")
    committed = world.machine.intent(world.verdict, raw_request=data, sampling=claimed, stop=())
    refused("receipt.setting.seed_origin", lambda: verify_accepted(committed.acceptance, world.verdict, data))
    added = {
        "receipt.setting.logit_bias": {"sampling": replace(drawn, logit_bias=((3, 100.0),)), "stop": ()},
        "receipt.setting.stop": {"sampling": drawn, "stop": ("However",)},
    }
    others = {name: 0.5 if isinstance(value, float) else 1 for name, value in defaults.items()}
    for name, value in others.items():
        added[f"receipt.setting.{name}"] = {"sampling": replace(drawn, **{name: value}), "stop": ()}
    for name in ("ignore_eos", "logprobs"):
        added[f"receipt.setting.{name}"] = {"sampling": drawn, "stop": (), name: True}
    assert len(added) == 2 + len(DEFAULTS)
    for code, change in added.items():  # nobody who asks for none gets some
        committed = world.machine.intent(world.verdict, raw_request=data, **change)
        refused(code, lambda taken=committed.acceptance: verify_accepted(taken, world.verdict, data))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("receipt.weights_root", {"weights_root": bytes(32)}),
        ("receipt.image_id", {"image_id": bytes(32)}),
        ("receipt.config", {"config_digest": bytes(32)}),
        ("receipt.profile", {"profile": "exact-v9"}),
        ("receipt.profile", {"claims": ("run",)}),  # promises less than its profile: nobody could replay it
        ("receipt.profile", {"determinism": "none"}),
        ("receipt.kernel_digest", {"kernel_digest": bytes(32)}),
        ("receipt.platform", {"platform": "tdx"}),
        ("receipt.setting.model", {"model": "another"}),
    ],
)
def test_a_stack_other_than_appraised_is_refused(
    tmp_path_factory: pytest.TempPathFactory, code: str, changes: dict[str, object]
) -> None:
    machine = booted(tmp_path_factory, **changes)
    verdict = machine.verdict(machine.evidence())
    error = refused(code, lambda: verify_accepted(machine.intent(verdict).acceptance, verdict, REQUEST))
    assert error.step == "13"
    assert isinstance(error, WeightsError) is (code == "receipt.weights_root")


def booted(factory: pytest.TempPathFactory, **changes: object) -> Machine:
    root = factory.mktemp("machine")
    (root / "code").mkdir()
    (root / "code" / "code.py").write_text("x = 1\n")
    return start(root / "log", root / "code", **changes)


def test_another_boot_and_another_session(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = booted(tmp_path_factory)
    verdict = other.verdict(other.evidence())
    refused("receipt.boot", lambda: verify_accepted(world.committed.acceptance, verdict, REQUEST))
    again = world.machine.verdict(world.machine.evidence(b"n" * 32), b"n" * 32)
    refused("receipt.quote", lambda: verify_accepted(world.committed.acceptance, again, REQUEST))
    accepted = verify_accepted(world.committed.acceptance, world.verdict, REQUEST)
    with pytest.raises(CountermarkError) as caught:
        verify_receipt(world.receipt, again, request=REQUEST, accepted=accepted, answer=world.answer)
    assert caught.value.code == "receipt.session"


def test_an_intent_logged_before_the_attested_head_is_stale(world: World) -> None:
    """Evidence taken later than the INTENT's leaf: the quote in the record is then another one, unless reused."""
    later = world.machine.verdict(world.machine.evidence())
    committed = world.machine.intent(later)
    old = replace(committed.acceptance, leaf_index=0, proof=world.machine.recorder.inclusion(0, committed.size))
    refused("log.inclusion", lambda: verify_accepted(old, later, REQUEST))


def test_proofs_and_checkpoints(world: World) -> None:
    acceptance, verdict = world.committed.acceptance, world.verdict
    changed = {
        "log.proof": replace(acceptance, proof=acceptance.proof[:-1]),
        "log.inclusion": replace(acceptance, proof=(bytes(32), *acceptance.proof[1:])),
        "log.range": replace(acceptance, leaf_index=2**40),
        "tlog.note": replace(acceptance, checkpoint=acceptance.checkpoint[:-1]),
        "salts.field": replace(acceptance, leaf_salt=b"short"),
        "cbor.malformed": replace(acceptance, field_salts=b""),
    }
    for code, value in changed.items():
        refused(code, lambda value=value: verify_accepted(value, verdict, REQUEST))
    refused("log.inclusion", lambda: verify_accepted(replace(acceptance, leaf_salt=bytes(32)), verdict, REQUEST))


def test_results_are_sealed(world: World) -> None:
    for sealed in (world.accepted, world.checked):
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps, replace):
            with pytest.raises((TypeError, ValueError)):
                attempt(sealed)
    for cls, made in ((Accepted, world.accepted), (CheckedReceipt, world.checked)):
        names = [item.name for item in fields(cls)]
        with pytest.raises(TypeError):
            cls(**{name: getattr(made, name) for name in names}, seal=object())
    with pytest.raises(TypeError):
        verify_accepted(world.committed.acceptance, object(), REQUEST)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "data"),
    [
        ("request.malformed", b"\xff"),
        ("request.too_long", bytes(17 * 1024 * 1024)),
        ("request.nonce", pb.GenerateRequest(prompt="x").SerializeToString()),
        ("request.input", pb.GenerateRequest(nonce=bytes(32)).SerializeToString()),
        ("request.unknown_field", REQUEST + b"\xf8\x07\x01"),
        ("request.malformed", request(sampling_top_p=float("nan"))),
        ("request.malformed", request(sampling_min_p=1.5)),
    ],
)
def test_malformed_requests(code: str, data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_request(data)
    assert caught.value.code == code


def test_the_request_as_asked() -> None:
    asked = parse_request(request(sampling_min_p=0.0, ignore_eos=True))
    assert asked.prompt == INPUT
    assert asked.settings == DEFAULTS | {
        "temperature": 0.5,
        "top_k": 20,
        "top_p_20bit": round(0.9 * 2**20),
        "min_p_20bit": 0,
        "seed": 7,
        "logit_bias": {3: -1.5},
        "max_tokens": 8,
        "stop": ("\n\n",),
        "ignore_eos": True,
    }
