"""What the exact profile costs in quality: SmolLM2-135M against the same file in fp32, over public-domain prose.

    python bench/quality.py [--tokens 8192] [--weights DIR]

The fp32 model is transformers' own reading of the GGUF file (de-quantised); ours is the artefact built from that file.
Over windows of 1,024 tokens: perplexity of both, KL(fp32 || ours) in nats and top-1 agreement, each a mean over all
positions. Writes bench/results/quality-cpu.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchlib import HERE, built_weights, machine, reference_model, say
from countermark_appliance.engine import weights
from countermark_appliance.engine.model import Chunk, Model
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_kernels import PROFILE, kernel_digest, launch

WINDOW = 1024
ROWS = 128  # logits in double precision held at a time
PROSE = HERE / "data" / "prose.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    tokens: int
    perplexity_fp32: float
    perplexity_ours: float
    perplexity_percent: float
    kl: float
    top1: float


def measure(reference: Any, model: Model, tokens: list[int], *, window: int = WINDOW) -> Quality:
    """Compare next-token distributions over consecutive windows of `tokens`; a last partial window is left out."""
    count = scored = 0
    kl = agree = nll_reference = nll_ours = 0.0
    for start in range(0, len(tokens) - window + 1, window):
        ids = tokens[start : start + window]
        with torch.no_grad():
            theirs = reference(torch.tensor([ids])).logits[0]
        ours = model.forward([Chunk(cache=model.new_cache(), start=0, tokens=ids, logits=window)])
        for first in range(0, window, ROWS):
            p = theirs[first : first + ROWS].double().log_softmax(-1)
            q = ours[first : first + ROWS].double().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            agree += float((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
            following = torch.tensor(ids[first + 1 : first + ROWS + 1])
            rows = torch.arange(len(following))
            nll_reference -= float(p[rows, following].sum())
            nll_ours -= float(q[rows, following].sum())
            scored += len(following)
        say(f"{count:6d} tokens  KL {kl / count:.5f}  top-1 {agree / count:.4f}")
    perplexity = math.exp(nll_reference / scored), math.exp(nll_ours / scored)
    return Quality(
        tokens=count,
        perplexity_fp32=perplexity[0],
        perplexity_ours=perplexity[1],
        perplexity_percent=100 * (perplexity[1] / perplexity[0] - 1),
        kl=kl / count,
        top1=agree / count,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    launch.set_threads(torch.get_num_threads())
    launch.self_test()
    artefact = weights.load(args.weights or built_weights())
    text = PROSE.read_bytes()
    tokens = Tokenizer(artefact.tokenizer_json, vocab=artefact.config.vocab).encode(text.decode())[: args.tokens]
    quality = measure(reference_model(), Model(artefact), tokens)
    print(
        f"perplexity {quality.perplexity_fp32:.3f} fp32, {quality.perplexity_ours:.3f} {PROFILE} "
        f"({quality.perplexity_percent:+.2f} %)   KL {quality.kl:.4f}   top-1 {quality.top1:.4f}"
    )
    result = {
        "model": artefact.config.name,
        "profile": PROFILE,
        "kernel_digest": kernel_digest().hex(),
        "weights_root": artefact.weights_root.hex(),
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "window": WINDOW,
        **asdict(quality),
        "machine": machine(),
    }
    out = HERE / "results" / "quality-cpu.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
