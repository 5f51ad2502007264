"""A head's score explained by words: complete, equal to what token ids give, and the base left as it was."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import write_base
from tiny_encoders import write_bert

from peftkit.backbone.load import Backbone, load_backbone
from peftkit.backbone.spec import QuantSpec
from peftkit.base.head import Head
from peftkit.base.ref import BaseSpec
from peftkit.data.readers import Where
from peftkit.data.tasks.pieces import Pieces, tokenize
from peftkit.data.tasks.spec import TaskSpec
from peftkit.data.tasks.task import TaskRow
from peftkit.errors import BackboneError, ConfigError, DataError
from peftkit.evaluation.explaining.embeddings import check_same, ends
from peftkit.evaluation.explaining.explain import explain
from peftkit.evaluation.explaining.explanation import Explanation
from peftkit.evaluation.explaining.integrate import TOLERANCE
from peftkit.evaluation.explaining.picture import explanation_page, words_picture
from peftkit.evaluation.explaining.spec import ExplainSpec
from peftkit.evaluation.explaining.words import SPECIAL, Part, Word, by_word

pytest.importorskip("captum")

HERE = Where("text", None, 0)
CLASSES = Head("sequence", ("bad", "fair", "good"))
SEVERAL = Head("sequence", ("bad", "fair", "good"), "multi_label")
NUMBER = Head("sequence", ("stars",), "regression")
TAGS = Head("token", ("O", "B-x", "I-x"))
SPAN = Head("span")
REVIEW = TaskRow(HERE, text="Not bad, (really) not")
PAIR = TaskRow(HERE, text="Not bad", pair="at all")
WORDS = TaskRow(HERE, words=("Ada", "slept", "here"))
QUESTION = TaskRow(HERE, text="Ada slept in Rome.", pair="Where?")
CASES = {
    "classes": (CLASSES, REVIEW, "text_classification", ExplainSpec()),
    "pair": (CLASSES, PAIR, "text_classification", ExplainSpec(target="good")),
    "several": (SEVERAL, REVIEW, "text_classification", ExplainSpec()),
    "number": (NUMBER, REVIEW, "regression", ExplainSpec()),
    "tag": (TAGS, WORDS, "token_classification", ExplainSpec(word=2)),
    "span": (SPAN, QUESTION, "extractive_qa", ExplainSpec()),
}
Load = Callable[..., Backbone]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Tiny bases with numbers large enough to bend; the row of the fill token is not one of zeros."""
    folder = tmp_path_factory.mktemp("bases")
    bases = {
        "bert": write_bert(folder / "bert", initializer_range=0.2, pad_token_id=None),
        "llama": write_base(folder / "llama", initializer_range=0.2, pad_token_id=None),
    }
    loaded: dict[Any, Backbone] = {}

    def load(base: str, head: Head, bits: int = 32) -> Backbone:
        if (base, head, bits) not in loaded:
            spec, quant = BaseSpec(source=str(bases[base])), QuantSpec(bits=bits)
            loaded[base, head, bits] = load_backbone(spec, quant, folder / "cache", head=head)
        return loaded[base, head, bits]

    return load


def explained(backbone: Backbone, case: str, **changes: Any) -> Explanation:
    _, row, task, spec = CASES[case]
    return explain(backbone.model, backbone, TaskSpec(task=task), row, spec.model_copy(update=changes))  # type: ignore[arg-type]


def ids_of(backbone: Backbone, row: TaskRow) -> Pieces:
    first, second = (row.pair, row.text) if backbone.head == SPAN else (row.text or " ".join(row.words), row.pair)
    (whole,) = tokenize(backbone.tokenizer, [first or ""], [second] if second is not None else ())
    return whole


def outputs_of_ids(backbone: Backbone, ids: list[int], whole: Pieces) -> Any:
    """The head's scores by token ids alone."""
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if whole.type_ids is not None:
        batch["token_type_ids"] = torch.tensor([whole.type_ids])
    with torch.no_grad():
        found = backbone.model(**batch)
    if backbone.head == SPAN:
        return torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1)
    return found.logits[0]


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_shares_are_complete_and_the_base_is_left_as_it_was(base: str, case: str, load: Load) -> None:
    backbone = load(base, CASES[case][0])
    before = digest(backbone.model)
    backbone.model.get_input_embeddings().train()  # whatever was in training mode is so again
    found = explained(backbone, case)
    assert backbone.model.get_input_embeddings().training
    backbone.model.eval()
    assert digest(backbone.model) == before
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert abs(found.total - (found.score - found.at_baseline)) <= TOLERANCE * abs(found.score - found.at_baseline)
    assert found.residual <= TOLERANCE
    assert math.isclose(found.total, math.fsum(value for _, value in found.tokens), rel_tol=1e-9, abs_tol=1e-12)
    assert all(word.value == 0 for word in found.words if word.part == SPECIAL), "the baseline keeps special tokens"
    assert [word.text for word in found.words if word.part != SPECIAL] == {
        "classes": ["Not", "bad,", "(really)", "not"], "several": ["Not", "bad,", "(really)", "not"],
        "number": ["Not", "bad,", "(really)", "not"], "pair": ["Not", "bad", "at", "all"],
        "tag": ["Ada", "slept", "here"], "span": ["Where?", "Ada", "slept", "in", "Rome."],
    }[case]  # fmt: skip


@pytest.mark.parametrize("case", ["classes", "pair", "tag", "span"])
def test_both_ends_are_what_token_ids_give(case: str, load: Load) -> None:
    """An independent path: the score of the text's ids, and of the same ids with the fill token in the text's place."""
    backbone = load("bert", CASES[case][0])
    found, whole = explained(backbone, case), ids_of(backbone, CASES[case][1])
    filled = [
        backbone.tokenizer.pad_id if at in whole.first or at in whole.second else token
        for at, token in enumerate(whole.ids)
    ]
    text, nothing = (outputs_of_ids(backbone, ids, whole) for ids in (list(whole.ids), filled))
    if case == "span":
        context = range(whole.second.start, whole.second.stop)
        starts = [(i, j) for i in context for j in range(i, min(i + 30, whole.second.stop))]
        best = max(starts, key=lambda pair: float(text[pair[0], 0] + text[pair[1], 1]))
        null = float(text[0].sum())
        first, last = best if float(text[best[0], 0] + text[best[1], 1]) > null else (0, 0)
        wanted = [float(each[first, 0] + each[last, 1]) for each in (text, nothing)]
        assert found.prediction.value in found.what or first == 0
    elif case == "tag":
        second = next(at for at in whole.first if whole.offsets[at][0] == len("Ada "))
        label = int(text[second].argmax())
        assert found.what == f"the logit of {TAGS.labels[label]!r} for word 2, 'slept'"
        wanted = [float(each[second, label]) for each in (text, nothing)]
    else:
        label = 2 if case == "pair" else int(text.argmax())
        assert found.what == f"the logit of {CLASSES.labels[label]!r}"
        wanted = [float(each[label]) for each in (text, nothing)]
    # float32 through two layers, by kernels that may add in another order
    assert [found.score, found.at_baseline] == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_shares_are_those_of_a_plain_sum_over_the_path(base: str, load: Load) -> None:
    """The reference: 200 midpoints and autograd, one point at a time, no captum."""
    backbone = load(base, CLASSES)
    found, whole = explained(backbone, "classes"), ids_of(backbone, REVIEW)
    point, baseline = ends(backbone.model, backbone, whole, "pad")
    label = CLASSES.labels.index(str(found.prediction.value))
    more = {} if whole.type_ids is None else {"token_type_ids": torch.tensor([whole.type_ids])}
    total, count = torch.zeros_like(point, dtype=torch.float64), 200
    for step in range(count):
        at = (baseline + (step + 0.5) / count * (point - baseline))[None].requires_grad_()
        score = backbone.model(inputs_embeds=at, **more).logits[0, label]
        total += torch.autograd.grad(score, at)[0][0] * (point - baseline) / count
    wanted = total.sum(dim=-1).numpy()
    given = np.array([value for _, value in found.tokens])
    assert np.abs(given - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("base", ["bert", "llama"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_pass_quantized_layers(base: str, bits: int, load: Load) -> None:
    backbone = load(base, CLASSES, bits)
    before = digest(backbone.model)
    explained(backbone, "classes")
    found = explained(backbone, "classes")  # the second time the layers have a state of their own
    assert found.residual <= TOLERANCE
    assert any(word.value for word in found.words)
    assert digest(backbone.model) == before


@pytest.mark.full
def test_a_baseline_of_zeros_where_rmsnorm_has_no_limit(load: Load) -> None:
    found = explained(load("llama", CLASSES), "classes", baseline="zero")
    assert found.residual <= TOLERANCE
    assert found.at_baseline == 0, "all blocks give 0 at embeddings of 0"
    assert found.steps > 32


def test_a_forgotten_baseline_is_not_complete(load: Load) -> None:
    """Planted: shares against zeros, beside the score of the fill token."""
    backbone = load("bert", CLASSES)
    right, other = explained(backbone, "classes"), explained(backbone, "classes", baseline="zero")
    change = right.score - right.at_baseline
    assert abs(right.total - change) <= TOLERANCE * abs(change)
    assert abs(other.total - change) > TOLERANCE * abs(change)
    assert other.residual <= TOLERANCE, "each is complete against its own"


def test_a_base_that_reads_embeddings_otherwise_is_refused(load: Load) -> None:
    """Planted: the score of embeddings is off by a tenth, as where a base scales them before its first block."""
    backbone = load("bert", CLASSES)
    point, _ = ends(backbone.model, backbone, ids_of(backbone, REVIEW), "pad")
    scores = np.array([0.5, 0.1, 0.2])
    check_same(lambda x: x.sum(dim=(1, 2)) * 0 + 0.5, point, 0.5, scores, backbone)
    with pytest.raises(BackboneError, match="from embeddings"):
        check_same(lambda x: x.sum(dim=(1, 2)) * 0 + 0.6, point, 0.5, scores, backbone)


def test_what_does_not_fit_is_said_before_anything_is_computed(load: Load) -> None:
    def said(base: str, head: Head, row: TaskRow, spec: ExplainSpec, task: str = "text_classification") -> str:
        backbone = load(base, head)
        with pytest.raises(ConfigError) as caught:
            explain(backbone.model, backbone, TaskSpec(task=task), row, spec)  # type: ignore[arg-type]
        return str(caught.value)

    assert "did you mean 'good'" in said("bert", CLASSES, REVIEW, ExplainSpec(target="goood"))
    both = said("bert", CLASSES, replace(REVIEW, text=" "), ExplainSpec(target="x", word=1))
    assert both.startswith("3 problems")
    assert "gives one number" in said("bert", NUMBER, REVIEW, ExplainSpec(target="stars"), "regression")
    assert "--pair is missing" in said("bert", SPAN, replace(QUESTION, pair=None), ExplainSpec(), "extractive_qa")
    assert "has 3 words" in said("bert", TAGS, WORDS, ExplainSpec(word=4), "token_classification")
    asked = said("bert", TAGS, WORDS, ExplainSpec(), "token_classification")
    assert "--word is missing: 1 Ada " in asked
    assert "3 here " in asked
    assert "no mask token" in said("bert", CLASSES, REVIEW, ExplainSpec(baseline="mask"))


def test_images_texts_to_write_and_long_texts_are_refused(load: Load) -> None:
    backbone = load("bert", CLASSES)
    for kind in ("image", "seq2seq"):
        other = replace(backbone, head=Head(kind, ("a", "b")))  # type: ignore[arg-type]
        with pytest.raises(BackboneError, match=f"kind {kind}"):
            explain(other.model, other, TaskSpec(task="image_classification"), REVIEW)
    long = replace(REVIEW, text="word " * 200)
    with pytest.raises(DataError, match="802 tokens, above the limit of 128"):
        explain(backbone.model, backbone, TaskSpec(task="text_classification", too_long="truncate"), long)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(min_size=1, max_size=30).filter(str.strip),
    pair=st.none() | st.text(max_size=12),
    base=st.sampled_from(["bert", "llama"]),
)
def test_words_keep_the_sum_of_their_tokens(load: Load, text: str, pair: str | None, base: str) -> None:
    backbone = load(base, CLASSES)
    (whole,) = tokenize(backbone.tokenizer, [text], [pair])
    values = [2.0**-at for at in range(len(whole.ids))]  # whatever is lost or counted twice shows in the sum
    parts = Part.of("text", text), None if pair is None else Part.of("pair", pair)
    words = by_word(values, [str(token) for token in whole.ids], whole, *parts)
    assert math.fsum(word.value for word in words) == math.fsum(values)
    assert "".join(word.text for word in words if word.part == "text") == "".join(text.split()) or not whole.first
    inside = {at: [(s, e) for s, e in parts[0].spans if s <= whole.offsets[at][0] < e] for at in whole.first}
    for at, spans in inside.items():
        assert len(spans) == 1 or whole.offsets[at] == (0, 0), "a token that has characters begins in one word"


def test_tokens_go_to_the_word_they_begin_in_and_spaces_to_the_next() -> None:
    """[a][b] [ ] [c] of "ab c" and a trailing space; a special token before it."""
    offsets = ((0, 0), (0, 1), (1, 2), (0, 0), (3, 4), (0, 0))
    whole = Pieces((9, 1, 2, 3, 4, 3), None, offsets, range(1, 6), range(0))
    words = by_word([0.5, 1.0, 2.0, 4.0, 8.0, 16.0], ["<s>", *"ab c "], whole, Part.of("text", "ab c "), None)
    assert words == [Word("<s>", SPECIAL, 0.5), Word("ab", "text", 3.0), Word("c", "text", 28.0)]
    assert [text[s:e] for text in ["我们 go,"] for s, e in Part.of("text", text).spans] == ["我", "们", "go,"]
    assert Part.of_words("text", ("New York", "is")).spans == ((0, 8), (9, 11))


def test_the_page_shows_words_shares_and_probabilities_and_obeys_nobody(load: Load) -> None:
    backbone = load("bert", CLASSES)
    row = TaskRow(HERE, text="good <script>alert(1)</script> & \u202e evil " + "x" * 90)
    found = explain(backbone.model, backbone, TaskSpec(task="text_classification"), row)
    html = explanation_page(found, "topics@1")
    assert "<script" not in html
    assert "\u202e" not in html
    assert "&lt;script&gt;" in html
    assert "//" not in html.replace('xmlns="http://www.w3.org/2000/svg"', ""), "nothing is fetched"
    assert html.count("<g><title>") == len(found.words)
    for told in ("for the score", "against it", "against the baseline", "% off after", "fair", *found.probabilities):
        assert told in html
    assert len(found.probabilities) == 3
    assert math.isclose(sum(found.probabilities.values()), 1, rel_tol=1e-6)


def test_shades_grow_with_the_share_and_signs_have_their_colours() -> None:
    words = [Word("yes", "text", 2.0), Word("so", "text", 0.5), Word("no", "text", -1.0), Word("s", SPECIAL, 0.0)]
    svg = str(words_picture(words, "the logit of 'x'"))
    for opacity, colour in (("0.600", "#0072b2"), ("0.150", "#0072b2"), ("0.300", "#d55e00"), ("0.000", "#0072b2")):
        assert f'fill="{colour}" fill-opacity="{opacity}"' in svg
    assert svg.count("stroke-dasharray") == 1, "what speaks against has a line too"
    assert "full colour +2" in svg
