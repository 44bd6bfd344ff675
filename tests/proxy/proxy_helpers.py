"""A proxy on a thread of its own, before scripted nodes or a real one; HTTP by hand."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from net_appliance import Appliance

from countermark.proxy.app import App
from countermark.proxy.guard import Guard
from countermark.proxy.http import Limits, Server
from countermark.proxy.journal import Journal
from countermark.proxy.settings import Bundles, NodeLimits, Settings
from countermark.session import Session, connect
from node_files import Node, write_node
from one_answer import NOW

QUICK = NodeLimits(retry_s=(0.05, 0.2), refused_s=(0.2, 0.4))


class Proxy:
    """A context manager: the proxy, its address and its log."""

    def __init__(
        self,
        nodes: tuple[str, ...],
        connected: Callable[[str], Session],
        *,
        bundles: Path | Bundles | None = None,
        guard: Guard | None = None,
        node_limits: NodeLimits = QUICK,
        http_limits: Limits | None = None,
        **settings: Any,
    ) -> None:
        self.log = io.StringIO()
        kept = Bundles(folder=bundles) if isinstance(bundles, Path) else bundles
        self.settings = Settings(
            guard=guard or Guard(listen="127.0.0.1"),
            nodes=nodes,
            bundles=kept,
            node_limits=node_limits,
            http_limits=http_limits or Limits(),
            **settings,
        )
        self._connected = connected
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.app: App
        self.server: Server
        self.port = 0
        self._failed: BaseException | None = None

    @classmethod
    def of(cls, *appliances: Appliance, policy: Any = None, **settings: Any) -> Self:
        """Before scripted nodes, under the policy of the first."""
        found = policy or appliances[0].machine.policy
        return cls(
            tuple(one.address for one in appliances), lambda address: connect(address, found, now=NOW), **settings
        )

    @classmethod
    def before(cls, node: Node, **settings: Any) -> Self:
        return cls((node.address,), lambda address: connect(address, node.policy), **settings)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60)
        if self._failed is not None:
            raise self._failed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as err:  # noqa: BLE001
            self._failed = err
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self.app = App(self.settings, self._connected, Journal(self.log))
        self.server = Server(self.app, self.settings.http_limits)
        await self.app.start()
        self.port = await self.server.start("127.0.0.1", 0)
        self._ready.set()
        await self._stop.wait()
        await self.server.close(grace_s=0.5)
        await self.app.close()

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
            given = {"content-type": "application/json"} if body is not None else {}
            connection.request(method, path, body=data, headers=given | (headers or {}))
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def chat(self, text: str = "three words", headers: dict[str, str] | None = None, **more: Any) -> tuple[int, Any]:
        """Status and JSON of a chat completion."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 3} | more
        status, _, data = self.request("POST", "/v1/chat/completions", body, headers)
        return status, json.loads(data)

    def stream(self, text: str = "three words", headers: dict[str, str] | None = None, **more: Any) -> list[Any]:
        """Every event of a stream; the last one is `[DONE]`, or an error, or `cut` where the connection was."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 3, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            given = {"content-type": "application/json"} | (headers or {})
            connection.request("POST", "/v1/chat/completions", body=json.dumps(body | more).encode(), headers=given)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            data, cut = b"", False
            try:
                while piece := answer.read1(65536):
                    data += piece
            except http.client.IncompleteRead:
                cut = True
        events = [part.removeprefix(b"data: ") for part in data.split(b"\n\n") if part]
        found = ["[DONE]" if event == b"[DONE]" else json.loads(event) for event in events]
        return [*found, "cut"] if cut else found

    def status(self) -> Any:
        return json.loads(self.request("GET", "/countermark/status.json")[2])

    def raw(self, data: bytes, *, wait_s: float = 10.0) -> bytes:
        """What comes back for these bytes, until the proxy ends the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait_s) as sock:
            sock.sendall(data)
            found = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := sock.recv(65536):
                    found += piece
            return found


def text_of(events: list[Any]) -> str:
    """What a client of a stream has read."""
    chunks = [event for event in events if isinstance(event, dict) and event.get("choices")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "condition not reached in time"
        time.sleep(0.01)


@contextmanager
def real_node(directory: Path, weights: Path) -> Iterator[Node]:
    """A simulated machine in `directory` with an appliance that serves on it, as a process."""
    policy = write_node(directory, weights)
    with (directory / "appliance.log").open("w") as log:
        process = subprocess.Popen(
            (sys.executable, "-m", "countermark_appliance.cli", "serve", "--config", "node.toml"),
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (directory / "appliance.log").read_text()
        yield Node(address=json.loads(line)["listening"], policy=policy, directory=directory, process=process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
