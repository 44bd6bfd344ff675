"""The whole error tree of countermark, split by what the caller does next.

Every error carries a stable, dotted `code` (part of the public interface; tests compare it, never the text) and the
appraisal `step` it belongs to where there is one. Messages read `<field>: expected <x>, got <y>`. `exit_code` is what
the command line returns; the table stands in the README.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from countermark.checks import Check


class CountermarkError(Exception):
    """Base of every error this project raises on purpose.

    `code`: stable identifier such as `tdx.debug`. `step`: the numbered step that failed, such as `4`, or None.
    `checks`: the checks made before (and including) the failing one, for printing.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, code: str, step: str | None = None, checks: Sequence[Check] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.step = step
        self.checks = tuple(checks)


class UsageError(CountermarkError):
    """The call itself is wrong: an option, a file that is not there."""


class PolicyError(UsageError):
    """The policy file does not parse or contradicts itself."""


class RequestError(UsageError):
    """The request cannot be served as written: empty prompt, unknown model, value out of range."""


class ConfigError(UsageError):
    """The appliance's configuration does not parse or contradicts itself."""


class FormatError(CountermarkError):
    """Bytes from outside do not have the form they claim. Parsers raise this and nothing else."""

    exit_code = 20


class VerificationError(CountermarkError):
    """Something was checked and is not as it must be. Do not use what it came with."""


class QuoteError(VerificationError):
    exit_code = 10


class TcbError(VerificationError):
    """TCB level, advisories, or endorsements outside their validity."""

    exit_code = 11


class MeasurementError(VerificationError):
    """TD attributes, registers, event logs or report_data differ from what is expected."""

    exit_code = 12


class WeightsError(VerificationError):
    exit_code = 13


class GpuError(VerificationError):
    exit_code = 14


class ChannelError(VerificationError):
    """The TLS connection is not the one the evidence speaks of, or its parameters are not ours."""

    exit_code = 15


class ReceiptError(VerificationError):
    exit_code = 20


class BundleError(ReceiptError):
    """The bundle file itself: its container, names, sizes or digests."""


class LogError(VerificationError):
    """Inclusion proof, consistency proof, checkpoint or the log's files."""

    exit_code = 21


class ReplayDiverged(VerificationError):
    exit_code = 30


class Undecidable(CountermarkError):
    """Something needed to decide is missing. Never counts as success."""

    exit_code = 40


class Recorded(StrEnum):
    """Whether a node has an INTENT of a request that failed, so that sending it again would make a second record."""

    NO = "no"  # not sent, or the node says that it refused before recording
    UNKNOWN = "unknown"  # sent, and nothing came back
    YES = "yes"  # an Accepted of this request was verified


class Unavailable(CountermarkError):
    """The network, or a busy or stopping server. The same call may work later.

    `retry_after_s`: how long the server advises to wait, where it does. `recorded`: of a request; only after `NO` is
    sending it again free of a second record. What a node says of itself there is believed: it could as well lie in
    its log.
    """

    exit_code = 50

    def __init__(self, message: str, *, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s
        self.recorded = Recorded.NO
