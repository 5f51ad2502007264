"""The model card of an exported version: what its manifest says, for people; it means nothing (FORMAT.md, section 7).

Every text of a manifest may be hostile: in the front matter YAML quotes it, in the body Markdown and HTML are escaped.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from peftkit import render
from peftkit.errors import RegistryError
from peftkit.registry.manifest import Base, Data, Manifest, Version

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".yaml", ".gguf", ".zip", ".gz")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}", re.ASCII)
_TAG = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}", re.ASCII)
_NOT_STATED = "not stated"
_LONGEST = 300
_MOST_ROWS = 100
_ENTITIES = {ord(char): f"&#{ord(char)};" for char in "&<>\"'`*[]|\\~#!@$"}
# What Markdown takes for emphasis or for the address of a page: a_b, 09:30 and "www" alone stay readable.
_SIGNS = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?![0-9\s]|$)|(?i:(?<=www))\.")


def card(version: Version, license: str | None = None) -> str:
    """The README.md of a version; the same version and licence give the same text.

    Raises RegistryError for a licence that is not spelled as the Hub spells licences.
    """
    manifest = version.manifest
    front = yaml.safe_dump(_front_matter(manifest, license), sort_keys=False, allow_unicode=False, width=1000)
    sections = [
        f"---\n{front}---\n\n# {escape(version.name)}",
        _introduction(version, license),
        _section("Base", _facts(_base(manifest.base))),
        _section("Data", _data(manifest.data)),
        _section("Settings", _facts(_plain_items(manifest.adapter))),
        _section("Measured", _facts(_measured(manifest))),
        _section("Made from", _facts(_lineage(manifest))),
        _section("How to use it", _usage(version)),
        _section("Environment", _facts(sorted(manifest.environment.items()))),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def is_hub_id(text: str) -> bool:
    """Whether `text` reads as `owner/name` of the Hub, and not as a file."""
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text and not text.lower().endswith(_FILE_SUFFIXES)


def escape(value: Any, longest: int = _LONGEST) -> str:
    """A manifest's text as one line of Markdown that shows exactly it: no markup, no HTML, no link to a page."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char for char in text)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return _SIGNS.sub(lambda sign: f"&#{ord(sign[0])};", shown.translate(_ENTITIES))


def _front_matter(manifest: Manifest, license: str | None) -> dict[str, Any]:
    if license is not None and not _LICENSE.fullmatch(license):
        raise RegistryError(
            f"{license!r} is no licence the Hub knows",
            expected="an identifier such as apache-2.0, mit, cc-by-4.0, llama3.1 or other",
            hint="https://huggingface.co/docs/hub/repositories-licenses lists them",
        )
    front: dict[str, Any] = {}
    if is_hub_id(manifest.base.source):
        front |= {"base_model": manifest.base.source}
        front |= {"base_model_relation": "adapter" if manifest.kind == "peft" else "finetune"}
    if manifest.kind == "peft":
        front["library_name"] = "peft"
    if license is not None:
        front["license"] = license
    datasets = sorted({data.source for data in manifest.data if is_hub_id(data.source)})
    if datasets:
        front["datasets"] = datasets
    method = str(manifest.adapter.get("method", "")).lower()
    tags = ["peftkit", "peft" if manifest.kind == "peft" else "", method if _TAG.fullmatch(method) else ""]
    return {**front, "tags": [tag for tag in tags if tag]}


def _introduction(version: Version, license: str | None) -> str:
    manifest = version.manifest
    what = "An adapter" if manifest.kind == "peft" else "Trained tensors"
    lines = [
        f"{what} for {escape(manifest.base.source)}, version {version.id}, published {escape(manifest.created)}.",
        "peftkit wrote this page from `manifest.json`, which names the digest of every file.",
        f"Licence: {escape(license) if license else _NOT_STATED}.",
    ]
    return "\n".join(lines)


def _base(base: Base) -> list[tuple[str, Any]]:
    trained_on = (base.quantization or {}).get("label") or _NOT_STATED
    return [
        ("source", base.source),
        ("revision", base.revision or _NOT_STATED),
        ("licence", base.license or _NOT_STATED),
        ("fingerprint", base.fingerprint),
        ("trained on weights in", trained_on),
    ]


def _data(data: Sequence[Data]) -> str:
    columns = ("role", "source", "rows", "tokens", "dropped", "SHA-256", "licence")
    rows = [
        (each.role, each.source, each.rows, each.tokens, each.dropped, each.sha256, each.license or _NOT_STATED)
        for each in data
    ]
    return _table(columns, rows) if rows else "No data is recorded."


def _plain_items(adapter: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in adapter.items() if value is not None]


def _measured(manifest: Manifest) -> list[tuple[str, Any]]:
    before, after, other = manifest.metrics.before, manifest.metrics.after, manifest.metrics.other
    changes = (
        ("answer NLL, adapter − base", other.get("answer_nll_change")),
        ("general NLL, adapter − base (retention)", other.get("retention_nll_change")),
        ("score, adapter − base", other.get("score_change")),
        ("score before", before.get("score")),
        ("score after", after.get("score")),
    )
    return [(name, _figure(value)) for name, value in changes if isinstance(value, dict)] or [
        ("measured", "nothing is recorded")
    ]


def _figure(value: dict[str, Any]) -> str:
    point, low, high, mean = (_number(value.get(key)) for key in ("point", "low", "high", "mean"))
    if mean is not None:
        on = f" on {render.number(rows)} rows" if (rows := _number(value.get("n"))) is not None else ""
        return f"{value.get('metric', 'score')} {mean:.2f}{on}"
    if point is None or low is None or high is None:
        return f"{render.number(point)} (one row: no interval)"
    return render.interval(point, low, high)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _lineage(manifest: Manifest) -> list[tuple[str, Any]]:
    parents = [(parent.relation, f"{parent.name}@{parent.version}") for parent in manifest.parents]
    receipts = [("receipt", receipt["type"]) for receipt in manifest.receipts]
    recipe = [("recipe", f"{manifest.recipe.name}, SHA-256 {manifest.recipe.sha256}")] if manifest.recipe else []
    return [*parents, *receipts, *recipe]


def _usage(version: Version) -> str:
    # Fenced text cannot be escaped, so only names with a checked spelling stand in it.
    base = version.manifest.base.source
    known = base if is_hub_id(base) else "BASE"
    lines = ["With peftkit:", "", "```sh", f"peftkit import FOLDER --as {version.name}"]
    lines += [f"peftkit chat {version.name}", "```"]
    if version.manifest.kind == "peft":
        lines += ["", "With PEFT alone:", "", "```python", "from peft import PeftModel"]
        lines += ["from transformers import AutoModelForCausalLM", ""]
        lines += [f'base = AutoModelForCausalLM.from_pretrained("{known}")']
        lines += ['model = PeftModel.from_pretrained(base, "FOLDER")', "```"]
    return "\n".join(lines)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _facts(rows: Iterable[tuple[str, Any]]) -> str:
    found = list(rows)
    return _table(("what", "value"), found) if found else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns)]
    cells = [[_cell(value) for value in row] for row in rows[:_MOST_ROWS]]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *cells])
    return text if len(rows) <= _MOST_ROWS else f"{text}\n\n{len(rows) - _MOST_ROWS} more stand in the manifest."


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return render.number(value)
    return escape(value)
