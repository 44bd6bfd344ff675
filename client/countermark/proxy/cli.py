"""`countermark proxy`: arguments, and the process around the proxy."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from countermark import endorsements_cli, terminal
from countermark.channel import parse_address
from countermark.errors import UsageError
from countermark.files import read_file
from countermark.policy import load_policy
from countermark.proxy.app import App
from countermark.proxy.guard import Guard, is_loopback
from countermark.proxy.http import Server
from countermark.proxy.journal import Journal
from countermark.proxy.settings import Bundles, NodeLimits, Settings
from countermark.proxy.spoken import BUSY
from countermark.proxy.upstream import worst
from countermark.session import Session, connect

_GRACE_S: Final = 10.0
_CONNECT_S: Final = 15.0
_KEY_CHARACTERS: Final = (16, 512)


_EXAMPLES: Final = """examples:
  countermark proxy 127.0.0.1:9443 --policy demo-out/policy.toml
      then base_url="http://127.0.0.1:8080/v1" in any OpenAI client; http://127.0.0.1:8080/ shows nodes and receipts
  countermark proxy node1:9443 node2:9443 --policy policy.toml --bundles answers --bundle-all
      two nodes, tried in this order; every answer is kept with its proof"""


def add_command(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `proxy`. `command(commands, name, run, text, examples=...)` makes one parser."""
    text = "an OpenAI-compatible endpoint on this machine, every answer verified"
    proxy = command(commands, "proxy", _proxy, text, examples=_EXAMPLES)
    proxy.add_argument("nodes", nargs="+", metavar="HOST:PORT", help="nodes, in the order in which they are tried")
    proxy.add_argument("--policy", type=Path, required=True, help="read anew for each appraisal")
    proxy.add_argument("--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="default: %(default)s")
    proxy.add_argument("--json", action="store_true", help="print where it listens as a JSON object on stdout")
    proxy.add_argument("--node-key-file", type=Path, metavar="F", help="the key that the nodes' operator gave you")
    proxy.add_argument("--key-file", type=Path, metavar="F", help="answer only those who show the key in this file")
    proxy.add_argument(
        "--expose", action="store_true", help="allow --listen on an address that others reach (plain HTTP)"
    )
    proxy.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of this proxy")
    proxy.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="a web page that may ask")
    proxy.add_argument("--bundles", type=Path, metavar="DIR", help="where bundles go: of answers asked to be saved")
    proxy.add_argument("--bundle-all", action="store_true", help="save the bundle of every answer")
    proxy.add_argument(
        "--bundles-keep", type=int, default=1000, metavar="N", help="at most so many (default: %(default)s)"
    )
    proxy.add_argument(
        "--bundles-mib",
        type=int,
        default=1024,
        metavar="N",
        help="and so many MiB; the oldest go (default: %(default)s)",
    )
    proxy.add_argument("--manifest", type=Path, help="signed measurement manifest to put into each bundle")
    proxy.add_argument("--hold", action="store_true", help="give out no text before the whole answer is verified")
    proxy.add_argument(
        "--resend", action="store_true", help="send what was lost with a node to the next, and say so in the answer"
    )
    proxy.add_argument(
        "--reattest",
        type=float,
        default=300.0,
        metavar="S",
        help="no prompt under an older verdict (default: %(default)g)",
    )
    proxy.add_argument("--streams", type=int, default=256, metavar="N", help="answers at a time (default: %(default)s)")
    proxy.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="for one answer (default: %(default)g)"
    )
    proxy.add_argument("--wait", type=float, default=30.0, metavar="S", help="for a busy node (default: %(default)g)")
    endorsements_cli.add_options(proxy)


def _proxy(args: argparse.Namespace) -> None:
    settings = settings_of(args)
    load_policy(args.policy)
    endorsements = endorsements_cli.chosen(args)
    key = None if args.node_key_file is None else _key(args.node_key_file, "--node-key-file").decode()

    def connected(address: str) -> Session:
        return connect(address, load_policy(args.policy), timeout_s=_CONNECT_S, endorsements=endorsements, key=key)

    asyncio.run(serve(settings, connected, Journal(people=sys.stderr.isatty()), json_=args.json))


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises `UsageError` (`usage.proxy`, `usage.address`, `usage.file`)."""
    host, port = _listen(args.listen)
    for address in args.nodes:
        parse_address(address)
    if not is_loopback(host) and not (args.expose and args.key_file):
        message = f"--listen: expected an address of this machine alone, or --expose and --key-file too, got {host}"
        raise UsageError(message, code="usage.proxy")
    if args.bundles is None and (args.bundle_all or args.manifest):
        raise UsageError("--bundle-all, --manifest: expected --bundles beside them", code="usage.proxy")
    for name, value, least, most in (
        ("--reattest", args.reattest, 1, 86_400),
        ("--streams", args.streams, 1, 4096),
        ("--timeout", args.timeout, 1, 86_400),
        ("--wait", args.wait, 0, 3600),
        ("--bundles-keep", args.bundles_keep, 1, 1_000_000),
        ("--bundles-mib", args.bundles_mib, 1, 1 << 30),
    ):
        if not least <= value <= most:
            raise UsageError(f"{name}: expected {least:g} to {most:g}, got {value:g}", code="usage.proxy")
    bundles = None
    if args.bundles is not None:
        bundles = Bundles(
            folder=args.bundles,
            keep=args.bundles_keep,
            keep_bytes=args.bundles_mib << 20,
            every=args.bundle_all,
            manifest=read_file(args.manifest) if args.manifest else None,
        )
    return Settings(
        guard=Guard(
            listen=host,
            hosts=frozenset(name.lower() for name in args.allow_host),
            origins=frozenset(args.allow_origin),
            key=_key(args.key_file) if args.key_file else None,
        ),
        port=port,
        nodes=tuple(dict.fromkeys(args.nodes)),
        streams=args.streams,
        timeout_s=args.timeout,
        wait_s=args.wait,
        hold=args.hold,
        resend=args.resend,
        bundles=bundles,
        node_limits=NodeLimits(reattest_s=args.reattest, sessions=max(1, -(-args.streams // NodeLimits().streams))),
    )


async def serve(
    settings: Settings, connected: Callable[[str], Session], journal: Journal, *, json_: bool = False
) -> None:
    """Run until SIGINT or SIGTERM. Raises `UsageError` (`usage.listen`), and why no node at all is verified."""
    app = App(settings, connected, journal)
    server = Server(app, settings.http_limits)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, what: journal.note("proxy_error", code=type(what.get("exception")).__name__))
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    try:
        refused = await app.start()
        _show(app)
        if len(refused) == len(settings.nodes):
            raise worst(refused, BUSY)
        try:
            port = await server.start(settings.guard.listen, settings.port)
        except OSError as err:
            raise UsageError(f"--listen: {err.strerror or err}", code="usage.listen") from err
        host = f"[{settings.guard.listen}]" if ":" in settings.guard.listen else settings.guard.listen
        if json_:
            print(json.dumps({"listening": f"{host}:{port}"}), flush=True)
        terminal.note(f"OpenAI base URL http://{host}:{port}/v1    status page http://{host}:{port}/")
        await stop.wait()
    finally:
        await server.close(grace_s=_GRACE_S)
        await app.close()


def _show(app: App) -> None:
    for node in app.upstream.nodes:
        seen = node.seen
        if seen.verdict is not None:
            if seen.verdict.simulated:
                terminal.show_simulated()
            terminal.show_checks(seen.checks)
            terminal.note(f"{node.address}: {seen.verdict}")
        elif seen.error is not None and len(app.upstream.nodes) > 1:
            terminal.note(f"{node.address}:")
            terminal.show_error(seen.error)


def _listen(text: str) -> tuple[str, int]:
    """As `channel.parse_address`, and port 0 for any free one."""
    host, colon, port = text.rpartition(":")
    if colon and port == "0":
        return parse_address(f"{host}:1")[0], 0
    return parse_address(text)


def _key(path: Path, name: str = "--key-file") -> bytes:
    key = read_file(path, max_bytes=_KEY_CHARACTERS[1] + 2).strip()
    least, most = _KEY_CHARACTERS
    if not least <= len(key) <= most or not key.isascii() or any(byte <= 32 or byte == 127 for byte in key):
        raise UsageError(f"{name}: expected {least} to {most} visible characters", code="usage.proxy")
    return key
