"""`countermark policy`: make, show and pin policies. Arguments, files and printing; `policy` decides."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from countermark import arguments, log_cli, terminal
from countermark import policy as policies
from countermark.checks import rfc3339
from countermark.errors import UsageError
from countermark.files import read_file, write_file
from countermark.policy import Policy, Profile, load_policy
from countermark.tlog.proof import MAX_PROOF_BYTES

Command = Callable[..., argparse.ArgumentParser]
_WEIGHTS = "weights/"  # subjects of a manifest with this prefix are dm-verity roots


def add_commands(commands: Any, command: Command) -> None:
    """Add `policy` and its actions. `command(commands, name, run, text)` makes one parser."""
    actions = commands.add_parser("policy", help="make, show and pin policies")
    actions = actions.add_subparsers(required=True, metavar="ACTION")
    new = command(actions, "new", _new, "print a strict policy that accepts nothing yet")
    new.add_argument("--profile", choices=[p.value for p in Profile], default=Profile.PRODUCTION.value)
    new.add_argument("--simulated-tdx-root", type=arguments.digest, metavar="SHA256")
    new.add_argument("--simulated-gpu-root", type=arguments.digest, metavar="SHA256")
    new.add_argument("--simulated-rim-root", type=arguments.digest, metavar="SHA256")
    new.add_argument(
        "--at", type=arguments.moment, metavar="TIME", help="as of that time (default: now), for old evidence"
    )
    show = command(actions, "show", _show, "check a policy file and print it with every default")
    show.add_argument("policy", type=Path)
    pin = command(actions, "pin", _pin, "accept the image of a signed measurement manifest")
    pin.add_argument("manifest", type=Path)
    pin.add_argument("--policy", type=Path, required=True, help="the policy file to change")
    pin.add_argument(
        "--signer", type=arguments.digest, action="append", default=[], metavar="SHA256", help="both, the first time"
    )
    pin.add_argument(
        "--log", action="append", default=[], metavar="VKEY", help="both keys of its measurement log, or a file of them"
    )
    pin.add_argument("--proof", type=Path, metavar="FILE", help="that it stands in that log, as published beside it")
    pin.add_argument(
        "--weights", type=arguments.digest, action="append", default=[], metavar="ROOT", help="weights root to accept"
    )


def _new(args: argparse.Namespace) -> None:
    policy = policies.new_policy(
        Profile(args.profile),
        now=int(time.time()) if args.at is None else args.at,
        simulated_tdx_root=args.simulated_tdx_root,
        simulated_gpu_root=args.simulated_gpu_root,
        simulated_rim_root=args.simulated_rim_root,
    )
    sys.stdout.write(policies.encode_policy(policy))


def _show(args: argparse.Namespace) -> None:
    policy = load_policy(args.policy)
    sys.stdout.write(policies.encode_policy(policy))
    if time.time() > policy.not_after:
        terminal.note(f"{args.policy}: EXPIRED {rfc3339(policy.not_after)}: nothing is accepted under it")


def _pin(args: argparse.Namespace) -> None:
    before = load_policy(args.policy)
    if len(args.signer) != 2 and (args.signer or not before.manifest_signers):
        message = f"--signer: expected two digests, of the ES256 and the ML-DSA-65 signer, got {len(args.signer)}"
        raise UsageError(message, code="usage.signer")
    after = policies.pin(
        before,
        read_file(args.manifest),
        now=int(time.time()),
        signers=args.signer,
        weights_roots=args.weights,
        log=log_cli.read_vkeys(args.log),
        proof=None if args.proof is None else read_file(args.proof, max_bytes=MAX_PROOF_BYTES),
    )
    write_file(args.policy, policies.encode_policy(after).encode())
    for known in before.images:
        if known.image_id in after.revoked_images:
            terminal.note(f"image {known.image_id.hex()}, version {known.version}: REVOKED, no longer accepted")
    accepted = f"{len(after.images)} image(s), manifest version {after.manifest_version}"
    roots = f"{len(after.weights_roots)} weights root(s)" if after.weights_roots else "NO weights yet (--weights ROOT)"
    terminal.note(f"{args.policy}: accepts {accepted}, {roots}")
    _advise(after)


def _advise(policy: Policy) -> None:
    """What still keeps the image that was pinned from being accepted."""
    image = policy.images[-1]
    for item in image.subjects:
        if item.name.startswith(_WEIGHTS) and item.sha256 not in policy.weights_roots:
            terminal.note(f"published with {item.name}, which is not accepted yet: --weights {item.sha256.hex()}")
    if image.simulated and not policy.simulated:
        terminal.note(
            f"the image is for platform {image.platform}, SIMULATED: not accepted by a policy that names no simulated"
            " root (`policy new --profile test --simulated-tdx-root SHA256`)"
        )
    if not set(image.mrseam) & set(policy.mrseam):
        tried = ", ".join(module.hex() for module in image.mrseam) or "none"
        terminal.note(f"the image was tried with TDX modules of which tdx.mrseam accepts none: {tried}")
