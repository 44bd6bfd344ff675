"""Endorsements from the vendors' services, or from a cache of them: `intel` for quotes, `nvidia` for GPUs.

What comes back is signed by the vendors, so none of these services is trusted; TLS only keeps others from watching and
from wasting time. Nothing is fetched unless somebody calls these functions.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """When endorsements hold, and how new each part is: what supersedes them has nothing older in `ages`.

    `issued` is the latest of the parts' dates, `until` the earliest; unix seconds, both inclusive.
    """

    issued: int
    until: int
    ages: tuple[int, ...] = ()
