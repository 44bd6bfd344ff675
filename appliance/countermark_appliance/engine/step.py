"""One step of the engine: what the scheduler hands to an executor, and what comes back. Interfaces only.

A step is a list of parts, the next tokens of some sequences. An executor computes it and draws a token for each part
that has a row. A pipelined executor may be handed step n + 1 before step n was waited for: a part names the draw of
the previous step that its sequence goes on with by its place in that step, and the id never has to visit the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from countermark_appliance.engine.grammar import Mask
from countermark_kernels.cache import KvCache
from countermark_kernels.sampler import History, SamplerParams

_NO_HISTORY = History()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the sampler needs besides logits: the first `length` of `tokens` precede the token to be drawn.

    The first `prompt` of them are the prompt. `length` is also the drawn token's absolute position, the sampler's
    counter, so that a result does not depend on who else is in the batch. `tokens` may be a list that grows. Of a part
    with a carried token it does not hold that one yet, so it has length - 1 tokens or more.

    `logprobs`: 0 for none, n for the log probability of the drawn token and those of the n likeliest. `key`: names the
    sequence among an executor's rows, so that what penalties have counted need not be counted again for every token;
    see `Executor.forget`. `mask`: the ids that may be drawn, None for all; never of a part with a carried token.
    """

    params: SamplerParams
    tokens: Sequence[int]
    prompt: int
    length: int
    logprobs: int = 0
    key: object = None
    mask: Mask | None = None

    @property
    def penalised(self) -> bool:
        """Whether the draw depends on the tokens before it otherwise than through the logits."""
        p = self.params
        return p.repetition != 1.0 or p.presence != 0.0 or p.frequency != 0.0

    @property
    def history(self) -> History:
        """For `countermark_kernels.sampler`; empty where nothing reads it."""
        if not self.penalised:
            return _NO_HISTORY  # slicing it for every token of a long answer is not free
        return History(prompt=self.tokens[: self.prompt], output=self.tokens[self.prompt : self.length])


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The next tokens of one sequence, from position `start` on; all earlier ones are in `cache`, or in a step before.

    `tokens`: the known ids, perhaps none; `carried`: the index, among the draws of the step started before this one, of
    the id that follows them, or None. `row`: draw a token from the logits of the part's last token.
    """

    cache: KvCache
    start: int
    tokens: Sequence[int]
    carried: int | None = None
    row: Row | None = None

    @property
    def count(self) -> int:
        """How many tokens are computed."""
        return len(self.tokens) + (self.carried is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A drawn token and the fingerprint of the raw logits it was drawn from.

    `logprob`, `top`: its log probability, and the likeliest ids with theirs, where the row asked for them.
    """

    token: int
    fingerprint: bytes
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Ticket(Protocol):
    """A step that was started."""

    def wait(self) -> list[Drawn]:
        """One for each part with a row, in the order of the parts.

        Raises `NumericsError` where a value of this step left the profile's range (which part's is not known) and
        `MemoryError` where there was no room. The step may then be started again, part by part: the same parts write
        the same bits. A step that carries tokens of a failed one is worth nothing, whatever its own `wait` says.
        """


class Executor(Protocol):
    """Computes steps in the order in which they are started. Used from one thread.

    `pipelined`: `start` returns while the device computes, so that the next step may be started, with carried tokens,
    before this one is waited for. Otherwise `start` has computed everything, and it pays to wait at once.
    """

    pipelined: bool

    def start(self, parts: Sequence[Part]) -> Ticket:
        """Begin a step. Raises `MemoryError`; nothing was begun then.

        The caches' lists of blocks are read before it returns, and the blocks must stay the caches' until `wait`.
        """

    def forget(self, key: object) -> None:
        """No row will have this key any more. Does nothing for an unknown key."""

    def close(self) -> None:
        """Wait for what is under way and let go of the device's memory. Idempotent."""
