"""One frozen Config from one measured TOML file.

The bytes of the file are what is measured (`digest`, SHA-256, extended into RTMR3); so nothing here reads an
environment variable or fills in a machine's default. Relative paths are relative to the file. Unknown keys are refused
by name. docs/operator.md lists every key. Not checked here: whether the paths exist; whoever opens them says so.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark.errors import ConfigError, UsageError
from countermark.fetch.https import Service
from countermark.formats.schema import MAX_TEXT
from countermark_appliance.operations import logs
from countermark_appliance.operations.quotas import Key, parse_keys

MAX_BYTES = 64 * 1024
DEVICES = ("cpu", "cuda")
_OPERATOR = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_HEX32 = re.compile(r"[0-9a-f]{64}")
_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]_~/-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The appliance's configuration, every default resolved."""

    digest: bytes  # SHA-256 of the file
    operator: str  # names the log: origin `<operator>/<boot_id>`
    listen_host: str
    listen_port: int  # 0: any free port, printed when ready
    platform: str  # sim | tdx | vtpm
    platform_state: Path | None  # sim: the directory `countermark-appliance sim new` made
    endorsements_dir: Path | None  # tdx: where Intel's endorsements are cached
    endorsements_url: str | None  # tdx: a PCCS; None is Intel's own service
    endorsements_ca_file: Path | None  # tdx: PEM authorities for that PCCS; None is the system's
    endorsements_gpu_dir: Path | None  # tdx: RIMs, CRLs and OCSP responses for the GPUs
    weights_dir: Path
    weights_root: bytes  # the dm-verity root hash the weights must have
    log_dir: Path
    log_operator_dir: Path | None  # where the operator log is published
    anchors_tsa: Service | None  # a time-stamping authority
    anchors_calendars: tuple[Service, ...]  # of OpenTimestamps
    anchors_every_s: int
    threads: int  # 0: one for each core
    device: str  # cpu | cuda: what computes; no bit depends on it
    max_sequences: int
    max_waiting: int
    deployer_id: str | None
    retention_until: str | None
    telemetry_metrics: tuple[str, int] | None  # where Prometheus may scrape, over plain HTTP
    telemetry_otlp_url: str | None  # an OpenTelemetry collector, OTLP over gRPC
    telemetry_logs: str  # text | json
    keys: tuple[Key, ...]  # who may ask; none: everybody


# table -> key -> (types, default); a default of ... means the key is required
_SCHEMA: dict[str, dict[str, tuple[type, Any]]] = {
    "node": {"operator": (str, ...), "listen": (str, "127.0.0.1:0")},
    "platform": {"name": (str, ...), "state": (str, None)},
    "endorsements": {"dir": (str, None), "pccs_url": (str, None), "ca_file": (str, None), "gpu_dir": (str, None)},
    "weights": {"dir": (str, ...), "root": (str, ...)},
    "log": {"dir": (str, ...), "operator_dir": (str, None)},
    "anchors": {"tsa_url": (str, None), "ots_calendars": (str, None), "every_s": (int, 3600)},
    "engine": {"threads": (int, 0), "device": (str, "cpu"), "max_sequences": (int, 16), "max_waiting": (int, 64)},
    "record": {"deployer_id": (str, None), "retention_until": (str, None)},
    "telemetry": {"metrics": (str, None), "otlp_url": (str, None), "logs": (str, "text")},
}
_KEYS = "key"  # [[key]]: `operations.quotas`
_KINDS = {str: "a string", int: "an integer"}
_BOUNDS = {
    "anchors.every_s": (60, 604_800),
    "engine.threads": (0, 256),
    "engine.max_sequences": (1, 256),
    "engine.max_waiting": (0, 4096),
}
MAX_CALENDARS = 8


def load_config(path: Path) -> Config:
    """Read and parse a configuration file. Raises `ConfigError`, naming the key."""
    try:
        data = path.read_bytes()
    except OSError as err:
        raise ConfigError(f"config: {path}: {err.strerror}", code="config.unreadable") from err
    return parse_config(data, base=path.resolve().parent)


def parse_config(data: bytes, *, base: Path) -> Config:
    """Parse the TOML bytes; relative paths are taken from `base`. Raises `ConfigError`, naming the key."""
    if len(data) > MAX_BYTES:
        raise ConfigError(f"config: expected at most {MAX_BYTES} bytes, got {len(data)}", code="config.too_long")
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as err:  # ValueError: bad TOML, bad UTF-8, an integer of 5000 digits
        raise ConfigError(f"config: expected TOML: {err}", code="config.malformed") from err
    keys = parse_keys(document.pop(_KEYS, []))
    values = _flatten(document)
    host, port = parse_address(values["listen"], name="node.listen")
    if not _OPERATOR.fullmatch(values["operator"]):
        raise ConfigError(
            f"node.operator: expected lower-case letters, digits, '.' and '-', got {values['operator']!r}",
            code="config.value",
        )
    if not _HEX32.fullmatch(values["root"]):
        raise ConfigError(
            f"weights.root: expected 64 lower-case hex digits, got {values['root']!r:.70}", code="config.value"
        )
    if values["device"] not in DEVICES:
        raise ConfigError(
            f"engine.device: expected {' or '.join(DEVICES)}, got {values['device']!r:.70}", code="config.value"
        )
    if values["name"] == "tdx" and values["endorsements.dir"] is None:
        raise ConfigError("endorsements.dir: expected a string on platform tdx, got nothing", code="config.missing")
    if values["pccs_url"] is not None and not _URL.fullmatch(values["pccs_url"]):
        message = f"endorsements.pccs_url: expected an http or https URL, got {values['pccs_url']!r:.70}"
        raise ConfigError(message, code="config.value")
    if values["otlp_url"] is not None and not _URL.fullmatch(values["otlp_url"]):
        message = f"telemetry.otlp_url: expected an http or https URL, got {values['otlp_url']!r:.70}"
        raise ConfigError(message, code="config.value")
    if values["logs"] not in logs.FORMS:
        message = f"telemetry.logs: expected {' or '.join(logs.FORMS)}, got {values['logs']!r:.70}"
        raise ConfigError(message, code="config.value")
    for name, (low, high) in _BOUNDS.items():
        value = values[name.partition(".")[2]]
        if not low <= value <= high:
            raise ConfigError(f"{name}: expected {low} to {high}, got {value}", code="config.value")
    metrics = values["metrics"]
    authorities = _services("anchors.tsa_url", values["tsa_url"], most=1)
    return Config(
        digest=hashlib.sha256(data).digest(),
        operator=values["operator"],
        listen_host=host,
        listen_port=port,
        platform=values["name"],
        platform_state=_below(base, values["state"]),
        endorsements_dir=_below(base, values["endorsements.dir"]),
        endorsements_url=values["pccs_url"],
        endorsements_ca_file=_below(base, values["ca_file"]),
        endorsements_gpu_dir=_below(base, values["gpu_dir"]),
        weights_dir=base / values["weights.dir"],
        weights_root=bytes.fromhex(values["root"]),
        log_dir=base / values["log.dir"],
        log_operator_dir=_below(base, values["operator_dir"]),
        anchors_tsa=authorities[0] if authorities else None,
        anchors_calendars=_services("anchors.ots_calendars", values["ots_calendars"], most=MAX_CALENDARS),
        anchors_every_s=values["every_s"],
        threads=values["threads"],
        device=values["device"],
        max_sequences=values["max_sequences"],
        max_waiting=values["max_waiting"],
        deployer_id=values["deployer_id"],
        retention_until=values["retention_until"],
        telemetry_metrics=None if metrics is None else parse_address(metrics, name="telemetry.metrics"),
        telemetry_otlp_url=values["otlp_url"],
        telemetry_logs=values["logs"],
        keys=keys,
    )


def parse_address(text: str, *, name: str = "address") -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` to its parts. Raises `ConfigError` (`config.address`)."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([A-Za-z0-9.-]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ConfigError(f"{name}: expected HOST:PORT, with a port up to 65535, got {text!r}", code="config.address")
    return match[1] or match[2], int(match[3])


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _below(base: Path, path: str | None) -> Path | None:
    return None if path is None else base / path


def _services(name: str, text: str | None, *, most: int) -> tuple[Service, ...]:
    """The URLs in a string, between spaces."""
    urls = [] if text is None else text.split()
    if text is not None and not 1 <= len(urls) <= most:
        raise ConfigError(f"{name}: expected 1 to {most} URLs, got {len(urls)}", code="config.value")
    try:
        return tuple(Service(url=url) for url in urls)
    except UsageError as err:
        raise ConfigError(f"{name}: {err}", code="config.value") from err


def _flatten(document: Mapping[str, Any]) -> dict[str, Any]:
    """Check every table and key against the schema; `dir` stands in several, so it keeps its table's name."""
    values: dict[str, Any] = {}
    for table in sorted(document.keys() - _SCHEMA.keys()):
        raise _unknown("a table", [*_SCHEMA, _KEYS], table)
    for table, keys in _SCHEMA.items():
        given = document.get(table, {})
        if not isinstance(given, dict):
            raise ConfigError(f"{table}: expected a table [{table}], got {type(given).__name__}", code="config.value")
        for key in sorted(given.keys() - keys.keys()):
            raise _unknown("a key", [f"{table}.{name}" for name in keys], f"{table}.{key}")
        for key, (kind, default) in keys.items():
            if key not in given and default is ...:
                raise ConfigError(f"{table}.{key}: expected {_KINDS[kind]}, got nothing", code="config.missing")
            value = given.get(key, default)
            if key in given and (not isinstance(value, kind) or isinstance(value, bool)):
                message = f"{table}.{key}: expected {_KINDS[kind]}, got {value!r:.60}"
                raise ConfigError(message, code="config.value")
            if isinstance(value, str) and not (len(value) <= MAX_TEXT and value.isprintable()):
                message = f"{table}.{key}: expected at most {MAX_TEXT} printable characters"
                raise ConfigError(message, code="config.value")
            values[f"{table}.{key}" if key == "dir" else key] = value
    return values


def _unknown(what: str, known: Iterable[str], got: str) -> ConfigError:
    return ConfigError(f"config: expected {what} of {', '.join(known)}, got {got!r:.80}", code="config.unknown_key")
