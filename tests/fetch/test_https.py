"""One request: what is sent, what is refused, and that no peer can hold the caller beyond the limits."""

from __future__ import annotations

import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from countermark.errors import CountermarkError, Unavailable, UsageError
from countermark.fetch.https import Response, Service, request
from vendor_service import Reply, serving, tls_files


def ask(url: str, path: str = "/x", *, max_bytes: int = 1000, ca: Path | None = None, timeout_s: float = 5) -> Response:
    return request(Service(url=url, ca_file=ca, timeout_s=timeout_s), path, max_bytes=max_bytes)


def refusal(url: str, path: str = "/x", *, ca: Path | None = None, timeout_s: float = 5) -> CountermarkError:
    with pytest.raises(CountermarkError) as err:
        ask(url, path, ca=ca, timeout_s=timeout_s)
    return err.value


def test_a_get_and_a_post() -> None:
    routes = {"/base/x?a=b": Reply(b"found", headers={"Some-Header": "v"}), "/base": lambda body: Reply(body * 2)}
    with serving(routes) as server:
        service = Service(url=server.url + "/base/")
        got = request(service, "/x?a=b", max_bytes=5)
        assert (got.body, got.headers["some-header"]) == (b"found", "v")
        assert request(service, "", max_bytes=8, body=b"ab", content_type="a/b").body == b"abab"
    (get, post) = server.asked
    assert get[0] == "GET"
    assert get[2]["Accept-Encoding"] == "identity"
    assert (post[0], post[2]["Content-Type"], post[3]) == ("POST", "a/b", b"ab")


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 401, 404, 500, 503])
def test_any_status_but_200_is_unavailable(status: int) -> None:
    with serving({"/x": Reply(b"", status, {"Location": "/y", "Retry-After": "7"}), "/y": Reply(b"other")}) as server:
        err = refusal(server.url)
    assert isinstance(err, Unavailable)
    assert err.code == "endorsements.fetch.status"
    assert str(status) in str(err)
    assert "127.0.0.1" in str(err)
    assert err.retry_after_s == 7
    assert [path for _, path, _, _ in server.asked] == ["/x"]


def test_neither_path_nor_content_is_in_a_message() -> None:
    with serving({"/secret": Reply(b"content", 500)}) as server:
        assert "secret" not in str(refusal(server.url, "/secret"))
        assert "content" not in str(refusal(server.url, "/secret"))


def test_the_body_is_capped() -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(10_000):
            handler.wfile.write(bytes(10_000))

    with serving({"/x": Reply(bytes(1001)), "/endless": Reply(stall=endless), "/fits": Reply(bytes(1000))}) as server:
        assert len(ask(server.url, "/fits").body) == 1000
        assert refusal(server.url).code == "endorsements.fetch.too_long"
        assert refusal(server.url, "/endless").code == "endorsements.fetch.too_long"


def test_a_body_that_ends_early_is_refused() -> None:
    with serving({"/x": Reply(b"half", headers={"Content-Length": "8", "Connection": "close"})}) as server:
        assert refusal(server.url, timeout_s=1).code in ("endorsements.fetch.connection", "endorsements.fetch.timeout")


@pytest.mark.parametrize("where", ["before", "headers", "body"])
@pytest.mark.parametrize("secure", [False, True])
def test_a_byte_at_a_time_does_not_hold_the_caller(where: str, secure: bool, tmp_path: Path) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        if where == "body":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        elif where == "headers":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(100):
            time.sleep(0.1)
            if where != "before":
                handler.wfile.write(b"x")
                handler.wfile.flush()

    tls = tls_files(tmp_path) if secure else None
    with serving({"/x": Reply(stall=drip)}, tls=tls) as server:
        started = time.monotonic()
        err = refusal(server.url, ca=tls[0] if tls else None, timeout_s=0.6)
        assert 0.5 < time.monotonic() - started < 3
    assert err.code == "endorsements.fetch.timeout"


def test_tls_is_verified_against_the_given_authorities_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "name").mkdir()
    (tmp_path / "old").mkdir()
    tls, other = tls_files(tmp_path), tls_files(tmp_path / "other")
    with serving({"/x": Reply(b"ok")}, tls=tls) as server:
        assert ask(server.url, ca=tls[0]).body == b"ok"
        for ca in (None, other[0]):
            assert refusal(server.url, ca=ca).code == "endorsements.fetch.connection"
    for folder, wrong in (("name", {"address": "127.0.0.2"}), ("old", {"days": -1})):
        files = tls_files(tmp_path / folder, **wrong)  # type: ignore[arg-type]
        with serving({"/x": Reply(b"ok")}, tls=files) as server:
            assert refusal(server.url, ca=files[0]).code == "endorsements.fetch.connection"
            assert not server.asked


def test_the_authorities_file_must_be_one(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    with serving({}, tls=tls_files(tmp_path)) as server:
        for name in ("none.pem", "no.pem"):
            err = refusal(server.url, ca=tmp_path / name)
            assert isinstance(err, UsageError)
            assert err.code == "usage.file"
            assert name in str(err)


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "HTTP_PROXY"])
def test_proxies_of_the_environment_are_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({}) as proxy, serving({"/x": Reply(b"direct")}) as server:
        monkeypatch.setenv(name, proxy.url)
        assert ask(server.url).body == b"direct"
        assert not proxy.asked


def test_nobody_there() -> None:
    with serving({}) as server:
        pass
    assert refusal(server.url).code == "endorsements.fetch.connection"
    assert refusal("https://no-such-host.invalid").code == "endorsements.fetch.connection"


def test_what_is_not_http_is_refused() -> None:
    def noise(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"\x16\x03\x01 this is not http\r\n\r\n")
        handler.close_connection = True

    with serving({"/x": Reply(stall=noise)}) as server:
        assert refusal(server.url).code == "endorsements.fetch.connection"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "http://10.0.0.1/",
        "http://localhost.example.com",
        "ftp://127.0.0.1",
        "file:///etc/passwd",
        "https://",
        "https://user:secret@example.com",
        "https://example.com/?a=b",
        "https://example.com/#a",
        "https://example.com:0",
        "https://example.com:99999",
        "https://exa mple.com",
        "https://example.com/a\nb",
        "https://.example.com",
        "https://[::1",
        "https://exämple.com",
        "example.com",
        "",
        "https://example.com/" + "a" * 3000,
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as err:
        Service(url=url)
    assert err.value.code == "usage.url"


@pytest.mark.parametrize(
    "url",
    ["https://example.com", "https://[::1]:8081/a/", "http://127.0.0.1:8081", "http://localhost:1", "http://[::1]:1"],
)
def test_these_urls_are_taken(url: str) -> None:
    assert Service(url=url).host
