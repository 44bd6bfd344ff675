"""What people feed the command line: a refusal with its code, never a traceback."""

import io
import json
import sys
from pathlib import Path

import pytest

from countermark.cli import main
from countermark.policy import Profile, encode_policy, new_policy


def test_a_prompt_that_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(encode_policy(new_policy(Profile.PRODUCTION, now=1_800_000_000)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert main(["chat", "localhost:1", "--policy", str(policy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "request.input"
