"""Held-out rows: those that are named win, those of a run count only when their file is what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.data.audit import DataSpec, audit
from peftkit.errors import DataError
from peftkit.events import Event, Warned
from peftkit.registry.manifest import Draft, Version
from peftkit.release.measured import NotMeasured
from peftkit.release.rows import HeldOut, held_out_rows
from peftkit.runs import RunFolder


@pytest.fixture
def made(lab: Any) -> Callable[..., Version]:
    """Publish an adapter as a run with these data settings would have, and finish that run."""

    def make(data: dict[str, Any], *, saved_as: str | None = None, config: dict[str, Any] | None = None) -> Version:
        version = lab.adapter("parent")
        file = Path(data.get("held_out") or data["train"])
        record = {"role": "held_out", "source": file.name, "sha256": held(file).sha256, "rows": 3}
        fields = lab.draft(32).model_dump() | {"data": [record]}
        if config is not None:
            fields["recipe"] = {"name": "sft", "sha256": "0" * 64, "config": config}
        payload = lab.folder / "payloads" / "parent"
        version = lab.registry.publish(
            "tickets", payload, Draft.model_validate(fields), base=lab.backbone(32).identity.record
        )
        run = RunFolder.create(lab.folder / "runs", "sft", {"data": data}, {})
        run.finish("done", saved_as=saved_as or version.reference)
        return version

    return make


def held(file: Path) -> HeldOut:
    from peftkit.data.formats import load_rows

    source = load_rows(file)
    return HeldOut(source.rows, source, DataSpec())


def texts(found: Any) -> list[str]:
    assert isinstance(found, HeldOut), found
    return [str(row.messages[-1]["content"]) for row in found.rows]


@pytest.fixture
def files(lab: Any) -> tuple[Path, Path]:
    for name, seed in (("own.jsonl", 1), ("other.jsonl", 2)):
        lab.rows(30, name, seed=seed)
    return lab.folder / "own.jsonl", lab.folder / "other.jsonl"


def test_rows_of_the_run_that_made_a_version(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0])})
    found = held_out_rows(version, lab.folder / "runs", {})
    assert texts(found) == texts(held(files[0]))
    assert isinstance(found, HeldOut)
    assert found.sha256 == version.manifest.data[0].sha256


def test_named_rows_win_by_name_and_by_reference(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0])})
    for name in (version.name, version.reference):
        assert texts(held_out_rows(version, lab.folder / "runs", {name: files[1]})) == texts(held(files[1]))
    both = {version.name: files[0], version.reference: files[1]}
    assert texts(held_out_rows(version, lab.folder / "runs", both)) == texts(held(files[1]))
    # Rows of another adapter are not taken.
    assert texts(held_out_rows(version, lab.folder / "runs", {"other": files[1]})) == texts(held(files[0]))


def test_a_file_that_was_changed_does_not_count(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0])})
    files[0].write_bytes(files[1].read_bytes())
    found = held_out_rows(version, lab.folder / "runs", {})
    assert isinstance(found, NotMeasured)
    assert version.manifest.data[0].sha256[:16] in found.why
    assert found.hint == "name them: --rows tickets=held_out.jsonl"


def test_a_file_that_is_gone_does_not_count(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0])})
    files[0].unlink()
    found = held_out_rows(version, lab.folder / "runs", {})
    assert isinstance(found, NotMeasured)
    assert "are not where they were" in found.why


def test_only_the_run_that_says_it_made_the_version_is_believed(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0])}, saved_as="tickets@0000000000000000")
    found = held_out_rows(version, lab.folder / "runs", {})
    assert isinstance(found, NotMeasured)
    assert "no run here says that it made" in found.why
    assert isinstance(held_out_rows(version, lab.folder / "no-runs", {}), NotMeasured)


def test_a_torn_config_is_a_reason_and_no_traceback(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0])})
    for config in (lab.folder / "runs").glob("*/config.yaml"):
        config.write_text("data: [")
    found = held_out_rows(version, lab.folder / "runs", {})
    assert isinstance(found, NotMeasured)
    assert "cannot be read" in found.why


def test_rows_set_aside_are_those_that_the_run_set_aside(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    data = {"train": str(files[0]), "held_out_share": 0.3, "seed": 5}
    version = made(data)
    found = held_out_rows(version, lab.folder / "runs", {})
    audited = audit(DataSpec.model_validate(data), lab.backbone(32).tokenizer, 512)
    assert texts(found) == [str(row.messages[-1]["content"]) for row in audited.held_out.rows]
    assert 0 < len(texts(found)) < 30


def test_rows_are_cut_as_the_run_cut_them(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0]), "max_held_out_rows": 7})
    assert len(texts(held_out_rows(version, lab.folder / "runs", {}))) == 7
    # A file that is named is taken as a whole.
    assert len(texts(held_out_rows(version, lab.folder / "runs", {"tickets": files[1]}))) == 30


def test_rows_are_rendered_as_in_training(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0])}, config={"data": {"template": "plain"}} | {"x": 1})
    by_template = held_out_rows(version, lab.folder / "runs", {"tickets": files[0]})
    assert isinstance(by_template, HeldOut)
    assert by_template.settings.template == "plain"


def test_rows_that_are_too_long_are_left_out_and_counted(lab: Any, files: tuple[Path, Path]) -> None:
    told: list[Event] = []
    rows = held(files[0])
    whole = rows.part(lab.base)
    limit = sorted(len(example.input_ids) for example in whole.examples)[20]
    short = HeldOut(rows.rows, rows.source, DataSpec(max_length=limit))
    part = short.part(lab.base, told.append)
    assert all(len(example.input_ids) <= limit for example in part.examples)
    left_out = 30 - len(part.examples)
    assert left_out > 0
    warning = next(event for event in told if isinstance(event, Warned))
    assert warning.text.startswith(f"{left_out} held-out rows")


def test_halves_share_no_row(lab: Any, files: tuple[Path, Path]) -> None:
    rows = held(files[0])
    one, other = rows.halves()
    assert sorted(texts(one) + texts(other)) == sorted(texts(rows))
    assert abs(len(one.rows) - len(other.rows)) <= 1


def test_a_named_file_that_cannot_be_read_is_an_error(lab: Any, made: Any, files: tuple[Path, Path]) -> None:
    version = made({"held_out": str(files[0])})
    with pytest.raises(DataError):
        held_out_rows(version, lab.folder / "runs", {"tickets": lab.folder / "absent.jsonl"})
    (lab.folder / "broken.jsonl").write_text(json.dumps({"a": 1}) + "\n")
    with pytest.raises(DataError):
        held_out_rows(version, lab.folder / "runs", {"tickets": lab.folder / "broken.jsonl"})
