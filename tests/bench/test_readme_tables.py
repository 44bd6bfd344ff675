"""Every figure in the README comes from a committed result, and is the one that the result has."""

import json
import re
from pathlib import Path

import pytest

import readme_tables

ROOT = Path(__file__).parents[2]


def test_tables_are_what_the_results_say() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme_tables.replaced(readme) == readme


def test_a_changed_figure_is_noticed() -> None:
    readme = (ROOT / "README.md").read_text()
    speed = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["tokens_per_second"]
    figure = f"| {next(iter(speed.values()))['decode b1']['best']:.0f} |"
    assert figure in readme
    assert readme_tables.replaced(readme.replace(figure, "| 999 |")) != readme.replace(figure, "| 999 |")


def test_parity_names_every_gpu_and_who_drew() -> None:
    results = {p.name: json.loads(p.read_text()) for p in (ROOT / "bench" / "results").glob("parity-*.json")}
    assert len(results) >= 2
    text = readme_tables.parity_lines(results)
    for name, result in results.items():
        assert result["environment"]["device"] in text and name in text
        assert result["environment"]["kernel_digest"][:16] in text
    assert text.count("drawn on the GPU") == len(results) and "CPU's sampler" not in text and "0 differences" in text

    on_host = {name: result | {"drawn_on": "host"} for name, result in results.items()}
    assert "CPU's sampler" in readme_tables.parity_lines(on_host)
    first, *_ = results.values()
    first["models"]["qwen3"]["mismatches"] = 3
    assert "3 differences" in readme_tables.parity_lines(results)
    first["models"]["qwen3"]["prompts"] -= 1
    with pytest.raises(ValueError, match="same cases"):
        readme_tables.parity_lines(results)


def test_results_name_machine_versions_and_date() -> None:
    found = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert len(found) >= 7
    for path in found:
        text = path.read_text()
        assert re.search(r'"(cpu|gpu|device)": "[^"]{3,}"|"NVIDIA [^"]+": {', text), path.name
        assert re.search(r'"torch": "\d+\.\d+', text), path.name
        assert re.search(r'"date": "20\d\d-\d\d-\d\d[T"]', text), path.name


def test_a_condition_that_failed_is_not_counted() -> None:
    file = ROOT / "bench" / "results" / "determinism-nvidia-h100-80gb-hbm3.json"
    report = json.loads(file.read_text())
    count = len(report["cases"])
    assert f"{count} of {count} conditions" in readme_tables.determinism_lines({file.name: report})
    report["cases"][0]["status"] = "FAIL"
    report["cases"][1]["distinct"] = 2
    assert f"{count - 2} of {count} conditions" in readme_tables.determinism_lines({file.name: report})
    report["cases"][2]["status"] = "SKIP"
    assert f"{count - 3} of {count - 1} conditions" in readme_tables.determinism_lines({file.name: report})
