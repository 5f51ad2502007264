"""A record has one spelling, no flipped bit passes, and two records say in words what differs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from peftkit.base.identity import identify
from peftkit.base.record import PARTS, BaseRecord, TensorDigest, decode, explain
from peftkit.errors import BaseError


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tensors(**changes: TensorDigest) -> dict[str, TensorDigest]:
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.w" for i in range(5)), "model.norm.weight"]
    return {name: TensorDigest("BF16", (49152, 8), digest(name)) for name in names} | changes


@pytest.fixture
def record() -> BaseRecord:
    return BaseRecord(
        config={"model_type": "llama", "rope_theta": 10000, "rope_scaling": {"factor": 2.0, "type": "linear"}},
        tokenizer=digest("tokenizer"),
        special_tokens={"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>", "lstrip": False}},
        chat_template="{% for m in messages %}\n{{ m }}\n{% endfor %} é\n",
        tensors=tensors(),
    )


def test_a_record_survives_its_encoding(record: BaseRecord, tiny_base: Path) -> None:
    real = identify(tiny_base).record
    assert len(real.tensors) > 10
    for whole in (record, real, replace(record, chat_template=None, config={}, special_tokens={}, tensors={})):
        again = decode(whole.encode())
        assert again == whole
        assert again.encode() == whole.encode()
        assert (again.id, again.parts(), again.shapes()) == (whole.id, whole.parts(), whole.shapes())
        assert explain(whole, again) == []


def test_id_and_encoding_are_what_the_format_says(record: BaseRecord) -> None:
    data = record.encode()
    plain = json.loads(data)
    assert data == json.dumps(plain, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"
    assert set(plain) == {"format", "config", "tokenizer", "special_tokens", "chat_template", "tensors"}
    assert plain["tensors"]["model.norm.weight"] == {
        "dtype": "BF16",
        "shape": [49152, 8],
        "sha256": digest("model.norm.weight"),
    }
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert record.id == record.sha256[:16]
    assert tuple(record.parts()) == PARTS
    assert record.parts()["chat_template"] == digest(json.dumps(record.chat_template))
    assert record.parts()["tokenizer"] == record.tokenizer


def test_values_that_python_takes_for_equal_are_other_records(record: BaseRecord) -> None:
    for value in (1, 1.0, True):
        assert [value == other for other in (1, 1.0, True)] == [True, True, True]
    records = {replace(record, config={"a": value}) for value in (1, 1.0, True, "1", None)}
    assert len(records) == 5
    assert replace(record, config={"a": 1}) != replace(record, config={"a": 1.0})
    assert explain(replace(record, config={"a": 1}), replace(record, config={"a": True})) == [
        "the weights are the same",
        "config: a 1 → true",
    ]


def test_every_flipped_bit_is_refused_or_changes_the_id(record: BaseRecord) -> None:
    small = replace(record, tensors={"w": TensorDigest("F32", (2, 3), digest("w"))}, chat_template="{{ é }}")
    data = small.encode()
    refused = 0
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            other = decode(bytes(flipped))
        except BaseError:
            refused += 1
        else:
            assert other.id != small.id
            assert other.encode() == bytes(flipped)
    assert len(data) * 8 > refused > len(data) * 4


def test_every_truncation_and_addition_is_refused(record: BaseRecord) -> None:
    data = record.encode()
    for length in range(len(data)):
        with pytest.raises(BaseError):
            decode(data[:length])
    for more in (b"\n", b" ", b"\0", b"{}"):
        with pytest.raises(BaseError):
            decode(data + more)


def edited(record: BaseRecord, change: Callable[[dict[str, Any]], object]) -> bytes:
    plain = json.loads(record.encode())
    change(plain)
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("tokenizer"), "'tokenizer' is missing"),
        (lambda r: r.update(more=1), "'more' is unknown"),
        (lambda r: r.update(format="peftkit/2"), "format is 'peftkit/2'"),
        (lambda r: r.update(format=["peftkit/1"]), "format is"),
        (lambda r: r.update(config=[]), "must be objects"),
        (lambda r: r.update(special_tokens=None), "must be objects"),
        (lambda r: r.update(tokenizer=None), "SHA-256"),
        (lambda r: r.update(tokenizer="A" * 64), "SHA-256"),
        (lambda r: r.update(chat_template=1), "chat_template"),
        (lambda r: r.update(tensors=[]), "tensors must be an object"),
        (lambda r: r["tensors"].update(w=1), "'w' is not an object"),
        (lambda r: r["tensors"].update(w={}), "'dtype' is missing"),
        (lambda r: r["tensors"]["model.norm.weight"].update(shape=[True]), "shape"),
        (lambda r: r["tensors"]["model.norm.weight"].update(shape=[-1]), "shape"),
        (lambda r: r["tensors"]["model.norm.weight"].update(shape=[1.0]), "shape"),
        (lambda r: r["tensors"]["model.norm.weight"].update(shape=[1 << 63]), "shape"),
        (lambda r: r["tensors"]["model.norm.weight"].update(shape="12"), "shape"),
        (lambda r: r["tensors"]["model.norm.weight"].update(dtype=None), "no dtype"),
        (lambda r: r["tensors"]["model.norm.weight"].update(sha256="0" * 63), "SHA-256"),
        (lambda r: r["tensors"]["model.norm.weight"].update(offset=0), "'offset' is unknown"),
    ],
)
def test_a_record_that_does_not_follow_the_format_is_refused_with_the_reason(
    change: Callable[[dict[str, Any]], object], said: str, record: BaseRecord
) -> None:
    with pytest.raises(BaseError) as caught:
        decode(edited(record, change))
    assert said in caught.value.fact
    assert caught.value.expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null\n",
        b"[]\n",
        b"\xff\n",
        b'{"a":NaN}\n',
        b"[" * 100_000,
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'{"format":"peftkit/1","format":"peftkit/1"}',
        b"1" * 10_000,
        b'{"format":"\\u001b[31m\\n"}',
    ],
)
def test_hostile_bytes_are_refused_on_one_plain_line(data: bytes) -> None:
    with pytest.raises(BaseError) as caught:
        decode(data)
    assert caught.value.fact.isprintable()
    assert len(caught.value.fact) < 300


def test_other_spellings_of_the_same_record_are_refused(record: BaseRecord) -> None:
    plain = json.loads(record.encode())
    for data in (
        json.dumps(plain, sort_keys=True).encode() + b"\n",
        json.dumps(dict(reversed(plain.items())), separators=(",", ":")).encode() + b"\n",
        json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n",
        record.encode().replace(b"2.0", b"2.00"),
    ):
        assert json.loads(data) == plain
        assert data != record.encode()
        with pytest.raises(BaseError, match="canonical"):
            decode(data)


EMBED = "model.embed_tokens.weight"


def test_the_named_sentences(record: BaseRecord) -> None:
    other = digest("other")

    def against(**changes: Any) -> list[str]:
        return explain(record, replace(record, **changes))

    assert against(chat_template="{% for m in messages %}\n{{ m }}!\n{% endfor %} é\n") == [
        "the weights are the same",
        "the chat template differs (first at line 2: '{{ m }}' → '{{ m }}!')",
    ]
    assert against(chat_template=None)[1:] == ["the chat template is missing"]
    assert explain(replace(record, chat_template=None), record)[1:] == ["the chat template is added"]
    assert against(tokenizer=other)[1:] == ["the tokenizer differs"]
    assert against(special_tokens={"eos_token": "</s>"})[1:] == [
        'special tokens: eos_token "<|im_end|>" → "</s>"',
        'special tokens: pad_token.content "<pad>" → absent',
        "special tokens: pad_token.lstrip false → absent",
    ]
    assert against(config={**record.config, "rope_theta": 100000})[1:] == ["config: rope_theta 10000 → 100000"]
    resized = {
        EMBED: TensorDigest("BF16", (49154, 8), other),
        "lm_head.weight": TensorDigest("BF16", (49154, 8), other),
    }
    assert against(tensors=tensors() | resized) == [
        "lm_head.weight is added",
        f"embedding rows 49152 → 49154 ({EMBED})",
    ]
    assert explain(replace(record, tensors=tensors() | resized), record)[0] == "lm_head.weight is missing"
    cast = {name: replace(tensor, dtype="F16", sha256=other) for name, tensor in record.tensors.items()}
    assert against(tensors=cast) == ["all tensors stored as F16 instead of BF16"]
    one = {**tensors(), EMBED: replace(record.tensors[EMBED], dtype="F32", sha256=other)}
    assert against(tensors=one) == ["tensors: 1 of 7 stored as F32 instead of BF16"]
    layers = {f"model.layers.{i}.w": TensorDigest("BF16", (49152, 8), other) for i in range(5)}
    assert against(tensors=tensors() | layers) == [
        "tensors: 5 of 7 differ in their bytes (model.layers.0.w, model.layers.1.w, model.layers.2.w …)"
    ]
    norm = {"model.norm.weight": TensorDigest("BF16", (8,), other)}
    assert against(tensors=tensors() | norm) == ["model.norm.weight has the shape [49152, 8] → [8]"]
    assert against(tensors={}) == [f"tensors: 7 of 7 are missing ({EMBED}, model.layers.0.w, model.layers.1.w …)"]


def test_weights_are_named_before_config_tokenizer_tokens_and_template(record: BaseRecord) -> None:
    other = BaseRecord({}, digest("x"), {}, "", tensors() | {EMBED: TensorDigest("BF16", (1, 8), digest("x"))})
    starts = [sentence.split(" ")[0] for sentence in explain(record, other)]
    assert starts == ["embedding", *["config:"] * 4, "the", *["special"] * 3, "the"]


def test_a_difference_is_never_without_a_sentence(record: BaseRecord) -> None:
    pairs = [
        (replace(record, config={"a.b": 1}), replace(record, config={"a": {"b": 1}})),
        (replace(record, config={"a": {}}), replace(record, config={})),
        (replace(record, config={"a": 1}), replace(record, config={"a": 1.0})),
        (replace(record, config={"a": None}), replace(record, config={})),
        (replace(record, chat_template="a\n"), replace(record, chat_template="a")),
        (replace(record, chat_template=""), replace(record, chat_template=None)),
        (replace(record, special_tokens={"a": "absent"}), replace(record, special_tokens={})),
    ]
    for one, other in pairs:
        assert len(explain(one, other)) == len(explain(other, one)) == 2
    assert (
        explain(replace(record, config={"a": [{"x": 1, "y": 2}]}), replace(record, config={"a": [{"y": 2, "x": 1}]}))
        == []
    )


def test_many_differences_are_counted_and_not_listed(record: BaseRecord) -> None:
    many = replace(record, config={f"key{i}": i for i in range(100)}, tensors={})
    other = replace(record, config={f"key{i}": i + 1 for i in range(100)})
    sentences = explain(many, other)
    assert len(sentences) == 10
    assert sentences[-1] == "config: 92 more differ"


def test_hostile_text_stays_on_one_short_line(record: BaseRecord) -> None:
    nasty = "\x1b[31m\r\n\u202e\u2028\0\x9b" * 1000
    hostile = BaseRecord(
        config={nasty: nasty, "rope_theta": 10000, "rope_scaling": {nasty: [nasty]}},
        tokenizer=digest("x"),
        special_tokens={"eos_token": nasty},
        chat_template=nasty + record.chat_template if record.chat_template else nasty,
        tensors={
            EMBED: TensorDigest(nasty, (1 << 62,) * 500, digest("x")),
            nasty: TensorDigest(nasty, (), digest("x")),
        },
    )
    assert decode(hostile.encode()) == hostile
    for sentences in (explain(record, hostile), explain(hostile, record)):
        assert len(sentences) > 8
        for sentence in sentences:
            assert sentence.isprintable()
            assert len(sentence) < 600


@pytest.mark.parametrize("rows", [257, 261])
def test_a_resized_base_on_disk_is_described_by_its_rows(rows: int, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    loaded = load_file(base / "model.safetensors")
    before = identify(base).record
    table = loaded[EMBED]
    loaded[EMBED] = table.new_zeros(rows, table.shape[1])
    save_file(loaded, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    assert explain(before, identify(base).record) == [
        f"embedding rows 259 → {rows} ({EMBED})",
        f"config: vocab_size 259 → {rows}",
    ]
