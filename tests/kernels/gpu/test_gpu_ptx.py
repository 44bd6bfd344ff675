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
from triton.experimental.gluon._runtime import GluonASTSource
from countermark_kernels.gpu import activation, attention, attention_hopper, attention_split, ieee
from countermark_kernels.gpu import decoder, logprobs, norm, quantise, rope, sampler

def ptx(kernel, signature, constants, source=ASTSource):
    types = {p.name: "constexpr" if p.name in constants else signature[p.name] for p in kernel.params}
    made = source(kernel, signature=types, constexprs=constants)
    return triton.compile(made, target=GPUTarget("cuda", 90, 32), options=ieee.EXACT).asm["ptx"]

row = {"x": "*fp32", "q": "*i8", "s": "*fp32", "flag": "*i32", "width": "i32"}
half = {"gate_up": "*fp32", "q": "*i8", "s": "*fp32", "flag": "*i32", "width": "i32"}
logits = {"logits": "*fp32", "best": "*i64", "fields": "*i64", "sums": "*i64", "vocab": "i32", "largest": "*fp32"}
logits |= {"ends": "*i32", "bounds": "*i32", "ranks": "*i64", "ids": "*i64", "flag": "*i32", "lanes": "*i64"}
logits |= {"counts": "*i32", "bias": "*fp32", "results": "*i64", "tokens": "*i32", "count": "i32", "prompt": "i32"}
logits |= {"entries": "*i32", "found": "*i64", "stride": "i32", "parts": "i32", "table": "*fp32", "carried": "*i32"}
logits |= {"drawn": "*i64", "x": "*fp32", "width": "i32"}
sizes = {"BUCKETS": 2048, "SLICE": 2048}
none = {"counts": None, "bias": None}
floats = dict.fromkeys(("qkv", "cos", "sin", "q_gain", "k_gain", "s_q", "s_k", "s_v"), "*fp32")
floats |= dict.fromkeys(("scores", "maxima", "out", "out_ptr", "s_q_ptr"), "*fp32")
cached = floats | dict.fromkeys(("q", "k", "v", "q_ptr"), "*i8") | {"flag": "*i32", "c": "fp32"}
heads = cached | dict.fromkeys(("positions", "slots"), "*i64") | {"eps": "fp32"}
heads |= dict.fromkeys(("rows", "context", "heads", "kv_heads"), "i32")
batch = cached | dict.fromkeys(("tables", "tiles", "items", "partial", "arrivals"), "*i32") | {"sums": "*i64"}
shape = {"GROUP": 4, "KV_HEADS": 8, "D": 64, "N": 64}
part = shape | {"R": 4, "M": 16, "CHUNK": 128, "EARLY": True}
lines = {"k": ("i8", 64), "v": ("i8", 64), "s_k": ("fp32", 1), "s_v": ("fp32", 1)}
swizzled = attention_hopper.gl.NVMMASharedLayout
layouts = {"i8": swizzled(64, 8, 2), "fp32": swizzled(0, 32, 2)}
copied = {name: f"tensordesc<{kind}[{rows}, 64],{layouts[kind]!r}>" for name, (kind, rows) in lines.items()}
hopper = {"HEADS": 32, "KV_HEADS": 8, "D": 64, "N": 64, "SLOTS": 4}
json.dump({
    "rope": ptx(rope._kernel, heads, {"PAGE": 64, "D": 64, "STAGES": 6, "GAINED": True, "GROUP": 4}),
    "attention prefill": ptx(attention._prefill, batch, shape | {"M": 64}),
    "attention score": ptx(attention_split._score, batch, part),
    "attention combine": ptx(attention_split._combine, batch, part | {"OTHERS": 16}),
    "attention whole": ptx(attention_split._whole, batch, part),
    "attention hopper": ptx(attention_hopper.prefill, batch | copied | {"items": "i32"}, hopper, GluonASTSource),
    "quantise": ptx(quantise._kernel, row, {"BLOCK": 128}),
    "norm": ptx(norm._kernel, row | {"eps": "fp32"}, {"BLOCK": 128}),
    "swiglu": ptx(activation._kernel, half, {"PARTS": 1, "CHUNK": 128, "STAGES": 5}),
    "sampler": ptx(sampler._count, logits, sizes),
    "sampler scan": ptx(sampler._scan, logits, {"SLICE": 2048}),
    "sampler scan alone": ptx(sampler._scan, logits, {"SLICE": 2048, "lanes": None, **none}),
    "sampler plan": ptx(sampler._plan, logits, {"BUCKETS": 2048}),
    "sampler scatter": ptx(sampler._scatter, logits, sizes),
    "sampler resolve": ptx(sampler._resolve, logits, {"BUCKETS": 2048, "TILE": 1024}),
    "sampler finish": ptx(sampler._finish, logits, {}),
    "sampler finish alone": ptx(sampler._finish, logits, {"counts": None}),
    "sampler remember": ptx(sampler._remember, logits, {"BLOCK": 256}),
    "sampler adjust": ptx(sampler._adjust, logits, {"BLOCK": 256}),
    "log probabilities": ptx(logprobs._slices, logits, {"SLICE": 2048, "COUNT": 32}),
    "log probabilities of rows": ptx(logprobs._rows, logits, {"SIZE": 4096, "COUNT": 32}),
    "embeddings": ptx(decoder._embed, logits, {"STRIDE": 3, "BLOCK": 1024}),
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
    for name, text in assembly.items():
        arithmetic = set(
            re.findall(r"^\s*(?:@\S+\s+)?((?:add|sub|mul|fma|mad|div|sqrt|rcp|ex2)\.\S*f32)\s", text, re.M)
        )
        fused = {"fma.rn.f32"} if name.startswith("attention") else set()  # written so
        assert arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"} | fused
        assert ".ftz" not in text
        assert ".approx" not in text
        assert ".f64" not in text


def test_the_instructions_meant_are_there(assembly: dict[str, str]) -> None:
    assert "div.rn.f32" in assembly["quantise"]
    assert "sqrt.rn.f32" in assembly["norm"]
    assert re.search(r"cvt\.rn\.f32\.[su]64", assembly["norm"])
    assert "div.rn.f32" in assembly["swiglu"]
    assert re.search(r"(atom|red)\.global\.gpu\.relaxed\.add\.u64", assembly["sampler"])
