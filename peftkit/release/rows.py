"""The held-out rows that an adapter is judged by: named by the user, or those of the run that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from peftkit.base.head import Head
from peftkit.base.ref import longest_sequence, read_config
from peftkit.base.tokenizer import load_tokenizer
from peftkit.data.audit import DataSpec, Part, divide, encode
from peftkit.data.formats import Dataset, Row, load_rows
from peftkit.errors import DeltaError
from peftkit.events import Report, Warned, silent
from peftkit.registry.manifest import Data, Version
from peftkit.release.measured import NotMeasured
from peftkit.runs import list_runs
from peftkit.tuning.attach import head_of


@dataclass(frozen=True)
class HeldOut:
    """Rows that an adapter was not trained on, and how its training rendered rows."""

    rows: tuple[Row, ...]
    source: Dataset
    settings: DataSpec

    @property
    def sha256(self) -> str:
        """Digest of the file that the rows stand in."""
        return self.source.sha256

    def part(self, folder: Path, report: Report = silent) -> Part:
        """The rows as the tokens of the base in `folder`; rows that are too long for it are left out, and counted.

        Raises DataError when no row is left, or one cannot be rendered.
        """
        limit = min(filter(None, (self.settings.max_length, longest_sequence(read_config(folder)))), default=None)
        settings = self.settings
        if settings.too_long == "raise":
            settings = settings.model_copy(update={"too_long": "drop"})
        part = encode(self.rows, self.source, "held_out", load_tokenizer(folder), settings, limit)
        for places, what in ((part.dropped, "left out"), (part.truncated, "cut")):
            if places:
                report(Warned(f"{len(places)} held-out rows of {part.source} are {what}: above {limit} tokens"))
        return part

    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Every other row each, so that what was chosen on one half can be judged on the other."""
        return replace(self, rows=self.rows[::2]), replace(self, rows=self.rows[1::2])


def first_tokens(part: Part, most: int) -> Part:
    """The part's first examples, as long as they have at most `most` answer tokens; at least one."""
    taken, tokens = 0, 0
    for example in part.examples:
        tokens += example.answer_tokens
        if taken and tokens > most:
            break
        taken += 1
    return replace(part, examples=part.examples[:taken])


def rows_by_version(
    given: Mapping[str, Path], named: Sequence[str], versions: Sequence[Version], runs_root: Path
) -> dict[str, HeldOut | NotMeasured]:
    """`name@version` → its held-out rows, for `versions` that the user called `named`; a file may be given under the
    name that was typed, the adapter's, or `name@version`.

    Raises DeltaError for a file under another name, DataError when one cannot be read.
    """
    calls = {v.reference: (typed, v.name, v.reference) for typed, v in zip(named, versions, strict=True)}
    if unknown := sorted(set(given) - {call for each in calls.values() for call in each}):
        raise DeltaError(
            f"rows are given for {', '.join(unknown)}, which is not among the adapters",
            expected=f"one of {', '.join(named)}",
            hint=f"--rows {named[0]}={given[unknown[0]]}",
        )
    files = {v.reference: [given[call] for call in calls[v.reference] if call in given] for v in versions}
    return {
        v.reference: held_out_rows(v, runs_root, {v.reference: files[v.reference][0]} if files[v.reference] else {})
        for v in versions
    }


def held_out_rows(version: Version, runs_root: Path, given: Mapping[str, Path]) -> HeldOut | NotMeasured:
    """The rows to judge a version by: `given` under its name or `name@version`, else those of the run that made it.

    A run's rows count only when the run says itself that it made this version, and their file still has the digest
    that the manifest names. Raises DataError when a named file cannot be read.
    """
    recorded = _recorded_settings(version.manifest.recipe.config if version.manifest.recipe else {})
    path = given.get(version.reference, given.get(version.name))
    if (head := head_of(version)) is not None:
        return _of_task(version, head, path)
    if path is not None:
        source = load_rows(path)
        return HeldOut(source.rows, source, recorded.model_copy(update={"format": "auto"}))
    ask = f"name them: --rows {version.name}=held_out.jsonl"
    # A manifest may name any run; only the run that says itself that it made this version is believed.
    kept = next((run.path for run in list_runs(runs_root) if run.saved_as == version.reference), None)
    promised = next((data for data in version.manifest.data if data.role == "held_out"), None)
    if kept is None or promised is None:
        return NotMeasured(
            f"no run here says that it made {version.reference}, so its held-out rows are not known", ask
        )
    settings = _run_settings(kept / "config.yaml")
    if settings is None:
        return NotMeasured(f"{kept / 'config.yaml'} cannot be read, so the held-out rows are not known", ask)
    return _of_run(settings, promised, ask)


def _of_task(version: Version, head: Head, path: Path | None) -> NotMeasured:
    """Why answers are not what an adapter of a task is judged by. Raises DeltaError where rows are named for it."""
    why = f"{version.reference} has a {head.kind} head, which gives no answer tokens to measure"
    hint = f"peftkit eval {version.name} --data FILE measures it by its task's own metric"
    if path is not None:
        raise DeltaError(f"{why}; rows are given: {path}", expected="rows for adapters that answer in words", hint=hint)
    return NotMeasured(why, hint)


def _of_run(settings: DataSpec, promised: Data, ask: str) -> HeldOut | NotMeasured:
    file = settings.held_out or settings.train
    if file is None or not Path(file).is_file():
        return NotMeasured(f"the held-out rows {promised.source} are not where they were ({file})", ask)
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != promised.sha256:
        return NotMeasured(
            f"{file} has the SHA-256 {digest[:16]}…, and the held-out rows were {promised.sha256[:16]}…", ask
        )
    rows: Sequence[Row]
    if settings.held_out:
        source = load_rows(settings.held_out, settings.format, strict=False)
        rows = source.rows
    else:
        _, rows, source = divide(settings, load_rows(file, settings.format, strict=False), silent)
    return HeldOut(tuple(rows[: settings.max_held_out_rows]), source, settings)


def _run_settings(file: Path) -> DataSpec | None:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        return DataSpec.model_validate(config["data"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def _recorded_settings(config: Mapping[str, Any]) -> DataSpec:
    """How training rendered and cut its rows; the defaults where a manifest does not say."""
    data = config.get("data")
    if not isinstance(data, Mapping) or "task" in data:  # a task says what its own rows are cut by
        return DataSpec()
    shared = ("loss", "think", "template", "template_kwargs", "max_length", "too_long")
    return DataSpec.model_validate({key: data[key] for key in shared if key in data})
