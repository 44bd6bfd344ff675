"""`countermark proxy` as a process: what it prints, how it stops, how it refuses to start."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from countermark.cli import _parser
from countermark.errors import UsageError
from countermark.proxy.cli import settings_of
from countermark.proxy.guard import is_loopback
from node_files import Node

POLICY = ("--policy", "policy.toml")
KEY = "a-key-of-this-proxy-on-a-line\n"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "countermark.cli", "proxy", *words]


@pytest.mark.system
def test_it_serves_until_it_is_told_to_stop(node: Node, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    words = (node.address, *POLICY, "--listen", "127.0.0.1:0", "--json", "--key-file", str(tmp_path / "key"))
    words += ("--bundles", str(tmp_path / "bundles"), "--bundle-all")
    process = subprocess.Popen(
        command(*words), cwd=node.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        listening = json.loads(process.stdout.readline())["listening"]
        request = urllib.request.Request(
            f"http://{listening}/v1/chat/completions",
            data=json.dumps({"messages": [{"role": "user", "content": "SECRET"}], "max_tokens": 2}).encode(),
            headers={"content-type": "application/json", "authorization": f"Bearer {KEY.strip()}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            found = json.load(answer)
        assert found["countermark"]["verified"] is True
        bundle = tmp_path / "bundles" / found["countermark"]["bundle"]
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "SIMULATED" in said
    assert f"http://{listening}/v1" in said
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines] == ["node_verified", "answer_verified"]
    assert "SECRET" not in said
    verify = [sys.executable, "-m", "countermark.cli", "verify", str(bundle), *POLICY]
    assert subprocess.run(verify, cwd=node.directory, capture_output=True, check=False).returncode == 0


@pytest.mark.system
def test_a_node_that_is_refused_or_away_ends_it_with_that_code(node: Node, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    made = [sys.executable, "-m", "countermark.cli", "policy", "new"]
    strict.write_bytes(subprocess.run(made, capture_output=True, check=True).stdout)
    for address, policy, code, said in (
        (node.address, str(strict), 10, "quote.root"),
        ("127.0.0.1:9", "policy.toml", 50, "channel.connect"),
    ):
        words = command(address, "--policy", policy, "--listen", "127.0.0.1:0")
        done = subprocess.run(words, cwd=node.directory, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stdout) == (code, "")
        assert said in done.stderr


@pytest.mark.system
def test_a_port_that_is_taken(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = command(node.address, *POLICY, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        done = subprocess.run(words, cwd=node.directory, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "usage.listen" in done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--listen", "0.0.0.0:8080"), "usage.proxy"),
        (("--listen", "0.0.0.0:8080", "--expose"), "usage.proxy"),
        (("--listen", "192.0.2.1:8080", "--key-file", "key"), "usage.proxy"),
        (("--listen", "nonsense"), "usage.address"),
        (("--bundle-all",), "usage.proxy"),
        (("--manifest", "m.json"), "usage.proxy"),
        (("--reattest", "0"), "usage.proxy"),
        (("--streams", "0"), "usage.proxy"),
        (("--timeout", "nan"), "usage.proxy"),
        (("--key-file", "short"), "usage.proxy"),
        (("--key-file", "absent"), "usage.file"),
    ],
)
def test_arguments_that_do_not_go_together(
    words: tuple[str, ...], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key").write_text(KEY)
    Path("short").write_text("short")
    args = _parser().parse_args(["proxy", "127.0.0.1:1", *POLICY, *words])
    with pytest.raises(UsageError) as caught:
        settings_of(args)
    assert caught.value.code == code


def test_exposed_on_purpose(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    words = ("--listen", "0.0.0.0:8080", "--expose", "--key-file", str(tmp_path / "key"), "--allow-host", "Box.example")
    settings = settings_of(_parser().parse_args(["proxy", "a:1", "b:2", "a:1", *POLICY, *words]))
    assert settings.nodes == ("a:1", "b:2")
    assert settings.guard.key == KEY.strip().encode()
    settings.guard.check_browser({"host": "box.example:8080"})
    settings.guard.check_browser({"host": "192.0.2.7:8080"})


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)),  # noqa: S104
        *(("::", False), ("192.0.2.1", False), ("localhost.example", False), ("", False)),
    ],
)
def test_what_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
