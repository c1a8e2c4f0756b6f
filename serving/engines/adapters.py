"""LoRA adapters: their files made ready, and how a running engine loads and drops them, by the calls that vLLM named."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import orjson

from serving.config import AdapterConfig
from serving.engines.launch import AdapterFile, AdapterRoom
from serving.models.checksums import digest_of, verify
from serving.models.sources import ModelError

# Reading and checking a large file on a slow disk takes its time.
_TIMEOUT = aiohttp.ClientTimeout(total=120.0)


class AdapterError(Exception):
    """An engine did not load or drop an adapter; the message says why."""


def adapter_file(
    adapter: AdapterConfig, cache_dir: Path, prepare: Callable[[Path], Path]
) -> AdapterFile:
    """An adapter of the config, compared with its checksum, and made by ``prepare`` into what its engine reads.

    May take long. Raises :class:`ModelError`.
    """
    path = Path(adapter.path)
    try:
        verify(path, adapter.sha256, cache_dir, "sha256")
        return AdapterFile(prepare(path), adapter.scale, digest_of(path, cache_dir))
    except (ModelError, OSError) as error:
        raise ModelError(f"the adapter '{adapter.name}': {error}") from error


class AdapterRefused(AdapterError):
    """The engine has looked at an adapter, and does not take it."""


class AdapterCalls:
    """Tells one engine process which adapters to have."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, api_key: str) -> None:
        self._session = session
        self._base_url = base_url
        self._headers = {"authorization": f"Bearer {api_key}"}

    async def load(self, name: str, adapter: AdapterFile) -> None:
        """Serve an adapter, in place of another of that name. Raises :class:`AdapterError`; then nothing has changed.

        It is an :class:`AdapterRefused` if the engine says why.
        """
        body: dict[str, Any] = {
            "lora_name": name,
            "lora_path": str(adapter.path),
            "load_inplace": True,
        }
        if adapter.scale != 1:
            body["scale"] = adapter.scale
        await self._post("/v1/load_lora_adapter", body)

    async def unload(self, name: str) -> None:
        """Take no more requests for an adapter; those under way go on. Raises :class:`AdapterError`."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def _post(self, path: str, body: Mapping[str, Any]) -> None:
        try:
            async with self._session.post(
                f"{self._base_url}{path}", json=body, headers=self._headers, timeout=_TIMEOUT
            ) as answer:
                payload = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise AdapterError(f"the engine did not answer: {error!r}") from error
        if answer.status != 200:
            raise AdapterRefused(_message(payload) or f"the engine says {answer.status}")


@dataclass(frozen=True, slots=True)
class Replaced:
    """An adapter whose place another has taken, and which is still loaded for those that began with it.

    That is what was let through to the engine before ``at`` (``time.monotonic()``); ``called`` is the engine's name for it.
    """

    name: str
    called: str
    at: float


class LiveAdapters:
    """The adapters that one engine process has. Without ``room`` they are those it was launched with, for good."""

    def __init__(
        self,
        adapters: Mapping[str, AdapterFile] = MappingProxyType({}),
        room: AdapterRoom | None = None,
        calls: AdapterCalls | None = None,
    ) -> None:
        self._adapters = dict(adapters)
        self._replaced: dict[str, Replaced] = {}
        self._room = room
        self._calls = calls

    def has_room_for(self, adapters: Sequence[AdapterConfig]) -> bool:
        """Whether the process can have these, too; raises :class:`ModelError` for what cannot be read."""
        room = self._room
        if room is None:
            return True
        loaded = len(self._adapters) + len(self._replaced)
        is_full = room.most is not None and loaded + len(adapters) > room.most
        return not is_full and all(map(room.fits, adapters))

    async def load(self, adapters: Mapping[str, AdapterFile]) -> None:
        """Serve these, in place of others of their names; what there is beside them stays.

        Raises :class:`AdapterError`; then there is what there was.
        """
        before = dict(self._adapters)
        changed = [name for name, each in adapters.items() if before.get(name) != each]
        try:
            for name in changed:
                await self._load(name, adapters[name])
        except BaseException:
            for name in changed:
                # The engine may be what has failed: then another starts with what there was.
                with contextlib.suppress(AdapterError):
                    if name not in before and name in self._adapters:
                        await self.drop(name)
                    elif self._adapters.get(name) != before.get(name):
                        await self._load(name, before[name])
            raise

    def get(self, name: str) -> AdapterFile | None:
        """The one of that name; None if there is none."""
        return self._adapters.get(name)

    def called(self, name: str) -> str | None:
        """What the engine calls the one of that name now; None if there is none."""
        adapter = self._adapters.get(name)
        return None if adapter is None else self._called(name, adapter)

    def items(self) -> list[tuple[str, AdapterFile]]:
        """All, by name."""
        return list(self._adapters.items())

    def beside(self, adapters: Mapping[str, AdapterFile]) -> list[str]:
        """The names of those that are not among these."""
        return [name for name in self._adapters if name not in adapters]

    @property
    def replaced(self) -> list[Replaced]:
        """Those that others have taken the place of."""
        return list(self._replaced.values())

    async def drop(self, name: str) -> None:
        """Take no more requests for an adapter; those under way go on. Raises :class:`AdapterError`."""
        await self._asked().unload(self._called(name, self._adapters[name]))
        del self._adapters[name]

    async def let_go(self, replaced: Replaced) -> None:
        """Free what nobody uses any more. Raises :class:`AdapterError`."""
        await self._asked().unload(replaced.called)
        del self._replaced[replaced.called]

    async def _load(self, name: str, adapter: AdapterFile) -> None:
        calls, called, was = self._asked(), self._called(name, adapter), self.called(name)
        if called not in self._replaced:
            self._check_room(is_more=called != was)
            await calls.load(called, adapter)
        self._replaced.pop(called, None)
        self._adapters[name] = adapter
        if was is not None and was != called:
            self._replaced[was] = Replaced(name, was, time.monotonic())

    def _check_room(self, *, is_more: bool) -> None:
        most = self._room.most if self._room else None
        if most is not None and is_more and len(self._adapters) + len(self._replaced) >= most:
            raise AdapterError(
                f"the engine has room for {most} adapters at a time, those included that leave with their last requests"
            )

    def _called(self, name: str, adapter: AdapterFile) -> str:
        return self._room.called(name, adapter) if self._room else name

    def _asked(self) -> AdapterCalls:
        if self._room is None or self._calls is None:
            raise AdapterError("the engine takes adapters at its start only")
        return self._calls


def _message(payload: bytes) -> str:
    """What an error in OpenAI's form says; empty for what is none."""
    try:
        error = orjson.loads(payload).get("error")
        return str(error["message"])
    except (orjson.JSONDecodeError, AttributeError, LookupError, TypeError):
        return ""
