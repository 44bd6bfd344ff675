"""A process that tries grammars before the node does, in children that may take so much time and memory and no more.

    python -m countermark_appliance.engine.grammarjudge

On standard input: u32 count, then for each id u32 length and bytes; after that, for each grammar, u8 kind, u32 length
and text in UTF-8. On standard output: one byte 0 when ready; then for each grammar u8 verdict (0: it can be used, 1: it
is none, 2: it takes too much), u32 length and a text that says why. Little-endian; ends with its input.

A child is a copy of this process that compiles the grammar and computes its first mask. A schema of a hundred bytes may
want hours (`multipleOf`), and the library cannot be stopped from within.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
from typing import BinaryIO

from countermark_appliance.engine import grammarlib

CPU_S = 2
MEMORY_BYTES = 256 << 20
"""Beyond what the process has already."""
USABLE, REFUSED, COSTLY = range(3)


def main() -> None:
    """See the module's docstring."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    tokens = [_text(source) for _ in range(_u32(source))]
    tokenizer = grammarlib.vocabulary(tokens)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sink.write(b"\0")
    sink.flush()
    while kind := source.read(1):
        verdict, why = _judge(tokenizer, grammarlib.KINDS[kind[0]], _text(source).decode())
        sink.write(struct.pack("<BI", verdict, len(why)) + why)
        sink.flush()


def _judge(tokenizer: object, kind: str, text: str) -> tuple[int, bytes]:
    """Let a child try it. What it does not live to say is that it takes too much."""
    here, there = os.pipe()
    child = os.fork()
    if not child:
        os.close(here)
        _try(tokenizer, kind, text, there)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return (said[0], said[1:]) if said else (COSTLY, b"")


def _try(tokenizer: object, kind: str, text: str, there: int) -> None:
    """The child; ends the process."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123  nothing else is needed of pathlib here
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the library says when it runs out of memory
        try:
            matcher = grammarlib.compiled(tokenizer, kind, text)  # type: ignore[arg-type]
            matcher.compute_bitmask()
            grammarlib.check(matcher)
        except grammarlib.Refused as err:
            os.write(there, bytes([COSTLY if err.costly else REFUSED]) + str(err).encode()[:1000])
        else:
            os.write(there, bytes([USABLE]))
    finally:
        os._exit(0)


def _u32(source: BinaryIO) -> int:
    found: tuple[int] = struct.unpack("<I", _exactly(source, 4))
    return found[0]


def _text(source: BinaryIO) -> bytes:
    return _exactly(source, _u32(source))


def _exactly(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise SystemExit(0)  # nobody is there any more
    return data


if __name__ == "__main__":
    main()
