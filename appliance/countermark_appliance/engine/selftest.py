"""Before the engine serves: do the kernels compute the profile on this machine, and does the whole pass hang together?

First the kernels' own known-answer tests. Then a fixed prompt is computed in one piece and again in uneven pieces
beside a neighbour; every fingerprint must be equal. That also warms up what is allocated lazily. Not checked here: that
the weights give good answers; `bench/quality.py` measures that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise

import torch

from countermark.errors import Undecidable, VerificationError
from countermark_appliance.engine.model import Chunk, Model
from countermark_kernels import launch
from countermark_kernels.fingerprint import encode, fingerprint
from countermark_kernels.ieee import NumericsError

LENGTH = 40
CUTS = (0, 1, 8, 25, LENGTH)


def require_device(device: str) -> None:
    """Raises `Undecidable` (`engine.device`) where `device`, `cpu` or `cuda`, is not there."""
    if device != "cpu" and not torch.cuda.is_available():
        raise Undecidable(f"device: expected a GPU for {device!r:.20}, found none", code="engine.device")


def self_test(model: Model) -> bytes:
    """SHA-256 over the fingerprints of the fixed prompt. Raises `VerificationError` (`engine.self_test`)."""
    try:
        launch.self_test(model.device)
        length = min(LENGTH, model.context)
        prompt = [(i * 7919 + 13) % model.vocab for i in range(length)]
        whole = _in_one(model, prompt)
        pieces = _in_pieces(model, prompt)
    except NumericsError as err:
        raise VerificationError(f"self-test: {err}", code="engine.self_test") from err
    for i, (one, other) in enumerate(zip(whole, pieces, strict=True)):
        if one != other:
            raise VerificationError(
                f"self-test: position {i}: expected fingerprint {one.hex()}, got {other.hex()} in another chunking",
                code="engine.self_test",
            )
    return hashlib.sha256(b"".join(whole)).digest()


def _in_one(model: Model, prompt: list[int]) -> list[bytes]:
    chunk = Chunk(cache=model.new_cache(len(prompt)), start=0, tokens=prompt, logits=len(prompt))
    return _fingerprints(model.forward([chunk]))


def _in_pieces(model: Model, prompt: list[int]) -> list[bytes]:
    cache, other = model.new_cache(len(prompt)), model.new_cache(len(prompt))
    found: list[bytes] = []
    for start, end in pairwise(CUTS):
        mine = Chunk(cache=cache, start=start, tokens=prompt[start:end], logits=len(prompt[start:end]))
        neighbour = Chunk(cache=other, start=start, tokens=prompt[::-1][start:end], logits=0)
        if mine.tokens:
            found += _fingerprints(model.forward([neighbour, mine]))
    return found


def _fingerprints(logits: torch.Tensor) -> list[bytes]:
    return encode(fingerprint(logits, logits.shape[1]))


def describe_engine(device: str) -> Mapping[str, str]:
    """What computes on this machine's `device`, `cpu` or `cuda`, after the kernels' known-answer tests have passed.

    Raises `Undecidable` (`engine.device`), `VerificationError` (`engine.self_test`).
    """
    require_device(device)
    try:
        report = launch.self_test(torch.device(device))
    except NumericsError as err:
        raise VerificationError(f"self-test: {err}", code="engine.self_test") from err
    facts = {"backend": report.backend, "instructions": report.isa, "threads": str(report.threads)}
    if device == "cuda":
        facts = {"GPU": torch.cuda.get_device_name()}
    return facts | {"torch": torch.__version__, "self-test": "passed", "left out": report.reason}
