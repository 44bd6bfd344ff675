"""Has others vouch for the head of the log, every so often: a time-stamping authority, calendars of OpenTimestamps.

Off unless the operator names one. A thread of its own, which no request waits for. What comes back is written beside
the log, whole or not at all, as `anchors/0`, `anchors/1` and so on (`formats.anchors`), on the host's disk: nobody need
trust it, since whoever uses it checks it. A head that has not grown is not submitted again; a service that fails is
asked again after a minute, then after twice as long each time. Proofs that were pending are completed later, those of
earlier starts too, at those calendars alone that the operator named.

Checked here: that the answer is about what was asked, with our nonce. Not checked here: who signed it.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from countermark.errors import CountermarkError, FormatError, Unavailable
from countermark.fetch.https import Service, request
from countermark.files import read_file, write_file
from countermark.formats import ots
from countermark.formats.anchors import (
    FOLDER,
    MAX_ANCHORS_BYTES,
    MAX_TOKEN_BYTES,
    Anchor,
    AnchorKind,
    encode_anchors,
    parse_anchors,
)
from countermark.formats.timestamp import GRANTED, encode_request, parse_response, parse_token

FIRST_RETRY_S: Final = 60.0
MAX_UPGRADES: Final = 16  # requests for pending proofs in a round
_log = logging.getLogger(__name__)


class Submitter(Protocol):
    """Somebody who vouches for bytes."""

    @property
    def kind(self) -> AnchorKind: ...

    def submit(self, note: bytes) -> bytes:
        """A token over the note. Raises `Unavailable`, `FormatError`."""


@dataclass(frozen=True, slots=True)
class TimeStamps:
    """A time-stamping authority over HTTP (RFC 3161 3.4)."""

    service: Service
    kind: AnchorKind = AnchorKind.RFC3161

    def submit(self, note: bytes) -> bytes:
        digest, nonce = hashlib.sha256(note).digest(), 1 << 63 | secrets.randbits(63)
        answer = request(
            self.service,
            "",
            max_bytes=MAX_TOKEN_BYTES,
            body=encode_request(digest, nonce),
            content_type="application/timestamp-query",
        )
        status, token = parse_response(answer.body)
        if status not in GRANTED or token is None:
            raise Unavailable(f"{self.service.host}: expected a time stamp, got status {status}", code="anchor.refused")
        info = parse_token(token).info
        if (info.hash, info.imprint, info.nonce) != ("sha256", digest, nonce):
            text = f"{self.service.host}: expected a time stamp over what was asked, got another"
            raise Unavailable(text, code="anchor.answer")
        return token


@dataclass(frozen=True, slots=True)
class Calendars:
    """Calendars of OpenTimestamps: what they promise now, a block of Bitcoin's chain holds some hours later."""

    services: tuple[Service, ...]
    kind: AnchorKind = AnchorKind.OTS

    def submit(self, note: bytes) -> bytes:
        """One proof with the promises of all that answer."""
        digest = hashlib.sha256(note).digest()
        answers: list[tuple[bytes, bytes]] = []
        failure: CountermarkError | None = None
        for service in self.services:
            nonce = secrets.token_bytes(16)
            try:
                tree = self._ask(service, "/digest", body=ots.submission(digest, nonce))
                ots.encode_proof(digest, ((nonce, tree),))  # one that answers nonsense spoils its own answer alone
            except (Unavailable, FormatError) as err:
                failure = err
            else:
                answers.append((nonce, tree))
        if not answers:
            assert failure is not None
            raise failure
        return ots.encode_proof(digest, tuple(answers))

    def complete(self, token: bytes) -> bytes:
        """The proof with what calendars have come to know since. Raises `FormatError`."""
        for pending in reversed(ots.parse_proof(token).pending):  # from the end, so that earlier offsets stay right
            service = next((item for item in self.services if item.url.rstrip("/") == pending.uri.rstrip("/")), None)
            if service is None:
                continue
            try:
                tree = self._ask(service, f"/timestamp/{pending.message.hex()}")
                token = ots.upgrade(token, pending, tree)
            except (Unavailable, FormatError) as err:  # it says 404 until there is a block
                _log.debug("anchors: %s has nothing yet (%s)", service.host, err.code)
        return token

    @staticmethod
    def _ask(service: Service, path: str, *, body: bytes | None = None) -> bytes:
        limit = ots.MAX_PAYLOAD_BYTES
        answer = request(service, path, max_bytes=limit, body=body, content_type="application/octet-stream")
        return answer.body


@dataclass(slots=True)
class _Turn:
    """When a submitter is next asked, and what it last vouched for."""

    submitter: Submitter
    due: float = 0.0
    failures: int = 0
    note: bytes = field(default=b"")


class Anchors:
    """Asks every submitter in its turn, from `start` to `close`."""

    def __init__(
        self, log: Path, head: Callable[[], bytes], submitters: Sequence[Submitter], *, every_s: float
    ) -> None:
        """`log`: the running boot's directory. `head`: gives its latest signed checkpoint."""
        self._folder = log / FOLDER
        self._head = head
        self._turns = [_Turn(submitter) for submitter in submitters]
        self._every_s = every_s
        self._complete = 0.0
        self._done: set[Path] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="countermark-anchors", daemon=True)

    def start(self) -> None:
        """Ask for the first time at once: from then on the start itself is dated."""
        if self._turns:
            self._thread.start()

    def close(self) -> None:
        """Ask no more. A request that is on its way is not waited for."""
        self._end.set()

    def _run(self) -> None:
        wait_s = 0.0
        while not self._end.wait(wait_s):
            wait_s = max(0.0, self.round(time.monotonic()) - time.monotonic())

    def round(self, now: float) -> float:
        """Ask whoever is due at `now` (monotonic seconds). When the next one will be."""
        for turn in self._turns:
            if turn.due <= now and not self._end.is_set():
                turn.due = now + self._submit(turn)
        if self._complete <= now:
            self._complete = now + self._every_s
            self._complete_pending()
        return min([self._complete, *(turn.due for turn in self._turns)])

    def _submit(self, turn: _Turn) -> float:
        """In how many seconds to ask again."""
        note = self._head()
        if note == turn.note:
            return self._every_s
        try:
            token = turn.submitter.submit(note)
            self._write(Anchor(kind=turn.submitter.kind, checkpoint=note, proof=(), token=token))
        except (CountermarkError, OSError) as err:
            wait_s = min(self._every_s, FIRST_RETRY_S * 2.0**turn.failures)
            turn.failures = min(turn.failures + 1, 16)
            _log.warning("anchors: %s: %s; again in %.0f s", turn.submitter.kind.value, err, wait_s)
            return wait_s
        turn.note, turn.failures = note, 0
        return self._every_s

    def _write(self, anchor: Anchor) -> None:
        self._folder.mkdir(mode=0o755, exist_ok=True)
        taken = [int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()]
        write_file(self._folder / str(max(taken, default=-1) + 1), encode_anchors((anchor,)), mode=0o644)

    def _complete_pending(self) -> None:
        calendars = [turn.submitter for turn in self._turns if isinstance(turn.submitter, Calendars)]
        paths = sorted(self._folder.parent.parent.glob(f"*/{FOLDER}/*"), reverse=True) if calendars else []
        asked = 0
        for path in paths:
            if path in self._done or not path.name.isdecimal() or asked == MAX_UPGRADES or self._end.is_set():
                continue
            try:
                (anchor,) = parse_anchors(read_file(path, max_bytes=MAX_ANCHORS_BYTES))
                if anchor.kind is not AnchorKind.OTS or ots.parse_proof(anchor.token).blocks:
                    self._done.add(path)
                    continue
                asked += 1
                token = calendars[0].complete(anchor.token)
                if token != anchor.token:
                    write_file(path, encode_anchors((replace(anchor, token=token),)), mode=0o644)
            except (CountermarkError, OSError, ValueError) as err:  # the disk is the host's
                _log.warning("anchors: %s/%s: %s", path.parent.parent.name, path.name, err)
                self._done.add(path)
