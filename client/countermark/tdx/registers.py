"""The measured registers of a TD against reference values, and the firmware's event log against the registers.

Reference values are those of measurement manifests the policy pinned: MRTD and RTMR0 per launch shape, RTMR1 and RTMR2
per image, and the launch constants. A difference names the register, both values and, when the event log replays to
what was found, the first event that differs from the manifest's (`tdx.eventlogs`).
Not checked here: RTMR3 (`tdx.runtime_log`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from countermark.checks import rfc3339
from countermark.errors import MeasurementError, Undecidable
from countermark.formats import eventlog
from countermark.formats.eventlog import EventLog
from countermark.formats.manifest import Manifest, Shape
from countermark.formats.quote import TdReport
from countermark.tdx import eventlogs

_UPDATE: Final = "do not use it until its operator has started a newer image"
_PIN: Final = "get its manifest from your publisher, then `countermark policy pin`"
_LAUNCH: Final = ("mrconfigid", "mrowner", "mrownerconfig", "td_attributes", "xfam")


def _expected(image: Manifest, shape: Shape) -> dict[str, bytes]:
    registers = {"mrtd": shape.mrtd, "rtmr0": shape.rtmr0, "rtmr1": image.rtmr1, "rtmr2": image.rtmr2}
    return registers | {name: getattr(image, name) for name in _LAUNCH}


def verify_registers(
    report: TdReport,
    images: Sequence[Manifest],
    *,
    platform: str,
    claimed: bytes,
    ccel: EventLog,
    now: int,
    revoked: Sequence[bytes] = (),
) -> tuple[Manifest, Shape]:
    """Step 5: find the one pinned image and launch shape whose every register this is.

    `claimed`: the image id the evidence claims. It, and `revoked`, the images publishers have withdrawn, only choose
    what is said of a difference. Raises `Undecidable` `measurement.no_reference` (the policy pins no image) or
    `MeasurementError`: `measurement.platform`, `measurement.<register>`, `manifest.not_yet_valid`, `manifest.expired`.
    """
    if not images:
        message = "reference values: expected a pinned measurement manifest in the policy, got none"
        raise Undecidable(message, code="measurement.no_reference", step="5")
    candidates = [(image, shape) for image in images if image.platform == platform for shape in image.shapes]
    if not candidates:
        known = sorted({image.platform for image in images})
        message = f"platform: expected one of {known} as pinned, got {platform}"
        raise MeasurementError(message, code="measurement.platform", step="5")
    differing = []
    for image, shape in candidates:
        wanted = _expected(image, shape)
        names = [name for name, value in wanted.items() if getattr(report, name) != value]
        if not names:
            _verify_validity(image, now)
            return image, shape
        differing.append((image.image_id != claimed, len(names), image, shape, names[0]))
    _, _, image, shape, name = min(differing, key=lambda item: item[:2])
    wanted_value, found = _expected(image, shape)[name], getattr(report, name)
    message = f"{name}: expected {wanted_value.hex()}, got {found.hex()}"
    if claimed in revoked:  # what to do comes before what differs from an image that was not meant
        message += f"; the node says it runs image {claimed.hex()}, which its publisher has revoked: {_UPDATE}"
    elif all(known.image_id != claimed for known in images):
        message += f"; the node says it runs image {claimed.hex()}, which this policy does not pin: {_PIN}"
    message += f"; compared with image {image.image_id.hex()}, {shape.name}"
    if name.startswith("rtmr"):
        message += f": {_explained(image, shape, ccel, int(name[4]), found)}"
    raise MeasurementError(message, code=f"measurement.{name}", step="5")


def _verify_validity(image: Manifest, now: int) -> None:
    if now < image.not_before:
        message = (
            f"manifest of image {image.image_id.hex()}: valid from {rfc3339(image.not_before)}, time is {rfc3339(now)}"
        )
        raise MeasurementError(message, code="manifest.not_yet_valid", step="5")
    if now > image.not_after:
        message = (
            f"manifest of image {image.image_id.hex()}: valid until {rfc3339(image.not_after)}, time is {rfc3339(now)};"
            " get your publisher's current manifest, then `countermark policy pin`"
        )
        raise MeasurementError(message, code="manifest.expired", step="5")


def _explained(image: Manifest, shape: Shape, ccel: EventLog, rtmr: int, found: bytes) -> str:
    if eventlog.replay(ccel.events)[rtmr] != found:
        return "the event log does not replay to it, so it cannot say which event differs"
    difference = eventlogs.first_difference(image, shape, ccel.events, register=rtmr + 1)
    return "the log has the manifest's events" if difference is None else str(difference)


def verify_event_log(report: TdReport, ccel: EventLog) -> str:
    """Step 6, first log: the firmware's events replay to RTMR0-2, touch nothing else, and are what they say.

    Returns one line for the check's detail. Raises `MeasurementError` `eventlog.rtmr0` to `eventlog.rtmr3`, or
    `eventlog.digest` for an event whose digest is not that of its data though its type says so.
    """
    eventlogs.require_replay(eventlogs.replay_against(replace(report, rtmr3=bytes(48)), ccel.events))
    digests = eventlogs.verify_digests(ccel.events)
    eventlogs.require_digests(ccel.events, digests)
    recomputed = digests.count(eventlogs.DigestCheck.RECOMPUTED)
    return f"{len(ccel.events)} firmware events replay to RTMR0-2; {recomputed} digests recomputed from their data"
