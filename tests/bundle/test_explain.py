"""`verify --explain`: a line for each check that did not pass, out of docs/codes.md, and none without being asked."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

import countermark
from countermark.bundle import write_bundle
from countermark.checks import Check, Status
from countermark.cli import main
from countermark.explain import explain_check, explain_code, explain_skip
from countermark.policy import encode_policy
from one_answer import NOW, World

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(world: World, tmp_path: Path) -> Path:
    bundle = world.bundle()
    write_bundle(tmp_path / "good.cmk", bundle)
    write_bundle(tmp_path / "bad.cmk", replace(bundle, answer=replace(world.answer, text="Rome.")))
    (tmp_path / "torn.cmk").write_bytes((tmp_path / "good.cmk").read_bytes()[:-1])
    (tmp_path / "policy.toml").write_text(encode_policy(world.machine.policy))
    return tmp_path


def verify(files: Path, name: str, *options: str) -> int:
    return main(["verify", str(files / name), "--policy", str(files / "policy.toml"), "--at", str(NOW), *options])


def test_the_texts_are_the_pages() -> None:
    carried = Path(countermark.__file__).with_name("codes.md")
    assert carried.read_bytes() == (ROOT / "docs" / "codes.md").read_bytes()
    container, digest = explain_code("bundle.container"), explain_code("bundle.digest")
    assert container is not None
    assert digest is not None
    assert (container.meaning, digest.meaning) == ("not exactly our ZIP", "not the bytes its manifest lists")
    assert explain_code("no.such_code") is None
    assert explain_skip("12") == explain_skip("13") != explain_skip("17")
    assert explain_check(Check(step="9", name="", status=Status.PASS)) is None
    assert explain_code("code") is None  # a table's head
    assert explain_skip("step") is None


def test_every_skipped_check_has_its_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(files, "good.cmk") == 0
    plain = capsys.readouterr().err
    assert "To do:" not in plain
    assert verify(files, "good.cmk", "--explain") == 0
    lines = capsys.readouterr().err.splitlines()
    after = [below for line, below in itertools.pairwise(lines) if "SKIP" in line]
    assert len(after) == plain.count("SKIP") == 3
    assert all("To do:" in line for line in after)
    assert sum("To do:" in line for line in lines) == 3


def test_a_refusal_ends_with_what_to_do(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, code in (("bad.cmk", "receipt.output_text"), ("torn.cmk", "bundle.container")):
        advice = explain_code(code)
        assert advice is not None
        assert verify(files, name, "--explain") == 20
        *_, before, last = capsys.readouterr().err.splitlines()
        assert code in before
        assert last.strip() == str(advice)
        assert verify(files, name) == 20
        assert str(advice) not in capsys.readouterr().err


def test_json_has_them_when_asked(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(files, "good.cmk", "--json") == 0
    assert "explanations" not in json.loads(capsys.readouterr().out)
    assert verify(files, "good.cmk", "--json", "--explain") == 0
    assert [item["step"] for item in json.loads(capsys.readouterr().out)["explanations"]] == ["9", "11", "20"]
    assert verify(files, "bad.cmk", "--json", "--explain") == 20
    last = json.loads(capsys.readouterr().out)["explanations"][-1]
    assert (last["step"], last["code"]) == ("17", "receipt.output_text")
    assert verify(files, "torn.cmk", "--json", "--explain") == 20
    (only,) = json.loads(capsys.readouterr().out)["explanations"]
    assert (only["step"], only["code"]) == ("", "bundle.container")
