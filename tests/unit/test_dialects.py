"""Only what OpenAI's API knows is sent to a server that speaks it; the rest is refused by name."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from openai.types import CompletionCreateParams, EmbeddingCreateParams
from openai.types.chat import completion_create_params

from serving.config import RemoteModel
from serving.gateway.dialects import OPENAI_FIELDS, only_openai
from serving.protocol.embeddings import EmbeddingRequest, TokenizeRequest
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest

FAR = RemoteModel(name="far", engine="remote", base_url="http://far.example/v1")
HELLO: Any = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.of({"model": "m", "messages": HELLO, **fields})


def test_they_are_openais_own_fields() -> None:
    base = completion_create_params.CompletionCreateParamsStreaming
    assert set(get_type_hints(base)) >= OPENAI_FIELDS[ChatCompletionRequest]
    assert set(get_type_hints(EmbeddingCreateParams)) >= OPENAI_FIELDS[EmbeddingRequest]
    streaming, whole = CompletionCreateParams.__args__  # type: ignore[attr-defined]
    both = set(get_type_hints(streaming)) | set(get_type_hints(whole))
    assert both >= OPENAI_FIELDS[CompletionRequest]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 5},
        {"min_p": 0.1},
        {"ignore_eos": True},
        {"guided_regex": "a+"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_ours_are_refused_by_name_or_left_out(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ApiError, match=f"'{name}' is not supported: the model 'far'") as refused:
        only_openai(FAR, chat(**fields), lenient=False)
    assert (refused.value.status, refused.value.param) == (400, name)
    asked, dropped = only_openai(FAR, chat(temperature=0.5, **fields), lenient=True)
    assert dropped == [name]
    assert (getattr(asked, name), asked.temperature) == (None, 0.5)


def test_reasoning_in_a_message_is_ours_too() -> None:
    thought = {"role": "assistant", "reasoning_content": "hm"}
    asked = chat(messages=[*HELLO, thought, *HELLO])
    with pytest.raises(ApiError, match="reasoning_content"):
        only_openai(FAR, asked, lenient=False)
    left, dropped = only_openai(FAR, asked, lenient=True)
    assert dropped == ["messages[].reasoning_content"]
    assert left.messages[1].model_dump(exclude_none=True) == {"role": "assistant", "content": ""}


def test_what_openai_knows_passes_untouched() -> None:
    asked = chat(temperature=0, max_completion_tokens=5, n=2, logprobs=True, top_logprobs=2, seed=1)
    assert only_openai(FAR, asked, lenient=False) == (asked, [])


def test_other_endpoints_are_refused() -> None:
    asked = TokenizeRequest.of({"model": "m", "prompt": "x"})
    with pytest.raises(ApiError, match="has no /tokenize"):
        only_openai(FAR, asked, lenient=True)
