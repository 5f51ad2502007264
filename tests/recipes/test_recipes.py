"""Recipes: files that load by path, run whole without a network, and leave behind exactly what they say."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peftkit import locations
from peftkit.errors import AdapterNotFound, ConfigError, PeftkitError, RunError
from peftkit.events import Event, Note, Phase, Progress, Table
from peftkit.recipe import Interrupted, Result, configure, copy, execute, find, load, recipes_folder, shipped
from peftkit.registry.bases import record_of
from peftkit.registry.store import Registry, Version
from peftkit.runs import list_runs, read_events, read_metrics

pytestmark = pytest.mark.usefixtures("places")

ROOT = Path(__file__).parents[2]
BITS = {"lora8bit_sft": 8, "lora_sft": 16, "qlora_sft": 4}
"""Recipes that train a LoRA over a base of so many bits; those of other strategies run in test_strategies.py."""
STRATEGIES = ["continued_pretraining", "gradual_unfreezing_sft", "layerwise_sft", "top_layers_sft"]
NAMES = sorted([*BITS, *STRATEGIES])
OTHERS = ["distillation", "dpo", "extractive_qa", "image_classification", "kto", "orpo", "regression", "summarization",
          "text_classification", "token_classification", "translation"]  # fmt: skip
"""Recipes with rows of another kind, or a teacher; their tests are in files of their own."""
SHIPPED = sorted([*NAMES, *OTHERS])
SECRET = "zanzibar"  # stands in every row: where it turns up, a user's row has been kept


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own file: 16 short questions and answers."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "tickets.jsonl"
    lines = [
        {"prompt": f"{SECRET} {draw.randrange(1000)} {i}", "completion": f"{SECRET} {draw.randrange(9999)}"}
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def settings(tiny_base: Path, rows: Path) -> list[str]:
    """Overrides for a run of three small steps on the tiny base."""
    return [
        f"base={tiny_base}",
        f"data.train={rows}",
        "data.held_out_share=0.25",
        "adapter.r=4",
        "train.max_steps=3",
        "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "evaluate.max_generated_rows=2",
        "evaluate.max_new_tokens=3",
        "evaluate.retention_passages=1",
    ]


Go = Callable[..., Result]


@pytest.fixture
def go(settings: list[str]) -> Go:
    """Run a recipe in this process."""

    def go(recipe: str | Path = "qlora_sft", *more: str, **options: Any) -> Result:
        loaded = load(find(str(recipe)))
        return execute(loaded, configure(loaded, overrides=[*settings, *more]), **options)

    return go


def registry() -> Registry:
    return Registry(locations.registry_root().path)


def only_run() -> Any:
    (run,) = list_runs(locations.runs_root().path)
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- the files themselves


def test_the_shipped_recipes() -> None:
    assert sorted(shipped()) == SHIPPED
    assert recipes_folder() == ROOT / "recipes"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_one_small_file_with_config_main_and_presets(name: str) -> None:
    path = shipped()[name]
    recipe = load(path)
    assert (recipe.name, recipe.path) == (name, path)
    assert callable(recipe.main)
    assert set(recipe.presets) == {"cpu", "8gb", "12gb", "24gb"}
    assert recipe.summary.endswith(".")
    source = path.read_text()
    assert len(source.splitlines()) <= 150
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"sys", "peftkit"}, "a recipe imports public names of peftkit and nothing else"


@pytest.mark.parametrize("preset", ["cpu", "8gb", "12gb", "24gb"])
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_resolves(name: str, preset: str) -> None:
    config = configure(load(shipped()[name]), preset=preset).config
    assert config.train.rows_per_step == 16
    assert config.quant.bits == BITS.get(name, 4)


def test_loading_runs_nothing_but_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nowhere_at_all\n")
    with pytest.raises(RunError, match=r"broken\.py does not import: ModuleNotFoundError"):
        load(broken)
    broken.write_text("x = 1\n")
    with pytest.raises(RunError, match="is not a recipe"):
        load(broken)


def test_an_unknown_recipe_names_the_near_one() -> None:
    with pytest.raises(RunError, match="did you mean qlora_sft"):
        find("qlora_stf")


def test_copying_never_overwrites(tmp_path: Path) -> None:
    target = copy("qlora_sft", tmp_path)
    assert target.read_bytes() == shipped()["qlora_sft"].read_bytes()
    target.write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        copy("qlora_sft", tmp_path)
    assert target.read_text() == "mine"


# -- start-up

LIGHT = "import sys; {0}; print(sorted({{m.split('.')[0] for m in sys.modules}} & {{'torch', 'transformers', 'peft'}}))"


@pytest.mark.parametrize(
    "statement",
    [
        "import peftkit",
        "from peftkit.cli.main import main; main(['--help'])",
        "from peftkit.cli.main import main; main(['recipes', 'list'])",
    ],
)
def test_no_torch_before_it_is_needed(statement: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT.format(statement)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# -- a whole run


@pytest.mark.parametrize("name", BITS)
def test_a_whole_run(go: Go, rows: Path, tiny_base: Path, name: str) -> None:
    """With the network denied by conftest: everything from audit to publication, in this process."""
    said: list[Event] = []
    result = go(name, "save_as=tickets", report=said.append)
    version = registry().resolve("tickets")
    assert result.saved_as == version.reference
    manifest = version.manifest
    assert manifest.base.source == tiny_base.name, "no path of this machine travels"
    assert record_of(version) is not None
    assert manifest.base.quantization is not None
    assert manifest.base.quantization["bits"] == BITS[name]
    assert manifest.recipe is not None
    assert (manifest.recipe.name, manifest.recipe.sha256) == (name, load(shipped()[name]).sha256)
    assert {(part.role, part.rows) for part in manifest.data} >= {("train", 12), ("held_out", 4)}
    assert manifest.adapter["r"] == 4
    assert manifest.metrics.before["answer_nll"]["point"] > 0
    assert set(version.manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}

    run = only_run()
    assert (run.id, run.state, run.saved_as) == (result.run_id, "done", version.reference)
    kept = files(run.path)
    state = ("checkpoint.json", "state.json", "state.safetensors")
    checkpoints = {f"checkpoints/step-{step:08d}/{name}" for step in (2, 3) for name in state}
    records = {f"{stage}.json" for stage in ("audit", "binding", "environment", "plan", "probe", "samples", "status")}
    written = {"config.yaml", "events.jsonl", "metrics.jsonl", "report.html", ".lock", f"recipe/{name}.py"}
    assert set(kept) == records | written | checkpoints
    assert [step for step, _ in read_metrics(run.path)] == [1, 2, 3]
    assert json.loads(kept["environment.json"])["torch"] != "missing"
    names = {event["event"] for event in read_events(run.path)}
    assert names >= {"Decision", "Note", "Phase", "Table"}
    assert "Progress" not in names
    assert {type(event) for event in said} >= {Note, Phase, Progress, Table}
    assert [event.title for event in said if isinstance(event, Table)] == [
        "data", "findings", "memory on this machine", "disk", "the longest rows, tried once", "held-out rows"
    ]  # fmt: skip


def test_rows_stay_in_the_run_folder(go: Go, rows: Path) -> None:
    go()
    version = registry().resolve("qlora-sft")
    assert SECRET.encode() in files(only_run().path)["samples.json"]
    kept = files(registry().root)
    assert len(kept) >= 5
    assert [name for name, content in kept.items() if SECRET.encode() in content] == []
    assert version.manifest.metrics.other["training"]["steps"] == 3


def test_the_configuration_of_a_run_repeats_it(go: Go, settings: list[str]) -> None:
    first = go("qlora_sft", "save_as=one")
    loaded = load(shipped()["qlora_sft"])
    again = execute(loaded, configure(loaded, files=[only_run().path / "config.yaml"], overrides=["save_as=two"]))
    one, two = (registry().resolve(name) for name in ("one", "two"))
    assert (first.saved_as, again.saved_as) == (one.reference, two.reference)
    assert one.manifest.files == two.manifest.files, "the same settings give the same bytes"


def test_a_dry_run_writes_nothing(go: Go, tmp_path: Path, tiny_base: Path, rows: Path) -> None:
    inputs = files(tiny_base) | files(rows.parent)
    said: list[Event] = []
    result = go("qlora_sft", dry_run=True, report=said.append)
    assert result == Result(None, None, {})
    assert not (tmp_path / "registry").exists()
    assert not (tmp_path / "runs").exists()
    assert all(name.startswith(("cache/identity/", "cache/places/")) for name in files(tmp_path))
    assert files(tiny_base) | files(rows.parent) == inputs
    assert [event.title for event in said if isinstance(event, Table)] == [
        "data", "findings", "memory on this machine", "disk", "the longest rows, tried once"
    ]  # fmt: skip
    assert not any(isinstance(event, Progress) for event in said)


# -- what ends a run early


def stop_at(phase: type[Event], error: BaseException, number: int = 1) -> Callable[[Event], None]:
    """A report that raises at the given event, as Ctrl-C or a full disk would."""
    seen = 0

    def report(event: Event) -> None:
        nonlocal seen
        if isinstance(event, phase):
            seen += 1
            if seen == number:
                raise error

    return report


def test_ctrl_c_while_training_keeps_the_adapter(go: Go, tiny_base: Path) -> None:
    from safetensors import safe_open

    with pytest.raises(Interrupted, match="PEFT checkpoint in"):
        go("qlora_sft", report=stop_at(Progress, KeyboardInterrupt(), 2))
    run = only_run()
    assert run.state == "interrupted"
    assert run.saved_as is None
    assert not registry().root.exists()
    with safe_open(str(run.path / "interrupted" / "adapter_model.safetensors"), framework="pt") as file:
        assert len(file.keys()) == 28
    assert [step for step, _ in read_metrics(run.path)] == [1, 2]


def test_ctrl_c_before_training(go: Go) -> None:
    with pytest.raises(Interrupted):
        go("qlora_sft", report=stop_at(Table, KeyboardInterrupt()))
    assert only_run().state == "interrupted"
    assert not registry().root.exists()


def test_ctrl_c_while_measuring_keeps_the_adapter(go: Go) -> None:
    """The third phase measures; the trained adapter must not be lost with it."""
    with pytest.raises(Interrupted):
        go("qlora_sft", report=stop_at(Phase, KeyboardInterrupt(), 2))
    run = only_run()
    assert run.state == "interrupted"
    assert list(run.path.rglob("adapter_model.safetensors"))


def test_a_failing_run_says_so(go: Go) -> None:
    with pytest.raises(ZeroDivisionError):
        go("qlora_sft", report=stop_at(Progress, ZeroDivisionError("planted"), 2))
    run = only_run()
    assert (run.state, run.error) == ("failed", "ZeroDivisionError: planted")
    assert not registry().root.exists()


@pytest.mark.parametrize(
    "wrong", ["data.train=nowhere.jsonl", "train.max_tokens=1", "init_from=nobody", "base=./nowhere", "save_as=latest"]
)
def test_what_cannot_work_fails_before_training(go: Go, wrong: str) -> None:
    trained = []
    with pytest.raises(PeftkitError):
        go("qlora_sft", wrong, report=lambda event: trained.append(event) if isinstance(event, Progress) else None)
    assert trained == []
    assert {run.state for run in list_runs(locations.runs_root().path)} <= {"failed"}
    assert not registry().root.exists()


# -- continuing from an adapter


def test_init_from_continues_and_records_its_parent(go: Go) -> None:
    go("qlora_sft", "save_as=first")
    parent = registry().resolve("first")
    result = go("qlora_sft", "init_from=first", "save_as=second", "train.seed=1")
    child = registry().resolve("second")
    assert result.saved_as == child.reference
    assert [part.model_dump() for part in child.manifest.parents] == [
        {"name": "first", "version": parent.id, "relation": "continued"}
    ]
    assert child.manifest.adapter["r"] == 4
    assert tensors(child) != tensors(parent)
    assert registry().resolve("first").id == parent.id


def test_init_from_starts_bitwise_at_its_parent(go: Go) -> None:
    """With a rate too small to move a float32, the child's tensors are its parent's."""
    go("qlora_sft", "save_as=first", "train.learning_rate=0.01")
    go("qlora_sft", "init_from=first", "save_as=second", "train.learning_rate=1e-30")
    assert tensors(registry().resolve("second")) == tensors(registry().resolve("first"))


def tensors(version: Version) -> dict[str, bytes]:
    from safetensors.torch import load_file

    stored = load_file(version.path / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in stored.items()}


def test_init_from_another_shape_is_refused(go: Go) -> None:
    go("qlora_sft", "save_as=first")
    with pytest.raises(PeftkitError, match=r"adapter\.r=8"):
        go("qlora_sft", "init_from=first", "adapter.r=8", "save_as=second")
    with pytest.raises(AdapterNotFound):
        registry().resolve("second")


# -- as a command, as a script, as a copy


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`peftkit …` in this process; its SIGTERM handler is taken off again."""
    import signal

    from peftkit.cli.main import main

    handler = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: main(list(arguments))
    signal.signal(signal.SIGTERM, handler)


def test_a_wrong_key_is_error_1_with_the_near_one(
    command: Callable[..., int], settings: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert command("train", "qlora_sft", *settings, "train.learning_rat=1e-3") == 1
    shown = capsys.readouterr().err
    assert "train.learning_rat" in shown
    assert "did you mean train.learning_rate" in shown.replace("'", "")
    assert "Traceback" not in shown
    assert not (tmp_path / "runs").exists()


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        configure(load(shipped()["qlora_sft"]), overrides=["train.lr=1", "quant.bits=5", "adapter.r=0"])
    assert len(caught.value.problems) == 3


def test_ctrl_c_is_exit_code_130(
    command: Callable[..., int],
    settings: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peftkit.cli import console

    real = console.Reporter.__call__

    def interrupt(self: Any, event: Event) -> None:
        if isinstance(event, Progress):
            raise KeyboardInterrupt
        real(self, event)

    monkeypatch.setattr(console.Reporter, "__call__", interrupt)
    assert command("train", "qlora_sft", *settings) == 130
    run = only_run()
    assert run.state == "interrupted"
    assert (run.path / "interrupted" / "adapter_model.safetensors").exists()
    assert str(run.path) in capsys.readouterr().err.replace("\n", "")


def test_json_is_the_result_alone(
    command: Callable[..., int], settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "qlora_sft", *settings, "save_as=tickets", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["saved_as"] == registry().resolve("tickets").reference
    assert shown["run"] == only_run().id


def test_a_copy_does_what_the_original_does(go: Go, tmp_path: Path) -> None:
    mine = copy("qlora_sft", tmp_path / "my_tickets.py")
    original, copied = go("qlora_sft", "save_as=a"), go(mine, "save_as=b")
    assert original.saved_as is not None
    assert copied.saved_as is not None
    a, b = registry().resolve("a"), registry().resolve("b")
    assert a.manifest.files == b.manifest.files
    assert b.manifest.recipe is not None
    assert b.manifest.recipe.name == "my_tickets"


def test_an_edited_copy_does_what_was_edited(go: Go, tmp_path: Path) -> None:
    mine = copy("qlora_sft", tmp_path / "mine.py")
    mine.write_text(mine.read_text().replace('quant_type="nf4"', 'quant_type="fp4"'))
    go(mine)
    version = registry().resolve("mine")
    assert version.manifest.base.quantization is not None
    assert version.manifest.base.quantization["quant_type"] == "fp4"


def run_script(path: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)


def test_a_recipe_is_a_script(settings: list[str], tmp_path: Path) -> None:
    """`python recipes/qlora_sft.py key=value …`; here also as a user's copy that lies outside the checkout."""
    scripts = (ROOT / "recipes" / "qlora_sft.py", copy("qlora_sft", tmp_path / "my_tickets.py"))
    done = [
        run_script(path, *settings, "--preset", "8gb", "--print-config", "--json", cwd=tmp_path) for path in scripts
    ]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[0].stdout == done[1].stdout
    shown = json.loads(done[0].stdout)
    assert (shown["train.max_steps"]["value"], shown["data.max_length"]["source"]) == (3, "preset 8gb")
    wrong = run_script(scripts[1], "train.learning_rat=1", cwd=tmp_path)
    assert wrong.returncode == 1
    assert "train.learning_rate" in wrong.stderr


@pytest.mark.full
def test_a_script_can_plan_only(settings: list[str], tmp_path: Path) -> None:
    done = run_script(copy("qlora_sft", tmp_path / "my_tickets.py"), *settings, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dry run: nothing was trained or written" in done.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.full
def test_the_script_saves_what_the_command_saves(
    go: Go, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    go("qlora_sft", "save_as=command")
    done = run_script(ROOT / "recipes" / "qlora_sft.py", *settings, "save_as=script", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (registry().resolve(name).manifest for name in ("command", "script"))
    assert one.files == two.files


@pytest.mark.full
def test_recipes_load_from_a_wheel(settings: list[str], tmp_path: Path) -> None:
    built, site = tmp_path / "built", tmp_path / "site"
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".venv", ".git", ".*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(built), str(source)]
    assert subprocess.run(wheel, capture_output=True, text=True).returncode == 0
    (path,) = built.glob("peftkit-*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(path)]
    assert subprocess.run(install, capture_output=True, text=True).returncode == 0
    assert sorted(p.name for p in (site / "peftkit" / "_recipes").glob("*.py")) == [f"{name}.py" for name in SHIPPED]
    code = (
        "import sys, peftkit; from peftkit.recipe import shipped, load, recipes_folder; "
        "print(peftkit.__file__); print(recipes_folder()); print([load(p).name for p in shipped().values()]); "
        "from peftkit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    # First on the path, so that the editable install of the checkout does not answer instead.
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "qlora_sft", *settings, "save_as=wheel"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    module, folder, names = done.stdout.splitlines()[:3]
    assert module.startswith(str(site))
    assert folder == str(site / "peftkit" / "_recipes")
    assert names == str(SHIPPED)
    assert registry().resolve("wheel").manifest.recipe is not None
