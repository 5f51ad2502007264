"""tag, restore, rm, gc and verify, as a user types them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from peftkit.registry import Draft, Registry, Version

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def versions(tmp_path: Path) -> list[Version]:
    """Two versions of `tickets`, the second made from the first."""
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (payload / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    store = Registry(tmp_path / "registry")
    base = {"source": "Qwen/Qwen3-4B", "fingerprint": "f" * 64}
    first = store.publish("tickets", payload, Draft.model_validate({"kind": "peft", "base": base}))
    parent = {"name": "tickets", "version": first.id, "relation": "continued"}
    draft = Draft.model_validate({"kind": "peft", "base": base, "parents": [parent]})
    return [first, store.publish("tickets", payload, draft)]


def test_an_alias_moves_is_restored_and_removed(cli: Cli, versions: list[Version]) -> None:
    first, second = versions
    assert cli("tag", f"tickets@{first.id}", "prod")[:2] == (0, f"tickets@prod is now {first.reference}\n")
    assert cli("tag", "tickets", "prod")[1] == f"tickets@prod is now {second.reference}\n"
    assert cli("restore", "tickets", "prod")[:2] == (0, f"tickets@prod is again {first.reference}\n")
    assert cli("restore", "tickets", "prod", "--to", "2")[1] == f"tickets@prod is again {second.reference}\n"
    assert cli("tag", "--remove", "tickets", "prod")[0] == 0
    assert cli("restore", "tickets", "prod")[:2] == (0, f"tickets@prod is again {second.reference}\n")
    code, _, err = cli("restore", "tickets", "nobody")
    assert code == 1
    assert "has no alias 'nobody'" in err
    code, _, err = cli("restore", "tickets@prod")
    assert code == 1
    assert "use 'tickets'" in err
    code, _, err = cli("tag", "--remove", "tickets", "latest")
    assert code == 1
    assert "cannot be removed" in err


def test_rm_refuses_what_is_needed_and_says_what_to_do(cli: Cli, versions: list[Version]) -> None:
    first, second = versions
    code, _, err = cli("rm", "tickets")
    assert code == 1
    assert f"{second.reference} is needed by tickets@latest" in err
    assert "peftkit restore tickets latest" in err
    code, _, err = cli("rm", first.reference)
    assert code == 1
    assert f"needed by {second.reference}, made from it" in err
    assert cli("restore", "tickets")[0] == 0
    assert cli("rm", second.reference)[:2] == (0, f"removed {second.reference}\n")
    code, _, err = cli("rm", "tickets")
    assert "peftkit rm tickets --all" in err
    cli("tag", "tickets", "prod")
    code, _, err = cli("rm", "tickets", "--all")
    assert code == 1
    assert "needed by tickets@prod" in err
    cli("tag", "--remove", "tickets", "prod")
    assert cli("rm", "tickets", "--all")[0] == 0
    assert cli("list", "--json")[1].strip() == "[]"


def test_gc_lists_before_it_removes(cli: Cli, versions: list[Version], tmp_path: Path) -> None:
    (tmp_path / "registry/tmp/left").mkdir()
    (tmp_path / "registry/tmp/left/file").write_bytes(bytes(100))
    listed = json.loads(cli("gc", "--dry-run", "--json")[1])
    assert listed == {"removed": ["tmp/left"], "bytes": 100, "dry_run": True}
    assert (tmp_path / "registry/tmp/left").exists()
    assert json.loads(cli("gc", "--versions", "--json")[1])["removed"] == ["tmp/left"], "both versions are reached"
    cli("restore", "tickets")
    assert json.loads(cli("gc", "--versions", "--json")[1])["removed"] == [f"tickets/versions/{versions[1].id}"]
    assert cli("verify")[0] == 0


def test_verify_names_the_damaged_file(cli: Cli, versions: list[Version]) -> None:
    first, second = versions
    assert cli("verify")[1].endswith("2 versions, all whole\n")
    assert cli("verify", "tickets", "--read-data")[1] == "tickets: 2 versions, all whole\n"
    assert cli("verify", "tickets@latest", "--read-data")[1] == f"{second.reference} is whole: 2 files\n"
    path = first.path / "adapter_model.safetensors"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert cli("verify")[0] == 0, "without --read-data tensors are not read"
    code, _, err = cli("verify", "--read-data")
    assert code == 1
    assert f"{first.reference}: adapter_model.safetensors has the digest" in err
    assert "to mend it:" in err
    code, out, _ = cli("verify", first.reference, "--read-data", "--json")
    assert code == 1
    assert list(json.loads(out)["problems"]) == [first.reference]
