"""What the compiler makes of the kernels for compute capability 9.0: no device is needed to read it.

In a process of its own, because this one may be set to interpret.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from gpu_cases import triton

PROGRAM = """
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from countermark_kernels.gpu import activation, ieee, norm, quantise, sampler

def ptx(kernel, signature, constants):
    source = ASTSource(kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=ieee.EXACT).asm["ptx"]

row = {"x": "*fp32", "q": "*i8", "s": "*fp32", "flag": "*i32", "width": "i32"}
half = {"gate_up": "*fp32", "q": "*i8", "s": "*fp32", "flag": "*i32", "width": "i32"}
logits = {"logits": "*fp32", "best": "*i64", "fields": "*i64", "sums": "*i64", "vocab": "i32"}
json.dump({
    "quantise": ptx(quantise._kernel, row, {"BLOCK": 128}),
    "norm": ptx(norm._kernel, row | {"eps": "fp32"}, {"BLOCK": 128}),
    "swiglu": ptx(activation._kernel, half, {"PARTS": 1, "CHUNK": 128, "STAGES": 5}),
    "sampler": ptx(sampler._count, logits, {"BUCKETS": 2048, "SLICE": 128}),
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def assembly() -> dict[str, str]:
    assert triton is not None
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, stdout=subprocess.PIPE)
    texts: dict[str, str] = json.loads(found.stdout)
    return texts


def test_every_binary32_instruction_rounds_once(assembly: dict[str, str]) -> None:
    for text in assembly.values():
        arithmetic = set(
            re.findall(r"^\s*(?:@\S+\s+)?((?:add|sub|mul|fma|mad|div|sqrt|rcp|ex2)\.\S*f32)\s", text, re.M)
        )
        assert arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
        assert ".ftz" not in text
        assert ".approx" not in text
        assert ".f64" not in text


def test_the_instructions_meant_are_there(assembly: dict[str, str]) -> None:
    assert "div.rn.f32" in assembly["quantise"]
    assert "sqrt.rn.f32" in assembly["norm"]
    assert re.search(r"cvt\.rn\.f32\.[su]64", assembly["norm"])
    assert "div.rn.f32" in assembly["swiglu"]
    assert re.search(r"(atom|red)\.global\.gpu\.relaxed\.add\.u64", assembly["sampler"])
