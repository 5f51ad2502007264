"""`peftkit generate` and `peftkit chat` as a user types them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.generation.bulk.answers_file import partial_of

Cli = Callable[..., tuple[int, str, str]]
FEW = ("--max-new-tokens", "4")
TRIED = 8  # more tokens in one pass are a prompt's: with fewer a base is tried

pytestmark = pytest.mark.usefixtures("adapters")


def reply(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def rows(places: Path) -> Path:
    (places / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Case {i}?"}) + "\n" for i in range(5)))
    return places / "rows.jsonl"


def test_a_prompt_is_answered_by_everyone(cli: Cli, places: Path) -> None:
    asked = ("generate", "hello", "--adapter", "tickets", "--adapter", "tone", "--with-base", "--json", *FEW)
    value = reply(cli(*asked, "--logprobs", "2", "--top-p", "0.9", "--top-k", "20", "--temperature", "1"))
    names = [each["adapter"] and each["adapter"].partition("@")[0] for each in value["answers"]]
    assert names == [None, "tickets", "tone"]
    for each in value["answers"]:
        assert len(each["logprobs"]) == each["tokens"]
        assert all({"id", "token", "logprob", "top"} == set(token) for token in each["logprobs"])
    code, out, err = cli(*asked[:-3], *FEW)
    assert (code, out.count("@"), out.startswith("base:\n")) == (0, 2, True), err
    assert "were cut off at --max-new-tokens 4" in err


def test_a_stop_string_and_a_schema(cli: Cli, places: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    (places / "schema.json").write_text(json.dumps(schema))
    asked = ("generate", "hello", "--adapter", "tickets", "--json", "--max-new-tokens", "80")
    (answer,) = reply(cli(*asked, "--json-schema", "schema.json"))["answers"]
    assert json.loads(answer["answer"])["a"] in (1, 2)
    code, _, err = cli(*asked[:-2], "--json-schema", "schema.json", "--max-new-tokens", "2")
    assert (code, "cut off is not valid JSON" in err) == (0, True), err
    (answer,) = reply(cli(*asked, "--json-schema", "schema.json", "--stop", "a", "--stop", "b"))["answers"]
    assert (answer["finish"], "a" in answer["answer"]) == ("stop", False)
    for content, said in (("[1]", "a schema is an object"), ("{", "is not JSON")):
        (places / "schema.json").write_text(content)
        code, _, err = cli(*asked, "--json-schema", "schema.json")
        assert (code, said in err) == (1, True), err


def test_a_file_is_answered_row_by_row_and_once(cli: Cli, rows: Path) -> None:
    asked = ("generate", "rows.jsonl", "--adapter", "tickets", "--adapter", "tone", "--out", "a.jsonl", *FEW)
    code, out, err = cli(*asked)
    assert (code, "10 answers; 10 were asked now" in out) == (0, True), err
    lines = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert f"{sum(line['finish'] == 'length' for line in lines)} of 10 answers were cut off at" in out
    assert [line["row"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert "already answered" in cli(*asked)[1]
    assert reply(cli(*asked, "--overwrite", "--batch", "2", "--json"))["asked"] == 10
    code, _, err = cli(*asked, "--seed", "1")
    assert (code, "settings.sampling.seed: 0 there, 1 now" in err, "--overwrite" in err) == (1, True, True)


def test_a_column_names_the_adapter(cli: Cli, places: Path) -> None:
    (places / "rows.csv").write_text("prompt,adapter\na,tone\nb,\nc,tickets\n")
    asked = ("generate", "rows.csv", "--adapter-column", "adapter", "--out", "a.jsonl", *FEW)
    assert reply(cli(*asked, "--json"))["answers"] == 3
    names = [json.loads(line)["adapter"] for line in Path("a.jsonl").read_text().splitlines()]
    assert [name and name.partition("@")[0] for name in names] == ["tone", None, "tickets"]


def test_failed_rows_are_counted_and_end_with_one(cli: Cli, rows: Path) -> None:
    with open(rows, "a") as stream:
        stream.write(json.dumps({"prompt": "long " * 500}) + "\n")
    asked = ("generate", "rows.jsonl", "--adapter", "tickets", "--out", "a.jsonl", *FEW)
    code, out, _ = cli(*asked)
    assert (code, "1 of 6 could not be answered, first row 5" in out) == (1, True)
    assert cli(*asked)[0] == 1


def test_ctrl_c_says_how_to_go_on(cli: Cli, rows: Path) -> None:
    asked = ("generate", "rows.jsonl", "--adapter", "tickets", "--out", "a.jsonl", "--batch", "1", *FEW)
    with interrupt_after(12):
        code, _, err = cli(*asked)
    assert (code, "the same command goes on" in err, "a.jsonl.partial" in err) == (130, True, True), err
    kept = len(partial_of(Path("a.jsonl")).read_text().splitlines()) - 1
    assert 0 < kept < 5
    assert reply(cli(*asked, "--json"))["asked"] == 5 - kept


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["rows.jsonl"], 2, "name at least one adapter"),
        (["rows.jsonl", "--adapter", "tone"], 2, "say where the answers go"),
        (["row.jsonl", "--adapter", "tone", "--out", "a"], 1, "near it: rows.jsonl"),
        (["row.csv.gz", "--adapter", "tone"], 1, "row.csv.gz: no such file"),
        (["ROW.JSONL", "--adapter", "tone"], 1, "ROW.JSONL: no such file"),
        (["hello", "--adapter", "tone", "--batch", "4"], 2, "no file of rows"),
        (["hello", "--adapter", "tone", "--logprobs", "0"], 2, "with --json only"),
        (["rows.jsonl", "--adapter", "tone", "--out", ""], 1, "--out answers.jsonl"),
        ([os.fsdecode(b"\xff bad"), "--adapter", "tone"], 1, "half a character"),
        (["hello", "--adapter", "tone", "--system", os.fsdecode(b"\xff")], 1, "half a character"),
        (["hello", "--adapter", "tone", "--out", "a"], 2, "no file of rows"),
        (["hello", "--adapter", "tone", "--fresh"], 2, "no file of rows"),
        (["rows.jsonl", "--adapter", "tone", "--out", "a", "--system", "x"], 2, "column 'system'"),
        (["hello", "--adapter", "tone", "--top-p", "0"], 1, "top_p is 0"),
        (["rows.jsonl", "--adapter", "nobody", "--out", "a"], 1, "nobody"),
        (["rows.jsonl", "--adapter", "tone", "--out", "rows.jsonl", "--overwrite"], 1, "holds the rows themselves"),
        (["hello", "--adapter", "tone", "--json-schema", "no.json"], 1, "no.json cannot be read"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], code: int, said: str, cli: Cli, rows: Path) -> None:
    result = cli("generate", *arguments, *FEW)
    assert result[0] == code
    assert said in result[2].replace("\n", " ")


def test_a_sentence_that_ends_like_a_file_is_a_prompt(cli: Cli) -> None:
    assert reply(cli("generate", "What is in rows.jsonl", "--adapter", "tone", "--json", *FEW))["answers"]


class interrupt_after:
    """Ctrl-C during the forward pass with this number; counts the tokens that every pass reads."""

    def __init__(self, number: int | None = None) -> None:
        self.number, self.tokens = number, list[int]()

    def __enter__(self) -> interrupt_after:
        self.hook = torch.nn.modules.module.register_module_forward_pre_hook(self._count)
        return self

    def __exit__(self, *given: object) -> None:
        self.hook.remove()

    def _count(self, module: Any, given: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            self.tokens.append(given[0].numel())
            if len(self.tokens) == self.number:
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What is typed at the prompt; an exception is raised there."""

    def typed(*lines: str | BaseException) -> None:
        left: Iterator[str | BaseException] = iter(lines)

        def read(prompt: str) -> str:
            line = next(left)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return typed


def test_the_next_turn_reads_only_what_is_new(cli: Cli, typed: Callable[..., None]) -> None:
    long = "word " * 30
    typed(long, "and?", "/tone", "and?", "/tickets", "so?", "/quit")
    with interrupt_after() as counted:
        code, _, err = cli("chat", "tickets", "tone", "--max-new-tokens", "1")
    assert code == 0, err
    first, second, swapped, back = (tokens for tokens in counted.tokens if tokens > TRIED)
    assert first > len(long)
    assert second < 60
    assert swapped > first, "another adapter has other keys and values"
    assert back < 120


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_comes_as_it_is_generated_where_somebody_watches(
    terminal: bool, cli: Cli, typed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    printed: list[str] = []
    real = Console.print

    def noted(self: Console, *given: Any, **options: Any) -> None:
        printed.append("".join(given))
        real(self, *given, **options)

    monkeypatch.setattr(Console, "print", noted)
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: terminal))
    typed("hi", "/quit")
    code, out, _ = cli("chat", "tickets", "--max-new-tokens", "12")
    assert code == 0
    begun = next(at for at, text in enumerate(printed) if text.startswith("talking to"))
    assert (len(printed) - begun > 4) == terminal
    streamed = "".join(printed[begun + 1 :])
    assert streamed in out
    assert "\x1b" not in streamed


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(cli: Cli, typed: Callable[..., None]) -> None:
    typed("hi", "go on", KeyboardInterrupt())
    with interrupt_after(6) as counted:
        code, out, err = cli("chat", "tickets", "--max-new-tokens", "20")
    assert code == 130
    assert "Traceback" not in out + err
    again = [at for at, tokens in enumerate(counted.tokens) if tokens > TRIED]
    assert len(again) == 2
    assert again[1] == 6, "the answer did not end with the pass that Ctrl-C came in"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_leaves_no_part_of_a_single_answer(cli: Cli) -> None:
    with interrupt_after(6):
        code, out, _ = cli("chat", "tickets", "--prompt", "hi", "--json", "--max-new-tokens", "20")
    assert (code, out) == (130, "")


@pytest.mark.parametrize("command", [("generate", "hi", "--adapter", "tickets"), ("chat", "tickets", "--prompt", "hi")])
def test_no_memory_is_no_bug(command: tuple[str, ...], cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.generation.engine import Engine

    submit = Engine.submit

    def no_memory(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    def submitted(*given: Any) -> Any:
        monkeypatch.setattr(torch.nn.functional, "silu", no_memory)
        return submit(*given)

    monkeypatch.setattr(Engine, "submit", submitted)
    code, _, err = cli(*command, *FEW)
    assert (code, "answering stopped: OutOfMemoryError: no memory left" in err) == (1, True), err


def test_an_adapter_with_the_name_of_a_command_is_reached(cli: Cli, places: Path, tiny_base: Path, typed: Any) -> None:
    from cli.published import factors, publish

    reference = publish(places, tiny_base, "new", factors(tiny_base, 4, 1), alpha=8).reference
    typed("/new", f"/{reference}", "/base", "/quit")
    _, out, _ = cli("chat", "tickets", "new", *FEW)
    assert "no adapter named" not in out
    typed("/quit")
    assert f"talking to {reference}" in cli("chat", "new", *FEW)[1]


def test_chat_answers_once_and_swaps(cli: Cli, typed: Callable[..., None]) -> None:
    answer = reply(cli("chat", "tickets", "--prompt", "hi", "--json", *FEW))
    assert answer["adapter"].startswith("tickets@")
    assert (answer["finish"], answer["receipts"]) == ("length", [])
    assert cli("chat", "tickets", "--json")[0] == 2
    typed("/nobody", "/base", "a <|im_end|> b", os.fsdecode(b"\xff"), "hi", "/new", EOFError())
    code, out, err = cli("chat", "tickets", "tone", *FEW)
    assert code == 0, err
    assert "no adapter named 'nobody'" in out
    assert "control token" in out
    assert "half a character" in out
