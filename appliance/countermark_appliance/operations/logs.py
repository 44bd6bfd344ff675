"""Log lines: text for people, or one JSON object a line for machines. Our own words only.

What a line may say is decided where it is written: no prompt, answer, salt or key is an argument of any log call. Two
leaks would remain, and end here: the text of an exception, which may quote what it choked on, is reduced to its type
and place; the text of other libraries' lines is withheld, their name and level are not.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final, TextIO

from countermark_appliance.faults import describe

FORMS: Final = ("text", "json")
MAX_CHARACTERS: Final = 4096
_OURS: Final = ("countermark", "countermark_appliance", "countermark_kernels")
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure(form: str, *, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Replace whatever handles log records now. `form`: one of `FORMS`; stderr unless `stream` is given."""
    handler = logging.StreamHandler(stream or sys.stderr)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    reform(form)


def reform(form: str) -> None:
    """The handlers that are there take this form."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines() if form == "json" else TextLines(_TEXT))


class TextLines(logging.Formatter):
    """A line each, printable, with an exception's type and place."""

    def format(self, record: logging.LogRecord) -> str:
        record.message, record.asctime = _said(record), self.formatTime(record)
        fault = f" ({_fault(record)})" if record.exc_info else ""
        return _one_line(self.formatMessage(record) + fault)


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message"}, and "fault" for an exception. Times are RFC 3339 in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{at}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _one_line(_said(record)),
        }
        if record.exc_info:
            line["fault"] = _fault(record)
        return json.dumps(line)


def _said(record: logging.LogRecord) -> str:
    return record.getMessage() if record.name.split(".")[0] in _OURS else "(text withheld)"


def _fault(record: logging.LogRecord) -> str:
    err = record.exc_info[1] if record.exc_info else None
    return "" if err is None else describe(err)


def _one_line(text: str) -> str:
    """No line can pass for two, and none can be endless."""
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_CHARACTERS]
