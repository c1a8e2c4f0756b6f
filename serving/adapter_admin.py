"""Adds and removes LoRA adapters while the server runs, and remembers them for its next start."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from serving.adapters.added import AddedAdapter
from serving.adapters.store import AdapterStore
from serving.config import AdapterConfig
from serving.engines.adapters import AdapterError, AdapterRefused
from serving.engines.launch import AdapterFile
from serving.engines.supervisor import Engine, EngineStartError
from serving.gateway.fleet import Traffic
from serving.gateway.intake import Gateway
from serving.gateway.routing import Route, adapters_of, own_name_of
from serving.models.checksums import digest_of
from serving.models.sources import ModelError
from serving.protocol.adapters import NewAdapter
from serving.protocol.errors import ApiError
from serving.reload import Reloader, ReloadError

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


def usable(
    added: Iterable[AddedAdapter], cache_dir: Path
) -> tuple[list[AddedAdapter], dict[str, tuple[AddedAdapter, str]]]:
    """Those that can be served as they were added, and the others by name, with the reason; reads their files."""
    good: list[AddedAdapter] = []
    bad: dict[str, tuple[AddedAdapter, str]] = {}
    for each in added:
        fault = each.fault(cache_dir)
        if fault is None:
            good.append(each)
        else:
            bad[each.name] = each, fault
            _log.error("the adapter '%s' is not served: %s", each.name, fault)
    return good, bad


class AdapterAdmin:
    """What the admin API asks for. Its answers are ``rigserve.adapter`` objects."""

    def __init__(
        self,
        store: AdapterStore,
        unusable: Mapping[str, tuple[AddedAdapter, str]],
        reloader: Reloader,
        gateway: Gateway,
        traffic: Traffic,
        cache_dir: Path,
    ) -> None:
        """``unusable`` are those of the store that the reloader does not have."""
        self._store = store
        self._unusable = dict(unusable)
        self._reloader = reloader
        self._gateway = gateway
        self._traffic = traffic
        self._cache_dir = cache_dir
        self._lock = asyncio.Lock()

    async def add(self, asked: NewAdapter) -> dict[str, Any]:
        """Serve an adapter from now on. Its file is read, checked, and converted if need be, before anything changes.

        Raises :class:`ApiError`: 404 for an unknown model, 409 for a name that is taken, 400 for a file that does
        not fit, 502 if the engine fails.
        """
        async with self._lock:
            engine = self._base(asked.model)
            self._check_name(asked, engine)
            try:
                await engine.prepare()
            except ModelError as error:
                raise ApiError(502, str(error), code="engine_start_failed") from error
            digest = await self._digest(asked)
            adapter = AdapterConfig(
                name=asked.name, path=asked.path, scale=asked.scale, sha256=digest
            )
            new = AddedAdapter(engine.model.name, adapter, time.time())
            before = self._reloader.added
            await self._serve([*(each for each in before if each.name != new.name), new])
            await self._remember(lambda: self._store.put(new), before)
            self._unusable.pop(new.name, None)
            _log.info("adapter %s of %s added: %s", new.name, new.model, asked.path)
            return self._one(new.name)

    async def remove(self, name: str) -> dict[str, Any]:
        """Serve an added adapter no more; one with requests in flight leaves its engine with the last of them.

        Raises :class:`ApiError`: 404 if there is none, 409 if it is the config's.
        """
        async with self._lock:
            before = self._reloader.added
            if name not in self._unusable and name not in {each.name for each in before}:
                raise self._not_added(name)
            told = self._one(name)
            await self._serve([each for each in before if each.name != name])
            await self._remember(lambda: self._store.remove(name), before)
            self._unusable.pop(name, None)
            _log.info("adapter %s removed", name)
            return {**told, "state": "leaving" if told["in_flight"] else "removed"}

    def listed(self) -> list[dict[str, Any]]:
        """All adapters, of the config and added, those that leave and those that are not served included."""
        told = []
        added = {each.name: each for each in self._reloader.added}
        left_out = self._reloader.left_out
        for engine in self._gateway.router.engines:
            files = engine.files.adapters if engine.files else {}
            for adapter in engine.model.adapters:
                ours = added.get(adapter.name) if adapter.name not in left_out else None
                told.append(self._told(engine, adapter, files.get(adapter.name), ours))
            told += [
                self._told_of_leaving(engine, name, each)
                for name, each in engine.live_adapters.items()
                if name not in files
            ]
        told += [_told_of_left_out(added[name], reason) for name, reason in left_out.items()]
        told += [_told_of_left_out(each, reason) for each, reason in self._unusable.values()]
        return told

    def _base(self, name: str) -> Engine:
        found = self._gateway.router.find(name)
        if isinstance(found, Route) or not isinstance(found, Engine):
            raise ApiError(
                409,
                f"'{name}' has no engine of its own on this machine; name a model that has one.",
                param="model",
                code="no_engine",
            )
        if own_name_of(found, name) in adapters_of(found):
            raise ApiError(
                409,
                f"'{name}' is an adapter itself; its base is '{found.model.name}'.",
                param="model",
                code="no_base",
            )
        return found

    def _check_name(self, asked: NewAdapter, engine: Engine) -> None:
        if asked.name not in self._gateway.router.names:
            return
        added = {each.name: each for each in self._reloader.added}
        ours = added.get(asked.name) if asked.name not in self._reloader.left_out else None
        if ours is None:
            mend = "it is the config's; choose another, or change it there"
        elif ours.model != engine.model.name:
            mend = f"it is an adapter of '{ours.model}'; choose another, or remove that one first"
        elif not asked.replace:
            mend = "choose another, or take its place with replace (--replace)"
        else:
            return
        raise ApiError(
            409, f"The name '{asked.name}' is taken: {mend}.", param="name", code="name_taken"
        )

    async def _digest(self, asked: NewAdapter) -> str:
        path = Path(asked.path)
        try:
            digest = await asyncio.to_thread(digest_of, path, self._cache_dir)
        except OSError as error:
            raise ApiError(
                400,
                f"The adapter '{asked.name}' ({path}) cannot be read: {error.strerror}.",
                param="path",
                code="bad_adapter",
            ) from error
        if asked.sha256 not in (None, digest):
            raise ApiError(
                400,
                f"The SHA-256 of {path} is {digest}, and not {asked.sha256}; fetch it again.",
                param="sha256",
                code="bad_adapter",
            )
        return digest

    async def _serve(self, added: Sequence[AddedAdapter]) -> None:
        try:
            await self._reloader.serve_added(added)
        except (ModelError, AdapterRefused) as error:
            raise ApiError(400, f"{error}.", param="path", code="bad_adapter") from error
        except (AdapterError, EngineStartError, ReloadError) as error:
            raise ApiError(502, f"{error}; nothing has changed.", code="engine_failed") from error

    async def _remember(self, work: Callable[[], object], before: Sequence[AddedAdapter]) -> None:
        """Have it in the store, too; if that cannot be written, all is as ``before``."""
        try:
            await asyncio.to_thread(work)
        except ApiError:
            await self._serve(before)
            raise

    def _not_added(self, name: str) -> ApiError:
        if any(name in adapters_of(engine) for engine in self._gateway.router.engines):
            return ApiError(
                409,
                f"The adapter '{name}' is the config's; take it out there.",
                code="adapter_of_config",
            )
        there = ", ".join(each.name for each in self._reloader.added) or "none"
        return ApiError(
            404,
            f"There is no adapter '{name[:200]}' that was added; there are: {there}.",
            code="not_found",
        )

    def _one(self, name: str) -> dict[str, Any]:
        return next(each for each in self.listed() if each["id"] == name)

    def _told(
        self,
        engine: Engine,
        adapter: AdapterConfig,
        file: AdapterFile | None,
        added: AddedAdapter | None,
    ) -> dict[str, Any]:
        is_there = file is not None and engine.live_adapters.get(adapter.name) == file
        return {
            "id": adapter.name,
            "object": "rigserve.adapter",
            "parent": engine.model.name,
            "path": adapter.path,
            "scale": adapter.scale,
            "sha256": file.digest if file else adapter.sha256,
            "source": "config" if added is None else "added",
            "added_at": added and added.added_at,
            "state": "ready" if is_there and engine.endpoint else engine.state.value,
            "in_flight": self._traffic.requests_with(engine, adapter.name),
            "reason": None,
        }

    def _told_of_leaving(self, engine: Engine, name: str, file: AdapterFile) -> dict[str, Any]:
        adapter = AdapterConfig(name=name, path=str(file.path), scale=file.scale)
        return {**self._told(engine, adapter, file, None), "source": None, "state": "leaving"}


def _told_of_left_out(added: AddedAdapter, reason: str) -> dict[str, Any]:
    adapter = added.adapter
    return {
        "id": adapter.name,
        "object": "rigserve.adapter",
        "parent": added.model,
        "path": adapter.path,
        "scale": adapter.scale,
        "sha256": adapter.sha256,
        "source": "added",
        "added_at": added.added_at,
        "state": "not served",
        "in_flight": 0,
        "reason": reason,
    }
