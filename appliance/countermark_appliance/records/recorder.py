"""The recorder: what the service calls before the first token, after the last one, and for the receipt.

Order: `open` (EPOCH and what the last boot left unfinished, one commit) · `commit_intent` returns when the INTENT is
durable, with the `Acceptance` the client is sent first · `commit_outcome` or `commit_abort` · `receipt`. Records and
salts are returned, never written to disk: the log holds salted commitments only. The clock is the TD's, which the host
sets.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from countermark.errors import ConfigError, LogError, Unavailable
from countermark.formats import records
from countermark.formats.receipt import Acceptance, Payload, Proven, ReplayPayload
from countermark.formats.records import (
    Abort,
    Crashed,
    Divergence,
    Epoch,
    Intent,
    Outcome,
    PlainGrammar,
    Previous,
    Record,
    Replay,
    Retrieval,
    Sampling,
    Stack,
)
from countermark.formats.retrieval import RetrievalSet
from countermark.formats.witnessed import Sidecar
from countermark_appliance.platform.keyring import Keyring
from countermark_appliance.records.journal import FULL, sync_directory
from countermark_appliance.records.previous import PreviousLog, find_previous, write_sidecar
from countermark_appliance.records.signer import Signer
from countermark_appliance.records.store import Appended, BuildLeaf, LogStore
from countermark_appliance.records.witnessed import BootProof, WitnessedEpoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A durable INTENT. `acceptance` goes to the client as it is."""

    intent: Intent
    acceptance: Acceptance
    leaf: bytes  # leaf hash: what OUTCOME and ABORT refer to
    attested_size: int
    size: int  # of the tree under `acceptance.checkpoint`


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A durable OUTCOME. `field_salts` goes to the client with the receipt."""

    committed: Committed
    outcome: Outcome
    record: bytes
    leaf_salt: bytes
    field_salts: bytes
    index: int
    size: int
    checkpoint: bytes


def log_origin(operator: str, boot_id: bytes) -> str:
    """The origin of a boot's log: `<operator>/<boot id in hex>`."""
    return f"{operator}/{boot_id.hex()}"


class Recorder:
    """One boot's recorder over an exclusively locked directory. Thread-safe."""

    def __init__(
        self,
        *,
        store: LogStore,
        signer: Signer,
        sidecar: Sidecar,
        lock: int,
        owner: tuple[str | None, str | None],
        operator_dir: Path | None,
    ) -> None:
        """Use `Recorder.open`. `owner`: deployer id and retention-until."""
        self._store = store
        self._signer = signer
        self._lock = lock
        self._owner = owner
        self._open: set[bytes] = set()
        self._open_lock = threading.Lock()
        self._witnessed = None if operator_dir is None else WitnessedEpoch(operator_dir, sidecar, self._first_leaf)
        self.epoch = sidecar.epoch

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        operator: str,
        keyring: Keyring,
        evidence_digest: bytes,
        stack: Stack,
        deployer_id: str | None = None,
        retention_until: str | None = None,
        operator_dir: Path | None = None,
    ) -> Recorder:
        """Lock the directory, verify the previous log, begin this boot's with its EPOCH and CRASHED leaves.

        `evidence_digest`: quote digest of the boot evidence, whose claims give this log as empty (size 0,
        `tlog.merkle.EMPTY_ROOT`). `operator_dir`: where the operator log is published, if it is. Raises `ConfigError`
        (`log.locked`: another process has it; `log.directory`), `LogError` (`log.previous`, `log.damaged`,
        `log.lost`), `Unavailable` (`log.full`: no room to begin).
        """
        lock = _lock(directory)
        try:
            previous = find_previous(directory)
            epoch = Epoch(
                boot_id=keyring.boot_id,
                origin=log_origin(operator, keyring.boot_id),
                epoch=previous.epoch.epoch + 1 if previous else 1,
                started_us=_now_us(),
                evidence_digest=evidence_digest,
                keys_digest=keyring.digest(),
                stack=stack,
                previous=_previous(previous),
            )
            signer = Signer(keyring)
            sidecar = Sidecar(epoch=epoch, salt=secrets.token_bytes(32), keys=keyring.role_keys())
            store = _begin(directory, sidecar, signer, previous.open_intents if previous else ())
        except OSError as err:
            os.close(lock)
            raise _unusable(directory, err) from err
        except BaseException:
            os.close(lock)
            raise
        return cls(
            store=store,
            signer=signer,
            sidecar=sidecar,
            lock=lock,
            owner=(deployer_id, retention_until),
            operator_dir=operator_dir,
        )

    def commit_intent(
        self,
        *,
        nonce: bytes,
        quote_digest: bytes,
        attested_size: int,
        raw_request: bytes,
        prompt: bytes,
        prompt_tokens: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
        stop_tokens: Sequence[int],
        ignore_eos: bool,
        logprobs: bool = False,
        retrieval: RetrievalSet | None = None,
        grammar: PlainGrammar | None = None,
    ) -> Committed:
        """Commit to a request, durably. No token may be computed before this returns.

        `quote_digest`, `attested_size`: digest and `log_size` of the connection's Attest quote. `raw_request`: the
        request's bytes as received. `prompt`: `formats.records.encode_input` of it. Raises `Unavailable`: `log.full`,
        `log.failed`, `log.closed`; `FormatError` (`record.field`) on a value out of its type's range.
        """
        salts = {name: secrets.token_bytes(32) for name in records.INTENT_FIELDS}
        retrieved = None
        if retrieval is not None:
            salts |= {name: secrets.token_bytes(32) for name in records.RETRIEVAL_FIELDS}
            named = {part: (f"retrieval.{part}", value) for part, value in retrieval.values().items()}
            retrieved = Retrieval(
                **{part: records.field_commitment(name, salts[name], value) for part, (name, value) in named.items()}
            )
        constrained = None
        if grammar is not None:
            salts |= {name: secrets.token_bytes(32) for name in records.GRAMMAR_FIELDS}
            constrained = records.commit_grammar(grammar, salts)
        values = {"raw_request": raw_request, "prompt": prompt, "prompt_tokens": records.encode_tokens(prompt_tokens)}
        intent = Intent(
            boot_id=self.epoch.boot_id,
            request_id=secrets.token_bytes(16),
            nonce=nonce,
            accepted_us=_now_us(),
            quote_digest=quote_digest,
            stack=self.epoch.stack,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=tuple(stop),
            stop_tokens=tuple(stop_tokens),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            deployer_id=self._owner[0],
            retention_until=self._owner[1],
            retrieval=retrieved,
            grammar=constrained,
            **{name: records.field_commitment(name, salts[name], value) for name, value in values.items()},
        )
        record, leaf_salt = records.encode_record(intent), secrets.token_bytes(32)
        appended = self._store.append([_build(intent, leaf_salt, record)], new=True)
        with self._open_lock:
            self._open.add(appended.hashes[0])
        acceptance = Acceptance(
            record=record,
            leaf_salt=leaf_salt,
            field_salts=records.encode_salts(salts),
            leaf_index=appended.index,
            proof=self._store.inclusion(appended.index, appended.size),
            checkpoint=appended.checkpoint,
            prompt_tokens=tuple(prompt_tokens),
        )
        return Committed(
            intent=intent,
            acceptance=acceptance,
            leaf=appended.hashes[0],
            attested_size=attested_size,
            size=appended.size,
        )

    def commit_outcome(
        self,
        committed: Committed,
        *,
        output_tokens: Sequence[int],
        output_text: str,
        fingerprints: Sequence[bytes],
        finish_reason: str,
        cached_tokens: int,
        first_token_time: float | None,
        end_time: float,
    ) -> Completed:
        """Commit to a complete answer (`finish_reason`: stop, eos or length). Times: UTC seconds since 1970.

        Raises as `commit_intent`, and `LogError` (`log.ended`) when the INTENT has its end already.
        """
        salts = {name: secrets.token_bytes(32) for name in records.OUTCOME_FIELDS}
        values = {
            "output_tokens": records.encode_tokens(output_tokens),
            "output_text": output_text.encode(),
            "fingerprints": b"".join(fingerprints),
        }
        outcome = Outcome(
            boot_id=self.epoch.boot_id,
            intent_leaf=committed.leaf,
            prompt_count=len(committed.acceptance.prompt_tokens),
            cached_count=cached_tokens,
            output_count=len(output_tokens),
            finish_reason=finish_reason,
            first_token_us=None if first_token_time is None else int(first_token_time * 1e6),
            ended_us=int(end_time * 1e6),
            **{name: records.field_commitment(name, salts[name], value) for name, value in values.items()},
        )
        record, leaf_salt = records.encode_record(outcome), secrets.token_bytes(32)
        appended = self._end(committed, _build(outcome, leaf_salt, record))
        return Completed(
            committed=committed,
            outcome=outcome,
            record=record,
            leaf_salt=leaf_salt,
            field_salts=records.encode_salts(salts),
            index=appended.index,
            size=appended.size,
            checkpoint=appended.checkpoint,
        )

    def commit_abort(self, committed: Committed, *, reason: str, tokens_sent: int, end_time: float) -> None:
        """Say that a request ended without an answer (`reason`: cancelled, deadline, error or shutdown).

        Raises as `commit_outcome`.
        """
        abort = Abort(
            boot_id=self.epoch.boot_id,
            intent_leaf=committed.leaf,
            reason=reason,
            tokens_sent=tokens_sent,
            ended_us=int(end_time * 1e6),
        )
        self._end(committed, _build(abort, secrets.token_bytes(32)))

    def receipt(self, completed: Completed) -> bytes:
        """Sign the receipt of a complete answer; off the token path (1 to 2 ms of signing)."""
        committed, acceptance, size = completed.committed, completed.committed.acceptance, completed.size
        intent = Proven(
            record=acceptance.record,
            salt=acceptance.leaf_salt,
            index=acceptance.leaf_index,
            proof=self._store.inclusion(acceptance.leaf_index, size),
        )
        outcome = Proven(
            record=completed.record,
            salt=completed.leaf_salt,
            index=completed.index,
            proof=self._store.inclusion(completed.index, size),
        )
        return self._signer.sign_receipt(
            Payload(
                intent=intent,
                outcome=outcome,
                checkpoint=completed.checkpoint,
                from_attested=self._store.consistency(committed.attested_size, size),
                from_accepted=self._store.consistency(committed.size, size),
            )
        )

    def commit_replay(
        self,
        *,
        nonce: bytes,
        quote_digest: bytes,
        attested_size: int,
        receipt_digest: bytes,
        mode: str,
        positions: int,
        divergence: Divergence | None,
        started_us: int,
    ) -> bytes:
        """Commit to what came of running an answer again; the signed receipt of that. `receipt_digest`: SHA-256 of the
        answer's own receipt. Raises as `commit_intent`."""
        replay = Replay(
            boot_id=self.epoch.boot_id,
            nonce=nonce,
            quote_digest=quote_digest,
            receipt_digest=receipt_digest,
            mode=mode,
            result="identical" if divergence is None else "diverged",
            positions=positions,
            divergence=divergence,
            stack=self.epoch.stack,
            started_us=started_us,
            ended_us=_now_us(),
        )
        record, salt = records.encode_record(replay), secrets.token_bytes(32)
        appended = self._store.append([_build(replay, salt, record)], new=True)
        index, size = appended.index, appended.size
        return self._signer.sign_replay(
            ReplayPayload(
                replay=Proven(record=record, salt=salt, index=index, proof=self._store.inclusion(index, size)),
                checkpoint=appended.checkpoint,
                from_attested=self._store.consistency(attested_size, size),
            )
        )

    def head(self) -> tuple[int, bytes]:
        """Size and root of the durable log: what a quote's claims state."""
        return self._store.head()[:2]

    def checkpoint(self) -> bytes:
        """The latest signed checkpoint."""
        return self._store.head()[2]

    def inclusion(self, index: int, size: int) -> tuple[bytes, ...]:
        """Inclusion proof. Raises `LogError` (`log.range`)."""
        return self._store.inclusion(index, size)

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """Consistency proof. Raises `LogError` (`log.range`)."""
        return self._store.consistency(old, new)

    def leaves(self, start: int, count: int) -> tuple[bytes, ...]:
        """At most 1024 leaves. Raises `LogError` (`log.range`)."""
        return self._store.leaves(start, count)

    def witnessed(self) -> bytes:
        """What the operator log and its witnesses say of this boot (`formats.witnessed`); empty when nothing."""
        return b"" if self._witnessed is None else self._witnessed.encoded()

    def _first_leaf(self) -> BootProof:
        size, _, checkpoint = self._store.head()
        return BootProof(proof=self._store.inclusion(0, size), checkpoint=checkpoint)

    def close(self) -> None:
        """Publish, close and unlock. INTENTs still open become CRASHED in the next boot's log. Idempotent."""
        self._store.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _end(self, committed: Committed, build: BuildLeaf) -> Appended:
        with self._open_lock:
            if committed.leaf not in self._open:
                raise LogError("log: the INTENT has its end already", code="log.ended")
            self._open.remove(committed.leaf)
        try:
            return self._store.append([build], new=False)
        except Unavailable:
            with self._open_lock:
                self._open.add(committed.leaf)
            raise


def _begin(directory: Path, sidecar: Sidecar, signer: Signer, crashed: Sequence[bytes]) -> LogStore:
    """Create the boot's own directory and log; the EPOCH and all CRASHED leaves are one commit."""
    epoch = sidecar.epoch
    own = directory / epoch.boot_id.hex()
    try:
        own.mkdir(mode=0o700)
    except FileExistsError as err:
        raise ConfigError(f"log: {own}: this boot id was used before", code="log.directory") from err
    write_sidecar(own, sidecar)
    builds = [_build(epoch, sidecar.salt)]
    if epoch.previous is not None:
        before = epoch.previous.boot_id
        for leaf in crashed:
            record = Crashed(boot_id=epoch.boot_id, previous_boot_id=before, intent_leaf=leaf)
            builds.append(_build(record, secrets.token_bytes(32)))
    store = LogStore(own, epoch.origin, signer.sign_checkpoint)
    try:
        store.append(builds, new=True)
        sync_directory(own)
        sync_directory(directory)
    except BaseException:
        store.close()
        raise
    return store


def _build(record: Record, salt: bytes, data: bytes | None = None) -> BuildLeaf:
    encoded = records.encode_record(record) if data is None else data
    return lambda index: records.encode_leaf(records.leaf_for(record, encoded, salt, index))


def _previous(log: PreviousLog | None) -> Previous | None:
    if log is None:
        return None
    return Previous(
        boot_id=log.epoch.boot_id,
        size=log.size,
        root=log.root,
        epoch_leaf=log.epoch_leaf,
        crashed=len(log.open_intents),
        torn_bytes=log.torn_bytes,
    )


def _lock(directory: Path) -> int:
    """Take the directory for this process. Raises `ConfigError` (`log.locked`, `log.directory`)."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise ConfigError(f"log.dir: {directory}: {err.strerror}", code="log.directory") from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(lock)
        raise ConfigError(f"log.dir: {directory}: another process is using it", code="log.locked") from err
    return lock


def _unusable(directory: Path, err: OSError) -> ConfigError | Unavailable:
    """What the file system refused while the log was opened, in our terms."""
    if err.errno in FULL:
        return Unavailable(f"log.dir: {directory}: the disk is full", code="log.full")
    return ConfigError(f"log.dir: {directory}: {err.strerror}", code="log.directory")


def _now_us() -> int:
    return time.time_ns() // 1000
