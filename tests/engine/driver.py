"""Running requests through an engine in tests."""

from __future__ import annotations

import queue
import random
from collections.abc import Sequence

from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.request import DoneEvent, Event, Handle, Request, TokensEvent

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "then",
    "another",
    "thing",
    "in",
    "meantime",
)


class Answer:
    """Collects one request's events and checks the promises that hold for every answer."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.sink = self._events.put
        self.handle: Handle | None = None

    def next(self, timeout_s: float = 60) -> Event:
        return self._events.get(timeout=timeout_s)

    def done(self, timeout_s: float = 60) -> DoneEvent:
        ids: list[int] = []
        text = ""
        while True:
            event = self._events.get(timeout=timeout_s)
            if isinstance(event, TokensEvent):
                ids += event.ids
                text += event.text
                continue
            assert self._events.empty()
            assert len(event.output_tokens) == len(event.fingerprints)
            assert all(len(f) == 16 for f in event.fingerprints)
            if not hasattr(self, "skipped"):
                assert (tuple(ids), text) == (event.output_tokens, event.text)
            return event


def start(engine: Engine, request: Request, deadline_s: float | None = None) -> Answer:
    answer = Answer()
    answer.handle = engine.submit(engine.prepare(request), answer.sink, deadline_s)
    return answer


def run(engine: Engine, requests: Sequence[Request]) -> list[DoneEvent]:
    """All at once."""
    return [answer.done() for answer in [start(engine, r) for r in requests]]


def some_prompt(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def some_request(rng: random.Random, *, longest: int = 60, tokens: int = 16) -> Request:
    """A request of any length and any sampling."""
    sampled = rng.random() < 0.7
    return Request(
        prompt=some_prompt(rng, rng.randint(1, longest)),
        max_tokens=rng.randint(1, tokens),
        temperature=rng.choice([0.3, 0.8, 1.5]) if sampled else 0.0,
        top_k=rng.choice([0, 5, 40]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.25]),
        seed=rng.getrandbits(64),
        ignore_eos=rng.random() < 0.5,
    )
