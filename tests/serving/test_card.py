"""Cards: figures as they were measured, aliases as the registry has them, and nothing that could be a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkit import render
from peftkit.registry.index import contents
from peftkit.registry.lineage import lineage
from peftkit.registry.manifest import Draft, Version
from peftkit.registry.store import Registry
from peftkit.serving.page.card import card, row
from peftkit.serving.page.measured import measures, retention

SECRET = "Dear support, my card number is 4111"
MEASURED = {
    "before": {
        "answer_nll": {"point": 2.5, "low": 2.25, "high": 2.75},
        "retention_nll": {"point": 3.0, "low": 2.9, "high": 3.1},
        "score": {"metric": "json_fields", "n": 48, "mean": 0.125, "fields": {SECRET: {"f1": 1.0}}},
        "stopped": 0.5,
    },
    "after": {
        "answer_nll": {"point": 0.5, "low": 0.25, "high": 0.75},
        "retention_nll": {"point": 3.5, "low": 3.4, "high": 3.6},
        "score": {"metric": "json_fields", "n": 48, "mean": 0.875, "fields": {SECRET: {"f1": 1.0}}},
        "stopped": 1.0,
    },
    "other": {
        "metric": "json_fields",
        "instruction": SECRET,
        "answer_nll_change": {"point": -2.0, "low": -2.25, "high": -1.75},
        "retention_nll_change": {"point": 0.5, "low": 0.4, "high": 0.6},
        "score_change": {"point": 0.75, "low": -0.125, "high": 0.875},
        "behaviour": {"families": {SECRET: {"p": 0.5}}},
    },
}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def publish(registry: Registry, name: str, number: int = 0, **fields: Any) -> Version:
    payload = registry.root.parent / f"payload-{name}-{number}"
    payload.mkdir()
    (payload / "tensors.safetensors").write_bytes(bytes([2, *[0] * 7]) + b"{}")
    base = {"source": "example/base", "fingerprint": "0" * 64}
    return registry.publish(name, payload, Draft.model_validate({"kind": "tensors", "base": base, **fields}))


def told(registry: Registry, version: Version) -> dict[str, Any]:
    known = contents(registry)
    mine = [each for each in known.versions if each.name == version.name]
    return card(version, lineage(registry, version.reference, known), mine)


def test_every_figure_stands_with_its_interval_its_change_and_where_it_points(registry: Registry) -> None:
    metrics = publish(registry, "tickets", metrics=MEASURED).manifest.metrics
    lines = {line["name"]: line for line in measures(metrics)}
    assert list(lines) == ["answer NLL", "json fields", "answers that end by themselves"]
    assert lines["answer NLL"] == {
        "name": "answer NLL",
        "before": render.interval(2.5, 2.25, 2.75),
        "after": render.interval(0.5, 0.25, 0.75),
        "change": render.interval(-2.0, -2.25, -1.75),
        "verdict": "better",
    }
    assert lines["json fields"]["before"] == "0.125 on 48 rows"
    assert lines["json fields"]["verdict"] == "unclear"  # the interval holds 0
    forgotten = retention(metrics)
    assert forgotten is not None
    assert (forgotten["verdict"], forgotten["change"]) == ("worse", render.interval(0.5, 0.4, 0.6))


@pytest.mark.parametrize(
    ("name", "other", "verdict"),
    [
        ("accuracy", {"metric": "accuracy", "higher_is_better": True}, "better"),
        ("rmse", {"metric": "rmse", "higher_is_better": False}, "worse"),
        ("eval_loss", {"metric": "eval_loss"}, "worse"),
        ("exact_match", {"metric": "exact_match"}, "better"),
    ],
)
def test_a_rise_is_good_or_bad_as_the_metric_says(
    registry: Registry, name: str, other: dict[str, Any], verdict: str
) -> None:
    interval = {"point": 0.5, "low": 0.25, "high": 0.75}
    metrics = {"after": {name: interval, "rows": 9, "metric": name}, "other": {**other, "score_change": interval}}
    (line,) = measures(publish(registry, "task", metrics=metrics).manifest.metrics)
    assert (line["name"], line["before"], line["verdict"]) == (name.replace("_", " "), None, verdict)


def test_a_combination_has_a_line_for_each_parent(registry: Registry) -> None:
    nll = {"answer_nll": {"point": 2.0, "low": 1.5, "high": 2.5}}
    both = {"tickets@0123456789abcdef": nll, "sql@0123456789abcdef": nll}
    lines = measures(publish(registry, "both", metrics={"before": both, "after": both}).manifest.metrics)
    assert [line["name"] for line in lines] == [f"answer NLL on {parent}" for parent in both]


def test_no_text_of_a_row_a_setting_or_an_instruction_leaves(registry: Registry) -> None:
    version = publish(
        registry,
        "tickets",
        metrics=MEASURED,
        adapter={"method": "lora", "r": 8, "target_modules": ["q_proj"], "teacher_prompt": SECRET},
        recipe={"name": "lora_sft", "sha256": "1" * 64, "config": {"system": SECRET}},
        environment={"user": SECRET},
        receipts=[{"type": "gate", "passed": True, "tasks": {"a": {"rows": [SECRET]}}}],
    )
    shown = told(registry, version)
    summary = contents(registry).versions[0]
    assert SECRET not in json.dumps([shown, row(summary, ["tickets"])])
    assert shown["receipts"] == [{"type": "gate", "facts": [("passed", "yes"), ("tasks", "1 recorded")]}]
    assert shown["method"]["r"] == 8


def test_aliases_are_what_the_registry_says_after_any_moves(registry: Registry) -> None:
    first, second = (publish(registry, "tickets", n, adapter={"r": n}) for n in (1, 2))
    for step in range(4):
        if step == 1:
            registry.tag(first.reference, "prod")
        if step == 2:
            registry.restore("tickets")
        if step == 3:
            registry.untag("tickets", "prod")
        shown = told(registry, second)
        assert shown["aliases"] == registry.aliases("tickets")
        assert [(m["alias"], m["number"], m["version"]) for m in shown["moves"]] == [
            (move.alias, move.number, move.version) for move in reversed(registry.history("tickets"))
        ]
    assert [each["id"] for each in shown["versions"]] == [each.id for each in registry.versions("tickets")]


def test_lineage_names_what_it_was_made_from_and_what_was_made_of_it(registry: Registry) -> None:
    first = publish(registry, "tickets", 1)
    parent = {"name": "tickets", "version": first.id, "relation": "continued"}
    second = publish(registry, "tickets", 2, parents=[parent])
    assert [step["reference"] for step in told(registry, second)["ancestors"]] == [first.reference]
    assert [step["reference"] for step in told(registry, first)["descendants"]] == [second.reference]
    gone = card(second)
    assert (gone["ancestors"], gone["aliases"], gone["problems"]) == (
        [],
        {},
        ["this version is no longer in the registry"],
    )


def test_a_strangers_manifest_of_any_size_gives_a_small_card(registry: Registry) -> None:
    parents = [{"name": "x", "version": f"{n:016x}", "relation": "combined"} for n in range(2000)]
    receipt = {"type": "import", "files": {f"f{n}": "0" for n in range(500)}, "source": "s" * 10_000}
    version = publish(
        registry,
        "large",
        parents=parents,
        receipts=[receipt] * 60,
        adapter={"method": {"deep": []}, "r": [1], "target_modules": ["t" * 1000] * 500, "head": "none"},
        metrics={"after": {f"m{n}": n for n in range(1000)}, "other": {"metric": ["not a name"]}},
        data=[{"role": "train", "source": "d" * 10_000, "sha256": "2" * 64, "rows": 1}] * 60,
    )
    shown = told(registry, version)
    assert len(json.dumps(shown)) < 200_000
    assert shown["method"]["method"] is None
