"""The second event log: what our init extended into RTMR3, and that this is all that was extended.

`formats.boot_events` fixes the grammar: image id, config, weights root, numerics, GPUs, keys, `system-ready`, each
once, in that order, each digest recomputed from its data. The register must be the replay of exactly these events from
zero, so an event after `system-ready`, one before the first, a non-zero start or a claim that was never extended all
differ.
Not checked here: whether the values are the wanted ones (`appraise`, steps 7 to 10).
"""

from __future__ import annotations

from countermark.errors import FormatError, MeasurementError
from countermark.formats import boot_events, eventlog
from countermark.formats.boot_events import BootEvents
from countermark.formats.eventlog import EventLog


def verify_runtime_log(log: EventLog, rtmr3: bytes) -> BootEvents:
    """Step 6, second log: grammar, digests, and replay to `rtmr3`.

    Raises `MeasurementError` with step 6: the grammar's codes (`rtmr3.order`, `rtmr3.after_ready`, `rtmr3.digest`,
    `rtmr3.value`, `rtmr3.kind`, `rtmr3.header`, `cbor.*`) or `rtmr3.replay`.
    """
    try:
        boot = boot_events.read_boot_log(log)
    except FormatError as err:
        raise MeasurementError(str(err), code=err.code, step="6") from err
    replayed = eventlog.replay(log.events)[3]
    if replayed != rtmr3:
        message = f"rtmr3: expected {replayed.hex()} after its {len(boot_events.NAMES)} events, got {rtmr3.hex()}"
        raise MeasurementError(message, code="rtmr3.replay", step="6")
    return boot
