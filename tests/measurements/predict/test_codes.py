"""Every code of a prediction's errors stands in docs/codes.md, with its class and what to do."""

import ast
import re

from measurements.predict.artefacts import ROOT

SOURCES = (
    *("acpi", "efivar", "fat", "gpt", "pcr", "pe", "predict", "rtmr", "shape", "shape_metadata", "tdhob", "tdvf"),
    *("tdvf_volumes", "uki"),
)
PAGE = (ROOT / "docs" / "codes.md").read_text()


def test_codes():
    raised = set()
    for name in SOURCES:
        tree = ast.parse((ROOT / "measurements/countermark_measurements" / f"{name}.py").read_text())
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            for keyword in call.keywords:
                if keyword.arg == "code":
                    assert isinstance(keyword.value, ast.Constant), name
                    raised.add(keyword.value.value)
    assert len(raised) > 40
    rows = {
        code: cells
        for line in PAGE.splitlines()
        if line.startswith("| `")
        for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
        for code in re.findall(r"`([^`]+)`", cells[0])
    }
    assert raised <= rows.keys()
    assert {rows[code][1] for code in raised} == {"FormatError"}
    assert {rows[code][2] for code in raised} == {"20"}
