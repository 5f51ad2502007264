"""Damage of every kind, in every region of every kind of file: verify names the file, and loading refuses it.

The files are those of `registry_v1`, which holds one of each kind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from peftkit.errors import RegistryError
from peftkit.registry import Registry, aliases, bases, check, check_root
from peftkit.registry.layout import LATEST, Layout
from peftkit.registry.verify import check_folder

V1 = Path(__file__).parent / "registry_v1"
FIRST, SECOND, HEADS = "4d9e9b831823fa0d", "0157f57250ba6305", "46ae15349b570775"
OLD_BASE, NEW_BASE = "adbebd565a971b15", "6222713d71d3eb83"
PROD = "tickets/aliases/prod"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    target = tmp_path / "registry"
    shutil.copytree(V1, target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


@dataclass(frozen=True)
class Target:
    """A file, the key under which `check_root` must report it, and the two ways to look at it."""

    path: str
    where: str
    find: Callable[[Path], list[str]]
    """The sentences of verify about this file alone, which is what `check_root` puts together."""
    load: Callable[[Path], object]
    """What has to refuse: it raises RegistryError, or its result is a list of problems."""
    every: int = 1
    """How often to try `load`: for a payload file it ends in the same function as `find`."""


def in_version(name: str, version: str, file: str) -> Target:
    def load(root: Path) -> object:
        return check(Registry(root).resolve(f"{name}@{version}"), read_data=True)

    def find(root: Path) -> list[str]:
        return check_folder(root / name / "versions" / version, name, version, read_data=True)

    every = 1 if file == "manifest.json" else 16
    return Target(f"{name}/versions/{version}/{file}", f"{name}@{version}", find, load, every)


def in_alias(name: str, alias: str, number: int) -> Target:
    def load(root: Path) -> object:
        return aliases.read(Layout(root), name, alias, number)

    def find(root: Path) -> list[str]:
        return aliases.problems(Layout(root), name, alias)

    return Target(f"{name}/aliases/{alias}/{number:08d}", f"{name}@{alias}", find, load)


def in_bases(folder: str, record: str) -> Target:
    path = f"{folder}/{record}.json"

    def load(root: Path) -> object:
        return bases.read(Layout(root), record) if folder == "bases" else bases.relations(Layout(root))

    def find(root: Path) -> list[str]:
        return [f"{where}: {text}" for where, found in bases.problems(Layout(root)).items() for text in found]

    return Target(path, path, find, load)


TARGETS = {
    "marker": Target(
        "registry.json",
        "registry.json",
        lambda root: check_root(root, read_data=False).get("registry.json", []),
        lambda root: Registry(root).resolve("tickets"),
    ),
    "manifest": in_version("tickets", SECOND, "manifest.json"),
    "config": in_version("tickets", SECOND, "adapter_config.json"),
    "adapter": in_version("tickets", SECOND, "adapter_model.safetensors"),
    "tensors": in_version("heads", HEADS, "tensors.safetensors"),
    "other payload": in_version("heads", HEADS, "notes.json"),
    "alias record": in_alias("tickets", "prod", 3),
    "older alias record": in_alias("tickets", "prod", 2),
    "record of a removed alias": in_alias("tickets", "old", 2),
    "base record": in_bases("bases", OLD_BASE),
    "relation": in_bases("relations", "650ad992a24fd881"),
}


def refused(target: Target, root: Path) -> bool:
    try:
        found = target.load(root)
    except RegistryError:
        return True
    return isinstance(found, list) and bool(found) and all(isinstance(sentence, str) for sentence in found)


def assert_found(target: Target, root: Path, what: str, count: int) -> None:
    sentences = target.find(root)
    assert any(Path(target.path).name in sentence for sentence in sentences), (what, sentences)
    assert count % target.every or refused(target, root), what


def assert_only(target: Target, root: Path, what: str) -> None:
    """The whole registry's check says the same, under the right key, and nothing else."""
    found = check_root(root, read_data=True)
    assert set(found) == {target.where}, (what, found)


def test_every_kind_of_file_is_covered(root: Path) -> None:
    """The targets are one of each kind of file that a registry holds; without damage there is nothing to find."""
    kinds = {
        "manifest.json", "adapter_config.json", "adapter_model.safetensors", "tensors.safetensors", "notes.json",
        "registry.json", "bases", "relations", "aliases",
    }  # fmt: skip

    def kind(path: Path) -> str:
        parts = path.relative_to(root).parts
        return next((part for part in parts if part in ("bases", "relations", "aliases")), parts[-1])

    assert {kind(path) for path in root.rglob("*") if path.is_file()} == kinds
    assert {kind(root / target.path) for target in TARGETS.values()} == kinds
    for what, target in TARGETS.items():
        assert target.find(root) == [], what
        assert not refused(target, root), what
    assert check_root(root) == {}


@pytest.mark.parametrize("what", TARGETS)
def test_every_single_bit(root: Path, what: str) -> None:
    target = TARGETS[what]
    path = root / target.path
    data = path.read_bytes()
    descriptor = os.open(path, os.O_RDWR)
    flipped = whole = 0
    for at in range(len(data)):
        for bit in range(8):
            os.pwrite(descriptor, bytes([data[at] ^ 1 << bit]), at)
            assert_found(target, root, f"{what}: byte {at}, bit {bit}", flipped)
            if (flipped := flipped + 1) % 499 == 1:
                assert_only(target, root, f"{what}: byte {at}, bit {bit}")
                whole += 1
        os.pwrite(descriptor, data[at : at + 1], at)
    os.close(descriptor)
    assert flipped == 8 * len(data) >= 8 * 13
    assert whole >= 1
    assert check_root(root) == {}


def other_contents(data: bytes) -> Iterator[bytes]:
    """Cut off anywhere, the tail zeroed from anywhere (in long files at every third place), and longer."""
    for at in range(0, len(data), 1 if len(data) < 600 else 3):
        yield data[:at]
        yield data[:at] + bytes(len(data) - at)
    yield from (data + b"\0", data + b"\n", data + b" ", b" " + data, data + data)
    yield data.rstrip(b"\n") + b"\r\n"


@pytest.mark.parametrize("what", TARGETS)
def test_cut_off_zeroed_and_longer_anywhere(root: Path, what: str) -> None:
    target = TARGETS[what]
    path = root / target.path
    data = path.read_bytes()
    tried = 0
    for changed in other_contents(data):
        if changed != data:  # the tail may have been zeros
            path.write_bytes(changed)
            assert_found(target, root, f"{what}: {changed[:40]!r}…", tried)
            if (tried := tried + 1) % 199 == 1:
                assert_only(target, root, f"{what}: {changed[:40]!r}…")
    assert tried >= 2 * len(data) / (1 if len(data) < 600 else 3) - 8
    path.write_bytes(data)
    assert check_root(root) == {}


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "what", [what for what in TARGETS if what not in ("alias record", "record of a removed alias")]
)
@pytest.mark.parametrize("how", [Path.unlink, as_folder])
def test_a_missing_file_and_a_folder_in_its_place(root: Path, what: str, how: Callable[[Path], None]) -> None:
    """Not the newest record of an alias: without it the alias is where it was before, and nothing can tell."""
    target = TARGETS[what]
    how(root / target.path)
    found = check_root(root)
    if target.path.startswith("bases/"):
        for version in (FIRST, SECOND):
            assert bool(found.get(f"tickets@{version}")) is (how is Path.unlink)
        assert bool(found.get(target.path)) is (how is as_folder)
        assert refused(target, root)
    elif target.path.startswith("relations/"):
        assert bool(found) is (how is as_folder), "nothing names a relation, so one that is gone is not missed"
    else:
        assert target.where in found
        assert refused(target, root)


def swap(root: Path, one: str, other: str) -> None:
    (root / one).rename(root / "aside")
    (root / other).rename(root / one)
    (root / "aside").rename(root / other)


V_FIRST, V_SECOND, V_HEADS = f"tickets/versions/{FIRST}", f"tickets/versions/{SECOND}", f"heads/versions/{HEADS}"
SWAPS = {
    "manifests of two versions": (
        f"{V_FIRST}/manifest.json", f"{V_SECOND}/manifest.json", {f"tickets@{FIRST}", f"tickets@{SECOND}"},
    ),
    "manifests of two adapters": (
        f"{V_HEADS}/manifest.json", f"{V_SECOND}/manifest.json", {f"heads@{HEADS}", f"tickets@{SECOND}"},
    ),
    "tensors of two versions": (
        f"{V_FIRST}/adapter_model.safetensors", f"{V_SECOND}/adapter_model.safetensors",
        {f"tickets@{FIRST}", f"tickets@{SECOND}"},
    ),
    "tensors of two kinds": (
        f"{V_HEADS}/tensors.safetensors", f"{V_SECOND}/adapter_model.safetensors",
        {f"heads@{HEADS}", f"tickets@{SECOND}"},
    ),
    "config and manifest": (
        f"{V_FIRST}/adapter_config.json", f"{V_FIRST}/manifest.json", {f"tickets@{FIRST}"},
    ),
    "two versions": (V_FIRST, V_SECOND, {f"tickets@{FIRST}", f"tickets@{SECOND}"}),
    "versions of two adapters": (
        V_HEADS, V_SECOND, {f"heads@{HEADS}", f"tickets@{SECOND}"},
    ),
    "records of one alias": (f"{PROD}/00000001", f"{PROD}/00000003", {"tickets@prod"}),
    "records of two aliases": (
        f"{PROD}/00000001", "tickets/aliases/old/00000001", {"tickets@prod", "tickets@old"},
    ),
    "records of two adapters": (
        "tickets/aliases/latest/00000001", "heads/aliases/latest/00000001", {"tickets@latest", "heads@latest"},
    ),
    "two aliases": (PROD, "tickets/aliases/old", {"tickets@prod", "tickets@old"}),
    "two adapters": (
        "tickets", "heads",
        {
            f"heads@{FIRST}", f"heads@{SECOND}", "heads@latest", "heads@prod", "heads@old",
            f"tickets@{HEADS}", "tickets@latest",
        },
    ),
    "base records": (
        f"bases/{OLD_BASE}.json", f"bases/{NEW_BASE}.json", {f"bases/{OLD_BASE}.json", f"bases/{NEW_BASE}.json"},
    ),
    "base record and relation": (
        f"bases/{OLD_BASE}.json", "relations/650ad992a24fd881.json",
        {f"bases/{OLD_BASE}.json", "relations/650ad992a24fd881.json"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SWAPS)
def test_swapped_files(root: Path, what: str) -> None:
    one, other, expected = SWAPS[what]
    assert (root / one).is_dir() or (root / one).read_bytes() != (root / other).read_bytes()
    swap(root, one, other)
    assert set(check_root(root, read_data=True)) == expected
    registry = Registry(root)
    for where in expected:
        if where.startswith(("bases/", "relations/")):
            with pytest.raises(RegistryError):
                target = in_bases(where.split("/")[0], Path(where).stem)
                target.load(root)
        elif "@" in where and len(where.split("@")[1]) == 16:
            assert_refused(registry, where)
        else:
            with pytest.raises(RegistryError):
                registry.history(*where.split("@"))
    swap(root, one, other)
    assert check_root(root) == {}


def assert_refused(registry: Registry, reference: str) -> None:
    with contextlib.suppress(RegistryError):
        assert check(registry.resolve(reference), read_data=True)


@pytest.mark.parametrize(
    ("source", "target", "where", "sentence"),
    [
        (f"{PROD}/00000002", f"{PROD}/00000004", "tickets@prod", "number 2"),
        ("tickets/aliases/old/00000001", f"{PROD}/00000004", "tickets@prod", "belongs to tickets@old"),
        (f"{PROD}/00000003", "tickets/aliases/new/00000003", "tickets@new", "Record 1 is missing"),
        (f"{PROD}/00000003", f"{PROD}/3", "tickets@prod", "is no record"),
        (f"{PROD}/00000003", f"{PROD}/00000000", "tickets@prod", "is no record"),
        (f"{PROD}/00000003", "tickets/aliases/one-file", "tickets@one-file", "not a folder"),
        (f"bases/{OLD_BASE}.json", "bases/0000000000000000.json", "bases/0000000000000000.json", "was changed"),
        (f"bases/{OLD_BASE}.json", "bases/notes.txt", "bases/notes.txt", "is no record"),
        (f"bases/{OLD_BASE}.json", f"relations/{OLD_BASE}.json", f"relations/{OLD_BASE}.json", "no relation"),
        (V_FIRST, "tickets/versions/0000000000000000", "tickets@0000000000000000", "was changed"),
        (V_FIRST, "tickets/versions/copy", "tickets@copy", "no version id"),
        (V_FIRST, f"heads/versions/{FIRST}", f"heads@{FIRST}", "belongs to the adapter 'tickets'"),
        (f"{V_FIRST}/adapter_config.json", f"{V_FIRST}/more.json", f"tickets@{FIRST}", "not in the manifest"),
        ("registry.json", "tickets/registry.json", "tickets/registry.json", "not part of a registry"),
    ],
)
def test_a_copy_in_a_wrong_place(root: Path, source: str, target: str, where: str, sentence: str) -> None:
    (root / target).parent.mkdir(exist_ok=True)
    if (root / source).is_dir():
        shutil.copytree(root / source, root / target)
    else:
        shutil.copy(root / source, root / target)
    found = check_root(root)
    assert set(found) == {where}
    assert sentence in " ".join(found[where])


def test_damage_stays_where_it_is(root: Path) -> None:
    """Every file of one adapter at once: the other adapter is read as before, and names are still listed."""
    spoilt = [path for path in (root / "tickets").rglob("*") if path.is_file()]
    for path in spoilt:
        path.write_bytes(b"\0" * 8)
    registry = Registry(root)
    assert registry.names() == ["heads", "tickets"]
    assert check(registry.resolve("heads")) == []
    assert [move.version for move in registry.history("heads")] == [HEADS]
    found = check_root(root)
    assert set(found) == {"tickets@latest", "tickets@prod", "tickets@old", f"tickets@{FIRST}", f"tickets@{SECOND}"}
    assert sum(len(sentences) for where, sentences in found.items() if "@prod" in where) == 3
    assert len(spoilt) == 13
    with pytest.raises(RegistryError):
        registry.resolve(f"tickets@{LATEST}")


def test_the_header_and_the_data_of_tensors_are_both_hit() -> None:
    """What the loop over all bits runs over: length, header and data, none of them empty."""
    for what in ("adapter", "tensors"):
        data = (V1 / TARGETS[what].path).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert length > 100
        assert len(data) - 8 - length >= 64
