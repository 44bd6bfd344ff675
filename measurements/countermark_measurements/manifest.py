"""From a prediction and an image's description to a signed measurement manifest.

The image's description is `image.json`, which the image build writes. Read of it: "kind", "variant", "image_id",
"subjects" (the artefacts) and, as what they were built from, "lock_sha256" and "files_sha256". Sizes and times are left
out: who builds the image again gets the same subjects. The prediction must be of this very disk. What a manifest is,
and that it does not contradict itself, is `formats.manifest`.

Not checked here: that the registers are right; the boot test compares them with a machine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from countermark.errors import FormatError, UsageError
from countermark.formats import strict_json
from countermark.formats.manifest import ImageKind, Manifest, Subject, check_manifest
from countermark.policy import DAY_S, SIMULATED_MRSEAM
from countermark_measurements.prediction import Prediction

DISK: Final = "disk.raw"
WEIGHTS: Final = "weights/"  # subjects with this prefix are dm-verity roots
MAX_DESCRIPTION_BYTES: Final = 1024 * 1024
MAX_VALID_DAYS: Final = 1830
# Clocks differ; a manifest published now is to be pinned now.
SLACK_S: Final = 300
TD_ATTRIBUTES: Final = bytes.fromhex("0000001000000000")  # SEPT_VE_DISABLE alone, the one value clients accept
XFAM: Final = bytes.fromhex("e702060000000000")  # x87 to AVX-512, PKRU, AMX: Linux on Sapphire and Emerald Rapids
_PLATFORMS: Final = {"production": "tdx", "test": "vtpm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageDescription:
    """What we read of `image.json`. `sources`: the locks and the list of files it was built from."""

    kind: ImageKind
    variant: str
    image_id: bytes  # 32: the root filesystem's dm-verity root
    subjects: tuple[Subject, ...]
    sources: tuple[Subject, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What every TD of the image is launched with, besides its shape."""

    td_attributes: bytes = TD_ATTRIBUTES
    xfam: bytes = XFAM
    mrseam: tuple[bytes, ...] = ()  # TDX modules it was tried with
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)


def parse_image(data: bytes) -> ImageDescription:
    """Parse `image.json`; members we do not need may be anything. Raises `FormatError` (`image.*`)."""
    value = strict_json.load(data, "image", max_bytes=MAX_DESCRIPTION_BYTES)
    if not isinstance(value, dict):
        raise FormatError("image: expected an object", code="image.members")
    subjects = value.get("subjects")
    if not isinstance(subjects, dict) or DISK not in subjects:
        raise FormatError(f"image.subjects: expected an object with {DISK}", code="image.members")
    sources = value.get("lock_sha256", {})
    if not isinstance(sources, dict):
        raise FormatError("image.lock_sha256: expected an object", code="image.members")
    if "files_sha256" in value:
        sources = {**sources, "files.txt": value["files_sha256"]}
    kinds = {kind.value: kind for kind in (ImageKind.PRODUCTION, ImageKind.TEST, ImageKind.DEVELOPMENT)}
    if (
        not isinstance(value.get("kind"), str)
        or value["kind"] not in kinds
        or not isinstance(value.get("variant"), str)
    ):
        raise FormatError(f"image.kind: expected {', '.join(kinds)} and a variant", code="image.members")
    return ImageDescription(
        kind=kinds[value["kind"]],
        variant=value["variant"],
        image_id=_digest(value.get("image_id"), "image_id"),
        subjects=_subjects(subjects),
        sources=_subjects(sources),
    )


def build(
    prediction: Prediction,
    image: ImageDescription,
    *,
    version: int,
    now: int,
    valid_days: int,
    revoked: Sequence[bytes] = (),
    weights: Sequence[Subject] = (),
    launch: Launch | None = None,
) -> Manifest:
    """The manifest of an image, valid from shortly before `now` (unix seconds).

    `revoked`: image ids this publisher withdraws, all that ever were. `weights`: names and dm-verity roots it is
    published with. Raises `UsageError` (`usage.manifest`): the prediction is of another disk, or of a platform that
    this kind of image is not for; `FormatError` (`manifest.*`).
    """
    described = {item.name: item.sha256 for item in image.subjects}[DISK]
    if described not in (item.sha256 for item in prediction.inputs):  # by content: a copy may have another name
        got = ", ".join(f"{item.name} {item.sha256.hex()}" for item in prediction.inputs) or "nothing"
        message = f"prediction: expected one from the image's {DISK} {described.hex()}, got {got}: predict again"
        raise UsageError(message, code="usage.manifest")
    wanted = _PLATFORMS.get(image.kind.value, prediction.platform)
    if prediction.platform != wanted:
        message = (
            f"--platform: expected {wanted} for a {image.kind.value} image, got {prediction.platform}: predict again"
        )
        raise UsageError(message, code="usage.manifest")
    if image.image_id in revoked:
        message = f"image {image.image_id.hex()}: expected one that no manifest revokes: build another"
        raise UsageError(message, code="usage.manifest")
    if not 1 <= valid_days <= MAX_VALID_DAYS or version < 1:
        message = f"expected a version from 1 and 1 to {MAX_VALID_DAYS} days, got version {version}, {valid_days} days"
        raise UsageError(message, code="usage.manifest")
    if launch is None:
        launch = Launch() if prediction.platform == "tdx" else Launch(mrseam=(SIMULATED_MRSEAM,))
    inputs = [item for item in prediction.inputs if item.sha256 not in {known.sha256 for known in image.subjects}]
    manifest = Manifest(
        subjects=(
            *image.subjects,
            *inputs,
            *image.sources,
            *(Subject(name=f"{WEIGHTS}{item.name}", sha256=item.sha256) for item in weights),
        ),
        kind=image.kind,
        platform=prediction.platform,
        version=version,
        not_before=now - SLACK_S,
        not_after=now + valid_days * DAY_S,
        image_id=image.image_id,
        shapes=prediction.shapes,
        rtmr1=prediction.rtmr1,
        rtmr2=prediction.rtmr2,
        td_attributes=launch.td_attributes,
        xfam=launch.xfam,
        mrseam=launch.mrseam,
        mrconfigid=launch.mrconfigid,
        mrowner=launch.mrowner,
        mrownerconfig=launch.mrownerconfig,
        events=prediction.events,
        revoked_images=tuple(dict.fromkeys(revoked)),
    )
    check_manifest(manifest)
    return manifest


def _subjects(value: dict[str, Any]) -> tuple[Subject, ...]:
    return tuple(Subject(name=name, sha256=_digest(item, name)) for name, item in sorted(value.items()))


def _digest(value: Any, name: str) -> bytes:
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if len(data) != 32 or data.hex() != value:
        raise FormatError(f"image.{name}: expected a SHA-256 in lower-case hex", code="image.digest")
    return data
