"""`peftkit list`, `show`, `tag`, `verify`: the adapters of the registry."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftkit import locations, render
from peftkit.cli.console import show, show_interval
from peftkit.cli.options import AsJson, RegistryRoot
from peftkit.errors import AdapterDamaged
from peftkit.registry.store import Registry, Version
from peftkit.registry.verify import check

Reference = Annotated[str, typer.Argument(metavar="NAME", help="name, name@version or name@alias.")]


def list_adapters(registry: RegistryRoot = None, as_json: AsJson = False) -> None:
    """List the adapters, the latest version of each.

    Example: peftkit list
    """
    place = locations.registry_root(registry)
    store = Registry(place.path)
    versions = store.list()
    rows = [
        (
            version.name,
            version.id,
            len(store.version_ids(version.name)),
            version.manifest.created[:16].replace("T", " "),
            version.manifest.base.source,
            _change(version),
            _score(version),
        )
        for version in versions
    ]
    columns = ("adapter", "latest", "versions", "created", "base", "answer NLL change", "score")
    text = render.table(columns, rows) if rows else f"no adapters in {place.path} ({place.reason})"
    show([version.manifest.model_dump(mode="json") for version in versions], as_json=as_json, text=text)


def show_adapter(name: Reference, registry: RegistryRoot = None, as_json: AsJson = False) -> None:
    """Show one adapter: its base, how it was trained, what was measured.

    Example: peftkit show tickets@latest
    """
    store = Registry(locations.registry_root(registry).path)
    version = store.resolve(name)
    manifest = version.manifest
    aliases = [alias for alias, target in store.aliases(version.name).items() if target == version.id]
    adapter = manifest.adapter
    quantized = (manifest.base.quantization or {}).get("label", "not recorded")
    facts: list[tuple[str, Any]] = [
        ("adapter", version.reference + (f"  ({', '.join(aliases)})" if aliases else "")),
        ("created", manifest.created),
        ("kind", manifest.kind),
        ("base", manifest.base.source + (f" @ {manifest.base.revision}" if manifest.base.revision else "")),
        ("base fingerprint", manifest.base.fingerprint[:16]),
        ("trained on weights in", quantized),
        ("method", ", ".join(f"{key}={value}" for key, value in adapter.items())),
        ("recipe", manifest.recipe.name if manifest.recipe else "none recorded"),
        *(("data, " + data.role, f"{data.source}: {data.rows} rows, {data.tokens} tokens") for data in manifest.data),
        *(("parent", f"{parent.name}@{parent.version} ({parent.relation})") for parent in manifest.parents),
        ("answer NLL, adapter − base", _change(version)),
        ("general NLL, adapter − base", _change(version, "retention_nll_change")),
        ("score", _score(version)),
        ("size", render.size(sum(file.bytes for file in manifest.files.values()))),
        ("folder", str(version.path)),
    ]
    show(manifest.model_dump(mode="json"), as_json=as_json, text=render.facts(facts))


def tag(
    name: Reference, alias: Annotated[str, typer.Argument(help="Such as prod.")], registry: RegistryRoot = None
) -> None:
    """Point an alias at a version.

    Example: peftkit tag tickets@3f9a prod
    """
    version = Registry(locations.registry_root(registry).path).tag(name, alias)
    show(None, as_json=False, text=f"{version.name}@{alias} is now {version.reference}")


def verify(name: Reference, registry: RegistryRoot = None) -> None:
    """Check every file of an adapter against its manifest.

    Example: peftkit verify tickets
    """
    version = Registry(locations.registry_root(registry).path).resolve(name)
    problems = check(version)
    if problems:
        raise AdapterDamaged(f"{version.reference} is damaged:\n- " + "\n- ".join(problems))
    show(None, as_json=False, text=f"{version.reference} is whole: {len(version.manifest.files)} files")


def _change(version: Version, key: str = "answer_nll_change") -> str:
    change: Any = version.manifest.metrics.other.get(key)
    return show_interval(change) if change else "not measured"


def _score(version: Version) -> str:
    score: Any = version.manifest.metrics.after.get("score")
    return f"{score['metric']} {score['mean']:.2f} on {score['n']} rows" if score else "not measured"
