"""The guide's commands, one after the other as a reader runs them, and its Python: tiny bases, real sockets."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from generation.adapters_lab import Lab, make_lab
from serving.server_lab import serving
from tiny_bases import write_base

from peftkit.cli.main import main
from peftkit.data.formats import load_rows
from peftkit.registry.store import Registry

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "docs/guide"
ADDRESS = "http://127.0.0.1:8000"
HUB_ID = re.compile(r"Qwen/Qwen3-4B\b")
SMALL = ["train.max_steps=1", "evaluate.max_new_tokens=2", "evaluate.max_generated_rows=1",
         "evaluate.retention_passages=1", "data.max_held_out_rows=3"]  # fmt: skip


def page(name: str) -> str:
    return (GUIDES / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """Every `$ peftkit` line of a page as arguments."""
    lines = "".join(blocks(name, "console")).splitlines()
    given = [line[2:].partition("  #")[0] for line in lines if line.startswith("$ peftkit")]
    assert given, f"{name} shows no command"
    return [shlex.split(line)[1:] for line in given]


def brief(arguments: list[str], base: Path) -> list[str]:
    """The same command over a tiny base, and no more than a step of it."""
    said = [HUB_ID.sub(str(base), word) for word in arguments]
    named = any(word.startswith("base=") for word in said)
    if said[0] in ("train", "plan"):
        return [*said, *([] if named else [f"base={base}"]), *SMALL]
    if said[0] == "data" and "--base" not in said:
        return [*said, "--base", str(base)]
    if said[0] == "eval":
        small = ["max_new_tokens=2", "max_generated_rows=1", "retention_passages=1"]
        return [*said, *(word for each in small for word in ("--set", each))]
    return [*said, "--max-new-tokens", "2"] if said[0] in ("chat", "generate") else said


def run(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What a command prints; it has to succeed."""
    capfd.readouterr()
    code = main(arguments)
    out, err = capfd.readouterr()
    assert code == 0, f"peftkit {shlex.join(arguments)}\n{err}"
    return out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with places of its own, as a reader's."""
    monkeypatch.chdir(tmp_path)
    for name in ("REGISTRY", "RUNS", "CACHE"):
        monkeypatch.setenv(f"PEFTKIT_{name}", str(tmp_path / name.lower()))
    return tmp_path


@pytest.fixture(scope="module")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that reads 4,096 bytes."""
    return write_base(tmp_path_factory.mktemp("bases") / "tiny", max_position_embeddings=4096)


def write_rows(folder: Path, **files: range) -> None:
    for name, numbers in files.items():
        rows = [{"prompt": f"Case {n}: my lamp hums.", "completion": json.dumps({"case": n})} for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def peftkit_serve(*arguments: str) -> Iterator[dict[str, Any]]:
    """`peftkit serve` in a process of its own; what it said when it was ready."""
    command = [sys.executable, "-m", "peftkit", *arguments, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield json.loads(line)
    finally:
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def run_python(name: str, address: str) -> None:
    (code,) = blocks(name, "python")
    assert ADDRESS in code
    exec(compile(code.replace(ADDRESS, address), name, "exec"), {})


def run_curl(line: str, address: str) -> Any:
    """A `curl` line of a page, as bash runs it; its JSON."""
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    quiet = line.replace(ADDRESS, address).replace("curl ", "curl -sS --fail-with-body ", 1)
    done = subprocess.run(["bash", "-c", quiet], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return json.loads(done.stdout)


@pytest.mark.full  # 20 seconds on two idle cores, most of it imports of the server's process
@pytest.mark.loopback
def test_a_first_run_from_rows_to_a_server(here: Path, long_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "recipes").symlink_to(ROOT / "recipes")
    (rows_line,) = [line for line in "".join(blocks("first-run.md", "sh")).splitlines() if line.startswith("python ")]
    subprocess.run([sys.executable, *shlex.split(rows_line)[1:]], check=True, env={**os.environ})
    shown: dict[str, str] = {}
    for arguments in commands("first-run.md"):
        if arguments[0] == "serve":
            break
        shown[arguments[0]] = run(brief(arguments, long_base), capfd)
    else:
        pytest.fail("the page serves nothing")
    assert {"doctor", "data", "train", "list", "show", "runs", "chat", "generate", "eval", "tag"} <= set(shown)
    assert "⟦{" in shown["data"]
    with peftkit_serve(*arguments) as said:
        assert list(said["models"]) == ["tiny", "tickets@prod"]
        curls = [line for line in "".join(blocks("first-run.md", "sh")).splitlines() if line.startswith("curl ")]
        models, answer = (run_curl(line, said["address"]) for line in curls)
        assert [model["id"] for model in models["data"]] == ["tiny", "tickets@prod"]
        assert answer["model"] == said["models"]["tickets@prod"]
        run_python("first-run.md", said["address"])
    assert next(line.split()[0] for line in capfd.readouterr().out.splitlines() if line) == "base"


def test_the_rows_of_the_data_guide(here: Path) -> None:
    """Each form that is shown is read as the form of its line in the table."""
    forms = re.findall(r"^\| `(\w+)` \|", page("own-data.md"), re.MULTILINE)
    shown, probe = blocks("own-data.md", "json")
    for form, line in zip(forms, shown.splitlines(), strict=True):
        (here / "rows.jsonl").write_text(line + "\n")
        assert load_rows(here / "rows.jsonl").format == form
    (here / "probes.jsonl").write_text(probe)
    from peftkit.evaluation.behaviour.probes import load_probes

    assert load_probes("probes.jsonl").probes[0].family == "canary"


def test_the_commands_of_the_data_guide(here: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(here, tickets=range(20), held=range(20, 24), general=range(30, 40), benchmark=range(50, 52))
    first, second = ('{"product": "lamp"}', '{"product": "kettle"}')
    turns = [("system", "Answer in JSON."), ("user", "My lamp flickers."), ("assistant", first),
             ("user", "And the kettle leaks."), ("assistant", second)]  # fmt: skip
    chat = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
    (here / "probes.jsonl").write_text(blocks("own-data.md", "json")[1])
    (preview,) = [block for block in blocks("own-data.md", "text") if "⟦" in block]
    rows = (here / "tickets.jsonl").read_text()
    for arguments in commands("own-data.md"):
        if arguments[:2] == ["data", "preview"]:
            (here / "tickets.jsonl").write_text(chat + "\n")
            shown = run(brief(arguments, tiny_base), capfd)
            assert preview.splitlines()[1:] == [line for line in shown.splitlines() if not line.startswith("──")]
            (here / "tickets.jsonl").write_text(rows)
        else:
            run(brief(arguments, tiny_base), capfd)
    assert (here / "audit.html").is_file()
    assert not (here / "registry").exists() or not Registry(here / "registry").names()


def test_continuing_an_adapter(here: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_rows(here, tickets=range(20), new=range(20, 40), held=range(40, 44))
    run(brief(["train", "qlora_sft", "data.train=tickets.jsonl", "save_as=tickets"], tiny_base), capfd)
    run(["tag", "tickets", "prod"], capfd)
    store = Registry(here / "registry")
    parent = store.resolve("tickets@prod")
    (interrupted,) = list((here / "runs").glob("*/adapter")) or [parent.path]
    for arguments in commands("continue-an-adapter.md"):
        if arguments[0] == "import":
            arguments = [str(interrupted) if word.startswith("runs/") else word for word in arguments]
        run(brief(arguments, tiny_base), capfd)
    assert parent.id in run(["log", "tickets"], capfd)
    assert store.resolve("tickets@prod").id == parent.id
    other = write_base(here / "other", seed=1)
    assert main(brief(["train", "qlora_sft", "init_from=tickets@prod", "data.train=new.jsonl"], other)) == 1
    (shown,) = blocks("continue-an-adapter.md", "text")
    said = capfd.readouterr().err.splitlines()
    for line in shown.splitlines():
        constant = re.split(r"tickets@\w+|Qwen/[\w.-]+\w|weights, chat template", line)
        pattern = re.compile(".+".join(map(re.escape, constant)))
        assert any(map(pattern.fullmatch, said)), f"{line}\n{said}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A lively tiny base with two versions of `tickets`, the older one `prod`, and an adapter `tone`."""
    made = make_lab(tmp_path_factory.mktemp("served"))
    older = made.lora("tickets", 1)
    made.registry.tag(older.reference, "prod")
    made.lora("tickets", 2)
    made.lora("tone", 3)
    return made


@pytest.mark.loopback
def test_the_python_and_curl_of_the_serving_guide(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    older, newer = lab.registry.resolve("tickets@prod").id, lab.registry.resolve("tickets").id
    with serving(lab, ["tickets@prod", "tickets"]) as server:
        capfd.readouterr()
        run_python("serve.md", server.address)
        assert capfd.readouterr().out.splitlines()[-1].endswith(f"tickets@{older}")
        lines = [line for block in blocks("serve.md", "sh") for line in block.splitlines() if line.startswith("curl ")]
        assert len(lines) == 6
        listed, attached, moved, restored, _, detached = (
            run_curl(line.replace("3f9a", newer), server.address) for line in lines
        )
    assert [each["model"] for each in listed["data"]] == ["tickets@prod", "tickets"]
    assert [each["model"] for each in attached["data"]] == ["tone"]
    assert [(each["model"], each["version"]) for each in moved["data"]] == [("tickets@prod", newer)]
    assert [(each["model"], each["version"]) for each in restored["data"]] == [("tickets@prod", older)]
    assert detached["model"] == "tone"


def test_every_python_block_of_the_guide_runs_in_a_test() -> None:
    """Those of the other pages run in test_guides.py; each page has one."""
    having = {path.name for path in GUIDES.glob("*.md") if blocks(path.name, "python")}
    assert having == {"combine-and-merge.md", "first-run.md", "many-adapters.md", "registry.md", "serve.md"}
