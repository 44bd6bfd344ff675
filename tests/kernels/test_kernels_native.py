"""The native library: built from these sources, refused when wrong, and sound under threads and fork.

Each mutant is a plausible way to lose bits (a compiler flag, an approximate instruction, a saturating one); the
start-up self-test must refuse every one of them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_cases import floats, int8s, scales

from countermark_kernels import PROFILE, binding, ieee, kernel_digest, launch, linear, quantise

SOURCE = Path(__file__).resolve().parents[2] / "kernels"
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
needs_native = pytest.mark.skipif(binding.native() is None, reason="native library not built")


def builder(package: Path | None = None) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", SOURCE / "build_native.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if package is not None:
        module.PACKAGE = package
    return module


@pytest.fixture
def package(tmp_path: Path) -> Path:
    copy = tmp_path / "countermark_kernels"
    shutil.copytree(SOURCE / "countermark_kernels" / "native", copy / "native")
    return copy


def test_profile_and_digest() -> None:
    assert PROFILE == "exact-v1"
    assert len(kernel_digest()) == 32
    assert binding.source_digest() == builder().source_digest()


def test_self_test_report() -> None:
    report = launch.self_test()
    assert report.backend == launch.backend()
    assert "attention" in report.checks
    with launch.forced(backend="torch"):
        report = launch.self_test()
    assert (report.backend, report.isa, report.reason) == ("torch", "torch", "switched off")


@needs_compiler
def test_the_library_here_is_up_to_date() -> None:
    assert binding.reason() == ""
    assert "portable" in launch.isas()


def test_no_compiler(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "no C compiler" in (builder(package).build(package / "_native.so") or "")
    assert not (package / "_native.so").exists()


MUTANTS = {
    "reciprocal": ("ieee.h", "return a / b; }\nstatic inline f8", "return a * (1.0f / b); }\nstatic inline f8"),
    "reciprocal vector": (
        "ieee.h",
        "{ return a / b; }\nstatic inline float sqrt1",
        "{ return a * (f8_set(1.0f) / b); }\nstatic inline float sqrt1",
    ),
    "truncation": ("simd.h", "(x + shift) - shift", "x"),
    "exp2 coefficient": ("ieee.h", "0x1.c6ae72p-5f", "0x1.c6ae74p-5f"),
    "product in 16 bits": ("gemm.h", "int32_t acc[PANEL] = {0};\n", "int16_t acc[PANEL] = {0};\n"),
    "flush to zero": ("pool.c", "_mm_setcsr(0x1f80)", "_mm_setcsr(0x9fc0)"),
    "round up": ("pool.c", "_mm_setcsr(0x1f80)", "_mm_setcsr(0x5f80)"),
    "nothing": ("ieee.h", "", ""),
}


@needs_compiler
@pytest.mark.parametrize("name", MUTANTS)
def test_self_test_refuses_mutants(name: str, package: Path) -> None:
    file, old, new = MUTANTS[name]
    if "setcsr" in old and launch.isas()[:1] == ("portable",):
        pytest.skip("an x86 register")
    path = package / "native" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    build = builder(package)
    build.X86_FLAGS = {}
    build.FLAGS = ["-O0" if flag == "-O3" else flag for flag in build.FLAGS]
    assert build.build(package / "_native.so") is None
    library = binding.Native(package / "_native.so")
    library.set_threads(2)
    failed = library.self_test("portable")
    assert (failed is None) == (name == "nothing")


@needs_compiler
def test_contraction_is_refused(package: Path) -> None:
    if "avx2" not in launch.isas():
        pytest.skip("needs FMA")
    build = builder(package)
    build.X86_FLAGS = {"avx2": ["-mavx2", "-mfma", "-ffp-contract=fast"]}
    assert build.build(package / "_native.so") is None
    library = binding.Native(package / "_native.so")
    assert library.self_test("avx2") in {"arithmetic", "exp2"}
    assert library.self_test("portable") is None


@needs_compiler
@pytest.mark.parametrize("damage", ["stale", "truncated", "absent"])
def test_a_library_that_is_not_ours_is_not_used(damage: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = package / "_native.so"
    build = builder(package)
    build.X86_FLAGS = {}
    if damage == "stale":
        (package / "native" / "ops.h").write_text("\n" + (package / "native" / "ops.h").read_text())
        assert build.build(target) is None
    elif damage == "truncated":
        target.write_bytes(b"\x7fELF" + bytes(100))
    real = binding.files

    class Folder:
        def joinpath(self, name: str) -> object:
            return target if name == binding.LIBRARY else real("countermark_kernels").joinpath(name)

    monkeypatch.setattr(binding, "files", lambda _: Folder())
    monkeypatch.setattr(binding, "_state", binding._State())
    assert binding.native() is None
    expected = {"stale": "built from other sources", "truncated": "cannot be loaded", "absent": "not built"}
    assert binding.reason().startswith(expected[damage])


@needs_native
def test_many_callers_at_once() -> None:
    """Python threads that call into one pool: a second region runs on its caller's own thread."""
    q, s = int8s(64, 256, seed=1), scales(64, seed=2)
    w, ws = int8s(512, 256, seed=3), scales(512, seed=4)
    weight, want = linear.prepare(w, ws), linear.reference(q, s, w, ws)
    launch.set_threads(3)
    try:
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(lambda _: linear.linear(q, s, weight), range(120)))
    finally:
        launch.set_threads(2)
    assert all(torch.equal(y, want) for y in results)


@needs_native
def test_resizing_the_pool() -> None:
    x = floats(500, 300, seed=1)
    want = quantise.reference(x)
    for threads in (5, 1, 2, 8, 3, 2):
        launch.set_threads(threads)
        assert launch.threads() == threads
        for _ in range(5):
            assert torch.equal(quantise.quantise(x)[0], want[0])
        library = binding.native()
        assert library is not None
        assert library.self_test(library.isa) is None
    for wrong in (0, 257):
        with pytest.raises(ValueError, match="threads"):
            launch.set_threads(wrong)


@needs_native
def test_fork() -> None:
    """The child has no workers of its own; it must make new ones and neither hang nor differ.

    It compares with numpy: torch's own OpenMP threads do not survive a fork.
    """
    x = floats(800, 300, seed=2)
    want = quantise.quantise(x)[0].numpy().tobytes()
    child = os.fork()
    if child == 0:
        same = all(quantise.quantise(x)[0].numpy().tobytes() == want for _ in range(3))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert quantise.quantise(x)[0].numpy().tobytes() == want


@needs_native
def test_forcing_what_is_not_there() -> None:
    for wrong in ({"backend": "cuda"}, {"isa": "mmx"}):
        with pytest.raises(ValueError, match="expected"), launch.forced(**wrong):
            pass
    weight = linear.prepare(int8s(16, 16, seed=1), scales(16, seed=2))
    with launch.forced(backend="torch"), pytest.raises(ValueError, match="native panels"):
        linear.linear(int8s(1, 16, seed=3), scales(1, seed=4), weight)


def test_self_test_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ieee, "EXP2_DIGEST", 1)
    with pytest.raises(ieee.NumericsError) as caught:
        ieee.self_test()
    assert caught.value.code == "numerics.self_test"
