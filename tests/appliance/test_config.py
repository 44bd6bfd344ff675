"""The appliance's configuration file: what it takes, and that it names the key it does not take."""

import hashlib
from pathlib import Path

import pytest

from countermark.errors import ConfigError
from countermark_appliance.config import load_config, parse_address, parse_config

GOOD = b"""
[node]
operator = "demo.example"
listen = "127.0.0.1:9000"
[platform]
name = "sim"
state = "sim"
[weights]
dir = "weights"
root = "aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55aa55"
[log]
dir = "log"
[engine]
threads = 2
"""


def test_paths_are_relative_to_the_file_and_defaults_resolved(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_bytes(GOOD)
    config = load_config(file)
    assert config.digest == hashlib.sha256(GOOD).digest()
    assert (config.listen_host, config.listen_port) == ("127.0.0.1", 9000)
    assert config.weights_dir == tmp_path.resolve() / "weights"
    assert config.platform_state == tmp_path.resolve() / "sim"
    assert config.weights_root == bytes.fromhex("aa55" * 16)
    assert (config.threads, config.device, config.max_sequences, config.deployer_id) == (2, "cpu", 16, None)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"threads = 2", b"thread = 2", "config.unknown_key"),
        (b"[log]", b"[logs]", "config.unknown_key"),
        (b'operator = "demo.example"', b"", "config.missing"),
        (b'"demo.example"', b'"Demo/../x"', "config.value"),
        (b"threads = 2", b'threads = "2"', "config.value"),
        (b"threads = 2", b"threads = true", "config.value"),
        (b"threads = 2", b"threads = -1", "config.value"),
        (b"threads = 2", b'device = "gpu"', "config.value"),
        (b"threads = 2", b"device = 1", "config.value"),
        (b"aa55", b"zz", "config.value"),
        (b":9000", b":90000", "config.address"),
        (b":9000", b"", "config.address"),
        (b"[node]", b"[node", "config.malformed"),
        (b"[node]", b"\xff[node]", "config.malformed"),
        (b"threads = 2", b"threads = " + b"1" * 5000, "config.malformed"),
        (b"threads = 2", b"threads = " + b"[" * 50_000, "config.malformed"),
        (b'dir = "log"', rb'dir = "log\u0000"', "config.value"),
        (b'"sim"\n', b'"tdx"\n', "config.missing"),
        (b"[log]", b'[endorsements]\npccs_url = "ftp://pccs"\n[log]', "config.value"),
        (b"[log]", b'[endorsements]\npccs_url = "https://"\n[log]', "config.value"),
        (b"[log]", b'[endorsements]\npccs_url = "https://pccs/?q=1"\n[log]', "config.value"),
        (b"[log]", b'[endorsements]\nurl = "https://pccs"\n[log]', "config.unknown_key"),
        (b"[log]", b'[anchors]\ntsa_url = "http://tsa.example"\n[log]', "config.value"),
        (b"[log]", b'[anchors]\ntsa_url = "https://a.example https://b.example"\n[log]', "config.value"),
        (b"[log]", b'[anchors]\ntsa_url = ""\n[log]', "config.value"),
        (b"[log]", b'[anchors]\nots_calendars = " "\n[log]', "config.value"),
        (b"[log]", b'[anchors]\nots_calendars = "' + b"https://a.example " * 9 + b'"\n[log]', "config.value"),
        (b"[log]", b"[anchors]\nevery_s = 59\n[log]", "config.value"),
        (b"[log]", b'[record]\ndeployer_id = "' + b"x" * 4097 + b'"\n[log]', "config.value"),
    ],
)
def test_refused_by_code(old: bytes, new: bytes, code: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as err:
        parse_config(GOOD.replace(old, new, 1), base=tmp_path)
    assert err.value.code == code


def test_unknown_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.thread\b"):
        parse_config(GOOD.replace(b"threads", b"thread"), base=tmp_path)


def test_missing_file_and_huge_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as err:
        load_config(tmp_path / "none.toml")
    assert err.value.code == "config.unreadable"
    with pytest.raises(ConfigError) as err:
        parse_config(GOOD + b"#" * 65536, base=tmp_path)
    assert err.value.code == "config.too_long"


def test_ipv6_address() -> None:
    assert parse_address("[::1]:80") == ("::1", 80)


def test_endorsements(tmp_path: Path) -> None:
    url = "https://localhost:8081/sgx/certification/v4/"
    table = f'[endorsements]\ndir = "cache"\npccs_url = "{url}"\nca_file = "ca.pem"\ngpu_dir = "gpu"\n'.encode()
    config = parse_config(GOOD.replace(b'"sim"\n', b'"tdx"\n', 1) + table, base=tmp_path)
    assert (config.platform, config.endorsements_dir, config.endorsements_gpu_dir) == (
        "tdx",
        tmp_path / "cache",
        tmp_path / "gpu",
    )
    assert (config.endorsements_url, config.endorsements_ca_file) == (url, tmp_path / "ca.pem")
    config = parse_config(GOOD, base=tmp_path)
    assert (config.endorsements_dir, config.endorsements_url, config.endorsements_gpu_dir) == (None, None, None)
    assert config.endorsements_ca_file is None


def test_anchors(tmp_path: Path) -> None:
    table = b'[anchors]\ntsa_url = "https://tsa.example/tsr"\nots_calendars = "https://a.example  http://127.0.0.1:9"\n'
    config = parse_config(GOOD + table, base=tmp_path)
    assert config.anchors_tsa is not None
    assert (config.anchors_tsa.url, config.anchors_every_s) == ("https://tsa.example/tsr", 3600)
    assert [service.url for service in config.anchors_calendars] == ["https://a.example", "http://127.0.0.1:9"]
    config = parse_config(GOOD, base=tmp_path)
    assert (config.anchors_tsa, config.anchors_calendars) == (None, ())
