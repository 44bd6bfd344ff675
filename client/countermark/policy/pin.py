"""New policies, and reference values into them: a measurement manifest is verified before its image is accepted.

DSSE v1 (secure-systems-lab/dsse protocol 1.0.2) over an in-toto Statement v1, signed by ES256 and ML-DSA-65 (see
`formats.manifest`). Both signatures must verify under keys whose digests the caller names. Versions only grow. Where
the policy names a measurement log, the manifest must come with the proof that it stands there (C2SP tlog-proof).
Not checked here: whether others see the same log (its cosignatures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from countermark import keys
from countermark.checks import rfc3339
from countermark.errors import FormatError, MeasurementError, PolicyError
from countermark.formats import manifest as manifests
from countermark.formats.manifest import Manifest
from countermark.formats.measured import encode_measured, leaf_of
from countermark.logkeys import verify_signature
from countermark.policy.floors import tcb_evaluation_floor
from countermark.policy.modules import KNOWN_MRSEAM
from countermark.policy.value import (
    DAY_S,
    INTEL_SGX_ROOT,
    NVIDIA_DEVICE_ROOT,
    NVIDIA_RIM_ROOT,
    SIMULATED_MRSEAM,
    Policy,
    Profile,
)
from countermark.tlog.cosignature import VerifierKey, log_keys
from countermark.tlog.proof import parse_proof, verify_proof


def new_policy(
    profile: Profile,
    *,
    now: int,
    simulated_tdx_root: bytes | None = None,
    simulated_gpu_root: bytes | None = None,
    simulated_rim_root: bytes | None = None,
) -> Policy:
    """The default policy of a profile, valid 30 days from `now`: strict, but not tied to named machines or
    configurations.

    It accepts no image and no weights yet: `pin` a manifest, and name the weights roots. Raises `PolicyError`
    `policy.root` when a production policy is given a simulated root (the SHA-256 of its certificate).
    """
    return Policy(
        profile=profile,
        created=now,
        not_after=now + 30 * DAY_S,
        tdx_root=simulated_tdx_root or INTEL_SGX_ROOT,
        gpu_root=simulated_gpu_root or NVIDIA_DEVICE_ROOT,
        rim_root=simulated_rim_root or NVIDIA_RIM_ROOT,
        min_tcb_evaluation_data_number=tcb_evaluation_floor(now),
        mrseam=(SIMULATED_MRSEAM,) if simulated_tdx_root else KNOWN_MRSEAM,
        any_hardware=True,
        any_config=True,
    )


def pin(
    policy: Policy,
    envelope: bytes,
    *,
    now: int,
    signers: Sequence[bytes] = (),
    weights_roots: Sequence[bytes] = (),
    log: Sequence[VerifierKey] = (),
    proof: bytes | None = None,
) -> Policy:
    """Verify a signed measurement manifest and return the policy that also accepts its image.

    `signers`: SHA-256 of the COSE_Keys of both signers; needed the first time, afterwards the policy's own count and
    may not change. `weights_roots` are added to those accepted. `log`: both verifier keys of the measurement log,
    likewise kept once named; `proof`: the manifest's place in it, needed from then on. The image's revocations are
    applied to earlier pins. Nothing else changes: a publisher of images says which TDX modules they were tried with,
    but not which are trusted.

    Raises `FormatError` (`manifest.*`, `tlog.*`), `PolicyError` (`policy.image`, `policy.value`), `LogError` (`log.*`:
    the proof does not hold), or `MeasurementError`: `manifest.signer` (a stranger's key), `manifest.signature`,
    `manifest.not_yet_valid`, `manifest.expired`, `manifest.log` (another log than the policy's), `manifest.unlogged`
    (no proof), `manifest.rolled_back`, `manifest.equivocation` (same version, other content), `manifest.revoked`.
    """
    accepted = tuple(signers) or policy.manifest_signers
    if policy.manifest_signers and set(accepted) != set(policy.manifest_signers):
        message = (
            "manifest signers: expected those already in the policy (a publisher with new keys is another publisher:"
            " make a new policy if you trust it)"
        )
        raise MeasurementError(message, code="manifest.signer")
    image = verify_manifest(envelope, signers=accepted, now=now)
    logged = _verify_logged(policy, envelope, image, log=tuple(log), proof=proof)
    if image.version < policy.manifest_version:
        message = (
            f"manifest version: expected at least {policy.manifest_version}, which is pinned already,"
            f" got {image.version} (an older release: ask the publisher for the current manifest)"
        )
        raise MeasurementError(message, code="manifest.rolled_back")
    same_version = [known for known in policy.images if known.version == image.version and known != image]
    if same_version and image.version == policy.manifest_version:
        message = (
            f"manifest version {image.version}: expected the content already pinned, got other content (keep both"
            " files: they prove that the publisher says two things)"
        )
        raise MeasurementError(message, code="manifest.equivocation")
    revoked = tuple(dict.fromkeys((*policy.revoked_images, *image.revoked_images)))
    if image.image_id in revoked:
        message = f"image {image.image_id.hex()}: revoked by its publisher (ask for the manifest of the image after it)"
        raise MeasurementError(message, code="manifest.revoked")
    # A newer manifest of an image takes the older one's place: it may only give it more time, or other launch shapes.
    same = (image.image_id, image.platform)
    kept = (
        known for known in policy.images if known.image_id not in revoked and (known.image_id, known.platform) != same
    )
    return replace(
        policy,
        manifest_signers=accepted,
        manifest_version=image.version,
        manifest_log=logged,
        images=(*kept, image),
        revoked_images=revoked,
        weights_roots=tuple(dict.fromkeys((*policy.weights_roots, *weights_roots))),
    )


def _verify_logged(
    policy: Policy, envelope: bytes, image: Manifest, *, log: tuple[VerifierKey, ...], proof: bytes | None
) -> tuple[VerifierKey, ...] | None:
    """The keys of the measurement log that the manifest stands in; None where no log is asked for."""
    known = policy.manifest_log
    if known and log and set(log) != set(known):
        raise MeasurementError("measurement log: expected the keys already in the policy", code="manifest.log")
    wanted = log or known
    if not wanted:
        if proof is not None:
            message = "measurement log: expected both of its verifier keys beside a proof, got none"
            raise MeasurementError(message, code="manifest.log")
        return None
    try:
        origin, keys = log_keys(wanted)
    except FormatError as err:
        raise PolicyError(f"manifest.log: {err}", code="policy.value") from err
    if proof is None:
        message = (
            f"--proof: expected that the manifest stands in {origin}, got none: it is published beside the manifest"
        )
        raise MeasurementError(message, code="manifest.unlogged")
    leaf = encode_measured(leaf_of(envelope, image))
    verify_proof(parse_proof(proof), leaf, origin, keys, verify_signature)
    return wanted


def verify_signatures(envelope: bytes, *, signers: Sequence[bytes]) -> Manifest:
    """Verify both DSSE signatures under keys whose COSE_Key digests are in `signers`. Accepts no image for that alone.

    Raises `FormatError` (`manifest.*`) or `MeasurementError`: `manifest.signer`, `manifest.signature`.
    """
    parsed = manifests.parse_envelope(envelope)
    message = manifests.pae(parsed.payload)
    for item in parsed.signatures:
        if manifests.signer_digest(item.key) not in signers:
            known = " or ".join(digest.hex() for digest in signers) or "a signer (none is named)"
            text = f"manifest signer: expected {known}, got {item.keyid}"
            raise MeasurementError(text, code="manifest.signer")
        if not keys.load(item.key).verify(item.signature, message):
            text = f"manifest: the {item.key.algorithm.name} signature of {item.keyid} does not verify"
            raise MeasurementError(text, code="manifest.signature")
    return manifests.parse_manifest(parsed.payload)


def verify_manifest(envelope: bytes, *, signers: Sequence[bytes], now: int) -> Manifest:
    """Verify both signatures as `verify_signatures` does, and the validity at `now`.

    Raises `FormatError` (`manifest.*`) or `MeasurementError` as `pin` does.
    """
    image = verify_signatures(envelope, signers=signers)
    if now < image.not_before:
        text = f"manifest: valid from {rfc3339(image.not_before)}, time is {rfc3339(now)}"
        raise MeasurementError(text, code="manifest.not_yet_valid")
    if now > image.not_after:
        text = (
            f"manifest: valid until {rfc3339(image.not_after)}, time is {rfc3339(now)} (ask the publisher for the"
            " current one)"
        )
        raise MeasurementError(text, code="manifest.expired")
    return image
