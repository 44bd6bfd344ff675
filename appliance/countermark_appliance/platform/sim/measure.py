"""What the simulated machine measures, and the manifest that says so beforehand.

`image_id` is a digest over the files of our own installed packages, so other code is another image. `boot_events`
turns it into the events of a simulated boot; `publish` calls it to predict, `machine.boot` to measure, each with the
image id of its own moment. The manifest therefore exists before any boot, and code changed in between does not match
it.

Every event's data starts with SIMULATED; digests are SHA-384 of the data. MRTD is the SHA-384 of a fixed text. Not
measured here, unlike on real machines: kernel, drivers, the Python runtime and the libraries.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, mldsa

from countermark.errors import ConfigError
from countermark.formats import eventlog
from countermark.formats.eventlog import Event
from countermark.formats.evidence import PlatformName
from countermark.formats.manifest import (
    Envelope,
    ImageKind,
    Manifest,
    ManifestSignature,
    PredictedEvent,
    Shape,
    Subject,
    encode_envelope,
    encode_manifest,
    pae,
)
from countermark_appliance.platform.keyring import cose_public_key, sign_es256

PACKAGES = ("countermark", "countermark_appliance", "countermark_kernels")
MRTD = hashlib.sha384(b"SIMULATED TD firmware, version 1").digest()
MRSEAM = hashlib.sha384(b"SIMULATED TDX module, version 1.5").digest()
TD_ATTRIBUTES = bytes.fromhex("0000001000000000")  # SEPT_VE_DISABLE alone
XFAM = bytes.fromhex("e702060000000000")  # as genuine Linux TDs have it
SHAPE = "simulated"
VALIDITY_S = 30 * 86_400
_CONTEXT = b"countermark/sim-image/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class BootEvent:
    """One simulated event: its register (1 to 4: RTMR0 to RTMR3), type, data and what produces it."""

    register: int
    event_type: int
    data: bytes
    source: str  # image, firmware or launch
    note: str


def code_roots() -> tuple[Path, ...]:
    """The folders of our installed packages. Raises `ConfigError` `platform.code` when one is not installed."""
    roots = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"platform: expected the package {package} to be installed", code="platform.code")
        roots.append(Path(spec.submodule_search_locations[0]))
    return tuple(roots)


def image_id(roots: Sequence[Path] | None = None) -> bytes:
    """SHA-256 over name and content of every file below the roots (default: our packages), bytecode caches aside.

    Raises `ConfigError` `platform.code` when a file cannot be read.
    """
    state = hashlib.sha256(_CONTEXT)
    try:
        for root in code_roots() if roots is None else roots:
            found = (path for path in root.rglob("*") if _measured(root, path))
            for name, path in sorted((path.relative_to(root).as_posix(), path) for path in found):
                label = f"{root.name}/{name}".encode()
                state.update(len(label).to_bytes(4, "big") + label + hashlib.sha256(path.read_bytes()).digest())
    except OSError as err:
        raise ConfigError(f"platform: {err.filename}: {err.strerror}", code="platform.code") from err
    return state.digest()


def boot_events(image: bytes) -> tuple[BootEvent, ...]:
    """The events a simulated machine logs from power-on to our init, for this image id."""
    firmware, action = eventlog.EV_EFI_PLATFORM_FIRMWARE_BLOB2, eventlog.EV_EFI_ACTION
    variable, separator = eventlog.EV_EFI_VARIABLE_DRIVER_CONFIG, eventlog.EV_SEPARATOR
    application, tag = eventlog.EV_EFI_BOOT_SERVICES_APPLICATION, eventlog.EV_EVENT_TAG

    def made(register: int, event_type: int, text: str, source: str, extra: bytes = b"") -> BootEvent:
        data = f"SIMULATED {text}".encode() + extra
        return BootEvent(register=register, event_type=event_type, data=data, source=source, note=f"SIMULATED {text}")

    return (
        made(1, firmware, "firmware volume", "firmware"),
        made(1, variable, "SecureBoot variable: absent", "firmware"),
        made(1, firmware, "launch shape: no devices", "launch"),
        made(1, separator, "separator", "firmware"),
        made(2, application, "boot application", "image"),
        made(2, action, "Exit Boot Services Invocation", "firmware"),
        made(2, action, "Exit Boot Services Returned with Success", "firmware"),
        made(3, tag, "command line", "image"),
        made(3, tag, "image id ", "image", image),
    )


def as_log_events(events: Sequence[BootEvent]) -> tuple[Event, ...]:
    """The same events as they stand in a CCEL log."""
    return tuple(
        Event(register=e.register, event_type=e.event_type, digest=hashlib.sha384(e.data).digest(), data=e.data)
        for e in events
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Signers:
    """The two keys that sign manifests."""

    es256: ec.EllipticCurvePrivateKey
    ml_dsa_65: mldsa.MLDSA65PrivateKey


def publish(
    signers: Signers,
    *,
    now: int,
    version: int = 1,
    kind: ImageKind = ImageKind.SIMULATED,
    roots: Sequence[Path] | None = None,
    revoked_images: Sequence[bytes] = (),
) -> bytes:
    """The signed manifest (a DSSE envelope) for the code as it is now, valid from an hour before `now` for 30 days."""
    image = image_id(roots)
    events = as_log_events(predicted := boot_events(image))
    rtmr0, rtmr1, rtmr2, _ = eventlog.replay(events)
    manifest = Manifest(
        subjects=(Subject(name="SIMULATED image", sha256=image),),
        kind=kind,
        platform=PlatformName.SIM.value,
        version=version,
        not_before=now - 3600,
        not_after=now + VALIDITY_S,
        image_id=image,
        shapes=(Shape(name=SHAPE, mrtd=MRTD, rtmr0=rtmr0),),
        rtmr1=rtmr1,
        rtmr2=rtmr2,
        td_attributes=TD_ATTRIBUTES,
        xfam=XFAM,
        mrseam=(MRSEAM,),
        mrconfigid=bytes(48),
        mrowner=bytes(48),
        mrownerconfig=bytes(48),
        events=tuple(
            PredictedEvent(
                register=event.register,
                event_type=event.event_type,
                digest=event.digest,
                source=made.source,
                shape=SHAPE if made.source == "launch" else "",
                note=made.note,
            )
            for event, made in zip(events, predicted, strict=True)
        ),
        revoked_images=tuple(revoked_images),
    )
    return sign_manifest(signers, encode_manifest(manifest))


def sign_manifest(signers: Signers, payload: bytes) -> bytes:
    """The DSSE envelope over an encoded manifest."""
    message = pae(payload)
    classic = ManifestSignature(
        key=cose_public_key(signers.es256.public_key()), signature=sign_es256(signers.es256, message)
    )
    post_quantum = ManifestSignature(
        key=cose_public_key(signers.ml_dsa_65.public_key()), signature=signers.ml_dsa_65.sign(message)
    )
    return encode_envelope(Envelope(payload=payload, signatures=(classic, post_quantum)))


def _measured(root: Path, path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.relative_to(root).parts and path.suffix != ".pyc"
