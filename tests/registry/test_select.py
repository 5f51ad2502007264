"""Filters of `list`, against a table of what each lets through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peftkit.errors import RegistryError
from peftkit.registry.index import Contents, Source, Summary
from peftkit.registry.select import Filters, latest, metric_path, select


def summary(name: str, number: int, **more: Any) -> Summary:
    known = Summary(name, f"{number:016x}", f"2026-01-{number:02}", "peft", "Qwen/Qwen3-4B", "abcd" * 4, "12ef" * 16)
    return replace(known, **{"method": "lora", "recipe": "qlora_sft", "aliases": ("latest",), **more})


def scored(mean: float, **more: float) -> dict[str, float]:
    return {"after.score.mean": mean, "before.score.mean": 0.1, "after.score.n": 64.0, **more}


VERSIONS = (
    summary("sql", 9, figures=scored(0.9, **{"after.by_kind.a.mean": 1.0}), method="DoRA", base="org/llama"),
    summary("sql", 2, figures=scored(0.5), aliases=("prod",), recipe=None),
    summary("tickets", 8, figures=scored(0.8, **{"other.answer_nll_change.point": -0.25}), aliases=("latest", "prod")),
    summary("tickets", 7, aliases=(), fingerprint="77" * 32, record=None),
    summary("tone", 6, data=(Source("train", "shared/rows.jsonl", "beef" * 16, 3),)),
    Summary("torn", "0" * 16, aliases=("latest",), problem="the manifest was changed"),
    summary("unpublished", 5, aliases=()),
)
KNOWN = Contents(VERSIONS, {f"torn@{'0' * 16}": "the manifest was changed"})


def names(filters: Filters, every: bool = False) -> list[str]:
    return [f"{each.name}{int(each.id, 16)}" for each in select(KNOWN, filters, every=every).versions]


@pytest.mark.parametrize(
    ("filters", "every", "expected"),
    [
        (Filters(), False, "sql9 tickets8 tone6 torn0"),
        (Filters(), True, "sql9 sql2 tickets8 tickets7 tone6 torn0 unpublished5"),
        (Filters(base="qwen"), False, "tickets8 tone6"),
        (Filters(base="QWEN3-4b"), True, "sql2 tickets8 tickets7 tone6 unpublished5"),
        (Filters(base="7777"), True, "tickets7"),
        (Filters(base="ABCDabcd"), False, "sql9 tickets8 tone6"),
        (Filters(base="12ef"), False, "sql9 tickets8 tone6"),
        (Filters(base="2ef1"), False, ""),
        (Filters(base="12e"), False, ""),
        (Filters(tag="prod"), False, "sql2 tickets8"),
        (Filters(tag="latest"), False, "sql9 tickets8 tone6"),
        (Filters(tag="pro"), True, ""),
        (Filters(method="dora"), False, "sql9"),
        (Filters(method="lora"), True, "sql2 tickets8 tickets7 tone6 unpublished5"),
        (Filters(recipe="QLORA_sft"), False, "sql9 tickets8 tone6"),
        (Filters(data="rows.jsonl"), False, "tone6"),
        (Filters(data="shared/rows.jsonl"), False, "tone6"),
        (Filters(data="ows.jsonl"), False, ""),
        (Filters(data="beefBEEF"), False, "tone6"),
        (Filters(data="bee"), False, ""),
        (Filters(metrics=("score > 0.8",)), False, "sql9"),
        (Filters(metrics=("score>=0.8",)), False, "sql9 tickets8"),
        (Filters(metrics=("score.mean <0.9",)), True, "sql2 tickets8"),
        (Filters(metrics=("after.score.mean <= .5",)), True, "sql2"),
        (Filters(metrics=("score = 0.8",)), False, "tickets8"),
        (Filters(metrics=("score == 8e-1",)), False, "tickets8"),
        (Filters(metrics=("score != 0.8",)), False, "sql9"),
        (Filters(metrics=("answer_nll_change<-0.1",)), False, "tickets8"),
        (Filters(metrics=("before.score.mean < 1", "score > 0.5")), True, "sql9 tickets8"),
        (Filters(base="qwen", tag="prod", metrics=("score > 0.6",)), False, "tickets8"),
    ],
)
def test_filters(filters: Filters, every: bool, expected: str) -> None:
    assert names(filters, every) == expected.split()
    assert (select(KNOWN, filters, every=every).reason is None) == bool(expected)


@pytest.mark.parametrize(
    ("filters", "said"),
    [
        (Filters(method="ia3"), "4 adapters, none with method 'ia3' (there is DoRA, lora)"),
        (Filters(base="llama", method="lora"), "1 with base 'llama', none with method 'lora' (there is DoRA)"),
        (Filters(tag="blue"), "7 versions, none with alias 'blue' (there is latest, prod)"),
        (Filters(base="7777"), "; --all finds 1 that are not the latest of their name"),
        (Filters(metrics=("score > 2",)), "none with after.score.mean > 2 (there is 0.8, 0.9)"),
    ],
)  # fmt: skip
def test_nothing_found_says_which_filter(filters: Filters, said: str) -> None:
    assert said in str(select(KNOWN, filters).reason)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("scor > 1", "did you mean score"),
        ("ore > 1", "no version has a metric 'ore'"),
        ("after.score > nan", "is no condition"),
        ("score", "is no condition"),
        ("score > high", "is no condition"),
        ("score >> 1", "no version has a metric 'score >'"),
        ("> 1", "is no condition"),
        ("", "is no condition"),
    ],
)
def test_a_condition_that_cannot_hold_is_an_error(condition: str, said: str) -> None:
    with pytest.raises(RegistryError, match=said):
        select(KNOWN, Filters(metrics=(condition,)))


def test_a_metric_is_the_nearest_path() -> None:
    paths = ["after.score.mean", "other.score.mean", "other.a.x", "other.b.x", "before.deep.er.y", "before.y", "z.z"]
    known = [summary("a", 1, figures=dict.fromkeys(paths, 1.0))]
    assert metric_path("score", known) == "after.score.mean"
    assert metric_path("other.score", known) == "other.score.mean"
    assert metric_path("y", known) == "before.y"
    assert metric_path("z", known) == "z.z"
    with pytest.raises(RegistryError, match=r"2 metrics\n.*other\.a\.x, other\.b\.x"):
        metric_path("x", known)
    with pytest.raises(RegistryError, match="a version with metrics"):
        metric_path("x", [])


def test_a_lost_latest_shows_the_newest() -> None:
    lost = Contents((summary("a", 2, aliases=()), summary("a", 1, aliases=())), {"a@latest": "damaged"})
    assert [each.created for each in latest(lost)] == ["2026-01-02"]
    assert select(Contents((), {})).versions == ()
