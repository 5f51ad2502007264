"""The losses of a task's head against numpy in float64 and against transformers' own, split or padded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from headed_lab import HEADS, batch_of, examples, load, pixels, scores, write_bases
from numpy.typing import NDArray

from peftkit.data.chat import IGNORED
from peftkit.data.tasks.task import TaskExample
from peftkit.errors import DataError, TrainingError
from peftkit.generation.tasks import check_ends, collate, outputs
from peftkit.training.objective import objective
from peftkit.training.regularize.losses import twice
from peftkit.training.regularize.spec import RegularizeSpec
from peftkit.training.spec import TrainSpec
from peftkit.training.step import Step
from peftkit.training.tasks.losses import TaskLoss, check_losses
from peftkit.training.tasks.paths import task_paths
from peftkit.tuning.inject import inject
from peftkit.tuning.methods import AdapterSpec

LENGTHS = (9, 14, 11, 7, 5, 8)
PLACES = [("bert", head) for head in ("sequence", "several", "number", "token", "span")] + [
    ("llama", "sequence"), ("llama", "span"), ("t5", "seq2seq"), ("vit", "image"),
]  # fmt: skip


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


def log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(head: str, found: NDArray[np.float64], rows: list[TaskExample], smoothing: float = 0.0) -> list[float]:
    """Each row's loss, by hand; `found` are scores of padded rows."""

    def cross(log_p: NDArray[np.float64], label: int) -> float:
        return -((1 - smoothing) * log_p[label] + smoothing * log_p.mean())

    losses = []
    for x, row in zip(found, rows, strict=True):
        if head in ("sequence", "image"):
            losses.append(cross(log_softmax(x), int(row.target[0])))
        elif head == "several":
            p = 1 / (1 + np.exp(-x))
            y = np.array(row.target)
            losses.append(float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()))
        elif head == "number":
            losses.append((x[0] - row.target[0]) ** 2)
        elif head == "span":
            ends = log_softmax(x[: len(row.input_ids)].T)
            losses.append(sum(cross(ends[at], int(row.target[at])) for at in (0, 1)) / 2)
        else:
            tags = zip(log_softmax(x), row.target, strict=False)
            losses.append(sum(cross(log_p, int(tag)) for log_p, tag in tags if tag != IGNORED))
    return losses


class Fixed(torch.nn.Module):
    """A model that gives the scores it was made with."""

    def __init__(self, head: str, found: torch.Tensor) -> None:
        super().__init__()
        self.found, self.head = found, head

    def forward(self, **batch: Any) -> Any:
        assert "labels" not in batch or self.head == "seq2seq"
        if self.head == "span":
            return SimpleNamespace(start_logits=self.found[..., 0], end_logits=self.found[..., 1])
        return SimpleNamespace(logits=self.found)


def fixed(head: str, seed: int = 0) -> tuple[Fixed, dict[str, torch.Tensor], list[TaskExample]]:
    """Drawn scores, the batch that they are of, and its rows."""
    rows = examples(head, LENGTHS)
    batch = collate(rows, HEADS[head], 0, torch.device("cpu"), pixels)
    width = max(len(row.target) for row in rows) if head == "seq2seq" else max(LENGTHS)
    shape = {
        "sequence": (6, 3), "image": (6, 3), "several": (6, 3), "number": (6, 1), "span": (6, width, 2),
        "token": (6, width, 3), "seq2seq": (6, width, 200),
    }[head]  # fmt: skip
    return Fixed(head, 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))), batch, rows


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("head", HEADS)
def test_losses_are_those_by_hand(head: str, smoothing: float) -> None:
    if smoothing and HEADS[head].problem != "single_label":
        with pytest.raises(TrainingError, match="label_smoothing is for one label"):
            check_losses(HEADS[head], smoothing, 0.0)
        return
    model, batch, rows = fixed(head)
    loss, shown = TaskLoss(HEADS[head], smoothing)(model, batch)
    plain = reference(head, model.found.double().numpy(), rows)
    assert float(loss) == pytest.approx(sum(reference(head, model.found.double().numpy(), rows, smoothing)), rel=1e-5)
    assert float(shown) == pytest.approx(sum(plain), rel=1e-5)
    assert TaskLoss(HEADS[head]).of_rows(model, batch).tolist() == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("head", ["sequence", "token", "span", "image", "seq2seq"])
def test_r_drop_is_the_paper(head: str) -> None:
    """α · ½ · [KL(p₁‖p₂) + KL(p₂‖p₁)] of every distribution that counts, beside the mean of the two losses."""
    (first, batch, rows), (second, _, _) = fixed(head, 1), fixed(head, 2)
    both = Fixed(head, torch.cat([first.found, second.found]))
    loss, shown = TaskLoss(HEADS[head], r_drop=0.7)(both, twice(batch))
    x, y = (each.found.double().numpy() for each in (first, second))
    halves = [sum(reference(head, each, rows)) for each in (x, y)]
    apart = 0.0
    for a, b, row in zip(x, y, rows, strict=True):
        if head == "span":
            pairs = [(a[: len(row.input_ids)].T, b[: len(row.input_ids)].T, np.full(2, 0.5))]
        elif row.per_token:
            counts = np.array([float(tag != IGNORED) for tag in row.target])
            pairs = [(a[: len(counts)], b[: len(counts)], counts)]
        else:
            pairs = [(a[None], b[None], np.ones(1))]
        for one, other, weights in pairs:
            p, q = log_softmax(one), log_softmax(other)
            apart += float((((np.exp(p) - np.exp(q)) * (p - q)).sum(-1) / 2 * weights).sum())
    assert float(loss) == pytest.approx(sum(halves) / 2 + 0.7 * apart, rel=1e-5)
    assert float(shown) == pytest.approx(sum(halves) / 2, rel=1e-5)


@pytest.mark.parametrize(("base", "head"), PLACES)
def test_losses_are_those_of_transformers(bases: dict[str, Path], base: str, head: str) -> None:
    """Its mean over what counts, where it is the same function; spans of rows of one length: it counts padding."""
    backbone = load(bases[base], head)
    rows = examples(head, (9, 9, 9) if head == "span" else LENGTHS)
    batch = batch_of(backbone, rows)
    given = dict(batch)
    if head == "span":
        labels = given.pop("labels")
        given |= {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    with torch.no_grad():
        theirs = float(backbone.model(**given).loss)
        loss, _ = TaskLoss(HEADS[head])(backbone.model, batch)
    count = sum(row.answer_tokens for row in rows)
    assert float(loss) / count == pytest.approx(theirs, rel=2e-6)


@pytest.mark.parametrize(("base", "head"), PLACES)
def test_gradients_do_not_depend_on_the_split(bases: dict[str, Path], base: str, head: str) -> None:
    """One pass of all rows, passes of two, passes of one: padding differs in all."""
    tuned = inject(load(bases[base], head), AdapterSpec(method="patterns", patterns=["*"]))
    rows, spec = examples(head, LENGTHS), TrainSpec()
    paths = task_paths(tuned, spec, rows, pixels)
    tuned.model.eval()
    found = []
    for at_once in (1000, 16, 1):
        step = Step(tuned.model, rows, pad_id=tuned.backbone.tokenizer.pad_id, device=tuned.backbone.device,
                    objective=objective(tuned, spec.regularize, paths), paths=paths)  # fmt: skip
        result = step.repeat(at_once)
        found.append((result.loss, {name: p.grad.clone() for name, p in tuned.trainable.items() if p.grad is not None}))
        assert (result.micro_batches == 1) is (at_once == 1000)
        assert result.answer_tokens == sum(row.answer_tokens for row in rows)
    largest = max(float(grad.abs().max()) for grad in found[0][1].values())
    assert largest > 0
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert gradients.keys() == found[0][1].keys()
        assert max(float((gradients[name] - one).abs().max()) for name, one in found[0][1].items()) < 1e-6 * max(
            1, largest
        )


@pytest.mark.parametrize(("base", "head"), [pair for pair in PLACES if pair[1] not in ("image", "seq2seq")])
def test_padding_changes_no_score(bases: dict[str, Path], base: str, head: str) -> None:
    backbone, rows = load(bases[base], head), examples(head, LENGTHS)
    together = outputs(backbone.model, backbone, rows, batch_size=6)
    for row, found in zip(rows, together, strict=True):
        (alone,) = outputs(backbone.model, backbone, [row], batch_size=1)
        assert alone.shape == found.shape
        np.testing.assert_allclose(found, alone, rtol=0, atol=2e-6)


def test_measuring_is_the_loss_row_by_row(bases: dict[str, Path]) -> None:
    for base, head in PLACES:
        tuned = inject(load(bases[base], head), AdapterSpec(method="top_layers", top_layers=0))
        rows = examples(head, LENGTHS)
        paths = task_paths(tuned, TrainSpec(), rows, pixels)
        options = {"pad_id": tuned.backbone.tokenizer.pad_id, "device": tuned.backbone.device}
        found = paths.measure(tuned.model.eval(), rows, **options, batch_size=4)
        by_hand = reference(head, scores(tuned.model, tuned.backbone, rows).double().numpy(), rows)
        assert found == pytest.approx(by_hand, rel=1e-4, abs=1e-6), (base, head)


def test_a_causal_base_would_read_the_wrong_token(bases: dict[str, Path]) -> None:
    """It pools at the last token that is not the pad token, also where a row's own last token is that one."""
    backbone = load(bases["llama"], "sequence")
    pad = backbone.tokenizer.pad_id
    plain, longer = examples("sequence", (9, 12))
    ended = replace(plain, input_ids=[*plain.input_ids, pad])
    with pytest.raises(DataError, match=r"1 rows end with the token 2, which fills short rows: made:1"):
        check_ends([ended, longer], backbone)
    with pytest.raises(DataError):
        outputs(backbone.model, backbone, [ended], batch_size=1)
    check_ends([plain, longer], backbone)
    batch = batch_of(backbone, [ended])
    batch.pop("labels")
    with torch.no_grad():
        pooled = backbone.model(**batch).logits
        states = backbone.model.model(**batch).last_hidden_state
        right, wrong = (backbone.model.score(states[:, at]) for at in (-1, -2))
    assert torch.allclose(pooled, wrong, atol=1e-6)  # what `check_ends` is for
    assert not torch.allclose(pooled, right, atol=1e-3)


def test_what_a_task_cannot_have_is_refused_by_name(bases: dict[str, Path]) -> None:
    image = inject(load(bases["vit"], "image"), AdapterSpec(r=4))
    for setting, name in (
        ({"neftune_alpha": 5.0}, "neftune_alpha"),
        ({"adversarial": "fgm", "adversarial_epsilon": 1.0}, "adversarial"),
    ):
        with pytest.raises(TrainingError, match=f"train.regularize.{name} changes embeddings of tokens"):
            task_paths(image, TrainSpec(regularize=RegularizeSpec.model_validate(setting)), [])
    number = inject(load(bases["bert"], "number"), AdapterSpec(r=4, lora_dropout=0.1))
    for setting in ({"label_smoothing": 0.1}, {"r_drop": 1.0}):
        with pytest.raises(TrainingError, match=f"{next(iter(setting))} is for one label among several"):
            task_paths(number, TrainSpec(regularize=RegularizeSpec.model_validate(setting)), [])
