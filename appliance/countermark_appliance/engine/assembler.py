"""From the input a client gave to the exact token ids the model is given: the input of record.

A function of the artefact alone (tokenizer, chat template, its start-of-text rule), so a replay assembles a recorded
input again and must get the recorded ids. Thread-safe: nothing changes after construction.
"""

from __future__ import annotations

from collections.abc import Mapping

from countermark.errors import RequestError
from countermark_appliance.engine.chat import ChatTemplate
from countermark_appliance.engine.request import Message
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_appliance.engine.weights import Artefact


class Assembler:
    """Assembles prompts for one artefact."""

    def __init__(self, artefact: Artefact, tokenizer: Tokenizer) -> None:
        """Raises `FormatError` (`chat.*`)."""
        config = artefact.config
        self._context = config.context
        self._first = [config.bos_id] if config.add_bos and config.bos_id is not None else []
        self._tokenizer = tokenizer
        self._template = ChatTemplate(
            artefact.chat_template, tokenizer, special_names=_special_names(artefact, tokenizer)
        )

    def tokens(
        self, *, prompt: str | None, messages: tuple[Message, ...] | None, values: Mapping[str, str] | None = None
    ) -> list[int]:
        """The ids, fewer than the context. Raises `RequestError` with code `request.<field>`."""
        if (prompt is None) == (messages is None):
            raise RequestError("input: expected either messages or a prompt", code="request.input")
        texts = (prompt,) if prompt is not None else tuple(m.content for m in messages or ())
        if not texts or not texts[-1]:
            raise RequestError("prompt: expected text, got none", code="request.prompt_empty")
        if prompt is not None and values:
            raise RequestError("values: expected messages, whose template reads them", code="request.values")
        if not self._tokenizer.fits("".join(texts), self._context):
            raise self._too_long(f"{sum(map(len, texts))} characters")
        if messages is not None:
            tokens = self._template.encode(messages, values or {})
        else:
            tokens = self._first + self._tokenizer.encode(prompt or "")
        if len(tokens) >= self._context:
            raise self._too_long(str(len(tokens)))
        return tokens

    def _too_long(self, got: str) -> RequestError:
        message = f"prompt: expected fewer than {self._context} tokens, got {got}"
        return RequestError(message, code="request.prompt_too_long")


def _special_names(artefact: Artefact, tokenizer: Tokenizer) -> dict[str, str]:
    """What the template may call the model's own special tokens."""
    by_id = {number: text for text, number in tokenizer.special.items()}
    config = artefact.config
    ids = {"bos_token": config.bos_id, "eos_token": next(iter(config.eos_ids), None)}
    return {name: by_id[number] for name, number in ids.items() if number is not None and number in by_id}
