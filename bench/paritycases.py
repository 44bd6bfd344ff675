"""The prompts and settings that every machine must answer alike, made of SplitMix64 and integers alone.

Case i of a model is a function of i, the vocabulary, the context and, for the stand-in model, the tokens of a text.
Lengths: first the edges of tiles, blocks and steps, the rest uniform within octaves 1, 2..3, 4..7, ... 2048..4000,
which are equally likely. Prompts: random ids, a slice of the text, one id repeated, a short cycle. Settings: every
sampler step switched on and off, temperatures from 2^-10 to 100, and greedy. 8 to 32 tokens are generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from countermark_kernels.fingerprint import splitmix64
from countermark_kernels.ieee import f32
from countermark_kernels.sampler import ONE_20BIT, SamplerParams

_T = TypeVar("_T")
CASES = 208
LONGEST = 4000
EDGES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 1023, 1024, 2048, 4000)
TOKENS = (8, 32)


class Draw:
    """SplitMix64 from a seed: integers only, so the same on every machine and in every version."""

    def __init__(self, seed: int) -> None:
        self._state = splitmix64(seed)

    def bits(self) -> int:
        """64 random bits."""
        value = splitmix64(self._state)
        self._state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        return value

    def below(self, end: int) -> int:
        return self.bits() % end

    def between(self, low: int, high: int) -> int:
        """low..high, both included."""
        return low + self.below(high - low + 1)

    def choice(self, options: Sequence[_T]) -> _T:
        return options[self.below(len(options))]

    def octave(self, high: int) -> int:
        """1..high: every octave equally likely, uniform within it."""
        low = 1 << self.below(high.bit_length())
        return self.between(low, min(2 * low - 1, high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt, how many tokens to generate (whatever they are), and how."""

    prompt: tuple[int, ...]
    tokens: int
    params: SamplerParams


def cases(*, vocab: int, context: int, text: Sequence[int] = ()) -> list[Case]:
    """All cases of a model. `text`: token ids of real text, or none."""
    return [_case(i, vocab=vocab, context=context, text=text) for i in range(CASES)]


def _case(index: int, *, vocab: int, context: int, text: Sequence[int]) -> Case:
    draw = Draw(index)
    tokens = draw.between(*TOKENS)
    longest = min(LONGEST, context - TOKENS[1])
    length = min(EDGES[index], longest) if index < len(EDGES) else draw.octave(longest)
    return Case(prompt=_prompt(draw, length, vocab, text), tokens=tokens, params=_params(draw, vocab))


def _prompt(draw: Draw, length: int, vocab: int, text: Sequence[int]) -> tuple[int, ...]:
    kind = draw.below(8)
    if kind < 4 and len(text) >= length:
        start = draw.below(len(text) - length + 1)
        return tuple(text[start : start + length])
    if kind < 6:
        return tuple(draw.below(vocab) for _ in range(length))
    cycle = [draw.below(vocab) for _ in range(1 if kind == 6 else draw.between(2, 40))]
    return tuple(cycle[i % len(cycle)] for i in range(length))


def _params(draw: Draw, vocab: int) -> SamplerParams:
    heat = 0.0 if draw.below(4) == 0 else draw.choice((2.0**-10, 0.1, 0.5, 0.7, 1.0, 1.0, 1.5, 3.0, 100.0))
    penal = draw.below(3) == 0
    return SamplerParams(
        temperature=f32(heat),
        top_k=draw.choice((0, 0, 1, 40, vocab)),
        top_p_20bit=draw.choice((ONE_20BIT, ONE_20BIT, ONE_20BIT * 95 // 100, ONE_20BIT // 2, 1)),
        min_p_20bit=draw.choice((0, 0, 0, ONE_20BIT // 20, ONE_20BIT // 2)),
        repetition=f32(draw.choice((1.0, 1.3, 0.8))) if penal else 1.0,
        presence=f32(draw.choice((0.0, 0.5, -1.0))) if penal else 0.0,
        frequency=f32(draw.choice((0.0, 0.25, -0.3))) if penal else 0.0,
        logit_bias={draw.below(vocab): f32(draw.between(-400, 400) / 16) for _ in range(max(0, draw.below(12) - 8))},
        seed=draw.bits(),
    )
