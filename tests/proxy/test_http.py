"""The server below it: caps, clocks, slow and absent clients, who is let in, and what is logged."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
from net_appliance import Appliance
from proxy_helpers import Proxy, wait_until

from countermark.formats.records import Kind
from countermark.proxy.guard import Guard
from countermark.proxy.http import Limits

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}).encode()
STRICT = Limits(head_bytes=4096, body_bytes=64 * 1024, head_s=0.5, body_s=0.5, idle_s=1.0, write_s=1.0, connections=8)
KEY = "a-key-of-this-proxy"


@pytest.fixture(scope="module")
def strict(appliance: Appliance) -> Iterator[Proxy]:
    with Proxy.of(appliance, http_limits=STRICT, streams=4) as one:
        yield one


@pytest.fixture(scope="module")
def locked(appliance: Appliance) -> Iterator[Proxy]:
    guard = Guard(
        listen="127.0.0.1",
        hosts=frozenset({"box.example"}),
        origins=frozenset({"http://app.example"}),
        key=KEY.encode(),
    )
    with Proxy.of(appliance, guard=guard) as one:
        yield one


def head(proxy: Proxy, *lines: str, method: str = "POST", path: str = CHAT, host: str = "") -> bytes:
    first = (f"{method} {path} HTTP/1.1", f"host: {host or proxy.address}", "content-type: application/json")
    return "\r\n".join((*first, *lines, "", "")).encode()


def code(answer: bytes) -> tuple[int, str]:
    """Status and our code of a refusal."""
    front, _, body = answer.partition(b"\r\n\r\n")
    return int(front.split(b" ", 2)[1]), json.loads(body)["error"]["code"]


def all_ended(appliance: Appliance) -> bool:
    kinds = appliance.kinds()
    return kinds.count(Kind.INTENT) == sum(kinds.count(kind) for kind in (Kind.OUTCOME, Kind.ABORT))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", (400, "proxy.http")),
        (b"GET / HTTP/1.1\r\n\r\n", (400, "proxy.http")),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400, "proxy.http")),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 5000, (431, "proxy.headers")),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
         (400, "proxy.http")),
        (b"GET /", (408, "proxy.slow")),
        (b"GET /nowhere HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", (404, "proxy.path")),
        (b"GET /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", (405, "proxy.method")),
        (b"DELETE / HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", (405, "proxy.method")),
    ],
)  # fmt: skip
def test_not_http_as_it_should_be(strict: Proxy, data: bytes, expected: tuple[int, str]) -> None:
    assert code(strict.raw(data)) == expected


def test_bodies(strict: Proxy) -> None:
    too_long = head(strict, "content-length: 70000")
    assert code(strict.raw(too_long)) == (413, "proxy.body")
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    assert code(strict.raw(head(strict, "transfer-encoding: chunked") + 5 * chunk)) == (413, "proxy.body")
    assert code(strict.raw(head(strict, "content-length: 999999999999999999"))) == (413, "proxy.body")
    began = time.monotonic()
    assert code(strict.raw(head(strict, "content-length: 100") + b"{")) == (408, "proxy.slow")
    assert time.monotonic() - began < 5
    other = head(strict, "content-length: 2").replace(b"application/json", b"text/plain")
    assert code(strict.raw(other + b"{}")) == (415, "proxy.media")


def test_a_client_that_drips_its_head_is_cut_off(strict: Proxy) -> None:
    """A byte at a time keeps no connection open: the clock runs for the whole head."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10) as sock:
        for byte in head(strict):
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
            if time.monotonic() - began > 3:
                pytest.fail("still open")


def test_an_idle_connection_is_closed(strict: Proxy) -> None:
    assert strict.raw(b"") == b""


def test_two_requests_on_one_connection(strict: Proxy) -> None:
    one = head(strict, f"content-length: {len(BODY)}") + BODY
    last = head(strict, f"content-length: {len(BODY)}", "connection: close") + BODY
    assert strict.raw(one + last).count(b'"verified":true') == 2


def test_expect_continue(strict: Proxy) -> None:
    data = head(strict, f"content-length: {len(BODY)}", "expect: 100-continue", "connection: close")
    assert strict.raw(data + BODY).startswith(b"HTTP/1.1 100 \r\n")


def test_so_many_connections_and_no_more(strict: Proxy) -> None:
    idle = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(STRICT.connections)]
    wait_until(lambda: strict.server.connections >= STRICT.connections, 0.9)
    assert code(strict.raw(b"")) == (429, "proxy.busy")
    for sock in idle:
        sock.close()
    wait_until(lambda: strict.server.connections == 0)


def test_so_many_answers_and_no_more(strict: Proxy, appliance: Appliance) -> None:
    appliance.engine.hold.set()
    open_ones = []
    try:
        for _ in range(4):
            sock = socket.create_connection(("127.0.0.1", strict.port))
            sock.sendall(head(strict, f"content-length: {len(BODY)}") + BODY)
            open_ones.append(sock)
        wait_until(lambda: strict.app.serving.active == 4)
        status, found = strict.chat()
        assert (status, found["error"]["code"]) == (429, "proxy.busy")
    finally:
        appliance.engine.hold.clear()
        for sock in open_ones:
            sock.close()
    wait_until(lambda: strict.app.serving.active == 0)


def test_a_client_that_leaves_while_it_waits_is_noticed(strict: Proxy, appliance: Appliance) -> None:
    appliance.engine.hold.set()
    try:
        wait_until(lambda: all_ended(appliance))
        before = appliance.kinds().count(Kind.ABORT)
        body = json.dumps(json.loads(BODY) | {"stream": True}).encode()
        sock = socket.create_connection(("127.0.0.1", strict.port))
        sock.sendall(head(strict, f"content-length: {len(body)}") + body)
        assert sock.recv(64).startswith(b"HTTP/1.1 200")
        sock.close()
        wait_until(lambda: strict.app.serving.active == 0)
        wait_until(lambda: appliance.kinds().count(Kind.ABORT) == before + 1)
        assert strict.status()["receipts"][0]["state"] == "left"
    finally:
        appliance.engine.hold.clear()


def test_a_client_that_reads_nothing_is_dropped(appliance: Appliance) -> None:
    """And with it its answer: what it does not take is held here and in the node."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60000, "stream": True}
    data = json.dumps(body | {"logprobs": True, "top_logprobs": 20}).encode()
    with Proxy.of(appliance, http_limits=Limits(write_s=0.5)) as proxy:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", proxy.port))
        sock.sendall(head(proxy, f"content-length: {len(data)}") + data)
        wait_until(lambda: proxy.app.serving.active == 1)
        wait_until(lambda: proxy.app.serving.active == 0, 30)
        assert proxy.status()["receipts"][0]["state"] == "left"
        sock.close()


@pytest.mark.parametrize(
    ("lines", "host", "expected"),
    [
        ((), "rebound.example", (403, "proxy.host")),
        ((), "127.0.0.1.rebound.example:{port}", (403, "proxy.host")),
        ((), "10.0.0.1:{port}", (403, "proxy.host")),
        (("origin: http://rebound.example",), "", (403, "proxy.origin")),
        (("origin: null",), "", (403, "proxy.origin")),
        (("origin: http://127.0.0.1:1",), "", (403, "proxy.origin")),
        (("sec-fetch-site: cross-site",), "", (403, "proxy.origin")),
        (("sec-fetch-site: same-site",), "", (403, "proxy.origin")),
    ],
)
def test_web_pages_are_kept_out(
    proxy: Proxy, appliance: Appliance, lines: tuple[str, ...], host: str, expected: tuple[int, str]
) -> None:
    before = appliance.kinds().count(Kind.INTENT)
    host = host.replace("{port}", str(proxy.port))
    for method, path in (("POST", CHAT), ("GET", "/"), ("GET", "/countermark/status.json"), ("OPTIONS", CHAT)):
        data = head(proxy, "connection: close", *lines, method=method, path=path, host=host)
        assert code(proxy.raw(data)) == expected
    assert appliance.kinds().count(Kind.INTENT) == before


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1", "[::1]:{port}", "LOCALHOST:{port}"])
def test_names_of_its_own(proxy: Proxy, host: str) -> None:
    data = head(proxy, "connection: close", method="GET", path="/", host=host.replace("{port}", str(proxy.port)))
    assert proxy.raw(data).startswith(b"HTTP/1.1 200")


def test_its_own_page_may_ask(proxy: Proxy) -> None:
    data = head(proxy, f"origin: http://{proxy.address}", "connection: close", method="GET", path="/healthz")
    assert b'{"ready":true}' in proxy.raw(data)


def test_a_page_that_was_allowed(locked: Proxy) -> None:
    headers = {"origin": "http://app.example", "authorization": f"Bearer {KEY}"}
    status, found, _ = locked.request("POST", CHAT, BODY, headers)
    assert (status, found["access-control-allow-origin"]) == (200, "http://app.example")
    status, found, _ = locked.request("OPTIONS", CHAT, None, {"origin": "http://app.example"})
    assert (status, found["access-control-allow-methods"]) == (204, "GET, POST, OPTIONS")
    assert locked.request("GET", "/healthz", None, {"host": "box.example:80"})[0] == 200


@pytest.mark.parametrize("given", ["", "Bearer ", f"Bearer {KEY}x", f"Basic {KEY}", f"Bearer {KEY[:-1]}", "Bearer ÿ"])
def test_a_key_is_asked_for(locked: Proxy, given: str) -> None:
    for method, path, body in (
        ("POST", CHAT, BODY),
        ("GET", "/v1/models", None),
        ("GET", "/countermark/status.json", None),
        ("GET", "/countermark/bundles/x", None),
    ):
        status, headers, data = locked.request(method, path, body, {"authorization": given} if given else {})
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert b"proxy.key" in data
        assert KEY.encode() not in data
    assert locked.request("GET", "/")[0] == 200  # the page, which asks for it


def test_nothing_of_a_request_is_logged(proxy: Proxy, appliance: Appliance) -> None:
    """Secrets in every place a request has, through every way it can end."""
    secrets = [f"SECRET{i}" for i in range(12)]
    message = [{"role": "user", "content": secrets[0]}]
    proxy.chat(secrets[0], stop=[secrets[1]], user=secrets[2], metadata={"x": secrets[3]})
    proxy.stream(secrets[0], stop=[secrets[1]])
    proxy.chat(secrets[0], **{secrets[4]: 1})
    proxy.chat(secrets[0], model=secrets[5])
    proxy.chat("stumble", stop=[secrets[1]])  # an error inside the node
    proxy.request("POST", CHAT, b"{" + secrets[6].encode())
    proxy.request("POST", f"{CHAT}?{secrets[7]}", {"messages": message, "max_tokens": 1})
    proxy.request("GET", f"/v1/models/{secrets[8]}")
    proxy.request("GET", f"/{secrets[8]}", headers={"cookie": secrets[9], "user-agent": secrets[9]})
    proxy.request("POST", CHAT, {"messages": [{"role": secrets[10], "content": secrets[0]}]})
    proxy.raw(head(proxy, f"origin: http://{secrets[11]}", "connection: close"))
    log, page = proxy.log.getvalue(), proxy.request("GET", "/countermark/status.json")[2].decode()
    assert log.count("\n") >= 10
    for line in log.splitlines():
        assert {"time", "event"} <= set(json.loads(line))
    for text in (log, page):
        assert "SECRET" not in text
        assert "stumble" not in text
        assert "one two" not in text


def test_an_error_of_its_own_says_where_and_nothing_else(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("SECRET in an exception")

    monkeypatch.setattr(proxy.app, "_order", broken)
    status, found = proxy.chat()
    assert (status, found["error"]["code"]) == (503, "proxy.error")
    assert "test_http.py" in proxy.log.getvalue()
    assert "SECRET in" not in proxy.log.getvalue() + json.dumps(found)
