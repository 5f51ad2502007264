"""Adapters with exactly one flaw: each is refused for its own reason, and taken when only the flaw is mended."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry.intake.adapters import BASE, LAYER, Adapter, Q, V, sound, values

from peftkit.registry.intake import RULES, AdapterRefused, inspect, rules

GONE = object()
Flaw = Callable[[Adapter, bool], None]
CASES: list[tuple[str, str, Flaw]] = []


def case(rule: str, name: str, flaw: Flaw) -> None:
    CASES.append((rule, name, flaw))


def flaw(rule: str) -> Callable[[Flaw], Flaw]:
    """Register a function that bends the adapter, or writes the mended twin of what it bends."""

    def register(function: Flaw) -> Flaw:
        case(rule, function.__name__, function)
        return function

    return register


def setting(rule: str, key: str, bad: Any, good: Any = GONE, name: str | None = None) -> None:
    def bend(adapter: Adapter, mended: bool) -> None:
        value = good if mended else bad
        if value is GONE:
            adapter.config.pop(key, None)
        else:
            adapter.config[key] = value

    case(rule, name or f"{key}={str(bad)[:40]!r}", bend)


def nested(levels: int) -> Any:
    return {"k_proj": nested(levels - 1)} if levels else 1


def config_text(rule: str, name: str, bad: Callable[[bytes], bytes]) -> None:
    case(rule, name, lambda adapter, mended: None if mended else setattr(adapter, "config_bytes", bad))


def header_text(rule: str, name: str, bad: Callable[[bytes], bytes]) -> None:
    case(rule, name, lambda adapter, mended: None if mended else setattr(adapter, "header_bytes", bad))


def entry(rule: str, name: str, bad: Callable[[dict[str, Any]], Any]) -> None:
    """Bend the header's entry of the first tensor."""
    case(
        rule,
        name,
        lambda adapter, mended: (
            None if mended else setattr(adapter, "header", lambda entries: bad(entries[f"{Q}.lora_A.weight"]))
        ),
    )


def tensor(rule: str, name: str, bad: str, good: str | None = None, shape: tuple[int, ...] = (2, 2)) -> None:
    """One more tensor: with the bad name, then with the good one (or none)."""

    def bend(adapter: Adapter, mended: bool) -> None:
        wanted = good if mended else bad
        if wanted is not None:
            adapter.add(wanted, shape)

    case(rule, name, bend)


def beside(rule: str, name: str, bad: Callable[[Path], Any]) -> None:
    """Do something to the written folder."""
    case(rule, name, lambda adapter, mended: None if mended else setattr(adapter, "after", bad))


# --- the folder and its files


def swap_for_link(name: str) -> Callable[[Path], None]:
    def swap(folder: Path) -> None:
        outside = folder.with_name(f"outside-{name}")
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return swap


def swap_for(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def swap(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return swap


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sock(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the whole path would be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


def resize(path: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / path, size)


def renamed(name: str, other: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename(folder / other)


beside("name.link", "weights are a link", swap_for_link("adapter_model.safetensors"))
beside("name.link", "configuration is a link", swap_for_link("adapter_config.json"))
beside("source.special", "weights are a pipe", swap_for("adapter_model.safetensors", pipe))
beside("source.special", "configuration is a socket", swap_for("adapter_config.json", sock))
beside("source.special", "weights are a folder", swap_for("adapter_model.safetensors", Path.mkdir))
beside("source.missing", "no weights", lambda folder: (folder / "adapter_model.safetensors").unlink())
beside("source.missing", "no configuration", lambda folder: (folder / "adapter_config.json").unlink())
beside("name.look-alike", "case twin", lambda folder: (folder / "Adapter_Config.json").write_text("{}"))
beside("name.look-alike", "full-width twin", lambda folder: (folder / "adapter_config．json").write_text("{}"))
beside("name.look-alike", "case only", renamed("adapter_model.safetensors", "Adapter_Model.safetensors"))
beside("weights.pickle", "pickle only", renamed("adapter_model.safetensors", "adapter_model.bin"))
beside("weights.pickle", "torch file only", renamed("adapter_model.safetensors", "adapter_model.pt"))
beside("weights.sharded", "shards", renamed("adapter_model.safetensors", "adapter_model-00001-of-00002.safetensors"))
beside("weights.sharded", "index", renamed("adapter_model.safetensors", "adapter_model.safetensors.index.json"))
beside("limit.bytes", "weights of 8 GiB and a byte", resize("adapter_model.safetensors", rules.LARGEST_FILE + 1))
beside("limit.config-bytes", "configuration of 1 MiB and a byte", resize("adapter_config.json", (1 << 20) + 1))


@flaw("source.link")
def folder_is_a_link(adapter: Adapter, mended: bool) -> None:
    def link(folder: Path) -> None:
        folder.rename(folder.with_name("real"))
        folder.symlink_to(folder.with_name("real"))

    if not mended:
        adapter.after = link


@flaw("source.archive")
def folder_is_an_archive(adapter: Adapter, mended: bool) -> None:
    def pack(folder: Path) -> None:
        shutil.make_archive(str(folder.with_name("packed")), "zip", folder)
        shutil.rmtree(folder)
        folder.with_name("packed.zip").rename(folder)

    if not mended:
        adapter.after = pack


@flaw("source.not-folder")
def folder_is_a_file(adapter: Adapter, mended: bool) -> None:
    def replace(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.write_bytes(b"")

    if not mended:
        adapter.after = replace


@flaw("limit.files")
def too_many_files(adapter: Adapter, mended: bool) -> None:
    def fill(folder: Path) -> None:
        for number in range(100 if mended else rules.MOST_FILES - 1):
            os.close(os.open(folder / f"{number}.txt", os.O_CREAT | os.O_WRONLY))

    adapter.after = fill


# --- the configuration as text

config_text("config.json", "not JSON", lambda text: text[:-2])
config_text("config.json", "NaN", lambda text: text.replace(b'"r": 2', b'"r": NaN'))
config_text("config.json", "1e999", lambda text: text.replace(b'"lora_alpha": 4', b'"lora_alpha": 1e999'))
config_text("config.json", "byte order mark", lambda text: b"\xef\xbb\xbf" + text)
config_text("config.json", "not UTF-8", lambda text: text.replace(b"someone", b"someon\xff"))
config_text("config.json", "nested 100,000 deep", lambda text: b"[" * 100_000 + b"]" * 100_000)
config_text("config.json", "a number of 5,000 digits", lambda text: text.replace(b'"r": 2', b'"r": ' + b"9" * 5000))
config_text("config.json", "a list", lambda text: b"[" + text + b"]")
config_text("config.duplicate-key", "r twice", lambda text: text.replace(b'"r": 2', b'"r": 2, "r": 512'))
setting("limit.depth", "rank_pattern", nested(8), {"k_proj": 1})

# --- the configuration's values

setting("config.method", "peft_type", "lora", "LORA")
setting("config.method", "peft_type", None, "LORA")
setting("config.method", "peft_type", ["LORA"], "LORA")
setting("config.refused-method", "peft_type", "XLORA", "LORA")
setting("config.refused-method", "peft_type", "ADAMSS", "LORA")
setting("config.unknown-key", "trust_remote_code", True)
setting("config.unknown-key", "chat_template", "{{ 1 }}")
setting("config.unknown-key", "r_pattern", {})
setting("config.auto-map", "auto_map", {"AutoModel": "evil--model.Evil"})
setting("config.megatron", "megatron_config", {"tensor_model_parallel_size": 1}, None)
setting("config.megatron", "megatron_core", "evil.core", "megatron.core")
setting("config.base-rewriting", "layer_replication", [[0, 1], [0, 1]], None)
setting("config.base-rewriting", "kasa_config", {"beta": 1e-4}, None)
setting("config.other-adapters", "arrow_config", {"top_k": 3}, None)
for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of", 7, ["gaussian"]):
    setting("config.base-rewriting", "init_lora_weights", init, "gaussian")
setting("config.type", "r", "2", 2)
setting("config.type", "r", True, 2)
setting("config.type", "r", 2.0, 2)
setting("config.type", "lora_alpha", "4", 4.5)
setting("config.type", "use_rslora", 1, True)
setting("config.type", "target_modules", {"q_proj": 1}, ["q_proj", "v_proj"])
setting("config.type", "target_modules", ["q_proj", "v_proj", 3], ["q_proj", "v_proj", "k_proj"])
setting("config.type", "rank_pattern", ["q_proj"], {"q_proj": 2})
setting("config.type", "velora_config", [1], None)
setting("config.unknown-key", "velora_config", {"code": 1}, None, name="nested unknown key")
setting("config.type", "base_model_name_or_path", {"a": 1}, None)
setting("config.value", "lora_dropout", 1.0, 0.99)
setting("config.value", "lora_dropout", -0.1, 0)
setting("config.value", "task_type", "EVIL", None)
setting("config.value", "bias", "some", "lora_only")
setting("config.value", "peft_version", "0.21 import os", "0.21.2.dev0@UNKNOWN")
setting("limit.rank", "r", 10**9, 2)
setting("limit.rank", "r", 0, 2)
setting("limit.rank", "r", -1, 2)
setting("limit.rank", "rank_pattern", {"k_proj": 10**9}, {"k_proj": 16})
setting("limit.setting", "qalora_group_size", 10**9, 16)
setting("limit.setting", "layers_to_transform", [10**30], [0])
setting("limit.setting", "lora_alpha", 1e30, 1e3)
setting("limit.name", "target_modules", ["q_proj", "v_proj", "k" * 401], ["q_proj", "v_proj", "k" * 400])
setting("limit.name", "base_model_name_or_path", "b" * 5000, "b" * 50)
setting("config.text", "base_model_name_or_path", "some\x1b[2Jone/base", "someone/base")
setting("config.json", "base_model_name_or_path", "some\ud800one", "someone")
setting("config.text", "revision", "main\0", "main")
for bad in (
    "../q_proj",
    "/etc/passwd",
    "q_proj\0",
    "a..b",
    "q_prоj",
    "q proj",
    "",
    "q\\proj",
    "q_proj\n",
):  # о: Cyrillic
    setting("config.name", "modules_to_save", [bad], ["k_proj"])
setting("config.name", "trainable_token_indices", {"../x": [1]}, {"embed_tokens": [1]})
setting("config.pattern", "rank_pattern", {"(a+)+$": 2}, {"k_proj": 2})
setting("config.pattern", "alpha_pattern", {".*q_proj": 2}, {"^model.layers.0.self_attn.q_proj": 2})
setting("config.pattern", "layers_pattern", "(x+x+)+y", "layers")
setting("config.pattern", "exclude_modules", "(.*)*k_proj", "k_proj")
setting("config.pattern", "target_modules", ["q_proj", "v_proj", "(a|a)*"], ["q_proj", "v_proj"])
setting("config.pattern", "modules_to_save", ["(.+)+lm_head"], None)
setting("name.reserved", "modules_to_save", ["base_model"], ["model_head"])
setting("name.reserved", "modules_to_save", ["x.__base__"], ["x.base"])
setting("name.reserved", "exclude_modules", ["lora"], ["loras"])


def prompts(method: str, **more: Any) -> Callable[[Adapter], None]:
    def make(adapter: Adapter) -> None:
        adapter.config = {"peft_type": method, "num_virtual_tokens": 4, "token_dim": 8, **more}
        adapter.config["num_transformer_submodules"] = 1
        adapter.tensors = {}
        adapter.add("prompt_embeddings", (4, 8))

    return make


def of_method(rule: str, make: Callable[[Adapter], None], key: str, bad: Any, good: Any) -> None:
    def bend(adapter: Adapter, mended: bool) -> None:
        make(adapter)
        adapter.config[key] = good if mended else bad

    case(rule, f"{make.__qualname__.split('.')[0]}: {key}={bad!r}", bend)


def multitask(adapter: Adapter) -> None:
    prompts("MULTITASK_PROMPT_TUNING", num_tasks=2, num_ranks=1)(adapter)
    adapter.add("prefix_task_cols", (2, 4, 1))
    adapter.add("prefix_task_rows", (2, 1, 8))


def vera(adapter: Adapter) -> None:
    adapter.config = {"peft_type": "VERA", "r": 2, "target_modules": ["q_proj"], "save_projection": True}
    adapter.tensors = {}
    for name, shape in (("vera_lambda_b", (8,)), ("vera_lambda_d", (2,))):
        adapter.add(f"{Q}.{name}", shape)
    adapter.add("base_model.vera_A", (2, 8))
    adapter.add("base_model.vera_B", (8, 2))


def fourier(adapter: Adapter) -> None:
    adapter.config = {"peft_type": "FOURIERFT", "n_frequency": 5, "target_modules": ["q_proj"]}
    adapter.tensors = {}
    adapter.add(f"{Q}.fourierft_spectrum", (5,))


def shadow(adapter: Adapter) -> None:
    adapter.config = {"peft_type": "SHADOW", "r": 2}
    adapter.tensors = {}
    adapter.add("base_model.model.model.layers.0.shadow_down.default.weight", (2, 8))


def unilora(adapter: Adapter) -> None:
    adapter.config = {"peft_type": "UNILORA", "theta_d_length": 8, "proj_seed": 1, "target_modules": ["q_proj"]}
    adapter.tensors = {}
    adapter.add("base_model.unilora_theta_d", (8,))


of_method("config.tokenizer", prompts("PROMPT_TUNING"), "tokenizer_kwargs", {"trust_remote_code": True}, None)
of_method("config.path", multitask, "prompt_tuning_init_state_dict_path", "/etc/passwd", None)
of_method("config.path", shadow, "shadow_model", "evil/model", "mirror")
of_method("config.not-in-file", vera, "save_projection", False, True)
of_method("config.not-in-file", fourier, "random_loc_seed", None, 777)
of_method("config.pattern", unilora, "target_modules", ".*q_proj", ["q_proj"])
of_method("limit.setting", prompts("CARTRIDGE"), "num_frozen_tokens", 10**12, 1)
of_method("shape.rank", prompts("P_TUNING"), "num_virtual_tokens", 10**6, 4)
of_method("shape.rank", vera, "r", 256, 2)

# --- the header

header_text("header.json", "not JSON", lambda text: text[:-1])
header_text("header.json", "a list", lambda text: b"[]")
header_text("header.json", "not UTF-8", lambda text: text.replace(b"q_proj", b"q_pro\xff"))
header_text("header.json", "nested 100,000 deep", lambda text: b"[" * 100_000)
header_text("header.duplicate-key", "a tensor twice", lambda text: text[:-1] + b', "x": 1, "x": 2}')
entry("header.entry", "another field", lambda told: told.update(code="x"))
entry("header.entry", "no dtype", lambda told: told.pop("dtype"))
entry("header.entry", "shape of text", lambda told: told.update(shape="2x8"))
entry("header.entry", "extent below 0", lambda told: told.update(shape=[-2, -8]))
entry("header.entry", "extent true", lambda told: told.update(shape=[True, 16]))
entry("header.entry", "offsets back to front", lambda told: told.update(data_offsets=[64, 0]))
entry("header.entry", "three offsets", lambda told: told.update(data_offsets=[0, 32, 64]))
entry("header.entry", "offset of 2**64", lambda told: told.update(data_offsets=[0, 1 << 64]))
entry("header.dtype", "unheard-of dtype", lambda told: told.update(dtype="F31"))
entry("header.dtype", "8-bit floats", lambda told: told.update(dtype="F8_E4M3", shape=[8, 8]))
entry("header.dtype", "dtype no text", lambda told: told.update(dtype=["F32"]))
entry("header.size", "shape too large", lambda told: told.update(shape=[2, 9]))
entry("header.size", "shape of a million digits", lambda told: told.update(shape=[1 << 62] * 16))
entry("header.size", "dtype too narrow", lambda told: told.update(dtype="F16"))
entry("header.range", "ends after the file", lambda told: told.update(data_offsets=[1 << 40, (1 << 40) + 64]))
entry("tensor.empty", "no rows", lambda told: told.update(shape=[0, 8], data_offsets=[0, 0]))


@flaw("header.metadata")
def metadata_no_text(adapter: Adapter, mended: bool) -> None:
    adapter.header = lambda entries: entries["__metadata__"].update(format="pt" if mended else 1)


@flaw("header.overlap")
def two_tensors_share_bytes(adapter: Adapter, mended: bool) -> None:
    def share(entries: dict[str, Any]) -> None:
        entries[f"{Q}.lora_B.weight"]["data_offsets"] = [0, 64]

    if not mended:
        adapter.header = share


@flaw("header.hole")
def bytes_between_tensors(adapter: Adapter, mended: bool) -> None:
    def skip(entries: dict[str, Any]) -> None:
        del entries[f"{V}.extra"]

    adapter.tensors = {f"{V}.extra": ("F32", (1,), b"evil"), **adapter.tensors}
    if mended:
        del adapter.tensors[f"{V}.extra"]
    else:
        adapter.header = skip


@flaw("header.hole")
def bytes_after_the_last_tensor(adapter: Adapter, mended: bool) -> None:
    adapter.weights_bytes = lambda data: data + (b"" if mended else b"PK\3\4")


@flaw("header.range")
def cut_short(adapter: Adapter, mended: bool) -> None:
    adapter.weights_bytes = lambda data: data if mended else data[:-1]


@flaw("header.short")
def seven_bytes(adapter: Adapter, mended: bool) -> None:
    adapter.weights_bytes = lambda data: data if mended else data[:7]


@flaw("header.length")
def header_longer_than_the_file(adapter: Adapter, mended: bool) -> None:
    adapter.weights_bytes = lambda data: data if mended else struct.pack("<Q", len(data) - 7) + data[8:]


@flaw("limit.header-bytes")
def header_of_150_megabytes(adapter: Adapter, mended: bool) -> None:
    def grow(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(struct.pack("<Q", 150_000_000))
        os.truncate(path, 150_000_008)

    if not mended:
        adapter.after = grow


@flaw("limit.tensors")
def a_hundred_thousand_and_one_tensors(adapter: Adapter, mended: bool) -> None:
    def fill(entries: dict[str, Any]) -> None:
        entries.update((f"t{number}", 0) for number in range(rules.MOST_TENSORS - 3))

    if not mended:
        adapter.header = fill


# --- the tensors

tensor("tensor.name", "path in a name", "base_model.model.../../etc.lora_A.weight")
tensor("tensor.name", "absolute name", "/etc/passwd")
tensor("tensor.name", "NUL in a name", f"{Q}\0.lora_A.weight")
tensor("tensor.name", "look-alike letter", Q.replace("o", "о") + ".lora_A.weight")  # Cyrillic
tensor("tensor.name", "no name", "")
tensor("tensor.name", "blank in a name", f"{Q} .lora_A.weight")
tensor("tensor.look-alike", "names differ in case", f"{Q.upper()}.lora_A.weight")
tensor("limit.name", "name of 500 characters", f"base_model.model.{'x' * 500}.lora_A.weight")
tensor("tensor.unknown", "another method's tensor", f"{Q}.vera_lambda_d")
tensor("tensor.unknown", "the base's own weight", f"{Q}.weight", shape=(8, 8))
tensor("tensor.unknown", "a tensor outside the model", "optimizer.state")
tensor("tensor.unknown", "magnitude without use_dora", f"{Q}.lora_magnitude_vector", shape=(8,))
tensor("tensor.unknown", "bias without lora_bias", f"{Q}.lora_B.bias", shape=(8,))
tensor("tensor.unknown", "the base's bias", f"{Q}.base_layer.bias", shape=(8,))
tensor("tensor.module", "module not targeted", f"base_model.model.{LAYER}.k_proj.lora_A.weight", shape=(2, 8))
tensor("name.reserved", "module inside a PEFT layer", f"{Q}.base_layer.q_proj.lora_A.weight", shape=(2, 8))
tensor("name.reserved", "dunder module", "base_model.model.__class__.q_proj.lora_A.weight", shape=(2, 8))


@flaw("tensor.pair")
def a_without_b(adapter: Adapter, mended: bool) -> None:
    if not mended:
        del adapter.tensors[f"{Q}.lora_B.weight"]


@flaw("tensor.pair")
def dora_without_magnitude(adapter: Adapter, mended: bool) -> None:
    adapter.config["use_dora"] = True
    for module, width in ((Q, 8), (V, 4))[: 2 if mended else 1]:
        adapter.add(f"{module}.lora_magnitude_vector", (width,))


@flaw("tensor.none")
def no_tensor_at_all(adapter: Adapter, mended: bool) -> None:
    if not mended:
        adapter.tensors = {}


@flaw("tensor.none")
def only_a_copied_module(adapter: Adapter, mended: bool) -> None:
    adapter.config["modules_to_save"] = ["norm"]
    if not mended:
        adapter.tensors = {}
    adapter.add("base_model.model.model.norm.weight", (8,))


@flaw("tensor.none")
def vera_without_projection(adapter: Adapter, mended: bool) -> None:
    vera(adapter)
    if not mended:
        del adapter.tensors["base_model.vera_A"]


@flaw("tensor.dtype")
def factors_of_whole_numbers(adapter: Adapter, mended: bool) -> None:
    adapter.add(f"{Q}.lora_A.weight", (2, 8), "F32" if mended else "I32")


@flaw("tensor.dtype")
def indices_that_are_floats(adapter: Adapter, mended: bool) -> None:
    adapter.config = {"peft_type": "SHIRA", "r": 2, "target_modules": ["q_proj"]}
    adapter.tensors = {}
    adapter.add(f"{Q}.shira_weight", (3,))
    adapter.add(f"{Q}.shira_indices", (2, 3), "I32" if mended else "F32")


for dtype, bad in {
    "F32": struct.pack("<f", float("nan")),
    "F64": struct.pack("<d", float("inf")),
    "F16": b"\x00\xfc",  # -inf
    "BF16": b"\x81\x7f",  # a signalling NaN
}.items():
    for first in (True, False):

        def bend(adapter: Adapter, mended: bool, dtype: str = dtype, bad: bytes = bad, first: bool = first) -> None:
            data = values((2, 8), dtype)
            if not mended:
                data = bad + data[len(bad) :] if first else data[: -len(bad)] + bad
            adapter.add(f"{Q}.lora_A.weight", (2, 8), dtype, data)

        case("tensor.not-finite", f"{dtype} {'first' if first else 'last'}", bend)


@flaw("tensor.not-finite")
def infinite_in_the_second_megabyte(adapter: Adapter, mended: bool) -> None:
    fourier(adapter)
    count = 1 << 20
    adapter.config["n_frequency"] = count
    last = values((1,), "BF16") if mended else b"\x80\xff"
    adapter.add(f"{Q}.fourierft_spectrum", (count,), "BF16", values((count - 1,), "BF16") + last)


# --- the shapes


def shaped(
    rule: str, name: str, bad: dict[str, tuple[int, ...]], good: dict[str, tuple[int, ...]], **more: Any
) -> None:
    def bend(adapter: Adapter, mended: bool) -> None:
        adapter.config.update(more)
        for tensor_name, shape in (good if mended else bad).items():
            adapter.add(tensor_name, shape)

    case(rule, name, bend)


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
K = f"base_model.model.{LAYER}.k_proj.weight"
EMBED = "base_model.model.model.embed_tokens.weight"
shaped("shape.rank", "rank 4 where r is 2", {A: (4, 8), B: (8, 4)}, {A: (2, 8), B: (8, 2)})
shaped("shape.rank", "A and B disagree", {B: (8, 3)}, {B: (8, 2)})
shaped("shape.rank", "rank_pattern disagrees", {}, {A: (1, 8), B: (8, 1)}, rank_pattern={"q_proj": 1})
shaped("shape.rank", "A flat", {A: (16,)}, {A: (2, 8)})
shaped("shape.base", "another base's width", {A: (2, 16)}, {A: (2, 8)})
shaped("shape.base", "another base's height", {B: (6, 2)}, {B: (8, 2)})
shaped("shape.base", "A transposed", {A: (8, 2), B: (2, 8)}, {A: (8, 8), B: (8, 8)}, r=8, rank_pattern={"v_proj": 2})
shaped("shape.base", "copied module of another size", {K: (4, 9)}, {K: (4, 8)}, modules_to_save=["k_proj"])
shaped(
    "shape.vocabulary", "embedding with more rows", {EMBED: (33, 8)}, {EMBED: (32, 8)}, modules_to_save=["embed_tokens"]
)
OTHER = "base_model.model.model.layers.9.self_attn.q_proj"
shaped(
    "shape.absent",
    "layer that the base lacks",
    {f"{OTHER}.lora_A.weight": (2, 8), f"{OTHER}.lora_B.weight": (8, 2)},
    {},
)
for unlisted in (EMBED, EMBED.replace("embed_tokens.", "embed_tokens.base_layer.")):
    shaped("shape.vocabulary", f"resized {unlisted}", {unlisted: (40, 8)}, {unlisted: (32, 8)})
NEW = "base_model.model.head.weight"
shaped("shape.absent", "copied module that the base lacks", {NEW: (2, 8)}, {}, modules_to_save=["head"])


# --- the two tests


@pytest.mark.parametrize(
    ("rule", "bend"), [(rule, bend) for rule, _, bend in CASES], ids=[f"{r}: {n}" for r, n, _ in CASES]
)
def test_one_flaw_is_refused_by_its_rule_and_mended_it_is_taken(rule: str, bend: Flaw, tmp_path: Path) -> None:
    broken, whole = sound(), sound()
    bend(broken, False)
    bend(whole, True)
    source = tmp_path / ("adapter.zip" if rule == "source.archive" else "adapter")
    with pytest.raises(AdapterRefused) as caught:
        inspect(broken.write(source), tmp_path / "quarantine", BASE)
    assert caught.value.rule == rule
    assert str(caught.value).endswith(f"(rule {rule})")
    assert caught.value.expected
    assert caught.value.hint
    assert str(caught.value).isascii()  # a stranger's letters are escaped
    assert len(str(caught.value)) < 2000
    assert not (tmp_path / "quarantine").exists()

    taken = inspect(whole.write(tmp_path / "whole"), tmp_path / "quarantine", BASE)
    assert sorted(taken.files) == sorted(entry.name for entry in (tmp_path / "quarantine").iterdir())
    assert json.loads((tmp_path / "quarantine" / "adapter_config.json").read_text()) == taken.config


def test_every_rule_is_broken_by_some_adapter() -> None:
    assert len(CASES) >= 70
    elsewhere = {"file.changed"}  # test_inspect.py
    assert {rule for rule, _, _ in CASES} == set(RULES) - elsewhere
    assert len({(rule, name) for rule, name, _ in CASES}) == len(CASES)
