"""docs/operator.md says what the code says: every key of node.toml, every code that ends a start."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from countermark import errors
from countermark_appliance import config
from countermark_appliance.operations import quotas
from countermark_appliance.platform import image
from countermark_appliance.platform.tdx import ccel, registers, reports

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operator.md").read_text(encoding="utf-8")
APPLIANCE = ROOT / "appliance" / "countermark_appliance"
SOURCES = (
    *(APPLIANCE / "platform" / "tdx").glob("*.py"),
    *(APPLIANCE / "platform" / "vtpm").glob("*.py"),
    *(APPLIANCE / "guest").glob("*.py"),
    *(APPLIANCE / "operations").glob("*.py"),
    APPLIANCE / "platform" / "image.py",
    APPLIANCE / "platform" / "base.py",
    APPLIANCE / "platform" / "endorsements.py",
    APPLIANCE / "platform" / "nvml_gpus.py",
    APPLIANCE / "config.py",
    APPLIANCE / "watch.py",
)
CODE = re.compile(r"(platform|gpu|config|ccel|guest|telemetry)\.[a-z0-9_]+")
INSIDE = {  # told as `platform.ccel_table`, or as a line in the log
    *("ccel.checksum", "ccel.log_area"),
    *("platform.endorsements_dates", "platform.endorsements_older"),
}


def rows(heading: str) -> list[list[str]]:
    """The body of the table below a heading."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    assert len(table) > 3
    return [[cell.strip() for cell in line] for line in table[2:]]


def test_every_key_with_its_type_and_default() -> None:
    kinds = {str: "string", int: "integer"}
    wanted = {}
    for table, keys in config._SCHEMA.items():
        for key, (kind, default) in keys.items():
            shown = "required" if default is ... else "none" if default is None else str(default)
            wanted[f"{table}.{key}"] = (kinds[kind], shown)
    found = {row[0].strip("`"): (row[1], row[2].strip("`")) for row in rows("node.toml")}
    assert found == wanted


def test_every_member_of_a_client_s_key() -> None:
    found = {row[0].strip("`"): row[1] for row in rows("Keys for clients")}
    assert found == {"name": "string", "sha256": "string"} | dict.fromkeys(quotas.LIMITS, "integer")


def test_bounds() -> None:
    said = {row[0].strip("`"): row[3] for row in rows("node.toml")}
    for key, (low, high) in config._BOUNDS.items():
        assert f"{low} to {high}" in said[key]


def raised() -> dict[str, set[str]]:
    """Code -> the classes that are raised with it."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                found.setdefault(node.value, set())
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                for keyword in node.keywords:
                    if keyword.arg != "code" or not isinstance(keyword.value, ast.Constant):
                        continue
                    if CODE.fullmatch(keyword.value.value):
                        found.setdefault(keyword.value.value, set()).add(node.func.id)
    return found


def test_every_code_and_its_exit_code() -> None:
    codes = raised()
    listed = {code: int(row[1]) for row in rows("When it does not start") for code in re.findall(r"`([^`]+)`", row[0])}
    assert listed.keys() == codes.keys() - INSIDE
    for code, classes in codes.items():
        for name in classes - {"FormatError"}:
            assert getattr(errors, name).exit_code == listed[code], code


def test_the_paths_are_those_that_are_read() -> None:
    needs = PAGE.split("## What `tdx` needs\n", 1)[1]
    for path in (registers.MEASUREMENTS, ccel.TABLE, reports.REPORTS.removesuffix("/tsm/report")):
        assert f"/{path}" in needs, path
    assert f"`{image.PARAMETER}=`" in needs
