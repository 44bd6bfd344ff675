"""One request inside the engine: its tokens so far, its place in the pool, its text, and when it is over.

A sequence belongs to the engine's thread; only `cancel` may be called from elsewhere. It emits one `TokensEvent` for
each token and exactly one `DoneEvent`. A sink that raises ends its own sequence and nobody else's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from countermark_appliance.engine.grammar import GrammarError, Walk
from countermark_appliance.engine.request import DoneEvent, Event, Finish, Prepared, Sink, TokenLogprob, TokensEvent
from countermark_appliance.engine.step import Drawn, Row
from countermark_appliance.engine.text import Output
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_kernels.cache import BLOCK, KvCache


class Sequence:
    """One request being served.

    `tokens`: the prompt and every token delivered. `undelivered`: draws that steps in flight have not brought home yet,
    the last of them at place `slot` of its step's draws. `computed`: how many positions have been started, in flight or
    settled; `limit`: how many there can ever be. `cache`: its table of blocks while it runs; the first `published` of
    them others may find. `in_flight`: steps in flight that read or write those blocks.
    """

    def __init__(
        self,
        prepared: Prepared,
        sink: Sink,
        tokenizer: Tokenizer,
        *,
        deadline: float | None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """`deadline`: on the monotonic clock. `release`: called once, when it ends. Raises `GrammarError`."""
        self.prepared = prepared
        self.scope = prepared.request.scope
        self.tokens = list(prepared.prompt_tokens)
        self.prompt = len(prepared.prompt_tokens)
        self.limit = self.prompt + prepared.max_tokens - 1  # nothing follows the last token
        self.computed = self.published = self.undelivered = self.slot = self.in_flight = 0
        self.cache: KvCache | None = None
        self.done = False
        self._params = prepared.sampling.kernel_params()
        self._logprobs = prepared.logprobs
        self._walk: Walk | None = None if prepared.grammar is None else prepared.grammar.walk(hurried=True)
        self._by_grammar = False
        self._sink = sink
        self._deadline = deadline
        self._release = release
        self._cancelled = False
        self._output = Output(
            tokenizer, stop=prepared.stop, stop_tokens=prepared.stop_tokens, max_tokens=prepared.max_tokens
        )
        self._cached: int | None = None
        self._released: list[str] = []
        self._fingerprints: list[bytes] = []
        self._first_token_time: float | None = None

    def cancel(self) -> None:
        self._cancelled = True

    @property
    def length(self) -> int:
        """Tokens drawn or given, delivered or not."""
        return len(self.tokens) + self.undelivered

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be drawn; 0 if that may be more than there will be."""
        return min(self.length, self.limit) - self.computed

    @property
    def held(self) -> bool:
        """What may be drawn next depends on a draw that is not home."""
        return self._walk is not None and self.undelivered > 0

    @property
    def left(self) -> int:
        """Tokens it may still bring."""
        return self.limit + 1 - len(self.tokens)

    def place(self, cache: KvCache, found: int) -> None:
        """It runs, with the table `cache`, whose first `found` tokens are computed."""
        self.cache = cache
        self.computed = found
        self.published = found // BLOCK
        self._cached = min(found, self.prompt if self._cached is None else self._cached)

    def displace(self) -> list[int]:
        """It runs no longer, and has nothing in flight: the blocks it had. Its tokens stay."""
        cache, self.cache = self.cache, None
        self.computed = self.published = 0
        return [] if cache is None else cache.blocks

    def row(self, length: int) -> Row:
        """For drawing the token behind the first `length`."""
        return Row(
            params=self._params,
            tokens=self.tokens,
            prompt=self.prompt,
            length=length,
            logprobs=self._logprobs,
            key=self,
            mask=None if self._walk is None else self._walk.mask,
        )

    def overdue(self, now: float) -> Finish | None:
        """Why the sequence must end before another step, if it must. `now`: monotonic."""
        if self._cancelled:
            return Finish.CANCELLED
        if self._deadline is not None and now >= self._deadline:
            return Finish.DEADLINE
        return None

    def accept(self, drawn: Drawn) -> None:
        """Append a drawn token, emit it, and finish if it was the last."""
        if self._first_token_time is None:
            self._first_token_time = time.time()
        token = drawn.token
        self.tokens.append(token)
        self._fingerprints.append(drawn.fingerprint)
        text = self._output.push(token)
        logprobs = () if drawn.logprob is None else (TokenLogprob(logprob=drawn.logprob, top=drawn.top),)
        self._emit_tokens((token,), text, logprobs)
        if self._output.end is not None:
            self.finish(self._output.end)
        elif self._walk is not None:
            try:
                self._walk.step(token)
            except GrammarError as err:
                self._by_grammar = True
                self.finish(Finish.ERROR, str(err))

    def finish(self, reason: Finish, detail: str = "") -> None:
        """Emit what is still held back and the `DoneEvent`. Does nothing the second time."""
        if self.done:
            return
        rest = self._output.finish()
        if rest:
            self._emit_tokens((), rest)
        if self.done:  # the sink failed just now
            return
        self._end()
        self._emit(self._done_event(reason, detail))

    def _end(self) -> None:
        self.done = True
        self._release()

    def _done_event(self, reason: Finish, detail: str) -> DoneEvent:
        return DoneEvent(
            reason=reason,
            output_tokens=tuple(self.tokens[self.prompt :]),
            text="".join(self._released),
            fingerprints=tuple(self._fingerprints),
            prompt_tokens=self.prompt,
            cached_tokens=self._cached or 0,
            first_token_time=self._first_token_time,
            end_time=time.time(),
            detail=detail,
            by_grammar=self._by_grammar,
        )

    def _emit_tokens(self, ids: tuple[int, ...], text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        if text:
            self._released.append(text)
        self._emit(TokensEvent(ids=ids, text=text, logprobs=logprobs))

    def _emit(self, event: Event) -> None:
        try:
            self._sink(event)
        except Exception as err:  # noqa: BLE001  the sink is the caller's; its bug must not end anybody else's answer
            if not self.done:
                self._end()
                self._sink_failed(err)

    def _sink_failed(self, err: Exception) -> None:
        """One attempt to tell the sink that it is over; it may well fail again, and nobody else is left to tell."""
        with contextlib.suppress(Exception):
            self._sink(self._done_event(Finish.ERROR, f"sink: {type(err).__name__}"))
