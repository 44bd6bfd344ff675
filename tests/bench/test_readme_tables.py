"""Every figure in the README comes from a committed result, and is the one that the result has."""

import json
import re
from pathlib import Path

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


def test_results_name_machine_versions_and_date() -> None:
    found = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert len(found) >= 7
    for path in found:
        text = path.read_text()
        assert re.search(r'"(cpu|gpu|device)": "[^"]{3,}"|"NVIDIA [^"]+": {', text), path.name
        assert re.search(r'"torch": "\d+\.\d+', text), path.name
        assert re.search(r'"date": "20\d\d-\d\d-\d\d"', text), path.name
