"""What an appliance's own keys can sign falsely, and policies of every kind: the page says what the client says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judges import Case, page_results, python_says, said

from countermark.appraise import Scope, appraise
from countermark.bundle import Bundle, encode_bundle
from countermark.formats.receipt import parse_receipt
from countermark.formats.records import EXACT_CLAIMS, PlainGrammar
from countermark.formats.retrieval import Chunk, RetrievalSet
from countermark.logkeys import new_keys
from countermark.numerics import CURRENT
from countermark.policy import Policy, Profile, Waiver, encode_policy, new_policy
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.records.signer import Signer
from one_answer import (
    NOW,
    REQUEST,
    SAMPLING,
    TEXT,
    Machine,
    World,
    answer,
    make_world,
    request,
    start,
)

D32 = "00" * 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("answer"))


def answered(machine: Machine, evidence: bytes, *, asked: bytes = REQUEST, **changes: Any) -> Bundle:
    """A whole answer, every part signed by the machine; `changes` of the INTENT, and with `out_` of the OUTCOME."""
    outcome = {name.removeprefix("out_"): value for name, value in changes.items() if name.startswith("out_")}
    intent = {name: value for name, value in changes.items() if not name.startswith("out_")}
    verdict = appraise(evidence, machine.policy, now=NOW, scope=Scope.BUNDLE)
    nonce = pb.GenerateRequest.FromString(asked).nonce
    committed = machine.intent(verdict, **{"raw_request": asked, "nonce": nonce, **intent})
    completed = machine.outcome(committed, **outcome)
    told = answer(completed)
    return Bundle(
        request=asked,
        acceptance=committed.acceptance,
        answer=replace(told, text=outcome.get("output_text", TEXT), tokens=outcome.get("output_tokens", told.tokens)),
        receipt=machine.recorder.receipt(completed),
        evidence=evidence,
        manifest=machine.manifest,
    )


def bare() -> bytes:
    """A request that leaves every setting open."""
    message = pb.GenerateRequest.FromString(request(model=""))
    for name in ("sampling", "max_tokens", "stop"):
        message.ClearField(name)
    data: bytes = message.SerializeToString(deterministic=True)
    return data


DOCUMENTS = RetrievalSet(
    corpus_root=bytes([1]) * 32,
    index_parameters=b"k=2",
    embedder=bytes([2]) * 32,
    query=bytes([3]) * 32,
    chunks=(Chunk(id="one", start=0, end=1 << 40, score=0.75), Chunk(id="two", start=5, end=5, score=0.1)),
)
WITH_DOCUMENTS = codec.encode_generate_request(
    messages=[("user", "Which city is the capital of France?")],
    model="tiny",
    max_tokens=8,
    stop=["\n\n"],
    temperature=0.5,
    top_k=20,
    top_p=0.9,
    seed=7,
    logit_bias={3: -1.5},
    retrieved=DOCUMENTS,
)
SCHEMA = '{"properties": {"city": {"type": "string", "pattern": "^é"}}}'
FITTING = request(json_schema=SCHEMA)
GRAMMAR = PlainGrammar(kind="json_schema", text=SCHEMA, library="llguidance", version="1.9.1", rules=1)
OPEN = replace(SAMPLING, temperature=0.0, top_k=0, top_p_20bit=1 << 20, logit_bias=(), seed=99, seed_origin="server")
INTENTS: tuple[dict[str, Any], ...] = (
    {},
    *(
        {"sampling": replace(SAMPLING, **{name: value})}
        for name, value in (
            ("temperature", 0.25),
            ("top_k", 0),
            ("top_p_20bit", 1 << 20),
            ("min_p_20bit", 1),
            ("seed", 8),
            ("seed_origin", "server"),
            ("logit_bias", ()),
            ("logit_bias", ((3, -1.25),)),
            ("repetition_penalty", 1.5),
            ("presence_penalty", 0.5),
            ("frequency_penalty", 0.5),
        )
    ),
    {"max_tokens": 7},
    {"stop": ()},
    {"ignore_eos": True},
    {"quote_digest": bytes(32)},
    {"nonce": bytes(32)},
    {"raw_request": b"another"},
    {"prompt": b"another"},
    {"prompt_tokens": (1, 2, 3)},
    {"asked": bare(), "sampling": OPEN, "stop": (), "max_tokens": 100},
    {"asked": bare(), "sampling": replace(OPEN, seed_origin="client"), "stop": (), "max_tokens": 100},
    {"asked": bare(), "sampling": replace(OPEN, temperature=0.5), "stop": (), "max_tokens": 100},
    {"asked": bare(), "sampling": OPEN, "stop": ("However",), "max_tokens": 100},
    {"asked": bare(), "sampling": OPEN, "stop": (), "max_tokens": 100, "logprobs": True},
    {"asked": request(sampling_top_p=0.0000001), "sampling": replace(SAMPLING, top_p_20bit=1)},
    {"asked": request(sampling_min_p=0.5 / (1 << 20)), "sampling": replace(SAMPLING, min_p_20bit=0)},
    {"asked": request(sampling_min_p=1.5 / (1 << 20)), "sampling": replace(SAMPLING, min_p_20bit=2)},
    {"asked": request(sampling_temperature=float("nan"))},
    {"asked": request(sampling_temperature=-0.0), "sampling": replace(SAMPLING, temperature=0.0)},
    {"asked": request(sampling_temperature=0.1), "sampling": replace(SAMPLING, temperature=0.10000000149011612)},
    {"asked": request(sampling_seed=(1 << 64) - 1), "sampling": replace(SAMPLING, seed=(1 << 64) - 1)},
    {"asked": WITH_DOCUMENTS, "retrieval": DOCUMENTS},
    {"asked": WITH_DOCUMENTS},
    {"retrieval": DOCUMENTS},
    {"asked": WITH_DOCUMENTS, "retrieval": replace(DOCUMENTS, query=bytes(32))},
    {"asked": WITH_DOCUMENTS, "retrieval": replace(DOCUMENTS, chunks=DOCUMENTS.chunks[:1])},
    {"asked": FITTING, "grammar": GRAMMAR},
    {"asked": request(regex="(?i)yes|né"), "grammar": replace(GRAMMAR, kind="regex", text="(?i)yes|né", rules=7)},
    {"asked": request(regex=""), "grammar": replace(GRAMMAR, kind="regex", text="")},
    {"asked": FITTING},
    {"grammar": GRAMMAR},
    {"asked": FITTING, "grammar": replace(GRAMMAR, text=SCHEMA + " ")},
    {"asked": request(regex=SCHEMA), "grammar": GRAMMAR},
    {"out_cached_tokens": 5},
    {"out_cached_tokens": 4},
    {"out_finish_reason": "length"},
    {"out_finish_reason": "stop"},
    {"out_finish_reason": "stop", "out_output_tokens": (12, 5, 7)},
    {"out_output_text": "Paris.\n\nAnd"},
    {"out_output_tokens": (2, 5, 2)},
    {"out_output_tokens": (), "out_fingerprints": (), "out_output_text": ""},
    {"stop_tokens": (9,)},
    {"stop_tokens": (5, 2)},
    {"max_tokens": 3, "asked": request(max_tokens=3), "out_finish_reason": "length", "stop_tokens": ()},
    {"max_tokens": 2, "asked": request(max_tokens=2)},
    {"out_output_text": "\N{BLACK CHESS QUEEN}\u202e\N{GRINNING FACE}\ufeff\0"},
)
STACKS: tuple[dict[str, Any], ...] = (
    {"weights_root": bytes(32)},
    {"image_id": bytes(32)},
    {"config_digest": bytes(32)},
    {"profile": "exact-v9"},
    {"claims": ("run",)},
    {"claims": (",".join(EXACT_CLAIMS),)},
    {"determinism": "none"},
    {"kernel_digest": bytes(32)},
    {"platform": "tdx"},
    {"model": "another"},
    {"measured_profile": "exact-v0"},
    {"measured_profile": "exact-v7"},
)


def agree(cases: list[Case], folder: Path) -> set[str]:
    codes = set()
    for number, (case, result) in enumerate(zip(cases, page_results(cases, folder), strict=True)):
        client = python_says(case)
        assert said(result) == client, (number, result["message"])
        codes.add(client.code)
    return codes


def test_records_that_say_otherwise(world: World, tmp_path: Path) -> None:
    made = [answered(world.machine, world.evidence, **change) for change in INTENTS]
    codes = agree([Case(encode_bundle(bundle), world.machine.policy, NOW) for bundle in made], tmp_path)
    assert len(codes) >= 20
    assert "" in codes


def test_machines_that_record_another_stack(tmp_path: Path) -> None:
    cases = []
    for number, change in enumerate(STACKS):
        folder = tmp_path / f"machine{number}"
        (folder / "code").mkdir(parents=True)
        (folder / "code" / "code.py").write_text("x = 1\n")
        machine = start(folder / "log", folder / "code", **change)
        policy = replace(machine.policy, numerics=(CURRENT, "exact-v7", "exact-v9"))
        machine.policy = policy
        cases.append(Case(encode_bundle(answered(machine, machine.evidence())), policy, NOW))
    codes = agree(cases, tmp_path)
    assert {"profile.retired", "receipt.weights_root", "receipt.platform", "receipt.profile", ""} <= codes


def test_receipts_that_the_signer_made_up(world: World, tmp_path: Path) -> None:
    payload = parse_receipt(world.receipt).payload
    other = world.machine.outcome(world.machine.intent(world.verdict))
    stranger = parse_receipt(world.machine.recorder.receipt(other)).payload
    intent, outcome, zero = payload.intent, payload.outcome, bytes(32)
    lies = (
        replace(payload, intent=stranger.intent),
        stranger,
        replace(payload, intent=replace(intent, salt=zero)),
        replace(payload, outcome=stranger.outcome),
        replace(payload, outcome=replace(outcome, index=0)),
        replace(payload, outcome=replace(outcome, index=intent.index)),
        replace(payload, outcome=replace(outcome, salt=zero)),
        replace(payload, outcome=replace(outcome, salt=b"")),
        replace(payload, outcome=replace(outcome, proof=(zero, *outcome.proof[1:]))),
        replace(payload, outcome=replace(outcome, proof=outcome.proof[:-1])),
        replace(payload, intent=replace(intent, proof=(*intent.proof, zero))),
        replace(payload, outcome=replace(outcome, index=10**9)),
        replace(payload, outcome=replace(outcome, index=(1 << 63) - 1)),
        replace(payload, checkpoint=world.committed.acceptance.checkpoint),
        replace(payload, from_accepted=(zero, *payload.from_accepted[1:])),
        replace(payload, from_attested=(zero, *payload.from_attested[1:])),
        replace(payload, from_accepted=()),
        replace(payload, from_attested=payload.from_attested * 20),
        replace(payload, outcome=replace(outcome, record=intent.record)),
    )
    signer = Signer(world.machine.keyring)
    made = [world.bundle(receipt=signer.sign_receipt(lie)) for lie in lies]
    codes = agree([Case(encode_bundle(bundle), world.machine.policy, NOW) for bundle in made], tmp_path)
    assert len(codes) >= 9


def policies(world: World) -> Iterator[str]:
    """The policy of the bundle's machine, changed; and files that are no policies."""
    good = world.machine.policy
    text = encode_policy(good)
    yield text
    for change in (
        {"not_after": NOW - 1, "created": NOW - 100},
        {"tdx_root": bytes(32)},
        {"gpu_root": bytes(32)},
        {"images": ()},
        {"weights_roots": ()},
        {"numerics": ()},
        {"numerics": ("exact-v9",)},
        {"mrseam": ()},
        {"any_config": False},
        {"any_config": False, "configs": (bytes([7]) * 32,)},
        {"any_hardware": False},
        {"any_hardware": False, "ppids": (world.verdict.tdx.ppid,)},
        {"any_hardware": False, "ppids": (world.verdict.tdx.ppid,), "gpu_chips": (world.verdict.gpu[0].chip,)},
        {"gpu_count": 2},
        {"gpu_mode": "protected-pcie"},
        {"manifest_signers": ()},
        {"manifest_signers": (bytes(32), bytes([1]) * 32)},
        {"min_tcb_evaluation_data_number": 1001},
        {"endorsement_max_age_days": 1},
        {"accepted_statuses": (Waiver(name="OutOfDate", until=NOW),)},
        {"accepted_advisories": (Waiver(name="INTEL-SA-00615", until=NOW + 5),)},
        {"images": tuple(replace(image, not_after=NOW - 1) for image in good.images)},
        {"images": tuple(replace(image, platform="vtpm") for image in good.images)},
        {"images": tuple(replace(image, td_attributes=bytes(8)) for image in good.images)},
    ):
        yield encode_policy(replace(good, **change))
    operator, witness = new_keys("log.example/starts"), new_keys("w.example/1")
    watched = replace(good, operator_log=operator.as_log, witnesses=witness.as_witness, witnesses_required=1)
    yield (asking := encode_policy(watched))
    first, second = witness.as_witness
    for key in (first, replace(first, name="w.example/2"), operator.as_witness[0], operator.as_log[0]):
        assert str(second) in asking
        yield asking.replace(str(second), str(key))
    strict = encode_policy(new_policy(Profile.PRODUCTION, now=NOW))
    yield strict
    for old, new in (
        ("version = 1", "version = 2"),
        ("version = 1", 'version = "1"'),
        ("version = 1", "version = 1.0"),
        ("version = 1", "version = 1\nversion = 1"),
        ("version = 1", "version = "),
        ("version = 1", "version = 1\nmore = 1"),
        ("[gpu]", "[gpus]"),
        ("count = 1", ""),
        ("count = 1", 'count = "two"'),
        ("count = 1", "count = 99"),
        ("count = 1", "count = 99999999999999999999"),
        ("max_age_days = 30", "max_age_days = true"),
        ("max_age_days = 30", "max_age_days = 0"),
        ("mrseam = [", "mrsem = ["),
        ('profile = "production"', 'profile = "prod"'),
        ("weights_roots = []", 'weights_roots = ["ab"]'),
        ("weights_roots = []", "weights_roots = [7]"),
        ("weights_roots = []", f'weights_roots = ["{"AA" * 32}"]'),
        ("weights_roots = []", f'weights_roots = ["{"aa " * 21}a"]'),
        ("ppids = []", 'ppids = "all"'),
        ("ppids = []", f'ppids = ["{"00" * 16}"]'),
        ("digests = []", f'digests = ["{D32}"]'),
        ("max_validity_days = 30", "max_validity_days = 29"),
        ("max_validity_days = 30", "max_validity_days = 4000"),
        ('mode = "cc-on"', 'mode = "cc"'),
        ('freshness = "session"', 'freshness = "never"'),
        ('revocation = "required"', 'revocation = "optional"'),
        ('tdx = "intel"', 'tdx = "amd"'),
        ('tdx = "intel"', f'tdx = "simulated:{D32}"'),
        ('gpu = "nvidia"', 'gpu = "simulated:00"'),
        ("signers = []", f'signers = ["{D32}"]'),
        ("[tdx.accept_status]", "[tdx.accept_status]\nRevoked = 2027-01-15T00:00:00Z"),
        ("[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = true"),
        ("[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = 2027-01-15"),
        ("[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = 2027-01-15T00:00:00"),
        ("[tdx.accept_status]", "[tdx.accept_status]\nOutOfDate = 9999-12-31T23:59:59-10:00"),
        ("[tdx.accept_advisory]", '[tdx.accept_advisory]\n"any *" = 2027-01-15T00:00:00Z'),
        (f'"{CURRENT}"', '"exact-\N{GRINNING FACE}"'),
        (f'"{CURRENT}"', '"exact\\u0007"'),
    ):
        assert old in strict, old
        yield strict.replace(old, new, 1)
    for old, new in (
        ("highest_version = 1 ", "highest_version = 0 "),
        ("revoked_images = []", f'revoked_images = ["{good.images[0].image_id.hex()}"]'),
        ('"kind":"simulated"', '"kind":"production"'),
        ('"version":1', '"version":1,"version":1'),
        ('"simulated":true', '"simulated":false'),
        ('"rtmr1":"', '"rtmr1": "'),
        ('"rtmr2":"', '"rtmr2":"0'),
        ("statement = '{", "statement = 'x{"),
        ("\nstatement = ", "\nstatements = "),
    ):
        assert old in text, old
        yield text.replace(old, new, 1)
    yield ""
    yield "= = ="
    yield "\ufeff" + text
    yield text.replace("\n", "\r\n")


def test_policies(world: World, tmp_path: Path) -> None:
    good = encode_bundle(world.bundle())
    cases = [Case(good, text, NOW) for text in policies(world)]
    codes = agree(cases, tmp_path)
    assert len([code for code in codes if code.startswith("policy.")]) >= 10
    assert {"", "quote.root", "hardware.ppid", "hardware.gpu", "measurement.no_reference", "policy.expired"} <= codes


def test_times(world: World, tmp_path: Path) -> None:
    policy: Policy = replace(world.machine.policy, created=NOW - 10**7, max_validity_days=3660, not_after=NOW + 10**8)
    good = encode_bundle(world.bundle())
    days = (-400, -31, -1, 0, 1, 29, 30, 31, 365, 800, 1158)
    codes = agree([Case(good, policy, NOW + day * 86_400) for day in days], tmp_path)
    assert len(codes) >= 4
