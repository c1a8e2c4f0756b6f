"""Requests for embeddings, reranking and tokens: what is accepted, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.protocol.embeddings import (
    MAX_INPUTS,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
    rerank_json,
)
from serving.protocol.errors import ApiError
from serving.protocol.requests import ModelRequest
from serving.protocol.responses import Timings

NO_TIME = Timings(0, 0, 0, 0, 0)


def parse(kind: type[ModelRequest], **fields: Any) -> Any:
    return kind.parse(json.dumps({"model": "m", **fields}).encode())


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("sea", ["sea"]),
        (["sea", "sky"], ["sea", "sky"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_inputs_come_in_four_shapes(given: Any, inputs: Any) -> None:
    assert parse(EmbeddingRequest, input=given).inputs == inputs


@pytest.mark.parametrize(
    ("kind", "fields", "param", "words"),
    [
        (EmbeddingRequest, {}, "input", "required"),
        (EmbeddingRequest, {"input": ""}, "input", "empty"),
        (EmbeddingRequest, {"input": []}, "input", "empty"),
        (EmbeddingRequest, {"input": ["a", ""]}, "input", "input 1 is empty"),
        (EmbeddingRequest, {"input": [[1], []]}, "input", "input 1 is empty"),
        (EmbeddingRequest, {"input": ["a"] * (MAX_INPUTS + 1)}, "input", "at most 2048"),
        (EmbeddingRequest, {"input": "a", "dimensions": 0}, "dimensions", "greater than"),
        (EmbeddingRequest, {"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        (EmbeddingRequest, {"input": "a", "stream": True}, "stream", "Unknown parameter"),
        (RerankRequest, {"query": "", "documents": ["a"]}, "query", "at least 1"),
        (RerankRequest, {"query": "a", "documents": []}, "documents", "at least 1"),
        (RerankRequest, {"query": "a", "documents": ["a"], "top_n": 0}, "top_n", "greater than"),
        (RerankRequest, {"query": "a", "documents": [1]}, "documents[0]", "string"),
        (TokenizeRequest, {}, "prompt", "'prompt' or 'messages'"),
        (TokenizeRequest, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt", "both"),
        (TokenizeRequest, {"prompt": "a", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "goes with"),
        (DetokenizeRequest, {"tokens": "a"}, "tokens", "list"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(
    kind: type[ModelRequest], fields: Any, param: str | None, words: str
) -> None:
    with pytest.raises(ApiError, match=words) as refusal:
        parse(kind, **fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)


def test_as_many_inputs_as_openai_allows() -> None:
    assert len(parse(EmbeddingRequest, input=["a"] * MAX_INPUTS).inputs) == MAX_INPUTS
    # A long text as tokens is one input.
    assert len(parse(EmbeddingRequest, input=[1] * (MAX_INPUTS + 1)).inputs) == 1


def test_results_of_reranking_are_sorted_and_cut() -> None:
    request = parse(
        RerankRequest, query="q", documents=["a", "b", "c", "d"], top_n=3, return_documents=True
    )
    answer = rerank_json(request, "m", [0.1, 0.9, 0.5, 0.5], prompt_tokens=7, timings=NO_TIME)
    assert [
        (r["index"], r["relevance_score"], r["document"]["text"]) for r in answer["results"]
    ] == [
        (1, 0.9, "b"),
        (2, 0.5, "c"),
        (3, 0.5, "d"),
    ]
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
