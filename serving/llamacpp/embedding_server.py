"""The HTTP face of embedding models and rerankers."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.llamacpp.app import application, json_response
from serving.llamacpp.embedder import Embedder, Job, base64_of, normalised, relevance
from serving.protocol.embeddings import (
    EmbeddingRequest,
    RerankRequest,
    embeddings_json,
    rerank_json,
)
from serving.protocol.responses import model_json, new_id
from serving.protocol.sse import while_connected


def create_embedding_app(embedder: Embedder, api_key: str | None) -> Starlette:
    """The ASGI application; with an ``api_key`` every path asks for it."""
    server = _EmbeddingServer(embedder)
    if embedder.is_reranker:
        kind, task = "a reranker", Route("/v1/rerank", server.rerank, methods=["POST"])
    else:
        kind, task = "an embedding model", Route("/v1/embeddings", server.embed, methods=["POST"])
    return application(
        [
            Route("/health", server.health, methods=["GET"]),
            Route("/v1/models", server.models, methods=["GET"]),
            task,
            Route("/internal/load", server.load, methods=["GET"]),
            Route("/internal/cancel/{request_id}", server.cancel, methods=["POST"]),
        ],
        model=embedder.options.served_name,
        kind=kind,
        tokenization=embedder.tokenization,
        api_key=api_key,
    )


class _EmbeddingServer:
    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._model = embedder.options.served_name
        self._jobs: dict[str, Job] = {}

    async def health(self, _request: Request) -> Response:
        return Response(status_code=200 if self._embedder.alive else 500)

    async def models(self, _request: Request) -> Response:
        return json_response({"object": "list", "data": [model_json(self._model, 0)]})

    async def load(self, _request: Request) -> Response:
        return json_response(self._embedder.load())

    async def cancel(self, request: Request) -> Response:
        """End a request early; its answer then holds what was computed so far."""
        job = self._jobs.get(request.path_params["request_id"])
        if job is not None:
            self._embedder.cancel(job)
        return Response(status_code=204)

    async def embed(self, http: Request) -> Response:
        request = EmbeddingRequest.parse(await http.body())
        self._embedder.check_dimensions(request.dimensions)
        job = await self._embedder.embed(request)
        await self._finish(http, job)

        as_base64 = request.encoding_format == "base64"

        def answer() -> Response:
            vectors = [normalised(vector, request.dimensions) for vector in job.vectors]
            return json_response(
                embeddings_json(
                    self._model,
                    map(base64_of, vectors) if as_base64 else vectors,
                    prompt_tokens=job.prompt_tokens,
                    timings=job.timings(),
                )
            )

        # Thousands of vectors take a while to write down.
        return await asyncio.to_thread(answer)

    async def rerank(self, http: Request) -> Response:
        request = RerankRequest.parse(await http.body())
        job = await self._embedder.rerank(request)
        await self._finish(http, job)
        return json_response(
            rerank_json(
                request,
                self._model,
                [relevance(vector) for vector in job.vectors],
                prompt_tokens=job.prompt_tokens,
                timings=job.timings(),
            )
        )

    async def _finish(self, http: Request, job: Job) -> None:
        request_id = http.headers.get("x-request-id") or new_id("req")
        self._jobs[request_id] = job
        try:
            await while_connected(http.receive, self._embedder.finish(job))
        finally:
            self._jobs.pop(request_id, None)
