"""Attach, swap, detach: the base is bitwise what it was, and what does not fit changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.backbone.contain import base_tensors
from peftkit.errors import AdapterDamaged, BaseMismatch, PeftkitError, TuningError
from peftkit.events import Warned
from peftkit.tuning.attach import Attached, attach, open_adapters, resume_adapter
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec

IDS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 91, 92, 93, 94]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def picture(host: Attached) -> dict[str, Any]:
    """Everything about a host that a failed or undone operation must leave as it was."""
    model = host.backbone.model
    return {
        "active": host.active,
        "versions": sorted(host.versions),
        "types": {name: type(module).__name__ for name, module in model.named_modules()},
        "class": type(host.model).__name__,
        "tensors": {name: tensor.clone() for name, tensor in base_tensors(model).items()},
        "all": sorted(name for name, _ in model.named_parameters()),
        "peft_config": sorted(getattr(model, "peft_config", {})),
        "grad": sorted(name for name, p in model.named_parameters() if p.requires_grad),
        "training": model.training,
        "logits": logits(host.model),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    tensors = before["tensors"].keys() != after["tensors"].keys() or any(
        not torch.equal(tensor, after["tensors"][name]) for name, tensor in before["tensors"].items()
    )
    found = [key for key in before if key not in ("tensors", "logits") and before[key] != after[key]]
    found += ["tensors"] if tensors else []
    return found + ([] if torch.equal(before["logits"], after["logits"]) else ["logits"])


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_swapping_back_is_bit_identical(
    load: Callable[..., Any], adapter: Callable[..., Any], bits: int, method: str
) -> None:
    backbone = load(bits=bits)
    logits(backbone.model)  # int8 layers move their weights at the first forward
    base = logits(backbone.model)
    host = attach(backbone, adapter("a", seed=1, bits=bits), adapter("b", seed=2, bits=bits, method=method))
    assert host.active == "a"
    first = logits(host.model)
    host.activate("b")
    second = logits(host.model)
    host.activate("a")
    assert torch.equal(logits(host.model), first)
    host.activate("b")
    assert torch.equal(logits(host.model), second)
    host.activate(None)
    assert torch.equal(logits(host.model), base)
    assert not any(torch.allclose(x, y) for x, y in [(first, second), (first, base), (second, base)])


@pytest.mark.parametrize("bits", [4, 8])
def test_swapping_changes_no_byte_of_the_base(load: Callable[..., Any], adapter: Callable[..., Any], bits: int) -> None:
    host = attach(load(bits=bits), adapter("a", seed=1, bits=bits), adapter("b", seed=2, bits=bits))
    logits(host.model)
    before = {name: tensor.clone() for name, tensor in base_tensors(host.backbone.model).items()}
    for name in ("b", None, "a", "b", "a", None):
        host.activate(name)
        logits(host.model)
    after = base_tensors(host.backbone.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_alone_or_beside_others_an_adapter_computes_the_same(
    load: Callable[..., Any], adapter: Callable[..., Any]
) -> None:
    a, b = adapter("a", seed=1), adapter("b", seed=2, target_modules=["q_proj"])
    alone = {version.name: logits(attach(load(bits=4), version).model) for version in (a, b)}
    for order in ((a, b), (b, a)):
        host = attach(load(bits=4), *order)
        for name in ("a", "b"):
            host.activate(name)
            assert torch.equal(logits(host.model), alone[name])


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_detaching_all_gives_the_base_its_own_layers_back(
    load: Callable[..., Any], adapter: Callable[..., Any], bits: int
) -> None:
    host = Attached(load(bits=bits))
    logits(host.model)
    before = picture(host)
    first, second = adapter("a", seed=1, bits=bits), adapter("b", seed=2, bits=bits, method="dora")
    for order in (("a", "b"), ("b", "a")):
        host.attach(first)
        host.attach(second)
        host.activate("a")
        for name in order:
            host.detach(name)
        assert differences(before, picture(host)) == []
    host.attach(second)
    host.activate("b")
    assert not torch.allclose(logits(host.model), before["logits"])


@pytest.mark.parametrize("active", ["a", "b", None])
@pytest.mark.parametrize("gone", ["a", "b"])
def test_detaching_one_leaves_the_other_as_it_was(
    load: Callable[..., Any], adapter: Callable[..., Any], active: str | None, gone: str
) -> None:
    backbone = load(bits=4)
    base = logits(backbone.model)
    host = attach(backbone, adapter("a", seed=1), adapter("b", seed=2))
    expected = {None: base}
    for name in ("a", "b"):
        host.activate(name)
        expected[name] = logits(host.model)
    host.activate(active)
    host.detach(gone)
    kept = "b" if gone == "a" else "a"
    assert host.active == (None if active == gone else active)
    assert list(host.versions) == [kept]
    assert torch.equal(logits(host.model), expected[host.active])
    host.activate(kept)
    assert torch.equal(logits(host.model), expected[kept])
    host.activate(None)
    assert torch.equal(logits(host.model), base)


def test_nothing_is_active_or_trainable_until_asked(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    backbone = load(bits=4)
    base = logits(backbone.model)
    host = Attached(backbone)
    assert host.attach(adapter()) == "tickets"
    assert host.active is None
    assert torch.equal(logits(host.model), base)
    host.activate("tickets")
    assert not any(parameter.requires_grad for parameter in host.model.parameters())
    assert not host.model.training


@pytest.mark.parametrize("name", ["x-1", "7", "a-b-2", "lora_a", "my-default", "base-layer", "weight", "0-0"])
def test_adapter_names(load: Callable[..., Any], adapter: Callable[..., Any], name: str) -> None:
    version = adapter(name)
    backbone = load(bits=4)
    base = logits(backbone.model)
    host = attach(backbone, version, adapter("other", seed=2))
    with_adapter = logits(host.model)
    assert not torch.allclose(with_adapter, base)
    expected = attach(load(bits=4), adapter("plain", seed=1))
    assert torch.equal(with_adapter, logits(expected.model))
    host.detach("other")
    assert torch.equal(logits(host.model), with_adapter)


def test_names_that_look_alike_stay_apart(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    names = ["a-b", "a_b", "a_dash_b", "a-dash-b"]
    versions = [adapter(name, seed=i) for i, name in enumerate(names)]
    alone = [logits(attach(load(bits=4), version).model) for version in versions]
    host = attach(load(bits=4), *versions)
    for name, expected in zip(names, alone, strict=True):
        host.activate(name)
        assert torch.equal(logits(host.model), expected), name


def test_the_same_version_under_two_names(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    version = adapter()
    host = attach(load(bits=4), version)
    expected = logits(host.model)
    assert host.attach(version, "again.v2") == "again.v2"
    host.activate("again.v2")
    assert torch.equal(logits(host.model), expected)
    assert host.attach(version) == "tickets"


def test_attaching_twice_is_attaching_once(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    version = adapter()
    host = attach(load(bits=4), version)
    before, model = picture(host), host.model
    shutil.rmtree(version.path)  # identity is the digest: nothing is read again
    assert host.attach(version) == "tickets"
    assert differences(before, picture(host)) == []
    assert host.model is model


def test_another_version_under_the_same_name_is_refused(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    host = attach(load(bits=4), adapter(seed=1))
    before = picture(host)
    with pytest.raises(TuningError, match="already attached under the name 'tickets'"):
        host.attach(adapter(seed=2))
    assert differences(before, picture(host)) == []


def test_a_model_stays_its_adapters_after_a_swap(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    host = attach(load(bits=4), adapter("a", seed=1), adapter("b", seed=2))
    first = host.model
    expected = logits(first)
    host.activate("b")
    assert torch.equal(logits(first), expected)
    assert not torch.equal(logits(host.model), expected)
    assert not torch.equal(logits(host.backbone.model), expected)


def test_a_detached_model_cannot_be_called_and_its_parts_serve_the_next(
    load: Callable[..., Any], adapter: Callable[..., Any]
) -> None:
    host = attach(load(bits=4), adapter("a", seed=1))
    gone, inner = host.model, host.model.get_base_model()
    host.detach("a")
    host.activate(host.attach(adapter("b", seed=2)))
    assert host.model.get_base_model() is inner
    assert torch.equal(logits(host.model), logits(attach(load(bits=4), adapter("plain", seed=2)).model))
    with pytest.raises(AttributeError):
        logits(gone)


def test_what_was_hashed_is_what_is_loaded(
    load: Callable[..., Any], adapter: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are swapped for others at every moment after the first look: the digest is of the bytes in use."""
    from peftkit.tuning import stored

    backbone, wanted, other = load(bits=4), adapter("a", seed=1), adapter("b", seed=2)
    expected = logits(attach(backbone, wanted).model)

    def swap() -> None:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (wanted.path / name).chmod(0o644)
            (wanted.path / name).write_bytes((other.path / name).read_bytes())

    def late(version: Any, read: Any = stored.read) -> Any:
        found = read(version)
        swap()
        return found

    with monkeypatch.context() as patch:
        patch.setattr("peftkit.tuning.attach.read", late)
        assert torch.equal(logits(attach(backbone, wanted).model), expected)
    # The header is that of the manifest, the size too: only the digest can tell.
    with pytest.raises(AdapterDamaged, match="digest"):
        attach(backbone, wanted)


def test_unknown_names(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    host = attach(load(bits=4), adapter("a"), adapter("b", seed=2))
    before = picture(host)
    for call in (lambda: host.activate("c"), lambda: host.detach("c")):
        with pytest.raises(TuningError, match="'c' is attached"):
            call()
    assert differences(before, picture(host)) == []


# -- using


def test_using_returns_to_what_was_active(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    host = attach(load(bits=4), adapter("a"), adapter("b", seed=2))
    before = picture(host)
    with host.using("b") as model, host.using(None):
        assert host.active is None
    assert model is not host.model
    with pytest.raises(KeyError, match="inside"), host.using("b"):
        raise KeyError("inside")
    with pytest.raises(TuningError, match="no adapter named"), host.using("c"):
        pytest.fail("must not be entered")
    assert differences(before, picture(host)) == []


def test_using_when_the_block_detaches_what_was_active(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    host = attach(load(bits=4), adapter("a"), adapter("b", seed=2))
    with host.using("b"):
        host.detach("a")
    assert host.active is None


# -- what does not fit


def rewrite(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return edit


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


def wrong_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, first(tensors): torch.zeros(4, 8)}


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.T.contiguous() for name, tensor in tensors.items()}


def missing(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != first(tensors)}


def extra(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, first(tensors).replace("layers.0", "layers.9"): tensors[first(tensors)].clone()}


def not_finite(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    spoilt = tensors[first(tensors)].clone()
    spoilt[0, 0] = float("nan")
    return {**tensors, first(tensors): spoilt}


def infinite(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    spoilt = tensors[first(tensors)].clone()
    spoilt[0, 0] = float("-inf")
    return {**tensors, first(tensors): spoilt}


def none(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {}


def config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        content = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return edit


MISFITS = {
    "wrong shape": rewrite(wrong_shape),
    "transposed": rewrite(transposed),
    "missing tensor": rewrite(missing),
    "extra tensor": rewrite(extra),
    "NaN": rewrite(not_finite),
    "infinite": rewrite(infinite),
    "no tensors": rewrite(none),
    "r of another adapter": config(r=8),
    "r is text": config(r="four"),
    "r is negative": config(r=-1),
    "no method": config(peft_type=...),
    "unknown method": config(peft_type="SORCERY"),
    "another method": config(peft_type="IA3"),
    "no target": config(target_modules=["c_attn"]),
    "other targets": config(target_modules=["q_proj"]),
    "more targets": config(target_modules="all-linear", modules_to_save=["norm"]),
    "targets are a number": config(target_modules=3),
    "another task": config(task_type="SEQ_CLS"),
    "PiSSA rewrites the base": config(init_lora_weights="pissa"),
    "OLoRA rewrites the base": config(init_lora_weights="olora"),
    "trains the base's biases": config(bias="all"),
    "targets are a pattern": config(target_modules="(a+)+$"),
}


@pytest.mark.parametrize("beside", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("misfit", sorted(MISFITS))
def test_a_failed_attach_changes_nothing(
    load: Callable[..., Any], adapter: Callable[..., Any], misfit: str, beside: bool
) -> None:
    host = attach(load(bits=4), adapter("good", seed=5)) if beside else Attached(load(bits=4))
    before = picture(host)
    bad = adapter("bad", seed=6, change=MISFITS[misfit])
    with pytest.raises(PeftkitError):
        host.attach(bad)
    assert differences(before, picture(host)) == []
    host.attach(adapter("better", seed=7))
    host.activate("better")
    assert torch.equal(logits(host.model), logits(attach(load(bits=4), adapter("plain", seed=7)).model))


@pytest.mark.parametrize("beside", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("damage", ["flipped byte", "cut", "gone", "edited config"])
def test_a_damaged_version_changes_nothing(
    load: Callable[..., Any], adapter: Callable[..., Any], damage: str, beside: bool
) -> None:
    host = attach(load(bits=4), adapter("good", seed=5)) if beside else Attached(load(bits=4))
    before = picture(host)
    bad = adapter("bad", seed=6)
    path = bad.path / "adapter_model.safetensors"
    content = path.read_bytes()
    if damage == "edited config":
        config(lora_alpha=1000)(bad.path)
    elif damage == "gone":
        path.unlink()
    else:
        path.chmod(0o644)
        spoilt = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes(content[:-100] if damage == "cut" else spoilt)
    with pytest.raises(AdapterDamaged, match="bad@"):
        host.attach(bad)
    assert differences(before, picture(host)) == []


@pytest.mark.parametrize("beside", [False, True], ids=["first", "second"])
def test_an_adapter_of_another_base_changes_nothing(
    load: Callable[..., Any],
    adapter: Callable[..., Any],
    make_base: Callable[..., Path],
    tmp_path: Path,
    beside: bool,
) -> None:
    other = make_base(tmp_path / "other", seed=1)
    host = attach(load(bits=4), adapter("good", seed=5)) if beside else Attached(load(bits=4))
    before = picture(host)
    with pytest.raises(BaseMismatch, match="differs in: weights"):
        host.attach(adapter("bad", folder=other))
    assert differences(before, picture(host)) == []


def test_an_adapter_for_another_width_does_not_fit_even_when_asked_to(
    load: Callable[..., Any], adapter: Callable[..., Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_base(tmp_path / "other", hidden_size=128)
    host = Attached(load(bits=4))
    before = picture(host)
    with pytest.raises(TuningError, match=r"does not fit|do not fit"):
        host.attach(adapter("bad", folder=other), other_base=True)
    assert differences(before, picture(host)) == []


def test_other_bases_are_used_when_asked_and_said(
    load: Callable[..., Any], adapter: Callable[..., Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    said: list[Any] = []
    host = attach(
        load(bits=4),
        adapter("bad", folder=make_base(tmp_path / "other", seed=1)),
        other_base=True,
        report=said.append,
    )
    assert host.active == "bad"
    assert [event.text for event in said if isinstance(event, Warned) and "differs in: weights" in event.text]
    version, identity = host.versions["bad"], host.backbone.identity
    trained_on = {"source": version.manifest.base.source, "fingerprint": version.manifest.base.fingerprint}
    used_on = {"source": host.backbone.base.portable, "fingerprint": identity.fingerprint, "parts": identity.parts()}
    assert host.receipts == (
        {
            "type": "other_base",
            "version": version.reference,
            "trained_on": {**trained_on, "parts": dict(version.manifest.base.parts)},
            "used_on": used_on,
            "differs": ["weights"],
            "relation": None,
        },
    )
    host.detach("bad")
    host.attach(version, other_base=True)
    assert len(host.receipts) == 1


DETAILS = {
    "weights": "differ in their bytes",
    "config": "rms_norm_eps 1e-06 → 0.001",
    "tokenizer": "the tokenizer",
    "special_tokens": "eos_token",
    "chat_template": "the chat template",
}


@pytest.mark.parametrize("part", sorted(DETAILS))
def test_a_mismatch_names_what_differs(
    load: Callable[..., Any],
    adapter: Callable[..., Any],
    make_base: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    part: str,
) -> None:
    version = adapter()
    folder = Path(shutil.copytree(tiny_base, tmp_path / "changed"))
    if part == "weights":
        shutil.copy(make_base(tmp_path / "donor", seed=1) / "model.safetensors", folder)
    elif part == "config":
        edit(folder / "config.json", rms_norm_eps=1e-3)
    elif part == "tokenizer":
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        one, two = list(vocabulary)[10:12]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    elif part == "special_tokens":
        edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    else:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
    with pytest.raises(BaseMismatch) as caught:
        attach(load(folder, bits=4), version)
    first, *details = caught.value.fact.split("\n- ")
    assert f"differs in: {part.replace('_', ' ')}" in first
    assert ("the weights are the same" in details) is (part != "weights")
    assert any(DETAILS[part] in detail for detail in details), details
    assert "--other-base" in str(caught.value.hint)


def test_more_embedding_rows_are_counted(
    load: Callable[..., Any], adapter: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    version = adapter()
    folder = Path(shutil.copytree(tiny_base, tmp_path / "resized"))
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows, rows[:2]])
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"], rows[:2]])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", vocab_size=len(rows) + 2)
    with pytest.raises(BaseMismatch, match=f"embedding rows {len(rows)} → {len(rows) + 2}"):
        attach(load(folder, bits=16), version)


def test_a_revision_on_this_machine_that_fits_is_named(
    load: Callable[..., Any],
    adapter: Callable[..., Any],
    make_base: Callable[..., Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub/models--acme--tiny/snapshots" / ("a" * 40)
    shutil.copytree(tiny_base, snapshot)
    version = adapter()
    base = version.manifest.base.model_copy(update={"source": "acme/tiny"})
    version = replace(version, manifest=version.manifest.model_copy(update={"base": base}))
    with pytest.raises(BaseMismatch) as caught:
        attach(load(make_base(tmp_path / "other", seed=1), bits=4), version)
    assert f"fits revision {'a' * 40} of acme/tiny" in str(caught.value.hint)


def test_a_measured_relation_is_named_and_recorded(
    load: Callable[..., Any], adapter: Callable[..., Any], registry: Any, tiny_base: Path, tmp_path: Path
) -> None:
    from peftkit.base.relations import measure
    from peftkit.registry.bases import keep_relation

    version = adapter()
    folder = Path(shutil.copytree(tiny_base, tmp_path / "cast"))
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    relation = measure(folder, tiny_base)
    with registry.writing("relate"):
        keep_relation(registry.layout, relation)
    with pytest.raises(BaseMismatch) as caught:
        attach(load(folder, bits=16), version)
    assert f"measured between them: {relation.describe()}" in caught.value.fact
    assert "with the measured error" in str(caught.value.hint)
    host = attach(load(folder, bits=16), version, other_base=True)
    (receipt,) = host.receipts
    assert receipt["relation"] == {"id": relation.id, "median": relation.median, "max": relation.max}
    assert 0 < relation.max < 2**-11, "half a unit in the last place of float16"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_base_that_only_moved_is_the_same_base(
    load: Callable[..., Any], adapter: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    version = adapter()
    moved = Path(shutil.copytree(tiny_base, tmp_path / "elsewhere"))
    edit(moved / "config.json", transformers_version="9.9.9", _name_or_path="elsewhere")
    assert attach(load(moved, bits=4), version).active == "tickets"


def test_other_precision_is_said_and_allowed(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    said: list[Any] = []
    version = adapter()
    attach(load(bits=16), version, report=said.append)
    assert [event.text for event in said if isinstance(event, Warned)] == [
        f"{version.reference} was trained on nf4+dq weights and is used on float32"
    ]


def test_attaching_to_a_backbone_that_is_being_trained_is_refused(
    load: Callable[..., Any], adapter: Callable[..., Any]
) -> None:
    backbone = load(bits=4)
    tuned = inject(backbone, AdapterSpec(r=4))
    trainable = set(tuned.trainable)
    with pytest.raises(TuningError, match="already carries an adapter"):
        attach(backbone, adapter())
    assert set(tuned.trainable) == trainable


def test_open_adapters_loads_the_base_that_the_manifest_names(
    adapter: Callable[..., Any], load: Callable[..., Any], tmp_path: Path
) -> None:
    versions = [adapter("a", seed=1), adapter("b", seed=2)]
    load(bits=16)  # so that this cache knows where the base is: the manifest names it by content, not by a path
    host = open_adapters(versions, tmp_path / "cache")
    assert host.backbone.quant.label == "nf4+dq"
    assert torch.equal(logits(host.model), logits(attach(load(bits=4), versions[0]).model))
    assert open_adapters(versions, tmp_path / "cache", bits=16).backbone.label == "float32"


# -- continuing


def test_resume_continues_bitwise_and_records_its_parent(load: Callable[..., Any], adapter: Callable[..., Any]) -> None:
    version = adapter()
    tuned = resume_adapter(load(bits=4), version, AdapterSpec())
    assert torch.equal(logits(tuned.model.eval()), logits(attach(load(bits=4), version).model))
    assert tuned.spec == AdapterSpec(r=4, lora_alpha=8, seed=1)
    assert tuned.parents == ({"name": "tickets", "version": version.id, "relation": "continued"},)
    assert {parameter.dtype for parameter in tuned.trainable.values()} == {torch.float32}
    assert tuned.receipts == ()
    assert len(tuned.trainable) == 28
    assert all("lora_" in name for name in tuned.trainable)


@pytest.mark.parametrize("asked", [{"r": 8}, {"lora_alpha": 64}, {"method": "dora"}, {"target_modules": ["q_proj"]}])
def test_resume_refuses_another_adapter(
    load: Callable[..., Any], adapter: Callable[..., Any], asked: dict[str, Any]
) -> None:
    with pytest.raises(TuningError, match=f"adapter.{next(iter(asked))}="):
        resume_adapter(load(bits=4), adapter(), AdapterSpec(**asked))


def test_resume_refuses_another_base(
    load: Callable[..., Any], adapter: Callable[..., Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    backbone = load(make_base(tmp_path / "other", seed=1), bits=4)
    with pytest.raises(BaseMismatch, match="weights"):
        resume_adapter(backbone, adapter(), AdapterSpec())
    tuned = resume_adapter(backbone, adapter(), AdapterSpec(), other_base=True)
    assert [(receipt["type"], receipt["differs"]) for receipt in tuned.receipts] == [("other_base", ["weights"])]


@pytest.mark.parametrize("misfit", ["wrong shape", "missing tensor", "extra tensor", "NaN", "r is text"])
def test_a_failed_resume_changes_nothing(load: Callable[..., Any], adapter: Callable[..., Any], misfit: str) -> None:
    backbone = load(bits=4)
    before = picture(Attached(backbone))
    with pytest.raises(TuningError):
        resume_adapter(backbone, adapter(change=MISFITS[misfit]), AdapterSpec())
    assert differences(before, picture(Attached(backbone))) == []


@pytest.mark.parametrize("extra", [{"modules_to_save": ["norm"]}, {"lora_bias": True}, {"peft_type": "IA3"}])
def test_resume_refuses_what_is_not_trained_here(
    load: Callable[..., Any], adapter: Callable[..., Any], extra: dict[str, Any]
) -> None:
    with pytest.raises(TuningError, match="cannot be continued"):
        resume_adapter(load(bits=4), adapter(change=config(**extra)), AdapterSpec())


def test_resume_on_a_backbone_that_already_carries_an_adapter(
    load: Callable[..., Any], adapter: Callable[..., Any]
) -> None:
    backbone = load(bits=4)
    inject(backbone, AdapterSpec(r=4))
    with pytest.raises(TuningError, match="already carries an adapter"):
        resume_adapter(backbone, adapter(), AdapterSpec())
