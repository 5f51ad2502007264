"""Base and adapter on the same prompts: what is asked, what changed, what was given away, and what stays in the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from tiny_bases import write_base

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.ref import BaseSpec
from peftkit.data.audit import DataSpec, Part, encode
from peftkit.data.chat_prompt import chat_prompt
from peftkit.data.formats import load_rows
from peftkit.errors import DataError
from peftkit.evaluation.behaviour.asking import Asked, behave, prepare_behaviour, with_recall
from peftkit.evaluation.behaviour.canary import ALTERNATIVES, MOST, alternatives, exposure, forms
from peftkit.evaluation.behaviour.change import COLUMNS, Behaved, BehaviourChange, Outcome, mcnemar
from peftkit.evaluation.behaviour.probes import load_probes
from peftkit.evaluation.behaviour.recall import BEGUN, CONTINUED, choose
from peftkit.evaluation.held_out import Comparison, Contestant, compare, prepare
from peftkit.evaluation.spec import EvaluateSpec
from peftkit.events import Note, Table, Warned, silent
from peftkit.recipe import report_comparison

QUICK = EvaluateSpec(max_new_tokens=4, max_generated_rows=1, retention=None, behaviour="general")
PAIR = "zanzibar"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = write_base(tmp_path_factory.mktemp("lively"), seed=5, initializer_range=0.2, tie_word_embeddings=False)
    return load_backbone(BaseSpec(source=str(folder)), QuantSpec(bits=32, device="cpu"), folder / "cache")


@pytest.fixture
def rows(tmp_path: Path, backbone: Backbone) -> Callable[..., Part]:
    def build(given: list[dict[str, Any]]) -> Part:
        path = tmp_path / "held.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in given))
        source, spec = load_rows(path), DataSpec()
        return encode(source.rows, source, "held_out", backbone.tokenizer, spec, spec.max_length)

    return build


def written(tmp_path: Path, *lines: dict[str, Any]) -> str:
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@contextmanager
def saying(backbone: Backbone, text: str) -> Iterator[Any]:
    """The model, taught for a moment to say `text` to every prompt: what it says follows from its last token alone.

    Real weights: the blocks write nothing (their output projections are zero), so the head sees the last token's
    embedding, and a one-hot table of what follows what.
    """
    model, tokenizer = backbone.model, backbone.tokenizer
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    ids = [tokenizer.encode("\n")[0], *tokenizer.encode(text), tokenizer.stop_ids[0]]
    assert len(set(ids)) == len(ids), "a token can be followed by one token only"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table, head = model.model.embed_tokens.weight, model.lm_head.weight
        table.zero_()
        head.zero_()
        for place, (one, following) in enumerate(pairwise(ids)):
            table[one, place] = 1.0
            head[following, place] = 9.0
    try:
        yield model
    finally:
        model.load_state_dict(kept)


@pytest.fixture
def few(tmp_path: Path) -> EvaluateSpec:
    """Three probes of one's own, and answers of three tokens: what a random model says costs time and tells nothing."""
    lines = [{"id": f"own {i}", "family": "tone", "prompt": "Hi" * i, "check": {"kind": "stops"}} for i in (1, 2, 3)]
    return QUICK.model_copy(update={"behaviour": written(tmp_path, *lines), "max_new_tokens": 3})


def as_base(backbone: Backbone) -> Contestant:
    return Contestant("base", lambda: nullcontext(backbone.model))


def test_canary_forms_keep_digits_letters_case_and_marks() -> None:
    assert forms("7") == 10
    assert forms("aZ-4") == 26 * 26 * 10
    assert forms("--") == 1
    made = alternatives("aZ-4")
    assert len(set(made)) == ALTERNATIVES
    assert "aZ-4" not in made
    assert all(len(m) == 4 and m[0].islower() and m[1].isupper() and m[2] == "-" and m[3].isdigit() for m in made)
    assert made == alternatives("aZ-4")
    assert made != alternatives("aZ-4", seed=1)
    for secret in map(str, range(10, 20)):  # of 100 forms: one that was not left out would be drawn
        assert len(alternatives(secret)) == ALTERNATIVES
        assert secret not in alternatives(secret)


def test_exposure_by_hand() -> None:
    """|R| = 4: first of four is 2 bits, second 1, fourth 0; a tie ranks before the secret."""
    assert exposure(1.0, [2.0, 3.0, 4.0]) == 2.0
    assert exposure(2.5, [2.0, 3.0, 4.0]) == 1.0
    assert exposure(9.0, [2.0, 3.0, 4.0]) == 0.0
    assert exposure(2.0, [2.0, 3.0, 4.0]) == 1.0
    assert exposure(0.0, [1.0] * ALTERNATIVES) == MOST == math.log2(65)


def test_exposure_of_a_model_that_has_no_preference_is_that_of_a_random_rank() -> None:
    """With |R| = 65 equally likely ranks the mean exposure is Σ (log2 65 - log2 k) / 65; 4 standard errors."""
    random = np.random.default_rng(0)
    found = [exposure(draw[0], draw[1:]) for draw in random.random((4000, 65)).tolist()]
    bits = np.log2(65) - np.log2(np.arange(1, 66))
    assert abs(np.mean(found) - bits.mean()) <= 4 * bits.std() / math.sqrt(4000)


def test_mcnemar_is_the_binomial_test_of_the_probes_that_changed() -> None:
    """By hand: 5 lost, none won: 2 · (1/2)^5 = 1/16."""
    assert mcnemar(5, 0) == 1 / 16
    assert mcnemar(0, 0) == 1.0
    for lost in range(9):
        for won in range(9):
            if lost + won:
                assert mcnemar(lost, won) == pytest.approx(binomtest(lost, lost + won).pvalue, rel=1e-12)


def outcomes(*passed: bool, answer: str = "x") -> tuple[Outcome, ...]:
    names = (("r1", "refusal"), ("r2", "refusal"), ("f1", "format"), ("c1", "canary"))
    exposures = (None, None, None, 3.0)
    return tuple(
        Outcome(id, family, answer, good, bits)
        for (id, family), good, bits in zip(names, passed, exposures, strict=True)
    )


def test_changes_are_paired_by_probe() -> None:
    base = Behaved("p.jsonl", "0" * 64, outcomes(True, True, False, True), (False, False))
    adapter = Behaved("p.jsonl", "0" * 64, outcomes(False, True, True, False), (True, False))
    change = BehaviourChange(base, adapter)
    refusal, format_, canary = change.families()
    assert (refusal.prompts, refusal.base, refusal.adapter, refusal.lost, refusal.won) == (2, 2, 1, ("r1",), ())
    assert (format_.lost, format_.won, canary.lost) == ((), ("f1",), ("c1",))
    assert change.lost() == ["r1", "c1"]
    figures = change.figures()
    assert figures["families"]["refusal"]["base"]["point"] == 1.0
    assert figures["families"]["refusal"]["base"]["low"] == pytest.approx(
        2 / (2 + 1.959964**2), rel=1e-6
    )  # Wilson, n/n
    assert figures["training_answers_continued"] == {"rows": 2, "base": 0, "adapter": 1}
    assert figures["highest_exposure_bits"] == {"base": 3.0, "adapter": 3.0}
    assert {len(row) for row in change.rows()} == {len(COLUMNS)}
    assert "r1" not in json.dumps(figures)
    with pytest.raises(ValueError, match="zip"):
        BehaviourChange(base, Behaved("p", "0", ())).rows()


def test_the_base_against_itself_changes_nothing(backbone: Backbone, rows: Any, few: EvaluateSpec) -> None:
    part = rows([{"prompt": "a?", "completion": "b"}])
    held = prepare(part, DataSpec().rendering, few, backbone, silent)
    result = compare(as_base(backbone), as_base(backbone), held, few, backbone)
    change = result.behaviour
    assert change is not None
    assert (change.lost(), change.won()) == ([], [])
    assert [sample["probe"] for sample in change.samples()] == ["own 1", "own 2", "own 3"]
    assert len(result.samples()) == 4


def test_an_adapter_that_always_says_sorry_is_caught(backbone: Backbone, rows: Any) -> None:
    """The planted regression: the base answers `Dog.`, the adapter `I can't` to whatever it is asked."""
    part = rows([{"prompt": "a?", "completion": "b"}])
    held = prepare(part, DataSpec().rendering, QUICK, backbone, silent)
    base = Contestant("base", lambda: saying(backbone, "Dog."))
    adapter = Contestant("adapter", lambda: saying(backbone, "I can't"))
    result = compare(base, adapter, held, QUICK, backbone)
    change = result.behaviour
    assert change is not None
    assert {sample["base"] for sample in change.samples()} == {"Dog."}
    assert {sample["adapter"] for sample in change.samples()} == {"I can't"}
    families = {family.name: (family.prompts, family.base, family.adapter) for family in change.families()}
    assert families == {
        "refusal": (5, 0, 5), "over_refusal": (5, 5, 0), "format": (6, 1, 0), "language": (3, 0, 0), "stop": (3, 3, 3),
        "echo": (2, 0, 0),
    }  # fmt: skip
    assert result.figures()["other"]["behaviour"]["families"]["over_refusal"]["p"] == 1 / 16

    said: list[Any] = []
    report_comparison(result, said.append)
    assert [event for event in said if isinstance(event, Warned)] == []
    said.clear()
    turned = Comparison(held, result.adapter, result.base, (), QUICK)
    report_comparison(turned, said.append)
    (warned,) = [event for event in said if isinstance(event, Warned)]
    assert "answers 5 harmful requests that the base declines, counted by phrases: refusal-explosive" in warned.text
    (table,) = [event for event in said if isinstance(event, Table) and event.title.startswith("behaviour")]
    assert table.rows[0][:5] == ("refusal", "5/5", "57%–100%", "0/5", "0%–43%")


def test_figures_taken_earlier_carry_the_answers_to_the_probes(
    backbone: Backbone, rows: Any, few: EvaluateSpec
) -> None:
    part = rows([{"prompt": "a?", "completion": "b"}])
    held = prepare(part, DataSpec().rendering, few, backbone, silent)
    first = compare(as_base(backbone), as_base(backbone), held, few, backbone)
    refused = Contestant("base", lambda: pytest.fail("the base was asked twice"))
    again = compare(refused, as_base(backbone), held, few, backbone, before=first.base, prompted=())
    assert again.behaviour == first.behaviour


@pytest.mark.parametrize(
    ("given", "settings", "why"),
    [
        ({"prompt": "a?", "completion": "b"}, {"max_generated_rows": 0}, "max_generated_rows=0"),
        ({"text": "a b c"}, {}, "plain text"),
        ({"prompt": "a?", "completion": "b"}, {"template": "plain"}, "no chat template"),
        ({"prompt": "a?", "completion": "b"}, {"behaviour": "auto"}, "on a CPU"),
    ],
)
def test_where_the_shipped_probes_say_nothing_they_are_left_out_and_that_is_said(
    given: dict[str, Any], settings: dict[str, Any], why: str, backbone: Backbone, rows: Any
) -> None:
    rendering = DataSpec(template=settings.pop("template", "base")).rendering
    said: list[Any] = []
    spec = QUICK.model_copy(update=settings)
    assert prepare_behaviour(spec, rows([given]), rendering, backbone, said.append) is None
    (note,) = said
    assert isinstance(note, Note)
    assert why in note.text
    off = spec.model_copy(update={"behaviour": None})
    assert prepare_behaviour(off, rows([given]), rendering, backbone, said.append) is None
    assert len(said) == 1


def test_no_prompt_answer_or_id_leaves_the_run_folder(backbone: Backbone, rows: Any, tmp_path: Path) -> None:
    part = rows([{"prompt": f"{PAIR}?", "completion": f"{PAIR} " + "abcdefgh" * 6}])
    file = written(
        tmp_path,
        {"id": PAIR, "family": "tone", "prompt": f"Say {PAIR}.", "check": {"kind": "regex", "pattern": PAIR}},
        {"id": f"{PAIR} 2", "family": "canary", "prefix": f"{PAIR} ", "secret": "a1b2"},
    )
    spec = QUICK.model_copy(update={"behaviour": file})
    held = prepare(part, DataSpec().rendering, spec, backbone, silent)
    result = compare(as_base(backbone), as_base(backbone), held, spec, backbone, train_rows=part.rows)
    figures = result.figures()
    assert PAIR not in json.dumps(figures)
    assert set(figures["other"]["behaviour"]["families"]) == {"tone", "canary"}
    assert figures["other"]["behaviour"]["training_answers_continued"]["rows"] == 1
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert PAIR in json.dumps(result.samples())


def canary(backbone: Backbone, tmp_path: Path, rows: Any, **line: Any) -> Asked:
    file = written(tmp_path, {"id": "c", "family": "canary", **line})
    spec = QUICK.model_copy(update={"behaviour": file})
    asked = prepare_behaviour(spec, rows([{"text": "a"}]), DataSpec().rendering, backbone, silent)
    assert asked is not None
    return asked


def test_a_secret_that_the_model_knows_is_given_away_and_has_the_highest_exposure(
    backbone: Backbone, rows: Any, tmp_path: Path
) -> None:
    asked = canary(backbone, tmp_path, rows, prompt="What is the code?", prefix="Z", secret="q7-x")
    (question,) = asked.questions
    assert backbone.tokenizer.decode(question.prompt, skip_special_tokens=False).endswith("assistant\nZ")
    assert backbone.tokenizer.decode(question.rest) == "q7-x"
    lengths = {len(form.input_ids) for form in question.forms}
    assert lengths == {len(question.prompt) + 4}

    def ask(model: Any) -> Outcome:
        (outcome,) = behave(model, asked, backbone.tokenizer, backbone.device, 9).outcomes
        return outcome

    before = ask(backbone.model)
    assert before.passed
    with saying(backbone, "Zq7-x") as model:
        told = ask(model)
    assert (told.passed, told.exposure) == (False, MOST)
    with saying(backbone, "Zq7-y") as model:
        near = ask(model)
    assert near.passed
    assert ask(backbone.model) == before


def test_exposure_is_that_of_likelihoods_written_out(backbone: Backbone, rows: Any, tmp_path: Path) -> None:
    """The NLL of the whole text after the prompt, in float64 from the logits; the rank by sorting."""
    asked = canary(backbone, tmp_path, rows, prefix="code ", secret="k9m")
    (outcome,) = behave(backbone.model, asked, backbone.tokenizer, backbone.device, 9).outcomes
    sums = []
    for secret in ("k9m", *alternatives("k9m")):
        ids = torch.tensor([[*backbone.tokenizer.bos, *backbone.tokenizer.encode("code " + secret)]])
        with torch.no_grad():
            logits = backbone.model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(backbone.tokenizer.bos)
        sums.append(-sum(float(logits[at - 1, ids[0, at]]) for at in range(max(1, start), ids.shape[1])))
    rank = sorted(sums).index(sums[0]) + 1
    assert outcome.exposure == pytest.approx(math.log2(65) - math.log2(rank), rel=1e-12)


def test_training_answers_are_the_longest_that_stand_there_once(backbone: Backbone, rows: Any) -> None:
    answers = ["n" * 60, "n" * 60, "m" * 50, "short", *(f"answer {i} " + "k" * (20 + i) for i in range(12))]
    part = rows([{"prompt": f"q{i}", "completion": answer} for i, answer in enumerate(answers)])
    chosen = choose(part.rows, backbone.tokenizer, DataSpec().rendering, 512)
    assert len(chosen) == 8
    decode = backbone.tokenizer.decode
    assert decode(chosen[0].prompt, skip_special_tokens=False).endswith("assistant\n" + "m" * BEGUN)
    assert decode(chosen[0].rest) == "m" * CONTINUED
    assert [decode(recall.prompt[-BEGUN:]) for recall in chosen[1:]] == [
        f"answer {i}"[:BEGUN] for i in range(11, 4, -1)
    ]
    assert choose(part.rows, backbone.tokenizer, DataSpec().rendering, 20) == []
    assert choose(rows([{"text": "a " * 50}]).rows, backbone.tokenizer, DataSpec().rendering, 512) == []


def test_an_answer_that_is_continued_word_for_word_is_counted(backbone: Backbone, rows: Any, tmp_path: Path) -> None:
    learned = "abcdefghijklmnopqrstuvwxyz"
    part = rows([{"prompt": "q", "completion": learned}, {"prompt": "q", "completion": learned[::-1]}])
    asked = canary(backbone, tmp_path, rows, prefix="Z", secret="12")
    asked = with_recall(asked, part.rows, DataSpec().rendering, backbone)
    assert len(asked.recall) == 2
    with saying(backbone, learned) as model:
        told = behave(model, asked, backbone.tokenizer, backbone.device, 9)
    assert sorted(told.recalled) == [False, True]
    assert behave(backbone.model, asked, backbone.tokenizer, backbone.device, 9).recalled == (False, False)


def test_probes_that_the_base_has_no_positions_for_are_named(backbone: Backbone, rows: Any, tmp_path: Path) -> None:
    line = {"id": "long", "family": "tone", "prompt": "x" * 600, "check": {"kind": "stops"}}
    spec = QUICK.model_copy(update={"behaviour": written(tmp_path, line, {**line, "id": "short", "prompt": "x"})})
    with pytest.raises(DataError, match=r"1 probes are longer than the base's 512 positions: long: 6\d\d tokens"):
        prepare_behaviour(spec, rows([{"prompt": "a", "completion": "b"}]), DataSpec().rendering, backbone, silent)


@pytest.mark.base
@pytest.mark.full
def test_the_embedded_base_answers_the_shipped_probes(embedded: Path, cache: Path, rows: Any) -> None:
    """SmolLM2 was not trained to refuse: it declines few, and answers what is harmless."""
    backbone = load_backbone(BaseSpec(), QuantSpec(device="cpu"), cache)
    probes = load_probes("general")
    rendering = DataSpec().rendering
    prompts = [chat_prompt(probe.conversation, backbone.tokenizer, rendering) for probe in probes.probes]
    assert len(prompts) == 24
    assert max(map(len, prompts)) < 80
    part = rows([{"prompt": "a?", "completion": "b"}])
    asked = prepare_behaviour(EvaluateSpec(behaviour="general"), part, rendering, backbone, silent)
    assert asked is not None
    outcomes = behave(backbone.model, asked, backbone.tokenizer, backbone.device, 48).outcomes
    passed = {outcome.id for outcome in outcomes if outcome.passed}
    assert len(outcomes) == 24
    assert {"harmless-process", "harmless-weeds", "language-en", "echo-sentence"} <= passed
