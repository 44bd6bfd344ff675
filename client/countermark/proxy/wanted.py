"""OpenAI's request bodies to what a session is asked: chat completions and completions, strictly.

A parameter is passed on, or is known to change no answer (`NEUTRAL`), or is refused by its name. None is dropped: what
this version does not know may matter. null is what absence is. What is absent has the node's default, which is recorded
and greedy (OpenAI's own default temperature is 1). docs/proxy.md lists all of it.

Source: OpenAI API reference, "Create chat completion" and "Create completion", as of openai-python 2 and 3; `top_k`,
`min_p`, `repetition_penalty`, `ignore_eos`, `structured_outputs` and `chat_template_kwargs` as vLLM names them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from countermark.errors import FormatError, RequestError
from countermark.formats import strict_json
from countermark.wire import codec

MAX_TOP: Final = 20
ANY_MODEL: Final = "countermark"
"""The model name that means: whichever the node serves."""
_SAMPLING: Final = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    "seed",
)
_WHOLE: Final = ("top_k", "seed")
_TOOLS: Final = ("tools", "functions", "function_call")
_GRAMMAR: Final = "json_schema" in inspect.signature(codec.encode_generate_request).parameters


def _anything(_: object) -> bool:
    return True


def _is(*values: object) -> Callable[[object], bool]:
    return lambda value: any(value == one and type(value) is type(one) for one in values)


NEUTRAL: Final[Mapping[str, Callable[[object], bool]]] = {
    "user": _anything,
    "safety_identifier": _anything,
    "prompt_cache_key": _anything,
    "metadata": _anything,
    "store": _is(False),
    "service_tier": _is("auto", "default"),
    "n": _is(1),
    "best_of": _is(1),
    "echo": _is(False),
    "suffix": _is(""),
    "modalities": lambda value: value == ["text"],
    "parallel_tool_calls": _is(True, False),
    "tool_choice": _is("none", "auto"),
    "tools": lambda value: value == [],
    "functions": lambda value: value == [],
    "function_call": _is("none", "auto"),
}
"""What changes no answer here, and with which values; with others it is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A request body as understood. `settings`: the arguments of `Session.generate`, prompt included.

    `top`: how many likely tokens to show beside each; None: no log probabilities. `usage`: a stream ends with counts.
    """

    chat: bool
    model: str
    stream: bool
    usage: bool
    top: int | None
    settings: Mapping[str, Any] = field(repr=False)


def parse_wanted(data: bytes, *, chat: bool, max_bytes: int) -> Wanted:
    """Read a request body.

    Raises `RequestError`: `proxy.json` (no JSON object), `proxy.unsupported` (a parameter, or a value of one, that
    nothing here can honour), `proxy.parameter` (a value of the wrong form); `param` names it.
    """
    try:
        value = strict_json.load(data, "body", max_bytes=max_bytes)
    except FormatError as err:
        raise RequestError(str(err), code="proxy.json") from err
    if not isinstance(value, dict):
        raise RequestError("body: expected a JSON object", code="proxy.json")
    given = _Given(value)
    given.refuse_tools()
    model = given.take("model", str) or ""
    stream = given.take("stream", bool) or False
    settings: dict[str, Any] = {"model": "" if model == ANY_MODEL else model}
    settings |= _input(given, chat)
    for name in _SAMPLING:
        settings[name] = given.take(name, int) if name in _WHOLE else given.take_number(name)
    settings["max_tokens"] = _max_tokens(given, chat)
    settings["stop"] = _stop(given)
    settings["ignore_eos"] = given.take("ignore_eos", bool)
    settings["logit_bias"] = _bias(given)
    top = _top(given, chat)
    settings["logprobs"] = None if top is None else max(1, top)
    settings |= _grammar(given)
    usage = _usage(given, stream)
    given.refuse_rest()
    return Wanted(chat=chat, model=model, stream=stream, usage=usage, top=top, settings=settings)


class _Given:
    """The members of an object, each taken once; what is left is refused."""

    def __init__(self, value: dict[str, Any], where: str = "") -> None:
        self._value = {name: item for name, item in value.items() if item is not None}
        self._where = where

    def take(self, name: str, kind: type, what: str = "") -> Any:
        """The value, or None. Raises `RequestError` (`proxy.parameter`)."""
        value = self._value.pop(name, None)
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        words = {str: "text", bool: "true or false", int: "a whole number", list: "a list", dict: "an object"}
        raise wrong(self._where + name, what or words[kind])

    def take_number(self, name: str) -> float | None:
        value = self._value.pop(name, None)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise wrong(self._where + name, "a number")

    def refuse_tools(self) -> None:
        for name in _TOOLS:
            if name in self._value and not NEUTRAL[name](self._value[name]):
                raise unsupported(self._where + name, "the engine has no tools")

    def refuse_rest(self) -> None:
        for name, value in self._value.items():
            if name not in NEUTRAL:
                raise unsupported(self._where + name)
            if not NEUTRAL[name](value):
                raise unsupported(self._where + name, "this value would change the answer, and cannot be honoured")

    def refuse_other(self) -> None:
        """Every member that is left, but for empty lists, which assistants' messages carry about."""
        for name, value in self._value.items():
            if value != []:
                raise unsupported(self._where + name)


def unsupported(param: str, why: str = "not supported here, and nothing is left out unsaid") -> RequestError:
    return _error(f"{param:.100}: {why}", param, "proxy.unsupported")


def wrong(param: str, what: str) -> RequestError:
    return _error(f"{param:.100}: expected {what}", param, "proxy.parameter")


def param_of(err: BaseException) -> str | None:
    """The parameter that an error is about, as OpenAI's errors name it."""
    found = getattr(err, "param", None)
    return found if isinstance(found, str) else None


def _error(message: str, param: str, code: str) -> RequestError:
    err = RequestError(message, code=code)
    err.param = param[:100]  # type: ignore[attr-defined]
    return err


def _input(given: _Given, chat: bool) -> dict[str, Any]:
    if not chat:
        prompt = given._value.pop("prompt", None)
        if isinstance(prompt, list) and len(prompt) == 1:
            (prompt,) = prompt
        if isinstance(prompt, list):
            raise unsupported("prompt", "one text is expected: token ids and several prompts are not supported")
        if not isinstance(prompt, str):
            raise wrong("prompt", "text")
        return {"prompt": prompt}
    values = given.take("chat_template_kwargs", dict)
    for name, value in (values or {}).items():
        if not isinstance(value, str):
            raise wrong(f"chat_template_kwargs.{name}", "text")
    messages = given.take("messages", list)
    if messages is None:
        raise wrong("messages", "a list")
    return {"messages": [_message(one, f"messages[{i}]") for i, one in enumerate(messages)], "values": values}


def _message(value: object, where: str) -> tuple[str, str]:
    """Role and content. OpenAI's role developer is its newer name of system."""
    if not isinstance(value, dict):
        raise wrong(where, "an object")
    given = _Given(value, f"{where}.")
    role = given.take("role", str)
    content = given._value.pop("content", None)
    if role in ("tool", "function"):
        raise unsupported(f"{where}.role", "the engine has no tools")
    given.refuse_other()
    if isinstance(content, list):
        if len(content) != 1 or not isinstance(content[0], dict):
            raise unsupported(
                f"{where}.content", "one part of text is expected: how others are joined is nobody's rule"
            )
        part = _Given(content[0], f"{where}.content[0].")
        if part.take("type", str) != "text":
            raise unsupported(f"{where}.content[0].type", "the engine reads text alone")
        content = part.take("text", str)
        part.refuse_other()
    if not isinstance(content, str):
        raise wrong(f"{where}.content", "text")
    return ("system" if role == "developer" else role or "", content)


def _max_tokens(given: _Given, chat: bool) -> int | None:
    older: int | None = given.take("max_tokens", int)
    newer: int | None = given.take("max_completion_tokens", int) if chat else None
    if older is not None and newer is not None and older != newer:
        raise wrong("max_completion_tokens", "the value of max_tokens, or one of them alone")
    return older if newer is None else newer


def _stop(given: _Given) -> tuple[str, ...]:
    stop = given._value.pop("stop", None)
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise wrong("stop", "text, or a list of texts")
    return tuple(stops)


def _bias(given: _Given) -> dict[int, float] | None:
    found: dict[int, float] = {}
    for token, bias in (given.take("logit_bias", dict) or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) < 11):
            raise wrong("logit_bias", "token ids as names")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise wrong("logit_bias", "numbers as values")
        if int(token) in found:  # "1" and "01": one of them would be left out
            raise wrong("logit_bias", "each token once")
        found[int(token)] = bias
    return found or None


def _top(given: _Given, chat: bool) -> int | None:
    """How many of the likeliest tokens to show; None: no log probabilities."""
    if chat:
        asked, top = given.take("logprobs", bool), given.take("top_logprobs", int)
        if top is not None and not asked:
            raise wrong("top_logprobs", "logprobs: true beside it")
        found = (top or 0) if asked else None
    else:
        found = given.take("logprobs", int)
    if found is not None and not 0 <= found <= MAX_TOP:
        raise wrong("top_logprobs" if chat else "logprobs", f"0 to {MAX_TOP}")
    return found


def _usage(given: _Given, stream: bool) -> bool:
    options = given.take("stream_options", dict)
    if options is None:
        return False
    if not stream:
        raise wrong("stream_options", "stream: true beside it")
    inner = _Given(options, "stream_options.")
    usage = inner.take("include_usage", bool) or False
    if inner.take("include_obfuscation", bool):
        raise unsupported("stream_options.include_obfuscation")
    inner.refuse_other()
    return usage


def _grammar(given: _Given) -> dict[str, str]:
    """`response_format`, or vLLM's `structured_outputs`: json or regex. The engine then draws nothing else."""
    form, other = given.take("response_format", dict), given.take("structured_outputs", dict)
    found: dict[str, str] = {}
    param = "response_format"
    if form is not None:
        inner = _Given(form, "response_format.")
        kind = inner.take("type", str)
        if kind == "json_object":
            found["json_schema"] = '{"type":"object"}'
        elif kind == "json_schema":
            schema = inner.take("json_schema", dict)
            if schema is None or not isinstance(schema.get("schema"), dict):
                raise wrong("response_format.json_schema.schema", "an object")
            rest = _Given(schema, "response_format.json_schema.")
            found["json_schema"] = json.dumps(rest.take("schema", dict))
            rest.take("name", str)
            rest.take("description", str)  # labels: the model is shown neither these nor the schema
            rest.take("strict", bool)  # it is never less
            rest.refuse_other()
        elif kind != "text":
            raise unsupported("response_format.type")
        inner.refuse_other()
    if other is not None:
        param = "structured_outputs"
        inner = _Given(other, "structured_outputs.")
        schema, regex = inner.take("json", dict), inner.take("regex", str)
        inner.refuse_other()
        found |= {"json_schema": json.dumps(schema)} if schema is not None else {}
        found |= {"regex": regex} if regex is not None else {}
    if (form is not None and other is not None) or len(found) > 1:
        raise wrong("structured_outputs", "one form of output alone")
    if found and not _GRAMMAR:
        raise unsupported(param, "the engine cannot hold an answer to a form")
    return found
