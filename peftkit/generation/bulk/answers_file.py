"""The answers to one file of questions on disk: kept as they come, put in order at the end, and nothing lost between.

| file | holds |
|---|---|
| `OUT.partial` | a line that says what the answers depend on, and then each answer as it came |
| `OUT` | every answer, in the order of the questions; it appears whole |
| `OUT.receipt.json` | what the answers depend on, their digest, and how many there are |
| `.OUT.lock` | held while a process answers into OUT |

A power cut may tear what was not synced, which is at most the last second: from the first line that is not whole on,
nothing is believed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shlex
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from peftkit import durable
from peftkit.atomic import replace_file
from peftkit.errors import GenerationError
from peftkit.generation.bulk.answers_before import FORMAT, receipt_for, receipt_of, refuse_other, refuse_strange

Job = Callable[[Mapping[str, Any]], int]
"""Which answer a line holds, counted in the order of OUT."""

_SYNC_SECONDS = 1.0
_NOT_YET = -1


class AnswersFile:
    """The partial file of `out`, open for writing; one process has it at a time."""

    def __init__(
        self,
        out: Path,
        about: Mapping[str, Any],
        jobs: int,
        job: Job,
        *,
        fresh: bool = False,
        overwrite: bool = False,
    ) -> None:
        """`about` is what the answers depend on, `jobs` how many there will be.

        Goes on with what is there. Raises GenerationError when that depends on something else (unless `fresh`), when
        `out` is there and holds anything but these answers (unless `overwrite`), when another process has it, or when
        nothing can be written.
        """
        self.out, self.path, self.about = out, partial_of(out), {"format": FORMAT, **about}
        self.done = 0
        """How many were answered before."""
        self.cut = 0
        """How many answers, of those kept now too, ended at max_new_tokens."""
        self.dropped = 0
        """Bytes of torn lines that were there, and are not believed."""
        self.finished: dict[str, Any] | None = None
        """The receipt of `out`, when it holds these answers already; then there is nothing to write."""
        self._places, self._job, self._end, self._synced = array("q", [_NOT_YET]) * jobs, job, 0, 0.0
        self._lock = _hold(out)
        self._file, self._ours = -1, False
        try:
            with self._explained():
                _sweep(out)
                if out.exists() and not overwrite:
                    self.finished = receipt_for(out, self.about)
                    if self.path.exists() and self.path.stat().st_size == self.finished.get("partial_bytes"):
                        self.path.unlink()  # finish() was killed before it did
                    self._forget_lock()
                    return
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                if fresh:
                    os.ftruncate(self._file, 0)
                self._read()
                self._ours = True
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(*([GenerationError] if error else [])):  # the first error says more
            self.close()

    def has(self, job: int) -> bool:
        """Whether there is an answer."""
        return self._places[job] != _NOT_YET

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep an answer. Raises GenerationError when it cannot be written; what was there before still is."""
        with self._explained():
            start = self._end
            self._append(record)
            self._places[self._job(record)] = start
            self.cut += record.get("finish") == "length"
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        """Make what was kept safe from a power cut."""
        with self._explained():
            os.fsync(self._file)
            self._synced = time.monotonic()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put all answers in order into `out`, beside a receipt with `summary`, and let the partial file go."""
        draft = self.out.with_name(f".{self.out.name}.{secrets.token_hex(4)}.new")
        try:
            with self._explained():
                digest = self._write_ordered(draft)
                receipt = {"about": self.about, "sha256": digest, "partial_bytes": self._end, **summary}
                # First the receipt: killed between the two, the next run finds no OUT, goes on, and writes both again.
                replace_file(receipt_of(self.out), json.dumps(receipt, indent=2) + "\n")
                os.replace(draft, self.out)
                durable.sync_folder(self.out.parent)
                self.path.unlink()
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        self._forget_lock()
        self.close()

    def close(self) -> None:
        """Cut off a line that was not written to its end, and let others write."""
        try:
            if self._ours:
                self._ours = False
                with self._explained():
                    os.ftruncate(self._file, self._end)
                    os.fsync(self._file)
        finally:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            self._lock.release()

    def _forget_lock(self) -> None:
        _lock_of(self.out).unlink(missing_ok=True)  # while it is held: who waits for it looks again

    def _read(self) -> None:
        """Take over what an earlier process kept."""
        lines = _whole_lines(self.path)
        first, self._end = next(lines, (None, 0))
        if first is None or (first != self.about and next(lines, None) is None):  # no answer is lost
            refuse_strange(self.path)
            os.ftruncate(self._file, 0)
            self._end = 0
            self._append(self.about)
            self.sync()
            durable.sync_folder(self.path.parent)
            return
        refuse_other(self.path, first, self.about)
        for record, end in lines:
            place = self._known(record)
            if place is None:
                break
            if record.get("finish") != "failed":  # those are asked again
                self.done += not self.has(place)
                self.cut += record.get("finish") == "length"
                self._places[place] = self._end
            self._end = end
        self.dropped = os.fstat(self._file).st_size - self._end
        os.ftruncate(self._file, self._end)

    def _known(self, record: Any) -> int | None:
        try:
            place = self._job(record)
        except (KeyError, TypeError, ValueError):
            return None
        return place if 0 <= place < len(self._places) else None

    def _append(self, record: Mapping[str, Any]) -> None:
        # Half a character, as bytes of a command line that are not UTF-8 become, is written as JSON escapes it.
        line = memoryview(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        at = self._end
        while line:
            written = os.pwrite(self._file, line, at)
            line, at = line[written:], at + written
        self._end = at  # not before: what is torn is written over, or cut off

    def _write_ordered(self, draft: Path) -> str:
        digest = hashlib.sha256()
        with open(self.path, "rb") as kept, open(draft, "wb") as ordered:
            for place in self._places:
                kept.seek(place)
                line = kept.readline()
                digest.update(line)
                ordered.write(line)
            ordered.flush()
            os.fsync(ordered.fileno())
        return digest.hexdigest()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = len(self._places) - self._places.count(_NOT_YET)
            room = "make room, and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise GenerationError(
                f"the answers cannot be written to {self.path.parent}: {error.strerror or error}",
                expected="a folder that can be written, and room for the answers twice",
                hint=f"{kept:,} answers are kept in {self.path.name}; {room}the same command goes on",
            ) from error


def refuse_place(out: Path) -> None:
    """Raise GenerationError where no answers can be."""
    if out.is_dir():
        raise GenerationError(f"{out} is a folder", expected="a file", hint=f"--out {out / 'answers.jsonl'}")
    if not out.parent.is_dir():
        raise GenerationError(
            f"{out.parent} is no folder",
            expected="a folder for the answers that exists",
            hint=f"mkdir -p {shlex.quote(str(out.parent))}",
        )


def partial_of(out: Path) -> Path:
    """Where answers are kept until all are there."""
    return out.with_name(f"{out.name}.partial")


def _whole_lines(path: Path) -> Iterator[tuple[Any, int]]:
    """Each line as JSON with the place where it ends, up to the first that is not whole."""
    end = 0
    with open(path, "rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError:
                return
            end += len(line)
            yield value, end


def _sweep(out: Path) -> None:
    """Remove drafts that killed processes left; whoever writes others now holds the lock of another file."""
    draft = re.compile(rf"\.{re.escape(out.name)}(\.receipt\.json)?\.[0-9a-f]{{8}}\.new")
    for path in out.parent.iterdir():
        if draft.fullmatch(path.name):
            path.unlink()


def _hold(out: Path) -> BaseFileLock:
    lock = FileLock(_lock_of(out), thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise GenerationError(
            f"another process is answering into {out}",
            expected="one process for each --out",
            hint="wait until it has ended, or choose another --out",
        ) from None
    except (OSError, NotImplementedError) as error:
        raise GenerationError(
            f"{out} cannot be written: {error}", expected="a file in a folder that exists and can be written"
        ) from error
    return lock


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")
