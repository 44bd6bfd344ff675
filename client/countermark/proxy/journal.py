"""What the proxy says on stderr: one line an event, JSON where nobody watches. Never a prompt, an answer, a path.

Fields are an allow-list, so that no request's content can slip in beside them: an unknown one is an error of ours, and
texts are those of errors about nodes, never about requests.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, TextIO

from countermark.terminal import printable

FIELDS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "node": str,
    "route": str,
    "status": int,
    "code": str,
    "step": str,
    "receipt": str,
    "ms": float,
    "first_ms": float,
    "prompt_tokens": int,
    "output_tokens": int,
    "simulated": bool,
    "boot": str,
    "tls_key": str,
    "fingerprint": str,
    "text": str,  # of an error about a node
    "where": str,  # module and line of an error of ours
    "listening": str,
}


class Journal:
    """Thread-safe. `people`: lines for reading instead of JSON."""

    def __init__(self, out: TextIO | None = None, *, people: bool = False) -> None:
        self._out = out
        self._people = people
        self._lock = threading.Lock()

    def note(self, event: str, **fields: str | int | float | bool | None) -> None:
        """One line. `fields`: of `FIELDS`; None leaves one out."""
        found = {name: value for name, value in fields.items() if value is not None}
        for name, value in found.items():
            assert isinstance(value, FIELDS[name]), name
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if self._people:
            line = f"{time[11:19]}  {event:<15} " + "  ".join(f"{name} {value}" for name, value in found.items())
        else:
            line = json.dumps({"time": time, "event": event, **found})
        with self._lock:
            print(printable(line), file=self._out or sys.stderr, flush=True)
