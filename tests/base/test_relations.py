"""Dequantized numbers are those that bitsandbytes computes with, and the errors those of a float64 reference."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bases import write_base

from peftkit.backbone import bnb
from peftkit.backbone.quantize import quantize
from peftkit.base import relations
from peftkit.base.dense import FourBit, dense_tensors
from peftkit.base.identity import identify
from peftkit.base.raw import rounded, widen
from peftkit.base.relations import Relation, decode, measure
from peftkit.errors import BaseError
from peftkit.events import Event, Phase, Progress

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def parent(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "parent"))


def derived(parent: Path, name: str, change: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy of a base whose tensors are replaced by `change`."""
    folder = Path(shutil.copytree(parent, parent.parent / name))
    if change is not None:
        save_file({key: value.contiguous() for key, value in change.items()}, folder / "model.safetensors")
    return folder


def upload(parent: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """What transformers and bitsandbytes save as a quantized upload of a base."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(parent), quantization_config=BitsAndBytesConfig(**options), dtype=dtype
    )
    folder = parent.parent / "upload"
    model.save_pretrained(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(parent / name, folder / name)
    return folder


def reference_error(child: torch.Tensor, parent: torch.Tensor) -> float:
    one, other = child.to(torch.float64), parent.to(torch.float64)
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))


def upstream_4bit(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    sides = {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name + ".")}
    state = bnb.functional.QuantState.from_dict(sides, torch.device("cpu"))
    return bnb.functional.dequantize_4bit(tensors[name], state)


def as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().reshape(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_4_bit_upload_is_dequantized_as_bitsandbytes_does(
    quant_type: str, double: bool, dtype: torch.dtype, parent: Path
) -> None:
    child = upload(parent, dtype, load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double)
    stored, dense = load_file(child / "model.safetensors"), dense_tensors(child)
    original = load_file(parent / "model.safetensors")
    assert dense.keys() == original.keys()
    relation = measure(child, parent)
    assert relation.kind == "bnb-4bit"
    assert not relation.missing + relation.added + relation.reshaped
    quantized = [name for name, tensor in dense.items() if isinstance(tensor, FourBit)]
    assert len(quantized) == 2 * len(PROJECTIONS)
    for name in quantized:
        upstream = upstream_4bit(stored, name)
        assert dense[name].shape == tuple(upstream.shape)
        assert np.array_equal(dense[name].part(), as_numpy(upstream)), name
        assert relation.tensors[name] == pytest.approx(reference_error(upstream, original[name]), rel=1e-5)
        assert 0.05 < relation.tensors[name] < 0.2
    assert relation.exact == (len(original) - len(quantized) if dtype == torch.float32 else 5)  # the norms are ones


def test_an_int8_upload_is_dequantized_as_bitsandbytes_does(parent: Path) -> None:
    child = upload(parent, load_in_8bit=True)
    stored, dense = load_file(child / "model.safetensors"), dense_tensors(child)
    original = load_file(parent / "model.safetensors")
    assert dense.keys() == original.keys()
    relation = measure(child, parent)
    assert relation.kind == "bnb-8bit"
    quantized = [name for name, tensor in dense.items() if tensor.storage == "bnb-8bit"]
    assert len(quantized) == 2 * len(PROJECTIONS)
    for name in quantized:
        upstream = bnb.functional.int8_vectorwise_dequant(stored[name], stored[name.replace("weight", "SCB")])
        assert np.array_equal(dense[name].part(), as_numpy(upstream)), name
        assert relation.tensors[name] == pytest.approx(reference_error(upstream, original[name]), rel=1e-5)
        # Rounding to a step of absmax/127: uniform in ±half a step, for rows of 64 or more normal numbers.
        assert relation.tensors[name] < 0.02
    assert relation.exact == len(original) - len(quantized)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def floats(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


def four_bit(state: dict[str, Any], packed: bytes, absmax: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    text = json.dumps(state).encode()
    return {
        "w": ("U8", [len(packed), 1], packed),
        "w.absmax": ("F32", [len(absmax) // 4], absmax),
        "w.quant_map": ("F32", [1], floats(9e9)),  # bitsandbytes never reads it, and neither may we
        "w.quant_state.bitsandbytes__nf4": ("U8", [len(text)], text),
    }


STATE = {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [3, 11]}


def test_any_stretch_of_an_int8_matrix_has_the_scales_of_its_rows(tmp_path: Path) -> None:
    rows, scales = np.arange(-7, 8, dtype=np.int8).reshape(3, 5), np.float32([127, 254, 12.7])
    tensors = {"x.weight": ("I8", [3, 5], rows.tobytes()), "x.SCB": ("F32", [3], scales.tobytes())}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    found = dense_tensors(tmp_path)
    assert list(found) == ["x.weight"]
    values = (rows * [[1.0], [2.0], [0.1]]).reshape(-1)
    for first in range(15):
        for last in range(first, 17):
            assert np.allclose(found["x.weight"].part(first, last), values[first:last], rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"x.SCB": ("F32", [2], floats(1.0, 1.0))},
        {"x.weight": ("U8", [3, 5], bytes(15))},
        {"x.weight": ("I8", [15], bytes(15))},
        {"x.weight_format": ("U8", [], bytes([2]))},
    ],
)
def test_an_int8_matrix_that_does_not_fit_its_scales_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    whole = {"x.weight": ("I8", [3, 5], bytes(15)), "x.SCB": ("F32", [3], floats(1.0, 1.0, 1.0))}
    write_safetensors(tmp_path / "model.safetensors", whole | change)
    with pytest.raises(BaseError, match=r"quantized x\.weight in"):
        dense_tensors(tmp_path)


def test_two_blocks_of_nf4_worked_by_hand(tmp_path: Path) -> None:
    # 33 numbers: a block of 32 scaled by 2 and one number scaled by 10. The upper half of a byte comes first.
    packed = bytes([0x0F, 0x78, *[0x77] * 14, 0x10])
    write_safetensors(tmp_path / "model.safetensors", four_bit(STATE, packed, floats(2.0, 10.0)))
    found = dense_tensors(tmp_path)
    assert list(found) == ["w"]
    values = found["w"].part()
    expected = [-2.0, 2.0, 0.0, 2 * 0.07958029955625534, *[0.0] * 28, 10 * -0.6961928009986877]
    assert np.allclose(values, expected, rtol=1e-7, atol=0)
    for first in range(33):
        for last in range(first, 36):
            assert np.array_equal(found["w"].part(first, last), values[first:last])


def test_double_quantized_scales_worked_by_hand(tmp_path: Path) -> None:
    tensors = four_bit(STATE | {"nested_blocksize": 1, "nested_offset": 0.5}, bytes([0xFF] * 16 + [0xF0]), floats(0.0))
    tensors["w.absmax"] = ("U8", [2], bytes([3, 255]))
    tensors["w.nested_absmax"] = ("F32", [2], floats(4.0, 8.0))
    tensors["w.nested_quant_map"] = ("F32", [256], floats(*(i / 256 for i in range(256))))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    values = dense_tensors(tmp_path)["w"].part()
    assert np.array_equal(values, np.float32([4 * 3 / 256 + 0.5] * 32 + [8 * 255 / 256 + 0.5]))


@pytest.mark.parametrize(
    ("state", "packed", "absmax", "said"),
    [
        (STATE | {"blocksize": 0}, 17, 2, "blocksize is 0"),
        (STATE | {"blocksize": True}, 17, 2, "blocksize is True"),
        (STATE | {"blocksize": 64}, 17, 2, "2 scales for 33 numbers"),
        (STATE | {"shape": [-3, -11]}, 17, 2, "shape is"),
        (STATE | {"shape": None}, 17, 2, "NoneType"),
        (STATE | {"shape": []}, 17, 2, "shape is"),
        (STATE | {"shape": [1 << 62]}, 17, 2, "2 scales"),
        (STATE | {"dtype": "int8"}, 17, 2, "int8"),
        (STATE, 16, 2, "16 bytes for 33 numbers"),
        (STATE, 17, 1, "1 scales"),
    ],
)
def test_constants_that_do_not_fit_their_weight_are_refused(
    state: dict[str, Any], packed: int, absmax: int, said: str, tmp_path: Path
) -> None:
    tensors = four_bit(state, bytes(packed), floats(*[1.0] * absmax))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(BaseError, match="quantized w in") as caught:
        dense_tensors(tmp_path)
    assert said in caught.value.fact


def test_a_width_that_bitsandbytes_gets_wrong_on_a_cpu_is_right_here(tmp_path: Path) -> None:
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    made = quantize(weight, "nf4", double_quant=False)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 48]}
    tensors = four_bit(state, made.packed.numpy().tobytes(), made.state.absmax.numpy().tobytes())
    write_safetensors(tmp_path / "model.safetensors", tensors)
    error = reference_error(torch.from_numpy(dense_tensors(tmp_path)["w"].part().reshape(8, 48).copy()), weight)
    assert 0.05 < error < 0.15


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
def test_rounding_is_that_of_torch_for_every_pattern(name: str, dtype: torch.dtype) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    bits = np.concatenate([patterns << 16, (patterns << 16) | 0x8000, (patterns << 16) | 0x7FFF, patterns * 65537])
    values = bits.astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        found = rounded(values, name)
    assert np.array_equal(found, as_numpy(torch.from_numpy(values).to(dtype)), equal_nan=True)
    exact = widen(patterns.astype(np.uint16))
    assert np.array_equal(
        exact, torch.from_numpy(patterns.astype(np.int16)).view(torch.bfloat16).float().numpy(), equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_cast_is_told_apart_from_a_change(dtype: torch.dtype, parent: Path) -> None:
    original = load_file(parent / "model.safetensors")
    cast = {name: tensor.to(dtype) for name, tensor in original.items()}
    relation = measure(derived(parent, "cast", cast), parent)
    assert relation.kind == "cast"
    for name, tensor in original.items():
        assert relation.tensors[name] == pytest.approx(reference_error(cast[name], tensor), rel=1e-5)
    assert relation.max <= {torch.float64: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    back = measure(parent, parent.parent / "cast")
    assert back.kind == ("cast" if dtype == torch.float64 else "other")  # what was rounded away does not come back
    name = "model.layers.1.mlp.up_proj.weight"
    cast[name] = torch.nextafter(cast[name].clone(), torch.full_like(cast[name], 9.0))
    assert measure(derived(parent, "changed", cast), parent).kind == "other"


def test_errors_over_many_pieces_are_those_of_the_whole(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = load_file(parent / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    noisy = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in original.items()}
    child = derived(parent, "noisy", noisy)
    whole = measure(child, parent)
    monkeypatch.setattr(relations, "_STEP", 4096)
    pieces = measure(child, parent)
    assert pieces == whole
    assert whole.kind == "other"
    assert whole.exact == 0
    for name, tensor in original.items():
        assert whole.tensors[name] == pytest.approx(reference_error(noisy[name], tensor), rel=1e-5)
    assert whole.max == max(whole.tensors.values())
    assert whole.median == pytest.approx(float(np.median(list(whole.tensors.values()))))


def test_a_quantized_tensor_in_pieces_is_the_whole(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = upload(parent, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    whole = measure(child, parent)
    monkeypatch.setattr(relations, "_STEP", 1000)  # no multiple of a block
    assert measure(child, parent) == whole


def test_the_same_weights_in_other_files_are_exact(parent: Path) -> None:
    original = load_file(parent / "model.safetensors")
    child = derived(parent, "same")
    (child / "model.safetensors").unlink()
    names = sorted(original)
    save_file({name: original[name] for name in names[::2]}, child / "a.safetensors")
    save_file({name: original[name] for name in names[1::2]}, child / "b.safetensors")
    (child / "chat_template.jinja").write_text("{{ messages }}")
    relation = measure(child, parent)
    assert relation.kind == "same-weights"
    assert relation.exact == len(relation.tensors) == len(original)
    assert relation.max == relation.median == 0
    assert relation.child != relation.parent  # the template is part of a base
    assert relation.describe() == f"same-weights: {len(original)} of {len(original)} tensors are exact"


def test_what_only_one_has_or_has_in_another_shape_is_named_and_not_measured(parent: Path) -> None:
    original = load_file(parent / "model.safetensors")
    changed = dict(original)
    table = changed.pop("model.embed_tokens.weight")
    del changed["model.norm.weight"]
    changed |= {"model.embed_tokens.weight": torch.cat([table, table[:2]]), "lm_head.weight": table}
    relation = measure(derived(parent, "resized", changed), parent)
    assert relation.kind == "other"
    assert (relation.missing, relation.added) == (("model.norm.weight",), ("lm_head.weight",))
    assert relation.reshaped == ("model.embed_tokens.weight",)
    assert len(relation.tensors) == relation.exact == len(original) - 2
    assert relation.describe().endswith("; 1 missing; 1 added; 1 of another shape")


def test_a_zero_tensor_has_a_finite_error(parent: Path) -> None:
    original = load_file(parent / "model.safetensors")
    name = "model.norm.weight"
    zeros = derived(parent, "zeros", original | {name: torch.zeros_like(original[name])})
    assert measure(zeros, zeros).tensors[name] == 0
    assert measure(parent, zeros).tensors[name] == 1
    assert measure(zeros, parent).tensors[name] == 1
    tiny = derived(parent, "tiny", original | {name: torch.full_like(original[name], 1e-45)})
    relation = measure(tiny, zeros)
    assert relation.tensors[name] == 1
    assert relation.exact == len(original) - 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(value: float, parent: Path) -> None:
    original = load_file(parent / "model.safetensors")
    broken = original["model.norm.weight"].clone()
    broken[3] = value
    child = derived(parent, "broken", original | {"model.norm.weight": broken})
    for pair in ((child, parent), (parent, child)):
        with pytest.raises(BaseError, match=r"model\.norm\.weight cannot be compared"):
            measure(*pair)


def test_a_change_too_small_to_be_squared_is_not_called_exact(parent: Path) -> None:
    original = load_file(parent / "model.safetensors")
    one = derived(parent, "one", original | {"more": torch.tensor([1.0, 0.0], dtype=torch.float64)})
    other = derived(parent, "other", original | {"more": torch.tensor([1.0, 1e-200], dtype=torch.float64)})
    relation = measure(one, other)
    assert 0 < relation.tensors["more"] < 1e-100
    assert relation.exact == len(original)


def test_the_same_infinities_in_both_are_no_difference(parent: Path) -> None:
    original = load_file(parent / "model.safetensors")
    mask = {"mask": torch.tensor([0.0, float("-inf")])}
    one, other = derived(parent, "one", original | mask), derived(parent, "other", original | mask)
    assert measure(one, other).kind == "same-weights"


def test_unrelated_bases_are_refused(parent: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "wide", hidden_size=128)
    with pytest.raises(BaseError, match="are not related"):
        measure(other, parent)
    original = load_file(parent / "model.safetensors")
    renamed = derived(parent, "renamed", {f"other.{name}": tensor for name, tensor in original.items()})
    with pytest.raises(BaseError, match="0 tensor names in common"):
        measure(renamed, parent)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseError) as caught:
        measure(tmp_path / "m.gguf", parent)
    assert "converted" in str(caught.value.expected)


def test_a_dtype_that_numpy_lacks_is_refused_by_name(parent: Path) -> None:
    original = load_file(parent / "model.safetensors")
    odd = original["model.norm.weight"].to(torch.float8_e4m3fn)
    child = derived(parent, "odd", original | {"model.norm.weight": odd})
    with pytest.raises(BaseError, match="F8_E4M3"):
        measure(child, parent)


def test_progress_is_reported_and_a_second_measurement_reads_no_digest_again(parent: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    child = derived(parent, "child")
    relation = measure(child, parent, kind="gguf", cache=tmp_path / "cache", report=events.append)
    assert relation.kind == "gguf"
    assert events[0] == Phase("comparing tensors", len(relation.tensors), "tensors")
    assert [event.done for event in events if isinstance(event, Progress)] == list(range(1, len(relation.tensors) + 1))
    assert len(list((tmp_path / "cache" / "identity").iterdir())) == 2
    assert (relation.child, relation.parent) == (identify(child).record.sha256, identify(parent).record.sha256)


RELATION = Relation(
    "a" * 64,
    "b" * 64,
    "gguf",
    {"w": 0.0, "x": 0.0123456, "y": 1e-300},
    ("m",),
    ("lm_head.weight", "\x1b\x9b"),
    ("e",),
)


def test_a_relation_survives_its_encoding_and_no_flipped_bit_passes() -> None:
    data = RELATION.encode()
    assert decode(data) == RELATION
    assert decode(data).tensors == RELATION.tensors
    assert RELATION.id == RELATION.sha256[:16]
    refused = 0
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert decode(bytes(flipped)).id != RELATION.id
        except BaseError:
            refused += 1
    assert len(data) * 8 > refused > len(data) * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "guess"}, "kind is 'guess'"),
        ({"kind": ["gguf"]}, "kind is"),
        ({"child": "a" * 16}, "SHA-256"),
        ({"tensors": {}}, "one error or more"),
        ({"tensors": {"w": -1.0}}, "one error or more"),
        ({"tensors": {"w": True}}, "one error or more"),
        ({"tensors": {"w": None}}, "one error or more"),
        ({"missing": "w"}, "missing must be"),
        ({"added": [1]}, "added must be"),
        ({"format": "peftkit/9"}, "peftkit/9"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_a_relation_that_does_not_follow_the_format_is_refused(change: dict[str, Any], said: str) -> None:
    plain = json.loads(RELATION.encode()) | change
    with pytest.raises(BaseError) as caught:
        decode(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    assert said in caught.value.fact
    assert caught.value.fact.isprintable()
