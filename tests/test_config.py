"""Settings: precedence, sources, strictness, and problems in plain words."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from peftkit.config import Spec, dump_yaml, json_schema, resolve
from peftkit.errors import ConfigError


class Mode(Enum):
    fast = "fast"
    exact = "exact"


class Base(Spec):
    shorthand: ClassVar[str] = "source"
    source: str = "tiny"
    revision: str | None = None


class Train(Spec):
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    dropout: float = Field(0.0, ge=0, lt=1)
    steps: int | Literal["auto"] = "auto"
    seed: int = 0
    note: str | None = None


class Quant(Spec):
    bits: Literal[4, 8, 16] = 4
    double: bool = True


class Config(Spec):
    base: Base = Base()
    save_as: str = "x"
    mode: Mode = Mode.fast
    targets: list[str] | Literal["all-linear"] = "all-linear"
    columns: dict[str, str] = {"prompt": "prompt"}
    extra: dict[str, Any] = {}
    out: Path | None = None
    train: Train = Train(seed=7)
    quant: Quant | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.save_as == "forbidden":
            raise ValueError("save_as=forbidden is refused")
        return self


class Needy(Spec):
    class Data(Spec):
        train: str
        rows: int

    data: Data


def over(*overrides: str) -> Config:
    return resolve(Config, overrides=overrides).config


def problems(model: type[Spec] = Config, **sources: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(model, **sources)
    text = str(caught.value)
    assert not any(word in text for word in ("Input should", "pydantic", "http", "type=", "Value error"))
    return caught.value.problems


# -- precedence and sources


PLAIN = {"train.learning_rate": 1e-5, "train.seed": 3, "save_as": "name", "quant.bits": 8, "base.source": "b"}
LAYERS = ["preset", "first", "second", "command line"]


@given(
    st.dictionaries(st.sampled_from(sorted(PLAIN)), st.sets(st.sampled_from(LAYERS), min_size=1)),
    st.booleans(),
)
@settings(max_examples=150)
def test_the_last_layer_that_sets_a_key_wins_and_is_named(tmp_path_factory, chosen, nested) -> None:
    def value_in(key: str, layer: str) -> Any:
        index = LAYERS.index(layer)
        variants = {"quant.bits": [4, 8, 16, 4], "save_as": list("abcd"), "base.source": list("efgh")}
        return variants.get(key, [1, 2, 3, 4])[index]

    folder = tmp_path_factory.mktemp("layers")
    data: dict[str, dict[str, Any]] = {layer: {} for layer in LAYERS}
    for key, layers in chosen.items():
        for layer in layers:
            data[layer][key] = value_in(key, layer)
    files = [folder / "first", folder / "second"]
    for path in files:
        path.write_text(dump_yaml(unfold(data[path.name]) if nested else data[path.name]))
    resolved = resolve(
        Config, presets={"p": data["preset"]}, preset="p", files=files,
        overrides=[f"{key}={value}" for key, value in data["command line"].items()],
    )  # fmt: skip
    names = {"preset": "preset p", "first": f"file {files[0]}", "second": f"file {files[1]}"}
    values = {key: (value, source) for key, value, source in resolved.rows()}
    defaults = {key: value for key, value, _ in resolve(Config).rows()}
    for key in PLAIN:
        last = max(chosen.get(key, ()), key=LAYERS.index, default=None)
        if last:
            assert values[key] == (value_in(key, last), names.get(last, last))
        elif key in values and key in defaults:
            assert values[key] == (defaults[key], "default")
    assert [key for key, _, _ in resolved.rows()] == list(resolved.sources)


def unfold(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return tree


words = st.sampled_from(
    [
        "null",
        "1e-5",
        "no",
        "010",
        "1:30",
        "~",
        "true",
        "a: b",
        "#x",
        "é",
        "- a",
        "",
        " a ",
        "2024-01-01",
        "\x85",
        "a\u2028 b",
        "\r\n",
    ]
)


@given(st.one_of(words, st.text(max_size=8)), st.lists(words, max_size=3), st.floats(1e-12, 1e12), words, st.booleans())
@settings(max_examples=150)
def test_as_dict_written_as_yaml_resolves_to_the_same_config(
    tmp_path_factory, name, targets, rate, note, quant
) -> None:
    config = Config(
        save_as=name, targets=targets, extra={"k": note, "n": [1, 2.5, None, True]}, columns={note: name},
        train=Train(learning_rate=rate, note=note), quant=Quant(bits=8) if quant else None, mode=Mode.exact,
        out=Path("a"),
    ) if name != "forbidden" else Config()  # fmt: skip
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    plain = config.model_dump(mode="json")
    path.write_text(dump_yaml(plain), encoding="utf-8")
    again = resolve(Config, files=[path])
    assert again.config == config
    assert again.as_dict() == plain
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == plain


def test_rows_come_in_field_order_with_every_leaf_and_its_source() -> None:
    rows = resolve(Config, presets={"p": {"train": {"seed": 1}}}, preset="p", overrides=["quant.bits=8"]).rows()
    assert [key for key, _, _ in rows] == [
        "base.source", "base.revision", "save_as", "mode", "targets", "columns", "extra", "out", "train.learning_rate",
        "train.dropout", "train.steps", "train.seed", "train.note", "quant.bits", "quant.double",
    ]  # fmt: skip
    assert ("train.seed", 1, "preset p") in rows
    assert ("quant.bits", 8, "command line") in rows
    assert ("quant.double", True, "default") in rows
    assert ("out", None, "default") in rows


def test_a_group_keeps_what_its_default_instance_sets() -> None:
    assert over("train.note=x").train == Train(seed=7, note="x")
    assert over("train.seed=1").train.seed == 1


def test_digest_is_sha256_of_canonical_json_and_ignores_where_values_came_from() -> None:
    class Two(Spec):
        b: float = 1
        a: str = "é"

    expected = hashlib.sha256('{"a":"é","b":1.0}'.encode()).hexdigest()
    assert resolve(Two).digest == expected == resolve(Two, overrides=["b=1"]).digest
    assert resolve(Two, overrides=["b=2"]).digest != expected


# -- reading values


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-5", "train.learning_rate", 1e-5),
        ("train.learning_rate=2E4", "train.learning_rate", 20000.0),
        ("train.learning_rate=.5", "train.learning_rate", 0.5),
        ("train.seed=1_000", "train.seed", 1000),
        ("train.seed=010", "train.seed", 10),
        ("train.seed=1e3", "train.seed", 1000),
        ("train.seed=0x1F", "train.seed", 31),
        ("train.steps=auto", "train.steps", "auto"),
        ("train.steps=5", "train.steps", 5),
        ("save_as=null", "save_as", "null"),
        ("save_as=123", "save_as", "123"),
        ("save_as=1e-5", "save_as", "1e-5"),
        ("save_as=a: b #c", "save_as", "a: b #c"),
        ('save_as="q"', "save_as", '"q"'),
        ("save_as=a=b", "save_as", "a=b"),
        ("save_as=", "save_as", ""),
        ("train.note=null", "train.note", None),
        ("train.note=", "train.note", None),
        ('train.note="null"', "train.note", "null"),
        ("train.note=12", "train.note", "12"),
        ("train.note=[INST] x", "train.note", "[INST] x"),
        ("train.note=a #b", "train.note", "a #b"),
        ("out=~", "out", None),
        ("out=~/x", "out", Path("~/x")),
        ("mode=exact", "mode", Mode.exact),
        ("targets=[q_proj, 1, null]", "targets", ["q_proj", "1", "null"]),
        ("columns.prompt=question", "columns", {"prompt": "question"}),
        ("columns.a.b=c", "columns", {"prompt": "prompt", "a.b": "c"}),
        ("columns={x: y}", "columns", {"x": "y"}),
        ("extra.rate=1e-5", "extra", {"rate": 1e-5}),
        ("extra.day=2024-01-01", "extra", {"day": "2024-01-01"}),
        ("extra.no=no", "extra", {"no": "no"}),
        ("quant={bits: 8, double: false}", "quant.double", False),
        ("base=Qwen/Qwen3-4B", "base.source", "Qwen/Qwen3-4B"),
        ("base=123", "base.source", "123"),
        ("quant.double=no", "quant.double", False),
    ],
)
def test_one_override(override: str, key: str, value: Any) -> None:
    rows = {name: (found, source) for name, found, source in resolve(Config, overrides=[override]).rows()}
    assert rows[key] == (value, "command line")
    assert type(rows[key][0]) is type(value)


def test_yaml_scalars_follow_the_field_too(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("save_as: 007\ntrain: {learning_rate: 1e-5, note: no}\nbase: 42\ntargets: [1]\nout:\n")
    config = resolve(Config, files=[path]).config
    assert (config.save_as, config.train.learning_rate, config.train.note) == ("007", 1e-5, "no")
    assert (config.base.source, config.targets, config.out) == ("42", ["1"], None)


def test_words_that_look_like_numbers_where_only_words_are_allowed() -> None:
    class Coded(Spec):
        code: Literal["4", "8"] = "4"
        paths: list[Path] = []

    config = resolve(Coded, overrides=["code=8", "paths=[1, null]"]).config
    assert (config.code, config.paths) == ("8", [Path("1"), Path("null")])


def test_a_preset_may_hold_python_values() -> None:
    preset = {"out": Path("~/x"), "mode": Mode.exact, "targets": ("a", "b"), "train.note": "null", "save_as": "1e-5"}
    config = resolve(Config, presets={"p": preset}, preset="p").config
    assert (config.out, config.mode, config.targets) == (Path("~/x"), Mode.exact, ["a", "b"])
    assert (config.train.note, config.save_as) == ("null", "1e-5")


def test_a_group_can_be_taken_away_and_brought_back() -> None:
    preset = {"presets": {"p": {"quant": {"bits": 8, "double": False}}}, "preset": "p"}
    assert resolve(Config, **preset, overrides=["quant=null"]).config.quant is None
    assert resolve(Config, **preset, overrides=["quant=null", "quant.bits=16"]).config.quant == Quant(bits=16)
    assert resolve(Config, overrides=["quant=null"]).sources["quant"] == "command line"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("# only a comment\n")
    (tmp_path / "b").write_text("")
    assert resolve(Config, files=[tmp_path / "a", tmp_path / "b"]).config == Config()


# -- problems


def test_all_problems_of_all_sources_come_at_once_with_line_and_value(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train:\n  learning_rate: -1\n  sed: 3\nquant.bits: 3\n")
    found = problems(
        presets={"cpu": {"train.dropout": 1.5}}, preset="cpu", files=[path, tmp_path / "none.yaml"],
        overrides=["learning_rate=1e-4", "oops", "train.steps=1.5", "targets=[[1], b]"],
    )  # fmt: skip
    assert found == [
        f"train.sed: unknown setting; did you mean train.seed? (from file {path}, line 3)",
        f"file {tmp_path / 'none.yaml'}: cannot be read (No such file or directory)",
        "learning_rate: unknown setting; did you mean train.learning_rate? (from command line)",
        "'oops': an override is written key=value (from command line)",
        "targets[0]: must be text, got [1] (from command line)",
        f"train.learning_rate: must be greater than 0, got -1 (from file {path}, line 2)",
        "train.dropout: must be at least 0 and less than 1, got 1.5 (from preset cpu)",
        "train.steps: must be a whole number or 'auto', got 1.5 (from command line)",
        f"quant.bits: must be one of 4, 8 or 16, got 3 (from file {path}, line 4)",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.lerning_rate=1", "train.lerning_rate: unknown setting; did you mean train.learning_rate?"),
        ("trian.learning_rate=1", "trian.learning_rate: unknown setting; did you mean train.learning_rate?"),
        ("lerning_rate=1", "lerning_rate: unknown setting; did you mean train.learning_rate?"),
        ("sed=1", "sed: unknown setting; did you mean train.seed?"),
        ("seed=1", "seed: unknown setting; did you mean train.seed?"),
        ("quant.zzz=1", "quant.zzz: unknown setting; quant may hold quant.bits, quant.double"),
        ("save_as.x=1", "save_as.x: unknown setting; did you mean save_as?"),
        ("=1", "'=1': an override is written key=value"),
        ("train.seed=true", "train.seed: must be a whole number, got 'true'"),
        ("train.seed=[1", "train.seed: must be a whole number, got '[1'"),
        ("train.learning_rate=.nan", "train.learning_rate: must be a finite number greater than 0, got nan"),
        ("train.learning_rate=abc", "train.learning_rate: must be a number greater than 0, got 'abc'"),
        ("train.learning_rate=null", "train.learning_rate: must be a number greater than 0, got null"),
        ("quant=5", "quant: must be a group of settings (bits, double), got 5"),
        ("quant.double=maybe", "quant.double: must be true or false, got 'maybe'"),
        ("mode=slow", "mode: must be one of 'fast' or 'exact', got 'slow'"),
        ("columns={a: [1]}", "columns.a: must be text, got [1]"),
        ("columns=x", "columns: must be a mapping such as {a: b}, got 'x'"),
        ("train.seed=!!python/name:os.system x", "train.seed: the YAML tag tag:yaml.org,2002:python/name:os.system is"),
    ],
)
def test_one_problem(override: str, problem: str) -> None:
    found = problems(overrides=[override])
    assert len(found) == 1
    assert found[0].startswith(problem)
    assert found[0].endswith("(from command line)")


def test_an_equal_leaf_and_a_close_key_are_both_offered() -> None:
    class One(Spec):
        rate: float = 1

    class Many(Spec):
        rates: float = 1

    class Both(Spec):
        one: One = One()
        many: Many = Many()

    assert problems(Both, overrides=["many.rate=1"]) == [
        "many.rate: unknown setting; did you mean one.rate or many.rates? (from command line)"
    ]


def test_missing_settings_are_named_one_by_one_but_not_guessed_after_an_unreadable_file(tmp_path: Path) -> None:
    assert problems(Needy) == ["data.train: required, but not set", "data.rows: required, but not set"]
    assert problems(Needy, overrides=["data.train=x"]) == ["data.rows: required, but not set"]
    assert len(problems(Needy, files=[tmp_path / "none"])) == 1
    assert problems(Needy, preset="gpu", presets={"8gb": {}, "cpu": {}}) == [
        "preset 'gpu': unknown; presets here: 8gb, cpu"
    ]


def test_a_rule_between_settings_speaks_in_its_own_words() -> None:
    assert problems(overrides=["save_as=forbidden"]) == ["settings: save_as=forbidden is refused"]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("save_as: a\nsave_as: b\n", "save_as: given twice (from {file}, lines 1 and 2)"),
        ("train:\n  seed: 1\ntrain.seed: 2\n", "train.seed: given twice (from {file}, lines 2 and 3)"),
        ("extra:\n  a: {b: 1, b: 2}\n", "extra.a.b: given twice (from {file}, lines 2 and 2)"),
        ("train: [1\n", "{file}: line 2: is not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("- a\n", "{file}: must hold lines of `key: value`"),
        ("a: \x07\n", "{file}: is not valid YAML (unacceptable character #x0007: special characters are not allowed)"),
        ("? [a]\n: b\n", "{file}: a name of a setting must be a word, not a list or a mapping"),
        ("extra: &x {a: *x}\n", "{file}: nests too deeply, or an alias holds itself"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, end: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert problems(files=[path]) == [end.format(file=f"file {path}")]


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes("save_as: é".encode("latin-1"))
    assert problems(files=[path]) == [f"file {path}: is not UTF-8 text (byte 9)"]


@given(st.lists(st.text(max_size=20), max_size=4))
@settings(max_examples=200)
def test_no_override_ever_fails_with_anything_but_a_config_error(texts: list[str]) -> None:
    keys = ["train.learning_rate=", "targets=", "extra.", "base=", "quant="]
    problems, config = [], None
    try:
        config = resolve(Config, overrides=[*texts, *(key + text for key in keys for text in texts)]).config
    except ConfigError as error:
        problems = error.problems
    assert bool(problems) != isinstance(config, Config)


# -- A group whose defaults belong to one of its fields


class Shape(Spec):
    """A circle has a radius, a box has a side."""

    selector = "kind"

    kind: Literal["circle", "box"] = "circle"
    radius: float | None = None
    side: float | None = None

    @model_validator(mode="after")
    def _its_own(self) -> Self:
        if self.kind == "box" and self.radius is not None:
            raise ValueError(f"a box has no radius (given: {self.radius:g})")
        return self


class Drawing(Spec):
    """A recipe with a default circle."""

    shape: Shape = Shape(kind="circle", radius=2.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], Shape(kind="circle", radius=2.0)),
        (["shape.kind=circle"], Shape(kind="circle", radius=2.0)),
        (["shape.kind=box"], Shape(kind="box")),
        (["shape.kind=box", "shape.side=3"], Shape(kind="box", side=3.0)),
    ],
)
def test_another_kind_leaves_out_the_defaults_of_the_first(overrides: list[str], expected: Shape) -> None:
    assert resolve(Drawing, overrides=overrides).config.shape == expected


def test_what_was_asked_for_is_never_left_out() -> None:
    with pytest.raises(ConfigError, match="a box has no radius"):
        resolve(Drawing, overrides=["shape.kind=box", "shape.radius=2"])


# -- Spec and schema


def test_specs_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        Train(sed=1)
    with pytest.raises(ValidationError):
        Train().seed = 2
    with pytest.raises(ValidationError):
        Train(learning_rate=float("inf"))


def test_two_groups_in_one_field_are_refused_when_the_program_is_written() -> None:
    class Either(Spec):
        part: Train | Quant = Train()

    with pytest.raises(TypeError, match=r"Either\.part"):
        resolve(Either)


def test_the_schema_describes_fields_and_lets_a_file_be_partial() -> None:
    schema = json_schema(Needy)
    json.dumps(schema)
    assert "required" not in json.dumps(schema)
    assert schema["additionalProperties"] is False
    train = json_schema(Config)["$defs"]["Train"]["properties"]["learning_rate"]
    assert train["description"] == "Peak learning rate."
    assert train["exclusiveMinimum"] == 0
