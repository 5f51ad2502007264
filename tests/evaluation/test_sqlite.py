"""Queries by a model: what counts as the same rows; a hostile one is stopped, leaves no trace and never raises."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import DataError
from peftkit.evaluation import sql_text, sqlite
from peftkit.evaluation.sqlite import Rows, Sandbox, Verdict, is_ordered, judge, same_rows

SETUP = (
    "CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, price REAL);"
    "INSERT INTO t VALUES (1, 'a', .1), (2, 'b', .2), (3, NULL, .3);"
)
COUNTING = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"


def ask(query: str, setup: str = SETUP) -> Rows | str:
    with Sandbox(setup, where="row 1") as sandbox:
        return sandbox.ask(query)


def verdict(prediction: str, reference: str, setup: str = SETUP) -> Verdict:
    return judge(setup, reference, prediction, where="row 1")


def doubling(levels: int, quotes: tuple[str, str] = ("", "")) -> str:
    """Table expressions that each name the one before twice: the last stands for 2^levels copies of the first."""
    left, right = quotes
    parts = ["a0 AS (SELECT 1 x)"]
    parts += [
        f"{left}a{i}{right} /* AS */ AS (SELECT 1 x FROM {left}A{i - 1}{right} p, {left}a{i - 1}{right} q)"
        for i in range(1, levels + 1)
    ]
    return f"WITH {', '.join(parts)} SELECT count(*) FROM a{levels}"


HOSTILE = {
    "ATTACH '{file}' AS other": "ATTACH: anything but reading is not allowed",
    "VACUUM INTO '{file}'": "ATTACH: anything but reading is not allowed",
    "DETACH main": "DETACH: anything but reading is not allowed",
    "PRAGMA journal_mode = OFF": "PRAGMA: anything but reading is not allowed",
    "PRAGMA writable_schema = 1": "PRAGMA: anything but reading is not allowed",
    "SELECT * FROM pragma_table_info('t')": "not allowed",
    "SELECT * FROM dbstat": "not allowed",
    "SELECT load_extension('{file}')": "the function load_extension is not allowed",
    "SELECT fts3_tokenizer('simple')": "the function fts3_tokenizer is not allowed",
    "SELECT writefile('{file}', 'x')": "no such function: writefile",
    "SELECT zeroblob(1000000000)": "the function zeroblob is not allowed",
    "SELECT randomblob(1000000000)": "the function randomblob is not allowed",
    "SELECT id FROM t ORDER BY random()": "the function random is not allowed",
    "SELECT printf('%.*c', 1000000000, 'x')": "a width of more than three digits",
    "SELECT format('%1000000000d', 1)": "a width of more than three digits",
    "SELECT printf('%.' || '100' || '0000000c', 'x')": "a width of more than three digits",
    "DROP TABLE t": "anything but reading is not allowed",
    "DELETE FROM t": "DELETE: anything but reading is not allowed",
    "UPDATE t SET id = 9": "UPDATE: anything but reading is not allowed",
    "INSERT INTO t VALUES (9, 'x', 1) RETURNING id": "INSERT: anything but reading is not allowed",
    "WITH n AS (SELECT 9) REPLACE INTO t SELECT 9, 'x', 1 FROM n": "INSERT: anything but reading is not allowed",
    "CREATE TABLE u (x)": "anything but reading is not allowed",
    "CREATE TEMP TABLE u AS SELECT 1": "anything but reading is not allowed",
    "CREATE VIRTUAL TABLE u USING fts5(x)": "anything but reading is not allowed",
    "CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END": "anything but reading is not allowed",
    "ALTER TABLE t RENAME TO u": "ALTER TABLE: anything but reading is not allowed",
    "BEGIN": "TRANSACTION: anything but reading is not allowed",
    "SAVEPOINT s": "SAVEPOINT: anything but reading is not allowed",
    "SELECT 1; DROP TABLE t": "one statement at a time",
    "SELECT 1; SELECT 2": "one statement at a time",
    f"{COUNTING} SELECT count(*) FROM c": "too many steps",
    f"{COUNTING} SELECT x FROM c": "it gives more than 10000 rows",
    f"{COUNTING} SELECT max(x || replace(hex('aaaaaaaaaa'), '6', 'bbbbbbbbbb')) FROM c": "too many steps",
    "SELECT " + "+".join(["(SELECT count(*) FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k)"] * 9): "steps",
    f"{COUNTING}, w(y) AS (SELECT replace(printf('%900d', 0), ' ', 'abcd')), "
    f"r(x) AS (SELECT x FROM c LIMIT 9000) SELECT {','.join(['y'] * 150)} FROM r, w": "16000000 bytes",
    "SELECT replace(replace(hex('aaaaaaaa'), '6', hex(hex('aaaaaaaa'))), '6', hex(hex(hex('aaaaaaaa'))))||"
    "replace(hex(hex(hex('aaaaaaaa'))), '3', hex(hex(hex('aaaaaaaa'))))": "too big",
    doubling(20): "its WITH clauses may expand to 1048576 copies",
    doubling(20, ("'", "'")): "its WITH clauses may expand to 1048576 copies",
    doubling(20, ('"', '"')): "its WITH clauses may expand to 1048576 copies",
    doubling(20, ("[", "]")): "its WITH clauses may expand to 1048576 copies",
    doubling(20, ("`", "`")): "its WITH clauses may expand to 1048576 copies",
    "SELECT " + "(" * 2000 + "1" + ")" * 2000: "stack overflow",
    "SELECT 1" + " + 1" * 1000: "too large",
    "SELECT '" + "x" * 20_000 + "'": "the query has 20009 bytes",
    "SELECT 'x' LIKE '" + "%a" * 200 + "'": "pattern too complex",
    "SELECT " + ", ".join(["1"] * 300): "too many columns",
    " UNION ".join(["SELECT 1"] * 80): "too many terms",
    "": "it holds no statement",
    "-- SELECT 1": "it holds no statement",
    "SELECT ?": "bindings",
    "SELECT 1\0": "null character",
    "SELECT '\ud800'": "surrogates not allowed",
    "```sql\nSELECT 1\n```": "syntax error",
    "Sure! SELECT 1": "syntax error",
    "SELECT no FROM such": "no such table: such",
    "SELECT abs(-9223372036854775808)": "integer overflow",
}


@pytest.mark.parametrize(("query", "reason"), HOSTILE.items(), ids=[query[:40] for query in HOSTILE])
def test_a_hostile_query_is_stopped_with_a_reason_and_leaves_no_trace(query, reason, tmp_path):
    file = tmp_path / "reached"
    with Sandbox(SETUP, where="row 1") as sandbox:
        intact = sandbox.ask("SELECT *, (SELECT count(*) FROM sqlite_master) FROM t")
        answer = sandbox.ask(query.replace("{file}", str(file)))
        assert isinstance(answer, str)
        assert reason in answer
        assert isinstance(intact, Rows)
        assert sandbox.ask("SELECT *, (SELECT count(*) FROM sqlite_master) FROM t") == intact
    assert list(tmp_path.iterdir()) == []


def test_tables_of_sqlite_itself_stay_closed_even_when_the_setup_opened_them():
    for table in ("dbstat", "sqlite_stmt"):
        assert ask(f"SELECT * FROM {table}", f"{SETUP} SELECT * FROM {table};") == f"the table {table} is not allowed"


def test_the_count_of_steps_is_the_same_each_time(monkeypatch):
    monkeypatch.setattr(sqlite, "QUERY_STEPS", 20_000)
    outcomes = []
    for limit in range(500, 4000, 500):
        query = f"{COUNTING} SELECT count(*) FROM (SELECT x FROM c LIMIT {limit})"
        answers = {ask(query) for _ in range(3)}
        assert len(answers) == 1
        outcomes.append(isinstance(answers.pop(), Rows))
    assert outcomes == sorted(outcomes, reverse=True)
    assert {True, False} == set(outcomes)


def test_steps_are_counted_anew_for_each_query(monkeypatch):
    monkeypatch.setattr(sqlite, "QUERY_STEPS", 20_000)
    with Sandbox(SETUP, where="row 1") as sandbox:
        for _ in range(20):
            assert isinstance(sandbox.ask(f"{COUNTING} SELECT count(*) FROM (SELECT x FROM c LIMIT 500)"), Rows)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is only kept on Linux")
def test_the_doubling_would_be_deadly_if_it_were_let_through():
    """The negative control of `EXPANSIONS`: without the bound SQLite runs out of the 400 MiB it is given."""
    script = (
        "import resource; from peftkit.evaluation import sqlite; import sys\n"
        "sqlite.EXPANSIONS = int(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
        "with sqlite.Sandbox('', where='row 1') as sandbox: print(sandbox.ask(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    answers = [
        subprocess.run(
            [sys.executable, "-c", script, bound, doubling(22)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
        for bound in (str(sqlite.EXPANSIONS), str(10**9))
    ]
    assert answers == ["its WITH clauses may expand to 4194304 copies, more than 10000", "SQLite: MemoryError"]


ORDINARY = {
    "SELECT count(*) FROM t": ((3,),),
    "select name from t where id = 2;": (("b",),),
    "SELECT 1; -- done": ((1,),),
    "VALUES (1, 'x', NULL)": ((1, "x", None),),
    "WITH u AS (SELECT * FROM t), v AS (SELECT * FROM u) SELECT count(*) FROM u, v": ((9,),),
    f"{COUNTING} SELECT sum(x) FROM (SELECT x FROM c LIMIT 100)": ((5050,),),
    "SELECT id, row_number() OVER (ORDER BY price DESC) FROM t WHERE id < 3 ORDER BY id": ((1, 2), (2, 1)),
    "SELECT name FROM sqlite_master": (("t",),),
    "SELECT value FROM json_each('[4, 5]')": ((4,), (5,)),
    "SELECT printf('%.2f|%05d|%s', 2.0 / 3, 42, NULL), format('%d%%', 7)": (("0.67|00042|", "7%"),),
    "SELECT strftime('%Y', '2024-05-06'), date('2024-01-31', '+1 month')": (("2024", "2024-03-02"),),
    "SELECT group_concat(name), coalesce(max(name), 'x'), 'A' LIKE 'a' FROM t": (("a,b", "b", 1),),
    "SELECT x'00ff', CAST(x'ff' AS TEXT)": ((b"\x00\xff", "\udcff"),),
    doubling(12): ((1,),),
}


@pytest.mark.parametrize(("query", "rows"), ORDINARY.items(), ids=[query[:40] for query in ORDINARY])
def test_ordinary_queries_run(query, rows):
    answer = ask(query)
    assert isinstance(answer, Rows), answer
    assert answer.rows == rows


def test_printf_is_that_of_sqlite():
    plain = sqlite.sqlite3.connect(":memory:")
    for call in ("printf()", "printf('%,d', 1234567)", "printf('%e', 12.5)", "printf(NULL)", "printf('%q', 'a''b')"):
        (expected,) = plain.execute(f"SELECT {call}").fetchone()
        answer = ask(f"SELECT {call}")
        assert isinstance(answer, Rows), answer
        assert answer.rows == ((expected,),)
    plain.close()


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("SELECT id FROM t ORDER BY id DESC", "SELECT id FROM t", Verdict(True)),
        (
            "SELECT id FROM t ORDER BY id DESC",
            "SELECT id FROM t ORDER BY id",
            Verdict(False, "the same rows in another order"),
        ),
        ("SELECT id FROM t ORDER BY -price", "SELECT id FROM t ORDER BY id DESC", Verdict(True)),
        ("SELECT id AS a, name AS b FROM t", "SELECT id, name FROM t", Verdict(True)),
        ("SELECT name, id FROM t", "SELECT id, name FROM t", Verdict(False, "other rows")),
        ("SELECT id FROM t", "SELECT id, name FROM t", Verdict(False, "1 columns instead of 2")),
        ("SELECT id FROM t LIMIT 1", "SELECT id FROM t", Verdict(False, "1 rows instead of 3")),
        # Duplicates count: 1, 1, 2 is not 1, 2, 2.
        ("VALUES (1), (1), (2)", "VALUES (1), (2), (2)", Verdict(False, "other rows")),
        ("VALUES (2), (1), (1)", "VALUES (1), (2), (1)", Verdict(True)),
        ("SELECT 1.0", "SELECT 1", Verdict(True)),
        ("SELECT '1'", "SELECT 1", Verdict(False, "other rows")),
        ("SELECT x'31'", "SELECT '1'", Verdict(False, "other rows")),
        ("SELECT NULL", "SELECT NULL", Verdict(True)),
        ("SELECT 0", "SELECT NULL", Verdict(False, "other rows")),
        ("SELECT ''", "SELECT NULL", Verdict(False, "other rows")),
        ("SELECT .1 + .2", "SELECT .3", Verdict(True)),
        ("SELECT 1.000001", "SELECT 1.0", Verdict(False, "other rows")),
        ("SELECT 1000000000001", "SELECT 1000000000000", Verdict(False, "other rows")),
        ("SELECT 9e999", "SELECT 8e999", Verdict(True)),
        ("SELECT name FROM t WHERE id = 3", "SELECT NULL", Verdict(True)),
        ("SELECT id FROM t WHERE id > 8", "SELECT id FROM t WHERE id > 9", Verdict(True, "both give no rows")),
        ("SELECT id, id FROM t WHERE 0", "SELECT id FROM t WHERE 0", Verdict(False, "2 columns instead of 1")),
        ("DROP TABLE t", "SELECT id FROM t", Verdict(False, "DELETE: anything but reading is not allowed")),
    ],
)
def test_verdicts(prediction, reference, expected):
    assert verdict(prediction, reference) == expected


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a", True),
        ("SELECT a FROM t ORDER/**/BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM t ORDER BY 1 LIMIT 3", True),
        ("WITH u AS (SELECT 1) SELECT * FROM u ORDER BY 1", True),
        ("SELECT a FROM t", False),
        ("SELECT * FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("SELECT rank() OVER w FROM t WINDOW w AS (ORDER BY a)", False),
        ("SELECT ' ORDER BY ' FROM t -- ORDER BY a", False),
        ('SELECT "ORDER" BY FROM t', False),
        ("SELECT '(' FROM t ORDER BY 1", True),
    ],
)
def test_only_an_order_of_the_whole_query_counts(query, ordered):
    assert is_ordered(query) is ordered


@pytest.mark.parametrize(
    "query",
    [
        "WITH total AS (SELECT sum(id) total FROM t), m AS (SELECT total, total t2, max(total.total) x FROM total) "
        "SELECT * FROM m",
        "SELECT CAST(id AS INT) FROM t WHERE id IN (SELECT id FROM t)",
        "SELECT sum(id) OVER w FROM t WINDOW w AS (PARTITION BY name)",
        "WITH RECURSIVE c(x) AS NOT MATERIALIZED (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c LIMIT 3",
    ],
)
def test_ordinary_with_clauses_are_far_from_the_bound(query):
    assert sql_text.expansions(query) <= 30
    assert isinstance(ask(query), Rows)


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ("CREATE TABLE", "incomplete input"),
        ("INSERT INTO t VALUES (1)", "no such table: t"),
        ("ATTACH '{file}' AS other", "ATTACH or VACUUM is not allowed"),
        ("CREATE TABLE u (x); VACUUM INTO '{file}'", "ATTACH or VACUUM is not allowed"),
        ("PRAGMA writable_schema = 1", "PRAGMA writable_schema is not allowed"),
        ("SELECT load_extension('{file}')", "the function load_extension is not allowed"),
        ("CREATE VIRTUAL TABLE v USING fts5(x)", "CREATE VIRTUAL TABLE is not allowed"),
        (f"{COUNTING} SELECT count(*) FROM c", "too many steps"),
        (f"CREATE TABLE u AS {COUNTING} SELECT hex(zeroblob(2000)) FROM c", "database or disk is full"),
        ("CREATE TABLE u AS SELECT zeroblob(1000000000)", "too big"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_a_bad_setup_is_an_error_that_names_its_row(setup, reason, tmp_path):
    file = tmp_path / "reached"
    with pytest.raises(DataError) as caught:
        judge(setup.replace("{file}", str(file)), "SELECT 1", "SELECT 1", where="row 23")
    assert str(caught.value).startswith("row 23: `setup` fails: ")
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reference", ["SELECT * FROM u", "DELETE FROM t", "", "SELECT 1; SELECT 2"])
def test_a_bad_reference_is_an_error_that_names_its_row(reference):
    with pytest.raises(DataError, match=r"^row 23: the reference query cannot be used"):
        judge(SETUP, reference, "SELECT 1", where="row 23")


def test_a_setup_may_be_what_sqlite_dumps():
    source = sqlite.sqlite3.connect(":memory:")
    source.executescript(
        "CREATE TABLE p (id INTEGER PRIMARY KEY); CREATE TABLE k (p REFERENCES p, v TEXT); CREATE INDEX i ON k (v);"
        "CREATE VIEW w AS SELECT v FROM k; INSERT INTO p VALUES (1); INSERT INTO k VALUES (1, 'it''s');"
        "CREATE TRIGGER g AFTER INSERT ON k BEGIN DELETE FROM p; END"
    )
    dump = "PRAGMA foreign_keys=OFF;" + "\n".join(source.iterdump())
    source.close()
    assert "BEGIN TRANSACTION" in dump
    answer = ask("SELECT v, p.id FROM w JOIN p", dump)
    assert isinstance(answer, Rows), answer
    assert answer.rows == (("it's", 1),)


def test_long_setups_may_hold_long_values():
    text = "x" * 10_000
    answer = ask("SELECT v FROM u", f"CREATE TABLE u (v TEXT); INSERT INTO u VALUES ('{text}')")
    assert isinstance(answer, Rows), answer
    assert answer.rows == ((text,),)


CELLS = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.binary(max_size=2)
)
TABLES = st.integers(1, 3).flatmap(lambda width: st.lists(st.tuples(*[CELLS] * width), min_size=1, max_size=8))


@settings(deadline=None)
@given(rows=TABLES, data=st.data())
def test_rows_equal_themselves_in_any_order_and_with_rounded_numbers(rows, data):
    width = len(rows[0])
    shuffled = data.draw(st.permutations(rows))
    # One unit in the last place is 1e-16 of a normal number, far below the tolerance of 1e-9.
    rounded = [
        tuple(cell * (1 + 2e-16) if isinstance(cell, float) and 1e-300 < abs(cell) < 1e300 else cell for cell in row)
        for row in shuffled
    ]
    assert same_rows(Rows(width, tuple(rows)), Rows(width, tuple(rows)), ordered=True)
    assert same_rows(Rows(width, tuple(rows)), Rows(width, tuple(shuffled)), ordered=False)
    assert same_rows(Rows(width, tuple(rows)), Rows(width, tuple(rounded)), ordered=False)
    assert not same_rows(Rows(width, tuple(rows)), Rows(width, tuple(rows[1:])), ordered=False)


def test_near_ties_do_not_mispair_rows():
    # Sorting by the first column and comparing in pairs would set 'a' against 'b' here.
    left = Rows(2, ((1.0, "b"), (1.0 + 1e-12, "a")))
    right = Rows(2, ((1.0, "a"), (1.0 + 1e-12, "b")))
    assert same_rows(left, right, ordered=False)


def test_integers_between_two_reals_do_not_part_them():
    left = Rows(1, ((1e15,), (10**15 + 1,), (10**15 + 2,)))
    right = Rows(1, ((1e15 + 3,), (10**15 + 1,), (10**15 + 2,)))
    assert same_rows(left, right, ordered=True)


@settings(deadline=None)
@given(query=st.text(alphabet=st.sampled_from(list("SELECT FROMtWHaseid()*,;'\"[]`-/\n01")), max_size=60))
def test_no_query_raises(query):
    answer = ask(query)
    assert isinstance(answer, Rows | str)
    is_ordered(query)
