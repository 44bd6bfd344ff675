"""Verify and load an artefact: three files of one directory, all of them untrusted; or a block device of dm-verity's.

`weights.img` is a USTAR archive (`pack`), `weights.verity` its dm-verity hash device (`verity`), `weights.json` a
convenience copy of the root and a few facts. A load checks, in this order:

 1 the root to expect: the caller's, else the one `weights.json` claims (then `weights_root` says what was found, and it
   is for the caller to compare it with a policy)
 2 sizes and superblock
 3 every tree block and data block against the root (`verify=False`: the top tree block only, for a device that the
   kernel's dm-verity has opened with that root and checks on every read). Where `weights.img` is a block device
   (`device`) the kernel has the tree: every block is read once, so that a bad one is named before anything is computed
 4 the archive: every byte accounted for, members exactly those that `model.json` implies, in order
 5 MANIFEST: BLAKE3 of every other member, `b3sum` format (`verify=False`: of the text members only)
 6 tensor values: finite, scales not negative, int8 never -128, |cos| and |sin| at most 1 (skipped with `verify=False`)

Tensors are views of a read-only mapping: no copies, and writing to one is a fault. Not checked here: that nobody
replaces the file's content afterwards; that is dm-verity's work.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from blake3 import blake3
from torch import Tensor

from countermark.errors import WeightsError
from countermark_appliance.engine.weights import device, verity
from countermark_appliance.engine.weights.config import ModelConfig, TensorSpec, tensor_specs
from countermark_appliance.engine.weights.modeljson import parse_model
from countermark_appliance.engine.weights.pack import RECORD, Member, padded, read_header, read_members
from countermark_appliance.engine.weights.parallel import single_threaded_torch
from countermark_appliance.engine.weights.strictjson import (
    Json,
    digest,
    encode_object,
    exact_keys,
    integer,
    mapping,
    parse_object,
    text,
)

IMAGE, TREE, SIDECAR = "weights.img", "weights.verity", "weights.json"
MANIFEST = "MANIFEST"
TEXTS = ("chat_template.jinja", "model.json", "tokenizer.json")
MAX_TEXT_BYTES = 64 * 1024 * 1024
_DTYPES = {"f32": torch.float32, "int8": torch.int8}
_SIDECAR_KEYS = ("root", "salt", "data_blocks", "manifest_blake3", "profile", "model", "source")


class DamagedBlock(WeightsError):
    """A data block that does not hash to what the tree says (`weights.block`): which, where, and of which file."""

    def __init__(self, *, block: int, member: str) -> None:
        self.block = block
        self.first_byte = block * verity.BLOCK
        self.member = member
        last = self.first_byte + verity.BLOCK - 1
        super().__init__(
            f"{IMAGE} block {block} (bytes {self.first_byte} to {last}, {member}): "
            "expected its digest in the hash tree, got another",
            code="weights.block",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """A loaded artefact. Digests of members are BLAKE3, as in MANIFEST; `weights_root` is the dm-verity root."""

    config: ModelConfig
    weights_root: bytes
    manifest_digest: bytes
    tokenizer_json: bytes = field(repr=False)
    chat_template: str = field(repr=False)
    tokenizer_digest: bytes
    template_digest: bytes
    tensors: Mapping[str, Tensor] = field(repr=False)

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name (see `tensor_specs`), a read-only view of the mapped image."""
        return self.tensors[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a complete verification found."""

    config: ModelConfig
    weights_root: bytes
    manifest_digest: bytes
    data_blocks: int
    tensors: int


Progress = Callable[[int, int, str], None]


def verify(directory: Path, *, expected_root: bytes | None = None, progress: Progress | None = None) -> Verified:
    """Check everything about an artefact. Raises as `load`."""
    artefact = load(directory, expected_root=expected_root, progress=progress)
    return Verified(
        config=artefact.config,
        weights_root=artefact.weights_root,
        manifest_digest=artefact.manifest_digest,
        data_blocks=len(_open(directory / IMAGE)) // verity.BLOCK,
        tensors=len(artefact.tensors),
    )


def load(
    directory: Path,
    verify: bool = True,
    expected_root: bytes | None = None,
    *,
    progress: Progress | None = None,
) -> Artefact:
    """Load an artefact after the checks above. `progress(done_bytes, total_bytes, label)` while hashing.

    Raises `WeightsError`: `weights.missing`, `weights.truncated`, `weights.superblock`, `weights.root`, `weights.tree`,
    `weights.block` (a `DamagedBlock`), `weights.device`, `weights.image`, `weights.members`, `weights.manifest`,
    `weights.json`, `weights.model_json`, `weights.unsupported_*`, `weights.text`, `weights.values`.
    """
    image, opened = _open(directory / IMAGE), device.opened_root(directory / IMAGE)
    tree = _open(directory / TREE) if opened is None else memoryview(b"")
    # 1, 2
    root = opened if expected_root is None else expected_root
    if root is None:
        root = _sidecar_root(directory / SIDECAR)
    if len(image) % verity.BLOCK or len(image) < 2 * verity.BLOCK:
        raise WeightsError(f"{IMAGE}: expected whole blocks of {verity.BLOCK} bytes", code="weights.truncated")
    found = opened if opened is not None else verity.stored_root(tree, len(image) // verity.BLOCK)
    if found != root:
        raise WeightsError(f"weights root: expected {root.hex()}, got {found.hex()}", code="weights.root")
    # 3
    total = 2 * len(image)
    done = 0

    def advance(count: int, label: str = "checking blocks") -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total, label)

    if verify and opened is None:
        _check_blocks(image, tree, root, advance)
    elif verify:
        _read_blocks(directory / IMAGE, image, advance)
    # 4
    listed = read_members(image)
    members = {member.name: member for member in listed}
    texts = {name: _text(image, members, name) for name in (MANIFEST, *TEXTS)}
    config = parse_model(texts["model.json"])
    specs = tensor_specs(config)
    _check_members(listed, specs)
    # 5
    digests = _parse_manifest(texts[MANIFEST], [*TEXTS, *(spec.member for spec in specs)])
    for name, expected in digests.items():
        if not verify and name not in TEXTS:
            continue
        data = _data(image, members[name])
        if blake3(data, max_threads=blake3.AUTO).digest() != expected:
            raise WeightsError(f"{MANIFEST}: {name} has another digest", code="weights.manifest")
    try:
        template = texts["chat_template.jinja"].decode("utf-8")
    except UnicodeDecodeError as err:
        raise WeightsError("chat_template.jinja: expected UTF-8", code="weights.text") from err
    # 6
    tensors = {spec.name: _view(image, members[spec.member], spec) for spec in specs}
    if verify:
        with single_threaded_torch():
            for spec in specs:
                _check_values(tensors[spec.name], spec)
                advance(spec.size_bytes, "checking tensors")
    advance(total, "done")
    return Artefact(
        config=config,
        weights_root=found,
        manifest_digest=blake3(texts[MANIFEST]).digest(),
        tokenizer_json=texts["tokenizer.json"],
        chat_template=template,
        tokenizer_digest=digests["tokenizer.json"],
        template_digest=digests["chat_template.jinja"],
        tensors=MappingProxyType(tensors),
    )


def encode_sidecar(config: ModelConfig, *, root: bytes, data_blocks: int, manifest_digest: bytes) -> bytes:
    """The content of `weights.json`."""
    source = config.source
    return encode_object(
        {
            "root": root.hex(),
            "salt": verity.SALT.hex(),
            "data_blocks": data_blocks,
            "manifest_blake3": manifest_digest.hex(),
            "profile": config.profile,
            "model": config.name,
            "source": {"format": source.format, "name": source.name, "sha256": source.sha256.hex()},
        }
    )


def _sidecar_root(path: Path) -> bytes:
    """The root that `weights.json` claims; the whole file must have its form."""
    try:
        with path.open("rb") as file:
            data = file.read(1 << 16)
    except OSError as err:
        raise WeightsError(f"{path}: {err.strerror}", code="weights.missing") from err
    value: dict[str, Json] = parse_object(data, what=SIDECAR, max_bytes=(1 << 16) - 1)
    exact_keys(value, _SIDECAR_KEYS, what=SIDECAR)
    for key in ("salt", "manifest_blake3"):
        digest(value, key, what=SIDECAR)
    for key in ("profile", "model"):
        text(value, key, what=SIDECAR)
    integer(value, "data_blocks", what=SIDECAR)
    exact_keys(mapping(value, "source", what=SIDECAR), ("format", "name", "sha256"), what=f"{SIDECAR}.source")
    return digest(value, "root", what=SIDECAR)


def _open(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)  # what fstat says of a block device is 0
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    except OSError as err:
        raise WeightsError(f"{path}: {err.strerror}", code="weights.missing") from err
    except ValueError as err:
        raise WeightsError(f"{path.name}: expected data, got an empty file", code="weights.truncated") from err


def _check_blocks(image: memoryview, tree: memoryview, root: bytes, advance: Callable[[int], None]) -> None:
    bad = verity.first_bad_block(image, tree, root, advance)
    if bad is None:
        return
    if bad.level is not None:
        raise WeightsError(f"{TREE}: level {bad.level}, block {bad.index}: wrong digest", code="weights.tree")
    raise DamagedBlock(block=bad.index, member=_owners(image, bad.index))


def _read_blocks(path: Path, image: memoryview, advance: Callable[[int], None]) -> None:
    """Every block through dm-verity, which answers EIO for one that is not in the tree it was opened with."""
    bad = device.first_unreadable(path, len(image), advance)
    if bad is not None:
        raise DamagedBlock(block=bad, member=_owners(image, bad))


def _owners(image: memoryview, block: int) -> str:
    """The members with bytes in this block, found by headers that lie before it (those blocks are good)."""
    low, high = block * verity.BLOCK, (block + 1) * verity.BLOCK
    position, names = 0, []
    while position < low:
        member = read_header(image, position)
        if member is None:
            return "end of the archive"
        position = member.offset + padded(member.size_bytes, RECORD)
        if position > low:
            names.append(member.name)
    if position < high:
        names.append("headers after it" if names else "headers")
    return ", ".join(names)


def _text(image: memoryview, members: dict[str, Member], name: str) -> bytes:
    member = members.get(name)
    if member is None or member.size_bytes > MAX_TEXT_BYTES:
        raise WeightsError(f"{name}: expected in the image, at most {MAX_TEXT_BYTES} bytes", code="weights.members")
    return bytes(_data(image, member))


def _data(image: memoryview, member: Member) -> memoryview:
    return image[member.offset : member.offset + member.size_bytes]


def _check_members(listed: list[Member], specs: tuple[TensorSpec, ...]) -> None:
    """The members must be exactly these, in this order, each once; a list, because a dict would hide a second copy."""
    expected = [MANIFEST, *TEXTS, *(spec.member for spec in specs)]
    for found, name in zip(listed, expected, strict=False):
        if found.name != name:
            raise WeightsError(f"image: expected member {name}, got {found.name}", code="weights.members")
    if len(listed) != len(expected):
        raise WeightsError(f"image: expected {len(expected)} members, got {len(listed)}", code="weights.members")
    for member, spec in zip(listed[1 + len(TEXTS) :], specs, strict=True):
        if member.size_bytes != spec.size_bytes:
            raise WeightsError(
                f"{spec.member}: expected {spec.size_bytes} bytes, got {member.size_bytes}", code="weights.members"
            )


def _parse_manifest(data: bytes, names: list[str]) -> dict[str, bytes]:
    """Digests by member; the lines must be exactly those of `names`, in order."""
    lines = data.split(b"\n")
    if len(lines) != len(names) + 1 or lines[-1]:
        raise WeightsError(f"{MANIFEST}: expected {len(names)} lines", code="weights.manifest")
    digests: dict[str, bytes] = {}
    for line, name in zip(lines, names, strict=False):
        shown, rest = line[:64], line[64:]
        if set(shown) - set(b"0123456789abcdef") or len(shown) != 64 or rest != b"  " + name.encode():
            raise WeightsError(f"{MANIFEST}: expected the line of {name}", code="weights.manifest")
        digests[name] = bytes.fromhex(shown.decode("ascii"))
    return digests


def _view(image: memoryview, member: Member, spec: TensorSpec) -> Tensor:
    with warnings.catch_warnings():
        # the mapping is read-only on purpose; torch has no read-only tensors and warns
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(_data(image, member), dtype=_DTYPES[spec.dtype])
    return flat.view(spec.shape)


def _check_values(tensor: Tensor, spec: TensorSpec) -> None:
    low, high = (float(x) for x in torch.aminmax(tensor))
    bound = 3.4028235e38
    if spec.dtype == "int8":
        good = low >= -127
    elif spec.name.endswith(".scale"):
        good = low >= 0.0 and high <= bound
    elif spec.name.startswith("rope."):
        good = low >= -1.0 and high <= 1.0
    else:
        good = low >= -bound and high <= bound
    if not good:
        raise WeightsError(f"{spec.name}: values from {low} to {high} are out of range", code="weights.values")
