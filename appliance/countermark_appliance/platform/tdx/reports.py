"""Quotes through configfs-tsm.

Linux, Documentation/ABI/testing/configfs-tsm-report (kernel 6.7) and drivers/virt/coco/guest/report.c: a directory made
below `report` is a request of its own; `provider` names the format, `inblob` takes the 64 bytes, reading `outblob` asks
the host's quoting service and waits up to 30 seconds (tdx-guest's `getquote_timeout`), and `generation` counts writes.
A binary attribute is taken over when its file is closed, where an error has no way back, so the count and the quote
itself show whether the write arrived. The host carries the quote and may hand back anything: what comes back must
parse and speak of our 64 bytes.

Kernels let one quote be made at a time, and after a timeout none until the host gives the buffer back (EBUSY).
Not checked here: the quote's signatures, which are the verifier's to judge.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from countermark.errors import ConfigError, FormatError, Unavailable
from countermark.formats.quote import MAX_QUOTE_BYTES, TdReport, parse_quote
from countermark_appliance.platform.sysfs import Sysfs

REPORTS: Final = "sys/kernel/config/tsm/report"
PROVIDER: Final = "tdx_guest"
_MAX_TEXT: Final = 4096
_RETRY_S: Final = 1.0
_BY_ERRNO: Final = {
    errno.EBUSY: "platform.quote_busy",
    errno.EAGAIN: "platform.quote_busy",
    errno.EINTR: "platform.quote_interrupted",
    errno.ETIMEDOUT: "platform.quote_timeout",
    errno.EFBIG: "platform.quote_too_long",
}
_log = logging.getLogger(__name__)


class Reports:
    """Asks for quotes, one at a time. Thread-safe."""

    def __init__(self, sysfs: Sysfs) -> None:
        """Raises `ConfigError`: `platform.tsm_missing`, `platform.provider`."""
        self._sysfs = sysfs
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        try:
            with self._entry() as entry:
                provider = self._text(entry, "provider")
        except OSError as err:
            message = (
                f"quotes: expected to make a directory in /{REPORTS} (modules tdx-guest and tsm_report, configfs"
                f" mounted, a TDX guest), got {err.strerror}"
            )
            raise ConfigError(message, code="platform.tsm_missing") from err
        if provider != PROVIDER:
            message = f"quotes: expected the provider {PROVIDER}, got {provider!r:.40}: this is not a TDX guest"
            raise ConfigError(message, code="platform.provider")

    def quote(self, report_data: bytes) -> tuple[bytes, TdReport]:
        """A quote over the 64 bytes, and what it says.

        Raises `Unavailable`: `platform.quote_busy`, `platform.quote_interrupted`, `platform.quote_timeout`,
        `platform.quote_too_long`, `platform.quote_failed`, `platform.quote_conflict` (somebody else wrote),
        `platform.quote_malformed`.
        """
        with self._lock:
            try:
                with self._entry() as entry:
                    before = self._generation(entry)
                    self._sysfs.write(f"{entry}/inblob", report_data)
                    quote = self._sysfs.read(f"{entry}/outblob", max_bytes=MAX_QUOTE_BYTES)
                    after = self._generation(entry)
            except OSError as err:
                code = _BY_ERRNO.get(err.errno or 0, "platform.quote_failed")
                raise _unavailable(f"expected one from the host's quoting service, got {err.strerror}", code) from err
        if after != before + 1:
            raise _unavailable(f"expected one write to the request, got {after - before}", "platform.quote_conflict")
        try:
            body = parse_quote(quote).body
        except FormatError as err:
            raise _unavailable(f"the host's answer: {err}", "platform.quote_malformed") from err
        if body.report_data != report_data:
            raise _unavailable("expected our report_data in it, got other bytes", "platform.quote_conflict")
        return quote, body

    @contextmanager
    def _entry(self) -> Iterator[str]:
        entry = ""
        while not entry:
            name = f"{REPORTS}/countermark.{os.getpid()}.{next(self._numbers)}"
            with suppress(FileExistsError):  # left by a process that was killed
                self._sysfs.make(name)
                entry = name
        try:
            yield entry
        finally:
            try:
                self._sysfs.remove(entry)
            except OSError as err:
                _log.warning("quotes: %s stays behind: %s", entry, err.strerror)

    def _text(self, entry: str, name: str) -> str:
        return self._sysfs.read(f"{entry}/{name}", max_bytes=_MAX_TEXT).decode("ascii", "replace").strip()

    def _generation(self, entry: str) -> int:
        text = self._text(entry, "generation")
        if not text.isdecimal():
            raise OSError(errno.EPROTO, f"generation {text!r:.40}", entry)
        return int(text)


def _unavailable(message: str, code: str) -> Unavailable:
    return Unavailable(f"quote: {message}", code=code, retry_after_s=_RETRY_S)
