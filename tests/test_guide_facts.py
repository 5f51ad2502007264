"""What the guides state in figures and lists is what the results and the code have."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from peftkit.cli.main import app
from peftkit.serving.openai import asked
from peftkit.serving.spec import ServeSpec
from peftkit.training.spec import MEMORY_PRESETS, TrainSpec

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
SERVE, WHICH, MEMORY, FIRST, OWN = (
    (ROOT / f"docs/guide/{name}.md").read_text(encoding="utf-8")
    for name in ("serve", "which-method", "memory", "first-run", "own-data")
)


def strings_of_serving() -> set[str]:
    """Every short string in the server's code; read by pattern, as `ast` may fail in a process of several
    threads (python/cpython#106905)."""
    modules = list((ROOT / "peftkit/serving").rglob("*.py"))
    assert len(modules) > 15
    return {word for path in modules for word in re.findall(r'"([^"\n]*)"', path.read_text(encoding="utf-8"))}


def best(method: str) -> str:
    nll = json.loads((RESULTS / "methods_sweep.json").read_text())["methods"][method]["validation_nll"]
    return f"{min(nll.values()):.3f}"


def test_figures_of_methods() -> None:
    rows = dict(re.findall(r"^\| (`[^|]+`) \| [^|]+ \| ([^|]+) \|$", WHICH, re.MULTILINE))
    assert rows["`lora`"] == best("lora")
    assert rows["`loftq`"] == best("loftq")
    assert rows["`adalora`, `vera`"] == f"{best('adalora')}, {best('vera')}"
    assert (rows["`ia3`"], rows["`prompt_tuning`"]) == (best("ia3"), best("prompt_tuning"))
    close = sorted(best(name) for name in ("rslora", "dora", "lora_plus", "pissa", "eva", "oft"))
    said = next(text for methods, text in rows.items() if "rslora" in methods)
    assert said == f"{close[0]} to {close[-1]}, each at its best rate"
    table = (ROOT / "docs/decisions/0015-strategies-measured.md").read_text(encoding="utf-8")
    for arm, worse in (("top_7", "0.064"), ("norms", "0.074")):
        assert re.search(rf"^\| `{arm}` .* \+{worse} ", table, re.MULTILINE)
        assert worse in WHICH


def test_figures_of_bits() -> None:
    for line in map(json.loads, (RESULTS / "three_precisions.jsonl").read_text().splitlines()):
        before, after = line["answer_nll_before"]["point"], line["answer_nll_after"]["point"]
        (row,) = [text for text in WHICH.splitlines() if f"(`{line['recipe']}`)" in text and text.startswith("|")]
        assert f"{before:.3f} → {after:.3f}" in row


def test_figures_of_the_first_run() -> None:
    demo = json.loads((RESULTS / "demo_tickets.json").read_text())
    score = demo["figures"]["evaluation"]["after"]["score"]
    assert f"the adapter {round(score['mean'] * score['n'])} (95 %" in FIRST
    assert f"the same {score['n']} held-out mails" in FIRST
    assert f"with {score['n']} rows of which {round(score['mean'] * score['n'])} are right" in OWN


def test_presets_that_the_guide_names() -> None:
    for name in ("8gb", "12gb", "24gb", "cpu"):
        settings = MEMORY_PRESETS[name]
        rows = settings["train.per_device_train_batch_size"] * settings["train.gradient_accumulation_steps"]
        assert rows == 16
        assert f"`{name}`" in MEMORY
    assert [MEMORY_PRESETS[name]["data.max_length"] for name in ("8gb", "12gb", "24gb")] == [1024, 2048, 2048]
    assert TrainSpec().per_device_train_batch_size == 8


def test_limits_of_the_server() -> None:
    spec, rows = ServeSpec(), dict(re.findall(r"^\| ([^|]+) \| ([\d,]+ ?\w*) \|", SERVE, re.MULTILINE))
    assert rows["answered at once"] == str(spec.rows)
    assert rows["waiting beside them; the next gets 429 with `Retry-After`"] == str(spec.waiting)
    assert rows["body of a request"] == f"{spec.max_body_bytes >> 20} MiB"
    assert rows["tokens of an answer"] == f"{spec.max_new_tokens:,}"
    assert f"an answer has at most {spec.default_new_tokens}" in SERVE
    assert rows["time of an answer"] == f"{spec.request_seconds:g} s"
    assert rows["time for a request's head, and for its body"] == f"{spec.read_seconds:g} s"
    assert rows["time for a client to read a piece"] == f"{spec.write_seconds:g} s"
    assert rows["connections"] == str(spec.connections)
    assert rows["time for answers on their way after SIGTERM"] == f"{spec.drain_seconds:g} s"
    assert f"finish within {spec.drain_seconds:g} seconds" in SERVE
    assert spec.follow_seconds == 1


def test_every_error_code_of_the_server_is_listed() -> None:
    listed = {
        code for row in re.findall(r"^\| [45]\d\d.*$", SERVE, re.MULTILINE) for code in re.findall(r"`(\w+)`", row)
    }
    listed -= {"Retry"}
    modules = [path.read_text(encoding="utf-8") for path in (ROOT / "peftkit/serving").rglob("*.py")]
    said = {code for text in modules for code in re.findall(r'code="(\w+)"', text)}
    assert said <= listed
    assert listed <= strings_of_serving()


def test_what_a_request_may_hold_is_what_the_code_reads() -> None:
    source = inspect.getsource(asked)
    (refused,) = re.findall(r"\*\*Refused by name\*\*.*?sent: (.*?); parts", SERVE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", refused)) == set(re.findall(r'neutral\("(\w+)"', source))
    (heeded,) = re.findall(r"\*\*Heeded:\*\* (.*?)\. Without", SERVE, re.DOTALL)
    for name in re.findall(r"`([\w.]+)`", heeded):
        assert name.rpartition(".")[2] in strings_of_serving(), name


def test_metrics_that_are_listed() -> None:
    from peftkit.serving.metrics import Metrics

    class Idle:
        base, swaps = "tiny", 0

        def load(self) -> Any:
            from peftkit.serving.answering import Load

            return Load()

        def models(self) -> list[Any]:
            return []

    text = Metrics(Idle()).text().decode()  # type: ignore[arg-type]
    there = set(re.findall(r"^# TYPE (peftkit_\w+)", text, re.MULTILINE)) - set(
        re.findall(r"^# TYPE (\w+_created)", text, re.MULTILINE)
    )
    assert there == set(re.findall(r"`(peftkit_\w+)`", SERVE))


@pytest.mark.parametrize("name", ["serve.md", "first-run.md"])
def test_commands_outside_of_console_blocks_exist(name: str) -> None:
    """Lines of shell blocks and of the unit file, with their options."""
    text = (ROOT / "docs/guide" / name).read_text(encoding="utf-8")
    command: Any = get_command(app)
    lines = re.findall(r"^(?:ExecStart=\S+/)?peftkit (serve .*)$", text, re.MULTILINE)
    known = {option for parameter in command.commands["serve"].params for option in parameter.opts}
    assert all({word for word in line.split() if word.startswith("--")} <= known for line in lines)
    assert lines or name != "serve.md"
    listed = set(re.findall(r"\| `(--[\w-]+)` \|", text)) | set(re.findall(r"`(--allow-\w+)", text))
    assert listed <= known
