"""Metrics: F1 worked by hand, strictness of JSON, and that a reference always scores 1 against itself."""

from __future__ import annotations

import json
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import DataError
from peftkit.evaluation.metrics import METRICS, FieldCount, Score, by_group, choose, summarise

REFERENCE = '{"name": "Ada", "year": 1815, "note": null}'
TABLE = "CREATE TABLE t (id INTEGER, name TEXT); INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'b');"


def fields(prediction: str, reference: str = REFERENCE) -> Score:
    return METRICS["json_fields"](prediction, reference, {})


def counts(score: Score) -> dict[str, tuple[int, ...]]:
    """Per field (TP, FP, FN, TN)."""
    assert score.fields is not None
    return {name: astuple(count) for name, count in score.fields.items()}


def test_the_table_holds_the_three_metrics():
    assert list(METRICS) == ["exact_match", "json_fields", "sql_execution"]


@pytest.mark.parametrize(
    ("prediction", "reference", "value"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("New  York", "New York", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_exact_match_trims_only_the_ends(prediction, reference, value):
    assert METRICS["exact_match"](prediction, reference, {}) == Score(value)


def test_the_order_of_keys_and_blanks_do_not_count_in_json():
    score = fields('{ "note":null,\n"year":1815.0, "name":"\\u0041da" }')
    assert score == Score(
        1.0,
        {"name": FieldCount(1), "note": FieldCount(true_negative=1), "year": FieldCount(1)},
    )


def test_order_counts_in_lists_and_not_in_nested_objects():
    assert fields('{"a": {"y": 2, "x": [1, 2]}}', '{"a": {"x": [1, 2], "y": 2}}').value == 1.0
    assert fields('{"a": {"x": [2, 1], "y": 2}}', '{"a": {"x": [1, 2], "y": 2}}').value == 0.0


@pytest.mark.parametrize("given_value", ["true", '"1"', "1.5", "[1]", "null"])
def test_types_count(given_value):
    assert fields(f'{{"a": {given_value}}}', '{"a": 1}').value == 0.0


def test_each_kind_of_field_error_by_hand():
    score = fields('{"name": "Bob", "note": "poet", "extra": 1}')
    # name wrong: FP and FN; note invented where the reference has null: FP; year missing: FN; extra: FP.
    assert counts(score) == {"name": (0, 1, 1, 0), "note": (0, 1, 0, 0), "year": (0, 0, 1, 0), "extra": (0, 1, 0, 0)}
    assert score.value == 0.0
    assert score.detail == "missing: year; not asked for: extra; wrong: name, note"


def test_null_and_a_missing_key_are_two_objects_but_no_field_error():
    score = fields('{"name": "Ada", "year": 1815}')
    assert (score.value, counts(score)["note"]) == (0.0, (0, 0, 0, 1))
    assert score.detail == "missing: note"


@pytest.mark.parametrize(
    ("prediction", "detail"),
    [
        ("no idea", "Expecting value at line 1, column 1"),
        ("", "Expecting value at line 1, column 1"),
        ('{"name": "Ada",\n "year": }', "Expecting value at line 2, column 10"),
        ('{"name": "Ada"', "Expecting ',' delimiter at line 1, column 15"),
        (f"Here it is: {REFERENCE}", "JSON inside other text: Expecting value at line 1, column 1"),
        (f"```json\n{REFERENCE}\n```", "JSON inside other text: Expecting value at line 1, column 1"),
        (f"{REFERENCE} Done.", "JSON inside other text: Extra data at line 1, column 45"),
        ('{"name": "Ada", "name": "Ada", "year": 1815, "note": null}', "the key 'name' is given twice"),
        ('{"name": "Ada", "year": {"a": 1, "a": 1}}', "the key 'a' is given twice"),
        ('{"name": NaN}', "NaN is not JSON"),
        ('{"name": -Infinity}', "-Infinity is not JSON"),
        ('{"name": 1e999}', "the number 1e999 is out of range"),
        ("[1]", "a JSON list, not an object"),
        ('"Ada"', "a JSON value, not an object"),
        ("{'name': 'Ada'}", "Expecting property name enclosed in double quotes at line 1, column 2"),
        ('{"name": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_an_invalid_prediction_misses_all_fields_and_says_where(prediction, detail):
    score = fields(prediction)
    assert (score.value, score.detail) == (0.0, detail)
    assert counts(score) == {"name": (0, 0, 1, 0), "year": (0, 0, 1, 0)}


def test_numbers_too_long_for_python_are_a_reason_too():
    assert "4300 digits" in str(fields('{"name": ' + "1" * 5000 + "}").detail)


@pytest.mark.parametrize("reference", ["no json", "[1]", '{"a": 1, "a": 1}', '{"a": NaN}'])
def test_an_unusable_reference_is_an_error_that_names_its_row(reference):
    with pytest.raises(DataError, match="row 17"):
        METRICS["json_fields"]("{}", reference, {"id": 17})
    with pytest.raises(DataError, match="the row with the reference"):
        METRICS["json_fields"]("{}", reference, {})


def test_sql_execution_compares_rows_and_not_text():
    metric = METRICS["sql_execution"]
    columns = {"setup": TABLE}
    reference = "SELECT name, count(*) FROM t GROUP BY name"
    assert metric("select name, sum(1) as n from t group by 1 order by 2 desc;", reference, columns) == Score(1.0)
    assert metric("SELECT name FROM t", reference, columns) == Score(0.0, detail="1 columns instead of 2")
    assert metric("Sure, SELECT 1", reference, columns).detail == 'SQLite: near "Sure": syntax error'


@pytest.mark.parametrize("columns", [{"id": 4}, {"id": 4, "setup": None}, {"id": 4, "setup": "CREATE"}])
def test_sql_execution_names_the_row_whose_setup_it_cannot_use(columns):
    with pytest.raises(DataError, match=r"^row 4"):
        METRICS["sql_execution"]("SELECT 1", "SELECT 1", columns)


def test_sql_execution_names_the_row_whose_reference_it_cannot_use():
    with pytest.raises(DataError, match=r"row 4: the reference query cannot be used: SQLite: no such table: u"):
        METRICS["sql_execution"]("SELECT 1", "SELECT * FROM u", {"id": 4, "setup": TABLE})


def test_sums_by_hand():
    scores = [
        fields('{"name": "Ada", "year": 1815, "note": null}'),  # name TP, year TP, note TN
        fields('{"name": "Bob", "year": 1815, "note": null}'),  # name FP FN, year TP, note TN
        fields('{"name": "Ada", "note": "poet"}'),  # name TP, year FN, note FP
        fields("nothing"),  # name FN, year FN
    ]
    summary = summarise(scores)
    assert (summary["n"], summary["mean"]) == (4, 0.25)
    # name: TP 2, FP 1, FN 2: precision 2/3, recall 2/4, F1 4/7. year: TP 2, FN 2: 1, 1/2, 4/6. note: FP 1, TN 2: 0.
    assert summary["fields"]["name"] == {
        "precision": 2 / 3,
        "recall": 0.5,
        "f1": 4 / 7,
        "true_positive": 2,
        "false_positive": 1,
        "false_negative": 2,
        "true_negative": 0,
    }
    year, note = summary["fields"]["year"], summary["fields"]["note"]
    assert (year["precision"], year["recall"], year["f1"]) == (1.0, 0.5, 2 / 3)
    assert (note["precision"], note["recall"], note["f1"], note["true_negative"]) == (0.0, None, 0.0, 2)
    # Micro: TP 4, FP 2, FN 4: 8 / 14. Macro: (4/7 + 2/3 + 0) / 3.
    assert summary["micro_f1"] == 8 / 14
    assert summary["macro_f1"] == pytest.approx((4 / 7 + 2 / 3) / 3, rel=1e-15)
    json.dumps(summary, allow_nan=False)


def test_a_field_that_never_occurs_is_no_part_of_macro_f1():
    summary = summarise([fields(REFERENCE)])
    assert summary["fields"]["note"]["f1"] is None
    assert (summary["micro_f1"], summary["macro_f1"]) == (1.0, 1.0)


def test_scores_without_fields_have_no_f1():
    summary = summarise([Score(1.0), Score(0.0), Score(0.5)])
    assert summary == {"n": 3, "mean": 0.5, "fields": None, "micro_f1": None, "macro_f1": None}


def test_groups_have_their_own_means():
    scores = [Score(1.0), Score(0.0), Score(1.0), Score(0.0), Score(0.0)]
    assert by_group(scores, ["b", "a", "b", "b", "a"]) == [("a", 2, 0.0), ("b", 3, pytest.approx(2 / 3))]
    with pytest.raises(DataError, match="1 groups for 5 scores"):
        by_group(scores, ["a"])


def test_no_scores_have_no_mean():
    with pytest.raises(DataError):
        summarise([])


@pytest.mark.parametrize(
    ("references", "columns", "name", "reason"),
    [
        (['{"a": 1}', "{}"], [{}, {"setup": "x"}], "json_fields", "all 2 reference answers are JSON objects"),
        (['{"a": 1}', "{}"], [{"setup": ""}] * 2, "json_fields", "all 2 reference answers are JSON objects"),
        (["SELECT 1", "{}"], [{"setup": ""}] * 2, "sql_execution", "all 2 rows have a column `setup`"),
        (
            ["yes", "{}", "[1]"],
            [{"setup": "x"}, {"setup": None}, {}],
            "exact_match",
            "of 3 reference answers 1 are JSON objects, 1 have a column `setup`",
        ),
    ],
)
def test_the_choice_of_a_metric_has_a_reason(references, columns, name, reason):
    assert choose(references, columns) == (name, reason)


@pytest.mark.parametrize(("references", "columns"), [([], []), (["a"], [])])
def test_nothing_to_choose_from(references, columns):
    with pytest.raises(DataError):
        choose(references, columns)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(text=st.text())
def test_any_text_is_itself(text):
    assert METRICS["exact_match"](text, text, {}).value == 1.0


@settings(deadline=None)
@given(value=st.dictionaries(st.text(), JSON, max_size=5))
def test_any_object_is_itself_however_it_is_written(value):
    reference = json.dumps(value)
    assert fields(reference, reference).value == 1.0
    backwards = json.dumps(dict(reversed(value.items())), indent=1, ensure_ascii=False)
    score = fields(backwards, reference)
    assert (score.value, score.detail) == (1.0, None)
    assert score.fields is not None
    assert all(count.f1 in (None, 1.0) for count in score.fields.values())


@settings(deadline=None)
@given(left=st.dictionaries(st.text(), JSON, max_size=3), right=st.dictionaries(st.text(), JSON, max_size=3))
def test_json_equality_is_symmetric_and_errors_mirror(left, right):
    there, back = fields(json.dumps(left), json.dumps(right)), fields(json.dumps(right), json.dumps(left))
    assert there.value == back.value
    assert counts(there) == {name: (tp, fn, fp, tn) for name, (tp, fp, fn, tn) in counts(back).items()}


@settings(deadline=None)
@given(prediction=st.text())
def test_no_prediction_raises(prediction):
    assert fields(prediction).value == 0.0
    assert METRICS["sql_execution"](prediction, "SELECT name FROM t", {"setup": TABLE}).value == 0.0


NAMES = st.sampled_from(["id", "name", "count(*)", "id * 0.1", "upper(name)", "NULL"])


@settings(deadline=None)
@given(chosen=st.lists(NAMES, min_size=1, max_size=4), ordered=st.booleans(), grouped=st.booleans())
def test_any_query_is_itself(chosen, ordered, grouped):
    query = f"SELECT {', '.join(chosen)} FROM t{' GROUP BY name' if grouped else ''}{' ORDER BY 1' if ordered else ''}"
    assert METRICS["sql_execution"](query, query, {"setup": TABLE}).value == 1.0


@settings(deadline=None)
@given(tp=st.integers(0, 9), fp=st.integers(0, 9), fn=st.integers(0, 9))
def test_f1_is_the_harmonic_mean(tp, fp, fn):
    count = FieldCount(tp, fp, fn)
    if tp:
        assert count.precision is not None
        assert count.recall is not None
        assert count.f1 == pytest.approx(2 / (1 / count.precision + 1 / count.recall))
    else:
        assert count.f1 == (0.0 if fp + fn else None)
