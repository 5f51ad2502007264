"""The ledger of a step: hand-worked bytes, an independent count by torch's profiler, and faults that it must show."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import Example
from peftkit.training.ledger import Account, Entry, Ledger
from peftkit.training.step import Step

CPU = torch.device("cpu")
FLOAT = 4
LOSS = 2 * FLOAT  # a loss of one number, and its own gradient
MODES = ("full", "lora", "nf4", "int8")
BITS = {"full": 32, "lora": 32, "nf4": 4, "int8": 8}
R, BATCH, LENGTH = 4, 2, 64  # of the tiny Llama's steps


class ByTensor(Ledger):
    """A planted fault: every tensor is counted, views too."""

    def _see(self, value: Any, operation: str) -> Entry | None:
        if not isinstance(value, torch.Tensor) or operation in ("before", "elsewhere"):
            return super()._see(value, operation)
        entry = Entry(value.nbytes, tuple(value.shape), value.dtype, operation, None, self.clock)
        self.entries.append(entry)
        self._live[id(value)] = (entry, weakref.ref(value, lambda _: self._close(id(value), entry)))
        return entry


def mlp_account(kind: type[Ledger] = Ledger) -> Account:
    """One step of Linear(64, 128), ReLU, Linear(128, 32) on 16 rows that are made in the step."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with kind(model, optimizer) as ledger:
        model(torch.ones(16, 64)).sum().backward()
        optimizer.step()
    return ledger.account()


def check_mlp(account: Account) -> None:
    parameters = (64 * 128 + 128 + 128 * 32 + 32) * FLOAT
    rows, hidden = 16 * 64 * FLOAT, 16 * 128 * FLOAT
    assert account.weights == account.before == account.gradients == parameters
    assert account.optimizer == 2 * parameters + 4 * FLOAT, "two moments, and a step count for each of 4 parameters"
    # ReLU's backward pass needs its result, each linear layer's its input; the sum needs nothing.
    assert account.kept == rows + hidden + LOSS
    assert account.saved == rows + hidden
    assert account.peak_by["forward"] == rows + 2 * hidden, "before and after ReLU"
    assert account.alive_after == 0


def test_a_small_network_byte_by_byte() -> None:
    check_mlp(mlp_account())


def test_counting_tensors_instead_of_storages_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_mlp(mlp_account(ByTensor))


def record(work: Callable[[torch.Tensor], object]) -> Account:
    """The account of work on a parameter of 1,000 numbers."""
    weight = nn.Parameter(torch.ones(1000))
    model = nn.ParameterList([weight])
    with Ledger(model) as ledger:
        result = work(weight)
        del result
    return ledger.account()


def test_operations_that_are_made_of_others_are_looked_into_without_autograd() -> None:
    def work(weight: torch.Tensor) -> None:
        with torch.inference_mode():
            nn.functional.cross_entropy((weight * 1).view(10, 100), torch.zeros(10, dtype=torch.long), reduction="none")

    assert record(work).peak == (1000 + 1000 + 10 + 1) * FLOAT + 10 * 8, "logits, log-softmax, losses, weight; targets"


def test_views_and_operations_in_place_add_nothing() -> None:
    def work(weight: torch.Tensor) -> torch.Tensor:
        made = weight * 2
        return made.view(10, 100).t()[3:].unsqueeze(0).add_(1).detach().relu_()

    assert record(work).peak == 1000 * FLOAT


def test_what_is_freed_counts_while_it_lives() -> None:
    def work(weight: torch.Tensor) -> None:
        for _ in range(5):
            first = weight.detach() + 1
            second = first + 1
            del first, second

    account = record(work)
    assert account.peak == 2 * 1000 * FLOAT
    assert account.alive_after == 0


def test_a_storage_that_grows_or_shrinks_is_counted_anew() -> None:
    grown: list[torch.Tensor] = []

    def work(weight: torch.Tensor) -> None:
        grown.append(torch.ones(10).resize_(500))
        grown.append(torch.ones(100))
        grown[1].untyped_storage().resize_(0)
        grown[1].detach()  # a change beside torch's operations is seen by the next one

    account = record(work)
    assert account.peak == 600 * FLOAT
    assert account.alive_after == 500 * FLOAT


class KeepsOnContext(torch.autograd.Function):
    """Keeps a tensor beside `save_for_backward`, as bitsandbytes' int8 layers do."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        ctx.kept = value.detach().clone()
        ctx.save_for_backward(value.detach() * 2)
        return value.sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * ctx.kept * ctx.saved_tensors[0]


def test_what_a_function_keeps_on_its_context_counts() -> None:
    account = record(lambda weight: KeepsOnContext.apply(weight).backward())
    assert account.saved == 1000 * FLOAT, "the hooks see what was saved"
    assert account.kept == 2 * 1000 * FLOAT + LOSS, "the ledger sees the rest too"


def test_gradients_of_earlier_micro_batches_are_not_kept_activations() -> None:
    model = nn.Linear(100, 10, bias=False)
    with Ledger(model) as ledger:
        for _ in range(3):
            model(torch.ones(5, 100)).sum().backward()
    account = ledger.account()
    assert account.gradients == 1000 * FLOAT
    assert account.kept == 500 * FLOAT + LOSS
    assert account.peak_by["forward"] == (1000 + 500 + 50) * FLOAT + FLOAT, "gradients, batch, result; the last loss"


@pytest.mark.parametrize("blocks", [2, 5])
def test_checkpointing_keeps_the_inputs_of_blocks(blocks: int) -> None:
    model = nn.ModuleList(nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)) for _ in range(blocks))
    peaks = {}
    for checkpointed in (False, True):
        model.zero_grad()
        with Ledger(model) as ledger:
            value = torch.ones(8, 32).requires_grad_()
            for block in model:
                value = checkpoint(block, value, use_reentrant=False) if checkpointed else block(value)
            value.sum().backward()
            del value
        account = ledger.account()
        inputs, hidden = blocks * 8 * 32 * FLOAT, 2 * 8 * 256 * FLOAT  # into and out of GELU
        last = 8 * 32 * FLOAT  # the result is still in a variable
        assert account.kept == inputs + last + LOSS + (0 if checkpointed else blocks * hidden)
        peaks[checkpointed] = account.peak_by
        assert account.alive_after == 0
    assert peaks[True]["backward"] > peaks[True]["forward"], "one block's activations are back, besides gradients"


class Leaky(nn.Module):
    """A planted fault: its forward pass stores what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.history: list[torch.Tensor] = []

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.history.append(self.linear(value).detach())
        return self.linear(value)


def test_a_leak_is_reported_with_the_operation_and_the_module() -> None:
    model = Leaky()
    with Ledger(model) as ledger:
        model(torch.ones(3, 8)).sum().backward()
    assert ledger.account().alive_after == 3 * 8 * FLOAT
    (leak,) = ledger.leaked
    assert (leak.operation, leak.module, leak.shape) == ("aten.addmm.default", "linear", (3, 8))


@pytest.fixture(scope="module")
def llama(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Any]:
    """The tiny Llama in a mode, with or without checkpointing."""
    from peftkit.tuning.inject import inject
    from peftkit.tuning.methods import AdapterSpec

    cache = tmp_path_factory.mktemp("cache")

    def llama(mode: str, checkpointing: bool) -> Any:
        backbone = load_backbone(BaseSpec(source=str(tiny_base)), QuantSpec(bits=BITS[mode]), cache)
        base = backbone.model
        model = base.requires_grad_(True) if mode == "full" else inject(backbone, AdapterSpec(r=R)).model
        if checkpointing:  # as transformers' Trainer does
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    return llama


class Run:
    """One optimizer step of a model and the ledger's account of it."""

    def __init__(self, model: Any, rows: list[Example], tokens: int = BATCH * LENGTH) -> None:
        self.model, self.rows, self.tokens = model, rows, tokens
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, foreach=False)
        self.under(nullcontext())  # fills what a first call caches
        self.ledger = Ledger(model, self.optimizer)
        self.under(self.ledger)
        self.account = self.ledger.account()

    def under(
        self, watch: AbstractContextManager[Any], backward: Callable[[torch.Tensor], object] | None = None
    ) -> None:
        """Run the step inside `watch`, and leave nothing of it."""
        step = Step(self.model, self.rows, pad_id=2, device=CPU, backward=backward)
        with watch:
            step.run(self.tokens)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.state.clear()


def allocated(found: profile) -> tuple[int, int]:
    """Most bytes, and bytes at the end, that the CPU's allocator gave while the profiler ran."""
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    levels = list(accumulate(changes, initial=0))
    return max(levels), levels[-1]


def recorder() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def test_the_watched_step_adds_gradients_out_of_place() -> None:
    """A known error of the ledger; when this fails torch has mended it, and the module's docstring can say so."""
    weight = nn.Parameter(torch.ones(1000))

    def work() -> None:
        value = weight * 1
        sum((value * factor).sum() for factor in range(2, 6)).backward()
        weight.grad = None

    work()
    with recorder() as found:
        work()
    with Ledger(nn.ParameterList([weight])) as ledger:
        work()
    value = first = second = total = 1000 * FLOAT
    numbers = 100  # a few sums
    assert value + first + second <= allocated(found)[0] <= value + first + second + numbers
    assert value + first + second + total <= ledger.account().peak <= value + first + second + total + numbers


@contextmanager
def started(recorder: profile) -> Iterator[None]:
    """Start a recorder; who stops it is another matter."""
    recorder.start()
    yield


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("mode", MODES)
def test_a_real_step_agrees_with_the_allocator(
    llama: Callable[[str, bool], Any], rows: Callable[..., list[Example]], mode: str, checkpointing: bool
) -> None:
    run = Run(llama(mode, checkpointing), rows([LENGTH] * BATCH))
    account = run.account
    whole, forward = recorder(), recorder()
    run.under(whole)
    peak, end = allocated(whole)
    run.under(started(forward), backward=lambda loss: forward.stop())
    # No operation returns the random states that checkpointing keeps, and the numbers of 8 bytes that autograd saves:
    # the scaling of 7 adapters in 2 blocks, and a few of the loss, whose gradient comes later.
    states = 2 * torch.get_rng_state().nbytes if checkpointing else 0
    scalings = 0 if mode == "full" else 8 * 2 * 7
    of_the_loss = allocated(forward)[1] + FLOAT - account.kept - states - scalings
    assert of_the_loss in range(0, 5 * 8, 8)
    assert end == account.gradients + account.optimizer, "nothing else outlives the step"
    assert account.alive_after == 0
    assert account.gradients == sum(parameter.nbytes for parameter in run.trainable)
    # The allocator also sees what a kernel takes for itself; none of these needs more than the step's largest tensor.
    largest = max(entry.bytes for entry in run.ledger.entries if entry.born)
    assert 0 <= peak - account.peak <= largest
    assert account.saved <= account.kept <= account.peak
    assert sum(account.kept_by.values()) == account.kept
    strange = [entry for entry in run.ledger.entries if entry.operation == "elsewhere" and entry.shape]
    assert strange == [], "every tensor is the model's, or was seen when it was made"


def test_int8_keeps_the_inputs_of_every_layer_through_checkpointing(
    llama: Callable[[str, bool], Any], rows: Callable[..., list[Example]]
) -> None:
    int8, nf4 = (Run(llama(mode, True), rows([LENGTH] * BATCH)).account for mode in ("int8", "nf4"))
    hidden, intermediate, blocks = 64, 128, 2
    # q, k and v read one tensor, gate and up another; o_proj and down_proj each their own.
    inputs = blocks * BATCH * LENGTH * (3 * hidden + intermediate) * FLOAT
    assert int8.kept_by["blocks"] - nf4.kept_by["blocks"] == inputs == int8.kept - nf4.kept
    assert int8.saved == nf4.saved, "the hooks do not see what is on ctx"


def test_weights_are_counted_with_their_quantization_constants(llama: Callable[[str, bool], Any]) -> None:
    hidden, intermediate, kv, vocabulary, blocks = 64, 128, 32, 259, 2
    layers = blocks * [
        (hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden),
        (intermediate, hidden), (intermediate, hidden), (hidden, intermediate),
    ]  # fmt: skip
    norms_and_embedding = (2 * blocks + 1) * hidden + vocabulary * hidden
    frequencies = hidden // 2 // 2 * FLOAT  # of half a head's width of 32; transformers holds them twice
    rest = norms_and_embedding * FLOAT + 2 * frequencies
    adapter = sum(R * (out + into) for out, into in layers) * FLOAT
    expected = {
        "full": sum(out * into for out, into in layers) * FLOAT + rest,
        "int8": sum(out * into + out * FLOAT for out, into in layers) + rest + adapter,
        # A byte for the constant of 64 weights, a float for 256 constants (here never more), their mean, and two codes.
        "nf4": sum(
            out * into // 2 + out * into // 64 + FLOAT + FLOAT + 16 * FLOAT + 256 * FLOAT for out, into in layers
        )
        + rest
        + adapter,
    }
    for mode, weights in expected.items():
        assert Ledger(llama(mode, False)).account().weights == weights


def test_parts_of_a_model(llama: Callable[[str, bool], Any], rows: Callable[..., list[Example]]) -> None:
    kept_by = Run(llama("lora", True), rows([LENGTH] * BATCH)).account.kept_by
    hidden = BATCH * LENGTH * 64 * FLOAT
    assert kept_by["embeddings"] == hidden, "the first block's input"
    assert kept_by["blocks"] == 2 * hidden, "what the blocks return: the second's input, and the last norm's"
    assert kept_by["head"] == 0, "only the log-softmax of the logits is kept, which the loss makes"


def test_kernels_that_are_written_in_python_are_looked_into(
    llama: Callable[[str, bool], Any], rows: Callable[..., list[Example]]
) -> None:
    ledger = Run(llama("nf4", False), rows([LENGTH] * BATCH)).ledger
    made = [entry for entry in ledger.entries if entry.operation.startswith("aten.empty") and entry.module]
    inside = [entry for entry in made if entry.module.endswith("down_proj.base_layer")]
    assert [entry.shape for entry in inside] == 2 * [(128,), (64, 128)], "constants and weight, dequantized"
    assert not set(inside) & set(ledger.kept)


@pytest.mark.parametrize("mode", ["full", "nf4"])
def test_watching_changes_no_gradient(
    llama: Callable[[str, bool], Any], rows: Callable[..., list[Example]], mode: str
) -> None:
    model = llama(mode, True)
    found = []
    for watch in (nullcontext(), Ledger(model)):
        step = Step(model, rows([9, LENGTH, 30]), pad_id=2, device=CPU)
        with watch:
            assert step.run(2 * LENGTH).micro_batches == 2
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        model.zero_grad()
    assert len(found[0]) > 10
    assert all(torch.equal(plain, watched) for plain, watched in zip(*found, strict=True))
