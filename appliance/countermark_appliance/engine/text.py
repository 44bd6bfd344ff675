"""Streaming text of one answer: bytes of tokens to characters, and stop strings that may span tokens.

Text is released as soon as it cannot change: an unfinished UTF-8 sequence and a tail that may become a stop string are
held back. After every token the earliest complete stop string ends the text; the text stops before it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer as it grows."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, data: bytes) -> str:
        """Add one token's bytes; return the text that became certain. Sets `stopped` at a stop string."""
        if self.stopped:
            return ""
        self._held += self._decode(data)
        if not self._stop:
            return self._release(len(self._held))
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._undecided())

    def finish(self) -> str:
        """No token follows: return what was held back. An unfinished UTF-8 sequence becomes U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decode(b"", True)
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _undecided(self) -> int:
        """Length of the longest tail that a stop string starts with."""
        longest = min(len(self._held), max(map(len, self._stop)) - 1)
        for length in range(longest, 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
