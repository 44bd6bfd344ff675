"""How the grammar library is asked: llguidance (MIT), a lexer of derivatives below an Earley parser, over a token trie.

Of a vocabulary and a grammar it says which ids may come next: those whose bytes, behind what was consumed, begin some
text of the grammar's language. No floating point, no chance, no clock in it: its limits count what it does. What is
ours is fixed here and has a version, RULES, which every record of a constrained answer states beside the library's:

- an expression is Rust's regex syntax, of Unicode, for the whole answer; no look-around, no reference, no flag x
- a JSON schema is read strictly: what the library does not know is refused, and `oneOf` too where it is not `anyOf`;
  keys come in the schema's order; between two tokens of JSON up to 16 characters of white space, none before or behind
- no id is forced: where only one text can follow, the library would allow the tokens that spell it in its own way
- the limits below, and no end-of-sequence id: when the answer may end is for `grammar.py`

Shared with `grammarjudge.py`, which tries a grammar where it can do no harm. Imports no numpy: the judge is small.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence

import llguidance

LIBRARY = "llguidance"
RULES = 1
KINDS = ("json_schema", "regex")
_JSON = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}",
    "coerce_one_of": False,
    "lenient": False,
}
_ALL_TOKENS = '%llguidance {"no_forcing": true}\n'
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=100_000,
    max_grammar_size=500_000,
    precompute_large_lexemes=True,
    verbose_errors=False,
)


class Refused(ValueError):
    """A grammar that is none, or that cannot be used. `costly`: it is one, and takes too much."""

    def __init__(self, message: str, *, costly: bool = False) -> None:
        super().__init__(message)
        self.costly = costly


def version() -> str:
    """The installed library's."""
    return importlib.metadata.version(LIBRARY)


class _Vocabulary(llguidance.TokenizerWrapper):
    """What `LLTokenizer` reads. It is never asked to tokenise: that would be to force an id."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = [*tokens, b"\xffend"]  # an id beyond all others, since the library wants an end of its own
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [self.eos_token_id]
        self.is_tokenizer_wrapper = True

    def __call__(self, text: str | bytes) -> list[int]:
        raise NotImplementedError


def vocabulary(tokens: Sequence[bytes]) -> llguidance.LLTokenizer:
    """The library's trie of a vocabulary. `tokens`: of each id its bytes; an id of none is never allowed."""
    wrapper = _Vocabulary(tokens)
    return llguidance.LLTokenizer(wrapper, n_vocab=len(wrapper.tokens), eos_token=wrapper.eos_token_id)


def compiled(tokenizer: llguidance.LLTokenizer, kind: str, text: str) -> llguidance.LLMatcher:
    """A matcher before the first token. May take any time and memory. Raises `Refused`."""
    try:
        grammar = _json_schema(text) if kind == "json_schema" else _regex(text)
    except (ValueError, RecursionError) as err:
        raise Refused(_first_line(str(err))) from err
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    check(matcher)
    return matcher


def check(matcher: llguidance.LLMatcher) -> None:
    """Raises `Refused` if the matcher has failed."""
    if matcher.is_error():
        reason = matcher.stop_reason()
        if reason.startswith("NoExtension"):
            raise Refused("there is no text that fits it")
        raise Refused(_first_line(matcher.get_error()), costly=reason in ("LexerTooComplex", "ParserTooComplex"))


def _json_schema(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("expected a JSON object")
    if "x-guidance" in schema:
        raise ValueError("x-guidance: expected no settings of the library's in a schema")
    named = {"name": "json", "json_schema": schema | {"x-guidance": _JSON}}
    start = {"name": "start", "lark_grammar": _ALL_TOKENS + "start: @json"}
    return json.dumps({"grammars": [start, named]})


def _regex(text: str) -> str:
    """The library reads an expression through another syntax, in which these two would mean something else."""
    at, inside = 0, False
    while at < len(text):
        if text[at] == "\\":
            at += 1
            if at == len(text):
                raise ValueError("expected something behind the last backslash")
        elif inside:
            inside = text[at] != "]"
        elif text[at] == "[":
            inside = True
            at += text[at + 1 : at + 2] == "^"
            at += text[at + 1 : at + 2] == "]"
        elif text.startswith("(?", at):
            end = at + 2
            while text[end : end + 1].isalpha() or text[end : end + 1] == "-":
                end += 1
            if text[end : end + 1] in (":", ")") and "x" in text[at + 2 : end]:
                raise ValueError("expected no flag x")
        at += 1
    read = json.loads(llguidance.LLMatcher.grammar_from_regex(text))
    (grammar,) = read["grammars"]
    grammar["lark_grammar"] = _ALL_TOKENS + grammar["lark_grammar"]
    return json.dumps(read)


def _first_line(text: str) -> str:
    line = text.partition("\n")[0][:200]
    return "too large or not a grammar" if not line or line.startswith("panic") else line
