"""Which of vLLM's parsers read a model's tool calls and reasoning: told by its chat template, then by its type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What a template has that writes calls in this way, and the parser of it; the first that fits counts.
_TOOLS_BY_TEMPLATE: Sequence[tuple[str, str]] = (
    ("<function=", "qwen3_coder"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<arg_key>", "glm45"),
    ("<seed:tool_call>", "seed_oss"),
    ("<function_calls>", "olmo3"),
    ("<|tool_call_start|>", "lfm2"),
)
_TOOLS_BY_TYPE = {
    "gpt_oss": "openai",
    "llama4": "llama4_pythonic",
    "granite": "granite",
    "granitemoehybrid": "granite4",
    "phi3": "phi4_mini_json",
    "gemma4": "gemma4",
    "jamba": "jamba",
    "internlm2": "internlm",
    "ernie4_5_moe": "ernie45",
    "hunyuan_v1_moe": "hunyuan_a13b",
}
# Qwen, Hermes, SmolLM3 and many fine-tunes.
_HERMES_MARK, _HERMES = "<tool_call>", "hermes"
_REASONING_BY_TYPE = {
    "gpt_oss": "openai_gptoss",
    "deepseek_v3": "deepseek_r1",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3",
    "glm4_moe": "glm45",
    "kimi_k2": "kimi_k2",
    "minimax_m2": "minimax_m2",
    "seed_oss": "seed_oss",
    "olmo3": "olmo3",
    "granite": "granite",
    "hunyuan_v1_moe": "hunyuan_a13b",
    "ernie4_5_moe": "ernie45",
    "gemma4": "gemma4",
}
_THINKS_BY_TYPE = {"gpt_oss", "gemma4"}
_THINKING_MARK, _THINKING = "<think>", "deepseek_r1"


@dataclass(frozen=True, slots=True)
class Parsers:
    """vLLM's names of a model's parsers; None where there is nothing to read."""

    tools: str | None
    reasoning: str | None


def parsers_of(model_type: str, template: str) -> Parsers:
    """What suits a model of this ``model_type`` (of its config.json) with this chat template."""
    return Parsers(_tools(model_type, template), _reasoning(model_type, template))


def _tools(model_type: str, template: str) -> str | None:
    if model_type in _TOOLS_BY_TYPE and "tools" in template:
        return _TOOLS_BY_TYPE[model_type]
    for mark, parser in _TOOLS_BY_TEMPLATE:
        if mark in template:
            return parser
    return _HERMES if _HERMES_MARK in template else None


def _reasoning(model_type: str, template: str) -> str | None:
    if _THINKING_MARK not in template and model_type not in _THINKS_BY_TYPE:
        return None
    return _REASONING_BY_TYPE.get(model_type, _THINKING)
