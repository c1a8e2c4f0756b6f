"""One engine process and its life: loaded, watched, started again when it crashes, unloaded."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import aiohttp

from serving.config import ModelConfig
from serving.engines import guard
from serving.engines.adapters import AdapterCalls, LiveAdapters
from serving.engines.launch import Files, Footprint, Launch, Launcher, free_port
from serving.engines.standstill import Standstill
from serving.models.sources import ModelError

_log = logging.getLogger(__name__)
# What engines print, line by line.
_engine_log = logging.getLogger("rigserve.engine")

_PROBE_INTERVAL_SECONDS = 0.1
_PROBE_TIMEOUT_SECONDS = 2.0
_WATCH_INTERVAL_SECONDS = 5.0
# How long the last lines of an engine that has ended may take to arrive.
_LAST_LINES_SECONDS = 1.0
# Some say why they cannot start long before the end: Python's, on their way through several processes.
_LOG_LINES_KEPT = 500
_LOG_LINES_SHOWN = 40
_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 30.0
# An engine that has run this long was healthy: its next crash starts the backoff anew.
_HEALTHY_SECONDS = 60.0
# vLLM's calls. Its weights wait in main memory, which level 2 would not keep.
_SLEEP_PATH, _WAKE_PATH = "/sleep?level=1", "/wake_up"

_numbers = itertools.count(1)


class EngineState(Enum):
    """An engine's life.

    UNLOADED → PREPARING → STARTING → READY → (crash) → BACKOFF → STARTING. From any of these it may be
    told to go: UNLOADING, while its process still has its memory, then UNLOADED, or STOPPED for good. One that can
    may be put to sleep when it is READY: ASLEEP, a process without the memory of its cards, then STARTING as it wakes.
    """

    UNLOADED = "unloaded"
    PREPARING = "preparing"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    ASLEEP = "asleep"
    UNLOADING = "unloading"
    STOPPED = "stopped"


class EngineStartError(Exception):
    """An engine could not be loaded; the message ends with its last lines."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a running engine listens, and the key it asks for."""

    base_url: str
    api_key: str


class Engine:
    """A model of the config, and the process that serves it while it is loaded.

    ``is_expected`` is true for one that should take requests at all times: it was loaded with the server,
    and nobody has unloaded it since.
    """

    def __init__(
        self, model: ModelConfig, launcher: Launcher[Any], session: aiohttp.ClientSession
    ) -> None:
        # While a reload changes a model, it has two engines.
        self.id = f"{model.name}#{next(_numbers)}"
        self.model = model
        self.launcher = launcher
        self.is_expected = model.load == "preload"
        self.state = EngineState.PREPARING if self.is_expected else EngineState.UNLOADED
        self.restarts = 0
        # Known once its files are there.
        self.footprint: Footprint | None = None
        # Memory by device that is set aside for it, in MiB; empty while it is unloaded.
        self.shares_mib: Mapping[str, int] = {}
        # The cards that its process may see; None where that was left open.
        self.cards: tuple[str, ...] | None = None
        # What of that it was last seen to hold.
        self.held_mib: Mapping[str, int] = {}
        # Why its last load failed; None if it did not.
        self.failure: str | None = None
        # Those of its process; none while it has none.
        self.live_adapters = LiveAdapters()
        # Whether it has requests, as far as somebody knows.
        self.has_work: Callable[[], bool] = lambda: False
        self._session = session
        self._listeners: list[Callable[[Engine], None]] = []
        self._endpoint: Endpoint | None = None
        self._launch: Launch | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._preparing: asyncio.Future[Files] | None = None
        self._life: asyncio.Task[None] | None = None
        self._falling_asleep: asyncio.Task[None] | None = None
        self._closed = False
        self._last_lines: deque[str] = deque(maxlen=_LOG_LINES_KEPT)

    @property
    def endpoint(self) -> Endpoint | None:
        """Where to send requests; None unless the engine is ready."""
        return self._endpoint if self.state is EngineState.READY else None

    @property
    def is_loaded(self) -> bool:
        """Whether it has a process that takes requests, or is about to have one: being started, ready, or started again."""
        return self._life is not None and self.state not in (
            EngineState.UNLOADING,
            EngineState.ASLEEP,
        )

    @property
    def can_sleep(self) -> bool:
        """Whether it is ready, and can give its cards' memory away for a while."""
        is_able = self.footprint is not None and self.footprint.asleep_mib > 0
        return is_able and self.state is EngineState.READY

    @property
    def pid(self) -> int | None:
        """The process from which all of the engine's descend; None while there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def on_change(self, listener: Callable[[Engine], None]) -> None:
        """Call ``listener`` after each change of the state, in the event loop; it must not raise."""
        self._listeners.append(listener)

    async def prepare(self) -> Files:
        """The model's files, fetched and converted once. Raises ``ModelError``; then the next call tries again."""
        if self._preparing is None or _has_failed(self._preparing):
            self._preparing = asyncio.create_task(
                _in_background(lambda: self.launcher.prepare(self.model))
            )
            # Should nobody wait for it any more, its failure is nobody's concern.
            self._preparing.add_done_callback(_has_failed)
        return await asyncio.shield(self._preparing)

    async def prepare_for(self, model: ModelConfig) -> Files:
        """The files of another config of the model, for :meth:`take_up`. Raises ``ModelError``."""
        return await _in_background(lambda: self.launcher.prepare(model))

    def take_up(self, model: ModelConfig, files: Files | None) -> None:
        """Be another config of the model from now on, one that needs no other process; None: prepare its files later."""
        self.model = model
        self._preparing = None
        if files is not None:
            self._preparing = asyncio.get_running_loop().create_future()
            self._preparing.set_result(files)
        if self.state is EngineState.ASLEEP:
            self.stop()
        if not self.is_loaded:
            self.footprint = None

    @property
    def files(self) -> Files | None:
        """What its process is made of, or is to be; None while that is not known."""
        if self._preparing is None or not self._preparing.done() or _has_failed(self._preparing):
            return None
        return self._preparing.result()

    def begin(self) -> None:
        """A load begins: files are made ready, and room. :meth:`start` or :meth:`fail` must follow."""
        if self._closed:
            raise EngineStartError(f"{self.model.name}: the server lets go of it")
        self.failure = None
        self._move(EngineState.PREPARING)

    def start(self, gpus: tuple[str, ...] | None) -> None:
        """Keep a process running, until :meth:`stop`; :meth:`ready` tells when it takes requests.

        ``gpus`` are those it may see; None leaves that open. :meth:`begin` and :meth:`prepare` come before.
        """
        assert self.state is EngineState.PREPARING
        self.cards = gpus
        self._life = asyncio.create_task(self._live(gpus), name=f"engine {self.model.name}")
        self._life.add_done_callback(self._ended)
        self._move(EngineState.STARTING)

    def fail(self, reason: str) -> None:
        """Note why a load did not come to a start."""
        self.failure = reason
        self.is_expected = False
        self.shares_mib = {}
        if self.state is EngineState.PREPARING:
            self._move(EngineState.UNLOADED)

    async def ready(self) -> None:
        """Wait until the engine takes requests; raises :class:`EngineStartError` if it is not loaded any more."""
        while self.state is not EngineState.READY:
            if not self.is_loaded:
                raise EngineStartError(self.failure or f"{self.model.name}: it was unloaded")
            await self._change()

    async def leaves(self, endpoint: Endpoint) -> None:
        """Wait until it takes requests at ``endpoint`` no more."""
        while self.endpoint is endpoint:
            await self._change()

    def stop(self) -> None:
        """Begin to end the process, if there is one; :meth:`gone` tells when its memory is free."""
        self.is_expected = False
        if self._life is not None and self.state is not EngineState.UNLOADING:
            self._move(EngineState.UNLOADING)
            self._life.cancel()
        elif self.state is EngineState.PREPARING:
            self.shares_mib = {}
            self._move(EngineState.UNLOADED)

    def doze(self) -> None:
        """Begin to fall asleep: it takes no requests from now on; :meth:`asleep` tells when its cards' memory is free."""
        assert self.can_sleep
        self.is_expected = False
        self._move(EngineState.ASLEEP)
        self._falling_asleep = asyncio.create_task(self._tell(_SLEEP_PATH))
        self._falling_asleep.add_done_callback(_has_failed)

    async def asleep(self) -> None:
        """Wait until it sleeps. One that does not fall asleep is stopped instead, and gone."""
        assert self._falling_asleep is not None
        try:
            await asyncio.shield(self._falling_asleep)
        except EngineStartError as error:
            _log.error("%s; it is unloaded instead", error)
            self.stop()
            await self.gone()

    async def wake(self) -> None:
        """Have one that sleeps take requests again, on the same cards, whose memory must be free.

        Raises :class:`EngineStartError`; then it is gone.
        """
        await self.asleep()
        if self._life is None:
            raise EngineStartError(f"{self.model.name}: it was unloaded")
        self.failure = None
        self._move(EngineState.STARTING)
        try:
            await self._tell(_WAKE_PATH)
        except BaseException as error:
            self.failure = str(error) or "its load was broken off"
            self.stop()
            await self.gone()
            raise
        # Unless it has ended, and been started again, meanwhile.
        if self.state == EngineState.STARTING:
            self._move(EngineState.READY)

    def close(self) -> None:
        """Stop for good: it cannot be loaded again."""
        self._closed = True
        if self._preparing is not None:
            self._preparing.cancel()
        self.stop()
        if self._life is None:
            self._move(EngineState.STOPPED)

    async def gone(self) -> None:
        """Wait until there is no process."""
        while self._life is not None:
            await asyncio.wait((self._life,))

    def _move(self, state: EngineState) -> None:
        if state is self.state:
            return
        self.state = state
        for listener in tuple(self._listeners):
            listener(self)

    async def _change(self) -> None:
        """Wait for the next change of the state."""
        changed = asyncio.Event()

        def listener(_: Engine) -> None:
            changed.set()

        self._listeners.append(listener)
        try:
            await changed.wait()
        finally:
            self._listeners.remove(listener)

    async def _live(self, gpus: tuple[str, ...] | None) -> None:
        """Keep a process running until cancelled, or until its first start fails."""
        backoff_seconds = _FIRST_BACKOFF_SECONDS
        was_ready = False
        while True:
            attempt = await self._attempt(gpus)
            was_ready = was_ready or attempt.ready_seconds is not None
            if not was_ready or self.state is EngineState.ASLEEP:
                raise EngineStartError(f"{self.model.name}: {attempt.reason}{self._tail()}")
            if (attempt.ready_seconds or 0.0) > _HEALTHY_SECONDS:
                backoff_seconds = _FIRST_BACKOFF_SECONDS
            self._move(EngineState.BACKOFF)
            self.restarts += 1
            _log.error(
                "%s: %s; starting it again in %.1f s%s",
                *(self.model.name, attempt.reason, backoff_seconds, self._tail()),
            )
            await asyncio.sleep(backoff_seconds)
            self._move(EngineState.STARTING)
            backoff_seconds = min(2 * backoff_seconds, _LONGEST_BACKOFF_SECONDS)

    def _ended(self, life: asyncio.Task[None]) -> None:
        """Nothing runs any more: by intent, or because the first start failed."""
        error = None if life.cancelled() else life.exception()
        if error is not None:
            self.failure = str(error)
            self.is_expected = False
            if not isinstance(error, EngineStartError):
                _log.error("%s: its engine's task failed", self.model.name, exc_info=error)
        self._life = None
        self.shares_mib = self.held_mib = {}
        self._move(EngineState.STOPPED if self._closed else EngineState.UNLOADED)

    async def _attempt(self, gpus: tuple[str, ...] | None) -> _Attempt:
        """One process, from its launch to its end."""
        try:
            files = await self.prepare()
        except ModelError as error:
            return _Attempt(str(error), None)
        self._last_lines.clear()
        port = self.model.port or free_port()
        api_key = secrets.token_urlsafe(32)
        launch = self._launch = self.launcher.launch(self.model, files, port, api_key, gpus)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, *launch.command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **launch.environment},
            )
        except OSError as error:
            return _Attempt(f"the engine could not be launched: {error.strerror}", None)
        self._process = process
        log_reader = asyncio.create_task(self._read_log(process))
        self._endpoint = Endpoint(f"http://127.0.0.1:{port}", api_key)
        calls = AdapterCalls(self._session, self._endpoint.base_url, api_key)
        self.live_adapters = LiveAdapters(files.adapters, launch.adapter_room, calls)
        try:
            ready = await self._becomes_ready(process)
            if not ready and process.returncode is None:
                limit = self.model.start_timeout_seconds
                return _Attempt(f"the engine was not ready after {limit:g} s", None)
            if not ready:
                await asyncio.wait((log_reader,), timeout=_LAST_LINES_SECONDS)
                told = launch.explain(self._last_lines)
                reason = _exit_reason(process.returncode)
                return _Attempt(f"the engine {reason}{f': {told}' if told else ''}", None)
            ready_since = time.monotonic()
            _log.info("%s: ready", self.model.name)
            self._move(EngineState.READY)
            stuck = await self._ends_or_hangs(process)
            if self.state is not EngineState.ASLEEP:
                self._move(EngineState.BACKOFF)
            reason = stuck or _exit_reason(process.returncode)
            return _Attempt(f"the engine {reason}", time.monotonic() - ready_since)
        finally:
            await _stop(process)
            self._process = None
            self.live_adapters = LiveAdapters()
            # A helper that outlives its engine keeps the pipe open.
            await asyncio.wait((log_reader,), timeout=_LAST_LINES_SECONDS)
            log_reader.cancel()

    async def _becomes_ready(self, process: asyncio.subprocess.Process) -> bool:
        deadline = time.monotonic() + self.model.start_timeout_seconds
        while process.returncode is None and time.monotonic() < deadline:
            if await self._answers(_PROBE_TIMEOUT_SECONDS):
                return True
            await asyncio.sleep(_PROBE_INTERVAL_SECONDS)
        return False

    async def _ends_or_hangs(self, process: asyncio.subprocess.Process) -> str:
        """Wait until a process has ended, or is stuck for the model's ``step_timeout_seconds``; tells how it is stuck."""
        assert self._endpoint is not None
        assert self._launch is not None
        limit_seconds = self.model.step_timeout_seconds
        ending = asyncio.create_task(process.wait())
        silent_since: float | None = None
        standstill = None
        if self._launch.pulse is not None:
            where = (self._endpoint.base_url, self._endpoint.api_key)
            standstill = Standstill(self._launch.pulse, self._session, *where)
        try:
            while not ending.done():
                asked_at = time.monotonic()
                if await self._answers(limit_seconds):
                    silent_since = None
                else:
                    silent_since = silent_since or asked_at
                    if time.monotonic() - silent_since >= limit_seconds:
                        return f"did not answer for {limit_seconds:g} s"
                if standstill is not None:
                    still_seconds = await standstill.seconds(has_work=self.has_work())
                    if still_seconds >= limit_seconds:
                        return f"has requests, and computed nothing for {still_seconds:.0f} s"
                await asyncio.wait((ending,), timeout=min(_WATCH_INTERVAL_SECONDS, limit_seconds))
            return ""
        finally:
            ending.cancel()
            if standstill is not None:
                standstill.rest()

    async def _answers(self, timeout_seconds: float) -> bool:
        """Whether the process says within that time that it works."""
        assert self._endpoint is not None
        assert self._launch is not None
        url = f"{self._endpoint.base_url}{self._launch.health_path}"
        # Without its key, another engine that listens on the port would pass for this one.
        headers = {"authorization": f"Bearer {self._endpoint.api_key}"}
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.get(url, headers=headers, timeout=timeout) as answer:
                return answer.status == 200
        return False

    async def _tell(self, path: str) -> None:
        """Have the process do something; raises :class:`EngineStartError` unless it is done."""
        assert self._endpoint is not None
        url = f"{self._endpoint.base_url}{path}"
        headers = {"authorization": f"Bearer {self._endpoint.api_key}"}
        timeout = aiohttp.ClientTimeout(total=self.model.start_timeout_seconds)
        try:
            async with self._session.post(url, headers=headers, timeout=timeout) as answer:
                told = await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineStartError(f"{self.model.name}: {path}: {error!r}") from error
        if answer.status != 200:
            raise EngineStartError(f"{self.model.name}: {path}: {answer.status} {told}")

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            self._last_lines.append(line)
            _engine_log.info("[%s] %s", self.model.name, line)

    def _tail(self) -> str:
        if not self._last_lines:
            return ""
        shown = list(self._last_lines)[-_LOG_LINES_SHOWN:]
        return ". Its last lines:\n" + "\n".join(f"    {line}" for line in shown)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """How a process ended; ``ready_seconds`` is how long it served, None if it never did."""

    reason: str
    ready_seconds: float | None


def _has_failed(task: asyncio.Future[Any]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def _in_background(work: Callable[[], Files]) -> Files:
    """Like ``asyncio.to_thread``, on a thread that nobody waits for at exit: downloads take hours."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Files] = loop.create_future()

    def settle(result: Files | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if result is not None:
            done.set_result(result)
        elif error is not None:
            done.set_exception(error)

    def run() -> None:
        result = failure = None
        try:
            result = work()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="prepare", daemon=True).start()
    return await done


def _exit_reason(code: int | None) -> str:
    if code is not None and code > 128:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(code - 128).name}"
    return f"exited with code {code}"


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a process and its engine; the guard sees to it that both go within its grace period."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
    if process.stdin is not None:
        process.stdin.close()


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of a stream, however long."""
    rest = b""
    while data := await stream.read(2**16):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", errors="replace")
    if rest:
        yield rest.decode("utf-8", errors="replace")
