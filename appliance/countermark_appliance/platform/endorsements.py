"""What the vendors signed about this machine, kept on a disk and renewed before it expires.

The disk is the host's, and so may be a service of endorsements (a PCCS): nothing that is read or fetched is taken
unless its form is right and, for Intel's endorsements and RIMs, the vendor's signature holds. Of each thing one file is
kept, written whole or not at all. What is older than what is kept (its issue dates, its tcbEvaluationDataNumber) is not
taken, and what is kept is served until it expires when no service answers. A host that clears the disk and holds back
newer endorsements gains what their validity allows; verifiers judge all of it themselves.

Renewed a day after it was fetched, or after half of what is left of its validity if that comes first, and after every
start. What fails is tried again, at first after a minute. Log lines name host and status, or a code.

Not checked here: the signatures of OCSP responses, and the TCB level.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from countermark import x509chain
from countermark.errors import ConfigError, CountermarkError, FormatError, Unavailable, UsageError
from countermark.fetch import Validity, intel, nvidia
from countermark.fetch.https import Service
from countermark.files import read_file, write_file
from countermark.formats.evidence import Endorsements, GpuEvidence
from countermark.formats.quote import parse_quote
from countermark.formats.spdm import parse_report
from countermark_appliance.config import Config

DAY_S: Final = 86_400
MIN_WAIT_S: Final = 60
MAX_BACKOFF_S: Final = 3600
_log = logging.getLogger(__name__)


class Kind(Enum):
    """What an item is."""

    TDX = "tdx"
    RIM = "rim"
    CRL = "crl"
    OCSP = "ocsp"


_MAX_BYTES: Final = {Kind.TDX: 1 << 20, Kind.RIM: 256 * 1024, Kind.CRL: 256 * 1024, Kind.OCSP: 16 * 1024}


def _nothing(_data: bytes) -> tuple[Item, ...]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing to keep, in a file of that name.

    `read` says how long it holds, at a time, and raises for what must not be kept. `asks_for`: what else its holder
    needs, such as what the responder says of a manifest's signer.
    """

    kind: Kind
    file: str
    fetch: Callable[[], bytes]
    read: Callable[[bytes, int], Validity]
    asks_for: Callable[[bytes], Sequence[Item]] = _nothing


@dataclass(slots=True)
class _Kept:
    """An item with what is known of it. `due`: when to fetch it next, by a clock that nobody sets.

    `asked_for`: the files of what its data asks for.
    """

    item: Item
    data: bytes = b""
    validity: Validity | None = None
    due: float = 0
    failures: int = 0
    asked_for: tuple[str, ...] = ()

    def holds(self, now: float) -> bool:
        return self.validity is not None and self.validity.issued <= now <= self.validity.until


class EndorsementCache:
    """`platform.base.EndorsementSource` over a directory. Thread-safe. Close it when done."""

    def __init__(
        self,
        directory: Path,
        items: Sequence[Item],
        *,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read what the directory holds. Raises `ConfigError` `platform.endorsements_dir` when it cannot be made."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            message = f"endorsements.dir: {directory}: {err.strerror}"
            raise ConfigError(message, code="platform.endorsements_dir") from err
        self._directory = directory
        self._clock = clock
        self._ticks = ticks
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()  # over what is kept
        self._passing = threading.Lock()  # over the fetching
        self._stop = threading.Event()
        self._named = tuple(item.file for item in items)
        self._add(items)

    def current(self) -> Endorsements:
        """What holds now; of the GPUs' what there is. Raises `Unavailable` `platform.endorsements` without Intel's."""
        now = self._clock()
        with self._lock:
            kept = self._needed(now)
            found = {kind: [one.data for one in kept if one.item.kind is kind and one.holds(now)] for kind in Kind}
        if not found[Kind.TDX]:
            message = "endorsements: expected some of Intel's that hold now, got none; the node's log says why"
            raise Unavailable(message, code="platform.endorsements")
        return Endorsements(
            tdx=found[Kind.TDX][0],
            gpu_rims=tuple(found[Kind.RIM]),
            gpu_crls=tuple(found[Kind.CRL]),
            gpu_ocsp=tuple(found[Kind.OCSP]),
        )

    def refresh(self) -> float:
        """Fetch what is due, one after the other. Returns how many seconds there are until the next one is."""
        with self._passing:
            while True:
                due = [one for one in self._needed() if one.due <= self._ticks()]
                if not due or self._stop.is_set():
                    break
                for one in due:  # some of which may ask for more
                    if not self._stop.is_set():
                        self._renew(one)
            return max(1.0, min(one.due for one in self._needed()) - self._ticks())

    def start(self) -> None:
        """Renew from now on, in a thread of its own."""
        threading.Thread(target=self._run, name="endorsements", daemon=True).start()

    def close(self) -> None:
        """Stop renewing. A request that is under way ends by itself. Idempotent."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self.refresh()):
            pass

    def _add(self, items: Sequence[Item]) -> None:
        for item in items:
            if item.file in self._kept:
                continue
            one = _Kept(item=item, due=self._ticks())
            self._load(one)
            with self._lock:
                self._kept[item.file] = one
            if one.validity is not None:
                self._ask(one)

    def _ask(self, one: _Kept) -> None:
        items = one.item.asks_for(one.data)
        self._add(items)
        with self._lock:
            one.asked_for = tuple(item.file for item in items)

    def _needed(self, now: float | None = None) -> list[_Kept]:
        """What was named at the start, and what that asks for: of what holds at `now`, or of everything.

        A verifier refuses a responder's word on the signer of a manifest that has been replaced, or that is not there.
        """
        files = dict.fromkeys(self._named)
        queue = list(files)
        while queue:
            one = self._kept[queue.pop()]
            if now is None or one.holds(now):
                new = [file for file in one.asked_for if file not in files]
                files.update(dict.fromkeys(new))
                queue += new
        return [self._kept[file] for file in files]

    def _load(self, one: _Kept) -> None:
        path = self._directory / one.item.file
        if not path.exists():
            return
        try:
            data = read_file(path, max_bytes=_MAX_BYTES[one.item.kind])
            one.validity = one.item.read(data, int(self._clock()))
            one.data = data
        except CountermarkError as err:
            _log.warning("endorsements: %s on disk not used: %s", one.item.kind.value, err.code)

    def _renew(self, one: _Kept) -> None:
        now, kind = self._clock(), one.item.kind.value
        try:
            data = one.item.fetch()
            validity = one.item.read(data, int(now))
            _supersedes(validity, one.validity, now)
        except CountermarkError as err:
            one.failures += 1
            one.due = self._ticks() + min(MAX_BACKOFF_S, MIN_WAIT_S * 2 ** min(one.failures - 1, 10))
            reason = str(err) if isinstance(err, Unavailable) else err.code
            _log.warning("endorsements: %s not renewed, %s: %s", kind, "held" if one.holds(now) else "NONE", reason)
            return
        with self._lock:
            one.data, one.validity = data, validity
        one.failures = 0
        one.due = self._ticks() + max(MIN_WAIT_S, min(DAY_S, (validity.until - now) / 2))
        try:
            write_file(self._directory / one.item.file, data)
        except UsageError as err:
            _log.warning("endorsements: %s not written: %s", kind, err.code)
        self._ask(one)


def _supersedes(new: Validity, old: Validity | None, now: float) -> None:
    if not new.issued <= now <= new.until:
        raise FormatError("endorsements: expected some that hold now", code="platform.endorsements_dates")
    if old is not None and any(a < b for a, b in zip(new.ages, old.ages, strict=True)):
        raise FormatError("endorsements: expected none older than those kept", code="platform.endorsements_older")


def tdx_item(quote: bytes, source: intel.Source, *, root: bytes = intel.ROOT) -> Item:
    """Intel's endorsements for the machine that made a quote. `root`: SHA-256, another's for a simulated vendor.

    Raises `FormatError` as `parse_quote` and `intel.wanted_by`.
    """
    wanted = intel.wanted_by(parse_quote(quote).pck_chain_pem)
    return Item(
        kind=Kind.TDX,
        file=f"tdx-{wanted.fmspc.hex()}-{wanted.ca}.json",
        fetch=lambda: intel.fetch_collateral_for(wanted, source),
        read=lambda data, now: intel.verify_collateral(data, now=now, root=root),
    )


def rim_item(rim_id: str, rims: Service, responder: Service, *, root: bytes = nvidia.ROOT) -> Item:
    """One of NVIDIA's reference manifests, and what the responder says of its signers. `root`: as in `tdx_item`."""
    return Item(
        kind=Kind.RIM,
        file=f"rim-{rim_id}.xml",
        fetch=lambda: nvidia.fetch_rim(rim_id, rims),
        read=lambda data, now: nvidia.verify_stored_rim(data, now=now, root=root),
        asks_for=lambda data: ocsp_items(nvidia.rim_signers(data), responder),
    )


def ocsp_items(pairs: Sequence[tuple[x509.Certificate, x509.Certificate]], responder: Service) -> tuple[Item, ...]:
    """What the responder says of each (certificate, issuer)."""
    return tuple(
        Item(
            kind=Kind.OCSP,
            file=f"ocsp-{hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()}.der",
            fetch=functools.partial(nvidia.fetch_ocsp, certificate, issuer, responder),
            read=lambda data, _now: nvidia.ocsp_validity(data),
        )
        for certificate, issuer in pairs
    )


def gpu_items(
    gpus: Sequence[GpuEvidence], rims: Service, responder: Service, *, root: bytes = nvidia.ROOT
) -> tuple[Item, ...]:
    """The manifests that the GPUs' reports ask for, and what the responder says of their chains.

    Raises `FormatError` for reports and chains that do not parse, `UsageError` `usage.rim_id`.
    """
    chains = [x509chain.parse_der_chain(gpu.certs, "gpu") for gpu in gpus]
    pairs = zip(gpus, chains, strict=True)
    ids = dict.fromkeys(name for gpu, chain in pairs for name in nvidia.rim_ids(parse_report(gpu.report), chain[0]))
    return (
        *(rim_item(rim_id, rims, responder, root=root) for rim_id in ids),
        *(item for chain in chains for item in ocsp_items(nvidia.revocable(chain, device=True), responder)),
    )


def folder_items(folder: Path, *, root: bytes = nvidia.ROOT) -> tuple[Item, ...]:
    """What an operator has put into a folder: RIMs (.xml, .swidtag), CRLs (.crl) and OCSP responses (.ocsp).

    Raises `ConfigError` `platform.endorsements_dir`.
    """
    readers: dict[str, tuple[Kind, Callable[[bytes, int], Validity]]] = {
        ".xml": (Kind.RIM, lambda data, now: nvidia.verify_stored_rim(data, now=now, root=root)),
        ".crl": (Kind.CRL, lambda data, _now: nvidia.crl_validity(data)),
        ".ocsp": (Kind.OCSP, lambda data, _now: nvidia.ocsp_validity(data)),
    }
    readers[".swidtag"] = readers[".xml"]
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in readers)
    except OSError as err:
        message = f"endorsements.gpu_dir: {folder}: {err.strerror}"
        raise ConfigError(message, code="platform.endorsements_dir") from err
    return tuple(
        Item(
            kind=readers[path.suffix][0],
            file=f"folder-{hashlib.sha256(path.name.encode()).hexdigest()}",
            fetch=functools.partial(read_file, path, max_bytes=_MAX_BYTES[readers[path.suffix][0]]),
            read=readers[path.suffix][1],
        )
        for path in paths
    )


def open_endorsements(config: Config, quote: bytes, gpus: Sequence[GpuEvidence]) -> EndorsementCache:
    """The cache that a configuration names, filled as far as its sources answer, and renewed from now on.

    `quote`, `gpus`: evidence of this machine, which says what to look for. NVIDIA is asked unless the configuration
    names a folder. Raises `ConfigError` and `FormatError` as the functions above, `UsageError` `usage.url`.
    """
    if config.endorsements_dir is None:
        raise ConfigError("endorsements.dir: expected a string on platform tdx, got nothing", code="config.missing")
    if config.endorsements_url is None:
        source = intel.intel()
    else:
        source = intel.pccs(Service(url=config.endorsements_url, ca_file=config.endorsements_ca_file))
    if config.endorsements_gpu_dir is not None:
        of_gpus = folder_items(config.endorsements_gpu_dir)
    else:
        of_gpus = gpu_items(gpus, Service(url=nvidia.RIM_URL), Service(url=nvidia.OCSP_URL))
    cache = EndorsementCache(config.endorsements_dir, (tdx_item(quote, source), *of_gpus))
    cache.refresh()
    cache.start()
    return cache
