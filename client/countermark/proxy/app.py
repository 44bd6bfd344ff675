"""The proxy's routes: who is let in, what is asked, and who answers it.

OpenAI's below /v1 (chat completions, completions, models), ours below /countermark, the status page at /.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from countermark.bundle import MAX_BUNDLE_BYTES
from countermark.errors import CountermarkError, Recorded, RequestError, Unavailable
from countermark.files import read_file
from countermark.proxy import spoken, status
from countermark.proxy.http import Reply, Request
from countermark.proxy.journal import Journal
from countermark.proxy.ledger import Keeper, Ledger
from countermark.proxy.serving import Order, Serving
from countermark.proxy.settings import Settings
from countermark.proxy.upstream import Node, Upstream
from countermark.proxy.wanted import ANY_MODEL, parse_wanted
from countermark.session import Session
from countermark.wire import codec

CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
MODELS: Final = "/v1/models"
STATUS: Final = "/countermark/status.json"
BUNDLES: Final = "/countermark/bundles/"
_POSTED: Final = (CHAT, TEXT)
_READ: Final = ("/", "/healthz", MODELS, STATUS)
_OPEN: Final = ("/", "/healthz")
"""What needs no key: a page without content, and whether anything answers."""
_SAVE: Final = "x-countermark-bundle"
_HOLD: Final = "x-countermark-hold"


class App:
    """The handler that `http.Server` serves. `start`, then `close`."""

    def __init__(self, settings: Settings, connect: Callable[[str], Session], journal: Journal) -> None:
        """`connect`: appraises the node at an address, or raises; it may block. Raises `UsageError` (`usage.file`)."""
        self.settings = settings
        self.ledger = Ledger()
        self.started = time.time()
        self._journal = journal
        self._chores = ThreadPoolExecutor(8, "countermark-proxy")
        self._answers = ThreadPoolExecutor(settings.streams, "countermark-answer")
        self.keeper = None if settings.bundles is None else Keeper(settings.bundles)
        nodes = (
            Node(address, connect=connect, limits=settings.node_limits, executor=self._chores, journal=journal)
            for address in settings.nodes
        )
        self.upstream = Upstream(nodes=tuple(nodes))
        self.serving = Serving(
            settings=settings,
            upstream=self.upstream,
            ledger=self.ledger,
            keeper=self.keeper,
            journal=journal,
            answers=self._answers,
            chores=self._chores,
        )

    async def start(self) -> list[CountermarkError]:
        """Appraise every node once; what was refused."""
        return await self.upstream.start()

    async def close(self) -> None:
        """End every connection. The server must have been closed before."""
        await self.upstream.close()
        self._answers.shutdown(wait=False, cancel_futures=True)
        self._chores.shutdown(wait=False, cancel_futures=True)

    def admit(self, head: Request) -> None:
        """See `http.Handler`. Raises `RequestError` (`proxy.*`)."""
        guard, path, most = self.settings.guard, _path(head), self.settings.http_limits.body_bytes
        guard.check_browser(head.headers)
        if head.method == "OPTIONS":
            return
        if path not in _OPEN:
            guard.check_key(head.headers)
        posted = path in _POSTED
        if not posted and path not in _READ and not path.startswith((f"{MODELS}/", BUNDLES)):
            raise RequestError("path: expected chat/completions, completions or models below /v1", code="proxy.path")
        if head.method not in (("POST",) if posted else ("GET", "HEAD")):
            raise RequestError(f"method: expected {'POST' if posted else 'GET'}", code="proxy.method")
        if posted and head.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("content-type: expected application/json", code="proxy.media")
        length = head.headers.get("content-length", "0")
        if len(length) > 12 or int(length) > most:
            raise RequestError(f"body: expected at most {most} bytes", code="proxy.body")

    async def handle(self, request: Request, reply: Reply) -> None:
        """See `http.Handler`."""
        reply.add(self.settings.guard.check_browser(request.headers))
        path = _path(request)
        if request.method == "OPTIONS":
            await reply.send(204, self.settings.guard.preflight(), b"")
        elif path in _POSTED:
            await self.serving.answer(self._order(request, path), reply)
        elif path.startswith(MODELS):
            await reply.send_json(200, self._models(path))
        elif path.startswith(BUNDLES):
            await self._bundle(path.removeprefix(BUNDLES), reply)
        elif path == STATUS:
            await reply.send_json(200, status.as_json(self))
        elif path == "/healthz":
            ready = any(node.is_ready for node in self.upstream.nodes)
            await reply.send_json(200 if ready else 503, {"ready": ready})
        else:
            await reply.send(200, status.HEADERS, status.PAGE)

    async def refuse(self, err: BaseException, request: Request | None, reply: Reply) -> None:
        """See `http.Handler`."""
        if not isinstance(err, CountermarkError):  # its text may hold anything
            self._journal.note("proxy_error", code=type(err).__name__, where=_where(err))
            err = Unavailable("proxy: an error of its own; its log names the place", code="proxy.error")
        if reply.status:
            await reply.cut()
            return
        self.ledger.sums["refused"] += 1
        code = spoken.http_status(err)
        route = None if request is None or _path(request) not in _POSTED else _path(request)
        self._journal.note("refused", route=route, status=code, code=err.code, step=err.step)
        again = isinstance(err, Unavailable) and err.recorded is Recorded.NO and err.code != "proxy.error"
        headers = {"x-should-retry": "true" if again else "false"}
        if isinstance(err, Unavailable) and err.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(err.retry_after_s)))
        if code == 401:
            headers["www-authenticate"] = "Bearer"
        await reply.send_json(code, spoken.error_body(err), headers)

    def _order(self, request: Request, path: str) -> Order:
        wanted = parse_wanted(request.body, chat=path == CHAT, max_bytes=self.settings.http_limits.body_bytes)
        codec.encode_generate_request(**wanted.settings)  # what no node would take is refused before one is asked
        bundles = self.settings.bundles
        asked = request.headers.get(_SAVE)
        if asked not in (None, "save"):
            raise RequestError(f"{_SAVE}: expected save", code="proxy.header")
        if asked is not None and bundles is None:
            raise RequestError(f"{_SAVE}: expected a proxy with --bundles DIR", code="proxy.header")
        if request.headers.get(_HOLD) not in (None, "true"):
            raise RequestError(f"{_HOLD}: expected true", code="proxy.header")
        return Order(
            wanted=wanted,
            route=path,
            save=bundles is not None and (bundles.every or asked is not None),
            hold=self.settings.hold or _HOLD in request.headers,
        )

    def _models(self, path: str) -> dict[str, Any]:
        """What may be asked for: `countermark` for whatever a node serves, and the names that are known."""
        nodes = [node for node in self.upstream.nodes if node.is_ready]
        names = dict.fromkeys([ANY_MODEL, *(node.model for node in nodes if node.model)])
        models = [self._model(name, [n for n in nodes if name in (ANY_MODEL, n.model)]) for name in names]
        if path == MODELS:
            return {"object": "list", "data": models}
        asked = unquote(path.removeprefix(f"{MODELS}/"))
        found = next((model for model in models if model["id"] == asked), None)
        if found is None:
            raise RequestError("model: expected one that /v1/models lists", code="request.model")
        return found

    def _model(self, name: str, nodes: list[Node]) -> dict[str, Any]:
        verdicts = [(node.address, node.seen.verdict) for node in nodes]
        return {
            "id": name,
            "object": "model",
            "created": int(self.started),
            "owned_by": "countermark",
            "countermark": [
                {
                    "node": address,
                    "weights_root": verdict.weights_root.hex(),
                    "profile": verdict.profile,
                    "image_id": verdict.image_id.hex(),
                    "system_fingerprint": spoken.fingerprint(verdict),
                    "simulated": verdict.simulated,
                }
                for address, verdict in verdicts
                if verdict is not None
            ],
        }

    async def _bundle(self, name: str, reply: Reply) -> None:
        if self.keeper is None:
            raise RequestError("bundle: expected a proxy with --bundles DIR", code="proxy.bundle")
        file = self.keeper.find(name)
        data = read_file(file, max_bytes=MAX_BUNDLE_BYTES)
        headers = {
            "content-type": "application/octet-stream",
            "content-disposition": f"attachment; filename={file.name}",
        }
        await reply.send(200, headers, data)


def _path(request: Request) -> str:
    """Without a query, which no route reads, and which is as private as a body."""
    return request.path.partition("?")[0]


def _where(err: BaseException) -> str:
    place = err.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "" if place is None else f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}"
