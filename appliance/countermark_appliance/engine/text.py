"""Streaming text of one answer: bytes of tokens to characters, stop strings that may span tokens, and the answer's end.

Text is released as soon as it cannot change: an unfinished UTF-8 sequence and a tail that may become a stop string are
held back. After every token the earliest complete stop string ends the text; the text stops before it. `Output` is the
one place that says when an answer is over and what it reads; the engine and a replay both ask it.
"""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Collection, Sequence

from countermark_appliance.engine.request import Finish
from countermark_appliance.engine.tokenizer import Tokenizer


class Output:
    """One answer as its tokens come. `end`: why it is over, None while it is not.

    The last token counts first: an end-of-sequence token, then a stop string, then the length.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str], stop_tokens: Collection[int], max_tokens: int
    ) -> None:
        self._bytes = tokenizer.token_bytes
        self._stop_tokens = stop_tokens
        self._max_tokens = max_tokens
        self._text = TextStream(stop)
        self.count = 0
        self.end: Finish | None = None

    def push(self, token: int) -> str:
        """Add one token; return the text that became certain, all of it if this ends the answer."""
        self.count += 1
        text = self._text.push(self._bytes(token))
        if token in self._stop_tokens:
            self.end = Finish.EOS
        elif self._text.stopped:
            self.end = Finish.STOP
        elif self.count >= self._max_tokens:
            self.end = Finish.LENGTH
        return text if self.end is None else text + self.finish()

    def finish(self) -> str:
        """No token follows: the text that was held back."""
        text = self._text.finish()
        if self.end is Finish.LENGTH and self._text.stopped:
            self.end = Finish.STOP
        return text


class TextStream:
    """The text of one answer as it grows."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._stop = sorted(set(stop))
        self._longest = max(map(len, stop), default=0)
        self._firsts = frozenset(text[0] for text in stop)
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Add one token's bytes; return the text that became certain. Sets `stopped` at a stop string."""
        if not self._stop:
            return self._decode(data)
        if self.stopped:
            return ""
        self._held += self._decode(data)
        if self._firsts.isdisjoint(self._held):  # most tokens: no stop string is or begins in it
            return self._release(len(self._held))
        return self._before_stop() if self._stop_found() else self._release(len(self._held) - self._undecided())

    def finish(self) -> str:
        """No token follows: return what was held back. An unfinished UTF-8 sequence becomes U+FFFD.

        That character may complete a stop string, which then ends the text too.
        """
        if self.stopped:
            return ""
        self._held += self._decode(b"", True)
        return self._before_stop() if self._stop_found() else self._release(len(self._held))

    def _stop_found(self) -> bool:
        return any(stop in self._held for stop in self._stop)

    def _before_stop(self) -> str:
        self.stopped = True
        return self._release(min(at for at in map(self._held.find, self._stop) if at >= 0))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _undecided(self) -> int:
        """Length of the longest tail that a stop string starts with."""
        longest = min(len(self._held), self._longest - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            at = bisect_left(self._stop, tail)  # whatever begins with it follows it in this order
            if at < len(self._stop) and self._stop[at].startswith(tail):
                return length
        return 0
