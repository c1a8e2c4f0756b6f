"""`rigserve serve`: puts the parts together, runs them, and takes them apart in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TypeVar

import aiohttp
import uvicorn
import uvloop

from serving.config import Config
from serving.cost.ledger import Ledger
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook
from serving.database import DatabaseError
from serving.engines.launch import Launcher
from serving.engines.llama_cpp import LlamaCppLauncher
from serving.engines.supervisor import EngineStartError, Supervisor
from serving.gateway.app import create_app
from serving.gateway.background import BackgroundResponses
from serving.gateway.batch_runner import BatchRunner
from serving.gateway.batch_store import BatchStore
from serving.gateway.file_store import FileStore
from serving.gateway.intake import Gateway
from serving.gateway.metering import Meter
from serving.gateway.relay import Relay
from serving.gateway.response_store import ResponseStore
from serving.gateway.routing import Router
from serving.hardware.energy import open_meter
from serving.metrics import Metrics
from serving.models.sources import ModelError

_log = logging.getLogger(__name__)

_Store = TypeVar("_Store")

# After the drain: how long requests may take to notice that their engines are gone.
_LAST_WORDS_SECONDS = 6.0


class ServeError(Exception):
    """The server could not start or go on; the message is for the operator."""


def ledger_path(config: Config) -> Path:
    """Where a config's usage ledger is."""
    return _data_dir(config) / "ledger.sqlite"


def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises :class:`ServeError`, ``LedgerError``, ``UnknownModel``."""
    prices = PriceBook(config.cost.compare_to)
    with (
        closing(_listen(config.server.host, config.server.port)) as listener,
        closing(Ledger(ledger_path(config))) as ledger,
        closing(_store(ResponseStore, _data_dir(config) / "responses.sqlite")) as responses,
        closing(_store(FileStore, _data_dir(config))) as files,
        closing(_store(BatchStore, _data_dir(config))) as batches,
        closing(open_meter(config.cost.power)) as power,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        metrics = Metrics()
        meter = Meter(ledger, metrics, CostModel(config.cost), prices, power)
        runner.run(_serve(config, listener, meter, metrics, responses, files, batches))


def _data_dir(config: Config) -> Path:
    return Path(config.storage.data_dir)


def _store(kind: Callable[[Path], _Store], path: Path) -> _Store:
    try:
        return kind(path)
    except DatabaseError as error:
        raise ServeError(str(error)) from error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"cannot listen on {host}:{port}: {error.strerror}; "
            "stop what uses that port, or change server.port"
        ) from error
    return listener


async def _serve(
    config: Config,
    listener: socket.socket,
    meter: Meter,
    metrics: Metrics,
    response_store: ResponseStore,
    files: FileStore,
    batches: BatchStore,
) -> None:
    launchers: dict[str, Launcher] = {
        "llama_cpp": LlamaCppLauncher(Path(config.storage.cache_dir)),
    }
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        supervisor = Supervisor(config.models, launchers, session)
        relay = Relay(session, meter)
        responses = BackgroundResponses(response_store, relay)
        gateway = Gateway(
            router=Router(supervisor.engines),
            relay=relay,
            meter=meter,
            metrics=metrics,
            session=session,
            max_body_bytes=config.server.max_body_bytes,
            body_timeout_seconds=config.server.body_timeout_seconds,
            lenient=config.server.lenient,
            responses=responses,
            files=files,
            batches=batches,
        )
        batch_runner = BatchRunner(gateway)
        signals = asyncio.Queue[int]()
        loop = asyncio.get_running_loop()
        server = _Server(
            create_app(gateway),
            lambda number: loop.call_soon_threadsafe(signals.put_nowait, number),
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        engines = asyncio.create_task(supervisor.run())
        stopping = asyncio.create_task(signals.get())
        host, port = listener.getsockname()[:2]
        _log.info("listening on http://%s:%d/v1", f"[{host}]" if ":" in host else host, port)
        await asyncio.wait((serving, engines, stopping), return_when=asyncio.FIRST_COMPLETED)
        gateway.draining = True
        batch_runner.stop()
        if stopping.done():
            await _drain(relay, engines, signals, config.server.drain_timeout_seconds)
        stopping.cancel()
        engines.cancel()
        ended = (await asyncio.gather(engines, return_exceptions=True))[0]
        await _settle(relay)
        server.should_exit = True
        await serving
        # uvicorn has cut off the clients that would not read; what they used is metered too.
        await _settle(relay)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(responses.settled(), _LAST_WORDS_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(batch_runner.stopped(), _LAST_WORDS_SECONDS)
    if isinstance(ended, BaseExceptionGroup):
        raise _readable(ended) from ended


async def _settle(relay: Relay) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(relay.settled(), _LAST_WORDS_SECONDS)


async def _drain(
    relay: Relay, engines: asyncio.Task[None], signals: asyncio.Queue[int], limit_seconds: float
) -> None:
    """Let requests in flight finish, until the limit, a second signal, or the end of the engines."""
    _log.info(
        "draining: %d requests in flight may go on for %g s; signal again to stop now",
        *(relay.open_requests, limit_seconds),
    )
    settled = asyncio.create_task(relay.settled())
    impatient = asyncio.create_task(signals.get())
    await asyncio.wait(
        (settled, impatient, engines),
        timeout=limit_seconds,
        return_when=asyncio.FIRST_COMPLETED,
    )
    settled.cancel()
    impatient.cancel()


def _readable(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first cause in a task group's failure, as a :class:`ServeError` if it is one we know."""
    cause: BaseException = group
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return ServeError(str(cause)) if isinstance(cause, EngineStartError | ModelError) else cause


class _Server(uvicorn.Server):
    """uvicorn, but signals begin a drain instead of closing the listener: new requests get an answer."""

    def __init__(self, app: object, on_signal: Callable[[int], object]) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                http="httptools",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn on SIGINT and SIGTERM."""
        self._on_signal(signal.Signals(sig))
