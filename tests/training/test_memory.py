"""Out of memory in mid-run, for real: the process may map no more, and torch's allocation fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.errors import OutOfMemory
from peftkit.events import Warned
from peftkit.training.exhaustion import is_out_of_memory
from peftkit.training.journal import Journal
from peftkit.training.memory import within_memory
from peftkit.training.step import Step
from peftkit.tuning.tuned import Tuned

# A run of four steps over eight rows of 512 tokens; from the second step on, the process may map so many MB more.
# The CPU takes as many tokens at once as a GPU would.
RUN = """
import json, resource, sys
from pathlib import Path
from peftkit.backbone.load import load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.chat import Example
from peftkit.events import Warned
from peftkit.planning import tokens
from peftkit.training.sft import train
from peftkit.training.spec import TrainSpec
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec
from peftkit.errors import OutOfMemory

tokens.CPU_TOKENS = 8 * 512
folder, room, dropout = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
backbone = load_backbone(BaseSpec(source=sys.argv[4]), QuantSpec(bits=16), folder / "cache")
tuned = inject(backbone, AdapterSpec(r=4, lora_dropout=dropout))
ids = [[3 + (7 * row + 5 * at) % 200 for at in range(512)] for row in range(8)]
rows = [Example(row, row, 0, i, f"made:{i}") for i, row in enumerate(ids)]
losses, micro, said = {}, {}, []

def log(step, figures):
    losses[step], micro[step] = figures["loss"], figures["micro_batches"]
    if step == 1 and room:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + room * 1_000_000, resource.RLIM_INFINITY))

def report(event):
    if isinstance(event, Warned):
        said.append(event.text)

try:
    train(tuned, rows, TrainSpec(max_steps=4, learning_rate=1e-2), folder, report=report, log=log)
except OutOfMemory as error:
    said.append(str(error))
print(json.dumps({"losses": losses, "micro": micro, "said": said}))
"""


def process(folder: Path, base: Path, room: int, dropout: float = 0.0) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, str(folder), str(room), str(dropout), str(base)]
    # Fixed, so that freed tensors go back to the system at once: the room is then what a step may take.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **malloc, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Any]:
    """The run with all the memory there is."""
    found = process(tmp_path_factory.mktemp("free"), tiny_base, 0)
    assert set(found["micro"].values()) == {1.0}
    assert found["said"] == []
    return found


def test_the_step_is_repeated_in_smaller_pieces_with_the_same_loss(
    tmp_path: Path, tiny_base: Path, free: dict[str, Any]
) -> None:
    found = process(tmp_path, tiny_base, 18)
    assert found["micro"]["1"] == 1.0
    assert found["micro"]["2"] == found["micro"]["4"] > 1.0, "what fits is kept for the rest of the run"
    assert "out of memory in step 2 with 8 rows at once, the longest of 512 tokens" in found["said"][0]
    assert "the step is repeated with 2,048 tokens at once" in found["said"][0]
    assert "the effective batch stays 8 rows" in found["said"][0]
    # float32 sums of 4,096 terms in another order
    assert list(found["losses"].values()) == pytest.approx(list(free["losses"].values()), rel=1e-5)


@pytest.mark.full
def test_with_dropout_the_log_says_that_the_draw_changed(tmp_path: Path, tiny_base: Path) -> None:
    found = process(tmp_path, tiny_base, 18, dropout=0.1)
    assert found["micro"]["4"] > 1.0
    assert "Its dropout draw is not the one of an undisturbed run" in found["said"][0]


def allocate_too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def test_when_nothing_fits_the_error_says_what_would(tuned: Callable[..., Tuned], rows: Any) -> None:
    """Every attempt fails by a real allocation; each concession is made once, in order."""
    model, said = tuned(bits=4), []
    journal = Journal(tokens_at_once=4 * 9, gradient_checkpointing=False)
    step = Step(model.model, rows((5, 9, 7, 8)), pad_id=2, device=torch.device("cpu"), forward=_Exhausted)
    with pytest.raises(OutOfMemory, match="step 1 with a single row of 9 tokens") as caught:
        within_memory(step, journal, model, said.append)
    assert "lower data.max_length" in str(caught.value)
    texts = [event.text for event in said if isinstance(event, Warned)]
    assert [text.split(": ")[1].split(";")[0] for text in texts] == [
        "the step is repeated with 18 tokens at once, and so from here on",
        "the step is repeated with 9 tokens at once, and so from here on",
        "the step is repeated with gradient checkpointing, and so from here on",
    ]
    model.model.get_base_model().gradient_checkpointing_disable()
    model.model.get_base_model().disable_input_require_grads()


class _Exhausted:
    """A forward pass that asks for an exbibyte."""

    def __enter__(self) -> None:
        allocate_too_much()

    def __exit__(self, *error: object) -> None:
        """Nothing to undo."""


def test_other_errors_are_not_taken_for_it(tuned: Callable[..., Tuned], rows: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(caught.value)
