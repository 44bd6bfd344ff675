"""The settings of a request, as `Session.generate` and its asyncio twin take them: one list for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from countermark.formats.retrieval import RetrievalSet


class GenerateOptions(TypedDict, total=False):
    """Each may be left out; the node then resolves it, and its INTENT says to what.

    `messages`: (role, content) pairs, under the model's chat template; instead of a prompt. `values`: what the template
    would otherwise take from a clock or chance, such as `date_string`. `retrieved`: what was retrieved for this
    request; recorded as you state it. `logprobs`: 1 to 20, for each token's log probability and those of so many
    likeliest. `logit_bias`: by token id. `json_schema` (its text) or `regex`: what the whole answer must fit.
    """

    messages: Sequence[tuple[str, str]] | None
    model: str
    max_tokens: int | None
    stop: Sequence[str]
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    ignore_eos: bool | None
    logprobs: int | None
    values: Mapping[str, str] | None
    retrieved: RetrievalSet | None
    json_schema: str | None
    regex: str | None
