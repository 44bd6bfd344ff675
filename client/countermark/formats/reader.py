"""A bounded cursor over bytes from outside: every read is checked, `end` refuses what is left over.

Fixed-width integers are little-endian, as in every vendor structure read with it. Not checked here: any meaning.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

from countermark.errors import FormatError


@dataclass(slots=True)
class Reader:
    """Reads `data` from the front. `what` prefixes messages and codes (`<what>.truncated`, `<what>.trailing`)."""

    data: bytes
    what: str
    offset: int = field(default=0)

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.data) - self.offset

    def take(self, count: int, name: str) -> bytes:
        """The next `count` bytes. Raises `FormatError` `<what>.truncated`."""
        start = self.offset
        end = start + count
        if end > len(self.data):
            message = f"{self.what}.{name}: expected {count} bytes at offset {start}, got {self.left}"
            raise FormatError(message, code=f"{self.what}.truncated")
        self.offset = end
        return self.data[start:end]

    def uint(self, size: int, name: str) -> int:
        """The next `size` bytes as a little-endian unsigned integer."""
        return int.from_bytes(self.take(size, name), "little")

    def unpack(self, form: struct.Struct, name: str) -> tuple[Any, ...]:
        """The next fields, as `form` describes them."""
        return form.unpack(self.take(form.size, name))

    def expect(self, wanted: bytes | int, size: int, name: str) -> None:
        """Read a field of `size` bytes that can have one value only. Raises `FormatError` `<what>.<name>`."""
        constant = wanted.to_bytes(size, "little") if isinstance(wanted, int) else wanted
        got = self.take(size, name)
        if got != constant:
            message = f"{self.what}.{name}: expected {constant.hex()}, got {got.hex()}"
            raise FormatError(message, code=f"{self.what}.{name}")

    def end(self) -> None:
        """Raises `FormatError` `<what>.trailing` unless every byte was read."""
        if self.left:
            message = f"{self.what}: expected the end at offset {self.offset}, got {self.left} more bytes"
            raise FormatError(message, code=f"{self.what}.trailing")
