"""What models are asked for in the words that engines understand: OpenAI's, Jina's and vLLM's."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serving.gateway.caller import Caller
from serving.gateway.intake import Gateway, body_schema
from serving.protocol.embeddings import (
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
)
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest, ModelRequest


def routes(gateway: Gateway) -> APIRouter:
    """Completions, embeddings, reranking and tokenization."""
    router = APIRouter()

    async def complete(http: Request, kind: type[ModelRequest]) -> Response:
        destination, asked = await gateway.take(http, kind.of)
        return await gateway.dispatcher.forward(Caller.of(http), destination, asked)

    async def ask(http: Request, kind: type[ModelRequest]) -> Response:
        destination, asked = await gateway.take(http, kind.of)
        return await gateway.dispatcher.ask(Caller.of(http), destination, asked)

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatCompletionRequest))
    async def chat_completions(http: Request) -> Response:
        """Answer a conversation."""
        return await complete(http, ChatCompletionRequest)

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(http: Request) -> Response:
        """Continue a text."""
        return await complete(http, CompletionRequest)

    @router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingRequest))
    async def embeddings(http: Request) -> Response:
        """Turn texts into vectors."""
        return await complete(http, EmbeddingRequest)

    @router.post("/v1/rerank", openapi_extra=body_schema(RerankRequest))
    async def rerank(http: Request) -> Response:
        """Order documents by what they have to do with a query."""
        return await complete(http, RerankRequest)

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest))
    async def tokenize(http: Request) -> Response:
        """Tell the tokens of a text or a conversation."""
        return await ask(http, TokenizeRequest)

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
    async def detokenize(http: Request) -> Response:
        """Tell the text of tokens."""
        return await ask(http, DetokenizeRequest)

    return router
