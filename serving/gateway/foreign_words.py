"""What several kinds of engines that are not ours have in common, in what they are asked and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.protocol.embeddings import RerankRequest, TokenizeRequest
from serving.protocol.requests import ImagePart, ModelRequest


def image_urls(asked: ModelRequest) -> list[str]:
    """The addresses of all images of a conversation."""
    return [
        part.image_url.url
        for message in getattr(asked, "messages", None) or ()
        if isinstance(message.content, list)
        for part in message.content
        if isinstance(part, ImagePart)
    ]


def impossible_images(asked: ModelRequest) -> tuple[str, str] | None:
    """Which field has images that cannot be taken, and why."""
    urls = image_urls(asked)
    if urls and isinstance(asked, TokenizeRequest):
        return "messages", "only text can be tokenized"
    # The engine would fetch an image from wherever its address says, also from within this network.
    if any(not url.startswith("data:image/") or ";base64," not in url for url in urls):
        return "messages", "images must be data URLs, in base64"
    return None


def rerank_result(asked: RerankRequest, told: Mapping[str, Any]) -> dict[str, Any]:
    """One document's score, with the document if that was asked for."""
    result: dict[str, Any] = {
        "index": told["index"],
        "relevance_score": told["relevance_score"],
    }
    if asked.return_documents:
        result["document"] = {"text": asked.documents[told["index"]]}
    return result
