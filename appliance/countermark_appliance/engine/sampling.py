"""Sampling parameters: from what the client wrote to concrete, range-checked values that a record can state.

Every default is resolved here and nowhere else. Real values become binary32 (what the sampler computes with), top-p and
min-p become 20-bit integers (profile `exact-v1`), and an absent seed is drawn from the operating system and marked as
the server's. Not here: the sampler itself (`countermark_kernels.sampler`).
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from countermark.errors import RequestError
from countermark_kernels.sampler import SamplerParams

ONE_20BIT = 1 << 20
SEED_END = 1 << 64
MAX_BIASES = 1024
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSampling:
    """What the sampler is given. Floats hold binary32 values exactly.

    temperature 0: greedy, the highest logit, ties to the lower id. top_k 0, top_p_20bit 2**20 and min_p_20bit 0: off.
    """

    temperature: float
    top_k: int
    top_p_20bit: int
    min_p_20bit: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]  # ascending ids
    seed: int
    seed_origin: Literal["client", "server"]

    def kernel_params(self) -> SamplerParams:
        return SamplerParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p_20bit=self.top_p_20bit,
            min_p_20bit=self.min_p_20bit,
            repetition=self.repetition_penalty,
            presence=self.presence_penalty,
            frequency=self.frequency_penalty,
            logit_bias=dict(self.logit_bias),
            seed=self.seed,
        )


def resolve_sampling(
    *,
    vocab: int,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
) -> ResolvedSampling:
    """Resolve every default and check every range.

    Raises `RequestError` with code `request.<field>`: a value outside its range, not a number, or of the wrong type.
    """
    heat = _real("temperature", temperature, default=0.0, low=0.0, high=100.0)
    if 0.0 < heat < 0.001:  # a logit divided by less could leave binary32
        raise _refused("temperature", "0 (greedy) or 0.001 to 100", heat)
    nucleus = _real("top_p", top_p, default=1.0, low=0.0, high=1.0, binary32=False)
    if nucleus == 0.0:
        raise _refused("top_p", "a number above 0 and at most 1", nucleus)
    floor = _real("min_p", min_p, default=0.0, low=0.0, high=1.0, binary32=False)
    if seed is None:
        drawn, origin = secrets.randbits(64), True
    else:
        drawn, origin = _integer("seed", seed, default=0, end=SEED_END), False
    return ResolvedSampling(
        temperature=heat,
        top_k=_integer("top_k", top_k, default=0, end=vocab + 1),
        top_p_20bit=max(1, round(nucleus * ONE_20BIT)),
        min_p_20bit=round(floor * ONE_20BIT),
        repetition_penalty=_real("repetition_penalty", repetition_penalty, default=1.0, low=0.01, high=100.0),
        presence_penalty=_real("presence_penalty", presence_penalty, default=0.0, low=-2.0, high=2.0),
        frequency_penalty=_real("frequency_penalty", frequency_penalty, default=0.0, low=-2.0, high=2.0),
        logit_bias=_bias(logit_bias or {}, vocab),
        seed=drawn,
        seed_origin="server" if origin else "client",
    )


def resolve_logprobs(value: int | None) -> int:
    """How many likeliest tokens are wanted beside each drawn one; 0: none, nor the drawn one's. Raises `RequestError`
    (`request.logprobs`)."""
    return _integer("logprobs", value, default=0, end=MAX_LOGPROBS + 1)


def _refused(field: str, expected: str, got: object) -> RequestError:
    return RequestError(f"{field}: expected {expected}, got {got!r:.40}", code=f"request.{field}")


def _real(field: str, value: float | None, *, default: float, low: float, high: float, binary32: bool = True) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN fails too
        raise _refused(field, f"a number from {low:g} to {high:g}", value)
    number = float(value)
    if binary32:
        number = struct.unpack("<f", struct.pack("<f", number))[0]
    return math.fabs(number) if number == 0.0 else number  # no minus zero: equal values must be recorded alike


def _integer(field: str, value: int | None, *, default: int, end: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
        raise _refused(field, f"an integer from 0 to {end - 1}", value)
    return value


def _bias(bias: Mapping[int, float], vocab: int) -> tuple[tuple[int, float], ...]:
    if len(bias) > MAX_BIASES:
        raise _refused("logit_bias", f"at most {MAX_BIASES} entries", len(bias))
    checked = {
        _integer("logit_bias", token, default=0, end=vocab): _real(
            "logit_bias", value, default=0.0, low=-100.0, high=100.0
        )
        for token, value in bias.items()
    }
    return tuple(sorted(checked.items()))
