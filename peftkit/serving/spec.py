"""Settings of a server."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

from peftkit.config import Spec
from peftkit.errors import ConfigError

_KEY_LENGTH = 16  # of a key that strangers can try: openssl rand -hex 24 makes 48
_MAKE_KEY = "export PEFTKIT_API_KEY=$(openssl rand -hex 24) makes one"
_ORIGIN = re.compile(r"https?://[a-z0-9._-]+(:\d+)?|https?://\[[0-9a-f:]+\](:\d+)?")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|[0-9a-f:]*:[0-9a-f:]*")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; a name that is not localhost may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    if not text or not all("!" <= letter <= "~" for letter in text):
        raise ValueError(f"a key has letters, digits and signs of ASCII, and no spaces; {_MAKE_KEY}")
    return key


def _host(host: str) -> str:
    if not _NAME.fullmatch(host.lower()):
        raise ValueError(f"{host!r} is neither an address nor a name, as 127.0.0.1, ::1 or 0.0.0.0 for all addresses")
    return host.lower()


def _origin(origin: str) -> str:
    """`*` is refused as well: with it every page that a user opens could ask in the user's place."""
    if not _ORIGIN.fullmatch(origin.lower()):
        raise ValueError(f"{origin!r} is not one origin, as https://example.org or http://localhost:3000")
    return origin.lower()


Key = Annotated[SecretStr, AfterValidator(_key)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class ServeSpec(Spec):
    """Where a server listens, who may ask, and how much."""

    model_config = ConfigDict(hide_input_in_errors=True)  # or an error would show the keys

    host: Annotated[str, AfterValidator(_host)] = "127.0.0.1"
    """An address of this machine. Any but loopback needs `api_key`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    api_key: Key | None = None
    """What `Authorization: Bearer …` must say on every route but /health and the page's own files."""
    admin_key: Key | None = None
    """The same for routes that change what is served, and for runs and the registry; it opens the others too. Without
    it they are open on loopback, where `api_key` (when there is one) is asked for, and closed elsewhere."""
    allow_hosts: tuple[Annotated[str, AfterValidator(_host)], ...] = ()
    """Names beside the address and localhost that the Host header may have (DNS rebinding)."""
    allow_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    """Pages of other origins that may ask (CORS), as https://example.org."""
    rows: Count = 64
    """Requests that are answered at once."""
    waiting: int = Field(default=256, ge=0)
    """Requests that may wait; the next one gets 429 with Retry-After."""
    max_body_bytes: Count = 1 << 20
    """Of a request; a larger one gets 413."""
    max_prompt_tokens: Count | None = None
    """None: the base's positions."""
    max_new_tokens: Count = 4096
    """The most that a request may ask for."""
    default_new_tokens: Count = 512
    """Where a request does not say."""
    request_seconds: Seconds = 600.0
    """After so many seconds an answer is cut off, with an error."""
    read_seconds: Seconds = 20.0
    """For the head of a request, and for its body."""
    write_seconds: Seconds = 60.0
    """For a piece of a response: whoever does not read so long is cut off."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """What answers on their way are given after SIGTERM."""
    connections: Count = 512
    """More are refused with 503. A process may often have no more than 1,024 files open."""
    follow_seconds: float = Field(default=1.0, ge=0)
    """How often the registry is looked at for moved aliases and new versions; 0 is never."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can ask."""
        return is_loopback(self.host)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The settings of these values. Raises ConfigError that names every wrong one, and shows no key."""
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise ConfigError([_sentence(detail) for detail in error.errors()], where="the server's settings") from None

    @model_validator(mode="after")
    def _strangers_need_a_key(self) -> Self:
        if self.is_local:
            return self
        if self.api_key is None:
            raise ValueError(f"other machines reach host {self.host}, and there is no api_key; {_MAKE_KEY}")
        for name, key in (("api_key", self.api_key), ("admin_key", self.admin_key)):
            if key is not None and len(key.get_secret_value()) < _KEY_LENGTH:
                few = f"{name} has fewer than {_KEY_LENGTH} characters, and other machines reach host {self.host}"
                raise ValueError(f"{few}; {_MAKE_KEY}")
        return self

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        if self.default_new_tokens > self.max_new_tokens:
            both = f"default_new_tokens is {self.default_new_tokens}, and max_new_tokens {self.max_new_tokens}"
            raise ValueError(f"{both}: what is asked for by default must be allowed")
        return self


def _sentence(detail: Any) -> str:
    """A finding of pydantic's, in a line, without the value."""
    where = ".".join(str(part) for part in detail["loc"])
    said = str(detail["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
