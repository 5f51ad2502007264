"""Each regularizer's formula, against hand-worked values, float64 references, or moments with their sampling error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_families import write_family
from torch import nn
from torch.nn.functional import cross_entropy

from peftkit.data.chat import IGNORED, Example
from peftkit.errors import TrainingError
from peftkit.generation.forward import pad, token_nll
from peftkit.training.regularize.adversarial import ascent, row_norms, uniform_start, worse
from peftkit.training.regularize.dropout import dropout_at, drops, places_of_dropout
from peftkit.training.regularize.embeddings import changed, neftune, tokens_of
from peftkit.training.regularize.losses import TokenLoss, smoothed, symmetric_kl, twice
from peftkit.training.regularize.mixout import mixed, mixture
from peftkit.training.regularize.penalties import Penalties
from peftkit.training.regularize.spec import RegularizeSpec

CPU = torch.device("cpu")
Rows = Callable[..., list[Example]]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def exact(tiny_base: Path) -> Any:
    """The tiny base in float64, in train mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).train()


def batch_of(rows: list[Example]) -> dict[str, torch.Tensor]:
    return pad(rows, 2, CPU)


# -- label smoothing


def test_smoothing_by_hand() -> None:
    """p = (¾, ¼), ε = 0.1: 0.9 · 0.287682 + 0.1 · (0.287682 + 1.386294) / 2."""
    log_p = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).log()
    loss, nll = smoothed(log_p, torch.tensor([[0, IGNORED]]), 0.1)
    assert float(loss.detach()) == pytest.approx(0.342613, abs=1e-6)
    assert float(nll) == pytest.approx(0.287682, abs=1e-6), "what is shown is not smoothed"


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6])
def test_smoothing_is_that_of_torch(epsilon: float) -> None:
    logits = torch.randn(3, 7, 50, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (3, 7))
    targets[0, :3] = targets[2, 5] = IGNORED
    expected = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=epsilon, reduction="sum"
    )
    loss, _ = smoothed(torch.log_softmax(logits, -1), targets, epsilon)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
    found, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_smoothing_through_a_model_weighs_every_answer_token(exact: Any, rows: Rows) -> None:
    made = rows((5, 17, 9))
    loss, nll = TokenLoss(label_smoothing=0.2)(exact, batch_of(made))
    total = 0.0
    for row in made:
        logits = exact(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": 0.2, "reduction": "sum"}
        total += float(cross_entropy(logits, torch.tensor(row.labels[1:]), **options).detach())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-12)
    assert float(nll) == pytest.approx(float(token_nll(exact, batch_of(made)).sum().detach()), rel=1e-12)
    assert not nll.requires_grad


# -- R-Drop


def test_the_two_divergences_by_hand() -> None:
    """p = (¾, ¼), q = (¼, ¾): both divergences are ½ · ln 3."""
    p, q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(symmetric_kl(p, q)) == pytest.approx(0.549306, abs=1e-6)
    assert float(symmetric_kl(p, p)) == 0.0


def test_the_two_divergences_are_those_of_a_float64_softmax() -> None:
    first, second = torch.randn(2, 4, 30, dtype=torch.float64) * 3
    p, q = first.softmax(-1), second.softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)) / 2
    found = symmetric_kl(first.float().log_softmax(-1), second.float().log_softmax(-1))
    torch.testing.assert_close(found.double(), expected, rtol=30 * 2**-23, atol=1e-6)  # sums of 30 float32 terms
    wanting = [tensor.clone().requires_grad_() for tensor in (first, second)]
    assert torch.autograd.gradcheck(lambda a, b: symmetric_kl(a.log_softmax(-1), b.log_softmax(-1)), wanting), (
        "both directions pass a gradient to both"
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_r_drop_is_the_mean_of_both_losses_and_alpha_times_the_divergence(
    exact: Any, rows: Rows, epsilon: float
) -> None:
    """Σ over answer tokens, with the same draw computed row by row from the model's own logits."""
    batch = twice(batch_of(rows((5, 17, 9))))
    with dropout_at(places_of_dropout(exact), 0.5):
        torch.manual_seed(1)
        loss, nll = TokenLoss(epsilon, r_drop=0.7)(exact, batch)
        torch.manual_seed(1)
        logits = exact(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].detach()
    total, plain, apart = 0.0, 0.0, 0.0
    for row in range(3):
        labels = batch["labels"][row, 1:]
        kept = labels != IGNORED
        one, two = logits[row, kept], logits[row + 3, kept]
        for each in (one, two):
            total += float(cross_entropy(each, labels[kept], label_smoothing=epsilon, reduction="sum")) / 2
            plain += float(cross_entropy(each, labels[kept], reduction="sum")) / 2
        p, q = one.softmax(-1), two.softmax(-1)
        apart += float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    assert apart > 1e-6, "the two draws differ"
    assert float(loss.detach()) == pytest.approx(total + 0.7 * apart, rel=1e-10)
    assert float(nll) == pytest.approx(plain, rel=1e-10)


def test_r_drop_without_dropout_is_the_cross_entropy(exact: Any, rows: Rows) -> None:
    batch = batch_of(rows((5, 17, 9)))
    loss, _ = TokenLoss(r_drop=5.0)(exact, twice(batch))
    assert float(loss.detach()) == pytest.approx(float(token_nll(exact, batch).sum()), rel=1e-12)


# -- penalties


def test_penalty_gradients_by_hand() -> None:
    """w = (2, -1, 0), w⁰ = (1, 1, 1), λ₁ = 0.5, λ₂ = 0.1, α = 0.3: 0.5 · sign + 0.1 · w + 0.3 · (w - w⁰)."""
    w = nn.Parameter(torch.tensor([2.0, -1.0, 0.0]))
    w.grad = torch.tensor([10.0, 10.0, 10.0])
    Penalties(l1=0.5, l2=0.1, l2_sp=0.3, start={"w": torch.ones(3)}).add_gradients({"w": w})
    torch.testing.assert_close(w.grad, torch.tensor([11.0, 8.8, 9.7]))


def test_penalty_gradients_are_those_of_the_formula() -> None:
    w, start = nn.Parameter(torch.randn(6, 5, dtype=torch.float64)), torch.randn(6, 5, dtype=torch.float64)
    value = 0.3 * w.abs().sum() + 0.5 * 0.7 * (w**2).sum() + 0.5 * 0.2 * (w - start).norm() ** 2
    (expected,) = torch.autograd.grad(value, w)
    Penalties(l1=0.3, l2=0.7, l2_sp=0.2, start={"w": start}).add_gradients({"w": w})
    assert w.grad is not None
    torch.testing.assert_close(w.grad, expected, rtol=1e-14, atol=1e-14)


def test_spared_tensors_are_pulled_to_their_beginning_alone() -> None:
    w = nn.Parameter(torch.tensor([2.0, -1.0]))
    Penalties(l1=0.5, l2=0.1, l2_sp=0.3, start={"w": torch.ones(2)}, spared=frozenset("w")).add_gradients({"w": w})
    torch.testing.assert_close(w.grad, torch.tensor([0.3, -0.6]))


def test_a_frozen_tensor_gets_no_gradient() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    Penalties(l1=1.0, l2=1.0).add_gradients({"frozen": frozen})
    assert frozen.grad is None


# -- NEFTune


LENGTHS = (40, 100)
WIDTH = 2000


def noise(alpha: float = 5.0) -> torch.Tensor:
    tokens = torch.zeros(2, 100, 1)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = 1
    return neftune(tokens, alpha)(torch.zeros(2, 100, WIDTH))


@pytest.mark.parametrize("row", [0, 1])
def test_the_noise_law(row: int) -> None:
    """Each number has the variance α² / (3Ld), a row α² / 3; of u² the mean is 1/3 and the variance 1/5 - 1/9."""
    n = LENGTHS[row] * WIDTH
    drawn = noise()[row, : LENGTHS[row]].double()
    error = 5 * math.sqrt((1 / 5 - 1 / 9) / n) / (1 / 3)
    assert error < 0.02
    assert float(drawn.square().mean()) == pytest.approx(25 / (3 * n), rel=error)
    assert float(drawn.square().sum()) == pytest.approx(25 / 3, rel=error)
    assert abs(float(drawn.mean())) < 5 * math.sqrt(25 / (3 * n) / n)
    assert float(drawn.abs().max()) <= 5 / math.sqrt(n) * (1 + 2**-22)


def test_padding_gets_no_noise_and_does_not_count() -> None:
    drawn = noise()
    assert not drawn[0, LENGTHS[0] :].any()
    padded_length = 25 / (3 * 100 * WIDTH)
    found = float(drawn[0, : LENGTHS[0]].square().mean())
    assert found == pytest.approx(padded_length * 100 / 40, rel=0.02), "with the padded length it would be 2.5 x less"


def test_contract_rows_without_padding_get_the_noise_of_transformers() -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    embedding = nn.Embedding(11, 64).train()
    embedding.neftune_noise_alpha = torch.tensor(5.0)  # type: ignore[assignment]
    ids = torch.randint(0, 11, (3, 9))
    torch.manual_seed(4)
    expected = neftune_post_forward_hook(embedding, ids, embedding(ids).detach())
    torch.manual_seed(4)
    found = neftune(torch.ones(3, 9, 1), 5.0)(embedding(ids).detach())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_change_that_is_not_in_force_is_an_error(exact: Any, rows: Rows) -> None:
    batch = batch_of(rows((5,)))
    embedded = exact.get_input_embeddings()(batch["input_ids"]).detach()
    embeddings = exact.get_input_embeddings()
    with pytest.raises(TrainingError, match="0 times"), changed(exact, lambda e: e + 1):
        exact(inputs_embeds=embedded)
    with pytest.raises(TrainingError, match="2 times"), changed(exact, lambda e: e + 1):
        exact(batch["input_ids"])
        exact(batch["input_ids"])
    assert not embeddings._forward_hooks


# -- Mixout


def test_mixout_is_start_or_what_keeps_the_expectation() -> None:
    """w = 3, u = 1, p = ¼: 1 where mixed, (3 - ¼) / ¾ = 11/3 elsewhere; ¼ · 1 + ¾ · 11/3 = 3."""
    n, p = 200_000, 0.25
    w = torch.full((n,), 3.0, requires_grad=True)
    found = mixed(w, torch.ones(n), p)
    kept = found > 2
    torch.testing.assert_close(found.detach(), torch.where(kept, 11 / 3, 1.0))
    assert float((~kept).double().mean()) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n))
    deviation = (3 - 1) * math.sqrt(p / (1 - p))
    assert float(found.double().mean()) == pytest.approx(3.0, abs=5 * deviation / math.sqrt(n))
    (gradient,) = torch.autograd.grad(found.sum(), w)
    torch.testing.assert_close(gradient, torch.where(kept, 4 / 3, 0.0))


def test_mixout_without_a_chance_is_the_weight() -> None:
    w = torch.randn(50)
    assert torch.equal(mixed(w, torch.randn(50), 0.0), w)


def test_a_mixture_hangs_in_every_place_and_is_taken_out_whatever_happens(exact: Any) -> None:
    """The tiny base has a tied head: one parameter in two places."""
    head, embedding = exact.get_output_embeddings(), exact.get_input_embeddings()
    before = list(exact.named_parameters())
    with pytest.raises(ZeroDivisionError), mixture(exact, {"model.embed_tokens.weight": torch.zeros(259, 64)}, 0.5):
        assert head.weight is embedding.weight
        assert not isinstance(embedding.weight, nn.Parameter)
        assert 0.4 < float((embedding.weight == 0).double().mean()) < 0.6
        1 / 0
    after = list(exact.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(left is right for (_, left), (_, right) in zip(after, before, strict=True))
    assert head.weight is embedding.weight


# -- adversarial


def test_the_random_start_is_uniform_and_within_epsilon() -> None:
    tokens = torch.ones(2, 100, 1)
    tokens[0, 40:] = 0
    start = uniform_start(tokens, 500, 3.0)
    norms = row_norms(start).flatten()
    assert bool((norms <= 3.0).all())
    # ‖δ‖² is ε² · mean(u²)
    for norm, n in zip(norms.tolist(), (40 * 500, 100 * 500), strict=True):
        error = 5 * math.sqrt((1 / 5 - 1 / 9) / n) / (1 / 3)
        assert norm**2 == pytest.approx(3.0, rel=error)
    assert not start[0, 40:].any()


def test_one_ascent_step_by_hand() -> None:
    """δ = (0, 1), g = (3, 4): by 0.5 along (0.6, 0.8) to (0.3, 1.4), and back to the length 1."""
    delta, gradient = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[3.0, 4.0]]])
    torch.testing.assert_close(worse(delta, gradient, epsilon=9.0, step_size=0.5), torch.tensor([[[0.3, 1.4]]]))
    shrunk = worse(delta, gradient, epsilon=1.0, step_size=0.5)
    torch.testing.assert_close(shrunk, torch.tensor([[[0.3, 1.4]]]) / math.sqrt(0.3**2 + 1.4**2))
    assert torch.equal(worse(delta, torch.zeros_like(delta), epsilon=9.0, step_size=0.5), delta), "no answer in the row"


def test_padding_is_not_perturbed_where_a_gradient_reaches_it() -> None:
    tokens, seen = torch.tensor([[[1.0], [1.0], [0.0]]]), []

    def passed(change: Any, share: float) -> float:
        seen.append(change(torch.zeros(1, 3, 4)))
        seen[-1].sum().backward()
        return 0.0

    ascent(passed, torch.zeros(1, 3, 4), tokens, lambda: None, epsilon=9.0, steps=2, step_size=2.0)
    torch.testing.assert_close(seen[1].detach()[0], torch.tensor([[2 / 8**0.5] * 4] * 2 + [[0.0] * 4]))


@pytest.mark.parametrize(("steps", "step_size", "epsilon"), [(1, 0.0, 0.5), (2, 0.5, 0.5), (3, 0.4, 0.5)])
def test_the_ascent_is_algorithm_1_row_by_row(
    exact: Any, rows: Rows, steps: int, step_size: float, epsilon: float
) -> None:
    """Written again in float64 over `inputs_embeds`, every row alone; the third case meets the projection."""
    made = rows((5, 17, 9))
    batch = batch_of(made)
    tokens = tokens_of(batch)
    start = uniform_start(tokens, 64, epsilon).double()
    seen: list[torch.Tensor] = []

    def passed(change: Any, share: float) -> float:
        def watched(embedded: torch.Tensor) -> torch.Tensor:
            seen.append((change(embedded) - embedded).detach())
            return change(embedded)  # type: ignore[no-any-return]

        with changed(exact, watched):
            loss = token_nll(exact, batch).sum()
        (loss * share).backward()
        return float(loss.detach())

    exact.zero_grad()
    first = ascent(passed, start, tokens, lambda: None, epsilon=epsilon, steps=steps, step_size=step_size)
    found = {name: p.grad.clone() for name, p in exact.named_parameters()}
    exact.zero_grad()
    shown, largest = 0.0, 0.0
    for index, row in enumerate(made):
        n, delta = len(row.input_ids), start[index, : len(row.input_ids)]
        for at in range(steps):
            delta = delta.detach().requires_grad_()
            embedded = exact.get_input_embeddings()(torch.tensor(row.input_ids)) + delta
            logits = exact(inputs_embeds=embedded[None]).logits[0, :-1]
            loss = cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=IGNORED, reduction="sum")
            (loss / steps).backward()
            shown += float(loss.detach()) if at == 0 else 0.0
            assert delta.grad is not None
            torch.testing.assert_close(seen[at][index, :n], delta.detach(), rtol=1e-9, atol=1e-11)
            assert not seen[at][index, n:].any(), "padding is not perturbed"
            gradient = delta.grad * steps
            delta = delta.detach() + step_size * gradient / gradient.norm()
            largest = max(largest, float(delta.norm()))
            delta = delta * min(1.0, epsilon / float(delta.norm()))
    assert first == pytest.approx(shown, rel=1e-10)
    assert (largest > epsilon) == (step_size > 0)
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-8, atol=1e-10)
    exact.zero_grad()


# -- dropout


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=64, n_layer=1, n_head=2, n_positions=32))


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=50, ffn_dim=64, max_position_embeddings=32, **shape))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=32, **shape))


@pytest.mark.parametrize("make", [gpt2, opt, bert])
def test_every_place_of_an_architecture_is_set_and_put_back(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    ids = torch.arange(20)[None]

    def draw() -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids).logits.detach()
        return logits

    places = places_of_dropout(model)
    own = [getattr(module, name) for module, name in places]
    assert len(places) >= 3
    assert drops(model)
    assert not torch.equal(draw(), draw())
    with dropout_at(places, 0.0):
        assert torch.equal(draw(), draw()), "no rate was missed"
        assert not drops(model)
    with pytest.raises(ZeroDivisionError), dropout_at(places, 0.5):
        1 / 0
    assert [getattr(module, name) for module, name in places] == own


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_attention_reads_the_rate_that_is_set(kind: str, tmp_path: Path) -> None:
    model = write_family(tmp_path, kind).train()
    ids = torch.arange(3, 23)[None]
    assert not drops(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    with dropout_at(places_of_dropout(model), 0.5):
        assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_adapters_dropout_is_not_the_bases(tuned: Callable[..., Any]) -> None:
    model = tuned(bits=32, lora_dropout=0.25).model
    places = places_of_dropout(model)
    assert [name for _, name in places] == ["attention_dropout"] * 2
    with dropout_at(places, 0.5):
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}


# -- the spec


REFUSED = [
    ({"r_drop": 1.0, "adversarial": "fgm", "adversarial_epsilon": 1.0}, "r_drop exclude each other"),
    ({"neftune_alpha": 5.0, "adversarial": "fgm", "adversarial_epsilon": 1.0}, "neftune_alpha exclude each other"),
    ({"adversarial_epsilon": 1.0}, "adversarial=none does not use adversarial_epsilon"),
    ({"adversarial": "fgm"}, "needs adversarial_epsilon"),
    ({"adversarial": "fgm", "adversarial_epsilon": 1.0, "adversarial_steps": 2}, "fgm does not use adversarial_steps"),
    ({"adversarial": "freelb", "adversarial_epsilon": 1.0, "adversarial_steps": 2}, "needs adversarial_step_size"),
    ({"mixout": 1.0}, "less than 1"),
    ({"label_smoothing": 1.0}, "less than 1"),
    ({"dropout": 1.0}, "less than 1"),
    ({"l2": -1.0}, "greater than or equal to 0"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RegularizeSpec(**settings)


def test_what_is_in_force() -> None:
    assert RegularizeSpec().active == ()
    spec = RegularizeSpec(dropout=0.0, l1=1e-5, adversarial="fgm", adversarial_epsilon=1.0)
    assert spec.active == ("l1", "dropout", "adversarial")
    assert spec.on_embeddings == ("adversarial",)
