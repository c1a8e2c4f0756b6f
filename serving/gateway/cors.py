"""Lets the pages of listed sites use the server from a browser; all others stay out."""

from __future__ import annotations

from collections.abc import Collection

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from serving.gateway.bill import COST_HEADERS
from serving.gateway.dispatch import MODEL_HEADER, SERVED_AS_HEADER

_METHODS = ("DELETE", "GET", "PATCH", "POST", "PUT")
# What browsers keep from scripts unless they are told.
_EXPOSED = (
    *("x-request-id", "request-id", "retry-after", "x-should-retry", "x-rigserve-ignored"),
    *(MODEL_HEADER, SERVED_AS_HEADER, *COST_HEADERS),
    *(
        f"x-ratelimit-{name}-{what}"
        for what in ("requests", "tokens")
        for name in ("limit", "remaining", "reset")
    ),
    *(
        f"anthropic-ratelimit-{what}-{name}"
        for what in ("requests", "tokens")
        for name in ("limit", "remaining", "reset")
    ),
)
_PREFLIGHT_SECONDS = 600


def let_sites_in(app: FastAPI, origins: Collection[str]) -> None:
    """Answer browsers that ask whether a page of one of ``origins`` may do what it wants to.

    Pages send an API key themselves where one is needed: browsers are told to add no cookies.
    """
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=tuple(origins),
            allow_methods=_METHODS,
            allow_headers=("*",),
            expose_headers=_EXPOSED,
            max_age=_PREFLIGHT_SECONDS,
        )
