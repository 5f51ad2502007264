"""How a base writes calls of tools, read off its own chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.formats import Row
from peftkit.data.template import Rendering, render
from peftkit.errors import DataError
from peftkit.serving.openai.calls import Form, Inside, json_at
from peftkit.serving.openai.tagged import Tags

# What the template is shown. No template contains these words; the ids are OpenAI's kind, and then Mistral's only kind.
_FIRST, _SECOND = _NAMES = ("zq_first", "zq_second")
_KEY, _VALUE = "zq_key", "zq_value"
_ARGUMENTS = {_KEY: _VALUE}
_MORE, _COUNT = "zq_more", 7
_SEVERAL = {**_ARGUMENTS, _MORE: _COUNT}
_SAID = "Zq said Zq"
_IDS = (("call_zq0000001", "call_zq0000002"), ("zq0000001", "zq0000002"))
_TOOL = {"name": "zq_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
_UNREAD = "a call that it writes between tags cannot be read back"
# The longest of templates that are known is 359, for two calls.
_LONGEST = 4096


@dataclass(frozen=True)
class Spelling:
    """How a template wants turns with calls to be handed to it."""

    text_arguments: bool = False
    """Whether arguments are JSON in a string, as DeepSeek's have it, and not an object."""
    short_ids: bool = False
    """Whether it takes ids of nine letters and digits only, as Mistral's do."""

    def turn(self, turn: Mapping[str, Any]) -> Mapping[str, Any]:
        """A turn as the template wants it."""
        if not self.text_arguments or not turn.get("tool_calls"):
            return turn
        functions = [call["function"] for call in turn["tool_calls"]]
        written = [{**function, "arguments": json.dumps(function["arguments"])} for function in functions]
        calls = [{**call, "function": function} for call, function in zip(turn["tool_calls"], written, strict=True)]
        return {**turn, "tool_calls": calls}


_SPELLINGS = [Spelling(text, short) for short in (False, True) for text in (False, True)]


@dataclass(frozen=True)
class Shown:
    """How a template shows calls that were made."""

    one: str
    two: str | None
    """None where it takes one call only."""
    several: str | None
    """One call with a text and a number; None where arguments are written as JSON, or where it refuses a number."""
    spelling: Spelling


def shown(tokenizer: Tokenizer, rendering: Rendering) -> Shown:
    """Show the template one call and two. Raises DataError when they would not be in a prompt."""
    plain = _rendered(tokenizer, rendering, {"role": "assistant", "content": _SAID})
    one, spelling = _first_taken(tokenizer, rendering)
    two = _taken(tokenizer, rendering, _called(spelling, _NAMES))
    said = _answer(one, plain, tokenizer)
    several = None if "{" in said else _taken(tokenizer, rendering, _called(spelling, _NAMES[:1], _SEVERAL))
    both = "" if two is None else _answer(two, plain, tokenizer)
    return Shown(
        one=said,
        two=both if all(name in both for name in _NAMES) else None,
        several=_answer(several, plain, tokenizer) if several is not None else None,
        spelling=spelling,
    )


def form_of(found: Shown, tokenizer: Tokenizer) -> Form:
    """How calls are written. Raises DataError when nothing can tell where they begin and end."""
    if (longest := max(len(said or "") for said in (found.one, found.two, found.several))) > _LONGEST:
        raise _unusable(f"it writes calls of a few words as {longest:,} characters, more than {_LONGEST:,}")
    form = _in_json(found) or _in_tags(found) or _behind_a_name(found)
    written = found.one + (found.two or "")
    control = tuple(token for token in tokenizer.control if token in written)
    return replace(form, control=control, short_ids=found.spelling.short_ids)


def _in_json(found: Shown) -> Form | None:
    """Calls that are JSON, names and arguments; None when they are not."""
    calls = list(_objects(found.one, 0))
    if not calls:
        return None
    start, end, value = calls[0]
    both = [] if found.two is None else list(_objects(found.two, start))
    between = "" if found.two is None or len(both) < 2 else found.two[both[0][1] : both[1][0]]
    return Form(found.one[:start].strip(), between.strip(), found.one[end:].strip(), inside=_inside(value))


def _behind_a_name(found: Shown) -> Form:
    """Calls that are a name in the text, and arguments as JSON."""
    one, two = found.one, found.two
    begin, _, rest = one.partition(_FIRST)
    if not begin.strip():
        raise _unusable("nothing stands before the name in a call")
    end = _arguments_end(rest, 0)
    between = "" if two is None else two[_arguments_end(two, two.index(_FIRST)) : two.index(_SECOND)]
    after_name = rest[: rest.index("{")].strip()
    return Form(begin.strip(), between.strip(), rest[end:].strip(), after_name=after_name)


def _in_tags(found: Shown) -> Form | None:
    """Calls that are a name in the text, and arguments between tags; None when they are not. Raises DataError when they
    are, and cannot be read."""
    if "{" in found.one or _around(found.one) is None:
        return None
    if found.several is None:
        raise _unusable("it refuses a number among a call's arguments, so nothing says how one is written")
    said, around = found.several, _around(found.several)
    between = "" if around is None else around.behind.partition(around.opening + _MORE)[0]
    closing, last = between.strip(), found.one.rpartition(_VALUE)[2].strip()
    if around is None or around.number(between) not in said:
        raise _unusable("the tags around an argument change with the type of its value")
    if not closing or not last.startswith(closing):
        raise _unusable(_UNREAD)
    end, _, after = last.removeprefix(closing).strip().partition(">")
    tags = Tags(
        begin=around.begin,
        opening=around.opening,
        named=around.named.strip(),
        closing=closing,
        end=f"{end}>",
        apart=between[len(between.rstrip()) :],
        margins=(around.named[len(around.named.rstrip()) :], between[: -len(between.lstrip())]),
    )
    ended = (found.two or "").partition(_VALUE)[2].partition(tags.end)[2]
    between_calls = ended.partition(_SECOND)[0].strip()
    form = Form(around.begin, between_calls, after.strip(), after_name=around.after_name, tags=tags, lead=around.lead)
    _, calls = form.read(said, {_FIRST: {"properties": {_MORE: {"const": _COUNT}}}})
    if [json.loads(call.arguments) for call in calls] != [_SEVERAL]:
        raise _unusable(_UNREAD)
    return form


@dataclass(frozen=True)
class _Around:
    """What stands around the name of a call and its first argument."""

    lead: str
    begin: str
    after_name: str
    opening: str
    named: str
    """With its spaces."""
    behind: str
    """All behind the value."""

    def number(self, between: str) -> str:
        """How the second argument begins, if not its type decides; `between` is what stands before it."""
        return f"{between}{self.opening}{_MORE}{self.named}{_COUNT}{between.rstrip()}"


def _around(said: str) -> _Around | None:
    """What stands around the parts of a call; None where a tag is missing before a name, or behind the value."""
    head, _, rest = said.partition(_FIRST)
    middle, _, rest = rest.partition(_KEY)
    named, found, behind = rest.partition(_VALUE)
    lead, begun, begin = head.rpartition("<")
    after_name, opened, opening = middle.rpartition("<")
    if not (begun and opened and found and named.strip() and behind.lstrip().startswith("<")):
        return None
    return _Around(lead.strip(), f"<{begin.rstrip()}", after_name.strip(), f"<{opening}", named, behind)


def _first_taken(tokenizer: Tokenizer, rendering: Rendering) -> tuple[str, Spelling]:
    """A conversation with one call, in the first spelling in which the template shows it."""
    why: DataError | None = None
    for spelling in _SPELLINGS:
        try:
            one = _rendered(tokenizer, rendering, _called(spelling, _NAMES[:1]))
        except DataError as error:
            why = why or error
            continue
        if all(word in one for word in (_FIRST, _KEY, _VALUE)):
            return one, spelling
    if why is not None:
        raise _unusable("it refuses a conversation with a call, or leaves the call out") from why
    raise _unusable("a call in a conversation leaves no trace in its prompt")


def _called(spelling: Spelling, names: Sequence[str], arguments: Mapping[str, Any] = _ARGUMENTS) -> Mapping[str, Any]:
    calls = [
        {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
        for identity, name in zip(_IDS[spelling.short_ids], names, strict=False)
    ]
    return spelling.turn({"role": "assistant", "content": "", "tool_calls": calls})


def _taken(tokenizer: Tokenizer, rendering: Rendering, answer: Mapping[str, Any]) -> str | None:
    """What the template makes of a turn; None when it refuses it."""
    try:
        return _rendered(tokenizer, rendering, answer)
    except DataError:
        return None


def _rendered(tokenizer: Tokenizer, rendering: Rendering, answer: Mapping[str, Any]) -> str:
    tools = ({"type": "function", "function": _TOOL},)
    row = Row(messages=(), text=None, tools=tools, chat_template_kwargs={}, columns={}, where="this request")  # type: ignore[arg-type]
    return render([{"role": "user", "content": "Zq"}, dict(answer)], row, tokenizer, rendering, prompt=False)


def _answer(called: str, plain: str, tokenizer: Tokenizer) -> str:
    """What a turn with calls says: where it differs from the same turn with words, up to the end of the turn."""
    said = called[_alike(called, plain) :]
    stops = [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.stop_ids]
    ends = [at for at in (said.find(stop) for stop in stops if stop) if at >= 0]
    return said[: min(ends)] if ends else said[: len(said) - _alike(said[::-1], plain[::-1])]


def _alike(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _objects(said: str, at: int) -> Iterator[tuple[int, int, Any]]:
    """Calls that are JSON, or a JSON list of them, from left to right: where each begins and ends."""
    while at < len(said):
        value, end = json_at(said, at) if said[at] in "{[" else (None, at)
        if value is not None and _inside(value) is not None:
            yield at, end, value
            at = end
        else:
            at += 1


def _inside(value: Any) -> Inside | None:
    """Where a call's name and arguments stand in a JSON value; None when it is no call."""
    call = value[0] if isinstance(value, list) and value else value
    name = _path(call, lambda part: part in _NAMES)
    arguments = _path(call, _is_arguments)
    return None if name is None or arguments is None else Inside(name, arguments)


def _is_arguments(part: Any) -> bool:
    return bool(part == _ARGUMENTS) or (isinstance(part, str) and json_at(part, 0)[0] == _ARGUMENTS)


def _path(value: Any, wanted: Callable[[Any], bool]) -> tuple[str, ...] | None:
    """The keys to the first part of an object that is wanted."""
    if wanted(value):
        return ()
    for key, part in value.items() if isinstance(value, dict) else ():
        if (found := _path(part, wanted)) is not None:
            return (key, *found)
    return None


def _arguments_end(said: str, at: int) -> int:
    """Where the arguments end that stand as JSON behind a name."""
    opened = said.find("{", at)
    value, end = json_at(said, opened) if opened >= 0 else (None, 0)
    if value != _ARGUMENTS:
        raise _unusable("it writes a call's arguments neither as JSON nor each between tags of its own")
    return end


def _unusable(why: str) -> DataError:
    return DataError(
        f"the base's chat template cannot be used for tools: {why}",
        expected="a template that writes calls of tools with their arguments as JSON, or each between tags of its own",
        hint="ask without tools; response_format makes an answer JSON",
    )
