"""countermark-measure: the commands. Argparse, files, printing and exit codes; no logic.

stdout carries the result, stderr what was done and refusals. Exit codes are those of `countermark`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from countermark import arguments, terminal
from countermark.bundle import MAX_BUNDLE_BYTES
from countermark.checks import rfc3339
from countermark.errors import CountermarkError, MeasurementError, UsageError
from countermark.files import read_file, write_file
from countermark.formats.manifest import MAX_MANIFEST_BYTES, Subject, encode_manifest
from countermark.log_cli import read_vkeys
from countermark.logkeys import read_passphrase
from countermark.tlog.cosignature import log_keys
from countermark_measurements import cli_predict, corim, diff, explain, keys, manifest, publish, rvps
from countermark_measurements.cli_predict import read_manifest
from countermark_measurements.prediction import parse_json

_PUBLIC = 0o644
_EPILOG = """exit codes:
  0 done   1 usage   12 measurement or manifest   20 format   21 log"""


class _Parser(argparse.ArgumentParser):
    """argparse, with our exit code for a wrong call."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(UsageError.exit_code, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except CountermarkError as err:
        terminal.show_error(err)
        return err.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="countermark-measure",
        description="Predict, publish and explain what an image measures to.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('countermark')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    group = commands.add_parser("keys", help="make and show a publisher's keys")
    actions = group.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
    new = _command(actions, "new", _keys_new, "make keys for manifests and for their log, in a new directory")
    new.add_argument("dir", type=Path, metavar="DIR", help="private keys, mode 0600; keep it off what is published")
    new.add_argument("--log", required=True, metavar="NAME", help="the log's name, such as example.org/measurements")
    _passphrase(new)
    show = _command(actions, "show", _keys_show, "print what verifiers are given: signers and verifier keys")
    show.add_argument("dir", type=Path, metavar="DIR")
    _passphrase(show)

    cli_predict.add_commands(commands, _command)

    made = _command(commands, "manifest", _manifest, "sign the manifest of an image from its prediction")
    made.add_argument("--prediction", type=Path, required=True, metavar="JSON", help="of `countermark-measure predict`")
    made.add_argument("--image", type=Path, required=True, metavar="JSON", help="image.json of the image build")
    made.add_argument(
        "--version", type=int, dest="release", metavar="N", help="default with --publish: one more than the last there"
    )
    made.add_argument("--valid-days", type=int, default=90, metavar="D", help="default: %(default)s")
    made.add_argument(
        "--revoke", type=arguments.digest, action="append", default=[], metavar="IMAGE_ID", help="withdraw an image"
    )
    made.add_argument(
        "--weights",
        type=_weights,
        action="append",
        default=[],
        metavar="NAME=ROOT",
        help="weights it is published with",
    )
    made.add_argument(
        "--mrseam", type=_mrseam, action="append", default=[], metavar="HEX", help="a TDX module it was tried with"
    )
    made.add_argument("--xfam", type=_xfam, metavar="HEX", help=f"XFAM of its TDs (default: {manifest.XFAM.hex()})")
    made.add_argument("--keys", type=Path, required=True, metavar="DIR", help="of `keys new`")
    made.add_argument("--out", type=Path, required=True, metavar="FILE")
    made.add_argument("--publish", type=Path, metavar="DIR", help="and publish it there")
    made.add_argument("--at", type=arguments.moment, metavar="TIME", help="the time of signing (default: now)")
    _passphrase(made)

    put = _command(commands, "publish", _publish, "put a signed manifest into the log of a published directory")
    put.add_argument("manifest", type=Path, metavar="MANIFEST")
    put.add_argument("dir", type=Path, metavar="DIR")
    put.add_argument("--keys", type=Path, required=True, metavar="DIR", help="of `keys new`")
    _passphrase(put)

    check = _command(commands, "audit", _audit, "verify a published directory: its log, and every manifest in it")
    check.add_argument("dir", type=Path, metavar="DIR")
    check.add_argument(
        "--key", action="append", default=[], metavar="VKEY", help="both keys of its log, or a file of them"
    )
    check.add_argument(
        "--signer", type=arguments.digest, action="append", default=[], metavar="SHA256", help="both signers"
    )
    check.add_argument("--json", action="store_true", help="one JSON object on stdout")

    why = _command(commands, "explain", _explain, "say which event makes a machine differ from a manifest")
    why.add_argument("quote", type=Path, metavar="QUOTE", help="binary or hex; or evidence or a bundle, without LOG")
    why.add_argument("log", type=Path, nargs="?", metavar="LOG", help="CCEL (binary) or a JSON event list")
    why.add_argument("manifest", type=Path, metavar="MANIFEST")
    why.add_argument("--shape", metavar="NAME", help="compare with this launch shape (default: the nearest)")
    why.add_argument("--json", action="store_true", help="one JSON object on stdout")

    change = _command(commands, "diff", _diff, "say in words what changed between two manifests")
    change.add_argument("old", type=Path, metavar="OLD")
    change.add_argument("new", type=Path, metavar="NEW")

    trustee = _command(commands, "rvps", _rvps, "print a manifest's reference values for Trustee's RVPS (JSON)")
    trustee.add_argument("manifest", type=Path, metavar="MANIFEST")
    trustee.add_argument("--message", action="store_true", help="wrapped as `rvps-tool register` takes it")

    rim = _command(commands, "corim", _corim, "write a manifest's reference values as a CoRIM (CBOR)")
    rim.add_argument("manifest", type=Path, metavar="MANIFEST")
    rim.add_argument("--out", type=Path, required=True, metavar="FILE")

    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _passphrase(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passphrase-file", type=Path, metavar="FILE", help="the private keys are encrypted with it")


def _keys_new(args: argparse.Namespace) -> None:
    made = keys.create(args.dir, args.log, passphrase=read_passphrase(args.passphrase_file))
    _show_keys(made)
    terminal.note(f"{args.dir}: keep it private and backed up; without it no newer manifest can be published")


def _keys_show(args: argparse.Namespace) -> None:
    _show_keys(_load_keys(args.dir, args))


def _show_keys(made: keys.PublisherKeys) -> None:
    for signer in made.signers:
        print(f"signer {signer.hex()}")
    for key in made.log.as_log:
        print(f"log {key}")


def _load_keys(directory: Path, args: argparse.Namespace) -> keys.PublisherKeys:
    return keys.load(directory, passphrase=read_passphrase(args.passphrase_file))


def _manifest(args: argparse.Namespace) -> None:
    publisher = _load_keys(args.keys, args)
    now = int(time.time()) if args.at is None else args.at
    prediction = parse_json(read_file(args.prediction, max_bytes=MAX_MANIFEST_BYTES))
    image = manifest.parse_image(read_file(args.image, max_bytes=manifest.MAX_DESCRIPTION_BYTES))
    release, revoked = args.release, tuple(args.revoke)
    if args.publish is not None:
        before = publish.published(args.publish, publisher)
        revoked = (*before.revoked, *revoked)  # a client that pins this manifest alone must know them, too
        release = before.version + 1 if release is None else release
        if release <= before.version:  # before it is signed: a second manifest of one version must not exist at all
            message = f"--version: expected more than {before.version}, which is published, got {release}"
            raise UsageError(message, code="usage.manifest")
        for item in args.revoke:
            if before.of(item) is None:
                message = f"--revoke: expected an image that was published to {args.publish}, got {item.hex()}"
                raise UsageError(message, code="usage.manifest")
    if release is None:
        raise UsageError("--version: expected a number, or --publish to count on from", code="usage.manifest")
    launch = _launch(args, prediction.platform)
    statement = manifest.build(
        prediction,
        image,
        version=release,
        now=now,
        valid_days=args.valid_days,
        revoked=revoked,
        weights=args.weights,
        launch=launch,
    )
    envelope = publisher.sign(encode_manifest(statement))
    write_file(args.out, envelope, mode=_PUBLIC)
    until = rfc3339(statement.not_after)
    terminal.note(f"{args.out}: version {release}, {image.kind.value}, image {image.image_id.hex()}, until {until}")
    if args.publish is not None:
        _put(args.publish, envelope, publisher, now, args.keys)


def _launch(args: argparse.Namespace, platform: str) -> manifest.Launch | None:
    if platform != "tdx":
        if args.mrseam or args.xfam is not None:
            message = f"--mrseam, --xfam: expected none for platform {platform}, whose values are simulated"
            raise UsageError(message, code="usage.manifest")
        return None
    return manifest.Launch(xfam=manifest.XFAM if args.xfam is None else args.xfam, mrseam=tuple(args.mrseam))


def _publish(args: argparse.Namespace) -> None:
    envelope = read_file(args.manifest, max_bytes=MAX_MANIFEST_BYTES)
    _put(args.dir, envelope, _load_keys(args.keys, args), int(time.time()), args.keys)


def _put(path: Path, envelope: bytes, publisher: keys.PublisherKeys, now: int, key_dir: Path) -> None:
    done = publish.append(path, envelope, publisher, now=now, key_dir=key_dir)
    what = "published" if done.appended else "stood there already, written again"
    terminal.note(f"{path}: {what}; leaf {done.index} of {done.size} in the log {publisher.log.name}")
    terminal.note(f"for clients: countermark policy pin {done.manifest} --proof {done.proof} --policy FILE;")
    terminal.note("  the first time also --log with the file vkeys, and --signer twice, as `keys show` prints them")


def _audit(args: argparse.Namespace) -> None:
    if not args.key or len(args.signer) != 2:
        message = (
            "--key, --signer: expected both of the log's keys and both signers, from the publisher and not from DIR"
        )
        raise UsageError(message, code="usage.log")
    origin, keys_of = log_keys(read_vkeys(args.key))
    found = publish.audit(args.dir, origin, keys_of, args.signer)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['origin']}: {found['size']} manifest(s), log and signatures verified")
    for item in found["manifests"]:
        state = "REVOKED" if item["revoked"] else ""
        print(f"{item['version']:>6}  {item['kind']}/{item['platform']}  {item['image_id']}  {state}".rstrip())


def _explain(args: argparse.Namespace) -> None:
    log = None if args.log is None else read_file(args.log)
    measured = explain.read_measured(read_file(args.quote, max_bytes=MAX_BUNDLE_BYTES), log)
    found = explain.explain(measured, read_manifest(args.manifest), args.shape)
    print(json.dumps(found.as_json()) if args.json else terminal.printable("\n".join(found.lines())))
    if found.differing:
        first = found.differing[0]
        message = f"{', '.join(found.differing)}: not as version {found.image.version} of the manifest predicts"
        raise MeasurementError(message, code=f"measurement.{first}")


def _diff(args: argparse.Namespace) -> None:
    lines = diff.diff(read_manifest(args.old), read_manifest(args.new))
    print(terminal.printable("\n".join(lines) or "the two manifests say the same"))


def _rvps(args: argparse.Namespace) -> None:
    values = rvps.reference_values(read_manifest(args.manifest))
    print((rvps.encode_message(values) if args.message else rvps.encode_rvps(values)).decode())


def _corim(args: argparse.Namespace) -> None:
    write_file(args.out, corim.encode_corim(corim.corim_of(read_manifest(args.manifest))), mode=_PUBLIC)
    terminal.note(f"{args.out}: unsigned CoRIM; it is as good as the manifest that it was derived from")


def _weights(text: str) -> Subject:
    name, root = arguments.pair(text)
    return Subject(name=name, sha256=arguments.digest(root))


def _mrseam(text: str) -> bytes:
    return _sized(text, 48)


def _xfam(text: str) -> bytes:
    return _sized(text, 8)


def _sized(text: str, size: int) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != size or data.hex() != text:
        raise argparse.ArgumentTypeError(f"expected {2 * size} lower-case hex digits, got {text!r}")
    return data


if __name__ == "__main__":
    sys.exit(main())
