"""OpenTimestamps: detached proofs that lead from a file's digest to the Merkle root of a Bitcoin block; block headers.

The format as python-opentimestamps 0.4.5 writes it (version 1): magic, version, hash operation, digest, then the tree:
every node is any number of `ff ITEM` and one last ITEM; an ITEM is `00 ATTESTATION` or an operation and the node behind
it. Numbers are LEB128. Operations: append, prepend, SHA-256, which is what calendars give; any other is refused, for
what follows it could not be computed. Attestations: a block's height, a calendar that has yet to answer, unknown ones.
All messages are computed while the tree is read, 4096 bytes each at most.

Headers come as text: a line for each block, height and the 80 bytes in hex, ascending.

Not checked here: whether a header holds such a root, or any work (`countermark.anchors`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError

MAGIC: Final = b"\x00OpenTimestamps\x00\x00Proof\x00\xbf\x89\xe2\xe8\x84\xe8\x92\x94"
BITCOIN: Final = bytes.fromhex("0588960d73d71901")
PENDING: Final = bytes.fromhex("83dfe30d2ef90c8e")
MAX_PROOF_BYTES: Final = 64 * 1024
MAX_MESSAGE_BYTES: Final = 4096
MAX_PAYLOAD_BYTES: Final = 8192
MAX_DEPTH: Final = 256
MAX_ITEMS: Final = 1024
MAX_HEIGHT: Final = (1 << 31) - 1
MAX_HEADERS_BYTES: Final = 16 * 1024 * 1024
HEADER_BYTES: Final = 80
_VERSION, _SHA256, _APPEND, _PREPEND, _ATTESTATION, _MORE = 0x01, 0x08, 0xF0, 0xF1, 0x00, 0xFF
_URI: Final = re.compile(r"[A-Za-z0-9._/:-]{1,1000}")
_LINE: Final = re.compile(r"(0|[1-9][0-9]{0,9}) ([0-9a-f]{160})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The proof says that `message` is the Merkle root of the block at `height`."""

    height: int
    message: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """The calendar at `uri` has `message`, and will say more. The attestation is `data[start:end]` of the proof."""

    uri: str
    message: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A parsed detached proof over a file with this SHA-256."""

    digest: bytes
    blocks: tuple[Block, ...]
    pending: tuple[Pending, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A block header as it is hashed."""

    height: int
    data: bytes

    @property
    def previous(self) -> bytes:
        return self.data[4:36]

    @property
    def merkle_root(self) -> bytes:
        return self.data[36:68]

    @property
    def time(self) -> int:
        """Unix seconds, as the miner had it: hours off at most, by the network's rules."""
        return int.from_bytes(self.data[68:72], "little")

    @property
    def bits(self) -> int:
        return int.from_bytes(self.data[72:76], "little")

    @property
    def hash(self) -> bytes:
        """SHA-256 twice; the block's name backwards."""
        return hashlib.sha256(hashlib.sha256(self.data).digest()).digest()


def parse_proof(data: bytes) -> Proof:
    """Parse a detached proof. Raises `FormatError` `anchor.ots`."""
    if len(data) > MAX_PROOF_BYTES:
        raise _refuse(f"at most {MAX_PROOF_BYTES} bytes, got {len(data)}")
    head = MAGIC + bytes([_VERSION, _SHA256])
    digest = data[len(head) : len(head) + 32]
    if not data.startswith(head) or len(digest) != 32:
        raise _refuse("a detached proof of version 1 over a SHA-256 digest")
    reader = _Tree(data, len(head) + 32)
    reader.node(digest, 0)
    reader.end()
    return Proof(digest=digest, blocks=tuple(reader.blocks), pending=tuple(reader.pending))


def submission(digest: bytes, nonce: bytes) -> bytes:
    """What a calendar is asked to stamp in place of `digest`."""
    return hashlib.sha256(digest + nonce).digest()


def encode_proof(digest: bytes, answers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """A detached proof from calendars' answers: (nonce of 16 bytes, the tree over `submission`) each.

    Raises `FormatError` `anchor.ots`.
    """
    items = [bytes([_APPEND, len(nonce)]) + nonce + bytes([_SHA256]) + tree for nonce, tree in answers]
    tree = b"".join(bytes([_MORE]) + item for item in items[:-1]) + items[-1]
    data = MAGIC + bytes([_VERSION, _SHA256]) + digest + tree
    parse_proof(data)
    return data


def upgrade(data: bytes, pending: Pending, tree: bytes) -> bytes:
    """The proof with a calendar's later answer in place of its promise. Raises `FormatError` `anchor.ots`."""
    if tree[:1] == bytes([_MORE]):  # would need the branches of the node around it taken apart; calendars send one
        raise _refuse("one branch as a calendar's answer, got several")
    upgraded = data[: pending.start] + tree + data[pending.end :]
    parse_proof(upgraded)
    return upgraded


def parse_headers(data: bytes) -> tuple[Header, ...]:
    """Parse a file of headers. Raises `FormatError` `anchor.headers`."""
    if len(data) > MAX_HEADERS_BYTES:
        raise _headers(f"at most {MAX_HEADERS_BYTES} bytes")
    found: list[Header] = []
    for number, line in enumerate(data.decode("ascii", errors="replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or int(match[1]) > MAX_HEIGHT or (found and int(match[1]) <= found[-1].height):
            raise _headers(f"in line {number} a height above the one before and {HEADER_BYTES} bytes in hex")
        found.append(Header(height=int(match[1]), data=bytes.fromhex(match[2])))
    if not found:
        raise _headers("a line for each block, got none")
    return tuple(found)


class _Tree:
    """Walks the tree of a proof and computes every message."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data = data
        self._offset = offset
        self._items = 0
        self.blocks: list[Block] = []
        self.pending: list[Pending] = []

    def node(self, message: bytes, depth: int) -> None:
        """Read one node over `message`."""
        if depth > MAX_DEPTH:
            raise _refuse(f"at most {MAX_DEPTH} operations behind one another")
        while (tag := self._take(1)[0]) == _MORE:
            self._item(self._take(1)[0], message, depth)
        self._item(tag, message, depth)

    def end(self) -> None:
        if self._offset != len(self._data):
            raise _refuse(f"the end at offset {self._offset}, got {len(self._data) - self._offset} more bytes")

    def _item(self, tag: int, message: bytes, depth: int) -> None:
        self._items += 1
        if self._items > MAX_ITEMS:
            raise _refuse(f"at most {MAX_ITEMS} operations and attestations")
        if tag == _ATTESTATION:
            self._attestation(message)
            return
        if tag == _SHA256:
            result = hashlib.sha256(message).digest()
        elif tag == _APPEND:
            result = message + self._bytes(MAX_MESSAGE_BYTES)
        elif tag == _PREPEND:
            result = self._bytes(MAX_MESSAGE_BYTES) + message
        else:
            raise _refuse(f"append, prepend or SHA-256 at offset {self._offset - 1}, got {tag:#04x}")
        if len(result) > MAX_MESSAGE_BYTES:
            raise _refuse(f"messages of at most {MAX_MESSAGE_BYTES} bytes")
        self.node(result, depth + 1)

    def _attestation(self, message: bytes) -> None:
        start = self._offset - 1
        kind = self._take(8)
        payload = self._bytes(MAX_PAYLOAD_BYTES, least=0)
        inner = _Tree(payload, 0)
        if kind == BITCOIN:
            self.blocks.append(Block(height=inner._number(MAX_HEIGHT), message=message))
            inner.end()
        elif kind == PENDING:
            uri = inner._bytes(1000).decode("ascii", errors="replace")
            inner.end()
            if not _URI.fullmatch(uri):
                raise _refuse("a calendar's address without parameters")
            self.pending.append(Pending(uri=uri, message=message, start=start, end=self._offset))

    def _number(self, most: int) -> int:
        """LEB128 in its shortest form."""
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if value > most or (byte == 0 and shift > 7):
                raise _refuse(f"a number of at most {most} in its shortest form")
            if byte < 0x80:
                return value
            if shift > 63:
                raise _refuse("a number of at most 63 bits")

    def _bytes(self, most: int, *, least: int = 1) -> bytes:
        size = self._number(most)
        if size < least:
            raise _refuse(f"at least {least} byte at offset {self._offset}")
        return self._take(size)

    def _take(self, count: int) -> bytes:
        part = self._data[self._offset : self._offset + count]
        if len(part) != count:
            raise _refuse(f"{count} bytes at offset {self._offset}, got {len(part)}")
        self._offset += count
        return part


def _refuse(expected: str) -> FormatError:
    return FormatError(f"OpenTimestamps proof: expected {expected}", code="anchor.ots")


def _headers(expected: str) -> FormatError:
    return FormatError(f"block headers: expected {expected}", code="anchor.headers")
