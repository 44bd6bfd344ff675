"""What people feed the command line: a refusal with its code, never a traceback."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from countermark import cli, terminal
from countermark.checks import Check, Status
from countermark.cli import main
from countermark.errors import QuoteError
from countermark.policy import Profile, encode_policy, new_policy, parse_policy


def test_a_prompt_that_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(encode_policy(new_policy(Profile.PRODUCTION, now=1_800_000_000)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert main(["chat", "localhost:1", "--policy", str(policy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "request.input"


@pytest.mark.parametrize("extra", [["--manifest", "none.json"], ["--bundle", "none/a.cmk"], ["--bundle", "."]])
def test_where_the_proof_goes_is_checked_before_anything_is_sent(
    extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("policy.toml").write_text(encode_policy(new_policy(Profile.PRODUCTION, now=1_800_000_000)))
    assert main(["chat", "localhost:1", "hello", "--policy", "policy.toml", "--json", *extra]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "usage.file"


def test_a_manifest_without_a_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(encode_policy(new_policy(Profile.PRODUCTION, now=1_800_000_000)))
    call = ["chat", "localhost:1", "hello", "--policy", str(policy), "--manifest", str(policy), "--json"]
    assert main(call) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "usage.bundle"


@pytest.mark.parametrize("text", ["1969-12-31T23:59:59Z", "9999-12-20T00:00:00Z", "253402300799", "999999999999"])
def test_a_time_without_a_date_in_a_policy_is_a_wrong_call(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["policy", "new", "--at", text])
    assert stopped.value.code == 1
    assert "expected a time in the years 1970 to 9998" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "9998-12-31T23:59:59Z"])
def test_every_other_time_makes_a_policy_that_reads_back(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "new", "--at", text]) == 0
    parse_policy(capsys.readouterr().out.encode())


def test_ctrl_c_says_that_nothing_was_verified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_policy", stopped)
    assert main(["attest", "localhost:1", "--policy", "p.toml"]) == 130
    assert capsys.readouterr().err


def test_checks_fit_a_terminal_and_a_refusal_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    monkeypatch.setattr(
        terminal,
        "ERR",
        Console(file=seen, force_terminal=True, width=80, soft_wrap=True, no_color=True, highlight=False),
    )
    why = "quote root: expected " + "ab" * 32 + ", got one that is longer than a line of eighty columns"
    failed = Check(step="2", name="endorsements", status=Status.FAIL, detail=why, code="quote.root")
    passed = Check(step="1", name="every byte parses", status=Status.PASS, detail="many words " * 12)
    terminal.show_checks([passed], console=terminal.ERR)
    terminal.show_error(QuoteError(why, code="quote.root", step="2", checks=[failed]))
    assert seen.getvalue().count("ab" * 32) == 1
    bare = re.sub(r"\x1b\[[0-9;]*m", "", seen.getvalue()).splitlines()
    assert all(len(line) <= 80 for line in bare if "quote.root" not in line)
    assert any(line.startswith(" " * 12) for line in bare)
