"""The appliance has its log's head vouched for: by an authority that is `openssl ts`, by a calendar on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from calendars import Calendar, calendar
from cryptography.x509.oid import ExtendedKeyUsageOID
from test_anchors import note
from test_time_stamps import laid_out, openssl
from tsa import DAY, Authority, issue, response

from countermark.anchors import Headers, verify_anchors
from countermark.errors import Unavailable
from countermark.fetch.https import Service
from countermark.formats.anchors import FOLDER, AnchorKind, parse_anchors
from countermark.formats.ots import Header, parse_proof
from countermark_appliance.records.anchors import FIRST_RETRY_S, Anchors, Calendars, Submitter, TimeStamps
from vendor_service import Reply, Server, serving

HOUR = 3600.0


class Openssl:
    """A time-stamping authority."""

    def __init__(self, folder: Path) -> None:
        start = int(time.time()) - DAY
        dates = {"start": start, "end": start + 9 * DAY}
        root = issue("root", **dates)
        between = issue("between", root, **dates)
        usage = [ExtendedKeyUsageOID.TIME_STAMPING]
        self.authority = Authority(root, between, issue("stamper", between, ca=False, usage=usage, **dates))
        self.folder = folder
        laid_out(folder, self.authority)
        (folder / "chain.pem").write_bytes(between.pem + root.pem)

    def __call__(self, body: bytes) -> Reply:
        (self.folder / "query").write_bytes(body)
        reply = ("-signer", "signer.pem", "-inkey", "signer.key", "-chain", "chain.pem", "-out", "reply")
        openssl(self.folder, "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "query", *reply)
        return Reply((self.folder / "reply").read_bytes())


@pytest.fixture
def authority(tmp_path: Path) -> Iterator[tuple[Server, Openssl]]:
    (tmp_path / "tsa").mkdir()
    stamps = Openssl(tmp_path / "tsa")
    with serving({"/tsr": stamps}) as server:
        yield server, stamps


@pytest.fixture
def booked() -> Iterator[Calendar]:
    with calendar() as found:
        yield found


def log(tmp_path: Path, name: str = "b0") -> Path:
    path = tmp_path / "log" / name
    path.mkdir(parents=True)
    return path


def anchors(path: Path, head: Callable[[], bytes], *submitters: Submitter) -> Anchors:
    return Anchors(path, head, submitters, every_s=HOUR)


def test_a_stamp_for_each_head_that_has_grown(tmp_path: Path, authority: tuple[Server, Openssl]) -> None:
    server, stamps = authority
    path, size = log(tmp_path), [3]
    taken = anchors(path, lambda: note(size[0]), TimeStamps(Service(url=f"{server.url}/tsr")))
    assert taken.round(0.0) == HOUR
    taken.round(HOUR - 1)  # not due
    taken.round(HOUR)  # nothing has grown
    assert len(server.asked) == 1
    size[0] = 7
    taken.round(2 * HOUR)
    assert sorted(item.name for item in (path / FOLDER).iterdir()) == ["0", "1"]
    roots = [stamps.authority.root.digest]
    for name, stamped in (("0", 3), ("1", 7)):
        data = (path / FOLDER / name).read_bytes()
        assert parse_anchors(data)[0].checkpoint == note(stamped)
        found = verify_anchors(data, note(stamped), tsa_roots=roots)
        assert found.time is not None
        assert abs(found.time - time.time()) < 60
    command, target, headers, _ = server.asked[0]
    assert (command, target, headers["Content-Type"]) == ("POST", "/tsr", "application/timestamp-query")


@pytest.mark.parametrize(
    ("code", "reply"),
    [
        ("anchor.refused", Reply(response(None, status=2))),
        ("anchor.answer", Reply(response(Authority().token(b"another message", nonce=1)))),
        ("anchor.answer", Reply(response(Authority().token(note(3))))),  # no nonce: it may have been made before
        ("endorsements.fetch.status", Reply(status=503)),
    ],
)
def test_answers_that_are_none(code: str, reply: Reply) -> None:
    with serving({"/": reply}) as server, pytest.raises(Unavailable) as caught:
        TimeStamps(Service(url=server.url)).submit(note(3))
    assert caught.value.code == code


def test_whoever_fails_is_asked_again_later_each_time(tmp_path: Path, authority: tuple[Server, Openssl]) -> None:
    server, stamps = authority
    server.routes["/tsr"] = Reply(status=503)
    path = log(tmp_path)
    taken = anchors(path, lambda: note(3), TimeStamps(Service(url=f"{server.url}/tsr")))
    now, waits = 0.0, []
    for _ in range(9):
        after = taken._turns[0].due
        taken.round(max(now, after))
        now = max(now, after)
        waits.append(taken._turns[0].due - now)
    assert waits == [min(HOUR, FIRST_RETRY_S * 2**n) for n in range(9)]
    assert not (path / FOLDER).exists()
    server.routes["/tsr"] = stamps
    taken.round(taken._turns[0].due)
    assert len(list((path / FOLDER).iterdir())) == 1
    assert taken._turns[0].failures == 0


def test_a_calendar_promises_and_keeps_it(tmp_path: Path, booked: Calendar) -> None:
    path = log(tmp_path)
    taken = anchors(path, lambda: note(3), Calendars((Service(url=booked.url),)))
    taken.round(0.0)
    file = path / FOLDER / "0"
    (anchor,) = parse_anchors(file.read_bytes())
    assert anchor.kind is AnchorKind.OTS
    assert parse_proof(anchor.token).pending[0].message == booked.promised[0]
    told = verify_anchors(file.read_bytes(), note(3), tsa_roots=())
    assert "pending" in told.skipped[0]
    taken.round(HOUR)  # no block yet
    assert parse_anchors(file.read_bytes()) == (anchor,)
    root = booked.mine(9)
    taken.round(2 * HOUR)
    headers = Headers({9: Header(height=9, data=bytes(36) + root + bytes(12))})
    assert verify_anchors(file.read_bytes(), note(3), tsa_roots=(), headers=headers).found
    asked = len(booked.server.asked)
    taken.round(3 * HOUR)
    assert len(booked.server.asked) == asked


def test_proofs_of_earlier_starts_are_completed(tmp_path: Path, booked: Calendar) -> None:
    calendars = Calendars((Service(url=booked.url),))
    before = log(tmp_path, "b0")
    anchors(before, lambda: note(3), calendars).round(0.0)
    booked.mine(9)
    anchors(log(tmp_path, "b1"), lambda: note(4), calendars).round(0.0)
    assert parse_proof(parse_anchors((before / FOLDER / "0").read_bytes())[0].token).blocks


def test_one_calendar_of_two_is_enough_and_strangers_are_not_asked(tmp_path: Path, booked: Calendar) -> None:
    with serving({"/digest": Reply(b"nonsense")}) as bad, calendar() as stranger:
        both = Calendars((Service(url=bad.url), Service(url=booked.url)))
        token = both.submit(note(3))
        assert [item.uri for item in parse_proof(token).pending] == [booked.url]
        moved = token.replace(booked.url.encode(), stranger.url.encode())
        assert both.complete(moved) == moved
        assert not stranger.server.asked
    booked.mine(5)
    assert [block.height for block in parse_proof(both.complete(token)).blocks] == [5]


def test_what_lies_on_the_disk_is_not_trusted(tmp_path: Path, booked: Calendar) -> None:
    path = log(tmp_path)
    (path / FOLDER).mkdir()
    (path / FOLDER / "5").write_bytes(b"not ours")
    (path / FOLDER / "name").write_bytes(b"")
    (path / FOLDER / "6").mkdir()
    anchors(path, lambda: note(3), Calendars((Service(url=booked.url),))).round(0.0)
    assert (path / FOLDER / "7").is_file()


def test_a_full_disk_or_a_vanished_folder_is_survived(tmp_path: Path, booked: Calendar) -> None:
    taken = anchors(tmp_path / "gone", lambda: note(3), Calendars((Service(url=booked.url),)))
    assert taken.round(0.0) == FIRST_RETRY_S


def test_nobody_waits_for_a_service_that_hangs(tmp_path: Path) -> None:
    release = threading.Event()

    def stall(_handler: BaseHTTPRequestHandler) -> None:
        release.wait(30)

    with serving({"/": Reply(stall=stall)}) as server:
        taken = anchors(log(tmp_path), lambda: note(3), TimeStamps(Service(url=server.url, timeout_s=20)))
        started = time.monotonic()
        taken.start()
        deadline = time.monotonic() + 10
        while not server.asked and time.monotonic() < deadline:
            time.sleep(0.01)
        taken.close()
        assert server.asked
        assert time.monotonic() - started < 10
        release.set()


def test_nothing_is_asked_of_nobody(tmp_path: Path) -> None:
    taken = anchors(log(tmp_path), lambda: note(3))
    taken.start()
    taken.close()
    assert not taken._thread.is_alive()
