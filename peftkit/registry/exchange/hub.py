"""One model repository of a Hub: what it holds, and fetching single files of it with a bound on their size.

Endpoint and token come from huggingface_hub's own variables and login (HF_ENDPOINT, HF_TOKEN, `hf auth login`).
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.base.record import plain
from peftkit.errors import AdapterDamaged, AdapterNotFound, RegistryError
from peftkit.registry.intake.rules import MOST_FILES
from peftkit.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hub:"
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30.0  # seconds for the first answer
_ATTEMPTS = 3


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository by content: git's digest, or SHA-256 for large files."""

    path: str
    size: int
    git: str
    sha256: str | None

    def holds(self, data: bytes | Path) -> bool:
        """Whether these are the file's bytes."""
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        if size != self.size:
            return False
        if self.sha256 is not None:
            return _digest(hashlib.sha256(), data) == self.sha256
        return _digest(hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), data) == self.git


@dataclass(frozen=True)
class Remote:
    """A repository at one commit."""

    commit: str
    private: bool
    files: dict[str, RemoteFile]


class Hub:
    """A repository by name; creating the object contacts nobody."""

    def __init__(self, repo: str, *, endpoint: str | None = None, token: str | None = None) -> None:
        # Read when huggingface_hub is first imported: without it every request says which agent and torch run here.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import HfApi

        self.repo = repo
        self._token = token
        self.api: HfApi = HfApi(endpoint=endpoint, token=token, library_name="peftkit", library_version=__version__)

    @property
    def endpoint(self) -> str:
        """Where the repository is, without its name."""
        return str(self.api.endpoint)

    def look(self, revision: str | None = None) -> Remote | None:
        """What the repository holds now; None when it does not exist, or is not shown to this user."""
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with self.calls(f"looking at {self.repo}"):
            try:
                info = self.api.model_info(self.repo, revision=revision, timeout=_TIMEOUT)
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None
            commit = str(info.sha)
            if not _COMMIT.fullmatch(commit):
                raise self._bad(f"names the commit {plain(commit, 60)}")
            return Remote(commit, bool(info.private), self._files(commit))

    def fetch(self, file: RemoteFile, commit: str, folder: Path) -> Path:
        """Download one file into `folder`, checked against the digest that the repository lists.

        Raises AdapterDamaged for other bytes, or for many more of them than the file has.
        """
        with self.calls(f"downloading {file.path} of {self.repo}"):
            path = Path(
                self.api.hf_hub_download(
                    self.repo, file.path, revision=commit, local_dir=folder, tqdm_class=_bounded(file)
                )
            )
        if path.is_symlink() or not file.holds(path):
            raise AdapterDamaged(
                f"{file.path} of {PREFIX}{self.repo} came with other bytes than the repository lists",
                expected=f"{file.size} bytes with the digest {file.sha256 or file.git}",
                hint="try again; if it stays so, the repository or the connection cannot be trusted",
            )
        return path

    @contextmanager
    def calls(self, what: str) -> Iterator[None]:
        """Turn whatever the Hub's client raises into a RegistryError that says what was tried, without the token."""
        try:
            with _bars_on_terminals_only():
                yield
        except RegistryError:
            raise
        except (
            Exception
        ) as error:  # the Hub client raises dozens of unrelated types, an answer that is no JSON among them
            raise self._failed(what, error) from error

    def _files(self, commit: str) -> dict[str, RemoteFile]:
        from huggingface_hub.hf_api import RepoFile

        listed = list(islice(self.api.list_repo_tree(self.repo, recursive=True, revision=commit), MOST_FILES + 1))
        if len(listed) > MOST_FILES:
            raise self._bad(f"holds more than {MOST_FILES} files")
        files = {}
        for entry in listed:
            if isinstance(entry, RepoFile):
                sha256 = entry.lfs.sha256 if entry.lfs else None
                size = entry.lfs.size if entry.lfs else entry.size
                if not isinstance(entry.path, str) or type(size) is not int or size < 0:
                    raise self._bad("lists a file without a path or a size")
                files[entry.path] = RemoteFile(entry.path, size, str(entry.blob_id), sha256)
        return files

    def _bad(self, what: str) -> RegistryError:
        return RegistryError(
            f"{self.endpoint}/{self.repo} {what}", expected="a model repository as the Hub serves them"
        )

    def _failed(self, what: str, error: Exception) -> RegistryError:
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

        hint = "check the network and HF_ENDPOINT, then run this again; a folder works without a network"
        if isinstance(error, OfflineModeIsEnabled):
            hint = "unset HF_HUB_OFFLINE, or use a folder instead of the Hub"
        elif isinstance(error, RevisionNotFoundError):
            hint = "leave --revision out, or give a branch, tag or commit of the repository"
        elif isinstance(error, GatedRepoError):
            hint = "ask for access on the repository's page, then: hf auth login"
        elif isinstance(error, HfHubHTTPError) and getattr(error.response, "status_code", 0) in (401, 403):
            hint = "hf auth login, with a token that may do this"
        return RegistryError(
            f"{what} at {self.endpoint} failed: {self._reason(error)}", expected="a Hub that answers", hint=hint
        )

    def _reason(self, error: Exception) -> str:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"{type(error).__name__}: {' '.join(lines[:3])}" if lines else type(error).__name__
        for secret in filter(None, (self._token, _known_token())):
            text = text.replace(secret, "***")
        return plain(text, 400)


def parse(text: str) -> str | None:
    """The repository that `hub:owner/name` names; None for a path. Raises RegistryError for a misspelt repository."""
    if text.startswith(("http://", "https://", "hf://")):
        hint = f"{PREFIX}{'/'.join(text.split('?')[0].rstrip('/').split('/')[-2:])}"
        raise RegistryError(f"{text} is an address", expected=f"{PREFIX}owner/name or a path", hint=hint)
    if not text.startswith(PREFIX):
        return None
    repo = text.removeprefix(PREFIX)
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", "-", ".")):
        raise RegistryError(
            f"{text!r} names no repository", expected=f"{PREFIX}owner/name", hint=f"for example {PREFIX}me/tickets"
        )
    return repo


def missing(hub: Hub) -> AdapterNotFound:
    """The error for a repository that is not there."""
    return AdapterNotFound(
        f"{hub.endpoint} shows no repository {hub.repo}",
        expected="a model repository that exists and that you may read",
        hint="check the spelling; for a private one: hf auth login",
    )


def _known_token() -> str | None:
    from huggingface_hub import get_token

    try:
        return get_token()
    except Exception:  # a broken login file must not hide the error that is being reported
        return None


def _digest(digest: Any, data: bytes | Path) -> str:
    if isinstance(data, bytes):
        digest.update(data)
    else:
        with data.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return str(digest.hexdigest())


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """The Hub's client draws progress bars into logs as well."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _bounded(file: RemoteFile) -> Any:
    """A progress bar that ends a download which sends far more than was listed: nothing else sees it running."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    most = _ATTEMPTS * file.size + (1 << 16)

    class Bounded(tqdm):  # type: ignore[misc]
        received = 0

        def update(self, n: float | None = 1) -> bool | None:
            Bounded.received += max(int(n or 0), 0)
            if Bounded.received > most:
                raise AdapterDamaged(
                    f"{plain(file.path)} sends more than {most} bytes",
                    expected=f"the {file.size} bytes that the repository lists",
                    hint="try again; if it stays so, the repository or the connection cannot be trusted",
                )
            return super().update(n)  # type: ignore[no-any-return]

    return Bounded
