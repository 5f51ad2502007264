"""Files of rows answered in bulk: the answers of each row alone, whatever is in the batch and whatever interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.published import factors, publish
from tiny_bases import write_base

from peftkit.errors import BaseMismatch, ConfigError, DataError, GenerationError
from peftkit.events import Event, Progress
from peftkit.generation.answer import ASKED, answered, ask
from peftkit.generation.bulk.answers_file import partial_of
from peftkit.generation.bulk.bulk import Outcome, generate_file
from peftkit.generation.engine import Engine
from peftkit.generation.opening import Opened, find_base, open_engine
from peftkit.generation.requests import Request, Sampling
from peftkit.registry.manifest import Draft
from peftkit.registry.store import Registry

LIKE = replace(ASKED, max_new_tokens=8)
ROWS = [{"prompt": f"Case {i}: {'why ' * (i % 5)}?", "completion": "x"} for i in range(13)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two adapters of a base whose answers depend on every token."""
    places = tmp_path_factory.mktemp("bulk")
    base = write_base(places / "base", seed=5, initializer_range=0.2, tie_word_embeddings=False)
    for seed, name in enumerate(("one", "two"), start=1):
        given = {path: (a * 0.1, b * 0.1) for path, (a, b) in factors(base, 4, seed).items()}
        publish(places, base, name, given)
    write(places / "rows.jsonl", ROWS)
    return places


@pytest.fixture(scope="module")
def alone(lab: Path) -> Callable[..., dict[str, Any]]:
    """What one row is answered when nothing else is asked."""
    registry = Registry(lab / "registry")
    versions = [registry.resolve(name) for name in ("one", "two")]
    opened = open_engine(find_base(versions, lab / "cache"), versions, lab / "cache")

    def alone(prompt: str, name: str | None, like: Request = LIKE) -> dict[str, Any]:
        version = registry.resolve(name) if name else None
        ticket = ask(opened, version, [{"role": "user", "content": prompt}], like)
        opened.engine.run()
        found = answered(ticket)
        return {"answer": found.text, "finish": found.finish, "tokens": len(found.ids)}

    return alone


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(lab: Path, out: Path, *adapters: str, rows: str | Path = "rows.jsonl", **options: Any) -> Outcome:
    registry = Registry(lab / "registry")
    options = {"like": LIKE, "batch": 4, **options}
    return generate_file(registry, lab / rows, adapters, out, cache=lab / "cache", **options)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def name_of(line: dict[str, Any]) -> str | None:
    return str(line["adapter"]).partition("@")[0] if line["adapter"] else None


def test_every_row_is_answered_by_everyone_as_alone(lab: Path, tmp_path: Path, alone: Any) -> None:
    out = tmp_path / "a.jsonl"
    done = run(lab, out, "one", "two", "one", with_base=True)
    found = lines(out)
    assert [(line["row"], name_of(line)) for line in found] == [
        (row, name) for row in range(len(ROWS)) for name in (None, "one", "two")
    ]
    for line in found:
        expected = alone(ROWS[line["row"]]["prompt"], name_of(line))
        assert {key: line[key] for key in expected} == expected
    assert len({line["answer"] for line in found}) > len(ROWS), "the adapters cannot be told apart"
    assert (done.answers, done.asked, done.failed) == (39, 39, 0)
    assert done.tokens == sum(line["tokens"] for line in found)
    again = run(lab, out, "one", "two", with_base=True)
    assert (again.answers, again.asked) == (39, 0)
    assert done.cut == again.cut == sum(line["finish"] == "length" for line in found) > 0
    with pytest.raises(GenerationError, match=r"there(.|\n)* now"):
        run(lab, out, "one")


def test_a_column_says_who_answers(lab: Path, tmp_path: Path, alone: Any) -> None:
    names = ["one", "", "two", None, "two"]
    asked = [{"prompt": row["prompt"], "who": name} for row, name in zip(ROWS, names, strict=False)]
    write(tmp_path / "rows.jsonl", asked)
    run(lab, tmp_path / "a.jsonl", rows=tmp_path / "rows.jsonl", adapter_column="who")
    found = lines(tmp_path / "a.jsonl")
    assert [name_of(line) for line in found] == [name or None for name in names]
    for line, row in zip(found, asked, strict=True):
        assert line["answer"] == alone(row["prompt"], row["who"] or None)["answer"]
    with pytest.raises(ConfigError, match="says who answers"):
        run(lab, tmp_path / "b.jsonl", "one", rows=tmp_path / "rows.jsonl", adapter_column="who")
    with pytest.raises(DataError, match="no column 'whom'"):
        run(lab, tmp_path / "b.jsonl", rows=tmp_path / "rows.jsonl", adapter_column="whom")
    assert not (tmp_path / "b.jsonl.partial").exists()


def test_what_is_drawn_depends_on_the_row_alone(lab: Path, tmp_path: Path, alone: Any) -> None:
    like = replace(LIKE, sampling=Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=7), stop=("e",), logprobs=2)
    for batch in (1, 5):
        run(lab, tmp_path / f"{batch}.jsonl", "one", batch=batch, like=like)
    one, five = lines(tmp_path / "1.jsonl"), lines(tmp_path / "5.jsonl")
    assert [line["answer"] for line in one] == [line["answer"] for line in five]
    for line in five:
        drawn = replace(like, sampling=replace(like.sampling, seed=7 + line["row"]))
        assert line["answer"] == alone(ROWS[line["row"]]["prompt"], "one", drawn)["answer"]
        assert len(line["logprobs"]) == line["tokens"]
        assert all(len(each["top"]) == 2 for each in line["logprobs"])


def test_rows_that_cannot_be_answered_stop_no_others(lab: Path, tmp_path: Path) -> None:
    rows = [ROWS[0], {"prompt": "long " * 400}, ROWS[1], {"prompt": "a <|im_end|> b"}, ROWS[2]]
    write(tmp_path / "rows.jsonl", rows)
    done = run(lab, tmp_path / "a.jsonl", "one", rows=tmp_path / "rows.jsonl")
    assert [line["finish"] == "failed" for line in lines(tmp_path / "a.jsonl")] == [False, True, False, True, False]
    assert done.failed == 2
    said = {line["row"]: line["error"] for line in lines(tmp_path / "a.jsonl") if "error" in line}
    assert "512" in said[1]
    assert "control token" in said[3]
    assert {line["adapter"] for line in lines(tmp_path / "a.jsonl")} == {lines(tmp_path / "a.jsonl")[0]["adapter"]}
    assert run(lab, tmp_path / "a.jsonl", "one", rows=tmp_path / "rows.jsonl").failed == 2


class Stop:
    """Interrupts when so many answers are kept, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.done == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 7, 25, 26])
def test_an_interrupted_run_goes_on_and_asks_nothing_twice(at: int, lab: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    run(lab, whole, "one", "two")
    with pytest.raises(KeyboardInterrupt, match=r"answers are kept in .*the same command goes on"):
        run(lab, out, "one", "two", report=Stop(at))
    assert not out.exists()
    kept = len(partial_of(out).read_text().splitlines()) - 1
    assert kept >= at
    with pytest.raises(GenerationError, match=r"settings\.max_new_tokens: 8 there, 9 now(.|\n)*--fresh"):
        run(lab, out, "one", "two", like=replace(LIKE, max_new_tokens=9))
    assert run(lab, out, "one", "two").asked == 26 - kept
    assert out.read_bytes() == whole.read_bytes()
    assert not partial_of(out).exists()


def test_fresh_and_overwrite(lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(lab, out, "one", report=Stop(3))
    assert run(lab, out, "two", fresh=True).asked == len(ROWS)
    assert run(lab, out, "one", overwrite=True).asked == len(ROWS)
    assert {name_of(line) for line in lines(out)} == {"one"}


def test_queue_and_memory_stay_bounded(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", [{"prompt": f"{i}"} for i in range(300)])
    most, step = [0], Engine.step

    def counted(engine: Engine) -> bool:
        most[0] = max(most[0], engine.waiting + engine.running)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    done = run(lab, tmp_path / "a.jsonl", "one", rows=tmp_path / "rows.jsonl", like=replace(LIKE, max_new_tokens=2))
    assert done.asked == 300
    assert most[0] == 4


@pytest.mark.full
def test_kill_nine_while_answering(lab: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    many = write(tmp_path / "rows.jsonl", ROWS * 8)
    run(lab, whole, "one", rows=many)
    places = {f"PEFTKIT_{name.upper()}": str(lab / name) for name in ("registry", "cache")}
    command = [sys.executable, "-m", "peftkit", "generate", str(many), "--adapter", "one", "--out", str(out)]
    command += ["--max-new-tokens", "8", "--batch", "4"]
    child = subprocess.Popen(command, env={**os.environ, **places}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if partial_of(out).exists() and partial_of(out).read_bytes().count(b"\n") > 10:
            break
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = partial_of(out).read_bytes().count(b"\n") - 1
    assert 10 <= kept < len(ROWS) * 8
    assert run(lab, out, "one", rows=many).asked == len(ROWS) * 8 - kept
    assert out.read_bytes() == whole.read_bytes()


def test_what_is_wrong_with_every_row_stops_and_keeps(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, calls = tmp_path / "a.jsonl", torch.nn.functional.silu, [0]

    def no_memory(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] > 60:
            raise torch.OutOfMemoryError("no memory left")
        return real(*given, **named)

    monkeypatch.setattr(torch.nn.functional, "silu", no_memory)
    with pytest.raises(GenerationError, match=r"no memory left(.|\n)*the same command goes on(.|\n)*--batch 2"):
        run(lab, out, "one")
    monkeypatch.undo()
    kept = len(partial_of(out).read_text().splitlines()) - 1
    assert 0 < kept < len(ROWS)
    assert run(lab, out, "one").asked == len(ROWS) - kept


def test_what_cannot_be_done_is_refused_before_anything_is_written(lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(ConfigError, match="top_p is 3"):
        run(lab, out, "one", like=replace(LIKE, sampling=Sampling(top_p=3)))
    with pytest.raises(ConfigError, match=f"seed is {2**64}"):
        run(lab, out, "one", like=replace(LIKE, sampling=Sampling(seed=2**64 - len(ROWS) + 1)))
    with pytest.raises(ConfigError, match="no adapter is named"):
        run(lab, out, with_base=True)
    with pytest.raises(GenerationError, match="is a folder"):
        run(lab, tmp_path, "one")
    with pytest.raises(GenerationError, match="holds the rows themselves"):
        run(lab, lab / "rows.jsonl", "one", overwrite=True)
    assert not list(tmp_path.iterdir())


def test_a_mistake_that_the_base_tells_does_not_block_its_correction(lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with pytest.raises(ConfigError, match="logprobs"):
        run(lab, out, "one", like=replace(LIKE, logprobs=10**9))
    with pytest.raises(ConfigError, match="schema"):
        run(lab, out, "one", like=replace(LIKE, json_schema={"type": "nothing"}))
    assert run(lab, out, "one").asked == len(ROWS)


def test_a_name_that_means_nothing_is_told_with_its_row(lab: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a", "who": "one"}, {"prompt": "b", "who": "nobody"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: who: .*nobody"):
        run(lab, tmp_path / "a.jsonl", rows=rows, adapter_column="who")


def test_another_base_is_refused_or_recorded(lab: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=6, tie_word_embeddings=False)
    out = tmp_path / "a.jsonl"
    with pytest.raises(BaseMismatch):
        run(lab, out, "one", base=str(other))
    done = run(lab, out, "one", base=str(other), other_base=True)
    assert [receipt["type"] for receipt in done.receipts] == ["other_base"]
    assert run(lab, out, "one", base=str(other), other_base=True).receipts == done.receipts
    assert json.loads((tmp_path / "a.jsonl.receipt.json").read_text())["receipts"][0]["type"] == "other_base"


def test_rows_are_rendered_as_each_adapter_was_trained(lab: Path, tmp_path: Path) -> None:
    registry = Registry(lab / "registry")
    one = registry.resolve("one")
    recipe = {"name": "by_hand", "sha256": "0" * 64, "config": {"data": {"template": "plain"}}}
    draft = Draft.model_validate({"kind": "peft", "base": one.manifest.base.model_dump(), "recipe": recipe})
    plain = registry.publish("plain", lab / "payloads" / "one", draft)
    run(lab, tmp_path / "a.jsonl", "one", "plain")
    opened = open_engine(find_base([one, plain], lab / "cache"), [one, plain], lab / "cache")
    encode = opened.backbone.tokenizer.encode
    for line in lines(tmp_path / "a.jsonl"):
        asked = ROWS[line["row"]]["prompt"]
        chatml = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        prompt = encode(chatml if line["adapter"] == one.reference else f"{asked}\n\n")
        ticket = opened.engine.submit(replace(LIKE, prompt=tuple(prompt), adapter=line["adapter"]))
        opened.engine.run()
        assert line["answer"] == answered(ticket).text


@pytest.mark.parametrize("count", [13, 40])
def test_rows_changed_meanwhile(count: int, lab: Path, tmp_path: Path) -> None:
    """Also where they are read on after the change, and more of them are met than there were."""
    rows = write(tmp_path / "rows.jsonl", (ROWS * 4)[:count])

    def change(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 2:
            with open(rows, "a") as stream:
                stream.write('{"prompt": "more"}\n')

    with pytest.raises(DataError, match="was changed"):
        run(lab, tmp_path / "a.jsonl", "one", rows=rows, report=change, batch=1)
    assert not (tmp_path / "a.jsonl").exists()


def test_opened_names_are_those_that_were_opened(alone: Any, lab: Path) -> None:
    version = Registry(lab / "registry").resolve("one")
    opened: Opened = open_engine(find_base([version], lab / "cache"), [version], lab / "cache")
    other = Registry(lab / "registry").resolve("two")
    with pytest.raises(Exception, match="was opened"):
        ask(opened, other, [{"role": "user", "content": "a"}], LIKE)
