"""Messages and tools as OpenAI's clients send them, turned into what chat templates read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peftkit.canonical import strict_json
from peftkit.serving.openai.fields import Fields, kind, shown

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # OpenAI's rule for names of functions
_MOST_TOOLS = 128  # OpenAI's
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Tools:
    """The functions that a model may call."""

    listed: tuple[Mapping[str, Any], ...] = ()
    """With every key that templates read; empty when none may be called."""
    choice: Choice = "none"
    only: str | None = None
    """The one that must be called."""
    parallel: bool = True
    """Whether one answer may hold several calls."""

    @property
    def names(self) -> frozenset[str]:
        """Of those that may be called."""
        return frozenset(self.parameters)

    @property
    def parameters(self) -> dict[str, Mapping[str, Any]]:
        """The JSON schema of each function's arguments; one without parameters takes none."""
        functions = [tool["function"] for tool in self.listed]
        wanted = [each for each in functions if self.only is None or each["name"] == self.only]
        return {each["name"]: each.get("parameters") or _NOTHING for each in wanted}


def read_messages(body: Fields) -> list[dict[str, Any]]:
    """The conversation of a chat request."""
    messages = body.inners("messages", required=True)
    if not messages and body.get("messages") == []:
        body.wrong("messages", "is empty: expected at least one message")
    called: dict[str, str] = {}
    return [_message(each, called) for each in messages]


def _message(fields: Fields, called: dict[str, str]) -> dict[str, Any]:
    """One turn; `called` holds the ids of the calls so far with the names of their functions."""
    role = fields.choice("role", _ROLES, required=True)
    turn: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = _calls(fields, called) if role == "assistant" else []
    turn["content"] = _content(fields, required=not calls)
    name = fields.text("name")
    if role == "assistant":
        reasoning = fields.text("reasoning_content")
        turn.update({"tool_calls": calls} if calls else {}, **({"reasoning_content": reasoning} if reasoning else {}))
        fields.neutral("refusal", why="a refusal is no turn of a conversation here")
        fields.neutral("function_call", why="send tool_calls")
        fields.neutral("audio", why="this server answers in text")
        fields.ignored("annotations")
    elif role == "tool":
        answered = fields.text("tool_call_id", required=True)
        if answered is not None and answered not in called:
            fields.wrong("tool_call_id", f"is {shown(answered)}: expected the id of a call in an earlier message")
        turn["tool_call_id"], name = answered, name or called.get(answered or "")
    if name is not None:
        turn["name"] = name
    if role is not None:
        fields.close()
    return turn


def _content(fields: Fields, *, required: bool) -> str:
    """The text of a message; parts of text are joined as they stand."""
    value = fields.get("content")
    if isinstance(value, str):
        return value
    if value is None:
        if required:
            fields.wrong("content", "is missing: expected text")
        return ""
    if not isinstance(value, list):
        fields.wrong("content", f"is {kind(value)}: expected text, or a list of parts of text")
        return ""
    return "".join(_part(part) for part in fields.inners("content"))


def _part(part: Fields) -> str:
    if part.get("type") != "text":
        part.wrong("type", f"is {shown(part.get('type'))}: this server reads parts of type 'text' only")
        return ""
    text = part.text("text", required=True)
    part.ignored("prompt_cache_breakpoint")
    part.close()
    return text or ""


def _calls(fields: Fields, called: dict[str, str]) -> list[dict[str, Any]]:
    """Calls that the assistant made. Templates read their arguments as objects, not as JSON in a string."""
    return [_call(each, called) for each in fields.inners("tool_calls")]


def _call(call: Fields, called: dict[str, str]) -> dict[str, Any]:
    identity = call.text("id", required=True)
    call.choice("type", ("function",), required=True)
    function = call.inner("function", required=True)
    call.ignored("index")
    call.close()
    if function is None:
        return {}
    name, said = function.text("name", required=True), function.text("arguments", required=True)
    function.close()
    called[identity or ""] = name or ""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": _arguments(function, said)}}


def _arguments(function: Fields, said: str | None) -> dict[str, Any]:
    try:
        arguments = strict_json((said or "{}").encode())
    except (ValueError, RecursionError) as error:
        function.wrong("arguments", f"cannot be read as JSON: {error}")
        return {}
    if not isinstance(arguments, dict):
        function.wrong("arguments", f"is {kind(arguments)} in JSON: expected an object")
        return {}
    return arguments


def read_tools(body: Fields) -> Tools:
    """The functions of a chat request, and which of them are to be called."""
    listed = [tool for each in body.inners("tools") if (tool := _tool(each)) is not None]
    names = [tool["function"]["name"] for tool in listed]
    for twice in sorted({name for name in names if names.count(name) > 1}) if len(names) <= _MOST_TOOLS else ():
        body.wrong("tools", f"has the function {twice!r} twice")
    if len(names) > _MOST_TOOLS:
        body.wrong("tools", f"has {len(names)} functions: expected at most {_MOST_TOOLS}")
    several = body.get("parallel_tool_calls")
    if several is not None and not isinstance(several, bool):
        body.wrong("parallel_tool_calls", f"is {kind(several)}: expected true or false")
    choice, only = _choice(body, names)
    return Tools(tuple(listed) if choice != "none" else (), choice, only, parallel=several is not False)


def _tool(tool: Fields) -> dict[str, Any] | None:
    tool.choice("type", ("function",), required=True)
    function = tool.inner("function", required=True)
    tool.close()
    if function is None:
        return None
    name = function.text("name", required=True)
    if name is not None and not _NAME.fullmatch(name):
        function.wrong("name", f"is {shown(name)}: expected 1 to 64 of A-Z, a-z, 0-9, _ and -")
    told = function.text("description")
    parameters = function.mapping("parameters")
    if parameters and parameters.get("type") != "object":
        function.wrong("parameters", 'is no schema of an object: expected {"type": "object", "properties": …}')
    function.flag("strict")
    function.close()
    written = {"name": name, "description": told or "", "parameters": parameters or _NOTHING}
    return {"type": "function", "function": written} if name is not None else None


def _choice(body: Fields, names: list[str]) -> tuple[Choice, str | None]:
    choice = body.get("tool_choice")
    if choice is None:
        return ("auto" if names else "none"), None
    if isinstance(choice, dict):
        only = _only(Fields(choice, body.problems, body.name("tool_choice")))
        if only is not None and only not in names:
            body.wrong("tool_choice", f"names the function {shown(only)}: expected one of tools")
        return "required", only
    if choice not in ("none", "auto", "required"):
        body.wrong("tool_choice", f"is {shown(choice)}: expected 'none', 'auto', 'required', or one function")
        return "none", None
    if choice == "required" and not names:
        body.wrong("tool_choice", "is 'required', and there are no tools")
    return choice, None


def _only(named: Fields) -> str | None:
    named.choice("type", ("function",), required=True)
    function = named.inner("function", required=True)
    named.close()
    if function is None:
        return None
    name = function.text("name", required=True)
    function.close()
    return name
