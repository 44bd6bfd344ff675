"""What the proxy runs with; `cli` makes it from the command line, tests make it by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from countermark.proxy.guard import Guard
from countermark.proxy.http import Limits as HttpLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLimits:
    """`reattest_s`: no prompt goes out under an older verdict. `sessions`: connections to one node at most, each of
    which carries `streams` answers at a time (a node takes 8, and makes more wait unheard). `retry_s`: shortest and
    longest pause after a node could not be reached; `refused_s`: after it was refused, or an answer of it was withheld.
    """

    reattest_s: float = 300.0
    sessions: int = 32
    streams: int = 8
    retry_s: tuple[float, float] = (0.5, 15.0)
    refused_s: tuple[float, float] = (15.0, 600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundles:
    """Where answers are saved, and how many of them are kept."""

    folder: Path
    keep: int = 1000
    keep_bytes: int = 1 << 30
    every: bool = False  # also of answers that were not asked to be saved
    manifest: bytes | None = None  # to carry along


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`streams`: answers at a time. `timeout_s`: for one answer. `wait_s`: for a place on a busy node.

    `hold`: no text before the whole answer is verified, in streams too. `resend`: a request that was lost with its
    node, which may have begun it, is sent to another, and the answer says so.
    """

    guard: Guard
    nodes: tuple[str, ...]
    port: int = 0
    streams: int = 256
    timeout_s: float = 600.0
    wait_s: float = 30.0
    hold: bool = False
    resend: bool = False
    bundles: Bundles | None = None
    node_limits: NodeLimits = field(default_factory=NodeLimits)
    http_limits: HttpLimits = field(default_factory=HttpLimits)
