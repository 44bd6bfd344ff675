"""The lowest tcbEvaluationDataNumber to ask for at a time: what keeps Intel's superseded endorsements from passing.

Intel raises the number with each TCB recovery event. A new number is first published as the *early* update and becomes
the *standard* one, which requests get by default, about a year later (Intel PCS API version 4, `update` of the TCB
requests and `tcbevaluationdatanumbers`). Endorsements are valid for 30 days, so a number is asked for 30 days after it
became the standard: whoever fetched the day before is not refused.

Where the day itself is not known, the table has the latest day it can have been, which asks for less rather than more:
15, 17 and 18 are the issue dates of genuine standard endorsements with that number (the sets debug-td, phala-b0c06f and
dstack-90c06f of the real evidence); 16 is that of an SGX TCB info with that number, while 17 had been early since
2024-03-12; 19 is the last day before 20; 20 is when operators saw their platforms re-rated (near/mpc issues 4166 and
4169), a year after its event. No smaller number is known for TDX, so 15 is asked for at every earlier time.
Not checked here: anything; this is a table, to be lengthened when Intel makes another number the standard.
"""

from __future__ import annotations

from datetime import date
from typing import Final

DAYS_VALID: Final = 30
STANDARD_SINCE: Final = (
    (15, date(2023, 6, 8)),
    (16, date(2024, 7, 3)),
    (17, date(2025, 6, 19)),
    (18, date(2026, 1, 12)),
    (19, date(2026, 8, 12)),
    (20, date(2026, 8, 14)),
)
_DAY_S: Final = 86_400
_EPOCH: Final = date(1970, 1, 1)


def tcb_evaluation_floor(now: int) -> int:
    """The highest number that had been Intel's standard one for 30 days at `now` (unix seconds)."""
    floor = STANDARD_SINCE[0][0]
    for number, day in STANDARD_SINCE:
        if ((day - _EPOCH).days + DAYS_VALID) * _DAY_S <= now:
            floor = number
    return floor
