"""Asks a platform every few seconds whether the machine is still the one that was measured.

The first refusal is kept and ends the watch: a machine that has changed does not change back. Not done here: stopping
the service (whoever gets `on_change` does), and what counts as a change (`platform.base.Platform.check_unchanged`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from countermark.errors import CountermarkError, VerificationError
from countermark_appliance.faults import describe
from countermark_appliance.platform.base import Platform

INTERVAL_S: Final = 5.0
_log = logging.getLogger(__name__)


class Watch:
    """A thread of its own from `start` to `close`."""

    def __init__(self, platform: Platform, *, on_change: Callable[[], None], interval_s: float = INTERVAL_S) -> None:
        self._platform = platform
        self._on_change = on_change
        self._interval_s = interval_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="countermark-watch", daemon=True)
        self.found: CountermarkError | None = None

    def start(self) -> None:
        """Ask for the first time after one interval."""
        self._thread.start()

    def close(self) -> None:
        """Stop asking. A call into a driver that hangs is not waited for."""
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            try:
                self._platform.check_unchanged()
            except CountermarkError as err:
                self.found = err
            except Exception as err:  # noqa: BLE001  a watch that ended unseen would be none
                self.found = VerificationError(f"platform: its check failed: {describe(err)}", code="platform.check")
            if self.found is not None:
                _log.error("platform: %s (%s)", self.found, self.found.code)
                self._on_change()
                return
