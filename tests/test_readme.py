"""Every code block of the README runs, with a tiny base in place of the Hub id."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bases import write_base

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
HUB_ID = "Qwen/Qwen3-4B"


def block(language: str, containing: str) -> str:
    found = [text for kind, text in BLOCKS if kind == language and containing in text]
    assert len(found) == 1, f"README has {len(found)} {language} blocks with {containing!r}"
    return found[0]


def test_every_block_is_covered_here() -> None:
    assert sorted(kind for kind, _ in BLOCKS) == [
        "",
        "console",
        "console",
        "console",
        "console",
        "console",
        "json",
        "python",
    ]


def test_make_targets_exist() -> None:
    lines = block("console", "make demo").splitlines()
    targets = [line.split()[2] for line in lines if line.startswith("$ make")]
    assert targets == ["demo", "test"]
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_own_rows(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """The commands for a user's own rows work one after the other."""
    from peftkit.cli.main import main

    monkeypatch.chdir(tmp_path)
    for name in ("REGISTRY", "RUNS", "CACHE"):
        monkeypatch.setenv(f"PEFTKIT_{name}", str(tmp_path / name.lower()))
    rows = [json.loads(line) for line in block("json", "messages").splitlines()]
    text = "".join(
        json.dumps({"messages": [{**rows[i % 2]["messages"][0], "content": f"Case {i}."}, rows[i % 2]["messages"][1]]})
        + "\n"
        for i in range(12)
    )
    (tmp_path / "tickets.jsonl").write_text(text)
    commands = [line[2:] for line in block("console", "data preview").splitlines() if line.startswith("$ ")]
    assert len(commands) == 6
    for command in commands:
        arguments = shlex.split(command.replace(HUB_ID, str(tiny_base)))[1:]
        if arguments[0] in ("plan", "train"):
            arguments += ["train.max_steps=1", "evaluate.max_new_tokens=4", "data.max_length=512"]
        if arguments[0] == "chat":
            arguments += ["--max-new-tokens", "4"]
        assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
    assert "tickets" in capfd.readouterr().out


def test_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The commands of other methods get as far as a dry run goes: planned, loaded, injected, tried."""
    from peftkit.cli.main import main

    base = write_base(tmp_path / "base", num_hidden_layers=8)
    monkeypatch.chdir(tmp_path)
    for name in ("REGISTRY", "RUNS", "CACHE"):
        monkeypatch.setenv(f"PEFTKIT_{name}", str(tmp_path / name.lower()))
    lines = [json.dumps({"prompt": f"Case {i}.", "completion": str(i * i)}) + "\n" for i in range(12)]
    (tmp_path / "tickets.jsonl").write_text("".join(lines))
    commands = [line[2:] for line in block("console", "top_layers_sft").splitlines() if line.startswith("$ ")]
    assert len(commands) == 3
    for command in commands:
        arguments = [*shlex.split(command.replace(HUB_ID, str(base)))[1:], "evaluate.max_generated_rows=0", "--dry-run"]
        assert main(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
    assert "top_layers top_layers=2" in capfd.readouterr().out


def test_python_block(tiny_base: Path, tmp_path: Path) -> None:
    code = block("python", "load_backbone").replace(HUB_ID, str(tiny_base))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ [0-9a-f]{12}\n", done.stdout)


def test_the_tree_names_every_module() -> None:
    tree = block("", "peftkit/\n")
    modules = [
        p for p in (ROOT / "peftkit").rglob("*.py") if p.name not in ("__init__.py", "__main__.py", "version.py")
    ]
    assert len(modules) > 40, "module discovery is broken"
    folders_as_a_whole = (
        "config",
        "cli",
        "intake",
        "exchange",
        "reading",
        "combining",
        "previewing",
        "merging",
        "export",
        "regularize",
        "trunk",
        "passes",
        "bank",
        "fleet",
        "bulk",
        "tasks",
        "preference",
        "distil",
        "explaining",
        "behaviour",
        "work",
        "sweeping",
        "few_shot",
        "openai",
        "http",
        "vllm",
        "page",
    )
    missing = [
        str(p.relative_to(ROOT))
        for p in modules
        if p.parent.name not in folders_as_a_whole and not re.search(rf"\b{re.escape(p.name)}\b", tree)
    ]
    assert not missing


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"@[A-Z]+@|TODO|TBD", README)


def test_measured_figures_stand_in_the_results() -> None:
    """The table's figures are those of the committed results, rounded as shown."""
    lines = [json.loads(line) for line in (ROOT / "benchmarks/results/three_precisions.jsonl").read_text().splitlines()]
    assert [line["recipe"] for line in lines] == ["qlora_sft", "lora8bit_sft", "lora_sft"]
    for line in lines:
        (row,) = [text for text in README.splitlines() if text.startswith(f"| `{line['recipe']}`")]
        change = line["answer_nll_change"]
        shown = f"−{-change['point']:.3f} [−{-change['low']:.3f}, −{-change['high']:.3f}]"
        assert shown in row
        assert change["high"] < 0
        assert f"{line['answer_nll_before']['point']:.3f} → {line['answer_nll_after']['point']:.3f}" in row
        assert line["stopped_after"] >= 0.9
    demo = json.loads((ROOT / "benchmarks/results/demo_tickets.json").read_text())
    score = demo["figures"]["evaluation"]["after"]["score"]
    assert f"{round(score['mean'] * score['n'])} of {score['n']} held-out mails" in README
    full = json.loads((ROOT / "benchmarks/results/demo_full.json").read_text())
    for task, what in zip(full["tasks"], ("held-out mails", "queries"), strict=True):
        score = task["figures"]["evaluation"]["after"]["score"]
        assert f"{round(score['mean'] * score['n'])} of {score['n']} {what}" in " ".join(README.split())


def test_figures_of_plan_and_audit_stand_in_the_results() -> None:
    text = " ".join(README.split())
    ledger = json.loads((ROOT / "benchmarks/results/plan_ledger.json").read_text())
    for part, cells in (("development", 176), ("kept_out", 64)):
        peak = ledger[part]["summary of cells"]["peak"]
        assert (peak["cells"], peak["within"]) == (cells, 1.0)
        assert f"all {cells} " in text
    kept = ledger["kept_out"]["summary of cells"]["kept"]
    worst = min(case["error"] for case in ledger["kept_out"]["summary of cells"]["allocated"]["worst"])
    assert f"worst −{-worst:.1%}".replace("%", " %") in text
    assert f"activations on {round(kept['within'] * kept['cells'])} of the {kept['cells']}" in text
    published = json.loads((ROOT / "benchmarks/results/plan_published.json").read_text())["summary"]
    assert f"{published['within']} of {published['scored']} published figures" in text
    assert f"{published['training_within']} of the {published['training_scored']} of training" in text
    audit = json.loads((ROOT / "benchmarks/results/audit.json").read_text())
    assert f"all {audit['planted']['faults']} faults" in text
    assert audit["planted"]["found"] == audit["planted"]["faults"]
    assert audit["planted"]["alarms_on_twins"] == {}
    (large,) = [run for run in audit["time"] if run["rows"] == 100_000]
    assert f"({large['tokens'] / 1e6:.1f} million tokens) in {large['seconds']:.0f} s" in text


def test_every_command_is_in_the_table() -> None:
    from typer.main import get_command

    from peftkit.cli.main import app

    names = sorted(get_command(app).commands)
    assert len(names) == 34
    missing = [name for name in names if not re.search(rf"`(peftkit )?{name}\b", README)]
    assert not missing


def results(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (ROOT / "benchmarks/results" / name).read_text().splitlines()]


def test_figures_of_swapping_and_of_the_registry_stand_in_the_results() -> None:
    swaps = {line["what"]: float(str(line["p50_ms"])) for line in results("swap.jsonl") if line["bits"] == 32}
    disk, hotswap = swaps["from disk: detach, attach, activate"], swaps["PEFT hotswap_adapter"]
    for shown in (
        f"takes {1000 * swaps['resident swap']:.1f} µs, PEFT's `set_adapter` {swaps['PEFT set_adapter']:.1f} ms",
        f"{disk:.0f} ms against {hotswap:.0f} ms of PEFT's",
        f"reading and hashing the file alone takes {swaps['floor: read, SHA-256, parse']:.0f} ms",
        f"first adapter of a shape takes {swaps['from disk, first of its shape']:.0f} ms",
    ):
        assert shown in " ".join(README.split())
    many = {line["operation"]: line for line in results("registry.jsonl") if line["versions"] == 10_000}
    for shown in (
        f"publishes in {many['publish']['p50_ms']:.1f} ms with 10,000 versions",
        f"`list` takes {float(str(many['list']['p50_ms'])) / 1000:.1f} s then",
        f"reads {float(str(many['list']['bytes_read'])) / 1e6:.0f} MB",
        f"`resolve` {many['resolve name']['p50_ms']:.1f} ms",
    ):
        assert shown in " ".join(README.split())


def test_the_table_of_crashes_is_that_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks/results/registry_faults.json").read_text())
    cells = re.findall(r"^\| .*? \| ([\d,]+) \| ([\d,]+) \| (\d+) \|$", README, flags=re.MULTILINE)
    assert len(cells) == 4
    for column, key in enumerate(("points", "states", "bad")):
        assert sum(int(row[column].replace(",", "")) for row in cells) == found["total"][key]
    assert found["total"]["bad"] == 0
    assert f"{sum(found['sequences'].values()):,} sequences" in README


def test_figures_of_merging_stand_in_the_results() -> None:
    text = " ".join(README.split())
    zone = json.loads((ROOT / "benchmarks/results/dead_zone.json").read_text())["bits"]["4"]
    lines = {line["way"]: line for line in zone}
    peft, stochastic = lines["PEFT merge_and_unload"], lines["onto dequantized nf4, quantized again at random"]
    assert f"keeps {peft['kept']:.1%} of the demo's adapter".replace("%", " %") in text
    assert f"from {lines['base + adapter']['answer_nll']:.3f} to {peft['answer_nll']:.2f}" in text
    assert f"{stochastic['kept']:.1%} ({stochastic['answer_nll']:.3f})".replace("%", " %") in text
    dense = lines["onto dequantized nf4, bfloat16"]
    assert f"{dense['kept']:.1%} ({dense['answer_nll']:.3f})".replace("%", " %") in text
    ways = json.loads((ROOT / "benchmarks/results/merge.json").read_text())["ways"]
    for way in ("ours", "peft"):
        assert f"{ways[way]['seconds']:.1f} s and {ways[way]['peak_megabytes_above_imports']:,.0f} MB" in text
    assert f"copy with fsync {ways['copy']['seconds']:.1f} s" in text
    mutants = json.loads((ROOT / "benchmarks/results/mutants.json").read_text())
    assert f"{len(mutants['bugs'])} planted bugs" in (ROOT / "CHANGELOG.md").read_text()
    assert len(mutants["bugs"]) >= 65


def test_figures_of_serving_stand_in_the_results() -> None:
    lines = json.loads((ROOT / "benchmarks/results/serving.json").read_text())["mechanisms"]["lines"]
    step = {line["way"]: line for line in lines if line["what"] == "decode"}
    bank, peft = step["bank 16"], step["peft adapter_names 16"]
    assert f"runs at {bank['of_base_speed']:.2f} of the speed of the base alone" in README
    assert f"{peft['ms'] / bank['ms']:.1f} times as fast as PEFT's mixed batch" in README


def test_figures_of_the_server_stand_in_the_results() -> None:
    lines = json.loads((ROOT / "benchmarks/results/server.json").read_text())["lines"]
    found = {(line["what"], line["clients"]): line for line in lines}
    shown = re.findall(r"^\| (peftkit serve, [^|]+|transformers serve[^|]*) \| (.+) \|$", README, flags=re.MULTILINE)
    assert [what for what, _ in shown] == list(dict.fromkeys(line["what"] for line in lines))
    for what, cells in shown:
        known = [found[what, clients] for clients in (1, 8, 64)]
        speeds = [f"{line['tokens_per_second']:.0f}" for line in known]
        waits = [f"{line['first_token_ms_p50'] / 1000:.1f} / {line['first_token_ms_p99'] / 1000:.1f}" for line in known]
        assert cells.split(" | ") == [*speeds, *waits], what


def test_figures_of_training_speed_stand_in_the_results() -> None:
    found = json.loads((ROOT / "benchmarks/results/train_throughput.json").read_text())
    text = re.sub(r"\s+", " ", README)
    for name, cell in found["cells"].items():
        arms, rival = cell["arms"], cell["opponent"]
        for arm in ("peftkit", "trl defaults", rival):
            assert f"{arms[arm]['tokens_per_second']:.0f}" in text, f"{name}: {arm}"
    cell = found["cells"]["float32, mixed"]
    ours, theirs, tuned = (cell["arms"][arm] for arm in ("peftkit", "trl defaults", cell["opponent"]))
    assert (
        f"{ours['tokens_per_second']:.0f} tokens/s with a peak of {ours['peak_bytes'] / 1e9:.1f} GB above the imports"
        in text
    )
    assert f"TRL as it comes {theirs['tokens_per_second']:.0f} at {theirs['peak_bytes'] / 1e9:.1f} GB" in text
    assert f"{tuned['tokens_per_second']:.0f} at {tuned['peak_bytes'] / 1e9:.1f} GB" in text
    share = next(goal for goal in found["goals"] if goal.get("goal") == "share of the ceiling")
    assert f"{share['measured']:.0%}".replace("%", " %") in text
