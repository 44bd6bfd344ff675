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
import json, re, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from countermark_kernels.gpu import activation, attention, attention_hopper, attention_split, ieee
from countermark_kernels.gpu import decoder, linear, logprobs, norm, quantise, rope, sampler

def ptx(kernel, signature, constants, source=ASTSource):
    constants = constants | {p.name: True for p in kernel.params if p.name == "EARLY"}
    types = {p.name: "constexpr" if p.name in constants else signature[p.name] for p in kernel.params}
    made = source(kernel, signature=types, constexprs=constants)
    text = triton.compile(made, target=GPUTarget("cuda", 90, 32), options=ieee.EXACT).asm["ptx"]
    given = [name for name, kind in types.items() if kind != "constexpr"]
    pointers = {i: name for i, name in enumerate(given) if types[name].startswith("*")}
    for i, name in pointers.items():
        text = re.sub(rf"\\b\\w+_param_{i}\\b", f"POINTER_{name}", text)
    return text

row = {"x": "*fp32", "q": "*i8", "s": "*fp32", "flag": "*i32", "width": "i32"}
half = row | {"gate_up": "*fp32", "mixed": "*i16", "tops": "*i32", "arrivals": "*i32"}
product = dict.fromkeys(("s", "ws", "bias", "residual", "y"), "*fp32") | dict.fromkeys(("partial", "arrivals"), "*i32")
product |= {"then": "*i8"} | dict.fromkeys(("count", "outputs", "inputs", "words"), "i32")
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
part = shape | {"R": 4, "M": 16, "CHUNK": 128}
lines = {"k": ("i8", 64), "v": ("i8", 64), "s_k": ("fp32", 1), "s_v": ("fp32", 1)}
swizzled = attention_hopper.gl.NVMMASharedLayout
layouts = {"i8": swizzled(64, 8, 2), "fp32": swizzled(0, 32, 2)}
copied = {name: f"tensordesc<{kind}[{rows}, 64],{layouts[kind]!r}>" for name, (kind, rows) in lines.items()}
words = {"ROWS": 2, "BN": 2, "BK": 512, "BYTES": 4096, "GPU": True}
tile = {"BM": 16, "BN": 64, "BK": 256, "SPLIT": 2, "EVEN": False}
hopper = {"HEADS": 32, "KV_HEADS": 8, "D": 64, "N": 64, "SLOTS": 4}
json.dump({
    "rope": ptx(rope._kernel, heads, {"PAGE": 64, "D": 64, "STAGES": 6, "GAINED": True, "GROUP": 4}),
    "rope of values": ptx(rope._values_kernel, heads, {"PAGE": 64, "D": 64, "VALUES": 32}),
    "attention prefill": ptx(attention._prefill, batch, shape | {"M": 64}),
    "attention score": ptx(attention_split._score, batch, part),
    "attention combine": ptx(attention_split._combine, batch, part | {"OTHERS": 16}),
    "attention whole": ptx(attention_split._whole, batch, part | {"M": 8}),
    "attention hopper": ptx(attention_hopper.prefill, batch | copied | {"items": "i32"}, hopper, GluonASTSource),
    "quantise": ptx(quantise._kernel, row, {"BLOCK": 128}),
    "norm": ptx(norm._kernel, row | {"eps": "fp32"}, {"BLOCK": 128}),
    "swiglu": ptx(activation._kernel, half, {"PARTS": 1, "CHUNK": 128, "STAGES": 5}),
    "swiglu shared": ptx(activation._shared_kernel, half, {"PART": 128, "CHUNK": 128, "STAGES": 5}),
    "rows": ptx(linear._rows, product | {"q": "*i32", "w": "*i32"}, words),
    "tiles": ptx(linear._tiles, product | {"q": "*i8", "w": "*i8"}, tile),
    "sampler": ptx(sampler._count, logits, sizes),
    "sampler scan": ptx(sampler._scan, logits, {"SLICE": 2048}),
    "sampler scan alone": ptx(sampler._scan, logits, {"SLICE": 2048, "lanes": None, **none}),
    "sampler plan": ptx(sampler._plan, logits, {"BUCKETS": 2048}),
    "sampler scatter": ptx(sampler._scatter, logits, sizes),
    "sampler resolve": ptx(sampler._resolve, logits, {"BUCKETS": 2048, "TILE": 1024}),
    "sampler finish": ptx(sampler._finish, logits, {"GREEDY": False}),
    "sampler finish alone": ptx(sampler._finish, logits, {"counts": None, "GREEDY": True}),
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


BEFORE = {
    "attention score": {"tiles", "items"},
    "attention combine": {"tiles", "items", "tables"},
    "attention whole": {"tiles", "tables"},
    "rows": {"w", "ws"},
}
"""What is read without waiting: what the host sent for the pass, and weights."""


def test_kernels_wait_before_they_read_what_others_write(assembly: dict[str, str]) -> None:
    """overlap.py's rules: the next kernel may start at once; till the wait nothing is written, little read."""
    early = {name: text for name, text in assembly.items() if "griddepcontrol" in text}
    others = {"norm", "quantise", "rope", "rope of values", "swiglu", "swiglu shared", "tiles", "sampler scan"}
    assert early.keys() >= BEFORE.keys() | others | {"sampler finish", "sampler finish alone"}
    for name, text in early.items():
        head, *rest = text.split("griddepcontrol.wait")
        assert len(rest) == 1, name
        assert "griddepcontrol.launch_dependents" in head, name
        assert not re.search(r"^\s*(?:@\S+\s+)?(?:st|atom|red)\.global", head, re.M), name
        assert _read(head) == BEFORE.get(name, set()), name


def _read(code: str) -> set[str]:
    """The pointers among the arguments that the addresses of loads come from."""
    made: dict[str, set[str]] = {}
    loads: set[str] = set()
    for line in code.splitlines():
        found = re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(\{[^}]*\}|[^,]+),(.*);", line)
        if found is None:
            continue
        operation, to, what = found.groups()
        sources = set(re.findall(r"%\w+", what)) | set(re.findall(r"POINTER_\w+", what))
        for register in re.findall(r"%\w+", to):
            made.setdefault(register, set()).update(sources)
        if operation.startswith("ld.global"):
            loads |= sources
    while more := {source for load in loads for source in made.get(load, ())} - loads:
        loads |= more
    return {name.removeprefix("POINTER_") for name in loads if name.startswith("POINTER_")}
