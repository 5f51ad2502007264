"""Damage, errors and interrupts: who was resident still computes its own, and what is wrong is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from generation.adapters_lab import Lab, asked, bytes_of, close, computed, damage, names

from peftkit.errors import AdapterDamaged, TuningError
from peftkit.generation.fleet.fleet import Fleet

WEIGHTS = "adapter_model.safetensors"


def test_damage_on_disk_is_found_when_the_file_is_read_again(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    version = lab.lora("fragile", 70)
    expected = lab.alone(version)
    host = fleet(slots=1, host_memory=bytes_of(lab, 4))
    asked(host, "fragile")
    damage(version.path / WEIGHTS)
    assert close(asked(host, "fragile"), expected)
    asked(host, "a0")
    assert close(asked(host, "fragile"), expected), "it came from host memory"
    asked(host, "a0")
    asked(host, "a2")  # a0 needs room in host memory now
    asked(host, "a0")
    with pytest.raises(AdapterDamaged, match=WEIGHTS):
        host.seat(host.identify("fragile"))
    assert names(host) == ["a0"]
    assert close(asked(host, "a0"), lab.alone(lab.registry.resolve("a0")))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["read", "take", "resize", "fill"])
def test_whatever_is_raised_the_others_stay_whole(
    where: str, error: BaseException, lab: Lab, fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftkit.generation.bank.sites import Group
    from peftkit.generation.fleet import fleet as module

    wide = lab.lora("fault", 71, r=16)
    host = fleet(slots=2, host_memory=1 << 30)
    asked(host, "a0")
    kept = host.seat(host.identify("a1"))
    calls = 0

    def raising(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if where == "read" or calls == 2:
            raise error
        return true(*args, **options)

    if where == "read":
        monkeypatch.setattr(module, "read", raising)
    else:
        true = getattr(Group, "put" if where == "fill" else where)
        monkeypatch.setattr(Group, true.__name__, raising)
    with pytest.raises(type(error)):
        host.seat(host.identify("fault"))
    monkeypatch.undo()
    assert calls
    assert names(host) == (["a0", "a1"] if where in ("read", "take") else ["a1"])
    assert close(computed(kept), lab.alone(lab.registry.resolve("a1")))
    for version in ("fault", "a0", "fault"):
        assert close(asked(host, version), lab.alone(lab.registry.resolve(version)))
    assert close(computed(kept), lab.alone(lab.registry.resolve("a1")))
    assert kept is not None
    host.release(kept)
    assert wide.reference in host.statistics().resident


def test_a_removed_version_is_not_there(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    version = lab.lora("removed", 72)
    host = fleet(slots=1)
    identity = host.identify("removed")
    shutil.rmtree(version.path)
    with pytest.raises(AdapterDamaged):
        host.seat(identity)


def test_seats_in_use_keep_a_fleet_open(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    host = fleet()
    seat = host.seat(host.identify("a0"))
    with pytest.raises(TuningError, match="1 adapters are in use: a0@"):
        host.close()
    assert seat is not None
    assert close(computed(seat), lab.alone(lab.registry.resolve("a0")))
    host.release(seat)
