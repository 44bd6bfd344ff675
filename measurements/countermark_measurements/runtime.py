"""What of RTMR3 is known before a start: the events that the image, the configuration and the code determine.

`formats.boot_events` fixes seven events; the first four are predicted here, from the image id, the bytes of the
operator's configuration file (SHA-256), the weights root it names, and the numerics. GPUs, the keys made at each start
and so the register itself are not: a verifier reads them from the machine's own log, which must replay to the register.

Not checked here: the rest of the configuration; the appliance refuses what it does not know.
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from typing import Final

from countermark.errors import FormatError
from countermark.formats import boot_events
from countermark.formats.eventlog import Event

MAX_CONFIG_BYTES: Final = 64 * 1024
KNOWN: Final = boot_events.NAMES[:4]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeEvents:
    """What a policy wants to know of a configuration, and the events. `events`: by name, in order."""

    config: bytes  # SHA-256 of the file
    weights_root: bytes
    events: tuple[tuple[str, Event], ...]


def predict_runtime(
    config: bytes, *, image_id: bytes, profile: str | None = None, kernel_digest: bytes | None = None
) -> RuntimeEvents:
    """The events up to numerics; without `kernel_digest` (SHA-256 of the kernel sources), those before it.

    Raises `FormatError` (`runtime.config`): no TOML with weights.root, padded, or too long.
    """
    if len(config) > MAX_CONFIG_BYTES or b"\0" in config:
        message = f"config: expected the file itself, of at most {MAX_CONFIG_BYTES} bytes without NUL"
        raise FormatError(message, code="runtime.config")
    try:
        table = tomllib.loads(config.decode()).get("weights")
        text = table.get("root") if isinstance(table, dict) else None
        root = bytes.fromhex(text) if isinstance(text, str) else b""
    except (ValueError, RecursionError) as err:
        raise FormatError("config: expected TOML with weights.root", code="runtime.config") from err
    if len(root) != 32 or root.hex() != text:
        raise FormatError("config: expected weights.root of 64 lower-case hex digits", code="runtime.config")
    digest = hashlib.sha256(config).digest()
    values: list[object] = [image_id, digest, root]
    if kernel_digest is not None and profile is not None:
        values.append([profile, kernel_digest])
    made = tuple(
        (name, boot_events.event(boot_events.event_data(name, value)))
        for name, value in zip(KNOWN, values, strict=False)
    )
    return RuntimeEvents(config=digest, weights_root=root, events=made)
