"""`countermark doctor` on this machine, and on machines that lack something; completion scripts that shells accept."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from countermark import doctor
from countermark.checks import Status
from countermark.cli import main
from countermark.policy import Profile, new_policy
from countermark.wire import tls

NOW = 1_800_000_000


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's tests take seconds, and most of these are about something else."""
    monkeypatch.setattr(doctor, "entry_points", lambda **_: ())


def found(name: str, checks: tuple[doctor.Check, ...]) -> doctor.Check:
    (check,) = (check for check in checks if check.name == name)
    return check


def test_this_machine_verifies_and_replays(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    seen = capsys.readouterr()
    report = json.loads(seen.out)
    assert report["can_verify"] is True
    assert "cpu" in report["can_replay"]["exact-v1"]
    assert [check["step"] for check in report["checks"]] == [str(i + 1) for i in range(len(report["checks"]))]
    assert "X25519MLKEM768" in seen.err


@pytest.mark.usefixtures("no_engine")
def test_people_are_told_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == ["verify: yes", "replay exact-v1: no"]


@pytest.mark.usefixtures("no_engine")
def test_a_machine_without_the_hybrid_key_exchange_cannot_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(tls.TlsEndpoint):
        def handshake(self) -> bool:
            raise tls.ChannelError("tls: no such group", code="channel.tls")

    monkeypatch.setattr(doctor, "TlsEndpoint", Older)
    report = doctor.examine()
    assert not report.can_verify
    assert found("attested TLS", report.checks).code == "channel.tls"
    assert report.failed


@pytest.mark.usefixtures("no_engine")
def test_a_clock_of_another_time_is_said() -> None:
    report = doctor.examine(now=1_000_000_000)
    assert found("clock", report.checks).status is Status.FAIL
    assert not report.can_verify


def test_an_engine_that_is_not_installed_is_left_out_and_one_that_fails_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda **_: ())
    report = doctor.examine()
    assert report.can_verify
    assert report.replays == {"exact-v1": ()}
    assert found("replay exact-v1 on cpu", report.checks).status is Status.SKIP
    assert "countermark[appliance]" in found("replay exact-v1 on cpu", report.checks).detail
    broken = EntryPoint(name="exact-v1", value="math:sqrt", group=doctor.ENGINES)  # of no device
    monkeypatch.setattr(doctor, "entry_points", lambda **_: (broken,))
    assert found("replay exact-v1 on cpu", doctor.examine().checks).code == "doctor.engine"


@pytest.mark.usefixtures("no_engine")
def test_a_policy_that_accepts_nothing_is_said_with_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = doctor.examine(policy=new_policy(Profile.PRODUCTION, now=NOW), now=NOW)
    assert "countermark policy pin" in found("policy", report.checks).detail
    late = doctor.examine(policy=new_policy(Profile.PRODUCTION, now=NOW), now=NOW + 90 * 86_400)
    assert "expired" in found("policy", late.checks).detail
    assert main(["policy", "new"]) == 0
    policy = tmp_path / "policy.toml"
    policy.write_text(capsys.readouterr().out)
    assert main(["doctor", "--policy", str(policy), "--weights", str(tmp_path)]) == 40
    said = capsys.readouterr().err
    assert "expected all that was asked of this machine, got no policy, weights" in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    assert "policy" in script.read_text()
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n", str(script)], check=True, timeout=20)


def test_bash_completes_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    ask = (
        "source completion; COMP_WORDS=(countermark att); COMP_CWORD=1;"
        " $(complete -p countermark | grep -o '_[a-z_]*countermark[a-z_]*'); echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=20)
    assert done.stdout.split() == ["attest"]
