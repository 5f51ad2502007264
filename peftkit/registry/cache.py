"""A table of texts in `index.sqlite`, each with the stamp of the file it was made from.

Whatever is wrong with the file (damaged, foreign, locked, read-only), it answers like an empty one. It may come from a
stranger, and a journal beside it can make SQLite delete any file that the journal names: peftkit writes no journal, and
removes one that is there together with the cache. In place of a journal, a check in each row finds a torn write.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

# The number is raised whenever the same manifest gives another text.
_TABLE = 'CREATE TABLE summaries_1 (name, id, stamp, text, "check")'
_SELECT = 'SELECT rowid, name, id, stamp, text, "check" FROM summaries_1 LIMIT ?'
_DELETE = "DELETE FROM summaries_1 WHERE rowid = ?"
_INSERT = "INSERT INTO summaries_1 VALUES (?, ?, ?, ?, ?)"
_SETTINGS = ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = OFF", "journal_mode = MEMORY")
_BESIDE = ("-journal", "-wal", "-shm")
_LONGEST = 1 << 16
_PATIENCE = 1.0  # seconds that another process may hold the file before it is done without
_PASSING = {  # errors that say nothing about what the file holds
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}

Key = tuple[str, str]
_Result = TypeVar("_Result")


class _Foreign(Exception):
    """The file is none that this code wrote."""


class Cache:
    """The texts of one registry, by name and version id; nothing here raises."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._useless: set[int] = set()
        self._row: dict[Key, int] = {}

    def read(self, stamps: Mapping[Key, str]) -> dict[Key, str]:
        """The texts whose stamp is the one given; an empty stamp matches nothing."""
        self._useless, self._row = set(), {}
        if not os.path.lexists(self._path):
            return {}
        return self._attempt(lambda connection: self._read(connection, stamps)) or {}

    def write(self, fresh: Mapping[Key, tuple[str, str]]) -> None:
        """Keep texts with their stamps, and drop the rows that `read` found no use for."""
        rows = [
            (*key, stamp, text, _check(*key, stamp, text))
            for key, (stamp, text) in fresh.items()
            if stamp and len(text) <= _LONGEST
        ]
        self._useless |= {self._row[key] for key in fresh if key in self._row}  # the caller had no use for the text
        if rows or self._useless:
            self._attempt(lambda connection: self._write(connection, rows))

    def _read(self, connection: sqlite3.Connection, stamps: Mapping[Key, str]) -> dict[Key, str]:
        found: dict[Key, str] = {}
        most = 2 * len(stamps) + 1000
        for count, (number, *row) in enumerate(connection.execute(_SELECT, (most,)), 1):
            if count == most or not all(isinstance(value, str) for value in row):
                raise _Foreign  # so many rows that belong to nothing are not worth keeping either
            name, version_id, stamp, text, check = row
            key = name, version_id
            if key not in found and stamp and stamp == stamps.get(key) and check == _check(*key, stamp, text):
                found[key], self._row[key] = text, number
            else:
                self._useless.add(number)
        return found

    def _write(self, connection: sqlite3.Connection, rows: Sequence[tuple[str, ...]]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(_DELETE, [(number,) for number in sorted(self._useless)])
        connection.executemany(_INSERT, rows)
        connection.execute("COMMIT")

    def _attempt(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result | None:
        """Do `work` on the file; None, and the file gone if its content was to blame, when that fails."""
        for _ in range(2):  # once more with a new file
            try:
                self._refuse_strangers()
                with closing(sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None)) as connection:
                    _prepare(connection)
                    return work(connection)
            except (sqlite3.Error, UnicodeError, _Foreign) as error:
                # The extended code holds the plain one in its low byte.
                if getattr(error, "sqlite_errorcode", -1) & 0xFF in _PASSING:
                    return None
                with suppress(OSError):
                    self._discard()
            except OSError:
                return None
        return None

    def _refuse_strangers(self) -> None:
        if os.path.lexists(self._path) and not stat.S_ISREG(self._path.lstat().st_mode):
            raise _Foreign
        if any(os.path.lexists(f"{self._path}{suffix}") for suffix in _BESIDE):
            raise _Foreign

    def _discard(self) -> None:
        for suffix in (*_BESIDE, ""):
            if os.path.lexists(f"{self._path}{suffix}"):
                os.unlink(f"{self._path}{suffix}")


def _prepare(connection: sqlite3.Connection) -> None:
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 4 * _LONGEST)
    for setting in _SETTINGS:
        connection.execute(f"PRAGMA {setting}")
    tables = "SELECT sql FROM sqlite_master LIMIT 2"
    if not (schema := connection.execute(tables).fetchall()):
        with suppress(sqlite3.OperationalError):  # another process was faster, or the file cannot be written to
            connection.execute(_TABLE)
        schema = connection.execute(tables).fetchall()
    if schema != [(_TABLE,)]:
        raise _Foreign


def _check(*fields: str) -> str:
    return hashlib.sha256("\0".join(fields).encode("utf-8")).hexdigest()
