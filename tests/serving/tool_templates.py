"""Chat templates of several families that write tools, shortened; each writes its calls as the family does."""

from __future__ import annotations

from pathlib import Path

from tiny_bases import write_tokenizer

from peftkit.base.tokenizer import Tokenizer, load_tokenizer

_HEAD = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
)
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

HERMES = (
    _HEAD + "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for c in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
QWEN3 = (
    _HEAD + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% if (loop.first and m.content) or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}{{ '<|h|>assistant<|/h|>\n\n' }}"
    "{{ '{\"name\": \"' + c.name + '\", \"parameters\": ' }}{{ c.arguments | tojson }}{{ '}<|im_end|>' }}"
    "{% else %}{{ '<|h|>' + m.role + '<|/h|>\n\n' }}"
    "{% if tools and m.role == 'user' %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{{ m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | list | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) }}'
    "{{ ', \"id\": \"' + c.id + '\"}' }}{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_ARGS = (  # newer ones: the name in the text, the arguments after a control token
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% else %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
DEEPSEEK = (
    _HEAD + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% if m.tool_calls %}"
    "{{ '<calls>' }}{% for c in m.tool_calls %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<call>function<sep>' + c.function.name + '\n```json\n' + (c.function.arguments | tojson) + '\n```</call>' }}"
    "{% endfor %}{{ '</calls>' }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
FUNCTION_TAG = (
    _HEAD + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' + (c.function.arguments | tojson) }}"
    "{{ '</function>\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
COMMAND = (  # the whole call in a list, the arguments under another key, deeper
    _HEAD
    + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.tool_calls %}{{ 'Action: ```json\n[\n' }}"
    '{% for c in m.tool_calls %}{{ \'{"tool": {"tool_name": "\' + c.function.name + \'", "parameters": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}}' }}{% if not loop.last %}{{ ',\n' }}{% endif %}{% endfor %}"
    "{{ '\n]```' }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
QWEN3_CODER = (  # Qwen3-Coder's (Apache-2.0), whose part about calls stands here word for word
    _HEAD + "{%- for message in messages %}{%- if message.tool_calls %}{{- '<|im_start|>' + message.role }}"
    """
            {%- if message.content is defined and message.content is string and message.content | trim | length > 0 %}
                {{- '\\n' + message.content | trim + '\\n' }}
            {%- endif %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function is defined %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}
                {%- if tool_call.arguments is defined %}
                    {%- for args_name, args_value in tool_call.arguments|items %}
                        {{- '<parameter=' + args_name + '>\\n' }}
                        {%- set args_value = args_value | tojson | safe if args_value is mapping or (args_value is sequence and args_value is not string) else args_value | string %}
                        {{- args_value }}
                        {{- '\\n</parameter>\\n' }}
                    {%- endfor %}
                {%- endif %}
                {{- '</function>\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>\\n' }}
    """  # noqa: E501
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}" + _PROMPT
)
GLM4 = (  # GLM-4.5's: names and values each between tags, with no line for themselves
    _HEAD + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name + '\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<arg_key>' + k + '</arg_key>\n<arg_value>' }}"
    "{{ (v if v is string else v | tojson) + '</arg_value>\n' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
XML = (  # values that are no text are refused, so nothing says how they are written
    _HEAD + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' }}"
    "{% for k, v in c.function.arguments.items() %}"
    "{{ '<parameter=' + k + '>' + v + '</parameter>' }}{% endfor %}{{ '</function>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)
MARKED = XML.replace(  # says beside each value whether it is a text, as DeepSeek V3.2's do: tags that depend on values
    "'>' + v +", "' text=' + (v is string) | string + '>' + v | string +"
)
OTHERWISE = (  # as Python writes calls
    _HEAD + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<' + c.function.name + '(' }}{% for k, v in c.function.arguments.items() %}"
    "{{ k + '=' + v | string }}{% endfor %}{{ ')>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + _PROMPT
)

READABLE = {
    "hermes": HERMES,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral-args": MISTRAL_ARGS,
    "deepseek": DEEPSEEK,
    "function-tag": FUNCTION_TAG,
    "command": COMMAND,
    "qwen3-coder": QWEN3_CODER,
    "glm4": GLM4,
}
CONTROL = {"mistral": ["[TOOL_CALLS]"], "mistral-args": ["[TOOL_CALLS]", "[ARGS]"]}


def tokenizer_with(folder: Path, template: str | None, control: list[str] | None = None) -> Tokenizer:
    """A byte-level tokenizer with a template, and with control tokens of its own."""
    write_tokenizer(folder, template)
    if control:
        from transformers import AutoTokenizer

        hf = AutoTokenizer.from_pretrained(str(folder))
        hf.add_special_tokens({"additional_special_tokens": control})
        hf.save_pretrained(str(folder))
    return load_tokenizer(folder)
