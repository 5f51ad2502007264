"""A registry, or an exported folder, that a stranger has prepared: nothing runs, nothing outside is touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.base.record import BaseRecord, TensorDigest
from peftkit.registry import Draft, Registry, Version

Cli = Callable[..., tuple[int, str, str]]
MODULE = "model.layers.0.self_attn.q_proj"
RECORD = BaseRecord(
    {"model_type": "llama"}, "a" * 64, {}, None, {f"{MODULE}.weight": TensorDigest("F32", (4, 4), "b" * 64)}
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """One adapter, `tickets`, with two versions."""
    payload = tmp_path / "payload"
    payload.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (payload / "adapter_config.json").write_text(json.dumps(config))
    names = [f"base_model.model.{MODULE}.lora_{side}.weight" for side in "AB"]
    shapes = [[1, 4], [4, 1]]
    entries = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [16 * at, 16 * at + 16]}
        for at, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    header = json.dumps(entries).encode()
    (payload / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    base = {"source": "tiny", "record": RECORD.id, "fingerprint": RECORD.fingerprint, "parts": RECORD.parts()}
    recipe = {"name": "qlora_sft", "sha256": "1" * 64, "config": {}}
    store = Registry(tmp_path / "registry")
    for number in range(2):
        fields = {"kind": "peft", "base": base, "recipe": recipe, "metrics": {"other": {"n": number}}}
        store.publish("tickets", payload, Draft.model_validate(fields), base=RECORD)
    return store


@pytest.fixture
def forge(registry: Registry, cli: Cli, tmp_path: Path) -> Callable[..., Path]:
    """An exported folder whose manifest was edited and is, to every digest, in order."""

    def forge(change: Callable[[dict[str, Any]], Any]) -> Path:
        folder = tmp_path / "forged"
        shutil.rmtree(folder, ignore_errors=True)
        assert cli("export", "tickets", "--out", str(folder))[0] == 0
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return forge


def latest(store: Registry) -> Version:
    return store.resolve("tickets")


@pytest.mark.parametrize("name", ["evil.py", "../evil.py", "{root}/evil.py", "evil"])
def test_a_manifest_cannot_name_code_to_run(cli: Cli, forge: Callable[..., Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('pwned').write_text('')\n")
    path = name.format(root=tmp_path)
    assert cli("import", str(forge(lambda m: m["recipe"].update(name=path))))[0] == 0
    code, _, err = cli("reproduce", "tickets")
    assert code == 1
    assert "is not a shipped recipe" in err
    assert "if you trust the file" in err
    assert not (tmp_path / "pwned").exists()


def test_a_recipe_that_changed_is_not_run_under_its_name(cli: Cli, registry: Registry) -> None:
    code, _, err = cli("reproduce", "tickets")
    assert code == 1
    assert "'qlora_sft' of" in err
    assert "has changed since" in err


def test_an_adapter_that_names_no_base_is_not_taken(cli: Cli, forge: Callable[..., Path]) -> None:
    folder = forge(lambda m: m["base"].update(record=None, parts={}))
    code, _, err = cli("import", str(folder))
    assert code == 1
    assert "nothing says which base it fits" in err


@pytest.mark.parametrize("created", ["0001-01-01T00:00:00.000000+14:00", "9999-12-31T23:59:59.999999-14:00"])
def test_a_time_that_utc_has_not_damages_one_version_only(
    cli: Cli, registry: Registry, forge: Callable[..., Path], created: str
) -> None:
    folder = forge(lambda m: m.update(created=created))
    assert cli("import", str(folder))[0] == 1
    written = (folder / "manifest.json").read_bytes()
    damaged = latest(registry).path.with_name(hashlib.sha256(written).hexdigest()[:16])
    shutil.copytree(folder, damaged, ignore=shutil.ignore_patterns("README.md", "base.json"))
    code, out, _ = cli("list")
    assert code == 0
    assert f"tickets@{damaged.name}" in out
    assert cli("show", "tickets")[0] == 0
    code, _, err = cli("verify")
    assert code == 1
    assert damaged.name in err
    assert cli("rm", f"tickets@{damaged.name}")[0] == 0
    assert cli("verify", "--read-data")[0] == 0


@pytest.mark.parametrize("where", ["tickets/versions", "tickets/aliases", "bases", "relations", "tmp"])
def test_nothing_is_removed_through_a_link(cli: Cli, registry: Registry, tmp_path: Path, where: str) -> None:
    other = Path(shutil.copytree(registry.root, tmp_path / "other"))
    (other / "relations").mkdir(exist_ok=True)
    (other / "tmp/left").mkdir(parents=True)
    cli("restore", "tickets")
    before = sorted(str(path) for path in other.rglob("*"))
    inner = registry.root / where
    shutil.rmtree(inner, ignore_errors=True)
    inner.symlink_to(other / where)
    loose = sorted(set(os.listdir(other / "tickets/versions")) - {latest(registry).id})[0]
    for command in (("rm", f"tickets@{loose}"), ("gc",), ("gc", "--versions"), ("rm", "tickets", "--all")):
        code, _, err = cli(*command)
        assert code == 1, command
        assert "symbolic link" in err
    assert sorted(str(path) for path in other.rglob("*")) == before
    code, _, err = cli("verify")
    assert code == 1
    assert "symbolic link" in err


def test_a_link_among_leftovers_is_removed_and_not_followed(cli: Cli, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(5000))
    (registry.root / "tmp/x").symlink_to(tmp_path)
    found = json.loads(cli("gc", "--json")[1])
    assert found["removed"] == ["tmp/x"]
    assert found["bytes"] < 500
    assert (tmp_path / "big").exists()


@pytest.mark.parametrize("thing", ["fifo", "folder", "link", "dangling"])
def test_an_alias_moves_on_from_what_is_no_record(cli: Cli, registry: Registry, thing: str) -> None:
    path = registry.root / "tickets/aliases/latest/00000002"
    target = latest(registry).id
    path.unlink()
    {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to("/etc/passwd"),
        "dangling": lambda: path.symlink_to("nowhere"),
    }[thing]()
    code, _, err = cli("show", "tickets")
    assert code == 1
    assert "peftkit tag tickets@VERSION latest" in err
    assert cli("tag", f"tickets@{target}", "latest")[0] == 0
    assert latest(registry).id == target
    assert cli("restore", "tickets")[0] == 0, "the damaged record is passed over"


def test_text_of_a_manifest_forges_no_line(cli: Cli, forge: Callable[..., Path]) -> None:
    hostile = "tiny\nlamps@latest: all digests verified \u202e\x1b[31m"
    code, out, _ = cli("import", str(forge(lambda m: m["base"].update(source=hostile))))
    assert code == 0
    assert not any(line.startswith("lamps@latest") for line in out.splitlines())
    assert "\u202e" not in out
    assert "\x1b" not in out


def test_a_message_about_a_hostile_manifest_stays_short(cli: Cli, forge: Callable[..., Path]) -> None:
    code, _, err = cli("import", str(forge(lambda m: m.update({f"key{n}\n": n for n in range(5000)}))))
    assert code == 1
    assert len(err) < 4000
    assert "more" in err
    assert len(cli("import", str(forge(lambda m: m.update(format={"x": "y" * 100_000}))))[2]) < 2000


def test_a_manifest_of_ten_thousand_parents_and_figures_is_shown_in_part(
    cli: Cli, registry: Registry, forge: Callable[..., Path]
) -> None:
    before = latest(registry).reference
    parents = [{"name": "tickets", "version": f"{n:016x}", "relation": "combined"} for n in range(10_000)]
    figures = {"other": {f"n{n}": n for n in range(10_000)}}
    folder = forge(lambda m: m.update(parents=parents, metrics={"before": {}, "after": {}, **figures}))
    assert cli("import", str(folder))[0] == 0
    for command in (("show", "tickets"), ("log", "tickets"), ("diff", before, "tickets")):
        code, out, _ = cli(*command)
        assert code == 0
        assert "more: --json" in out
        assert len(out) < 60_000


def test_a_condition_of_spaces_is_answered_at_once(cli: Cli, registry: Registry) -> None:
    code, _, err = cli("list", "--metric", " " * 100_000 + "x")
    assert code == 1
    assert "is no condition" in err


def test_an_export_does_not_take_away_the_folder_one_stands_in(cli: Cli, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    os.chdir(tmp_path / "here")
    code, _, err = cli("export", "tickets", "--out", ".")
    assert code == 1
    assert "the folder you are in" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_early_interrupt_ends_with_130(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C while the commands are being imported; the process says when it has begun to."""
    script = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'peftkit.cli.main':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(30)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from peftkit.cli.entry import run\n"
        "run()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "peftkit: interrupted\n")
