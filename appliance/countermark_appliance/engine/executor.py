"""Executors: what computes the engine's steps. Here the plain one, and the choice between it and graphs.py.

`HostExecutor` computes a step where it is started, on the CPU or op by op on a GPU. The bits are those of every other
executor: what a step holds and who computes it is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from countermark_appliance.engine.draw import draw
from countermark_appliance.engine.model import Chunk, Model, computing
from countermark_appliance.engine.step import Drawn, Executor, Part, Row, Ticket
from countermark_kernels import logprobs
from countermark_kernels.ieee import NumericsError
from countermark_kernels.sampler import History, Tally

Observe = Callable[[Sequence[Row], Tensor], None]
"""Sees the raw logits, [rows, vocab] f32, of every row that is drawn."""


def make_executor(model: Model, *, rows: int = 256, graphs: bool = True, observe: Observe | None = None) -> Executor:
    """The executor for the device of `model`. `rows`: draws of a step at most. `graphs`: whether CUDA graphs may be
    used."""
    if model.device.type != "cuda" or not graphs:
        return HostExecutor(model, observe=observe)
    from countermark_appliance.engine.graphs import ROWS, GraphExecutor  # noqa: PLC0415  triton: only with a GPU

    return GraphExecutor(model, max_rows=max(rows, ROWS[-1]), observe=observe)


class _Done:
    """A step that was computed when it was started."""

    def __init__(self, found: list[Drawn] | NumericsError | MemoryError) -> None:
        self._found = found

    def wait(self) -> list[Drawn]:
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


class HostExecutor:
    """Computes at once, through `Model.forward`."""

    pipelined = False

    def __init__(self, model: Model, *, observe: Observe | None = None) -> None:
        self._model = model
        self._observe = observe
        self._tallies: dict[object, Tally] = {}
        self._ids: list[int] = []

    def start(self, parts: Sequence[Part]) -> Ticket:
        """Compute a step; `wait` says what came of it."""
        try:
            with computing(self._model.device):
                return _Done(self._compute(parts))
        except (NumericsError, MemoryError) as err:
            return _Done(err)

    def forget(self, key: object) -> None:
        """Drop what was counted for the rows of `key`."""
        self._tallies.pop(key, None)

    def close(self) -> None:
        """Let go of everything counted."""
        self._tallies.clear()

    def _compute(self, parts: Sequence[Part]) -> list[Drawn]:
        chunks = []
        rows: list[Row] = []
        histories: list[History | Tally] = []
        for part in parts:
            tokens = list(part.tokens)
            if part.carried is not None:
                tokens.append(self._ids[part.carried])
            chunks.append(Chunk(cache=part.cache, start=part.start, tokens=tokens, logits=int(part.row is not None)))
            if part.row is not None:
                rows.append(part.row)
                histories.append(self._history(part.row, tokens))
        logits = self._model.forward(chunks)
        if self._observe is not None and rows:
            self._observe(rows, logits)
        ids, marks = draw(logits, rows, histories)
        self._ids = ids
        for token, history in zip(ids, histories, strict=True):
            if isinstance(history, Tally):
                history.add(token)
        asked = [_likely(x, row, token) for x, row, token in zip(logits, rows, ids, strict=True)]
        return [
            Drawn(token=token, fingerprint=mark, logprob=logprob, top=top)
            for token, mark, (logprob, top) in zip(ids, marks, asked, strict=True)
        ]

    def _history(self, row: Row, computed: Sequence[int]) -> History | Tally:
        """What penalties read; kept for rows with a key, as long as they go on where they were."""
        if not row.penalised:
            return History()
        tally = self._tallies.get(row.key) if row.key is not None else None
        if tally is None or (tally.prompt, tally.length) != (row.prompt, row.length):
            known = [*row.tokens[: row.length - 1], computed[-1]]  # the last may have been carried here
            tally = Tally(History(prompt=known[: row.prompt], output=known[row.prompt :]))
            if row.key is not None:
                self._tallies[row.key] = tally
        return tally


def _likely(logits: Tensor, row: Row, token: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if not row.logprobs:
        return None, ()
    (found,) = logprobs.likely(logits.unsqueeze(0), min(row.logprobs, logits.shape[0]))
    return found.log_probability(float(logits[token])), found.top
