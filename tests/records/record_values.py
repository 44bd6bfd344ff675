"""Records and an opened recorder for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from countermark.formats.records import EXACT_CLAIMS, EXACT_TIER, Sampling, Stack, encode_input
from countermark_appliance.platform.keyring import Keyring
from countermark_appliance.records.recorder import Committed, Completed, Recorder

ZERO = bytes(32)
STACK = Stack(
    platform="sim",
    image_id=ZERO,
    config_digest=ZERO,
    model="m",
    weights_root=ZERO,
    manifest_digest=ZERO,
    quantisation="int8",
    adapters=(),
    tokenizer_digest=ZERO,
    chat_template_digest=ZERO,
    profile="exact-v1",
    kernel_digest=ZERO,
    engine="0.1.0",
    backend="torch",
    torch="2.13.0",
    triton=None,
    cuda=None,
    driver=None,
    vbios=None,
    gpus=(),
    cpu="cpu",
    determinism=EXACT_TIER,
    claims=EXACT_CLAIMS,
)
SAMPLING = Sampling(
    temperature=0.0,
    top_k=0,
    top_p_20bit=1 << 20,
    min_p_20bit=0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias=((3, 0.5), (9, -2.0)),
    seed=2**64 - 1,
    seed_origin="server",
)


def open_recorder(directory: Path) -> Recorder:
    return Recorder.open(directory, operator="op.example", keyring=Keyring(), evidence_digest=ZERO, stack=STACK)


def intent(recorder: Recorder) -> Committed:
    return recorder.commit_intent(
        nonce=ZERO,
        quote_digest=ZERO,
        attested_size=1,
        raw_request=b"request",
        prompt=encode_input(prompt="hello"),
        prompt_tokens=(1, 2, 3),
        sampling=SAMPLING,
        max_tokens=4,
        stop=("x",),
        stop_tokens=(2,),
        ignore_eos=False,
    )


def outcome(recorder: Recorder, committed: Committed) -> Completed:
    return recorder.commit_outcome(
        committed,
        output_tokens=(5, 2),
        output_text="hi",
        fingerprints=(bytes(16), bytes(16)),
        finish_reason="eos",
        cached_tokens=0,
        first_token_time=1.5,
        end_time=2.5,
    )
