"""Whatever the logits are, a constrained answer is JSON that its schema describes, and it ends there."""

from __future__ import annotations

import builtins
import json
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import write_base, write_tokenizer
from tiny_families import write_bpe

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.errors import ConfigError, GenerationError
from peftkit.generation import constrain
from peftkit.generation.choose import Chooser
from peftkit.generation.constrain import Constraint, Grammar
from peftkit.generation.requests import Sampling

pytest.importorskip("llguidance")

TICKET: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["bug", "wish", 3, None]},
        "urgent": {"type": "boolean"},
        "hours": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
        "place": {
            "type": "object",
            "properties": {"row": {"type": "integer", "minimum": 0, "maximum": 40}, "column": {"type": "integer"}},
            "required": ["row"],
            "additionalProperties": False,
        },
    },
    "required": ["title", "kind", "hours", "place"],
    "additionalProperties": False,
}


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` is what `schema` describes: the keywords of these tests, and no others."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "object": lambda v: isinstance(v, dict),
        "array": lambda v: isinstance(v, list),
        "string": lambda v: isinstance(v, str),
        "boolean": lambda v: isinstance(v, bool),
        "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
        "null": lambda v: v is None,
    }
    checks: dict[str, Callable[[Any], bool]] = {
        "type": lambda wanted: kinds[wanted](value),
        "enum": lambda wanted: any(value == each and type(value) is type(each) for each in wanted),
        "maxLength": lambda most: len(value) <= most,
        "minItems": lambda least: len(value) >= least,
        "maxItems": lambda most: len(value) <= most,
        "minimum": lambda least: value >= least,
        "maximum": lambda most: value <= most,
        "items": lambda each: all(valid(item, each) for item in value),
        "properties": lambda named: all(valid(value[name], named[name]) for name in named if name in value),
        "required": lambda names: all(name in value for name in names),
        "additionalProperties": lambda allowed: allowed or set(value) <= set(schema.get("properties", {})),
        "anyOf": lambda either: any(valid(value, each) for each in either),
    }
    # `type` first: the others ask for lengths and members.
    return all(checks[word](schema[word]) for word in sorted(schema, key=lambda word: word != "type"))


WIDTH = 320
"""More than any tokenizer written here has ids."""

# The embedded base has tokens for the bytes of these, and not for all bytes.
SPELLED = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"])


def simple() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.sampled_from(["boolean", "null", "number"]).map(lambda kind: {"type": kind}),
        st.integers(0, 9).map(lambda most: {"type": "string", "maxLength": most}),
        st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(
            lambda at: {"type": "integer", "minimum": at[0], "maximum": at[0] + at[1]}
        ),
        st.lists(
            st.one_of(st.text(SPELLED, max_size=4), st.integers(-(2**53), 2**53), st.booleans()), min_size=1, max_size=3
        ).map(lambda values: {"enum": values}),
    )


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    named = st.dictionaries(st.text(st.sampled_from('ab"é<|\\ '), max_size=4), inner, max_size=3)
    return st.tuples(named, st.integers(0, 3)).map(
        lambda drawn: {
            "type": "object",
            "properties": drawn[0],
            "required": list(drawn[0])[: drawn[1]],
            "additionalProperties": False,
        }
    )


def arrays(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda drawn: {"type": "array", "items": drawn[0], "minItems": drawn[1], "maxItems": drawn[1] + drawn[2]}
    )


SCHEMAS = st.recursive(simple(), lambda inner: st.one_of(objects(inner), arrays(inner)), max_leaves=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    hf = write_bpe(tmp_path_factory.mktemp("bpe"))
    return Tokenizer(hf, (hf.eos_token_id, 0), hf.eos_token_id)


@pytest.fixture(scope="module")
def embedded_tokenizer(embedded: Path) -> Tokenizer:
    return load_tokenizer(embedded)


def begin(schema: dict[str, Any], tokenizer: Tokenizer, stop_ids: tuple[int, ...] = ()) -> Constraint:
    return Grammar.of(schema, tokenizer).start(stop_ids)


def follow(schema: dict[str, Any], tokenizer: Tokenizer, seed: int, *, limit: int = 3000, wider: int = 7) -> list[int]:
    """An answer of random logits, as wide as a model's that has more ids than its tokenizer, up to its stop token."""
    constraint, chooser = begin(schema, tokenizer), Chooser(Sampling(1.0, seed=seed))
    noise = torch.Generator().manual_seed(seed)
    width = len(tokenizer.hf) + wider
    ids: list[int] = []
    for _ in range(limit):
        mask = constraint.mask(width)
        assert mask.shape == (width,)
        stops = [bool(mask[stop]) for stop in tokenizer.stop_ids]
        assert stops == [constraint.may_stop] * len(stops)
        token = chooser.choose(torch.randn(width, generator=noise) * 2, mask)
        assert 0 <= token < len(tokenizer.hf)
        constraint.accept(token)
        if token in tokenizer.stop_ids:
            assert constraint.done
            return ids
        ids.append(token)
    raise AssertionError(f"no end after {limit} tokens: {tokenizer.decode(ids)[:500]!r}")


def answers(schema: dict[str, Any], tokenizer: Tokenizer, seed: int) -> None:
    ids = follow(schema, tokenizer, seed)
    assert valid(json.loads(tokenizer.decode(ids)), schema)
    # No control token is hidden in it.
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)


@settings(max_examples=80, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 10_000))
def test_random_logits_make_documents_of_the_schema(
    schema: dict[str, Any], seed: int, tiny: Tokenizer, bpe: Tokenizer
) -> None:
    for tokenizer in (tiny, bpe):
        answers(schema, tokenizer, seed)


@pytest.mark.parametrize("seed", range(5))
def test_random_logits_make_tickets(seed: int, tiny: Tokenizer) -> None:
    answers(TICKET, tiny, seed)


@pytest.mark.base
@settings(max_examples=15, deadline=None)
@given(schema=st.one_of(st.just(TICKET), SCHEMAS), seed=st.integers(0, 10_000))
def test_random_logits_make_documents_with_the_embedded_base(
    schema: dict[str, Any], seed: int, embedded_tokenizer: Tokenizer
) -> None:
    answers(schema, embedded_tokenizer, seed)


def test_a_model_with_random_weights_answers_by_the_schema(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_base(tmp_path, vocab_size=264)  # five ids more than the tokenizer has
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    schema = {"type": "array", "items": {"enum": ["north", "south"]}, "minItems": 1, "maxItems": 2}
    constraint, chooser = begin(schema, tokenizer), Chooser(Sampling(1.0, seed=1))
    ids = tokenizer.encode("where?")
    prompt = len(ids)
    with torch.inference_mode():
        while not constraint.done:
            logits = model(torch.tensor([ids])).logits[0, -1]
            token = chooser.choose(logits, constraint.mask(len(logits)))
            constraint.accept(token)
            ids.append(token)
    assert valid(json.loads(tokenizer.decode(ids[prompt:])), schema)


def allows(constraint: Constraint, token: int) -> bool:
    return bool(constraint.mask(WIDTH)[token])


def follows(text: str, schema: dict[str, Any], tokenizer: Tokenizer) -> Constraint:
    constraint = begin(schema, tokenizer)
    for token in tokenizer.encode(text):
        assert allows(constraint, token), f"{tokenizer.decode([token])!r} of {text!r}"
        constraint.accept(token)
    return constraint


@pytest.mark.parametrize("indent", [None, 2, 4])
def test_documents_may_be_written_close_or_indented(indent: int | None, tiny: Tokenizer) -> None:
    value = {"title": "x", "kind": None, "hours": -1.5e3, "tags": ["a", "b"], "place": {"row": 4, "column": -7}}
    assert valid(value, TICKET)
    assert follows(json.dumps(value, indent=indent), TICKET, tiny).done
    assert follows(json.dumps(value, separators=(",", ":")), TICKET, tiny).done


def test_text_of_a_stop_token_stays_text(tiny: Tokenizer) -> None:
    (stop,) = tiny.stop_ids
    name = tiny.hf.convert_ids_to_tokens(stop)
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    spelled = [token for char in f'{{"a": "{name}' for token in tiny.encode(char)]
    assert stop not in spelled
    constraint = begin(schema, tiny)
    for token in spelled:
        assert allows(constraint, token)
        constraint.accept(token)
    assert not constraint.may_stop
    assert not any(allows(constraint, special) for special in range(3))
    with pytest.raises(GenerationError, match=f"token {stop} cannot follow"):
        constraint.accept(stop)
    for token in tiny.encode('"}'):
        constraint.accept(token)
    assert constraint.done
    assert json.loads(tiny.decode(spelled) + '"}') == {"a": name}


def test_after_the_document_only_stop_tokens_are_allowed(bpe: Tokenizer) -> None:
    constraint = follows('{"row": 4}', TICKET["properties"]["place"], bpe)
    assert constraint.done
    assert constraint.mask(WIDTH).nonzero()[:, 0].tolist() == sorted(bpe.stop_ids)
    with pytest.raises(GenerationError):
        constraint.accept(bpe.encode("}")[0])


def test_a_number_may_end_or_go_on(tiny: Tokenizer) -> None:
    constraint = follows("4", {"type": "integer"}, tiny)
    assert constraint.may_stop
    assert not constraint.done
    assert allows(constraint, tiny.stop_ids[0])
    assert allows(constraint, tiny.encode("2")[0])
    constraint.accept(tiny.stop_ids[0])
    assert constraint.done
    with pytest.raises(GenerationError):
        constraint.accept(tiny.encode("2")[0])


def test_a_requests_own_stop_tokens_end_a_document_and_never_a_part_of_it(tiny: Tokenizer) -> None:
    digit, unknown = tiny.encode("7")[0], len(tiny.hf) + 3
    constraint = begin({"type": "array", "items": {"type": "integer"}}, tiny, (digit, unknown))
    for token in tiny.encode("[1"):
        constraint.accept(token)
    assert not allows(constraint, digit)
    assert not allows(constraint, unknown)
    assert not allows(constraint, tiny.stop_ids[0])
    constraint.accept(tiny.encode("]")[0])
    assert constraint.mask(unknown).nonzero()[:, 0].tolist() == sorted((tiny.stop_ids[0], digit))
    assert constraint.mask(WIDTH).nonzero()[:, 0].tolist() == sorted((tiny.stop_ids[0], digit, unknown))
    constraint.accept(unknown)
    assert constraint.done


def test_where_no_token_can_follow_it_says_so(tiny: Tokenizer) -> None:
    constraint = begin({"enum": [7]}, tiny, tuple(tiny.encode("7")))
    with pytest.raises(GenerationError, match="no token of the vocabulary"):
        constraint.mask(WIDTH)


@pytest.mark.base
def test_a_text_that_the_tokenizer_has_no_bytes_for_fails_and_is_never_written_wrongly(
    embedded_tokenizer: Tokenizer,
) -> None:
    unspelled = chr(0x40000)
    assert embedded_tokenizer.decode(embedded_tokenizer.encode(unspelled)) != unspelled
    with pytest.raises(GenerationError, match="forced bytes") as caught:
        follow({"enum": [unspelled]}, embedded_tokenizer, 0)
    assert len(caught.value.fact) < 200
    assert json.loads(embedded_tokenizer.decode(follow({"enum": [unspelled, "a"]}, embedded_tokenizer, 0))) == "a"


def test_answers_of_one_schema_do_not_share_their_place(tiny: Tokenizer) -> None:
    schema = {"enum": ["ab", "cd"]}
    one, other = begin(schema, tiny), begin(schema, tiny)
    for token in tiny.encode('"a'):
        one.accept(token)
    assert allows(one, tiny.encode("b")[0])
    assert allows(other, tiny.encode('"')[0])
    assert not allows(other, tiny.encode("b")[0])


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "person"}, "Invalid type: person"),
        ({"not": {}}, "not"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5) is greater than maximum (1)"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"$ref": "http://example.org/schema"}, "example.org"),
        ({"type": "string", "format": "haiku"}, "haiku"),
        # It would be followed as 9007199254740992.
        ({"anyOf": [{"type": "null"}, {"enum": ["a", 2**53 + 1]}]}, "9007199254740993 is beyond"),
        ({"type": "integer", "minimum": -(10**30)}, "is beyond"),
        ({"enum": {1, 2}}, "it is not JSON"),
        ({"minimum": float("nan")}, "it is not JSON"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_with_the_reason(
    schema: dict[str, Any], named: str, tiny: Tokenizer
) -> None:
    with pytest.raises(ConfigError) as caught:
        Grammar.of(schema, tiny)
    assert named in caught.value.problems[0]
    assert "json_schema" in str(caught.value)


def many(count: int, **each: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{at}": each for at in range(count)}}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (many(2000), "2002 objects in it: take at most 2000"),
        (many(15_000, type="string", pattern="^a[a-z]+$"), "take at most 65536"),
        ({"enum": ["x" * 65_536]}, "65550 bytes: take at most 65536"),
    ],
)
def test_a_schema_that_is_too_large_is_refused_before_it_is_compiled(
    schema: dict[str, Any], said: str, tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constrain._Compiler, "compile", lambda *_: pytest.fail("it was compiled"))
    with pytest.raises(ConfigError) as caught:
        Grammar.of(schema, tiny)
    assert said in caught.value.problems[0]
    assert "$defs" in str(caught.value)


def test_a_schema_within_the_bounds_is_followed_however_many_properties_it_has(tiny: Tokenizer) -> None:
    assert follows('{"p7": 1, "p1900": "x"}', many(1998), tiny).done


def test_a_schema_that_compiles_and_cannot_be_followed_is_refused_at_once_and_in_one_line(tiny: Tokenizer) -> None:
    branching = [{"anyOf": [{"type": "object", "properties": {f"a{i}_{j}": {}}} for j in range(3)]} for i in range(6)]
    with pytest.raises(ConfigError, match="Current row has") as caught:
        Grammar.of({"type": "array", "items": {"allOf": branching}}, tiny)
    assert len(str(caught.value).splitlines()) == 2
    assert len(str(caught.value)) < 400


def test_what_llguidance_says_is_told_without_where_in_itself_it_was() -> None:
    assert constrain._first_line("  panicked: no\n<backtrace>\n 0: rust_begin_unwind\n") == "panicked: no"
    assert constrain._first_line("") == "no reason is given"
    assert len(constrain._first_line("x" * 5000)) == 300


def test_a_schema_that_is_known_does_not_wait_for_another_one_that_is_compiled(tiny: Tokenizer) -> None:
    known = Grammar.of({"const": "known"}, tiny)
    with ThreadPoolExecutor(1) as thread, constrain._compiler(tiny).busy:
        again = thread.submit(Grammar.of, {"const": "known"}, tiny).result(timeout=20)
    assert again.matcher is known.matcher


def test_schemas_that_were_not_asked_for_longest_make_room(tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_SCHEMAS_KEPT", 2)
    monkeypatch.setattr(constrain, "_compilers", type(constrain._compilers)())
    first, second = Grammar.of({"const": 1}, tiny), Grammar.of({"const": 2}, tiny)
    assert Grammar.of({"const": 1}, tiny).matcher is first.matcher
    Grammar.of({"const": 3}, tiny)
    assert Grammar.of({"const": 1}, tiny).matcher is first.matcher
    assert Grammar.of({"const": 2}, tiny).matcher is not second.matcher


@pytest.mark.parametrize("depth", [300, 450, 900, 100_000])
def test_a_schema_nested_beyond_all_measure_is_refused(depth: int, tiny: Tokenizer) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ConfigError):
        Grammar.of(schema, tiny)
    while schema:  # taken apart by hand: the interpreter would do it in one deep recursion
        schema = schema.pop("items")


def test_a_tokenizer_and_a_schema_are_compiled_once(
    tiny: Tokenizer, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tokenizer] = []
    true = constrain._Compiler.__init__

    def counted(self: Any, tokenizer: Tokenizer) -> None:
        made.append(tokenizer)
        true(self, tokenizer)

    monkeypatch.setattr(constrain._Compiler, "__init__", counted)
    monkeypatch.setattr(constrain, "_compilers", type(constrain._compilers)())
    grammar = Grammar.of({"type": "null"}, tiny)
    assert Grammar.of({"type": "null"}, Tokenizer(tiny.hf, tiny.stop_ids, 0)).matcher is grammar.matcher
    assert Grammar.of({"type": "boolean"}, tiny).matcher is not grammar.matcher
    assert Grammar.of({"type": "null"}, bpe).matcher is not grammar.matcher
    # Other stop tokens are another end of a document.
    Grammar.of({"type": "null"}, Tokenizer(tiny.hf, (0,), 0))
    assert len(made) == 3
    # The order of properties is the order in which they are written.
    named = [{"properties": {name: {} for name in order}, "type": "object"} for order in ("ab", "ba")]
    assert Grammar.of(named[0], tiny).matcher is not Grammar.of(named[1], tiny).matcher


def test_without_llguidance_the_command_that_installs_it_is_named(
    tiny: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refusing(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "llguidance":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refusing)
    monkeypatch.setattr(constrain, "_compilers", type(constrain._compilers)())
    with pytest.raises(ConfigError) as caught:
        begin({"type": "null"}, tiny)
    assert caught.value.hint == "pip install 'peftkit[json]'"


def test_llguidance_is_imported_only_for_a_schema() -> None:
    import subprocess

    code = "import sys, peftkit.generation.constrain; print(any(m.startswith('llguidance') for m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_a_document_that_was_begun_can_be_ended_from_anywhere(tiny: Tokenizer) -> None:
    """From any place that random tokens led to, closing tokens lead to the end: no mask is a dead end."""
    drawn = random.Random(0)
    closing = {token: rank for rank, token in enumerate(tiny.encode('"}],:'))}
    for _ in range(5):
        constraint = begin(TICKET, tiny)
        for step in range(600):
            allowed = constraint.mask(WIDTH).nonzero()[:, 0].tolist()
            near = sorted((token for token in allowed if token in closing), key=closing.__getitem__)
            token = near[0] if step > 30 and near else drawn.choice(allowed)
            constraint.accept(token)
            if constraint.done:
                break
        assert constraint.done
