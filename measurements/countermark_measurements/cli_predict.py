"""The commands that predict: `predict`, `rtmr0`, `rtmr3`. Arguments, files and printing; no logic."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from countermark import arguments, terminal
from countermark.errors import UsageError
from countermark.files import read_file, write_file
from countermark.formats.eventlog import Event, event_type_name, replay
from countermark.formats.manifest import MAX_MANIFEST_BYTES, Manifest, parse_envelope
from countermark.numerics import CURRENT
from countermark.policy import verify_signatures
from countermark_measurements import predict, runtime, shape, shape_metadata
from countermark_measurements.prediction import PLATFORMS, to_json
from countermark_measurements.tdvf import MAX_FIRMWARE_BYTES, Order, mrtd, parse_tdvf

Command = Callable[[Any, str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
_PUBLIC = 0o644


def add_commands(commands: Any, command: Command) -> None:
    """Add the commands. `command(commands, name, run, text)` makes one parser."""
    ahead = command(commands, "predict", _predict, "say what an image measures to, before any machine boots it")
    ahead.add_argument("--disk", type=Path, required=True, metavar="RAW", help="disk.raw of the image build")
    ahead.add_argument("--firmware", type=Path, required=True, metavar="FD", help="the firmware, such as OVMF.fd")
    ahead.add_argument(
        "--shape", type=Path, action="append", required=True, metavar="TOML", help="a launch shape; may be repeated"
    )
    ahead.add_argument("--platform", choices=PLATFORMS, required=True)
    ahead.add_argument("--out", type=Path, metavar="JSON", help="write the prediction, which `manifest` takes")
    ahead.add_argument("--json", action="store_true", help="print it instead of the list for people")

    launch = command(commands, "rtmr0", _rtmr0, "MRTD and RTMR0 of a launch that a tdx-measure metadata.json describes")
    launch.add_argument("metadata", type=Path, metavar="METADATA")
    launch.add_argument("--firmware", type=Path, metavar="FD", help="default: the one that the file names")
    launch.add_argument("--json", action="store_true", help="one JSON object on stdout")

    late = command(commands, "rtmr3", _rtmr3, "print the events of RTMR3 that a configuration determines")
    late.add_argument("--config", type=Path, required=True, metavar="TOML", help="the node's configuration file")
    late.add_argument("--manifest", type=Path, required=True, metavar="MANIFEST", help="of the image it runs on")
    late.add_argument("--numerics", default=CURRENT, metavar="PROFILE", help="default: %(default)s")
    late.add_argument("--kernels", type=arguments.digest, metavar="SHA256", help="digest of the kernel sources")
    late.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _predict(args: argparse.Namespace) -> None:
    with _files():
        shapes = [shape.read_shape(path) for path in args.shape]
        found = predict.predict(args.disk, args.firmware, shapes, args.platform)
    data = to_json(found)
    if args.out is not None:
        write_file(args.out, data, mode=_PUBLIC)
    if args.json:
        print(data.decode())
        return
    for item in found.shapes:
        print(f"{item.name}\n  mrtd   {item.mrtd.hex()}\n  rtmr0  {item.rtmr0.hex()}")
    print(f"every shape\n  rtmr1  {found.rtmr1.hex()}\n  rtmr2  {found.rtmr2.hex()}")
    for event in found.events:
        kind = f"{event_type_name(event.event_type):<34}{event.source:<10}"
        where = f" [{event.shape}]" if event.shape else ""
        print(f"rtmr{event.register - 1}  {event.digest.hex()[:16]}  {kind}{terminal.printable(event.note)}{where}")
    if args.out is not None:
        terminal.note(f"{args.out}: {len(found.shapes)} shape(s), {len(found.events)} events")


def _rtmr0(args: argparse.Namespace) -> None:
    with _files():
        launch = shape_metadata.read_metadata(args.metadata)
        tdvf = parse_tdvf(read_file(args.firmware or launch.firmware, max_bytes=MAX_FIRMWARE_BYTES))
    events = launch.events(tdvf)
    logged = (Event(register=e.register, event_type=e.event_type, digest=e.digest, data=b"") for e in events)
    rtmr0 = replay(logged)[0].hex()
    orders = {order.value: mrtd(tdvf, order).hex() for order in Order}
    if args.json:
        shown = [{"type": event_type_name(e.event_type), "digest": e.digest.hex(), "what": e.note} for e in events]
        print(json.dumps({"mrtd": orders, "rtmr0": rtmr0, "events": shown}))
        return
    for name, value in orders.items():
        print(f"mrtd   {value}  built as {name} does")
    print(f"rtmr0  {rtmr0}")
    for event in events:
        print(f"  {event.digest.hex()[:16]}  {event_type_name(event.event_type):<34}{terminal.printable(event.note)}")


@contextmanager
def _files() -> Iterator[None]:
    """A file that cannot be read is the caller's error."""
    try:
        yield
    except OSError as err:
        raise UsageError(f"{err.filename}: {err.strerror}", code="usage.file") from err


def _rtmr3(args: argparse.Namespace) -> None:
    image = read_manifest(args.manifest)
    found = runtime.predict_runtime(
        read_file(args.config, max_bytes=runtime.MAX_CONFIG_BYTES),
        image_id=image.image_id,
        profile=args.numerics,
        kernel_digest=args.kernels,
    )
    if args.json:
        events = [{"name": name, "data": e.data.hex(), "digest": e.digest.hex()} for name, e in found.events]
        print(json.dumps({"config": found.config.hex(), "weights_root": found.weights_root.hex(), "events": events}))
        return
    print(f"config   {found.config.hex()}  (a policy names it in config.digests)")
    print(f"weights  {found.weights_root.hex()}  (in model.weights_roots)")
    for name, event in found.events:
        print(f"{name:<14}{event.digest.hex()}")
    missing = () if args.kernels else ("numerics (give --kernels)",)
    terminal.note(f"not known before the start: {', '.join((*missing, 'gpu', 'keys'))}")


def read_manifest(path: Path) -> Manifest:
    """A manifest whose signatures hold; whose they are is said, and judged by `countermark policy pin` and `audit`."""
    envelope = read_file(path, max_bytes=MAX_MANIFEST_BYTES)
    signers = [item.keyid for item in parse_envelope(envelope).signatures]
    image = verify_signatures(envelope, signers=tuple(map(bytes.fromhex, signers)))
    terminal.note(f"{path}: signed by {' and '.join(item[:16] for item in signers)}: compare with your publisher's")
    return image
