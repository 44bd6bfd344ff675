"""Chat messages to token ids through the artefact's own Jinja template.

Determinism: the template sees the messages, the special tokens' names, the request's own values and nothing else. No
clock, no randomness, no globals beyond `range`, `dict`, `namespace` and `raise_exception`. A template that reaches for
what varies (`strftime_now`, `lipsum`) is refused for that request, unless the request supplies it: under the name
itself, then every call returns that text, or under a name the template looks at first, such as `date_string` in
Llama 3's. Only plain values may be printed, because a function's text holds a memory address.
Environment: jinja2 `ImmutableSandboxedEnvironment` with trim_blocks and lstrip_blocks, as templates are written for.

No smuggling: a message that contains the text of a special token, such as `<|im_start|>`, must not produce that token.
Before rendering, every such text in a role or content gets a *mark* behind its first character: one private-use
character that occurs nowhere in template or messages. After rendering, what still reads as a special token was written
by the template and becomes the token; everything else is encoded as ordinary text with the marks removed. The template
may trim, split or reorder contents meanwhile. What the model sees is the user's exact text, spelled in ordinary tokens.
Tokens that the tokenizer adds without calling them special (`<think>` in Qwen3) are ordinary vocabulary to everyone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from countermark.errors import FormatError, RequestError
from countermark_appliance.engine.request import Message
from countermark_appliance.engine.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
MAX_MESSAGES = 1024
_NAMES_OF_CHANCE = frozenset({"strftime_now", "now", "datetime", "date", "time", "random", "uuid", "uuid4", "lipsum"})
_MARKS = range(0xF0000, 0xF0000 + 4096)  # supplementary private use area A

_TEMPLATE_FAILURES = (
    *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError),
    *(LookupError, AttributeError, RecursionError, MemoryError),
)


class _Refused(jinja2.TemplateError):
    """`raise_exception` in a template."""


class _Varies(jinja2.TemplateError):
    """The template reached for a clock or chance."""


class _Chance:
    """Stands for what varies: defined, and refused as soon as it is used."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: object, **__: object) -> object:
        raise _Varies(self.name)

    def __getattr__(self, _: str) -> object:
        raise _Varies(self.name)

    def __repr__(self) -> str:  # which `~` and many filters ask for; an object's own holds its address
        raise _Varies(self.name)


class _Given(str):
    """A value that the request supplied; also what a call of it returns, whatever its arguments."""

    __slots__ = ()

    def __call__(self, *_: object, **__: object) -> str:
        return str(self)


class ChatTemplate:
    """One compiled template. Thread-safe: nothing changes after construction."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, special_names: dict[str, str]) -> None:
        """`special_names`: what the template may call special tokens, such as bos_token -> its text.

        Raises `FormatError` (`chat.template`) when it does not compile.
        """
        self._source = source
        self._tokenizer = tokenizer
        self._names = dict(special_names)
        environment = _environment()
        try:
            tree = environment.parse(source)
            wanted = meta.find_undeclared_variables(tree)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as err:
            raise FormatError(f"chat_template: {err!s:.200}", code="chat.template") from err
        self._reads = wanted - {"messages", "add_generation_prompt", *self._names, *environment.globals}
        self._chance = {name: _Chance(name) for name in self._reads & _NAMES_OF_CHANCE}

    def render(self, messages: Sequence[Message], values: Mapping[str, str]) -> tuple[str, str]:
        """The rendered text and the mark in it. `values`: what the template may read beside the messages.

        Raises `RequestError`: `request.messages`, `request.template`, `request.values` (one that the template does not
        read, or none for what would vary).
        """
        _check(messages)
        if unread := values.keys() - self._reads:
            message = f"values: expected some of {sorted(self._reads)}, which the chat template reads"
            raise RequestError(f"{message}, got {sorted(unread)!r:.200}", code="request.values")
        mark = self._mark([*(m.content for m in messages), *values.values()])
        given = {name: _Given(self._tokenizer.mark_special(text, mark)) for name, text in values.items()}
        turns = [{"role": m.role, "content": self._tokenizer.mark_special(m.content, mark)} for m in messages]
        try:
            text = self._template.render(
                messages=turns, add_generation_prompt=True, **{**self._names, **self._chance, **given}
            )
        except _Varies as err:
            message = (
                f"values: expected some of {sorted(self._reads)}, because the chat template asks for {err.message}"
            )
            raise RequestError(f"{message}, which varies", code="request.values") from err
        except _Refused as err:  # the template's own words, such as "roles must alternate"
            raise RequestError(f"messages: {err!s:.200}", code="request.template") from err
        except _TEMPLATE_FAILURES as err:  # whose text may quote a message, which must not reach a log
            raise RequestError(
                f"messages: the chat template fails: {type(err).__name__}", code="request.template"
            ) from err
        return text, mark

    def encode(self, messages: Sequence[Message], values: Mapping[str, str] | None = None) -> list[int]:
        """Messages, with the opening of the assistant's turn, to token ids. Raises as `render`."""
        text, mark = self.render(messages, values or {})
        return self._tokenizer.encode_marked(text, mark)

    def _mark(self, texts: Sequence[str]) -> str:
        used = set(self._source).union(*texts)
        for code in _MARKS:
            if chr(code) not in used:
                return chr(code)
        raise RequestError("messages: expected ordinary text", code="request.messages")


def _check(messages: Sequence[Message]) -> None:
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages: expected 1 to {MAX_MESSAGES}, got {len(messages)}", code="request.messages")
    for message in messages:
        if message.role not in ROLES:
            raise RequestError(f"role: expected one of {ROLES}, got {message.role!r:.40}", code="request.role")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, autoescape=False, finalize=_plain, extensions=["jinja2.ext.loopcontrols"]
    )
    keep = {name: environment.globals[name] for name in ("range", "dict", "namespace")}
    environment.globals.clear()
    environment.globals.update(keep, raise_exception=_raise)
    del environment.filters["random"]
    environment.filters["tojson"] = _tojson
    return environment


def _plain(value: object) -> object:
    if isinstance(value, _Chance):
        raise _Varies(value.name)
    if value is None or isinstance(value, str | int | float | jinja2.Undefined):
        return value
    raise TypeError(f"prints a {type(value).__name__}")


def _raise(message: str) -> None:
    raise _Refused(message)


def _tojson(value: object, indent: int | None = None) -> str:
    """As Hugging Face templates expect it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
