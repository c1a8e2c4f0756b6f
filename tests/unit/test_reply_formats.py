"""Chat templates of well-known families give away the format their models reply in."""

from __future__ import annotations

import pytest

from serving.chat.reply import recognise

THINKING = "{{ '<think>\\n' }}"
QWEN = """{%- if tools %}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- "<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>" }}
{%- endif %}"""
HERMES_2 = """{%- for tool in tools %}{%- endfor %}{{- "<tool_call>\\n" }}
{{- '{"name": "' + tool_call.name + '", "arguments": ' }}{{- "}\\n</tool_call>" }}"""
QWEN_CODER = """{%- if tools is iterable and tools | length > 0 %}
{{- '<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>\\nvalue_1' }}
{%- endif %}"""
LLAMA = """{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}"""
MISTRAL_NEMO = """{%- if tools is not none %}{{- "[AVAILABLE_TOOLS][" }}{%- endif %}
{{- "[TOOL_CALLS][" }}{{- ', "id": "' + tool_call.id + '"}' }}"""
MISTRAL_SMALL = """{{- '[AVAILABLE_TOOLS]' + tools|tojson }}{{- '[TOOL_CALLS]' + tool_call.function.name }}
{{- '[CALL_ID]' + tool_call.id }}{{- '[ARGS]' + tool_call['function']['arguments']|tojson }}"""
DEVSTRAL = """{{- '[AVAILABLE_TOOLS]' + tools|tojson }}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"""
MAGISTRAL = DEVSTRAL + "{{- '[THINK]' + block['thinking'] + '[/THINK]' }}"
DEEPSEEK_R1 = """{% for tool in tools %}{% endfor %}{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type']
+ '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n'}}"""
DEEPSEEK_V3_1 = """{% if tools %}{% endif %}{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' +
tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}"""
HARMONY = """{%- if tools -%}{%- endif %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}"""
GEMMA_4 = """{%- for tool in tools %}{%- endfor %}{{- '<|channel>thought\\n' + thinking_text + '\\n<channel|>' -}}
{{- '<|tool_call>call:' + function['name'] + '{' -}}"""
# They write calls, but show no tools; or in a syntax of their own.
DEEPSEEK_DISTILL = DEEPSEEK_R1.replace("tools %}", "message['tool_calls'] %}") + THINKING
GEMMA_3 = "{{ '<start_of_turn>' + role + '\\n' + message['content'] }}"
GLM = (
    """{% for tool in tools %}{% endfor %}<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>"""
    + THINKING
)
APRIEL = QWEN + "{{ '<tool_calls>[' }}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (QWEN, "hermes"),
        (HERMES_2, "hermes"),
        (QWEN_CODER, "qwen_coder"),
        (LLAMA, "llama3"),
        (MISTRAL_NEMO, "mistral_list"),
        (MISTRAL_SMALL, "mistral_id"),
        (DEVSTRAL, "mistral"),
        (DEEPSEEK_R1, "deepseek_r1"),
        (DEEPSEEK_V3_1, "deepseek"),
        (HARMONY, "harmony"),
        (GEMMA_4, "gemma4"),
    ],
)
def test_families_that_know_tools(source: str, name: str) -> None:
    found = recognise(source)
    assert found.name == name
    assert found.renders_tools


@pytest.mark.parametrize("source", [None, "", GEMMA_3, GLM, APRIEL, DEEPSEEK_DISTILL])
def test_others_get_a_syntax_and_are_told_of_it(source: str | None) -> None:
    found = recognise(source)
    assert found.name == "generic"
    assert not found.renders_tools


@pytest.mark.parametrize(
    ("source", "reasoning"),
    [
        (QWEN, None),
        (QWEN + THINKING, ("<think>", "</think>")),
        (GLM, ("<think>", "</think>")),
        (MAGISTRAL, ("[THINK]", "[/THINK]")),
        (GEMMA_4, ("<|channel>thought", "<channel|>")),
    ],
)
def test_tags_of_reasoning(source: str, reasoning: tuple[str, str] | None) -> None:
    assert recognise(source).reasoning == reasoning
