"""What was retrieved for a request: the documents that were in the room, as the client states them.

{corpus root, index parameters, embedder digest, query hash, chunks in their order}; each of the five stands in the
INTENT as a field commitment `retrieval.<name>` under a salt of its own (`formats.records`), so each can be shown or
withheld alone. Values: the bytes themselves; `chunks` is the CBOR array of [id, start, end, score].

Not checked here, nor anywhere: that this is what was retrieved. The appliance records what the client says before the
first token; whether the text is in the prompt shows in the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from countermark.errors import FormatError
from countermark.formats import cbor

FIELDS = ("chunks", "corpus_root", "embedder", "index_parameters", "query")
DIGEST_BYTES = 32
MAX_PARAMETERS_BYTES = 4096
MAX_CHUNKS = 1024
MAX_ID = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a document; the client's own unit for its boundaries."""

    id: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSet:
    """`index_parameters`: in any form that whoever checks them knows. `chunks`: in the order they were ranked."""

    corpus_root: bytes
    index_parameters: bytes
    embedder: bytes
    query: bytes
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        """Raises `FormatError` (`request.retrieval`)."""
        for name in ("corpus_root", "embedder", "query"):
            if len(getattr(self, name)) != DIGEST_BYTES:
                raise _wrong(name, f"{DIGEST_BYTES} bytes, got {len(getattr(self, name))}")
        if len(self.index_parameters) > MAX_PARAMETERS_BYTES:
            raise _wrong("index_parameters", f"at most {MAX_PARAMETERS_BYTES} bytes, got {len(self.index_parameters)}")
        if len(self.chunks) > MAX_CHUNKS:
            raise _wrong("chunks", f"at most {MAX_CHUNKS}, got {len(self.chunks)}")
        for chunk in self.chunks:
            if not 0 < len(chunk.id) <= MAX_ID or not 0 <= chunk.start <= chunk.end < 1 << 63:
                raise _wrong("chunks", f"ids of 1 to {MAX_ID} characters, and start up to end")
            if not math.isfinite(chunk.score):
                raise _wrong("chunks", "finite scores")

    def values(self) -> dict[str, bytes]:
        """What the INTENT commits to, by the names of `FIELDS`."""
        return {
            "chunks": cbor.encode([[chunk.id, chunk.start, chunk.end, chunk.score] for chunk in self.chunks]),
            "corpus_root": self.corpus_root,
            "embedder": self.embedder,
            "index_parameters": self.index_parameters,
            "query": self.query,
        }


def _wrong(name: str, expected: str) -> FormatError:
    return FormatError(f"retrieval.{name}: expected {expected}", code="request.retrieval")
