"""What may be asked for beside a prompt: options of every command that generates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit.errors import ConfigError
from peftkit.events import Warned
from peftkit.generation.requests import Request, Sampling

System = Annotated[str | None, typer.Option("--system", help="System turn.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens that add up to this much.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many of the likeliest tokens; 0: all.")]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends an answer; repeatable.")]
JsonSchema = Annotated[
    Path | None, typer.Option("--json-schema", metavar="FILE", help="Answers are JSON that this schema describes.")
]
Logprobs = Annotated[
    int | None, typer.Option("--logprobs", metavar="N", min=0, help="In JSON: of each token, and of the N likeliest.")
]


def asked(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    stop: list[str] | None = None,
    json_schema: Path | None = None,
    logprobs: int | None = None,
) -> Request:
    """A request without its prompt. Raises ConfigError for a schema file that cannot be read."""
    return Request(
        prompt=(),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, top_k, seed),
        stop=tuple(stop or ()),
        logprobs=logprobs,
        json_schema=_schema(json_schema) if json_schema else None,
    )


def cut_off(answers: str, like: Request) -> Warned:
    """What to say of answers that ended where no more tokens were allowed."""
    broken = "; what is cut off is not valid JSON" if like.json_schema is not None else ""
    fact = f"{answers} cut off at --max-new-tokens {like.max_new_tokens}, or the base's last position{broken}"
    return Warned(fact, hint="allow more tokens")


def refuse(given: dict[str, Any], why: str) -> None:
    """Raise typer.BadParameter that names those of these options that were given."""
    named = [option for option, value in given.items() if value is not None and value is not False]
    if named:
        raise typer.BadParameter(why, param_hint=", ".join(named))


def _schema(path: Path) -> dict[str, Any]:
    from peftkit.canonical import strict_json

    try:
        schema = strict_json(path.expanduser().read_bytes())
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"], where="--json-schema") from error
    except ValueError as error:
        raise ConfigError([f"{path} is not JSON: {error}"], where="--json-schema") from error
    if not isinstance(schema, dict):
        raise ConfigError([f"{path} holds {type(schema).__name__}, and a schema is an object"], where="--json-schema")
    return schema
