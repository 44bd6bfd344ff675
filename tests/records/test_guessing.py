"""Whoever has the published log, the weights and the right guess cannot tell that it is right.

The log of one short question with its known answer is taken as the host has it: every file below the log directory.
The guesser knows more than a host would: question, answer, token ids, fingerprints, every other field of the records,
but the salts. All commitments it can think of are computed without one, with the salts that are public, and with
whatever 32 bytes stand in the files; none occurs. The same guesser is then given the salts, and finds all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from record_values import intent, open_recorder, outcome

from countermark.formats import records
from countermark.formats.records import Kind, encode_input, encode_tokens
from countermark_appliance.records.recorder import Committed, Completed

VALUES = {
    "prompt": encode_input(prompt="hello"),
    "prompt_tokens": encode_tokens((1, 2, 3)),
    "raw_request": b"request",
    "output_tokens": encode_tokens((5, 2)),
    "output_text": b"hi",
    "fingerprints": bytes(32),
}


def files(root: Path) -> bytes:
    """All that is on the disk."""
    return b"\0".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


def salts_to_try(disk: bytes) -> Iterator[bytes]:
    yield b""
    yield bytes(32)
    yield from {disk[at : at + 32] for at in range(len(disk) - 31)}


def guesses(salt: bytes, committed: Committed, completed: Completed) -> Iterable[bytes]:
    """Every hash of a right guess that could stand somewhere, under one salt."""
    for name, value in VALUES.items():
        label = name.encode()
        yield hashlib.sha256(value).digest()
        yield hashlib.sha256(salt + value).digest()
        yield hashlib.sha256(b"countermark/field/v1" + bytes([len(label)]) + label + salt + value).digest()
    for kind, record in ((Kind.INTENT, committed.acceptance.record), (Kind.OUTCOME, completed.record)):
        yield hashlib.sha256(b"countermark/leaf/v1" + kind.value.encode() + salt + record).digest()


def test_a_right_guess_is_not_confirmed(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    committed = intent(recorder)
    completed = outcome(recorder, committed)
    recorder.receipt(completed)
    recorder.close()
    disk = files(tmp_path)
    assert len(disk) > 10_000
    windows = {disk[at : at + 32] for at in range(len(disk) - 31)}
    for salt in salts_to_try(disk):
        assert not any(guess in windows for guess in guesses(salt, committed, completed))


def test_the_same_guesser_finds_them_with_the_salts(tmp_path: Path) -> None:
    """Or the test above would show nothing."""
    recorder = open_recorder(tmp_path)
    committed = intent(recorder)
    completed = outcome(recorder, committed)
    recorder.close()
    found = committed.acceptance.record + completed.record + files(tmp_path)
    windows = {found[at : at + 32] for at in range(len(found) - 31)}
    salts = {
        **records.parse_salts(committed.acceptance.field_salts, records.INTENT_FIELDS),
        **records.parse_salts(completed.field_salts, records.OUTCOME_FIELDS),
    }
    hits = {
        guess
        for salt in (*salts.values(), committed.acceptance.leaf_salt, completed.leaf_salt)
        for guess in guesses(salt, committed, completed)
        if guess in windows
    }
    assert len(hits) == len(VALUES) + 2


def test_every_salt_is_drawn_anew(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    seen: list[bytes] = []
    for _ in range(20):
        committed = intent(recorder)
        completed = outcome(recorder, committed)
        seen += [committed.acceptance.leaf_salt, completed.leaf_salt]
        seen += records.parse_salts(committed.acceptance.field_salts, records.INTENT_FIELDS).values()
        seen += records.parse_salts(completed.field_salts, records.OUTCOME_FIELDS).values()
    recorder.close()
    assert len(seen) == len(set(seen)) == 20 * 8
    assert all(salt not in files(tmp_path) for salt in seen)
