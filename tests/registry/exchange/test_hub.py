"""Push and pull against a hub on this machine: exactly what was listed leaves, and nothing hostile comes in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry.exchange.conftest import SECRET_ROW
from registry.exchange.fake_hub import TOKEN, FakeHub, Files, serve
from registry.intake.adapters import sound

from peftkit.errors import AdapterDamaged, AdapterNotFound, RegistryError
from peftkit.registry import Registry, Version, check_root
from peftkit.registry.exchange import Hub, ImportBase, compare, export, parse, prepare, pull, push_to_folder, send

pytestmark = pytest.mark.loopback
Make = Callable[..., Version]
REPO = "me/tickets"


def push(registry: Registry, hub: Hub, reference: str = "tickets", **options: Any) -> Any:
    parcel = prepare(registry, reference, options.pop("license", None))
    return send(parcel, hub, compare(parcel, hub, **options), **options)


def exported(registry: Registry, tmp_path: Path, name: str = "tickets") -> Files:
    export(registry, name, tmp_path / f"export-{name}")
    return {path.name: path.read_bytes() for path in (tmp_path / f"export-{name}").iterdir()}


def test_a_round_trip_gives_the_same_version_and_sends_exactly_what_was_listed(
    registry: Registry, version: Version, hub: Hub, server: FakeHub, other: Registry, tmp_path: Path
) -> None:
    parcel = prepare(registry, "tickets")
    pushed = push(registry, hub)
    assert server.files(REPO) == {
        **exported(registry, tmp_path),
        ".gitattributes": server.files(REPO)[".gitattributes"],
    }
    assert server.repos[REPO].private
    assert set(pushed.files) == {piece.path for piece in parcel.pieces}
    assert set(server.objects) == {version.manifest.files["adapter_model.safetensors"].sha256}
    sent = server.sent()
    assert SECRET_ROW.encode() not in sent
    assert str(tmp_path).encode() not in sent
    assert not any("torch" in str(request.headers) or "agent/" in str(request.headers) for request in server.requests)
    came = pull(other, hub)
    assert came.reference == version.reference
    assert (came.path / "manifest.json").read_bytes() == (version.path / "manifest.json").read_bytes()
    assert check_root(other.root) == {}


def test_the_same_version_is_not_sent_twice_and_an_edited_card_stays(
    registry: Registry, version: Version, hub: Hub, server: FakeHub
) -> None:
    first = push(registry, hub)
    server.repos[REPO].commit({**server.files(REPO), "README.md": b"edited by hand"})
    server.requests.clear()
    again = push(registry, hub)
    assert (again.files, again.commit) == ((), server.repos[REPO].head)
    assert again.commit != first.commit
    assert {request.method for request in server.requests} <= {"GET", "HEAD"}
    assert push(registry, hub, license="mit").files == ("README.md",)
    assert b"license: mit" in server.files(REPO)["README.md"]


def test_another_version_is_a_new_commit_on_top_and_says_of_what(
    registry: Registry, make_version: Make, hub: Hub, server: FakeHub, other: Registry
) -> None:
    first = make_version()
    push(registry, hub)
    old = server.repos[REPO].head
    newer = make_version("mails", created="2026-02-01T09:30:00Z")
    arrival = compare(prepare(registry, "mails"), hub)
    assert arrival.before == first.reference
    assert set(arrival.replaced) == {"manifest.json", "README.md"}
    assert arrival.removed == ()
    push(registry, hub, "mails")
    assert list(server.repos[REPO].commits)[-2] == old
    assert pull(other, hub).reference == newer.reference
    assert pull(other, hub, revision=old).reference == first.reference


def test_files_of_the_earlier_version_go_and_files_of_others_stay(
    registry: Registry, version: Version, hub: Hub, server: FakeHub, tmp_path: Path
) -> None:
    manifest = json.loads(exported(registry, tmp_path)["manifest.json"])
    manifest |= {"kind": "tensors", "files": {"tensors.safetensors": {"sha256": "0" * 64, "bytes": 3}}}
    old = {"manifest.json": json.dumps(manifest).encode(), "tensors.safetensors": b"abc", "notes.txt": b"mine"}
    server.make(REPO, old)
    assert compare(prepare(registry, "tickets"), hub).removed == ("tensors.safetensors",)
    push(registry, hub)
    assert "tensors.safetensors" not in server.files(REPO)
    assert server.files(REPO)["notes.txt"] == b"mine"


def test_a_public_repository_takes_nothing_without_being_asked(
    registry: Registry, version: Version, hub: Hub, server: FakeHub
) -> None:
    server.make(REPO, {}, private=False)
    with pytest.raises(RegistryError, match="everybody can read it") as caught:
        push(registry, hub)
    assert "--public" in str(caught.value)
    assert not server.asked("POST")
    push(registry, hub, public=True)
    assert "manifest.json" in server.files(REPO)


def test_a_repository_that_moves_meanwhile_is_left_alone(
    registry: Registry, version: Version, hub: Hub, server: FakeHub
) -> None:
    server.make(REPO, {})
    parcel = prepare(registry, "tickets")
    arrival = compare(parcel, hub)
    server.repos[REPO].commit({"theirs.txt": b"x"})
    with pytest.raises(RegistryError, match="moved"):
        send(parcel, hub, arrival)
    assert server.files(REPO) == {"theirs.txt": b"x"}


def test_files_that_the_hub_leaves_out_are_noticed(
    registry: Registry, version: Version, hub: Hub, server: FakeHub
) -> None:
    server.listing = lambda entries: [entry for entry in entries if entry["path"] != "base.json"]
    with pytest.raises(RegistryError, match=r"no or other bytes for base\.json"):
        push(registry, hub)


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("recipe.config.train", {"recipe": {"name": "r", "sha256": "1" * 64, "config": {"train": "/data/x.jsonl"}}}),
        ("environment.home", {"environment": {"home": "~/models/x"}}),
        ("adapter.of.1", {"adapter": {"of": ["fine", "C:\\models\\x"]}}),
        ("metrics.other./srv/rows (the key)", {"metrics": {"other": {"/srv/rows": 1}}}),
    ],
)
def test_paths_of_this_machine_do_not_leave(
    make_version: Make, registry: Registry, field: str, more: dict[str, Any]
) -> None:
    make_version(**more)
    with pytest.raises(RegistryError, match="holds a path of this machine") as caught:
        prepare(registry, "tickets")
    assert f"manifest.json: {field} " in str(caught.value)


def test_a_path_in_the_config_does_not_leave_either(make_version: Make, registry: Registry) -> None:
    make_version(config={"base_model_name_or_path": "/home/someone/base"})
    with pytest.raises(RegistryError, match=r"adapter_config\.json: base_model_name_or_path"):
        prepare(registry, "tickets")


def test_what_tells_something_is_listed(
    make_version: Make, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "tower9.example.org")
    more = {"run": "20260131-tower9-abcd", "metrics": {"other": {"note": "x" * 201}}}
    make_version(**more)
    tells = dict(prepare(registry, "tickets").tells)
    assert tells["base.source"] == "someone/base"
    assert tells["data.0.source"] == "tickets.jsonl"
    assert tells["environment.processor"] == "A CPU"
    assert "metrics.other.note (long text)" in tells


def test_a_folder_may_be_a_registry(registry: Registry, version: Version, other: Registry, tmp_path: Path) -> None:
    assert push_to_folder(registry, "tickets", tmp_path / "plain") == version
    assert (tmp_path / "plain" / "base.json").is_file()
    with other.writing("begin"):
        pass
    came = push_to_folder(registry, "tickets", other.root)
    assert (came.reference, came.path.parents[2]) == (version.reference, other.root)
    assert check_root(other.root) == {}


@pytest.mark.parametrize("text", ["hub:tickets", "hub:a/b/c", "hub:../x", "hub:a/..", "https://huggingface.co/a/b"])
def test_a_misspelt_repository_is_no_folder(text: str) -> None:
    with pytest.raises(RegistryError, match=r"names no repository|is an address"):
        parse(text)
    assert parse("a/b") is None
    assert parse("hub:a/b") == "a/b"


# What comes in


def other_bytes(server: FakeHub, files: Files) -> None:
    server.bodies["adapter_model.safetensors"] = files["adapter_model.safetensors"][:-1] + b"\xff"


def other_manifest(server: FakeHub, files: Files) -> None:
    server.bodies["manifest.json"] = files["manifest.json"].replace(b"tickets", b"wickets")


def truncated(server: FakeHub, files: Files) -> None:
    server.bodies["adapter_model.safetensors"] = files["adapter_model.safetensors"][:100]


def endless(server: FakeHub, files: Files) -> None:
    server.endless.add("base.json")


def huge(server: FakeHub, files: Files) -> None:
    def listing(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**e, "size": 1 << 50, "lfs": {**e["lfs"], "size": 1 << 50}} if "lfs" in e else e for e in entries]

    server.listing = listing


def huge_manifest(server: FakeHub, files: Files) -> None:
    server.listing = lambda entries: [{**e, "size": 1 << 40} if e["path"] == "manifest.json" else e for e in entries]


def nonsense(server: FakeHub, files: Files) -> None:
    server.listing = lambda entries: [{"type": "file", "path": None, "size": "x", "oid": 1}]


def missing_base(server: FakeHub, files: Files) -> None:
    server.listing = lambda entries: [entry for entry in entries if entry["path"] != "base.json"]


def failing(server: FakeHub, files: Files) -> None:
    server.refuse["/tree/"] = 403


HOSTILE = {
    other_bytes: "other bytes than the repository lists",
    other_manifest: "other bytes than the repository lists",
    truncated: "Consistency check failed",
    endless: "sends more than",
    huge: "at most 8589934592 bytes",
    huge_manifest: "at most 16777216 bytes",
    nonsense: "without a path or a size",
    missing_base: r"lacks base\.json",
    failing: "403",
}


@pytest.mark.parametrize("bend", HOSTILE, ids=lambda bend: bend.__name__)
def test_a_hub_that_lies_changes_nothing(
    registry: Registry, version: Version, hub: Hub, server: FakeHub, other: Registry, tmp_path: Path, bend: Any
) -> None:
    files = exported(registry, tmp_path)
    server.make(REPO, files)
    bend(server, files)
    with pytest.raises(RegistryError, match=HOSTILE[bend]) as caught:
        pull(other, hub)
    assert TOKEN not in str(caught.value)
    assert not other.root.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.json", "a/../../x.json", "model.bin", "tokenizer.json"])
def test_a_manifest_cannot_name_other_files(
    registry: Registry, version: Version, hub: Hub, server: FakeHub, other: Registry, tmp_path: Path, name: str
) -> None:
    files = exported(registry, tmp_path)
    manifest = json.loads(files["manifest.json"])
    manifest["files"][name] = {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    server.make(REPO, {**files, "manifest.json": json.dumps(manifest).encode(), name: b"x"})
    with pytest.raises(RegistryError, match=r"cannot be part of an adapter|names tokenizer\.json"):
        pull(other, hub)
    assert [path for path in server.asked() if "/resolve/" in path and not path.endswith("manifest.json")] == []
    assert not other.root.exists()


def test_a_content_that_lies_elsewhere_is_taken_only_with_the_listed_bytes_and_never_with_the_token(
    registry: Registry, version: Version, hub: Hub, server: FakeHub, other: Registry, tmp_path: Path
) -> None:
    files = exported(registry, tmp_path)
    server.make(REPO, files)
    weights = files["adapter_model.safetensors"]
    with serve() as elsewhere:
        elsewhere.objects |= {"good": weights, "bad": weights[:-1] + b"\xff"}
        server.redirects["adapter_model.safetensors"] = f"{elsewhere.url}/objects/bad"
        with pytest.raises(AdapterDamaged, match="other bytes"):
            pull(other, hub)
        assert not other.root.exists()
        server.redirects["adapter_model.safetensors"] = f"{elsewhere.url}/objects/good"
        assert pull(other, hub).id == version.id
        assert len(elsewhere.requests) == 2
        assert not any("Authorization" in key.title() for r in elsewhere.requests for key in r.headers)


def test_a_plain_peft_repository_comes_in_without_its_pickles(
    hub: Hub, server: FakeHub, other: Registry, base: ImportBase, tmp_path: Path
) -> None:
    folder = sound().write(tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = server.make(REPO, {**files, "adapter_model.bin": b"\x80\x04.", "optimizer.pt": b"\x80\x04."})
    came = pull(other, hub, base=base)
    assert came.name == "tickets"
    assert came.manifest.receipts[0]["source"] == f"hub:me/tickets@{commit}"
    assert came.manifest.receipts[0]["left_out"] == []
    fetched = {path.rpartition("/")[2] for path in server.asked() if "/resolve/" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_repository_without_an_adapter_says_what_it_holds(hub: Hub, server: FakeHub, other: Registry) -> None:
    server.make(REPO, {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04."})
    with pytest.raises(RegistryError, match=r"a pickle, adapter_model\.bin, which is not downloaded"):
        pull(other, hub)
    server.make(REPO, {"config.json": b"{}"})
    with pytest.raises(RegistryError, match=r"it holds config\.json"):
        pull(other, hub)
    assert not any("/resolve/" in path for path in server.asked())


def test_what_is_not_there_and_who_may_not_look_are_told_apart_from_a_dead_network(
    hub: Hub, server: FakeHub, other: Registry, registry: Registry, version: Version
) -> None:
    with pytest.raises(AdapterNotFound, match="shows no repository me/tickets"):
        pull(other, hub)
    server.make(REPO, {})
    with pytest.raises(RegistryError, match="RevisionNotFoundError") as caught:
        pull(other, hub, revision="f" * 40)
    assert "--revision" in str(caught.value)
    with pytest.raises(AdapterNotFound, match="shows no repository"):
        pull(other, Hub(REPO, endpoint=server.url, token="hf_wrong"))
    with pytest.raises(RegistryError, match="401") as caught:
        push(registry, Hub("me/new", endpoint=server.url, token="hf_wrong"))
    assert "hf auth login" in str(caught.value)
    assert "hf_wrong" not in str(caught.value)
    dead = Hub(REPO, endpoint="http://127.0.0.1:9", token=TOKEN)
    for act in (lambda: pull(other, dead), lambda: push(registry, dead)):
        with pytest.raises(RegistryError, match=r"at http://127\.0\.0\.1:9 failed: ConnectError") as caught:
            act()
        assert "check the network" in str(caught.value)
    assert not other.root.exists()


def test_offline_mode_is_named(hub: Hub, server: FakeHub, other: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RegistryError, match="offline mode") as caught:
        pull(other, hub)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert server.requests == []
