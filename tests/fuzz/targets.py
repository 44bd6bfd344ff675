"""Every parser of bytes from outside, with seeds that it accepts and the errors it may raise.

Seeds are simulated evidence, and genuine third-party files where they are present (see `vectors`). A parser that is
missing here fails `test_fuzz.py`, which collects them from the sources.
"""

from __future__ import annotations

import base64
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import vectors
from anchors.tsa import Authority, response
from countermark import asked, bundle, x509chain
from countermark.errors import (
    BundleError,
    ConfigError,
    CountermarkError,
    FormatError,
    PolicyError,
    RequestError,
    Undecidable,
)
from countermark.formats import (
    anchors,
    boot_events,
    cbor,
    cose_key,
    dice,
    eventlog,
    evidence,
    manifest,
    measured,
    nvidia_evidence,
    ots,
    quote,
    receipt,
    records,
    report_data,
    spdm,
    timestamp,
    tpm_log,
    witnessed,
)
from countermark.gpu.report import DICE_FWID
from countermark.gpu.revocation import parse_ocsp
from countermark.gpu.rim import parse_rim
from countermark.policy import encode_policy, parse_policy
from countermark.proxy.wanted import parse_wanted
from countermark.tdx.endorsements import parse_endorsements
from countermark.tlog import checkpoint, cosignature, proof, tiles
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.config import parse_config
from countermark_appliance.platform.sim import nvidia
from countermark_appliance.platform.sim.machine import TdLaunch
from countermark_appliance.replaying import parse_recorded
from countermark_measurements import acpi, fat, tdvf, uki
from fuzz import mutator
from measurements.predict import artefacts, test_tdvf
from one_answer import REQUEST, World, make_world, request
from sim_evidence import NOW, Scene, machine, policy_for

OTS = Path(__file__).parents[1] / "data" / "ots"
TPM_LOG = Path(__file__).parents[1] / "data" / "tpmlog" / "binary_bios_measurements.bin"
Mutate = Callable[[random.Random, bytes, bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    """`covers`: the functions it calls, as `module.name`. `mutators`: each input is made by one of them."""

    parse: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    covers: tuple[str, ...]
    errors: tuple[type[CountermarkError], ...] = (FormatError,)
    mutators: tuple[Mutate, ...] = (mutator.mutate,)


@cache
def scene() -> evidence.Evidence:
    return Scene().make()


@cache
def world() -> World:
    return make_world(Path(tempfile.mkdtemp(prefix="countermark-fuzz-")))


def constrained() -> bytes:
    """The INTENT of a request with a grammar."""
    grammar = records.Grammar(kind="regex", text=bytes(32), library="llguidance", version="1.9.1", rules=1)
    return records.encode_record(replace(world().committed.intent, grammar=grammar))


def genuine(*patterns: str) -> list[bytes]:
    """The genuine files of these patterns, none where the folder is absent."""
    try:
        folder = vectors.directory()
    except pytest.skip.Exception:
        return []
    found = [path.read_bytes() for pattern in patterns for path in sorted(folder.glob(pattern))]
    assert found
    return found


def quotes() -> list[bytes]:
    return [scene().quote, Scene(launch=TdLaunch(version=5)).make().quote, *genuine("tdx/*/quote.bin")]


def json_logs() -> list[bytes]:
    event = {"imr": 3, "event_type": 1, "digest": "ab" * 48, "event": "boot", "event_payload": "00"}
    return [json.dumps([event, event]).encode(), *genuine("tdx/*/quote-report.json")]


def chains() -> list[bytes]:
    return [quote.parse_quote(scene().quote).pck_chain_pem, *genuine("nvidia/*/hopperCertChain.txt")]


def crls() -> list[bytes]:
    members = json.loads(scene().endorsements.tdx)
    genuine_members = [json.loads(data) for data in genuine("tdx/*/collateral.json")]
    return [bytes.fromhex(item[name]) for item in (members, *genuine_members) for name in ("root_ca_crl", "pck_crl")]


def gpu_bundles() -> list[bytes]:
    pem = b"".join(cert.encode() for cert in _pem(scene().gpu[0].certs))
    item = {
        "arch": "HOPPER",
        "nonce": "ab" * 32,
        "evidence": base64.b64encode(scene().gpu[0].report).decode(),
        "certificate": base64.b64encode(pem).decode(),
    }
    wrapped = {
        "__cmwc_t": "tag:nvidia.com,2026:verifier-input/v1",
        "gpu-0": {
            "__cmwc_t": "tag:nvidia.com,2026:evidence-item/v1",
            "evidence": ["application/vnd.nvidia.spdm-measurement-transcript", item["evidence"]],
            "certificate": ["application/vnd.nvidia.pem-cert-chain", item["certificate"]],
        },
    }
    shapes = ([item, item], {"evidences": [item]}, {"nonce": "ab" * 32, "evidence_list": [item]}, wrapped)
    return [json.dumps(shape).encode() for shape in shapes]


def _pem(certs: Sequence[bytes]) -> list[str]:
    loaded = x509chain.parse_der_chain(certs, "gpu")
    return [certificate.public_bytes(Encoding.PEM).decode() for certificate in loaded]


def dice_extensions() -> list[bytes]:
    chains = [x509chain.parse_der_chain(scene().gpu[0].certs, "gpu")]
    chains += [x509chain.parse_pem_chain(data, "gpu") for data in genuine("nvidia/*/hopperCertChain.txt")]
    found = [item.value for chain in chains for item in chain[0].extensions if item.oid == DICE_FWID]
    return [value.value for value in found if isinstance(value, x509.UnrecognizedExtension)]


def passports() -> list[bytes]:
    made = scene()
    return [evidence.encode_passport(evidence.Passport(quote=made.quote, claims=made.claims))]


def leaves() -> list[bytes]:
    return [
        records.encode_leaf(
            records.Leaf(kind=records.Kind.EPOCH, boot_id=bytes(32), sequence=0, intent_leaf=None, commitment=bytes(32))
        )
    ]


def manifest_statements() -> list[bytes]:
    return [manifest.encode_manifest(image) for image in policy_for(machine()).images]


def epoch() -> bytes:
    return records.encode_record(world().machine.recorder.epoch)


def replay_request() -> bytes:
    return pb.ReplayRequest(
        nonce=bytes(32),
        request=REQUEST,
        accepted=receipt.encode_acceptance(world().committed.acceptance),
        answer=receipt.encode_answer(world().answer),
        receipt=world().receipt,
    ).SerializeToString()


@cache
def replayed() -> bytes:
    found = records.Divergence(
        part="diverged", position=1, recorded_token=5, local_token=6, fingerprint_equal=False, logit_gap=0.5
    )
    return world().machine.recorder.commit_replay(
        nonce=bytes(32),
        quote_digest=bytes(32),
        attested_size=0,
        receipt_digest=bytes(32),
        mode="regenerate",
        positions=3,
        divergence=found,
        started_us=1,
    )


@cache
def stamp() -> bytes:
    return Authority().token(b"a note")


def dated() -> list[bytes]:
    found = [bytes.fromhex(path.read_text()) for path in sorted(OTS.glob("*.ots.hex"))]
    return [data for data in found if _parses(data)]


def _parses(data: bytes) -> bool:
    try:
        ots.parse_proof(data)
    except FormatError:  # with RIPEMD-160, as nobody writes any more
        return False
    return True


def witnessed_starts() -> list[bytes]:
    accepted = world().committed.acceptance
    start = witnessed.Witnessed(
        record=epoch(),
        salt=bytes(32),
        index=7,
        proof=(bytes(32),) * 3,
        checkpoint=accepted.checkpoint,
        boot_proof=accepted.proof,
        boot_checkpoint=accepted.checkpoint,
    )
    return [witnessed.encode_witnessed(start)]


def sidecars() -> list[bytes]:
    machine_ = world().machine
    side = witnessed.Sidecar(epoch=machine_.recorder.epoch, salt=bytes(32), keys=machine_.keyring.role_keys())
    return [witnessed.encode_sidecar(side)]


OPENAI = json.dumps(
    {
        "model": "countermark",
        "messages": [
            {"role": "system", "content": "brief"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
        ],
        "max_tokens": 5,
        "seed": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["a", "b"],
        "logprobs": True,
        "top_logprobs": 3,
        "logit_bias": {"5": 1.5},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
).encode()
NODE = b"""
[node]
operator = "demo.example"
listen = "127.0.0.1:9000"
[platform]
name = "sim"
state = "sim"
[weights]
dir = "weights"
root = "aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55"
[log]
dir = "log"
[engine]
threads = 2
[telemetry]
metrics = "127.0.0.1:9464"
otlp_url = "http://collector:4317"
logs = "json"
[[key]]
name = "team-a"
sha256 = "bb55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55"
requests_per_minute = 60
tokens_per_day = 100000
concurrent = 4
"""


def responses() -> list[bytes]:
    accepted = codec.encode_accepted(world().committed.acceptance)
    tokens = pb.GenerateResponse(tokens=pb.Tokens(ids=[1, 2, 3], text="abc"))
    return [accepted, tokens.SerializeToString(deterministic=True)]


TARGETS: dict[str, Target] = {
    "quote": Target(
        parse=quote.parse_quote,
        seeds=quotes,
        covers=("formats.quote.parse_quote", "formats.quote.parse_enclave_report"),
    ),
    "endorsements": Target(
        parse=parse_endorsements,
        seeds=lambda: [scene().endorsements.tdx, *genuine("tdx/*/collateral.json")],
        covers=("tdx.endorsements.parse_endorsements", "tdx.tcbinfo.parse_tcb_info", "tdx.tcbinfo.parse_qe_identity"),
        mutators=(mutator.mutate, mutator.mutate_json, mutator.mutate_json),
    ),
    "certificate chain": Target(
        parse=lambda data: x509chain.parse_pem_chain(data, "chain"),
        seeds=chains,
        covers=("x509chain.parse_pem_chain", "x509chain.parse_der_chain", "formats.quote.parse_pem_chain"),
    ),
    "CRL": Target(parse=lambda data: x509chain.parse_crl(data, "gpu"), seeds=crls, covers=("x509chain.parse_crl",)),
    "event log": Target(
        parse=eventlog.parse_event_log,
        seeds=lambda: [scene().ccel, scene().rtmr3_log, *genuine("ccel/*/ccel.bin")],
        covers=("formats.eventlog.parse_event_log",),
    ),
    "TPM event log": Target(
        parse=lambda data: tpm_log.ccel_events(tpm_log.parse_tpm_log(data)),
        seeds=lambda: [TPM_LOG.read_bytes(), TPM_LOG.read_bytes() + bytes(64)],
        covers=("formats.tpm_log.parse_tpm_log",),
    ),
    # Of countermark-measure: `covers` is about the client's and the appliance's parsers.
    "ACPI tables": Target(
        parse=acpi.acpi_files,
        seeds=lambda: [acpi.pad_tables(path.read_bytes()) for path in sorted(artefacts.SHAPES.glob("*.acpi.bin"))],
        covers=(),
    ),
    "TDX metadata": Target(parse=tdvf.parse_tdvf, seeds=lambda: [test_tdvf.firmware()], covers=()),
    "unified kernel image": Target(parse=uki.parse_uki, seeds=lambda: [artefacts.uki()], covers=()),
    "FAT volume": Target(parse=fat.read_files, seeds=lambda: [artefacts.unpacked("fat12")], covers=()),
    "event list (JSON)": Target(
        parse=eventlog.parse_json_events,
        seeds=json_logs,
        covers=("formats.eventlog.parse_json_events",),
        mutators=(mutator.mutate, mutator.mutate_json),
    ),
    "boot log": Target(
        parse=boot_events.parse_boot_log,
        seeds=lambda: [scene().rtmr3_log],
        covers=("formats.boot_events.parse_boot_log",),
    ),
    "GPU report": Target(
        parse=spdm.parse_report,
        seeds=lambda: [
            scene().gpu[0].report,
            *(bytes.fromhex(data.decode()) for data in genuine("nvidia/*/hopperAttestationReport.txt")),
        ],
        covers=("formats.spdm.parse_report",),
    ),
    "GPU evidence file": Target(
        parse=nvidia_evidence.parse_gpu_bundle,
        seeds=gpu_bundles,
        covers=("formats.nvidia_evidence.parse_gpu_bundle",),
        mutators=(mutator.mutate, mutator.mutate_json),
    ),
    "RIM": Target(
        parse=parse_rim,
        seeds=lambda: [*scene().endorsements.gpu_rims, *genuine("nvidia/rim/*")],
        covers=("gpu.rim.parse_rim", "gpu.xmldsig.parse_enveloped"),
    ),
    "OCSP response": Target(
        parse=parse_ocsp,
        seeds=lambda: nvidia.ocsp_responses(machine().gpu_vendor, now=NOW),
        covers=("gpu.revocation.parse_ocsp",),
    ),
    "DICE extension": Target(
        parse=dice.parse_dice,
        seeds=dice_extensions,
        covers=("formats.dice.parse_dice", "formats.der.parse_sequence", "formats.der.parse_elements"),
    ),
    "CBOR": Target(
        parse=cbor.decode,
        seeds=lambda: [evidence.encode_evidence(scene()), scene().claims],
        covers=("formats.cbor.decode",),
    ),
    "evidence": Target(
        parse=evidence.parse_evidence,
        seeds=lambda: [evidence.encode_evidence(scene())],
        covers=("formats.evidence.parse_evidence",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "claims": Target(
        parse=report_data.parse_claims,
        seeds=lambda: [scene().claims],
        covers=("formats.report_data.parse_claims",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "passport": Target(parse=evidence.parse_passport, seeds=passports, covers=("formats.evidence.parse_passport",)),
    "COSE key": Target(
        parse=cose_key.parse_cose_key,
        seeds=lambda: [cose_key.encode_cose_key(item.key) for item in scene().keys],
        covers=("formats.cose_key.parse_cose_key",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "signed manifest": Target(
        parse=manifest.parse_envelope,
        seeds=lambda: [machine().manifest],
        covers=("formats.manifest.parse_envelope",),
        mutators=(mutator.mutate, mutator.mutate_json),
    ),
    "manifest": Target(
        parse=manifest.parse_manifest,
        seeds=manifest_statements,
        covers=("formats.manifest.parse_manifest", "formats.manifest.parse_shapes", "formats.manifest.parse_events"),
        mutators=(mutator.mutate, mutator.mutate_json),
    ),
    "policy": Target(
        parse=parse_policy,
        seeds=lambda: [encode_policy(policy_for(machine())).encode()],
        covers=("policy.toml.parse_policy",),
        errors=(PolicyError,),
    ),
    "OpenAI request": Target(
        parse=lambda data: parse_wanted(data, chat=True, max_bytes=1 << 20),
        seeds=lambda: [OPENAI],
        covers=("proxy.wanted.parse_wanted",),
        errors=(RequestError,),
        mutators=(mutator.mutate, mutator.mutate_json),
    ),
    "node configuration": Target(
        parse=lambda data: parse_config(data, base=Path("/")),
        seeds=lambda: [NODE],
        covers=("config.parse_config", "config.parse_address", "operations.quotas.parse_keys"),
        errors=(ConfigError,),
    ),
    "bundle": Target(
        parse=bundle.parse_bundle,
        seeds=lambda: [bundle.encode_bundle(world().bundle())],
        covers=("bundle.parse_bundle",),
        errors=(BundleError, FormatError),
    ),
    "receipt": Target(
        parse=receipt.parse_receipt, seeds=lambda: [world().receipt], covers=("formats.receipt.parse_receipt",)
    ),
    "acceptance": Target(
        parse=receipt.parse_acceptance,
        seeds=lambda: [receipt.encode_acceptance(world().committed.acceptance)],
        covers=("formats.receipt.parse_acceptance",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "answer": Target(
        parse=receipt.parse_answer,
        seeds=lambda: [receipt.encode_answer(world().answer)],
        covers=("formats.receipt.parse_answer",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "INTENT": Target(
        parse=records.parse_intent,
        seeds=lambda: [world().committed.acceptance.record, constrained()],
        covers=("formats.records.parse_intent", "formats.records.parse_record"),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "OUTCOME": Target(
        parse=records.parse_outcome,
        seeds=lambda: [world().completed.record],
        covers=("formats.records.parse_outcome", "formats.records.parse_epoch"),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "REPLAY": Target(
        parse=records.parse_replay,
        seeds=lambda: [receipt.parse_replay_receipt(replayed()).payload.replay.record],
        covers=("formats.records.parse_replay",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "receipt of a replay": Target(
        parse=receipt.parse_replay_receipt,
        seeds=lambda: [replayed()],
        covers=("formats.receipt.parse_replay_receipt",),
    ),
    "salts": Target(
        parse=lambda data: records.parse_salts(data, records.INTENT_FIELDS),
        seeds=lambda: [world().committed.acceptance.field_salts],
        covers=("formats.records.parse_salts",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "leaf": Target(
        parse=records.parse_leaf,
        seeds=leaves,
        covers=("formats.records.parse_leaf",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "checkpoint": Target(
        parse=lambda data: checkpoint.parse_checkpoint_text(checkpoint.parse_note(data).text),
        seeds=lambda: [world().committed.acceptance.checkpoint],
        covers=("tlog.checkpoint.parse_note", "tlog.checkpoint.parse_checkpoint_text"),
    ),
    "operator log's leaf": Target(
        parse=witnessed.parse_operator_leaf,
        seeds=lambda: [witnessed.encode_operator_leaf(epoch(), bytes(32))],
        covers=("formats.witnessed.parse_operator_leaf",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "measurement log's leaf": Target(
        parse=measured.parse_measured,
        seeds=lambda: [measured.encode_measured(measured.leaf_of(machine().manifest, policy_for(machine()).images[0]))],
        covers=("formats.measured.parse_measured",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "log proof": Target(
        parse=proof.parse_proof,
        seeds=lambda: [
            proof.encode_proof(
                proof.LogProof(index=5, hashes=(bytes(32),) * 3, checkpoint=world().committed.acceptance.checkpoint)
            )
        ],
        covers=("tlog.proof.parse_proof",),
    ),
    "witnessed start": Target(
        parse=witnessed.parse_witnessed,
        seeds=witnessed_starts,
        covers=("formats.witnessed.parse_witnessed",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "receipt's witness": Target(
        parse=witnessed.parse_receipt_witness,
        seeds=lambda: [
            witnessed.encode_receipt_witness(
                witnessed.ReceiptWitness(checkpoint=world().committed.acceptance.checkpoint, proof=(bytes(32),) * 3)
            )
        ],
        covers=("formats.witnessed.parse_receipt_witness",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "sidecar": Target(
        parse=witnessed.parse_sidecar,
        seeds=sidecars,
        covers=("formats.witnessed.parse_sidecar",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "verifier key": Target(
        parse=lambda data: cosignature.parse_vkey(data.decode("utf-8", "replace")),
        seeds=lambda: [
            str(cosignature.VerifierKey(name="log.example", kind=1, public=bytes(range(32)))).encode(),
            str(cosignature.VerifierKey(name="log.example", kind=6, public=bytes(1312))).encode(),
        ],
        covers=("tlog.cosignature.parse_vkey",),
    ),
    "anchors": Target(
        parse=anchors.parse_anchors,
        seeds=lambda: [
            anchors.encode_anchors(
                [
                    anchors.Anchor(kind=kind, checkpoint=b"a note", proof=(bytes(32),), token=token)
                    for kind, token in ((anchors.AnchorKind.RFC3161, stamp()), (anchors.AnchorKind.OTS, dated()[0]))
                ]
            )
        ],
        covers=("formats.anchors.parse_anchors",),
        mutators=(mutator.mutate, mutator.mutate_cbor),
    ),
    "time stamp": Target(
        parse=timestamp.parse_token,
        seeds=lambda: [stamp()],
        covers=("formats.timestamp.parse_token",),
    ),
    "time stamp's answer": Target(
        parse=timestamp.parse_response,
        seeds=lambda: [response(None, 2), response(stamp())],
        covers=("formats.timestamp.parse_response",),
    ),
    "OpenTimestamps proof": Target(parse=ots.parse_proof, seeds=dated, covers=("formats.ots.parse_proof",)),
    "block headers": Target(
        parse=ots.parse_headers,
        seeds=lambda: [(OTS / f"block-{height}.txt").read_bytes() for height in (0, 358391)],
        covers=("formats.ots.parse_headers",),
    ),
    "entry bundle": Target(
        parse=lambda data: tiles.parse_entries(data, 3),
        seeds=lambda: [tiles.encode_entries([b"one", b"two", b""])],
        covers=("tlog.tiles.parse_entries", "tlog.tiles.parse_tile"),
    ),
    "tile path": Target(
        parse=lambda data: tiles.parse_tile_path(data.decode("utf-8", "replace")),
        seeds=lambda: [b"tile/0/x001/234.p/7", b"tile/entries/000"],
        covers=("tlog.tiles.parse_tile_path",),
    ),
    "request": Target(
        parse=asked.parse_request,
        seeds=lambda: [REQUEST, request(json_schema='{"type": "object"}'), request(regex="é+")],
        covers=("asked.parse_request", "wire.codec.parse_generate_request", "wire.codec.parse_message"),
        errors=(FormatError, RequestError),
    ),
    "replay request": Target(
        parse=lambda data: parse_recorded(codec.parse_replay_request(data)),
        seeds=lambda: [replay_request()],
        covers=("wire.codec.parse_replay_request", "replaying.parse_recorded"),
        errors=(FormatError, RequestError, Undecidable),
    ),
    "response": Target(parse=codec.parse_response, seeds=responses, covers=("wire.codec.parse_response",)),
}
