"""The embedded model under a chat template that has it think first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.models.gguf import read_header

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>
{% if enable_thinking is false %}

</think>

{% endif %}"""

# The model has never seen such blocks: it closes them because the conversation shows how.
SHOWN: Any = [
    turn
    for question, answer in (("2+2?", "4"), ("3+3?", "6"), ("1+1?", "2"))
    for turn in (
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"It is {answer}.", "reasoning_content": "I add them."},
    )
] + [{"role": "user", "content": "5+5?"}]


def with_template(model: Path, template: str, copy: Path) -> Path:
    """A copy of a GGUF file with another chat template, which must not be longer."""
    old = (read_header(model).text("tokenizer.chat_template") or "").encode()
    comment = "{#" + "#" * (len(old) - len(template.encode()) - 4) + "#}"
    data = model.read_bytes()
    assert data.count(old) == 1
    copy.write_bytes(data.replace(old, (template + comment).encode()))
    assert read_header(copy).text("tokenizer.chat_template") == template + comment
    return copy
