"""The published directory: every manifest, its proof, and the measurement log they stand in.

    checkpoint, tile/...          the log (C2SP tlog-tiles); leaves are `formats.measured`
    vkeys, signers                who signs the log, and who signs manifests
    manifests/N.json              the signed manifest of version N
    manifests/N.tlog-proof        that it stands in the log (C2SP tlog-proof)

All of it is public and may be served as it is. Nothing but these files is kept, so they are synced: the manifest first,
then tiles, then the head, then the proof; what was interrupted is completed by publishing the same manifest again.
Before anything is appended the log is verified under the publisher's own keys, and the rule of growth decides.

Not checked here: what a manifest predicts.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from countermark import cosigned
from countermark.errors import LogError, MeasurementError, UsageError
from countermark.files import read_file, write_file
from countermark.formats.manifest import MAX_MANIFEST_BYTES, Manifest
from countermark.formats.measured import MeasuredLeaf, Releases, encode_measured, leaf_of, parse_measured
from countermark.logcheck import Rules, verify_log
from countermark.logsource import Source, directory
from countermark.policy import verify_manifest, verify_signatures
from countermark.tlog import tiles
from countermark.tlog.checkpoint import Checkpoint, LogKeys
from countermark.tlog.merkle import EMPTY_ROOT, Tree, leaf_hash
from countermark.tlog.proof import LogProof, encode_proof
from countermark_measurements.keys import PublisherKeys, write_public

FOLDER: Final = "manifests"
_PUBLIC: Final = 0o644


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where a manifest stands now. `appended`: false where it stood there before."""

    index: int
    size: int
    manifest: Path
    proof: Path
    appended: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The leaves of a verified measurement log."""

    checkpoint: Checkpoint
    leaves: tuple[MeasuredLeaf, ...]

    @property
    def version(self) -> int:
        """The highest version published; 0 for none."""
        return self.leaves[-1].version if self.leaves else 0

    @property
    def revoked(self) -> tuple[bytes, ...]:
        """Every image that was ever revoked, in that order."""
        return tuple(dict.fromkeys(item for leaf in self.leaves for item in leaf.revoked))

    def of(self, image_id: bytes) -> MeasuredLeaf | None:
        """The latest leaf of an image."""
        return next((leaf for leaf in reversed(self.leaves) if leaf.image_id == image_id), None)


def manifest_path(version: int) -> str:
    """Path of a manifest below the log."""
    return f"{FOLDER}/{version}.json"


def proof_path(version: int) -> str:
    """Path of its proof."""
    return f"{FOLDER}/{version}.tlog-proof"


def history(source: Source, origin: str, keys: LogKeys) -> History:
    """Verify a measurement log and return its leaves. Raises as `logcheck.verify_log`."""
    checked = verify_log(source, origin, keys, rules=Rules.MEASUREMENTS)
    leaves: list[MeasuredLeaf] = []
    for start in range(0, checked.checkpoint.size, tiles.WIDTH):
        count = min(tiles.WIDTH, checked.checkpoint.size - start)
        leaves += map(parse_measured, source.entries(start // tiles.WIDTH, count))
    return History(checkpoint=checked.checkpoint, leaves=tuple(leaves))


def published(path: Path, keys: PublisherKeys) -> History:
    """What was published to a directory; nothing, where nothing is there. Raises as `history`, `UsageError`."""
    if not (path / "checkpoint").exists():
        return History(checkpoint=Checkpoint(origin=keys.log.name, size=0, root=EMPTY_ROOT), leaves=())
    return history(directory(path), keys.log.name, keys.log.log_keys)


def append(path: Path, envelope: bytes, keys: PublisherKeys, *, now: int, key_dir: Path | None = None) -> Published:
    """Publish a signed manifest: into the log, and beside it with its proof. Again is no error.

    `now`: the time the manifest must be valid at. Raises `UsageError` (`usage.file`; `usage.key_place`: `key_dir` lies
    in what is published), `MeasurementError` (`manifest.*`: not signed by these keys, expired), `LogError`:
    `log.version`, `log.revoked`, or as `logcheck.verify_log`.
    """
    if key_dir is not None and path.resolve() in (key_dir.resolve(), *key_dir.resolve().parents):
        message = f"--keys: expected a directory outside {path}, because all of that is published"
        raise UsageError(message, code="usage.key_place")
    manifest = verify_manifest(envelope, signers=keys.signers, now=now)
    leaf = leaf_of(envelope, manifest)
    try:
        (path / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}", code="usage.file") from err
    with cosigned.locked(path):
        before = published(path, keys)
        index = next((at for at, known in enumerate(before.leaves) if known == leaf), None)
        leaves = before.leaves if index is not None else (*before.leaves, leaf)
        _grow(leaves)
        write_public(keys, path)
        file = path / manifest_path(manifest.version)
        write_file(file, envelope, mode=_PUBLIC)
        tree = Tree(leaf_hash(encode_measured(item)) for item in leaves)
        if index is None:
            index = len(before.leaves)
            _write_log(path, keys, leaves, tree, since=index)
        note = read_file(path / "checkpoint")
        hashes = directory(path).inclusion(index, Checkpoint(origin=keys.log.name, size=tree.size, root=tree.root()))
        proof = path / proof_path(manifest.version)
        write_file(proof, encode_proof(LogProof(index=index, hashes=hashes, checkpoint=note)), mode=_PUBLIC)
    return Published(index=index, size=tree.size, manifest=file, proof=proof, appended=len(leaves) > len(before.leaves))


def _grow(leaves: Sequence[MeasuredLeaf]) -> None:
    """Raises `LogError` with what to do, before anything is written."""
    rule = Releases()
    for leaf in leaves:
        try:
            rule.add(leaf)
        except LogError as err:
            todo = {
                "log.version": f"publish this image as version {rule.version + 1} or later",
                "log.revoked": "build and publish another image",
            }[err.code]
            raise LogError(f"{err}; {todo}", code=err.code) from err


def _write_log(path: Path, keys: PublisherKeys, leaves: Sequence[MeasuredLeaf], tree: Tree, *, since: int) -> None:
    """Write tiles, then the head that needs them."""
    for tile in tiles.tiles_for(tree.size, since=since):
        _write(path / tiles.tile_path(tile), tiles.encode_tile(tile, tree.node))
        if tile.level == 0:
            first = tile.index * tiles.WIDTH
            entries = tiles.encode_entries([encode_measured(item) for item in leaves[first : first + tile.width]])
            _write(path / tiles.entries_path(tile.index, tile.width), entries)
        if tile.width == tiles.WIDTH:
            for name in (tiles.tile_path(tile), tiles.entries_path(tile.index, tile.width)):
                shutil.rmtree(path / f"{name}.p", ignore_errors=True)
    if (path / "checkpoint").exists():
        cosigned.retire(path, read_file(path / "checkpoint"))
    head = Checkpoint(origin=keys.log.name, size=tree.size, root=tree.root())
    write_file(path / "checkpoint", keys.log.sign_checkpoint(head, int(time.time())), mode=_PUBLIC)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data, mode=_PUBLIC)


def audit(path: Path, origin: str, keys: LogKeys, signers: Sequence[bytes]) -> dict[str, Any]:
    """Verify a published directory as a stranger would: the log, and every manifest that it names. JSON-ready.

    1 the log, from its first leaf to its signed head, with the rule of growth · 2 the file of each leaf is there and
    has the digest · 3 both signatures are those of `signers` · 4 the leaf says what the manifest says. A manifest need
    not be valid today: an audit looks at all of history. Raises as `history`; `LogError` (`log.missing`, `log.leaf`);
    `MeasurementError`, `FormatError` (`manifest.*`).
    """
    known = history(directory(path), origin, keys)
    for leaf in known.leaves:
        verify_released(path, leaf, signers)
    return {
        "verification": "accept",
        "origin": origin,
        "size": known.checkpoint.size,
        "root": known.checkpoint.root.hex(),
        "manifests": [
            {
                "version": leaf.version,
                "kind": leaf.kind.value,
                "platform": leaf.platform,
                "image_id": leaf.image_id.hex(),
                "revoked": leaf.image_id in known.revoked,
            }
            for leaf in known.leaves
        ],
    }


def verify_released(path: Path, leaf: MeasuredLeaf, signers: Sequence[bytes]) -> Manifest:
    """The manifest that a leaf stands for. Raises as `audit`."""
    name = manifest_path(leaf.version)
    if not (path / name).is_file():
        raise LogError(f"{name}: expected the manifest that the log names, found none", code="log.missing")
    envelope = read_file(path / name, max_bytes=MAX_MANIFEST_BYTES)
    found = hashlib.sha256(envelope).digest()
    if found != leaf.envelope:
        raise LogError(f"{name}: expected SHA-256 {leaf.envelope.hex()}, got {found.hex()}", code="log.leaf")
    try:
        manifest = verify_signatures(envelope, signers=signers)
    except MeasurementError as err:
        raise MeasurementError(f"{name}: {err}", code=err.code) from err
    if leaf_of(envelope, manifest) != leaf:
        raise LogError(f"{name}: expected what its leaf says", code="log.leaf")
    return manifest
