"""A whole appliance for network tests: simulated machine, recorder, service, front end; only the model is scripted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

import one_answer
from countermark.channel import Channel
from countermark.errors import RequestError
from countermark.formats.evidence import Passport
from countermark.formats.records import Kind, parse_leaf
from countermark.session import Session, connect
from countermark_appliance.connections import Connections
from countermark_appliance.engine.places import Places
from countermark_appliance.engine.request import (
    DoneEvent,
    Finish,
    Handle,
    Place,
    Prepared,
    Request,
    Sink,
    TokenLogprob,
    TokensEvent,
)
from countermark_appliance.engine.sampling import resolve_logprobs, resolve_sampling
from countermark_appliance.frontend import FrontEnd, Limits
from countermark_appliance.operations.watching import Operations
from countermark_appliance.service import Service, ServiceLimits
from one_answer import NOW, Machine

WORDS = ("one ", "two ", "three ", "four ", "five ", "six ", "seven ", "eight ")


@dataclass
class _Handle:
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedEngine:
    """Counts in words until `max_tokens`, `delay_s` apart; holds everybody while `hold` is set."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.hold = threading.Event()
        self.submitted: list[Prepared] = []
        self.places = Places(1000, lambda: 1.0)
        self.before_submit: Callable[[], None] = lambda: None
        self.handles: list[_Handle] = []
        self.closing = threading.Event()
        self.ended: list[str] = []

    def reserve(self, client: bytes = b"") -> Place:
        return self.places.take(client)

    def prepare(self, request: Request) -> Prepared:
        if request.model not in ("", "tiny"):
            raise RequestError("model: expected 'tiny'", code="request.model")
        text = request.prompt if request.messages is None else request.messages[-1].content
        if not text:
            raise RequestError("prompt: expected text", code="request.prompt_empty")
        if text == "stumble":
            raise ValueError(f"could not make sense of {text!r} and SECRET")
        return Prepared(
            request=request,
            model="tiny",
            prompt_tokens=tuple(range(1, len(text.split()) + 1)),
            max_tokens=request.max_tokens or 8,
            stop=request.stop,
            stop_tokens=(2,),
            sampling=resolve_sampling(
                vocab=1000,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                seed=request.seed,
            ),
            ignore_eos=bool(request.ignore_eos),
            logprobs=resolve_logprobs(request.logprobs),
        )

    def submit(
        self, prepared: Prepared, sink: Sink, deadline_s: float | None = None, place: Place | None = None
    ) -> Handle:
        assert place is not None
        self.before_submit()
        self.submitted.append(prepared)
        handle = _Handle()
        self.handles.append(handle)
        threading.Thread(target=self._run, args=(prepared, sink, handle, deadline_s), daemon=True).start()
        return handle

    def _run(self, prepared: Prepared, sink: Sink, handle: _Handle, deadline_s: float | None) -> None:
        end = None if deadline_s is None else time.monotonic() + deadline_s
        ids: list[int] = []
        text: list[str] = []
        reason = Finish.LENGTH
        first = time.time()
        for i in range(prepared.max_tokens):
            while self.hold.is_set() and not handle.cancelled.is_set() and not self.closing.is_set():
                if end is not None and time.monotonic() >= end:
                    break
                time.sleep(0.002)
            if handle.cancelled.is_set():
                reason = Finish.CANCELLED
            elif self.closing.is_set():
                reason = Finish.SHUTDOWN
            elif end is not None and time.monotonic() >= end:
                reason = Finish.DEADLINE
            if reason is not Finish.LENGTH:
                break
            ids.append(10 + i % 100)
            text.append(WORDS[i % len(WORDS)])
            likely = tuple((1000 + n, -0.5 * n) for n in range(prepared.logprobs))
            logprobs = (TokenLogprob(logprob=-0.25 * ids[-1], top=likely),) if prepared.logprobs else ()
            sink(TokensEvent(ids=(ids[-1],), text=text[-1], logprobs=logprobs))
            if self.delay_s:
                time.sleep(self.delay_s)
        self.ended.append(reason.value)
        sink(
            DoneEvent(
                reason=reason,
                output_tokens=tuple(ids),
                text="".join(text),
                fingerprints=tuple(i.to_bytes(16, "big") for i in ids),
                prompt_tokens=len(prepared.prompt_tokens),
                cached_tokens=0,
                first_token_time=first,
                end_time=time.time(),
            )
        )


@dataclass
class Appliance:
    machine: Machine
    engine: ScriptedEngine
    service: Service
    front_end: FrontEnd
    connections: Connections

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.front_end.port}"

    def connect(self, address: str | None = None) -> Session:
        return connect(address or self.address, self.machine.policy, now=NOW)

    def channel(self) -> Channel:
        return Channel.open(self.address)

    def kinds(self) -> list[Kind]:
        """What the log holds, in order."""
        size, _ = self.machine.recorder.head()
        return [parse_leaf(leaf).kind for leaf in self.machine.recorder.leaves(0, size)]


class Wrapped:
    """Another object with some of its methods replaced."""

    def __init__(self, inner: object, **replaced: object) -> None:
        self._inner = inner
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextmanager
def running(
    directory: Path,
    *,
    limits: ServiceLimits | None = None,
    front_limits: Limits | None = None,
    recorder: Callable[[Any], Any] = lambda recorder: recorder,
    attester: Callable[[Any], Any] = lambda attester: attester,
    operator_dir: Path | None = None,
    operations: Operations | None = None,
    engine: Any = None,
) -> Iterator[Appliance]:
    """Start everything; `recorder` and `attester` may wrap what the service is given. `engine`: another than the
    scripted one, which its maker closes."""
    code = directory / "code"
    code.mkdir()
    (code / "code.py").write_text("x = 1\n")
    machine = one_answer.start(directory / "log", code, operator_dir=operator_dir)
    connections, engine = Connections(), ScriptedEngine() if engine is None else engine
    service = Service(
        attester=attester(machine.attester),
        recorder=recorder(machine.recorder),
        engine=engine,
        connections=connections,
        passport=b"passport evidence",
        limits=limits,
        operations=operations,
    )
    port = service.start()
    front_end = start_front_end(machine, connections, port, front_limits)
    service.set_serving()
    appliance = Appliance(machine, engine, service, front_end, connections)
    try:
        yield appliance
    finally:
        if isinstance(engine, ScriptedEngine):
            engine.hold.clear()
        service.stop(grace_s=0.2)
        front_end.close()
        machine.recorder.close()


def start_front_end(machine: Machine, connections: Connections, port: int, limits: Limits | None = None) -> FrontEnd:
    return FrontEnd.start(
        host="127.0.0.1",
        port=0,
        private_key=tls_key(machine),
        certificate=machine.keyring.tls_certificate(
            Passport(quote=b"q", claims=b"c"), now=NOW, valid_s=86400, simulated=True
        ),
        upstream_port=port,
        connections=connections,
        limits=limits,
    )


def tls_key(machine: Machine) -> bytes:
    return machine.keyring.tls.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
