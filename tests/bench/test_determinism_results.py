"""Parts of the determinism suite are merged into one file, and never with those of other weights or another scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import determinism as bench
from countermark_appliance.engine.conditions import Scale
from countermark_appliance.engine.determinism import Case, Report, Status

ENVIRONMENT = dict.fromkeys(bench.SAME, "x") | {"date": "2026-01-01"}


def case(name: str, status: Status = Status.PASS) -> Case:
    return Case(
        name=name,
        status=status,
        runs=3,
        questions=1,
        distinct=1,
        digest="ab",
        facts={},
        seconds=1.0,
        reason="",
        difference=None,
    )


def test_parts_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "determinism-cpu.json"
    first = Report(environment=ENVIRONMENT, scale=Scale(), cases=(case("chunks"), case("pages", Status.FAIL)))

    def merged(report: Report) -> tuple[bool, dict[str, str]]:
        bench.merge(path, report)
        found = json.loads(path.read_text())
        return found["passed"], {item["name"]: item["status"] for item in found["cases"]}

    assert merged(first) == (False, {"chunks": "PASS", "pages": "FAIL"})
    later = replace(first, environment=ENVIRONMENT | {"date": "2026-01-02"}, cases=(case("pages"), case("cancel")))
    assert merged(later) == (True, {"chunks": "PASS", "pages": "PASS", "cancel": "PASS"})
    skipped = replace(first, cases=(case("graphs", Status.SKIP),))
    assert merged(skipped)[0] is True
    for other in (
        replace(skipped, scale=Scale(runs=2)),
        replace(skipped, environment=ENVIRONMENT | {"kernel_digest": "y"}),
    ):
        assert merged(other) == (False, {"graphs": "SKIP"})
        merged(first)
