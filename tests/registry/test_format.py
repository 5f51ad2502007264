"""FORMAT.md is enough: a reader and a writer made from it alone, with nothing but the standard library.

What stands between the two rulers below is the stranger's: no peftkit in it. The tests after them let each read what
the other wrote, and read `registry_v1`, which the stranger wrote once and which must load for ever.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# ------------------------------------------------------------------------------------------------ the stranger's

FORMAT = "peftkit/1"
NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")
ALIAS = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
ID, DIGEST = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")
MANIFEST = {
    "format": None, "kind": None, "name": None, "created": None,
    "base": {"source", "revision", "record", "fingerprint", "parts", "quantization", "license"},
    "adapter": None, "files": None, "recipe": {"name", "sha256", "config", "config_sha256"}, "run": None,
    "data": {"role", "source", "sha256", "rows", "tokens", "dropped", "license"}, "environment": None,
    "metrics": {"before", "after", "other"}, "parents": {"name", "version", "relation"}, "receipts": None,
}  # fmt: skip
BASE_RECORD = {"format", "config", "tokenizer", "special_tokens", "chat_template", "tensors"}
ALIAS_RECORD = {"format", "name", "alias", "number", "version", "time", "previous", "check"}
RELATION = {"format", "child", "parent", "kind", "tensors", "missing", "added", "reshaped"}
NEEDED = {"peft": {"adapter_config.json", "adapter_model.safetensors"}, "tensors": {"tensors.safetensors"}}
BITS = {"F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U8": 8}
Tensors = dict[str, tuple[str, list[int], bytes]]


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), "a key stands twice"
        return dict(pairs)

    return json.loads(data.decode("utf-8"), object_pairs_hook=unique)


def read_tensors(data: bytes) -> Tensors:
    (length,) = struct.unpack("<Q", data[:8])
    assert length <= min(len(data) - 8, 100_000_000)
    tensors, reached = {}, 8 + length
    header = parse(data[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert set(entry) == {"dtype", "shape", "data_offsets"}
        first, end = (8 + length + offset for offset in entry["data_offsets"])
        needed = BITS[entry["dtype"]]
        for extent in entry["shape"]:
            needed *= extent
        assert first == reached, "a hole or an overlap"
        assert (end - first) * 8 == needed, "not what dtype and shape need"
        tensors[name], reached = (entry["dtype"], entry["shape"], data[first:end]), end
    assert reached == len(data), "the tensors fill the file"
    return tensors


def write_tensors(tensors: Tensors) -> bytes:
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def parts_of(record: dict[str, Any]) -> dict[str, str]:
    digests = {
        part: digest(canonical(record[field]))
        for part, field in (
            ("weights", "tensors"),
            ("config", "config"),
            ("special_tokens", "special_tokens"),
            ("chat_template", "chat_template"),
        )
    }
    return {**digests, "tokenizer": record["tokenizer"]}


def fingerprint_of(record: dict[str, Any]) -> str:
    parts = parts_of(record)
    return digest(canonical({"config": parts["config"], "weights": parts["weights"]}))


def record_of_folder(folder: Path) -> dict[str, Any]:
    """The base record of a model folder."""

    def spelled(value: Any) -> Any:
        if isinstance(value, float) and value != value:
            return {"__float__": "NaN"}
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return {"__float__": "Infinity" if value > 0 else "-Infinity"}
        if isinstance(value, dict):
            return {key: spelled(item) for key, item in value.items()}
        return [spelled(item) for item in value] if isinstance(value, list) else value

    def load(name: str) -> Any:
        return json.loads((folder / name).read_text("utf-8")) if (folder / name).exists() else {}

    def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
        return {key: value for key, value in fields.items() if key not in names}

    settings = load("tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        tokenizer: Any = spelled(without(load("tokenizer.json"), "padding", "truncation"))
    else:
        old = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
        tokenizer = [[name, digest((folder / name).read_bytes())] for name in old if (folder / name).exists()]
    roles = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "extra_special_tokens")
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    elif isinstance(template, list):
        template = json.dumps(template, sort_keys=True)
    volatile = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation")
    indexed = load("model.safetensors.index.json").get("weight_map", {}).values()
    files = set(indexed) or {p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_")}
    tensors = {name: tensor for file in files for name, tensor in read_tensors((folder / file).read_bytes()).items()}
    return {
        "format": FORMAT,
        "config": spelled(without(load("config.json"), *volatile)),
        "tokenizer": digest(canonical(tokenizer)),
        "special_tokens": spelled({role: settings[role] for role in roles if settings.get(role) is not None}),
        "chat_template": template,
        "tensors": {n: {"dtype": d, "shape": s, "sha256": digest(data)} for n, (d, s, data) in tensors.items()},
    }


def read_version(folder: Path, name: str) -> dict[str, Any]:
    """The manifest of a version, after everything about the version was checked."""
    written = (folder / "manifest.json").read_bytes()
    assert ID.fullmatch(folder.name)
    assert digest(written)[:16] == folder.name, "the manifest was changed"
    manifest: dict[str, Any] = parse(written)
    assert manifest["format"] == FORMAT, f"{manifest['format']}, known is {FORMAT}"
    assert set(manifest) == set(MANIFEST)
    for field, known in MANIFEST.items():
        value = manifest[field]
        for item in value if isinstance(value, list) else [value] if value is not None else []:
            assert known is None or set(item) == known, field
    assert manifest["name"] == name
    assert TIME.fullmatch(manifest["created"])
    assert DIGEST.fullmatch(manifest["base"]["fingerprint"])
    assert manifest["recipe"] is None or manifest["recipe"]["config_sha256"] == digest(
        canonical(manifest["recipe"]["config"])
    )
    assert all(isinstance(receipt["type"], str) for receipt in manifest["receipts"])
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    del found["manifest.json"]
    assert found.keys() == manifest["files"].keys() >= NEEDED[manifest["kind"]]
    for relative, path in found.items():
        data = path.read_bytes()
        assert {"sha256": digest(data), "bytes": len(data)} == manifest["files"][relative], relative
        assert (read_tensors if relative.endswith(".safetensors") else parse)(data) is not None
    return manifest


def read_alias(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of an alias, oldest first; the last says where it points."""
    assert ALIAS.fullmatch(folder.name)
    assert not re.fullmatch(r"[0-9a-f]{4,16}", folder.name)
    records, previous = [], None
    for number, path in enumerate(sorted(folder.iterdir()), start=1):
        data = path.read_bytes()
        record = parse(data)
        assert record["format"] == FORMAT
        assert set(record) == ALIAS_RECORD
        assert data == canonical(record) + b"\n"
        assert path.name == f"{number:08d}", "a record is missing"
        assert (record["name"], record["alias"], record["number"]) == (name, folder.name, number)
        assert record.pop("check") == digest(canonical(record)), "the record was changed"
        assert record["previous"] == previous, "it does not follow from the record before"
        assert TIME.fullmatch(record["time"])
        records.append(record)
        previous = digest(data)
    return records


def read_named(folder: Path, fields: set[str]) -> dict[str, dict[str, Any]]:
    """Base records or relations by id."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        data = path.read_bytes()
        record = parse(data)
        assert path.name == digest(data)[:16] + ".json"
        assert data == canonical(record) + b"\n"
        assert record["format"] == FORMAT
        assert set(record) == fields
        found[path.stem] = record
    return found


def read_registry(root: Path) -> dict[str, Any]:
    """Everything that a registry holds, after everything that the page promises was checked."""
    assert (root / "registry.json").read_bytes() == b'{"format":"peftkit/1"}\n'
    bases, relations = read_named(root / "bases", BASE_RECORD), read_named(root / "relations", RELATION)
    versions: dict[str, dict[str, Any]] = {}
    aliases: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for folder in sorted(root.iterdir()):
        if not (folder / "versions").is_dir() or folder.name == "tmp":
            continue
        name = folder.name
        assert NAME.fullmatch(name)
        versions[name] = {path.name: read_version(path, name) for path in sorted((folder / "versions").iterdir())}
        aliases[name] = {path.name: read_alias(path, name) for path in sorted((folder / "aliases").iterdir())}
        assert aliases[name]["latest"]
        for records in aliases[name].values():
            assert records[-1]["version"] in {None, *versions[name]}
        for manifest in versions[name].values():
            base = manifest["base"]
            if base["record"] is not None:
                assert base["fingerprint"] == fingerprint_of(bases[base["record"]])
                assert base["parts"] == parts_of(bases[base["record"]])
    return {"versions": versions, "aliases": aliases, "bases": bases, "relations": relations}


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o444)
    sync(path)


def folder_at(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    sync(path.parent)
    return path


def link_new(root: Path, path: Path, data: bytes) -> None:
    """Create `path` as one step; FileExistsError when it is there."""
    building = root / "tmp" / f"stranger-{path.name}"
    put(building, data)
    try:
        os.link(building, path)
    finally:
        building.unlink()
    sync(path.parent)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """The writers' lock, in a registry that is made where there is none."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder_at(root / "tmp")
        if not (root / "registry.json").exists():
            link_new(root, root / "registry.json", b'{"format":"peftkit/1"}\n')
        assert (root / "registry.json").read_bytes() == b'{"format":"peftkit/1"}\n'
        yield


def keep(root: Path, folder: str, record: dict[str, Any]) -> str:
    """Store a base record or a relation and return its id."""
    data = canonical(record) + b"\n"
    path = folder_at(root / folder) / f"{digest(data)[:16]}.json"
    if not path.exists():
        link_new(root, path, data)
    return path.stem


def move(root: Path, name: str, alias: str, version: str | None, time: str) -> None:
    folder = folder_at(folder_at(root / name / "aliases") / alias)
    while True:
        numbers = sorted(int(path.name) for path in folder.iterdir())
        number = numbers[-1] + 1 if numbers else 1
        previous = digest((folder / f"{number - 1:08d}").read_bytes()) if numbers else None
        record = {"format": FORMAT, "name": name, "alias": alias, "number": number, "version": version}
        record |= {"time": time, "previous": previous}
        try:
            data = canonical({**record, "check": digest(canonical(record))}) + b"\n"
            return link_new(root, folder / f"{number:08d}", data)
        except FileExistsError:
            continue


def publish(
    root: Path,
    name: str,
    kind: str,
    payload: dict[str, bytes],
    created: str,
    aliases: list[str],
    base: dict[str, Any],
    **more: Any,
) -> str:
    """Publish a version that was trained on the base with this record, and return its id."""
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "name": name,
        "created": created,
        "base": {
            "source": "example/base",
            "revision": None,
            "record": digest(canonical(base) + b"\n")[:16],
            "fingerprint": fingerprint_of(base),
            "parts": parts_of(base),
            "quantization": None,
            "license": None,
        },
        "adapter": {},
        "files": {relative: {"sha256": digest(data), "bytes": len(data)} for relative, data in payload.items()},
        "recipe": None,
        "run": None,
        "data": [],
        "environment": {},
        "metrics": {"before": {}, "after": {}, "other": {}},
        "parents": [],
        "receipts": [],
        **more,
    }
    written = json.dumps(manifest, ensure_ascii=False, indent=1).encode()  # any spelling will do
    version = digest(written)[:16]
    with locked(root):
        keep(root, "bases", base)
        versions = folder_at(folder_at(root / name) / "versions")
        if not (versions / version).exists():
            building = folder_at(root / "tmp" / f"stranger-{version}")
            for relative, data in {**payload, "manifest.json": written}.items():
                put(building / relative, data)
            sync(building)
            building.rename(versions / version)
            sync(versions)
        for alias in ["latest", *aliases]:
            move(root, name, alias, version, created)
    return version


def numbers_of(count: int, start: float) -> bytes:
    return struct.pack(f"<{count}f", *(start + at / 8 for at in range(count)))


def lora(start: float) -> dict[str, bytes]:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    where = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors: Tensors = {
        f"{where}A.weight": ("F32", [2, 4], numbers_of(8, start)),
        f"{where}B.weight": ("F32", [4, 2], numbers_of(8, -start)),
    }
    return {"adapter_config.json": canonical(config), "adapter_model.safetensors": write_tensors(tensors)}


def example_base(start: float) -> dict[str, Any]:
    tensors = {
        name: {"dtype": "F32", "shape": [4, 4], "sha256": digest(numbers_of(16, start + at))}
        for at, name in enumerate(["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"])
    }
    return {
        "format": FORMAT,
        "config": {"model_type": "llama", "hidden_size": 4, "rms_norm_eps": 1e-06, "rope_theta": 10000.0},
        "tokenizer": digest(b"the tokenizer"),
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
        "chat_template": "{{ messages }} – ü\n",
        "tensors": tensors,
    }


def write_v1(root: Path) -> None:
    """The registry that is committed as `registry_v1`: every kind of file, every field, moves of every sort."""
    parent, child = example_base(0.5), example_base(0.75)
    recipe = {"lr": 0.0002, "r": 2, "steps": 10**12, "note": "ü€😀", "eps": 1e-07}
    first = publish(root, "tickets", "peft", lora(1), "2026-01-01T00:00:00.000000Z", ["prod", "old"], parent)
    second = publish(
        root, "tickets", "peft", lora(2), "2026-01-02T03:04:05.678901Z", ["prod"], parent,
        adapter={"method": "lora", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        recipe={
            "name": "lora_sft", "sha256": digest(b"recipe"),
            "config": recipe, "config_sha256": digest(canonical(recipe)),
        },
        run="20260102-030405-lora_sft",
        data=[
            {
                "role": "train", "source": "tickets.jsonl", "sha256": digest(b"rows"),
                "rows": 100, "tokens": 2048, "dropped": 3, "license": "CC-BY-4.0",
            },
            {
                "role": "held_out", "source": "held_out.jsonl", "sha256": digest(b"held"),
                "rows": 20, "tokens": None, "dropped": 0, "license": None,
            },
        ],
        environment={"torch": "2.13.0", "python": "3.11.2", "device": "cpu"},
        metrics={"before": {"loss": 2.5}, "after": {"loss": 1.25, "nested": [1, None, True, -0.0]}, "other": {}},
        parents=[{"name": "tickets", "version": first, "relation": "continued"}],
        receipts=[{"type": "import", "source": "elsewhere", "anything": {"deep": []}}],
    )  # fmt: skip
    head = write_tensors({"lm_head.weight": ("F32", [4, 4], numbers_of(16, 3)), "extra.bias": ("BF16", [2], b"abcd")})
    publish(
        root, "heads", "tensors", {"tensors.safetensors": head, "notes.json": b'{"a": [1, 2]}'},
        "2026-01-03T00:00:00.000000Z", [], child,
        parents=[{"name": "tickets", "version": second, "relation": "combined"}],
    )  # fmt: skip
    with locked(root):
        move(root, "tickets", "prod", first, "2026-01-04T00:00:00.000000Z")
        move(root, "tickets", "old", None, "2026-01-05T00:00:00.000000Z")
        ends = {role: digest(canonical(base) + b"\n") for role, base in (("child", child), ("parent", parent))}
        errors = {"lm_head.weight": 0.0, "model.layers.0.self_attn.q_proj.weight": 0.0078125}
        relation = {"format": FORMAT, **ends, "kind": "other", "tensors": errors}
        keep(root, "relations", {**relation, "missing": [], "added": ["new.weight"], "reshaped": []})


# ------------------------------------------------------------------------------------------------ the tests

from peftkit.base.identity import identify  # noqa: E402
from peftkit.base.record import BaseRecord  # noqa: E402
from peftkit.base.record import decode as decode_record  # noqa: E402
from peftkit.base.relations import Relation  # noqa: E402
from peftkit.errors import RegistryError  # noqa: E402
from peftkit.registry import (  # noqa: E402
    Draft,
    Registry,
    bases,
    check,
    check_root,
    collect,
    receipts,
    remove,
    remove_adapter,
)
from peftkit.registry.layout import Layout  # noqa: E402

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "peftkit/registry/FORMAT.md"
V1 = HERE / "registry_v1"
FORK = multiprocessing.get_context("fork")
FIRST, SECOND, HEADS = "4d9e9b831823fa0d", "0157f57250ba6305", "46ae15349b570775"


def everything(root: Path) -> dict[str, bytes | None]:
    """Content by path, without what only serves writers and caches."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*")}
    return {
        where: path.read_bytes() if path.is_file() else None
        for where, path in found.items()
        if where not in (".lock", "tmp") and not where.startswith("index.sqlite")
    }


def files(root: Path) -> dict[str, bytes | None]:
    return {where: data for where, data in everything(root).items() if data is not None}


def test_the_stranger_imports_nothing_else() -> None:
    imports, strangers, _ = Path(__file__).read_text().split("# " + "-" * 96, 2)
    named = set(re.findall(r"^(?:import|from) (\w+)", imports, re.M))
    assert named - {"__future__", "pytest"} <= sys.stdlib_module_names
    assert len(named) > 10
    assert re.findall(r"\bpeftkit\b(?!/1)|^ *import |^ *from ", strangers, re.M) == []
    assert strangers.count("\ndef ") >= 20


def test_peftkit_reads_what_the_stranger_wrote(tmp_path: Path) -> None:
    base, root = example_base(0.5), tmp_path / "registry"
    first = publish(root, "tickets", "peft", lora(1), "2026-01-01T00:00:00.000000Z", ["prod"], base)
    second = publish(root, "tickets", "peft", lora(2), "2026-01-02T00:00:00.000000Z", [], base)
    empty = {"tensors.safetensors": write_tensors({})}
    head = publish(root, "heads", "tensors", empty, "2026-01-03T00:00:00.000000Z", [], base)
    with locked(root):
        move(root, "tickets", "latest", first, "2026-01-04T00:00:00.000000Z")
    registry = Registry(root)
    assert check_root(root, read_data=True) == {}
    assert [version.reference for version in registry.list()] == [f"heads@{head}", f"tickets@{first}"]
    assert [version.id for version in registry.versions("tickets")] == [second, first]
    assert registry.resolve(f"tickets@{second[:4]}").manifest.kind == "peft"
    assert registry.resolve("heads").manifest.kind == "tensors"
    assert [(move.number, move.version) for move in registry.history("tickets", "latest")] == [
        (1, first), (2, second), (3, first),
    ]  # fmt: skip
    record = bases.record_of(registry.resolve("tickets"))
    assert record is not None
    assert record.encode() == canonical(base) + b"\n"
    assert record.fingerprint == fingerprint_of(base) == registry.resolve("tickets").manifest.base.fingerprint
    assert record.parts() == parts_of(base)
    assert registry.restore("tickets").id == second
    assert registry.tag("tickets@prod", "prod").id == first
    assert collect(registry).paths == ()
    assert len(read_registry(root)["aliases"]["tickets"]["latest"]) == 4


def test_the_stranger_reads_what_peftkit_wrote(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    record = decode_record(canonical(example_base(0.5)) + b"\n")
    base = {"source": "x", "record": record.id, "fingerprint": record.fingerprint, "parts": record.parts()}
    odd = {"ü€😀": [1e-7, 1e22, -0.0, 10**20, 1.0, "\x7f\u2028"]}
    first = registry.publish("tickets", make_payload(), make_draft(base=base), ["prod"], base=record)
    parents = [{"name": "tickets", "version": first.id, "relation": "continued"}]
    more = {"metrics": {"other": odd}, "recipe": {"name": "r", "sha256": "1" * 64, "config": odd}}
    second = registry.publish("tickets", make_payload(seed=1), make_draft(base=base, parents=parents, **more))
    head = registry.publish("heads", make_payload("tensors"), make_draft("tensors"))
    registry.restore("tickets")
    registry.untag("tickets", "prod")
    with registry.writing("keep a relation"):
        relation = Relation(record.sha256, "0" * 64, "other", {"a": 0.5})
        bases.keep_relation(registry.layout, relation)
    found = read_registry(registry.root)
    assert {name: set(ids) for name, ids in found["versions"].items()} == {
        "tickets": {first.id, second.id},
        "heads": {head.id},
    }
    moves = {alias: [record["version"] for record in records] for alias, records in found["aliases"]["tickets"].items()}
    assert moves == {"latest": [first.id, second.id, first.id], "prod": [first.id, None]}
    assert found["versions"]["tickets"][second.id]["metrics"]["other"] == odd
    assert found["bases"] == {record.id: example_base(0.5)}
    assert found["relations"][relation.id]["child"] == record.sha256


def test_each_goes_on_where_the_other_stopped(
    tmp_path: Path, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    root, base, ids = tmp_path / "registry", example_base(0.5), []
    registry = Registry(root)
    for turn in range(6):
        created = f"2026-01-{turn + 1:02}T00:00:00.000000Z"
        if turn % 2:
            ids.append(publish(root, "tickets", "peft", lora(turn), created, ["prod"], base))
        else:
            ids.append(registry.publish("tickets", make_payload(seed=turn), make_draft(created=created), ["prod"]).id)
        for alias in ("latest", "prod"):
            assert [record["version"] for record in read_registry(root)["aliases"]["tickets"][alias]] == ids
            assert [move.version for move in registry.history("tickets", alias)] == ids
        assert check_root(root) == {}
    assert len(set(ids)) == 6


def test_each_waits_for_the_lock_of_the_other(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    registry.publish("tickets", make_payload(), make_draft())
    with locked(registry.root), pytest.raises(RegistryError, match="has been locked"):
        Registry(registry.root, lock_timeout=0.05).tag("tickets", "prod")
    with registry.writing("hold the lock"), open(registry.root / ".lock", "a") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(registry.root):
        pass


def write_model(folder: Path, how: str) -> Path:
    """A model folder, with what differs between real ones."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "dtype": "float32",
        "use_cache": True,
        "limit": float("inf"),
        "inner": {"dtype": "x"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings: dict[str, Any] = {"bos_token": {"content": "<s>", "lstrip": False}, "pad_token": None, "other": 1}
    tokenizer = {"model": {"type": "BPE"}, "padding": {"length": 3}, "truncation": None, "scores": [-float("inf"), 0.5]}
    one: Tensors = {"b": ("F32", [2, 2], numbers_of(4, 1)), "a": ("BF16", [3], b"abcdef")}
    two: Tensors = {"c": ("I64", [], bytes(8))}
    match how:
        case "one file":
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
            settings["chat_template"] = "{{ a }}"
            (folder / "model.safetensors").write_bytes(write_tensors(one))
            (folder / "adapter_model.safetensors").write_bytes(write_tensors(two))
        case "shards":
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
            (folder / "chat_template.jinja").write_text("{{ b }}\nü\n")
            settings["chat_template"] = "not this one"
            for file, tensors in (("x-1.safetensors", one), ("x-2.safetensors", two), ("surplus.safetensors", one)):
                (folder / file).write_bytes(write_tensors(tensors))
            index = {"weight_map": {"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "old tokenizer":
            (folder / "vocab.json").write_text("{}")
            (folder / "merges.txt").write_text("a b")
            settings["chat_template"] = [{"name": "tool", "template": "ü"}, {"name": "default", "template": "x"}]
            (folder / "model.safetensors").write_bytes(write_tensors(two))
        case "bare":
            (folder / "model.safetensors").write_bytes(write_tensors({}))
    if how != "bare":
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("how", ["one file", "shards", "old tokenizer", "bare"])
def test_the_stranger_identifies_a_base(tmp_path: Path, how: str) -> None:
    folder = write_model(tmp_path / "model", how)
    record: BaseRecord = identify(folder).record
    assert canonical(record_of_folder(folder)) + b"\n" == record.encode()


def test_the_page_lists_exactly_the_fields(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    section = PAGE.read_text().split("\n## 5.")[1].split("\n## 6.")[0]
    tables = {
        part.split()[0].strip(",`"): re.findall(r"`([a-z_.]+)`", " ".join(re.findall(r"^\| (`[^|]*)\|", part, re.M)))
        for part in section.split("\n### ")[1:]
    }
    written = re.findall(r'"type": "([a-z_]+)"', Path(receipts.__file__).read_text())
    assert sorted(tables.pop("Receipts")) == sorted(written)
    version = registry.publish("tickets", make_payload(), make_draft())
    manifest = json.loads((version.path / "manifest.json").read_bytes())
    base = {f"base.{field}" for field in manifest.pop("base")}
    assert set(tables["manifest.json"]) == {*manifest, *base}
    assert set(tables["Base"]) == BASE_RECORD == set(decode_record(canonical(example_base(1)) + b"\n")._as_json())
    record = json.loads((registry.root / "tickets/aliases/latest/00000001").read_bytes())
    assert set(tables["Alias"]) == ALIAS_RECORD == set(record)
    relation = Relation("0" * 64, "1" * 64, "other", {"a": 0.5})
    assert set(tables["Relation"]) == RELATION == set(json.loads(relation.encode()))
    assert sum(map(len, tables.values())) == 20 + 6 + 8 + 8


def test_the_loader_printed_on_the_page_works(
    registry: Registry, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(code.strip().splitlines()) <= 22
    scope: dict[str, Any] = {}
    exec(code, scope)
    version = registry.publish("heads", make_payload("tensors", seed=3), make_draft("tensors"))
    assert scope["load"](version.path) == {
        "a": ("F32", [4], struct.pack("<4f", 3, 4, 5, 6)),
        "b": ("F32", [2], bytes(8)),
    }
    path = version.path / "tensors.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AssertionError, match="tensors were changed"):
        scope["load"](version.path)


# ------------------------------------------------------------------------------------------------ registry_v1


def asked(root: Path) -> dict[str, Any]:
    """Everything that reading answers."""
    registry = Registry(root)
    names = registry.names()
    return {
        "names": names,
        "list": [version.reference for version in registry.list()],
        "versions": {name: [version.id for version in registry.versions(name)] for name in names},
        "aliases": {name: registry.aliases(name) for name in names},
        "history": {name: [(m.alias, m.number, m.version, m.time) for m in registry.history(name)] for name in names},
        "bases": [record.id for v in registry.list() if (record := bases.record_of(v)) is not None],
        "relations": [relation.id for relation in bases.relations(registry.layout)],
        "prefix": registry.resolve(f"tickets@{SECOND[:5]}").id,
        "problems": check_root(root, read_data=True),
    }


ANSWERS: dict[str, Any] = {
    "names": ["heads", "tickets"],
    "list": [f"heads@{HEADS}", f"tickets@{SECOND}"],
    "versions": {"heads": [HEADS], "tickets": [SECOND, FIRST]},
    "aliases": {"heads": {"latest": HEADS}, "tickets": {"latest": SECOND, "prod": FIRST}},
    "history": {
        "heads": [("latest", 1, HEADS, "2026-01-03T00:00:00.000000Z")],
        "tickets": [
            ("latest", 1, FIRST, "2026-01-01T00:00:00.000000Z"),
            ("old", 1, FIRST, "2026-01-01T00:00:00.000000Z"),
            ("prod", 1, FIRST, "2026-01-01T00:00:00.000000Z"),
            ("latest", 2, SECOND, "2026-01-02T03:04:05.678901Z"),
            ("prod", 2, SECOND, "2026-01-02T03:04:05.678901Z"),
            ("prod", 3, FIRST, "2026-01-04T00:00:00.000000Z"),
            ("old", 2, None, "2026-01-05T00:00:00.000000Z"),
        ],
    },
    "bases": ["6222713d71d3eb83", "adbebd565a971b15"],
    "relations": ["650ad992a24fd881"],
    "prefix": SECOND,
    "problems": {},
}


def test_registry_v1_loads_for_ever() -> None:
    before = everything(V1)
    assert len(before) > 25
    assert asked(V1) == ANSWERS
    registry = Registry(V1)
    for reference in (f"tickets@{FIRST}", f"tickets@{SECOND}", "heads@latest"):
        assert check(registry.resolve(reference)) == []
    second = registry.resolve(f"tickets@{SECOND}").manifest
    assert second.metrics.after == {"loss": 1.25, "nested": [1, None, True, -0.0]}
    assert second.recipe is not None
    assert second.recipe.config["note"] == "ü€😀"
    assert [(each.role, each.rows, each.tokens, each.license) for each in second.data] == [
        ("train", 100, 2048, "CC-BY-4.0"),
        ("held_out", 20, None, None),
    ]
    assert [(p.name, p.version, p.relation) for p in second.parents] == [("tickets", FIRST, "continued")]
    assert read_registry(V1)["aliases"]["tickets"]["old"][-1]["version"] is None
    assert everything(V1) == before


def test_registry_v1_is_what_the_stranger_writes(tmp_path: Path) -> None:
    """Byte for byte, so that nobody mends it by hand. Git keeps no empty folders and no file rights."""
    write_v1(tmp_path / "again")
    assert files(tmp_path / "again") == files(V1)


def test_registry_v1_is_read_where_nothing_can_be_written() -> None:
    with tempfile.TemporaryDirectory() as free:  # not tmp_path: the kernel must let another user in
        root = Path(free) / "registry"
        shutil.copytree(V1, root)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        Path(free).chmod(0o755)
        before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}

        def read() -> None:
            assert asked(root) == ANSWERS  # once as this user, who imports what there is to import
            if os.geteuid() == 0:
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                (root / "x").touch()
            assert asked(root) == ANSWERS
            with pytest.raises(RegistryError, match="old or its new state"):
                Registry(root).restore("tickets")

        child = FORK.Process(target=read)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


def test_registry_v1_can_be_written_to(
    tmp_path: Path, make_payload: Callable[..., Path], make_draft: Callable[..., Draft]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(V1, root)
    old = files(root)
    registry = Registry(root)
    new = registry.publish("tickets", make_payload(), make_draft(), ["prod"])
    assert registry.restore("tickets", "prod").id == FIRST
    assert check_root(root) == {}
    assert {path: data for path, data in files(root).items() if path in old} == old
    assert len(read_registry(root)["versions"]["tickets"]) == 3
    assert registry.resolve("tickets") == new


# ------------------------------------------------------------------------------------------------ other formats

TWO = re.compile(r"has format 'peftkit/2', this peftkit reads format 'peftkit/1'")


def rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def calls(root: Path, source: Path, draft: Draft) -> dict[str, Callable[[], object]]:
    registry = Registry(root, lock_timeout=10)
    return {
        "names": registry.names,
        "list": registry.list,
        "resolve": lambda: registry.resolve("tickets"),
        "versions": lambda: registry.versions("tickets"),
        "aliases": lambda: registry.aliases("tickets"),
        "history": lambda: registry.history("tickets"),
        "publish": lambda: registry.publish("tickets", source, draft),
        "tag": lambda: registry.tag("tickets", "prod"),
        "untag": lambda: registry.untag("tickets", "prod"),
        "restore": lambda: registry.restore("tickets"),
        "remove": lambda: remove(registry, f"tickets@{SECOND}"),
        "remove_adapter": lambda: remove_adapter(registry, "heads"),
        "collect": lambda: collect(registry),
    }


@pytest.mark.parametrize(
    ("marker", "sentence", "hint"),
    [
        (b'{"format":"peftkit/2"}\n', TWO.pattern, "pip install --upgrade peftkit"),
        (b'{"format":"peftkit/2","more":[1]}', TWO.pattern, "pip install --upgrade peftkit"),
        (b'{"format": 1}\n', "has format 1, this peftkit reads format 'peftkit/1'", "FORMAT.md, section 8"),
        (b'{"format": "peftkit/1"}\n', "has format .*, this peftkit reads format 'peftkit/1'", ""),
        (b"", "has format b'', this peftkit reads format 'peftkit/1'", ""),
    ],
)
def test_a_registry_of_another_format_stops_everything(
    tmp_path: Path,
    make_payload: Callable[..., Path],
    make_draft: Callable[..., Draft],
    marker: bytes,
    sentence: str,
    hint: str,
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(V1, root)
    rewrite(root / "registry.json", marker)
    before = everything(root)
    stopped = 0
    for what, call in calls(root, make_payload(), make_draft()).items():
        with pytest.raises(RegistryError, match=sentence) as caught:
            call()
        assert hint in str(caught.value), what
        assert "registry.json" in str(caught.value), what
        assert everything(root) == before, what
        stopped += 1
    assert stopped == 13
    (problem,) = check_root(root)["registry.json"]
    assert re.search(sentence, problem)


def test_a_file_of_another_format_stops_and_says_so(tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(V1, root)
    registry, layout = Registry(root), Layout(root)

    def stopped(call: Callable[[], object], where: str) -> None:
        with pytest.raises(RegistryError, match=TWO) as caught:
            call()
        assert "pip install --upgrade peftkit" in str(caught.value)
        (problem,) = check_root(root)[where]
        assert TWO.search(problem), problem

    manifest = parse((root / f"tickets/versions/{FIRST}/manifest.json").read_bytes())
    written = canonical({**manifest, "format": "peftkit/2", "surprise": 1})
    folder = root / f"tickets/versions/{digest(written)[:16]}"
    shutil.copytree(root / f"tickets/versions/{FIRST}", folder)
    rewrite(folder / "manifest.json", written)
    stopped(lambda: registry.resolve(f"tickets@{folder.name}"), f"tickets@{folder.name}")
    shutil.rmtree(folder)

    record = parse((root / "tickets/aliases/prod/00000003").read_bytes())
    for changes in ({}, {"surprise": 1}):
        fields = {**record, **changes, "format": "peftkit/2"}
        del fields["check"]
        rewrite(
            root / "tickets/aliases/prod/00000003", canonical({**fields, "check": digest(canonical(fields))}) + b"\n"
        )
        stopped(lambda: registry.resolve("tickets@prod"), "tickets@prod")
        stopped(lambda: registry.history("tickets", "prod"), "tickets@prod")
        stopped(lambda: registry.tag("tickets", "prod"), "tickets@prod")
        assert len(list((root / "tickets/aliases/prod").iterdir())) == 3
    rewrite(root / "tickets/aliases/prod/00000003", canonical(record) + b"\n")

    for kind in ("bases", "relations"):
        path = sorted((root / kind).iterdir())[0]
        written = canonical({**parse(path.read_bytes()), "format": "peftkit/2", "surprise": 1}) + b"\n"
        new = path.with_name(f"{digest(written)[:16]}.json")
        new.write_bytes(written)
        call = (lambda i=new.stem: bases.read(layout, i)) if kind == "bases" else (lambda: bases.relations(layout))
        stopped(call, f"{kind}/{new.name}")
        new.unlink()
    assert check_root(root) == {}


def test_the_development_format_is_told(tmp_path: Path) -> None:
    """As commit c464343 wrote it: a number, an alias as one file, a history beside it, the id inside the manifest."""
    root = tmp_path / "old"
    fields: dict[str, Any] = {"format": 1, "kind": "peft", "name": "tickets"}
    version = digest(canonical(fields))[:16]
    folder = root / "tickets/versions" / version
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({**fields, "id": version}))
    (root / "tickets/aliases").mkdir()
    (root / "tickets/aliases/latest").write_text(version + "\n")
    (root / "tickets/alias-history.jsonl").write_text("{}\n")
    (root / "registry.json").write_text('{"format": 1}\n')
    with pytest.raises(RegistryError, match=r"has format 1, .*reads format 'peftkit/1'(.|\n)*FORMAT.md, section 8"):
        Registry(root).list()
    problems = check_root(root)
    assert {"registry.json", "tickets@latest", "tickets/alias-history.jsonl", f"tickets@{version}"} <= set(problems)
    assert "development version" in PAGE.read_text().split("\n## 8.")[1]
