"""A boot's log: append leaves durably, prove them, publish the C2SP files.

Group commit: one of those who wait leads; it appends everything that waits, signs one checkpoint and syncs once, wakes
those it served, and hands over to the first of those who have come meanwhile. Memory: 72 bytes
for each leaf (hashes of all complete subtrees, and where the leaf stands in the journal). The files of C2SP tlog-tiles
(`checkpoint`, `tile/...`) are written by a thread of their own, not synced and not waited for: they are derived from
the journal, and the next start completes them.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from countermark.errors import CountermarkError, LogError, Unavailable
from countermark.tlog.checkpoint import Checkpoint
from countermark.tlog.merkle import Tree, consistency_proof, inclusion_proof, leaf_hash
from countermark_appliance.records.journal import Journal
from countermark_appliance.records.publish import Publisher

BuildLeaf = Callable[[int], bytes]
"""Given its index, the bytes of a leaf."""
SignCheckpoint = Callable[[Checkpoint, int], bytes]
MAX_LEAVES_READ = 1024
_FRAME_BYTES = 8 * 1024  # a checkpoint and framing, rounded up
_LEAF_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """Where leaves came to stand: indices from `index`, under a tree of `size` leaves and its signed checkpoint."""

    index: int
    hashes: tuple[bytes, ...]
    size: int
    checkpoint: bytes


@dataclass(slots=True)
class _Waiting:
    builds: Sequence[BuildLeaf]
    new: bool
    result: Appended | CountermarkError | None = None
    woken: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.woken.acquire()


class LogStore:
    """The log of the running boot. Thread-safe."""

    def __init__(self, directory: Path, origin: str, sign: SignCheckpoint) -> None:
        """Create the journal in an existing directory. Raises `Unavailable` (`log.full`)."""
        self._origin = origin
        self._sign = sign
        self._tree = Tree()
        self._offsets = array("Q")
        self._queue: list[_Waiting] = []
        self._led = False  # whether somebody commits, or has been woken to
        self._queue_lock = threading.Lock()
        self._lock = threading.Lock()
        self._closed = False
        self._checkpoint = b""
        self._journal = Journal(directory / "journal")
        self._publisher = Publisher(directory, self._tree.node, self._read)

    def append(self, builds: Sequence[BuildLeaf], *, new: bool) -> Appended:
        """Append leaves, all or none, and return when they are durable.

        `new`: this begins something; refused while only the reserve is left. Raises `Unavailable`: `log.full`,
        `log.failed`, `log.closed`.
        """
        waiting = _Waiting(builds, new)
        with self._queue_lock:
            self._queue.append(waiting)
            leads, self._led = not self._led, True
        if not leads:
            waiting.woken.acquire()  # served, or to lead
        if waiting.result is None:
            self._lead()
        if isinstance(waiting.result, CountermarkError):
            raise waiting.result
        assert waiting.result is not None
        return waiting.result

    def head(self) -> tuple[int, bytes, bytes]:
        """Size, root and signed checkpoint of the durable log."""
        with self._lock:
            return self._tree.size, self._tree.root(), self._checkpoint

    def inclusion(self, index: int, size: int) -> tuple[bytes, ...]:
        """Inclusion proof. Raises `LogError` (`log.range`)."""
        with self._lock:
            self._check_size(size)
            return inclusion_proof(index, size, self._tree.node)

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """Consistency proof; none is needed from the empty tree. Raises `LogError` (`log.range`)."""
        with self._lock:
            self._check_size(new)
            return consistency_proof(old, new, self._tree.node) if old else ()

    def leaves(self, start: int, count: int) -> tuple[bytes, ...]:
        """At most `MAX_LEAVES_READ` leaves from `start`. Raises `LogError` (`log.range`)."""
        if not 0 <= start <= len(self._offsets) or not 0 <= count <= MAX_LEAVES_READ:
            raise LogError(f"leaves: expected a start in the log and at most {MAX_LEAVES_READ}", code="log.range")
        with self._lock:
            if self._closed:
                raise _closed()
            return self._read(start, count)

    def _read(self, start: int, count: int) -> tuple[bytes, ...]:
        return tuple(self._journal.read_leaf(offset) for offset in self._offsets[start : start + count])

    def close(self) -> None:
        """Publish what is left and close. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._publisher.close()
        self._journal.close()

    def _check_size(self, size: int) -> None:
        if not 0 <= size <= self._tree.size:
            raise LogError(f"tree size: expected at most {self._tree.size}, got {size}", code="log.range")

    def _lead(self) -> None:
        """Commit for everybody who waits, oneself among them, and hand over."""
        with self._queue_lock:
            batch, self._queue = self._queue, []
        try:
            with self._lock:
                self._commit(batch)
        finally:
            with self._queue_lock:
                self._led = bool(self._queue)
                heir = self._queue[0] if self._queue else None
            for served in batch:
                served.result = served.result or Unavailable("log: the commit did not complete", code="log.failed")
                served.woken.release()
            if heir is not None:
                heir.woken.release()

    def _commit(self, batch: list[_Waiting]) -> None:
        """Append what waits in one frame; gives every member its result. Holds the lock."""
        try:
            accepted: list[_Waiting] = []
            planned = _FRAME_BYTES
            for waiting in batch:
                planned += _LEAF_BYTES * len(waiting.builds)
                waiting.result = self._refusal(planned, new=waiting.new)
                if waiting.result is None:
                    accepted.append(waiting)
            if accepted:
                self._append(accepted)
        except CountermarkError as err:
            for waiting in batch:
                waiting.result = waiting.result or err
        except OSError as err:
            failure = Unavailable(f"log: {err.strerror}", code="log.failed")
            for waiting in batch:
                waiting.result = waiting.result or failure

    def _refusal(self, size: int, *, new: bool) -> Unavailable | None:
        if self._closed:
            return _closed()
        if not self._journal.has_room(size, new=new) and new:
            return Unavailable("log: the disk is full; nothing was appended", code="log.full")
        return None

    def _append(self, accepted: list[_Waiting]) -> None:
        before = self._tree.size
        leaves: list[bytes] = []
        firsts: list[int] = []
        for waiting in accepted:
            firsts.append(before + len(leaves))
            for build in waiting.builds:
                leaves.append(build(before + len(leaves)))
        hashes = [leaf_hash(leaf) for leaf in leaves]
        for hashed in hashes:
            self._tree.append(hashed)
        head = Checkpoint(origin=self._origin, size=self._tree.size, root=self._tree.root())
        try:
            checkpoint = self._sign(head, int(time.time()))
            offset = self._journal.append(leaves, checkpoint)
        except BaseException:
            self._tree.truncate(before)
            raise
        for leaf in leaves:
            self._offsets.append(offset)
            offset += 2 + len(leaf)
        self._checkpoint = checkpoint
        for waiting, first in zip(accepted, firsts, strict=True):
            own = tuple(hashes[first - before : first - before + len(waiting.builds)])
            waiting.result = Appended(index=first, hashes=own, size=head.size, checkpoint=checkpoint)
        self._publisher.publish(head.size, checkpoint)


def _closed() -> Unavailable:
    return Unavailable("log: closed", code="log.closed")
