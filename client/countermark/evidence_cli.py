"""`countermark evidence`: appraise raw evidence files. Arguments, files and printing; `genuine` decides."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from countermark import arguments, terminal, x509chain
from countermark.appraise import TimeBasis
from countermark.errors import CountermarkError, FormatError, UsageError
from countermark.files import read_file
from countermark.genuine import (
    FileAppraisal,
    GpuFiles,
    appraise_event_log_files,
    appraise_gpu_bundle,
    appraise_gpu_files,
    appraise_tdx_files,
)
from countermark.policy import KNOWN_MRSEAM, Policy, Profile, load_policy, new_policy

Command = Callable[..., argparse.ArgumentParser]


def add_commands(commands: Any, command: Command) -> None:
    """Add `evidence` and its kinds. `command(commands, name, run, text, json_=...)` makes one parser."""
    kinds = commands.add_parser("evidence", help="appraise raw evidence files: quotes, event logs, GPU reports")
    kinds = kinds.add_subparsers(required=True, metavar="KIND")

    tdx = command(kinds, "tdx", _tdx, "appraise a TDX quote with Intel's endorsements", json_=True)
    tdx.add_argument("quote", type=Path, metavar="QUOTE", help="binary or hex text, version 4 or 5")
    tdx.add_argument("--collateral", type=Path, required=True, metavar="JSON", help="QuoteCollateralV3, as PCCS gives")
    tdx.add_argument("--root-ca", type=Path, metavar="DER", help="root certificate (default: Intel's SGX root)")
    _common(tdx)

    log = command(kinds, "eventlog", _eventlog, "replay an event log to the registers of a TDX quote", json_=True)
    log.add_argument("log", type=Path, metavar="LOG", help="CCEL (binary) or a JSON event list")
    log.add_argument("--quote", type=Path, required=True, metavar="QUOTE", help="binary or hex text")

    gpu = command(kinds, "gpu", _gpu, "appraise reports of NVIDIA GPUs", json_=True)
    what = gpu.add_mutually_exclusive_group(required=True)
    what.add_argument("--report", type=Path, metavar="R", help="one SPDM report, binary or hex text")
    what.add_argument("--bundle", type=Path, metavar="JSON", help="NVIDIA's serialised evidence of one or more GPUs")
    gpu.add_argument("--certs", type=Path, metavar="CHAIN", help="certificates of --report, device first (PEM or DER)")
    gpu.add_argument("--nonce", type=arguments.nonce, metavar="HEX", help="what was asked; needed with --report")
    for name, text in (("rim", "signed RIMs"), ("crl", "CRLs (DER)"), ("ocsp", "OCSP responses (DER)")):
        gpu.add_argument(f"--{name}", type=Path, nargs="+", action="extend", default=[], metavar="F", help=text)
    _common(gpu)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=Path, help="default: the strict one of `policy new` at that time")
    parser.add_argument(
        "--at", type=arguments.moment, help="RFC 3339 time, Unix seconds or 'now' (default: now)", metavar="TIME"
    )


def _tdx(args: argparse.Namespace) -> CountermarkError | None:
    now, basis = _time(args)
    quote, collateral = read_file(args.quote), read_file(args.collateral)
    policy = _policy(args, now)
    if args.root_ca is not None:
        policy = _with_root(args.root_ca, policy, named=args.policy is not None, now=now)
    return _show(args, appraise_tdx_files(quote, collateral, policy, now=now, basis=basis))


def _eventlog(args: argparse.Namespace) -> CountermarkError | None:
    log, quote = read_file(args.log), read_file(args.quote)
    return _show(args, appraise_event_log_files(log, quote, now=int(time.time())))


def _gpu(args: argparse.Namespace) -> CountermarkError | None:
    now, basis = _time(args)
    policy = _policy(args, now)
    files = GpuFiles(
        rims=tuple(map(read_file, args.rim)),
        crls=tuple(map(read_file, args.crl)),
        ocsp=tuple(map(read_file, args.ocsp)),
    )
    if args.bundle is not None:
        if args.certs is not None:
            raise UsageError("--certs: expected none, because --bundle holds them", code="usage.gpu")
        data = read_file(args.bundle)
        return _show(args, appraise_gpu_bundle(data, args.nonce, policy, now=now, basis=basis, files=files))
    if args.certs is None or args.nonce is None:
        raise UsageError("--report: expected --certs and --nonce with it", code="usage.gpu")
    report, certs = read_file(args.report), read_file(args.certs)
    return _show(args, appraise_gpu_files(report, certs, args.nonce, policy, now=now, basis=basis, files=files))


def _time(args: argparse.Namespace) -> tuple[int, TimeBasis]:
    return (int(time.time()), TimeBasis.NOW) if args.at is None else (args.at, TimeBasis.ASSUMED)


def _policy(args: argparse.Namespace, now: int) -> Policy:
    return new_policy(Profile.PRODUCTION, now=now) if args.policy is None else load_policy(args.policy)


def _with_root(path: Path, policy: Policy, *, named: bool, now: int) -> Policy:
    data = read_file(path)
    try:
        pem = data.lstrip().startswith(b"-----")
        chain = x509chain.parse_pem_chain(data, "root") if pem else x509chain.parse_der_chain([data], "root")
    except FormatError as err:
        raise UsageError(f"{path}: {err}", code="usage.root") from err
    root = x509chain.digest(chain[-1])
    if root == policy.tdx_root:
        return policy
    if named:
        message = f"--root-ca: expected the policy's root {policy.tdx_root.hex()}, got {root.hex()}"
        raise UsageError(message, code="usage.root")
    policy = new_policy(Profile.TEST, now=now, simulated_tdx_root=root)
    # Who holds that root's key can state any module; made evidence often states one of Intel's.
    return replace(policy, mrseam=(*policy.mrseam, *KNOWN_MRSEAM))


def _show(args: argparse.Namespace, result: FileAppraisal) -> CountermarkError | None:
    """Checks to stderr, the result to stdout; returns what decides the exit code."""
    if result.simulated:
        terminal.show_simulated()
    terminal.show_checks(result.checks)
    terminal.note(f"time: {result.time_basis.value}")
    if result.code.endswith("expired") and result.time_basis is TimeBasis.NOW:
        terminal.note("to judge old files as of a time at which they were valid: --at TIME")
    print(json.dumps(result.as_json()) if args.json else terminal.printable(str(result)))
    return result.failure
