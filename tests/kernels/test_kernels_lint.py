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
GPU_SOURCES = sorted((PACKAGE / "gpu").glob("*.py"))
C_SOURCES = sorted((PACKAGE / "native").glob("*.[ch]"))
NEVER = {
    *("addcmul", "addcdiv", "lerp", "silu", "softmax", "log_softmax", "sigmoid", "exp", "exp2", "log", "log2", "sqrt"),
    *("rsqrt", "reciprocal", "div", "true_divide", "round", "rint", "floor", "mean", "var", "std", "norm", "rms_norm"),
    *("layer_norm", "logsumexp", "scaled_dot_product_attention", "compile", "einsum", "baddbmm", "addmm", "linear"),
}
INTEGER_ONLY = {"sum", "cumsum", "prod"}
ALLOWED_MODULES = {"ieee", "math", "linear", "attention"}
"""`ieee.div(...)` is the way to divide; `math` is for Python constants; the others are our own functions."""


KERNEL_NEVER = {
    *("exp", "exp2", "log", "log2", "cos", "sin", "tanh", "sqrt", "sqrt_rn", "rsqrt", "fdiv", "div_rn", "erf", "floor"),
    *("ceil", "sigmoid", "softmax", "fma", "rint", "round", "reduce", "associative_scan", "cumprod", "dot_scaled"),
}
"""In a Triton kernel these round, fuse, approximate, or sum in an order. gpu/ieee.py alone calls the exact ones."""
GLUON_MAY = {"gl.div_rn", "gl.fma"}
"""Correctly rounded or exact, and not to be had from gpu/ieee.py, which is not written in Gluon."""
KERNEL_SUMS = {"sum": 0, "cumsum": 0, "atomic_add": 1}
"""Free of order over integers only: the operand (which argument) must be asserted to be one in the same function."""
ASSEMBLY = re.compile(r"\.(approx|ftz)|\b(fma|ex2|lg2|rcp|rsqrt|sin|cos|tanh)\.")


def kernel_faults(source: str) -> Iterator[str]:
    for scope in ast.parse(source).body:
        text = ast.unparse(scope)
        for node in ast.walk(scope):
            if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div | ast.Pow):
                yield f"{node.lineno}: operator"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ASSEMBLY.search(node.value):
                yield f"{node.lineno}: assembly"
            elif isinstance(node, ast.Call):
                yield from (
                    f"{node.lineno}: {k.arg}" for k in node.keywords if k.arg in {"allow_tf32", "input_precision"}
                )
                if isinstance(node.func, ast.Subscript):
                    yield f"{node.lineno}: a launch past launching.py"
                elif isinstance(node.func, ast.Attribute):
                    yield from _call_faults(node, node.func, text)


def _call_faults(node: ast.Call, function: ast.Attribute, scope: str) -> Iterator[str]:
    name, owner = function.attr, ast.unparse(function.value)
    if name in KERNEL_NEVER and owner != "ieee" and f"{owner}.{name}" not in GLUON_MAY:
        yield f"{node.lineno}: {name}"
    if name == "dot" and not any(k.arg == "out_dtype" and k.value.attr == "int32" for k in node.keywords):
        yield f"{node.lineno}: dot of floats"
    if name in KERNEL_SUMS and owner != "torch":
        operand = node.args[KERNEL_SUMS[name]] if owner in {"tl", "gl"} else function.value
        constant = isinstance(operand, ast.Constant) and isinstance(operand.value, int)
        if not constant and f"static_assert({ast.unparse(operand)}.dtype.is_int()" not in scope:
            yield f"{node.lineno}: {name} of what may be floats"


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
    assert len(GPU_SOURCES) >= 10
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


@pytest.mark.parametrize(
    "path", [p for p in GPU_SOURCES if p.name not in {"ieee.py", "launching.py"}], ids=lambda p: p.name
)
def test_gpu_sources_are_clean(path: Path) -> None:
    assert list(kernel_faults(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "y = x / 127.0",
        "x /= y",
        "y = x**2",
        "y = tl.sqrt(x)",
        "y = tl.sqrt_rn(x)",
        "y = tl.div_rn(x, y)",
        "y = tl.exp(x)",
        "y = tl.exp2(x)",
        "y = tl.math.exp2(x)",
        "y = libdevice.rint(x)",
        "y = tl.log(x)",
        "y = x.exp()",
        "y = tl.sigmoid(x)",
        "y = tl.softmax(x)",
        "y = tl.fma(x, y, z)",
        "y = tl.sum(x, axis=0)",
        "y = x.sum(0)",
        "y = gl.sum(x, 0)",
        "y = tl.cumsum(x, 0)",
        "y = tl.reduce(x, 0, f)",
        "tl.atomic_add(p, x)",
        "y = tl.dot(a, b)",
        "y = tl.dot(a, b, out_dtype=tl.float32)",
        "y = tl.load(p, allow_tf32=True)",
        "kernel[(1,)](x)",
        "kernel[(1,)](x, **ieee.EXACT)",
        'y = tl.inline_asm_elementwise("ex2.approx.f32 $0, $1;", "=r,r", [x])',
        'y = tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $2, $3;", "=r,r", [x])',
    ],
)
def test_the_kernel_lint_sees(line: str) -> None:
    assert len(list(kernel_faults(f"def f():\n    {line}"))) == 1


@pytest.mark.parametrize(
    "lines",
    [
        "y = ieee.div(x, y)",
        "tl.static_assert(x.dtype.is_int())\n    y = tl.sum(x, axis=0)",
        "y = tl.dot(a, b, out_dtype=tl.int32)",
        "tl.atomic_add(p, 1)",
        "prepared(kernel, num_warps=4)((1,), x)",
    ],
)
def test_the_kernel_lint_lets_pass(lines: str) -> None:
    assert list(kernel_faults(f"def f():\n    {lines}")) == []


@pytest.mark.parametrize("path", C_SOURCES, ids=lambda p: p.name)
def test_c_sources_are_clean(path: Path) -> None:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)
    fused = r"\b(fmaf?|_mm\w*_fn?m(add|sub)\w*)\s*\("
    assert re.findall(fused, text) == ([("_mm256_fmadd_ps", "add")] if path.name == "simd.h" else [])
    assert "f8_fma" not in text or path.name in {"simd.h", "ieee.h", "selftest.h", "attention.h"}
    assert not re.search(r"\b(_mm\w*_rcp\w*|_mm\w*_rsqrt\w*|expf?|exp2f?|powf?)\s*\(", text)
    assert "#pragma STDC FP_CONTRACT" not in text
    if path.name != "ieee.h":
        assert not re.search(r"\b(sqrtf?|_mm\w*_sqrt\w*|_mm\w*_div_p[sd]|rintf?|roundf?|nearbyintf?)\s*\(", text)
    if path.name not in {"ieee.h", "selftest.h"}:
        for match in re.finditer(r"[^\n]*[^/*]/[^/*][^\n]*", text):
            line = match.group()
            assert "#include" in line or not re.search(r"\df\b|float|\bf8\b", line), line
