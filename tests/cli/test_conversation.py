"""`countermark chat` and `attest` against a real node: one prompt, a conversation, refusals in the middle of one."""

from __future__ import annotations

import builtins
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from net_appliance import NOW, Appliance, running

from countermark import chat_cli, cli, session
from countermark.policy import encode_policy


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    with running(tmp_path_factory.mktemp("appliance")) as appliance:
        yield appliance


@pytest.fixture
def call(appliance: Appliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The address and the policy's option, with a clock that suits the evidence."""
    policy = tmp_path / "policy.toml"
    policy.write_text(encode_policy(appliance.machine.policy))

    def connect(address: str, *args: object, **options: object) -> session.Session:
        return session.connect(address, *args, **{**options, "now": NOW})  # type: ignore[arg-type]

    monkeypatch.setattr(chat_cli, "connect", connect)
    monkeypatch.setattr(cli, "connect", connect)
    return [appliance.address, "--policy", str(policy)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> list[str]:
    """What is typed, one line after the other, then Ctrl-D; returns the prompts as they were shown."""
    monkeypatch.setattr(sys, "stdin", Terminal())
    left, prompts = list(lines), []

    def ask(prompt: str = "") -> str:
        prompts.append(prompt)
        if not left:
            raise EOFError
        line = left.pop(0)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", ask)
    return prompts


def test_attest_is_a_table_that_says_simulated_first(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attest", *call]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line[:1].strip()]
    assert names[:4] == ["platform", "image", "weights", "numerics"]
    assert names[-1] == "verdict"
    assert lines[0].split()[1] == "SIMULATED"
    assert cli.main(["attest", *call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["simulated"] is True


def test_one_prompt(call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "a.cmk"
    assert cli.main(["chat", *call, "--max-tokens", "3", "--bundle", str(bundle), "hello"]) == 0
    assert capsys.readouterr().out == "one two three \n"
    assert bundle.stat().st_size > 1000


def test_a_conversation(
    appliance: Appliance,
    call: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = len(appliance.engine.submitted)
    prompts = typed(
        monkeypatch,
        "/checks",  # there is no answer yet
        "hello",
        KeyboardInterrupt,  # at the prompt: the line is dropped
        "and then?",
        f"/save {tmp_path / 'last.cmk'}",
        "/checks",
        "/verdict",
        "/new",
        "again",
        "/nonsense",
    )
    assert cli.main(["chat", *call, "--max-tokens", "2", "--system", "be brief"]) == 0
    out, said = capsys.readouterr()
    assert out.count("one two") == 3
    assert "no answer yet" in said
    assert "leaf" in said
    assert all(prompt.startswith("SIMULATED 1") for prompt in prompts)
    asked = [prepared.request.messages or () for prepared in appliance.engine.submitted[before:]]
    roles = [[message.role for message in messages] for messages in asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert asked[1][2].content == "one two "
    assert (tmp_path / "last.cmk").exists()


def test_a_turn_that_is_refused_is_taken_out_again(
    appliance: Appliance, call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(appliance.engine.submitted)
    typed(monkeypatch, "first", "x" * (5 * 1024 * 1024), "second", "/quit", "never read")
    assert cli.main(["chat", *call, "--max-tokens", "1"]) == 0
    assert "request.too_long" in capsys.readouterr().err
    assert [len(p.request.messages or ()) for p in appliance.engine.submitted[before:]] == [1, 3]


def test_a_connection_that_ended_is_appraised_again_and_said(
    appliance: Appliance, call: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[session.Session] = []
    connect = chat_cli.connect

    def remembered(*args: object, **options: object) -> session.Session:
        opened.append(connect(*args, **options))  # type: ignore[arg-type]
        return opened[-1]

    monkeypatch.setattr(chat_cli, "connect", remembered)
    typed(monkeypatch, "first", "second")
    turn = chat_cli._Conversation._turn

    def then_lost(self: object, *args: object) -> None:
        turn(self, *args)  # type: ignore[arg-type]
        if len(opened) == 1:
            opened[0].close()

    monkeypatch.setattr(chat_cli._Conversation, "_turn", then_lost)
    assert cli.main(["chat", *call, "--max-tokens", "1"]) == 0
    assert len(opened) == 2
    out, said = capsys.readouterr()
    assert out.count("one") == 2
    assert "appraising, again" in said


def test_every_refusal_can_be_explained(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attest", "127.0.0.1:1", *call[1:], "--explain"]) == 50
    said = capsys.readouterr().err
    assert "channel.connect" in said
    assert "To do:" in said
    assert cli.main(["chat", *call, "--bundle", "/", "x", "--explain", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["explanations"][0]["code"] == "usage.file"


def test_colour_only_where_it_is_wanted(call: list[str]) -> None:
    """NO_COLOR (no-color.org) takes colour away even where it is forced."""
    import os
    import subprocess

    base = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    command = [sys.executable, "-m", "countermark.cli", "attest", "127.0.0.1:1", *call[1:]]
    for extra, coloured in (({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)):
        done = subprocess.run(command, env=base | extra, capture_output=True, text=True, timeout=60, check=False)
        assert ("\x1b[31m" in done.stderr or "\x1b[1;31m" in done.stderr) is coloured, extra
