"""Keeps engine processes alive: starts, watches, restarts and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import aiohttp

from serving.config import ModelConfig
from serving.engines import guard
from serving.engines.launch import Files, Launcher, free_port

_log = logging.getLogger(__name__)
# What engines print, line by line.
_engine_log = logging.getLogger("rigserve.engine")

_PROBE_INTERVAL_SECONDS = 0.1
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
# How long the last lines of an engine that has ended may take to arrive.
_LAST_LINES_SECONDS = 1.0
_LOG_LINES_KEPT = 40
_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 30.0
# An engine that has run this long was healthy: its next crash starts the backoff anew.
_HEALTHY_SECONDS = 60.0


class EngineState(Enum):
    """An engine's life.

    PREPARING → STARTING → READY → (crash) → BACKOFF → STARTING; any state → STOPPED.
    """

    PREPARING = "preparing"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    STOPPED = "stopped"


class EngineStartError(Exception):
    """An engine that has never been ready could not be started; the message ends with its last lines."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a running engine listens, and the key it asks for."""

    base_url: str
    api_key: str


class Engine:
    """One supervised engine: a model of the config and the process that serves it."""

    def __init__(self, model: ModelConfig, launcher: Launcher) -> None:
        self.model = model
        self.state = EngineState.PREPARING
        self.restarts = 0
        self._launcher = launcher
        self._endpoint: Endpoint | None = None
        self._last_lines: deque[str] = deque(maxlen=_LOG_LINES_KEPT)

    @property
    def endpoint(self) -> Endpoint | None:
        """Where to send requests; None unless the engine is ready."""
        return self._endpoint if self.state is EngineState.READY else None

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Prepare the model, then keep an engine running until cancelled.

        Raises :class:`EngineStartError` when the first start fails, and ``ModelError`` when the model
        cannot be prepared.
        """
        try:
            files = await _in_background(lambda: self._launcher.prepare(self.model))
            backoff_seconds = _FIRST_BACKOFF_SECONDS
            while True:
                attempt = await self._attempt(files, session)
                if attempt.ready_seconds is None and self.restarts == 0:
                    raise EngineStartError(f"{self.model.name}: {attempt.reason}{self._tail()}")
                if (attempt.ready_seconds or 0.0) > _HEALTHY_SECONDS:
                    backoff_seconds = _FIRST_BACKOFF_SECONDS
                self.state = EngineState.BACKOFF
                self.restarts += 1
                _log.error(
                    "%s: %s; starting it again in %.1f s%s",
                    *(self.model.name, attempt.reason, backoff_seconds, self._tail()),
                )
                await asyncio.sleep(backoff_seconds)
                backoff_seconds = min(2 * backoff_seconds, _LONGEST_BACKOFF_SECONDS)
        finally:
            self.state = EngineState.STOPPED

    async def _attempt(self, files: Files, session: aiohttp.ClientSession) -> _Attempt:
        """One process, from its launch to its end."""
        self.state = EngineState.STARTING
        self._last_lines.clear()
        port = self.model.port or free_port()
        api_key = secrets.token_urlsafe(32)
        launch = self._launcher.launch(self.model, files, port, api_key)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guard.__file__, *launch.command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **launch.environment},
        )
        log_reader = asyncio.create_task(self._read_log(process))
        self._endpoint = Endpoint(f"http://127.0.0.1:{port}", api_key)
        try:
            ready = await self._becomes_ready(process, session)
            if not ready and process.returncode is None:
                limit = self.model.start_timeout_seconds
                return _Attempt(f"the engine was not ready after {limit:g} s", None)
            if not ready:
                return _Attempt(f"the engine {_exit_reason(process.returncode)}", None)
            ready_since = time.monotonic()
            self.state = EngineState.READY
            _log.info("%s: ready", self.model.name)
            await process.wait()
            self.state = EngineState.BACKOFF
            reason = f"the engine {_exit_reason(process.returncode)}"
            return _Attempt(reason, time.monotonic() - ready_since)
        finally:
            await _stop(process)
            # A helper that outlives its engine keeps the pipe open.
            await asyncio.wait((log_reader,), timeout=_LAST_LINES_SECONDS)
            log_reader.cancel()

    async def _becomes_ready(
        self, process: asyncio.subprocess.Process, session: aiohttp.ClientSession
    ) -> bool:
        assert self._endpoint is not None
        url = f"{self._endpoint.base_url}/health"
        # Without its key, another engine that listens on the port would pass for this one.
        headers = {"authorization": f"Bearer {self._endpoint.api_key}"}
        deadline = time.monotonic() + self.model.start_timeout_seconds
        while process.returncode is None and time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url, headers=headers, timeout=_PROBE_TIMEOUT) as answer:
                    if answer.status == 200:
                        return True
            await asyncio.sleep(_PROBE_INTERVAL_SECONDS)
        return False

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in _lines(process.stdout):
            self._last_lines.append(line)
            _engine_log.info("[%s] %s", self.model.name, line)

    def _tail(self) -> str:
        if not self._last_lines:
            return ""
        return ". Its last lines:\n" + "\n".join(f"    {line}" for line in self._last_lines)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """How a process ended; ``ready_seconds`` is how long it served, None if it never did."""

    reason: str
    ready_seconds: float | None


class Supervisor:
    """All engines of a config."""

    def __init__(
        self,
        models: Sequence[ModelConfig],
        launchers: Mapping[str, Launcher],
        session: aiohttp.ClientSession,
    ) -> None:
        """``launchers`` by the config's ``engine`` names; ``session`` must outlive the supervisor."""
        self.engines = [Engine(model, launchers[model.engine]) for model in models]
        self._session = session

    async def run(self) -> None:
        """Run all engines until cancelled; the first that cannot be started ends them all and raises."""
        async with asyncio.TaskGroup() as group:
            for engine in self.engines:
                group.create_task(engine.run(self._session))


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
