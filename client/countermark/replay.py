"""Run a verified answer again and say whether it came out the same.

The client has no engine: whoever can execute a numerics profile registers a loader under the entry-point group
`countermark.runners` (name: the profile id; value: `load_runner(weights_dir: Path) -> Runner`). `Runner` uses plain
types only, so an engine satisfies it without importing this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Runner(Protocol):
    """Something that executes one profile with one set of weights.

    `sampling` has exactly the fields of `formats.records.Sampling`: temperature, repetition_penalty, presence_penalty,
    frequency_penalty: float; top_k, top_p_20bit, min_p_20bit, seed: int; logit_bias: tuple of (token id, float) by
    ascending id; seed_origin: str. `stop` holds the stop strings.
    """

    @property
    def profile(self) -> str:
        """The numerics profile id, such as `exact-v0`."""

    @property
    def weights_root(self) -> bytes:
        """The 32-byte dm-verity root of the weights loaded."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What this machine is: `kernel_digest` (hex), `engine`, `torch`, `cpu`, `backend`, `gpus`; `image_id` (hex)
        only where the code runs inside a measured image."""

    def audit(
        self,
        prompt_tokens: tuple[int, ...],
        output_tokens: tuple[int, ...],
        fingerprints: tuple[bytes, ...],
        sampling: Mapping[str, object],
    ) -> Mapping[str, object] | None:
        """One teacher-forced pass. None when every sampled token and every fingerprint is as recorded.

        Else the first difference: `position` (index into the output), `recorded_token`, `local_token`: int,
        `fingerprint_equal`: bool, `logit_gap`: float (local logit of the local token minus that of the recorded one).
        """

    def regenerate(
        self,
        prompt_tokens: tuple[int, ...],
        max_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        sampling: Mapping[str, object],
    ) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
        """Generate again from the prompt: token ids and one 16-byte fingerprint for each."""
