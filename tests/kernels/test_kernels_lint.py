"""What must not appear on the exact path: the list of the numerics specification, over every source of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

PACKAGE = Path(str(files("countermark_kernels")))
SOURCES = sorted(PACKAGE.glob("*.py"))
C_SOURCES = sorted((PACKAGE / "native").glob("*.[ch]"))
NEVER = {
    *("addcmul", "addcdiv", "lerp", "silu", "softmax", "log_softmax", "sigmoid", "exp", "exp2", "log", "log2", "sqrt"),
    *("rsqrt", "reciprocal", "div", "true_divide", "round", "rint", "floor", "mean", "var", "std", "norm", "rms_norm"),
    *("layer_norm", "logsumexp", "scaled_dot_product_attention", "compile", "einsum", "baddbmm", "addmm", "linear"),
}
INTEGER_ONLY = {"sum", "cumsum", "prod"}
ALLOWED_MODULES = {"ieee", "math", "linear", "attention"}
"""`ieee.div(...)` is the way to divide; `math` is for Python constants; the others are our own functions."""


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div | ast.Pow):
            sides = [side for side in ast.iter_child_nodes(node) if isinstance(side, ast.expr)]
            if not all(isinstance(side, ast.Constant | ast.UnaryOp) for side in sides):
                yield f"{node.lineno}: operator"
        elif isinstance(node, ast.Call):
            if any(keyword.arg == "alpha" for keyword in node.keywords):
                yield f"{node.lineno}: alpha="
            if isinstance(node.func, ast.Attribute):
                name, owner = node.func.attr, node.func.value
                of_module = isinstance(owner, ast.Name) and owner.id in ALLOWED_MODULES
                if name in NEVER and not of_module:
                    yield f"{node.lineno}: {name}"
                is_int64 = any(k.arg == "dtype" and ast.unparse(k.value) == "torch.int64" for k in node.keywords)
                if name in INTEGER_ONLY and not of_module and not is_int64:
                    yield f"{node.lineno}: {name} of floats"


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) >= 14
    assert len(C_SOURCES) >= 16


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "ieee.py"], ids=lambda p: p.name)
def test_sources_are_clean(path: Path) -> None:
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "y = x / 127",
        "y = 127.0 / x",
        "y = x**2",
        "x /= 3",
        "y = torch.add(a, b, alpha=2)",
        "y = torch.addcmul(a, b, c)",
        "y = a.lerp(b, 0.5)",
        "y = torch.nn.functional.silu(x)",
        "y = x.softmax(-1)",
        "y = torch.exp(x)",
        "y = x.sum()",
        "y = x.sum(dim=-1, dtype=torch.float32)",
        "y = x.mean()",
        "y = torch.cumsum(x, 0)",
        "f = torch.compile(g)",
        "y = torch.round(x)",
        "y = torch.sqrt(x)",
    ],
)
def test_the_lint_sees(line: str) -> None:
    assert len(list(faults(line))) == 1


@pytest.mark.parametrize("path", C_SOURCES, ids=lambda p: p.name)
def test_c_sources_are_clean(path: Path) -> None:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)
    assert not re.search(
        r"\b(fmaf?|_mm\w*_fn?m(add|sub)\w*|_mm\w*_rcp\w*|_mm\w*_rsqrt\w*|expf?|exp2f?|powf?)\s*\(", text
    )
    assert "#pragma STDC FP_CONTRACT" not in text
    if path.name != "ieee.h":
        assert not re.search(r"\b(sqrtf?|_mm\w*_sqrt\w*|_mm\w*_div_p[sd]|rintf?|roundf?|nearbyintf?)\s*\(", text)
    if path.name not in {"ieee.h", "selftest.h"}:
        for match in re.finditer(r"[^\n]*[^/*]/[^/*][^\n]*", text):
            line = match.group()
            assert "#include" in line or not re.search(r"\df\b|float|\bf8\b", line), line
