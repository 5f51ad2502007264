"""Bodies of requests: sound ones, and ones with anything in them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "tickets", "messages": MESSAGES, "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tickets", "prompt": "hi", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}

_NAMES = [
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "min_p", "seed", "stop", "n", "stream", "stream_options", "logprobs", "top_logprobs", "response_format",
    "tools", "tool_choice", "parallel_tool_calls", "echo", "best_of", "suffix", "presence_penalty",
    "frequency_penalty", "logit_bias", "user", "metadata", "store", "service_tier", "modalities", "audio",
    "functions", "function_call", "reasoning_effort", "verbosity", "role", "content", "type", "text",
    "tool_calls", "tool_call_id", "name", "function", "arguments", "json_schema", "schema", "include_usage",
    "unknown",
]  # fmt: skip

_words = st.sampled_from(
    ["", "hi", "base", "sql", "user", "system", "assistant", "tool", "function", "text", "auto", "required", "none",
     "json_object", "json_schema", "f", "c1", "{}", "\u00e9\U0001f600", "a\u0000b", "<|im_end|>", "string", "object"]
)  # fmt: skip
_numbers = st.integers(-3, 20) | st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**30]) | st.floats(-3, 3)
_sound = st.sampled_from([MESSAGES, [*MESSAGES, CALLED], [TOOL], {"type": "object"}, ["a", "b"], [1, 2], [[1], [2]]])
_leaves = st.none() | st.booleans() | _numbers | _words | _sound
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=4),
    max_leaves=8,
)
_changes = st.dictionaries(st.sampled_from(_NAMES) | st.text(max_size=12), _values, max_size=4)


def changed(sound: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A sound body with some of its fields replaced by anything."""
    return _changes.map(lambda changes: {**sound, **changes})
