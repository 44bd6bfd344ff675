"""A log read from a web server: the same verification, and what servers do wrong."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import one_answer
from countermark.errors import CountermarkError, LogError, Unavailable, UsageError
from countermark.fetch.https import Service
from countermark.formats.witnessed import boot_log_keys, parse_sidecar
from countermark.logcheck import Rules, verify_log
from countermark.logsource import TileSource, directory, website
from countermark.tlog.merkle import verify_consistency


class Handler(http.server.SimpleHTTPRequestHandler):
    status: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        if self.path in self.status:
            self.send_error(self.status[self.path])
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("web")
    world = one_answer.make_world(tmp_path)
    for _ in range(130):
        world.machine.outcome(world.machine.intent(world.verdict))
    world.machine.recorder.close()
    return tmp_path / "log" / world.machine.keyring.boot_id.hex()


@pytest.fixture
def site(log: Path) -> Iterator[str]:
    def handler(*args: object) -> Handler:
        return Handler(*args, directory=str(log))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:  # type: ignore[arg-type]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        Handler.status = {}
        server.shutdown()


def opened(url: str) -> TileSource:
    return website(Service(url=url))


def check(source: TileSource) -> int:
    data = source.sidecar()
    assert data is not None
    sidecar = parse_sidecar(data)
    checked = verify_log(source, sidecar.epoch.origin, boot_log_keys(sidecar.keys), rules=Rules.BOOT)
    if checked.checkpoint.size > 3:
        proof = source.consistency(3, checked.checkpoint)
        assert proof == directory_proof(source, checked.checkpoint.size)
    return checked.checkpoint.size


def directory_proof(source: TileSource, size: int) -> tuple[bytes, ...]:
    from countermark.tlog.merkle import Tree, consistency_proof, leaf_hash

    leaves = [*source.entries(0, 256), *source.entries(1, size - 256)]
    tree = Tree(map(leaf_hash, leaves))
    proof = consistency_proof(3, size, tree.node)
    verify_consistency(3, size, tree.root(3), tree.root(), proof)
    return proof


def test_a_website_is_a_log(site: str, log: Path) -> None:
    assert check(opened(site)) == check(directory(log)) == 263


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/checkpoint", 404, "log.fetch.status"),
        ("/checkpoint", 503, "log.fetch.status"),
        ("/tile/0/000", 404, "log.missing"),
        ("/tile/entries/001.p/7", 404, "log.missing"),
    ],
)
def test_files_that_are_not_there(site: str, path: str, status: int, code: str) -> None:
    Handler.status = {path: status}
    with pytest.raises(CountermarkError) as caught:
        check(opened(site))
    assert caught.value.code == code
    assert isinstance(caught.value, Unavailable if code.startswith("log.fetch") else LogError)


def test_nobody_there() -> None:
    with pytest.raises(Unavailable) as caught:
        opened("http://127.0.0.1:1").checkpoint()
    assert caught.value.code == "log.fetch.connection"


def test_a_checkpoint_that_never_ends(site: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countermark.logsource.MAX_NOTE_BYTES", 1000)
    with pytest.raises(Unavailable) as caught:
        opened(site).checkpoint()
    assert caught.value.code == "log.fetch.too_long"


def test_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        directory(tmp_path / "none")
    assert caught.value.code == "usage.file"
    with pytest.raises(LogError) as empty:
        directory(tmp_path).checkpoint()
    assert empty.value.code == "log.missing"
