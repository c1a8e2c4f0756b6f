"""LoRA adapters beside one base model: which are loaded, under which names, and who still uses them."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from serving.llamacpp.runtime import Context, Model, RuntimeFault
from serving.llamacpp.runtime.adapters import LoraAdapter, use_adapter
from serving.models.adapters import UnfitAdapter, check_adapter
from serving.protocol.errors import ApiError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A file to serve as a model of its own, and how strongly it counts."""

    name: str
    path: Path
    scale: float = 1.0

    @staticmethod
    def parse(text: str) -> AdapterFile:
        """``NAME=PATH[:SCALE]``; a colon that no number follows is the path's."""
        name, _, file = text.partition("=")
        path, _, scale = file.rpartition(":")
        try:
            return AdapterFile(name, Path(path), float(scale))
        except ValueError:
            return AdapterFile(name, Path(file))


class Adapters:
    """The adapters of one model. Its methods belong to the event loop."""

    def __init__(
        self,
        model: Model,
        context: Context,
        *,
        model_path: Path,
        served_name: str,
        between_steps: Callable[[Callable[[], None]], None],
    ) -> None:
        """``served_name`` is the base model's own; ``between_steps`` is the scheduler's."""
        self._model = model
        self._context = context
        self._model_path = model_path
        self._served_name = served_name
        self._between_steps = between_steps
        self._by_name: dict[str, LoraAdapter] = {}
        self._loading: set[str] = set()
        self._sequences = Counter[LoraAdapter]()

    @property
    def names(self) -> list[str]:
        """The adapters that are served."""
        return list(self._by_name)

    def find(self, model: str) -> LoraAdapter | None:
        """The adapter of that name, None for the base model; raises :class:`ApiError` (404)."""
        if model == self._served_name:
            return None
        if model in self._by_name:
            return self._by_name[model]
        served = ", ".join([self._served_name, *self._by_name])
        raise ApiError(
            404,
            f"The model '{model}' does not exist; served: {served}.",
            param="model",
            code="model_not_found",
        )

    async def add(self, file: AdapterFile, *, replace: bool = False) -> None:
        """Load an adapter and serve it under its name; ``replace`` lets it take the place of another.

        Sequences under way with that one go on with it to their ends. Raises :class:`ApiError`: 409 when the name
        is taken, 400 when the file does not fit.
        """
        name = file.name
        is_taken = name == self._served_name or name in self._loading
        if is_taken or (name in self._by_name and not replace):
            raise ApiError(
                409,
                f"The name '{name}' is taken; choose another, or unload that adapter first.",
                param="lora_name",
                code="name_taken",
            )
        self._loading.add(name)
        try:
            # The check also brings the file into memory: the load, between two decodes, is a copy.
            await asyncio.to_thread(check_adapter, file.path, self._model_path)
            loaded = await self._load(file)
            replaced = self._by_name.get(name)
            self._by_name[name] = loaded
            if replaced is not None:
                self._free_if_unused(replaced)
        except (UnfitAdapter, RuntimeFault) as fault:
            raise ApiError(
                400,
                f"The adapter '{name}' ({file.path}) cannot be used: {fault}.",
                param="lora_path",
                code="bad_adapter",
            ) from fault
        finally:
            self._loading.discard(name)
        _log.info("adapter %s loaded from %s at scale %g", name, file.path, file.scale)

    async def _load(self, file: AdapterFile) -> LoraAdapter:
        loaded = Future[LoraAdapter]()

        def load() -> None:
            if loaded.set_running_or_notify_cancel():
                try:
                    loaded.set_result(LoraAdapter(self._model, file.path, file.scale))
                except RuntimeFault as fault:
                    loaded.set_exception(fault)

        self._between_steps(load)
        return await asyncio.wrap_future(loaded)

    def remove(self, name: str) -> None:
        """Serve an adapter no more; raises :class:`ApiError` (404).

        Sequences under way with it go on to their ends; then its memory is freed.
        """
        adapter = self._by_name.pop(name, None)
        if adapter is None:
            raise ApiError(
                404,
                f"There is no adapter '{name}'; loaded: {', '.join(self._by_name) or 'none'}.",
                param="lora_name",
                code="model_not_found",
            )
        self._free_if_unused(adapter)

    def hold(self, adapter: LoraAdapter | None, sequences: int) -> None:
        """Keep an adapter in memory until so many sequences are released."""
        if adapter is not None:
            self._sequences[adapter] += sequences

    def release(self, adapter: LoraAdapter | None) -> None:
        """One sequence with an adapter has ended."""
        if adapter is not None:
            self._sequences[adapter] -= 1
            self._free_if_unused(adapter)

    def _free_if_unused(self, adapter: LoraAdapter) -> None:
        if adapter in self._by_name.values() or self._sequences[adapter]:
            return
        del self._sequences[adapter]
        self._between_steps(lambda: self._free(adapter))

    def _free(self, adapter: LoraAdapter) -> None:
        # It may be that of the last batch, and llama.cpp keeps the pointer.
        use_adapter(self._context.handle, None)
        adapter.close()
