"""Masks against what is not ours: brute force by `re`, validation by `jsonschema`, the sampler over allowed ids alone.

Also what a grammar may not do: take long, change a neighbour, change a bit of an answer that has none.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
import time
from collections.abc import Iterator
from dataclasses import replace

import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
import torch
from driver import run, some_prompt, some_request, start
from hypothesis import HealthCheck, example, given, settings
from tinymodel import TinyArtefact

from countermark.errors import RequestError
from countermark_appliance.engine import grammarlib
from countermark_appliance.engine.draw import draw
from countermark_appliance.engine.engine import Engine
from countermark_appliance.engine.grammar import Grammar, GrammarError, Grammars, Mask, Walk, allows, unpacked
from countermark_appliance.engine.replay import ExactRunner
from countermark_appliance.engine.request import DoneEvent, Finish, Request
from countermark_appliance.engine.step import Row
from countermark_appliance.engine.tokenizer import Tokenizer
from countermark_kernels import sampler
from countermark_kernels.ieee import NumericsError, f32
from countermark_kernels.sampler import History, SamplerParams

ARTEFACT = TinyArtefact("qwen3")
VOCAB = ARTEFACT.config.vocab
TOKENIZER = Tokenizer(ARTEFACT.tokenizer_json, vocab=VOCAB)
TOKENS = [TOKENIZER.token_bytes(token) for token in range(VOCAB)]
END = 2

LETTERS = "abc"
WORDS = ["", "a", "b", "c", "ab", "ba", "bc", "ca", "aa", "abc", "cab", "bbb", "", "a", "acab"]
SMALL = [word.encode() for word in WORDS]
SMALL_END = 0
LONGEST = 9
TEXTS = ["".join(letters) for n in range(LONGEST + 1) for letters in itertools.product(LETTERS, repeat=n)]


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = Grammars(TOKENS, (END,))
    yield made
    made.close()


@pytest.fixture(scope="module")
def small() -> Iterator[Grammars]:
    made = Grammars(SMALL, (SMALL_END,))
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(ARTEFACT, threads=2)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def runner() -> ExactRunner:
    return ExactRunner(ARTEFACT)  # type: ignore[arg-type]


def ids(mask: Mask, vocab: int = VOCAB) -> list[int]:
    return [int(i) for i in np.nonzero(unpacked(mask, vocab))[0]]


# Masks against brute force.


def expressions() -> st.SearchStrategy[str]:
    """Expressions over three letters in the syntax that Rust and Python share."""
    leaves = st.sampled_from(["a", "b", "c", "[ab]", "[^a]", ".", "ab", "bc?"])

    def bigger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "*?"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        )

    return st.recursive(leaves, bigger, max_leaves=4)


@functools.cache
def language(expression: str) -> tuple[frozenset[str], frozenset[str]]:
    """All texts of up to LONGEST letters that match, and all beginnings of those."""
    found = re.compile(expression)
    whole = frozenset(text for text in TEXTS if found.fullmatch(text))
    return whole, frozenset(text[:n] for text in whole for n in range(len(text) + 1))


@given(expressions(), st.integers(0, 1 << 30))
@example("(?:a|ab)(?:c|bcd)?", 1)
@example("(?:(?:ab){0,2}){2}c*?", 2)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mask_is_what_has_a_completion(small: Grammars, expression: str, seed: int) -> None:
    """By trying every continuation with `re`. The least completion of these expressions has at most five letters."""
    whole, begun = language(expression)
    rng = random.Random(seed)
    try:
        walk = small.compile("regex", expression).walk()
    except RequestError as err:
        assert err.code == "request.grammar"
        assert not whole
        return
    text = ""
    while len(text) <= LONGEST - 5 - max(map(len, WORDS)):
        expected = [i for i, word in enumerate(WORDS) if word and text + word in begun]
        assert ids(walk.mask, len(WORDS)) == ([SMALL_END] if text in whole else []) + expected
        if not expected:
            return
        token = rng.choice(expected)
        walk.step(token)
        text += WORDS[token]


@pytest.mark.parametrize(
    "expression",
    [
        "[0-9]{4}-[0-9]{2}-[0-9]{2}",
        "(?i)yes|no",
        "é{2,3}|日本?語",
        r"[^\x00-\x7f]",
        r"[a-z0-9]+@[a-z]+\.(com|org)",
        r"a/b\\c\"\t\n",
        r"[]a]+|[^]\x00-\x20]",
        r"(?s:.){3}",
        "",
        "x??y",
    ],
)
def test_byte_by_byte_as_python_reads_it(grammars: Grammars, expression: str) -> None:
    """Random walks over the real kind of vocabulary; what they spell matches, and other texts do not fit.

    Not with `\\d` or `\\w`, whose characters differ between versions of Unicode.
    """
    found = re.compile(expression)
    compiled = grammars.compile("regex", expression)
    for seed in range(12):
        text = spelled(compiled, random.Random(seed))
        if text is not None:
            assert found.fullmatch(text), text
    for text in (
        "2026-11-22",
        "YES",
        "nO",
        "éé",
        "日語",
        "ß",
        "a1@b.org",
        'a/b\\c"\t\n',
        "]",
        "~",
        "€€€",
        "",
        "y",
        "xy",
    ):
        assert fits(compiled, text) == bool(found.fullmatch(text)), text


def spelled(grammar: Grammar, rng: random.Random, most: int = 200) -> str | None:
    """What a random walk spells, ending where it may; None if it did not end."""
    walk, text = grammar.walk(), b""
    for _ in range(most):
        allowed = ids(walk.mask)
        if END in allowed and (len(allowed) == 1 or rng.random() < 0.3):
            return text.decode()
        token = rng.choice([i for i in allowed if i != END])
        walk.step(token)
        text += TOKENS[token]
    return None


def fits(grammar: Grammar, text: str) -> bool:
    """Whether the text is one of the grammar, byte by byte."""
    single = {data: token for token, data in enumerate(TOKENS) if len(data) == 1}
    walk = grammar.walk()
    for byte in text.encode():
        token = single[bytes([byte])]
        if not allows(walk.mask, token):
            return False
        try:
            walk.step(token)
        except GrammarError:
            return False
    return allows(walk.mask, END)


# JSON schemas.

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["x", "y", "long one"]}, "maxItems": 2},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}},
}
SCHEMAS: list[dict[str, object]] = [
    PERSON,
    {"type": "boolean"},
    {"const": {"a": [1, None, "é\n"]}},
    {"enum": [1, "one", None, [True]]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "items": False, "minItems": 2},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
    {"type": "string", "format": "date"},
    {"type": "number", "minimum": -1, "maximum": 1},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 99},
    {"allOf": [{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}], "properties": {"b": True}},
    {"type": ["string", "null"], "maxLength": 3},
]


def valid(text: str, schema: object) -> None:
    value = json.loads(text)
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_what_walks_spell_is_valid(grammars: Grammars, schema: dict[str, object]) -> None:
    compiled, ended = grammars.compile("json_schema", json.dumps(schema)), 0
    for seed in range(25):
        text = spelled(compiled, random.Random(seed))
        if text is not None:
            valid(text, schema)
            ended += 1
    assert ended


def schemas() -> st.SearchStrategy[dict[str, object]]:
    """Schemas of the kinds that the library knows, whose values end soon."""
    names = st.sampled_from(["a", "b", "name", "é", "a b", 'q"'])
    scalars: st.SearchStrategy[object] = st.one_of(
        st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.text(max_size=4)
    )
    small = st.integers(0, 3)
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 60))
    leaves: st.SearchStrategy[dict[str, object]] = st.one_of(
        st.just({"type": "null"}),
        st.just({"type": "boolean"}),
        scalars.map(lambda value: {"const": value}),
        st.lists(scalars, min_size=1, max_size=3).map(lambda values: {"enum": values}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}),
        st.tuples(small, small).map(lambda b: {"type": "string", "minLength": b[0], "maxLength": sum(b)}),
        st.sampled_from(["^[a-f]{2}$", "^(x|yz)+$", "é?z"]).map(
            lambda p: {"type": "string", "pattern": p, "maxLength": 6}
        ),
    )

    def bigger(inner: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[dict[str, object]]:
        items = st.tuples(inner, small, small).map(
            lambda b: {"type": "array", "items": b[0], "minItems": b[1], "maxItems": b[1] + b[2]}
        )
        objects = st.tuples(st.dictionaries(names, inner, max_size=3), st.randoms(use_true_random=False)).map(
            lambda b: {
                "type": "object",
                "properties": b[0],
                "required": [name for name in b[0] if b[1].random() < 0.6],
                "additionalProperties": False,
            }
        )
        return st.one_of(items, objects, st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}))

    return st.recursive(leaves, bigger, max_leaves=5)


@given(schemas(), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_walks_spell_is_valid_for_any_schema(grammars: Grammars, schema: dict[str, object], seed: int) -> None:
    try:
        compiled = grammars.compile("json_schema", json.dumps(schema))
    except RequestError as err:  # refused by name is right where it does not know, or where nothing fits
        assert err.code == "request.grammar"
        return
    for i in range(3):
        text = spelled(compiled, random.Random(seed + i))
        if text is not None:
            valid(text, schema)


@pytest.mark.parametrize(
    ("kind", "text", "code"),
    [
        ("json_schema", "", "request.grammar"),
        ("json_schema", "true", "request.grammar"),
        ("json_schema", '{"type": "nothing"}', "request.grammar"),
        ("json_schema", '{"type": "string", "format": "colour"}', "request.grammar"),
        ("json_schema", '{"unevaluatedProperties": false}', "request.grammar"),
        ("json_schema", '{"oneOf": [{"type": "string"}, {"minLength": 3}]}', "request.grammar"),
        ("json_schema", '{"$ref": "https://example.com/schema"}', "request.grammar"),
        ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 2}', "request.grammar"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "type": "object", "minContains": 4}', "request.grammar"),
        ("json_schema", '{"enum": ["\\ud800"]}', "request.grammar"),
        ("json_schema", "[" * 60_000, "request.grammar"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "request.grammar"),
        ("json_schema", '{"type": "integer", "multipleOf": 1000003}', "request.grammar_cost"),
        ("regex", "a(", "request.grammar"),
        ("regex", "a\\", "request.grammar"),
        ("regex", "(?x) a # b", "request.grammar"),
        ("regex", r"(a)\1", "request.grammar"),
        ("regex", "a(?=b)b", "request.grammar"),
        ("regex", r"\bword", "request.grammar"),
        ("regex", "[a&&b]", "request.grammar"),
        ("regex", "(" * 4000 + ")" * 4000, "request.grammar"),
    ],
)
def test_what_is_refused(grammars: Grammars, kind: str, text: str, code: str) -> None:
    """By name, before anything is recorded, in bounded time; and the next one is read as if nothing had been."""
    began = time.monotonic()
    with pytest.raises(RequestError) as err:
        grammars.compile(kind, text)
    assert err.value.code == code
    assert len(str(err.value)) < 400
    assert time.monotonic() - began < 100  # of two seconds of one processor, however many share it
    assert ids(grammars.compile("regex", "a").walk().mask) == [TOKENS.index(b"a")]


@given(st.one_of(st.text(max_size=12), st.text("ab01[](){}|?*+^$\\\\.,-:!<>=PpLxsi", max_size=16)), st.integers(0, 99))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_an_expression_or_refused(grammars: Grammars, text: str, seed: int) -> None:
    try:
        compiled = grammars.compile("regex", text)
    except RequestError as err:
        assert err.code in ("request.grammar", "request.grammar_cost")
    else:
        spelled(compiled, random.Random(seed), most=12)


KEYWORDS = (
    *("type", "enum", "const", "items", "properties", "required", "anyOf", "allOf", "$ref", "pattern", "x", "not"),
    *("minimum", "maxLength", "additionalProperties", "if", "format", "multipleOf", "prefixItems"),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=4)),
    max_leaves=8,
)


@given(VALUES, st.integers(0, 99))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_is_a_schema_or_refused(grammars: Grammars, value: object, seed: int) -> None:
    try:
        compiled = grammars.compile("json_schema", json.dumps(value))
    except RequestError as err:
        assert err.code in ("request.grammar", "request.grammar_cost")
        return
    text = spelled(compiled, random.Random(seed), most=30)
    if text is not None:
        json.loads(text)


def test_the_judge_may_die(grammars: Grammars) -> None:
    process = grammars._judge._process
    assert process is not None
    process.kill()
    process.wait()
    assert grammars.compile("regex", "a|b").walk().mask.any()


def test_a_walk_ends_where_it_costs_too_much(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = grammars.compile("regex", "(?s).*")
    spent = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: next(spent) * 0.1)
    walk = compiled.walk(hurried=True)
    with pytest.raises(GrammarError):
        for _ in range(9):
            walk.step(TOKENS.index(b"a"))
    patient = compiled.walk()
    for _ in range(9):
        patient.step(TOKENS.index(b"a"))


# The mask and the sampler.


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_masked_draw_is_the_draw_among_the_allowed(data: st.DataObject) -> None:
    """The reference of the sampler over the allowed ids and no others, whatever the settings."""
    vocab = data.draw(st.integers(2, 90))
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    allowed = sorted(rng.sample(range(vocab), data.draw(st.integers(1, vocab))))
    spread = data.draw(st.sampled_from([0.5, 8.0, 1e4]))
    logits = torch.tensor([[f32(rng.choice([rng.gauss(0, spread), 1.0])) for _ in range(vocab)]])
    params = SamplerParams(
        temperature=f32(data.draw(st.sampled_from([0.0, 0.5, 1.0, 100.0]))),
        top_k=data.draw(st.sampled_from([0, 1, 5])),
        top_p_20bit=data.draw(st.sampled_from([1 << 20, 900_000, 1])),
        min_p_20bit=data.draw(st.sampled_from([0, 60_000])),
        repetition=f32(data.draw(st.sampled_from([1.0, 100.0, 0.01]))),
        presence=data.draw(st.sampled_from([0.0, 2.0])),
        frequency=data.draw(st.sampled_from([0.0, -2.0])),
        logit_bias={i: f32(rng.uniform(-100, 100)) for i in rng.sample(range(vocab), data.draw(st.integers(0, 2)))},
        seed=rng.getrandbits(64),
    )
    tokens = [rng.randrange(vocab) for _ in range(6)]
    row = Row(params=params, tokens=tokens, prompt=2, length=6, mask=words(allowed, vocab))
    (token,), marks = draw(logits, [row])
    place = {token: i for i, token in enumerate(allowed)}
    mine = replace(params, logit_bias={place[i]: b for i, b in params.logit_bias.items() if i in place})
    history = History(
        prompt=[place[i] for i in tokens[:2] if i in place], output=[place[i] for i in tokens[2:] if i in place]
    )
    alone = sampler.reference(sampler.adjust(logits[0, allowed], mine, history), mine, 6)
    assert token == allowed[alone]
    assert marks == draw(logits, [replace(row, mask=None)])[1]


def words(allowed: list[int], vocab: int) -> Mask:
    bits = np.zeros((vocab + 31) // 32 * 32, dtype=np.bool_)
    bits[allowed] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def test_logits_below_all_that_is_barred_are_an_error() -> None:
    logits = torch.full((1, 40), -(2.0**99))
    logits[0, 3] = 0.0
    row = Row(params=SamplerParams(temperature=0.0), tokens=[1], prompt=1, length=1, mask=words([7, 8], 40))
    with pytest.raises(NumericsError) as err:
        draw(logits, [row])
    assert err.value.code == "numerics.range"


# Through the engine.


def ask(kind: str, text: str, seed: int, *, tokens: int = 120, temperature: float = 1.0, **more: object) -> Request:
    prompt = some_prompt(random.Random(seed), 5)
    return Request(
        prompt=prompt,
        grammar=(kind, text),
        max_tokens=tokens,
        seed=seed,
        temperature=temperature,
        **more,  # type: ignore[arg-type]
    )


def test_answers_fit(engine: Engine) -> None:
    """Every schema and some expressions, greedy and sampled, all beside each other."""
    asked = [
        ask("json_schema", json.dumps(schema), seed, temperature=heat)
        for schema in SCHEMAS
        for seed, heat in ((1, 0.0), (2, 1.0), (3, 1.5))
    ]
    patterns = (r"\d{4}-\d\d-\d\d", "(?i)yes|no", "[a-z]{3,9}( [a-z]{1,9}){0,4}[.!]", "日本(語)?|é+x")
    asked += [ask("regex", pattern, seed) for pattern in patterns for seed in range(5)]
    ended = 0
    for request, done in zip(asked, run(engine, asked), strict=True):
        assert request.grammar is not None
        kind, text = request.grammar
        assert done.reason in (Finish.EOS, Finish.LENGTH)
        if done.reason is Finish.LENGTH:  # it may not be over, but what there is begins something that fits
            assert follows(engine, request, done.output_tokens)
            continue
        ended += 1
        if kind == "json_schema":
            valid(done.text, json.loads(text))
        else:
            assert re.fullmatch(text, done.text)
    assert ended > len(asked) // 2


def follows(engine: Engine, request: Request, tokens: tuple[int, ...]) -> bool:
    grammar = engine.prepare(request).grammar
    assert grammar is not None
    walk: Walk = grammar.walk()
    for token in tokens:
        if not allows(walk.mask, token):
            return False
        walk.step(token)
    return True


def same(one: DoneEvent, other: DoneEvent) -> None:
    assert one.output_tokens == other.output_tokens
    assert one.fingerprints == other.fingerprints
    assert (one.text, one.reason) == (other.text, other.reason)


def test_neighbours_with_and_without(engine: Engine) -> None:
    """Neither changes a bit of the other."""
    rng = random.Random(5)
    constrained = [ask("json_schema", json.dumps(PERSON), seed, tokens=40) for seed in range(4)]
    free = [some_request(rng) for _ in range(8)]
    mixed = [*constrained, *free]
    rng.shuffle(mixed)
    together = dict(zip(map(id, mixed), run(engine, mixed), strict=True))
    for request in (*constrained, *free):
        same(run(engine, [request])[0], together[id(request)])


def test_a_grammar_that_allows_all_text_changes_no_greedy_answer(engine: Engine) -> None:
    """Up to the first special id or byte that is no text, which this model's answers have."""
    free = replace(ask("regex", "(?s).*", 7, tokens=30, temperature=0.0), grammar=None)
    bound = ask("regex", "(?s).*", 7, tokens=30, temperature=0.0)
    for _ in range(6):
        (one,), (other,) = run(engine, [free]), run(engine, [bound])
        pairs = zip(one.output_tokens, other.output_tokens, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is not None:
            grammar = engine.prepare(bound).grammar
            assert grammar is not None
            walk = grammar.walk()
            for token in one.output_tokens[:first]:
                walk.step(token)
            assert not allows(walk.mask, one.output_tokens[first])
        free, bound = (replace(each, prompt=f"{each.prompt} and") for each in (free, bound))


def test_log_probabilities_are_those_of_all_ids(engine: Engine) -> None:
    """Before the grammar, as before bias and filters: the likeliest need not be allowed."""
    request = ask("regex", "(a|b){30}", 3, tokens=30, logprobs=5)
    answer = start(engine, request)
    answer.skipped = True  # type: ignore[attr-defined]
    likely: set[int] = set()
    while not isinstance(event := answer.next(), DoneEvent):
        for entry, token in zip(event.logprobs, event.ids, strict=True):
            assert TOKENS[token] in (b"a", b"b") or token == END
            assert entry.logprob <= entry.top[0][1]
            likely |= {token for token, _ in entry.top}
    assert any(TOKENS[token] not in (b"a", b"b") for token in likely)


def test_stop_strings_and_penalties_and_biases_still_apply(engine: Engine) -> None:
    (done,) = run(engine, [ask("regex", "[ab]{50}", 3, stop=("ba",), temperature=1.5)])
    assert (done.reason, "ba" in done.text) == (Finish.STOP, False)
    (done,) = run(engine, [ask("regex", "[ab]{20}", 3, logit_bias={TOKENS.index(b"a"): -100.0, 65: 100.0})])
    assert done.text == "b" * 20


def test_what_cannot_be_constrained(engine: Engine) -> None:
    for more in ({"ignore_eos": True}, {"grammar": ("regex", "(")}):
        with pytest.raises(RequestError) as err:
            engine.prepare(replace(ask("regex", "a", 1), **more))  # type: ignore[arg-type]
        assert err.value.code == "request.grammar"


def test_a_grammar_that_fails_on_the_way_ends_its_answer_and_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Walk.step

    def failing(self: Walk, token: int) -> None:
        if self._matcher.is_accepting() and not allows(self.mask, TOKENS.index(b"z")):
            raise GrammarError("grammar: expected one whose masks take less")
        step(self, token)

    free = some_request(random.Random(1))
    (alone,) = run(engine, [free])
    monkeypatch.setattr(Walk, "step", failing)
    bound, beside = run(engine, [ask("regex", "q*", 1, tokens=50, logit_bias={END: -100.0}), free])
    assert (bound.reason, bound.by_grammar, bound.detail) == (
        Finish.ERROR,
        True,
        "grammar: expected one whose masks take less",
    )
    assert not beside.by_grammar
    same(alone, beside)


# Again.


def test_an_answer_runs_again(engine: Engine, runner: ExactRunner) -> None:
    for request in (
        ask("json_schema", json.dumps(PERSON), 4, tokens=60),
        ask("regex", r"([a-z]{2,5} ){3,}\.", 5, tokens=50, repetition_penalty=1.3),
    ):
        prepared = engine.prepare(request)
        (done,) = run(engine, [replace(request, seed=prepared.sampling.seed)])
        recorded = {name: getattr(prepared.sampling, name) for name in prepared.sampling.__slots__}
        answer = (prepared.prompt_tokens, done.output_tokens, done.fingerprints, recorded)
        assert request.grammar is not None
        assert runner.audit(*answer, request.grammar) is None
        again = runner.regenerate(prepared.prompt_tokens, prepared.max_tokens, (), False, recorded, request.grammar)
        assert again == (done.output_tokens, done.fingerprints)
        assert runner.audit(*answer) is not None  # without its grammar it is another answer
        other = ("regex", "[0-9]{70}")
        found = runner.audit(*answer, other)
        assert found is not None
        assert (found["position"], found["fingerprint_equal"]) == (0, True)


def test_an_audit_in_pieces_and_beside_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are asked for in pieces; a piece that fails is asked for again."""
    runner = ExactRunner(ARTEFACT)  # type: ignore[arg-type]
    monkeypatch.setattr(runner, "_step_tokens", 7)
    asked = [ask("json_schema", json.dumps(PERSON), seed, tokens=40) for seed in range(3)]
    asked += [replace(ask("regex", "a", seed, tokens=20), grammar=None) for seed in range(2)]
    answers = []
    for request, done in zip(asked, run(engine, asked), strict=True):
        prepared = engine.prepare(request)
        recorded = {name: getattr(prepared.sampling, name) for name in prepared.sampling.__slots__}
        plain = (prepared.prompt_tokens, done.output_tokens, done.fingerprints, recorded)
        answers.append(plain if request.grammar is None else (*plain, request.grammar))
    assert dict(runner.audit_many(answers)) == dict.fromkeys(range(len(asked)))
    wrong = list(answers[1][1])
    wrong[5] ^= 1
    bent = (answers[1][0], tuple(wrong), *answers[1][2:])
    found = dict(runner.audit_many([answers[0], bent, answers[2]]))  # type: ignore[list-item]
    assert (found[0], found[2]) == (None, None)
    assert isinstance(found[1], dict)
    assert found[1]["position"] == 5


def test_what_the_library_says_does_not_depend_on_its_optimisations() -> None:
    """With and without the slices that it precomputes the masks are the same."""
    import llguidance

    tries = [grammarlib.vocabulary(TOKENS)]
    tries += [tries[0].with_slices([]), tries[0].with_slices(llguidance.LLTokenizer.json_slices())]
    for kind, text in (("json_schema", json.dumps(PERSON)), ("regex", r"(?s).{3,}"), ("json_schema", "{}")):
        matchers = [grammarlib.compiled(trie, kind, text) for trie in tries]
        rng = random.Random(text)
        for _ in range(40):
            masks = [matcher.compute_bitmask() for matcher in matchers]
            assert len(set(masks)) == 1
            bits = np.unpackbits(np.frombuffer(masks[0], np.uint8), bitorder="little", count=VOCAB)
            allowed = np.nonzero(bits)[0]
            if not len(allowed):
                break
            token = int(rng.choice(list(allowed)))
            assert all(matcher.consume_token(token) for matcher in matchers)


GOLDEN = {
    ("regex", "(foo|ba[rz])+"): b"foobar",
    ("regex", r"\p{L}{2}\d?.(?s:.)"): "éa9!\n".encode(),
    ("json_schema", json.dumps(PERSON)): '{ "name":"é\\n","age": 12, "tags":["x"]}'.encode(),
    ("json_schema", '{"type": "number", "multipleOf": 0.25, "maximum": 7}'): b"6.75",
}
KNOWN = {"1.9.1": "f71396333c884a88d37d6d9557100844be0bf0353ff61999908c5f957cf2cf2f"}


def test_the_masks_are_those_of_this_version_everywhere() -> None:
    """A version that is not listed may have other masks: look, and list it. Ask otherwise, and count RULES up."""
    trie = grammarlib.vocabulary([bytes([byte]) for byte in range(256)])
    digest = hashlib.sha256()
    for (kind, text), spelled_out in GOLDEN.items():
        matcher = grammarlib.compiled(trie, kind, text)
        for byte in spelled_out:
            digest.update(matcher.compute_bitmask())
            assert matcher.consume_token(byte), (text, byte)
        assert matcher.is_accepting()
        digest.update(matcher.compute_bitmask())
    assert digest.hexdigest() == KNOWN[grammarlib.version()]
