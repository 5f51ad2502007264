"""Whether two SQL queries give the same rows, when one of them was written by a model and may be hostile.

Each row gets its own in-memory database. Queries may read and compute, nothing else; what bounds them are counts that
come out the same on any machine with the same SQLite (steps, bytes, rows), never a clock.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass
from types import TracebackType

from peftkit.errors import DataError
from peftkit.evaluation.sql_rows import Cell, Rows, same_rows
from peftkit.evaluation.sql_text import expansions, is_ordered

QUERY_BYTES = 10_000
QUERY_STEPS = 2_000_000
"""Steps of SQLite's virtual machine that one query may take: about 50 ms of ordinary work."""
SETUP_BYTES = 10_000_000
SETUP_STEPS = 20_000_000
SETUP_PAGES = 16_384
"""Pages of 4 KiB that a database may fill: 64 MiB."""
VALUE_BYTES = (4_096, 16_384)
"""Least and greatest limit on one value; between them, the length of the setup (see `_value_limit`)."""
RESULT_ROWS = 10_000
RESULT_BYTES = 16_000_000
EXPANSIONS = 10_000
"""Copies of WITH-clauses that a query may expand to (see `sql_text.expansions`)."""
STEPS_PER_TICK = 1_000

# Allow-list: a function that a later SQLite adds stays out until someone has looked at it. Absent on purpose:
# load_extension and fts* (escape), zeroblob and randomblob (memory), random (the same query would score differently),
# sqlite_* and changes (about the machine, not the data). date('now') stays: real queries use it.
_FUNCTION_NAMES = """
    -> ->> abs acos acosh asin asinh atan atan2 atanh avg ceil ceiling char coalesce concat concat_ws cos cosh count
    cume_dist current_date current_time current_timestamp date datetime degrees dense_rank exp first_value floor format
    glob group_concat hex if ifnull iif instr json json_array json_array_length json_extract json_group_array
    json_group_object json_insert json_object json_patch json_quote json_remove json_replace json_set json_type
    json_valid julianday lag last_value lead length like likelihood likely ln log log10 log2 lower ltrim max min mod
    nth_value ntile nullif octet_length percent_rank pi pow power printf quote radians rank replace round row_number
    rtrim sign sin sinh sqrt strftime string_agg substr substring sum tan tanh time timediff total trim trunc typeof
    unhex unicode unixepoch unlikely upper
"""
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
READING = frozenset((sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE))
DENIED_IN_SETUP = {
    sqlite3.SQLITE_ATTACH: "ATTACH or VACUUM",
    sqlite3.SQLITE_DETACH: "DETACH",
    sqlite3.SQLITE_CREATE_VTABLE: "CREATE VIRTUAL TABLE",
}
SETUP_PRAGMAS = frozenset(("foreign_keys", "defer_foreign_keys"))  # what `.dump` writes
_ACTION_NAMES = """
    ALTER_TABLE ANALYZE ATTACH CREATE_INDEX CREATE_TABLE CREATE_TEMP_INDEX CREATE_TEMP_TABLE CREATE_TEMP_TRIGGER
    CREATE_TEMP_VIEW CREATE_TRIGGER CREATE_VIEW CREATE_VTABLE DELETE DETACH DROP_INDEX DROP_TABLE DROP_TRIGGER DROP_VIEW
    DROP_VTABLE INSERT PRAGMA REINDEX SAVEPOINT TRANSACTION UPDATE
"""
ACTIONS: dict[int, str] = {getattr(sqlite3, f"SQLITE_{name}"): name.replace("_", " ") for name in _ACTION_NAMES.split()}

_WIDE = re.compile(r"%[^A-Za-z%]*(?:\*|[0-9]{4})")


@dataclass(frozen=True)
class Verdict:
    """Whether the prediction gave the reference's rows, and what is worth knowing about it."""

    same: bool
    detail: str | None = None


def judge(setup: str, reference: str, prediction: str, *, where: str) -> Verdict:
    """Run both queries on a database built from `setup` and compare their rows.

    The order of rows matters only if the reference has an ORDER BY of its own; rows that tie under it must then come in
    SQLite's order. A bad prediction is a verdict. A bad setup or reference raises DataError, which begins with `where`.
    """
    with Sandbox(setup, where=where) as sandbox:
        expected = sandbox.ask(reference)
        if isinstance(expected, str):
            raise DataError(
                f"{where}: the reference query cannot be used: {expected}",
                expected="one SELECT that runs on the row's `setup`",
                hint="mend the row's reference or its `setup`, or leave the row out",
            )
        given = sandbox.ask(prediction)
    if isinstance(given, str):
        return Verdict(False, given)
    if given.columns != expected.columns:
        return Verdict(False, f"{given.columns} columns instead of {expected.columns}")
    if len(given.rows) != len(expected.rows):
        return Verdict(False, f"{len(given.rows)} rows instead of {len(expected.rows)}")
    if not expected.rows:
        # Any query that finds nothing agrees with such a reference: whoever reads the score should know.
        return Verdict(True, "both give no rows")
    ordered = is_ordered(reference)
    if same_rows(expected, given, ordered=ordered):
        return Verdict(True)
    if ordered and same_rows(expected, given, ordered=False):
        return Verdict(False, "the same rows in another order")
    return Verdict(False, "other rows")


class Sandbox:
    """An in-memory database built from a script, on which queries can only read.

    Raises DataError, beginning with `where`, when the script fails, tries to reach outside the database, or exceeds
    SETUP_STEPS or SETUP_PAGES. SQLite may spill sorts into temporary files of its own, deleted when it closes.
    """

    def __init__(self, setup: str, *, where: str) -> None:
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        # CAST(x'ff' AS TEXT) makes text that is no UTF-8; it is a value like any other here.
        self._connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        self._plain = sqlite3.connect(":memory:")
        self._refusal: str | None = None
        self._ticks = 0
        self._modules = frozenset(name.lower() for (name,) in self._connection.execute("PRAGMA module_list"))
        self._own: frozenset[str] = frozenset()
        try:
            self._build(setup)
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
            self.close()
            raise DataError(
                f"{where}: `setup` fails: {self._refusal or error}",
                expected="SQL that SQLite runs: CREATE TABLE and INSERT",
                hint="mend the row's `setup`, or leave the row out",
            ) from error

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give both connections back."""
        self._connection.close()
        self._plain.close()

    def ask(self, query: str) -> Rows | str:
        """The rows of one reading statement, or the reason why there are none; a bad query never raises."""
        size = len(query.encode("utf-8", "surrogatepass"))
        if size > QUERY_BYTES:
            return f"the query has {size} bytes, more than {QUERY_BYTES}"
        if (copies := expansions(query)) > EXPANSIONS:
            return f"its WITH clauses may expand to {copies} copies, more than {EXPANSIONS}"
        self._refusal, self._ticks = None, QUERY_STEPS // STEPS_PER_TICK
        try:
            cursor = self._connection.execute(query)
            if cursor.description is None:
                return "it holds no statement that gives rows"
            return self._fetch(cursor)
        except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError) as error:
            return self._refusal or f"SQLite: {str(error) or type(error).__name__}"

    def _build(self, setup: str) -> None:
        """Limits first, then the script under its own guard, then the guard for queries."""
        connection = self._connection
        connection.execute(f"PRAGMA max_page_count = {SETUP_PAGES}")
        for limit, value in (
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
            (sqlite3.SQLITE_LIMIT_COLUMN, 200),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
            (sqlite3.SQLITE_LIMIT_LENGTH, _value_limit(setup)),
            (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 200),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, SETUP_BYTES),
            (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 10),
            (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        ):
            connection.setlimit(limit, value)
        self._ticks = SETUP_STEPS // STEPS_PER_TICK
        connection.set_progress_handler(self._tick, STEPS_PER_TICK)
        connection.set_authorizer(self._allow_setup)
        connection.executescript(setup)
        # The first use of a table-valued function declares its columns, which the guard for queries would take for a
        # write: use the two that are allowed once beforehand.
        connection.execute("SELECT 1 FROM json_each('[]'), json_tree('[]')").fetchall()
        own = connection.execute("SELECT name FROM sqlite_master UNION SELECT name FROM sqlite_temp_master")
        self._own = frozenset(name.lower() for (name,) in own)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, QUERY_BYTES)
        connection.set_authorizer(self._allow_query)
        for name in ("printf", "format"):
            connection.create_function(name, -1, self._printf, deterministic=True)

    def _printf(self, *arguments: Cell) -> Cell:
        """SQLite's printf, unless the format asks for a width that costs seconds in a single step.

        printf('%.*c', 1000000000, 'x') writes for 1.7 s whatever the limit on values (measured, SQLite 3.40).
        """
        if arguments and _WIDE.search(str(arguments[0])):
            self._refusal = "a width of more than three digits, or `*`, is not allowed in printf"
            raise ValueError(self._refusal)
        marks = ", ".join("?" * len(arguments))
        (result,) = self._plain.execute(f"SELECT printf({marks})", arguments).fetchone()
        return result  # type: ignore[no-any-return]

    def _fetch(self, cursor: sqlite3.Cursor) -> Rows | str:
        rows: list[tuple[Cell, ...]] = []
        size = 0
        for row in cursor:
            size += sum(len(cell) for cell in row if isinstance(cell, str | bytes))
            if len(rows) == RESULT_ROWS or size > RESULT_BYTES:
                cursor.close()
                return f"it gives more than {RESULT_ROWS} rows or {RESULT_BYTES} bytes"
            rows.append(row)
        return Rows(len(cursor.description), tuple(rows))

    def _tick(self) -> int:
        self._ticks -= 1
        if self._ticks < 0:
            self._refusal = "it was stopped: too many steps"
            return 1
        return 0

    def _allow_setup(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action in DENIED_IN_SETUP:
            return self._deny(DENIED_IN_SETUP[action])
        if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() not in SETUP_PRAGMAS:
            return self._deny(f"PRAGMA {first}")
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in ("load_extension", "fts3_tokenizer"):
            return self._deny(f"the function {second}")
        return sqlite3.SQLITE_OK

    def _allow_query(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action not in READING:
            return self._deny(f"{ACTIONS.get(action, f'action {action}')}: anything but reading")
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in FUNCTIONS:
            return self._deny(f"the function {second}")
        if action == sqlite3.SQLITE_READ and self._is_module((first or "").lower()):
            return self._deny(f"the table {first}")
        return sqlite3.SQLITE_OK

    def _is_module(self, table: str) -> bool:
        """Whether a table is one of SQLite's own (dbstat, sqlite_stmt …), which need no CREATE to be read."""
        return table in self._modules - self._own - {"json_each", "json_tree"}

    def _deny(self, what: str) -> int:
        # The first refusal is the cause; SQLite may go on to ask about more.
        self._refusal = self._refusal or f"{what} is not allowed"
        return sqlite3.SQLITE_DENY


def _value_limit(setup: str) -> int:
    """Bytes that one value may have: enough for what the setup can hold, little enough to keep each step cheap.

    Steps are counted but not weighed: trim(a, b) and instr(a, b) take one step and time |a|·|b|.
    """
    least, greatest = VALUE_BYTES
    return min(max(least, len(setup.encode("utf-8", "surrogatepass"))), greatest)
