"""One request inside the engine: its tokens so far, its cache, its text, and when it is over.

A sequence belongs to the engine's thread; only `cancel` may be called from elsewhere. It emits one `TokensEvent` for
each token and exactly one `DoneEvent`. A sink that raises ends its own sequence and nobody else's.
"""

from __future__ import annotations

import contextlib
import time

from countermark_appliance.engine.draw import Row
from countermark_appliance.engine.model import Cache
from countermark_appliance.engine.request import DoneEvent, Event, Finish, Prepared, Sink, TokensEvent
from countermark_appliance.engine.text import Output
from countermark_appliance.engine.tokenizer import Tokenizer


class Sequence:
    """One request being served. `computed`: how many of `tokens` have their keys and values in `cache`."""

    def __init__(self, prepared: Prepared, sink: Sink, tokenizer: Tokenizer, *, deadline: float | None) -> None:
        """`deadline`: on the monotonic clock."""
        self.prepared = prepared
        self._params = prepared.sampling.kernel_params()
        self.tokens = list(prepared.prompt_tokens)
        self.computed = 0
        self.cache: Cache | None = None
        self.done = False
        self._sink = sink
        self._deadline = deadline
        self._cancelled = False
        self._output = Output(
            tokenizer, stop=prepared.stop, stop_tokens=prepared.stop_tokens, max_tokens=prepared.max_tokens
        )
        self._released: list[str] = []
        self._fingerprints: list[bytes] = []
        self._first_token_time: float | None = None

    def cancel(self) -> None:
        self._cancelled = True

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    def row(self) -> Row:
        """For drawing the next token."""
        tokens = self.tokens
        return Row(params=self._params, tokens=tokens, prompt=len(self.prepared.prompt_tokens), length=len(tokens))

    def overdue(self, now: float) -> Finish | None:
        """Why the sequence must end before another step, if it must. `now`: monotonic."""
        if self._cancelled:
            return Finish.CANCELLED
        if self._deadline is not None and now >= self._deadline:
            return Finish.DEADLINE
        return None

    def accept(self, token: int, fingerprint: bytes) -> None:
        """Append a sampled token, emit it, and finish if it was the last."""
        if self._first_token_time is None:
            self._first_token_time = time.time()
        self.tokens.append(token)
        self._fingerprints.append(fingerprint)
        self._emit_tokens((token,), self._output.push(token))
        if self._output.end is not None:
            self.finish(self._output.end)

    def finish(self, reason: Finish, detail: str = "") -> None:
        """Emit what is still held back and the `DoneEvent`; let go of the cache. Does nothing the second time."""
        if self.done:
            return
        rest = self._output.finish()
        if rest:
            self._emit_tokens((), rest)
        if self.done:  # the sink failed just now
            return
        self.done = True
        self.cache = None
        self._emit(self._done_event(reason, detail))

    def _done_event(self, reason: Finish, detail: str) -> DoneEvent:
        return DoneEvent(
            reason=reason,
            output_tokens=tuple(self.tokens[len(self.prepared.prompt_tokens) :]),
            text="".join(self._released),
            fingerprints=tuple(self._fingerprints),
            prompt_tokens=len(self.prepared.prompt_tokens),
            cached_tokens=0,
            first_token_time=self._first_token_time,
            end_time=time.time(),
            detail=detail,
        )

    def _emit_tokens(self, ids: tuple[int, ...], text: str) -> None:
        self._released.append(text)
        self._emit(TokensEvent(ids=ids, text=text))

    def _emit(self, event: Event) -> None:
        try:
            self._sink(event)
        except Exception as err:  # noqa: BLE001  the sink is the caller's; its bug must not end anybody else's answer
            if not self.done:
                self.done = True
                self.cache = None
                self._sink_failed(err)

    def _sink_failed(self, err: Exception) -> None:
        """One attempt to tell the sink that it is over; it may well fail again, and nobody else is left to tell."""
        with contextlib.suppress(Exception):
            self._sink(self._done_event(Finish.ERROR, f"sink: {type(err).__name__}"))
