"""Errors as OpenAI's clients know them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from peftkit.errors import (
    AdapterDamaged,
    AdapterNotFound,
    BaseMismatch,
    ConfigError,
    DataError,
    EngineBusy,
    EngineGone,
    PeftkitError,
    RegistryError,
    TuningError,
)

RETRY_AFTER = 1
"""Seconds: a row is free again after an answer, which seldom takes longer."""

_MOST = 4000
"""Characters of a message: names and values that were sent are repeated in it. 20 problems of a body fit."""
_ASKED = (AdapterNotFound, ConfigError, DataError, BaseMismatch, TuningError, RegistryError)


class Refused(Exception):
    """What only HTTP knows to be wrong: a missing key, a body that is too large, a name that is not a parameter."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.headers = dict(headers or {})


class Draining(EngineBusy):
    """The server takes no more requests, because it is on its way down."""


@dataclass(frozen=True)
class Failure:
    """An error on its way to a client."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        said = self.message if len(self.message) <= _MOST else self.message[: _MOST - 1] + "…"
        return {"error": {"message": said, "type": self.type, "param": self.param, "code": self.code}}


def failure_of(error: BaseException) -> Failure:
    """What a client is told of an error; of one that nobody foresaw, nothing but that there was one."""
    if isinstance(error, Refused):
        return Failure(error.status, error.message, error.type, error.param, error.code, error.headers)
    if isinstance(error, EngineBusy):
        later, said = {"Retry-After": str(RETRY_AFTER)}, str(error)
        if isinstance(error, Draining):
            return Failure(503, said, "server_error", code="shutting_down", headers=later)
        return Failure(429, said, "rate_limit_error", code="rate_limit_exceeded", headers=later)
    if isinstance(error, EngineGone):
        return Failure(503, str(error), "server_error", code="engine_unavailable")
    if isinstance(error, AdapterNotFound):
        return Failure(404, str(error), param="model", code="model_not_found")
    if isinstance(error, _ASKED) and not isinstance(error, AdapterDamaged) and not _of_the_machine(error):
        return Failure(400, _words(error), code=_code(error))
    # The same request would fail in the same way, and without this OpenAI's client sends it twice more.
    final = {"x-should-retry": "false"}
    said = str(error) if isinstance(error, PeftkitError) else "internal error"
    return Failure(500, said, "server_error", code=_code(error), headers=final)


def answer_for(error: BaseException) -> JSONResponse:
    """The response that tells a client of an error."""
    failure = failure_of(error)
    return JSONResponse(failure.body, failure.status, dict(failure.headers))


@contextmanager
def about(param: str) -> Iterator[None]:
    """Say of which parameter it is that something which was asked cannot be done."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise Refused(400, _words(error), param=param) from error


def _words(error: PeftkitError) -> str:
    """A heading over one problem tells a client nothing, but where it is when that is not the request itself."""
    said = str(error)
    if not isinstance(error, ConfigError) or len(error.problems) != 1:
        return said
    where, _, problem = said.removeprefix("1 problem in ").partition("\n- ")
    return problem if where == "the request" else f"{where}: {problem}"


def _of_the_machine(error: BaseException) -> bool:
    """Whether a full disk, missing rights or a held lock is behind it: no other request would help."""
    return isinstance(error.__cause__, OSError)


def _code(error: BaseException) -> str | None:
    if isinstance(error, BaseMismatch):
        return "base_mismatch"
    return "adapter_damaged" if isinstance(error, AdapterDamaged) else None
