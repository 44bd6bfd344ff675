"""A node's connections without a node: who leaves while one is made, and one that ends at once."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from countermark.errors import Unavailable
from countermark.proxy.journal import Journal
from countermark.proxy.settings import NodeLimits
from countermark.proxy.upstream import Node


class Made:
    """A session that has ended already."""

    is_over = True

    def __init__(self) -> None:
        self.closed = threading.Event()
        self.verdict: Any = type("V", (), {"claims": type("C", (), {"tls_spki": b"k"}), "boot_id": b"", "simulated": 1})
        self.witnessed: Any = type("W", (), {"checks": (), "data": None})

    def close(self) -> None:
        self.closed.set()


def node(connect: Any, executor: ThreadPoolExecutor) -> Node:
    return Node("127.0.0.1:9", connect=connect, limits=NodeLimits(), executor=executor, journal=Journal())


def test_who_leaves_while_a_connection_is_made_leaves_none_behind() -> None:
    made, begun, go_on = Made(), threading.Event(), threading.Event()

    def connect(_: str) -> Any:
        begun.set()
        assert go_on.wait(10)
        return made

    async def leave() -> None:
        with ThreadPoolExecutor(2) as executor:
            task = asyncio.create_task(node(connect, executor).acquire())
            while not begun.is_set():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()

    asyncio.run(leave())
    assert made.closed.wait(10)


def test_a_node_that_ends_every_connection_is_not_asked_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "note", lambda *_, **__: None)
    made: list[Made] = []

    def connect(_: str) -> Any:
        made.append(Made())
        return made[-1]

    async def ask() -> None:
        with ThreadPoolExecutor(2) as executor:
            with pytest.raises(Unavailable) as caught:
                await asyncio.wait_for(node(connect, executor).acquire(), 10)
            assert caught.value.code == "channel.lost"

    asyncio.run(ask())
    assert len(made) == 1
