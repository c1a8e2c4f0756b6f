"""Speaks to a running server's admin API."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

from serving.protocol.errors import ApiError

KEY_VARIABLE = "RIGSERVE_API_KEY"


def ask(
    server: str,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    accept: tuple[int, ...] = (200,),
) -> Any:
    """What the server answers, as JSON; raises :class:`ApiError` for other statuses and for no answer.

    The key, if one is needed, comes from the environment: a command line can be read by every user.
    """
    return asyncio.run(_ask(server, method, path, body, accept))


async def _ask(
    server: str,
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    accept: tuple[int, ...],
) -> Any:
    key = os.environ.get(KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    # A model that is fetched first takes its time to load.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.request(method, server.rstrip("/") + path, json=body) as answer,
        ):
            payload = await answer.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ApiError(503, f"{server} does not answer: {error}; is the server running?") from error
    try:
        told = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise ApiError(502, f"{server} is no rigserve: {payload[:100]!r}") from error
    if answer.status not in accept:
        raise ApiError(answer.status, _message(told, answer.status) + _hint(answer.status))
    return told


def _message(told: Any, status: int) -> str:
    error = told.get("error") if isinstance(told, dict) else None
    return str(error["message"]) if isinstance(error, dict) else f"the server says {status}"


def _hint(status: int) -> str:
    return f" (The key is taken from {KEY_VARIABLE}.)" if status == 401 else ""
