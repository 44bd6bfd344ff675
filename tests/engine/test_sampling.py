"""Resolution of sampling parameters: defaults, ranges, binary32."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countermark.errors import RequestError
from countermark_appliance.engine.sampling import resolve_sampling

VOCAB = 1000


def test_every_default_is_concrete() -> None:
    s = resolve_sampling(vocab=VOCAB)
    assert (s.temperature, s.top_k, s.top_p_20bit, s.min_p_20bit) == (0.0, 0, 1 << 20, 0)
    assert (s.repetition_penalty, s.presence_penalty, s.frequency_penalty, s.logit_bias) == (1.0, 0.0, 0.0, ())
    assert s.seed_origin == "server"
    assert 0 <= s.seed < 1 << 64


def test_the_server_draws_another_seed_each_time_and_keeps_the_clients() -> None:
    assert len({resolve_sampling(vocab=VOCAB).seed for _ in range(8)}) == 8
    s = resolve_sampling(vocab=VOCAB, seed=0)
    assert (s.seed, s.seed_origin) == (0, "client")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", v) for v in (-0.1, 100.5, 1e-9, math.nan, math.inf, -math.inf, "1", True)],
        *[("top_k", v) for v in (-1, VOCAB + 1, 1.0, True)],
        *[("top_p", v) for v in (0.0, -0.1, 1.0000001, math.nan)],
        *[("min_p", v) for v in (-0.1, 1.1, math.nan)],
        *[("repetition_penalty", v) for v in (0.0, -1.0, 101.0, math.nan, math.inf)],
        *[("presence_penalty", v) for v in (-2.1, 2.1, math.nan)],
        *[("frequency_penalty", v) for v in (-2.1, 2.1, math.inf)],
        *[("seed", v) for v in (-1, 1 << 64, 0.5, True)],
        *[
            ("logit_bias", v)
            for v in ({VOCAB: 1.0}, {-1: 1.0}, {1: 101.0}, {1: math.nan}, dict.fromkeys(range(1025), 0.0))
        ],
    ],
)
def test_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as err:
        resolve_sampling(vocab=2000 if isinstance(value, dict) and len(value) > 4 else VOCAB, **{field: value})  # type: ignore[arg-type]
    assert err.value.code == f"request.{field}"


@given(st.floats(0.001, 100), st.floats(1e-6, 1), st.floats(0, 1))
def test_values_are_what_the_sampler_computes_with(heat: float, top: float, low: float) -> None:
    s = resolve_sampling(vocab=VOCAB, temperature=heat, top_p=top, min_p=low)
    assert s.temperature == struct.unpack("<f", struct.pack("<f", heat))[0]
    assert 1 <= s.top_p_20bit <= 1 << 20
    assert abs(s.top_p_20bit - top * 2**20) <= 0.5
    assert abs(s.min_p_20bit - low * 2**20) <= 0.5


def test_minus_zero_is_zero_and_bias_is_in_order() -> None:
    s = resolve_sampling(vocab=VOCAB, temperature=-0.0, logit_bias={7: 1.5, 2: -0.0})
    assert math.copysign(1, s.temperature) == 1
    assert s.logit_bias == ((2, 0.0), (7, 1.5))
    assert math.copysign(1, s.logit_bias[0][1]) == 1
