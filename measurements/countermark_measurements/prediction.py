"""What `predict` says and `manifest` signs: an image's registers in its launch shapes, and every event behind them.

JSON, format 1, ours: {"format", "platform", "inputs" (name and SHA-256 of each file predicted from), "shapes", "rtmr1",
"rtmr2", "events"}. Shapes and events are those of `formats.manifest`; an event of one shape names it, an event of all
has an empty shape. `check` holds a prediction against itself: the events of each shape must replay to its registers.

Not checked here: whether a machine measures this; that is what the boot test is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from countermark.errors import FormatError
from countermark.formats import eventlog, strict_json
from countermark.formats.eventlog import Event
from countermark.formats.manifest import (
    MAX_MANIFEST_BYTES,
    PredictedEvent,
    Shape,
    Subject,
    events_json,
    parse_events,
    parse_shapes,
    shapes_json,
)

FORMAT: Final = "countermark-prediction/1"
PLATFORMS: Final = ("tdx", "vtpm")
_MEMBERS: Final = frozenset(("format", "platform", "inputs", "shapes", "rtmr1", "rtmr2", "events"))
_MAX_INPUTS: Final = 64
_MAX_NAME: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Registers and events. `inputs`: the files it was made from, such as disk.raw and OVMF.fd, by SHA-256."""

    platform: str  # tdx or vtpm
    inputs: tuple[Subject, ...]
    shapes: tuple[Shape, ...]
    rtmr1: bytes  # 48
    rtmr2: bytes  # 48
    events: tuple[PredictedEvent, ...]

    def of_shape(self, shape: Shape) -> tuple[PredictedEvent, ...]:
        """The events of one launch shape, in the order in which they are logged."""
        return tuple(event for event in self.events if event.shape in ("", shape.name))


def replay(events: tuple[PredictedEvent, ...]) -> tuple[bytes, bytes, bytes, bytes]:
    """RTMR0 to RTMR3 after these events."""
    return eventlog.replay(
        Event(register=item.register, event_type=item.event_type, digest=item.digest, data=b"") for item in events
    )


def check(prediction: Prediction) -> None:
    """Refuse a prediction that contradicts itself. Raises `FormatError` (`prediction.registers`)."""
    names = [shape.name for shape in prediction.shapes]
    if not names or len(set(names)) != len(names):
        raise FormatError("prediction.shapes: expected at least one, with distinct names", code="prediction.registers")
    for shape in prediction.shapes:
        if replay(prediction.of_shape(shape)) != (shape.rtmr0, prediction.rtmr1, prediction.rtmr2, bytes(48)):
            message = f"prediction.events: expected to replay to the registers of {shape.name}"
            raise FormatError(message, code="prediction.registers")


def to_json(prediction: Prediction) -> bytes:
    """The file's bytes. Raises `FormatError` as `check` does."""
    check(prediction)
    return strict_json.dump(
        {
            "format": FORMAT,
            "platform": prediction.platform,
            "inputs": [{"name": item.name, "sha256": item.sha256.hex()} for item in prediction.inputs],
            "shapes": shapes_json(prediction.shapes),
            "rtmr1": prediction.rtmr1.hex(),
            "rtmr2": prediction.rtmr2.hex(),
            "events": events_json(prediction.events),
        }
    )


def parse_json(data: bytes) -> Prediction:
    """The inverse of `to_json`; white space between members may differ.

    Raises `FormatError`: `prediction.*`, or `manifest.*` for a shape or an event.
    """
    value = strict_json.load(data, "prediction", max_bytes=MAX_MANIFEST_BYTES)
    if not isinstance(value, dict) or value.keys() != _MEMBERS or value["format"] != FORMAT:
        raise FormatError(f"prediction: expected {FORMAT} with {sorted(_MEMBERS)}", code="prediction.members")
    if value["platform"] not in PLATFORMS:
        raise FormatError(f"prediction.platform: expected {' or '.join(PLATFORMS)}", code="prediction.members")
    prediction = Prediction(
        platform=value["platform"],
        inputs=_inputs(value["inputs"]),
        shapes=parse_shapes(value["shapes"]),
        rtmr1=_digest(value["rtmr1"], 48),
        rtmr2=_digest(value["rtmr2"], 48),
        events=parse_events(value["events"]),
    )
    check(prediction)
    return prediction


def _inputs(value: Any) -> tuple[Subject, ...]:
    if not isinstance(value, list) or len(value) > _MAX_INPUTS:
        raise FormatError(f"prediction.inputs: expected a list of at most {_MAX_INPUTS}", code="prediction.members")
    found = []
    for item in value:
        name = item.get("name") if isinstance(item, dict) and item.keys() == {"name", "sha256"} else None
        if not isinstance(name, str) or not (0 < len(name) <= _MAX_NAME and name.isprintable()):
            raise FormatError("prediction.inputs: expected a name and a sha256 each", code="prediction.members")
        found.append(Subject(name=name, sha256=_digest(item["sha256"], 32)))
    return tuple(found)


def _digest(value: object, size: int) -> bytes:
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if len(data) != size or data.hex() != value:
        raise FormatError(f"prediction: expected {2 * size} lower-case hex digits", code="prediction.digest")
    return data
