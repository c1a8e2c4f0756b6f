"""Parts of files that are elsewhere, by HTTP ranges."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp

from serving.models.gguf import GgufError, Header, HeaderCut, parse_header

# Of a GGUF header the vocabulary takes most, some megabytes of it.
_FIRST_BYTES, _MOST_BYTES = 2**21, 2**28
_TIMEOUT_SECONDS = 30.0


class RemoteError(Exception):
    """A part of a file cannot be had; the message says why."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file at an address. ``headers`` are sent to that host; an authorization to no other that it redirects to."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def begin(self, length: int) -> tuple[bytes, int]:
        """The first ``length`` bytes, or all there are, and the size of the file; raises :class:`RemoteError`."""
        try:
            return asyncio.run(self._begin(length))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RemoteError(f"it cannot be read: {error or type(error).__name__}") from error

    async def _begin(self, length: int) -> tuple[bytes, int]:
        headers = {**self.headers, "Range": f"bytes=0-{length - 1}"}
        timeout = aiohttp.ClientTimeout(
            total=None, connect=_TIMEOUT_SECONDS, sock_read=_TIMEOUT_SECONDS
        )
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers, trust_env=True) as session,
            session.get(self.url) as answer,
        ):
            if answer.status >= 400:
                raise RemoteError(f"its server answers {answer.status} {answer.reason}")
            beginning = b""
            # A server that does not know ranges sends all of it: no more is read than was asked for.
            async for chunk in answer.content.iter_any():
                beginning += chunk
                if len(beginning) >= length:
                    break
            return beginning[:length], _whole_size(answer)


def read_remote_header(file: RemoteFile) -> tuple[Header, int]:
    """The header of a GGUF file, and its size; raises :class:`RemoteError` and :class:`GgufError`."""
    length = _FIRST_BYTES
    while True:
        beginning, size_bytes = file.begin(length)
        try:
            return parse_header(beginning, size_bytes), size_bytes
        except HeaderCut:
            if len(beginning) < length:
                raise RemoteError(f"it broke off after {len(beginning)} bytes") from None
            if length >= _MOST_BYTES:
                raise GgufError(f"its header is longer than {_MOST_BYTES} bytes") from None
        length *= 4


def _whole_size(answer: aiohttp.ClientResponse) -> int:
    _, _, total = answer.headers.get("Content-Range", "").partition("/")
    size = total or answer.headers.get("Content-Length", "")
    if not size.isdecimal():
        raise RemoteError("its server does not say how big it is")
    return int(size)
