"""The determinism suite at full scale, on the stand-in model or a generated one, a few cases at a time.

    .venv/bin/python bench/determinism.py [--device cuda] [--model qwen3] [--cases neighbours,resident-44] [--runs 1000]

Results are merged case by case into bench/results/determinism-<device>.json, so that a machine that is lent for minutes
runs the suite in parts; results of other weights, kernels or scale are dropped. Exit code 1 if a case of this call
failed.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import paritymodels
from benchlib import HERE, built_weights, say
from countermark_appliance.engine import weights
from countermark_appliance.engine.conditions import Scale
from countermark_appliance.engine.determinism import Case, Report, run_suite

SAME = ("device", "driver", "profile", "kernel_digest", "weights_root", "torch", "triton")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["smollm2", *(r.name for r in paritymodels.RECIPES)], default="smollm2")
    parser.add_argument("--cases", default="", help="separated by commas; all by default")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="a folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = built_weights() if args.model == "smollm2" else generated(args.model, Path(folder))
        report = run_suite(
            functools.partial(weights.load, path),
            device=args.device,
            scale=Scale.full(args.device, args.runs),
            cases=tuple(args.cases.split(",")) if args.cases else (),
            on_case=show,
        )
    name = re.sub(r"[^a-z0-9]+", "-", str(report.environment["device"]).lower()) if args.device == "cuda" else "cpu"
    merge(args.out / f"determinism-{name}.json", report)
    return 0 if report.passed else 1


def generated(name: str, folder: Path) -> Path:
    """The artefact of a model of `paritymodels`."""
    (recipe,) = (recipe for recipe in paritymodels.RECIPES if recipe.name == name)
    paritymodels.write(recipe, folder / "source")
    weights.build(folder / "source", folder / "artefact")
    return folder / "artefact"


def show(name: str, case: Case | None) -> None:
    if case is None:
        return
    reason = f" ({case.reason})" if case.reason else ""
    say(f"{name:14} {case.status}{reason}  {case.runs} runs, {case.distinct} distinct, {case.seconds:.0f} s")
    if case.difference is not None:
        say(f"    {case.difference}")


def merge(path: Path, report: Report) -> None:
    """Replace the cases that ran; keep the others where they are of the same weights, kernels, machine and scale."""
    found: dict[str, Any] = json.loads(json.dumps(report.as_json()))
    if path.exists():
        before = json.loads(path.read_text())
        same = all(before["environment"].get(name) == found["environment"][name] for name in SAME)
        if same and before["scale"] == found["scale"]:
            ran = {case["name"] for case in found["cases"]}
            found["cases"] = [case for case in before["cases"] if case["name"] not in ran] + found["cases"]
            statuses = {case["status"] for case in found["cases"]}
            found["passed"] = "PASS" in statuses and "FAIL" not in statuses
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    say(f"{path}: {len(found['cases'])} cases, {'passed' if found['passed'] else 'NOT passed'}")


if __name__ == "__main__":
    sys.exit(main())
