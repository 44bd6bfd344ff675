"""The artefact's root does not depend on how many threads compute it: each setting builds in a process of its own.

The build runs torch on one thread in each worker; here that is switched off too, so that torch splits its own
operations, with blocks large enough for it to do so. Nothing in the builder is a sum whose order could follow: the last
test reads its sources for one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tinymodels import write_folder, write_gguf

from countermark_appliance.engine import weights

BUILD = """
import os, sys
from contextlib import nullcontext
from pathlib import Path
cores, threads, out, *sources = sys.argv[1:]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(cores)])
import torch
from countermark_appliance.engine.weights import build
torch.set_num_threads(int(threads))
sys.modules["countermark_appliance.engine.weights.build"].single_threaded_torch = nullcontext
for source in sources:
    print(build(Path(source), Path(out) / Path(source).name).weights_root.hex())
assert torch.get_num_threads() == int(threads)
"""
SETTINGS = ((1, 1), (1, 2), (2, 1), (2, 7))  # cores the process may use, torch's threads
FILES = ("weights.img", "weights.verity", "weights.json")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Every architecture as a folder, and one GGUF; wide enough that torch splits its operations (over 32,768)."""
    path = tmp_path_factory.mktemp("sources")
    for architecture in ("llama", "qwen2", "qwen3"):
        write_folder(path / architecture, architecture, dtype=torch.bfloat16, head_dim=128, intermediate_size=448)
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    write_folder(path / "scaled", "llama", max_position_embeddings=1024, rope_parameters=rope)
    write_gguf(path / "tiny.gguf", "llama")
    return sorted(path.iterdir())


def test_roots_are_those_of_any_number_of_threads(sources: list[Path], tmp_path: Path) -> None:
    found: dict[tuple[int, int], list[str]] = {}
    for cores, threads in SETTINGS:
        out = tmp_path / f"{cores}-{threads}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}
        call = [sys.executable, "-c", BUILD, str(cores), str(threads), str(out), *map(str, sources)]
        run = subprocess.run(call, check=True, env=environment, capture_output=True, text=True)
        found[cores, threads] = run.stdout.split()
        for source in sources:
            for name in FILES:
                ours, first = (tmp_path / setting / source.name / name for setting in (out.name, "1-1"))
                assert ours.read_bytes() == first.read_bytes(), (cores, threads, source.name, name)
    assert len(set(map(tuple, found.values()))) == 1
    assert len(set(found[1, 1])) == len(sources)


SUMS = "matmul|mm|bmm|addmm|mv|dot|vdot|inner|einsum|tensordot|sum|nansum|mean|cumsum|logsumexp|norm|var|std"
SUM = re.compile(rf"\.({SUMS})\(|\blinalg\.| @ ")


def test_the_builder_has_no_sum_of_a_library() -> None:
    """Products and sums of BLAS, LAPACK, torch and numpy choose their own order."""
    assert all(SUM.search(line) for line in ("x = torch.mm(a, b)", "x.sum()", "torch.linalg.qr(a)", "y = a @ b"))
    found = [
        f"{path.name}:{number}"
        for path in sorted(Path(weights.__file__).parent.glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SUM.search(line)
    ]
    assert found == []
