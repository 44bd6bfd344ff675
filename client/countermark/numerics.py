"""The numerics profiles this version knows: one table, here alone. `kernels/NUMERICS.md` says what `CURRENT` computes.

A profile never changes; another one takes its place, and it stays in the table as retired. Then a live appliance that
offers it is refused (`numerics.profile`, whatever the policy lists), and a bundle made with it is undecidable: all of
it is checked, but nothing can compute its tokens again. The engine's own name for what it computes is
`countermark_kernels.PROFILE`, which the client never imports; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from countermark.checks import Check
from countermark.errors import Undecidable
from countermark.formats.records import EXACT_CLAIMS, EXACT_TIER

CURRENT: Final = "exact-v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsProfile:
    """What a record under this profile must promise, no less; and, when it is retired, why."""

    determinism: str
    claims: tuple[str, ...]
    retired: str = ""


PROFILES: Final[Mapping[str, NumericsProfile]] = {
    "exact-v0": NumericsProfile(determinism=EXACT_TIER, claims=EXACT_CLAIMS, retired="a draft that no release used"),
    CURRENT: NumericsProfile(determinism=EXACT_TIER, claims=EXACT_CLAIMS),
}


def is_retired(name: str) -> bool:
    """Whether it is known and retired; an unknown profile is not."""
    return name in PROFILES and PROFILES[name].retired != ""


def refuse_retired(name: str, checks: Sequence[Check] = ()) -> None:
    """Raises `Undecidable` (`profile.retired`). `checks`: what was checked of the record before."""
    if is_retired(name):
        message = f"profile: expected {CURRENT}, got {name}: retired ({PROFILES[name].retired}), its runner is gone"
        if checks:
            message += "; every signature and every other check held"
        raise Undecidable(message, code="profile.retired", checks=checks)


def require_executable(name: str) -> None:
    """Raises `Undecidable`: `profile.retired`, or `profile.unknown` where this version never heard of it."""
    refuse_retired(name)
    if name not in PROFILES:
        message = f"profile: expected {CURRENT}, got {name!r:.60}, unknown to this version"
        raise Undecidable(message, code="profile.unknown")
