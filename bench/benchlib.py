"""What the benchmarks share: the artefact, built once, and the machine they ran on."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from countermark_appliance.engine import weights
from countermark_appliance.engine.engine import cpu_model
from countermark_kernels import launch

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "build" / "weights-cache"


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def built_weights() -> Path:
    """The stand-in model's artefact, built on first use; named by the digest of everything it is made from."""
    source = weights.stand_in_gguf()
    digest = hashlib.sha256(source.read_bytes())
    for path in sorted(Path(weights.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    target = CACHE / digest.hexdigest()[:16]
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=CACHE))
    weights.build(source, made)
    try:
        made.rename(target)
    except OSError:  # somebody else was first
        shutil.rmtree(made)
    return target


def reference_model(dtype: torch.dtype = torch.float32) -> Any:
    """The same GGUF file as transformers reads it (de-quantised), in `dtype`.

    By its parts, because `from_pretrained(gguf_file=...)` insists on a package we do not use.
    """
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    load_gguf_checkpoint: Any = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    path = str(weights.stand_in_gguf())
    config = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"])
    model: Any = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.to(dtype).eval()


def machine() -> dict[str, str | int]:
    """What the figures were taken on."""
    return {
        "cpu": cpu_model(),
        "flags": " ".join(
            f for f in _flags() if f in ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8")
        ),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "backend": launch.backend(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _flags() -> list[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line.partition(":")[2].split()
    return []
