"""A witness: follows logs, verifies each from its first leaf, and cosigns heads that only ever grew.

For one log (origin and keys), whose state is one file: the last head we cosigned. Each round: 1 verify the log
(`logcheck`: signatures, every tile, the rules of its entries and with them the rule of growth) · 2 it passes through
the head cosigned before, and has not become shorter · 3 write the new head to the state, durably · 4 sign and hand out
the lines. So two heads of one size are never cosigned, whatever is killed when; a head that was written but whose lines
were lost is signed again, by the same keys over the same text.

The state is the witness's memory: without it, it cosigns whatever it is shown first. Verified from the first leaf each
time, because an operator log has one leaf for each start of a machine; so nothing else need be remembered.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from countermark.errors import UsageError
from countermark.files import read_file, write_file
from countermark.logcheck import CheckedLog, Rules, verify_log
from countermark.logkeys import SigningKeys
from countermark.logsource import Source
from countermark.tlog.checkpoint import (
    MAX_NOTE_BYTES,
    Checkpoint,
    LogKeys,
    Signature,
    checkpoint_text,
    parse_checkpoint_text,
    parse_note,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosigned:
    """A head we vouch for, and our lines for it."""

    log: CheckedLog
    lines: tuple[Signature, ...]


class Witness:
    """One witness of one log. Holds its state file exclusively until closed."""

    def __init__(
        self, state: Path, keys: SigningKeys, origin: str, log_keys: LogKeys, *, rules: Rules = Rules.OPERATOR
    ) -> None:
        """`state`: a directory, made if absent. Raises `UsageError` (`usage.file`, `usage.locked`)."""
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise UsageError(f"{state}: {err.strerror}", code="usage.file") from err
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            os.close(self._lock)
            raise UsageError(f"{state}: another process is using it", code="usage.locked") from err
        self._keys = keys
        self._origin = origin
        self._log_keys = log_keys
        self._rules = rules
        named = hashlib.sha256(origin.encode() + b"\n" + log_keys.ed25519 + log_keys.ml_dsa_44).hexdigest()
        self._file = state / f"{named}.head"

    def close(self) -> None:
        """Give the state back. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def seen(self) -> Checkpoint | None:
        """The last head we cosigned. Raises `UsageError` (`usage.file`), `FormatError` (`tlog.checkpoint`)."""
        try:
            self._file.lstat()
        except FileNotFoundError:
            return None
        except OSError as err:  # a memory that cannot be read is not an empty one
            raise UsageError(f"{self._file}: {err.strerror}", code="usage.file") from err
        return parse_checkpoint_text(read_file(self._file, max_bytes=MAX_NOTE_BYTES).decode(errors="replace"))

    def round(self, source: Source, now: Callable[[], float]) -> Cosigned | None:
        """Cosign the source's head; None when it has our lines already.

        Raises what `verify_log` raises, above all `LogError` `log.rolled_back`, `log.consistency` and `log.fork`.
        """
        note = source.checkpoint()
        seen = self.seen()
        signed = {(line.name, line.key_id) for line in parse_note(note).signatures}
        ours = {(key.name, key.key_id) for key in self._keys.as_witness}
        if seen is not None and parse_note(note).text == checkpoint_text(seen) and ours <= signed:
            return None
        log = verify_log(source, self._origin, self._log_keys, rules=self._rules, since=seen, note=note)
        head = log.checkpoint
        if head.size == 0:
            return None
        write_file(self._file, checkpoint_text(head).encode())
        return Cosigned(log=log, lines=self._keys.cosign(head, int(now())))
