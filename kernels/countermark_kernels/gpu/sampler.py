"""The sampler, sampler.py, for a batch of rows, without a sort.

A token's place in the order is its `rank` = bits(|t|) * 2^18 + id, unique and ascending. Every filter asks for the
least rank at which a sum of integers (tokens, or weights) over the ranks up to it reaches a target. The tokens fall
into buckets by x = t * LOG2E, 64 an octave, which is monotone in rank: sums over whole buckets are prefix sums of a
histogram, and only inside the one bucket that holds a target is it bisected, bit by bit of the rank.

    _scan      the largest logit and the least id that has it; range checks. Temperature 0 ends here. On request it
               does steps 1 to 3 before, in place, and the fingerprint of what it read
    _count     histogram: per bucket the tokens and their weight (one 64-bit atomic), and the weight that min-p leaves
    _plan      which buckets can hold a boundary, and where each begins in the list of ranks
    _scatter   the ranks of those buckets, bucket after bucket, in any order within
    _resolve   the boundaries of top-k, top-p and the draw

Steps 1 to 3 read the state of a row: `counts` [places, V] int32, how often each id is in the output, and bit 31 where
it is in the prompt; `bias` [places, V] f32, -0.0 where there is none, which changes no sum. `_finish` counts what was
drawn. `adjust` is the same for callers without a state.

Integer: everything after w, so atomics change nothing. Tokens with x < -26 have w = 0 and come last: they are left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from countermark_kernels.gpu import fingerprint, flags, ieee, overlap
from countermark_kernels.gpu.launching import prepared
from countermark_kernels.gpu.sizes import cdiv

ID_BITS = tl.constexpr(18)
RANK_BITS = tl.constexpr(49)
ID_MASK = tl.constexpr((1 << 18) - 1)
NO_RANK = tl.constexpr(1 << 49)
"""Beyond every rank."""
WEIGHT_BITS = tl.constexpr(43)
ONE_TOKEN = tl.constexpr(1 << 43)
WEIGHT_MASK = tl.constexpr((1 << 43) - 1)
BUCKETS = tl.constexpr(2048)
PER_OCTAVE = tl.constexpr(64.0)
X_MIN = tl.constexpr(-26.0)
RANGE_BITS = tl.constexpr((127 + 100) << 23)
ALL_20BIT = tl.constexpr(1 << 20)
SEED, POSITION, TOP_K, TOP_P, MIN_P, TEMPERATURE = (tl.constexpr(i) for i in range(6))
REPETITION, PRESENCE, FREQUENCY, COUNTS, BIAS = (tl.constexpr(i) for i in range(6, 11))
FIELDS = tl.constexpr(11)
"""Of a row, int64: floats as their patterns, the seed as two's complement, COUNTS and BIAS its places or -1."""
NO_BEST = -(1 << 63)
LEAST = tl.constexpr(NO_BEST)
IN_PROMPT = tl.constexpr(-(1 << 31))
SLICE, TILE = 2048, 1024
LIST_MAX = 1 << 24
"""Ranks held at a time: 128 MiB; more rows than fit are sampled in turns."""


@triton.jit
def ordered(x):
    """An int32 that orders like binary32 x, zero without its sign; its own inverse."""
    pattern = ieee.bits(tl.where(x == 0.0, 0.0, x))
    return pattern ^ ((pattern >> 31) & 0x7FFFFFFF)


@triton.jit
def token_key(order, token):
    """int64 that orders like `order`, int32, and among equals by the token, the least first."""
    return (order.to(tl.int64) << 32) + (0x7FFFFFFF - token)


@triton.jit
def _float(fields, row, FIELD: tl.constexpr):
    return ieee.value(tl.load(fields + row * FIELDS + FIELD).to(tl.int32))


@triton.jit
def _temperature(fields, row):
    return _float(fields, row, TEMPERATURE)


@triton.jit
def weight(x):
    """w for x = t * LOG2E >= X_MIN, as int64."""
    return ieee.rint_positive(ieee.exp2(x) * 16777216.0).to(tl.int64)


@triton.jit
def _slice(logits, best, fields, vocab, SLICE: tl.constexpr):
    """This program's tokens: ids, bits(|t|), x, and whether each counts."""
    row = tl.program_id(0)
    at = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    l = tl.load(logits + row.to(tl.int64) * vocab + at, mask=at < vocab, other=0.0)  # noqa: E741
    high = (tl.load(best + row) >> 32).to(tl.int32)
    top = ieee.value(high ^ ((high >> 31) & 0x7FFFFFFF))
    t = ieee.div(l - top, tl.zeros_like(l) + _temperature(fields, row))
    x = t * ieee.LOG2E
    return at, ieee.magnitude(t), x, (at < vocab) & (x >= X_MIN)


@triton.jit
def _penalised(x, seen, times, repetition, presence, frequency):
    """Steps 2 and 3 for logits x of which `seen` are in prompt or output, and `times` times in the output."""
    x = tl.where(seen & (repetition != 1.0), tl.where(x > 0.0, ieee.div(x, repetition), x * repetition), x)
    made = (times != 0) & ((presence != 0.0) | (frequency != 0.0))
    return tl.where(made, (x - presence) - ieee.to_f32(times) * frequency, x)


@triton.jit
def _scan(logits, best, flag, fields, counts, bias, lanes, vocab, SLICE: tl.constexpr, EARLY: tl.constexpr):
    overlap.begin(EARLY)
    row = tl.program_id(0)
    at = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    inside = at < vocab
    line = logits + row.to(tl.int64) * vocab + at
    l = tl.load(line, mask=inside, other=0.0)  # noqa: E741
    if lanes is not None:
        fingerprint.add(lanes + row * 2, l, at)
    if bias is not None:
        place = tl.load(fields + row * FIELDS + BIAS)
        if place >= 0:
            l = l + tl.load(bias + place * vocab + at, mask=inside, other=-0.0)  # noqa: E741
            tl.store(line, l, mask=inside)
    if counts is not None:
        place = tl.load(fields + row * FIELDS + COUNTS)
        if place >= 0:
            state = tl.load(counts + place * vocab + at, mask=inside, other=0)
            zero = tl.zeros_like(l)
            repetition = zero + _float(fields, row, REPETITION)
            presence, frequency = zero + _float(fields, row, PRESENCE), zero + _float(fields, row, FREQUENCY)
            l = _penalised(l, state != 0, state & 0x7FFFFFFF, repetition, presence, frequency)  # noqa: E741
            tl.store(line, l, mask=inside)
    amax = tl.max(ieee.magnitude(l), axis=0)
    flags.report(flag, amax >= ieee.INFINITY_BITS, flags.NOT_FINITE)
    flags.report(flag, amax >= RANGE_BITS, flags.RANGE)
    keys = tl.where(inside, token_key(ordered(l), at), -0x7FFFFFFFFFFFFFFF)
    tl.atomic_max(best + row, tl.max(keys, axis=0), sem="relaxed")


@triton.jit
def _count(logits, best, fields, sums, vocab, BUCKETS: tl.constexpr, SLICE: tl.constexpr):
    row = tl.program_id(0)
    if _temperature(fields, row) != 0.0:
        _, _, x, counts = _slice(logits, best, fields, vocab, SLICE)
        w = weight(x)
        to = sums + row * 2 * BUCKETS + ieee.truncate(tl.where(counts, x, 0.0) * -PER_OCTAVE)
        ieee.add(to, w + ONE_TOKEN, counts)
        floor = tl.load(fields + row * FIELDS + MIN_P) << 4
        if floor > 0:
            ieee.add(to + BUCKETS, w, counts & (w >= floor))


@triton.jit
def _draw(fields, row, total):
    """u of step 10: word 0 of Philox4x32-10, scaled to 0..total - 1."""
    seed = tl.load(fields + row * FIELDS + SEED).to(tl.uint64, bitcast=True)
    low: tl.constexpr = 0xFFFFFFFF
    k0, k1 = seed & low, seed >> 32
    c0 = tl.load(fields + row * FIELDS + POSITION).to(tl.uint64, bitcast=True)
    c1 = c0 & 0
    c2, c3 = c1, c1
    for _ in tl.static_range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    r = c0.to(tl.int64)
    return (r * (total >> 21) + ((r * (total & 0x1FFFFF)) >> 21)) >> 11


@triton.jit
def _histogram(fields, sums, row, BUCKETS: tl.constexpr):
    """Bucket numbers; running totals, each bucket included, of tokens, weight, and weight after min-p; their parts."""
    bucket = tl.arange(0, BUCKETS)
    both = tl.load(sums + row * 2 * BUCKETS + bucket)
    tokens, weight = both >> WEIGHT_BITS, both & WEIGHT_MASK
    filtered = tl.load(fields + row * FIELDS + MIN_P) > 0
    left = tl.where(filtered, tl.load(sums + (row * 2 + 1) * BUCKETS + bucket), weight)
    return bucket, ieee.running(tokens), ieee.running(weight), ieee.running(left), tokens


@triton.jit
def _first(running, target, LAST: tl.constexpr):
    """The first bucket whose running total reaches `target`, or LAST."""
    return tl.minimum(ieee.total((running < target).to(tl.int32), 0), LAST)


@triton.jit
def _at(running, bucket, which):
    """running[which], 0 for which = -1."""
    return ieee.total(tl.where(bucket == which, running, 0), 0)


@triton.jit
def _plan(fields, sums, ends, bounds, BUCKETS: tl.constexpr):
    row = tl.program_id(0)
    if _temperature(fields, row) != 0.0:
        bucket, tokens, weight, left, own = _histogram(fields, sums, row, BUCKETS)
        top_k, top_p = tl.load(fields + row * FIELDS + TOP_K), tl.load(fields + row * FIELDS + TOP_P)
        cut = (top_k > 0) | (top_p < ALL_20BIT)
        if cut:
            # top-p's boundary never lies behind top-k's, whose own bucket must be in the list
            most = _at(weight, bucket, BUCKETS - 1)
            by_weight = _first(weight, (top_p * most + ALL_20BIT - 1) >> 20, BUCKETS - 1)
            by_tokens = _first(tokens, top_k, BUCKETS - 1)
            last = tl.where((top_k > 0) & (top_k < _at(tokens, bucket, BUCKETS - 1)), by_tokens, by_weight)
            first = last * 0
        else:
            last = _first(left, _draw(fields, row, _at(left, bucket, BUCKETS - 1)) + 1, BUCKETS - 1)
            first = last
        begin = tokens - own
        tl.store(ends + row * BUCKETS + bucket, (begin - _at(begin, bucket, first)).to(tl.int32))
        tl.store(bounds + row * 2, first)
        tl.store(bounds + row * 2 + 1, last)


@triton.jit
def _scatter(logits, best, fields, ends, bounds, ranks, vocab, BUCKETS: tl.constexpr, SLICE: tl.constexpr):
    row = tl.program_id(0)
    if _temperature(fields, row) != 0.0:
        at, key, x, counts = _slice(logits, best, fields, vocab, SLICE)
        bucket = ieee.truncate(tl.where(counts, x, 0.0) * -PER_OCTAVE)
        wanted = counts & (bucket >= tl.load(bounds + row * 2)) & (bucket <= tl.load(bounds + row * 2 + 1))
        place = tl.atomic_add(ends + row * BUCKETS + bucket, 1, mask=wanted, sem="relaxed")
        rank = (key.to(tl.int64) << ID_BITS) + at
        tl.store(ranks + row.to(tl.int64) * vocab + place, rank, mask=wanted)


@triton.jit
def _sum(ranks, begin, end, limit, floor, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Over the ranks begin..end of the list that are at most `limit`: how many, or the weight of those >= `floor`."""
    total = tl.zeros([TILE], dtype=tl.int64)
    for start in range(begin, end, TILE):
        at = start + tl.arange(0, TILE)
        rank = tl.load(ranks + at, mask=at < end, other=NO_RANK)
        if TOKENS:
            w = tl.full([TILE], 1, dtype=tl.int64)
        else:
            w = weight(-ieee.value((rank >> ID_BITS).to(tl.int32)) * ieee.LOG2E)
        total += tl.where((at < end) & (rank <= limit) & (w >= floor), w, 0)
    return ieee.total(total, 0)


@triton.jit
def _least(ranks, begin, end, target, floor, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """The least rank at which _sum reaches `target`, which all of begin..end do."""
    rank = target * 0
    for i in range(RANK_BITS):
        bit = (target * 0 + 1) << (RANK_BITS - 1 - i)
        below = _sum(ranks, begin, end, rank + (bit - 1), floor, TOKENS, TILE)
        rank = tl.where(below < target, rank + bit, rank)
    return rank


@triton.jit
def _bucket(ends, which):
    """Where bucket `which` begins and ends in the list. Buckets before the list's first end at or below 0."""
    return tl.maximum(tl.load(ends + which - 1, mask=which > 0, other=0), 0), tl.load(ends + which)


@triton.jit
def _greedy(best, row):
    """The token of the largest logit."""
    return 0x7FFFFFFF - (tl.load(best + row) & 0xFFFFFFFF)


@triton.jit
def _resolve(best, fields, sums, ends, bounds, ranks, ids, vocab, BUCKETS: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    if _temperature(fields, row) == 0.0:
        tl.store(ids + row, _greedy(best, row))
    else:
        bucket, tokens, weight, left, _ = _histogram(fields, sums, row, BUCKETS)
        ranks += row.to(tl.int64) * vocab
        ends += row * BUCKETS
        top_k, top_p = tl.load(fields + row * FIELDS + TOP_K), tl.load(fields + row * FIELDS + TOP_P)
        floor = tl.load(fields + row * FIELDS + MIN_P) << 4
        none = top_k * 0
        end = none + NO_RANK  # the last rank that is kept, and its bucket
        last = BUCKETS - 1 + none.to(tl.int32)
        kept = _at(weight, bucket, BUCKETS - 1)
        if (top_k > 0) & (top_k < _at(tokens, bucket, BUCKETS - 1)):
            last = _first(tokens, top_k, BUCKETS - 1)
            a, b = _bucket(ends, last)
            end = _least(ranks, a, b, top_k - _at(tokens, bucket, last - 1), none, True, TILE)
            kept = _at(weight, bucket, last - 1) + _sum(ranks, a, b, end, none, False, TILE)
        if top_p < ALL_20BIT:
            target = (top_p * kept + ALL_20BIT - 1) >> 20
            last = _first(weight, target, BUCKETS - 1)
            a, b = _bucket(ends, last)
            end = _least(ranks, a, b, target - _at(weight, bucket, last - 1), none, False, TILE)
        total = _at(left, bucket, last)
        if end < NO_RANK:
            a, b = _bucket(ends, last)
            total = _at(left, bucket, last - 1) + _sum(ranks, a, b, end, floor, False, TILE)
        u = _draw(fields, row, total)
        last = _first(left, u + 1, BUCKETS - 1)
        a, b = _bucket(ends, last)
        rank = _least(ranks, a, b, u + 1 - _at(left, bucket, last - 1), floor, False, TILE)
        tl.store(ids + row, rank & ID_MASK)


@triton.jit
def _finish(
    ids, lanes, best, fields, counts, flag, results, vocab, GREEDY: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Results of all rows: id and lanes; last the error word. What the next draw adds to begins anew."""
    overlap.begin(EARLY)
    row = tl.program_id(0)
    if row < tl.num_programs(0) - 1:
        if GREEDY:
            token = _greedy(best, row)
            tl.store(ids + row, token)
        else:
            token = tl.load(ids + row)
        tl.store(results + row * 3, token)
        for lane in tl.static_range(2):
            tl.store(results + row * 3 + 1 + lane, tl.load(lanes + row * 2 + lane))
            tl.store(lanes + row * 2 + lane, 0)
        tl.store(best + row, LEAST)
        if counts is not None:
            place = tl.load(fields + row * FIELDS + COUNTS)
            if (place >= 0) & (token < vocab):
                tl.atomic_add(counts + place * vocab + token, 1, sem="relaxed")
    else:
        tl.store(results + row * 3, tl.atomic_xchg(flag, 0, sem="relaxed").to(tl.int64))


@triton.jit
def _remember(counts, tokens, count, prompt, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + at, mask=at < count, other=0)
    tl.atomic_or(counts + token, IN_PROMPT, mask=at < prompt, sem="relaxed")
    tl.atomic_add(counts + token, 1, mask=(at >= prompt) & (at < count), sem="relaxed")


@triton.jit
def _adjust(logits, entries, fields, count, vocab, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = tl.load(entries + at, mask=inside, other=0)
    to = logits + row.to(tl.int64) * vocab + tl.load(entries + count + at, mask=inside, other=0)
    biased = tl.load(entries + 2 * count + at, mask=inside, other=0)
    bias = ieee.value(tl.load(entries + 3 * count + at, mask=inside, other=0))
    seen = tl.load(entries + 4 * count + at, mask=inside, other=0)
    times = tl.load(entries + 5 * count + at, mask=inside, other=0)
    l = tl.load(to, mask=inside, other=0.0)  # noqa: E741
    l = tl.where(biased != 0, l + bias, l)  # noqa: E741
    repetition = _float(fields, row, REPETITION)
    presence, frequency = _float(fields, row, PRESENCE), _float(fields, row, FREQUENCY)
    tl.store(to, _penalised(l, seen != 0, times, repetition, presence, frequency), mask=inside)


def adjust(logits: Tensor, entries: Tensor, fields: Tensor) -> Tensor:
    """Steps 1 to 3 on a copy of logits: [S, V] f32, or the logits themselves where there is nothing to do.

    `entries`: [6, N] int32, for each (row, id) once: row, id, whether biased, bits(bias), whether the repetition
    penalty applies, times in the output; `fields`: [S, FIELDS].
    """
    count = entries.shape[1]
    out = logits.clone() if count else logits
    if count:
        grid = (cdiv(count, 256),)
        prepared(_adjust, BLOCK=256)(grid, out, entries, fields, count, logits.shape[1])
    return out


def remember(counts: Tensor, tokens: Tensor, prompt: int) -> None:
    """Make one place of a state, [V] int32, from tokens: [n] int32, of which the first `prompt` are the prompt."""
    counts.zero_()
    count = tokens.shape[0]
    if count:
        prepared(_remember, BLOCK=256)((cdiv(count, 256),), counts, tokens, count, prompt)


class Scratch:
    """What drawing needs for up to `rows` rows; the results of one draw are read, in stream order, before the next.

    results: [rows + 1, 3] int64: of each row its id and the two lanes of its fingerprint, then the error word.
    """

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        buckets = BUCKETS.value
        turn = min(max(LIST_MAX // vocab, 1), rows)
        self.best = torch.full((rows,), NO_BEST, dtype=torch.int64, device=device)
        self.lanes = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.results = torch.zeros(rows + 1, 3, dtype=torch.int64, device=device)
        self.sums = torch.empty(turn, 2, buckets, dtype=torch.int64, device=device)
        self.ends = torch.empty(turn, buckets, dtype=torch.int32, device=device)
        self.bounds = torch.empty(turn, 2, dtype=torch.int32, device=device)
        self.ranks = torch.empty(turn, vocab, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """After a draw that was broken off."""
        self.best.fill_(NO_BEST)
        self.lanes.zero_()


def draw(
    logits: Tensor, fields: Tensor, counts: Tensor | None, bias: Tensor | None, scratch: Scratch, *, greedy: bool
) -> None:
    """All of a draw: logits [S, V] f32, fields [S, FIELDS] -> the first S + 1 of scratch.results.

    Logits of rows with a state are adjusted in place, after their fingerprint was taken. `greedy`: all rows are of
    temperature 0.
    """
    rows, vocab = logits.shape
    flag, ids, best, lanes = flags.word(logits.device), scratch.ids[:rows], scratch.best[:rows], scratch.lanes[:rows]
    grid = (rows, cdiv(vocab, SLICE))
    options = overlap.launch(logits.device, rows)
    prepared(_scan, SLICE=SLICE, **options)(grid, logits, best, flag, fields, counts, bias, lanes, vocab)
    if not greedy:
        _choose(logits, fields, best, ids, scratch)
    results = scratch.results
    finish = prepared(_finish, GREEDY=greedy, num_warps=1, **options)
    finish((rows + 1,), ids, lanes, best, fields, counts, flag, results, vocab)


def sample(logits: Tensor, fields: Tensor) -> Tensor:
    """Steps 4 to 10. logits: [S, V] f32, adjusted; fields: [S, FIELDS] int64 -> [S] int64."""
    rows, vocab = logits.shape
    device = logits.device
    scratch = Scratch(rows, vocab, device)
    grid = (rows, cdiv(vocab, SLICE))
    flag = flags.word(device)
    scan = prepared(_scan, SLICE=SLICE, **overlap.launch(device, rows))
    scan(grid, logits, scratch.best, flag, fields, None, None, None, vocab)
    _choose(logits, fields, scratch.best, scratch.ids, scratch)
    return scratch.ids


def _choose(logits: Tensor, fields: Tensor, best: Tensor, ids: Tensor, scratch: Scratch) -> None:
    """Steps 4 to 10 behind `_scan`, in turns of as many rows as the lists of ranks hold."""
    step = scratch.ranks.shape[0]
    for start in range(0, logits.shape[0], step):
        part = slice(start, start + step)
        _turn(logits[part], fields[part], best[part], ids[part], scratch)


def _turn(logits: Tensor, fields: Tensor, best: Tensor, ids: Tensor, scratch: Scratch) -> None:
    rows, vocab = logits.shape
    sums, ends, bounds, ranks = scratch.sums, scratch.ends, scratch.bounds, scratch.ranks
    sums[:rows].zero_()
    grid = (rows, cdiv(vocab, SLICE))
    common = {"BUCKETS": BUCKETS.value}
    prepared(_count, SLICE=SLICE, **common)(grid, logits, best, fields, sums, vocab)
    prepared(_plan, num_warps=8, **common)((rows,), fields, sums, ends, bounds)
    prepared(_scatter, SLICE=SLICE, **common)(grid, logits, best, fields, ends, bounds, ranks, vocab)
    resolve = prepared(_resolve, TILE=TILE, num_warps=8, **common)
    resolve((rows,), best, fields, sums, ends, bounds, ranks, ids, vocab)
