"""Build the artefact: checkpoint in; `weights.img`, `weights.verity` and `weights.json` out.

The same checkpoint, name and context give the same bytes on every machine: all arithmetic is element-wise IEEE-754 in a
fixed order, member order and every header are fixed, nothing reads a clock. Memory is bounded by the largest o_proj or
down_proj matrix in binary32 and a few blocks; the image is written once, front to back, and hashed once.

The build trusts the checkpoint's numbers, never its shape: whatever the profile cannot run is refused by name.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from countermark.errors import WeightsError
from countermark_appliance.engine.weights import verity
from countermark_appliance.engine.weights.artefact import IMAGE, MANIFEST, MAX_TEXT_BYTES, SIDECAR, TREE, encode_sidecar
from countermark_appliance.engine.weights.config import ModelConfig, tensor_specs
from countermark_appliance.engine.weights.fold import Folder, Jobs
from countermark_appliance.engine.weights.folder import FolderSource
from countermark_appliance.engine.weights.ggufsource import GgufSource
from countermark_appliance.engine.weights.modeljson import encode_model
from countermark_appliance.engine.weights.pack import MAX_MEMBER_BYTES, Packer, image_bytes
from countermark_appliance.engine.weights.parallel import ordered, single_threaded_torch
from countermark_appliance.engine.weights.quantise import quantise_rows
from countermark_appliance.engine.weights.ropetable import table_rows
from countermark_appliance.engine.weights.source import Source
from countermark_appliance.engine.weights.tokenizerjson import load_tokenizer

ProgressCallback = Callable[[int, int, str], None]
_READ_BYTES = 1 << 20
_QUANTISE_ELEMENTS = 1 << 19
_DTYPES = {"f32": torch.float32, "int8": torch.int8}
_MANIFEST_LINE_BYTES = 64 + 2 + 1  # hex digest, two spaces, newline


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What a build made."""

    directory: Path
    config: ModelConfig
    weights_root: bytes
    manifest_digest: bytes
    image_bytes: int


def open_source(path: Path) -> Source:
    """Open a `.gguf` file or a safetensors folder. Raises `weights.missing` or `weights.unsupported_*`."""
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise WeightsError(
            f"source: expected a GGUF file or a folder, found none at {str(path)!r}", code="weights.missing"
        )
    return GgufSource(path)


def build(
    source: Path,
    out_dir: Path,
    *,
    name: str | None = None,
    context: int | None = None,
    progress: ProgressCallback | None = None,
) -> Built:
    """Build the artefact of the checkpoint at `source` into `out_dir` (made if absent, its artefact replaced).

    `name`: the model's name, by default the source's. `context`: positions in the RoPE table, by default the model's.
    `progress(done_bytes, total_bytes, label)` is called often. Raises `WeightsError` for what the profile cannot run,
    a malformed checkpoint, too little room (`weights.no_space`) or a failing disk (`weights.io`); nothing is left then.
    """
    parts = {final: out_dir / f"{final}.partial" for final in (IMAGE, TREE, SIDECAR)}
    try:
        return _build(source, parts, name=name, context=context, progress=progress)
    except OSError as err:
        code = "weights.no_space" if err.errno == errno.ENOSPC else "weights.io"
        raise WeightsError(f"{err.filename or out_dir}: {err.strerror}", code=code) from err
    finally:
        for part in parts.values():
            if part.exists():
                part.unlink()


def _build(
    source: Path, parts: dict[str, Path], *, name: str | None, context: int | None, progress: ProgressCallback | None
) -> Built:
    checkpoint = open_source(source)
    config = checkpoint.config(name=name or checkpoint.name, sha256=bytes(32), context=context)
    _check_tokenizer(checkpoint, config)
    layout = _Layout(checkpoint, config)
    meter = _Meter(progress, sum(path.stat().st_size for path in checkpoint.files) + 2 * layout.total_bytes)

    out_dir = parts[IMAGE].parent
    out_dir.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out_dir).free < layout.total_bytes + layout.total_bytes // 64:
        raise WeightsError(f"{out_dir.name}: expected room for {layout.total_bytes} bytes", code="weights.no_space")
    sha256 = _source_digest(checkpoint.files, meter)
    config = replace(config, source=replace(config.source, sha256=sha256))

    with single_threaded_torch():
        manifest = _write_image(parts[IMAGE], checkpoint, config, layout, meter)
    root, tree = _hash_image(parts[IMAGE], meter)
    parts[TREE].write_bytes(tree)
    built = Built(
        directory=out_dir,
        config=config,
        weights_root=root,
        manifest_digest=blake3(manifest).digest(),
        image_bytes=layout.total_bytes,
    )
    blocks = layout.total_bytes // verity.BLOCK
    parts[SIDECAR].write_bytes(
        encode_sidecar(config, root=root, data_blocks=blocks, manifest_digest=built.manifest_digest)
    )
    for final, part in parts.items():
        _sync(part)
        part.replace(out_dir / final)
    meter.finish()
    return built


class _Layout:
    """Sizes of everything in the image, known before anything is computed."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        try:
            template = source.chat_template.encode("utf-8")
        except UnicodeEncodeError as err:
            raise WeightsError("chat_template: expected text that is UTF-8", code="weights.text") from err
        model = encode_model(config)  # the digest still to come has a fixed length
        self.texts = {"chat_template.jinja": template, "model.json": model, "tokenizer.json": source.tokenizer_json}
        for name, text in self.texts.items():
            if len(text) > MAX_TEXT_BYTES:
                raise WeightsError(f"{name}: expected at most {MAX_TEXT_BYTES} bytes", code="weights.text")
        self.specs = tensor_specs(config)
        self.names = [*self.texts, *(spec.member for spec in self.specs)]
        self.manifest_bytes = sum(_MANIFEST_LINE_BYTES + len(name) for name in self.names)
        sizes = [self.manifest_bytes, *map(len, self.texts.values()), *(spec.size_bytes for spec in self.specs)]
        if max(sizes) > MAX_MEMBER_BYTES:
            raise WeightsError(f"tensors: expected at most {MAX_MEMBER_BYTES} bytes", code="weights.unsupported_width")
        self.total_bytes = image_bytes(sizes)


def _write_image(path: Path, source: Source, config: ModelConfig, layout: _Layout, meter: _Meter) -> bytes:
    """Write the image front to back; returns the manifest."""
    with Packer(path) as packer:
        manifest_offset = packer.begin(MANIFEST, layout.manifest_bytes)
        packer.write(bytes(layout.manifest_bytes))
        for member, text in (layout.texts | {"model.json": encode_model(config)}).items():
            packer.begin(member, len(text))
            if text:
                packer.write(text)
        for spec, (tensor, blocks) in zip(layout.specs, _tensors(Folder(source, config), config), strict=True):
            assert tensor == spec.name
            packer.begin(spec.member, spec.size_bytes)
            for block in blocks:
                assert block.dtype == _DTYPES[spec.dtype] and block.shape[1:] == spec.shape[1:]
                packer.write(block.contiguous().numpy().data.cast("B"))
                meter.advance(block.nbytes, spec.name)
        lines = [f"{packer.digests[name].hex()}  {name}\n" for name in layout.names]
        manifest = "".join(lines).encode("ascii")
        packer.rewrite(manifest_offset, manifest)
        written = packer.close()
    assert written == layout.total_bytes
    return manifest


def _tensors(fold: Folder, config: ModelConfig) -> Iterator[tuple[str, Iterable[Tensor]]]:
    """Name and data of every tensor in the order of `tensor_specs`. Use up the data of one before the next."""
    yield "embed", ordered(lambda job: _finite(job(), "embed"), fold.embed())
    for which in ("cos", "sin"):
        yield f"rope.{which}", table_rows(config, which)
    for i in range(config.layers):
        layer = f"layers.{i}"
        yield from _linear(f"{layer}.qkv", fold.qkv(i))
        if config.attention_bias:
            yield f"{layer}.qkv.bias", [_finite(fold.qkv_bias(i), f"{layer}.qkv.bias")]
        if config.qk_norm:
            for which in ("q", "k"):
                yield f"{layer}.{which}_norm", [_finite(fold.head_norm(i, which), f"{layer}.{which}_norm")]
        yield from _linear(f"{layer}.o", _slices(fold.output(i)))
        if config.output_bias:
            yield f"{layer}.o.bias", [_finite(fold.output_bias(i), f"{layer}.o.bias")]
        yield from _linear(f"{layer}.gate_up", fold.gate_up(i))
        yield from _linear(f"{layer}.down", _slices(fold.down(i)))
    yield from _linear("head", fold.head())


def _linear(name: str, jobs: Jobs) -> Iterator[tuple[str, Iterable[Tensor]]]:
    scales: list[Tensor] = []

    def rows() -> Iterator[Tensor]:
        for q, scale in ordered(lambda job: quantise_rows(job(), what=name), jobs):
            scales.append(scale)
            yield q

    yield name, rows()
    yield f"{name}.scale", [torch.cat(scales)]


def _slices(whole: Tensor) -> Jobs:
    step = max(1, _QUANTISE_ELEMENTS // whole.shape[1])
    return (partial(whole.narrow, 0, start, min(step, len(whole) - start)) for start in range(0, len(whole), step))


def _finite(values: Tensor, what: str) -> Tensor:
    values = values.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise WeightsError(f"{what}: expected finite values", code="weights.not_finite")
    return values


def _check_tokenizer(source: Source, config: ModelConfig) -> None:
    """The tokenizer must load, and every id it can give must be a row of the embedding."""
    tokenizer = load_tokenizer(source.tokenizer_json)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < config.vocab:
        raise WeightsError(
            f"tokenizer.json: expected ids below {config.vocab}, got {largest}", code="weights.unsupported_tokenizer"
        )


def _source_digest(files: tuple[Path, ...], meter: _Meter) -> bytes:
    """SHA-256 of the one file, or of the `sha256sum` listing of several, sorted by name."""
    listing: list[tuple[str, str]] = []
    for path in files:
        state = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                state.update(piece)
                meter.advance(len(piece), f"reading {path.name}")
        if len(files) == 1:
            return state.digest()
        listing.append((path.name, state.hexdigest()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(listing)).encode()).digest()


def _hash_image(path: Path, meter: _Meter) -> tuple[bytes, bytes]:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as image,
    ):
        return verity.build_tree(image, lambda count: meter.advance(count, "hashing"))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _Meter:
    """Adds up progress for the callback; the total is what will be read, written and hashed."""

    def __init__(self, callback: ProgressCallback | None, total: int) -> None:
        self._callback = callback
        self._total = total
        self._done = 0

    def advance(self, count: int, label: str) -> None:
        self._done = min(self._done + count, self._total)
        if self._callback is not None:
            self._callback(self._done, self._total, label)

    def finish(self) -> None:
        self.advance(self._total - self._done, "done")
