"""From a node's log to a bundle and its verdict: `bundle add --anchor`, `verify`, the time and the step they show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from calendars import Calendar, calendar
from test_open_timestamps import FIRST, HEADER
from tsa import Authority

from countermark import cli
from countermark.bundle import write_bundle
from countermark.cli import main
from countermark.fetch.https import Service
from countermark.formats.anchors import FOLDER, AnchorKind
from countermark.policy import encode_policy
from countermark_appliance.records.anchors import Anchors, Calendars
from one_answer import NOW, make_world


@dataclass(frozen=True)
class Stamps:
    """An authority in this process whose clock is the test's."""

    authority: Authority
    time: int
    kind: AnchorKind = AnchorKind.RFC3161

    def submit(self, note: bytes) -> bytes:
        return self.authority.token(note, time=self.time)


@dataclass(frozen=True)
class Case:
    bundle: Path
    policy: Path
    log: Path
    booked: Calendar


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("command")
    world, authority = make_world(folder), Authority()
    bundle, policy = folder / "answer.cmk", folder / "policy.toml"
    write_bundle(bundle, world.bundle())
    policy.write_text(encode_policy(replace(world.machine.policy, tsa_roots=(authority.root.digest,))))
    for _ in range(3):  # the log goes on before it is dated
        world.machine.outcome(world.machine.intent(world.verdict))
    log = folder / "log" / world.verdict.boot_id.hex()
    with calendar() as booked:
        submitters = [Stamps(authority, NOW + 5), Calendars((Service(url=booked.url),))]
        Anchors(log, world.machine.recorder.checkpoint, submitters, every_s=60).round(0.0)
        booked.mine(5)
        Anchors(log, world.machine.recorder.checkpoint, submitters[1:], every_s=60).round(0.0)
        world.machine.recorder.close()  # publishes the tiles that proofs are made from
        yield Case(bundle, policy, log, booked)


@pytest.fixture
def verify(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    monkeypatch.setattr(cli.time, "time", lambda: NOW + 20.0)

    def run(bundle: Path, *options: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main(["verify", str(bundle), "--policy", str(case.policy), "--json", *options])
        return code, json.loads(capsys.readouterr().out)

    return run


def anchored(case: Case, folder: Path, name: str) -> Path:
    out = folder / "anchored.cmk"
    file = case.log / FOLDER / name
    assert (
        main(["bundle", "add", str(case.bundle), "--anchor", str(file), "--log", str(case.log), "--out", str(out)]) == 0
    )
    return out


def last(result: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = result["checks"][-1]
    return found


def test_a_stamp(case: Case, verify: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path) -> None:
    bundle = anchored(case, tmp_path, "0")
    code, result = verify(bundle)
    assert (code, result["verdict"]["time"]) == (0, {"value": NOW + 5, "basis": "anchor"})
    assert (last(result)["step"], last(result)["status"]) == ("21", "PASS")
    code, result = verify(bundle, "--at", str(NOW + 1))
    assert (code, result["verdict"]["time"]) == (0, {"value": NOW + 1, "basis": "assumed"})
    code, result = verify(case.bundle)
    assert (code, result["verdict"]["time"]) == (0, {"value": NOW + 20, "basis": "now"})


def test_a_block(case: Case, verify: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path) -> None:
    bundle, headers = anchored(case, tmp_path, "1"), tmp_path / "headers"
    code, result = verify(bundle)
    assert (code, last(result)["status"], result["verdict"]["time"]["basis"]) == (0, "SKIP", "now")
    assert "no header given of block 5" in last(result)["detail"]
    headers.write_bytes(FIRST + HEADER)
    code, result = verify(bundle, "--bitcoin-headers", str(headers))
    assert (code, last(result)["status"]) == (0, "SKIP")
    assert "do not reach block 5" in last(result)["detail"]
    headers.write_bytes(b"5 " + FIRST.split()[1] + b"\n")  # work was done for it, but for another root
    code, result = verify(bundle, "--bitcoin-headers", str(headers))
    assert (code, result["code"]) == (21, "anchor.block")
    headers.write_bytes(FIRST.replace(b"0 01", b"5 02"))
    code, result = verify(bundle, "--bitcoin-headers", str(headers))
    assert (code, result["code"]) == (21, "anchor.work")
    headers.write_bytes(b"no headers")
    code, result = verify(bundle, "--bitcoin-headers", str(headers))
    assert (code, result["code"]) == (20, "anchor.headers")
