"""Who holds which block of the key/value pool, and which full blocks hold a prefix that somebody may want again.

Numbers only: 1 to count-1, each `BLOCK` tokens of one sequence. Block 0 is never handed out (padding rows of a CUDA
graph write there). A block is free, held (one reference for each sequence that reads it), or kept: nobody holds it, but
its contents are published and stay until the room is needed, least recently used first.

A published block is found by its parent block and its own tokens, the first one by the scope: a chain of exact
comparisons, where the dictionary's hash only finds. Two scopes never meet. What makes a parent's number as good as all
tokens before: whoever holds a block holds its parents too (`publish` sees to it), so a parent is let go last, and
evicted last. Not checked here: that the pool's memory really holds those keys and values; the loop publishes what has
been computed and settled. Not thread-safe: one thread takes, gives and asks.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from countermark_kernels.cache import BLOCK

_BLOCK_BYTES = 4 * BLOCK
_Key = tuple[int | bytes, bytes]  # the parent's number, or the scope of a first block; the 64 ids


class Blocks:
    """The bookkeeping of one pool. Its memory is bounded by `count`."""

    def __init__(self, count: int) -> None:
        """`count`: blocks in the pool, block 0 included."""
        if count < 2:
            raise ValueError(f"blocks: expected at least 2, got {count}")
        self.count = count
        self._free = list(range(count - 1, 0, -1))  # the last is taken first
        self._references = [0] * count
        self._keys: list[_Key | None] = [None] * count
        self._published: dict[_Key, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # published and held by nobody, longest so first

    @property
    def available(self) -> int:
        """How many `take` could hand out now."""
        return len(self._free) + len(self._kept)

    def take(self, n: int) -> list[int]:
        """`n` blocks with one reference each, contents undefined. Raises `MemoryError`, and takes none then."""
        if n > self.available:
            raise MemoryError(f"key/value blocks: expected {n}, got {self.available}")
        while len(self._free) < n:
            self._evict()
        taken = [self._free.pop() for _ in range(n)]
        for number in taken:
            self._references[number] = 1
        return taken

    def give(self, numbers: Sequence[int]) -> None:
        """Drop one reference of each: all blocks of a sequence together, in its order, so that children go first."""
        for number in reversed(numbers):
            if self._references[number] < 1:
                raise ValueError(f"block {number}: given back by somebody who does not hold it")
            self._references[number] -= 1
            if self._references[number]:
                continue
            if self._keys[number] is None:
                self._free.append(number)
            else:
                self._kept[number] = None

    def match(self, scope: bytes, tokens: Sequence[int]) -> list[int]:
        """The published blocks of the longest prefix of `tokens`, in order, with a reference taken on each."""
        packed = array("I", tokens).tobytes()
        found: list[int] = []
        parent: int | bytes = scope
        for at in range(0, len(tokens) // BLOCK * _BLOCK_BYTES, _BLOCK_BYTES):
            number = self._published.get((parent, packed[at : at + _BLOCK_BYTES]))
            if number is None:
                break
            if not self._references[number]:
                del self._kept[number]
            self._references[number] += 1
            found.append(number)
            parent = number
        return found

    def publish(self, scope: bytes, tokens: Sequence[int], numbers: Sequence[int], first: int, end: int) -> int:
        """Let `match` find blocks `first`, `first` + 1, ... of the holder of `numbers`, which hold `tokens[:end]`.

        All full blocks, or those up to one whose tokens somebody else has published: behind a block that is not its
        own a holder publishes nothing. Returns the next index to try.
        """
        for index in range(first, end // BLOCK):
            parent = numbers[index - 1] if index else scope
            key = (parent, array("I", tokens[index * BLOCK : (index + 1) * BLOCK]).tobytes())
            if self._published.setdefault(key, numbers[index]) != numbers[index]:
                return index
            self._keys[numbers[index]] = key
        return max(first, end // BLOCK)

    def _evict(self) -> None:
        number, _ = self._kept.popitem(last=False)
        key = self._keys[number]
        assert key is not None
        del self._published[key]
        self._keys[number] = None
        self._free.append(number)
