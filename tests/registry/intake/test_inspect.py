"""What the intake takes, what it changes and says so, and that it loads what it hashed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry.intake.adapters import BASE, LAYER, Adapter, Q, sound

import peftkit.registry.intake as intake
from peftkit.registry.intake import AdapterRefused, inspect, quarantine


def take(adapter: Adapter, tmp_path: Path, base: Any = BASE, dtypes: Any = None) -> intake.Intake:
    tmp_path.mkdir(exist_ok=True)
    return inspect(adapter.write(tmp_path / "adapter"), tmp_path / "quarantine", base, dtypes)


def refusal(adapter: Adapter, tmp_path: Path, base: Any = BASE) -> str:
    with pytest.raises(AdapterRefused) as caught:
        take(adapter, tmp_path, base)
    return caught.value.rule


def digest(path: Path) -> tuple[str, int]:
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size


def test_only_the_two_files_come_in_and_the_rest_is_listed(tmp_path: Path) -> None:
    def litter(folder: Path) -> None:
        for name in ("README.md", "tokenizer.json", "chat_template.jinja", "training_args.bin", "optimizer.pt"):
            (folder / name).write_text("x")
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
        (folder / "checkpoint-10").mkdir()
        (folder / "dangling").symlink_to("/nowhere")
        (folder / "pipe\n").touch()
        os.mkfifo(folder / "fifo")

    adapter = sound()
    adapter.after = litter
    taken = take(adapter, tmp_path)
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == sorted(taken.files)
    assert sorted(taken.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert taken.files == {name: digest(tmp_path / "quarantine" / name) for name in taken.files}
    assert taken.sources == {name: digest(tmp_path / "adapter" / name) for name in taken.sources}
    assert (taken.kind, taken.peft_type, taken.tensors, taken.parameters) == ("peft", "LORA", 4, 16 + 16 + 16 + 8)
    reasons = dict(taken.left_out)
    assert len(reasons) == 10
    assert reasons["adapter_model.bin"] == reasons["optimizer.pt"] == "a pickle, never opened"
    assert reasons["checkpoint-10"] == "a folder, not looked into"
    assert "'pipe\\n'" in reasons


def test_the_stored_configuration_is_canonical_and_says_the_same(tmp_path: Path) -> None:
    taken = take(sound(), tmp_path)
    text = (tmp_path / "quarantine" / "adapter_config.json").read_text()
    assert text == json.dumps(taken.config, sort_keys=True, indent=2) + "\n"
    given = sound().config
    del given["loftq_config"]
    assert taken.config == given
    assert taken.notes == []


@pytest.mark.parametrize(
    ("key", "given", "stored", "said"),
    [
        ("auto_mapping", {"base_model_class": "E", "parent_library": "os"}, None, "auto_mapping"),
        ("base_model_name_or_path", "https://evil.example/base", None, "base_model_name_or_path"),
        ("base_model_name_or_path", "/home/someone/base", None, "base_model_name_or_path"),
        ("base_model_name_or_path", "../base", None, "base_model_name_or_path"),
        ("revision", "refs/../../x", None, "revision"),
        ("inference_mode", False, True, "inference_mode"),
        ("init_lora_weights", "eva", True, "init_lora_weights"),
        ("eva_config", {"rho": 2.0}, "absent", "eva_config"),
        ("corda_config", {"cache_file": "/etc/passwd"}, "absent", "corda_config"),
        ("target_modules", "(x+x+)+y|.*_proj", [f"{LAYER}.q_proj", f"{LAYER}.v_proj"], "target_modules"),
    ],
)
def test_what_is_harmful_and_not_needed_is_replaced_with_a_note(
    tmp_path: Path, key: str, given: Any, stored: Any, said: str
) -> None:
    adapter = sound()
    adapter.config[key] = given
    taken = take(adapter, tmp_path)
    assert taken.config is not None
    assert taken.config.get(key, "absent") == stored
    assert any(note.startswith(said) for note in taken.notes)
    assert (tmp_path / "quarantine" / "adapter_config.json").stat().st_mode & 0o777 == 0o444


def test_a_tokenizer_named_by_a_prompt_is_left_out(tmp_path: Path) -> None:
    adapter = sound()
    adapter.config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 4,
        "token_dim": 8,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "hello",
        "tokenizer_name_or_path": "evil/model",
    }
    adapter.tensors = {}
    adapter.add("prompt_embeddings", (4, 8))
    taken = take(adapter, tmp_path)
    assert taken.config is not None
    assert not {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"} & set(taken.config)
    assert len(taken.notes) == 3


def test_hard_links_are_files(tmp_path: Path) -> None:
    adapter = sound()
    adapter.after = lambda folder: os.link(folder / "adapter_model.safetensors", tmp_path / "other")
    assert take(adapter, tmp_path).tensors == 4


def replacing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, Path], None]) -> None:
    """Let something happen between the copy and the check."""

    def admit(source: Path, target: Path) -> quarantine.Admitted:
        admitted = quarantine.admit(source, target)
        change(source, target)
        return admitted

    monkeypatch.setattr(intake, "admit", admit)


def test_a_source_replaced_after_the_copy_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        shutil.rmtree(source)
        source.mkdir()
        (source / "adapter_model.safetensors").write_bytes(b"evil")

    replacing(monkeypatch, replace)
    taken = take(sound(), tmp_path)
    assert taken.files["adapter_model.safetensors"] == digest(tmp_path / "quarantine" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("how", ["other", "shorter"])
def test_a_copy_that_changes_before_the_check_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    def replace(source: Path, target: Path) -> None:
        data = bytearray((target / name).read_bytes())
        (target / name).unlink()
        data[-1] ^= 1
        (target / name).write_bytes(data if how == "other" else data[:-1])

    replacing(monkeypatch, replace)
    rules = ("file.changed", "header.range") if name.endswith("safetensors") and how == "shorter" else ("file.changed",)
    assert refusal(sound(), tmp_path) in rules
    assert not (tmp_path / "quarantine").exists()


def test_a_file_that_grows_while_it_is_copied_stops_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "LARGEST_FILE", 600)
    monkeypatch.setattr(
        quarantine.os, "fstat", lambda descriptor: os.stat(tmp_path / "adapter" / "adapter_config.json")
    )
    adapter = sound()
    adapter.config_bytes = lambda text: json.dumps(json.loads(text)).encode()
    assert refusal(adapter, tmp_path) == "limit.bytes"


def test_quarantine_must_be_new(tmp_path: Path) -> None:
    (tmp_path / "quarantine").mkdir()
    with pytest.raises(FileExistsError):
        take(sound(), tmp_path)
    assert (tmp_path / "quarantine").exists()


# --- kind tensors


def replacement(shape: tuple[int, ...] = (8,), name: str = "model.norm.weight") -> Adapter:
    adapter = Adapter(config={}, weights_name="tensors.safetensors")
    adapter.add(name, shape)
    return adapter


def test_named_tensors_are_taken_when_they_have_the_base_shapes(tmp_path: Path) -> None:
    taken = take(replacement(), tmp_path)
    assert (taken.kind, taken.config, taken.peft_type) == ("tensors", None, None)
    assert sorted(taken.files) == ["tensors.safetensors"]


def test_named_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    assert refusal(replacement((9,)), tmp_path) == "shape.base"


def test_named_tensors_keep_the_other_rules(tmp_path: Path) -> None:
    adapter = replacement()
    adapter.tensors["model.norm.weight"] = ("F16", (8,), b"\x00\x7c" * 8)
    assert refusal(adapter, tmp_path) == "tensor.not-finite"


def test_new_tensors_are_noted(tmp_path: Path) -> None:
    assert take(replacement(name="head.weight"), tmp_path).notes == ["1 tensors are not the base's and are added to it"]


# --- shapes of other modules


def lora(module: str, a: tuple[int, ...], b: tuple[int, ...], **config: Any) -> Adapter:
    adapter = sound()
    adapter.tensors = {}
    adapter.config.update(target_modules=[module], **config)
    adapter.add(f"base_model.model.{module}.lora_A.weight", a)
    adapter.add(f"base_model.model.{module}.lora_B.weight", b)
    return adapter


CONV1D = {"h.0.attn.c_attn.weight": (8, 24)}


def test_gpt2_keeps_its_weights_transposed(tmp_path: Path) -> None:
    adapter = lora("transformer.h.0.attn.c_attn", (2, 8), (24, 2), fan_in_fan_out=True)
    assert take(adapter, tmp_path, CONV1D).notes == []


def test_transposed_factors_are_refused_where_the_configuration_does_not_say_so(tmp_path: Path) -> None:
    assert refusal(lora("transformer.h.0.attn.c_attn", (2, 8), (24, 2)), tmp_path, CONV1D) == "shape.base"


def test_convolutions(tmp_path: Path) -> None:
    adapter = lora("stem", (2, 3, 5, 5), (16, 2, 1, 1))
    assert take(adapter, tmp_path, {"stem.weight": (16, 3, 5, 5)}).notes == []


def test_a_tied_head_has_the_shape_of_the_embedding(tmp_path: Path) -> None:
    assert take(lora("lm_head", (2, 8), (32, 2)), tmp_path).notes == []
    assert refusal(lora("lm_head", (2, 8), (33, 2)), tmp_path / "x") == "shape.base"


def test_embeddings(tmp_path: Path) -> None:
    adapter = sound()
    adapter.config["target_modules"] = ["embed_tokens", "q_proj", "v_proj"]
    name = "base_model.model.model.embed_tokens"
    adapter.add(f"{name}.lora_embedding_A", (2, 32))
    adapter.add(f"{name}.lora_embedding_B", (8, 2))
    adapter.add(f"{name}.base_layer.weight", (32, 8))
    assert take(adapter, tmp_path).notes == [f"'{name}.base_layer.weight' replaces a tensor of the base"]


def test_packed_weights_are_passed_over_with_a_note(tmp_path: Path) -> None:
    base = {f"{LAYER}.q_proj.weight": (32, 1), f"{LAYER}.v_proj.weight": (16, 1)}
    taken = take(sound(), tmp_path, base, dict.fromkeys(base, "U8"))
    assert taken.notes == ["2 modules of the base are packed, fused or not plain weights and were not compared"]


def test_without_a_base_only_the_configuration_counts(tmp_path: Path) -> None:
    assert take(sound(), tmp_path, None).notes == ["the base was not given: no shape was compared with it"]
    adapter = sound()
    adapter.add(f"{Q}.lora_A.weight", (3, 8))
    assert refusal(adapter, tmp_path / "x", None) == "shape.rank"


def test_a_new_head_of_a_classifier_is_noted(tmp_path: Path) -> None:
    adapter = sound()
    adapter.config.update(task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    adapter.add("base_model.model.score.weight", (2, 8))
    assert take(adapter, tmp_path).notes == ["'base_model.model.score.weight' is new: the base has no such module"]


def test_biases_come_with_the_setting(tmp_path: Path) -> None:
    adapter = sound()
    adapter.config["bias"] = "lora_only"
    adapter.add(f"{Q}.base_layer.bias", (8,))
    assert take(adapter, tmp_path).notes == [f"'{Q}.base_layer.bias' replaces a tensor of the base"]


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    """No other exception than AdapterRefused, whatever bytes are flipped, doubled or cut."""
    chance = random.Random(seed)
    source = sound().write(tmp_path / "adapter")
    whole = {path: path.read_bytes() for path in sorted(source.iterdir())}
    refused = 0
    for _ in range(60):
        path = chance.choice(list(whole))
        data = bytearray(whole[path])
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(min(len(data), 500))
            match chance.randrange(3):
                case 0:
                    data[at] ^= 1 << chance.randrange(8)
                case 1:
                    data[at:at] = data[at : at + chance.randint(1, 20)]
                case _:
                    del data[at : at + chance.randint(1, 20)]
        path.write_bytes(data)
        try:
            inspect(source, tmp_path / "quarantine", BASE)
            shutil.rmtree(tmp_path / "quarantine")
        except AdapterRefused:
            refused += 1
        path.write_bytes(whole[path])
    assert refused > 40
