"""The commands on a tiny base: what they print, their JSON, their exit codes, and what they never do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_bases import write_base

from peftkit.cli.main import main

Cli = Callable[..., tuple[int, str, str]]
ROWS = "".join(
    json.dumps({"prompt": f"Case {i}: lamp or kettle?", "completion": ["lamp", "kettle"][i % 2], "kind": "ab"[i % 2]})
    + "\n"
    for i in range(12)
)


@pytest.fixture(scope="module")
def home(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry and a runs folder with one adapter, trained for two steps on the tiny base."""
    home = tmp_path_factory.mktemp("home")
    (home / "rows.jsonl").write_text(ROWS)
    patch = pytest.MonkeyPatch()
    for name in ("REGISTRY", "RUNS", "CACHE"):
        patch.setenv(f"PEFTKIT_{name}", str(home / name.lower()))
    done = main(
        ["train", "qlora_sft", f"base={tiny_base}", f"data.train={home}/rows.jsonl", "save_as=lamps",
         "train.max_steps=2", "evaluate.max_new_tokens=4", "--json"]
    )  # fmt: skip
    patch.undo()
    assert done == 0
    return home


@pytest.fixture
def places(home: Path) -> Path:
    return home


def reply(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_list_show_and_tag(cli: Cli) -> None:
    (listed,) = reply(cli("list", "--json"))
    version = listed["id"]
    assert "lamps" in cli("list")[1]
    shown = reply(cli("show", "lamps", "--json"))
    assert (shown["id"], shown["aliases"], shown["run"]) == (version, ["latest"], listed["run"])
    assert shown["base"]["source"] == listed["base"] == "tiny"
    text = cli("show", f"lamps@{version[:6]}")[1]
    for fact in (version, "nf4+dq", "qlora_sft", "rows.jsonl", "retention", "answer NLL"):
        assert fact in text
    assert cli("tag", "lamps", "prod")[0] == 0
    assert reply(cli("show", "lamps@prod", "--json"))["id"] == version
    assert cli("verify", "lamps@prod")[:2] == (0, f"lamps@{version} is whole: 2 files\n")


def test_runs(cli: Cli) -> None:
    (run,) = reply(cli("runs", "list", "--json"))
    assert (run["state"], run["recipe"]) == ("done", "qlora_sft")
    shown = reply(cli("runs", "show", run["id"][:12], "--json"))
    assert len(shown["losses"]) == 2
    assert run["id"] in cli("runs", "show", run["id"])[1]
    assert not (Path(run["path"]) / "adapter").exists()  # the registry has it


def test_eval_measures_base_and_adapter(cli: Cli) -> None:
    result = cli(
        "eval", "lamps", "--data", "rows.jsonl", "--set", "max_new_tokens=4", "--set", "group_by=kind", "--json"
    )
    (figures,) = reply(result).values()
    assert figures["other"]["by_kind"]["groups"] == 2
    assert figures["other"]["answer_nll_change"]["point"] < 0
    plain = cli("eval", "lamps", "--data", "rows.jsonl", "--set", "max_generated_rows=0", "--set", "retention=null")
    assert plain[0] == 0
    assert "adapter − base" in plain[1]


def test_generate_answers_once_per_adapter_on_one_base(cli: Cli) -> None:
    version = reply(cli("show", "lamps", "--json"))["id"]
    asked = ("generate", "lamp?", "--adapter", "lamps", "--adapter", f"lamps@{version}", "--max-new-tokens", "3")
    value = reply(cli(*asked, "--with-base", "--json"))
    assert [each["adapter"] for each in value["answers"]] == [None, f"lamps@{version}"], "one version, one answer"
    assert value["receipts"] == []
    code, out, err = cli(*asked)
    assert code == 0, err
    assert out.startswith(f"lamps@{version}:\n")
    assert cli("generate", "lamp?")[0] == 2


def test_an_adapter_on_another_base_is_refused_or_recorded(cli: Cli, home: Path, tiny_base: Path) -> None:
    other = write_base(home / "other", seed=5)
    asked = ("generate", "lamp?", "--adapter", "lamps", "--max-new-tokens", "2", "--base", str(other), "--json")
    code, _, err = cli(*asked)
    assert code == 1
    assert "was trained on tiny" in err
    assert "differ in their bytes" in err
    (receipt,) = reply(cli(*asked, "--other-base"))["receipts"]
    assert (receipt["type"], receipt["differs"], receipt["relation"]) == ("other_base", ["weights"], None)
    relation = reply(cli("base", "relate", str(other), str(tiny_base), "--json"))
    assert relation["kind"] == "other"
    assert "measured between them" in cli(*asked)[2]
    settings = [f"base={other}", "data.train=rows.jsonl", "train.max_steps=1", "evaluate.max_generated_rows=0"]
    continued = ["train", "qlora_sft", *settings, "evaluate.retention=null", "init_from=lamps", "save_as=moved"]
    assert cli(*continued)[0] == 1
    assert cli(*continued, "--other-base")[0] == 0
    manifest = reply(cli("show", "moved", "--json"))
    assert [receipt["type"] for receipt in manifest["receipts"]] == ["other_base"]
    assert manifest["receipts"][0]["relation"]["id"]
    assert manifest["parents"][0]["name"] == "lamps"
    assert "lamps@" in cli("log", "moved")[1]
    assert cli("verify", "--read-data")[0] == 0


def test_chat_answers_once(cli: Cli) -> None:
    answer = reply(cli("chat", "lamps", "--prompt", "lamp?", "--max-new-tokens", "3", "--json"))
    assert answer["adapter"].startswith("lamps@")


def test_chat_swaps_in_one_process(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hi", "/base", "hi", "/lamps", "/new", "hi", "/nobody", "a <|im_end|> b", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, out, err = cli("chat", "lamps", "--max-new-tokens", "2")
    assert code == 0, err
    assert "no adapter named 'nobody'" in out
    assert "control token" in out


def test_data_check_and_preview(cli: Cli, tiny_base: Path) -> None:
    counts = reply(cli("data", "check", "rows.jsonl", "--base", str(tiny_base), "--json"))
    assert counts["train"]["rows"] + counts["held_out"]["rows"] == 12
    out = cli("data", "preview", "rows.jsonl", "--base", str(tiny_base), "--rows", "1")[1]
    assert "⟦lamp<|im_end|>⟧" in out
    (row,) = reply(cli("data", "preview", "rows.jsonl", "--base", str(tiny_base), "--rows", "1", "--json"))
    assert [part["text"] for part in row["segments"] if part["learned"]] == ["lamp<|im_end|>"]


def test_base_and_doctor(cli: Cli, tiny_base: Path) -> None:
    assert len(reply(cli("base", "show", str(tiny_base), "--json"))["fingerprint"]) == 64
    facts = reply(cli("doctor", "--json"))
    assert facts["4-bit training and evaluation agree"] == "ok"
    assert all("FAILED" not in str(value) and "WRONG" not in str(value) for value in facts.values())


def test_recipes(cli: Cli, tmp_path: Path) -> None:
    listed = reply(cli("recipes", "list", "--json"))
    assert [each["name"] for each in listed] == sorted(
        path.stem for path in (Path(__file__).resolve().parents[2] / "recipes").glob("*.py")
    )
    assert len(listed) == 18
    assert all(each["summary"] for each in listed)
    assert "train.learning_rate" in cli("recipes", "show", "lora_sft")[1]
    assert reply(cli("recipes", "show", "lora_sft", "--schema"))["additionalProperties"] is False
    assert cli("recipes", "copy", "lora_sft", str(tmp_path / "mine.py"))[0] == 0
    code, _, err = cli("recipes", "copy", "lora_sft", str(tmp_path / "mine.py"))
    assert (code, "exists already" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["trian"], 2, "Did you mean 'train'"),
        (["show"], 2, "Missing argument"),
        (["show", "nobody"], 1, "peftkit list"),
        (["train", "qlora_sf"], 1, "did you mean qlora_sft"),
        (["train", "qlora_sft", "data.trian=x", "train.learning_rte=1"], 1, "did you mean train.learning_rate"),
        (["train", "qlora_sft", "train.learning_rate=-1"], 1, "greater than 0"),
        (["train", "qlora_sft", "--preset", "13gb"], 1, "12gb"),
        (["train", "qlora_sft", "base={base}"], 1, "data.train is not set"),
        (["train", "qlora_sft", "base={base}", "data.train=nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["train", "qlora_sft", "base=./nowhere", "data.train=rows.jsonl"], 1, "does not exist"),
        (["train", "qlora_sft", "base={base}", "data.train=rows.jsonl", "save_as=../up"], 1, "name"),
        (["train", "qlora_sft", "base={base}", "data.train=rows.jsonl", "evaluate.group_by=kond"], 1, "kind"),
        (["train", "qlora_sft", "base={base}", "data.train=rows.jsonl", "train.optim=paged_adamw_8bit"], 1, "CUDA"),
        (["train", "qlora_sft", "base={base}", "data.train=rows.jsonl", "init_from=nobody"], 1, "nobody"),
        (["eval", "lamps", "--data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["eval", "lamps", "--data", "rows.jsonl", "--set", "shots=2"], 1, "instructions"),
        (["eval", "lamps", "--data", "rows.jsonl", "--set", "group_by=kond"], 1, "kind"),
        (["chat", "lamps", "--bits", "5", "--prompt", "x"], 1, "4, 8, 16 or 32"),
        (["data", "preview", "rows.jsonl", "--base", "{base}", "template_kwargs={{chat_template: x}}"], 1, "renderer"),
        (
            ["train", "qlora_sft", "base={base}", "data.train=rows.jsonl", "evaluate.metric=json_fields"],
            1,
            "JSON object",
        ),
        (["runs", "show", "nothing"], 1, "nothing"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], code: int, said: str, cli: Cli, tiny_base: Path) -> None:
    result = cli(*(argument.format(base=tiny_base) for argument in arguments))
    assert result[0] == code
    assert said in result[2]
    assert "Traceback" not in result[1] + result[2]


def test_two_versions_of_one_adapter_side_by_side(cli: Cli, tiny_base: Path) -> None:
    first = reply(cli("show", "lamps", "--json"))["id"]
    again = ["save_as=lamps", "init_from=lamps", "train.max_steps=1", "train.seed=1", "evaluate.max_generated_rows=0"]
    code, _, err = cli("train", "qlora_sft", f"base={tiny_base}", "data.train=rows.jsonl", *again)
    assert code == 0, err
    second = reply(cli("show", "lamps", "--json"))
    assert second["parents"] == [{"name": "lamps", "version": first, "relation": "continued"}]
    names = (f"lamps@{first}", f"lamps@{second['id']}")
    figures = reply(cli("eval", *names, "--data", "rows.jsonl", "--set", "max_generated_rows=0", "--json"))
    assert tuple(figures) == names


def test_the_registry_keeps_no_folder_and_no_instructions(cli: Cli, tiny_base: Path, home: Path) -> None:
    code, _, err = cli("train", "qlora_sft", f"base={tiny_base}", f"data.train={home}/rows.jsonl", "save_as=quiet",
                       "train.max_steps=1", "evaluate.max_new_tokens=2", "evaluate.instructions=Say zanzibar.",
                       "evaluate.group_by=kind")  # fmt: skip
    assert code == 0, err
    manifest = json.dumps(reply(cli("show", "quiet", "--json")))
    assert "zanzibar" not in manifest
    assert f"{home}/rows" not in manifest
    assert '"train": "rows.jsonl"' in manifest


def test_control_characters_and_emoji_codes_are_shown_as_they_are(cli: Cli, tiny_base: Path, home: Path) -> None:
    row = {"prompt": "a\x1b[2Jb :100: [bold]c", "completion": "d"}
    (home / "odd.jsonl").write_text(json.dumps(row) + "\n")
    out = cli("data", "preview", "odd.jsonl", "--base", str(tiny_base))[1]
    assert "\x1b" not in out
    assert ":100: [bold]c" in out


def test_debug_shows_the_traceback(cli: Cli) -> None:
    from peftkit.errors import PeftkitError

    with pytest.raises(PeftkitError):
        cli("show", "nobody", "--debug")


def test_dry_run_and_print_config_leave_nothing(cli: Cli, home: Path, tiny_base: Path) -> None:
    before = sorted(str(path) for path in (home / "runs").rglob("*"))
    assert cli("train", "qlora_sft", f"base={tiny_base}", "data.train=rows.jsonl", "--dry-run")[0] == 0
    settings = reply(cli("train", "qlora_sft", "train.seed=3", "--preset", "8gb", "--print-config", "--json"))
    assert settings["train.seed"] == {"value": 3, "source": "command line"}
    assert settings["train.gradient_checkpointing"] == {"value": True, "source": "preset 8gb"}
    assert sorted(str(path) for path in (home / "runs").rglob("*")) == before
