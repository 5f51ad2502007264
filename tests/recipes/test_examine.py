"""`peftkit doctor --gpu` on the CPU: its oracle sees planted errors, its plan is the run's, its clock stops it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bases import write_base

from peftkit.backbone.bnb import Linear8bitLt
from peftkit.backbone.contain import quantized_linears
from peftkit.backbone.load import load_backbone
from peftkit.backbone.quantize import dense_weight
from peftkit.backbone.spec import QuantSpec
from peftkit.backbone.unpack import unpacked
from peftkit.base.ref import BaseSpec, read_config
from peftkit.errors import BackboneError
from peftkit.planning.architecture import architecture
from peftkit.recipe import card, examine, oracle, shapes
from peftkit.recipe.shapes import Shape
from peftkit.recipe.target import Target
from peftkit.recipe.verdict import Check, held
from peftkit.training.probe import Piece, Probe
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.tuning.tuned import Tuned

Make = Callable[..., Tuned]
ROWS = Shape(2, 24, False).examples(259)
ROOM = Target("cpu", "this machine", 1 << 40, None, None)


@pytest.fixture
def tuned(tiny_base: Path, tmp_path: Path) -> Make:
    """An adapter in the tiny base; keywords of QuantSpec."""

    def tuned(**quant: Any) -> Tuned:
        spec = QuantSpec(**{"device": "cpu", "compute_dtype": "float32", **quant})
        return inject(load_backbone(BaseSpec(source=str(tiny_base)), spec, tmp_path / "cache"), AdapterSpec(r=4))

    return tuned


def states(checks: list[Check]) -> dict[str, str]:
    return {check.what: check.state for check in checks}


@pytest.mark.parametrize("quant", [{"bits": 4}, {"bits": 4, "double_quant": False}, {"bits": 8}])
def test_weights_unpacked_by_the_format_are_those_that_bitsandbytes_unpacks(tuned: Make, quant: dict[str, Any]) -> None:
    layers = quantized_linears(tuned(**quant).model)
    assert len(layers) == 14
    for layer in layers.values():
        # Two products in float32, of numbers up to the largest weight
        apart = (dense_weight(layer).double() - unpacked(layer)).abs().max() / unpacked(layer).abs().max()
        assert float(apart) <= 2**-21


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_sound_device_passes(tuned: Make, bits: int, dtype: str) -> None:
    checks = oracle.check_arithmetic(tuned(bits=bits, compute_dtype=dtype), ROWS)
    assert set(states(checks).values()) == {"ok"}
    assert len(checks) == (4 if bits == 4 else 3)
    gradients = next(check for check in checks if check.what == "gradients")
    assert gradients.measured is not None
    assert gradients.high is not None
    # An honest bound: of the dtype's own size (two blocks), neither zero nor loose
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert eps < gradients.high < 50 * eps


def lost_backward(tuned: Tuned) -> Any:
    """bitsandbytes' re-packed 4-bit weights (AVX512-BF16): the right loss, no gradient through the layer."""
    layer = list(oracle.adapted(tuned).values())[7].base_layer
    return layer.register_forward_hook(lambda module, inputs, output: output.detach())


def wrong_scaling(tuned: Tuned) -> None:
    """rsLoRA's scaling where LoRA's belongs, in one layer."""
    layer = list(oracle.adapted(tuned).values())[3]
    layer.scaling["default"] *= 2


def half_precision_adapter(tuned: Tuned) -> None:
    """What TRL 1.16 does to the adapters of quantized bases."""
    for parameter in tuned.trainable.values():
        parameter.data = parameter.data.bfloat16().float()


def wrong_constants(tuned: Tuned) -> None:
    """One layer's blocks are read with their neighbours' constants."""
    absmax = list(quantized_linears(tuned.model).values())[5].weight.quant_state.absmax
    absmax.copy_(absmax.roll(1))


@pytest.mark.parametrize("fault", [lost_backward, wrong_scaling, half_precision_adapter, wrong_constants])
def test_the_gradient_oracle_sees_faults(tuned: Make, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """Each comes when the reference is made already, as a fault of the device would."""
    model, sound = tuned(bits=4), oracle.twin

    def twin(tuned: Tuned) -> Any:
        made = sound(tuned)
        fault(tuned)
        return made

    monkeypatch.setattr(oracle, "twin", twin)
    assert states(oracle.check_arithmetic(model, ROWS))["gradients"] == "failed"


def test_a_kernel_that_unpacks_wrongly_is_seen(tuned: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "dense_weight", lambda layer: dense_weight(layer) * (1 + 2**-16))
    assert states(oracle.check_arithmetic(tuned(bits=4), ROWS))["unpacked weights"] == "failed"


def test_int8_that_quantizes_activations_in_evaluation_is_seen(tuned: Make) -> None:
    model = tuned(bits=8)
    for layer in quantized_linears(model.model).values():
        layer.__class__ = Linear8bitLt  # what upstream gives
    found = states(oracle.check_arithmetic(model, ROWS))
    assert found["evaluation against training"] == "failed"


def test_an_oracle_that_sees_nothing_says_so(tuned: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "TIMES", 1e9)
    assert states(oracle.check_arithmetic(tuned(bits=4), ROWS))[oracle.PLANTED] == "failed"


def test_a_shape_is_planned_as_its_run_and_leaves_no_trace(tuned: Make, tiny_base: Path) -> None:
    model, shape = tuned(bits=4), Shape(2, 48, checkpointing=True)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    checks = shapes.check_shape(model, shape, architecture(read_config(tiny_base)), ROOM, 0)
    assert states(checks) == dict.fromkeys(("step", "evaluation", "training", "answering"), "shown")
    assert not model.model.get_base_model().is_gradient_checkpointing
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.model.parameters())
    plan = shapes.planned(shape, shapes.settings(model), architecture(read_config(tiny_base)), ROOM)
    setting = plan.setting
    assert (setting.bits, setting.micro_batch, setting.rows_per_step, setting.longest) == (4, 2, 2, 48)
    assert (setting.gradient_checkpointing, setting.evaluation_batch, setting.evaluation_longest) == (True, 2, 48)
    assert setting.labelled == 24, "the second half is learned"


def test_a_shape_that_cannot_fit_is_left_out_and_one_that_ran_out_fails(
    tuned: Make, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shape, design = tuned(bits=4), Shape(1, 16, False), architecture(read_config(tiny_base))
    small = Target("cpu", "this machine", 1 << 20, None, None)
    assert states(shapes.check_shape(model, shape, design, small, 0)) == {"plan and speed": "left out"}

    def run_out(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(shapes, "probe", run_out)
    (check,) = shapes.check_shape(model, shape, design, ROOM, 0)
    assert (check.what, check.state) == ("fits", "failed"), "the plan had promised that it fits"


def test_the_plan_without_context_and_states_bounds_a_card(tuned: Make, tiny_base: Path) -> None:
    """The allocator of a card sees neither; a figure at the plan's is ok, one twice as large is not."""
    design = architecture(read_config(tiny_base))
    target = Target("cuda", "a card", 1 << 40, (8, 6), None)
    model = tuned(bits=4)
    plan = shapes.planned(Shape(2, 64, False), shapes.settings(model), design, target)
    train = plan.memory.stage("train").bytes.expected
    own = train - plan.memory.part("context").bytes.expected - plan.memory.part("optimizer").bytes.expected

    def step(peak: int, before: int) -> Check:
        found = Probe(Piece(1.0, 128, peak), Piece(1.0, 128, 10), None)
        return next(check for check in shapes._figures(found, plan, "a shape", before) if check.what == "step")

    sound = step(own + 1000, 1000)
    assert (sound.state, sound.measured, sound.expected) == ("ok", own, own)
    assert step(2 * own, 0).state == "failed"


def test_when_time_is_up_nothing_is_begun_and_all_of_it_is_named(tiny_base: Path, tmp_path: Path) -> None:
    found = examine.examine(BaseSpec(source=str(tiny_base)), tmp_path, "cpu", seconds=-1.0)
    assert {check.state for check in found.checks} == {"left out"}
    assert len(found.checks) == 10, "3 widths in 2 dtypes, the optimizer, 3 plans"
    assert len(found.as_record()["left_out"]) == 10


def test_the_optimizer_moves_by_the_rate_and_everything_is_given_back(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "BITS", ())
    kept: list[Any] = []
    found = examine.examine(BaseSpec(source=str(tiny_base)), tmp_path, "cpu")
    assert states(found.checks) == {"first step of adamw_torch": "ok", examine.GIVEN_BACK: "ok"}
    monkeypatch.setattr(examine, "inject", lambda *given: kept.append(inject(*given)) or kept[-1])
    again = examine.examine(BaseSpec(source=str(tiny_base)), tmp_path, "cpu")
    assert [check.what for check in again.failed] == [examine.GIVEN_BACK], "somebody holds the model"
    monkeypatch.setattr(examine, "RATE", 0.02)
    monkeypatch.setattr(examine, "train", lambda tuned, *rest: [p.data.add_(0.01) for p in tuned.trainable.values()])
    wrong = examine.examine(BaseSpec(source=str(tiny_base)), tmp_path, "cpu")
    assert "first step of adamw_torch" in [check.what for check in wrong.failed]


def test_what_breaks_is_a_failed_check_and_what_lacks_memory_is_left_out(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "BITS", ())

    def broken(*given: Any) -> None:
        raise ValueError("no kernel image is available for execution on the device")

    monkeypatch.setattr(examine, "train", broken)
    (failed,) = examine.examine(BaseSpec(source=str(tiny_base)), tmp_path, "cpu").failed
    assert "no kernel image" in failed.source

    def full(*given: Any) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except torch.OutOfMemoryError as error:
            raise BackboneError("tiny in nf4+dq does not fit into the GPU's memory") from error

    monkeypatch.setattr(examine, "train", full)
    found = examine.examine(BaseSpec(source=str(tiny_base)), tmp_path, "cpu")
    assert states(found.checks)["optimizer"] == "left out"
    assert not found.failed


def test_a_quantized_upload_is_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="quantized already"):
        examine.examine(BaseSpec(source=str(folder)), tmp_path, "cpu")


def test_a_nan_fails() -> None:
    assert held("x", "y", float("nan"), "bytes", high=1.0, source="").state == "failed"
    assert held("x", "y", float("nan"), "bytes", low=1.0, source="").state == "failed"


def test_the_driver_is_asked_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '555.42.06, 170.00 W, 2100 MHz'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert card._driver() == {"driver_version": "555.42.06", "power.limit": "170.00 W", "clocks.max.sm": "2100 MHz"}
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert card._driver() == {}


def cuda_names(module: Any) -> Iterator[str]:
    """What a module's source takes from torch.cuda."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "cuda":
            yield node.attr


def test_what_only_a_card_runs_exists_in_this_torch() -> None:
    names = [name for module in (card, examine, shapes, oracle) for name in cuda_names(module)]
    assert len(set(names)) >= 5
    assert all(hasattr(torch.cuda, name) or hasattr(torch.version, name) for name in names)


@pytest.mark.full
def test_the_whole_procedure_on_the_tiny_base(tiny_base: Path, tmp_path: Path) -> None:
    assert _checked(BaseSpec(source=str(tiny_base)), tmp_path) == _expected(lengths=2)


@pytest.mark.full
@pytest.mark.base
def test_the_whole_procedure_on_the_embedded_base(embedded: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(examine.LENGTHS, "cpu", (32,))
    assert _checked(BaseSpec(), cache) == _expected(lengths=1)


def _expected(lengths: int) -> int:
    """4 + 3 + 3 figures in 2 dtypes; one of the optimizer; 3 weights; the memory of 10 tasks; 4 for each shape."""
    return 20 + 1 + 3 + 10 + 3 * 2 * lengths * 4


def _checked(base: BaseSpec, cache: Path) -> int:
    """How many figures a whole examination has; none of them is wrong, and none names this machine."""
    found = examine.examine(base, cache, "cpu", seconds=3600)
    assert not found.failed, found.failed
    record = json.loads(json.dumps(found.as_record()))
    assert record["left_out"] == []
    assert str(Path.home()) not in json.dumps(record)
    return len(record["checks"])
