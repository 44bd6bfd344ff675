"""How an exception that is not ours is named in a log line: by type and place, never by its text."""

from __future__ import annotations


def describe(err: BaseException) -> str:
    """Type and place of an exception. Its message may quote what it choked on, which may be a prompt."""
    trace = err.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return type(err).__name__ + (f" at {trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace else "")
