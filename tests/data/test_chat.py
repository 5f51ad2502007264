"""What is learned is exactly what must be produced at inference: masks by hand, token by token, and for any rows.

In `worked` texts ⟦ and ⟧ enclose what is learned. The byte tokenizer of the tests makes every byte outside the three
control tokens one token, so such a text says for each single token whether the loss falls on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_bases import CHATML, write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.data.chat import IGNORED, Example, encode_row, prompt_for, segments
from peftkit.data.chat_prompt import chat_prompt
from peftkit.data.formats import Row
from peftkit.data.readers import Where
from peftkit.data.template import Rendering
from peftkit.errors import DataError

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_SHORT = MARKED.replace("m.content + '<|im_end|>' }}{% endgen", "m.content }}{% endgen").replace(
    "{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}{{ '\n' + t.function.name }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: turns before the last question lose their think block, the answer to it always has one.
THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '\n\n' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>' + thought + '</think>\n\n' + said }}{% else %}{{ said }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NOT_A_PREFIX = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
WITH_BOS = "{{ bos_token }}" + CHATML.replace("<|im_start|>", "#")

Make = Callable[[str | None], Tokenizer]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The byte tokenizer with a template; pad is eos."""
    made: dict[str | None, Tokenizer] = {}

    def build(template: str | None) -> Tokenizer:
        if template not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            write_tokenizer(folder, template)
            made[template] = load_tokenizer(folder)
        return made[template]

    return build


@pytest.fixture(scope="module")
def real(embedded: Path) -> Tokenizer:
    """The embedded base's own tokenizer and template."""
    return load_tokenizer(embedded)


def row(*messages: dict[str, Any], **more: Any) -> Row:
    values = {"text": None, "tools": None, "chat_template_kwargs": {}, "columns": {}, "where": Where("f.jsonl", 7, 6)}
    return Row(messages=messages, **{**values, **more})


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


# Bytes in the order of their ids 3 to 258: GPT-2's table, first the bytes that print as themselves.
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTED + [byte for byte in range(256) if byte not in PRINTED]
CONTROL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def spell(text: str) -> list[int]:
    """Token ids without any library."""
    ids: list[int] = []
    for part in re.split(r"(<\|endoftext\|>|<\|im_start\|>|<\|im_end\|>)", text):
        ids += [CONTROL[part]] if part in CONTROL else [3 + BYTES.index(byte) for byte in part.encode()]
    return ids


def worked(text: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a text in which ⟦ ⟧ enclose what is learned."""
    ids: list[int] = []
    labels: list[int] = []
    for number, part in enumerate(re.split("[⟦⟧]", text)):
        more = spell(part)
        ids += more
        labels += more if number % 2 else [IGNORED] * len(more)
    return ids, labels


def check(examples: list[Example], *texts: str) -> None:
    assert [(e.input_ids, e.labels) for e in examples] == [worked(text) for text in texts]
    for example, text in zip(examples, texts, strict=True):
        before_last_answer = text[: text.rindex("⟦")].replace("⟦", "").replace("⟧", "")
        assert example.prompt_ids == spell(before_last_answer)


def inference(tokenizer: Tokenizer, messages: Any, **variables: Any) -> list[int]:
    """What transformers feeds the model for these messages."""
    return tokenizer.hf.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **variables
    )


# Masks by hand


def test_a_single_turn_in_numbers(make: Make) -> None:
    (example,) = encode_row(row(user("hi"), bot("yo")), 4, make(CHATML), Rendering())
    # <|im_start|> u s e r ⏎ h i <|im_end|> ⏎ <|im_start|> a s s i s t a n t ⏎ | y o <|im_end|>
    assert example.input_ids == [1, 87, 85, 71, 84, 201, 74, 75, 2, 201, 1, 67, 85, 85, 75, 85, 86, 67, 80, 86, 201,
                                 91, 81, 2]  # fmt: skip
    assert example.labels == [-100] * 21 + [91, 81, 2]
    assert (example.answer_start, example.row, example.where, example.answer_tokens) == (21, 4, "f.jsonl:7", 3)
    assert not example.stop_added


def test_the_end_of_turn_is_learned_in_every_answer_although_pad_is_eos(make: Make) -> None:
    tokenizer = make(CHATML)
    assert tokenizer.pad_id == tokenizer.stop_ids[0] == 2
    examples = encode_row(row(user("a"), bot("b"), user("c"), bot("d")), 0, tokenizer, Rendering())
    check(
        examples,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧",
    )
    assert examples[0].answer_tokens == 4


def test_a_system_turn_is_read_and_never_learned(make: Make) -> None:
    examples = encode_row(row(system("be é"), user("a"), bot("b")), 0, make(CHATML), Rendering())
    check(
        examples,
        "<|im_start|>system\nbe é<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧",
    )


def test_a_tool_call_and_the_answer_to_its_result_are_learned_and_the_result_is_not(make: Make) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    messages = (user("1+1?"), bot("", tool_calls=[call]), {"role": "tool", "content": "2"}, bot("Two."))
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    given = row(*messages, tools=tools)
    examples = encode_row(given, 0, make(TOOLS), Rendering())
    check(
        examples,
        "<|im_start|>system\nTools:\nadd<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        '<|im_start|>assistant\n⟦<call>add {"x": 1}<|im_end|>⟧\n'
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n⟦Two.<|im_end|>⟧",
    )
    assert examples[0].prompt_ids == inference(make(TOOLS), messages[:3], tools=list(tools))
    assert prompt_for(given, make(TOOLS), Rendering()) == examples[0].prompt_ids


def test_markers_in_a_template_agree_with_the_mask(make: Make) -> None:
    messages = [system("s"), user("a"), bot("b b"), user("c"), bot("dé")]
    (example,) = encode_row(row(*messages), 0, make(MARKED), Rendering())
    theirs = make(MARKED).hf.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    # Only difference: transformers keeps the newline that the template writes after the last end-of-turn.
    assert theirs["input_ids"] == [*example.input_ids, *spell("\n")]
    assert theirs["assistant_masks"] == [int(label != IGNORED) for label in example.labels] + [0]
    assert sum(theirs["assistant_masks"]) == len(spell("b bdé")) + 2
    (unmarked,) = encode_row(row(*messages), 0, make(CHATML), Rendering())
    assert unmarked == example


def test_markers_that_leave_the_end_of_turn_out_do_not_make_us_forget_it(make: Make) -> None:
    messages = [user("a"), bot("b"), user("c"), bot("d")]
    (example,) = encode_row(row(*messages), 0, make(MARKED_SHORT), Rendering())
    theirs = make(MARKED_SHORT).hf.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = [int(label != IGNORED) for label in example.labels]
    more = [i for i, (we, they) in enumerate(zip(ours, theirs["assistant_masks"], strict=False)) if we != they]
    assert [example.input_ids[i] for i in more] == [2, 2]  # the one known difference, once per turn
    assert sum(ours) == sum(theirs["assistant_masks"]) + 2


def test_a_thinking_template_makes_one_example_per_answer_with_the_prompt_of_inference(make: Make) -> None:
    tokenizer = make(THINKING)
    messages = (user("a"), bot("<think>\nt\n</think>\n\nb"), user("c"), bot("<think>\nu\n</think>\n\nd"))
    examples = encode_row(row(*messages), 3, tokenizer, Rendering())
    check(
        examples,
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\nt\n</think>\n\nb<|im_end|>⟧",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\nu\n</think>\n\nd<|im_end|>⟧",
    )
    assert [e.prompt_ids for e in examples] == [inference(tokenizer, messages[:turn]) for turn in (1, 3)]
    assert {e.row for e in examples} == {3}
    check(encode_row(row(*messages), 3, tokenizer, Rendering(loss="last")), "".join(
        ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
         "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\nu\n</think>\n\nd<|im_end|>⟧"]))  # fmt: skip


def test_template_variables_reach_prompt_and_answer_and_the_rows_own_win(make: Make) -> None:
    tokenizer, off = make(THINKING), Rendering(kwargs={"enable_thinking": False})
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦b<|im_end|>⟧"
    check(encode_row(row(user("a"), bot("b")), 0, tokenizer, off), text)
    assert chat_prompt([user("a")], tokenizer, off) == inference(tokenizer, [user("a")], enable_thinking=False)
    on = row(user("a"), bot("b"), chat_template_kwargs={"enable_thinking": True})
    learned = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nb<|im_end|>⟧"
    check(encode_row(on, 0, tokenizer, off), learned)


def test_think_blocks_are_kept_as_they_are_or_stripped_from_every_answer(make: Make) -> None:
    given = row(user("<think>u</think> a"), bot("<think>\nlong\n</think>\n\nb"), user("c"), bot("d <think>x</think>e"))
    check(
        encode_row(given, 0, make(CHATML), Rendering(think="strip")),
        "<|im_start|>user\n<think>u</think> a<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d e<|im_end|>⟧",
    )
    (kept,) = encode_row(given, 0, make(CHATML), Rendering(think="keep"))
    assert segments(kept, make(CHATML))[1] == ("<think>\nlong\n</think>\n\nb<|im_end|>", True)


def test_loss_on_the_last_answer_only(make: Make) -> None:
    given = row(user("a"), bot("b"), user("c"), bot("d"))
    check(
        encode_row(given, 0, make(CHATML), Rendering(loss="last")),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧",
    )


def test_loss_on_every_token_moves_no_token_and_no_answer(make: Make) -> None:
    given = row(user("a"), bot("b"), user("c"), bot("d"))
    (usual,) = encode_row(given, 0, make(CHATML), Rendering())
    (whole,) = encode_row(given, 0, make(CHATML), Rendering(loss="all"))
    assert whole.labels == whole.input_ids == usual.input_ids
    assert whole.answer_start == usual.answer_start
    assert whole.answer_tokens == len(whole.input_ids) - 1  # nothing predicts the first token


def test_a_template_without_an_end_of_turn_gets_exactly_one(make: Make) -> None:
    (example,) = encode_row(row(user("a"), bot("b")), 0, make(NO_END), Rendering())
    assert example.stop_added
    assert (example.input_ids, example.labels) == worked("user: a\nassistant: ⟦b\n<|im_end|>⟧")
    first, second = encode_row(row(user("a"), bot("b"), user("c"), bot("d")), 0, make(NO_END), Rendering())
    assert first == example  # the added token would not stand in the prompt of the second answer: two examples
    assert (second.input_ids, second.labels) == worked("user: a\nassistant: b\nuser: c\nassistant: ⟦d\n<|im_end|>⟧")
    assert second.prompt_ids == inference(make(NO_END), [user("a"), bot("b"), user("c")])


def test_a_generation_prompt_that_training_text_never_has_is_refused(make: Make) -> None:
    with pytest.raises(DataError) as caught:
        encode_row(row(user("a"), bot("b")), 0, make(NOT_A_PREFIX), Rendering())
    assert "f.jsonl:7" in caught.value.fact
    assert "message 2" in caught.value.fact
    assert "<think>" in caught.value.fact
    thought = row(user("a"), bot("<think>\nt</think>b"))
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n⟦t</think>b<|im_end|>⟧"
    check(encode_row(thought, 0, make(NOT_A_PREFIX), Rendering()), text)


def test_a_bos_that_the_template_writes_stands_once_in_training_and_inference(make: Make) -> None:
    tokenizer = make(WITH_BOS)
    (example,) = encode_row(row(user("a"), bot("b")), 0, tokenizer, Rendering())
    check([example], "<|im_start|>#user\na<|im_end|>\n#assistant\n⟦b<|im_end|>⟧")
    assert example.prompt_ids == inference(tokenizer, [user("a")])


def test_text_rows_are_learned_whole_and_end_once(make: Make) -> None:
    (example,) = encode_row(row(text="a\nb"), 2, make(CHATML), Rendering())
    assert example.input_ids == example.labels == spell("a\nb<|im_end|>")
    assert (example.answer_start, example.prompt_ids, example.answer_tokens) == (0, [], 3)
    (ended,) = encode_row(row(text="a<|im_end|>"), 2, make(CHATML), Rendering())
    assert ended.input_ids == spell("a<|im_end|>")


def test_a_bos_that_the_tokenizer_adds_stands_before_text_and_not_before_a_template(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing

    write_tokenizer(tmp_path, CHATML)
    fast = Fast.from_file(str(tmp_path / "tokenizer.json"))
    fast.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert encode_row(row(text="a"), 0, tokenizer, Rendering())[0].input_ids == spell("<|endoftext|>a<|im_end|>")
    (example,) = encode_row(row(user("a"), bot("b")), 0, tokenizer, Rendering())
    assert 0 not in example.input_ids
    assert example.prompt_ids == inference(tokenizer, [user("a")])


def test_the_plain_template_is_question_blank_line_answer_end(make: Make) -> None:
    tokenizer, plain = make(None), Rendering(template="plain")
    given = row(system("s"), user("a"), bot("b"))
    (example,) = encode_row(given, 0, tokenizer, plain)
    assert (example.input_ids, example.labels) == worked("s\n\na\n\n⟦b<|im_end|>⟧")
    assert (
        example.prompt_ids == prompt_for(given, tokenizer, plain) == chat_prompt(given.messages[:2], tokenizer, plain)
    )
    for refused in (row(user("a"), bot("b"), user("c"), bot("d")), row(user("a"), bot("b"), tools=({"type": "f"},))):
        with pytest.raises(DataError, match="plain cannot render"):
            encode_row(refused, 0, tokenizer, plain)


def test_a_base_without_a_template_refuses_conversations_and_names_the_way_out(make: Make) -> None:
    with pytest.raises(DataError) as caught:
        encode_row(row(user("a"), bot("b")), 0, make(None), Rendering())
    assert "f.jsonl:7" in caught.value.fact
    assert "data.template=plain" in str(caught.value)


def test_what_a_template_raises_is_told_with_the_row(make: Make) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"f\.jsonl:7.*no system turns"):
        encode_row(row(system("s"), user("a"), bot("b")), 0, make(strict), Rendering())


def test_a_row_without_an_answer_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        encode_row(row(user("a")), 0, make(CHATML), Rendering())


# Control tokens inside messages


@pytest.mark.parametrize("token", list(CONTROL))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_control_token_inside_any_message_is_refused(token: str, place: int, make: Make) -> None:
    messages = [system("s"), user("a"), bot("b")]
    messages[place]["content"] += f" x{token}y"
    with pytest.raises(DataError) as caught:
        encode_row(row(*messages), 0, make(CHATML), Rendering())
    assert f"message {place + 1}" in caught.value.fact
    assert token in caught.value.fact
    assert "f.jsonl:7" in caught.value.fact


@pytest.mark.parametrize(
    "answer",
    [
        bot("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"q": "x<|im_end|>y"}}}]),
        bot("b", reasoning_content="x<|im_end|>y"),
    ],
    ids=["tool call", "reasoning"],
)
def test_a_control_token_cannot_cut_an_answer_from_beside_its_content(answer: dict[str, Any], make: Make) -> None:
    template = TOOLS.replace("m.role + '\n' + m.content", "m.role + '\n' + (m.reasoning_content or '') + m.content")
    with pytest.raises(DataError, match="control token"):
        encode_row(row(user("a"), answer), 0, make(template), Rendering())


@pytest.mark.base
def test_every_control_token_of_a_real_tokenizer_is_refused(real: Tokenizer) -> None:
    control = [token.content for token in real.hf.added_tokens_decoder.values() if token.special]
    assert len(control) == 17
    for token in control:
        with pytest.raises(DataError, match="control token"):
            encode_row(row(user("a"), bot(f"x{token}y")), 0, real, Rendering())


# Training renders what inference renders


TALK: list[list[dict[str, Any]]] = [
    [user("Hello, who are you?"), bot("I am a model.")],
    [system("Answer in JSON."), user("2 + 2?"), bot('{"sum": 4}')],
    [user("hi"), bot("Yes?"), user("Ünïcode 漢字 🙂\n\n  indented"), bot(" leading space"), user("?"), bot("\n")],
]


@pytest.mark.base
@pytest.mark.parametrize("messages", TALK)
def test_the_three_ways_to_a_prompt_agree_token_by_token(messages: list[Any], make: Make, real: Tokenizer) -> None:
    for tokenizer in (make(CHATML), make(MARKED), real):
        theirs = inference(tokenizer, messages[:-1])
        assert encode_row(row(*messages), 0, tokenizer, Rendering())[-1].prompt_ids == theirs
        assert prompt_for(row(*messages), tokenizer, Rendering()) == theirs
        assert chat_prompt(messages[:-1], tokenizer, Rendering()) == theirs


def test_chat_shows_an_earlier_answer_as_training_showed_it(make: Make) -> None:
    messages = [user("a"), bot("<think>t</think>b"), user("c"), bot("d")]
    for think in ("keep", "strip"):
        rendering = Rendering(think=think)  # type: ignore[arg-type]
        (example,) = encode_row(row(*messages), 0, make(CHATML), rendering)
        assert chat_prompt(messages[:-1], make(CHATML), rendering) == example.prompt_ids


def test_instructions_and_shots_stand_where_a_prompt_writer_would_put_them(make: Make) -> None:
    given = row(system("s"), user("q"), bot("SECRET"))
    shots = [row(system("other"), user("q1"), bot("a1")), row(user("q2"), bot("a2"))]
    ids = prompt_for(given, make(CHATML), Rendering(), instructions="Do it.", shots=shots)
    assert ids == spell(
        "<|im_start|>system\ns\n\nDo it.<|im_end|>\n"
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    bare = prompt_for(row(user("q"), bot("b")), make(CHATML), Rendering(), instructions="Do it.")
    assert bare == inference(make(CHATML), [system("Do it."), user("q")])


# For any conversation

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
spiky = words | st.sampled_from(["\n", "\n\nx", " ", "  a", "assistant", "user\n", "'ll", "1234", "\u0301", "🙂"])
pairs = st.lists(st.tuples(spiky, spiky), min_size=1, max_size=4)
conversations = st.tuples(st.none() | spiky, pairs).map(
    lambda drawn: ([system(drawn[0])] if drawn[0] else []) + [m for q, a in drawn[1] for m in (user(q), bot(a))]
)


def runs(example: Example) -> list[tuple[int, int]]:
    """Spans of learned tokens."""
    learned = [False, *(label != IGNORED for label in example.labels), False]
    edges = [at for at in range(len(learned) - 1) if learned[at] != learned[at + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


@settings(deadline=None, max_examples=60)
@given(conversations)
def test_any_conversation_is_rendered_whole_and_learned_in_its_answers_only(
    make: Make, messages: list[dict[str, Any]]
) -> None:
    tokenizer = make(CHATML)
    (example,) = encode_row(row(*messages), 0, tokenizer, Rendering())
    shown = segments(example, tokenizer)
    full = tokenizer.hf.apply_chat_template(messages, tokenize=False)
    assert "".join(text for text, _ in shown) == full[: full.rindex("<|im_end|>") + len("<|im_end|>")]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [text for text, learned in shown if learned] == [f"{answer}<|im_end|>" for answer in answers]
    assert example.labels.count(2) == len(answers)
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))


@pytest.mark.base
@settings(deadline=None, max_examples=60)
@given(conversations)
def test_before_every_answer_stands_what_inference_would_feed(real: Tokenizer, messages: list[dict[str, Any]]) -> None:
    assume(all(m["content"].strip() or m["role"] != "system" for m in messages))
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    examples = encode_row(row(*messages), 0, real, Rendering())
    spans = [(example, *span) for example in examples for span in runs(example)]
    assert len(spans) == len(turns)  # in one sequence or in one per answer, each answer is learned once
    for turn, (example, start, end) in zip(turns, spans, strict=True):
        assert example.input_ids[:start] == inference(real, messages[:turn])
        assert example.labels[start:end] == [*real.encode(messages[turn]["content"]), real.stop_ids[0]]


@pytest.mark.base
def test_an_answer_that_would_melt_into_its_prompt_gets_an_example_of_its_own(real: Tokenizer) -> None:
    messages = [user("a"), bot("\n\nb"), user("c"), bot("d")]
    together = real.encode("assistant\n" + "\n\nb")
    assert together != real.encode("assistant\n") + real.encode("\n\nb")  # else this test tests nothing
    examples = encode_row(row(*messages), 0, real, Rendering())
    assert [e.prompt_ids for e in examples] == [inference(real, messages[:turn]) for turn in (1, 3)]
    assert sum(label in real.stop_ids for e in examples for label in e.labels) == 2
