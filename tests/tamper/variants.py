"""Tampered bundles: one good bundle, and each way to bend it, with the code and the step that must refuse it.

Whoever bends a bundle can make its container fit, and has as much as the attack supposes: here also the machine's own
keys, so that a lie is refused for what it says and not for a broken signature, where the row is not about signatures.
`variants` gives the list in a fixed order, first the bundles that are accepted; what the machines draw at random
differs from run to run, names and codes do not. Other verifiers are held to the same list:

    python tests/tamper/variants.py OUTDIR

writes NNN-name.cmk, NNN-name.toml (the policy) and index.json: [{file, policy, at, group, name, code, step, verdict}].
"""

from __future__ import annotations

import argparse
import io
import json
import re
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from countermark import bundle as container
from countermark.bundle import Bundle, encode_bundle, entries_of, redact
from countermark.formats import cbor, eventlog, records
from countermark.formats.cose_key import Algorithm
from countermark.formats.evidence import (
    Evidence,
    GpuEvidence,
    PlatformName,
    encode_evidence,
    gpu_digest,
    parse_evidence,
)
from countermark.formats.manifest import encode_manifest, parse_envelope, parse_manifest
from countermark.formats.quote import parse_quote
from countermark.formats.receipt import (
    EXTERNAL_AAD,
    P256_ORDER,
    Acceptance,
    Answer,
    Payload,
    Placed,
    encode_payload,
    encode_receipt,
    parse_receipt,
    to_be_signed,
)
from countermark.formats.report_data import GpuFreshness, Purpose, encode_claims, gpu_nonce, parse_claims, report_data
from countermark.logkeys import new_keys
from countermark.policy import Policy, encode_policy
from countermark.tlog import merkle
from countermark.tlog.checkpoint import Checkpoint
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.platform.keyring import Keyring, sign_es256
from countermark_appliance.platform.sim import intel, measure, nvidia
from countermark_appliance.platform.sim.intel import Collateral
from countermark_appliance.records.signer import Signer
from one_answer import (
    FINGERPRINTS,
    NOW,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    REQUEST,
    TEXT,
    World,
    make_world,
    request,
)
from one_answer import answer as streamed
from sim_evidence import resign

DAY_S = 86_400
OTHER = b"\x5a" * 32
OTHER_48 = b"\x5a" * 48
ZERO = bytes(32)
SEPT_VE_DISABLE = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """`code` and `step` are empty where the bundle is accepted; `step` also where it is refused before step 1."""

    group: str
    name: str
    bundle: bytes
    policy: Policy
    at: int
    code: str
    step: str

    @property
    def verdict(self) -> str:
        """`undecidable` where something needed to decide is missing, or the policy is over."""
        if not self.code:
            return "accept"
        return "undecidable" if self.code in ("measurement.no_reference", "policy.expired") else "reject"


@dataclass(frozen=True, slots=True)
class Scene:
    """The good answer, and a stranger's: another machine of other vendors that ran the same."""

    world: World
    stranger: World

    def close(self) -> None:
        """Stop both machines' logs: they publish behind what is asked of them."""
        for machine in (self.world.machine, self.stranger.machine):
            machine.recorder.close()

    @property
    def good(self) -> Bundle:
        return self.world.bundle()

    @property
    def evidence(self) -> Evidence:
        return parse_evidence(self.world.evidence)


Change = Callable[[Scene], Any]
Row = tuple[str, str, str, Change]  # name, code, step, what makes the file, the bundle or the policy


# The container, whose bytes are made here by other means than ours.


def zipped(entries: Mapping[str, bytes], **attributes: Any) -> bytes:
    """Stored entries as Python's zipfile writes them; `attributes` are of every ZipInfo."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo(name)
            info.create_system = 3
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.writestr(info, data)
    return out.getvalue()


def members(scene: Scene) -> dict[str, bytes]:
    """Every entry of the good file, its manifest first."""
    with zipfile.ZipFile(io.BytesIO(encode_bundle(scene.good))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def whole(change: Callable[[bytes], bytes]) -> Change:
    return lambda scene: change(encode_bundle(scene.good))


def rezipped(change: Callable[[dict[str, bytes]], Mapping[str, bytes]], **attributes: Any) -> Change:
    return lambda scene: zipped(change(members(scene)), **attributes)


def doubled(scene: Scene) -> bytes:
    out = io.BytesIO(encode_bundle(scene.good))
    with warnings.catch_warnings(), zipfile.ZipFile(out, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(zipfile.ZipInfo("receipt.cose"), scene.stranger.receipt)
    return out.getvalue()


def crc_kept(scene: Scene) -> bytes:
    """A flipped byte in the receipt, and nothing else."""
    data = encode_bundle(scene.good)
    at = data.index(scene.world.receipt) + 700
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def packed(bundle: Bundle, **changed: bytes | None) -> bytes:
    """The file with entries replaced or left out (None), and a manifest that lists what is there."""
    entries = entries_of(bundle) | {name.replace("_", "."): data for name, data in changed.items()}
    kept = {name: data for name in container.ENTRIES if (data := entries.get(name)) is not None}
    return container._encode_zip({container.MANIFEST: container._manifest(kept), **kept})


def of_manifest(change: Callable[[dict[str, Any]], None]) -> Change:
    def bend(scene: Scene) -> bytes:
        entries = members(scene)
        value = cbor.decode(entries["manifest.cbor"])
        change(value)
        return zipped({**entries, "manifest.cbor": cbor.encode(value)})

    return bend


CONTAINER: list[Row] = [
    ("cut short by a byte", "bundle.container", "", whole(lambda data: data[:-1])),
    ("cut inside an entry", "bundle.container", "", whole(lambda data: data[:5000])),
    ("a byte added", "bundle.container", "", whole(lambda data: data + b"\0")),
    ("something in front", "bundle.container", "", whole(lambda data: b"MZ" + data)),
    ("twice in one file", "bundle.container", "", whole(lambda data: data + data)),
    ("empty", "bundle.container", "", lambda _: b""),
    ("a byte of the receipt flipped, nothing made to fit", "bundle.container", "", crc_kept),
    ("compressed", "bundle.container", "", rezipped(lambda e: e, compress_type=zipfile.ZIP_DEFLATED)),
    ("with times", "bundle.container", "", rezipped(lambda e: e, date_time=(2026, 1, 1, 0, 0, 0))),
    ("with extra fields", "bundle.container", "", rezipped(lambda e: e, extra=struct.pack("<HH", 0x7075, 0))),
    ("executable", "bundle.container", "", rezipped(lambda e: e, external_attr=0o755 << 16)),
    ("entries reversed", "bundle.container", "", rezipped(lambda e: dict(reversed(e.items())))),
    (
        "an entry missing",
        "bundle.container",
        "",
        rezipped(lambda e: {n: d for n, d in e.items() if n != "answer.cbor"}),
    ),
    ("an unknown entry", "bundle.container", "", rezipped(lambda e: {**e, "notes.txt": b""})),
    ("a path that leaves its folder", "bundle.container", "", rezipped(lambda e: {**e, "../anchors.cbor": b""})),
    ("names in upper case", "bundle.container", "", rezipped(lambda e: {n.upper(): d for n, d in e.items()})),
    ("an entry twice", "bundle.container", "", doubled),
    ("no manifest", "bundle.container", "", rezipped(lambda e: {n: d for n, d in e.items() if n != "manifest.cbor"})),
    (
        "entry not the one listed",
        "bundle.digest",
        "",
        rezipped(lambda e: {**e, "answer.cbor": e["answer.cbor"] + b"\0"}),
    ),
    ("manifest of another version", "bundle.digest", "", of_manifest(lambda m: m.update(v=2))),
    ("manifest of another type", "bundle.digest", "", of_manifest(lambda m: m.update(type="countermark/bundle/v2"))),
    ("manifest lists one more", "bundle.digest", "", of_manifest(lambda m: m["files"].append(["x", 0, ZERO]))),
    ("receipt above its cap", "bundle.size", "", rezipped(lambda e: {**e, "receipt.cose": bytes(1 << 20)})),
]


# What the messages say.


def part(**changes: Any) -> Change:
    """Parts of the bundle replaced."""
    return lambda scene: replace(scene.good, **changes)


def accepted(**changes: Any) -> Change:
    return lambda scene: replace(scene.good, acceptance=replace(scene.world.committed.acceptance, **changes))


def answered(**changes: Any) -> Change:
    return lambda scene: replace(scene.good, answer=replace(scene.world.answer, **changes))


def as_cbor(
    entry: str, change: Callable[[dict[str, Any]], None], bundle: Callable[[Scene], Bundle] | None = None
) -> Change:
    """The value of an entry changed as CBOR, past the checks of whoever writes bundles."""

    def bend(scene: Scene) -> bytes:
        source = scene.good if bundle is None else bundle(scene)
        value = cbor.decode(entries_of(source)[entry])
        change(value)
        return packed(source, **{entry: cbor.encode(value)})

    return bend


def salted(data: bytes, **changes: bytes) -> bytes:
    return cbor.encode({**cbor.decode(data), **changes})


def recommitted(asked: bytes = REQUEST, intent: Mapping[str, Any] = {}, outcome: Mapping[str, Any] = {}) -> Change:
    """Another answer by the same machine: it logs and signs whatever it is told, about the request `asked`."""

    def bend(scene: Scene) -> Bundle:
        machine = scene.world.machine
        committed = machine.intent(scene.world.verdict, **{"raw_request": asked, **intent})
        completed = machine.outcome(committed, **outcome)
        given = streamed(completed)
        said = {"output_tokens": "tokens", "output_text": "text", "fingerprints": "fingerprints"}
        given = replace(given, **{name: outcome[key] for key, name in said.items() if key in outcome})
        receipt = machine.recorder.receipt(completed)
        return replace(scene.good, request=asked, acceptance=committed.acceptance, answer=given, receipt=receipt)

    return bend


def asked_otherwise(code: str, **changes: Any) -> Row:
    """The request says one thing, the record another; the request is the one that was committed to."""
    (name,) = changes
    return f"asked another {name} than recorded", f"receipt.setting.{code}", "13", recommitted(request(**changes))


def stacked(name: str, code: str, **changes: Any) -> Row:
    """The INTENT names another stack than was appraised; that comes before its place in the log."""

    def bend(scene: Scene) -> Bundle:
        acceptance = scene.world.committed.acceptance
        intent = scene.world.committed.intent
        record = records.encode_record(replace(intent, stack=replace(intent.stack, **changes)))
        return replace(scene.good, acceptance=replace(acceptance, record=record))

    return name, code, "13", bend


def retold(change: Callable[[Any, Scene], Any]) -> Change:
    """The INTENT's record changed, everything else left."""

    def bend(scene: Scene) -> Bundle:
        record = records.encode_record(change(scene.world.committed.intent, scene))
        return replace(scene.good, acceptance=replace(scene.world.committed.acceptance, record=record))

    return bend


def with_message(change: Callable[[Any], None]) -> Change:
    def bend(scene: Scene) -> Bundle:
        message = pb.GenerateRequest.FromString(REQUEST)
        change(message)
        return replace(scene.good, request=message.SerializeToString(deterministic=True))

    return bend


_message = pb.GenerateRequest.FromString(REQUEST)
_message.sampling.ClearField("seed")
UNSEEDED = _message.SerializeToString(deterministic=True)
SCHEMA = '{"type": "object", "required": ["city"]}'
GRAMMAR = records.PlainGrammar(kind="json_schema", text=SCHEMA, library="llguidance", version="1.9.1", rules=1)
CONSTRAINED = request(json_schema=SCHEMA)


def under_grammar(change: Callable[[Bundle], Bundle]) -> Change:
    """An answer to CONSTRAINED by a machine that records it, then changed."""
    return lambda scene: change(recommitted(CONSTRAINED, {"grammar": GRAMMAR})(scene))


REQUESTS: list[Row] = [
    ("other bytes: one more token", "receipt.request", "12", part(request=request(max_tokens=9))),
    ("other bytes: another seed", "receipt.request", "12", part(request=request(sampling_seed=8))),
    ("other prompt", "receipt.request", "12", with_message(lambda m: setattr(m.chat.messages[0], "content", "Why?"))),
    ("other nonce", "receipt.nonce", "12", part(request=request(nonce=OTHER))),
    ("no protobuf", "request.malformed", "12", part(request=b"\xff")),
    ("a field nobody knows", "request.unknown_field", "12", part(request=REQUEST + b"\x98\x06\x01")),
    ("nonce too short", "request.nonce", "12", part(request=request(nonce=b"short"))),
    ("an empty request", "request.nonce", "12", part(request=b"")),
    ("the machine committed to another prompt", "receipt.input", "12", recommitted(intent={"prompt": b"\xa0"})),
    asked_otherwise("temperature", sampling_temperature=0.75),
    asked_otherwise("top_k", sampling_top_k=21),
    asked_otherwise("top_p_20bit", sampling_top_p=0.5),
    asked_otherwise("min_p_20bit", sampling_min_p=0.5),
    asked_otherwise("repetition_penalty", sampling_repetition_penalty=1.5),
    asked_otherwise("presence_penalty", sampling_presence_penalty=0.5),
    asked_otherwise("frequency_penalty", sampling_frequency_penalty=0.5),
    asked_otherwise("seed", sampling_seed=8),
    asked_otherwise("max_tokens", max_tokens=7),
    asked_otherwise("model", model="huge"),
    asked_otherwise("ignore_eos", ignore_eos=True),
    asked_otherwise("logprobs", logprobs=2),
    ("a seed nobody asked for, as the client's", "receipt.setting.seed_origin", "13", recommitted(UNSEEDED)),
    ("a stop string left out of the record", "receipt.setting.stop", "13", recommitted(intent={"stop": ()})),
    (
        "another schema than was sent",
        "receipt.request",
        "12",
        under_grammar(lambda b: replace(b, request=request(json_schema='{"type": "object"}'))),
    ),
    ("no schema where one was sent", "receipt.grammar", "12", under_grammar(lambda b: replace(b, request=REQUEST))),
    (
        "an expression where a schema was sent",
        "receipt.grammar",
        "12",
        under_grammar(lambda b: replace(b, request=request(regex=SCHEMA))),
    ),
    (
        "another salt of the schema",
        "receipt.grammar",
        "12",
        under_grammar(
            lambda b: replace(
                b,
                acceptance=replace(
                    b.acceptance,
                    field_salts=salted(b.acceptance.field_salts, **{"grammar.text": ZERO}),  # type: ignore[union-attr]
                ),
            )
        ),
    ),
    (
        "the machine recorded another schema",
        "receipt.grammar",
        "12",
        recommitted(CONSTRAINED, {"grammar": replace(GRAMMAR, text="{}")}),
    ),
    (
        "the machine recorded an expression",
        "receipt.grammar",
        "12",
        recommitted(CONSTRAINED, {"grammar": replace(GRAMMAR, kind="regex")}),
    ),
    ("the machine recorded no grammar", "receipt.grammar", "12", recommitted(CONSTRAINED)),
    ("the machine recorded a grammar of its own", "receipt.grammar", "12", recommitted(intent={"grammar": GRAMMAR})),
    ("a schema too long", "request.grammar_too_long", "12", part(request=request(json_schema="x" * (64 * 1024 + 1)))),
]

ACCEPTED: list[Row] = [
    ("record empty", "cbor.malformed", "12", accepted(record=b"")),
    ("record of another kind", "record.type", "12", lambda s: accepted(record=s.world.completed.record)(s)),
    ("of another start", "receipt.boot", "12", lambda s: replace(s.good, acceptance=s.stranger.committed.acceptance)),
    ("of another session's evidence", "receipt.quote", "12", retold(lambda i, _: replace(i, quote_digest=OTHER))),
    ("of another request's nonce", "receipt.nonce", "12", retold(lambda i, _: replace(i, nonce=OTHER))),
    ("another request's commitment", "receipt.request", "12", retold(lambda i, _: replace(i, raw_request=OTHER))),
    ("another input's commitment", "receipt.input", "12", retold(lambda i, _: replace(i, prompt=OTHER))),
    ("other tokens' commitment", "receipt.prompt_tokens", "12", retold(lambda i, _: replace(i, prompt_tokens=OTHER))),
    ("salts missing", "salts.field", "12", accepted(field_salts=b"\xa0")),
    (
        "salts too short",
        "salts.field",
        "12",
        lambda s: accepted(field_salts=salted(s.world.committed.acceptance.field_salts, prompt=b"x"))(s),
    ),
    (
        "another salt of the request",
        "receipt.request",
        "12",
        lambda s: accepted(field_salts=salted(s.world.committed.acceptance.field_salts, raw_request=ZERO))(s),
    ),
    (
        "another salt of the input",
        "receipt.input",
        "12",
        lambda s: accepted(field_salts=salted(s.world.committed.acceptance.field_salts, prompt=ZERO))(s),
    ),
    (
        "another salt of the tokens",
        "receipt.prompt_tokens",
        "12",
        lambda s: accepted(field_salts=salted(s.world.committed.acceptance.field_salts, prompt_tokens=ZERO))(s),
    ),
    ("another prompt token", "receipt.prompt_tokens", "12", accepted(prompt_tokens=(1, 17, 99, 5))),
    ("a prompt token less", "receipt.prompt_tokens", "12", accepted(prompt_tokens=PROMPT_TOKENS[:-1])),
    ("no prompt tokens", "receipt.prompt_tokens", "12", accepted(prompt_tokens=())),
    ("a token that is none", "accepted.field", "", as_cbor("accepted.cbor", lambda v: v.update(prompt_tokens=[-1]))),
    ("a field more", "accepted.field", "", as_cbor("accepted.cbor", lambda v: v.update(note="x"))),
    ("a field less", "accepted.field", "", as_cbor("accepted.cbor", lambda v: v.pop("proof"))),
    ("of another version", "accepted.field", "", as_cbor("accepted.cbor", lambda v: v.update(v=2))),
    ("a proof of no hashes", "accepted.field", "", as_cbor("accepted.cbor", lambda v: v.update(proof=[b"x"]))),
    (
        "trailing bytes",
        "cbor.not_deterministic",
        "",
        lambda s: packed(s.good, accepted_cbor=entries_of(s.good)["accepted.cbor"] + b"\0"),
    ),
    stacked("other platform", "receipt.platform", platform="tdx"),
    stacked("other weights", "receipt.weights_root", weights_root=OTHER),
    stacked("other image", "receipt.image_id", image_id=OTHER),
    stacked("other configuration", "receipt.config", config_digest=OTHER),
    stacked("other profile", "receipt.profile", profile="exact-v9"),
    stacked("weaker claims than the profile's", "receipt.profile", claims=("run",)),
    stacked("other kernels", "receipt.kernel_digest", kernel_digest=OTHER),
    ("another salt of the leaf", "log.inclusion", "14", accepted(leaf_salt=ZERO)),
    ("salt of the leaf too short", "salts.field", "14", accepted(leaf_salt=b"x")),
    ("another place in the log", "log.inclusion", "14", accepted(leaf_index=0)),
    ("a place outside the log", "log.range", "14", accepted(leaf_index=10**9)),
    ("no proof", "log.proof", "14", accepted(proof=())),
    (
        "another proof",
        "log.inclusion",
        "14",
        lambda s: accepted(proof=(ZERO,) * len(s.world.committed.acceptance.proof))(s),
    ),
    ("a proof too long", "log.proof", "14", lambda s: accepted(proof=(*s.world.committed.acceptance.proof, ZERO))(s)),
    ("checkpoint missing", "tlog.note", "14", accepted(checkpoint=b"")),
    (
        "checkpoint of another log",
        "log.origin",
        "14",
        lambda s: accepted(checkpoint=s.stranger.committed.acceptance.checkpoint)(s),
    ),
    (
        "checkpoint without its second signature",
        "log.signature_missing",
        "14",
        lambda s: accepted(checkpoint=b"".join(s.world.committed.acceptance.checkpoint.splitlines(keepends=True)[:-1]))(
            s
        ),
    ),
    (
        "checkpoint with one signature twice",
        "log.signature_duplicate",
        "14",
        lambda s: accepted(
            checkpoint=s.world.committed.acceptance.checkpoint
            + s.world.committed.acceptance.checkpoint.splitlines(keepends=True)[-1]
        )(s),
    ),
    (
        "checkpoint of another tree",
        "log.signature",
        "14",
        lambda s: accepted(checkpoint=other_root(s.world.committed.acceptance.checkpoint))(s),
    ),
    (
        "checkpoint with an extension line",
        "tlog.extension",
        "14",
        lambda s: accepted(checkpoint=s.world.committed.acceptance.checkpoint.replace(b"\n\n", b"\nmore\n\n", 1))(s),
    ),
]


def other_root(note: bytes) -> bytes:
    """The note with one character of its root changed, signatures left."""
    lines = note.split(b"\n")
    lines[2] = (b"B" if lines[2][:1] != b"B" else b"C") + lines[2][1:]
    return b"\n".join(lines)


ANSWERS: list[Row] = [
    ("another last token", "receipt.output_tokens", "17", answered(tokens=(12, 5, 3))),
    ("a token less", "receipt.output_tokens", "17", answered(tokens=OUTPUT_TOKENS[:2], fingerprints=FINGERPRINTS[:2])),
    ("another text", "receipt.output_text", "17", answered(text="London.")),
    ("a space more", "receipt.output_text", "17", answered(text=TEXT + " ")),
    ("other fingerprints", "receipt.fingerprints", "17", answered(fingerprints=(bytes(16),) * 3)),
    ("fingerprints in another order", "receipt.fingerprints", "17", answered(fingerprints=FINGERPRINTS[::-1])),
    ("salts missing", "salts.field", "17", answered(field_salts=b"\xa0")),
    (
        "another salt of the tokens",
        "receipt.output_tokens",
        "17",
        lambda s: answered(field_salts=salted(s.world.answer.field_salts, output_tokens=ZERO))(s),
    ),
    (
        "another salt of the text",
        "receipt.output_text",
        "17",
        lambda s: answered(field_salts=salted(s.world.answer.field_salts, output_text=ZERO))(s),
    ),
    (
        "another salt of the fingerprints",
        "receipt.fingerprints",
        "17",
        lambda s: answered(field_salts=salted(s.world.answer.field_salts, fingerprints=ZERO))(s),
    ),
    (
        "another answer of the same machine",
        "receipt.output_tokens",
        "17",
        lambda s: replace(s.good, answer=recommitted()(s).answer),
    ),
    ("a fingerprint less", "answer.field", "", as_cbor("answer.cbor", lambda v: v.update(fingerprints=bytes(32)))),
    ("a field more", "answer.field", "", as_cbor("answer.cbor", lambda v: v.update(logprobs=[]))),
    ("counts that are not the prompt's", "receipt.counts", "17", recommitted(outcome={"cached_tokens": 5})),
    ("an end it has not", "receipt.finish_reason", "17", recommitted(outcome={"finish_reason": "length"})),
    (
        "an end token passed off as a stop string",
        "receipt.finish_reason",
        "17",
        recommitted(outcome={"finish_reason": "stop"}),
    ),
    ("text behind a stop string", "receipt.finish_reason", "17", recommitted(outcome={"output_text": "Paris.\n\nAnd"})),
    ("tokens behind the end", "receipt.finish_reason", "17", recommitted(intent={"stop_tokens": (5, 2)})),
]


# The receipt: COSE, and what the machine's own keys can be made to sign.


def cose(change: Callable[[list[Any]], Any]) -> Change:
    """The COSE_Sign array changed, encoded again; nothing is signed."""

    def bend(scene: Scene) -> Bundle:
        data = scene.world.receipt
        value = cbor.decode(data[2:])
        change(value)
        return replace(scene.good, receipt=data[:2] + cbor.encode(value))

    return bend


def signed(change: Callable[[Payload, Scene], Payload]) -> Change:
    """Another payload under both of the machine's keys."""

    def bend(scene: Scene) -> Bundle:
        payload = change(parse_receipt(scene.world.receipt).payload, scene)
        return replace(scene.good, receipt=Signer(scene.world.machine.keyring).sign_receipt(payload))

    return bend


def elsewhere(which: int, context: bytes = b"", aad: bytes = b"countermark/receipt/v2", raw: bool = False) -> Change:
    """One signature by the right key over another context."""

    def bend(scene: Scene) -> Bundle:
        parsed, keys = parse_receipt(scene.world.receipt), scene.world.machine.keyring
        payload = encode_payload(parsed.payload)
        message = payload if raw else to_be_signed(payload, parsed.kids)[which].replace(EXTERNAL_AAD, aad)
        sign = (lambda m: sign_es256(keys.receipt_es256, m), lambda m: keys.receipt_ml_dsa_65.sign(m, context or None))
        signatures = list(parsed.signatures)
        signatures[which] = sign[which](message)
        return replace(scene.good, receipt=encode_receipt(payload, parsed.kids, (signatures[0], signatures[1])))

    return bend


def strangers(which: int) -> Change:
    """One signature by another machine's key, under our kid."""

    def bend(scene: Scene) -> Bundle:
        parsed, keys = parse_receipt(scene.world.receipt), Keyring()
        payload = encode_payload(parsed.payload)
        message = to_be_signed(payload, parsed.kids)
        made = (sign_es256(keys.receipt_es256, message[0]), keys.receipt_ml_dsa_65.sign(message[1]))
        signatures = (made[0], parsed.signatures[1]) if which == 0 else (parsed.signatures[0], made[1])
        return replace(scene.good, receipt=encode_receipt(payload, parsed.kids, signatures))

    return bend


def recounted(**counts: int) -> Change:
    """The OUTCOME with other counts, signed; what it lacks in the log comes after what it says."""

    def bend(payload: Payload, scene: Scene) -> Payload:
        record = records.encode_record(replace(scene.world.completed.outcome, **counts))
        return replace(payload, outcome=replace(payload.outcome, record=record))

    return signed(bend)


def high_s(value: list[Any]) -> None:
    r, s = value[3][0][2][:32], int.from_bytes(value[3][0][2][32:], "big")
    value[3][0][2] = r + (P256_ORDER - s).to_bytes(32, "big")


def other_receipt(scene: Scene) -> Payload:
    """Of another answer by the same machine in the same session."""
    return parse_receipt(recommitted()(scene).receipt).payload


def forked(payload: Payload, scene: Scene) -> Payload:
    """The machine rewrites leaf 0 and signs the new tree; consistency proofs from the old head cannot be made."""
    world = scene.world
    acceptance, done = world.committed.acceptance, world.completed
    leaves = (
        records.leaf_for(world.committed.intent, acceptance.record, acceptance.leaf_salt, 1),
        records.leaf_for(done.outcome, done.record, done.leaf_salt, 2),
    )
    tree = merkle.Tree([merkle.leaf_hash(b"rewritten"), *map(records.leaf_digest, leaves)])
    head = Checkpoint(origin=world.verdict.log_origin, size=3, root=tree.root())
    return replace(
        payload,
        checkpoint=Signer(world.machine.keyring).sign_checkpoint(head, 0),
        intent=replace(payload.intent, proof=merkle.inclusion_proof(1, 3, tree.node)),
        outcome=replace(payload.outcome, proof=merkle.inclusion_proof(2, 3, tree.node)),
        from_attested=merkle.consistency_proof(1, 3, tree.node),
        from_accepted=merkle.consistency_proof(2, 3, tree.node),
    )


RECEIPTS: list[Row] = [
    ("empty", "receipt.form", "15", part(receipt=b"")),
    ("no tag", "receipt.form", "15", lambda s: part(receipt=s.world.receipt[2:])(s)),
    ("trailing bytes", "cbor.not_deterministic", "15", lambda s: part(receipt=s.world.receipt + b"\0")(s)),
    ("one signature stripped", "receipt.signers", "15", cose(lambda v: v[3].pop())),
    ("the post-quantum signature alone", "receipt.signers", "15", cose(lambda v: v[3].pop(0))),
    ("no signatures", "receipt.signers", "15", cose(lambda v: v[3].clear())),
    ("a third signature", "receipt.signers", "15", cose(lambda v: v[3].append(v[3][0]))),
    ("signatures in the other order", "receipt.signers", "15", cose(lambda v: v[3].reverse())),
    ("one signer twice", "receipt.signers", "15", cose(lambda v: v[3].__setitem__(1, v[3][0]))),
    ("an unprotected header", "receipt.header", "15", cose(lambda v: v[1].update({5: b"x"}))),
    ("a signer's unprotected header", "receipt.header", "15", cose(lambda v: v[3][0][1].update({5: b"x"}))),
    (
        "another content type",
        "receipt.header",
        "15",
        cose(lambda v: v.__setitem__(0, v[0].replace(b"receipt+cbor", b"receipt+json"))),
    ),
    ("ES256 with the high s", "receipt.high_s", "15", cose(high_s)),
    ("a signature too short", "receipt.signature_form", "15", cose(lambda v: v[3][1].__setitem__(2, v[3][1][2][:-1]))),
    ("r of zero", "receipt.signature_form", "15", cose(lambda v: v[3][0].__setitem__(2, ZERO + v[3][0][2][32:]))),
    (
        "a signature of the other algorithm",
        "receipt.signers",
        "15",
        cose(lambda v: v[3][0].__setitem__(0, cbor.encode({1: Algorithm.EDDSA.value, 4: ZERO}))),
    ),
    (
        "payload of another version",
        "receipt.field",
        "15",
        cose(lambda v: v.__setitem__(2, cbor.encode({**cbor.decode(v[2]), "v": 2}))),
    ),
    (
        "payload changed",
        "receipt.es256",
        "15",
        lambda s: part(receipt=s.world.receipt.replace(s.world.completed.leaf_salt, ZERO))(s),
    ),
    (
        "ES256 flipped",
        "receipt.es256",
        "15",
        cose(lambda v: v[3][0].__setitem__(2, bytes([v[3][0][2][0] ^ 1]) + v[3][0][2][1:])),
    ),
    (
        "ML-DSA flipped",
        "receipt.ml_dsa_65",
        "15",
        cose(lambda v: v[3][1].__setitem__(2, bytes([v[3][1][2][0] ^ 1]) + v[3][1][2][1:])),
    ),
    ("ES256 by a stranger under our key's name", "receipt.es256", "15", strangers(0)),
    ("ML-DSA by a stranger under our key's name", "receipt.ml_dsa_65", "15", strangers(1)),
    ("ES256 in another context", "receipt.es256", "15", elsewhere(0)),
    ("ML-DSA in another context", "receipt.ml_dsa_65", "15", elsewhere(1)),
    ("ML-DSA with a context string", "receipt.ml_dsa_65", "15", elsewhere(1, context=EXTERNAL_AAD, aad=EXTERNAL_AAD)),
    ("ES256 over the bare payload", "receipt.es256", "15", elsewhere(0, raw=True)),
    ("ML-DSA over the bare payload", "receipt.ml_dsa_65", "15", elsewhere(1, raw=True)),
    ("of another start", "receipt.kid", "15", lambda s: part(receipt=s.stranger.receipt)(s)),
    (
        "signed by another machine",
        "receipt.kid",
        "15",
        lambda s: part(receipt=Signer(s.stranger.machine.keyring).sign_receipt(parse_receipt(s.world.receipt).payload))(
            s
        ),
    ),
    ("of another answer in this session", "receipt.intent", "16", signed(lambda _, s: other_receipt(s))),
    (
        "another INTENT's salt",
        "receipt.intent",
        "16",
        signed(lambda p, _: replace(p, intent=replace(p.intent, salt=ZERO))),
    ),
    (
        "another answer's OUTCOME",
        "receipt.outcome",
        "16",
        signed(lambda p, s: replace(p, outcome=other_receipt(s).outcome)),
    ),
    (
        "OUTCOME of no known type",
        "record.type",
        "16",
        signed(lambda p, _: replace(p, outcome=replace(p.outcome, record=p.intent.record))),
    ),
    ("OUTCOME of more prompt tokens", "receipt.counts", "17", recounted(prompt_count=5)),
    ("OUTCOME of more output tokens", "receipt.counts", "17", recounted(output_count=4)),
    (
        "OUTCOME before its INTENT",
        "receipt.order",
        "16",
        signed(lambda p, _: replace(p, outcome=replace(p.outcome, index=0))),
    ),
    (
        "OUTCOME never logged",
        "log.inclusion",
        "18",
        signed(lambda p, _: replace(p, outcome=replace(p.outcome, salt=ZERO))),
    ),
    (
        "OUTCOME outside the log",
        "log.range",
        "18",
        signed(lambda p, _: replace(p, outcome=replace(p.outcome, index=10**9))),
    ),
    (
        "a proof too short",
        "log.proof",
        "18",
        signed(lambda p, _: replace(p, outcome=replace(p.outcome, proof=p.outcome.proof[:-1]))),
    ),
    (
        "checkpoint from before the answer",
        "log.proof",
        "18",
        signed(lambda p, s: replace(p, checkpoint=s.world.committed.acceptance.checkpoint)),
    ),
    (
        "checkpoint of another log",
        "log.origin",
        "18",
        signed(lambda p, s: replace(p, checkpoint=parse_receipt(s.stranger.receipt).payload.checkpoint)),
    ),
    (
        "checkpoint of another tree",
        "log.signature",
        "18",
        signed(lambda p, _: replace(p, checkpoint=other_root(p.checkpoint))),
    ),
    (
        "not grown from the accepted log",
        "log.consistency",
        "18",
        signed(lambda p, _: replace(p, from_accepted=(ZERO, *p.from_accepted[1:]))),
    ),
    (
        "not grown from the attested log",
        "log.consistency",
        "18",
        signed(lambda p, _: replace(p, from_attested=(ZERO, *p.from_attested[1:]))),
    ),
    ("a fork of the log", "log.consistency", "18", signed(forked)),
]


# The evidence, signed again by the simulated vendors where the row is not about a signature.


def evidence(change: Callable[[Evidence, Scene], Evidence]) -> Change:
    return lambda scene: replace(scene.good, evidence=encode_evidence(change(scene.evidence, scene)))


def platform_of(scene: Scene) -> Any:
    return scene.world.machine.attester._platform


def td(**body: bytes) -> Change:
    """Another TD report, signed by the boot's attestation key."""
    return evidence(lambda e, s: replace(e, quote=resign(platform_of(s), e.quote, **body)))


def attributes(bits: int) -> Change:
    return td(td_attributes=bits.to_bytes(8, "little"))


def quote_byte(at: int, bit: int = 1) -> Change:
    return evidence(lambda e, _: replace(e, quote=e.quote[:at] + bytes([e.quote[at] ^ bit]) + e.quote[at + 1 :]))


def quote_part(name: str, at: int) -> Change:
    """One bit of a part of the quote."""

    def bend(e: Evidence, _: Scene) -> Evidence:
        data = getattr(parse_quote(e.quote), name)
        start = e.quote.index(data) + at % len(data)
        return replace(e, quote=e.quote[:start] + bytes([e.quote[start] ^ 1]) + e.quote[start + 1 :])

    return evidence(bend)


def claimed(**values: Any) -> Change:
    """Other claims, quoted."""

    def bend(e: Evidence, s: Scene) -> Evidence:
        claims = encode_claims(replace(parse_claims(e.claims), **values))
        return replace(e, claims=claims, quote=resign(platform_of(s), e.quote, report_data=report_data(claims)))

    return evidence(bend)


def endorsed(**says: Any) -> Change:
    """What the vendor says of the machine, newly signed; `says` are `Collateral` fields."""

    def bend(e: Evidence, s: Scene) -> Evidence:
        data = intel.collateral_json(s.world.machine.state.vendor, Collateral(**{"issued": NOW - 3600, **says}))
        return replace(e, endorsements=replace(e.endorsements, tdx=data))

    return evidence(bend)


def edited(change: Callable[[dict[str, Any], Scene], dict[str, Any]]) -> Change:
    """Members of the endorsements replaced, or removed (None); nothing is signed again."""

    def bend(e: Evidence, s: Scene) -> Evidence:
        members = json.loads(e.endorsements.tdx)
        kept = {name: value for name, value in (members | change(members, s)).items() if value is not None}
        return replace(e, endorsements=replace(e.endorsements, tdx=json.dumps(kept).encode()))

    return evidence(bend)


def log_of(name: str, change: Callable[[list[Any]], list[Any]]) -> Change:
    def bend(e: Evidence, _: Scene) -> Evidence:
        log = eventlog.parse_event_log(getattr(e, name))
        data = eventlog.encode_event_log(replace(log, events=tuple(change(list(log.events)))))
        return replace(e, **{name: data})

    return evidence(bend)


def gpus(change: Callable[[tuple[GpuEvidence, ...], Scene], tuple[GpuEvidence, ...]]) -> Change:
    """Other GPU evidence, claimed and quoted."""

    def bend(e: Evidence, s: Scene) -> Evidence:
        gpu = change(e.gpu, s)
        claims = encode_claims(replace(parse_claims(e.claims), gpu_digest=gpu_digest(gpu)))
        quote = resign(platform_of(s), e.quote, report_data=report_data(claims))
        return replace(e, gpu=gpu, claims=claims, quote=quote)

    return evidence(bend)


def reported(scene: Scene, **arguments: Any) -> tuple[GpuEvidence, ...]:
    """A report of the machine's GPU over the right nonce, or as `arguments` say."""
    state, claims = scene.world.machine.state, parse_claims(scene.evidence.claims)
    given = {"nonce": gpu_nonce(claims.nonce, claims.tls_spki), **arguments}
    return (GpuEvidence(report=nvidia.report(state.gpus[0], **given), certs=state.gpus[0].chain(state.gpu_vendor)),)


def other_gpu(items: tuple[GpuEvidence, ...], scene: Scene) -> tuple[GpuEvidence, ...]:
    """Another genuine GPU of the same vendor."""
    state, claims = scene.world.machine.state, parse_claims(scene.evidence.claims)
    gpu = nvidia.make_gpu(state.gpu_vendor, now=NOW)
    report = nvidia.report(gpu, gpu_nonce(claims.nonce, claims.tls_spki))
    return (replace(items[0], report=report, certs=gpu.chain(state.gpu_vendor)),)


def flipped(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def of_gpu(**values: Callable[[GpuEvidence], Any]) -> Change:
    return gpus(lambda items, _: tuple(replace(g, **{n: f(g) for n, f in values.items()}) for g in items))


EVIDENCE: list[Row] = [
    ("empty", "cbor.malformed", "1", part(evidence=b"")),
    ("trailing bytes", "cbor.not_deterministic", "1", lambda s: part(evidence=s.world.evidence + b"\0")(s)),
    ("quote cut short", "quote.truncated", "1", evidence(lambda e, _: replace(e, quote=e.quote[:-1]))),
    ("quote of another version", "quote.version", "1", quote_byte(0, 2)),
    ("quote of another TEE", "quote.tee_type", "1", quote_byte(4)),
    ("CRL missing", "endorsements.crl_missing", "1", edited(lambda _m, _s: {"pck_crl": None})),
    (
        "endorsements that are no JSON",
        "endorsements.json",
        "1",
        evidence(lambda e, _: replace(e, endorsements=replace(e.endorsements, tdx=b"{"))),
    ),
    (
        "claims of another version",
        "claims.version",
        "1",
        evidence(lambda e, _: replace(e, claims=cbor.encode({**cbor.decode(e.claims), "v": 2}))),
    ),
    ("of a stranger's machine", "quote.root", "2", lambda s: part(evidence=s.stranger.evidence)(s)),
    (
        "simulated, and calls itself genuine",
        "quote.platform",
        "2",
        evidence(lambda e, _: replace(e, platform=PlatformName.TDX)),
    ),
    ("endorsements expired", "endorsements.expired", "2", endorsed(issued=NOW - 31 * DAY_S)),
    ("endorsements from the future", "endorsements.not_yet_valid", "2", endorsed(issued=NOW + 60)),
    ("endorsements rolled back", "endorsements.rolled_back", "2", endorsed(evaluation_number=16)),
    (
        "TCB info changed after it was signed",
        "endorsements.signature",
        "2",
        edited(lambda m, _s: {"tcb_info": m["tcb_info"] + " "}),
    ),
    (
        "TCB info with the other signature",
        "endorsements.signature",
        "2",
        edited(lambda m, _s: {"tcb_info_signature": m["qe_identity_signature"]}),
    ),
    ("CRLs swapped", "endorsements.crl_issuer", "2", edited(lambda m, _s: {"root_ca_crl": m["pck_crl"]})),
    (
        "TCB signer revoked",
        "endorsements.signer_revoked",
        "2",
        lambda s: endorsed(revoked_by_root=(s.world.machine.state.vendor.tcb_signing.certificate,))(s),
    ),
    (
        "endorsements of another vendor",
        "endorsements.root",
        "2",
        evidence(lambda e, s: replace(e, endorsements=parse_evidence(s.stranger.evidence).endorsements)),
    ),
    ("quote header flipped", "quote.signature", "3", quote_byte(30)),
    ("TD report flipped", "quote.signature", "3", quote_byte(48 + 583)),
    ("quote signature flipped", "quote.signature", "3", quote_part("signature", 40)),
    ("attestation key flipped", "quote.qe_binding", "3", quote_part("attestation_key", 63)),
    ("QE report flipped", "quote.qe_signature", "3", quote_byte(48 + 584 + 4 + 134 + 64)),
    ("QE report signature flipped", "quote.qe_signature", "3", quote_part("qe_report_signature", 63)),
    ("TCB info of another platform", "tcb.fmspc", "3", endorsed(fmspc=b"OTHERX")),
    (
        "machine's certificate revoked",
        "quote.pck_revoked",
        "3",
        lambda s: endorsed(revoked_by_pck_ca=(s.world.machine.state.vendor.pck.certificate,))(s),
    ),
    ("platform out of date", "tcb.status", "3", endorsed(status="OutOfDate")),
    ("platform revoked", "tcb.status", "3", endorsed(status="Revoked")),
    ("quoting enclave out of date", "tcb.status", "3", endorsed(qe_status="OutOfDate")),
    ("an advisory open", "tcb.advisory", "3", endorsed(advisories=("INTEL-SA-01036",))),
    ("debug", "tdx.debug", "4", attributes(SEPT_VE_DISABLE | 1)),
    ("SEPT_VE_DISABLE off", "tdx.sept_ve_disable", "4", attributes(0)),
    ("a reserved attribute", "tdx.reserved", "4", attributes(SEPT_VE_DISABLE | 1 << 40)),
    ("migratable", "tdx.migratable", "4", attributes(SEPT_VE_DISABLE | 1 << 29)),
    ("profiling", "tdx.perfmon", "4", attributes(SEPT_VE_DISABLE | 1 << 63)),
    ("an unknown feature in XFAM", "tdx.xfam", "4", td(xfam=bytes.fromhex("e702060000000080"))),
    ("another TDX module", "tdx.mrseam", "4", td(mrseam=OTHER_48)),
    ("a module not of the vendor's signer", "tdx.mrsignerseam", "4", td(mrsignerseam=OTHER_48)),
    ("a debug module", "tdx.seam_attributes", "4", td(seam_attributes=b"\1" + bytes(7))),
    ("other firmware", "measurement.mrtd", "5", td(mrtd=OTHER_48)),
    ("another launch shape", "measurement.rtmr0", "5", td(rtmr0=OTHER_48)),
    ("another boot loader", "measurement.rtmr1", "5", td(rtmr1=OTHER_48)),
    ("another command line or initrd", "measurement.rtmr2", "5", td(rtmr2=OTHER_48)),
    ("MRCONFIGID set", "measurement.mrconfigid", "5", td(mrconfigid=OTHER_48)),
    ("MROWNER set", "measurement.mrowner", "5", td(mrowner=OTHER_48)),
    ("firmware log reordered", "eventlog.rtmr0", "6", log_of("ccel", lambda e: [e[1], e[0], *e[2:]])),
    ("firmware log cut short", "eventlog.rtmr2", "6", log_of("ccel", lambda e: e[:-1])),
    ("a firmware event twice", "eventlog.rtmr1", "6", log_of("ccel", lambda e: [*e, e[4]])),
    ("RTMR3 log reordered", "rtmr3.order", "6", log_of("rtmr3_log", lambda e: [e[1], e[0], *e[2:]])),
    ("RTMR3 log cut short", "rtmr3.order", "6", log_of("rtmr3_log", lambda e: e[:-1])),
    ("an event after system-ready", "rtmr3.after_ready", "6", log_of("rtmr3_log", lambda e: [*e, e[-1]])),
    (
        "an RTMR3 event with another digest",
        "rtmr3.digest",
        "6",
        log_of("rtmr3_log", lambda e: [replace(e[0], digest=OTHER_48), *e[1:]]),
    ),
    ("values logged that were never extended", "rtmr3.replay", "6", td(rtmr3=bytes(48))),
    (
        "another start's RTMR3 log",
        "rtmr3.replay",
        "6",
        evidence(lambda e, s: replace(e, rtmr3_log=parse_evidence(s.stranger.evidence).rtmr3_log)),
    ),
    (
        "claims changed after the quote",
        "claims.report_data",
        "7b",
        evidence(lambda e, _: replace(e, claims=e.claims.replace(b"test.example", b"evil.example"))),
    ),
    ("a passport offered as a session", "claims.purpose", "7b", claimed(purpose=Purpose.PASSPORT, exporter=None)),
    (
        "evidence for a replay offered as a session",
        "claims.purpose",
        "7b",
        claimed(purpose=Purpose.REPLAY, exporter=None),
    ),
    ("weights that were not measured", "claims.weights_root", "7b", claimed(weights_root=OTHER)),
    ("an image that was not measured", "claims.image_id", "7b", claimed(image_id=OTHER)),
    ("a configuration that was not measured", "claims.config", "7b", claimed(config=OTHER)),
    ("keys that were not measured", "claims.keys", "7b", claimed(keys=OTHER)),
    (
        "other keys handed over",
        "claims.keys_differ",
        "7b",
        evidence(lambda e, _: replace(e, keys=(e.keys[0], *Keyring().role_keys()[1:]))),
    ),
    ("another TLS key claimed", "claims.tls_key", "7b", claimed(tls_spki=OTHER)),
    ("GPU evidence left out", "gpu.missing", "8", gpus(lambda _i, _s: ())),
    ("GPU evidence not the claimed one", "gpu.digest", "8", claimed(gpu_digest=OTHER)),
    ("GPU reports from boot", "gpu.freshness", "8", claimed(gpu_freshness=GpuFreshness.BOOT)),
    ("GPU report flipped", "gpu.signature", "8", of_gpu(report=lambda g: flipped(g.report, 60))),
    ("GPU signature flipped", "gpu.signature", "8", of_gpu(report=lambda g: flipped(g.report, -1))),
    ("GPU report for another challenge", "gpu.nonce", "8", gpus(lambda _i, s: reported(s, nonce=OTHER))),
    ("GPU firmware other than certified", "gpu.fwid", "8", gpus(lambda _i, s: reported(s, fwid=OTHER_48))),
    ("GPU in another mode", "gpu.mode", "8", gpus(lambda _i, s: reported(s, protected_pcie=True))),
    ("another genuine GPU", "gpu.device_key", "8", gpus(other_gpu)),
    ("GPU chain with a gap", "gpu.chain_signature", "8", of_gpu(certs=lambda g: (g.certs[0], *g.certs[2:]))),
    ("GPU of another vendor", "gpu.root", "8", gpus(lambda _i, s: parse_evidence(s.stranger.evidence).gpu)),
    ("GPU report with a trailing byte", "spdm.trailing", "1", of_gpu(report=lambda g: g.report + b"\0")),
]


def manifest(change: Callable[[Any], Any], signers: Callable[[Scene], Any] | None = None) -> Change:
    """The measurement manifest with other content, signed by its publisher or by `signers`."""

    def bend(scene: Scene) -> Bundle:
        state = scene.world.machine.state
        value = change(parse_manifest(parse_envelope(state.manifest).payload))
        by = state.signers if signers is None else signers(scene)
        return replace(scene.good, manifest=measure.sign_manifest(by, encode_manifest(value)))

    return bend


def manifest_signature(which: int) -> Change:
    def bend(scene: Scene) -> Bundle:
        value = json.loads(scene.world.machine.manifest)
        text = value["signatures"][which]["sig"]
        value["signatures"][which]["sig"] = ("B" if text[0] != "B" else "C") + text[1:]
        return replace(scene.good, manifest=json.dumps(value, separators=(",", ":"), sort_keys=True).encode())

    return bend


MANIFESTS: list[Row] = [
    ("no manifest at all", "manifest.members", "19", part(manifest=b"{}")),
    ("of a stranger", "manifest.signer", "19", lambda s: part(manifest=s.stranger.machine.manifest)(s)),
    (
        "ours, signed by a stranger",
        "manifest.signer",
        "19",
        manifest(lambda m: m, lambda s: s.stranger.machine.state.signers),
    ),
    ("first signature flipped", "manifest.signature", "19", manifest_signature(0)),
    ("second signature flipped", "manifest.signature", "19", manifest_signature(1)),
    (
        "of another image",
        "manifest.image",
        "19",
        manifest(lambda m: replace(m, image_id=OTHER, subjects=(replace(m.subjects[0], sha256=OTHER),))),
    ),
    ("expired", "manifest.expired", "19", manifest(lambda m: replace(m, not_before=NOW - 9000, not_after=NOW - 1))),
    ("from the future", "manifest.not_yet_valid", "19", manifest(lambda m: replace(m, not_before=NOW + 60))),
]


# Policies that accept less, over the good bundle.


def under(**changes: Any) -> Change:
    return lambda scene: replace(scene.world.machine.policy, **changes)


def image(**changes: Any) -> Change:
    return lambda s: replace(s.world.machine.policy, images=(replace(s.world.machine.policy.images[0], **changes),))


def witnessed(scene: Scene) -> Policy:
    """Asks for an operator log and one witness; nothing came along."""
    operator, witness = new_keys("operator.example/log"), new_keys("witness.example/1")
    return replace(
        scene.world.machine.policy, operator_log=operator.as_log, witnesses=witness.as_witness, witnesses_required=1
    )


POLICIES: list[Row] = [
    ("expired", "policy.expired", "", under(created=NOW - DAY_S, not_after=NOW - 1)),
    ("another CPU vendor's root", "quote.root", "2", under(tdx_root=OTHER)),
    ("a higher floor of endorsements", "endorsements.rolled_back", "2", under(min_tcb_evaluation_data_number=1 << 30)),
    ("another TDX module", "tdx.mrseam", "4", under(mrseam=(OTHER_48,))),
    ("no image", "measurement.no_reference", "5", under(images=())),
    ("an image that has run out", "manifest.expired", "5", image(not_after=NOW - 1)),
    ("another GPU vendor's root", "gpu.root", "8", under(gpu_root=OTHER)),
    ("two GPUs", "gpu.count", "8", under(gpu_count=2)),
    ("another GPU mode", "gpu.mode", "8", under(gpu_mode="protected-pcie")),
    ("listed machines only", "hardware.ppid", "9", under(any_hardware=False, ppids=(bytes(16),), gpu_chips=(OTHER,))),
    ("other weights", "weights.root", "10", under(weights_roots=(OTHER,))),
    ("another arithmetic", "numerics.profile", "10", under(numerics=("fast-v9",))),
    ("another configuration", "config.digest", "10", under(any_config=False, configs=(OTHER,))),
    (
        "other publishers",
        "manifest.signer",
        "19",
        lambda s: replace(s.world.machine.policy, manifest_signers=s.stranger.machine.state.signer_digests),
    ),
    ("a witness nobody had", "log.unwitnessed", "20", witnessed),
]


# Redaction: nothing by half, nothing put back.


def without(**what: bool) -> Callable[[Scene], Bundle]:
    return lambda scene: redact(scene.good, **what)


PROMPTLESS, OUTPUTLESS, BARE = without(prompt=True), without(output=True), without(prompt=True, output=True)


def guessed(scene: Scene, bundle: Callable[[Scene], Bundle]) -> Bundle:
    """What was left out put back by somebody who guessed it right, with salts of their own."""
    placed = {item.name: getattr(scene.world.committed.acceptance, item.name) for item in fields(Placed)}
    own = [
        records.encode_salts(dict.fromkeys(names, OTHER)) for names in (records.INTENT_FIELDS, records.OUTCOME_FIELDS)
    ]
    acceptance = Acceptance(**placed, prompt_tokens=PROMPT_TOKENS, field_salts=own[0])
    answer = Answer(tokens=OUTPUT_TOKENS, text=TEXT, fingerprints=FINGERPRINTS, field_salts=own[1])
    if bundle(scene).request is None:
        return replace(bundle(scene), request=REQUEST, acceptance=acceptance, answer=answer)
    return replace(bundle(scene), answer=answer)


def kept(bundle: Callable[[Scene], Bundle], entry: str, **values: Any) -> Change:
    """A redacted bundle in which some values of an entry are still there; a callable is given the scene."""

    def bend(scene: Scene) -> Any:
        given = {name: value(scene) if callable(value) else value for name, value in values.items()}
        return as_cbor(entry, lambda found: found.update(given), bundle)(scene)

    return bend


def less(change: Change, **what: bool) -> Change:
    """What a change makes, redacted."""
    return lambda scene: redact(change(scene), **what)


REDACTED: list[Row] = [
    ("prompt: the request kept", "bundle.redaction", "", lambda s: packed(PROMPTLESS(s), request_bin=REQUEST)),
    ("prompt: only the request left out", "bundle.redaction", "", lambda s: packed(s.good, request_bin=None)),
    (
        "prompt: its tokens kept",
        "bundle.redaction",
        "",
        kept(PROMPTLESS, "accepted.cbor", prompt_tokens=list(PROMPT_TOKENS)),
    ),
    (
        "prompt: its salts kept",
        "bundle.redaction",
        "",
        kept(PROMPTLESS, "accepted.cbor", field_salts=lambda s: s.world.committed.acceptance.field_salts),
    ),
    (
        "prompt: fingerprints kept",
        "bundle.redaction",
        "",
        kept(PROMPTLESS, "answer.cbor", fingerprints=b"".join(FINGERPRINTS)),
    ),
    (
        "prompt: salt of the fingerprints kept",
        "bundle.redaction",
        "",
        kept(PROMPTLESS, "answer.cbor", field_salts=lambda s: s.world.answer.field_salts),
    ),
    (
        "prompt: no salt of the text",
        "bundle.redaction",
        "",
        kept(PROMPTLESS, "answer.cbor", field_salts=cbor.encode({"output_tokens": ZERO})),
    ),
    ("output: its text kept", "bundle.redaction", "", kept(OUTPUTLESS, "answer.cbor", text=TEXT)),
    ("output: its tokens kept", "bundle.redaction", "", kept(OUTPUTLESS, "answer.cbor", tokens=list(OUTPUT_TOKENS))),
    (
        "output: its salts kept",
        "bundle.redaction",
        "",
        kept(OUTPUTLESS, "answer.cbor", field_salts=lambda s: s.world.answer.field_salts),
    ),
    (
        "output: fingerprints kept",
        "bundle.redaction",
        "",
        kept(OUTPUTLESS, "answer.cbor", fingerprints=b"".join(FINGERPRINTS)),
    ),
    ("whole: fingerprints left out", "bundle.redaction", "", kept(without(), "answer.cbor", fingerprints=None)),
    ("prompt put back by a guess", "receipt.request", "12", lambda s: guessed(s, PROMPTLESS)),
    ("output put back by a guess", "receipt.output_tokens", "17", lambda s: guessed(s, OUTPUTLESS)),
    ("prompt: another text", "receipt.output_text", "17", kept(PROMPTLESS, "answer.cbor", text="London.")),
    ("prompt: other tokens", "receipt.output_tokens", "17", kept(PROMPTLESS, "answer.cbor", tokens=[12, 5, 3])),
    (
        "prompt: a salt too short",
        "bundle.redaction",
        "",
        kept(PROMPTLESS, "answer.cbor", field_salts=cbor.encode({"output_text": b"x", "output_tokens": ZERO})),
    ),
    (
        "output: another prompt token",
        "receipt.prompt_tokens",
        "12",
        kept(OUTPUTLESS, "accepted.cbor", prompt_tokens=[1]),
    ),
    (
        "output: another request",
        "receipt.request",
        "12",
        lambda s: packed(OUTPUTLESS(s), request_bin=request(max_tokens=9)),
    ),
    (
        "both: of another start",
        "receipt.boot",
        "12",
        lambda s: replace(BARE(s), acceptance=redact(s.stranger.bundle(), prompt=True).acceptance),
    ),
    (
        "both: other weights recorded",
        "receipt.weights_root",
        "13",
        lambda s: replace(
            BARE(s),
            acceptance=replace(BARE(s).acceptance, record=stacked("", "", weights_root=OTHER)[3](s).acceptance.record),
        ),
    ),
    ("both: never logged", "log.inclusion", "14", kept(BARE, "accepted.cbor", leaf_salt=ZERO)),
    (
        "both: a signature stripped",
        "receipt.signers",
        "15",
        lambda s: replace(BARE(s), receipt=cose(lambda v: v[3].pop())(s).receipt),
    ),
    (
        "both: an end that cannot be",
        "receipt.finish_reason",
        "17",
        less(recommitted(outcome={"finish_reason": "length"}), prompt=True, output=True),
    ),
    ("prompt: more output tokens", "receipt.counts", "17", less(recounted(output_count=4), prompt=True)),
    ("output: more prompt tokens", "receipt.counts", "17", less(recounted(prompt_count=5), output=True)),
    (
        "both: more output than was asked for",
        "receipt.counts",
        "17",
        less(recounted(output_count=9), prompt=True, output=True),
    ),
    (
        "both: more cached than there was",
        "receipt.counts",
        "17",
        less(recommitted(outcome={"cached_tokens": 5}), prompt=True, output=True),
    ),
]

# Proofs made later: read whether the policy asks for them or not.

LATER: list[Row] = [
    ("an EPOCH that is none", "witnessed.field", "", part(epoch=b"\xa0")),
    ("an EPOCH cut short", "cbor.malformed", "", part(epoch=b"\xa1")),
    ("a witness that is none", "receipt_witness.field", "", part(witness=b"\xa0")),
    (
        "a witness of another version",
        "receipt_witness.field",
        "",
        part(witness=cbor.encode({"v": 2, "checkpoint": b"", "proof": []})),
    ),
    ("anchors that are none", "anchors.field", "", part(anchors=b"\xa0")),
    ("no anchor in anchors", "anchors.count", "", part(anchors=cbor.encode({"v": 1, "anchors": []}))),
]

GROUPS: dict[str, list[Row]] = {
    "good": [
        ("whole", "", "", part()),
        ("without the measurement manifest", "", "", part(manifest=None)),
        ("without the prompt", "", "", PROMPTLESS),
        ("without the output", "", "", OUTPUTLESS),
        ("without prompt and output", "", "", BARE),
        ("under a schema", "", "", under_grammar(lambda b: b)),
        ("under a schema, without the prompt", "", "", less(under_grammar(lambda b: b), prompt=True)),
    ],
    "container": CONTAINER,
    "request": REQUESTS,
    "accepted": ACCEPTED,
    "answer": ANSWERS,
    "receipt": RECEIPTS,
    "evidence": EVIDENCE,
    "manifest": MANIFESTS,
    "policy": POLICIES,
    "redaction": REDACTED,
    "later": LATER,
}


def make_scene(folder: Path) -> Scene:
    """Boot two machines and ask each once; they keep their logs below `folder`."""
    for name in ("ours", "stranger"):
        (folder / name).mkdir()
    return Scene(make_world(folder / "ours"), make_world(folder / "stranger"))


def variants(scene: Scene) -> Iterator[Variant]:
    """All of them, in their order."""
    policy = scene.world.machine.policy
    for group, rows in GROUPS.items():
        for name, code, step, make in rows:
            made = make(scene)
            bent = made if isinstance(made, Policy) else policy
            data = encode_bundle(scene.good) if isinstance(made, Policy) else made
            data = encode_bundle(data) if isinstance(data, Bundle) else data
            yield Variant(group=group, name=name, bundle=data, policy=bent, at=NOW, code=code, step=step)


def export(folder: Path) -> int:
    """Write them all; the number of files."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    with tempfile.TemporaryDirectory() as work:
        scene = make_scene(Path(work))
        for number, item in enumerate(variants(scene)):
            stem = f"{number:03}-{item.group}-{re.sub('[^a-z0-9]+', '-', item.name.lower()).strip('-')}"
            (folder / f"{stem}.cmk").write_bytes(item.bundle)
            (folder / f"{stem}.toml").write_text(encode_policy(item.policy))
            says = {name: getattr(item, name) for name in ("at", "group", "name", "code", "step", "verdict")}
            index.append({"file": f"{stem}.cmk", "policy": f"{stem}.toml", **says})
        scene.close()
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return len(index)


def main() -> None:
    parser = argparse.ArgumentParser(description="write tampered bundles, their policies and what must be said of them")
    parser.add_argument("outdir", type=Path)
    folder = parser.parse_args().outdir
    print(f"{export(folder)} bundles in {folder}")


if __name__ == "__main__":
    main()
