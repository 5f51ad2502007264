"""`peftkit data check` as a user meets it: everything is shown, the exit code says whether a run would start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_bases import write_base

Cli = Callable[..., tuple[int, str, str]]
ROWS = [(f"What stands on page {n}?", f"A picture of {n} boats.") for n in range(30)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(tiny: Path, places: Path) -> str:
    """Also writes rows.jsonl with three faults, good.jsonl, held.jsonl and bench.jsonl."""
    faulty = [*ROWS, ("Whose is it?", "Ask ruth.amsel@marlow-bakery.de."), ("And <b>?", "Caf\ufffd"), ROWS[0]]
    bench = [("On which of the seven hills does the oldest lamp of the whole town stand today?", "The third.")]
    sets = {"rows": faulty, "good": [*ROWS, *bench], "held": [("Who?", "Nobody.")], "leaked": ROWS[:9], "bench": bench}
    for name, pairs in sets.items():
        lines = (json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs)
        (places / f"{name}.jsonl").write_text("".join(lines))
    return str(tiny)


def test_findings_are_shown_with_their_places_and_how_to_mend_them(cli: Cli, base: str, places: Path) -> None:
    code, out, _ = cli("data", "check", "rows.jsonl", "--base", base, "--html", "a.html", "held_out=held.jsonl")
    assert code == 0
    assert "warning email: e-mail addresses in 1 row\n    rows.jsonl:31: " in out
    assert (
        "warning duplicate: 1 row repeating an earlier row word for word\n    rows.jsonl:33: like rows.jsonl:1" in out
    )
    assert "to mend it: replace them by addresses under example.com" in out
    assert "0 errors, 3 warnings, 1 note: a run can start" in out
    assert "ruth.amsel" not in out + (places / "a.html").read_text()
    assert "replacement_char" in (places / "a.html").read_text()


def test_an_error_gives_exit_code_1_after_everything_was_shown(cli: Cli, base: str) -> None:
    code, out, _ = cli("data", "check", "rows.jsonl", "--base", base, "held_out=leaked.jsonl")
    assert code == 1
    assert out.index("error leak: 9 held-out rows") < out.index("warning duplicate")
    assert "1 error, 3 warnings, 1 note: a run stops here; if it is meant so: data.accept=[leak]" in out
    assert cli("data", "check", "rows.jsonl", "--base", base, "held_out=leaked.jsonl", "accept=[leak]")[0] == 0


def test_contamination_is_told_against_the_file_that_is_named(cli: Cli, base: str) -> None:
    arguments = ("data", "check", "good.jsonl", "--base", base, "held_out=held.jsonl", "--json")
    assert not [f for f in json.loads(cli(*arguments)[1])["findings"] if f["severity"] != "note"]
    code, out, _ = cli(*arguments, "--against", "bench.jsonl")
    (found,) = [f for f in json.loads(out)["findings"] if f["severity"] != "note"]
    assert (code, found["rule"], found["count"]) == (0, "contaminated", 1)
    assert found["text"] == "1 training row holding rows of bench.jsonl"
    assert found["examples"][0]["where"] == "good.jsonl:31"
