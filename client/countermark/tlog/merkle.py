"""RFC 6962 / RFC 9162 Merkle trees over SHA-256: hashing, inclusion and consistency proofs, made and verified.

Section 2.1 of RFC 9162 gives the hashing (leaf prefix 0x00, node prefix 0x01), 2.1.3.2 and 2.1.4.2 the verification.
Proofs are made from a `NodeReader`, so that the tree may live in memory or in tiles. Not checked here: what a leaf
says and who signed the root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import reduce

from countermark.errors import LogError

HASH_BYTES = 32
MAX_PROOF = 63  # hashes in a proof: a tree has fewer than 2**63 leaves
MAX_SIZE = 2**63 - 1
EMPTY_ROOT = hashlib.sha256(b"").digest()

NodeReader = Callable[[int, int], bytes]
"""`(level, index)` -> hash of the complete subtree over leaves [index * 2**level, (index + 1) * 2**level)."""


def leaf_hash(leaf: bytes) -> bytes:
    """SHA-256(0x00 || leaf)."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """An append-only tree that keeps the hash of every complete subtree: 64 bytes of memory for each leaf."""

    def __init__(self, leaf_hashes: Iterable[bytes] = ()) -> None:
        self._levels: list[bytearray] = [bytearray()]
        for item in leaf_hashes:
            self.append(item)

    @property
    def size(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def append(self, hashed_leaf: bytes) -> None:
        """Add one leaf by its leaf hash (32 bytes)."""
        node, level = hashed_leaf, 0
        while True:
            row = self._levels[level]
            row += node
            if len(row) // HASH_BYTES % 2:
                return
            node = node_hash(bytes(row[-2 * HASH_BYTES : -HASH_BYTES]), bytes(row[-HASH_BYTES:]))
            level += 1
            if level == len(self._levels):
                self._levels.append(bytearray())

    def truncate(self, size: int) -> None:
        """Forget every leaf from `size` on."""
        for level, row in enumerate(self._levels):
            del row[(size >> level) * HASH_BYTES :]

    def node(self, level: int, index: int) -> bytes:
        """Hash of one complete subtree; this method is the tree's `NodeReader`."""
        row = self._levels[level]
        return bytes(row[index * HASH_BYTES : (index + 1) * HASH_BYTES])

    def root(self, size: int | None = None) -> bytes:
        """Root of the first `size` leaves (default: all)."""
        return root(self.size if size is None else size, self.node)


class CompactRange:
    """The right edge of a tree: enough to append and to give the root, in memory of log2(size) hashes."""

    def __init__(self) -> None:
        self.size = 0
        self._edge: list[bytes] = []  # roots of complete subtrees, the largest first: one for each bit set in `size`

    def append(self, hashed_leaf: bytes) -> None:
        """Add one leaf by its leaf hash (32 bytes)."""
        node, carry = hashed_leaf, self.size
        while carry & 1:
            node, carry = node_hash(self._edge.pop(), node), carry >> 1
        self._edge.append(node)
        self.size += 1

    def root(self) -> bytes:
        """Root of all leaves so far."""
        if not self._edge:
            return EMPTY_ROOT
        return reduce(lambda right, left: node_hash(left, right), reversed(self._edge))


def root(size: int, node: NodeReader) -> bytes:
    """Merkle tree hash of the first `size` leaves."""
    return _range_hash(0, size, node) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, node: NodeReader) -> tuple[bytes, ...]:
    """Audit path of leaf `index` in the tree of `size` leaves. Raises `LogError` (`log.range`) if it is not in it."""
    if not 0 <= index < size:
        raise LogError(f"leaf index: expected 0 to {size - 1}, got {index}", code="log.range")
    return tuple(_path(index, 0, size, node))


def consistency_proof(old: int, new: int, node: NodeReader) -> tuple[bytes, ...]:
    """Proof that the tree of `new` leaves begins with the tree of `old` leaves; empty when they are equal.

    Raises `LogError` (`log.range`) unless 1 <= old <= new.
    """
    if not 1 <= old <= new:
        raise LogError(f"tree size: expected 1 to {new}, got {old}", code="log.range")
    return tuple(_subproof(old, 0, new, True, node)) if old < new else ()


def verify_inclusion(index: int, size: int, hashed_leaf: bytes, proof: Sequence[bytes], expected_root: bytes) -> None:
    """RFC 9162 2.1.3.2. Raises `LogError`: `log.range`, `log.proof` (malformed) or `log.inclusion` (wrong root)."""
    if not 0 <= index < size <= MAX_SIZE:
        raise LogError(f"leaf index: expected less than the tree size {size}, got {index}", code="log.range")
    _check_hashes(proof)
    first, last, node = index, size - 1, hashed_leaf
    for sibling in proof:
        if last == 0:
            raise LogError("inclusion proof: longer than the tree is high", code="log.proof")
        if first & 1 or first == last:
            node = node_hash(sibling, node)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        first, last = first >> 1, last >> 1
    if last:
        raise LogError("inclusion proof: shorter than the tree is high", code="log.proof")
    if node != expected_root:
        raise LogError(f"root: expected {expected_root.hex()}, got {node.hex()}", code="log.inclusion")


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> None:
    """RFC 9162 2.1.4.2. Raises `LogError`: `log.range`, `log.proof` (malformed) or `log.consistency` (wrong root)."""
    if not 1 <= old <= new <= MAX_SIZE:
        raise LogError(f"tree size: expected 1 to {new}, got {old}", code="log.range")
    _check_hashes(proof)
    if old == new:
        if proof:
            raise LogError("consistency proof: expected none between equal sizes", code="log.proof")
        _same_root("old root", new_root, old_root)
        return
    path = list(proof)
    if old & (old - 1) == 0:  # the old tree is one complete subtree, so its root is where the proof starts
        path.insert(0, old_root)
    if not path:
        raise LogError("consistency proof: expected hashes, got none", code="log.proof")
    first, last = old - 1, new - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    from_old = from_new = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise LogError("consistency proof: longer than the tree is high", code="log.proof")
        if first & 1 or first == last:
            from_old, from_new = node_hash(sibling, from_old), node_hash(sibling, from_new)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            from_new = node_hash(from_new, sibling)
        first, last = first >> 1, last >> 1
    if last:
        raise LogError("consistency proof: shorter than the tree is high", code="log.proof")
    _same_root("old root", old_root, from_old)
    _same_root("new root", new_root, from_new)


def _same_root(what: str, expected: bytes, got: bytes) -> None:
    if expected != got:
        raise LogError(f"{what}: expected {expected.hex()}, got {got.hex()}", code="log.consistency")


def _check_hashes(proof: Sequence[bytes]) -> None:
    if len(proof) > MAX_PROOF or any(len(item) != HASH_BYTES for item in proof):
        raise LogError(f"proof: expected at most {MAX_PROOF} hashes of {HASH_BYTES} bytes", code="log.proof")


def _split(count: int) -> int:
    """The largest power of two smaller than `count` (at least 2)."""
    return 1 << ((count - 1).bit_length() - 1)


def _range_hash(start: int, end: int, node: NodeReader) -> bytes:
    """Hash over leaves [start, end), where `start` is a multiple of the power of two at or above the length."""
    count = end - start
    if count & (count - 1) == 0:
        level = count.bit_length() - 1
        return node(level, start >> level)
    middle = start + _split(count)
    return node_hash(_range_hash(start, middle, node), _range_hash(middle, end, node))


def _path(index: int, start: int, end: int, node: NodeReader) -> list[bytes]:
    """RFC 9162 2.1.3.1, PATH over the leaves [start, end)."""
    if end - start == 1:
        return []
    middle = start + _split(end - start)
    if index < middle:
        return [*_path(index, start, middle, node), _range_hash(middle, end, node)]
    return [*_path(index, middle, end, node), _range_hash(start, middle, node)]


def _subproof(old: int, start: int, end: int, complete: bool, node: NodeReader) -> list[bytes]:
    """RFC 9162 2.1.4.1, SUBPROOF: `old` is the end of the old tree, `complete` whether [start, old) is its root."""
    if old == end:
        return [] if complete else [_range_hash(start, end, node)]
    middle = start + _split(end - start)
    if old <= middle:
        return [*_subproof(old, start, middle, complete, node), _range_hash(middle, end, node)]
    return [*_subproof(old, middle, end, False, node), _range_hash(start, middle, node)]
