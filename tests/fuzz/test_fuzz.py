"""50,000 mutated inputs for every parser of bytes from outside, fewer for the slowest; `make soak` is for a million.

Accepted or refused by a typed error, in bounded time and memory: see `driver`.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from countermark.errors import FormatError
from fuzz import driver
from fuzz.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
INPUTS = 50_000
SECONDS = 2
ELSEWHERE = {
    "cli.parse_known_args": "argparse's own",
    "channel.parse_address": "the caller's own argument",
    "gpu.appraise.parse_gpus": "GPU report, certificate chain, RIM, CRL and OCSP response are targets of their own",
    "gpu.revocation.parse_revocation": "CRL and OCSP response are targets of their own",
}


def parsers() -> set[str]:
    """`module.name` of each function named parse_*, the engine's own files apart (`tests/weights` is about those)."""
    found = set()
    for package in ("client/countermark", "appliance/countermark_appliance"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT / package).with_suffix("").parts)
            if module.startswith("engine."):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name.startswith("parse_"):
                    found.add(f"{module}.{node.name}")
    return found


def test_every_parser_is_fuzzed() -> None:
    covered = {name for target in TARGETS.values() for name in target.covers}
    assert len(covered) > 30
    assert covered | ELSEWHERE.keys() == parsers() | {"formats.cbor.decode"}


def test_no_input_leads_to_anything_but_a_value_or_a_typed_error(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    script = Path(driver.__file__)
    call = (sys.executable, str(script), "--inputs", str(INPUTS), "--seconds", str(SECONDS), "--out", str(out))
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())["targets"]
    assert {item["target"] for item in report} == TARGETS.keys()
    for item in report:
        assert item["inputs"] >= 1000, item
        assert item["refused"], item
        assert item["accepted"], item  # or mutation would never come past the outermost check


@pytest.mark.parametrize(
    "parse", [lambda data: data.decode(), lambda data: [0] * (1 << 40), lambda data: sum(range(len(data) * 100_000))]
)
def test_the_driver_sees_what_it_is_for(parse: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untyped error, memory beyond the limit, and time beyond the limit."""
    monkeypatch.setattr(driver, "LIMIT_S", 0.01)
    target = Target(parse=parse, seeds=lambda: [b"abc"], covers=())  # type: ignore[arg-type]
    monkeypatch.setitem(TARGETS, "bad", target)
    with pytest.raises((AssertionError, MemoryError)):
        driver.fuzz("bad", 1000, 1)
    monkeypatch.setitem(TARGETS, "bad", Target(parse=_refuse, seeds=lambda: [b"abc"], covers=()))
    assert driver.fuzz("bad", 10, 1)["refused"] == {"some.code": 9}


def test_a_parser_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(data: bytes) -> None:
        while data != b"abc":
            pass

    monkeypatch.setattr(driver, "HANG_S", 0.2)
    monkeypatch.setitem(TARGETS, "bad", Target(parse=loop, seeds=lambda: [b"abc"], covers=()))
    with pytest.raises(AssertionError, match="processor time"):
        driver.fuzz("bad", 1000, 1)


def _refuse(data: bytes) -> None:
    if data != b"abc":
        raise FormatError("refused", code="some.code")
