"""What lies on the disk is what was computed, or it is made anew; and the trunk's memory is gone, and comes back."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trunk_bases import BLOCKS, WRITERS

from peftkit.backbone.contain import base_tensors, quantized_linears
from peftkit.data.chat import Example
from peftkit.errors import TrainingError
from peftkit.events import Decision, Event, Progress, Warned
from peftkit.training.holdings import held
from peftkit.training.schedule import schedule
from peftkit.training.spec import TrainSpec
from peftkit.training.trunk.cached import cached_trunk
from peftkit.training.trunk.passes import training_passes
from peftkit.training.trunk.store import TrunkStore, require_room
from peftkit.tuning.tuned import Tuned

Make = Callable[..., Tuned]
Rows = Callable[..., list[Example]]

LENGTHS = (5, 9, 12, 7)
LORA = {"method": "lora", "layers": "top:2"}
PLAIN = {**LORA, "bits": 32}


@pytest.fixture(scope="session")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama base of four blocks."""
    folder = tmp_path_factory.mktemp("four-blocks") / "llama"
    WRITERS["llama"](folder)
    return folder


def make(
    tuned: Tuned, rows: list[Example], cache: Path, *, batch: int = 2, seed: int = 0, report: Any = None
) -> list[Event]:
    """Make a run's cache, or take the one that is there; what was reported."""
    events: list[Event] = []
    plan = schedule(rows, TrainSpec(num_train_epochs=1, per_device_train_batch_size=batch, seed=seed))
    with cached_trunk(tuned, training_passes(rows, plan, batch * max(LENGTHS)), cache, None, report or events.append):
        pass
    return events


def how(events: list[Event]) -> str:
    return next(event.choice for event in events if isinstance(event, Decision) and event.what == "trunk cache")


def files(cache: Path) -> dict[str, bytes]:
    found = (path for path in (cache / "trunk").rglob("*") if path.is_file())
    return {str(path.relative_to(cache / "trunk")): path.read_bytes() for path in found}


# -- the key


def test_a_cache_is_used_again_only_for_the_same_states(
    tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path
) -> None:
    other_base = tmp_path / "other"
    shutil.copytree(four_blocks, other_base)
    first = tuned(four_blocks, **PLAIN)
    assert how(make(first, rows(LENGTHS), tmp_path)).startswith("made, 8,448 bytes")  # 33 tokens of 64 float32
    one_id = rows(LENGTHS)
    one_id[2].input_ids[-1] ^= 1
    weights = next(other_base.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    variants: dict[str, Callable[[], list[Event]]] = {
        "rows": lambda: make(first, one_id, tmp_path),
        "order": lambda: make(first, rows(LENGTHS), tmp_path, seed=1),
        "batch": lambda: make(first, rows(LENGTHS), tmp_path, batch=3),
        "trained": lambda: make(tuned(four_blocks, bits=32, layers="top:1"), rows(LENGTHS), tmp_path),
        "base": lambda: make(tuned(other_base, **PLAIN), rows(LENGTHS), tmp_path),
        "compute": lambda: make(tuned(four_blocks, bits=4, compute_dtype="bfloat16", **LORA), rows(LENGTHS), tmp_path),
        "bits": lambda: make(tuned(four_blocks, bits=4, **LORA), rows(LENGTHS), tmp_path),
        "quant": lambda: make(tuned(four_blocks, bits=4, double_quant=False, **LORA), rows(LENGTHS), tmp_path),
    }
    for name, variant in variants.items():
        assert how(variant()).startswith("made"), name
    assert len(TrunkStore(tmp_path).kept()) == len(variants) + 1
    another_adapter = tuned(four_blocks, **PLAIN, seed=3)  # what is trained is no part of the trunk
    assert how(make(another_adapter, rows(LENGTHS), tmp_path)).startswith("used again, 8,448 bytes")


def test_frozen_layers_that_are_not_the_bases_make_another_key(
    tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path
) -> None:
    """A stale key: the base's fingerprint is the same, and the trunk computes something else."""
    model = tuned(four_blocks, **PLAIN)
    make(model, rows(LENGTHS), tmp_path)
    changed = tuned(four_blocks, bits=32, method="top_layers", top_layers=2, train_head=False)
    block = changed.inner.model.layers[0]
    block.mlp.down_proj.weight = torch.nn.Parameter(block.mlp.down_proj.weight * 1.001, requires_grad=False)
    assert how(make(changed, rows(LENGTHS), tmp_path)).startswith("made")


# -- the files


@pytest.mark.parametrize("damage", ["one bit", "truncated", "longer", "no head", "broken head", "other key"])
def test_a_file_that_is_not_what_was_written_is_made_anew(
    tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path, damage: str
) -> None:
    model = tuned(four_blocks, **LORA)
    make(model, rows(LENGTHS), tmp_path)
    before = files(tmp_path)
    folder = TrunkStore(tmp_path).kept()[0].path
    states, head = folder / "states", folder / "trunk.json"
    data = bytearray(states.read_bytes())
    if damage == "one bit":
        data[5000] ^= 1
        states.write_bytes(data)
    elif damage == "truncated":
        states.write_bytes(data[:-1])
    elif damage == "longer":
        states.write_bytes(data + b"\0")
    elif damage == "no head":
        head.unlink()
    elif damage == "broken head":
        head.write_bytes(head.read_bytes()[:-9])
    else:
        record = json.loads(head.read_text())
        record["ingredients"]["blocks"] = 1
        head.write_text(json.dumps(record))
    events = make(model, rows(LENGTHS), tmp_path)
    assert how(events).startswith("made")
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert len(warned) == 1
    assert "is not what was written" in warned[0]
    assert files(tmp_path) == before


def test_an_interrupted_fill_leaves_nothing(tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path) -> None:
    model = tuned(four_blocks, **LORA)

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(model, rows(LENGTHS), tmp_path, report=interrupt)
    assert TrunkStore(tmp_path).kept() == []
    draft = tmp_path / "trunk" / f"{'0' * 32}.new"  # of a process that was killed
    draft.mkdir()
    (draft / "states").write_bytes(b"half")
    draft.with_suffix(".lock").touch()
    assert how(make(model, rows(LENGTHS), tmp_path)).startswith("made")
    assert not draft.exists()


def test_hidden_states_are_for_the_user_alone(tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path) -> None:
    make(tuned(four_blocks, **LORA), rows(LENGTHS), tmp_path)
    assert stat.S_IMODE((tmp_path / "trunk").stat().st_mode) == 0o700


def test_a_disk_without_room_is_an_error_before_training(tmp_path: Path) -> None:
    room = shutil.disk_usage(tmp_path).total
    require_room(tmp_path, 1, "the trunk cache")
    with pytest.raises(TrainingError, match=rf"the trunk cache takes {room + 1:,} bytes, and .* has [\d,]+ left"):
        require_room(tmp_path, room + 1, "the trunk cache")


@pytest.mark.parametrize("short", ["states", "released trunk"])
def test_nothing_is_computed_where_the_disk_has_no_room_for_both(
    tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    states = 33 * 64 * 4
    usage = shutil.disk_usage(tmp_path)._replace(free=states - 1 if short == "states" else states + 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    said: list[Event] = []
    with pytest.raises(TrainingError, match="the trunk cache with the released trunk's weights beside it takes"):
        make(tuned(four_blocks, **LORA), rows(LENGTHS), tmp_path, report=said.append)
    assert not any(isinstance(event, Progress) for event in said)
    assert TrunkStore(tmp_path).kept() == []


def test_caches_are_listed_and_removed(tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path) -> None:
    store, model = TrunkStore(tmp_path), tuned(four_blocks, **LORA)
    assert store.kept() == store.remove() == []
    make(model, rows(LENGTHS), tmp_path)
    (kept,) = store.kept()
    assert kept.ingredients["base"] == model.backbone.identity.fingerprint
    assert kept.ingredients["blocks"] == 2
    assert kept.bytes > 8448
    assert store.remove() == [kept]
    assert files(tmp_path) == {}


# -- memory


def storages(modules: Any) -> dict[int, torch.UntypedStorage]:
    found = (tensor.untyped_storage() for module in modules for tensor in held(module))
    return {storage._cdata: storage for storage in found}


@pytest.mark.parametrize(("bits", "per_weight"), [(4, 0.5), (8, 1.0)])
def test_the_trunks_memory_is_gone_and_comes_back(
    tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path, bits: int, per_weight: float
) -> None:
    model = tuned(four_blocks, bits=bits, **LORA)
    blocks = model.inner.model.layers
    codes = sum(layer.in_features * layer.out_features for layer in quantized_linears(blocks[:2]).values()) * per_weight
    assert codes == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) * per_weight
    base = {name: tensor.clone() for name, tensor in base_tensors(model.backbone.model).items()}
    ids = torch.tensor([rows((9,))[0].input_ids])
    with torch.no_grad():
        logits = model.model(input_ids=ids).logits
    trunk, above = storages(blocks[:2]), storages(blocks[2:])
    shared = trunk.keys() & above.keys()  # the table of the 4-bit code, for one
    sizes = {key: storage.nbytes() for key, storage in trunk.items()}
    examples = rows(LENGTHS)
    passes = training_passes(examples, schedule(examples, TrainSpec(num_train_epochs=1)), 8 * max(LENGTHS))

    with pytest.raises(KeyboardInterrupt), cached_trunk(model, passes, tmp_path, None, lambda event: None) as top:
        freed = {key for key, storage in trunk.items() if storage.nbytes() == 0}
        assert not freed & shared
        assert codes <= sum(sizes[key] for key in freed) < 2 * codes
        assert all(storage.nbytes() for storage in above.values())
        assert not freed & storages([top.model]).keys()
        for whole in (model.model, model.backbone.model):
            with pytest.raises(TrainingError, match="the whole model was called"):
                whole(input_ids=ids)
        raise KeyboardInterrupt  # training ends in some other way than by its last step

    assert {key: storage.nbytes() for key, storage in trunk.items()} == sizes
    now = base_tensors(model.backbone.model)
    assert [name for name in base if not torch.equal(base[name], now[name])] == []
    with torch.no_grad():
        assert torch.equal(model.model(input_ids=ids).logits, logits)


def test_the_top_shares_what_is_trained_and_holds_no_block_below(
    tuned: Make, rows: Rows, tmp_path: Path, four_blocks: Path
) -> None:
    model = tuned(four_blocks, **LORA)
    examples = rows(LENGTHS)
    passes = training_passes(examples, schedule(examples, TrainSpec(num_train_epochs=1)), 8 * max(LENGTHS))
    with cached_trunk(model, passes, tmp_path, None, lambda event: None) as top:
        assert all(top.trainable[name] is parameter for name, parameter in model.trainable.items())
        layers = top.inner.model.layers
        assert len(layers) == BLOCKS
        assert [sum(p.numel() for p in layer.parameters()) > 0 for layer in layers] == [False, False, True, True]
        with pytest.raises(TrainingError, match="called without input_ids and attention_mask"):
            top.model(inputs_embeds=torch.zeros(1, 2, 64))
    assert replace(top, model=model.model) == model
