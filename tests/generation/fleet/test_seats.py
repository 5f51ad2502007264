"""Seats: each computes what its adapter alone computes, and the one not asked for longest makes room."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generation.adapters_lab import Lab, asked, bytes_of, close, computed, damage, logits, names
from tiny_bases import write_base
from tuning.method_zoo import reload, save_method, save_tensors

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.errors import AdapterDamaged, AdapterNotFound, BaseMismatch, TuningError
from peftkit.events import Event, Warned
from peftkit.generation.bank.bank import Bank
from peftkit.generation.fleet.fleet import Fleet
from peftkit.generation.seats import Alone
from peftkit.registry.store import Version
from peftkit.tuning.skeleton import skeleton

WEIGHTS = "adapter_model.safetensors"


# --- seats ---


def test_a_seat_computes_what_its_adapter_alone_computes(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    host = fleet(slots=4)
    seats = {name: host.seat(host.identify(name)) for name in ("a0", "a1", "a2")}
    for name, seat in seats.items():
        version = lab.registry.resolve(name)
        assert seat is not None
        assert (seat.digest, seat.reference) == (version.id, version.reference)
        assert close(computed(seat), lab.alone(version))
        assert isinstance(seat.model, Bank)
        host.release(seat)
    base = host.seat(host.identify(None))
    assert base is not None
    assert base.digest == lab.backbone().identity.fingerprint
    assert base.reference is None
    assert torch.equal(computed(base), logits(lab.backbone().model))
    host.release(base)


def test_one_version_has_one_slot_however_often_it_is_asked_for(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    host = fleet(slots=1)
    version = lab.registry.resolve("a0")
    one, two = host.seat(host.identify("a0")), host.seat(host.identify(version.reference))
    assert one == two
    assert one is not None
    host.release(one)
    assert host.seat(host.identify("a1")) is None, "it is still used once"
    host.release(one)
    with pytest.raises(TuningError, match="given back already"):
        host.release(one)
    assert close(asked(host, "a1"), lab.alone(lab.registry.resolve("a1")))
    counted = host.statistics()
    assert (counted.hits, counted.from_disk.count, counted.from_host.count, counted.evictions) == (1, 2, 0, 1)
    assert counted.from_disk.bytes == bytes_of(lab, 2) + bytes_of(lab, 3)
    assert counted.from_disk.seconds > 0


def test_the_one_not_asked_for_longest_goes_and_waits_in_host_memory(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    host = fleet(slots=2)
    for name in ("a0", "a1", "a0", "a2"):
        asked(host, name)
    assert names(host) == ["a0", "a2"]
    assert host.statistics().in_host_memory == 1
    assert close(asked(host, "a1"), lab.alone(lab.registry.resolve("a1")))
    counted = host.statistics()
    assert (counted.from_disk.count, counted.from_host.count) == (3, 1)
    assert counted.from_host.bytes == bytes_of(lab, 3)


def test_host_memory_holds_its_bytes_and_no_more(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    host = fleet(slots=1, host_memory=bytes_of(lab, 2) + bytes_of(lab, 3))
    for name in ("a0", "a1", "a2"):
        asked(host, name)
    assert host.statistics().in_host_memory == 2
    asked(host, "a3")  # a2 needs more than a0 leaves
    assert host.statistics().in_host_memory == 1
    nothing = fleet(slots=1, host_memory=0)
    for name in ("a0", "a1", "a0"):
        asked(nothing, name)
    assert nothing.statistics().in_host_memory == 0
    assert nothing.statistics().from_disk.count == 3


def test_pinned_adapters_stay(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    host = fleet(slots=2)
    host.pin("a0")
    for name in ("a1", "a2", "a3"):
        asked(host, name)
    assert names(host) == ["a0", "a3"]
    host.pin("a3")
    with pytest.raises(TuningError, match=r"a1@\w+ finds no place: all 2 are pinned \(a0@"):
        host.seat(host.identify("a1"))
    with pytest.raises(TuningError, match="finds no place"):
        host.pin("a1")
    host.unpin("a0")
    assert close(asked(host, "a1"), lab.alone(lab.registry.resolve("a1")))
    assert names(host) == ["a3", "a1"]
    with pytest.raises(TuningError, match="a1 is not pinned"):
        host.unpin("a1")


# --- which version, and whether it may be used ---


def test_a_name_means_what_it_points_at_now(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    old = lab.lora("moving", 20)
    host = fleet(slots=4)
    before = host.seat(host.identify("moving"))
    new = lab.lora("moving", 21)
    after = host.seat(host.identify("moving"))
    assert before is not None
    assert after is not None
    assert (before.digest, after.digest) == (old.id, new.id)
    assert before.slot != after.slot
    assert close(computed(before), lab.alone(old))
    assert close(computed(after), lab.alone(new))
    lab.registry.tag(old.reference, "live")
    assert host.identify("moving@live") == old
    assert host.seat(host.identify("moving@live")) == before
    for seat in (before, before, after):
        host.release(seat)


def test_what_cannot_be_used_is_refused_before_it_is_seated(
    lab: Lab, fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    host = fleet()
    with pytest.raises(AdapterNotFound):
        host.identify("nobody")
    with pytest.raises(TuningError, match="init_lora_weights"):
        host.identify(lab.lora("pissa", 3, init_lora_weights="pissa").reference)
    spoilt = lab.lora("spoilt-config", 3)
    damage(spoilt.path / "adapter_config.json")
    with pytest.raises(AdapterDamaged):
        host.identify("spoilt-config")
    assert host.statistics().resident == ()


def test_another_base_is_refused_or_written_down(lab: Lab, tmp_path: Path) -> None:
    other = load_backbone(
        BaseSpec(source=str(write_base(tmp_path / "other", seed=1, num_hidden_layers=1))),
        QuantSpec(bits=32, device="cpu"),
        tmp_path / "cache",
    )
    version, events = lab.registry.resolve("a0"), list[Event]()
    with pytest.raises(BaseMismatch):
        Fleet(other, lab.registry.resolve).identify("a0")
    host = Fleet(other, lab.registry.resolve, other_base=True, report=events.append)
    for _ in range(2):
        host.identify("a0")
    assert len(host.receipts) == 1
    assert version.reference in str(host.receipts[0])
    assert len([event for event in events if isinstance(event, Warned)]) == 1, "it is looked at once"
    expected = logits(reload(skeleton(other.model), version.path))
    assert close(asked(host, "a0"), expected)


def test_names_are_looked_up_from_other_threads_while_seats_are_given(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    host, wrong, stop = fleet(slots=2), list[BaseException](), threading.Event()

    def look() -> None:
        draw = random.Random(0)
        try:
            while not stop.is_set():
                name = f"a{draw.randrange(6)}"
                assert host.identify(name) == lab.registry.resolve(name)
                host.statistics()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(30):
            asked(host, f"a{i % 6}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


# --- those that no bank holds ---


def own_models(lab: Lab, folder: Path) -> dict[str, Version]:
    bare = lab.backbone().model
    methods = {"ia3": "IA3", "prompts": "PROMPT_TUNING", "rotation": "OFT"}
    found = {
        name: lab.publish(name, save_method(skeleton(bare), method, folder / name)) for name, method in methods.items()
    }
    dora = save_method(skeleton(bare), "LORA", folder / "dora-saved", use_dora=True)
    norm = save_tensors(folder / "norm-saved", {"model.norm.weight": torch.linspace(0.5, 2, 64)})
    return found | {"scaled": lab.publish("scaled", dora), "norm": lab.publish("norm", norm, "tensors")}


def alone_or_norm(lab: Lab, version: Version) -> torch.Tensor:
    if version.manifest.kind == "peft":
        return lab.alone(version)
    model = skeleton(lab.backbone().model)
    model.model.norm.weight = torch.nn.Parameter(torch.linspace(0.5, 2, 64), requires_grad=False)
    return logits(model)


def test_what_no_bank_holds_has_a_model_of_its_own(lab: Lab, fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    host, versions = fleet(slots=2), own_models(lab, tmp_path)
    asked(host, "a0")
    for name, version in versions.items():
        seat = host.seat(host.identify(name))
        assert seat is not None
        assert isinstance(seat.model, Alone)
        assert getattr(seat.model.model, "begins_with_virtual_tokens", False) == (name == "prompts")
        assert torch.equal(computed(seat), alone_or_norm(lab, version)), name
        host.release(seat)
    assert names(host) == ["a0", *list(versions)[-2:]], "they have no slots, and are two at most themselves"
    assert len(host.statistics().alone) == 2
    assert close(asked(host, "a0"), lab.alone(lab.registry.resolve("a0")))


def test_models_of_their_own_are_counted_within_the_memory(
    lab: Lab, fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    versions = own_models(lab, tmp_path)
    norm = 64 * 4
    host = fleet(slots=4, memory=bytes_of(lab, 2) + norm)
    asked(host, "a0")
    asked(host, "norm")
    assert host.statistics().bytes == bytes_of(lab, 2) + norm
    assert names(host) == ["a0", "norm"]
    asked(host, "prompts")  # 4 · 64 numbers, four times the norm; a0 is larger and must go
    assert names(host) == ["norm", "prompts"]
    assert host.statistics().bytes == 5 * norm
    seat = host.seat(host.identify("prompts"))
    tight = fleet(slots=4, memory=norm)
    with pytest.raises(TuningError, match=rf"prompts@\w+ and .* take {4 * norm} bytes, and adapters may take {norm}"):
        tight.seat(tight.identify("prompts"))
    assert tight.statistics().resident == ()
    assert torch.equal(asked(tight, "norm"), alone_or_norm(lab, versions["norm"]))
    assert seat is not None
    host.release(seat)


def test_files_that_fit_neither_way_say_why(lab: Lab, fleet: Callable[..., Fleet]) -> None:
    folder = lab.payload("short", 5)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "v_proj" not in name}, folder / WEIGHTS)
    lab.publish("short", folder)
    host = fleet(slots=2)
    asked(host, "a0")
    with pytest.raises(TuningError, match="is needed and not stored"):
        host.seat(host.identify("short"))
    assert names(host) == ["a0"]
