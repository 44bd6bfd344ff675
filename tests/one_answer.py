"""One answered request on a simulated machine, with every part a verifier needs; the model alone is missing.

Built from the appliance's own parts (platform, keys, recorder) so that tests can change one thing at a time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from countermark.appraise import Verdict, appraise
from countermark.binding import Connection
from countermark.bundle import Bundle
from countermark.formats.receipt import Answer
from countermark.formats.records import EXACT_CLAIMS, EXACT_TIER, Sampling, Stack, encode_input
from countermark.formats.report_data import Purpose
from countermark.numerics import CURRENT
from countermark.policy import Policy, Profile, new_policy, pin
from countermark.receipt import Accepted, CheckedReceipt, verify_accepted, verify_receipt
from countermark.wire import countermark_v1_pb2 as pb
from countermark_appliance.platform.attester import Attester, LogHead, boot_values, extend_boot, extend_ready
from countermark_appliance.platform.keyring import Keyring
from countermark_appliance.platform.sim import boot
from countermark_appliance.platform.sim.state import State, make
from countermark_appliance.records.recorder import Committed, Completed, Recorder

NOW = 1_800_000_000
OPERATOR = "test.example"
TEXT = "Paris."
PROMPT_TOKENS = (1, 17, 99, 4)
OUTPUT_TOKENS = (12, 5, 2)
FINGERPRINTS = tuple(bytes([i]) * 16 for i in range(3))
STOP_TOKENS = (2,)
CONFIG = bytes([7]) * 32
WEIGHTS_ROOT = bytes([8]) * 32
KERNELS = bytes([9]) * 32
EXPORTER = bytes([10]) * 32
ATTEST_NONCE = bytes([11]) * 32
REQUEST = pb.GenerateRequest(
    nonce=bytes([12]) * 32,
    model="tiny",
    chat=pb.Chat(messages=[pb.Message(role="user", content="Which city is the capital of France?")]),
    max_tokens=8,
    stop=["\n\n"],
    sampling=pb.Sampling(temperature=0.5, top_k=20, top_p=0.9, seed=7, logit_bias={3: -1.5}),
).SerializeToString(deterministic=True)
INPUT = encode_input(messages=[("user", "Which city is the capital of France?")])
SAMPLING = Sampling(
    temperature=0.5,
    top_k=20,
    top_p_20bit=round(0.9 * 2**20),
    min_p_20bit=0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias=((3, -1.5),),
    seed=7,
    seed_origin="client",
)


def request(**changes: object) -> bytes:
    """The request with fields set; those of `sampling` are named `sampling_...`."""
    message = pb.GenerateRequest.FromString(REQUEST)
    for name, value in changes.items():
        inner = name.startswith("sampling_")
        setattr(message.sampling if inner else message, name.removeprefix("sampling_"), value)
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def stack(image_id: bytes) -> Stack:
    """What the simulated machine says it runs."""
    return Stack(
        platform="sim",
        image_id=image_id,
        config_digest=CONFIG,
        model="tiny",
        weights_root=WEIGHTS_ROOT,
        manifest_digest=bytes(32),
        quantisation="int8",
        adapters=(),
        tokenizer_digest=bytes(32),
        chat_template_digest=bytes(32),
        profile=CURRENT,
        kernel_digest=KERNELS,
        engine="0.1.0",
        backend="torch",
        torch="2.13.0",
        triton=None,
        cuda=None,
        driver=None,
        vbios=None,
        gpus=("SIMULATED GPU",),
        cpu="test cpu",
        determinism=EXACT_TIER,
        claims=EXACT_CLAIMS,
    )


@dataclass
class Machine:
    """A booted machine with its recorder and a policy that accepts it."""

    recorder: Recorder
    keyring: Keyring
    attester: Attester
    policy: Policy
    manifest: bytes
    state: State  # its vendors and keys

    def evidence(self, nonce: bytes = ATTEST_NONCE) -> bytes:
        size, root = self.recorder.head()
        head = LogHead(origin=self.recorder.epoch.origin, size=size, root=root)
        return self.attester.attest(purpose=Purpose.SESSION, nonce=nonce, exporter=EXPORTER, log=head)

    def verdict(self, evidence: bytes, nonce: bytes = ATTEST_NONCE) -> Verdict:
        connection = Connection(
            nonce=nonce,
            exporter=EXPORTER,
            peer_spki=self.keyring.tls_spki(),
            group="X25519MLKEM768",
            version="TLSv1.3",
        )
        return appraise(evidence, self.policy, now=NOW, connection=connection)

    def intent(self, verdict: Verdict, **changes: object) -> Committed:
        values: dict[str, object] = {
            "nonce": bytes([12]) * 32,
            "quote_digest": verdict.quote_digest,
            "attested_size": verdict.claims.log_size,
            "raw_request": REQUEST,
            "prompt": INPUT,
            "prompt_tokens": PROMPT_TOKENS,
            "sampling": SAMPLING,
            "max_tokens": 8,
            "stop": ("\n\n",),
            "stop_tokens": STOP_TOKENS,
            "ignore_eos": False,
        }
        return self.recorder.commit_intent(**{**values, **changes})  # type: ignore[arg-type]

    def outcome(self, committed: Committed, **changes: object) -> Completed:
        values: dict[str, object] = {
            "output_tokens": OUTPUT_TOKENS,
            "output_text": TEXT,
            "fingerprints": FINGERPRINTS,
            "finish_reason": "eos",
            "cached_tokens": 0,
            "first_token_time": NOW + 0.25,
            "end_time": NOW + 1.5,
        }
        return self.recorder.commit_outcome(committed, **{**values, **changes})  # type: ignore[arg-type]


@dataclass
class World:
    """A machine and one answer of it, checked."""

    machine: Machine
    evidence: bytes
    verdict: Verdict
    committed: Committed
    accepted: Accepted
    completed: Completed
    receipt: bytes
    answer: Answer
    checked: CheckedReceipt

    def bundle(self, **changes: object) -> Bundle:
        bundle = Bundle(
            request=REQUEST,
            acceptance=self.committed.acceptance,
            answer=self.answer,
            receipt=self.receipt,
            evidence=self.evidence,
            manifest=self.machine.manifest,
        )
        return replace(bundle, **changes)  # type: ignore[arg-type]


def answer(completed: Completed) -> Answer:
    return Answer(tokens=OUTPUT_TOKENS, text=TEXT, fingerprints=FINGERPRINTS, field_salts=completed.field_salts)


def start(
    directory: Path,
    code: Path,
    *,
    measured_profile: str = CURRENT,
    operator_dir: Path | None = None,
    **changes: object,
) -> Machine:
    """Boot a machine whose measured code is the folder `code`; `changes`: what its records say otherwise."""
    state = make(now=NOW, roots=[code])
    platform, keyring = boot(state, roots=[code]), Keyring()
    values = boot_values(
        platform, keyring, config=CONFIG, weights_root=WEIGHTS_ROOT, profile=measured_profile, kernel_digest=KERNELS
    )
    extend_boot(platform, values)
    extend_ready(platform, values)
    attester = Attester(platform, keyring, values)
    recorder = Recorder.open(
        directory,
        operator=OPERATOR,
        keyring=keyring,
        evidence_digest=bytes(32),
        stack=replace(stack(platform.image_id), **{"profile": measured_profile, **changes}),  # type: ignore[arg-type]
        operator_dir=operator_dir,
    )
    digests = [hashlib.sha256(der).digest() for der in (state.root_der, state.gpu_root_der, state.rim_root_der)]
    policy = new_policy(
        Profile.TEST,
        now=NOW,
        simulated_tdx_root=digests[0],
        simulated_gpu_root=digests[1],
        simulated_rim_root=digests[2],
    )
    policy = pin(policy, state.manifest, now=NOW, signers=state.signer_digests, weights_roots=[WEIGHTS_ROOT])
    return Machine(recorder, keyring, attester, policy, state.manifest, state)


def make_world(tmp_path: Path) -> World:
    code = tmp_path / "code"
    code.mkdir()
    (code / "code.py").write_text("x = 1\n")
    machine = start(tmp_path / "log", code)
    evidence = machine.evidence()
    verdict = machine.verdict(evidence)
    committed = machine.intent(verdict)
    accepted = verify_accepted(committed.acceptance, verdict, REQUEST)
    completed = machine.outcome(committed)
    receipt = machine.recorder.receipt(completed)
    checked = verify_receipt(receipt, verdict, request=REQUEST, accepted=accepted, answer=answer(completed))
    return World(machine, evidence, verdict, committed, accepted, completed, receipt, answer(completed), checked)
