"""The executor for a GPU: a decoding step is one CUDA graph, and the host is always a step ahead.

Everything runs in the order of one stream, the device's current one. A step is: one copy of packed inputs; the forward
pass; sampler and fingerprint; one copy of results into pinned memory, and an event for whoever waits. A token drawn in
the step before is read where it was drawn, so the host need not have seen it.

A step in which every part is one row and draws runs as a graph. Graphs are made for numbers of rows (ROWS) and of
splits of attention (`_items`), at the start for the common ones, else when first met: the step that meets one computes
it launch by launch, on the same buffers, and then records it. Rows past the step's own compute token 0 at position 0
in block 0, which belongs to nobody. Any other step runs launch by launch. The bits are the same either way.

Two executors on one device share nothing but that order: each has its own error word, buffers and graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from countermark_appliance.engine.draw import check_allowed
from countermark_appliance.engine.executor import Observe
from countermark_appliance.engine.model import no_memory
from countermark_appliance.engine.samplerstate import States
from countermark_appliance.engine.step import Drawn, Part, Row
from countermark_kernels import logprobs
from countermark_kernels.cache import BLOCK, KvCache, Pool
from countermark_kernels.decoder import Decoder
from countermark_kernels.gpu import batch, decoder, flags, sampler
from countermark_kernels.gpu import logprobs as gpu_logprobs
from countermark_kernels.ieee import NumericsError
from countermark_kernels.sampler import SamplerParams, cuda_record

_log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
WARM_CONTEXTS = (256, 1024, 4096)
ITEMS_MAX = 1 << 12
TABLES_MAX = 1 << 18
"""A step of more splits or blocks than these runs without a graph; it takes long enough."""
GRAPHS_MAX = 128
"""Graphs kept, of about 11 MiB each for 36 layers (H100, 2026-11-22); the one unused for longest goes first."""
STEP_TOKENS = 8192
MARGIN_BYTES = 5 << 29
"""Left free beside the pool: graphs and what they compute in, penalties' counts, what the driver takes."""
RECORDS_MAX = 4096
FIELDS = sampler.FIELDS.value
POSITION, COUNTS, BIAS = sampler.POSITION.value, sampler.COUNTS.value, sampler.BIAS.value


class Loaded(Protocol):
    """What is needed of a `Model`."""

    device: torch.device

    @property
    def vocab(self) -> int: ...
    @property
    def embed(self) -> Tensor: ...
    @property
    def decoder(self) -> Decoder: ...
    @property
    def pool(self) -> Pool: ...


def plan_memory(model: Loaded, *, step_tokens: int = STEP_TOKENS, max_rows: int = ROWS[-1]) -> int:
    """How many blocks of keys and values fit beside the largest step, which is run once to see what it takes.

    For `Model.size_pool`, before the pool is made. Raises MemoryError where not even that step fits.
    """
    device, stack = model.device, model.decoder
    kv_heads, head_dim, layers = stack.kv_heads, stack.head_dim, len(stack.layers)
    step_tokens = min(step_tokens, stack.cos.shape[0])
    max_rows = max(max_rows, ROWS[-1])  # make_executor's
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, before = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            blocks = 2 + step_tokens // BLOCK
            pool = Pool(layers=layers, kv_heads=kv_heads, head_dim=head_dim, blocks=blocks, device=device)
            scratch = sampler.Scratch(max_rows, model.vocab, device)
            logits = torch.empty(max_rows, model.vocab, device=device)
            cache = KvCache(pool, range(1, pool.blocks))
            (zeros,) = batch.send([np.zeros(step_tokens, dtype=np.int32)], device)
            cut = batch.cut([(cache, 0, step_tokens)], stack.heads, pool)
            names = ("positions", "slots", "tables", "long", "short", "items")
            there = dict(zip(names, batch.send([getattr(cut, name) for name in names], device), strict=True))
            x = decoder.embed(model.embed, zeros, zeros - 1, scratch.results)
            x = decoder.run(stack, x, batch.planned(cut, stack.heads, pool, there))
            decoder.logits(stack, x[:max_rows].contiguous(), logits[: x.shape[0]])
            torch.cuda.synchronize()
        except torch.OutOfMemoryError as err:
            raise MemoryError(f"model: expected memory for a step of {step_tokens} tokens, got {free} bytes") from err
        taken = torch.cuda.max_memory_allocated() - before - pool.size_bytes
        flags.word(device).zero_()  # whatever a row of token 0 alone may have reported
        del pool, scratch, logits, cache, x, there
        torch.cuda.empty_cache()
    blocks = (free - taken - MARGIN_BYTES) // Pool.block_bytes(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    if blocks < 2:
        raise MemoryError(f"model: expected memory for keys and values, got {free} bytes free, {taken} taken by a step")
    return int(blocks)


class _Graph:
    """One shape of decoding steps: views of the static inputs, the plan over them, and once it ran the graph."""

    def __init__(self, views: dict[str, Tensor], plan: batch.Plan) -> None:
        self.views = views
        self.plan = plan
        self.graph: torch.cuda.CUDAGraph | None = None


class _Running:
    """The ticket of a step: pinned memory that its results are copied to, and the event behind the copies."""

    def __init__(
        self,
        executor: GraphExecutor,
        rows: list[Row],
        results: Tensor,
        asked: list[int],
        likely: Tensor | None,
        masked: bool,
    ) -> None:
        self._executor = executor
        self._masked = masked
        self._rows = rows
        self._results = results
        self._asked = asked
        self._likely = likely
        self._done = torch.cuda.Event() if results.is_pinned() else None  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record()

    def wait(self) -> list[Drawn]:
        """See `step.Ticket`; waits for this step only, not for those started after it."""
        if self._done is not None:
            self._done.synchronize()
        found = self._results.numpy()
        wrong = flags.error(int(found[-1, 0]))
        if wrong is not None:
            self._executor.doubt()
            raise wrong
        ids = found[:-1, 0].tolist()
        if self._masked:
            try:
                check_allowed(self._rows, ids)
            except NumericsError:
                self._executor.doubt()
                raise
        marks = found[:-1, 1:].tobytes()
        drawn = [Drawn(token=token, fingerprint=marks[16 * i : 16 * i + 16]) for i, token in enumerate(ids)]
        if self._likely is not None:
            for place, (chosen, *keys) in zip(self._asked, self._likely.tolist(), strict=True):
                drawn[place] = _with_logprobs(drawn[place], self._rows[place].logprobs, chosen, keys)
        return drawn


def _with_logprobs(drawn: Drawn, count: int, chosen: int, found: list[int]) -> Drawn:
    """`chosen`: the pattern of the drawn token's logit; `found`: as logprobs.reference."""
    likely = logprobs.decode(found[: 1 + count])
    logit = float(np.array(chosen, dtype=np.int32).view(np.float32))
    return Drawn(
        token=drawn.token, fingerprint=drawn.fingerprint, logprob=likely.log_probability(logit), top=likely.top
    )


class GraphExecutor:
    """Runs a model's steps on its GPU. Everything but `wait` belongs to one thread.

    In Triton's interpreter, on a CPU, it does the same without recording graphs; for tests.
    """

    pipelined = True

    def __init__(
        self, model: Loaded, *, max_rows: int = ROWS[-1], observe: Observe | None = None, warm: bool = True
    ) -> None:
        """`max_rows`: draws of a step at most. `observe` must copy what it keeps. `warm`: record common graphs now.

        Raises MemoryError.
        """
        self._model = model
        self._observe = observe
        self._device = model.device
        self._pool = model.pool
        self._max_rows = max_rows = next((x for x in ROWS if x >= max_rows), max_rows)  # the padded ones included
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._records: dict[int, tuple[SamplerParams, bytes]] = {}
        self._drawn = 0
        self.replayed = 0  # steps that were a recorded graph
        self._passing: list[object] = []  # keys of rows that have none of their own, for one step
        self._word = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._recorded = self._device.type == "cuda"
        self._padded = True
        with self._running():
            self._scratch = sampler.Scratch(max_rows, model.vocab, self._device)
            self._logits = torch.zeros(max_rows, model.vocab, device=self._device)
            self._states = States(model.vocab, self._device)
            words = (2 * FIELDS + 9) * ROWS[-1] + 2 * ITEMS_MAX + TABLES_MAX + 16 * batch.ALIGNED
            self._static = torch.zeros(words, dtype=torch.int32, device=self._device)
            self._arrivals = torch.zeros(ROWS[-1] * self._pool.kv_heads, dtype=torch.int32, device=self._device)
            if self._recorded:
                self._memory = torch.cuda.graph_pool_handle()
                self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if warm:
            self.warm()

    def start(self, parts: Sequence[Part]) -> _Running:
        """See `step.Executor`."""
        try:
            with self._running():
                return self._start(parts)
        finally:
            while self._passing:
                self._states.forget(self._passing.pop())

    def forget(self, key: object) -> None:
        """See `step.Executor`. Safe while a step is under way: what reuses the memory comes behind it."""
        self._states.forget(key)

    def doubt(self) -> None:
        """A step failed, so what the device has counted for penalties may be wrong."""
        self._states.doubt()

    def close(self) -> None:
        """See `step.Executor`."""
        if self._recorded:
            torch.cuda.synchronize(self._device)
        self._graphs.clear()

    def warm(self) -> None:
        """Compile the kernels of decoding steps and record graphs for all numbers of rows at some contexts."""
        with self._running():
            for rows in [x for x in ROWS if x <= self._max_rows]:
                for context in WARM_CONTEXTS:
                    end = min(context, self._model.decoder.cos.shape[0])
                    chunk, items, _ = batch.split(np.full(rows, end, dtype=np.int32), self._pool.kv_heads)
                    self._pad(rows, chunk, len(items))
            if self._recorded:
                wrong = flags.error(int(self._word.item()))
                if wrong is not None:
                    _log.warning("graphs: not used, because token 0 alone leaves the range of values (%s)", wrong.code)
                    self._word.zero_()
                    self._padded = False

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Kernels go to this executor's device and report to its word; no memory is a MemoryError."""
        try:
            with flags.using(self._word):
                if self._device.type == "cuda":
                    with torch.cuda.device(self._device):
                        yield
                else:
                    yield
        except RuntimeError as err:
            if not no_memory(err):
                raise
            self._scratch.reset()
            self._word.zero_()
            self._states.doubt()
            raise MemoryError(f"executor: expected memory for the step, got {err!s:.200}") from err

    def _start(self, parts: Sequence[Part]) -> _Running:
        tokens: list[int] = []
        carried: dict[int, int] = {}
        wanted: list[int] = []
        rows: list[Row] = []
        runs: list[tuple[KvCache, int, int]] = []
        places: list[tuple[int, int, int]] = []
        for part in parts:
            count = len(part.tokens)
            tokens += part.tokens
            if part.carried is not None:
                if not 0 <= part.carried < self._drawn:
                    raise ValueError(f"carried: expected 0..{self._drawn - 1}, got {part.carried}")
                carried[len(tokens)] = part.carried
                tokens.append(0)
                count += 1
            runs.append((part.cache, part.start, count))
            row = part.row
            if row is not None:
                if row.penalised or row.params.logit_bias or row.mask is not None:
                    key = row.key
                    if key is None:
                        key = object()
                        self._passing.append(key)
                    counts, bias = self._states.places(key, part, row, self._scratch.results)
                    places.append((len(rows), counts, bias))
                wanted.append(len(tokens) - 1)
                rows.append(row)
        masked = self._states.bar()
        if len(rows) > self._max_rows:
            raise ValueError(f"parts: expected at most {self._max_rows} rows to draw, got {len(rows)}")
        cut = batch.cut(runs, self._model.decoder.heads, self._pool)
        inputs = {
            "fields": self._fields(rows, places),
            "tokens": np.array(tokens, dtype=np.int32),
            "carried": np.full(len(tokens), -1, dtype=np.int32),
            "positions": cut.positions,
            "slots": cut.slots,
        }
        inputs["carried"][list(carried)] = list(carried.values())
        ids = inputs["tokens"]
        if tokens and not 0 <= int(ids.min()) <= int(ids.max()) < self._model.vocab:
            raise ValueError(f"tokens: expected ids under {self._model.vocab}, got others")
        single = len(wanted) == len(runs) == len(tokens) and 0 < len(tokens) <= ROWS[-1]
        fits = len(cut.items) + ROWS[-1] <= ITEMS_MAX and len(cut.tables) < TABLES_MAX
        if single and fits and self._padded and len(cut.short) == len(tokens):
            fields = self._decode(inputs, cut)
        else:
            fields = self._mixed(inputs, cut, np.array(wanted, dtype=np.int32))
        ticket = self._draw(rows, fields, stateful=bool(places), masked=masked)
        self._drawn = len(rows)
        return ticket

    def _fields(self, rows: Sequence[Row], places: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.int32]:
        """The sampler's records of all rows, as words."""
        joined = bytearray().join([self._record(row.params) for row in rows])
        fields = np.frombuffer(joined, dtype=np.int64).reshape(-1, FIELDS)
        fields[:, POSITION] = [row.length for row in rows]
        for place, counts, bias in places:
            fields[place, COUNTS], fields[place, BIAS] = counts, bias
        return fields.view(np.int32)

    def _record(self, params: SamplerParams) -> bytes:
        found = self._records.get(id(params))
        if found is None:
            if len(self._records) >= RECORDS_MAX:
                self._records.clear()
            found = self._records[id(params)] = (params, cuda_record(params, self._model.vocab))
        return found[1]

    def _mixed(self, inputs: dict[str, npt.NDArray[np.int32]], cut: batch.Cut, wanted: npt.NDArray[np.int32]) -> Tensor:
        """The forward pass of any step, launch by launch; logits of the wanted rows. -> the fields on the device."""
        arrays = inputs | {"wanted": wanted}
        arrays |= {name: getattr(cut, name) for name in ("long", "short", "items", "tables")}
        there = dict(zip(arrays, batch.send(list(arrays.values()), self._device), strict=True))
        stack = self._model.decoder
        x = decoder.embed(self._model.embed, there["tokens"], there["carried"], self._scratch.results)
        x = decoder.run(stack, x, batch.planned(cut, stack.heads, self._pool, there))
        if len(wanted):
            decoder.logits(stack, x.index_select(0, there["wanted"]), self._logits[: len(wanted)])
        return there["fields"].view(torch.int64)

    def _decode(self, inputs: dict[str, npt.NDArray[np.int32]], cut: batch.Cut) -> Tensor:
        """The forward pass of a decoding step over the static inputs. -> the fields on the device."""
        count = len(inputs["tokens"])
        rows = next(x for x in ROWS if x >= count)
        self._static_step(rows, _items(len(cut.items) + rows - count, rows), cut.chunk, inputs, cut)
        return self._static[: count * 2 * FIELDS].view(torch.int64).view(count, FIELDS)

    def _pad(self, rows: int, chunk: int, items: int) -> None:
        """A step of no rows at all, to record its graph."""
        none: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
        cut = batch.Cut(
            positions=none,
            slots=none,
            tables=none,
            long=none.reshape(0, 4),
            short=none.reshape(0, 5),
            items=none.reshape(0, 2),
            chunk=chunk,
            rows=0,
        )
        inputs = dict.fromkeys(("fields", "tokens", "carried", "positions", "slots"), none)
        self._static_step(rows, _items(items, rows), chunk, inputs, cut)

    def _static_step(
        self, rows: int, items: int, chunk: int, inputs: dict[str, npt.NDArray[np.int32]], cut: batch.Cut
    ) -> None:
        """Fill the static inputs for `rows` rows and `items` splits, and run the graph of that shape."""
        sizes = _sizes(rows, items)
        starts, end = batch.places(list(sizes.values()))
        at = dict(zip(sizes, starts, strict=True))
        tables = len(cut.tables)
        host = torch.empty(end + tables + 1, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        words = host.numpy()
        count = len(inputs["tokens"])
        words[: at["carried"]] = 0
        words[at["carried"] : at["positions"]] = -1
        words[at["positions"] : at["short"]] = 0
        for name, values in inputs.items():
            words[at[name] : at[name] + values.size] = values.reshape(-1)
        short = words[at["short"] : at["short"] + 5 * rows].reshape(rows, 5)
        short[:count] = cut.short
        extra = rows - count  # tiles of one token in block 0, whose number is the last of the tables
        splits = len(cut.items)
        short[count:] = 0
        short[count:, 0] = np.arange(count, rows)
        short[count:, 1] = 1
        short[count:, 3] = tables
        short[count:, 4] = splits + np.arange(extra)
        listed = words[at["items"] : at["items"] + 2 * items].reshape(items, 2)
        listed[:splits] = cut.items
        listed[splits:] = (0, batch.NO_SPLIT)
        listed[splits : splits + extra, 0] = np.arange(count, rows)
        listed[splits : splits + extra, 1] = 0
        words[end : end + tables] = cut.tables
        words[end + tables] = 0
        self._static[: len(words)].copy_(host, non_blocking=True)
        found = self._graphs.pop((rows, items, chunk), None) or self._prepared(rows, items, chunk)
        self._graphs[rows, items, chunk] = found  # now the last to go
        if found.graph is not None:
            found.graph.replay()
            self.replayed += 1
            return
        self._forward(found)
        if self._recorded:
            if len(self._graphs) > GRAPHS_MAX:
                del self._graphs[next(iter(self._graphs))]
            try:
                found.graph = self._record_graph(found)
            except RuntimeError as err:
                if not no_memory(err):  # else: the step is under way; its next one may find room for a graph
                    raise

    def _prepared(self, rows: int, items: int, chunk: int) -> _Graph:
        sizes = _sizes(rows, items)
        starts, end = batch.places(list(sizes.values()))
        views = {
            name: self._static[start : start + size] for (name, size), start in zip(sizes.items(), starts, strict=True)
        }
        short = batch.Short(
            tiles=views["short"].view(rows, 5),
            items=views["items"].view(items, 2),
            rows=self._model.decoder.heads // self._pool.kv_heads,
            chunk=chunk,
            arrivals=self._arrivals,
        )
        plan = batch.Plan(
            pool=self._pool,
            heads=self._model.decoder.heads,
            positions=views["positions"],
            slots=views["slots"],
            tables=self._static[end:],
            tiles=None,
            short=short,
        )
        return _Graph(views, plan)

    def _forward(self, step: _Graph) -> None:
        views, stack = step.views, self._model.decoder
        x = decoder.embed(self._model.embed, views["tokens"], views["carried"], self._scratch.results)
        decoder.logits(stack, decoder.run(stack, x, step.plan), self._logits[: len(views["tokens"])])

    def _record_graph(self, step: _Graph) -> torch.cuda.CUDAGraph:
        """Record what `_forward` launches. It has just run, so that every kernel is compiled and loaded."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._side):
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                self._forward(step)
            finally:
                graph.capture_end()
        return graph

    def _draw(self, rows: list[Row], fields: Tensor, *, stateful: bool, masked: bool) -> _Running:
        count = len(rows)
        logits = self._logits[:count]
        if self._observe is not None and rows:
            self._observe(rows, logits)
        asked = [i for i, row in enumerate(rows) if row.logprobs]
        raw = found = where = None
        if asked:
            (where,) = batch.send([np.array(asked, dtype=np.int32)], self._device)
            raw = logits.index_select(0, where)
            most = min(max(rows[i].logprobs for i in asked), logprobs.TOP_MAX, raw.shape[1])
            found = gpu_logprobs.likely(raw, most)
        greedy = all(row.params.temperature == 0.0 for row in rows)
        state = (self._states.counts, self._states.bias) if stateful else (None, None)
        sampler.draw(logits, fields, *state, self._scratch, greedy=greedy)
        results = self._fetch(self._scratch.results[: count + 1])
        likely = None
        if raw is not None and found is not None and where is not None:
            ids = self._scratch.ids.index_select(0, where).clamp(0, raw.shape[1] - 1)
            chosen = raw.gather(1, ids.unsqueeze(1)).view(torch.int32).long()
            likely = self._fetch(torch.cat((chosen, found), dim=1))
        return _Running(self, rows, results, asked, likely, masked)

    def _fetch(self, there: Tensor) -> Tensor:
        """A copy on the host that is complete when an event recorded from now on has passed."""
        host = torch.empty(there.shape, dtype=there.dtype, pin_memory=self._device.type == "cuda")
        host.copy_(there, non_blocking=True)
        return host


def _sizes(rows: int, items: int) -> dict[str, int]:
    """Words of the static inputs; the tables, whose number varies, come behind them."""
    return {
        "fields": 2 * FIELDS * rows,
        "tokens": rows,
        "carried": rows,
        "positions": rows,
        "slots": rows,
        "short": 5 * rows,
        "items": 2 * items,
    }


def _items(count: int, rows: int) -> int:
    """How many splits a graph of `rows` tiles has that serves `count`.

    One a tile is a case of its own (attention_split); else powers of two, and where splits are many a step between.
    """
    if count == rows:
        return rows
    size = 4
    while size < count or size == rows:
        if size >= 64 and count <= size + size // 2 != rows:
            return size + size // 2
        size *= 2
    return size
