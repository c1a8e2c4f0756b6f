"""All engines of a config: which are loaded, where, and in what memory.

It loads and unloads when told to; when that should be is for others to say. Each engine keeps itself alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import aiohttp

from serving.config import MemoryConfig, ModelConfig, VllmModel
from serving.engines.engine import Endpoint, Engine, EngineStartError, EngineState
from serving.engines.launch import Footprint, Launcher
from serving.engines.placement import HOST, Device, Need, Plan, Resident, can_ever_fit, place
from serving.hardware.memory import Gpu, family_of, gpu_mib_of, gpus, host_usable_mib, resident_mib
from serving.models.sources import ModelError

__all__ = [
    "Endpoint",
    "Engine",
    "EngineStartError",
    "EngineState",
    "NoRoomError",
    "Supervisor",
]

_log = logging.getLogger(__name__)

_MEASURE_INTERVAL_SECONDS = 15.0


class NoRoomError(EngineStartError):
    """A model does not fit: beside those that may not leave now, or, if ``is_final``, at all."""

    def __init__(self, message: str, *, is_final: bool) -> None:
        super().__init__(message)
        self.is_final = is_final


def _nobody(_: Engine) -> bool:
    return False


class Supervisor:
    """The engines, one for each model of the config, in its order."""

    def __init__(
        self,
        models: Sequence[ModelConfig],
        launchers: Mapping[str, Launcher[Any]],
        session: aiohttp.ClientSession,
        memory: MemoryConfig,
    ) -> None:
        """``launchers`` by the config's ``engine`` names; ``session`` must outlive the supervisor."""
        self._launchers = launchers
        self._session = session
        self.memory = memory
        self._listeners: list[Callable[[Engine], None]] = []
        self._loads: dict[Engine, asyncio.Task[None]] = {}
        self._last_used: Callable[[Engine], float] = lambda _: 0.0
        self._in_flight: Callable[[Engine], int] = lambda _: 0
        self.engines: tuple[Engine, ...] = tuple(map(self.make, models))

    def make(self, model: ModelConfig) -> Engine:
        """An engine for a model, unloaded and not yet among :attr:`engines`."""
        engine = Engine(model, self._launchers[model.engine], self._session)
        engine.on_change(self._tell)
        engine.has_work = lambda: self._in_flight(engine) > 0
        return engine

    def subscribe(self, listener: Callable[[Engine], None]) -> None:
        """Call ``listener`` with every engine whose state has changed, in the event loop; it must not raise."""
        self._listeners.append(listener)

    def traffic(
        self, last_used: Callable[[Engine], float], in_flight: Callable[[Engine], int]
    ) -> None:
        """How to learn when an engine last had work (``time.monotonic()``), to choose who makes room, and how much it has."""
        self._last_used, self._in_flight = last_used, in_flight

    async def run(self) -> None:
        """Load what is to be preloaded and keep it alive until cancelled; then all engines end.

        The first engine that cannot be started ends them all, and its error is raised in a group.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for engine in self.engines:
                    if engine.is_expected:
                        group.create_task(self.load(engine))
            while True:
                await asyncio.sleep(_MEASURE_INTERVAL_SECONDS)
                await self.measure()
        finally:
            await self.close(self.engines)

    async def load(self, engine: Engine, may_leave: Callable[[Engine], bool] = _nobody) -> None:
        """Have an engine ready. Concurrent callers share one load, which goes on when they give up.

        Those who must leave for it are unloaded before, or put to sleep, if ``may_leave`` (and they are not pinned). One
        that crashed is waited for, one that sleeps is woken. Raises :class:`EngineStartError`, with the process's last
        lines if there are any, and its kind :class:`NoRoomError`, at once, while there is no place for it: nobody has
        left then.
        """
        while (ending := self._loads.get(engine)) is not None and ending.cancelling():
            await asyncio.wait((ending,))
        if engine not in self._loads:
            self._loads[engine] = asyncio.create_task(self._load(engine, may_leave))
            self._loads[engine].add_done_callback(lambda task: self._loaded(engine, task))
        load = self._loads[engine]
        try:
            await asyncio.shield(load)
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if load.cancelled() and not (me and me.cancelling()):
                raise EngineStartError(f"{engine.model.name}: it was unloaded") from None
            raise

    async def unload(self, engine: Engine) -> None:
        """Have an engine's process ended and its memory free; whoever waits for its load gets an error.

        Requests in flight break off: who has some must be asked before. Does nothing to one that is unloaded.
        """
        load = self._loads.get(engine)
        if load is not None:
            load.cancel()
        engine.stop()
        await engine.gone()
        if load is not None:
            await asyncio.wait((load,))

    async def footprint(self, engine: Engine) -> Footprint:
        """The memory an engine takes; prepares its files, which may take long. Raises ``ModelError``."""
        files = await engine.prepare()
        if engine.footprint is None:
            on_gpu = bool(self._gpus_for(engine))
            engine.footprint = await asyncio.to_thread(
                engine.launcher.footprint, engine.model, files, on_gpu=on_gpu
            )
        return engine.footprint

    def plan(self, engine: Engine, may_leave: Callable[[Engine], bool] = _nobody) -> Plan | None:
        """Where an engine whose footprint is known would go now, and who would leave; None while there is no place.

        Raises :class:`NoRoomError` if there never is one.
        """
        need, devices = self._need(engine), self._devices()
        others = [each for each in self.engines if each is not engine and each.shares_mib]
        plan = place(need, devices, [self._resident(each, may_leave(each)) for each in others])
        pinned = [self._resident(each, False) for each in others if each.model.pinned]
        if plan is None and not can_ever_fit(need, devices, pinned):
            raise NoRoomError(_never(engine, need, devices), is_final=True)
        return plan

    async def measure(self) -> None:
        """See what memory the processes hold, and correct what is set aside for them."""
        ready = [(e, e.pid) for e in self.engines if e.state is EngineState.READY and e.pid]
        for engine, pid in ready:
            held = await asyncio.to_thread(_held_mib, pid, bool(self._gpus_for(engine)))
            if engine.pid != pid or engine.footprint is None or not held.get(HOST):
                continue
            gpu_mib = sum(share for device, share in held.items() if device != HOST) or None
            engine.held_mib = held
            engine.footprint = engine.footprint.corrected(held[HOST], gpu_mib)
            if engine.footprint.source == "measured":
                engine.shares_mib = {
                    device: engine.footprint.host_mib if device == HOST else held.get(device, share)
                    for device, share in engine.shares_mib.items()
                }

    def needs_restart(self, engine: Engine, new: ModelConfig) -> bool:
        """Whether another config of its model is one that an engine cannot take up as it runs. Raises ``ModelError``."""
        old = engine.model
        if old.engine != new.engine or self._launchers[new.engine].differ(old, new):
            return True
        more = [adapter for adapter in new.adapters if adapter not in old.adapters]
        return bool(more) and not engine.live_adapters.has_room_for(more)

    def add(self, engines: Iterable[Engine]) -> None:
        """Have more engines, as :meth:`make` gives them."""
        self.engines = (*self.engines, *engines)

    async def remove(self, engines: Collection[Engine]) -> None:
        """End engines for good, whatever they do, and forget them."""
        await self.close(engines)
        self.engines = tuple(engine for engine in self.engines if engine not in engines)

    async def close(self, engines: Iterable[Engine]) -> None:
        """End engines for good."""
        engines = tuple(engines)
        loads = [self._loads[engine] for engine in engines if engine in self._loads]
        for load in loads:
            load.cancel()
        for engine in engines:
            engine.close()
        await asyncio.gather(*(engine.gone() for engine in engines))

    async def _load(self, engine: Engine, may_leave: Callable[[Engine], bool]) -> None:
        if engine.state is EngineState.ASLEEP:
            await self._wake(engine, may_leave)
        elif not engine.is_loaded:
            await engine.gone()
            engine.begin()
            try:
                await self.footprint(engine)
                await self.measure()
                plan = await self._make_room(engine, may_leave)
                chooses = bool(engine.model.devices) or bool(self._gpus(engine.launcher))
                engine.start(plan.gpus if chooses else None)
            except ModelError as error:
                engine.fail(str(error))
                raise EngineStartError(f"{engine.model.name}: {error}") from error
            except BaseException as error:
                engine.fail(str(error) or "its load was broken off")
                raise
        await engine.ready()

    async def _wake(self, engine: Engine, may_leave: Callable[[Engine], bool]) -> None:
        await self.measure()
        asleep_mib = engine.shares_mib
        try:
            await self._make_room(engine, may_leave)
        except NoRoomError:
            engine.shares_mib = asleep_mib
            raise
        await engine.wake()

    async def _make_room(self, engine: Engine, may_leave: Callable[[Engine], bool]) -> Plan:
        """Set an engine's place aside for it, and have those leave who must; raises :class:`NoRoomError`."""
        # From here to the reservation nothing is awaited: no two loads count on the same room.
        plan = self.plan(engine, may_leave)
        if plan is None:
            raise NoRoomError(self._no_room(engine), is_final=False)
        engine.shares_mib = plan.shares_mib
        leaving = [each for each in self.engines if each.id in plan.leave]
        dozing = self._can_sleep(leaving)
        for each in leaving:
            _log.info("%s: makes room for %s", each.model.name, engine.model.name)
            each.doze() if each in dozing else each.stop()
        await asyncio.gather(*(each.gone() for each in leaving if each not in dozing))
        for each in dozing:
            await each.asleep()
            await self._measure_asleep(each)
        # Their processes keep some of the cards' memory, which may be too much.
        return await self._make_room(engine, _nobody) if dozing else plan

    def _can_sleep(self, leaving: Iterable[Engine]) -> list[Engine]:
        """Those for which there is main memory while they sleep."""
        [host] = [device for device in self._devices() if device.id == HOST]
        free_mib = host.budget_mib - sum(each.shares_mib.get(HOST, 0) for each in self.engines)
        able = []
        for engine in leaving:
            if not engine.can_sleep or engine.footprint is None:
                continue
            more_mib = engine.footprint.asleep_mib - engine.shares_mib.get(HOST, 0)
            if more_mib <= free_mib:
                free_mib -= more_mib
                able.append(engine)
        return able

    async def _measure_asleep(self, engine: Engine) -> None:
        pid = engine.pid
        if engine.state is not EngineState.ASLEEP or engine.footprint is None or pid is None:
            return
        held = await asyncio.to_thread(_held_mib, pid, True)
        if engine.state is EngineState.ASLEEP:
            engine.held_mib = held
            engine.shares_mib = {**held, HOST: max(held[HOST], engine.footprint.asleep_mib)}

    def _loaded(self, engine: Engine, task: asyncio.Task[None]) -> None:
        if self._loads.get(engine) is task:
            del self._loads[engine]
        if not task.cancelled():
            task.exception()  # those who wait for it know; should nobody wait, nobody needs to

    def _tell(self, engine: Engine) -> None:
        for listener in self._listeners:
            listener(engine)

    def _need(self, engine: Engine) -> Need:
        footprint = engine.footprint
        assert footprint is not None, "ask for the footprint first"
        return Need(
            id=engine.id,
            host_mib=footprint.host_mib,
            gpu_mib=footprint.gpu_mib,
            # One that sleeps wakes where it is.
            may_use=engine.cards
            if engine.state is EngineState.ASLEEP and engine.cards is not None
            else tuple(gpu.uuid for gpu in self._gpus_for(engine)),
            group=engine.model.group,
            # vLLM is told on how many, and splits evenly.
            gpu_count=engine.model.cards if isinstance(engine.model, VllmModel) else None,
        )

    def _resident(self, engine: Engine, may_leave: bool) -> Resident:
        return Resident(
            id=engine.id,
            shares_mib=engine.shares_mib,
            # One that is not loaded yet waits for the room that others make for it.
            may_leave=engine.state is EngineState.ASLEEP
            or (may_leave and not engine.model.pinned and engine.is_loaded),
            group=None if engine.state is EngineState.ASLEEP else engine.model.group,
            priority=engine.model.swap_priority,
            last_used=self._last_used(engine),
        )

    def _devices(self) -> list[Device]:
        budget_mib = self.memory.budget_mib
        if budget_mib is None:
            budget_mib = host_usable_mib() - self.memory.reserve_mib
        cards = {gpu.uuid: gpu for each in self._launchers.values() for gpu in self._gpus(each)}
        return [Device(HOST, budget_mib)] + [
            # What our own engines hold is not free, and yet theirs to share.
            Device(
                gpu.uuid,
                gpu.free_mib
                + sum(engine.held_mib.get(gpu.uuid, 0) for engine in self.engines)
                - self.memory.gpu_reserve_mib,
            )
            for gpu in cards.values()
        ]

    def _gpus(self, launcher: Launcher[Any]) -> list[Gpu]:
        return gpus() if launcher.uses_gpus else []

    def _gpus_for(self, engine: Engine) -> list[Gpu]:
        """The cards that a model may go to; raises :class:`NoRoomError` if it names one that is not there."""
        model, there = engine.model, self._gpus(engine.launcher)
        if model.is_for_cpu:
            return []
        if not model.devices:
            return there
        by_name = {name: gpu for gpu in there for name in (str(gpu.index), gpu.uuid)}
        missing = [device for device in model.devices if device not in by_name]
        if missing:
            known = ", ".join(f"{gpu.index} ({gpu.uuid}, {gpu.name})" for gpu in there) or "none"
            raise NoRoomError(
                f"{model.name}: devices names {', '.join(missing)}; the GPUs here: {known}",
                is_final=True,
            )
        return list({gpu.uuid: gpu for gpu in map(by_name.__getitem__, model.devices)}.values())

    def _no_room(self, engine: Engine) -> str:
        need, group = self._need(engine), engine.model.group
        others = [each for each in self.engines if each is not engine and each.shares_mib]
        rivals = [each.model.name for each in others if group and each.model.group == group]
        if rivals:
            return (
                f"{engine.model.name}: {', '.join(rivals)} of its group '{group}' may not leave now, "
                "and models of a group are never loaded together"
            )
        beside = [each.model.name for each in others]
        return (
            f"{engine.model.name}: there is no room for it ({_shown(need, engine.footprint)}) beside "
            f"{', '.join(beside)}, which may not leave now"
        )


def _shown(need: Need, footprint: Footprint | None) -> str:
    source = f", {footprint.source}" if footprint else ""
    on_gpus = f" and {need.gpu_mib} MiB of GPUs" if need.gpu_mib else ""
    return f"{need.host_mib} MiB of main memory{on_gpus}{source}"


def _never(engine: Engine, need: Need, devices: Sequence[Device]) -> str:
    there = ", ".join(f"{device.id}: {device.budget_mib} MiB" for device in devices)
    return (
        f"{engine.model.name}: it needs {_shown(need, engine.footprint)}; that does not fit ({there}) even when all "
        "that are not pinned leave. Serve less of it (quantization, context_length, max_sequences, "
        "prefix_cache_mib, gpu_layers), or correct the figures: memory_mib of the model, "
        "memory.budget_mib"
    )


def _held_mib(pid: int, on_gpu: bool) -> dict[str, int]:
    """What a process and its descendants hold, by device."""
    family = family_of(pid)
    cards = gpu_mib_of(family) if on_gpu else None
    return {HOST: resident_mib(family)} | {uuid: mib for uuid, mib in (cards or {}).items() if mib}
