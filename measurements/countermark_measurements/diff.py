"""What changed from one manifest to the next, in words.

Events are aligned by digest within each register (`difflib`), so that one inserted event does not make all that follow
it look changed. Lines are facts about the two files; which of them one should care about is said at the end.

Not checked here: either manifest's signatures (the command does).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Final

from countermark.checks import rfc3339
from countermark.formats.eventlog import event_type_name
from countermark.formats.manifest import Manifest, PredictedEvent, Shape
from countermark_measurements.explain import LAUNCH, origin
from countermark_measurements.manifest import WEIGHTS

_NAMES: Final = {1: "rtmr0", 2: "rtmr1", 3: "rtmr2", 4: "rtmr3"}


def diff(old: Manifest, new: Manifest) -> list[str]:
    """The differences, a line each; none, if the two say the same."""
    made = [*_head(old, new), *_subjects(old, new), *_shapes(old, new)]
    for name in ("rtmr1", "rtmr2"):
        if getattr(old, name) != getattr(new, name):
            made.append(f"{name}: {getattr(old, name).hex()} -> {getattr(new, name).hex()}")
    made += _events(old, new)
    for name in LAUNCH:
        if getattr(old, name) != getattr(new, name):
            made.append(f"{name}: {getattr(old, name).hex()} -> {getattr(new, name).hex()}")
    made += _sets("TDX module it was tried with", old.mrseam, new.mrseam)
    made += _sets("revoked image", old.revoked_images, new.revoked_images)
    return [*made, *_advice(old, new)] if made else []


def _head(old: Manifest, new: Manifest) -> list[str]:
    made = []
    if old.version != new.version:
        made.append(f"version: {old.version} -> {new.version}")
    for name in ("kind", "platform"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            made.append(f"{name}: {getattr(before, 'value', before)} -> {getattr(after, 'value', after)}")
    if (old.not_before, old.not_after) != (new.not_before, new.not_after):
        spans = (f"{rfc3339(item.not_before)} to {rfc3339(item.not_after)}" for item in (old, new))
        made.append(f"valid: {' -> '.join(spans)}")
    if old.image_id != new.image_id:
        made.append(f"image: {old.image_id.hex()} -> {new.image_id.hex()} (another root filesystem)")
    return made


def _subjects(old: Manifest, new: Manifest) -> list[str]:
    before, after = ({item.name: item.sha256 for item in image.subjects} for image in (old, new))
    made = []
    for name in dict.fromkeys((*before, *after)):
        what = f"weights {name.removeprefix(WEIGHTS)}" if name.startswith(WEIGHTS) else name
        if name not in after:
            made.append(f"{what}: no longer named, was {before[name].hex()}")
        elif name not in before:
            made.append(f"{what}: new, {after[name].hex()}")
        elif before[name] != after[name]:
            made.append(f"{what}: {before[name].hex()} -> {after[name].hex()}")
    return made


def _shapes(old: Manifest, new: Manifest) -> list[str]:
    before, after = ({item.name: item for item in image.shapes} for image in (old, new))
    made = [f"launch shape {name}: no longer accepted" for name in before if name not in after]
    made += [f"launch shape {name}: new" for name in after if name not in before]
    for name in (name for name in before if name in after):
        for register in ("mrtd", "rtmr0"):
            values = [getattr(shapes[name], register).hex() for shapes in (before, after)]
            if values[0] != values[1]:
                made.append(f"launch shape {name}: {register} {values[0]} -> {values[1]}")
    return made


def _events(old: Manifest, new: Manifest) -> list[str]:
    """Events of all shapes once, then what is particular to each shape that both have."""
    made: list[str] = []
    for register, name in _NAMES.items():
        wanted = [[e for e in image.events if e.register == register and not e.shape] for image in (old, new)]
        made += _aligned(name, *wanted)
    shared = {item.name for item in old.shapes} & {item.name for item in new.shapes}
    for shape in (item for item in new.shapes if item.name in shared):
        made += _aligned(f"rtmr0 of {shape.name}", *(_of(image, shape) for image in (old, new)))
    return made


def _of(image: Manifest, shape: Shape) -> list[PredictedEvent]:
    return [event for event in image.events if event.shape == shape.name]


def _aligned(where: str, before: Sequence[PredictedEvent], after: Sequence[PredictedEvent]) -> list[str]:
    made: list[str] = []
    matcher = SequenceMatcher(None, [e.digest for e in before], [e.digest for e in after], autojunk=False)
    for tag, low, high, start, end in matcher.get_opcodes():
        if tag == "equal":
            continue
        if tag == "replace" and high - low == end - start:
            pairs = zip(before[low:high], after[start:end], strict=True)
            made += [f"{where}: {_what(now)} changed{_renamed(then, now)}" for then, now in pairs]
            continue
        made += [f"{where}: {_what(event)} is no longer measured" for event in before[low:high]]
        made += [f"{where}: {_what(event)} is measured now" for event in after[start:end]]
    return made


def _what(event: PredictedEvent) -> str:
    kind = event_type_name(event.event_type)
    return f"{event.note or kind} ({kind}, from {origin(event)})"


def _renamed(before: PredictedEvent, after: PredictedEvent) -> str:
    return "" if before.note == after.note else f", was {before.note or event_type_name(before.event_type)}"


def _sets(what: str, before: Iterable[bytes], after: Iterable[bytes]) -> list[str]:
    old, new = dict.fromkeys(before), dict.fromkeys(after)
    made = [f"{what}: {item.hex()} added" for item in new if item not in old]
    return made + [f"{what}: {item.hex()} no longer listed" for item in old if item not in new]


def _advice(old: Manifest, new: Manifest) -> list[str]:
    """What to do about it."""
    made = []
    if new.version < old.version:
        made.append("The second file is the older release: clients that have pinned the first refuse it.")
    elif new.version == old.version:
        made.append("Both have one version: clients take this for equivocation. Publish the second with a new version.")
    if old.image_id != new.image_id and old.image_id not in new.revoked_images:
        made.append(f"The first image stays accepted, for it is not revoked (--revoke {old.image_id.hex()}).")
    if old.image_id in new.revoked_images:
        made.append("The first image is revoked: clients that pin the second file refuse nodes that still run it.")
    gone = [item for item in old.revoked_images if item not in new.revoked_images]
    if gone:
        made.append("A revocation was dropped: clients that pin only the second file would accept that image again.")
    if old.version < new.version:
        made.append("Clients accept the second image once they have run `countermark policy pin` with its manifest.")
    return made
