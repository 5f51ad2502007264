"""list, show, path, log and diff, as a user types them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.registry import Draft, Registry, Version

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def versions(tmp_path: Path) -> list[Version]:
    """`tickets` twice, the second made from the first; `tone`, of a stranger who writes control characters."""
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (payload / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    store = Registry(tmp_path / "registry")

    def publish(name: str, mean: float, source: str = "Qwen/Qwen3-4B", **more: Any) -> Version:
        fields = {
            "kind": "peft", "base": {"source": source, "fingerprint": "f" * 64, "license": "apache-2.0"},
            "adapter": {"method": "lora", "r": 8}, "run": "run-7",
            "recipe": {"name": "qlora_sft", "sha256": "1" * 64, "config": {"train": {"learning_rate": mean}}},
            "data": [{"role": "train", "source": "rows.jsonl", "sha256": "2" * 64, "rows": 1200, "tokens": 5000}],
            "metrics": {"after": {"score": {"mean": mean, "n": 64, "metric": "exact"}},
                        "other": {"answer_nll_change": {"point": -0.5, "low": -0.6, "high": -0.4}}},
        }  # fmt: skip
        return store.publish(name, payload, Draft.model_validate(fields | more))

    first = publish("tickets", 0.5)
    parents = [{"name": "tickets", "version": first.id, "relation": "continued"}]
    parents.append({"name": "gone", "version": "e" * 16, "relation": "combined"})
    second = publish("tickets", 0.75, parents=parents, receipts=[{"type": "import"}])
    store.tag(first.reference, "prod")
    bad = "evil\x1b[2J\nadapter  \u202egnp.exe"
    return [first, second, publish("tone", 0.25, bad, run=bad)]


def reply(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_list_and_its_filters(cli: Cli, versions: list[Version]) -> None:
    first, second, tone = versions
    assert [each["id"] for each in reply(cli("list", "--json"))] == [second.id, tone.id]
    assert {each["id"] for each in reply(cli("list", "--all", "--json"))} == {each.id for each in versions}
    assert [each["id"] for each in reply(cli("list", "--tag", "prod", "--json"))] == [first.id]
    assert [each["id"] for each in reply(cli("list", "--metric", "score > 0.5", "--base", "qwen", "--json"))] == [
        second.id
    ]
    assert [each["id"] for each in reply(cli("list", "--data", "2222", "--recipe", "qlora_sft", "--json"))] == [
        second.id,
        tone.id,
    ]
    out = cli("list", "--method", "lora")[1]
    for fact in (second.id, "Qwen/Qwen3-4B", "lora", "-0.50 [-0.60, -0.40]", "exact 0.75 on 64 rows"):
        assert fact in out
    assert "prod" in cli("list", "--all")[1]
    assert cli("list", "--method", "ia3")[:2] == (
        0, "nothing found: 2 adapters, none with method 'ia3' (there is lora)\n",
    )  # fmt: skip
    code, _, err = cli("list", "--metric", "scor > 1")
    assert (code, "did you mean score" in err) == (1, True)


def test_list_of_nothing(cli: Cli, tmp_path: Path) -> None:
    assert cli("list")[:2] == (0, f"no adapters in {tmp_path}/registry (PEFTKIT_REGISTRY)\n")
    assert reply(cli("list", "--json")) == []
    assert not (tmp_path / "registry").exists()
    (tmp_path / "registry").write_text("")
    assert cli("list")[0] == 1


def test_damage_is_told_last(cli: Cli, versions: list[Version]) -> None:
    (versions[1].path / "manifest.json").unlink()
    code, out, _ = cli("list")
    assert code == 0
    assert versions[2].id in out
    assert "damaged" in out.splitlines()[2]
    assert out.splitlines()[-1] == f"1 damaged: {versions[1].reference}; peftkit verify says what is wrong"
    problems = {each["id"]: each["problem"] for each in reply(cli("list", "--json"))}
    assert "cannot be read" in problems[versions[1].id]
    assert problems[versions[2].id] is None


def test_show_and_path(cli: Cli, versions: list[Version]) -> None:
    first, second, _ = versions
    out = cli("show", "tickets@prod")[1]
    for fact in (
        f"{first.reference}  (prod)", "Qwen/Qwen3-4B", "apache-2.0", "method=lora, r=8", "qlora_sft", "run-7",
        "rows.jsonl: 1200 rows, 5,000 tokens", "1; peftkit log tickets@", "adapter_model.safetensors", str(first.path),
    ):  # fmt: skip
        assert fact in out
    out = cli("show", "tickets")[1]
    for fact in (f"gone@{'e' * 16} (combined)", f"{first.reference} (continued)", "import"):
        assert fact in out
    value = reply(cli("show", "tickets@prod", "--json"))
    manifest = json.loads((first.path / "manifest.json").read_text())
    assert value == {**manifest, "id": first.id, "aliases": ["prod"]}
    assert cli("path", "tickets")[:2] == (0, f"{second.path}\n")
    assert cli("path", "nobody")[:2] == (1, "")


def test_log(cli: Cli, versions: list[Version]) -> None:
    first, second, _ = versions
    out = cli("log", "tickets")[1]
    for fact in (
        f"{second.reference}  ", "(latest)", f"├─ continued  {first.reference}", "(prod)", "answer NLL change -0.50",
        f"└─ combined  gone@{'e' * 16}  removed, or in another registry", "train rows.jsonl, 1,200 rows, 2222",
        "aliases of tickets",
    ):  # fmt: skip
        assert fact in out
    assert f"made into\n└─ continued  {second.reference}" in cli("log", "tickets@prod")[1]
    value = reply(cli("log", "tickets", "--json"))
    assert [step["relation"] for step in value["ancestors"]] == ["continued", "combined"]
    assert [(move["alias"], move["number"], move["version"]) for move in value["moves"]] == [
        ("latest", 1, first.id), ("latest", 2, second.id), ("prod", 1, first.id),
    ]  # fmt: skip


def test_a_long_line_of_versions_is_cut(cli: Cli, versions: list[Version], tmp_path: Path) -> None:
    store, last = Registry(tmp_path / "registry"), versions[1]
    for n in range(22):
        parents = [{"name": "tickets", "version": last.id, "relation": "continued"}]
        draft = Draft.model_validate(
            {"kind": "peft", "base": {"source": f"b{n}", "fingerprint": "f" * 64}, "parents": parents}
        )
        last = store.publish("tickets", tmp_path / "payload", draft)
    out = cli("log", "tickets")[1]
    assert "12 more, further than 12 steps away: --json" in out
    assert "5 earlier moves: --json" in out
    assert len(reply(cli("log", "tickets", "--json"))["ancestors"]) == 24


def test_diff(cli: Cli, versions: list[Version]) -> None:
    code, out, err = cli("diff", "tickets@prod", "tickets")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["recipe", "config.train.learning_rate", "0.5", "0.75", "0.25"] in lines
    assert ["metrics", "after.score.mean", "0.5", "0.75", "0.25"] in lines
    assert ["parents", f"gone@{'e' * 16}", "absent", "combined", "-"] in lines
    assert "2 in files" in lines[-1] or "2 in files" in out
    assert "nothing differs" in cli("diff", "tickets", "tickets@latest")[1]
    there, back = (
        reply(cli("diff", "tickets@prod", "tickets", "--json")),
        reply(cli("diff", "tickets", "tickets@prod", "--json")),
    )
    assert [row["key"] for row in there["rows"]] == [row["key"] for row in back["rows"]]
    assert (
        (there["left"], there["right"])
        == (back["right"], back["left"])
        == (versions[0].reference, versions[1].reference)
    )


def test_a_strangers_text_cannot_steer_the_terminal(cli: Cli, versions: list[Version]) -> None:
    for command in (
        ["list"],
        ["list", "--base", "nobody"],
        ["show", "tone"],
        ["log", "tone"],
        ["diff", "tickets", "tone"],
    ):
        code, out, _ = cli(*command)
        assert code == 0
        assert "evil" in out
        assert not {"\x1b", "\u202e"} & set(out)
        # No line is theirs alone: what follows a line end of theirs stands behind what came before it.
        assert all("evil" in line for line in out.splitlines() if "gnp.exe" in line)


def test_looking_starts_light(versions: list[Version], tmp_path: Path) -> None:
    code = (
        "import sys; from peftkit.cli.main import main\n"
        "for words in ('list', 'show tickets', 'log tickets', 'path tickets', 'diff tickets tone'):\n"
        "    assert main(words.split()) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    environment = {**os.environ, "PEFTKIT_REGISTRY": str(tmp_path / "registry")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
