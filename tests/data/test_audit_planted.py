"""Every fault of the planted set is found, at its place; its clean twin is found free of everything.

A line of `planted/*.jsonl` is one fault: rows that are appended to a clean background, and the same rows without the
fault. Names, numbers and keys are made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_bases import write_tokenizer
from tokenizers.processors import TemplateProcessing

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.data.audit import Audit, DataSpec, inspect
from peftkit.data.findings.rules import RULES
from peftkit.errors import DataError

PLANTED = Path(__file__).parent / "planted"
BACKGROUNDS = ("background", "labels")
FAULTS = [
    (file.stem, json.loads(line))
    for file in sorted(PLANTED.glob("*.jsonl"))
    if file.stem not in BACKGROUNDS
    for line in file.read_text().splitlines()
]
FOUND = [fault for family, fault in FAULTS if family != "reading"]
# The tokenizer of the tests pads with its end-of-turn token, so this note stands beside every finding.
ALWAYS = {"pad_is_stop"}


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PLANTED / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    plain, bos = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("bos")
    write_tokenizer(plain)
    write_tokenizer(bos)
    writing = load_tokenizer(bos)  # writes its BOS before plain text, as Llama's does
    writing.hf.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{writing.hf.bos_token} $A", special_tokens=[(writing.hf.bos_token, writing.hf.bos_token_id)]
    )
    return {"plain": load_tokenizer(plain), "bos": writing}


@pytest.fixture
def look(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> Callable[[dict[str, Any], str], Audit]:
    """Audit a fault's rows ("rows") or their clean twin ("twin")."""

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    def run(fault: dict[str, Any], side: str) -> Audit:
        prefix = "" if side == "rows" else "twin_"
        rows = background(fault) + fault[side]
        text = fault.get("fill") == "text"
        held = [{"text": "A line of no matter."}] if text else [HELD]
        settings: dict[str, Any] = fault.get(f"{prefix}settings", fault.get("settings", {}))
        if f"{prefix}against" in fault:
            settings = {**settings, "against": write("bench.jsonl", fault[f"{prefix}against"])}
        held_out = write("held.jsonl", fault.get(f"{prefix}held_out", held))
        spec = DataSpec(train=write("rows.jsonl", rows), held_out=held_out, **settings)
        return inspect(spec, tokenizers[fault.get("tokenizer", "plain")], None)

    return run


HELD = {"messages": [{"role": "user", "content": "Who rings?"}, {"role": "assistant", "content": "praise"}]}


def background(fault: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if fault.get("alone") else rows_of(fault.get("background", "background"))


def expected_places(fault: dict[str, Any]) -> set[str]:
    before = len(background(fault))
    hits = fault.get("hits", range(len(fault["rows"])))
    if hits == "background":
        lines = set(range(1, before + 1))
    elif hits == "all":
        lines = set(range(1, before + len(fault["rows"]) + 1))
    else:
        lines = {before + 1 + at for at in hits}
    return {f"rows.jsonl:{line}" for line in lines} | {f"held.jsonl:{at + 1}" for at in fault.get("held_hits", ())}


@pytest.mark.parametrize("fault", FOUND, ids=[fault["fault"] for fault in FOUND])
def test_a_planted_fault_is_found_at_its_place_and_its_twin_is_clean(fault: dict[str, Any], look: Any) -> None:
    found = {finding.rule: finding for finding in look(fault, "rows").findings}
    assert fault["rule"] in found, f"{fault['fault']}: found only {sorted(found)}"
    finding = found[fault["rule"]]
    places = {Path(seen.where).name for seen in finding.examples}
    expected = expected_places(fault)
    assert places <= expected if len(expected) > 5 else places >= expected
    assert finding.count >= max(1, len(places))
    if "severity" in fault:
        assert finding.severity == fault["severity"]
    twin = {finding.rule for finding in look(fault, "twin").findings}
    assert twin <= ALWAYS, f"{fault['fault']}: the clean twin has {sorted(twin)}"


@pytest.mark.parametrize("fault", [f for name, f in FAULTS if name == "reading"], ids=lambda fault: str(fault["fault"]))
def test_what_cannot_be_read_is_refused_with_its_place(fault: dict[str, Any], look: Any) -> None:
    try:  # a file that cannot be read at all is an error; a row that cannot, a finding among the others
        said = "".join(
            f"{seen.where}: {seen.excerpt}"
            for finding in look(fault, "rows").errors
            if finding.rule == "unreadable"
            for seen in finding.examples
        )
    except DataError as error:
        said = error.fact
    assert f"rows.jsonl:{len(rows_of('background')) + 1}" in said
    assert fault["says"] in said
    assert {finding.rule for finding in look(fault, "twin").findings} <= ALWAYS


def test_the_planted_set_covers_the_table_of_rules() -> None:
    assert len(FAULTS) >= 40
    assert len({fault["fault"] for _, fault in FAULTS}) == len(FAULTS)
    assert {fault["rule"] for fault in FOUND} | ALWAYS | {"unreadable"} == set(RULES)  # unreadable: the set `reading`


@pytest.mark.parametrize(
    "family", [fault for name, fault in FAULTS if name == "private"], ids=lambda f: str(f["fault"])
)
def test_nothing_private_is_shown(family: dict[str, Any], look: Any) -> None:
    shown = json.dumps(look(family, "rows").record()["findings"], ensure_ascii=False)
    said = "\n".join(message["content"] for message in family["rows"][0]["messages"])
    digits = [
        word for word in said.split() if sum(char.isdigit() for char in word) >= 4 or ("@" in word and "." in word)
    ]
    assert not any(word.strip(".,") in shown for word in digits)
    assert "•" in shown, "what is private is masked, and something was"
