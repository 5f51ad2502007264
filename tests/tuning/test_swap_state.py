"""1,000 random steps with faults: whatever happens, each adapter computes what it computed alone, the base its own."""

from __future__ import annotations

import gc
import hashlib
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tuning.method_zoo import reload, save_method, save_tensors

from peftkit.backbone.contain import base_tensors
from peftkit.errors import AdapterDamaged, BaseMismatch, TuningError
from peftkit.tuning import resident, skeleton
from peftkit.tuning.attach import Attached

IDS = torch.tensor([[1, 40, 50, 60, 70, 80]])
GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LORA", {"seed": 1}),
    "plain-2": ("LORA", {"seed": 2}),
    "dora": ("LORA", {"seed": 3, "use_dora": True, "target_modules": "all-linear"}),
    "saved": ("LORA", {"seed": 4, "modules_to_save": ["norm"]}),
    "ia3": ("IA3", {"seed": 5}),
    "oft": ("OFT", {"seed": 6}),
    "prompt": ("PROMPT_TUNING", {"seed": 7}),
}
TENSORS = {
    "embedding": {"model.embed_tokens.weight": (259, 64)},
    "layer": {"model.layers.0.self_attn.q_proj.weight": (64, 64), "model.norm.weight": (64,)},
}

STEPS = ("attach", "attach", "activate", "activate", "using", "detach", "detach", "bad", "unknown", "interrupt")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[:, -IDS.shape[1] :]


def base_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def live_bytes() -> int:
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(sizes.values())


@dataclass
class World:
    """Published versions, what the good ones compute alone, and what the bad ones must raise."""

    good: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, tuple[Any, type[Exception]]] = field(default_factory=dict)
    expected: dict[str | None, torch.Tensor] = field(default_factory=dict)


@pytest.fixture
def world(
    load: Callable[..., Any], publish: Callable[..., Any], make_base: Callable[..., Path], tmp_path: Path
) -> World:
    """The expected logits come from PEFT's own loader, or from setting the tensors, in a backbone of their own."""
    world, bare = World(expected={None: logits(load(bits=4).model)}), load(bits=32).model
    for name, (method, settings) in GOOD.items():
        folder = save_method(skeleton.skeleton(bare), method, tmp_path / name, **settings)
        world.good[name] = publish(name, folder)
        world.expected[name] = logits(reload(load(bits=4).model, folder))
    for name, shapes in TENSORS.items():
        tensors = {key: 0.1 * torch.randn(shape, generator=torch.manual_seed(8)) for key, shape in shapes.items()}
        world.good[name] = publish(name, save_tensors(tmp_path / name, tensors), "tensors")
        world.expected[name] = logits(_with(load(bits=4).model, tensors))
    _add_bad(world, publish, tmp_path, make_base(tmp_path / "other", seed=1))
    return world


def _with(model: Any, tensors: dict[str, torch.Tensor]) -> Any:
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if "proj" in name:
            linear = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], linear)
        for place in (path, "lm_head") if "embed" in name else (path,):
            model.get_submodule(place).weight = torch.nn.Parameter(tensor, requires_grad=False)
    return model


def _add_bad(world: World, publish: Callable[..., Any], tmp_path: Path, other: Path) -> None:
    lora = tmp_path / "plain"
    stored = load_file(lora / "adapter_model.safetensors")
    first = sorted(stored)[0]
    spoilt = {
        "nan": {**stored, first: torch.full_like(stored[first], float("nan"))},
        "narrow": {**stored, first: stored[first][:, :8].contiguous()},
        "missing": {name: tensor for name, tensor in stored.items() if name != first},
        "of-the-base": {**stored, "base_model.model.model.norm.weight": torch.zeros(64)},
    }
    for name, tensors in spoilt.items():
        folder = tmp_path / f"bad-{name}"
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
        save_file(tensors, folder / "adapter_model.safetensors")
        world.bad[name] = publish(name, folder), TuningError
    world.bad["elsewhere"] = publish("elsewhere", lora, base=other), BaseMismatch
    damaged = publish("damaged", lora)
    path = damaged.path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    world.bad["damaged"] = damaged, AdapterDamaged


class Interrupt:
    """Raise KeyboardInterrupt at the n-th call or return inside the block, as Ctrl-C could.

    No garbage is collected meanwhile: Python swallows what is raised inside a destructor.
    """

    def __init__(self, after: int) -> None:
        self.left = after

    def __enter__(self) -> None:
        gc.disable()
        sys.setprofile(self._count)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        gc.enable()

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        self.left -= 1
        if self.left == 0:
            sys.setprofile(None)
            raise KeyboardInterrupt


def walk(host: Attached, world: World, steps: int, seed: int) -> dict[str, int]:
    """Random steps beside a model of what must hold; returns how often each was taken."""
    draw, attached, active, taken = random.Random(seed), dict[str, Any](), None, dict[str, int]()
    before = base_hash(host.backbone.model)
    for step in range(steps):
        name = draw.choice(sorted(world.good))
        kind = draw.choice(
            ["attach", "attach", "activate", "activate", "using", "detach", "bad", "unknown", "interrupt"]
        )
        taken[kind] = taken.get(kind, 0) + 1
        if kind == "attach":
            assert host.attach(world.good[name]) == name
            attached[name] = world.good[name].id
        elif kind == "activate":
            active = draw.choice([None, *sorted(attached)])
            host.activate(active)
        elif kind == "using":
            inner = draw.choice([None, *sorted(attached)])
            with pytest.raises(ZeroDivisionError), host.using(inner) as model:
                assert torch.equal(logits(model), world.expected[inner]), f"step {step}: {inner} inside using"
                raise ZeroDivisionError
        elif kind == "detach" and attached:
            gone = draw.choice(sorted(attached))
            host.detach(gone)
            del attached[gone]
            active = None if active == gone else active
        elif kind == "bad":
            version, error = world.bad[draw.choice(sorted(world.bad))]
            with pytest.raises(error):
                host.attach(version)
        elif kind == "unknown":
            for call in (host.activate, host.detach):
                with pytest.raises(TuningError, match="no adapter named"):
                    call("nobody")
        elif kind == "interrupt":
            attached, active = _interrupted(host, world.good[name], draw, attached, active)
        assert host.active == active, f"step {step}: {kind}"
        assert {key: version.id for key, version in host.versions.items()} == attached, f"step {step}: {kind}"
        assert torch.equal(logits(host.model), world.expected[active]), f"step {step}: {active} after {kind}"
        if step % 50 == 49:
            assert base_hash(host.backbone.model) == before, f"step {step}: the base changed"
    assert base_hash(host.backbone.model) == before, "the base changed"
    return taken


def _interrupted(
    host: Attached, version: Any, draw: random.Random, attached: dict[str, Any], active: str | None
) -> tuple[dict[str, Any], str | None]:
    """Interrupt an attach, a swap or a detach somewhere; afterwards it has happened or it has not."""
    after: list[tuple[dict[str, Any], str | None]] = [(attached, active)]
    goal = draw.choice(sorted(attached)) if attached else None
    call, most = draw.choice([("attach", 30_000), ("attach", 3_000), ("activate", 8), ("detach", 200)])
    if call == "attach":
        after.append(({**attached, version.name: version.id}, active))
    elif call == "activate":
        after.append((attached, goal))
    elif goal is not None:
        left = {name: digest for name, digest in attached.items() if name != goal}
        after.append((left, None if active == goal else active))
    try:
        with Interrupt(draw.randrange(1, most)):
            if call == "attach":
                host.attach(version)
            elif call == "activate":
                host.activate(goal)
            elif goal is not None:
                host.detach(goal)
    except KeyboardInterrupt:
        pass
    found = {name: version.id for name, version in host.versions.items()}, host.active
    assert found in after, f"{call} was interrupted"
    return found


def test_a_thousand_steps(load: Callable[..., Any], world: World) -> None:
    backbone = load(bits=4)
    before = live_bytes()
    host = Attached(backbone)
    taken = walk(host, world, 1000, seed=20)
    assert all(count > 50 for count in taken.values()), taken
    assert live_bytes() > before or not host.versions
    for name in list(host.versions):
        host.detach(name)
    assert live_bytes() == before
    assert torch.equal(logits(host.model), world.expected[None])


def _no_skeleton(model: Any) -> Any:
    return model


def _half_filled(self: Any, backbone: Any, stored: Any, build: Any = resident.Spares.build) -> Any:
    spare = self._spares.get(resident._key(stored))
    built = build(self, backbone, stored)
    if spare is not None:
        held, key = next(iter(built.slots.values()))
        held[key] = torch.nn.Parameter(torch.zeros(held[key].shape), requires_grad=False)
    return built


def _unchecked(needed: Any, stored: Any, version: Any) -> Any:
    return {name: tensor for name, tensor in stored.items() if name in needed}


BUGS = {
    "adapters go into the running model": (resident, "skeleton", _no_skeleton),
    "one tensor of a spare is not set": (resident.Spares, "build", _half_filled),
    "tensors are not checked": (resident, "fitted", _unchecked),
    "layers are shared": (skeleton, "_twin_of_layer", _no_skeleton),
}


def test_planted_bugs_are_caught(load: Callable[..., Any], world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for planted in BUGS.values():
        with monkeypatch.context() as patch:
            patch.setattr(*planted)
            with pytest.raises((AssertionError, pytest.fail.Exception, TuningError)):
                walk(Attached(load(bits=4)), world, 300, seed=21)


def test_tensors_that_stay_are_noticed(load: Callable[..., Any], world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_without_data", lambda tensor: tensor)
    host = Attached(load(bits=4))
    before = live_bytes()
    host.attach(world.good["plain"])
    host.detach("plain")
    assert live_bytes() > before
