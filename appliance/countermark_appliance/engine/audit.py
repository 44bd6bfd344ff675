"""Many recorded answers checked by teacher-forced passes: at every output position the sampler and the fingerprint.

Prefill equals decode in the exact profile, so the logits of all positions come out of passes over prompt and output
together. A step packs the next tokens of several answers under a budget; the head runs for output positions only and
in blocks of rows, so that memory is bounded whatever the vocabulary. How answers are packed changes no result: each one
has the outcome that it would have alone. A step that fails is repeated answer by answer and then in halves, so that an
error, like a difference, is that of the first position that has one and belongs to that answer only.

Every answer is computed from its first token: prompts in common are not shared, because an audit should not rest on a
cache. Not checked here: that a record is genuine and that its settings can be; the caller has seen to both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from countermark.errors import CountermarkError, ReplayDiverged, Undecidable
from countermark_appliance.engine.draw import draw
from countermark_appliance.engine.grammar import Grammar, GrammarError, Mask, Walk, allows
from countermark_appliance.engine.model import Cache, Chunk, Model
from countermark_appliance.engine.step import Row
from countermark_appliance.faults import describe
from countermark_kernels.ieee import NumericsError
from countermark_kernels.sampler import SamplerParams

LOGITS_BYTES = 256 << 20
"""Logits held at a time. A row of 150,000 ids takes 600 kB."""

Difference = Mapping[str, object]
Outcome = Difference | CountermarkError | None
"""None: as recorded. A difference: `position` (index into the output), `recorded_token`, `local_token`,
`fingerprint_equal`, `logit_gap` (raw logit of the local token minus that of the recorded one),
`recorded_fingerprint`, `local_fingerprint`."""


class Masks:
    """The masks of one recorded answer. Asked for in ascending order of position, else made from the beginning again.

    Behind the first token that the grammar does not allow there are none; the answer has its difference there.
    """

    def __init__(self, grammar: Grammar, output: Sequence[int]) -> None:
        self._grammar = grammar
        self._output = output
        self._walk: Walk | None = None
        self._at = 0

    def at(self, position: int) -> Mask | None:
        """For drawing the output's token at `position`. Raises `Undecidable` (`replay.grammar`)."""
        try:
            if self._walk is None or position < self._at:
                self._walk, self._at = self._grammar.walk(), 0
            while self._at < position:
                token = self._output[self._at]
                if not allows(self._walk.mask, token):
                    return None
                self._walk.step(token)
                self._at += 1
        except GrammarError as err:
            self._walk = None
            raise Undecidable(f"position {position}: {err}", code="replay.grammar") from err
        return self._walk.mask


@dataclass(slots=True, kw_only=True)
class Recording:
    """One answer to check; every value is in range. `tokens`: the first `prompt` are the prompt."""

    index: int
    tokens: Sequence[int]
    prompt: int
    fingerprints: Sequence[bytes]
    params: SamplerParams
    masks: Masks | None = None
    cache: Cache | None = None
    done: int = 0
    outcome: Outcome = field(default=None)

    @property
    def end(self) -> int:
        """How many tokens are computed: the last one's logits would be those of a token nobody drew."""
        return len(self.tokens) - 1 if self.fingerprints else 0

    @property
    def settled(self) -> bool:
        return self.outcome is not None or self.done == self.end


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """The tokens start..stop of a recording."""

    recording: Recording
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Of how many of its last tokens the logits say something of the output."""
        return max(0, self.stop - max(self.start, self.recording.prompt - 1))


def audit_all(model: Model, recordings: Iterable[Recording], step_tokens: int) -> Iterator[Recording]:
    """Check all, in steps of `step_tokens`; each is yielded once, with its `outcome`, as soon as that is known.

    `recordings` is read as there is room, so it may be longer than memory.
    """
    waiting = iter(recordings)
    held: Recording | None = None
    active: deque[Recording] = deque()
    try:
        while True:
            while sum(r.end - r.done for r in active) < step_tokens:
                recording = held or next(waiting, None)
                held = None
                if recording is None:
                    break
                if recording.settled:  # nothing was generated
                    yield recording
                    continue
                try:
                    recording.cache = model.new_cache(recording.end)
                except MemoryError as err:
                    if active:  # whose blocks come back
                        held = recording
                        break
                    recording.outcome = failed(err)
                    yield recording
                    continue
                active.append(recording)
            if not active:
                return
            _step(model, _plan(active, step_tokens))
            for recording in [r for r in active if r.settled]:
                active.remove(recording)
                _release(recording)
                yield recording
    finally:
        for recording in active:
            _release(recording)


def _plan(active: Iterable[Recording], budget: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    for recording in active:
        count = min(budget, recording.end - recording.done)
        if not count:
            break
        pieces.append(_Piece(recording=recording, start=recording.done, stop=recording.done + count))
        budget -= count
    return pieces


def _step(model: Model, pieces: Sequence[_Piece]) -> None:
    """Advance every piece's recording over it, or set its outcome."""
    try:
        outcomes = _compute(model, pieces)
    except (NumericsError, MemoryError) as err:
        if len(pieces) > 1:
            for piece in pieces:
                _step(model, [piece])
            return
        (piece,) = pieces
        middle = (piece.start + piece.stop) // 2
        if middle == piece.start:
            piece.recording.outcome = failed(err)
            return
        _step(model, [_Piece(recording=piece.recording, start=piece.start, stop=middle)])
        if piece.recording.outcome is None:
            _step(model, [_Piece(recording=piece.recording, start=middle, stop=piece.stop)])
        return
    for piece, outcome in zip(pieces, outcomes, strict=True):
        piece.recording.done = piece.stop
        piece.recording.outcome = outcome


def _compute(model: Model, pieces: Sequence[_Piece]) -> list[Outcome]:
    """The first difference in each piece. Changes no recording, so it can be repeated."""
    chunks = []
    rows: list[tuple[int, Row]] = []
    for number, piece in enumerate(pieces):
        r = piece.recording
        assert r.cache is not None
        chunks.append(
            Chunk(cache=r.cache, start=piece.start, tokens=r.tokens[piece.start : piece.stop], logits=piece.rows)
        )
        for length in range(piece.stop - piece.rows + 1, piece.stop + 1):
            rows.append((number, Row(params=r.params, tokens=r.tokens, prompt=r.prompt, length=length)))
    hidden = model.hidden(chunks)
    try:
        return _compared(model, pieces, rows, hidden)
    except torch.OutOfMemoryError as err:
        raise MemoryError("audit: expected memory for the draws") from err


def _compared(model: Model, pieces: Sequence[_Piece], rows: Sequence[tuple[int, Row]], hidden: Tensor) -> list[Outcome]:
    """`rows`: of each wanted row of `hidden` its piece's number and what it was drawn with."""
    found: list[Outcome] = [None] * len(pieces)
    size = max(1, LOGITS_BYTES // (4 * model.vocab))
    for first in range(0, len(rows), size):
        block, broken = _with_masks(pieces, rows[first : first + size])
        logits = model.logits(hidden[first : first + size])
        for i, drawn in enumerate(zip(*draw(logits, [row for _, row in block]), strict=True)):
            number, row = block[i]
            if found[number] is None and i in broken:
                found[number] = broken[i]
            if found[number] is None:
                found[number] = _compare(pieces[number].recording, row.length, logits, i, drawn)
    return found


def _with_masks(
    pieces: Sequence[_Piece], rows: Sequence[tuple[int, Row]]
) -> tuple[list[tuple[int, Row]], dict[int, CountermarkError]]:
    """The rows with the masks that they were drawn under; and by place in them, what a row has in place of a mask."""
    block = list(rows)
    broken: dict[int, CountermarkError] = {}
    for i, (number, row) in enumerate(rows):
        masks = pieces[number].recording.masks
        if masks is not None:
            try:
                block[i] = (number, replace(row, mask=masks.at(row.length - row.prompt)))
            except Undecidable as err:
                broken[i] = err
    return block, broken


def _compare(
    recording: Recording, length: int, logits: Tensor, row: int, local: tuple[int, bytes]
) -> Difference | None:
    at = length - recording.prompt
    recorded = (recording.tokens[length], recording.fingerprints[at])
    if local == recorded:
        return None
    return {
        "position": at,
        "recorded_token": recorded[0],
        "local_token": local[0],
        "fingerprint_equal": recorded[1] == local[1],
        "logit_gap": float(logits[row, local[0]]) - float(logits[row, recorded[0]]),
        "recorded_fingerprint": recorded[1].hex(),
        "local_fingerprint": local[1].hex(),
    }


def _release(recording: Recording) -> None:
    if recording.cache is not None:
        recording.cache.close()
        recording.cache = None


def failed(err: NumericsError | MemoryError | torch.OutOfMemoryError) -> CountermarkError:
    """What a single answer's failure means to whoever wants it run again."""
    if not isinstance(err, NumericsError):
        return Undecidable("replay: expected memory for this answer, got none", code="replay.memory")
    message = f"replay: expected values of the profile's range, got {err.code} at {describe(err)}"
    return ReplayDiverged(message, code="replay.numerics")
