"""Every task's recipe on a real base with real rows: one JSON line each, the score beside what is trivial.

    PEFTKIT_TEST_DATA=/path/to/data OMP_NUM_THREADS=1 nice python benchmarks/tasks.py
    PEFTKIT_TEST_DATA=/path/to/data OMP_NUM_THREADS=1 nice python benchmarks/tasks.py --only wnut17

The shipped recipes are run whole (audit, training, measuring, publishing) in scratch folders, each in a process of its
own. Rows and epochs are few, and stand in every line; so the scores say that a recipe learns, not what its method can
do. `score` and `baselines` have 95 % intervals over held-out rows; `difference` is the paired one to the best baseline,
of preferences to chance. `cpu_seconds` is the processor time of the whole recipe, which hardly depends on what else the
machine does; `peak_bytes` is the most memory of the process above that of the imported libraries. No base of random
numbers is measured here. Finished lines (results/tasks.jsonl) are kept by their settings and not run again;
the summary (tasks.json) is written when all are there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks_rows as rows
from lab import Failed, Lab, OutOfTime, Result, write

from peftkit.recipe.files import shipped

RESULTS = Path(__file__).with_name("results") / "tasks.jsonl"
LM, ENCODER, IMAGES = "embedded:smollm2-135m", "embedded:minilm", "embedded:efficientnet-lite0"
WIDE = ("quant.bits=32",)
BATCH = ("train.per_device_train_batch_size=16", "evaluate.batch_size=32")
SMALL = ("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1")
PREFERENCE = (*SMALL, "data.max_train_rows=96", "data.max_held_out_rows=64", "train.learning_rate=1e-4")
CONV = "adapter.target_modules=[expand_conv,project_conv,top_conv]"
"""The pointwise ones: a depthwise one has fewer numbers than its update would."""


@dataclass(frozen=True)
class Arm:
    """One recipe on one base and one set of rows."""

    recipe: str
    base: str
    data: Callable[[Path], list[str]]
    settings: tuple[str, ...]
    teacher: tuple[str, ...] = ()
    """Settings of the qlora_sft run that makes the adapter `teacher` first."""


def _rows(train: int, held_out: int) -> tuple[str, ...]:
    return f"data.max_train_rows={train}", f"data.max_held_out_rows={held_out}"


ARMS: dict[str, Arm] = {
    "sst2": Arm(
        "text_classification", ENCODER, rows.sst2, (*WIDE, *BATCH, *_rows(1000, 600), "train.num_train_epochs=2")
    ),
    "ag_news": Arm(
        "text_classification",
        ENCODER,
        rows.ag_news,
        (*WIDE, *BATCH, *_rows(1000, 600), "data.max_length=96", "data.too_long=truncate", "train.num_train_epochs=2"),
    ),
    "ag_news, 4-bit LLM": Arm(
        "text_classification",
        LM,
        rows.ag_news,
        (
            *SMALL,
            *_rows(200, 96),
            "data.max_length=96",
            "data.too_long=truncate",
            "train.num_train_epochs=2",
            "evaluate.shots=4",
            "evaluate.max_prompted_rows=96",
            "evaluate.max_new_tokens=8",
        ),
    ),
    "stars": Arm(
        "regression",
        ENCODER,
        rows.stars,
        (*WIDE, *BATCH, "data.max_length=128", "data.too_long=truncate", "train.num_train_epochs=8"),
    ),
    "wnut17": Arm(
        "token_classification", ENCODER, rows.wnut17, (*WIDE, *BATCH, *_rows(1500, 600), "train.num_train_epochs=4")
    ),
    "wnut17, 4-bit LLM": Arm(
        "token_classification", LM, rows.wnut17, (*SMALL, *_rows(300, 200), "train.num_train_epochs=3")
    ),
    "xquad": Arm(
        "extractive_qa",
        ENCODER,
        rows.xquad,
        (*WIDE, *BATCH, *_rows(600, 200), "data.max_length=256", "train.num_train_epochs=3"),
    ),
    "multi30k": Arm(
        "translation",
        LM,
        rows.multi30k,
        (*SMALL, *_rows(200, 48), "train.num_train_epochs=1", "evaluate.max_new_tokens=40"),
    ),
    "samsum": Arm(
        "summarization",
        LM,
        rows.samsum,
        (
            *SMALL,
            *_rows(120, 32),
            "data.max_length=384",
            "data.too_long=truncate",
            "train.num_train_epochs=1",
            "evaluate.max_new_tokens=48",
        ),
    ),
    "signs, frozen trunk": Arm("image_classification", IMAGES, rows.signs, ("train.num_train_epochs=20",)),
    "signs, LoRA on convolutions": Arm(
        "image_classification",
        IMAGES,
        rows.signs,
        ("adapter.method=lora", CONV, "train.learning_rate=1e-3", "train.num_train_epochs=12"),
    ),
    "dpo": Arm("dpo", LM, rows.rasbt, PREFERENCE),
    "orpo": Arm("orpo", LM, rows.rasbt, PREFERENCE),
    "kto": Arm("kto", LM, rows.rasbt, PREFERENCE),
    "distillation": Arm(
        "distillation",
        LM,
        rows.instructions,
        (*SMALL, *_rows(96, 64), "adapter.r=4", "distil=teacher", "train.num_train_epochs=1"),
        teacher=(*SMALL, *_rows(400, 64), "train.num_train_epochs=1"),
    ),
}


def setting_of(name: str) -> dict[str, Any]:
    """All that a line depends on."""
    arm = ARMS[name]
    data = getattr(arm.data, "__name__", "")
    return {"recipe": arm.recipe, "base": arm.base, "data": data, "settings": list(arm.settings), "name": name} | (
        {"teacher": list(arm.teacher)} if arm.teacher else {}
    )


def measure(setting: dict[str, Any]) -> Result:
    """Run a recipe whole in a scratch folder; its figures, with seconds and memory."""
    import peftkit.backbone.bnb  # noqa: F401
    from peftkit.recipe.execute import execute
    from peftkit.recipe.files import configure, find, load
    from peftkit.registry.store import Registry

    arm = ARMS[setting["name"]]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        registry = scratch / "registry"

        def run(recipe: str, *settings: str) -> Any:
            found, base = load(find(recipe)), f"base={arm.base}"
            resolved = configure(found, overrides=[base, *arm.data(scratch), *settings])
            return execute(found, resolved, registry=registry, runs=scratch / "runs")

        if arm.teacher:
            run("qlora_sft", "save_as=teacher", *arm.teacher)
        before, started = _forget_peak(), time.process_time()
        done = run(arm.recipe, *arm.settings)
        seconds, peak = time.process_time() - started, _resident("VmHWM") - before
        train, held = Registry(registry).resolve(done.saved_as).manifest.data[:2]
    figures, training = done.figures["evaluation"], done.figures["training"]
    return {
        "n_train": train.rows,
        "n_held": held.rows,
        **scores(figures),
        "cpu_seconds": round(seconds, 1),
        "steps": training["steps"],
        "tokens": training["tokens"],
        "peak_bytes": peak,
    }


def scores(figures: Mapping[str, Any]) -> Result:
    """The score that ranks with its interval, those of the baselines, and the difference to the best of these."""
    before, after, other = figures["before"], figures["after"], figures["other"]
    if "preference_accuracy" in after:
        likelier = {"likelier before": before["likelihood_accuracy"]} if "likelihood_accuracy" in before else {}
        found = after["preference_accuracy"]
        ahead = {end: found[end] - 0.5 for end in ("point", "low", "high")}
        chance = {"point": 0.5}
        return _line("preference_accuracy", found, {"chance": chance, **likelier}, "chance", ahead)
    if "higher_is_better" not in other:  # answers, which are ranked by how likely they are
        found = {"base": before["answer_nll"]}
        return _line("answer_nll", after["answer_nll"], found, "base", other["answer_nll_change"])
    metric = other["metric"]
    others = {name: known.get(metric) for name, known in other.get("baselines", {}).items()}
    return _line(metric, after[metric], others, other.get("best_baseline"), other.get("score_change"))


def _line(metric: str, score: Any, baselines: Mapping[str, Any], best: str | None, change: Any) -> Result:
    shown = {name: _rounded(found) for name, found in baselines.items()}
    best_baseline = {"best_baseline": best, "difference": _rounded(change)}
    return {"metric": metric, "score": _rounded(score), "baselines": shown, **best_baseline}


def _rounded(found: Any) -> dict[str, float | None] | None:
    if found is None:
        return None
    ends = {end: found.get(end) for end in ("point", "low", "high") if end in found}
    return {end: None if value is None else round(value, 4) for end, value in ends.items()}


def _forget_peak() -> int:
    """Begin the process's peak memory anew; the bytes that it has now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def main() -> int:
    """Run what is missing, and write the summary when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="NAME", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--results", type=Path, default=RESULTS, help="lines of the runs; the summary stands beside it")
    asked = parser.parse_args()
    rows.folder()
    lab = Lab(asked.results, measure, asked.minutes)
    found: dict[str, Any] = {}
    for name in asked.only or ARMS:
        if ARMS[name].recipe not in shipped():
            print(f"{name}: there is no recipe {ARMS[name].recipe}", file=sys.stderr)
            continue
        try:
            found[name] = {**setting_of(name), **lab.run(name, setting_of(name))}
        except Failed:
            continue
        except OutOfTime as next_one:
            print(f"the minutes are over before {next_one}; start again to go on", file=sys.stderr)
            return 1
    for failure in lab.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if lab.failures or asked.only:
        return int(bool(lab.failures))
    write(asked.results.with_suffix(".json"), {"recipes": found}, [line["environment"] for line in lab.lines()])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to go on")
