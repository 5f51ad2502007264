"""Budgets hold, whatever ranks come and go, and a thousand adapters share 32 slots."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from generation.adapters_lab import Lab, asked, bytes_of, close, computed, names

from peftkit.errors import TuningError
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.seats import Seat

WEIGHTS = "adapter_model.safetensors"


def test_a_large_rank_comes_and_goes_within_the_memory(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    """Eight of rank 4 or one of rank 32 fit: stacks become wide for one, and many again for the others."""
    large, small = lab.lora("large", 30, r=32), [lab.lora(f"small{i}", 40 + i, r=4) for i in range(9)]
    memory = bytes_of(lab, 4, slots=8)
    host = fleet(slots=16, memory=memory)
    for _ in range(2):
        for version in [*small, large, *small[:8]]:
            assert close(asked(host, version.reference), lab.alone(version))
            assert host.statistics().bytes <= memory
        assert len(host.statistics().resident) == 8
        assert "large" not in names(host)
    assert host.statistics().bytes == memory
    with pytest.raises(TuningError, match=rf"take {bytes_of(lab, 33)} bytes, and adapters may take {memory}"):
        host.seat(host.identify(lab.lora("larger", 31, r=33).reference))
    assert len(host.statistics().resident) == 8, "nobody went in vain"


def test_stacks_become_small_again_when_half_of_them_is_for_nobody(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    host = fleet(slots=2)
    asked(host, lab.lora("wide", 32, r=64).reference)
    asked(host, "a2")
    assert host.statistics().bytes == bytes_of(lab, 64, slots=2)
    for name in ("a5", "a2"):
        asked(host, name)
    assert names(host) == ["a5", "a2"]
    assert host.statistics().bytes == bytes_of(lab, 4, slots=2)


@pytest.mark.parametrize("first", [64, 4])
def test_nothing_of_another_rank_is_left_in_a_slot(first: int, lab: Lab, fleet: Callable[..., Fleet]) -> None:
    one, other = lab.lora(f"first{first}", 50, r=first), lab.lora(f"then{first}", 51, r=68 - first)
    stays = lab.lora("stays", 52, r=48)
    host = fleet(slots=2)
    host.pin(stays.reference)
    for version in (one, other, one):
        assert close(asked(host, version.reference), lab.alone(version))
        assert close(asked(host, stays.reference), lab.alone(stays))


def test_who_is_in_use_is_not_moved_and_who_is_pinned_may_be(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    """Three of rank 4 fit. The used one keeps the last slot; a wide one needs two slots less, and waits for it."""
    wide = lab.lora("wide8", 60, r=8)
    host = fleet(slots=4, memory=bytes_of(lab, 4, slots=4))
    names_of_four = [lab.lora(f"four{i}", 61 + i, r=4).reference for i in range(4)]
    for name in names_of_four:
        asked(host, name)
    used = host.seat(host.identify(names_of_four[3]))
    assert used is not None
    assert used.slot == 3
    assert host.seat(host.identify(wide.reference)) is None
    assert len(host.statistics().resident) == 4, "nobody went in vain"
    assert close(computed(used), lab.alone(lab.registry.resolve(names_of_four[3])))
    host.release(used)
    host.pin(names_of_four[3])
    assert close(asked(host, wide.reference), lab.alone(wide))
    assert close(asked(host, names_of_four[3]), lab.alone(lab.registry.resolve(names_of_four[3])))
    assert sorted(names(host)) == ["four3", "wide8"]


def test_a_thousand_adapters_share_32_slots(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    """Random access, some asked for often: each computes its own, never more are resident than fit."""
    versions = {f"n{i}": lab.written(f"n{i}", 1000 + i, r=(2, 4, 8)[i % 3]) for i in range(1000)}
    memory = bytes_of(lab, 8, slots=32)
    host = fleet(versions.__getitem__, slots=32, memory=memory, host_memory=bytes_of(lab, 4, slots=200))
    draw, taken, looked, alone = random.Random(3), list[Seat](), 0, dict[str, torch.Tensor]()
    for step in range(800):
        name = f"n{draw.choice((draw.randrange(1000), draw.randrange(1000), draw.randrange(60)))}"
        seat = host.seat(host.identify(name))
        assert seat is not None
        assert seat.digest == versions[name].id
        if step % 16 == 0:
            if name not in alone:
                alone[name] = lab.alone(versions[name])
            assert close(computed(seat), alone[name])
            looked += 1
        taken.append(seat)
        if len(taken) > 20:
            host.release(taken.pop(draw.randrange(len(taken))))
        assert len(host._residents) <= 32
        assert host.bank.bytes <= memory
    for seat in taken:
        host.release(seat)
    counted = host.statistics()
    assert looked == 50
    assert len(alone) > 30
    assert counted.hits + counted.from_host.count + counted.from_disk.count == 800
    assert counted.from_disk.count > 400
    assert min(counted.from_host.count, counted.hits) > 50
    assert len(counted.resident) == 32
    assert counted.in_host_memory > 100
