"""Fixtures that several folders share."""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter. Triton asks when it is first imported, by whomever.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SmolLM2-135M artefact, built once for each state of the builder's sources and kept under build/."""
    from countermark_appliance.engine import weights
    from countermark_kernels import PROFILE

    digest = hashlib.sha256(PROFILE.encode())
    for path in sorted(Path(weights.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    cache = ROOT / "build" / "weights-cache"
    cache.mkdir(parents=True, exist_ok=True)
    wanted = cache / digest.hexdigest()[:16]
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.exists():
            for old in cache.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            partial = cache / "partial"
            weights.build(weights.stand_in_gguf(), partial)
            partial.rename(wanted)
    return wanted
