"""The gate lets through what keeps every parent's task, and nothing that was not measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.errors import ConfigError
from peftkit.events import Event, Table
from peftkit.release.gate import COLUMNS, GateResult, Task, gate
from peftkit.release.measured import NotMeasured
from peftkit.tuning.attach import Attached, attach

LETTERS = {"one": "ab", "two": "xy"}


@pytest.fixture(scope="module")
def host(shared: Any, taught: dict[str, Path]) -> Attached:
    """A backbone with the parents `one` and `two` in the registry, and `weak`, with a fiftieth of one's ΔW."""
    from safetensors.torch import load_file

    for name, payload in taught.items():
        shared.taught(name, payload)
    one = load_file(str(shared.registry.resolve("one").path / "adapter_model.safetensors"))
    config = json.loads((shared.registry.resolve("one").path / "adapter_config.json").read_text())

    def scaled(share: float) -> Any:
        # ΔW is linear in B alone.
        return lambda *given: {key: value * (share if "lora_B" in key else 1.0) for key, value in one.items()}

    for name, share in (("weak", 0.02), ("same", 1.0), ("nothing", 0.0)):
        shared.publish(name, scaled(share), bits=32, config=config)
    return attach(shared.backbone(32))


@pytest.fixture(scope="module")
def rows(shared: Any, host: Attached) -> dict[str, Any]:
    return {
        shared.registry.resolve(name).reference: shared.rows(60, f"{name}.jsonl", seed=9, letters=letters)
        for name, letters in LETTERS.items()
    }


def judged(shared: Any, host: Attached, rows: Any, candidate: str, keep: float = 0.9, **more: Any) -> GateResult:
    parents = [shared.registry.resolve(name) for name in more.pop("parents", LETTERS)]
    return gate(host, parents, shared.registry.resolve(candidate), rows, keep, **more)


def task(result: GateResult, name: str) -> Task:
    found = next(task for reference, task in result.tasks.items() if reference.startswith(name + "@"))
    assert isinstance(found, Task)
    return found


def test_a_parent_keeps_all_of_its_own_task_and_loses_the_others(shared: Any, host: Attached, rows: Any) -> None:
    result = judged(shared, host, rows, "one")
    kept = task(result, "one").kept
    assert (kept.point, kept.low, kept.high) == (1.0, 1.0, 1.0)
    assert task(result, "one").lost.point == 0
    assert task(result, "two").kept.high < 0.9
    assert task(result, "two").lost.low > 0
    assert result.failed == (shared.registry.resolve("two").reference,)
    assert not result.passed
    assert "the lower end must reach 90%" in result.describe()


def test_the_same_deltas_pass(shared: Any, host: Attached, rows: Any) -> None:
    result = judged(shared, host, rows, "same", parents=["one"], keep=1.0)
    assert result.passed
    assert result.failed == ()


def test_a_planted_weak_candidate_is_refused(shared: Any, host: Attached, rows: Any) -> None:
    result = judged(shared, host, rows, "weak", parents=["one"])
    assert not result.passed
    assert 0 < task(result, "one").kept.point < 0.9
    # The same candidate passes a gate below what it keeps: it is the share that decides.
    assert judged(shared, host, rows, "weak", parents=["one"], keep=task(result, "one").kept.low).passed


def test_the_lower_end_decides_and_not_the_point(shared: Any, host: Attached, rows: Any) -> None:
    kept = task(judged(shared, host, rows, "weak", parents=["one"]), "one").kept
    assert kept.low < kept.point
    assert not judged(shared, host, rows, "weak", parents=["one"], keep=(kept.low + kept.point) / 2).passed


def test_figures_are_those_of_the_models_alone(shared: Any, host: Attached, rows: Any) -> None:
    """Against a forward pass of one row at a time and a softmax in float64."""
    version = shared.registry.resolve("one")
    found = task(judged(shared, host, rows, "weak", parents=["one"]), "one")
    part = rows[version.reference].part(shared.base)
    sums = []
    for name in (None, "one", "weak"):
        alone = attach(shared.backbone(32), *([shared.registry.resolve(name)] if name else []))
        total = 0.0
        for example in part.examples:
            with torch.no_grad():
                logits = alone.model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].double()
            values = -torch.log_softmax(logits, dim=1)
            wanted = [(i, label) for i, label in enumerate(example.labels[1:]) if label != -100]
            total += sum(float(values[i, label]) for i, label in wanted)
        sums.append(total)
    base, own, candidate = (value / part.answer_tokens for value in sums)
    assert (found.base.point, found.parent.point, found.candidate.point) == pytest.approx(
        (base, own, candidate), abs=1e-5
    )
    assert found.kept.point == pytest.approx((base - candidate) / (base - own), abs=1e-4)
    assert found.answer_tokens == part.answer_tokens
    assert found.rows == 60


def test_a_task_without_rows_never_passes(shared: Any, host: Attached, rows: Any) -> None:
    reference = shared.registry.resolve("one").reference
    given = {reference: rows[reference]}
    result = judged(shared, host, given, "one")
    assert not result.passed
    assert result.failed == (shared.registry.resolve("two").reference,)
    assert "not measured: no held-out rows are named for it" in result.describe()
    missing = {**rows, reference: NotMeasured("gone", "find them")}
    assert "not measured: gone (find them)" in judged(shared, host, missing, "one").describe()


def test_too_few_answer_tokens_never_pass(shared: Any, host: Attached) -> None:
    version = shared.registry.resolve("one")
    few = shared.rows(10, "few-one.jsonl", seed=9, letters="ab")
    result = judged(shared, host, {version.reference: few}, "one", parents=["one"], keep=0.5)
    tokens = few.part(shared.base).answer_tokens
    assert not result.passed
    assert result.tasks[version.reference].record()["reason"] == (
        f"not measured: {tokens} answer tokens, at least 1,000 are needed"
    )
    assert judged(shared, host, {version.reference: few}, "one", parents=["one"], keep=0.5, min_tokens=tokens).passed


def test_a_parent_that_improved_nothing_is_no_reference(shared: Any, host: Attached, rows: Any) -> None:
    version = shared.registry.resolve("nothing")
    own = rows[shared.registry.resolve("one").reference]
    result = judged(shared, host, {version.reference: own}, "one", parents=["nothing"])
    assert not result.passed
    assert "not measured: the parent did not improve its own task" in result.describe()


def test_no_parents_pass_no_gate() -> None:
    assert not GateResult(0.9, {}).passed


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.01, float("nan")])
def test_a_share_is_between_zero_and_one(shared: Any, host: Attached, rows: Any, keep: float) -> None:
    with pytest.raises(ConfigError, match="no share to keep"):
        judged(shared, host, rows, "one", keep)


def test_the_host_is_as_it_was(shared: Any, host: Attached, rows: Any) -> None:
    judged(shared, host, rows, "one")
    assert host.versions == {}
    assert host.active is None


def test_the_result_is_told_and_recorded(shared: Any, host: Attached, rows: Any) -> None:
    told: list[Event] = []
    result = judged(shared, host, rows, "one", report=told.append)
    table = next(event for event in told if isinstance(event, Table))
    assert table.columns == COLUMNS
    assert [row[-1] for row in table.rows] == ["keeps", "loses"]
    record = result.record()
    assert json.loads(json.dumps(record)) == record
    assert record["passed"] is False
    assert set(record["tasks"]) == set(rows)
    assert next(iter(record["tasks"].values()))["kept"]["point"] == 1.0
