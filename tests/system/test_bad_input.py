"""What a user can get wrong, against a whole running node: a clear code each time, and the node goes on serving."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from countermark.errors import RequestError
from countermark.session import Session, connect
from node_files import Node

pytestmark = pytest.mark.system


@pytest.fixture
def session(node: Node) -> Iterator[Session]:
    with connect(node.address, node.policy) as one:
        yield one


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"prompt": ""}, "request.prompt_empty"),
        ({"messages": [("user", "")]}, "request.prompt_empty"),
        ({"prompt": "word " * 9000}, "request.prompt_too_long"),
        ({"prompt": "x", "temperature": -1.0}, "request.temperature"),
        ({"prompt": "x", "temperature": float("nan")}, "request.temperature"),
        ({"prompt": "x", "top_p": 1.5}, "request.top_p"),
        ({"prompt": "x", "top_k": 1 << 31}, "request.top_k"),
        ({"prompt": "x", "seed": 1 << 64}, "request.seed"),
        ({"prompt": "x", "seed": -1}, "request.seed"),
        ({"prompt": "x", "max_tokens": 0}, "request.max_tokens"),
        ({"prompt": "x", "max_tokens": 9000}, "request.max_tokens"),
        ({"prompt": "x", "model": "another-model"}, "request.model"),
        ({"prompt": "x", "stop": [""]}, "request.stop"),
        ({"prompt": "x", "logit_bias": {49152: 1.0}}, "request.logit_bias"),
        ({"messages": [("robot", "x")]}, "request.role"),
    ],
)
def test_request_is_refused_by_field_and_the_session_lives(
    session: Session, wrong: dict[str, object], code: str
) -> None:
    with pytest.raises(RequestError) as err:
        session.generate(**wrong)  # type: ignore[arg-type]
    assert err.value.code == code
    assert session.generate("Once", max_tokens=1).result().tokens


def test_client_without_tls_is_refused_and_others_go_on(node: Node) -> None:
    host, port = node.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        while data := plain.recv(4096):
            assert data[0] == 21  # a TLS alert at most, never HTTP/2
    with connect(node.address, node.policy) as session:
        assert session.generate("Once", max_tokens=1).result().tokens


def test_second_process_on_the_same_log_is_refused(node: Node, tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    text = (node.directory / "node.toml").read_text()
    for name in ("log", "sim"):
        text = text.replace(f'= "{name}"\n[', f'= "{node.directory / name}"\n[').replace(
            f'dir = "{name}"', f'dir = "{node.directory / name}"'
        )
    config.write_text(text)
    done = serve(config)
    assert done.returncode == 1
    assert "log.locked" in done.stderr


def test_corrupt_weights_name_the_block(node: Node, smollm2: Path, tmp_path: Path) -> None:
    bad = tmp_path / "weights"
    shutil.copytree(smollm2, bad)
    with (bad / "weights.img").open("r+b") as image:
        image.seek(1_000_000)
        byte = image.read(1)
        image.seek(1_000_000)
        image.write(bytes([byte[0] ^ 1]))
    argv = (sys.executable, "-m", "countermark_appliance.cli", "weights", "verify", str(bad))
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 13
    assert "weights.block" in done.stderr
    assert str(1_000_000 // 4096) in done.stderr
    config = tmp_path / "node.toml"
    shutil.copytree(node.directory / "sim", tmp_path / "sim")
    config.write_text((node.directory / "node.toml").read_text().replace(str(smollm2), str(bad)))
    done = serve(config)
    assert done.returncode == 13
    assert "weights.block" in done.stderr
    assert not done.stdout


def test_a_server_that_is_not_ours_gets_no_prompt(node: Node, tmp_path: Path) -> None:
    """A genuine node of somebody else: its root is another simulated one."""
    policy = tmp_path / "policy.toml"
    text = (node.directory / "policy.toml").read_text()
    ours = text.split("simulated:")[1][:64]
    policy.write_text(text.replace(ours, "ab" * 32))
    argv = (sys.executable, "-m", "countermark.cli", "chat", node.address, "hello", "--policy", str(policy), "--json")
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 10
    assert json.loads(done.stdout)["code"] == "quote.root"


def serve(config: Path) -> subprocess.CompletedProcess[str]:
    argv = (sys.executable, "-m", "countermark_appliance.cli", "serve", "--config", str(config))
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
