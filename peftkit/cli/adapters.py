"""`peftkit list`, `show`, `path`, `log`: looking at the adapters of the registry; nothing here changes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from peftkit import locations, render
from peftkit.base.record import plain
from peftkit.cli.console import show, show_interval
from peftkit.cli.options import AsJson, Reference, RegistryRoot, open_registry
from peftkit.registry.index import Contents, Summary, contents, summarize
from peftkit.registry.layout import LATEST
from peftkit.registry.lineage import Lineage, Step, branches, children_of, lineage
from peftkit.registry.manifest import Version
from peftkit.registry.select import Filters, select

_MOST_LEVELS = 12
_MOST_MOVES = 20
_MOST_ROWS = 200
_MOST_NAMED = 3
_WIDEST = 400


def list_adapters(
    base: Annotated[str | None, typer.Option("--base", help="Part of its source, or the start of a digest.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Versions that have this alias.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Such as lora.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Such as qlora_sft.")] = None,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="Such as 'score > 0.8'; repeatable.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="A file's name, or the start of its digest.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All versions, not the latest of each name.")] = False,
    registry: RegistryRoot = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters, the latest version of each; filters leave out what does not fit.

    Example: peftkit list --base Qwen3 --metric "score > 0.8"
    """
    place = locations.registry_root(registry)
    known = contents(open_registry(registry))
    selection = select(known, Filters(base, tag, method, recipe, tuple(metric or ()), data), every=every)
    if as_json:
        show([asdict(each) for each in selection.versions], as_json=True, text="")
        return
    if selection.versions:
        text = _table(known, selection.versions)
    elif known.versions and selection.reason:
        text = plain(f"nothing found: {selection.reason}", _WIDEST)
    else:
        text = f"no adapters in {place.path} ({place.reason})"
    lines = [text, *([_damage(known)] if known.problems else [])]
    show(None, as_json=False, text="\n\n".join(lines))


def show_adapter(name: Reference, registry: RegistryRoot = None, as_json: AsJson = False) -> None:
    """Show one version: its base, how it was made, what was measured, where it is.

    Example: peftkit show tickets@latest
    """
    store = open_registry(registry)
    version = store.resolve(name)
    aliases = [alias for alias, target in store.aliases(version.name).items() if target == version.id]
    if as_json:
        value = {**version.manifest.model_dump(mode="json"), "id": version.id, "aliases": aliases}
        show(value, as_json=True, text="")
        return
    children = children_of(contents(store), version.name, version.id)
    facts = [*_identity(version, aliases), *_making(version, children), *_results(version), *_files(version)]
    show(None, as_json=False, text=render.facts(facts))


def path(name: Reference, registry: RegistryRoot = None) -> None:
    """Print the folder of a version and nothing else; of kind peft, it is what PeftModel.from_pretrained loads.

    Example: peftkit path tickets@prod
    """
    typer.echo(open_registry(registry).resolve(name).path)


def log(name: Reference, registry: RegistryRoot = None, as_json: AsJson = False) -> None:
    """Show where a version comes from, what was made from it, and every move of its aliases.

    Example: peftkit log tickets
    """
    found = lineage(open_registry(registry), name)
    show(asdict(found), as_json=as_json, text="" if as_json else _log(found))


def _table(known: Contents, versions: tuple[Summary, ...]) -> str:
    counts: dict[str, int] = {}
    for each in known.versions:
        counts[each.name] = counts.get(each.name, 0) + 1
    rows = [
        (
            each.name,
            each.id,
            counts[each.name],
            _minute(each.created),
            each.base,
            each.method,
            _interval(each, "other.answer_nll_change"),
            _score(each),
            "damaged" if each.problem else ", ".join(alias for alias in each.aliases if alias != LATEST),
        )
        for each in versions
    ]
    columns = ("adapter", "version", "of", "created", "base", "method", "answer NLL change", "score", "aliases")
    return render.table(columns, rows)


def _damage(known: Contents) -> str:
    count = len(known.problems)
    named = ", ".join(list(known.problems)[:_MOST_NAMED]) + (" …" if count > _MOST_NAMED else "")
    return f"{count} damaged: {named}; peftkit verify says what is wrong"


def _identity(version: Version, aliases: list[str]) -> list[tuple[str, Any]]:
    base = version.manifest.base
    return [
        ("adapter", version.reference + (f"  ({', '.join(aliases)})" if aliases else "")),
        ("created", version.manifest.created),
        ("kind", version.manifest.kind),
        ("base", base.source + (f" @ {base.revision}" if base.revision else "")),
        ("base record", base.record or "none: it is known by its digests only"),
        ("base fingerprint", base.fingerprint[:16]),
        ("base licence", base.license or "not stated"),
        ("trained on weights in", (base.quantization or {}).get("label", "not recorded")),
    ]


def _making(version: Version, children: list[Summary]) -> list[tuple[str, Any]]:
    manifest = version.manifest
    return [
        ("method", ", ".join(f"{key}={value}" for key, value in manifest.adapter.items())),
        *_rate(version),
        ("recipe", manifest.recipe.name if manifest.recipe else "none recorded"),
        ("run", manifest.run or "none recorded"),
        *(
            (f"data, {each.role}", f"{each.source}: {each.rows} rows, {render.number(each.tokens)} tokens")
            for each in manifest.data
        ),
        *(("parent", f"{each.name}@{each.version} ({each.relation})") for each in manifest.parents[:_MOST_ROWS]),
        *_rest(len(manifest.parents)),
        ("children", f"{len(children)}" + (f"; peftkit log {version.reference}" if children else "")),
        *(("receipt", receipt["type"]) for receipt in manifest.receipts),
    ]


def _rate(version: Version) -> list[tuple[str, str]]:
    """The peak rate that was used: the settings may have left it to the method."""
    training = version.manifest.metrics.other.get("training")
    rate = training.get("learning_rate") if isinstance(training, dict) else None
    return [("learning rate", f"{rate:g}")] if isinstance(rate, int | float) else []


def _rest(count: int) -> list[tuple[str, str]]:
    """What says that not all rows are shown: a stranger's manifest may name 10,000 parents."""
    return [("", f"{count - _MOST_ROWS} more: --json")] if count > _MOST_ROWS else []


def _results(version: Version) -> list[tuple[str, Any]]:
    summary = summarize(version)
    return [
        ("answer NLL, adapter − base", _interval(summary, "other.answer_nll_change")),
        ("general NLL, adapter − base", _interval(summary, "other.retention_nll_change")),
        ("score", _score(summary)),
    ]


def _files(version: Version) -> list[tuple[str, Any]]:
    files = version.manifest.files
    return [
        ("size", render.size(sum(file.bytes for file in files.values()))),
        *(("file", f"{name}  {render.size(file.bytes)}") for name, file in sorted(files.items())),
        ("folder", str(version.path)),
    ]


def _log(found: Lineage) -> str:
    lines = [f"{_title(found.version)}", *(f"   {line}" for line in _details(found.version))]
    for heading, steps in (("made from", found.ancestors), ("made into", found.descendants)):
        if steps:
            lines += ["", heading, *_tree(steps)]
    shown = found.moves[-_MOST_MOVES:]
    rows = [(move.alias, move.number, _minute(move.time), move.version or "removed") for move in shown]
    lines += ["", f"aliases of {found.version.name}", render.table(("alias", "move", "time", "version"), rows)]
    if len(shown) < len(found.moves):
        lines.append(f"{len(found.moves) - len(shown)} earlier moves: --json")
    return "\n".join([*lines, *found.problems])


def _tree(steps: tuple[Step, ...]) -> list[str]:
    lines = []
    near = [step for step in steps if step.depth <= _MOST_LEVELS]
    for before, beside, step in branches(near[:_MOST_ROWS]):
        what = f"{before}{step.relation}  "
        if step.summary is None:
            lines.append(f"{what}{plain(step.reference)}  removed, or in another registry")
        elif step.again:
            lines.append(f"{what}{plain(step.reference)}  see above")
        else:
            lines.append(what + _title(step.summary))
            lines += [f"{beside}   {line}" for line in _details(step.summary)]
    lines += [text for _, text in _rest(len(near))]
    if len(near) < len(steps):
        lines.append(f"{len(steps) - len(near)} more, further than {_MOST_LEVELS} steps away: --json")
    return lines


def _title(each: Summary) -> str:
    return each.reference + (f"  {_minute(each.created)}" if each.created else "") + _bracketed(each.aliases)


def _bracketed(aliases: tuple[str, ...]) -> str:
    return f"  ({', '.join(aliases)})" if aliases else ""


def _details(each: Summary) -> list[str]:
    """What a tree says about a version: how it was made, of which rows, and what was measured."""
    if each.problem is not None:
        return [plain(f"damaged: {each.problem}", _WIDEST)]
    made = [each.recipe or "no recipe", f"run {each.run}" if each.run else "no run", f"base {each.base}"]
    rows = [f"{data.role} {plain(data.source)}, {data.rows:,} rows, {data.sha256[:8]}" for data in each.data]
    measured = [f"answer NLL change {_interval(each, 'other.answer_nll_change')}", f"score {_score(each)}"]
    return [", ".join(map(plain, made)), *rows, "; ".join(map(plain, measured))]


def _interval(each: Summary, key: str) -> str:
    figures = {name: each.figures.get(f"{key}.{name}") for name in ("point", "low", "high")}
    return show_interval(figures) if figures["point"] is not None else "not measured"


def _score(each: Summary) -> str:
    mean, count = each.figures.get("after.score.mean"), each.figures.get("after.score.n")
    if mean is None and each.metric and f"after.{each.metric}.point" in each.figures:  # of a task
        return f"{each.metric} {_interval(each, f'after.{each.metric}')}"
    if mean is None:
        return "not measured"
    return f"{each.metric or 'score'} {mean:.2f}" + (f" on {count:.0f} rows" if count is not None else "")


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")
