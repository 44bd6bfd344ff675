"""Connect, attest, ask: the client's whole conversation with one appliance over one TLS connection.

Order, none of which can be left out: TLS handshake, Attest under a fresh nonce, appraisal, and only then a prompt; of
each stream the Accepted message is verified before a token is given out, and the receipt before there is an answer.
A connection that ends takes its Session with it: whoever wants to go on connects, and appraises, again.

What the peer says about errors is believed as far as the class and form of the code; its text is cut to printable
characters. A peer that breaks the protocol or fails a check is not talked to again: the Session closes.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, Unpack

import grpc
from google.protobuf.message import DecodeError

from countermark.appraise import Scope, TimeBasis, Verdict, appraise
from countermark.binding import Connection
from countermark.bundle import Bundle, write_bundle
from countermark.channel import Channel
from countermark.errors import (
    ChannelError,
    CountermarkError,
    FormatError,
    LogError,
    Recorded,
    RequestError,
    Unavailable,
    Undecidable,
    UsageError,
    VerificationError,
    WeightsError,
)
from countermark.formats.evidence import encode_evidence, parse_evidence
from countermark.formats.receipt import Answer as Streamed
from countermark.formats.receipt import encode_acceptance, encode_answer
from countermark.options import GenerateOptions
from countermark.policy import Policy
from countermark.receipt import Accepted, CheckedReceipt, verify_accepted, verify_receipt
from countermark.replayed import NodeReplay, require_able, verify_replay
from countermark.retrying import Retry, retrying
from countermark.wire import codec
from countermark.wire import countermark_v1_pb2 as pb
from countermark.witness import Witnessed, verify_witnessed

MAX_TEXT_CHARACTERS: Final = 16 * 1024 * 1024
_SAID: Final = 300
_KEY: Final = re.compile(r"[A-Za-z0-9._~+/-]{1,254}={0,2}")
_READ_S: Final = 30.0
_BY_CODE: Final[Mapping[str, type[CountermarkError]]] = {
    "replay.profile": Undecidable,
    "replay.weights_root": Undecidable,
    "replay.redacted": Undecidable,
    "replay.artefact": WeightsError,
}
_REFUSED: Final = frozenset(
    (
        *("engine.busy", "engine.stopping", "service.busy", "service.stopping"),
        *("quota.rate", "quota.tokens", "quota.concurrent"),
    )
)
"""With these a node refuses before it records an INTENT."""
_REFUSED_STREAM: Final = "RST_STREAM with error code 7"
"""grpcio's words for HTTP/2's REFUSED_STREAM (RFC 9113, 8.7): nothing of the request was processed. A server sends it
when streams that were cancelled are not all cleared away; seen with 200 clients of which a fifth leave early."""
_CLASSES: Final[Mapping[grpc.StatusCode, type[CountermarkError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.FAILED_PRECONDITION: ChannelError,
    grpc.StatusCode.PERMISSION_DENIED: ChannelError,
    grpc.StatusCode.UNAUTHENTICATED: RequestError,
    grpc.StatusCode.OUT_OF_RANGE: LogError,
}


def connect(
    address: str,
    policy: Policy,
    *,
    now: int | None = None,
    timeout_s: float = 30.0,
    endorsements: bytes | Callable[[bytes], bytes] | None = None,
    retry: Retry | None = None,
    key: str | None = None,
) -> Session:
    """Connect to `HOST:PORT`, demand evidence, appraise it; a Session or an error, nothing in between.

    `now`: unix seconds (the verdict then says `assumed`), else this machine's clock. `timeout_s`: for all of it, but
    for the fetching; of each attempt. `endorsements`: Intel's, to be used instead of those that the node sends: the
    JSON, or what gives it for a quote, such as `fetch.intel.fetch_collateral` with a source. Bundles then carry these.
    `key`: the operator's, for nodes that ask for one; sent with requests, so only to what was appraised.
    `retry`: a node that cannot be reached or has no time is asked again; each time everything is checked anew.
    Raises `Unavailable`, `ChannelError` (see `Channel.open`), what `endorsements` raises, and what `appraise` and
    `verify_witnessed` raise, with their `checks`.
    """
    return retrying(
        lambda: _connect(address, policy, now=now, timeout_s=timeout_s, endorsements=endorsements, key=key),
        retry,
    )


def _connect(
    address: str,
    policy: Policy,
    *,
    now: int | None,
    timeout_s: float,
    endorsements: bytes | Callable[[bytes], bytes] | None,
    key: str | None,
) -> Session:
    metadata = _bearer(key)
    started = time.monotonic()
    channel = Channel.open(address, timeout_s=timeout_s)
    try:
        nonce = secrets.token_bytes(codec.NONCE_BYTES)
        attest = channel.grpc_channel.unary_unary(codec.ATTEST, None, None)
        left_s = max(0.1, timeout_s - (time.monotonic() - started))
        try:
            answer = attest(pb.AttestRequest(nonce=nonce).SerializeToString(), timeout=left_s)
            response = pb.AttestResponse.FromString(answer)
        except grpc.RpcError as err:
            raise _translated(err, channel) from err
        except DecodeError as err:
            raise FormatError("attest: expected AttestResponse", code="attest.malformed") from err
        facts, evidence = channel.facts, response.evidence
        own = endorsements if not callable(endorsements) else _fetched(evidence, endorsements)
        verdict = appraise(
            evidence,
            policy,
            now=int(time.time()) if now is None else now,
            scope=Scope.SESSION,
            time_basis=TimeBasis.NOW if now is None else TimeBasis.ASSUMED,
            connection=Connection(
                nonce=nonce,
                exporter=facts.exporter,
                peer_spki=facts.peer_spki,
                group=facts.group,
                version=facts.version,
            ),
            endorsements=own,
        )
        witnessed = verify_witnessed(response.witnessed, verdict, policy)
        kept = evidence if own is None else _with_endorsements(evidence, own)
        return Session(channel, witnessed, kept, metadata)
    except BaseException:
        channel.close()
        raise


def _bearer(key: str | None) -> tuple[tuple[str, str], ...]:
    """RFC 6750 section 2.1, in gRPC's metadata. Raises `UsageError` (`usage.key`), which does not repeat the key."""
    if key is None:
        return ()
    if not _KEY.fullmatch(key):
        raise UsageError("key: expected 1 to 256 characters of RFC 6750's b64token", code="usage.key")
    return (("authorization", f"Bearer {key}"),)


def _fetched(evidence: bytes, fetch: Callable[[bytes], bytes]) -> bytes | None:
    try:
        quote = parse_evidence(evidence).quote
    except FormatError:
        return None  # refused by the appraisal, which says so with its checks
    return fetch(quote)


def _with_endorsements(evidence: bytes, own: bytes) -> bytes:
    """What a bundle carries must verify as it did here. The claims' digests cover no endorsements."""
    parsed = parse_evidence(evidence)
    return encode_evidence(replace(parsed, endorsements=replace(parsed.endorsements, tdx=own)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete answer with its checked receipt."""

    text: str
    tokens: tuple[int, ...]
    receipt: CheckedReceipt
    evidence: bytes
    witnessed: Witnessed

    @property
    def verdict(self) -> Verdict:
        return self.receipt.verdict

    def save(self, path: str | Path, *, manifest: bytes | None = None) -> Path:
        """Write the bundle: everything needed to verify this answer offline, prompt and answer included.

        `manifest`: the signed measurement manifest, to carry along. Raises as `bundle.write_bundle`.
        """
        accepted = self.receipt.accepted
        bundle = Bundle(
            request=accepted.request,
            acceptance=accepted.acceptance,
            answer=self.receipt.answer,
            receipt=self.receipt.receipt,
            evidence=self.evidence,
            manifest=manifest,
            epoch=self.witnessed.data,
        )
        write_bundle(Path(path), bundle)
        return Path(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The log probability of a drawn token, and the likeliest ids with theirs, in descending order.

    Natural logarithms, at temperature 1 and before bias, penalties and filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Session:
    """An appraised connection. Make it with `connect`; use it as a context manager. Thread-safe."""

    def __init__(
        self, channel: Channel, witnessed: Witnessed, evidence: bytes, metadata: Sequence[tuple[str, str]] = ()
    ) -> None:
        if type(witnessed) is not Witnessed or witnessed.verdict.scope is not Scope.SESSION:
            raise TypeError("witnessed: expected what verify_witnessed() made of this session's verdict")
        self.verdict: Verdict = witnessed.verdict
        self.witnessed = witnessed
        self.evidence = evidence
        self._channel = channel
        self._metadata = tuple(metadata)
        self._closed = False
        self._generate = channel.grpc_channel.unary_stream(codec.GENERATE, None, None)
        self._replay = channel.grpc_channel.unary_unary(codec.REPLAY, None, None)

    @property
    def is_over(self) -> bool:
        """The connection has ended; connect again."""
        return self._channel.is_over

    def generate(
        self,
        prompt: str | None = None,
        *,
        timeout_s: float | None = None,
        retry: Retry | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """Send a prompt (raw text), or `messages` under the model's chat template; see `GenerateOptions`.

        Returns once the appliance has committed to the request and that has been verified. Raises `RequestError`
        (`request.*`), `Unavailable`, whose `recorded` says whether the node may have an INTENT of it, or, when the
        commitment does not verify, `FormatError` or `VerificationError`. `timeout_s`: for the whole answer. `retry`: a
        request that the node refused before recording it is sent again, on this connection.
        """

        def attempt() -> Stream:
            stream = self.start(prompt, timeout_s=timeout_s, **options)
            stream.accept()
            return stream

        return retrying(attempt, retry, while_=lambda: not self.is_over)

    def start(
        self, prompt: str | None = None, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Stream:
        """As `generate`, but returns at once: `Stream.accept` waits for the commitment. `cancel` works from here on."""
        request = codec.encode_generate_request(prompt=prompt, **options)
        if self._channel.is_over or self._closed:
            raise self._channel.failure() or _closed()
        try:
            call = self._generate(request, timeout=timeout_s, metadata=self._metadata)
        except ValueError as err:  # grpcio's word for a channel that another thread has just closed
            raise _closed() from err
        return Stream(self, self._channel, call, request)

    def read_log(self, method: str, request: bytes) -> bytes:
        """One call of the node's `Log` service, as bytes: what `logsource.NodeSource` reads a log with.

        Raises `LogError`, `RequestError`, `Unavailable`.
        """
        try:
            answer: bytes = self._channel.grpc_channel.unary_unary(method, None, None)(request, timeout=_READ_S)
        except grpc.RpcError as err:
            raise _translated(err, self._channel) from err
        except ValueError as err:
            raise _closed() from err
        return answer

    def replay(self, answer: CheckedReceipt, *, timeout_s: float | None = None) -> NodeReplay:
        """Have this node run a verified answer again, prompt and output included; its REPLAY, checked.

        Raises `Undecidable` (`replay.profile`, `replay.weights_root`: it cannot, and is sent nothing), `Unavailable`,
        `RequestError`, `WeightsError` (`replay.artefact`), and what `verify_replay` raises.
        """
        require_able(self.verdict, answer)
        nonce = secrets.token_bytes(codec.NONCE_BYTES)
        request = pb.ReplayRequest(
            nonce=nonce,
            request=answer.accepted.request,
            accepted=encode_acceptance(answer.accepted.acceptance),
            answer=encode_answer(answer.answer),
            receipt=answer.receipt,
        ).SerializeToString()
        codec.parse_replay_request(request)
        if self._channel.is_over or self._closed:
            raise self._channel.failure() or _closed()
        try:
            data = self._replay(request, timeout=timeout_s, metadata=self._metadata)
            receipt = pb.ReplayResponse.FromString(data).receipt
            return verify_replay(receipt, self.verdict, nonce=nonce, answer=answer)
        except grpc.RpcError as err:
            raise _translated(err, self._channel) from err
        except ValueError as err:  # grpcio's word for a channel that another thread has just closed
            raise _closed() from err
        except DecodeError as err:
            self.close()
            raise FormatError("replay: expected ReplayResponse", code="replay.malformed") from err
        except (FormatError, VerificationError):
            self.close()
            raise

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream:
    """One answer as it arrives: iterate for its text, then (or at once) `result`. For one thread, `cancel` for any."""

    accepted: Accepted

    def __init__(self, session: Session, channel: Channel, call: Any, request: bytes) -> None:
        self._session = session
        self._channel = channel
        self._call = call
        self._request = request
        self._asked = codec.parse_generate_request(request).logprobs
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text: list[str] = []
        self._characters = 0
        self._answer: Answer | None = None
        self._failure: BaseException | None = None
        self._recorded = Recorded.UNKNOWN

    def accept(self) -> None:
        """Wait for the first message, the appliance's commitment, and verify it. Raises as `Session.generate` does.

        Once; `Session.generate` has done it.
        """
        try:
            first = self._read()
            if first is None or first.WhichOneof("event") != "accepted":
                raise FormatError("stream: expected Accepted first", code="stream.order")
            self.accepted = verify_accepted(codec.acceptance(first.accepted), self._session.verdict, self._request)
            self._recorded = Recorded.YES
        except BaseException as err:
            self._fail(err)
            raise

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids so far."""
        return tuple(self._tokens)

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each of `tokens`, if asked for. The appliance says so; no signature covers them."""
        return tuple(self._logprobs)

    def __iter__(self) -> Iterator[str]:
        """The text that has not been given out yet, piece by piece, until the receipt has been verified."""
        while True:
            text = self._advance()
            if text is None:
                return
            if text:
                yield text

    def result(self) -> Answer:
        """The whole answer with its verified receipt; waits for what is still to come.

        Raises `Unavailable` when it did not come to an end, else `FormatError`, `ReceiptError`, `LogError`.
        """
        while self._advance() is not None:
            pass
        assert self._answer is not None
        return self._answer

    def cancel(self) -> None:
        """Ask the appliance to stop; it records an ABORT."""
        self._call.cancel()

    def _advance(self) -> str | None:
        """The next message's text; None after the verified end."""
        if self._failure is not None:
            raise self._failure
        if self._answer is not None:
            return None
        try:
            message = self._read()
            match message.WhichOneof("event") if message is not None else None:
                case "tokens" if message is not None:
                    return self._take(message.tokens)
                case "finished" if message is not None:
                    self._answer = self._finish(message.finished)
                    return None
                case kind:
                    raise FormatError(f"stream: expected tokens or the receipt, got {kind}", code="stream.order")
        except BaseException as err:
            self._fail(err)
            raise

    def _read(self) -> pb.GenerateResponse | None:
        try:
            data = next(self._call, None)
        except grpc.RpcError as err:
            raise _translated(err, self._channel) from err
        return None if data is None else codec.parse_response(data)

    def _take(self, tokens: pb.Tokens) -> str:
        self._tokens += tokens.ids
        self._characters += len(tokens.text)
        most = self.accepted.intent.max_tokens
        if len(self._tokens) > most or self._characters > MAX_TEXT_CHARACTERS or not (tokens.ids or tokens.text):
            raise FormatError(f"stream: expected 1 to {most} tokens and their text", code="stream.size")
        for token, logprob, top in codec.logprobs(tokens, self._asked):
            self._logprobs.append(TokenLogprob(token=token, logprob=logprob, top=top))
        self._text.append(tokens.text)
        return tokens.text

    def _finish(self, finished: pb.Finished) -> Answer:
        streamed = Streamed(
            tokens=tuple(self._tokens),
            text="".join(self._text),
            fingerprints=tuple(finished.fingerprints),
            field_salts=finished.field_salts,
        )
        receipt = verify_receipt(
            finished.receipt,
            self._session.verdict,
            request=self.accepted.request,
            accepted=self.accepted,
            answer=streamed,
        )
        if self._read() is not None:
            raise FormatError("stream: expected nothing after the receipt", code="stream.order")
        return Answer(
            text=streamed.text,
            tokens=streamed.tokens,
            receipt=receipt,
            evidence=self._session.evidence,
            witnessed=self._session.witnessed,
        )

    def _fail(self, err: BaseException) -> None:
        self._failure = err
        self._call.cancel()
        if isinstance(err, Unavailable):
            refused = self._recorded is Recorded.UNKNOWN and err.code in _REFUSED
            err.recorded = Recorded.NO if refused else self._recorded
        if isinstance(err, FormatError | VerificationError):
            self._session.close()


def _closed() -> Unavailable:
    return Unavailable("session: closed", code="session.closed")


def _translated(err: grpc.RpcError, channel: Channel) -> CountermarkError:
    """A failed call in our own terms."""
    if not isinstance(err, grpc.Call):
        return Unavailable(f"call: {type(err).__name__}", code="channel.lost")
    status = err.code()
    given = {str(key): str(value) for key, value in err.trailing_metadata() or ()}
    code = given.get(codec.CODE_KEY, "")
    if not codec.is_code(code):
        unavailable = status is grpc.StatusCode.UNAVAILABLE
        if unavailable and _REFUSED_STREAM in (err.details() or ""):
            return Unavailable("service: refused the stream before reading it", code="service.busy")
        failure = channel.failure(wait_s=1.0 if unavailable else 0.0)
        if failure is not None or unavailable:
            if isinstance(failure, Unavailable):  # one for each call, because each says what was recorded of its own
                return Unavailable(str(failure), code=failure.code, retry_after_s=failure.retry_after_s)
            return failure or Unavailable("connection: lost", code="channel.lost")
        code = f"server.{status.name.lower()}"
    said = "".join(c if c.isprintable() else "?" for c in (err.details() or status.name)[:_SAID])
    retry = given.get(codec.RETRY_KEY, "")
    wait_s = int(retry) / 1000 if retry.isascii() and retry.isdigit() and len(retry) < 9 else None
    if wait_s is not None:
        said += f" (retry after {wait_s:g} s)"
    kind = _BY_CODE.get(code, _CLASSES.get(status, Unavailable))
    if kind is Unavailable:
        return Unavailable(f"server: {said}", code=code, retry_after_s=wait_s)
    return kind(f"server: {said}", code=code)
