"""A base's chat template taken apart by rendering it: what stands before, between and after the messages.

Conversations of marker words are rendered by the base's own Jinja template and cut at the markers. Nothing of the
template's source is interpreted; whether the parts put together render every conversation is checked elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from peftkit.base.tokenizer import Tokenizer
from peftkit.errors import DeltaError
from peftkit.release.export.gotemplate import quoted

Message = dict[str, str]
_SYSTEM, _USER, _ANSWER, _SECOND = "QsystemQ", "QuserQ", "QanswerQ", "QsecondQ"


@dataclass(frozen=True)
class Turns:
    """The constant text around messages."""

    head: str
    """Before the first message when it is not a system message: a BOS token, a default system message."""
    system: tuple[str, str] | None
    """Before and after a system message at the beginning; None when the base refuses one."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    """What invites the answer."""
    joined: bool = False
    """Whether the system message stands inside the first user turn, whose beginning is then part of `system`."""

    def go(self) -> str:
        """The Go template that Ollama renders with the fields System and Messages, each of Role and Content."""
        before, after = self.system or (self.head, "")
        content = "{{ $m.Content }}"
        first = '{{ if and (eq $i 0) (ne $m.Role "system") }}' + quoted(self.head) + "{{ end }}"
        system = quoted(before) + (content + quoted(after) if self.system else "")
        beginning = quoted(self.user[0])
        if self.joined:
            beginning = "{{ if not (and (eq $i 1) $.System) }}" + beginning + "{{ end }}"
        turns = {
            "system": system,
            "user": beginning + content + quoted(self.user[1]),
            "assistant": quoted(self.assistant[0]) + content + quoted(self.assistant[1]),
        }
        cases = "{{ else ".join(f'if eq $m.Role "{role}" }}}}{text}' for role, text in turns.items())
        loop = "{{ range $i, $m := .Messages }}" + (first if self.head else "") + "{{ " + cases
        return loop + "{{ end }}{{ end }}" + quoted(self.prompt)


def jinja(tokenizer: Tokenizer, messages: list[Message], *, prompt: bool) -> str:
    """A conversation as the base's own template renders it. Raises DeltaError when it refuses."""
    try:
        return str(tokenizer.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a Jinja template may raise anything, most often its own raise_exception(...)
        raise DeltaError(f"the base's chat template refuses the conversation: {error}") from error


def takes_system(tokenizer: Tokenizer) -> bool:
    """Whether the base's template renders a system message at all."""
    try:
        return _SYSTEM in jinja(tokenizer, _messages(system=_SYSTEM, user=_USER), prompt=True)
    except DeltaError:
        return False


def turns_of(tokenizer: Tokenizer) -> Turns:
    """The parts of the base's chat template. Raises DeltaError when it is not made of constant parts around turns."""
    if not tokenizer.has_template:
        raise DeltaError(
            "this base has no chat template, so there is nothing to make Ollama's TEMPLATE from",
            expected="an instruct base",
        )
    talk = [*_messages(user=_USER, assistant=_ANSWER), {"role": "user", "content": _SECOND}]
    start, between, back, end = _cut(jinja(tokenizer, talk, prompt=True), _USER, _ANSWER, _SECOND)
    after_user = _cut(jinja(tokenizer, talk[:1], prompt=False), _USER)[1]
    after_answer = _cut(jinja(tokenizer, talk[:2], prompt=False), _USER, _ANSWER)[2]
    # The last turn of a conversation may end differently (an EOS, a newline less): then parts are cut further left.
    after_user = _shared(after_user, between, end)
    after_answer = _shared(after_answer, back)
    before_user, before_answer = back[len(after_answer) :], between[len(after_user) :]
    if not start.endswith(before_user):
        before_user = _shared(start[::-1], back[::-1])[::-1]
        after_answer = back.removesuffix(before_user)
    system, joined = None, False
    if takes_system(tokenizer):
        first = jinja(tokenizer, _messages(system=_SYSTEM, user=_USER), prompt=True)
        before, middle, _ = _cut(first, _SYSTEM, _USER)
        joined = not middle.endswith(before_user)
        system = before, middle if joined else middle.removesuffix(before_user)
    head = start.removesuffix(before_user)
    around = (before_user, after_user), (before_answer, after_answer)
    return Turns(head, system, *around, prompt=end[len(after_user) :], joined=joined)


def _messages(**contents: str) -> list[Message]:
    return [{"role": role, "content": content} for role, content in contents.items()]


def _cut(text: str, *markers: str) -> list[str]:
    """The text between markers. Raises DeltaError unless each stands in it once, in this order."""
    parts = []
    for marker in markers:
        if text.count(marker) != 1:
            raise DeltaError(
                f"the base's chat template writes a message {text.count(marker)} times, or out of order",
                expected="a template that writes every message once",
                hint="serve the merged GGUF with llama.cpp's --jinja, which runs the base's own template",
            )
        before, text = text.split(marker)
        parts.append(before)
    return [*parts, text]


def _shared(*texts: str) -> str:
    """The longest common beginning."""
    first = min(texts, key=len)
    length = next((i for i in range(len(first)) if len({text[i] for text in texts}) > 1), len(first))
    return first[:length]
