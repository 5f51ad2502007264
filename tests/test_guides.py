"""The guides are true: their commands exist, their Python runs with a tiny base in place of the Hub id."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli.published import factors, publish
from typer.main import get_command

from peftkit.cli.main import app, main
from peftkit.data.findings import rules as audit_rules
from peftkit.registry.store import Registry
from peftkit.training import watchdog_rules

GUIDES = Path(__file__).resolve().parents[1] / "docs/guide"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(GUIDES.glob("*.md"))}
README = (GUIDES.parents[1] / "README.md").read_text(encoding="utf-8")


def console_lines() -> list[str]:
    texts = "\n".join([*TEXTS.values(), README])
    lines = "\n".join(re.findall(r"```console\n(.*?)```", texts, re.DOTALL)).splitlines()
    return [line[2:].partition("  #")[0].strip() for line in lines if line.startswith("$ peftkit")]


def test_every_command_exists_with_its_options() -> None:
    commands: Any = get_command(app)
    lines = console_lines()
    assert len(lines) > 10
    for line in lines:
        _, name, *rest = shlex.split(line.partition(" -- ")[0])  # what follows is another program's
        command = commands.commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_the_python_of_the_registry_guide(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peftkit import AdapterSpec, BaseSpec, QuantSpec, Registry, inject, load_backbone
    from peftkit.recipe.fields import base_fields
    from peftkit.registry import Draft
    from peftkit.tuning.inject import save_adapter

    monkeypatch.chdir(tmp_path)
    backbone = load_backbone(BaseSpec(source=str(tiny_base)), QuantSpec(bits=4), tmp_path / "cache")
    payload = save_adapter(inject(backbone, AdapterSpec(r=2)), tmp_path / "payload")
    store = Registry(tmp_path / "adapters")
    for number in range(2):
        fields = {"kind": "peft", "base": base_fields(backbone), "metrics": {"other": {"n": number}}}
        store.publish(
            "tickets", payload, Draft.model_validate(fields), ["prod"][number:], base=backbone.identity.record
        )
    shutil.rmtree(payload)
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["registry.md"], re.DOTALL)
    exec(compile(code.replace("Qwen/Qwen3-4B", str(tiny_base)), "registry.md", "exec"), {})
    first, second = store.resolve("tickets").reference, store.resolve("tickets@prod").reference
    assert capsys.readouterr().out.splitlines() == [f"{first} {sorted([first, second])}", "LlamaForCausalLM"]


def test_the_python_of_the_guide_to_many_adapters(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        publish(tmp_path, tiny_base, "tickets", factors(tiny_base, 2, seed))
        shutil.rmtree(tmp_path / "payloads")
    store = Registry(tmp_path / "registry")
    newest = store.resolve("tickets").id
    older = next(version.id for version in store.versions("tickets") if version.id != newest)
    store.tag(f"tickets@{older}", "prod")
    (tmp_path / "registry").rename(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["many-adapters.md"], re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "many-adapters.md", "exec"), names)
    answered = [ticket.completion for ticket in names["tickets"]]
    assert [each.adapter for each in answered] == [f"tickets@{older}", f"tickets@{newest}", None]
    assert capsys.readouterr().out.startswith(answered[0].text)


def test_the_python_of_the_combining_guide(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("tickets", "tone")):
        publish(tmp_path, tiny_base, name, factors(tiny_base, 2, seed))
    (tmp_path / "registry").rename(tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS["combine-and-merge.md"], re.DOTALL)
    exec(compile(code, "combine-and-merge.md", "exec"), {})
    assert capsys.readouterr().out == "0.0 1.0 peft\n"


NO_WASTED_RUN = TEXTS["no-wasted-run.md"]
# https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json, what shapes need
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip


def shown_commands(text: str = NO_WASTED_RUN) -> list[tuple[str, list[str]]]:
    """Every command of a guide, that to a run without another, and the lines of output that are shown under it."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    parts = [part.splitlines() for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(first.partition("  #")[0].strip(), [line for line in rest if line.strip(" …")]) for first, *rest in parts]


def plain(text: str) -> str:
    """Tables are as wide as their contents, of which the guide shows a part."""
    return " ".join(text.split())


def ticket(number: int) -> tuple[str, str]:
    product = ("lamp", "kettle", "toaster", "fridge", "drill")[number % 5]
    fault = ("flickers", "leaks", "smells burnt", "hums at night", f"stopped after {number} days")[number // 5 % 5]
    question = f"Case {number}: my {product} {fault} since the {number}th."
    return question, json.dumps({"product": product, "fault": fault})


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the guide's files: tickets.jsonl with its faults, held.jsonl, benchmark.jsonl."""
    monkeypatch.chdir(tmp_path)
    for name in ("REGISTRY", "RUNS", "CACHE"):
        monkeypatch.setenv(f"PEFTKIT_{name}", str(tmp_path / name.lower()))
    rows = [ticket(number) for number in range(60)]
    rows[3] = rows[3][0], "TODO"
    rows[9] = f"{rows[9][0]} Write to ruth.amsel@marlow-bakery.de or call +49 30 901820.", rows[9][1]
    rows[12] = f"{rows[12][0]} My key is ghp_16C7e42F292c6912E7710c838347Ae178B4a.", rows[12][1]
    rows[17] = rows[4]
    rows[21] = f"Caf\u00c3\u00a9 in Z\u00c3\u00bcrich: {rows[21][0]}", rows[21][1]
    rows[25] = rows[25][0], '{"product": "lamp", '
    rows[30] = f"<|start_header_id|>user<|end_header_id|> {rows[30][0]}", rows[30][1]
    rows[33] = f"Dear {{{{customer_name}}}}, {rows[33][0]}", rows[33][1]
    held = [*(ticket(number) for number in range(60, 66)), ticket(2)]
    for name, pairs in (("tickets", rows), ("held", held), ("benchmark", [ticket(7)])):
        lines = [json.dumps({"prompt": question, "completion": answer}) + "\n" for question, answer in pairs]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_plans_that_are_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    shown = [*shown_commands(), *shown_commands(TEXTS["memory.md"])]
    plans = [(command, lines) for command, lines in shown if command.startswith("peftkit plan") and lines]
    assert len(plans) == 3
    for command, lines in plans:
        capfd.readouterr()
        main(shlex.split(command.replace("Qwen/Qwen3-8B", str(tmp_path)))[1:])
        out = plain("".join(capfd.readouterr()))
        changed = [line for line in lines if plain(line) not in out]
        assert not changed, f"{command} shows other figures now; write those of its output into the guide"


def test_the_audit_that_is_shown(faulty: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ((command, lines),) = [shown for shown in shown_commands() if shown[0].startswith("peftkit data check")]
    assert main(shlex.split(command.replace("Qwen/Qwen3-8B", str(tiny_base)))[1:]) == 1
    out = plain(capfd.readouterr().out)
    assert [line for line in lines if plain(line) not in out] == []
    assert "ruth.amsel" not in out + (faulty / "audit.html").read_text()


def test_the_commands_of_a_run_one_after_the_other(
    faulty: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run that is shown, resumed, looked at and removed; a second one to compare it with."""
    small = ["train.max_steps=1", "evaluate.max_new_tokens=2", "evaluate.max_generated_rows=1",
             "evaluate.retention_passages=1"]  # fmt: skip
    ids: list[str] = []
    commands = [command for command, _ in shown_commands() if not command.startswith(("peftkit plan", "peftkit data"))]
    assert len(commands) == 8
    for command in commands:
        for example, real in zip(("20261122-091732", "20261122-091758"), ids, strict=False):
            command = command.replace(example, real)
        arguments = shlex.split(command.replace("Qwen/Qwen3-8B", str(tiny_base)))[1:]
        if "--resume" not in arguments and arguments[0] == "train":
            for _ in range(2):
                assert main([*arguments, *small]) == 0, capfd.readouterr().err
            ids = sorted(path.name for path in (faulty / "runs").iterdir())
            assert len(ids) == 2
            status = faulty / "runs" / ids[0] / "status.json"  # the guide goes on with a run that was interrupted
            status.write_text(json.dumps({**json.loads(status.read_text()), "state": "interrupted", "saved_as": None}))
        else:
            assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
    assert (faulty / "report.html").stat().st_size > 1000
    assert (faulty / "both.html").stat().st_size > 1000
    assert [path.name for path in (faulty / "runs").iterdir()] == ids[1:]


def audit_table() -> str:
    """The rules of the audit as the guide has them."""
    lines = ["| rule | severity | what is found |", "|---|---|---|"]
    for rule in audit_rules.RULES.values():
        severity: str = rule.severity
        if rule.error_from is not None:
            severity += f"; an error from {100 * rule.error_from:.0f} % of the {rule.of} on"
        if rule.final:
            severity += ", not to be accepted"
        says = rule.says.format(rows="rows", share="…", detail="…").replace("<think>", "`<think>`")
        lines.append(f"| `{rule.id}` | {severity} | {says} |")
    return "\n".join(lines)


def watchdog_table() -> str:
    """The rules of the watchdog as the guide has them."""
    lines = ["| rule | does | when | because |", "|---|---|---|---|"]
    lines += [f"| `{r.id}` | {r.action}s | {r.threshold} | {r.reason} |" for r in watchdog_rules.RULES]
    return "\n".join(lines)


@pytest.mark.parametrize("table", [audit_table, watchdog_table])
def test_the_tables_of_rules_are_those_of_the_code(table: Any) -> None:
    assert table().count("\n") > 10
    assert f"\n\n{table()}\n\n" in NO_WASTED_RUN


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links, as GitHub and mkdocs make it."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", list(TEXTS))
def test_links_lead_somewhere(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = GUIDES / (path or name)
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_index_names_every_page() -> None:
    assert {name for name in TEXTS if f"({name})" not in TEXTS["index.md"]} == {"index.md"}


def test_figures_that_the_guide_to_a_run_names() -> None:
    """Numbers that the code decides are the code's."""
    from peftkit.training.bound import _MAY_CHANGE
    from peftkit.training.spec import TrainSpec

    assert f"`train.save_total_limit` ({TrainSpec().save_total_limit})" in NO_WASTED_RUN
    assert f"quiet for the next {watchdog_rules.QUIET} steps" in NO_WASTED_RUN
    (listed,) = re.findall(r"- \*\*May change\*\*: (.*?)\n- ", NO_WASTED_RUN, re.DOTALL)
    by_content = ("data.train", "data.mixture", "data.held_out", "data.against", "base.source", "base.revision")
    assert [key for key in _MAY_CHANGE if key not in by_content and key.removeprefix("train.") not in listed] == []
