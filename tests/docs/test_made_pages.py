"""Pages and figures that are made from something else are made from it as it is now."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_what_the_docstrings_say() -> None:
    api = script("make_api")
    assert api.page() == (DOCS / "api.md").read_text(encoding="utf-8"), "run: python docs/make_api.py"


def test_no_public_name_is_without_a_word() -> None:
    headings = re.split(r"^### ", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(headings) > 20
    for part in headings:
        name, _, body = part.partition("\n")
        assert re.search(r"[A-Za-z]{3,}", re.sub(r"```.*?```", "", body, flags=re.S)), name


@pytest.mark.parametrize("name", sorted(script("make_figures").sources()))
def test_a_figure_is_drawn_from_its_source(name: str) -> None:
    figure = (DOCS / "img" / name).read_text(encoding="utf-8")
    (source,) = re.findall(r"^<!-- drawn from ([0-9a-f]{64}) by docs/make_figures.py -->$", figure, re.M)
    assert source == script("make_figures").sources()[name], "run: python docs/make_figures.py"
    root = ET.fromstring(figure)  # noqa: S314  our own file
    assert root.tag.endswith("svg")
    assert b"<script" not in figure.encode()


def test_every_figure_is_shown_somewhere() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"])
    for name in script("make_figures").sources():
        assert f"img/{name}" in pages, name
