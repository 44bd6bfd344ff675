"""Run `countermark evidence` as a shell would, and read what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from countermark.cli import main


class Evidence:
    """`Evidence(capsys)("tdx", quote, "--at", "0")`: the JSON object and the exit code; `said` is stderr."""

    said: str

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: object) -> tuple[dict[str, Any], int]:
        self._capsys.readouterr()
        code = main(["evidence", *map(str, argv), "--json"])
        out = self._capsys.readouterr()
        self.said = out.err
        assert out.out.count("\n") == 1, "one object"
        value: dict[str, Any] = json.loads(out.out)
        return value, code


def statuses(result: dict[str, Any]) -> dict[str, str]:
    """Check name -> its code where it failed, else its status."""
    return {check["name"]: check["code"] or check["status"] for check in result["checks"]}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
