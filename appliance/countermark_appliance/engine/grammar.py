"""What an answer must fit, as a mask of ids for every token: integers, a function of the grammar and the tokens before.

An id is allowed where its bytes, behind the answer so far, begin some text of the grammar's language; an id that ends
the sequence exactly where the answer so far is such a text. `grammarlib` says how the library is asked. Where the mask
meets the logits it is a bias (`BARRED`) that any other logit is far above: see `draw.py`, and `samplerstate.py` for
the GPU. Sums of the sampler and everything behind them are then those of the allowed ids alone.

A grammar is compiled before its request is recorded, off the engine's thread, and first by the judge. A mask takes
10 to 30 microseconds and may take more; what a walk may spend in all is bounded, and a walk beyond it ends its own
request.
"""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import llguidance
import numpy as np
import numpy.typing as npt

from countermark.errors import RequestError
from countermark_appliance.engine import grammarlib
from countermark_appliance.engine.grammarjudge import COSTLY, USABLE

BARRED: Final = -(2.0**84)
"""Added to the logit of an id that is not allowed. No penalty makes it more than -2^70, or leaves the sampler's range:
at any temperature its weight is 0, and no id of weight 0 is drawn."""
WALK_S: Final = 0.5
TOKEN_S: Final = 0.002
"""CPU time that a walk may spend: so much, and so much more for each token."""
JUDGE_WAIT_S: Final = 60.0
"""A child has 2 seconds of a processor; how long that takes depends on who else wants one."""

Mask = npt.NDArray[np.int32]
"""[ceil(vocabulary / 32)]: of id i bit i % 32 of word i // 32, 1 where it is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLibrary:
    """What reads grammars here. A mask is promised to be the same where all three are."""

    library: str
    version: str
    rules: int


class GrammarError(ArithmeticError):
    """There is no next mask: no id fits, or it takes too much."""


class Grammars:
    """Compiles grammars for one tokenizer. Any thread; the judge takes one at a time."""

    def __init__(self, tokens: Sequence[bytes], stop_tokens: Collection[int]) -> None:
        """`tokens`: of each id its bytes. `stop_tokens`: the ids that end an answer. Cheap until a grammar comes."""
        self._tokens = tuple(b"" if i in set(stop_tokens) else data for i, data in enumerate(tokens))
        self._stops = _words(stop_tokens, len(tokens))
        self._judge = _Judge(self._tokens)
        self._lock = threading.Lock()
        self._trie: llguidance.LLTokenizer | None = None

    @property
    def library(self) -> GrammarLibrary:
        return GrammarLibrary(library=grammarlib.LIBRARY, version=grammarlib.version(), rules=grammarlib.RULES)

    def compile(self, kind: str, text: str) -> Grammar:
        """Raises `RequestError`: `request.grammar` (none, or one that nothing fits), `request.grammar_cost`."""
        with self._lock:  # the judge is as fast as one processor; who waits here waits off the engine's thread
            verdict, why = self._judge.ask(kind, text)
            if self._trie is None:
                self._trie = grammarlib.vocabulary(self._tokens)
        if verdict != USABLE:
            raise _refused(kind, why, costly=verdict == COSTLY)
        try:
            matcher = grammarlib.compiled(self._trie, kind, text)
        except grammarlib.Refused as err:
            raise _refused(kind, str(err), costly=err.costly) from err
        grammar = Grammar(matcher, self._stops, len(self._tokens))
        try:
            grammar.walk(hurried=True)
        except GrammarError as err:
            raise _refused(kind, str(err), costly=False) from err
        return grammar

    def close(self) -> None:
        """End the judge. Idempotent."""
        self._judge.close()


class Grammar:
    """One compiled grammar: where walks begin."""

    def __init__(self, matcher: llguidance.LLMatcher, stops: Mask, vocab: int) -> None:
        self._matcher = matcher
        self._stops = stops
        self._vocab = vocab

    def walk(self, *, hurried: bool = False) -> Walk:
        """A walk from the beginning. `hurried`: what it may spend is bounded. Raises `GrammarError`."""
        return Walk(self._matcher.deep_copy(), self._stops, self._vocab, hurried=hurried)


class Walk:
    """Through one answer, token by token. `mask`: for the next one."""

    __slots__ = ("_matcher", "_spent", "_spent_most", "_stops", "_vocab", "mask")

    def __init__(self, matcher: llguidance.LLMatcher, stops: Mask, vocab: int, *, hurried: bool) -> None:
        self._matcher = matcher
        self._stops = stops
        self._vocab = vocab
        self._spent = 0.0
        self._spent_most = WALK_S if hurried else float("inf")
        self.mask = self._next()

    def step(self, token: int) -> None:
        """The answer goes on with `token`, which ends nothing. Raises `GrammarError`."""
        began = time.thread_time()
        fits = self._matcher.consume_token(token)
        self._spent += time.thread_time() - began
        self._spent_most += TOKEN_S
        if not fits:
            raise GrammarError("grammar: expected a token that it allows, or one that it can follow, got another")
        self.mask = self._next()

    def _next(self) -> Mask:
        began = time.thread_time()
        mask = np.zeros((self._vocab + 32) // 32, dtype=np.int32)  # the library's own end is an id beyond ours
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        mask = mask[: len(self._stops)]
        if self._vocab % 32:
            mask[-1] &= (1 << self._vocab % 32) - 1
        self._spent += time.thread_time() - began
        if self._matcher.is_error() or self._spent > self._spent_most:
            raise GrammarError("grammar: expected one whose masks take less")
        if self._matcher.is_accepting():
            mask |= self._stops
        if not mask.any():
            raise GrammarError("grammar: expected an id that fits next, got none")
        return mask


def allows(mask: Mask, token: int) -> bool:
    """Whether the mask has the id."""
    return bool(mask[token >> 5] >> (token & 31) & 1)


def unpacked(mask: Mask, vocab: int) -> npt.NDArray[np.bool_]:
    """[vocab], true where an id is allowed."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab).view(np.bool_)


class _Judge:
    """The process of `grammarjudge`; started for the first grammar, and again when it is gone."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, kind: str, text: str) -> tuple[int, str]:
        """The verdict and why. What the judge does not live to say is that it takes too much."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._started()
        data = text.encode()
        watch = threading.Timer(JUDGE_WAIT_S, process.kill)
        watch.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(struct.pack("<BI", grammarlib.KINDS.index(kind), len(data)) + data)
            process.stdin.flush()
            head = process.stdout.read(5)
            if len(head) < 5:
                return COSTLY, ""
            verdict, length = struct.unpack("<BI", head)
            return verdict, process.stdout.read(length).decode(errors="replace")
        except OSError:
            return COSTLY, ""
        finally:
            watch.cancel()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _started(self) -> subprocess.Popen[bytes]:
        self.close()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "countermark_appliance.engine.grammarjudge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # the next to use it finds that it is gone
            process.stdin.write(struct.pack("<I", len(self._tokens)))
            process.stdin.write(b"".join(struct.pack("<I", len(data)) + data for data in self._tokens))
            process.stdin.flush()
            process.stdout.read(1)
        return process


def _words(ids: Collection[int], vocab: int) -> Mask:
    bits = np.zeros((vocab + 31) // 32 * 32, dtype=np.bool_)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def _refused(kind: str, why: str, *, costly: bool) -> RequestError:
    if costly:
        detail = f": {why}" if why else ""
        return RequestError(
            f"{kind}: expected one that takes less time and memory{detail}", code="request.grammar_cost"
        )
    return RequestError(f"{kind}: expected one that can be followed: {why}", code="request.grammar")
