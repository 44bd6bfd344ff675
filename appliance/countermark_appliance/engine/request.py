"""What goes into the engine and what comes out of it: requests, resolved requests, events, and where they are sent.

A `Request` is what a client wrote, absent values as None. A `Prepared` is what will be executed: every default is a
concrete value and the prompt is the exact token ids, so that a record of it says what really applied. No logic here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from countermark_appliance.engine.grammar import Grammar
from countermark_appliance.engine.sampling import ResolvedSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation. `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation as the client asked for it. Exactly one of `messages` and `prompt` is given; None: the default.

    `values`: what the chat template reads beside the messages. `logprobs`: 0 for none, n for the log probability of
    each token and of the n likeliest beside it. `scope`: whose prompt it is. A prefix that is computed already is used
    again inside one scope only, so that neither latency nor `cached_tokens` tells one client about another's prompt.
    `grammar`: what the whole answer must fit: a kind of `grammarlib.KINDS`, and the text.
    """

    model: str = ""
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    grammar: tuple[str, str] | None = None
    scope: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One generation as it will be executed; nothing is left to a default."""

    request: Request
    model: str
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]  # the ids that end the answer; empty when `ignore_eos`
    sampling: ResolvedSampling
    ignore_eos: bool
    logprobs: int = 0
    grammar: Grammar | None = None


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # a stop string
    EOS = "eos"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Natural logarithms of probabilities at temperature 1, before grammar, bias, penalties and filters: of the token
    drawn, and of the likeliest ids, in descending order. Informational; no record commits to them."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensEvent:
    """Tokens just sampled and the text that became certain with them (the two need not cover the same characters).

    `logprobs`: one for each id where the request asked for them, else none.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneEvent:
    """The last event of every request.

    `output_tokens`: every sampled id, the end-of-sequence token included; the concatenation of all `TokensEvent.ids`.
    `text`: the concatenation of all `TokensEvent.text`; ends before the stop string, if one was found.
    `fingerprints`: 16 bytes for each output token: two 64-bit lanes, little-endian. Times are UTC seconds since 1970.
    `cached_tokens`: how many of the prompt this request found computed and never computed itself.
    `detail`: for the operator's log when `reason` is error; never prompt or output. `by_grammar`: the error is that the
    request's grammar could not be followed any further.
    """

    reason: Finish
    output_tokens: tuple[int, ...]
    text: str
    fingerprints: tuple[bytes, ...]
    prompt_tokens: int
    cached_tokens: int
    first_token_time: float | None
    end_time: float
    detail: str = ""
    by_grammar: bool = False


Event = TokensEvent | DoneEvent
Sink = Callable[[Event], None]


class Place(Protocol):
    """A place in the engine's queue, held from before a request's INTENT until its end."""

    def release(self) -> None:
        """Let somebody else have it. Idempotent, any thread."""


class Handle(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """Stop as soon as the running step is over; the `DoneEvent` still arrives. Idempotent, any thread."""
