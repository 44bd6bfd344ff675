"""The same model in bfloat16 as torch does it best, behind the engine's own `Executor`: a peer for bench/gpu_engine.py.

cuBLAS for the matrices, scaled dot product attention for the rest that matters, torch.compile for what is element-wise
(eager where it does not compile), one CUDA graph for a decode step up to its logits. Keys and values lie in one
place for each sequence, contiguous, all of the memory taken beforehand. Greedy is argmax; otherwise temperature and
top-p by a sort. No fingerprints, no penalties, and no claim about bits: a result may depend on its batch.

A decode step always runs all `slots` sequences, and reads keys up to the longest one's, rounded up to 64: no loss where
all are as long as each other, which is how it is measured.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchlib import say
from countermark_appliance.engine.step import Drawn, Part
from countermark_kernels.sampler import SamplerParams
from generated import LOGIT_SPREAD, Shape

EPS = 1e-6
THETA = 1_000_000.0
STRIDE = 64  # a decode step's graph serves this many lengths
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)


def add_norm(x: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The residual's sum and its RMSNorm."""
    x = x + y
    return x, _norm(x, gain)


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * gain


def rotate(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """QK-norm and RoPE. x: [rows, heads, d]; cos, sin: [rows, d]."""
    x = _norm(x, gain)
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """One layer. Each [outputs, inputs]; gains [inputs] or [d]."""

    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    first: Tensor
    second: Tensor
    q_gain: Tensor
    k_gain: Tensor


class Weights:
    """Everything that executors of different sizes share."""

    def __init__(
        self, shape: Shape, device: torch.device, *, compiled: bool, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        random = torch.Generator(device).manual_seed(1)
        kind: dict[str, Any] = {"dtype": dtype, "device": device}

        def matrix(outputs: int, inputs: int, spread: float = 1.0) -> Tensor:
            return torch.randn(outputs, inputs, generator=random, **kind) * (spread / math.sqrt(inputs))

        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.embed = torch.randn(shape.vocab, shape.hidden, generator=random, **kind)
        self.layers = tuple(
            Matrices(
                qkv=matrix(width, shape.hidden),
                o=matrix(shape.hidden, shape.heads * shape.head_dim),
                gate_up=matrix(2 * shape.intermediate, shape.hidden),
                down=matrix(shape.hidden, shape.intermediate),
                first=torch.ones(shape.hidden, **kind),
                second=torch.ones(shape.hidden, **kind),
                q_gain=torch.ones(shape.head_dim, **kind),
                k_gain=torch.ones(shape.head_dim, **kind),
            )
            for _ in range(shape.layers)
        )
        self.last_gain = torch.ones(shape.hidden, **kind)
        self.head = matrix(shape.vocab, shape.hidden, LOGIT_SPREAD)
        half = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        angle = torch.outer(torch.arange(shape.context, device=device), THETA**-half).repeat(1, 2)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.add_norm, self.rotate, self.swiglu = add_norm, rotate, swiglu
        self.compiled = compiled and self._compile()

    def _compile(self) -> bool:
        """Replace the element-wise functions by compiled ones, if they compile here."""
        add, turn, glu = (torch.compile(f) for f in (add_norm, rotate, swiglu))
        s, layer = self.shape, self.layers[0]
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        try:
            for rows in (64, 48, 1):  # a second size makes the rows a variable; one row is compiled apart
                x = torch.zeros(rows, s.hidden, **kind)
                add(x, x, layer.first)
                heads = torch.zeros(rows, s.heads + 2 * s.kv_heads, s.head_dim, **kind)
                for x, gain in ((heads[:, : s.heads], layer.q_gain), (heads[:, : s.kv_heads], layer.k_gain)):
                    turn(x, gain, self.cos[:rows], self.sin[:rows])
                glu(torch.zeros(rows, 2 * s.intermediate, **kind))
        except Exception as err:  # noqa: BLE001  whatever the compiler raises: the peer then runs eagerly, and says so
            say(f"bf16: not compiled: {type(err).__name__}: {err!s:.300}")
            return False
        self.add_norm, self.rotate, self.swiglu = add, turn, glu
        return True


class Started:
    """A step's draws on their way to the host."""

    def __init__(self, drawn: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = drawn
        if drawn.is_cuda:
            self._host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
            self._host.copy_(drawn, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[Drawn]:
        if self._event is not None:
            self._event.synchronize()
        return [Drawn(token=token, fingerprint=b"") for token in self._host.tolist()]


class Bf16Executor:
    """`slots` sequences of at most `tokens` tokens, all with the sampling of `params`."""

    pipelined = True

    def __init__(self, weights: Weights, *, slots: int, tokens: int, params: SamplerParams) -> None:
        s = weights.shape
        self._w, self._shape, self._slots, self._params = weights, s, slots, params
        self._device = weights.device
        self._room = -(-tokens // STRIDE) * STRIDE
        # one token more than is ever read: where a sequence that has nothing to decode writes
        store = (s.layers, slots, s.kv_heads, self._room + 1, s.head_dim)
        self._k, self._v = (torch.zeros(store, dtype=weights.dtype, device=self._device) for _ in range(2))
        self._last = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._each = torch.arange(slots, device=self._device)
        self._given, self._at = (torch.zeros(slots, dtype=torch.int64, device=self._device) for _ in range(2))
        self._places: OrderedDict[int, tuple[int, object]] = OrderedDict()  # by the cache's id: slot, the cache
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.backends: dict[int, str] = {}  # what was fastest for the keys of a decode step of that length

    def start(self, parts: Sequence[Part]) -> Started:
        places = [self._place(part) for part in parts]
        decoding = [(p, slot) for p, slot in zip(parts, places, strict=True) if p.count == 1 and p.row is not None]
        prompts = [(p, slot) for p, slot in zip(parts, places, strict=True) if p.count > 1 or p.row is None]
        if decoding:
            self._decode(decoding)
        if prompts:
            self._prefill(prompts)
        drawing = [slot for p, slot in zip(parts, places, strict=True) if p.row is not None]
        return Started(self._last[self._moved(drawing)])

    def forget(self, key: object) -> None:
        pass

    def close(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._places.clear()
        del self._k, self._v

    def _place(self, part: Part) -> int:
        """The slot of the part's sequence. One that begins gets a free one, or the longest unseen."""
        key = id(part.cache)
        if part.start and key in self._places:
            self._places.move_to_end(key)
            return self._places[key][0]
        if part.start:
            raise MemoryError(f"bf16: expected at most {self._slots} sequences that begin at 0, got another")
        self._places.pop(key, None)
        taken = {slot for slot, _ in self._places.values()}
        slot = next((n for n in range(self._slots) if n not in taken), None)
        if slot is None:
            _, (slot, _) = self._places.popitem(last=False)
        self._places[key] = slot, part.cache
        return slot

    def _moved(self, values: Sequence[int]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def _decode(self, decoding: Sequence[tuple[Part, int]]) -> None:
        given, at = [0] * self._slots, [self._room] * self._slots
        for part, slot in decoding:
            given[slot] = part.tokens[0] if part.carried is None else -1
            at[slot] = part.start
        self._given.copy_(self._moved(given))
        self._at.copy_(self._moved(at))
        longest = max(part.start for part, _ in decoding) + 1
        length = -(-longest // STRIDE) * STRIDE
        if length > self._room:
            raise MemoryError(f"bf16: expected at most {self._room} tokens, got {longest}")
        if self._device.type != "cuda":
            logits = self._step(length)
        else:
            if length not in self._graphs:
                self._graphs[length] = self._captured(length)
            graph, logits = self._graphs[length]
            graph.replay()
        self._last.copy_(torch.where(self._at < self._room, self._drawn(logits), self._last))

    def _captured(self, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `_step`, and where it leaves the logits."""
        backend = self._fastest(length)
        self.backends[length] = backend.name.removesuffix("_ATTENTION").lower()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), sdpa_kernel(backend):
            self._step(length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), sdpa_kernel(backend):
            logits = self._step(length)
        return graph, logits

    def _fastest(self, length: int) -> SDPBackend:
        """The quickest of torch's attention kernels here, by their time for one layer."""
        s = self._shape
        q = torch.zeros(self._slots, s.heads, 1, s.head_dim, dtype=self._w.dtype, device=self._device)
        mask = self._mask(length)
        found: dict[SDPBackend, float] = {}
        for backend in BACKENDS:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            try:
                with sdpa_kernel(backend):
                    self._attend(q, 0, length, mask)
                    begin.record()
                    for _ in range(8):
                        self._attend(q, 0, length, mask)
                    end.record()
                end.synchronize()
            except RuntimeError:  # it does not do this
                continue
            found[backend] = begin.elapsed_time(end)
        return min(found, key=found.__getitem__)

    def _mask(self, length: int) -> Tensor:
        """[slots, 1, 1, length] added to the scores: every sequence sees itself and what was before."""
        hidden = torch.arange(length, device=self._device) > self._at[:, None]
        zero = torch.zeros(self._slots, length, dtype=self._w.dtype, device=self._device)
        return zero.masked_fill(hidden, -math.inf)[:, None, None]

    def _attend(self, q: Tensor, layer: int, length: int, mask: Tensor) -> Tensor:
        """q: [slots, heads, 1, d] -> [slots, heads * d]; the query heads of one kv head are rows of one product."""
        s = self._shape
        q = q.reshape(self._slots, s.kv_heads, -1, s.head_dim)
        k, v = self._k[layer, :, :, :length], self._v[layer, :, :, :length]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, s.kv_heads, q.shape[2], -1))
        return out.reshape(self._slots, -1)

    def _step(self, length: int) -> Tensor:
        """The logits behind one token of every slot, at the positions `_at`: `_given`, or for -1 the last drawn."""
        ids = torch.where(self._given < 0, self._last, self._given)
        mask = self._mask(length)
        table = self._at.clamp(max=self._shape.context - 1)

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            self._k[layer][self._each, :, self._at] = k
            self._v[layer][self._each, :, self._at] = v
            return self._attend(q[:, :, None], layer, length, mask)

        return self._forward(ids, table, attend)

    def _prefill(self, prompts: Sequence[tuple[Part, int]]) -> None:
        ids, positions, ends = [], [], []
        for part, _ in prompts:
            if part.carried is not None or part.start + part.count > self._room:
                raise ValueError("bf16: expected known tokens that fit")
            ids += part.tokens
            positions += range(part.start, part.start + part.count)
            ends.append(len(ids))

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            out = torch.empty_like(q)
            for (part, slot), end in zip(prompts, ends, strict=True):
                rows, stop = slice(end - part.count, end), part.start + part.count
                self._k[layer, slot, :, part.start : stop] = k[rows].transpose(0, 1)
                self._v[layer, slot, :, part.start : stop] = v[rows].transpose(0, 1)
                known = (x[layer, slot, None, :, :stop] for x in (self._k, self._v))
                causal = part.start == 0
                mask = None if causal else self._lower(part.count, stop)
                out[rows] = F.scaled_dot_product_attention(
                    q[rows].transpose(0, 1)[None], *known, attn_mask=mask, is_causal=causal, enable_gqa=True
                )[0].transpose(0, 1)
            return out.flatten(1)

        wanted = [(end - 1, slot) for (part, slot), end in zip(prompts, ends, strict=True) if part.row is not None]
        rows = self._moved([row for row, _ in wanted])
        x = self._forward(self._moved(ids), self._moved(positions), attend, rows)
        if wanted:
            self._last[self._moved([slot for _, slot in wanted])] = self._drawn(x)

    def _lower(self, rows: int, columns: int) -> Tensor:
        seen = torch.ones(rows, columns, dtype=torch.bool, device=self._device)
        return seen.tril(columns - rows)

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor, int], Tensor],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The logits of all rows, or of the `wanted` ones."""
        w, s = self._w, self._shape
        cos, sin = w.cos[positions], w.sin[positions]
        y = w.embed[ids]
        x = torch.zeros_like(y)
        for index, layer in enumerate(w.layers):
            x, h = w.add_norm(x, y, layer.first)
            heads = F.linear(h, layer.qkv).view(len(ids), -1, s.head_dim)
            q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 1)
            a = attend(w.rotate(q, layer.q_gain, cos, sin), w.rotate(k, layer.k_gain, cos, sin), v, index)
            x, h = w.add_norm(x, F.linear(a, layer.o), layer.second)
            y = F.linear(w.swiglu(F.linear(h, layer.gate_up)), layer.down)
        if wanted is not None:
            x, y = x[wanted], y[wanted]
        return F.linear(w.add_norm(x, y, w.last_gain)[1], w.head)

    def _drawn(self, logits: Tensor) -> Tensor:
        if not self._params.temperature:
            return logits.argmax(-1)
        p, ids = (logits.float() / self._params.temperature).softmax(-1).sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p > self._params.top_p_20bit / (1 << 20), 0.0)
        chosen = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
        return ids.gather(-1, chosen)[:, 0]
