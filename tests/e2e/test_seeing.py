"""Given a model that sees images, what it is shown by each API, also in what its tools found."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from PIL import Image

from tests.processes import RigServer, write_config
from tests.tiny_models import TILE_TOKENS, with_smolvlm_tokens, write_smolvlm_projector

MODEL = "smollm2-135m"
QUESTION: Any = {"role": "user", "content": "What is on the map?"}
CALL: Any = {"name": "look", "arguments": "{}"}


@pytest.fixture(scope="module")
def seeing(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, model_path: Path
) -> Iterator[RigServer]:
    """A server whose model has a projector; ready."""
    folder = tmp_path_factory.mktemp("seeing")
    path = write_config(
        folder,
        cache_dir,
        source=str(with_smolvlm_tokens(model_path, folder / "model.gguf")),
        projector=str(write_smolvlm_projector(folder / "mmproj.gguf")),
        quantization=None,
    )
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def png() -> str:
    """An image, in base64."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((96, 96)).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def prompt_tokens_of_a_chat(rig: RigServer, *turns: Any) -> int:
    answer = rig.client.chat.completions.create(
        model=MODEL, messages=[QUESTION, *turns], max_tokens=2
    )
    assert answer.usage is not None
    return answer.usage.prompt_tokens


def called_and_shown(result: str, *parts: Any) -> tuple[Any, ...]:
    call = {"id": "call_1", "type": "function", "function": CALL}
    return (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
        {"role": "user", "content": list(parts)},
    )


def test_a_result_of_a_tool_in_anthropics_api(seeing: RigServer, png: str) -> None:
    source: Any = {"type": "base64", "media_type": "image/png", "data": png}
    blocks: Any = [{"type": "text", "text": "A map."}, {"type": "image", "source": source}]
    turns: Any = [
        QUESTION,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "call_1", "name": "look", "input": {}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": blocks}],
        },
    ]
    client = anthropic.Anthropic(base_url=seeing.base_url, api_key="unused", max_retries=0)
    usage = client.messages.create(model=MODEL, messages=turns, max_tokens=2).usage
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
    shown = prompt_tokens_of_a_chat(seeing, *called_and_shown("A map.", image))
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == shown
    assert shown > 5 * TILE_TOKENS


def test_an_output_of_a_function_in_the_responses_api(seeing: RigServer, png: str) -> None:
    url = f"data:image/png;base64,{png}"
    output: Any = [
        {"type": "input_text", "text": "A map."},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ]
    asked: Any = [
        QUESTION,
        {"type": "function_call", "call_id": "call_1", **CALL},
        {"type": "function_call_output", "call_id": "call_1", "output": output},
    ]
    first = seeing.client.responses.create(model=MODEL, input=asked, max_output_tokens=2)
    image = {"type": "image_url", "image_url": {"url": url}}
    shown = prompt_tokens_of_a_chat(seeing, *called_and_shown("A map.", image))
    assert first.usage is not None
    assert first.usage.input_tokens == shown
    # What is stored is shown again.
    items = seeing.client.responses.input_items.list(first.id, order="asc").data
    assert items[-1].to_dict()["output"] == output
    second = seeing.client.responses.create(
        model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=2
    )
    assert second.usage is not None
    assert second.usage.input_tokens > shown


def test_a_file_by_its_address_is_refused(seeing: RigServer) -> None:
    part: Any = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(openai.BadRequestError) as refused:
        prompt_tokens_of_a_chat(seeing, {"role": "user", "content": [part]})
    assert refused.value.param is not None
    assert "data URL" in refused.value.message
