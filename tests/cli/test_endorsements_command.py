"""`endorsements`, and `--endorsements` of the commands that appraise: what they ask for and what they hand on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vectors
from countermark import chat_cli, cli
from countermark.cli import main
from countermark.errors import Unavailable
from countermark.fetch.intel import wanted_by
from countermark.formats.quote import parse_quote
from countermark_appliance.platform import sim
from countermark_appliance.platform.sim import intel
from sim_evidence import code_folder, machine
from vendor_service import pccs_routes, serving, tls_files


def routes(**other: Any) -> Any:
    return pccs_routes(machine().endorsements.tdx, fmspc=intel.FMSPC.hex(), **other)


@pytest.fixture
def quote(tmp_path: Path) -> Path:
    path = tmp_path / "quote.bin"
    path.write_bytes(sim.boot(machine(), roots=[code_folder()]).quote(bytes(64)))
    return path


@pytest.fixture
def policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["policy", "new"]) == 0
    path = tmp_path / "policy.toml"
    path.write_text(capsys.readouterr().out)
    return path


def test_endorsements_for_a_quote_in_binary_or_hex(tmp_path: Path, quote: Path) -> None:
    text = tmp_path / "quote.txt"
    text.write_text(quote.read_bytes().hex() + "\n")
    with serving(routes()) as server:
        for path in (quote, text):
            out = tmp_path / "out.json"
            assert main(["endorsements", str(path), "--out", str(out), "--pccs", server.url]) == 0
            assert json.loads(out.read_bytes()) == json.loads(machine().endorsements.tdx)
            out.unlink()


def test_from_a_cache_with_a_certificate_of_its_own(tmp_path: Path, quote: Path) -> None:
    tls = tls_files(tmp_path)
    out = tmp_path / "out.json"
    with serving(routes(update="tcbEvaluationDataNumber=18"), tls=tls) as server:
        call = ["endorsements", str(quote), "--out", str(out), "--pccs", server.url, "--update", "18"]
        assert main(call) == 50
        assert not out.exists()
        assert main([*call, "--ca-file", str(tls[0])]) == 0
    assert out.exists()


def test_what_is_fetched_for_a_genuine_quote_appraises_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = vectors.tdx("phala-b0c06f")
    (tmp_path / "quote.bin").write_bytes(item.quote)
    wanted = wanted_by(parse_quote(item.quote).pck_chain_pem)
    out = tmp_path / "out.json"
    with serving(pccs_routes(item.collateral.encode(), fmspc=wanted.fmspc.hex(), ca=wanted.ca)) as server:
        assert main(["endorsements", str(tmp_path / "quote.bin"), "--out", str(out), "--pccs", server.url]) == 0
    capsys.readouterr()
    call = ["evidence", "tdx", str(tmp_path / "quote.bin"), "--collateral", str(out), "--at", str(item.at), "--json"]
    assert main(call) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "accept"


@pytest.mark.parametrize(
    ("code", "exit_code", "options"),
    [
        ("usage.url", 1, ["--pccs", "http://example.com"]),
        ("usage.update", 1, ["--pccs", "https://127.0.0.1:1", "--update", "latest"]),
        ("usage.endorsements", 1, ["--ca-file", "ca.pem"]),
        ("usage.file", 1, ["--pccs", "https://127.0.0.1:1", "--ca-file", "none.pem"]),
        ("endorsements.fetch.connection", 50, ["--pccs", "http://127.0.0.1:1"]),
    ],
)
def test_wrong_calls(
    code: str, exit_code: int, options: list[str], quote: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["endorsements", str(quote), "--out", str(tmp_path / "out"), *options]) == exit_code
    assert code in capsys.readouterr().err


def given(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> Any:
    """What the command hands to `connect`."""
    seen: list[Any] = []

    def connect(*_: Any, endorsements: Any, **_others: Any) -> None:
        seen.append(endorsements)
        raise Unavailable("not here", code="channel.connect")

    monkeypatch.setattr(cli, "connect", connect)
    monkeypatch.setattr(chat_cli, "connect", connect)
    assert main(argv) == 50
    return seen[0]


@pytest.mark.parametrize("command", [["attest", "127.0.0.1:1"], ["chat", "127.0.0.1:1", "hello"]])
def test_the_sessions_endorsements(
    command: list[str], policy: Path, quote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = [*command, "--policy", str(policy)]
    assert given(monkeypatch, call) is None
    (tmp_path / "own.json").write_bytes(b"own")
    assert given(monkeypatch, [*call, "--endorsements", str(tmp_path / "own.json")]) == b"own"
    with serving(routes()) as server:
        fetch: Callable[[bytes], bytes] = given(monkeypatch, [*call, "--endorsements", "fetch", "--pccs", server.url])
        assert json.loads(fetch(quote.read_bytes())) == json.loads(machine().endorsements.tdx)
    fetch = given(monkeypatch, [*call, "--endorsements", "fetch", "--update", "early"])
    source = fetch.keywords["source"]  # type: ignore[attr-defined]
    assert (source.service.url, source.update) == ("https://api.trustedservices.intel.com", "early")


@pytest.mark.parametrize("option", [["--pccs", "https://example.com"], ["--ca-file", "x"], ["--update", "early"]])
def test_where_to_fetch_from_needs_fetching(
    option: list[str], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attest", "127.0.0.1:1", "--policy", str(policy), *option]) == 1
    assert "usage.endorsements" in capsys.readouterr().err


def test_a_bundles_endorsements_can_be_replaced(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def verify_bundle(*_: Any, endorsements: Any, **__: Any) -> None:
        seen.append(endorsements)
        raise Unavailable("not here", code="channel.connect")

    monkeypatch.setattr(cli, "verify_bundle", verify_bundle)
    monkeypatch.setattr(cli, "read_bundle", lambda path: None)
    (tmp_path / "own.json").write_bytes(b"own")
    call = ["verify", "answer.cmk", "--policy", str(policy)]
    assert main(call) == main([*call, "--endorsements", str(tmp_path / "own.json")]) == 50
    assert seen == [None, b"own"]
