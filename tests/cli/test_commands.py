"""The command line without a network: calls that are wrong, policies, refusals as people and as programs see them."""

import json
import re
from pathlib import Path

import pytest

from countermark.cli import main
from countermark.errors import CountermarkError
from countermark_appliance import cli as appliance_cli
from countermark_appliance.platform import sim
from countermark_appliance.platform.sim import measure

NOW = 1_800_000_000


def test_a_wrong_call_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    for entry in (main, appliance_cli.main):
        for argv in ([], ["nonsense"], ["verify"]):
            with pytest.raises(SystemExit) as end:
                entry(argv)
            assert end.value.code == 1
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["yesterday", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z"])
def test_a_time_needs_a_date_and_an_offset(at: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["verify", "x.cmk", "--policy", "p.toml", "--at", at])
    assert end.value.code == 1
    assert at in capsys.readouterr().err


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "none.cmk"), "--policy", str(tmp_path / "none.toml"), "--json"]) == 1
    seen = capsys.readouterr()
    refused = json.loads(seen.out)
    assert refused["code"] == "usage.file"
    assert refused["verdict"] == refused["verification"] == "undecidable"  # nothing was checked, so nothing is rejected
    assert "none.toml" in seen.err


def test_unknown_policy_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "new"]) == 0
    text = capsys.readouterr().out
    policy = tmp_path / "policy.toml"
    policy.write_text(text.replace("count = 1", "count = 1\ncuont = 2"))
    assert main(["policy", "show", str(policy)]) == 1
    assert "gpu.cuont" in capsys.readouterr().err


def test_policy_new_show_pin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert appliance_cli.main(["sim", "new", str(tmp_path / "sim")]) == 0
    machine = json.loads(capsys.readouterr().out)
    roots = [part for name in ("tdx", "gpu", "rim") for part in (f"--simulated-{name}-root", machine[f"{name}_root"])]
    assert main(["policy", "new", *roots]) == 1  # production takes no simulated root
    assert "policy.root" in capsys.readouterr().err
    assert main(["policy", "new", "--profile", "test", *roots]) == 0
    policy = tmp_path / "policy.toml"
    policy.write_text(capsys.readouterr().out)
    pin = ["policy", "pin", machine["manifest"], "--policy", str(policy), "--weights", "ab" * 32]
    before = policy.read_bytes()
    assert main(pin) == 1  # the first time it takes both signers
    assert main([*pin, "--signer", machine["signers"][0]]) == 1
    assert main([*pin, "--signer", "00" * 32, "--signer", "11" * 32]) == 12  # strangers
    assert policy.read_bytes() == before
    assert main([*pin, *(part for signer in machine["signers"] for part in ("--signer", signer))]) == 0
    assert "tdx.mrseam" not in capsys.readouterr().err
    assert main(["policy", "show", str(policy)]) == 0
    shown, said = capsys.readouterr()
    assert shown == policy.read_text()
    assert "EXPIRED" not in said
    assert sim.load(tmp_path / "sim").signer_digests[0].hex() in shown
    assert "ab" * 32 in shown
    module = measure.MRSEAM.hex()
    policy.write_text(re.sub(r"(created|not_after) = 2\d\d\d", r"\1 = 2020", shown).replace(module, "00" * 48, 1))
    assert main(pin) == 0  # the publisher's word does not make a module trusted
    assert module in capsys.readouterr().err
    assert f'"{module}",' not in policy.read_text()
    assert main(["policy", "show", str(policy)]) == 0
    assert "EXPIRED 2020-" in capsys.readouterr().err


def test_nobody_listening(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "policy.toml"
    assert main(["policy", "new"]) == 0
    policy.write_text(capsys.readouterr().out)
    assert main(["attest", "127.0.0.1:1", "--policy", str(policy), "--json"]) == 50
    assert json.loads(capsys.readouterr().out)["verdict"] == "undecidable"


def test_weights_commands_refuse_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert appliance_cli.main(["weights", "build", str(tmp_path / "out")]) == 1
    assert appliance_cli.main(["weights", "verify", str(tmp_path)]) == 13
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        '{"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}'
    )
    assert appliance_cli.main(["weights", "build", str(tmp_path / "model"), str(tmp_path / "out")]) == 13
    assert "gpt_neox" in capsys.readouterr().err


def test_every_error_class_has_the_exit_code_of_the_readme() -> None:
    """The README's table and the tree agree, class by class."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| .*? \| `(\w+)`", text, re.M))
    found: dict[str, int] = {}

    def walk(cls: type[CountermarkError]) -> None:
        found[cls.__name__] = cls.exit_code
        for sub in cls.__subclasses__():
            walk(sub)

    walk(CountermarkError)
    assert len(rows) >= 11
    assert {name: int(code) for code, name in rows.items()}.items() <= found.items()
